// A GPU of a few multiprocessors on one CPU thread: each of a grid's threads is a fiber, and what is asynchronous on
// Hopper happens here at a random moment, as late as the program allows or as early. So a missing wait, or memory used
// again too soon, gives wrong numbers on a machine without a GPU, and what waits for ever is named.
//
// This file is what C++ needs to compile a kernel's source as it is: the built-in variables and functions of CUDA.
// hopper.h and warp.h have the functions of csrc/hopper.cuh and csrc/warp.cuh. Not emulated: the memory model (each
// access is seen by all at once, so fences do nothing), register limits, launch order of dependent kernels.
#pragma once

#include <cuda_runtime.h>
#include <vector_functions.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#undef __launch_bounds__
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __grid_constant__
#undef __shared__
#define __launch_bounds__(...)
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
// Shared memory comes from block_shared alone.
#define __shared__ static_assert(false, "use block_shared")

namespace phi4rv::emulator {

constexpr int MULTIPROCESSORS = 3;      // blocks, or clusters, that are there at a time
constexpr int MOST_SHARED = 232448;     // bytes a block, on Hopper
constexpr uint32_t SHARED_BASE = 1024;  // the address of a block's first byte, as its instructions see it

struct Block;
struct Fiber;

// Something asynchronous that has been asked for: it happens once, at the latest when someone waits for it.
struct Deed {
  std::function<void()> happen;
  bool done = false;
  void now() {
    if (!done) done = true, happen();
  }
};
using DeedRef = std::shared_ptr<Deed>;

// Asynchronous work of one thread in groups that are committed and waited for in order.
struct Groups {
  std::vector<DeedRef> open;
  std::deque<std::vector<DeedRef>> committed;
  void commit() { committed.push_back(std::move(open)), open.clear(); }
  void wait(size_t pending) {
    for (; committed.size() > pending; committed.pop_front())
      for (auto& deed : committed.front()) deed->now();
  }
};

struct Thread {
  Block* block = nullptr;
  uint3 index{};
  int lane = 0, warp = 0;
  bool finished = false;
  Fiber* fiber = nullptr;
  std::function<bool()> ready;  // what it waits for; none: it can go on
  const char* waits_for = "";
  Groups copies, stores;      // cp.async; bulk copies out of shared memory
  int products_issued = 0;    // of the warpgroup's sequence
  bool product_fenced = false;
  Groups products;
  struct Accumulator {
    std::vector<float> value;
    int in_flight = 0;
  };
  std::map<float*, Accumulator> accumulators;  // whose registers belong to products in flight
};

// The lanes of a warp meet and see what each has brought.
struct Warp {
  uint32_t arrived = 0;
  int generation = 0;
  alignas(16) char brought[2][32][64];
};

struct Rendezvous {
  int arrived = 0, generation = 0;
};

// An operand pair of a warpgroup's product, read from memory at one moment for all threads.
struct Product {
  uint64_t a_at = 0, b_at = 0;
  bool read = false;
  int issued = 0, taken = 0;  // by threads
  float a[64][32], b[256][32];  // [row][k], [column][k]
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  uint3 index{};
  int rank = 0, live = 0, size = 0;
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;  // at a multiple of 1024
  int shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Rendezvous barriers[16];
  std::vector<std::map<int, Product>> products;  // by warpgroup and place in its sequence
};

struct Cluster {
  std::vector<Block> blocks;
  Rendezvous meeting;
  int live = 0;
};

// Runs a grid. cudaErrorLaunchFailure, with its reason in cudaGetErrorString, for what would hang or be undefined.
cudaError_t run(int blocks, int threads, int shared, int cluster, const std::function<void()>& kernel);

Thread& self();
uint3 grid_size();
void yield_until(const char* what, std::function<bool()> ready);
[[noreturn]] void fail(const std::string& reason);
bool coin();                         // early or late
void later(const DeedRef& deed);     // at some moment before the grid ends
DeedRef some_time(std::function<void()> happen);

// What each lane of the mask brings, once all have come.
const char (*exchange(const void* mine, size_t bytes, uint32_t mask = ~0u))[64];
void meet(Rendezvous& at, int threads, bool wait, const char* what);

inline uint32_t shared_address(const void* p) {
  const Block& block = *self().block;
  const auto offset = static_cast<const char*>(p) - block.shared;
  if (offset < 0 || offset >= block.shared_bytes) fail("an address outside the block's shared memory");
  return SHARED_BASE + uint32_t(offset);
}
inline char* shared_pointer(Block& block, uint32_t address) {
  if (address < SHARED_BASE || address - SHARED_BASE >= uint32_t(block.shared_bytes)) fail("a shared address out of bounds");
  return block.shared + (address - SHARED_BASE);
}

template <typename T>
T shuffle(uint32_t mask, T value, int from) {
  const auto* all = exchange(&value, sizeof(T), mask);
  T got;
  std::memcpy(&got, all[from & 31], sizeof(T));
  return got;
}

}  // namespace phi4rv::emulator

// ---- CUDA's built-in names

#define threadIdx (::phi4rv::emulator::self().index)
#define blockIdx (::phi4rv::emulator::self().block->index)
#define blockDim (make_uint3(::phi4rv::emulator::self().block->size, 1, 1))
#define gridDim (::phi4rv::emulator::grid_size())

inline void __syncthreads() {
  auto& block = *::phi4rv::emulator::self().block;
  ::phi4rv::emulator::meet(block.barriers[0], block.live, true, "__syncthreads");
}
inline void __syncwarp(uint32_t mask = ~0u) { ::phi4rv::emulator::exchange("", 0, mask); }
template <typename T>
T __shfl_sync(uint32_t mask, T value, int from) {
  return ::phi4rv::emulator::shuffle(mask, value, from);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int apart) {
  return ::phi4rv::emulator::shuffle(mask, value, ::phi4rv::emulator::self().lane ^ apart);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int apart) {
  const int lane = ::phi4rv::emulator::self().lane;
  return ::phi4rv::emulator::shuffle(mask, value, lane + apart < 32 ? lane + apart : lane);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int apart) {
  const int lane = ::phi4rv::emulator::self().lane;
  return ::phi4rv::emulator::shuffle(mask, value, lane >= apart ? lane - apart : lane);
}
inline uint32_t __ballot_sync(uint32_t mask, bool yes) {
  const auto* all = ::phi4rv::emulator::exchange(&yes, 1, mask);
  uint32_t bits = 0;
  for (int i = 0; i < 32; i++) bits |= uint32_t((mask >> i & 1) && all[i][0]) << i;
  return bits;
}
inline bool __any_sync(uint32_t mask, bool yes) { return __ballot_sync(mask, yes) != 0; }
inline bool __all_sync(uint32_t mask, bool yes) { return __ballot_sync(mask, yes) == mask; }

template <typename T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}
template <typename T>
T atomicMax(T* p, T value) {
  const T before = *p;
  *p = std::max(before, value);
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 2147483648.f ? 2147483647 : x <= -2147483648.f ? -2147483647 - 1 : int(std::nearbyint(x));
}
inline float __int2float_rn(int x) { return float(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}

using std::max;
using std::min;
