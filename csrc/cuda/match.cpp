// match on CUDA. The kernels are match.cuh and match_split.cuh, launched by match_kernel.cu.
#include "tensors.h"

namespace tokred {

void match_into(const char* op, const MatchArgs& args, const Tensor& assign) {
  if (args.B == 0 || args.N == 0) return;
  MatchBatch m;
  m.metric = args.metric.const_data_ptr(), m.weight = floats(args.weight);
  m.assign = static_cast<int32_t*>(assign.mutable_data_ptr());
  m.B = args.B, m.s_b = args.s_b, m.s_h = args.s_h, m.s_n = args.s_n;
  m.H = checked_int(op, "H", args.H), m.N = checked_int(op, "N", args.N), m.D = checked_int(op, "D", args.D);
  m.r = int(args.two_way ? args.r / 2 : args.r), m.r_b = int(args.r) - m.r;
  m.p = int(args.p), m.power = float(args.power);
  m.dtype = dtype_of(args.metric), m.aligned = is_aligned(args.metric, {args.s_b, args.s_h, args.s_n});
  Tensor memory;
  launch_match(m, stream_of(assign), scratch_into(memory, assign));
}

Tensor match_cuda(const Tensor& metric, int64_t r, int64_t prefix, const OptionalTensor& weight, double power,
                  bool two_way) {
  const DeviceGuard guard(metric.get_device_index());
  const MatchArgs args = match_args("match", metric, r, prefix, weight, power, two_way);
  Tensor assign = new_int32(metric, {args.B, args.N});
  match_into("match", args, assign);
  return assign;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) { m.impl("match", TORCH_BOX(&tokred::match_cuda)); }
