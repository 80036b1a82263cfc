// Attention on packed rows for Hopper (sm_90a), forward: head dim 72 without padding it, 64, 80 and 128 alike.
//
// A producer warp keeps a ring of key and value tiles full through the copy engine; three warpgroups of 64 query rows
// each multiply (wgmma), and while one takes its softmax the products of the others run. Head dim D needs ceil(D / 16)
// steps of 16 for q k^T, the last filled with zeros by the copy engine, and exactly D columns for p v. The structure is
// that of FlashAttention-3 (Shah et al. 2024).
//
// A block that is scheduled by cost, highest first, walks a fixed stride through the list: nothing depends on timing, so
// the same input gives the same bits.

#include "hopper.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "schedule.h"
#include "tensor_map.h"
#include "warp.cuh"

namespace phi4rv {
namespace {

using namespace hopper;
using namespace warp;

constexpr int KEYS = 128;  // keys of a step
constexpr int WIDE = 64;   // columns of 2 bytes that one swizzled box holds
constexpr int STAGES = 2;  // of the ring of keys and values
constexpr float LOG2E = 1.4426950408889634f;

template <int D>
struct Shape {
  static constexpr int GROUPS = attention_rows(D) / 64;  // consumer warpgroups
  static constexpr int ROWS = attention_rows(D);         // query rows of a block
  static constexpr int THREADS = 128 * (GROUPS + 1);
  // What 65536 registers leave each consumer when the producers keep 32 (24) each.
  static constexpr int REGISTERS = GROUPS == 3 ? 160 : 240;
  static constexpr int BOXES = (D + WIDE - 1) / WIDE;
  static constexpr int STEPS = (D + 15) / 16;  // of q k^T
};

template <typename T, int D>
struct alignas(1024) Shared {
  T q[Shape<D>::BOXES][Shape<D>::ROWS][WIDE];
  T k[STAGES][Shape<D>::BOXES][KEYS][WIDE];
  T v[STAGES][Shape<D>::BOXES][KEYS][WIDE];
  uint64_t q_full, q_empty;
  uint64_t k_full[STAGES], k_empty[STAGES];
  uint64_t v_full[STAGES], v_empty[STAGES];
};

// One piece of work: query rows from ``first`` of the packed row, in the document [begin, end), of one head.
struct Tile {
  int first, begin, end, head;
  int keys_end;  // of the last row's
  __device__ int blocks() const { return (keys_end - begin + KEYS - 1) / KEYS; }
};

struct Arguments {
  CUtensorMap q, k, v;
  void* out;
  float* lse;
  const int* cu_seqlens;
  const int2* tiles;  // (document, block of ROWS), highest cost first
  const int* count;   // tiles
  int tokens, heads, heads_per_key;
  float scale;
};

template <int D, bool CAUSAL>
__device__ inline bool next_tile(const Arguments& a, int& work, Tile& tile) {
  if (work >= *a.count * a.heads) return false;
  const int2 at = a.tiles[work / a.heads];
  tile.head = work % a.heads;
  tile.begin = a.cu_seqlens[at.x];
  tile.end = a.cu_seqlens[at.x + 1];
  tile.first = tile.begin + at.y * Shape<D>::ROWS;
  tile.keys_end = CAUSAL ? min(tile.end, tile.first + Shape<D>::ROWS) : tile.end;
  work += gridDim.x;
  return true;
}

template <typename T, int BOXES, int HEIGHT>
__device__ inline void load_tile(T (&to)[BOXES][HEIGHT][WIDE], const CUtensorMap* map, uint64_t* full, int head, int row) {
  arrive_expecting(full, sizeof(to));
#pragma unroll
  for (int box = 0; box < BOXES; box++) load_box(to[box], map, full, box * WIDE, head, row);
}

template <typename T, int D, bool CAUSAL>
__device__ inline void produce(const Arguments& a, Shared<T, D>& s) {
  int stage = 0, round = 0, passes = 0;
  Tile tile;
  for (int work = blockIdx.x; next_tile<D, CAUSAL>(a, work, tile); passes++) {
    wait(&s.q_empty, (passes & 1) ^ 1);
    load_tile(s.q, &a.q, &s.q_full, tile.head, tile.first);
    for (int block = tile.blocks() - 1; block >= 0; block--) {
      const int row = tile.begin + block * KEYS, head = tile.head / a.heads_per_key;
      wait(&s.k_empty[stage], (round & 1) ^ 1);
      load_tile(s.k[stage], &a.k, &s.k_full[stage], head, row);
      wait(&s.v_empty[stage], (round & 1) ^ 1);
      load_tile(s.v[stage], &a.v, &s.v_full[stage], head, row);
      if (++stage == STAGES) stage = 0, round++;
    }
  }
}

template <typename T, int D, bool CAUSAL>
__device__ inline void consume(const Arguments& a, Shared<T, D>& s, int group) {
  constexpr int STEPS = Shape<D>::STEPS;
  const int thread = threadIdx.x % 128, leader = thread == 0;
  const int row = group * 64 + thread / 32 * 16 + thread % 32 / 4;  // and row + 8
  const int column = thread % 4 * 2;                                // and + 1, + 8, + 9, ...
  const float scale = a.scale * LOG2E;
  int stage = 0, round = 0, passes = 0;
  Tile tile;
  for (int work = blockIdx.x; next_tile<D, CAUSAL>(a, work, tile); passes++) {
    float out[D / 2], highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < D / 2; i++) out[i] = 0;
    wait(&s.q_full, passes & 1);
    const int blocks = tile.blocks();
    for (int block = blocks - 1; block >= 0; block--) {
      float scores[KEYS / 2];
      wait(&s.k_full[stage], round & 1);
      pin(scores);
      product_fence();
#pragma unroll
      for (int step = 0; step < STEPS; step++)
        product(scores, operand(&s.q[step / 4][group * 64][step % 4 * 16]), operand(&s.k[stage][step / 4][0][step % 4 * 16]),
                step > 0, T());
      product_commit();
      product_wait<0>();
      pin(scores);
      if (leader) arrive(&s.k_empty[stage]);
      if (leader && block == 0) arrive(&s.q_empty);

      const int key = tile.begin + block * KEYS + column;
      if (key - column + KEYS > (CAUSAL ? min(tile.end, tile.first + group * 64 + 1) : tile.end)) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
          const int at = key + i / 4 * 8 + i % 2, seen = CAUSAL ? min(tile.end, tile.first + row + i % 4 / 2 * 8 + 1) : tile.end;
          if (at >= seen) scores[i] = -INFINITY;
        }
      }
      float shrink[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float top = scores[2 * half];
#pragma unroll
        for (int i = 0; i < KEYS / 2; i += 4) top = fmaxf(top, fmaxf(scores[i + 2 * half], scores[i + 2 * half + 1]));
        const float now = fmaxf(highest[half], quad_max(top));
        const float base = now == -INFINITY ? 0 : now;  // a row that has seen no key yet
        shrink[half] = exp2_fast((highest[half] - base) * scale);
        highest[half] = now;
        float added = 0;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i += 4) {
          float& x = scores[i + 2 * half];
          float& y = scores[i + 2 * half + 1];
          x = exp2_fast(fmaf(x, scale, -base * scale));
          y = exp2_fast(fmaf(y, scale, -base * scale));
          added += x + y;
        }
        sum[half] = sum[half] * shrink[half] + added;
      }
#pragma unroll
      for (int i = 0; i < D / 2; i++) out[i] *= shrink[i % 4 / 2];

