// Attention of a few new tokens against a cache, contiguous or in pages: one reading of the documents' keys and values,
// at the speed of the memory they lie in.
//
// The keys of all documents are cut into parts of like length, one a block (Flash-Decoding, Dao et al. 2023): how many
// there are at most depends on shapes, where each begins on the device's lengths, so that a CUDA graph can be replayed
// while documents grow and a long document among short ones still has the whole chip. The query heads that share a key
// head, times the new tokens, are the 16 rows of an m16n8k16 product, or twice 16.
//
// Each warp keeps a ring of steps of 16 keys and values to itself, filled by 16-byte copies: any page size, no barrier
// in the loop. Two blocks of four warps have 64 to 128 KB in flight on a multiprocessor; the memory needs about 32.
// Warps, then parts, are merged in a fixed order, parts by a second kernel that starts with the last of the first: it
// needs no counters that somebody would have to set to zero, or that two streams could share.

#include <algorithm>
#include <type_traits>

#include "hopper.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "warp.cuh"

namespace phi4rv {
namespace {

using namespace warp;

constexpr int WARPS = DECODE_WARPS;
constexpr int THREADS = WARPS * 32;
constexpr int KEYS = DECODE_KEYS;
constexpr float LOG2E = 1.4426950408889634f;

// The rows of one ring entry: 16 keys, and their values.
template <int PITCH>
struct Step {
  uint4 k[KEYS][PITCH], v[KEYS][PITCH];
};
template <typename S>
using Rows = uint4[KEYS][S::PITCH];

template <typename T, typename Stored, int D, int TILES>
struct Shape {
  static constexpr bool FLOAT8 = sizeof(Stored) == 1;
  using Number = std::conditional_t<FLOAT8, __half, T>;  // of the products: it holds every e4m3
  static constexpr int ROWS = 16 * TILES;
  static constexpr int PIECES = D * int(sizeof(Stored)) / 16;  // of 16 bytes, in a row of the cache
  // Odd, so that the eight rows of a matrix lie in different banks.
  static constexpr int PITCH = PIECES | 1, Q_PITCH = D / 8 | 1;
  static constexpr int STAGES = std::min(6, 26 * 1024 / int(sizeof(Step<PITCH>)));
  // A warp's result: rows side by side for the 2 (4) floats that a lane writes at once.
  static constexpr int OUT_PITCH = D + (FLOAT8 ? 16 : 8);
  static_assert(D * sizeof(Stored) % 16 == 0);
};

template <typename S>
struct Shared {
  Step<S::PITCH> ring[WARPS][S::STAGES];  // in the end each warp's result
  uint4 q[S::ROWS][S::Q_PITCH];
  float factor[S::ROWS];  // from a row's products to the exponents of 2
  float2 level[WARPS][S::ROWS];
};

// ---- who does what

struct Arguments : DecodeAttention {
  int shared;  // query heads of a key head
  int rows, kept, tiles, units, slots;
};

__device__ inline int at(const Integers& x, int i) { return x.data[i * x.stride]; }
// EARLY: before the wait for the kernel in front.
template <bool EARLY>
__device__ inline int steps_of(const Arguments& a, int document) {
  const int length = EARLY ? load_l2(a.lengths.data + document * a.lengths.stride) : at(a.lengths, document);
  return (length + KEYS - 1) / KEYS;
}

// A document's parts among those of all documents. document: -1 if there is no such part.
struct Place {
  int document, first, parts;
};

// The whole warp asks for the first document of which found(document, end of its parts) holds. A part has as many steps
// as give all documents together no more parts than there are ``slots``; an empty document has none.
template <bool EARLY, typename Found>
__device__ inline Place find(const Arguments& a, Found found) {
  const int lane = threadIdx.x % 32;
  int steps = 0;
  for (int b = lane; b < a.documents; b += 32) steps += steps_of<EARLY>(a, b);
  for (int apart = 1; apart < 32 && apart < a.documents; apart *= 2) steps += __shfl_xor_sync(~0u, steps, apart);
  steps = __shfl_sync(~0u, steps, 0);
  // Rounding up adds less than one part a document.
  const int spare = a.slots - a.documents, size = max(WARPS, (steps + spare - 1) / spare);
  int before = 0;
  for (int base = 0; base < a.documents; base += 32) {
    const int b = base + lane, parts = b < a.documents ? (steps_of<EARLY>(a, b) + size - 1) / size : 0;
    int end = parts;
    for (int apart = 1; apart < 32 && apart < a.documents; apart *= 2) {
      const int other = __shfl_up_sync(~0u, end, apart);
      if (lane >= apart) end += other;
    }
    const unsigned found_at = __ballot_sync(~0u, b < a.documents && found(b, before + end));
    if (found_at) {
      const int who = __ffs(found_at) - 1;
      end = __shfl_sync(~0u, end, who);
      const int mine = __shfl_sync(~0u, parts, who);
      return {base + who, before + end - mine, mine};
    }
    before += __shfl_sync(~0u, end, 31);
  }
  return {-1, 0, 0};
}

// ---- the cache

// Where a lane's row of a step lies: lanes 0 to 15 have the step's keys, 16 to 31 its values.
struct Source {
  const char* base;
  int64_t page_stride, row_stride;  // bytes
  Integers pages;                   // of this document
  int page_size, end, lane;         // page_size 0: no pages

