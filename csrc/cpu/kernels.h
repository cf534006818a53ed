// What the binding and the kernels agree on. Every kernel exists once per instruction set, in the
// namespace of that set (the build defines BERTFAST_ISA); the binding picks one Kernels at run
// time.
//
// Kernel sources keep everything else in anonymous namespaces and instantiate no library templates:
// a weak symbol compiled for AVX-512 could otherwise be the copy the linker keeps for everyone.
#pragma once

#include <cstdint>

namespace bertfast {

enum class Dtype : int { float32 = 0, bfloat16 = 1 };

// q and out are (queries, heads, head_dim), k and v (keys, heads, head_dim); elements of a head are
// neighbours, and the strides of tokens and heads are given. cu_seqlens may hold anything: it is
// read as the nearest numbers that never fall and stay inside the tensors.
struct AttentionForward {
  const void* q;
  const void* k;
  const void* v;
  void* out;                    // contiguous
  float* logsumexp;             // (heads, queries)
  const int32_t* cu_seqlens_q;  // (batch + 1)
  const int32_t* cu_seqlens_k;  // (batch + 1)
  const int64_t* seed;          // one element; null without dropout
  int64_t batch, queries, keys, heads, head_dim;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  float scale;
  bool causal;
  uint32_t threshold, site;
  Dtype dtype;
  int threads;
};

struct AttentionBackward {
  const void* dout;  // as out
  const void* q;
  const void* k;
  const void* v;
  const void* out;
  const float* logsumexp;  // (heads, queries)
  void* dq;                // as q, k and v, with strides of their own
  void* dk;
  void* dv;
  const int32_t* cu_seqlens_q;  // (batch + 1)
  const int32_t* cu_seqlens_k;  // (batch + 1)
  const int64_t* seed;          // one element; null without dropout
  int64_t batch, queries, keys, heads, head_dim;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  int64_t dq_token, dq_head, dk_token, dk_head, dv_token, dv_head;
  float scale;
  bool causal;
  uint32_t threshold, site;
  Dtype dtype;
  int threads;
};

// A label that is neither ignore_index nor a class counts as ignored.
struct CrossEntropyForward {
  const void* hidden;  // (tokens, columns)
  const void* weight;  // (vocabulary, columns), weight_dtype
  const void* bias;    // (vocabulary), bias_dtype, or null
  const void* labels;  // (tokens), int64, or int32 unless wide_labels
  float* loss;         // one element
  float* logsumexp;    // (tokens); 0 where there is no label
  int64_t tokens, columns, vocabulary, ignore_index;
  bool mean, wide_labels;
  Dtype dtype, weight_dtype, bias_dtype;
  int threads;
};

struct CrossEntropyBackward {
  const float* dloss;      // one element
  const void* hidden;      // (tokens, columns)
  const void* weight;      // (vocabulary, columns), weight_dtype
  const void* bias;        // (vocabulary), bias_dtype, or null
  const void* labels;      // (tokens), int64, or int32 unless wide_labels
  const float* logsumexp;  // (tokens)
  void* dhidden;           // (tokens, columns)
  void* dweight;           // (vocabulary, columns), weight_dtype
  void* dbias;             // (vocabulary), bias_dtype, or null
  int64_t tokens, columns, vocabulary, ignore_index;
  bool mean, wide_labels;
  Dtype dtype, weight_dtype, bias_dtype;
  int threads;
};

struct LayernormForward {
  const void* x;         // (rows, columns)
  const void* residual;  // (rows, columns) or null
  const void* weight;    // (columns), parameter_dtype
  const void* bias;      // (columns), parameter_dtype
  void* out;             // (rows, columns)
  void* total;           // (rows, columns): residual + dropout(x), or null: not kept
  float* statistics;     // (2, rows): mean, rstd
  const int64_t* seed;   // one element; null without dropout
  int64_t rows, columns;
  float eps;
  uint32_t threshold, site;
  Dtype dtype, parameter_dtype;
  int threads;
};

struct LayernormBackward {
  const void* dout;         // (rows, columns)
  const void* total;        // (rows, columns)
  const void* weight;       // (columns), parameter_dtype
  const float* statistics;  // (2, rows): mean, rstd
  void* dx;                 // (rows, columns)
  void* dresidual;          // (rows, columns), or null: the same as dx, or no residual
  void* dweight;            // (columns), parameter_dtype
  void* dbias;              // (columns), parameter_dtype
  float* partial;           // (blocks, 2, columns): each block's share of dweight and dbias
  const int64_t* seed;      // one element; null without dropout
  int64_t rows, columns, blocks;
  uint32_t threshold, site;
  Dtype dtype, parameter_dtype;
  int threads;
};

struct GeluForward {
  const void* x;     // (rows, columns)
  const void* bias;  // (columns), parameter_dtype, or null
  void* out;         // (rows, columns)
  int64_t rows, columns;
  bool tanh;
  Dtype dtype, parameter_dtype;
  int threads;
};

struct GeluBackward {
  const void* dout;  // (rows, columns)
  const void* x;     // (rows, columns)
  const void* bias;  // (columns), parameter_dtype, or null
  void* dx;          // (rows, columns)
  void* dbias;       // (columns), parameter_dtype, or null
  float* partial;    // (blocks, columns): each block's share of dbias; null without bias
  int64_t rows, columns, blocks;
  bool tanh;
  Dtype dtype, parameter_dtype;
  int threads;
};

struct Dropout {
  const void* x;        // (rows, columns)
  void* out;            // (rows, columns)
  const int64_t* seed;  // one element
  int64_t rows, columns;
  uint32_t threshold, site;
  Dtype dtype;
  int threads;
};

// One of the tables whose rows are added: words, positions, token types. Without token types there
// is a table of no rows.
struct EmbeddingTable {
  const void* ids;     // (tokens), int64 if wide, else int32; any values
  const void* values;  // (rows, columns)
  void* grad;          // (rows, columns); null in forward
  int64_t rows;
  int64_t padding;  // the row that gets no gradient, or -1
  bool wide;
};
constexpr int embedding_tables = 3;

struct EmbeddingForward {
  EmbeddingTable tables[embedding_tables];
  const void* weight;   // (columns), parameter_dtype
  const void* bias;     // (columns), parameter_dtype
  void* out;            // (tokens, columns), out_dtype
  float* statistics;    // (2, tokens): mean, rstd
  const int64_t* seed;  // one element; null without dropout
  int64_t tokens, columns;
  float eps;
  uint32_t threshold, site;
  Dtype dtype, parameter_dtype, out_dtype;
  int threads;
};

struct EmbeddingBackward {
  EmbeddingTable tables[embedding_tables];
  const void* dout;         // (tokens, columns), out_dtype
  const void* weight;       // (columns), parameter_dtype
  const float* statistics;  // (2, tokens): mean, rstd
  void* dweight;            // (columns), parameter_dtype
  void* dbias;              // (columns), parameter_dtype
  float* ds;                // (tokens, columns): scratch, the gradient of the sum before the norm
  float* partial;           // (blocks, 2, columns): each block's share of dweight and dbias
  float* parts;             // (3, tokens / chunk rounded up, 2, columns): scratch for table rows
  void* readers;            // (4, tokens, 2) int64: scratch for sorting tokens by id
  const int64_t* seed;      // one element; null without dropout
  int64_t tokens, columns, blocks;
  int64_t chunk;  // how many tokens' shares of a table's gradient are summed at a time
  uint32_t threshold, site;
  Dtype dtype, parameter_dtype, out_dtype;
  int threads;
};

struct Kernels {
  // Those that return bool give false when they are out of memory.
  bool (*attention_forward)(const AttentionForward&);
  bool (*attention_backward)(const AttentionBackward&);
  bool (*cross_entropy_forward)(const CrossEntropyForward&);
  bool (*cross_entropy_backward)(const CrossEntropyBackward&);
  bool (*layernorm_forward)(const LayernormForward&);
  void (*layernorm_backward)(const LayernormBackward&);
  void (*gelu_forward)(const GeluForward&);
  void (*gelu_backward)(const GeluBackward&);
  void (*dropout)(const Dropout&);
  bool (*embedding_forward)(const EmbeddingForward&);
  bool (*embedding_backward)(const EmbeddingBackward&);
};

#if defined(BERTFAST_ISA)
namespace BERTFAST_ISA {
bool attention_forward(const AttentionForward&);
bool attention_backward(const AttentionBackward&);
bool cross_entropy_forward(const CrossEntropyForward&);
bool cross_entropy_backward(const CrossEntropyBackward&);
bool layernorm_forward(const LayernormForward&);
void layernorm_backward(const LayernormBackward&);
void gelu_forward(const GeluForward&);
void gelu_backward(const GeluBackward&);
void dropout(const Dropout&);
bool embedding_forward(const EmbeddingForward&);
bool embedding_backward(const EmbeddingBackward&);
}  // namespace BERTFAST_ISA
#endif

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace bertfast
