// The kernels of one instruction set, for the binding to pick from.
#include "kernels.h"

namespace bertfast {
namespace BERTFAST_ISA {

const Kernels kernels = {
    attention_forward, attention_backward, cross_entropy_forward, cross_entropy_backward,
    layernorm_forward, layernorm_backward, gelu_forward,          gelu_backward,
    dropout,           embedding_forward,  embedding_backward,
};

}  // namespace BERTFAST_ISA
}  // namespace bertfast
