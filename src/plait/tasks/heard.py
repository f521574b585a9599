"""The base of kinds of tasks whose examples are sounds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, ClassVar

from pydantic import Field

from plait.errors import TaskError
from plait.tasks.inputs import FileColumn, Inputs, Row
from plait.tasks.schema import InputMaker, RowTask
from plait.tasks.sounds import ENDINGS, sound_bytes


class HeardTask(RowTask):
    """A task whose rows have sounds."""

    problems_shown: ClassVar = 50
    audio: Annotated[str, Field(min_length=1, description="The column: a path from the rows' file, or bytes.")] = "audio"

    @property
    def file_column(self) -> FileColumn:
        """The column with sounds."""
        return FileColumn(self.audio, "audio", ENDINGS)

    def inputs_of(self) -> InputMaker:
        """Return the sound of every row."""
        return lambda rows: [self._sound(row) for row in rows]

    def own_digest(self) -> Mapping[str, Any]:
        """Return what answers depend on besides the fields and the examples: what decodes and resamples sounds."""
        return {"soundfile": version("soundfile"), "scipy": version("scipy")}

    def _sound(self, row: Row) -> Inputs | TaskError:
        data = sound_bytes(row, self.file_column, self.where)
        return data if isinstance(data, TaskError) else {"audio": data}
