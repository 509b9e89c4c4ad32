"""Is the ticket any good? Fine-tune a subnetwork on a GLUE task or SQuAD v1.1, and record what it scores.

    python finetune.py --task sst2 --mask mask.pt

The mask is fixed and its zeros lie in the weights themselves: each pruned entry is set to zero once, and its gradient
is zeroed before clipping, so it stays exactly zero and AdamW does, bit for bit, what torch's prune.custom_from_mask
would do (METHOD: TAMT's glue_trans.py and squad_trans.py). Without --mask the whole network is trained: the reference.

Same as the released code: a fresh head per seed, AdamW without decay, linear decay to 0 without warm-up, clip 1.0,
epochs, batch sizes and lengths per task (glue_squad.TASKS), best score over the dev evaluations.
Deliberately different: batches hold sentences of like length; the last step and every epoch's end are evaluated, and
`best` and `final` stand side by side; MNLI reports matched and mismatched under their own names; SQuAD's answers are
found by characters; an undefined metric is 0.

Glossary: B sequences, T tokens, C labels, n examples; a `target` is a class id, a number, or two positions of a span.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import bert
import data
import glue_squad
import tamt

EVAL_EVERY = {"mnli": 500, "qqp": 500, "qnli": 500, "squad": 1000}  # updates between evaluations; other tasks 50

# ---------------------------------------------------------------- a task made ready


@dataclass
class Work:
    """A task as token ids. `train` and each of `dev` are lists of (ids (T,), segments (T,)) in file order."""
    task: glue_squad.Task
    train: list
    targets: np.ndarray  # (n,) class ids or numbers, (n, 2) first and last position of a span
    dev: dict[str, list]
    gold: dict[str, list]  # split -> examples, or for SQuAD questions
    windows: list  # SQuAD's dev windows, which turn logits into text

    @property
    def outputs(self) -> int:
        return len(self.task.labels or ()) or 1


def read_task(task, vocab, folder, max_len: int, limit: int | None = None, seed: int = 0, splits=("dev", "dev_mm")) -> Work:
    """Reads and encodes train and dev. `limit` keeps that many random training examples (windows for SQuAD, as in the
    paper's few-data curves), drawn by `seed`. MNLI without its mismatched file reports matched alone."""
    windows = []
    if task.name == "squad":
        questions = {s: glue_squad.load_squad(glue_squad.find(task, s, folder)) for s in ("train", "dev")}
        made = glue_squad.windows(questions["train"], vocab, max_len, training=True)
        windows = glue_squad.windows(questions["dev"], vocab, max_len)
        train, targets = [(w.ids, w.segments) for w in made], np.array([(w.start, w.end) for w in made])
        dev, gold = {"dev": [(w.ids, w.segments) for w in windows]}, {"dev": questions["dev"]}
    else:
        examples = glue_squad.load_glue(task, "train", folder)
        train = glue_squad.encode(examples, vocab, max_len)
        targets = np.array([e.label for e in examples], np.int64 if task.labels else np.float32)
        gold = {split: read_split(task, split, folder) for split in splits if split in task.files}
        gold = {split: found for split, found in gold.items() if found}
        dev = {split: glue_squad.encode(found, vocab, max_len) for split, found in gold.items()}
    if limit and limit < len(train):
        chosen = np.random.default_rng([seed, 0x11]).permutation(len(train))[:limit]
        train, targets = [train[i] for i in chosen], targets[chosen]
    return Work(task, train, targets, dev, gold, windows)


def read_split(task, split: str, folder) -> list:
    try:
        return glue_squad.load_glue(task, split, folder)
    except FileNotFoundError:
        if not split.endswith("_mm"):
            raise
        print(f"{folder}: no mismatched file, so only matched accuracy is reported")
        return []


# ---------------------------------------------------------------- losses and predictions


def logits_of(model, net, work: Work, batch):  # B pairs of ids and segments -> (B, C), or (B, T, 2) for spans
    ids, keep, segments = (torch.from_numpy(x) for x in glue_squad.pad(batch, model.config.pad_token_id))
    device = next(model.parameters()).device
    ids, segments, keep = ids.to(device), segments.to(device), None if keep.all() else keep.to(device)
    hidden = net(ids, keep, segments if model.config.type_vocab_size > 1 else None)[-1]
    if work.task.name != "squad":
        return model.class_logits(hidden)
    logits = model.span_logits(hidden).float()
    return logits if keep is None else logits.masked_fill(~keep[..., None], -1e4)  # no answer lies in the padding


def task_loss(work: Work, logits, targets):  # (B, C) and (B,), or (B, T, 2) and (B, 2) -> sum over the batch
    """Cross-entropy; squared error for a number; the mean of start and end for a span."""
    if work.task.name == "squad":
        return sum(F.cross_entropy(logits[..., i], targets[:, i], reduction="sum") for i in (0, 1)) / 2
    if work.task.labels is None:
        return F.mse_loss(logits[:, 0].float(), targets, reduction="sum")
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@torch.no_grad()
def predict(model, work: Work, sequences: list, args, batch_size: int = 64) -> list[np.ndarray]:
    """Logits of each sequence in order, in eval mode: (C,) or (T, 2) each. Like lengths go together."""
    training, found = model.training, [None] * len(sequences)
    model.eval()
    order = np.argsort([len(ids) for ids, _ in sequences], kind="stable")
    for at in range(0, len(order), batch_size):
        rows = order[at:at + batch_size]
        with tamt.autocast(args.device, args.dtype):
            logits = logits_of(model, model, work, [sequences[i] for i in rows]).float().cpu().numpy()
        for i, row in zip(rows, logits, strict=True):
            found[i] = row
    model.train(training)
    return found


def answers(work: Work, logits: list, windows=None, questions=None):
    """Logits -> class ids (n,), numbers (n,), or {question id: text}."""
    if work.task.name == "squad":
        starts, ends = ([row[:, i] for row in logits] for i in (0, 1))
        return glue_squad.best_answers(work.gold["dev"], work.windows, starts, ends)
    return np.array([row.argmax() for row in logits] if work.task.labels else [row[0] for row in logits])


def evaluate(model, work: Work, args) -> dict[str, float]:
    """The task's metrics on its dev sets, under their names."""
    scores = {}
    for split, sequences in work.dev.items():
        said = answers(work, predict(model, work, sequences, args))
        scores |= glue_squad.squad_scores(said, work.gold[split]) if work.task.name == "squad" else \
            glue_squad.score(work.task, said, work.gold[split], split)
    return scores


# ---------------------------------------------------------------- fine-tuning


def apply_masks(model, masks: dict[str, torch.Tensor]):
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)


