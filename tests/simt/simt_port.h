// The twin of csrc/kernels/cuda/port.cuh: the same words, spoken to the machine of tests/simt. Each takes the place of
// its call as a last argument that kernels leave out.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numbers.h"
#include "words.h"

#define FASTKD_DEVICE static inline __attribute__((unused))
#define FASTKD_DEVICE_METHOD inline
#define FASTKD_KERNEL(threads, blocks) inline void
#define FASTKD_CONSTANT const
#define FASTKD_BULK 1

namespace fastkd {
namespace gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct alignas(16) Vector {
  uint32_t word[4];
};
struct alignas(8) HalfVector {
  uint32_t word[2];
};

template <class T>
constexpr simt::Extent extent_of() {
  return {sizeof(T), alignof(T)};
}

FASTKD_DEVICE int thread_index() { return simt::thread_index(); }
FASTKD_DEVICE int block_threads() { return simt::block_threads(); }
FASTKD_DEVICE int64_t block_index() { return simt::block_index(); }
FASTKD_DEVICE int64_t grid_blocks() { return simt::grid_blocks(); }

FASTKD_DEVICE int cluster_rank() { return simt::cluster_rank(); }
FASTKD_DEVICE int cluster_blocks() { return simt::cluster_blocks(); }
FASTKD_DEVICE void cluster_sync(simt::Site site = {}) { simt::cluster_barrier(site); }
FASTKD_DEVICE void block_sync(simt::Site site = {}) { simt::block_barrier(site); }
FASTKD_DEVICE void warp_sync(unsigned mask, simt::Site site = {}) { simt::meet(simt::Meeting::sync, mask, 0, 0, site); }

// The types that the hardware's shuffles take.
template <class T>
FASTKD_DEVICE T shuffle_by(simt::Meeting kind, unsigned mask, T value, int lane, simt::Site site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "no shuffle of this type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = simt::meet(kind, mask, bits, lane, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
FASTKD_DEVICE T shuffle_xor(unsigned mask, T value, int lanes, simt::Site site = {}) {
  return shuffle_by(simt::Meeting::shuffle_xor, mask, value, lanes, site);
}
template <class T>
FASTKD_DEVICE T shuffle(unsigned mask, T value, int lane, simt::Site site = {}) {
  return shuffle_by(simt::Meeting::shuffle, mask, value, lane, site);
}
FASTKD_DEVICE unsigned ballot(unsigned mask, bool vote, simt::Site site = {}) {
  return static_cast<unsigned>(simt::meet(simt::Meeting::ballot, mask, vote, 0, site));
}

FASTKD_DEVICE char* shared_memory() { return simt::shared_memory(); }
template <class T>
FASTKD_DEVICE T shared_load(const T* p, simt::Site site = {}) {
  T value;
  simt::read_shared(&value, p, extent_of<T>(), site);
  return value;
}
template <class T>
FASTKD_DEVICE void shared_store(T* p, T value, simt::Site site = {}) {
  simt::write_shared(p, &value, extent_of<T>(), site);
}
template <class T>
FASTKD_DEVICE T peer_load(const T* p, int rank, simt::Site site = {}) {
  T value;
  simt::read_peer(&value, p, rank, extent_of<T>(), site);
  return value;
}

FASTKD_DEVICE Vector load_vector(const void* p, simt::Site site = {}) {
  Vector value;
  simt::read_global(&value, p, extent_of<Vector>(), true, site);
  return value;
}
FASTKD_DEVICE Vector load_vector_coherent(const void* p, simt::Site site = {}) {
  Vector value;
  simt::read_global(&value, p, extent_of<Vector>(), false, site);
  return value;
}
FASTKD_DEVICE HalfVector load_half_vector(const void* p, simt::Site site = {}) {
  HalfVector value;
  simt::read_global(&value, p, extent_of<HalfVector>(), false, site);
  return value;
}
FASTKD_DEVICE void store_vector(void* p, Vector v, simt::Site site = {}) {
  simt::write_global(p, &v, extent_of<Vector>(), site);
}
FASTKD_DEVICE void store_half_vector(void* p, HalfVector v, simt::Site site = {}) {
  simt::write_global(p, &v, extent_of<HalfVector>(), site);
}
template <class T>
FASTKD_DEVICE T load(const T* p, simt::Site site = {}) {
  T value;
  simt::read_global(&value, p, extent_of<T>(), false, site);
  return value;
}
template <class T>
FASTKD_DEVICE void store(T* p, T value, simt::Site site = {}) {
  simt::write_global(p, &value, extent_of<T>(), site);
}

FASTKD_DEVICE void copy_async(void* shared, const void* global, simt::Site site = {}) {
  simt::issue_copy(shared, global, 16, site);
}
FASTKD_DEVICE void copy_async_half(void* shared, const void* global, simt::Site site = {}) {
  simt::issue_copy(shared, global, 8, site);
}
FASTKD_DEVICE void copy_commit(simt::Site site = {}) { simt::commit_copies(site); }
template <int kUnderWay>
FASTKD_DEVICE void copy_wait(simt::Site site = {}) {
  simt::wait_for_copies(kUnderWay, site);
}

FASTKD_DEVICE void phases_init(uint64_t* barrier, int arrivals, simt::Site site = {}) {
  simt::init_phases(barrier, arrivals, site);
}
FASTKD_DEVICE void phases_arrive(uint64_t* barrier, simt::Site site = {}) { simt::arrive_at(barrier, 0, site); }
FASTKD_DEVICE void phases_arrive_expecting(uint64_t* barrier, int bytes, simt::Site site = {}) {
  simt::arrive_at(barrier, bytes, site);
}
FASTKD_DEVICE void phases_wait(uint64_t* barrier, int parity, simt::Site site = {}) {
  simt::wait_for_phase(barrier, parity, site);
}
FASTKD_DEVICE void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, simt::Site site = {}) {
  simt::issue_bulk(shared, global, bytes, barrier, site);
}
FASTKD_DEVICE void fence_async(simt::Site site = {}) { simt::fence_async(site); }
FASTKD_DEVICE void named_sync(int id, int threads, simt::Site site = {}) {
  simt::named_barrier(id, threads, true, site);
}
FASTKD_DEVICE void named_arrive(int id, int threads, simt::Site site = {}) {
  simt::named_barrier(id, threads, false, site);
}

FASTKD_DEVICE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
FASTKD_DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
FASTKD_DEVICE float from_fp16(uint16_t bits) { return as_float(simt::float_of_fp16(bits)); }
FASTKD_DEVICE float from_bf16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
FASTKD_DEVICE uint16_t to_fp16(float x) { return simt::fp16_of_float(as_bits(x)); }
FASTKD_DEVICE uint16_t to_bf16(float x) { return simt::bf16_of_float(as_bits(x)); }
FASTKD_DEVICE uint32_t to_fp16_pair(float low, float high) {
  return static_cast<uint32_t>(to_fp16(high)) << 16 | to_fp16(low);
}
FASTKD_DEVICE uint32_t to_bf16_pair(float low, float high) {
  return static_cast<uint32_t>(to_bf16(high)) << 16 | to_bf16(low);
}

}  // namespace gpu
}  // namespace fastkd
