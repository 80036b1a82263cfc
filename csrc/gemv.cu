// y = x w^T for 1 to 8 rows of x: the products of decoding, at the speed of the memory that the weights lie in.
//
// Eight rows of w are the 8 columns of an m16n8k16 product, the rows of x its first 8 rows. A product's sum may take its
// terms in any order, so a lane gives both operands 16 adjacent bytes and no value changes lanes. The warps of a block
// share the columns of one tile of 8 rows and add their parts in a fixed order: nothing is atomic. The next loads are
// always in flight, and the first ones leave before the kernel in front has finished (programmatic dependent launch).
//
// Around the product: RMSNorm of x before it, SwiGLU or a residual after it, so that a decoder layer needs no other
// kernel than these and attention.

#include "hopper.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "warp.cuh"

namespace phi4rv {
namespace {

using namespace warp;

constexpr int WARPS = 10;     // 5120 and 17920 columns are whole rounds of 10 warps
constexpr int LOADS = 4;      // of 16 bytes that a lane has in flight, twice
constexpr int TILE = 8;       // rows of w
constexpr int ROWS = 8;       // rows of x at most
constexpr int COLUMNS = 32;   // of w that a warp reads at once: 4 lanes of 8

// A lane's walk over the 16-byte pieces of its block's tiles: BATCH of each half a step, warps interleaved.
template <typename T, int HALVES>
struct Walk {
  static constexpr int BATCH = LOADS / HALVES;  // of each half
  const T* w;      // this lane's first piece of row 0
  int64_t half;    // elements from a gate row to its up row
  int k, tiles, tile, column;

  __device__ Walk(const Gemv& g, int warp, int lane)
      : w(static_cast<const T*>(g.w) + int64_t(lane / 4) * g.k + lane % 4 * 8),
        half(int64_t(g.n) / 2 * g.k), k(g.k), tiles(g.n / HALVES / TILE), tile(blockIdx.x), column(warp * COLUMNS) {}

