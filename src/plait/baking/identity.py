"""What the bytes of a bake depend on, as one digest: by it a journal is known again, and a node that would make others."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from plait.baking.plan import Bake
from plait.results.digests import sha256
from plait.results.versions import library_versions
from plait.version import __version__


def bake_digest(bake: Bake, adapters: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """Return a digest of everything that the bytes of the shards depend on.

    Args:
        bake: what is made.
        adapters: sha256 of each.
        recipe: as it was asked for, as plain values.
    """
    moments = bake.inventory.moments
    of_moments = {} if moments is None else {name: sha256(file.path) for name, file in moments.files.items()}
    stats = {s.name: s.file.path.stat() for s in bake.checkpoint.shards}
    content = {
        "plait": __version__,
        "libraries": library_versions(),
        "recipe": recipe,
        "options": bake.options.kept,
        "moments": None if moments is None else of_moments or {"function": uuid.uuid4().hex},  # no two functions are the same
        "adapters": [(d, *(sha256(p) for p in a.files[1:])) for d, a in zip(adapters, bake.inventory.adapters, strict=True)],
        "base": {
            s.name: (stats[s.name].st_size, stats[s.name].st_mtime_ns, hashlib.sha256(s.lead).hexdigest())
            for s in bake.checkpoint.shards
        },
        "config": bake.checkpoint.config,
        "headers": {s.name: hashlib.sha256(s.lead).hexdigest() for s in bake.shards},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
