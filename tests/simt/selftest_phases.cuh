// Kernels of phase barriers, bulk copies and named barriers: right as they stand, wrong where a bug is asked for.
#pragma once

#include "selftest_kernels.cuh"

namespace selftest {

constexpr int kPieces = 8, kRing = 2;

struct Ring {
  uint64_t *full, *empty;  // kRing each
  float *sums, *slots;     // of warps; kRing pieces
  int piece;               // columns

  FASTKD_DEVICE_METHOD explicit Ring(const Args& a) : piece(static_cast<int>(a.columns) / kPieces) {
    full = reinterpret_cast<uint64_t*>(shared_memory());
    empty = full + kRing;
    sums = reinterpret_cast<float*>(empty + kRing);
    slots = sums + kWarp;
  }
  FASTKD_DEVICE_METHOD void make(int consumers, Bug bug) const {
    if (thread_index() == 0) {
      for (int k = 0; k < kRing; ++k) phases_init(full + k, 1);
      for (int k = 0; k < kRing - (bug == Bug::phase_unmade ? 1 : 0); ++k) phases_init(empty + k, consumers);
      if (bug != Bug::phase_unfenced_init) fence_async();
      if (bug == Bug::phase_made_twice) phases_init(full, 1);
    }
    if (bug != Bug::phase_unordered_init) block_sync();
  }
};

FASTKD_DEVICE void produce(const Ring& ring, const float* in, const Args& a) {
  const int bytes = ring.piece * static_cast<int>(sizeof(float)), skew = a.bug == Bug::bulk_misaligned ? 1 : 0;
  const int expected = bytes + (a.bug == Bug::phase_expect_more ? 16 : a.bug == Bug::phase_expect_less ? -16 : 0);
  for (int k = 0; k < kPieces; ++k) {
    const int slot = k % kRing, round = k / kRing;
    if (round > 0 && a.bug != Bug::phase_reuse_early) phases_wait(ring.empty + slot, (round - 1) & 1);
    if (a.bug == Bug::phase_missing_expect) {
      phases_arrive(ring.full + slot);
    } else if (!(a.bug == Bug::phase_unarmed && round > 0)) {
      phases_arrive_expecting(ring.full + slot, a.bug == Bug::phase_expect_too_much ? 1 << 20 : expected);
    }
    const float* const from = in + k * ring.piece + skew;
    copy_bulk(ring.slots + slot * ring.piece, from, a.bug == Bug::bulk_odd_size ? bytes - 8 : bytes, ring.full + slot);
    if (a.bug == Bug::bulk_source_written && k == 0) store(a.out, 0.0f);
  }
}

FASTKD_DEVICE float consume(const Ring& ring, int first, int step, Bug bug) {
  float sum = 0;
  for (int k = 0; k < kPieces; ++k) {
    const int slot = k % kRing, round = k / kRing;
    if (bug != Bug::phase_missing_wait) phases_wait(ring.full + slot, (round & 1) ^ (bug == Bug::phase_wrong_parity));
    const bool early = bug == Bug::phase_arrive_early && warp() == 1;
    if (early) phases_arrive(ring.empty + slot);
    for (int c = first; c < ring.piece; c += step) {
      sum += shared_load(ring.slots + slot * ring.piece + c);
      shared_store(ring.slots + slot * ring.piece + c, 0.0f);
    }
    if (bug != Bug::bulk_unfenced_write) fence_async();
    if (!early) phases_arrive(ring.empty + slot);
    if (bug == Bug::phase_arrive_twice) phases_arrive(ring.empty + slot);
  }
  return sum;
}

// out[row] = sum of the row, a block a row: thread 0 brings pieces to a ring that the other warps empty.
FASTKD_KERNEL(1024, 1) pipeline(FASTKD_CONSTANT Args a) {
  const Ring ring(a);
  const int threads = block_threads(), consumers = threads - kWarp;
  ring.make(consumers, a.bug);
  if (warp() == 0) {
    if (lane() == 0) produce(ring, a.in + block_index() * a.columns, a);
    warp_sync(kAllLanes);
    if (a.bug != Bug::named_missing) named_sync(1, a.bug == Bug::named_counts ? threads - kWarp : threads);
    if (lane() != 0) return;
    float total = 0;
    for (int w = 1; w < threads / kWarp; ++w) total += shared_load(ring.sums + w);
    if (a.bug == Bug::phase_overwritten) shared_store(reinterpret_cast<float*>(ring.full), total);
    store(a.out + block_index(), total);
    if (a.bug == Bug::bulk_at_exit) {
      phases_arrive_expecting(ring.full, 16);
      copy_bulk(ring.slots, a.in, 16, ring.full);
    }
  } else {
    const float sum = warp_sum(consume(ring, thread_index() - kWarp, consumers, a.bug), Bug::none);
    if (lane() == 0) shared_store(ring.sums + warp(), sum);
    if (a.bug == Bug::named_absent && warp() == 1) return;
    if (a.bug != Bug::named_missing) named_arrive(a.bug == Bug::named_zero ? 0 : 1, threads);
  }
}

// out[row] = sum of the row: each block of a cluster brings a slice by one copy, and its neighbour sums it.
FASTKD_KERNEL(1024, 1) neighbours(FASTKD_CONSTANT Args a) {
  const int blocks = cluster_blocks(), rank = cluster_rank(), bytes = static_cast<int>(a.columns / blocks) * 4;
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory());
  float* const sums = reinterpret_cast<float*>(barrier + 2);
  const float* const slice = sums + 4;
  const float* const from = a.in + block_index() / blocks * a.columns + rank * (bytes / 4);
  if (thread_index() == 0) {
    phases_init(barrier, 1);
    fence_async();
    phases_arrive_expecting(barrier, bytes);
    copy_bulk(const_cast<float*>(slice), from, bytes, barrier);
    if (a.bug != Bug::bulk_unseen_by_peers) phases_wait(barrier, 0);
  }
  cluster_sync();
  float sum = 0;
  if (warp() == 0) {
    for (int c = lane(); c < bytes / 4; c += kWarp) sum += peer_load(slice + c, (rank + 1) % blocks);
    sum = warp_sum(sum, Bug::none);
  }
  if (thread_index() == 0) shared_store(sums, sum);
  cluster_sync();
  if (rank == 0 && thread_index() == 0) {
    float total = 0;
    for (int r = 0; r < blocks; ++r) total += peer_load(sums, r);
    store(a.out + block_index() / blocks, total);
  }
  cluster_sync();
}

