// Packing of codes, the one layout of every integer format (compressed-tensors, GPTQ along K, AWQ
// after a permutation): dense, little-endian, 32-bit words.
#include <csrc/kernels/pack.h>

#include <ATen/ops/any.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <torch/library.h>

namespace torchquant {
namespace {

constexpr int64_t kCodesPerChunk = 1 << 16;  // some microseconds: well above what a task costs

// One bit is no grid, but it is a layout: a plane of flags, or of a code's lowest bits.
void check_code_bits(const char* op, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, op, ": bits must be 1..8, got ", bits);
}

void check_rows(const char* op, const char* argument, const char* shape, const at::Tensor& tensor,
                at::ScalarType type, const char* type_name) {
  TORCH_CHECK_VALUE(tensor.dim() == 2, op, ": ", argument, " must be a matrix ", shape,
                    ", got shape ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, op, ": ", argument, " must be ", type_name,
                   ", got ", tensor.scalar_type());
}

// How rows are cut into chunks: by the problem alone on the CPU, not at all on CUDA.
struct Chunks {
  int64_t rows;
  int64_t step;

  Chunks(const at::Tensor& tensor, int64_t columns) : rows(tensor.size(0)) {
    const int64_t fitting = kCodesPerChunk / std::max<int64_t>(columns, 1);
    step = tensor.is_cuda() ? std::max<int64_t>(rows, 1) : std::max<int64_t>(fitting, 1);
  }

  int64_t count() const { return (rows + step - 1) / step; }
  int64_t first(int64_t chunk) const { return chunk * step; }
  int64_t length(int64_t chunk) const { return std::min(step, rows - first(chunk)); }

  template <class Run>
  void for_each(const at::Tensor& tensor, const Run& run) const {
    if (tensor.is_cuda()) return run(int64_t{0});  // on the caller's stream
    for_each_chunk(count(), run);
  }
};

at::Tensor pack_codes(const at::Tensor& codes,  // uint8 [N, K]
                      int64_t bits) {
  const char* op = "pack_codes";
  check_device(op, codes);
  check_code_bits(op, bits);
  check_rows(op, "codes", "[N, K]", codes, at::kByte, "uint8");
  const c10::DeviceGuard guard(codes.device());
  const int64_t columns = codes.size(1), words = packed_words(columns, bits);
  const at::Tensor packed = at::empty({codes.size(0), words}, codes.options().dtype(at::kInt));
  if (packed.numel() == 0) return packed;

  const at::Tensor rows = codes.contiguous();
  const Chunks chunks(codes, columns);
  const at::Tensor misfits = at::zeros({chunks.count()}, codes.options().dtype(at::kLong));
  const uint8_t* const first_code = rows.const_data_ptr<uint8_t>();
  auto* const first_word = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>());
  auto* const first_count =
      reinterpret_cast<unsigned long long*>(misfits.mutable_data_ptr<int64_t>());
  chunks.for_each(codes, [&](int64_t chunk) {
    const int64_t row = chunks.first(chunk);
    const PackRows work{
        chunks.length(chunk), columns, bits, first_code + row * columns, first_word + row * words,
        first_count + chunk};
    TORCHQUANT_RUN(pack_rows, codes, work);
  });
  TORCH_CHECK_VALUE(!at::any(misfits).item<bool>(), op, ": codes must be at most ", (1 << bits) - 1,
                    " for ", bits, " bits, got ", at::max(rows).item<int64_t>());
  return packed;
}

at::Tensor unpack_codes(const at::Tensor& packed,  // int32 [N, ceil(K * bits / 32)]
                        int64_t bits, int64_t columns) {
  const char* op = "unpack_codes";
  check_device(op, packed);
  check_code_bits(op, bits);
  TORCH_CHECK_VALUE(columns >= 0, op, ": columns must be 0 or more, got ", columns);
  check_rows(op, "packed", "[N, words]", packed, at::kInt, "int32");
  const int64_t words = packed_words(columns, bits);
  TORCH_CHECK_VALUE(packed.size(1) == words, op, ": packed must have ", words, " words a row for ",
                    columns, " columns of ", bits, " bits, got ", packed.sizes());
  const c10::DeviceGuard guard(packed.device());
  const at::Tensor codes = at::empty({packed.size(0), columns}, packed.options().dtype(at::kByte));
  if (codes.numel() == 0) return codes;

  const at::Tensor rows = packed.contiguous();
  const auto* const first_word = reinterpret_cast<const uint32_t*>(rows.const_data_ptr<int32_t>());
  uint8_t* const first_code = codes.mutable_data_ptr<uint8_t>();
  const Chunks chunks(packed, columns);
  chunks.for_each(packed, [&](int64_t chunk) {
    const int64_t row = chunks.first(chunk);
    const UnpackRows work{chunks.length(chunk), columns, bits, first_word + row * words,
                          first_code + row * columns};
    TORCHQUANT_RUN(unpack_rows, packed, work);
  });
  return codes;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def("pack_codes(Tensor codes, *, int bits) -> Tensor");
  m.def("unpack_codes(Tensor packed, *, int bits, int columns) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("pack_codes", pack_codes);
  m.impl("unpack_codes", unpack_codes);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("pack_codes", pack_codes);
  m.impl("unpack_codes", unpack_codes);
}
#endif

}  // namespace torchquant
