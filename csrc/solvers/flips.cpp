#include <csrc/solvers/flips.h>

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/ones.h>
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

#include <algorithm>
#include <tuple>
#include <vector>

// Shapes: B Grams (1, or one per group of a grouped convolution), n rows each, K inputs, G groups
// of columns with one scale each.

namespace torchquant {
namespace {

constexpr int64_t kRowsPerChunk = 192;
constexpr double kDefaultShrink[] = {1.0, 0.9, 0.8, 0.65, 0.5};

enum class Refine { best, gradient, none };

struct Options {
  int64_t bits;
  int64_t group_size;
  std::string_view grid;
  std::vector<double> shrink;
  double ridge;
  std::string_view order;
  Refine refine;
  int64_t steps;
};

// A layer without its bias: what the bias takes of any error of the weights is out of `gram`.
struct Layer {
  at::Tensor weight;    // float32 [B, n, K]
  at::Tensor gram;      // float32 [B, K, K]; with a bias, the mean of the inputs taken out
  at::Tensor flipping;  // float32 [B, K, K] with the mean: what flips are judged by
  at::Tensor dead;      // bool [B, K]
  at::Tensor mean;      // float32 [B, K, 1] of the inputs, undefined without a bias
  at::Tensor bias;      // float32 [B, n, 1], undefined without a bias
};

Layer split_bias(const GramProblem& p, bool bias_column) {
  if (!bias_column) return {p.weight, p.gram, p.gram, p.dead, {}, {}};
  const int64_t K = p.weight.size(2) - 1;
  const at::Tensor inputs = p.gram.narrow(1, 0, K).narrow(2, 0, K);
  const at::Tensor tokens = p.gram.narrow(1, K, 1).narrow(2, K, 1).to(at::kDouble);
  const at::Tensor inverse = at::where(tokens.gt(0), tokens.reciprocal(), at::zeros_like(tokens));
  const at::Tensor mean = p.gram.narrow(1, 0, K).narrow(2, K, 1).to(at::kDouble) * inverse;
  const at::Tensor centred = inputs.to(at::kDouble) - mean * mean.mT() * tokens;
  return {p.weight.narrow(2, 0, K).contiguous(),
          centred.to(at::kFloat).contiguous(),
          inputs.contiguous(),
          p.dead.narrow(1, 0, K),
          mean.to(at::kFloat),
          p.weight.narrow(2, K, 1)};
}

struct Rows {
  at::Tensor weight;      // [B, n, K], columns in visiting order, as below
  at::Tensor root;        // [B, K, K] R of damped_cholesky
  at::Tensor gram;        // [B, K, K]
  at::Tensor flipping;    // [B, K, K]
  at::Tensor diagonal;    // [B, K] of flipping
  at::Tensor scale;       // [B, n, 1 or K]
  at::Tensor zero_point;  // [B, n, 1 or K]
};

struct Solution {
  at::Tensor codes;   // uint8 [B, n, K]
  at::Tensor factor;  // [B, n, 1] on the scale
  at::Tensor flips;   // int64 [B, n]
};

at::Tensor columns_of(const at::Tensor& grids, int64_t first, int64_t width) {
  return grids.size(2) > 1 ? grids.narrow(2, first, width) : grids;
}

// Flips codes q of columns first.. of weight w.
void refine(const Rows& rows, const Options& options, int64_t first, const at::Tensor& w,
            const at::Tensor& scale, const at::Tensor& zero_point, at::Tensor& q,
            at::Tensor& flips) {
  const int64_t B = w.size(0), n = w.size(1), width = w.size(2), K = rows.weight.size(2);
  const at::Tensor difference = (q - zero_point) * scale - w;
  const at::Tensor gram = rows.flipping.narrow(1, first, width).narrow(2, first, width);
  at::Tensor gradient = at::bmm(difference * 2, gram).contiguous();
  const at::Tensor up = difference.lt(0).logical_and_(q.lt(max_code_of(options.bits)));
  const at::Tensor down = difference.gt(0).logical_and_(q.gt(0));
  const at::Tensor direction = up.to(at::kFloat).sub_(down.to(at::kFloat));
  at::Tensor step = direction.mul(scale).contiguous();
  const at::Tensor before = step.clone();
  for (int64_t b = 0; b < B; ++b) {
    const int64_t offset = b * n * width;
    TORCHQUANT_RUN(
        flip_rows, w,
        (FlipRows{n, width, rows.flipping.const_data_ptr<float>() + (b * K + first) * K + first, K,
                  rows.diagonal.const_data_ptr<float>() + b * K + first, options.steps,
                  options.refine == Refine::best, gradient.mutable_data_ptr<float>() + offset,
                  step.mutable_data_ptr<float>() + offset,
                  flips.mutable_data_ptr<int64_t>() + b * n}));
  }
  q.add_(direction.mul_(step.ne(before)));
}

// Rounds half S of the columns that are left and moves its error onto the others, B, until none is
// left: w_B -= d H_SB (H_BB + l I)^-1. As H + l I = R R^T, that is d R_SB R_BB^-1, and the sum over
// all halves so far is what solves x R_BB = -(error so far) R_SB: only the next half needs its x.
Solution halve(const Rows& rows, const Options& options, double factor) {
  const int64_t B = rows.weight.size(0), n = rows.weight.size(1), K = rows.weight.size(2);
  const at::Tensor scales = rows.scale * factor;
  const at::Tensor owed = at::zeros_like(rows.weight);  // (error so far) R
  Solution s{at::empty(rows.weight.sizes(), rows.weight.options().dtype(at::kByte)),
             at::ones({B, n, 1}, rows.weight.options()).mul_(factor),
             at::zeros({B, n}, rows.weight.options().dtype(at::kLong))};
  for (int64_t first = 0, width = 0; first < K; first += width) {
    width = std::max<int64_t>(1, (K - first) / 2);
    const at::Tensor given = rows.weight.narrow(2, first, width);
    const at::Tensor root = rows.root.narrow(1, first, width);
    at::Tensor w = given;
    if (first > 0) {
      w = given - at::linalg_solve_triangular(root.narrow(2, first, width),
                                              owed.narrow(2, first, width), /*upper=*/true,
                                              /*left=*/false);
    }
    const at::Tensor scale = columns_of(scales, first, width),
                     zero_point = columns_of(rows.zero_point, first, width);
    at::Tensor q = w.div(scale).add_(zero_point).clamp_(0.0, max_code_of(options.bits)).round_();
    if (options.refine != Refine::none) {
      refine(rows, options, first, w, scale, zero_point, q, s.flips);
    }
    s.codes.narrow(2, first, width).copy_(q);
    const int64_t behind = K - first - width;
    if (behind == 0) break;
    const at::Tensor error = q.sub_(zero_point).mul_(scale).sub_(given);
    owed.narrow(2, first + width, behind)
        .add_(at::bmm(error, root.narrow(2, first + width, behind)));
  }
  return s;
}

at::Tensor objective(const Rows& rows, const Solution& s) {  // [B, n, 1]
  const at::Tensor error =
      s.codes.to(at::kFloat).sub_(rows.zero_point).mul_(rows.scale * s.factor).sub_(rows.weight);
  return at::bmm(error, rows.gram).mul_(error).sum(-1, true);
}

Solution search(const Rows& rows, const Options& options) {
  Solution best = halve(rows, options, options.shrink.front());
  if (options.shrink.size() == 1) return best;
  at::Tensor best_error = objective(rows, best);
  for (size_t i = 1; i < options.shrink.size(); ++i) {
    const Solution s = halve(rows, options, options.shrink[i]);
    const at::Tensor error = objective(rows, s), better = error.lt(best_error);
    best.codes = at::where(better, s.codes, best.codes);
    best.factor = at::where(better, s.factor, best.factor);
    best.flips = at::where(better.squeeze(2), s.flips, best.flips);
    best_error = at::where(better, error, best_error);
  }
  return best;
}

// int64 [B, K]. By error: columns that round well come first, so that more others are left to
// answer for the bad ones.
at::Tensor visiting_order(const Layer& layer, const Options& options, const Quantization& grids) {
  const int64_t B = layer.weight.size(0), n = layer.weight.size(1), K = layer.weight.size(2);
  if (options.order == "activation") {
    return layer.flipping.diagonal(0, 1, 2).argsort(/*stable=*/true, -1, /*descending=*/true);
  }
  if (options.order == "natural") {
    return at::arange(K, layer.weight.options().dtype(at::kLong)).expand({B, K});
  }
  Quantization nearest = grids;
  nearest.codes = at::empty_like(grids.codes);
  encode(layer.weight.view({B * n, K}), options.group_size, options.bits, nearest);
  at::Tensor error;
  const auto sum = [&] {
    error =
        values_of(nearest, options.group_size).view({B, n, K}).sub_(layer.weight).square_().sum(1);
  };
  layer.weight.is_cuda() ? sum() : run_on_one_thread(sum);
  return error.argsort(/*stable=*/true, -1, /*descending=*/false);
}

at::Tensor per_column(const at::Tensor& grouped, const Layer& layer, int64_t group_size,
                      const at::Tensor& permutation) {  // [N, G] -> [B, n, 1 or K]
  const int64_t B = layer.weight.size(0), n = layer.weight.size(1), K = layer.weight.size(2);
  if (grouped.size(1) == 1) return grouped.view({B, n, 1});
  return permute_columns(expand_groups(grouped, K, group_size).contiguous().view({B, n, K}),
                         permutation);
}

// q: grids in, result out. Returns info.
at::Tensor halving(const Layer& layer, const Options& options, Quantization& q) {
  const int64_t B = layer.weight.size(0), n = layer.weight.size(1), K = layer.weight.size(2);
  const at::Tensor permutation = visiting_order(layer, options, q);
  const auto permuted = [&](const at::Tensor& gram) {
    return options.order == "natural" ? gram : permute_gram(gram, permutation);
  };
  const at::Tensor gram = permuted(layer.gram);
  const DampedFactor factor = damped_cholesky(gram, options.ridge);
  // Where nothing helped, what was given is no Gram to judge flips by.
  at::Tensor flipping = permuted(layer.flipping);
  if (factor.status() == 2) flipping = flipping.masked_fill(factor.failed, 0);
  flipping = flipping.contiguous();
  const Rows rows{permute_columns(layer.weight, permutation),
                  factor.upper,
                  gram,
                  flipping,
                  flipping.diagonal(0, 1, 2).contiguous(),
                  per_column(q.scale, layer, options.group_size, permutation),
                  per_column(q.zero_point, layer, options.group_size, permutation)};
  Solution all{at::empty_like(layer.weight, layer.weight.options().dtype(at::kByte)),
               at::empty({B, n, 1}, layer.weight.options()),
               at::empty({B, n}, layer.weight.options().dtype(at::kLong))};
  for_each_part(rows.weight, kRowsPerChunk, [&](const Part& part) {
    const Rows some{part.rows(rows.weight),       part.problems(rows.root),
                    part.problems(rows.gram),     part.problems(rows.flipping),
                    part.problems(rows.diagonal), part.rows(rows.scale),
                    part.rows(rows.zero_point)};
    const Solution s = search(some, options);
    part.rows(all.codes).copy_(s.codes);
    part.rows(all.factor).copy_(s.factor);
    part.rows(all.flips).copy_(s.flips);
  });
  q.codes = permute_columns(all.codes, permutation.argsort(-1, false)).view({B * n, K});
  q.scale.mul_(all.factor.view({B * n, 1}));
  at::Tensor info = at::zeros({4}, all.flips.options());
  info.select(0, 0).fill_(factor.status());
  info.select(0, 1).fill_(layer.dead.sum());
  info.select(0, 2).fill_(factor.raised);
  info.select(0, 3).fill_(all.flips.sum());
  return info;
}

// Halves of one column: GPTQ with this damping.
at::Tensor columnwise(const Layer& layer, const Options& options, Quantization& q) {
  using Gptq = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::string_view,
      std::optional<at::ArrayRef<double>>, double, int64_t, std::string_view);
  static const auto gptq =
      c10::Dispatcher::singleton().findSchemaOrThrow("torchquant::gptq_quantize", "").typed<Gptq>();
  constexpr int64_t kBlockSize = 128;
  const int64_t B = layer.weight.size(0), n = layer.weight.size(1), K = layer.weight.size(2);
  at::Tensor info;
  std::tie(q.codes, q.scale, q.zero_point, info) = gptq.call(
      layer.weight.view({B * n, K}), layer.gram, options.bits, options.group_size, options.grid,
      at::ArrayRef<double>(options.shrink), options.ridge, kBlockSize, options.order);
  info.select(0, 1).fill_(layer.dead.sum());
  return at::cat({info, at::zeros({1}, info.options())});
}

// The bias that answers best for the error of the quantized weights.
at::Tensor compensated_bias(const Layer& layer, const Quantization& q, int64_t group_size) {
  if (!layer.bias.defined()) return at::empty({q.codes.size(0), 0}, q.scale.options());
  at::Tensor bias;
  const auto compensate = [&] {
    const at::Tensor error = values_of(q, group_size).view(layer.weight.sizes()) - layer.weight;
    bias = layer.bias - at::bmm(error, layer.mean);
  };
  layer.weight.is_cuda() ? compensate() : run_on_one_thread(compensate);
  return bias.reshape({-1, 1});
}

Options parse_options(const char* op, int64_t bits, int64_t group_size, std::string_view grid,
                      std::optional<at::ArrayRef<double>> shrink, double ridge,
                      std::string_view order, std::string_view refine, int64_t steps,
                      std::string_view solver) {
  check_bits(op, bits);
  check_group_size(op, group_size);
  TORCH_CHECK_VALUE(ridge >= 0, op, ": ridge must not be negative, got ", ridge);
  TORCH_CHECK_VALUE(order == "natural" || order == "activation" || order == "error", op,
                    ": order must be natural, activation or error, got '", order, "'");
  TORCH_CHECK_VALUE(refine == "best" || refine == "gradient" || refine == "none", op,
                    ": refine must be best, gradient or none, got '", refine, "'");
  TORCH_CHECK_VALUE(steps >= 0, op, ": steps must not be negative, got ", steps);
  TORCH_CHECK_VALUE(solver == "halving" || solver == "columnwise", op,
                    ": solver must be halving or columnwise, got '", solver, "'");
  TORCH_CHECK_VALUE(solver == "halving" || order != "error", op,
                    ": order 'error' is for solver 'halving'");
  std::vector<double> factors(std::begin(kDefaultShrink), std::end(kDefaultShrink));
  if (shrink.has_value()) factors = shrink->vec();
  check_shrink(op, factors);
  const Refine rule = refine == "best"       ? Refine::best
                      : refine == "gradient" ? Refine::gradient
                                             : Refine::none;
  return {bits, group_size, grid, factors, ridge, order, rule, steps};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> flips_quantize(
    const at::Tensor& weight,  // [N, K], or [N, K + 1] with the bias last
    const at::Tensor& gram,    // square of that size, or B of them
    int64_t bits, int64_t group_size, std::string_view grid,
    std::optional<at::ArrayRef<double>> shrink, double ridge, std::string_view order,
    std::string_view refine, int64_t steps, std::string_view solver, bool bias_column) {
  const char* op = "flips_quantize";
  check_device(op, weight);
  const Options options =
      parse_options(op, bits, group_size, grid, shrink, ridge, order, refine, steps, solver);
  const GridType type = parse_grid(op, grid);
  const c10::DeviceGuard guard(weight.device());
  const at::NoTF32Guard no_tf32;
  const GramProblem p = gram_problem(op, weight, gram);
  TORCH_CHECK_VALUE(!bias_column || weight.size(1) > 0, op,
                    ": bias_column needs the bias as the last column of weight, got no columns");
  const Layer layer = split_bias(p, bias_column);
  Quantization q =
      fit_grids(layer.weight.view({weight.size(0), layer.weight.size(2)}), group_size, type, bits);
  at::Tensor info = at::zeros({4}, q.scale.options().dtype(at::kLong));
  info.select(0, 1).fill_(layer.dead.sum());
  if (layer.weight.numel() > 0) {
    info = solver == "halving" ? halving(layer, options, q) : columnwise(layer, options, q);
  }
  return {q.codes, q.scale, q.zero_point, info, compensated_bias(layer, q, group_size)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "flips_quantize(Tensor weight, Tensor gram, *, int bits, int group_size=0, str "
      "grid=\"asymmetric\", float[]? shrink=None, float ridge=0.01, str order=\"natural\", str "
      "refine=\"best\", int steps=100, str solver=\"halving\", bool bias_column=False) -> (Tensor "
      "codes, Tensor scale, Tensor zero_point, Tensor info, Tensor bias)");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("flips_quantize", flips_quantize); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("flips_quantize", flips_quantize); }
#endif

}  // namespace torchquant
