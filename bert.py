"""BERT and RoBERTa as in their papers. Reads four formats of their original checkpoints, and writes one.

Read it beside "Attention Is All You Need" (Vaswani et al. 2017), section 3, and "BERT: Pre-training of Deep
Bidirectional Transformers" (Devlin et al. 2019), section 3. RoBERTa (Liu et al. 2019) has the same layers, but
counts positions in another way (Embeddings), and has another classifier.

    1. The network      embeddings and L layers; heads for masked words, classes and answers
    2. Checkpoints      load() and save()
    Appendix A          the steps of load(): finding the files, names, config, checks
    Appendix B          files, and the checkpoint formats: safetensors, PyTorch, TensorFlow, fairseq
    Appendix C          attention on a CPU

    model = bert.load("folder")                             # a checkpoint as published
    all_hidden_states = model(input_ids, attention_mask)    # a list: the embeddings, then each layer's output
    logits = model.mlm_logits(all_hidden_states[-1])        # (B, T, V), if the checkpoint has a masked-LM head
    bert.save("copy", model.config, model.state_dict(), "ForMaskedLM")  # a folder that transformers loads

Modules are called what published checkpoints call them (bert.encoder.layer.0.attention.self.query), so a
Hugging Face file needs no table of names; the price is a few branches where BERT and RoBERTa have different
names for the same thing. Left out is the head for next-sentence prediction. The parts of a BERT with a masked-LM head:

    bert.embeddings
    bert.encoder.layer.0, .1, ...
        attention.self             query, key and value
        attention.output           a matrix, the residual connection, LayerNorm
        intermediate, output       the feed-forward network: its first matrix; its second one, and the same end
    bert.pooler                    in front of the classifier
    cls.predictions                the masked-LM head

key_mask, (B, 1, 1, T) bool, is the attention mask as layers take it: True at keys that may be attended to. Letters in
shapes: B sequences; T tokens; D hidden size (each token has one vector of D numbers, its hidden state); H heads; L
layers; V vocabulary; C classes.
"""

import argparse
import io
import json
import math
import os
import re
import zipfile
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------
# 1. The network
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The sizes of a model, under the names of config.json. Fields without a default must be in config.json.
    The defaults are BERT's; for RoBERTa load() puts in RoBERTa's."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    model_type: str = "bert"  # or "roberta"
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    @property
    def max_tokens(self) -> int:
        """The longest sequence. RoBERTa's positions begin at row pad + 1, so its 514 rows serve 512 tokens."""
        if self.model_type == "roberta":
            return self.max_position_embeddings - self.pad_token_id - 1
        return self.max_position_embeddings


class Embeddings(nn.Module):
    """The sum of three embeddings of each token: its word, its token type (first or second text), its position."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.config = config

    def forward(self, input_ids, token_type_ids):  # (B, T), (B, T) or None -> (B, T, D)
        words = self.word_embeddings(input_ids)
        positions = self.position_embeddings(self.position_ids(input_ids))
        if token_type_ids is None:
            token_types = self.token_type_embeddings.weight[0]  # (D,): everything is segment 0
        else:
            token_types = self.token_type_embeddings(token_type_ids)

        return self.dropout(self.LayerNorm(words + token_types + positions))

    def position_ids(self, input_ids):  # (B, T) -> (T,) or (B, T)
        if self.config.model_type == "bert":
            return torch.arange(input_ids.shape[1], device=input_ids.device)

        # RoBERTa counts real tokens from pad + 1 on, and padding stays at position pad (= 1):
        #   input_ids   <s>  The  cat  </s>  <pad>  <pad>
        #   positions    2    3    4    5      1      1
        pad = self.config.pad_token_id
        is_token = input_ids != pad
        return is_token.cumsum(dim=1) * is_token + pad


class SelfAttention(nn.Module):
    """The H attention heads of a layer: the context vectors of each token, concatenated."""
    kept_dims = None  # set by finetune.py where it cuts heads out: (D,) bool, which rows of the matrices are left

    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(D, D)
        self.value = nn.Linear(D, D)
        self.head_size = D // config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(self, hidden_states, key_mask):  # (B, T, D), (B, 1, 1, T) or None -> (B, T, H * head size)
        query = self.split_heads(self.query(hidden_states))  # (B, H, T, head size)
        key = self.split_heads(self.key(hidden_states))
        value = self.split_heads(self.value(hidden_states))

        # softmax(query @ key^T / sqrt(head size)) @ value, with dropout on the softmax -> (B, H, T, head size)
        dropout_prob = self.dropout_prob if self.training else 0.0
        if dropout_prob > 0 and query.device.type == "cpu":
            context = attention_with_dropout_on_a_cpu(query, key, value, key_mask, dropout_prob)  # faster (appendix C)
        else:
            context = F.scaled_dot_product_attention(query, key, value, key_mask, dropout_prob)
        return context.transpose(1, 2).flatten(start_dim=2)

    def split_heads(self, x):  # (B, T, H * head size) -> (B, H, T, head size)
        # -1 is H, or less in a layer from which finetune.py has removed heads.
        return x.unflatten(2, (-1, self.head_size)).transpose(1, 2)


class DenseAddNorm(nn.Module):
    """The end of both sub-layers ("Add & Norm"): LayerNorm(sub-layer input + dropout(dense(x))). In attention, dense is
    the matrix W^O of Vaswani et al., in the feed-forward network the second of its two matrices."""
    is_skipped = False  # set by finetune.py where it prunes a whole feed-forward network: only the residual is left

    def __init__(self, input_size: int, config: Config):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, sublayer_input):  # (B, T, input size), (B, T, D) -> (B, T, D)
        if self.is_skipped:
            return self.LayerNorm(sublayer_input)
        return self.LayerNorm(sublayer_input + self.dropout(self.dense(x)))


class Attention(nn.Module):
    """The first sub-layer. Checkpoints call its inner module `self`: attention.self.query.weight."""

    def __init__(self, config: Config):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = DenseAddNorm(config.hidden_size, config)

    def forward(self, hidden_states, key_mask):
        context = self.self(hidden_states, key_mask)
        return self.output(context, hidden_states)


class Intermediate(nn.Module):
    """The first half of the feed-forward network, which makes the hidden states wider. The second half, which makes
    them narrow again, is a DenseAddNorm: the `output` of the layer (class Layer)."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states):  # (B, T, D) -> (B, T, intermediate size)
        return F.gelu(self.dense(hidden_states))  # the exact GELU, with erf


