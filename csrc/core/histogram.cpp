#include <csrc/core/histogram.h>

#include <c10/util/Exception.h>

namespace torchquant {

void check_histogram(const char* op, const at::Tensor& histogram) {
  TORCH_CHECK_TYPE(histogram.scalar_type() == at::kDouble, op, ": histogram must be float64, got ",
                   histogram.scalar_type());
  TORCH_CHECK_VALUE((histogram.dim() == 2 || histogram.dim() == 3) && histogram.size(-2) == 3 &&
                        bin_mantissa_of(histogram.size(-1)) >= 0,
                    op,
                    ": histogram must be [3, B] or [C, 3, B] with B = 512, 1024, .. 65536, got ",
                    histogram.sizes());
}

at::Tensor histogram_rows(const char* op, const at::Tensor& histogram) {
  check_histogram(op, histogram);
  const at::Tensor rows = histogram.to(at::kCPU).reshape({-1, 3, histogram.size(-1)}).contiguous();
  const bool filled = rows.size(0) == 0 || rows.select(1, 0).sum(-1).gt(0).all().item<bool>();
  TORCH_CHECK_VALUE(filled, op, ": histogram must hold at least one value",
                    histogram.dim() == 3 ? " in every channel" : "", ", got none");
  return rows;
}

}  // namespace torchquant
