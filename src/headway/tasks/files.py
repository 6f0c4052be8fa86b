"""Where data files lie, and the one error for a file that is not what it should be."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

from headway._files import write_bytes as write_bytes


class DataError(ValueError):
    """A data file is missing, cut short, corrupt or of another kind. The message says what was found and what was expected."""


def data_folder(name: str) -> Path | None:
    """The folder ``name`` of real data, or None where there is none.

    Looks in ``$HEADWAY_DATA``, then in ``shared/data`` beside the checkout this package was installed from.
    """
    roots = [Path(os.environ["HEADWAY_DATA"])] if os.environ.get("HEADWAY_DATA") else []
    roots.append(Path(__file__).resolve().parents[4] / "shared" / "data")
    return next((root / name for root in roots if (root / name).is_dir()), None)


def find_file(folder: str | os.PathLike[str], *names: str) -> Path:
    """The first of ``names`` that lies in ``folder``, as it is or gzipped.

    Raises:
        DataError: the folder is missing, or holds none of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the folder that holds {names[0]}")
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    listed = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"{folder} holds {listed}, but not {' or '.join(names)} (plain or .gz); put the file there")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file; a gzipped one (by its first two bytes, whatever its name) is unpacked.

    Raises:
        DataError: the file cannot be read, or its gzip stream is cut short or damaged.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give the path of an existing file") from None
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is a gzip file that is cut short or damaged ({error}); fetch it again") from None
