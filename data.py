"""From plain text to batches of token ids, for learning which weights of BERT to keep (tamt.py).

    1. Vocabulary      the tokenizer of a model folder
    2. Text            plain text to rows of T token ids, in a memory-mapped file
    3. Batches         the order of the rows, and masked-LM corruption
    Appendix A         tokenizers: the four kinds of files, their settings, export
    Appendix B         texts: where dev begins, what is not as expected, which tokens occur
    Appendix C         files: names, locks, hashes, progress
    Appendix D         download and unpack
    Appendix E         the named models and corpora, with their hashes

    vocabulary = data.vocabulary("folder")                          # of a model: vocab.txt, tokenizer.json, ...
    rows = data.corpus_rows("text.txt", vocabulary, 128, "train")   # token ids (n, 128)
    indices = data.row_indices(len(rows), seed=1, start=0, count=16)  # the first 16 of a random order
    generator = data.random_stream(1, "corruption", 0)              # seed 1, update number 0
    corrupted_ids, is_predicted = data.corrupt(rows[indices], vocabulary, generator)

    chunk    2 MB of a file, as bytes or as text
    piece    a run of 2,000 characters or more (the last may be shorter), tokenised by itself
    block    T - 2 token ids that follow each other in the text
    row      [CLS], a block or a line, [SEP], and padding after a line

Functions that the chapters call but do not define are in the appendices; check_... and refuse_... return nothing, and
warn or raise.
Letters in shapes: n rows, B sequences, T tokens, V vocabulary.
"""

import codecs
import gzip
import hashlib
import json
import lzma
import mmap
import os
import re
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import requests
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

import bert

# ---------------------------------------------------------------------------------------------------
# 1. Vocabulary and tokenizer
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and its special tokens. The tokenizer gives the bare ids of a text: it adds no [CLS] and [SEP],
    and neither cuts nor pads."""
    tokenizer: Tokenizer
    size: int  # V, the largest id + 1; the embedding matrix of a model may have more rows
    pad_id: int
    unknown_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    num_separators: int = 1  # between the two texts of a pair, which tasks have: 1 with BERT, 2 with RoBERTa
    one_row_per_line: bool = False  # True for models whose text is a list of lines, such as proteins
    extra_special_ids: tuple[int, ...] = ()  # special tokens beyond these five, if the model has any

    @property
    def special_ids(self) -> list[int]:
        """The ids that are never to be predicted."""
        five_ids = [self.pad_id, self.unknown_id, self.cls_id, self.sep_id, self.mask_id]
        return five_ids + list(self.extra_special_ids)


def vocabulary(path) -> Vocabulary:
    """The tokenizer of a model folder, or of the folder in which a checkpoint file lies.

    Reads the first of these that exists: tokenizer.json; vocab.txt (WordPiece); vocab.json + merges.txt
    (byte-level BPE); dict.txt (fairseq). A tokenizer.json has its rules in it; for the other files settings that
    change ids, such as do_lower_case, are honoured (appendix A). Raises ValueError for an unsupported setting and for
    a damaged file, FileNotFoundError if there is no vocabulary."""
    folder = Path(path)  # not resolved: in a hub cache the vocabulary lies beside a link, not beside its target
    if not folder.is_dir():
        folder = folder.parent
    settings = read_settings(folder)  # {"do_lower_case": True, "cls_token": "[CLS]", ...}, often empty
    one_row_per_line = bool(settings.get("one_row_per_line"))  # save_vocabulary, in appendix A, writes this

    if (folder / "tokenizer.json").is_file():
        file = folder / "tokenizer.json"
        tokenizer = read_tokenizer_json(file, settings)
    elif (folder / "vocab.txt").is_file():
        file = folder / "vocab.txt"
        refuse_unsupported(file, settings, expected="BertTokenizer")
        tokenizer = wordpiece(file, settings)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        file = folder / "vocab.json"
        refuse_unsupported(file, settings, expected="RobertaTokenizer")
        tokenizer = byte_level_bpe(bert.read_json(file), folder / "merges.txt", file, settings)
    elif (folder / "dict.txt").is_file():
        file = folder / "dict.txt"
        refuse_unsupported(file, settings, expected="RobertaTokenizer")
        tokenizer = fairseq(file, settings)
        # A dict.txt of whole words or single characters is that of a protein model, whose texts are lists of sequences.
        one_row_per_line = one_row_per_line or isinstance(tokenizer.model, models.WordLevel)
    else:
        raise FileNotFoundError(f"{folder}: no tokenizer.json, no vocab.txt, no vocab.json + merges.txt, "
                                "no dict.txt")

    return make_vocabulary(tokenizer, settings, file, one_row_per_line)


def make_vocabulary(tokenizer: Tokenizer, settings: dict, file: Path, one_row_per_line: bool) -> Vocabulary:
    """Finds the special tokens of a tokenizer that was read from `file`, and makes it recognise them in a text, but add
    none."""
    names = special_names(tokenizer, settings, file)  # such as [PAD], [UNK], [CLS], [SEP], [MASK]
    special = special_tokens(names, settings)  # these, and those that only this model has
    add_tokens(tokenizer, special, settings, file.parent)  # without this "[MASK]" in a text becomes [ mask ]
    pad_id, unknown_id, cls_id, sep_id, mask_id = (tokenizer.token_to_id(name) for name in names)

    # The post-processor shows how pairs are separated. Then it is removed: it would add [CLS] and [SEP] to each text.
    num_separators = count_separators(tokenizer, sep_id, file)
    tokenizer.post_processor = None

    return Vocabulary(
        tokenizer=tokenizer,
        size=1 + max(tokenizer.get_vocab().values()),
        pad_id=pad_id,
        unknown_id=unknown_id,
        cls_id=cls_id,
        sep_id=sep_id,
        mask_id=mask_id,
        num_separators=num_separators,
        one_row_per_line=one_row_per_line,
        extra_special_ids=extra_special_ids(tokenizer, names, special),
    )


def wordpiece(file: Path, settings: dict) -> Tokenizer:
    """BERT's tokenizer from vocab.txt, one token a line. A text is cleaned, perhaps lower-cased, and split into words
    at white space and punctuation. Each word is cut, from left to right, into the longest tokens that there are; those
    inside a word begin with ##: "embeddings" -> em ##bed ##ding ##s. A word that cannot be cut becomes [UNK]."""
    tokens = read_lines(file)
    vocab = ids_by_position(tokens, file)
    unknown = name_of_unknown(vocab, settings)  # "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=is_lower_cased(tokens, file, settings),
        strip_accents=settings.get("strip_accents"),  # None: stripped if the text is lower-cased
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


# ---------------------------------------------------------------------------------------------------
# 2. Text to rows of T token ids
# ---------------------------------------------------------------------------------------------------


def corpus_rows(source, vocabulary: Vocabulary, seq_len: int, split: str, one_row_per_line: bool = False) -> np.memmap:
    """The rows of one split, "train" or "dev", of a corpus: token ids (n, T), T = seq_len.

    source: a name of CORPORA, a text file (its last 5 % are dev), or a folder with wiki.train.raw and
    wiki.valid.raw (or .tokens). The text is one stream of tokens, cut into consecutive blocks of T - 2
    between [CLS] and [SEP]; headings and the borders of documents are not treated specially, and the tail is
    dropped (as in TAMT's released code, data/datasets/language_modeling.py). With one_row_per_line, here or in the
    vocabulary, each line of the text is one row, cut or padded to T.

    The rows are kept in the cache, and made only once.

    Raises FileNotFoundError; ValueError if the text gives no row, or no token of it is known."""
    one_row_per_line = one_row_per_line or vocabulary.one_row_per_line
    file, begin, end = find_text(source, split, one_row_per_line)
    path = path_of_rows(file, begin, end, vocabulary, seq_len, one_row_per_line)
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.uint32
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_rows = padded_lines if one_row_per_line else packed_blocks
        with bert.atomic_write(path) as out:  # the file appears only if no error is raised here
            for rows in make_rows(read_text(file, begin, end), vocabulary, seq_len):  # it comes in chunks of 2 MB
                out.write(rows.astype(dtype).tobytes())
            if out.tell() == 0:
                raise ValueError(f"{file}: its {split} text gives no row of {seq_len} tokens")

    num_bytes = path.stat().st_size
    if num_bytes == 0 or num_bytes % (seq_len * np.dtype(dtype).itemsize):
        raise ValueError(f"{path}: damaged; remove it, and it is made again")
    rows = np.memmap(path, dtype, "r").reshape(-1, seq_len)
    check_unknown(rows, vocabulary, file, begin, end)  # warns if many tokens are unknown, and raises if all are
    return rows


