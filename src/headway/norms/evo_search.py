"""Evolving layers for your own networks, as EvoNorm was found (arXiv 2004.02967): random graphs, two rejections, tournaments.

    result = search_layers(ANCHORS, (x, y, x_val, y_val), budget=300)
    layer = result.best.to_module(64)

A candidate is thrown out early where it cannot work: after 100 steps below 20 % accuracy in any anchor net, or with a value that is
not finite (quality); or where climbing the norm of the loss gradient over the convolution weights passes 1e8 (stability). Survivors
are trained a little longer in every anchor (:mod:`headway.norms.evo_judge`); the parent of the next is a member of a sample's Pareto
front, the oldest of the population leaves, and the best are ranked again after longer training. The numbers of the protocol are
from memory of the paper, whose search was not released. For classification nets that train in seconds. One anchor alone overfits.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from headway._files import write_bytes
from headway.norms.evo_anchors import Anchor
from headway.norms.evo_graph import GraphLayer, LayerGraph
from headway.norms.evo_judge import Data, GradientNorm, NotFinite, Protocol, judge, train_score


@dataclass(frozen=True)
class Candidate:
    """One judged layer: its formula, "" or why it was rejected ("quality", "stability", "duplicate"), accuracies by anchor, and the
    ``index`` of the candidate that it is a mutation of (None: it was drawn at random)."""

    index: int
    formula: str
    nodes: list[Any]
    rejected: str = ""
    scores: list[float] = field(default_factory=list)
    parent: int | None = None

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)

    @property
    def graph(self) -> LayerGraph:
        return LayerGraph(tuple((op, tuple(at)) for op, at in self.nodes))

    def to_module(self, num_features: int, groups: int = 8) -> GraphLayer:
        return self.graph.to_module(num_features, groups)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        history: every candidate in the order of judging.
        ranked: survivors, best first: those trained longer by that, then the others by the mean over anchors.
        rejections: how many were thrown out, by reason.
    """

    history: list[Candidate]
    ranked: list[Candidate]
    rejections: dict[str, int]

    @property
    def best(self) -> Candidate:
        """The first of the ranking; ValueError where nothing survived."""
        if not self.ranked:
            raise ValueError(
                f"no candidate of {len(self.history)} survived ({self.rejections}); search on, or judge milder"
            )
        return self.ranked[0]


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one matches in every anchor and beats in one."""

    def beaten(one: Candidate, by: Candidate) -> bool:
        pairs = list(zip(by.scores, one.scores, strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [one for one in candidates if not any(beaten(one, other) for other in candidates)]


_DRAWS = 200
"""How often a candidate is drawn until its formula is new."""

_JOB: tuple[Sequence[Anchor], Data, Protocol] | None = None


def _start(*job: Any) -> None:
    global _JOB
    torch.set_num_threads(1)
    _JOB = job  # type: ignore[assignment]


def _one(graph: LayerGraph) -> tuple[str, list[float]]:
    assert _JOB is not None
    return judge(graph, *_JOB)


def search_layers(
    anchors: Mapping[str, Anchor] | Sequence[Anchor],
    data: Data,
    budget: int,
    population: int = 40,
    tournament: float = 0.05,
    quality: tuple[int, float] | None = (100, 0.2),
    stability: tuple[int, float, float] | None = (100, 0.1, 1e8),
    batch_free: bool = False,
    objective: Literal["pareto", "average"] = "pareto",
    seed: int = 0,
    workers: int = 1,
    *,
    steps: int = 150,
    rerank: tuple[int, int] | None = (5, 400),
    nodes: int = 10,
    seconds: float | None = None,
    file: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    learning_rate: float = 0.05,
    gradient_norm: GradientNorm | None = None,
) -> SearchResult:
    """Judges ``budget`` candidates and ranks the survivors.

    Args:
        anchors: functions from a layer factory to a net (:data:`headway.norms.evo_anchors.ANCHORS`), several of them.
        data: images and labels to train on, images and labels to judge by.
        budget: candidates in all, rejected ones included. One whose formula is known is drawn again; where new ones are too rare for
            that, it counts as a "duplicate".
        population: survivors that parents are drawn from; random graphs until there are as many, or half the budget (or of the
            ``seconds``) is spent.
        tournament: the share of the population that one parent is drawn among, two members at least.
        quality: (steps, least accuracy), or None to leave the test out.
        stability: (steps, rate, limit), or None.
        batch_free: no statistic over the batch (the S series).
        objective: "pareto" (the paper's choice) or "average" over anchors.
        seed: the same seed and ``workers`` give the same history.
        workers: processes; anchors and ``gradient_norm`` must then be importable functions.
        steps: of the training that scores a survivor. rerank: (how many of the best, steps) at the end, or None.
        nodes: of a random graph, after the four initial ones.
        seconds: begin no further candidate after so long, whatever is left of the budget; the history then depends on the machine.
        file: where the history is kept after every round; a search that finds its file goes on from there.
        batch_size, learning_rate: of every training.
        gradient_norm: (model, x, y, weights) -> the norm that the stability test climbs.

    Raises:
        ValueError: a setting out of its range, or a file of another search.
    """
    if budget < 1 or population < 1 or workers < 1 or not 0 < tournament <= 1 or objective not in ("pareto", "average"):
        raise ValueError(
            'budget, population and workers are at least 1, tournament is in (0, 1], objective "pareto" or "average"; '
            f"they are {budget}, {population}, {workers}, {tournament} and {objective!r}"
        )
    chosen = list(anchors.values()) if isinstance(anchors, Mapping) else list(anchors)
    protocol = Protocol(quality, stability, steps, batch_size, learning_rate, seed, gradient_norm)
    settings = [
        population,
        tournament,
        quality,
        stability,
        batch_free,
        objective,
        seed,
        workers,
        steps,
        nodes,
        len(chosen),
    ]
    history, start = _load(file, settings), time.monotonic()
    known = {c.formula for c in history}
    pool = None
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(chosen, data, protocol))
    try:
        while len(history) < budget and (seconds is None or time.monotonic() - start < seconds):
            half = seconds is not None and time.monotonic() - start > seconds / 2
            drawn, fresh = [], {}
            for i in range(len(history), min(len(history) + workers, budget)):
                new = _next(
                    history, i, population, tournament, objective, seed, nodes, batch_free, half or i >= budget // 2,
                    known | fresh.keys(),
                )  # fmt: skip
                drawn.append(new)
                if new[0].formula not in known:
                    fresh.setdefault(new[0].formula, new[0])
            judged = (
                pool.map(_one, fresh.values()) if pool else (judge(g, chosen, data, protocol) for g in fresh.values())
            )
            verdicts = dict(zip(fresh, judged, strict=True))
            for graph, parent in drawn:
                rejected, scores = verdicts.pop(graph.formula, ("duplicate", []))
                nodes_of = [[op, list(at)] for op, at in graph.nodes]
                history.append(Candidate(len(history), graph.formula, nodes_of, rejected, scores, parent))
            known |= fresh.keys()
            _save(file, settings, history)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    survivors = sorted((c for c in history if not c.rejected), key=lambda c: (-c.mean, c.index))
    if rerank is not None and survivors:
        survivors = _again(survivors, rerank, chosen, data, protocol)
    reasons = [c.rejected for c in history if c.rejected]
    return SearchResult(history, survivors, {reason: reasons.count(reason) for reason in sorted(set(reasons))})


def _next(
    history: Sequence[Candidate], index: int, population: int, tournament: float, objective: str, seed: int, nodes: int,
    batch_free: bool, late: bool, known: AbstractSet[str],
) -> tuple[LayerGraph, int | None]:  # fmt: skip
    """A random graph, or a mutation of the winner of a tournament with its index; drawn again while its formula is known."""
    draw = random.Random(f"{seed} {index}")
    arguments = history, population, tournament, objective, nodes, batch_free, late
    graph, parent = _draw(draw, *arguments)
    for _ in range(_DRAWS):
        if graph.formula not in known:
            break
        graph, parent = _draw(draw, *arguments)
    return graph, parent


def _draw(
    draw: random.Random, history: Sequence[Candidate], population: int, tournament: float, objective: str, nodes: int,
    batch_free: bool, late: bool,
) -> tuple[LayerGraph, int | None]:  # fmt: skip
    alive = [c for c in history if not c.rejected][-population:]
    if not alive or (len(alive) < population and not late):
        return LayerGraph.random(draw, nodes, batch_free), None
    sample = draw.sample(alive, min(len(alive), max(2, round(tournament * population))))
    if objective == "average":
        parent = max(sample, key=lambda c: c.mean)
    else:
        parent = draw.choice(pareto(sample))
    return parent.graph.mutate(draw, batch_free), parent.index


def _again(
    survivors: list[Candidate], rerank: tuple[int, int], anchors: Sequence[Anchor], data: Data, protocol: Protocol
) -> list[Candidate]:
    count, steps = rerank
    longer: list[tuple[float, Candidate]] = []
    for each in survivors[:count]:
        try:
            scores = [train_score(anchor, each.to_module, data, steps, protocol) for anchor in anchors]
        except NotFinite:
            scores = [0.0]
        longer.append((sum(scores) / len(scores), each))
    longer.sort(key=lambda pair: (-pair[0], pair[1].index))
    return [each for _, each in longer] + survivors[count:]


def _load(file: str | os.PathLike[str] | None, settings: list[Any]) -> list[Candidate]:
    if file is None or not Path(file).exists():
        return []
    kept = json.loads(Path(file).read_text())
    if kept["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(f"{file} holds a search with other settings; name another file")
    return [Candidate(**each) for each in kept["history"]]


def _save(file: str | os.PathLike[str] | None, settings: list[Any], history: list[Candidate]) -> None:
    if file is None:
        return
    write_bytes(file, json.dumps({"settings": settings, "history": [asdict(c) for c in history]}).encode())
