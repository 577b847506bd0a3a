// The tensors of one call in guarded memory of the machine, and back.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../../csrc/kernels/params.h"
#include "../fiber.h"
#include "../memory.h"

namespace simt {

class Staging {
 private:
  std::vector<std::unique_ptr<Arena>> arenas_;  // outlive the buffers in them

 public:
  Memory memory;

  // `count` numbers that every kernel may read; null stays null.
  template <class T>
  T* input(const std::string& name, T* host, int64_t count) {
    if (!host) return nullptr;
    Buffer& buffer = add(name, host, count * static_cast<int64_t>(sizeof(T)), false);
    buffer.fill(host);
    return reinterpret_cast<T*>(buffer.data());
  }
  // `count` numbers that the kernels must write.
  template <class T>
  T* output(const std::string& name, T* host, int64_t count) {
    if (!host) return nullptr;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    Buffer& buffer = add(name, host, bytes, true);
    pieces_.push_back({&buffer, 0, reinterpret_cast<char*>(host), static_cast<size_t>(bytes)});
    return reinterpret_cast<T*>(buffer.data());
  }
  // Memory that is not handed over at the end.
  char* workspace(const std::string& name, int64_t bytes) {
    return memory.add(name, static_cast<size_t>(bytes)).data();
  }

  // `count` rows of `columns`, at the same address modulo 16; what lies between rows is no value and no one's to write.
  // `filled`: they hold numbers; `written`: the kernels must write all of them.
  fastkd::Rows rows(const std::string& name, const fastkd::Rows& rows, int64_t count, int64_t columns, bool filled,
                    bool written) {
    if (!rows.data) return rows;
    const auto width = static_cast<size_t>(columns * fastkd::size_of(rows.dtype));
    char* end = static_cast<char*>(rows.data);
    for (int64_t n = 0; n < count; ++n) end = std::max(end, rows.row(n) + width);
    char* const base = static_cast<char*>(rows.data);
    if (end - base > kFar) return far_rows(name, rows, count, width, filled, written);
    Buffer& buffer = add(name, base, end - base, written);
    for (int64_t n = 0; n < count; ++n) {
      const auto offset = static_cast<size_t>(rows.row(n) - base);
      if (filled) buffer.fill(rows.row(n), offset, width);
      if (written) pieces_.push_back({&buffer, offset, rows.row(n), width});
    }
    fastkd::Rows staged = rows;
    staged.data = buffer.data();
    return staged;
  }

  // What the kernels left: numbers to the host; the returned text names what they did not write, or wrote between rows.
  std::string take_back() {
    std::string wrong;
    std::map<Buffer*, size_t> owned;
    for (const Piece& piece : pieces_) {
      owned[piece.buffer] += piece.bytes;
      if (!piece.buffer->shadow.initialised(piece.offset, piece.bytes)) {
        wrong += "unwritten: '" + piece.buffer->name + "', some of the bytes from " + std::to_string(piece.offset) +
                 " to " + std::to_string(piece.offset + piece.bytes) + "\n";
      }
      if (piece.bytes) std::memcpy(piece.host, piece.buffer->data() + piece.offset, piece.bytes);
    }
    for (const auto& [buffer, bytes] : owned) {
      if (buffer->shadow.count_initialised() > bytes) wrong += "between-rows: '" + buffer->name + "' was written\n";
    }
    return wrong;
  }

 private:
  static constexpr ptrdiff_t kFar = 1 << 30;

  // Rows that span more than memory holds: a buffer each, as far from each other as they are.
  fastkd::Rows far_rows(const std::string& name, const fastkd::Rows& rows, int64_t count, size_t width, bool filled,
                        bool written) {
    char* const base = static_cast<char*>(rows.data);
    ptrdiff_t furthest = 0;
    for (int64_t n = 0; n < count; ++n) furthest = std::max(furthest, rows.row(n) - base);
    arenas_.push_back(std::make_unique<Arena>(static_cast<size_t>(furthest) + width + 4 * kPage));
    fastkd::Rows staged = rows;
    staged.data = arenas_.back()->base() + kPage + reinterpret_cast<uintptr_t>(base) % 16;
    for (int64_t n = 0; n < count; ++n) {
      Buffer& buffer = memory.add(name + "[" + std::to_string(n) + "]", width, written, staged.row(n));
      if (filled) buffer.fill(rows.row(n));
      if (written) pieces_.push_back({&buffer, 0, rows.row(n), width});
    }
    return staged;
  }

  struct Piece {
    Buffer* buffer;
    size_t offset;
    char* host;
    size_t bytes;
  };

  Buffer& add(const std::string& name, const void* host, int64_t bytes, bool writable) {
    return memory.add(name, static_cast<size_t>(bytes), writable, GuardedPages::Flush::back,
                      reinterpret_cast<uintptr_t>(host) % 16);
  }

  std::vector<Piece> pieces_;
};

}  // namespace simt
