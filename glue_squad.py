"""GLUE and SQuAD v1.1: what the files hold, how it becomes token ids, how predictions are scored. No model.

1 the table of tasks, and how to add one; 2 rows of GLUE's tables; 3 batches of token ids; 4 SQuAD's windows
and answers; 5 metrics, submissions. Letters: B sequences, T tokens, n examples. Metrics of GLUE are fractions
(accuracy, f1 in [0, 1], correlations in [-1, 1]); SQuAD's em and f1 are percent, as its scorer prints them.
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

import data

# ---------------------------------------------------------------- 1 tasks

@dataclass(frozen=True)
class Task:
    """Where the texts of a task are, what is predicted, and the paper's settings for fine-tuning."""
    name: str
    folder: str  # its folder in GLUE's layout
    labels: tuple | None  # words of the label column by class id; None: predicts a number; (): answer spans
    metrics: tuple  # the first one selects the best step
    texts: tuple = ("sentence1", "sentence2")  # one or two columns: names in the header line, or indices
    label: str | int = "label"
    test_texts: tuple = ()  # where the test file differs
    files: dict = field(default_factory=lambda: {s: [f"{s}.tsv"] for s in ("train", "dev", "test")})
    downloads: tuple = ()  # of PUBLISHED; default: FOLDER.zip
    epochs: int = 3
    lr: float = 2e-5
    batch_size: int = 32
    max_len: int = 128  # tokens
    eval_every: int = 50  # updates between evaluations


BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
MSR_TRAIN, MSR_TEST = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt"
# QQP, QNLI and WNLI are not in the paper and take its settings for GLUE. MNLI's label order is free: this is
# that of the Hugging Face hub (BERT's code began with contradiction). files: split -> possible names.
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", BINARY, ("matthews", "accuracy"), (3,), 1, test_texts=("sentence",)),
    Task("sst2", "SST-2", BINARY, ("accuracy",), ("sentence",)),
    Task("mrpc", "MRPC", BINARY, ("accuracy", "f1"), ("#1 String", "#2 String"), "Quality", files={
         "train": ["train.tsv", MSR_TRAIN], "dev": ["dev.tsv", MSR_TRAIN], "test": ["test.tsv", MSR_TEST],
         "ids": ["mrpc_dev_ids.tsv", "dev_ids.tsv"]}, downloads=(MSR_TRAIN, MSR_TEST, "mrpc_dev_ids.tsv")),
    Task("stsb", "STS-B", None, ("pearson", "spearman"), label="score"),
    Task("qqp", "QQP", BINARY, ("accuracy", "f1"), ("question1", "question2"), "is_duplicate",
         downloads=("QQP-clean.zip",), eval_every=500),
    Task("mnli", "MNLI", ("entailment", "neutral", "contradiction"), ("accuracy", "accuracy_mm"),
         label="gold_label", eval_every=500, downloads=("MNLI.zip", "AX.tsv"), files={
         "train": ["train.tsv"], "test": ["test_matched.tsv"], "test_mm": ["test_mismatched.tsv"],
         "dev": ["dev_matched.tsv"], "dev_mm": ["dev_mismatched.tsv"], "ax": ["AX.tsv", "diagnostic.tsv"]}),
    Task("qnli", "QNLI", ENTAILMENT, ("accuracy",), ("question", "sentence"), eval_every=500,
         downloads=("QNLIv2.zip",)),
    Task("rte", "RTE", ENTAILMENT, ("accuracy",)),
    Task("wnli", "WNLI", BINARY, ("accuracy",)),
    Task("squad", "squad", (), ("f1", "em"), epochs=2, lr=3e-5, batch_size=16, max_len=384, eval_every=1000,
         files={"train": ["train-v1.1.json"], "dev": ["dev-v1.1.json"]},
         downloads=("train-v1.1.json", "dev-v1.1.json")))}

