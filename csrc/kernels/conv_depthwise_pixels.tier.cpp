#include <csrc/core/value_integers.h>
#include <csrc/kernels/conv.h>
#include <csrc/kernels/linear_tile.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kStep = kVectorLanes;
constexpr int64_t kMostPixels = kStep == 16 ? 14 : 7;  // of outputs, in registers

int64_t reach(const ConvShape& s) { return s.dilation.h * (s.kernel.h - 1) + 1; }

// Where a padded row's integers go: to the lower halves of its own pairs, to the upper ones of the
// row that lies a dilation above. Null where no tap starts from that row.
struct PairRows {
  int32_t* lower;
  int32_t* upper;
};

// [width / kStep][reach][padded w][kStep]: the pixels of some lanes are neighbours.
class Ring {
 public:
  Ring(const DepthwisePixels& d, int32_t* pairs)
      : s_(*d.shape),
        pairs_(pairs),
        top_(d.first_row * s_.stride.h),
        row_size_(s_.padded.w * kStep),
        multiples_(2 * s_.dilation.h % s_.stride.h == 0) {}

  int32_t* row(int64_t y) const { return pairs_ + y % reach(s_) * row_size_; }
  int64_t block_size() const { return reach(s_) * row_size_; }

  PairRows rows_of(int64_t y) const {
    const int64_t above = y - s_.dilation.h;
    const bool paired = s_.kernel.h > 1 && above >= top_ && starts(above);
    return {starts(y) ? row(y) : nullptr, paired ? row(above) : nullptr};
  }

 private:
  bool starts(int64_t y) const { return !multiples_ || y % s_.stride.h == 0; }

  const ConvShape& s_;
  int32_t* const pairs_;
  const int64_t top_;
  const int64_t row_size_;
  const bool multiples_;
};

template <bool kLower, bool kUpper>
struct PairWriter {
  inline __attribute__((always_inline)) void operator()(int64_t i, Ints integers) const {
    if constexpr (kLower) store(integers & 0xffff, rows.lower + i);
    if constexpr (kUpper) store(load<Ints>(rows.upper + i) | integers << 16, rows.upper + i);
  }

  const PairRows rows;
};

template <class Visit>
void with_writer(const PairRows& rows, const Visit& visit) {
  if (rows.lower != nullptr && rows.upper != nullptr) return visit(PairWriter<true, true>{rows});
  if (rows.lower != nullptr) return visit(PairWriter<true, false>{rows});
  if (rows.upper != nullptr) visit(PairWriter<false, true>{rows});
}

// Some neighbouring pixels of one row to lanes of pairs.
template <class Writer>
struct PixelWriter {
  const DepthwisePixels& d;
  const Writer put;
  const int64_t block_size;

  void fill(int64_t first, int64_t last, int32_t value) const {
    for (int64_t lane = 0; lane < d.width; lane += kStep)
      for (int64_t i = first * kStep; i < last * kStep; i += kStep)
        put(lane / kStep * block_size + i, Ints{} + value);
  }

  template <class Input, class Integers>
  void quantize(const Input* x, int64_t first, int64_t last, const Integers integers) const {
    const int64_t channels = d.channels, step = d.shape->channels, block = block_size;
    const int64_t whole = channels / kStep * kStep;
    const Writer write = put;
    Floats noted{};
    for (int64_t pixel = first * kStep; pixel < last * kStep; pixel += kStep, x += step) {
      int64_t to = pixel;
      for (int64_t c = 0; c < whole; c += kStep, to += block) {
        const auto inputs = load_inputs(x + c);
        noted = note_finite(noted, inputs);
        write(to, integers(inputs));
      }
      if (whole == channels) continue;
      Input rest[kStep] = {};
      for (int64_t c = whole; c < channels; ++c) rest[c - whole] = x[c];
      noted = note_finite(noted, load_inputs(rest));
      write(to, integers(load_inputs(rest)));
    }
    for (int64_t i = 0; i < kStep; ++i)
      if (noted[i] != noted[i]) *d.finite = false;
  }
};

// Row y of the padded input: its padding, and what inside(writer, row) puts between.
template <class Inside>
void put_padded_row(const DepthwisePixels& d, const Ring& ring, int64_t y, int32_t fill,
                    const Inside& inside) {
  const ConvShape& s = *d.shape;
  const int64_t row = y - s.before.h, begin = s.before.w, end = begin + s.size.w;
  with_writer(ring.rows_of(y), [&]<class Put>(const Put& put) {
    const PixelWriter<Put> writer{d, put, ring.block_size()};
    if (row < 0 || row >= s.size.h) return writer.fill(0, s.padded.w, fill);
    writer.fill(0, begin, fill);
    inside(writer, row);
    writer.fill(end, s.padded.w, fill);
  });
}

