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
from dataclasses import asdict, dataclass, fields
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
    lacking = [f.name for f in fields(Config) if f.name not in found and f.default is f.default_factory]
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


SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "BOOL": torch.bool,
               "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
               "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
TENSORFLOW = {1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 5: torch.int16, 6: torch.int8, 9: torch.int64,
              10: torch.bool, 14: torch.bfloat16, 17: torch.uint16, 19: torch.float16}
PICKLED = re.compile(r"collections OrderedDict|argparse Namespace|torch(\.cuda)? (\w+Storage|Size)|"
                     r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)")  # all a checkpoint needs, less than torch allows
JSON_LIMIT = 25_000_000  # bytes, the hub's own limit for headers; BERT-large needs 50,000
INDEX_LIMIT = 4 << 20  # bytes of a TensorFlow index, or of a pickle without its tensors; BERT-large needs 100,000


def mapped(path):  # file -> uint8 (n,); tensors on it may be changed, the file never is
    return np.memmap(path, np.uint8, "c") if Path(path).stat().st_size else np.zeros(0, np.uint8)


def as_tensor(raw, dtypes, code, shape):
    """Little-endian bytes (n,) -> tensor of dtypes[code], a view where the alignment allows."""
    if code not in dtypes:
        raise ValueError(f"dtype {code!r:.20} is not one of {', '.join(map(str, dtypes))}")
    size, ok = dtypes[code].itemsize, len(shape) <= 8 and all(type(d) is int and 0 <= d < 2**40 for d in shape)
    if not ok or math.prod(shape) * size != len(raw) or math.prod(max(d, 1) for d in shape) > 2**60:
        raise ValueError(f"{len(raw):,} bytes do not make {code} of shape {str(shape[:8]):.80}")
    return torch.from_numpy(raw.copy() if raw.ctypes.data % size else raw).view(dtypes[code]).view(shape)


def read_json(path, text=None):
    """JSON object, from a file or from bytes of it -> dict. Duplicate keys and nesting bombs are errors."""
    def unique(pairs):
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return table
    text = mapped(path)[:JSON_LIMIT + 1].tobytes() if text is None else text
    try:
        value = json.loads(text.decode(), object_pairs_hook=unique) if len(text) <= JSON_LIMIT else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: JSON must be one object {{...}} of at most {JSON_LIMIT:,} bytes")
    return value


def read_safetensors(path):
    """-> {name: tensor}. 8 bytes N | N bytes of JSON, {name: {dtype, shape, data_offsets: [begin, end]}} | data, without holes."""
    data, tensors, name, end = mapped(path), {}, "", 0
    n = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or n > len(data) - 8:
        raise ValueError(f"{path}: not a whole safetensors file: {len(data):,} bytes, header of {n:,}")
    header, data = read_json(path, data[8:8 + min(n, JSON_LIMIT + 1)].tobytes()), data[8 + n:]
    header.pop("__metadata__", None)
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            if begin != end or not begin <= stop <= len(data):
                raise ValueError(f"bytes {begin} to {stop} do not follow {end}, or leave the file's {len(data):,}")
            tensors[name], end = as_tensor(data[begin:stop], SAFETENSORS, entry["dtype"], entry["shape"]), stop
        if end != len(data):
            raise ValueError(f"it ends at byte {end:,}, the data at {len(data):,}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: bad entry of tensor {name!r:.200}: {error}") from None
    return tensors


def write_safetensors(path, tensors):
    """{name: tensor} -> a file that the safetensors library and transformers read; wide dtypes first keeps all aligned."""
    codes, header, end = {dtype: code for code, dtype in SAFETENSORS.items()}, {"__metadata__": {"format": "pt"}}, 0
    tensors = {name: tensors[name] for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))}
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_pickle(path):
    """What torch.save wrote, zip or legacy form -> that object; the caller checks what it is. Code in it never runs."""
    with open(path, "rb") as file:
        try:
            zipped, pickles = file.read(4) == b"PK\3\4", [file] * 5  # legacy: magic, version, machine, object, keys; then data
            file.seek(0)
            if zipped:  # torch checks no crc; zipfile does
                archive = zipfile.ZipFile(file)
                sizes = {member.filename: member.file_size for member in archive.infolist() if not member.compress_type}
                if len(sizes) < len(archive.infolist()) or sum(sizes.values()) > Path(path).stat().st_size:
                    raise ValueError("compressed, double or oversized zip members, which torch.save never writes")
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} fails its checksum")
                pickles = [archive.open(name) for name in sizes if name.endswith("data.pkl")]
            for stream in pickles:
                for opcode, argument, position in pickletools.genops(stream):
                    if opcode.name == "GLOBAL" and not PICKLED.fullmatch(argument) or position > INDEX_LIMIT:
                        raise ValueError(f"{argument!r:.99} has no place in a plain checkpoint, or its pickle is too long")
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # damage makes torch raise almost any type
            reason = str(error).split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__
            raise ValueError(f"{path}: not a readable PyTorch file ({reason.splitlines()[0]:.200})") from None


