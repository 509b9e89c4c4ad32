"""GLUE and SQuAD v1.1: what the files hold, how it becomes token ids, how predictions are scored.

    1. The tasks        ten of them, one field a line
    2. GLUE's tables    a row becomes an Example
    3. Token ids        truncation, special tokens, batches
    4. SQuAD            long paragraphs through sliding windows, answers, the official score
    5. Metrics          and the score that a collapsed model would reach
    Appendix A          checks of SQuAD's files
    Appendix B          submission files
    Appendix C          downloads
    Appendix D          tasks of your own

    examples = load_glue("rte", "dev", "glue")                        # Example(text_a, text_b, label)
    sequences = encode(examples, vocabulary, max_len=128)             # (input_ids, token_type_ids) of each
    batch = pad_batch(sequences[:32], vocabulary.pad_id)              # input_ids, attention_mask, token_type_ids
    score(TASKS["rte"], predicted_classes, examples)                  # {"accuracy": 0.66}

    questions = load_squad(find_file(TASKS["squad"], "dev", "squad"))  # Question(id, question, context, answers)
    windows = make_windows(questions, vocabulary)                      # one or more for each question
    sequences = [(window.input_ids, window.token_type_ids) for window in windows]  # in batches, as above
    answers = best_answers(questions, windows, start_logits, end_logits)  # {question id: text}
    squad_scores(answers, questions)                                   # {"em": 81.2, "f1": 88.5}

There is no model here: finetune.py brings one, and makes predicted_classes and the logits (a row for each window) of
all batches together. "The paper" is that of
task-agnostic mask training (tamt.py); run_squad.py is a file of BERT's original code.

Letters in shapes: B sequences, T tokens, n examples, N tokens of a paragraph that one window holds. GLUE's metrics are
fractions (accuracy and f1 from 0 to 1, correlations from -1 to 1); SQuAD's em and f1 are percent, as its
official scorer prints them.
"""

import codecs
import json
import re
import string
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bert
import data

# ---------------------------------------------------------------------------------------------------
# 1. The tasks
# ---------------------------------------------------------------------------------------------------

TSV_FILES = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where the texts of a task are, what is predicted, and the settings for fine-tuning.

    A column is a name in the table's header, its first line, or a number from 0. A table whose columns are all
    given by number has no header. The settings are those of the paper's code (glue_trans.py, squad_trans.py)."""
    name: str
    folder: str  # in GLUE's layout
    predicts: str  # "class", "number", or "span": an answer in a paragraph
    labels: tuple[str, ...] = ()  # the words of the label column; the class id is the position here
    metrics: tuple[str, ...]  # the first one decides which evaluation of a run is its best
    text_columns: tuple[str | int, ...] = ()  # one text or a pair
    label_column: str | int = "label"
    test_text_columns: tuple[str | int, ...] = ()  # if the test file has other columns
    files: dict[str, tuple[str, ...]] = field(default_factory=lambda: TSV_FILES)  # the names a split's file may have
    skips_broken_rows: bool = False  # else a row with too few or too many fields is an error
    epochs: int = 3
    lr: float = 2e-5
    batch_size: int = 32
    max_len: int = 128  # tokens
    eval_every: int = 50  # updates between two evaluations

    @property
    def num_outputs(self) -> int:
        """Outputs of the model's head: one logit per class, one number, or a start and an end logit."""
        if self.predicts == "class":
            return len(self.labels)
        if self.predicts == "number":
            return 1
        return 2


COLA = Task(
    name="cola",
    folder="CoLA",
    predicts="class",
    labels=("0", "1"),
    metrics=("matthews", "accuracy"),
    text_columns=(3,),  # train and dev have no header, test has one
    label_column=1,
    test_text_columns=("sentence",),
)

SST2 = Task(
    name="sst2",
    folder="SST-2",
    predicts="class",
    labels=("0", "1"),
    metrics=("accuracy",),
    text_columns=("sentence",),
)

# MRPC comes as Microsoft's two text files. GLUE's dev set is a part of the first one: the rows whose pair of ids is
# listed in a third file, "dev_ids". If somebody has built GLUE's tables from them already, these are read instead.
MRPC = Task(
    name="mrpc",
    folder="MRPC",
    predicts="class",
    labels=("0", "1"),
    metrics=("accuracy", "f1"),
    text_columns=("#1 String", "#2 String"),
    label_column="Quality",
    files={
        "train": ("train.tsv", "msr_paraphrase_train.txt"),
        "dev": ("dev.tsv", "msr_paraphrase_train.txt"),
        "test": ("test.tsv", "msr_paraphrase_test.txt"),
        "dev_ids": ("mrpc_dev_ids.tsv", "dev_ids.tsv"),
    },
)

STSB = Task(
    name="stsb",
    folder="STS-B",
    predicts="number",  # similarity from 0 to 5
    metrics=("pearson", "spearman"),
    text_columns=("sentence1", "sentence2"),
    label_column="score",
)

QQP = Task(
    name="qqp",
    folder="QQP",
    predicts="class",
    labels=("0", "1"),
    metrics=("accuracy", "f1"),
    text_columns=("question1", "question2"),
    label_column="is_duplicate",
    skips_broken_rows=True,  # line breaks inside a few questions leave two halves of a row
    eval_every=500,
)

