"""What transformers makes of images and sounds: processors, features, their tokens in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_MEDIA_TOKEN = re.compile(r".*(image|video|vision|audio).*token_(id|index)")  # of configurations
_MOONSHINE = ((127, 64), (7, 3), (3, 2))  #: Kernel and stride of its convolutions, which its configuration does not have.


def fewest_samples(model: Any) -> int:
    """Return how many samples of a sound the convolutions at the beginning of a model need; 1 where it has none."""
    least, config = 1, getattr(model.config, "encoder", model.config)
    named = tuple(zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True))
    for kernel, stride in reversed(_MOONSHINE if config.model_type == "moonshine" else named):
        least = (least - 1) * stride + kernel
    return int(least)


def features_of(out: Any) -> Any:
    """Return the vectors of `get_image_features` or `get_text_features`, which transformers 5 puts into an output."""
    return getattr(out, "pooler_output", out)


def image_processors() -> Any:
    """Return `AutoImageProcessor` from where it is: in some versions the package's own name asks for torchvision."""
    return import_module("transformers.models.auto.image_processing_auto").AutoImageProcessor


def pil_backend() -> dict[str, Any]:
    """Return the keywords with which an image processor uses PIL, whether or not torchvision is there: the same pixels."""
    return {"backend": "pil"} if find_spec("transformers.image_processing_backends") is not None else {"use_fast": False}


class _NoVideos:
    """What loads a processor's part for videos."""

    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> None:
        """Load nothing."""


@contextmanager
def without_videos() -> Iterator[None]:
    """Let processors of transformers be loaded without their part for videos, which needs torchvision, inside the block."""
    processing = import_module("transformers.processing_utils")
    mixin, name = processing.ProcessorMixin, "AutoVideoProcessor"
    checks = mixin.check_argument_for_proper_class

    def check(processor: Any, argument: str, part: Any) -> Any:
        return None if part is None and argument == "video_processor" else checks(processor, argument, part)

    # where releases since version 5, and those before, look for it
    homes = (import_module("transformers.models.auto.video_processing_auto"), processing.transformers_module)
    before = [vars(home).get(name) for home in homes]
    mixin.check_argument_for_proper_class = check
    for home in homes:
        setattr(home, name, _NoVideos)
    try:
        yield
    finally:
        mixin.check_argument_for_proper_class = checks
        for home, own in zip(homes, before, strict=True):
            if own is None:
                delattr(home, name)
            else:
                setattr(home, name, own)


def media_tokens(model: Any) -> frozenset[int]:
    """Return the tokens of images, videos and sounds in a text, and those around them, as a configuration names them."""
    named = (value for name, value in vars(model.config).items() if _MEDIA_TOKEN.fullmatch(name))
    return frozenset(value for value in named if isinstance(value, int))
