"""The README says what is so: its numbers are those of the committed JSON, its example runs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import bertfast
from bertfast.data import builtin_documents, save_tokenizer, train_vocab

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_committed_json_says():
    report = _report()
    (source,) = set(re.findall(r"\]\((benchmarks/results/[^)]*\.json)\)", README))
    text = report.report(report.load(ROOT / source), source)
    assert report.insert(README, text) == README, (
        f"run: python benchmarks/report.py {source} --readme README.md"
    )


def test_the_committed_figures_meet_the_targets():
    report = _report()
    (source,) = (ROOT / "benchmarks" / "results").glob("cpu-*.json")
    rows = report.rows_of(report.load(source))
    memory = report.copy_bandwidth(rows, 256)
    for word in ("gelu", "layernorm"):
        calls = report.by_group(rows, f"{word} overhead")[f"{word} overhead"]
        assert calls["launcher"]["seconds"] <= 6e-6
        assert calls["grad"]["seconds"] <= 20e-6
        for way in ("forward", "backward"):
            for name, group in report.by_group(rows, f"{word} {way}").items():
                ours = group["bertfast"]
                assert ours["seconds"] < group["eager"]["seconds"], name
                if ours["dtype"] == "float32" and ours["case"] in ("none", "p0.0"):
                    assert ours["bytes"] / ours["seconds"] >= 0.6 * memory, name
    for name, group in report.by_group(rows, "inference 32 of mean 34").items():
        assert group["transformers"]["seconds"] >= 3 * group["bertfast"]["seconds"], name


def test_the_example_runs(tmp_path):
    (code,) = re.findall(
        r"## Ten lines\n\n[^`\n]+`make demo`[^\n]+\n\n```python\n(.*?)```", README, re.DOTALL
    )
    folder = tmp_path / "bertfast-demo"
    folder.mkdir()
    tokenizer = train_vocab(builtin_documents()[:3], 300)
    save_tokenizer(tokenizer, folder, max_length=64)
    config = bertfast.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    bertfast.BertForPreTraining(config).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"torch.Size\(\[\d+, 16\]\) torch.Size\(\[2, 16\]\)\n", done.stdout)


def test_the_files_it_names_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