# MNLI has two dev sets. "Matched" texts are from the sources of the training set, "mismatched" ones from others. Here
# the accuracy on the matched set decides which evaluation is best. The paper's code stores both accuracies under one
# name, the mismatched one last, so it reports that one. The order of the classes is that of the Hugging Face hub.
MNLI = Task(
    name="mnli",
    folder="MNLI",
    predicts="class",
    labels=("entailment", "neutral", "contradiction"),
    metrics=("accuracy", "accuracy_mm"),  # on dev_matched, and on dev_mismatched
    text_columns=("sentence1", "sentence2"),
    label_column="gold_label",
    files={
        "train": ("train.tsv",),
        "dev": ("dev_matched.tsv",),
        "dev_mm": ("dev_mismatched.tsv",),
        "test": ("test_matched.tsv",),
        "test_mm": ("test_mismatched.tsv",),
        "ax": ("AX.tsv", "diagnostic.tsv"),  # GLUE's diagnostic sentences, without labels
    },
    eval_every=500,
)

QNLI = Task(
    name="qnli",
    folder="QNLI",
    predicts="class",
    labels=("entailment", "not_entailment"),
    metrics=("accuracy",),
    text_columns=("question", "sentence"),
    eval_every=500,
)

RTE = Task(
    name="rte",
    folder="RTE",
    predicts="class",
    labels=("entailment", "not_entailment"),
    metrics=("accuracy",),
    text_columns=("sentence1", "sentence2"),
)

WNLI = Task(
    name="wnli",
    folder="WNLI",
    predicts="class",
    labels=("0", "1"),
    metrics=("accuracy",),
    text_columns=("sentence1", "sentence2"),
)

SQUAD = Task(
    name="squad",
    folder="squad",
    predicts="span",
    metrics=("f1", "em"),
    files={"train": ("train-v1.1.json",), "dev": ("dev-v1.1.json",)},
    epochs=2,
    lr=3e-5,
    batch_size=16,
    max_len=384,
    eval_every=1000,
)

# QQP, QNLI and WNLI are not in the paper and take its settings for GLUE.
ALL_TASKS = (COLA, SST2, MRPC, STSB, QQP, MNLI, QNLI, RTE, WNLI, SQUAD)
TASKS = {task.name: task for task in ALL_TASKS}
TOY = replace(SST2, name="toy")  # a task of the toy's made-up language, in the form of SST-2 (dev/toy.py)


def find_task(name_or_path) -> Task:
    """The task of this name, or the one that a JSON file describes (appendix D).

    A Task is returned as it is. Raises ValueError for an unknown name or a malformed file."""
    if isinstance(name_or_path, Task):
        return name_or_path
    name = str(name_or_path)
    if name.endswith(".json"):
        return read_task(Path(name))
    if name == "toy":
        return TOY
    if name not in TASKS:
        raise ValueError(f"unknown task {name[:60]!r}; known: {', '.join(TASKS)}, toy, or a FILE.json")
    return TASKS[name]


# ---------------------------------------------------------------------------------------------------
# 2. GLUE's tables
# ---------------------------------------------------------------------------------------------------

LABELLED_SPLITS = ("train", "dev", "dev_mm")


class Example(NamedTuple):
    text_a: str
    text_b: str | None = None
    label: int | float | None = None  # class id or number; None in a test file


def load_glue(task, split: str, folder) -> list[Example]:
    """The examples of a split, in the order of the file.

    split: train, dev or test; MNLI has dev_mm, test_mm and ax, too. folder: see find_file(). Raises
    FileNotFoundError with the places looked at, or ValueError with file and line for a malformed row."""
    task = find_task(task)
    path = find_file(task, split, folder)
    has_labels = split in LABELLED_SPLITS
    text_columns = task.text_columns
    if not has_labels and task.test_text_columns:
        text_columns = task.test_text_columns

    rows = read_rows(path)
    where, first_row = next(rows, (path, None))
    if first_row is None:
        raise ValueError(f"{path}: the file is empty")
    text_indices = [find_column(column, first_row, where) for column in text_columns]
    label_index = find_column(task.label_column, first_row, where) if has_labels else None

    # Without a header the first line is a row like all others.
    has_header = any(isinstance(column, str) for column in (*text_columns, task.label_column))
    if not has_header:
        rows = chain([(where, first_row)], rows)
    if path.name == "msr_paraphrase_train.txt":
        rows = mrpc_rows(rows, split, find_file(task, "dev_ids", folder))

    examples = []
    num_skipped = 0
    for where, fields in rows:
        if len(fields) != len(first_row):
            if task.skips_broken_rows and has_labels:  # of a test file every row needs its prediction
                num_skipped += 1
                continue
            raise ValueError(f"{where}: {len(fields)} fields where line 1 has {len(first_row)}")
        texts = [fields[index] for index in text_indices]  # one or two
        label = None
        if has_labels:
            label = read_label(task, fields[label_index], where)
        examples.append(Example(*texts, label=label))

    if num_skipped:
        message = f"{path}: skipped {num_skipped} rows without {len(first_row)} fields"
        print(message, file=sys.stderr)
    if not examples:
        raise ValueError(f"{path}: no rows for {split}")
    return examples


def mrpc_rows(rows, split: str, dev_ids_file: Path):
    """Those rows of MRPC's first file that are in the split, train or dev: both are in this one file."""
    dev_ids = {tuple(ids) for _, ids in read_rows(dev_ids_file)}
    for where, fields in rows:
        is_dev_row = tuple(fields[1:3]) in dev_ids  # the columns "#1 ID" and "#2 ID"
        if is_dev_row == (split == "dev"):
            yield where, fields


