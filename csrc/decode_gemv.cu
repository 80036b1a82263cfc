// y = f(norm(x) w^T) + residual for 1 to 8 rows of x: the products of decoding, at the speed of the memory that the
// weights lie in. Around the product RMSNorm before it, SwiGLU or a residual after it, so that a decoder layer needs no
// other kernel than these and attention.
//
// The memory's speed is 13 bytes a clock and multiprocessor, and covers its latency with 20 KB in flight. Each lane
// copies the very pieces that it will multiply into a ring of its own (cp.async: no registers, no barriers, any tail),
// 80 KB a block and always full, so that the last blocks, with 8 rows more than others, have them on their way when the
// others end. Half of a multiprocessor's shared memory and registers stays free: when a block has asked for its last
// bytes, the next kernel's block comes beside it and asks for its first 80 KB. They take 3.6 us to arrive, longer than
// the last sums, the end of this kernel and the next one's norm: the memory never rests.
//
// Sixteen rows of w are the tall side of an m16n8k16 product and x is the narrow one: 1 row costs what 8 do, and
// nothing of the tall side is wasted. A product may take its terms in any order if both operands do, so 16 adjacent
// bytes of each row go to one lane and no value changes lanes. Codes become 16-bit floats exactly, in 1.4 (int4), 2
// (int8) or 2.5 (fp8) instructions each. At the memory's speed the loop issues 0.7 (16-bit), 1.7 (fp8) or 2.1 (int4)
// instructions a clock of 4. A group's scale multiplies its sum and a row's the row's: weights are never rounded.
//
// The warps share the columns of a tile of 16 rows and add their parts in a fixed order: nothing is atomic.

#include <type_traits>

#include "hopper.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "warp.cuh"

namespace phi4rv {
namespace {

using namespace warp;

constexpr int WARPS = 10;  // 5120 and 17920 columns are whole rounds of 10 warps in every format
constexpr int THREADS = WARPS * 32;
constexpr int STAGES = 4;  // steps that a warp has in flight
constexpr int UNITS = 2;   // of a step: a line of 128 bytes of each row
constexpr int ROWS = 8;    // of x at most
constexpr int TILE = 16;   // rows of w
constexpr int PARTS = 2;   // eights of rows in a tile: of a lane, row lane / 4 of each

template <Weight W>
constexpr bool GROUPED = grouped(W);
template <Weight W>
constexpr int GROUP_BYTES = group_bytes(W);
// Codes in a lane's 16 bytes, and what follows a group's codes: pieces of 16 bytes with scales, then with zeros.
template <Weight W>
constexpr int CODES = W == Weight::full ? 8 : GROUPED<W> ? 32 : 16;
template <Weight W>
constexpr int TAILS = W == Weight::int4_zero ? 2 : W == Weight::int4 ? 1 : 0;

template <Weight W>
struct Stage {
  uint4 codes[UNITS][PARTS][32];
  uint4 tails[UNITS][PARTS][TAILS<W> ? TAILS<W> : 1];
};

template <Weight W>
struct Shared {
  Stage<W> ring[WARPS][STAGES];
  float parts[WARPS][TILE][ROWS];
  float sums[WARPS][ROWS];
  uint4 room[];  // for the norm's weight, if there is one, and the rows of x, 8 elements between them
};

// What is a block's: an even share of y's columns, in eights. A tile is two eights of w's rows: with SwiGLU one of the
// gate half and the same of the up half, else neighbours.
struct Share {
  int first, end, stride, apart;

  __device__ explicit Share(const DecodeGemv& g) {
    const int eights = g.n / (g.swiglu ? 16 : 8), block = blockIdx.x, blocks = gridDim.x;
    const int each = eights / blocks, more = eights % blocks;  // the first blocks have one more
    first = block * each + min(block, more), end = first + each + (block < more);
    stride = g.swiglu ? 1 : 2, apart = g.swiglu ? eights : 1;
  }
  __device__ int tiles() const { return (end - first + stride - 1) / stride; }
  __device__ int eight(int tile, int part) const { return first + tile * stride + part * apart; }
  __device__ bool has(int tile, int part) const { return first + tile * stride + part * (stride - 1) < end; }
};

// A warp's way through its columns of one tile after another, a unit being 64 bytes of each row.
template <Weight W>
struct Walk {
  const Share share;
  const int warp, lane, k, units, unit_bytes;
  int64_t eight_bytes;      // from one eight to the next
  const char* w;            // this lane's piece of eight 0, unit 0
  const char* from[PARTS];  // and of the present tile's eights, unit ``unit``
  int tile = 0, unit;

