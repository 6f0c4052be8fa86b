"""Your own photographs from one domain into another, each in the style of an exemplar.

    python translate_photos.py train horse2zebra                      (trainA and trainB lie in it; any two domains will do)
    python translate_photos.py train celeba --attribute Smiling       (or CelebA's pictures and lists)
    python translate_photos.py translate horse.jpg zebra.jpg out.png  (--direction ba for the other way)

The network of group-wise whitening and colouring (arXiv 1812.09912) is kept in runs/translate_photos/network.pt, and training goes on
where it stopped. The paper's size: --size 216 --base-dim 64 --blocks 4, which wants a GPU and 100,000 steps and more.
"""

import argparse
import io
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from headway.tasks import PhotoTranslation, read_image, write_image
from headway.tasks.files import DataError, write_bytes
from headway.vision.translation import GDWCTTranslator

NETWORK = Path("runs/translate_photos/network.pt")


def network(base_dim: int, blocks: int) -> GDWCTTranslator:
    # centred image by image, a translation does not depend on what else is translated with it
    return GDWCTTranslator(base_dim=base_dim, blocks=blocks, groups=4, scales=2, layers=3, stats="instance")


def load(path: Path) -> tuple[GDWCTTranslator, dict[str, Any]]:
    """A network that was trained, and all that was saved with it."""
    if not path.is_file():
        raise DataError(f"{path} is not there; train first: python translate_photos.py train FOLDER")
    saved = torch.load(path, weights_only=True)
    net = network(**saved["settings"])
    net.load_state_dict(saved["net"])
    return net, saved


def train(
    folder: str,
    attribute: str | None = None,
    steps: int = 2000,
    size: int = 128,
    base_dim: int = 32,
    blocks: int = 2,
    batch_size: int = 4,
    path: Path = NETWORK,
) -> GDWCTTranslator:
    """Trains for so many steps, the first ones or further ones."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = PhotoTranslation(folder, attribute, size).train_batches(0, batch_size)
    settings = {"base_dim": base_dim, "blocks": blocks}
    saved: dict[str, Any] = {"step": 0, "settings": settings}
    net = network(base_dim, blocks)
    if path.is_file():
        net, saved = load(path)
        if saved["settings"] != settings:
            raise DataError(
                f"{path} holds a network of {saved['settings']}, not {settings}; give those, or another --network"
            )
    net.to(device).train()
    optimizers = net.optimizers()
    for optimizer, state in zip(optimizers, saved.get("optimizers", ()), strict=False):
        optimizer.load_state_dict(state)
    first = int(saved["step"])
    batches.skip(first)  # type: ignore[attr-defined]
    path.parent.mkdir(parents=True, exist_ok=True)
    for step in range(first + 1, first + steps + 1):
        x_a, x_b = next(batches)
        losses = net.training_step(x_a.to(device), x_b.to(device), *optimizers)
        if step % 100 == 0 or step == first + steps:
            told = ", ".join(f"{name} {float(loss):.3f}" for name, loss in losses._asdict().items())
            print(f"step {step}: {told}", flush=True)
            saved |= {
                "step": step,
                "size": size,
                "net": net.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
            }
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            write_bytes(path, buffer.getvalue())
    return net


def translate(
    content: str, exemplar: str, out: str, direction: Literal["ab", "ba"] = "ab", path: Path = NETWORK
) -> Path:
    """Writes the content of one picture in the style of another."""
    net, saved = load(path)
    images = [fitted(read_image(name), saved["size"]) for name in (content, exemplar)]
    with torch.no_grad():
        made = net.eval().translate(*(2 * image - 1 for image in images), direction=direction)
    return write_image(out, (made + 1) / 2)


def fitted(image: torch.Tensor, size: int) -> torch.Tensor:
    """(1, 3, H, W): the shorter side brought to a size, both to multiples of 4, as the network takes them."""
    height, width = image.shape[1:]
    sides = [4 * round(side * size / min(height, width) / 4) for side in (height, width)]
    return F.interpolate(image[None], sides, mode="bicubic", antialias=True).clamp(0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, default=NETWORK, help="where the network is kept")
    what = parser.add_subparsers(dest="what", required=True)
    train_ = what.add_parser("train")
    train_.add_argument("folder")
    train_.add_argument("--attribute")
    for name, value in {"steps": 2000, "size": 128, "base-dim": 32, "blocks": 2, "batch-size": 4}.items():
        train_.add_argument(f"--{name}", type=int, default=value)
    translate_ = what.add_parser("translate")
    for name in ("content", "exemplar", "out"):
        translate_.add_argument(name)
    translate_.add_argument("--direction", choices=("ab", "ba"), default="ab")
    given = vars(parser.parse_args())
    call = {"train": train, "translate": translate}[given.pop("what")]
    try:
        call(path=given.pop("network"), **given)
    except ValueError as error:
        raise SystemExit(f"translate_photos: {error}") from None
