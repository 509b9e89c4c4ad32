"""How fast and how small: mask training against the usual ways to do the same work.

    python dev/bench.py                     # all figures: about half an hour on one thread
    python dev/bench.py --toy               # every part at toy size, in seconds: shows that it still runs
    python dev/bench.py --only step,share --rounds 9 --json dev/results.jsonl

How it measures: one process, variants take turns (A B A B), CPU seconds of this process on one thread, so
that other jobs disturb little; ratios are taken within a round, the table shows their median and range.
Weights and tokens are random: right for cost, silent about learning. Scores are spread around the cut as
after some training, since ranking the two values of the start is cheaper. Peak memory: a fresh process per
variant, above its imports and a toy step.

    ours      tamt.py's own functions, called as tamt.train calls them
    released  (a) the released code's step, re-created: a float mask from the scores in every forward, logits
              at all positions, AdamW in Python tensor by tensor; under mlm+kd its teacher makes logits and a
              loss that nobody reads; for kd alone both models stop below the MLM head, and the teacher
              drops out, too (train_kd.py never puts it into eval mode)
    hooks     (b) transformers, torch's parametrize with a straight-through mask, SDPA, fused AdamW
    dense     (c) transformers, all weights train without a mask, SDPA, fused AdamW
    products  (d) the matrix products of a step alone, into memory that is there already

Letters: B sequences, T tokens, D hidden, H heads, L layers, V vocabulary, n predicted positions.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

import bert  # noqa: E402
import data  # noqa: E402
import finetune as tuning  # noqa: E402
import glue_squad  # noqa: E402
import tamt  # noqa: E402

LR, PEAK, CPU = 5e-5, 989e12, torch.device("cpu")  # PEAK: dense bf16 FLOP/s of an H100
DROPOUT = 0.1  # --dropout; on a CPU torch's SDPA has a fast path only without it


class Size(NamedTuple):
    name: str
    L: int
    D: int
    H: int
    B: int
    T: int
    V: int = 30522


SIZES = {"4L": Size("4L/256 8x128", 4, 256, 4, 8, 128), "6L": Size("6L/384 8x512", 6, 384, 12, 8, 512),
         "base": Size("BERT-base 8x128", 12, 768, 12, 8, 128),
         "gpu": Size("BERT-base 16x512", 12, 768, 12, 16, 512)}
TOYS = {name: Size(f"toy for {size.name}", 2, 32, 2, 4, 16, 300) for name, size in SIZES.items()}

# ---------------- the variants: each returns a function, one step


def config(size: Size, dropout=None) -> dict:
    """Sizes under the names that bert.Config and transformers share; dropout: --dropout unless given."""
    dropout = DROPOUT if dropout is None else dropout
    return {"vocab_size": size.V, "hidden_size": size.D, "num_hidden_layers": size.L,
            "num_attention_heads": size.H, "intermediate_size": 4 * size.D,
            "max_position_embeddings": max(size.T, 128), "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout}


def batches(size: Size):
    """Endless batches of random words, the same for every variant."""
    vocab, rng = data.Vocabulary(None, size.V, 0, 1, 2, 3, 4), np.random.default_rng(0)
    while True:
        yield tamt.Batch(rng.integers(5, size.V, (size.B, size.T)), vocab, rng)


def spread(W):  # -> scores of W's shape, 30 % around 0.02 and 70 % around 0
    return 0.02 * (torch.rand_like(W) > 0.7) + 0.005 * torch.randn_like(W)


def our_model(size: Size, objective: str, dropout=None, device=CPU):
    """-> model with masked layers, the layers, Scores, what learns"""
    torch.manual_seed(0)
    model = bert.Model(bert.Config(**config(size, dropout))).requires_grad_(False).train().to(device)
    layers = tamt.mask_model(model)
    scores = tamt.Scores(layers, tamt.magnitude_masks(layers, 0.7, "local"), 0.7, "global")
    for layer in layers.values():
        if layer.scores.requires_grad:
            layer.scores.data.copy_(spread(layer.weight))
    scores.rank()
    return model, layers, scores, tamt.what_learns(model, SimpleNamespace(objective=objective, method="tamt"))


def ours(size: Size, objective="mlm", device=CPU, dtype=torch.float32, compiled=False, now=time.process_time):
    """A step of tamt.train; it returns the seconds of its sections."""
    model, layers, scores, learns = our_model(size, objective, device=device)
    optimizer, feed = tamt.adamw(learns.values(), device), batches(size)
    net = torch.compile(model) if compiled else model
    optimizer.param_groups[0]["lr"] = LR

    def step():
        marks, batch = [now()], next(feed)
        with tamt.autocast(device, dtype):
            part = batch.part(slice(None), device)
            loss = tamt.batch_loss(model, net, objective, part, batch.tokens, batch.scored)
        loss.backward()
        marks.append(now())
        nn.utils.clip_grad_norm_(learns.values(), 1.0)
        assert math.isfinite(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(now())
        scores.rank(reach=2 * LR)
        marks.append(now())
        return dict(zip(("loss", "optimiser", "rank"), np.diff(marks), strict=True))
    step.layers = layers
    return step


def from_transformers(size: Size, attention="sdpa", dropout=None):
    from transformers import BertConfig, BertForMaskedLM  # needed here alone
    return BertForMaskedLM(BertConfig(**config(size, dropout), attn_implementation=attention)).train()


def head_only(net, head=True):  # the MLM head without the tied decoder -> {name: parameter}
    for name, p in net.named_parameters():
        p.requires_grad_(head and name.startswith("cls.") and "decoder.weight" not in name)
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def usual_step(net, update, size: Size, objective="mlm", teacher=None):
    """Logits at all positions; `update` clips and steps."""
    feed, more = batches(size), {"output_hidden_states": "kd" in objective}

    def read(model, ids, labels):
        return model.bert(ids, **more) if objective == "kd" else model(ids, labels=labels, **more)

    def step():
        net.zero_grad()
        batch = next(feed)
        labels = torch.from_numpy(np.where(batch.chosen, batch.ids, -100))
        texts = torch.from_numpy(batch.ids if objective == "kd" else batch.shown), labels
        out = read(net, *texts)
        loss = out.loss if "mlm" in objective else 0.0
        if teacher:
            with torch.no_grad():
                told = read(teacher, *texts).hidden_states[1:]
            pairs = list(zip(told, out.hidden_states[1:], strict=True))
            loss = loss + sum((1 - F.cosine_similarity(t, s, dim=-1)).mean() for t, s in pairs) / len(pairs)
        loss.backward()
        update()
        return loss.item()
    return step


class Binarise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, S, phi):
        M = S.clone()
        M[S <= phi] = 0.0
        M[S > phi] = 1.0
        return M

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def released(size: Size, objective="mlm", copy=None, dropout=None):
    """(a). `copy`: weights and scores of ours, to compare gradients; then nothing is updated."""
    teachers = dropout if objective == "kd" else 0.0  # as released
    net, teacher = (from_transformers(size, "eager", p) for p in (dropout, teachers))
    if copy:
        net.load_state_dict(copy[0], strict=False), teacher.load_state_dict(copy[0], strict=False)
    learns = head_only(net, objective != "kd")
    for name, module in net.bert.named_modules(prefix="bert"):
        if isinstance(module, nn.Linear) or name.endswith("word_embeddings"):
            start = copy[1][f"{name}.weight"].clone() if copy else spread(module.weight)
            S = learns[f"{name}.scores"] = nn.Parameter(start)

            def forward(x, module=module, S=S):
                linear = isinstance(module, nn.Linear)
                W = module.weight * Binarise.apply(S, tamt.PHI)
                return F.linear(x, W, module.bias) if linear else F.embedding(x, W, module.padding_idx)
            module.forward = forward
    moments, steps = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in learns.values()], count(1)

    @torch.no_grad()
    def update():
        nn.utils.clip_grad_norm_(learns.values(), 1.0)
        t = next(steps)
        for p, m, v in moments:
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            p.addcdiv_(m, v.sqrt().add_(1e-8), value=-LR * math.sqrt(1 - 0.999**t) / (1 - 0.9**t))
            p.grad = None
    update = (lambda: None) if copy else update
    step = usual_step(net, update, size, objective, teacher if "kd" in objective else None)
    step.learns = learns
    return step


class Seen(nn.Module):
    """A parametrization: the weight times the mask of its scores, straight through."""

    def __init__(self, W):
        super().__init__()
        self.scores = nn.Parameter(spread(W))

    def forward(self, W):
        return W * ((self.scores > tamt.PHI).to(W.dtype) + self.scores - self.scores.detach())


def hooks(size: Size):
    net = from_transformers(size)
    head_only(net)
    for module in list(net.bert.modules()):
        if isinstance(module, nn.Linear) or module is net.bert.embeddings.word_embeddings:
            parametrize.register_parametrization(module, "weight", Seen(module.weight))
    return dense(size, net)


def dense(size: Size, net=None):
    net = net or from_transformers(size)
    learns = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, LR, weight_decay=0.0, fused=True)
    return usual_step(net, lambda: (nn.utils.clip_grad_norm_(learns, 1.0), optimizer.step()), size)


def products(size: Size):
    """(d): forward, gradient to the input, gradient to the weight; attention; the MLM head at n positions."""
    tokens, D, heads, rand, empty = size.B * size.T, size.D, size.B * size.H, torch.randn, torch.empty
    n, shapes = int(0.15 * tokens), [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
    linear = [(rand(tokens, i), rand(o, i), rand(tokens, o), empty(tokens, i), empty(o, i), empty(tokens, o))
              for i, o in shapes]
    q, a, q2, a2 = (rand(heads, size.T, w) for w in 2 * (D // size.H, size.T))
    x, logits, words = rand(n, D), rand(n, size.V), rand(size.V, D)
    x2, logits2 = empty(n, D), empty(n, size.V)

    def step():
        for _ in range(size.L):
            for x_, W, dy, dx, dW, y in linear:
                torch.mm(x_, W.T, out=y), torch.mm(dy, W, out=dx), torch.mm(dy.T, x_, out=dW)
            for _ in range(2):  # q k^T, and its like in backward
                torch.bmm(q, q.transpose(1, 2), out=a2)
            for _ in range(4):
                torch.bmm(a, q, out=q2)
        torch.mm(x, words.T, out=logits2), torch.mm(logits, words, out=x2)
    return step


VARIANTS = {f.__name__: f for f in (ours, released, hooks, dense, products)}

# ---------------------------------------------------------------- clocks


def take_turns(steps: dict, rounds: int, now=time.process_time) -> dict[str, np.ndarray]:
    """Seconds of each variant in each round -> {name: (rounds,)}

    Two rounds before them do not count: in them the heap that all variants share still grows, and a fresh
    page costs 2 to 11 us on a shared machine (BERT-base: 2 of 9 s of our second step, 0.05 of the third)."""
    seconds = {name: [] for name in steps}
    for i in range(-2, rounds):
        for name, step in steps.items():
            began = now()
            step()
            seconds[name] += [now() - began] * (i >= 0)
    return {name: np.array(values) for name, values in seconds.items()}


def high_water() -> float:
    """Peak memory of this process in MB. Not ru_maxrss, which after exec still holds the parent's."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1000


