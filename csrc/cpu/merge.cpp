// Token merging on the CPU: one image a task. The kernels are match_image.h and merge_image.h, with norm_image.h.
#include <cstring>

#include "tensors.h"

namespace tokred {

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
            {}};
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

// The metric of an image as a fused projection stores it, a token's heads one after another, or a head's tokens.
static Ahead rows_of(const MatchImage& m, int64_t element) {
  const char* data = static_cast<const char*>(m.metric);
  if (m.H == 1 || m.s_h == m.D) return {data, m.N, m.H * m.D * element, m.s_n * element};
  if (m.s_n == m.D) return {data, m.H, m.N * m.D * element, m.s_h * element};
  return {};
}

Tensor match_cpu(const Tensor& metric, int64_t r, int64_t prefix, const OptionalTensor& weight, double power,
                 bool two_way) {
  const MatchArgs args = match_args("match", metric, r, prefix, weight, power, two_way);
  Tensor assign = new_int32(metric, {args.B, args.N});
  const MatchImages images(args, assign);
  const int64_t element = args.metric.element_size();
  for_each_image(args.B, [&](int64_t b) {
    MatchImage image = images[b];
    if (b + 1 < args.B) image.ahead = rows_of(images[b + 1], element);
    isa().match(image);
  });
  return assign;
}

std::tuple<Tensor, Tensor> merge_cpu(const Tensor& x, const Tensor& assign, int64_t m, const OptionalTensor& size,
                                     const OptionalTensor& weight, StringHandle reduce) {
  const Reduce how = parse_reduce(text(reduce));
  const MergeArgs args = merge_args("merge", x, assign, m, size, weight);
  const int32_t* rows = static_cast<const int32_t*>(args.assign.const_data_ptr());
  if (debug()) check_assign_values("merge", rows, args.B * args.N, m);
  Tensor out = new_like(x, {args.B, m, args.C}), size_out = new_wide(x, {args.B, m});
  const MergeImages images(args, rows, how, out, size_out);
  for_each_image(args.B, [&](int64_t b) { isa().merge(images[b]); });
  return {out, size_out};
}

// Each image is matched and merged in one task, while its assignment is in the first-level cache.
std::tuple<Tensor, Tensor, Tensor> match_merge_cpu(const Tensor& x, const Tensor& metric, int64_t r, int64_t prefix,
                                                   const OptionalTensor& size) {
  check_match_merge(x, metric, prefix, size);
  const MatchArgs match = match_args("match_merge", metric, r, prefix, std::nullopt, 1.0, false);
  Tensor assign = new_int32(x, {match.B, match.N});
  const int64_t M = match.N - match.r;
  const MergeArgs merge = merge_args("match_merge", x, assign, M, size, std::nullopt);
  Tensor out = new_like(x, {merge.B, M, merge.C}), size_out = new_wide(x, {merge.B, M});
  const MatchImages to_match(match, assign);
  const MergeImages to_merge(merge, static_cast<const int32_t*>(assign.const_data_ptr()), Reduce::kMean, out, size_out);
  const Isa& kernels = isa();
  const int64_t element = x.element_size();
  for_each_image(merge.B, [&](int64_t b) {
    const MergeImage merge_b = to_merge[b];
    MatchImage match_b = to_match[b];
    match_b.ahead = {static_cast<const char*>(merge_b.x), merge.N, merge.C * element, merge.s_n * element};
    kernels.match(match_b);
    kernels.merge(merge_b);
  });
  return {out, size_out, assign};
}

std::tuple<Tensor, Tensor, Tensor> add_merge_norm_cpu(const Tensor& x, const Tensor& branch, const Tensor& assign,
                                                      int64_t m, const OptionalTensor& norm_weight,
                                                      const OptionalTensor& norm_bias, const OptionalTensor& size,
                                                      const OptionalTensor& branch_scale,
                                                      const OptionalTensor& branch_bias, double eps) {
  const char* op = "add_merge_norm";
  const MergeArgs args = merge_args(op, x, assign, m, size, std::nullopt);
  const NormArgs norm = norm_args(op, x, branch, norm_weight, norm_bias, branch_scale, branch_bias, eps);
  const int32_t* rows = static_cast<const int32_t*>(args.assign.const_data_ptr());
  if (debug()) check_assign_values(op, rows, args.B * args.N, m);
  Tensor out = new_like(x, {args.B, m, args.C}), size_out = new_wide(x, {args.B, m});
  const MergeImages images(args, rows, Reduce::kMean, out, size_out);
  const Tails tails(norm, x, m);
  for_each_image(args.B, [&](int64_t b) {
    MergeImage image = images[b];
    image.tail = tails[b];
    isa().merge(image);
  });
  return {out, size_out, tails.normed};
}

// x_i = y[assign_i], one memcpy a token; 0 where assign is no row. Bytes: 2 N C, and 4 N.
Tensor unmerge_cpu(const Tensor& given, const Tensor& given_assign) {
  const UnmergeArgs args = unmerge_args(given, given_assign);
  const int32_t* assign = static_cast<const int32_t*>(args.assign.const_data_ptr());
  if (debug()) check_assign_values("unmerge", assign, args.B * args.N, args.M);
  Tensor x = new_like(given, {args.B, args.N, args.C});
  const int64_t element = given.element_size(), row = args.C * element;
  if (args.B * args.N * row == 0) return x;
  const char* from = static_cast<const char*>(args.y.const_data_ptr());
  char* to = static_cast<char*>(x.mutable_data_ptr());
  for_each_image(args.B, [&](int64_t b) {
    for (int64_t i = b * args.N; i < (b + 1) * args.N; ++i) {
      const int32_t j = assign[i];
      if (j >= 0 && j < args.M)
        std::memcpy(to + i * row, from + (b * args.s_b + j * args.s_n) * element, row);
      else
        std::memset(to + i * row, 0, row);
    }
  });
  return x;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) {
  m.impl("match", TORCH_BOX(&tokred::match_cpu));
  m.impl("merge", TORCH_BOX(&tokred::merge_cpu));
  m.impl("match_merge", TORCH_BOX(&tokred::match_merge_cpu));
  m.impl("add_merge_norm", TORCH_BOX(&tokred::add_merge_norm_cpu));
  m.impl("unmerge", TORCH_BOX(&tokred::unmerge_cpu));
}
