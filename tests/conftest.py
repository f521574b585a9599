"""Tests fail for what they find: never for how long a busy machine takes, nor for what was drawn, or ran, before them.

`pytest --hypothesis-profile default` draws other examples.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from hypothesis import HealthCheck, settings

import plait.commands
from tests import kept, library_warnings
from tests.every import begin_anew

gc.disable()  # until all is imported: looking for garbage on the way takes a tenth of it
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL reports its use to the Hub; read when the libraries are imported

library_warnings.watch()
# A command is imported when it first runs: in a test that patches a function, it would keep the patch for the tests after it.
for _command in iter_modules(plait.commands.__path__):
    import_module(f"plait.commands.{_command.name}")
settings.register_profile("plait", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("plait")

#: Set where everything that the tests need is installed (`.ci/run`): a skipped test is a failure there.
NOTHING_SKIPPED = "PLAIT_NOTHING_SKIPPED"
MAY_SKIP = not os.environ.get(NOTHING_SKIPPED)
for _variable in [name for name in os.environ if name.startswith("PLAIT_")]:  # commands read them, or announce them
    del os.environ[_variable]


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: tests wait for nodes, workers and locks, and leave a fifth of two cores idle."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def _kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is made once per run has a place before anything is made."""
    kept.keep_in(tmp_path_factory)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Several threads wait for each other far longer than small matrices take; and numbers are compared across processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def four_threads() -> Iterator[None]:
    """As many as no worker of plait's has: a test sees whether they are given back."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have one process do the tests that share what is made once per file (`--dist loadgroup`): every other makes it again."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        known = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
        if item.get_closest_marker("xdist_group") is None and any(
            fixture.scope != "function" and fixture.baseid.partition("::")[0] == file for found in known for fixture in found
        ):
            item.add_marker(pytest.mark.xdist_group(file))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Look for no garbage among what was imported: trainers collect all of it, several times each."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed what is drawn without a generator, fixtures of modules included; nothing has been announced yet."""
    begin_anew()
    library_warnings.found.clear()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Fail where a library has warned that plait uses something deprecated of it, whoever filters it."""
    if message := list(dict.fromkeys(library_warnings.found)):
        library_warnings.found.clear()
        pytest.fail("plait uses what is deprecated:\n" + "\n".join(message), pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where nothing may be skipped and something was."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or MAY_SKIP or session.exitstatus != pytest.ExitCode.OK:
        return
    if skipped := reporter.stats.get("skipped"):
        reporter.write_line(f"{len(skipped)} skipped, and {NOTHING_SKIPPED} is set", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
