"""Is the ticket any good? Fine-tune a subnetwork on a GLUE task or SQuAD v1.1, and record what it scores.

    python finetune.py --task sst2 --mask mask.pt

The mask is fixed and its zeros lie in the weights themselves: each pruned entry is set to zero once, and its
gradient is zeroed before clipping, so it stays exactly zero, and AdamW does bit for bit what it would do
under torch's prune.custom_from_mask, as in the released code. Without --mask all weights train.

Same as the released code: a fresh head per seed, AdamW without decay, linear decay to 0 without warm-up, clip
1.0, epochs, batch sizes and lengths per task (glue_squad.TASKS), best score over the dev evaluations.
Deliberately different: batches hold sentences of like length; every epoch's end, hence the last step, is
evaluated, `best` and `final` stand side by side; MNLI reports matched and mismatched under their own names;
SQuAD's answers are found by characters and never lie in the padding; an undefined metric is 0.

Glossary: B sequences, T tokens, C labels, n examples; a `target` is a class id, a number, or a span's two
positions.
"""

import hashlib
import json
import os
import shlex
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

TOY = {"epochs": 6, "lr": 1e-3, "max_len": 128}  # in place of the paper's defaults: its model is small

# ---------------------------------------------------------------- a task made ready


@dataclass
class Work:
    """A task as token ids. A sequence is a pair (ids (T,), segments (T,)); lists are in file order."""
    task: glue_squad.Task
    train: list  # sequences
    targets: np.ndarray  # (n,) class ids or numbers, (n, 2) first and last position of a span
    dev: dict[str, list]  # "dev", for MNLI "dev_mm" -> sequences
    texts: dict[str, list]  # the splits to predict -> examples, or for SQuAD questions
    windows: list  # SQuAD's dev windows, which turn logits into text


def read_files(task, folder, predict: bool = False) -> dict[str, list]:
    """{split: examples, or for SQuAD questions} of all that the run will need, so that what is wrong with the
    files shows before anything is written. MNLI's mismatched and diagnostic files may be missing."""
    squad, texts = task.name == "squad", {}
    if predict and not squad and "test" not in task.files:
        raise ValueError(f"--predict: task {task.name} names no test file")
    for split in ("train", "dev", "dev_mm", *(("test", "test_mm", "ax") if predict and not squad else ())):
        if split not in task.files:
            continue
        try:
            path = glue_squad.find(task, split, folder)
            texts[split] = glue_squad.load_squad(path) if squad else glue_squad.load_glue(task, split, folder)
        except FileNotFoundError as error:
            if split in ("train", "dev", "test"):
                raise
            print(f"nothing is reported for {split}: {error}")
    return texts


def make_work(task, texts: dict[str, list], vocab, max_len: int, limit: int | None = None, seed=0) -> Work:
    """Encodes train and dev. `limit` keeps that many random training examples (windows for SQuAD, as in the
    paper's few-data curves), drawn by `seed`."""
    examples, windows = texts["train"], []
    if task.name == "squad":
        made = glue_squad.windows(examples, vocab, max_len, training=True)
        windows = glue_squad.windows(texts["dev"], vocab, max_len)
        targets = np.array([(w.start, w.end) for w in made], np.int64)
        train, dev = [(w.ids, w.segments) for w in made], {"dev": [(w.ids, w.segments) for w in windows]}
    else:
        train = glue_squad.encode(examples, vocab, max_len)
        targets = np.array([e.label for e in examples], np.int64 if task.labels else np.float32)
        dev = {s: glue_squad.encode(texts[s], vocab, max_len) for s in texts if s.startswith("dev")}
    if not train:
        raise ValueError(f"task {task.name}: no training question has its answer where the file says")
    if limit and limit < len(train):
        chosen = np.random.default_rng([seed, 0x11]).permutation(len(train))[:limit]
        train, targets = [train[i] for i in chosen], targets[chosen]
    return Work(task, train, targets, dev, {s: found for s, found in texts.items() if s != "train"}, windows)


# ---------------------------------------------------------------- losses and predictions


def logits_of(model, net, work: Work, batch):  # B pairs of ids and segments -> (B, C), or (B, T, 2) for spans
    ids, keep, segments = (torch.from_numpy(x) for x in glue_squad.pad(batch, model.config.pad_token_id))
    device = next(model.parameters()).device
    ids, segments, keep = ids.to(device), segments.to(device), None if keep.all() else keep.to(device)
    hidden = net(ids, keep, segments if model.config.type_vocab_size > 1 else None)[-1]
    if work.task.name != "squad":
        return model.class_logits(hidden)
    logits = model.span_logits(hidden).float()
    return logits if keep is None else logits.masked_fill(~keep[..., None], -1e4)  # no answer in the padding


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


