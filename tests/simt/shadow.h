// What is known about each 4-byte word of a memory besides its value: who read and wrote it last, whether it holds
// anything, whether a copy into it is under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.h"

namespace simt {

constexpr int kMaxThreads = 1024;  // a block
constexpr int kMaxCluster = 16;    // blocks
constexpr int kWarpLanes = 32;

// The running thread as the race detector sees it. Epochs count barriers over a whole launch: each barrier gives the
// blocks that pass it a number higher than any before.
struct Actor {
  int thread = 0;                  // rank of the block in its cluster * kMaxThreads + thread of the block
  uint32_t epoch = 0;              // of the block's last barrier
  uint32_t cluster_epoch = 0;      // of the cluster's last barrier
  uint32_t first_epoch = 0;        // of the cluster's start
  uint32_t launch_epoch = 0;       // of the launch's start
  const uint16_t* seen = nullptr;  // lane of the own warp -> that lane's clock when last heard of by warp_sync
};

// One access to one word.
struct Access {
  uint64_t site = 0;
  uint32_t epoch = 0;   // 0: none
  uint16_t thread = 0;  // Actor::thread in the upper 14 bits; in the lower two, which halves of the word
  uint16_t clock = 0;   // of the lane

  int who() const { return thread >> 2; }
  bool meets(const Access& other) const { return (thread & other.thread & 3) != 0; }
  bool covers(const Access& other) const { return (other.thread & ~thread & 3) == 0; }
};

// An earlier access that no barrier separates from the present one.
struct Conflict {
  Access earlier;
  bool earlier_writes = false;
  size_t word = 0;
  bool found = false;
  bool other_cluster = false;
};

class Shadow {
 public:
  enum Scope { kShared, kGlobal };
  Shadow(size_t bytes, Scope scope);
  ~Shadow();
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;

  // Records an access to [offset, offset + bytes); returns the first conflict with an earlier one.
  Conflict record(size_t offset, size_t bytes, bool writes, const Actor& actor, Site site);

  // Marks of bytes. Initialised: holds a value. Under way: a copy may land at any time.
  void set_initialised(size_t offset, size_t bytes);
  bool initialised(size_t offset, size_t bytes) const;
  size_t count_initialised() const;  // bytes
  void set_under_way(size_t offset, size_t bytes, bool under_way);
  bool under_way(size_t offset, size_t bytes) const;
  // Words that the launch wrote, or read by a load that supposes that nobody writes them.
  bool written(size_t offset, size_t bytes) const { return any(offset, bytes, kWritten); }
  bool read_as_constant(size_t offset, size_t bytes) const { return any(offset, bytes, kConstant); }
  void note_written(size_t offset, size_t bytes) { mark(offset, bytes, kWritten); }
  void note_read_as_constant(size_t offset, size_t bytes) { mark(offset, bytes, kConstant); }

  void forget_launch();  // marks of one launch
  void forget_values();  // shared memory of a new block

 private:
  static constexpr uint8_t kBytes = 0x0f, kUnderWay = 0x10, kWritten = 0x20, kConstant = 0x40;
  static constexpr int kSlots = 2;
  struct Word {
    Access write[kSlots], read[kSlots];
  };

  bool ordered(const Access& earlier, const Actor& actor) const;
  bool present(const Access& access, const Actor& actor) const;
  void remember(Access* slots, const Access& access, const Actor& actor);
  bool any(size_t offset, size_t bytes, uint8_t mark) const;
  void mark(size_t offset, size_t bytes, uint8_t mark);

  Scope scope_;
  size_t words_;
  Word* word_;  // fresh pages are zero: no access
  std::vector<uint8_t> marks_;
  uint32_t turn_ = 0;
};

}  // namespace simt
