"""All ops are timed alike: one case on bertfast, on torch as one would write it, and compiled."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertfast import testing
from bertfast.backends import BACKENDS, TABLE
from bertfast.testing import Case, Tensors

from .turns import Call, Calls, Turns

DTYPES = ["float32", "bfloat16"]
IMPLEMENTATIONS = ["bertfast", "eager", "compile"]
DIRECTIONS = ["forward", "backward"]


def precision(name: str) -> tuple[torch.dtype, bool]:
    """``"bfloat16-mixed"`` is bfloat16 activations on float32 parameters, as in the gates."""
    dtype, _, mixed = name.partition("-")
    return getattr(torch, dtype), bool(mixed)


@dataclass(frozen=True)
class Peer:
    """Another way to compute what an op computes.

    Attributes:
        call: from the inputs to the output.
        inputs: makes the inputs for a precision, in the layout that suits the peer best.
        grads: names of the inputs to differentiate.
    """

    call: Callable[[Tensors], Tensor]
    inputs: Callable[[str], Tensors]
    grads: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """One op at one size.

    Attributes:
        case: what is timed; its name is the size and the options.
        peers: by name; ``"compile"`` is made of ``"eager"``.
    """

    case: Case
    peers: dict[str, Peer]

    @property
    def backend(self) -> str:
        names = TABLE[self.case.word]
        return "cpu" if "cpu" in names else names[0]

    def run_gate(self, dtype: str, backend: str | None = None, device: str = "cpu") -> None:
        """No speed is reported from a red gate, and it runs at the very size that is timed."""
        to, mixed = precision(dtype)
        try:
            testing.run_gate(self.case, to, backend or self.backend, mixed=mixed, device=device)
        finally:
            testing._expected.cache_clear()  # at these sizes it would keep gigabytes

    def implementation(self, name: str) -> Peer:
        if name == "bertfast" or name in BACKENDS:
            backend = self.backend if name == "bertfast" else name
            return peer_of(self.case, lambda t: self.case.op(t, backend))
        if name == "compile":
            eager = self.peers["eager"]
            return dataclasses.replace(eager, call=torch.compile(eager.call, dynamic=False))
        return self.peers[name]

    def call(self, name: str, direction: str, dtype: str, device: str = "cpu") -> Call:
        """One implementation, ready to be timed: forward without gradients, training forward with
        them, backward on a graph that is there already, or both. ``name`` may be a backend."""
        peer = self.implementation(name)
        tensors = {key: value.to(device) for key, value in peer.inputs(dtype).items()}

        def forward() -> Tensor:
            with torch.no_grad():
                return peer.call(tensors)

        if direction == "forward":
            return forward
        wanted = [tensors[name].requires_grad_() for name in peer.grads]
        if direction == "training forward":
            return lambda: peer.call(tensors)
        dout = torch.randn_like(forward())
        if direction == "backward":
            out = peer.call(tensors)
            return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)
        return lambda: torch.autograd.grad(peer.call(tensors), wanted, dout)


def peer_of(case: Case, call: Callable[[Tensors], Tensor]) -> Peer:
    """A peer that takes the case's own inputs."""

    def inputs(dtype: str) -> Tensors:
        to, mixed = precision(dtype)
        return case.inputs(to, mixed=mixed)

    return Peer(call, inputs, case.grads)


def row_subject(case: Case, eager: Callable[[Tensors], Tensor]) -> Subject:
    return Subject(case, {"eager": peer_of(case, eager)})


def bytes_of(shape: str, dtype: str) -> int:
    """The size of a tensor of the shape ``"ROWSxCOLUMNS"``."""
    return math.prod(map(int, shape.split("x"))) * precision(dtype)[0].itemsize


def time_kernel(
    turns: Turns,
    subject: Subject,
    implementation: str,
    direction: str,
    dtype: str,
    *,
    implementations: list[str] = IMPLEMENTATIONS,
    **work: Any,
) -> None:
    """Time one direction of one implementation, after the gate.

    Args:
        work: ``flops`` or ``bytes`` of the call, for its rate, and what else the JSON should say.
            Bytes are what must at least be read and written.
    """

    def prepare() -> Calls:
        subject.run_gate(dtype)
        return {name: subject.call(name, direction, dtype) for name in implementations}

    case = subject.case
    turns.info.update(word=case.word, case=case.name, direction=direction, dtype=dtype, **work)
    turns.time(f"{case.word} {direction} {case.name} {dtype}", implementation, prepare)
