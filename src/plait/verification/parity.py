"""Does a result act as the adapters do? The same prompts through it and through the live merge, logits compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.adapters.config import ADAPTER_CONFIG
from plait.baking.plan import usable_device
from plait.deferred import Tensor, torch
from plait.errors import AdapterError, AddressError, RecipeError
from plait.extras import require
from plait.hub.download import COMPANION_FILES, MODEL_FILES, resolve_model
from plait.hub.pretrained import load_tokenizer, refuse_failures
from plait.libraries.transformers.quiet import quiet_loading
from plait.parsing import lines_of, parse_json, read_object, read_text
from plait.records import Record
from plait.results.lock import Lock, read_lock
from plait.results.progress import Progress, SilentProgress
from plait.results.staging import scratch
from plait.tensorfiles.reader import SafetensorsFile
from plait.verification.inputs import BASE, FoundInput, check_inputs
from plait.verification.logits import Parity, compare_logits, pool_parity

ROUNDING = "rounding alone"


class ParityComparison(Record):
    """One pair of models on all prompts.

    Attributes:
        what: was compared with what; `rounding alone` is the live result against itself in float32.
        dtype: in which it was computed.
        overall: over all positions of all prompts.
        worst: of the prompt with the largest |Δlogit|.
        worst_prompt: its number, from 1.
    """

    what: str
    dtype: str
    overall: Parity
    worst: Parity
    worst_prompt: int


class ParityReport(Record):
    """How a result acts against the live merge.

    Attributes:
        prompts: how many.
        reference: what the live result is.
        comparisons: result against live result in float32, and in the stored dtype where that is another; then also the live
            result in the stored dtype against itself in float32, which is what rounding alone does.
    """

    prompts: int
    reference: str
    comparisons: tuple[ParityComparison, ...]


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: a line each, or the `prompt` of every line of a `.jsonl` file.

    Raises:
        RecipeError: it cannot be read, or has none.
    """
    lines = lines_of(read_text(path, RecipeError, advice="Give a file of prompts, one per line."))
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [_prompt(path, number, line) if path.suffix == ".jsonl" else line for number, line in numbered]
    if not prompts:
        raise RecipeError(f'{path}: there are no prompts. Write one per line, or .jsonl lines with a "prompt".')
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    row = parse_json(line, str(path), RecipeError, at=number)
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise RecipeError(f'{path}, line {number}: expected a JSON object with a text under "prompt".')
    return prompt


def check_parity_request(prompts: Path, device: str) -> None:
    """Report what is wrong with a parity check before any work is done for it.

    Args:
        prompts: the file.
        device: where to compute.

    Raises:
        MissingPackageError: transformers or PEFT are not installed.
        RecipeError: there are no prompts, or no such device.
    """
    require("a parity check", {"parity": ["peft", "transformers"]})
    usable_device(device)
    read_prompts(prompts)


def check_parity(
    folder: Path,
    prompts: Path,
    *,
    base_model: str | None = None,
    inputs: Mapping[str, str] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ParityReport:
    """Compare the logits of a result with those of the live merge.

    The live result is the base model with the source adapters active, each times its coefficient, where the merge is linear;
    else the base model with the dense merge added to it; of an extraction, it is the fine-tune.

    Args:
        folder: with an adapter or a baked model, and its lock.
        prompts: a file; see `read_prompts`.
        base_model: reference of the base model; else the lock's, else the one that the adapter names.
        inputs: name → reference, for inputs that are elsewhere than the lock records.
        device: where to compute, as torch names it.
        progress: receives stages and steps.

    Raises:
        PlaitError: as `check_parity_request`; or an input or the base model is not found, or nothing can be run.
    """
    check_parity_request(prompts, device)
    texts = read_prompts(prompts)
    lock = read_lock(folder)
    checks, found = check_inputs(folder, lock, inputs or {})
    lost = [f"{c.name}: {c.detail}" for c in checks if c.state == "unknown" and c.name != BASE]
    if lost:
        raise AddressError(f"parity needs every input; give --input NAME=PATH. {' '.join(lost)}")
    base = _base_folder(folder, lock, found, base_model)
    return _measure(folder, lock, found, base, texts, device, progress or SilentProgress())


def _base_folder(folder: Path, lock: Lock, found: Mapping[str, FoundInput], given: str | None) -> Path:
    known = found.get("base" if lock.kind == "extract" else BASE)
    if given is None and known is not None:
        return known.folder
    named = given or lock.recipe.get("base_model")
    if not named and (folder / ADAPTER_CONFIG).is_file():
        named = read_object(folder / ADAPTER_CONFIG, AdapterError, constants=True).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise AddressError(f"{folder}: no base model is named there; give --base-id (base_model=).")
    return resolve_model(named, files=(*MODEL_FILES, *COMPANION_FILES)).folder


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of most values of a model's files."""
    counts: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        for info in SafetensorsFile(path).tensors.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
    named = {"BF16": torch.bfloat16, "F16": torch.float16}
    return named.get(max(counts, key=lambda k: counts[k], default="F32"), torch.float32)


def _measure(
    folder: Path,
    lock: Lock,
    found: Mapping[str, FoundInput],
    base: Path,
    texts: Sequence[str],
    device: str,
    progress: Progress,
) -> ParityReport:
    from plait.verification.live import is_model, load_sides

    home = folder if is_model(folder) else base
    encoded = _encode(home, texts, device)
    stored = _stored_dtype(home)
    comparisons: list[ParityComparison] = []
    with scratch("parity") as place:
        with quiet_loading():
            sides = load_sides(folder, lock, found, base, place, progress)
        for dtype in dict.fromkeys((torch.float32, stored)):
            for model in sides.models:
                model.to(device=device, dtype=dtype)
            word = str(dtype).removeprefix("torch.")
            against, rounding = [], []
            progress.start(f"parity in {word}", len(encoded))
            for number, inputs in enumerate(encoded):
                live = sides.live.logits(inputs)
                against.append(compare_logits(live, sides.result.logits(inputs)))
                exact = place / f"{number}.pt"
                if dtype != torch.float32:
                    rounding.append(compare_logits(torch.load(exact), live))
                elif stored != torch.float32:
                    torch.save(live, exact)  # not held: a vocabulary's logits of many prompts are large
                progress.advance()
            progress.finish()
            comparisons.append(_comparison(f"{sides.what}, live result", word, against))
            if rounding:
                comparisons.append(_comparison(ROUNDING, word, rounding))
    return ParityReport(prompts=len(texts), reference=sides.reference, comparisons=tuple(comparisons))


def _encode(folder: Path, texts: Sequence[str], device: str) -> list[dict[str, Tensor]]:
    tokenizer = load_tokenizer(folder, error=AddressError)
    with refuse_failures(folder, "the tokenizer cannot read the prompts", AddressError):
        encoded = [tokenizer(text, return_tensors="pt") for text in texts]
    if empty := [str(number) for number, tokens in enumerate(encoded, 1) if tokens["input_ids"].numel() == 0]:
        raise RecipeError(f"the tokenizer of {folder} makes no tokens of prompt {', '.join(empty)}; leave it out.")
    return [{k: e[k].to(device) for k in ("input_ids", "attention_mask") if k in e} for e in encoded]


def _comparison(what: str, dtype: str, parts: Sequence[Parity]) -> ParityComparison:
    worst = max(range(len(parts)), key=lambda i: parts[i].max_difference)
    return ParityComparison(what=what, dtype=dtype, overall=pool_parity(parts), worst=parts[worst], worst_prompt=worst + 1)
