// What the kernels of attention's backward share: the sums of dq as integers, and what is known of each query row.
//
// dq is the only sum across blocks. Its parts are rounded to integers, whose sums are the same in whatever order the
// copy engine adds them: deterministic, and no block waits for another. Before scale,
//   |dq_id| = |sum_j p_ij (dp_ij - delta_i) k_jd| <= |dout_i| max_j |v_j| max_j |k_jd|
// over the document's keys: the values dp_ij lie in [-r, r], r = |dout_i| max_j |v_j|, and the mean distance of such
// from their mean delta_i is r at most. That bound is 2^30: a bit is left for rounding, and only the final sum must
// fit, for partial ones may wrap around.
//
// Precision: n key tiles are rounded to half a unit each. For random q, k, v and dout the root mean square of dq is
// 2^-8 of its bound in a document of 200 rows and 2^-12 at 16384, so that these roundings are 2^-22 and 2^-16 of dq
// (computed in float64), while bfloat16's own is 2^-9. Values, or keys in their channel, that are larger than the
// rest and that nobody attends to loosen the bound by as much: up to a factor of 2^13 in a document of 200 rows, 2^9
// at 3600, 2^7 at 16384 the roundings stay under bfloat16's. Past that dq loses bits, but always the same ones.
//
// What is not finite, dq_i included, gives NaN. A document's last tiles also hold rows of the next with weight zero:
// what is not finite there reaches its dq, dk and dv. The weights must sum to about 1, that is, lse must be forward's:
// of scores over 2^22 it has too few bits for that, and sums could wrap.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"
#include "launch.cuh"

namespace phi4rv::backward {

constexpr int ROWS = 64;  // query rows of a tile
constexpr float TINY_ROW = 0x1p-120f, TINY_COLUMN = 0x1p-90f;  // bounds from below, so that inverses are finite

// What ``AttentionBackward::rows`` holds of the rows of a tile. Rows past the document's end have an infinite LSE.
enum Row { LSE, DELTA, INVERSE, NORM, ROW_VALUES };  // LSE in base 2; |dout_i| and its inverse

// The place of a document's first tile.
__device__ inline int first_place(int begin, int document) { return begin / ROWS + document; }

// At head dim 128 the sums are of one half of the columns, then of the other: (heads, halves, tokens, width).
template <int D>
constexpr int SUM_WIDTH = D == 128 ? 64 : D;

// A token's columns lie in blocks of 8, exchanged so that four rows, as they are in shared memory, touch all banks.
template <int WIDTH>
__device__ inline int exchanged(int block, int token) {
  if constexpr (WIDTH % 32 == 0) return block ^ (token & 3);
  if constexpr (WIDTH % 32 == 16) return block ^ (token >> 1 & 1);
  return block;
}

// max_j |v_j| max_j |k_jd|. Not fmaxf, which would drop a NaN.
template <int D>
__device__ inline float column_bound(const uint32_t* bounds, int column) {
  const float bound = __uint_as_float(bounds[D]) * __uint_as_float(bounds[column]);
  return bound < TINY_COLUMN ? TINY_COLUMN : bound;
}

// Before the products, a pass over dout, out, k and v: fills rows and bounds, and zeroes the sums. After them: dq.
cudaError_t prepare(const AttentionBackward& b, cudaStream_t stream);
cudaError_t finish(const AttentionBackward& b, cudaStream_t stream);

}  // namespace phi4rv::backward
