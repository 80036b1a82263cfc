// Which tiles of a packed row are worked on, and in what order: the costliest first, so that none is left for the end.
#pragma once

#include <cuda_runtime.h>

namespace phi4rv {

// Writes the number of tiles, a pad, and the tiles (document, block of ``rows`` rows) by falling cost: the keys that the
// block's last row sees, ties by document and block. The order is a function of the offsets alone. ``slots``: tiles that
// there is room for; what is over is dropped.
cudaError_t schedule(
    const int* cu_seqlens, int documents, int rows, bool causal, int slots, int* out, cudaStream_t stream);

// The same for tiles of keys, whose cost is the queries that see the tile's first key.
cudaError_t schedule_keys(
    const int* cu_seqlens, int documents, int rows, bool causal, int slots, int* out, cudaStream_t stream);

}  // namespace phi4rv
