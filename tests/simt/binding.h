// What a Python module of kernels needs: numpy arrays as registered buffers, and the report as a dict.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "engine.h"

namespace simt {

namespace py = pybind11;

// Keywords of a launch: grid, cluster, threads, shared_bytes, seed, max_errors.
inline Config config_of(const py::dict& d) {
  Config c;
  for (const auto& item : d) {
    const std::string key = py::str(item.first);
    if (key == "grid")
      c.grid = item.second.cast<int64_t>();
    else if (key == "cluster")
      c.cluster = item.second.cast<int>();
    else if (key == "threads")
      c.threads = item.second.cast<int>();
    else if (key == "shared_bytes")
      c.shared_bytes = item.second.cast<size_t>();
    else if (key == "seed")
      c.seed = item.second.cast<uint64_t>();
    else if (key == "max_errors")
      c.max_errors = item.second.cast<size_t>();
    else
      throw py::key_error("launch has no '" + key + "'");
  }
  return c;
}

// The arrays of one call in guarded memory. Writable arrays can be copied back; `empty` ones start without values.
// `remainder`: name -> address of the first byte modulo 16; `front`: guard pages close before rather than behind.
class Arrays {
 public:
  Arrays(const std::map<std::string, py::array>& arrays, const std::vector<std::string>& empty = {},
         const std::map<std::string, size_t>& remainder = {}, bool front = false)
      : arrays_(arrays) {
    const auto flush = front ? GuardedPages::Flush::front : GuardedPages::Flush::back;
    for (const auto& [name, array] : arrays_) {
      if (!(array.flags() & py::array::c_style)) throw py::value_error("'" + name + "' is not contiguous");
      const auto at = remainder.find(name);
      const auto bytes = static_cast<size_t>(array.nbytes());
      Buffer& buffer = memory.add(name, bytes, array.writeable(), flush, at == remainder.end() ? 0 : at->second);
      if (std::find(empty.begin(), empty.end(), name) == empty.end()) buffer.fill(array.data());
      buffers_[name] = &buffer;
    }
  }

  // Where the array lies; null for a name that was not given.
  template <class T>
  T* data(const std::string& name) const {
    const auto at = buffers_.find(name);
    return at == buffers_.end() ? nullptr : reinterpret_cast<T*>(at->second->data());
  }

  void copy_back() {
    for (auto& [name, array] : arrays_) {
      if (array.writeable()) std::memcpy(array.mutable_data(), data<void>(name), static_cast<size_t>(array.nbytes()));
    }
  }

  Memory memory;

 private:
  std::map<std::string, py::array> arrays_;
  std::map<std::string, Buffer*> buffers_;
};

inline py::dict dict_of(const Counters& c) {
  using namespace py::literals;
  return py::dict("bytes_read"_a = c.bytes_read, "bytes_written"_a = c.bytes_written, "wide_reads"_a = c.wide_reads,
                  "wide_writes"_a = c.wide_writes, "narrow_reads"_a = c.narrow_reads,
                  "narrow_writes"_a = c.narrow_writes);
}

// Name of a buffer -> what went through it.
using BufferCounters = std::map<std::string, Counters>;

inline BufferCounters counters_of(const Memory& memory) {
  BufferCounters counters;
  for (const auto& buffer : memory.buffers()) counters[buffer->name] = buffer->counters;
  return counters;
}

inline py::dict dict_of(const Report& r, const BufferCounters& counters) {
  using namespace py::literals;
  py::list errors;
  for (const Error& error : r.errors) errors.append(py::make_tuple(error.check, error.text));
  py::dict buffers;
  for (const auto& [name, counted] : counters) buffers[py::str(name)] = dict_of(counted);
  return py::dict("errors"_a = errors, "total"_a = dict_of(r.total), "buffers"_a = buffers,
                  "shared_bytes"_a = r.shared_bytes, "block_barriers"_a = r.block_barriers,
                  "cluster_barriers"_a = r.cluster_barriers, "warp_meetings"_a = r.warp_meetings,
                  "switches"_a = r.switches, "schedule"_a = r.schedule);
}

inline py::dict dict_of(const Report& r, const Memory& memory) { return dict_of(r, counters_of(memory)); }

}  // namespace simt
