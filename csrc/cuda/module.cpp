// The extension module is empty: importing it loads the library, which registers the CUDA kernels.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
