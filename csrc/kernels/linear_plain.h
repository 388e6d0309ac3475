// Products of the usual kinds, known when the loop from sums to outputs is compiled.
#pragma once
#include <csrc/kernels/linear.h>

namespace torchquant {
namespace {

template <auto kValue>
struct Known {
  static constexpr auto value = kValue;
};

template <class Take>
inline __attribute__((always_inline)) void with_bool(bool value, const Take& take) {
  value ? take(Known<true>()) : take(Known<false>());
}

enum class Zeros { none, one, of_rows };  // zero points of activations

// Nothing but what the names of Plain say, activation functions, and what is added to values.
inline bool is_plain(const PackedProduct& p) {
  return p.codes == nullptr || (p.residual == nullptr && p.code_reciprocal != nullptr);
}

// What of a product is known when its last loop is compiled.
template <bool kOffset, Zeros kZeros, bool kCodes, bool kOneGroup>
struct Plain {
  static constexpr bool kPlain = true;
  static void know(PackedProduct& p) {
    if (kOneGroup) p.weight.layout.groups = 1;
    know_pointer<kOffset>(p.weight.offset);
    if (kCodes) p.residual = nullptr;
    p.one_grid = kZeros != Zeros::of_rows;
    know_pointer<kZeros != Zeros::none>(p.a_zero);
    know_pointer<kCodes>(p.codes);
    know_pointer<kCodes>(p.code_reciprocal);
  }

 private:
  template <bool kThere, class T>
  static void know_pointer(T*& pointer) {
    if (!kThere) {
      pointer = nullptr;
    } else if (pointer == nullptr) {
      __builtin_unreachable();
    }
  }
};

struct Anything {
  static constexpr bool kPlain = false;
  static void know(const PackedProduct&) {}
};

template <class Take>
inline __attribute__((always_inline)) void with_zeros(const PackedProduct& p, const Take& take) {
  if (p.a_zero == nullptr) return take(Known<Zeros::none>());
  p.one_grid ? take(Known<Zeros::one>()) : take(Known<Zeros::of_rows>());
}

// take(what is known of p).
template <class Take>
inline __attribute__((always_inline)) void with_plain(const PackedProduct& p, const Take& take) {
  if (!is_plain(p)) return take(Anything());
  with_bool(p.weight.offset != nullptr, [&](auto offset) {
    with_zeros(p, [&](auto zeros) {
      with_bool(p.codes != nullptr, [&](auto codes) {
        with_bool(p.weight.layout.groups == 1, [&](auto one_group) {
          take(Plain<decltype(offset)::value, decltype(zeros)::value, decltype(codes)::value,
                     decltype(one_group)::value>());
        });
      });
    });
  });
}

}  // namespace
}  // namespace torchquant