  __device__ Walk(const DecodeGemv& g, const Share& share, int warp, int lane)
      : share(share), warp(warp), lane(lane), k(g.k), units((k + 4 * CODES<W> - 1) / (4 * CODES<W>)),
        unit_bytes(GROUPED<W> ? GROUP_BYTES<W> : 64), w(static_cast<const char*>(g.w)) {
    const int64_t row_bytes = int64_t(k) * 16 / CODES<W>;
    eight_bytes = GROUPED<W> ? int64_t(units) * unit_bytes : 8 * row_bytes;
    w += GROUPED<W> ? lane * 16 : lane / 4 * row_bytes + lane % 4 * 16;
    begin();
    if (unit >= units) tile = share.tiles();  // more warps than columns
  }
  __device__ void begin() {
    unit = warp * UNITS;
#pragma unroll
    for (int part = 0; part < PARTS; part++) from[part] = w + share.eight(tile, part) * eight_bytes + unit * unit_bytes;
  }

  // Starts one step's copies, and goes on to the next.
  __device__ void load(Stage<W>& to) {
    if (tile < share.tiles()) {
#pragma unroll
      for (int u = 0; u < UNITS; u++)
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          const bool inside = GROUPED<W> ? unit + u < units : ((unit + u) * 4 + lane % 4) * CODES<W> < k;
          const bool wanted = inside && share.has(tile, part);
          copy_async(&to.codes[u][part][lane], from[part] + u * unit_bytes, wanted);
          if (lane < TAILS<W>) copy_async(&to.tails[u][part][lane], from[part] + u * unit_bytes + 512, wanted);
        }
      unit += WARPS * UNITS;
#pragma unroll
      for (int part = 0; part < PARTS; part++) from[part] += WARPS * UNITS * unit_bytes;
      if (unit >= units) tile++, begin();
    }
    copy_commit();
  }
};

// ---- codes to pairs of adjacent 16-bit floats, exactly

template <typename T>
constexpr bool is_bfloat16 = std::is_same_v<T, __nv_bfloat16>;
// A float's upper byte with which the integers in its lower bits count from 128 (7 bits) or 1024 (10 bits).
template <typename T>
constexpr uint32_t COUNTING = is_bfloat16<T> ? 0x43434343 : 0x64646464;

// Without the sign bit it counts from the base to the base + 127; the sign bit alone adds 128 to the base.
template <typename T>
__device__ inline uint32_t unpack_int8(uint32_t both) {
  return subtract<T>(both & 0xFF7FFF7F, both & 0xFF80FF80);
}

// e4m3's exponent and mantissa, shifted to the right places, are those of a number too small by the biases' difference.
template <typename T>
__device__ inline uint32_t unpack_float8(uint32_t both) {
  constexpr int SHIFT = is_bfloat16<T> ? 4 : 1;
  constexpr uint32_t MASK = is_bfloat16<T> ? 0x07F007F0 : 0x3F803F80;
  constexpr uint32_t SCALE = is_bfloat16<T> ? 0x7B807B80 : 0x5C005C00;  // 2^120, 2^8
  return scale<T>((both >> SHIFT & MASK) | (both & 0x80008000), SCALE);
}

// One word of codes to CODES / 8 pairs. zero: of int4, what code 0 stands for, twice, counting.
template <typename T, Weight W>
__device__ inline void unpack_word(uint32_t word, uint32_t zero, uint32_t* to) {
  if constexpr (W == Weight::full) {
    to[0] = word;
  } else if constexpr (W == Weight::int8) {
    to[0] = unpack_int8<T>(permute<0x4140>(word, COUNTING<T>)), to[1] = unpack_int8<T>(permute<0x4342>(word, COUNTING<T>));
  } else if constexpr (W == Weight::float8) {
    to[0] = unpack_float8<T>(permute<0x1404>(word, 0)), to[1] = unpack_float8<T>(permute<0x3424>(word, 0));
  } else {  // repacked: the low halves' codes 0, 2, 4, 6 and the high halves' 1, 3, 5, 7
#pragma unroll
    for (int i = 0; i < 4; i++)  // (word & mask) | counting
      to[i] = subtract<T>(lop3<0xEA>(word >> 4 * i, 0x000F000F, COUNTING<T> & 0xFF00FF00), zero);
  }
}

// What a lane has of a step: 16 bytes of both its rows for each unit, and what a group's codes mean.
template <typename T, Weight W>
struct Step {
  static constexpr int PAIRS = CODES<W> / 8;  // of a word; and pieces of 8 values of x that belong to 16 bytes
  uint4 codes[UNITS][PARTS];
  float scales[UNITS][PARTS];
  uint32_t zeros[UNITS][PARTS];

