#include <csrc/core/value_integers.h>
#include <csrc/kernels/conv_quantize.h>
#include <csrc/kernels/linear_tile.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kPixels = 64;  // quantized at once: their channels' integers stay in L1

int64_t pixel_offset(const QuantizeImage& q, int64_t pixel) {
  const int64_t y = pixel / q.size.w, x = pixel % q.size.w;
  return ((y + q.before.h) * q.padded_width + x + q.before.w) * q.channels;
}

// One pixel's `count` channels, of a transposed block.
template <class To>
void copy_channels(const To* from, int64_t count, To* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Integers [lanes channels][kPixels] to `pixels` pixels at `targets`.
template <class To>
void scatter(const To* integers, int64_t pixels, int64_t channels, To* const* targets) {
  constexpr int64_t kStep = kLanes<To>;
  for (int64_t p = 0; p < pixels; p += kStep) {
    if (p + kStep <= pixels && channels == kStep) {
      transpose(integers + p, kPixels, [&](int64_t i) { return targets[p + i]; });
      continue;
    }
    To block[kStep][kStep];
    transpose(integers + p, kPixels, [&](int64_t i) { return block[i]; });
    for (int64_t i = 0; i < kStep && p + i < pixels; ++i)
      copy_channels(block[i], channels, targets[p + i]);
  }
}

template <class To>
void make_integers(const QuantizeImage& q, const uint8_t* codes, int64_t count, To* a) {
  code_integers(codes, q.grid.shift, count, a);
}
template <class To>
void make_integers(const QuantizeImage& q, const float* x, int64_t count, To* a) {
  if (!value_integers(q.grid, x, count, a)) *q.finite = false;
}

template <class From, class To>
void from_planes(const QuantizeImage& q, const From* x, To* image) {
  constexpr int64_t kStep = kLanes<To>;
  To integers[kStep * kPixels] = {};
  To* targets[kPixels];
  for (int64_t first = q.first; first < q.last; first += kPixels) {
    const int64_t pixels = q.last - first < kPixels ? q.last - first : kPixels;
    for (int64_t p = 0; p < pixels; ++p) targets[p] = image + pixel_offset(q, first + p);
    for (int64_t c = 0; c < q.channels; c += kStep) {
      const int64_t channels = q.channels - c < kStep ? q.channels - c : kStep;
      for (int64_t i = 0; i < channels; ++i)
        make_integers(q, x + (c + i) * q.size.area() + first, pixels, integers + i * kPixels);
      scatter(integers, pixels, channels, targets);
      for (int64_t p = 0; p < pixels; ++p) targets[p] += kStep;
    }
  }
}

// take(first pixel, pixels) for what lies in one image row.
template <class Take>
void for_each_row(const QuantizeImage& q, int64_t most, const Take& take) {
  for (int64_t first = q.first; first < q.last;) {
    const int64_t row_end = (first / q.size.w + 1) * q.size.w;
    const int64_t left = (row_end < q.last ? row_end : q.last) - first;
    const int64_t pixels = left < most ? left : most;
    take(first, pixels);
    first += pixels;
  }
}

// Of pictures: transposed blocks would be mostly empty.
constexpr int64_t kColours = 3;
template <class From, class To>
void from_colours(const QuantizeImage& q, const From* x, To* image) {
  constexpr int64_t kMost = 512;
  To integers[kColours][kMost];
  for_each_row(q, kMost, [&](int64_t first, int64_t pixels) {
    for (int64_t c = 0; c < kColours; ++c)
      make_integers(q, x + c * q.size.area() + first, pixels, integers[c]);
    To* __restrict__ to = image + pixel_offset(q, first);
    for (int64_t p = 0; p < pixels; ++p) {
      to[kColours * p] = integers[0][p];
      to[kColours * p + 1] = integers[1][p];
      to[kColours * p + 2] = integers[2][p];
    }
  });
}

// Pixels' channels are contiguous on both sides.
template <class From, class To>
void from_pixels(const QuantizeImage& q, const From* x, To* image) {
  for_each_row(q, q.size.w, [&](int64_t first, int64_t pixels) {
    make_integers(q, x + first * q.channels, pixels * q.channels, image + pixel_offset(q, first));
  });
}

template <class From>
void quantize_from(const QuantizeImage& q, const From* x) {
  if (q.channels_last) return q.wide ? from_pixels(q, x, q.wide) : from_pixels(q, x, q.narrow);
  if (q.channels == kColours)
    return q.wide ? from_colours(q, x, q.wide) : from_colours(q, x, q.narrow);
  q.wide ? from_planes(q, x, q.wide) : from_planes(q, x, q.narrow);
}

// Inputs 0 2 1 3 of every four. Those after a group's last are zero, whatever an earlier row left.
void interleave(const BlockLayout&, int8_t*) {}
void interleave(const BlockLayout& layout, int16_t* row) {
  using Four = uint64_t __attribute__((may_alias, aligned(2)));
  for (int64_t k = 0; k < layout.groups; ++k) {
    int16_t* const group = row + k * layout.group_blocks * kBlockInputs;
    const int64_t count = layout.group_columns(k), fours = (count + 3) / 4;
    for (int64_t i = count; i < 4 * fours; ++i) group[i] = 0;
    auto* const values = reinterpret_cast<Four*>(group);
    for (int64_t i = 0; i < fours; ++i) {
      const uint64_t v = values[i], middle = 0xffff0000, upper = middle << 16;
      values[i] = (v & ~(middle | upper)) | ((v & middle) << 16) | ((v & upper) >> 16);
    }
  }
}

template <class T>
void gather(const GatherRows& g, const T* image, T* rows) {
  const BlockLayout& layout = g.layout;
  const int64_t depth = layout.blocks * kBlockInputs;
  int64_t y = g.first / g.out_width, x = g.first % g.out_width;
  for (int64_t row = 0; row < g.rows; ++row, rows += depth) {
    if (g.runs != nullptr) {
      const T* const pixel =
          image + (y * g.stride.h * g.padded_width + x * g.stride.w) * g.channels;
      for (int64_t i = 0; i < g.run_count; ++i)
        copy_run(pixel + g.runs[i].from, rows + g.runs[i].to, g.runs[i].count * sizeof(T));
      interleave(layout, rows);
    }
    for (int64_t k = 0; k < layout.groups; ++k)
      g.sums[row * layout.groups + k] = sum_of(rows + k * layout.group_blocks * kBlockInputs,
                                               layout.blocks_of_group(k) * kBlockInputs);
    if (++x == g.out_width) {
      x = 0;
      ++y;
    }
  }
}

void store_transposed(const StoreRows& s) {
  constexpr int64_t kStep = kLanes<float>;
  const int64_t whole_rows = s.rows / kStep * kStep, whole = s.outputs / kStep * kStep;
  for (int64_t n = 0; n < whole; n += kStep) {
    for (int64_t row = 0; row < whole_rows; row += kStep)
      transpose(s.values + row * s.value_step + n, s.value_step,
                [&](int64_t i) { return s.out + (n + i) * s.output_step + row; });
  }
  for (int64_t n = 0; n < s.outputs; ++n) {
    for (int64_t row = n < whole ? whole_rows : 0; row < s.rows; ++row)
      s.out[n * s.output_step + row] = s.values[row * s.value_step + n];
  }
  if (s.epilogue == Epilogue::none) return;
  for (int64_t n = 0; n < s.outputs; ++n) activate(s.epilogue, s.out + n * s.output_step, s.rows);
}

}  // namespace

void largest_magnitude(const LargestMagnitude& m) { *m.bits = magnitude_bits(m.x, m.count); }

void quantize_image(const QuantizeImage& q) {
  q.x != nullptr ? quantize_from(q, q.x) : quantize_from(q, q.codes);
}

void gather_rows(const GatherRows& g) {
  g.wide != nullptr ? gather(g, g.wide_image, g.wide) : gather(g, g.narrow_image, g.narrow);
}

void store_rows(const StoreRows& s) {
  if (s.output_step != 1) return store_transposed(s);
  for (int64_t row = 0; row < s.rows; ++row) {
    float* const to = s.out + row * s.row_step;
    const float* const from = s.values + row * s.value_step;
    for (int64_t n = 0; n < s.outputs; ++n) to[n] = from[n];
    activate(s.epilogue, to, s.outputs);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