  template <typename Stored>
  __device__ static Source of(const Arguments& a, int document, int head, int end, int lane) {
    constexpr int64_t SIZE = sizeof(Stored);
    const bool value = lane >= KEYS;
    Source s{static_cast<const char*>(value ? a.v : a.k) + head * (value ? a.v_head : a.k_head) * SIZE,
             (value ? a.v_page : a.k_page) * SIZE, (value ? a.v_row : a.k_row) * SIZE,
             {a.pages.data + document * a.pages_document, a.pages.stride}, a.page_size, end, lane % KEYS};
    if (!s.page_size) s.base += at(a.starts, document) * s.row_stride;
    return s;
  }
  // Past the part's end its last row again: it is there, and not seen.
  __device__ int key(int step) const { return min(step * KEYS + lane, end - 1); }
  __device__ int page(int step) const { return page_size ? at(pages, unsigned(key(step)) / unsigned(page_size)) : 0; }
  __device__ const char* row(int step, int page) const {
    const int within = page_size ? unsigned(key(step)) % unsigned(page_size) : key(step);
    return base + page * page_stride + within * row_stride;
  }
};

template <int PIECES, int PITCH>
__device__ inline void fetch(Step<PITCH>& to, const Source& source, int step, int page, int lane) {
  const auto mine = reinterpret_cast<unsigned long long>(source.row(step, page));
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const int row = (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES;
    const auto from = reinterpret_cast<const char*>(__shfl_sync(~0u, mine, row));
    copy_async(row < KEYS ? &to.k[row][piece] : &to.v[row - KEYS][piece], from + piece * 16);
  }
}

// ---- a step

// This lane's row of the four 8 x 8 matrices that are 16 rows by 2 pieces of 16 bytes; at an odd end the last piece
// twice.
template <int PIECES, int PITCH>
__device__ inline const void* matrix_row(const uint4 (&rows)[16][PITCH], int piece, int lane) {
  return &rows[lane % 16][min(piece + lane / 16, PIECES - 1)];
}

// Bytes 0 2 1 3: two neighbouring numbers of one key and two of the next become two of either column.
__device__ inline uint32_t transpose(uint32_t x) { return permute<0x3120>(x, x); }

// A row's softmax so far: highest exponent and sum, of this lane's rows lane / 4 and that + 8 of each tile of 16.
template <typename S, int D>
struct State {
  static constexpr int TILES = S::ROWS / 16;
  float out[TILES][D / 8][4], top[TILES][2], sum[TILES][2];
};

// scores: [tile][keys 0 to 7, 8 to 15] as multiply leaves them.
template <typename S, int TILES>
__device__ inline void score(
    float (&scores)[TILES][2][4], const Rows<S>& k, const uint4 (&q)[S::ROWS][S::Q_PITCH], int lane) {
  using T = typename S::Number;
  constexpr int Q_PIECES = S::FLOAT8 ? 2 * S::PIECES : S::PIECES;
  const int k_lane = lane % 8 + lane / 8 % 2 * 16 + lane / 16 * 8;  // a key's two pieces side by side in x
#pragma unroll
  for (int piece = 0; piece < S::PIECES; piece += 2) {
    const bool whole = piece + 1 < S::PIECES;
    uint32_t x[4], rows[4];
    load_matrices(x, matrix_row<S::PIECES>(k, piece, k_lane));
    // float8: a piece is 16 columns, whose places in q's row store_query has changed to suit.
#pragma unroll
    for (int half = 0; half < (S::FLOAT8 && whole ? 2 : 1); half++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const auto& q16 = reinterpret_cast<const uint4(&)[16][S::Q_PITCH]>(q[tile * 16]);
        load_matrices(rows, matrix_row<Q_PIECES>(q16, S::FLOAT8 ? 2 * (piece + half) : piece, lane));
#pragma unroll
        for (int n = 0; n < 2; n++)
          if constexpr (S::FLOAT8) {
            const uint32_t four = x[2 * n + half];
            multiply(scores[tile][n], rows, {float8_to_half(four), float8_to_half(four >> 16)}, T());
          } else {
            multiply(scores[tile][n], rows, {x[2 * n], whole ? x[2 * n + 1] : 0}, T());
          }
      }
  }
}

// out += p v. With float8, out[2c + i] is columns 16 c + i, + 2, + 4, …, else out[c] columns 8 c, + 1, + 2, ….
template <typename S, int D, int TILES>
__device__ inline void add_values(
    float (&out)[TILES][D / 8][4], const uint32_t (&p)[TILES][4], const Rows<S>& v, int lane) {
  using T = typename S::Number;
#pragma unroll
  for (int piece = 0; piece < S::PIECES; piece += 2) {
    uint32_t x[4];
    load_matrices_transposed(x, matrix_row<S::PIECES>(v, piece, lane));
#pragma unroll
    for (int half = 0; half < 2 && piece + half < S::PIECES; half++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        if constexpr (S::FLOAT8) {
          const uint32_t a = transpose(x[2 * half]), b = transpose(x[2 * half + 1]);
          const int column = 2 * (piece + half);
          multiply(out[tile][column], p[tile], {float8_to_half(a), float8_to_half(b)}, T());
          multiply(out[tile][column + 1], p[tile], {float8_to_half(a >> 16), float8_to_half(b >> 16)}, T());
        } else {
          multiply(out[tile][piece + half], p[tile], {x[2 * half], x[2 * half + 1]}, T());
        }
  }
}

// seen: keys, counted from the step's first, that this lane's rows may see.
template <typename S, int D, int TILES>
__device__ inline void attend(
    State<S, D>& state, const Step<S::PITCH>& step, const uint4 (&q)[S::ROWS][S::Q_PITCH],
    const float (&factor)[TILES][2], const int (&seen)[TILES][2], bool masked, int lane) {
  float scores[TILES][2][4] = {};
  score<S>(scores, step.k, q, lane);
  uint32_t p[TILES][4];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {  // rows lane / 4 and lane / 4 + 8
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float& x = scores[tile][i / 2][2 * h + i % 2];
        x *= factor[tile][h];
        if (masked && i / 2 * 8 + lane % 4 * 2 + i % 2 >= seen[tile][h]) x = -INFINITY;
        top = fmaxf(top, x);
      }
      top = fmaxf(state.top[tile][h], quad_max(top));
      const float base = top == -INFINITY ? 0 : top;  // a row that has seen no key yet
      shrink[h] = exp2_fast(state.top[tile][h] - base);
      state.top[tile][h] = top;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float x = exp2_fast(scores[tile][n][2 * h] - base), y = exp2_fast(scores[tile][n][2 * h + 1] - base);
        sum += x + y;
        p[tile][2 * n + h] = pack<typename S::Number>(x, y);
      }
      state.sum[tile][h] = state.sum[tile][h] * shrink[h] + sum;
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) state.out[tile][i / 4][i % 4] *= shrink[i % 4 / 2];
  }
  add_values<S, D>(state.out, p, step.v, lane);
}

