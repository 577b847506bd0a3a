// The teacher's rows in the form that the sweeps need: distinct columns by ascending id with the student's logits,
// log-probabilities at the row's temperature, and the mass of the rest. One warp a row; K numbers each of ids and
// log-probabilities are all that is read, and K logits.
#pragma once

#include "merge.cuh"

namespace fastkd {
namespace gpu {

constexpr int64_t kNoEntry = INT64_MAX;

FASTKD_DEVICE double sum_lanes(double x) {
#pragma unroll 1
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(kAllLanes, x, lanes);
  return x;
}
FASTKD_DEVICE float sum_lanes(float x) {
#pragma unroll 1
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(kAllLanes, x, lanes);
  return x;
}
FASTKD_DEVICE float max_lanes(float x) {
#pragma unroll 1
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = max(shuffle_xor(kAllLanes, x, lanes), x);
  return x;
}
FASTKD_DEVICE bool any_lane(bool vote) { return ballot(kAllLanes, vote) != 0; }

// Ascending, by all lanes; n is a power of two.
FASTKD_DEVICE void sort_keys(int64_t* keys, int64_t n, int lane) {
#pragma unroll 1
  for (int64_t size = 2; size <= n; size *= 2) {
#pragma unroll 1
    for (int64_t gap = size / 2; gap > 0; gap /= 2) {
      for (int64_t pair = lane; pair < n / 2; pair += kWarp) {
        const int64_t low = pair / gap * 2 * gap + pair % gap, high = low + gap;
        const int64_t a = load(keys + low), b = load(keys + high);
        if (((low & size) == 0) != (a > b)) continue;
        store(keys + low, b);
        store(keys + high, a);
      }
      warp_sync(kAllLanes);
    }
  }
}

// A row of the teacher as it was given, and by ascending id.
struct TeacherRow {
  const SparseTeacher& teacher;
  const int64_t* ids;
  const float *logprobs, *weights;
  int64_t* keys;  // id * 2^32 + index, ascending; kNoEntry where there is none
  int lane;
  int64_t entries = 0;

  FASTKD_DEVICE_METHOD TeacherRow(const CudaSparse& call, int64_t n, int lane_index)
      : teacher(call.teacher),
        ids(teacher.ids + n * teacher.k),
        logprobs(teacher.logprobs + n * teacher.k),
        weights(teacher.weights ? teacher.weights + n * teacher.k : nullptr),
        keys(call.keys + n * call.padded_k),
        lane(lane_index) {}

  FASTKD_DEVICE_METHOD int column(int64_t i) const { return static_cast<int>(load(keys + i) >> 32); }
  FASTKD_DEVICE_METHOD int64_t index(int64_t i) const { return load(keys + i) & 0xffffffff; }
  FASTKD_DEVICE_METHOD float logprob(int64_t i) const { return load(logprobs + index(i)); }
  FASTKD_DEVICE_METHOD float weight(int64_t i) const { return weights ? load(weights + index(i)) : 1.0f; }
  FASTKD_DEVICE_METHOD bool repeats(int64_t i) const { return i > 0 && column(i) == column(i - 1); }

  // Entry k as a key. wrong: its values are none that an entry may have.
  FASTKD_DEVICE_METHOD int64_t key_of(int64_t k, int64_t columns, bool& wrong) const {
    const int64_t id = load(ids + k);
    const float lp = load(logprobs + k), w = weights ? load(weights + k) : 1.0f;
    const bool impossible = lp == minus_infinity();
    if (id < 0 && impossible) return kNoEntry;
    const bool in_range = id >= 0 && id < columns;
    wrong = wrong || !in_range || !(::exp(static_cast<double>(lp)) <= teacher.mass_limit) ||
            !(w >= 0 && w < -minus_infinity());
    // a draw of probability 0 was never drawn
    return in_range && !(teacher.tail == Tail::sampled && impossible) ? id << 32 | k : kNoEntry;
  }

  // Fills and sorts the keys; returns whether some entry is wrong.
  FASTKD_DEVICE_METHOD bool collect(int64_t padded_k, int64_t columns) {
    bool wrong = false, ascending = true;
    int64_t before = -1;  // of this lane, 32 entries before
    double count = 0;
    for (int64_t k = lane; k < padded_k; k += kWarp) {
      const int64_t key = k < teacher.k ? key_of(k, columns, wrong) : kNoEntry;
      store(keys + k, key);
      count += key != kNoEntry;
      ascending = ascending && before <= key;
      before = key;
    }
    entries = static_cast<int64_t>(sum_lanes(count));
    warp_sync(kAllLanes);
    for (int64_t k = lane + 1; k < padded_k; k += kWarp) ascending = ascending && load(keys + k - 1) <= load(keys + k);
    if (any_lane(!ascending)) {
      warp_sync(kAllLanes);  // all have read
      sort_keys(keys, padded_k, lane);
    }
    return any_lane(wrong);
  }