def worker(variant: str, size: Size, timed: bool):
    VARIANTS[variant](TOYS["4L"])()  # libraries are loaded, optimisers compiled
    before, step = high_water(), VARIANTS[variant](size)
    step(), step()
    print(high_water() - before, *[np.median(take_turns({"": step}, 3)[""])] * timed)


# ---------------- figures: (name, goal, values of the rounds, unit)
# A goal is (">=" or "<=", goal, stretch), or None for what is only told.


def equal(sizes, args):
    """Loss and score gradients of ours and (a) on the same batch, dropout off."""
    size = TOYS["4L"]
    for objective in ("mlm", "kd", "mlm+kd"):
        model, layers, _, learns = our_model(size, objective, dropout=0.0)
        for layer in layers.values():  # the cut of (a) stands at phi
            layer.scores.data.copy_(2 * tamt.PHI * layer.mask)
        weights = {name: p for name, p in model.named_parameters() if "scores" not in name}
        other = released(size, objective, (weights, {n: m.scores.detach() for n, m in layers.items()}), 0.0)
        batch, theirs = next(batches(size)), other()
        part = batch.part(slice(None), CPU)
        loss = tamt.batch_loss(model, model, objective, part, batch.tokens, batch.scored)
        loss.backward()
        pairs = [(p.grad, other.learns[name].grad) for name, p in learns.items()]
        apart = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
        apart.append(abs(loss.item() / theirs - 1))
        name = f"equal: {objective}, loss and {len(pairs)} gradients, worst"
        yield name, ("<=", 1e-5, 1e-5), [max(apart)], "relative"


