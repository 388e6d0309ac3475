// Packed linear layers on tensor cores: codes become fragments in registers.
//
// Lane 4 * g + c of a warp holds of a tile the outputs 2 * g and 2 * g + 1, of each block the
// inputs 8 * c to 8 * c + 7, and of the rows row g: weights and rows are read as they lie (Note
// [weight tiles] of linear.h), 8 bytes of a line and 8 inputs of a row by one load.
#pragma once
#include <algorithm>
#include <csrc/kernels/linear_mma_rows.cuh>
#include <type_traits>

namespace torchquant {
namespace {

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

// One warp's share. Blocks are multiplied in steps: of kStep blocks where these lie in one group,
// else of one. Codes are loaded a ring of steps ahead, rows a batch of blocks.
template <class X, class F, int kTokens, int kTiles>
struct MatrixWarp {
  using Sum = typename X::Sum;
  using Row = typename X::Row;
  using Lines = typename F::Lines;
  using Group = typename X::template Group<F, kTokens>;
  static constexpr int kFragments = kTokens * kTiles;  // of sums, four in a lane

  // Of a ring, at most: as many as a lane has registers for.
  static constexpr int kRingBlocks = std::min((kFragments < 8 ? 32 : 16) / (F::kWords * kTiles), 8);
  static constexpr int kStep = std::min(kRingBlocks / 2, kShareBlocks);
  static constexpr int kBatch = kTokens == 1 && kStep > 1 ? 2 : 1;

  const MatrixProduct& m;
  const PackedWeight& w;
  const int lane, part;
  const int64_t first_tile, first_row;
  const int groups, group_blocks;
  const int stride;  // from one of the part's groups to the next
  const float origin;
  int begin, end;  // blocks
  int group;       // in work
  F formats[F::kLevels ? kTiles : 1];
  const uint8_t* codes[kTiles];
  const uint8_t* rows[kTokens];
  Group now[kTiles], next[kTiles];
  Sum sums[kFragments][4] = {};
  float values[kFragments][4] = {};
  float total[4] = {};  // of parts that take turns

  __device__ MatrixWarp(const MatrixProduct& product, int64_t its_tile, int its_part,
                        int64_t its_row)
      : m(product),
        w(product.product.weight),
        lane(warp_lane()),
        part(its_part),
        first_tile(its_tile),
        first_row(its_row),
        groups(static_cast<int>(w.layout.groups)),
        group_blocks(static_cast<int>(w.layout.group_blocks)),
        stride(X::kInOrder && in_turns(product) ? product.parts : 1),
        origin(static_cast<float>(w.origin)) {
    const int blocks = static_cast<int>(w.layout.blocks);
    const int share = static_cast<int>(padded((blocks + m.parts - 1) / m.parts, kShareBlocks));
    const int length = stride > 1 ? group_blocks : share;
    begin = part * length < blocks ? part * length : blocks;
    end = begin + length < blocks && stride == 1 ? begin + length : blocks;
    group = begin / group_blocks;
    for (int n = 0; n < kTiles; ++n) {
      if (n == 0 || F::kLevels) formats[n] = F(w, tile(n), lane);
      codes[n] = w.packed + tile(n) * w.layout.blocks * F::kBlockBytes + formats[0].place();
      load_group(group, n, now[n]);
      load_group(group + stride, n, next[n]);
    }
    for (int t = 0; t < kTokens; ++t) {  // rows behind the last one repeat it
      const int64_t row = first_row + t * kRowsAtOnce + lane / 4;
      const int64_t at = (row < m.product.rows ? row : m.product.rows - 1) * m.row_inputs;
      rows[t] =
          static_cast<const uint8_t*>(m.x.data) + at * (sizeof(Row) / 8) + lane % 4 * sizeof(Row);
    }
  }

  // A warp without a tile repeats the last one, and stores the same.
  __device__ int64_t tile(int n) const {
    const int64_t last = m.product.last_tile - 1;
    return first_tile + n < last ? first_tile + n : last;
  }
  __device__ int64_t output(int n) const { return tile(n) * kTileOutputs + lane / 4 * 2; }
  __device__ int64_t row_of(int t, int i) const {
    return first_row + t * kRowsAtOnce + lane % 4 * 2 + i % 2;
  }
  __device__ void load_group(int g, int n, Group& to) const {
    to.load(m.product, g < groups ? g : groups - 1, output(n), row_of(0, 0));
  }

  template <int N>
  __device__ void load_codes(int first, Lines (&lines)[kTiles][N]) const {
    if (first + N > end) return;
    for (int n = 0; n < kTiles; ++n) {
      const uint8_t* const from = codes[n] + int64_t{first} * F::kBlockBytes;
      for (int i = 0; i < N; ++i) formats[0].load(from + i * F::kBlockBytes, lines[n][i]);
    }
  }

