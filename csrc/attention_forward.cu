// Attention on packed rows for Hopper (sm_90a), forward: head dim 72 without padding it, 64, 80 and 128 alike.
//
// A producer warp keeps rings of key and value tiles full through the copy engine; two or three warpgroups of 64 query
// rows each multiply (wgmma). Head dim D needs ceil(D / 16) steps of 16 for q k^T, the last filled with zeros by the
// copy engine, and exactly D columns for p v. A warpgroup starts the products of a block's scores and, behind them,
// those of the previous block's output, and takes the softmax of the one while the others run; the warpgroups start in
// turns (FlashAttention-3, Shah et al. 2024).
//
// Clocks that a multiprocessor needs for a score: products (16 ceil(D / 16) + D) / 2048, 0.074 at 72 and 0.125 at 128;
// exp2 1 / 16; all other arithmetic 0.04. So the products bind where the rest runs beside them. Registers allow three
// warpgroups of 160 up to D = 72 (64 scores, 32 pairs of weights and D / 2 outputs a thread), beyond it two of 240.
//
// Bytes that a multiprocessor takes from L2 in a clock at that rate: 20 at 72, where 192 rows share a tile of keys; 32
// at 128, where 128 do and L2 gives about 24. So at 128 two blocks that work on two query heads of one key head form a
// cluster, and each loads half of every tile for both.
//
// Costly tiles first, each block's share fixed: nothing depends on timing, so the same input gives the same bits.
// What a document becomes does not depend on its neighbours in the row, as long as they are finite.

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
constexpr int STAGES = 2;  // of the rings of keys and of values, a power of two
constexpr float LOG2E = 1.4426950408889634f;

template <int D>
struct Shape {
  static constexpr int GROUPS = attention_rows(D) / 64;  // consumer warpgroups
  static constexpr int ROWS = attention_rows(D);         // query rows of a block
  static constexpr int THREADS = 128 * (GROUPS + 1);
  // What 65536 registers leave each consumer when the producers keep 24 each.
  static constexpr int REGISTERS = GROUPS == 3 ? 160 : 240;
  static constexpr int BOXES = (D + WIDE - 1) / WIDE;
  static constexpr int STEPS = (D + 15) / 16;  // of q k^T
};

// Rows of the output are collected here by the warp that has them, padded so that neither writes nor reads conflict.
template <int D>
constexpr int PITCH = D / 8 % 2 ? D : D + 8;

template <typename T, int D>
struct alignas(1024) Shared {
  T q[Shape<D>::BOXES][Shape<D>::ROWS][WIDE];
  T k[STAGES][Shape<D>::BOXES][KEYS][WIDE];
  T v[STAGES][Shape<D>::BOXES][KEYS][WIDE];
  T out[Shape<D>::ROWS][PITCH<D>];
  uint64_t q_full, q_empty;
  uint64_t k_full[STAGES], k_empty[STAGES];  // the latter by the warpgroups of the whole cluster
  uint64_t v_full[STAGES], v_empty[STAGES];
};

// Where the n-th tile of keys or of values lies in its ring, and the parity of the time round.
__device__ inline int stage_of(unsigned n) { return n % STAGES; }
__device__ inline int parity_of(unsigned n) { return n / STAGES % 2; }

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
  float scale, scale2;  // of scores, and to base 2
};

// Clusters draw from the list in turn, there and back, so that each gets as many early, costly tiles. A cluster's
// blocks take adjacent heads of a tile, and the next cluster the next ones: they read the same keys at the same time.
template <int D, bool CAUSAL, int CLUSTER>
__device__ inline bool next_tile(const Arguments& a, int& pass, Tile& tile) {
  const int clusters = gridDim.x / CLUSTER, own = blockIdx.x / CLUSTER, shares = a.heads / CLUSTER;
  const int work = pass * clusters + (pass % 2 ? clusters - 1 - own : own);
  if (work >= *a.count * shares) return false;
  const int2 at = a.tiles[work / shares];
  tile.head = work % shares * CLUSTER + blockIdx.x % CLUSTER;
  tile.begin = a.cu_seqlens[at.x];
  tile.end = a.cu_seqlens[at.x + 1];
  tile.first = tile.begin + at.y * Shape<D>::ROWS;
  tile.keys_end = CAUSAL ? min(tile.end, tile.first + Shape<D>::ROWS) : tile.end;
  pass++;
  return true;
}