void put_input_row(const DepthwisePixels& d, const Ring& ring, int64_t y) {
  const ConvShape& s = *d.shape;
  put_padded_row(d, ring, y, d.fill, [&](const auto& writer, int64_t row) {
    const int64_t first = s.before.w, last = first + s.size.w, at = row * s.size.w * s.channels;
    if (d.x == nullptr) return writer.quantize(d.codes + at, first, last, IntegersOfCodes(d.grid));
    with_integers(d.grid,
                  [&](const auto& integers) { writer.quantize(d.x + at, first, last, integers); });
  });
}

void put_padding_row(const DepthwisePixels& d, const Ring& ring, int64_t y) {
  const ConvShape& s = *d.shape;
  put_padded_row(d, ring, y, 1, [&](const auto& writer, int64_t) {
    writer.fill(s.before.w, s.before.w + s.size.w, 0);
  });
}

// Where the taps of output row y read for its first pixel.
void find_taps(const DepthwisePixels& d, const Ring& ring, int64_t y, const int32_t** taps) {
  const ConvShape& s = *d.shape;
  for (int64_t t = 0; t < d.pair_taps; ++t) {
    const int64_t ky = t / s.kernel.w * 2, kx = t % s.kernel.w;
    taps[t] = ring.row(y * s.stride.h + ky * s.dilation.h) + kx * s.dilation.w * kStep;
  }
}

// Sums over the taps for V pixels, `kStride` apart, from lane `first` on.
template <int V, int kStride, bool kDot>
inline __attribute__((always_inline)) void sum_taps(const DepthwisePixels& d,
                                                    const int32_t* const* taps,
                                                    const int32_t* weight, int64_t first,
                                                    Ints (&sums)[V]) {
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sums[v] = Ints{};
  for (int64_t t = 0; t < d.pair_taps; ++t) {
    const Ints w = load<Ints>(weight + t * d.weight_stride);
    const int32_t* pairs = taps[t] + first;
    asm("" : "+r"(pairs));  // else g++ keeps a register for each of the addresses, and spills
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      sums[v] = add_pairs<kDot>(sums[v], load<Ints>(pairs + v * kStride * kStep), w);
  }
}

// Outputs of some lanes, as in finish_plane of conv_depthwise.tier.cpp.
struct Outputs {
  Outputs(const DepthwisePixels& d, int64_t lane)
      : scale(load<Floats>(d.scale + lane)),
        offset(load<Floats>(d.offset + lane)),
        zero(d.a_zero * load<Floats>(d.sum + lane)),
        bias(load<Floats>(d.bias + lane)),
        correction(d.a_scale * d.fill_error * scale),
        a_scale(d.a_scale),
        has_offset(false) {
    for (int64_t i = 0; i < kStep; ++i) has_offset = has_offset || offset[i] != 0.0f;
  }

  Floats of(Floats sum) const { return fused(sum * scale - zero, Floats{} + a_scale, bias); }

  Floats scale, offset, zero, bias, correction;
  float a_scale;
  bool has_offset;
};

Floats activated(Epilogue epilogue, Floats y) {
  float values[kStep];
  store(y, values);
  activate(epilogue, values, kStep);
  return load<Floats>(values);
}

// Where outputs go: as values, or as codes.
struct StoreValues {
  explicit StoreValues(const DepthwisePixels& d) : out(d.out) {}
  inline __attribute__((always_inline)) void whole(Floats y, int64_t at) const {
    store(y, out + at);
  }
  void some(Floats y, int64_t at, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) out[at + i] = y[i];
  }

  float* const out;
};

template <class Codes>
struct StoreCodes {
  StoreCodes(const DepthwisePixels& d, const Codes& codes) : codes(codes), out(d.out_codes) {}
  inline __attribute__((always_inline)) void whole(Floats y, int64_t at) const {
    store_narrow(codes(y), out + at);
  }
  void some(Floats y, int64_t at, int64_t count) const {
    const Ints all = codes(y);
    for (int64_t i = 0; i < count; ++i) out[at + i] = static_cast<uint8_t>(all[i]);
  }

  const Codes codes;
  uint8_t* const out;
};

// Where a block of lanes is.
struct Block {
  int64_t lane;
  int64_t in_ring;
};