def answers(work: Work, logits: list):
    """Logits -> class ids (n,), numbers (n,), or {question id: text}."""
    if work.task.name == "squad":
        starts, ends = ([row[:, i] for row in logits] for i in (0, 1))
        return glue_squad.best_answers(work.texts["dev"], work.windows, starts, ends)
    return np.array([row.argmax() for row in logits] if work.task.labels else [row[0] for row in logits])


def evaluate(model, work: Work, args) -> dict[str, float]:
    """The task's metrics on its dev sets, under their names."""
    scores = {}
    for split, sequences in work.dev.items():
        said = answers(work, predict(model, work, sequences, args))
        scores |= glue_squad.squad_scores(said, work.texts[split]) if work.task.name == "squad" else \
            glue_squad.score(work.task, said, work.texts[split], split)
    return scores


# ---------------------------------------------------------------- fine-tuning


def apply_masks(model, masks: dict[str, torch.Tensor]):
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)


def fine_tune(model, work: Work, masks: dict[str, torch.Tensor], args, state: dict | None = None) -> dict:
    """Trains all weights under fixed masks -> what outcome() says, {} in all processes but the first.

    Order and dropout are functions of (seed, step), so that `state` continues a run exactly."""
    params = dict(model.named_parameters())
    optimizer = tamt.adamw(params.values(), args.device)
    history, begin, total = [], 0, 0.0  # evaluations; first step; sum of losses since the last evaluation
    if state:
        with tamt.reading(args.out / "state.pt"):
            tamt.restore_learning(state["params"], state["optimizer"], params, optimizer)
            history, begin, total = list(state["history"]), state["step"], float(state["loss"])
    net = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    per_epoch, lengths = -(-len(work.train) // args.batch_size), [len(ids) for ids, _ in work.train]
    steps, targets = per_epoch * args.epochs, torch.from_numpy(work.targets)
    began = saved = time.time()
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
        loss = task_loss(work, logits, targets[rows].to(args.device)) * share / len(batches[number])
        loss.backward()  # processes average their gradients
        with torch.no_grad():
            for name, mask in masks.items():
                params[name].grad.mul_(mask)
        norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        total, done = total + float(loss.detach()), step + 1
        if not np.isfinite(total + float(norm)):
            raise ValueError(f"loss {total:.3g}, gradient's norm {norm:.3g} at step {done}: a lower --lr "
                             f"(here {args.lr:g}) may help")
        if args.rank_id:
            continue
        if done % args.eval_every == 0 or done % per_epoch == 0:
            since = done - (history[-1]["step"] if history else 0)
            history.append({"step": done, "loss": total / since, **evaluate(model, work, args)})
            total, left = 0.0, round((time.time() - began) / (done - begin) * (steps - done))
            figures = "  ".join(f"{k} {value:.4f}" for k, value in history[-1].items() if k != "step")
            print(f"step {done}/{steps}  {figures}  ETA {left // 60}:{left % 60:02}", flush=True)
        if done % per_epoch == 0 or time.time() - saved > tamt.SAVE_SECONDS:
            saved = time.time()
            tamt.write_torch(args.out / "state.pt", {
                "format": 1, "settings": args.identity, "step": done, "history": history, "loss": total,
                "params": {n: p.data for n, p in params.items()}, "optimizer": optimizer.state_dict()})
    model.eval()
    return outcome(work.task, history, steps) if not args.rank_id else {}


def outcome(task, history: list[dict], steps: int) -> dict:
    """All metrics at the best step by the task's first one, and at the last step; all evaluations."""
    names = [name for name in task.metrics if name in history[0]]  # accuracy_mm only with the mismatched file
    best, final = max(history, key=lambda line: line[names[0]]), history[-1]
    return {"best": {n: best[n] for n in names}, "final": {n: final[n] for n in names},
            "best_step": best["step"], "steps": steps, "evaluations": history}


# ---------------------------------------------------------------- command line


def settings(argv=None):
    """The command line, with the task's own defaults filled in."""
    parser = tamt.Parser(description="Fine-tune a subnetwork of a pre-trained BERT on one task.")
    add, whole, number = parser.add_argument, tamt.positive(int), tamt.positive(float)
    add("--task", required=True, help=f"{', '.join(glue_squad.TASKS)}, or the FILE.json of an own task")
    add("--mask", type=Path, help="mask file; without it the dense model is fine-tuned")
    add("--model", help="name or path of the checkpoint (the one the mask's metadata names; toy)")
    add("--data", type=Path, help="folder with GLUE's folders, train-v1.1.json, dev-v1.1.json (downloaded)")
    add("--epochs", type=whole, help="passes over the training set (GLUE 3, SQuAD 2)")
    add("--batch-size", type=whole, help="examples per update (GLUE 32, SQuAD 16)")
    add("--max-len", type=whole, help="tokens per example (GLUE 128, SQuAD 384)")
    add("--lr", type=number, help="learning rate at the start (GLUE 2e-5, SQuAD 3e-5)")
    add("--seed", type=int, default=1, help="of head, order, dropout and --limit (1)")
    add("--limit", type=whole, help="train on this many random examples; SQuAD: windows (all)")
    add("--eval-every", type=whole, help="updates between evaluations, besides each epoch's end (50; MNLI, "
        "QQP and QNLI 500, SQuAD 1000)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute (auto)")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of the forward pass (auto)")
    add("--out", type=Path, help="folder of the run (out/TASK-MASK-sSEED-...)")
    add("--results", type=Path, default=Path("results.jsonl"), help="gets one line per run (results.jsonl)")
    add("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    add("--predict", action="store_true", help="write GLUE's submission file, or SQuAD's of dev, into --out")
    add("--export", type=Path, metavar="DIR", help="write the fine-tuned model for transformers")
    args = parser.parse_args(argv)
    args.task = glue_squad.find_task(args.task)
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed {args.seed}: expected 0 to {2**31 - 1}")
    if not args.results.absolute().parent.is_dir() or args.results.is_dir():
        raise ValueError(f"--results {args.results}: expected a file in a folder that exists")
    if args.export and args.export.exists() and not args.export.is_dir():
        raise ValueError(f"--export {args.export}: a file stands there; expected a folder, new or old")
    args.command = shlex.join(["python", sys.argv[0], *map(str, sys.argv[1:] if argv is None else argv)])
    args.rank_id, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return args


def open_ticket(args):
    """The model with the head that the task needs and no other, its vocabulary, and the masks that fit it."""
    masks, args.mask_meta = tamt.read_mask(args.mask) if args.mask else ({}, None)
    args.model = args.model or (args.mask_meta.get("model") if args.mask else "toy")
    if not args.model:
        raise ValueError(f"{args.mask} does not say which model it belongs to: --model is needed")
    if args.model not in (*data.MODELS, "toy"):
        args.model = str(Path(args.model).resolve())
    tamt.refuse_own_folder(args)
    model, vocab = tamt.load_model(args.model)
    for name in ("epochs", "batch_size", "max_len", "lr", "eval_every"):
        if getattr(args, name) is None:
            paper = getattr(args.task, name)
            setattr(args, name, TOY.get(name, paper) if args.model == "toy" else paper)
    if not 6 <= args.max_len <= model.config.positions:
        raise ValueError(f"--max-len {args.max_len}: expected 6 to {model.config.positions} tokens, the "
                         f"positions of {args.model}")
    masks = tamt.fit_masks(tamt.maskable(model), masks, args.mask) if args.mask else {}
    entries = sum(mask.numel() for mask in masks.values())
    args.sparsity = sum(int((~mask).sum()) for mask in masks.values()) / max(entries, 1)
    torch.manual_seed(args.seed)
    squad, roberta = args.task.name == "squad", model.config.model_type == "roberta"
    if squad:
        model.new_head("span")
    else:
        if not roberta and not model.has("pooler"):
            model.new_head("pooler")
            print(f"{args.model} has no pooler: a fresh one is trained, dense")
        model.new_head("classifier", len(args.task.labels or ()) or 1)
    for name in ["cls", "lm_head"] + ["pooler"] * (squad or roberta):  # RoBERTa's classifier needs no pooler
        for holder in (model, model.base):
            if hasattr(holder, name):
                delattr(holder, name)
    masks = {n: m.to(args.device) for n, m in masks.items() if model.has("pooler") or "pooler" not in n}
    apply_masks(model.to(args.device), masks)
    return model, vocab, masks


def data_folder(args) -> Path:
    """Where the task's files are: --data, the toy's tasks, or the cache, after a download."""
    if args.data and not args.data.is_dir():
        raise FileNotFoundError(f"--data {args.data}: no such folder")
    if args.task.name not in glue_squad.TASKS:
        return Path(args.task.files["train"][0]).parent
    if args.data:
        return args.data.resolve()
    return tamt.toy_folder("tasks") if args.model == "toy" else glue_squad.download(args.task)


def finish(model, work: Work, vocab, args, result: dict, began: float):
    """Predictions, export, the line in --results, and the block that grep reads."""
    floors = [glue_squad.floor(args.task, work.texts[split], split) for split in work.dev]
    floor = {name: value for floor in floors for name, value in floor.items()}
    if args.predict:
        write_predictions(model, work, vocab, args)
    if args.export:
        export(model, vocab, args)
    history, seconds = result.pop("evaluations"), time.time() - began
    line = {"task": args.task.name, "model": args.model, "mask": args.mask_meta, "sparsity": args.sparsity,
            "seed": args.seed, **result, "floor": floor, "seconds": round(seconds, 1),
            "command": args.command, "settings": args.identity, "device": str(args.device),
            "threads": torch.get_num_threads(), "processes": args.world, "versions": tamt.versions()}
    data.append_line(args.results, line)
    tamt.write_json(args.out / "result.json", line | {"evaluations": history})
    (args.out / "state.pt").unlink()  # three times the size of the model, and of no more use
    print(f"---\ntask: {args.task.name}\nsparsity: {args.sparsity:.4f}")
    for kind, scores in (("best", result["best"]), ("final", result["final"]), ("floor", floor)):
        print("".join(f"{kind}_{name}: {value:.4f}\n" for name, value in scores.items()), end="")
    print(f"seconds: {seconds:.4f}")


def write_predictions(model, work: Work, vocab, args):
    """GLUE's TSV of each test split, or SQuAD's JSON for dev, by the model after its last step."""
    squad = args.task.name == "squad"
    for split in ["dev"] if squad else [s for s in work.texts if not s.startswith("dev")]:
        sequences = work.dev[split] if squad else glue_squad.encode(work.texts[split], vocab, args.max_len)
        said = answers(work, predict(model, work, sequences, args))
        name = f"{args.task.folder}.tsv" if args.task.name != "mnli" else glue_squad.SUBMISSION[split]
        path = args.out / ("predictions.json" if squad else name)
        glue_squad.write_submission(args.task, said, path)
        print(f"{path}: {len(said):,} predictions")


def export(model, vocab, args):
    """What transformers' AutoModelForSequenceClassification or AutoModelForQuestionAnswering loads."""
    kind, extra, labels = "ForQuestionAnswering", {}, args.task.labels
    if args.task.name != "squad":
        kind, names = "ForSequenceClassification", labels or ("score",)
        extra = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        extra |= {} if labels else {"problem_type": "regression"}
    bert.save(args.export, model.config, dict(model.named_parameters()), kind, **extra)
    data.save_vocabulary(vocab, args.export, model.config.positions)


def identity(args, masks) -> dict:
    """What makes a run this run: settings, and the mask by its content."""
    names = ("model", "data", "epochs", "batch_size", "max_len", "lr", "seed", "limit", "eval_every", "dtype")
    digest = hashlib.sha256(b"".join(tamt.pack(mask).numpy().tobytes() for mask in masks.values()))
    return {"task": args.task.name, "mask": digest.hexdigest()[:16] if masks else None} | {
        name: tamt.plain(getattr(args, name)) for name in names}


def main(argv=None):
    args, began = settings(argv), time.time()
    tamt.pick_device(args)
    with tamt.first_process_first(args):
        model, vocab, masks = open_ticket(args)
        args.data = data_folder(args)
        texts = read_files(args.task, args.data, args.predict)
    args.identity = identity(args, masks)
    if args.out is None:
        name = args.mask.resolve().parent.name if args.mask else f"{Path(args.model).name}-dense"
        digest = hashlib.sha256(json.dumps(args.identity).encode()).hexdigest()[:8]
        args.out = Path("out") / f"{args.task.name}-{name}-s{args.seed}-{digest}"
    state = tamt.open_run(args.out, args.identity, args.resume, "result.json", args.rank_id)
    work = make_work(args.task, texts, vocab, args.max_len, args.limit, args.seed)
    print(f"{args.task.name}: {len(work.train):,} training examples, {args.epochs} epochs, batch "
          f"{args.batch_size}, lr {args.lr:g}; {args.model}, {args.sparsity:.2%} of the masked set zero")
    result = fine_tune(model, work, masks, args, state)
    if not args.rank_id:
        finish(model, work, vocab, args, result, began)


if __name__ == "__main__":
    tamt.run(main)
