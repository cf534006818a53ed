"""Where the units run: a GPU, or for a dry run the CPU, where GPU kernels are interpreted."""

import importlib
import subprocess
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from bertfast import testing
from bertfast.backends import ON_GPU, TABLE, kernel
from bertfast.kernels.device import architecture

from .. import kernels


def benchmark_of(word: str) -> ModuleType:
    """The module that says what is timed of an op."""
    return importlib.import_module(f"benchmarks.bench_{word}")


@dataclass(frozen=True)
class Place:
    """Attributes:
    dry: whether only the way from gate to report is to be proved, on small inputs.
    until: when the run has to be over, on ``time.monotonic``'s clock.
    """

    dry: bool
    until: float = float("inf")

    def seconds_left(self) -> float:
        return min(self.until - time.monotonic(), 300.0)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def precision(self, word: str, backend: str) -> str:
        """What the checks run in that look at one only."""
        wanted = ("float32", "float16") if self.dry else ("bfloat16",)
        return next(name for name in wanted if name in testing.precisions_of(word, backend))

    def backends(self, word: str) -> list[str]:
        """The GPU backends that run ``word`` here, in some dtype."""
        return [
            name
            for name in TABLE[word]
            if name in ON_GPU
            and any(self.supports(word, name, dtype) for dtype in testing.precisions_of(word, name))
        ]

    def supports(self, word: str, backend: str, precision: str) -> bool:
        x = torch.empty(1, 1, 64, device=self.device, dtype=kernels.precision(precision)[0])
        return kernel(word, backend).supports(x) is None

    def absent(self) -> list[str]:
        """The GPU backends that do not run an op they have a kernel for, and why."""
        x = torch.empty(1, 1, 64, device=self.device, dtype=torch.float16)
        reasons: dict[str, list[str]] = {}
        for word, names in TABLE.items():
            for name in names:
                if name in ON_GPU and name not in self.backends(word):
                    reason = f"{name}: {kernel(word, name).supports(x)}"
                    reasons.setdefault(reason, []).append(word)
        return [f"{reason} ({', '.join(words)})" for reason, words in reasons.items()]

    def words(self) -> list[str]:
        return [word for word in TABLE if self.backends(word)]

    def refuse_if_impossible(self) -> None:
        if not self.dry and not torch.cuda.is_available():
            raise SystemExit("make gpu: this torch sees no GPU; DRY=1 proves the command without")
        if not self.words():
            raise SystemExit(
                "make gpu: no GPU backend runs here; `bertfast env` says why (with DRY=1, "
                "TRITON_INTERPRET=1 must be set)"
            )

    def describe(self) -> dict[str, Any]:
        """What the report says of the machine."""
        import triton

        about: dict[str, Any] = {
            "dry": self.dry,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "absent": self.absent(),
        }
        if not self.dry:
            properties = torch.cuda.get_device_properties(0)
            about |= {
                "gpu": properties.name,
                "gpus": torch.cuda.device_count(),
                "architecture": architecture(0),
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "driver": _driver(),
            }
        return about


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"