  __device__ Step(const Stage<W>& stage, int lane) {
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        codes[u][part] = stage.codes[u][part][lane];
        if (!GROUPED<W>) continue;
        const auto* tail = reinterpret_cast<const uint16_t*>(stage.tails[u][part]) + lane / 4;
        scales[u][part] = __uint_as_float(uint32_t(tail[0]) << 16);
        const uint32_t zero = W == Weight::int4_zero ? tail[8] : 8;
        zeros[u][part] = (COUNTING<T> & 0xFF00FF00) | zero | zero << 16;
      }
  }

  // d (16 x 8) += the 16 rows of unit u times x.
  __device__ void multiply_unit(float (&d)[4], int u, const uint4 (&x)[PAIRS]) const {
    uint32_t w[PARTS][4 * PAIRS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      unpack_word<T, W>(codes[u][part].x, zeros[u][part], w[part]);
      unpack_word<T, W>(codes[u][part].y, zeros[u][part], w[part] + PAIRS);
      unpack_word<T, W>(codes[u][part].z, zeros[u][part], w[part] + 2 * PAIRS);
      unpack_word<T, W>(codes[u][part].w, zeros[u][part], w[part] + 3 * PAIRS);
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      warp::multiply(d, {w[0][4 * i], w[1][4 * i], w[0][4 * i + 1], w[1][4 * i + 1]}, {x[i].x, x[i].y}, T());
      warp::multiply(d, {w[0][4 * i + 2], w[1][4 * i + 2], w[0][4 * i + 3], w[1][4 * i + 3]}, {x[i].z, x[i].w}, T());
    }
  }

  __device__ void multiply(float (&sum)[UNITS][4], const uint4 (&x)[UNITS][PAIRS]) const {
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      if (GROUPED<W>) {
        float group[4] = {};
        multiply_unit(group, u, x[u]);
        for (int i = 0; i < 4; i++) sum[u][i] += scales[u][i / 2] * group[i];
      } else {
        multiply_unit(sum[u], u, x[u]);
      }
    }
  }
};

// ---- x into shared memory, with its norm, by the whole block; a thread has the same pieces of 8 from first to last

__device__ inline void load_norm(const DecodeGemv& g, uint4* norm) {
  if (g.norm)
    for (int i = threadIdx.x; i < g.k / 8; i += THREADS) copy_async(norm + i, static_cast<const uint4*>(g.norm) + i);
  copy_commit();
}

template <typename T>
__device__ inline float squares(const uint4& v) {
  const float2 a = unpack<T>(v.x), b = unpack<T>(v.y), c = unpack<T>(v.z), d = unpack<T>(v.w);
  return a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y + c.x * c.x + c.y * c.y + d.x * d.x + d.y * d.y;
}
template <typename T>
__device__ inline uint32_t normed(uint32_t both, float scale, uint32_t weight) {
  const float2 v = unpack<T>(both), w = unpack<T>(weight);
  return pack<T>(v.x * scale * w.x, v.y * scale * w.y);
}