def step(sizes, args):
    """The MLM step against the four others."""
    goals = {"released": {"4L": (2.4, 3), "6L": (2.2, 2.3), "base": (1.4, 1.6)}, "dense": {},
             "hooks": {"4L": (2.2, 2.7), "base": (1.2, 1.25)}}
    for key in ("4L", "6L", "base"):
        size = sizes[key]
        rounds = args.rounds * (3 if key == "4L" else 1)
        seconds = take_turns({name: make(size) for name, make in VARIANTS.items()}, rounds)
        for name, goal in goals.items():
            goal = (">=", *goal[key]) if key in goal else None
            yield f"step, {size.name}: {name} / ours", goal, seconds[name] / seconds["ours"], "x"
        goal = ("<=", 1.3, 1.12) if key == "base" else ("<=", 1.6, 1.3)
        yield f"step, {size.name}: ours / products", goal, seconds["ours"] / seconds["products"], "x"


def kd(sizes, args):
    for objective, goal in (("kd", 1.5), ("mlm+kd", 3.5)):
        steps = {f.__name__: f(sizes["4L"], objective) for f in (released, ours)}
        seconds = take_turns(steps, 3 * args.rounds)
        ratio = seconds["released"] / seconds["ours"]
        yield f"step, {sizes['4L'].name}, {objective}: released / ours", (">=", goal, goal), ratio, "x"


