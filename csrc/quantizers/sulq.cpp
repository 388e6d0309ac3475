#include <csrc/quantizers/sulq.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kChunk = 1 << 16;    // elements a task converts and encodes
constexpr int64_t kRowsPerChunk = 16;  // of a product
// Up to so many thresholds, comparing with all of them is the fastest; with vectors of 4, up to
// few.
constexpr int64_t kMaxCounted = 15, kMaxCountedScalar = 3;
constexpr int64_t kMaxBuckets = 4096;   // 16 KB: half of the first-level cache
constexpr int32_t kEnoughCompares = 2;  // finer buckets than this gain nothing
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void check_table(const char* op, const char* argument, const at::Tensor& table, int64_t largest) {
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, op, ": ", argument, " must be float32, got ",
                   table.scalar_type());
  TORCH_CHECK_VALUE(table.dim() == 1 && table.size(0) <= largest, op, ": ", argument,
                    " must be a vector of at most ", largest, " entries, got shape ",
                    table.sizes());
}

void check_codes(const char* op, const at::Tensor& codes) {
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, op, ": codes must be uint8, got ",
                   codes.scalar_type());
}

void check_eta(const char* op, const at::Tensor& eta) {
  TORCH_CHECK_TYPE(eta.scalar_type() == at::kFloat, op, ": eta must be float32, got ",
                   eta.scalar_type());
  TORCH_CHECK_VALUE(eta.numel() == 1, op, ": eta must hold one value, got shape ", eta.sizes());
}

// --- encode ---

// Thresholds in rising order without those that nothing exceeds, and the buckets over them.
struct Lookup {
  std::vector<float> thresholds;  // and one more, infinite
  std::vector<int32_t> start;     // empty when every threshold is to be compared
  uint32_t first_bucket = 0;
  uint32_t last_bucket = 0;
  int32_t bucket_shift = 0;
  int32_t compares = 0;

  int64_t count() const { return static_cast<int64_t>(thresholds.size()) - 1; }
  void apply_to(SulqEncode& encode) const {
    encode.thresholds = thresholds.data();
    encode.threshold_count = count();
    encode.start = start.empty() ? nullptr : start.data();
    encode.first_bucket = first_bucket;
    encode.last_bucket = last_bucket;
    encode.bucket_shift = bucket_shift;
    encode.compares = compares;
  }
};

// Buckets of 2^bucket_shift neighbouring floats; false when there would be too many.
bool make_buckets(Lookup& lookup, int32_t shift) {
  const float* thresholds = lookup.thresholds.data();
  const int64_t count = lookup.count();
  const auto bucket_of = [&](int64_t t) { return ordered_pattern(thresholds[t]) >> shift; };
  const uint32_t first = bucket_of(0), last = bucket_of(count - 1);
  const int64_t buckets = int64_t{last} - first + 1;
  if (buckets > kMaxBuckets) return false;
  lookup.first_bucket = first;
  lookup.last_bucket = last;
  lookup.bucket_shift = shift;
  lookup.compares = 0;
  lookup.start.assign(static_cast<size_t>(buckets), 0);
  int64_t t = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    lookup.start[static_cast<size_t>(b)] = static_cast<int32_t>(t);
    while (t < count && bucket_of(t) == first + b) ++t;
    lookup.compares =
        std::max(lookup.compares, static_cast<int32_t>(t) - lookup.start[static_cast<size_t>(b)]);
  }
  return true;
}

Lookup lookup_of(const char* op, const at::Tensor& table) {  // float32 [T], on the CPU
  const float* values = table.const_data_ptr<float>();
  Lookup lookup;
  for (int64_t t = 0; t < table.numel(); ++t) {
    TORCH_CHECK_VALUE(t == 0 ? !std::isnan(values[0]) : values[t - 1] <= values[t], op,
                      ": thresholds must rise, got ", table);
    if (values[t] < kInfinity) lookup.thresholds.push_back(values[t] + 0.0f);  // -0 counts as 0
  }
  lookup.thresholds.push_back(kInfinity);
  if (lookup.count() <= (cpu_tier() == CpuTier::scalar ? kMaxCountedScalar : kMaxCounted))
    return lookup;
  for (int32_t shift = kFloatMantissa; shift >= 0 && make_buckets(lookup, shift); --shift) {
    if (lookup.compares <= kEnoughCompares) break;
  }
  return lookup;
}

void encode(const char* op, const at::Tensor& x, const at::Tensor& thresholds,
            const at::Tensor& codes) {
  const at::Tensor flat = x.contiguous().view(-1), table = thresholds.contiguous();
  const auto part = [&](const at::Tensor& values, int64_t first) {
    return SulqEncode{values.const_data_ptr<float>(),
                      values.numel(),
                      table.const_data_ptr<float>(),
                      table.numel(),
                      nullptr,
                      0,
                      0,
                      0,
                      0,
                      codes.mutable_data_ptr<uint8_t>() + first};
  };
  if (x.is_cuda()) {
    TORCHQUANT_LAUNCH(sulq_encode, part(flat.to(at::kFloat), 0));
    return;
  }
  const Lookup lookup = lookup_of(op, table);
  for_each_chunk((flat.numel() + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t first = chunk * kChunk, count = std::min(kChunk, flat.numel() - first);
    const at::Tensor values = flat.narrow(0, first, count).to(at::kFloat);
    SulqEncode here = part(values, first);
    lookup.apply_to(here);
    sulq_encode(here);
  });
}

