// bertfast._cpu: the native kernels over raw pointers. It knows nothing of torch; the launchers in
// bertfast/kernels/cpu allocate every output and check every argument first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "philox.h"

namespace py = pybind11;

namespace bertfast {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
};

// The compiled sets this processor can run, weakest first.
std::vector<InstructionSet> usable_sets() {
  std::vector<InstructionSet> sets;
#if defined(BERTFAST_HAVE_BASELINE)
  sets.push_back({"baseline", &baseline::kernels});
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(BERTFAST_HAVE_AVX2)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) sets.push_back({"avx2", &avx2::kernels});
#endif
#if defined(BERTFAST_HAVE_AVX512) || defined(BERTFAST_HAVE_AVX512_BF16)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(BERTFAST_HAVE_AVX512)
  if (has_avx512) sets.push_back({"avx512", &avx512::kernels});
#endif
#if defined(BERTFAST_HAVE_AVX512_BF16)
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    sets.push_back({"avx512_bf16", &avx512_bf16::kernels});
#endif
#endif
  return sets;
}

InstructionSet current = {nullptr, nullptr};

void set_isa(const std::string& name) {
  std::string known;
  for (const InstructionSet& set : usable_sets()) {
    if (name == set.name) {
      current = set;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::invalid_argument("BERTFAST_CPU_ISA: expected one of " + known +
                              " (what was compiled and this processor runs), got '" + name + "'");
}

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

constexpr int out_of_memory = -1;

// A status: 0, or the number (from 1) of the first condition that does not hold.
template <class... Conditions>
int first_broken(Conditions... holds) {
  int number = 0, broken = 0;
  ((++number, broken == 0 && !holds ? broken = number : 0), ...);
  return broken;
}

bool known(int dtype) { return dtype == 0 || dtype == 1; }

// float32 activations take float32 parameters; bfloat16 ones take either.
bool known(int dtype, int parameter_dtype) {
  return known(dtype) && known(parameter_dtype) && parameter_dtype <= dtype;
}

// Token and head strides of one tensor.
using Strides = std::pair<int64_t, int64_t>;

// A size that is far beyond any memory is a mistake of the caller's.
bool sensible(int64_t size) { return size >= 0 && size <= (int64_t{1} << 40); }

int attention_forward(Address q, Address k, Address v, Address out, Address logsumexp,
                      Address cu_seqlens_q, Address cu_seqlens_k, Address seed, int64_t batch,
                      int64_t queries, int64_t keys, int64_t heads, int64_t head_dim,
                      Strides q_strides, Strides k_strides, Strides v_strides, float scale,
                      bool causal, uint32_t threshold, uint32_t site, int dtype, int threads) {
  if (const int broken = first_broken(
          sensible(batch) && sensible(queries) && sensible(keys), heads >= 1 && sensible(heads),
          head_dim >= 1 && head_dim <= 256, threads >= 1, known(dtype), threshold <= dropout_lanes,
          (threshold > 0) == (seed != 0), cu_seqlens_q && cu_seqlens_k,
          queries == 0 || (q && out && logsumexp), keys == 0 || (k && v)))
    return broken;
  py::gil_scoped_release unlocked;
  const bool done = current.kernels->attention_forward({at(q),
                                                        at(k),
                                                        at(v),
                                                        at(out),
                                                        at<float>(logsumexp),
                                                        at<const int32_t>(cu_seqlens_q),
                                                        at<const int32_t>(cu_seqlens_k),
                                                        at<const int64_t>(seed),
                                                        batch,
                                                        queries,
                                                        keys,
                                                        heads,
                                                        head_dim,
                                                        q_strides.first,
                                                        q_strides.second,
                                                        k_strides.first,
                                                        k_strides.second,
                                                        v_strides.first,
                                                        v_strides.second,
                                                        scale,
                                                        causal,
                                                        threshold,
                                                        site,
                                                        static_cast<Dtype>(dtype),
                                                        threads});
  return done ? 0 : out_of_memory;
}

int attention_backward(Address dout, Address q, Address k, Address v, Address out,
                       Address logsumexp, Address dq, Address dk, Address dv, Address cu_seqlens_q,
                       Address cu_seqlens_k, Address seed, int64_t batch, int64_t queries,
                       int64_t keys, int64_t heads, int64_t head_dim, Strides q_strides,
                       Strides k_strides, Strides v_strides, Strides dq_strides, Strides dk_strides,
                       Strides dv_strides, float scale, bool causal, uint32_t threshold,
                       uint32_t site, int dtype, int threads) {
  if (const int broken = first_broken(
          sensible(batch) && sensible(queries) && sensible(keys), heads >= 1 && sensible(heads),
          head_dim >= 1 && head_dim <= 256, threads >= 1, known(dtype), threshold <= dropout_lanes,
          (threshold > 0) == (seed != 0), cu_seqlens_q && cu_seqlens_k,
          queries == 0 || (dout && q && out && logsumexp && dq), keys == 0 || (k && v && dk && dv)))
    return broken;
  py::gil_scoped_release unlocked;
  const bool done = current.kernels->attention_backward({at(dout),
                                                         at(q),
                                                         at(k),
                                                         at(v),
                                                         at(out),
                                                         at<float>(logsumexp),
                                                         at(dq),
                                                         at(dk),
                                                         at(dv),
                                                         at<const int32_t>(cu_seqlens_q),
                                                         at<const int32_t>(cu_seqlens_k),
                                                         at<const int64_t>(seed),
                                                         batch,
                                                         queries,
                                                         keys,
                                                         heads,
                                                         head_dim,
                                                         q_strides.first,
                                                         q_strides.second,
                                                         k_strides.first,
                                                         k_strides.second,
                                                         v_strides.first,
                                                         v_strides.second,
                                                         dq_strides.first,
                                                         dq_strides.second,
                                                         dk_strides.first,
                                                         dk_strides.second,
                                                         dv_strides.first,
                                                         dv_strides.second,
                                                         scale,
                                                         causal,
                                                         threshold,
                                                         site,
                                                         static_cast<Dtype>(dtype),
                                                         threads});
  return done ? 0 : out_of_memory;
}

int cross_entropy_forward(Address hidden, Address weight, Address bias, Address labels,
                          Address loss, Address logsumexp, int64_t tokens, int64_t columns,
                          int64_t vocabulary, int64_t ignore_index, bool mean, bool wide_labels,
                          int dtype, int weight_dtype, int bias_dtype, int threads) {
  if (const int broken = first_broken(
          sensible(tokens), columns >= 1 && sensible(columns),
          vocabulary >= 1 && sensible(vocabulary), threads >= 1, known(dtype, weight_dtype),
          known(dtype, bias_dtype), weight && loss, tokens == 0 || (hidden && labels && logsumexp)))
    return broken;
  py::gil_scoped_release unlocked;
  const bool done = current.kernels->cross_entropy_forward(
      {at(hidden), at(weight), at(bias), at(labels), at<float>(loss), at<float>(logsumexp), tokens,
       columns, vocabulary, ignore_index, mean, wide_labels, static_cast<Dtype>(dtype),
       static_cast<Dtype>(weight_dtype), static_cast<Dtype>(bias_dtype), threads});
  return done ? 0 : out_of_memory;
}

int cross_entropy_backward(Address dloss, Address hidden, Address weight, Address bias,
                           Address labels, Address logsumexp, Address dhidden, Address dweight,
                           Address dbias, int64_t tokens, int64_t columns, int64_t vocabulary,
                           int64_t ignore_index, bool mean, bool wide_labels, int dtype,
                           int weight_dtype, int bias_dtype, int threads) {
  if (const int broken = first_broken(sensible(tokens), columns >= 1 && sensible(columns),
                                      vocabulary >= 1 && sensible(vocabulary), threads >= 1,
                                      known(dtype, weight_dtype), known(dtype, bias_dtype),
                                      dloss && weight && dweight, (bias != 0) == (dbias != 0),
                                      tokens == 0 || (hidden && labels && logsumexp && dhidden)))
    return broken;
  py::gil_scoped_release unlocked;
  const bool done = current.kernels->cross_entropy_backward(
      {at<float>(dloss), at(hidden), at(weight), at(bias), at(labels), at<float>(logsumexp),
       at(dhidden), at(dweight), at(dbias), tokens, columns, vocabulary, ignore_index, mean,
       wide_labels, static_cast<Dtype>(dtype), static_cast<Dtype>(weight_dtype),
       static_cast<Dtype>(bias_dtype), threads});
  return done ? 0 : out_of_memory;
}

int layernorm_forward(Address x, Address residual, Address weight, Address bias, Address out,
                      Address total, Address statistics, Address seed, int64_t rows,
                      int64_t columns, float eps, uint32_t threshold, uint32_t site, int dtype,
                      int parameter_dtype, int threads) {
  const bool some = rows > 0;
  if (const int broken =
          first_broken(rows >= 0, columns >= 1, threads >= 1, known(dtype, parameter_dtype),
                       threshold <= dropout_lanes, (threshold > 0) == (seed != 0),
                       !some || (x && out && statistics), weight && bias))
    return broken;
  py::gil_scoped_release unlocked;
  const bool done = current.kernels->layernorm_forward(
      {at(x), at(residual), at(weight), at(bias), at(out), at(total), at<float>(statistics),
       at<const int64_t>(seed), rows, columns, eps, threshold, site, static_cast<Dtype>(dtype),
       static_cast<Dtype>(parameter_dtype), threads});
  return done ? 0 : out_of_memory;
}

int layernorm_backward(Address dout, Address total, Address weight, Address statistics, Address dx,
                       Address dresidual, Address dweight, Address dbias, Address partial,
                       Address seed, int64_t rows, int64_t columns, int64_t blocks,
                       uint32_t threshold, uint32_t site, int dtype, int parameter_dtype,
                       int threads) {
  const bool some = rows > 0;
  if (const int broken =
          first_broken(rows >= 0, columns >= 1, threads >= 1, known(dtype, parameter_dtype),
                       threshold <= dropout_lanes, (threshold > 0) == (seed != 0),
                       !some || (dout && total && statistics && dx), weight && dweight && dbias,
                       blocks >= 1 && partial))
    return broken;
  py::gil_scoped_release unlocked;
  current.kernels->layernorm_backward(
      {at(dout), at(total), at(weight), at<float>(statistics), at(dx), at(dresidual), at(dweight),
       at(dbias), at<float>(partial), at<const int64_t>(seed), rows, columns, blocks, threshold,
       site, static_cast<Dtype>(dtype), static_cast<Dtype>(parameter_dtype), threads});
  return 0;
}

int gelu_forward(Address x, Address bias, Address out, int64_t rows, int64_t columns, bool tanh,
                 int dtype, int parameter_dtype, int threads) {
  const bool some = rows > 0 && columns > 0;
  if (const int broken = first_broken(rows >= 0, columns >= 0, threads >= 1,
                                      known(dtype, parameter_dtype), !some || (x && out)))
    return broken;
  py::gil_scoped_release unlocked;
  current.kernels->gelu_forward({at(x), at(bias), at(out), rows, columns, tanh,
                                 static_cast<Dtype>(dtype), static_cast<Dtype>(parameter_dtype),
                                 threads});
  return 0;
}

int gelu_backward(Address dout, Address x, Address bias, Address dx, Address dbias, Address partial,
                  int64_t rows, int64_t columns, int64_t blocks, bool tanh, int dtype,
                  int parameter_dtype, int threads) {
  const bool some = rows > 0 && columns > 0;
  if (const int broken =
          first_broken(rows >= 0, columns >= 0, threads >= 1, known(dtype, parameter_dtype),
                       !some || (dout && x && dx), !bias || (dbias && partial && blocks >= 1)))
    return broken;
  py::gil_scoped_release unlocked;
  current.kernels->gelu_backward({at(dout), at(x), at(bias), at(dx), at(dbias), at<float>(partial),
                                  rows, columns, blocks, tanh, static_cast<Dtype>(dtype),
                                  static_cast<Dtype>(parameter_dtype), threads});
  return 0;
}

int dropout(Address x, Address out, Address seed, int64_t rows, int64_t columns, uint32_t threshold,
            uint32_t site, int dtype, int threads) {
  const bool some = rows > 0 && columns > 0;
  if (const int broken = first_broken(rows >= 0, columns >= 0, threads >= 1, known(dtype),
                                      threshold <= dropout_lanes, !some || (x && out), seed))
    return broken;
  py::gil_scoped_release unlocked;
  current.kernels->dropout({at(x), at(out), at<const int64_t>(seed), rows, columns, threshold, site,
                            static_cast<Dtype>(dtype), threads});
  return 0;
}

// A table without rows, which is how there are no token types, needs neither ids nor values.
bool readable(const EmbeddingTable& table, bool some_tokens) {
  return table.rows >= 0 && (table.rows == 0 || !some_tokens || (table.ids && table.values));
}

int embedding_forward(Address word_ids, Address position_ids, Address type_ids, Address word,
                      Address position, Address token_type, Address weight, Address bias,
                      Address out, Address statistics, Address seed, int64_t word_rows,
                      int64_t position_rows, int64_t type_rows, int64_t tokens, int64_t columns,
                      bool word_wide, bool position_wide, bool type_wide, float eps,
                      uint32_t threshold, uint32_t site, int dtype, int parameter_dtype,
                      int out_dtype, int threads) {
  const bool some = tokens > 0;
  const EmbeddingForward arguments = {
      {{at(word_ids), at(word), nullptr, word_rows, -1, word_wide},
       {at(position_ids), at(position), nullptr, position_rows, -1, position_wide},
       {at(type_ids), at(token_type), nullptr, type_rows, -1, type_wide}},
      at(weight),
      at(bias),
      at(out),
      at<float>(statistics),
      at<const int64_t>(seed),
      tokens,
      columns,
      eps,
      threshold,
      site,
      static_cast<Dtype>(dtype),
      static_cast<Dtype>(parameter_dtype),
      static_cast<Dtype>(out_dtype),
      threads};
  if (const int broken = first_broken(
          tokens >= 0, columns >= 1, threads >= 1,
          known(dtype, parameter_dtype) && known(out_dtype), threshold <= dropout_lanes,
          (threshold > 0) == (seed != 0), readable(arguments.tables[0], some),
          readable(arguments.tables[1], some), readable(arguments.tables[2], some),
          !some || (out && statistics), weight && bias))
    return broken;
  py::gil_scoped_release unlocked;
  return current.kernels->embedding_forward(arguments) ? 0 : out_of_memory;
}

int embedding_backward(Address dout, Address word_ids, Address position_ids, Address type_ids,
                       Address word, Address position, Address token_type, Address weight,
                       Address statistics, Address dword, Address dposition, Address dtoken_type,
                       Address dweight, Address dbias, Address ds, Address partial, Address parts,
                       Address readers, Address seed, int64_t word_rows, int64_t position_rows,
                       int64_t type_rows, int64_t tokens, int64_t columns, int64_t blocks,
                       int64_t chunk, int64_t padding, bool word_wide, bool position_wide,
                       bool type_wide, uint32_t threshold, uint32_t site, int dtype,
                       int parameter_dtype, int out_dtype, int threads) {
  const bool some = tokens > 0;
  const EmbeddingBackward arguments = {
      {{at(word_ids), at(word), at(dword), word_rows, padding, word_wide},
       {at(position_ids), at(position), at(dposition), position_rows, -1, position_wide},
       {at(type_ids), at(token_type), at(dtoken_type), type_rows, -1, type_wide}},
      at(dout),
      at(weight),
      at<float>(statistics),
      at(dweight),
      at(dbias),
      at<float>(ds),
      at<float>(partial),
      at<float>(parts),
      at(readers),
      at<const int64_t>(seed),
      tokens,
      columns,
      blocks,
      chunk,
      threshold,
      site,
      static_cast<Dtype>(dtype),
      static_cast<Dtype>(parameter_dtype),
      static_cast<Dtype>(out_dtype),
      threads};
  const auto usable = [&](const EmbeddingTable& table) {
    return readable(table, some) && (table.rows == 0 || table.grad);
  };
  if (const int broken = first_broken(
          tokens >= 0, columns >= 1, threads >= 1,
          known(dtype, parameter_dtype) && known(out_dtype), threshold <= dropout_lanes,
          (threshold > 0) == (seed != 0), usable(arguments.tables[0]), usable(arguments.tables[1]),
          usable(arguments.tables[2]), !some || (dout && statistics && ds && parts && readers),
          weight && dweight && dbias, blocks >= 1 && partial, chunk >= 1))
    return broken;
  py::gil_scoped_release unlocked;
  return current.kernels->embedding_backward(arguments) ? 0 : out_of_memory;
}

}  // namespace
}  // namespace bertfast

PYBIND11_MODULE(_cpu, m) {
  using namespace bertfast;
  const char* forced = std::getenv("BERTFAST_CPU_ISA");
  if (usable_sets().empty()) throw std::runtime_error("no compiled instruction set runs here");
  set_isa(forced && *forced ? forced : usable_sets().back().name);
  m.doc() = "Native CPU kernels over raw pointers; call them through bertfast.ops.";
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const InstructionSet& set : usable_sets()) names.push_back(set.name);
    return names;
  });
  m.def("isa", [] { return std::string(current.name); });
  m.def("set_isa", &set_isa, "Switches the whole process to another instruction set; for tests.");
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("cross_entropy_forward", &cross_entropy_forward);
  m.def("cross_entropy_backward", &cross_entropy_backward);
  m.def("layernorm_forward", &layernorm_forward);
  m.def("layernorm_backward", &layernorm_backward);
  m.def("gelu_forward", &gelu_forward);
  m.def("gelu_backward", &gelu_backward);
  m.def("dropout", &dropout);
  m.def("embedding_forward", &embedding_forward);
  m.def("embedding_backward", &embedding_backward);
}
