"""Fill holes in your own photographs.

    python inpaint_photos.py train photos                        (a folder, or a list of files; --masks FOLDER for holes of your own)
    python inpaint_photos.py fill photo.jpg mask.png out.png     (white marks the hole; --hole black where black does)

Without a folder `train` takes the two photographs that come with scikit-learn. The network with region norms (arXiv 1911.10375) is
kept in runs/inpaint_photos/network.pt, and training goes on where it stopped. The paper's size: --size 256 --width 64 --blocks 8.
"""

import argparse
import io
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from headway.tasks import PhotoInpainting, read_image, read_mask, write_image
from headway.tasks.files import DataError, write_bytes
from headway.vision import InpaintingNet, inpaint

NETWORK = Path("runs/inpaint_photos/network.pt")
Hole = Literal["white", "black"]


def load(path: Path) -> tuple[InpaintingNet, dict[str, Any]]:
    """A network that was trained, and all that was saved with it."""
    if not path.is_file():
        raise DataError(f"{path} is not there; train first: python inpaint_photos.py train [FOLDER]")
    saved = torch.load(path, weights_only=True)
    net = InpaintingNet(3, **saved["settings"])
    net.load_state_dict(saved["net"])
    return net, saved


def train(
    folder: str | None = None,
    masks: str | None = None,
    hole: Hole = "white",
    steps: int = 1000,
    size: int = 64,
    width: int = 32,
    blocks: int = 4,
    batch_size: int = 8,
    path: Path = NETWORK,
) -> InpaintingNet:
    """Trains for so many steps, the first ones or further ones."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = PhotoInpainting(folder, masks_from=masks, hole=hole, size=size)
    batches = task.train_batches(0, batch_size)
    settings = {"width": width, "blocks": blocks}
    saved: dict[str, Any] = {"step": 0, "settings": settings}
    net = InpaintingNet(3, width, blocks)
    if path.is_file():
        net, saved = load(path)
        if saved["settings"] != settings:
            raise DataError(
                f"{path} holds a network of {saved['settings']}, not {settings}; give those, or another --network"
            )
    net.to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    if "optimizer" in saved:
        optimizer.load_state_dict(saved["optimizer"])
    first = int(saved["step"])
    batches.skip(first)  # type: ignore[attr-defined]
    path.parent.mkdir(parents=True, exist_ok=True)
    for step in range(first + 1, first + steps + 1):
        loss = task.loss(net, [part.to(device) for part in next(batches)])  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == first + steps:
            print(f"step {step}: loss {float(loss.detach()):.4f}", flush=True)
            saved |= {"step": step, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            write_bytes(path, buffer.getvalue())
    return net


def fill(photo: str, mask: str, out: str, hole: Hole = "white", longest: int = 768, path: Path = NETWORK) -> Path:
    """Writes a photograph with its hole filled; all other pixels are those of the photograph (to the bit in a PNG).

    A photograph with a side above ``longest`` is filled at a whole fraction of its size.
    """
    net, _ = load(path)
    image, marks = read_image(photo)[None], read_mask(mask, hole=hole)[None]
    if image.shape[2:] != marks.shape[2:]:
        sizes = [f"{x.shape[3]}x{x.shape[2]}" for x in (image, marks)]
        raise DataError(
            f"{mask} is {sizes[1]} and {photo} is {sizes[0]}: a mask has the size of its photograph; scale the mask to it"
        )
    height, width = image.shape[2:]
    times = -(-max(height, width) // longest)
    # up to a whole number of fours of the pixels that are left; what a hole holds gets into no valid pixel
    border = [0, -width % (4 * times), 0, -height % (4 * times)]
    small = F.avg_pool2d(F.pad(image, border, mode="replicate"), times)
    holes = F.max_pool2d(F.pad(marks.float(), border), times)
    filled = F.interpolate(inpaint(net, small, holes), scale_factor=times, mode="bilinear")[..., :height, :width]
    return write_image(out, torch.where(marks, filled, image))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, default=NETWORK, help="where the network is kept")
    what = parser.add_subparsers(dest="what", required=True)
    train_, fill_ = what.add_parser("train"), what.add_parser("fill")
    train_.add_argument("folder", nargs="?")
    train_.add_argument("--masks")
    for name, value in {"steps": 1000, "size": 64, "width": 32, "blocks": 4, "batch-size": 8}.items():
        train_.add_argument(f"--{name}", type=int, default=value)
    for name in ("photo", "mask", "out"):
        fill_.add_argument(name)
    fill_.add_argument("--longest", type=int, default=768)
    for part in (train_, fill_):
        part.add_argument("--hole", choices=("white", "black"), default="white", help="what marks it in a mask")
    given = vars(parser.parse_args())
    call = {"train": train, "fill": fill}[given.pop("what")]
    try:
        call(path=given.pop("network"), **given)
    except ValueError as error:
        raise SystemExit(f"inpaint_photos: {error}") from None
