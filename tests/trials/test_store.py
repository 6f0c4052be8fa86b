import os
import sqlite3
import time

import pytest

from headway.trials import claims
from headway.trials.claims import STALE_AFTER, claimant, gone
from headway.trials.store import LostClaim, Store, StoreError

REQUEST = {
    "task": {"name": "t", "metric": "loss", "lower_is_better": True},
    "settings": {},
    "arms": [["a", []]],
    "seeds": [0],
}
RUNS = [{"task": "t", "arm": "a", "seed": seed, "settings": {"seed": seed}} for seed in (0, 1)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "deep" / "store.sqlite")


def test_the_store_writes_ahead(store):
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_registering_twice_keeps_the_runs(store):
    first = store.register(REQUEST, RUNS, "x")
    assert store.register(REQUEST, RUNS, "y") == first
    assert store.comparison()["command"] == "y"
    assert [run["status"] for run in store.comparison()["runs"]] == ["waiting", "waiting"]


def test_a_run_is_claimed_once_and_given_back(store):
    _, runs = store.register(REQUEST, RUNS, "x")
    with claimant() as one, claimant() as two:
        assert [store.claim(one, runs), store.claim(two, runs), store.claim(two, runs)] == [runs[0], runs[1], None]
        store.release(runs[0], one)
        assert store.claim(two, runs) == runs[0]
        with pytest.raises(LostClaim):
            store.add_points(runs[0], one, [(1, 0.1, 2.0, None)], 0.1)


def test_a_claim_of_a_dead_process_is_taken_over(store, forks):
    _, runs = store.register(REQUEST, RUNS[:1], "x")
    child = forks.Process(target=os.getpid)
    child.start()
    pid = child.pid
    alive = claims._started(pid)
    child.join()
    with claimant() as me:
        assert store.claim(f"{claims._machine()}|{pid}|{alive}|x", runs) == runs[0]
        assert store.claim(me, runs) == runs[0]


def test_claims_are_judged_by_process_start_and_heartbeat():
    now = time.time()
    machine, me = claims._machine(), f"{os.getpid()}|{claims._started(os.getpid())}"
    with claimant() as living:
        assert not gone(living, now)
        assert gone(living, now - STALE_AFTER - 1)
    assert gone(living, now), "a call that is over has given up its claims"
    assert gone(f"{machine}|{os.getpid()}|1.0|x", now), "a pid used again by another process"
    assert not gone(f"elsewhere/1234|{me}|x", now)
    assert gone(f"elsewhere/1234|{me}|x", now - STALE_AFTER - 1)


def test_a_checkpoint_and_its_points_appear_together_and_replace_the_former(store):
    _, (run, _) = store.register(REQUEST, RUNS, "x")
    with claimant() as me:
        store.claim(me, [run])
        store.save_checkpoint(run, me, 2, b"two", [(1, 0.1, 3.0, None), (2, 0.2, 2.0, {"loss": 2.5})], 0.2)
        store.add_points(run, me, [(3, 0.3, 1.0, None)], 0.3)
        begun = store.begin(run, me)
        assert (begun["step"], begun["content"]) == (2, b"two")
        points = store.comparison()["runs"][0]["points"]
        assert points == [(1, 0.1, 3.0, None), (2, 0.2, 2.0, {"loss": 2.5})]
        store.save_checkpoint(run, me, 3, b"three", [(3, 0.3, float("nan"), None)], 0.3)
        assert [file.read_bytes() for file in store.folder.iterdir()] == [b"three"]
        store.finish(run, me, [], {"steps": 3})
        assert list(store.folder.iterdir()) == []
        assert store.comparison()["runs"][0]["points"][-1][2] is None


def test_a_checkpoint_that_was_never_named_is_swept_away(store):
    _, (run, _) = store.register(REQUEST, RUNS, "x")
    store.folder.mkdir()
    (store.folder / f"run-{run}-step-9-deadbeef.pt").write_bytes(b"orphan")
    (store.folder / f".run-{run}-step-9-deadbeef.pt.new").write_bytes(b"half")
    with claimant() as me:
        store.claim(me, [run])
        assert store.begin(run, me)["step"] == 0
    assert list(store.folder.iterdir()) == []


def test_a_failed_run_gets_another_try_when_asked_for_again(store):
    _, (run, _) = store.register(REQUEST, RUNS, "x")
    with claimant() as me:
        store.claim(me, [run])
        store.fail(run, me, "ValueError: no")
    assert store.comparison()["runs"][0]["error"] == "ValueError: no"
    store.register(REQUEST, RUNS, "x")
    assert store.states([run])[run][0] == "waiting"


def test_another_file_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "text.sqlite").write_text(
        "not a database, but some text that is long enough to be read as a header" * 20
    )
    with pytest.raises(StoreError, match="is no headway result store"):
        Store(tmp_path / "text.sqlite")
    Store(tmp_path / "later.sqlite").close()
    db = sqlite3.connect(tmp_path / "later.sqlite")
    db.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    db.commit()
    db.close()
    with pytest.raises(StoreError, match="format 99"):
        Store(tmp_path / "later.sqlite")


def test_another_programs_database_is_left_as_it_was(tmp_path):
    path = tmp_path / "theirs.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE runs (id INTEGER)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program's database"):
        Store(path)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        Store(tmp_path / "file" / "runs.sqlite")
    with pytest.raises(OSError, match="cannot be written"):
        Store(tmp_path)


def test_an_empty_store_holds_no_comparison(store):
    with pytest.raises(StoreError, match="holds no comparison"):
        store.comparison()
