"""Files of torch.save: every tensor as torch reads it, nothing run, no byte believed that is not there."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from plait.errors import AdapterError
from plait.tensorfiles.pickled import PickleFile


def tensors() -> dict[str, torch.Tensor]:
    made = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    attributed = made.clone()
    attributed.note = "x"
    return {
        "a": made, "half": made.half(), "brain": made.bfloat16(), "double": made.double(), "turned": made.T, "one": made[:1],
        "part": made[2:4, 1:], "column": made[:, 2], "scalar": made[1, 1], "empty": made[:0], "again": made, "truth": made > 0,
        "long": torch.arange(5), "parameter": torch.nn.Parameter(made.clone()), "attributed": attributed,
        "images": torch.rand(2, 3, 2, 2).to(memory_format=torch.channels_last), "byte": torch.tensor([1, 2], dtype=torch.uint8),
    }  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}]
)
def test_every_tensor_is_read_as_torch_reads_it(tmp_path, options):
    torch.save(tensors(), tmp_path / "x.bin", **options)
    file, expected = PickleFile(tmp_path / "x.bin"), torch.load(tmp_path / "x.bin", weights_only=False)
    assert list(file.tensors) == list(expected)
    for name, tensor in expected.items():
        info = file.tensors[name]
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert torch.equal(file.read(name), tensor)
        assert file.read(name).dtype == tensor.dtype
        assert file.read(name).is_contiguous()
        assert file.is_in_order(name) is (name not in ("turned", "part", "column", "images")), name
        assert tensor.numel() < 3 or torch.equal(file.values(name, 1, 2), tensor.reshape(-1)[1:3])
        if file.is_in_order(name) and tensor.numel():
            stored = (tmp_path / "x.bin").read_bytes()[info.start : info.start + info.nbytes]
            assert torch.equal(torch.frombuffer(bytearray(stored), dtype=tensor.dtype), tensor.detach().flatten())
        if tensor.ndim:
            assert not len(tensor[1:2]) or torch.equal(file.read_rows(name, 1, 2), tensor[1:2])


def test_state_dicts_and_dtypes_without_storages(tmp_path):
    torch.save(torch.nn.Linear(3, 2).half().state_dict(), tmp_path / "x.bin")
    assert {n: i.dtype for n, i in PickleFile(tmp_path / "x.bin").tensors.items()} == {"weight": "F16", "bias": "F16"}
    torch.save({"f8": torch.ones(4).to(torch.float8_e4m3fn), "u": torch.tensor([1], dtype=torch.uint16)}, tmp_path / "y.bin")
    assert {n: i.dtype for n, i in PickleFile(tmp_path / "y.bin").tensors.items()} == {"f8": "F8_E4M3", "u": "U16"}


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bombed",))


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Bomb(), "made by 'posix.mkdir', which is not run"),
        (torch.ones(2, 2).to_sparse(), "a sparse tensor"),
        (torch.ones(2, device="meta"), "meta device"),
        (torch.ones(1).expand(1 << 40), "it was expanded"),
        (torch.ones(2, dtype=torch.complex128), "no place in safetensors"),
        ((torch.ones(2) * 1j).conj(), "a conjugate"),
        ({"b": torch.ones(2)}, "a mapping, not a tensor"),
        ([1], "a list"), ("text", "a text"), (3, "a number"), (None, "null"), (torch.float32, "not run|a number|'torch"),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path, monkeypatch, value, message, options):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "the one": value}, "x.bin", **options)
    with pytest.raises(AdapterError, match=rf"x\.bin: this pickle holds more than tensors: 'the one' .*({message})"):
        PickleFile(Path("x.bin"))
    assert not Path("bombed").exists()


def rewritten(source: Path, target: Path, change=lambda name, data: data, compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w", compression) as after:
        for entry in before.infolist():
            after.writestr(entry.filename, change(entry.filename, before.read(entry)))
    return target


def test_archives_that_lie(tmp_path):
    torch.save({"a": torch.arange(6.0)}, tmp_path / "x.bin")
    source = tmp_path / "x.bin"
    assert torch.equal(PickleFile(rewritten(source, tmp_path / "same.bin")).read("a"), torch.arange(6.0))

    def shorter(name: str, data: bytes) -> bytes:
        return data[:-4] if name.endswith("data/0") else data

    def longer(name: str, data: bytes) -> bytes:  # 6 values become 5, 250 and many
        return data.replace(b"K\x06", b"K\xfa") if name.endswith("data.pkl") else data

    for change in (shorter, longer):
        with pytest.raises(AdapterError, match=r"gives a wrong size of its storage|reaches beyond"):
            PickleFile(rewritten(source, tmp_path / "y.bin", change))
    with pytest.raises(AdapterError, match="is packed to"):
        PickleFile(rewritten(source, tmp_path / "y.bin", compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(AdapterError, match="highest byte first"):
        PickleFile(rewritten(source, tmp_path / "y.bin", lambda n, d: b"big" if n.endswith("byteorder") else d))
    with pytest.raises(AdapterError, match=r"no data\.pkl"):
        PickleFile(_without(source, tmp_path / "y.bin"))


def _without(source: Path, target: Path) -> Path:
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for entry in before.infolist():
            if not entry.filename.endswith("data.pkl"):
                after.writestr(entry.filename, before.read(entry))
    return target


def test_a_small_file_of_huge_tensors(tmp_path):
    made = torch.ones(10_000)
    torch.save({f"{i}": made for i in range(500)}, tmp_path / "x.bin")
    with pytest.raises(AdapterError, match="100 times the bytes of the file"):
        PickleFile(tmp_path / "x.bin")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path, options):
    """Whatever is read lies within the file."""
    saved = io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2, 3).T}, saved, **options)
    data, path = saved.getvalue(), tmp_path / "x.bin"
    for at in range(0, len(data), 3):
        for value in (0, data[at] ^ 0x11):
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            try:
                file = PickleFile(path)
            except AdapterError:
                continue
            assert all(file.read(name).nbytes <= len(data) for name in file.tensors)
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        with pytest.raises(AdapterError):
            PickleFile(path)


def test_names_are_taken_at_their_word(tmp_path):
    """What is not torch's own function or storage is not what it looks like, beside the entries too."""
    torch.save({"a": torch.arange(6.0)}, tmp_path / "x.bin")
    for one, other in ((b"torch\nFloatStorage", b"torcx\nFloatStorage"), (b"OrderedDict", b"Or eredDict")):
        change = lambda name, data, one=one, other=other: data.replace(one, other)  # noqa: E731
        with pytest.raises(AdapterError, match="holds more than tensors"):
            PickleFile(rewritten(tmp_path / "x.bin", tmp_path / "y.bin", change))


def test_a_number_of_thousands_of_digits_for_a_name(tmp_path):
    torch.save({10**6000: torch.zeros(2)}, tmp_path / "x.bin")
    with pytest.raises(AdapterError, match="the entry a number of thousands of digits has no text for a name"):
        PickleFile(tmp_path / "x.bin")


def test_pickles_of_something_else(tmp_path):
    for content in (
        b"",
        b"\x80",
        pickle.dumps([1, 2]),
        pickle.dumps({"a": 1}),
        b"PK\3\4",
        b"\x80\x02\x96" + b"\xff" * 8 + b".",
    ):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(AdapterError, match=r"x\.bin: not a file of tensors that plait can read"):
            PickleFile(tmp_path / "x.bin")
    torch.save([torch.ones(2)], tmp_path / "x.bin")
    with pytest.raises(AdapterError, match="expected a mapping of names to tensors, found a list"):
        PickleFile(tmp_path / "x.bin")
    torch.save({3: torch.ones(2), "a": torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(AdapterError, match="the entry 3 has no text for a name"):
        PickleFile(tmp_path / "x.bin")
