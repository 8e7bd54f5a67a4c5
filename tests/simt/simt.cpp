// The scheduler. Built without ThreadSanitizer instrumentation (SIMT_TSAN), which would report its bookkeeping.
#include "simt.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "counting.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* at);
void __tsan_release(void* at);
}
#endif

Dimension threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
#ifndef SIMT_COUNTING
void device_memory(const void*, size_t) {}
#endif
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr int kPoison = 0xCB;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kAtLaunchBefore, kDone };

struct Fiber {
  ucontext_t context;
  State state = State::kReady;
  Site site = {};
  unsigned mask = 0, votes = 0;
  uint64_t given = 0, received = 0;
  Words words = {};
  int source = 0;
  bool vote = false, gathers = false;
  void *fake_stack = nullptr, *tsan = nullptr;
};

struct Scheduler {
  ucontext_t main;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  Words gathered[1024 / kWarp][kWarp];
  std::unique_ptr<unsigned char[]> shared;
  const std::function<void()>* thread = nullptr;
  const std::vector<Memory>* dependent = nullptr;
  std::vector<std::unique_ptr<unsigned char[]>> hidden;  // what is in this memory, until the block waits
  int current = -1;
  std::string error;
  std::mt19937 random;
  bool permuted = false;
  void *fake_stack = nullptr, *tsan = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
} s;

// What ThreadSanitizer must know of barriers: what a thread did before one happens before what follows it.
char launched, ended, launch_before, block_keys, warp_keys[1024 * kWarp];
#ifdef SIMT_TSAN
constexpr unsigned kNoOrder = 1;  // switching is no synchronisation
void release(void* key) { __tsan_release(key); }
void acquire(void* key) { __tsan_acquire(key); }
void switch_tsan(void* fiber) { __tsan_switch_to_fiber(fiber, kNoOrder); }
#else
void release(void*) {}
void acquire(void*) {}
void switch_tsan(void*) {}
#endif
#ifdef __SANITIZE_ADDRESS__
void leave(void** fake, const void* stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
void arrive(void* fake, const void** from, size_t* size) { __sanitizer_finish_switch_fiber(fake, from, size); }
#else
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
#endif

void resume(int thread) {
  s.current = thread;
  threadIdx.x = unsigned(thread);
  Fiber& f = s.fibers[thread];
  leave(&s.fake_stack, s.stacks[thread].get(), kStack);
  switch_tsan(f.tsan);
  swapcontext(&s.main, &f.context);
  arrive(s.fake_stack, nullptr, nullptr);
  if (!s.error.empty()) throw std::runtime_error(s.error);
}

void yield() {
  Fiber& f = s.fibers[s.current];
  leave(f.state == State::kDone ? nullptr : &f.fake_stack, s.main_stack, s.main_stack_size);
  switch_tsan(s.tsan);
  swapcontext(&f.context, &s.main);
  arrive(f.fake_stack, nullptr, nullptr);
}

std::string at(const Fiber& f) {
  const char* name = strrchr(f.site.file, '/');
  return std::string(name ? name + 1 : f.site.file) + ":" + std::to_string(f.site.line);
}

bool same_site(const Fiber& a, const Fiber& b) {
  return a.site.line == b.site.line && !strcmp(a.site.file, b.site.file);
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("simt: block " + std::to_string(blockIdx.x) + ": " + what);
}

void enter() {
  arrive(nullptr, &s.main_stack, &s.main_stack_size);
  acquire(&launched);
  (*s.thread)();
  release(&ended);
  s.fibers[s.current].state = State::kDone;
  yield();
}

// Lets the threads of a complete block barrier go on.
bool release_block() {
  int waiting = 0, done = 0;
  for (const Fiber& f : s.fibers) waiting += f.state == State::kAtBlockBarrier, done += f.state == State::kDone;
  if (waiting == 0 || waiting + done < int(s.fibers.size())) return false;
  for (const Fiber& f : s.fibers) {
    if (f.state == State::kDone) fail("a barrier that some threads do not reach: they returned");
    if (!same_site(f, s.fibers[0])) fail("threads wait at different barriers: " + at(s.fibers[0]) + " and " + at(f));
  }
  for (Fiber& f : s.fibers) f.state = State::kReady;
  return true;
}

// The block begins before the launch before it has run.
void hide() {
  for (const Memory& m : *s.dependent) {
    s.hidden.emplace_back(new unsigned char[m.bytes]);
    memcpy(s.hidden.back().get(), m.first, m.bytes);
    memset(m.first, kPoison, m.bytes);
  }
}

// That launch has run.
void reveal() {
  for (size_t i = 0; i < s.hidden.size(); ++i) {
    const Memory& m = (*s.dependent)[i];
    const unsigned char* bytes = static_cast<const unsigned char*>(m.first);
    if (std::any_of(bytes, bytes + m.bytes, [](unsigned char byte) { return byte != kPoison; }))
      fail("memory is written before the wait for the launch before");
    memcpy(m.first, s.hidden[i].get(), m.bytes);
  }
  s.hidden.clear();
  release(&launch_before);
}

// Lets the threads go on when all of them wait for the launch before.
bool release_dependent() {
  int waiting = 0, done = 0;
  for (const Fiber& f : s.fibers) waiting += f.state == State::kAtLaunchBefore, done += f.state == State::kDone;
  if (s.hidden.empty() || waiting + done < int(s.fibers.size())) return false;
  if (done) fail("threads return that did not wait for the launch before");
  reveal();
  for (Fiber& f : s.fibers) f.state = State::kReady;
  return true;
}

// Lets the lanes of complete warp barriers go on, with what they receive.
bool release_warps() {
  bool any = false;
  for (int i = 0; i < int(s.fibers.size()); ++i) {
    const unsigned mask = s.fibers[i].mask;
    Fiber* warp = &s.fibers[i / kWarp * kWarp];
    bool complete = s.fibers[i].state == State::kAtWarpBarrier;
    unsigned votes = 0;
    for (int l = 0; l < kWarp && complete; ++l) {
      if (!(mask >> l & 1)) continue;
      complete = warp[l].state == State::kAtWarpBarrier && warp[l].mask == mask && same_site(warp[l], s.fibers[i]);
      votes |= unsigned(warp[l].vote) << l;
    }
    if (!complete) continue;
    if (s.fibers[i].gathers)
      for (int l = 0; l < kWarp; ++l) s.gathered[i / kWarp][l] = warp[l].words;
    for (int l = 0; l < kWarp; ++l) {
      if (!(mask >> l & 1)) continue;
      if (!(mask >> warp[l].source & 1)) fail("a shuffle reads a lane outside its mask at " + at(warp[l]));
      warp[l].received = warp[warp[l].source].given, warp[l].votes = votes, warp[l].state = State::kReady;
    }
    any = true;
  }
  return any;
}

void wait(State state, unsigned mask, Site site, void* key) {
  Fiber& f = s.fibers[s.current];
  f.state = state, f.mask = mask, f.site = site;
  if (key) release(key);
  yield();
  if (key) acquire(key);
}

// Shuffles, ballots and tensor cores hand over registers: only __syncwarp also orders memory.
void wait_warp(unsigned mask, Site site, bool orders) {
  if (!(mask >> lane() & 1)) {
    s.error = "simt: a lane is not in its own mask";
    yield();
  }
  char* key = warp_keys + s.current / kWarp * kWarp + __builtin_ctz(mask);
  wait(State::kAtWarpBarrier, mask, site, orders ? key : nullptr);
}

void start(int thread) {
  Fiber& f = s.fibers[thread];
  getcontext(&f.context);
  f.context.uc_stack = {s.stacks[thread].get(), 0, kStack};
  f.context.uc_link = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(s.stacks[thread].get(), kStack);  // the frames of the block before
#endif
  makecontext(&f.context, enter, 0);
#ifdef SIMT_TSAN
  f.tsan = __tsan_create_fiber(0);
#endif
}

void run_block(int threads, int64_t shared) {
  memset(s.shared.get(), kPoison, size_t(shared));
  s.fibers.assign(threads, Fiber());
  for (int i = 0; i < threads; ++i) start(i);
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (s.dependent) hide();
  release(&launched);
  for (int done = 0; done < threads;) {
    bool ran = false;
    if (s.permuted) std::shuffle(order.begin(), order.end(), s.random);
    for (int i : order) {
      if (s.fibers[i].state != State::kReady) continue;
      resume(i);
      ran = true;
      done += s.fibers[i].state == State::kDone;
    }
    const bool warps = release_warps(), block = release_block(), dependent = release_dependent();
    if (ran || warps || block || dependent) continue;
    for (const Fiber& f : s.fibers)
      if (f.state != State::kDone) fail("deadlock: not every thread reaches " + at(f));
  }
  acquire(&ended);
#ifdef SIMT_TSAN
  for (Fiber& f : s.fibers) __tsan_destroy_fiber(f.tsan);
#endif
}

}  // namespace

