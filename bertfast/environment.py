"""What ``bertfast env`` shows: this machine, what was built for it, and what runs.

Everything here answers on a broken installation too: a part that cannot be found out says why
instead of raising. Nothing is imported that bertfast does not need.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_REQUIRED = ("torch", "numpy", "tokenizers", "safetensors", "tqdm")
_OPTIONAL = ("transformers", "triton", "sentence-transformers", "huggingface-hub")

# The CPU features that decide which kernels run, or that later kernels will ask for.
_CPU_FEATURES = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)


def collect() -> dict[str, Any]:
    """Everything ``bertfast env`` knows, as plain JSON values."""
    return {
        "versions": _versions(),
        "system": _try(_system),
        "cpu": _try(_cpu),
        "torch": _try(_torch),
        "kernels": _try(_kernels),
        "built": _try(_built),
        "gpus": _try(_gpus),
        "environment": _variables(),
        "ops": _try(_ops),
    }


def render(info: dict[str, Any]) -> str:
    """:func:`collect`'s answer for people."""
    lines: list[str] = []

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        lines.extend(["", title] if lines else [title])
        width = max((len(name) for name, _ in rows), default=0)
        lines.extend(f"  {name:<{width}}  {value}".rstrip() for name, value in rows)

    def failed(part: Any) -> bool:
        return isinstance(part, dict) and set(part) == {"error"}

    section("versions", [(name, v or "not installed") for name, v in info["versions"].items()])

    system, cpu, torch = info["system"], info["cpu"], info["torch"]
    rows = [("system", system["error"] if failed(system) else system["os"])]
    if failed(cpu):
        rows.append(("cpu", cpu["error"]))
    else:
        physical = f"{cpu['physical_cores']} physical, " if cpu["physical_cores"] else ""
        rows += [
            ("cpu", f"{cpu['model']} ({cpu['architecture']})"),
            ("cores", f"{physical}{cpu['logical_cores']} logical, {cpu['usable_cores']} usable"),
            ("features", " ".join(cpu["features"]) or "unknown"),
        ]
    if failed(torch):
        rows.append(("torch", torch["error"]))
    else:
        rows += [
            ("torch threads", str(torch["threads"])),
            ("torch cpu capability", torch["cpu_capability"]),
            ("torch cuda", torch["cuda"] or "not compiled in"),
        ]
    section("machine", rows)

    section("native kernels", _kernel_rows(info["kernels"], info["built"]))

    gpus = info["gpus"]
    if failed(gpus):
        rows = [("", gpus["error"])]
    elif not gpus:
        rows = [("", "none")]
    else:
        rows = [
            (
                f"{gpu['index']}",
                f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB",
            )
            for gpu in gpus
        ]
    section("gpus", rows)

    section("environment variables", list(info["environment"].items()) or [("", "none set")])

    ops = info["ops"]
    if failed(ops):
        section("ops", [("", ops["error"])])
    else:
        rows = []
        for row in ops:
            rows.append((row["op"], row["backend"] or "no backend"))
            reasons: dict[str, list[str]] = {}
            for name, why in row["passed_over"].items():
                reasons.setdefault(why, []).append(name)
            rows += [("", f"not {', '.join(names)}: {why}") for why, names in reasons.items()]
        section("ops", rows)
    return "\n".join(lines)


def _kernel_rows(kernels: dict[str, Any], built: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if kernels.get("error"):
        rows.append(("cpu kernels", f"not available: {kernels['error']}"))
    else:
        rows.append(("cpu kernels", f"{kernels['isa']} in use, of {', '.join(kernels['isas'])}"))
    if built.get("error"):
        return [*rows, ("built", built["error"])]
    for name, part in built.items():
        if not part.get("built"):
            rows.append((f"{name} build", f"not built: {part.get('reason', 'no reason recorded')}"))
            rows += [("", line) for line in part.get("output", [])]
            continue
        made_for = ", ".join(part.get("isas") or part["architectures"])
        rows.append((f"{name} build", f"{made_for} by {part['compiler']}"))
        if name != "cpu":
            continue
        threads = "yes" if part["openmp"] else f"no, single-threaded: {part['openmp_reason']}"
        rows.append((f"{name} openmp", threads))
        rows += [(f"{name} without", f"{k}: {why}") for k, why in part["skipped_isas"].items()]
    return rows


def _try(part: Callable[[], Any]) -> Any:
    # Any exception: a half-installed torch raises whatever it likes, OSError and AttributeError
    # among it, and this command is what one runs to find out.
    try:
        return part()
    except Exception as error:
        return {"error": _describe(error)}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _versions() -> dict[str, str | None]:
    from bertfast import __version__

    versions: dict[str, str | None] = {
        "bertfast": __version__,
        "python": platform.python_version(),
    }
    for name in (*_REQUIRED, *_OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _system() -> dict[str, str]:
    return {
        "os": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "bertfast": str(Path(__file__).parent),
    }


def _cpu() -> dict[str, Any]:
    logical = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    model, features, physical = _cpuinfo()
    return {
        "model": model or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "physical_cores": physical,
        "logical_cores": logical,
        "usable_cores": usable,
        "features": [name for name in _CPU_FEATURES if name in features],
    }


def _cpuinfo() -> tuple[str, set[str], int | None]:
    """The CPU's name, its feature words and the number of its physical cores, where known."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string"), set(), int(_sysctl("hw.physicalcpu") or 0)
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return "", set(), None
    model = package = ""
    features: set[str] = set()
    cores: set[tuple[str, str]] = set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        name, value = name.strip(), value.strip()
        if name == "model name":
            model = model or value
        elif name in ("flags", "Features"):
            features = features or set(value.split())
        elif name == "physical id":
            package = value
        elif name == "core id":
            cores.add((package, value))
    return model, features, len(cores) or None


def _sysctl(name: str) -> str:
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True)
    return done.stdout.strip()


def _torch() -> dict[str, Any]:
    import torch

    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
    }


def _kernels() -> dict[str, Any]:
    """The CPU kernels as loaded: the instruction set in use, and those that this CPU could use."""
    module = importlib.import_module("bertfast._cpu")
    return {"isa": module.isa(), "isas": list(module.isas())}


def _built() -> dict[str, Any]:
    """What setup.py wrote down when this copy of the package was built."""
    path = Path(__file__).with_name("_build_info.json")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is missing: this is a source tree that was never installed; "
            "run `pip install .`"
        )
    info: dict[str, Any] = json.loads(path.read_text())
    return info


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _variables() -> dict[str, str]:
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith("BERTFAST_")}


def _ops() -> list[dict[str, Any]]:
    from bertfast.backends import explain

    return [
        {"op": row.op, "backend": row.backend, "passed_over": dict(row.passed_over)}
        for row in explain()
    ]
