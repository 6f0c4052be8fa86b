"""The claims of region normalisation that need no clock, and that verdicts follow the numbers."""

import torch

from headway.claims import region_norm as claims
from headway.tasks.inpainting import DigitsInpainting


def test_whole_planes_shift_valid_pixels_and_regions_do_not():
    evidence = claims._shift(True)
    assert evidence.verdict == "holds"
    assert all(row["full"] > 1000 * row["region"] for row in evidence.rows)


def test_the_verdict_on_the_shift_follows_the_numbers(monkeypatch):
    monkeypatch.setattr(claims, "region_norm", lambda x, _: torch.nn.functional.instance_norm(x))
    assert claims._shift(True).verdict == "partly"


def test_memory_is_the_input_and_the_mask():
    evidence = claims._memory()
    assert evidence.verdict == "holds"
    shares = {row["layer"]: row["share"] for row in evidence.rows}
    assert 1 < shares["RN-B"] < 1.02 and shares["RN-L"] < 1.2


def test_inpainting_is_judged_by_what_exceeds_the_spread_over_seeds(monkeypatch):
    numbers = {"batch norm": 20.0, "instance norm": 21.0, "RN-B + instance norm": 21.5, "RN-B + RN-L": 20.5}
    wide = 0.0

    def made_up(arm, seed, steps, *_):
        return {"arm": arm, "seed": seed, "psnr": numbers[arm] + wide * seed, "psnr_large": numbers[arm] + wide * seed}

    monkeypatch.setattr(claims, "train", made_up)
    assert claims._better(True).verdict == "partly"  # ahead of batch norm alone
    assert claims._random_fill(True).verdict == "does not hold here"
    numbers["RN-B + RN-L"] = 22.0
    assert claims._better(False).verdict == claims._random_fill(False).verdict == "holds"
    wide = 0.75  # 1.5 from seed 0 to seed 2
    assert claims._better(False).verdict == "partly"
    assert claims._random_fill(False).verdict == "does not hold here"


def test_inpainting_is_trained_on_photographs_where_they_can_be_read_and_else_on_digits(monkeypatch):
    monkeypatch.setattr(claims.importlib.util, "find_spec", lambda _: None)
    task, batch_size, images = claims.workload()
    assert task.name == "digits-inpainting" and batch_size == 32 and "digits" in images
    task = DigitsInpainting(4, 1)
    row = claims.train("RN-B + RN-L", 0, 2, task, 4)
    assert row["arm"] == "RN-B + RN-L" and row["psnr"] > 0
    monkeypatch.setattr(claims.importlib.util, "find_spec", lambda _: object())
    assert claims.workload()[0].name == "inpainting"