  template <int N>
  __device__ void load_rows(int first, Row (&x)[N][kTokens]) const {
    constexpr int kBytes = sizeof(Row) * 4;  // of a block
    if (first + N > end) return;
    for (int t = 0; t < kTokens; ++t) {
      const uint8_t* const from = rows[t] + int64_t{first} * kBytes;
      for (int i = 0; i < N; ++i) x[i][t] = load_words<sizeof(Row) / 4>(from + i * kBytes);
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
  __device__ Step after(Step step) const {
    step.first += N;
    if (step.first >= step.last) {
      if (stride > 1) step.first += (stride - 1) * group_blocks;
      step.last += stride * group_blocks;
    }
    return step;
  }

  template <int N>
  __device__ void multiply_in_steps() {
    constexpr int kRows = kBatch < N ? kBatch : N, kRing = kRingBlocks / N;
    static_assert(kRingBlocks / kRows % 2 == 0);  // x takes turns
    Lines lines[kRing][kTiles][N];
    Row x[2][kRows][kTokens];
    Step step{begin, (group + 1) * group_blocks}, ahead = step;
    load_rows(step.first, x[0]);
    for (int a = 0; a < kRing; ++a, ahead = after<N>(ahead)) load_codes(ahead.first, lines[a]);
    while (step.first + N <= end) {
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int a = 0; a < kRing; ++a) {
        if (step.first + N > end) break;
        const Step following = after<N>(step);
#ifdef __CUDACC__
#pragma unroll
#endif
        for (int i = 0; i < N; i += kRows) {
          const int batch = a * (N / kRows) + i / kRows;
          load_rows(i + kRows < N ? step.first + i + kRows : following.first, x[(batch + 1) % 2]);
          for (int j = 0; j < kRows; ++j) multiply_block(lines[a], i + j, x[batch % 2][j]);
        }
        load_codes(ahead.first, lines[a]);
        ahead = after<N>(ahead);
        if (groups > 1 && (step.first + N >= step.last || step.first + N >= end)) end_group();
        step = following;
      }
    }
    if (step.first < end) multiply_rest(step.first);
  }

  // Blocks from `first` on, fewer than a step.
  __device__ void multiply_rest(int first) {
    for (; first < end; ++first) {
      Lines lines[kTiles][1];
      Row x[1][kTokens];
      load_codes(first, lines);
      load_rows(first, x);
      multiply_block(lines, 0, x[0]);
    }
    if (groups > 1) end_group();
  }

  template <int N>
  __device__ void multiply_block(const Lines (&lines)[kTiles][N], int i, const Row (&x)[kTokens]) {
    Row arranged[kTokens];
    for (int t = 0; t < kTokens; ++t) arranged[t] = X::arranged(x[t]);
    for (int n = 0; n < kTiles; ++n) {
      const F& format = formats[F::kLevels ? n : 0];
      const typename X::Weights weights = X::weights(format, lines[n][i], origin, now[n]);
      for (int t = 0; t < kTokens; ++t) X::multiply(sums[n * kTokens + t], weights, arranged[t]);
    }
  }

  __device__ void end_group() {
    const bool first = group == 0 || stride > 1;
    for (int f = 0; f < kFragments; ++f) {
      for (int i = 0; i < 4; ++i) {
        const Group& own = now[f / kTokens];
        values[f][i] = own.added(m.product, f % kTokens, i, sums[f][i], first, values[f][i]);
        sums[f][i] = 0;
      }
    }
    if constexpr (X::kInOrder)
      if (stride > 1) take_turns();
    group += stride;
    for (int n = 0; n < kTiles; ++n) {
      now[n] = next[n];
      load_group(group + stride, n, next[n]);
    }
  }

  // Part f adds the fragment f that all parts have from their group, in the order of the groups.
  // Two places serve in turn: none is written before all parts have read what it held.
  __device__ void take_turns() {
    const int turn = group / stride, place = turn % 2 * (static_cast<int>(blockDim.x) / kWarpSize);
    leave(values, place);
    if (part >= kFragments) return;
    for (int other = 0; other < stride && turn * stride + other < groups; ++other) {
      float numbers[4];
      read(numbers, place - part + other, part);
      for (int i = 0; i < 4; ++i) total[i] = turn + other == 0 ? numbers[i] : total[i] + numbers[i];
    }
  }

  __device__ void finish(int f, const float (&value)[4]) const {
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row_of(f % kTokens, i), at = output(f / kTokens) + i / 2;
      if (row < m.product.rows && at < w.outputs) finish_output(m, row, at, value[i]);
    }
  }

