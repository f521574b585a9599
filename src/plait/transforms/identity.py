"""The transform that changes nothing."""

from plait.transforms.base import Transform, TransformParams, register_transform

register_transform(Transform("identity", "Change nothing.", TransformParams, lambda delta, params, found: delta))
