"""Optuna's storage of a study: an SQLite file in its folder, or PostgreSQL by URL.

Only the scheduler writes to it. It holds no result that the run files do not: a lost
or damaged storage is rebuilt from them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from resnext_ablate.architecture.spec import InputError, MissingExtraError

STORAGE_FILE = "study.db"
SQLITE = "sqlite"
"""The `run.storage` of a file in the study's folder."""

Report = tuple[int, int, float]
"""Trial, epoch, validation error in percent."""

NO_ANSWER = (StorageInternalError, SQLAlchemyError, UnboundLocalError)
"""What Optuna raises of a database that does not answer; the last is its own slip."""

_SQLITE_HEADER = b"SQLite format 3\x00"
_LOCK_CLASS = 0x5265734E  # Ours among the advisory locks of a database.
_CONNECT_TIMEOUT_S = 5
_REBUILD = "results come from the run files, none is lost."


@dataclass(frozen=True)
class Storage:
    """A study's open storage."""

    study: optuna.Study
    backend: RDBStorage
    """The storage of `study`, without a cache: ours are the only writes."""
    study_id: int
    place: str
    """For messages: a file, or a URL, which never holds a password."""


def open_storage(url: str, *, folder: Path, name: str, study_id: str) -> Storage:
    """Opens the storage of a study, created where new.

    Args:
        url: `run.storage`: `sqlite`, or `postgresql://...` without a password.
        folder: the study's.
        name: the study's.
        study_id: tells studies of one name in a shared database apart.

    Raises:
        InputError: it cannot be opened, is none, is of another Optuna, or holds the
            study of another folder.
        MissingExtraError: PostgreSQL is asked for without its driver.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = (folder / STORAGE_FILE).resolve()
    place = str(path) if url == SQLITE else url
    if url == SQLITE:
        _check_is_sqlite(path)
    with opening_errors(place):
        backend = _backend(_sqlalchemy_url(url, path))
        study = optuna.create_study(
            storage=backend,
            study_name=name,
            direction="minimize",
            # An ablation's plan is fixed; nothing is sampled or pruned.
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        number = backend.get_study_id_from_name(name)
    theirs = study.user_attrs.get("study_id")
    if theirs is None:
        study.set_user_attr("study_id", study_id)
    elif theirs != study_id and url != SQLITE:
        raise InputError(
            f"{place}: holds a study {name} of another results folder. Give this one "
            "another name (name=...), or remove that one: optuna delete-study "
            f"--study-name {name} --storage {place}"
        )
    return Storage(study, backend, number, place)


def close(storage: Storage) -> None:
    """Closes a storage; a file is one file again, without a log beside it."""
    with contextlib.suppress(SQLAlchemyError):
        if storage.backend.engine.dialect.name == "sqlite":
            with storage.backend.engine.connect() as connection:
                connection.execute(sqlalchemy.text("PRAGMA journal_mode = DELETE"))
        storage.backend.engine.dispose()


def told_cells(storage: Storage) -> set[str]:
    """The cells whose result the storage has."""
    # Optuna's own way reads all trials whole: seconds where there are thousands.
    query = sqlalchemy.text(
        "SELECT cell.value_json FROM trials "
        "JOIN trial_user_attributes AS cell "
        "ON cell.trial_id = trials.trial_id AND cell.key = 'cell' "
        "JOIN trial_user_attributes AS state "
        "ON state.trial_id = trials.trial_id AND state.key = 'state' "
        "WHERE trials.study_id = :study AND trials.state != 'RUNNING'"
    )
    with storage.backend.engine.connect() as connection:
        rows = connection.execute(query, {"study": storage.study_id})
        return {text.strip('"') for (text,) in rows}


def add_reports(storage: Storage, reports: Sequence[Report]) -> None:
    """Adds intermediate values of many trials; those that are there already stay."""
    # Optuna's own way takes a transaction and four statements for each.
    insert = sqlalchemy.text(
        "INSERT INTO trial_intermediate_values "
        "(trial_id, step, intermediate_value, intermediate_value_type) "
        "VALUES (:trial, :step, :value, 'FINITE') ON CONFLICT DO NOTHING"
    )
    rows = [
        {"trial": trial, "step": step, "value": value} for trial, step, value in reports
    ]
    with storage.backend.engine.begin() as connection:
        connection.execute(insert, rows)


@contextlib.contextmanager
def only_writer(url: str, *, name: str) -> Iterator[WriterLock | None]:
    """Holds a PostgreSQL study for this process alone; a file has its folder's lock.

    Raises:
        InputError: another process holds it, or the database does not answer.
    """
    if url == SQLITE:
        yield None
        return
    lock = WriterLock(url, name=name)
    try:
        with opening_errors(url):
            lock.take()
        yield lock
    finally:
        lock.release()


class WriterLock:
    """An advisory lock, which ends with its connection."""

    def __init__(self, url: str, *, name: str) -> None:
        self._name = name
        with opening_errors(url):
            self._engine = sqlalchemy.create_engine(
                _sqlalchemy_url(url, Path()),
                poolclass=sqlalchemy.NullPool,
                isolation_level="AUTOCOMMIT",
                connect_args=_connect_args(),
            )
        self._connection: sqlalchemy.Connection | None = None

    def take(self) -> None:
        """Takes the lock, or takes it again after the connection was lost.

        Raises:
            InputError: another process holds it.
            DBAPIError: the database does not answer.
        """
        self.release()
        keys = {"kind": _LOCK_CLASS, "study": _lock_key(self._name)}
        connection = self._engine.connect()
        taken = connection.execute(
            sqlalchemy.text("SELECT pg_try_advisory_lock(:kind, :study)"), keys
        )
        if taken.scalar_one():
            self._connection = connection
            return
        holder = connection.execute(_HOLDER, keys).scalar()
        connection.close()
        raise InputError(
            f"study {self._name} is being run by {holder or 'another process'}; "
            "resnext-ablate status shows how far it is."
        )

    def is_held(self) -> bool:
        """Whether the connection that holds the lock still answers."""
        if self._connection is None:
            return False
        try:
            self._connection.execute(sqlalchemy.text("SELECT 1"))
        except DBAPIError:
            return False
        return True

    def release(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(DBAPIError):
                self._connection.invalidate()
                self._connection.close()
            self._connection = None


_HOLDER = sqlalchemy.text(
    "SELECT activity.application_name FROM pg_locks AS held "
    "JOIN pg_stat_activity AS activity ON activity.pid = held.pid "
    "WHERE held.locktype = 'advisory' AND held.granted "
    "AND held.classid = CAST(:kind AS oid) "
    "AND held.objid = CAST(CAST(:study AS bigint) & 4294967295 AS oid)"
)


def _lock_key(name: str) -> int:
    """The study's name as a signed number of 32 bits."""
    value = zlib.crc32(name.encode())
    return value - (1 << 32) if value >= 1 << 31 else value


