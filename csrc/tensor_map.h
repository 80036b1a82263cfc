// Descriptions of tensors for the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "kernels.h"

namespace phi4rv {

// A tensor in boxes, of 1 to 4 dimensions, the fastest first; its elements in that one are adjacent. ``strides``: bytes
// between elements of the second dimension, the third, …, multiples of 16. A box row is at most 128 bytes if swizzled by
// 128 bytes. What lies outside the tensor arrives as zeros and is not stored.
cudaError_t tensor_map(
    CUtensorMap& map, const void* data, Type type, std::initializer_list<int64_t> sizes,
    std::initializer_list<int64_t> strides, std::initializer_list<int> box, bool swizzled = true);

}  // namespace phi4rv