class Layer(nn.Module):
    """Self-attention, then the feed-forward network:

        attended = LayerNorm(x + W^O attention(x))
        output   = LayerNorm(attended + W_2 gelu(W_1 attended))
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = DenseAddNorm(config.intermediate_size, config)

    def forward(self, hidden_states, key_mask):  # (B, T, D), (B, 1, 1, T) or None -> (B, T, D)
        attended = self.attention(hidden_states, key_mask)
        wide = self.intermediate(attended)  # (B, T, intermediate size)
        return self.output(wide, attended)


class Encoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, embedded, key_mask):  # (B, T, D), (B, 1, 1, T) or None -> list of L + 1 tensors (B, T, D)
        all_hidden_states = [embedded]
        for layer in self.layer:
            all_hidden_states.append(layer(all_hidden_states[-1], key_mask))
        return all_hidden_states


class Pooler(nn.Module):
    """The input of BERT's classifier: the last hidden state of [CLS] through a dense layer and tanh."""
    is_fresh = False  # finetune.py sets it where a checkpoint has no pooler, and a random one is trained

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, last_hidden_state):  # (B, T, D) -> (B, D)
        return torch.tanh(self.dense(last_hidden_state[:, 0]))


class Backbone(nn.Module):
    """Embeddings and encoder; checkpoints call this part `bert` or `roberta`. They count BERT's pooler as part of it,
    so it is made here, but only class_logits() calls it."""

    def __init__(self, config: Config, with_pooler: bool):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        if with_pooler:
            self.pooler = Pooler(config)

    def forward(self, input_ids, attention_mask, token_type_ids):
        key_mask = None
        if attention_mask is not None:
            key_mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T): the same for all heads and queries
        embedded = self.embeddings(input_ids, token_type_ids)
        return self.encoder(embedded, key_mask)


class MaskedLMHead(nn.Module):
    """One logit for each word of the vocabulary: dense, GELU, LayerNorm, and a last matrix with a bias, which
    checkpoints call the decoder. The matrix is that of the word embeddings, unless a checkpoint has one of its own;
    forward() gets it as an argument, so that it is a parameter of the embeddings alone.

    BERT and RoBERTa have the same head under different names: cls.predictions.transform.dense, lm_head.dense."""

    is_fresh = False  # tamt.py sets it where a checkpoint has no such head, and a random one is trained

    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        dense = nn.Linear(D, D)
        layer_norm = nn.LayerNorm(D, config.layer_norm_eps)
        if config.model_type == "roberta":
            self.dense = dense
            self.layer_norm = layer_norm
        else:
            self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": layer_norm})
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = None
        if not config.tie_word_embeddings:
            self.decoder = nn.Linear(D, config.vocab_size, bias=False)
        self.model_type = config.model_type

    def forward(self, hidden_states, word_embeddings):  # (..., D), (V, D) -> (..., V)
        if self.model_type == "roberta":
            dense = self.dense
            layer_norm = self.layer_norm
        else:
            dense = self.transform["dense"]
            layer_norm = self.transform["LayerNorm"]

        x = layer_norm(F.gelu(dense(hidden_states)))
        decoder_weight = word_embeddings if self.decoder is None else self.decoder.weight
        return F.linear(x, decoder_weight, self.bias)


class RobertaClassifier(nn.Module):
    """RoBERTa's classifier on <s>. RoBERTa was pre-trained without a pooler."""

    def __init__(self, config: Config, num_labels: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, last_hidden_state):  # (B, T, D) -> (B, C)
        x = self.dropout(last_hidden_state[:, 0])
        x = self.dropout(torch.tanh(self.dense(x)))
        return self.out_proj(x)


