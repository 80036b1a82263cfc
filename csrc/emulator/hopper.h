// The functions of csrc/hopper.cuh on the emulator: what each instruction does, from PTX's text and not from the kernels.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <initializer_list>
#include <type_traits>

#include "grid.h"

namespace phi4rv::emulator {

// ---- mbarriers: 64 bits in shared memory

struct Barrier {
  uint64_t phase : 1, expected : 15, pending : 16;
  int64_t bytes : 32;  // of copies still to come, less those that have
};

inline Barrier& barrier_at(uint64_t* p) {
  shared_address(p);
  if (*p == ~uint64_t(0)) fail("a barrier that was not initialised");
  return *reinterpret_cast<Barrier*>(p);
}
inline void settle(Barrier& b) {
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.expected;
}
inline void arrive_at_barrier(Barrier& b, int64_t bytes) {
  if (b.pending == 0) fail("more arrivals at a barrier than it expects");
  b.bytes += bytes, b.pending--;
  settle(b);
}
// The same place in another block of the cluster.
inline char* there(const void* p, int rank) {
  auto& blocks = self().block->cluster->blocks;
  if (rank < 0 || rank >= int(blocks.size())) fail("a block outside the cluster");
  return shared_pointer(blocks[rank], shared_address(p));
}

// ---- tensor maps, in the bytes of a CUtensorMap

struct Map {
  char* data;
  int bytes, rank;  // of an element
  int64_t sizes[4], strides[4];
  int box[4];
  bool swizzled;
  int64_t box_bytes() const { return int64_t(bytes) * box[0] * box[1] * box[2] * box[3]; }
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

inline cudaError_t describe(
    CUtensorMap& map, const void* data, int bytes, std::initializer_list<int64_t> sizes,
    std::initializer_list<int64_t> strides, std::initializer_list<int> box, bool swizzled) {
  Map m{static_cast<char*>(const_cast<void*>(data)), bytes, int(sizes.size()), {1, 1, 1, 1}, {bytes, 0, 0, 0}, {1, 1, 1, 1}, swizzled};
  std::copy(sizes.begin(), sizes.end(), m.sizes), std::copy(strides.begin(), strides.end(), m.strides + 1);
  std::copy(box.begin(), box.end(), m.box);
  bool right = m.rank <= 4 && strides.size() + 1 == sizes.size() && box.size() == sizes.size() && uintptr_t(data) % 16 == 0;
  for (int i = 0; i < m.rank; i++) {
    right &= m.sizes[i] > 0 && m.sizes[i] < (int64_t(1) << 32) && m.box[i] > 0 && m.box[i] <= 256;
    right &= i == 0 || (m.strides[i] % 16 == 0 && m.strides[i] < (int64_t(1) << 40));
  }
  right &= m.box[0] * bytes % 16 == 0 && (!swizzled || m.box[0] * bytes <= 128);
  if (!right) return cudaErrorInvalidValue;  // as the driver's encoder
  std::memcpy(&map, &m, sizeof(m));
  return cudaSuccess;
}
inline const Map& map_at(const CUtensorMap* map) { return *reinterpret_cast<const Map*>(map); }

// Calls each(element in memory or null where outside the tensor, its place in shared memory) for a box.
template <typename Each>
void walk(const Map& m, Block& block, uint32_t base, const int (&at)[4], const Each& each) {
  if (base % 128 || (m.swizzled && m.box[0] * m.bytes != 128)) fail("a box's place is no multiple of 128 bytes, or its rows are not 128");
  int64_t i[4], place = 0;
  for (i[3] = 0; i[3] < m.box[3]; i[3]++)
    for (i[2] = 0; i[2] < m.box[2]; i[2]++)
      for (i[1] = 0; i[1] < m.box[1]; i[1]++)
        for (i[0] = 0; i[0] < m.box[0]; i[0]++, place += m.bytes) {
          char* element = m.data;
          for (int d = 0; d < 4; d++) {
            const int64_t c = at[d] + i[d];
            element = element && c >= 0 && c < m.sizes[d] ? element + c * m.strides[d] : nullptr;
          }
          uint32_t address = base + uint32_t(place);
          if (m.swizzled) address ^= address >> 3 & 0x70;  // bits 7 to 9 onto bits 4 to 6
          each(element, shared_pointer(block, address));
        }
}

inline void load(void* to, const CUtensorMap* map, uint64_t* barrier, uint16_t blocks, const int (&at)[4]) {
  const uint32_t base = shared_address(to), signal = shared_address(barrier);
  Cluster* cluster = self().block->cluster;
  const std::array<int, 4> c{at[0], at[1], at[2], at[3]};
  for (int rank = 0; rank < int(cluster->blocks.size()); rank++) {
    if (!(blocks >> rank & 1)) continue;
    some_time([m = map_at(map), cluster, rank, base, signal, c] {
      Block& block = cluster->blocks[rank];
      walk(m, block, base, {c[0], c[1], c[2], c[3]}, [&](const char* element, char* place) {
        if (element)
          std::memcpy(place, element, m.bytes);
        else
          std::memset(place, 0, m.bytes);
      });
      auto& b = *reinterpret_cast<Barrier*>(shared_pointer(block, signal));
      b.bytes -= m.box_bytes();
      settle(b);
    });
  }
}

// ---- products

template <typename T>
constexpr int STEP = sizeof(T) == 1 ? 32 : 16;  // of K

template <typename T>
float element(const char* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return float(x);
}

// Where element (outer, k) of an operand lies; see "Matrix descriptor" and "Shared memory matrix layout" in PTX.
inline uint32_t place(uint64_t descriptor, int outer, int k, int bytes, bool mn_major) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
  uint32_t address = start;
  if (mn_major)
    address += outer / 64 * leading + k / 8 * stride + k % 8 * 128 + outer % 64 * bytes;
  else
    address += outer / 8 * stride + outer % 8 * 128 + k * bytes;
  return address ^ (address >> 3 & 0x70);
}

inline Product& product_of(Thread& thread, int number) { return thread.block->products[thread.warp / 4][number]; }

template <typename T>
void read_operand(Block& block, uint64_t descriptor, int rows, bool mn_major, float (*to)[32]) {
  if (descriptor >> 62 != 1) fail("an operand that is not swizzled by 128 bytes");
  for (int row = 0; row < rows; row++)
    for (int k = 0; k < STEP<T>; k++)
      to[row][k] = element<T>(shared_pointer(block, place(descriptor, row, k, sizeof(T), mn_major)));
}

// The thread's part of a product: its rows 16 warp + lane / 4 (+ 8), its columns.
template <int R>
void accumulate(const Product& product, Thread& thread, std::vector<float>& d, bool add, int steps) {
  const int row = thread.warp % 4 * 16 + thread.lane / 4, column = thread.lane % 4 * 2;
  for (int i = 0; i < R; i++) {
    const float* a = product.a[row + i / 2 % 2 * 8];
    const float* b = product.b[i / 4 * 8 + column + i % 2];
    float sum = 0;
    for (int k = 0; k < steps; k++) sum += a[k] * b[k];
    d[i] = add ? d[i] + sum : sum;
  }
}

// Issues a product: the registers of d are lost until it has been waited for.
template <typename T, int R>
void issue(float (&d)[R], const uint32_t* a_registers, uint64_t a_at, uint64_t b_at, bool add, bool a_mn, bool b_mn) {
  Thread& thread = self();
  if (!thread.product_fenced) fail("a product without a fence after registers were in use");
  const int number = thread.products_issued++;
  Product& product = product_of(thread, number);
  if (a_registers) {
    const int row = thread.warp % 4 * 16 + thread.lane / 4, column = thread.lane % 4 * 2;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 2; j++)
        product.a[row + i % 2 * 8][i / 2 * 8 + column + j] = element<T>(reinterpret_cast<const char*>(&a_registers[i]) + j * 2);
  }
  const bool first = product.issued++ == 0;
  if (!first && (product.b_at != b_at || product.a_at != a_at)) fail("threads of a warpgroup multiply different operands");
  product.a_at = a_at, product.b_at = b_at;
  const auto read = [&product, &block = *thread.block, a_at, b_at, a_mn, b_mn, shared_a = !a_registers] {
    if (product.read) return;
    product.read = true;
    if (shared_a) read_operand<T>(block, a_at, 64, a_mn, product.a);
    read_operand<T>(block, b_at, R * 2, b_mn, product.b);
  };
  if (first && coin()) read();
  auto& accumulator = thread.accumulators[d];
  if (accumulator.in_flight++ == 0) {
    accumulator.value.assign(d, d + R);
    for (float& x : d) x = NAN;
  }
  thread.products.open.push_back(std::make_shared<Deed>(Deed{[&thread, &d, &product, read, add, number] {
    read();
    auto& accumulator = thread.accumulators[d];
    accumulate<R>(product, thread, accumulator.value, add, STEP<T>);
    if (--accumulator.in_flight == 0) {
      std::copy(accumulator.value.begin(), accumulator.value.end(), d);
      thread.accumulators.erase(d);
    }
    // The last thread's deed frees the product.
    if (++product.taken == 128) thread.block->products[thread.warp / 4].erase(number);
  }}));
}

}  // namespace phi4rv::emulator

