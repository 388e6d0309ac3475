// The operators through the dispatcher, without Python: results, tiers, and memory fenced with
// guard pages.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <csrc/core/cpu_tier.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <map>
#include <string>
#include <vector>

namespace torchquant {
namespace {

using Keywords = std::map<std::string, c10::IValue>;
using Tensors = std::vector<at::Tensor>;

// Calls torchquant::name by its schema: positional arguments, then keywords, then defaults.
Tensors call(const std::string& name, const std::vector<c10::IValue>& positional,
             const Keywords& keywords = {}) {
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(("torchquant::" + name).c_str(), "");
  torch::jit::Stack stack = positional;
  for (size_t i = positional.size(); i < op.schema().arguments().size(); ++i) {
    const auto& argument = op.schema().arguments()[i];
    const auto given = keywords.find(argument.name());
    stack.push_back(given != keywords.end() ? given->second : argument.default_value().value());
  }
  op.callBoxed(&stack);
  Tensors results;
  for (const c10::IValue& value : stack) results.push_back(value.toTensor());
  return results;
}

struct Layer {
  at::Tensor weight;  // [N, K]
  at::Tensor gram;    // [K, K]
};

Layer random_layer(int64_t rows, int64_t columns) {
  at::manual_seed(rows * 1000 + columns);
  const at::Tensor x = at::randn({2 * columns + 3, columns}).mm(at::randn({columns, columns}));
  return {at::randn({rows, columns}), x.t().mm(x)};
}

double objective(const Layer& layer, const Tensors& quantized) {
  const Tensors error = call("quantization_error",
                             {layer.weight, layer.gram, quantized[0], quantized[1], quantized[2]});
  return error[0].sum().item<double>();
}

// Every solver with every order on one layer.
std::map<std::string, Tensors> solve_all(const Layer& layer, int64_t group_size) {
  const Keywords base = {{"bits", 3}, {"group_size", group_size}};
  const auto with = [&](const std::string& key, const std::string& value) {
    Keywords keywords = base;
    keywords[key] = value;
    return keywords;
  };
  std::map<std::string, Tensors> results;
  results["rtn"] = call("rtn_quantize", {layer.weight}, base);
  results["magr"] = call("magr_preprocess", {layer.weight, layer.gram},
                         {{"iters", 20}, {"group_size", group_size}});
  for (const char* order : {"shared", "greedy", "semi", "cyclic"}) {
    results[std::string("comq ") + order] =
        call("comq_quantize", {layer.weight, layer.gram}, with("order", order));
  }
  results["gptq"] = call("gptq_quantize", {layer.weight, layer.gram}, base);
  results["gptq activation"] =
      call("gptq_quantize", {layer.weight, layer.gram}, with("order", "activation"));
  const at::Tensor gram = at::zeros_like(layer.gram);
  call("gram_accumulate_", {gram, layer.weight});
  results["gram"] = {gram};
  return results;
}

const std::vector<std::vector<int64_t>> kShapes = {{1, 1, 0},    {1, 7, 0},    {7, 1, 0},
                                                   {3, 17, 5},   {33, 64, 16}, {65, 130, 0},
                                                   {40, 200, 48}};  // N, K, group size

// Packed layers, attention and LayerNorm of odd sizes: floats, grids and codes on both sides.
std::map<std::string, Tensors> run_packed() {
  at::manual_seed(1);
  const auto codes = [](at::IntArrayRef shape, int64_t levels) {
    return at::randint(levels, shape, at::kByte);
  };
  const auto number = [](double value) { return at::full({}, value, at::kFloat); };
  const Keywords input = {{"input_scale", number(0.03)}, {"input_zero_point", number(120.0)}};
  const Keywords output = {{"output_scale", number(0.05)}, {"output_zero_point", number(100.0)}};
  const auto joined = [](Keywords all, const Keywords& more) {
    all.insert(more.begin(), more.end());
    return all;
  };
  std::map<std::string, Tensors> results;
  for (const auto& [rows, outputs, columns, bits] :
       std::vector<std::array<int64_t, 4>>{{1, 17, 33, 4}, {7, 70, 100, 3}, {45, 131, 65, 8}}) {
    const Tensors packed =
        call("linear_prepack", {codes({outputs, columns}, 1 << bits), at::rand({outputs, 1})},
             {{"bits", bits}});
    const Keywords sizes = {{"bits", bits},
                            {"in_features", columns},
                            {"out_features", outputs},
                            {"activation", "gelu"}};
    const at::Tensor x = at::randn({rows, columns});
    const std::string name = "linear of " + std::to_string(rows) + " rows, ";
    results[name + "floats"] = call("quantized_linear", {x, packed[0], packed[1]}, sizes);
    results[name + "codes"] =
        call("quantized_linear", {codes({rows, columns}, 256), packed[0], packed[1]},
             joined(joined(sizes, input), output));
  }
  for (const int64_t groups : {1, 2, 6}) {
    for (const int64_t kernel : {1, 3}) {
      const std::vector<int64_t> window = {kernel, kernel};
      const int64_t outputs = groups == 6 ? 6 : 18, columns = 6 / groups * kernel * kernel;
      const Tensors packed =
          call("conv_prepack", {codes({outputs, columns}, 16), at::rand({outputs, 1})},
               {{"bits", 4}, {"kernel_size", window}, {"groups", groups}});
      for (const auto memory : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
        for (const int64_t stride : {1, 2}) {
          const Keywords sizes = {{"bits", 4},
                                  {"in_channels", 6},
                                  {"out_channels", outputs},
                                  {"kernel_size", window},
                                  {"stride", std::vector<int64_t>{stride, stride}},
                                  {"padding", std::vector<int64_t>{kernel / 2, kernel / 2}},
                                  {"groups", groups}};
          const at::Tensor x = at::randn({2, 6, 11, 9}).contiguous(memory);
          const at::Tensor c = codes({2, 6, 11, 9}, 256).contiguous(memory);
          const std::string name = "convolution " + std::to_string(groups) + " " +
                                   std::to_string(kernel) + " " + std::to_string(stride) +
                                   (memory == at::MemoryFormat::Contiguous ? "" : " last");
          const at::Tensor &weight = packed[0], &grid = packed[1];
          results[name] = call("quantized_conv2d", {x, weight, grid}, sizes);
          results[name + " grid"] =
              call("quantized_conv2d", {x, weight, grid}, joined(sizes, input));
          results[name + " codes"] =
              call("quantized_conv2d", {c, weight, grid}, joined(sizes, input));
          results[name + " codes to codes"] =
              call("quantized_conv2d", {c, weight, grid}, joined(joined(sizes, input), output));
        }
      }
    }
  }
  Keywords grids = {{"softmax_scale", number(1.0 / 255)}, {"softmax_zero_point", number(0.0)}};
  for (const char* operand : {"query", "key", "value"}) {
    grids[std::string(operand) + "_scale"] = number(0.03);
    grids[std::string(operand) + "_zero_point"] = number(128.0);
  }
  for (const auto& [rows, keys, width] :
       std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {13, 21, 9}, {50, 70, 33}}) {
    const std::string name = "attention of " + std::to_string(keys) + " keys, ";
    const at::Tensor q = at::randn({2, rows, width}), k = at::randn({2, keys, width}),
                     v = at::randn({2, keys, width});
    results[name + "softmax alone"] =
        call("quantized_attention", {q, k, v},
             {{"softmax_scale", number(1.0 / 255)}, {"softmax_zero_point", number(0.0)}});
    results[name + "grids"] = call("quantized_attention", {q, k, v}, grids);
    results[name + "codes"] = call(
        "quantized_attention",
        {codes({2, rows, width}, 256), codes({2, keys, width}, 256), codes({2, keys, width}, 256)},
        joined(grids, output));
  }
  for (const auto& [rows, columns] :
       std::vector<std::array<int64_t, 2>>{{1, 1}, {3, 31}, {7, 32}, {600, 97}}) {
    for (const auto type : {at::kFloat, at::kHalf, at::kBFloat16}) {
      const at::Tensor x = at::randn({rows, columns}).to(type);
      results["LayerNorm of " + std::to_string(columns) + " columns, " + c10::toString(type)] =
          call("quantized_layer_norm", {x, at::rand({columns}), at::randn({columns})}, output);
    }
  }
  return results;
}

TEST(Operators, SolversBeatRounding) {
  const Layer layer = random_layer(48, 96);
  const double rounded = objective(layer, call("rtn_quantize", {layer.weight}, {{"bits", 3}}));
  for (const auto& [name, result] : solve_all(layer, 0)) {
    if (name.rfind("comq", 0) != 0 && name.rfind("gptq", 0) != 0) continue;
    EXPECT_LT(objective(layer, result), 0.7 * rounded) << name;
    EXPECT_EQ(result[3][0].item<int64_t>(), 0) << name;
  }
}

TEST(Operators, GramIsTheProduct) {
  const at::Tensor x = at::randn({50, 20});
  const at::Tensor gram = at::eye(20);
  call("gram_accumulate_", {gram, x});
  EXPECT_TRUE(at::allclose(gram, at::eye(20) + x.t().mm(x), 1e-5, 1e-4));
}

TEST(Operators, ErrorsNameOperatorAndArgument) {
  const Layer layer = random_layer(4, 8);
  try {
    call("comq_quantize", {layer.weight, layer.gram.narrow(0, 0, 7)}, {{"bits", 4}});
    FAIL() << "a Gram that is not square must be refused";
  } catch (const c10::ValueError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("comq_quantize: gram must be square of size K=8, got [7, 8]"),
              std::string::npos)
        << text;
  }
}

