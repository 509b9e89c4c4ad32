"""Task-agnostic mask training: learn WHICH weights of a pre-trained BERT to keep, and change none.

Liu et al., Learning to Win Lottery Tickets in BERT Transfer via Task-agnostic Mask Training, NAACL 2022.

    python tamt.py --model bert-base --sparsity 0.7 --objective kd

The algorithm in eight steps, in the order in which main() takes them:

    1  open_model    read an original checkpoint; its weights W are frozen for good
    2  open_text     cut plain text into rows of T tokens
    3  start_masks   one-shot magnitude pruning (OMP): keep the largest |W| of each matrix
    4  Scores        one real score per weight: 2 phi where OMP keeps, 0 where it prunes           Eq. 5
    5  batch_loss    run W * M on text: masked-LM loss, distance to the dense model, or both       Eq. 3, 6
    6  train         gradients pass straight through M to the scores; AdamW moves them             Eq. 4
    7  Scores.rank   rank all scores: exactly round(N s) are pruned after every update             Eq. 2
    8  finish        save the mask, and say what it is worth on held-out text

Baselines: `--method omp` stops after step 3, `random` draws that mask, `imp` trains W between prunings.

Glossary: B sequences, T tokens, D hidden, L layers, V vocabulary; in shapes alone M is scored positions. Else
    W    pre-trained weights (theta in the paper)       S    scores (underlined M in the paper)
    M    binary mask, True = kept                       phi  the cut between pruned and kept scores
    s    sparsity, the fraction REMOVED                 N    entries of the masked set, n of one matrix

Same as the released code: the start, the masked set with pooler and word embeddings, signed scores, the gate
S > phi, a decoder that shares the word embeddings but not their mask, an MLM head that trains along, losses,
steps, batch, length, dropout, learning rates, linear decay over 27,920 steps, clipping at 1.0.
Deliberately different:
    * one rank over all scores (--rank global); released: inside each matrix (--rank local)
    * exact after every step (--refresh-every 1); released: phi stands still for 1000 (MLM) or 100 (KD) steps
    * round(N s), and ties go to the lower index; released: int(n s), and all ties at the cut are pruned
    * the pooler never gets a gradient: under --rank global it keeps its start mask, inside the budget
    * KD reads the rows that MLM reads, averages over real tokens, its teacher runs without dropout; released:
      sentence pairs of its own with one corrupted token each, padding averaged in, teacher dropout on
    * AdamW without decay and one global clip for KD, too; released: BertAdam, decay 0.01, a clip per tensor
    * --steps sets the schedule's horizon; without --lr it raises lr: scores travel as far as in the paper
    * no special token, [UNK] included, is chosen for corruption
    * IMP rewinds truly; released (--no-rewind): its rewind copies the trained weights onto themselves
Not included: attention distillation, sparsity schedules (inert in the released code), several hosts, FSDP.
"""

import argparse
import io
import json
import math
import os
import platform
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import bert
import data

SAVE_SECONDS = 300  # a crash costs at most this much work
PHI = 0.01  # Eq. 5: kept entries start at 2 phi, pruned ones at 0
HORIZON = 27920  # steps of the released schedule: two epochs of WikiText-103 at 16 x 512
STEPS = {0.2: 3000, 0.3: 6000, 0.4: 8000, 0.5: 11000, 0.6: 14000, 0.7: 17000, 0.8: 20000, 0.9: 22000}

# ---------------------------------------------------------------- masked layers


def masked(W, M):  # both of one shape
    """W * M. The mask's bytes read as integers: on a CPU torch multiplies with those in 0.4 of the time that
    it takes with bool."""
    return W * M.view(torch.uint8)


class StraightThrough(torch.autograd.Function):
    """W * M forward; backward as if the mask were the scores: dL/dS = dL/d(W * M) * W (Eq. 4)."""

    @staticmethod
    def forward(ctx, W, S, M):
        ctx.save_for_backward(W)
        return masked(W, M)

    @staticmethod
    def backward(ctx, grad):
        (W,) = ctx.saved_tensors
        return None, grad * W, None


class Masked(nn.Module):
    """A layer whose weight is seen through a mask. It has scores while a mask is learned; without them W
    itself may train under the mask (IMP). `dense` takes the mask off: the KD teacher is this very layer."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, getattr(layer, "bias", None)
        self.padding_idx = getattr(layer, "padding_idx", None)
        self.mask = torch.ones_like(layer.weight, dtype=torch.bool)  # no buffer: each process ranks its own
        self.register_parameter("scores", None)
        self.dense = False

    def seen(self, W, S, M):
        if self.dense:
            return W
        return masked(W, M) if S is None else StraightThrough.apply(W, S, M)


class MaskedLinear(Masked):
    def forward(self, x):  # (.., in) -> (.., out)
        W, S, M = self.weight, self.scores, self.mask
        product = self.seen(W, S, M)
        with bert.remade(product, lambda: masked(W.detach(), M)):  # a dense teacher keeps nothing anyway
            return F.linear(x, product, self.bias)


class MaskedEmbedding(Masked):
    """Masks the rows it looks up; the tied decoder keeps the whole matrix. The pad row gets no gradient."""

    def forward(self, ids):  # (B, T) -> (B, T, D)
        W = F.embedding(ids, self.weight, self.padding_idx)
        S = None if self.scores is None else F.embedding(ids, self.scores, self.padding_idx)
        return self.seen(W, S, self.mask[ids])


def maskable(model: bert.Model, scope: str = "all") -> dict[str, nn.Module]:
    """{parameter name: layer} of the masked set in model order: word embeddings (not in scope "encoder"), six
    matrices per layer, pooler if there is one."""
    modules = model.base.named_modules(prefix=model.config.model_type)
    return {f"{name}.weight": layer for name, layer in modules
            if isinstance(layer, nn.Linear) or name.endswith("word_embeddings") and scope == "all"}


def mask_model(model: bert.Model, scope: str = "all") -> dict[str, Masked]:
    """Puts masked layers, all entries kept, in the place of the maskable ones."""
    layers = {}
    for name, layer in maskable(model, scope).items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        layers[name] = (MaskedLinear if isinstance(layer, nn.Linear) else MaskedEmbedding)(layer)
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


@contextmanager
def dense_teacher(model):
    """The model itself, unmasked, without dropout and gradients: no second copy of the weights."""
    layers, training = [m for m in model.modules() if isinstance(m, Masked)], model.training
    for layer in layers:
        layer.dense = True
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for layer in layers:
            layer.dense = False
        model.train(training)


# ---------------------------------------------------------------- one exact rank, for every method


def keep_mask(values: torch.Tensor, prune: int, near: tuple[float, float] | None = None, out=None):
    """All but the `prune` smallest of values (n,) -> keep (n,) bool with exactly `prune` False, and phi.

    Among equals at the cut the lower index is kept:
        values 3 1 2 2 2, prune 3  ->  keep 1 0 1 0 0: the 1 goes, then the last 2, then the 2 before it
    phi lies midway between the last pruned and the first kept value: if they differ, values > phi is keep.
    `near` = (low, high) guesses where the cut lies. If that is right, only the few values in between are
    sorted; if not, nothing is lost but time. `out` (n,) bool: memory for keep, which a CPU uses for that."""
    if near is not None:
        low, high = near
        keep, kept, between = above(values, high, low, out)  # in ascending order, so that ties keep theirs
        left = prune - (len(values) - kept - len(between))  # so many of those must go
        if 0 <= left <= len(between):
            keep[between], phi = keep_mask(values[between], left)
            return keep, min(max(phi, low), high)
    if not 0 < prune < len(values):
        return torch.full_like(values, prune == 0, dtype=torch.bool), -math.inf if prune == 0 else math.inf
    last = kth_smallest(values, prune)
    keep = values > last
    ties = positions(values == last)
    keep[ties[:len(ties) + int((values < last).count_nonzero()) - prune]] = True
    first = values[keep].min()
    middle = torch.minimum((last + first) / 2, torch.nextafter(first, last))  # rounding may not reach `first`
    return keep, float(middle)


def above(values, high: float, low: float, out=None):
    """values (n,) -> values > high (n,) bool, how many those are, and the positions of the others > low.
    On a CPU by numpy, in pieces that stay in its cache: a rank over BERT-base takes 0.31 of the time
    that torch's comparisons need in the same pieces. (With `out` 1.0 % of a step, else 1.2 to 3.7.)"""
    if values.device.type != "cpu":
        keep = values > high
        return keep, int(keep.count_nonzero()), positions(keep ^ (values > low))
    keep = np.empty(len(values), bool) if out is None else out.numpy()
    values, kept, between, size = values.numpy(), 0, [], 1 << 18
    for at in range(0, len(values), size):
        part, mine = values[at:at + size], keep[at:at + size]
        kept += np.count_nonzero(np.greater(part, high, out=mine))
        between.append(np.flatnonzero(mine ^ (part > low)) + at)
    return torch.from_numpy(keep), kept, torch.from_numpy(np.concatenate(between))


