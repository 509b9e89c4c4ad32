"""From a URL to a batch of token ids: download and cache, tokenizer, rows of text, masked-LM corruption.

Part 1 fetches what was published, once, and checks it: what is saved, fetched or unpacked is whole, or is not there.
Part 2 builds a tokenizer from the original vocabulary files. Part 3 turns text into rows of T token ids, kept in a
memory-mapped file. Part 4 makes the batches of mask training: which rows, and which of their tokens are hidden.

Glossary: B sequences, T tokens, V vocabulary, n rows.
"""

import codecs
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path, PureWindowsPath

import numpy as np
import requests
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

try:
    import fcntl
except ImportError:  # Windows: two processes that want the same file both fetch it
    fcntl = None

# ---------------------------------------------------------------- 1 download and cache

AGENT = "tamt/1.0 (reference implementation of task-agnostic mask training; python-requests)"
TRIES, BACK_OFF, LONGEST_WAIT = 4, 1.0, 60.0  # tries a mirror; seconds before the second (doubling); at most
LARGEST, RATIO, MEMBERS = 8 * 10**9, 200, 10_000  # bytes of a file or archive; unpacked / packed; files
AGAIN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)  # try again
DAMAGED = (ValueError, EOFError, LookupError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile,
           tarfile.TarError, gzip.BadGzipFile, FileExistsError, NotADirectoryError)  # broken archives
WEIGHTS = (".safetensors", ".bin", ".pt", ".index")
HUB, GOOGLE = "https://huggingface.co", "https://storage.googleapis.com/bert_models"
UNPINNED = (None, None)  # no size and hash were published: the hub's announcement is the check
MODELS = {  # name: (hub repository, revision, {file: (bytes, sha256)}, Google's zip of the same weights)
    "bert-base": ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", {
        "config.json": (570, "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20"),
        "vocab.txt": (231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        "model.safetensors": (440449768, "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"),
    }, f"{GOOGLE}/2018_10_18/uncased_L-12_H-768_A-12.zip"),
    "bert-large": ("google-bert/bert-large-uncased", "main", dict.fromkeys(
        ["config.json", "vocab.txt", "model.safetensors"], UNPINNED),
        f"{GOOGLE}/2018_10_18/uncased_L-24_H-1024_A-16.zip"),
    "roberta-base": ("FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b", {
        "config.json": (None, "ef0185e2aae6e06c5f105a285006952c340e20c7dbf43c86ec82601b13fc45e9"),
        "vocab.json": (898823, "9e7f63c2d15d666b52e21d250d2e513b87c9b713cfa6987a82ed89e5e6e50655"),
        "merges.txt": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        "model.safetensors": (498818054, "5bde1d28afb363d0103324efeb5afc8b2b397fe5e04beabb9b1ef355255ade81"),
    }, None),
    "roberta-large": ("FacebookAI/roberta-large", "main", dict.fromkeys(
        ["config.json", "vocab.json", "merges.txt", "model.safetensors"], UNPINNED), None),
} | {f"bert-{name}": (f"google/bert_uncased_{size}", "main", dict.fromkeys(
        ["config.json", "vocab.txt", "pytorch_model.bin"], UNPINNED),
        f"{GOOGLE}/2020_02_20/uncased_{size}.zip")
     for name, size in [("tiny", "L-2_H-128_A-2"), ("mini", "L-4_H-256_A-4"), ("small", "L-4_H-512_A-8"),
                        ("medium", "L-8_H-512_A-8")]}