class Model(nn.Module):
    """The backbone and its heads. load() restores the pooler and the masked-LM head; a caller adds the others:
    add_classifier() before class_logits(), add_span_head() before span_logits().

    A new model has random weights, BERT's initialisation. The pooler serves BERT's class_logits() alone, and a RoBERTa
    needs none."""

    def __init__(self, config: Config, with_pooler: bool = True, with_mlm_head: bool = True):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.hidden_dropout_prob)  # in front of BERT's classifier
        self.add_module(config.model_type, Backbone(config, with_pooler))  # self.bert or self.roberta
        self.apply(self.initialise)
        if with_mlm_head:
            self.add_mlm_head()  # which initialises it

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """All hidden states: the embedding output, then the output of each layer.

        input_ids (B, T) int64; attention_mask (B, T), True or 1 at tokens and False or 0 at padding, None
        without padding; token_type_ids (B, T), None for all 0 -> list of L + 1 tensors (B, T, D).
        Raises ValueError if T exceeds config.max_tokens."""
        num_tokens = input_ids.shape[1]
        if num_tokens > self.config.max_tokens:
            raise ValueError(f"{num_tokens} tokens, but the model has {self.config.max_tokens} positions")
        return self.backbone(input_ids, attention_mask, token_type_ids)

    def mlm_logits(self, hidden_states):  # (..., D) -> (..., V)
        word_embeddings = self.backbone.embeddings.word_embeddings.weight
        return self.mlm_head(hidden_states, word_embeddings)

    def class_logits(self, last_hidden_state):  # (B, T, D) -> (B, C)
        if self.config.model_type == "roberta":
            return self.classifier(last_hidden_state)
        pooled = self.backbone.pooler(last_hidden_state)
        return self.classifier(self.dropout(pooled))

    def span_logits(self, last_hidden_state):  # (B, T, D) -> (B, T, 2): start and end of an answer in the text
        return self.qa_outputs(last_hidden_state)

    @property
    def backbone(self) -> Backbone:
        return getattr(self, self.config.model_type)

    @property
    def mlm_head(self) -> MaskedLMHead | None:
        if self.config.model_type == "roberta":
            return getattr(self, "lm_head", None)
        return self.cls["predictions"] if hasattr(self, "cls") else None

    @property
    def has_pooler(self) -> bool:
        return hasattr(self.backbone, "pooler")

    def add_mlm_head(self):
        head = self.new_module(MaskedLMHead, self.config)
        if self.config.model_type == "roberta":
            self.lm_head = head
        else:
            self.cls = nn.ModuleDict({"predictions": head})

    def add_pooler(self):
        self.backbone.pooler = self.new_module(Pooler, self.config)

    def add_classifier(self, num_labels: int):
        if self.config.model_type == "roberta":
            self.classifier = self.new_module(RobertaClassifier, self.config, num_labels)
        else:
            self.classifier = self.new_module(nn.Linear, self.config.hidden_size, num_labels)

    def add_span_head(self):
        self.qa_outputs = self.new_module(nn.Linear, self.config.hidden_size, 2)

    def new_module(self, make, *arguments) -> nn.Module:
        """A module with BERT's initialisation, drawn from torch's global generator. It is on the model's
        device, and in training or eval mode as the model is."""
        device = self.backbone.embeddings.word_embeddings.weight.device
        with torch.device(device):
            module = make(*arguments)
        return module.apply(self.initialise).train(self.training)

    def initialise(self, module):
        """Weights from a normal distribution (Google's code cuts off its tails), biases 0. A LayerNorm begins with
        weight 1 and bias 0, as torch makes it."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------
# 2. Checkpoints
# ---------------------------------------------------------------------------------------------------


def load(path) -> Model:
    """A model in eval mode from an original checkpoint, with the pooler and the masked-LM head that it holds.

    path is one of
        a Hugging Face folder, or one of its weight files
        the prefix of a TensorFlow checkpoint, or its .index or .data file
        fairseq's model.pt

    All weights become fp32. A printed line names tensors that the model does not use. (Those of optimizers, buffers,
    and the classifiers of TensorFlow and fairseq are left out without a word.) Raises FileNotFoundError, or a
    ValueError that says which file is wrong, and how, such as the tensors that are missing, misshapen or not finite."""
    # Read the weights and the settings. Most formats keep the settings in a config.json beside the weights; a fairseq
    # file holds its own, and a config.json beside it, if there is one, wins.
    weights_file = find_weights(Path(path))
    tensors, settings = read_weights(weights_file)
    config_file = find_config(weights_file)
    if config_file is not None:
        settings = settings | read_json(config_file)
    elif not settings:
        raise FileNotFoundError(f"{weights_file.parent}: no config.json or bert_config.json beside "
                                f"{weights_file.name}")

    # Settle the family, the names, the config, and whether the decoder is the embedding matrix. Inside these `with`
    # blocks an error of a parser becomes a ValueError that begins with the name of the file.
    with file_named_in_errors(weights_file):
        family = find_family(tensors, settings)
        tensors = normalise_names(tensors, family)
    with file_named_in_errors(config_file or weights_file):
        config = read_config(settings, family)
        check_number_of_layers(config, tensors)
    if config_file is not None and settings.get("layer_norm_eps") is None and family == "roberta":
        print("config.json does not say layer_norm_eps: 1e-05, as in the original RoBERTa")
    config, tensors = settle_decoder(config, tensors)

    # Build the model without memory of its own ("meta") and compare it with the file.
    head_prefix = MLM_HEADS[family]  # "cls.predictions" or "lm_head"
    has_pooler = any(name.startswith(f"{family}.pooler.") for name in tensors)
    has_mlm_head = any(name.startswith(f"{head_prefix}.") for name in tensors)
    with torch.device("meta"):
        model = Model(config, has_pooler, has_mlm_head)
    expected = model.state_dict()
    with file_named_in_errors(weights_file):
        check_tensors(expected, tensors)
    unused = sorted(tensors.keys() - expected.keys())
    if unused:
        print(f"{weights_file.name}: not used: {shorten(unused)}")

    # Put the tensors in. They are copied, since they may be views of the file, and assigned, since meta tensors
    # cannot be written into.
    weights = {name: tensors[name].to(torch.float32, copy=True).contiguous() for name in expected}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def save(folder, config: Config, tensors: dict, architecture: str, **extra):
    """Writes config.json and model.safetensors, which transformers' from_pretrained loads.

    tensors: {name: tensor}, such as model.state_dict(). (Where the masked-LM head has a decoder of its own,
    transformers wants the bias under two names.)
    architecture: the class of transformers that should load them, without the family's name: "ForMaskedLM".
    extra: further fields of config.json, such as the names of the classes.
    Raises OSError if the disk fails; each of the two files is then either the old or the new one, complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    class_name = config.model_type.title() + architecture  # BertForMaskedLM
    settings = asdict(config) | {"architectures": [class_name], "hidden_act": "gelu"} | extra
    head = MLM_HEADS[config.model_type]
    if f"{head}.decoder.weight" in tensors:
        tensors = tensors | {f"{head}.decoder.bias": tensors[f"{head}.bias"]}
    # First the new config is written beside the old one; the flush makes a full disk fail here, before anything is
    # replaced. Then the weights are replaced, and the config last, when this block ends. So whoever finds a new config
    # finds the new weights, too.
    with atomic_write(folder / "config.json") as file:
        file.write(f"{json.dumps(settings, indent=1)}\n".encode())
        file.flush()
        write_safetensors(folder / "model.safetensors", tensors)


# ---------------------------------------------------------------------------------------------------
# Appendix A: the steps of load(), in its order. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------

# The masked-LM head of BERT and of RoBERTa, and families that look alike and are not read.
MLM_HEADS = {"bert": "cls.predictions", "roberta": "lm_head"}
OTHER_FAMILIES = ("albert", "camembert", "deberta", "distilbert", "electra", "mpnet", "xlm-roberta")
# What training programs put in front of a name: DistributedDataParallel, Lightning, and torch.compile,
# which may also have wrapped a module inside: bert._orig_mod.pooler.dense.bias.
WRAPPERS = re.compile(r"^((module|model|_orig_mod)\.)+|\b_orig_mod\.")
# Names of weight files. A TensorFlow checkpoint is a prefix with several files.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TENSORFLOW_SUFFIX = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")


def find_weights(path: Path) -> Path:
    """The file with the weights: the path itself, the first kind in a folder, or TensorFlow's index.

    Symbolic links are not resolved: in a hub cache they lead to blobs/, where names and config.json are lost."""
    if path.is_dir():
        path = find_weights_in(path)
    index = Path(TENSORFLOW_SUFFIX.sub("", str(path)) + ".index")
    if index.is_file():
        return index
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file or folder")
    if not path.name.endswith((*PICKLE_SUFFIXES, ".safetensors", ".index.json")):
        raise ValueError(f"{path}: not a checkpoint: expected .safetensors, .bin, .pt, .pth, .ckpt or "
                         "TensorFlow's .index")
    return path


