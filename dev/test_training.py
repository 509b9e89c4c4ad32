"""Mask training, step by step: the released optimizers, and all of find_mask() against the same thing written down
plainly, for every objective and every way to rank."""

import math

import pytest
import torch
import torch.nn.functional as F

import bert
import tamt
from helpers import assert_masks_differ, begin, expected_pins, masks_of, read_log
from test_tamt import mask_settings, masks_after_each_update, same_masks


class ReleasedAdamW:
    """The AdamW of transformers 2.10 without decay, in plain torch operations. step() changes x in place."""

    def __init__(self):
        self.m = 0.0
        self.v = 0.0
        self.t = 0

    def step(self, x, gradient, learning_rate):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        rate = learning_rate * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        x -= rate * self.m / (self.v.sqrt() + 1e-8)


class ReleasedBertAdam:
    """The optimizer of TinyBERT's code: no bias correction, and decay along with the step. step() changes x in
    place."""

    def __init__(self):
        self.m = 0.0
        self.v = 0.0

    def step(self, x, gradient, learning_rate):
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        x -= learning_rate * (self.m / (self.v.sqrt() + 1e-6) + 0.01 * x)


RELEASED_OPTIMIZERS = {"mlm": ReleasedAdamW, "kd": ReleasedBertAdam, "mlm+kd": ReleasedAdamW}


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("objective", ["mlm", "kd"])
def test_the_optimizer_takes_the_steps_of_the_released_one(objective, dtype, tolerance):
    """That is AdamW for mlm, and BertAdam for kd. Gradients of all sizes down to 1e-9, where the eps decides."""
    start = torch.randn(200, dtype=dtype)
    expected = start.clone()
    parameter = torch.nn.Parameter(start.clone())
    optimizer = tamt.make_optimizer([parameter], torch.device("cpu"))
    released = RELEASED_OPTIMIZERS[objective]()
    sizes = 10.0 ** torch.linspace(-9, 1, 200, dtype=dtype)
    for t in range(1, 31):
        learning_rate = 1e-2 * (1 - t / 40)
        parameter.grad = torch.randn(200, dtype=dtype) * sizes
        released.step(expected, parameter.grad, learning_rate)
        optimizer.param_groups[0].update(tamt.optimizer_settings(objective, learning_rate, t))
        optimizer.step()
    assert (expected - start).abs().median() > 1e-3  # they have moved, so that equality means something
    torch.testing.assert_close(parameter.detach(), expected, atol=tolerance, rtol=tolerance)


