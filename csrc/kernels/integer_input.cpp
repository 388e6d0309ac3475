#include <csrc/kernels/integer_input.h>

#include <csrc/core/check.h>

namespace torchquant {

void check_input(const char* op, const at::Tensor& x, const InputGrid& grid, const char* part,
                 int64_t count) {
  const auto type = x.scalar_type();
  const bool codes = type == at::kByte;
  TORCH_CHECK_TYPE(codes || type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                   ": x must be float32, float16, bfloat16 or uint8 codes, got ", type);
  TORCH_CHECK_VALUE(grid.dynamic() == !grid.zero_point.has_value(), op,
                    ": input_scale and input_zero_point must be given together");
  TORCH_CHECK_VALUE(!codes || !grid.dynamic(), op, ": x of codes needs input_scale");
  if (grid.symmetric.has_value()) {
    TORCH_CHECK_VALUE(grid.dynamic(), op, ": input_symmetric must be None with input_scale");
    check_bits(op, grid.bits);
    return;
  }
  if (grid.dynamic()) {
    TORCH_CHECK_VALUE(grid.bits == 8 || grid.bits == 16, op,
                      ": input_bits must be 8 or 16 where the scale comes from x, got ", grid.bits);
    return;
  }
  check_bits(op, grid.bits);
  const int64_t numbers = grid.scale->numel();
  for (const auto& [name, tensor] :
       {std::pair{"input_scale", &*grid.scale}, {"input_zero_point", &*grid.zero_point}}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ",
                     tensor->scalar_type());
    check_same_device(op, name, *tensor, x);
    TORCH_CHECK_VALUE(tensor->numel() == numbers && (numbers == 1 || (codes && numbers == count)),
                      op, ": ", name, " must be one number",
                      codes ? std::string(" or one for each ") + part : std::string(), ", got ",
                      tensor->sizes());
  }
}

Epilogue parse_epilogue(const char* op, std::string_view name) {
  if (name == "none") return Epilogue::none;
  if (name == "gelu") return Epilogue::gelu;
  TORCH_CHECK_VALUE(name == "silu", op, ": activation must be none, gelu or silu, got '", name,
                    "'");
  return Epilogue::silu;
}

}  // namespace torchquant