def _connect_args() -> dict[str, Any]:
    host = platform.node()[:30]
    return {
        "application_name": f"process {os.getpid()} on {host}",
        "connect_timeout": _CONNECT_TIMEOUT_S,
        # A dead network is noticed in half a minute, not in hours.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }


def _sqlalchemy_url(url: str, path: Path) -> sqlalchemy.URL:
    if url == SQLITE:
        return sqlalchemy.URL.create("sqlite", database=str(path))
    return sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")


def _backend(url: sqlalchemy.URL) -> RDBStorage:
    text = url.render_as_string(hide_password=False)
    if url.drivername == "sqlite":
        # A first connection of our own: it must not create or change anything.
        engine = sqlalchemy.create_engine(url)
        sqlalchemy.event.listen(engine, "connect", _set_up_sqlite)
        _check_version(engine)
        engine.dispose()
        backend = RDBStorage(text, engine_kwargs={"connect_args": {"timeout": 20}})
        sqlalchemy.event.listen(backend.engine, "connect", _set_up_sqlite)
        backend.engine.dispose()  # Connections made before have other settings.
        return backend
    engine = sqlalchemy.create_engine(url, connect_args=_connect_args())
    _check_version(engine)
    engine.dispose()
    backend = RDBStorage(
        text, engine_kwargs={"connect_args": _connect_args(), "pool_pre_ping": True}
    )
    sqlalchemy.event.listen(backend.engine, "connect", _set_up_postgresql)
    backend.engine.dispose()
    return backend


def _set_up_sqlite(connection: Any, record: object) -> None:
    # No wait for the disk at each write: whatever is killed, the file is whole; after
    # a power cut the last writes may be missing, and are told again.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _set_up_postgresql(connection: Any, record: object) -> None:
    connection.execute("SET synchronous_commit = off")
    connection.commit()


def _check_version(engine: sqlalchemy.Engine) -> None:
    """Refuses a storage of another major version of Optuna, before it is written to."""
    if not sqlalchemy.inspect(engine).has_table("version_info"):
        return
    query = sqlalchemy.text("SELECT library_version FROM version_info")
    with engine.connect() as connection:
        theirs = str(connection.execute(query).scalar())
    ours = version("optuna")
    if theirs.partition(".")[0] != ours.partition(".")[0]:
        raise _VersionError(
            f"was written by Optuna {theirs}, and this is {ours}, which reads its "
            "times differently"
        )


class _VersionError(RuntimeError):
    pass


def _check_is_sqlite(path: Path) -> None:
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            header = file.read(len(_SQLITE_HEADER))
        if header != _SQLITE_HEADER:
            raise InputError(
                f"{path}: is no SQLite storage. Move it away and run again: {_REBUILD}"
            )


@contextlib.contextmanager
def opening_errors(place: str) -> Iterator[None]:
    """Tells of a storage that cannot be read or written as of bad input."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"run.storage = {place!r} needs the package {error.name}: "
            "pip install 'resnext-ablate[postgresql]'."
        ) from None
    except InputError:
        raise
    except (*NO_ANSWER, RuntimeError, ValueError, KeyError, TypeError) as error:
        remedy = (
            f"Move it away and run again: {_REBUILD}"
            if "://" not in place
            else "Give another database, or none, in run.storage, or another name to "
            f"the study: {_REBUILD}"
        )
        raise InputError(f"{place}: {_reason(error)}. {remedy}") from None


def _reason(error: BaseException) -> str:
    if isinstance(error, _VersionError):
        return str(error)
    cause = getattr(error, "orig", None) or error.__cause__ or error
    first_line = str(cause).strip().partition("\n")[0].rstrip(".")
    return f"cannot be opened as Optuna's storage: {first_line}"


def running_trials(url: str, *, folder: Path, name: str) -> list[FrozenTrial]:
    """The trials under way, read beside the scheduler that writes them.

    Raises:
        InputError: the storage cannot be read.
    """
    path = (folder / STORAGE_FILE).resolve()
    if url == SQLITE and not path.exists():
        return []
    with opening_errors(str(path) if url == SQLITE else url):
        backend = RDBStorage(
            _sqlalchemy_url(url, path).render_as_string(hide_password=False),
            skip_table_creation=True,
            skip_compatibility_check=True,
        )
        try:
            number = backend.get_study_id_from_name(name)
        except KeyError:  # About to begin.
            return []
        states = (TrialState.RUNNING,)
        return backend.get_all_trials(number, deepcopy=False, states=states)