def fine_tune(model, work: Work, masks: dict[str, torch.Tensor], args, state: dict | None = None) -> dict:
    """Trains all weights under fixed masks -> {"best", "final", "best_step", "steps", "evaluations"}.

    Order, dropout and corruption are functions of (seed, step); `state` continues a run exactly."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = tamt.adamw(params.values(), args.device)
    history, begin, total_loss = [], 0, 0.0
    if state:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(state["params"][name])
        optimizer.load_state_dict(state["optimizer"])
        history, begin, total_loss = state["history"], state["step"], state["loss"]
    net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if args.world > 1 else model
    per_epoch = -(-len(work.train) // args.batch_size)
    steps, lengths = per_epoch * args.epochs, [len(ids) for ids, _ in work.train]
    targets, saved, began = torch.from_numpy(work.targets), time.time(), time.time()
    model.train()
    for step in range(begin, steps):
        epoch, number = divmod(step, per_epoch)
        if number == 0 or step == begin:
            batches = glue_squad.bucketed(lengths, args.batch_size, np.random.default_rng([args.seed, epoch]))
        rows = batches[number][args.rank_id::args.world]
        share = args.world if len(rows) else 0  # a last batch may have fewer rows than there are processes
        rows = rows if share else batches[number][:1]
        torch.manual_seed((args.seed * 1_000_003 + step) * 1021 + args.rank_id)
        with tamt.autocast(args.device, args.dtype):
            logits = logits_of(model, net, work, [work.train[i] for i in rows])
        loss = task_loss(work, logits, targets[rows].to(args.device)) / len(batches[number])
        (loss * share).backward()  # processes average their gradients
        with torch.no_grad():
            for name, mask in masks.items():
                if (grad := params[name].grad) is not None:
                    grad.mul_(mask)
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        total_loss, done = total_loss + float(loss.detach()), step + 1
        if not np.isfinite(total_loss):
            raise ValueError(f"the loss is {total_loss} at step {done}: a lower --lr (here {args.lr:g}) may help")
        if args.rank_id == 0 and (done % args.eval_every == 0 or done % per_epoch == 0 or done == steps):
            history.append({"step": done, "loss": total_loss / done, **evaluate(model, work, args)})
            left = round((time.time() - began) / (done - begin) * (steps - done))
            print(f"step {done}/{steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in history[-1].items() if k != "step")
                  + f"  ETA {left // 60}:{left % 60:02}", flush=True)
        if args.rank_id == 0 and args.out and (done % per_epoch == 0 or time.time() - saved > 300):
            saved = time.time()
            tamt.write_torch(args.out / "state.pt", {
                "format": 1, "settings": args.identity, "step": done, "params": {n: p.data for n, p in params.items()},
                "optimizer": optimizer.state_dict(), "history": history, "loss": total_loss})
    model.eval()
    names = list(work.task.metrics)
    best = max(history, key=lambda line: line[names[0]], default=None)
    if args.rank_id:
        return {}
    chosen = {"best": best, "final": history[-1]}
    return {key: {n: line[n] for n in names if n in line} for key, line in chosen.items()} | {
        "best_step": best["step"], "steps": steps}


# ---------------------------------------------------------------- command line


def settings(argv=None):
    """The command line, with the task's own defaults filled in."""
    parser = tamt.Parser(description="Fine-tune a subnetwork of a pre-trained BERT on one task and record its score.")
    add, whole, number = parser.add_argument, tamt.positive(int), tamt.positive(float)
    add("--task", required=True, help=f"{', '.join(glue_squad.TASKS)}, or the FILE.json of an own task")
    add("--mask", type=Path, help="mask file; without it the dense model is fine-tuned")
    add("--model", help="name or path of the checkpoint (the one named in the mask's metadata)")
    add("--data", type=Path, help="folder with the GLUE folders, train-v1.1.json and dev-v1.1.json (downloaded)")
    add("--epochs", type=whole, help="passes over the training set (GLUE 3, SQuAD 2)")
    add("--batch-size", type=whole, help="examples per update (GLUE 32, SQuAD 16)")
    add("--max-len", type=whole, help="tokens per example (GLUE 128, SQuAD 384)")
    add("--lr", type=number, help="learning rate at the start (GLUE 2e-5, SQuAD 3e-5)")
    add("--seed", type=int, default=1, help="of head, order, dropout and --limit (1)")
    add("--limit", type=whole, help="train on this many random examples; SQuAD: windows (all)")
    add("--eval-every", type=whole, help="updates between evaluations, besides each epoch's end (50 to 1000 by task)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute (auto)")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of the forward pass (auto)")
    add("--out", type=Path, help="folder of the run (out/TASK-MASK-sSEED-...)")
    add("--results", type=Path, default=Path("results.jsonl"), help="file that gets one line per run (results.jsonl)")
    add("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    add("--predict", action="store_true", help="write the GLUE submission file, or SQuAD's predictions of dev, into --out")
    add("--export", type=Path, metavar="DIR", help="write the fine-tuned model as a folder that transformers loads")
    args = parser.parse_args(argv)
    args.task = glue_squad.find_task(args.task)
    for name in ("epochs", "batch_size", "max_len", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args.task, name))
    args.eval_every = args.eval_every or EVAL_EVERY.get(args.task.name, 50)
    args.rank_id, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return args