namespace phi4rv::hopper {

using emulator::shared_address;

template <typename S>
constexpr int shared_bytes = sizeof(S) + 1024;
template <typename S>
S& block_shared() {
  auto& block = *emulator::self().block;
  if (int(sizeof(S)) > block.shared_bytes) emulator::fail("less shared memory was asked for than the kernel uses");
  return *reinterpret_cast<S*>(block.shared);
}

inline void init(uint64_t* barrier, int arrivals) {
  shared_address(barrier);
  *reinterpret_cast<emulator::Barrier*>(barrier) = {0, uint64_t(arrivals), uint64_t(arrivals), 0};
}
inline void fence_init() {}
inline void arrive(uint64_t* barrier) { emulator::arrive_at_barrier(emulator::barrier_at(barrier), 0); }
inline void arrive_at(uint64_t* barrier, int rank) {
  emulator::arrive_at_barrier(*reinterpret_cast<emulator::Barrier*>(emulator::there(barrier, rank)), 0);
}
inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  emulator::arrive_at_barrier(emulator::barrier_at(barrier), bytes);
}
inline void wait(uint64_t* barrier, uint32_t parity) {
  const auto& b = emulator::barrier_at(barrier);
  if (b.phase == (parity & 1)) emulator::yield_until("an mbarrier", [&b, parity] { return b.phase != (parity & 1); });
}

