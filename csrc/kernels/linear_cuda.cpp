// Packed linear layers on CUDA: which kernel or which product of the BLAS takes what.
#include <csrc/kernels/linear_cuda.h>

#include <ATen/ops/_int_mm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/silu.h>
#include <csrc/core/device.h>
#include <csrc/kernels/linear_mma.h>

#include <algorithm>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kDots = 1 << 24;    // int32 sums between kernels: 64 MB
constexpr int64_t kFewRows = 16;      // of float32: for more, an unpacked weight pays
constexpr int64_t kLongGroup = 2048;  // the BLAS takes a product for each group

// The weight as values [N, K] in a float dtype, or as bytes [tiles * 16, blocks * 32] in int8.
at::Tensor unpacked(const PackedWeight& weight, const at::TensorOptions& options) {
  const auto type = options.dtype().toScalarType();
  const int64_t tiles = (weight.outputs + kTileOutputs - 1) / kTileOutputs;
  const at::Tensor values =
      type == at::kChar
          ? at::empty({tiles * kTileOutputs, weight.layout.blocks * kBlockInputs}, options)
          : at::empty({weight.outputs, weight.layout.columns}, options);
  const UnpackWeight work{weight, 0, tiles,
                          type == at::kFloat  ? UnpackType::float32
                          : type == at::kHalf ? UnpackType::float16
                          : type == at::kChar ? UnpackType::bytes
                                              : UnpackType::bfloat16,
                          values.mutable_data_ptr()};
  if (values.numel() > 0) TORCHQUANT_RUN(unpack_weight, values, work);
  return values;
}

// dots[group] = integers of the group times bytes, by the BLAS.
void multiply_bytes(const BlockLayout& layout, const at::Tensor& integers,  // [M, blocks * 32]
                    const at::Tensor& bytes,                                // [N', blocks * 32]
                    const at::Tensor& dots) {                               // [groups, M, N']
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t first = g * layout.group_blocks * kBlockInputs;
    const int64_t count = layout.blocks_of_group(g) * kBlockInputs;
    at::Tensor out = dots.select(0, g);
    at::_int_mm_out(out, integers.narrow(1, first, count), bytes.narrow(1, first, count).t());
  }
}

// Whether tensor cores take the packed weight and 8-bit integers. The BLAS takes many rows of long
// groups, with the weight unpacked to bytes.
bool takes_packed_weight(const PackedProduct& p) {
  return p.rows <= kMostMatrixRows || p.weight.layout.group_size < kLongGroup;
}

void multiply_on_tensor_cores(const PackedProduct& p) {
  MatrixProduct m{};
  m.product = p;
  m.x = {p.narrow, UnpackType::bytes};
  m.row_inputs = p.weight.layout.blocks * kBlockInputs;
  m.bias = {p.bias, UnpackType::float32};
  m.residual = {p.residual, UnpackType::float32};
  m.out = {p.out, UnpackType::float32};
  TORCHQUANT_LAUNCH(matrix_product, m);
}

// Rows of floats as the blocks of a weight ask for them: every group padded to whole ones.
at::Tensor rows_of_blocks(const at::Tensor& rows, const BlockLayout& layout) {
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  const int64_t count = rows.size(0), group = layout.group_blocks * kBlockInputs;
  if (layout.columns == layout.blocks * kBlockInputs) return aligned ? rows : rows.clone();
  const int64_t whole = layout.groups * layout.group_size;
  const at::Tensor groups = at::constant_pad_nd(rows, {0, whole - layout.columns})
                                .view({count, layout.groups, layout.group_size});
  return at::constant_pad_nd(groups, {0, group - layout.group_size})
      .view({count, layout.groups * group});
}

UnpackType unpack_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return UnpackType::float16;
    case at::kBFloat16:
      return UnpackType::bfloat16;
    default:
      return UnpackType::float32;
  }
}

bool is_half(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

}  // namespace

// As many rows at once as the sums of their groups have room.
void multiply_on_cuda(const PackedProduct& all, const at::Tensor& integers) {
  if (all.narrow != nullptr && takes_packed_weight(all)) return multiply_on_tensor_cores(all);
  const BlockLayout& layout = all.weight.layout;
  const int64_t outputs = all.last_tile * kTileOutputs, numbers = layout.groups * outputs;
  const int64_t step = std::max(kDots / std::max<int64_t>(numbers, 1), kWarpRows);
  const auto options = integers.options().dtype(at::kInt);
  at::Tensor bytes;
  if (all.narrow != nullptr) bytes = unpacked(all.weight, integers.options());
  for (int64_t row = 0; row < all.rows; row += step) {
    PackedProduct part = rows_of(all, row, std::min(step, all.rows - row));
    if (bytes.defined() && takes_packed_weight(part)) {
      multiply_on_tensor_cores(part);
      continue;
    }
    part.segments = bytes.defined() ? 1 : product_segments(part);
    const at::Tensor dots = at::empty({part.segments * layout.groups, part.rows, outputs}, options);
    part.dots = dots.mutable_data_ptr<int32_t>();
    if (bytes.defined()) {
      multiply_bytes(layout, integers.narrow(0, row, part.rows), bytes, dots);
      TORCHQUANT_LAUNCH(finish_product, part);
    } else {
      TORCHQUANT_LAUNCH(packed_product, part);
    }
  }
}

bool takes_packed_weight(const at::Tensor& x, int64_t rows) {
  return is_half(x) && rows <= kMostMatrixRows;
}

bool takes_floats(const at::Tensor& x, int64_t rows) { return is_half(x) || rows > kFewRows; }

void multiply_floats(PackedProduct product, const at::Tensor& rows,
                     const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& residual, const at::Tensor& out) {
  const at::Tensor x = rows_of_blocks(rows, product.weight.layout);
  std::vector<at::Tensor> owned;
  const auto typed = [&](const at::Tensor& tensor) {
    owned.push_back(is_half(tensor) ? tensor.contiguous() : tensor.to(at::kFloat).contiguous());
    return TypedArray{owned.back().const_data_ptr(), unpack_type(owned.back())};
  };
  MatrixProduct m{};
  m.product = product;
  m.x = {x.const_data_ptr(), unpack_type(x)};
  m.row_inputs = x.size(1);
  if (bias.has_value()) m.bias = typed(*bias);
  if (residual.has_value()) m.residual = typed(*residual);
  m.out = {out.const_data_ptr(), unpack_type(out)};
  TORCHQUANT_LAUNCH(matrix_product, m);
}

// float x times the weight in its dtype, for CUDA.
at::Tensor linear_in_floats(const at::Tensor& x, const PackedWeight& weight,
                            const std::optional<at::Tensor>& bias, Epilogue epilogue,
                            const std::optional<at::Tensor>& residual) {
  std::optional<at::Tensor> own_bias;
  if (bias.has_value()) own_bias = bias->to(x.scalar_type());
  at::Tensor y = at::linear(x, unpacked(weight, x.options().requires_grad(false)), own_bias);
  if (epilogue == Epilogue::gelu) y = at::gelu(y.to(at::kFloat));
  if (epilogue == Epilogue::silu) y = at::silu(y.to(at::kFloat));
  if (residual.has_value()) y = y.to(at::kFloat).add(residual->to(at::kFloat));
  return y.to(x.scalar_type());
}

}  // namespace torchquant
