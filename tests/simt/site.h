// Where in the source a word of the port was spoken: file and line of the call, in eight bytes.
#pragma once

#include <cstdint>
#include <string>

namespace simt {

class Site {
 public:
  // As a default argument it stands for the place of the call that leaves it out.
  Site(const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : bits_(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(file)) << 16 | static_cast<uint16_t>(line)) {}

  // file:line, the folders of the file left out.
  std::string text() const {
    std::string name = reinterpret_cast<const char*>(static_cast<uintptr_t>(bits_ >> 16));
    return name.substr(name.rfind('/') + 1) + ":" + std::to_string(bits_ & 0xffff);
  }
  uint64_t bits() const { return bits_; }
  void set_bits(uint64_t bits) { bits_ = bits; }
  // By place: the same header may be known by several copies of its name.
  bool operator==(const Site& other) const { return bits_ == other.bits_ || text() == other.text(); }
  bool operator!=(const Site& other) const { return !(*this == other); }

 private:
  uint64_t bits_;  // user-space addresses have 47 bits
};

}  // namespace simt
