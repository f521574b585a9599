"""Make tasks of pictures that packages ship: handwritten digits, silhouettes of animals, emoji.

They are copied to the user's cache folder, as PNG, a folder per label. Equal pictures are in one split. So are the digits of a
writer, but for the two writers at the borders: scikit-learn has them one writer after the other.
"""

from __future__ import annotations

import gzip
import hashlib
import pickletools
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import yaml
from base_model import PackageMissingError, cache, of_package
from PIL import Image, ImageDraw, ImageFont, features
from sklearn.datasets import load_digits

#: Split → how many pictures, in the order in which they are taken.
SPLITS = {"test": 250, "validation": 100, "train": 1000}
_ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
_FONT, _NAMES = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "usr/share/unicode/emoji/emoji-test.txt"
_INSTALL_ANIMALS = "The silhouettes come with it: python -m pip install --no-deps animal-mnist==0.4"
_INSTALL_EMOJI = "Emoji and their groups come with Debian: apt-get install fonts-noto-color-emoji unicode-data"
Pictures = Iterator[tuple[Image.Image, str]]


def tasks(root: Path = Path("/")) -> dict[str, Path]:
    """Return name → task file, making them the first time.

    Args:
        root: under which Debian's packages are unpacked.

    Raises:
        FileNotFoundError: they are not there.
        PackageMissingError: the package animal-mnist is not installed, or a library with which Pillow draws flags.
    """
    folder = cache() / "pictures"
    makers = {"digits": digits, "animals": animals, "emoji": lambda: emoji(root)}
    for name, make in makers.items():
        if not (folder / f"{name}.yaml").is_file():
            _write(folder, name, make())
    return {name: folder / f"{name}.yaml" for name in makers}


def digits() -> Pictures:
    """Yield scikit-learn's digits of 8 × 8 pixels, the last one first."""
    found = load_digits()
    for values, target in zip(found.images[::-1], found.target[::-1], strict=True):
        yield Image.fromarray((values * 255 / 16).astype(np.uint8)), str(target)


def animals() -> Pictures:
    """Yield the silhouettes of 28 × 28 pixels in an order of their own; each once, and not its mirror image."""
    folder = of_package("animal_mnist", "data/Animal_MNIST", _INSTALL_ANIMALS)
    pixels, labels = (_array(folder / f"animal_{what}_version_3.gz") for what in ("data", "label"))
    found = {}
    for picture, label in zip(np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28), np.frombuffer(labels, "<i8"), strict=True):
        found.setdefault(min(picture.tobytes(), picture[:, ::-1].tobytes()), (Image.fromarray(picture), _ANIMALS[label]))
    yield from (found[key] for key in sorted(found, key=lambda key: hashlib.sha256(key).digest()))


def emoji(root: Path) -> Pictures:
    """Yield Noto's emoji with Unicode's groups as labels, in an order of their own; no skin tones, none joined of others."""
    try:
        font, names = ImageFont.truetype(root / _FONT, 109), (root / _NAMES).read_text("utf-8")  # the one size that it has
    except OSError:
        raise FileNotFoundError(f"{root / _FONT} or {root / _NAMES} is not there. {_INSTALL_EMOJI}") from None
    if not features.check("raqm"):
        raise PackageMissingError("Pillow needs the library FriBidi to draw flags: apt-get install libfribidi0")
    found, label = {}, ""
    for line in names.splitlines():
        if line.startswith("# group: "):
            label = line.removeprefix("# group: ").split()[0].lower()
        match = re.match(r"([0-9A-F ]+?) *; fully-qualified", line)
        if match is None or "skin tone" in line or "200D" in match[1]:
            continue
        picture = Image.new("RGB", (136, 128), "white")
        text = "".join(chr(int(code, 16)) for code in match[1].split())
        ImageDraw.Draw(picture).text((0, 0), text, fill="black", font=font, embedded_color=True)
        found.setdefault(picture.tobytes(), (picture, label))
    yield from (found[key] for key in sorted(found, key=lambda key: hashlib.sha256(key).digest()))


def _array(path: Path) -> bytes:
    """Return the bytes of the array in a pickle, which is read and not executed."""
    parts = (value for _, value, _ in pickletools.genops(gzip.decompress(path.read_bytes())))
    return max((value for value in parts if isinstance(value, bytes)), key=len)


def _write(folder: Path, name: str, pictures: Pictures) -> None:
    """Write the splits, and the task's file when they are complete."""
    labels = set()
    for split, count in SPLITS.items():
        for number, (picture, label) in enumerate(islice(pictures, count)):
            labels.add(label)
            path = folder / name / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    content = {
        "name": name,
        "kind": "image_classification",
        "data": {"path": name},
        "splits": {split: split for split in ("train", "validation", "test")},
        "labels": sorted(labels),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
