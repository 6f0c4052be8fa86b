"""Whatever stops a comparison, going on gives exactly what an uninterrupted one gives."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from headway.trials.comparison import Comparison
from headway.trials.interrupts import Interrupted
from headway.trials.store import Store


def outcome(comparison):
    """Everything that must not depend on interruptions: losses and held-out measures, not times."""
    found = {}
    for arm in comparison.arms:
        for seed in comparison.seeds:
            curve = comparison.curves(arm, seed)
            found[arm, seed] = (curve["steps"], curve["loss"], curve["metrics"])
    return found


@pytest.fixture(scope="module")
def uninterrupted(children, tmp_path_factory):
    comparison = children.run(tmp_path_factory.mktemp("whole") / "whole.sqlite", checkpoint_every=1e9)
    assert comparison.finished
    assert all(steps == list(range(1, 31)) for steps, _, _ in outcome(comparison).values())
    return comparison


def test_a_comparison_killed_twenty_times_equals_an_uninterrupted_one(children, forks, tmp_path, uninterrupted):
    draw = random.Random(0)
    kills, number = 0, 0
    while kills < 20:
        number += 1
        store = tmp_path / f"killed-{number}.sqlite"
        finished_before: dict[int, int] = {}
        while True:
            child = forks.Process(target=children.run_quietly, args=(store, 0.006))
            child.start()
            # From before the store is opened to deep inside a run; each life gets a little further.
            child.join(draw.uniform(0.05, 0.9))
            if child.exitcode is not None:
                assert child.exitcode == 0
                break
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
            if store.exists():
                seen = attempts_of_finished(store)
                assert finished_before.items() <= seen.items(), "a finished run was lost or run again"
                finished_before = seen
        comparison = Comparison.load(store)
        assert comparison.finished
        assert outcome(comparison) == outcome(uninterrupted)
        assert finished_before.items() <= attempts_of_finished(store).items()
        assert not list(Store(store).folder.glob("*"))
    assert number <= kills


def attempts_of_finished(store):
    try:
        runs = Store(store).comparison()["runs"]
    except ValueError:
        return {}
    return {run["id"]: run["attempts"] for run in runs if run["status"] == "finished"}


def test_a_resumed_run_goes_on_from_its_checkpoint_and_not_from_the_start(children, forks, tmp_path, uninterrupted):
    store = tmp_path / "once.sqlite"
    child = forks.Process(target=children.run_quietly, args=(store, 0.02))
    child.start()
    wait_for_progress(store, 0.3)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    comparison = children.run(store)
    claims = Store(store)._db.execute("SELECT run, from_step FROM claims ORDER BY at").fetchall()
    again = [claim["from_step"] for claim in claims[1:] if claim["run"] == claims[0]["run"]]
    assert len(claims) == 5 and len(again) == 1 and again[0] >= 9
    assert outcome(comparison) == outcome(uninterrupted)


def wait_for_progress(store, share):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if store.exists():
            try:
                runs = Store(store).comparison()["runs"]
            except ValueError:
                runs = []
            if any(run["progress"] >= share and run["status"] == "running" for run in runs):
                return
        time.sleep(0.01)
    raise AssertionError("the child made no progress")


def test_two_processes_on_one_store_never_take_the_same_run(children, forks, tmp_path, uninterrupted):
    store = tmp_path / "shared.sqlite"
    workers = [forks.Process(target=children.run_quietly, args=(store, 0.01)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    claims = Store(store)._db.execute("SELECT run, claimed_by FROM claims").fetchall()
    assert sorted(claim["run"] for claim in claims) == [1, 2, 3, 4]
    assert len({claim["claimed_by"] for claim in claims}) == 2
    assert outcome(Comparison.load(store)) == outcome(uninterrupted)


def test_ctrl_c_saves_gives_back_and_says_how_to_go_on(children, tmp_path, uninterrupted):
    store = tmp_path / "stopped.sqlite"
    script = f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        import trial_children
        trial_children.run({str(store)!r}, 0.02, checkpoint_every=1e9)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE, text=True)
    wait_for_progress_by_claim(store)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode != 0
    assert "run the same command again to go on" in errors
    runs = Store(store).comparison()["runs"]
    assert all(run["status"] in ("waiting", "finished") for run in runs)
    assert any(0 < run["progress"] < 1 for run in runs)
    assert outcome(children.run(store)) == outcome(uninterrupted)


def wait_for_progress_by_claim(store):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if store.exists():
            try:
                if any(run["status"] == "running" for run in Store(store).comparison()["runs"]):
                    time.sleep(0.3)
                    return
            except ValueError:
                continue
        time.sleep(0.02)
    raise AssertionError("no run was claimed")


def test_a_signal_in_this_process_raises_a_keyboard_interrupt_with_a_sentence(children, tmp_path, monkeypatch):
    whole = children.Tiny.loss
    calls = []

    def loss(self, model, batch):
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return whole(self, model, batch)

    monkeypatch.setattr(children.Tiny, "loss", loss)
    former = signal.getsignal(signal.SIGINT)  # a shell starts its background jobs with the signal ignored
    with pytest.raises(Interrupted, match="run the same command again"):
        children.run(tmp_path / "here.sqlite")
    assert signal.getsignal(signal.SIGINT) is former


def test_a_full_disk_loses_nothing_that_is_saved(children, tmp_path, monkeypatch, uninterrupted):
    store, flush, calls = tmp_path / "full.sqlite", os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="free some space and run the same command again"):
        children.run(store)
    monkeypatch.setattr(os, "fsync", flush)
    saved = Store(store).comparison()["runs"][0]
    assert len(saved["points"]) >= 9
    assert not list(Store(store).folder.glob(".*.new"))
    assert outcome(children.run(store)) == outcome(uninterrupted)


@pytest.mark.parametrize("how", ["lost", "broken"])
def test_a_lost_or_broken_checkpoint_file_costs_time_but_no_result(children, forks, tmp_path, uninterrupted, how):
    store = tmp_path / "lost.sqlite"
    child = forks.Process(target=children.run_quietly, args=(store, 0.02))
    child.start()
    wait_for_progress(store, 0.3)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    for file in Store(store).folder.glob("*.pt"):
        if how == "lost":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1000] + bytes(900))
    assert outcome(children.run(store)) == outcome(uninterrupted)
