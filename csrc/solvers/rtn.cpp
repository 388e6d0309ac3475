#include <csrc/solvers/rtn.h>

#include <ATen/ops/tensor.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <csrc/core/quantization.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kRowsPerChunk = 16;

void search_shrink(const at::Tensor& weight, int64_t group_size, int64_t bits,
                   at::ArrayRef<double> shrink, Quantization& q) {
  if (shrink.size() == 1) {
    q.scale.mul_(shrink[0]);
    return;
  }
  const std::vector<float> factors(shrink.begin(), shrink.end());
  const at::Tensor on_device = at::tensor(at::ArrayRef<float>(factors), weight.options());
  const int64_t columns = weight.size(1), groups = q.scale.size(1);
  const auto part = [&](int64_t first, int64_t rows) {
    return RtnShrink{{weight.const_data_ptr<float>() + first * columns, rows, columns,
                      group_size == 0 ? columns : group_size, GridType::asymmetric,
                      max_code_of(bits), q.scale.mutable_data_ptr<float>() + first * groups,
                      q.zero_point.mutable_data_ptr<float>() + first * groups, nullptr},
                     on_device.const_data_ptr<float>(),
                     static_cast<int64_t>(factors.size())};
  };
  const int64_t rows = weight.size(0);
  if (weight.is_cuda()) {
    TORCHQUANT_LAUNCH(rtn_shrink, part(0, rows));
    return;
  }
  for_each_chunk((rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk) {
    const int64_t first = chunk * kRowsPerChunk;
    rtn_shrink(part(first, std::min(kRowsPerChunk, rows - first)));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rtn_quantize(const at::Tensor& weight,  // [N, K]
                                                            int64_t bits, int64_t group_size,
                                                            std::string_view grid,
                                                            at::ArrayRef<double> shrink) {
  const char* op = "rtn_quantize";
  check_device(op, weight);
  check_matrix(op, "weight", weight);
  check_bits(op, bits);
  check_group_size(op, group_size);
  check_shrink(op, shrink);
  const GridType type = parse_grid(op, grid);
  check_finite(op, "weight", weight);

  const c10::DeviceGuard guard(weight.device());
  const at::Tensor w = weight.to(at::kFloat).contiguous();
  Quantization q = fit_grids(w, group_size, type, bits);
  if (w.numel() > 0) {
    search_shrink(w, group_size, bits, shrink, q);
    encode(w, group_size, bits, q);
  }
  return {q.codes, q.scale, q.zero_point};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "rtn_quantize(Tensor weight, *, int bits, int group_size=0, str grid=\"asymmetric\", float[] "
      "shrink=[1.0]) -> (Tensor codes, "
      "Tensor scale, Tensor zero_point)");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("rtn_quantize", rtn_quantize); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("rtn_quantize", rtn_quantize); }
#endif

}  // namespace torchquant
