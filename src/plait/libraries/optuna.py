"""Uses of Optuna, and what plait knows of its inside."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna from reporting every trial, and what it calls experimental, while the block runs."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def storage_failures() -> tuple[type[Exception], ...]:
    """Return what is raised where a storage cannot be read or written: Optuna's own class, and the database's."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return StorageInternalError, SQLAlchemyError


def taken_up(study: Study, number: int) -> Trial:
    """Return a trial that was begun by a process that is gone, to be asked further: Optuna itself only begins new ones."""
    from optuna.trial import Trial

    return Trial(study, study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number))


def without_trial(study: Study, number: int) -> Study:
    """Return a study in which one trial cannot be seen: what a sampler that was killed has left of it changes nothing then."""
    seen = copy(study)

    def others(*given: Any, **how: Any) -> list[FrozenTrial]:
        return [trial for trial in study._get_trials(*given, **how) if trial.number != number]

    vars(seen)["_get_trials"] = others
    return seen


def process_knows_pending() -> bool:
    """Return whether Optuna's Gaussian process takes trials into account that have begun: since 5.0."""
    from optuna import __version__

    return int(__version__.partition(".")[0]) >= 5


def sqlite_url(path: str) -> str:
    """Return Optuna's address of a SQLite file."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=path).render_as_string(hide_password=False)


def open_storage(url: str) -> BaseStorage:
    """Return the storage at one of Optuna's addresses.

    Connections with a SQLite file are closed after every use. Optuna leaves them to the garbage collector.
    """
    from optuna.storages import RDBStorage, get_storage
    from sqlalchemy import NullPool, make_url

    address = make_url(url)
    in_memory = ":memory:" in (address.database or ":memory:")  # it is gone with its connection
    if address.get_backend_name() != "sqlite" or in_memory:
        return get_storage(url)
    return get_storage(RDBStorage(url, engine_kwargs={"poolclass": NullPool}))


def lost_tables(file: Path) -> list[str]:
    """Return the tables of Optuna that a SQLite file lacks, though others of them hold something: Optuna would make them anew.

    Args:
        file: of a storage; what is not a database is left to Optuna to refuse.
    """
    from optuna.storages._rdb.models import BaseModel

    wanted = set(BaseModel.metadata.tables)
    with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as base:
        there = {name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if any(base.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in wanted & there):
            return sorted(wanted - there)
    return []


def without_password(url: str) -> str:
    """Return a storage's address as it may be shown."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:  # an address of Optuna's own, such as redis://
        scheme, _, rest = url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"
