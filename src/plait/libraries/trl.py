"""Uses of TRL's configurations and its parser of flags beyond their documented API."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from plait.extras import optional


class FlagError(Exception):
    """Words that the parser would end the process for."""


class FlagParser:
    """TRL's parser of a command line, in which no flag has a default: only what is given is found.

    Args:
        kinds: dataclasses of TRL, whose fields are flags.
        name: of the command, for its help.
    """

    def __init__(self, kinds: Sequence[type], name: str) -> None:
        trl = optional("trl", "train", name)
        self._to_bool = optional("transformers.hf_argparser", "train", name).string_to_bool
        self._parser = trl.TrlParser(tuple(kinds), allow_abbrev=False, prog=name)
        self._parser.error = _refuse

    @property
    def flags(self) -> list[str]:
        """Every flag in every spelling, with its dashes."""
        return [word for action in self._parser._actions for word in action.option_strings]

    def add(self, name: str, *, switch: bool = False, **options: Any) -> None:
        """Add a flag, with underscores and, as TRL has them, with dashes.

        Args:
            name: with underscores.
            switch: whether it is true or false, and true where it has no value.
            **options: of argparse's `add_argument`.
        """
        words = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        boolean = {"type": self._to_bool, "nargs": "?", "const": True} if switch else {}
        self._parser.add_argument(*words, **boolean, **options)

    def parse(self, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Return name → value, and the words that no flag takes.

        Raises:
            FlagError: a value is of the wrong kind.
        """
        self._remove_defaults()
        try:
            found, rest = self._parser.parse_known_args(list(words))
        except argparse.ArgumentTypeError as error:
            raise FlagError(str(error)) from None
        return vars(found), rest

    def help(self) -> str:
        """Return the help of every flag."""
        self._remove_defaults()
        return str(self._parser.format_help())

    def _remove_defaults(self) -> None:
        for action in self._parser._actions:
            action.default, action.required = argparse.SUPPRESS, False


def _refuse(message: str) -> NoReturn:
    raise FlagError(message)


def trusts_code(config: Any, model: Mapping[str, Any]) -> bool:
    """Return whether code next to the weights may be run; releases have it in `SFTConfig` or in `ModelConfig`.

    Args:
        config: an `SFTConfig`.
        model: values of a `ModelConfig`.
    """
    return bool(getattr(config, "trust_remote_code", False) or model.get("trust_remote_code", False))
