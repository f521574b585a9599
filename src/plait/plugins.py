"""What is registered by name: by plait's own modules, and by installed packages through a group of entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Things by name, in order of registration.

    Args:
        group: of entry points, whose names are the names of what they load.
        what: one of the things, in messages.
        check: given every thing of an entry point; may raise `TypeError` with what it must be.
    """

    def __init__(self, group: str, what: str, check: Callable[[object], object] = lambda offered: None) -> None:
        self.group = group
        self._what = what
        self._check = check
        self._known: dict[str, T] = {}
        self._loaded = False

    def add(self, name: str, thing: T) -> None:
        """Register one.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._known:
            raise ValueError(f"a {self._what} named {name!r} is registered already")
        self._known[name] = thing

    def load_plugins(self) -> None:
        """Register what installed packages offer, once, in the order of names.

        Raises:
            ValueError: a name is taken.
            TypeError: what an entry point loads is of another kind.
        """
        if self._loaded:
            return
        self._loaded = True
        for point in sorted(entry_points(group=self.group), key=lambda p: p.name):
            offered = point.load()
            self._check(offered)
            if self._known.get(point.name) is not offered:  # its module may have registered it already
                self.add(point.name, offered)

    def __getitem__(self, name: str) -> T:
        """Return one by name.

        Raises:
            KeyError: there is none of that name.
        """
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
