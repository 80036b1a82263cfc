// Schemas, checks of arguments and dispatch, against PyTorch's stable ABI. No logic: that is in the kernels' files.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"

// A PyTorch built without CUDA lacks it. Weak, so that the library loads there, where checks and fakes are tested.
#pragma weak aoti_torch_get_current_cuda_stream

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void check(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

#ifdef PHI4RV_EMULATED

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
bool on_device(const Tensor& x) { return x.is_cpu(); }
cudaStream_t stream_of(const Tensor&) { return nullptr; }

#else

struct DeviceGuard : torch::stable::accelerator::DeviceGuard {
  explicit DeviceGuard(const Tensor& x) : torch::stable::accelerator::DeviceGuard(x.get_device_index()) {}
};
bool on_device(const Tensor& x) { return x.is_cuda(); }

// The stream that PyTorch works on; a launch on stream 0 would run beside what it depends on.
cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
  return static_cast<cudaStream_t>(stream);
}

#endif

int multiprocessors(const Tensor& x) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index()), "multiprocessors");
  return count;
}

phi4rv::Type short_float(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, name,
                  " must be bfloat16 or float16");
  return x.scalar_type() == ScalarType::BFloat16 ? phi4rv::Type::bfloat16 : phi4rv::Type::float16;
}

// Of a single row it may be anything.
int64_t row_stride(const Tensor& x) { return x.size(0) > 1 ? x.stride(0) : x.size(1) * x.size(2); }

// A (rows, heads, channels) view whose rows may lie apart: what the copy engine can read.
void check_heads(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must be (tokens, heads, head_dim)");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must have the dtype of q");
  STD_TORCH_CHECK(x.size(0) == like.size(0) && x.size(2) == like.size(2), name, " must have q's tokens and head_dim");
  STD_TORCH_CHECK(x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2)), name,
                  ": the heads of a row must follow each other");
  STD_TORCH_CHECK(row_stride(x) % 8 == 0, name, ": rows must start at multiples of 8 elements");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, " must start at a multiple of 16 bytes");
}