// ---- a part

// The block's rows of q, zeros past the last, in the products' numbers. float8: in float16, which a power of two for
// each row brings into its range, and in the order in which a lane finds four adjacent columns of a key.
template <typename S, typename T, int D>
__device__ inline void store_query(
    Shared<S>& s, const Arguments& a, int document, int group, int first_row, float scale) {
  constexpr int SHARE = THREADS / S::ROWS;  // threads a row
  const int r = threadIdx.x / SHARE, member = threadIdx.x % SHARE, row = first_row + r;
  const int token = row / a.shared, head = group * a.shared + row % a.shared;
  const T* from = static_cast<const T*>(a.q) + document * a.q_document + token * a.q_token + head * a.q_head;
  float x[D / SHARE];
#pragma unroll
  for (int i = 0; i < D / SHARE; i++) x[i] = token < a.tokens ? float(from[i * SHARE + member]) : 0;
  float unit = 1;
  if constexpr (S::FLOAT8) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < D / SHARE; i++) largest = fmaxf(largest, fabsf(x[i]));
    for (int apart = 1; apart < SHARE; apart *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, apart));
    unit = fmaxf(__uint_as_float(__float_as_uint(largest) & 0x7F800000), 1.17549435e-38f);
  }
  auto* to = reinterpret_cast<typename S::Number*>(s.q[r]);
