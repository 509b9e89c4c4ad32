"""GLUE and SQuAD v1.1: what the files hold, how it becomes token ids, how predictions are scored. No model here.

    1. The table of tasks      one field a line
    2. GLUE                    a row of a table becomes an Example
    3. Token ids and batches   layout, truncation, batches of like length
    4. SQuAD                   paragraphs in windows, answers, the score
    5. Metrics
    Appendix                   submission files, downloads, tasks of your own

Metrics of GLUE are fractions (accuracy and F1 in [0, 1], correlations in [-1, 1]); SQuAD's em and f1 are percent,
as its official scorer prints them. Letters in shapes: B sequences, T tokens, n examples.
"""

import json
import re
import string
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bert
import data

# ---------------------------------------------------------------------------------------------------
# 1. The table of tasks
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where the texts of a task are, what is predicted, and the paper's settings for fine-tuning."""
    name: str
    folder: str  # in GLUE's layout
    predicts: str = "class"  # or "number", or "span": the first and the last token of an answer
    labels: tuple = ()  # the words of the label column, by class id
    metrics: tuple  # the first one selects the best step
    text_columns: tuple = ("sentence1", "sentence2")  # one or two: names in the header line, or indices from 0
    label_column: str | int = "label"
    test_text_columns: tuple | None = None  # where the test file differs
    files: dict = field(default_factory=lambda: {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)})
    epochs: int = 3
    lr: float = 2e-5
    batch_size: int = 32
    max_len: int = 128  # tokens
    eval_every: int = 50  # updates between evaluations

    @property
    def num_outputs(self) -> int:
        """Outputs of the task's head: a logit for each class; one number; start and end."""
        if self.predicts == "class":
            return len(self.labels)
        return 1 if self.predicts == "number" else 2


