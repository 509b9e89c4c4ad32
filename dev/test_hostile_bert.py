"""Checkpoint files from an enemy, or off a broken disk: python -m pytest dev/test_hostile_bert.py

No code in them runs, no memory beyond the file's own size is taken, and every refusal is one line that
names the file. dev/fuzz.py does the same at random; the last test calls it with a small budget."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import bert
from dev import fuzz
from helpers import raises_one_line

# ---------------------------------------------------------------------------------------------------
# safetensors
# ---------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_safetensors(file, header, data=b"12345678"):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


@pytest.mark.parametrize("header", [
    b"", b"[]", b"5", b'"x"', b"null", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000,
], ids=lambda header: repr(header[:8]))
def test_a_safetensors_header_that_is_no_json_object_is_raises_one_line(tmp_path, header):
    file = write_safetensors(tmp_path / "x.safetensors", header)
    raises_one_line(bert.read_safetensors, file, match="x.safetensors: ")


@pytest.mark.parametrize("offsets, match", [
    ([1, 9], "do not follow on 0"),
    ([8, 0], "do not follow on 0"),
    ([0, -1], "do not follow on 0"),
    ([0, 16], "or are not there"),
    ([0, 2**80], "or are not there"),
    ([0, 4], "4 bytes cannot hold"),
    ([0, 8, 9], "too many values"),
    ("ab", "do not follow|not supported"),
    (None, "NoneType"),
], ids=str)
def test_tensors_must_fill_a_safetensors_file_one_after_the_other(tmp_path, offsets, match):
    file = write_safetensors(tmp_path / "x.safetensors", {"a": ENTRY | {"data_offsets": offsets}})
    raises_one_line(bert.read_safetensors, file, match=f"x.safetensors: .*({match})")


def test_two_tensors_on_the_same_bytes_are_raises_one_line(tmp_path):
    file = write_safetensors(tmp_path / "x.safetensors", {"a": ENTRY, "b": ENTRY})
    raises_one_line(bert.read_safetensors, file, match="x.safetensors: b: bytes 0 to 8 do not follow on 8")


def test_bytes_that_belong_to_no_tensor_are_raises_one_line(tmp_path):
    file = write_safetensors(tmp_path / "x.safetensors", {"a": ENTRY}, data=b"123456789")
    raises_one_line(bert.read_safetensors, file, match="the last tensor ends at byte 8 of 9")


@pytest.mark.parametrize("shape", [
    [3], [-1, -2], [2.0], [True, 2], "2", {"2": 1}, [1] * 10_000,
], ids=lambda shape: str(shape)[:20])
def test_a_shape_that_does_not_match_the_bytes_is_raises_one_line(tmp_path, shape):
    file = write_safetensors(tmp_path / "x.safetensors", {"a": ENTRY | {"shape": shape}})
    raises_one_line(bert.read_safetensors, file, match="x.safetensors: 8 bytes cannot hold torch.float32 of shape")


def test_an_empty_tensor_of_a_gigantic_shape_is_raises_one_line(tmp_path):
    entry = {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}
    file = write_safetensors(tmp_path / "x.safetensors", {"a": entry}, data=b"")
    raises_one_line(bert.read_safetensors, file, match="x.safetensors: 0 bytes cannot hold")


@pytest.mark.parametrize("dtype", ["F99", "", None, 5])
def test_an_unknown_dtype_is_refused_with_the_known_ones(tmp_path, dtype):
    file = write_safetensors(tmp_path / "x.safetensors", {"a": ENTRY | {"dtype": dtype}})
    raises_one_line(bert.read_safetensors, file, match="x.safetensors: a: dtype .* is not one of F64, F32")


@pytest.mark.parametrize("claimed", [100, 10**9, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path, claimed):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", claimed) + b"{}")
    match = "x.safetensors: not a complete safetensors file: 10 bytes"
    raises_one_line(bert.read_safetensors, tmp_path / "x.safetensors", match=match)


def test_a_safetensors_file_cut_anywhere_is_raises_one_line(tmp_path):
    file = tmp_path / "x.safetensors"
    bert.write_safetensors(file, {"a": torch.ones(5), "b": torch.ones(3)})
    content = file.read_bytes()
    for length in range(len(content)):
        (tmp_path / f"{length}.safetensors").write_bytes(content[:length])
        raises_one_line(bert.read_safetensors, tmp_path / f"{length}.safetensors", match=f"{length}.safetensors: ")


# ---------------------------------------------------------------------------------------------------
# Pickles
# ---------------------------------------------------------------------------------------------------


class Evil:
    """Unpickled by a careless program, it makes a folder; others would do worse."""

    def __reduce__(self):
        return os.mkdir, ("EVIL",)


both_pickles = pytest.mark.parametrize("zipped", [True, False])


@both_pickles
@pytest.mark.parametrize("content", [
    Evil(),
    {"a": Evil()},
    {"state_dict": {"a": torch.ones(1)}, "b": Evil()},
], ids=["alone", "in a dict", "beside weights"])
def test_no_code_in_a_pickle_runs(tmp_path, monkeypatch, zipped, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    match = "m.bin: not a readable PyTorch file .it holds posix.mkdir; only tensors and plain values are read"
    raises_one_line(bert.read_pickle, tmp_path / "m.bin", match=match)
    assert not (tmp_path / "EVIL").exists()


@both_pickles
@pytest.mark.parametrize("content, match", [
    ({"a": torch.Tensor}, "entry 'a' is not a tensor"),
    ({"a": np.float64(1)}, r"it holds numpy\S*scalar; only tensors and plain values are read"),
    (torch.nn.Linear(2, 2), "it holds torch.nn.modules.linear.Linear; only tensors and plain values"),
], ids=["a class", "numpy", "a whole model"])
def test_a_pickle_of_other_objects_is_refused_by_their_names(tmp_path, zipped, content, match):
    torch.save(content, tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    raises_one_line(fuzz.read_state_dict, tmp_path / "m.bin", match=f"m.bin: .*{match}")


@both_pickles
def test_a_cut_pickle_is_raises_one_line(tmp_path, zipped):
    file = tmp_path / "m.bin"
    torch.save({"a": torch.randn(50)}, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    for length in (0, 1, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        raises_one_line(bert.read_pickle, file, match="m.bin: not a readable PyTorch file")


def test_one_flipped_bit_in_a_zipped_pickle_fails_its_checksum(tmp_path):
    file = tmp_path / "m.bin"
    torch.save({"a": torch.arange(1000.0)}, file)
    content = bytearray(file.read_bytes())
    content[content.index(np.arange(500, 510, dtype="<f4").tobytes())] ^= 1
    file.write_bytes(content)
    raises_one_line(bert.read_pickle, file, match="m.bin: .*fails its checksum")


def test_a_compressed_archive_is_raises_one_line(tmp_path):
    """torch maps the file and would take the compressed bytes for weights. This one is a bomb as well."""
    file = tmp_path / "m.bin"
    torch.save({"a": torch.zeros(10_000_000)}, tmp_path / "plain.bin")
    plain = zipfile.ZipFile(tmp_path / "plain.bin")
    with plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    assert file.stat().st_size < 100_000
    raises_one_line(bert.read_pickle, file, match="m.bin: .*a compressed archive")


def test_a_tensor_larger_than_its_file_is_raises_one_line(tmp_path):
    """4 bytes that are expanded to 4 terabytes, as a view."""
    file = tmp_path / "m.bin"
    torch.save({"a": torch.ones(1).expand(10**12)}, file)
    raises_one_line(fuzz.read_state_dict, file, match="m.bin: entry 'a' claims more bytes than the file has")


@pytest.mark.parametrize("tensor", [torch.ones(2, 2).to_sparse(), torch.ones(2, 2, device="meta")],
                         ids=["sparse", "meta"])
def test_a_tensor_without_plain_values_is_raises_one_line(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "m.bin")
    raises_one_line(fuzz.read_state_dict, tmp_path / "m.bin", match="m.bin: entry 'a' is sparse or has no values")


@pytest.mark.parametrize("content, match", [
    ({}, "holds a dict, not a dict of tensors"),
    ([], "holds a list, not a dict of tensors"),
    ({"state_dict": {}}, "holds a dict, not a dict of tensors"),
    ({"a": 1}, "entry 'a' is not a tensor"),
    ({1: torch.ones(1)}, "entry 1 is not a tensor"),
], ids=str)
def test_a_pickle_that_holds_no_state_dict_is_raises_one_line(tmp_path, content, match):
    torch.save(content, tmp_path / "m.bin")
    raises_one_line(fuzz.read_state_dict, tmp_path / "m.bin", match=f"m.bin: {match}")


# ---------------------------------------------------------------------------------------------------
# Sharded
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["../a.bin", "/etc/passwd", "a/b.bin", ".bin", "a.py", "", 3], ids=str)
def test_shards_lie_beside_their_index(tmp_path, shard):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    match = f"index.json: .*must name .safetensors or .bin files beside it, not {shard}"
    raises_one_line(bert.read_sharded, index, match=match)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.bin"}}))
    raises_one_line(bert.read_sharded, index, match="No such file.*gone.bin")


@pytest.mark.parametrize("content", [{}, {"weight_map": None}, {"weight_map": ["a.bin"]}], ids=str)
def test_an_index_without_a_weight_map_is_raises_one_line(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    raises_one_line(bert.read_sharded, index, match='index.json: no "weight_map"')


# ---------------------------------------------------------------------------------------------------
# TensorFlow
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("false, match", [
    ({"header": b"\x08\x01\x10\x01"}, "c.index: .*big-endian"),
    ({"dtype": 77}, "variable 'bert/a': dtype 77 is not one of 1, 2"),
    ({"dtype": 7}, "variable 'bert/a': dtype 7 is not one of 1, 2"),  # a string
    ({"more": b"\x3a\x00"}, "variable 'bert/a': partitioned"),
    ({"more": b"\x1a\x01a"}, "c.index: variable 'bert/a': "),  # the number of the data file is a text
    ({"checksum": 1}, "variable 'bert/a': fails its checksum"),
    ({"shape": (2, 4)}, "variable 'bert/a': 24 bytes cannot hold"),
    ({"shape": (2**63, 2**63 + 5)}, "variable 'bert/a': 24 bytes cannot hold"),
    ({"offset": 2**63}, "variable 'bert/a': ends at byte"),
    ({"size": 2**62}, "variable 'bert/a': ends at byte"),
    ({"header": b"\x08\x02", "more": b"\x18\x01"}, "No such file.*c.data-00001-of-00002"),
], ids=str)
def test_a_variable_that_its_index_describes_falsely_is_raises_one_line(tmp_path, false, match):
    fuzz.write_tensorflow(tmp_path / "c", {"bert/a": torch.ones(2, 3), "bert/b": torch.tensor(3)}, **false)
    raises_one_line(bert.read_tensorflow, tmp_path / "c", match=match)


def test_a_cut_data_file_is_raises_one_line(tmp_path):
    fuzz.write_tensorflow(tmp_path / "c", {"bert/a": torch.ones(2, 3)})
    file = tmp_path / "c.data-00000-of-00001"
    file.write_bytes(file.read_bytes()[:-1])
    match = "c.data-00000-of-00001: variable 'bert/a': ends at byte 24 of 23: the file is cut short"
    raises_one_line(bert.read_tensorflow, tmp_path / "c", match=match)


def test_an_index_cut_anywhere_is_raises_one_line(tmp_path):
    fuzz.write_tensorflow(tmp_path / "c", {"bert/a": torch.ones(2, 3)})
    content = (tmp_path / "c.index").read_bytes()
    for length in range(len(content)):
        (tmp_path / "c.index").write_bytes(content[:length])
        raises_one_line(bert.read_tensorflow, tmp_path / "c", match="c.index: not a TensorFlow index.*magic")


def snappy_bomb():
    """100 kB that unpack to 2 MiB of zeros: a literal of one byte, then copies of 64 from 1 back."""
    size = 2 << 20
    copies = b"\xfe\1\0" * (size // 64 - 1)
    last_copy = b"\xfa\1\0"  # 63 bytes
    return fuzz.write_varint(size) + b"\0\0" + copies + last_copy


def index_of(*blocks, **options):
    return fuzz.write_index(list(blocks), **options)


ONE_PAIR = fuzz.write_pairs([(b"", b"\x08\x01")])


@pytest.mark.parametrize("content, match", [
    (b"", "magic number"),
    (b"x" * 99, "magic number"),
    (index_of((ONE_PAIR, 0), magic="00" * 8), "magic number"),
    (b"\0" * (5 << 20), "over 2,097,152 bytes"),
    (index_of((ONE_PAIR, 2)), "a block of type 2; only 0 .raw. and 1 .snappy. are known"),
    (b"x" + index_of((ONE_PAIR, 0))[1:], "the block at byte 0 fails its checksum"),
    (index_of(), "no ''"),  # the header stands under the empty key
    (index_of((b"\xff" * 20 + bytes(4), 0)), "a number of more than ten bytes"),
    (index_of((fuzz.write_varint(2**40) + b"a", 1)), "snappy data of 1,099,511,627,776 bytes; at most"),
    (index_of((snappy_bomb(), 1)), "damaged one: "),
], ids=["empty", "no index", "other magic", "large", "type 2", "checksum", "no block", "no pairs",
        "terabyte", "bomb"])
def test_an_index_that_is_none_is_raises_one_line(tmp_path, content, match):
    (tmp_path / "c.index").write_bytes(content)
    raises_one_line(bert.read_tensorflow, tmp_path / "c", match=f"c.index: not a TensorFlow index, or .*{match}")


@pytest.mark.parametrize("content, match", [
    (b"", "cut short"),
    (b"\x80", "cut short"),
    (b"\xff" * 20, "more than ten bytes"),
    (b"\x05", "snappy gives 0 bytes of 5"),
    (b"\x05\x04ab", "snappy gives 2 bytes of 5"),
    (b"\x05\x04a", "cut short"),
    (b"\x05\x04ab\x0a\x03\0", "copies from outside"),
    (b"\x05\x04ab\x0a\0\0", "copies from outside"),
    (b"\x03\x04ab\x0a\x02\0", "longer than they say"),
    (b"\xff\xff\xff\xff\x0f\0a", "snappy data of 4,294,967,295 bytes"),
], ids=str)
def test_broken_snappy_data_are_raises_one_line(content, match):
    raises_one_line(bert.decompress_snappy, content, match=match)


# ---------------------------------------------------------------------------------------------------
# At random
# ---------------------------------------------------------------------------------------------------


def test_the_fuzzer_finds_nothing_in_a_hundred_files_of_each_format():
    program = Path(fuzz.__file__)
    done = subprocess.run([sys.executable, program, "--n", "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("refused") == 8


def test_the_fuzzer_notices_a_reader_that_crashes_and_one_that_is_deceived(tmp_path, capsys, monkeypatch):
    """The damage is always an exception here, or always overlooked."""
    monkeypatch.setattr(fuzz.tempfile, "gettempdir", lambda: str(tmp_path))
    file = tmp_path / "x"
    file.write_bytes(b"abc" * 50)

    def crash_at_damage():
        if file.read_bytes() != b"abc" * 50:
            raise KeyError("abc")

    crashing = fuzz.Target("crash", file, crash_at_damage, True, file.read_bytes())
    assert fuzz.fuzz(crashing, num_files=10, seed=1) > 5
    assert "KeyError: 'abc'" in capsys.readouterr().out

    deceived = fuzz.Target("deceived", file, file.read_bytes, True, file.read_bytes())
    assert fuzz.fuzz(deceived, num_files=10, seed=1) > 5
    unchecked = fuzz.Target("unchecked", file, file.read_bytes, False, file.read_bytes())
    assert fuzz.fuzz(unchecked, num_files=10, seed=1) == 0