def positions(marked: torch.Tensor) -> torch.Tensor:  # (n,) bool -> (k,) int64, ascending
    """Where a vector is True. On a CPU numpy finds a few among many six times as fast as torch."""
    if marked.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(marked.numpy()))
    return marked.nonzero().squeeze(1)


def kth_smallest(values: torch.Tensor, k: int) -> torch.Tensor:
    """k from 1. On a CPU numpy's partition is the fastest exact selection; CUDA sorts (radix)."""
    if values.is_cuda:
        return values.sort().values[k - 1]
    return torch.tensor(np.partition(values.detach().cpu().numpy(), k - 1)[k - 1], device=values.device)


def prune(values: dict[str, torch.Tensor], sparsity: float, rule: str) -> dict[str, torch.Tensor]:
    """Masks without the smallest: round(n s) of each matrix ("local") or round(N s) of all ("global")."""
    if rule == "local":
        return {name: prune({name: v}, sparsity, "global")[name] for name, v in values.items()}
    vector = torch.cat([v.flatten() for v in values.values()])
    keep, _ = keep_mask(vector, round(len(vector) * sparsity))
    parts = keep.split([v.numel() for v in values.values()])
    return {name: part.view(v.shape) for part, (name, v) in zip(parts, values.items(), strict=True)}


def magnitude_masks(layers: dict[str, Masked], sparsity: float, rule: str) -> dict[str, torch.Tensor]:
    """By |W|; what is pruned stays pruned. OMP on fresh layers, the next nested level of IMP on others."""
    sizes = {name: torch.where(m.mask, m.weight.detach().abs(), -1.0) for name, m in layers.items()}
    return prune(sizes, sparsity, rule)


