"""BERT and RoBERTa as their papers draw them, and their original checkpoint files, in and out.

Read it beside "BERT: Pre-training of Deep Bidirectional Transformers" (Devlin et al. 2019), section 3 and appendix A.
Part 1 is the network: embeddings, L layers of attention and feed-forward, three heads (masked LM, classifier, span).
Part 2 reads what was published: Hugging Face folders, Google's TensorFlow checkpoints, fairseq's model.pt.
Module names are checkpoint names (`bert.encoder.layer.0.attention.self.query`), so Hugging Face files need no name map.

Glossary: B sequences, T tokens, D hidden size, H heads, F feed-forward size, L layers, V vocabulary, C labels,
M scored positions. `keep` is True at real tokens and False at padding.
"""

import argparse
import io
import json
import math
import pickletools
import re
import zipfile
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- 1 the network


@dataclass(frozen=True)
class Config:
    """Sizes of a model, under the names that config.json uses. Fields without a default must be in the file."""
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
        """Longest sequence in tokens. RoBERTa's table starts at row pad + 1, so that 514 rows serve 512 tokens."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.model_type == "roberta" else 0)


class Embeddings(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size, padding_idx=c.pad_token_id)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.config = c

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
        kinds = self.token_type_embeddings.weight[0] if segments is None else self.token_type_embeddings(segments)
        x = self.word_embeddings(ids) + kinds + self.position_embeddings(positions)
        return F.dropout(self.LayerNorm(x), c.hidden_dropout_prob, self.training)


class Layer(nn.Module):
    """Multi-head attention, then a feed-forward network; dropout, residual and LayerNorm after each (TAMT, Eq. 1).

    Heads are counted from the rows of the query matrix, and `intermediate` may be None: a structured ticket
    (finetune.py) takes heads and whole feed-forward networks out, and LayerNorm then acts on the residual alone.
    """

    def __init__(self, c: Config):
        super().__init__()
        D, F_, norm = c.hidden_size, c.intermediate_size, lambda: nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({"query": nn.Linear(D, D), "key": nn.Linear(D, D), "value": nn.Linear(D, D)}),
            "output": nn.ModuleDict({"dense": nn.Linear(D, D), "LayerNorm": norm()})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, F_)})
        self.output = nn.ModuleDict({"dense": nn.Linear(F_, D), "LayerNorm": norm()})
        self.head_size = D // c.num_attention_heads
        self.p_hidden, self.p_attention = c.hidden_dropout_prob, c.attention_probs_dropout_prob

    def attend(self, x, keep):  # (B, T, D), (B, 1, 1, T) bool or None -> (B, T, H * head size)
        B, T, _ = x.shape
        q, k, v = (self.attention["self"][name](x).view(B, T, -1, self.head_size).transpose(1, 2)
                   for name in ("query", "key", "value"))  # each (B, H, T, head size)
        p = self.p_attention if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, keep, p).transpose(1, 2).flatten(2)

    def forward(self, x, keep):  # (B, T, D), (B, 1, 1, T) bool or None -> (B, T, D)
        drop = lambda y: F.dropout(y, self.p_hidden, self.training)  # noqa: E731
        sub = self.attention["output"]
        x = sub["LayerNorm"](x + drop(sub["dense"](self.attend(x, keep))))
        if self.intermediate is None:
            return self.output["LayerNorm"](x)
        h = F.gelu(self.intermediate["dense"](x))  # exact, with erf; (B, T, F)
        return self.output["LayerNorm"](x + drop(self.output["dense"](h)))


class Base(nn.Module):
    """Everything below the heads; called `bert` or `roberta` in checkpoints."""

    def __init__(self, c: Config, pooler: bool):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))})
        if pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, c.hidden_size)})

    def forward(self, ids, keep, segments):  # (B, T), (B, T) bool or None, (B, T) or None -> L + 1 times (B, T, D)
        hidden = [self.embeddings(ids, segments)]
        keep = None if keep is None else keep.bool()[:, None, None, :]  # (B, 1, 1, T): every query sees real keys
        for layer in self.encoder["layer"]:
            hidden.append(layer(hidden[-1], keep))
        return hidden


class MlmHead(nn.Module):
    """Dense, GELU, LayerNorm, then one logit per word from the decoder, which is the word embedding unless untied."""

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
        parts = (self.dense, self.layer_norm) if hasattr(self, "dense") else self.transform.values()
        dense, norm = parts
        words = words if self.decoder is None else self.decoder.weight
        return F.linear(norm(F.gelu(dense(hidden))), words, self.bias)


class Model(nn.Module):
    """An encoder with the parts that a checkpoint held or that a caller asked for."""

    def __init__(self, config: Config, pooler: bool = True, mlm: bool = True):
        super().__init__()
        self.config = config
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
        """Adds a fresh part drawn from torch's global generator: "mlm", "pooler", "classifier" (C = labels) or "span"."""
        c, roberta = self.config, self.config.model_type == "roberta"
        device, D = self.base.embeddings.word_embeddings.weight.device, c.hidden_size
        with torch.device(device):
            if part == "mlm":
                head, name = MlmHead(c), "lm_head" if roberta else "cls"
                head = head if roberta else nn.ModuleDict({"predictions": head})
            elif part == "span":
                head, name = nn.Linear(D, 2), "qa_outputs"
            elif part == "pooler":
                head, name = nn.ModuleDict({"dense": nn.Linear(D, D)}), "pooler"
            elif roberta:
                head, name = nn.ModuleDict({"dense": nn.Linear(D, D), "out_proj": nn.Linear(D, labels)}), "classifier"
            else:
                head, name = nn.Linear(D, labels), "classifier"
        head.apply(self._fresh)
        (self.base if part == "pooler" else self).add_module(name, head)

    def forward(self, ids, keep=None, segments=None):
        """ids (B, T) int64, keep (B, T) bool or None (no padding), segments (B, T) or None (all 0)
        -> list of L + 1 hidden states (B, T, D): the embedding output, then each layer's.

        Raises ValueError if T exceeds the position table."""
        if ids.shape[1] > self.config.positions:
            raise ValueError(f"sequence of {ids.shape[1]} tokens: the model has {self.config.positions} positions")
        return self.base(ids, keep, segments)

    def mlm_logits(self, hidden):  # (.., D) -> (.., V)
        head = self.lm_head if self.config.model_type == "roberta" else self.cls["predictions"]
        return head(hidden, self.base.embeddings.word_embeddings.weight)

    def class_logits(self, hidden):  # last hidden state (B, T, D) -> (B, C)
        drop = lambda y: F.dropout(y, self.config.hidden_dropout_prob, self.training)  # noqa: E731
        first = hidden[:, 0]  # [CLS] or <s>
        if self.config.model_type == "roberta":  # its own dense layer; RoBERTa was trained without a pooler
            return self.classifier["out_proj"](drop(torch.tanh(self.classifier["dense"](drop(first)))))
        return self.classifier(drop(torch.tanh(self.base.pooler["dense"](first))))

    def span_logits(self, hidden):  # last hidden state (B, T, D) -> (B, T, 2), start and end
        return self.qa_outputs(hidden)


