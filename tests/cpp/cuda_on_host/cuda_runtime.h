// Stands in for <cuda_runtime.h> so that the kernels' own source runs on a machine without a GPU:
// the 32 lanes of a warp are fibers that meet at every warp operation. It knows what csrc/**/*.cu
// use and nothing more; the warps of a block run one after another, each up to the next
// __syncthreads. What it checks: all lanes meet at the same operation, and launches stay within a
// GPU's limits.
#pragma once
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace torchquant {
extern float warp_buffers[];
}

namespace cuda_on_host {

constexpr unsigned kLanes = 32;
constexpr unsigned kWarps = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSharedBytes = 96 << 10;
inline bool reversed =
    false;  // the order in which lanes run between two meetings: a race shows as a difference
inline size_t allowed_shared = 48 << 10;

// One warp: runs body() in every lane; lanes wait for each other in meet().
class Warp {
 public:
  static constexpr const char* kBlockMeets = "__syncthreads";

  void start(unsigned first_thread, const std::function<void()>& body) {
    static_assert(sizeof(uintptr_t) == 8);
    first_thread_ = first_thread;
    body_ = &body;
    round_ = 0;
    for (Lane& lane : lanes_) start(lane);
  }

  // Until all lanes are done, or wait for the other warps of the block: whether they do.
  bool run() {
    current_warp = this;
    while (!all_done()) {
      for (unsigned i = 0; i < kLanes; ++i) resume(reversed ? kLanes - 1 - i : i);
      check_together();
      ++round_;
      if (std::string_view(lanes_[0].operation) == kBlockMeets) return true;
    }
    return false;
  }

  // Leaves a value, waits for every lane, returns what all of them left.
  template <class T>
  std::array<T, kLanes> meet(const char* operation, T value) {
    auto& bank =
        banks_[round_ %
               2];  // the next meeting uses the other bank: a slow reader still finds its values
    std::memcpy(&bank[current_], &value, sizeof(T));
    Lane& lane = lanes_[current_];
    lane.operation = operation;
    swapcontext(&lane.context, &scheduler_);
    std::array<T, kLanes> values;
    for (unsigned l = 0; l < kLanes; ++l) std::memcpy(&values[l], &bank[l], sizeof(T));
    return values;
  }

  unsigned lane() const { return current_; }
  static Warp& current() { return *current_warp; }

 private:
  struct Lane {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStackBytes);
    const char* operation;
    bool done;
  };

  static void enter() {
    Warp& warp = current();
    (*warp.body_)();
    warp.lanes_[warp.current_].done = true;
  }

  void start(Lane& lane) {
    lane.done = false;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = kStackBytes;
    lane.context.uc_link = &scheduler_;
    makecontext(&lane.context, &Warp::enter, 0);
  }

  void resume(unsigned l) {
    if (lanes_[l].done) return;
    current_ = l;
    threadIdx.x = first_thread_ + l;
    lanes_[l].operation = "the end";
    swapcontext(&scheduler_, &lanes_[l].context);
  }

  bool all_done() const {
    for (const Lane& lane : lanes_) {
      if (!lane.done) return false;
    }
    return true;
  }

  void check_together() const {
    for (const Lane& lane : lanes_) {
      if (lane.done == lanes_[0].done && std::string_view(lane.operation) == lanes_[0].operation)
        continue;
      throw std::logic_error(std::string("lanes of a warp wait for each other at ") +
                             lane.operation + " and at " + lanes_[0].operation);
    }
  }

  static inline Warp* current_warp = nullptr;

  std::array<Lane, kLanes> lanes_;
  std::array<std::array<uint64_t, kLanes>, 2> banks_;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
  unsigned first_thread_ = 0;
  unsigned current_ = 0;
  uint64_t round_ = 0;
};

