"""The gate rule and the case grids, for tests and benchmarks alike.

A kernel passes its gate when it is no worse than eager torch in the same dtype, both measured
against the reference in float64 on the same rounded inputs and with the same dropout mask
(:func:`assert_no_worse`). A :class:`Case` is one op on one input; :func:`run_gate` holds its output
and every gradient to the rule. New backends and new ops join by their word: :data:`CASES`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bertfast import ops
from bertfast.backends import TABLE
from bertfast.errors import KernelError
from bertfast.kernels import cpu, cuda, triton
from bertfast.masks import (
    attention_keep_mask,
    dropout_scale,
    dropout_threshold,
    keep_mask,
)
from bertfast.ops._operator import LAUNCHERS

# err <= factor * err_baseline + roundings * eps(dtype) * scale. They live here and nowhere else.
_FACTOR = {"forward": 2.0, "backward": 3.0, "model": 4.0}
_ROUNDINGS = {"forward": 2.0, "backward": 4.0, "model": 4.0}


@dataclass(frozen=True)
class GateRecord:
    """One comparison: its name and how much of the allowed error it used (1 is the limit)."""

    name: str
    ratio: float


gate_records: list[GateRecord] = []


def assert_no_worse(
    out: Tensor, reference: Tensor, baseline: Tensor, *, kind: str, name: str
) -> float:
    """Hold ``out`` to the gate rule: the largest and the RMS error, against the float64 reference.

    Args:
        out: what the kernel gave.
        reference: the same in float64.
        baseline: the same from eager torch in ``out``'s dtype.
        kind: ``"forward"``, ``"backward"`` or ``"model"``.
        name: for the message and the record.

    Returns:
        The share of the allowed error that was used.

    Raises:
        AssertionError: another shape or dtype, a value that is not finite, or too large an error.
    """
    assert out.shape == reference.shape, f"{name}: shape {out.shape}, expected {reference.shape}"
    assert out.dtype == baseline.dtype, f"{name}: dtype {out.dtype}, expected {baseline.dtype}"
    assert bool(out.isfinite().all()), f"{name}: {int((~out.isfinite()).sum())} values not finite"
    if out.numel() == 0:
        return 0.0
    reference = reference.double()
    worst = 0.0
    for norm_name, norm in (("max", _largest), ("rms", _rms)):
        error = norm(out.double() - reference)
        allowed = _FACTOR[kind] * norm(baseline.double() - reference)
        allowed += _ROUNDINGS[kind] * torch.finfo(out.dtype).eps * norm(reference)
        ratio = error / allowed if allowed > 0 else (0.0 if error == 0 else float("inf"))
        worst = max(worst, ratio)
        assert ratio <= 1.0, (
            f"{name}: {norm_name} error {error:.3g} is {ratio:.3g} of the allowed {allowed:.3g}"
        )
    print(f"gate {name}: {worst:.3f} of the allowed error")
    gate_records.append(GateRecord(name, worst))
    return worst


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every ``torch.empty`` comes filled with NaN, so that an element nobody writes is seen."""
    settings: Any = torch.utils.deterministic
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class KernelOnly(TorchDispatchMode):
    """Inside, torch may allocate, view and copy; anything else is an AssertionError.

    A kernel that leaned on torch for arithmetic would be no kernel.
    """

    allowed = frozenset(
        [
            *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
            *("zeros", "zeros_like", "new_zeros", "zero_"),
            *("view", "_unsafe_view", "reshape", "as_strided", "slice", "select", "unbind"),
            *("narrow", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "split"),
            *("split_with_sizes", "detach", "alias"),
            *("clone", "copy_", "contiguous", "_to_copy"),
        ]
    )

    def __init__(self, *also: str) -> None:
        super().__init__()
        self.names = self.allowed | set(also)
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        launcher = LAUNCHERS.get(func._schema.name)
        if launcher is not None:
            with self:  # an op is one operation to whoever looks on; here it is looked into
                return launcher(*args)
        with self:  # in there, what torch makes of other operations comes whole, too
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        namespace, name = func._schema.name.split("::")
        self.seen.append(name)
        assert namespace == "aten" and name in self.names, f"a kernel dispatched {func}"
        return func(*args, **(kwargs or {}))


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One op on one input.

    Attributes:
        word: the op.
        name: which case it is, readable in a test's id.
        make: the inputs; floating ones in float64.
        op: calls the op: ``op(tensors, backend)``.
        eager: the same in plain eager torch, in the tensors' dtype.
        parameters: names of inputs that may stay float32 under lower-precision activations.
        grads: names of inputs to differentiate.
        upstream: layout of the incoming gradient: contiguous, expanded, sliced or transposed.
    """

    word: str
    name: str
    make: Callable[[torch.Generator], Tensors]
    op: Callable[[Tensors, str | None], Tensor]
    eager: Callable[[Tensors], Tensor]
    grads: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    upstream: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.word}-{self.name}"

    def inputs(
        self, dtype: torch.dtype, *, mixed: bool = False, device: str = "cpu", seed: int = 0
    ) -> Tensors:
        """The inputs in ``dtype``; with ``mixed`` the parameters in float32. Layouts are kept."""
        made = self.make(torch.Generator().manual_seed(seed))
        result = {}
        for name, value in made.items():
            if value.is_floating_point():
                to = torch.float32 if mixed and name in self.parameters else dtype
                value = _cast(value, to, device)
            result[name] = value.to(device)
        return result


def _cast(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """``x`` in ``dtype`` on ``device`` with its strides, whatever they are."""
    if x._base is not None and (not x.is_contiguous() or x.storage_offset()):
        base = x._base.to(device=device, dtype=dtype)
        return base.as_strided(x.shape, x.stride(), x.storage_offset())
    return x.to(device=device, dtype=dtype)


def upstream_gradient(out: Tensor, layout: str, seed: int = 1) -> Tensor:
    """A random gradient of ``out``'s shape and dtype, in the layout that was asked for."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(out.shape)

    def normal(*shape: int) -> Tensor:
        # Cast before it is viewed: a cast view would be contiguous again.
        drawn = _normal(generator, *shape)
        return drawn.to(device=out.device, dtype=out.dtype)

    if layout == "expanded":  # stride 0, as from .sum().backward()
        return normal(*shape[-1:]).expand(shape)
    if layout == "sliced":
        return normal(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "transposed":
        return normal(*reversed(shape)).permute(*reversed(range(len(shape))))
    return normal(*shape)


def run_gate(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    *,
    mixed: bool = False,
    device: str = "cpu",
    apply: Callable[[Tensors, str | None], Tensor] | None = None,
) -> None:
    """Hold one case's output and gradients, on one backend in one dtype, to the gate rule.

    Args:
        apply: stands in for ``case.op``, for example its compiled form.
    """
    label = f"{backend}.{case}-{str(dtype).removeprefix('torch.')}{'-mixed' if mixed else ''}"
    expected = _expected(case, dtype, mixed, device)
    op = apply or case.op
    with poisoned_allocations():
        out, grads = _run(lambda t: op(t, backend), expected.given, case, expected.dout)
    reference, reference_grads = expected.reference
    baseline, baseline_grads = expected.baseline
    assert_no_worse(out, reference, baseline, kind="forward", name=f"{label}.out")
    for name, grad in grads.items():
        assert_no_worse(
            grad,
            reference_grads[name],
            baseline_grads[name],
            kind="backward",
            name=f"{label}.d{name}",
        )


@dataclass(frozen=True)
class _Expected:
    given: Tensors
    dout: Tensor
    reference: tuple[Tensor, Tensors]
    baseline: tuple[Tensor, Tensors]


@functools.lru_cache(maxsize=64)
def _expected(case: Case, dtype: torch.dtype, mixed: bool, device: str) -> _Expected:
    """A case's rounded inputs, and what the float64 reference and eager torch make of them."""
    given = case.inputs(dtype, mixed=mixed, device=device)
    # Layouts are for the kernels. torch's own product of bfloat16 on a CPU with AMX reads what lies
    # between the rows of a sliced tensor, times zero, and that is NaN here.
    contiguous = {name: value.contiguous() for name, value in given.items()}
    with torch.no_grad():
        dout = upstream_gradient(case.eager(contiguous), case.upstream)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    reference = _run(lambda t: case.op(t, "reference"), wide, case, dout.double())
    return _Expected(given, dout, reference, _run(case.eager, contiguous, case, dout))


def _run(
    call: Callable[[Tensors], Tensor], given: Tensors, case: Case, dout: Tensor
) -> tuple[Tensor, Tensors]:
    tensors = dict(given)
    for name in case.grads:
        tensors[name] = given[name].detach().requires_grad_()
    out = call(tensors)
    wanted = [tensors[name] for name in case.grads]
    grads = torch.autograd.grad(out, wanted, dout, materialize_grads=True)
    return out.detach(), dict(zip(case.grads, grads, strict=True))


SEED = 0x123456789ABCDEF


def seed_tensor(value: int = SEED) -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device="cpu")


