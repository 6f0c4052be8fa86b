"""Cloud-edge adaptation with a real server in a process of its own, measured: what a device notices when it is killed."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file, save_file

from headway.claims.cema_streams import network, pair, stream
from headway.claims.evidence import Evidence, verdict
from headway.learning.cloud_edge.client import EdgeClient
from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.server import HTTPFrontEnd

KEY = "cema"


def _serve(folder: str, port: int) -> None:
    """A cloud whose networks lie in a folder; tells its address there, and stays until it is killed."""
    torch.set_num_threads(1)
    nets = []
    for name, width in (("edge", 8), ("foundation", 48)):
        net = network(width)
        net.load_state_dict(load_file(Path(folder) / f"{name}.safetensors"))
        nets.append(net)
    front = HTTPFrontEnd(CloudServer(*nets, state_dir=Path(folder) / "state", checkpoint_every=1), port=port)
    (Path(folder) / "url.new").write_text(front.url)
    (Path(folder) / "url.new").replace(Path(folder) / "url")
    while os.getppid() != 1:  # goes when whoever started it goes
        time.sleep(0.2)


def _start(folder: Path, port: int = 0) -> tuple[Any, str]:
    (folder / "url").unlink(missing_ok=True)
    kinds = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["torch._dynamo", __name__])  # every further server starts at once
    process = context.Process(target=_serve, args=(str(folder), port), daemon=True)
    process.start()
    end = time.monotonic() + 90
    while not (folder / "url").exists():
        if not process.is_alive() or time.monotonic() > end:
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    return process, (folder / "url").read_text()


def faults(quick: bool) -> Evidence:
    edge, foundation = pair(0)
    calls, down_for = (300, 0.0) if quick else (3000, 30.0)
    batches = [x for x, _ in stream("noise", 7, 100)]
    options: Any = {"poll": 0.1, "wait": 1.0, "timeout": 2.0, "backoff": (0.05, 0.5), "deployment": "a"}
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("alive", "killed")]
        processes, clients = [], []
        try:
            for folder in folders:
                folder.mkdir()
                save_file(edge.state_dict(), folder / "edge.safetensors")
                save_file(foundation.state_dict(), folder / "foundation.safetensors")
                process, url = _start(folder)
                processes.append(process)
                clients.append(EdgeClient(copy.deepcopy(edge), url, **options))
            for x in batches[:20]:
                for client in clients:
                    client(x)
            clients[1].synchronise()
            before = clients[1].stats()
            os.kill(processes[1].pid, signal.SIGKILL)
            processes[1].join()
            clients[1](batches[20])
            times: list[list[float]] = [[], []]
            fell = time.monotonic()
            while (i := len(times[0])) < calls or time.monotonic() - fell < down_for:
                for client, taken in zip(clients, times, strict=True):
                    start = time.perf_counter()
                    client(batches[i % len(batches)])
                    taken.append(time.perf_counter() - start)
            down, gone = clients[1].stats(), time.monotonic() - fell
            processes[1], _ = _start(folders[1], urlsplit(url).port or 0)
            for x in batches[20:40]:
                clients[1](x)
            clients[1].synchronise()
            after = clients[1].stats()
        finally:
            for client in clients:
                client.close()
            for process in processes:
                process.kill()
                process.join()
    quantile = [sorted(taken)[int(0.99 * len(taken))] for taken in times]
    ratio, median = quantile[1] / quantile[0], statistics.median(times[1]) / statistics.median(times[0])
    kept = down["version"] == before["version"] and down["epoch"] == before["epoch"]
    caught_up = after["epoch"] > before["epoch"] and after["uploaded"] > before["uploaded"] and after["connected"]
    return Evidence(
        KEY,
        "the device goes on whatever becomes of the server",
        "not in the paper: the released code has no network",
        f"after kill -9: 99th percentile of a call {ratio:.2f} times, median {median:.2f} times; restarted: version {after['version']} of "
        f"a new epoch after version {before['version']}",
        f"the same device with a living server, call by call in turn, {len(times[0])} calls of 32 digits each in {gone:.1f} s",
        verdict([ratio < 1.2, kept, caught_up]),
        f"asked: below 1.2 times, the last good parameters kept ({'yes' if kept else 'no'}), and caught up after a restart from "
        f"state_dir ({'yes' if caught_up else 'no'}). While it was down {down['dropped'] - before['dropped']} chosen samples had to make "
        "room in the queue",
        rows=[{"alive p99": quantile[0], "killed p99": quantile[1], "alive median": statistics.median(times[0]),
               "killed median": statistics.median(times[1]), "failures": down["failures"], "before": before, "after": after}],
    )  # fmt: skip
