#include <csrc/solvers/gptq.h>

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/damped_factor.h>
#include <csrc/core/device.h>
#include <csrc/core/gram_problem.h>
#include <csrc/core/permute.h>
#include <csrc/core/quantization.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

// Shapes: B Grams (1, or one per group of a grouped convolution), n rows each, K inputs, G groups
// of columns with one scale each.

namespace torchquant {
namespace {

constexpr int64_t kRowsPerChunk = 96;  // rows per task: a multiple of gptq_block's row lanes
constexpr double kDefaultShrink[] = {1.0, 0.9, 0.8, 0.65, 0.5};

struct Rows {
  at::Tensor weight;    // [B, n, K], columns in visiting order
  at::Tensor upper;     // [B, K, K]
  at::Tensor damping;   // [B, 1, 1]
  at::Tensor group_of;  // int64 [K] group of each column, undefined for one group
  int64_t bits;
  int64_t block_size;
};

struct Solution {
  at::Tensor codes;       // uint8 [B, n, K]
  at::Tensor scale;       // [B, n, G]
  at::Tensor zero_point;  // [B, n, G]
};

at::Tensor per_column(const Rows& rows, const at::Tensor& grouped) {  // [B, n, G] -> [B, n, 1 or K]
  return rows.group_of.defined() ? grouped.index_select(2, rows.group_of) : grouped;
}

// Rounds all columns; returns the objective [B, n, 1] under the damped Gram.
at::Tensor sweep(const Rows& rows, Solution& s) {
  const int64_t B = rows.weight.size(0), n = rows.weight.size(1), K = rows.weight.size(2);
  const at::Tensor scale = per_column(rows, s.scale).contiguous(),
                   zero_point = per_column(rows, s.zero_point).contiguous();
  const int64_t grid_columns = scale.size(2);
  const at::Tensor weight = rows.weight.clone();
  const at::Tensor objective = at::zeros({B, n, 1}, weight.options());
  const at::Tensor change = at::empty({n * rows.block_size}, weight.options());
  for (int64_t b = 0; b < B; ++b) {
    const at::Tensor upper = rows.upper.select(0, b);
    for (int64_t first = 0; first < K; first += rows.block_size) {
      const int64_t width = std::min(rows.block_size, K - first), offset = b * n * K + first;
      const int64_t grid = b * n * grid_columns + (grid_columns > 1 ? first : 0);
      TORCHQUANT_RUN(
          gptq_block, weight,
          (GptqBlock{n, width, weight.const_data_ptr<float>() + offset, K,
                     upper.const_data_ptr<float>() + first * K + first, K,
                     scale.const_data_ptr<float>() + grid,
                     zero_point.const_data_ptr<float>() + grid, grid_columns,
                     grid_columns > 1 ? 1 : 0, max_code_of(rows.bits),
                     s.codes.mutable_data_ptr<uint8_t>() + offset, change.mutable_data_ptr<float>(),
                     objective.mutable_data_ptr<float>() + b * n}));
      const int64_t behind = K - first - width;
      if (behind == 0) continue;
      weight.select(0, b)
          .narrow(1, first + width, behind)
          .addmm_(change.narrow(0, 0, n * width).view({n, width}),
                  upper.narrow(0, first, width).narrow(1, first + width, behind));
    }
  }
  return objective;
}

// The objective under the Gram itself: the damping's share is taken out again.
at::Tensor undamped(const Rows& rows, const Solution& s, const at::Tensor& objective) {
  const at::Tensor error = s.codes.to(at::kFloat)
                               .sub_(per_column(rows, s.zero_point))
                               .mul_(per_column(rows, s.scale))
                               .sub_(rows.weight);
  return objective - error.square_().sum(-1, true).mul_(rows.damping);
}

Solution solve(const Rows& rows, const std::vector<double>& shrink, const Solution& start) {
  Solution best;
  at::Tensor best_objective;
  for (const double factor : shrink) {
    Solution s{at::empty(rows.weight.sizes(), rows.weight.options().dtype(at::kByte)),
               start.scale * factor, start.zero_point};
    const at::Tensor objective = sweep(rows, s);
    if (shrink.size() == 1) return s;
    const at::Tensor error = undamped(rows, s, objective);
    if (!best_objective.defined()) {
      best = s;
      best_objective = error;
      continue;
    }
    const at::Tensor better = error.lt(best_objective);
    best.codes = at::where(better, s.codes, best.codes);
    best.scale = at::where(better, s.scale, best.scale);
    best_objective = at::where(better, error, best_objective);
  }
  return best;
}

at::Tensor visiting_order(const GramProblem& p, bool by_activation) {  // int64 [B, K]
  if (by_activation) return p.diagonal.argsort(/*stable=*/true, -1, /*descending=*/true);
  return at::arange(p.diagonal.size(1), p.diagonal.options().dtype(at::kLong))
      .expand_as(p.diagonal);
}

// Solves every Gram at once; several groups a row need a problem with one Gram. q: grid in, result
// out. Returns {status, raised}.
std::pair<int64_t, int64_t> solve_problem(const GramProblem& p, int64_t group_size, int64_t bits,
                                          int64_t block_size, double damp, bool by_activation,
                                          const std::vector<double>& shrink, Quantization& q) {
  const int64_t B = p.weight.size(0), n = p.weight.size(1), K = p.weight.size(2),
                G = q.scale.size(1);
  const at::Tensor permutation = visiting_order(p, by_activation);
  const at::Tensor gram = by_activation ? permute_gram(p.gram, permutation) : p.gram;
  const DampedFactor factor = damped_factor(gram, damp);
  const Rows rows{permute_columns(p.weight, permutation),
                  factor.upper.contiguous(),
                  factor.damping,
                  G > 1 ? permutation.select(0, 0).floor_divide(group_size) : at::Tensor(),
                  bits,
                  block_size};
  Solution all{at::empty_like(p.weight, p.weight.options().dtype(at::kByte)),
               q.scale.view({B, n, G}), q.zero_point.view({B, n, G})};
  for_each_part(rows.weight, kRowsPerChunk, [&](const Part& part) {
    const Rows some{part.rows(rows.weight),
                    part.problems(rows.upper),
                    part.problems(rows.damping),
                    rows.group_of,
                    rows.bits,
                    rows.block_size};
    const Solution s = solve(
        some, shrink, {part.rows(all.codes), part.rows(all.scale), part.rows(all.zero_point)});
    part.rows(all.codes).copy_(s.codes);
    part.rows(all.scale).copy_(s.scale);
  });
  q.codes = permute_columns(all.codes, permutation.argsort(-1, false)).view({B * n, K});
  return {factor.status(), factor.raised};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gptq_quantize(
    const at::Tensor& weight,  // [N, K]
    const at::Tensor& gram,    // [K, K] or [B, K, K]
    int64_t bits, int64_t group_size, std::string_view grid,
    std::optional<at::ArrayRef<double>> shrink, double damp, int64_t block_size,
    std::string_view order) {
  const char* op = "gptq_quantize";
  check_device(op, weight);
  check_bits(op, bits);
  check_group_size(op, group_size);
  const GridType type = parse_grid(op, grid);
  TORCH_CHECK_VALUE(damp >= 0, op, ": damp must not be negative, got ", damp);
  TORCH_CHECK_VALUE(block_size >= 1, op, ": block_size must be at least 1, got ", block_size);
  TORCH_CHECK_VALUE(order == "natural" || order == "activation", op,
                    ": order must be natural or activation, got '", order, "'");
  std::vector<double> factors(std::begin(kDefaultShrink), std::end(kDefaultShrink));
  if (shrink.has_value()) factors = shrink->vec();
  check_shrink(op, factors);

  const c10::DeviceGuard guard(weight.device());
  const at::NoTF32Guard no_tf32;
  const GramProblem p = gram_problem(op, weight, gram);
  Quantization q = fit_grids(p.weight.view(weight.sizes()), group_size, type, bits);
  at::Tensor info = at::zeros({3}, q.scale.options().dtype(at::kLong));
  info.select(0, 1).fill_(p.dead.sum());
  if (weight.numel() == 0) return {q.codes, q.scale, q.zero_point, info};

  const int64_t block =
      std::min(block_size, kGptqMaxBlock);  // the result does not depend on it, only the speed
  const bool by_activation = order == "activation";
  const int64_t B = p.weight.size(0), n = p.weight.size(1);
  int64_t status = 0, raised = 0;
  if (B == 1 || q.scale.size(1) == 1) {
    std::tie(status, raised) =
        solve_problem(p, group_size, bits, block, damp, by_activation, factors, q);
  } else {
    for (int64_t b = 0; b < B; ++b) {
      const auto one = [b](const at::Tensor& x) { return x.narrow(0, b, 1); };
      const auto of_rows = [&](const at::Tensor& x) { return x.narrow(0, b * n, n); };
      Quantization part{of_rows(q.codes), of_rows(q.scale), of_rows(q.zero_point)};
      const GramProblem problem{one(p.weight), one(p.gram), one(p.diagonal), one(p.dead), p.unit};
      const auto [part_status, part_raised] =
          solve_problem(problem, group_size, bits, block, damp, by_activation, factors, part);
      of_rows(q.codes).copy_(part.codes);
      status = std::max(status, part_status);
      raised = std::max(raised, part_raised);
    }
  }
  info.select(0, 0).fill_(status);
  info.select(0, 2).fill_(raised);
  return {q.codes, q.scale, q.zero_point, info};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "gptq_quantize(Tensor weight, Tensor gram, *, int bits, int group_size=0, str "
      "grid=\"asymmetric\", float[]? shrink=None, float "
      "damp=0.01, int block_size=128, str order=\"natural\") -> (Tensor codes, Tensor scale, "
      "Tensor zero_point, Tensor info)");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("gptq_quantize", gptq_quantize); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("gptq_quantize", gptq_quantize); }
#endif

}  // namespace torchquant
