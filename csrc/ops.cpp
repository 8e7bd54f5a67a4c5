// The schema of every op. Kernels register from cpu/*.cpp (CPU) and cuda/*.cpp (CUDA), a file a family of ops;
// tokred_kernels/ops/<op>.py adds the fake, autograd and vmap rules. The library is no Python module:
// torch.ops.load_library or dlopen registers everything, so neither building nor running it needs Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(tokred, m) {
  m.def(
      "match(Tensor metric, SymInt r, SymInt prefix=1, Tensor? weight=None, *, float power=1.0, "
      "bool two_way=False) -> Tensor");
  m.def(
      "merge(Tensor x, Tensor assign, SymInt m, Tensor? size=None, Tensor? weight=None, *, "
      "str reduce=\"mean\") -> (Tensor, Tensor)");
  m.def(
      "add_merge_norm(Tensor x, Tensor branch, Tensor assign, SymInt m, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor? size=None, Tensor? branch_scale=None, Tensor? branch_bias=None, *, float eps=1e-06) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("unmerge(Tensor y, Tensor assign) -> Tensor");
  m.def(
      "match_merge(Tensor x, Tensor metric, SymInt r, SymInt prefix=1, Tensor? size=None) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? size=None, *, float? scale=None, str scores=\"none\") "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor? grad_out, Tensor? grad_scores, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor? size=None, *, float? scale=None, str scores=\"none\") -> (Tensor, Tensor, Tensor)");
  m.def("attention_scores(Tensor q, Tensor k, Tensor? size=None, *, float? scale=None, str scores=\"cls\") -> Tensor");
  m.def("topk(Tensor score, SymInt k, SymInt prefix=1, bool fuse=False) -> Tensor");
  m.def("topk_gather(Tensor x, Tensor score, SymInt k, SymInt prefix=1, *, str fuse=\"none\") -> (Tensor, Tensor)");
  m.def(
      "add_topk_gather_norm(Tensor x, Tensor branch, Tensor score, SymInt k, Tensor? norm_weight, Tensor? norm_bias, "
      "SymInt prefix=1, Tensor? branch_scale=None, Tensor? branch_bias=None, *, str fuse=\"none\", "
      "float eps=1e-06) -> (Tensor, Tensor, Tensor)");
  m.def("pairwise_distance(Tensor x, *, float scale=1.0) -> Tensor");
  m.def("knn(Tensor distance, SymInt k) -> (Tensor, Tensor)");
  m.def("separation(Tensor distance, Tensor density) -> Tensor");
  m.def("nearest(Tensor distance, Tensor centres, *, bool pin=False) -> Tensor");
  m.def(
      "medoids(Tensor distance, Tensor label, Tensor centres, Tensor weight, *, str update=\"textbook\") "
      "-> Tensor");
  // Names the instruction set that the CPU kernels use; with a name, selects it for the whole process (tests,
  // benchmarks).
  m.def("cpu_isa(str name=\"\") -> str");
}