def open_ticket(args):
    """The model, its vocabulary, and the masks that fit it, from --mask and --model."""
    masks, args.mask_meta = tamt.read_mask(args.mask) if args.mask else ({}, None)
    args.model = args.model or (args.mask_meta or {}).get("model") or (None if args.mask else "toy")
    if not args.model:
        raise ValueError(f"{args.mask} does not say which model it belongs to: --model is needed")
    model, vocab = tamt.load_model(args.model)
    if args.max_len > model.config.positions:
        raise ValueError(f"--max-len {args.max_len}: {args.model} has {model.config.positions} positions")
    masks = tamt.fit_masks(tamt.maskable(model), masks, args.mask) if masks else {}
    torch.manual_seed(args.seed)
    if args.task.name == "squad":
        model.new_head("span")
    else:
        if model.config.model_type == "bert" and not model.has("pooler"):
            print(f"{args.model} has no pooler: a fresh one, N(0, {model.config.initializer_range}), is trained, dense")
            model.new_head("pooler")
        model.new_head("classifier", len(args.task.labels or ()) or 1)
    unused = ["cls", "lm_head"] + (["pooler"] if model.config.model_type == "roberta" or args.task.name == "squad" else [])
    for name in unused:  # what no task reads need not be trained or kept
        for holder in (model, model.base):
            if hasattr(holder, name):
                delattr(holder, name)
    masks = {name: mask for name, mask in masks.items() if not ("pooler" in name and "pooler" in unused)}
    apply_masks(model, masks)
    return model.to(args.device), vocab, {name: mask.to(args.device) for name, mask in masks.items()}


def data_folder(args) -> Path:
    if args.data is None and args.model == "toy":
        return tamt.toy_folder("tasks")
    if args.data is None:
        return glue_squad.download(args.task)
    if not args.data.is_dir():
        raise FileNotFoundError(f"--data {args.data}: no such folder")
    return args.data


