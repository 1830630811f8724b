// The instruction set in use, and its kernels.
#pragma once

#include "cpu/simd/kernels.h"

namespace sink_attention::cpu {

const InstructionSet& current_instruction_set();

// The kernels for a forward or backward with these element types.
const Kernels& kernels_for(attention::DataType dtype, attention::DataType kv_dtype);

}  // namespace sink_attention::cpu
