"""What the store keeps on disk: events, values, a database of any version, and files that are whole."""

import os
import sqlite3
import sys
from pathlib import Path

import pytest
from stores import FIRST_DAY, Clock
from stores import clock as clock
from stores import store as store

from radiance_mlx.errors import HomeLocked, StoreError
from radiance_mlx.store import HomeLock, Store, write_durably
from radiance_mlx.store.database import Database
from radiance_mlx.store.migrations import MIGRATIONS

# events and remembered values


def test_events_are_read_on_from_where_one_was(store: Store, clock: Clock) -> None:
    """Ids rise, `after` continues, `limit` bounds, data comes back as it was."""
    ids = [store.event("kind", {"n": number, "deep": {"a": [1, None]}}) for number in range(4)]
    assert ids == sorted(set(ids))
    first = {"id": ids[0], "at": clock.now, "kind": "kind", "data": {"n": 0, "deep": {"a": [1, None]}}}
    assert store.events(limit=1) == [first]
    assert [event["data"]["n"] for event in store.events(ids[1])] == [2, 3]
    assert store.events(ids[3]) == []


def test_a_change_of_bases_is_told_once(tmp_path: Path, store: Store) -> None:
    """The first base is no change; the last one is remembered over a restart."""
    assert store.greet_base("a") is None
    assert store.greet_base("a") is None
    assert store.events() == []
    assert store.greet_base("b") == "a"
    store.close()
    again = Store(tmp_path)
    assert again.greet_base("b") is None
    assert [(event["kind"], event["data"]) for event in again.events()] == [("base_changed", {"from": "a", "to": "b"})]
    again.close()


# the database


def test_pragmas_make_a_commit_durable(tmp_path: Path, store: Store) -> None:
    """Write-ahead log, full sync and foreign keys are on."""
    with store._database.read() as db:
        values = {name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "foreign_keys")}
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        if sys.platform == "darwin":
            assert db.execute("PRAGMA fullfsync").fetchone()[0] == 1
            assert db.execute("PRAGMA checkpoint_fullfsync").fetchone()[0] == 1
    assert values == {"synchronous": 2, "foreign_keys": 1}


def test_migrations_run_once_each_and_keep_the_data(tmp_path: Path, clock: Clock) -> None:
    """A newer version's step runs on an older database, and is recorded with its time."""
    path = tmp_path / "old.db"
    Database(path, clock, MIGRATIONS[:1]).close()
    raw = sqlite3.connect(path)
    raw.execute(
        """INSERT INTO jobs (number, job_id, state, created, updated, tags, example_count, body_hash)
           VALUES (1, 'job_000001', 'queued', 0, 0, '[]', 0, 'h')"""
    )
    raw.commit()
    clock.now += 100
    Database(path, clock).close()
    Database(path, clock).close()
    done = dict(raw.execute("SELECT name, at FROM migrations").fetchall())
    assert list(done) == [step.__name__ for step in MIGRATIONS]
    assert (done["create_jobs"], done["create_meta"]) == (FIRST_DAY, FIRST_DAY + 100)
    assert raw.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
    raw.close()


def test_a_step_that_fails_leaves_no_trace(tmp_path: Path, clock: Clock) -> None:
    """Its tables are gone with its record, and the next start can run it again."""

    def broken(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE half (a)")
        raise RuntimeError("broken")

    path = tmp_path / "some.db"
    with pytest.raises(RuntimeError, match="broken"):
        Database(path, clock, (*MIGRATIONS, broken))
    database = Database(path, clock)
    with database.read() as db:
        assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone()[0] == 0
    database.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path, store: Store) -> None:
    """The error names the step that is not known and says what to do; the file is not touched."""
    store.close()
    raw = sqlite3.connect(tmp_path / "state/radiance.db")
    raw.execute("INSERT INTO migrations VALUES ('create_telepathy', 0)")
    raw.commit()
    before = list(raw.iterdump())
    with pytest.raises(StoreError, match="create_telepathy") as caught:
        Store(tmp_path)
    assert "Upgrade" in caught.value.hint
    assert list(raw.iterdump()) == before
    raw.close()


