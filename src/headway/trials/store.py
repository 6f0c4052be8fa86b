"""The result store: one SQLite file (write-ahead log) with everything that runs produce, as they produce it.

Runs are claimed in one transaction, so that two processes never take the same one; every later write checks that the claim
still stands. A checkpoint is written to a new file, flushed to the disk and renamed, and only then named in the same
transaction that stores the points up to its step. So at any moment the store holds a state from which each run can go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headway.trials.claims import gone

FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS comparisons (
  id INTEGER PRIMARY KEY, key TEXT UNIQUE, created REAL, used REAL, request TEXT, command TEXT);
CREATE TABLE IF NOT EXISTS runs (
  id INTEGER PRIMARY KEY, key TEXT UNIQUE, task TEXT, arm TEXT, seed INTEGER, settings TEXT, status TEXT DEFAULT 'waiting',
  claimed_by TEXT, heartbeat REAL, attempts INTEGER DEFAULT 0, progress REAL DEFAULT 0, error TEXT, started REAL, finished REAL);
CREATE TABLE IF NOT EXISTS members (
  comparison INTEGER REFERENCES comparisons, place INTEGER, run INTEGER REFERENCES runs, arm TEXT,
  PRIMARY KEY (comparison, place));
CREATE TABLE IF NOT EXISTS claims (run INTEGER REFERENCES runs, claimed_by TEXT, at REAL, from_step INTEGER);
CREATE TABLE IF NOT EXISTS points (
  run INTEGER REFERENCES runs, step INTEGER, seconds REAL, loss REAL, metrics TEXT, PRIMARY KEY (run, step)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoints (run INTEGER PRIMARY KEY REFERENCES runs, step INTEGER, file TEXT, at REAL);
CREATE TABLE IF NOT EXISTS probes (run INTEGER REFERENCES runs, moment TEXT, data TEXT, PRIMARY KEY (run, moment));
CREATE TABLE IF NOT EXISTS facts (run INTEGER REFERENCES runs, name TEXT, value TEXT, PRIMARY KEY (run, name));
"""


class LostClaim(RuntimeError):
    """Another process has taken the run over; this one must stop working on it."""


class StoreError(ValueError):
    """The file is no result store of this format."""


