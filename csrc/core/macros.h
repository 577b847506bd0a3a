// The one macro of the core: how a function is declared so that g++ and nvcc compile the same text.
#pragma once

// Forced inline with internal linkage: the same header is compiled once per instruction set, and a shared
// (weak) copy would let the linker run AVX-512 code on a machine that lacks it.
#if defined(__CUDACC__)
#define FASTKD_FN static __host__ __device__ __forceinline__
#define FASTKD_METHOD __host__ __device__ __forceinline__
#else
#define FASTKD_FN static inline __attribute__((always_inline, unused))
#define FASTKD_METHOD inline __attribute__((always_inline))
#endif
