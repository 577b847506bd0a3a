#pragma once

#include "streaming.cuh"
#include "table.h"

namespace fastkd {

template <class K>
KernelTable table_of() {
  KernelTable table{gpu::warp_resident<K>, gpu::block_resident<K>, gpu::stream_sums<K>, nullptr, gpu::stream_finish<K>};
  if constexpr (!K::kMixed) table.terms = gpu::stream_terms<K>;
  return table;
}

template <Divergence kDivergence>
KernelTable tables_of(bool rich) {
  return rich ? table_of<gpu::Kind<kDivergence, true>>() : table_of<gpu::Kind<kDivergence, false>>();
}

}  // namespace fastkd