// Thread 0 lets two phases pass of which the others want to see the first's end: some may miss it.
FASTKD_KERNEL(1024, 1) two_phases(FASTKD_CONSTANT Args a) {
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared_memory());
  if (thread_index() == 0) phases_init(barrier, a.bug == Bug::phase_runs_ahead ? 1 : block_threads());
  block_sync();
  for (int phase = 0; phase < 2; ++phase) {
    if (thread_index() == 0 || a.bug != Bug::phase_runs_ahead) phases_arrive(barrier);
    if (thread_index() != 0 || a.bug != Bug::phase_runs_ahead) phases_wait(barrier, phase);
  }
  if (thread_index() == 0) store(a.out + block_index(), load(a.in + block_index()));
}

// out[row] = the row's first number, which a warp reads from shared memory before one lane overwrites it. The lane
// waits for all the others, or for all but one.
FASTKD_KERNEL(1024, 1) many_readers(FASTKD_CONSTANT Args a) {
  float* const word = reinterpret_cast<float*>(shared_memory());
  if (lane() == 0) shared_store(word, load(a.in + block_index() * a.columns));
  warp_sync(kAllLanes);
  const float value = shared_load(word);
  const unsigned mask = a.bug == Bug::unordered_reader ? kAllLanes - 1 : kAllLanes;
  if (mask >> lane() & 1) warp_sync(mask);
  if (lane() == 5) shared_store(word, value + 1);
  if (lane() == 7) store(a.out + block_index(), value);
}

}  // namespace selftest