template <typename T, int BOXES, int HEIGHT>
__device__ inline void load_tile(
    T (&to)[BOXES][HEIGHT][WIDE], const CUtensorMap* map, uint64_t* full, int head, int row) {
  arrive_expecting(full, sizeof(to));
#pragma unroll
  for (int box = 0; box < BOXES; box++) load_box(to[box], map, full, box * WIDE, head, row);
}

template <int CLUSTER>
__device__ inline void meet() {
  if constexpr (CLUSTER == 1)
    __syncthreads();
  else
    cluster_sync();
}

// Each block of the cluster loads its part of the rows for all.
template <int CLUSTER, typename T, int BOXES, int HEIGHT>
__device__ inline void load_part(
    T (&to)[BOXES][HEIGHT][WIDE], const CUtensorMap* map, uint64_t* full, int head, int row) {
  const int part = blockIdx.x % CLUSTER * (HEIGHT / CLUSTER);
  arrive_expecting(full, sizeof(to));
#pragma unroll
  for (int box = 0; box < BOXES; box++)
    load_box_to_all(to[box][part], map, full, (1 << CLUSTER) - 1, box * WIDE, head, row + part);
}

template <typename T, int D, bool CAUSAL, int CLUSTER>
__device__ inline void produce(const Arguments& a, Shared<T, D>& s) {
  unsigned n = 0;
  Tile tile;
  for (int pass = 0; next_tile<D, CAUSAL, CLUSTER>(a, pass, tile);) {
    const int last = tile.blocks() - 1, key_head = tile.head / a.heads_per_key;
#pragma unroll 1
    for (int block = last; block >= 0; block--, n++) {
      const int row = tile.begin + block * KEYS, stage = stage_of(n), before = parity_of(n) ^ 1;
      const auto load = [&](auto& to, const CUtensorMap* map, uint64_t* full) {
        if constexpr (CLUSTER == 1)
          load_tile(to, map, full, key_head, row);
        else
          load_part<CLUSTER>(to, map, full, key_head, row);
      };
      wait(&s.k_empty[stage], before);
      load(s.k[stage], &a.k, &s.k_full[stage]);
      if (block == last) {
        wait(&s.q_empty, pass & 1);  // pass counts from 1 here
        load_tile(s.q, &a.q, &s.q_full, tile.head, tile.first);
      }
      wait(&s.v_empty[stage], before);
      load(s.v[stage], &a.v, &s.v_full[stage]);
    }
  }
}

// The warpgroups start their products one after another, so that the softmax of one falls into the products of another.
template <int GROUPS>
struct Turn {
  static constexpr int BOTH = 256;  // threads: who hands over and who takes over
  int group;
  __device__ explicit Turn(int group) : group(group) {
    if (group == GROUPS - 1) arrive_threads(1, BOTH);
  }
  __device__ void begin() { sync_threads(1 + group, BOTH); }
  __device__ void end() { arrive_threads(1 + (group + 1) % GROUPS, BOTH); }
  __device__ void close() {
    if (group == 0) begin();
  }
};

// Softmax of two rows a thread, as far as it has gone. Weights are 2^(score scale - highest scale); ``highest`` is that
// of some earlier block as long as none exceeds 2^SLACK, which costs no precision: both sums are floats.
struct Softmax {
  static constexpr float SLACK = 8, EXACT = 1024;
  float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, shrink[2];

  // Turns a block's scores into weights. True if what has been summed before must shrink.
  __device__ bool weigh(float (&scores)[KEYS / 2], float scale) {
    float top[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      top[half] = scores[2 * half];
#pragma unroll
      for (int i = 2 * half; i < KEYS / 2; i += 4) top[half] = fmaxf(top[half], fmaxf(scores[i], scores[i + 1]));
      top[half] = quad_max(top[half]);
    }
    const bool grown = __any_sync(~0u, (top[0] - highest[0]) * scale > SLACK || (top[1] - highest[1]) * scale > SLACK);
    if (grown) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // Row by row: what a row becomes does not depend on those that share its warp.
        const bool grows = (top[half] - highest[half]) * scale > SLACK;
        shrink[half] = grows ? exp2_fast((highest[half] - top[half]) * scale) : 1;
        highest[half] = grows ? top[half] : highest[half];
        sum[half] *= shrink[half];
      }
    }
    float base[2];
