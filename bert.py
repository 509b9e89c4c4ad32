"""BERT and RoBERTa as their papers draw them, and their original checkpoint files, in and out.

Read it beside "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al. 2019), section 3.
Part 1 is the network: embeddings, L layers of attention and feed-forward, heads (masked LM, class, span).
Part 2 reads what was published: Hugging Face folders, Google's TensorFlow checkpoints, fairseq's model.pt.
Module names are checkpoint names (bert.encoder.layer.0.attention.self.query): Hugging Face files need no map.

Glossary: B sequences, T tokens, D hidden, H heads, F feed-forward, L layers, V vocabulary, C labels.
`keep` is True at real tokens and False at padding.
"""

import argparse
import io
import json
import math
import os
import pickletools
import re
import zipfile
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- 1 the network


@dataclass(frozen=True)
class Config:
    """Sizes of a model under the names of config.json. Fields without a default must be in the file."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    model_type: str = "bert"
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    @property
    def positions(self) -> int:
        """Longest sequence in tokens. RoBERTa's table starts at row pad + 1: 514 rows serve 512 tokens."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.model_type == "roberta" else 0)


class Dropout(nn.Dropout):
    """On a CPU torch draws a whole random number per entry; 16 random bits do, in a third of the time."""

    def forward(self, x):
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        return (x * (1 / (1 - self.p))).mul_(self.draw(x.shape))

    def draw(self, shape):  # -> uint8, 1 where an entry stays; bool would be slow here and in the product
        bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        keep = torch.empty(shape, dtype=torch.uint8)
        return torch.ge(bits[:shape.numel()].view(shape), round(2**16 * self.p) - 2**15, out=keep)


class Embeddings(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size, padding_idx=c.pad_token_id)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.drop, self.config = Dropout(c.hidden_dropout_prob), c

    def forward(self, ids, segments):  # (B, T), (B, T) or None -> (B, T, D)
        c = self.config
        if c.model_type == "roberta":
            # Positions count real tokens from pad + 1 on, and padding sits at row pad (= 1):
            #   ids        <s>  The  cat  </s>  <pad>  <pad>
            #   positions   2    3    4    5      1      1
            real = ids != c.pad_token_id
            positions = real.cumsum(1) * real + c.pad_token_id  # (B, T)
        else:
            positions = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        kinds = self.token_type_embeddings
        kinds = kinds.weight[0] if segments is None else kinds(segments)  # (D,) or (B, T, D)
        x = self.word_embeddings(ids) + kinds + self.position_embeddings(positions)
        return self.drop(self.LayerNorm(x))


