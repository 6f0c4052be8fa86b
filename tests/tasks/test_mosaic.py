"""Mosaics of digits: every pixel has the label of the digit that it is of."""

from __future__ import annotations

import torch
from torch import nn

import headway as hw
from headway.norms.batch_channel import BatchChannelNorm2d
from headway.tasks.digits import Digits
from headway.tasks.mosaic import BACKGROUND
from headway.tasks.task import get


def test_a_mosaic_holds_four_digits_with_their_labels_where_their_ink_is():
    images, labels, held_out, marks = get("digits-mosaic").data()
    assert images.shape == (4 * 359, 1, 16, 16) and held_out.shape == (90, 1, 16, 16)
    single, kinds = Digits().data()[:2]
    for row, column in ((0, 0), (0, 8), (8, 0), (8, 8)):
        tile, mark = images[7, 0, row : row + 8, column : column + 8], labels[7, row : row + 8, column : column + 8]
        same = (single[:, 0] == tile).all((1, 2)).nonzero()[:, 0]
        assert len(same) and set(mark.unique().tolist()) == {int(kinds[same[0]]), BACKGROUND}
        assert torch.equal(mark != BACKGROUND, tile > -0.5)
    assert set(marks.unique().tolist()) == set(range(11))


class Knowing(nn.Module):
    """Gives the right answer, or background alone."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right, self.at, self.held = right, 0, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        marks = get("digits-mosaic").data()[3][self.at : self.at + len(images)]
        self.at += len(images)
        marks = marks if self.right else torch.full_like(marks, BACKGROUND)
        return 100.0 * nn.functional.one_hot(marks, BACKGROUND + 1).movedim(-1, 1)


def test_the_metric_is_100_for_the_right_answer_and_only_the_share_of_background_without_one():
    task = get("digits-mosaic")
    assert task.evaluate(Knowing(True)) == {"iou": 100.0, "accuracy": 100.0, "loss": 0.0}
    found = task.evaluate(Knowing(False))
    background = float((task.data()[3] == BACKGROUND).double().mean())
    assert abs(found["accuracy"] - 100 * background) < 1e-3 and abs(found["iou"] - 100 * background / 11) < 1e-3


def test_a_net_with_one_mosaic_a_step_learns_once_its_norms_are_for_micro_batches():
    task = get("digits-mosaic", width=8)
    torch.manual_seed(0)
    model = hw.apply(task.model(0), hw.MicroBatch(num_groups=4))
    assert sum(isinstance(module, BatchChannelNorm2d) for module in model.modules()) == 7
    optimizer, batches, losses = task.optimizer(model.parameters()), task.train_batches(0, 1), []
    for _ in range(40):
        loss = task.loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
