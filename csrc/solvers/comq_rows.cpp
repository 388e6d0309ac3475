#include <csrc/solvers/comq_rows.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <csrc/core/device.h>
#include <csrc/core/quantization.h>
#include <csrc/solvers/comq.h>

#include <algorithm>
#include <vector>

namespace torchquant::comq {
namespace {

// Coordinates per block: the in-block step grows with it, the products between the blocks need it.
constexpr int64_t kBlock = 64;
constexpr int64_t kWideBlock = 128;  // for K beyond kWideColumns, where the products dominate
constexpr int64_t kWideColumns = 1536;
constexpr float kSettled = 1e-5f;  // relative step of a scale below which it has converged

// [B, n, G] -> [B, n, 1] or [B, n, K], in the order of the columns.
at::Tensor per_column(const Rows& rows, const at::Tensor& grouped) {
  if (rows.group_columns.empty()) return grouped;
  at::Tensor expanded = at::empty_like(rows.weight);
  for (size_t g = 0; g < rows.group_columns.size(); ++g) {
    const at::Tensor& columns = rows.group_columns[g];
    expanded.index_copy_(
        2, columns,
        grouped.narrow(2, g, 1).expand({grouped.size(0), grouped.size(1), columns.numel()}));
  }
  return expanded;
}

RowGrids row_grids(const at::Tensor& scale, const at::Tensor& zero_point, int64_t problem,
                   int64_t first_column, int64_t bits) {
  const int64_t columns = scale.size(2);
  const int64_t offset = problem * scale.size(1) * columns + (columns > 1 ? first_column : 0);
  return {scale.const_data_ptr<float>() + offset, zero_point.const_data_ptr<float>() + offset,
          columns, columns > 1 ? 1 : 0, max_code_of(bits)};
}

at::Tensor values(const Rows& rows, const Solution& s) {
  return s.codes.to(at::kFloat)
      .sub_(per_column(rows, s.zero_point))
      .mul_(per_column(rows, s.scale));
}

// The first sweep in blocks: the in-block step is sequential, everything behind the block gets one
// product.
void sweep_blocks(const Rows& rows, const Options& options, Solution& s) {
  const int64_t B = rows.weight.size(0), n = rows.weight.size(1), K = rows.weight.size(2);
  const int64_t block = options.order == Order::semi ? kComqMaxBlock
                        : K > kWideColumns           ? kWideBlock
                                                     : kBlock;
  const at::Tensor scale = per_column(rows, s.scale), zero_point = per_column(rows, s.zero_point);
  at::Tensor change = at::empty({n * block}, rows.weight.options());
  for (int64_t b = 0; b < B; ++b) {
    const at::Tensor gram = rows.gram.select(0, b);
    at::Tensor gradient = s.gradient.select(0, b);
    for (int64_t first = 0; first < K; first += block) {
      const int64_t width = std::min(block, K - first);
      const int64_t offset = b * n * K + first;
      TORCHQUANT_RUN(
          comq_block, rows.weight,
          (ComqBlock{n, width, rows.weight.const_data_ptr<float>() + offset,
                     gradient.const_data_ptr<float>() + first, K,
                     gram.const_data_ptr<float>() + first * K + first, K,
                     rows.inverse_diagonal.const_data_ptr<float>() + b * K + first,
                     rows.order.defined() ? rows.order.const_data_ptr<int32_t>() + offset : nullptr,
                     first, row_grids(scale, zero_point, b, first, options.bits),
                     s.codes.mutable_data_ptr<uint8_t>() + offset,
                     change.mutable_data_ptr<float>()}));
      const int64_t behind = K - first - width;
      if (behind == 0) continue;
      gradient.narrow(1, first + width, behind)
          .addmm_(change.narrow(0, 0, n * width).view({n, width}),
                  gram.narrow(0, first, width).narrow(1, first + width, behind));
    }
  }
}

void sweep_greedily(const Rows& rows, const Options& options, Solution& s) {
  const int64_t n = rows.weight.size(1), K = rows.weight.size(2);
  const at::Tensor scale = per_column(rows, s.scale), zero_point = per_column(rows, s.zero_point);
  at::Tensor change = at::empty({n, K}, rows.weight.options());
  for (int64_t b = 0; b < rows.weight.size(0); ++b) {
    const int64_t offset = b * n * K;
    TORCHQUANT_RUN(comq_greedy, rows.weight,
                   (ComqGreedy{n, K, rows.weight.const_data_ptr<float>() + offset,
                               s.gradient.const_data_ptr<float>() + offset,
                               rows.gram.const_data_ptr<float>() + b * K * K,
                               rows.inverse_diagonal.const_data_ptr<float>() + b * K,
                               rows.order.const_data_ptr<int32_t>() + offset,
                               row_grids(scale, zero_point, b, 0, options.bits),
                               s.codes.mutable_data_ptr<uint8_t>() + offset,
                               change.mutable_data_ptr<float>()}));
  }
}

bool sweep_changes(const Rows& rows, const Options& options, Solution& s) {
  const int64_t n = rows.weight.size(1), K = rows.weight.size(2);
  const at::Tensor scale = per_column(rows, s.scale), zero_point = per_column(rows, s.zero_point);
  at::Tensor changed = at::zeros({1}, rows.weight.options().dtype(at::kLong));
  for (int64_t b = 0; b < rows.weight.size(0); ++b) {
    const int64_t offset = b * n * K;
    TORCHQUANT_RUN(
        comq_sweep, rows.weight,
        (ComqSweep{n, K, rows.gram.const_data_ptr<float>() + b * K * K,
                   rows.inverse_diagonal.const_data_ptr<float>() + b * K,
                   rows.order.defined() ? rows.order.const_data_ptr<int32_t>() + offset : nullptr,
                   row_grids(scale, zero_point, b, 0, options.bits),
                   s.codes.mutable_data_ptr<uint8_t>() + offset,
                   s.gradient.mutable_data_ptr<float>() + offset,
                   changed.mutable_data_ptr<int64_t>()}));
  }
  return changed.item<int64_t>() > 0;
}

// The exact minimiser over one scale, the rest fixed. With q the group's values, t = q H and the
// factor r on the scale: r - 1 = (q . G) / (q . t), then G -= (r - 1) t. Kept only where numerator
// and denominator of r are positive.
at::Tensor scale_step(const at::Tensor& q, const at::Tensor& gradient, const at::Tensor& t) {
  const at::Tensor down = q.mul(t).sum(-1, true, at::kFloat);
  const at::Tensor up = q.mul(gradient).sum(-1, true, at::kFloat);
  const at::Tensor usable = down.gt(0).logical_and_(up.add(down).gt(0));
  return at::where(usable, up.div(down), at::zeros_like(up));  // r - 1
}

// Returns whether any scale moved by more than kSettled.
bool update_scales(const Rows& rows, const at::Tensor& linear, Solution& s) {
  const at::Tensor q = values(rows, s);
  if (rows.group_columns.empty()) {
    const at::Tensor t = linear - s.gradient;
    const at::Tensor step = scale_step(q, s.gradient, t);
    s.scale.add_(s.scale * step);
    s.gradient.sub_(t.mul_(step));
    return step.abs().max().item<float>() > kSettled;
  }
  at::Tensor largest = at::zeros({}, q.options());  // read back once
  const at::Tensor gram = rows.gram.select(0, 0);
  at::Tensor gradient = s.gradient.select(0, 0);
  for (size_t g = 0; g < rows.group_columns.size(); ++g) {
    const at::Tensor& columns = rows.group_columns[g];
    const at::Tensor q_group = q.select(0, 0).index_select(1, columns);
    at::Tensor t = q_group.mm(gram.index_select(0, columns));  // [n, K]
    const at::Tensor step =
        scale_step(q_group, gradient.index_select(1, columns), t.index_select(1, columns));
    at::Tensor scale = s.scale.select(0, 0).narrow(1, g, 1);
    scale.add_(scale * step);
    gradient.sub_(t.mul_(step));
    largest = at::maximum(largest, step.abs().max());
  }
  return largest.item<float>() > kSettled;
}

// Rows of `candidate` with a lower error replace those of `best`.
void keep_better(const Solution& candidate, const at::Tensor& error, Solution& best,
                 at::Tensor& best_error) {
  const at::Tensor better = error.lt(best_error);  // [B, n, 1]
  best.codes = at::where(better, candidate.codes, best.codes);
  best.scale = at::where(better, candidate.scale, best.scale);
  best_error = at::where(better, error, best_error);
}

// The nearest codes are what a block finds when no channel is alive.
void round_weight(const Rows& rows, const Options& options, Solution& s) {
  Rows dead = rows;
  dead.inverse_diagonal = at::zeros_like(rows.inverse_diagonal);
  dead.order.reset();
  s.gradient = at::zeros_like(rows.weight);
  sweep_blocks(dead, options, s);
}

}  // namespace

Solution solve(const Rows& rows, const Options& options, const Solution& start) {
  const bool plain = options.sweeps == 1 && !options.update_scale && options.shrink.size() == 1 &&
                     !options.from_codes;
  at::Tensor linear = rows.linear,
             residual;  // residual = P - W H: what the target asks beyond the float weight
  if (linear.defined()) residual = linear - at::bmm(rows.weight, rows.gram);
  if (!linear.defined() && !plain) linear = at::bmm(rows.weight, rows.gram);

  Solution best;
  at::Tensor best_error;
  for (const double factor : options.shrink) {
    Solution s{start.codes.clone(), start.scale * factor, start.zero_point, {}};
    if (options.from_rounding) round_weight(rows, options, s);
    if (!options.from_codes) {
      s.gradient = residual.defined() ? residual.clone() : at::zeros_like(rows.weight);
      options.order == Order::greedy ? sweep_greedily(rows, options, s)
                                     : sweep_blocks(rows, options, s);
      if (plain) return s;
    }
    s.gradient = linear - at::bmm(values(rows, s), rows.gram);
    if (options.update_scale && !options.from_codes) update_scales(rows, linear, s);
    for (int64_t sweep = options.from_codes ? 0 : 1; sweep < options.sweeps; ++sweep) {
      const bool changed = sweep_changes(rows, options, s);
      const bool moved = options.update_scale && update_scales(rows, linear, s);
      if (!changed && !moved) break;
    }
    if (options.shrink.size() == 1) return s;
    at::Tensor slope = residual.defined() ? s.gradient + residual : s.gradient;
    const at::Tensor error = slope.mul(rows.weight - values(rows, s))
                                 .sum(-1, true);  // e.(G + P - W H): the objective up to a constant
    if (!best_error.defined()) {
      best = s;
      best_error = error;
    } else {
      keep_better(s, error, best, best_error);
    }
  }
  return best;
}

}  // namespace torchquant::comq
