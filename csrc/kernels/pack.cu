#include <csrc/kernels/pack.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

constexpr int64_t kSlice = 256;  // words or fours of a row for one warp: long rows keep many busy
constexpr int64_t kFour = 4;     // codes that a lane unpacks at once: its store is a whole word

inline __host__ __device__ int64_t slices_of(int64_t length) {
  return (length + kSlice - 1) / kSlice;
}

// Calls visit(row, i) for every element i < length of every row, neighbours in neighbouring lanes.
template <class Visit>
__device__ void for_each_element(int64_t rows, int64_t length, const Visit& visit) {
  const int64_t slices = slices_of(length);
  for (int64_t slice = first_row(); slice < rows * slices; slice += row_step()) {
    const int64_t start = slice % slices * kSlice;
    const int64_t end = start + kSlice < length ? start + kSlice : length;
    for (int64_t i = start + warp_lane(); i < end; i += kWarpSize) visit(slice / slices, i);
  }
}

// A lane collects the codes that touch its word.
__global__ void pack_kernel(const PackRows work) {
  const int64_t bits = work.bits, words = packed_words(work.columns, bits);
  for_each_element(work.rows, words, [&](int64_t row, int64_t word) {
    const uint8_t* const codes = work.codes + row * work.columns;
    const int64_t first_bit = 32 * word;
    uint32_t packed = 0, seen = 0;
    for (int64_t k = first_bit / bits; k < work.columns && k * bits < first_bit + 32; ++k) {
      const uint32_t code = codes[k];
      const int shift = static_cast<int>(k * bits - first_bit);  // below 0: begins a word earlier
      packed |= shift < 0 ? code >> -shift : code << shift;
      seen |= code;
    }
    work.words[row * words + word] = packed;
    if (seen >> bits != 0) atomicAdd(work.misfits, 1ull);
  });
}

// Four codes lie in two words at most.
__global__ void unpack_kernel(const UnpackRows work) {
  const int64_t bits = work.bits, columns = work.columns, words = packed_words(columns, bits);
  const uint32_t mask = (1u << bits) - 1;
  for_each_element(work.rows, (columns + kFour - 1) / kFour, [&](int64_t row, int64_t four) {
    const int64_t first = four * kFour, word = first * bits / 32;
    const uint32_t* const packed = work.words + row * words;
    uint64_t window = packed[word];
    if (word + 1 < words) window |= static_cast<uint64_t>(packed[word + 1]) << 32;
    window >>= first * bits % 32;
    uint8_t* const codes = work.codes + row * columns + first;
    uint32_t whole = 0;
    for (int i = 0; i < kFour; ++i) {
      whole |= (static_cast<uint32_t>(window >> (i * bits)) & mask) << (8 * i);
    }
    if (columns % kFour == 0) {
      *reinterpret_cast<uint32_t*>(codes) = whole;
    } else {
      for (int i = 0; i < kFour && first + i < columns; ++i) {
        codes[i] = static_cast<uint8_t>(whole >> (8 * i));
      }
    }
  });
}

}  // namespace

void launch_pack_rows(const PackRows& work, void* stream) {
  launch_rows("pack_rows", pack_kernel, work,
              work.rows * slices_of(packed_words(work.columns, work.bits)), stream);
}

void launch_unpack_rows(const UnpackRows& work, void* stream) {
  launch_rows("unpack_rows", unpack_kernel, work,
              work.rows * slices_of((work.columns + kFour - 1) / kFour), stream);
}

}  // namespace torchquant
