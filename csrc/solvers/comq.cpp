#include <csrc/solvers/comq.h>

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/gram_problem.h>
#include <csrc/core/permute.h>
#include <csrc/core/quantization.h>
#include <csrc/solvers/comq_rows.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <tuple>
#include <vector>

namespace torchquant {
namespace {

using comq::Options, comq::Order, comq::Rows, comq::Solution;

// Rows per task, a multiple of comq_block's row lanes: more of them make the products faster, fewer
// leave a layer with few rows enough tasks for every core.
constexpr int64_t kRowsPerTask = 96;
constexpr int64_t kRowsPerLargeTask = 192;
constexpr int64_t kManyRows = 1536;
constexpr int64_t kRowsPerSort = 64;
constexpr double kDefaultShrink[] = {1.0, 0.9, 0.8, 0.65, 0.5};

Order parse_order(const char* op, std::string_view order) {
  if (order == "shared") return Order::shared;
  if (order == "greedy") return Order::greedy;
  if (order == "semi") return Order::semi;
  TORCH_CHECK_VALUE(order == "cyclic", op, ": order must be shared, greedy, semi or cyclic, got '",
                    order, "'");
  return Order::cyclic;
}
// The visiting order: a permutation of the columns for all rows of a Gram, and an order inside each
// row (greedy, semi).
at::Tensor column_order(const GramProblem& p, Order order) {  // int64 [B, K]
  if (order == Order::shared || order == Order::semi)
    return p.diagonal.argsort(/*stable=*/true, -1, /*descending=*/true);
  return at::arange(p.diagonal.size(1), p.diagonal.options().dtype(at::kLong))
      .expand_as(p.diagonal);
}

// order[0..width-1] = first + the positions of gain in descending order, ties by position. One
// integer key holds both: a positive float sorts like its bits.
void sort_descending(const float* gain, int64_t first, int64_t width, uint64_t* keys,
                     int32_t* order) {
  for (int64_t k = 0; k < width; ++k) {
    const uint32_t bits = std::bit_cast<uint32_t>(gain[k]);
    keys[k] = static_cast<uint64_t>(~bits) << 32 | static_cast<uint64_t>(first + k);
  }
  std::sort(keys, keys + width);
  for (int64_t k = 0; k < width; ++k) order[k] = static_cast<int32_t>(keys[k] & 0xffffffffu);
}

at::Tensor row_orders(const Rows& rows, const at::Tensor& diagonal,
                      Order order) {  // int32 [B, n, K]
  if (order != Order::greedy && order != Order::semi) return {};
  const at::Tensor gain = rows.weight.abs().mul_(diagonal.sqrt().unsqueeze(1));
  const int64_t K = gain.size(2), total = gain.size(0) * gain.size(1);
  const int64_t block = order == Order::greedy ? K : kComqMaxBlock;
  at::Tensor orders = at::empty(gain.sizes(), gain.options().dtype(at::kInt));
  if (gain.is_cuda()) {
    for (int64_t first = 0; first < K; first += block) {
      const int64_t width = std::min(block, K - first);
      const at::Tensor part = gain.narrow(2, first, width);
      orders.narrow(2, first, width)
          .copy_(part.argsort(/*stable=*/true, -1, /*descending=*/true).add_(first));
    }
    return orders;
  }
  const float* from = gain.const_data_ptr<float>();
  int32_t* to = orders.mutable_data_ptr<int32_t>();
  for_each_chunk((total + kRowsPerSort - 1) / kRowsPerSort, [&](int64_t chunk) {
    std::vector<uint64_t> keys(block);
    const int64_t end = std::min(total, (chunk + 1) * kRowsPerSort);
    for (int64_t row = chunk * kRowsPerSort; row < end; ++row) {
      for (int64_t first = 0; first < K; first += block) {
        sort_descending(from + row * K + first, first, std::min(block, K - first), keys.data(),
                        to + row * K + first);
      }
    }
  });
  return orders;
}

// Cuts the layer into tasks, each solved on one thread; `all` receives the result.
void solve_in_parts(const Rows& rows, const Options& options, Solution& all) {
  const int64_t per_task = rows.weight.size(1) < kManyRows ? kRowsPerTask : kRowsPerLargeTask;
  for_each_part(rows.weight, per_task, [&](const Part& part) {
    const Rows some{part.rows(rows.weight),   part.rows(rows.linear),
                    part.problems(rows.gram), part.problems(rows.inverse_diagonal),
                    part.rows(rows.order),    rows.group_columns};
    const Solution s = comq::solve(
        some, options, {part.rows(all.codes), part.rows(all.scale), part.rows(all.zero_point), {}});
    part.rows(all.codes).copy_(s.codes);
    part.rows(all.scale).copy_(s.scale);
  });
}

// Where the columns of each group stand after the permutation; only for one Gram with several
// groups.
std::vector<at::Tensor> group_columns(const at::Tensor& permutation, int64_t group_size,
                                      int64_t groups) {
  std::vector<at::Tensor> columns;
  if (groups <= 1) return columns;
  // Sorted by group: nothing has to be counted on the device and read back.
  const at::Tensor by_group =
      permutation.select(0, 0).floor_divide(group_size).argsort(/*stable=*/true, -1, false);
  for (int64_t first = 0; first < by_group.size(0); first += group_size) {
    columns.push_back(by_group.narrow(0, first, std::min(group_size, by_group.size(0) - first)));
  }
  return columns;
}

// Solves every Gram of the problem at once (several groups a row need a problem with one Gram: see
// run). q: grid in, result out.
void solve_problem(const GramProblem& p, const at::Tensor& linear, int64_t group_size,
                   const Options& options, Quantization& q) {
  const int64_t B = p.weight.size(0), n = p.weight.size(1), K = p.weight.size(2),
                G = q.scale.size(1);
  const at::Tensor permutation = column_order(p, options.order);
  const at::Tensor inverse = at::where(p.dead, at::zeros_like(p.diagonal), p.diagonal.reciprocal());
  Rows rows{permute_columns(p.weight, permutation),
            linear.defined() ? permute_columns(linear, permutation) : linear,
            permute_gram(p.gram, permutation),
            permute_columns(inverse.unsqueeze(1), permutation).squeeze(1),
            {},
            group_columns(permutation, group_size, G)};
  rows.order = row_orders(rows, permute_columns(p.diagonal.unsqueeze(1), permutation).squeeze(1),
                          options.order);
  const at::Tensor start = q.codes.view({B, n, K});
  Solution all{options.from_codes && !options.from_rounding ? permute_columns(start, permutation)
                                                            : at::empty_like(start),
               q.scale.view({B, n, G}),
               q.zero_point.view({B, n, G}),
               {}};
  solve_in_parts(rows, options, all);
  const at::Tensor back = permutation.argsort(-1, false);
  q.codes = permute_columns(all.codes, back).view({B * n, K});
}

// Dead inputs take part in no sum: their codes are the nearest ones on the final grid.
void round_dead(const GramProblem& p, int64_t group_size, int64_t bits, Quantization& q) {
  if (!p.dead.any().item<bool>()) return;
  Quantization nearest{at::empty_like(q.codes), q.scale, q.zero_point};
  encode(p.weight.view(q.codes.sizes()), group_size, bits, nearest);
  const at::Tensor dead = p.dead.unsqueeze(1).expand_as(p.weight).reshape(q.codes.sizes());
  q.codes = at::where(dead, nearest.codes, q.codes);
}

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Result gptq_start(const at::Tensor& weight, const at::Tensor& gram, int64_t bits,
                  int64_t group_size, std::string_view grid,
                  std::optional<at::ArrayRef<double>> shrink) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("torchquant::gptq_quantize", "")
          .typed<Result(const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::string_view,
                        std::optional<at::ArrayRef<double>>, double, int64_t, std::string_view)>();
  return op.call(weight, gram, bits, group_size, grid, shrink, 0.01, 128, "natural");
}

void check_start(const char* op, const at::Tensor& weight, const Quantization& q,
                 int64_t group_size, int64_t bits) {
  const int64_t groups = group_count(weight.size(1), group_size);
  check_shape(op, "codes", q.codes, weight.sizes());
  check_shape(op, "scale", q.scale, {weight.size(0), groups});
  check_shape(op, "zero_point", q.zero_point, {weight.size(0), groups});
  TORCH_CHECK_TYPE(q.codes.scalar_type() == at::kByte, op, ": codes must be uint8, got ",
                   q.codes.scalar_type());
  for (const auto& [name, tensor] :
       {std::pair{"codes", q.codes}, {"scale", q.scale}, {"zero_point", q.zero_point}}) {
    check_same_device(op, name, tensor, weight);
  }
  check_finite(op, "scale", q.scale);
  check_finite(op, "zero_point", q.zero_point);
  if (weight.numel() == 0) return;
  const auto largest = q.codes.max().item<int64_t>(), allowed = (int64_t{1} << bits) - 1;
  TORCH_CHECK_VALUE(largest <= allowed, op, ": codes must be at most ", allowed, ", got ", largest);
  const auto smallest = q.scale.min().item<double>();
  TORCH_CHECK_VALUE(smallest > 0, op, ": scale must be positive, got ", smallest);
}

// One call per Gram when rows have several scales, else all at once.
void run(const GramProblem& p, const at::Tensor& linear, int64_t group_size, const Options& options,
         Quantization& q) {
  const int64_t B = p.weight.size(0), n = p.weight.size(1);
  if (B == 1 || q.scale.size(1) == 1) return solve_problem(p, linear, group_size, options, q);
  for (int64_t b = 0; b < B; ++b) {
    const auto one = [b](const at::Tensor& x) { return x.defined() ? x.narrow(0, b, 1) : x; };
    const auto of_rows = [&](const at::Tensor& x) { return x.narrow(0, b * n, n); };
    Quantization part{of_rows(q.codes), of_rows(q.scale), of_rows(q.zero_point)};
    solve_problem({one(p.weight), one(p.gram), one(p.diagonal), one(p.dead), p.unit}, one(linear),
                  group_size, options, part);
    of_rows(q.codes).copy_(part.codes);
  }
}

Result comq_quantize(const at::Tensor& weight,  // [N, K]
                     const at::Tensor& gram,    // [K, K] or [B, K, K]
                     int64_t bits, int64_t group_size, std::string_view grid,
                     const std::optional<at::Tensor>& linear,  // [N, K]
                     int64_t sweeps, std::string_view order, bool update_scale,
                     std::optional<at::ArrayRef<double>> shrink, std::string_view init,
                     const std::optional<at::Tensor>& codes, const std::optional<at::Tensor>& scale,
                     const std::optional<at::Tensor>& zero_point) {
  const char* op = "comq_quantize";
  check_device(op, weight);
  check_bits(op, bits);
  check_group_size(op, group_size);
  const GridType type = parse_grid(op, grid);
  TORCH_CHECK_VALUE(sweeps >= 1, op, ": sweeps must be at least 1, got ", sweeps);
  TORCH_CHECK_VALUE(init == "weight" || init == "rtn" || init == "gptq", op,
                    ": init must be weight, rtn or gptq, got '", init, "'");
  const bool started = codes.has_value() || scale.has_value() || zero_point.has_value();
  TORCH_CHECK_VALUE(!started || (codes && scale && zero_point), op,
                    ": codes, scale and zero_point must be given together");
  Options options{bits,  sweeps, parse_order(op, order), update_scale, started || init != "weight",
                  false, {}};
  options.shrink.assign(std::begin(kDefaultShrink), std::end(kDefaultShrink));
  if (shrink.has_value()) options.shrink = shrink->vec();
  check_shrink(op, options.shrink);

  const c10::DeviceGuard guard(weight.device());
  const at::NoTF32Guard no_tf32;
  const GramProblem p = gram_problem(op, weight, gram);
  at::Tensor target;
  if (linear.has_value()) {
    check_shape(op, "linear", *linear, weight.sizes());
    check_same_device(op, "linear", *linear, weight);
    check_finite(op, "linear", *linear);
    target = linear->mul(p.unit).to(at::kFloat).contiguous().view(p.weight.sizes());
  }
  const at::Tensor w = p.weight.view(weight.sizes());
  at::Tensor info = at::zeros({3}, w.options().dtype(at::kLong));
  info.select(0, 1).fill_(p.dead.sum());
  Quantization q;
  if (started) {
    q = {codes->clone(at::MemoryFormat::Contiguous),
         scale->to(at::kFloat).clone(at::MemoryFormat::Contiguous),
         zero_point->to(at::kFloat).clone(at::MemoryFormat::Contiguous)};
    check_start(op, w, q, group_size, bits);
    options.shrink = {1.0};
  } else if (init == "gptq") {
    std::tie(q.codes, q.scale, q.zero_point, info) =
        gptq_start(w, gram, bits, group_size, grid, shrink);
    options.shrink = {1.0};
  } else {
    q = fit_grids(w, group_size, type, bits);
    options.from_rounding = init == "rtn";
  }
  if (w.numel() == 0) return {q.codes, q.scale, q.zero_point, info};
  run(p, target, group_size, options, q);
  round_dead(p, group_size, bits, q);
  return {q.codes, q.scale, q.zero_point, info};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "comq_quantize(Tensor weight, Tensor gram, *, int bits, int group_size=0, str "
      "grid=\"asymmetric\", Tensor? linear=None, int "
      "sweeps=3, str order=\"shared\", bool update_scale=True, float[]? shrink=None, str "
      "init=\"weight\", Tensor? codes=None, "
      "Tensor? scale=None, Tensor? zero_point=None) -> (Tensor codes, Tensor scale, Tensor "
      "zero_point, Tensor info)");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("comq_quantize", comq_quantize); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("comq_quantize", comq_quantize); }
#endif

}  // namespace torchquant