      uint32_t p[KEYS / 16][4];
#pragma unroll
      for (int i = 0; i < KEYS / 4; i++) p[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
      wait(&s.v_full[stage], round & 1);
      pin(out);
      product_fence();
#pragma unroll
      for (int step = 0; step < KEYS / 16; step++)
        product<MN_MAJOR>(out, p[step], operand(&s.v[stage][0][step * 16][0], sizeof(s.v[stage][0])), true, T());
      product_commit();
      product_wait<0>();
      pin(out);
      if (leader) arrive(&s.v_empty[stage]);
      if (++stage == STAGES) stage = 0, round++;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int at = tile.first + row + 8 * half;
      const float total = quad_sum(sum[half]);
      if (at >= tile.end) continue;
      if (thread % 4 == 0) a.lse[int64_t(tile.head) * a.tokens + at] = highest[half] * a.scale + logf(total);
      T* to = static_cast<T*>(a.out) + (int64_t(at) * a.heads + tile.head) * D + column;
#pragma unroll
      for (int i = 0; i < D / 8; i++)
        *reinterpret_cast<uint32_t*>(to + 8 * i) =
            pack<T>(out[4 * i + 2 * half] / total, out[4 * i + 2 * half + 1] / total);
    }
  }
}

template <typename T, int D, bool CAUSAL>
__global__ void __launch_bounds__(Shape<D>::THREADS, 1) forward(const __grid_constant__ Arguments a) {
  constexpr int GROUPS = Shape<D>::GROUPS;
  auto& s = block_shared<Shared<T, D>>();
  if (threadIdx.x == 0) {
    init(&s.q_full, 1);
    init(&s.q_empty, GROUPS);
    for (int i = 0; i < STAGES; i++) {
      init(&s.k_full[i], 1), init(&s.v_full[i], 1);
      init(&s.k_empty[i], GROUPS), init(&s.v_empty[i], GROUPS);
    }
    fence_init();
    prefetch(&a.q), prefetch(&a.k), prefetch(&a.v);
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == GROUPS) {
    give_registers<24>();
    if (threadIdx.x % 128 == 0) produce<T, D, CAUSAL>(a, s);
  } else {
    take_registers<Shape<D>::REGISTERS>();
    consume<T, D, CAUSAL>(a, s, group);
  }
}

