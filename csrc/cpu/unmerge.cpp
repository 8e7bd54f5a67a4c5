// unmerge on the CPU: x_i = y[assign_i], one memcpy a token; 0 where assign is no row. Bytes: 2 N C, and 4 N.
#include <cstring>

#include "tensors.h"

namespace tokred {

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

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("unmerge", TORCH_BOX(&tokred::unmerge_cpu)); }
