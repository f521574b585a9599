"""What plait expects of TRL beyond its documented use. A test that fails names what a release has changed."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import trl

from plait.libraries.trl import FlagError, FlagParser, trusts_code


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


def test_the_parser_finds_what_is_given_and_nothing_else():
    parser = FlagParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig), "plait sft")
    parser.add("upload_model", switch=True, help="Own flag.")
    assert {"--learning_rate", "--lora-r", "--upload_model", "--upload-model"} <= set(parser.flags)
    assert "Own flag." in parser.help()
    assert parser.parse(["--upload-model", "--lora_r", "4", "--nowhere", "x"]) == (
        {"upload_model": True, "lora_r": 4},
        ["--nowhere", "x"],
    )
    assert parser.parse(["--upload_model=false", "--max_steps", "3"])[0] == {"upload_model": False, "max_steps": 3}


@pytest.mark.parametrize("words", [["--lora_r", "four"], ["--use_peft", "perhaps"]])
def test_the_parser_raises_what_it_would_leave_the_process_for(words):
    with pytest.raises(FlagError):
        FlagParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig), "plait sft").parse(words)