def path_of_rows(file, begin, end, vocabulary: Vocabulary, seq_len: int, one_row_per_line: bool) -> Path:
    """The file in the cache for the rows of a text. Its name is a digest of all that they depend on: the bytes of the
    text, the tokenizer, T, one_row_per_line. So equal names mean equal rows, wherever the text is stored. (The code of
    this chapter and of the tokenizers library is not in it: who changes that has to empty the cache.)"""
    made_by = [vocabulary.tokenizer.to_str(), vocabulary.special_ids, seq_len, one_row_per_line]
    digest = hashlib.sha256(json.dumps(made_by).encode())
    for chunk in read_chunks(file, begin, end):
        digest.update(chunk)
    return cache() / "blocks" / f"{digest.hexdigest()[:32]}.bin"


def find_text(source, split: str, one_row_per_line: bool) -> tuple[Path, int, int]:
    """The text of a split: a file, and the bytes at which the text begins and ends in it."""
    if split not in ("train", "dev"):
        raise ValueError(f"split {split!r}: expected train or dev")
    path = Path(source)
    if str(source) in CORPORA:
        path = corpus_folder(str(source))

    if path.is_dir():
        name = "wiki.train" if split == "train" else "wiki.valid"
        for file in (path / f"{name}.raw", path / f"{name}.tokens"):
            if file.is_file():
                return file, 0, file.stat().st_size
        raise FileNotFoundError(f"{path}: no {name}.raw or {name}.tokens in this folder")

    if not path.is_file():
        raise FileNotFoundError(f"corpus {source}: no such file or folder; known names: "
                                f"{', '.join(CORPORA)}, toy")  # tamt.py puts a folder in the place of "toy"
    refuse_other_formats(path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty")

    border = dev_border(path, size, one_row_per_line)  # where the last 5 % begin, between two lines if it has many
    if split == "train":
        return path, 0, border
    return path, border, size


# A long text is tokenised in pieces, many of them at the same time on all cores. The ids of the pieces, one after the
# other, have to be those of the whole text. A word of BERT ends at white space, and a word of RoBERTa begins with its
# space, so it is safe to cut after a word or a punctuation mark, before the white space:
#
#   "one two three"   ->   "one two", " three"
#
# (Lines would not do as pieces, because a text may be a single line.)


def cut_pieces(chunks: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[str]]:
    """Cuts a text that arrives in chunks into pieces: yields one list of pieces for each chunk, then the rest. Where a
    text has no place to cut, a piece is as long as it needs to be."""
    # Some 2,000 characters, up to one before white space: r".{2000,}?\S(?=\s)" in the simplest case (appendix A).
    pattern = piece_pattern(tokenizer)
    rest = ""  # text that is not in a piece yet
    for chunk in chunks:
        rest += chunk
        pieces = []
        begin = 0
        while match := pattern.match(rest, begin):
            pieces.append(match[0])
            begin = match.end()
        rest = rest[begin:]
        yield pieces
    yield [rest]


def encode(texts: list[str], vocabulary: Vocabulary) -> list[list[int]]:
    """The bare ids of each text, computed on all cores."""
    encodings = call_tokenizer(vocabulary.tokenizer.encode_batch_fast, texts)
    return [encoding.ids for encoding in encodings]


def call_tokenizer(method, texts: list[str]) -> list:
    """What a tokenizer makes of texts. method: its encode_batch_fast, or its encode_batch, which also tells where in
    the text each token stands. Raises ValueError if a text cannot be read, as when a word is unknown and a
    tokenizer.json does not say which token stands for such words."""
    try:
        return method(texts, add_special_tokens=False)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"the tokenizer cannot read the text: {str(error):.200}") from None


def packed_blocks(chunks, vocabulary: Vocabulary, seq_len: int):
    """Yields rows (n, T): the stream of tokens in blocks of T - 2 between [CLS] and [SEP]."""
    block_size = seq_len - 2
    rest = np.empty(0, np.int32)  # ids that do not fill a block yet
    for pieces in cut_pieces(chunks, vocabulary.tokenizer):
        ids = [np.array(each, np.int32) for each in encode(pieces, vocabulary)]
        stream = np.concatenate([rest, *ids])
        num_rows = len(stream) // block_size

        rows = np.empty((num_rows, seq_len), np.int32)
        rows[:, 0] = vocabulary.cls_id
        rows[:, 1:-1] = stream[:num_rows * block_size].reshape(num_rows, block_size)
        rows[:, -1] = vocabulary.sep_id
        rest = stream[num_rows * block_size:]
        yield rows


def padded_lines(chunks, vocabulary: Vocabulary, seq_len: int):
    """Yields rows (n, T): each line with text in it, cut to T - 2 tokens, between [CLS] and [SEP], padded."""
    rest = ""  # a line that may go on in the next chunk
    for chunk in chain(chunks, ["\n"]):  # the newline ends the last line
        *lines, rest = (rest + chunk).split("\n")
        lines = [line.strip() for line in lines if line.strip()]

        rows = np.full((len(lines), seq_len), vocabulary.pad_id, np.int32)
        for row, ids in zip(rows, encode(lines, vocabulary), strict=True):
            ids = [vocabulary.cls_id, *ids[:seq_len - 2], vocabulary.sep_id]
            row[:len(ids)] = ids  # row is a view: this fills rows
        yield rows


# ---------------------------------------------------------------------------------------------------
# 3. Batches and masked-LM corruption
# ---------------------------------------------------------------------------------------------------

# row_indices() says which rows are in a batch, and corrupt() makes the input of masked LM from them. tamt.py makes
# tensors of the rows and of the input.


def row_indices(num_rows: int, seed: int, start: int, count: int) -> np.ndarray:
    """The entries start .. start + count - 1 of an endless list of row numbers: epoch after epoch, each row once, in a
    new random order -> (count,) int64.

    In a run with batches of 16 the third update reads row_indices(num_rows, seed, 32, 16)."""
    indices = []
    for position in range(start, start + count):
        epoch, place = divmod(position, num_rows)
        indices.append(epoch_order(num_rows, seed, epoch)[place])
    return np.array(indices)


@lru_cache(2)  # a batch may begin in one epoch and end in the next
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return random_stream(seed, "order", epoch).permutation(num_rows)


