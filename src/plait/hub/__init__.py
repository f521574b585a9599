"""The Hub and the disk as places of adapters: read references, fetch what they lead to, publish results.

Independent of what an adapter holds, and never writes anywhere but into the Hub's own cache.
"""

from plait.hub.download import COMPANION_FILES, MODEL_FILES, Located, resolve, resolve_model
from plait.hub.references import Reference, parse_reference
from plait.hub.upload import check_push, push_folder

__all__ = [
    "COMPANION_FILES",
    "MODEL_FILES",
    "Located",
    "Reference",
    "check_push",
    "parse_reference",
    "push_folder",
    "resolve",
    "resolve_model",
]
