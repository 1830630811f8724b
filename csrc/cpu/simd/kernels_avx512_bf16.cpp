#define SA_ISA isa_avx512_bf16
#define SA_ISA_NAME "avx512_bf16"
#include "cpu/simd/instruction_set.inc"
