"""What plait expects of TRL beyond its documented use. A test that fails names what a release has changed."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import trl

from plait.libraries.trl import trusts_code


def test_one_configuration_or_the_other_says_whether_code_is_trusted():
    named = [
        kind.__name__ for kind in (trl.SFTConfig, trl.ModelConfig) if "trust_remote_code" in {f.name for f in fields(kind)}
    ]
    assert named, "code is trusted by a setting of another name"


def test_trust_is_found_in_either():
    assert trusts_code(SimpleNamespace(trust_remote_code=True), {})
    assert trusts_code(SimpleNamespace(), {"trust_remote_code": True})
    assert not trusts_code(SimpleNamespace(), {})
    assert not trusts_code(SimpleNamespace(trust_remote_code=False), {"trust_remote_code": False})