COLA = Task(
    name="cola",
    folder="CoLA",
    labels=("0", "1"),
    metrics=("matthews", "accuracy"),
    text_columns=(3,),  # train and dev have no header line
    label_column=1,
    test_text_columns=("sentence",),
)
SST2 = Task(
    name="sst2",
    folder="SST-2",
    labels=("0", "1"),
    metrics=("accuracy",),
    text_columns=("sentence",),
)
MRPC = Task(
    name="mrpc",
    folder="MRPC",
    labels=("0", "1"),
    metrics=("accuracy", "f1"),
    text_columns=("#1 String", "#2 String"),
    label_column="Quality",
    files={
        # GLUE's dev set is a part of the original training file: the pairs whose ids are listed.
        "train": ("train.tsv", "msr_paraphrase_train.txt"),
        "dev": ("dev.tsv", "msr_paraphrase_train.txt"),
        "test": ("test.tsv", "msr_paraphrase_test.txt"),
        "dev_ids": ("mrpc_dev_ids.tsv", "dev_ids.tsv"),
    },
)
STSB = Task(
    name="stsb",
    folder="STS-B",
    predicts="number",
    metrics=("pearson", "spearman"),
    label_column="score",
)
QQP = Task(
    name="qqp",
    folder="QQP",
    labels=("0", "1"),
    metrics=("accuracy", "f1"),
    text_columns=("question1", "question2"),
    label_column="is_duplicate",
    eval_every=500,
)
MNLI = Task(
    name="mnli",
    folder="MNLI",
    labels=("entailment", "neutral", "contradiction"),  # the order of the Hugging Face hub
    metrics=("accuracy", "accuracy_mm"),
    label_column="gold_label",
    files={
        "train": ("train.tsv",),
        "dev": ("dev_matched.tsv",),
        "dev_mm": ("dev_mismatched.tsv",),
        "test": ("test_matched.tsv",),
        "test_mm": ("test_mismatched.tsv",),
        "ax": ("AX.tsv", "diagnostic.tsv"),
    },
    eval_every=500,
)
QNLI = Task(
    name="qnli",
    folder="QNLI",
    labels=("entailment", "not_entailment"),
    metrics=("accuracy",),
    text_columns=("question", "sentence"),
    eval_every=500,
)
RTE = Task(
    name="rte",
    folder="RTE",
    labels=("entailment", "not_entailment"),
    metrics=("accuracy",),
)
WNLI = Task(
    name="wnli",
    folder="WNLI",
    labels=("0", "1"),
    metrics=("accuracy",),
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
# QQP, QNLI and WNLI are not in the paper, and take its settings for GLUE.
TASKS = {task.name: task for task in (COLA, SST2, MRPC, STSB, QQP, MNLI, QNLI, RTE, WNLI, SQUAD)}


def find_task(name) -> Task:
    """The Task of a name, or of the path of a JSON file that describes one of your own (see the appendix)."""
    if isinstance(name, Task):
        return name
    if str(name).endswith(".json"):
        return read_own_task(Path(name))
    if name not in TASKS:
        raise ValueError(f"unknown task {str(name)!r:.60}; known: {', '.join(TASKS)}, or the FILE.json of your own")
    return TASKS[name]


def find_file(task: Task, split: str, folder) -> Path:
    """The file of a split, in folder/CoLA or in the folder itself. Raises FileNotFoundError with both places."""
    if split not in task.files:
        raise ValueError(f"task {task.name} has no split {split!r:.40}; it has {', '.join(task.files)}")
    places = []
    for parent in (Path(folder) / task.folder, Path(folder)):
        for name in task.files[split]:
            places.append(parent / name)
    for place in places:
        if place.is_file():
            return place
    expected = " or ".join(dict.fromkeys(str(place) for place in places))
    raise FileNotFoundError(f"task {task.name}: no {split} file; expected {expected}")


# ---------------------------------------------------------------------------------------------------
# 2. GLUE: a row of a table becomes an Example
# ---------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    text_a: str
    text_b: str | None = None
    label: int | float | None = None  # class id, or number; None in a test file


def load_glue(task, split: str, folder) -> list[Example]:
    """The examples of a split, in the order of the file.

    split: train, dev, test, for MNLI also dev_mm, test_mm, ax (diagnostics). Raises FileNotFoundError with the
    places looked at, ValueError with file and line for a row that is malformed."""
    task = find_task(task)
    path = find_file(task, split, folder)
    has_labels = split in ("train", "dev", "dev_mm")
    columns = list(task.text_columns)
    if has_labels:
        columns.append(task.label_column)
    elif task.test_text_columns is not None:
        columns = list(task.test_text_columns)

    rows = read_rows(path)
    first_place, first_row = next(rows, (f"{path} line 1", []))
    has_header = any(isinstance(column, str) for column in columns)
    if not has_header:
        rows = read_rows(path)  # the first line is a row
    indices = [column_index(column, first_row, first_place) for column in columns]

    is_original_mrpc = task.name == "mrpc" and path.name == "msr_paraphrase_train.txt"
    dev_ids = read_dev_ids(task, folder) if is_original_mrpc else set()

    examples = []
    num_skipped = 0
    for place, fields in rows:
        if len(fields) != len(first_row):
            if task.name == "qqp" and has_labels:  # a line break inside a question leaves half a row
                num_skipped += 1
                continue
            raise ValueError(f"{place}: {len(fields)} fields where line 1 has {len(first_row)}")
        if is_original_mrpc and (tuple(fields[1:3]) in dev_ids) != (split == "dev"):
            continue
        values = [fields[index] for index in indices]
        label = parse_label(task, values.pop(), place) if has_labels else None
        examples.append(Example(*values, label=label))

    if num_skipped:
        print(f"{path}: skipped {num_skipped} rows without {len(first_row)} fields", file=sys.stderr)
    if not examples:
        raise ValueError(f"{path}: no rows for {split}")
    return examples


def column_index(column: str | int, first_row: list[str], place: str) -> int:
    if isinstance(column, str) and column in first_row:
        return first_row.index(column)
    if isinstance(column, int) and column < len(first_row):
        return column
    raise ValueError(f"{place}: no column {column!r} in {str(first_row):.200}")


def read_dev_ids(task: Task, folder) -> set[tuple]:
    return {tuple(fields) for _, fields in read_rows(find_file(task, "dev_ids", folder))}


def parse_label(task: Task, word: str, place: str) -> int | float:
    if task.predicts == "class":
        if word not in task.labels:
            raise ValueError(f"{place}: label {word!r:.60} is not one of {', '.join(task.labels)}")
        return task.labels.index(word)
    try:
        number = float(word)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(f"{place}: label {word!r:.60} is not a finite number")
    return number


def read_rows(path: Path):
    r"""Yields ("FILE line N", fields) for each line of a table.

    Only "\n" ends a line, only "\t" ends a field, and nothing is quoted: 'He said "no\t0' is a row of two fields,
    where a csv reader would go on to the next quotation mark. (str.splitlines() would break sentences at U+0085,
    U+2028 and "\x0b".) Dropped are "\r" at the end of a line, a byte order mark at the start of the file, and an
    empty last line."""
    longest = 1 << 20  # bytes of a line; real ones have a few thousand
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(longest + 1), b""), 1):
            place = f"{path} line {number}"
            if len(line) > longest:
                raise ValueError(f"{place}: over {longest} bytes; is this tab-separated text?")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: byte {error.start + 1} of the line is not UTF-8 text") from None
            is_last = not file.peek(1)
            if text or not is_last:
                yield place, text.split("\t")