def find_weights_in(folder: Path) -> Path:
    patterns = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json", "*.index", "*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.pth"]
    for pattern in patterns:
        files = [file for file in visible_files(folder, pattern) if file.name not in ("mask.pt", "state.pt")]
        if len(files) > 1:
            raise ValueError(f"{folder}: several checkpoints, name one: {shorten([f.name for f in files])}")
        if files:
            return files[0]
    raise FileNotFoundError(f"{folder}: no model.safetensors, pytorch_model.bin, model.pt or "
                            "*.ckpt.index in it")


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Sorted; without the ._bert_model.ckpt.index that macOS writes beside bert_model.ckpt.index."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def read_weights(file: Path) -> tuple[dict, dict]:
    """The tensors under Hugging Face's names, which may still have their older spellings and prefixes; and the
    settings, which only a fairseq file holds ({} for the other formats)."""
    if file.suffix == ".index":
        tensors = read_tensorflow(file)
        with file_named_in_errors(file):
            return from_tensorflow(tensors), {}

    content = {}
    if file.suffix == ".json":
        tensors = read_sharded(file)
    elif file.suffix == ".safetensors":
        tensors = read_safetensors(file)
    else:
        content = read_pickle(file)
        tensors = find_state_dict(content, file)
    with file_named_in_errors(file):
        tensors = merge_pruned(tensors)
        if any(".sentence_encoder." in name for name in tensors):
            return from_fairseq(tensors, content)
    return tensors, {}


def find_config(weights_file: Path) -> Path | None:
    folder = weights_file.parent
    for file in [folder / "config.json", *visible_files(folder, "*bert_config.json")]:
        if file.is_file():
            return file
    return None


def find_family(tensors: dict, settings: dict) -> str:
    """Decides between "bert" and "roberta". Two things may tell: the config, by model_type or, if that is absent, by
    architectures; and the prefixes of the names of the weights. Each may be silent (Google's config has neither field,
    the names of a bare encoder have no prefix), but one has to speak, and if both do they have to agree."""
    families = set()
    if settings.get("model_type"):
        families.add(str(settings["model_type"]))
    elif settings.get("architectures"):
        match = re.match("(Bert|Roberta)(For|Model)", str(settings["architectures"][0]))
        if match:
            families.add(match[1].lower())
    for name in tensors:
        first = WRAPPERS.sub("", name).split(".")[0]
        if first in ("bert", "cls"):
            families.add("bert")
        if first in ("roberta", "lm_head"):
            families.add("roberta")
        if first in OTHER_FAMILIES:
            families.add(first)

    others = families - {"bert", "roberta"}
    if others:
        raise ValueError(f"this is a model of the family {shorten(sorted(others))}; only bert and roberta are read")
    if len(families) != 1:
        found = " and ".join(sorted(families)) or "none"
        raise ValueError(f"the names of the weights ({shorten(list(tensors))}) and model_type in config.json must "
                         f"name one family, bert or roberta; found: {found}")
    return families.pop()


def normalise_names(tensors: dict, family: str) -> dict:
    """Any Hugging Face spelling -> the names of this module.

    module.bert.pooler.dense.bias  ->  bert.pooler.dense.bias
    embeddings.LayerNorm.gamma     ->  bert.embeddings.LayerNorm.weight  (a bare encoder of 2018)
    """
    normalised = {}
    for name, tensor in tensors.items():
        new = WRAPPERS.sub("", name)
        new = new.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        if new.startswith(("embeddings.", "encoder.", "pooler.")):
            new = f"{family}.{new}"
        if new.endswith(("position_ids", "token_type_ids")):
            continue  # buffers of old transformers versions, not weights
        if new in normalised:
            raise ValueError(f"{name} and another name both mean {new}")
        normalised[new] = tensor
    return normalised


def read_config(settings: dict, family: str) -> Config:
    """The fields of a config.json, checked. Old RoBERTa files lack pad_token_id and Google's lack layer_norm_eps; they
    get the values that applied at the time."""
    supported = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for name, value in supported.items():
        if settings.get(name) not in (None, value):
            raise ValueError(f"{name} {settings[name]!r:.50} is not supported; expected {value}")

    values = {}
    if family == "roberta":
        values = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    for field in fields(Config):
        if settings.get(field.name) is not None:
            values[field.name] = settings[field.name]
    values["model_type"] = family

    required = [field.name for field in fields(Config) if field.default is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    for field in fields(Config):
        if field.name in values:
            check_setting(field, values[field.name])

    config = Config(**values)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"num_attention_heads {config.num_attention_heads} does not divide hidden_size "
                         f"{config.hidden_size}")
    if config.pad_token_id >= config.vocab_size or config.max_tokens < 1:
        raise ValueError(f"pad_token_id {config.pad_token_id} leaves no words or no positions")
    return config


def check_setting(field, value):
    smallest = 0 if field.name == "pad_token_id" else 1
    if field.type is int:
        valid = type(value) is int and smallest <= value <= 10**7
        expected = f"a whole number from {smallest} to 10,000,000"
    elif field.type is float:
        valid = type(value) in (int, float) and 0 <= value < 1
        expected = "a number in [0, 1)"
    elif field.type is bool:
        valid = type(value) is bool
        expected = "true or false"
    else:
        return
    if not valid:
        raise ValueError(f"{field.name} is {value!r:.50}; expected {expected}")


def check_number_of_layers(config: Config, tensors: dict):
    """Raises ValueError if the file has fewer layers than the config says. (More are reported as not used.)"""
    numbers = [re.search(r"\.encoder\.layer\.(\d+)\.", name) for name in tensors]
    found = len({match[1] for match in numbers if match})
    if config.num_hidden_layers > found:
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, "
                         f"but the weights have {found} layers")