def random_masks(layers: dict[str, Masked], sparsity: float, rule: str, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng([seed, 0])
    draws = {n: torch.from_numpy(rng.random(m.weight.shape, np.float32)) for n, m in layers.items()}
    return {n: mask.to(layers[n].weight.device) for n, mask in prune(draws, sparsity, rule).items()}


class Scores:
    """One score per maskable weight, in one vector that each layer holds a view of, and masks ranked from it.

    The pooler gets no gradient from either loss. Under one global rank a wandering cut would pass its two
    values, 0 and 2 phi, and empty it: it keeps its start mask, the others share the rest of the budget."""

    def __init__(self, layers: dict[str, Masked], start: dict[str, torch.Tensor], sparsity: float, rule: str):
        self.vector = torch.cat([2 * PHI * start[name].flatten().float() for name in layers])  # Eq. 5
        self.mask, at, spans = self.vector > PHI, 0, {}
        for name, layer in layers.items():
            spans[name] = (at, at := at + layer.weight.numel())
            part, shape = slice(*spans[name]), layer.weight.shape
            layer.scores = nn.Parameter(self.vector[part].view(shape), requires_grad="pooler" not in name)
            layer.mask = self.mask[part].view(shape)
        learned = [span for name, span in spans.items() if "pooler" not in name]
        fixed = int((~self.mask[learned[-1][1]:]).sum())  # of the pooler, the last part of the vector
        self.groups = [(a, b, round((b - a) * sparsity)) for a, b in learned] if rule == "local" else \
            [(0, learned[-1][1], round(len(self.vector) * sparsity) - fixed)]
        self.phi = [PHI] * len(self.groups)
        self.rank()  # the start rounds in each matrix; the few entries that their sum lacks of round(N s) ...
        self.vector.copy_(2 * PHI * self.mask)  # ... begin on the other side, so that step 0 is exact, too
        self.phi = [PHI] * len(self.groups)

    @torch.no_grad()
    def rank(self, reach: float | None = None):
        """Prunes exactly the budget. `reach`: how far the cut may have moved since last time, if known."""
        for i, ((a, b, budget), phi) in enumerate(zip(self.groups, self.phi, strict=True)):
            near = (phi - reach, phi + reach) if reach and math.isfinite(phi) else None
            mask = self.mask[a:b]
            mask[:], self.phi[i] = keep_mask(self.vector[a:b], budget, near, mask)

    @torch.no_grad()
    def gate(self):
        """Between two refreshes, as released: phi stands still, S > phi decides, the sparsity drifts."""
        for (a, b, _), phi in zip(self.groups, self.phi, strict=True):
            torch.gt(self.vector[a:b], phi, out=self.mask[a:b])


# ---------------------------------------------------------------- losses


def mlm_loss(logits, labels, total=None):  # (M, V), (M,) -> scalar
    """Masked-LM cross-entropy, summed over the scored positions and divided by `total` (default M)."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(total or len(labels), 1)


def cosine(t, s):  # twice (.., D) -> (..)
    """t s / |t| |s|, 0 where one is 0, in half the time of F.cosine_similarity."""
    return (t * s).sum(-1) / ((t * t).sum(-1) * (s * s).sum(-1)).clamp_min(1e-16).sqrt()


def kd_loss(teacher, student, keep=None, total=None):  # twice L + 1 times (B, T, D); (B, T) bool -> scalar
    """Eq. 6: 1 - cos of teacher and student, mean over real tokens (or sum / `total`) and layers 1 .. L,
    without the embedding output. 0 for equal states, 2 for opposite ones."""
    keep = torch.ones_like(teacher[0][..., 0]) if keep is None else keep
    loss = sum(((1 - cosine(t.float(), s.float())) * keep).sum()
               for t, s in zip(teacher[1:], student[1:], strict=True))
    return loss / ((len(teacher) - 1) * (total or keep.sum()))


class Batch:
    """Rows of token ids (B, T) and what masked LM needs: corrupted ids, and which positions to predict."""

    def __init__(self, ids: np.ndarray, vocab: data.Vocabulary, rng: np.random.Generator):
        self.ids = ids.astype(np.int64)
        self.shown, self.chosen = data.corrupt(self.ids, vocab, rng)
        self.real = self.ids != vocab.pad
        self.tokens, self.scored = int(self.real.sum()), int(self.chosen.sum())

    def part(self, rows: slice, device):
        """-> ids, shown (b, T), keep (b, T) or None without padding, positions (M,) in b * T, labels (M,)"""
        ids, at = self.ids[rows], np.flatnonzero(self.chosen[rows])
        keep = None if self.real[rows].all() else self.real[rows]
        arrays = ids, self.shown[rows], keep, at, ids.reshape(-1)[at]
        return [None if x is None else torch.from_numpy(x).to(device, non_blocking=True) for x in arrays]


def batch_loss(model, net, objective: str, part, tokens: int, scored: int):
    """Loss of a part of a batch: its share in the mean over all `tokens` and `scored` positions of the batch.

    net(ids, keep) is the student: the model itself, compiled or data-parallel. In mlm+kd, 1 : 1, teacher and
    student both see the corrupted text; in kd the clean one."""
    ids, shown, keep, at, labels = part
    seen, loss = ids if objective == "kd" else shown, 0.0
    student = net(seen, keep)
    if "mlm" in objective:  # logits at the scored positions alone give the same loss and gradients
        loss = loss + mlm_loss(model.mlm_logits(student[-1].flatten(0, 1)[at]), labels, scored)
    if "kd" in objective:
        with dense_teacher(model):
            teacher = model(seen, keep)
        loss = loss + kd_loss(teacher, student, keep, tokens)
    return loss


@torch.no_grad()
def dev_losses(model: bert.Model, rows: np.ndarray, vocab, device, dtype, batch_size=16) -> dict[str, float]:
    """What a mask is worth on held-out rows, in eval mode, each loss the mean over batches in order:
    dev_mlm_loss on one corruption (seed 42), the same for every model; left out without a masked-LM head;
    dev_kd_loss (Eq. 6) on the clean rows."""
    training, sums, rng = model.training, {}, np.random.default_rng(42)
    model.eval()
    for at in range(0, len(rows), batch_size):
        batch = Batch(rows[at:at + batch_size], vocab, rng)
        part = batch.part(slice(None), device)
        with autocast(device, dtype):
            for name in ("mlm", "kd") if model.has("mlm") else ("kd",):
                loss = float(batch_loss(model, model, name, part, batch.tokens, batch.scored))
                loss = max(loss, 0.0)  # equal states: 1 - cos may round to less
                sums[f"dev_{name}_loss"] = sums.get(f"dev_{name}_loss", 0.0) + loss
    model.train(training)
    return {name: value / -(-len(rows) // batch_size) for name, value in sums.items()}


# ---------------------------------------------------------------- masks as files


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Bits of a mask, row-major, first entry in the highest bit, 1 = kept."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack(bits: torch.Tensor, shape) -> torch.Tensor:
    if bits.dtype != torch.uint8 or bits.shape != (-(-math.prod(shape) // 8),):
        raise ValueError(f"{bits.numel()} bytes of bits for a mask of shape {list(shape)}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape)).view(bool)).view(*shape)


def save_mask(path, masks: dict[str, torch.Tensor], meta: dict):
    """{name: bool tensor} and metadata of plain types, bit-packed; equal content gives equal bytes."""
    write_torch(path, {"format": 1, "shapes": {name: list(m.shape) for name, m in masks.items()},
                       "bits": {name: pack(m) for name, m in masks.items()}, "meta": meta})


def load_mask(path) -> dict[str, torch.Tensor]:
    """{`<module>.weight`: bool tensor, True = kept}, from our mask.pt or a dict of bool or 0/1 tensors as the
    released codes save them, whose names may end in `.weight_mask`. ValueError for anything else."""
    return read_mask(path)[0]


def read_mask(path) -> tuple[dict[str, torch.Tensor], dict]:
    """load_mask, and the metadata; a foreign file has none."""
    content = bert.read_pickle(Path(path))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: no mask file: expected a dict of tensors")
    if "format" in content:
        shapes, bits, meta = (content.get(key) for key in ("shapes", "bits", "meta"))
        if content["format"] != 1 or not all(isinstance(x, dict) for x in (shapes, bits, meta)):
            raise ValueError(f"{path}: no mask file of format 1, the one this version knows")
        for name in {*shapes, *bits}:
            shape, packed = shapes.get(name), bits.get(name)
            if not (isinstance(name, str) and isinstance(shape, list)
                    and all(type(n) is int and 0 < n < 2**31 for n in shape)
                    and isinstance(packed, torch.Tensor) and packed.dtype == torch.uint8
                    and packed.shape == (-(-math.prod(shape) // 8),)):
                raise ValueError(f"{path}: the bits of {name} do not fit its shape {shape}")
        try:
            json.dumps(meta)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"{path}: its metadata are no plain values") from None
        return {name: unpack(bits[name], shape) for name, shape in shapes.items()}, meta
    content = bert.state_dict(content, path)
    for name, mask in content.items():
        if not name.endswith((".weight", ".weight_mask")):
            raise ValueError(f"{path}: {name} is no mask: expected tensors <module>.weight or .weight_mask")
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"{path}: {name} holds values other than 0 and 1")
    return {name.removesuffix("_mask"): mask.bool() for name, mask in content.items()}, {}


def fit_masks(layers: dict[str, nn.Module], masks: dict, source) -> dict[str, torch.Tensor]:
    """The masks in the order of `layers` (maskable, mask_model); a ValueError lists what does not fit.

    Pooler and word embeddings may be absent on either side; absent is dense."""
    def needed(name):
        return "pooler" not in name and "word_embeddings" not in name
    shapes = {name: list(layer.weight.shape) for name, layer in layers.items()}
    problems = {"missing": [name for name in layers if name not in masks and needed(name)],
                "unexpected": [name for name in masks if name not in layers and needed(name)],
                "wrong shape": [f"{name} {list(masks[name].shape)}, not {shapes[name]}" for name in masks
                                if name in shapes and list(masks[name].shape) != shapes[name]]}
    if any(problems.values()):
        raise ValueError(f"{source}: mask of another model: " + "; ".join(
            f"{what}: {some(names)}" for what, names in problems.items() if names))
    return {name: masks[name].to(layer.weight.device) for name, layer in layers.items() if name in masks}


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def set_masks(layers: dict[str, Masked], masks: dict[str, torch.Tensor]):
    for name, layer in layers.items():
        layer.mask = masks[name] if name in masks else torch.ones_like(layer.mask)


def sparsity_report(model: bert.Model, masks: dict[str, torch.Tensor]) -> dict:
    """Fractions removed, in the three ways people count: of the masked set, of the 6L encoder matrices, of
    the model (all parameters of embeddings, encoder and pooler; no heads). And of each matrix."""
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    sizes = {name: mask.numel() for name, mask in masks.items()}
    encoder = [name for name in masks if ".encoder." in name]
    parameters = sum(p.numel() for name, p in model.base.named_parameters() if not name.endswith("scores"))
    return {"pruned": sum(zeros.values()), "entries": sum(sizes.values()),
            "masked_set": sum(zeros.values()) / max(sum(sizes.values()), 1),
            "encoder": sum(zeros[n] for n in encoder) / max(sum(sizes[n] for n in encoder), 1),
            "whole_model": sum(zeros.values()) / parameters,
            "matrices": {name: zeros[name] / sizes[name] for name in masks}}


def similarity(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Jaccard similarity of kept entries, unweighted mean over matrices (released code: compare_mask.py),
    paired by name; 1 for a matrix that keeps nothing in both."""
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        raise ValueError("masks of different models or scopes")
    pairs = [(int((a[name] & b[name]).sum()), int((a[name] | b[name]).sum())) for name in a]
    return sum(both / either if either else 1.0 for both, either in pairs) / len(pairs)


def export(model: bert.Model, masks: dict, vocab, folder: Path, packed: bool):
    """The subnetwork as transformers' AutoModelForMaskedLM loads it, zeros baked in. The decoder stays dense:
    where the embeddings are masked it cannot be tied to them any more and is written by itself.

    packed: the encoder alone, as kept values and mask bits; unpack_export gives the tensors back."""
    family = model.config.model_type
    words = f"{family}.embeddings.word_embeddings.weight"
    head = "lm_head" if family == "roberta" else "cls.predictions"
    tensors = {name: p.data for name, p in model.named_parameters() if not name.endswith(".scores")}
    own = not model.config.tie_word_embeddings  # the checkpoint has a decoder of its own
    untied = model.has("mlm") and not packed and (own or words in masks)
    if untied:
        if not own:
            print("the masked word embeddings differ from the dense decoder: written as two matrices, untied")
        tensors.setdefault(f"{head}.decoder.weight", tensors[words])
        tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"]
    if packed:
        tensors = {name: t for name, t in tensors.items() if name.startswith(family)}
    for name, mask in masks.items():
        W = tensors.pop(name)
        parts = {"kept": W[mask], "bits": pack(mask), "shape": torch.tensor(W.shape)}
        tensors |= {f"{name}.{part}": t for part, t in parts.items()} if packed else {name: W * mask}
    bert.save(folder, model.config, tensors, "ForMaskedLM", tie_word_embeddings=not untied)
    data.save_vocabulary(vocab, folder, model.config.positions)


def unpack_export(path) -> dict[str, torch.Tensor]:
    """The dense tensors, zeros in place, of a model.safetensors that --export --packed wrote."""
    tensors = bert.read_safetensors(Path(path))
    for name in [name.removesuffix(".bits") for name in tensors if name.endswith(".bits")]:
        mask = unpack(tensors.pop(f"{name}.bits"), tensors.pop(f"{name}.shape").tolist())
        tensors[name] = torch.zeros(mask.shape).masked_scatter_(mask, tensors.pop(f"{name}.kept"))
    return tensors


# ---------------------------------------------------------------- training


def adamw(params, device):
    """The paper's optimiser: betas .9 and .999, eps 1e-8, no weight decay; lr is set anew at every step."""
    return torch.optim.AdamW(params, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                             fused=device.type in ("cpu", "cuda"))


def what_learns(model: bert.Model, args) -> dict[str, nn.Parameter]:
    """Freezes all but scores and, for MLM, the head's dense layer, LayerNorm and bias. IMP trains all."""
    for name, p in model.named_parameters():
        head = "mlm" in args.objective and name.startswith(("cls.", "lm_head.")) and "decoder" not in name
        if not name.endswith(".scores"):  # the pooler gets no gradient from a masked-LM loss
            p.requires_grad_(head or args.method == "imp" and "pooler" not in name)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def swap(model: bert.Model, weights: dict[str, torch.Tensor]):
    """Exchanges the model's weights with these: pre-trained ones come for an evaluation and go again."""
    for name in weights:
        p = model.get_parameter(name)
        p.data, weights[name] = weights[name], p.data


def imp_levels(sparsity: float) -> list[float]:
    """10 %, 20 %, ... of the original count; a target that is no multiple of 10 % ends with a smaller one."""
    return [level / 10 for level in range(1, 10) if level / 10 < sparsity - 1e-9] + [sparsity]


def next_level(model, layers, original, done: int, args):
    """A round of IMP: prune the next 10 %, rewind all but the head to the pre-trained weights (without
    --no-rewind), save the mask. The schedule restarts with its full horizon: lr hardly falls in a round."""
    level = imp_levels(args.sparsity)[done // args.prune_every]
    set_masks(layers, magnitude_masks(layers, level, args.rank))
    for name in original if args.rewind else ():
        if name.startswith(model.config.model_type):
            model.get_parameter(name).data.copy_(original[name])
    save_step(layers, done, level, args)


def save_step(layers, done: int, sparsity: float, args):
    if not args.rank_id:
        folder = args.out / f"step-{done}"
        folder.mkdir(exist_ok=True)
        save_mask(folder / "mask.pt", {n: m.mask for n, m in layers.items()}, metadata(args, done, sparsity))


def train(model, vocab, layers, scores, rows, evaluate, args, state):
    """Steps 5 to 7, and the rounds of IMP: the one training loop, from `state` or the start to the end."""
    imp, device, learns = args.method == "imp", args.device, what_learns(model, args)
    original = {name: p.detach().clone() for name, p in learns.items() if not name.endswith(".scores")}
    optimizer, log = adamw(learns.values(), device), Log(args, layers)
    if state:
        with reading(args.out / "state.pt"):
            restore(state, learns, optimizer, scores, layers, log)
    elif imp:
        next_level(model, layers, original, 0, args)
    net = torch.compile(model, options={"fallback_random": True}) if args.compile else model  # same dropout
    if args.world > 1:
        net = nn.parallel.DistributedDataParallel(net)
    size, share, saved = args.batch_size * args.accumulate, args.batch_size // args.world, time.time()
    model.train()
    for step in range(state["step"] if state else 0, args.updates):
        lr = args.lr * max(1 - (step % args.prune_every if imp else step) / args.horizon, 0.0)
        torch.manual_seed((args.seed * 1_000_003 + step) * 1021 + args.rank_id)  # dropout, by (seed, step)
        at = data.batch_rows(len(rows), args.seed, step * size, size)
        batch = Batch(rows[at], vocab, np.random.default_rng([args.seed, step]))
        loss = torch.zeros((), device=device)
        for start in range(args.rank_id * share, size, args.batch_size):
            last = start + args.batch_size >= size  # only then do the gradients of all processes meet
            part = batch.part(slice(start, start + share), device)
            with nullcontext() if last or args.world == 1 else net.no_sync():
                with autocast(device, args.dtype):
                    piece = batch_loss(model, net, args.objective, part, batch.tokens, batch.scored)
                (piece * args.world).backward()  # the processes' gradients are averaged
            loss += piece.detach()
        if args.world > 1:
            torch.distributed.all_reduce(loss)
        norm = nn.utils.clip_grad_norm_(learns.values(), args.clip)
        if not math.isfinite((loss := float(loss)) + float(norm)):
            raise ValueError(f"the loss is {loss}, its gradient's norm {norm:.3g} at step {step + 1}: try a "
                             f"lower --lr (here {lr:.2g}) or --dtype fp32; {args.out} keeps the last state")
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        eval_due, save_due = (done % every == 0 for every in (args.eval_every, args.save_every))
        if imp and done % args.prune_every == 0:
            next_level(model, layers, original, done, args)
            optimizer = adamw(learns.values(), device)
        elif scores and (done % args.refresh_every == 0 or eval_due or save_due or done == args.updates):
            scores.rank(reach=2 * lr if args.refresh_every == 1 else None)
        elif scores:
            scores.gate()
        losses = {}
        if scores and eval_due and done < args.updates and not args.rank_id:
            swap(model, original)
            losses = evaluate()
            swap(model, original)
        log.step(done, loss, lr, losses)
        if scores and save_due:
            save_step(layers, done, args.sparsity, args)
        if save_due or done == args.updates or time.time() - saved > SAVE_SECONDS:
            saved = time.time()
            save_state(learns, optimizer, scores, layers, log, done, args)
    swap(model, original)  # only the mask is the result
    model.eval()


class Log:
    """A progress line per interval on the terminal, and the same figures as a line of log.jsonl."""

    def __init__(self, args, layers):
        self.args, self.layers, self.began = args, layers, time.time()
        self.loss, self.steps, self.bits = 0.0, 0, self.packed()

    def packed(self) -> np.ndarray:
        return np.concatenate([pack(layer.mask).numpy() for layer in self.layers.values()])

    def step(self, done: int, loss: float, lr: float, losses: dict):
        a, self.loss, self.steps = self.args, self.loss + loss, self.steps + 1
        if a.rank_id or not losses and done % a.log_every and done != a.updates:
            return
        seconds, bits = (time.time() - self.began) / self.steps, self.packed()
        entries = sum(layer.mask.numel() for layer in self.layers.values())
        kept, flips = (int(np.bitwise_count(b).sum()) / entries for b in (bits, bits ^ self.bits))
        speed, left = a.batch_size * a.accumulate * a.seq_len / seconds, round(seconds * (a.updates - done))
        mean = self.loss / self.steps
        line = {"step": done, "loss": mean, "kept": kept, "flips": flips, "lr": lr, **losses}
        print(f"step {done}/{a.updates}  loss {mean:.4f}  kept {kept:.4%}  flips {flips:.4%}  lr {lr:.2e}  "
              f"{seconds * 1e3:.0f} ms/step  {speed:,.0f} tokens/s  ETA {left // 60}:{left % 60:02}"
              + "".join(f"  {name} {value:.4f}" for name, value in losses.items()), flush=True)
        times = {"ms_per_step": round(seconds * 1e3, 3), "time": round(time.time(), 1)}
        data.append_line(a.out / "log.jsonl", line | times)
        self.began, self.loss, self.steps, self.bits = time.time(), 0.0, 0, bits


# ---------------------------------------------------------------- the folder of a run

IDENTITY = ("model", "method", "objective", "sparsity", "rank", "scope", "init", "data", "updates", "horizon",
            "seed", "batch_size", "accumulate", "seq_len", "lr", "clip", "refresh_every", "prune_every",
            "rewind", "dtype", "log_every", "eval_every", "save_every")


def identity(args) -> dict:
    """The settings that make a run this run; --resume refuses others."""
    return {name: plain(getattr(args, name)) for name in IDENTITY}


def plain(value):
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def metadata(args, step: int, sparsity: float, **more) -> dict:
    """What a mask file says of itself. No times and no versions: equal runs give equal bytes."""
    names = ("model", "method", "objective", "rank", "scope", "init", "seed", "lr", "data")
    return {name: plain(getattr(args, name)) for name in names} | {
        "step": step, "sparsity": sparsity, "ties": "among equals the lower index is kept",
        "bits": "row-major, first entry in the highest bit, 1 = kept", **more}


def versions() -> dict:
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def write_torch(path, content):
    """torch.save by way of memory, so that the bytes depend on the content alone; whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with data.replacing(path) as part:
        part.write_bytes(buffer.getbuffer())


def write_json(path, content: dict):
    with data.replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def save_state(learns, optimizer, scores, layers, log, done: int, args):
    """state.pt: all that the next step depends on; dropout, corruption and order follow from (seed, step)."""
    if not args.rank_id:
        write_torch(args.out / "state.pt", {
            "format": 1, "settings": identity(args), "step": done, "optimizer": optimizer.state_dict(),
            "learns": {name: p.data for name, p in learns.items()}, "phi": scores.phi if scores else [],
            "masks": [pack(layer.mask) for layer in layers.values()],
            "log": [log.loss, log.steps, torch.from_numpy(log.bits)]})


def restore(state: dict, learns, optimizer, scores, layers, log):
    restore_learning(state["learns"], state["optimizer"], learns, optimizer)
    for bits, layer in zip(state["masks"], layers.values(), strict=True):
        layer.mask.copy_(unpack(bits, layer.mask.shape))
    if scores:
        scores.phi = [float(phi) for phi, _ in zip(state["phi"], scores.groups, strict=True)]
    log.loss, log.steps, log.bits = float(state["log"][0]), int(state["log"][1]), state["log"][2].numpy()


def restore_learning(weights: dict, moments: dict, learns: dict[str, nn.Parameter], optimizer):
    """Weights and AdamW moments of a state, held against the shapes of this model: AdamW would not look."""
    optimizer.load_state_dict(moments)
    pairs = [(weights[name], p) for name, p in learns.items()]
    pairs += [(m[key], p) for p, m in optimizer.state.items() for key in ("exp_avg", "exp_avg_sq")]
    for saved, p in pairs:
        if saved.shape != p.shape or saved.dtype != p.dtype:
            raise ValueError(f"{saved.dtype} {list(saved.shape)} for {p.dtype} {list(p.shape)}")
    with torch.no_grad():
        for name, p in learns.items():
            p.copy_(weights[name])


@contextmanager
def reading(path):
    """Around the use of a saved state: whatever does not fit is one clear error."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: no state of this run ({error}); remove it to start anew") from None


class Finished(SystemExit):
    """--resume of a run that has nothing left to do: exit status 0."""


def check_run(out: Path, asked: dict, resume: bool, result: str) -> dict | None:
    """The state that `out` holds, if any. Another run there is an error, and so is an unfinished one without
    --resume. A run is finished when the file `result` is there; --resume has nothing left to do: exit 0."""
    finished, saved = out / result, out / "state.pt"
    state = bert.read_pickle(saved) if saved.exists() else None
    if state is not None and not (isinstance(state, dict) and state.get("format") == 1 and
                                  isinstance(state.get("settings"), dict) and type(state.get("step")) is int):
        raise ValueError(f"{saved}: no state of this version; remove it to start anew")
    held = asked
    if state or finished.exists():
        held = state["settings"] if state else bert.read_json(finished).get("settings")
    if not isinstance(held, dict):
        raise ValueError(f"{finished} is no file of this program: choose another --out, or move it away")
    if held != asked:
        differ = [key for key in asked if held.get(key) != asked[key]]
        other = ", ".join(f"{key} {held.get(key)!r} there, {asked[key]!r} here" for key in differ)
        raise ValueError(f"{out} holds another run ({other}): choose another --out or remove that folder")
    if not (state or finished.exists()) and (out / "mask.pt").exists():
        meta = read_mask(out / "mask.pt")[1]
        if not meta or any(meta[key] != asked[key] for key in meta.keys() & asked):
            raise ValueError(f"{out} holds another mask.pt: choose another --out, or move it away")
    if finished.exists() and resume:
        print(f"{out} is finished: its figures are in {finished}")
        raise Finished(0)
    if state and not resume and not finished.exists():
        raise ValueError(f"{out} holds this run, unfinished at step {state['step']}: continue with --resume, "
                         "or choose another --out, or remove that folder")
    return state


def open_run(out: Path, asked: dict, resume: bool, result: str, rank_id: int) -> dict | None:
    """The state to continue from, or None to start: then what an earlier run left in `out` is removed."""
    state, log = check_run(out, asked, resume, result), out / "log.jsonl"
    if rank_id:
        return state if resume else None
    out.mkdir(parents=True, exist_ok=True)
    for part in out.rglob(data.PARTS):  # what a killed run was writing
        part.unlink(missing_ok=True)
    if not resume or not state:
        for old in (out / result, out / "state.pt", log):
            old.unlink(missing_ok=True)
        return None
    print(f"resuming {out} at step {state['step']}")
    if log.exists():
        try:
            lines = log.read_text().split("\n")[:-1]
            lines = [line for line in lines if json.loads(line)["step"] <= state["step"]]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{log}: damaged ({error}); remove it, the run can do without") from None
        with data.replacing(log) as part:  # what was logged after the last save will be logged again
            part.write_text("".join(f"{line}\n" for line in lines))
    return state


def finish(model, layers, vocab, losses: dict, began: float, args):
    """Step 8: mask.pt, its readable twin mask.json, and the model for transformers if it was asked for."""
    masks = {name: layer.mask for name, layer in layers.items()}
    report = sparsity_report(model, masks)
    if empty := [name for name, share in report["matrices"].items() if share == 1]:
        print(f"{len(empty)} of {len(masks)} matrices keep nothing: {some(empty)}")
    found = {name: report[name] for name in ("masked_set", "encoder", "whole_model")}
    save_mask(args.out / "mask.pt", masks, metadata(args, args.updates, args.sparsity, found=found, **losses))
    content = {"settings": identity(args), "sparsity": report, **losses,
               "seconds": round(time.time() - began, 1), "device": str(args.device),
               "threads": torch.get_num_threads(), "versions": versions()}
    if args.export:
        export(model, masks, vocab, args.export, args.packed)
    write_json(args.out / "mask.json", content)
    ending(args.out / "mask.pt", content)


def ending(mask, content: dict):
    """The block that grep reads, and what to do next."""
    print("---")
    if mask:
        print(f"mask: {mask}")
    print(f"sparsity: {content['sparsity']['masked_set']:.4f}")
    for name in ("dev_mlm_loss", "dev_kd_loss", "seconds"):
        if name in content:
            print(f"{name}: {content[name]:.4f}")
    print(f"next: python finetune.py --task sst2 --mask {mask}" if mask else "next: python tamt.py")


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def positive(kind):
    def number(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < (2**31 if kind is int else math.inf):
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no positive {what}")
        return value
    return number


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no fraction in [0, 1); 0.7 removes 70 %")
    return value


# In place of the paper's defaults: a run on the toy takes a minute on two cores.
TOY = {"data": "toy", "steps": 300, "seq_len": 64, "prune_every": 50, "log_every": 50, "eval_every": 100,
       "save_every": 100}


def settings(argv=None) -> argparse.Namespace:
    """The command line with every default resolved."""
    parser = Parser(description="Find a sparse subnetwork of a pre-trained BERT, by default with TAMT.")
    add, whole, number = parser.add_argument, positive(int), positive(float)
    add("--model", default="toy", help=f"{', '.join(data.MODELS)}, toy (default), or a path: a folder, "
        ".safetensors, .bin, .pt, a TensorFlow prefix, .zip, .tar.gz")
    add("--method", choices=["tamt", "imp", "omp", "random"], default="tamt", help="how masks are found")
    add("--objective", choices=["mlm", "kd", "mlm+kd"], default="mlm", help="loss of tamt (mlm)")
    add("--sparsity", type=fraction, default=0.7, help="fraction of weights REMOVED, in [0, 1) (0.7)")
    add("--rank", choices=["global", "local"], help="entries compete in one list, or inside each matrix "
        "(global for tamt, local for omp, imp and random)")
    add("--scope", choices=["all", "encoder"], default="all", help="encoder: embeddings stay dense (all)")
    add("--init", choices=["omp", "random"], default="omp", help="start of the scores (omp)")
    add("--data", help="wikitext-103 (default), wikitext-2, toy, a text file, or a folder with "
        "wiki.train.raw and wiki.valid.raw")
    add("--steps", type=whole, help="updates of tamt; horizon of imp's schedule (the paper's)")
    add("--batch-size", type=whole, default=16, help="sequences per forward pass, over all processes (16)")
    add("--accumulate", type=whole, default=1, help="forward passes per update (1)")
    add("--seq-len", type=whole, help="tokens per row, specials included (512, or all positions)")
    add("--lr", type=number, help="learning rate (5e-5, kd 2e-5; raised when --steps shortens the run)")
    add("--clip", type=number, default=1.0, help="largest l2 norm of all gradients together (1.0)")
    add("--seed", type=int, default=1, help="of data order, corruption, dropout and random masks (1)")
    add("--refresh-every", type=whole, default=1, help="updates between rankings; 1 keeps s exact (1)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute (auto)")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of the forward pass (auto)")
    add("--compile", action="store_true", help="run the student through torch.compile")
    add("--out", type=Path, help="folder of the run (out/MODEL-METHOD-OBJECTIVE-SPARSITY-sSEED)")
    add("--log-every", type=whole, default=100, help="updates between progress lines (100)")
    add("--eval-every", type=whole, default=1000, help="updates between dev evaluations (1000)")
    add("--save-every", type=whole, default=1000, help="updates between saved masks and states (1000)")
    add("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    add("--prune-every", type=whole, default=2792, help="imp: updates between two prunings (2792)")
    add("--no-rewind", dest="rewind", action="store_false", help="imp: keep the trained weights, as released")
    add("--evaluate", action="store_true", help="only report on --mask, or on the dense model; no training")
    add("--mask", type=Path, help="mask file for --evaluate and --export")
    add("--compare", nargs="+", metavar="MASK", help="only print the mean Jaccard similarities of masks")
    add("--export", type=Path, metavar="DIR", help="write the subnetwork as a folder that transformers loads")
    add("--packed", action="store_true", help="with --export: the encoder as kept values and mask bits")
    if parser.parse_known_args(argv)[0].model == "toy":
        parser.set_defaults(**TOY)
    args = parser.parse_args(argv)
    if args.mask and not (args.evaluate or args.export):
        raise ValueError("--mask goes with --evaluate or --export")
    if args.packed and not args.export:
        raise ValueError("--packed goes with --export")
    if args.export and args.export.exists() and not args.export.is_dir():
        raise ValueError(f"--export {args.export}: a file stands there; expected a folder, new or old")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed {args.seed} is not in 0 .. {2**31 - 1}")
    args.rank = args.rank or ("global" if args.method == "tamt" else "local")
    if not args.data and (args.method in ("tamt", "imp") or args.evaluate):
        args.data = "wikitext-103"
    args.lr, args.horizon, args.updates, args.lr_reason = schedule(args)
    args.rank_id, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= args.rank_id < args.world:
        raise ValueError(f"RANK={args.rank_id}, WORLD_SIZE={args.world} in the environment: not torchrun's")
    if args.batch_size % args.world:
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared evenly by {args.world} processes")
    if args.model not in data.MODELS and args.model != "toy":
        args.model = str(Path(args.model).resolve())
    refuse_own_folder(args.model, args.export)
    name = f"{Path(args.model).name}-{args.method}-{args.objective}-{args.sparsity:g}-s{args.seed}"
    args.out = args.out or Path("out") / name
    return args


def refuse_own_folder(model: str, folder: Path | None):
    """An export must not replace the original checkpoint."""
    if folder and folder.resolve() in (Path(model), Path(model).parent):
        raise ValueError(f"--export {folder} is the folder of the model itself: choose another")


def schedule(args) -> tuple[float, int, int, str]:
    """-> lr, horizon of its linear decay, number of updates, and where the lr comes from.

    Adam moves a score by at most lr per step, and a gate flips after about phi = 0.01: 600 steps at the
    paper's 2e-5 flip nothing. So --steps without --lr keeps the paper's lr x steps, up to lr = 0.01."""
    reason = "as asked" if args.lr else "the paper's"
    if args.method in ("omp", "random"):
        return 0.0, 0, 0, reason
    if args.method == "imp":
        updates = args.prune_every * (len(imp_levels(args.sparsity)) - 1)
        return args.lr or 5e-5, args.steps or 10 * args.prune_every, updates, reason
    paper, lr = round(np.interp(args.sparsity, [*STEPS], [*STEPS.values()])), 5e-5
    lr, horizon, updates = 2e-5 if args.objective == "kd" else lr, args.steps or HORIZON, args.steps or paper
    if args.lr or not args.steps:
        return args.lr or lr, horizon, updates, reason
    reason = f"the paper's {lr:g} x its {paper:,} steps / {updates:,}, at most 0.01: scores travel as far"
    return min(lr * paper / updates, 1e-2), horizon, updates, reason


def pick_device(args):
    """Resolves args.device and args.dtype, says why, and joins the other processes of a torchrun."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = args.device if args.device != "auto" else "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and not cuda or name == "mps" and not mps:
        raise ValueError(f"--device {name}: torch {torch.__version__} finds none; --device cpu always works")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
    half = args.dtype == "bf16" or args.dtype == "auto" and "cuda" in name and torch.cuda.is_bf16_supported()
    why = "as asked" if args.dtype != "auto" else "this GPU has it; scores stay fp32" if half else "exact"
    args.device, args.dtype = torch.device(name), torch.bfloat16 if half else torch.float32
    if args.world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if "cuda" in name else "gloo")
    if args.rank_id:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    print(f"device {name}, {torch.get_num_threads()} threads, {args.world} process(es), "
          f"{'bf16' if half else 'fp32'} forward pass ({why}), torch {torch.__version__}")


@contextmanager
def first_process_first(args):
    """One process downloads, makes the toy and caches token blocks; the others wait until all is there."""
    if args.rank_id:
        torch.distributed.barrier()
    try:
        yield
    finally:  # after an error, too: the others will meet the same one
        if args.world > 1 and not args.rank_id:
            torch.distributed.barrier()


def autocast(device, dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def toy_folder(part: str) -> Path:
    """The embedded example: made at its first use, from then on files like any others."""
    folder = data.cache() / "toy"
    if not (folder / "model" / "config.json").exists():
        from dev import toy
        toy.make(folder)
    return folder / part


def load_model(name: str) -> tuple[bert.Model, data.Vocabulary]:
    """A model and its vocabulary, by name or path."""
    path = toy_folder("model") if name == "toy" else data.model_path(name)
    model, vocab = bert.load(path), data.vocabulary(path)
    if vocab.size != model.config.vocab_size:
        raise ValueError(f"{path}: vocabulary of {vocab.size} tokens, model of {model.config.vocab_size}")
    return model, vocab


def open_model(args) -> tuple[bert.Model, data.Vocabulary]:
    """Step 1: the checkpoint, frozen. Its masked-LM head is new only where training needs one."""
    model, vocab = load_model(args.model)
    trains_head = args.method == "imp" or args.method == "tamt" and "mlm" in args.objective
    if trains_head and not model.has("mlm") and not (args.evaluate or args.mask):
        print(f"{args.model} has no masked-LM head: a fresh one trains along, dev_mlm_loss uses its start")
        torch.manual_seed(args.seed)
        model.new_head("mlm")
    most = model.config.positions
    args.seq_len = args.seq_len or min(512, most)
    if not 3 <= args.seq_len <= most:
        raise ValueError(f"--seq-len {args.seq_len}: {args.model} takes 3 to {most} tokens")
    return model.to(args.device).requires_grad_(False), vocab


def open_text(args, vocab, part: str) -> np.ndarray:
    """Step 2: rows of token ids (n, T), of "train" or "dev"."""
    return data.corpus(toy_folder("text") if args.data == "toy" else args.data, vocab, args.seq_len, part)


def start_masks(layers, args) -> dict[str, torch.Tensor]:
    """Step 3: the OMP or the random mask; as the start of scores inside each matrix, as in the paper."""
    rule = "local" if args.method == "tamt" else args.rank
    if args.method == "random" or args.method == "tamt" and args.init == "random":
        return random_masks(layers, args.sparsity, rule, args.seed)
    return magnitude_masks(layers, args.sparsity, rule)


def judge(args):
    """--evaluate and --export of a finished mask, or of the dense model."""
    began, (model, vocab), masks, meta = time.time(), open_model(args), {}, {}
    layers = mask_model(model)
    if args.mask:
        masks, meta = read_mask(args.mask)
        masks = fit_masks(layers, masks, args.mask)
        set_masks(layers, masks)
    content = {"sparsity": sparsity_report(model, masks)}
    print(json.dumps({"metadata": meta, **content}, indent=1))
    if args.evaluate:
        content |= dev_losses(model, open_text(args, vocab, "dev"), vocab, args.device, args.dtype)
    if args.export:
        export(model, masks, vocab, args.export, args.packed)
    ending(args.mask, content | {"seconds": time.time() - began})


def compare(files: list[str]):
    """Mean Jaccard similarity of each mask with every other, and its distance (1 - that) from the first."""
    masks = [load_mask(file) for file in files]
    for file, a in zip(files, masks, strict=True):
        try:
            row = [similarity(a, b) for b in masks]
        except ValueError as error:
            raise ValueError(f"{file} cannot be compared with all of the others: {error}") from None
        print("  ".join(f"{value:.4f}" for value in row) + f"  distance {1 - row[0]:.4f}  {file}")


def run(main):
    """Calls a program. What its user can mend becomes one line and exit status 2; Ctrl-C is 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last saved state", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        memory = isinstance(error, torch.OutOfMemoryError)
        advice = "out of memory, try a smaller --batch-size (tamt.py: and --accumulate): " if memory else ""
        told = isinstance(error, OSError) and error.filename and error.strerror  # without [Errno 2]
        text = f"{error.filename}: {error.strerror}" if told else str(error)
        print(f"error: {advice}{' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    args = settings(argv)
    if args.compare:
        return compare(args.compare)
    pick_device(args)
    if args.evaluate or args.mask:
        return judge(args)
    began, trains = time.time(), args.method in ("tamt", "imp")
    with first_process_first(args):
        model, vocab = open_model(args)                                                     # step 1
        check_run(args.out, identity(args), args.resume, "mask.json")
        rows = open_text(args, vocab, "train") if trains else None                          # step 2
        dev = open_text(args, vocab, "dev") if args.data else None
        state = open_run(args.out, identity(args), args.resume, "mask.json", args.rank_id)
    layers, scores = mask_model(model, args.scope), None
    if args.method != "imp":
        masks = start_masks(layers, args)                                                   # step 3
        set_masks(layers, masks)
    if args.method == "tamt":
        scores = Scores(layers, masks, args.sparsity, args.rank)                            # step 4

    def evaluate():
        return dev_losses(model, dev, vocab, args.device, args.dtype) if args.data else {}
    if trains:
        print(f"{len(rows):,} rows of {args.seq_len} tokens, {args.updates:,} updates, lr {args.lr:.3g} "
              f"({args.lr_reason})")
        train(model, vocab, layers, scores, rows, evaluate, args, state)                    # steps 5, 6, 7
    if args.rank_id:
        return
    finish(model, layers, vocab, evaluate(), began, args)                                   # step 8


if __name__ == "__main__":
    run(main)
