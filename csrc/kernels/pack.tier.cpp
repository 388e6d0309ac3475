#include <csrc/kernels/pack.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the bit string is written byte by byte");

namespace torchquant::TORCHQUANT_TIER {
namespace {

// Eight codes, one a byte, fill exactly `bits` bytes: a group. A few groups are worked on side by
// side, and each is moved as eight bytes, of which the next group overwrites (or a mask cuts) what
// is not its own. Vectors wider than the tier's would go through memory; 64 bytes are no faster
// than 32, the moves being most of the work.
#ifdef __AVX2__
constexpr int64_t kLanes = 4;
#else
constexpr int64_t kLanes = 2;
#endif
constexpr int64_t kGroup = 8;
constexpr int64_t kBlock = kLanes * kGroup;
using Groups = uint64_t __attribute__((vector_size(8 * kLanes)));
using UnalignedGroups = uint64_t __attribute__((vector_size(8 * kLanes), aligned(1), may_alias));

// Neighbouring codes move together (or apart) in three steps: bytes to pairs in 16 bits, these to
// fours in 32, these to eights in 64.
class Fold {
 public:
  explicit Fold(int64_t bits)
      : bits_(static_cast<int>(bits)),
        code_(low_bits(bits) * 0x0001000100010001ull),
        pair_(low_bits(2 * bits) * 0x0000000100000001ull),
        four_(low_bits(4 * bits)) {}

  // By reference: GCC warns of vectors as results, whose ABI depends on the tier.
  template <class Word>  // uint64_t or Groups
  inline __attribute__((always_inline)) void together(Word& x) const {
    x = (x & code_) | ((x >> (8 - bits_)) & (code_ << bits_));
    x = (x & pair_) | ((x >> (16 - 2 * bits_)) & (pair_ << (2 * bits_)));
    x = (x & four_) | ((x >> (32 - 4 * bits_)) & (four_ << (4 * bits_)));
  }

  template <class Word>
  inline __attribute__((always_inline)) void apart(Word& x) const {
    x = (x & four_) | ((x << (32 - 4 * bits_)) & (four_ << 32));
    x = (x & pair_) | ((x << (16 - 2 * bits_)) & (pair_ << 16));
    x = (x & code_) | ((x << (8 - bits_)) & (code_ << 8));
  }

  uint64_t misfits() const { return ~(code_ | code_ << 8); }  // the bits that no code may have

 private:
  static uint64_t low_bits(int64_t count) { return (uint64_t{1} << count) - 1; }

  int bits_;
  uint64_t code_;  // the lower code of every pair
  uint64_t pair_;  // the lower pair of every four
  uint64_t four_;  // the lower four
};

inline __attribute__((always_inline)) uint64_t load(const uint8_t* bytes, int64_t count) {
  uint64_t x = 0;
  if (count >= 8) {
    __builtin_memcpy(&x, bytes, 8);
  } else {
    for (int64_t i = 0; i < count; ++i) x |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  }
  return x;
}

inline __attribute__((always_inline)) void store(uint64_t x, uint8_t* bytes, int64_t count) {
  if (count >= 8) {
    __builtin_memcpy(bytes, &x, 8);
  } else {
    for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(x >> (8 * i));
  }
}

// Codes of a row that go by whole blocks: the eight bytes of a block's last group end in the row.
int64_t columns_in_blocks(int64_t columns, int64_t bits, int64_t bytes) {
  const int64_t fitting = (bytes - 8 + bits) / (kLanes * bits);
  const int64_t whole = columns / kBlock;
  return (bytes < 8 ? 0 : fitting < whole ? fitting : whole) * kBlock;
}

uint64_t pack_row(const Fold& fold, const PackRows& work, const uint8_t* codes, uint8_t* bytes,
                  int64_t length) {
  const int64_t bits = work.bits, columns = work.columns;
  const int64_t blocks_end = columns_in_blocks(columns, bits, length);
  Groups seen_lanes = {};
  for (int64_t k = 0; k < blocks_end; k += kBlock) {
    Groups x = *reinterpret_cast<const UnalignedGroups*>(codes + k);
    seen_lanes |= x;
    fold.together(x);
    uint8_t* out = bytes + k / kGroup * bits;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint64_t group = x[i];
      __builtin_memcpy(out + i * bits, &group, 8);
    }
  }
  uint64_t seen = 0;
#pragma GCC unroll 4
  for (int64_t i = 0; i < kLanes; ++i) seen |= seen_lanes[i];
  for (int64_t k = blocks_end; k < columns; k += kGroup) {
    const int64_t start = k / kGroup * bits;
    uint64_t x = load(codes + k, columns - k);
    seen |= x;
    fold.together(x);
    store(x, bytes + start, length - start);
  }
  return seen;
}

void unpack_row(const Fold& fold, const UnpackRows& work, const uint8_t* bytes, uint8_t* codes,
                int64_t length) {
  const int64_t bits = work.bits, columns = work.columns;
  const int64_t blocks_end = columns_in_blocks(columns, bits, length);
  for (int64_t k = 0; k < blocks_end; k += kBlock) {
    const uint8_t* in = bytes + k / kGroup * bits;
    Groups x;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLanes; ++i) x[i] = load(in + i * bits, 8);
    fold.apart(x);
    *reinterpret_cast<UnalignedGroups*>(codes + k) = x;
  }
  for (int64_t k = blocks_end; k < columns; k += kGroup) {
    const int64_t start = k / kGroup * bits;
    uint64_t x = load(bytes + start, length - start);
    fold.apart(x);
    store(x, codes + k, columns - k);
  }
}

}  // namespace

void pack_rows(const PackRows& work) {
  const Fold fold(work.bits);
  const int64_t words = packed_words(work.columns, work.bits);
  if (words == 0) return;
  for (int64_t n = 0; n < work.rows; ++n) {
    uint32_t* const row = work.words + n * words;
    row[words - 1] = 0;  // its last bytes may belong to no code
    const uint64_t seen = pack_row(fold, work, work.codes + n * work.columns,
                                   reinterpret_cast<uint8_t*>(row), 4 * words);
    *work.misfits += (seen & fold.misfits()) != 0;
  }
}

void unpack_rows(const UnpackRows& work) {
  const Fold fold(work.bits);
  const int64_t words = packed_words(work.columns, work.bits);
  for (int64_t n = 0; n < work.rows; ++n) {
    unpack_row(fold, work, reinterpret_cast<const uint8_t*>(work.words + n * words),
               work.codes + n * work.columns, 4 * words);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