  // Four numbers of every lane and fragment, in shared memory. Places are counted from the warp's.
  __device__ static LineWords<4>& meeting_place(int place, int f) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    return reinterpret_cast<LineWords<4>*>(
        warp_buffers)[((warp + place) * kFragments + f) * kWarpSize + warp_lane()];
  }
  template <class N>
  __device__ static void leave(const N (&own)[kFragments][4], int place) {
    for (int f = 0; f < kFragments; ++f) {
      LineWords<4> words;
      memcpy(&words, own[f], sizeof(words));
      meeting_place(place, f) = words;
    }
    __syncthreads();
  }
  template <class N>
  __device__ static void read(N (&numbers)[4], int place, int f) {
    const LineWords<4> words = meeting_place(place, f);
    memcpy(numbers, &words, sizeof(words));
  }

  // Numbers of all parts, added in their order; each part does so for its share of them.
  template <class N, class Use>
  __device__ void meet(const N (&own)[kFragments][4], const Use& use) const {
    leave(own, 0);
    for (int f = part; f < kFragments; f += m.parts) {
      N sum[4] = {};
      for (int other = 0; other < m.parts; ++other) {
        N numbers[4];
        read(numbers, other - part, f);
        for (int i = 0; i < 4; ++i) sum[i] = other == 0 ? numbers[i] : sum[i] + numbers[i];
      }
      use(f, sum);
    }
  }

  __device__ void finish_all() {
    if (stride > 1) {
      if (group < static_cast<int>(padded(groups, stride))) take_turns();  // without a group
      if (part < kFragments) finish(part, total);
    } else if (groups > 1) {
      meet(values, [this](int f, const float (&value)[4]) { finish(f, value); });
    } else {
      meet(sums, [this](int f, const Sum(&sum)[4]) {
        typename X::template Group<F, 1> only;
        only.load(m.product, 0, output(f / kTokens), row_of(f % kTokens, 0));
        float value[4];
        for (int i = 0; i < 4; ++i) value[i] = only.added(m.product, 0, i, sum[i], true, 0.0f);
        finish(f, value);
      });
    }
  }
};

template <class X, class F, int kTokens, int kTiles>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, blocks_of_sm(kTokens))
    matrix_kernel(const MatrixProduct m) {
  constexpr int kRows = kTokens * kRowsAtOnce;
  const auto chunks = static_cast<unsigned>((m.product.rows + kRows - 1) / kRows);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t share = int64_t{blockIdx.x / chunks} * m.block_tiles + warp / m.parts;
  MatrixWarp<X, F, kTokens, kTiles> own(m, m.product.first_tile + share * kTiles, warp % m.parts,
                                        int64_t{blockIdx.x % chunks} * kRows);
  own.multiply();
  own.finish_all();
}

template <class X, class F, int kTokens, int kTiles>
void launch_shares(const MatrixProduct& m, void* stream) {
  const int64_t tiles = m.product.last_tile - m.product.first_tile;
  const int64_t shares = (tiles + kTiles - 1) / kTiles;
  const int warps = m.block_tiles * m.parts;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>((shares + m.block_tiles - 1) / m.block_tiles * chunks_of(m)));
  config.blockDim = dim3(static_cast<unsigned>(warps * kWarpSize));
  const int places = warps * (in_turns(m) ? 2 : 1);
  config.dynamicSmemBytes = static_cast<size_t>(places) * kTokens * kTiles * kWarpSize * 16;
  config.stream = static_cast<cudaStream_t>(stream);
  const auto kernel = matrix_kernel<X, F, kTokens, kTiles>;
  if (config.dynamicSmemBytes > kSharedBytesPerBlock)
    check_cuda("matrix_product",
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(config.dynamicSmemBytes)));
  check_cuda("matrix_product", cudaLaunchKernelEx(&config, kernel, m));
}

template <class X, class F, int kTokens>
void launch_tokens(const MatrixProduct& m, void* stream) {
  if constexpr (takes_two_tiles(kTokens, F::kWords > 2))
    if (m.tiles == 2) return launch_shares<X, F, kTokens, 2>(m, stream);
  launch_shares<X, F, kTokens, 1>(m, stream);
}

template <class X, class F>
void launch_format(const MatrixProduct& m, void* stream) {
  m.tokens == 1   ? launch_tokens<X, F, 1>(m, stream)
  : m.tokens == 2 ? launch_tokens<X, F, 2>(m, stream)
                  : launch_tokens<X, F, 4>(m, stream);
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