def corrupt(input_ids, vocabulary: Vocabulary, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masked-LM corruption of input_ids (B, T).

    Each token that is not special (so no [UNK], either) is to be predicted with probability 0.15, independently of the
    others. Of these tokens 80 % become [MASK], 10 % a random id of the whole vocabulary, special ones included, and
    10 % stay as they are.

    -> corrupted ids (B, T) int64; is_predicted (B, T) bool. The targets are input_ids[is_predicted]."""
    is_special = np.isin(input_ids, vocabulary.special_ids)
    is_predicted = (generator.random(input_ids.shape) < 0.15) & ~is_special

    fate = generator.random(input_ids.shape)
    random_ids = generator.integers(vocabulary.size, size=input_ids.shape)
    is_masked = is_predicted & (fate < 0.8)
    is_random = is_predicted & (fate >= 0.8) & (fate < 0.9)

    corrupted_ids = np.where(is_masked, vocabulary.mask_id, input_ids)
    corrupted_ids = np.where(is_random, random_ids, corrupted_ids)
    return corrupted_ids, is_predicted


# The uses of random_stream() in all modules. The position of a purpose is part of its seed, so this list may grow at
# its end only.
PURPOSES = (
    "order",  # of the rows, or of the examples of a task
    "corruption",  # of the rows, for masked LM
    "masks",  # random ones (tamt.py)
    "limit",  # which training examples --limit leaves (finetune.py)
    "tickets",  # random Super Tickets (finetune.py)
)


def random_stream(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A random generator of its own for each purpose. `keys`, such as the number of the epoch or of the update, tell
    the uses of a purpose apart (all of one purpose have the same number of keys). So an update draws the same numbers
    whether or not the run was resumed."""
    return np.random.default_rng([seed, PURPOSES.index(purpose), *keys])


# ---------------------------------------------------------------------------------------------------
# Appendix A: tokenizers: the four kinds of files, their settings, export. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------

# The special tokens of BERT's and of RoBERTa's tokenizers, and what settings call them, in the same order.
WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BPE_SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
SPECIAL_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


# The files, beside wordpiece() in chapter 1.


def read_tokenizer_json(file: Path, settings: dict) -> Tokenizer:
    """The tokenizers library's own format. The file may ask to cut and pad each text. That is switched off, since rows
    and pairs of sentences are made here. Raises ValueError if the settings beside it contradict one of its steps, since
    transformers follows now the one, now the other."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{file}: the tokenizers library cannot read it ({str(error):.200})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    rules = json.loads(tokenizer.to_str())
    if rules["model"].get("dropout"):
        raise ValueError(f"{file}: with dropout {rules['model']['dropout']} it splits words at random; expected null")
    names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
             "tokenize_chinese_chars": "handle_chinese_chars", "add_prefix_space": "add_prefix_space"}
    for step in steps_of(rules["normalizer"]) + steps_of(rules["pre_tokenizer"]):
        if step["type"] == "BertNormalizer" and step["strip_accents"] is None:
            step["strip_accents"] = step["lowercase"]
        if step["type"] == "Lowercase":
            step["lowercase"] = True
        if step["type"] == "StripAccents":
            step["strip_accents"] = True
        for setting, name in names.items():
            if setting in settings and name in step and bool(settings[setting]) != step[name]:
                raise ValueError(f"{file}: {name} is {json.dumps(step[name])}, but tokenizer_config.json has {setting} "
                                 f"{json.dumps(settings[setting])}; make the two agree")
    return tokenizer


def count_separators(tokenizer: Tokenizer, sep_id: int, file: Path) -> int:
    """How many separators stand between the texts of a pair. BERT's vocab.txt stands for one, RoBERTa's vocab.json for
    two. A tokenizer.json shows it, if it adds special tokens at all; else the name of the separator tells."""
    if file.name == "vocab.txt":
        return 1
    if file.name == "vocab.json":
        return 2
    if tokenizer.post_processor is not None:
        num_separators = tokenizer.encode("", "").ids.count(sep_id) - 1  # of a pair of empty texts; one is at the end
        if num_separators >= 0:
            return 2 if num_separators > 1 else 1
    return 2 if tokenizer.id_to_token(sep_id) == "</s>" else 1


def piece_pattern(tokenizer: Tokenizer) -> re.Pattern:
    """Matches a piece, as cut_pieces cuts a text: 2,000 characters or more, as few as possible, before white space.

    A piece must not end at the last character of an added token, such as the ] of [MASK], since the white space may
    belong to that token. If a tokenizer puts a space before a text that lacks one, no piece may begin with a tab or a
    newline: then cuts are made before spaces only. And if tokens may cross white space, nothing is cut."""
    rules = json.loads(tokenizer.to_str())  # its tokenizer.json
    added_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    if not splits_at_white_space(rules) or any(token.split() != [token] for token in added_tokens):
        return re.compile("(?!)")  # matches nothing

    pre_tokenizer_steps = steps_of(rules["pre_tokenizer"])
    adds_space = any(step.get("add_prefix_space") or step["type"] == "Metaspace" for step in pre_tokenizer_steps)
    white_space = " " if adds_space else " \\t\\n"
    last_characters = {variant[-1] for token in added_tokens for variant in (token, token.lower(), token.upper())}
    not_last = re.escape("".join(sorted(last_characters)))
    return re.compile(rf".{{2000,}}?[^\s{not_last}](?=[{white_space}])", re.DOTALL)


def splits_at_white_space(rules: dict) -> bool:
    """Whether no token of a text crosses a place between a word and the white space behind it. True for the tokenizers
    of BERT and RoBERTa, and for others whose steps are known to leave such places alone."""
    harmless = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Precompiled"}
    if not {step["type"] for step in steps_of(rules["normalizer"])} <= harmless:
        return False
    for step in steps_of(rules["pre_tokenizer"]):
        if step["type"] in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit"):
            return True  # what follows sees single words
        if step["type"] == "ByteLevel":
            return step["use_regex"]
        if step["type"] == "Metaspace":
            return step["split"]
        if step["type"] not in ("Digits", "Punctuation"):
            return False
    return False


def steps_of(rule: dict | None) -> list[dict]:
    """The steps of a normalizer or a pre-tokenizer, which may be a sequence of others."""
    if rule is None:
        return []
    if rule["type"] != "Sequence":
        return [rule]
    members = rule.get("normalizers") or rule.get("pretokenizers") or []
    return [step for member in members for step in steps_of(member)]


def is_lower_cased(words: list, file: Path, settings: dict) -> bool:
    """Whether text is to be lower-cased.

    1. The settings say it (do_lower_case).
    2. No word of the vocabulary has a capital: yes.
    3. There is a tokenizer_config.json that does not say: yes, as transformers does it.
    4. There is no tokenizer_config.json: no.

    In the cases 2 to 4 a printed line says what was decided, and why."""
    if "do_lower_case" in settings:
        return bool(settings["do_lower_case"])

    capitalised = None
    for word in words:
        is_special = word[:1] + word[-1:] in ("[]", "<>")  # [CLS], [unused7]
        if word != word.lower() and not is_special:
            capitalised = word
            break

    if capitalised is None:
        print(f"{file}: no settings for its case; no word has a capital, so text is lower-cased")
        return True
    if (file.parent / "tokenizer_config.json").is_file():
        print(f"{file}: tokenizer_config.json does not say do_lower_case, so text is lower-cased, as "
              f"transformers does it, and words such as {capitalised!r} never occur")
        return True
    print(f"{file}: no settings for its case; words such as {capitalised!r} have capitals, so text keeps "
          "its case")
    return False


def byte_level_bpe(vocab: dict, merges_file: Path, file: Path, settings: dict) -> Tokenizer:
    """RoBERTa's tokenizer, from {token: id} and a file with the pairs of tokens to merge, one a line, in order.

    Tokens are spelled in bytes, where Ġ stands for a space: " dog" -> Ġdog. `file`, where the ids come from, is
    named in errors."""
    ids = list(vocab.values())
    if any(type(token_id) is not int for token_id in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"{file}: ids are not 0 .. {len(ids) - 1}, each once")

    merges = []
    for line in read_lines(merges_file):
        if line.strip() and not line.startswith("#version"):
            merges.append(tuple(line.split(" ")))
    try:
        tokenizer = Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # a line that is no pair of tokens
        raise ValueError(f"{merges_file}: {str(error):.200}") from None

    add_prefix_space = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def fairseq(file: Path, settings: dict) -> Tokenizer:
    """The tokenizer of a fairseq model. Each line of dict.txt has a symbol and its count: "13 850314647".

    Ids 0 to 3 are <s> <pad> </s> <unk>, then come the lines, then <mask>. (The last lines may be called
    madeupword0000 and so on: they fill the matrix up.) Symbols are of one of three kinds; see below."""
    symbols = [line.split(" ")[0] for line in read_lines(file) if line.strip()]
    if "<mask>" not in symbols:
        symbols.append("<mask>")

    # Numbers, in the released RoBERTa: those that GPT-2's encoder.json gives to its tokens. Line 0 is 13, which
    # stands for ".", so "." has id 4. encoder.json and vocab.bpe lie beside dict.txt or are fetched.
    num_numbers = sum(symbol.isdecimal() for symbol in symbols)
    are_numbers = num_numbers > len(symbols) / 2  # madeupword0000 is not one
    if are_numbers:
        encoder_file, merges_file = gpt2_files(file.parent)
        token_of = {str(number): token for token, number in bert.read_json(encoder_file).items()}
        tokens = [token_of.get(symbol, symbol) for symbol in symbols]
        vocab = ids_by_position(["<s>", "<pad>", "</s>", "<unk>", *tokens], file)
        return byte_level_bpe(vocab, merges_file, file, settings)

    # Pieces of a sentencepiece model: only that model could split a text into them.
    sentencepiece = sorted(file.parent.glob("*.model"))
    if sentencepiece:
        raise ValueError(f"{file}: its symbols are pieces of {sentencepiece[0].name}, and sentencepiece "
                         "models are not supported; a tokenizer.json made by transformers is")

    # Words, which stand between white space in the text; or, if all are one character long, such as amino acids,
    # each character of the text, and white space means nothing.
    vocab = ids_by_position(["<s>", "<pad>", "</s>", "<unk>", *symbols], file)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain_symbols = [symbol for symbol in symbols if not symbol.startswith(("<", "madeupword"))]
    if all(len(symbol) == 1 for symbol in plain_symbols):
        characters = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), characters])
    return tokenizer


def gpt2_files(folder: Path) -> list[Path]:
    """GPT-2's encoder.json and vocab.bpe: both beside dict.txt, else from the cache."""
    beside = [folder / file.name for file in GPT2_BPE]
    if all(path.is_file() for path in beside):
        return beside
    return [fetch(file.urls, cache() / "gpt2_bpe" / file.name, file.size, file.sha256) for file in GPT2_BPE]