def keep_largest(scores, num_kept):
    """(..., n) -> bool of the same shape: the largest of each row, and of equal ones the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, order[..., :num_kept], True)


class PlainLoop:
    """Mask training as one would write it down: run the network with W * M, let autograd differentiate the loss with
    respect to real-valued masks M, clip, step the scores by the released optimizers as written out above, and keep the
    largest. It shares the network, the start mask and the batches with tamt, and nothing else."""

    def __init__(self, model, objective, rank, sparsity, clip, masks, pinned):
        self.model = model
        self.clip = clip
        self.objective = objective
        self.rank = rank
        self.sparsity = sparsity
        self.norms = []  # of the gradients, before clipping
        self.pretrained = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.masks = dict(masks)  # {name: bool matrix}
        self.scores = {name: 0.02 * mask for name, mask in masks.items()}  # Eq. 5
        # Added to the scores before they are ranked: pinned entries come first or last, as in the start mask.
        self.pins = {name: torch.zeros(mask.shape) for name, mask in masks.items()}
        for name, is_pinned in pinned.items():
            start = torch.where(masks[name], math.inf, -math.inf)
            self.pins[name][is_pinned] = start[is_pinned]
        self.head = []  # trains along with the scores for masked LM
        for name, parameter in model.named_parameters():
            trains = objective != "kd" and name.startswith("cls.")
            parameter.requires_grad_(trains)
            if trains:
                self.head.append(parameter)
        self.optimizers = {}

    def update(self, batch, learning_rate) -> float:
        """One update under the current masks -> its loss. Afterwards self.masks are those of the next update."""
        real_masks = {name: mask.float().requires_grad_() for name, mask in self.masks.items()}
        products = {name: self.pretrained[name] * mask for name, mask in real_masks.items()}
        loss = self.loss(products, batch)
        loss.backward()

        trained = [(self.scores[name], mask.grad) for name, mask in real_masks.items() if mask.grad is not None]
        trained += [(parameter.data, parameter.grad) for parameter in self.head]
        norm = math.sqrt(sum(float(gradient.square().sum()) for _, gradient in trained))
        self.norms.append(norm)
        for number, (values, gradient) in enumerate(trained):
            optimizer = self.optimizers.setdefault(number, RELEASED_OPTIMIZERS[self.objective]())
            optimizer.step(values, gradient * min(self.clip / (norm + 1e-6), 1.0), learning_rate)
        for parameter in self.head:
            parameter.grad = None
        self.rank_scores()
        return loss.item()

    def loss(self, products, batch):
        input_ids = torch.from_numpy(batch.input_ids if self.objective == "kd" else batch.corrupted_ids)
        states = torch.func.functional_call(self.model, products, input_ids)
        loss = 0.0
        if "mlm" in self.objective:
            is_predicted = torch.from_numpy(batch.is_predicted)
            targets = torch.from_numpy(batch.input_ids)[is_predicted]
            loss = F.cross_entropy(self.model.mlm_logits(states[-1])[is_predicted], targets)
        if "kd" in self.objective:
            with torch.no_grad():
                teacher_states = self.model(input_ids)
            cosines = [F.cosine_similarity(teacher, student, dim=-1).mean()
                       for teacher, student in zip(teacher_states[1:], states[1:], strict=True)]  # without embeddings
            loss = loss + 1 - sum(cosines) / len(cosines)
        return loss

    def rank_scores(self):
        if self.rank == "global":
            vector = torch.cat([(self.scores[name] + self.pins[name]).flatten() for name in self.masks])
            kept = keep_largest(vector, len(vector) - round(len(vector) * self.sparsity))
            pieces = kept.split([mask.numel() for mask in self.masks.values()])
            for (name, mask), piece in zip(list(self.masks.items()), pieces, strict=True):
                self.masks[name] = piece.view(mask.shape)
        elif self.rank == "local":  # without pins: the pooler gets no gradients, so it keeps its scores and its mask
            for name, scores in self.scores.items():
                kept = keep_largest(scores.flatten(), scores.numel() - round(scores.numel() * self.sparsity))
                self.masks[name] = kept.view(scores.shape)
        else:  # "2:4"
            for name, scores in self.scores.items():
                self.masks[name] = keep_largest(scores.view(-1, 4), 2).view(scores.shape)


@pytest.mark.parametrize("rank, sparsity", [("global", 0.7), ("local", 0.7), ("2:4", 0.5)])
@pytest.mark.parametrize("objective, clip", [("mlm", 1.0), ("kd", 0.01), ("mlm+kd", 1.0)])  # kd's gradients are small
def test_thirty_updates_give_the_losses_and_masks_of_a_plain_loop(
        inputs, tmp_path, monkeypatch, objective, clip, rank, sparsity):
    """All of find_mask, its schedule and its shortcuts included, against PlainLoop. Every update ranks anew (what else
    --refresh-every does is in test_schedules.py)."""
    settings = mask_settings(inputs, tmp_path, "no-dropout", objective=objective, rank=rank, sparsity=sparsity,
                             refresh_every=1, steps=30, lr=3e-3, log_every=1, clip=clip)
    masks = masks_after_each_update(settings)
    losses = [line["loss"] for line in read_log(tmp_path)]

    training = begin(settings)  # for the start mask and the batches
    start = masks_of(training.masked_layers)
    model = bert.load(inputs / "no-dropout").train()
    plain = PlainLoop(model, objective, rank, sparsity, clip, masks=start, pinned=expected_pins(training))
    for step in range(30):
        loss = plain.update(tamt.next_batch(training), learning_rate=3e-3 * (1 - step / 30))
        training.updates_done += 1
        assert losses[step] == pytest.approx(loss, abs=2e-6)
        assert same_masks(masks[step], plain.masks), f"after update {step + 1}"
    assert_masks_differ(start, plain.masks)
    assert min(plain.norms) < clip < max(plain.norms)  # some gradients were clipped, and some were not