def record(args, outcome: dict, floor: dict, seconds: float) -> dict:
    """The line of results.jsonl."""
    return {"task": args.task.name, "model": args.model, "mask": args.mask_meta, "seed": args.seed, **outcome,
            "floor": floor, "seconds": round(seconds, 1), "command": " ".join(["python", *sys.argv]),
            "settings": args.identity, "device": str(args.device), "threads": torch.get_num_threads(),
            "versions": tamt.versions()}


def finish(model, work: Work, vocab, args, outcome: dict, began: float):
    """Predictions, export, the line in --results, and the block that grep reads."""
    floor = glue_squad.floor(args.task, work.gold["dev"]) if args.task.labels else dict.fromkeys(args.task.metrics, 0.0)
    if args.predict:
        write_predictions(model, work, vocab, args)
    if args.export:
        export(model, vocab, args)
    line = record(args, outcome, floor, time.time() - began)
    data.append_line(args.results, line)
    tamt.write_json(args.out / "result.json", line)
    print(f"---\ntask: {args.task.name}")
    for kind in ("best", "final"):
        for name, value in outcome[kind].items():
            print(f"{kind}_{name}: {value:.4f}")
    for name, value in floor.items():
        print(f"floor_{name}: {value:.4f}")
    print(f"seconds: {line['seconds']:.4f}")


def write_predictions(model, work: Work, vocab, args):
    """GLUE's TSV of each test split, or SQuAD's JSON for the dev questions, by the model after its last step."""
    if args.task.name == "squad":
        said = answers(work, predict(model, work, work.dev["dev"], args))
        return glue_squad.write_submission(args.task, said, args.out / "predictions.json")
    for split in [s for s in ("test", "test_mm", "ax") if s in args.task.files]:
        try:
            examples = glue_squad.load_glue(args.task, split, data_folder(args))
        except FileNotFoundError as error:
            print(f"no predictions for {split}: {error}")
            continue
        said = answers(work, predict(model, work, glue_squad.encode(examples, vocab, args.max_len), args))
        name = glue_squad.SUBMISSION[split] if args.task.name == "mnli" else f"{args.task.folder}.tsv"
        glue_squad.write_submission(args.task, said, args.out / name)
        print(f"{args.out / name}: {len(said)} predictions")


def export(model, vocab, args):
    """The fine-tuned model as AutoModelForSequenceClassification or AutoModelForQuestionAnswering loads it."""
    labels = args.task.labels or ("score",)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if args.task.labels is None:
        names["problem_type"] = "regression"
    kind, extra = ("ForQuestionAnswering", {}) if args.task.name == "squad" else ("ForSequenceClassification", names)
    bert.save(args.export, model.config, dict(model.named_parameters()), kind, **extra)
    data.save_vocabulary(vocab, args.export, model.config.positions)


def main():
    args, began = settings(), time.time()
    tamt.pick_device(args)
    model, vocab, masks = open_ticket(args)
    folder = data_folder(args)
    args.identity = identity(args, masks)
    if args.out is None:
        name = args.mask.resolve().parent.name if args.mask else f"{Path(args.model).name}-dense"
        digest = hashlib.sha256(json.dumps(args.identity).encode()).hexdigest()[:8]
        args.out = Path("out") / f"{args.task.name}-{name}-s{args.seed}-{digest}"
    state = tamt.open_run(args.out, args.identity, args.resume, "result.json", args.rank_id)
    work = read_task(args.task, vocab, folder, args.max_len, args.limit, args.seed)
    if not args.rank_id:
        print(f"{args.task.name}: {len(work.train):,} training examples, {args.epochs} epochs, batch {args.batch_size}, "
              f"lr {args.lr:g}, {sum(int((~m).sum()) for m in masks.values()):,} weights held at zero")
    outcome = fine_tune(model, work, masks, args, state)
    if not args.rank_id:
        finish(model, work, vocab, args, outcome, began)


def identity(args, masks) -> dict:
    """What makes a run this run: settings, and the mask by its content."""
    names = ("model", "epochs", "batch_size", "max_len", "lr", "seed", "limit", "eval_every", "dtype")
    digest = hashlib.sha256(b"".join(tamt.pack(mask).numpy().tobytes() for mask in masks.values())).hexdigest()[:16]
    return {name: tamt.plain(getattr(args, name)) for name in names} | {
        "task": args.task.name, "data": str(args.data), "mask": digest if masks else None}


if __name__ == "__main__":
    tamt.run(main)