std::tuple<Tensor, Tensor> packed_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t max_seqlen, bool causal) {
  phi4rv::AttentionForward f{};
  f.type = short_float(q, "packed_attention: q");
  check_heads(q, q, "packed_attention: q");
  check_heads(k, q, "packed_attention: k");
  check_heads(v, q, "packed_attention: v");
  f.tokens = q.size(0), f.heads = q.size(1), f.head_dim = q.size(2), f.kv_heads = k.size(1);
  STD_TORCH_CHECK(f.head_dim == 64 || f.head_dim == 72 || f.head_dim == 80 || f.head_dim == 128,
                  "packed_attention: head_dim is ", f.head_dim, ", must be 64, 72, 80 or 128");
  STD_TORCH_CHECK(f.kv_heads > 0 && f.heads % f.kv_heads == 0 && v.size(1) == f.kv_heads,
                  "packed_attention: q's heads must be a multiple of those of k and v, which must be equal");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.is_contiguous() &&
                      cu_seqlens.scalar_type() == ScalarType::Int,
                  "packed_attention: cu_seqlens must be (documents + 1) int32");
  STD_TORCH_CHECK(on_device(q) && k.get_device_index() == q.get_device_index() &&
                      v.get_device_index() == q.get_device_index() &&
                      cu_seqlens.get_device_index() == q.get_device_index(),
                  "packed_attention: q, k, v and cu_seqlens must be on one CUDA device");
  f.documents = cu_seqlens.size(0) - 1;
  f.q_stride = row_stride(q), f.k_stride = row_stride(k), f.v_stride = row_stride(v);
  STD_TORCH_CHECK(max_seqlen > 0 || q.size(0) == 0, "packed_attention: max_seqlen is ", max_seqlen,
                  ", must be the longest document's length or more");
  f.max_seqlen = max_seqlen, f.causal = causal;
  f.scale = 1.0f / std::sqrt(float(f.head_dim));
  const DeviceGuard guard(q);
  f.multiprocessors = multiprocessors(q);
  Tensor out = torch::stable::new_empty(q, {f.tokens, f.heads, f.head_dim});
  Tensor lse = torch::stable::new_empty(q, {f.heads, f.tokens}, ScalarType::Float);
  if (f.tokens == 0 || f.documents == 0) return {out, lse};
  const int slots = phi4rv::schedule_bound(f);
  Tensor schedule = torch::stable::new_empty(q, {2 + 2 * slots}, ScalarType::Int);
  f.q = q.data_ptr(), f.k = k.data_ptr(), f.v = v.data_ptr(), f.out = out.data_ptr();
  f.lse = static_cast<float*>(lse.data_ptr());
  f.cu_seqlens = static_cast<const int*>(cu_seqlens.data_ptr()), f.schedule = static_cast<int*>(schedule.data_ptr());
  check(phi4rv::attention_forward(f, stream_of(q)), "packed_attention");
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& cu_seqlens, int64_t max_seqlen, bool causal) {
  phi4rv::AttentionBackward b{};
  b.type = short_float(q, "packed_attention_backward: q");
  check_heads(q, q, "packed_attention_backward: q");
  check_heads(k, q, "packed_attention_backward: k");
  check_heads(v, q, "packed_attention_backward: v");
  check_heads(dout, q, "packed_attention_backward: dout");
  check_heads(out, q, "packed_attention_backward: out");
  b.tokens = q.size(0), b.heads = q.size(1), b.head_dim = q.size(2), b.kv_heads = k.size(1);
  STD_TORCH_CHECK(b.head_dim == 64 || b.head_dim == 72 || b.head_dim == 80 || b.head_dim == 128,
                  "packed_attention_backward: head_dim is ", b.head_dim, ", must be 64, 72, 80 or 128");
  STD_TORCH_CHECK(b.kv_heads > 0 && b.heads % b.kv_heads == 0 && v.size(1) == b.kv_heads,
                  "packed_attention_backward: q's heads must be a multiple of those of k and v, which must be equal");
  STD_TORCH_CHECK(dout.size(1) == b.heads && out.size(1) == b.heads && out.is_contiguous(),
                  "packed_attention_backward: dout and out must have q's heads, and out be contiguous");
  STD_TORCH_CHECK(lse.dim() == 2 && lse.size(0) == b.heads && lse.size(1) == b.tokens && lse.is_contiguous() &&
                      lse.scalar_type() == ScalarType::Float,
                  "packed_attention_backward: lse must be (heads, tokens) float32, contiguous");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.is_contiguous() &&
                      cu_seqlens.scalar_type() == ScalarType::Int,
                  "packed_attention_backward: cu_seqlens must be (documents + 1) int32");
  bool together = on_device(q);
  for (const Tensor* x : {&dout, &k, &v, &out, &lse, &cu_seqlens})
    together = together && on_device(*x) && x->get_device_index() == q.get_device_index();
  STD_TORCH_CHECK(together, "packed_attention_backward: all tensors must be on one CUDA device");
  b.documents = cu_seqlens.size(0) - 1;
  b.dout_stride = row_stride(dout), b.q_stride = row_stride(q), b.k_stride = row_stride(k), b.v_stride = row_stride(v);
  STD_TORCH_CHECK(max_seqlen > 0 || q.size(0) == 0, "packed_attention_backward: max_seqlen is ", max_seqlen,
                  ", must be the longest document's length or more");
  b.max_seqlen = max_seqlen, b.causal = causal;
  b.scale = 1.0f / std::sqrt(float(b.head_dim));
  const DeviceGuard guard(q);
  b.multiprocessors = multiprocessors(q);
  Tensor dq = torch::stable::new_empty(q, {b.tokens, b.heads, b.head_dim});
  Tensor dk = torch::stable::new_empty(q, {b.tokens, b.kv_heads, b.head_dim});
  Tensor dv = torch::stable::new_empty(q, {b.tokens, b.kv_heads, b.head_dim});
  if (b.tokens == 0 || b.documents == 0) return {dq, dk, dv};
  Tensor schedule = torch::stable::new_empty(q, {2 + 2 * schedule_bound(b)}, ScalarType::Int);
  Tensor rows = torch::stable::new_empty(q, {b.heads, row_tiles(b), 4, 64}, ScalarType::Float);
  Tensor bounds = torch::stable::new_zeros(q, {b.documents, b.kv_heads, b.head_dim + 1}, ScalarType::Int);
  Tensor sums = torch::stable::new_empty(q, {b.heads, b.tokens, b.head_dim}, ScalarType::Int);
  b.dout = dout.data_ptr(), b.q = q.data_ptr(), b.k = k.data_ptr(), b.v = v.data_ptr(), b.out = out.data_ptr();
  b.lse = static_cast<const float*>(lse.data_ptr());
  b.dq = dq.data_ptr(), b.dk = dk.data_ptr(), b.dv = dv.data_ptr();
  b.cu_seqlens = static_cast<const int*>(cu_seqlens.data_ptr()), b.schedule = static_cast<int*>(schedule.data_ptr());
  b.rows = static_cast<float*>(rows.data_ptr()), b.bounds = static_cast<uint32_t*>(bounds.data_ptr());
  b.sums = static_cast<int32_t*>(sums.data_ptr());
  check(phi4rv::attention_backward(b, stream_of(q)), "packed_attention_backward");
  return {dq, dk, dv};
}

