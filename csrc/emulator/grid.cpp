#include "grid.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>

namespace phi4rv::emulator {

constexpr size_t STACK = 256 * 1024;

// A thread's stack and where it stopped. ucontext starts it, setjmp and longjmp switch: no system call a switch.
struct Fiber {
  char* stack;
  ucontext_t start;
  jmp_buf at;
  bool begun = false;
  Fiber() {
    void* p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    stack = static_cast<char*>(p);
  }
  ~Fiber() { munmap(stack, STACK); }
  Fiber(const Fiber&) = delete;
};

namespace {

struct Grid {
  const std::function<void()>* kernel;
  int blocks, threads, shared, cluster;
  int begun = 0;  // blocks
  std::vector<std::unique_ptr<Cluster>> there;
  std::vector<DeedRef> deeds;
  std::string failure;
};

thread_local Grid* grid;
thread_local Thread* running;
thread_local jmp_buf scheduler;
thread_local std::string last_failure;
// Kept for the next grid: a stack that has been touched is memory already.
thread_local std::vector<std::unique_ptr<Fiber>> fibers;
thread_local std::vector<Fiber*> spare;

std::mt19937& dice() {
  static thread_local std::mt19937 generator(std::getenv("PHI4RV_EMULATOR_SEED") ? std::atoi(std::getenv("PHI4RV_EMULATOR_SEED")) : 0);
  return generator;
}

void body() {
  (*grid->kernel)();
  Thread& thread = *running;
  if (!thread.products.committed.empty() || !thread.products.open.empty()) fail("a thread ends with products it never waited for");
  thread.copies.commit(), thread.copies.wait(0);
  thread.finished = true;
  Block& block = *thread.block;
  block.live--, block.cluster->live--;
  auto& all = block.barriers[0];
  if (all.arrived && all.arrived == block.live) all.arrived = 0, all.generation++;
  longjmp(scheduler, 1);
}

// Lets the thread run until it waits or ends.
void resume(Thread& thread) {
  if (!thread.fiber) {
    if (spare.empty()) fibers.push_back(std::make_unique<Fiber>()), spare.push_back(fibers.back().get());
    thread.fiber = spare.back();
    spare.pop_back();
  }
  Fiber* fiber = thread.fiber;
  running = &thread;
  if (setjmp(scheduler)) return;
  if (fiber->begun) longjmp(fiber->at, 1);
  fiber->begun = true;
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack, fiber->start.uc_stack.ss_size = STACK, fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, body, 0);
  setcontext(&fiber->start);
}

std::unique_ptr<Cluster> make_cluster() {
  auto cluster = std::make_unique<Cluster>();
  cluster->blocks.resize(grid->cluster);
  cluster->live = grid->cluster * grid->threads;
  for (int rank = 0; rank < grid->cluster; rank++) {
    Block& block = cluster->blocks[rank];
    block.cluster = cluster.get(), block.rank = rank, block.index = make_uint3(grid->begun++, 0, 0);
    block.live = block.size = grid->threads, block.shared_bytes = grid->shared;
    block.memory.reset(new char[grid->shared + 1024]);
    block.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block.memory.get()) + 1023) & ~uintptr_t(1023));
    std::memset(block.shared, 0xFF, grid->shared);  // NaN in every float format
    block.threads.resize(grid->threads), block.warps.resize((grid->threads + 31) / 32);
    block.products.resize((grid->threads + 127) / 128);
    for (int i = 0; i < grid->threads; i++) {
      Thread& thread = block.threads[i];
      thread.block = &block, thread.index = make_uint3(i, 0, 0), thread.lane = i % 32, thread.warp = i / 32;
    }
  }
  return cluster;
}

void retire(Cluster& cluster) {
  for (auto& block : cluster.blocks)
    for (auto& thread : block.threads)
      if (thread.fiber) thread.fiber->begun = false, spare.push_back(thread.fiber);
}

// Every thread that can goes on, warp by warp in a random order, some warps resting. False if none could.
bool pass(Cluster& cluster, bool rest) {
  bool any = false;
  std::vector<std::pair<Block*, int>> order;
  for (auto& block : cluster.blocks)
    for (size_t warp = 0; warp < block.warps.size(); warp++) order.push_back({&block, int(warp)});
  std::shuffle(order.begin(), order.end(), dice());
  for (auto [block, warp] : order) {
    if (rest && dice()() % 4 == 0) continue;
    for (int i = warp * 32; i < std::min(block->size, warp * 32 + 32); i++) {
      Thread& thread = block->threads[i];
      if (thread.finished || (thread.ready && !thread.ready())) continue;
      thread.ready = nullptr;
      any = true;
      resume(thread);
      if (!grid->failure.empty()) return false;
    }
  }
  return any;
}

