"""Forks in every way after every moment, and says where a child did not compute what its parent
does: ``python tests/forked.py MODEL_DIRECTORY``. In a process of its own, where nothing has started
threads yet."""

import json
import multiprocessing
import os
import signal
import sys
import threading

import torch
import torch.nn.functional as F

import bertfast  # noqa: F401  (forks from here on are prepared)
from bertfast import forks
from bertfast.tasks import Embed

# Enough for each operation to share it out to threads, by torch's rules and by ours.
TEXTS = ["some words about a thing that is not here"] * 200
PATIENCE = float(os.environ.get("PATIENCE", "60"))
FOLDER = sys.argv[1]
task = None


def load():
    global task
    task = Embed.from_pretrained(FOLDER)


def predict():
    task.many(TEXTS)


def work(_=0):
    """Operations of torch and of bertfast, forward and backward."""
    signal.alarm(int(PATIENCE))  # which ends a process that hangs
    embed = task or Embed.from_pretrained(FOLDER)
    product = F.linear(torch.ones(512, 768), torch.ones(768, 768))
    vectors = embed.many(TEXTS)
    loss = embed.model(torch.ones(8, 64, dtype=torch.long)).last_hidden_state.square().sum()
    loss.backward()
    signal.alarm(0)
    return [float(product.sum()), float(vectors.abs().sum()), float(loss)]


def by_os():
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return [json.loads(pipe.read())]


def by_os_in_a_thread(moment):
    results = []

    def run():
        moment()  # a thread has OpenMP threads of its own
        results.extend(by_os())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results


def by_process():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put(work()))
    process.start()
    result = queue.get(timeout=PATIENCE)
    process.join()
    return [result]


def by_pool():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map_async(work, range(2)).get(timeout=PATIENCE)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return torch.tensor(work())


def by_data_loader():
    loader = torch.utils.data.DataLoader(
        Data(),
        batch_size=None,
        num_workers=2,
        timeout=PATIENCE,
        multiprocessing_context="fork",
    )
    return [row.tolist() for row in loader]


def running():
    return len(os.listdir("/proc/self/task"))


def main():
    torch.set_num_threads(2)
    moments = {
        "import": lambda: None,
        "load": load,
        "predict": predict,
        "predict, and no end of threads": predict,
    }
    results = {}
    for name, moment in moments.items():
        if name.endswith("no end of threads"):
            # An OpenMP older than version 5, or here one that is not there.
            forks._runtimes = lambda: {"/nowhere/libgomp.so.1"}
        elif name != "import":
            moment()
            before = running()
            forks._end_threads()
            assert running() < before, f"{name}: no thread of OpenMP was there to wait for"
        ways = [by_os, lambda moment=moment: by_os_in_a_thread(moment), by_process, by_pool]
        for i, way in enumerate([*ways, by_data_loader]):
            moment()
            try:
                results[name, i] = way()
            except Exception as error:
                results[name, i] = [repr(error)]
    expected = work()
    wrong = [
        f"{where}: {result}"
        for where, found in results.items()
        for result in found or ["nothing"]
        if isinstance(result, str) or not torch.allclose(*map(torch.tensor, (result, expected)))
    ]
    assert not wrong, wrong
    assert len(results) == 20
    assert torch.get_num_threads() == 2


if __name__ == "__main__":
    main()
