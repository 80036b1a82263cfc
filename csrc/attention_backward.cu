// Attention on packed rows for Hopper (sm_90a), backward: five products a score (FlashAttention-2, Dao 2023).
//
// A block holds 128 keys of one key head, 64 a warpgroup, and walks over the tiles of 64 query rows that see them,
// of every query head that reads this key head: dk and dv stay in registers and are written once. Scores are
// transposed, keys as rows, so that p and ds are operands in registers of dv += p dout and dk += ds q. ds also goes
// to shared memory, for dq = ds k over the keys of both warpgroups. That product is made one or two tiles later,
// when the other warpgroup has long written its part: they need not keep step, and while one takes its exponentials
// the other multiplies (structure: FlashAttention-3, Shah et al. 2024). dq is summed over blocks as integers, whose
// order does not matter: see attention_backward.h.
//
// Registers of a thread: dk and dv D / 2 each, scores and dp 32 each, dq 32 to 40. For that, up to head dim 80 a
// warpgroup makes dq of every other tile whole; at 128, half the columns of every tile. The limit is shared memory:
// the 32 clocks of m64n64k16 are just enough to read its a and b, 4 KB. So up to 80, where registers are left, they
// hold the keys and values. 64 x 128 scores then take shared memory about 1700 clocks at 72 (their products take
// 1500), and at 128, without, 3100 (2560).

#include <cmath>
#include <type_traits>

#include "attention_backward.h"
#include "hopper.cuh"
#include "schedule.h"
#include "tensor_map.h"
#include "warp.cuh"

