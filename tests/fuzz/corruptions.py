"""What may be wrong with a file: bits, parts, values and places, drawn from a seed."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import random
import shutil
import sqlite3
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

#: Texts in a document in place of what `json.dumps` or `yaml.safe_dump` could not write.
RAW = {
    "@digits@": "9" * 400,
    "@more-digits@": "7" * 5000,
    "@deep@": "[" * 3000 + "]" * 3000,
    "@open@": "[" * 3000,
    "@huge@": "1e999",
    "@nan@": "NaN",
    "@half@": '"\\ud800"',
    "@nul@": '"a\\u0000b"',
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, -1e308, 1e-320, 2**31, 2**63, 10**30, "", " ", "\n", "0", "1e9", "true",
    "null", "\u202eevil", "\x1b[31m", "a" * 5000, "../../etc/passwd", "/etc/passwd", "~nobody/x", ".", "..", "https://x.y/z",
    "{{ 7 * 7 }}", "{% for i in range(10**9) %}x{% endfor %}", "(a+)+$", "[", "a|b|", "*", "!!python/object:os.system", "%s%n",
    "é\u0301", "\U0001f4a5", [], {}, [[]], [None], {"a": {"b": [1]}}, [1, "a", None, {}], list(range(300)), {"": ""}, *RAW,
)  # fmt: skip
Change = Callable[[random.Random, Path], str]


def corrupt(chosen: random.Random, path: Path) -> str:
    """Damage a file in one of the ways that suit it; return what was done."""
    kinds: list[Change] = [_bytes, _bytes, _bytes, _place]
    if path.suffix in (".json", ".lock"):
        kinds += [_json] * 7
    elif path.suffix in (".yaml", ".yml"):
        kinds += [_yaml] * 6 + [_yaml_text]
    elif path.suffix == ".jsonl":
        kinds += [_json_line] * 5
    elif path.suffix == ".safetensors":
        kinds += [_header] * 6 + [_values, _metadata, _alpha]
    elif path.suffix == ".gguf":
        kinds += [_gguf] * 7
    elif path.suffix in (".csv", ".parquet"):
        kinds += [_table] * 4
    elif path.suffix == ".bin":
        kinds += [_archive] * 4
    elif path.suffix == ".db":
        kinds += [_database] * 6
    elif path.suffix == ".md":
        kinds += [_front_matter] * 6
    return chosen.choice(kinds)(chosen, path)


def _bytes(chosen: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    at = chosen.randrange(len(data) + 1)
    if chosen.random() < 0.5:  # headers and the like are where most is decided
        at = min(at, chosen.randrange(600))
    length = chosen.choice([1, 2, 8, 100, 5000])
    kind = chosen.choice(["flip", "set", *_EDITS, "utf-16"])
    there = data[at : at + length]
    if kind == "flip":
        data[at : at + 1] = bytes(b ^ 1 << chosen.randrange(8) for b in there[:1])
    elif kind == "set":
        data[at : at + 1] = chosen.choice([b"\0", b" ", b'"', b",", b"[", b"{", b"}", b"\x80", b"\xff", chosen.randbytes(1)])
    elif kind == "utf-16":
        data = bytearray(data.decode("latin-1").encode("utf-16"))
    else:
        start, end, new = _EDITS[kind](chosen, at, length, len(data), bytes(there))
        data[start:end] = new
    path.write_bytes(data)
    return f"{kind} {length} at {at}"


def _table(chosen: random.Random, path: Path) -> str:
    """Give one cell, one column or one name of a column another value."""
    table = pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pyarrow.parquet.read_table(path)
    at = chosen.randrange(table.num_columns)
    name, size = table.column_names[at], table.num_rows
    kind = chosen.choice(["cell", "column", "name", "no column", "no rows", "twice", "one text many times"])
    if kind == "cell":
        cells = table.column(at).to_pylist()
        cells[chosen.randrange(size)] = chosen.choice(
            [None, "", " ", "\n", "a" * 5000, "\x1b[31m", "é\u0301", "=1+1", '"', "\0"]
        )
        table = table.set_column(at, name, pyarrow.array(cells, pyarrow.string()))
    elif kind == "column":
        values: list[Any] = chosen.choice([[None], [1], [1.5], [True], [float("nan")], [10**18], ["same"]])
        if path.suffix == ".parquet":
            values = chosen.choice([values, [["a"]], [{"a": 1}], [b"\xff"]])
        table = table.set_column(at, name, pyarrow.array(values * size))
    elif kind == "name":
        names = [*table.column_names]
        names[at] = chosen.choice(["", " ", "other", "a" * 5000, "\x1b[31m", names[0], names[-1]])
        table = table.rename_columns(names)
    elif kind == "no column":
        table = table.drop_columns([name])
    elif kind == "no rows":
        table = table.slice(0, 0)
    elif kind == "one text many times":  # in parquet some kB, and 400 MB of rows
        count = 1 << 13 if path.suffix == ".parquet" else 1
        indices = pyarrow.array([0]).take(pyarrow.nulls(count, pyarrow.int64()).fill_null(0)).cast(pyarrow.int32())
        table = pyarrow.table({name: pyarrow.DictionaryArray.from_arrays(indices, ["x" * 50_000])})
    else:
        table = table.append_column(name, table.column(at))
    (pyarrow.csv.write_csv if path.suffix == ".csv" else pyarrow.parquet.write_table)(table, path)
    return f"{kind} {name}"


def _database(chosen: random.Random, path: Path) -> str:
    """Give one field of one row another value, or take the row away; what is JSON is changed as JSON is."""
    with contextlib.closing(sqlite3.connect(path)) as base, base:
        tables = [name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        tables = [table for table in tables if base.execute(f"SELECT count(*) FROM {table}").fetchone()[0]]
        table = chosen.choice([*tables, *(t for t in tables if t.startswith("trial_"))] * 2)
        column = chosen.choice([name for _, name, *_ in base.execute(f"PRAGMA table_info({table})")])
        row, value = chosen.choice(base.execute(f"SELECT rowid, {column} FROM {table} ORDER BY rowid").fetchall())
        place = chosen.random()
        if place < 0.03:
            base.execute(f"DROP TABLE {table}")
            return f"no table {table}"
        if place < 0.1:
            base.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
            return f"no row {row} of {table}"
        new: Any = chosen.choice([None, "", "x", "null", "{}", "[]", -1, 0, 7, 2**40, 1e308, "1e999", "a" * 5000, "@json@"])
        if column.endswith("json") and isinstance(value, str) and chosen.random() < 0.8:
            changed, _ = _changed(chosen, json.loads(value))
            new = _unquoted(json.dumps(changed))
        with contextlib.suppress(sqlite3.IntegrityError):
            base.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))
    return f"{table}.{column} of row {row} → {str(new)[:60]!r}"


#: What is put in place of the bytes from a start to an end.
_EDITS: dict[str, Callable[[random.Random, int, int, int, bytes], tuple[int, int, bytes]]] = {
    "cut off": lambda _, at, length, size, there: (at, size, b""),
    "take out": lambda _, at, length, size, there: (at, at + length, b""),
    "zero": lambda _, at, length, size, there: (at, at + length, bytes(len(there))),
    "repeat": lambda _, at, length, size, there: (at, at, there),
    "put in": lambda chosen, at, length, size, there: (at, at, chosen.randbytes(length)),
    "add": lambda chosen, at, length, size, there: (size, size, chosen.choice([b"\0", b" ", b"x", b"\n---\n"]) * length),
    "empty": lambda _, at, length, size, there: (0, size, b""),
    "bom": lambda _, at, length, size, there: (0, 0, b"\xef\xbb\xbf"),
    "latin": lambda _, at, length, size, there: (at, at, "café".encode("latin-1")),
}


def _place(chosen: random.Random, path: Path) -> str:
    kind = chosen.choice(["gone", "a folder", "a loop", "a dead link", "unreadable", "another file", "a device", "a pipe"])
    if kind == "unreadable":
        path.chmod(0)
        return kind
    content = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a loop":
        path.symlink_to(path.name)
    elif kind == "a dead link":
        path.symlink_to("nowhere")
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "another file":
        others = sorted(p for p in path.parent.iterdir() if p.is_file() and p.read_bytes() != content)
        if others:
            shutil.copyfile(chosen.choice(others), path)
    return kind


def _spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _spots(inner, (*path, key))


def _changed(chosen: random.Random, data: Any) -> tuple[Any, str]:
    """Change one value, key or item of plain data."""
    spots = list(_spots(data))
    shallow = [s for s in spots if len(s) == 1]
    path = chosen.choice(shallow if shallow and chosen.random() < 0.4 else spots)
    value = chosen.choice(VALUES)
    if not path:
        return value, f"all → {str(value)[:40]!r}"
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    kind = chosen.choice(["set"] * 8 + ["drop", "rename", "add"])
    if kind == "drop":
        del inside[path[-1]]
    elif kind == "set" or not isinstance(inside, dict):
        inside[path[-1]] = value
    elif kind == "rename":
        inside[str(value)] = inside.pop(path[-1])
    else:
        inside[chosen.choice(["", "r", "path", "name", "\x00", "__class__", "a.b"])] = value
    return data, f"{kind} {'.'.join(map(str, path))[:60]} → {str(value)[:40]!r}"


def _unquoted(text: str) -> str:
    for word, raw in RAW.items():
        text = text.replace(json.dumps(word), raw).replace(f"'{word}'", raw).replace(word, raw)
    return text


def _json(chosen: random.Random, path: Path) -> str:
    data, what = _changed(chosen, json.loads(path.read_text(encoding="utf-8")))
    text = json.dumps(data, indent=chosen.choice([None, 1]))
    if isinstance(data, dict) and data and chosen.random() < 0.1:
        text = f"{text.rstrip()[:-1]}, {json.dumps(chosen.choice(list(data)))}: 7}}"
        what += ", a key twice"
    path.write_text(_unquoted(text), encoding="utf-8")
    return what


def _json_line(chosen: random.Random, path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    at = chosen.randrange(len(lines))
    data, what = _changed(chosen, json.loads(lines[at]))
    lines[at] = _unquoted(json.dumps(data))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"line {at + 1}: {what}"


def _yaml(chosen: random.Random, path: Path) -> str:
    data, what = _changed(chosen, yaml.safe_load(path.read_text(encoding="utf-8")))
    path.write_text(_unquoted(yaml.safe_dump(data, sort_keys=False)), encoding="utf-8")
    return what


_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
_LINES = (
    "x: 2024-13-45", "x: !!timestamp 2024-13-45", "x: !!int x", "x: !!binary %%%", "x: !!python/name:os.system", "x: &a [*a]",
    "? [a]\n: b", "x: !!set {a}", "<<: [1]", "<<: *a", "a: &a {b: *a}", "\t- x", "%YAML 9.9", "...", "---", "x: |\n  y\n z",
    "- 1", "x: 1: 2", "@", "x: 0x" + "f" * 400, "x: .nan", "x: 1_000_000", "x: ~", "x: '", 'x: "\\ud800"', "x: \x07",
    "x: " + "{a: " * 200 + "1" + "}" * 200, _BOMB,
)  # fmt: skip


def _yaml_text(chosen: random.Random, path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    line = chosen.choice(_LINES)
    lines.insert(chosen.randrange(len(lines) + 1), line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"a line {line[:40]!r}"


def _front_matter(chosen: random.Random, path: Path) -> str:
    line = chosen.choice(
        [*_LINES, "license: [mit]", "license: {a: 1}", "base_model: []", "license: " + "x" * 10_000, "license: '\\e[31m'"]
    )
    path.write_text(f"---\n{line}\n---\n# card\n", encoding="utf-8")
    return f"front matter {line[:40]!r}"


def _header(chosen: random.Random, path: Path) -> str:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [n for n in header if n != "__metadata__"]
    if not names:  # the state of a tuning may hold no tensor
        return _bytes(chosen, path)
    one, other = chosen.choice(names), chosen.choice(names)
    kind = chosen.choice(["value", "value", "value", "hole", "swap", "name", *_FIELDS, "twice", "length"])
    if kind == "value":
        header, what = _changed(chosen, header)
        kind += f" {what}"
    elif kind == "hole":
        body += bytes(8)
        header[one]["data_offsets"] = [n + 8 for n in header[one]["data_offsets"]]
    elif kind == "swap":
        header[one], header[other] = header[other], header[one]
    elif kind == "name":
        new = chosen.choice([other, f"x{one}", one.replace("lora_A", "lora_B"), "", "x" * 3000, one.upper()])
        header[new] = header.pop(one)
    elif kind in _FIELDS:
        header[one] |= _FIELDS[kind](chosen, header[one], header[other])
    text = _unquoted(json.dumps(header)).encode()
    if kind == "twice":
        text = text[:-1] + b"," + json.dumps(one).encode() + b":" + json.dumps(header[other]).encode() + b"}"
    size = chosen.choice([0, 1, len(text) - 1, 2**63, 2**32, len(text) + 9]) if kind == "length" else len(text)
    path.write_bytes(struct.pack("<Q", size) + text + body)
    return f"header: {kind} of {one[:60]}"


def _metadata(chosen: random.Random, path: Path) -> str:
    """Change a text of the header; what is JSON is changed as JSON is."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    texts = {key: text for key, text in header.get("__metadata__", {}).items() if key != "format"}
    if not texts:
        return _bytes(chosen, path)
    key = chosen.choice(list(texts))
    try:
        changed, what = _changed(chosen, json.loads(texts[key]))
        header["__metadata__"][key] = _unquoted(json.dumps(changed))
    except ValueError:
        what = chosen.choice([str(v) for v in VALUES])
        header["__metadata__"][key] = what
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"metadata {key}: {what[:60]!r}"


