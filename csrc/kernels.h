// What the bindings launch: one function a kernel, on raw pointers, without PyTorch's headers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace phi4rv {

enum class Type { bfloat16, float16, float8, float32 };  // float8: e4m3

constexpr int bytes_of(Type type) { return type == Type::float8 ? 1 : type == Type::float32 ? 4 : 2; }

// Query rows that one block works on, by head dim: as many warpgroups of 64 as registers allow.
constexpr int attention_rows(int head_dim) { return head_dim > 72 ? 128 : 192; }

// softmax(q k^T scale) v inside each document of a packed row. Strides are between rows, in elements; a row's heads
// follow each other. head_dim 64, 72, 80 or 128; pointers and strides in multiples of 16 bytes.
struct AttentionForward {
  const void *q, *k, *v;  // (tokens, heads, head_dim), (tokens, kv_heads, head_dim) twice
  void* out;              // (tokens, heads, head_dim), contiguous
  float* lse;             // (heads, tokens)
  const int* cu_seqlens;  // (documents + 1)
  int* schedule;          // 2 + 2 schedule_bound, written here
  int64_t q_stride, k_stride, v_stride;
  int tokens, documents, max_seqlen, heads, kv_heads, head_dim;
  int multiprocessors;
  float scale;
  bool causal;
  Type type;
};

// Tiles that there are at most, known without reading the offsets.
constexpr int schedule_bound(const AttentionForward& f) {
  const int rows = attention_rows(f.head_dim);
  const int64_t by_length = int64_t(f.documents) * ((f.max_seqlen + rows - 1) / rows), by_rows = f.tokens / rows + f.documents;
  return int(by_length < by_rows ? by_length : by_rows);
}

cudaError_t attention_forward(const AttentionForward& arguments, cudaStream_t stream);

// The gradients of softmax(q k^T scale) v. As above; dq, dk and dv are contiguous and written whole. The rest is room
// to work in: see attention_backward.h for how it is laid out.
struct AttentionBackward {
  const void *dout, *q, *k, *v, *out;  // out: contiguous
  const float* lse;
  void *dq, *dk, *dv;
  const int* cu_seqlens;
  int* schedule;     // 2 + 2 schedule_bound
  float* rows;       // (heads, row_tiles, 4, 64), at a multiple of 16 bytes
  uint32_t* bounds;  // (documents, kv_heads, head_dim + 1), zeros
  int32_t* sums;     // (heads, tokens, head_dim), at a multiple of 16 bytes
  int64_t dout_stride, q_stride, k_stride, v_stride;
  int tokens, documents, max_seqlen, heads, kv_heads, head_dim;
  int multiprocessors;
  float scale;
  bool causal;
  Type type;
};

constexpr int ATTENTION_BACKWARD_KEYS = 128;  // keys that one block works on

constexpr int schedule_bound(const AttentionBackward& b) {
  const int64_t rows = ATTENTION_BACKWARD_KEYS, by_length = int64_t(b.documents) * ((b.max_seqlen + rows - 1) / rows);
  const int64_t by_rows = b.tokens / rows + b.documents;
  return int(by_length < by_rows ? by_length : by_rows);
}

// Places for tiles of 64 query rows of each document.
__host__ __device__ constexpr int row_tiles(const AttentionBackward& b) { return b.tokens / 64 + b.documents; }

cudaError_t attention_backward(const AttentionBackward& arguments, cudaStream_t stream);

// How the weight of decode_gemv is kept: full is in x's type, the others as phi4rv/ops/low_precision.py has them.
enum class Weight { full, int8, float8, int4, int4_zero };

constexpr bool grouped(Weight w) { return w == Weight::int4 || w == Weight::int4_zero; }
// Bytes of 8 rows' codes of one group of 128 columns, with their scales and zeros (phi4rv/ops/cuda.py, repack).
constexpr int group_bytes(Weight w) { return w == Weight::int4_zero ? 544 : 528; }

// y = f(norm(x) w^T) + residual for 1 to 8 rows. norm: RMSNorm with this weight, or null for none. f: silu(gate) up of the
// two halves of w's rows if swiglu, else nothing. residual: null for none. k a multiple of 32, n of 8 (of 16 with swiglu).
// w and norm are read before the kernel in front has ended: it may not be what writes them.
struct DecodeGemv {
  const void* x;           // (rows, k)
  const void* w;           // (n, k), or groups (n / 8, k / 128 rounded up, group_bytes)
  const float* scales;     // (n) of int8 and float8
  const void* norm;        // (k)
  const void* residual;    // as y
  void* y;                 // (rows, n), or (rows, n / 2) with swiglu
  int rows, n, k;
  int multiprocessors;
  float eps;
  bool swiglu;
  Weight weight;
  Type type;
};

// What a block may keep in shared memory, in elements: rows of x and the norm's weight.
constexpr int MOST_STAGED = 65536;
constexpr int64_t staged_elements(int rows, int k, bool norm) { return int64_t(rows) * (k + 8) + (norm ? k : 0); }

