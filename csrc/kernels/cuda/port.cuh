// The words in which the kernels speak to the GPU: indices, barriers, shuffles, memory, approximate functions. Nothing
// else in this folder names a CUDA built-in, so the same kernels also run on the CPU against the twin of this header
// (tests/simt/simt_port.h), which checks what hardware leaves undefined.
//
// Shared memory is only dynamic, and read and written only by shared_load, shared_store, peer_load and copies.
// Lanes of a shuffle or ballot are named by an explicit mask. Blocks never wait for each other but in cluster_sync.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__)

#include <simt_port.h>

#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FASTKD_DEVICE static __device__ __forceinline__
#define FASTKD_DEVICE_METHOD __device__ __forceinline__
// A kernel of at most `threads` a block, `blocks` of which are to share a multiprocessor: what bounds its registers.
#define FASTKD_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTKD_CONSTANT const __grid_constant__

namespace fastkd {
namespace gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 16 bytes, the widest access of every supported architecture, and half of it.
struct alignas(16) Vector {
  uint32_t word[4];
};
struct alignas(8) HalfVector {
  uint32_t word[2];
};

FASTKD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTKD_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FASTKD_DEVICE int64_t block_index() { return blockIdx.x; }
FASTKD_DEVICE int64_t grid_blocks() { return gridDim.x; }

// Clusters exist from sm_90 on; elsewhere every block is a cluster of its own.
#if __CUDA_ARCH__ >= 900
FASTKD_DEVICE int cluster_rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
FASTKD_DEVICE int cluster_blocks() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
FASTKD_DEVICE void cluster_sync() { cooperative_groups::this_cluster().sync(); }
// What block `rank` of the cluster holds at this block's address `p` of shared memory.
template <class T>
FASTKD_DEVICE T peer_load(const T* p, int rank) {
  return *cooperative_groups::this_cluster().map_shared_rank(const_cast<T*>(p), rank);
}
#else
FASTKD_DEVICE int cluster_rank() { return 0; }
FASTKD_DEVICE int cluster_blocks() { return 1; }
FASTKD_DEVICE void cluster_sync() { __syncthreads(); }
template <class T>
FASTKD_DEVICE T peer_load(const T* p, int) {
  return *p;
}
#endif

FASTKD_DEVICE void block_sync() { __syncthreads(); }
FASTKD_DEVICE void warp_sync(unsigned mask) { __syncwarp(mask); }
template <class T>
FASTKD_DEVICE T shuffle_xor(unsigned mask, T value, int lanes) {
  return __shfl_xor_sync(mask, value, lanes);
}
template <class T>
FASTKD_DEVICE T shuffle(unsigned mask, T value, int lane) {
  return __shfl_sync(mask, value, lane);
}
FASTKD_DEVICE unsigned ballot(unsigned mask, bool vote) { return __ballot_sync(mask, vote); }

// The block's dynamic shared memory, aligned to 16 bytes.
FASTKD_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
template <class T>
FASTKD_DEVICE T shared_load(const T* p) {
  return *p;
}
template <class T>
FASTKD_DEVICE void shared_store(T* p, T value) {
  *p = value;
}

// Global memory. Logits are read without keeping a line in the first-level cache; a gradient is not read again.
FASTKD_DEVICE Vector load_vector(const void* p) {
  Vector v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}
// As load_vector, of memory that this kernel writes elsewhere (a gradient in place of its logits).
FASTKD_DEVICE Vector load_vector_coherent(const void* p) {
  Vector v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p)
               : "memory");
  return v;
}
FASTKD_DEVICE void store_vector(void* p, Vector v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
FASTKD_DEVICE HalfVector load_half_vector(const void* p) {
  HalfVector v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.word[0]), "=r"(v.word[1])
               : "l"(p)
               : "memory");
  return v;
}
FASTKD_DEVICE void store_half_vector(void* p, HalfVector v) {
  asm volatile("st.global.L1::no_allocate.v2.u32 [%0], {%1, %2};"
               :
               : "l"(p), "r"(v.word[0]), "r"(v.word[1])
               : "memory");
}
template <class T>
FASTKD_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
FASTKD_DEVICE void store(T* p, T value) {
  *p = value;
}

// 16 bytes from global to shared memory behind the thread's back. Copies form groups; copy_wait<n> returns when at most
// the n latest groups of this thread are under way, and makes the older ones visible to this thread alone.
FASTKD_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(at), "l"(global) : "memory");
}
FASTKD_DEVICE void copy_async_half(void* shared, const void* global) {  // 8 bytes
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" : : "r"(at), "l"(global) : "memory");
}
FASTKD_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int kUnderWay>
FASTKD_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kUnderWay) : "memory");
}

// Named barriers of the block, 1 to 15, for `threads` of its threads, whole warps: named_arrive does not wait.
FASTKD_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}
FASTKD_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
#define FASTKD_BULK 1
// A barrier in shared memory that is passed in phases. A phase ends when so many arrivals as phases_init said, and all
// bytes that were expected in it, have come; phases_wait returns when the latest phase of this parity has ended (the
// first phase has parity 0), and makes what came with it visible.
FASTKD_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
FASTKD_DEVICE void phases_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
FASTKD_DEVICE void phases_arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }"
               :
               : "r"(shared_address(barrier))
               : "memory");
}
FASTKD_DEVICE void phases_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
FASTKD_DEVICE void phases_wait(uint64_t* barrier, int parity) {
  const unsigned at = shared_address(barrier);
  unsigned done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(at), "r"(parity)
                 : "memory");
  } while (!done);
}

// A multiple of 16 bytes between addresses that 16 divides, by the copy engine, which is not a thread: it counts what
// it has brought at the barrier. What threads wrote where it writes, or of its barrier, they must fence first.
FASTKD_DEVICE void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
FASTKD_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }
#else
#define FASTKD_BULK 0
#endif

// Stored numbers to float and back, rounded to nearest even.
FASTKD_DEVICE float from_fp16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
FASTKD_DEVICE float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
FASTKD_DEVICE uint16_t to_fp16(float x) { return __half_as_ushort(__float2half_rn(x)); }
FASTKD_DEVICE uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FASTKD_DEVICE uint32_t to_fp16_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
FASTKD_DEVICE uint32_t to_bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
FASTKD_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
FASTKD_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

}  // namespace gpu
}  // namespace fastkd

#endif
