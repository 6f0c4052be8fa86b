"""Pictures and masks on disk as tensors: PNG, JPEG, BMP, TIFF, WebP, whatever their size, depth and orientation.

    image = read_image("photo.jpg")                             (3, H, W) from 0 to 1
    images = ImageFiles(list_images("photos"), size=128)        images[index] is (count, 3, 128, 128), read when it is asked for
    write_image("out.png", image)

Read by Pillow (``pip install headway[images]``). Folders, lists and data sets of such files: :mod:`headway.tasks.image_folders`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headway.tasks.files import DataError, write_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
Hole = Literal["white", "black"]
Size = tuple[int, int]


def pillow() -> Any:
    """The package; ImportError where it is not installed."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ImportError("pictures are read and written by Pillow; install headway[images]") from None
    return PIL


def _open(path: str | os.PathLike[str], grey: bool) -> Any:
    """The picture in 8 bits, upright, grey or in colours."""
    package, path = pillow(), Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give the path of an existing picture") from None
    if not raw:
        raise DataError(f"{path} is empty; a picture was expected")
    try:
        with package.Image.open(io.BytesIO(raw)) as image:
            image.load()
            image = package.ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # sixteen bits, which Pillow would clip
            image = package.Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("L" if grey else "RGB")
    except Exception as error:  # whatever a damaged picture makes of the decoder
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "its kind is unknown" if "cannot identify" in what else what
        raise DataError(
            f"{path} cannot be read: it is no whole picture ({what}); fetch it again or leave it out"
        ) from None


def _window(image: Any, size: Size, zoom: float, place: tuple[float, float]) -> tuple[float, float, float, float]:
    """The part of a picture that, brought to a size, fills it: at zoom 1 the whole of one side."""
    height, width = size
    scale = zoom * max(height / image.height, width / image.width)
    high, wide = height / scale, width / scale
    top, left = place[0] * (image.height - high), place[1] * (image.width - wide)
    return left, top, left + wide, top + high


def read_image(
    path: str | os.PathLike[str],
    channels: Literal[1, 3] = 3,
    size: Size | None = None,
    zoom: float = 1.0,
    place: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """(channels, H, W) float32 from 0 to 1.

    Args:
        channels: 3 for red, green and blue, 1 for grey. What is transparent is taken as it is stored.
        size: (H, W) that a part of the picture is brought to; None leaves the picture as it is.
        zoom: how much larger than needed the picture is made before the part is taken; 1 takes the most of it.
        place: of that part, from 0 (top, left) to 1 (bottom, right).

    Raises:
        DataError: there is no such file, or it is no picture, or a damaged one. ImportError: Pillow is not installed.
    """
    if channels not in (1, 3) or zoom < 1 or (size is not None and min(size) < 1):
        raise ValueError(
            f"channels are 1 or 3, zoom at least 1, and sizes positive; they are {channels}, {zoom} and {size}"
        )
    image = _open(path, channels == 1)
    if size is not None:
        image = image.resize(size[::-1], pillow().Image.Resampling.BICUBIC, box=_window(image, size, zoom, place))
    pixels = torch.from_numpy(np.array(image))
    return (pixels[None] if channels == 1 else pixels.movedim(-1, 0)).float() / 255


def read_mask(path: str | os.PathLike[str], size: Size | None = None, hole: Hole = "white") -> Tensor:
    """(1, H, W) bool, True in the hole; brought to a size by nearest neighbour.

    Args:
        hole: what marks it: "white" (the lighter half of all greys) or "black".

    Raises:
        DataError, ImportError: as :func:`read_image`. ValueError: another ``hole``.
    """
    if hole not in ("white", "black"):
        raise ValueError(f'the hole is "white" or "black"; it is {hole!r}')
    image = _open(path, True)
    if size is not None:
        image = image.resize(size[::-1], pillow().Image.Resampling.NEAREST, box=_window(image, size, 1, (0.5, 0.5)))
    light = torch.from_numpy(np.array(image))[None] >= 128
    return light if hole == "white" else ~light


def write_image(path: str | os.PathLike[str], image: Tensor) -> Path:
    """Writes (channels, H, W) or (1, channels, H, W) of 1 or 3 channels as the kind of picture that the path's end names.

    Values are clipped to 0 and 1 and rounded to 8 bits; PNG keeps them, JPEG does not.

    Raises:
        ValueError: another shape, something not finite, or an end that names no kind of picture. ImportError: Pillow is not installed.
    """
    package, path = pillow(), Path(path)
    pixels = image.detach().float().cpu()
    pixels = pixels[0] if pixels.dim() == 4 and len(pixels) == 1 else pixels
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3) or not pixels.numel() or not torch.isfinite(pixels).all():
        raise ValueError(f"a picture is (1 or 3, H, W) of finite numbers; it has the shape {tuple(image.shape)}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} names no kind of picture; end it with one of {', '.join(SUFFIXES)}")
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).squeeze(-1).numpy()
    buffer = io.BytesIO()
    package.Image.fromarray(array).save(
        buffer, package.Image.registered_extensions()[path.suffix.lower()], **_fine(path)
    )
    return write_bytes(path, buffer.getvalue())


