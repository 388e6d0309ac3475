#include <csrc/quantizers/subset.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

constexpr int64_t kPerWarp = 1024;  // elements

// Calls visit(i, channel) for every element, neighbours in neighbouring lanes.
template <class Visit>
__device__ void for_each_element(int64_t count, const SubsetChannels& layout, const Visit& visit) {
  for (int64_t first = first_row() * kPerWarp; first < count; first += row_step() * kPerWarp) {
    const int64_t end = first + kPerWarp < count ? first + kPerWarp : count;
    for (int64_t i = first + warp_lane(); i < end; i += kWarpSize)
      visit(i, layout.channels == 1 ? 0 : i / layout.inner % layout.channels);
  }
}

__global__ void subset_encode_kernel(const SubsetEncode encode) {
  for_each_element(encode.count, encode.layout, [&](int64_t i, int64_t channel) {
    const float x = encode.x[i];
    const float* levels = encode.levels + channel * encode.level_count;
    int64_t below = 0;  // thresholds known to be below x
    int64_t rest = encode.level_count - 1;
    while (rest > 0) {
      const int64_t half = rest / 2;
      const float* pair = levels + below + half;
      const bool above = x > threshold_between(__ldg(pair), __ldg(pair + 1));
      below += above ? half + 1 : 0;
      rest = above ? rest - half - 1 : half;
    }
    encode.codes[i] = static_cast<uint8_t>(below);
  });
}

__global__ void subset_decode_kernel(const SubsetDecode decode) {
  for_each_element(decode.count, decode.layout, [&](int64_t i, int64_t channel) {
    decode.out[i] = __ldg(decode.values + channel * kSubsetMaxLevels + decode.codes[i]);
  });
}

}  // namespace

void launch_subset_encode(const SubsetEncode& encode, void* stream) {
  launch_rows("subset_encode", subset_encode_kernel, encode,
              (encode.count + kPerWarp - 1) / kPerWarp, stream);
}

void launch_subset_decode(const SubsetDecode& decode, void* stream) {
  launch_rows("subset_decode", subset_decode_kernel, decode,
              (decode.count + kPerWarp - 1) / kPerWarp, stream);
}

}  // namespace torchquant