at::Tensor sulq_quantize(const at::Tensor& x,             // any shape
                         const at::Tensor& thresholds) {  // [T], rising
  const char* op = "sulq_quantize";
  check_device(op, x);
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                   ": x must be float32, float16 or bfloat16, got ", type);
  check_table(op, "thresholds", thresholds, kSulqMaxLevels - 1);
  check_same_device(op, "thresholds", thresholds, x);

  const c10::DeviceGuard guard(x.device());
  const at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kByte));
  if (x.numel() > 0) encode(op, x, thresholds, codes);
  return codes;
}

// --- decode ---

at::Tensor sulq_dequantize(const at::Tensor& codes,      // any shape
                           const at::Tensor& exponents,  // [L]
                           const at::Tensor& eta) {      // []
  const char* op = "sulq_dequantize";
  check_device(op, codes);
  check_codes(op, codes);
  check_table(op, "exponents", exponents, kSulqMaxLevels);
  check_eta(op, eta);
  check_same_device(op, "exponents", exponents, codes);
  check_same_device(op, "eta", eta, codes);

  const c10::DeviceGuard guard(codes.device());
  const at::Tensor out = at::empty(codes.sizes(), codes.options().dtype(at::kFloat));
  if (codes.numel() == 0) return out;
  // In float64, so that one rounding makes the value. A code without a level is NaN.
  const at::Tensor values =
      at::full({kSulqMaxLevels}, std::numeric_limits<float>::quiet_NaN(), out.options());
  values.narrow(0, 0, exponents.size(0))
      .copy_(at::exp2(exponents.to(at::kDouble)).sub_(eta.to(at::kDouble).squeeze()));
  const at::Tensor flat = codes.contiguous();
  const auto part = [&](int64_t first, int64_t count) {
    return SulqDecode{flat.const_data_ptr<uint8_t>() + first, count, values.const_data_ptr<float>(),
                      out.mutable_data_ptr<float>() + first};
  };
  if (codes.is_cuda()) {
    TORCHQUANT_LAUNCH(sulq_decode, part(0, flat.numel()));
    return out;
  }
  for_each_chunk((flat.numel() + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t first = chunk * kChunk;
    sulq_decode(part(first, std::min(kChunk, flat.numel() - first)));
  });
  return out;
}

// --- product ---

void check_product(const char* op, const at::Tensor& codes, const at::Tensor& exponents,
                   const at::Tensor& v) {
  check_device(op, codes);
  check_codes(op, codes);
  check_table(op, "exponents", exponents, kSulqMaxLevels);
  const auto type = v.scalar_type();
  TORCH_CHECK_TYPE(type == at::kChar || type == at::kByte || type == at::kShort, op,
                   ": v must be int8, uint8 or int16, got ", type);
  TORCH_CHECK_VALUE(codes.dim() >= 2 && v.dim() == codes.dim() && v.size(-2) == codes.size(-1) &&
                        v.sizes().slice(0, v.dim() - 2) == codes.sizes().slice(0, v.dim() - 2),
                    op, ": codes [..., M, K] and v [..., K, N] must fit, got ", codes.sizes(),
                    " and ", v.sizes());
  TORCH_CHECK_VALUE(codes.size(-1) <= kSulqMaxInner, op, ": K must be at most ", kSulqMaxInner,
                    ", got ", codes.size(-1));
  check_same_device(op, "exponents", exponents, codes);
  check_same_device(op, "v", v, codes);
}

// The levels whose exponent is an integer plus `fraction`, as shifts above the smallest of them.
struct Shifts {
  std::vector<uint8_t> of_code = std::vector<uint8_t>(kSulqMaxLevels, kSulqNothing);
  double smallest = 0;  // exponent of shift 0
  int64_t largest = 0;  // shift
  bool any = false;
};

Shifts shifts_of(const char* op, const at::Tensor& exponents, double fraction) {
  const at::Tensor table = exponents.to(at::kCPU, at::kDouble).contiguous();
  const double* e = table.const_data_ptr<double>();
  Shifts shifts;
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < table.numel(); ++i) {
    TORCH_CHECK_VALUE(e[i] == -kInfinity || (std::abs(e[i]) < 1024 && std::fmod(2 * e[i], 1) == 0),
                      op, ": exponents must be multiples of 1/2 or -inf, got ", e[i]);
    if (e[i] - std::floor(e[i]) != fraction) continue;  // -inf: NaN
    shifts.smallest = shifts.any ? std::min(shifts.smallest, e[i]) : e[i];
    shifts.any = true;
    chosen.push_back(i);
  }
  for (const int64_t i : chosen) {
    const double shift = e[i] - shifts.smallest;
    TORCH_CHECK_VALUE(shift <= kSulqMaxShift, op, ": exponents must span at most ", kSulqMaxShift,
                      ", got ", shift);
    shifts.of_code[static_cast<size_t>(i)] = static_cast<uint8_t>(shift);
    shifts.largest = std::max(shifts.largest, static_cast<int64_t>(shift));
  }
  return shifts;
}