# ---------------------------------------------------------------------------------------------------
# 3. Token ids and batches
# ---------------------------------------------------------------------------------------------------


def encode(examples: list[Example], vocabulary: data.Vocabulary, max_len: int) -> list[tuple]:
    """(input_ids (T,), token_type_ids (T,)) of each example, T <= max_len, ready for pad_batch()."""
    if max_len < 6:
        raise ValueError(f"max_len {max_len}: a pair of texts needs at least 6 tokens")
    first_texts = [example.text_a for example in examples]
    second_texts = [example.text_b for example in examples if example.text_b is not None]
    first_encodings = tokenize(first_texts, vocabulary)
    second_encodings = tokenize(second_texts, vocabulary)
    num_specials_of_pair = len(join([], [], vocabulary)[0])

    sequences = []
    for example, first in zip(examples, first_encodings, strict=True):
        if example.text_b is None:
            sequences.append(join(first.ids[:max_len - 2], None, vocabulary))
        else:
            second = next(second_encodings)
            a, b = truncate_pair(first.ids, second.ids, max_len - num_specials_of_pair)
            sequences.append(join(a, b, vocabulary))
    return sequences


def tokenize(texts: list[str], vocabulary: data.Vocabulary):
    """Yields the Encoding of each text: ids, and offsets in characters. An Encoding takes kilobytes, hence a
    thousand at a time."""
    for start in range(0, len(texts), 1000):
        yield from vocabulary.tokenizer.encode_batch(texts[start:start + 1000], add_special_tokens=False)


def join(a: list[int], b: list[int] | None, vocabulary: data.Vocabulary):
    """BERT:     [CLS] a [SEP] b [SEP]      token types 0 up to the first [SEP], then 1
    RoBERTa:  <s> a </s></s> b </s>      token types all 0"""
    is_roberta = vocabulary.tokenizer.id_to_token(vocabulary.sep_id) == "</s>"
    first = [vocabulary.cls_id, *a, vocabulary.sep_id]
    second = []
    if b is not None:
        second = [*b, vocabulary.sep_id]
    if b is not None and is_roberta:
        second = [vocabulary.sep_id, *second]
    input_ids = np.array(first + second, np.int32)
    token_type_ids = np.zeros(len(input_ids), np.int64)
    if not is_roberta:
        token_type_ids[len(first):] = 1
    return input_ids, token_type_ids