def test_a_file_that_is_no_database_is_told_as_such(tmp_path: Path) -> None:
    """Neither a traceback of sqlite3 nor a new database over the old file."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state/radiance.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StoreError) as caught:
        Store(tmp_path)
    assert caught.value.hint
    assert (tmp_path / "state/radiance.db").read_bytes().startswith(b"not a database")


def test_a_home_that_cannot_be_used_is_told_as_such(tmp_path: Path) -> None:
    """A file where a folder should be, for the store and for the lock."""
    (tmp_path / "home").write_bytes(b"")
    for use in (lambda: Store(tmp_path / "home"), lambda: HomeLock(tmp_path / "home").acquire()):
        with pytest.raises(StoreError) as caught:
            use()
        assert caught.value.hint
        assert not isinstance(caught.value, HomeLocked)


def from_before(migration: str, home: Path, clock: Clock) -> sqlite3.Connection:
    """The database of a new `home` as it was before that migration."""
    (home / "state").mkdir()
    path = home / "state" / "radiance.db"
    Database(path, clock, MIGRATIONS[: [step.__name__ for step in MIGRATIONS].index(migration)]).close()
    return sqlite3.connect(path)


def test_a_database_from_before_reconsolidations_goes_on(tmp_path: Path, clock: Clock) -> None:
    """Its jobs are updates, its checkpoints came of them."""
    raw = from_before("tell_reconsolidations", tmp_path, clock)
    raw.execute(
        """INSERT INTO jobs (number, job_id, state, created, updated, tags, example_count, body_hash)
           VALUES (1, 'job_000001', 'published', 7, 7, '[]', 0, 'h')"""
    )
    raw.execute(
        """INSERT INTO checkpoints VALUES
           ('A_2026-02-09_0001', 1, 'b', NULL, 'stable', 7, '["job_000001"]', 'd', '{}', '{}', '{}', '[]', NULL, 0)"""
    )
    raw.commit()
    raw.close()
    store = Store(tmp_path, clock)
    assert (store.job("job_000001").kind, store.last_accepted()) == ("update", 7.0)
    assert [one.reconsolidated for one in store.checkpoints()] == [False]
    assert store.last_consolidated("b") is None
    store.close()


def test_events_of_a_job_are_found_without_reading_the_journal(tmp_path: Path, clock: Clock) -> None:
    """Also those from before events were indexed by job; and the examples of a file were called rows."""
    raw = from_before("index_events_by_job", tmp_path, clock)
    raw.executemany(
        "INSERT INTO events (at, kind, data) VALUES (7, 'progress', ?)",
        [(f'{{"jobs": ["job_{i % 1000:06d}", "job_{i % 1000:06d}"], "i": {i}}}',) for i in range(5000)],
    )
    raw.execute("""INSERT INTO events (at, kind, data) VALUES (7, 'moved', '{"why": "x"}')""")
    raw.execute("INSERT INTO uploads VALUES (1, 'file-a', 'a.jsonl', 'fine-tune', 1, 3, 'h', 7)")
    raw.commit()
    raw.close()
    store = Store(tmp_path, clock)
    last = store.event("published", {"jobs": ["job_000007", "job_000008"]})
    looks: list[int] = []
    store._database._connection.set_progress_handler(lambda: looks.append(1), 100)
    found = store.events_of("job_000007")
    assert [event["data"].get("i") for event in found] == [7, 1007, 2007, 3007, 4007, None]
    assert [event["id"] for event in store.events_of("job_000007", found[-2]["id"])] == [last]
    assert store.events_of("job_999999") == []
    assert len(looks) < 10
    store._database._connection.set_progress_handler(None, 0)
    assert store.uploads.one("file-a").examples == 3
    store.close()


@pytest.mark.parametrize("kinds", [["rollback"], ["published", "rollback", "failed"]])
def test_what_happened_is_found_without_reading_the_progress_of_training(
    tmp_path: Path, clock: Clock, kinds: list[str]
) -> None:
    """Also in a database from before events were indexed by kind."""
    raw = from_before("index_events_by_kind", tmp_path, clock)
    raw.execute("INSERT INTO events (at, kind, data) VALUES (7, 'rollback', '{}')")
    raw.executemany("INSERT INTO events (at, kind, data) VALUES (7, ?, '{}')", [("progress",)] * 20_000)
    raw.commit()
    raw.close()
    store = Store(tmp_path, clock)
    queries: list[str] = []
    looks: list[int] = []
    connection = store._database._connection
    connection.set_trace_callback(queries.append)
    connection.set_progress_handler(lambda: looks.append(1), 100)
    assert [event["id"] for event in store.newest_events(kinds, None, 20)] == [1]
    assert len(looks) < 10
    connection.set_progress_handler(None, 0)
    connection.set_trace_callback(None)
    [query] = [query for query in queries if query.startswith("SELECT")]
    plan = [row["detail"] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert plan[0] == "SEARCH events USING INDEX events_by_kind (kind=? AND id<?)"
    store.close()


def test_a_busy_database_raises_store_error_and_the_store_goes_on(tmp_path: Path, store: Store) -> None:
    """Another program that holds the file makes a write fail with a hint; afterwards writes work again."""
    other = sqlite3.connect(tmp_path / "state/radiance.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with store._database.read() as db:
        db.execute("SELECT 1")
    store._database._connection.execute("PRAGMA busy_timeout=10")
    with pytest.raises(StoreError, match="locked"):
        store.greet_base("a")
    other.execute("ROLLBACK")
    other.close()
    assert store.greet_base("a") is None
    assert store.greet_base("b") == "a"


def test_the_files_of_the_store_may_be_closed_twice(store: Store) -> None:
    """Closing is for every way out."""
    store.close()
    store.close()


# durable files


def test_write_durably_replaces_the_whole_content(tmp_path: Path) -> None:
    """The new bytes are there, and no file beside them."""
    path = tmp_path / "file.json"
    write_durably(path, b"a long first content")
    write_durably(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["file.json"]


def test_write_durably_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    """A target that cannot be replaced keeps what it had, and no temporary file stays."""
    (tmp_path / "target/full").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_durably(tmp_path / "target", b"x")
    assert os.listdir(tmp_path) == ["target"]
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "missing/file", b"x")