CORPORA = {  # name: (mirrors, bytes, sha256); the old S3 bucket has been dead since 2024
    "wikitext-103": ([f"{HUB}/datasets/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip",
                      "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"],
                     191984949, "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
    "wikitext-2": (["https://wikitext.smerity.com/wikitext-2-raw-v1.zip"],
                   4721645, "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11")}

GPT2_BPE = {  # file: (URL, bytes, sha256); fairseq ships RoBERTa without them
    "encoder.json": ("https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/encoder.json", 1042301,
                     "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": ("https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/vocab.bpe", 456318,
                  "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")}


def _folder(variable, default):
    return Path(os.path.expanduser(os.environ.get(variable) or default))


def _hub_home():
    return _folder("HF_HOME", _folder("XDG_CACHE_HOME", "~/.cache") / "huggingface")


def cache() -> Path:
    """The folder for downloads and token blocks: $TAMT_CACHE, else ~/.cache/tamt."""
    return _folder("TAMT_CACHE", "~/.cache/tamt")


@contextlib.contextmanager
def replacing(path):
    """Yield a part path beside `path`; what is written there takes its place in one step, or not at all.

    On any failure the part goes and an old `path` stays. Trouble with the disk is an OSError naming `path`
    (torch.save calls a full disk RuntimeError). The folder must exist: a run whose folder vanished must stop.
    """
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
    with open(path, "ab", buffering=0) as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        end, line = file.seek(0, os.SEEK_END), f"{json.dumps(content)}\n".encode()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "no space left")
        except OSError as error:
            file.truncate(end)
            raise OSError(f"cannot write {path}: {_line(error)}") from error


def _line(error):
    """An error as one short line; of nested network errors the innermost reason."""
    inner = error.args[0] if isinstance(error, requests.RequestException) and error.args else error
    return next(iter(str(getattr(inner, "reason", inner)).strip().splitlines()), type(error).__name__)[:200]


def fetch(urls: list, path, size: int | None = None, sha256: str | None = None) -> Path:
    """Return `path`, downloaded if need be from the first of `urls` that delivers what is expected.

    The bytes gather in path.part; the next try, mirror or run continues it if a hash can tell that it fits.
    If none delivers: OSError with each URL and its error. HF_ENDPOINT takes the place of the hub in `urls`.
    """
    path, errors = Path(path), []
    part = path.with_name(f"{path.name}{'' if fcntl else os.getpid()}.part")
    hand = f"put the file at {path} by hand"
    if path.exists():
        if size and path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {size}: delete it, or {hand}")
        return path
    flags = [os.environ.get(name, "").lower() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    if not {"1", "on", "yes", "true"}.isdisjoint(flags):
        raise OSError(f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so {urls[0]} is not fetched: {hand}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent), requests.Session() as session:
            session.max_redirects = 10
            for url in [] if path.exists() else urls:  # another process may have been faster
                try:
                    _deliver(session, url, part, size, sha256)
                    os.replace(part, path)
                    return path
                except (requests.RequestException, ValueError) as error:  # ValueError: headers without sense
                    errors.append(f"{url}: {_line(error)}")
            if part.exists() and not part.stat().st_size:
                part.unlink()
    except OSError as error:  # the disk; what requests raises is an OSError, too, but ends above
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path}: {_line(error)}") from error
    if errors:
        raise OSError(f"cannot fetch {path.name}: {'; '.join(errors)}; {hand}")
    return path


@contextlib.contextmanager
def _alone(folder):
    """One process at a time fetches into `folder`, the others wait here."""
    with open(folder / ".lock", "w") as file:
        with contextlib.suppress(OSError):  # a network file system without locks
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _deliver(session, url, part, size, sha256):
    """Make `part` the whole and checked content of `url`."""
    for turn in range(TRIES):
        try:
            with open(part, "ab") as file:
                return _request(session, url, file, size, sha256)
        except AGAIN as error:
            if turn == TRIES - 1:
                raise
            asked = error.response.headers.get("Retry-After", "") if error.response is not None else ""
            time.sleep(min(float(asked) if asked.isdecimal() else BACK_OFF * 2**turn, LONGEST_WAIT))


def _request(session, url, file, size, sha256):
    """One request; its failures are worth another try (`again`) or not (`never`)."""
    again, never = requests.ConnectionError, requests.RequestException
    url, headers = _at_hub(url)
    have = resumed = file.tell()
    headers |= {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    wait = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 30)
    with session.get(url, headers=headers, stream=True, timeout=(10, wait)) as answer:
        code, what, got = answer.status_code, f"{answer.status_code} {answer.reason}", answer.headers
        # The hub's first, redirecting answer announces what comes: size, and sha256 or git's hash.
        linked = next((a.headers for a in [*answer.history, answer] if "X-Linked-Etag" in a.headers), {})
        etag = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64}|[0-9a-f]{40})"?', linked.get("X-Linked-Etag", ""))
        size, sha256 = int(size or linked.get("X-Linked-Size") or 0), sha256 or (etag and etag[1])
        piece = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", got.get("Content-Range", "")) if code == 206 else None
        fits = piece and int(piece[1]) == have and (sha256 or not have)
        if code in (200, 206, 416) and not fits:  # not the continuation that we asked for: start again
            file.truncate(0)
            have = resumed = 0
        length = int((piece[2] if piece else got.get("Content-Length")) or 0)
        packing, kind = got.get("Content-Encoding", "identity"), got.get("Content-Type", "")
        for error, wrong, why in [
                (again, code in (408, 429) or code >= 500, what),
                (again, code in (206, 416) and not fits, f"{what}: not the range that we asked for"),
                (never, code not in (200, 206), what),
                (never, packing != "identity", f"sends {packing}, though we accept no packing"),
                (never, "text/html" in kind and not (size or sha256), "sends an HTML page"),
                (never, size and length and length != size, f"offers {length} bytes, expected {size}")]:
            if wrong:
                raise error(why, response=answer)
        size = size or length
        for chunk in _progress(answer.iter_content(1 << 16), Path(file.name).stem, have, size):
            have += file.write(chunk)
            if have > (size or LARGEST):
                file.truncate(0)
                raise never(f"sends more than {size or LARGEST} bytes")
    if have < size:
        raise again(f"breaks off after {have} of {size} bytes")
    file.flush()
    os.fsync(file.fileno())
    if sha256 and (found := _hash(file.name, sha256)) != sha256:
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


