// Packed linear layers on tensor cores: codes become fragments in registers.
//
// Lane 4 * g + c of a warp holds of a tile the outputs 2 * g and 2 * g + 1, of each block the
// inputs 8 * c to 8 * c + 7, and of the rows row g: weights and rows are read as they lie (Note
// [weight tiles] of linear.h), 8 bytes of a line and 8 inputs of a row by one load.
//
// Note [shares of a matrix product]: a warp takes one tile and 8 * tokens rows over one of `parts`
// parts of the inputs. A thread block holds the parts of `block_tiles` tiles: its warps read the
// same rows, from L1, and meet in shared memory at the end, where parts are added in their order.
// Integers of several groups become floats group after group, as on the CPU: there parts take whole
// groups in turn, and meet after every turn.
#pragma once
#include <algorithm>
#include <csrc/kernels/linear_mma_rows.cuh>
#include <type_traits>

namespace torchquant {
namespace {

constexpr int64_t kWantedWarps = 2048;  // 16 for each SM
constexpr int64_t kWantedBlocks = 128;  // about one for each SM

// Of a thread block; sixteen fit on an SM.
__host__ __device__ constexpr int most_warps(int tokens) { return tokens == 1 ? 8 : 16; }

__device__ inline float value_at(const TypedArray& array, int64_t i) {
  if (array.type == UnpackType::float32) return static_cast<const float*>(array.data)[i];
  const uint16_t half = static_cast<const uint16_t*>(array.data)[i];
  return array.type == UnpackType::float16 ? float_of_f16(half)
                                           : float_of(static_cast<uint32_t>(half) << 16);
}

__device__ inline void store_value(const TypedArray& array, int64_t i, float value) {
  void* const data = const_cast<void*>(array.data);
  if (array.type == UnpackType::float32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(
        array.type == UnpackType::float16 ? pair_f16(value, 0.0f) : pair_bf16(value, 0.0f));
  }
}

__device__ __noinline__ float activated(Epilogue epilogue, float y) {
  return epilogue == Epilogue::gelu ? gelu(y) : silu(y);
}

// As finish of linear.cu.
__device__ inline void finish_output(const MatrixProduct& m, int64_t row, int64_t output, float y) {
  const PackedProduct& p = m.product;
  const int64_t at = row * p.weight.outputs + output;
  if (p.a_zero != nullptr) y -= p.a_zero[row] * p.weight.sum[output];
  const float a_scale = p.a_scale != nullptr ? p.a_scale[row] : 1.0f;
  y = m.bias.data != nullptr ? fused(y, a_scale, value_at(m.bias, output)) : y * a_scale;
  if (p.epilogue != Epilogue::none) y = activated(p.epilogue, y);
  if (m.residual.data != nullptr) y += value_at(m.residual, at);
  if (p.codes == nullptr) return store_value(m.out, at, y);
  p.codes[at] =
      static_cast<uint8_t>(to_code(y, p.code_scale[output], p.code_zero_point[output], p.max_code));
}

// Whether parts take turns over groups, so that these can be added in their order.
__host__ __device__ inline bool in_turns(const MatrixProduct& m) {
  return m.x.type == UnpackType::bytes && m.product.weight.layout.groups > 1 && m.parts > 1;
}

// One warp's share. Blocks are multiplied in steps: of kStep blocks where these lie in one group,
// else of one.
constexpr int kStep = 4;

template <class X, class F, int kTokens>
struct MatrixWarp {
  using Sum = typename X::Sum;
  using Row = typename X::Row;
  using Lines = typename F::Lines;
  using Group = typename X::template Group<F, kTokens>;
  // Steps whose codes are loaded ahead, and blocks whose rows are loaded together.
  template <int N>
  static constexpr int kAhead = F::kWords == 2 && kTokens < 4 ? 2
                                : N == 1                      ? 2
                                                              : 1;
  static constexpr int kRowBatch = kTokens == 1 ? kStep : 2;