bool on(const Tensor& t, const Tensor& like) { return t.get_device_index() == like.get_device_index(); }

void check_matrix(const Tensor& t, const Tensor& like, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(), name, " must be (", rows,
                  ", ", columns, "), adjacent");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(on(t, like), name, " must be on the device of x");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name, " must start at a multiple of 16 bytes");
}

// By dtype and shape, as phi4rv/ops/cuda.py gives it.
phi4rv::Weight weight_of(const Tensor& w) {
  if (w.dim() == 3)
    return w.size(2) == phi4rv::group_bytes(phi4rv::Weight::int4) ? phi4rv::Weight::int4 : phi4rv::Weight::int4_zero;
  if (w.scalar_type() == ScalarType::Char) return phi4rv::Weight::int8;
  return w.scalar_type() == ScalarType::Byte ? phi4rv::Weight::float8 : phi4rv::Weight::full;
}

Tensor decode_gemv(
    const Tensor& x, const Tensor& w, const std::optional<Tensor>& scales, const std::optional<Tensor>& norm,
    double eps, const std::optional<Tensor>& residual, bool swiglu) {
  phi4rv::DecodeGemv g{};
  g.type = short_float(x, "decode_gemv: x");
  STD_TORCH_CHECK(x.dim() == 2 && (w.dim() == 2 || w.dim() == 3), "decode_gemv: x must be (rows, k) and w (n, k)");
  g.weight = weight_of(w);
  const bool by_row = g.weight == phi4rv::Weight::int8 || g.weight == phi4rv::Weight::float8;
  g.rows = x.size(0), g.k = x.size(1), g.n = w.size(0) * (grouped(g.weight) ? 8 : 1), g.eps = eps, g.swiglu = swiglu;
  STD_TORCH_CHECK(g.rows >= 1 && g.rows <= 8, "decode_gemv: x has ", g.rows, " rows, must have 1 to 8");
  STD_TORCH_CHECK(g.k > 0 && g.k % 32 == 0, "decode_gemv: k is ", g.k, ", must be a multiple of 32");
  STD_TORCH_CHECK(g.n > 0 && g.n % (swiglu ? 16 : 8) == 0, "decode_gemv: n is ", g.n, ", must be a multiple of ",
                  swiglu ? 16 : 8);
  const int out = swiglu ? g.n / 2 : g.n;
  check_matrix(x, x, g.rows, g.k, "decode_gemv: x");
  if (g.weight == phi4rv::Weight::full) {
    check_matrix(w, x, g.n, g.k, "decode_gemv: w");
  } else if (by_row) {
    check_matrix(w, w, g.n, g.k, "decode_gemv: w");
  } else {
    const int groups = (g.k + 127) / 128;
    STD_TORCH_CHECK(w.scalar_type() == ScalarType::Byte && w.size(1) == groups &&
                        w.size(2) == phi4rv::group_bytes(g.weight) && w.is_contiguous() &&
                        reinterpret_cast<uintptr_t>(w.data_ptr()) % 16 == 0,
                    "decode_gemv: w must be (n / 8, ", groups, ", 528 or 544) uint8, as cuda.repack makes it");
  }
  STD_TORCH_CHECK(on(w, x), "decode_gemv: w must be on the device of x");
  STD_TORCH_CHECK(scales.has_value() == by_row, "decode_gemv: scales are for an int8 or fp8 w, which needs them");
  if (scales)
    STD_TORCH_CHECK(scales->dim() == 1 && scales->size(0) == g.n && scales->is_contiguous() &&
                        scales->scalar_type() == ScalarType::Float && on(*scales, x),
                    "decode_gemv: scales must be (", g.n, ") float32, on the device of x");
  if (norm) {
    STD_TORCH_CHECK(norm->dim() == 1 && norm->size(0) == g.k && norm->is_contiguous() &&
                        norm->scalar_type() == x.scalar_type() && on(*norm, x) &&
                        reinterpret_cast<uintptr_t>(norm->data_ptr()) % 16 == 0,
                    "decode_gemv: norm must be (", g.k, "), of the dtype and on the device of x, at 16 bytes");
    STD_TORCH_CHECK(phi4rv::staged_elements(g.rows, g.k, true) <= phi4rv::MOST_STAGED, "decode_gemv: norm of ", g.rows,
                    " rows of ", g.k, ": k + rows (k + 8) must be at most ", phi4rv::MOST_STAGED);
  }
  if (residual) check_matrix(*residual, x, g.rows, out, "decode_gemv: residual");
  STD_TORCH_CHECK(on_device(x), "decode_gemv: x must be on a CUDA device");
  const DeviceGuard guard(x);
  g.multiprocessors = multiprocessors(x);
  Tensor y = torch::stable::new_empty(x, {g.rows, out});
  g.x = x.data_ptr(), g.w = w.data_ptr(), g.y = y.data_ptr();
  g.scales = scales ? static_cast<const float*>(scales->data_ptr()) : nullptr;
  g.norm = norm ? norm->data_ptr() : nullptr, g.residual = residual ? residual->data_ptr() : nullptr;
  check(phi4rv::decode_gemv(g, stream_of(x)), "decode_gemv");
  return y;
}

