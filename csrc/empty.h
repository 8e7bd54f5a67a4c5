// Tensors for outputs, not initialised, by torch's C function. torch::stable::new_empty, made for torch 2.10, looks its
// op up by name and boxes the arguments: amid a model, whose caches hold other code, 3 us and more a tensor.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <utility>

namespace tokred {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Shape = std::initializer_list<int64_t>;

// TOKRED_POISON=1, which the tests set: outputs on the CPU begin as NaN, rows as 2139062143. (Elsewhere
// torch.utils.deterministic.fill_uninitialized_memory does that; on the CPU this C function fills nothing.)
inline bool poisons() {
  static const bool on = [] {
    const char* value = std::getenv("TOKRED_POISON");
    return value && std::strcmp(value, "1") == 0;
  }();
  return on;
}

// Type and index, in torch's codes.
inline std::pair<int32_t, int32_t> device_of(const Tensor& t) {
  std::pair<int32_t, int32_t> device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.first));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.second));
  return device;
}

// On the device of `like`.
inline Tensor empty_strided(const Tensor& like, Shape shape, const int64_t* strides, ScalarType dtype) {
  const auto [device, index] = device_of(like);
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(shape.size()), shape.begin(), strides, type, device, index, &made));
  Tensor tensor(made);
  if (poisons() && device == aoti_torch_device_type_cpu() && tensor.numel() > 0)
    std::memset(tensor.mutable_data_ptr(), dtype == ScalarType::Int ? 0x7f : 0xff,
                tensor.numel() * tensor.element_size());
  return tensor;
}

// Contiguous; of at most four dimensions.
inline Tensor empty(const Tensor& like, Shape shape, ScalarType dtype) {
  int64_t strides[4], step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= std::max<int64_t>(shape.begin()[i], 1)) strides[i] = step;
  return empty_strided(like, shape, strides, dtype);
}

// [B, H, N, D], stored [B, N, H, D].
inline Tensor empty_heads(const Tensor& like, int64_t B, int64_t H, int64_t N, int64_t D, ScalarType dtype) {
  const int64_t head = std::max<int64_t>(D, 1), row = std::max<int64_t>(H, 1) * head;
  const int64_t strides[] = {std::max<int64_t>(N, 1) * row, head, row, 1};
  return empty_strided(like, {B, H, N, D}, strides, dtype);
}

}  // namespace tokred