// V pixels of output row y from pixel x on; one where kStride is 0, for any stride.
template <int V, int kStride, bool kDot, class Store>
inline __attribute__((always_inline)) void run_pixels(const DepthwisePixels& d, const Block& block,
                                                      const Outputs& outputs, const Store& target,
                                                      int64_t y, int64_t x) {
  const ConvShape& s = *d.shape;
  const int64_t first = block.in_ring + x * s.stride.w * kStep;
  const int32_t *const weight = d.weight + block.lane, *const ones = d.ones + block.lane;
  const int32_t* const* const padding = d.taps + d.pair_taps;
  Ints sums[V], others[V];
  Floats values[V];
  sum_taps<V, kStride, kDot>(d, d.taps, weight, first, sums);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) values[v] = to_floats(sums[v]);
  if (outputs.has_offset) {
    sum_taps<V, kStride, kDot>(d, d.taps, ones, first, others);
    for (int v = 0; v < V; ++v) values[v] = values[v] + outputs.offset * to_floats(others[v]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) values[v] = outputs.of(values[v]);
  if (d.fill_error != 0.0f) {
    sum_taps<V, kStride, kDot>(d, padding, weight, first, sums);
    sum_taps<V, kStride, kDot>(d, padding, ones, first, others);
    for (int v = 0; v < V; ++v)
      values[v] = values[v] +
                  outputs.correction * (to_floats(sums[v]) + outputs.offset * to_floats(others[v]));
  }
  if (d.epilogue != Epilogue::none)
    for (int v = 0; v < V; ++v) values[v] = activated(d.epilogue, values[v]);
  const int64_t step = s.outputs, to = (y * s.out.w + x) * step + block.lane;
  const int64_t left = d.channels - block.lane;
  const Store own =
      target;  // copied: bytes that are stored could change what is behind a reference
  if (left >= kStep) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) own.whole(values[v], to + v * step);
  } else {
    for (int v = 0; v < V; ++v) own.some(values[v], to + v * step, left);
  }
}

template <int V, int kStride, bool kDot, class Store>
void run_columns(const DepthwisePixels& d, const Block& block, const Outputs& outputs,
                 const Store& target, int64_t y, int64_t& x) {
  for (; x + V <= d.shape->out.w; x += V)
    run_pixels<V, kStride, kDot>(d, block, outputs, target, y, x);
}

template <int kStride, bool kDot, class Store>
void run_row(const DepthwisePixels& d, const Ring& ring, const Store& target, int64_t y) {
  for (Block block{0, 0}; block.lane < d.channels; block.lane += kStep) {
    const Outputs outputs(d, block.lane);
    int64_t x = 0;
    if constexpr (kStride > 0) {
      run_columns<kMostPixels, kStride, kDot>(d, block, outputs, target, y, x);
      if constexpr (kMostPixels > 7) run_columns<7, kStride, kDot>(d, block, outputs, target, y, x);
      run_columns<3, kStride, kDot>(d, block, outputs, target, y, x);
    }
    run_columns<1, 0, kDot>(d, block, outputs, target, y, x);
    block.in_ring += ring.block_size();
  }
}

template <bool kDot, class Store>
void run_rows(const DepthwisePixels& d, const Store& target) {
  const ConvShape& s = *d.shape;
  const Ring ring(d, d.pairs), padding(d, d.padding_pairs);
  int64_t next = 0;  // row of the input
  for (int64_t y = d.first_row; y < d.last_row; ++y) {
    const int64_t top = y * s.stride.h;
    for (next = next < top ? top : next; next < top + reach(s); ++next) {
      put_input_row(d, ring, next);
      if (d.fill_error != 0.0f) put_padding_row(d, padding, next);
    }
    find_taps(d, ring, y, d.taps);
    if (d.fill_error != 0.0f) find_taps(d, padding, y, d.taps + d.pair_taps);
    if (s.stride.w == 1)
      run_row<1, kDot>(d, ring, target, y);
    else if (s.stride.w == 2)
      run_row<2, kDot>(d, ring, target, y);
    else
      run_row<0, kDot>(d, ring, target, y);
  }
}

template <bool kDot>
void run(const DepthwisePixels& d) {
  if (d.out_codes == nullptr) return run_rows<kDot>(d, StoreValues(d));
  with_integers(d.out_grid, [&](const auto& codes) { run_rows<kDot>(d, StoreCodes(d, codes)); });
}

}  // namespace

void depthwise_pixels(const DepthwisePixels& d) {
  d.tier == CpuTier::avx512 ? run<false>(d) : run<true>(d);
}

}  // namespace torchquant::TORCHQUANT_TIER