def _alpha(chosen: random.Random, path: Path) -> str:
    """Give one alpha another value, dtype or shape, or take it away."""
    with safe_open(path, "pt") as opened:
        metadata, held = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    names = [name for name in held if name.endswith(".alpha")]
    if not names:
        return _values(chosen, path)
    name = chosen.choice(names)
    number = chosen.choice([math.nan, math.inf, 0.0, -1.0, 1e-45, 3e38, 2.0, 7.0])
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    if math.isfinite(number) and abs(number) < 100:
        dtypes += [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn]
    held[name] = torch.full(chosen.choice([(), (), (1,), (1, 1), (2,), (0,)]), number).to(chosen.choice(dtypes))
    what = f"{name}: {held[name].tolist()} of {held[name].dtype}"
    if chosen.random() < 0.1:
        del held[name]
        what = f"no {name}"
    save_file(held, path, metadata=metadata)
    return what


def _gguf(chosen: random.Random, path: Path) -> str:
    """Change one field, count, name, length, shape, type or place of a GGUF file's header."""
    data = bytearray(path.read_bytes())
    spots = _gguf_spots(data)
    kind = chosen.choice(sorted(spots))
    at, size = chosen.choice(spots[kind])
    if kind == "text":
        new = chosen.randbytes(size) if chosen.random() < 0.3 else chosen.choice([b"\0", b"x", b"9", "٣".encode()]) * size
    elif kind == "number":
        new = struct.pack("<f", chosen.choice([math.nan, math.inf, 0.0, -1.0, 3e38, 1e-45]))
    else:
        new = chosen.choice([0, 1, 2, 3, 7, 8, 9, 13, 2**20, 2**31, 2**40, 2**60, 2**63, 2**64 - 1]).to_bytes(8, "little")
    data[at : at + size] = new[:size]
    path.write_bytes(data)
    return f"gguf: {kind} of {size} bytes at {at} → {bytes(new[:size])[:20]!r}"


