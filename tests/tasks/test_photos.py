# pyright: reportMissingImports=false
"""Tasks on folders of photographs, on small files made here: real formats in, a training step and a measure out."""

import pytest
import torch

import headway as hw
from headway.norms import GDWCT, RegionNormB2d
from headway.tasks.files import DataError
from headway.tasks.image_files import ImageFiles, MaskFiles, write_image
from headway.tasks.photos import patches
from headway.tasks.task import get
from headway.vision import irregular_masks, rectangular_masks

pytest.importorskip("PIL")


def pictures(folder, count, suffix, seed=0):
    """Noise of few colours, of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        small = torch.rand(1, 3, 3, 4, generator=draw)
        write_image(folder / f"{i:03}{suffix}", torch.nn.functional.interpolate(small, (20 + i, 30), mode="bilinear"))


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    for i, (part, count) in enumerate({"trainA": 5, "trainB": 4, "testA": 3, "testB": 2}.items()):
        pictures(folder / part, count, ".jpg", i)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    pictures(folder / "images" / "airfield", 12, ".jpg")
    (folder / "masks").mkdir()
    for i, mask in enumerate(irregular_masks(3, 32, generator=torch.Generator().manual_seed(0))):
        write_image(folder / "masks" / f"{i:05}.png", mask.float())
    (folder / "train.flist").write_text("".join(f"images/airfield/{i:03}.jpg\n" for i in range(10)))
    (folder / "val.txt").write_text("/images/airfield/010.jpg 0\n/images/airfield/011.jpg 0\n")
    return folder


def trained(task, technique, steps=3):
    torch.manual_seed(0)
    model = hw.apply(task.model(0), technique)
    optimizer, batches = task.optimizer(model.parameters()), task.train_batches(0, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, next(batches))
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    with torch.no_grad():
        return model, task.evaluate(model.eval())


def test_translation_trains_from_four_folders_and_is_measured_on_what_is_held_out(domains):
    task = get("translation", folder=str(domains), size=16, base_dim=4, blocks=1)
    assert [[len(x) for x in pair] for pair in task.data()] == [[5, 4], [3, 2]]
    a, b = next(task.train_batches(0, 2))
    assert a.shape == b.shape == (2, 3, 16, 16) and a.min() < -0.1 and a.abs().max() <= 1
    model, found = trained(task, hw.ReplaceAdaIN(groups=4, mlp_dim=8))
    assert any(isinstance(m, GDWCT) for m in model.modules()) and found["covariance_error"] > 0
    made, exemplars = task.translated(model)
    assert made.shape == exemplars.shape == (3, 3, 16, 16)
    held_out = task.data()[1][1]
    assert torch.equal(exemplars, held_out[torch.tensor([1, 0, 1])])


def test_inpainting_trains_from_a_folder_and_from_lists_with_masks_of_its_own_or_drawn_ones(places):
    task = get(
        "inpainting", folder=str(places / "images"), masks_from=str(places / "masks"), size=16, width=4, blocks=1
    )
    assert [len(x) for x in task.images()] == [11, 1] and len(task.masks()[0]) == 3
    images, masks, _ = next(task.train_batches(0, 2))
    assert images.shape == (2, 3, 16, 16) and masks.dtype == torch.bool and 0 < masks.float().mean() < 0.7
    model, found = trained(task, hw.RegionNorm())
    assert any(isinstance(m, RegionNormB2d) for m in model.modules())
    assert found.keys() == {"psnr"} and 5 < found["psnr"] < 60
    listed = get("inpainting", folder=str(places / "train.flist"), test=str(places / "val.txt"), size=16, width=4)
    assert [len(x) for x in listed.images()] == [10, 2]
    assert {p.name for p in listed.images()[1].paths} == {"010.jpg", "011.jpg"}
    with torch.no_grad():
        assert listed.evaluate(listed.model(0).eval()).keys() == {"psnr", "psnr_large"}


def test_batches_of_files_depend_on_the_seed_and_their_place_alone(domains, places):
    for task in (
        get("translation", folder=str(domains), size=16),
        get("inpainting", folder=str(places / "images"), size=16),
    ):
        stream, later, other = (task.train_batches(seed, 2) for seed in (3, 3, 4))
        whole = [next(stream) for _ in range(4)]
        later.skip(3)
        assert all(torch.equal(x, y) for x, y in zip(next(later), whole[3], strict=True))
        assert not torch.equal(next(other)[0], whole[0][0])


def test_black_can_mark_the_hole(places):
    task = get("inpainting", folder=str(places / "images"), masks_from=str(places / "masks"), hole="black", size=16)
    light = MaskFiles(task.masks()[0].paths, 16)[:]
    assert isinstance(task.images()[0], ImageFiles) and torch.equal(task.masks()[0][:], ~light)


def test_two_photographs_are_there_without_a_folder():
    task = get("inpainting", width=4, blocks=1)
    train, late = task.images()
    assert train.shape[1:] == late.shape[1:] == (3, 32, 32) and len(train) > 1000 and len(late) > 80
    assert all(0 <= part.min() < 0.1 and 0.9 < part.max() <= 1 for part in (train, late))
    whole = patches(80)
    assert whole[1].shape[1:] == (3, 80, 80)  # all that is held out of the width
    usual, large = task.masks()[1:]
    assert len(usual) == len(late) and usual.float().mean() < 0.3 < large.float().mean()
    model = task.model(0)
    task.loss(model, next(task.train_batches(0, 4))).backward()
    with torch.no_grad():
        assert task.evaluate(model.eval()).keys() == {"psnr", "psnr_large"}


def test_rectangles_are_holes_of_the_sides_and_the_number_asked_for():
    one = rectangular_masks(40, (16, 32), (1, 1), torch.Generator().manual_seed(0))
    assert one.shape == (40, 1, 16, 32) and one.dtype == torch.bool
    rows, columns = one.any(3)[:, 0], one.any(2)[:, 0]
    assert torch.equal(one[:, 0], rows[:, :, None] & columns[:, None])  # one rectangle each
    assert {int(n) for n in rows.sum(1)} == {2, 3, 4, 5, 6} and columns.sum(1).min() >= 4 and columns.sum(1).max() <= 12
    assert all(int((r[1:] & ~r[:-1]).sum() + r[0]) == 1 for r in rows)
    more = [rectangular_masks(40, 32, n, torch.Generator().manual_seed(0)).float().mean() for n in ((2, 5), (6, 9))]
    assert more[0] < more[1] and rectangular_masks(0, 8).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match="1 <= low <= high"):
        rectangular_masks(1, 8, (3, 2))


def test_wrong_folders_and_settings_are_one_sentence(tmp_path, domains):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.jpg").write_bytes(b"no picture")
    (tmp_path / "broken" / "y.jpg").write_bytes(b"no picture")
    for task, words in (
        (get("translation", folder=str(tmp_path)), "trainA and trainB"),
        (get("translation", folder=str(domains), attribute="Smiling"), "but not list_attr_celeba"),
        (get("inpainting", folder=str(tmp_path / "none")), "cannot be read"),
        (get("inpainting", folder=str(tmp_path / "broken")), "is no whole picture"),
    ):
        with pytest.raises(DataError, match=words):
            next(task.train_batches(0, 1))
    for settings, words in (
        ({"size": 18}, "multiple of 4"), ({"size": 84}, "at most 80"), ({"test": "x"}, "give both"), ({"fill": "grey"}, "fill is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            get("inpainting", **settings)
    with pytest.raises(ValueError, match="multiple of 4"):
        get("translation", folder="x", base_dim=6)