namespace phi4rv {
namespace {

using namespace backward;
using namespace hopper;
using namespace warp;

constexpr int KEYS = ATTENTION_BACKWARD_KEYS;
constexpr int GROUPS = 2;  // consumer warpgroups, 64 keys each
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int WIDE = 64;   // columns of 2 bytes that one swizzled box holds
constexpr int STAGES = 2;  // of the rings of q and dout
constexpr float LOG2E = 1.4426950408889634f;

template <int D>
struct Shape {
  static constexpr int BOXES = (D + WIDE - 1) / WIDE;
  static constexpr int STEPS = (D + 15) / 16;     // of k q^T and v dout^T
  static constexpr int WIDTH = SUM_WIDTH<D>;      // columns of dq that a warpgroup makes
  static constexpr bool HALVES = WIDTH < D;       // of every tile; else all columns of every other tile
  static constexpr int BUFFERS = HALVES ? 2 : 3;  // of ds
  static constexpr bool HELD = !HALVES;           // keys and values as operands in registers
};

template <typename T, int D>
struct alignas(1024) Shared {
  using S = Shape<D>;
  T k[S::BOXES][KEYS][WIDE];
  T v[S::BOXES][KEYS][WIDE];
  T q[STAGES][S::BOXES][ROWS][WIDE];
  T dout[STAGES][S::BOXES][ROWS][WIDE];
  T ds[S::BUFFERS][KEYS][ROWS];
  alignas(128) int32_t sums[GROUPS][ROWS][S::WIDTH];
  alignas(128) float rows[STAGES][2][ROWS];  // LSE, DELTA
  float inverse_units[GROUPS][S::WIDTH];
  uint64_t kv_full, kv_empty;
  uint64_t q_full[STAGES], q_empty[STAGES], dout_full[STAGES], dout_empty[STAGES];
  uint64_t ds_full[S::BUFFERS], ds_empty[S::BUFFERS];
};

struct Arguments {
  CUtensorMap dout, q, k, v;
  void *dk, *dv;
  float* rows;
  const uint32_t* bounds;
  int32_t* sums;
  const int* cu_seqlens;
  const int2* tiles;  // (document, block of KEYS), highest cost first
  const int* count;   // tiles
  int tokens, places, kv_heads, heads_per_key;
  float scale;
};

// The keys from ``first`` of one key head, in the document [begin, end), and the query rows from ``query`` that see
// them.
struct Work {
  int document, head, first, begin, end, query;
  int blocks, tiles;  // of query rows: of a query head, of all that read this key head
};

// A tile of query rows of one query head, and its place in what prepare has written.
struct Tile {
  int head, block, first, place;
};

// A place in a ring of N buffers, and how often it has been gone through, even or odd.
template <int N>
struct Ring {
  int at = 0, odd = 0;
  __device__ void next() {
    if (++at == N) at = 0, odd ^= 1;
  }
};

// Costs fall slowly along the list: walked to and fro, it gives every block about the same sum.
template <bool CAUSAL>
__device__ inline bool next_work(const Arguments& a, int& round, Work& w) {
  const int at = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  if (at >= *a.count * a.kv_heads) return false;
  const int2 tile = a.tiles[at / a.kv_heads];
  w.document = tile.x, w.head = at % a.kv_heads;
  w.begin = a.cu_seqlens[tile.x], w.end = a.cu_seqlens[tile.x + 1];
  w.first = w.begin + tile.y * KEYS;
  w.query = CAUSAL ? w.first : w.begin;
  w.blocks = (w.end - w.query + ROWS - 1) / ROWS;
  w.tiles = w.blocks * a.heads_per_key;
  round++;
  return true;
}

// The tiles of a work: the blocks of a query head, then those of the next.
__device__ inline Tile first_tile(const Arguments& a, const Work& w) {
  return {w.head * a.heads_per_key, 0, w.query, first_place(w.begin, w.document) + (w.query - w.begin) / ROWS};
}
__device__ inline void next_tile(const Work& w, Tile& t) {
  t.block++, t.first += ROWS, t.place++;
  if (t.block == w.blocks) t.head++, t.block = 0, t.first -= w.blocks * ROWS, t.place -= w.blocks;
}

__device__ inline float* rows_of(const Arguments& a, const Tile& t, Row value) {
  return a.rows + ((int64_t(t.head) * a.places + t.place) * ROW_VALUES + value) * ROWS;
}

template <typename T, int BOXES, int HEIGHT>
__device__ inline void load_tile(
    T (&to)[BOXES][HEIGHT][WIDE], const CUtensorMap* map, uint64_t* full, int head, int row) {
#pragma unroll
  for (int box = 0; box < BOXES; box++) load_box(to[box], map, full, box * WIDE, head, row);
}

// The operand that lies ``bytes`` behind this one.
__device__ inline uint64_t behind(uint64_t operand, uint32_t bytes) {
  return (operand & 0xFFFFFFFF00000000) | (uint32_t(operand) + (bytes >> 4));
}
// Step ``step`` of 16 along K of an operand whose adjacent elements run along K, in boxes of this height.
__device__ inline uint64_t along_k(uint64_t operand, int step, int height) {
  return behind(operand, step / 4 * height * WIDE * 2 + step % 4 * 32);
}
// Of one whose rows are K's.
__device__ inline uint64_t across_k(uint64_t operand, int step) { return behind(operand, step * 16 * WIDE * 2); }

// A warpgroup's 64 keys or values: as an operand in shared memory, and, if HELD, in registers.
template <typename T, int D>
struct Keys {
  using S = Shape<D>;
  uint64_t rows;
  uint32_t held[S::HELD ? S::STEPS : 1][4];

