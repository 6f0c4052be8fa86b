# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""The class-incremental stream, the replay buffer and its losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headway.norms.balancing import convert_adab2n, start_task
from headway.tasks.rehearsal import ReservoirBuffer, buffer_classes, der_pp_loss, er_ace_loss, er_loss, er_step
from headway.tasks.task import get


def test_the_stream_shows_two_classes_at_a_time_once_and_replays_what_it_has_seen():
    task = get("digits-incremental", width=4)
    stream, seen, known = task.train_batches(3, 10), set(), set()
    for step in range(144):
        images, labels, tasks = next(stream)
        fresh = {tuple(i.flatten().tolist()) for i in images[:10]}
        for image in images[10:]:
            assert tuple(image.flatten().tolist()) in known or step == 0
        known |= fresh
        seen |= set(tasks.tolist())
        assert torch.equal(tasks, stream.task_of[labels])
    assert seen == set(range(5))
    again = task.train_batches(3, 10)
    again.skip(143)
    assert torch.equal(next(again)[0], images)
    for _ in range(20):  # beyond the end the last task goes on
        assert int(next(again)[2].max()) == 4


def test_several_passes_show_a_task_again_before_the_next_and_keep_each_sample_once():
    once, twice = (get("digits-incremental", width=4, passes=n).train_batches(0, 10) for n in (1, 2))
    assert len(twice.steps) == 2 * len(once.steps) and get("digits-incremental", passes=5).budget == "725 steps"
    newest = [int(twice.task_of[twice.labels[step]].max()) for step in twice.steps]
    assert newest == sorted(newest) and newest.count(0) == 2 * sum(
        twice.task_of[once.labels[s]].max() == 0 for s in once.steps
    )
    assert torch.cat([step[:1] for step in twice.steps]).bincount().max() <= 2
    with pytest.raises(ValueError, match="passes are at least 1"):
        get("digits-incremental", passes=0)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_task_that_a_comparison_can_run_with_and_without_balanced_norms(balanced):
    task = get("digits-incremental", width=8)
    torch.manual_seed(0)
    model = task.model(0)
    if balanced:
        convert_adab2n(model, 5)
    optimizer, batches = task.optimizer(model.parameters()), task.train_batches(0, 10)
    for _ in range(145):
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        optimizer.step()
    with torch.no_grad():
        found = task.evaluate(model.eval())
    assert found["accuracy"] > 50 and 0 <= found["first_task"] <= 100
    if balanced:
        assert model[1].current_task == 4 and float(model[1].task_weight.detach().abs().sum()) > 0


def test_a_reservoir_is_a_uniform_sample_of_everything_seen():
    counts = torch.zeros(40)
    for seed in range(300):
        buffer = ReservoirBuffer(10, seed)
        for part in torch.arange(40).split(7):
            buffer.add(part)
        assert len(buffer) == 10 and buffer.seen == 40
        counts[buffer.sample(10)[0]] += 1
    assert counts.sum() == 3000 and (counts - 75).abs().max() < 5 * (75 * 0.75) ** 0.5
    with pytest.raises(ValueError, match="empty"):
        ReservoirBuffer(1).sample(1)
    with pytest.raises(ValueError, match="capacity"):
        ReservoirBuffer(0)


def test_the_losses_are_what_their_papers_say():
    torch.manual_seed(0)
    new, old, again = torch.randn(3, 4, 5)
    a, b, c = torch.tensor([[3, 4, 3, 3], [0, 1, 2, 0], [1, 1, 0, 2]])
    torch.testing.assert_close(er_loss(new, a, old, b), F.cross_entropy(torch.cat([new, old]), torch.cat([a, b])))
    # the new samples compete among classes 3 and 4 only
    wanted = F.cross_entropy(new[:, 3:], a - 3) + F.cross_entropy(old, b)
    torch.testing.assert_close(er_ace_loss(new, a, old, b, torch.tensor([0, 1, 2])), wanted)
    stored = torch.randn(4, 5)
    wanted = F.cross_entropy(new, a) + 0.1 * (old - stored).square().mean() + 0.5 * F.cross_entropy(again, c)
    torch.testing.assert_close(der_pp_loss(new, a, old, stored, again, c), wanted)


@pytest.mark.parametrize("method", ["er", "er-ace", "der++"])
def test_a_step_trains_on_new_and_old_samples_in_one_pass_and_fills_the_buffer(method):
    task = get("digits-incremental", width=4)
    torch.manual_seed(0)
    model, buffer = convert_adab2n(task.model(0), 5), ReservoirBuffer(20)
    optimizer, sizes = task.optimizer(model.parameters()), []
    model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    images, labels = task.data()[:2]
    for number in range(2):
        start_task(model, number)
        loss = er_step(model, optimizer, images[:6] + number, labels[:6] % 2 + 2 * number, number, buffer, 5, method)
        assert loss == loss
    assert sizes == [6, 16 if method == "der++" else 11] and len(buffer) == 12
    assert set(buffer_classes(buffer).tolist()) <= {0, 1, 2, 3}
    with pytest.raises(ValueError, match="method is"):
        er_step(model, optimizer, images[:2], labels[:2], 0, buffer, method="gem")
