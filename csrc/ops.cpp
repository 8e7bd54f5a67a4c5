// The schema of every op. Kernels register from their own files: cpu/<op>.cpp (CPU), cuda/<op>.cu (CUDA);
// tokred_kernels/ops/<op>.py adds the fake, autograd and vmap rules. design: README, "Ops".
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(tokred, m) {
  m.def(
      "match(Tensor metric, SymInt r, SymInt prefix=1, Tensor? weight=None, *, float power=1.0, "
      "bool two_way=False) -> Tensor");
  m.def(
      "merge(Tensor x, Tensor assign, SymInt m, Tensor? size=None, Tensor? weight=None, *, "
      "str reduce=\"mean\") -> (Tensor, Tensor)");
  m.def("unmerge(Tensor y, Tensor assign) -> Tensor");
  m.def(
      "match_merge(Tensor x, Tensor metric, SymInt r, SymInt prefix=1, Tensor? size=None) "
      "-> (Tensor, Tensor, Tensor)");
  // Names the instruction set that the CPU kernels use; with a name, selects it for the whole process (tests,
  // benchmarks).
  m.def("cpu_isa(str name=\"\") -> str");
}

// The extension module is empty: importing it loads the library, which registers the ops.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
