#include <csrc/quantizers/sulq.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

constexpr int64_t kPerWarp = 1024;  // elements

// Calls visit(i) for every element 0 .. count - 1, neighbours in neighbouring lanes.
template <class Visit>
__device__ void for_each_element(int64_t count, const Visit& visit) {
  for (int64_t first = first_row() * kPerWarp; first < count; first += row_step() * kPerWarp) {
    const int64_t end = first + kPerWarp < count ? first + kPerWarp : count;
    for (int64_t i = first + warp_lane(); i < end; i += kWarpSize) visit(i);
  }
}

__global__ void sulq_encode_kernel(const SulqEncode encode) {
  for_each_element(encode.count, [&](int64_t i) {
    const float x = encode.x[i];
    int64_t below = 0;  // thresholds known to be below x
    int64_t rest = encode.threshold_count;
    while (rest > 0) {
      const int64_t half = rest / 2;
      const bool above = x > __ldg(encode.thresholds + below + half);
      below += above ? half + 1 : 0;
      rest = above ? rest - half - 1 : half;
    }
    encode.codes[i] = static_cast<uint8_t>(below);
  });
}

__global__ void sulq_decode_kernel(const SulqDecode decode) {
  for_each_element(decode.count,
                   [&](int64_t i) { decode.out[i] = __ldg(decode.values + decode.codes[i]); });
}

__global__ void sulq_shift_matmul_kernel(const SulqShiftMatmul product) {
  const int64_t columns = product.columns;
  for (int64_t row = first_row(); row < product.batches * product.rows; row += row_step()) {
    const uint8_t* codes = product.codes + row * product.inner;
    const int16_t* v = product.v + row / product.rows * product.inner * columns;
    for (int64_t n = warp_lane(); n < columns; n += kWarpSize) {
      int64_t sum = 0;
      for (int64_t k = 0; k < product.inner; ++k) {
        const uint8_t shift = product.shifts[codes[k]];
        if (shift != kSulqNothing) sum += static_cast<int64_t>(v[k * columns + n]) << shift;
      }
      product.sums[row * columns + n] = sum;
    }
  }
}

}  // namespace

void launch_sulq_encode(const SulqEncode& encode, void* stream) {
  launch_rows("sulq_encode", sulq_encode_kernel, encode, (encode.count + kPerWarp - 1) / kPerWarp,
              stream);
}

void launch_sulq_decode(const SulqDecode& decode, void* stream) {
  launch_rows("sulq_decode", sulq_decode_kernel, decode, (decode.count + kPerWarp - 1) / kPerWarp,
              stream);
}

void launch_sulq_shift_matmul(const SulqShiftMatmul& product, void* stream) {
  launch_rows("sulq_shift_matmul", sulq_shift_matmul_kernel, product,
              product.batches * product.rows, stream);
}

}  // namespace torchquant