phi4rv::Integers integers(const Tensor& x, const Tensor& q, const char* name) {
  const int words = x.element_size() / 4;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int || x.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
  STD_TORCH_CHECK(x.get_device_index() == q.get_device_index(), name, " must be on the device of q");
  return {static_cast<const int*>(x.data_ptr()), x.stride(-1) * words};
}

// k or v, whose last two dimensions are (heads, head_dim): rows anywhere, whole copies of 16 bytes.
void check_cache(const Tensor& x, const Tensor& q, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must have the dtype of k");
  STD_TORCH_CHECK(x.dim() == like.dim() && x.size(-1) == q.size(3), name, " must have k's dimensions and q's head_dim");
  STD_TORCH_CHECK(x.get_device_index() == q.get_device_index(), name, " must be on the device of q");
  STD_TORCH_CHECK(x.stride(-1) == 1, name, ": channels must be adjacent in memory");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, " must start at a multiple of 16 bytes");
  for (int i = 0; i < x.dim(); i++) {
    STD_TORCH_CHECK(x.size(i) == like.size(i), name, " must have the shape of k");
    const int64_t bytes = x.stride(i) * x.element_size();
    STD_TORCH_CHECK(i == x.dim() - 1 || x.size(i) == 1 || bytes % 16 == 0, name,
                    ": heads and rows must lie multiples of 16 bytes apart");
  }
}

