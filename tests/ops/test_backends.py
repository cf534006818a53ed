import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import bertfast
from bertfast import backends, ops
from bertfast.backends import BACKENDS, ON_GPU, TABLE, choose
from bertfast.errors import BackendError
from bertfast.kernels import cpu

X = torch.ones(2, 4)


def chosen(word="gelu", x=X):
    return choose(word, x)


def test_the_table_is_what_the_files_say():
    folder = Path(bertfast.__file__).parent
    words = {path.stem for path in (folder / "ops").glob("*.py") if path.stem[0] != "_"}
    assert set(TABLE) == words
    for backend in BACKENDS:
        files = (folder / "kernels" / backend).glob("*.py")
        modules = {path.stem for path in files if path.stem[0] != "_"}
        assert modules == {word for word, names in TABLE.items() if backend in names}
    assert all(names[-1] == "reference" for names in TABLE.values())


def test_every_op_is_a_public_verb():
    assert set(TABLE) | {"attention_qkvpacked"} == set(ops.__all__)


def test_automatic_choice_goes_by_device_and_dtype():
    assert chosen() == "cpu"
    assert chosen(x=X.bfloat16()) == "cpu"
    assert chosen(x=X.half()) == "reference"
    assert chosen(x=X.double()) == "reference"
    assert all(chosen(word) == "cpu" for word in TABLE)


def test_with_block_and_argument():
    with bertfast.backend("reference"):
        assert chosen() == "reference"
        assert choose("gelu", X, "cpu") == "cpu"
        with bertfast.backend(None):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_with_block_ends_on_an_exception():
    with pytest.raises(KeyError), bertfast.backend("reference"):
        raise KeyError
    assert chosen() == "cpu"


def test_with_block_is_of_its_thread():
    seen = []
    with bertfast.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_an_explicit_choice_that_cannot_run_says_why():
    with pytest.raises(BackendError, match=r"cannot run: the input is torch\.float64; it takes"):
        choose("gelu", X.double(), "cpu")
    with (
        bertfast.backend("cuda"),
        pytest.raises(BackendError, match="has no kernel for it; it has"),
    ):
        chosen("embedding")
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, triton, cuda"):
        choose("gelu", X, "cupu")
    with pytest.raises(ValueError, match="backend: expected one of"), bertfast.backend("cupu"):
        pass


def test_the_first_of_several_that_can_run(monkeypatch):
    with bertfast.backend("cuda,cpu,reference"):
        assert chosen("embedding") == "cpu", "there is no CUDA kernel"
        assert chosen("gelu") == "cuda"
        assert chosen("attention", torch.ones(1, 1, 8)) == "cpu", "float32"
        assert chosen("attention", torch.ones(1, 1, 8).bfloat16()) == "cuda"
        assert chosen("embedding", X.double()) == "reference"
        rows = {row.op: row for row in bertfast.explain("cpu")}
    assert rows["gelu"].backend == "cuda"
    assert rows["gelu"].passed_over["cpu"] == "'cuda' comes first"
    assert "asked for by name" in rows["gelu"].passed_over["triton"]
    assert rows["attention"].backend == "cpu"
    assert "takes torch.bfloat16" in rows["attention"].passed_over["cuda"]
    said = "attention: backend 'cuda' cannot run: .*; backend 'cpu' cannot run: .*float64"
    with pytest.raises(BackendError, match=said):
        choose("attention", torch.ones(1, 1, 8).double(), "cuda,cpu")
    with pytest.raises(ValueError, match="with commas between them, got 'cuda,'"):
        choose("gelu", X, "cuda,")


