"""The IDX format of MNIST and its kin, plain or gzipped.

Layout: two zero bytes, a type code, the number of axes, one big-endian int32 an axis, then the values, big-endian.
Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import os
import struct

import numpy as np

from headway.tasks.files import DataError, read_bytes

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file, in the machine's byte order.

    Raises:
        DataError: not an IDX file, cut short, or with bytes left over.
    """
    data = read_bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _TYPES:
        found = data[:4].hex(" ") or "no bytes at all"
        raise DataError(
            f"{path} is no IDX file: it begins with {found}, where 00 00, a type code (08 to 0e) and a count belong"
        )
    axes = data[3]
    start = 4 + 4 * axes
    if len(data) < start:
        raise DataError(
            f"{path} is cut short: its header names {axes} axes and ends after {len(data)} bytes; fetch it again"
        )
    shape = struct.unpack(f">{axes}I", data[4:start])
    kind = np.dtype(_TYPES[data[2]])
    expected = start + int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if len(data) != expected:
        state = "is cut short" if len(data) < expected else "has bytes left over"
        raise DataError(
            f"{path} {state}: it holds {len(data):,} bytes, and shape {shape} of {kind.name} needs {expected:,}; fetch it again"
        )
    return np.frombuffer(data, kind, offset=start).reshape(shape).astype(kind.newbyteorder("="))


def read_images_and_labels(
    images: str | os.PathLike[str], labels: str | os.PathLike[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, height, width) uint8 and labels (count,) int64 of an IDX pair.

    Raises:
        DataError: either file is damaged or of another rank, or they do not belong together.
    """
    pixels, marks = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise DataError(
            f"{images} holds {pixels.dtype} of shape {pixels.shape}; images are uint8 of shape (count, height, width)"
        )
    if marks.ndim != 1:
        raise DataError(f"{labels} holds shape {marks.shape}; labels have shape (count,)")
    if len(pixels) != len(marks):
        raise DataError(
            f"{images} holds {len(pixels)} images and {labels} {len(marks)} labels; they belong to different sets"
        )
    return pixels, marks.astype(np.int64)