  __device__ void load(T (&from)[S::BOXES][KEYS][WIDE], int row, int block) {
    if constexpr (S::HELD) {
#pragma unroll
      for (int step = 0; step < S::STEPS; step++)
        load_matrices(held[step], &from[step / 4][row][((step % 4 * 2 + block) ^ row % 8) * 8]);
    }
  }
  // d = the keys times the transpose of 64 rows.
  __device__ void multiply(float (&d)[ROWS / 2], uint64_t other) const {
#pragma unroll
    for (int step = 0; step < S::STEPS; step++) {
      if constexpr (S::HELD)
        product<K_MAJOR>(d, held[step], along_k(other, step, ROWS), step > 0, T());
      else
        product(d, along_k(rows, step, KEYS), along_k(other, step, ROWS), step > 0, T());
    }
    product_commit();
  }
};

template <typename T, int D, bool CAUSAL>
__device__ inline void produce(const Arguments& a, Shared<T, D>& s) {
  Ring<STAGES> stage;
  Work w;
  for (int round = 0; next_work<CAUSAL>(a, round, w);) {
    wait(&s.kv_empty, round & 1);
    arrive_expecting(&s.kv_full, sizeof(s.k) + sizeof(s.v));
    load_tile(s.k, &a.k, &s.kv_full, w.head, w.first);
    load_tile(s.v, &a.v, &s.kv_full, w.head, w.first);
    Tile t = first_tile(a, w);
#pragma unroll 1
    for (int i = 0; i < w.tiles; i++, next_tile(w, t), stage.next()) {
      wait(&s.q_empty[stage.at], stage.odd ^ 1);
      arrive_expecting(&s.q_full[stage.at], sizeof(s.q[0]) + sizeof(s.rows[0]));
      load_tile(s.q[stage.at], &a.q, &s.q_full[stage.at], t.head, t.first);
      load_bytes(s.rows[stage.at], rows_of(a, t, LSE), sizeof(s.rows[0]), &s.q_full[stage.at]);
      wait(&s.dout_empty[stage.at], stage.odd ^ 1);
      arrive_expecting(&s.dout_full[stage.at], sizeof(s.dout[0]));
      load_tile(s.dout[stage.at], &a.dout, &s.dout_full[stage.at], t.head, t.first);
    }
  }
}

template <typename T, int D, bool CAUSAL>
__device__ inline void consume(const Arguments& a, Shared<T, D>& s, int group) {
  using S = Shape<D>;
  constexpr int WIDTH = S::WIDTH, DQ = WIDTH / 2;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const bool leader = thread == 0;
  const int row = thread / 32 * 16 + lane / 4;  // of the warpgroup's 64 keys, or of dq's query rows; and row + 8
  const int column = lane % 4 * 2;              // and + 1, + 8, + 9, ...
  // The row and the block of 16 bytes that this lane brings to load_matrices and store_matrices: of keys.
  const int key_row = group * 64 + thread / 32 * 16 + lane % 16, key_block = lane / 16;
  const float scale = a.scale * LOG2E;
  Keys<T, D> k{operand(&s.k[0][group * 64][0])}, v{operand(&s.v[0][group * 64][0])};
  const uint64_t k_columns = operand(&s.k[S::HALVES ? group : 0][0][0], sizeof(s.k[0]));
  Ring<STAGES> stage;
  Ring<S::BUFFERS> buffer;
  // A tile whose dq this warpgroup has yet to make, and where its ds is.
  Tile owed_tile{};
  Ring<S::BUFFERS> owed;
  Work w;
  for (int round = 0; next_work<CAUSAL>(a, round, w);) {
    if (thread < WIDTH) {
      const uint32_t* bounds = a.bounds + (int64_t(w.document) * a.kv_heads + w.head) * (D + 1);
      s.inverse_units[group][thread] = 0x1p30f / column_bound<D>(bounds, (S::HALVES ? group * WIDTH : 0) + thread);
    }
    float dk[D / 2], dv[D / 2];
    w.tiles = __shfl_sync(~0u, w.tiles, 0), w.blocks = __shfl_sync(~0u, w.blocks, 0);
    Tile t = first_tile(a, w);

    const auto multiply_dq = [&](float (&dq)[DQ]) {
      const uint64_t ds = operand(&s.ds[owed.at][0][0]);
#pragma unroll
      for (int step = 0; step < KEYS / 16; step++)
        product<MN_MAJOR, MN_MAJOR>(dq, across_k(ds, step), across_k(k_columns, step), step > 0, T());
      product_commit();
    };

    const auto load_inverse = [&] {
      const float* inverses = rows_of(a, owed_tile, INVERSE) + row;
      return make_float2(inverses[0], inverses[8]);
    };
    // Rounds the dq that was owed and adds it to the sums.
    const auto add_dq = [&](float (&dq)[DQ], float2 inverse) {
      if (leader) arrive(&s.ds_empty[owed.at]);
      if (leader) store_wait_read<0>();
      sync_threads(1 + group, 128);
      bool outside[2] = {false, false};
#pragma unroll
      for (int block = 0; block < WIDTH / 8; block++) {
        const float2 unit = *reinterpret_cast<const float2*>(&s.inverse_units[group][block * 8 + column]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float x = dq[4 * block + 2 * half] * (half ? inverse.y : inverse.x) * unit.x;
          const float y = dq[4 * block + 2 * half + 1] * (half ? inverse.y : inverse.x) * unit.y;
          outside[half] = outside[half] || !(fabsf(x) < 0x1p31f) || !(fabsf(y) < 0x1p31f);
          const int at = exchanged<WIDTH>(block, owed_tile.first + row + 8 * half) * 8 + column;
          auto* to = reinterpret_cast<int2*>(&s.sums[group][row + 8 * half][at]);
          *to = make_int2(__float2int_rn(x), __float2int_rn(y));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (outside[half]) rows_of(a, owed_tile, NORM)[row + 8 * half] = NAN;
      fence_async();
      sync_threads(1 + group, 128);
      if (leader) {
        const int64_t half = S::HALVES ? owed_tile.head * 2 + group : owed_tile.head;
        add_integers(
            a.sums + (half * a.tokens + owed_tile.first) * WIDTH, s.sums[group][0],
            min(ROWS, w.end - owed_tile.first) * WIDTH * 4);
        store_commit();
      }
    };

    // Tile i, and, if it is this warpgroup's turn, the dq that is owed.
    const auto visit = [&](int i, auto turn) {
      constexpr bool TURN = decltype(turn)::value;
      float scores[ROWS / 2], dp[ROWS / 2], dq[DQ];
      const uint64_t q = operand(&s.q[stage.at][0][0][0], sizeof(s.q[0][0]));
      const uint64_t dout = operand(&s.dout[stage.at][0][0][0], sizeof(s.dout[0][0]));
      wait(&s.q_full[stage.at], stage.odd);
      pin(scores);
      product_fence();
      k.multiply(scores, q);
      wait(&s.dout_full[stage.at], stage.odd);
      pin(dp);
      product_fence();
      v.multiply(dp, dout);
      product_wait<1>();
      pin(scores);

      const int key = w.first + group * 64 + row;
      if (key - row + 64 > w.end || (CAUSAL && key - row + 63 > t.first)) {
#pragma unroll
        for (int j = 0; j < ROWS / 2; j++) {
          const int at = key + j % 4 / 2 * 8, seen_from = at >= w.end ? ROWS : CAUSAL ? at - t.first : 0;
          if (j / 4 * 8 + column + j % 2 < seen_from) scores[j] = -INFINITY;
        }
      }
#pragma unroll
      for (int j = 0; j < ROWS / 2; j += 4) {
        const float2 lse = *reinterpret_cast<const float2*>(&s.rows[stage.at][LSE][j * 2 + column]);
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          scores[j + half] = exp2_fast(fmaf(scores[j + half], scale, -lse.x));
          scores[j + half + 1] = exp2_fast(fmaf(scores[j + half + 1], scale, -lse.y));
        }
      }
      uint32_t p[ROWS / 16][4], ds[ROWS / 16][4];
#pragma unroll
      for (int j = 0; j < ROWS / 4; j++) p[j / 4][j % 4] = pack<T>(scores[2 * j], scores[2 * j + 1]);
      pin(dv), pin(p);
      product_fence();
#pragma unroll
      for (int step = 0; step < ROWS / 16; step++)
        product<MN_MAJOR>(dv, p[step], across_k(dout, step), i + step > 0, T());
      product_commit();

      product_wait<1>();
      pin(dp);
#pragma unroll
      for (int j = 0; j < ROWS / 2; j += 4) {
        const float2 delta = *reinterpret_cast<const float2*>(&s.rows[stage.at][DELTA][j * 2 + column]);
#pragma unroll
        for (int half = 0; half < 4; half += 2)
          ds[j / 8][j / 2 % 4 + half / 2] = pack<T>(
              scores[j + half] * (dp[j + half] - delta.x), scores[j + half + 1] * (dp[j + half + 1] - delta.y));
      }
      wait(&s.ds_empty[buffer.at], buffer.odd ^ 1);
#pragma unroll
      for (int step = 0; step < ROWS / 16; step++)
        store_matrices(&s.ds[buffer.at][key_row][((step * 2 + key_block) ^ key_row % 8) * 8], ds[step]);
      fence_async();
      __syncwarp();
      if (lane == 0) arrive(&s.ds_full[buffer.at]);

      // At first nothing is owed: what lies there is multiplied and dropped.
      float2 inverse;
      if constexpr (TURN) inverse = load_inverse();
      if (TURN && i > 0) wait(&s.ds_full[owed.at], owed.odd);
      pin(dk), pin(ds);
      if constexpr (TURN) pin(dq);
      product_fence();
      if constexpr (TURN) multiply_dq(dq);
#pragma unroll
      for (int step = 0; step < ROWS / 16; step++)
        product<MN_MAJOR>(dk, ds[step], across_k(q, step), i + step > 0, T());
      product_commit();
      product_wait<1>();
      pin(dv), pin(p);
      if (leader) arrive(&s.dout_empty[stage.at]);
      if constexpr (TURN) {
        pin(dq);
        if (i > 0) add_dq(dq, inverse);
      }
      product_wait<0>();
      pin(dk), pin(ds);
      if (leader) arrive(&s.q_empty[stage.at]);
      if (S::HALVES || TURN == (group == 0)) owed_tile = t, owed = buffer;
      next_tile(w, t), stage.next(), buffer.next();
    };

    wait(&s.kv_full, (round & 1) ^ 1);
    k.load(s.k, key_row, key_block);
    v.load(s.v, key_row, key_block);
    if constexpr (S::HALVES) {
      for (int i = 0; i < w.tiles; i++) visit(i, std::true_type());
    } else {
      for (int i = 0; i < w.tiles; i += 2) {
        visit(i, std::true_type());
        if (i + 1 < w.tiles) visit(i + 1, std::false_type());
      }
    }
    if (S::HALVES || group == 0 || w.tiles % 2 == 0) {
      float dq[DQ];
      const float2 inverse = load_inverse();
      wait(&s.ds_full[owed.at], owed.odd);
      pin(dq);
      product_fence();
      multiply_dq(dq);
      product_wait<0>();
      pin(dq);
      add_dq(dq, inverse);
    }
    if (leader) arrive(&s.kv_empty);

#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int key = w.first + group * 64 + row + 8 * half;
      if (key >= w.end) continue;
      const int64_t at = (int64_t(key) * a.kv_heads + w.head) * D + column;
      T *dk_row = static_cast<T*>(a.dk) + at, *dv_row = static_cast<T*>(a.dv) + at;
#pragma unroll
      for (int j = 0; j < D / 8; j++) {
        const int i = 4 * j + 2 * half;
        *reinterpret_cast<uint32_t*>(dk_row + 8 * j) = pack<T>(dk[i] * a.scale, dk[i + 1] * a.scale);
        *reinterpret_cast<uint32_t*>(dv_row + 8 * j) = pack<T>(dv[i], dv[i + 1]);
      }
    }
  }
  if (leader) store_wait<0>();
}

template <typename T, int D, bool CAUSAL>
__global__ void __launch_bounds__(THREADS, 1) products(const __grid_constant__ Arguments a) {
  auto& s = block_shared<Shared<T, D>>();
  if (threadIdx.x == 0) {
    init(&s.kv_full, 1), init(&s.kv_empty, GROUPS);
    for (int i = 0; i < STAGES; i++) {
      init(&s.q_full[i], 1), init(&s.dout_full[i], 1);
      init(&s.q_empty[i], GROUPS), init(&s.dout_empty[i], GROUPS);
    }
    for (int i = 0; i < Shape<D>::BUFFERS; i++)
      init(&s.ds_full[i], GROUPS * 4), init(&s.ds_empty[i], Shape<D>::HALVES ? GROUPS : 1);
    fence_init();
    prefetch(&a.q), prefetch(&a.k), prefetch(&a.v), prefetch(&a.dout);
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // so that the compiler knows it for one of the warp
  if (group == GROUPS) {
    give_registers<24>();
    if (threadIdx.x % 128 == 0) produce<T, D, CAUSAL>(a, s);
  } else {
    take_registers<240>();
    consume<T, D, CAUSAL>(a, s, group);
  }
}

template <typename T, int D, bool CAUSAL>
cudaError_t launch(const AttentionBackward& b, cudaStream_t stream) {
  static_assert(shared_bytes<Shared<T, D>> <= 227 * 1024);
  Arguments a{};
  const auto describe = [&](CUtensorMap& map, const void* data, int heads, int64_t stride, int rows) {
    return tensor_map(map, data, b.type, {D, heads, b.tokens}, {D * 2, stride * 2}, {WIDE, 1, rows});
  };
  cudaError_t error = describe(a.dout, b.dout, b.heads, b.dout_stride, ROWS);
  if (!error) error = describe(a.q, b.q, b.heads, b.q_stride, ROWS);
  if (!error) error = describe(a.k, b.k, b.kv_heads, b.k_stride, KEYS);
  if (!error) error = describe(a.v, b.v, b.kv_heads, b.v_stride, KEYS);
  if (error) return error;
  a.dk = b.dk, a.dv = b.dv, a.rows = b.rows, a.bounds = b.bounds, a.sums = b.sums, a.cu_seqlens = b.cu_seqlens;
  a.count = b.schedule, a.tiles = reinterpret_cast<const int2*>(b.schedule + 2);
  a.tokens = b.tokens, a.places = row_tiles(b), a.kv_heads = b.kv_heads, a.heads_per_key = b.heads / b.kv_heads;
  a.scale = b.scale;
  error = schedule_keys(b.cu_seqlens, b.documents, KEYS, CAUSAL, schedule_bound(b), b.schedule, stream);
  if (!error) error = prepare(b, stream);
  const int most = schedule_bound(b) * b.kv_heads;
  if (!error)
    error = launch_kernel(
        {min(most, b.multiprocessors), THREADS, shared_bytes<Shared<T, D>>}, stream, products<T, D, CAUSAL>, a);
  return error ? error : finish(b, stream);
}

template <typename T, bool CAUSAL>
cudaError_t launch(const AttentionBackward& b, cudaStream_t stream) {
  switch (b.head_dim) {
    case 64: return launch<T, 64, CAUSAL>(b, stream);
    case 72: return launch<T, 72, CAUSAL>(b, stream);
    case 80: return launch<T, 80, CAUSAL>(b, stream);
    case 128: return launch<T, 128, CAUSAL>(b, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t launch(const AttentionBackward& b, cudaStream_t stream) {
  return b.causal ? launch<T, true>(b, stream) : launch<T, false>(b, stream);
}

}  // namespace

cudaError_t attention_backward(const AttentionBackward& b, cudaStream_t stream) {
  return b.type == Type::bfloat16 ? launch<__nv_bfloat16>(b, stream) : launch<__half>(b, stream);
}

}  // namespace phi4rv
