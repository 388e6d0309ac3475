// The walk over the groups of every row, one warp a group.
#pragma once
#include <csrc/core/grid.h>

#include <csrc/core/warp.cuh>

namespace torchquant {

inline __host__ __device__ int64_t groups_per_row(const GridRows& rows) {
  return (rows.columns + rows.group_size - 1) / rows.group_size;
}

// Calls visit(first weight, length, index of the group in scale and zero_point) for every group of
// this warp.
template <class Visit>
__device__ void for_each_group(const GridRows& rows, const Visit& visit) {
  const int64_t groups = groups_per_row(rows);
  for (int64_t group = first_row(); group < rows.rows * groups; group += row_step()) {
    const int64_t start = group % groups * rows.group_size;
    const int64_t left = rows.columns - start;
    visit(group / groups * rows.columns + start, left < rows.group_size ? left : rows.group_size,
          group);
  }
}

}  // namespace torchquant