class Layer(nn.Module):
    """Multi-head attention, then a feed-forward network; after each, dropout, residual, LayerNorm (Eq. 1).

    Heads are counted from the rows of the query matrix, and `intermediate` may be None: a structured ticket
    (finetune.py) takes out heads and whole feed-forward networks; LayerNorm then acts on the residual."""

    def __init__(self, c: Config):
        super().__init__()
        D, inner, eps = c.hidden_size, c.intermediate_size, c.layer_norm_eps
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(D, D) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": nn.Linear(D, D), "LayerNorm": nn.LayerNorm(D, eps)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, D), "LayerNorm": nn.LayerNorm(D, eps)})
        self.head_size = D // c.num_attention_heads
        self.drop = Dropout(c.hidden_dropout_prob)
        self.drop_attention = Dropout(c.attention_probs_dropout_prob)

    def attend(self, x, keep):  # (B, T, D), (B, 1, 1, T) bool or None -> (B, T, H * head size)
        B, T, _ = x.shape
        q, k, v = (self.attention["self"][name](x).view(B, T, -1, self.head_size).transpose(1, 2)
                   for name in ("query", "key", "value"))  # each (B, H, T, head size)
        p = self.drop_attention.p if self.training else 0.0
        attend = self.by_pieces if p and x.device.type == "cpu" else F.scaled_dot_product_attention
        return attend(q, k, v, keep, p).transpose(1, 2).flatten(2)

    def by_pieces(self, q, k, v, keep, p):  # (B, H, T, head size) .. -> the same; for a CPU
        """softmax(q k^T / sqrt(head size)) v with dropout. As many sequences at a time as the cache holds
        take half the time at T = 512. (torch's own is fast only without dropout.)"""
        size = max(1, 2**20 // (q[0, :, :, 0].numel() * q.shape[2]))  # 4 MB of attention weights
        keeps = keep.split(size) if keep is not None else [None] * len(q)
        parts = zip(q.split(size), k.split(size), v.split(size), keeps, strict=False)
        return torch.cat([self.piece(*part, p) for part in parts])

    def piece(self, q, k, v, keep, p):
        q, v = q * self.head_size**-0.5, v * (1 / (1 - p))
        weights = q @ k.mT
        weights = (weights if keep is None else weights.masked_fill_(~keep, -math.inf)).softmax(-1)
        stays = self.drop_attention.draw(weights.shape)
        dropped = weights * stays
        with remade(dropped, lambda: weights * stays):
            return dropped @ v

    def forward(self, x, keep):  # (B, T, D), (B, 1, 1, T) bool or None -> (B, T, D)
        sub = self.attention["output"]
        x = sub["LayerNorm"](x + self.drop(sub["dense"](self.attend(x, keep))))
        if self.intermediate is None:
            return self.output["LayerNorm"](x)
        a = self.intermediate["dense"](x)  # (B, T, F)
        h = F.gelu(a)  # exact, with erf
        with remade(h, lambda: F.gelu(a)):
            h = self.output["dense"](h)
        return self.output["LayerNorm"](x + self.drop(h))


class Base(nn.Module):
    """Everything below the heads; called `bert` or `roberta` in checkpoints."""

    def __init__(self, c: Config, pooler: bool):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))})
        if pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, c.hidden_size)})

    def forward(self, ids, keep, segments):  # (B, T), 2 x (B, T) or None -> L + 1 times (B, T, D)
        hidden = [self.embeddings(ids, segments)]
        keep = None if keep is None else keep.bool()[:, None, None, :]  # (B, 1, 1, T): all see the real
        for layer in self.encoder["layer"]:
            hidden.append(layer(hidden[-1], keep))
        return hidden


class MlmHead(nn.Module):
    """Dense, GELU, LayerNorm, then one logit a word from the decoder: the word embeddings, unless untied."""

    def __init__(self, c: Config):
        super().__init__()
        dense, norm = nn.Linear(c.hidden_size, c.hidden_size), nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        if c.model_type == "roberta":
            self.dense, self.layer_norm = dense, norm
        else:
            self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.decoder = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, hidden, words):  # (.., D), (V, D) -> (.., V)
        dense, norm = (self.dense, self.layer_norm) if hasattr(self, "dense") else self.transform.values()
        words = words if self.decoder is None else self.decoder.weight
        return linear_in_pieces(norm(F.gelu(dense(hidden))), words, self.bias)


def linear_in_pieces(x, W, b, size=1024):
    """F.linear. MKL is slow on a product as wide as the vocabulary: on a CPU, W's rows in pieces take 0.7 of
    its time, and the MLM step of a 4-layer model 0.95."""
    if x.device.type != "cpu":
        return F.linear(x, W, b)
    pieces = zip(W.split(size), b.split(size), strict=True)
    return torch.cat([F.linear(x, w, c) for w, c in pieces], -1)