def _progress(chunks, name, done, size):
    """Pass `chunks` through and say how far we are: every second on a terminal, every 10 s in a log."""
    before, began, shown, terminal = done, time.monotonic(), time.monotonic(), sys.stderr.isatty()
    for chunk in chunks:
        yield chunk
        done, now = done + len(chunk), time.monotonic()
        if now - shown >= (1 if terminal else 10):
            shown, rate = now, (done - before) / (now - began) / 1e6
            left = f" of {size / 1e6:,.0f} MB, {(size - done) / 1e6 / rate:,.0f} s left" if size else " MB"
            print(f"{name}: {done / 1e6:,.0f}{left}, {rate:.1f} MB/s   ", end="\r" if terminal else "\n",
                  file=sys.stderr, flush=True)
    if terminal and shown > began:
        print(file=sys.stderr)


def _hash(path, like=64 * "0"):
    """The sha256 of a file; where `like` has 40 digits, git's hash of it."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    """Unpack a .zip, .tar or .tar.gz (members with these suffixes) into `folder`, if that is not there.

    `folder` appears when complete. A ValueError names archive and member if one is no plain file, leads out
    of the folder, comes twice, or is beyond `limit` bytes, RATIO times the archive's size or MEMBERS.
    """
    folder, total = Path(folder), 0
    part = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.part")
    if folder.exists():
        return folder
    limit = min(limit, 10**6 + RATIO * os.path.getsize(archive))
    try:
        part.mkdir(parents=True)
        for count, (name, size, plain, source) in enumerate(_members(archive), 1):
            where, total = PureWindowsPath(name), total + size  # Windows' rules know / and \, C: and //host
            for wrong, why in [(where.anchor or ".." in where.parts, "leads out of the folder"),
                               (not plain, "is a link, a device, encrypted or oddly packed"),
                               (size < 0 or total > limit, f"goes beyond the {limit} bytes that we unpack"),
                               (count > MEMBERS, f"is one of more than {MEMBERS}")]:
                if wrong:
                    raise ValueError(f"member {name!r} {why}")
            if source and name.endswith(suffixes):
                target = part.joinpath(*where.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with source() as packed, open(target, "xb") as file:  # x: no member may come twice
                    while block := packed.read(1 << 16):
                        size -= file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
                if size:
                    raise ValueError(f"member {name!r} is not as long as it says")
        os.replace(part, folder)
    except DAMAGED as error:
        raise ValueError(f"cannot unpack {archive}: {_line(error)}") from error
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            kind = ValueError if error.errno == errno.EINVAL else OSError  # a negative seek
            raise kind(f"cannot unpack {archive} into {folder}: {_line(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


class _Wary(io.BufferedReader):
    """Gives at most 64 kB at once: tarfile reads what a header claims, and 10 MB of gzip can be 10 GB."""

    def read(self, size=-1):
        if not 0 <= size <= 1 << 16:
            raise ValueError(f"a header claims {size} bytes")
        return super().read(size)


def _members(archive):
    """Yield (name, bytes when unpacked, is it a plain file or folder, function that opens the file)."""
    with open(archive, "rb") as file:
        magic = file.read(2)
    if magic == b"PK":
        with zipfile.ZipFile(archive) as bag:
            for m in bag.infolist():
                kind, method = stat.S_IFMT(m.external_attr >> 16), m.compress_type
                plain = kind in (0, stat.S_IFREG, stat.S_IFDIR) and method in (0, 8) and not m.flag_bits & 1
                plain = plain and not m.comment  # a damaged length makes one of the next members
                yield m.filename, m.file_size, plain, None if m.is_dir() else lambda m=m: bag.open(m)
        return
    with (gzip.open if magic == b"\x1f\x8b" else open)(archive, "rb") as raw, _Wary(raw) as stream, \
            tarfile.open(fileobj=stream, mode="r:") as bag:
        for m in bag:
            plain = m.isdir() or m.isreg() and not m.issparse()
            yield m.name, m.size, plain, None if m.isdir() else lambda m=m: bag.extractfile(m)
        stream.seek(bag.offset)  # tarfile takes a bad header for the end, but the end is a block of zeros
        end = stream.read(1 << 16)
        if len(end) < 512 or end.strip(b"\0") or stream.read(1):
            raise ValueError(f"broken off or damaged after {bag.offset} bytes")


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
    if os.path.isfile(text) and text.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz")):
        folder = cache() / "unpacked" / f"{os.path.basename(text)}-{_hash(text)[:16]}"
        return _holding(unpack(text, folder), WEIGHTS)
    if not os.path.exists(text) and not os.path.exists(f"{text}.index"):  # a TF prefix is no file itself
        raise ValueError(f"unknown model {text!r}: neither a path nor one of {', '.join([*MODELS, 'toy'])}")
    return Path(text)


def _named_model(repo, revision, files, archive):
    folder = cache() / "models" / os.path.basename(archive or "-").removesuffix(".zip")
    try:
        return _holding(folder, WEIGHTS) if folder.is_dir() else hub(repo, files, revision)
    except OSError as error:
        if not archive:
            raise
        try:
            return _holding(unpack(fetch([archive], folder.with_name(f"{folder.name}.zip")), folder), WEIGHTS)
        except OSError as second:
            raise OSError(f"{error}; {second}") from error


def corpus_folder(name: str) -> Path:
    """The folder with wiki.train.raw and wiki.valid.raw of a corpus in CORPORA, fetched if need be."""
    folder, (urls, size, sha256) = cache() / "corpora" / name, CORPORA[name]
    if not folder.exists():
        unpack(fetch(urls, folder.with_name(f"{name}.zip"), size, sha256), folder)
    return _holding(folder, ("wiki.train.raw",))


# ---------------------------------------------------------------- 2 tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the ids of its special tokens. `by_line`: symbols, each line of text is one padded sequence."""
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


WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BPE_SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")


def vocabulary(path) -> Vocabulary:
    """The tokenizer of a model folder (or of the folder a checkpoint file lies in), from its original files.

    vocab.txt -> WordPiece; vocab.json + merges.txt -> byte-level BPE; fairseq's dict.txt -> byte-level BPE when its
    symbols are GPT-2 ids, with encoder.json + vocab.bpe beside it or fetched; any other dict.txt -> one symbol per
    character. Raises ValueError for damaged files, FileNotFoundError if there are none."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / "vocab.txt").is_file():
        return _wordpiece(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_bpe(read_json(folder / "vocab.json"), folder / "merges.txt", folder / "vocab.json")
    if (folder / "dict.txt").is_file():
        return _fairseq(folder)
    raise FileNotFoundError(f"{folder}: no vocabulary: expected vocab.txt, or vocab.json and merges.txt, or dict.txt")


def _wordpiece(folder: Path) -> Vocabulary:
    file = folder / "vocab.txt"
    words = [word.rstrip("\r") for word in _read_text(file).split("\n")]
    vocab = _numbered(words[:-1] if words[-1] == "" else words, file)
    config = folder / "tokenizer_config.json"
    lower = read_json(config).get("do_lower_case", True) if config.is_file() else \
        not re.search(r"(?<!un)cased", folder.resolve().name.lower())
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finish(tokenizer, WORDPIECE_SPECIALS, file)


def _byte_bpe(vocab: dict, merges: Path, source: Path) -> Vocabulary:
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{source}: ids are not 0 .. {len(vocab) - 1}, each once")
    pairs = [tuple(line.split(" ")) for line in _read_text(merges).split("\n")
             if line.strip() and not line.startswith("#version")]
    try:
        tokenizer = Tokenizer(models.BPE(vocab, pairs))
    except Exception as error:  # the library raises plain Exception for a merge that is no pair of known tokens
        raise ValueError(f"{merges}: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, BPE_SPECIALS, source)


def _fairseq(folder: Path) -> Vocabulary:
    """fairseq numbers `<s> <pad> </s> <unk>`, then the lines of dict.txt ("13 850314647": symbol, count), then `<mask>`.

    In the released RoBERTa a symbol is the number that GPT-2's encoder.json gives a token: line 0 is 13, which is ".",
    so "." has id 4."""
    file = folder / "dict.txt"
    symbols = [line.split(" ")[0] for line in _read_text(file).split("\n") if line.strip()]
    digits = sum(symbol.isdigit() for symbol in symbols)
    if digits > len(symbols) // 2:
        bpe = [folder / name if (folder / name).is_file() else fetch([url], cache() / "gpt2_bpe" / name, size, sha)
               for name, (url, size, sha) in GPT2_BPE.items()]
        inverse = {number: token for token, number in read_json(bpe[0]).items()}
        symbols = [inverse.get(int(s), s) if s.isdigit() else s for s in symbols]
        return _byte_bpe(_numbered(["<s>", "<pad>", "</s>", "<unk>", *symbols, "<mask>"], file), bpe[1], file)
    vocab = _numbered(["<s>", "<pad>", "</s>", "<unk>", *symbols, "<mask>"], file)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return _finish(tokenizer, BPE_SPECIALS, file, by_line=True)


def _finish(tokenizer: Tokenizer, names: tuple, source: Path, by_line=False) -> Vocabulary:
    ids = [tokenizer.token_to_id(name) for name in names]
    if None in ids:
        raise ValueError(f"{source}: no {names[ids.index(None)]} among its {tokenizer.get_vocab_size()} tokens")
    tokenizer.add_special_tokens(list(names))  # so that the text "[MASK]" is one token
    pad, unk, cls, sep, mask = ids
    return Vocabulary(tokenizer, tokenizer.get_vocab_size(), pad, unk, cls, sep, mask, by_line)


def save_vocabulary(vocab: Vocabulary, folder, positions: int):
    """The tokenizer as files that transformers reads: vocab.txt, or vocab.json and merges.txt, and its settings."""
    tokenizer, wordpiece = vocab.tokenizer, isinstance(vocab.tokenizer.model, models.WordPiece)
    tokenizer.model.save(str(folder))
    settings = {"model_max_length": positions, "tokenizer_class": "BertTokenizer" if wordpiece else "RobertaTokenizer"}
    if wordpiece:
        settings["do_lower_case"] = tokenizer.normalizer.lowercase
    with replacing(Path(folder) / "tokenizer_config.json") as part:
        part.write_text(json.dumps(settings, indent=1) + "\n")


def _numbered(tokens: list[str], file: Path) -> dict[str, int]:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        seen = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise ValueError(f"{file}: token {twice!r} stands there twice")
    if "" in vocab:
        raise ValueError(f"{file}: line {vocab[''] + 1} is empty")
    return vocab


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8 text") from None


def read_json(file: Path) -> dict:
    try:
        values = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({str(error)[:80]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return values


# ---------------------------------------------------------------- 3 text to rows of token ids


def corpus(source, vocab: Vocabulary, seq_len: int, part: str) -> np.ndarray:
    """The rows of one part ("train" or "dev") of a corpus: (n, T) memory-mapped ids, T = seq_len with both specials.

    source: a name of CORPORA, one text file (its last 5 % of lines are dev), or a folder with wiki.train.raw and
    wiki.valid.raw (or .tokens). The whole text is one stream of tokens cut into consecutive blocks, headings and
    document borders ignored, the tail dropped (released code: data/datasets/language_modeling.py). With a symbol
    vocabulary each line is one padded row instead. Cached under what made it: text, vocabulary, T.
    Raises FileNotFoundError, or ValueError if the text gives no row."""
    file, start, end = _part_of(source, part)
    made_by = hashlib.sha256(json.dumps([vocab.tokenizer.to_str(), vocab.by_line, seq_len, start, end]).encode())
    with open(file, "rb") as text:
        while piece := text.read(1 << 24):
            made_by.update(piece)
    cached = cache() / "blocks" / f"{made_by.hexdigest()[:32]}.bin"
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


def _part_of(source, part: str) -> tuple[Path, int, int]:
    """Text file of a part and the range of its bytes."""
    path = corpus_folder(str(source)) if str(source) in CORPORA else Path(source)
    if path.is_dir():
        stem = "wiki.train" if part == "train" else "wiki.valid"
        file = next((path / f"{stem}.{end}" for end in ("raw", "tokens") if (path / f"{stem}.{end}").is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path}: no {stem}.raw or {stem}.tokens in this folder")
        return file, 0, file.stat().st_size
    if not path.is_file():
        raise FileNotFoundError(f"corpus {source}: no such file or folder; known names: {', '.join(CORPORA)}, toy")
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path}: the file is empty")
    ends = np.flatnonzero(np.memmap(path, np.uint8, "r") == ord("\n")) + 1  # where lines begin, but the first
    lines = len(ends) + (not len(ends) or ends[-1] < size)
    train = lines - max(lines // 20, 1)
    border = int(ends[train - 1]) if train else 0
    return (path, 0, border) if part == "train" else (path, border, size)


def _chunks(file: Path, start: int, end: int, size: int = 1 << 22) -> Iterator[str]:
    """The text in pieces of about 4 M characters, cut before a space between two words, with a progress line."""
    decoder, rest, began = codecs.getincrementaldecoder("utf-8")(), "", time.time()
    with open(file, "rb") as source:
        source.seek(start)
        for at in range(start, end, size):
            try:
                rest += decoder.decode(source.read(min(size, end - at)), final=at + size >= end)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: no UTF-8 text near byte {at + error.start}") from None
            last = re.search(r"(?s).*\S(?= \S)", rest)
            cut = len(rest) if at + size >= end else last.end() if last else 0
            yield rest[:cut]
            rest, done = rest[cut:], min(at + size, end) - start
            if time.time() - began > 5 or done + start >= end > start + size:
                rate = done / (time.time() - began)
                print(f"tokenising {file.name}: {done / 1e6:.0f} of {(end - start) / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s,"
                      f" {(end - start - done) / rate:.0f} s left", file=sys.stderr)


# White space as the tokenizers see it: Python's \s has U+001C to U+001F, too, which are no white space to GPT-2's BPE.
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
GPT2_PIECE = re.compile(f" ?[^{SPACES}]+|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+")


def encode_text(chunks: Iterator[str], vocab: Vocabulary) -> Iterator[np.ndarray]:
    """Token ids of a long text, chunk by chunk: equal to encoding it whole, MEMO_GAIN.

    Both tokenizers look at one word at a time, so each distinct word is encoded once and looked up from then on.
    A word of WordPiece ends at a space; a word of GPT-2's BPE begins with its space: "a  b" is "a", " ", " b"."""
    memo: dict[str, list[int]] = {}
    wordpiece = isinstance(vocab.tokenizer.model, models.WordPiece)
    for text in chunks:
        words = re.split("[ \t\n\r]", text) if wordpiece else GPT2_PIECE.findall(text)
        new = list({*words} - memo.keys())
        for word, found in zip(new, vocab.tokenizer.encode_batch_fast(new, add_special_tokens=False), strict=True):
            memo[word] = found.ids
        yield np.fromiter(chain.from_iterable(map(memo.__getitem__, words)), np.int32)
        if len(memo) > 2_000_000:  # bounds memory on text without end
            memo.clear()


