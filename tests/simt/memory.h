// Memory that kernels see: pages between guard pages, and the registered buffers of global memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "shadow.h"

namespace simt {

// What went through the port to and from global memory.
struct Counters {
  int64_t bytes_read = 0, bytes_written = 0;
  int64_t wide_reads = 0, wide_writes = 0;      // of 16 bytes
  int64_t narrow_reads = 0, narrow_writes = 0;  // of fewer

  void count(size_t bytes, bool writes);
  void count_bulk(size_t bytes);  // as so many reads of 16
  void add(const Counters& other);
};

// Address space without memory, in which buffers lie as far from each other as the rows of a large tensor.
class Arena {
 public:
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  char* base() const { return base_; }

 private:
  char* base_;
  size_t bytes_;
};

// `bytes` at data(), flush with the guard page behind (Flush::back) or before them, as far as the wished remainder of
// the address by 16 allows. What is left beside them is filled with a pattern.
class GuardedPages {
 public:
  enum class Flush { front, back };
  GuardedPages(size_t bytes, Flush flush, size_t remainder);
  // At a place of an arena, alone on its pages and at least a page from both ends.
  GuardedPages(size_t bytes, char* place);
  ~GuardedPages();
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  char* data() const { return data_; }
  bool holds(const void* address) const;  // also in the guard pages
  bool margins_intact() const;

 private:
  void poison();

  char* pages_;
  size_t length_, bytes_;
  char* data_;
  bool owned_ = true;
};

// One registered buffer of global memory.
struct Buffer {
  Buffer(std::string name, size_t bytes, bool writable, GuardedPages::Flush flush, size_t remainder);
  Buffer(std::string name, size_t bytes, bool writable, char* place);

  std::string name;
  size_t bytes;
  bool writable;
  GuardedPages pages;
  Shadow shadow;
  Counters counters;

  char* data() const { return pages.data(); }
  // Fills it, or a part of it, with `source`; what is not filled holds nothing yet, and reading it is an error.
  void fill(const void* source) { fill(source, 0, bytes); }
  void fill(const void* source, size_t offset, size_t count);
};

// Global memory: nothing else may be read or written by a kernel.
class Memory {
 public:
  Buffer& add(std::string name, size_t bytes, bool writable = true,
              GuardedPages::Flush flush = GuardedPages::Flush::back, size_t remainder = 0);
  Buffer& add(std::string name, size_t bytes, bool writable, char* place);  // of an arena
  // The buffer that holds all of [address, address + bytes), or null.
  Buffer* find(const void* address, size_t bytes);
  // "4 bytes behind the end of 'student' (1000 bytes)"; the nearest buffer, for messages.
  std::string describe(const void* address) const;
  // Whether the address lies in a guard page or a margin of some buffer.
  bool near(const void* address) const;
  const std::vector<std::unique_ptr<Buffer>>& buffers() const { return buffers_; }

 private:
  std::vector<std::unique_ptr<Buffer>> buffers_;
  size_t last_ = 0;  // where find() found the latest
};

// "byte 20 of" / "4 bytes behind" / "4 bytes before", of an object of `bytes` at `base`.
std::string place_of(const void* address, const void* base, size_t bytes);

}  // namespace simt
