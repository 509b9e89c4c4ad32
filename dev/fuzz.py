"""Damaged checkpoint files load as they were written, or are refused in one readable line.

    python dev/fuzz.py [--n 2000] [--seed 1]        n damaged files of each format

A failure is any exception other than ValueError and OSError, a message of several lines, more than ten
seconds, or other content where a checksum covers the file. The file that failed is kept and named, and
the exit status is 1.

    1. The damage
    2. TensorFlow checkpoints, written by hand; the tests use them, too
    3. The files
    4. The verdict
"""

import argparse
import contextlib
import io
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bert  # noqa: E402

# ---------------------------------------------------------------------------------------------------
# 1. The damage
# ---------------------------------------------------------------------------------------------------

# Numbers at the edges of the types that file formats use for sizes and offsets.
EXTREMES = (0, 1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def damage(content: bytes, rng: random.Random) -> bytes:
    """One to five random edits, mostly one."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        edit = rng.choice((flip_bit, cut, remove, swap, write_extreme, insert, overwrite))
        edit(content, random_position(content, rng), rng)
    return bytes(content)


def random_position(content: bytearray, rng: random.Random) -> int:
    """Anywhere, or near one of the ends, where headers, directories and footers lie."""
    size = len(content)
    distance = rng.randint(0, min(size, 512))
    return rng.choice((rng.randint(0, size), distance, size - distance))


def flip_bit(content, position, rng):
    if position < len(content):
        content[position] ^= 1 << rng.randrange(8)


def cut(content, position, rng):
    del content[position:]


def remove(content, position, rng):
    del content[position:position + rng.choice((1, 2, 4, 8))]


def swap(content, position, rng):
    length = rng.choice((1, 2, 4, 8))
    other = rng.randint(0, len(content))
    here = bytes(content[position:position + length])
    there = bytes(content[other:other + length])
    content[position:position + length] = there
    content[other:other + length] = here


def write_extreme(content, position, rng):
    length = rng.choice((1, 2, 4, 8))
    content[position:position + length] = struct.pack("<Q", rng.choice(EXTREMES))[:length]


def insert(content, position, rng):
    content[position:position] = rng.randbytes(rng.choice((1, 2, 4, 8)))


def overwrite(content, position, rng):
    length = rng.choice((1, 2, 4, 8))
    content[position:position + length] = rng.randbytes(length)


# ---------------------------------------------------------------------------------------------------
# 2. TensorFlow checkpoints, written by hand. bert.py draws the format.
# ---------------------------------------------------------------------------------------------------

TENSORFLOW_CODES = {torch.float32: 1, torch.int64: 9}


def write_tensorflow(prefix, tensors: dict, snappy=False, header=b"\x08\x01", **false) -> bytes:
    """Writes prefix.index and prefix.data-00000-of-00001, and returns the data block of the index.

    false: what the entries shall say instead of the truth, of dtype, shape, offset, size, checksum; and
    `more`, the bytes of further fields. header: the protocol buffer under the empty key."""
    data = b""
    pairs = [(b"", header)]
    for name, tensor in sorted(tensors.items()):
        content = tensor.contiguous().numpy().tobytes()
        entry = {
            "dtype": TENSORFLOW_CODES[tensor.dtype],
            "shape": tensor.shape,
            "offset": len(data),
            "size": len(content),
            "checksum": bert.masked_crc32c(content),
            "more": b"",
        }
        pairs.append((name.encode(), write_entry(**entry | false)))
        data += content

    block = write_pairs(pairs)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    if snappy:
        Path(f"{prefix}.index").write_bytes(write_index([(compress_snappy(block), 1)]))
    else:
        Path(f"{prefix}.index").write_bytes(write_index([(block, 0)]))
    return block


def write_entry(dtype, shape, offset, size, checksum, more) -> bytes:
    """The protocol buffer of a variable. The first byte of each field is 8 * field number + type."""
    dimensions = b""
    for length in shape:
        dimension = b"\x08" + write_varint(length)
        dimensions += b"\x12" + write_varint(len(dimension)) + dimension
    entry = b"\x08" + write_varint(dtype)
    entry += b"\x12" + write_varint(len(dimensions)) + dimensions
    entry += b"\x20" + write_varint(offset)
    entry += b"\x28" + write_varint(size)
    entry += b"\x35" + struct.pack("<I", checksum)
    return entry + more


def write_index(blocks, magic: str = "57fb808b247547db") -> bytes:
    """[(body, type)] -> an index file with these data blocks, each with a correct checksum."""
    content = b""
    handles = []
    for body, block_type in [*blocks, (write_pairs([]), 0)]:  # the last one is the empty metaindex
        handles.append(write_varint(len(content)) + write_varint(len(body)))
        content += close_block(body, block_type)
    metaindex_handle = handles.pop()

    index = write_pairs([(b"z%03d" % number, handle) for number, handle in enumerate(handles)])
    index_handle = write_varint(len(content)) + write_varint(len(index))
    content += close_block(index, 0)
    footer = (metaindex_handle + index_handle).ljust(40, b"\0")
    return content + footer + bytes.fromhex(magic)


def close_block(body: bytes, block_type: int) -> bytes:
    body += bytes([block_type])
    return body + struct.pack("<I", bert.masked_crc32c(body))


def write_pairs(pairs) -> bytes:
    """The body of a block: pairs that share nothing with the key before, and one restart point."""
    body = b""
    for key, value in pairs:
        body += write_varint(0) + write_varint(len(key)) + write_varint(len(value)) + key + value
    return body + struct.pack("<II", 0, 1)


def write_varint(number: int) -> bytes:
    content = b""
    while number >= 128:
        content += bytes([number & 0x7F | 0x80])
        number >>= 7
    return content + bytes([number])


def compress_snappy(content: bytes) -> bytes:
    """No compression at all: literals of up to 60 bytes, whose tag is 4 * (length - 1)."""
    compressed = write_varint(len(content))
    for begin in range(0, len(content), 60):
        literal = content[begin:begin + 60]
        compressed += bytes([4 * (len(literal) - 1)]) + literal
    return compressed


# ---------------------------------------------------------------------------------------------------
# 3. The files
# ---------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """A file to damage and the reader that has to stand it.

    content: the bytes that get damaged; finish: what is done to them before they are written."""
    name: str
    file: Path
    read: Callable
    has_checksum: bool
    content: bytes
    finish: Callable = lambda content, rng: content


def make_targets(folder: Path) -> list[Target]:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(9, 7),
        "b": torch.arange(5),
        "c": torch.tensor(1.5),
        "d": torch.randn(300),
    }
    targets = []

    def add(name, file, read, has_checksum):
        targets.append(Target(name, file, read, has_checksum, file.read_bytes()))

    safetensors = folder / "model.safetensors"
    bert.write_safetensors(safetensors, tensors)
    add("safetensors", safetensors, lambda: bert.read_safetensors(safetensors), has_checksum=False)

    zipped = folder / "zipped.bin"
    torch.save(tensors, zipped)
    add("zip", zipped, lambda: read_state_dict(zipped), has_checksum=True)

    legacy = folder / "legacy.bin"
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    add("legacy", legacy, lambda: read_state_dict(legacy), has_checksum=False)

    plain = folder / "plain"
    block = write_tensorflow(plain, tensors)
    for kind, suffix in (("index", "index"), ("data", "data-00000-of-00001")):
        file = folder / f"plain.{suffix}"
        add(f"tf-{kind}", file, lambda: bert.read_tensorflow(plain), has_checksum=True)

    snappy = folder / "snappy"
    write_tensorflow(snappy, tensors, snappy=True)
    add("tf-snappy", folder / "snappy.index", lambda: bert.read_tensorflow(snappy), has_checksum=True)

    # The checksum of the block is made right again, so that the damage reaches the parser behind it.
    crafted = folder / "crafted"
    write_tensorflow(crafted, tensors)
    targets.append(Target(
        name="tf-crafted",
        file=folder / "crafted.index",
        read=lambda: bert.read_tensorflow(crafted),
        has_checksum=False,
        content=block,
        finish=lambda content, rng: write_index([(content, int(rng.random() < 0.2))]),
    ))

    model = bert.Model(bert.Config(16, 8, 1, 2, 8, 16))
    bert.save(folder / "model", model.config, model.state_dict(), "ForMaskedLM")
    config = folder / "model" / "config.json"
    add("config.json", config, lambda: bert.load(folder / "model").config, has_checksum=False)
    return targets


def read_state_dict(file: Path) -> dict:
    return bert.find_state_dict(bert.read_pickle(file), file)


# ---------------------------------------------------------------------------------------------------
# 4. The verdict
# ---------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception, so that no reader can take it for damage."""


def on_alarm(signal_number, frame):
    raise Hang("more than 10 s")


def outcome(read: Callable, expected) -> str:
    """ "right", "refused" or "changed"; anything else is what went wrong. """
    signal.alarm(10)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = read()
        return "right" if same(found, expected) else "changed"
    except (ValueError, OSError) as error:
        message = str(error)
        if "\n" in message or len(message) > 2000:
            return f"a message that is no line: {message}"
        return "refused"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def same(found, expected) -> bool:
    if not isinstance(expected, dict):
        return found == expected
    if found.keys() != expected.keys():
        return False
    return all(found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
               for name in expected)


def copy_of(content):
    """The tensors of a mapped file would change with the file."""
    if isinstance(content, dict):
        return {name: tensor.clone() for name, tensor in content.items()}
    return content


def fuzz(target: Target, num_files: int, seed: int) -> int:
    """Damages one file in many ways, prints one line about it, and returns the number of failures."""
    rng = random.Random(f"{seed} {target.name}")
    original = target.file.read_bytes()
    expected = copy_of(target.read())
    counts = Counter()
    slowest = 0.0
    num_failures = 0
    for number in range(num_files):
        content = target.finish(damage(target.content, rng), rng)
        target.file.unlink()  # tensors of the last round may still be mapped
        target.file.write_bytes(content)

        began = time.time()
        verdict = outcome(target.read, expected)
        slowest = max(slowest, time.time() - began)
        counts[verdict] += 1

        changed_in_silence = verdict == "changed" and target.has_checksum
        if changed_in_silence or verdict not in ("right", "refused", "changed"):
            num_failures += 1
            evidence = Path(tempfile.gettempdir()) / f"fuzz-{target.name}-{number}"
            evidence.write_bytes(content)
            print(f"FAILURE {evidence}: {verdict:.300}")

    target.file.unlink()
    target.file.write_bytes(original)
    line = f"{target.name:12}"
    for verdict in ("right", "refused", "changed"):
        line += f"{counts[verdict]:7} {verdict}"
    print(f"{line}   slowest {slowest * 1000:.0f} ms", flush=True)
    return num_failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=2000, help="damaged files per format")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, on_alarm)
    folder = Path(tempfile.mkdtemp())
    num_failures = 0
    for target in make_targets(folder):
        num_failures += fuzz(target, args.n, args.seed)
    shutil.rmtree(folder)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"peak memory {peak:.0f} MB")
    sys.exit(num_failures > 0)


if __name__ == "__main__":
    main()