def find_file(task: Task, split: str, folder) -> Path:
    """The file of a split, in folder/<the task's folder>, as in GLUE's layout, or in `folder` itself.

    Raises ValueError if the task has no such split, FileNotFoundError with the places looked at."""
    if split not in task.files:
        raise ValueError(f"task {task.name} has no split {split[:40]!r}; it has {', '.join(task.files)}")

    places = []
    for base in (Path(folder) / task.folder, Path(folder)):
        for name in task.files[split]:
            places.append(base / name)
    for place in places:
        if place.is_file():
            return place
    distinct = dict.fromkeys(str(place) for place in places)  # an absolute name is the same place twice
    raise FileNotFoundError(f"task {task.name}: no {split} file; expected {' or '.join(distinct)}")


def read_rows(path: Path):
    r"""Yields ("FILE line N", fields) for each line of a tab-separated file.

    Only "\n" ends a line, only "\t" ends a field, and nothing is quoted:

        "No, he said\t0    ->  ['"No, he said', '0']    csv would read on to the next quotation mark
        one\u2028two\t1    ->  ['one\u2028two', '1']    str.splitlines() would cut the sentence

    A byte order mark, "\r" at the end of a line, and empty lines at the end of the file are dropped; but in a file of
    one column an empty line is an empty text."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content:
        return
    has_one_column = b"\t" not in content
    content = content.removesuffix(b"\n") if has_one_column else content.rstrip(b"\r\n")
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{path} line {number}"
        try:
            text = line.decode().rstrip("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: byte {error.start + 1} of the line is not UTF-8 text") from None
        yield where, text.split("\t")


def find_column(column: str | int, first_row: list[str], where: str) -> int:
    if first_row.count(column) > 1:
        raise ValueError(f"{where}: several columns are called {column!r}")
    if column in first_row:
        return first_row.index(column)
    if isinstance(column, int) and column < len(first_row):
        return column
    raise ValueError(f"{where}: no column {column!r} in {str(first_row)[:200]}")


def read_label(task: Task, word: str, where: str) -> int | float:
    """The word "entailment" -> 0, or for a task that predicts a number "3.200" -> 3.2."""
    if task.predicts == "class":
        if word not in task.labels:
            raise ValueError(f"{where}: label {word[:60]!r} is not one of {', '.join(task.labels)}")
        return task.labels.index(word)

    try:
        value = float(word)
    except ValueError:
        value = np.nan
    if not np.isfinite(value) or "_" in word:  # to Python 1_0 is ten
        raise ValueError(f"{where}: label {word[:60]!r} is not a finite number")
    return value


# ---------------------------------------------------------------------------------------------------
# 3. Token ids
# ---------------------------------------------------------------------------------------------------


def encode(examples: list[Example], vocabulary: data.Vocabulary, max_len: int) -> list[tuple]:
    """(input_ids (T,), token_type_ids (T,)) of each example, T <= max_len, ready for pad_batch()."""
    if max_len < 6:  # RoBERTa's 4 special tokens, and one token of each text
        raise ValueError(f"max_len {max_len}: a pair of texts needs at least 6 tokens")
    room_for_one = max_len - 2  # [CLS] a [SEP]
    room_for_pair = max_len - num_special_tokens_of_pair(vocabulary)
    first_encodings = tokenize([example.text_a for example in examples], vocabulary)
    second_encodings = tokenize([example.text_b or "" for example in examples], vocabulary)

    sequences = []
    for example, first, second in zip(examples, first_encodings, second_encodings, strict=True):
        if example.text_b is None:
            a = first.ids[:room_for_one]
            b = None
        else:
            a, b = truncate_pair(first.ids, second.ids, room_for_pair)
        sequences.append(add_special_tokens(a, b, vocabulary))
    return sequences


def num_special_tokens_of_pair(vocabulary: data.Vocabulary) -> int:
    """[CLS], the separators between the texts (add_special_tokens), and one at the end."""
    return 1 + vocabulary.num_separators + 1


def tokenize(texts: list[str], vocabulary: data.Vocabulary):
    """Yields what the tokenizers library makes of each text: .ids, and .offsets in characters.

    An encoding takes kilobytes, so the texts go in by the thousand."""
    for start in range(0, len(texts), 1000):
        batch = texts[start:start + 1000]
        yield from data.call_tokenizer(vocabulary.tokenizer.encode_batch, batch)


def truncate_pair(a: list, b: list, room: int) -> tuple[list, list]:
    """BERT's rule: while a pair is too long, its longer text loses its last token; if both are equally long, b loses
    it. So a keeps half of the room, rounded up, or more if b is short.

    Room 3 for 6 + 7 tokens: 2 + 1 stay. Room 10 for 3 + 20 tokens: 3 + 7 stay."""
    half = (room + 1) // 2
    room_beside_b = room - len(b)
    num_a = min(len(a), max(half, room_beside_b))
    return a[:num_a], b[:room - num_a]


def add_special_tokens(a: list[int], b: list[int] | None, vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids (T,), token_type_ids (T,)) of one text, or of a pair:

        BERT      [CLS] a [SEP] b [SEP]    token types 0 up to the first [SEP], then 1
        RoBERTa   <s> a </s> </s> b </s>   token types all 0
    """
    first = [vocabulary.cls_id, *a, vocabulary.sep_id]
    second = []
    if b is not None:
        second = [*b, vocabulary.sep_id]
        if vocabulary.num_separators == 2:
            second = [vocabulary.sep_id, *second]

    type_of_second = 1 if vocabulary.num_separators == 1 else 0
    input_ids = np.array(first + second, np.int32)
    token_type_ids = np.repeat([0, type_of_second], [len(first), len(second)])
    return input_ids, token_type_ids


