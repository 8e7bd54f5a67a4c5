// A str argument of an op: as StringHandle, read by text(). Declared as std::string it would come by torch's own
// conversion, which in torch 2.11 and 2.13 leaves a copy behind in every call: 48 bytes that are never freed, and
// between the large blocks that come and go they keep glibc from putting those together again, so that the heap grows
// by whole tensors.
#pragma once
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string>

namespace tokred {

// Frees the handle: once for each argument.
inline std::string text(StringHandle handle) {
  const char* data = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  std::string copy(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return copy;
}

}  // namespace tokred
