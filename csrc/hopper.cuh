// Hopper's own instructions, one function each: barriers in shared memory, bulk copies by the copy engine (TMA),
// warpgroup products (wgmma), clusters. PTX ISA 8.x; operand layouts are those of its section "Asynchronous
// warpgroup-level matrix". All inline assembly of csrc/ is here and in warp.cuh; csrc/emulator/ has the same functions
// for a CPU.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#ifdef PHI4RV_EMULATED
#include "emulator/hopper.h"
#else

namespace phi4rv::hopper {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A block's shared memory, all of it: one struct, at a multiple of 1024 bytes. Launch with shared_bytes<S>.
template <typename S>
constexpr int shared_bytes = sizeof(S) + 1024;
template <typename S>
__device__ inline S& block_shared() {
  extern __shared__ char raw[];
  return *reinterpret_cast<S*>(raw + (1024 - (shared_address(raw) & 1023)) % 1024);
}

// ---- mbarriers

__device__ inline void init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the cluster.
__device__ inline void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// At the same barrier of another block of the cluster. As in CUTLASS without .release.cluster, which costs a fence of the
// whole GPU: enough where what comes before are products that have been waited for.
__device__ inline void arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Returns once the phase of this parity is complete; a fresh barrier counts as having completed parity 1. Acquires for
// the block, not for the cluster, which would empty L1.
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

// ---- the copy engine

__device__ inline void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor into shared memory; elements outside the tensor arrive as zeros. c0 counts the fastest dimension.
__device__ inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}
__device__ inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// The same box to the same place, and its bytes to the same barrier, of every block of the cluster that ``blocks`` has a
// bit for.
__device__ inline void load_box_to_all(
    void* to, const CUtensorMap* map, uint64_t* barrier, uint16_t blocks, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}
__device__ inline void load_box_to_all(
    void* to, const CUtensorMap* map, uint64_t* barrier, uint16_t blocks, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
      : "memory");
}