class Model(nn.Module):
    """An encoder with the parts that a checkpoint held or that a caller asked for."""

    def __init__(self, config: Config, pooler: bool = True, mlm: bool = True):
        super().__init__()
        self.config, self.drop = config, Dropout(config.hidden_dropout_prob)
        self.add_module(config.model_type, Base(config, pooler))
        if mlm:
            self.new_head("mlm")
        self.apply(self._fresh)

    def _fresh(self, module):
        """BERT's initialisation: weights N(0, 0.02), biases 0; LayerNorm is born as 1 and 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def base(self) -> Base:
        return getattr(self, self.config.model_type)

    def has(self, part: str) -> bool:
        """Whether the model holds "pooler", "mlm", "classifier" or "span"."""
        names = {"mlm": ("cls", "lm_head"), "span": ("qa_outputs",)}.get(part, (part,))
        return any(hasattr(holder, name) for holder in (self, self.base) for name in names)

    def new_head(self, part: str, labels: int = 2):
        """Adds a part, fresh from torch's global generator: mlm, pooler, classifier (C = labels) or span."""
        c, roberta, name = self.config, self.config.model_type == "roberta", part
        device, D = self.base.embeddings.word_embeddings.weight.device, c.hidden_size
        with torch.device(device):
            if part == "mlm":
                head, name = MlmHead(c), "lm_head" if roberta else "cls"
                head = head if roberta else nn.ModuleDict({"predictions": head})
            elif part == "span":
                head, name = nn.Linear(D, 2), "qa_outputs"
            elif part == "pooler":
                head = nn.ModuleDict({"dense": nn.Linear(D, D)})
            elif roberta:
                head = nn.ModuleDict({"dense": nn.Linear(D, D), "out_proj": nn.Linear(D, labels)})
            else:
                head = nn.Linear(D, labels)
        head.apply(self._fresh)
        (self.base if part == "pooler" else self).add_module(name, head)

    def forward(self, ids, keep=None, segments=None):
        """ids (B, T) int64, keep (B, T) bool or None (no padding), segments (B, T) or None (all 0)
        -> list of L + 1 hidden states (B, T, D): the embedding output, then each layer's.

        Raises ValueError if T exceeds the position table."""
        if ids.shape[1] > self.config.positions:
            raise ValueError(f"{ids.shape[1]} tokens, but the model has {self.config.positions} positions")
        return self.base(ids, keep, segments)

    def mlm_logits(self, hidden):  # (.., D) -> (.., V)
        head = self.lm_head if self.config.model_type == "roberta" else self.cls["predictions"]
        return head(hidden, self.base.embeddings.word_embeddings.weight)

    def class_logits(self, hidden):  # last hidden state (B, T, D) -> (B, C)
        first = hidden[:, 0]  # [CLS] or <s>
        if self.config.model_type == "bert":  # RoBERTa was trained without pooler
            return self.classifier(self.drop(torch.tanh(self.base.pooler["dense"](first))))
        x = self.drop(torch.tanh(self.classifier["dense"](self.drop(first))))
        return self.classifier["out_proj"](x)

    def span_logits(self, hidden):  # last hidden state (B, T, D) -> (B, T, 2), start and end
        return self.qa_outputs(hidden)


REMADE = {}  # address of a tensor -> how to make it again


@contextmanager
def remade(made, make):
    """Within, autograd does not keep the tensor `made` for backward, but calls make() there: for what takes
    much memory and little time. Attention weights and GELU: a BERT-base step takes 2.94, not 3.12 GB."""
    def pack(kept):
        again = REMADE.get(kept.data_ptr())  # `made` itself or a view of it
        return kept if again is None else (again, kept.shape, kept.stride())

    def unpack(kept):
        return kept if isinstance(kept, torch.Tensor) else kept[0]().as_strided(*kept[1:])
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    REMADE[made.data_ptr()] = make  # a table, since of nested hooks torch asks only the innermost
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        del REMADE[made.data_ptr()]


# ---------------------------------------------------------------- 2 checkpoint files
# They come from strangers: no code in them runs, sizes are checked before memory is taken.

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
TENSORFLOW = {1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 9: torch.int64,
              10: torch.bool, 14: torch.bfloat16, 19: torch.float16}
TF_SUFFIX = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
PICKLED = re.compile(r"collections OrderedDict|argparse Namespace|torch(\.cuda)? (\w+Storage|Size)|"
                     r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)")  # all that checkpoints need
JSON_LIMIT = 10_000_000  # bytes; BERT-large needs 50,000, and hostile JSON of 25 MB takes 1 GB of memory
INDEX_LIMIT = 2 << 20  # bytes of a TensorFlow index or of a pickle without its tensors; BERT-large: 100,000