std::tuple<const float*, int> scale_of(const std::optional<Tensor>& x, const Tensor& q, int heads, const char* name) {
  if (!x) return {nullptr, 0};
  const bool fits = x->dim() == 0 || (x->dim() == 1 && x->size(0) == heads);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && fits, name,
                  " must be float32, a scalar or one for each of ", heads, " key heads");
  STD_TORCH_CHECK(x->get_device_index() == q.get_device_index(), name, " must be on the device of q");
  return {static_cast<const float*>(x->data_ptr()), x->dim() ? x->stride(0) : 0};
}

// With ``pages`` k and v are (pages, page size, heads, head_dim), else (rows, heads, head_dim) from ``starts`` on.
Tensor decode(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* starts, const Tensor* pages, const Tensor& lengths,
    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  phi4rv::DecodeAttention a{};
  a.type = short_float(q, "decode_attention: q");
  STD_TORCH_CHECK(q.dim() == 4, "decode_attention: q must be (documents, tokens, heads, head_dim)");
  a.documents = q.size(0), a.tokens = q.size(1), a.heads = q.size(2), a.head_dim = q.size(3);
  STD_TORCH_CHECK(q.stride(3) == 1, "decode_attention: the channels of q must be adjacent in memory");
  STD_TORCH_CHECK(k.dim() == (pages ? 4 : 3), "decode_attention: k must be (", pages ? "pages, page size" : "rows",
                  ", key heads, head_dim)");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() || k.scalar_type() == ScalarType::Float8_e4m3fn,
                  "decode_attention: k must have the dtype of q, or float8_e4m3fn");
  a.stored = k.scalar_type() == q.scalar_type() ? a.type : phi4rv::Type::float8;
  check_cache(k, q, k, "decode_attention: k");
  check_cache(v, q, k, "decode_attention: v");
  STD_TORCH_CHECK(a.head_dim == 64 || (a.head_dim == 72 && a.stored == a.type) || a.head_dim == 80 || a.head_dim == 128,
                  "decode_attention: head_dim is ", a.head_dim, ", must be 64, 72 (not with float8), 80 or 128");
  a.kv_heads = k.size(-2);
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0,
                  "decode_attention: q has ", a.heads, " heads, must be a multiple of k's ", a.kv_heads);
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == a.documents,
                  "decode_attention: lengths must be (documents)");
  a.lengths = integers(lengths, q, "decode_attention: lengths");
  if (starts) {
    STD_TORCH_CHECK(starts->dim() == 1 && starts->size(0) == a.documents,
                    "decode_attention: starts must be (documents)");
    a.starts = integers(*starts, q, "decode_attention: starts");
  }
  if (pages) {
    STD_TORCH_CHECK(pages->dim() == 2 && pages->size(0) == a.documents,
                    "decode_attention: page_table must be (documents, most pages)");
    STD_TORCH_CHECK(k.size(1) > 0, "decode_attention: k has pages of no rows");
    a.pages = integers(*pages, q, "decode_attention: page_table"), a.pages_document = pages->stride(0) * (pages->element_size() / 4);
    a.page_size = k.size(1), a.k_page = k.stride(0), a.v_page = v.stride(0);
  }
  a.most_keys = pages ? pages->size(1) * k.size(1) : k.size(0);
  a.q_document = q.stride(0), a.q_token = q.stride(1), a.q_head = q.stride(2);
  a.k_row = k.stride(-3), a.k_head = k.stride(-2), a.v_row = v.stride(-3), a.v_head = v.stride(-2);
  std::tie(a.k_scale, a.k_scale_head) = scale_of(k_scale, q, a.kv_heads, "decode_attention: k_scale");
  std::tie(a.v_scale, a.v_scale_head) = scale_of(v_scale, q, a.kv_heads, "decode_attention: v_scale");
  STD_TORCH_CHECK(on_device(q), "decode_attention: q must be on a CUDA device");
  const DeviceGuard guard(q);
  a.multiprocessors = multiprocessors(q), a.scale = 1.0f / std::sqrt(float(a.head_dim));
  Tensor out = torch::stable::new_empty(q, {a.documents, a.tokens, a.heads, a.head_dim});
  if (out.numel() == 0) return out;
  const int64_t rows = int64_t(phi4rv::decode_blocks(a)) * phi4rv::decode_kept(a);
  Tensor partial = torch::stable::new_empty(q, {rows, a.head_dim}, ScalarType::Float);
  Tensor levels = torch::stable::new_empty(q, {rows, 2}, ScalarType::Float);
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr(), a.out = out.data_ptr();
  a.partial = static_cast<float*>(partial.data_ptr()), a.levels = static_cast<float*>(levels.data_ptr());
  check(phi4rv::decode_attention(a, stream_of(q)), "decode_attention");
  return out;
}