at::Tensor shift_sums(const at::Tensor& codes, const Shifts& shifts, const at::Tensor& v) {
  std::vector<int64_t> shape = codes.sizes().vec();
  shape.back() = v.size(-1);
  const at::Tensor sums = at::zeros(shape, codes.options().dtype(at::kLong));
  if (sums.numel() == 0 || codes.numel() == 0 || !shifts.any) return sums;
  const at::Tensor a = codes.contiguous(), b = v.to(at::kShort).contiguous();
  const at::Tensor table = at::tensor(at::ArrayRef<uint8_t>(shifts.of_code), codes.options());
  const int64_t rows = codes.size(-2), inner = codes.size(-1), columns = v.size(-1);
  const int64_t batches = codes.numel() / (rows * inner);
  const int64_t largest_v = v.scalar_type() == at::kShort ? 1 << 15 : 1 << 8;
  const bool narrow = inner * largest_v << shifts.largest < int64_t{1} << 31;
  const auto part = [&](int64_t batch, int64_t count, int64_t first, int64_t rows_here) {
    const int64_t row = batch * rows + first;
    return SulqShiftMatmul{a.const_data_ptr<uint8_t>() + row * inner,
                           table.const_data_ptr<uint8_t>(),
                           b.const_data_ptr<int16_t>() + batch * inner * columns,
                           count,
                           rows_here,
                           inner,
                           columns,
                           narrow,
                           sums.mutable_data_ptr<int64_t>() + row * columns};
  };
  if (codes.is_cuda()) {
    TORCHQUANT_LAUNCH(sulq_shift_matmul, part(0, batches, 0, rows));
    return sums;
  }
  const int64_t chunks = (rows + kRowsPerChunk - 1) / kRowsPerChunk;
  for_each_chunk(batches * chunks, [&](int64_t chunk) {
    const int64_t first = chunk % chunks * kRowsPerChunk;
    sulq_shift_matmul(part(chunk / chunks, 1, first, std::min(kRowsPerChunk, rows - first)));
  });
  return sums;
}

at::Tensor sulq_shift_matmul_op(const at::Tensor& codes,      // [..., M, K]
                                const at::Tensor& exponents,  // [L]
                                const at::Tensor& v) {        // [..., K, N]
  const char* op = "sulq_shift_matmul";
  check_product(op, codes, exponents, v);
  const c10::DeviceGuard guard(codes.device());
  TORCH_CHECK_VALUE(!shifts_of(op, exponents, 0.5).any, op,
                    ": exponents must be integers or -inf, got ", exponents);
  return shift_sums(codes, shifts_of(op, exponents, 0), v);
}

// (2^E - eta) V = 2^E V - eta 1 (1^T V): shifted integer sums and one correction per column.
at::Tensor sulq_matmul(const at::Tensor& codes,      // [..., M, K]
                       const at::Tensor& exponents,  // [L]
                       const at::Tensor& eta,        // []
                       const at::Tensor& v) {        // [..., K, N]
  const char* op = "sulq_matmul";
  check_product(op, codes, exponents, v);
  check_eta(op, eta);
  check_same_device(op, "eta", eta, codes);
  const c10::DeviceGuard guard(codes.device());
  const at::Tensor column_sums = at::sum(v, {-2}, true, at::kLong).to(at::kDouble);
  at::Tensor out = column_sums.mul(eta.to(at::kDouble).squeeze()).neg();
  for (const double fraction : {0.0, 0.5}) {
    const Shifts shifts = shifts_of(op, exponents, fraction);
    out = out.add(shift_sums(codes, shifts, v).to(at::kDouble), std::exp2(shifts.smallest));
  }
  return out.to(at::kFloat);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def("sulq_quantize(Tensor x, Tensor thresholds) -> Tensor");
  m.def("sulq_dequantize(Tensor codes, Tensor exponents, Tensor eta) -> Tensor");
  m.def("sulq_shift_matmul(Tensor codes, Tensor exponents, Tensor v) -> Tensor");
  m.def("sulq_matmul(Tensor codes, Tensor exponents, Tensor eta, Tensor v) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("sulq_quantize", sulq_quantize);
  m.impl("sulq_dequantize", sulq_dequantize);
  m.impl("sulq_shift_matmul", sulq_shift_matmul_op);
  m.impl("sulq_matmul", sulq_matmul);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("sulq_quantize", sulq_quantize);
  m.impl("sulq_dequantize", sulq_dequantize);
  m.impl("sulq_shift_matmul", sulq_shift_matmul_op);
  m.impl("sulq_matmul", sulq_matmul);
}
#endif

}  // namespace torchquant