@contextmanager
def blame(file):
    """What parsing trips over becomes one ValueError of one line that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{file}: {reason:.500}") from None


def mapped(path):  # file -> uint8 (n,), copy-on-write: tensors on it may be changed, the file never is
    return np.memmap(path, np.uint8, "c") if Path(path).stat().st_size else np.zeros(0, np.uint8)


def as_tensor(name, raw, dtypes, code, shape):
    """Little-endian bytes (n,) -> tensor of dtypes[code], a view where the alignment allows."""
    if code not in dtypes:
        raise ValueError(f"{name!r:.200}: dtype {code!r:.20} is not one of {', '.join(map(str, dtypes))}")
    size, sane = dtypes[code].itemsize, len(shape) < 9 and all(type(d) is int and d >= 0 for d in shape)
    if not sane or math.prod(shape) * size != len(raw) or math.prod(max(d, 1) for d in shape) > 2**60:
        raise ValueError(f"{name!r:.200}: {len(raw):,} bytes are no {code} of shape {str(shape[:8]):.80}")
    return torch.from_numpy(raw.copy() if raw.ctypes.data % size else raw).view(dtypes[code]).view(shape)


def read_json(path, text=None):
    """The JSON object in a file, or in bytes of it -> dict. Duplicate keys and nesting bombs are errors."""
    def unique(pairs):
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return table
    text = mapped(path)[:JSON_LIMIT].tobytes() if text is None else text
    with blame(f"{path}: not valid JSON"):
        return {**json.loads(text.decode(), object_pairs_hook=unique)}


def read_safetensors(path):
    """8 bytes N | N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}} | data without holes."""
    data, tensors, end = mapped(path), {}, 0
    n = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or n > min(len(data) - 8, JSON_LIMIT):
        raise ValueError(f"{path}: no whole safetensors file: {len(data):,} bytes, header of {n:,}")
    header, data = read_json(path, data[8:8 + n].tobytes()), data[8 + n:]
    header.pop("__metadata__", None)
    with blame(path):
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            if begin != end or not begin <= stop <= len(data):
                raise ValueError(f"{name!r:.200}: bytes {begin} to {stop}, not from {end} on")
            tensors[name] = as_tensor(name, data[begin:stop], SAFETENSORS, entry["dtype"], entry["shape"])
            end = stop
        if end != len(data):
            raise ValueError(f"the last tensor ends at byte {end:,} of {len(data):,}")
    return tensors


@contextmanager
def atomic_write(path):
    """Yields a binary file that takes the place of `path` when the block ends, or leaves no trace of itself.

    On any failure the part file goes and an old `path` stays; trouble with the disk is an OSError that names
    `path`. The folder must exist."""
    part = Path(f"{path}.{os.urandom(4).hex()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave the new name without its bytes
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        part.unlink(missing_ok=True)


def write_safetensors(path, tensors):
    """A file that the safetensors library and transformers read; wide dtypes first, so all are aligned."""
    codes, end = {dtype: code for code, dtype in SAFETENSORS.items()}, 0
    header = {"__metadata__": {"format": "pt"}}
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    for name, t in tensors.items():
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_pickle(path):
    """What torch.save wrote, zip or legacy form -> that object; the caller checks it. No code in it runs."""
    with open(path, "rb") as file:
        try:
            zipped, pickles = file.read(4) == b"PK\3\4", [file] * 5  # legacy form: five in a row
            file.seek(0)
            if zipped:  # torch checks no crc; zipfile does
                archive = zipfile.ZipFile(file)
                sizes = {m.filename: m.file_size for m in archive.infolist() if not m.compress_type}
                if len(sizes) < len(archive.infolist()) or sum(sizes.values()) > Path(path).stat().st_size:
                    raise ValueError("compressed, double or oversized members, unlike torch.save")
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} fails its checksum")
                pickles = [archive.open(name) for name in sizes if name.endswith("data.pkl")]
            for stream in pickles:  # weights_only would let bytearray(10**10) pass
                for opcode, argument, position in pickletools.genops(stream):
                    if opcode.name == "GLOBAL" and not PICKLED.fullmatch(argument) or position > INDEX_LIMIT:
                        raise ValueError(f"{argument!r:.99} is not allowed, or the pickle too long")
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # damage makes torch raise almost any type
            reason = str(error).split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__
            raise ValueError(f"{path}: not a readable PyTorch file ({reason.splitlines()[0]:.200})") from None


def state_dict(value, path):
    """What read_pickle returned -> {name: tensor}, all of them dense and no larger than the file."""
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path}: holds a {type(value).__name__}, not a dict of tensors")
    for name, t in value.items():
        if (not isinstance(name, str) or not isinstance(t, torch.Tensor) or t.layout != torch.strided
                or t.is_meta or max(t.nbytes, t.untyped_storage().nbytes()) > Path(path).stat().st_size):
            raise ValueError(f"{path}: entry {name!r:.200} is not a plain tensor that fits the file")
    return {name: tensor.detach() for name, tensor in value.items()}


def read_sharded(path):
    """model.safetensors.index.json or pytorch_model.bin.index.json, shards beside it -> {name: tensor}."""
    tensors, shards = {}, read_json(path).get("weight_map")
    for file in shards.values() if isinstance(shards, dict) else [shards]:
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", file):
            raise ValueError(f'{path}: "weight_map" must name .safetensors, .bin beside it, not {file!r:.99}')
    for shard in sorted({Path(path).parent / file for file in shards.values()}):
        pickled = shard.suffix == ".bin"
        tensors |= state_dict(read_pickle(shard), shard) if pickled else read_safetensors(shard)
    if absent := sorted(shards.keys() - tensors):
        raise ValueError(f"{path}: its shards lack {', '.join(absent):.500}")
    return tensors


TABLE = np.arange(256)
for _ in range(8):
    TABLE = TABLE >> 1 ^ (TABLE & 1) * 0x82F63B78
TABLE = TABLE.tolist()


def masked_crc32c(data):
    """CRC-32C rotated right by 15, plus a282ead8: b"123456789" has e3069283, so c78ab0e5. 1 MB: 0.15 s."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF


