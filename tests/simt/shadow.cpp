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

// The same as halves of the word.
uint16_t halves(uint8_t bytes) { return static_cast<uint16_t>((bytes & 3 ? 1 : 0) | (bytes & 12 ? 2 : 0)); }

}  // namespace

Shadow::Shadow(size_t bytes, Scope scope) : scope_(scope), words_((bytes + 3) / 4), marks_(words_) {
  void* memory = mmap(nullptr, std::max<size_t>(words_, 1) * sizeof(Word), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  word_ = static_cast<Word*>(memory);
}

Shadow::~Shadow() { munmap(word_, std::max<size_t>(words_, 1) * sizeof(Word)); }

// Whether the access belongs to what the actor may conflict with: its launch, and for shared memory its cluster.
bool Shadow::present(const Access& access, const Actor& actor) const {
  return access.epoch >= (scope_ == kShared ? actor.first_epoch : actor.launch_epoch);
}

bool Shadow::ordered(const Access& earlier, const Actor& actor) const {
  if (earlier.epoch < actor.first_epoch) return false;  // another cluster: no barrier joins clusters
  const int before = earlier.who(), now = actor.thread;
  if (before == now) return true;
  if (before / kMaxThreads != now / kMaxThreads) return earlier.epoch < actor.cluster_epoch;
  if (earlier.epoch < actor.epoch) return true;
  if (before / kWarpLanes != now / kWarpLanes) return false;
  return actor.seen[before % kWarpLanes] >= earlier.clock;
}

// Keeps the access in place of one that it makes superfluous; among as many unordered ones as there is room for, one
// gives way in turn.
void Shadow::remember(Access* slots, const Access& access, const Actor& actor) {
  for (int k = 0; k < kSlots; ++k) {
    if (!present(slots[k], actor) || (ordered(slots[k], actor) && access.covers(slots[k]))) {
      slots[k] = access;
      return;
    }
  }
  slots[turn_++ % kSlots] = access;
}

Conflict Shadow::record(size_t offset, size_t bytes, bool writes, const Actor& actor, Site site) {
  Conflict conflict;
  Access access;
  access.site = site.bits();
  access.epoch = actor.epoch;
  access.clock = actor.seen[actor.thread % kWarpLanes];
  for (size_t w = offset / 4; w * 4 < offset + bytes; ++w) {
    access.thread = static_cast<uint16_t>(actor.thread << 2 | halves(bytes_of_word(w, offset, offset + bytes)));
    Word& word = word_[w];
    const auto check = [&](const Access& earlier, bool earlier_writes) {
      if (conflict.found || !present(earlier, actor) || !access.meets(earlier) || ordered(earlier, actor)) return;
      conflict = {earlier, earlier_writes, w, true, earlier.epoch < actor.first_epoch};
    };
    for (const Access& earlier : word.write) check(earlier, true);
    if (writes) {
      for (const Access& earlier : word.read) check(earlier, false);
    }
    remember(writes ? word.write : word.read, access, actor);
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
  for (uint8_t& mark : marks_) mark &= static_cast<uint8_t>(~(kWritten | kConstant));
}

void Shadow::forget_values() { std::fill(marks_.begin(), marks_.end(), 0); }

}  // namespace simt
