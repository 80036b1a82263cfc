// Hopper's own instructions, one function each: barriers in shared memory, bulk tensor copies, warpgroup products.
// PTX ISA 8.x; the layouts of wgmma operands are those of its section "Asynchronous warpgroup-level matrix".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace phi4rv::hopper {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarriers

__device__ inline void init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Returns once the phase of this parity is complete; a fresh barrier counts as having completed parity 1.
__device__ inline void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- bulk tensor copies (TMA)

// A box of a rank-3 tensor into shared memory; elements outside the tensor arrive as zeros.
__device__ inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ inline void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- registers of a warpgroup

template <int REGISTERS>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- warpgroup products (wgmma)

__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accumulators across the asynchronous products that own them.
template <int N>
__device__ inline void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Describes an operand in shared memory with rows of 128 bytes, swizzled by 128 bytes, at an address that is a multiple
// of 1024. ``outer``: bytes from one block of 64 columns to the next, which only operands read across columns need.
__device__ inline uint64_t operand(const void* p, uint32_t outer = 16) {
  const uint64_t address = (shared_address(p) & 0x3FFFF) >> 4;
  return address | uint64_t(outer >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F8(d, i) F4(d, i), F4(d, i + 4)
#define F16(d, i) F8(d, i), F8(d, i + 8)
#define F32(d, i) F16(d, i), F16(d, i + 16)
#define S32                                                                                                       \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define S36 S32 ",%32,%33,%34,%35"
#define S40 S36 ",%36,%37,%38,%39"
#define S64                                                                                                   \
  S40 ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define D32(d) F32(d, 0)
#define D36(d) F32(d, 0), F4(d, 32)
#define D40(d) F32(d, 0), F8(d, 32)
#define D64(d) F32(d, 0), F32(d, 32)

// d (64 x N) = or += a (64 x 16) b (16 x N) for a whole warpgroup; d: float32 accumulators, N / 2 a thread.
// a and b by descriptor, both with adjacent elements along the 16 (K-major).
#define PRODUCT_SHARED(N, REGISTERS, FLOATS, A, B, P, TYPE, NAME)                                                    \
  __device__ inline void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool add, TYPE) {                        \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, " A ", " B       \
                 ", p, 1, 1, 0, 0;}\n"                                                                               \
                 : FLOATS(d)                                                                                         \
                 : "l"(a), "l"(b), "r"(int(add)));                                                                   \
  }
// a in registers (4 of two 16-bit values), b by descriptor with adjacent elements along N (MN-major).
#define PRODUCT_REGISTERS(N, REGISTERS, FLOATS, A, B, P, TYPE, NAME)                                                 \
  __device__ inline void product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add, TYPE) {            \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, {" A "}, " B     \
                 ", p, 1, 1, 1;}\n"                                                                                  \
                 : FLOATS(d)                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                               \
  }
#define PRODUCTS(TYPE, NAME)                                                                  \
  PRODUCT_SHARED(128, S64, D64, "%64", "%65", "%66", TYPE, NAME)                              \
  PRODUCT_REGISTERS(64, S32, D32, "%32,%33,%34,%35", "%36", "%37", TYPE, NAME)                \
  PRODUCT_REGISTERS(72, S36, D36, "%36,%37,%38,%39", "%40", "%41", TYPE, NAME)                \
  PRODUCT_REGISTERS(80, S40, D40, "%40,%41,%42,%43", "%44", "%45", TYPE, NAME)                \
  PRODUCT_REGISTERS(128, S64, D64, "%64,%65,%66,%67", "%68", "%69", TYPE, NAME)

PRODUCTS(__nv_bfloat16, "bf16")
PRODUCTS(__half, "f16")

#undef PRODUCTS

}  // namespace phi4rv::hopper
