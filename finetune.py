"""Is the ticket any good? Fine-tune a subnetwork on a GLUE task or SQuAD v1.1, and record what it scores.

    python finetune.py --task sst2 --mask mask.pt                   a ticket on a task
    python finetune.py --task sst2 --find imp --sparsity 0.5        find one on a task   (Chen et al. 2020)
    python finetune.py --task sst2 --find super                     whole heads and FFNs (Liang et al. 2021)
    python finetune.py --task sst2,rte --mask a/mask.pt,b/mask.pt   tasks share an encoder, each by its ticket

The mask is fixed and its zeros lie in the weights themselves: each pruned entry is set to zero once, and its
gradient is zeroed before clipping, so it stays exactly zero, and AdamW does bit for bit what it would do
under torch's prune.custom_from_mask, as in the released code. Without --mask all weights train.

Same as the released code: a fresh head per seed, AdamW without decay, linear decay to 0 without warm-up, clip
1.0, epochs, batch sizes and lengths per task (glue_squad.TASKS), best score over the dev evaluations.
Deliberately different: batches hold sentences of like length; every epoch's end, hence the last step, is
evaluated, `best` and `final` stand side by side; MNLI reports matched and mismatched under their own names;
SQuAD's answers are found by characters and never lie in the padding; an undefined metric is 0. Tickets found
on a task: rounds of IMP start with a fresh head (released: it is kept), on the schedule of ten rounds, as
released; Super Tickets train with our AdamW (released: Adamax, warm-up, decay .01), gradients of their gates
do not add up over batches, random ones are drawn without replacement; shuffling permutes the entries of a
matrix (released: whole layers).

Glossary: B sequences, T tokens, C labels, n examples, D hidden, L layers, H heads; a `target` is a class id,
a number, or a span's two positions.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from functools import partial
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
    prefix: str = ""  # of its metrics, where tasks share an encoder
    own: list = field(default_factory=list)  # (holder, name, value): its head and ticket, if they do (share)


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
    enter(work)
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


def enter(work: Work):
    """Where tasks share an encoder, each batch goes through its own task's head and ticket."""
    for holder, name, value in work.own:
        setattr(holder, name, value)


def epoch_batches(works: list[Work], args, epoch: int) -> list[tuple[Work, np.ndarray]]:
    """The tasks' batches, shuffled together: a function of seed and epoch."""
    rng = np.random.default_rng([args.seed, epoch])
    batches = [(work, rows) for work in works for rows in
               glue_squad.bucketed([len(ids) for ids, _ in work.train], args.batch_size, rng)]
    return batches if len(works) == 1 else [batches[i] for i in rng.permutation(len(batches))]