// Rows of x to shared memory, and each warp's sums of their squares. Many loads at a time: they come one latency apart.
template <typename T>
__device__ inline void stage_rows(const DecodeGemv& g, float (&sums)[WARPS][ROWS], uint4* to) {
  constexpr int BATCH = 4;
  const int pieces = g.k / 8;
  for (int first = 0; first < g.rows; first += BATCH) {
    float sum[BATCH] = {};
    for (int begin = threadIdx.x; begin < pieces; begin += 2 * THREADS) {
      uint4 v[BATCH][2];
      const uint4* x = static_cast<const uint4*>(g.x);
#pragma unroll
      for (int r = 0; r < BATCH; r++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          if (first + r < g.rows && begin + j * THREADS < pieces)
            v[r][j] = x[(first + r) * pieces + begin + j * THREADS];
#pragma unroll
      for (int r = 0; r < BATCH; r++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          if (first + r < g.rows && begin + j * THREADS < pieces) {
            to[(first + r) * (pieces + 1) + begin + j * THREADS] = v[r][j];
            sum[r] += squares<T>(v[r][j]);
          }
    }
#pragma unroll
    for (int r = 0; r < BATCH; r++) {
      if (first + r >= g.rows) break;
      for (int apart = 16; apart; apart /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], apart);
      if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][first + r] = sum[r];
    }
  }
}

template <typename T>
__device__ inline void normalise(const DecodeGemv& g, const float (&sums)[WARPS][ROWS], const uint4* norm, uint4* to) {
  const int pieces = g.k / 8;
  for (int row = 0; row < g.rows; row++) {
    float sum = 0;
    for (int i = 0; i < WARPS; i++) sum += sums[i][row];
    const float scale = rsqrtf(sum / g.k + g.eps);
    for (int i = threadIdx.x; i < pieces; i += THREADS) {
      uint4& v = to[row * (pieces + 1) + i];
      const uint4 w = norm[i];
      v = make_uint4(normed<T>(v.x, scale, w.x), normed<T>(v.y, scale, w.y), normed<T>(v.z, scale, w.z),
                     normed<T>(v.w, scale, w.w));
    }
  }
}

// ---- what is done to a tile's sums

__device__ inline float silu(float x) { return x / (1 + __expf(-x)); }

// A thread's element of y, if it has one, with what it takes besides the sum: fetched before the sum is there.
template <typename T, Weight W>
struct Element {
  int row, column;  // of the tile
  int64_t at = -1;  // in y
  float residual = 0, scale = 1, up_scale = 1;

  __device__ Element(const DecodeGemv& g, const Share& share, int tile)
      : row(threadIdx.x / TILE), column(threadIdx.x % TILE) {
    const int part = column / 8;
    if (row >= g.rows || !share.has(tile, part) || (g.swiglu && part)) return;
    const int n = share.eight(tile, part) * 8 + column % 8;
    at = int64_t(row) * (g.swiglu ? g.n / 2 : g.n) + n;
    if (g.residual) residual = float(static_cast<const T*>(g.residual)[at]);
    if (W == Weight::int8 || W == Weight::float8) {
      scale = g.scales[n];
      if (g.swiglu) up_scale = g.scales[g.n / 2 + n];
    }
  }

  __device__ void finish(const DecodeGemv& g, const float (&parts)[WARPS][TILE][ROWS]) const {
    if (at < 0) return;
    float sum = 0, up = 0;
    for (int i = 0; i < WARPS; i++) sum += parts[i][column][row];
    sum *= scale;
    if (g.swiglu) {
      for (int i = 0; i < WARPS; i++) up += parts[i][column + 8][row];
      sum = silu(sum) * (up * up_scale);
    }
    static_cast<T*>(g.y)[at] = T(sum + residual);
  }
};