def ids_by_position(tokens: list[str], file: Path) -> dict[str, int]:
    """{token: its position in the list}. Raises ValueError for an empty token and for one that occurs twice."""
    vocab = {}
    for number, token in enumerate(tokens):
        if not token:
            raise ValueError(f"{file}: token number {number} from 0 is empty")
        if token in vocab:
            raise ValueError(f"{file}: token {token!r} occurs twice, as number {vocab[token]} and "
                             f"{number} from 0")
        vocab[token] = number
    return vocab


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 file without their ends. A byte order mark and Windows' line ends change nothing.
    (str.splitlines would split at rarer characters, too, which are tokens of some vocabularies.)"""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8 text") from None
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


# The settings. A special token is spelled "[CLS]" or {"content": "[CLS]", ...} in them.

SETTING_TYPES = {  # of the settings that are not themselves tokens; null counts as absent
    "do_lower_case": bool,
    "do_basic_tokenize": bool,
    "strip_accents": bool,
    "tokenize_chinese_chars": bool,
    "add_prefix_space": bool,
    "one_row_per_line": bool,
    "never_split": list,
    "added_tokens_decoder": dict,
    "additional_special_tokens": (list, dict),
    "extra_special_tokens": (list, dict),
}


def read_settings(folder: Path) -> dict:
    """The settings of a tokenizer, from three files, merged as transformers merges them.

    tokenizer_config.json has most of them; config.json may have a tokenizer_class. special_tokens_map.json
    overrules both and adds its extra_special_tokens to theirs, unless tokenizer_config.json has an
    added_tokens_decoder: then it lists all tokens itself, and the map is not read."""
    settings = {}
    if (folder / "tokenizer_config.json").is_file():
        settings |= bert.read_json(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") is None and (folder / "config.json").is_file():
        settings["tokenizer_class"] = bert.read_json(folder / "config.json").get("tokenizer_class")
    settings = checked_settings(settings, folder)

    if (folder / "special_tokens_map.json").is_file() and "added_tokens_decoder" not in settings:
        tokens = checked_settings(bert.read_json(folder / "special_tokens_map.json"), folder)
        listed = []
        for key in ("extra_special_tokens", "additional_special_tokens"):
            listed += token_list(settings.get(key))
        if listed:
            tokens.pop("additional_special_tokens", None)
            tokens["extra_special_tokens"] = listed + token_list(tokens.get("extra_special_tokens"))
        settings |= tokens

    if settings.get("split_special_tokens"):
        raise ValueError(f"{folder}: the tokenizer setting split_special_tokens is not supported")
    return settings


def checked_settings(settings: dict, folder: Path) -> dict:
    """The settings that are there. Raises ValueError if one has a value that it cannot have: a text such as "false"
    would count as true."""
    settings = {key: value for key, value in settings.items() if value is not None}
    for key, expected in SETTING_TYPES.items():
        if key in settings and not isinstance(settings[key], expected):
            raise ValueError(f"{folder}: the tokenizer setting {key} cannot be {settings[key]!r:.80}")
    return settings


def token_list(tokens) -> list:
    """A list of tokens, or a dict of named ones, or nothing -> a list."""
    if isinstance(tokens, dict):
        return list(tokens.values())
    return list(tokens or [])


def refuse_unsupported(file: Path, settings: dict, expected: str):
    """Only the original files of BERT's and RoBERTa's tokenizers are read: others have files of the same
    names and other rules."""
    name = settings.get("tokenizer_class", expected)
    if name not in (expected, f"{expected}Fast"):
        raise ValueError(f"{file}: tokenizer_class {name} is not supported, only {expected}, or any class "
                         "beside a tokenizer.json")
    if settings.get("do_basic_tokenize") is False:
        raise ValueError(f"{file}: the tokenizer setting do_basic_tokenize false is not supported")

    never_split = {str(token) for token in settings.get("never_split", ())}
    if never_split - {*WORDPIECE_SPECIALS, *BPE_SPECIALS}:
        raise ValueError(f"{file}: the tokenizer setting never_split is not supported")


def special_tokens(names: list[str], settings: dict) -> list[str | dict]:
    """The special tokens that the settings name, and the usual five, in transformers' order; some of them twice."""
    roles = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
    for key in settings:
        if key.endswith("_token") and key not in roles:
            roles.append(key)  # a special token that only this model has
    special = [settings[role] for role in roles if isinstance(settings.get(role), (str, dict))]

    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    return [*special, *names, *token_list(extra)]


def add_tokens(tokenizer: Tokenizer, special: list, settings: dict, folder: Path):
    """Tells the tokenizer which tokens are looked for in the text before it is split into words.

    Without this the text "[MASK]" would become [ mask ]. In transformers' order: the tokens of
    tokenizer_config.json or added_tokens.json by their ids, then the special tokens. A token that the vocabulary lacks
    gets the next free id."""
    special_contents = {token_content(token) for token in special}

    numbered_tokens = {}
    if "added_tokens_decoder" in settings:
        for token_id, token in settings["added_tokens_decoder"].items():
            is_marked = isinstance(token, dict) and bool(token.get("special"))
            is_special = is_marked or token_content(token) in special_contents
            numbered_tokens[token_number(token_id, folder)] = added_token(token, is_special)
    elif (folder / "added_tokens.json").is_file():
        for content, token_id in bert.read_json(folder / "added_tokens.json").items():
            is_special = content in special_contents
            token = AddedToken(content, special=is_special, normalized=not is_special)
            numbered_tokens[token_number(token_id, folder)] = token

    tokens = [token for _, token in sorted(numbered_tokens.items())]
    tokens += [added_token(token, True) for token in special]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens:
        if token.content not in known:
            tokenizer.add_tokens([token])
            known.add(token.content)

    for token_id, token in numbered_tokens.items():
        found = tokenizer.token_to_id(token.content)
        if found != token_id:
            raise ValueError(f"{folder}: added token {token.content!r} should have id {token_id}, but has "
                             f"{found}: the files do not belong together")


def token_number(number: str | int, folder: Path) -> int:
    if not str(number).isdecimal():
        raise ValueError(f"{folder}: tokenizer settings: {number!r:.80} is no id of a token")
    return int(number)


