"""The models that a parity check runs: a result, and the live merge that it should act like.

Needs transformers and PEFT, which everything else here does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.adapters.config import ADAPTER_CONFIG
from plait.adapters.names import PREFIX
from plait.checkpoints.files import architectures, read_config
from plait.deferred import Tensor, torch
from plait.errors import AdapterError, PlanError, join_words
from plait.hub.pretrained import load_model, refuse_failures
from plait.libraries.peft import scalings
from plait.libraries.transformers.kinds import AUTO_MODELS
from plait.libraries.transformers.layers import holds_transposed
from plait.merging.combine import pipeline_of
from plait.merging.conversion import run_convert
from plait.merging.delta_file import NAME as DELTA
from plait.merging.engine import Engine
from plait.merging.inventory import Inventory, take_inventory
from plait.merging.pipeline import run_recipe
from plait.merging.plan import make_plan
from plait.parsing import read_object
from plait.recipes.schema import Heads, Output, Recipe
from plait.results.lock import Lock
from plait.results.progress import Progress
from plait.results.threads import worker_count
from plait.tensorfiles.reader import SafetensorsFile
from plait.verification.inputs import FoundInput
from plait.verification.rebuild import located_recipe


@dataclass(frozen=True)
class ParityModel:
    """One side of a comparison.

    Attributes:
        model: in memory; both sides may share it.
        adapters: of it, that are active; none of a plain model.
    """

    model: Any
    adapters: tuple[str, ...] = ()

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits, (1, positions, vocabulary), or (1, classes)."""
        if self.adapters:
            self.model.base_model.set_adapter(list(self.adapters))
        if self.model.config.is_encoder_decoder:
            inputs = {**inputs, "decoder_input_ids": inputs["input_ids"]}
        with torch.no_grad():
            logits: Tensor = self.model(**inputs).logits
        return logits.float().cpu()


@dataclass(frozen=True)
class ParityModels:
    """A result and its reference.

    Attributes:
        what: the result, in words.
        reference: the live result, in words.
        result: of the folder.
        live: of the reference.
    """

    what: str
    reference: str
    result: ParityModel
    live: ParityModel

    @property
    def models(self) -> list[Any]:
        """Each model once."""
        shared = self.result.model is self.live.model
        return [self.result.model] if shared else [self.result.model, self.live.model]


def is_model(folder: Path) -> bool:
    """Return whether a folder holds a full model."""
    return (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file()


def load_sides(
    folder: Path, lock: Lock, found: Mapping[str, FoundInput], base: Path, scratch: Path, progress: Progress
) -> ParityModels:
    """Load what is compared, in float32.

    Args:
        folder: the result.
        lock: of it.
        found: its inputs.
        base: the base model's folder.
        scratch: for a dense merge, and for adapters of other formats, which PEFT reads in its own.
        progress: receives stages and steps.

    Raises:
        PlaitError: the result cannot be run, or has no live form.
    """
    adapters = {} if is_model(folder) else {"merged": _for_peft(_opened(folder), base, scratch / "merged")}
    task = _task_type(folder, found)
    live: ParityModel | None = None
    if lock.kind == "extract":
        reference, live = "the fine-tune", ParityModel(_model(found["finetuned"].folder, task))
        weights = None
    else:
        recipe = located_recipe(lock, found)
        inventory = take_inventory(recipe, base_folder=base)
        weights = _coefficients(inventory, progress)
        if weights is None:
            reference = "the base model with the dense merge added"
            live = ParityModel(_with_delta(_model(base, task), recipe, scratch, progress))
        else:
            reference = "the base model with the adapters active"
            adapters |= {
                f"source{i}": _for_peft(adapter, base, scratch / f"source{i}") for i, adapter in enumerate(inventory.adapters)
            }
    shared = _attached(_model(base, task), adapters) if adapters else None
    if live is None:
        sources = tuple(name for name in adapters if name != "merged")
        _weigh(shared, sources, weights or {})
        live = ParityModel(shared, sources)
    if is_model(folder):
        return ParityModels("baked model", reference, ParityModel(_model(folder, task)), live)
    return ParityModels("adapter", reference, ParityModel(shared, ("merged",)), live)


def _opened(folder: Path) -> Adapter:
    try:
        return Adapter.open(folder, "merged")
    except AdapterError as error:
        raise PlanError(f"{folder}: holds neither an adapter nor a model that can be run; bake it first ({error})") from None


def _for_peft(adapter: Adapter, base: Path, scratch: Path) -> Path:
    """Return a folder from which PEFT loads an adapter.

    Raises:
        PlanError: it is of a pipeline, which has no logits.
    """
    if adapter.towers:
        raise PlanError(
            f"{adapter.name!r} is of {join_words(adapter.towers)} of a pipeline: a parity check compares logits of a language "
            "model. Compare images, or what the components compute, with diffusers."
        )
    if adapter.origin.format == "peft":
        return adapter.folder
    return run_convert(str(adapter.place.absolute()), to="peft", out=scratch, base_model=str(base.absolute())).folder


def _task_type(folder: Path, found: Mapping[str, FoundInput]) -> str | None:
    for place in (folder, *(f.folder for f in found.values())):
        if (place / ADAPTER_CONFIG).is_file():
            task = read_object(place / ADAPTER_CONFIG, AdapterError, constants=True).get("task_type")
            return task if isinstance(task, str) else None
    return None


def _model(folder: Path, task: str | None) -> Any:
    import transformers

    config = read_config(folder)
    names = [AUTO_MODELS[task]] if task in AUTO_MODELS else architectures(config)
    kind = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), transformers.AutoModelForCausalLM)
    torch.manual_seed(0)  # a head that the base lacks is drawn at random, on both sides alike
    return load_model(kind, folder, dtype=torch.float32).eval()


