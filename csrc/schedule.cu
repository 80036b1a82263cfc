#include "schedule.h"

#include "launch.cuh"

namespace phi4rv {
namespace {

__device__ inline int warp_sum(int x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Tiles of a document of ``length`` rows whose cost is over ``cost``. Causal costs are rows, 2 rows, ..., length.
template <bool CAUSAL>
__device__ inline int costlier(int length, int tiles, int rows, int cost) {
  if (length <= cost) return 0;
  return CAUSAL ? tiles - cost / rows : tiles;
}

template <bool CAUSAL>
__device__ inline int as_costly(int length, int tiles, int rows, int cost) {
  if (length == cost) return CAUSAL ? 1 : tiles;
  return CAUSAL && length > cost && cost % rows == 0;
}

// One block a document, one warp a tile: a tile's place is the number of tiles that go before it.
template <bool CAUSAL>
__global__ void order(const int* cu_seqlens, int documents, int rows, int slots, int* count, int2* tiles) {
  const int document = blockIdx.x, lane = threadIdx.x % 32;
  const int own = cu_seqlens[document + 1] - cu_seqlens[document], own_tiles = (own + rows - 1) / rows;
  for (int block = threadIdx.x / 32; block < max(own_tiles, 1); block += blockDim.x / 32) {
    const int cost = CAUSAL ? min((block + 1) * rows, own) : own;
    int place = 0, total = 0;
    for (int i = lane; i < documents; i += 32) {
      const int length = cu_seqlens[i + 1] - cu_seqlens[i], n = (length + rows - 1) / rows;
      total += n;
      place += costlier<CAUSAL>(length, n, rows, cost);
      if (i < document) place += as_costly<CAUSAL>(length, n, rows, cost);
    }
    place = warp_sum(place) + (CAUSAL ? 0 : block), total = warp_sum(total);
    if (lane == 0 && block < own_tiles && place < slots) tiles[place] = make_int2(document, block);
    if (document == 0 && threadIdx.x == 0) *count = min(total, slots);
  }
}

// The same for tiles of keys of causal documents: a tile costs the rows from its first on.
__global__ void order_keys(const int* cu_seqlens, int documents, int rows, int slots, int* count, int2* tiles) {
  const int own = cu_seqlens[blockIdx.x + 1] - cu_seqlens[blockIdx.x], own_tiles = (own + rows - 1) / rows;
  for (int block = threadIdx.x; block < max(own_tiles, 1); block += blockDim.x) {
    const int cost = own - block * rows;
    int place = 0, total = 0;
    for (int i = 0; i < documents; i++) {
      const int length = cu_seqlens[i + 1] - cu_seqlens[i];
      total += (length + rows - 1) / rows;
      if (length > cost) place += (length - cost + rows - 1) / rows;
      if (i < int(blockIdx.x) && length >= cost && (length - cost) % rows == 0) place++;
    }
    if (block < own_tiles && place < slots) tiles[place] = make_int2(blockIdx.x, block);
    if (blockIdx.x == 0 && block == 0) *count = min(total, slots);
  }
}

}  // namespace

cudaError_t schedule_keys(
    const int* cu_seqlens, int documents, int rows, bool causal, int slots, int* out, cudaStream_t stream) {
  if (!causal) return schedule(cu_seqlens, documents, rows, false, slots, out, stream);
  auto* tiles = reinterpret_cast<int2*>(out + 2);
  return launch_kernel({documents, 128}, stream, order_keys, cu_seqlens, documents, rows, slots, out, tiles);
}

cudaError_t schedule(const int* cu_seqlens, int documents, int rows, bool causal, int slots, int* out, cudaStream_t stream) {
  auto* tiles = reinterpret_cast<int2*>(out + 2);
  const auto kernel = causal ? order<true> : order<false>;
  return launch_kernel({documents, 128}, stream, kernel, cu_seqlens, documents, rows, slots, out, tiles);
}

}  // namespace phi4rv
