"""Streams of corrupted images, to adapt to: CIFAR-10-C and CIFAR-100-C (arrays), ImageNet-C (folders of pictures).

    CIFAR-10-C   <folder>/<corruption>.npy (50000, 32, 32, 3) uint8, severities 1 to 5 one after the other, and <folder>/labels.npy
    ImageNet-C   <folder>/<corruption>/<severity>/<class>/<picture>, classes counted in the order of their names

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019, arXiv
1903.12261.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headway.tasks.files import DataError, find_file
from headway.tasks.image_files import pillow, read_image

_PICTURES = (".jpeg", ".jpg", ".png")


def read_cifar_c(folder: str | os.PathLike[str], corruption: str, severity: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 3, 32, 32) uint8 and labels (count,) int64 of one corruption at one severity from 1 to 5.

    Raises:
        DataError: a file is missing, damaged or of another kind. ValueError: there is no such severity.
    """
    _check(severity)
    images, labels = (_array(find_file(folder, f"{name}.npy")) for name in (corruption, "labels"))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3) or len(images) % 5:
        raise DataError(
            f"{corruption}.npy has the shape {images.shape} and {images.dtype}, not (5 n, 32, 32, 3) and uint8"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"labels.npy has the shape {labels.shape} and {labels.dtype}, not ({len(images)},) and integers"
        )
    count = len(images) // 5
    part = slice((severity - 1) * count, severity * count)
    return np.ascontiguousarray(images[part].transpose(0, 3, 1, 2)), labels[part].astype(np.int64)


def corrupted_stream(
    folder: str | os.PathLike[str], corruption: str, severity: int = 5, batch_size: int = 64, seed: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images (n, 3, height, width) from 0 to 1 and labels (n,), for :func:`headway.learning.simulate` or an edge client.

    Args:
        folder: with ``<corruption>.npy`` and ``labels.npy``, or with folders of pictures (which need Pillow).
        corruption, severity: "gaussian_noise", 5, say.
        batch_size: images a batch; the last one may be smaller.
        seed: of a random order; the files' own unless given.

    Raises:
        DataError: there is no such corruption, or a file is damaged. ValueError: a setting out of its range. ImportError: no Pillow.
    """
    _check(severity)
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1; it is {batch_size}")
    if (Path(folder) / corruption).is_dir():
        return _pictures(Path(folder, corruption, str(severity)), batch_size, seed)
    images, labels = read_cifar_c(folder, corruption, severity)
    order = _order(len(images), seed)
    return (
        (torch.from_numpy(images[rows]).float() / 255, torch.from_numpy(labels[rows]))
        for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size))
    )


def _pictures(folder: Path, batch_size: int, seed: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    pillow()  # said now, not at the first batch
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    files = [
        (file, number)
        for number, one in enumerate(classes)
        for file in sorted(one.iterdir())
        if file.suffix.lower() in _PICTURES
    ]
    if not files:
        raise DataError(f"{folder} holds no <class>/<picture>.JPEG or .png; give the folder above the corruptions")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        order = _order(len(files), seed)
        for i in range(0, len(files), batch_size):
            chosen = [files[k] for k in order[i : i + batch_size]]
            images = [read_image(file) for file, _ in chosen]
            if len({image.shape for image in images}) > 1:
                raise DataError(f"the pictures of {folder} differ in size; ImageNet-C's are cropped to 224 x 224")
            yield torch.stack(images), torch.tensor([number for _, number in chosen])

    return batches()


def _order(count: int, seed: int | None) -> np.ndarray:
    return np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)


def _array(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file} is no whole array of numpy ({error}); fetch it again") from None


def _check(severity: int) -> None:
    if severity not in range(1, 6):
        raise ValueError(f"severities go from 1 to 5; {severity} was asked for")