def truncate_pair(a: list, b: list, room: int) -> tuple[list, list]:
    """BERT's rule in one step: while the two are too long, drop the last token of the longer one, of b if they
    are equally long.

        room 3, 6 + 7 tokens     ->  2 + 1
        room 10, 3 + 20 tokens   ->  3 + 7
    """
    length_of_a = min(len(a), max(room - len(b), (room + 1) // 2))
    return a[:length_of_a], b[:room - length_of_a]


def bucketed_batches(lengths, batch_size: int, generator: np.random.Generator, pool: int = 50) -> list[np.ndarray]:
    """Batches of indices of examples, each example once, those of like length together.

    Shuffle, sort by length inside pools of `pool` batches, cut into batches, shuffle the batches. On SST-2's
    training set in batches of 32 padding then adds 4.8 % to the real tokens; without sorting 202 %, padded to 128
    tokens 861 %."""
    lengths = np.asarray(lengths)
    order = generator.permutation(len(lengths))
    pool_numbers = np.arange(len(order)) // (pool * batch_size)
    order = order[np.lexsort((lengths[order], pool_numbers))]  # by pool, then by length
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def pad_batch(sequences: list, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B sequences -> input_ids (B, T) int64, attention_mask (B, T) bool, token_type_ids (B, T) int64."""
    longest = max(len(input_ids) for input_ids, _ in sequences)
    shape = (len(sequences), longest)
    batch_ids = np.full(shape, pad_id, np.int64)
    attention_mask = np.zeros(shape, bool)
    batch_token_types = np.zeros(shape, np.int64)
    for row, (input_ids, token_type_ids) in enumerate(sequences):
        length = len(input_ids)
        batch_ids[row, :length] = input_ids
        attention_mask[row, :length] = True
        batch_token_types[row, :length] = token_type_ids
    return batch_ids, attention_mask, batch_token_types


# ---------------------------------------------------------------------------------------------------
# 4. SQuAD
# ---------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    id: str
    question: str
    context: str  # the paragraph
    answers: list[tuple[str, int]]  # text, and where it begins in the context, in characters


def load_squad(path) -> list[Question]:
    """The questions of a SQuAD v1.1 file. ValueError names the place: data[3].paragraphs[0].qas[1]."""
    content = bert.read_json(path)
    if str(content.get("version", "")).startswith("v2"):
        raise ValueError(f"{path}: this is SQuAD 2.0, whose questions may have no answer; expected v1.1")

    questions = {}
    for i, article in enumerate(get_field(content, "data", list, f"{path}: top level")):
        place = f"{path}: data[{i}]"
        for j, paragraph in enumerate(get_field(article, "paragraphs", list, place)):
            place = f"{path}: data[{i}].paragraphs[{j}]"
            context = get_field(paragraph, "context", str, place)
            for k, entry in enumerate(get_field(paragraph, "qas", list, place)):
                question = parse_question(entry, context, f"{place}.qas[{k}]")
                if question.id in questions:
                    raise ValueError(f"{place}.qas[{k}]: the id {question.id!r:.60} occurs twice")
                questions[question.id] = question
    if not questions:
        raise ValueError(f"{path}: no questions")
    return list(questions.values())


def parse_question(entry: dict, context: str, place: str) -> Question:
    question_id = get_field(entry, "id", str, place)
    if entry.get("is_impossible"):
        raise ValueError(f"{place}: is_impossible belongs to SQuAD 2.0; expected v1.1")
    answers = []
    for answer in get_field(entry, "answers", list, place):
        text = get_field(answer, "text", str, place)
        start = get_field(answer, "answer_start", int, place)
        if start < 0:
            raise ValueError(f"{place}: answer_start {start}; expected 0 or more")
        answers.append((text, start))
    if not answers:
        raise ValueError(f"{place}: no answers; every question of SQuAD v1.1 has one")
    return Question(question_id, get_field(entry, "question", str, place), context, answers)


def get_field(owner, key: str, kind: type, place: str):
    value = owner.get(key) if isinstance(owner, dict) else None
    is_valid = type(value) is kind
    if kind is str and is_valid and re.search("[\ud800-\udfff]", value):
        is_valid = False  # half a character, which cannot be written again
    if not is_valid:
        raise ValueError(f"{place}: no {key!r} here that is a valid {kind.__name__}")
    return value


# A paragraph longer than a window is read through several windows, each doc_stride tokens after the last one.
# With max_len 10 and doc_stride 2:
#
#   question "Where?"                           [CLS] where ? [SEP] ... [SEP]: 5 tokens are left for the text
#   paragraph "Anna met Bob in Rome last May"   7 tokens
#   window 0   anna met bob in rome             the answer "Rome last" is cut: start = end = 0, the place of [CLS]
#   window 1            bob in rome last may    here it is complete: start 6, end 7; the last window
#
# "rome" has min(4, 0) tokens on its poorer side in window 0 and min(2, 2) in window 1. Only window 1, where it has
# its maximum context, may propose an answer that begins there.


class Window(NamedTuple):
    """A stretch of a paragraph as the model reads it: [CLS] question [SEP] stretch [SEP]."""
    question_index: int
    input_ids: np.ndarray  # (T,)
    token_type_ids: np.ndarray  # (T,)
    offsets: np.ndarray  # (tokens of the stretch, 2): where each begins and ends in the context, in characters
    first_position: int  # of the stretch in input_ids
    is_max_context: np.ndarray  # (tokens of the stretch,) bool
    start_position: int  # of the answer's first token in input_ids; 0 ([CLS]) unless all of the answer is here
    end_position: int


def windows(questions: list[Question], vocabulary, max_len: int = 384, doc_stride: int = 128,
            max_question: int = 64, training: bool = False) -> list[Window]:
    """All windows of all questions, in order; max_len, doc_stride and max_question in tokens.

    training: sets start and end from the first answer of each question, by its characters. Questions whose answer
    is not where the file says are left out, with one line that counts them."""
    contexts = tokenize_contexts(questions, vocabulary)
    question_encodings = tokenize([question.question.strip() for question in questions], vocabulary)
    num_specials = len(join([], [], vocabulary)[0])
    made = []
    num_dropped = 0
    for index, (question, encoding) in enumerate(zip(questions, question_encodings, strict=True)):
        question_ids = encoding.ids[:max_question]
        context_ids, offsets = contexts[question.context]
        room = max_len - len(question_ids) - num_specials
        if room < 1:
            raise ValueError(f"max_len {max_len}: no room for text after {question.question!r:.60}")

        answer = (0, -1)  # first and last token in the context: none
        if training:
            answer = find_answer_tokens(question, offsets)
        if answer is None:
            num_dropped += 1
            continue

        doc_starts = window_starts(len(context_ids), room, doc_stride)
        has_max_context = max_context(len(context_ids), doc_starts, room)
        first_position = len(question_ids) + num_specials - 1
        for window_number, doc_start in enumerate(doc_starts):
            stretch = slice(doc_start, doc_start + room)
            start_position = 0
            end_position = 0
            if doc_start <= answer[0] <= answer[1] < doc_start + room:
                start_position = first_position + answer[0] - doc_start
                end_position = first_position + answer[1] - doc_start
            input_ids, token_type_ids = join(question_ids, context_ids[stretch], vocabulary)
            made.append(Window(index, input_ids, token_type_ids, offsets[stretch], first_position,
                               has_max_context[window_number, stretch], start_position, end_position))
    if num_dropped:
        print(f"left out {num_dropped} of {len(questions)} questions: answer not in its place", file=sys.stderr)
    return made


def tokenize_contexts(questions: list[Question], vocabulary) -> dict[str, tuple]:
    """{context: (ids, offsets (n, 2))}; each paragraph serves about five questions."""
    texts = sorted({question.context for question in questions})
    contexts = {}
    for text, encoding in zip(texts, tokenize(texts, vocabulary), strict=True):
        contexts[text] = (encoding.ids, np.array(encoding.offsets, np.int32).reshape(-1, 2))
    return contexts


def window_starts(num_tokens: int, room: int, doc_stride: int) -> range:
    """The first token of each window. The first window that reaches the end is the last one."""
    stride = min(doc_stride, room)  # a short window must not jump over tokens
    return range(0, max(num_tokens - room, 0) + stride, stride)


def find_answer_tokens(question: Question, offsets: np.ndarray) -> tuple[int, int] | None:
    """The first token that ends after the first answer begins, and the last token that begins before it ends.

    That is right where RoBERTa's " Rome" has the offsets (2, 7) and the answer (3, 7), and where four tokens share
    one emoji."""
    text, start = question.answers[0]
    if question.context[start:start + len(text)] != text or not text.strip():
        return None
    end = start + len(text.rstrip())
    start = start + len(text) - len(text.lstrip())
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], end)) - 1
    return (first, last) if first <= last else None


def max_context(num_tokens: int, doc_starts, room: int) -> np.ndarray:
    """(windows, tokens) bool: the window in which a token has most context on its poorer side; the first of equals.
    As in run_squad.py, longer windows count a little more."""
    begins = np.array(doc_starts)[:, None]  # (windows, 1)
    lengths = np.minimum(room, num_tokens - begins)
    left = np.arange(num_tokens) - begins  # (windows, tokens): tokens to the left, in the window
    right = lengths - 1 - left
    poorer = np.minimum(left, right)
    score = np.where(poorer >= 0, poorer + 0.01 * lengths, -1)
    return score.argmax(axis=0) == np.arange(len(begins))[:, None]


def best_answers(questions: list[Question], windows: list[Window], start_logits, end_logits,
                 num_best: int = 20, max_answer: int = 30) -> dict[str, str]:
    """{question id: answer}: the start and the end with the highest sum of logits, over all windows of a question.

    start_logits, end_logits: T numbers or more for each window. Candidates are the num_best starts (with maximum
    context) and the num_best ends in the paragraph, end >= start, at most max_answer tokens. "" if there is none."""
    best_scores = {}
    best_spans = {}
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        stretch = slice(window.first_position, window.first_position + len(window.offsets))
        starts = np.where(window.is_max_context, np.asarray(starts[stretch], np.float64), -np.inf)
        ends = np.asarray(ends[stretch], np.float64)
        first = np.argsort(-starts, kind="stable")[:num_best]  # tokens of the stretch
        last = np.argsort(-ends, kind="stable")[:num_best]

        lengths = last - first[:, None] + 1  # (starts, ends)
        is_valid = (lengths > 0) & (lengths <= max_answer)
        scores = np.where(is_valid, starts[first][:, None] + ends[last], -np.inf)
        if scores.size and scores.max() > best_scores.get(window.question_index, -np.inf):
            row, column = np.unravel_index(scores.argmax(), scores.shape)
            best_scores[window.question_index] = scores.max()
            best_spans[window.question_index] = (window.offsets[first[row], 0], window.offsets[last[column], 1])

    answers = {}
    for index, question in enumerate(questions):
        start, end = best_spans.get(index, (0, 0))
        answers[question.id] = answer_text(question.context, start, end)
    return answers


def answer_text(context: str, start: int, end: int) -> str:
    """context[start:end] without RoBERTa's leading space, and with the accents behind its last character: BERT's
    tokenizer drops them, so that its token for "cafe\\u0301" (e and accent are two characters) ends too early."""
    while 0 < end < len(context) and unicodedata.category(context[end]) == "Mn":
        end += 1
    return context[start:end].strip()


def squad_scores(predictions: dict[str, str], questions: list[Question]) -> dict[str, float]:
    """{"em", "f1"} in percent, equal to the official evaluate-v1.1.py. A question without prediction counts 0."""
    exact_matches = 0
    total_f1 = 0.0
    for question in questions:
        if question.id not in predictions:
            continue
        predicted = normalised_words(predictions[question.id])
        references = [normalised_words(text) for text, _ in question.answers]
        exact_matches += predicted in references
        total_f1 += max(word_f1(predicted, reference) for reference in references)
    return {"em": 100.0 * exact_matches / len(questions), "f1": 100.0 * total_f1 / len(questions)}


def normalised_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles: "The U.S. state" -> us, state."""
    text = text.lower()
    text = "".join(character for character in text if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(predicted: list[str], reference: list[str]) -> float:
    num_common = sum((Counter(predicted) & Counter(reference)).values())
    if num_common == 0:
        return 0.0
    precision = num_common / len(predicted)
    recall = num_common / len(reference)
    return 2 * precision * recall / (precision + recall)


# ---------------------------------------------------------------------------------------------------
# 5. Metrics of predicted (n,) and labels (n,)
# ---------------------------------------------------------------------------------------------------


def accuracy(predicted, labels) -> float:
    return float(np.mean(np.equal(predicted, labels))) if len(labels) else 0.0


def f1(predicted, labels) -> float:
    """The harmonic mean of precision and recall of class 1."""
    is_predicted = np.equal(predicted, 1)
    is_label = np.equal(labels, 1)
    num_both = np.sum(is_predicted & is_label)
    return float(2 * num_both / max(np.sum(is_predicted) + np.sum(is_label), 1))


def matthews(predicted, labels) -> float:
    """(tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)), which is Pearson's r of zeros and ones."""
    return pearson(predicted, labels)


def pearson(predicted, labels) -> float:
    """0.0 where it is undefined: fewer than two values, all equal, or not finite."""
    x = np.asarray(predicted, np.float64)
    y = np.asarray(labels, np.float64)
    if len(x) < 2 or not np.isfinite(x).all() or not np.isfinite(y).all():
        return 0.0
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x = x - x.mean()
    y = y - y.mean()
    r = (x / np.linalg.norm(x)) @ (y / np.linalg.norm(y))
    return float(np.clip(r, -1, 1)) if np.isfinite(r) else 0.0


def spearman(predicted, labels) -> float:
    """Pearson's r of the ranks. Equal values share the mean of their ranks: 10, 20, 20, 30 -> 1, 2.5, 2.5, 4."""
    if np.isnan(predicted).any() or np.isnan(labels).any():
        return 0.0
    return pearson(average_ranks(predicted), average_ranks(labels))


def average_ranks(values) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_ranks = np.cumsum(counts)
    return (last_ranks - (counts - 1) / 2)[places]


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def score(task: Task, predictions, examples: list[Example], split: str = "dev") -> dict[str, float]:
    """The metrics of the task for predictions (n,), class ids or numbers. With split dev_mm those named _mm."""
    labels = [example.label for example in examples]
    if len(predictions) != len(labels) or None in labels:
        raise ValueError(f"task {task.name}: {len(predictions)} predictions for {len(labels)} labels")
    scores = {}
    for name in task.metrics:
        if name.endswith("_mm") == (split == "dev_mm"):
            metric = METRICS[name.removesuffix("_mm")]
            scores[name] = metric(predictions, labels)
    return scores


def floor(task: Task, examples: list, split: str = "dev") -> dict[str, float]:
    """What always answering the most frequent class scores; 0.0 for numbers and spans. A run that scores no better
    than this has collapsed. MRPC dev, where 279 of 408 are class 1: accuracy 0.684, f1 0.812."""
    if task.predicts != "class":
        return dict.fromkeys(task.metrics, 0.0)
    majority = np.bincount([example.label for example in examples]).argmax()
    return score(task, np.full(len(examples), majority), examples, split)


# ---------------------------------------------------------------------------------------------------
# Appendix: submission files. Skip it at a first reading, like all that follows.
# ---------------------------------------------------------------------------------------------------

SUBMISSION_FILES = {"test": "MNLI-m.tsv", "test_mm": "MNLI-mm.tsv", "ax": "AX.tsv"}  # of MNLI; else FOLDER.tsv


def write_submission(task: Task, predictions, path):
    """GLUE's table of predictions (n,) in the order of the test file, labels as words, numbers with 3 decimals; for
    squad the JSON {id: text} that the official scorer reads."""
    if task.predicts == "span":
        text = json.dumps(predictions)
    else:
        lines = ["index\tprediction\n"]
        for index, value in enumerate(predictions):
            word = task.labels[int(value)] if task.predicts == "class" else f"{value:.3f}"
            lines.append(f"{index}\t{word}\n")
        text = "".join(lines)
    with bert.atomic_write(path) as file:
        file.write(text.encode())


# ---------------------------------------------------------------------------------------------------
# Appendix: downloads
# ---------------------------------------------------------------------------------------------------

FACEBOOK = "https://dl.fbaipublicfiles.com"
GLUE = f"{FACEBOOK}/glue/data"
SENTEVAL = f"{FACEBOOK}/senteval/senteval_data"
SQUAD_EXPLORER = "https://rajpurkar.github.io/SQuAD-explorer/dataset"


class Published(NamedTuple):
    """A file on the web. splits: the splits of its task that need it; None: all."""
    task: str
    url: str
    size: int  # bytes
    sha256: str
    splits: tuple | None = None


PUBLISHED = (
    Published("cola", f"{GLUE}/CoLA.zip", 376971,
              "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    Published("sst2", f"{GLUE}/SST-2.zip", 7439277,
              "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    Published("mrpc", f"{SENTEVAL}/msr_paraphrase_train.txt", 1047044,
              "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89", ("train", "dev")),
    Published("mrpc", f"{GLUE}/mrpc_dev_ids.tsv", 6222,
              "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7", ("train", "dev")),
    Published("mrpc", f"{SENTEVAL}/msr_paraphrase_test.txt", 441275,
              "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784", ("test",)),
    Published("stsb", f"{GLUE}/STS-B.zip", 802872,
              "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    Published("qqp", f"{GLUE}/QQP-clean.zip", 41696084,
              "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    Published("mnli", f"{GLUE}/MNLI.zip", 312783507,
              "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    Published("mnli", f"{GLUE}/AX.tsv", 222257,
              "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd", ("ax",)),
    Published("qnli", f"{GLUE}/QNLIv2.zip", 10627589,
              "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    Published("rte", f"{GLUE}/RTE.zip", 697150,
              "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    Published("wnli", f"{GLUE}/WNLI.zip", 28999,
              "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    Published("squad", f"{SQUAD_EXPLORER}/train-v1.1.json", 30288272,
              "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955", ("train",)),
    Published("squad", f"{SQUAD_EXPLORER}/dev-v1.1.json", 4854279,
              "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9", ("dev",)),
)


def download(task, folder=None, splits: list | None = None) -> Path:
    """Fetches what is missing of the files that the splits (None: all) need, below `folder` (default: the cache)
    -> the folder to read. AX.tsv comes only with the split "ax", which --predict reads."""
    task = find_task(task)
    folder = Path(folder or data.cache() / "glue") / task.folder
    for published in PUBLISHED:
        is_needed = splits is None or published.splits is None or set(splits) & set(published.splits)
        if published.task != task.name or not is_needed:
            continue
        name = published.url.rpartition("/")[2]
        if not name.endswith(".zip"):
            data.fetch([published.url], folder / name, published.size, published.sha256)
        elif not folder.exists():  # unpack() makes the folder when all is there: CoLA/CoLA/dev.tsv
            archive = data.fetch([published.url], folder.with_name(name), published.size, published.sha256)
            data.unpack(archive, folder, (".tsv",))
    return folder


# ---------------------------------------------------------------------------------------------------
# Appendix: a task of your own
# ---------------------------------------------------------------------------------------------------

OWN_TASK_KEYS = ("name", "columns", "label", "labels", "metric", "train", "dev")  # and perhaps "test"


def read_own_task(path: Path) -> Task:
    """{"name": "mood", "columns": ["text"], "label": "mood", "labels": ["sad", "glad"], "metric": "accuracy",
     "train": "a.tsv", "dev": "b.tsv", "test": "c.tsv"}

    The files are tab-separated and lie beside this one; "test" may be missing. One or two columns, by name, or by
    index from 0 if there is no header line. "labels": null predicts a number."""
    content = bert.read_json(path)
    missing = [key for key in OWN_TASK_KEYS if key not in content]
    unknown = [key for key in content if key not in (*OWN_TASK_KEYS, "test")]
    if missing or unknown:
        problem = f"missing key {missing[0]!r}" if missing else f"unknown key {unknown[0]!r:.60}"
        raise ValueError(f"{path}: {problem}; needed: {', '.join(OWN_TASK_KEYS)}; possible: test")

    name = content["name"]
    taken = {*TASKS, *(task.folder for task in TASKS.values())}
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name in taken:
        raise ValueError(f'{path}: "name" must be a word that is not an official task')

    columns = content["columns"]
    label_column = content["label"]
    is_list = isinstance(columns, list) and len(columns) in (1, 2)
    if not is_list or not all(is_column(column) for column in (*columns, label_column)):
        raise ValueError(f'{path}: "columns" must be a list of one or two header names or indices from 0, "label" one '
                         "such")

    labels = content["labels"]
    if labels is None:
        predicts = "number"
        labels = ()
        fitting = ["pearson", "spearman"]
    else:
        predicts = "class"
        labels = tuple(str(label) for label in labels) if isinstance(labels, list) else ()
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f'{path}: "labels" must be a list of two or more different words, or null to predict a '
                             "number")
        fitting = ["accuracy", "f1", "matthews"] if len(labels) == 2 else ["accuracy"]
    if content["metric"] not in fitting:
        raise ValueError(f'{path}: "metric" {content["metric"]!r:.40} does not fit these labels; valid: '
                         f"{', '.join(fitting)}")

    files = {}
    for split in ("train", "dev", "test"):
        if split in content:
            files[split] = (str(path.absolute().parent / str(content[split])),)
    task = Task(name=name, folder=name, predicts=predicts, labels=labels, metrics=(content["metric"],),
                text_columns=tuple(columns), label_column=label_column, files=files)
    for split in files:
        find_file(task, split, ".")
    return task


def is_column(column) -> bool:
    return isinstance(column, str) or type(column) is int and column >= 0