def _attached(model: Any, adapters: Mapping[str, Path]) -> Any:
    """Return a model with adapters loaded, none merged into it."""
    from peft import PeftModel

    first, *others = adapters.items()
    with refuse_failures(first[1], "PEFT cannot load the adapter", PlanError):
        wrapped = PeftModel.from_pretrained(model, first[1], adapter_name=first[0])
    for name, folder in others:
        with refuse_failures(folder, "PEFT cannot load the adapter", PlanError):
            wrapped.load_adapter(folder, name)
    return wrapped.eval()


def _weigh(model: Any, names: tuple[str, ...], weights: Mapping[str, list[float]]) -> None:
    """Multiply the adapters' scalings with their coefficients, module by module."""
    for path, module in model.named_modules():
        scaling = scalings(module)
        if scaling is not None:
            row = weights.get(path.removeprefix(PREFIX), [0.0] * len(names))
            for name, weight in zip(names, row, strict=True):
                if name in scaling:
                    scaling[name] *= weight


def _coefficients(inventory: Inventory, progress: Progress) -> dict[str, list[float]] | None:
    """Return target module → every adapter's coefficient; None when PEFT cannot run the merge as a sum of adapters.

    Raises:
        PlanError: DoRA, which PEFT does not add up, and which has no dense merge here.
    """
    recipe = inventory.recipe
    is_sum = pipeline_of(recipe).is_linear and recipe.space_name != "factors" and not recipe.transforms
    plan = make_plan(inventory, workers=1)
    if is_sum:
        combiner = Engine(inventory, plan, workers=worker_count(), progress=progress).prepare()
        found = {m.target: combiner.coefficients(m.target).tolist() for m in plan.modules}
    if any(t.is_dora for a in inventory.adapters for t in a.targets.values()):
        if is_sum and len(inventory.adapters) == 1 and all(row == [1.0] for row in found.values()):
            return found
        raise PlanError("parity of weighted DoRA adapters cannot be measured: PEFT does not add them up.")
    if not is_sum or any(layout.names_parameter for layout in inventory.layouts.values()):
        return None
    return found


def _with_delta(model: Any, recipe: Recipe, scratch: Path, progress: Progress) -> Any:
    """Return a model with the dense merge added to its weights, whatever the method."""
    dense = recipe.model_copy(update={"output": Output(kind="delta"), "heads": Heads()})
    run_recipe(dense, out=scratch / "delta", progress=progress)
    file = SafetensorsFile(scratch / "delta" / DELTA)
    with torch.no_grad():
        for name in file.tensors:
            delta = file.read(name)
            if name.endswith(".bias") and not bool(delta.any()):
                continue  # all layers have a lora_bias or none, and the base may have no bias
            parameter = model.get_parameter(name)
            owner = model.get_submodule(name.rpartition(".")[0])
            parameter += as_stored(delta, parameter.shape, transposed=holds_transposed(owner))
    return model


def as_stored(delta: Tensor, shape: torch.Size, *, transposed: bool) -> Tensor:
    """Return a dense delta in the form of the parameter that it is added to.

    Args:
        delta: in the form of `plait merge` with output.kind `delta`.
        shape: of the parameter.
        transposed: its owner stores matrices as (d_in, d_out), which their shape does not show when they are square.
    """
    if delta.ndim > 2 and not transposed and delta.shape[:1] == shape[:1] and delta.shape[2:] == shape[2:]:
        groups = delta.shape[1] // shape[1]  # of a convolution, whose LoRA reads the channels of all in each
        parts = (rows[:, i * shape[1] : (i + 1) * shape[1]] for i, rows in enumerate(delta.chunk(groups)))
        return torch.cat(tuple(parts))
    return delta if delta.shape == shape and not transposed else delta.mT