# ---------------------------------------------------------------- 2 checkpoint files


SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "F64": torch.float64, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
               "I64": torch.int64, "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16,
               "U32": torch.uint32, "U64": torch.uint64}
TENSORFLOW = {1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 5: torch.int16,
              6: torch.int8, 9: torch.int64, 10: torch.bool, 14: torch.bfloat16, 17: torch.uint16,
              19: torch.float16}
PICKLED = re.compile(r"collections OrderedDict|argparse Namespace|torch(\.cuda)? (\w+Storage|Size)|"
                     r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)")  # all that checkpoints need
JSON_LIMIT = 10_000_000  # bytes; BERT-large needs 50,000, and hostile JSON of 25 MB takes 1 GB of memory
INDEX_LIMIT = 2 << 20  # bytes of a TensorFlow index or of a pickle without its tensors; BERT-large: 100,000


def mapped(path):  # file -> uint8 (n,), copy-on-write: tensors on it may be changed, the file never is
    return np.memmap(path, np.uint8, "c") if Path(path).stat().st_size else np.zeros(0, np.uint8)


def as_tensor(raw, dtypes, code, shape):
    """Little-endian bytes (n,) -> tensor of dtypes[code], a view where the alignment allows."""
    if code not in dtypes:
        raise ValueError(f"dtype {code!r:.20} is not one of {', '.join(map(str, dtypes))}")
    size, sane = dtypes[code].itemsize, len(shape) < 9 and all(type(d) is int and d >= 0 for d in shape)
    if not sane or math.prod(shape) * size != len(raw) or math.prod(max(d, 1) for d in shape) > 2**60:
        raise ValueError(f"{len(raw):,} bytes do not make {code} of shape {str(shape[:8]):.80}")
    return torch.from_numpy(raw.copy() if raw.ctypes.data % size else raw).view(dtypes[code]).view(shape)


