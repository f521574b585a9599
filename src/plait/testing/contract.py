"""`check_method`: the complete contract for one method, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from plait.methods import METHODS, Method
from plait.testing.claims import Broken
from plait.testing.properties import PROPERTIES, Property
from plait.testing.subject import Copies, Subject, example_params, installed

CONTRACT: Mapping[str, Property] = PROPERTIES


def subject_of(
    method: Method | str,
    params: Mapping[str, Any] | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    copies: Copies | None = None,
    by_position: bool = False,
    odd: bool = True,
) -> Subject:
    """Describe a method to the contract.

    Args:
        method: under test, or the name of a registered one.
        params: its parameters. Those without a default that are not given get an example: `Field(examples=[…])`, the first
            choice, or a value between the bounds.
        identity: see `Subject`.
        copies: see `Subject`.
        by_position: see `Subject`.
        odd: see `Subject`.

    Raises:
        ValueError: it is not known what a parameter may be.
    """
    method = METHODS[method] if isinstance(method, str) else method
    given = dict(params or {})
    fields = method.params.model_fields
    if any(f.is_required() and (f.alias or name) not in given for name, f in fields.items()):
        given = {**example_params(method), **given}
    return Subject(method, given, identity, copies, by_position, odd)


def check_property(subject: Subject, space: str, name: str) -> None:
    """Check one property of a method in one space; do nothing where the method does not promise it.

    Raises:
        AssertionError: it does not hold; the message names method, space, property and case.
    """
    row = CONTRACT[name]
    if not row.applies(subject, space):
        return
    try:
        with installed(subject.method), _one_thread():
            row.check(subject, space)
    except Broken as broken:
        raise AssertionError(
            f"method {subject.method.name!r} in space {space!r} breaks {name!r} ({row.about.rstrip('.')}): {broken}"
        ) from broken.__cause__


@contextmanager
def _one_thread() -> Iterator[None]:
    """Give torch one thread, as a merge's workers have: on tiny tensors more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_method(
    method: Method | str | Subject,
    params: Mapping[str, Any] | None = None,
    *,
    spaces: Iterable[str] | None = None,
    properties: Iterable[str] | None = None,
    **promises: Any,
) -> None:
    """Check that a merge method keeps the contract, in every space that it offers.

    >>> check_method(MY_METHOD, identity={"density": 1.0}, copies="mean")

    Args:
        method: under test; it need not be registered.
        params: its parameters; see `subject_of`.
        spaces: only these.
        properties: only these rows of `CONTRACT`.
        **promises: what holds beyond the contract; see `Subject`.

    Raises:
        AssertionError: with everything that does not hold.
    """
    subject = method if isinstance(method, Subject) else subject_of(method, params, **promises)
    broken = []
    for space in spaces if spaces is not None else subject.method.spaces:
        for name in properties if properties is not None else CONTRACT:
            try:
                check_property(subject, space, name)
            except AssertionError as error:
                broken.append(str(error))
    if broken:
        raise AssertionError("\n".join(broken))
