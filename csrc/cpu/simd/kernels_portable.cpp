#define SA_ISA isa_portable
#define SA_ISA_NAME "portable"
#include "cpu/simd/instruction_set.inc"