Tensor decode_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, const Tensor& lengths,
    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  return decode(q, k, v, &starts, nullptr, lengths, k_scale, v_scale);
}

Tensor paged_decode_attention(
    const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_table, const Tensor& lengths,
    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  return decode(q, k_pages, v_pages, nullptr, &page_table, lengths, k_scale, v_scale);
}

void check_vector(const Tensor& t, const Tensor& like, int64_t size, ScalarType type, const std::string& name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.is_contiguous(), name, " must be (", size, "), adjacent");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must have the dtype of x (scales: float32)");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), name, " must be on the device of x");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name, " must start at a multiple of 16 bytes");
}

// What the copy engine and 16-byte loads can read.
void check_rows(const Tensor& x, const std::string& name) {
  STD_TORCH_CHECK(x.dim() == 2, name, " has ", x.dim(), " dimensions, must have 2");
  const bool apart = x.size(0) <= 1 || (x.stride(0) % 8 == 0 && x.stride(0) >= x.size(1));
  STD_TORCH_CHECK(x.stride(1) == 1 && apart, name,
                  ": columns must be adjacent, rows must start at multiples of 8 elements and not overlap");
  STD_TORCH_CHECK(x.size(0) < 1 << 30, name, " has ", x.size(0), " rows, must have fewer than 2^30");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, " must start at a multiple of 16 bytes");
}

// A linear layer: w (n, k) in the dtype of x, or float8 with the scales of its rows.
struct Layer {
  const Tensor &w, &bias;
  const Tensor* scales = nullptr;
};

void check_layer(const Layer& l, const Tensor& x, int64_t k, const std::string& name, char which) {
  const std::string w = name + ": w" + which;
  STD_TORCH_CHECK(l.w.dim() == 2 && l.w.size(1) == k, w, " must be (…, ", k, ")");
  STD_TORCH_CHECK(l.w.is_contiguous(), w, ": elements must be adjacent");
  const bool typed = l.w.scalar_type() == (l.scales ? ScalarType::Float8_e4m3fn : x.scalar_type());
  STD_TORCH_CHECK(typed, w, l.scales ? " must be float8_e4m3fn" : " must have the dtype of x");
  STD_TORCH_CHECK(l.w.get_device_index() == x.get_device_index(), w, " must be on the device of x");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(l.w.data_ptr()) % 16 == 0, w, " must start at a multiple of 16 bytes");
  const int multiple = l.scales ? 16 : 8;
  STD_TORCH_CHECK(k > 0 && k % multiple == 0, w, " has ", k, " columns, must have a positive multiple of ", multiple);
  STD_TORCH_CHECK(
      l.w.size(0) > 0 && l.w.size(0) % 8 == 0, w, " has ", l.w.size(0), " rows, must have a positive multiple of 8");
  check_vector(l.bias, x, l.w.size(0), x.scalar_type(), name + ": b" + which);
  if (l.scales) check_vector(*l.scales, x, l.w.size(0), ScalarType::Float, name + ": the scales of w" + which);
}