def _blocks(chunks: Iterator[str], vocab: Vocabulary, seq_len: int) -> Iterator[np.ndarray]:
    rest = np.empty(0, np.int32)
    for ids in encode_text(chunks, vocab):
        ids = np.concatenate([rest, ids])
        n = len(ids) // (seq_len - 2)
        rows = np.empty((n, seq_len), np.int32)
        rows[:, 0], rows[:, -1] = vocab.cls, vocab.sep
        rows[:, 1:-1], rest = ids[:n * (seq_len - 2)].reshape(n, -1), ids[n * (seq_len - 2):]
        yield rows


def _padded_lines(chunks: Iterator[str], vocab: Vocabulary, seq_len: int) -> Iterator[np.ndarray]:
    lines = [line.strip() for line in "".join(chunks).split("\n")]
    lines = [line for line in lines if line]
    rows = np.full((len(lines), seq_len), vocab.pad, np.int32)
    for row, found in zip(rows, vocab.tokenizer.encode_batch_fast(lines, add_special_tokens=False), strict=True):
        ids = [vocab.cls, *found.ids[:seq_len - 2], vocab.sep]
        row[:len(ids)] = ids
    yield rows


# ---------------------------------------------------------------- 4 batches


@lru_cache(2)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_rows(n: int, seed: int, start: int, count: int) -> np.ndarray:
    """Which rows are number start .. start + count - 1 of an endless reading of n rows, shuffled anew each epoch.

    A function of (seed, position) alone, so that a run can continue anywhere."""
    at = np.arange(start, start + count)
    return np.array([_epoch_order(n, seed, e)[i] for e, i in zip(at // n, at % n, strict=True)])


def corrupt(ids: np.ndarray, vocab: Vocabulary, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masked-LM corruption of ids (B, T): each token that is no special one is chosen with probability 0.15;
    of the chosen, 80 % become [MASK], 10 % a uniform word of the whole vocabulary, 10 % stay as they are.

    -> corrupted ids (B, T), chosen (B, T) bool: the positions whose original id is to be predicted."""
    chosen = (rng.random(ids.shape) < 0.15) & ~np.isin(ids, vocab.specials)
    fate = rng.random(ids.shape)
    words = rng.integers(vocab.size, size=ids.shape)
    hidden = np.where(fate < 0.8, vocab.mask, np.where(fate < 0.9, words, ids))
    return np.where(chosen, hidden, ids), chosen
