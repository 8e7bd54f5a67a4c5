// From checked tensors to the plain structs of one image that the kernels take: what all ops need of it.
#pragma once
#include <tuple>

#include "../check.h"
#include "isa.h"

namespace tokred {

inline Dtype dtype_of(const Tensor& t) {
  switch (scalar_type(t)) {
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Double: return Dtype::kDouble;
    default: return Dtype::kFloat;
  }
}

// One image a task. Nothing may throw inside: the text would be lost.
template <class F>
void for_each_image(int64_t B, const F& image) {
  if (B == 1) return image(0);  // torch's scheduler is more code to fetch
  if (B > 1)
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) image(b);
    });
}

// A pointer to element `offset` of a tensor that may be absent.
inline const char* element(const OptionalTensor& t, int64_t offset) {
  return t ? static_cast<const char*>(t->const_data_ptr()) + offset * int64_t(t->element_size()) : nullptr;
}

// The tail of each image, with its output.
class Tails {
 public:
  Tails(const NormArgs& args, const Tensor& x, int64_t M)
      : normed(new_like(x, {x.size(0), M, x.size(2)})),
        args_(args),
        weight_(per_token(args.weight, wide(scalar_type(x)))),
        bias_(per_token(args.bias, wide(scalar_type(x)))),
        branch_scale_(per_token(args.branch_scale, wide(scalar_type(x)))),
        branch_bias_(per_token(args.branch_bias, wide(scalar_type(x)))),
        out_(static_cast<char*>(normed.mutable_data_ptr())),
        image_bytes_(M * x.size(2) * int64_t(normed.element_size())) {}
  Tail operator[](int64_t b) const {
    return {element(args_.branch, b * args_.s_b),
            args_.s_n,
            out_ + b * image_bytes_,
            element(weight_, 0),
            element(bias_, 0),
            element(branch_scale_, 0),
            element(branch_bias_, 0),
            args_.eps};
  }
  const Tensor normed;  // [B, M, C]

 private:
  const NormArgs& args_;
  const OptionalTensor weight_, bias_, branch_scale_, branch_bias_;
  char* out_;
  int64_t image_bytes_;
};

}  // namespace tokred