// out = x w^T + bias, or GELU of it; row i to row index[i] of out. float8: x is rounded first.
void linear(const Tensor& x, const Layer& l, bool gelu, const Tensor* index, const Tensor& out) {
  phi4rv::Gemm g{};
  g.m = x.size(0), g.n = l.w.size(0), g.k = x.size(1);
  g.a = x.data_ptr(), g.a_stride = g.m > 1 ? x.stride(0) : g.k, g.b = l.w.data_ptr();
  g.bias = l.bias.data_ptr(), g.out = out.data_ptr();
  g.index = index ? static_cast<const int64_t*>(index->data_ptr()) : nullptr;
  g.gelu = gelu, g.multiprocessors = multiprocessors(x);
  g.type = g.out_type = x.scalar_type() == ScalarType::BFloat16 ? phi4rv::Type::bfloat16 : phi4rv::Type::float16;
  if (!l.scales) return check(phi4rv::gemm(g, stream_of(x)), "linear");
  const Tensor rounded = torch::stable::new_empty(x, {g.m, g.k}, ScalarType::Float8_e4m3fn);
  const Tensor scales = torch::stable::new_empty(x, {g.m}, ScalarType::Float);
  phi4rv::QuantizeRows q{};
  q.x = x.data_ptr(), q.out = rounded.data_ptr(), q.scales = static_cast<float*>(scales.data_ptr());
  q.stride = g.a_stride, q.rows = g.m, q.columns = g.k, q.type = g.out_type;
  check(phi4rv::quantize_rows(q, stream_of(x)), "quantize_rows");
  g.type = phi4rv::Type::float8, g.a = q.out, g.a_stride = g.k, g.a_scales = q.scales;
  g.b_scales = static_cast<const float*>(l.scales->data_ptr());
  check(phi4rv::gemm(g, stream_of(x)), "linear");
}

// A copy of row whose rows in index are still to be written.
Tensor copy_others(const Tensor& row, const Tensor& index) {
  Tensor out = torch::stable::new_empty(row, {row.size(0), row.size(1)});
  if (row.size(0) == 0) return out;
  Tensor covered = torch::stable::new_empty(row, {row.size(0)}, ScalarType::Byte);
  torch::stable::zero_(covered);
  phi4rv::CopyRows c{};
  c.from = row.data_ptr(), c.to = out.data_ptr(), c.index = static_cast<const int64_t*>(index.data_ptr());
  c.covered = static_cast<uint8_t*>(covered.data_ptr());
  c.from_stride = row.stride(0) * 2, c.rows = row.size(0), c.indices = index.size(0), c.bytes = row.size(1) * 2;
  check(phi4rv::copy_rows(c, stream_of(row)), "copy_rows");
  return out;
}