def take(stream, count):  # the next bytes, exactly so many
    if len(data := stream.read(min(count, 1 << 40))) != count:
        raise ValueError("cut short")
    return data


def varint(stream, shift=0):
    """Seven bits a byte, low ones first, ten at most; the high bit says that more follow: ac 02 -> 300."""
    byte = take(stream, 1)[0] if shift < 70 else take(stream, 1 << 40)
    return (byte & 127) << shift | (varint(stream, shift + 7) if byte > 127 else 0)


def proto_fields(message):
    """Protocol buffer -> (tag, value) pairs; tag = 8 * field + 0 varint, 1 eight bytes, 2 counted, 5 four."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        number = varint(stream) if (kind := (tag := varint(stream)) & 7) in (0, 2) else {1: 8, 5: 4}[kind]
        yield tag, take(stream, number) if kind else number


def snappy(data):
    """Decompress: 05 | 04 'a' 'b' | 0a 02 00 says "5 bytes; literal ab; copy 3 from 2 back" -> ababa."""
    stream, out = io.BytesIO(data), bytearray()
    length = varint(stream)
    while stream.tell() < len(data) and len(out) <= length <= INDEX_LIMIT:
        tag = take(stream, 1)[0]
        kind, count = tag & 3, (tag >> 2) + 1
        width = (max(0, count - 60), 1, 2, 4)[kind]
        number = int.from_bytes(take(stream, width), "little")
        if kind == 0:  # literal
            out += take(stream, number + 1 if width else count)
            continue
        if kind == 1:
            count, number = (tag >> 2 & 7) + 4, tag >> 5 << 8 | number
        start = len(out) - number
        out += (out[max(0, start):start + count] * count)[:count]  # it may overlap itself
        if start < 0 or number == 0:
            raise ValueError("snappy copies from outside")
    if len(out) != length:
        raise ValueError(f"snappy gives {len(out):,} bytes of {length:,} (at most {INDEX_LIMIT:,})")
    return bytes(out)


def table_block(index, handle):
    """Leveldb block at a handle (stream of offset, size) -> [(key, value)], where it begins and ends."""
    begin, size = varint(handle), varint(handle)
    stream = io.BytesIO(index[begin:begin + size + 5])
    data, kind, crc = take(stream, size), take(stream, 1), take(stream, 4)
    if masked_crc32c(data + kind) != int.from_bytes(crc, "little"):
        raise ValueError(f"the block at byte {begin:,} fails its checksum")
    if kind not in (b"\0", b"\1"):
        raise ValueError(f"block type {kind[0]}; only 0 (raw) and 1 (snappy) are known")
    data, pairs, key = snappy(data) if kind == b"\1" else data, [], b""
    end = len(data) - 4 - 4 * int.from_bytes(data[-4:], "little")  # restart offsets and their count follow
    stream = io.BytesIO(data[:max(0, end)])
    while stream.tell() < end:  # keys leave out what they share with the last: "a/beta", then (2, "gamma")
        shared, fresh, length = varint(stream), varint(stream), varint(stream)
        last, key = key, key[:shared] + take(stream, fresh)
        if not shared + fresh == len(key) < 1000 or pairs and key <= last or len(pairs) > 10_000:
            raise ValueError("keys are damaged, out of order or too many")
        pairs.append((key, take(stream, length)))
    return pairs, begin, begin + size


def tensorflow_index(path):
    """P.index -> (number of shards, {variable: {tag: value}}). Tags, left out where zero: 8 dtype, 18 shape,
    24 shard, 32 offset, 40 size, 53 crc, 58 slices; in the header, under the key "", 8 shards, 16 endian."""
    index, entries, end = mapped(path)[:INDEX_LIMIT + 1].tobytes(), {}, 0
    with blame(f"{path}: no TensorFlow V2 index, or a damaged one"):
        if index[-8:] != bytes.fromhex("57fb808b247547db"):
            raise ValueError(f"cut short, without its magic or above {INDEX_LIMIT:,} bytes")
        footer = io.BytesIO(index[-48:])
        varint(footer), varint(footer)  # handle of the metaindex, which is empty; that of the index follows
        for _, handle in table_block(index, footer)[0]:
            pairs, begin, stop = table_block(index, io.BytesIO(handle))
            if begin < end or len(entries) > 10_000:
                raise ValueError("blocks overlap or are too many")
            entries |= {key.decode(): dict(proto_fields(value)) for key, value in pairs}
            end = stop
        header = entries.pop("")
        if header.get(16):
            raise ValueError("big-endian data")
    return header.get(8, 0), entries


def read_tensorflow(path):
    """P, P.index or P.data-.. -> {variable: tensor}, names and layouts as they are; crc read up to 1 MB."""
    prefix = TF_SUFFIX.sub("", str(path))
    (shards, entries), data, used, tensors = tensorflow_index(prefix + ".index"), {}, {}, {}
    for name, entry in entries.items():
        file = f"{prefix}.data-{entry.get(24, 0):05d}-of-{shards:05d}"
        data[file] = data[file] if file in data else mapped(file)
        begin, size = entry.get(32, 0), entry.get(40, 0)
        raw, used[file] = data[file][begin:begin + size], used.get(file, 0) + size
        with blame(f"{file}: variable {name!r:.200}"):
            if name.startswith("\0") or 58 in entry:
                raise ValueError("partitioned variables are not supported")
            if max(begin + size, used[file]) > len(data[file]):
                raise ValueError(f"ends at byte {begin + size:,} of {len(data[file]):,}, or overlaps another")
            crc = int.from_bytes(entry.get(53, b""), "little")
            if size <= 1 << 20 and masked_crc32c(raw.tobytes()) != crc:
                raise ValueError("fails its checksum")
            dims = [value for tag, value in proto_fields(entry.get(18, b"")) if tag == 18]
            shape = [dict(proto_fields(dim)).get(8, 0) for dim in dims]
            tensors[name] = as_tensor(name, raw, TENSORFLOW, entry.get(8), shape)
    return tensors


def from_tensorflow(tensors):
    """Google's names -> Hugging Face's; kernels are (in, out), so transposed; slots and global_step go."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(("bert/", "cls/")) and name.rpartition("/")[0] not in tensors:  # bias/adam_m
            new = re.sub(r"/output_(weight|bias)s?$", r"/\1", re.sub(r"_embeddings$", r"\g<0>/weight", name))
            new = re.sub(r"/kernel$", "/weight", new.replace("/layer_", "/layer/")).replace("/", ".")
            renamed[new] = tensor.T if name.endswith("/kernel") and tensor.ndim == 2 else tensor
    return renamed


