#include <csrc/core/permute.h>

#include <ATen/ops/empty.h>
#include <csrc/core/parallel.h>

namespace torchquant {
namespace {

constexpr int64_t kRowsPerChunk = 64;

// ATen's index_select copies column by column with one memcpy an element; this is several times
// faster. from, to [B, n, K]; order [B, K]; with by_rows (n = K) the rows are permuted as well.
template <class Element>
void permute(const Element* from, const int64_t* order, int64_t problems, int64_t rows,
             int64_t columns, bool by_rows, Element* to) {
  const int64_t total = problems * rows;
  for_each_chunk((total + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk) {
    const int64_t end = std::min(total, (chunk + 1) * kRowsPerChunk);
    for (int64_t row = chunk * kRowsPerChunk; row < end; ++row) {
      const int64_t problem = row / rows;
      const int64_t* __restrict__ columns_of = order + problem * columns;
      const int64_t source = by_rows ? problem * rows + columns_of[row - problem * rows] : row;
      const Element* __restrict__ row_from = from + source * columns;
      Element* __restrict__ row_to = to + row * columns;
      for (int64_t k = 0; k < columns; ++k) row_to[k] = row_from[columns_of[k]];
    }
  });
}

at::Tensor permuted(const at::Tensor& x, const at::Tensor& permutation, bool by_rows) {
  const at::Tensor from = x.contiguous(), order = permutation.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  const auto run = [&](const auto* in, auto* to) {
    permute(in, order.const_data_ptr<int64_t>(), x.size(0), x.size(1), x.size(2), by_rows, to);
  };
  if (x.scalar_type() == at::kByte) {
    run(from.const_data_ptr<uint8_t>(), out.mutable_data_ptr<uint8_t>());
  } else {
    run(from.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  }
  return out;
}

}  // namespace

at::Tensor permute_columns(const at::Tensor& x, const at::Tensor& permutation) {
  if (x.is_cuda()) return x.gather(2, permutation.unsqueeze(1).expand_as(x));
  return permuted(x, permutation, /*by_rows=*/false);
}

at::Tensor permute_gram(const at::Tensor& gram, const at::Tensor& permutation) {
  if (!gram.is_cuda()) return permuted(gram, permutation, /*by_rows=*/true);
  return permute_columns(gram.gather(1, permutation.unsqueeze(2).expand_as(gram)), permutation);
}

}  // namespace torchquant