def bucketed_batches(
    lengths, batch_size: int, generator: np.random.Generator, batches_per_pool: int = 50
) -> list[np.ndarray]:
    """Batches of example indices: each index once, examples of like length together.

    The order is shuffled, sorted by length inside each pool of 50 batches, and cut into batches; then the batches
    are shuffled. On SST-2's training set in batches of 32, padding adds 4.8 % to the real tokens; it adds 201 % without
    the sorting, and 861 % if all is padded to 128."""
    lengths = np.asarray(lengths)
    order = generator.permutation(len(lengths))
    pool_number = np.arange(len(order)) // (batches_per_pool * batch_size)
    order = order[np.lexsort((lengths[order], pool_number))]  # by pool, inside a pool by length

    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def pad_batch(sequences: list[tuple], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B pairs (input_ids, token_type_ids), each (T,) with a T of its own, as arrays of the longest T:

    input_ids (B, T) int64; attention_mask (B, T) bool, False at padding; token_type_ids (B, T) int64."""
    longest = max(len(ids) for ids, _ in sequences)
    shape = (len(sequences), longest)
    input_ids = np.full(shape, pad_id, np.int64)
    attention_mask = np.zeros(shape, bool)
    token_type_ids = np.zeros(shape, np.int64)
    for row, (ids, types) in enumerate(sequences):
        input_ids[row, :len(ids)] = ids
        attention_mask[row, :len(ids)] = True
        token_type_ids[row, :len(ids)] = types
    return input_ids, attention_mask, token_type_ids


# ---------------------------------------------------------------------------------------------------
# 4. SQuAD: read, windows, answers, score
# ---------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    id: str
    question: str
    context: str  # the paragraph, which SQuAD's files call so
    answers: list[tuple[str, int]]  # text, and the character of the paragraph at which it begins


def load_squad(path) -> list[Question]:
    """The questions of a SQuAD v1.1 file, in its order. The file holds

        {"data": [{"paragraphs": [{"context": "Anna moved ...", "qas": [
            {"id": "1", "question": "Where?", "answers": [{"text": "New York", "answer_start": 20}]}]}]}]}

    Raises ValueError with the place in the file, such as data[3].paragraphs[0].qas[1]."""
    content = bert.read_json(path)
    if content.get("version") == "v2.0":
        raise squad_2_error(path)

    # read_field(entry, key, type, where) is entry[key], checked (appendix A).
    questions = {}
    for i, article in enumerate(read_field(content, "data", list, f"{path}")):
        where = f"{path}: data[{i}]"
        for j, paragraph in enumerate(read_field(article, "paragraphs", list, where)):
            where = f"{path}: data[{i}].paragraphs[{j}]"
            context = read_field(paragraph, "context", str, where)
            for k, entry in enumerate(read_field(paragraph, "qas", list, where)):
                if isinstance(entry, dict) and entry.get("is_impossible"):
                    raise squad_2_error(path)
                question = read_question(entry, context, f"{where}.qas[{k}]")
                if question.id in questions:
                    raise ValueError(f"{where}.qas[{k}]: a second question with id {question.id[:60]!r}")
                questions[question.id] = question
    if not questions:
        raise ValueError(f"{path}: no questions")
    return list(questions.values())


def read_question(entry, context: str, where: str) -> Question:
    """A question with all its answers, from one entry of the file; `where` names its place in errors."""
    answers = []
    for answer in read_field(entry, "answers", list, where):
        text = read_field(answer, "text", str, where)
        start = read_field(answer, "answer_start", int, where)
        if start < 0:
            raise ValueError(f"{where}: answer_start {start} is negative")
        answers.append((text, start))
    if not answers:
        raise ValueError(f"{where}: no answers, but SQuAD v1.1 has one or more for each question")
    question_id = read_field(entry, "id", str, where)
    question = read_field(entry, "question", str, where)
    return Question(question_id, question, context, answers)


# SQuAD's files call a paragraph a context, and run_squad.py, from which the names with doc_ are, a document.
#
# A paragraph that is longer than the model's input is read through several windows, each beginning `doc_stride` tokens
# after the one before. With max_len 10 the question "Where?" leaves room for 5 tokens of the paragraph,
#
#   [CLS] where ? [SEP] . . . . . [SEP]
#
# so with doc_stride 2 a paragraph of 7 tokens needs two windows:
#
#   paragraph   anna moved to sunny new york alone
#   window 0    anna moved to sunny new                doc_start 0
#   window 1               to sunny new york alone     doc_start 2; it reaches the end, so it is the last one
#
# A token of the paragraph is counted in four ways. For "new" in window 1 they are
#
#   its characters in the paragraph     20 to 23
#   its number in the paragraph         4
#   its number in the window            2 = 4 - doc_start, the index into char_spans
#   its position in input_ids           6 = 2 + doc_offset, after [CLS] where ? [SEP]
#
# For training, a window knows the positions of the answer, or 0 and 0, the place of [CLS], if it does not hold all of
# it. "New York" is cut by window 0, so window 0 has the positions 0 and 0, and window 1 has 6 and 7.
#
# A token is often in several windows, with more or less text around it. Its margin in a window is the smaller of the
# numbers of tokens to its left and to its right: for "new" min(4, 0) = 0 in window 0, and min(2, 2) = 2 in window 1.
# Only the window where the margin is largest ("maximum context") may propose an answer that begins with the token.


class Window(NamedTuple):
    """N tokens of a paragraph as the model reads them, T in all: [CLS] question [SEP] the N tokens [SEP]."""
    question_index: int
    input_ids: np.ndarray  # (T,)
    token_type_ids: np.ndarray  # (T,)
    doc_start: int  # which token of the paragraph comes first in this window
    doc_offset: int  # the position of that token in input_ids
    char_spans: np.ndarray  # (N, 2): the characters of the paragraph where each token begins and ends
    is_max_context: np.ndarray  # (N,) bool: this is the window where the token's margin is largest
    start_position: int  # of the answer's first token in input_ids, or 0
    end_position: int  # of its last token, or 0


def make_windows(
    questions: list[Question],
    vocabulary: data.Vocabulary,
    max_len: int = 384,
    doc_stride: int = 128,
    max_question: int = 64,
    training: bool = False,
) -> list[Window]:
    """All windows of all questions, in order. max_len, doc_stride and max_question are in tokens.

    With `training` each window gets the positions of the first answer of its question; questions whose answer is not
    where the file says, or contains no token, are left out, and their number is printed. Without it all positions are
    0. The rules are those of run_squad.py, except that answers are found by their characters. Raises ValueError if a
    question fills max_len."""
    if doc_stride < 1:
        raise ValueError(f"doc_stride {doc_stride}: expected a number above 0")
    paragraphs = tokenize_paragraphs(questions, vocabulary)
    question_texts = [question.question.strip() for question in questions]
    num_special = num_special_tokens_of_pair(vocabulary)

    all_windows = []
    num_left_out = 0
    for index, encoding in enumerate(tokenize(question_texts, vocabulary)):
        question = questions[index]
        question_ids = encoding.ids[:max_question]
        paragraph_ids, char_spans = paragraphs[question.context]
        doc_offset = len(question_ids) + num_special - 1  # all special tokens but the last come before the paragraph
        room = max_len - len(question_ids) - num_special
        if room < 1:
            raise ValueError(f"max_len {max_len}: no room for text after {question.question[:60]!r}")

        answer = None
        if training:
            answer = find_answer_tokens(question, char_spans)
            if answer is None:
                num_left_out += 1
                continue

        doc_starts = find_doc_starts(len(paragraph_ids), room, doc_stride)
        is_max_context = find_max_context(len(paragraph_ids), doc_starts, room)
        for number, doc_start in enumerate(doc_starts):
            doc_end = doc_start + room
            ids_here = paragraph_ids[doc_start:doc_end]
            input_ids, token_type_ids = add_special_tokens(question_ids, ids_here, vocabulary)
            start_position, end_position = answer_positions(answer, doc_start, doc_end, doc_offset)
            window = Window(
                question_index=index,
                input_ids=input_ids,
                token_type_ids=token_type_ids,
                doc_start=doc_start,
                doc_offset=doc_offset,
                char_spans=char_spans[doc_start:doc_end],
                is_max_context=is_max_context[number, doc_start:doc_end],
                start_position=start_position,
                end_position=end_position,
            )
            all_windows.append(window)

    if num_left_out:
        message = f"left out {num_left_out} of {len(questions)} questions: answer not in its place"
        print(message, file=sys.stderr)
    return all_windows


def tokenize_paragraphs(questions: list[Question], vocabulary: data.Vocabulary) -> dict[str, tuple]:
    """{paragraph: (token ids, character spans (tokens, 2))}. A paragraph serves about five questions."""
    paragraphs = sorted({question.context for question in questions})
    tokenized = {}
    for paragraph, encoding in zip(paragraphs, tokenize(paragraphs, vocabulary), strict=True):
        char_spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        tokenized[paragraph] = (encoding.ids, char_spans)
    return tokenized


def find_answer_tokens(question: Question, char_spans: np.ndarray) -> tuple[int, int] | None:
    """The first and last token of the first answer, or None if the answer is not where the file says, or has no token.

    The first token is the first that ends after the answer begins; the last token is the last that begins
    before the answer ends. That is right where RoBERTa's token " Rome" spans characters 2 to 7 and the
    answer 3 to 7, and where four tokens share one emoji."""
    text, start = question.answers[0]
    if question.context[start:start + len(text)] != text or not text.strip():
        return None
    first_char = start + len(text) - len(text.lstrip())  # without white space around the answer
    end_char = start + len(text.rstrip())

    first = int(np.searchsorted(char_spans[:, 1], first_char, side="right"))
    last = int(np.searchsorted(char_spans[:, 0], end_char)) - 1
    if first > last:
        return None
    return first, last


def find_doc_starts(num_tokens: int, room: int, doc_stride: int) -> list[int]:
    """The first token of each window: every `doc_stride` tokens, until a window reaches the end of the paragraph."""
    stride = min(doc_stride, room)  # a short window must not jump over tokens
    doc_starts = [0]
    while doc_starts[-1] + room < num_tokens:
        doc_starts.append(doc_starts[-1] + stride)
    return doc_starts


def answer_positions(answer, doc_start: int, doc_end: int, doc_offset: int) -> tuple[int, int]:
    """The positions in a window of an answer (first token, last token), or 0 and 0 if the window does not hold all of
    it, or there is none (None)."""
    if answer is None or answer[0] < doc_start or answer[1] >= doc_end:
        return 0, 0
    return answer[0] - doc_start + doc_offset, answer[1] - doc_start + doc_offset


def find_max_context(num_tokens: int, doc_starts, room: int) -> np.ndarray:
    """(windows, tokens) bool: True in the one window where a token's margin + 0.01 x the window's length is largest; of
    equals the earlier window wins (run_squad.py, _check_is_max_context)."""
    doc_start = np.array(doc_starts)[:, None]  # (windows, 1)
    length = np.minimum(room, num_tokens - doc_start)  # (windows, 1)
    num_left = np.arange(num_tokens) - doc_start  # (windows, tokens), negative outside the window
    num_right = length - 1 - num_left
    margin = np.minimum(num_left, num_right)

    worth = margin + 0.01 * length
    worth[margin < 0] = -1
    best_window = worth.argmax(axis=0)  # (tokens,)
    return best_window == np.arange(len(doc_start))[:, None]


# From logits back to text. The model gives each position of a window a start and an end logit. The answer is the pair
# with the highest sum, among those that best_span() allows, over all windows of a question:
#
#   window 1     [CLS] where ? [SEP]  to  sunny  new  york  alone  [SEP]
#   position       0     1   2   3     4    5     6    7      8      9
#   in char_spans                      0    1     2    3      4
#   start logit    0     0   0   0     0    0     5    0      0      0
#   end logit      0     0   0   0     0    0     0    5      0      0
#
# The best start is 6 and the best end 7: the characters 20 to 28 of the paragraph, "New York".


def best_answers(
    questions: list[Question],
    windows: list[Window],
    start_logits,
    end_logits,
    n_best_size: int = 20,
    max_answer_length: int = 30,
) -> dict[str, str]:
    """{question id: answer}, "" where no window proposes one.

    start_logits, end_logits: one row for each window, of T numbers or more (padding is ignored)."""
    best_scores = [-np.inf] * len(questions)
    answers = {question.id: "" for question in questions}
    for window, window_starts, window_ends in zip(windows, start_logits, end_logits, strict=True):
        span = best_span(window, window_starts, window_ends, n_best_size, max_answer_length)
        if span is None:
            continue
        span_score, char_start, char_end = span
        if span_score > best_scores[window.question_index]:
            best_scores[window.question_index] = span_score
            question = questions[window.question_index]
            answers[question.id] = answer_text(question.context, char_start, char_end)
    return answers


def best_span(window: Window, start_logits, end_logits, n_best_size: int, max_answer_length: int):
    """(score, first character, last character + 1) of a window's best answer, or None.

    Candidates are the n best starts with the n best ends. Both are in the paragraph, and starts have is_max_context
    (run_squad.py drops the others only after it has chosen the n best). An end must not lie before its start, and an
    answer has at most max_answer_length tokens."""
    positions = slice(window.doc_offset, window.doc_offset + len(window.char_spans))  # of the paragraph in the input
    start_scores = np.asarray(start_logits[positions], np.float64)
    start_scores = np.where(window.is_max_context, start_scores, -np.inf)
    end_scores = np.asarray(end_logits[positions], np.float64)
    starts = np.argsort(-start_scores, kind="stable")[:n_best_size]  # indices into char_spans
    ends = np.argsort(-end_scores, kind="stable")[:n_best_size]
    if len(starts) == 0:
        return None  # an empty paragraph

    scores = start_scores[starts][:, None] + end_scores[ends]  # (starts, ends)
    num_tokens = ends - starts[:, None] + 1
    scores[(num_tokens < 1) | (num_tokens > max_answer_length)] = -np.inf
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    if scores[row, column] == -np.inf:
        return None  # no start fits an end
    char_start = window.char_spans[starts[row], 0]
    char_end = window.char_spans[ends[column], 1]
    return scores[row, column], char_start, char_end


def answer_text(paragraph: str, start: int, end: int) -> str:
    """paragraph[start:end] without the space that RoBERTa's tokens begin with, but with an accent that follows.

    BERT's normaliser deletes accents, so its token for "cafe" + U+0301 (e and accent are two characters)
    ends before the accent."""
    while end < len(paragraph) and unicodedata.category(paragraph[end]) == "Mn":  # a mark without width
        end += 1
    return paragraph[start:end].strip()


def squad_scores(predictions: dict[str, str], questions: list[Question]) -> dict[str, float]:
    """{"em": exact matches, "f1": overlap of words}, in percent; equal to the official evaluate-v1.1.py.

    predictions: {question id: text}; a question that is not answered counts as 0. A prediction is compared
    with each of the question's answers, and the best comparison counts."""
    if not questions:
        raise ValueError("squad_scores: no questions")
    exact_matches = 0
    total_f1 = 0
    for question in questions:
        if question.id not in predictions:
            continue
        predicted = normalised_words(predictions[question.id])
        golds = [normalised_words(text) for text, _ in question.answers]
        if predicted in golds:
            exact_matches += 1
        total_f1 += max(word_f1(predicted, gold) for gold in golds)
    return {"em": 100.0 * exact_matches / len(questions), "f1": 100.0 * total_f1 / len(questions)}


def normalised_words(text: str) -> list[str]:
    """The words of "The U.S. state" -> ["us", "state"]: no case, no ASCII punctuation, no articles."""
    text = text.lower()
    text = "".join(character for character in text if character not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return text.split()


def word_f1(predicted: list[str], gold: list[str]) -> float:
    """Harmonic mean of precision and recall of the predicted words; 0 without a common word."""
    num_common = sum((Counter(predicted) & Counter(gold)).values())
    if num_common == 0:
        return 0
    precision = num_common / len(predicted)
    recall = num_common / len(gold)
    return 2 * precision * recall / (precision + recall)


# ---------------------------------------------------------------------------------------------------
# 5. Metrics
# ---------------------------------------------------------------------------------------------------

# accuracy, f1, matthews, pearson and spearman take predictions and labels, (n,) each. This f1 counts classes; SQuAD's,
# which counts words, is squad_scores above.


def accuracy(predicted, labels) -> float:
    if len(labels) == 0:
        return 0.0
    return float(np.mean(np.equal(predicted, labels)))


def f1(predicted, labels) -> float:
    """Harmonic mean of precision and recall of class 1; 0.0 where class 1 does not occur."""
    predicted_1 = np.equal(predicted, 1)
    labelled_1 = np.equal(labels, 1)
    true_positives = np.sum(predicted_1 & labelled_1)
    return float(2 * true_positives / max(np.sum(predicted_1) + np.sum(labelled_1), 1))


def matthews(predicted, labels) -> float:
    """(tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)): Pearson's r of zeros and ones."""
    return pearson(predicted, labels)


def pearson(predicted, labels) -> float:
    """The correlation coefficient; 0.0 where it is undefined: fewer than two values, all equal, infinite."""
    x = np.asarray(predicted, np.float64)
    y = np.asarray(labels, np.float64)
    if len(x) < 2 or not np.isfinite(x).all() or not np.isfinite(y).all():
        return 0.0
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0

    x = x - x.mean()
    y = y - y.mean()
    r = (x / np.linalg.norm(x)) @ (y / np.linalg.norm(y))
    if not np.isfinite(r):
        return 0.0
    return float(np.clip(r, -1, 1))  # rounding may pass 1


def spearman(predicted, labels) -> float:
    """Pearson's r of the ranks; 0.0 where it is undefined."""
    if np.isnan(predicted).any() or np.isnan(labels).any():
        return 0.0
    return pearson(average_ranks(predicted), average_ranks(labels))


def average_ranks(values) -> np.ndarray:
    """Equal values share the mean of their ranks: 10, 20, 20, 30 -> 1, 2.5, 2.5, 4."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    mean_rank = last_rank - (counts - 1) / 2
    return mean_rank[group]


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def score(task: Task, predictions, examples: list[Example], split: str = "dev") -> dict[str, float]:
    """The task's metrics of predictions (n,), which are class ids or numbers; no spans.

    On dev_mm these are the metrics whose name ends in _mm, on other splits the others. Raises ValueError if
    the numbers of predictions and labels differ."""
    labels = [example.label for example in examples if example.label is not None]
    if len(predictions) != len(examples) or len(labels) != len(examples):
        raise ValueError(f"task {task.name}: {len(predictions)} predictions for {len(labels)} labels")

    scores = {}
    for name in task.metrics:
        is_mismatched = name.endswith("_mm")
        if is_mismatched == (split == "dev_mm"):
            metric = METRICS[name.removesuffix("_mm")]
            scores[name] = metric(predictions, labels)
    return scores


def majority_scores(task: Task, examples: list[Example], split: str = "dev") -> dict[str, float]:
    """The scores of always answering the class that is most frequent in these examples. In accuracy a run that has
    collapsed, and gives every example one class, is no better; so an accuracy that is no higher is a warning. (f1
    counts class 1 alone, so it is 0 here if class 0 is the more frequent one.)

    MRPC's dev set has 279 of 408 in class 1: accuracy 0.684, f1 0.812. For numbers and spans all are 0.0."""
    if task.predicts != "class":
        return dict.fromkeys(task.metrics, 0.0)
    labels = [example.label for example in examples]
    majority = np.bincount(labels).argmax()
    return score(task, np.full(len(examples), majority), examples, split)


# ---------------------------------------------------------------------------------------------------
# Appendix A: checks of SQuAD's files. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------


def read_field(entry, key: str, kind: type, where: str):
    """entry[key], if it is there and of this kind: list, str or int."""
    if not isinstance(entry, dict) or type(entry.get(key)) is not kind:  # isinstance() takes True for an int
        raise ValueError(f"{where}: no {key!r} here that is of type {kind.__name__}")
    value = entry[key]
    if kind is str and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where}: {key!r} holds half a character (a lone surrogate), which is no text")
    return value


def squad_2_error(path) -> ValueError:
    return ValueError(f"{path}: this is SQuAD 2.0, whose questions may have no answer; v1.1 is needed: "
                      f"train-v1.1.json, dev-v1.1.json")


# ---------------------------------------------------------------------------------------------------
# Appendix B: submission files. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------

# What GLUE's server calls the three files of MNLI, by split; the file of any other task is FOLDER.tsv.
SUBMISSION_FILES = {"test": "MNLI-m.tsv", "test_mm": "MNLI-mm.tsv", "ax": "AX.tsv"}


def write_submission(task: Task, predictions, path) -> None:
    """Writes GLUE's table of predictions (n,) in the order of the test file; for SQuAD the JSON {id: text}
    that the official scorer reads. Labels are words; numbers have 3 decimals for STS-B, else 7 digits. Raises
    OSError."""
    if task.predicts == "span":
        content = json.dumps(predictions)
    else:
        lines = ["index\tprediction"]
        for index, prediction in enumerate(predictions):
            if task.predicts == "class":
                word = task.labels[int(prediction)]
            else:
                word = f"{prediction:.3f}" if task.name == "stsb" else f"{prediction:.7g}"
            lines.append(f"{index}\t{word}")
        content = "\n".join(lines) + "\n"

    with bert.atomic_write(path) as file:
        file.write(content.encode())


# ---------------------------------------------------------------------------------------------------
# Appendix C: downloads. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------

GLUE_HOST = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_HOST = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
SQUAD_HOST = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"


@dataclass(frozen=True)
class Published:
    """A file on the web. A .zip holds the tables of all splits, another file serves those named here."""
    url: str
    size: int  # bytes
    sha256: str
    splits: tuple[str, ...] = ()


DOWNLOADS = {
    "cola": [
        Published(GLUE_HOST + "CoLA.zip", 376971,
                  "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    ],
    "sst2": [
        Published(GLUE_HOST + "SST-2.zip", 7439277,
                  "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    ],
    "mrpc": [
        Published(MRPC_HOST + "msr_paraphrase_train.txt", 1047044,
                  "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
                  splits=("train", "dev")),
        Published(GLUE_HOST + "mrpc_dev_ids.tsv", 6222,
                  "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
                  splits=("train", "dev")),
        Published(MRPC_HOST + "msr_paraphrase_test.txt", 441275,
                  "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784", splits=("test",)),
    ],
    "stsb": [
        Published(GLUE_HOST + "STS-B.zip", 802872,
                  "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    ],
    "qqp": [
        Published(GLUE_HOST + "QQP-clean.zip", 41696084,
                  "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    ],
    "mnli": [
        Published(GLUE_HOST + "MNLI.zip", 312783507,
                  "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
        Published(GLUE_HOST + "AX.tsv", 222257,
                  "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd",
                  splits=("ax",)),
    ],
    "qnli": [
        Published(GLUE_HOST + "QNLIv2.zip", 10627589,
                  "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    ],
    "rte": [
        Published(GLUE_HOST + "RTE.zip", 697150,
                  "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    ],
    "wnli": [
        Published(GLUE_HOST + "WNLI.zip", 28999,
                  "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    ],
    "squad": [
        Published(SQUAD_HOST + "train-v1.1.json", 30288272,
                  "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
                  splits=("train",)),
        Published(SQUAD_HOST + "dev-v1.1.json", 4854279,
                  "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
                  splits=("dev",)),
    ],
}


def download(task, folder=None, splits=None) -> Path:
    """Fetches the files of a task's splits that are not yet below `folder` -> the folder for load_glue().

    folder: default is "glue" in the cache. splits: default is what training reads (LABELLED_SPLITS). An
    archive keeps its own top folder: CoLA/CoLA/dev.tsv. Raises OSError if a file cannot be had."""
    task = find_task(task)
    if folder is None:
        folder = data.cache() / "glue"
    if splits is None:
        splits = LABELLED_SPLITS

    task_folder = Path(folder) / task.folder
    for file in DOWNLOADS[task.name]:
        name = file.url.rsplit("/", 1)[1]
        if name.endswith(".zip"):
            if not task_folder.exists():  # it appears when it is complete
                archive = task_folder.with_name(name)
                data.fetch([file.url], archive, file.size, file.sha256)
                data.unpack(archive, task_folder, (".tsv",))
        elif any(split in splits for split in file.splits):
            data.fetch([file.url], task_folder / name, file.size, file.sha256)
    return task_folder


# ---------------------------------------------------------------------------------------------------
# Appendix D: tasks of your own. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------

# A task of your own is a JSON file beside its tables:
#
#   {"name": "mood", "columns": ["text"], "label": "mood", "labels": ["sad", "glad"], "metric": "accuracy",
#    "train": "a.tsv", "dev": "b.tsv", "test": "c.tsv"}
#
# "columns" names one text column or two, by the words of the first line, or by numbers from 0 if the tables
# have no such line. "labels": null predicts a number. "test" may be missing. With numbers its texts stand in
# the same columns as those of the others.

NEEDED_KEYS = ("name", "columns", "label", "labels", "metric", "train", "dev")


def read_task(path: Path) -> Task:
    """The task that a JSON file describes.

    Raises ValueError for a key that is missing or wrong, FileNotFoundError for a table that is not there."""
    content = bert.read_json(path)
    valid_keys = f"needed: {', '.join(NEEDED_KEYS)}; possible: test"
    for key in NEEDED_KEYS:
        if key not in content:
            raise ValueError(f"{path}: missing key {key!r}; {valid_keys}")
    for key in content:
        if key not in (*NEEDED_KEYS, "test"):
            raise ValueError(f"{path}: unknown key {key[:60]!r}; {valid_keys}")

    name = content["name"]
    official = [*TASKS, TOY.name, *(task.folder for task in ALL_TASKS)]
    official += [Path(file).stem for file in SUBMISSION_FILES.values()]
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name in official:
        raise ValueError(f'{path}: "name" must be a word that is no official task')

    columns = content["columns"]
    if not isinstance(columns, list) or len(columns) not in (1, 2):
        raise ValueError(f'{path}: "columns" must be a list of one or two columns')
    for column in (*columns, content["label"]):
        is_index = type(column) is int and column >= 0
        if not isinstance(column, str) and not is_index:
            raise ValueError(f'{path}: "columns" and "label" must be header names or indices from 0')

    # The labels decide what is predicted, and that decides which metrics make sense.
    if content["labels"] is None:
        predicts = "number"
        labels = ()
        valid_metrics = ("pearson", "spearman")
    else:
        predicts = "class"
        labels = read_labels(content["labels"], path)
        valid_metrics = ("accuracy", "f1", "matthews")
        if len(labels) > 2:
            valid_metrics = ("accuracy",)
    metric = content["metric"]
    if metric not in valid_metrics:
        raise ValueError(f'{path}: "metric" {str(metric)[:40]!r} does not fit these labels; '
                         f"valid: {', '.join(valid_metrics)}")

    folder = path.absolute().parent
    files = {}
    for split in ("train", "dev", "test"):
        if split in content and (split != "test" or content[split] is not None):
            files[split] = (str(folder / str(content[split])),)
    task = Task(
        name=name,
        folder=name,
        predicts=predicts,
        labels=labels,
        metrics=(metric,),
        text_columns=tuple(columns),
        label_column=content["label"],
        files=files,
    )
    for split in files:
        find_file(task, split, folder)
    return task


def read_labels(words, path: Path) -> tuple[str, ...]:
    if isinstance(words, list):
        labels = tuple(str(word) for word in words)
        if len(labels) > 1 and len(set(labels)) == len(labels):
            return labels
    raise ValueError(f'{path}: "labels" must be a list of two or more different words, '
                     "or null to predict a number")