def added_token(token: str | dict, special: bool) -> AddedToken:
    """The files spell an added token as "[E1]" or as {"content": "[E1]", "lstrip": false, ...}."""
    options = {"special": special}
    if isinstance(token, dict):
        for key in ("lstrip", "rstrip", "single_word", "normalized"):
            options[key] = bool(token.get(key, False))
    return AddedToken(token_content(token), **options)


def token_content(token: str | dict) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(f"tokenizer settings: {str(token):.80} is no token")
    return content


def special_families(has_token, settings: dict) -> list[dict[str, str]]:
    """{role: name} of BERT's and of RoBERTa's special tokens, but only of the families that have a token for each role
    that the settings leave open; of both if none has. has_token: tells whether a name is in the vocabulary."""
    families = [dict(zip(SPECIAL_ROLES, names, strict=True)) for names in (WORDPIECE_SPECIALS, BPE_SPECIALS)]
    unnamed = [role for role in SPECIAL_ROLES if role not in settings]
    return [family for family in families if all(has_token(family[role]) for role in unnamed)] or families


def name_of_unknown(vocab: dict, settings: dict) -> str:
    """What a vocab.txt calls [UNK]."""
    names = [family["unk_token"] for family in special_families(vocab.__contains__, settings)]
    usual = next((name for name in names if name in vocab), "[UNK]")
    return token_content(settings.get("unk_token", usual))


def extra_special_ids(tokenizer: Tokenizer, names: list[str], special: list) -> tuple[int, ...]:
    """The ids of the special tokens beyond the five of these names."""
    contents = {token_content(token) for token in special}
    extra_ids = []
    for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        if token.content not in names and (token.special or token.content in contents):
            extra_ids.append(token_id)
    return tuple(extra_ids)


def special_names(tokenizer: Tokenizer, settings: dict, file: Path) -> list[str]:
    """The names of the five special tokens in the order of SPECIAL_ROLES.

    The settings may name them; the others are all BERT's ([PAD] ...) or all RoBERTa's (<pad> ...), or, if neither
    are all there, some of each. Raises ValueError if one is not in the vocabulary."""
    families = special_families(lambda name: tokenizer.token_to_id(name) is not None, settings)
    names = []
    for role in SPECIAL_ROLES:
        candidates = [family[role] for family in families]
        if role in settings:
            candidates = [token_content(settings[role])]
        found = [name for name in candidates if tokenizer.token_to_id(name) is not None]
        if not found:
            num_tokens = tokenizer.get_vocab_size()
            raise ValueError(f"{file}: no {' or '.join(candidates)} among {num_tokens} tokens")
        names.append(found[0])
    return names


# The export.


def save_vocabulary(vocabulary: Vocabulary, folder, model_type: str, max_tokens: int, num_token_types: int = 2):
    """Writes the tokenizer as files that transformers' AutoTokenizer and vocabulary() above read alike.

    tokenizer.json carries everything. A plain BERT or RoBERTa tokenizer gets its original files, too.
    Any other one is announced as PreTrainedTokenizerFast, since transformers would take the words of
    tokenizer.json and the rules of a BertTokenizer otherwise. model_type: "bert" or "roberta";
    max_tokens: the longest text; num_token_types: how many the model tells apart."""
    folder = Path(folder)
    tokenizer = Tokenizer.from_str(vocabulary.tokenizer.to_str())  # a copy
    settings = {"model_max_length": max_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    added_tokens = tokenizer.get_added_tokens_decoder()
    names = [added_tokens[token_id].content for token_id in vocabulary.special_ids]
    settings |= dict(zip(SPECIAL_ROLES, names[:5], strict=True))
    if names[5:]:
        settings["additional_special_tokens"] = names[5:]
    marks_second_text = num_token_types > 1 and vocabulary.num_separators == 1
    if marks_second_text:  # PreTrainedTokenizerFast would leave the token types out
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if vocabulary.one_row_per_line:
        settings["one_row_per_line"] = True  # transformers ignores it

    for stale in ("special_tokens_map.json", "added_tokens.json"):  # of another tokenizer, which would be read, too
        (folder / stale).unlink(missing_ok=True)
    normalizer = tokenizer.normalizer
    pre_tokenizer = tokenizer.pre_tokenizer
    if model_type == "bert" and marks_second_text and is_plain_bert(tokenizer):
        tokenizer.model.save(str(folder))  # vocab.txt
        settings["tokenizer_class"] = "BertTokenizer"
        settings["do_lower_case"] = normalizer.lowercase
        settings["strip_accents"] = normalizer.strip_accents
        settings["tokenize_chinese_chars"] = normalizer.handle_chinese_chars
    if model_type == "roberta" and vocabulary.num_separators == 2 and is_plain_roberta(tokenizer):
        tokenizer.model.save(str(folder))  # vocab.json, merges.txt
        settings["tokenizer_class"] = "RobertaTokenizer"
        settings["add_prefix_space"] = pre_tokenizer.add_prefix_space

    cls_name = settings["cls_token"]
    sep_name = settings["sep_token"]
    second_type = 1 if marks_second_text else 0
    pair = f"{cls_name}:0 $A:0 {sep_name}:0 $B:{second_type} {sep_name}:{second_type}"
    if vocabulary.num_separators == 2:
        pair = f"{cls_name}:0 $A:0 {sep_name}:0 {sep_name}:0 $B:0 {sep_name}:0"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls_name}:0 $A:0 {sep_name}:0",
        pair=pair,
        special_tokens=[(cls_name, vocabulary.cls_id), (sep_name, vocabulary.sep_id)],
    )

    with bert.atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    with bert.atomic_write(folder / "tokenizer_config.json") as file:
        file.write(json.dumps(settings, indent=1).encode() + b"\n")


def is_plain_bert(tokenizer: Tokenizer) -> bool:
    """Whether transformers' BertTokenizer with three settings splits a text in the same way."""
    model = tokenizer.model
    normalizer = tokenizer.normalizer
    if not isinstance(model, models.WordPiece) or not isinstance(normalizer, normalizers.BertNormalizer):
        return False
    if not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer):
        return False
    is_usual = model.continuing_subword_prefix == "##" and model.max_input_chars_per_word == 100
    return is_usual and normalizer.clean_text


def is_plain_roberta(tokenizer: Tokenizer) -> bool:
    """Whether transformers' RobertaTokenizer, which knows words, merges and add_prefix_space, splits a text in the same
    way."""
    if not isinstance(tokenizer.model, models.BPE) or not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return False
    rules = json.loads(tokenizer.to_str())
    unusual = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "unk_token")
    is_usual = not any(rules["model"].get(name) for name in unusual)
    return is_usual and rules["normalizer"] is None and rules["pre_tokenizer"].get("use_regex", True)


# ---------------------------------------------------------------------------------------------------
# Appendix B: texts: where dev begins, what is not as expected, which tokens occur. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------


