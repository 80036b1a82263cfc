// What attention's backward does row by row, before its products and after them. Bound by memory: before, dout and out
// are read and the integer sums of dq zeroed, after, those are read and dq is written.

#include <cmath>

#include "attention_backward.h"
#include "warp.cuh"

namespace phi4rv::backward {
namespace {

using namespace warp;

constexpr int THREADS = 256;
constexpr int LANES = 16;  // of a row, 8 columns each
constexpr float LOG2E = 1.4426950408889634f;

// A block's tile of query rows of one head.
struct Tile {
  int document, begin, end;  // rows of the document
  int first, last;           // rows of the tile
  int head, place;
};

// False: no tile has this block's place.
__device__ inline bool find_tile(const AttentionBackward& b, Tile& t) {
  t.place = blockIdx.x / b.heads, t.head = blockIdx.x % b.heads;
  int low = 0, high = b.documents - 1;  // the last document whose first place is not behind
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_place(b.cu_seqlens[middle], middle) <= t.place)
      low = middle;
    else
      high = middle - 1;
  }
  t.document = low, t.begin = b.cu_seqlens[low], t.end = b.cu_seqlens[low + 1];
  t.first = t.begin + (t.place - first_place(t.begin, low)) * ROWS;
  t.last = min(t.first + ROWS, t.end);
  return t.first < t.end;
}

template <typename T>
__device__ inline void load(float (&x)[8], const void* tensor, int64_t at, bool wanted) {
  uint4 bits = make_uint4(0, 0, 0, 0);
  if (wanted) bits = *reinterpret_cast<const uint4*>(static_cast<const T*>(tensor) + at);
  const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 both = unpack<T>(pairs[i]);
    x[2 * i] = both.x, x[2 * i + 1] = both.y;
  }
}

__device__ inline float row_sum(float x) {
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}

// Absolute values as bits, in whose order a NaN is above all numbers.
__device__ inline uint32_t absolute(float x) { return __float_as_uint(x) & 0x7FFFFFFF; }

// A row's Euclidean norm, rounded up, without overflow or underflow of the squares.
__device__ inline float row_norm(const float (&x)[8]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) bits = max(bits, absolute(x[i]));
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, apart));
  const float largest = __uint_as_float(bits), inverse = 1 / (largest < TINY_ROW ? TINY_ROW : largest);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += x[i] * inverse * (x[i] * inverse);
  const float norm = largest * sqrtf(row_sum(sum)) * (1 + 0x1p-20f);
  return norm < TINY_ROW ? TINY_ROW : norm;
}

__device__ inline void raise(uint32_t* bound, uint32_t bits) {
  if (bits > *bound) atomicMax(bound, bits);
}

template <typename T, int D>
__device__ inline void prepare_queries(const AttentionBackward& b, const Tile& t) {
  constexpr int WIDTH = SUM_WIDTH<D>;
  const int lane = threadIdx.x % LANES, column = lane * 8;
  float* rows = b.rows + (int64_t(t.head) * row_tiles(b) + t.place) * ROW_VALUES * ROWS;
  for (int i = threadIdx.x / LANES; i < ROWS; i += THREADS / LANES) {
    const int row = t.first + i;
    const bool inside = row < t.last, wanted = inside && column < D;
    float dout[8], out[8], product = 0;
    load<T>(dout, b.dout, row * b.dout_stride + t.head * D + column, wanted);
    load<T>(out, b.out, (int64_t(row) * b.heads + t.head) * D + column, wanted);
#pragma unroll
    for (int j = 0; j < 8; j++) product += dout[j] * out[j];
    const float delta = row_sum(product), norm = row_norm(dout);
    if (lane == 0) {
      rows[LSE * ROWS + i] = inside ? b.lse[int64_t(t.head) * b.tokens + row] * LOG2E : INFINITY;
      rows[DELTA * ROWS + i] = delta;
      rows[INVERSE * ROWS + i] = 1 / norm;
      rows[NORM * ROWS + i] = norm;
    }
    if (wanted) {
      const int64_t half = t.head * (D / WIDTH) + column / WIDTH;
      auto* sums = reinterpret_cast<int4*>(b.sums + (half * b.tokens + row) * WIDTH + column % WIDTH);
      sums[0] = sums[1] = make_int4(0, 0, 0, 0);
    }
  }
}

