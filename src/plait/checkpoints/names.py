"""Where the parameters that adapters name are in a checkpoint: by name, with another prefix, or as the model's code says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from plait.checkpoints.architecture import Architecture, ArchitectureUnknown, Part
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.checkpoints.files import sections


@dataclass(frozen=True)
class Prefix:
    """What precedes a name here and not there: adapters name a full model, checkpoints may hold it without its head."""

    removed: str = ""
    added: str = ""

    def __call__(self, name: str) -> str:
        """Return the name with the prefix changed; unchanged where the removed one is not there."""
        return self.added + name.removeprefix(self.removed)

    def applies(self, name: str) -> bool:
        """Return whether a name begins with what is to be removed."""
        return name.startswith(self.removed)


class ParameterFinder:
    """Finds parameters in a checkpoint by the rules of its form alone: no one class is the code of all of it.

    Args:
        checkpoint: the base model.
    """

    def __init__(self, checkpoint: BaseCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._infos = {name: checkpoint.info(name) for name in checkpoint.home}

    @property
    def architecture(self) -> Architecture | None:
        """What the model's code says; None when it cannot be asked."""
        return None

    def parts(self, parameter: str) -> tuple[Part, ...]:
        """Return the checkpoint tensors that a parameter is made of; nothing when it is not there."""
        return self._checkpoint.form.parts(parameter, self._infos)

    def source_of(self, parameter: str) -> tuple[str, str] | None:
        """Return (own name, name of the parameter that it shares its values with) in the model; None when it shares none."""
        return None

    def is_transposed(self, module: str) -> bool | None:
        """Return whether the code stores a module's parameters as (d_in, d_out); None when it cannot be asked."""
        return None

    def why_not(self, parameter: str) -> str:
        """Report why a parameter was not found."""
        return self._checkpoint.form.why_not(parameter)

    def tied_groups(self) -> list[tuple[str, ...]]:
        """Return groups of parameters with common values, the one that owns them first; empty when nothing is tied.

        Raises:
            ArchitectureUnknown: the configuration leaves it open, and the model's code cannot be asked.
        """
        raise ArchitectureUnknown("only the code of its component knows")

    def model_name(self, parameter: str) -> str:
        """Return a parameter's name in the model's code."""
        return parameter


def parameter_finder(checkpoint: BaseCheckpoint, targets: Collection[str]) -> ParameterFinder:
    """Return what finds the parameters that adapters change, `targets`, in a checkpoint."""
    return CodeParameterFinder(checkpoint, targets) if checkpoint.form.has_code else ParameterFinder(checkpoint)


class CodeParameterFinder(ParameterFinder):
    """Finds parameters of one model of transformers: by name, with another prefix, or as the model's code says.

    Args:
        checkpoint: the base model.
        targets: parameters that adapters change; what they have in common decides on the prefix.
    """

    def __init__(self, checkpoint: BaseCheckpoint, targets: Collection[str]) -> None:
        super().__init__(checkpoint)
        self._architecture: Architecture | None = None
        self._unknown: str | None = None
        self.prefix = _common_prefix(targets, checkpoint.home)
        found = sum(self.prefix(t) in checkpoint.home for t in targets)
        self._code_prefix = Prefix()
        if found < len(targets) and (architecture := self.architecture) is not None:
            self._code_prefix = _common_prefix(targets, {**architecture.parts, **dict.fromkeys(architecture.tied)})

    @property
    def architecture(self) -> Architecture | None:
        """What the model's code says; None when it cannot be asked."""
        if self._architecture is None and self._unknown is None:
            shapes = {name: shard.file.tensors[name].shape for name, shard in self._checkpoint.home.items()}
            try:
                self._architecture = Architecture.of(self._checkpoint.folder, shapes)
            except ArchitectureUnknown as error:
                self._unknown = str(error)
        return self._architecture

    def parts(self, parameter: str) -> tuple[Part, ...]:
        """Return the checkpoint tensors that a parameter is made of; nothing when it is not there."""
        name = self.prefix(parameter)
        if name in self._checkpoint.home:
            return (Part(name),)
        architecture = self.architecture
        return () if architecture is None else architecture.parts.get(self._in_code(parameter, architecture), ())

    def source_of(self, parameter: str) -> tuple[str, str] | None:
        """Return (own name, name of the parameter that it shares its values with) in the model; None when it shares none."""
        architecture = self.architecture
        if architecture is None:
            return None
        name = self._in_code(parameter, architecture)
        return (name, architecture.tied[name]) if name in architecture.tied else None

    def is_transposed(self, module: str) -> bool | None:
        """Return whether the code stores a module's parameters as (d_in, d_out); None when it cannot be asked."""
        architecture = self.architecture
        return None if architecture is None else self._in_code(module, architecture) in architecture.transposed

    def why_not(self, parameter: str) -> str:
        """Report why a parameter was not found."""
        if self._unknown is not None:
            return f"no tensor has its name, and {self._unknown}"
        if (
            self._architecture is not None
            and (name := self._in_code(parameter, self._architecture)) in self._architecture.unknown
        ):
            return f"the checkpoint stores it converted ({self._architecture.unknown[name]}), which plait cannot write yet"
        return "neither a tensor of the checkpoint nor a parameter of the model has its name"

    def tied_groups(self) -> list[tuple[str, ...]]:
        """Return groups of parameters with common values, the one that owns them first; empty when nothing is tied.

        Raises:
            ArchitectureUnknown: the configuration leaves it open, and the model's code cannot be asked.
        """
        ties = [s["tie_word_embeddings"] for s in sections(self._checkpoint.config) if "tie_word_embeddings" in s]
        if ties and not any(ties):
            return []
        architecture = self.architecture
        if architecture is None:
            raise ArchitectureUnknown(self._unknown)
        groups: dict[str, list[str]] = {}
        for name, source in architecture.tied.items():
            groups.setdefault(source, [source]).append(name)
        return [tuple(g) for g in groups.values()]

    def model_name(self, parameter: str) -> str:
        """Return a parameter's name in the model's code."""
        if self._architecture is not None and (name := self._in_code(parameter, self._architecture)) != parameter:
            return name
        return self.prefix(parameter)

    def _in_code(self, name: str, architecture: Architecture) -> str:
        """Return a name as the model's code has it: behind the prefix that most need, or as loading renames an older one."""
        own = self._code_prefix(name)
        known = architecture.parts, architecture.tied, architecture.unknown, architecture.transposed
        older = architecture.renamed(name)
        return older if not any(own in k for k in known) and any(older in k for k in known) else own


def _common_prefix(wanted: Collection[str], names: Collection[str]) -> Prefix:
    """Return the change of prefix under which most wanted names are there; none when some are there without it."""
    if any(w in names for w in wanted):
        return Prefix()
    found: Counter[Prefix] = Counter()
    for name in list(wanted)[:8]:
        found.update(_prefixes(name, names))
    counts = {p: sum(p.applies(w) and p(w) in names for w in wanted) for p in found}
    best = max(counts.values(), default=0)
    chosen = [p for p, count in counts.items() if count == best]
    return chosen[0] if len(chosen) == 1 else Prefix()


def _prefixes(wanted: str, names: Iterable[str]) -> Iterator[Prefix]:
    there: Mapping[str, None] = dict.fromkeys(names)
    words = wanted.split(".")
    for i in range(1, len(words) - 1):
        if ".".join(words[i:]) in there:
            yield Prefix(removed=".".join(words[:i]) + ".")
    for name in there:
        if name.endswith("." + wanted):
            yield Prefix(added=name.removesuffix(wanted))