def read_json(path, text=None):
    """JSON object, from a file or from bytes of it -> dict. Duplicate keys and nesting bombs are errors."""
    def unique(pairs):
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return table
    text = mapped(path)[:JSON_LIMIT].tobytes() if text is None else text[:JSON_LIMIT]
    try:
        if isinstance(value := json.loads(text.decode(), object_pairs_hook=unique), dict):
            return value
        raise ValueError("not an object {...}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def read_safetensors(path):
    """8 bytes N | N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}} | data without holes."""
    data, tensors, name, end = mapped(path), {}, "", 0
    n = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or n > min(len(data) - 8, JSON_LIMIT):
        raise ValueError(f"{path}: no whole safetensors file: {len(data):,} bytes, header of {n:,}")
    header, data = read_json(path, data[8:8 + n].tobytes()), data[8 + n:]
    header.pop("__metadata__", None)
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            if begin != end or not begin <= stop <= len(data):
                raise ValueError(f"bytes {begin} to {stop} must follow {end}, inside {len(data):,}")
            tensors[name] = as_tensor(data[begin:stop], SAFETENSORS, entry["dtype"], entry["shape"])
            end = stop
        if end != len(data):
            raise ValueError(f"it is the last and ends at byte {end:,} of {len(data):,}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: bad entry of tensor {name!r:.200}: {error}") from None
    return tensors


def write_safetensors(path, tensors):
    """A file that the safetensors library and transformers read; wide dtypes first, so all are aligned."""
    codes, end = {dtype: code for code, dtype in SAFETENSORS.items()}, 0
    header = {"__metadata__": {"format": "pt"}}
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = dict(dtype=codes[tensor.dtype], shape=list(tensor.shape), data_offsets=(begin, end))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
    folder, tensors, files = Path(path).parent, {}, read_json(path).get("weight_map")
    for file in files.values() if isinstance(files, dict) else [files]:
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", file):
            raise ValueError(f'{path}: "weight_map" must name .safetensors, .bin beside it, not {file!r:.99}')
    if absent := sorted({file for file in files.values() if not (folder / file).is_file()}):
        raise FileNotFoundError(f"{path}: missing shards {', '.join(absent):.500}")
    for shard in sorted({folder / file for file in files.values()}):
        pickled = shard.suffix == ".bin"
        tensors |= state_dict(read_pickle(shard), shard) if pickled else read_safetensors(shard)
    if absent := sorted(files.keys() - tensors):
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
        tag = varint(stream)
        if tag & 7 == 0:
            yield tag, varint(stream)
        else:
            yield tag, take(stream, varint(stream) if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7])


