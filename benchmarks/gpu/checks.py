"""What a gate does not see: repeats, compilation, graphs, streams, devices, sizes, bad accesses."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertfast import testing
from bertfast.testing import Case

from .place import Place, benchmark_of

FOLDER = Path(__file__).parent
# The exit code where the compiler cannot build the emulation, which wants GCC 12 for its _Float16.
NOT_BUILT = 76
# Small cases, as an emulation can take them.
SMALL = Place(dry=True)
Result = dict[str, Any]
Check = Callable[[Place, str, str], Result]


def is_sticky(error: BaseException) -> bool:
    """Whether CUDA will answer every later call in this process with this error, too."""
    said = ("CUDA error", "Triton Error [CUDA]")
    return any(words in str(error) for words in said) or type(error).__name__ == "AcceleratorError"


# Of attention, a case for each of its kernels: whole heads, and two passes in two widths.
OF_ATTENTION = ("several_blocks", "two_passes", "full_width")


def _cases(place: Place, word: str) -> list[Case]:
    """The cases with the most in them; on a GPU the one with more tiles than programs."""
    cases = testing.CASES[word]
    if word == "attention":
        return [case for case in cases if case.name in OF_ATTENTION]
    if not place.dry and word in testing.MANY_TILES:
        return [testing.MANY_TILES[word]]
    for wanted in ("two_threads-p0.1", "two_threads", "several_blocks", "odd"):
        for case in cases:
            if case.name.startswith(wanted):
                return [case]
    return cases[-1:]


class _Call:
    """Forward and backward of some cases, on tensors that stay where they are."""

    def __init__(self, cases: list[Case], backend: str, device: str, precision: str) -> None:
        self.backend = backend
        self.parts = []
        for case in cases:
            tensors = case.inputs(getattr(torch, precision), device=device)
            leaves = [tensors[name].detach().requires_grad_() for name in case.grads]
            tensors |= dict(zip(case.grads, leaves, strict=True))
            out = case.op(tensors, backend).detach()
            dout = testing.upstream_gradient(out, "contiguous")
            self.parts.append((case, tensors, leaves, dout))

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for _, _, leaves, _ in self.parts for leaf in leaves]

    def __call__(self) -> list[Tensor]:
        results = []
        for case, tensors, leaves, dout in self.parts:
            out = case.op(tensors, self.backend)
            results += [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        return results


def _call(place: Place, word: str, backend: str, device: str | None = None) -> _Call:
    precision = place.precision(word, backend)
    return _Call(_cases(place, word), backend, device or place.device, precision)


def _same(results: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def repeats(place: Place, word: str, backend: str) -> Result:
    """Fifty times the same bits."""
    call, count = _call(place, word, backend), 2 if place.dry else 50
    first = [x.clone() for x in call()]
    return {"green": all(_same(call(), first) for _ in range(count - 1)), "repeats": count}


def compiled(place: Place, word: str, backend: str) -> Result:
    """The gate through torch.compile, in one graph."""
    compiler = "aot_eager" if place.dry else "inductor"
    dtype = getattr(torch, place.precision(word, backend))
    for case in _cases(place, word):
        try:
            call = torch.compile(case.op, fullgraph=True, backend=compiler)
            testing.run_gate(case, dtype, backend, device=place.device, apply=call)
        finally:
            torch.compiler.reset()
    return {"green": True, "compiler": compiler}


def graph(place: Place, word: str, backend: str) -> Result:
    """Captured once, replayed twice, the same bits as without."""
    if place.dry:
        return {"left_out": "the CPU has no graphs"}
    call = _call(place, word, backend)
    expected = [x.clone() for x in call()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = call()
    green = True
    for _ in range(2):
        for x in results:
            x.zero_()
        captured.replay()
        torch.cuda.synchronize()
        green = green and _same(results, expected)
    return {"green": green}


def stream(place: Place, word: str, backend: str) -> Result:
    """On another stream, behind work that takes long: a launch on the wrong one would not wait."""
    if place.dry:
        return {"left_out": "the CPU has no streams"}
    call = _call(place, word, backend)
    expected = [x.clone() for x in call()]
    kept = [x.detach().clone() for x in call.leaves]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for leaf in call.leaves:
            leaf.zero_()
        # The right inputs come only after this, on this stream.
        torch.cuda._sleep(200_000_000)
        for leaf, value in zip(call.leaves, kept, strict=True):
            leaf.copy_(value)
    with torch.cuda.stream(side):
        results = call()
    side.synchronize()
    return {"green": _same(results, expected)}


def device(place: Place, word: str, backend: str) -> Result:
    """On the second device while the first one is current."""
    if place.dry or torch.cuda.device_count() < 2:
        return {"left_out": "there is one device"}
    first, second = (_call(place, word, backend, f"cuda:{i}")() for i in range(2))
    unmoved = torch.cuda.current_device() == 0 and torch.empty(1, device="cuda").device.index == 0
    return {"green": unmoved and _same([x.to("cuda:0") for x in second], first)}


def large(place: Place, word: str, backend: str) -> Result:
    """Behind more elements than an int32 can count."""
    elements = 1 << 14 if place.dry else (1 << 31) + (1 << 20)
    got, expected = benchmark_of(word).large(backend, place.device, elements)
    return {"green": torch.equal(got, expected), "elements": elements}


def _sanitizer(tool: str, place: Place, word: str, backend: str) -> Result:
    """A few gates under one of compute-sanitizer's tools, in a process of their own, for no longer
    than the run has left."""
    program = shutil.which("compute-sanitizer")
    if place.dry or program is None:
        return {"left_out": "compute-sanitizer is not there"}
    command = [
        *(program, "--tool", tool, "--error-exitcode", "99", "--launch-timeout", "120"),
        *(sys.executable, "-P", str(FOLDER), "--under-sanitizer", word, backend),
    ]
    # torch's allocator would hide where a tensor ends.
    return _in_a_process(place, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _in_a_process(place: Place, command: list[str], environment: dict[str, str]) -> Result:
    seconds = max(30.0, place.seconds_left() - 20.0)
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"green": False, "detail": f"still running after {seconds:.0f} s"}
    green = done.returncode == 0
    return {"green": green, "status": done.returncode, "detail": done.stdout[-500:]}


def emulation(place: Place, word: str, backend: str) -> Result:
    """The same sources emulated on the CPU, which is all that CI sees of them, give what the device
    gives: zeros at the same places, so the same dropout mask, and the rest within what rounding in
    another order explains."""
    if backend != "cuda":
        return {"left_out": "it is not emulated"}
    precision = place.precision(word, backend)
    call = _Call(_cases(SMALL, word), backend, place.device, precision)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.pt"
        command = [sys.executable, "-P", str(FOLDER), "--emulated", word, str(file)]
        done = _in_a_process(place, [*command, precision], {})
        if done.get("status") == NOT_BUILT:
            return {"left_out": f"the emulation cannot be built here: {done['detail']}"}
        if not done["green"]:
            return done
        emulated = torch.load(file)
    worst = 0.0
    for ours, theirs in zip(call(), emulated, strict=True):
        ours = ours.cpu()
        if not torch.equal(ours == 0, theirs == 0):
            return {"green": False, "detail": "zeros at other places: another mask"}
        scale = theirs.abs().max().double() * torch.finfo(theirs.dtype).eps
        worst = max(worst, float((ours.double() - theirs.double()).abs().max() / scale))
    return {"green": worst <= 8, "worst": worst}


def emulated(word: str, path: str, precision: str) -> None:
    """What :func:`emulation` starts; writes its results."""
    torch.save(_Call(_cases(SMALL, word), "cuda", "cpu", precision)(), path)


def under_sanitizer(word: str, backend: str) -> None:
    """What compute-sanitizer watches."""
    of_kernels = _cases(SMALL, word) if word == "attention" else []
    for name in ("bfloat16", "float32"):
        if name in testing.precisions_of(word, backend):
            for case in [*testing.cases_of(word, backend)[::6], *of_kernels]:
                testing.run_gate(case, getattr(torch, name), backend, device="cuda")


CHECKS: dict[str, Check] = {
    "repeats": repeats,
    "compile": compiled,
    "graph": graph,
    "stream": stream,
    "device": device,
    "large": large,
    "emulation": emulation,
    **{tool: partial(_sanitizer, tool) for tool in ("memcheck", "racecheck", "synccheck")},
}
