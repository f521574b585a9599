"""Fixtures of commands that are run as their users run them."""

from tests.phase_files import phase_model, phases  # noqa: F401
from tests.ray_nodes import losing, nodes  # noqa: F401
from tests.searched import asked, drawn, pair  # noqa: F401