inline void prefetch(const CUtensorMap*) {}
inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1) {
  emulator::load(to, map, barrier, 1 << emulator::self().block->rank, {c0, c1, 0, 0});
}
inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  emulator::load(to, map, barrier, 1 << emulator::self().block->rank, {c0, c1, c2, 0});
}
inline void load_box_to_all(void* to, const CUtensorMap* map, uint64_t* barrier, uint16_t blocks, int c0, int c1) {
  emulator::load(to, map, barrier, blocks, {c0, c1, 0, 0});
}
inline void load_box_to_all(
    void* to, const CUtensorMap* map, uint64_t* barrier, uint16_t blocks, int c0, int c1, int c2) {
  emulator::load(to, map, barrier, blocks, {c0, c1, c2, 0});
}
inline void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  if (bytes % 16 || uintptr_t(from) % 16 || shared_address(to) % 16) emulator::fail("a bulk copy off its 16 bytes");
  shared_address(static_cast<char*>(to) + bytes - 1);
  auto* b = &emulator::barrier_at(barrier);
  emulator::some_time([=] {
    std::memcpy(to, from, bytes);
    b->bytes -= bytes;
    emulator::settle(*b);
  });
}
inline void add_integers(int32_t* to, const int32_t* from, uint32_t bytes) {
  if (bytes % 16 || uintptr_t(to) % 16 || shared_address(from) % 16) emulator::fail("a bulk sum off its 16 bytes");
  shared_address(reinterpret_cast<const char*>(from) + bytes - 1);
  emulator::self().stores.open.push_back(emulator::some_time([=] {
    for (uint32_t i = 0; i < bytes / 4; i++) to[i] = int32_t(uint32_t(to[i]) + uint32_t(from[i]));
  }));
}
inline void store_commit() { emulator::self().stores.commit(); }
template <int PENDING>
void store_wait_read() {
  emulator::self().stores.wait(PENDING);
}
template <int PENDING>
void store_wait() {
  emulator::self().stores.wait(PENDING);
}
inline void fence_async() {}

inline void sync_threads(int barrier, int threads) {
  emulator::meet(emulator::self().block->barriers[barrier], threads, true, "a named barrier");
}
inline void arrive_threads(int barrier, int threads) {
  emulator::meet(emulator::self().block->barriers[barrier], threads, false, "");
}
template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void give_registers() {}
inline int cluster_rank() { return emulator::self().block->rank; }
inline void cluster_sync() {
  auto& cluster = *emulator::self().block->cluster;
  emulator::meet(cluster.meeting, cluster.live, true, "its cluster");
}

inline void product_fence() { emulator::self().product_fenced = true; }
inline void product_commit() { emulator::self().products.commit(); }
template <int PENDING>
void product_wait() {
  auto& thread = emulator::self();
  int newest = thread.products_issued - int(thread.products.open.size());
  const auto& groups = thread.products.committed;
  for (int i = 0; i < PENDING && i < int(groups.size()); i++) newest -= int(groups[groups.size() - 1 - i].size());
  // A product is the whole warpgroup's: it ends after the last of its threads has issued it.
  auto& products = thread.block->products[thread.warp / 4];
  const auto issued = [&products, newest] {
    const auto found = products.find(newest - 1);
    return found == products.end() || found->second.issued == 128;
  };
  if (!issued()) emulator::yield_until("its warpgroup's product", issued);
  thread.products.wait(PENDING);
  thread.product_fenced = false;
}
template <int N>
void pin(float (&)[N]) {}
template <int N>
void pin(uint32_t (&)[N][4]) {}

inline uint64_t operand(const void* p, uint32_t outer = 16) {
  const uint64_t address = (shared_address(p) & 0x3FFFF) >> 4;
  return address | uint64_t(outer >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

inline uint64_t advance(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

enum Major { K_MAJOR = 0, MN_MAJOR = 1 };

template <typename T>
concept Short = std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>;

template <Major A_MAJOR = K_MAJOR, Major B_MAJOR = K_MAJOR, int R, Short T>
void product(float (&d)[R], uint64_t a, uint64_t b, bool add, T) {
  emulator::issue<T>(d, nullptr, a, b, add, A_MAJOR, B_MAJOR);
}
template <Major B_MAJOR, int R, Short T>
void product(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool add, T) {
  emulator::issue<T>(d, a, 0, b, add, false, B_MAJOR);
}
template <int R>
void product(float (&d)[R], uint64_t a, uint64_t b, bool add, __nv_fp8_e4m3) {
  emulator::issue<__nv_fp8_e4m3>(d, nullptr, a, b, add, false, false);
}

}  // namespace phi4rv::hopper