def share(sizes, args):
    """Rank, optimiser (with clipping) and mask products as shares of the base step."""
    step = ours(sizes["base"])
    parts = [step() for _ in range(args.rounds + 2)][2:]
    whole, rank, optimiser = (np.array([f(p) for p in parts]) for f in (
        lambda p: sum(p.values()), lambda p: p["rank"], lambda p: p["optimiser"]))
    matrices = [m for name, m in step.layers.items() if ".layer." in name]

    def products():  # W * M, and dL/dS = dL/d(W * M) * W
        for m in matrices:
            _ = m.weight * m.mask, m.weight * m.weight
    product, name = np.median(take_turns({"": products}, args.rounds)[""]), sizes["base"].name
    yield f"share of the step, {name}: exact rank", ("<=", 5, 5), 100 * rank / whole, "%"
    rest = 100 * (rank + optimiser + product) / whole
    yield f"share of the step, {name}: rank + optimiser + mask product", ("<=", 15, 5), rest, "%"


def memory(sizes, args):
    def peak(variant):
        command = [sys.executable, __file__, "--worker", variant, "base"] + ["--toy"] * args.toy
        return np.array([float(subprocess.check_output(command).split()[-1]) for _ in range(args.rounds)])
    mine, name = peak("ours"), sizes["base"].name
    yield f"peak memory, {name}: ours", None, mine, "MB"
    for other, goal in [("dense", (1.2, 1.0)), ("released", (0.75, 0.65))][args.toy:]:
        yield f"peak memory, {name}: ours / {other}", ("<=", *goal), mine / peak(other), "x"


def work(sizes, args):
    """Cost against work, for figures.py: seconds and peak memory by the encoder's weights and by tokens."""
    for key, B in [*product(("4L", "6L", "base"), (4, 8, 16))][:2 if args.toy else 9]:
        command = [sys.executable, __file__, "--worker", "ours", f"{key}:{B}"] + ["--toy"] * args.toy
        found, size = subprocess.check_output(command, text=True).split()[-2:], sizes[key]
        name, T = f"{size.L}L/{size.D}", min(size.T, 128)
        name = f"work, {name}, {12 * size.L * size.D**2:,} parameters, {B * T:,} tokens"
        yield f"{name}: MB", None, [float(found[0])], "MB"
        yield f"{name}: seconds", None, [float(found[1])], "s"


