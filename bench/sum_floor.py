"""A weighted sum with as little as possible: `python bench/sum_floor.py OUT DTYPE WEIGHT ADAPTER…`.

numpy alone reads the factors, puts them side by side, rounds and writes them, hashes inputs and result, and flushes.
Nothing is planned or checked; adapters and names are taken to be as `synthetic` makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def main() -> None:
    """Write the sum."""
    out, dtype, weight, *adapters = sys.argv[1:]
    paths = [Path(a, "adapter_model.safetensors") for a in adapters]
    scales = []
    for adapter in adapters:
        config = json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8"))
        scales.append(np.float32(float(weight) * config["lora_alpha"] / config["r"]))
    with ThreadPoolExecutor(1) as pool:
        hashes = [pool.submit(_digest, path) for path in paths]
        _write(paths, scales, Path(out), half=dtype == "bfloat16")
        print(*(h.result() for h in hashes))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(paths: list[Path], scales: list[np.float32], out: Path, *, half: bool) -> None:
    files, headers, starts = [path.open("rb", buffering=0) for path in paths], [], []
    for file in files:
        (size,) = struct.unpack("<Q", file.read(8))
        headers.append(json.loads(file.read(size)))
        starts.append(8 + size)
    names = sorted(name for name in headers[0] if name != "__metadata__")
    header, offset = {}, 0
    for name in names:
        shapes, axis = [h[name]["shape"] for h in headers], 0 if "lora_A" in name else 1
        shape = [sum(s[i] for s in shapes) if i == axis else shapes[0][i] for i in (0, 1)]
        end = offset + shape[0] * shape[1] * (2 if half else 4)
        header[name] = {"dtype": "BF16" if half else "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    digest = hashlib.sha256()
    out.mkdir(parents=True)
    with Path(out, "adapter_model.safetensors").open("wb", buffering=0) as target:
        for piece in (struct.pack("<Q", len(text)), text):
            digest.update(piece)
            target.write(piece)
        for name in names:
            parts = []
            for file, stored, start, scale in zip(files, headers, starts, scales, strict=True):
                first, end = stored[name]["data_offsets"]
                part = np.empty((end - first) // 4, dtype=np.float32)
                file.seek(start + first)
                file.readinto(part.data)
                part = part.reshape(stored[name]["shape"])
                parts.append(part if "lora_A" in name else part * scale)
            joined = np.concatenate(parts, axis=0 if "lora_A" in name else 1)
            if half:
                wide = joined.view(np.uint32)
                joined = ((wide + (0x7FFF + ((wide >> 16) & 1))) >> 16).astype(np.uint16)
            digest.update(joined.data)
            target.write(joined.data)
        os.fsync(target.fileno())


if __name__ == "__main__":
    main()
