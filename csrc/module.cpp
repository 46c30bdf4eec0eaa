// The Python module shvit_kernels._native: empty, importing it loads the library and so registers its
// operators.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__native(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
