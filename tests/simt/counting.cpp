// Counts the launches and what they read and write. The kernels are compiled with -fsanitize=thread but not linked with
// its library: the calls that the compiler puts before every access end here.
#include "counting.h"

#include <dlfcn.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int kSector = 32;  // bytes: the least that a GPU's memory gives

// One buffer of device memory. By sector: the last block that touched it, counted over all launches.
struct Region {
  uintptr_t first;  // sector
  std::vector<uint32_t> read, written;
};

struct Launch {
  const char* kernel;  // mangled
  int64_t blocks, threads, shared, dependent;
  int64_t run;            // blocks that were run, for the counts
  int64_t read, written;  // sectors that the launch touched; read: not those that it wrote before
  int64_t from_l2;        // sectors that its blocks read, each counted once a block
};

std::vector<Region> regions;
std::vector<Launch> launches;
double share = 1;
uint32_t block = 0, first_block = 0;  // now, and of the launch

void touch(uintptr_t address, int64_t bytes, bool writes) {
  if (launches.empty()) return;
  for (uintptr_t sector = address / kSector; sector <= (address + bytes - 1) / kSector; ++sector)
    for (Region& region : regions) {
      if (sector - region.first >= region.read.size()) continue;
      uint32_t& last = (writes ? region.written : region.read)[sector - region.first];
      Launch& launch = launches.back();
      const bool own = !writes && region.written[sector - region.first] >= first_block;
      if (last < first_block && !own) ++(writes ? launch.written : launch.read);
      if (last < block && !own && !writes) ++launch.from_l2;
      last = block;
      break;
    }
}

}  // namespace

namespace simt {

void device_memory(const void* memory, size_t bytes) {
  if (bytes == 0) return;
  const uintptr_t first = uintptr_t(memory) / kSector, sectors = (uintptr_t(memory) + bytes - 1) / kSector - first + 1;
  regions.push_back({first, std::vector<uint32_t>(sectors), std::vector<uint32_t>(sectors)});
}

int64_t start_launch(const void* kernel, int64_t blocks, int threads, int64_t shared, bool dependent) {
  Dl_info symbol = {};
  dladdr(kernel, &symbol);
  const int64_t run = std::min(blocks, int64_t(double(blocks) * share + 0.999));
  launches.push_back({symbol.dli_sname ? symbol.dli_sname : "?", blocks, threads, shared, dependent, run, 0, 0, 0});
  first_block = block + 1;
  return run;
}

void start_block() { ++block; }

}  // namespace simt

extern "C" {

// Forgets everything; of every launch to come, this share of the blocks runs.
void counting_start(double of_blocks) {
  regions.clear(), launches.clear();
  share = of_blocks, block = first_block = 0;
}
void counting_memory(const void* memory, int64_t bytes) { simt::device_memory(memory, size_t(bytes)); }
int64_t counting_launches(const Launch** found) {
  *found = launches.data();
  return int64_t(launches.size());
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* at, long bytes) { touch(uintptr_t(at), bytes, false); }
void __tsan_write_range(void* at, long bytes) { touch(uintptr_t(at), bytes, true); }
#define SIMT_HOOKS(bytes)                                                   \
  void __tsan_read##bytes(void* at) { touch(uintptr_t(at), bytes, false); } \
  void __tsan_write##bytes(void* at) { touch(uintptr_t(at), bytes, true); }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
int __tsan_atomic32_fetch_add(volatile int* at, int by, int) { return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST); }
char __tsan_atomic8_load(const volatile char* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
}
