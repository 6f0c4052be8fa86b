# pyright: reportMissingImports=false
"""The examples on photographs, from folders of small files to a picture on disk."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from headway.tasks import read_image, write_image
from headway.tasks.files import DataError

pytest.importorskip("PIL")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def pictures(folder, count, seed, size=(36, 44)):
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        write_image(folder / f"{i}.png", F.interpolate(torch.rand(1, 3, 3, 4, generator=draw), size, mode="bilinear"))
    return folder


def test_a_picture_is_translated_by_a_network_that_was_trained_on_two_folders(example, tmp_path, capsys):
    photos, path = example("translate_photos"), tmp_path / "run" / "network.pt"
    a, b = (pictures(tmp_path / "set" / f"train{letter}", 4, seed) for seed, letter in enumerate("AB"))
    small = {"size": 16, "base_dim": 4, "blocks": 1, "batch_size": 2, "path": path}
    torch.manual_seed(0)
    whole = photos.train(str(tmp_path / "set"), steps=3, **small)
    path.unlink()
    torch.manual_seed(0)
    photos.train(str(tmp_path / "set"), steps=2, **small)
    resumed = photos.train(str(tmp_path / "set"), steps=1, **small)
    for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert "step 3: generator" in capsys.readouterr().out and [p.name for p in path.parent.iterdir()] == ["network.pt"]
    made = [
        read_image(photos.translate(str(a / "0.png"), str(b / exemplar), str(tmp_path / "out.png"), direction, path))
        for exemplar, direction in (("0.png", "ab"), ("1.png", "ab"), ("0.png", "ba"))
    ]
    assert made[0].shape == (3, 16, 20)  # the shape of the content, its shorter side at the size trained on
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_a_hole_is_filled_and_every_other_pixel_stays(example, tmp_path):
    photos, path = example("inpaint_photos"), tmp_path / "network.pt"
    folder = pictures(tmp_path / "photos", 3, 0, (45, 62))
    hole = torch.zeros(1, 45, 62, dtype=torch.bool)
    hole[:, 10:30, 20:40] = True
    for name, mask in (("mask.png", hole), ("black.png", ~hole)):
        write_image(tmp_path / name, mask.float())
    small = {"size": 16, "width": 4, "blocks": 1, "batch_size": 2, "path": path}
    torch.manual_seed(0)
    whole = photos.train(str(folder), steps=3, **small)
    path.unlink()
    torch.manual_seed(0)
    (tmp_path / "masks").mkdir()
    write_image(tmp_path / "masks" / "0.png", hole.float())
    photos.train(str(folder), steps=2, **small)
    resumed = photos.train(str(folder), steps=1, **small)
    for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    photos.train(str(folder), masks=str(tmp_path / "masks"), steps=1, **small)
    image = read_image(folder / "0.png")
    holed = write_image(tmp_path / "holed.png", torch.where(hole, 1.0, image))
    made = []
    for photo, mask, settings in (
        (folder / "0.png", "mask.png", {}),
        (holed, "mask.png", {}),
        (holed, "black.png", {"hole": "black"}),
        (holed, "mask.png", {"longest": 30}),
    ):
        out = photos.fill(str(photo), str(tmp_path / mask), str(tmp_path / "out.png"), path=path, **settings)
        made.append(read_image(out))
        assert torch.equal(torch.where(hole, 0, made[-1]), torch.where(hole, 0, image))
    assert torch.equal(made[0], made[1]) and torch.equal(made[1], made[2])  # what the hole held is not looked at
    assert not torch.equal(made[2], made[3]) and (made[0] != image).any()


def test_what_is_missing_or_does_not_fit_is_one_sentence(example, tmp_path):
    translate, inpaint = example("translate_photos"), example("inpaint_photos")
    path = tmp_path / "network.pt"
    with pytest.raises(DataError, match="is not there; train first"):
        translate.translate("a.png", "b.png", "c.png", path=path)
    inpaint.train(
        str(pictures(tmp_path / "photos", 2, 0)), steps=1, size=16, width=4, blocks=0, batch_size=1, path=path
    )
    with pytest.raises(DataError, match=r"holds a network of \{'width': 4, 'blocks': 0\}, not .*another --network"):
        inpaint.train(steps=1, path=path)
    write_image(tmp_path / "mask.png", torch.ones(1, 8, 8))
    with pytest.raises(DataError, match=r"mask.png is 8x8 and .*0.png is 44x36"):
        inpaint.fill(str(tmp_path / "photos" / "0.png"), str(tmp_path / "mask.png"), "out.png", path=path)
    said = subprocess.run(
        [sys.executable, EXAMPLES / "translate_photos.py", "train", tmp_path / "photos"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    *_, last = said.stderr.splitlines()
    assert said.returncode == 1 and "Traceback" not in said.stderr and last.startswith("translate_photos: ")
    assert "trainA and trainB" in last and not (tmp_path / "runs").exists()