def fine_tune(model, works: list[Work], masks: dict, args, state: dict | None = None) -> dict:
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
    per_epoch = sum(-(-len(work.train) // args.batch_size) for work in works)
    steps = per_epoch * args.epochs
    began = saved = time.time()
    model.train()
    for step in range(begin, steps):
        epoch, number = divmod(step, per_epoch)
        if number == 0 or step == begin:
            batches = epoch_batches(works, args, epoch)
        work, batch = batches[number]
        enter(work)
        rows = batch[args.rank_id::args.world]
        part = args.world if len(rows) else 0  # a last batch may have fewer rows than there are processes
        rows = rows if part else batch[:1]
        torch.manual_seed((args.seed * 1_000_003 + step) * 1021 + args.rank_id)
        with tamt.autocast(args.device, args.dtype):
            logits = logits_of(model, net, work, [work.train[i] for i in rows])
        targets = torch.from_numpy(work.targets[rows]).to(args.device)
        loss = task_loss(work, logits, targets) * part / len(batch)
        loss.backward()  # processes average their gradients
        with torch.no_grad():
            for name, mask in masks.items():
                params[name].grad.mul_(mask.view(torch.uint8))  # as in tamt.masked
        norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / (steps * args.stretch))
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
            scores = {work.prefix + k: x for work in works for k, x in evaluate(model, work, args).items()}
            history.append({"step": done, "loss": total / since, **scores})
            total, left = 0.0, round((time.time() - began) / (done - begin) * (steps - done))
            figures = "  ".join(f"{k} {value:.4f}" for k, value in history[-1].items() if k != "step")
            print(f"step {done}/{steps}  {figures}  ETA {left // 60}:{left % 60:02}", flush=True)
        if done % per_epoch == 0 or time.time() - saved > tamt.SAVE_SECONDS:
            saved = time.time()
            tamt.write_torch(args.out / "state.pt", {
                "format": 1, "settings": args.identity, "step": done, "history": history, "loss": total,
                "params": {n: p.data for n, p in params.items()}, "optimizer": optimizer.state_dict()})
    model.eval()
    return outcome(works, history, steps) if not args.rank_id else {}


def outcome(works: list[Work], history: list[dict], steps: int) -> dict:
    """All metrics at the best step by the task's first one (the mean over tasks), and at the last step."""
    firsts = [work.prefix + work.task.metrics[0] for work in works]
    names = [work.prefix + name for work in works for name in work.task.metrics]
    names = [name for name in names if name in history[0]]  # accuracy_mm only with the mismatched file
    best, final = max(history, key=lambda line: sum(line[name] for name in firsts)), history[-1]
    return {"best": {n: best[n] for n in names}, "final": {n: final[n] for n in names},
            "best_step": best["step"], "steps": steps, "evaluations": history}


# ---------------------------------------------------------------- several tasks, one encoder


def share(model, works: list[Work], tickets: list[dict], args):
    """Ticket sharing (Liang et al. 2021): one encoder, a head per task, every batch under its own ticket.

    Masks lie over the weights here, not in them: gradients reach a weight only from tasks that keep it (what
    AdamW remembers of those moves it in the other tasks' steps, too, unless its whole FFN is out)."""
    layers, model.heads = tamt.mask_model(model) if tickets else {}, nn.ModuleList()
    for i, work in enumerate(works):
        model.new_head("classifier", len(work.task.labels or ()) or 1)
        model.heads.append(model.classifier)
        masks, found = (tickets[i], args.units[i]) if tickets else ({}, None)
        work.prefix, work.own = f"{work.task.name}_", [(model, "classifier", model.classifier)]
        for name, layer in layers.items():
            work.own.append((layer, "mask", masks.get(name, torch.ones_like(layer.mask))))
        for number, layer in enumerate(model.base.encoder["layer"]):
            gone = found is not None and found[1][number]  # an FFN that is None takes no part
            work.own.append((layer, "intermediate", None if gone else layer.intermediate))
            work.own.append((layer.output, "dense", None if gone else layer.output["dense"]))


# ---------------------------------------------------------------- tickets found on the task


def one_run(args, folder: str, mask: list, then=None) -> dict:
    """Fine-tunes in a folder of its own, skipped by --resume if it is finished -> its result.json."""
    own = argparse.Namespace(**{**vars(args), "out": args.out / folder, "mask": mask})
    try:
        tune(own, then)
    except tamt.Finished:
        pass
    line = bert.read_json(own.out / "result.json")
    if not {"best", "final", "sparsity", "mask"} <= line.keys():
        raise ValueError(f"{own.out / 'result.json'}: no result of this version; remove it to start anew")
    return line


def save_ticket(path, model, masks: dict, args, **more):
    report = tamt.sparsity_report(model, masks)
    told = {name: tamt.plain(getattr(args, name)) for name in ("model", "weights", "seed", "lr", "data")}
    tamt.save_mask(path, masks, told | more | {
        "task": names_of(args), "sparsity": report["masked_set"],
        "found": {name: report[name] for name in ("masked_set", "encoder", "whole_model")}})


def prune_trained(model, works, masks: dict, args, level: float):
    """The end of an IMP round: of what is left, the smallest trained weights go, up to `level` in all."""
    sizes = {n: model.get_parameter(n).detach().abs() for n in args.prunable if n in tamt.maskable(model)}
    sizes |= {n: sizes[n].masked_fill(~mask, -1.0) for n, mask in masks.items()}  # pruned stays pruned
    save_ticket(args.out / "mask.pt", model, tamt.prune(sizes, level, args.rank), args, method="imp",
                rank=args.rank, scope=args.scope)


def find_imp(args):
    """Task-specific IMP (Chen et al. 2020; LT_glue.py): fine-tune, prune 10 % of the count by magnitude, go
    back to the pre-trained weights, again. By default encoder and pooler compete as one (--rank, --scope)."""
    rounds, mask, levels = [], [], tamt.imp_levels(args.sparsity)
    for number, level in enumerate(levels, 1):
        print(f"round {number} of {len(levels)}; after it {level:.0%} are pruned")
        line = one_run(args, f"round-{number}", mask, partial(prune_trained, level=level))
        rounds.append({"sparsity": line["sparsity"], "best": line["best"], "final": line["final"]})
        mask = [args.out / f"round-{number}" / "mask.pt"]
    return mask[0], {"rounds": rounds}


ORDERS = ("winning", "random", "losing")
TICKETS = [f"{order}-{level}" for order in ORDERS for level in range(1, 9)]


def importance(model, work: Work, args) -> tuple[torch.Tensor, torch.Tensor]:  # -> (L, H), (L,)
    """Expected sensitivity of every head's context vectors and every FFN's output o, in eval mode over the
    training set: mean over batches of sum |<dL/do, o>|, a term per position; a layer's heads have norm 1."""
    context, output, layers = [], [], model.base.encoder["layer"]
    hooks = [hook for layer in layers for hook in (
        layer.attention["output"]["dense"].register_forward_pre_hook(lambda _, x: context.append(x[0])),
        layer.output["dense"].register_forward_hook(lambda _, x, y: output.append(y)))]
    heads, ffn, starts = 0.0, 0.0, range(0, len(work.train), args.batch_size)
    model.eval()
    for rows in (slice(start, start + args.batch_size) for start in starts):
        targets = torch.from_numpy(work.targets[rows]).to(args.device)
        context.clear(), output.clear()
        with tamt.autocast(args.device, args.dtype):
            logits = logits_of(model, model, work, work.train[rows])
        seen = context + output  # 2L times (B, T, D)
        grads = torch.autograd.grad(task_loss(work, logits, targets) / len(targets), seen)
        felt = torch.stack([(g * o).detach().float() for g, o in zip(grads, seen, strict=True)])
        felt = felt.unflatten(-1, (-1, layers[0].head_size)).sum(-1)  # (2L, B, T, H)
        heads += felt[:len(layers)].abs().sum((1, 2)).cpu() / len(starts)
        ffn += felt[len(layers):].sum(-1).abs().sum((1, 2)).cpu() / len(starts)
    for hook in hooks:
        hook.remove()
    return heads / (heads.norm(dim=1, keepdim=True) + 1e-20), ffn


def structured(heads, ffn, order: str, level: int, seed: int):  # (L, H), (L,) -> bool: which go
    """The paper's eight nested levels: int(L H level / 10) heads and int(L level / 12) FFNs go, the least
    important first (winning), the most important (losing), or in a random order; a layer keeps one head."""
    (L, H), rng, sign = heads.shape, np.random.default_rng([seed, 0x57]), {"winning": 1, "losing": -1}
    heads, ffn = (rng.random(x.shape) if order == "random" else sign[order] * x.numpy() for x in (heads, ffn))
    heads[np.arange(L), heads.argmax(1)] = np.inf
    gone = np.zeros((L, H), bool), np.zeros(L, bool)
    gone[0].reshape(-1)[np.argsort(heads, None, "stable")[:min(L * H * level // 10, L * H - L)]] = True
    gone[1][np.argsort(ffn, kind="stable")[:L * level // 12]] = True
    return gone


def unit_masks(config, heads, ffn) -> dict[str, torch.Tensor]:
    """Units that go, (L, H) and (L,) bool, as masks of the six matrices of each layer: all their weights."""
    masks, D, inner = {}, config.hidden_size, config.intermediate_size
    for i, (gone, no) in enumerate(zip(heads, ffn, strict=True)):
        rows = torch.from_numpy(np.repeat(~gone, D // len(gone)))  # of the context vectors
        own = {f"attention.self.{name}": rows[:, None].repeat(1, D) for name in ("query", "key", "value")}
        own["attention.output.dense"] = rows.repeat(D, 1)
        own["intermediate.dense"], own["output.dense"] = (
            torch.full(shape, not no) for shape in ((inner, D), (D, inner)))
        masks |= {f"{config.model_type}.encoder.layer.{i}.{name}.weight": own[name] for name in own}
    return masks


def units(config, masks: dict, file):  # -> (L, H), (L,) bool: the heads and FFNs that a ticket takes out
    layers = [f"{config.model_type}.encoder.layer.{i}." for i in range(config.num_hidden_layers)]
    size = config.hidden_size // config.num_attention_heads
    heads = np.stack([~masks[f"{x}attention.output.dense.weight"][0, ::size].numpy() for x in layers])
    ffn = np.array([not masks[f"{x}output.dense.weight"].any() for x in layers])
    whole = unit_masks(config, heads, ffn)
    if heads.all(1).any() or masks.keys() ^ whole or not all(masks[n].equal(whole[n]) for n in whole):
        raise ValueError(f"{file}: a Super Ticket takes out whole heads, not all of a layer, and whole FFNs")
    return heads, ffn


def remove_units(model, heads, ffn):  # (L, H), (L,) bool
    """Takes heads and FFNs out of the computation: smaller matrices, logits as if their outputs were 0."""
    for layer, gone, no in zip(model.base.encoder["layer"], heads, ffn, strict=True):
        layer.rows = torch.from_numpy(np.repeat(~gone, layer.head_size))  # (D,) of the context; for full_size
        for linear in layer.attention["self"].values():
            linear.weight = nn.Parameter(linear.weight.data[layer.rows])
            linear.bias = nn.Parameter(linear.bias.data[layer.rows])
        linear = layer.attention["output"]["dense"]
        linear.weight = nn.Parameter(linear.weight.data[:, layer.rows])
        if no:
            layer.intermediate = layer.output["dense"] = None


def full_size(model) -> dict[str, torch.Tensor]:
    """The tensors in the sizes of the config, zeros where weights and units are gone: transformers 5 does not
    read the config's pruned_heads any more."""
    tensors = {n: p.data for n, p in model.named_parameters(remove_duplicate=False) if n[:6] != "heads."}
    for name, layer in model.named_modules():
        if isinstance(layer, tamt.Masked):  # tasks share the encoder
            tensors[f"{name}.weight"] = layer.weight.data * layer.mask
    with torch.device("meta"):
        whole = bert.Base(model.config, model.has("pooler"))
    for name, p in whole.named_parameters(prefix=model.config.model_type):
        if name not in tensors:
            tensors[name] = torch.zeros(p.shape)
        elif (small := tensors[name]).shape != p.shape:
            rows = model.base.encoder["layer"][int(name.split(".")[3])].rows
            tensors[name] = torch.zeros(p.shape)
            tensors[name][(slice(None), rows) if "output" in name else rows] = small.cpu()
    return tensors


def make_tickets(model, works, masks, args):
    """Weighs the units of a model fine-tuned on the task, and writes down all tickets."""
    heads, ffn = importance(model, works[0], args)
    tamt.write_json(args.out.parent / "importance.json", {"heads": heads.tolist(), "ffn": ffn.tolist()})
    for name in TICKETS:
        order, _, level = name.partition("-")
        ticket = unit_masks(model.config, *structured(heads, ffn, order, int(level), args.seed))
        save_ticket(args.out.parent / f"{name}.pt", model, ticket, args, method="super", order=order,
                    level=int(level))


def find_super(args):
    """Super Tickets (Liang et al. 2021): fine-tune once, weigh heads and FFNs, take out more and more of them
    from the pre-trained model, fine-tune each ticket; that with the best dev score is the super ticket."""
    lines, first = {"dense": one_run(args, "dense", [], make_tickets)}, args.tasks[0].metrics[0]
    for name in [name for name in TICKETS if name[:-2] in args.orders]:
        lines[name] = one_run(args, name, [args.out / f"{name}.pt"])
    curve = []
    for name, line in lines.items():
        left = 1 - line["mask"]["found"]["whole_model"] if line["mask"] else 1.0
        curve.append({"ticket": name, "remaining": left, "best": line["best"], "final": line["final"]})
        print(f"{name:10} {left:.1%} of the weights remain  best_{first}: {line['best'][first]:.4f}")
    best = max([*lines][1:9], key=lambda name: lines[name]["best"][first])
    return args.out / f"{best}.pt", {"curve": curve}


def find(args):
    """--find: a folder of fine-tunings, and at the end the ticket they led to, as mask.pt like any other."""
    names = ("model", "data", "find", "sparsity", "rank", "scope", "orders", "weights", "epochs",
             "batch_size", "max_len", "lr", "seed", "limit", "eval_every", "dtype")
    began, asked = time.time(), {"task": names_of(args)} | {n: tamt.plain(getattr(args, n)) for n in names}
    kind = f"imp-{args.sparsity:g}" if args.find == "imp" else "super"
    name = f"{names_of(args)}-{Path(args.model).name}-{kind}-s{args.seed}"
    args.out = args.out or Path("out", name)
    tamt.check_run(args.out, asked, args.resume, "mask.json")
    args.search = {"format": 1, "settings": asked, "step": 0}
    ticket, story = (find_imp if args.find == "imp" else find_super)(args)
    if args.rank_id:
        return
    masks, meta = tamt.read_mask(ticket)
    tamt.save_mask(args.out / "mask.pt", masks, meta)
    tamt.write_json(args.out / "mask.json", {"settings": asked, "meta": meta, **story})
    (args.out / "state.pt").unlink(missing_ok=True)
    words = ["python", "finetune.py", "--task", args.task, "--mask", str(args.out / "mask.pt")]
    words += ["--data", str(args.data)] if args.data else []
    print(f"---\ntask: {names_of(args)}\nmask: {args.out / 'mask.pt'}\nsparsity: {meta['sparsity']:.4f}\n"
          f"seconds: {time.time() - began:.4f}\nnext: {shlex.join(words)}")


def begin_search(args):
    """Once the input is known to be good: from now on the folder holds this search, unfinished."""
    (args.out.parent / "mask.json").unlink(missing_ok=True)
    for part in args.out.parent.glob(data.PARTS):
        part.unlink(missing_ok=True)
    tamt.write_torch(args.out.parent / "state.pt", args.search)


# ---------------------------------------------------------------- command line


def settings(argv=None):
    """The command line, with the task's own defaults filled in."""
    parser = tamt.Parser(description="Fine-tune a subnetwork of a pre-trained BERT on one task.")
    add, whole, number = parser.add_argument, tamt.positive(int), tamt.positive(float)
    add("--task", required=True, help=f"{', '.join(glue_squad.TASKS)}, or the FILE.json of an own task; "
        "several with commas share an encoder")
    add("--mask", help="mask file, for several tasks one each; without it the dense model is fine-tuned")
    add("--model", help="name or path of the checkpoint (the one the mask's metadata names; toy)")
    add("--data", type=Path, help="folder with GLUE's folders, train-v1.1.json, dev-v1.1.json (downloaded)")
    add("--find", choices=["imp", "super"], help="look for a ticket on the task: by iterative magnitude "
        "pruning, or of whole heads and feed-forward networks")
    add("--sparsity", type=tamt.fraction, help="--find imp: fraction of weights to REMOVE (0.7)")
    add("--rank", choices=["global", "local"], help="--find imp: where entries compete (global)")
    add("--scope", choices=["all", "encoder"], help="--find imp: all adds word embeddings (encoder)")
    add("--orders", nargs="+", choices=ORDERS, help="--find super: tickets to try (all three)")
    add("--weights", choices=["pretrained", "random", "shuffled"], default="pretrained", help="below the "
        "head: random is a fresh one, shuffled permutes each matrix (pretrained)")
    add("--epochs", type=whole, help="passes over the training set (GLUE 3, SQuAD 2, several tasks 5)")
    add("--batch-size", type=whole, help="examples per update (GLUE 32, SQuAD 16)")
    add("--max-len", type=whole, help="tokens per example (GLUE 128, SQuAD 384)")
    add("--lr", type=number, help="learning rate at the start (GLUE 2e-5, SQuAD 3e-5, several tasks 5e-5)")
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
    several = args.several = "," in args.task and not Path(args.task).is_file()

    def parts(text):
        found = [x.strip() for x in text.split(",")] if several else [text]
        if "" in found:
            raise ValueError(f"--task, --mask: an empty name in {text!r}")
        return found
    args.tasks = [glue_squad.find_task(x) for x in parts(args.task)]
    args.mask = [] if args.mask is None else [Path(x) for x in parts(args.mask)]
    names = {task.name for task in args.tasks}
    if several and (len(names) < len(args.tasks) or "squad" in names or "WORLD_SIZE" in os.environ):
        raise ValueError("--task: tasks that share an encoder are different, without squad, in one process")
    if several and args.mask and len(args.mask) != len(args.tasks):
        raise ValueError(f"--mask: {len(args.mask)} files for {len(args.tasks)} tasks; expected one for each")
    if args.find and (several or args.mask or args.predict or args.export):
        raise ValueError("--find goes with one --task and without --mask, --predict and --export")
    for find, own in (("imp", {"sparsity": 0.7, "rank": "global", "scope": "encoder"}),
                      ("super", {"orders": ORDERS})):
        for name in own:
            if args.find != find and getattr(args, name) is not None:
                raise ValueError(f"--{name} goes with --find {find}")
            if args.find == find and getattr(args, name) is None:
                setattr(args, name, own[name])
    if args.orders:
        args.orders = [order for order in ORDERS if order in args.orders]
    if args.find:
        args.model = args.model or "toy"
    args.stretch = 10 if args.find == "imp" else 1  # as released: the schedule's horizon is ten rounds
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed {args.seed}: expected 0 to {2**31 - 1}")
    ordinary = args.results.is_file() or str(args.results) == os.devnull or not args.results.exists()
    if not args.results.absolute().parent.is_dir() or not ordinary:
        raise ValueError(f"--results {args.results}: expected a file in a folder that exists")
    for folder in export_folders(args):
        if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
            raise ValueError(f"--export {folder}: a file stands there; expected a folder, new or old")
    args.command = shlex.join(["python", sys.argv[0], *map(str, sys.argv[1:] if argv is None else argv)])
    args.rank_id, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return args


def open_ticket(args):
    """The model with the head that the task needs and no other (several tasks get theirs in share), its
    vocabulary, and for each mask file the masks that fit; a lone Super Ticket's units are gone already."""
    found = [tamt.read_mask(file) for file in args.mask]
    args.mask_meta = [meta for _, meta in found]
    models = sorted({str(meta.get("model")) for meta in args.mask_meta})
    if not args.model and models[1:]:
        raise ValueError(f"--mask: tickets of different models, {', '.join(models)}: --model is needed")
    args.model = args.model or (args.mask_meta[0].get("model") if found else "toy")
    if not args.model or not isinstance(args.model, str):
        raise ValueError(f"{args.mask[0]} does not say which model it belongs to: --model is needed")
    if args.model not in (*data.MODELS, "toy"):
        args.model = str(Path(args.model).resolve())
    for folder in export_folders(args):
        tamt.refuse_own_folder(args.model, folder)
    model, vocab = tamt.load_model(args.model)
    task, several, paper = args.tasks[0], args.several, {}
    if several:  # ticket sharing's own
        paper = {"epochs": 5, "lr": 5e-5, "eval_every": max(task.eval_every for task in args.tasks)}
    for name in ("epochs", "batch_size", "max_len", "lr", "eval_every"):
        if getattr(args, name) is None:
            default = paper.get(name, getattr(task, name))
            setattr(args, name, TOY.get(name, default) if args.model == "toy" else default)
    if not 6 <= args.max_len <= model.config.positions:
        raise ValueError(f"--max-len {args.max_len}: expected 6 to {model.config.positions} tokens, the "
                         f"positions of {args.model}")
    tickets = [tamt.fit_masks(tamt.maskable(model), masks, file)
               for (masks, _), file in zip(found, args.mask, strict=True)]
    digest, sizes = hashlib.sha256(), []
    for mask in (mask for masks in tickets for mask in masks.values()):
        digest.update(tamt.pack(mask).numpy())
        sizes.append((int((~mask).sum()), mask.numel()))
    args.mask_digest = digest.hexdigest()[:16] if args.mask else None
    args.removed = sum(zeros for zeros, _ in sizes) / max(sum(entries for _, entries in sizes), 1)
    args.prunable = list(tamt.maskable(model, args.scope))  # before a fresh pooler comes
    args.units = [units(model.config, masks, file) if meta.get("method") == "super" else None
                  for masks, file, meta in zip(tickets, args.mask, args.mask_meta, strict=True)]
    torch.manual_seed(args.seed)
    squad, roberta = task.name == "squad", model.config.model_type == "roberta"
    if not squad and not roberta and not model.has("pooler"):
        model.new_head("pooler")
        print(f"{args.model} has no pooler: a fresh one is trained, dense")
    if not several:
        model.new_head("span" if squad else "classifier", len(task.labels or ()) or 1)
    for name in ["cls", "lm_head"] + ["pooler"] * (squad or roberta):  # RoBERTa's classifier needs no pooler
        for holder in (model, model.base):
            if hasattr(holder, name):
                delattr(holder, name)
    other_weights(model, args.weights)
    if not several and found and args.units[0]:
        remove_units(model, *args.units[0])
        tickets = [{}]
    model.to(args.device)
    return model, vocab, [{n: m.to(args.device) for n, m in masks.items()
                           if model.has("pooler") or "pooler" not in n} for masks in tickets]


def other_weights(model, kind: str):
    """BERT-Tickets' ablations: what is the mask worth over other weights than the pre-trained ones?"""
    if kind == "random":
        model.base.load_state_dict(bert.Model(model.config, model.has("pooler"), mlm=False).base.state_dict())
    if kind == "shuffled":
        for layer in tamt.maskable(model, "encoder").values():
            W = layer.weight.data
            layer.weight.data = W.flatten()[torch.randperm(W.numel())].view(W.shape)


def data_folder(args, task) -> Path:
    """Where a task's files are: --data, the toy's tasks, or the cache, after a download."""
    if args.data and not args.data.is_dir():
        raise FileNotFoundError(f"--data {args.data}: no such folder")
    if task.name not in glue_squad.TASKS:
        return Path(task.files["train"][0]).parent
    if args.data:
        return args.data.resolve()
    return tamt.toy_folder("tasks") if args.model == "toy" else glue_squad.download(task)


def finish(model, works: list[Work], vocab, args, result: dict, began: float):
    """Predictions, export, the line in --results, and the block that grep reads."""
    floors = [(work.prefix, glue_squad.floor(work.task, work.texts[split], split))
              for work in works for split in work.dev]
    floor = {prefix + name: value for prefix, scores in floors for name, value in scores.items()}
    for i, work in enumerate(works):
        if args.predict:
            write_predictions(model, work, vocab, args)
        if args.export:
            export(model, work, vocab, export_folders(args)[i])
    history, seconds, name = result.pop("evaluations"), time.time() - began, names_of(args)
    metas = args.mask_meta if args.several else next(iter(args.mask_meta), None)
    line = {"task": name, "model": args.model, "mask": metas, "sparsity": args.removed,
            "seed": args.seed, **result, "floor": floor, "seconds": round(seconds, 1),
            "command": args.command, "settings": args.identity, "device": str(args.device),
            "threads": torch.get_num_threads(), "processes": args.world, "versions": tamt.versions()}
    tamt.write_json(args.out / "result.json", line | {"evaluations": history})
    record(args)
    print(f"---\ntask: {name}\nsparsity: {args.removed:.4f}")
    for kind, scores in (("best", result["best"]), ("final", result["final"]), ("floor", floor)):
        print("".join(f"{kind}_{name}: {value:.4f}\n" for name, value in scores.items()), end="")
    print(f"seconds: {seconds:.4f}")


def export_folders(args) -> list[Path]:
    """Where --export writes: for several tasks a folder each below it."""
    if not args.export:
        return []
    return [args.export / task.name for task in args.tasks] if args.several else [args.export]


def record(args):
    """Adds the finished run's line to --results, once, whenever a kill may come. Rounds of IMP get none: they
    are steps on the way. state.pt goes at the end: three times the size of the model, and of no more use."""
    line = bert.read_json(args.out / "result.json")
    del line["evaluations"]
    held = args.results.read_bytes() if args.results.is_file() else b""
    if args.find != "imp" and json.dumps(line).encode() not in held:
        data.append_line(args.results, line)
    (args.out / "state.pt").unlink(missing_ok=True)


def write_predictions(model, work: Work, vocab, args):
    """GLUE's TSV of each test split, or SQuAD's JSON for dev, by the model after its last step."""
    squad = work.task.name == "squad"
    for split in ["dev"] if squad else [s for s in work.texts if not s.startswith("dev")]:
        sequences = work.dev[split] if squad else glue_squad.encode(work.texts[split], vocab, args.max_len)
        said = answers(work, predict(model, work, sequences, args))
        name = f"{work.task.folder}.tsv" if work.task.name != "mnli" else glue_squad.SUBMISSION[split]
        path = args.out / ("predictions.json" if squad else name)
        glue_squad.write_submission(work.task, said, path)
        print(f"{path}: {len(said):,} predictions")


def export(model, work: Work, vocab, folder):
    """What transformers' AutoModelForSequenceClassification or AutoModelForQuestionAnswering loads."""
    kind, extra, labels = "ForQuestionAnswering", {}, work.task.labels
    if work.task.name != "squad":
        kind, names = "ForSequenceClassification", labels or ("score",)
        extra = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        extra |= {} if labels else {"problem_type": "regression"}
    enter(work)
    bert.save(folder, model.config, full_size(model), kind, **extra)
    data.save_vocabulary(vocab, folder, model.config.positions)


def names_of(args) -> str:
    return ",".join(task.name for task in args.tasks)


def identity(args) -> dict:
    """What makes a run this run: settings, and the masks by their content."""
    names = ("model", "data", "epochs", "batch_size", "max_len", "lr", "seed", "limit", "eval_every", "dtype",
             "weights", "find", "mask_digest")
    return {"task": names_of(args)} | {name: tamt.plain(getattr(args, name)) for name in names}


def tune(args, then=None):
    """One run: reads all it needs, fine-tunes, shows the trained model to `then`, records what it scores."""
    began = time.time()
    with tamt.first_process_first(args):
        model, vocab, tickets = open_ticket(args)
        folders = [data_folder(args, task) for task in args.tasks]
        texts = [read_files(task, folder, args.predict)
                 for task, folder in zip(args.tasks, folders, strict=True)]
    args.data = ",".join(dict.fromkeys(map(str, folders)))
    args.identity = identity(args)
    if args.out is None:
        name = args.mask[0].resolve().parent.name if args.mask else f"{Path(args.model).name}-dense"
        digest = hashlib.sha256(json.dumps(args.identity).encode()).hexdigest()[:8]
        args.out = Path("out") / f"{names_of(args)}-{name}-s{args.seed}-{digest}"
    if args.results.resolve() in [args.out.resolve() / name for name in ("result.json", "state.pt")]:
        raise ValueError(f"--results {args.results} is a file that the run itself writes: choose another")
    try:
        state = tamt.open_run(args.out, args.identity, args.resume, "result.json", args.rank_id)
    except tamt.Finished:
        if not args.rank_id and (args.out / "state.pt").exists():  # killed just before the end
            record(args)
        told = [*args.out.glob("*.tsv"), *args.out.glob("predictions.json")]
        if args.predict and not told or not all(folder.exists() for folder in export_folders(args)):
            raise ValueError(f"{args.out} is finished, its model gone: --predict and --export need it "
                             "again, without --resume") from None
        raise
    if args.find and not args.rank_id:
        begin_search(args)
    works = [make_work(task, text, vocab, args.max_len, args.limit, args.seed)
             for task, text in zip(args.tasks, texts, strict=True)]
    masks = tickets[0] if tickets and not args.several else {}
    apply_masks(model, masks)
    if args.several:
        share(model, works, tickets, args)
    n = sum(len(work.train) for work in works)
    print(f"{names_of(args)}: {n:,} training examples, {args.epochs} epochs, batch {args.batch_size}, lr "
          f"{args.lr:g}; {args.model}, {args.removed:.2%} of the masked set zero")
    result = fine_tune(model, works, masks, args, state)
    if not args.rank_id:
        if then:
            then(model, works, masks, args)
        finish(model, works, vocab, args, result, began)
    if args.world > 1:
        torch.distributed.barrier()  # what it wrote, the next run may read


def main(argv=None):
    args = settings(argv)
    tamt.pick_device(args)
    (find if args.find else tune)(args)


if __name__ == "__main__":
    tamt.run(main)
