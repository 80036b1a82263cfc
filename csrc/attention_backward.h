// What the kernels of attention's backward share: the sums of dq as integers, and what is known of each query row.
//
// dq is the only sum across blocks. Its parts are rounded to integers, whose sums are the same in whatever order the
// copy engine adds them: deterministic, and no block waits for another. Before scale,
//   |dq_id| = |sum_j p_ij (dp_ij - delta_i) k_jd| <= |dout_i| max_j |v_j| max_j |k_jd|
// over the document's keys, since the values dp_ij lie in [-r, r], r = |dout_i| max_j |v_j|, and the mean distance of
// such from their mean delta_i is r at most. That bound is 2^30: a bit is left for rounding, and only the final sum must
// fit, for partial ones may wrap around.
//
// Precision: each of n key tiles is rounded to half a unit, so the error is at most n 2^-31 of the bound, about
// sqrt(n / 12) 2^-30 as such roundings go. A random document of 16384 rows has |dq| near 2^-14 of its bound: an error of
// 2^-14, where bfloat16's own is 2^-9. Keys or values that are large and that nobody attends to loosen the bound by as
// much as they exceed the rest: a factor of 2^5 costs nothing there, nor 2^10 at 200 rows (a channel's large keys only
// concern that channel). Past that the small elements of dq lose bits, always the same ones.
// What is not finite, dq_i included, gives NaN.
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
