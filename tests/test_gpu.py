"""`make gpu`, as far as it goes without a GPU: its report, its memory, what a red gate does."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Last on the path, so that the source tree's bertfast does not stand in for the installed one.
sys.path.append(str(ROOT))
checks, main, report, store, units = (
    importlib.import_module(f"benchmarks.gpu.{name}")
    for name in ("checks", "__main__", "report", "store", "units")
)
Place = importlib.import_module("benchmarks.gpu.place").Place


@pytest.fixture
def data():
    """A run on a GPU, as it would be kept: one op green, one with a red check."""
    green = {"green": True, "comparisons": 3, "worst": 0.5, "worst_at": "x", "failures": []}
    bench = {
        "green": True, "dtype": "bfloat16", "work": {"bytes": 10**9}, "target": {"triton": 0.8},
        "ahead": {"triton": {"compile": 1.0, "absent": 9.0}}, "memory": {},
    }  # fmt: skip
    seconds = {"triton": 1e-3, "eager": 4e-3, "compile": 2e-3}
    about = {
        "dry": False, "gpu": "Some GPU", "multiprocessors": 132, "memory_gib": 140.0,
        "driver": "1", "torch": "2", "triton": "3", "cuda": "13",
        "absent": ["cuda: no nvcc (gelu, dropout)"],
    }  # fmt: skip
    return {
        "fingerprint": "f",
        "about": about,
        "results": {
            "gates/gelu/triton/bfloat16": dict(green),
            "checks/gelu/triton/graph": {"green": True},
            "checks/gelu/triton/device": {"left_out": "there is one device"},
            "gates/dropout/triton/bfloat16": dict(green),
            "checks/dropout/triton/stream": {"green": False},
            "bench/ceilings": {
                "green": True,
                "bytes": 10**9,
                "flops": 10**12,
                "seconds": {"copy": 0.8e-3, "gemm": 1e-3},
            },
            "bench/gelu/forward x": {**bench, "seconds": dict(seconds)},
            "bench/dropout/forward x": {**bench, "seconds": dict(seconds)},
            "bench/gelu/overhead": {"green": True, "host_us": {"triton grad": 20.0}},
            "bench/embedding/forward x": {**bench, "seconds": dict(seconds)},
        },
    }


def test_the_report(data):
    shown = report.markdown(report.publish(data, data["results"]))
    line = "| gelu | forward x | triton | 1000.0 µs | 1.00 TB/s | 80% | 80%, compile 1×, "
    line += "absent 9× (did not run) | yes | "
    assert line + "eager 4.00×, compile 2.00× |" in shown
    assert "driver 1, torch 2, Triton 3" in shown
    assert "Did not run here: cuda: no nvcc (gelu, dropout)." in shown
    assert "device (there is one device)" in shown
    assert "| gelu | triton grad | 20.0 µs |" in shown


def test_a_missed_target_is_said(data):
    data["results"]["bench/gelu/forward x"]["target"] = {"triton": 0.9}
    shown = report.markdown(report.publish(data, data["results"]))
    assert "| 80% | 90%, compile 1×, absent 9× (did not run) | **no**: 80% |" in shown


def test_a_target_without_its_ceiling_is_not_met(data):
    del data["results"]["bench/ceilings"]
    shown = report.markdown(report.publish(data, data["results"]))
    assert "| **no**: the ceiling is not known |" in shown


def test_targets_of_time_and_memory(data):
    row = data["results"]["bench/gelu/forward x"]
    row["ahead"], row["memory"] = {"triton": {"eager": 4.5, "compile": 2.0}}, {"eager": 0.1}
    row["working_bytes"] = {"triton": 30e6, "eager": 200e6}
    shown = report.markdown(report.publish(data, data["results"]))
    assert "80%, eager 4.5×, compile 2×, 10% of the memory of eager" in shown
    assert "| **no**: eager 4.00×, 15% of the memory of eager |" in shown
    assert "| triton 30, eager 200 |" in shown
    row["working_bytes"]["triton"], row["ahead"]["triton"]["eager"] = 20e6, 4.0
    shown = report.markdown(report.publish(data, data["results"]))
    assert "10% of the memory of eager | yes |" in shown


def test_the_ceiling_is_the_lower_one(data):
    """10^12 FLOP take a millisecond, 10^9 bytes 0.8."""
    row = data["results"]["bench/gelu/forward x"]
    for work, share in (
        ({"flops": 5 * 10**11, "bytes": 10**9}, "80%"),
        ({"flops": 10**12}, "100%"),
    ):
        row["work"] = work
        assert f"TFLOP/s | {share} |" in report.markdown(report.publish(data, data["results"]))


def test_a_red_gate_hides_its_speed(data):
    published = report.publish(data, data["results"])
    assert "triton" not in published["results"]["bench/dropout/forward x"]["seconds"]
    shown = report.markdown(published)
    assert "| dropout | forward x | triton | hidden: checks stream |" in shown
    assert "**red**: checks stream" in shown
    assert "| embedding | forward x | triton | hidden: its gates did not run |" in shown
    data["results"]["gates/gelu/triton/float32"] = {"green": False, "failures": ["x"]}
    published = report.publish(data, data["results"])
    assert "triton" not in published["results"]["bench/gelu/forward x"]["seconds"]
    assert "host_us" not in json.dumps(published["results"]["bench/gelu/overhead"]["host_us"])
    assert published["results"]["bench/gelu/overhead"]["host_us"] == {}
    # What was kept is not touched.
    assert data["results"]["bench/gelu/forward x"]["seconds"]["triton"] == 1e-3


def test_a_gate_or_check_that_did_not_run_hides_it_too(data):
    expected = [*data["results"], "checks/gelu/triton/repeats"]
    published = report.publish(data, expected)
    assert published["verdicts"]["gelu/triton"] == ["checks repeats did not run"]
    assert "triton" not in published["results"]["bench/gelu/forward x"]["seconds"]
    assert "hidden: checks repeats did not run" in report.markdown(published)


def test_a_target_is_missed_where_torch_compile_is_faster(data):
    data["results"]["bench/gelu/forward x"]["seconds"]["compile"] = 0.5e-3
    shown = report.markdown(report.publish(data, data["results"]))
    assert "| **no**: compile 0.50× | eager 4.00×, compile 0.50× |" in shown


def test_the_faster_backend_wins_where_both_are_green(data, tmp_path):
    """cuda is twice as fast forward, and takes a tenth longer backward."""
    results = data["results"]
    results["gates/gelu/cuda/bfloat16"] = results["gates/gelu/triton/bfloat16"]
    times = {"forward x": (1e-3, 0.5e-3), "backward x": (1e-3, 1.1e-3)}
    for name, (triton, cuda) in times.items():
        results[f"bench/gelu/{name}"] = {
            **results["bench/gelu/forward x"],
            "length": 3072,
            "seconds": {"triton": triton, "cuda": cuda, "eager": 1e-9},
        }
    # Of an op that one GPU backend has there is nothing to choose.
    results["bench/embedding/forward x"]["length"] = 768
    shown = report.publish(data, results)
    assert report.winners(shown) == {"gelu": {"3072": "cuda"}}
    assert "| gelu | 3072 | cuda |" in report.markdown(shown)
    results["bench/gelu/backward x"]["seconds"]["cuda"] = 2.1e-3
    assert report.winners(report.publish(data, results)) == {"gelu": {"3072": "triton"}}
    # Red somewhere, or not timed: no winner.
    results["bench/gelu/backward x"]["seconds"]["cuda"] = 0.1e-3
    del results["bench/gelu/forward x"]["seconds"]["cuda"]
    assert report.winners(report.publish(data, results)) == {"gelu": {"3072": "triton"}}
    results["gates/gelu/triton/bfloat16"] = {"green": False}
    assert report.winners(report.publish(data, results)) == {}
    file = tmp_path / "winners.json"
    file.write_text('{"sm_80": {"gelu": {"1": "triton"}}, "sm_90": {"dropout": {"1": "triton"}}}')
    results["gates/gelu/triton/bfloat16"] = {"green": True}
    report.keep_winners(file, "sm_90", report.publish(data, results))
    kept = json.loads(file.read_text())
    assert kept["sm_80"] == {"gelu": {"1": "triton"}}
    assert kept["sm_90"] == {"gelu": {"3072": "triton"}, "dropout": {"1": "triton"}}
    # What was timed and is red has no winner any more.
    results["gates/gelu/triton/bfloat16"] = {"green": False}
    report.keep_winners(file, "sm_90", report.publish(data, results))
    assert json.loads(file.read_text())["sm_90"] == {"dropout": {"1": "triton"}}


def test_emulation_and_device_are_compared(monkeypatch):
    """With the emulation as the device, which has it say that a mask is another one."""
    place = Place(dry=True)
    assert checks.emulation(place, "dropout", "triton") == {"left_out": "it is not emulated"}
    assert checks.emulation(place, "dropout", "cuda") == {"green": True, "worst": 0.0}
    call = checks._Call.__call__
    monkeypatch.setattr(checks._Call, "__call__", lambda self: [x.flip(0) for x in call(self)])
    assert "another mask" in checks.emulation(place, "dropout", "cuda")["detail"]
    monkeypatch.setattr(checks._Call, "__call__", lambda self: [1.01 * x for x in call(self)])
    assert checks.emulation(place, "dropout", "cuda")["green"] is False


def test_failures_are_named(data):
    assert report.failures(data["results"]) == ["checks/dropout/triton/stream: red"]


def test_a_gate_at_the_timed_size_counts(data):
    """The kernel was not even timed."""
    row = data["results"]["bench/gelu/forward x"]
    row.update(green=False, red={"triton": "too large an error"})
    del row["seconds"]["triton"]
    assert "| hidden: too large an error |" in report.markdown(
        report.publish(data, data["results"])
    )


def test_results_are_kept_for_the_same_sources_and_machine_only(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    store.Store(path, {"gpu": "a"}).put("gates/x", {"green": True})
    assert store.Store(path, {"gpu": "a"}).results == {"gates/x": {"green": True}}
    assert store.Store(path, {"gpu": "b"}).results == {}
    assert store.Store(path, {"gpu": "a"}, fresh=True).results == {}
    monkeypatch.setattr(store, "ROOT", tmp_path)
    (tmp_path / "bertfast").mkdir()
    before = store.fingerprint({})
    (tmp_path / "bertfast" / "new.py").write_text("")
    assert store.fingerprint({}) != before


def test_every_op_with_a_gpu_kernel_is_in_it():
    place = Place(dry=True)
    words = place.words()
    assert set(words) == {
        "attention", "layernorm", "gelu", "embedding", "cross_entropy", "dropout"
    }  # fmt: skip
    assert place.backends("layernorm") == ["triton", "cuda"]
    keys = [unit.key for unit in units.all_units(place, words)]
    assert len(keys) == len(set(keys))
    for word in words:
        for backend in place.backends(word):
            assert f"gates/{word}/{backend}/float16" in keys
            for check in checks.CHECKS:
                assert f"checks/{word}/{backend}/{check}" in keys
        assert any(key.startswith(f"bench/{word}/") for key in keys)
        for entry in units.benchmark_of(word).on_gpu(dry=False):
            assert entry.work
    assert [key.split("/")[0] for key in keys] == sorted(
        (key.split("/")[0] for key in keys), key=units.PARTS.index
    )


def test_a_unit_that_breaks_is_red_and_the_next_one_runs(tmp_path, capsys):
    kept = store.Store(tmp_path / "gpu.json", {})

    def breaks():
        raise ValueError("no")

    unit = units.Unit("gates", "gelu", "triton", "float32", breaks)
    assert main.run(unit, kept, checks) is False
    assert kept.results[unit.key] == {"green": False, "error": "ValueError: no"}
    capsys.readouterr()
    for message in ("CUDA error: an illegal memory access", "Triton Error [CUDA]: an illegal"):
        assert checks.is_sticky(RuntimeError(message))
    assert not checks.is_sticky(ValueError("no"))


def test_a_unit_that_ends_the_process_is_not_run_again(tmp_path):
    path = tmp_path / "gpu.json"

    def dies():
        assert "the process ended" in store.Store(path, {}).results["gates/x"]["error"]
        return {"green": True}

    kept = store.Store(path, {})
    main.run(units.Unit("gates", "x", "", "", dies), kept, checks)
    assert kept.results["gates/x"] == {"green": True}


def make_gpu(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-P", str(ROOT / "benchmarks" / "gpu"), *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_dry_run_goes_on_where_it_ended():
    part = ("--dry", "--words", "dropout", "--part", "gates")
    first = make_gpu(*part, "--fresh", "--minutes", "0")
    assert first.returncode == main.INCOMPLETE
    assert "units are left: run the same command again" in first.stdout
    second = make_gpu(*part)
    assert second.returncode == 0, second.stdout
    assert "gates/dropout/triton/float32 ... green" in second.stdout
    third = make_gpu(*part)
    assert third.returncode == 0
    assert "green" not in third.stdout, "all of it is kept"
    written = (ROOT / "build" / "gpu-dry-report.md").read_text()
    assert "says nothing about any GPU" in written
    assert "µs" not in written


class Event:
    """A CUDA event on a device whose clock only calls move."""

    now = 0.0

    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = Event.now

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_times_are_medians_of_turns(monkeypatch):
    """With a stand-in for the device: what is between the events counts, in turns, cold."""
    timing = importlib.import_module("benchmarks.gpu.timing")
    order, empty = [], torch.empty
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "_sleep", lambda cycles: order.append("wait"))
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: order.append("end"))
    monkeypatch.setattr(timing.torch, "empty", lambda *size, device, **k: empty(8, **k))

    def call(name, seconds):
        def run():
            order.append(name)
            Event.now += seconds

        return run

    times = timing.in_turns({"a": call("a", 1.0), "b": call("b", 3.0)}, rounds=3, warmup=1)
    assert times == {"a": 1.0, "b": 3.0}
    # First how long the host takes, of each.
    warm = [step for name in "ab" for step in (name, "end", name, "end")]
    assert order == [*warm, *["wait", "a", "wait", "b", "end"] * 3]


def test_tuning_keeps_the_fastest_tile_whose_gate_is_green(monkeypatch, capsys):
    tune = importlib.import_module("benchmarks.tune")
    triton = importlib.import_module("bertfast.kernels.triton")
    table, done = {}, set()
    monkeypatch.setattr(triton, "_tuned", lambda: table)
    bench = importlib.import_module("benchmarks.bench_dropout")
    (entry,) = bench.on_gpu(dry=True)
    seen = []

    def measure(call):
        call()
        tile = table[""]["dropout"]["1024"]
        seen.append(tile)
        return abs(tile["rows"] - 4) + tile["warps"] / 100

    def gate(case, dtype, backend, *, device):
        assert table[""]["dropout"]["1024"]["warps"] != 2, "red"

    monkeypatch.setattr(tune, "candidates", lambda kernel, width: [
        {"rows": rows, "warps": warps} for rows in (2, 4) for warps in (1, 2, 4)
    ])  # fmt: skip
    testing = importlib.import_module("bertfast.testing")
    monkeypatch.setattr(testing, "run_gate", gate)
    gated = []
    monkeypatch.setattr(testing, "run_gates", lambda *a, cases: gated.append((a, cases)))
    tune.tune("dropout", entry, "dropout", table, done, device="cpu", measure=measure)
    assert table == {"": {"dropout": {"1024": {"rows": 4, "warps": 1}}}}
    assert len(seen) == 5, "the default, and four that are green"
    assert [a[2] for a, _ in gated] == testing.precisions_of("dropout", "triton")
    assert all(cases for _, cases in gated)
    tune.tune("dropout", entry, "dropout", table, done, device="cpu", measure=None)
    assert "AssertionError: red" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["gelu_forward", "layernorm_backward"])
@pytest.mark.parametrize("width", [8, 64, 1024, 8192])
def test_candidates_are_tiles(width, kernel):
    tune = importlib.import_module("benchmarks.tune")
    triton = importlib.import_module("bertfast.kernels.triton")
    tiles = [triton.Tile(columns=width, **known) for known in tune.candidates(kernel, width)]
    assert tiles
    for tile in tiles:
        assert 4 * 32 * tile.warps <= tile.rows * width <= 64 * 32 * tile.warps


def test_what_cannot_run_says_so():

    if not torch.cuda.is_available():
        assert "this torch sees no GPU" in make_gpu().stdout
    done = make_gpu("--dry", TRITON_INTERPRET="0", BERTFAST_CUDA_EMULATION="")
    if torch.version.cuda is None:
        assert "TRITON_INTERPRET=1 must be set" in done.stdout
    assert "no GPU kernel of gleu" in make_gpu("--dry", "--words", "gleu").stdout
