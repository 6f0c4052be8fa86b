"""Networks, streams and servers that the tests of cloud-edge adaptation run in processes of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time

import torch
from torch import nn


def network(width: int, seed: int, classes: int = 4) -> nn.Module:
    """A small convolutional net with batch and group norms whose statistics were moved by a few batches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.GroupNorm(2, width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
        )  # fmt: skip
        net[-1].weight.data *= 6
        for _ in range(5):
            net(torch.randn(32, 1, 6, 6))
    return net.eval()


def edge() -> nn.Module:
    return network(4, 0)


def foundation() -> nn.Module:
    return network(12, 1)


def stream(batches: int, size: int = 16, seed: int = 0) -> list[torch.Tensor]:
    """Batches that drift away from what the networks have seen."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 1, 6, 6, generator=draw) * (1 + 0.05 * i) + 0.05 * i for i in range(batches)]


def serve(folder: str, port: int = 0, **options) -> None:
    """A real server; tells its address in a file, and stays until it is killed."""
    os.environ.update(OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from headway.learning.cloud_edge.cloud import CloudServer
    from headway.learning.cloud_edge.server import HTTPFrontEnd

    options = {"batch_size": 8, "state_dir": os.path.join(folder, "state"), "checkpoint_every": 1, **options}
    front = HTTPFrontEnd(CloudServer(edge(), foundation(), **options), port=port)
    tell(folder, front.url)


def tell(folder: str, url: str) -> None:
    with open(os.path.join(folder, ".url.new"), "w") as file:
        file.write(url)
    os.replace(os.path.join(folder, ".url.new"), os.path.join(folder, "url"))
    while os.getppid() != 1:  # goes when the test's process goes
        time.sleep(0.2)
    sys.exit(0)


def misbehave(folder: str, how: str, port: int = 0) -> None:
    """A process that listens and is no cloud: "silent" never answers, "noise" sends bytes that are no HTTP, "garbage", "created"
    and "pickle" send well-formed answers of nonsense, "drip" sends one byte at a time."""
    import pickle

    server = socket.create_server(("127.0.0.1", port), backlog=64)

    def answer(connection: socket.socket) -> None:
        with connection:
            while connection.recv(1 << 16):
                if how == "silent":
                    continue
                if how == "noise":
                    connection.sendall(os.urandom(200))
                    return
                body = pickle.dumps({"version": 9}) if how == "pickle" else os.urandom(300)
                head = f"HTTP/1.1 {201 if how == 'created' else 200} OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
                if how == "drip":
                    with contextlib.suppress(OSError):
                        for byte in head + body:
                            connection.sendall(bytes([byte]))
                            time.sleep(0.05)
                    return
                connection.sendall(head + body)

    def accept() -> None:
        while True:
            threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    tell(folder, f"http://127.0.0.1:{server.getsockname()[1]}")


def renorm_passes(part: slice, sync: bool) -> dict[str, torch.Tensor]:
    """Three training passes of batch renormalisation over a part of each batch: outputs, gradients, statistics."""
    from headway.learning.cloud_edge.renorm import BatchRenorm

    layer = BatchRenorm(3, sync=sync, dtype=torch.float64)
    for i in range(3):
        draw = torch.Generator().manual_seed(i)
        batch, upstream = (torch.randn(6, 3, 4, generator=draw, dtype=torch.float64) for _ in range(2))
        x = (batch * 2 + i)[part].requires_grad_()
        y = layer(x)
        y.backward(upstream[part])
    gradients = {"weight": layer.weight.grad, "bias": layer.bias.grad}
    return {"y": y.detach(), "x": x.grad, **gradients, "mean": layer.running_mean, "var": layer.running_var}


def renorm_rank(rank: int, folder: str) -> None:
    """One of two processes that share each batch; leaves what it saw in a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(renorm_passes(slice(0, 2) if rank == 0 else slice(2, 6), True), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def refuses_nines(x: torch.Tensor) -> torch.Tensor:
    """A transform that cannot take some samples."""
    if (x == 9).any():
        raise KeyError("no nines")
    return x