cudaError_t decode_gemv(const DecodeGemv& arguments, cudaStream_t stream);

// A vector of int32, or of int64 that fit: their low halves.
struct Integers {
  const int* data;
  int64_t stride;
};

// New tokens against a cache: softmax(q k^T scale) v, where token m of ``tokens`` sees its document's first
// length - tokens + m + 1 rows; zeros for a document of length 0. Strides in elements; those of k and v and their
// pointers in multiples of 16 bytes. head_dim 64, 72 (not float8), 80 or 128. stored: as type, or float8.
struct DecodeAttention {
  const void* q;     // (documents, tokens, heads, head_dim), channels adjacent
  const void *k, *v; // (rows, kv_heads, head_dim), or with pages (pages, page_size, kv_heads, head_dim)
  void* out;         // as q, contiguous
  const float *k_scale, *v_scale;  // null, one (stride 0) or one for each of kv_heads
  float* partial;    // (decode_blocks, decode_kept, head_dim), at a multiple of 16 bytes
  float* levels;     // (decode_blocks, decode_kept, 2): highest exponent and sum
  Integers lengths, starts, pages;  // (documents) twice; pages: (documents, most pages)
  int64_t pages_document;           // from a document's pages to the next one's
  int64_t q_document, q_token, q_head;
  int64_t k_page, k_row, k_head, v_page, v_row, v_head;
  int k_scale_head, v_scale_head;
  int page_size;  // 0: no pages
  int64_t most_keys;  // of a document, as far as shapes tell
  int documents, tokens, heads, kv_heads, head_dim;
  int multiprocessors;
  float scale;
  Type type, stored;
};

constexpr int DECODE_WARPS = 4, DECODE_RESIDENT = 2;  // of a block; blocks a multiprocessor
constexpr int DECODE_KEYS = 16;                       // of a warp's step; parts begin at multiples of it

// A block's rows: query heads of one key head, times tokens. Blocks are units times slots for parts of documents: twice
// as many as documents, and whole waves.
constexpr int decode_rows(const DecodeAttention& a) {
  return a.tokens * (a.heads / a.kv_heads) > 16 ? 32 : 16;
}
constexpr int decode_tiles(const DecodeAttention& a) {
  return (a.tokens * (a.heads / a.kv_heads) + decode_rows(a) - 1) / decode_rows(a);
}
// Those of a block's rows that are there.
constexpr int decode_kept(const DecodeAttention& a) {
  const int rows = a.tokens * (a.heads / a.kv_heads);
  return rows < decode_rows(a) ? rows : decode_rows(a);
}
constexpr int decode_units(const DecodeAttention& a) { return a.kv_heads * decode_tiles(a); }
constexpr int decode_slots(const DecodeAttention& a) {
  const int units = decode_units(a), wave = DECODE_RESIDENT * a.multiprocessors;
  return (2 * a.documents * units + wave - 1) / wave * wave / units;
}
// Fewer blocks where no document has so many steps.
constexpr int decode_blocks(const DecodeAttention& a) {
  const int keys = DECODE_WARPS * DECODE_KEYS;
  const int64_t most = a.documents * int64_t((a.most_keys + keys - 1) / keys), slots = decode_slots(a);
  return int(slots < most ? slots : most) * decode_units(a);
}

cudaError_t decode_attention(const DecodeAttention& arguments, cudaStream_t stream);

// out = f(a b^T + bias), f the exact GELU or nothing; of float8, a b^T is multiplied by the scales of both rows.
// Pointers, strides and rows of a and b in multiples of 16 bytes, n a multiple of 8; m, n and k positive.
struct Gemm {
  const void *a, *b;       // (m, k), (n, k) of ``type``
  const float *a_scales, *b_scales;  // (m), (n), float8 only
  const void* bias;        // (n) as out
  const int64_t* index;    // (m): row i is written to row index[i] of out; null: to row i
  void* out;               // rows of n
  int64_t a_stride;        // between rows, in elements
  int m, n, k;
  int multiprocessors;
  bool gelu;
  Type type, out_type;
};

cudaError_t gemm(const Gemm& arguments, cudaStream_t stream);

// Each row divided by its largest magnitude / 448, its scale, and rounded to float8. Columns a multiple of 8.
struct QuantizeRows {
  const void* x;   // (rows, columns)
  void* out;       // (rows, columns) float8
  float* scales;   // (rows)
  int64_t stride;  // of x's rows, in elements
  int rows, columns;
  Type type;       // of x
};

cudaError_t quantize_rows(const QuantizeRows& arguments, cudaStream_t stream);

// Copies the rows that are not in ``index``. All in multiples of 16 bytes.
struct CopyRows {
  const void* from;      // (rows) of ``bytes``
  void* to;              // (rows) of ``bytes``, one after the other
  const int64_t* index;  // (indices)
  uint8_t* covered;      // (rows), zeros
  int64_t from_stride;   // in bytes
  int rows, indices, bytes;
};

cudaError_t copy_rows(const CopyRows& arguments, cudaStream_t stream);

}  // namespace phi4rv