def run_python(code, **environment):
    return subprocess.run(
        # -P: the installed package, not the source tree that may be the current directory.
        [sys.executable, "-P", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_environment_variable():
    code = (
        "import torch; from bertfast.backends import choose; print(choose('gelu', torch.ones(2)))"
    )
    assert run_python(code, BERTFAST_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(code, BERTFAST_BACKEND="auto").stdout.strip() == "cpu"
    bad = run_python(code, BERTFAST_BACKEND="tpu")
    assert "BERTFAST_BACKEND: expected one of" in bad.stderr


def test_backward_obeys_the_backend_of_its_forward(monkeypatch):
    x = torch.randn(3, 4, requires_grad=True)
    with bertfast.backend("reference"):
        out = ops.gelu(x)

    def refuse(*_):
        raise AssertionError("the native kernel ran")

    monkeypatch.setattr("bertfast.kernels.cpu.gelu.backward", refuse)
    with bertfast.backend("cpu"):
        torch.autograd.grad(out, x, torch.ones_like(out))


def test_without_the_extension_the_reference_runs(monkeypatch):
    monkeypatch.setattr(cpu, "_lib", None)
    monkeypatch.setattr(cpu, "_import_error", "not built")
    assert chosen() == "reference"
    with pytest.raises(BackendError, match=r"bertfast\._cpu is not there \(not built\)"):
        choose("gelu", X, "cpu")


def test_explain():
    rows = {row.op: row for row in bertfast.explain("cpu")}
    assert set(rows) == set(TABLE)
    assert rows["gelu"].backend == "cpu"
    assert rows["gelu"].passed_over["reference"] == "'cpu' comes first"
    assert rows["embedding"].passed_over["cuda"] == "has no kernel for this op"
    assert {row.backend for row in rows.values()} == {"cpu"}
    half = {row.op: row for row in bertfast.explain("cpu", torch.float16)}
    assert half["gelu"].backend == "reference"
    assert "torch.float16" in half["gelu"].passed_over["cpu"]
    with bertfast.backend("reference"):
        asked = {row.op: row for row in bertfast.explain("cpu")}
    assert asked["gelu"].backend == "reference"
    assert asked["gelu"].passed_over["cpu"] == "backend 'reference' was asked for"


def test_explain_refuses_what_cannot_be():
    with pytest.raises(TypeError, match="dtype: expected a floating-point dtype"):
        bertfast.explain("cpu", torch.int32)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected one that is here"):
            bertfast.explain("cuda")


def test_a_wrong_instruction_set_is_no_quiet_fallback():
    code = "import torch; from bertfast import ops; ops.gelu(torch.ones(3))"
    bad = run_python(code, BERTFAST_CPU_ISA="avx5")
    assert bad.returncode != 0
    assert "BERTFAST_CPU_ISA: expected one of" in bad.stderr


def test_explain_agrees_with_choose():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for row in bertfast.explain("cpu", dtype):
            assert row.backend == choose(row.op, torch.empty(1, 1, 64, dtype=dtype))


@pytest.fixture
def winners(monkeypatch, tmp_path):
    file = tmp_path / "winners.json"
    gelu = {"3072": "triton", "768": "cuda", "4096": "cuda"}
    file.write_text(json.dumps({"sm_90": {"gelu": gelu}}))
    monkeypatch.setattr(backends, "_winners", backends.read_winners(file))


@pytest.mark.parametrize(
    ("architecture", "length", "first"),
    [
        ("sm_90", 1, "cuda"),
        ("sm_90", 768, "cuda"),
        ("sm_90", 769, "triton"),
        ("sm_90", 3073, "cuda"),
        ("sm_90", 9999, "cuda"),
        ("sm_80", 768, "cpu"),
    ],
)
def test_the_fastest_comes_first_where_it_was_measured(winners, architecture, length, first):
    order = backends.by_speed("gelu", architecture, length)
    assert order[0] == first
    assert sorted(order) == sorted(TABLE["gelu"])
    assert backends.by_speed("dropout", architecture, length) == TABLE["dropout"]


def test_winners_are_of_gpus(winners):
    assert chosen() == "cpu"
    shipped = Path(bertfast.__file__).parent / "kernels" / "winners.json"
    for words in backends.read_winners(shipped).values():
        for word, lengths in words.items():
            assert all(name in TABLE[word] and name in ON_GPU for _, name in lengths)


def test_the_fastest_is_found_while_compiling(winners):
    def call(x):
        return x + len(backends.by_speed("gelu", "sm_90", x.shape[-1])[0])

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    try:
        for columns, name in ((700, "cuda"), (900, "triton"), (5000, "cuda")):
            assert compiled(torch.zeros(columns))[0] == len(name)
    finally:
        torch.compiler.reset()