#pragma unroll
  for (int i = 0; i < D / SHARE; i++) {
    const int c = i * SHARE + member;
    // Of 16 columns, four adjacent ones are two of the product's first 8 and the same two of its last 8.
    to[S::FLOAT8 ? c / 16 * 16 + c % 4 / 2 * 8 + c % 16 / 4 * 2 + c % 2 : c] = typename S::Number(x[i] / unit);
  }
  if (member == 0) s.factor[r] = unit * scale;
}

// [row][column] of a warp, where its ring was.
template <typename S>
__device__ inline auto result(Shared<S>& s, int warp) {
  static_assert(sizeof(s.ring[0]) >= S::ROWS * S::OUT_PITCH * sizeof(float));
  return reinterpret_cast<float (*)[S::OUT_PITCH]>(s.ring[warp]);
}

template <typename S, int D>
__device__ inline void leave(Shared<S>& s, const State<S, D>& state, int rows, int warp, int lane) {
  auto* out = result(s, warp);
#pragma unroll
  for (int tile = 0; tile < S::ROWS / 16; tile++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = tile * 16 + 8 * h + lane / 4;
      const float sum = quad_sum(state.sum[tile][h]);
      if (lane % 4 == 0) s.level[warp][row] = {state.top[tile][h], sum};
      if (row >= rows) continue;
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        const auto& x = state.out[tile];
        if constexpr (!S::FLOAT8)
          reinterpret_cast<float2&>(out[row][i * 8 + lane % 4 * 2]) = {x[i][2 * h], x[i][2 * h + 1]};
        else if (i % 2 == 0)
          reinterpret_cast<float4&>(out[row][i * 8 + lane % 4 * 4]) =
              float4{x[i][2 * h], x[i + 1][2 * h], x[i][2 * h + 1], x[i + 1][2 * h + 1]};
      }
    }
}

__device__ inline float finite(float top) { return top == -INFINITY ? 0 : top; }
__device__ inline void add(float4& sum, const float4& x, float weight) {
  sum.x += x.x * weight, sum.y += x.y * weight, sum.z += x.z * weight, sum.w += x.w * weight;
}
template <typename T>
__device__ inline void store(void* to, int64_t at, const float4& x, float factor) {
  const uint2 both = {pack<T>(x.x * factor, x.y * factor), pack<T>(x.z * factor, x.w * factor)};
  *reinterpret_cast<uint2*>(static_cast<T*>(to) + at) = both;
}