def key_of(settings: Mapping[str, Any]) -> str:
    """A short hash of settings, the same on every machine."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode()).hexdigest()[:16]


class Store:
    """A result store on disk, made where there is none.

    Raises:
        StoreError: the file is something else, or of a later format.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"{self.path} cannot be written ({error.strerror}); give another path") from None
        self.folder = self.path.with_name(self.path.name + "-checkpoints")
        self._connection: sqlite3.Connection | None = None
        try:
            with self._write() as db:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (str(FORMAT),))
                found = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if "unable to open" in str(error) or "readonly" in str(error):
                raise PermissionError(f"{self.path} cannot be written ({error}); give another path") from None
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise StoreError(f"{self.path} is no headway result store ({error}); give another path") from None
        if found != str(FORMAT):
            raise StoreError(f"{self.path} is a result store of format {found}; this headway reads format {FORMAT}")

    def close(self) -> None:
        """Closes the file; it opens again by itself when needed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __reduce__(self) -> tuple:
        return Store, (str(self.path),)

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            db = sqlite3.connect(self.path, timeout=60.0, isolation_level=None, check_same_thread=False)
            db.row_factory = sqlite3.Row
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and "meta" not in tables:
                db.close()
                held = ", ".join(sorted(tables)[:3])
                raise StoreError(f"{self.path} is another program's database (it holds {held}); give another path")
            _write_ahead(db)
            # A checkpoint's row must not be lost after the file it replaces is gone, also when the machine stops.
            db.execute("PRAGMA synchronous = FULL")
            self._connection = db
        return self._connection

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    # --- what is to be done

    def register(
        self, request: Mapping[str, Any], runs: Iterable[Mapping[str, Any]], command: str
    ) -> tuple[int, list[int]]:
        """Enters a comparison and its runs; what is there already is kept, and failed runs get another try.

        Args:
            request: what was asked for (plain data), the identity of the comparison.
            runs: for each run ``task``, ``arm``, ``seed`` and ``settings`` (plain data, the identity of the run), in order.
            command: how it can be asked for again.

        Returns:
            The comparison's number, and the runs' numbers in order.
        """
        now, numbers = time.time(), []
        with self._write() as db:
            db.execute(
                "INSERT INTO comparisons (key, created, used, request, command) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET used = excluded.used, command = excluded.command",
                (key_of(request), now, now, json.dumps(request, default=repr), command),
            )
            comparison = db.execute("SELECT id FROM comparisons WHERE key = ?", (key_of(request),)).fetchone()[0]
            for place, run in enumerate(runs):
                key = key_of(run["settings"])
                db.execute(
                    "INSERT OR IGNORE INTO runs (key, task, arm, seed, settings) VALUES (?, ?, ?, ?, ?)",
                    (key, run["task"], run["arm"], run["seed"], json.dumps(run["settings"], default=repr)),
                )
                db.execute(
                    "UPDATE runs SET status = 'waiting', error = NULL WHERE key = ? AND status = 'failed'", (key,)
                )
                numbers.append(db.execute("SELECT id FROM runs WHERE key = ?", (key,)).fetchone()[0])
                db.execute(
                    "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)", (comparison, place, numbers[-1], run["arm"])
                )
        return comparison, numbers

    def claim(self, owner: str, among: Iterable[int]) -> int | None:
        """Takes the first run of ``among`` that waits, or whose owner is gone; None when there is none to take."""
        with self._write() as db:
            for run in among:
                row = db.execute("SELECT status, claimed_by, heartbeat FROM runs WHERE id = ?", (run,)).fetchone()
                free = row["status"] == "waiting" or (
                    row["status"] == "running" and gone(row["claimed_by"], row["heartbeat"])
                )
                if not free:
                    continue
                step = db.execute("SELECT step FROM checkpoints WHERE run = ?", (run,)).fetchone()
                db.execute(
                    "UPDATE runs SET status = 'running', claimed_by = ?, heartbeat = ?, attempts = attempts + 1, "
                    "started = COALESCE(started, ?) WHERE id = ?",
                    (owner, time.time(), time.time(), run),
                )
                db.execute("INSERT INTO claims VALUES (?, ?, ?, ?)", (run, owner, time.time(), step[0] if step else 0))
                return run
        return None

    def states(self, among: Iterable[int]) -> dict[int, tuple[str, float]]:
        """Status and progress (0 to 1) of runs."""
        found = {row["id"]: (row["status"], row["progress"]) for row in self._db.execute("SELECT * FROM runs")}
        return {run: found[run] for run in among}

    # --- what a run writes; each call holds only while the claim stands

    @contextlib.contextmanager
    def _owned(self, run: int, owner: str) -> Iterator[sqlite3.Connection]:
        with self._write() as db:
            held = db.execute(
                "UPDATE runs SET heartbeat = ? WHERE id = ? AND claimed_by = ? AND status = 'running'",
                (time.time(), run, owner),
            ).rowcount
            if not held:
                raise LostClaim(f"run {run} of {self.path} was taken over by another process")
            yield db

    def begin(self, run: int, owner: str, anew: bool = False) -> dict[str, Any]:
        """Where to go on: ``step`` and ``content`` of the last checkpoint (0 and None at the very start, or ``anew``), and the names
        of the ``probes`` and ``facts`` that are stored. Points after that step are dropped: they are computed again."""
        with self._owned(run, owner) as db:
            if anew:
                db.execute("DELETE FROM checkpoints WHERE run = ?", (run,))
            row = db.execute("SELECT step, file FROM checkpoints WHERE run = ?", (run,)).fetchone()
            content = None
            if row and (self.folder / row["file"]).is_file():
                content = (self.folder / row["file"]).read_bytes()
            elif row:
                db.execute("DELETE FROM checkpoints WHERE run = ?", (run,))
            step = row["step"] if row and content is not None else 0
            db.execute("DELETE FROM points WHERE run = ? AND step > ?", (run, step))
            db.execute("UPDATE runs SET error = NULL WHERE id = ?", (run,))
            probes = [found[0] for found in db.execute("SELECT moment FROM probes WHERE run = ?", (run,))]
            facts = [found[0] for found in db.execute("SELECT name FROM facts WHERE run = ?", (run,))]
        self._tidy(run, row["file"] if step else None)
        return {"step": step, "content": content, "probes": probes, "facts": facts}

    def twin(self) -> Store:
        """Another connection to the same file, for another thread."""
        return Store(self.path)

    def beat(self, run: int, owner: str, progress: float | None = None) -> None:
        """Says that the run's owner lives, and how far it is."""
        with self._owned(run, owner) as db:
            if progress is not None:
                db.execute("UPDATE runs SET progress = ? WHERE id = ?", (progress, run))

    def add_points(self, run: int, owner: str, points: Iterable[tuple], progress: float) -> None:
        """Stores (step, seconds of training, loss, metrics or None) and the progress."""
        with self._owned(run, owner) as db:
            self._insert(db, run, points, progress)

    def save_checkpoint(
        self, run: int, owner: str, step: int, content: bytes, points: Iterable[tuple], progress: float
    ) -> None:
        """Stores a checkpoint together with the points up to it; the one before is removed afterwards."""
        self.folder.mkdir(exist_ok=True)
        name = f"run-{run}-step-{step}-{uuid.uuid4().hex[:8]}.pt"
        fresh = self.folder / f".{name}.new"
        try:
            with open(fresh, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.folder / name)
            _flush_folder(self.folder)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        with self._owned(run, owner) as db:
            self._insert(db, run, points, progress)
            db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)", (run, step, name, time.time()))
        self._tidy(run, name)

    def add_probe(self, run: int, owner: str, moment: str, data: Mapping[str, Any]) -> None:
        """Stores a probe's plain data under "start" or "end"."""
        with self._owned(run, owner) as db:
            db.execute("INSERT OR REPLACE INTO probes VALUES (?, ?, ?)", (run, moment, json.dumps(data)))

    def add_facts(self, run: int, owner: str, facts: Mapping[str, Any]) -> None:
        """Stores facts (plain data) by name; a later value replaces an earlier one."""
        with self._owned(run, owner) as db:
            for name, value in facts.items():
                db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (run, name, json.dumps(value)))

    def finish(self, run: int, owner: str, points: Iterable[tuple], facts: Mapping[str, Any]) -> None:
        """The run is done: its last points and facts, in one transaction; its checkpoint is removed."""
        with self._owned(run, owner) as db:
            self._insert(db, run, points, 1.0)
            for name, value in facts.items():
                db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (run, name, json.dumps(value)))
            db.execute("DELETE FROM checkpoints WHERE run = ?", (run,))
            db.execute(
                "UPDATE runs SET status = 'finished', claimed_by = NULL, finished = ? WHERE id = ?", (time.time(), run)
            )
        self._tidy(run, None)

    def fail(self, run: int, owner: str, error: str) -> None:
        """The run cannot be done; the reason stands in the table."""
        with self._owned(run, owner) as db:
            db.execute("UPDATE runs SET status = 'failed', claimed_by = NULL, error = ? WHERE id = ?", (error, run))

    def release(self, run: int, owner: str) -> None:
        """Gives a run back, to be gone on with from its last checkpoint by whoever claims it next."""
        with contextlib.suppress(LostClaim), self._owned(run, owner) as db:
            db.execute("UPDATE runs SET status = 'waiting', claimed_by = NULL WHERE id = ?", (run,))

    def _insert(self, db: sqlite3.Connection, run: int, points: Iterable[tuple], progress: float) -> None:
        db.executemany(
            "INSERT INTO points VALUES (?, ?, ?, ?, ?)",
            [
                (run, step, seconds, loss, json.dumps(metrics) if metrics else None)
                for step, seconds, loss, metrics in points
            ],
        )
        db.execute("UPDATE runs SET progress = ? WHERE id = ?", (progress, run))

    def _tidy(self, run: int, keep: str | None) -> None:
        for file in [*self.folder.glob(f"run-{run}-step-*.pt"), *self.folder.glob(f".run-{run}-step-*.new")]:
            if file.name != keep:
                file.unlink(missing_ok=True)

    # --- what was done

    def comparison(self, number: int | None = None) -> dict[str, Any]:
        """A comparison's request, command and runs (by default the one used last), with points, probes and facts.

        Raises:
            StoreError: there is none.
        """
        db = self._db
        wanted = "WHERE id = ?" if number is not None else ""
        given = (number,) if number is not None else ()
        row = db.execute(f"SELECT * FROM comparisons {wanted} ORDER BY used DESC, id DESC LIMIT 1", given).fetchone()
        if row is None:
            raise StoreError(f"{self.path} holds no comparison{'' if number is None else f' {number}'}; run one first")
        members = db.execute(
            "SELECT runs.*, members.arm AS label FROM members JOIN runs ON runs.id = members.run WHERE comparison = ? "
            "ORDER BY place",
            (row["id"],),
        )
        return {
            "id": row["id"],
            "created": row["created"],
            "request": json.loads(row["request"]),
            "command": row["command"],
            "store": str(self.path),
            "runs": [self._run(member) for member in members.fetchall()],
        }

    def _run(self, row: sqlite3.Row) -> dict[str, Any]:
        db, run = self._db, row["id"]
        points = db.execute("SELECT * FROM points WHERE run = ? ORDER BY step", (run,)).fetchall()
        return {
            "id": run,
            "arm": row["label"],
            "seed": row["seed"],
            "status": row["status"],
            "progress": row["progress"],
            "attempts": row["attempts"],
            "error": row["error"],
            "points": [
                (
                    point["step"],
                    point["seconds"],
                    point["loss"],
                    json.loads(point["metrics"]) if point["metrics"] else None,
                )
                for point in points
            ],
            "probes": {
                found["moment"]: json.loads(found["data"])
                for found in db.execute("SELECT * FROM probes WHERE run = ? ORDER BY moment DESC", (run,))
            },
            "facts": {
                found["name"]: json.loads(found["value"])
                for found in db.execute("SELECT * FROM facts WHERE run = ?", (run,))
            },
        }


def _write_ahead(db: sqlite3.Connection) -> None:
    """Switches the file to a write-ahead log; SQLite does not wait by itself while another process is just doing the same."""
    for attempt in range(200):
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or attempt == 199:
                raise
            time.sleep(0.05)


def _flush_folder(folder: Path) -> None:
    """Makes a rename in this folder last through a power cut; systems that cannot open a folder do without."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
