// Decorations that let one definition serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define SA_HOST_DEVICE __host__ __device__ __forceinline__
#else
// always_inline matters on the CPU: the same header is compiled for several instruction sets into
// one binary, and an out-of-line copy compiled for AVX-512 must never be the one that the linker
// keeps for the portable path.
#define SA_HOST_DEVICE inline __attribute__((always_inline))
#endif
