"""Files from outside, read under limits: what cannot be read is refused by name, what can be read means what it says."""

from __future__ import annotations

import json
import os
import struct
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from plait.checkpoints.digests import weight_files
from plait.errors import AdapterError, RecipeError, TaskError
from plait.merging.card import license_of
from plait.notices import PlaitWarning
from plait.parsing import open_bytes, parse_json, read_object, read_text
from plait.recipes.documents import read_document
from plait.tensorfiles.header import read_header
from plait.tensorfiles.reader import SafetensorsFile
from tests.every import every


def write(path: Path, header: bytes | dict, body: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(dtype: str, shape: list, start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


A, B = entry("F32", [2], 0, 8), entry("F32", [1, 2], 8, 16)


def test_a_file_that_opens_and_cannot_be_read_is_named(tmp_path):
    """No other file fails so, whoever reads it."""
    with open_bytes(Path("/proc/self/mem")) as file, pytest.raises(OSError, match="Input/output error: '/proc/self/mem'"):
        file.read(8)
    with pytest.raises(AdapterError, match=r"/proc/self/mem: Input/output error\."):
        read_text(Path("/proc/self/mem"), AdapterError)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": A, "b": {**B, "data_offsets": [0, 8]}}, 8),  # both in the same bytes
        ({"a": A, "b": {**B, "data_offsets": [4, 12]}}, 12),
        ({"a": A, "b": {**B, "data_offsets": [12, 20]}}, 20),  # a hole
        ({"a": {**A, "data_offsets": [4, 12]}}, 12),
        ({"a": A}, 9),  # bytes behind the last
        ({"a": A, "b": B}, 15),
        (b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(B).encode() + b"}", 16),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
        (json.dumps({"a": A}).encode("utf-16"), 8),
        (json.dumps({"a": A}).encode("utf-8-sig"), 8),
        (json.dumps({"\xe4": A}, ensure_ascii=False).encode("latin-1"), 8),
        (json.dumps({"\ud800": A}).encode(), 8),
        ({"a": {**A, "shape": [2.0]}}, 8),
        ({"a": {**A, "shape": [True, 2]}}, 8),
        ({"a": {**A, "shape": ["2"]}}, 8),
        ({"a": {**A, "shape": 2}}, 8),
        ({"a": {**A, "shape": None}}, 8),
        ({"a": {**A, "shape": [-2, -1]}}, 8),
        ({"a": {**A, "data_offsets": [0.0, 8.0]}}, 8),
        ({"a": {**A, "data_offsets": [0]}}, 8),
        ({"a": {**A, "data_offsets": "08"}}, 8),
        ({"a": {**A, "data_offsets": [8, 0]}}, 8),
        (json.dumps({"a": {**A, "data_offsets": [0, 8]}}).replace("[0,", "[-0,").encode(), 8),
        ({"a": {**A, "dtype": "F31"}}, 8),
        ({"a": {**A, "dtype": ["F32"]}}, 8),
        ({"a": {**A, "dtype": None}}, 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ({"a": [1]}, 8),
        ({"a": None}, 8),
        ({"a": entry("F32", [1 << 40, 1 << 40, 0], 0, 0)}, 0),
        ({"a": entry("F32", [10**400], 0, 8)}, 8),
        ({"a": entry("F32", [2], 0, 10**400)}, 8),
        ({"a": A, "__metadata__": {"x": 1}}, 8),
        ({"a": A, "__metadata__": [1]}, 8),
        (b"[]", 0),
        (b"{}x", 0),
        (json.dumps({"a": A}).encode()[:-1] + b',"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 8),
        (json.dumps({"a": A}).encode()[:-1] + b',"x":NaN}', 8),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', 8),
        ({"a": entry("F4", [3], 0, 1)}, 1),  # one byte and a half
    ],
    ids=range(40),
)
def test_what_safetensors_refuses_is_refused(tmp_path, header, size):
    file = write(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(SafetensorError):
        safe_open(file, "numpy")
    with pytest.raises(AdapterError, match=r"x\.safetensors: "):
        SafetensorsFile(file)


def test_what_safetensors_reads_is_read(tmp_path):
    """Whatever order and dtypes a file has, empty tensors, scalars and names included."""
    tensors = {
        "z": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "ä\n\"": torch.zeros(0, 4), "h": torch.ones(3).half(),
        "f8": torch.ones(4).to(torch.float8_e4m3fn), "u": torch.tensor([1, 2], dtype=torch.uint16), "c": torch.ones(2) * 1j,
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"note": '{"a": [NaN]}'})
    header = read_header(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "torch") as other:
        assert set(header.tensors) == set(other.keys())
        assert header.metadata == other.metadata()
        for name, info in header.tensors.items():
            assert list(info.shape) == other.get_slice(name).get_shape()
            assert info.dtype == other.get_slice(name).get_dtype()
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name in ("z", "a", 'ä\n"', "h"):
        assert torch.equal(file.read(name), load_file(tmp_path / "x.safetensors")[name])


def test_a_header_that_is_padded_or_says_more_is_read(tmp_path):
    header = json.dumps({"b": {**B, "more": 1}, "__metadata__": None, "a": A}).encode()
    header = b" \n" + header + b"   \n"
    assert list(SafetensorsFile(write(tmp_path / "x", header, bytes(16))).tensors) == ["b", "a"]


def test_files_that_are_not_there_are_refused(tmp_path):
    for path in (tmp_path / "no.safetensors", tmp_path, tmp_path / "x\0y"):
        with pytest.raises(AdapterError, match="it cannot be read"):
            SafetensorsFile(path)


def test_weights_that_are_no_files_are_refused(tmp_path):
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(AdapterError, match="2 problems") as error:
        weight_files(tmp_path)
    assert "a.safetensors: this is not a file that can be read" in str(error.value)


def test_a_pipe_is_read_where_somebody_writes_to_it(tmp_path):
    """As a shell offers one: `plait merge <(command)`; one that nobody writes to is not waited for."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert read_text(pipe, TaskError) == ""
    with pytest.raises(AdapterError, match="a pipe or a device"):
        SafetensorsFile(pipe)
    both = os.open(pipe, os.O_RDWR)
    writer = os.open(pipe, os.O_WRONLY)
    os.write(writer, b"a: 1\n")
    os.close(both)
    later = threading.Timer(0.1, lambda: (os.write(writer, b"b: 2\n"), os.close(writer)))
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # keeps what was written
    later.start()
    assert read_text(pipe, TaskError) == "a: 1\nb: 2\n"
    os.close(reader)


@every(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 150 + "]" * 150, "nested too deeply"),
        ('{"a": ' * 101 + "1" + "}" * 101, "nested too deeply"),
        ('{"a": [1, ' + "9" * 400 + "]}", "'a.1' is an integer too large for a float"),
        ('{"a": ' + "9" * 5000 + "}", "a number of thousands of digits"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice, with different values"),
        ('{"a": {"b": "\\ud800"}}', "'a.b' is a text with half a character"),
        ('{"\\ud800": 1}', "half a character"),
        ('{"a": "x\\u0000y"}', "'a' is a text with the character NUL"),
        ('{"a": NaN}', "'a' is nan, not a finite number"),
        ('{"a": [-Infinity]}', "'a.0' is -inf"),
        ('{"a": 1e999}', "'a' is inf"),
        ("{'a': 1}", "f.json:1: this is not JSON"),
        ('{\n"a": 1,\nb}', "f.json:3: this is not JSON"),
        ("", "f.json:1: this is not JSON"),
        ('{"a": "x\ny"}', "f.json:1: this is not JSON: Invalid control character"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(RecipeError, match=r"f\.json") as error:
        parse_json(text, "f.json", RecipeError, advice="Do it again.")
    assert message in str(error.value)
    assert str(error.value).endswith(" Do it again.")
    assert len(str(error.value)) < 200


def test_json_that_is_read():
    deep = '{"a": ' * 99 + "[1]" + "}" * 99
    assert parse_json(deep, "f", RecipeError) == json.loads(deep)
    assert parse_json('{"a": 1, "b": 2, "a": 1}', "f", RecipeError) == {"a": 1, "b": 2}
    assert parse_json('["\\ud83d\\ude00", 1000000000000000019884624838656]', "f", RecipeError) == [
        "😀",
        10**30 + 19884624838656,
    ]
    assert parse_json("[NaN, 1e400]", "f", RecipeError, constants=True)[1] == float("inf")
    assert parse_json('"\\u0000"', "f", RecipeError, nul=True) == "\0"


def test_files_of_text(tmp_path):
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "bom.json", TaskError) == {"a": 1}
    (tmp_path / "latin").write_bytes(b"abc\xe4")
    (tmp_path / "large").write_bytes(b" " * (3 << 20))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "list.json").write_text("[1]")
    for name, message in (
        ("latin", r"latin: this is not text in UTF-8 \(byte 3\)\. Look\."),
        ("large", r"large: larger than 2 MB"),
        ("loop", "loop: Too many levels of symbolic links"),
        ("no", "no: No such file or directory"),
        (".", "Is a directory"),
        ("x\0y", "embedded null"),
    ):
        with pytest.raises(TaskError, match=message):
            read_text(tmp_path / name, TaskError, advice="Look.", most=2 << 20)
    with pytest.raises(TaskError, match=r"list\.json: expected a JSON object, found a list\."):
        read_object(tmp_path / "list.json", TaskError)
    with pytest.raises(TaskError, match="a device"):
        read_text(Path(os.devnull), TaskError)


@every(
    ("text", "message"),
    [
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "[" * 120 + "]" * 120, "nested too deeply"),
        ("x: " + "9" * 400, "cannot be read as int"),
        ("x: " + "9" * 5000, "cannot be read as int"),
        ("x: !!timestamp 2024-13-45", "cannot be read as timestamp"),
        ("x: !!timestamp never", "cannot be read as timestamp"),
        ("x: !!bool 7", "cannot be read as bool"),
        ("x: !!int ''", "cannot be read as int"),
        ("x: !!python/object/apply:os.system [true]", "the tag"),
        ("x: !!set {a}", "the tag"),
        (
            "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n"
            + "".join(f"d{i}: &d{i} [*{'b' if not i else f'd{i - 1}'}, *{'b' if not i else f'd{i - 1}'}]\n" for i in range(30)),
            "aliases",
        ),
        ("a: &a [*a]", "aliases"),
        ("a: &a {<<: *a}", "aliases"),
        (
            "a0: &a0 {x: 1, y: 2, z: 3}\n"
            + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 8)}]}}\n" for i in range(9)),
            "aliases",
        ),
        ("x: \x07", "not YAML"),
        ('x: "\\UFFFFFFFF"', "not a character's"),
        ('x: "\\U00110000"', "not a character's"),
        ('x: "\\ud800"', "half a character"),
        ('"\\ud800": 1', "half a character"),
        ('x: "\\0"', "NUL"),
        ("#" * (5 << 20), "larger than 4 MB"),
    ],
)
def test_yaml_that_is_refused(text, message):
    with pytest.raises(RecipeError, match=r"f\.yaml") as error:
        read_document(text, "f.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "front",
    [
        *("date: 2024-13-45", 'x: "\\UFFFFFFFF"', "license: 9999-99-99", "x: !!int x", "x: " + "[" * 5000),
        *("- a", "\x00", "a: {", ""),
    ],
)
def test_front_matter_of_strangers_ends_nothing(tmp_path, front):
    card = tmp_path / "README.md"
    card.write_bytes(f"---\nlicense: mit\n{front}\n---\n# card\n".encode())
    with warnings.catch_warnings(action="ignore", category=PlaitWarning):
        assert license_of(tmp_path) in (None, (("license", "mit"),), (("license", "9999-99-99"),))
    card.write_bytes(b"---\nlicense: mit\n---\n caf\xe9")
    assert license_of(tmp_path) == (("license", "mit"),)
    card.unlink()
    assert license_of(tmp_path) is None
    card.mkdir()
    with pytest.warns(PlaitWarning, match=r"README\.md is not a regular file; what this card states .* is not known"):
        assert license_of(tmp_path) is None
