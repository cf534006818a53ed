// bertfast._cuda: the launchers of kernels.h for Python, which checks every argument. A launch
// returns CUDA's status, 0 if all is well; status_text says what another one means.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"

#if defined(BERTFAST_EMULATION)
#include "../emulation/emulation.h"
#endif

namespace py = pybind11;
using namespace bertfast;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_of(int code) { return static_cast<Dtype>(code); }

}  // namespace

// A tensor is (address, stride of a token, stride of a head) in Python.
template <>
struct pybind11::detail::type_caster<Strided> {
  PYBIND11_TYPE_CASTER(Strided, const_name("tuple[int, int, int]"));
  bool load(handle source, bool) {
    if (!isinstance<tuple>(source)) return false;
    const auto given = reinterpret_borrow<tuple>(source);
    make_caster<uintptr_t> data;
    make_caster<int64_t> token, head;
    if (given.size() != 3 || !data.load(given[0], false) || !token.load(given[1], false) ||
        !head.load(given[2], false))
      return false;
    value = {pointer(cast_op<uintptr_t>(data)), cast_op<int64_t>(token), cast_op<int64_t>(head)};
    return true;
  }
};

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "bertfast's CUDA kernels";
  m.def("status_text", &status_text);
  m.def("try_device", &try_device);
  m.def("layernorm_forward",
        [](int device, int processors, uintptr_t stream, uintptr_t x, uintptr_t residual,
           uintptr_t weight, uintptr_t bias, uintptr_t out, uintptr_t total, uintptr_t statistics,
           uintptr_t seed, int64_t rows, int64_t columns, float eps, uint32_t threshold,
           uint32_t site, int dtype, bool wide_parameters) {
          if (const int failed = set_device(device)) return failed;
          return layernorm_forward(
              {pointer(x), pointer(residual), pointer(weight), pointer(bias), pointer(out),
               pointer(total), pointer<float>(statistics), pointer<int64_t>(seed), rows, columns,
               eps, threshold, site, dtype_of(dtype), wide_parameters},
              processors, pointer(stream));
        });
  m.def("layernorm_backward",
        [](int device, int processors, uintptr_t stream, uintptr_t dout, uintptr_t total,
           uintptr_t weight, uintptr_t statistics, uintptr_t dx, uintptr_t dresidual,
           uintptr_t dweight, uintptr_t dbias, uintptr_t partial, uintptr_t seed, int64_t rows,
           int64_t columns, int64_t blocks, uint32_t threshold, uint32_t site, int dtype,
           bool wide_parameters) {
          if (const int failed = set_device(device)) return failed;
          return layernorm_backward(
              {pointer(dout), pointer(total), pointer(weight), pointer<float>(statistics),
               pointer(dx), pointer(dresidual), pointer(dweight), pointer(dbias),
               pointer<float>(partial), pointer<int64_t>(seed), rows, columns, blocks, threshold,
               site, dtype_of(dtype), wide_parameters},
              processors, pointer(stream));
        });
  m.def("gelu_forward",
        [](int device, int processors, uintptr_t stream, uintptr_t x, uintptr_t bias, uintptr_t out,
           int64_t rows, int64_t columns, bool tanh, int dtype, bool wide_parameters) {
          if (const int failed = set_device(device)) return failed;
          return gelu_forward({pointer(x), pointer(bias), pointer(out), rows, columns, tanh,
                               dtype_of(dtype), wide_parameters},
                              processors, pointer(stream));
        });
  m.def("gelu_backward",
        [](int device, int processors, uintptr_t stream, uintptr_t dout, uintptr_t x,
           uintptr_t bias, uintptr_t dx, uintptr_t dbias, uintptr_t partial, int64_t rows,
           int64_t columns, int64_t blocks, bool tanh, int dtype, bool wide_parameters) {
          if (const int failed = set_device(device)) return failed;
          return gelu_backward({pointer(dout), pointer(x), pointer(bias), pointer(dx),
                                pointer(dbias), pointer<float>(partial), rows, columns, blocks,
                                tanh, dtype_of(dtype), wide_parameters},
                               processors, pointer(stream));
        });
  m.def("dropout",
        [](int device, int processors, uintptr_t stream, uintptr_t x, uintptr_t out, uintptr_t seed,
           int64_t rows, int64_t columns, uint32_t threshold, uint32_t site, int dtype) {
          if (const int failed = set_device(device)) return failed;
          return dropout({pointer(x), pointer(out), pointer<int64_t>(seed), rows, columns,
                          threshold, site, dtype_of(dtype)},
                         processors, pointer(stream));
        });
  // Of any pass; what it does not take is null.
  m.def(
      "attention",
      [](int device, int, uintptr_t stream, int pass, Strided q, Strided k, Strided v, Strided out,
         uintptr_t logsumexp, Strided dout, Strided dq, Strided dk, Strided dv, uintptr_t facts,
         uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k, uintptr_t seed, int64_t tokens_q,
         int64_t tokens_k, int64_t batch, int64_t heads, int64_t head_dim, int64_t longest_q,
         int64_t longest_k, float scale, uint32_t threshold, uint32_t site, bool causal, int dtype,
         int warps, int heads_together, int key_rows, bool ahead, int64_t shared_bytes) {
        if (const int failed = set_device(device)) return failed;
        const Attention a{q,
                          out,
                          k,
                          v,
                          pointer<float>(logsumexp),
                          dout,
                          dq,
                          dk,
                          dv,
                          pointer<float>(facts),
                          pointer<int32_t>(cu_seqlens_q),
                          pointer<int32_t>(cu_seqlens_k),
                          pointer<int64_t>(seed),
                          tokens_q,
                          tokens_k,
                          batch,
                          heads,
                          head_dim,
                          longest_q,
                          longest_k,
                          scale,
                          threshold,
                          site,
                          causal,
                          dtype_of(dtype),
                          warps,
                          heads_together,
                          key_rows,
                          ahead,
                          shared_bytes};
        const auto which = static_cast<AttentionPass>(pass);
        return which == AttentionPass::forward ? attention_forward(a, pointer(stream))
                                               : attention_backward(which, a, pointer(stream));
      });

#if defined(BERTFAST_EMULATION)
  m.attr("emulated") = true;
  // The order in which threads run between two barriers: "forward", "reverse" or "random"; and the
  // byte that shared memory is filled with.
  m.def("set_emulation", [](const std::string& order, uint32_t seed, uint8_t pattern) {
    using emulation::Order;
    auto& emulator = emulation::Emulator::the();
    emulator.order = order == "forward"   ? Order::forward
                     : order == "reverse" ? Order::reverse
                                          : Order::random;
    emulator.seed = seed;
    emulator.pattern = pattern;
  });
#else
  m.attr("emulated") = false;
#endif
}
