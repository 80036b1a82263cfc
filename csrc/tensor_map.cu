#include "tensor_map.h"

namespace phi4rv {
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

}  // namespace

cudaError_t tensor_map(
    CUtensorMap& map, const void* data, Type type, int columns, int heads, int64_t rows, int64_t stride, int box_rows) {
  if (!encoder()) return cudaErrorSymbolNotFound;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(heads), cuuint64_t(rows)};
  const cuuint64_t strides[] = {cuuint64_t(columns) * 2, cuuint64_t(stride) * 2};
  const cuuint32_t box[] = {64, 1, cuuint32_t(box_rows)}, every[] = {1, 1, 1};
  const auto kind = type == Type::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encoder()(
      &map, kind, 3, const_cast<void*>(data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace phi4rv
