"""Where pictures lie: folders and plain lists of files, two unpaired domains, faces with attributes.

    list_images("photos"), list_images("train.flist")           every picture under a folder, or of a list (Places2)
    unpaired("horse2zebra")                                     trainA, trainB, testA, testB (Zhu et al., 2017, arXiv 1703.10593)
    by_attribute("celeba", "Smiling")                           faces without and with an attribute (Liu et al., 2015, arXiv 1411.7766)

Only paths are found here; :mod:`headway.tasks.image_files` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headway.tasks.files import DataError, find_file, read_bytes
from headway.tasks.image_files import SUFFIXES


class Domains(NamedTuple):
    """Paths of the pictures of two domains, to train on and held out."""

    train_a: list[Path]
    train_b: list[Path]
    test_a: list[Path]
    test_b: list[Path]


def list_images(where: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> list[Path]:
    """Paths of pictures, in order: all under a folder, at any depth, or those of a plain text file with one path a line.

    Args:
        where: a folder or a list. Of a line what follows a blank (a label) is left out where no file has the whole for a name.
        root: where the paths of a list begin, also those with a slash in front; the list's own folder if None.

    Raises:
        DataError: there is nothing, no picture in the folder, or a file of the list is missing.
    """
    where = Path(where)
    if where.is_dir():
        found = sorted(path for path in where.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise DataError(
                f"{where} holds no picture ending in {', '.join(SUFFIXES)}; give a folder with pictures in it or below"
            )
        return found
    if where.suffix.lower() in SUFFIXES:
        raise DataError(f"{where} is one picture or none; give a folder of pictures, or a text file with a path a line")
    lines = [line.strip() for line in _text(where).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{where} is empty; a list has the path of a picture in every line")
    base = where.parent if root is None else Path(root)
    found = [_of_line(line, base) for line in lines]
    missing = [line for line, path in zip(lines, found, strict=True) if path is None]
    if missing:
        raise DataError(
            f"{where} names {len(missing)} file(s) of {len(lines)} that are not there, first {missing[0]!r} under {base}; give root=, "
            "the folder where the paths begin"
        )
    return [path for path in found if path is not None]


def _of_line(line: str, base: Path) -> Path | None:
    names = (line, line.rsplit(maxsplit=1)[0])
    places = (place for name in names for place in (base / name.lstrip("/"), Path(name)))
    return next((place for place in places if place.is_file()), None)


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text; a list of files or attributes was expected") from None


def held_out(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """All but every tenth, and every tenth (of fewer than ten, the last), where nothing else says what is held out.

    Raises:
        DataError: fewer than two pictures.
    """
    if len(paths) < 2:
        raise DataError(f"{len(paths)} picture(s) cannot be trained on and held out; at least two are needed")
    late = range(min(len(paths), 10) - 1, len(paths), 10)
    return [path for i, path in enumerate(paths) if i not in late], [paths[i] for i in late]


def unpaired(folder: str | os.PathLike[str]) -> Domains:
    """Two domains in the folders ``trainA``, ``trainB``, ``testA``, ``testB``; without a test folder every tenth is held out.

    Raises:
        DataError: a training folder is missing or holds no picture.
    """
    folder = Path(folder)
    if not (folder / "trainA").is_dir() or not (folder / "trainB").is_dir():
        listed = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else ""
        state = f"holds {listed}" if listed else "is empty" if folder.is_dir() else "is no folder"
        raise DataError(
            f"{folder} {state}; two domains lie in its folders trainA and trainB, what is held out in testA and testB"
        )
    parts: list[tuple[list[Path], list[Path]]] = []
    for letter in "AB":
        train, test = list_images(folder / f"train{letter}"), folder / f"test{letter}"
        parts.append((train, list_images(test)) if test.is_dir() else held_out(train))
    return Domains(parts[0][0], parts[1][0], parts[0][1], parts[1][1])


def read_attributes(path: str | os.PathLike[str]) -> tuple[list[str], list[str], np.ndarray]:
    """File names, attribute names, and (files, attributes) bool of CelebA's ``list_attr_celeba.txt``, or of the same table as csv.

    Layout: the count of files, the names of the attributes, then a line a file: its name, and 1 or -1 for every attribute.

    Raises:
        DataError: no such table, a line of another length or with other values, or another count than its first line says.
    """
    rows = [line.replace(",", " ").split() for line in _text(Path(path)).splitlines() if line.strip()]
    count = int(rows.pop(0)[0]) if rows and len(rows[0]) == 1 and rows[0][0].isdigit() else None
    names = rows[0] if rows else []
    names = names[1:] if names[:1] == ["image_id"] else names
    if not names or len(rows) < 2:
        raise DataError(
            f"{path} is no list of attributes: it has no line of names with lines of files below; give list_attr_celeba.txt"
        )
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(names) + 1 or not {"1", "-1", "0"}.issuperset(row[1:]):
            raise DataError(
                f"{path}: the line of file {number} ({row[0]}) has {len(row) - 1} values, and {len(names)} of 1 or -1 belong there"
            )
    if count is not None and count != len(rows) - 1:
        raise DataError(f"{path} is cut short: it names {count:,} files and has {len(rows) - 1:,}; fetch it again")
    marks = np.array([[value == "1" for value in row[1:]] for row in rows[1:]])
    return [row[0] for row in rows[1:]], names, marks


def by_attribute(folder: str | os.PathLike[str], attribute: str) -> Domains:
    """Faces without an attribute (a) and with it (b): pictures under ``folder`` with the list of their attributes beside them.

    Held out are those that ``list_eval_partition.txt`` marks with 2; without such a file every tenth of each domain.

    Args:
        folder: holds ``list_attr_celeba.txt`` (or ``.csv``), and the pictures in it or in any folder below.
        attribute: one of the list's, such as "Smiling".

    Raises:
        DataError: no list, no such attribute, a picture that the list names is missing, or a domain without pictures.
    """
    path = find_file(folder, "list_attr_celeba.txt", "list_attr_celeba.csv")
    files, names, marks = read_attributes(path)
    if attribute not in names:
        raise DataError(f"{path} has no attribute {attribute!r}; it has {', '.join(names)}")
    # the aligned pictures come as jpg or png, and the list names jpgs
    here = {image.stem: image for image in list_images(folder)}
    images = [here[stem] for name in files if (stem := Path(name).stem) in here]
    if len(images) < len(files):
        first = next(name for name in files if Path(name).stem not in here)
        raise DataError(
            f"{path} names {len(files) - len(images):,} file(s) of {len(files):,} that do not lie under {folder}, first {first}; put "
            "the pictures there"
        )
    test, parts = _partition(Path(folder), files), []
    for wanted in (False, True):
        own = [i for i, mark in enumerate(marks[:, names.index(attribute)]) if bool(mark) == wanted]
        if test is None and len(own) > 1:
            train, late = held_out([images[i] for i in own])
        else:
            train, late = ([images[i] for i in own if (files[i] in (test or ())) == later] for later in (False, True))
        if not train or not late:
            raise DataError(
                f"{path} has {len(own)} picture(s) {'with' if wanted else 'without'} {attribute}: too few to train on some and hold "
                "out others"
            )
        parts.append((train, late))
    return Domains(parts[0][0], parts[1][0], parts[0][1], parts[1][1])


def _partition(folder: Path, files: list[str]) -> set[str] | None:
    """Names of the files that are for testing, where a list says so."""
    path = next((p for end in ("txt", "csv") if (p := folder / f"list_eval_partition.{end}").is_file()), None)
    if path is None:
        return None
    rows = [line.replace(",", " ").split() for line in _text(path).splitlines() if line.strip()]
    rows = rows[1:] if rows[:1] and rows[0][0] == "image_id" else rows
    if any(len(row) != 2 or row[1] not in ("0", "1", "2") for row in rows) or not {row[0] for row in rows} >= set(
        files
    ):
        raise DataError(f"{path} is no partition of the same files: a line is a file's name and 0, 1 or 2")
    return {row[0] for row in rows if row[1] == "2"}
