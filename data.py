"""From a URL to a batch of token ids: download and cache, tokenizer, rows of text, masked-LM corruption.

Part 1 fetches what was published, once, and checks it: what is saved or unpacked is whole, or is not there.
Part 2 builds a tokenizer from the original vocabulary files. Part 3 turns text into rows of T token ids, in a
memory-mapped file. Part 4 makes the batches of mask training: which rows, which of their tokens are hidden.

Glossary: B sequences, T tokens, V vocabulary, n rows.
"""

import codecs
import contextlib
import gzip
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path, PureWindowsPath

import numpy as np
import requests
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

try:
    import fcntl
except ImportError:  # Windows: there two processes must not fetch the same file at once
    fcntl = None

# ---------------------------------------------------------------- 1 download and cache

AGENT = "tamt/1.0 (reference implementation of task-agnostic mask training; python-requests)"
PAUSES = (1.0, 2.0, 4.0, 0.0)  # seconds after each failed try at a mirror
LARGEST, RATIO, MEMBERS = 8 * 10**9, 200, 10_000  # bytes in a file or archive; unpacked / packed; files
WEIGHTS = (".safetensors", ".bin", ".pt", ".index")
HUB, GOOGLE = "https://huggingface.co", "https://storage.googleapis.com/bert_models"
FAIRSEQ = "https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe"
AGAIN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)  # may pass
UNPINNED = (None, None)  # no size and hash were published: what the hub announces is the check
MODELS = {  # name: (hub repository, revision, {file: (bytes, sha256)}, Google's zip of the same weights)
    "bert-base": ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", {
        "config.json": (570, "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20"),
        "vocab.txt": (231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        "model.safetensors": (440449768, "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"),
    }, "2018_10_18/uncased_L-12_H-768_A-12.zip"),
    "bert-large": ("google-bert/bert-large-uncased", "main", dict.fromkeys(
        ["config.json", "vocab.txt", "model.safetensors"], UNPINNED),
        "2018_10_18/uncased_L-24_H-1024_A-16.zip"),
    "roberta-base": ("FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b", {
        "config.json": (None, "ef0185e2aae6e06c5f105a285006952c340e20c7dbf43c86ec82601b13fc45e9"),
        "vocab.json": (898823, "9e7f63c2d15d666b52e21d250d2e513b87c9b713cfa6987a82ed89e5e6e50655"),
        "merges.txt": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        "model.safetensors": (498818054, "5bde1d28afb363d0103324efeb5afc8b2b397fe5e04beabb9b1ef355255ade81"),
    }, None),
    "roberta-large": ("FacebookAI/roberta-large", "main", dict.fromkeys(
        ["config.json", "vocab.json", "merges.txt", "model.safetensors"], UNPINNED), None),
} | {f"bert-{name}": (f"google/bert_uncased_{size}", "main", dict.fromkeys(
        ["config.json", "vocab.txt", "pytorch_model.bin"], UNPINNED), f"2020_02_20/uncased_{size}.zip")
     for name, size in {"tiny": "L-2_H-128_A-2", "mini": "L-4_H-256_A-4", "small": "L-4_H-512_A-8",
                        "medium": "L-8_H-512_A-8"}.items()}
