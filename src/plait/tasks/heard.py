"""The base of kinds of tasks whose examples are sounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from plait.errors import TaskError
from plait.tasks.attached import column_of, decoders
from plait.tasks.inputs import FileColumn, Inputs, Row
from plait.tasks.schema import InputMaker, RowTask
from plait.tasks.sounds import sound_bytes


class HeardTask(RowTask):
    """A task whose rows have sounds."""

    audio: Annotated[str, Field(min_length=1, description="The column: a path from the rows' file, or bytes.")] = "audio"

    @property
    def file_column(self) -> FileColumn:
        """The column with sounds."""
        return column_of(self.audio, "audio")

    def inputs_of(self) -> InputMaker:
        """Return the sound of every row."""
        return lambda rows: [self._sound(row) for row in rows]

    def own_digest(self) -> Mapping[str, Any]:
        """Return what answers depend on besides the fields and the examples: what decodes and resamples sounds."""
        return decoders("audio")

    def _sound(self, row: Row) -> Inputs | TaskError:
        data = sound_bytes(row, self.file_column, self.where)
        return data if isinstance(data, TaskError) else {"audio": data}