HEADS = {"bert": "cls.predictions", "roberta": "lm_head"}
FAIRSEQ = {"embed_tokens": "embeddings.word_embeddings", "embed_positions": "embeddings.position_embeddings",
           "emb_layer_norm": "embeddings.LayerNorm", "layernorm_embedding": "embeddings.LayerNorm",
           "self_attn.q_proj": "attention.self.query", "self_attn.k_proj": "attention.self.key",
           "self_attn.v_proj": "attention.self.value", "self_attn.out_proj": "attention.output.dense",
           "self_attn_layer_norm": "attention.output.LayerNorm", "fc1": "intermediate.dense",
           "fc2": "output.dense", "final_layer_norm": "output.LayerNorm"}


def from_fairseq(tensors, args):
    """fairseq's names -> {Hugging Face name: tensor}, and what shapes and args tell of a config.json."""
    new, names = {}, re.compile(
        r"\w+\.(?:(lm_head)|sentence_encoder(?:\.layers\.(\d+))?)\.(?:(.+)[._])?(weight|bias)")
    for name, t in tensors.items():
        if not (match := names.fullmatch(name)):  # classification_heads, version and the like
            continue
        head, layer, part, kind = match.groups()
        where = "roberta." if layer is None else f"roberta.encoder.layer.{layer}."
        if head:
            new[f"lm_head.{part or 'decoder'}.{kind}"] = t
        elif part == "self_attn.in_proj" and t.ndim:  # 2019: query, key, value in one, (3D, D)
            for x, third in zip("qkv", t.tensor_split(3), strict=True):
                new[f"{where}{FAIRSEQ[f'self_attn.{x}_proj']}.{kind}"] = third
        elif part in FAIRSEQ:
            new[f"{where}{FAIRSEQ[part]}.{kind}"] = t
        else:
            raise ValueError(f"{name} is no part of RoBERTa")
    words, places = (new[f"roberta.{FAIRSEQ[x]}.weight"].shape for x in ("embed_tokens", "embed_positions"))
    new["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, words[1])
    layers = sum(name.endswith("self.query.weight") for name in new)
    return new, {"model_type": "roberta", "vocab_size": words[0], "hidden_size": words[1],
                 "num_hidden_layers": getattr(args, "encoder_layers", layers),
                 "num_attention_heads": getattr(args, "encoder_attention_heads", None),
                 "intermediate_size": len(new["roberta.encoder.layer.0.intermediate.dense.bias"]),
                 "max_position_embeddings": places[0], "hidden_act": getattr(args, "activation_fn", "gelu")}


def rename(tensors, family=None):
    """Any Hugging Face spelling -> ({name: tensor}, "bert" | "roberta"); a bare encoder needs it told.

    module.bert.pooler.. -> bert.pooler..; embeddings.LayerNorm.gamma -> bert.embeddings.LayerNorm.weight."""
    spelling = re.compile(r"(?:module\.|model\.)*(?:(bert|roberta)\.)?(.*)", re.DOTALL)
    parts = {name: spelling.fullmatch(name) for name in tensors}
    told = {{"cls": "bert", "lm_head": "roberta"}.get(m[2].split(".")[0], m[1]) for m in parts.values()}
    if len(told := (told | {family}) - {None}) != 1:
        raise ValueError(f"names and model_type must tell one family, bert or roberta, not {sorted(told)}")
    (family,), renamed = told, {}
    for name, match in parts.items():
        new = match[2].replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        new = f"{family}.{new}" if new.startswith(("embeddings.", "encoder.", "pooler.")) else new
        if new in renamed:
            raise ValueError(f"{name} and another name both mean {new}")
        if not new.endswith(("position_ids", "token_type_ids")):
            renamed[new] = tensors[name]
    return renamed, family


def read_config(values: dict, family: str) -> Config:
    """The fields of a config.json, checked. The family comes from the names of the weights, since old files
    lack it; old RoBERTa files also lack pad_token_id, Google's lack layer_norm_eps."""
    only = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for name in only.keys() & values:
        if values[name] not in (None, only[name]):
            raise ValueError(f"{name} {values[name]!r:.50} is not supported: {only[name]}")
    found = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5} if family == "roberta" else {}
    found |= {name: value for name, value in values.items() if value is not None} | {"model_type": family}
    found = {f.name: found.get(f.name, f.default) for f in fields(Config)}
    if lacking := [name for name, value in found.items() if value is MISSING]:
        raise ValueError(f"missing {', '.join(lacking)}")
    ranges = {int: (1, 10**7), float: (0, 1), bool: (False, True), str: ("bert", "roberta")}
    for name, kind in ((f.name, f.type) for f in fields(Config)):
        value, (low, high) = found[name], ranges[kind]
        low = 0 if name == "pad_token_id" else low
        if type(value) not in (kind, type(low)) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r:.50}: expected {low} to {high}")
    config = Config(**found)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"num_attention_heads {config.num_attention_heads} do not divide hidden_size "
                         f"{config.hidden_size}")
    if config.pad_token_id >= config.vocab_size or config.positions < 1:
        raise ValueError(f"pad_token_id {config.pad_token_id} leaves no words or no positions")
    return config


