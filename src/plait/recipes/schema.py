"""The recipe: everything a user asks for, frozen, with one default per parameter and this as its only home.

Commands use the parts they need; a recipe for merging is valid for evaluating what it makes. Independent of how anything
is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, PrivateAttr, field_validator, model_validator

from plait.adapters.formats import FORMATS
from plait.errors import PlanError, did_you_mean
from plait.hub.references import parse_reference
from plait.methods import METHODS
from plait.methods.auto import values_to_find
from plait.methods.base import MethodParams
from plait.recipes.calibration import CalibrationSpec
from plait.recipes.evaluation import EvalSpec
from plait.recipes.paths import KeyPath
from plait.recipes.problems import Origins
from plait.recipes.search import SearchSpec
from plait.recipes.tuning import TuneSpec
from plait.records import Record
from plait.transforms import TRANSFORMS, TransformParams

Dtype = Literal["float32", "bfloat16", "float16"]
MergeMode = Literal["union", "common", "strict"]
Weight = Annotated[float, Field(allow_inf_nan=False)]
PerAdapter = Weight | dict[str, Weight]  # one number for all adapters, or one per adapter name
Points = Annotated[tuple[Weight, ...], Field(min_length=2)]

if TYPE_CHECKING:
    MethodSpec = MethodParams
    TransformSpec = TransformParams
else:
    # a union that is built at run time has no other spelling (UP007 would leave a bare tuple)
    TransformSpec = Annotated[Union[tuple(t.spec for t in TRANSFORMS.values())], Field(discriminator="name")]  # noqa: UP007
    MethodSpec = Annotated[Union[tuple(m.spec for m in METHODS.values())], Field(discriminator="name")]  # noqa: UP007


def named_method(value: Any) -> Any:
    """Return what is under `method` with its name where stages are spelled out without one."""
    stages = isinstance(value, Mapping) and "name" not in value and not {"pre", "combine", "post"}.isdisjoint(value)
    return {"name": "pipeline", **value} if stages else value


class AdapterEntry(Record):
    """One adapter of a merge."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Unique; used in files and results.")]
    path: Annotated[str, Field(min_length=1, description="A folder, or `org/repo[@revision][/subfolder]`.")]
    weight: Annotated[Weight, Field(description="Its coefficient in the merge.")] = 1.0
    moments: Annotated[
        str | None,
        Field(min_length=1, description="File of its modules' input second moments, for `regmean` and its like."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        """Accept `[name=]reference`; a name that is not given comes from the path."""
        if isinstance(data, str):
            data = {"path": data}
        if isinstance(data, dict) and isinstance(data.get("path"), str) and data["path"]:
            reference = parse_reference(data["path"])
            name = data.get("name") or reference.name or reference.default_name()
            path = data["path"].partition("=")[2] if reference.name else data["path"]
            data = {**data, "name": name, "path": path}
        return data


class ScalarWeights(Record):
    """The same factor on every module."""

    policy: Literal["scalar"]
    value: PerAdapter = 1.0


class AdapterWeights(Record):
    """One factor per adapter, on top of `adapters[].weight`."""

    policy: Literal["per_adapter"]
    adapters: dict[str, Weight]
    default: Weight = 1.0


class LayerWeights(Record):
    """One factor per layer; modules outside of layers take the default."""

    policy: Literal["per_layer"]
    default: PerAdapter = 1.0
    layers: Annotated[dict[str, PerAdapter], Field(description="By index, or tower and index where there are several towers.")]

    @field_validator("layers", mode="before")
    @classmethod
    def _keys_as_text(cls, value: Any) -> Any:
        return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


class ModuleWeights(Record):
    """One factor per module name pattern; the first that matches counts."""

    policy: Literal["per_module"]
    default: PerAdapter = 1.0
    modules: Annotated[dict[str, PerAdapter], Field(description="Shell patterns over module paths, such as `*.q_proj`.")]


class ScheduleWeights(Record):
    """One factor per layer that follows a curve over the depth of its tower; modules outside of layers take the default.

    The first layer of a tower is at depth 0, the last at 1. A tower ends with the highest layer that some adapter has.
    """

    policy: Literal["schedule"]
    curve: Annotated[Literal["linear", "cosine"], Field(description="The way from `first` to `last`.")] = "linear"
    first: Annotated[PerAdapter, Field(description="Factor in the first layer.")] = 1.0
    last: Annotated[PerAdapter, Field(description="Factor in the last layer.")] = 1.0
    points: Annotated[
        Points | dict[str, Points] | None,
        Field(description="In place of these: factors at equal distances over the depth, straight lines between them."),
    ] = None
    default: PerAdapter = 1.0
    layers: Annotated[
        int | None,
        Field(ge=1, le=10**6, description="Layers of a tower, where no adapter has the last ones."),
    ] = None

    @model_validator(mode="after")
    def _one_curve(self) -> ScheduleWeights:
        given = [name for name in ("curve", "first", "last") if name in self.model_fields_set]
        if self.points is not None and given:
            raise ValueError(f"'points' are a curve by themselves; take {', '.join(given)} out, or the points")
        return self


class LinesWeights(Record):
    """LiNeS (Wang et al. 2025, arXiv:2410.17146, eq. 5): α + β ℓ / (L − 1) in layer ℓ of L, and α outside of layers.

    The authors set α from the norms of the merge; here it is given. It is `schedule` with first: α, last: α + β, default: α.
    """

    policy: Literal["lines"]
    alpha: Annotated[Weight, Field(description="Factor in the first layer and outside of layers.")]
    beta: Annotated[Weight, Field(description="What the last layer has on top.")]
    layers: Annotated[
        int | None,
        Field(ge=1, le=10**6, description="Layers of a tower, where no adapter has the last ones."),
    ] = None


Weights = Annotated[
    ScalarWeights | AdapterWeights | LayerWeights | ModuleWeights | ScheduleWeights | LinesWeights,
    Field(discriminator="policy"),
]


class Heads(Record):
    """What becomes of heads, trained token rows and trained biases: full tensors, which no LoRA algebra applies to."""

    policy: Annotated[
        Literal["separate", "average", "from"],
        Field(
            description="Full tensors (heads): keep each adapter's in heads/<name>/, average them (equal shapes), or take one."
        ),
    ] = "separate"
    adapter: Annotated[str | None, Field(description="Adapter whose heads are taken, with policy `from`.")] = None

    @model_validator(mode="after")
    def _name_for_from(self) -> Heads:
        if (self.policy == "from") != (self.adapter is not None):
            raise ValueError("'adapter' is needed with policy 'from', and only there")
        return self


class Output(Record):
    """What is written."""

    kind: Annotated[Literal["adapter", "delta"], Field(description="Write a LoRA adapter, or the dense deltas.")] = "adapter"
    rank: Annotated[
        int | str,
        Field(
            description="Rank of the result: `auto` (exact where exactness exists), a number, or `energy:0.99`.",
            examples=["auto", 16],
        ),
    ] = "auto"
    dtype: Annotated[Dtype, Field(description="Dtype of the written tensors.")] = "float32"
    layout: Annotated[
        Literal["uniform", "pattern"],
        Field(description="In PEFT's format, one rank for all modules (zero-padded; loads everywhere), or each its own."),
    ] = "uniform"
    format: Annotated[
        str,
        Field(
            description="Format of the adapter's files (docs/formats.md); auto: that of the sources where they have one.",
            examples=["kohya"],
        ),
    ] = "auto"

    @field_validator("format")
    @classmethod
    def _format(cls, value: str) -> str:
        FORMATS.load_plugins()
        if value == "auto" or value in FORMATS:
            return value
        near = did_you_mean(value, FORMATS)
        raise ValueError(f"{value!r} is not a format of adapters.{near} There are: auto, {', '.join(FORMATS)}")

    @field_validator("rank")
    @classmethod
    def _rank(cls, value: int | str) -> int | str:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if value == "auto" or (isinstance(value, int) and value >= 1) or (isinstance(value, str) and _is_share(value)):
            return value
        raise ValueError(f"{value!r} is not a rank: give 'auto', a number from 1, or 'energy:SHARE' with a share in (0, 1]")

    @model_validator(mode="after")
    def _dense_has_no_rank(self) -> Output:
        if self.kind == "delta" and (self.rank != "auto" or self.layout != "uniform" or self.format != "auto"):
            raise ValueError("a dense delta has neither rank nor layout nor format; leave them out, or write an adapter")
        return self

    @property
    def energy(self) -> float | None:
        """The share of energy asked for, when the rank is given so."""
        return float(self.rank.partition(":")[2]) if isinstance(self.rank, str) and self.rank != "auto" else None


def _is_share(text: str) -> bool:
    """Return whether a text is `energy:` and a share in (0, 1]."""
    word, _, number = text.partition(":")
    try:
        return word == "energy" and 0 < float(number) <= 1
    except ValueError:
        return False


class Recipe(Record):
    """Everything a merge depends on; docs/reference has its keys.

    >>> recipe = plait.Recipe(adapters=["./a", "./b"], method="ties", scale=0.5)
    >>> plait.plan(recipe).modules[0].ranks

    Constructing one directly raises pydantic's ValidationError; `load_recipe` and `plait.merge` raise a RecipeError instead,
    with places and suggestions. Relative paths start at `folder`, which is compared, but never written or dumped.
    """

    _folder: Path | None = PrivateAttr(None)
    _origins: Origins = PrivateAttr(Origins(""))

    version: Annotated[Literal[1], Field(description="Version of the recipe's form.")] = 1
    base_model: Annotated[
        str | None,
        Field(
            description="Base model, in place of the adapters' own; needed to bake, evaluate, tune, and for DoRA, not to merge."
        ),
    ] = None
    adapters: Annotated[
        tuple[AdapterEntry, ...],
        Field(min_length=1, description="A list of `[name=]folder` or `org/repo[@revision]`."),
    ]
    method: Annotated[MethodSpec, Field(description="Merge method, with its parameters; `plait methods` lists them.")] = Field(
        default={"name": "linear"}, validate_default=True
    )
    merge_mode: Annotated[
        MergeMode,
        Field(description="What a module that an adapter lacks is: a zero delta, left out of the merge, or an error."),
    ] = "union"
    transforms: Annotated[
        tuple[TransformSpec, ...], Field(description="Transforms of every adapter's deltas before the merge, in this order.")
    ] = ()
    weights: Annotated[
        Weights | None,
        Field(
            description="Weights: a policy per adapter, layer or module; in a command or a call also one number per adapter."
        ),
    ] = None
    scale: Annotated[
        Weight | Literal["auto"],
        Field(
            description="Factor on the merged delta (the papers' λ); `auto`: the one nearest to the adapters on tasks' texts."
        ),
    ] = 1.0
    heads: Heads = Heads()
    output: Output = Output()
    tasks: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            description="Task files: results are evaluated on their examples, moments and `auto` scales taken on their texts."
        ),
    ] = ()
    eval: EvalSpec = EvalSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    tune: TuneSpec = TuneSpec()
    search: SearchSpec = SearchSpec()
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of randomized methods.")] = 0

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        """Accept `method: ties`, and a pipeline that is spelled out without a name."""
        return {"name": value} if isinstance(value, str) else named_method(value)

    @field_validator("transforms", mode="before")
    @classmethod
    def _transform_by_name(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [*self._name_problems(), *self._method_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _name_problems(self) -> list[str]:
        names = [a.name for a in self.adapters]
        problems = [
            f"two adapters are called {n!r}; give names (name=path)" for n in sorted({n for n in names if names.count(n) > 1})
        ]
        used = set(self._adapter_names_used())
        problems += [f"{n!r} is not an adapter of this recipe; there are {', '.join(names)}" for n in sorted(used - set(names))]
        return problems

    def _adapter_names_used(self) -> list[str]:
        used = [self.heads.adapter] if self.heads.adapter else []
        values: list[Any]
        match self.weights:
            case ScalarWeights(value=value):
                values = [value]
            case AdapterWeights(adapters=adapters):
                values = [adapters]
            case LayerWeights(default=default, layers=layers):
                values = [default, *layers.values()]
            case ModuleWeights(default=default, modules=modules):
                values = [default, *modules.values()]
            case ScheduleWeights(first=first, last=last, points=points, default=default):
                values = [first, last, points, default]
            case _:
                values = []
        return used + [name for value in values if isinstance(value, dict) for name in value]

    def _method_problems(self) -> list[str]:
        method, count = METHODS[self.method_name], len(self.adapters)
        if count < method.min_adapters:
            return [f"method {method.name!r} needs at least {method.min_adapters} adapters, got {count}"]
        if method.max_adapters is not None and count > method.max_adapters:
            return [f"method {method.name!r} takes at most {method.max_adapters} adapters, got {count}"]
        try:
            method.check(self.method, count)
        except ValueError as error:
            return [f"method {method.name!r}: {error}"]
        problems = method.pipeline(self.method).problems(self.space_name, count)
        return [f"method {method.name!r}: {problem}" for problem in problems]

    @property
    def folder(self) -> Path | None:
        """Where relative paths start: the folder of the file that it was loaded from; None for the working directory."""
        return self._folder

    def placed(self, folder: Path) -> Recipe:
        """Return the same recipe with relative paths that start at a folder."""
        recipe = self.model_copy()
        recipe._folder = folder
        return recipe

    @property
    def origins(self) -> Origins:
        """Where it was written: what refusals of its values name."""
        return self._origins

    def written(self, origins: Origins) -> Recipe:
        """Return the same recipe, written elsewhere."""
        recipe = self.model_copy()
        recipe._origins = origins
        return recipe

    def changed(self, *paths: KeyPath, **values: Any) -> Recipe:
        """Return the recipe with other values, which are not its file's.

        Args:
            *paths: of what is not the file's any more; all of `values` when none is given.
            **values: key → value.
        """
        recipe = self.model_copy(update=values)
        overridden = (*self.origins.overridden, *(paths or [(key,) for key in values]))
        return recipe.written(replace(self.origins, overridden=overridden))

    @property
    def factor(self) -> float:
        """The scale as a number.

        Raises:
            PlanError: it is still to be found.
        """
        if self.scale == "auto":
            raise PlanError("scale: 'auto' is found by a merge with tasks (--tasks, tasks=…); give a number here.")
        return self.scale

    @property
    def values_to_find(self) -> dict[str, float]:
        """What is `auto`: `scale` and parameters of the method, each with the value to begin at."""
        return ({"scale": 1.0} if self.scale == "auto" else {}) | values_to_find(self.method)

    def with_values(self, values: Mapping[str, float]) -> Recipe:
        """Return the same recipe with other values of `scale` and of the method's parameters.

        Raises:
            ValueError: the method does not take them.
        """
        method = self.method
        if own := {name: value for name, value in values.items() if name != "scale"}:
            method = type(method).model_validate({**method.model_dump(), **own})
        return self.model_copy(update={"method": method, "scale": values.get("scale", self.scale)})

    @property
    def lacks_moments(self) -> bool:
        """Whether its method needs second moments, it names none, and it has tasks to take them on."""
        needed = METHODS[self.method_name].pipeline(self.method).needs_moments
        return needed and bool(self.tasks) and all(a.moments is None for a in self.adapters)

    @property
    def is_sequential(self) -> bool:
        """Whether moments of a layer are taken with the layers below already merged."""
        return METHODS[self.method_name].sequential

    @property
    def method_name(self) -> str:
        """The method's name."""
        return str(self.method.name)  # type: ignore[attr-defined]

    @property
    def space_name(self) -> str:
        """The space's name."""
        return str(self.method.space)  # type: ignore[attr-defined]
