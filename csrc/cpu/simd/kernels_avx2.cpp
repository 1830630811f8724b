#define SA_ISA isa_avx2
#define SA_ISA_NAME "avx2"
#include "cpu/simd/instruction_set.inc"
