"""Photographs from folders of yours: inpainting, and translation between two domains.

    headway compare "inpainting(folder='places/val_256', masks_from='irregular_masks', size=64)" --arms "baseline,region-norm"
    headway compare "translation(folder='horse2zebra', size=64)" --arms "baseline,gdwct(groups=8)"
    headway compare "translation(folder='celeba', attribute='Smiling')" --arms "baseline,gdwct(groups=8)"

The networks and losses are those of :mod:`headway.tasks.inpainting` and :mod:`headway.tasks.translation`; files are read when a batch
asks for them, by Pillow (``pip install headway[images]``). Without a folder inpainting takes the two photographs that come with
scikit-learn: the left three quarters of each are trained on, the rest is held out. Networks to keep: ``examples/translate_photos.py``,
``examples/inpaint_photos.py``.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tasks.image_files import Hole, ImageFiles, MaskFiles, read_image
from headway.tasks.image_folders import by_attribute, held_out, list_images, unpaired
from headway.tasks.inpainting import Fill, Inpainting, check_fill
from headway.tasks.translation import Translation, check_sizes
from headway.vision.inpainting import InpaintingNet
from headway.vision.masks import rectangular_masks


class PhotoInpainting(Inpainting):
    """Square parts of photographs with holes.

    Args:
        folder: of pictures, or a list of them; None takes patches of scikit-learn's two photographs at half their size.
        test: a folder or list of what is held out; None holds out every tenth picture.
        masks_from: a folder or list of masks; None draws two to five rectangles for a training hole and six to nine for a larger one.
        hole: what marks it in such masks, "white" or "black".
        size: of the images, a multiple of 4.
        width, blocks, fill: as ``digits-inpainting`` has them.

    Raises:
        DataError: when the data are first used, for a folder or list without pictures.
    """

    name = "inpainting"

    def __init__(
        self,
        folder: str | None = None,
        test: str | None = None,
        masks_from: str | None = None,
        hole: Hole = "white",
        size: int = 32,
        width: int = 16,
        blocks: int = 2,
        fill: Fill = "white",
    ) -> None:
        check_fill(fill)
        if size < 12 or size % 4:
            raise ValueError(f"size is a multiple of 4 of at least 12; it is {size}")
        if folder is None and size > 80:
            raise ValueError(f"of the two photographs there are parts of at most 80; size is {size}: give folder=")
        if test is not None and folder is None:
            raise ValueError("test= names what is held out of folder=; give both")
        self.folder, self.test, self.masks_from = (v if v is None else str(v) for v in (folder, test, masks_from))
        self.hole: Hole = hole
        self.size, self.width, self.blocks, self.fill = size, width, blocks, fill
        self._data: tuple[Tensor | ImageFiles, Tensor | ImageFiles] | None = None
        self._holes: tuple[Tensor | ImageFiles, Tensor | ImageFiles, Tensor | None] | None = None

    def images(self) -> tuple[Tensor | ImageFiles, Tensor | ImageFiles]:
        if self._data is None:
            self._data = patches(self.size) if self.folder is None else self._files()
        return self._data

    def _files(self) -> tuple[ImageFiles, ImageFiles]:
        assert self.folder is not None
        paths = list_images(self.folder)
        train, late = held_out(paths) if self.test is None else (paths, list_images(self.test))
        return ImageFiles(train, self.size), ImageFiles(late, self.size)

    def masks(self) -> tuple[Tensor | ImageFiles, Tensor | ImageFiles, Tensor | None]:
        if self._holes is None:
            if self.masks_from is not None:
                masks = MaskFiles(list_images(self.masks_from), self.size, self.hole)
                self._holes = masks, masks, None
            else:
                draw, count = torch.Generator().manual_seed(0), len(self.images()[1])
                few, many = (2, 5), (6, 9)
                made = [rectangular_masks(n, self.size, k, draw) for n, k in ((512, few), (count, few), (count, many))]
                self._holes = made[0], made[1], made[2]
        return self._holes

    def model(self, seed: int) -> nn.Module:
        return InpaintingNet(3, self.width, self.blocks, norm="batch", fill=None)


def photographs() -> list[Tensor]:
    """scikit-learn's two, (3, H, W) each.

    Raises:
        ImportError: Pillow is not installed.
    """
    import sklearn.datasets

    return [read_image(path) for path in list_images(Path(sklearn.datasets.__file__).parent / "images")]


def patches(size: int) -> tuple[Tensor, Tensor]:
    """Parts (count, 3, size, size) of both photographs at half their size: of the left three quarters of each, a quarter of a part
    apart, and of the rest, half a part apart."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for photo in photographs():
        photo = F.avg_pool2d(photo, 2)
        cut = photo.shape[2] * 3 // 4
        for part, image, step in zip(parts, (photo[..., :cut], photo[..., cut:]), (size // 4, size // 2), strict=True):
            tiles = image.unfold(1, size, step).unfold(2, size, step).flatten(1, 2)
            part.append(tiles.movedim(0, 1).contiguous())
    return torch.cat(parts[0]), torch.cat(parts[1])


class PhotoTranslation(Translation):
    """Photographs of two domains; without a test folder or a partition every tenth of each is held out.

    Args:
        folder: with ``trainA``, ``trainB``, ``testA``, ``testB`` in it; or with an ``attribute``, CelebA's pictures and lists.
        attribute: what the faces of domain b have and those of a have not, such as "Smiling".
        size: of the images, a multiple of 4. base_dim, blocks: of the network.

    Raises:
        DataError: when the data are first used, for a folder that holds neither.
    """

    name = "translation"

    def __init__(
        self, folder: str, attribute: str | None = None, size: int = 64, base_dim: int = 16, blocks: int = 2
    ) -> None:
        check_sizes(base_dim, size)
        self.folder, self.attribute = str(folder), attribute
        self.size, self.base_dim, self.blocks = size, base_dim, blocks
        self._files: list[ImageFiles] | None = None

    def data(self) -> tuple[tuple[ImageFiles, ImageFiles], tuple[ImageFiles, ImageFiles]]:
        if self._files is None:
            found = unpaired(self.folder) if self.attribute is None else by_attribute(self.folder, self.attribute)
            self._files = [ImageFiles(paths, self.size, signed=True) for paths in found]
        train_a, train_b, test_a, test_b = self._files
        return (train_a, train_b), (test_a, test_b)