FACEBOOK, SQUAD = "https://dl.fbaipublicfiles.com/", "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
GLUE, SENTEVAL = FACEBOOK + "glue/data/", FACEBOOK + "senteval/senteval_data/"
PUBLISHED = {  # file: where, bytes, sha256
    "CoLA.zip": (GLUE, 376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "SST-2.zip": (GLUE, 7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "QQP-clean.zip": (GLUE, 41696084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "STS-B.zip": (GLUE, 802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "MNLI.zip": (GLUE, 312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "QNLIv2.zip": (GLUE, 10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "RTE.zip": (GLUE, 697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "WNLI.zip": (GLUE, 28999, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    "AX.tsv": (GLUE, 222257, "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"),
    "mrpc_dev_ids.tsv": (GLUE, 6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
    MSR_TRAIN: (SENTEVAL, 1047044, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
    MSR_TEST: (SENTEVAL, 441275, "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
    "train-v1.1.json": (SQUAD, 30288272, "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
    "dev-v1.1.json": (SQUAD, 4854279, "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9")}
SUBMISSION = {"test": "MNLI-m.tsv", "test_mm": "MNLI-mm.tsv", "ax": "AX.tsv"}  # mnli; else FOLDER.tsv


def find_task(name) -> Task:
    """A Task from its name, or from the path of a JSON file describing an own one; a Task stays itself."""
    if isinstance(name, Task) or str(name).endswith(".json"):
        return name if isinstance(name, Task) else _own_task(Path(name))
    if name not in TASKS:
        raise ValueError(f"unknown task {str(name)[:60]!r}; known: {', '.join(TASKS)}, or an own FILE.json")
    return TASKS[name]


def _own_task(path):
    """{"name": "mood", "columns": ["text"], "label": "mood", "labels": ["sad", "glad"], "metric": "accuracy",
    "train": "a.tsv", "dev": "b.tsv", "test": "c.tsv"}: files lie beside this one, "test" may be missing;
    one or two columns, by index from 0 if there is no header line; "labels": null predicts a number."""
    keys, own = ["name", "columns", "label", "labels", "metric", "train", "dev"], data.read_json(path)
    if odd := sorted((own.keys() - {"test"}) ^ {*keys}):
        raise ValueError(f"{path}: {'unknown' if odd[0] in own else 'missing'} key {odd[0][:60]!r}; "
                         f"needed: {', '.join(keys)}; possible: test")
    name, columns, label, labels, metric = (own[key] for key in keys[:5])
    labels = tuple(map(str, labels)) if isinstance(labels, list) else None if labels is None else ()
    fit = ["accuracy"] if labels and labels[2:] else ["accuracy", "f1", "matthews"] if labels else []
    fit, wrong = fit or ["pearson", "spearman"], ""
    taken = {*TASKS, *(task.folder for task in TASKS.values())}
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name in taken:
        wrong = '"name" must be a word that is no official task'
    elif not isinstance(columns, list) or len(columns) not in (1, 2) or not all(
            isinstance(column, str) or type(column) is int and column >= 0 for column in (*columns, label)):
        wrong = '"columns" must be a list of one or two header names or indices from 0, "label" one such'
    elif labels is not None and not len({*labels}) == len(labels) > 1:
        wrong = '"labels" must be a list of two or more different words, or null to predict a number'
    elif metric not in fit:
        wrong = f'"metric" {str(metric)[:40]!r} does not fit these labels; valid: {", ".join(fit)}'
    if wrong:
        raise ValueError(f"{path}: {wrong}")
    files = {s: [str(path.absolute().parent / str(own[s]))] for s in ("train", "dev", "test") if s in own}
    task = Task(name, name, labels, (metric,), tuple(columns), label, files=files)
    for split in files:
        find(task, split, ".")
    return task


def find(task: Task, split: str, folder) -> Path:
    """The file of a split, in folder/<GLUE's name of the task> or `folder` itself; else FileNotFoundError."""
    if split not in task.files:
        raise ValueError(f"task {task.name} has no split {split[:40]!r}; it has {', '.join(task.files)}")
    folders = Path(folder) / task.folder, Path(folder)
    places = dict.fromkeys(base / name for base in folders for name in task.files[split])
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"task {task.name}: no {split} file; expected {' or '.join(map(str, places))}")


def download(task, folder=None) -> Path:
    """Fetches what is missing of a task's files below `folder` (default: the cache) -> the folder to read."""
    task = find_task(task)
    folder = Path(folder or data.cache() / "glue") / task.folder
    for name in task.downloads or (f"{task.folder}.zip",):
        place, size, sha256 = PUBLISHED[name]
        if not name.endswith(".zip"):
            data.fetch([place + name], folder / name, size, sha256)
        elif not folder.exists():  # appears when complete; holds the archive's own folder: CoLA/CoLA/dev.tsv
            data.unpack(data.fetch([place + name], folder.with_name(name), size, sha256), folder, (".tsv",))
    return folder


# ---------------------------------------------------------------- 2 rows of a table

class Example(NamedTuple):
    text_a: str
    text_b: str | None = None
    label: int | float | None = None  # class id, or number; None in a test file


def load_glue(task, split: str, folder) -> list[Example]:
    """The examples of a split: train, dev, test, for MNLI dev_mm, test_mm, ax (diagnostics); in file order.
    Raises FileNotFoundError with the places looked at, ValueError with file and line for a malformed row."""
    task = find_task(task)
    path, labelled = find(task, split, folder), split in ("train", "dev", "dev_mm")
    columns = (*task.texts, task.label) if labelled else task.test_texts or task.texts
    rows, examples, skipped = _rows(path), [], 0
    where, first = next(rows, (f"{path} line 1", []))
    if not any(isinstance(column, str) for column in columns):  # no header: the first line is a row
        rows = _rows(path)
    index = dict(zip([*first, *range(len(first))], [*range(len(first))] * 2, strict=True))
    if missing := [column for column in columns if column not in index]:
        raise ValueError(f"{where}: no column {missing[0]!r} in {str(first)[:200]}")
    dev_ids = None
    if task.name == "mrpc" and path.name == MSR_TRAIN:  # dev is the rows whose ids GLUE lists
        dev_ids = {tuple(ids) for _, ids in _rows(find(task, "ids", folder))}
    for where, fields in rows:
        if len(fields) != len(first):
            if task.name == "qqp" and labelled:  # a line break inside a question: half a row is of no use
                skipped += 1
                continue
            raise ValueError(f"{where}: {len(fields)} fields where line 1 has {len(first)}")
        if dev_ids is None or (tuple(fields[1:3]) in dev_ids) == (split == "dev"):
            texts = [fields[index[column]] for column in columns]
            label = _label(task, texts.pop(), where) if labelled else None
            examples.append(Example(texts[0], texts[1] if len(texts) > 1 else None, label))
    if skipped:
        print(f"{path}: skipped {skipped} rows without {len(first)} fields", file=sys.stderr)
    if not examples:
        raise ValueError(f"{path}: no rows for {split}")
    return examples


def _rows(path: Path):
    r"""("FILE line N", fields) of each line; only "\n" ends a line, only "\t" a field, nothing is quoted.
    'He said "no\t0' is a row of two fields; a csv reader would go on to the next quotation mark. Sentences
    hold U+0085, U+2028, "\x0b", where str.splitlines() breaks. Dropped are "\r" at the end of a line, a
    byte order mark at the start of the file, and an empty last line."""
    longest = 1 << 20  # bytes of a line; real ones have a few thousand
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(longest + 1), b""), 1):
            where = f"{path} line {number}"
            if len(line) > longest:
                raise ValueError(f"{where}: over {longest} bytes; is this tab-separated text?")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: byte {error.start + 1} of the line is not UTF-8 text") from None
            if text or file.peek(1):
                yield where, text.split("\t")


def _label(task, word, where):
    try:
        value = task.labels.index(word) if task.labels else float(word)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        valid = f"one of {', '.join(task.labels)}" if task.labels else "a finite number"
        raise ValueError(f"{where}: label {word[:60]!r} is not {valid}")
    return value


# ---------------------------------------------------------------- 3 token ids and batches

def encode(examples: list[Example], vocab: data.Vocabulary, max_len: int) -> list[tuple]:
    """(ids (T,), segments (T,)) of each example, T <= max_len, ready for pad()."""
    if max_len < 6:
        raise ValueError(f"max_len {max_len}: a pair of texts needs at least 6 tokens")
    encoded, room = [], max_len - len(_joined([], [], vocab)[0])
    second = _tokens([example.text_b for example in examples if example.text_b is not None], vocab)
    for example, a in zip(examples, _tokens([example.text_a for example in examples], vocab), strict=True):
        pair = truncate_pair(a.ids, next(second).ids, room) if example.text_b is not None else (
            a.ids[:max_len - 2], None)
        encoded.append(_joined(*pair, vocab))
    return encoded


def _tokens(texts, vocab):
    """What the tokenizers library finds in each text: kilobytes per text, hence a thousand at a time."""
    for start in range(0, len(texts), 1000):
        yield from vocab.tokenizer.encode_batch(texts[start:start + 1000], add_special_tokens=False)


def _joined(a, b, vocab):
    """BERT: [CLS] a [SEP] b [SEP], segments 1 from b on. RoBERTa: <s> a </s></s> b </s>, segments all 0."""
    roberta = vocab.tokenizer.id_to_token(vocab.sep) == "</s>"
    head, tail = [vocab.cls, *a, vocab.sep], [] if b is None else [*[vocab.sep] * roberta, *b, vocab.sep]
    return np.array(head + tail, np.int32), np.repeat([0, int(not roberta)], [len(head), len(tail)])


def truncate_pair(a: list, b: list, room: int) -> tuple[list, list]:
    """BERT's rule in one step: while they are too long drop the last token of the longer one, of b if equal.
    Room 3 for 6 + 7 tokens: 2 + 1. Room 10 for 3 + 20 tokens: 3 + 7."""
    keep = min(len(a), max(room - len(b), (room + 1) // 2))
    return a[:keep], b[:room - keep]


def bucketed(lengths, batch_size: int, rng: np.random.Generator, pool: int = 50) -> list[np.ndarray]:
    """Batches of example indices, each index once, like lengths together; a function of `rng` alone.
    Shuffle, sort by length inside pools of `pool` batches, cut, shuffle the batches. On SST-2's training set
    in batches of 32 padding adds 4.8 % to the real tokens; without sorting 202 %, padded to 128 861 %."""
    lengths, order = np.asarray(lengths), rng.permutation(len(lengths))
    order = order[np.lexsort((lengths[order], np.arange(len(order)) // (pool * batch_size)))]
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def pad(sequences, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B pairs (ids, segments) -> ids (B, T) int64, keep (B, T), False on padding, segments (B, T) int64."""
    shape = len(sequences), max(len(ids) for ids, _ in sequences)
    batch, keep, kinds = np.full(shape, pad_id, np.int64), np.zeros(shape, bool), np.zeros(shape, np.int64)
    for i, (ids, segments) in enumerate(sequences):
        batch[i, :len(ids)], keep[i, :len(ids)], kinds[i, :len(ids)] = ids, True, segments
    return batch, keep, kinds


# ---------------------------------------------------------------- 4 SQuAD

class Question(NamedTuple):
    id: str
    question: str
    context: str
    answers: list[tuple[str, int]]  # text, and where it begins in the context, in characters


class Window(NamedTuple):
    """A part of a paragraph as the model reads it: [CLS] question [SEP] part [SEP]."""
    question: int  # index of its question
    ids: np.ndarray  # (T,)
    segments: np.ndarray  # (T,)
    spans: np.ndarray  # (tokens of the part, 2): where each begins and ends in the context, in characters
    first: int  # position of the first of them in ids
    max_context: np.ndarray  # (tokens of the part,) bool: an answer may begin here, see windows()
    start: int  # positions of the answer's first and last token; 0, 0 ([CLS]) unless all of it is here
    end: int


def load_squad(path) -> list[Question]:
    """The questions of a SQuAD v1.1 file. ValueError names the place: data[3].paragraphs[0].qas[1]."""
    def get(owner, key, kind):
        value = owner.get(key) if isinstance(owner, dict) else None
        if type(value) is not kind or kind is str and re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{path}: {where}: no {key!r} here that is a valid {kind.__name__}")
        return value
    where, questions = "top level", {}
    for i, article in enumerate(get(data.read_json(Path(path)), "data", list)):
        where = f"data[{i}]"
        for j, paragraph in enumerate(get(article, "paragraphs", list)):
            where = f"data[{i}].paragraphs[{j}]"
            context = get(paragraph, "context", str)
            for k, qa in enumerate(get(paragraph, "qas", list)):
                where, name = f"data[{i}].paragraphs[{j}].qas[{k}]", get(qa, "id", str)
                gold = [(get(x, "text", str), get(x, "answer_start", int)) for x in get(qa, "answers", list)]
                if name in questions or not gold or min(start for _, start in gold) < 0:
                    raise ValueError(f"{path}: {where}: needs an id of its own, and answers with start >= 0")
                questions[name] = Question(name, get(qa, "question", str), context, gold)
    if not questions:
        raise ValueError(f"{path}: no questions")
    return list(questions.values())


# A paragraph longer than a window is read through several, each `step` tokens on. With max_len 10 and step 2:
#   question "Where?"                           [CLS] where ? [SEP] .. [SEP]: 5 tokens are left for the text
#   paragraph "Anna met Bob in Rome last May"   7 tokens
#   window 0   anna met bob in rome             the answer "Rome last" is cut: start = end = 0, place of [CLS]
#   window 1            bob in rome last may    whole: start 6, end 7. It reaches the end: it is the last one
# "rome" has min(4, 0) tokens on its poorer side in window 0, min(2, 2) in window 1: only window 1, its
# maximum context, may propose an answer that begins there.
def windows(questions: list, vocab, max_len=384, step=128, max_question=64, training=False) -> list[Window]:
    """All windows of all questions, in order; max_len, step and max_question in tokens.
    training: sets start and end from the first answer of each question, by its characters; questions whose
    answer is not where the file says, or holds no token, are left out, with one line that counts them."""
    texts = sorted({question.context for question in questions})  # each paragraph serves about five questions
    contexts = {text: (found.ids, np.array(found.offsets, np.int32).reshape(-1, 2))
                for text, found in zip(texts, _tokens(texts, vocab), strict=True)}
    asked = _tokens([question.question.strip() for question in questions], vocab)
    made, dropped, specials = [], 0, len(_joined([], [], vocab)[0])
    for index, (question, ask) in enumerate(zip(questions, asked, strict=True)):
        (ids, spans), ask = contexts[question.context], ask.ids[:max_question]
        first, room = len(ask) + specials - 1, max_len - len(ask) - specials
        if room < 1:
            raise ValueError(f"max_len {max_len}: no room for text after {question.question[:60]!r}")
        answer = _answer_tokens(question, spans) if training else (0, -1)
        if answer is None:
            dropped += 1
            continue
        hop = min(step, room)  # a short window must not jump over tokens
        starts = range(0, max(len(ids) - room, 0) + hop, hop)
        for at, most in zip(starts, _max_context(len(ids), starts, room), strict=True):
            part, whole = slice(at, at + room), at <= answer[0] <= answer[1] < at + room
            ends = (first + token - at if whole else 0 for token in answer)
            made.append(Window(index, *_joined(ask, ids[part], vocab), spans[part], first, most[part], *ends))
    if dropped:
        print(f"left out {dropped} of {len(questions)} questions: answer not in its place", file=sys.stderr)
    return made


def _answer_tokens(question, spans):
    """First token that ends after the first answer begins, last token that begins before it ends: right where
    RoBERTa's " Rome" spans (2, 7) and the answer (3, 7), and where four tokens span one emoji."""
    text, start = question.answers[0]
    if question.context[start:start + len(text)] != text or not text.strip():
        return None
    start, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    first, last = np.searchsorted(spans[:, 1], start, side="right"), np.searchsorted(spans[:, 0], end) - 1
    return (int(first), int(last)) if first <= last else None


def _max_context(n, starts, room):
    """(windows, n): which window gives each of n tokens most context on its poorer side (first of equals)."""
    first = np.array(starts)[:, None]
    length, left = np.minimum(room, n - first), np.arange(n) - first
    poorer = np.minimum(left, length - 1 - left)
    return np.where(poorer >= 0, poorer + 0.01 * length, -1).argmax(0) == np.arange(len(first))[:, None]


def best_answers(questions: list, windows: list, start_logits, end_logits, best=20, longest=30) -> dict:
    """{question id: answer}: the start and end with the highest sum of logits over all windows of a question.
    start_logits, end_logits: T numbers or more per window. Candidates: `best` starts (with maximum context) x
    `best` ends in the paragraph, end >= start, at most `longest` tokens. "" if there is none."""
    found = {}
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        part = slice(window.first, window.first + len(window.spans))
        starts = np.where(window.max_context, np.asarray(starts[part], np.float64), -np.inf)
        ends = np.asarray(ends[part], np.float64)
        i, j = (np.argsort(-logits, kind="stable")[:best] for logits in (starts, ends))
        length = j - i[:, None] + 1
        total = np.where((length > 0) & (length <= longest), starts[i][:, None] + ends[j], -np.inf)
        if total.size and total.max() > found.get(window.question, (-np.inf,))[0]:
            row, column = np.unravel_index(total.argmax(), total.shape)
            found[window.question] = total.max(), window.spans[i[row], 0], window.spans[j[column], 1]
    return {q.id: _text(q.context, *found.get(i, (0, 0, 0))[1:]) for i, q in enumerate(questions)}


def _text(context, start, end):
    """context[start:end] without RoBERTa's leading space, with the accents behind its last character: BERT
    drops them, so that its token for "cafe\\u0301" (e and accent are two characters) ends too early."""
    while 0 < end < len(context) and unicodedata.category(context[end]) == "Mn":
        end += 1
    return context[start:end].strip()


def squad_scores(predictions: dict[str, str], questions: list[Question]) -> dict[str, float]:
    """{"em", "f1"} in percent, equal to the official evaluate-v1.1.py; a question not answered counts 0."""
    def words(text):  # "The U.S. state" -> us, state
        text = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()
    def overlap(said, gold):
        same = sum((Counter(said) & Counter(gold)).values())
        precision, recall = same / max(len(said), 1), same / max(len(gold), 1)
        return 2 * precision * recall / (precision + recall) if same else 0
    exact = f1 = 0
    for question in questions:
        if question.id in predictions:
            said, golds = words(predictions[question.id]), [words(text) for text, _ in question.answers]
            exact += said in golds
            f1 += max(overlap(said, gold) for gold in golds)
    return {"em": 100.0 * exact / len(questions), "f1": 100.0 * f1 / len(questions)}


# ---------------------------------------------------------------- 5 metrics, of predicted (n,), labels (n,)

def accuracy(predicted, labels) -> float:
    return float(np.mean(np.equal(predicted, labels))) if len(labels) else 0.0


def f1(predicted, labels) -> float:
    """Of class 1: harmonic mean of precision and recall."""
    said, gold = np.equal(predicted, 1), np.equal(labels, 1)
    return float(2 * np.sum(said & gold) / max(np.sum(said) + np.sum(gold), 1))


def matthews(predicted, labels) -> float:
    """(tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)), Pearson's r of zeros and ones."""
    return pearson(predicted, labels)


def pearson(predicted, labels) -> float:
    """0.0 where it is undefined: fewer than two values, all equal, or not finite."""
    pair = np.array([predicted, labels], np.float64)
    if pair.shape[1] < 2 or not np.isfinite(pair).all() or (pair == pair[:, :1]).all(1).any():
        return 0.0
    x, y = pair - pair.mean(1, keepdims=True)
    r = (x / np.linalg.norm(x)) @ (y / np.linalg.norm(y))
    return float(np.clip(r, -1, 1)) if np.isfinite(r) else 0.0


def spearman(predicted, labels) -> float:
    """Pearson of the ranks; equal values share the mean of their ranks: 10, 20, 20, 30 -> 1, 2.5, 2.5, 4."""
    def ranks(values):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]
    return 0.0 if np.isnan([predicted, labels]).any() else pearson(ranks(predicted), ranks(labels))


def score(task: Task, predictions, examples: list[Example], split: str = "dev") -> dict[str, float]:
    """The task's metrics of predictions (n,): class ids, or numbers. With split dev_mm those named _mm."""
    if len(predictions) != len(examples) or any(example.label is None for example in examples):
        raise ValueError(f"task {task.name}: {len(predictions)} predictions for {len(examples)} labels")
    metrics = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}
    return {name: metrics[name.removesuffix("_mm")](predictions, [example.label for example in examples])
            for name in task.metrics if name.endswith("_mm") == (split == "dev_mm")}


def floor(task: Task, examples, split: str = "dev") -> dict[str, float]:
    """What always answering the most frequent class scores (0.0 for numbers and spans): no better is a
    collapsed run. MRPC dev, where 279 of 408 are class 1: accuracy 0.684, f1 0.812."""
    if not task.labels:
        return dict.fromkeys(task.metrics, 0.0)
    majority = np.bincount([example.label for example in examples]).argmax()
    return score(task, np.full(len(examples), majority), examples, split)


def write_submission(task: Task, predictions, path) -> None:
    """GLUE's TSV of predictions (n,) in the test file's order, labels as words, numbers with 3 decimals; for
    squad the JSON {id: text} that the official scorer reads."""
    with data.replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        if task.name == "squad":
            json.dump(predictions, file)
        else:
            words = [task.labels[int(value)] if task.labels else f"{value:.3f}" for value in predictions]
            file.writelines(["index\tprediction\n", *(f"{i}\t{word}\n" for i, word in enumerate(words))])
