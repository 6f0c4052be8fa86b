import importlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

_HERE = str(Path(__file__).parent)


@pytest.fixture(scope="session")
def nets():
    """The module of networks and servers that child processes import too."""
    sys.path.insert(0, _HERE)
    yield importlib.import_module("cloud_edge_children")
    sys.path.remove(_HERE)


class Child:
    """A process that serves, and the address it serves at."""

    def __init__(self, context, target, folder, *arguments, **options):
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "url").unlink(missing_ok=True)
        self.process = context.Process(target=target, args=(str(folder), *arguments), kwargs=options)
        self.process.start()
        end = time.monotonic() + 60
        while not (self.folder / "url").exists():
            assert self.process.is_alive() and time.monotonic() < end, "the child does not serve"
            time.sleep(0.01)
        self.url = (self.folder / "url").read_text()
        self.port = int(self.url.rpartition(":")[2])

    def signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


@pytest.fixture(scope="session")
def forks(nets):
    """Starts real processes fast: a server that has imported everything is forked for each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch._dynamo", "headway.learning.cloud_edge.server", "cloud_edge_children"]
    )
    yield context
    if before is None:
        del os.environ["OMP_NUM_THREADS"]


@pytest.fixture
def child(forks):
    """Starts serving processes, and ends them whatever becomes of the test. One thread on both sides: another number would add in
    another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    children = []

    def start(target, folder, *arguments, **options):
        children.append(Child(forks, target, folder, *arguments, **options))
        return children[-1]

    yield start
    for one in children:
        one.kill()
    torch.set_num_threads(threads)