TEST(Tiers, GiveTheSameBits) {
  const std::string before = cpu_tier_name();
  for (const auto& shape : kShapes) {
    const Layer layer = random_layer(shape[0], shape[1]);
    set_cpu_tier("scalar");
    const auto wanted = solve_all(layer, shape[2]);
    for (const std::string& tier : cpu_tiers()) {
      set_cpu_tier(tier);
      for (const auto& [name, result] : solve_all(layer, shape[2])) {
        if (name == "magr")
          continue;  // a real-valued result, compared within rounding by its own tests
        for (size_t i = 0; i < result.size(); ++i) {
          EXPECT_TRUE(at::equal(result[i], wanted.at(name)[i]))
              << name << " on " << tier << ", output " << i << ", shape " << shape[0] << " x "
              << shape[1];
        }
      }
    }
  }
  set_cpu_tier(before);
}

TEST(Tiers, GiveTheSameBitsOfPackedLayers) {
  const std::string before = cpu_tier_name();
  set_cpu_tier("scalar");
  const auto wanted = run_packed();
  for (const std::string& tier : cpu_tiers()) {
    set_cpu_tier(tier);
    for (const auto& [name, result] : run_packed())
      EXPECT_TRUE(at::equal(result[0], wanted.at(name)[0])) << name << " on " << tier;
  }
  set_cpu_tier(before);
}

