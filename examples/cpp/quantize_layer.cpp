// Quantizes a layer with COMQ and runs two quantized models, without Python.
// usage: quantize_layer FOLDER   (layer.pt, cnn.pt and vit.pt in it are written by make_inputs.py)
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "operators.h"

namespace {

using Tensors = std::map<std::string, at::Tensor>;

// What Python's torch.save({name: tensor}) wrote.
Tensors load_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "quantize_layer: cannot read ", path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)),
                                std::istreambuf_iterator<char>());
  Tensors tensors;
  for (const auto& item : torch::jit::pickle_load(bytes).toGenericDict()) {
    tensors[item.key().toStringRef()] = item.value().toTensor();
  }
  return tensors;
}

bool report(const char* what, bool holds) {
  std::cout << (holds ? "ok      " : "DIFFERS ") << what << std::endl;
  return holds;
}

// The layer that Python quantized, quantized again here: the same bits must come out.
bool quantize_layer(const Tensors& layer) {
  const at::Tensor weight = layer.at("weight"), inputs = layer.at("inputs");
  const at::Tensor gram = at::zeros({weight.size(1), weight.size(1)});
  torchquant::call("gram_accumulate_", {gram, inputs});
  const auto here = torchquant::call("comq_quantize", {weight, gram},
                                     {{"bits", layer.at("bits").item<int64_t>()},
                                      {"group_size", layer.at("group_size").item<int64_t>()}});
  std::cout << "weight " << weight.sizes() << ", " << inputs.size(0) << " inputs, status "
            << here[3][0].item<int64_t>() << "\n";
  bool same = report("gram", at::equal(gram, layer.at("gram")));
  same &= report("codes", at::equal(here[0], layer.at("codes")));
  same &= report("scale", at::equal(here[1], layer.at("scale")));
  return report("zero point", at::equal(here[2], layer.at("zero_point"))) && same;
}

// The model that Python quantized and scripted. Its float products may be summed in another order,
// so outputs get a tolerance.
bool run_model(const std::string& folder, const std::string& name, const Tensors& written) {
  torch::jit::Module model = torch::jit::load(folder + "/" + name + ".pt");
  const at::Tensor outputs = model.forward({written.at(name + "_inputs")}).toTensor();
  const bool same = at::allclose(outputs, written.at(name + "_outputs"), 1e-5, 1e-5);
  return report(("outputs of " + name).c_str(), same);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::cerr << "usage: quantize_layer FOLDER\n";
    return 2;
  }
  const std::string folder = argv[1];
  const torch::InferenceMode no_autograd;
  const Tensors layer = load_tensors(folder + "/layer.pt");
  bool same = quantize_layer(layer);
  for (const char* name : {"cnn", "vit"}) same = run_model(folder, name, layer) && same;
  return same ? 0 : 1;
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