template <typename T, int D, bool CAUSAL>
cudaError_t launch(const AttentionForward& f, cudaStream_t stream) {
  using S = Shape<D>;
  Arguments a{};
  const auto describe = [&](CUtensorMap& map, const void* data, int heads, int64_t stride, int rows) {
    return tensor_map(map, data, f.type, {D, heads, f.tokens}, {D * 2, stride * 2}, {WIDE, 1, rows});
  };
  cudaError_t error = describe(a.q, f.q, f.heads, f.q_stride, S::ROWS);
  if (!error) error = describe(a.k, f.k, f.kv_heads, f.k_stride, KEYS);
  if (!error) error = describe(a.v, f.v, f.kv_heads, f.v_stride, KEYS);
  if (error) return error;
  a.out = f.out, a.lse = f.lse, a.cu_seqlens = f.cu_seqlens;
  a.count = f.schedule, a.tiles = reinterpret_cast<const int2*>(f.schedule + 2);
  a.tokens = f.tokens, a.heads = f.heads, a.heads_per_key = f.heads / f.kv_heads, a.scale = f.scale;
  error = schedule(f.cu_seqlens, f.documents, S::ROWS, CAUSAL, f.schedule, stream);
  if (error) return error;
  const int most = schedule_bound(f) * f.heads;
  return launch_kernel({min(most, f.multiprocessors), S::THREADS, shared_bytes<Shared<T, D>>}, stream, forward<T, D, CAUSAL>, a);
}

template <typename T, bool CAUSAL>
cudaError_t launch(const AttentionForward& f, cudaStream_t stream) {
  switch (f.head_dim) {
    case 64: return launch<T, 64, CAUSAL>(f, stream);
    case 72: return launch<T, 72, CAUSAL>(f, stream);
    case 80: return launch<T, 80, CAUSAL>(f, stream);
    case 128: return launch<T, 128, CAUSAL>(f, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t launch(const AttentionForward& f, cudaStream_t stream) {
  return f.causal ? launch<T, true>(f, stream) : launch<T, false>(f, stream);
}

}  // namespace

cudaError_t attention_forward(const AttentionForward& f, cudaStream_t stream) {
  return f.type == Type::bfloat16 ? launch<__nv_bfloat16>(f, stream) : launch<__half>(f, stream);
}

}  // namespace phi4rv