  const MatrixProduct& m;
  const PackedWeight& w;
  const int lane, part;
  const int64_t tile, first_row;
  const F format;
  const int groups, group_blocks;
  const int stride;  // from one of the part's groups to the next
  const float origin;
  int begin, end;  // blocks
  int group;       // in work
  const uint8_t* codes;
  const uint8_t* rows[kTokens];
  Group now, next;
  Sum sums[kTokens][4] = {};
  float values[kTokens][4] = {};
  float total[4] = {};  // of parts that take turns

  __device__ MatrixWarp(const MatrixProduct& product, int64_t its_tile, int its_part,
                        int64_t its_row)
      : m(product),
        w(product.product.weight),
        lane(warp_lane()),
        part(its_part),
        tile(its_tile),
        first_row(its_row),
        format(w, its_tile, lane),
        groups(static_cast<int>(w.layout.groups)),
        group_blocks(static_cast<int>(w.layout.group_blocks)),
        stride(X::kInOrder && in_turns(product) ? product.parts : 1),
        origin(static_cast<float>(w.origin)) {
    const int blocks = static_cast<int>(w.layout.blocks);
    const int share = static_cast<int>(padded((blocks + m.parts - 1) / m.parts, kStep));
    const int length = stride > 1 ? group_blocks : share;
    begin = part * length < blocks ? part * length : blocks;
    end = begin + length < blocks && stride == 1 ? begin + length : blocks;
    group = begin / group_blocks;
    codes = w.packed + tile * w.layout.blocks * F::kBlockBytes;
    for (int t = 0; t < kTokens; ++t) {  // rows behind the last one repeat it
      const int64_t row = first_row + t * kRowsAtOnce + lane / 4;
      const int64_t at = (row < m.product.rows ? row : m.product.rows - 1) * m.row_inputs;
      rows[t] =
          static_cast<const uint8_t*>(m.x.data) + at * (sizeof(Row) / 8) + lane % 4 * sizeof(Row);
    }
    load_group(group, now);
    load_group(group + stride, next);
  }

  __device__ int64_t output() const { return tile * kTileOutputs + lane / 4 * 2; }
  __device__ int64_t row_of(int t, int i) const {
    return first_row + t * kRowsAtOnce + lane % 4 * 2 + i % 2;
  }
  __device__ void load_group(int g, Group& to) const {
    to.load(m.product, g < groups ? g : groups - 1, output(), row_of(0, 0));
  }

  template <int N>
  __device__ void load_codes(int first, Lines (&lines)[N]) const {
    const uint8_t* const from = codes + int64_t{first} * F::kBlockBytes;
    const bool all = first + N <= end;
    for (int i = 0; i < N; ++i)
      if (all || first + i < end) format.load(from + i * F::kBlockBytes, lines[i]);
  }

  // Zeros where there are no more blocks, whatever their codes.
  template <int N>
  __device__ void load_rows(int first, Row (&x)[N][kTokens]) const {
    constexpr int kBytes = sizeof(Row) * 4;  // of a block
    for (int i = 0; i < N; ++i) {
      for (int t = 0; t < kTokens; ++t) {
        x[i][t] = Row{};
        if (first + i < end)
          x[i][t] = load_words<sizeof(Row) / 4>(rows[t] + int64_t{first} * kBytes + i * kBytes);
      }
    }
  }

  __device__ void multiply() {
    groups == 1 || group_blocks % kStep == 0 ? multiply_in_steps<kStep>() : multiply_in_steps<1>();
  }

  // A step's first block, and the end of its group.
  struct Step {
    int first, last;
  };
  template <int N>
  __device__ void advance(Step& step) const {
    step.first += N;
    if (step.first < step.last) return;
    step.first += (stride - 1) * group_blocks;
    step.last += stride * group_blocks;
  }

  template <int N>
  __device__ void multiply_in_steps() {
    Lines lines_ahead[kAhead<N>][N] = {};
    Step step{begin, (group + 1) * group_blocks}, ahead = step;
    for (int a = 0; a < kAhead<N>; ++a, advance<N>(ahead)) load_codes(ahead.first, lines_ahead[a]);
    while (step.first < end) {
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int a = 0; a < kAhead<N>; ++a, advance<N>(ahead), advance<N>(step)) {
        Lines lines[N];
        memcpy(lines, lines_ahead[a], sizeof(lines));
        load_codes(ahead.first, lines_ahead[a]);
        multiply_step(step.first, lines);
        const bool ends = step.first + N >= step.last || step.first + N >= end;
        if (groups > 1 && step.first < end && ends) end_group();
      }
    }
  }