// Adjacent bytes, a multiple of 16 at multiples of 16.
__device__ inline void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Adds adjacent int32 out of shared memory to memory; in whatever order, the sums are the same. What threads wrote in
// shared memory must be fenced by each writer (fence_async) before a barrier that the issuing thread passes; it may be
// overwritten after store_wait_read.
__device__ inline void add_integers(int32_t* to, const int32_t* from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ inline void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING>
__device__ inline void store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before what the copy engine and wgmma do there next.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What only sm_90a has. The library may be compiled for more architectures; kernels with these run on Hopper alone.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SM90A(...) asm volatile(__VA_ARGS__)
#else
#define SM90A(...) __trap()
#endif

// ---- threads, registers, clusters

// Named barriers 1 to 15 of a block (0 is __syncthreads); ``threads`` counts all that sync or arrive, whole warps.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ inline void take_registers() {
  SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void give_registers() {
  SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ inline int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- warpgroup products

__device__ inline void product_fence() { SM90A("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void product_commit() { SM90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void product_wait() {
  SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accumulators across the asynchronous products that own them.
template <int N>
__device__ inline void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// The same for operands in registers: they are written before this point.
template <int N>
__device__ inline void pin(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

// Describes an operand in shared memory with rows of 128 bytes, swizzled by 128 bytes (what load_box writes with such a
// map), whose rows' blocks of 8 follow each other, at a multiple of 1024 bytes.
// Adjacent elements along K: 64 (2-byte) of K a row; step along K by adding the step's bytes, under 128, to ``p``.
// Adjacent elements along M or N: 64 of it a row, one row for each of K; ``outer`` is the bytes from one block of 64 to
// the next; step along K by whole blocks of 8 rows.
__device__ inline uint64_t operand(const void* p, uint32_t outer = 16) {
  const uint64_t address = (shared_address(p) & 0x3FFFF) >> 4;
  return address | uint64_t(outer >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// The same some bytes further: an addition, where operand() is a chain of them.
__device__ inline uint64_t advance(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

// An operand's adjacent elements run along K, or along its other side (M of a, N of b).
enum Major { K_MAJOR = 0, MN_MAJOR = 1 };

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F8(d, i) F4(d, i), F4(d, i + 4)
#define F16(d, i) F8(d, i), F8(d, i + 8)
#define F32(d, i) F16(d, i), F16(d, i + 16)
#define F64(d, i) F32(d, i), F32(d, i + 32)
#define S32                                                                                                       \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define S36 S32 ",%32,%33,%34,%35"
#define S40 S36 ",%36,%37,%38,%39"
#define S48 S40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define S64 S48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define S96                                                                                                        \
  S64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
      "%90,%91,%92,%93,%94,%95"
#define S128                                                                                                       \
  S96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117," \
      "%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define D32(d) F32(d, 0)
#define D36(d) F32(d, 0), F4(d, 32)
#define D40(d) F32(d, 0), F8(d, 32)
#define D48(d) F32(d, 0), F16(d, 32)
#define D64(d) F64(d, 0)
#define D96(d) F64(d, 0), F32(d, 64)
#define D128(d) F64(d, 0), F64(d, 64)

// d (64 x N) = or += a (64 x 16) b (16 x N) for a whole warpgroup; d: float32 accumulators, N / 2 a thread: d[4j + 2h + i]
// is row 16 warp + lane / 4 + 8h, column 8j + lane % 4 * 2 + i. a and b by descriptor.
#define PRODUCT_SHARED(N, REGISTERS, FLOATS, A, B, P, TA, TB, TYPE, NAME)                                          \
  template <Major A_MAJOR = K_MAJOR, Major B_MAJOR = K_MAJOR>                                                      \
  __device__ inline void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool add, TYPE) {                      \
    SM90A("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, " A ", " B     \
                 ", p, 1, 1, " TA ", " TB ";}\n"                                                                   \
                 : FLOATS(d)                                                                                       \
                 : "l"(a), "l"(b), "r"(int(add)), "n"(int(A_MAJOR)), "n"(int(B_MAJOR)));                                     \
  }
// a in registers: a[2j + h] has row 16 warp + lane / 4 + 8h, columns 8j + lane % 4 * 2 and the next.
#define PRODUCT_REGISTERS(N, REGISTERS, FLOATS, A, B, P, TB, TYPE, NAME)                                           \
  template <Major B_MAJOR>                                                                                         \
  __device__ inline void product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add, TYPE) {          \
    SM90A("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, {" A "}, " B   \
                 ", p, 1, 1, " TB ";}\n"                                                                           \
                 : FLOATS(d)                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(B_MAJOR)));               \
  }
// Steps of 32 for 8-bit floats, always along K.
#define PRODUCT_FLOAT8(N, REGISTERS, FLOATS, A, B, P)                                                              \
  __device__ inline void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool add, __nv_fp8_e4m3) {             \
    SM90A("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGISTERS "}, " A ", " B             \
                 ", p, 1, 1;}\n"                                                                                   \
                 : FLOATS(d)                                                                                       \
                 : "l"(a), "l"(b), "r"(int(add)));                                                                 \
  }
#define PRODUCTS(TYPE, NAME)                                                               \
  PRODUCT_SHARED(64, S32, D32, "%32", "%33", "%34", "%35", "%36", TYPE, NAME)              \
  PRODUCT_SHARED(72, S36, D36, "%36", "%37", "%38", "%39", "%40", TYPE, NAME)              \
  PRODUCT_SHARED(80, S40, D40, "%40", "%41", "%42", "%43", "%44", TYPE, NAME)              \
  PRODUCT_SHARED(128, S64, D64, "%64", "%65", "%66", "%67", "%68", TYPE, NAME)             \
  PRODUCT_SHARED(256, S128, D128, "%128", "%129", "%130", "%131", "%132", TYPE, NAME)      \
  PRODUCT_REGISTERS(64, S32, D32, "%32,%33,%34,%35", "%36", "%37", "%38", TYPE, NAME)      \
  PRODUCT_REGISTERS(72, S36, D36, "%36,%37,%38,%39", "%40", "%41", "%42", TYPE, NAME)      \
  PRODUCT_REGISTERS(80, S40, D40, "%40,%41,%42,%43", "%44", "%45", "%46", TYPE, NAME)      \
  PRODUCT_REGISTERS(128, S64, D64, "%64,%65,%66,%67", "%68", "%69", "%70", TYPE, NAME)

PRODUCTS(__nv_bfloat16, "bf16")
PRODUCTS(__half, "f16")
PRODUCT_FLOAT8(128, S64, D64, "%64", "%65", "%66")

#undef PRODUCTS
#undef SM90A

}  // namespace phi4rv::hopper

#endif
