"""What plait expects of Optuna. A test that fails names what a release has changed."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import optuna
import pytest

from plait.errors import OutputError
from plait.libraries.optuna import (
    lost_tables,
    open_storage,
    process_knows_pending,
    quiet_optuna,
    sqlite_url,
    taken_up,
    without_password,
    without_trial,
)
from plait.search.study import check_tables


def test_a_trial_of_a_process_that_is_gone_is_taken_up(tmp_path):
    url = sqlite_url(str(tmp_path / "a ?b#%20.db"))
    with quiet_optuna():
        study = optuna.create_study(storage=open_storage(url), study_name="s")
        value = study.ask().suggest_float("x", 0, 1)
        again = optuna.load_study(study_name="s", storage=open_storage(url))
        trial = taken_up(again, 0)
        assert trial.suggest_float("x", 0, 1) == value
        again.tell(trial.number, 1.0)
        assert [t.state.name for t in again.trials] == ["COMPLETE"]
    assert (tmp_path / "a ?b#%20.db").is_file()


def test_connections_with_a_file_are_closed_after_use(tmp_path, monkeypatch):
    opened, connect = [], sqlite3.connect

    def connected(*given, **how):
        opened.append(connect(*given, **how))
        return opened[-1]

    monkeypatch.setattr("sqlite3.dbapi2.connect", connected)
    with quiet_optuna():
        study = optuna.create_study(storage=open_storage(sqlite_url(str(tmp_path / "study.db"))))
        study.tell(study.ask(), 1.0)
        assert len(study.trials) == 1
    assert opened
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_stays_open(url):
    with quiet_optuna():
        study = optuna.create_study(storage=open_storage(url))
        study.tell(study.ask(), 1.0)
    assert len(study.trials) == 1
    study._storage._backend.engine.dispose()


def test_tables_that_were_dropped_are_missed(tmp_path):
    file = tmp_path / "study.db"
    assert lost_tables(file) == []
    with quiet_optuna():
        optuna.create_study(storage=open_storage(sqlite_url(str(file))), study_name="s").ask()
    assert lost_tables(file) == []
    for number, table in enumerate(["trials", "studies"], 1):
        with closing(sqlite3.connect(file)) as base, base:
            base.execute(f"DROP TABLE {table}")
        assert len(lost_tables(file)) == number
        assert table in lost_tables(file)
    with pytest.raises(OutputError, match=r"study\.db: there is no table 'studies', 'trials', and there are others of a study"):
        check_tables(file)
    file.write_bytes(b"not a database" * 100)
    assert lost_tables(file) == [], "which Optuna itself refuses"


def test_a_sampler_is_told_the_number_before_it_samples():
    seen = []

    class Numbers(optuna.samplers.RandomSampler):
        def before_trial(self, study, trial):
            seen.append(trial.number)

    study = optuna.create_study(sampler=Numbers(seed=0))
    study.ask()
    study.ask()
    assert seen == [0, 1]


def test_a_process_takes_trials_into_account_that_have_begun():
    with quiet_optuna():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), direction="maximize")
        study.optimize(lambda trial: -((trial.suggest_float("x", 0, 1) - 0.3) ** 2), n_trials=6)
        suggested = []
        for _ in range(2):
            study.sampler = optuna.samplers.GPSampler(seed=1, n_startup_trials=1)
            suggested.append(study.ask().suggest_float("x", 0, 1))
    assert (abs(suggested[0] - suggested[1]) > 1e-3) == process_knows_pending()


def test_a_trial_that_is_left_out_cannot_be_seen():
    with quiet_optuna():
        study = optuna.create_study()
        for _ in range(3):
            study.ask()
    seen = without_trial(study, 1)
    assert [t.number for t in seen.get_trials()] == [0, 2]
    assert [t.number for t in seen._get_trials(deepcopy=False)] == [0, 2]
    assert len(study.trials) == 3


def test_it_is_as_loud_as_before(capsys):
    before = optuna.logging.get_verbosity()
    with quiet_optuna():
        optuna.create_study()
    assert optuna.logging.get_verbosity() == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
    ],
)
def test_no_password_is_written(url, shown):
    assert without_password(url) == shown
