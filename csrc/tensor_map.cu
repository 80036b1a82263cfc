#include "tensor_map.h"

#include <algorithm>

#ifdef PHI4RV_EMULATED
#include "emulator/hopper.h"
#endif

namespace phi4rv {

#ifdef PHI4RV_EMULATED

cudaError_t tensor_map(
    CUtensorMap& map, const void* data, Type type, std::initializer_list<int64_t> sizes,
    std::initializer_list<int64_t> strides, std::initializer_list<int> box, bool swizzled) {
  return emulator::describe(map, data, bytes_of(type), sizes, strides, box, swizzled);
}

#else

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is running, so that the library does not link against one and loads where there is none.
Encode encoder() {
  static Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<Encode>(result == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  return found;
}

CUtensorMapDataType kind(Type type) {
  switch (type) {
    case Type::bfloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case Type::float16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case Type::float8: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    case Type::float32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
  return CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

}  // namespace

cudaError_t tensor_map(
    CUtensorMap& map, const void* data, Type type, std::initializer_list<int64_t> sizes,
    std::initializer_list<int64_t> strides, std::initializer_list<int> box, bool swizzled) {
  if (!encoder()) return cudaErrorSymbolNotFound;
  // The encoder needs a current context, which a new thread gets only by its first call that sets the device.
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaSetDevice(device);
  if (error) return error;
  cuuint64_t extents[4], steps[3];
  cuuint32_t boxes[4], every[4] = {1, 1, 1, 1};
  std::copy(sizes.begin(), sizes.end(), extents);
  std::copy(strides.begin(), strides.end(), steps);
  std::copy(box.begin(), box.end(), boxes);
  const CUresult result = encoder()(
      &map, kind(type), sizes.size(), const_cast<void*>(data), extents, steps, boxes, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

#endif

}  // namespace phi4rv
