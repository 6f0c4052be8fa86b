"""A device and its cloud as two processes on one machine: digits that grow noisier and noisier.

    python cloud_edge.py cloud                    (in one terminal; kill it, start it again: the device does not mind)
    python cloud_edge.py edge                     (in another; --alone shows the same device without a cloud)

The device's network is small, the cloud's is wider. Whoever starts first trains both on clean digits and leaves the weights in
runs/cloud_edge, where the cloud also keeps what it has adapted.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from sklearn.datasets import load_digits
from torch import nn

from headway.learning import CloudServer, EdgeClient

FOLDER = Path("runs/cloud_edge")
WIDTHS = {"edge": 8, "foundation": 48}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 8, 8) from 0 to 1 in an order of their own, and labels."""
    X, y = load_digits(return_X_y=True)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    return torch.tensor(X / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(y)[order]


def network(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    before = 1
    for after, stride in ((width, 1), (2 * width, 2), (2 * width, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def trained(name: str, folder: Path, epochs: int = 15) -> nn.Module:
    """The network from the folder, trained first where it is not there."""
    net, file = network(WIDTHS[name]), folder / f"{name}.safetensors"
    if not file.exists():
        print(f"training {name}", flush=True)
        images, labels = (part[:898] for part in digits())
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(64):
                x = images[index] + 0.1 * torch.randn(len(index), 1, 8, 8)
                loss = F.cross_entropy(net(x), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        folder.mkdir(parents=True, exist_ok=True)
        save_model(net, str(file))
    load_model(net, file)
    return net.eval()


def stream(batches: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The other digits, noisier from batch to batch."""
    images, labels = (part[898:] for part in digits())
    for i in range(batches):
        index = torch.randint(len(images), (32,))
        yield images[index] + 0.4 * min(1.0, i / 200) * torch.randn(32, 1, 8, 8), labels[index]


def cloud(port: int, folder: Path = FOLDER) -> None:
    server = CloudServer(trained("edge", folder), trained("foundation", folder), state_dir=folder / "state")
    print(f"serving http://127.0.0.1:{port}; stop with Ctrl-C", flush=True)
    server.serve("127.0.0.1", port)


def edge(url: str, batches: int = 600, pause: float = 0.05, folder: Path = FOLDER) -> float:
    """Runs the stream and returns the accuracy over its last half in percent."""
    client = EdgeClient(trained("edge", folder), url, poll=0.5, backoff=(0.5, 5.0))
    right: list[int] = []
    for i, (x, labels) in enumerate(stream(batches), 1):
        right.append(int((client(x).argmax(1) == labels).sum()))
        time.sleep(pause)  # a camera, say
        if i % 50 == 0:
            told = client.stats()
            print(
                f"batch {i}: {100 * sum(right[-50:]) / (32 * 50):.1f} % right; {100 * told['uploaded'] / told['samples']:.0f} % uploaded, "
                f"{told['bytes_up']:,} bytes up, {told['bytes_down']:,} down; version {told['version']}"
                + ("" if told["connected"] else f"; no cloud: {told['last_error']}"),
                flush=True,
            )
    client.close()
    return 100 * sum(right[batches // 2 :]) / (32 * len(right[batches // 2 :]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=("cloud", "edge"))
    parser.add_argument("--port", type=int, default=8008)
    parser.add_argument("--batches", type=int, default=600)
    parser.add_argument("--alone", action="store_true", help="the device without a cloud")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if given.who == "cloud":
        cloud(given.port)
    else:
        logging.disable()  # the lines below say it
        last = edge(f"http://127.0.0.1:{9 if given.alone else given.port}", given.batches)
        print(f"{last:.1f} % right over the last half")