def state_dict(value, path):
    """What read_pickle returned -> {name: tensor}, all of them dense, on the CPU, and no larger than the file."""
    size = Path(path).stat().st_size
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path}: holds a {type(value).__name__}, not a dict of tensors")
    for name, tensor in value.items():
        if (not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided
                or tensor.is_meta or max(tensor.nbytes, tensor.untyped_storage().nbytes()) > size):
            raise ValueError(f"{path}: entry {name!r:.200} is not a plain tensor that fits the file")
    return {name: tensor.detach() for name, tensor in value.items()}


def read_sharded(path):
    """model.safetensors.index.json or pytorch_model.bin.index.json, shards beside it -> {name: tensor}."""
    folder, tensors, files = Path(path).parent, {}, read_json(path).get("weight_map")
    for file in files.values() if isinstance(files, dict) else [files]:
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", file):
            raise ValueError(f'{path}: needs "weight_map": {{tensor: .safetensors or .bin file beside it}}, found {file!r:.100}')
    if absent := sorted({file for file in files.values() if not (folder / file).is_file()}):
        raise FileNotFoundError(f"{path}: missing shards {', '.join(absent):.500}")
    for shard in sorted({folder / file for file in files.values()}):
        tensors |= read_safetensors(shard) if shard.suffix == ".safetensors" else state_dict(read_pickle(shard), shard)
    if absent := sorted(files.keys() - tensors):
        raise ValueError(f"{path}: its shards lack {', '.join(absent):.500}")
    return tensors


BITS = np.arange(32, dtype=np.uint32)
TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    TABLE = TABLE >> 1 ^ (TABLE & 1) * np.uint32(0x82F63B78)