template <typename T, typename Stored, int D, int TILES>
__global__ void __launch_bounds__(THREADS, DECODE_RESIDENT) part(const Arguments a) {
  using S = Shape<T, Stored, D, TILES>;
  auto& s = hopper::block_shared<Shared<S>>();
  const int unit = blockIdx.x % a.units, slot = blockIdx.x / a.units;
  const int group = unit / a.tiles, first_row = unit % a.tiles * S::ROWS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The kernel in front may have written the lengths, the pages and the cache's last rows: nothing is read before it
  // ends. So three loads that depend on each other, lengths, pages, rows, come before the first product.
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Place place = find<false>(a, [&](int, int end) { return slot < end; });
  if (place.document < 0) return;
  const int length = at(a.lengths, place.document), steps = (length + KEYS - 1) / KEYS;
  const int index = slot - place.first, fewest = steps / place.parts, more = steps % place.parts;
  const int first = index * fewest + min(index, more), last = first + fewest + (index < more);

  const auto source = Source::of<Stored>(a, place.document, group, min(last * KEYS, length), lane);
  int page[S::STAGES];
#pragma unroll
  for (int i = 0; i < S::STAGES; i++) page[i] = source.page(first + warp + i * WARPS);
#pragma unroll
  for (int i = 0; i < S::STAGES - 1; i++) {
    const int step = first + warp + i * WARPS;
    if (step < last) fetch<S::PIECES>(s.ring[warp][i], source, step, page[i], lane);
    copy_commit();
  }
  int next_page = page[S::STAGES - 1];

  const float k_scale = a.k_scale ? a.k_scale[group * a.k_scale_head] : 1;
  store_query<S, T, D>(s, a, place.document, group, first_row, a.scale * LOG2E * k_scale);
  __syncthreads();
  State<S, D> state;
  float factor[TILES][2];
  int seen[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = tile * 16 + 8 * h + lane / 4, token = (first_row + row) / a.shared;
      factor[tile][h] = s.factor[row];
      seen[tile][h] = length - a.tokens + 1 + min(token, a.tokens - 1);
      state.top[tile][h] = -INFINITY, state.sum[tile][h] = 0;
#pragma unroll
      for (int i = 0; i < D / 4; i++) state.out[tile][i / 2][2 * h + i % 2] = 0;
    }

  int stage = 0;
  for (int step = first + warp; step < last; step += WARPS) {
    copy_wait<S::STAGES - 2>();
    __syncwarp();  // all lanes' copies are there, and all lanes are done with the stage before
    const int ahead = step + (S::STAGES - 1) * WARPS;
    if (ahead < last) fetch<S::PIECES>(s.ring[warp][stage ? stage - 1 : S::STAGES - 1], source, ahead, next_page, lane);
    copy_commit();
    next_page = source.page(ahead + WARPS);
    int left[TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) left[i / 2][i % 2] = seen[i / 2][i % 2] - step * KEYS;
    attend<S, D>(state, s.ring[warp][stage], s.q, factor, left, (step + 1) * KEYS > length - a.tokens + 1, lane);
    if (++stage == S::STAGES) stage = 0;
  }
  __syncwarp();
  const int rows = min(S::ROWS, a.tokens * a.shared - first_row);
  leave(s, state, rows, warp, lane);
  __syncthreads();

  const float v_scale = a.v_scale ? a.v_scale[group * a.v_scale_head] : 1;
  for (int i = threadIdx.x; i < rows * D / 4; i += THREADS) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    float top = -INFINITY, sum = 0;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, s.level[w][row].x);
    float4 out{};
    for (int w = 0; w < WARPS; w++) {
      const float weight = exp2_fast(s.level[w][row].x - finite(top));
      sum += s.level[w][row].y * weight;
      add(out, reinterpret_cast<const float4&>(result(s, w)[row][column]), weight);
    }
    if (place.parts == 1) {
      const int token = (first_row + row) / a.shared, head = group * a.shared + (first_row + row) % a.shared;
      const int64_t to = ((int64_t(place.document) * a.tokens + token) * a.heads + head) * D + column;
      store<T>(a.out, to, out, sum > 0 ? v_scale / sum : 0);
    } else {
      const int64_t to = int64_t(blockIdx.x) * a.kept + row;
      float4 scaled{};
      add(scaled, out, v_scale);
      reinterpret_cast<float4*>(a.partial)[(to * D + column) / 4] = scaled;
      if (column == 0) reinterpret_cast<float2*>(a.levels)[to] = {top, sum};
    }
  }
}

// ---- merging

struct Sums {
  float4 out[WARPS][32];
  float2 level[WARPS];
};

