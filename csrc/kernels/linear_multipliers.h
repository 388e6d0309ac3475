// Which scales are integer multiples of one unit for each row: Note [integer groups].
#pragma once
#include <csrc/kernels/linear.h>

namespace torchquant {

// Of one row's groups.
struct GroupScales {
  const float* scale;
  const float* zero_point;  // or null: 2^(bits - 1)
  int64_t groups;
  int64_t bits;
};

// Multipliers up to which (u - zero_point) * m fits in a byte with sign for every u; -1: for none.
int64_t multiplier_limit(int64_t bits, float zero_point);

// Finds the largest unit and integers m within their limits with scale[g] == unit * m[g], as
// float32 rounds the product. False where there is none.
bool find_multipliers(const GroupScales& row, float& unit, uint8_t* multipliers);

// Rows of a grid, behind all others: units, and multipliers as bytes; zeros where there are none.
// Room for them depends on shapes alone. Groups are whole blocks, so that spans of them are
// contiguous, and no longer than a span of 16-bit activations.
inline int64_t multiplier_rows(const BlockLayout& layout, int64_t group_size, bool levels) {
  const bool room = layout.bits <= 4 && !levels && layout.groups > 1 && group_size > 0 &&
                    group_size % kBlockInputs == 0 && group_size <= kWideSpan;
  return room ? 1 + (layout.groups + 3) / 4 : 0;
}

}  // namespace torchquant
