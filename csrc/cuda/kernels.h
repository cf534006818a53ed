// What the binding and the launchers agree on: pointers to device memory, sizes, the device's
// number of multiprocessors (which decides how many blocks share out a sum, so that one device
// always gives the same bits) and the stream. A launcher's status is CUDA's.
#pragma once

#include <cstdint>

namespace bertfast {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct LayernormForward {
  const void* x;         // (rows, columns)
  const void* residual;  // (rows, columns) or null
  const void* weight;    // (columns), in dtype, or float32 if wide_parameters
  const void* bias;      // likewise
  void* out;             // (rows, columns)
  void* total;           // (rows, columns): residual + dropout(x), or null: not kept
  float* statistics;     // (2, rows): mean, rstd
  const int64_t* seed;   // one element; null without dropout
  int64_t rows, columns;
  float eps;
  uint32_t threshold, site;
  Dtype dtype;
  bool wide_parameters;
};

struct LayernormBackward {
  const void* dout;         // (rows, columns)
  const void* total;        // (rows, columns)
  const void* weight;       // (columns), in dtype, or float32 if wide_parameters
  const float* statistics;  // (2, rows): mean, rstd
  void* dx;                 // (rows, columns)
  void* dresidual;          // (rows, columns), or null: the same as dx, or no residual
  void* dweight;            // (columns), as weight
  void* dbias;              // likewise
  float* partial;           // (blocks, 2, columns): each block's share of dweight and dbias
  const int64_t* seed;      // one element; null without dropout
  int64_t rows, columns, blocks;
  uint32_t threshold, site;
  Dtype dtype;
  bool wide_parameters;
};

struct GeluForward {
  const void* x;     // (rows, columns)
  const void* bias;  // (columns), in dtype, or float32 if wide_parameters, or null
  void* out;         // (rows, columns)
  int64_t rows, columns;
  bool tanh;
  Dtype dtype;
  bool wide_parameters;
};

struct GeluBackward {
  const void* dout;  // (rows, columns)
  const void* x;     // (rows, columns)
  const void* bias;  // (columns), in dtype, or float32 if wide_parameters, or null
  void* dx;          // (rows, columns)
  void* dbias;       // (columns), as bias, or null
  float* partial;    // (blocks, columns): each block's share of dbias; null without bias
  int64_t rows, columns, blocks;
  bool tanh;
  Dtype dtype;
  bool wide_parameters;
};

struct Dropout {
  const void* x;        // (rows, columns)
  void* out;            // (rows, columns)
  const int64_t* seed;  // one element
  int64_t rows, columns;
  uint32_t threshold, site;
  Dtype dtype;
};

// (tokens, heads, head_dim) in 16 bits; a head's elements lie side by side, strides are in elements.
struct Strided {
  const void* data;
  int64_t token, head;
};

struct Attention {
  Strided q, out;            // tokens_q
  Strided k, v;              // tokens_k
  float* logsumexp;          // (heads, tokens_q), natural
  Strided dout, dq, dk, dv;  // backward's: as out, q, k, v
  float* facts;              // (heads, tokens_q, 2): what backward's first pass keeps
                             // for its second; else null
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (batch + 1)
  const int64_t* seed;                         // one element; null without dropout
  int64_t tokens_q, tokens_k, batch, heads, head_dim;
  int64_t longest_q, longest_k;  // sequences
  float scale;
  uint32_t threshold, site;
  bool causal;
  Dtype dtype;           // bfloat16 or float16
  int warps;             // of a head in a block; each has 16 queries
  int heads_together;    // in a block
  int key_rows;          // of a tile of keys: 64, or as many as the longest sequence needs
  bool ahead;            // the next tile is copied while one is worked on, to a place of its own
  int64_t shared_bytes;  // of dynamic shared memory, for all that
};

// The kernels of attention: forward; backward of whole heads, of sequences with no more queries than
// a block has; and for longer ones its two passes, dq (and dots) before dk and dv.
enum class AttentionPass : int { forward = 0, heads = 1, queries = 2, keys = 3 };

// Makes the device current for the runtime that is linked in, and in the driver for torch's, too: who
// calls it or try_device has it current already, or makes another one so again.
int set_device(int device);
// Whether the device can run what was compiled: its driver is new enough, and its architecture is
// there.
int try_device(int device);
const char* status_text(int status);

// `stream` is a cudaStream_t.
int layernorm_forward(const LayernormForward& a, int processors, void* stream);
int layernorm_backward(const LayernormBackward& a, int processors, void* stream);
int gelu_forward(const GeluForward& a, int processors, void* stream);
int gelu_backward(const GeluBackward& a, int processors, void* stream);
int dropout(const Dropout& a, int processors, void* stream);
int attention_forward(const Attention& a, void* stream);
int attention_backward(AttentionPass pass, const Attention& a, void* stream);

}  // namespace bertfast