Tensor project(
    const std::string& name, const Tensor& x, const Layer& first, const Layer& second, const Tensor* row = nullptr,
    const Tensor* index = nullptr) {
  short_float(x, (name + ": x").c_str());
  check_rows(x, name + ": x");
  check_layer(first, x, x.size(1), name, '0');
  check_layer(second, x, first.w.size(0), name, '1');
  const int64_t columns = second.w.size(0);
  if (row) {
    check_rows(*row, name + ": row");
    STD_TORCH_CHECK(row->size(1) == columns, name, ": row must be (…, ", columns, ")");
    STD_TORCH_CHECK(row->scalar_type() == x.scalar_type(), name, ": row must have the dtype of x");
    STD_TORCH_CHECK(index->dim() == 1 && index->size(0) == x.size(0) && index->is_contiguous() &&
                        index->scalar_type() == ScalarType::Long,
                    name, ": index must be (", x.size(0), ") int64, adjacent");
    const int device = x.get_device_index();
    STD_TORCH_CHECK(row->get_device_index() == device && index->get_device_index() == device, name,
                    ": row and index must be on the device of x");
  }
  STD_TORCH_CHECK(on_device(x), name, ": x must be on a CUDA device");
  const DeviceGuard guard(x);
  const Tensor out = row ? copy_others(*row, *index) : torch::stable::new_empty(x, {x.size(0), columns});
  if (x.size(0) == 0) return out;
  const Tensor h = torch::stable::new_empty(x, {x.size(0), first.w.size(0)});
  linear(x, first, true, nullptr, h);
  linear(h, second, false, index, out);
  return out;
}

Tensor projector(const Tensor& x, const Tensor& w0, const Tensor& b0, const Tensor& w1, const Tensor& b1) {
  return project("projector", x, {w0, b0}, {w1, b1});
}

Tensor project_into(
    const Tensor& row, const Tensor& x, const Tensor& w0, const Tensor& b0, const Tensor& w1, const Tensor& b1,
    const Tensor& index) {
  return project("project_into", x, {w0, b0}, {w1, b1}, &row, &index);
}

Tensor quantized_projector(
    const Tensor& x, const Tensor& w0, const Tensor& s0, const Tensor& b0, const Tensor& w1, const Tensor& s1,
    const Tensor& b1) {
  return project("quantized_projector", x, {w0, b0, &s0}, {w1, b1, &s1});
}

}  // namespace

STABLE_TORCH_LIBRARY(phi4rv_cuda, m) {
  m.def("packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, bool causal) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
      "int max_seqlen, bool causal) -> (Tensor, Tensor, Tensor)");
  m.def(
      "decode_gemv(Tensor x, Tensor w, Tensor? scales, Tensor? norm, float eps, Tensor? residual, bool swiglu) -> "
      "Tensor");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor lengths, Tensor? k_scale, Tensor? v_scale) "
      "-> Tensor");
  m.def(
      "paged_decode_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths, "
      "Tensor? k_scale, Tensor? v_scale) -> Tensor");
  m.def("projector(Tensor x, Tensor w0, Tensor b0, Tensor w1, Tensor b1) -> Tensor");
  m.def("project_into(Tensor row, Tensor x, Tensor w0, Tensor b0, Tensor w1, Tensor b1, Tensor index) -> Tensor");
  m.def(
      "quantized_projector(Tensor x, Tensor w0, Tensor s0, Tensor b0, Tensor w1, Tensor s1, Tensor b1) -> Tensor");
}

// On a CPU too, where every call ends at a check unless the library is the emulated one.
#define IMPLEMENTATIONS(m)                                                    \
  m.impl("packed_attention", TORCH_BOX(&packed_attention));                   \
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward)); \
  m.impl("decode_attention", TORCH_BOX(&decode_attention));                   \
  m.impl("paged_decode_attention", TORCH_BOX(&paged_decode_attention));       \
  m.impl("decode_gemv", TORCH_BOX(&decode_gemv));                             \
  m.impl("projector", TORCH_BOX(&projector));                                 \
  m.impl("project_into", TORCH_BOX(&project_into));                           \
  m.impl("quantized_projector", TORCH_BOX(&quantized_projector));

STABLE_TORCH_LIBRARY_IMPL(phi4rv_cuda, CPU, m) { IMPLEMENTATIONS(m) }
#ifndef PHI4RV_EMULATED
STABLE_TORCH_LIBRARY_IMPL(phi4rv_cuda, CUDA, m) { IMPLEMENTATIONS(m) }
#endif
