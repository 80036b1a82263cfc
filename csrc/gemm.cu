// The projector's two products; the core and its design are in gemm.cuh.

#include "gemm.cuh"

namespace phi4rv {
namespace {

struct Same {
  static constexpr bool CHANGES = false;
  __device__ static float apply(float x) { return x; }
};

struct GeluErf {
  static constexpr bool CHANGES = true;
  __device__ static float apply(float x) { return x * fmaf(0.5f, erff(x * 0.7071067811865476f), 0.5f); }
};

template <typename T, typename Out>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  return g.gelu ? gemm_core::launch<T, Out, GeluErf>(g, stream) : gemm_core::launch<T, Out, Same>(g, stream);
}

template <typename Out>
cudaError_t launch(const Gemm& g, cudaStream_t stream) {
  return g.type == Type::float8 ? launch<__nv_fp8_e4m3, Out>(g, stream) : launch<Out, Out>(g, stream);
}

}  // namespace

cudaError_t gemm(const Gemm& g, cudaStream_t stream) {
  return g.out_type == Type::bfloat16 ? launch<__nv_bfloat16>(g, stream) : launch<__half>(g, stream);
}

}  // namespace phi4rv
