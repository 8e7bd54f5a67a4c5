// Token selection on the CPU: one image a task. The kernel is topk_image.h, with norm_image.h.
#include "../check_topk.h"
#include "tensors.h"

namespace tokred {

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

Tensor topk_cpu(const Tensor& score, int64_t k, int64_t prefix, bool fuse) {
  check_topk("topk", score, k, prefix);
  const TopkArgs args = topk_args(score, k, prefix, fuse, wide(scalar_type(score)));
  Tensor assign = new_int32(score, {args.B, args.N});
  const TopkImages images(args, assign);
  for_each_image(args.B, [&](int64_t b) { isa().topk(images[b]); });
  return assign;
}

std::tuple<Tensor, Tensor> topk_gather_cpu(const Tensor& x, const Tensor& score, int64_t k, int64_t prefix,
                                           StringHandle fuse) {
  const TopkGatherArgs args = topk_gather_args("topk_gather", x, score, k, prefix, text(fuse));
  const TopkArgs& topk = args.topk;
  Tensor out = new_like(x, {topk.B, topk.M, args.C}), assign = new_int32(x, {topk.B, topk.N});
  const TopkGatherImages images(args, assign, out);
  for_each_image(topk.B, [&](int64_t b) { isa().topk_gather(images[b]); });
  return {out, assign};
}

std::tuple<Tensor, Tensor, Tensor> add_topk_gather_norm_cpu(const Tensor& x, const Tensor& branch, const Tensor& score,
                                                            int64_t k, const OptionalTensor& norm_weight,
                                                            const OptionalTensor& norm_bias, int64_t prefix,
                                                            const OptionalTensor& branch_scale,
                                                            const OptionalTensor& branch_bias, StringHandle fuse,
                                                            double eps) {
  const char* op = "add_topk_gather_norm";
  const TopkGatherArgs args = topk_gather_args(op, x, score, k, prefix, text(fuse));
  const NormArgs norm = norm_args(op, x, branch, norm_weight, norm_bias, branch_scale, branch_bias, eps);
  const TopkArgs& topk = args.topk;
  Tensor out = new_like(x, {topk.B, topk.M, args.C}), assign = new_int32(x, {topk.B, topk.N});
  const TopkGatherImages images(args, assign, out);
  const Tails tails(norm, x, topk.M);
  for_each_image(topk.B, [&](int64_t b) {
    TopkGatherImage image = images[b];
    image.tail = tails[b];
    isa().topk_gather(image);
  });
  return {out, assign, tails.normed};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) {
  m.impl("topk", TORCH_BOX(&tokred::topk_cpu));
  m.impl("topk_gather", TORCH_BOX(&tokred::topk_gather_cpu));
  m.impl("add_topk_gather_norm", TORCH_BOX(&tokred::add_topk_gather_norm_cpu));
}