def apply_keep_mask(x: Tensor, p: float, seed: Tensor, site: int) -> Tensor:
    """Eager dropout of rows with the shared mask, in ``x``'s dtype."""
    threshold = dropout_threshold(p)
    if threshold == 0:
        return x
    rows = torch.arange(x.numel() // x.shape[-1], device=x.device)
    keep = keep_mask(seed.to(x.device), site, rows, x.shape[-1], threshold)
    # where, not a product: a dropped infinity is 0, not NaN.
    return torch.where(keep.reshape(x.shape), x * dropout_scale(threshold), 0.0)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` as a view of the given layout, surrounded by NaN where there is room. "misaligned" is
    contiguous, but starts one element behind where an allocation does."""
    if layout == "misaligned":
        longer = x.new_full((x.numel() + 1,), float("nan"))
        view = longer[1:].view(x.shape)
        view.copy_(x)
        return view
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), float("nan"))
        view = wide[..., 2 : 2 + x.shape[-1]]
        view.copy_(x)
        return view
    if layout == "transposed":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    return x


# Rows x columns and why the shape is in the list.
ROW_SHAPES: dict[str, tuple[int, int]] = {
    "empty": (0, 24),
    "one_token": (1, 768),
    "one_column": (5, 1),
    "under_a_vector": (3, 7),
    "one_vector_and_one": (9, 17),
    "odd": (37, 101),
    "several_blocks": (133, 64),
    # Shared between two threads in the middle of a row; more tiles than a GPU kernel has programs
    # where it is interpreted.
    "two_threads": (91, 515),
    "piece_and_tail": (6, 1030),
    "base": (64, 768),
    "ffn": (20, 3072),
    "long_row": (3, 4999),
    # Longer than any kernel takes at once.
    "longest_row": (5, 18001),
}


def layernorm_case(
    rows: int,
    columns: int,
    *,
    name: str,
    dropout_p: float = 0.0,
    residual: bool = True,
    mean: float = 0.0,
    layout: str = "contiguous",
    upstream: str = "contiguous",
    spread: float = 1.0,
    eps: float = 1e-12,
) -> Case:
    """``layernorm`` on ``(rows, columns)`` values around ``mean``."""
    site = 5

    def make(generator: torch.Generator) -> Tensors:
        tensors = {
            "x": _laid_out(mean + spread * _normal(generator, rows, columns), layout),
            "weight": 1.0 + 0.5 * _normal(generator, columns),
            "bias": _normal(generator, columns),
            "seed": seed_tensor(),
        }
        if residual:
            tensors["residual"] = _laid_out(spread * _normal(generator, rows, columns), layout)
        return tensors

    def op(t: Tensors, backend: str | None) -> Tensor:
        return ops.layernorm(
            t["x"],
            t["weight"],
            t["bias"],
            eps,
            residual=t.get("residual"),
            dropout_p=dropout_p,
            seed=t["seed"],
            site=site,
            backend=backend,
        )

    def eager(t: Tensors) -> Tensor:
        total = apply_keep_mask(t["x"], dropout_p, t["seed"], site)
        if residual:
            total = t["residual"] + total
        weight, bias = t["weight"].to(total.dtype), t["bias"].to(total.dtype)
        return F.layer_norm(total, (columns,), weight, bias, eps)

    grads = ("x", "weight", "bias", "residual") if residual else ("x", "weight", "bias")
    return Case("layernorm", name, make, op, eager, grads, ("weight", "bias"), upstream)


def gelu_case(
    rows: int,
    columns: int,
    *,
    name: str,
    approximate: str = "none",
    bias: bool = True,
    layout: str = "contiguous",
    upstream: str = "contiguous",
    spread: float = 2.0,
) -> Case:
    """``gelu`` on ``(rows, columns)``; a spread of 2 reaches well into both tails."""

    def make(generator: torch.Generator) -> Tensors:
        tensors = {"x": _laid_out(spread * _normal(generator, rows, columns), layout)}
        if bias:
            tensors["bias"] = _normal(generator, columns)
        return tensors

    def op(t: Tensors, backend: str | None) -> Tensor:
        return ops.gelu(t["x"], t.get("bias"), approximate=approximate, backend=backend)

    def eager(t: Tensors) -> Tensor:
        z = t["x"] + t["bias"].to(t["x"].dtype) if bias else t["x"]
        return F.gelu(z, approximate=approximate)

    grads = ("x", "bias") if bias else ("x",)
    return Case("gelu", name, make, op, eager, grads, ("bias",), upstream)


def dropout_case(
    rows: int, columns: int, *, name: str, p: float = 0.1, layout: str = "contiguous"
) -> Case:
    """``dropout`` on ``(rows, columns)``."""

    def make(generator: torch.Generator) -> Tensors:
        return {
            "x": _laid_out(_normal(generator, rows, columns), layout),
            "seed": seed_tensor(),
        }

    def op(t: Tensors, backend: str | None) -> Tensor:
        return ops.dropout(t["x"], p, seed=t["seed"], site=0xFFFF0001, backend=backend)

    def eager(t: Tensors) -> Tensor:
        return apply_keep_mask(t["x"], p, t["seed"], 0xFFFF0001)

    return Case("dropout", name, make, op, eager, ("x",))


def _autocast_of(table: Tensor, wanted: bool) -> torch.autocast:
    """bfloat16 autocast around float32 tables; the float64 reference stays what it is."""
    enabled = wanted and table.dtype == torch.float32
    return torch.autocast(table.device.type, torch.bfloat16, enabled=enabled)


def embedding_case(
    tokens: int,
    columns: int,
    *,
    name: str,
    vocabulary: int = 50,
    positions: int = 40,
    dropout_p: float = 0.0,
    token_types: bool = True,
    padding_idx: int | None = None,
    storage: int = 0,
    apart: int = 1,
    ids: torch.dtype = torch.int64,
    autocast: bool = False,
    upstream: str = "contiguous",
) -> Case:
    """``embedding`` of ``tokens`` ids, many of them the same and words multiples of ``apart``, and
    behind them ``storage`` rows of zero ids; with ``autocast``, bfloat16 of float32 tables."""
    site, eps = 0, 1e-12

    def make(generator: torch.Generator) -> Tensors:
        def random_ids(rows: int) -> Tensor:
            drawn = torch.randint(rows, (tokens,), generator=generator, device="cpu")
            return torch.cat((drawn, drawn.new_zeros(storage)))

        tensors = {
            # The ids may be of different widths.
            "input_ids": (random_ids(-(-vocabulary // apart)) * apart).to(ids),
            "position_ids": random_ids(positions),
            "word": _normal(generator, vocabulary, columns),
            "position": _normal(generator, positions, columns),
            "weight": 1.0 + 0.5 * _normal(generator, columns),
            "bias": _normal(generator, columns),
            "seed": seed_tensor(),
        }
        if token_types:
            tensors["token_type_ids"] = random_ids(2).to(ids)
            tensors["token_type"] = _normal(generator, 2, columns)
        return tensors

    def op(t: Tensors, backend: str | None) -> Tensor:
        with _autocast_of(t["word"], autocast):
            return ops.embedding(
                t["input_ids"],
                t.get("token_type_ids"),
                t["position_ids"],
                t["word"],
                t.get("token_type"),
                t["position"],
                t["weight"],
                t["bias"],
                eps,
                padding_idx=padding_idx,
                dropout_p=dropout_p,
                seed=t["seed"],
                site=site,
                backend=backend,
            )

    def eager(t: Tensors) -> Tensor:
        total = F.embedding(t["input_ids"], t["word"], padding_idx)
        total = total + F.embedding(t["position_ids"], t["position"])
        if token_types:
            total = total + F.embedding(t["token_type_ids"], t["token_type"])
        weight, bias = t["weight"].to(total.dtype), t["bias"].to(total.dtype)
        y = F.layer_norm(total, (columns,), weight, bias, eps)
        y = apply_keep_mask(y, dropout_p, t["seed"], site)
        return y.bfloat16() if autocast and y.dtype == torch.float32 else y

    grads = ("word", "position", "weight", "bias", *(("token_type",) if token_types else ()))
    return Case("embedding", name, make, op, eager, grads, ("weight", "bias"), upstream)


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """int32 ``(batch + 1,)`` from the lengths of the sequences."""
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device="cpu")
    return starts.cumsum(0, dtype=torch.int32)


def attention_case(
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    *,
    name: str,
    key_lengths: Sequence[int] | None = None,
    storage: int = 0,
    causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    packed: bool = False,
    layout: str = "contiguous",
    upstream: str = "contiguous",
    spread: float = 1.0,
) -> Case:
    """``attention`` (or ``attention_qkvpacked``) with ``storage`` poisoned rows behind the last
    sequence."""
    site = 4
    cross = key_lengths is not None
    k_lengths = list(key_lengths) if key_lengths is not None else list(lengths)
    longest_q, longest_k = max(lengths, default=0), max(k_lengths, default=0)
    factor = head_dim**-0.5 if scale is None else scale

    def make(generator: torch.Generator) -> Tensors:
        def tokens(count: int, *inner: int) -> Tensor:
            x = spread * _normal(generator, count + storage, *inner, heads, head_dim)
            x[count:] = float("nan")
            return _laid_out(x, layout)

        tensors = {"seed": seed_tensor(), "cu_seqlens_q": cu_seqlens_of(lengths)}
        if packed:
            return {**tensors, "qkv": tokens(sum(lengths), 3)}
        for letter in "qkv":
            tensors[letter] = tokens(sum(lengths if letter == "q" else k_lengths))
        if cross:
            tensors["cu_seqlens_k"] = cu_seqlens_of(k_lengths)
        return tensors

    def op(t: Tensors, backend: str | None) -> Tensor:
        options: dict[str, Any] = {
            "scale": scale,
            "causal": causal,
            "dropout_p": dropout_p,
            "seed": t["seed"],
            "site": site,
            "backend": backend,
        }
        if packed:
            return ops.attention_qkvpacked(
                t["qkv"], cu_seqlens=t["cu_seqlens_q"], max_seqlen=longest_q, **options
            )
        return ops.attention(
            t["q"],
            t["k"],
            t["v"],
            cu_seqlens_q=t["cu_seqlens_q"],
            cu_seqlens_k=t.get("cu_seqlens_k"),
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k if cross else None,
            **options,
        )

    def eager(t: Tensors) -> Tensor:
        q, k, v = t["qkv"].unbind(1) if packed else (t["q"], t["k"], t["v"])
        # Starting with no rows of each keeps the graph connected when there is no sequence.
        pieces, start_q, start_k = [q[:0] + k[:0] + v[:0]], 0, 0
        for sq, sk in zip(lengths, k_lengths, strict=True):
            rows = torch.arange(start_q, start_q + sq, device=q.device)
            qi, ki, vi = (
                x[start : start + size].transpose(0, 1)
                for x, start, size in ((q, start_q, sq), (k, start_k, sk), (v, start_k, sk))
            )
            scores = (qi @ ki.transpose(1, 2)) * factor
            if causal:
                visible = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(sk - sq)
                scores = scores.masked_fill(~visible, float("-inf"))
                unseeing = ~visible.any(-1, keepdim=True)
                scores = scores.masked_fill(unseeing, 0.0)
                p = scores.softmax(-1).masked_fill(unseeing, 0.0)
            else:
                p = scores.softmax(-1)
            threshold = dropout_threshold(dropout_p)
            if threshold:
                numbers = (rows * heads + torch.arange(heads, device=q.device)[:, None]).flatten()
                keep = attention_keep_mask(t["seed"], site, numbers, sk, threshold)
                p = p * keep.reshape(heads, sq, sk) * dropout_scale(threshold)
            pieces.append((p.to(vi.dtype) @ vi).transpose(0, 1))
            start_q, start_k = start_q + sq, start_k + sk
        if storage:
            pieces.append(q.new_zeros(storage, heads, head_dim))
        return torch.cat(pieces)

    grads = ("qkv",) if packed else ("q", "k", "v")
    word = "attention"
    return Case(word, name, make, op, eager, grads, (), upstream)


def cross_entropy_case(
    tokens: int,
    columns: int,
    vocabulary: int,
    *,
    name: str,
    labelled: float = 0.5,
    bias: bool = True,
    reduction: str = "mean",
    layout: str = "contiguous",
    label_dtype: torch.dtype = torch.int64,
    spread: float = 1.0,
) -> Case:
    """``cross_entropy`` with a share ``labelled`` of the tokens labelled."""

    def make(generator: torch.Generator) -> Tensors:
        labels = torch.randint(vocabulary, (tokens,), generator=generator, device="cpu")
        ignored = torch.rand(tokens, generator=generator, device="cpu") >= labelled
        tensors = {
            "hidden": _laid_out(spread * _normal(generator, tokens, columns), layout),
            "weight": _laid_out(_normal(generator, vocabulary, columns) * columns**-0.5, layout),
            "labels": labels.masked_fill(ignored, -100).to(label_dtype),
        }
        if bias:
            tensors["bias"] = _normal(generator, vocabulary)
        return tensors

    def op(t: Tensors, backend: str | None) -> Tensor:
        return ops.cross_entropy(
            t["hidden"],
            t["weight"],
            t.get("bias"),
            t["labels"],
            reduction=reduction,
            backend=backend,
        )

    def eager(t: Tensors) -> Tensor:
        weight = t["weight"].to(t["hidden"].dtype)
        logits = F.linear(t["hidden"], weight, t["bias"].to(weight.dtype) if bias else None)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, t["labels"].long(), reduction="sum")
        count = int((t["labels"] != -100).sum())
        return loss / max(count, 1) if reduction == "mean" else loss

    grads = ("hidden", "weight", *(("bias",) if bias else ()))
    return Case("cross_entropy", name, make, op, eager, grads, ("weight", "bias"))


def _layernorm_cases() -> list[Case]:
    cases = [
        layernorm_case(*shape, name=f"{name}-p{p}", dropout_p=p)
        for name, shape in ROW_SHAPES.items()
        for p in (0.0, 0.1)
    ]
    return [
        *cases,
        layernorm_case(37, 101, name="plain", residual=False),
        layernorm_case(37, 101, name="no_residual-p0.5", residual=False, dropout_p=0.5),
        layernorm_case(37, 101, name="p1", dropout_p=1.0),
        # A mean that dwarfs the spread: mean(x^2) - mean(x)^2 would have no digit left.
        layernorm_case(20, 768, name="large_mean", mean=300.0, residual=False),
        layernorm_case(20, 768, name="large_values", spread=1e4),
        # Nothing to normalise: what rounding leaves of the centred row is blown up by 1/sqrt(eps),
        # which is chosen so that the gradients still fit into float16.
        layernorm_case(
            20, 768, name="constant_rows", mean=0.1, spread=0.0, residual=False, eps=1e-7
        ),
        # What a block's registers hold at the most, and more, in rows that start on 16 bytes.
        layernorm_case(5, 4104, name="held_by_a_block", dropout_p=0.1),
        layernorm_case(3, 8200, name="streamed", dropout_p=0.1),
        layernorm_case(37, 64, name="misaligned", layout="misaligned", dropout_p=0.1),
        layernorm_case(37, 101, name="sliced", layout="sliced", upstream="sliced"),
        layernorm_case(37, 101, name="transposed", layout="transposed", upstream="transposed"),
        layernorm_case(70, 515, name="expanded", upstream="expanded", dropout_p=0.1),
    ]


def _gelu_cases() -> list[Case]:
    cases = [
        gelu_case(*shape, name=f"{name}-{approximate}", approximate=approximate)
        for name, shape in ROW_SHAPES.items()
        for approximate in ("none", "tanh")
    ]
    return [
        *cases,
        gelu_case(37, 101, name="no_bias", bias=False),
        gelu_case(37, 101, name="no_bias-tanh", bias=False, approximate="tanh"),
        gelu_case(400, 101, name="no_bias-two_threads", bias=False),
        gelu_case(37, 101, name="tails", spread=8.0),
        gelu_case(37, 101, name="tails-tanh", spread=8.0, approximate="tanh"),
        gelu_case(37, 101, name="small", spread=1e-3, bias=False),
        gelu_case(37, 64, name="misaligned", layout="misaligned"),
        gelu_case(37, 101, name="sliced", layout="sliced", upstream="sliced"),
        gelu_case(37, 101, name="transposed", layout="transposed", upstream="transposed"),
        gelu_case(70, 515, name="expanded", upstream="expanded"),
    ]


def _dropout_cases() -> list[Case]:
    return [
        *(dropout_case(*shape, name=name) for name, shape in ROW_SHAPES.items()),
        dropout_case(37, 101, name="p0.5", p=0.5),
        dropout_case(37, 101, name="p1", p=1.0),
        dropout_case(37, 64, name="misaligned", layout="misaligned"),
        dropout_case(37, 101, name="sliced", layout="sliced"),
    ]


def _embedding_cases() -> list[Case]:
    return [
        embedding_case(0, 24, name="empty"),
        embedding_case(1, 24, name="one_token"),
        embedding_case(37, 1, name="one_column"),
        embedding_case(300, 101, name="repeated_ids", dropout_p=0.1),
        embedding_case(60, 768, name="base", vocabulary=1000, padding_idx=0, dropout_p=0.1),
        embedding_case(37, 24, name="no_token_types", token_types=False),
        embedding_case(37, 24, name="padding_idx", padding_idx=3, vocabulary=5),
        embedding_case(37, 24, name="p1", dropout_p=1.0),
        embedding_case(37, 24, name="expanded", upstream="expanded"),
        embedding_case(37, 24, name="transposed", upstream="transposed"),
        embedding_case(9, 7, name="under_a_vector", dropout_p=0.1),
        embedding_case(91, 515, name="two_threads", dropout_p=0.1),
        embedding_case(6, 1030, name="piece_and_tail", dropout_p=0.1),
        embedding_case(3, 4999, name="long_row", dropout_p=0.1),
        embedding_case(5, 9001, name="longest_row", dropout_p=0.1),
        embedding_case(37, 101, name="int32", ids=torch.int32, dropout_p=0.1),
        embedding_case(50, 24, name="storage", storage=90, padding_idx=0),
        # More readers of one row than are summed at a time, and nothing else to sum.
        embedding_case(1200, 33, name="one_row", vocabulary=1, positions=1),
        # More rows than one digit of the sort tells apart, or two: 512 * 512.
        embedding_case(200, 24, name="many_words", vocabulary=5000, positions=600),
        embedding_case(40, 3, name="most_words", vocabulary=(1 << 19) + 1, apart=1 << 18),
        embedding_case(133, 64, name="autocast", autocast=True, dropout_p=0.1),
        embedding_case(37, 101, name="autocast-no_dropout", autocast=True, upstream="sliced"),
    ]


def _attention_cases() -> list[Case]:
    return [
        attention_case([], 2, 8, name="no_sequence"),
        attention_case([], 2, 8, name="no_sequence-storage", storage=3),
        attention_case([1], 1, 1, name="one_token"),
        attention_case([0, 3, 0], 2, 4, name="zero_lengths"),
        attention_case([5, 1, 17], 3, 5, name="odd", storage=4, dropout_p=0.1),
        attention_case([63, 64, 65], 2, 16, name="around_a_block", dropout_p=0.1),
        attention_case([130, 7], 2, 64, name="several_blocks", packed=True, dropout_p=0.5),
        attention_case([12, 30], 12, 64, name="base", packed=True, storage=2),
        attention_case([9], 1, 256, name="widest_head"),
        # A head's columns in more than one panel, the last one not full.
        attention_case([70], 2, 100, name="wide_head", dropout_p=0.1),
        attention_case([33, 40], 2, 32, name="narrow_head", packed=True, dropout_p=0.1),
        # One head of one sequence: two threads share its backward.
        attention_case([200], 1, 24, name="split", dropout_p=0.1),
        attention_case([150], 1, 24, name="split-cross", key_lengths=[70], causal=True),
        attention_case([20, 5], 2, 8, name="negative_scale", scale=-30.0),
        attention_case([20, 5], 2, 8, name="sliced", layout="sliced", upstream="sliced"),
        attention_case([20, 5], 2, 8, name="transposed_inputs", layout="transposed"),
        attention_case([5, 8], 2, 8, name="cross", key_lengths=[9, 3], dropout_p=0.1),
        attention_case([5, 8], 2, 8, name="cross-no_keys", key_lengths=[0, 3]),
        attention_case([20, 33], 2, 8, name="causal", causal=True, packed=True, dropout_p=0.1),
        # Sq > Sk: the first queries see no key at all.
        attention_case([9, 4], 2, 8, name="causal-cross", key_lengths=[5, 9], causal=True),
        attention_case([20], 2, 8, name="p1", dropout_p=1.0),
        attention_case([20], 2, 8, name="large_scores", scale=30.0),
        attention_case([20, 5], 2, 8, name="expanded", upstream="expanded"),
        attention_case([20, 5], 2, 8, name="transposed", upstream="transposed"),
        # More queries than a thread takes at once, and more keys than a block.
        attention_case([410], 2, 16, name="long", dropout_p=0.1),
        # On tensor cores: heads of every width, in one block and in several, and short ones between
        # long ones, which must be searched for.
        attention_case([100], 2, 64, name="one_block", packed=True, dropout_p=0.1),
        attention_case([270, 5], 1, 64, name="two_passes", causal=True, packed=True, dropout_p=0.1),
        attention_case([70, 3], 1, 96, name="three_quarters", packed=True, dropout_p=0.1),
        attention_case([130, 40], 1, 128, name="full_width", packed=True, dropout_p=0.1),
        attention_case([2] * 20 + [150] + [3] * 20, 1, 8, name="many_sequences", dropout_p=0.1),
        attention_case([10], 2, 64, name="few_queries", key_lengths=[200], dropout_p=0.1),
        attention_case([0, 300, 5], 1, 8, name="no_queries", key_lengths=[70, 20, 0]),
    ]


def _cross_entropy_cases() -> list[Case]:
    return [
        cross_entropy_case(0, 24, 50, name="empty"),
        cross_entropy_case(1, 24, 50, name="one_token", labelled=1.0),
        cross_entropy_case(9, 24, 50, name="none_labelled", labelled=0.0),
        cross_entropy_case(40, 24, 1, name="one_class", labelled=1.0),
        cross_entropy_case(37, 101, 333, name="odd"),
        # More than one chunk of the vocabulary on a GPU, whose rows are not all there.
        cross_entropy_case(30, 32, 9001, name="several_chunks"),
        # Fewer classes than a tile, rows of 16 bytes.
        cross_entropy_case(9, 16, 50, name="few_classes", labelled=1.0),
        # Blocks of tokens none of which is labelled, in numbers; and labels in more than one list.
        cross_entropy_case(300, 24, 333, name="few_labelled", labelled=0.15),
        cross_entropy_case(1500, 8, 50, name="several_lists", labelled=0.15),
        cross_entropy_case(37, 101, 333, name="no_bias", bias=False),
        cross_entropy_case(37, 101, 333, name="sum", reduction="sum"),
        cross_entropy_case(150, 64, 1000, name="several_blocks", labelled=1.0),
        cross_entropy_case(37, 64, 1000, name="confident", spread=30.0),
        # More shares of the vocabulary than one, on every instruction set, the last one not full.
        cross_entropy_case(30, 70, 3001, name="several_shares", labelled=1.0),
        cross_entropy_case(21, 768, 200, name="base"),
        cross_entropy_case(37, 101, 333, name="sliced", layout="sliced"),
        cross_entropy_case(37, 101, 333, name="transposed", layout="transposed"),
        cross_entropy_case(37, 24, 50, name="int32_labels", label_dtype=torch.int32),
    ]


CASES: dict[str, list[Case]] = {
    "attention": _attention_cases(),
    "layernorm": _layernorm_cases(),
    "gelu": _gelu_cases(),
    "embedding": _embedding_cases(),
    "cross_entropy": _cross_entropy_cases(),
    "dropout": _dropout_cases(),
}


# A GPU kernel that loops over tiles has a fixed number of programs, 1056 on the largest GPU: these
# are so many rows that each program has several tiles, or several chunks of them go through one
# scratch tensor. For GPUs: an interpreter takes minutes.
MANY_TILES: dict[str, Case] = {
    "layernorm": layernorm_case(9001, 768, name="many_tiles", dropout_p=0.1),
    "gelu": gelu_case(9001, 1040, name="many_tiles"),
    "embedding": embedding_case(9001, 768, name="many_tiles", vocabulary=500, dropout_p=0.1),
    "cross_entropy": cross_entropy_case(2600, 768, 9001, name="many_tiles"),
}


# What each backend's gates run in; "mixed" keeps the parameters in float32.
PRECISIONS = {
    "reference": ("float32", "bfloat16", "float16", "bfloat16-mixed"),
    "cpu": ("float32", "bfloat16", "bfloat16-mixed"),
    "triton": ("float32", "float16", "bfloat16", "float16-mixed", "bfloat16-mixed"),
    "cuda": ("float32", "float16", "bfloat16", "float16-mixed", "bfloat16-mixed"),
}


def device_of(backend: str) -> str:
    """Where a backend's gates run; a GPU backend's on the CPU while it is interpreted or
    emulated."""
    on_cpu = {"triton": triton.interpreted, "cuda": cuda.emulated()}
    return "cpu" if on_cpu.get(backend, True) else "cuda"


# What a backend does not take, of dtypes and cases by name. That it says so is tested.
NOT_TAKEN = {("attention", "cuda"): ("float32", "widest_head")}


def cases_of(word: str, backend: str) -> list[Case]:
    """The cases that a backend takes."""
    return [case for case in CASES[word] if case.name not in NOT_TAKEN.get((word, backend), ())]


def precisions_of(word: str, backend: str) -> list[str]:
    """What the gates run in, here: Triton's interpreter has no right bfloat16, and an op without
    parameters no mixed precision."""
    wrong = "bfloat16" if backend == "triton" and triton.interpreted else None
    parameters = any(case.parameters for case in CASES[word])
    return [
        name
        for name in PRECISIONS[backend]
        if name.partition("-")[0] != wrong
        and (parameters or "-" not in name)
        and name not in NOT_TAKEN.get((word, backend), ())
    ]


def gate_grid(word: str) -> list[tuple[str, str, str]]:
    """``(backend, instruction set, precision)`` for every implementation of ``word``.

    The instruction set is "" for backends that have none.
    """
    grid = []
    for backend in TABLE[word]:
        isas = cpu.library().isas() if backend == "cpu" else [""]
        grid += [
            (backend, isa, precision) for isa in isas for precision in precisions_of(word, backend)
        ]
    return grid


def run_gates(
    word: str, backend: str, precision: str, *, cases: Sequence[Case] | None = None
) -> None:
    """Every case of ``word``, or those given, through its gate.

    Raises:
        AssertionError: naming each comparison that failed.
    """
    name, _, mixed = precision.partition("-")
    failures = []
    for case in cases_of(word, backend) if cases is None else cases:
        if mixed and not case.parameters:
            continue
        try:
            run_gate(
                case,
                getattr(torch, name),
                backend,
                mixed=bool(mixed),
                device=device_of(backend),
            )
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
    assert not failures, "\n".join(failures)


def gates_are_red(word: str, backend: str) -> bool:
    """Whether any case of ``word`` fails its gate, or cannot be launched, in one of the backend's
    dtypes. Leaves no records."""
    recorded = len(gate_records)
    try:
        # Case by case, since a kernel may be used in one dtype only.
        for case in cases_of(word, backend):
            for precision in precisions_of(word, backend):
                if "-" not in precision:
                    run_gate(case, getattr(torch, precision), backend, device=device_of(backend))
    except (AssertionError, KernelError):
        return True
    finally:
        del gate_records[recorded:]
    return False