def finetune(sizes, args):
    """Batches of 32 of SST-2's lengths, like ones together, against all padded to 128."""
    size, table = sizes["6L"], args.data / "glue" / "SST-2" / "train.tsv"
    lengths = np.random.default_rng(0).gamma(1.7, 6.6, 20000).astype(int) + 3  # mean 13.3, as SST-2's
    if table.is_file() and not args.toy:
        vocab = data.vocabulary(args.data / "models" / "bert-tiny-mlm")
        rows = [row.split("\t")[0] for row in table.read_text().split("\n")[1:-1]]
        lengths = [len(found.ids) + 2 for found in vocab.tokenizer.encode_batch(rows)]  # [CLS], [SEP]
    model, rng = bert.Model(bert.Config(**config(size)), mlm=False).train(), np.random.default_rng(0)
    model.new_head("classifier", 2)
    lengths, optimizer = np.minimum(lengths, 128), tamt.adamw(model.parameters(), CPU)
    order = iter(glue_squad.bucketed(lengths, 32, rng))

    def step(*full):
        rows = [(rng.integers(5, size.V, n), np.zeros(n)) for n in (*lengths[next(order)], *full)]
        ids, keep, _ = (torch.from_numpy(x)[:32] for x in glue_squad.pad(rows, 0))
        logits = model.class_logits(model(ids, None if keep.all() else keep)[-1])
        F.cross_entropy(logits, ids[:, 1] % 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    variants = {"padded": lambda: step(128), "ours": lambda: [step() for _ in range(8)]}
    seconds = take_turns(variants, 2 * args.rounds)
    ratio = 8 * seconds["padded"] / seconds["ours"]
    yield f"fine-tuning {size.name.split()[0]}, SST-2: padded to 128 / bucketed", (">=", 8, 8), ratio, "x"


def tickets(sizes, args):
    """Forward passes of an encoder without the heads and FFNs that a Super Ticket takes out."""
    size, models = sizes["6L"], {}
    for level in (0, 3, 8):
        models[level] = bert.Model(bert.Config(**config(size)), mlm=False).eval()
        units = tuning.structured(torch.rand(size.L, size.H), torch.rand(size.L), "random", level, 1)
        tuning.remove_units(models[level], *units)
    ids = torch.randint(5, size.V, (32, min(64, size.T)))
    with torch.no_grad():
        seconds = take_turns({k: lambda m=m: m(ids) for k, m in models.items()}, 3 * args.rounds)
    weights = {k: sum(p.numel() for p in m.base.encoder.parameters()) for k, m in models.items()}
    for k in (3, 8):
        left = f"{100 * weights[k] / weights[0]:.0f} % of the encoder"
        yield f"Super Ticket, level {k}, {left}: whole / ticket", None, seconds[0] / seconds[k], "x"


def tokens(sizes, args):
    """A text read once, by data.encode_text and in the plain way."""
    file, folder = args.data / "wiki" / "enwiki_subset.txt", args.data / "models" / "bert-tiny-mlm"
    if args.toy or not file.is_file():
        words = [f"{a}{b}" for a in "abcdefgh" for b in ("", "s", "ed", "ing")]
        file = folder = Path(tempfile.mkdtemp())
        (folder / "vocab.txt").write_text("\n".join([*data.WORDPIECE_SPECIALS, *words]) + "\n")
        text = " ".join(np.random.default_rng(0).choice(words, 40000))
    else:
        text = file.read_text()
    vocab, marks = data.vocabulary(folder), [time.process_time()]
    memo = np.concatenate(list(data.encode_text(iter([text]), vocab)))
    marks.append(time.process_time())
    lines = vocab.tokenizer.encode_batch_fast(text.split("\n"), add_special_tokens=False)
    plain = [i for line in lines for i in line.ids]
    marks.append(time.process_time())
    assert np.array_equal(memo, plain), "the memo changed the ids"
    (mine, theirs), size = np.diff(marks), len(text.encode()) / 1e6
    yield f"tokenising {size:.1f} MB, ids equal", (">=", 4.5, 4.5), [size / mine], "MB/s"
    yield "tokenising line by line, encode_batch_fast", None, [size / theirs], "MB/s"


def cuda(sizes, args):
    """BERT-base in bf16 on a GPU; with --toy and no GPU the same lines on the CPU."""
    size, there = sizes["gpu"], torch.cuda.is_available()
    if not there and not args.toy:
        return print("cuda: no GPU here", file=sys.stderr)
    how = {"device": torch.device("cuda"), "dtype": torch.bfloat16} if there else {}

    def now():
        if there:
            torch.cuda.synchronize()
        return time.perf_counter()
    if there:
        torch.cuda.reset_peak_memory_stats()
    step, turns, name = ours(size, now=now, **how), 6 * args.rounds, f"cuda, {size.name} bf16"
    parts = [step() for _ in range(5 + turns)][5:]
    seconds, rank = np.array([sum(p.values()) for p in parts]), np.array([p["rank"] for p in parts])
    T, P = size.B * size.T, 12 * size.L * size.D**2
    flop = 6 * P * T + 12 * size.L * T * size.T * size.D + 4 * 0.15 * T * size.V * size.D  # PERFORMANCE.md 3
    yield f"{name}: 27,920 steps", ("<=", 10, 10), seconds * 27920 / 60, "min"
    yield f"{name}: of {PEAK / 1e12:.0f} TFLOP/s", (">=", 25, 40), 100 * flop / seconds / PEAK, "%"
    yield f"{name}: exact rank, share of the step", ("<=", 5, 5), 100 * rank / seconds, "%"
    if there:
        yield f"{name}: peak memory", ("<=", 8, 8), [torch.cuda.max_memory_allocated() / 1e9], "GB"
        quick = ours(size, compiled=True, now=now, **how)
        for _ in range(5):
            quick()
        both = take_turns({"eager": step, "compiled": quick}, turns, now)
        yield f"{name}: --compile / eager", ("<=", 1.02, 1.02), both["compiled"] / both["eager"], "x"


PARTS = {f.__name__: f for f in (equal, memory, tokens, finetune, tickets, kd, share, work, step, cuda)}

# ---------------------------------------------------------------- the table


def hardware() -> str:
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "model name: ?\n"
    name = cpu.split("model name")[1].split("\n")[0].strip(" \t:")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, 1 thread{gpu}"


def told(name, goal, values, unit, judged: bool) -> str:
    low, middle, high = (f(values) for f in (np.min, np.median, np.max))
    bounds, verdict = "", ""
    if goal:
        bounds = f"{goal[0]} {goal[1]:g}" + f" / {goal[2]:g}" * (goal[1] != goal[2])
        reached = [middle >= bound if goal[0] == ">=" else middle <= bound for bound in goal[1:]]
        verdict = "stretch" if all(reached) and goal[1] != goal[2] else "met" if reached[0] else "MISSED"
    span = f"{low:.3g} .. {high:.3g}" if len(values) > 1 else ""
    return f"{name:66} {bounds:>13} {middle:9.3g} {span:>16} {unit:9}{verdict if judged else ''}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Time and memory of mask training against the usual ways.")
    add = parser.add_argument
    add("--toy", action="store_true", help="every part at toy size: shows that it runs, nothing more")
    add("--only", default=",".join(PARTS), help=f"parts, by comma ({','.join(PARTS)})")
    add("--rounds", type=int, default=5, help="turns of each variant (5)")
    add("--dropout", type=float, default=0.1, help="of hidden states and attention, in every variant (0.1)")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="real texts and tables")
    add("--json", type=Path, help="file that gets one line per figure")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    globals()["DROPOUT"] = args.dropout
    torch.set_num_threads(1)
    sizes, args.rounds = (TOYS, 1) if args.toy else (SIZES, args.rounds)
    if args.worker:
        key, _, B = args.worker[1].partition(":")
        size = sizes[key]._replace(B=int(B), T=min(sizes[key].T, 128)) if B else sizes[key]
        return worker(args.worker[0], size, timed=bool(B))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": " ".join(["python dev/bench.py", *map(str, sys.argv[1:] if argv is None else argv)]),
             "hardware": hardware(), "versions": tamt.versions(), "date": time.strftime("%Y-%m-%d")}
    print(f"{about['hardware']}, torch {torch.__version__}, {about['date']}\n{about['command']}\n")
    print(f"{'figure':66} {'goal / stretch':>13} {'median':>8} {'range':>16}")
    for part in args.only.split(","):
        for name, goal, values, unit in PARTS[part](sizes, args):
            print(told(name, goal, values, unit, not args.toy or part == "equal"), flush=True)
            low, middle, high = (float(f(values)) for f in (np.min, np.median, np.max))
            line = {"figure": name, "goal": goal, "median": middle, "range": [low, high], "unit": unit}
            if args.json:
                data.append_line(args.json, line | about)


if __name__ == "__main__":
    main()