#pragma unroll
    for (int half = 0; half < 2; half++) base[half] = highest[half] == -INFINITY ? 0 : highest[half];  // no key yet
    // score scale - base scale in one step has the rounding error of base scale, which matters if that is large.
    if (__any_sync(~0u, fmaxf(fabsf(base[0]), fabsf(base[1])) * scale > EXACT)) {
      float large[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        large[half] = fabsf(base[half]) * scale > EXACT ? base[half] : 0;
        base[half] -= large[half];
      }
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++) scores[i] -= large[i % 4 / 2];
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float added = 0;
#pragma unroll
      for (int i = 2 * half; i < KEYS / 2; i += 4) {
        scores[i] = exp2_fast(fmaf(scores[i], scale, -base[half] * scale));
        scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale, -base[half] * scale));
        added += scores[i] + scores[i + 1];
      }
      sum[half] += added;
    }
    return grown;
  }

  // Never. But the compiler does not know, and so a wait on this follows the weights: by itself it takes waits first,
  // and the softmax would stand behind the products that it should run beside.
  __device__ bool negative() const { return sum[0] < 0 || sum[1] < 0; }
};

// The 64 rows of a warpgroup: what its threads hold of them, and the steps of the loop over blocks of keys.
template <typename T, int D, bool CAUSAL, int CLUSTER>
struct Consumer {
  static constexpr int STEPS = Shape<D>::STEPS;
  const Arguments& a;
  Shared<T, D>& s;
  const int group, thread = threadIdx.x % 128;
  const int row = group * 64 + thread / 32 * 16 + thread % 32 / 4;  // of the tile, and row + 8
  const int column = thread % 4 * 2;                                // and + 1, + 8, + 9, ...

  __device__ void release_queries() const {
    if (thread == 0) arrive(&s.q_empty);
  }
  // To every block that loads into it.
  __device__ void release(uint64_t* empty) const {
    if constexpr (CLUSTER == 1) {
      if (thread == 0) arrive(empty);
    } else {
      if (thread < CLUSTER) arrive_at(empty, thread);
    }
  }

  __device__ void start_scores(float (&scores)[KEYS / 2], int stage) const {
    const uint64_t q = operand(s.q[0][group * 64]), k = operand(s.k[stage]);
    pin(scores);
    product_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++)
      product(scores, advance(q, step / 4 * sizeof(s.q[0]) + step % 4 * 32),
              advance(k, step / 4 * sizeof(s.k[0][0]) + step % 4 * 32), step > 0, T());
    product_commit();
  }

  __device__ void start_output(float (&out)[D / 2], const uint32_t (&p)[KEYS / 16][4], int stage) const {
    const uint64_t v = operand(s.v[stage], sizeof(s.v[0][0]));
    pin(out);
    product_fence();
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++)
      product<MN_MAJOR>(out, p[step], advance(v, step * 16 * 128), true, T());
    product_commit();
  }

  // Hides from each row the keys of a block that are not its own: the document's end and, causal, what follows it.
  __device__ void mask(float (&scores)[KEYS / 2], const Tile& tile, int block) const {
    const int first_key = tile.begin + block * KEYS;
    if (first_key + KEYS <= (CAUSAL ? min(tile.end, tile.first + group * 64 + 1) : tile.end)) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int end = CAUSAL ? min(tile.end, tile.first + row + 8 * half + 1) : tile.end;
      const int seen = end - first_key - column;
#pragma unroll
      for (int i = 2 * half; i < KEYS / 2; i += 4) {
        if (i / 4 * 8 >= seen) scores[i] = -INFINITY;
        if (i / 4 * 8 + 1 >= seen) scores[i + 1] = -INFINITY;
      }
    }
  }

  __device__ void round(uint32_t (&p)[KEYS / 16][4], const float (&scores)[KEYS / 2]) const {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) p[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  // Through shared memory, so that a row's bytes leave in pieces of 16. Rows past the document's end stay.
  __device__ void store(const Tile& tile, const float (&out)[D / 2], const Softmax& softmax) const {
    constexpr int PIECES = D / 8;
    const int lane = thread % 32, first = row - lane / 4;  // of the warp's 16
    __syncwarp();                                          // the previous tile's have been read
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int at = tile.first + row + 8 * half;
      const float total = quad_sum(softmax.sum[half]), inverse = 1 / total;
      if (lane % 4 == 0 && at < tile.end)
        a.lse[int64_t(tile.head) * a.tokens + at] = softmax.highest[half] * a.scale + logf(total);
#pragma unroll
      for (int i = 0; i < PIECES; i++)
        *reinterpret_cast<uint32_t*>(&s.out[row + 8 * half][8 * i + column]) =
            pack<T>(out[4 * i + 2 * half] * inverse, out[4 * i + 2 * half + 1] * inverse);
    }
    __syncwarp();
#pragma unroll 1  // else the addresses take registers through the whole loop
    for (int i = lane; i < 16 * PIECES; i += 32) {
      const int at = first + i / PIECES, piece = i % PIECES;
      if (tile.first + at >= tile.end) break;
      T* to = static_cast<T*>(a.out) + (int64_t(tile.first + at) * a.heads + tile.head) * D;
      reinterpret_cast<uint4*>(to)[piece] = reinterpret_cast<const uint4*>(s.out[at])[piece];
    }
  }
};

