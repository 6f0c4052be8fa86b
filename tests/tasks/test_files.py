"""The loaders on small files made here; a damaged file gives one clear sentence."""

import gzip
import struct

import numpy as np
import pytest
import torch

from headway.tasks.cifar import read_cifar, read_cifar_folder
from headway.tasks.files import DataError, data_folder, find_file, read_bytes
from headway.tasks.idx import read_idx, read_images_and_labels
from headway.tasks.task import get
from headway.tasks.text_files import read_text


def idx(array, code=0x08):
    kind = {0x08: ">u1", 0x0C: ">i4", 0x0E: ">f8"}[code]
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(kind).tobytes()


@pytest.mark.parametrize("code", [0x08, 0x0C, 0x0E])
@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_file_gives_the_array_it_was_made_from(tmp_path, code, packed):
    array = np.arange(24).reshape(2, 3, 4)
    data = idx(array, code)
    (tmp_path / "x").write_bytes(gzip.compress(data) if packed else data)
    found = read_idx(tmp_path / "x")
    assert np.array_equal(found, array) and found.dtype.isnative


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:-5], r"is cut short: it holds 35 bytes, and shape \(2, 3, 4\) of uint8 needs 40"),
        (lambda data: data + b"!", "has bytes left over: it holds 41 bytes"),
        (lambda data: data[:7], "is cut short: its header names 3 axes"),
        (lambda data: b"PK\3\4" + data, "is no IDX file: it begins with 50 4b 03 04"),
        (lambda data: b"", "is no IDX file: it begins with no bytes at all"),
        (lambda data: gzip.compress(data)[:-12], "is a gzip file that is cut short or damaged"),
    ],
)
def test_a_damaged_idx_file_is_one_sentence(tmp_path, damage, sentence):
    path = tmp_path / "images"
    path.write_bytes(damage(idx(np.arange(24).reshape(2, 3, 4))))
    with pytest.raises(DataError, match=sentence) as error:
        read_idx(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_images_and_labels_must_belong_together(tmp_path):
    (tmp_path / "images").write_bytes(idx(np.zeros((3, 4, 4))))
    (tmp_path / "labels").write_bytes(idx(np.zeros(2)))
    with pytest.raises(DataError, match=r"3 images and .* 2 labels"):
        read_images_and_labels(tmp_path / "images", tmp_path / "labels")
    with pytest.raises(DataError, match="images are uint8 of shape"):
        read_images_and_labels(tmp_path / "labels", tmp_path / "images")


def mnist(folder, part, count):
    labels = np.arange(count) % 10
    images = np.zeros((count, 28, 28)) + 25 * labels[:, None, None]
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


def test_the_mnist_task_reads_its_four_files_or_splits_the_test_pair(tmp_path):
    mnist(tmp_path, "t10k", 50)
    split = get("mnist", folder=str(tmp_path))
    assert [len(part) for part in split.data()] == [40, 40, 10, 10]
    mnist(tmp_path, "train", 70)
    task = get(f"mnist(folder={str(tmp_path)!r}, depth=1, width=8)")
    assert [len(part) for part in task.data()] == [70, 70, 50, 50]
    model = task.model(0)
    assert torch.isfinite(task.loss(model, next(task.train_batches(0, 16))))
    with torch.no_grad():
        assert 0 <= task.evaluate(model.eval())["accuracy"] <= 100


def cifar(count, classes, start=0):
    rows = [bytes([(start + i) % 20] if classes == 100 else []) + bytes([(start + i) % classes]) + bytes([i % 256]) * 3072
            for i in range(count)]  # fmt: skip
    return b"".join(rows)


@pytest.mark.parametrize("classes", [10, 100])
def test_a_cifar_file_gives_images_and_labels(tmp_path, classes):
    (tmp_path / "b.bin").write_bytes(cifar(12, classes))
    images, labels = read_cifar(tmp_path / "b.bin", classes)
    assert images.shape == (12, 3, 32, 32) and images.dtype == np.uint8
    assert labels.tolist() == [i % classes for i in range(12)] and (images[5] == 5).all()


def test_a_damaged_or_wrong_cifar_file_is_one_sentence(tmp_path):
    path = tmp_path / "b.bin"
    path.write_bytes(cifar(3, 10)[:-100])
    with pytest.raises(DataError, match="2 records of 3073 and 2973 left over"):
        read_cifar(path)
    path.write_bytes(bytes([77]) + bytes(3072))
    with pytest.raises(DataError, match="holds the label 77, and CIFAR-10 goes to 9"):
        read_cifar(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no whole CIFAR-100 file"):
        read_cifar(path, 100)
    with pytest.raises(ValueError, match="10 or 100"):
        read_cifar(path, 20)


def test_a_cifar_folder_joins_its_training_files(tmp_path):
    for number in (1, 2):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(cifar(4, 10, number))
    with pytest.raises(DataError, match=r"not test_batch.bin"):
        read_cifar_folder(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(cifar(3, 10))
    images, labels, _, test_labels = read_cifar_folder(tmp_path)
    assert len(images) == 8 and labels.tolist() == [1, 2, 3, 4, 2, 3, 4, 5] and test_labels.tolist() == [0, 1, 2]
    task = get("cifar", folder=str(tmp_path), depth=1, width=8)
    with torch.no_grad():
        assert task.evaluate(task.model(0).eval()).keys() == {"accuracy", "loss"}


def test_text_comes_from_a_file_or_a_folder_in_sorted_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.md").write_text("first – é")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert list(read_text(tmp_path)) == ["a/one.md", "b.txt"]
    assert read_text(tmp_path / "b.txt") == {"b.txt": b"second"}
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    assert read_text(tmp_path / "c.txt.gz") == {"c.txt.gz": b"third"}


def test_text_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="holds no file ending in"):
        read_text(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match="no UTF-8 text: byte 0xe9 at 3"):
        read_text(tmp_path / "latin.txt")


def test_a_file_is_found_plain_or_gzipped_or_named_as_missing(tmp_path, monkeypatch):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"x"))
    assert read_bytes(find_file(tmp_path, "y", "x")) == b"x"
    with pytest.raises(DataError, match=r"holds x.gz, but not z \(plain or .gz\)"):
        find_file(tmp_path, "z")
    with pytest.raises(DataError, match="is no folder"):
        find_file(tmp_path / "none", "z")
    monkeypatch.setenv("HEADWAY_DATA", str(tmp_path.parent))
    assert data_folder(tmp_path.name) == tmp_path
    assert data_folder("no-such-data") is None