def snappy(data):
    """Decompress: 05 | 04 'a' 'b' | 0a 02 00 says "5 bytes; literal ab; copy 3 from 2 back" -> ababa."""
    stream, out = io.BytesIO(data), bytearray()
    length = varint(stream)
    while stream.tell() < len(data) and len(out) <= length <= INDEX_LIMIT:
        tag = take(stream, 1)[0]
        kind, count = tag & 3, (tag >> 2) + 1
        width = (max(0, count - 60), 1, 2, 4)[kind]
        number = int.from_bytes(take(stream, width), "little")
        if kind == 1:
            count, number = (tag >> 2 & 7) + 4, tag >> 5 << 8 | number
        start = len(out) - number
        if kind == 0:  # literal
            out += take(stream, number + 1 if width else count)
        elif 0 <= start < len(out):
            out += (out[start:start + count] * count)[:count]  # it may overlap itself
        else:
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
    try:
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
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: no TensorFlow V2 index, or a damaged one: {error}") from None
    return header.get(8, 0), entries


def read_tensorflow(path):
    """P, P.index or P.data-.. -> {variable: tensor}, names and layouts as they are; crc read up to 1 MB."""
    prefix = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", str(path))
    (shards, entries), data, used, tensors = tensorflow_index(prefix + ".index"), {}, {}, {}
    for name, entry in entries.items():
        file = f"{prefix}.data-{entry.get(24, 0):05d}-of-{shards:05d}"
        data[file] = data[file] if file in data else mapped(file)
        begin, size = entry.get(32, 0), entry.get(40, 0)
        raw, used[file] = data[file][begin:begin + size], used.get(file, 0) + size
        try:
            if name.startswith("\0") or 58 in entry:
                raise ValueError("partitioned variables are not supported")
            if max(begin + size, used[file]) > len(data[file]):
                raise ValueError(f"ends at byte {begin + size:,} of {len(data[file]):,}, or overlaps another")
            crc = int.from_bytes(entry.get(53, b""), "little")
            if size <= 1 << 20 and masked_crc32c(raw.tobytes()) != crc:
                raise ValueError("fails its checksum")
            shape = [dict(proto_fields(dim)).get(8, 0) for tag, dim in proto_fields(entry.get(18, b"")) if tag == 18]
            tensors[name] = as_tensor(raw, TENSORFLOW, entry.get(8), shape)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: variable {name!r}: {error}") from None
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


FAIRSEQ = {"embed_tokens": "embeddings.word_embeddings", "embed_positions": "embeddings.position_embeddings",
           "emb_layer_norm": "embeddings.LayerNorm", "layernorm_embedding": "embeddings.LayerNorm",
           "self_attn.q_proj": "attention.self.query", "self_attn.k_proj": "attention.self.key",
           "self_attn.v_proj": "attention.self.value", "self_attn.out_proj": "attention.output.dense",
           "self_attn_layer_norm": "attention.output.LayerNorm", "fc1": "intermediate.dense",
           "fc2": "output.dense", "final_layer_norm": "output.LayerNorm"}