  template <int N>
  __device__ void multiply_step(int first, const Lines (&lines)[N]) {
    constexpr int kRows = kRowBatch < N ? kRowBatch : N;
    for (int i = 0; i < N; i += kRows) {
      Row x[kRows][kTokens];
      load_rows(first + i, x);
      for (int j = 0; j < kRows; ++j) {
        const typename X::Weights weights = X::weights(format, lines[i + j], origin, now);
        for (int t = 0; t < kTokens; ++t) X::multiply(sums[t], weights, x[j][t]);
      }
    }
  }

  __device__ void end_group() {
    const bool first = group == 0 || stride > 1;
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < 4; ++i) {
        values[t][i] = now.added(m.product, t, i, sums[t][i], first, values[t][i]);
        sums[t][i] = 0;
      }
    }
    if constexpr (X::kInOrder)
      if (stride > 1) take_turns();
    group += stride;
    now = next;
    load_group(group + stride, next);
  }

  // Part t adds the numbers that all parts have from their group for t, in the order of the groups.
  // Two places serve in turn: none is written before all parts have read what it held.
  __device__ void take_turns() {
    const int turn = group / stride, place = turn % 2 * (static_cast<int>(blockDim.x) / kWarpSize);
    leave(values, place);
    if (part >= kTokens) return;
    for (int other = 0; other < stride && turn * stride + other < groups; ++other) {
      float numbers[4];
      read(numbers, place - part + other, part);
      for (int i = 0; i < 4; ++i) total[i] = turn + other == 0 ? numbers[i] : total[i] + numbers[i];
    }
  }

  __device__ void finish(int t, const float (&value)[4]) const {
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row_of(t, i), at = output() + i / 2;
      if (row < m.product.rows && at < w.outputs) finish_output(m, row, at, value[i]);
    }
  }

  // Four numbers of every lane for every t, in shared memory. Places are counted from the warp's.
  __device__ static LineWords<4>& meeting_place(int place, int t) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    return reinterpret_cast<LineWords<4>*>(
        warp_buffers)[((warp + place) * kTokens + t) * kWarpSize + warp_lane()];
  }
  template <class N>
  __device__ static void leave(const N (&own)[kTokens][4], int place) {
    for (int t = 0; t < kTokens; ++t) {
      LineWords<4> words;
      memcpy(&words, own[t], sizeof(words));
      meeting_place(place, t) = words;
    }
    __syncthreads();
  }
  template <class N>
  __device__ static void read(N (&numbers)[4], int place, int t) {
    const LineWords<4> words = meeting_place(place, t);
    memcpy(numbers, &words, sizeof(words));
  }

  // Numbers of all parts, added in their order; each part does so for its share of the tokens.
  template <class N, class Use>
  __device__ void meet(const N (&own)[kTokens][4], const Use& use) const {
    leave(own, 0);
    for (int t = part; t < kTokens; t += m.parts) {
      N sum[4] = {};
      for (int other = 0; other < m.parts; ++other) {
        N numbers[4];
        read(numbers, other - part, t);
        for (int i = 0; i < 4; ++i) sum[i] = other == 0 ? numbers[i] : sum[i] + numbers[i];
      }
      use(t, sum);
    }
  }

  __device__ void finish_all() {
    if (stride > 1) {
      if (group < static_cast<int>(padded(groups, stride))) take_turns();  // without a group
      if (part < kTokens) finish(part, total);
    } else if (groups > 1) {
      meet(values, [this](int t, const float (&value)[4]) { finish(t, value); });
    } else {
      meet(sums, [this](int t, const Sum(&sum)[4]) {
        typename X::template Group<F, 1> only;
        only.load(m.product, 0, output(), row_of(t, 0));
        float value[4];
        for (int i = 0; i < 4; ++i) value[i] = only.added(m.product, 0, i, sum[i], true, 0.0f);
        finish(t, value);
      });
    }
  }
};