template <typename T, int D>
__device__ inline void prepare_keys(const AttentionBackward& b, const Tile& t, int head) {
  const int lane = threadIdx.x % LANES, column = lane * 8;
  uint32_t* bounds = b.bounds + (int64_t(t.document) * b.kv_heads + head) * (D + 1);
  uint32_t largest[8] = {}, norm = 0;
  for (int i = threadIdx.x / LANES; i < ROWS; i += THREADS / LANES) {
    const int row = t.first + i;
    const bool wanted = row < t.last && column < D;
    float k[8], v[8];
    load<T>(k, b.k, row * b.k_stride + head * D + column, wanted);
    load<T>(v, b.v, row * b.v_stride + head * D + column, wanted);
    norm = max(norm, absolute(row_norm(v)));
#pragma unroll
    for (int j = 0; j < 8; j++) largest[j] = max(largest[j], absolute(k[j]));
  }
  norm = max(norm, __shfl_xor_sync(~0u, norm, LANES));
#pragma unroll
  for (int j = 0; j < 8; j++) largest[j] = max(largest[j], __shfl_xor_sync(~0u, largest[j], LANES));
  if (threadIdx.x % 32 == 0) raise(bounds + D, norm);
  if (threadIdx.x % 32 < D / 8) {
#pragma unroll
    for (int j = 0; j < 8; j++) raise(bounds + column + j, largest[j]);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 4) prepare_tile(const __grid_constant__ AttentionBackward b) {
  Tile t;
  if (!find_tile(b, t)) return;
  const int group = b.heads / b.kv_heads;
  prepare_queries<T, D>(b, t);
  if (t.head % group == 0) prepare_keys<T, D>(b, t, t.head / group);
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 4) finish_tile(const __grid_constant__ AttentionBackward b) {
  constexpr int WIDTH = SUM_WIDTH<D>;
  Tile t;
  if (!find_tile(b, t)) return;
  const int column = threadIdx.x % LANES * 8;
  if (column >= D) return;
  const uint32_t* bounds = b.bounds + (int64_t(t.document) * b.kv_heads + t.head / (b.heads / b.kv_heads)) * (D + 1);
  const float* norms = b.rows + ((int64_t(t.head) * row_tiles(b) + t.place) * ROW_VALUES + NORM) * ROWS;
  float unit[8];
#pragma unroll
  for (int j = 0; j < 8; j++) unit[j] = column_bound<D>(bounds, column + j);
  for (int row = t.first + threadIdx.x / LANES; row < t.last; row += THREADS / LANES) {
    const float norm = norms[row - t.first] * b.scale;
    const int64_t half = t.head * (D / WIDTH) + column / WIDTH;
    const int block = exchanged<WIDTH>(column % WIDTH / 8, row);
    const auto* sums = reinterpret_cast<const int4*>(b.sums + (half * b.tokens + row) * WIDTH + block * 8);
    const int4 low = sums[0], high = sums[1];
    const auto real = [](int sum) { return sum * 0x1p-30f; };  // first: with the norm it might be subnormal
    uint4 dq;
    dq.x = pack<T>(real(low.x) * (norm * unit[0]), real(low.y) * (norm * unit[1]));
    dq.y = pack<T>(real(low.z) * (norm * unit[2]), real(low.w) * (norm * unit[3]));
    dq.z = pack<T>(real(high.x) * (norm * unit[4]), real(high.y) * (norm * unit[5]));
    dq.w = pack<T>(real(high.z) * (norm * unit[6]), real(high.w) * (norm * unit[7]));
    *reinterpret_cast<uint4*>(static_cast<T*>(b.dq) + (int64_t(row) * b.heads + t.head) * D + column) = dq;
  }
}

template <typename T, int D>
cudaError_t launch(const AttentionBackward& b, cudaStream_t stream, bool before) {
  return launch_kernel({row_tiles(b) * b.heads, THREADS}, stream, before ? prepare_tile<T, D> : finish_tile<T, D>, b);
}

template <typename T>
cudaError_t launch(const AttentionBackward& b, cudaStream_t stream, bool before) {
  switch (b.head_dim) {
    case 64: return launch<T, 64>(b, stream, before);
    case 72: return launch<T, 72>(b, stream, before);
    case 80: return launch<T, 80>(b, stream, before);
    case 128: return launch<T, 128>(b, stream, before);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t launch(const AttentionBackward& b, cudaStream_t stream, bool before) {
  return b.type == Type::bfloat16 ? launch<__nv_bfloat16>(b, stream, before) : launch<__half>(b, stream, before);
}

}  // namespace

cudaError_t prepare(const AttentionBackward& b, cudaStream_t stream) { return launch(b, stream, true); }
cudaError_t finish(const AttentionBackward& b, cudaStream_t stream) { return launch(b, stream, false); }

}  // namespace phi4rv::backward
