// Kernels in the words of the port, each right as it stands and each wrong in a way of its own where a bug is asked
// for.
#pragma once

#include "../../csrc/kernels/cuda/port.cuh"

namespace selftest {

using namespace fastkd::gpu;

enum class Bug {
  none,
  missing_barrier,
  missing_reuse_barrier,
  barrier_in_branch,
  barrier_at_two_places,
  divergent_exit,
  bad_mask,
  differing_masks,
  returned_lane,
  shuffle_from_outside,
  uninitialised_shared,
  misaligned_vector,
  read_beyond,
  write_beyond,
  missing_wait,
  uncommitted_copy,
  copy_at_exit,
  missing_copy_barrier,
  copy_over_readers,
  missing_cluster_barrier,
  peer_exit,
  peer_rank,
  peer_address,
  deadlock,
  benign_race,
  missing_warp_sync,
  race_between_blocks,
  constant_read_of_written,
  write_to_input,
  raw_overrun,
  stack_overflow,
  phase_unmade,
  phase_unfenced_init,
  phase_made_twice,
  phase_unordered_init,
  phase_missing_wait,
  phase_wrong_parity,
  phase_missing_expect,
  phase_expect_more,
  phase_expect_less,
  phase_expect_too_much,
  phase_unarmed,
  phase_reuse_early,
  phase_arrive_early,
  phase_arrive_twice,
  phase_overwritten,
  phase_runs_ahead,
  bulk_misaligned,
  bulk_odd_size,
  bulk_source_written,
  bulk_at_exit,
  bulk_unfenced_write,
  bulk_unseen_by_peers,
  named_missing,
  named_counts,
  named_absent,
  named_zero,
  unordered_reader,
};

struct Args {
  const float* in = nullptr;
  float* out = nullptr;
  int64_t rows = 0, columns = 0;
  Bug bug = Bug::none;
};

FASTKD_DEVICE int lane() { return thread_index() % kWarp; }
FASTKD_DEVICE int warp() { return thread_index() / kWarp; }

// out = in: 16 bytes at a time, then the rest one by one.
FASTKD_KERNEL(1024, 1) copy(FASTKD_CONSTANT Args a) {
  const int64_t total = a.rows * a.columns, step = grid_blocks() * block_threads();
  const int64_t first = block_index() * block_threads() + thread_index();
  const int64_t skew = a.bug == Bug::misaligned_vector ? 1 : 0;
  for (int64_t i = first; i < total / 4; i += step) store_vector(a.out + 4 * i, load_vector(a.in + 4 * i + skew));
  const int64_t end = total + (a.bug == Bug::read_beyond || a.bug == Bug::write_beyond ? 1 : 0);
  for (int64_t i = total / 4 * 4 + first; i < end; i += step) {
    const float value = a.bug == Bug::write_beyond && i == total ? 0 : load(a.in + i);
    store(a.out + i, value);
  }
  if (a.bug == Bug::write_to_input && first == 0) store(const_cast<float*>(a.in), 1.0f);
}

FASTKD_DEVICE float warp_sum(float value, Bug bug) {
  unsigned mask = kAllLanes;
  if (bug == Bug::bad_mask && lane() == 3) mask &= ~8u;
  if (bug == Bug::differing_masks && lane() >= 16) mask = 0xffff0001u;
  for (int lanes = kWarp / 2; lanes; lanes /= 2) value += shuffle_xor(mask, value, lanes);
  if (bug == Bug::shuffle_from_outside && lane() < 16) value = shuffle(0x0000ffffu, value, 20);
  return value;
}

// The sum over the block; `slots` may be used again as soon as it returns.
FASTKD_DEVICE float block_sum(float value, float* slots, Bug bug) {
  value = warp_sum(value, bug);
  const int warps = block_threads() / kWarp;
  if (lane() == 0 && !(bug == Bug::uninitialised_shared && warp() == warps - 1)) shared_store(slots + warp(), value);
  if (bug == Bug::barrier_in_branch) {
    if (warp() != 1) block_sync();
  } else if (bug == Bug::barrier_at_two_places && warp() == 1) {
    block_sync();
  } else if (bug != Bug::missing_barrier) {
    block_sync();
  }
  float total = 0;
  for (int w = 0; w < warps; ++w) total += shared_load(slots + w);
  if (bug != Bug::missing_reuse_barrier) block_sync();
  return total;
}

FASTKD_DEVICE int deep(int n) {
  volatile char frame[1024];
  frame[0] = static_cast<char>(n);
  return n ? deep(n - 1) + frame[0] : 0;
}

// out[row] = sum of the row; a block takes every grid_blocks()-th row.
FASTKD_KERNEL(1024, 1) row_sums(FASTKD_CONSTANT Args a) {
  float* const slots = reinterpret_cast<float*>(shared_memory());
  if (a.bug == Bug::divergent_exit && thread_index() == 5) return;
  if (a.bug == Bug::returned_lane && lane() == 31) return;
  if (a.bug == Bug::stack_overflow) deep(100);
  if (a.bug == Bug::deadlock) {
    if (warp() == 0) block_sync();
    if (warp() != 0) cluster_sync();
  }
  if (a.bug == Bug::benign_race) shared_store(slots, 1.0f);
  if (a.bug == Bug::benign_race) block_sync();
  for (int64_t row = block_index(); row < a.rows; row += grid_blocks()) {
    float sum = 0;
    for (int64_t c = thread_index(); c < a.columns; c += block_threads()) sum += load(a.in + row * a.columns + c);
    sum = block_sum(sum, slots, a.bug);
    const int64_t at = a.bug == Bug::race_between_blocks ? 0 : row;
    if (thread_index() == 0) store(a.out + at, sum);
    if (a.bug == Bug::raw_overrun) sum = const_cast<const volatile float*>(a.in)[a.rows * a.columns + 64];
  }
}

// out = in doubled, in place where they are the same memory.
FASTKD_KERNEL(1024, 1) twice(FASTKD_CONSTANT Args a) {
  const int64_t i = block_index() * block_threads() + thread_index();
  if (i >= a.rows * a.columns / 4) return;
  Vector v = a.bug == Bug::constant_read_of_written ? load_vector(a.in + 4 * i) : load_vector_coherent(a.in + 4 * i);
  for (uint32_t& word : v.word) word = as_bits(2 * as_float(word));
  store_vector(a.out + 4 * i, v);
}

// Each lane of a warp hands its number to the next by shared memory; odd warps by halves.
FASTKD_KERNEL(1024, 1) rotate(FASTKD_CONSTANT Args a) {
  float* const slots = reinterpret_cast<float*>(shared_memory()) + warp() * kWarp;
  const int64_t i = block_index() * block_threads() + thread_index();
  const int width = warp() % 2 ? kWarp / 2 : kWarp, base = lane() / width * width;
  const unsigned mask = width == kWarp ? kAllLanes : 0xffffu << base;
  float value = load(a.in + i);
  for (int round = 0; round < 3; ++round) {
    shared_store(slots + lane(), value);
    if (a.bug != Bug::missing_warp_sync) warp_sync(mask);
    value = shared_load(slots + base + (lane() + width - 1) % width);
    warp_sync(mask);
  }
  const unsigned positive = ballot(mask, value > 0);
  store(a.out + i, shuffle(mask, value, base) + static_cast<float>(positive >> lane() & 1));
}

FASTKD_DEVICE void bring(const float* in, float* slice, int64_t columns, Bug bug) {
  for (int64_t c = 4 * thread_index(); c < columns; c += 4 * block_threads()) copy_async(slice + c, in + c);
  if (bug != Bug::uncommitted_copy) copy_commit();
}

// out[row] = sum of the row by the cluster's blocks, a slice each, brought to shared memory in two halves. Thread t
// reads what thread t + 1 brought.
FASTKD_KERNEL(1024, 1) cluster_sums(FASTKD_CONSTANT Args a) {
  const int blocks = cluster_blocks(), rank = cluster_rank(), threads = block_threads();
  const int64_t row = block_index() / blocks, columns = a.columns / blocks, half = columns / 2;
  float* const slots = reinterpret_cast<float*>(shared_memory());
  float* const slice = slots + kWarp + 4;
  const float* const in = a.in + row * a.columns + rank * columns;
  float sum = 0;
  for (int part = 0; part < 2; ++part) {
    bring(in + part * half, slice, half, a.bug);
    if (a.bug != Bug::missing_wait) copy_wait<0>();
    if (a.bug != Bug::missing_copy_barrier) block_sync();
    for (int64_t c = (thread_index() + 1) % threads; c < half / 4; c += threads) {
      const Vector v = shared_load(reinterpret_cast<const Vector*>(slice) + c);
      for (const uint32_t word : v.word) sum += as_float(word);
    }
    if (a.bug != Bug::copy_over_readers) block_sync();
  }
  sum = block_sum(sum, slots, Bug::none);
  if (thread_index() == 0) shared_store(slots + kWarp, sum);
  if (a.bug != Bug::missing_cluster_barrier) cluster_sync();
  if (rank == 0 && thread_index() == 0) {
    float total = 0;
    for (int r = 0; r < blocks; ++r) {
      const int from = a.bug == Bug::peer_rank ? r + 1 : r;
      total += a.bug == Bug::peer_address ? shared_load(slots + (1 << 20)) : peer_load(slots + kWarp, from);
    }
    store(a.out + row, total);
  }
  if (a.bug == Bug::copy_at_exit) bring(in, slice, half, a.bug);
  if (a.bug != Bug::peer_exit) cluster_sync();
}

}  // namespace selftest