def weights_file(path: Path) -> Path:
    """The file that holds the weights: the path itself, the first in its folder, or a TensorFlow index."""
    if path.is_dir():
        names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                 "pytorch_model.bin.index.json", "*.index", "*.safetensors", "*.bin", "*.pt")
        found = next((files for name in names if (files := sorted(path.glob(name)))), [])
        if len(found) > 1:
            raise ValueError(f"{path}: several checkpoints, name one: {', '.join(f.name for f in found)}")
        path = found[0] if found else path / "model.safetensors, pytorch_model.bin, *.ckpt.index or model.pt"
    index = Path(TF_SUFFIX.sub("", str(path)) + ".index")
    if index.is_file():
        return index
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file or folder")
    if not path.name.endswith((".safetensors", ".bin", ".pt", ".pth", ".index.json")):
        raise ValueError(f"{path}: no checkpoint: expected .safetensors, .bin, .pt or TensorFlow's .index")
    return path


def read_tensors(file: Path) -> tuple[dict, dict]:
    """-> tensors under Hugging Face's names in any spelling, and what a fairseq file tells of the config."""
    if file.suffix == ".index":
        return from_tensorflow(read_tensorflow(file)), {}
    if file.suffix == ".json":
        return read_sharded(file), {}
    if file.suffix == ".safetensors":
        return read_safetensors(file), {}
    content = read_pickle(file)
    outer = content if isinstance(content, dict) else {}  # of a training checkpoint
    tensors = state_dict(outer.get("model", outer.get("state_dict", content)), file)
    if any(".sentence_encoder." in name for name in tensors):
        with blame(file):
            return from_fairseq(tensors, outer.get("args"))
    return tensors, {}


