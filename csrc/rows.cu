// What is done to whole rows around products: rounding them to 8 bits, and copying those that no product writes.

#include "hopper.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "warp.cuh"

namespace phi4rv {
namespace {

using namespace warp;

constexpr int THREADS = 256;
constexpr float LARGEST = 448;           // of e4m3
constexpr float SMALLEST = 1.2e-38f;     // scales below have no inverse

struct Shared {
  float largest[THREADS / 32];
};

template <typename T>
__device__ inline void unpack8(const uint4& v, float (&x)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = unpack<T>(words[i]);
    x[2 * i] = two.x, x[2 * i + 1] = two.y;
  }
}

// A block a row, read twice: the second time from L1. As phi4rv/ops/low_precision.py rounds, bit by bit.
template <typename T>
__global__ void __launch_bounds__(THREADS) quantize(const QuantizeRows q) {
  auto& s = hopper::block_shared<Shared>();
  const T* row = static_cast<const T*>(q.x) + int64_t(blockIdx.x) * q.stride;
  float largest = 0, x[8];
  for (int c = threadIdx.x * 8; c < q.columns; c += THREADS * 8) {
    unpack8<T>(*reinterpret_cast<const uint4*>(row + c), x);
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(x[i]));
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lane));
  if (threadIdx.x % 32 == 0) s.largest[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) largest = fmaxf(largest, s.largest[i]);
  const float scale = largest / LARGEST, inverse = scale >= SMALLEST ? 1 / scale : 0;
  if (threadIdx.x == 0) q.scales[blockIdx.x] = scale;
  for (int c = threadIdx.x * 8; c < q.columns; c += THREADS * 8) {
    unpack8<T>(*reinterpret_cast<const uint4*>(row + c), x);
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      words[i] = pack_float8(x[4 * i] * inverse, x[4 * i + 1] * inverse) |
                 uint32_t(pack_float8(x[4 * i + 2] * inverse, x[4 * i + 3] * inverse)) << 16;
    *reinterpret_cast<uint2*>(static_cast<uint8_t*>(q.out) + int64_t(blockIdx.x) * q.columns + c) =
        make_uint2(words[0], words[1]);
  }
}

__global__ void __launch_bounds__(THREADS) mark(const CopyRows c) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i < c.indices) c.covered[c.index[i]] = 1;
}

// A warp a row.
__global__ void __launch_bounds__(THREADS) copy(const CopyRows c) {
  const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row >= c.rows || c.covered[row]) return;
  const char* from = static_cast<const char*>(c.from) + int64_t(row) * c.from_stride;
  char* to = static_cast<char*>(c.to) + int64_t(row) * c.bytes;
  // Four loads under way at a time: the compiler, which cannot know that from and to are apart, would wait for each.
  constexpr int WIDE = 32 * 16;
  for (int at = threadIdx.x % 32 * 16; at < c.bytes; at += 4 * WIDE) {
    uint4 pieces[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (at + i * WIDE < c.bytes) pieces[i] = *reinterpret_cast<const uint4*>(from + at + i * WIDE);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (at + i * WIDE < c.bytes) *reinterpret_cast<uint4*>(to + at + i * WIDE) = pieces[i];
  }
}

constexpr int blocks(int work, int each) { return (work + each - 1) / each; }

}  // namespace

cudaError_t quantize_rows(const QuantizeRows& q, cudaStream_t stream) {
  return launch_kernel({q.rows, THREADS, hopper::shared_bytes<Shared>}, stream,
                       q.type == Type::bfloat16 ? quantize<__nv_bfloat16> : quantize<__half>, q);
}

cudaError_t copy_rows(const CopyRows& c, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (c.indices) error = launch_kernel({blocks(c.indices, THREADS), THREADS}, stream, mark, c);
  if (error) return error;
  return launch_kernel({blocks(c.rows, THREADS / 32), THREADS}, stream, copy, c);
}

}  // namespace phi4rv