inline void run_block(unsigned threads, const std::function<void()>& body) {
  static std::vector<Warp> warps(kWarps);
  const unsigned count = threads / kLanes;
  for (unsigned w = 0; w < count; ++w) warps[w].start(w * kLanes, body);
  for (bool waiting = true; waiting;) {
    unsigned waits = 0;
    for (unsigned w = 0; w < count; ++w) waits += warps[w].run() ? 1 : 0;
    if (waits != 0 && waits != count)
      throw std::logic_error("some warps of a block wait for others that have ended");
    waiting = waits != 0;
  }
}

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) throw std::logic_error("only whole warps meet");
}

}  // namespace cuda_on_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  cuda_on_host::check_mask(mask);
  auto& warp = cuda_on_host::Warp::current();
  const unsigned lane = warp.lane();
  return warp.meet("__shfl_sync", value)[lane / width * width + source % width];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  cuda_on_host::check_mask(mask);
  auto& warp = cuda_on_host::Warp::current();
  const unsigned lane = warp.lane();
  return warp.meet("__shfl_xor_sync", value)[lane ^ distance];
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  cuda_on_host::check_mask(mask);
  const auto predicates = cuda_on_host::Warp::current().meet("__ballot_sync", predicate);
  unsigned bits = 0;
  for (unsigned l = 0; l < predicates.size(); ++l)
    bits |= static_cast<unsigned>(predicates[l]) << l;
  return bits;
}

inline void __syncthreads() {
  cuda_on_host::Warp::current().meet(cuda_on_host::Warp::kBlockMeets, 0);
}
inline void __syncwarp() { cuda_on_host::Warp::current().meet("__syncwarp", 0); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __ldg(const float* p) { return *p; }

// Byte by byte as the instructions do it: bytes of four bits' selectors (no repeated signs), and
// sums of products that wrap.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selectors) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = selectors >> (4 * i) & 15;
    if (byte > 7) throw std::logic_error("__byte_perm: a selector is above 7");
    result |= static_cast<unsigned>(bytes >> (8 * byte) & 255) << (8 * i);
  }
  return result;
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, int shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

namespace cuda_on_host {

inline int dot_of_two(int a, int b, int first_byte, int sum) {
  auto total = static_cast<uint32_t>(sum);
  for (int i = 0; i < 2; ++i) {
    const int x = static_cast<int16_t>(static_cast<uint32_t>(a) >> (16 * i));
    const int y = static_cast<int8_t>(static_cast<uint32_t>(b) >> (8 * (first_byte + i)));
    total += static_cast<uint32_t>(x * y);
  }
  return static_cast<int>(total);
}

}  // namespace cuda_on_host

inline int __dp2a_lo(int a, int b, int sum) { return cuda_on_host::dot_of_two(a, b, 0, sum); }
inline int __dp2a_hi(int a, int b, int sum) { return cuda_on_host::dot_of_two(a, b, 2, sum); }

