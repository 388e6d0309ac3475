// Convolutions with packed low-bit weights and integer activations: the product of linear.h on rows
// of im2row, and a direct kernel for depthwise ones.
//
// The integers a of an image lie in a padded copy: channels last for products, planes for
// depthwise. What pads counts as the value 0, that is as the integer z = zero point. Where z is no
// integer of the grid, the copy holds the nearest one, `fill`, and each output gets back (z - fill)
// * (sum of the weights on padding).
//
// Note [gathered columns]: a weight's columns (c, ky, kx) are packed as (ky, kx, c) inside each
// group of the quantizer, so that a row is a few runs of contiguous integers.
#pragma once
#include <csrc/core/integers.h>
#include <csrc/kernels/linear.h>

namespace torchquant {

struct Extent {
  int64_t h;
  int64_t w;

  TORCHQUANT_HOST_DEVICE int64_t area() const { return h * w; }
};

struct ConvShape {
  int64_t batch;
  int64_t channels;
  int64_t outputs;
  int64_t groups;
  Extent size;    // of the input
  Extent before;  // padding above and to the left
  Extent padded;  // size with all padding
  Extent kernel;
  Extent stride;
  Extent dilation;
  Extent out;
};

inline bool has_padding(const ConvShape& s) { return s.padded.area() != s.size.area(); }

// magnitude_bits of x.
struct LargestMagnitude {
  const float* x;
  int64_t count;
  int32_t* bits;
};

// Pixels [first, last) of one sample into its padded copy.
struct QuantizeImage {
  const float* x;        // [C, H * W], or [H * W, C] with channels last; null: codes are given
  const uint8_t* codes;  // the same
  bool channels_last;
  int64_t channels;
  Extent size;
  Extent before;
  int64_t padded_width;
  int64_t first;
  int64_t last;
  IntegerGrid grid;
  int8_t* narrow;  // [padded h, padded w, C], or null
  int16_t* wide;   // the same in 16 bits
  bool* finite;    // set to false where x is not
};

struct ConvRun {
  int64_t from;  // in the copy, from the first tap's pixel
  int64_t to;    // in the row
  int64_t count;
};

// Rows of output pixels [first, first + rows) of one sample, and their sums. Inputs between the
// runs stay as they are.
struct GatherRows {
  BlockLayout layout;
  const ConvRun* runs;  // null: the rows are there already
  int64_t run_count;
  const int8_t* narrow_image;
  const int16_t* wide_image;
  int64_t channels;  // of the image
  int64_t padded_width;
  Extent stride;
  int64_t out_width;
  int64_t first;
  int64_t rows;
  int8_t* narrow;  // [rows, blocks * 32], or null
  int16_t* wide;   // the same, inputs 0 2 1 3 of every four
  int32_t* sums;   // [rows, groups]
};

// values [rows, outputs] to out[row * row_step + output * output_step]; one of the steps is 1.
struct StoreRows {
  const float* values;
  int64_t value_step;  // between rows
  int64_t rows;
  int64_t outputs;
  float* out;
  int64_t row_step;
  int64_t output_step;
  Epilogue epilogue;
};

// One input plane of one sample and the outputs that it gives.
//
// Note [row pairs]: vpmaddwd adds the products of two neighbouring 16-bit numbers. The neighbours
// are pixels of two kernel rows, a[y][x] and a[y + dilation][x]. Pairs lie by the remainders of y
// and x by the strides, [stride h][stride w][y / stride h][x / stride w], so that whatever a tap
// needs for all outputs is one contiguous run, with some results between the rows of outputs that
// nobody reads.
struct DepthwisePlane {
  const ConvShape* shape;
  const float* x;  // [H, W], or null: codes are given
  const uint8_t* codes;
  IntegerGrid grid;
  int32_t fill;
  bool padded;  // plane and padding_pairs hold this sample's padding already
  float a_scale;
  float a_zero;
  float fill_error;        // a_zero - fill
  int64_t outputs;         // of this plane
  const int16_t* weight;   // [outputs, pair_taps, 2]
  const int16_t* ones;     // [pair_taps, 2]: 1 on every tap
  const int64_t* offsets;  // [pair_taps]: of a tap's pixels in pairs
  int64_t pair_taps;       // ceil(kernel h / 2) * kernel w
  int64_t pitch;           // between rows of pairs
  int64_t phase_size;      // of the pairs of one remainder
  int64_t positions;       // results, those between the rows included
  const float* scale;      // [outputs]
  const float* offset;     // [outputs], or null
  const float* sum;        // [outputs]: of the row's values
  const float* bias;       // [outputs], or null
  Epilogue epilogue;
  CpuTier tier;       // for instructions beside the tier's code
  int16_t* integers;  // [H, W]
  int16_t* plane;     // [padded h + dilation h, pitch * stride w]
  int32_t* pairs;     // [stride h, stride w, phase_size], and the same of the padding
  int32_t* padding_pairs;
  int32_t* sums;  // [4, line]
  int64_t line;   // positions, padded to vectors
  float* values;  // [line]
  float* out;     // [outputs, out h, out w]
  bool* finite;
};

// Some channels, each with one output, of output rows [first_row, last_row) of one sample, channels
// last. Integer rows lie as row pairs (Note [row pairs]) of `width` lanes a pixel, in a ring of the
// rows that one output row reaches.
struct DepthwisePixels {
  const ConvShape* shape;
  const float* x;  // [H, W, C] from the first of these channels on, or null: codes are given
  const uint8_t* codes;
  IntegerGrid grid;
  int32_t fill;
  float a_scale;
  float a_zero;
  float fill_error;  // a_zero - fill
  int64_t channels;
  int64_t width;  // channels padded to kPixelLanes
  int64_t first_row;
  int64_t last_row;
  int64_t pair_taps;
  int64_t weight_stride;
  const int32_t* weight;  // [pair_taps, weight_stride]: pairs
  const int32_t* ones;    // the same with 1 on every tap
  const float* scale;     // [width], as all that follow: padded with zeros
  const float* offset;
  const float* sum;
  const float* bias;
  Epilogue epilogue;
  CpuTier tier;            // for instructions beside the tier's code
  int32_t* pairs;          // [reach, padded w, width]
  int32_t* padding_pairs;  // the same of the padding
  const int32_t** taps;    // [2, pair_taps]
  float* out;              // [out h, out w, C] from the first of these channels on
  uint8_t* out_codes;      // null: values
  IntegerGrid out_grid;    // of the codes
  bool* finite;
};
constexpr int64_t kPixelLanes = 16;  // a multiple of what the kernels take at once

TORCHQUANT_TIER_LEAF(largest_magnitude, LargestMagnitude)
TORCHQUANT_TIER_LEAF(quantize_image, QuantizeImage)
TORCHQUANT_TIER_LEAF(gather_rows, GatherRows)
TORCHQUANT_TIER_LEAF(store_rows, StoreRows)
TORCHQUANT_TIER_LEAF(depthwise_plane, DepthwisePlane)
TORCHQUANT_TIER_LEAF(depthwise_pixels, DepthwisePixels)

}  // namespace torchquant
