// out = F(a b^T + bias) for Hopper: a (m, k) and b (n, k), sums in float32, rows of out in order or sent elsewhere by
// an index. F is what happens to one element before it is written.
//
// Shape. Two warpgroups of 64 x 256 fill the registers with sums (128 of a thread's 232). Blocks come in pairs, one
// above the other: both need the same 256 rows of b, each loads half of them and sends it to both. So a step of 64
// columns, 1024 clocks of products, costs a block 16 KB of a and 16 KB of b from L2: 32 bytes a clock (48 without
// pairs, 80 with tiles of 64 x 256). From shared memory the products read 80 of its 128 bytes a clock.
//
// Hiding the epilogue. With k = 1152 a tile has only 18 steps; finishing it, 2400 instructions of each of 8 warps,
// would add a quarter to its time or more. Finished sums are rounded to half as many registers, as PyTorch rounds them
// before GELU, and the next tile's products start; behind each of its steps a sixteenth of the finished tile is worked
// on and written. Two tiles of 64 x 256 in turn (CUTLASS's ping-pong kernel) hide it too, at 2.5 times the traffic. A
// warp writes its own 16 rows through its own shared memory, in whole lines of 128 bytes: rows sent elsewhere are not
// slower, and no warp waits for another.
//
// 8-bit floats: the tensor core keeps about 14 bits of a sum, so it sums 128 terms at a time and float32 registers do
// the rest (DeepSeek-V3, 2024). Those take the room of half the columns: tiles of 128 x 128, 48 bytes a clock from L2.
//
// Pairs of tiles are visited column by column in bands of 8 rows: what is in flight shares its operands in L2. The
// order is fixed and nothing is atomic: the same input gives the same bits.
#pragma once

#include "hopper.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "tensor_map.h"
#include "warp.cuh"

namespace phi4rv::gemm_core {

using namespace hopper;
using namespace warp;

constexpr int GROUPS = 2;          // consumer warpgroups
constexpr int ROWS = 64 * GROUPS;  // of a block's tile
constexpr int PAIR = 2;            // blocks of a cluster
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int BAND = 8;            // rows of pairs that are visited together
constexpr int PIECE = 16;          // columns of a finished tile that are worked on behind a step
constexpr int WIDE = 64;           // columns that a warp writes at once

// By T, the type of a and b. A step is 128 bytes of each of their rows: four products.
template <typename T>
struct Shape {
  static constexpr bool PROMOTE = sizeof(T) == 1;
  static constexpr int COLUMNS = PROMOTE ? 128 : 256;
  static constexpr int STEP = 128 / sizeof(T);
  static constexpr int STAGES = PROMOTE ? 6 : 4;
};

template <typename T, typename Out>
struct alignas(1024) Shared {
  using S = Shape<T>;
  T a[S::STAGES][ROWS][S::STEP];
  T b[S::STAGES][S::COLUMNS][S::STEP];
  Out staged[4 * GROUPS][16][WIDE];       // each warp's finished rows on their way out
  float b_scales[S::STAGES][S::COLUMNS];  // these two with the last step of a tile
  Out bias[S::STAGES][S::COLUMNS];
  uint64_t full[S::STAGES], empty[S::STAGES];
};

struct Arguments {
  CUtensorMap a, b;
  const void* bias;
  const float *a_scales, *b_scales;
  const int64_t* index;
  void* out;
  int m, n, k;
};

// The ring's position: which stage, and of which round.
template <int STAGES>
struct Ring {
  int stage = 0, round = 0;
  __device__ void advance() {
    if (++stage == STAGES) stage = 0, round ^= 1;
  }
};

struct Tile {
  int row, column;
};

// The ``work``-th pair's tile of this block.
template <typename T>
__device__ inline bool next_tile(const Arguments& a, int& work, Tile& tile) {
  const int down = (a.m + PAIR * ROWS - 1) / (PAIR * ROWS), across = (a.n + Shape<T>::COLUMNS - 1) / Shape<T>::COLUMNS;
  if (work >= down * across) return false;
  const int first = work / (BAND * across) * BAND, height = min(BAND, down - first);
  const int inside = work - first * across;
  tile.row = ((first + inside % height) * PAIR + cluster_rank()) * ROWS;
  tile.column = inside / height * Shape<T>::COLUMNS;
  work += gridDim.x / PAIR;
  return true;
}

template <typename T, typename Out>
__device__ inline void produce(const Arguments& a, Shared<T, Out>& s) {
  using S = Shape<T>;
  constexpr int HALF = S::COLUMNS / PAIR;
  const int steps = (a.k + S::STEP - 1) / S::STEP, half = cluster_rank() * HALF;
  Ring<S::STAGES> ring;
  Tile tile;
  for (int work = blockIdx.x / PAIR; next_tile<T>(a, work, tile);) {
    for (int step = 0; step < steps; step++, ring.advance()) {
      uint64_t* full = &s.full[ring.stage];
      const int columns = step == steps - 1 ? min(S::COLUMNS, a.n - tile.column) : 0;
      const int scales = S::PROMOTE ? columns : 0;
      wait(&s.empty[ring.stage], ring.round ^ 1);  // in both blocks
      arrive_expecting(full, sizeof(s.a[0]) + sizeof(s.b[0]) + columns * sizeof(Out) + scales * sizeof(float));
      load_box(s.a[ring.stage], &a.a, full, step * S::STEP, tile.row);
      load_box_to_all(s.b[ring.stage][half], &a.b, full, (1 << PAIR) - 1, step * S::STEP, tile.column + half);
      const Out* bias = static_cast<const Out*>(a.bias) + tile.column;
      if (columns) load_bytes(s.bias[ring.stage], bias, columns * sizeof(Out), full);
      if (scales) load_bytes(s.b_scales[ring.stage], a.b_scales + tile.column, scales * sizeof(float), full);
    }
  }
}

// A consumer thread of a warpgroup, its sums and what it has not written yet of the tile before.
template <typename T, typename Out, typename F>
struct Consumer {
  using S = Shape<T>;
  static constexpr int COLUMNS = S::COLUMNS, PIECES = COLUMNS / PIECE;

