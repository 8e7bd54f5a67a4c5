// From checked tensors to the plain structs of one image that the kernels take.
#pragma once
#include <tuple>

#include "../check.h"
#include "../check_clusters.h"
#include "../check_topk.h"
#include "isa.h"

namespace tokred {

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Double: return Dtype::kDouble;
    default: return Dtype::kFloat;
  }
}

inline Tensor new_like(const Tensor& x, std::vector<int64_t> shape) { return torch::stable::new_empty(x, shape); }
inline Tensor new_wide(const Tensor& x, std::vector<int64_t> shape) {
  return torch::stable::new_empty(x, shape, wide(x.scalar_type()));
}

// One image a task. Nothing may throw inside: the text would be lost.
template <class F>
void for_each_image(int64_t B, const F& image) {
  if (B == 0) return;
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) image(b);
  });
}

// A pointer to element `offset` of a tensor that may be absent.
inline const char* element(const OptionalTensor& t, int64_t offset) {
  return t ? static_cast<const char*>(t->const_data_ptr()) + offset * int64_t(t->element_size()) : nullptr;
}

class MatchImages {
 public:
  MatchImages(const MatchArgs& args, const Tensor& assign)
      : args_(args), dtype_(dtype_of(args.metric)), assign_(static_cast<int32_t*>(assign.mutable_data_ptr())) {}
  MatchImage operator[](int64_t b) const {
    const MatchArgs& a = args_;
    return {element(a.metric, b * a.s_b),
            element(a.weight, b * a.N),
            assign_ + b * a.N,
            a.H,
            a.N,
            a.D,
            a.r,
            a.p,
            a.s_h,
            a.s_n,
            a.power,
            a.two_way,
            dtype_,
            nullptr,
            0};
  }

 private:
  const MatchArgs& args_;
  Dtype dtype_;
  int32_t* assign_;
};

class MergeImages {
 public:
  MergeImages(const MergeArgs& args, const int32_t* assign, Reduce reduce, const Tensor& out, const Tensor& size_out)
      : args_(args),
        assign_(assign),
        reduce_(reduce),
        dtype_(dtype_of(args.x)),
        out_(static_cast<char*>(out.mutable_data_ptr())),
        size_out_(static_cast<char*>(size_out.mutable_data_ptr())),
        element_(out.element_size()),
        wide_(size_out.element_size()) {}
  MergeImage operator[](int64_t b) const {
    const MergeArgs& a = args_;
    return {element(a.x, b * a.s_b),
            assign_ + b * a.N,
            element(a.size, b * a.N),
            element(a.weight, b * a.N),
            out_ + b * a.M * a.C * element_,
            size_out_ + b * a.M * wide_,
            a.N,
            a.M,
            a.C,
            a.s_n,
            static_cast<int>(reduce_),
            dtype_,
            {}};
  }

 private:
  const MergeArgs& args_;
  const int32_t* assign_;
  Reduce reduce_;
  Dtype dtype_;
  char *out_, *size_out_;
  int64_t element_, wide_;
};

class TopkImages {
 public:
  TopkImages(const TopkArgs& args, const Tensor& assign)
      : args_(args), dtype_(dtype_of(args.score)), assign_(static_cast<int32_t*>(assign.mutable_data_ptr())) {}
  TopkImage operator[](int64_t b) const {
    const TopkArgs& a = args_;
    return {element(a.score, b * a.N), assign_ + b * a.N, a.N, a.k, a.p, a.others, dtype_};
  }

 private:
  const TopkArgs& args_;
  Dtype dtype_;
  int32_t* assign_;
};

class TopkGatherImages {
 public:
  TopkGatherImages(const TopkGatherArgs& args, const Tensor& assign, const Tensor& out)
      : args_(args),
        topk_(args.topk, assign),
        dtype_(dtype_of(args.x)),
        out_(static_cast<char*>(out.mutable_data_ptr())),
        image_bytes_(args.topk.M * args.C * int64_t(out.element_size())) {}
  TopkGatherImage operator[](int64_t b) const {
    const TopkGatherArgs& a = args_;
    return {topk_[b], element(a.x, b * a.s_b), out_ + b * image_bytes_, a.topk.M, a.C, a.s_n, a.copied, a.mean, dtype_,
            {}};
  }

 private:
  const TopkGatherArgs& args_;
  TopkImages topk_;
  Dtype dtype_;
  char* out_;
  int64_t image_bytes_;
};

// The tail of each image, with its output.
class Tails {
 public:
  Tails(const NormArgs& args, const Tensor& x, int64_t M)
      : normed(new_like(x, {x.size(0), M, x.size(2)})),
        args_(args),
        weight_(per_token(args.weight, wide(x.scalar_type()))),
        bias_(per_token(args.bias, wide(x.scalar_type()))),
        branch_scale_(per_token(args.branch_scale, wide(x.scalar_type()))),
        branch_bias_(per_token(args.branch_bias, wide(x.scalar_type()))),
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

inline DistanceView distance_view(const DistanceArgs& a, int64_t b) {
  return {element(a.distance, b * a.s_b), a.N, a.s_n, dtype_of(a.distance)};
}

}  // namespace tokred