template <typename T, int D, bool CAUSAL, int CLUSTER>
__device__ inline void consume(const Arguments& a, Shared<T, D>& s, int group) {
  const Consumer<T, D, CAUSAL, CLUSTER> rows{a, s, group};
  Turn<Shape<D>::GROUPS> turn(group);
  unsigned n = 0;  // tiles of keys so far; of values one less inside the loop
  Tile tile;
  for (int pass = 0; next_tile<D, CAUSAL, CLUSTER>(a, pass, tile);) {
    Softmax softmax;
    float out[D / 2], scores[KEYS / 2];
    uint32_t p[KEYS / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) out[i] = 0;

    int block = tile.blocks() - 1;
    wait(&s.q_full, (pass & 1) ^ 1);  // pass counts from 1 here
    if (tile.first + group * 64 >= tile.end) {  // no rows: takes its turns and lets go what the others read
#pragma unroll 1
      for (; block >= 0; block--, n++) {
        wait(&s.k_full[stage_of(n)], parity_of(n));
        wait(&s.v_full[stage_of(n)], parity_of(n));
        turn.begin();
        turn.end();
        rows.release(&s.k_empty[stage_of(n)]);
        rows.release(&s.v_empty[stage_of(n)]);
        if (block == 0) rows.release_queries();
      }
      turn.begin();
      turn.end();
      continue;
    }
    wait(&s.k_full[stage_of(n)], parity_of(n));
    turn.begin();
    rows.start_scores(scores, stage_of(n));
    turn.end();
    product_wait<0>();
    pin(scores);
    rows.release(&s.k_empty[stage_of(n)]);
    if (block == 0) rows.release_queries();
    rows.mask(scores, tile, block);
    softmax.weigh(scores, a.scale2);
    rows.round(p, scores);
    wait(&s.v_full[stage_of(n)], parity_of(n));
    n++;

    // The products of one block's scores and of the previous block's output run behind the softmax of the one.
    for (block--; block >= 0; block--) {
      wait(&s.k_full[stage_of(n)], parity_of(n));
      turn.begin();
      rows.start_scores(scores, stage_of(n));
      rows.start_output(out, p, stage_of(n - 1));
      turn.end();
      product_wait<1>();
      pin(scores);
      rows.release(&s.k_empty[stage_of(n)]);
      if (block == 0) rows.release_queries();
      rows.mask(scores, tile, block);
      const bool grown = softmax.weigh(scores, a.scale2);
      pin(scores);
      wait(&s.v_full[stage_of(n)], parity_of(n) ^ softmax.negative());
      product_wait<0>();
      pin(out);
      rows.release(&s.v_empty[stage_of(n - 1)]);
      n++;
      if (grown) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) out[i] *= softmax.shrink[i % 4 / 2];
      }
      rows.round(p, scores);
    }

    turn.begin();
    rows.start_output(out, p, stage_of(n - 1));
    turn.end();
    product_wait<0>();
    pin(out);
    rows.release(&s.v_empty[stage_of(n - 1)]);
    rows.store(tile, out, softmax);
  }
  turn.close();
}

