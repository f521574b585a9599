"""Fixtures of commands that are run as their users run them."""

from tests.ray_nodes import losing, nodes  # noqa: F401