def _gguf_spots(data: bytearray) -> dict[str, list[tuple[int, int]]]:
    """Return kind of place → where it begins and its number of bytes, in a file whose fields are texts, u32 and f32."""
    spots: dict[str, list[tuple[int, int]]] = {"count": [(8, 8), (16, 8)], "version": [(4, 4)]}
    at = 24

    def text() -> int:
        (size,) = struct.unpack_from("<Q", data, at)
        spots.setdefault("length", []).append((at, 8))
        spots.setdefault("text", []).append((at + 8, size))
        return at + 8 + int(size)

    tensors, fields = struct.unpack_from("<QQ", data, 8)
    for _ in range(fields):
        at = text()
        (kind,) = struct.unpack_from("<I", data, at)
        spots.setdefault("type", []).append((at, 4))
        at += 4
        if kind == 8:
            at = text()
            continue
        spots.setdefault("number", []).append((at, 4))
        at += 4
    for _ in range(tensors):
        at = text()
        (dimensions,) = struct.unpack_from("<I", data, at)
        spots.setdefault("dimensions", []).append((at, 4))
        spots.setdefault("shape", []).extend((at + 4 + 8 * i, 8) for i in range(dimensions))
        at += 4 + 8 * dimensions
        spots.setdefault("type", []).append((at, 4))
        spots.setdefault("offset", []).append((at + 4, 8))
        at += 12
    return spots


