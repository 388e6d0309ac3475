#include <csrc/solvers/rtn.h>

#include <ATen/ops/empty.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kRowsPerChunk = 16;

void run(const RtnRows& all, const at::Tensor& weight) {
#ifdef TORCHQUANT_CUDA
  if (weight.is_cuda()) {
    const c10::cuda::CUDAGuard guard(weight.device());
    return launch_rtn_rows(all, c10::cuda::getCurrentCUDAStream().stream());
  }
#else
  (void)weight;
#endif
  const int64_t groups = group_count(all.columns, all.group_size);
  for_each_chunk((all.rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk) {
    const int64_t first = chunk * kRowsPerChunk;
    RtnRows part = all;
    part.rows = std::min(kRowsPerChunk, all.rows - first);
    part.weight += first * all.columns;
    part.codes += first * all.columns;
    part.scale += first * groups;
    part.zero_point += first * groups;
    rtn_rows(part);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rtn_quantize(const at::Tensor& weight,  // [N, K]
                                                            int64_t bits, int64_t group_size, std::string_view grid,
                                                            at::ArrayRef<double> shrink) {
  const char* op = "rtn_quantize";
  check_device(op, weight);
  check_matrix(op, "weight", weight);
  check_bits(op, bits);
  check_group_size(op, group_size);
  check_shrink(op, shrink);
  const GridType type = parse_grid(op, grid);
  check_finite(op, "weight", weight);

  const at::Tensor w = weight.to(at::kFloat).contiguous();
  const int64_t rows = w.size(0), columns = w.size(1), groups = group_count(columns, group_size);
  at::Tensor codes = at::empty({rows, columns}, w.options().dtype(at::kByte));
  at::Tensor scale = at::empty({rows, groups}, w.options());
  at::Tensor zero_point = at::empty({rows, groups}, w.options());
  if (w.numel() == 0) return {codes, scale, zero_point};
  const std::vector<float> factors(shrink.begin(), shrink.end());
  run({w.const_data_ptr<float>(), rows, columns, group_size == 0 ? columns : group_size, type, max_code_of(bits), factors.data(),
       static_cast<int64_t>(factors.size()), codes.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>(),
       zero_point.mutable_data_ptr<float>()},
      w);
  return {codes, scale, zero_point};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "rtn_quantize(Tensor weight, *, int bits, int group_size=0, str grid=\"asymmetric\", float[] shrink=[1.0]) -> (Tensor codes, "
      "Tensor scale, Tensor zero_point)");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("rtn_quantize", rtn_quantize); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("rtn_quantize", rtn_quantize); }
#endif

}  // namespace torchquant