void seed(unsigned value) {
  s.permuted = value != 0;
  s.random.seed(value);
}

unsigned char* shared_memory() { return s.shared.get(); }
int lane() { return s.current % kWarp; }
void block_barrier(Site site) { wait(State::kAtBlockBarrier, 0, site, &block_keys); }
void wait_for_launch_before(Site site) {
  if (!s.hidden.empty()) wait(State::kAtLaunchBefore, 0, site, &launch_before);
}

uint64_t exchange(unsigned mask, uint64_t value, int source, Site site) {
  Fiber& f = s.fibers[s.current];
  f.given = value, f.source = source, f.vote = f.gathers = false;
  wait_warp(mask, site, false);
  return f.received;
}

unsigned ballot(unsigned mask, bool vote, bool orders, Site site) {
  Fiber& f = s.fibers[s.current];
  f.vote = vote, f.source = lane(), f.gathers = false;
  wait_warp(mask, site, orders);
  return f.votes;
}

const Words* gather(const Words& mine, Site site) {
  Fiber& f = s.fibers[s.current];
  f.words = mine, f.source = lane(), f.vote = false, f.gathers = true;
  wait_warp(~0u, site, false);
  return s.gathered[s.current / kWarp];
}

void run(const void* kernel, int64_t blocks, int threads, int64_t shared, const std::function<void()>& thread,
         const std::vector<Memory>* dependent) {
  if (threads % kWarp || threads > 1024) throw std::runtime_error("simt: a block has at most 32 whole warps");
  s.thread = &thread, s.dependent = dependent, s.hidden.clear(), s.error.clear();
  s.shared.reset(new unsigned char[size_t(shared)]);
  while (int(s.stacks.size()) < threads) s.stacks.emplace_back(new char[kStack]);
  blockDim.x = unsigned(threads), gridDim.x = unsigned(blocks);
#ifdef SIMT_TSAN
  s.tsan = __tsan_get_current_fiber();
#endif
  const int64_t wanted = start_launch(kernel, blocks, threads, shared, dependent != nullptr);
  for (int64_t b = 0; b < wanted; ++b) {
    blockIdx.x = unsigned(b);
    start_block();
    run_block(threads, shared);
  }
}

}  // namespace simt