def dev_border(path: Path, size: int, one_row_per_line: bool) -> int:
    """The byte of a text file at which its last 5 %, the dev text, begin.

    * A file of 20 lines or more is cut between lines: of 200 lines the last 10 are dev.
    * With one_row_per_line a file of 2 to 19 lines is cut between lines, too: its last line is dev.
    * Any other file is cut at the last space between 90 and 95 % of its bytes; or, if there is none, at 95 % itself."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = size
        while end > 1 and text[end - 1:end].isspace():  # blank lines at the end of the file do not count
            end -= 1
        num_lines = 1 + sum(chunk.count(b"\n") for chunk in read_chunks(path, 0, end))

        if num_lines >= 20 or (one_row_per_line and num_lines > 1):
            num_dev_lines = max(num_lines // 20, 1)
            border = end
            for _ in range(num_dev_lines):
                border = text.rfind(b"\n", 0, border)
            return border + 1

        border = max(end * 95 // 100, 1)
        space = text.rfind(b" ", 0, border)
        if space > end * 9 // 10:
            return space  # the dev text begins with it
        while border < end and text[border] & 0xC0 == 0x80:  # inside a character of several bytes
            border += 1
        return border


TO_TEXT = {  # a line of Python for each format, with a place for the path
    ".jsonl": ("import json; open('text.txt', 'w').writelines("
               r"each['text'] + '\n' for each in map(json.loads, open({!r})))"),
    ".json": ("import json; open('text.txt', 'w').writelines("
              r"each['text'] + '\n' for each in json.load(open({!r})))"),
    ".csv": ("import csv; open('text.txt', 'w').writelines("
             r"each['text'] + '\n' for each in csv.DictReader(open({!r})))"),
}


def refuse_other_formats(path: Path):
    """A table of texts is not read; the error has the line of Python that turns it into text."""
    suffix = path.suffix.lower()
    if suffix in TO_TEXT:
        line = TO_TEXT[suffix].format(str(path))
        raise ValueError(f"{path}: expected plain text, not {path.suffix}; if its texts are called 'text', "
                         f"this line of Python makes text.txt of it: {line}")


def check_unknown(rows, vocabulary: Vocabulary, file: Path, begin: int, end: int):
    """Prints a warning if 5 % of the tokens or more are unknown: on such a text low losses mean nothing.
    Raises ValueError if there is nothing to predict at all."""
    counts = count_tokens(rows, vocabulary)
    counts[[vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id]] = 0
    share = counts[vocabulary.unknown_id] / max(counts.sum(), 1)

    counts[vocabulary.special_ids] = 0
    if counts.sum() == 0:
        raise ValueError(f"{file}: nothing to predict, {share:.0%} of its tokens are unknown to this "
                         "vocabulary")
    if share >= 0.05:
        chunks = read_text(file, begin, end, quiet=True)
        examples = ", ".join(unknown_words(chunks, vocabulary))
        print(f"warning: {file}: {share:.1%} of its tokens are unknown to this vocabulary, such as "
              f"{examples}", file=sys.stderr)


def unknown_words(chunks, vocabulary: Vocabulary) -> list[str]:
    """Three words of a text that become [UNK]."""
    words = []
    for pieces in cut_pieces(chunks, vocabulary.tokenizer):
        for piece in pieces:
            encoding = vocabulary.tokenizer.encode(piece, add_special_tokens=False)
            for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
                word = repr(piece[begin:end][:20])
                if token_id == vocabulary.unknown_id and word not in words:
                    words.append(word)
                if len(words) == 3:
                    return words
    return words


def count_tokens(rows, vocabulary: Vocabulary) -> np.ndarray:
    """How often each id occurs in rows (n, T), counted a million tokens at a time -> (V,) int64."""
    counts = np.zeros(vocabulary.size, np.int64)
    num_rows = max(2**20 // rows.shape[1], 1)
    for begin in range(0, len(rows), num_rows):
        counts += np.bincount(rows[begin:begin + num_rows].ravel(), minlength=vocabulary.size)
    return counts


def tokens_in(rows, vocabulary: Vocabulary) -> np.ndarray:
    """Which ids occur in rows (n, T) -> (V,) bool."""
    return count_tokens(rows, vocabulary) > 0


# ---------------------------------------------------------------------------------------------------
# Appendix C: files. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows has no such locks: two processes must not write one file there at once

CHUNK = 2**21  # bytes that are read at a time


def cache() -> Path:
    """The folder for downloads and rows of token ids: $TAMT_CACHE, else ~/.cache/tamt."""
    return environment_folder("TAMT_CACHE", "~/.cache/tamt")


def environment_folder(variable: str, default) -> Path:
    return Path(os.environ.get(variable) or default).expanduser()


def read_text(file: Path, begin: int, end: int, quiet: bool = False):
    """Yields the text between two bytes of a UTF-8 file in chunks of 2 MB. Windows' line ends become "\\n", and a
    byte order mark is dropped. Prints its progress, unless it is `quiet`."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    progress = Progress(f"tokenising {file.name}", end - begin, quiet=quiet)
    position = begin
    held = ""
    for chunk in read_chunks(file, begin, end):
        is_last = position + len(chunk) == end
        try:
            text = held + decoder.decode(chunk, final=is_last)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: no UTF-8 text near byte {position + error.start}") from None
        held = ""
        if text.count("\0") > len(text) // 10:
            raise ValueError(f"{file}: near byte {position} more than a tenth of its bytes are 0: no UTF-8 text, but "
                             "perhaps UTF-16")
        if text.endswith("\r") and not is_last:  # its "\n" may come with the next chunk
            held = "\r"
            text = text[:-1]
        yield text.replace("\r\n", "\n")
        position += len(chunk)
        progress.add(len(chunk))


