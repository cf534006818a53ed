"""Several Python threads at once, torch's number of threads, forked processes."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from bertfast import testing
from bertfast.backends import TABLE

# One case of each op that is large enough for its kernel to use more than one thread.
LARGE = {
    "attention": testing.attention_case([300, 70], 4, 64, name="large", dropout_p=0.1, packed=True),
    "layernorm": testing.layernorm_case(71, 515, name="large", dropout_p=0.1),
    "gelu": testing.gelu_case(71, 515, name="large"),
    "embedding": testing.embedding_case(300, 256, name="large", dropout_p=0.1),
    "cross_entropy": testing.cross_entropy_case(80, 256, 3000, name="large"),
    "dropout": testing.dropout_case(300, 515, name="large"),
}


def prepared(word):
    """A call of the op and its backward on the native kernels, that runs nothing else of torch."""
    case = LARGE[word]
    tensors = case.inputs(torch.float32)
    for name in case.grads:
        tensors[name].requires_grad_()
    wanted = [tensors[name] for name in case.grads]
    with torch.no_grad():
        dout = testing.upstream_gradient(case.op(tensors, "cpu"), "contiguous")

    def run():
        out = case.op(tensors, "cpu")
        return [out.detach(), *torch.autograd.grad(out, wanted, dout)]

    return run


def results_of(word):
    return prepared(word)()


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_every_word_with_a_native_kernel_is_here():
    assert set(LARGE) == {word for word, names in TABLE.items() if "cpu" in names}


def test_python_threads_at_once_get_their_own_results():
    expected = {word: results_of(word) for word in LARGE}
    wrong = []

    def work(i):
        torch.set_num_threads(1 + i % 3)
        words = list(LARGE)
        for word in (words[i:] + words[:i]) * 4:
            if not same(results_of(word), expected[word]):
                wrong.append(word)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


COUNT_THREADS = """
import json, os, sys, threading
import torch
sys.path.insert(0, sys.argv[1])
from test_threads import LARGE, results_of

def running():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
counts = {}

def work(threads):
    torch.set_num_threads(threads)
    before = running()
    for word in LARGE:
        results_of(word)
    counts[threads] = running() - before

for threads in (1, 3):
    # A Python thread has OpenMP threads of its own, so each starts from none.
    thread = threading.Thread(target=work, args=(threads,))
    thread.start()
    thread.join()
print(json.dumps(counts))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to count threads in")
def test_set_num_threads_is_obeyed_from_any_thread():
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COUNT_THREADS, here],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"1": 0, "3": 2}


def in_a_fork(work):
    """What the forked child says: 0 when ``work()`` was true. A child that hangs is ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(30)
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("word", LARGE)
def test_a_forked_process_gets_the_same_results(word):
    """OpenMP's threads do not follow through a fork: a kernel that counted on them would hang
    (tests/test_forks.py has torch's own operations, too)."""
    torch.set_num_threads(2)
    run = prepared(word)
    expected = run()  # now OpenMP has started its threads in this process
    numbers = [x.numpy() for x in expected]

    def same_in_numpy():
        return all((a.numpy() == b).all() for a, b in zip(run(), numbers, strict=True))

    assert in_a_fork(same_in_numpy) == 0
    assert same(run(), expected), "and the parent goes on as before"


class Results(torch.utils.data.Dataset):
    def __len__(self):
        return len(LARGE)

    def __getitem__(self, i):
        return results_of(list(LARGE)[i])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loader_workers_get_the_same_results():
    torch.set_num_threads(2)
    expected = [results_of(word) for word in LARGE]
    loader = torch.utils.data.DataLoader(Results(), batch_size=None, num_workers=2, timeout=60)
    for results, wanted in zip(loader, expected, strict=True):
        assert same(results, wanted)