template <typename T, int D, bool CAUSAL, int CLUSTER>
__global__ void __launch_bounds__(Shape<D>::THREADS, 1) forward(const __grid_constant__ Arguments a) {
  constexpr int GROUPS = Shape<D>::GROUPS;
  auto& s = block_shared<Shared<T, D>>();
  if (threadIdx.x == 0) {
    init(&s.q_full, 1);
    init(&s.q_empty, GROUPS);
    for (int i = 0; i < STAGES; i++) {
      init(&s.k_full[i], 1), init(&s.v_full[i], 1);
      init(&s.k_empty[i], GROUPS * CLUSTER), init(&s.v_empty[i], GROUPS * CLUSTER);
    }
    fence_init();
    prefetch(&a.q), prefetch(&a.k), prefetch(&a.v);
  }
  meet<CLUSTER>();
  wait_for_previous_kernel();  // the schedule's
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // in a uniform register
  if (group == GROUPS) {
    give_registers<24>();
    if (threadIdx.x % 128 == 0) produce<T, D, CAUSAL, CLUSTER>(a, s);
    __syncwarp();
  } else {
    take_registers<Shape<D>::REGISTERS>();
    consume<T, D, CAUSAL, CLUSTER>(a, s, group);
  }
  if constexpr (CLUSTER > 1) cluster_sync();  // none ends while another may still arrive at its barriers
}

template <typename T, int D, bool CAUSAL, int CLUSTER>
cudaError_t launch(const AttentionForward& f, cudaStream_t stream) {
  using S = Shape<D>;
  Arguments a{};
  const auto describe = [&](CUtensorMap& map, const void* data, int heads, int64_t stride, int rows) {
    return tensor_map(map, data, f.type, {D, heads, f.tokens}, {D * 2, stride * 2}, {WIDE, 1, rows});
  };
  cudaError_t error = describe(a.q, f.q, f.heads, f.q_stride, S::ROWS);
  if (!error) error = describe(a.k, f.k, f.kv_heads, f.k_stride, KEYS / CLUSTER);
  if (!error) error = describe(a.v, f.v, f.kv_heads, f.v_stride, KEYS / CLUSTER);
  if (error) return error;
  a.out = f.out, a.lse = f.lse, a.cu_seqlens = f.cu_seqlens;
  a.count = f.schedule, a.tiles = reinterpret_cast<const int2*>(f.schedule + 2);
  a.tokens = f.tokens, a.heads = f.heads, a.heads_per_key = f.heads / f.kv_heads;
  a.scale = f.scale, a.scale2 = f.scale * LOG2E;
  error = schedule(f.cu_seqlens, f.documents, S::ROWS, CAUSAL, schedule_bound(f), f.schedule, stream);
  if (error) return error;
  const int most = schedule_bound(f) * (f.heads / CLUSTER), clusters = min(most, f.multiprocessors / CLUSTER);
  const Launch grid{clusters * CLUSTER, S::THREADS, shared_bytes<Shared<T, D>>, CLUSTER, true};
  return launch_kernel(grid, stream, forward<T, D, CAUSAL, CLUSTER>, a);
}

template <typename T, bool CAUSAL>
cudaError_t launch(const AttentionForward& f, cudaStream_t stream) {
  switch (f.head_dim) {
    case 64: return launch<T, 64, CAUSAL, 1>(f, stream);
    case 72: return launch<T, 72, CAUSAL, 1>(f, stream);
    case 80: return launch<T, 80, CAUSAL, 1>(f, stream);
    case 128:
      return f.heads / f.kv_heads % 2 ? launch<T, 128, CAUSAL, 1>(f, stream) : launch<T, 128, CAUSAL, 2>(f, stream);
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