def load(path) -> Model:
    """A model in eval mode from an original checkpoint: a Hugging Face folder or one of its weight files, a
    TensorFlow prefix, .index or .data file, fairseq's model.pt; with the pooler and masked-LM head it holds.

    ValueError: every missing and mis-shaped tensor, in one list. What is left out is printed, in one line."""
    file = weights_file(Path(path))
    sources = [file.parent / "config.json", *sorted(file.parent.glob("*bert_config.json"))]
    source = next((f for f in sources if f.is_file()), file)
    values = {} if source == file else read_json(source)
    if values.get("model_type") not in (None, "bert", "roberta"):
        raise ValueError(f"{source}: model_type {values['model_type']!r:.50} is not bert or roberta")
    tensors, told = read_tensors(file)
    if not (values or told):
        raise FileNotFoundError(f"{file.parent}: no config.json or bert_config.json beside {file.name}")
    values = told | values
    with blame(file):
        tensors, family = rename(tensors, values.get("model_type"))
    with blame(source):
        config = read_config(values, family)
        if config.num_hidden_layers > len(tensors):
            raise ValueError(f"num_hidden_layers {config.num_hidden_layers}: {file.name} has fewer")
    head, words = HEADS[family], f"{family}.embeddings.word_embeddings.weight"
    decoder = f"{head}.decoder.weight"
    if f"{head}.decoder.bias" in tensors:  # newer files hold the bias twice, and this is the one that counts
        tensors[f"{head}.bias"] = tensors.pop(f"{head}.decoder.bias")
    both = [tensors[name].float() for name in (decoder, words) if name in tensors]
    if len(both) == 2 and not torch.equal(*both):
        config = replace(config, tie_word_embeddings=False)
    pooler, mlm = (any(name.startswith(f"{x}.") for name in tensors) for x in (f"{family}.pooler", head))
    with torch.device("meta"):  # shapes only; the memory is the checkpoint's
        model = Model(config, pooler, mlm)
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    wrong = [f"{name} {list(tensors[name].shape)} instead of {list(t.shape)}" for name, t in expected.items()
             if name in tensors and tensors[name].shape != t.shape]
    if problems := [f"{what}: {', '.join(names)}" for what, names in
                    {"missing": missing, "wrong shape": wrong}.items() if names]:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    if unused := sorted(tensors.keys() - expected - {decoder}):
        more = f" and {len(unused) - 6} more" if unused[6:] else ""
        print(f"{file.name}: not used: {', '.join(unused[:6])}{more}")
    own = {name: tensors[name].to(torch.float32, copy=True).contiguous() for name in expected}
    if odd := [name for name, tensor in own.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{file}: not all values are finite in {', '.join(odd[:6])}")
    model.load_state_dict(own, assign=True)
    return model.eval()


def save(folder, config: Config, tensors: dict, architecture: str, **extra):
    """Writes config.json and model.safetensors so that transformers' from_pretrained loads them; architecture
    is the class without its family ("ForMaskedLM"), extra goes into the config. OSError: old files stay."""
    folder, kind = Path(folder), config.model_type.title() + architecture  # BertForMaskedLM
    values = asdict(config) | {"architectures": [kind], "hidden_act": "gelu"} | extra
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.json") as file:
        file.write(f"{json.dumps(values, indent=1)}\n".encode())
        file.flush()  # a full disk must tell before the weights are replaced
        write_safetensors(folder / "model.safetensors", tensors)
