#include "shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace simt {

namespace {

// Which bytes of word `w` lie in [begin, end), as four bits.
uint8_t bytes_of_word(size_t w, size_t begin, size_t end) {
  const size_t low = std::max(begin, w * 4) - w * 4, high = std::min(end, w * 4 + 4) - w * 4;
  return static_cast<uint8_t>((0xf << low) & (0xf >> (4 - high)));
}

}  // namespace

Shadow::Shadow(size_t bytes, Scope scope) : scope_(scope), words_((bytes + 3) / 4), marks_(words_) {
  void* memory = mmap(nullptr, std::max<size_t>(words_, 1) * 2 * sizeof(Half), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  half_ = static_cast<Half*>(memory);
}

Shadow::~Shadow() { munmap(half_, std::max<size_t>(words_, 1) * 2 * sizeof(Half)); }

// Whether the access belongs to what the actor may conflict with: its launch, and for shared memory its cluster.
bool Shadow::present(const Access& access, const Actor& actor) const {
  return access.epoch >= (scope_ == kShared ? actor.first_epoch : actor.launch_epoch);
}

bool Shadow::ordered(const Access& earlier, const Actor& actor) const {
  if (earlier.epoch < actor.first_epoch) return false;  // another cluster: no barrier joins clusters
  const int before = earlier.thread, now = actor.thread;
  if (before == now) return true;
  if (before / kMaxThreads != now / kMaxThreads) return earlier.epoch < actor.cluster_epoch;
  if (earlier.epoch < actor.epoch) return true;
  if (before / kWarpLanes == now / kWarpLanes) return actor.seen[before % kWarpLanes] >= earlier.clock;
  return actor.heard && actor.heard[before % kMaxThreads] >= earlier.clock;
}

void Shadow::Readers::compact() {
  std::stable_sort(reads.begin(), reads.end(), [](const Access& a, const Access& b) { return a.thread < b.thread; });
  std::reverse(reads.begin(), reads.end());  // the latest of each thread first
  const auto same = [](const Access& a, const Access& b) { return a.thread == b.thread; };
  reads.erase(std::unique(reads.begin(), reads.end(), same), reads.end());
  compact_at = 2 * reads.size() + 64;
}

void Shadow::Readers::add(const Access& read, const Actor& actor) {
  if (first_epoch != actor.first_epoch) {
    const bool same_launch = first_epoch >= actor.launch_epoch;
    if (!same_launch) {
      of_other_cluster = {};
    } else if (!reads.empty()) {
      of_other_cluster = reads.back();
    }
    reads.clear();
    first_epoch = actor.first_epoch;
  }
  reads.push_back(read);
  if (reads.size() >= compact_at) compact();
}

void Shadow::check(const Access& earlier, bool earlier_writes, size_t half, const Actor& actor,
                   Conflict& conflict) const {
  if (conflict.found || !present(earlier, actor) || ordered(earlier, actor)) return;
  conflict = {earlier, earlier_writes, half / 2, true, earlier.epoch < actor.first_epoch};
}

void Shadow::check_reads(size_t half, const Actor& actor, Conflict& conflict) const {
  if (half_[half].read.epoch != kMany) return check(half_[half].read, false, half, actor, conflict);
  const Readers& readers = many_.at(half);
  check(readers.of_other_cluster, false, half, actor, conflict);
  for (const Access& read : readers.reads) check(read, false, half, actor, conflict);
}

void Shadow::remember_read(size_t half, const Access& read, const Actor& actor) {
  Access& latest = half_[half].read;
  if (latest.epoch == kMany) return many_.at(half).add(read, actor);
  if (!present(latest, actor) || ordered(latest, actor)) {
    latest = read;
    return;
  }
  Readers& readers = many_[half];
  readers = {};
  readers.first_epoch = actor.first_epoch;
  (latest.epoch < actor.first_epoch ? readers.of_other_cluster : readers.reads.emplace_back()) = latest;
  readers.reads.push_back(read);
  latest.epoch = kMany;
}

void Shadow::forget_reads(size_t half) {
  if (half_[half].read.epoch == kMany) many_.erase(half);
  half_[half].read = {};
}

// A read that the next write is ordered behind needs no memory: what follows the write follows the read.
Conflict Shadow::record(size_t offset, size_t bytes, bool writes, const Actor& actor, Site site) {
  Conflict conflict;
  const Access access = {site.bits(), actor.epoch, static_cast<uint16_t>(actor.thread),
                         actor.seen[actor.thread % kWarpLanes]};
  for (size_t half = offset / 2; half * 2 < offset + bytes; ++half) {
    check(half_[half].write, true, half, actor, conflict);
    if (!writes) {
      remember_read(half, access, actor);
      continue;
    }
    check_reads(half, actor, conflict);
    forget_reads(half);
    half_[half].write = access;
  }
  return conflict;
}

Conflict Shadow::claim(size_t offset, size_t bytes, const Actor& actor,
                       const std::function<bool(const Access&)>& visible, Access* hidden) {
  Conflict conflict;
  for (size_t half = offset / 2; half * 2 < offset + bytes; ++half) {
    Access& write = half_[half].write;
    check(write, true, half, actor, conflict);
    check_reads(half, actor, conflict);
    if (hidden->epoch == 0 && present(write, actor) && !visible(write)) *hidden = write;
    forget_reads(half);
    write = {};
  }
  return conflict;
}

void Shadow::set_initialised(size_t offset, size_t bytes) {
  for (size_t w = offset / 4; w * 4 < offset + bytes; ++w) marks_[w] |= bytes_of_word(w, offset, offset + bytes);
}

bool Shadow::initialised(size_t offset, size_t bytes) const {
  for (size_t w = offset / 4; w * 4 < offset + bytes; ++w) {
    const uint8_t needed = bytes_of_word(w, offset, offset + bytes);
    if ((marks_[w] & needed) != needed) return false;
  }
  return true;
}

size_t Shadow::count_initialised() const {
  size_t count = 0;
  for (const uint8_t mark : marks_) count += static_cast<size_t>(__builtin_popcount(mark & kBytes));
  return count;
}

void Shadow::set_under_way(size_t offset, size_t bytes, bool under_way) {
  if (under_way) return mark(offset, bytes, kUnderWay);
  for (size_t w = offset / 4; w * 4 < offset + bytes; ++w) marks_[w] &= static_cast<uint8_t>(~kUnderWay);
}

bool Shadow::under_way(size_t offset, size_t bytes) const { return any(offset, bytes, kUnderWay); }

bool Shadow::any(size_t offset, size_t bytes, uint8_t mark) const {
  for (size_t w = offset / 4; w * 4 < offset + bytes; ++w) {
    if (marks_[w] & mark) return true;
  }
  return false;
}

void Shadow::mark(size_t offset, size_t bytes, uint8_t mark) {
  for (size_t w = offset / 4; w * 4 < offset + bytes; ++w) marks_[w] |= mark;
}

void Shadow::forget_launch() {
  for (uint8_t& mark : marks_) mark &= static_cast<uint8_t>(~(kWritten | kConstant | kByBulk));
}

void Shadow::forget_values() { std::fill(marks_.begin(), marks_.end(), 0); }

}  // namespace simt
