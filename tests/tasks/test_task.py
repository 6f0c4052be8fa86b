import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from headway.tasks.batches import Batches
from headway.tasks.names import parse, spell, split
from headway.tasks.task import Task, get, names

_OF_FILES = ["cifar", "inpainting", "mnist", "text", "translation"]
EMBEDDED = [name for name in names() if name not in _OF_FILES] + ["digits-diffusion(network='unet')"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_task_gives_all_that_a_comparison_needs(name):
    if name == "stdlib-text":
        pytest.importorskip("headway.residual.transformer")
    task = get(name)
    torch.manual_seed(0)
    model = task.model(0)
    batch = next(task.train_batches(0, 4))
    loss = task.loss(model, batch)
    assert loss.ndim == 0 and torch.isfinite(loss)
    loss.backward()
    task.optimizer(model.parameters()).step()
    with torch.no_grad():
        assert task.metric in task.evaluate(model.eval())
    assert torch.isfinite(task.loss(model, task.probe_batch()))


@pytest.mark.parametrize("name", [name for name in EMBEDDED if name != "digits-vit"])
def test_batches_depend_on_the_seed_and_their_place_alone(name):
    def flat(batch):
        return batch if isinstance(batch, torch.Tensor) else batch[-2]

    task = get(name)
    stream = task.train_batches(3, 8)
    whole = [flat(next(stream)) for _ in range(6)]
    later = task.train_batches(3, 8)
    later.skip(4)
    assert torch.equal(flat(next(later)), whole[4])
    assert not torch.equal(flat(next(task.train_batches(4, 8))), whole[0])
    assert not torch.equal(whole[0], whole[1])


def test_an_epoch_shows_every_sample_once():
    batches = Batches(10, 5, 0, lambda index: index.tolist())
    first, second = [sorted(next(batches) + next(batches)) for _ in range(2)]
    assert first == second == list(range(10))
    with pytest.raises(ValueError, match="cannot be drawn from 3 samples"):
        Batches(3, 4, 0, lambda index: index)


def test_digits_are_learned():
    task = get("digits", depth=2, width=16)
    torch.manual_seed(0)
    model, batches = task.model(0), task.train_batches(0, 64)
    optimizer = task.optimizer(model.parameters())
    for _ in range(80):
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(model.eval())["accuracy"] > 40


def test_the_layers_of_the_vision_transformer_begin_apart():
    first, second, *_ = get("digits-vit").model(0).encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert not torch.equal(first.self_attn.in_proj_weight, second.self_attn.in_proj_weight)


def test_the_learning_rate_warms_up_and_falls():
    rates = [Task().rate(step / 100) for step in range(101)]
    assert rates[0] < 0.02 and rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_settings_tell_variants_of_a_task_apart():
    assert get("digits(depth=2)").settings() == {"depth": 2, "norm": "layer", "width": 32}
    assert get("stdlib-text", depth=12).settings()["depth"] == 12


def test_a_user_s_own_task_is_a_python_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    task = get("own_task:make_task(depth=1)")
    model = task.model(0)
    assert torch.isfinite(task.loss(model, next(task.train_batches(0, 8))))
    assert task.settings() == {"depth": 1, "dim": 32, "length": 12}


def test_names_that_lead_nowhere_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="did you mean digits"):
        get("digit")
    with pytest.raises(ValueError, match="there is no module nowhere"):
        get("nowhere:make")
    with pytest.raises(ValueError, match="has no 'thing'"):
        get("json:thing")
    with pytest.raises(TypeError, match="digits has no setting deepness; it takes depth, width, norm"):
        get("digits", deepness=3)
    with pytest.raises(TypeError, match="mnist needs folder"):
        get("mnist")
    with pytest.raises(ValueError, match='"layer" or "batch"'):
        get("digits", norm="group")
    broken = types.ModuleType("broken_task")
    broken.make = lambda: nn.Linear(1, 1)
    monkeypatch.setitem(sys.modules, "broken_task", broken)
    with pytest.raises(TypeError, match="lacks name, metric"):
        get("broken_task:make")


def test_words_with_settings_are_read_and_spelled():
    assert parse("a-b(x=1, y='p,q')") == ("a-b", {"x": 1, "y": "p,q"})
    assert parse(spell("k", {"x": [1, 2], "y": None})) == ("k", {"x": [1, 2], "y": None})
    assert split("a(x=1,y=(2,3)),b(z='(,'),c") == ["a(x=1,y=(2,3))", "b(z='(,')", "c"]
    for wrong in ("a(1)", "a(x=1", "a(x=open('f'))", "a(**b)"):
        with pytest.raises(ValueError, match="was not understood"):
            parse(wrong)


def test_built_in_names_are_listed():
    assert names() == sorted(names())
    assert {"digits", "stdlib-text", "text-reversal", *_OF_FILES} <= set(names())
