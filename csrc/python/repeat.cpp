// The one operator call that a module's forward came down to, made again without the Python in
// between for as long as it would come to the same: see torchquant/nn/repeat.py.
#include <csrc/python/repeat.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torchquant {
namespace {

namespace py = pybind11;

// What a dict held.
class Entries {
 public:
  // `except`: a value that is not kept, as it is what keeps the entries. Nor is the dict kept that
  // has it: whoever asks for changes knows that it is there.
  Entries(PyObject* dict, PyObject* except) : dict_(dict), except_(except) {
    bool holds_except = false;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value) != 0;) {
      entries_.emplace_back(py::reinterpret_borrow<py::object>(key), py::object());
      if (value != except) entries_.back().second = py::reinterpret_borrow<py::object>(value);
      holds_except = holds_except || value == except;
    }
    if (!holds_except) kept_dict_ = py::reinterpret_borrow<py::object>(dict);
  }

  bool unchanged() const {
    if (static_cast<size_t>(PyDict_GET_SIZE(dict_)) != entries_.size()) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (const auto& [kept_key, kept] : entries_) {
      PyDict_Next(dict_, &at, &key, &value);
      if (key != kept_key.ptr() || value != (kept ? kept.ptr() : except_)) return false;
    }
    return true;
  }

  int visit(visitproc visit, void* arg) const {
    Py_VISIT(kept_dict_.ptr());
    for (const auto& [key, value] : entries_) Py_VISIT(value.ptr());
    return 0;
  }

 private:
  PyObject* dict_;
  PyObject* except_;
  py::object kept_dict_;
  std::vector<std::pair<py::object, py::object>> entries_;
};

// What forward may ask of its input without reading it.
struct InputKind {
  explicit InputKind(const at::Tensor& x)
      : keys(x.key_set()), type(x.scalar_type()), device(x.device()), sizes(x.sizes().vec()) {}
  bool is_of(const at::Tensor& x) const {
    return x.key_set() == keys && x.scalar_type() == type && x.device() == device &&
           x.sizes() == at::IntArrayRef(sizes);
  }

  c10::DispatchKeySet keys;
  at::ScalarType type;
  at::Device device;
  std::vector<int64_t> sizes;
};

// Whether nobody but forward itself has a say in what becomes of x.
bool is_plain(py::handle x) {
  return THPVariable_CheckExact(x.ptr()) && !at::GradMode::is_enabled() &&
         !at::impl::torch_function_mode_enabled() && !c10::impl::dispatch_mode_enabled() &&
         !torch::jit::tracer::isTracing();
}

// Not owned: the object keeps it.
PyObject* dict_of(py::handle object) {
  return py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object.ptr(), nullptr)).ptr();
}

PyObject* dict_in(py::handle object, const char* name) {
  PyObject* dict = PyDict_GetItemString(dict_of(object), name);
  TORCH_CHECK_TYPE(dict != nullptr && PyDict_Check(dict), "Repeat: ", name, " must be a dict");
  return dict;
}

// Behind the first one, in the schema's order.
torch::jit::Stack arguments(const c10::FunctionSchema& schema, const py::tuple& args,
                            const py::dict& kwargs) {
  torch::jit::Stack stack;
  for (size_t i = 1; i < schema.arguments().size(); ++i) {
    const c10::Argument& argument = schema.arguments()[i];
    const py::str name(argument.name());
    if (i <= args.size()) {
      stack.push_back(torch::jit::toIValue(args[i - 1], argument.type()));
    } else if (kwargs.contains(name)) {
      stack.push_back(torch::jit::toIValue(kwargs[name], argument.type()));
    } else {
      stack.push_back(argument.default_value().value());
    }
  }
  return stack;
}

class Repeat {
 public:
  bool is_due(py::handle x) {
    if (!is_plain(x)) return false;
    ++asked_;
    return asked_ > 1 && (asked_ & (asked_ - 1)) == 0;
  }

