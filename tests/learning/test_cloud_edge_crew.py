"""CEMA's cloud in several processes: they end where one does, and whatever becomes of them the server goes on."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time

import pytest
import torch
from torch import nn

from headway.learning.cloud_edge.adaptation import Adapter
from headway.learning.cloud_edge.client import EdgeClient
from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.crew import Crew
from headway.learning.cloud_edge.messages import Request
from headway.learning.cloud_edge.selection import EntropyThreshold
from headway.learning.cloud_edge.server import HTTPFrontEnd
from headway.learning.cloud_edge.settings import Settings, prepare
from headway.learning.cloud_edge.simulation import simulate


@pytest.fixture
def pair(nets, forks):
    """Makes an adapter that works alone and one with a crew of two processes, of the same networks."""
    crews, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)

    def made(patience=60.0, **settings):
        settings = Settings(**{"batch_size": 8, "replay_start": 30, **settings})
        models = prepare(nets.edge().double(), nets.foundation().double(), settings)
        crews.append(Crew(models, settings, 2, patience))
        return Adapter(*models, 0.5, settings), Adapter(*models, 0.5, settings, crews[-1])

    yield made
    for crew in crews:
        crew.close()
    torch.set_num_threads(threads)


def same(alone, together):
    one, two = alone.tensors(), together.tensors()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"batch_size": 7}, {"bn": "batch", "batch_size": 7}, {"reset_stats": True, "idle_replay": True}]
)
def test_two_processes_end_where_one_does_with_the_same_union_batch(nets, pair, settings):
    alone, together = pair(**settings)
    source = alone.tensors()
    for x in nets.stream(6, size=11):
        steps = [len(list(adapter.receive({"": x}))) for adapter in (alone, together)]
        assert steps[0] == steps[1] and not together.failures, together.last_error
    assert alone.steps >= 8 and len(alone.buffer) > 30  # with replay too
    same(alone, together)
    assert any(not torch.equal(t, source[name]) for name, t in together.tensors().items() if "weight" in name)
    y = nets.stream(1, seed=4)[0].double()
    torch.testing.assert_close(together.edge(y), alone.edge(y), rtol=0, atol=1e-12)


def test_a_process_that_dies_or_hangs_costs_nothing_but_time(nets, pair, caplog):
    alone, together = pair(patience=1.5)
    crew, batches = together._crew, nets.stream(4)
    with caplog.at_level(logging.ERROR):
        list(together.receive({"": batches[0]}))
        os.kill(crew._members[1].process.pid, signal.SIGKILL)  # between two steps
        crew._members[1].process.join()
        list(together.receive({"": batches[1]}))
        assert "process 2 of 2 was killed by SIGKILL between two steps; new processes are started" in caplog.text
        stopped = crew._members[1].process.pid
        os.kill(stopped, signal.SIGSTOP)  # in the middle of one: it does not answer
        list(together.receive({"": batches[2]}))
        assert "process 2 of 2 did not answer; the step is done again by new processes" in caplog.text
        with pytest.raises(ProcessLookupError):
            os.kill(stopped, 0)
        kill_in_the_middle_of_a_step(crew)
        list(together.receive({"": batches[3]}))
        assert "process 1 of 2 was killed by SIGKILL; the step is done again by new processes" in caplog.text
    assert crew.losses == 3 and crew.alive == 2 and together.failures == 0
    for x in batches:
        list(alone.receive({"": x}))
    same(alone, together)


def kill_in_the_middle_of_a_step(crew):
    """Kills process 1 as soon as it was sent its next part."""
    member = crew._members[0]
    send = member.send

    def sent(body):
        send(body)
        os.kill(member.process.pid, signal.SIGKILL)

    member.send = sent


def test_a_step_that_fails_in_one_process_changes_nothing_and_the_next_one_is_done(nets, pair):
    _, together = pair(transform=nets.refuses_nines)
    crew, x = together._crew, nets.stream(1)[0]
    list(together.receive({"": x}))
    before, bad = together.tensors(), x[:8].clone()
    bad[3] = 9  # in the part of the second process
    assert list(together.receive({"": bad})) == [] and together.failures == 1
    assert "no nines" in together.last_error and crew.losses == 0
    assert all(torch.equal(t, before[name]) for name, t in together.tensors().items())
    assert len(list(together.receive({"": x}))) == 2
    # what all of them see alike ends no process
    pids = [member.process.pid for member in crew._members]
    bad[3] = math.nan
    assert list(together.receive({"": bad})) == [] and "loss of the foundation model is nan" in together.last_error
    assert len(list(together.receive({"": x}))) == 2
    assert [member.process.pid for member in crew._members] == pids


def test_a_server_of_two_processes_goes_on_when_one_is_killed(nets, forks):
    results = []
    for processes in (1, 2):
        cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8, replay_start=64, processes=processes)
        with HTTPFrontEnd(cloud) as front:
            net, crew = nets.edge(), cloud._shop.crew
            client = EdgeClient(
                net, front.url, thresholds=EntropyThreshold(4, hi=0.82), deployment="a", background=False
            )
            simulate(client, front.url, nets.stream(8))
            if crew is not None:
                assert crew.alive == 2
                os.kill(crew._members[0].process.pid, signal.SIGKILL)
                while crew.alive == 2:
                    time.sleep(0.01)
            found = simulate(client, front.url, nets.stream(8, seed=3))
            told = json.loads(cloud.handle(Request("GET", "/v1/health")).body)
            assert told["processes"] == ({} if crew is None else {"asked": 2, "alive": 2, "losses": 1})
            assert told["deployments"]["a"]["failed_steps"] == 0
        results.append((found.stats["version"], net.state_dict()))
    assert results[0][0] == results[1][0] > 8
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, rtol=0, atol=1e-5)
    assert crew is not None and crew.alive == 0  # closed with the server


def test_what_several_processes_cannot_do_is_told_at_once(nets):
    edge, foundation = nets.edge(), nets.foundation()
    with pytest.raises(ValueError, match="8 samples of a batch, so there are 1 to 8; processes is 9"):
        CloudServer(edge, foundation, batch_size=8, processes=9)
    with pytest.raises(ValueError, match=r"picklable.*processes=1"):
        CloudServer(edge, foundation, transform=lambda x: x, processes=2)
    blind = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="1 has no running statistics"):
        CloudServer(edge, nn.Sequential(blind, nn.Flatten(), nn.Linear(64, 4)), processes=2)
    edge[1].momentum = None
    with pytest.raises(ValueError, match="momentum=None"):
        CloudServer(edge, foundation, bn="batch", processes=2)


def test_the_command_takes_the_number_of_processes(nets, monkeypatch):
    from headway.learning.cloud_edge import server

    class AskedError(Exception):
        pass

    def made(*models, **options):
        raise AskedError(options["processes"])

    monkeypatch.setattr(server, "CloudServer", made)
    arguments = ["--edge", "cloud_edge_children:edge", "--foundation", "cloud_edge_children:foundation"]
    for more, wanted in (([], 1), (["--processes", "4"], 4)):
        with pytest.raises(AskedError, match=str(wanted)):
            server.main([*arguments, *more])
