"""Some hundred corruptions of every kind of file, for every command; `make fuzz N=3000` does as many as one likes."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.fuzz.running import attempt, run
from tests.fuzz.world import COMMANDS, build

_SEEDS = 320
_AT_ONCE = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build(folder)
    return folder


_QUICK = {c.words: c for c in COMMANDS if c.words[0] not in ("tune", "train", "sft", "push")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, len(_QUICK), _AT_ONCE))
def test_commands_are_done_where_nothing_is_damaged(world, tmp_path, first):
    """Else what is refused is not the damage."""
    for number, command in enumerate([*_QUICK.values()][first : first + _AT_ONCE]):
        place = tmp_path / str(number)
        for name in command.needs:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (world / name).is_dir() else shutil.copy2)(world / name, place / name)
        code, shown = run(command.words, place)
        assert code in (0, None), f"{' '.join(command.words)}\n{shown}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("left", [".out.baking", ".out.tuning", "left"])
def test_what_a_killed_command_left_is_taken_up_elsewhere_too(world, tmp_path, left):
    """Else its corruptions are of files that nobody reads."""
    command = next(c for c in COMMANDS if left in c.needs)
    for name in command.needs:
        source = world / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / name)
    code, shown = run(command.words, tmp_path)
    assert code in (0, None), shown
    assert not re.search("from the beginning|made again|second moments", shown), shown
    words = {".out.baking": "10 of 10 files were finished before", ".out.tuning": "tuned", "left": "continues at step 2"}
    assert words[left] in shown


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, _SEEDS, _AT_ONCE))
def test_a_damaged_file_is_refused_by_name_or_read_rightly(world, tmp_path, first):
    outcomes = [attempt(seed, world, tmp_path / "scratch") for seed in range(first, first + _AT_ONCE)]
    found = [f"seed {o.seed}: {o.finding}\n  {o.what}\n{o.shown}" for o in outcomes if o.finding]
    assert not found, "\n".join(found)