TEST(Tiers, AnAbsentOneIsRefused) { EXPECT_THROW(set_cpu_tier("mmx"), std::invalid_argument); }

// Gives every tensor pages of its own: its last byte lies before a page that must not be touched,
// and the bytes between the start of its pages and its first byte hold a pattern that must survive.
class FencedAllocator final : public c10::Allocator {
 public:
  struct Block {
    char* pages;
    char* data;
    size_t mapped;
  };

  c10::DataPtr allocate(size_t bytes) override {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (bytes + page - 1) / page * page;
    const size_t mapped = usable + 2 * page;
    char* pages = static_cast<char*>(
        mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    TORCH_CHECK(pages != MAP_FAILED, "mmap failed");
    mprotect(pages, page, PROT_NONE);
    mprotect(pages + page + usable, page, PROT_NONE);
    char* data = pages + page + usable - bytes;
    for (char* c = pages + page; c < data; ++c) *c = kPattern;
    auto* block = new Block{pages, data, mapped};
    return {data, block, &FencedAllocator::release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, std::size_t count) const override {
    default_copy_data(target, source, count);
  }

  static std::atomic<int> damaged;
  static std::atomic<int> released;

 private:
  static constexpr char kPattern = 0x5a;
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    for (char* c = block->pages + sysconf(_SC_PAGESIZE); c < block->data; ++c)
      damaged += *c != kPattern;
    munmap(block->pages, block->mapped);
    ++released;
    delete block;
  }
};
std::atomic<int> FencedAllocator::damaged{0};
std::atomic<int> FencedAllocator::released{0};

TEST(Memory, NothingOutsideATensorIsTouched) {
  c10::Allocator* const before = c10::GetCPUAllocator();
  static FencedAllocator fenced;
  const std::string tier_before = cpu_tier_name();
  c10::SetCPUAllocator(&fenced, /*priority=*/255);
  for (const std::string& tier : cpu_tiers()) {
    set_cpu_tier(tier);
    for (const auto& shape : kShapes) solve_all(random_layer(shape[0], shape[1]), shape[2]);
    run_packed();
  }
  c10::SetCPUAllocator(before, /*priority=*/255);
  set_cpu_tier(tier_before);
  EXPECT_EQ(FencedAllocator::damaged, 0);
  EXPECT_GT(FencedAllocator::released, 100);
}

}  // namespace
}  // namespace torchquant