  const Arguments& a;
  Shared<T, Out>& s;
  const int group, warp, lane;
  Ring<S::STAGES> ring;
  float sums[COLUMNS / 2];
  float a_scale[2];
  float part[S::PROMOTE ? COLUMNS / 2 : 1] = {};  // of 128 terms
  uint32_t rounded[COLUMNS / 4];  // two columns each: [2j + h] of columns 8j + lane % 4 * 2, row lane / 4 + 8h
  Tile last;
  bool pending = false;

  __device__ Consumer(const Arguments& a, Shared<T, Out>& s, int thread)
      : a(a), s(s), group(thread / 128), warp(thread / 32), lane(thread % 32) {}

  // In both blocks: each writes half of what the other multiplies.
  __device__ void release(int stage) {
    if (threadIdx.x % 128 < PAIR) arrive_at(&s.empty[stage], threadIdx.x % 128);
  }

  __device__ void issue(float (&d)[COLUMNS / 2], bool add) {
    wait(&s.full[ring.stage], ring.round);
    pin(d);
    product_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = i * 32 / sizeof(T);
      product(d, operand(&s.a[ring.stage][group * 64][at]), operand(&s.b[ring.stage][0][at]), add || i > 0, T());
    }
    product_commit();
  }

  // A step in two parts; between them its products are under way. A tile's last stage stays: the bias is there too.
  __device__ void begin(int step) {
    if constexpr (S::PROMOTE) {
      issue(part, false);
    } else {
      issue(sums, step > 0);
      product_wait<1>();
      if (step > 0) release(ring.stage == 0 ? S::STAGES - 1 : ring.stage - 1);
    }
  }
  __device__ void end(int step, bool is_last) {
    if constexpr (S::PROMOTE) {
      product_wait<0>();
      pin(part);
      if (!is_last) release(ring.stage);
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; i++) sums[i] = step == 0 ? part[i] : sums[i] + part[i];
    }
    if (!is_last) ring.advance();
  }

  __device__ void load_scales(const Tile& tile) {
#pragma unroll
    for (int h = 0; h < 2; h++) a_scale[h] = a.a_scales[min(tile.row + warp * 16 + lane / 4 + 8 * h, a.m - 1)];
  }

  // Scales, bias, rounding: after this the sums are free.
  __device__ void take(const Tile& tile) {
    const Out* bias = &s.bias[ring.stage][lane % 4 * 2];
    const float* scales = &s.b_scales[ring.stage][lane % 4 * 2];
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      const float2 b = unpack<Out>(*reinterpret_cast<const uint32_t*>(bias + 8 * j));
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float x = sums[4 * j + 2 * h], y = sums[4 * j + 2 * h + 1];
        if constexpr (S::PROMOTE) {
          x *= a_scale[h] * scales[8 * j], y *= a_scale[h] * scales[8 * j + 1];
        }
        rounded[2 * j + h] = pack<Out>(x + b.x, y + b.y);
      }
    }
    sync_threads(1 + group, 128);  // all have read
    release(ring.stage);
    ring.advance();
    last = tile, pending = true;
  }

  // F of 16 columns, and after every fourth such piece the way out.
  __device__ void finish(int piece) {
    uint32_t done[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = unpack<Out>(rounded[4 * piece + i]);
      done[i] = F::CHANGES ? pack<Out>(F::apply(x.x), F::apply(x.y)) : rounded[4 * piece + i];
    }
    constexpr int ROUND = WIDE / PIECE;
    Out(&staged)[16][WIDE] = s.staged[warp];
    // Chunks of 16 bytes, swizzled: neither this nor the reading back meets a bank twice.
    const int row = lane % 16, chunk = piece % ROUND * 2 + lane / 16;
    if (piece % ROUND == 0) __syncwarp();
    store_matrices(&staged[row][(chunk ^ row % 8) * 8], done);
    if (piece % ROUND == ROUND - 1) {
      __syncwarp();
      write(staged, piece / ROUND * WIDE);
    }
  }

  __device__ void write(const Out (&staged)[16][WIDE], int from) {
    const int column = last.column + from + lane % 8 * 8;
    int64_t to[4];  // read together: one wait for memory in place of four
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = last.row + warp * 16 + i * 4 + lane / 8;
      to[i] = a.index ? a.index[min(row, a.m - 1)] : row;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = i * 4 + lane / 8, row = last.row + warp * 16 + r;
      if (row >= a.m || column >= a.n) continue;
      *reinterpret_cast<uint4*>(static_cast<Out*>(a.out) + to[i] * a.n + column) =
          *reinterpret_cast<const uint4*>(&staged[r][(lane % 8 ^ r % 8) * 8]);
    }
  }

  __device__ void run() {
    const int all = (a.k + S::STEP - 1) / S::STEP;
    Tile tile;
    for (int work = blockIdx.x / PAIR;;) {
      const bool more = next_tile<T>(a, work, tile);
      const int steps = more ? all : 0;  // none behind the last tile
      if (S::PROMOTE && more) load_scales(tile);
      int step = 0;
#pragma unroll
      for (int piece = 0; piece < PIECES; piece++, step++) {
        if (step < steps) begin(step);
        if (pending) finish(piece);
        if (step < steps) end(step, step == steps - 1);
      }
      for (; step < steps; step++) begin(step), end(step, step == steps - 1);
      product_wait<0>();
      pin(sums);
      if (!more) return;
      take(tile);
    }
  }
};