// One block a row of the output; warps share its parts, lanes its columns.
template <typename T>
__global__ void __launch_bounds__(THREADS) merge(const Arguments a) {
  auto& s = hopper::block_shared<Sums>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = a.head_dim;
  const int head = blockIdx.x % a.heads, token = blockIdx.x / a.heads % a.tokens;
  const int document = blockIdx.x / a.heads / a.tokens;
  // Each block of the kernel in front waited for what came before it, then let this one start: the lengths are there.
  const Place place = find<true>(a, [&](int b, int) { return b == document; });
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (place.parts == 1) return;  // it wrote the result
  const int group = head / a.shared, row = token * a.shared + head % a.shared;
  const auto at = [&](int part) {
    return (int64_t(place.first + part) * a.units + group * a.tiles + row / a.rows) * a.kept + row % a.rows;
  };
  const auto* levels = reinterpret_cast<const float2*>(a.levels);
  const auto* partial = reinterpret_cast<const float4*>(a.partial);
  float4 out{};
  float top = -INFINITY, sum = 0;
  for (int begin = warp; begin < place.parts; begin += WARPS * 8) {
    float2 level[8];
    float4 x[8] = {};
    float highest = top;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int part = begin + i * WARPS;
      level[i] = part < place.parts ? levels[at(part)] : float2{-INFINITY, 0};
      if (part < place.parts && lane < D / 4) x[i] = partial[at(part) * (D / 4) + lane];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) highest = fmaxf(highest, level[i].x);
    const float shrink = exp2_fast(top - finite(highest));
    float4 shrunk{};
    add(shrunk, out, shrink);
    out = shrunk, sum *= shrink, top = highest;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float weight = exp2_fast(level[i].x - finite(top));
      sum += level[i].y * weight;
      add(out, x[i], weight);
    }
  }
  s.out[warp][lane] = out;
  if (lane == 0) s.level[warp] = {top, sum};
  __syncthreads();
  if (threadIdx.x >= D / 4) return;
  top = -INFINITY, sum = 0, out = {};
  for (int w = 0; w < WARPS; w++) top = fmaxf(top, s.level[w].x);
  for (int w = 0; w < WARPS; w++) {
    const float weight = exp2_fast(s.level[w].x - finite(top));
    sum += s.level[w].y * weight;
    add(out, s.out[w][threadIdx.x], weight);
  }
  store<T>(a.out, int64_t(blockIdx.x) * D + threadIdx.x * 4, out, sum > 0 ? 1 / sum : 0);
}

template <typename T, typename Stored, int D, int TILES>
cudaError_t launch(const DecodeAttention& a, cudaStream_t stream) {
  using S = Shape<T, Stored, D, TILES>;
  static_assert(DECODE_RESIDENT * (hopper::shared_bytes<Shared<S>> + 1024) <= 228 * 1024);  // 1024: the system's own
  const int shared = a.heads / a.kv_heads;
  const Arguments all{a, shared, decode_rows(a), decode_kept(a), decode_tiles(a), decode_units(a), decode_slots(a)};
  const Launch parts{decode_blocks(a), THREADS, hopper::shared_bytes<Shared<S>>, 1, true};
  if (parts.blocks) {  // none where the cache has no rows
    const cudaError_t error = launch_kernel(parts, stream, part<T, Stored, D, TILES>, all);
    if (error) return error;
  }
  const Launch rows{a.documents * a.tokens * a.heads, THREADS, hopper::shared_bytes<Sums>, 1, parts.blocks > 0};
  return launch_kernel(rows, stream, merge<T>, all);
}

template <typename T, typename Stored, int D>
cudaError_t launch(const DecodeAttention& a, cudaStream_t stream) {
  return decode_rows(a) == 16 ? launch<T, Stored, D, 1>(a, stream) : launch<T, Stored, D, 2>(a, stream);
}

template <typename T, typename Stored>
cudaError_t launch(const DecodeAttention& a, cudaStream_t stream) {
  switch (a.head_dim) {
    case 64: return launch<T, Stored, 64>(a, stream);
    case 80: return launch<T, Stored, 80>(a, stream);
    case 128: return launch<T, Stored, 128>(a, stream);
  }
  if constexpr (sizeof(Stored) == 2)  // 72 bytes are no whole copies
    if (a.head_dim == 72) return launch<T, Stored, 72>(a, stream);
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch(const DecodeAttention& a, cudaStream_t stream) {
  return a.stored == Type::float8 ? launch<T, __nv_fp8_e4m3>(a, stream) : launch<T, T>(a, stream);
}

}  // namespace

cudaError_t decode_attention(const DecodeAttention& a, cudaStream_t stream) {
  return a.type == Type::bfloat16 ? launch<__nv_bfloat16>(a, stream) : launch<__half>(a, stream);
}

}  // namespace phi4rv
