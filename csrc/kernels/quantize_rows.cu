// Activations to integers on CUDA. A row is cut into slices, one for each warp, so that even one
// row keeps a GPU busy: a first kernel finds each row's largest magnitude, a second one quantizes.
// Both meet in integers, whose order does not matter.
#include <csrc/kernels/linear.h>
#include <csrc/kernels/linear_float.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

constexpr int kFour = 4;  // inputs of a lane: four loads wait together, and stores are whole words
constexpr int64_t kWarpFour = kFour * kWarpSize;
constexpr int64_t kSlice = 8 * kWarpFour;  // inputs of a warp

struct RowGrid {
  bool dynamic;
  float scale;
  float zero_point;
  float factor;  // 1 / scale, for scales that come from the row
};

inline __host__ __device__ int64_t slices_of(int64_t count) {
  return (count + kSlice - 1) / kSlice;
}

// By comparing bits, so that NaN and Inf come out largest.
__global__ void largest_kernel(const QuantizeRows q) {
  const int64_t columns = q.layout.columns, slices = slices_of(columns);
  for (int64_t index = first_row(); index < q.rows * slices; index += row_step()) {
    const int64_t row = index / slices, begin = index % slices * kSlice;
    const int64_t end = begin + kSlice < columns ? begin + kSlice : columns;
    const float* const x = q.x + row * columns;
    uint32_t largest = 0;
    for (int64_t i = begin + warp_lane() * kFour; i < end; i += kWarpFour) {
      for (int j = 0; j < kFour; ++j) {
        const uint32_t magnitude = i + j < end ? bits_of(x[i + j]) & 0x7fffffff : 0;
        largest = largest > magnitude ? largest : magnitude;
      }
    }
    for (int half = kWarpSize / 2; half > 0; half /= 2) {
      const uint32_t other = __shfl_xor_sync(kFullWarp, largest, half);
      largest = largest > other ? largest : other;
    }
    if (warp_lane() == 0) atomicMax(q.largest + row, largest);
  }
}

// As grid_of_row of quantize_rows.tier.cpp; the scale of a row that is not finite is NaN.
__device__ inline RowGrid grid_of_row(const QuantizeRows& q, int64_t row) {
  if (q.x == nullptr) return {false, 0.0f, 0.0f, 0.0f};
  const float largest = float_of(q.largest[row]);
  const bool finite = largest <= 3.4028234663852886e38f;
  const float nan = float_of(0x7fc00000);
  if (q.scale_at != nullptr) return {false, finite ? *q.scale_at : nan, *q.zero_point_at, 0.0f};
  if (!finite) return {true, nan, 0.0f, 0.0f};
  const bool zero = !(largest >= 1.17549435e-38f * q.limit);
  return zero ? RowGrid{true, 0.0f, 0.0f, 0.0f}
              : RowGrid{true, largest / q.limit, 0.0f, q.limit / largest};
}

__device__ inline int32_t integer_at(const QuantizeRows& q, const RowGrid& grid, int64_t i) {
  if (q.codes != nullptr) return q.codes[i] - q.shift;
  if (grid.dynamic) return static_cast<int32_t>(round_to_integer(q.x[i] * grid.factor));
  return static_cast<int32_t>(to_code(q.x[i], grid.scale, grid.zero_point, q.max_code)) - q.shift;
}

// Four integers as bytes, or as 16 bits in the order 0 2 1 3.
__device__ inline void store_four(const QuantizeRows& q, int64_t at, const int32_t (&a)[kFour]) {
  const auto low = [](int32_t value, int bits) {
    return static_cast<uint32_t>(value) & ((1u << bits) - 1);
  };
  if (q.wide == nullptr) {
    *reinterpret_cast<uint32_t*>(q.narrow + at) =
        low(a[0], 8) | low(a[1], 8) << 8 | low(a[2], 8) << 16 | low(a[3], 8) << 24;
  } else {
    auto* const words = reinterpret_cast<uint32_t*>(q.wide + at);
    words[0] = low(a[0], 16) | low(a[2], 16) << 16;
    words[1] = low(a[1], 16) | low(a[3], 16) << 16;
  }
}

__device__ inline void quantize_slice(const QuantizeRows& q, const RowGrid& grid, int64_t row,
                                      int64_t g, int64_t slice) {
  const BlockLayout& layout = q.layout;
  const int64_t first = row * layout.columns + g * layout.group_size;
  const int64_t to = (row * layout.blocks + g * layout.group_blocks) * kBlockInputs;
  const int64_t count = layout.group_columns(g), padded = layout.blocks_of_group(g) * kBlockInputs;
  const int64_t begin = slice * kSlice, end = begin + kSlice < padded ? begin + kSlice : padded;
  int32_t sum = 0;
  for (int64_t i = begin + warp_lane() * kFour; i < end; i += kWarpFour) {
    int32_t a[kFour];
    for (int j = 0; j < kFour; ++j) {
      a[j] = i + j < count ? integer_at(q, grid, first + i + j) : 0;
      sum += a[j];
    }
    store_four(q, to + i, a);
  }
  for (int half = kWarpSize / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kFullWarp, sum, half);
  if (warp_lane() == 0) atomicAdd(q.sums + row * layout.groups + g, sum);
}

inline __host__ __device__ int64_t slices_of_row(const QuantizeRows& q) {
  return q.layout.groups * slices_of(q.layout.group_blocks * kBlockInputs);
}

__global__ void quantize_rows_kernel(const QuantizeRows q) {
  const int64_t slices = slices_of_row(q), groups = q.layout.groups;
  for (int64_t index = first_row(); index < q.rows * slices; index += row_step()) {
    const int64_t row = index / slices, slice = index % slices;
    const RowGrid grid = grid_of_row(q, row);
    if (q.a_scale != nullptr && slice == 0 && warp_lane() == 0) q.a_scale[row] = grid.scale;
    quantize_slice(q, grid, row, slice % groups, slice / groups);
  }
}

}  // namespace

void launch_quantize_rows(const QuantizeRows& q, void* stream) {
  if (q.x != nullptr)
    launch_rows("quantize_rows", largest_kernel, q, q.rows * slices_of(q.layout.columns), stream);
  launch_rows("quantize_rows", quantize_rows_kernel, q, q.rows * slices_of_row(q), stream);
}

}  // namespace torchquant
