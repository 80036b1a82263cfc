// The functions of csrc/warp.cuh on the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "grid.h"

namespace phi4rv::warp {

template <typename T>
uint32_t pack(float low, float high) {
  const T both[2] = {T(low), T(high)};
  uint32_t bits;
  std::memcpy(&bits, both, 4);
  return bits;
}
template <typename T>
float2 unpack(uint32_t bits) {
  T both[2];
  std::memcpy(both, &bits, 4);
  return make_float2(float(both[0]), float(both[1]));
}
inline uint32_t float8_to_half(uint32_t two) {
  __nv_fp8_e4m3 both[2];
  std::memcpy(both, &two, 2);
  return pack<__half>(float(both[0]), float(both[1]));
}
inline uint16_t pack_float8(float low, float high) {
  const __nv_fp8_e4m3 both[2] = {__nv_fp8_e4m3(low), __nv_fp8_e4m3(high)};
  uint16_t bits;
  std::memcpy(&bits, both, 2);
  return bits;
}
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0 : y;
}
inline float reciprocal_fast(float x) { return 1 / x; }
template <int LUT>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; i++)
    if (LUT >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}
template <int BYTES>
uint32_t permute(uint32_t a, uint32_t b) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; i++) d |= uint32_t(both >> 8 * (BYTES >> 4 * i & 7) & 0xFF) << 8 * i;
  return d;
}

template <typename T>
uint32_t subtract(uint32_t a, uint32_t b) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(x.x - y.x, x.y - y.y);
}
template <typename T>
uint32_t scale(uint32_t a, uint32_t by) {
  const float2 x = unpack<T>(a), y = unpack<T>(by);
  return pack<T>(x.x * y.x, x.y * y.y);
}

template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto* all = emulator::exchange(mine, sizeof(mine));
  const int lane = emulator::self().lane;
  for (int i = 0; i < 4; i++) {
    float sum = 0;
    for (int k = 0; k < 16; k += 2) {
      const auto* row = reinterpret_cast<const uint32_t*>(all[lane / 4 * 4 + k % 8 / 2]);
      const auto* column = reinterpret_cast<const uint32_t*>(all[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2]);
      const float2 x = unpack<T>(row[k / 8 * 2 + i / 2]), y = unpack<T>(column[4 + k / 8]);
      sum += x.x * y.x + x.y * y.y;
    }
    d[i] += sum;
  }
}

inline void move_matrices(uint32_t (&d)[4], const void* row, bool transposed, bool store) {
  struct Brought {
    char* row;
    uint32_t d[4];
  } mine{static_cast<char*>(const_cast<void*>(row)), {d[0], d[1], d[2], d[3]}};
  if (emulator::shared_address(row) % 16) emulator::fail("a matrix row off its 16 bytes");
  const auto* all = emulator::exchange(&mine, sizeof(mine));
  const int lane = emulator::self().lane;
  for (int m = 0; m < 4; m++)
    for (int i = 0; i < 2; i++) {
      const int line = lane / 4, column = lane % 4 * 2 + i;
      const auto* owner = reinterpret_cast<const Brought*>(all[m * 8 + (transposed ? column : line)]);
      char* at = owner->row + 2 * (transposed ? line : column);
      if (store)
        std::memcpy(at, reinterpret_cast<char*>(&d[m]) + 2 * i, 2);
      else
        std::memcpy(reinterpret_cast<char*>(&d[m]) + 2 * i, at, 2);
    }
  if (store) __syncwarp();
}
inline void load_matrices(uint32_t (&d)[4], const void* row) { move_matrices(d, row, false, false); }
inline void load_matrices_transposed(uint32_t (&d)[4], const void* row) { move_matrices(d, row, true, false); }
inline void store_matrices(void* row, const uint32_t (&d)[4]) {
  uint32_t copy[4] = {d[0], d[1], d[2], d[3]};
  move_matrices(copy, row, false, true);
}

inline void copy_async(void* to, const void* from, bool wanted = true) {
  if (emulator::shared_address(to) % 16 || (wanted && uintptr_t(from) % 16)) emulator::fail("a copy off its 16 bytes");
  auto deed = std::make_shared<emulator::Deed>(emulator::Deed{[=] {
    if (wanted)
      std::memcpy(to, from, 16);
    else
      std::memset(to, 0, 16);
  }});
  if (emulator::coin()) deed->now();
  emulator::self().copies.open.push_back(deed);
}
inline void copy_commit() { emulator::self().copies.commit(); }
template <int PENDING>
void copy_wait() {
  emulator::self().copies.wait(PENDING);
}

inline int load_l2(const int* p) { return *p; }

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace phi4rv::warp
