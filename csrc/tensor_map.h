// Descriptions of tensors for the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace phi4rv {

// A (rows, heads, columns) tensor of 2-byte values in boxes of ``box_rows`` rows of one head and 64 columns, swizzled by
// 128 bytes; what lies outside arrives as zeros. ``stride``: elements between rows.
cudaError_t tensor_map(
    CUtensorMap& map, const void* data, Type type, int columns, int heads, int64_t rows, int64_t stride, int box_rows);

}  // namespace phi4rv
