// Chooses the instruction set of the CPU kernels at run time, and the op that names or forces it.
#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../text.h"

namespace tokred {

namespace portable {
extern const Isa kIsa;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Isa kIsa;
}
namespace avx512 {
extern const Isa kIsa;
}
namespace amx {
extern const Isa kIsa;
}
#endif

namespace {

// Best first.
const std::initializer_list<const Isa*> kAll = {
#if defined(__x86_64__)
    &amx::kIsa, &avx512::kIsa, &avx2::kIsa,
#endif
    &portable::kIsa};

const Isa* best() {
  for (const Isa* one : kAll)
    if (one->supported()) return one;
  return &portable::kIsa;
}

std::atomic<const Isa*>& selected() {
  static std::atomic<const Isa*> value{best()};
  return value;
}

std::string cpu_isa(StringHandle wanted) {
  const std::string name = text(wanted);
  if (name.empty()) return isa().name;
  for (const Isa* one : kAll)
    if (name == one->name && one->supported()) {
      selected().store(one);
      return name;
    }
  std::string available;
  for (const Isa* one : kAll)
    if (one->supported()) available += (available.empty() ? "" : ", ") + std::string(one->name);
  throw std::runtime_error("cpu_isa: name must be one of " + available + " on this machine, got " + name);
}

}  // namespace

const Isa& isa() { return *selected().load(std::memory_order_relaxed); }

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&tokred::cpu_isa)); }