def read_chunks(path, begin: int = 0, end: int | None = None):
    """Yields the bytes between two positions of a file in chunks of 2 MB."""
    with open(path, "rb") as file:
        position = file.seek(begin)
        if end is None:
            end = os.path.getsize(path)
        while position < end:
            chunk = file.read(min(end - position, CHUNK))
            if not chunk:
                return  # the file has become shorter
            position += len(chunk)
            yield chunk


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def lock(file):
    """Returns when no other process holds this open file. It is ours until it is closed."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # some network file systems have no locks


def append_line(path, content: dict):
    """Adds one line of JSON, whole or not at all, to a file that other processes may be adding to."""
    line = json.dumps(content).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        lock(file)
        end = file.seek(0, os.SEEK_END)
        if end > 0:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                line = b"\n" + line  # a program was killed in the middle of its line

        try:
            num_written = file.write(line)
            if num_written < len(line):
                raise OSError("no space left")
        except OSError as error:
            file.truncate(end)
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error


class Progress:
    """Says every 5 seconds, and at the end of more than a megabyte, how far something is and how long
    it takes."""

    def __init__(self, name: str, size: int, done: int = 0, quiet: bool = False):
        self.name = name
        self.size = size  # in bytes, 0: unknown
        self.done = done
        self.done_before = done
        self.start_time = time.monotonic()
        self.print_time = self.start_time
        self.quiet = quiet

    def add(self, num_bytes: int):
        self.done += num_bytes
        now = time.monotonic()
        is_large = self.size > 1_000_000
        is_end = is_large and self.done == self.size
        if self.quiet or not (is_end or now - self.print_time > 5):
            return

        self.print_time = now
        rate = (self.done - self.done_before) / max(now - self.start_time, 0.001)
        text = f"{self.done / 1e6:.1f} MB"
        if self.size:
            seconds_left = (self.size - self.done) / max(rate, 1)
            text = f"{self.done / 1e6:.1f} of {self.size / 1e6:.1f} MB, {seconds_left:.0f} s left"
        print(f"{self.name}: {text}, {rate / 1e6:.1f} MB/s", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------
# Appendix D: download and unpack. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------

AGENT = "tamt/1.0 (reference implementation of task-agnostic mask training; python-requests)"
PAUSES = (1, 2, 4, 0)  # seconds after each failed attempt at a mirror
LARGEST = 8 * 10**9  # bytes of a file, and of what is unpacked from an archive
LARGEST_RATIO = 200  # unpacked to packed
HUB = "https://huggingface.co"
GOOGLE = "https://storage.googleapis.com/bert_models"


@dataclass(frozen=True)
class Download:
    """A published file. Where no size and hash were published, what the hub announces is the check."""
    name: str
    size: int | None = None  # in bytes
    sha256: str | None = None
    urls: tuple[str, ...] = ()  # where it is: several mirrors, tried in order; none for a file of a hub repository


class TryAgain(OSError):
    """A download failed in a way that may pass."""


def fetch(urls, path, size: int | None = None, sha256: str | None = None) -> Path:
    """`path`, downloaded if it is not there, from the first of the mirrors `urls` that delivers what is
    expected.

    The bytes gather in path.part. The next attempt, mirror or run continues that file if there is a
    hash to tell that the pieces belong together. A file that was put at `path` by hand is checked, too.

    Raises OSError with each URL and its error if none delivers, ValueError if the file that is there is
    not the expected one. $HF_ENDPOINT takes the place of the hub in `urls`."""
    urls = [urls] if isinstance(urls, str) else list(urls)
    path = Path(path)
    by_hand = f"put the file at {path} by hand"
    if path.exists():
        check_file(path, size, sha256, by_hand)
        return path
    if is_offline():
        raise OSError(f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so {urls[0]} is not fetched: "
                      f"{by_hand}")

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(path.parent / ".lock", "w") as lock_file:
        lock(lock_file)
        if path.exists():  # another process was faster
            return path
        if sha256 and part.exists() and file_sha256(part) == sha256:
            os.replace(part, path)  # a run was killed when only the name was missing
            return path

        errors = {}
        for url in urls:
            for pause in PAUSES:
                try:
                    request(url, part, size, sha256)
                    os.replace(part, path)
                    remember_hash(path, sha256)
                    return path
                except (TryAgain, requests.ConnectionError, requests.Timeout,
                        requests.exceptions.ChunkedEncodingError) as error:
                    errors[url] = reason(error)
                    time.sleep(pause)
                except (requests.RequestException, ValueError) as error:  # no further attempt will help
                    errors[url] = reason(error)
                    break
                except OSError as error:
                    error.filename = error.filename or str(path)  # a full disk names no file
                    raise

        if part.exists() and part.stat().st_size == 0:
            part.unlink()
    text = "; ".join(f"{url}: {error}" for url, error in errors.items())
    raise OSError(f"cannot fetch {path.name}: {text}; {by_hand}")


def request(url: str, part: Path, size: int | None, sha256: str | None):
    """Completes the file `part` by one request. Raises TryAgain if another attempt may help, ValueError
    if not, and the errors of requests, of which some may pass."""
    num_bytes = part.stat().st_size if part.exists() else 0
    url, headers = hub_request(url)
    headers["User-Agent"] = AGENT
    headers["Accept-Encoding"] = "identity"  # no packing, so that sizes mean something
    if num_bytes > 0:
        headers["Range"] = f"bytes={num_bytes}-"

    seconds = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or 30)  # between two chunks
    with requests.get(url, headers=headers, stream=True, timeout=(10, seconds)) as answer:
        status = f"{answer.status_code} {answer.reason}"
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise TryAgain(status)
        if answer.status_code not in (200, 206, 416):
            raise ValueError(status)

        # The hub's first answer redirects, and announces the size and of large files the SHA-256.
        for each in [*answer.history, answer]:
            announced = re.search("[0-9a-f]{64}", each.headers.get("X-Linked-Etag", ""))
            if announced:
                sha256 = sha256 or announced[0]
                size = size or int(each.headers.get("X-Linked-Size", 0))

        if answer.status_code == 416 and num_bytes > 0 and file_sha256(part) == sha256:
            return  # nothing was left to send
        if answer.status_code != 200 and not continues(answer, num_bytes, sha256):
            part.unlink(missing_ok=True)
            raise TryAgain(f"{status}: not the range that was asked for")
        if answer.status_code == 200:
            num_bytes = 0  # the server sends the file from its start

        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise ValueError(f"sends {answer.headers['Content-Encoding']}, though it was told not to pack")
        if "text/html" in answer.headers.get("Content-Type", "") and not (size or sha256):
            raise ValueError("sends an HTML page")
        length = int(answer.headers.get("Content-Length", 0))
        if size and length and num_bytes + length != size:
            raise ValueError(f"offers {num_bytes + length} bytes, expected {size}")
        if not size and length:
            size = num_bytes + length

        num_received = receive(answer, part, num_bytes, size)

    if size and num_received < size:
        raise TryAgain(f"breaks off after {num_received} of {size} bytes")
    if sha256:
        found = file_sha256(part)
        if found != sha256:
            part.unlink()
            error = ValueError if num_bytes == 0 else TryAgain  # the bytes before may have been wrong
            raise error(f"has hash {found}, expected {sha256}")


def receive(answer, part: Path, num_bytes: int, size: int | None) -> int:
    """Writes the answer into the file `part`, after its first num_bytes -> how many bytes it then has."""
    progress = Progress(part.stem, size or 0, num_bytes)
    with open(part, "ab" if num_bytes > 0 else "wb") as file:
        for chunk in answer.iter_content(2**16):
            num_bytes += len(chunk)
            if num_bytes > (size or LARGEST):
                file.truncate(0)
                raise ValueError(f"sends more than {size or LARGEST} bytes")
            file.write(chunk)
            progress.add(len(chunk))
    return num_bytes


def continues(answer, num_bytes: int, sha256: str | None) -> bool:
    """Whether a partial answer (206) begins where the file so far ends, and a hash can tell that both
    belong together."""
    content_range = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    if answer.status_code != 206 or content_range is None:
        return False
    return int(content_range[1]) == num_bytes and (sha256 is not None or num_bytes == 0)


def hub_request(url: str) -> tuple[str, dict]:
    """(url, headers): a hub URL moves to $HF_ENDPOINT and gets the token, which requests drops on other
    hosts."""
    if not url.startswith(f"{HUB}/"):
        return url, {}
    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    url = endpoint.rstrip("/") + url.removeprefix(HUB)

    token = os.environ.get("HF_TOKEN", "")
    token_file = environment_folder("HF_TOKEN_PATH", hub_home() / "token")
    if not token and token_file.is_file():
        token = token_file.read_text()
    if not token.strip():
        return url, {}
    return url, {"Authorization": f"Bearer {token.strip()}"}


def hub_home() -> Path:
    cache_home = environment_folder("XDG_CACHE_HOME", "~/.cache")
    return environment_folder("HF_HOME", cache_home / "huggingface")


def is_offline() -> bool:
    values = [os.environ.get(name, "").lower() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    return any(value in ("1", "on", "yes", "true") for value in values)


def reason(error) -> str:
    """An error as one short line; of nested network errors the innermost reason."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    error = getattr(error, "reason", error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def check_file(path: Path, size: int | None, sha256: str | None, by_hand: str):
    """A ValueError if a file that is there is not the published one. It is hashed once; a marker beside
    it remembers that."""
    found_size = path.stat().st_size
    if size and found_size != size:
        raise ValueError(f"{path} has {found_size} bytes, expected {size}: delete it, or {by_hand}")
    if sha256 is None or is_remembered(path, sha256):
        return
    found = file_sha256(path)
    if found != sha256:
        raise ValueError(f"{path} has hash {found}, expected {sha256}: delete it, or {by_hand}")
    remember_hash(path, sha256)


def hash_marker(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def is_remembered(path: Path, sha256: str) -> bool:
    marker = hash_marker(path)
    return marker.is_file() and marker.read_text() == f"{sha256} {path.stat().st_mtime_ns}"


def remember_hash(path: Path, sha256: str | None):
    if sha256 is None:
        return
    try:
        hash_marker(path).write_text(f"{sha256} {path.stat().st_mtime_ns}")
    except OSError:
        pass  # a folder that only others may write; the file is hashed again next time


def unpack(archive, folder, suffixes: tuple = ("",)) -> Path:
    """Unpacks a .zip or .tar.gz into `folder`, if that is not there: the members whose names end in
    `suffixes`.

    `folder` appears when it is complete. Raises ValueError naming the archive if it is damaged or holds
    suspiciously much, OSError for trouble with the disk."""
    folder = Path(folder)
    if folder.exists():
        return folder
    limit = min(LARGEST, 1_000_000 + LARGEST_RATIO * os.path.getsize(archive))
    part = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.part")
    try:
        part.mkdir(parents=True)
        if zipfile.is_zipfile(archive):
            unpack_zip(archive, part, tuple(suffixes), limit)
        else:
            unpack_tar(archive, part, tuple(suffixes), limit)
        os.replace(part, folder)
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
            tarfile.TarError) as error:
        if folder.is_dir():  # another process was faster
            return folder
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"cannot unpack {archive}: {reason(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def unpack_zip(archive, folder: Path, suffixes: tuple, limit: int):
    """zipfile keeps each member inside the folder and compares its checksum."""
    with zipfile.ZipFile(archive) as zipped:
        members = [member for member in zipped.infolist() if member.filename.endswith(suffixes)]
        if sum(member.file_size for member in members) > limit:
            raise ValueError(f"unpacks to more than {limit:,} bytes")
        for member in members:
            zipped.extract(member, folder)