  // 1 - sum p. The largest probability is near 1 where the difference cancels: its part of it is exact.
  FASTKD_DEVICE_METHOD double mass_left() const {
    Top top{minus_infinity(), INT64_MAX};
    for (int64_t i = lane; i < entries; i += kWarp) take_top(top, Top{logprob(i), i});
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) take_top(top, lanes);
    double others = 0;
    for (int64_t i = lane; i < entries; i += kWarp)
      if (i != top.column) others += ::exp(static_cast<double>(logprob(i)));
    return (entries > 0 ? -::expm1(static_cast<double>(top.logit)) : 1.0) - sum_lanes(others);
  }

  // log2 of the sum of the probabilities at the temperature that `slope` is of, taken relative to the largest.
  FASTKD_DEVICE_METHOD float log2_mass(float slope) const {
    float largest = minus_infinity();
    for (int64_t i = lane; i < entries; i += kWarp) largest = max(logprob(i) * slope, largest);
    largest = max_lanes(largest);
    double sum = 0;
    for (int64_t i = lane; i < entries; i += kWarp) sum += ::exp2(static_cast<double>(logprob(i) * slope - largest));
    return largest + static_cast<float>(::log2(sum_lanes(sum)));
  }

  FASTKD_DEVICE_METHOD bool any_repeats() const {
    bool found = false;
    for (int64_t i = lane; i < entries; i += kWarp) found = found || repeats(i);
    return any_lane(found);
  }
  FASTKD_DEVICE_METHOD bool any_possible() const {
    bool found = false;
    for (int64_t i = lane; i < entries; i += kWarp) found = found || logprob(i) > minus_infinity();
    return any_lane(found);
  }

  // The named column that begins at entry i, with all draws of it.
  FASTKD_DEVICE_METHOD NamedColumn named(int64_t i, float slope, float log2_total) const {
    NamedColumn c;
    c.column = column(i);
    c.log2_p = logprob(i) * slope - log2_total;
    if (teacher.tail != Tail::sampled) return c;
    const float each = teacher.weights ? 1.0f : 1.0f / static_cast<float>(entries);
    c.weight = each * weight(i);
    for (int64_t j = i + 1; j < entries && repeats(j); ++j) add_draw(c, each * weight(j), logprob(j) * slope);
    return c;
  }
};

FASTKD_DEVICE float student_logit(const LossParams& p, int64_t n, int64_t column) {
  const float x = load_column(p.student.row(n), p.student.dtype, column);
  return p.student_softcap == 0 ? x : softcapped(x, p.student_softcap, 1 / p.student_softcap);
}

// In every lane: how many of the lanes up to this one vote.
FASTKD_DEVICE int count_up_to(bool vote, int lane) {
  int count = vote ? 1 : 0;
#pragma unroll 1
  for (int gap = 1; gap < kWarp; gap *= 2) {
    const int other = shuffle(kAllLanes, count, lane >= gap ? lane - gap : lane);
    count += lane >= gap ? other : 0;
  }
  return count;
}

// Writes the distinct columns; returns their number.
FASTKD_DEVICE int write_entries(const CudaSparse& call, const TeacherRow& row, int64_t n, float slope,
                                float log2_total) {
  int written = 0;
#pragma unroll 1
  for (int64_t first = 0; first < row.entries; first += kWarp) {
    const int64_t i = first + row.lane;
    const bool begins = i < row.entries && !row.repeats(i);
    const int upto = count_up_to(begins, row.lane);
    if (begins) {
      const NamedColumn c = row.named(i, slope, log2_total);
      const SparseEntry entry{static_cast<int>(c.column), c.log2_p, c.weight,
                              student_logit(call.call.loss, n, c.column)};
      store(call.entries + n * call.teacher.k + written + upto - 1, entry);
    }
    written += shuffle(kAllLanes, upto, kWarp - 1);
  }
  return written;
}

FASTKD_KERNEL(kWarp, 16) sparse_prepare(FASTKD_CONSTANT CudaSparse call) {
  const LossParams& p = call.call.loss;
  const SparseTeacher& teacher = call.teacher;
  const int64_t n = block_index();
  if (p.labels && load(p.labels + n) == p.ignore_index) return;
  const RowConstants r(p, n);
  TeacherRow row(call, n, thread_index());
  bool wrong = row.collect(call.padded_k, p.columns);
  const bool sampled = teacher.tail == Tail::sampled, bucket = teacher.tail == Tail::bucket;
  double left = 0;
  float slope = kLog2e, log2_total = 0;
  if (!sampled) {
    left = row.mass_left();
    if (teacher.temperature != 0) slope *= teacher.temperature / r.options.temperature;
    wrong = wrong || row.any_repeats() || !(1 - left <= teacher.mass_limit);
  }
  if (!bucket) wrong = wrong || !row.any_possible();
  if (teacher.tail == Tail::renormalize || left < 0) log2_total = row.log2_mass(slope);
  SparseHead head;
  head.count = write_entries(call, row, n, slope, log2_total);
  head.rest = bucket && left > 0 ? static_cast<float>(left) : 0.0f;
  head.wrong = wrong ? 1 : 0;
  if (row.lane != 0) return;
  head.label_logit = r.label < 0 ? 0.0f : student_logit(p, n, r.label);
  store(call.heads + n, head);
}

}  // namespace gpu
}  // namespace fastkd