def settle_decoder(config: Config, tensors: dict) -> tuple[Config, dict]:
    """Decides whether the decoder of the masked-LM head is the matrix of the word embeddings ("tied")
    -> the config with that decision, and the tensors that the model expects then."""
    tensors = dict(tensors)
    head = MLM_HEADS[config.model_type]
    words = f"{config.model_type}.embeddings.word_embeddings.weight"
    decoder = f"{head}.decoder.weight"

    # Newer files hold the bias twice, and decoder.bias is the one that counts.
    if f"{head}.decoder.bias" in tensors:
        tensors[f"{head}.bias"] = tensors.pop(f"{head}.decoder.bias")

    # Only the word embeddings are there: as the config says.
    if decoder not in tensors:
        return config, tensors
    # Only the decoder is there: a tied model stored its one matrix under that name.
    if words not in tensors:
        if config.tie_word_embeddings:
            tensors[words] = tensors.pop(decoder)
        return config, tensors  # an untied one lacks its word embeddings, and check_tensors will say so
    # Both are there and differ: not tied, whatever the config says.
    if not torch.equal(tensors[decoder].float(), tensors[words].float()):
        return replace(config, tie_word_embeddings=False), tensors
    # Both are there and equal: a tied model needs one of them.
    if config.tie_word_embeddings:
        del tensors[decoder]
    return config, tensors


def check_tensors(expected: dict, tensors: dict):
    """Compares names, shapes and kinds of values with the model's; one error lists all that does not fit."""
    missing = []
    wrong_shape = []
    not_numbers = []
    for name, parameter in expected.items():
        if name not in tensors:
            missing.append(name)
            continue
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            wrong_shape.append(f"{name} {list(tensor.shape)} instead of {list(parameter.shape)}")
        elif not tensor.is_floating_point():
            not_numbers.append(f"{name} holds {tensor.dtype}, not floating-point numbers")
        elif not tensor.float().isfinite().all():
            not_numbers.append(f"{name} holds values that are not finite")

    problems = []
    if missing:
        problems.append(f"missing: {shorten(missing)}; the file has: {shorten(sorted(tensors))}")
    if wrong_shape:
        problems.append(f"wrong shape: {shorten(wrong_shape)}")
    if not_numbers:
        problems.append(f"wrong values: {shorten(not_numbers)}")
    if problems:
        raise ValueError("; ".join(problems))


