"""Some hundred corruptions of every kind of file, for every command; `make fuzz N=3000` does as many as one likes."""

from __future__ import annotations

import pytest

from tests.fuzz.running import attempt
from tests.fuzz.world import build

_SEEDS = 320
_AT_ONCE = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, _SEEDS, _AT_ONCE))
def test_a_damaged_file_is_refused_by_name_or_read_rightly(world, tmp_path, first):
    outcomes = [attempt(seed, world, tmp_path / "scratch") for seed in range(first, first + _AT_ONCE)]
    found = [f"seed {o.seed}: {o.finding}\n  {o.what}\n{o.said}" for o in outcomes if o.finding]
    assert not found, "\n".join(found)