// csrc/core/mma.cuh.
namespace cuda_on_host {

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// A type's numbers in words: `kCount` in each, read(word, i), and pairs of them written.
struct Float16s {
  static constexpr int kCount = 2;
  static float read(uint32_t word, int i) {
    const auto bits = static_cast<uint16_t>(word >> (16 * i));
    _Float16 x;
    std::memcpy(&x, &bits, sizeof(x));
    return static_cast<float>(x);
  }
  static uint32_t write(float low, float high) {
    const _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
    uint32_t word;
    std::memcpy(&word, pair, sizeof(word));
    return word;
  }
};

struct BFloat16s {
  static constexpr int kCount = 2;
  static float read(uint32_t word, int i) { return float_of(word >> (16 * i) << 16); }
  static uint32_t write(float low, float high) { return rounded(low) | rounded(high) << 16; }
  static uint32_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};

struct Int8s {
  static constexpr int kCount = 4;
  static int32_t read(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }
};

template <class T>
uint32_t fused_pairs(uint32_t a, uint32_t b, uint32_t c) {
  float d[2];
  for (int i = 0; i < 2; ++i) d[i] = std::fma(T::read(a, i), T::read(b, i), T::read(c, i));
  return T::write(d[0], d[1]);
}

template <class T, class Sum>
void multiply_matrices(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& warp = Warp::current();
  const auto joined = [](uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; };
  const std::array<std::array<uint64_t, kLanes>, 3> words = {
      warp.meet("mma, rows g", joined(a[0], a[2])),
      warp.meet("mma, rows g + 8", joined(a[1], a[3])), warp.meet("mma, columns", joined(b0, b1))};
  const unsigned g = warp.lane() / 4, c = warp.lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned source = 0; source < 4; ++source) {
      const uint64_t row = words[i / 2][4 * g + source];
      const uint64_t column = words[2][4 * (2 * c + i % 2) + source];
      for (int half = 0; half < 2; ++half)
        for (int j = 0; j < T::kCount; ++j)
          d[i] += T::read(static_cast<uint32_t>(row >> (32 * half)), j) *
                  T::read(static_cast<uint32_t>(column >> (32 * half)), j);
    }
  }
}

}  // namespace cuda_on_host

namespace torchquant {

using Word = uint32_t;
inline void mma_f16(float (&d)[4], const Word (&a)[4], Word b0, Word b1) {
  cuda_on_host::multiply_matrices<cuda_on_host::Float16s>(d, a, b0, b1);
}
inline void mma_bf16(float (&d)[4], const Word (&a)[4], Word b0, Word b1) {
  cuda_on_host::multiply_matrices<cuda_on_host::BFloat16s>(d, a, b0, b1);
}
inline void mma_s8(int32_t (&d)[4], const Word (&a)[4], Word b0, Word b1) {
  cuda_on_host::multiply_matrices<cuda_on_host::Int8s>(d, a, b0, b1);
}
inline Word fma_f16x2(Word a, Word b, Word c) {
  return cuda_on_host::fused_pairs<cuda_on_host::Float16s>(a, b, c);
}
inline Word fma_bf16x2(Word a, Word b, Word c) {
  return cuda_on_host::fused_pairs<cuda_on_host::BFloat16s>(a, b, c);
}
inline Word and_or(Word a, Word mask, Word base) { return (a & mask) | base; }
inline Word pair_f16(float low, float high) { return cuda_on_host::Float16s::write(low, high); }
inline Word pair_bf16(float low, float high) { return cuda_on_host::BFloat16s::write(low, high); }
inline float float_of_f16(uint16_t half) { return cuda_on_host::Float16s::read(half, 0); }

}  // namespace torchquant

inline int atomicAdd(int* p, int x) { return (*p += x) - x; }
inline unsigned atomicMax(unsigned* p, unsigned x) {
  const unsigned before = *p;
  *p = before > x ? before : x;
  return before;
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  return (*p += x) - x;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  if (bytes > static_cast<int>(cuda_on_host::kSharedBytes)) return cudaErrorInvalidValue;
  cuda_on_host::allowed_shared = bytes;
  return cudaSuccess;
}

template <class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument),
                               const Argument& argument) {
  if (config->gridDim.x == 0 || config->gridDim.x > (1u << 31) - 1) return cudaErrorInvalidValue;
  if (config->blockDim.x == 0 || config->blockDim.x > 1024 ||
      config->blockDim.x % cuda_on_host::kLanes != 0)
    return cudaErrorInvalidValue;
  if (config->dynamicSmemBytes > cuda_on_host::allowed_shared) return cudaErrorInvalidValue;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (size_t i = 0; i < config->dynamicSmemBytes / sizeof(float); ++i) {
      torchquant::warp_buffers[i] =
          std::numeric_limits<float>::quiet_NaN();  // nobody may rely on what was there
    }
    cuda_on_host::run_block(blockDim.x, [&] { kernel(argument); });
  }
  return cudaSuccess;
}
