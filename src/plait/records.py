"""The base of everything that passes between stages: frozen, strict, JSON-able.

Knows nothing of adapters or merging.
"""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen value; unknown keys are errors, so that a misspelt one can never be dropped in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")