_DTYPES = ("I32", "F16", "BF16", "F64", "F8_E4M3", "U8", "BOOL", "Q4", "", "f32")
#: What a header gives of one tensor, in place of what is true.
_FIELDS: dict[str, Callable[[random.Random, dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "same place": lambda _, one, other: {"data_offsets": other["data_offsets"]},
    "shape": lambda chosen, one, other: {
        "shape": chosen.choice([one["shape"][::-1], [1, *one["shape"]], [0], [2**40, 2**40], [-1], other["shape"]])
    },
    "dtype": lambda chosen, one, other: {"dtype": chosen.choice(_DTYPES)},
    "floats": lambda _, one, other: {"shape": [float(n) for n in one["shape"]]},
}


def _values(chosen: random.Random, path: Path) -> str:
    """Put odd numbers into the tensors."""
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    if len(data) == 8 + length:
        return _bytes(chosen, path)
    value = chosen.choice([float("nan"), float("inf"), 3.4e38, -3.4e38, 1e30, 1e-45, -0.0])
    for _ in range(chosen.choice([1, 1, 50])):
        at = 8 + length + 4 * chosen.randrange((len(data) - 8 - length) // 4)
        data[at : at + 4] = struct.pack("<f", value)
    path.write_bytes(data)
    return f"values {value}"


def _archive(chosen: random.Random, path: Path) -> str:
    try:
        tensors = torch.load(path, weights_only=True)
    except pickle.UnpicklingError:  # of a trainer's arguments, which are classes
        return _bytes(chosen, path)
    name = chosen.choice(list(tensors))
    kind = chosen.choice([*_ENTRIES, "old", "packed", "lie", "list"])
    if kind in _ENTRIES:
        tensors[name] = _ENTRIES[kind](tensors[name])
    torch.save([*tensors.values()] if kind == "list" else tensors, path, _use_new_zipfile_serialization=kind != "old")
    if kind in ("packed", "lie"):
        saved = io.BytesIO(path.read_bytes())
        way = zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(saved) as before, zipfile.ZipFile(path, "w", way) as after:
            for entry in before.infolist():
                content = before.read(entry)
                shorter = kind == "lie" and "/data/" in entry.filename and chosen.random() < 0.3
                after.writestr(entry.filename, content[: len(content) // 2] if shorter else content)
    return f"{kind} {name[:60]}"


#: What is in place of a tensor.
_ENTRIES: dict[str, Callable[[torch.Tensor], Any]] = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "parameter": torch.nn.Parameter,
    "expanded": lambda tensor: torch.ones(1).expand(tensor.shape),
    "number": lambda tensor: 3,
    "nested": lambda tensor: {"a": tensor},
    "turned": lambda tensor: tensor.T.contiguous().T,
    "int": lambda tensor: tensor.int(),
}
