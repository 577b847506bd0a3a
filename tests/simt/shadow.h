// What is known about each 4-byte word of a memory besides its value: who wrote it last and who has read it since,
// whether it holds anything, whether a copy into it is under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <unordered_map>
#include <vector>

#include "site.h"

namespace simt {

constexpr int kMaxThreads = 1024;  // a block
constexpr int kMaxCluster = 16;    // blocks
constexpr int kWarpLanes = 32;

// The running thread as the race detector sees it. Epochs count barriers over a whole launch: each barrier gives the
// blocks that pass it a number higher than any before.
struct Actor {
  int thread = 0;                   // rank of the block in its cluster * kMaxThreads + thread of the block
  uint32_t epoch = 0;               // of the block's last barrier
  uint32_t cluster_epoch = 0;       // of the cluster's last barrier
  uint32_t first_epoch = 0;         // of the cluster's start
  uint32_t launch_epoch = 0;        // of the launch's start
  const uint16_t* seen = nullptr;   // lane of the own warp -> that lane's clock when last heard of
  const uint16_t* heard = nullptr;  // the same of all threads of the block, by mbarriers; null: nothing heard
};

// One access to half a word.
struct Access {
  uint64_t site = 0;
  uint32_t epoch = 0;   // 0: none
  uint16_t thread = 0;  // Actor::thread
  uint16_t clock = 0;   // of the thread
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

  // As a write by the actor, whose trace is not kept: what a bulk copy will write, from where it is issued on.
  // `visible` says of an earlier write whether it is ordered before copies; the first that is not goes to `hidden`.
  Conflict claim(size_t offset, size_t bytes, const Actor& actor, const std::function<bool(const Access&)>& visible,
                 Access* hidden);

  // Marks of bytes. Initialised: holds a value. Under way: a copy may land at any time.
  void set_initialised(size_t offset, size_t bytes);
  bool initialised(size_t offset, size_t bytes) const;
  size_t count_initialised() const;  // bytes
  void set_under_way(size_t offset, size_t bytes, bool under_way);
  bool under_way(size_t offset, size_t bytes) const;
  // Words that a bulk copy writes (shared) or reads (global), by whatever the block or launch has issued.
  void set_by_bulk(size_t offset, size_t bytes) { mark(offset, bytes, kByBulk); }
  bool by_bulk(size_t offset, size_t bytes) const { return any(offset, bytes, kByBulk); }
  // Words that the launch wrote, or read by a load that supposes that nobody writes them.
  bool written(size_t offset, size_t bytes) const { return any(offset, bytes, kWritten); }
  bool read_as_constant(size_t offset, size_t bytes) const { return any(offset, bytes, kConstant); }
  void note_written(size_t offset, size_t bytes) { mark(offset, bytes, kWritten); }
  void note_read_as_constant(size_t offset, size_t bytes) { mark(offset, bytes, kConstant); }

  void forget_launch();  // marks of one launch
  void forget_values();  // shared memory of a new block

 private:
  static constexpr uint8_t kBytes = 0x0f, kUnderWay = 0x10, kWritten = 0x20, kConstant = 0x40, kByBulk = 0x80;
  static constexpr uint32_t kMany = UINT32_MAX;  // in place of a read's epoch: its readers are in many_

  // Two bytes. Writes of a half are one after the other, else the later one is a race: the latest stands for all.
  struct Half {
    Access write, read;
  };
  // Reads that no order lets stand for each other, since the latest write.
  struct Readers {
    Access of_other_cluster;    // one suffices: nothing joins clusters
    std::vector<Access> reads;  // of the cluster that began at first_epoch
    uint32_t first_epoch = 0;
    size_t compact_at = 64;
    void add(const Access& read, const Actor& actor);
    void compact();
  };

  bool ordered(const Access& earlier, const Actor& actor) const;
  bool present(const Access& access, const Actor& actor) const;
  void check(const Access& earlier, bool earlier_writes, size_t half, const Actor& actor, Conflict& conflict) const;
  void check_reads(size_t half, const Actor& actor, Conflict& conflict) const;
  void remember_read(size_t half, const Access& read, const Actor& actor);
  void forget_reads(size_t half);
  bool any(size_t offset, size_t bytes, uint8_t mark) const;
  void mark(size_t offset, size_t bytes, uint8_t mark);

  Scope scope_;
  size_t words_;
  Half* half_;  // two a word; fresh pages are zero: no access
  std::unordered_map<size_t, Readers> many_;
  std::vector<uint8_t> marks_;
};

}  // namespace simt