def _fine(path: Path) -> dict[str, Any]:
    return {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}


class ImageFiles:
    """Pictures of one size that are read when they are asked for, indexed as a tensor (count, channels, H, W) is by a tensor.

    Args:
        paths: of the files.
        size: of what they give, a number for squares or (H, W): as much of each picture as has that shape.
        channels: 3 or 1.
        signed: from -1 to 1 instead of from 0 to 1.
        zoom: of :meth:`take` with a generator, which takes a part at random from the picture so much larger, and mirrors every second.

    Raises:
        ValueError: no path at all. DataError: when a file is read that is no picture.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        size: int | Size,
        channels: Literal[1, 3] = 3,
        signed: bool = False,
        zoom: float = 1.1,
    ) -> None:
        if not paths:
            raise ValueError("there are no pictures: the list of paths is empty")
        self.paths, self.size = [Path(path) for path in paths], (size, size) if isinstance(size, int) else size
        self.channels: Literal[1, 3] = channels
        self.signed, self.zoom = signed, zoom

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return self.take(torch.arange(len(self))[index])

    def take(self, index: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """The pictures of these places (count,), their middle; or with a generator some other part, half of them mirrored."""
        return torch.stack([self._read(self.paths[i], draw) for i in index.tolist()])

    def _read(self, path: Path, draw: torch.Generator | None) -> Tensor:
        if draw is None:
            image = read_image(path, self.channels, self.size)
        else:
            top, left, turn = torch.rand(3, generator=draw).tolist()
            image = read_image(path, self.channels, self.size, self.zoom, (top, left))
            image = image.flip(-1) if turn < 0.5 else image
        return image * 2 - 1 if self.signed else image


class MaskFiles(ImageFiles):
    """Masks of one size, (count, 1, H, W) bool, True in the hole, read when they are asked for. Arguments as :class:`ImageFiles` and
    :func:`read_mask` have them."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]], size: int | Size, hole: Hole = "white") -> None:
        super().__init__(paths, size, 1)
        self.hole: Hole = hole

    def _read(self, path: Path, draw: torch.Generator | None) -> Tensor:
        mask = read_mask(path, self.size, self.hole)
        return mask if draw is None or torch.rand(1, generator=draw) < 0.5 else mask.flip(-1)


def taken(images: Tensor | ImageFiles, index: Tensor, draw: torch.Generator | None = None) -> Tensor:
    """Images of these places, whether they lie in memory or on disk, those on disk drawn as :meth:`ImageFiles.take` says."""
    return images[index] if isinstance(images, Tensor) else images.take(index, draw)