template <typename T, typename Out, typename F>
__global__ void __launch_bounds__(THREADS, 1) gemm_kernel(const __grid_constant__ Arguments a) {
  auto& s = block_shared<Shared<T, Out>>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape<T>::STAGES; i++) init(&s.full[i], 1), init(&s.empty[i], PAIR * GROUPS);
    fence_init();
    prefetch(&a.a), prefetch(&a.b);
  }
  cluster_sync();
  wait_for_previous_kernel();
  let_next_kernel_start();  // not before: what came ahead of the kernel in front has then ended for the next one too
  if (threadIdx.x / 128 == GROUPS) {
    give_registers<40>();
    if (threadIdx.x == 128 * GROUPS) produce(a, s);
    __syncwarp();
  } else {
    take_registers<232>();
    Consumer<T, Out, F>(a, s, threadIdx.x).run();
  }
  cluster_sync();  // what the other block sends has a place to arrive
}

// With T, Out and F as in ``g``.
template <typename T, typename Out, typename F>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  using S = Shape<T>;
  Arguments a{};
  cudaError_t error = tensor_map(a.a, g.a, g.type, {g.k, g.m}, {g.a_stride * int64_t(sizeof(T))}, {S::STEP, ROWS});
  if (!error)
    error = tensor_map(a.b, g.b, g.type, {g.k, g.n}, {g.k * int64_t(sizeof(T))}, {S::STEP, S::COLUMNS / PAIR});
  if (error) return error;
  a.bias = g.bias, a.a_scales = g.a_scales, a.b_scales = g.b_scales, a.index = g.index, a.out = g.out;
  a.m = g.m, a.n = g.n, a.k = g.k;
  const int pairs = (g.m + PAIR * ROWS - 1) / (PAIR * ROWS) * ((g.n + S::COLUMNS - 1) / S::COLUMNS);
  const int blocks = PAIR * min(pairs, max(g.multiprocessors / PAIR, 1));
  const Launch how{blocks, THREADS, shared_bytes<Shared<T, Out>>, PAIR, /*early=*/true};
  return launch_kernel(how, stream, gemm_kernel<T, Out, F>, a);
}

}  // namespace phi4rv::gemm_core
