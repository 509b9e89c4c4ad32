"""Damaged files load as they were written or are refused: python dev/fuzz.py [--n 2000] [--seed 1]

Damage: flipped bits, cuts, inserted, removed and swapped bytes, extreme numbers. "tf-crafted" makes checksums
right again, so that the damage reaches the parser. Exit status 1, with the file kept: any other exception,
a message of several lines, more than 10 s, or changed content despite a checksum."""
import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bert  # noqa: E402
import data  # noqa: E402
import glue_squad  # noqa: E402
import tamt  # noqa: E402

CHECKED = ("zip", "tf-index", "tf-data", "tf-snappy", "mask.pt")
EXTREMES = (0, 1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


class Hang(BaseException):
    """Not an Exception, so that no reader can take it for damage."""


def damaged(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        size, n, kind = len(content), rng.choice((1, 2, 4, 8)), rng.randrange(7)
        edge = rng.randint(0, min(size, 512))  # headers, directories and footers lie at the ends
        at, other = rng.choice((rng.randint(0, size), edge, size - edge)), rng.randint(0, size)
        there = slice(at, at + n)
        if kind == 0 and at < size:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[there]
        elif kind == 3:
            content[there], content[other:other + n] = content[other:other + n], content[there]
        elif kind == 4:
            content[there] = struct.pack("<Q", rng.choice(EXTREMES))[:n]
        else:
            content[at:at + n * (kind - 5)] = rng.randbytes(n)  # inserted, or in place of others
    return bytes(content)


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def entries(pairs) -> bytes:
    body = (varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
    return b"".join(body) + struct.pack("<II", 0, 1)


def table(blocks, magic="57fb808b247547db") -> bytes:
    """[(body, type)] -> a TensorFlow index file with these data blocks."""
    out, handles = b"", []

    def add(body, kind=0):
        nonlocal out
        handles.append(varint(len(out)) + varint(len(body)))
        out += body + bytes([kind]) + struct.pack("<I", bert.masked_crc32c(body + bytes([kind])))
    for body, kind in [*blocks, (entries([]), 0)]:
        add(body, kind)
    add(entries([(b"z%03d" % i, handle) for i, handle in enumerate(handles[:-1])]))
    return out + b"".join(handles[-2:]).ljust(40, b"\0") + bytes.fromhex(magic)


def tensorflow(prefix, tensors: dict, packed=False, header=b"\x08\x01", **edits) -> bytes:
    """Writes a checkpoint, where edits falsify dtype, shape, offset, size, crc, more -> its data block."""
    raw, pairs = b"", [(b"", header)]
    for name, t in sorted(tensors.items()):
        own = t.numpy().tobytes()
        said = {"dtype": {torch.float32: 1, torch.int64: 9}[t.dtype], "shape": t.shape, "offset": len(raw),
                "size": len(own), "crc": bert.masked_crc32c(own), "more": b""} | edits
        dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in said["shape"]))
        value = b"\x08" + varint(said["dtype"]) + b"\x12" + varint(len(dims)) + dims
        value += b"\x20" + varint(said["offset"]) + b"\x28" + varint(said["size"])
        value += b"\x35" + struct.pack("<I", said["crc"]) + said["more"]
        pairs.append((name.encode(), value))
        raw += own
    body = entries(pairs)
    if packed:  # snappy, as literals of up to 60 bytes
        parts = (body[i:i + 60] for i in range(0, len(body), 60))
        body = varint(len(body)) + b"".join(bytes([len(part) - 1 << 2]) + part for part in parts)
    Path(f"{prefix}.index").write_bytes(table([(body, int(packed))]))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(raw)
    return body


def formats(folder: Path) -> dict:
    """{name: (file to damage, how to read it)}"""
    tensors = {"a": torch.randn(9, 7), "b": torch.arange(5), "c": torch.tensor(1.5), "d": torch.randn(300)}
    names = "safetensors zip legacy tf snappy crafted mask.pt squad.json"
    at = {name: folder / name for name in names.split()}
    bert.write_safetensors(at["safetensors"], tensors)
    torch.save(tensors, at["zip"])
    torch.save(tensors, at["legacy"], _use_new_zipfile_serialization=False)
    tensorflow(at["tf"], tensors)
    block = tensorflow(at["crafted"], tensors)
    tensorflow(at["snappy"], tensors, packed=True)
    tamt.save_mask(at["mask.pt"], {"bert.x.weight": torch.rand(9, 7) > 0.5}, {"seed": 1})
    for kind in ("bert", "roberta", "SST-2"):
        (folder / kind).mkdir()
    (folder / "SST-2/train.tsv").write_text("sentence\tlabel\n" + "a \u2028 \"film\t1\nbad \u00e9\t0\n" * 9)
    answer = {"text": "Rome", "answer_start": 8}
    question = {"id": "q", "question": "Where?", "answers": [answer]}
    article = {"paragraphs": [{"context": "Bob, in Rome", "qas": [question]}]}
    at["squad.json"].write_text(json.dumps({"version": "1.1", "data": [article]}))
    tokens = [*data.BPE_SPECIALS, *"abc", "ab"]
    words = [*data.WORDPIECE_SPECIALS, *"abcdefgh", "##a", "\u00e9t\u00e9"]
    (folder / "bert/vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "roberta/vocab.json").write_text(json.dumps({w: i for i, w in enumerate(tokens)}))
    (folder / "roberta/merges.txt").write_text("#version: 0.2\na b\n")
    model = bert.Model(bert.Config(len(words), 8, 1, 2, 8, 16))
    bert.save(folder / "bert", model.config, model.state_dict(), "ForMaskedLM")

    def tensorflow_of(name):
        return lambda: bert.read_tensorflow(at[name])

    def pickle_of(name):
        return lambda: bert.state_dict(bert.read_pickle(at[name]), at[name])

    def vocabulary_of(kind):
        return lambda: data.vocabulary(folder / kind).tokenizer.to_str()
    (folder / "block").write_bytes(block)
    return {"safetensors": (at["safetensors"], lambda: bert.read_safetensors(at["safetensors"])),
            "zip": (at["zip"], pickle_of("zip")), "legacy": (at["legacy"], pickle_of("legacy")),
            "tf-index": (folder / "tf.index", tensorflow_of("tf")),
            "tf-data": (folder / "tf.data-00000-of-00001", tensorflow_of("tf")),
            "tf-snappy": (folder / "snappy.index", tensorflow_of("snappy")),
            "tf-crafted": (folder / "crafted.index", tensorflow_of("crafted")),
            "mask.pt": (at["mask.pt"], lambda: tamt.load_mask(at["mask.pt"])),
            "glue": (folder / "SST-2/train.tsv", lambda: glue_squad.load_glue("sst2", "train", folder)),
            "squad": (at["squad.json"], lambda: glue_squad.load_squad(at["squad.json"])),
            "vocab.txt": (folder / "bert/vocab.txt", vocabulary_of("bert")),
            "vocab.json": (folder / "roberta/vocab.json", vocabulary_of("roberta")),
            "config.json": (folder / "bert/config.json", lambda: bert.load(folder / "bert").config)}


def same(a, b) -> bool:
    if not isinstance(b, dict):
        return a == b
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)


def outcome(read, good) -> str:
    signal.alarm(10)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "right" if same(read(), good) else "changed"
    except (ValueError, OSError) as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"a long message: {error}"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def on_alarm(*_):
    raise Hang("more than 10 s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=2000, help="damaged files per format")
    parser.add_argument("--seed", type=int, default=1)
    args, failures, folder = parser.parse_args(), 0, Path(tempfile.mkdtemp())
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, on_alarm)
    torch.manual_seed(0)
    for kind, (path, read) in formats(folder).items():
        checked, crafted = kind in CHECKED, kind == "tf-crafted"
        rng, slowest, counts, whole = random.Random(f"{args.seed} {kind}"), 0.0, {}, path.read_bytes()
        block = (folder / "block").read_bytes()
        good = {n: t.clone() for n, t in read().items()} if isinstance(read(), dict) else read()
        for i in range(args.n):
            content, began = damaged(block if crafted else whole, rng), time.time()
            content = table([(content, int(rng.random() < 0.2))]) if crafted else content
            path.unlink()  # a mapped file must keep its bytes
            path.write_bytes(content)
            found = outcome(read, good)
            slowest, counts[found] = max(slowest, time.time() - began), counts.get(found, 0) + 1
            if found not in ("right", "refused", "changed") or found == "changed" and checked:
                failures += 1
                kept = Path(tempfile.gettempdir()) / f"fuzz-{kind}-{i}"
                kept.write_bytes(content)
                print(f"FAILURE {kept}: {found:.300}")
        path.write_bytes(whole)
        print(f"{kind:12}", *(f"{counts.get(what, 0):6} {what}" for what in ("right", "refused", "changed")),
              f"  slowest {slowest * 1000:.0f} ms, {'checksum' if checked else 'no checksum'}", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MB")
    shutil.rmtree(folder)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