  __device__ bool more() const { return tile < tiles; }
  __device__ bool last_of_tile() const { return column + WARPS * BATCH * COLUMNS >= k; }
  __device__ int at(int i) const { return column + i * WARPS * COLUMNS; }
  __device__ void load(uint4 (&to)[HALVES][BATCH]) const {
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        if (more() && at(i) < k) to[h][i] = load_once(w + h * half + int64_t(tile) * TILE * k + at(i));
  }
  __device__ void advance(int warp) {
    if (last_of_tile()) {
      tile += gridDim.x, column = warp * COLUMNS;
    } else {
      column += WARPS * BATCH * COLUMNS;
    }
  }
};

template <typename T>
__device__ inline void normalise(const Gemv& g, float (&sums)[WARPS], T* to) {
  for (int row = 0; row < g.rows; row++) {
    const T* x = static_cast<const T*>(g.x) + int64_t(row) * g.k;
    float sum = 0;
    for (int i = threadIdx.x * 2; i < g.k; i += WARPS * 64) {
      const float2 v = unpack<T>(*reinterpret_cast<const uint32_t*>(x + i));
      sum += v.x * v.x + v.y * v.y;
    }
    for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < WARPS; i++) sum += sums[i];
    const float scale = rsqrtf(sum / g.k + g.eps);
    const T* weight = static_cast<const T*>(g.norm);
    for (int i = threadIdx.x * 2; i < g.k; i += WARPS * 64) {
      const float2 v = unpack<T>(*reinterpret_cast<const uint32_t*>(x + i));
      const float2 w = unpack<T>(*reinterpret_cast<const uint32_t*>(weight + i));
      *reinterpret_cast<uint32_t*>(to + int64_t(row) * g.k + i) = pack<T>(v.x * scale * w.x, v.y * scale * w.y);
    }
  }
  __syncthreads();
}

__device__ inline float silu(float x) { return x / (1 + __expf(-x)); }

template <int HALVES>
struct Shared {
  float parts[2][WARPS][HALVES][ROWS][TILE];
  float sums[WARPS];
  uint4 normed[];  // x after its norm, if there is one
};

// HALVES is 2 for SwiGLU: a tile is 8 rows of the gate half of w and the same 8 of the up half.
template <typename T, bool NORM, int HALVES>
__global__ void __launch_bounds__(WARPS * 32, 2) gemv_kernel(const Gemv g) {
  constexpr int BATCH = Walk<T, HALVES>::BATCH;
  auto& s = hopper::block_shared<Shared<HALVES>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  Walk<T, HALVES> now(g, warp, lane);
  uint4 w[HALVES][BATCH], next[HALVES][BATCH];
  now.load(next);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (NORM) normalise<T>(g, s.sums, reinterpret_cast<T*>(s.normed));
  const T* x = (NORM ? reinterpret_cast<const T*>(s.normed) : static_cast<const T*>(g.x)) + int64_t(row) * g.k + lane % 4 * 8;

  const int out = g.n / HALVES;
  float sum[HALVES][4] = {};
  for (int turn = 0; now.more();) {
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int i = 0; i < BATCH; i++) w[h][i] = next[h][i];
    const Walk<T, HALVES> here = now;
    now.advance(warp);
    now.load(next);
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (here.at(i) >= g.k) break;
      uint4 v = {};
      if (row < g.rows) v = *reinterpret_cast<const uint4*>(x + here.at(i));
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        multiply(sum[h], {v.x, 0, v.y, 0}, {w[h][i].x, w[h][i].y}, T());
        multiply(sum[h], {v.z, 0, v.w, 0}, {w[h][i].z, w[h][i].w}, T());
      }
    }
    if (!here.last_of_tile()) continue;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      *reinterpret_cast<float2*>(&s.parts[turn][warp][h][row][lane % 4 * 2]) = make_float2(sum[h][0], sum[h][1]);
      sum[h][0] = sum[h][1] = 0;
    }
    __syncthreads();  // one a tile: the next tile writes the other half of ``parts``
    if (threadIdx.x < ROWS * TILE && threadIdx.x / TILE < g.rows) {
      const int m = threadIdx.x / TILE, n = threadIdx.x % TILE;
      float y[HALVES] = {};
      for (int i = 0; i < WARPS; i++)
        for (int h = 0; h < HALVES; h++) y[h] += s.parts[turn][i][h][m][n];
      float result = HALVES == 2 ? silu(y[0]) * y[HALVES - 1] : y[0];
      const int64_t at = int64_t(m) * out + int64_t(here.tile) * TILE + n;
      if (g.residual) result += float(static_cast<const T*>(g.residual)[at]);
      static_cast<T*>(g.y)[at] = T(result);
    }
    turn ^= 1;
  }
}

template <typename T, bool NORM, int HALVES>
cudaError_t launch(const Gemv& g, cudaStream_t stream) {
  const int bytes = hopper::shared_bytes<Shared<HALVES>> + (NORM ? g.rows * g.k * int(sizeof(T)) : 0);
  const int blocks = min(2 * g.multiprocessors, g.n / HALVES / TILE);
  return launch_kernel({.blocks = blocks, .threads = WARPS * 32, .shared = bytes, .early = true}, stream,
                gemv_kernel<T, NORM, HALVES>, g);
}

template <typename T>
cudaError_t launch(const Gemv& g, cudaStream_t stream) {
  if (g.norm) return g.swiglu ? launch<T, true, 2>(g, stream) : launch<T, true, 1>(g, stream);
  return g.swiglu ? launch<T, false, 2>(g, stream) : launch<T, false, 1>(g, stream);
}

}  // namespace

cudaError_t gemv(const Gemv& g, cudaStream_t stream) {
  return g.type == Type::bfloat16 ? launch<__nv_bfloat16>(g, stream) : launch<__half>(g, stream);
}

}  // namespace phi4rv
