// The projector's two products; the core and its design are in gemm.cuh.

#include "gemm.cuh"

namespace phi4rv {
namespace {

struct Same {
  static constexpr bool CHANGES = false;
  __device__ static float apply(float x) { return x; }
};

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), and Phi(-a) = exp(-a^2 / 2) P(1 / (1 + c a)), the form of Abramowitz & Stegun
// 7.1.26; P fitted for the least relative error, 5e-6 for every x. erff takes twice the instructions, and its GELU is
// right to 1e-6 of the largest values only. Beyond 16, GELU is x or zero.
struct GeluErf {
  static constexpr bool CHANGES = true;
  __device__ static float apply(float x) {
    const float a = fminf(fabsf(x), 16), t = warp::reciprocal_fast(fmaf(a, 0.31f, 1));
    float p = fmaf(t, -0.07392691f, 0.18044392f);
    p = fmaf(t, p, 0.01575183f), p = fmaf(t, p, 0.13342601f), p = fmaf(t, p, 0.12044223f), p = fmaf(t, p, 0.12386061f);
    const float below = p * t * warp::exp2_fast(a * a * -0.7213475204444817f);
    return fmaf(-a, below, x < 0 ? 0 : x);  // NaN stays
  }
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
