"""The binary version of CIFAR-10 and CIFAR-100.

A record is one label byte (CIFAR-100: coarse, then fine) and 3072 pixel bytes, red, green, blue planes of 32x32.
Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from headway.tasks.files import DataError, find_file, read_bytes

_PIXELS = 3 * 32 * 32


def read_cifar(path: str | os.PathLike[str], classes: Literal[10, 100] = 10) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 3, 32, 32) uint8 and labels (count,) int64 (the fine ones for CIFAR-100) of one binary file.

    Raises:
        DataError: the length is no whole number of records, or a label is out of range (a file of the other kind).
    """
    if classes not in (10, 100):
        raise ValueError(f"CIFAR has 10 or 100 classes, not {classes}")
    data = np.frombuffer(read_bytes(path), np.uint8)
    record = _PIXELS + (1 if classes == 10 else 2)
    if len(data) == 0 or len(data) % record:
        raise DataError(
            f"{path} is no whole CIFAR-{classes} file: {len(data):,} bytes are {len(data) // record} records of {record} and "
            f"{len(data) % record} left over; it is cut short or of another kind"
        )
    rows = data.reshape(-1, record)
    labels = rows[:, record - _PIXELS - 1].astype(np.int64)
    if labels.max() >= classes or (classes == 100 and rows[:, 0].max() >= 20):
        raise DataError(
            f"{path} holds the label {labels.max()}, and CIFAR-{classes} goes to {classes - 1}; it is of another kind"
        )
    return rows[:, record - _PIXELS :].reshape(-1, 3, 32, 32).copy(), labels


def read_cifar_folder(
    folder: str | os.PathLike[str], classes: Literal[10, 100] = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, test images and labels of an unpacked archive (every training file that is there).

    Raises:
        DataError: no training or test file, or a damaged one.
    """
    folder = Path(folder)
    if classes == 100:
        train, test = [find_file(folder, "train.bin")], find_file(folder, "test.bin")
    else:
        find_file(folder, "data_batch_1.bin")
        train, test = sorted(folder.glob("data_batch_*.bin*")), find_file(folder, "test_batch.bin")
    parts = [read_cifar(path, classes) for path in train]
    images, labels = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    return images, labels, *read_cifar(test, classes)
