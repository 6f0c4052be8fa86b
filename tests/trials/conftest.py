import importlib
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

_HERE = str(Path(__file__).parent)


@pytest.fixture(scope="session")
def children():
    """The module of tasks that child processes import too."""
    sys.path.insert(0, _HERE)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield importlib.import_module("trial_children")
    sys.path.remove(_HERE)
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]


@pytest.fixture(scope="session")
def forks(children):
    """Starts real child processes fast: a server that has imported everything is forked for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "psutil", "headway.trials.compare", "trial_children"])
    return context
