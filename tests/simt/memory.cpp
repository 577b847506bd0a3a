#include "memory.h"

#include <sys/mman.h>

#include <cstring>
#include <limits>
#include <new>

#include "fiber.h"

namespace simt {

namespace {

constexpr unsigned char kMargin = 0xa5;
constexpr uint32_t kPoison = 0x7fa1beef;  // NaN in fp32; the halves are NaN in bf16 (upper) and -0.0-like junk (lower)

}  // namespace

void Counters::count(size_t bytes, bool writes) {
  const bool wide = bytes == 16;
  (writes ? bytes_written : bytes_read) += static_cast<int64_t>(bytes);
  (writes ? (wide ? wide_writes : narrow_writes) : (wide ? wide_reads : narrow_reads)) += 1;
}

void Counters::count_bulk(size_t bytes) {
  bytes_read += static_cast<int64_t>(bytes);
  wide_reads += static_cast<int64_t>(bytes / 16);
}

void Counters::add(const Counters& other) {
  bytes_read += other.bytes_read;
  bytes_written += other.bytes_written;
  wide_reads += other.wide_reads;
  wide_writes += other.wide_writes;
  narrow_reads += other.narrow_reads;
  narrow_writes += other.narrow_writes;
}

Arena::Arena(size_t bytes) : bytes_(bytes) {
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);
}

Arena::~Arena() { munmap(base_, bytes_); }

GuardedPages::GuardedPages(size_t bytes, Flush flush, size_t remainder) : bytes_(bytes) {
  const size_t inner = (bytes + 32 + kPage - 1) / kPage * kPage;
  length_ = inner + 2 * kPage;
  void* memory = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  pages_ = static_cast<char*>(memory);
  char* const first = pages_ + kPage;
  if (flush == Flush::front) {
    data_ = first + remainder;
  } else {
    char* const highest = first + inner - bytes;
    data_ = highest - (reinterpret_cast<uintptr_t>(highest) - remainder) % 16;
  }
  poison();
}

GuardedPages::GuardedPages(size_t bytes, char* place) : bytes_(bytes), data_(place), owned_(false) {
  const size_t offset = reinterpret_cast<uintptr_t>(place) % kPage;
  pages_ = place - offset - kPage;
  length_ = (offset + bytes + kPage - 1) / kPage * kPage + 2 * kPage;
  poison();
}

void GuardedPages::poison() {
  const size_t inner = length_ - 2 * kPage;
  mprotect(pages_ + kPage, inner, PROT_READ | PROT_WRITE);
  std::memset(pages_ + kPage, kMargin, inner);
  for (size_t i = 0; i < bytes_; ++i) data_[i] = reinterpret_cast<const char*>(&kPoison)[i % 4];
}

GuardedPages::~GuardedPages() {
  if (owned_) munmap(pages_, length_);
}

bool GuardedPages::holds(const void* address) const {
  const ptrdiff_t offset = static_cast<const char*>(address) - pages_;
  return offset >= 0 && static_cast<size_t>(offset) < length_;
}

bool GuardedPages::margins_intact() const {
  for (const char* p = pages_ + kPage; p < pages_ + length_ - kPage; ++p) {
    if (p == data_ && bytes_) p += bytes_;
    if (p < pages_ + length_ - kPage && static_cast<unsigned char>(*p) != kMargin) return false;
  }
  return true;
}

Buffer::Buffer(std::string name, size_t bytes, bool writable, GuardedPages::Flush flush, size_t remainder)
    : name(std::move(name)),
      bytes(bytes),
      writable(writable),
      pages(bytes, flush, remainder),
      shadow(bytes + 16, Shadow::kGlobal) {}

Buffer::Buffer(std::string name, size_t bytes, bool writable, char* place)
    : name(std::move(name)),
      bytes(bytes),
      writable(writable),
      pages(bytes, place),
      shadow(bytes + 16, Shadow::kGlobal) {}

void Buffer::fill(const void* source, size_t offset, size_t count) {
  if (count) std::memcpy(data() + offset, source, count);
  shadow.set_initialised(offset, count);
}

Buffer& Memory::add(std::string name, size_t bytes, bool writable, GuardedPages::Flush flush, size_t remainder) {
  buffers_.push_back(std::make_unique<Buffer>(std::move(name), bytes, writable, flush, remainder % 16));
  return *buffers_.back();
}

Buffer& Memory::add(std::string name, size_t bytes, bool writable, char* place) {
  buffers_.push_back(std::make_unique<Buffer>(std::move(name), bytes, writable, place));
  return *buffers_.back();
}

Buffer* Memory::find(const void* address, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto inside = [&](const Buffer& buffer) {
    const auto begin = reinterpret_cast<uintptr_t>(buffer.data());
    return at >= begin && at - begin <= buffer.bytes && bytes <= buffer.bytes - (at - begin);
  };
  if (last_ < buffers_.size() && inside(*buffers_[last_])) return buffers_[last_].get();
  for (size_t i = 0; i < buffers_.size(); ++i) {
    if (inside(*buffers_[i])) return buffers_[last_ = i].get();
  }
  return nullptr;
}

std::string place_of(const void* address, const void* base, size_t bytes) {
  const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(base));
  const auto size = static_cast<int64_t>(bytes);
  if (offset < 0) return std::to_string(-offset) + " bytes before";
  if (offset >= size) return std::to_string(offset - size) + " bytes behind the end of";
  return "byte " + std::to_string(offset) + " of";
}

std::string Memory::describe(const void* address) const {
  const Buffer* nearest = nullptr;
  uintptr_t best = std::numeric_limits<uintptr_t>::max();
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (const auto& buffer : buffers_) {
    const auto begin = reinterpret_cast<uintptr_t>(buffer->data()), end = begin + buffer->bytes;
    const uintptr_t distance = at < begin ? begin - at : at >= end ? at - end : 0;
    if (distance < best) best = distance, nearest = buffer.get();
  }
  if (!nearest) return "no buffer is registered";
  return place_of(address, nearest->data(), nearest->bytes) + " '" + nearest->name + "' (" +
         std::to_string(nearest->bytes) + " bytes)";
}

bool Memory::near(const void* address) const {
  for (const auto& buffer : buffers_) {
    if (buffer->pages.holds(address)) return true;
  }
  return false;
}

}  // namespace simt