template <class X, class F, int kTokens>
__global__ void __launch_bounds__(most_warps(kTokens) * kWarpSize, 16 / most_warps(kTokens))
    matrix_kernel(const MatrixProduct m) {
  constexpr int kRows = kTokens * kRowsAtOnce;
  const auto chunks = static_cast<unsigned>((m.product.rows + kRows - 1) / kRows);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t tile =
      m.product.first_tile + int64_t{blockIdx.x / chunks} * m.block_tiles + warp / m.parts;
  // A warp without a tile repeats the last one, and stores the same.
  MatrixWarp<X, F, kTokens> share(m, tile < m.product.last_tile ? tile : m.product.last_tile - 1,
                                  warp % m.parts, int64_t{blockIdx.x % chunks} * kRows);
  share.multiply();
  share.finish_all();
}

int64_t chunks_of(const MatrixProduct& m) {
  const int64_t rows = m.tokens * kRowsAtOnce;
  return (m.product.rows + rows - 1) / rows;
}

MatrixProduct in_shares(MatrixProduct m) {
  const PackedProduct& p = m.product;
  const int64_t tiles = p.last_tile - p.first_tile;
  m.tokens = p.rows <= kRowsAtOnce ? 1 : p.rows <= 2 * kRowsAtOnce ? 2 : 4;
  const int64_t shares = tiles * chunks_of(m);
  m.parts = 1;
  while (m.parts < 8 && shares * m.parts < kWantedWarps) m.parts *= 2;
  if (in_turns(m)) m.parts = std::max(m.parts, m.tokens);  // each adds up one t
  const int most = most_warps(in_turns(m) ? 1 : m.tokens);
  m.block_tiles = static_cast<int>(std::clamp<int64_t>(shares / kWantedBlocks, 1, most / m.parts));
  return m;
}

template <class X, class F, int kTokens>
void launch_shares(const MatrixProduct& m, void* stream) {
  const int64_t tiles = m.product.last_tile - m.product.first_tile;
  const int warps = m.block_tiles * m.parts;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>((tiles + m.block_tiles - 1) / m.block_tiles * chunks_of(m)));
  config.blockDim = dim3(static_cast<unsigned>(warps * kWarpSize));
  const int places = warps * (in_turns(m) ? 2 : 1);
  config.dynamicSmemBytes = static_cast<size_t>(places) * kTokens * kWarpSize * 16;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda("matrix_product", cudaLaunchKernelEx(&config, matrix_kernel<X, F, kTokens>, m));
}

template <class X, class F>
void launch_format(const MatrixProduct& m, void* stream) {
  m.tokens == 1   ? launch_shares<X, F, 1>(m, stream)
  : m.tokens == 2 ? launch_shares<X, F, 2>(m, stream)
                  : launch_shares<X, F, 4>(m, stream);
}

template <class X, CodeKind kKind>
void launch_bits(const MatrixProduct& m, void* stream) {
  switch (m.product.weight.layout.bits) {
    case 2:
      return launch_format<X, MatrixFormat<2, kKind>>(m, stream);
    case 3:
      return launch_format<X, MatrixFormat<3, kKind>>(m, stream);
    case 4:
      return launch_format<X, MatrixFormat<4, kKind>>(m, stream);
    default:
      return launch_format<X, MatrixFormat<8, kKind>>(m, stream);
  }
}

template <class X>
void launch_matrix_product_of(const MatrixProduct& product, void* stream) {
  const MatrixProduct m = in_shares(product);
  const PackedWeight& w = m.product.weight;
  if (w.levels != nullptr) return launch_format<X, MatrixFormat<4, CodeKind::levels>>(m, stream);
  if constexpr (!std::is_same_v<X, Integers>)  // theirs are added to sums
    if (w.offset != nullptr) return launch_bits<X, CodeKind::offset>(m, stream);
  launch_bits<X, CodeKind::plain>(m, stream);
}

}  // namespace
}  // namespace torchquant
