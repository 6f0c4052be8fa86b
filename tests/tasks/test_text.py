import math
import sysconfig

import pytest
import torch

from headway.tasks.files import DataError
from headway.tasks.task import get
from headway.tasks.text import split_files, stdlib_files


def test_the_standard_library_s_text_does_not_depend_on_where_python_lies(tmp_path):
    files = stdlib_files()
    assert "json/decoder.py" in files and list(files) == sorted(files)
    assert not any(
        name.startswith(("test/", "site-packages/")) or sysconfig.get_path("stdlib") in name for name in files
    )
    for name, data in files.items():
        path = tmp_path / "elsewhere" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "elsewhere" / "site-packages").mkdir()
    (tmp_path / "elsewhere" / "site-packages" / "other.py").write_text("x = 1")
    stdlib_files.cache_clear()
    assert stdlib_files(str(tmp_path / "elsewhere")) == files
    with pytest.raises(DataError, match="the standard library as a folder of sources was expected"):
        stdlib_files(str(tmp_path / "elsewhere" / "json"))
    stdlib_files.cache_clear()


def test_whole_files_are_held_out_and_a_missing_one_moves_no_other():
    files = {f"m{number}.py": f"<{number}>".encode() for number in range(200)}
    train, held_out = split_files(files)
    assert 8 < held_out.count(b"<") < 40 and train.count(b"<") + held_out.count(b"<") == 200
    gone = dict(files)
    del gone["m17.py"]
    assert [part.replace(b"<17>", b"") for part in (train, held_out)] == list(split_files(gone))


def test_a_single_file_gives_its_last_tenth():
    assert split_files({"x": bytes(range(100))}) == (bytes(range(90)), bytes(range(90, 100)))


def test_an_untrained_model_knows_about_as_much_as_chance():
    task = get("stdlib-text", depth=1, dim=16, heads=2, held_out=8)
    torch.manual_seed(0)
    with torch.no_grad():
        found = task.evaluate(task.model(0).eval())
    assert found["loss"] == pytest.approx(math.log(256), rel=0.15)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))


def test_training_text_is_of_the_order_of_megabytes_and_targets_follow_inputs():
    task = get("stdlib-text", length=32)
    train, held_out = task.texts()
    assert len(train) > 1_000_000 and len(held_out) > 50_000
    batch = next(task.train_batches(0, 4))
    assert batch.shape == (4, 33) and batch.dtype == torch.int64
    assert bytes(batch[0].tolist()) in bytes(train.tolist())


def test_own_text_is_a_task(tmp_path):
    (tmp_path / "poem.txt").write_text("the rose is red, the violet's blue\n" * 50)
    task = get(f"text(path={str(tmp_path)!r}, depth=1, dim=16, heads=2, length=16, held_out=4)")
    assert torch.isfinite(task.loss(task.model(0), next(task.train_batches(0, 4))))
    (tmp_path / "poem.txt").write_text("short")
    with pytest.raises(DataError, match="length=64 needs more"):
        get("text", path=str(tmp_path)).texts()


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="dim=10 cannot be split into heads=4"):
        get("stdlib-text", dim=10)