def unpack_tar(archive, folder: Path, suffixes: tuple, limit: int):
    """The filter "data" refuses members that lead out of the folder, links out of it, and devices."""
    if not hasattr(tarfile, "data_filter"):
        raise ValueError("this needs Python 3.11.4 or later; unpack it by hand")
    total = 0
    with gzip.open(archive) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as packed:
            for member in packed:
                total += member.size
                if total > limit:
                    raise ValueError(f"unpacks to more than {limit:,} bytes")
                if member.name.endswith(suffixes):
                    packed.extract(member, folder, filter="data")

        # gzip compares its checksum at the end of the file, which lies behind the end of the last member.
        num_bytes = 1
        while num_bytes > 0:
            num_bytes = len(stream.read(CHUNK))
            total += num_bytes
            if total > limit:
                raise ValueError("goes on after its last member")


# ---------------------------------------------------------------------------------------------------
# Appendix E: the named models and corpora. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedModel:
    """A repository of the Hugging Face hub, and those of its files that are needed."""
    repository: str
    files: tuple[Download, ...]
    revision: str = "main"
    archive: str | None = None  # Google's zip of the same weights, if the hub cannot be reached


MODELS = {
    "bert-base": NamedModel(
        repository="google-bert/bert-base-uncased",
        revision="86b5e0934494bd15c9632b12f734a8a67f723594",
        files=(
            Download("config.json", 570,
                     "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20"),
            Download("vocab.txt", 231508,
                     "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            Download("model.safetensors", 440449768,
                     "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"),
        ),
        archive="2018_10_18/uncased_L-12_H-768_A-12.zip",
    ),
    "bert-large": NamedModel(
        repository="google-bert/bert-large-uncased",
        files=(Download("config.json"), Download("vocab.txt"), Download("model.safetensors")),
        archive="2018_10_18/uncased_L-24_H-1024_A-16.zip",
    ),
    "roberta-base": NamedModel(
        repository="FacebookAI/roberta-base",
        revision="e2da8e2f811d1448a5b465c236feacd80ffbac7b",
        files=(
            Download("config.json", None,
                     "ef0185e2aae6e06c5f105a285006952c340e20c7dbf43c86ec82601b13fc45e9"),
            Download("vocab.json", 898823,
                     "9e7f63c2d15d666b52e21d250d2e513b87c9b713cfa6987a82ed89e5e6e50655"),
            Download("merges.txt", 456318,
                     "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
            Download("model.safetensors", 498818054,
                     "5bde1d28afb363d0103324efeb5afc8b2b397fe5e04beabb9b1ef355255ade81"),
        ),
    ),
    "roberta-large": NamedModel(
        repository="FacebookAI/roberta-large",
        files=(Download("config.json"), Download("vocab.json"), Download("merges.txt"),
               Download("model.safetensors")),
    ),
}
SMALL_BERTS = {
    "tiny": "L-2_H-128_A-2",
    "mini": "L-4_H-256_A-4",
    "small": "L-4_H-512_A-8",
    "medium": "L-8_H-512_A-8",
}
for short_name, sizes in SMALL_BERTS.items():
    MODELS[f"bert-{short_name}"] = NamedModel(
        repository=f"google/bert_uncased_{sizes}",
        files=(Download("config.json"), Download("vocab.txt"), Download("pytorch_model.bin")),
        archive=f"2020_02_20/uncased_{sizes}.zip",
    )

CORPORA = {  # Amazon's bucket, which other programs name, has been dead since 2024
    "wikitext-103": Download(
        "wikitext-103-raw-v1.zip", 191984949,
        "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        urls=(f"{HUB}/datasets/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip",
              "https://wikitext.smerity.com/wikitext-103-raw-v1.zip"),
    ),
    "wikitext-2": Download(
        "wikitext-2-raw-v1.zip", 4721645,
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
        urls=("https://wikitext.smerity.com/wikitext-2-raw-v1.zip",),
    ),
}

GPT2_BPE = (  # fairseq ships RoBERTa without these two
    Download(
        "encoder.json", 1042301,
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        urls=("https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/encoder.json",),
    ),
    Download(
        "vocab.bpe", 456318,
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        urls=("https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/vocab.bpe",),
    ),
)

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index")
ARCHIVES = (".zip", ".tar.gz", ".tgz")


def model_path(name_or_path) -> Path:
    """Where a model lies. Names of MODELS are found or fetched, archives are unpacked.

    A name wins over a folder of that name: call that one ./bert-base. Raises ValueError for a path that
    does not exist, OSError for a model that cannot be fetched."""
    text = os.path.expanduser(name_or_path)
    if text in MODELS:
        return named_model(MODELS[text])
    if text == "toy":
        return cache() / "toy" / "model"  # dev/toy.py makes it

    path = Path(text)
    if path.is_file() and text.lower().endswith(ARCHIVES):
        folder = cache() / "unpacked" / f"{path.name}-{file_sha256(path)[:16]}"
        return folder_with(unpack(path, folder), WEIGHT_FILES)
    is_tensorflow_prefix = os.path.exists(f"{text}.index")
    if not path.exists() and not is_tensorflow_prefix:
        names = ", ".join([*MODELS, "toy"])
        raise ValueError(f"unknown model {text!r}: neither a path nor one of {names}")
    return path


def named_model(model: NamedModel) -> Path:
    """The folder of a named model: from the hub, else from Google's zip, which stays if it was fetched
    once."""
    if model.archive is None:
        return hub_model(model)

    folder = cache() / "models" / Path(model.archive).stem
    if folder.is_dir():
        return folder_with(folder, WEIGHT_FILES)
    try:
        return hub_model(model)
    except OSError as hub_error:
        try:
            zipped = fetch(f"{GOOGLE}/{model.archive}", folder.with_name(f"{folder.name}.zip"))
            return folder_with(unpack(zipped, folder), WEIGHT_FILES)
        except OSError as error:
            raise OSError(f"{hub_error}; {error}") from error


def hub_model(model: NamedModel) -> Path:
    """A folder with the files of a hub repository: the hub's own cache if it has them all, else
    ours."""
    hub_cache = environment_folder("HF_HUB_CACHE", hub_home() / "hub")
    repository = hub_cache / f"models--{model.repository.replace('/', '--')}"
    commit = model.revision
    if (repository / "refs" / model.revision).is_file():
        commit = (repository / "refs" / model.revision).read_text().strip()
    snapshot = repository / "snapshots" / commit
    if all((snapshot / file.name).is_file() for file in model.files):
        return snapshot

    folder = cache() / "models" / f"{model.repository.replace('/', '--')}@{model.revision[:7]}"
    for file in model.files:
        url = f"{HUB}/{model.repository}/resolve/{model.revision}/{file.name}"
        fetch(url, folder / file.name, file.size, file.sha256)
    return folder


def corpus_folder(name: str) -> Path:
    """The folder with wiki.train.raw and wiki.valid.raw of a corpus in CORPORA, fetched if need be."""
    folder = cache() / "corpora" / name
    if not folder.exists():
        file = CORPORA[name]
        zipped = fetch(file.urls, folder.with_name(f"{name}.zip"), file.size, file.sha256)
        unpack(zipped, folder)
    return folder_with(folder, ("wiki.train.raw",))


def folder_with(folder: Path, endings: tuple) -> Path:
    """The highest folder with a file that ends so: archives come with and without a top folder."""
    found = []
    for path in folder.rglob("*"):
        if path.name.endswith(endings) and not path.name.startswith("."):  # ._model.bin is macOS's
            found.append(path.parent)
    if not found:
        raise ValueError(f"{folder} holds no file *{' or *'.join(endings)}")
    return min(found, key=lambda each: (len(each.parts), each))
