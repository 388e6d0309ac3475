// Calls an operator by its schema, as Python does: positional arguments, then keywords, then the
// schema's defaults. A program written so keeps working when an operator gets new options.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <map>
#include <string>
#include <vector>

namespace torchquant {

using Keywords = std::map<std::string, c10::IValue>;

inline std::vector<at::Tensor> call(const std::string& name,
                                    const std::vector<c10::IValue>& positional,
                                    const Keywords& keywords = {}) {
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(("torchquant::" + name).c_str(), "");
  const std::vector<c10::Argument>& arguments = op.schema().arguments();
  for (const auto& [key, value] : keywords) {
    TORCH_CHECK_VALUE(op.schema().argumentIndexWithName(key), name, ": no argument ", key);
  }
  torch::jit::Stack stack = positional;
  for (size_t i = positional.size(); i < arguments.size(); ++i) {
    const auto given = keywords.find(arguments[i].name());
    stack.push_back(given != keywords.end() ? given->second : arguments[i].default_value().value());
  }
  op.callBoxed(&stack);
  std::vector<at::Tensor> results;
  for (const c10::IValue& value : stack) results.push_back(value.toTensor());
  return results;
}

}  // namespace torchquant
