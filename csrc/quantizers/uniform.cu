#include <csrc/quantizers/uniform.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

constexpr int64_t kSlice = 1024;  // elements of a row for one warp: long rows keep many busy

inline __host__ __device__ int64_t slices_per_row(const UniformGrids& grids) {
  return (grids.columns + kSlice - 1) / kSlice;
}

// Calls visit(element, grid) for every element of this lane.
template <class Visit>
__device__ void for_each_element(const UniformGrids& grids, const Visit& visit) {
  const int64_t slices = slices_per_row(grids);
  for (int64_t slice = first_row(); slice < grids.rows * slices; slice += row_step()) {
    const int64_t n = slice / slices, start = slice % slices * kSlice;
    const int64_t end = start + kSlice < grids.columns ? start + kSlice : grids.columns;
    for (int64_t j = start + warp_lane(); j < end; j += kWarpSize)
      visit(n * grids.columns + j, n * grids.row_stride + j / grids.group_size);
  }
}

__global__ void uniform_encode_kernel(const UniformEncode work) {
  for_each_element(work.grids, [&](int64_t i, int64_t grid) {
    work.codes[i] = static_cast<uint8_t>(
        to_code(work.x[i], work.grids.scale[grid], work.grids.zero_point[grid], work.max_code));
  });
}

__global__ void uniform_decode_kernel(const UniformDecode work) {
  for_each_element(work.grids, [&](int64_t i, int64_t grid) {
    work.values[i] = to_value(static_cast<float>(work.codes[i]), work.grids.scale[grid],
                              work.grids.zero_point[grid]);
  });
}

}  // namespace

void launch_uniform_encode(const UniformEncode& work, void* stream) {
  launch_rows("uniform_encode", uniform_encode_kernel, work,
              work.grids.rows * slices_per_row(work.grids), stream);
}

void launch_uniform_decode(const UniformDecode& work, void* stream) {
  launch_rows("uniform_decode", uniform_decode_kernel, work,
              work.grids.rows * slices_per_row(work.grids), stream);
}

}  // namespace torchquant