def from_fairseq(checkpoint, path, heads=None):
    """{"model", "args"} -> ({Hugging Face name: tensor}, config). Without args the caller tells the heads."""
    new, args = {}, checkpoint.get("args")
    for name, t in state_dict(checkpoint.get("model"), path).items():
        match = re.fullmatch(
            r"\w+\.(?:(lm_head)|sentence_encoder(?:\.layers\.(\d+))?)\.(?:(.+)[._])?(weight|bias)", name)
        if match:  # else classification_heads, version and the like
            head, layer, part, kind = match.groups()
            where = "roberta." if layer is None else f"roberta.encoder.layer.{layer}."
            if head:
                new[f"lm_head.{part or 'decoder'}.{kind}"] = t
            elif part == "self_attn.in_proj" and t.ndim:  # 2019: query, key, value in one, (3D, D)
                new |= {f"{where}attention.self.{x}.{kind}": t[i * len(t) // 3:(i + 1) * len(t) // 3]
                        for i, x in enumerate(("query", "key", "value"))}
            elif part in FAIRSEQ:
                new[f"{where}{FAIRSEQ[part]}.{kind}"] = t
            else:
                raise ValueError(f"{path}: {name} is no part of RoBERTa")
    heads, parts = getattr(args, "encoder_attention_heads", heads), ("embed_tokens", "embed_positions")
    if not heads or getattr(args, "activation_fn", "gelu") != "gelu":
        raise ValueError(f"{path}: args must tell gelu and encoder_attention_heads (or a config.json)")
    try:
        (vocabulary, d), (positions, _) = (new[f"roberta.{FAIRSEQ[part]}.weight"].shape for part in parts)
        f = len(new["roberta.encoder.layer.0.intermediate.dense.bias"])
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{path}: no RoBERTa: needs embed_tokens, embed_positions, layers") from None
    new["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, d)
    layers = getattr(args, "encoder_layers", sum(name.endswith("self.query.weight") for name in new))
    return new, dict(model_type="roberta", vocab_size=vocabulary, hidden_size=d, num_hidden_layers=layers,
                     num_attention_heads=heads, intermediate_size=f, max_position_embeddings=positions,
                     type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1)


def rename(tensors, family=None):
    """Any Hugging Face spelling -> ({name: tensor}, "bert" | "roberta"); a bare encoder needs it told.

    module.bert.pooler.. -> bert.pooler..; embeddings.LayerNorm.gamma -> bert.embeddings.LayerNorm.weight."""
    spelling = re.compile(r"(?:module\.|model\.)*(?:(bert|roberta)\.)?(.*)", re.DOTALL)
    parts = {name: spelling.fullmatch(name) for name in tensors}
    told = {{"cls": "bert", "lm_head": "roberta"}.get(m[2].split(".")[0], m[1]) for m in parts.values()}
    if len(told := (told | {family}) - {None}) != 1 or not told <= {"bert", "roberta"}:
        raise ValueError(f"names and model_type must tell one family, bert or roberta, not {sorted(told)}")
    (family,), renamed = told, {}
    for name, match in parts.items():
        new = match[2].replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        new = f"{family}.{new}" if new.startswith(("embeddings.", "encoder.", "pooler.")) else new
        new = re.sub(r"^(cls\.predictions|lm_head)\.decoder\.bias$", r"\1.bias", new)  # equal, if both
        if new in renamed and not new.endswith(("predictions.bias", "lm_head.bias")):
            raise ValueError(f"{name} and another name both mean {new}")
        if not new.endswith(("position_ids", "token_type_ids")):
            renamed[new] = tensors[name]
    return renamed, family


def read_config(values: dict, family: str | None, source) -> Config:
    """Config from the fields of a config.json; `family` is what the weight names say if the file does not.

    Old RoBERTa files lack model_type and pad_token_id, Google's lack model_type and layer_norm_eps."""
    kind = values.get("model_type", family) or "bert"
    if kind not in ("bert", "roberta"):
        raise ValueError(f"{source}: model_type {kind!r} is not supported: bert or roberta")
    if values.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{source}: hidden_act {values['hidden_act']!r} is not supported: gelu")
    defaults = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5} if kind == "roberta" else {}
    known = {f.name: f.type for f in fields(Config)}
    found = {"model_type": kind} | defaults | {k: v for k, v in values.items() if k in known and v is not None}
    lacking = [f.name for f in fields(Config) if f.name not in found and f.default is MISSING]
    if lacking:
        raise ValueError(f"{source}: missing {', '.join(lacking)}")
    for name, value in found.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= (name == "vocab_size")
        if known[name] is int and not whole or known[name] is float and not isinstance(value, (int, float)):
            raise ValueError(f"{source}: {name} is {value!r}, which is no valid size")
    if found["hidden_size"] % max(found["num_attention_heads"], 1):
        raise ValueError(f"{source}: hidden_size {found['hidden_size']} is no multiple of num_attention_heads "
                         f"{found['num_attention_heads']}")
    return Config(**found)


def load(path) -> Model:
    """A model in eval mode from an original checkpoint: a Hugging Face folder or one of its weight files, a TensorFlow
    prefix, .index or .data file, fairseq's model.pt. It holds what the file holds of pooler and masked-LM head.

    Raises ValueError that lists every missing and every mis-shaped tensor; what is left over is printed once."""
    file = weights_file(Path(path))
    source = next((f for f in (file.parent / "config.json", *sorted(file.parent.glob("*bert_config.json")))
                   if f.is_file()), None)
    values = read_json(source) if source else {}
    tensors, told = read_tensors(file, values.get("num_attention_heads"))
    if not (source or told):
        raise FileNotFoundError(f"{file.parent}: no config.json (or Google's bert_config.json) beside {file.name}")
    values = told | values
    try:
        tensors, family = rename(tensors, values.get("model_type"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    config = read_config(values, family, source or file)
    with torch.device("meta"):  # shapes only; the memory is the checkpoint's
        model = Model(config, pooler=f"{family}.pooler.dense.weight" in tensors,
                      mlm=any(name.startswith(("cls.predictions.", "lm_head.")) for name in tensors))
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    wrong = [f"{name} {list(tensors[name].shape)} instead of {list(t.shape)}" for name, t in expected.items()
             if name in tensors and tensors[name].shape != t.shape]
    if missing or wrong:
        raise ValueError(f"{file}: " + "; ".join(f"{what}: {', '.join(names)}" for what, names in
                                                 (("missing", missing), ("wrong shape", wrong)) if names))
    tied = {"cls.predictions.decoder.weight", "lm_head.decoder.weight"}
    if unused := sorted(tensors.keys() - expected - tied):
        print(f"{file.name}: not used: {', '.join(unused[:6])}{f' and {len(unused) - 6} more' if unused[6:] else ''}")
    model.load_state_dict({name: tensors[name].to(torch.float32, copy=True).contiguous() for name in expected},
                          assign=True)
    return model.eval()


def read_tensors(file: Path, heads: int | None) -> tuple[dict, dict]:
    """-> tensors under the names of the file's own kind, and the config that a fairseq file brings along."""
    if file.suffix == ".index":
        return from_tensorflow(read_tensorflow(file)), {}
    if file.suffix == ".safetensors":
        return read_safetensors(file), {}
    if file.suffix == ".json":
        return read_sharded(file), {}
    content = read_pickle(file)
    inner = content.get("model") if isinstance(content, dict) else None
    if isinstance(inner, dict) and any("sentence_encoder" in str(name) for name in inner):
        return from_fairseq(content, file, heads)
    return state_dict(content, file), {}


def weights_file(path: Path) -> Path:
    """The file that holds the weights: the path itself, or the first in its folder, or a TensorFlow prefix's index."""
    if path.is_dir():
        names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                 "pytorch_model.bin.index.json", "*.index", "*.safetensors", "*.bin", "*.pt")
        found = next((sorted(path.glob(name)) for name in names if list(path.glob(name))), [])
        if len(found) != 1:
            what = f"several checkpoints ({', '.join(f.name for f in found)}): name one" if found else \
                "no checkpoint: expected model.safetensors, pytorch_model.bin, *.ckpt.index or model.pt"
            raise FileNotFoundError(f"{path}: {what}")
        return found[0]
    prefix = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", str(path))
    if Path(f"{prefix}.index").is_file():
        return Path(f"{prefix}.index")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file or folder")
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise ValueError(f"{path}: not a checkpoint; expected .safetensors, .bin, .pt, or a TensorFlow .index")
    return path


def save(folder, config: Config, tensors: dict, architecture: str, **extra):
    """Writes config.json and model.safetensors so that transformers' from_pretrained loads them; `architecture` is the
    class without its family ("ForMaskedLM"); `extra` goes into the config."""
    folder, family = Path(folder), {"bert": "Bert", "roberta": "Roberta"}[config.model_type]
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    values = asdict(config) | {"architectures": [family + architecture], "hidden_act": "gelu"} | extra
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