// STAGED: x is read from shared memory, where it may have had its norm; else from where it is.
template <typename T, Weight W, bool STAGED>
__global__ void __launch_bounds__(THREADS, 2) decode_gemv_kernel(const DecodeGemv g) {
  constexpr int X = Step<T, W>::PAIRS;
  auto& s = hopper::block_shared<Shared<W>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto& ring = s.ring[warp];
  const Share share(g);
  Walk<W> ahead(g, share, warp, lane);
  uint4* staged = s.room + (g.norm ? g.k / 8 : 0);
  if (STAGED) load_norm(g, s.room);
  for (int i = 0; i < STAGES; i++) ahead.load(ring[i]);
  wait_for_previous_kernel();
  if (STAGED) {
    stage_rows<T>(g, s.sums, staged);
    copy_wait<STAGES>();  // all but the ring: the norm's weight is here
    __syncthreads();
    if (g.norm) normalise<T>(g, s.sums, s.room, staged);
    __syncthreads();
  }

  // Row lane / 4 of x. Where there is none, and past k, any number will do: no one reads the sums, or w is zero there.
  const int pieces = g.k / 8, row = min(lane / 4, g.rows - 1);
  const uint4* x = STAGED ? staged + row * (pieces + 1) : static_cast<const uint4*>(g.x) + row * pieces;
  uint4 values[UNITS][X];
  const auto load_values = [&](int unit) {
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int i = 0; i < X; i++) values[u][i] = x[min(((unit + u) * 4 + lane % 4) * X + i, pieces - 1)];
  };
  load_values(warp * UNITS);
  int at = 0;
  for (int tile = 0; tile < share.tiles(); tile++) {
    const Element<T, W> element(g, share, tile);
    float sum[UNITS][4] = {};
    for (int unit = warp * UNITS; unit < ahead.units; unit += WARPS * UNITS) {
      copy_wait<STAGES - 1>();
      if (GROUPED<W>) __syncwarp();  // scales come by other lanes' copies
      const Step<T, W> step(ring[at], lane);
      if (GROUPED<W>) __syncwarp();
      ahead.load(ring[at]);
      if (ahead.tile == share.tiles()) let_next_kernel_start();
      at = (at + 1) % STAGES;
      step.multiply(sum, values);
      const int next = unit + WARPS * UNITS;  // its x comes while this waits for w
      load_values(next < ahead.units ? next : warp * UNITS);
    }
    __syncthreads();  // the last tile's parts have been read
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      *reinterpret_cast<float2*>(&s.parts[warp][lane / 4 + part * 8][lane % 4 * 2]) =
          make_float2(sum[0][2 * part] + sum[1][2 * part], sum[0][2 * part + 1] + sum[1][2 * part + 1]);
    __syncthreads();
    element.finish(g, s.parts);
  }
}

// With the norm of 5120 columns, two blocks, this kernel's and the next one's, fit a multiprocessor of 228 KB.
template <Weight W>
constexpr int bytes_with(int staged) { return hopper::shared_bytes<Shared<W>> + 2 * staged; }
static_assert(2 * (bytes_with<Weight::int4_zero>(staged_elements(1, 5120, true)) + 1024) <= 228 * 1024);
static_assert(bytes_with<Weight::int4_zero>(MOST_STAGED) <= 227 * 1024);

template <typename T, Weight W, bool STAGED>
cudaError_t launch(const DecodeGemv& g, cudaStream_t stream) {
  const int bytes = bytes_with<W>(STAGED ? int(staged_elements(g.rows, g.k, g.norm)) : 0);
  const int blocks = min(g.multiprocessors, g.n / (g.swiglu ? 16 : 8));
  return launch_kernel({.blocks = blocks, .threads = THREADS, .shared = bytes, .early = true}, stream,
                       decode_gemv_kernel<T, W, STAGED>, g);
}

// One row without a norm stays where it is, in L1 for the most part: its copy would only take time. More rows would not
// stay in L1. What is too much for shared memory comes from L2, again for each tile.
template <typename T, Weight W>
cudaError_t launch(const DecodeGemv& g, cudaStream_t stream) {
  const bool staged = g.norm || (g.rows > 1 && staged_elements(g.rows, g.k, false) <= MOST_STAGED);
  return staged ? launch<T, W, true>(g, stream) : launch<T, W, false>(g, stream);
}

template <typename T>
cudaError_t launch(const DecodeGemv& g, cudaStream_t stream) {
  switch (g.weight) {
    case Weight::full: return launch<T, Weight::full>(g, stream);
    case Weight::int8: return launch<T, Weight::int8>(g, stream);
    case Weight::float8: return launch<T, Weight::float8>(g, stream);
    case Weight::int4: return launch<T, Weight::int4>(g, stream);
    case Weight::int4_zero: return launch<T, Weight::int4_zero>(g, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t decode_gemv(const DecodeGemv& g, cudaStream_t stream) {
  return g.type == Type::bfloat16 ? launch<__nv_bfloat16>(g, stream) : launch<__half>(g, stream);
}

}  // namespace phi4rv
