"""Whether a module's parameters may be read in its place, or the module must be called.

Kernels that fuse a linear layer, a table or a LayerNorm with what comes next read its parameters.
That is the same as calling it only for a module that nobody has replaced, wrapped or hooked: LoRA
replaces it, pruning and ``weight_norm`` write the weight in a hook before the call, and whoever
watches a layer does so in a hook, too.
"""

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling the module does nothing but what ``kind`` does with its parameters."""
    return type(module) is kind and is_computed_by(module, kind)


def is_computed_by(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs ``kind``'s forward and no hooks; it may be of a subclass."""
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and (not module._forward_hooks or _only_ask_for_gradients(module))
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not _has_any_global_hook()
    )


def _only_ask_for_gradients(module: Any) -> bool:
    """Whether all its hooks are those of transformers' ``enable_input_require_grads()``, which
    gradient checkpointing sets, and nothing to a module that is trained. A table that was called
    for them would sum its gradient in torch's order instead of the kernel's."""
    asks = all(
        getattr(hook, "__name__", "") == "make_inputs_require_grads"
        and hook.__module__ == "transformers.modeling_utils"
        for hook in module._forward_hooks.values()
    )
    return asks and bool(module.weight.requires_grad)


def is_plain_table(module: Any) -> bool:
    """Whether an embedding does nothing but look up rows."""
    return (
        is_plain(module, nn.Embedding)
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def is_plain_norm(module: Any) -> bool:
    """Whether a LayerNorm has the weight and the bias that the kernels take."""
    return is_plain(module, nn.LayerNorm) and module.weight is not None and module.bias is not None