CORPORA = {  # name: (mirrors, bytes, sha256); the old S3 bucket has been dead since 2024
    "wikitext-103": ([f"{HUB}/datasets/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip",
                      "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"],
                     191984949, "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
    "wikitext-2": (["https://wikitext.smerity.com/wikitext-2-raw-v1.zip"],
                   4721645, "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11")}
GPT2_BPE = {  # file: (bytes, sha256); fairseq ships RoBERTa without them
    "encoder.json": (1042301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")}


def _folder(variable, default):
    return Path(os.path.expanduser(os.environ.get(variable) or default))


def _hub_home():
    return _folder("HF_HOME", _folder("XDG_CACHE_HOME", "~/.cache") / "huggingface")


def cache() -> Path:
    """The folder for downloads and token blocks: $TAMT_CACHE, else ~/.cache/tamt."""
    return _folder("TAMT_CACHE", "~/.cache/tamt")


def _line(error):
    """An error as one short line; of nested network errors the innermost reason."""
    inner = error.args[0] if isinstance(error, requests.RequestException) and error.args else error
    return next(iter(str(getattr(inner, "reason", inner)).strip().splitlines()), type(error).__name__)[:200]


def _wait_for(file):
    """Return when no other process holds this open file; it is ours until closed."""
    with contextlib.suppress(OSError):  # some network file systems have no locks
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)


def _pieces(path, start=0, end=None):
    """The bytes start .. end of a file, 2 MB at a time."""
    with open(path, "rb") as file:
        at, end = file.seek(start), os.path.getsize(path) if end is None else end
        while piece := file.read(min(end - at, 1 << 21)):
            at += len(piece)
            yield piece


def _sha256(pieces):
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


PARTS = f"*.{'[0-9a-f]' * 8}.part"  # what a killed program leaves of a file that it was writing


@contextlib.contextmanager
def replacing(path):
    """Yield a part path beside `path`; what is written there takes its place in one step, or not at all.

    On any failure the part goes, an old `path` stays, and trouble with the disk is an OSError naming `path`
    (torch.save calls it RuntimeError). The folder must exist: a run whose folder vanished must stop."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut could leave the new name without its bytes
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def append_line(path, content: dict):
    """Adds one line of JSON to a file that other processes may be adding to: whole, or not at all."""
    with open(path, "ab+", buffering=0) as file:
        _wait_for(file)
        end, line = file.seek(0, os.SEEK_END), f"{json.dumps(content)}\n".encode()
        file.seek(max(end - 1, 0))
        line = line if file.read(1) in (b"", b"\n") else b"\n" + line  # somebody's line was cut short
        try:
            if file.write(line) < len(line):
                raise OSError("no space left")
        except OSError as error:
            file.truncate(end)
            raise OSError(f"cannot write {path}: {_line(error)}") from error


def progress(pieces: Iterable[bytes], name: str, done: int, size: int) -> Iterator[bytes]:
    """Pass pieces through; say every 5 s, and at the end of more than a MB, how far we are and what is left.

    done: bytes that were there before; size: bytes in all, 0 if unknown."""
    before, began, shown = done, time.monotonic(), time.monotonic()
    for piece in pieces:
        yield piece
        done, now = done + len(piece), time.monotonic()
        if now - shown > 5 or done == size > 10**6:
            shown, rate = now, (done - before) / max(now - began, 1e-3)
            left = f" of {size / 1e6:.1f} MB, {(size - done) / rate:.0f} s left" if size else " MB"
            print(f"{name}: {done / 1e6:.1f}{left}, {rate / 1e6:.1f} MB/s", file=sys.stderr, flush=True)


def fetch(urls: list, path, size: int | None = None, sha256: str | None = None) -> Path:
    """Return `path`, downloaded if need be from the first of `urls` that delivers what is expected.

    The bytes gather in path.part; the next try, mirror or run continues it if a hash can tell that it fits.
    If none delivers: OSError with each URL and its error. HF_ENDPOINT replaces the hub in `urls`."""
    path, errors = Path(path), {}
    part, hand = path.with_name(f"{path.name}.part"), f"put the file at {path} by hand"
    if path.exists():
        if size and path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {size}: delete it, or {hand}")
        return path
    flags = {os.environ.get(name, "").lower() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    if flags & {"1", "on", "yes", "true"}:
        raise OSError(f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so {urls[0]} is not fetched: {hand}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / ".lock", "w") as lock:
            _wait_for(lock)
            for url in [] if path.exists() else urls:  # another process may have been faster
                for pause in PAUSES:
                    try:
                        with open(part, "ab") as file:
                            _request(url, file, size, sha256)
                        os.replace(part, path)
                        return path
                    except (requests.RequestException, ValueError) as error:  # ValueError: senseless headers
                        errors[url] = _line(error)
                        if not isinstance(error, AGAIN):
                            break
                        time.sleep(pause)
            if part.exists() and not part.stat().st_size:
                part.unlink()
    except OSError as error:  # the disk; what requests raises is an OSError, too, but ends above
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path}: {_line(error)}") from error
    if errors:
        why = "; ".join(f"{url}: {error}" for url, error in errors.items())
        raise OSError(f"cannot fetch {path.name}: {why}; {hand}")
    return path


def _request(url, file, size, sha256):
    """Complete `file` by one request, else raise `again` (another try may help) or `never` (none will)."""
    again, never = requests.ConnectionError, requests.RequestException
    (url, headers), have = _at_hub(url), file.tell()
    headers |= {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    seconds = 10, float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 30)  # to connect, between two chunks
    with requests.get(url, headers=headers, stream=True, timeout=seconds) as answer:
        code, what, got = answer.status_code, f"{answer.status_code} {answer.reason}", answer.headers
        # The hub's first, redirecting answer announces what comes: the size, and of large files the sha256.
        linked = next((a.headers for a in [*answer.history, answer] if "X-Linked-Etag" in a.headers), {})
        etag = re.search("[0-9a-f]{64}", linked.get("X-Linked-Etag", ""))
        size, sha256 = int(size or linked.get("X-Linked-Size") or 0), sha256 or (etag and etag[0])
        piece = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", got.get("Content-Range", "")) if code == 206 else None
        fits = piece and int(piece[1]) == have and (sha256 or not have)
        if code in (200, 206, 416) and not fits:  # not the continuation that we asked for: start again
            file.truncate(0)
            have = 0
        resumed, length = have > 0, int((piece[2] if piece else got.get("Content-Length")) or 0)
        packing, page = got.get("Content-Encoding", "identity"), "text/html" in got.get("Content-Type", "")
        for error, wrong, why in [
                (again, code in (408, 429) or code >= 500, what),
                (again, code in (206, 416) and not fits, f"{what}: not the range that we asked for"),
                (never, code not in (200, 206), what),
                (never, packing != "identity", f"sends {packing}, though we accept no packing"),
                (never, page and not (size or sha256), "sends an HTML page"),
                (never, size and length and length != size, f"offers {length} bytes, expected {size}")]:
            if wrong:
                raise error(why)
        size = size or length
        for chunk in progress(answer.iter_content(1 << 16), Path(file.name).stem, have, size):
            have += file.write(chunk)
            if have > (size or LARGEST):
                file.truncate(0)
                raise never(f"sends more than {size or LARGEST} bytes")
    if have < size:
        raise again(f"breaks off after {have} of {size} bytes")
    file.flush()
    os.fsync(file.fileno())
    if sha256 and (found := _sha256(_pieces(file.name))) != sha256:
        file.truncate(0)
        raise (again if resumed else never)(f"has hash {found}, expected {sha256}")


def _at_hub(url):
    """(url, headers): hub URLs move to HF_ENDPOINT and get the token, which requests drops on other hosts."""
    if not url.startswith(f"{HUB}/"):
        return url, {}
    file = _folder("HF_TOKEN_PATH", _hub_home() / "token")
    token = (os.environ.get("HF_TOKEN") or (file.read_text() if file.is_file() else "")).strip()
    return ((os.environ.get("HF_ENDPOINT") or HUB).rstrip("/") + url.removeprefix(HUB),
            {"Authorization": f"Bearer {token}"} if token else {})


def hub(repo: str, files: dict, revision: str = "main") -> Path:
    """A folder with `files` {name: (bytes, sha256)} of a hub repository, in the hub's own cache or ours."""
    theirs = _folder("HF_HUB_CACHE", _hub_home() / "hub") / f"models--{repo.replace('/', '--')}"
    ref = theirs / "refs" / revision
    folder = theirs / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    if not all((folder / file).is_file() for file in files):
        folder = cache() / "models" / f"{repo}@{revision[:7]}".replace("/", "--")
    for file, pin in files.items():
        fetch([f"{HUB}/{repo}/resolve/{revision}/{file}"], folder / file, *pin)
    return folder


def unpack(archive, folder, suffixes: tuple = ("",), limit: int = LARGEST) -> Path:
    """Unpack a .zip or .tar.gz (members with these suffixes) into `folder`, if that is not there.

    `folder` appears when complete. A ValueError names archive and member if one is no plain file, leads out
    of the folder, comes twice, or is beyond `limit` bytes, RATIO times the archive's size or MEMBERS."""
    folder, total = Path(folder), 0
    part = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.part")
    if folder.exists():
        return folder
    limit = min(limit, 10**6 + RATIO * os.path.getsize(archive))
    try:
        part.mkdir(parents=True)
        for count, (name, size, kind, read) in enumerate(_members(archive), 1):
            where, total = PureWindowsPath(name), total + size  # Windows' rules know / and \, C: and //host
            for wrong, why in [(where.anchor or ".." in where.parts, "leads out of the folder"),
                               (kind == "odd", "is a link or a device, or oddly packed"),
                               (size < 0 or total > limit, f"goes beyond the {limit} bytes that we unpack"),
                               (count > MEMBERS, f"is one of more than {MEMBERS}")]:
                if wrong:
                    raise ValueError(f"member {name!r} {why}")
            if kind == "file" and name.endswith(suffixes):
                target = part.joinpath(*where.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as file:  # x: no member may come twice
                    while piece := read(min(size, 1 << 16)):
                        size -= file.write(piece)
                    if size:
                        raise ValueError(f"member {name!r} is not as long as it says")
                    file.flush()
                    os.fsync(file.fileno())
        os.replace(part, folder)
    except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        if not folder.is_dir():  # else another process was faster
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"cannot unpack {archive} into {folder}: {_line(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _members(archive):
    """Yield (name, bytes when unpacked, "file" | "folder" | "odd", function that reads) of each member.

    A tar is read by hand, since tarfile believes what headers claim, and 10 MB of gzip can be 10 GB: for each
    member a header of 512 bytes and the content, filled up to 512; zeros end it. Headers x and g are notes
    about the next member: times, and names of over 100 characters, which stay cut."""
    kinds = {b"0": "file", b"\0": "file", b"5": "folder", b"x": "folder", b"g": "folder"}
    if next(_pieces(archive, 0, 2), b"") != b"\x1f\x8b":
        with zipfile.ZipFile(archive) as bag:
            for m in bag.infolist():
                with bag.open(m) as file:
                    yield m.filename, m.file_size, "folder" if m.is_dir() else "file", file.read
        return
    with gzip.open(archive) as file:
        while (header := file.read(512)).strip(b"\0"):
            if int(header[148:156].strip(b"\0 "), 8) != sum(header[:148] + 8 * b" " + header[156:]):
                raise ValueError("damaged between two members")
            fields = header[345:500] if header[257:263] == b"ustar\0" else b"", header[:100]
            name = "/".join(field.split(b"\0")[0].decode() for field in fields if field.strip(b"\0"))
            size, start = int(header[124:136].strip(b"\0 "), 8), file.tell()
            yield name, size, kinds.get(header[156:157], "odd"), file.read
            file.seek(start + size + -size % 512)
        if file.read(1 << 16).strip(b"\0") or file.read(1):  # at the end gzip compares its checksum
            raise ValueError("goes on after the last member")


def _holding(folder, endings):
    """The highest folder with a file that ends so; an archive may or may not have a top folder."""
    found = [p.parent for p in folder.rglob("*") if p.name.endswith(endings) and not p.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder} holds no file *{' or *'.join(endings)}")
    return min(found, key=lambda p: (len(p.parts), p))


def model_path(name_or_path) -> Path:
    """The local path of a model. Names of MODELS are found or fetched, archives are unpacked; "toy" is
    where its maker puts it. A name wins over a folder of that name: call that one ./bert-base."""
    text = os.path.expanduser(name_or_path)
    if text in MODELS:
        return _named_model(*MODELS[text])
    if text == "toy":
        return cache() / "toy" / "model"
    if os.path.isfile(text) and text.lower().endswith((".zip", ".tar.gz", ".tgz")):
        folder = cache() / "unpacked" / f"{os.path.basename(text)}-{_sha256(_pieces(text))[:16]}"
        return _holding(unpack(text, folder), WEIGHTS)
    if not os.path.exists(text) and not os.path.exists(f"{text}.index"):  # a TF prefix is no file itself
        raise ValueError(f"unknown model {text!r}: neither a path nor one of {', '.join([*MODELS, 'toy'])}")
    return Path(text)


def _named_model(repo, revision, files, archive):
    folder = cache() / "models" / Path(archive or "-").stem
    try:
        return _holding(folder, WEIGHTS) if folder.is_dir() else hub(repo, files, revision)
    except OSError as error:
        if not archive:
            raise
        try:
            zipped = fetch([f"{GOOGLE}/{archive}"], folder.with_name(f"{folder.name}.zip"))
            return _holding(unpack(zipped, folder), WEIGHTS)
        except OSError as second:
            raise OSError(f"{error}; {second}") from error


def corpus_folder(name: str) -> Path:
    """The folder with wiki.train.raw and wiki.valid.raw of a corpus in CORPORA, fetched if need be."""
    folder, (urls, size, sha256) = cache() / "corpora" / name, CORPORA[name]
    if not folder.exists():
        unpack(fetch(urls, folder.with_name(f"{name}.zip"), size, sha256), folder)
    return _holding(folder, ("wiki.train.raw",))


# ---------------------------------------------------------------- 2 tokenizer

WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BPE_SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the ids of its special tokens. by_line: symbols, each line of text is a padded row."""
    tokenizer: Tokenizer
    size: int
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    by_line: bool = False

    @property
    def specials(self) -> list[int]:
        return [self.pad, self.unk, self.cls, self.sep, self.mask]


def vocabulary(path) -> Vocabulary:
    """The tokenizer of a model folder (or of the folder a checkpoint file lies in), from its original files.

    vocab.txt -> WordPiece; vocab.json + merges.txt -> byte-level BPE; fairseq's dict.txt -> byte-level BPE if
    its symbols are GPT-2 ids, with encoder.json + vocab.bpe beside it or fetched; another dict.txt -> one
    symbol per character. Raises ValueError for damaged files, FileNotFoundError if there are none."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / "vocab.txt").is_file():
        return _wordpiece(folder / "vocab.txt", folder / "tokenizer_config.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_bpe(read_json(folder / "vocab.json"), folder / "merges.txt", folder / "vocab.json")
    if (folder / "dict.txt").is_file():
        return _fairseq(folder / "dict.txt")
    raise FileNotFoundError(f"{folder}: no vocab.txt, no vocab.json + merges.txt, no dict.txt")


def _wordpiece(file, config):
    lower = not re.search("(?<!un)cased", file.resolve().parent.name.lower())
    if config.is_file():
        lower = bool(read_json(config).get("do_lower_case", True))
    vocab = _numbered([line.rstrip("\r") for line in _read_text(file).removesuffix("\n").split("\n")], file)
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finish(tokenizer, WORDPIECE_SPECIALS, file)


def _byte_bpe(vocab, merges, source):
    if any(type(i) is not int for i in vocab.values()) or sorted(vocab.values()) != [*range(len(vocab))]:
        raise ValueError(f"{source}: ids are not 0 .. {len(vocab) - 1}, each once")
    pairs = [tuple(line.split(" ")) for line in _read_text(merges).split("\n")
             if line.strip() and not line.startswith("#version")]
    try:
        tokenizer = Tokenizer(models.BPE(vocab, pairs))
    except Exception as error:  # so the library calls a merge that is no pair of tokens
        raise ValueError(f"{merges}: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, BPE_SPECIALS, source)


def _fairseq(file):
    """fairseq numbers <s> <pad> </s> <unk>, the lines of dict.txt ("13 850314647": symbol, count), <mask>.
    In the released RoBERTa a symbol is the number that GPT-2's encoder.json gives a token: line 0 is 13,
    which is ".", so "." has id 4."""
    symbols = [line.split(" ")[0] for line in _read_text(file).split("\n") if line.strip()]
    by_line = sum(symbol.isdecimal() for symbol in symbols) <= len(symbols) // 2
    if not by_line:
        own = [file.with_name(name) for name in GPT2_BPE]
        encoder, merges = own if all(path.is_file() for path in own) else [
            fetch([f"{FAIRSEQ}/{name}"], cache() / "gpt2_bpe" / name, *pin) for name, pin in GPT2_BPE.items()]
        tokens = {str(number): token for token, number in read_json(encoder).items()}
        symbols = [tokens.get(symbol, symbol) for symbol in symbols]
    vocab = _numbered(["<s>", "<pad>", "</s>", "<unk>", *symbols, "<mask>"], file)
    if not by_line:
        return _byte_bpe(vocab, merges, file)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return _finish(tokenizer, BPE_SPECIALS, file, by_line)


def _finish(tokenizer, names, source, by_line=False):
    ids = [tokenizer.token_to_id(name) for name in names]
    if None in ids:
        raise ValueError(f"{source}: no {names[ids.index(None)]} among {tokenizer.get_vocab_size()} tokens")
    tokenizer.add_special_tokens(list(names))  # so that the text "[MASK]" is one token
    return Vocabulary(tokenizer, tokenizer.get_vocab_size(), *ids, by_line)


def _numbered(tokens, file):
    vocab = {token: i for i, token in enumerate(tokens)}
    for i, token in enumerate(tokens):
        if not token or vocab[token] != i:
            why = f"stands there twice, the second time as number {vocab[token]}" if token else "is empty"
            raise ValueError(f"{file}: token {token!r}, number {i} from 0, {why}")
    return vocab


def save_vocabulary(vocab: Vocabulary, folder, positions: int):
    """The tokenizer as files that transformers reads: vocab.txt, or vocab.json + merges.txt, and settings."""
    tokenizer, wordpiece = vocab.tokenizer, isinstance(vocab.tokenizer.model, models.WordPiece)
    tokenizer.model.save(str(folder))
    settings = {"model_max_length": positions,
                "tokenizer_class": "BertTokenizer" if wordpiece else "RobertaTokenizer"}
    if wordpiece:
        settings["do_lower_case"] = tokenizer.normalizer.lowercase
    with replacing(Path(folder) / "tokenizer_config.json") as part:
        part.write_text(json.dumps(settings, indent=1) + "\n")


def _read_text(file):
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8 text") from None


def read_json(file: Path) -> dict:
    """The object in a JSON file; a ValueError names the file if it holds anything else."""
    try:
        values = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({str(error)[:80]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return values


# ---------------------------------------------------------------- 3 text to rows of token ids


def corpus(source, vocab: Vocabulary, seq_len: int, part: str) -> np.ndarray:
    """The rows of one part ("train" or "dev") of a corpus: (n, T) mapped ids, T = seq_len with both specials.

    source: a name of CORPORA, a text file (the last 5 % of its lines are dev), or a folder of wiki.train.raw
    and wiki.valid.raw (or .tokens). The text is a stream of tokens cut into consecutive blocks, headings and
    document borders ignored, the tail dropped (released code: data/datasets/language_modeling.py). With a
    symbol vocabulary each line is one padded row instead. Cached under what made it: text, vocabulary, T.
    Raises FileNotFoundError, or ValueError if the text gives no row."""
    file, start, end = _part_of(source, part)
    made_by = json.dumps([vocab.tokenizer.to_str(), vocab.by_line, seq_len]).encode()
    cached = cache() / "blocks" / f"{_sha256(chain([made_by], _pieces(file, start, end)))[:32]}.bin"
    dtype = np.uint16 if vocab.size <= 65536 else np.uint32
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        make = _padded_lines if vocab.by_line else _blocks
        with replacing(cached) as partial, open(partial, "wb") as out:
            for rows in make(_chunks(file, start, end), vocab, seq_len):
                out.write(rows.astype(dtype).tobytes())
            if not out.tell():
                raise ValueError(f"{file}: its {part} text is shorter than one row of {seq_len} tokens")
    return np.memmap(cached, dtype, "r").reshape(-1, seq_len)


def _part_of(source, part):
    """The text file of a part and the range of its bytes."""
    path = corpus_folder(str(source)) if str(source) in CORPORA else Path(source)
    if path.is_dir():
        stem = "wiki.train" if part == "train" else "wiki.valid"
        for file in (path / f"{stem}.raw", path / f"{stem}.tokens"):
            if file.is_file():
                return file, 0, file.stat().st_size
        raise FileNotFoundError(f"{path}: no {stem}.raw or {stem}.tokens in this folder")
    if not path.is_file():
        raise FileNotFoundError(f"corpus {source}: no such file or folder; known: {', '.join(CORPORA)}, toy")
    if not (size := path.stat().st_size):
        raise ValueError(f"{path}: the file is empty")
    lines, border = 1 + sum(piece.count(b"\n") for piece in _pieces(path, 0, size - 1)), size - 1
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for _ in range(max(lines // 20, 1)):
            border = text.rfind(b"\n", 0, border)  # at last -1, if there is but one line
    return (path, 0, border + 1) if part == "train" else (path, border + 1, size)


def _chunks(file, start, end):
    """The text in pieces of about 2 MB, cut between a word and the white space after it."""
    decoder, rest, at = codecs.getincrementaldecoder("utf-8")(), "", start
    for piece in chain(progress(_pieces(file, start, end), f"tokenising {file.name}", 0, end - start), [b""]):
        try:
            rest += decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: no UTF-8 text near byte {at + error.start}") from None
        found = re.match(r"(?s).*\S(?=[ \n])", rest) if piece else None
        cut = found.end() if found else 0 if piece else len(rest)
        if not cut and len(rest) > 1 << 22:
            raise ValueError(f"{file}: no text: 4 million characters without a space near byte {at}")
        yield rest[:cut]
        rest, at = rest[cut:], at + len(piece)


# White space to GPT-2's BPE. Python's \s has U+001C to U+001F, too.
SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
GPT2_WORD = re.compile(f" ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")


def encode_text(chunks: Iterable[str], vocab: Vocabulary) -> Iterator[np.ndarray]:
    """Token ids of a long text, chunk by chunk: those of the whole, 3.9 times as fast (BPE: 2.5 times).

    Both tokenizers look at one word at a time, so each distinct word is encoded once, a thousand of them in
    one text with [SEP] in between, and looked up from then on. A word of WordPiece ends at a space, one of
    BPE begins with its space ("a  b" is "a", " ", " b"), and special tokens cut the text before all that."""
    tokenizer, wordpiece = vocab.tokenizer, isinstance(vocab.tokenizer.model, models.WordPiece)
    special = {tokenizer.id_to_token(i): np.int32(i).tobytes() for i in vocab.specials}
    border = f"({'|'.join(map(re.escape, special))})"
    sep, memo = tokenizer.id_to_token(vocab.sep), dict(special)
    for text in chunks:
        if wordpiece:
            text = text.replace("\n", " ").replace("\t", " ").replace("\r", " ")
        spans = re.split(border, text)
        words = [*chain.from_iterable(s.split(" ") if wordpiece else GPT2_WORD.findall(s) for s in spans)]
        new = [*{*words} - memo.keys()]
        groups = [new[i:i + 1000] for i in range(0, len(new), 1000)]
        texts = [sep.join([*group, ""]) for group in groups]
        for group, encoding in zip(groups, tokenizer.encode_batch_fast(texts), strict=True):
            ids, at = np.array(encoding.ids, np.int32), 0
            raw = ids.tobytes()
            for word, end in zip(group, (4 * np.flatnonzero(ids == vocab.sep)).tolist(), strict=True):
                memo[word], at = raw[at:end], end + 4
        yield np.frombuffer(b"".join(map(memo.__getitem__, words)), np.int32)
        if len(memo) > 1_000_000:  # bounds memory on text without end
            memo = dict(special)


def _blocks(chunks, vocab, seq_len):
    rest = np.empty(0, np.int32)
    for ids in encode_text(chunks, vocab):
        ids = np.concatenate([rest, ids])
        n = len(ids) // (seq_len - 2)
        rows = np.empty((n, seq_len), np.int32)
        rows[:, 0], rows[:, -1] = vocab.cls, vocab.sep
        rows[:, 1:-1] = ids[:n * (seq_len - 2)].reshape(n, seq_len - 2)
        rest = ids[n * (seq_len - 2):]
        yield rows


def _padded_lines(chunks, vocab, seq_len):
    rest = ""
    for text in chain(chunks, ["\n"]):
        *lines, rest = (rest + text).split("\n")
        lines = [line.strip()[:8 * seq_len] for line in lines if line.strip()]  # "<mask>" is one symbol
        rows = np.full((len(lines), seq_len), vocab.pad, np.int32)
        for row, encoding in zip(rows, vocab.tokenizer.encode_batch_fast(lines), strict=True):
            ids = [vocab.cls, *encoding.ids[:seq_len - 2], vocab.sep]
            row[:len(ids)] = ids
        yield rows


# ---------------------------------------------------------------- 4 batches


@lru_cache(2)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_rows(n: int, seed: int, start: int, count: int) -> np.ndarray:
    """Rows number start .. start + count - 1 of an endless reading of n rows, shuffled anew each epoch.

    A function of (seed, position) alone, so that a run can continue anywhere."""
    at = np.arange(start, start + count)
    return np.array([_epoch_order(n, seed, e)[i] for e, i in zip(at // n, at % n, strict=True)])


def corrupt(ids: np.ndarray, vocab: Vocabulary, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masked-LM corruption of ids (B, T): each token that is no special one is chosen with probability
    0.15; of the chosen, 80 % become [MASK], 10 % a uniform word of the whole vocabulary, 10 % stay.

    -> corrupted ids (B, T), chosen (B, T) bool: the positions whose original id is to be predicted."""
    chosen = (rng.random(ids.shape) < 0.15) & ~np.isin(ids, vocab.specials)
    fate = rng.random(ids.shape)
    words = rng.integers(vocab.size, size=ids.shape)
    hidden = np.where(fate < 0.8, vocab.mask, np.where(fate < 0.9, words, ids))
    return np.where(chosen, hidden, ids), chosen