def shorten(names: list[str], limit: int = 4) -> str:
    """a, b, c, d and 7 more: error lines stay readable."""
    text = ", ".join(f"{name:.100}" for name in names[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text


@contextmanager
def file_named_in_errors(file):
    """Inside the with block an error of a parser becomes a ValueError of one line that begins with `file`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, RuntimeError) as error:  # torch raises RuntimeErrors
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{file}: {reason:.600}") from None


# ---------------------------------------------------------------------------------------------------
# Appendix B: files and checkpoint formats. Skip it at a first reading.
#
# The files come from strangers: no code in them runs, and no size that they claim is believed unchecked.
# ---------------------------------------------------------------------------------------------------

# Two functions for files that other modules use, too.


def read_json(path) -> dict:
    """The object in a JSON file. ValueError names the file if it holds anything else."""
    try:
        content = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({str(error):.80})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, not a {type(content).__name__}")
    return content


PART_SUFFIX = ".tamt.part"  # no other program's files end in it, so a run may remove what a killed one has left


@contextmanager
def atomic_write(path):
    """Yields a binary file that takes the place of `path` when the block ends, or leaves no trace of itself.

    On any failure the part file goes and an old `path` stays; trouble with the disk is an OSError that names one of
    the two. The folder must exist."""
    part = Path(f"{path}.{os.urandom(4).hex()}{PART_SUFFIX}")
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


# Bytes to tensors.


def read_bytes(path) -> np.ndarray:
    """A file as uint8 (n,), mapped into memory; writing to it changes a copy, never the file."""
    if Path(path).stat().st_size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, "c")


def tensor_from_bytes(raw, dtype, shape: list) -> torch.Tensor:
    """Little-endian bytes, uint8 (n,) -> a tensor on the same memory where the alignment allows it."""
    valid = all(type(size) is int and 0 <= size < 2**63 for size in shape)
    if not valid or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"{len(raw):,} bytes cannot hold {dtype} of shape {str(shape):.80}")
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()
    return torch.from_numpy(raw).view(dtype).view(shape)


# safetensors:
#
#     8 bytes   N, little-endian
#     N bytes   JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
#     the rest  the tensors, one after the other; offsets count from here

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(path) -> dict[str, torch.Tensor]:
    content = read_bytes(path)
    header_size = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or header_size > len(content) - 8:
        raise ValueError(f"{path}: not a complete safetensors file: {len(content):,} bytes, and a header of "
                         f"{header_size:,}")
    tensors = {}
    with file_named_in_errors(path):
        header = json.loads(content[8:8 + header_size].tobytes())
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, not a JSON object")
        data = content[8 + header_size:]
        header.pop("__metadata__", None)
        covered = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if begin != covered or not begin <= end <= len(data):
                raise ValueError(f"{name:.200}: bytes {begin} to {end} do not follow on {covered}, "
                                 "or are not there")
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise ValueError(f"{name:.200}: dtype {entry['dtype']!r:.20} is not one of "
                                 f"{', '.join(SAFETENSORS_DTYPES)}")
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            tensors[name] = tensor_from_bytes(data[begin:end], dtype, entry["shape"])
            covered = end
        if covered != len(data):
            raise ValueError(f"the last tensor ends at byte {covered:,} of {len(data):,}")
    return tensors


def write_safetensors(path, tensors: dict[str, torch.Tensor]):
    """Wide types come first and the header fills up to a multiple of 8, so that all tensors are aligned."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in ordered:
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end

    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    with atomic_write(path) as file:
        file.write(len(header_bytes).to_bytes(8, "little"))
        file.write(header_bytes)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


# PyTorch pickles, .bin .pt .pth .ckpt: a zip archive, or, before 2020, five pickles in a row and then the numbers.
# torch.load(weights_only=True) reads both and runs no code in them.


def read_pickle(path):
    """The object that torch.save wrote; the caller checks what it is. ValueError if the file is damaged."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                check_archive(archive)
        with torch.serialization.safe_globals([argparse.Namespace]):  # fairseq's settings
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make torch raise almost any type
        # torch's message begins with advice not to be followed here; what was wrong comes after it.
        paragraphs = re.split(r"WeightsUnpickler error: |\n\n+", str(error))
        reason = paragraphs[min(1, len(paragraphs) - 1)].strip() or type(error).__name__
        foreign = re.search(r"GLOBAL (\S+)", reason)
        if foreign:
            reason = f"it holds {foreign[1]:.100}; only tensors and plain values are read"
        raise ValueError(f"{path}: not a readable PyTorch file ({reason.splitlines()[0]:.200})") from None


def check_archive(archive: zipfile.ZipFile):
    """What torch does not check: it would take compressed bytes for the numbers themselves."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise ValueError("a compressed archive; torch.save stores without compression")
    damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} fails its checksum")


def find_state_dict(content, path) -> dict[str, torch.Tensor]:
    """The {name: tensor} in what read_pickle returned: all of it, or an entry of a training checkpoint."""
    if isinstance(content, dict):
        for key in ("model", "state_dict", "model_state_dict"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: entry {name!r:.200} is not a tensor")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{path}: entry {name!r:.200} is sparse or has no values")
        size = max(tensor.nbytes, tensor.untyped_storage().nbytes())
        if size > Path(path).stat().st_size:
            raise ValueError(f"{path}: entry {name!r:.200} claims more bytes than the file has")
    return {name: tensor.detach() for name, tensor in content.items()}


def merge_pruned(tensors: dict) -> dict:
    """What torch.nn.utils.prune splits into weight_orig and weight_mask becomes their product, weight."""
    merged = {}
    for name, tensor in tensors.items():
        if name.endswith("_orig") and f"{name[:-5]}_mask" in tensors:
            mask = tensors[f"{name[:-5]}_mask"]
            if mask.shape != tensor.shape:
                raise ValueError(f"{name[:-5]}_mask has shape {list(mask.shape)} instead of "
                                 f"{list(tensor.shape)}")
            merged[name[:-5]] = tensor * mask
        elif not (name.endswith("_mask") and f"{name[:-5]}_orig" in tensors):
            merged[name] = tensor
    return merged


def read_sharded(path) -> dict[str, torch.Tensor]:
    """model.safetensors.index.json: {"weight_map": {name of a tensor: file beside this one}}."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f'{path}: no "weight_map" of tensors and files')
    tensors = {}
    for shard in sorted({str(file) for file in weight_map.values()}):
        if not re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", shard):
            raise ValueError(f'{path}: "weight_map" must name .safetensors or .bin files beside it, '
                             f"not {shard:.99}")
        file = Path(path).parent / shard
        if file.suffix == ".bin":
            tensors |= find_state_dict(read_pickle(file), file)
        else:
            tensors |= read_safetensors(file)
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise ValueError(f"{path}: its shards lack {shorten(absent)}")
    return tensors


# TensorFlow checkpoints: P.index lists the variables, P.data-00000-of-00001 holds their bytes.
#
# P.index is a leveldb table. Its last 48 bytes are the footer: two handles, zeros, and 8 bytes of magic.
# A handle is (offset, size) of a block. The second one is that of the index block, whose values are the
# handles of the data blocks, whose pairs are (name of a variable, protocol buffer that describes it).
#
#     block:   size bytes | type: 0 raw, 1 snappy | 4 bytes of checksum
#     pair:    bytes of the last key to reuse | length of the rest | length of the value | rest of key | value
#     footer:  handle of the metaindex, which is empty | handle of the index | zeros | magic

TENSORFLOW_MAGIC = bytes.fromhex("57fb808b247547db")
TENSORFLOW_DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 9: torch.int64,
                     10: torch.bool, 14: torch.bfloat16, 19: torch.float16}
# Field numbers of the header (under the empty key) and of a variable's entry; a field that is 0 is left out.
NUM_SHARDS, ENDIANNESS = 1, 2
DTYPE, SHAPE, SHARD, OFFSET, SIZE, CHECKSUM, SLICES = 1, 2, 3, 4, 5, 6, 7
# And of a shape, which is a list of dimensions.
DIMENSION, DIMENSION_SIZE = 2, 1
# Types of a field on the wire.
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
LARGEST_INDEX = 2 << 20  # bytes; BERT-large has less than 50,000


def read_tensorflow(path) -> dict[str, torch.Tensor]:
    """{variable: tensor}, names and layouts as they are, from a prefix P, P.index or P.data-...-of-...."""
    prefix = TENSORFLOW_SUFFIX.sub("", str(path))
    num_shards, entries = read_tensorflow_index(f"{prefix}.index")
    shards = {}
    tensors = {}
    for name, entry in entries.items():
        with file_named_in_errors(f"{prefix}.index: variable {name!r:.200}"):
            file = f"{prefix}.data-{entry.get(SHARD, 0):05d}-of-{num_shards:05d}"
        if file not in shards:
            shards[file] = read_bytes(file)
        with file_named_in_errors(f"{file}: variable {name!r:.200}"):
            tensors[name] = read_variable(entry, shards[file])
    return tensors


def read_variable(entry: dict, data) -> torch.Tensor:
    if SLICES in entry:
        raise ValueError("partitioned variables are not supported")
    begin = entry.get(OFFSET, 0)
    end = begin + entry.get(SIZE, 0)
    if end > len(data):
        raise ValueError(f"ends at byte {end:,} of {len(data):,}: the file is cut short")
    raw = data[begin:end]

    # The checksum takes 0.15 s per megabyte in Python, so only small variables are compared.
    if len(raw) <= 1 << 20:
        checksum = int.from_bytes(entry.get(CHECKSUM, b""), "little")
        if masked_crc32c(raw.tobytes()) != checksum:
            raise ValueError("fails its checksum")

    shape = []
    for field, dimension in read_fields(entry.get(SHAPE, b"")):
        if field == DIMENSION:
            shape.append(dict(read_fields(dimension)).get(DIMENSION_SIZE, 0))
    if entry.get(DTYPE) not in TENSORFLOW_DTYPES:
        raise ValueError(f"dtype {entry.get(DTYPE)} is not one of {', '.join(map(str, TENSORFLOW_DTYPES))}")
    return tensor_from_bytes(raw, TENSORFLOW_DTYPES[entry[DTYPE]], shape)


def read_tensorflow_index(path) -> tuple[int, dict[str, dict]]:
    """P.index -> the number of data files, and {variable: {field number: value}}."""
    index = read_bytes(path)[:LARGEST_INDEX + 1].tobytes()
    entries = {}
    with file_named_in_errors(f"{path}: not a TensorFlow index, or a damaged one"):
        if len(index) > LARGEST_INDEX or index[-8:] != TENSORFLOW_MAGIC:
            raise ValueError("the magic number at its end is missing, or it has over "
                             f"{LARGEST_INDEX:,} bytes")
        footer = io.BytesIO(index[-48:])
        read_handle(footer)
        for _, handle in read_block(index, *read_handle(footer)):
            for key, value in read_block(index, *read_handle(io.BytesIO(handle))):
                entries[key.decode()] = dict(read_fields(value))
        header = entries.pop("")
        if header.get(ENDIANNESS):
            raise ValueError("big-endian data")
    if any(name.startswith("_CHECKPOINTABLE_OBJECT_GRAPH") for name in entries):
        raise ValueError(f"{path}: an object checkpoint of TensorFlow 2; expected one in the layout of "
                         "Google's BERT (bert_model.ckpt), or the model saved by transformers as "
                         "model.safetensors")
    return header.get(NUM_SHARDS, 0), entries


def read_handle(stream) -> tuple[int, int]:
    offset = read_varint(stream)
    size = read_varint(stream)
    return offset, size


def read_block(index: bytes, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """The (key, value) pairs of a block."""
    stream = io.BytesIO(index[offset:offset + size + 5])
    body = read_exactly(stream, size)
    block_type = read_exactly(stream, 1)
    checksum = read_exactly(stream, 4)
    if masked_crc32c(body + block_type) != int.from_bytes(checksum, "little"):
        raise ValueError(f"the block at byte {offset:,} fails its checksum")
    if block_type == b"\1":
        body = decompress_snappy(body)
    elif block_type != b"\0":
        raise ValueError(f"a block of type {block_type[0]}; only 0 (raw) and 1 (snappy) are known")

    # The pairs are followed by a list of restart points, 4 bytes each, and by its length.
    num_restarts = int.from_bytes(body[-4:], "little")
    end = len(body) - 4 - 4 * num_restarts
    stream = io.BytesIO(body[:max(0, end)])
    pairs = []
    key = b""
    while stream.tell() < end:
        # Keys leave out what they share with the last one: "a/beta", then (2, "gamma") for "a/gamma".
        num_shared = read_varint(stream)
        num_new = read_varint(stream)
        value_length = read_varint(stream)
        key = key[:num_shared] + read_exactly(stream, num_new)
        pairs.append((key, read_exactly(stream, value_length)))
    return pairs


def read_fields(message: bytes):
    """A protocol buffer -> pairs (field number, value). A tag is 8 * field number + type on the wire."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        tag = read_varint(stream)
        field = tag >> 3
        wire_type = tag & 7
        if wire_type == VARINT:
            yield field, read_varint(stream)
        elif wire_type == LENGTH_DELIMITED:
            yield field, read_exactly(stream, read_varint(stream))
        elif wire_type == FIXED32:
            yield field, read_exactly(stream, 4)
        elif wire_type == FIXED64:
            yield field, read_exactly(stream, 8)
        else:
            raise ValueError(f"a field of type {wire_type}")


def read_varint(stream) -> int:
    """Seven bits a byte, the low ones first; the high bit says that more follow: ac 02 is 300."""
    number = 0
    for shift in range(0, 70, 7):
        byte = read_exactly(stream, 1)[0]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number
    raise ValueError("a number of more than ten bytes")


def read_exactly(stream, count: int) -> bytes:
    content = stream.read(min(count, LARGEST_INDEX))
    if len(content) != count:
        raise ValueError("cut short")
    return content


def decompress_snappy(content: bytes) -> bytes:
    """The length, then literals and copies of what is already there.

    05 | 04 'a' 'b' | 0a 02 00   says   5 bytes; the literal "ab"; copy 3 from 2 back   ->   ababa"""
    stream = io.BytesIO(content)
    length = read_varint(stream)
    if length > LARGEST_INDEX:
        raise ValueError(f"snappy data of {length:,} bytes; at most {LARGEST_INDEX:,} are read")
    output = bytearray()
    while stream.tell() < len(content):
        tag = read_exactly(stream, 1)[0]
        kind = tag & 3
        count = (tag >> 2) + 1
        if kind == 0:  # a literal; a length above 60 stands in the next 1 to 4 bytes
            if count > 60:
                count = int.from_bytes(read_exactly(stream, count - 60), "little") + 1
            output += read_exactly(stream, count)
            continue

        if kind == 1:
            count = (tag >> 2 & 7) + 4
            distance = (tag >> 5 << 8) | read_exactly(stream, 1)[0]
        else:
            distance = int.from_bytes(read_exactly(stream, 2 * kind - 2), "little")  # 2 or 4 bytes
        begin = len(output) - distance
        if begin < 0 or distance == 0:
            raise ValueError("snappy copies from outside")
        if len(output) + count > length:
            raise ValueError("snappy data are longer than they say")
        for position in range(begin, begin + count):
            output.append(output[position])  # byte by byte, since a copy may overlap itself
    if len(output) != length:
        raise ValueError(f"snappy gives {len(output):,} bytes of {length:,}")
    return bytes(output)


def crc32c_table() -> list[int]:
    table = np.arange(256)
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * 0x82F63B78  # the polynomial of CRC-32C, bits reversed
    return table.tolist()


CRC32C_TABLE = crc32c_table()


def masked_crc32c(content: bytes) -> int:
    """CRC-32C rotated right by 15 bits, plus a282ead8: b"123456789" has e3069283, masked c78ab0e5."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = CRC32C_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    rotated = (crc >> 15) | (crc << 17)
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def from_tensorflow(tensors: dict) -> dict:
    """Google's names -> Hugging Face's. A kernel is (in, out), a Linear's weight (out, in): transposed.

    bert/encoder/layer_0/attention/self/query/kernel  ->  bert.encoder.layer.0.attention.self.query.weight
    bert/embeddings/word_embeddings                   ->  bert.embeddings.word_embeddings.weight
    cls/seq_relationship/output_weights               ->  cls.seq_relationship.weight"""
    renamed = {}
    for name, tensor in tensors.items():
        parent = name.rpartition("/")[0]
        if not name.startswith(("bert/", "cls/", "electra/")) or parent in tensors:
            continue  # global_step, and the optimizer's bert/pooler/dense/bias/adam_m
        if "/group_0/" in name or name.startswith("electra/"):
            raise ValueError(f"{name:.200} belongs to ALBERT or ELECTRA; only BERT is read from "
                             "TensorFlow checkpoints")
        new = re.sub(r"_embeddings$", "_embeddings/weight", name)
        new = re.sub(r"/output_(weight|bias)s?$", r"/\1", new)
        new = re.sub(r"/kernel$", "/weight", new)
        new = new.replace("/layer_", "/layer/").replace("/", ".")
        renamed[new] = tensor.T if name.endswith("/kernel") else tensor
    if not renamed:
        raise ValueError(f"no variable bert/...; the file has: {shorten(sorted(tensors))}")
    return renamed


# fairseq's model.pt: {"model": {name: tensor}, "args": Namespace of the settings}; later files have
# {"cfg": {"model": settings}} in the place of args.

FAIRSEQ_NAMES = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "emb_layer_norm": "embeddings.LayerNorm",
    "layernorm_embedding": "embeddings.LayerNorm",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
FAIRSEQ_PATTERN = re.compile(
    r"\w+\.(?:(?P<head>lm_head)|sentence_encoder(?:\.layers\.(?P<layer>\d+))?)\."
    r"(?:(?P<module>.+)[._])?(?P<kind>weight|bias)")


def from_fairseq(tensors: dict, content: dict) -> tuple[dict, dict]:
    """fairseq's names -> Hugging Face's, and the settings that a config.json would hold.

    decoder.sentence_encoder.layers.0.fc1.weight  ->  roberta.encoder.layer.0.intermediate.dense.weight"""
    renamed = {}
    for name, tensor in tensors.items():
        match = FAIRSEQ_PATTERN.fullmatch(name)
        if match is None:
            continue  # classification_heads, version and the like
        module = match["module"]
        kind = match["kind"]
        prefix = "roberta" if match["layer"] is None else f"roberta.encoder.layer.{match['layer']}"
        if match["head"]:
            renamed[f"lm_head.{module or 'decoder'}.{kind}"] = tensor
        elif module == "self_attn.in_proj":  # in 2019 query, key and value were one matrix (3 D, D)
            thirds = tensor.tensor_split(3)
            for third, projection in zip(thirds, ("query", "key", "value"), strict=True):
                renamed[f"{prefix}.attention.self.{projection}.{kind}"] = third
        elif module in FAIRSEQ_NAMES:
            renamed[f"{prefix}.{FAIRSEQ_NAMES[module]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name} is not a part of RoBERTa")

    num_words, hidden_size = renamed["roberta.embeddings.word_embeddings.weight"].shape
    renamed["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, hidden_size)
    num_layers = sum(name.endswith("self.query.weight") for name in renamed)
    settings = {
        "model_type": "roberta",
        "vocab_size": num_words,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": len(renamed["roberta.encoder.layer.0.intermediate.dense.bias"]),
        "max_position_embeddings": len(renamed["roberta.embeddings.position_embeddings.weight"]),
    }
    options = fairseq_options(content)
    for name, theirs in (("num_attention_heads", "encoder_attention_heads"), ("hidden_dropout_prob", "dropout"),
                         ("attention_probs_dropout_prob", "attention_dropout")):
        if theirs in options:
            settings[name] = options[theirs]
    activation = options.get("activation_fn", "gelu")
    if activation != "gelu":
        raise ValueError(f"activation_fn {activation!r:.50} is not supported; expected gelu")
    return renamed, settings


def fairseq_options(content: dict) -> dict:
    options = content.get("args")
    if options is None:
        options = content.get("cfg")
        if isinstance(options, argparse.Namespace):
            options = vars(options)
        if isinstance(options, dict):
            options = options.get("model", options)
    if isinstance(options, argparse.Namespace):
        return vars(options)
    return options if isinstance(options, dict) else {}


# ---------------------------------------------------------------------------------------------------
# Appendix C: attention on a CPU. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------


def attention_with_dropout_on_a_cpu(query, key, value, key_mask, dropout_prob: float):
    """softmax(query key^T / sqrt(head size)) value, with dropout on the softmax.

    query, key, value (B, H, T, head size); key_mask (B, 1, 1, T) bool or None -> (B, H, T, head size).

    On a CPU torch's own kernel is slow as soon as there is dropout: it draws a random number of 32 bits per
    attention weight, and the weights of a batch do not fit the cache. So a few sequences are computed at a
    time, and dropout takes 16 random bits per weight. A training step of 6 layers of hidden size 384 at 8 x 128 tokens
    takes 0.89 of the time, at 8 x 512 tokens 0.66 (one thread, medians)."""
    B, H, T, head_size = query.shape
    piece_size = max(1, 2**20 // (H * T * T))  # sequences; 2^20 attention weights take 4 MB
    queries = query.split(piece_size)  # split, not slices: backward then gathers the pieces once
    keys = key.split(piece_size)
    values = value.split(piece_size)
    pieces = []
    for index in range(len(queries)):
        products = (queries[index] * head_size**-0.5) @ keys[index].mT  # (b, H, T, T)
        if key_mask is not None:
            is_token = key_mask[index * piece_size:(index + 1) * piece_size]
            products = products.masked_fill_(~is_token, -math.inf)
        dropped = products.softmax(dim=-1) * dropout_mask(products.shape, dropout_prob)
        pieces.append(dropped @ (values[index] * (1 / (1 - dropout_prob))))
    return torch.cat(pieces)


def dropout_mask(shape, dropout_prob: float):
    """uint8, 0 with probability dropout_prob, else 1. Four draws of 16 bits are made from one of 64."""
    num_draws = math.prod(shape)
    bits = torch.empty((num_draws + 3) // 4, dtype=torch.int64).random_(-2**63, None)
    draws = bits.view(torch.int16)[:num_draws].view(shape)  # signed: from -2^15 to 2^15 - 1
    mask = torch.empty(shape, dtype=torch.uint8)  # the product is twice as fast with bytes as with bool
    num_dropped = min(round(2**16 * dropout_prob), 2**16 - 1)  # of the 2^16 values of a draw
    return torch.ge(draws, num_dropped - 2**15, out=mask)
