"""Plain text: one file, or every text file under a folder, as bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from headway.tasks.files import DataError, read_bytes


def read_text(
    path: str | os.PathLike[str], suffixes: Sequence[str] = (".txt", ".md", ".py", ".rst")
) -> dict[str, bytes]:
    """Files by their relative name, in sorted order.

    Args:
        path: a text file (any suffix, gzip too) or a folder.
        suffixes: which files of a folder are taken.

    Raises:
        DataError: nothing there, no such files in the folder, an empty file, or one that is not UTF-8 text.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in suffixes)
        if not found:
            raise DataError(f"{path} holds no file ending in {', '.join(suffixes)}; give a folder with text files")
        files = {file.relative_to(path).as_posix(): read_bytes(file) for file in found}
        files = {name: data for name, data in files.items() if data}
    else:
        files = {path.name: read_bytes(path)}
    if not any(files.values()):
        raise DataError(f"{path} is empty; text was expected")
    for name, data in files.items():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            where = name if path.is_dir() else str(path)
            raise DataError(
                f"{where} is no UTF-8 text: byte {data[error.start]:#04x} at {error.start}; convert it to UTF-8 first"
            ) from None
    return files