def masked_crc32c(data):
    """Bytes -> CRC-32C rotated right by 15, plus 0xa282ead8. b"123456789": plain e3069283, masked 5e7b2aae. 1 MB in 0.03 s.

    The bytes fill w rows of w; one numpy step moves every row on by a byte. 32 more rows start from one bit each and read zeros: they
    end as the map "w zero bytes later", which chains the rows. 54641f64 leads from 0 to the ffffffff that CRC-32C starts from.
    """
    data = np.frombuffer(b"\x54\x64\x1f\x64" + data, np.uint8)
    w, crc = math.isqrt(len(data) - 1) + 1, np.uint32(0)
    rows, state = np.zeros((w + 32, w), np.uint8), np.append(np.zeros(w, np.uint32), np.uint32(1) << BITS)
    rows[:w].reshape(-1)[-len(data):] = data
    for column in rows.T:
        state = TABLE[(state ^ column) & 255] ^ state >> 8
    for row in state[:w]:
        crc = row ^ np.bitwise_xor.reduce(state[w:][crc >> BITS & 1 == 1])
    crc = int(crc) ^ 0xFFFFFFFF
    return (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF


def take(stream, count):  # the next bytes, exactly so many
    if len(data := stream.read(min(count, 1 << 40))) != count:
        raise ValueError("cut short")
    return data


def varint(stream):
    """Seven bits a byte, low ones first, the high bit says that more follow: ac 02 -> 300."""
    value = 0
    for shift in range(0, 70, 7):
        byte = take(stream, 1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number of more than ten bytes")


def proto_fields(message):
    """Protocol buffer -> (tag, value) pairs; tag = 8 * field + wire type (0 varint, 1 eight bytes, 2 counted bytes, 5 four bytes)."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        wire = (tag := varint(stream)) & 7
        yield tag, take(stream, varint(stream) if wire == 2 else {1: 8, 5: 4}[wire]) if wire else varint(stream)


def snappy(data):
    """Decompress: 05 | 04 'a' 'b' | 0a 02 00 says "length 5; literal ab; 3 bytes from 2 back" -> ababa"""
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
        if not 0 <= start < len(out):
            raise ValueError("a copy from outside")
        out += (out[start:start + count] * count)[:count]  # it may overlap itself
    if len(out) != length:
        raise ValueError(f"{len(out):,} bytes of snappy instead of {length:,} (at most {INDEX_LIMIT:,})")
    return bytes(out)


def table_block(index, handle):
    """Block of a leveldb table at a handle (stream: varint offset, varint size) -> its (key, value) pairs, where it begins and ends."""
    begin, size = varint(handle), varint(handle)
    stream = io.BytesIO(index[begin:begin + size + 5])
    data, kind, crc = take(stream, size), take(stream, 1), take(stream, 4)
    if masked_crc32c(data + kind) != int.from_bytes(crc, "little"):
        raise ValueError(f"the block at byte {begin:,} fails its checksum")
    if kind not in (b"\0", b"\1"):
        raise ValueError(f"block type {kind[0]}; only 0 (raw) and 1 (snappy) are known")
    data, pairs, key = snappy(data) if kind == b"\1" else data, [], b""
    end = len(data) - 4 - 4 * int.from_bytes(data[-4:], "little")  # behind the entries lie restart offsets and their count
    stream = io.BytesIO(data[:max(0, end)])
    while stream.tell() < end:  # a key leaves out what it shares with the one before: ".../beta", then (shared 4, "gamma")
        shared, fresh, length = varint(stream), varint(stream), varint(stream)
        before, key = key, key[:shared] + take(stream, fresh)
        if not shared + fresh == len(key) < 1000 or pairs and key <= before or len(pairs) > 10_000:
            raise ValueError("keys are damaged, out of order or too many")
        pairs.append((key, take(stream, length)))
    return pairs, begin, begin + size


def tensorflow_index(path):
    """P.index -> (number of shards, {variable: its BundleEntryProto as {tag: value}}). Entries leave out values that are zero.

    Tags: 8 dtype, 18 shape, 24 shard, 32 offset, 40 size, 53 masked crc, 58 slices; of the header, under the key "": 8 shards, 16 endianness.
    """
    index, entries, end = mapped(path)[:INDEX_LIMIT + 1].tobytes(), {}, 0
    if index[-8:] != bytes.fromhex("57fb808b247547db"):
        raise ValueError(f"{path}: not the index of a TensorFlow V2 checkpoint: cut short, above {INDEX_LIMIT:,} bytes or without its magic")
    try:
        footer = io.BytesIO(index[-48:])
        varint(footer), varint(footer)  # handle of the metaindex, which is empty; then that of the index
        for _, handle in table_block(index, footer)[0]:
            pairs, begin, stop = table_block(index, io.BytesIO(handle))
            if begin < end or len(entries) > 10_000:
                raise ValueError("blocks overlap or are too many")
            entries, end = entries | {key.decode(): dict(proto_fields(value)) for key, value in pairs}, stop
        header = entries.pop("")
        if header.get(16):
            raise ValueError("big-endian data")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged or foreign TensorFlow index: {error}") from None
    return header.get(8, 0), entries


def read_tensorflow(path):
    """Prefix P, P.index or P.data-... -> {variable: tensor}, in TensorFlow's names and layouts; tensors up to 1 MB are checksummed."""
    prefix = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", str(path))
    (shards, entries), data, used, tensors = tensorflow_index(prefix + ".index"), {}, {}, {}
    for name, entry in entries.items():
        file = f"{prefix}.data-{entry.get(24, 0):05d}-of-{shards:05d}"
        if file not in data:
            data[file], used[file] = mapped(file), 0
        begin, size = entry.get(32, 0), entry.get(40, 0)
        used[file] += size
        try:
            if name[0] == "\0" or 58 in entry:
                raise ValueError("partitioned variables are not supported")
            if max(begin + size, used[file]) > len(data[file]):
                raise ValueError(f"ends at byte {begin + size:,}, the file at {len(data[file]):,}")
            raw = data[file][begin:begin + size]
            if size <= 1 << 20 and masked_crc32c(raw.tobytes()) != int.from_bytes(entry.get(53, b""), "little"):
                raise ValueError("fails its checksum")
            shape = [dict(proto_fields(dim)).get(8, 0) for tag, dim in proto_fields(entry.get(18, b"")) if tag == 18]
            tensors[name] = as_tensor(raw, TENSORFLOW, entry.get(8), shape)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: variable {name!r}: {error}") from None
    return tensors


def from_tensorflow(tensors):
    """TensorFlow names and layouts -> Hugging Face's: kernels are stored (in, out). Slots, global_step and the like are dropped."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(("bert/", "cls/")) and name.rpartition("/")[0] not in tensors:  # bert/pooler/dense/bias/adam_m is a slot
            tensor = tensor.T if name.endswith("/kernel") and tensor.ndim == 2 else tensor
            name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", re.sub(r"(_embeddings)$", r"\1/weight", name))
            name = re.sub(r"/output_(weight|bias)s?$", r"/\1", re.sub(r"/kernel$", "/weight", name))
            renamed[name.replace("/", ".")] = tensor
    return renamed


FAIRSEQ = {"embed_tokens": "embeddings.word_embeddings", "embed_positions": "embeddings.position_embeddings",
           "emb_layer_norm": "embeddings.LayerNorm", "layernorm_embedding": "embeddings.LayerNorm",
           "self_attn.q_proj": "attention.self.query", "self_attn.k_proj": "attention.self.key", "self_attn.v_proj": "attention.self.value",
           "self_attn.out_proj": "attention.output.dense", "self_attn_layer_norm": "attention.output.LayerNorm",
           "fc1": "intermediate.dense", "fc2": "output.dense", "final_layer_norm": "output.LayerNorm"}


def from_fairseq(checkpoint, path, heads=None):
    """fairseq RoBERTa {"model", "args", ..} -> ({Hugging Face name: tensor}, config). Without args the caller must know the heads."""
    renamed, args = {}, checkpoint.get("args")
    for name, tensor in state_dict(checkpoint.get("model"), path).items():
        match = re.fullmatch(r"(?:.*\.)?(?:sentence_encoder\.(?:layers\.(\d+)\.)?|(lm_head)\.)(?:(.+)[._])?(weight|bias)", name)
        layer, head, part, kind = match.groups() if match else (None, None, None, None)
        where = "roberta." if layer is None else f"roberta.encoder.layer.{layer}."
        if head:
            renamed[f"lm_head.{part}.{kind}" if part else {"weight": "lm_head.decoder.weight", "bias": "lm_head.bias"}[kind]] = tensor
        elif part == "self_attn.in_proj" and tensor.ndim:  # 2019's files hold query, key, value in one: 3D rows
            renamed |= {f"{where}attention.self.{x}.{kind}": t for x, t in zip(("query", "key", "value"), tensor.chunk(3), strict=False)}
        elif match and part not in FAIRSEQ:
            raise ValueError(f"{path}: {name} is no part of RoBERTa")
        elif match:
            renamed[f"{where}{FAIRSEQ[part]}.{kind}"] = tensor
    shapes = [renamed[name].shape if name in renamed else () for name in (
        f"roberta.{part}.weight" for part in (FAIRSEQ["embed_tokens"], FAIRSEQ["embed_positions"], "encoder.layer.0.intermediate.dense"))]
    heads = getattr(args, "encoder_attention_heads", heads)
    if any(len(shape) != 2 for shape in shapes) or getattr(args, "activation_fn", "gelu") != "gelu":
        raise ValueError(f"{path}: not a RoBERTa of fairseq: needs embed_tokens, embed_positions, layers.0.fc1, activation gelu")
    if type(heads) is not int or heads < 1 or shapes[0][1] % heads:
        raise ValueError(f"{path}: the number of attention heads is not in it (args); a config.json beside it must tell")
    renamed["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, shapes[0][1])
    layers = sum(name.endswith("self.query.weight") for name in renamed)
    for arg, found in (("encoder_layers", layers), ("encoder_embed_dim", shapes[0][1]), ("encoder_ffn_embed_dim", shapes[2][0])):
        if getattr(args, arg, found) != found:
            raise ValueError(f"{path}: args tell of {arg} {getattr(args, arg)!r:.20}, its tensors of {found}")
    return renamed, {"model_type": "roberta", "vocab_size": shapes[0][0], "hidden_size": shapes[0][1], "num_hidden_layers": layers,
                     "num_attention_heads": heads, "intermediate_size": shapes[2][0], "max_position_embeddings": shapes[1][0],
                     "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}


def rename(tensors, family=None):
    """Hugging Face names in any spelling -> ({canonical name: tensor}, "bert" | "roberta"); a bare encoder needs the family told.

    module.bert.encoder.. -> bert.encoder..; embeddings.LayerNorm.gamma -> bert.embeddings.LayerNorm.weight; position_ids are dropped.
    """
    parts = {name: re.fullmatch(r"(?:module\.|model\.)*(?:(bert|roberta)\.)?(.*)", name, re.DOTALL).groups() for name in tensors}
    told = {{"cls": "bert", "lm_head": "roberta"}.get(rest.partition(".")[0], prefix) for prefix, rest in parts.values()}
    told = {*told, family} - {None}
    if len(told) != 1 or not told <= {"bert", "roberta"}:
        raise ValueError(f"the weights' names or model_type must tell one family, bert or roberta; found {sorted(told) or 'none'}")
    (family,), renamed = told, {}
    for name, (_, rest) in parts.items():
        rest = re.sub(r"(LayerNorm\.)(?:gamma|(beta))$", lambda m: m[1] + ("bias" if m[2] else "weight"), rest)
        twin = rest in ("cls.predictions.decoder.bias", "lm_head.decoder.bias")
        rest = rest.replace("decoder.bias", "bias") if twin else rest
        rest = f"{family}.{rest}" if rest.startswith(("embeddings.", "encoder.", "pooler.")) else rest
        if rest in renamed and not rest.endswith(("cls.predictions.bias", "lm_head.bias")):
            raise ValueError(f"{name} and another name both mean {rest}")
        if not rest.endswith(("position_ids", "token_type_ids")):
            renamed[rest] = tensors[name]
    return renamed, family


def load(path) -> Model:
    """A model in eval mode from an original checkpoint: a Hugging Face folder or one of its weight files, a TensorFlow
    prefix, .index or .data file, or fairseq's model.pt. It holds what the file holds of pooler and masked-LM head.

    Raises ValueError that lists every missing and every mis-shaped tensor; what is left over is printed once."""
    file = weights_file(Path(path))
    if file.suffix == ".index":
        tensors, values = from_tensorflow(read_tensorflow(file.with_suffix(""))), None
    elif file.suffix == ".safetensors":
        tensors, values = read_safetensors(file), None
    elif file.suffix == ".json":
        tensors, values = read_sharded(file), None
    else:
        content = read_pickle(file)
        fairseq = isinstance(content, dict) and "model" in content
        tensors, values = from_fairseq(content, file) if fairseq else (state_dict(content, file), None)
    source = next((f for f in (file.parent / "config.json", *sorted(file.parent.glob("*bert_config.json")))
                   if f.is_file()), None)
    if values is None and source is None:
        raise FileNotFoundError(f"{file.parent}: no config.json (or Google's bert_config.json) beside {file.name}")
    values = read_json(source) if values is None else values
    tensors, family = rename(tensors, values.get("model_type"))
    config = read_config(values, family, source or file)
    prefix = config.model_type
    with torch.device("meta"):  # shapes only; the memory is the checkpoint's
        model = Model(config, pooler=f"{prefix}.pooler.dense.weight" in tensors,
                      mlm=any(name.startswith(("cls.predictions.", "lm_head.")) for name in tensors))
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    wrong = [f"{name} {list(tensors[name].shape)} instead of {list(t.shape)}" for name, t in expected.items()
             if name in tensors and tensors[name].shape != t.shape]
    if missing or wrong:
        raise ValueError(f"{file}: " + "; ".join(f"{what}: {', '.join(names)}" for what, names in
                                                 (("missing", missing), ("wrong shape", wrong)) if names))
    tied = {f"{head}.decoder.{kind}" for head in ("cls.predictions", "lm_head") for kind in ("weight", "bias")}
    if unused := sorted(tensors.keys() - expected - tied):
        print(f"{file.name}: not used: {', '.join(unused[:6])}{f' and {len(unused) - 6} more' if unused[6:] else ''}")
    model.load_state_dict({name: tensors[name].to(torch.float32, copy=True).contiguous() for name in expected},
                          assign=True)
    return model.eval()


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
