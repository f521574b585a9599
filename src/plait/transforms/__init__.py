"""What may happen to each adapter before the method: one file per transform, and the registry.

A transform sees one adapter at a time and acts on deltas, never on A and B separately, whatever the method.
"""

from plait.transforms import identity, layer_norm  # noqa: F401  (registration)
from plait.transforms.base import TRANSFORMS, Transform, TransformParams, register_transform

__all__ = ["TRANSFORMS", "Transform", "TransformParams", "register_transform"]
