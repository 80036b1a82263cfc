// A product of 64 x 64 over K columns, copied by the copy engine through a ring and multiplied by one warpgroup, and the
// mistakes that one makes in it. Prints, for each mistake, in how many of 20 runs the emulator gave it away.
#include <cstdio>
#include <cmath>
#include <vector>

#include "hopper.cuh"
#include "launch.cuh"
#include "tensor_map.h"

using namespace phi4rv;
using namespace phi4rv::hopper;

enum Mistake {
  NONE, FULL_NOT_AWAITED, EMPTY_NOT_AWAITED, RELEASED_TOO_SOON, READ_TOO_SOON, NOT_FENCED, NEVER_RELEASED, TOO_FEW_BYTES,
  WRONG_ROW, MISTAKES
};

constexpr int K = 512, STAGES = 2, RUNS = 20;

struct Shared {
  __nv_bfloat16 a[STAGES][64][64], b[STAGES][64][64];
  uint64_t full[STAGES], empty[STAGES];
};

__global__ void multiply(CUtensorMap a, CUtensorMap b, float* c, int mistake) {
  auto& s = block_shared<Shared>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init(&s.full[i], 1), init(&s.empty[i], 1);
    fence_init();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x > 128) return;
    for (int i = 0; i < K / 64; i++) {
      const int stage = i % STAGES;
      if (mistake != EMPTY_NOT_AWAITED) wait(&s.empty[stage], (i / STAGES & 1) ^ 1);
      arrive_expecting(&s.full[stage], (mistake == TOO_FEW_BYTES ? 1 : 2) * sizeof(s.a[0]));
      load_box(s.a[stage], &a, &s.full[stage], i * 64, 0);
      load_box(s.b[stage], &b, &s.full[stage], i * 64, 0);
    }
    return;
  }
  float d[32];
  for (int i = 0; i < K / 64; i++) {
    const int stage = i % STAGES;
    if (mistake != FULL_NOT_AWAITED) wait(&s.full[stage], i / STAGES & 1);
    if (mistake != NOT_FENCED) product_fence();
    const int row = mistake == WRONG_ROW ? threadIdx.x / 64 * 8 : 0;
    for (int step = 0; step < 4; step++)
      product(d, operand(&s.a[stage][row][step * 16]), operand(&s.b[stage][0][step * 16]), i + step > 0, __nv_bfloat16());
    product_commit();
    if (mistake == RELEASED_TOO_SOON && threadIdx.x == 0) arrive(&s.empty[stage]);
    if (mistake != READ_TOO_SOON) product_wait<0>();
    if (mistake != RELEASED_TOO_SOON && mistake != NEVER_RELEASED && threadIdx.x == 0) arrive(&s.empty[stage]);
  }
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 32; i++) c[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
  product_wait<0>();
}

int main() {
  std::vector<__nv_bfloat16> a(64 * K), b(64 * K);
  for (int i = 0; i < 64 * K; i++) a[i] = float(i * 37 % 101 - 50) / 50, b[i] = float(i * 53 % 97 - 48) / 48;
  std::vector<float> c(64 * 64), right(64 * 64);
  for (int i = 0; i < 64 * 64; i++)
    for (int k = 0; k < K; k++) right[i] += float(a[i / 64 * K + k]) * float(b[i % 64 * K + k]);
  CUtensorMap maps[2];
  for (int i = 0; i < 2; i++)
    if (tensor_map(maps[i], i ? b.data() : a.data(), Type::bfloat16, {K, 64}, {K * 2}, {64, 64})) return 1;
  for (int mistake = 0; mistake < MISTAKES; mistake++) {
    int found = 0;
    for (int run = 0; run < RUNS; run++) {
      const bool failed = launch_kernel({1, 256, shared_bytes<Shared>}, nullptr, multiply, maps[0], maps[1], c.data(), mistake);
      bool wrong = false;
      for (int i = 0; i < 64 * 64; i++) wrong |= !(std::fabs(c[i] - right[i]) < 1e-3f);
      found += failed || wrong;
    }
    std::printf("%d %d\n", mistake, found);
  }
}