  void keep(const py::list& modules) {
    clear();
    own_dict_ = dict_of(modules[0]);
    PyObject* const self = py::cast(this).ptr();
    for (const py::handle part : modules) {
      entries_.emplace_back(dict_of(part), self);
      for (const char* name :
           {"_modules", "_buffers", "_parameters", "_forward_hooks", "_forward_pre_hooks"})
        entries_.emplace_back(dict_in(part, name), self);
    }
    const py::module_ every = py::module_::import("torch.nn.modules.module");
    for (const char* name : {"_global_forward_hooks", "_global_forward_pre_hooks"})
      entries_.emplace_back(dict_in(every, name), self);
  }

  void keep_call(py::handle x, const std::string& op, const std::string& overload,
                 const py::tuple& args, const py::dict& kwargs) {
    op_ = c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), overload.c_str());
    rest_ = arguments(op_->schema(), args, kwargs);
    input_.emplace(THPVariable_Unpack(x.ptr()));
  }

  py::object call(py::handle module, py::handle x) {
    if (entries_.empty() || !is_plain(x) || dict_of(module) != own_dict_) return py::none();
    if (!unchanged()) {
      clear();
      asked_ = 0;
      return py::none();
    }
    const at::Tensor& input = THPVariable_Unpack(x.ptr());
    if (!op_.has_value() || !input_->is_of(input)) return py::none();
    torch::jit::Stack stack;
    stack.reserve(rest_.size() + 1);
    stack.emplace_back(input);
    stack.insert(stack.end(), rest_.begin(), rest_.end());
    const c10::OperatorHandle op = *op_;
    try {
      const py::gil_scoped_release released;
      op.callBoxed(stack);
    } catch (const c10::Error&) {
      return py::none();  // the module's own call says what is wrong
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(stack.front().toTensor()));
  }

  int visit(visitproc visit, void* arg) const {
    for (const Entries& entries : entries_)
      if (const int stop = entries.visit(visit, arg); stop != 0) return stop;
    return 0;
  }

  bool unchanged() const {
    for (const Entries& entries : entries_)
      if (!entries.unchanged()) return false;
    return true;
  }

  // What is let go may run Python, and so a collection that visits what is left.
  void clear() {
    const std::vector<Entries> entries = std::exchange(entries_, {});
    const torch::jit::Stack rest = std::exchange(rest_, {});
    op_.reset();
  }

 private:
  int64_t asked_ = 0;
  std::optional<c10::OperatorHandle> op_;
  std::optional<InputKind> input_;
  torch::jit::Stack rest_;
  PyObject* own_dict_ = nullptr;
  std::vector<Entries> entries_;
};

// For the garbage collector.
int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!py::detail::is_holder_constructed(self)) return 0;
  return py::cast<Repeat&>(py::handle(self)).visit(visit, arg);
}

int clear(PyObject* self) {
  if (py::detail::is_holder_constructed(self)) py::cast<Repeat&>(py::handle(self)).clear();
  return 0;
}

void collected(PyHeapTypeObject* type) {
  type->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->ht_type.tp_traverse = traverse;
  type->ht_type.tp_clear = clear;
}

}  // namespace

void bind_repeat(py::module_& m) {
  py::class_<Repeat>(m, "Repeat", py::custom_type_setup(collected),
                     "An operator call that may stand for a module's forward.")
      .def(py::init<>())
      .def("is_due", &Repeat::is_due, py::arg("x"),
           "Whether module(x) is to be watched: its second, fourth, eighth, ... call.")
      .def("keep", &Repeat::keep, py::arg("modules"),
           "Remember the state of a module, the first one, and of all modules below it.")
      .def("keep_call", &Repeat::keep_call, py::arg("x"), py::arg("op"), py::arg("overload"),
           py::arg("args"), py::arg("kwargs"),
           "Stand for module(x), which was op(x, *args, **kwargs).")
      .def("__call__", &Repeat::call, py::arg("module"), py::arg("x"),
           "What module(x) gives, or None where this is not known: x is of another kind, the state "
           "has changed, or somebody observes.")
      .def("__deepcopy__", [](const Repeat&, const py::dict&) { return py::none(); })
      .def("__reduce__", [](const Repeat&) {  // as copies and pickles have it: None
        return py::make_tuple(py::type::of(py::none()), py::tuple());
      });
}

}  // namespace torchquant
