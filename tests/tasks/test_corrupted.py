"""Streams of corrupted images from small files made here, in the layouts of CIFAR-10-C and ImageNet-C."""

import numpy as np
import pytest
import torch

from headway.tasks.corrupted import corrupted_stream, read_cifar_c
from headway.tasks.files import DataError


@pytest.fixture
def arrays(tmp_path):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (20, 32, 32, 3), np.uint8), np.arange(20) % 10
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", labels.astype(np.uint8))
    return tmp_path, images, labels


def test_a_severity_is_its_fifth_of_the_array(arrays):
    folder, images, labels = arrays
    found, told = read_cifar_c(folder, "fog", 3)
    assert np.array_equal(found, images[8:12].transpose(0, 3, 1, 2)) and told.tolist() == labels[8:12].tolist()


def test_a_stream_gives_every_image_once_with_its_label(arrays):
    folder, images, labels = arrays
    for seed in (None, 1):
        batches = list(corrupted_stream(folder, "fog", 5, batch_size=3, seed=seed))
        assert [len(x) for x, _ in batches] == [3, 1]
        seen = {(round(float(x.sum()), 2), int(y)) for part in batches for x, y in zip(*part, strict=True)}
        last = torch.from_numpy(images[16:]).float() / 255
        assert seen == {(round(float(x.sum()), 2), int(y)) for x, y in zip(last, labels[16:], strict=True)}
        assert batches[0][0].shape[1:] == (3, 32, 32) and batches[0][1].dtype is torch.int64


def test_a_stream_runs_through_device_and_cloud(arrays):
    from torch import nn

    from headway.learning import CloudServer, simulate

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    net.eval()
    found = simulate(net, CloudServer(net, net, batch_size=2), corrupted_stream(arrays[0], "fog", 1, 2))
    assert found.samples == 4 and 0 <= found.accuracy <= 1


def test_pictures_are_counted_by_the_names_of_their_classes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, shade in (("n02", 200), ("n01", 10)):
        place = tmp_path / "fog" / "2" / name
        place.mkdir(parents=True)
        image.fromarray(np.full((6, 6, 3), shade, np.uint8)).save(place / "a.png")
    ((x, y),) = corrupted_stream(tmp_path, "fog", 2)
    assert y.tolist() == [0, 1] and (x[:, 0, 0, 0] * 255).round().tolist() == [10, 200]
    (place / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b.png cannot be read"):
        list(corrupted_stream(tmp_path, "fog", 2))
    with pytest.raises(DataError, match="holds no <class>"):
        corrupted_stream(tmp_path, "fog", 3)


def test_what_is_wrong_is_said(arrays):
    folder, images, _ = arrays
    with pytest.raises(ValueError, match="from 1 to 5; 6"):
        corrupted_stream(folder, "fog", 6)
    with pytest.raises(DataError, match=r"not snow.npy"):
        corrupted_stream(folder, "snow")
    np.save(folder / "labels.npy", np.arange(19))
    with pytest.raises(DataError, match=r"labels.npy has the shape \(19,\)"):
        corrupted_stream(folder, "fog")
    np.save(folder / "fog.npy", images[:, :16])
    with pytest.raises(DataError, match=r"not \(5 n, 32, 32, 3\)"):
        corrupted_stream(folder, "fog")
    (folder / "fog.npy").write_bytes(b"\x93NUMPY garbage")
    with pytest.raises(DataError, match="no whole array"):
        corrupted_stream(folder, "fog")
