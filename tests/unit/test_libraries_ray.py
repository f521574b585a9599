"""What plait expects of Ray. A test that fails names what a release has changed."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from plait.cluster import probe
from plait.libraries.ray import error_of_work, quiet_connection, sent_by_value
from plait.version import __version__

pytest.importorskip("ray", reason="Ray is not installed: `make .venv/.ray` installs it")


def test_a_connection_is_quiet_and_changes_no_signal(capsys):
    from ray._private import worker

    def init(**given):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        asked.update(given)

    asked, lost = {}, {"lines": ["Raylet is terminated."], "pid": "raylet", "is_err": False}
    before = signal.getsignal(signal.SIGTERM)
    with quiet_connection(SimpleNamespace(init=init, shutdown=lambda: None), "auto"):
        assert signal.getsignal(signal.SIGTERM) is before
        worker.print_to_stdstream(lost, ignore_prefix=False)
    assert asked["log_to_driver"] is False
    assert capsys.readouterr() == ("", "")
    worker.print_to_stdstream(lost, ignore_prefix=True)
    assert "Raylet is terminated." in capsys.readouterr().out, "it is by this function that Ray prints"


def test_what_work_raised_is_told_from_work_that_was_lost():
    from ray.exceptions import ActorDiedError, RayTaskError

    cause = ValueError("wrong")
    raised = RayTaskError("work", "Traceback", cause).as_instanceof_cause()
    assert error_of_work(raised) is cause
    assert error_of_work(ActorDiedError()) is None


def test_code_is_sent_to_a_node_that_lacks_the_module():
    from ray import cloudpickle

    with sent_by_value(probe):
        sent = cloudpickle.dumps(probe.look)
    assert len(sent) > len(cloudpickle.dumps(probe.look)), "by name, once the block is left"
    found = cloudpickle.loads(sent)(["/nowhere", "/"], ["torch", "no-such-package"])
    assert found["unseen"] == ["/nowhere"]
    assert found["versions"]["plait"] == __version__
    assert found["versions"]["no-such-package"] is None