// Some of what is asked for happens; all of it if ``every``. False if there was nothing.
bool happen(bool every) {
  auto& deeds = grid->deeds;
  std::shuffle(deeds.begin(), deeds.end(), dice());
  bool any = false;
  for (auto& deed : deeds)
    if (!deed->done && (every || coin())) deed->now(), any = true;
  std::erase_if(deeds, [](const DeedRef& deed) { return deed->done; });
  return any;
}

std::string who_waits() {
  std::map<std::string, int> waiting;
  for (auto& cluster : grid->there)
    for (auto& block : cluster->blocks)
      for (auto& thread : block.threads)
        if (!thread.finished) waiting["warp " + std::to_string(thread.warp) + ": " + thread.waits_for]++;
  std::string text = "no thread can go on:";
  for (auto& [what, count] : waiting) text += " " + std::to_string(count) + " of " + what + ";";
  return text;
}

void drive() {
  while (grid->failure.empty()) {
    while (int(grid->there.size()) < MULTIPROCESSORS && grid->begun < grid->blocks) grid->there.push_back(make_cluster());
    if (grid->there.empty()) break;
    bool any = false;
    for (auto& cluster : grid->there) {
      any |= pass(*cluster, true);
      if (!grid->failure.empty()) return;
    }
    any |= happen(false);
    if (!any) {
      for (auto& cluster : grid->there) any |= pass(*cluster, false);
      if (!grid->failure.empty()) return;
      if (!any && !happen(true)) {
        grid->failure = who_waits();
        return;
      }
    }
    for (auto& cluster : grid->there)
      if (cluster->live == 0) retire(*cluster);
    std::erase_if(grid->there, [](auto& cluster) { return cluster->live == 0; });
  }
  if (grid->failure.empty()) happen(true);
}

}  // namespace

Thread& self() { return *running; }
uint3 grid_size() { return make_uint3(grid->blocks, 1, 1); }
bool coin() { return dice()() % 2; }
void later(const DeedRef& deed) { grid->deeds.push_back(deed); }
DeedRef some_time(std::function<void()> happen) {
  auto deed = std::make_shared<Deed>(Deed{std::move(happen)});
  if (coin())
    deed->now();
  else
    later(deed);
  return deed;
}

void fail(const std::string& reason) {
  if (grid->failure.empty())
    grid->failure = reason + " (block " + std::to_string(running->block->index.x) + ", thread " + std::to_string(running->index.x) + ")";
  longjmp(scheduler, 1);
}

void yield_until(const char* what, std::function<bool()> ready) {
  Thread& thread = *running;
  thread.ready = std::move(ready), thread.waits_for = what;
  if (!setjmp(thread.fiber->at)) longjmp(scheduler, 1);
}

const char (*exchange(const void* mine, size_t bytes, uint32_t mask))[64] {
  Thread& thread = self();
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.warp];
  const int generation = warp.generation;
  if (bytes > 64) fail("a warp exchanges at most 64 bytes a lane");
  if (!(mask >> thread.lane & 1)) fail("a lane that its mask leaves out");
  std::memcpy(warp.brought[generation & 1][thread.lane], mine, bytes);
  warp.arrived |= 1u << thread.lane;
  if (warp.arrived & ~mask) fail("lanes of one warp meet with different masks");
  if (warp.arrived == mask)
    warp.arrived = 0, warp.generation++;
  else
    yield_until("its warp", [&warp, generation] { return warp.generation != generation; });
  return warp.brought[generation & 1];
}

void meet(Rendezvous& at, int threads, bool wait, const char* what) {
  const int generation = at.generation;
  if (++at.arrived == threads)
    at.arrived = 0, at.generation++;
  else if (wait)
    yield_until(what, [&at, generation] { return at.generation != generation; });
}

cudaError_t run(int blocks, int threads, int shared, int cluster, const std::function<void()>& kernel) {
  if (blocks < 1 || threads < 1 || threads > 1024 || shared > MOST_SHARED || blocks % cluster) {
    last_failure = "a grid of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads with " +
                   std::to_string(shared) + " bytes in clusters of " + std::to_string(cluster);
    return cudaErrorInvalidConfiguration;
  }
  Grid here{&kernel, blocks, threads, shared, cluster};
  grid = &here;
  drive();
  for (auto& left : here.there) retire(*left);
  grid = nullptr;
  last_failure = here.failure;
  return here.failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace phi4rv::emulator

// The little of CUDA's runtime that csrc/ calls.
extern "C" {
const char* cudaGetErrorString(cudaError_t) { return phi4rv::emulator::last_failure.c_str(); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = phi4rv::emulator::MULTIPROCESSORS;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
}
