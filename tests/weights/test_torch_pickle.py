"""Hostile and damaged PyTorch files: an exact read or a refusal, and nothing else is touched."""

import collections
import contextlib
import io
import pathlib
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest

from vlm.errors import CheckpointError
from vlm.weights.torch_pickle import TorchFile


class Global:
    """Pickled as an import of whatever `module` and `name` say, true or not."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state


class Storage:
    def __init__(self, key="0", kind="FloatStorage", count=12):
        self.pid = ("storage", Global("torch", kind), key, "cpu", count)


class Pickler(pickle._Pickler):  # the one in Python, which can be taught
    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save_fake(self, obj):
        self.write(f"c{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.function)
        self.save(obj.args)
        self.write(b"R")
        if obj.state is not None:
            self.save(obj.state)
            self.write(b"b")

    dispatch[Global], dispatch[Call] = save_fake, save_call


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def tensor(offset=0, size=(3, 4), stride=(4, 1), **storage):
    ordered = Call(Global("collections", "OrderedDict"))
    return Call(REBUILD, Storage(**storage), offset, size, stride, False, ordered)


def dumps(content):
    stream = io.BytesIO()
    Pickler(stream, 2).dump(content)
    return stream.getvalue()


NUMBERS = np.arange(12, dtype=np.float32)


def write(path, content, storages=None, **options):
    data = content if isinstance(content, bytes) else dumps(content)
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, value in (storages or {"0": NUMBERS.tobytes()}).items():
            archive.writestr(f"archive/data/{key}", value)
    return path


def refused(path, content, message, **options):
    with pytest.raises(CheckpointError, match=message) as refusal:
        TorchFile(write(path, content, **options))
    assert len(str(refusal.value)) < 500
    assert "\n" not in str(refusal.value)


def test_views_are_read_as_they_are(tmp_path):
    content = {
        "whole": tensor(),
        "turned": tensor(size=(4, 3), stride=(1, 4)),
        "part": tensor(offset=5, size=(2,), stride=(3,)),
        "scalar": tensor(offset=11, size=(), stride=()),
        "empty": tensor(size=(0, 4), stride=(4, 1)),
        "ones": tensor(offset=2, size=(1, 3), stride=(0, 1)),
    }
    file = TorchFile(write(tmp_path / "a.bin", content))
    whole = NUMBERS.reshape(3, 4)
    expected = {"whole": whole, "turned": whole.T, "part": NUMBERS[[5, 8]], "scalar": NUMBERS[11],
                "empty": np.zeros((0, 4)), "ones": NUMBERS[None, 2:5]}  # fmt: skip
    for name, array in expected.items():
        assert np.array_equal(file.read(name), array), name
    assert np.array_equal(file.read("turned", 1, 3), whole.T[1:3])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tensor(size=(1, 2), stride=(1, -1)), "strides"),
        (tensor(offset=-4), "offset -4"),
        (tensor(size=(-3, 4)), "shape"),
        (tensor(size=(3, 4), stride=(4,)), "strides"),
        (tensor(size=(3, 5), stride=(4, 1)), "overlaps itself"),
        (tensor(size=(2**31, 2**31), stride=(0, 0)), "overlaps itself"),
        (tensor(size=(4, 4), stride=(4, 1)), "ends outside its storage of 12 numbers"),
        (tensor(offset=1), "ends outside its storage"),
        (tensor(offset=2**62), "ends outside its storage"),
        (tensor(size=(2**63, 2), stride=(2, 1)), "ends outside"),
        (tensor(size=(3.0, 4)), "shape"),
        (tensor(size=(True, 4)), "shape"),
        (tensor(size=[3, 4]), "a list for a tuple"),
        (tensor(size=(1,) * 40, stride=(1,) * 40), "a tensor of 40 axes"),
        (tensor(kind="QInt8Storage"), "wants to import torch.QInt8Storage"),
        (tensor(key="../../etc/passwd"), "a storage by the name"),
        (tensor(key="1"), "has no whole storage 1"),
        (tensor(count=13), "has no whole storage 0"),
        (tensor(kind="DoubleStorage"), "has no whole storage 0"),
        (Call(REBUILD, 5, 0, (1,), (1,)), "an int for a _Storage|takes a int"),
        (Call(REBUILD), "wants to call"),
        (Call(Global("torch._utils", "_rebuild_tensor_v3")), "import .*_rebuild_tensor_v3"),
        (Call(Global("torch", "FloatStorage"), 3), "wants to call torch.FloatStorage"),
        (Call(Global("collections", "OrderedDict"), [("a", 1)]), "wants to call"),
        (Call(Global("__torch__.x", "Module"), 3), "wants to call __torch__"),
        (Call(Global("torch", "Size"), state={"a": 1}), "wants to call|changes"),
        ({(1, 2): 3}, "a key that is a tuple"),
        ({None: 3}, "a key that is a NoneType"),
        ({"x" * 600: tensor()}, "the name 'xxx"),
        ({"a.b": tensor(), "a": {"b": tensor()}}, "two tensors 'a.b'"),
        (set(), "wants to import|opcode"),
    ],
)  # fmt: skip
def test_tensors_that_are_none(tmp_path, bad, message):
    refused(tmp_path / "a.bin", bad if isinstance(bad, dict) else {"a": bad}, message)


@pytest.mark.parametrize("target", [
    Global("torch", "BFloat16Storage"), REBUILD, Global("torch", "Size"),
    Global("collections", "OrderedDict"), Global("torch.jit._pickle", "build_intlist"), (), "text",
    5, None, Storage(), tensor(),
])  # fmt: skip
@pytest.mark.parametrize("state", [{"__name__": "x"}, (3, "<", None, None, None, -1, -1, 0)])
def test_nothing_that_the_process_shares_can_be_changed(tmp_path, target, state):
    """BUILD on each thing that a pickle can name: numpy's bfloat16 and our functions are as before.

    Through the types and functions that an unpickler hands out, a file of 1 kB could rewrite the
    byte order of the process's own bfloat16.
    """
    data = dumps(target)[:-1] + dumps(state)[2:-1] + b"b."
    before = np.dtype(ml_dtypes.bfloat16).__reduce__(), dict(vars(collections.OrderedDict))
    refused(tmp_path / "a.bin", data, "refused, for it changes")
    assert (
        np.dtype(ml_dtypes.bfloat16).__reduce__(),
        dict(vars(collections.OrderedDict)),
    ) == before


def test_cycles_and_laughs(tmp_path):
    start = time.process_time()
    cyclic = {"a": tensor()}
    cyclic["s"] = cyclic
    refused(tmp_path / "a.bin", cyclic, "contains itself|larger than twice the file")
    cyclic["a"] = 1
    refused(tmp_path / "a.bin", cyclic, "contains itself, or is nested too deep")
    ring = []
    ring.append(ring)
    refused(tmp_path / "a.bin", {"a": tensor(), "b": {"c": cyclic, "d": ring}}, "contains itself")
    laughs = {"ha": 1}
    for _ in range(60):
        laughs = {"a": laughs, "b": laughs}
    refused(tmp_path / "a.bin", laughs, "more than 200,000 values")
    deep = b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."
    assert TorchFile(write(tmp_path / "a.bin", deep)).shapes == {}
    deep = b"\x80\x02" + b"}X\1\0\0\0a" * 100_000 + b"N" + b"s" * 100_000 + b"."
    refused(tmp_path / "a.bin", deep, "nested too deep")
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a place in the memo far away
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2 GB
        b"\x80\x02X\xff\xff\xff\xffabc.",  # a text of 4 GB
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\0\0\0abc.",
        b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\0\0abc.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
        b"(" * 10 + b".",
        b"\x80\x02}(X\1\0\0\0au.",
        b"\x80\x02h\x05.",
        b"\x80\x02\x86.",
        b"",
        b"I" + b"9" * 100_000 + b"\n.",
    ],
)
def test_sizes_that_are_not_there(tmp_path, data):
    path = write(tmp_path / "a.bin", data)
    tracemalloc.start()
    with contextlib.suppress(CheckpointError):
        assert TorchFile(path).shapes == {}
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_many_names_of_one_storage(tmp_path):
    """A small file whose tensors would fill the memory; two that share one, as tied weights, do."""
    shared = tensor(size=(1000,), stride=(1,), count=1000)
    storages = {"0": bytes(4000)}
    many = {str(n): shared for n in range(1000)}
    refused(tmp_path / "a.bin", many, "larger than twice the file", storages=storages)
    two = TorchFile(write(tmp_path / "a.bin", {"a": shared, "b": shared}, storages))
    assert two.shapes == {"a": (1000,), "b": (1000,)}


def test_archives_that_torch_does_not_write(tmp_path):
    path = tmp_path / "a.bin"
    refused(path, {"a": tensor()}, "is compressed", compression=zipfile.ZIP_DEFLATED)
    zeros = {"0": bytes(10_000_000)}
    refused(path, {"a": tensor()}, "compressed", storages=zeros, compression=zipfile.ZIP_DEFLATED)
    write(path, {"a": tensor()})
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr("archive/data/0", bytes(48))
    with pytest.raises(CheckpointError, match="two members 'archive/data/0'"):
        TorchFile(path)
    outside = tmp_path / "outside"
    for name in ("../outside", "/outside", str(outside)):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "x")
    assert not outside.exists()


def test_a_flipped_bit_in_a_storage_is_noticed(tmp_path):
    path = write(tmp_path / "a.bin", {"a": tensor()})
    data = bytearray(path.read_bytes())
    data[data.index(NUMBERS.tobytes()) + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged in a: download it again"):
        TorchFile(path).read("a")
    where = data.index(struct.pack("<4s", b"PK\x03\x04"), 1)
    data[where] = 0
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not have a at its listed offset"):
        TorchFile(path).read("a")


def test_golden_files_are_what_torch_wrote():
    golden = pathlib.Path(__file__).parent / "golden"
    assert TorchFile(golden / "openai_vit.pt").is_script
    index = sorted((golden / "hf_clip_bin").glob("*.bin"))
    assert sum(len(TorchFile(file).shapes) for file in index) > 50
