"""Does the CUDA path work, and how fast is it? One command, at most five minutes on one H100 or H200:

    python dev/gpu.py                          # prints a table and writes gpu.json
    python dev/gpu.py --device cpu --small     # every part in miniature, under a minute: shows that it runs

It needs this repository, and the packages torch (2.11 or later), numpy, tokenizers, requests. With pytest and
pytest-xdist it runs part a, with transformers the comparison with dense fine-tuning in part c. Nothing is
downloaded: weights and tokens are random, which is right for cost and says nothing about learning. No CUDA
figure of this project has been measured yet.

    a  tests        the tests marked cuda
    b  agreement    CPU against CUDA: loss, gradient, mask after 20 updates, loss in bf16; resume bit for bit
    c  steps        BERT-base, 16 x 512 tokens, bf16: time, tokens, share of the card's peak, memory, beside the
                    released step re-created and dense fine-tuning by transformers
    d  ranking      what the exact ranking costs for each update, and where an update waits for the GPU
    e  two_four     dense weights against 2:4 weights in the sparse tensor cores
    f  full_run     the minutes of a full run at 70 %, 17,000 updates, from what was measured
    g  processes    two processes on one card give the mask of one

The share of the peak counts the matrix products of the model, nothing else (no masks, no optimizer). One product
of (a, b) with (b, c) is 2 a b c operations; the backward pass computes two for each of the forward pass.
P = L (4 D^2 + 2 D I) weights in the encoder's matrices, I = 4 D; N = B T tokens; n = 0.15 N predictions:

    student           6 P N + 12 L B T^2 D         forward, gradient to the input, gradient to the weight;
                                                   two products in attention
    masked-LM head    4 n V D                      forward and gradient to the input: the decoder is frozen
    teacher (kd)      2 P N +  4 L B T^2 D         forward only

BERT-base with 16 x 512 tokens: 4.75e12 operations for mlm, 6.19e12 for kd, 6.30e12 for mlm+kd.

Letters: B sequences, T tokens, D hidden size, L layers, H heads, V vocabulary.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import io
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import bert  # noqa: E402
import data  # noqa: E402
import tamt  # noqa: E402

# Dense bf16 operations in a second, from the data sheets. The first name that the card's name contains counts.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
LEARNING_RATE = 5e-5
FULL_RUN = 17_000  # updates of the paper's run at 70 %
DEV_ROWS = 490  # rows of 512 tokens in WikiText-103's dev part

# ---------------------------------------------------------------------------------------------------
# 1. Rows of the table, and what all parts share
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    L: int
    D: int
    H: int
    B: int
    T: int
    V: int
    dropout: float = 0.1

    def config(self) -> dict:
        """The sizes under the names that bert.Config and transformers share."""
        return {
            "vocab_size": self.V,
            "hidden_size": self.D,
            "num_hidden_layers": self.L,
            "num_attention_heads": self.H,
            "intermediate_size": 4 * self.D,
            "max_position_embeddings": self.T,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
        }


BERT_BASE = Size(L=12, D=768, H=12, B=16, T=512, V=30522)
SMALL = Size(L=1, D=32, H=2, B=4, T=32, V=300, dropout=0.0)
TOY = Size(L=2, D=32, H=2, B=8, T=32, V=300, dropout=0.0)  # of part b; dropout differs between devices


@dataclass
class Bench:
    """What has been measured so far. small: every part in miniature."""
    device: str
    small: bool
    seconds: float  # no new measurement begins after so many
    json_file: Path
    began: float = field(default_factory=time.time)
    rows: list[dict] = field(default_factory=list)
    step_seconds: dict = field(default_factory=dict)  # of part c: {(objective, is compiled): seconds}
    failed: bool = False

    @property
    def size(self) -> Size:
        return SMALL if self.small else BERT_BASE

    @property
    def dtype(self) -> str:
        return "fp32" if self.small else "bf16"

    @property
    def num_calls(self) -> int:
        return 2 if self.small else 20

    @property
    def is_out_of_time(self) -> bool:
        return time.time() - self.began > self.seconds

    def machine(self, dtype: str | None = None) -> tamt.Machine:
        with quiet():
            return tamt.start_machine(self.device, dtype or self.dtype)

    def add(self, part: str, name: str, value, unit: str = "", goal: str = ""):
        """A row of the table. goal, such as "<= 5": judged at full size on an H100 or H200 alone, or with
        "must" in front of it anywhere."""
        verdict = ""
        must = goal.startswith("must ")
        goal = goal.removeprefix("must ")
        is_goal_card = not self.small and card_name(self.device).startswith(("NVIDIA H100", "NVIDIA H200"))
        if goal and (must or is_goal_card):
            sign, bound = goal.split()
            is_met = value <= float(bound) if sign == "<=" else value >= float(bound)
            verdict = "met" if is_met else "MISSED"
            self.failed |= must and not is_met
        self.rows.append({"part": part, "name": name, "value": value, "unit": unit, "goal": goal, "verdict": verdict})
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{part}  {name:58} {shown:>12} {unit:10} {goal:9} {verdict}", flush=True)
        self.write()

    def write(self):
        """After every row, so that a run that is cut off leaves what it has measured."""
        content = {
            "card": card_name(self.device),
            "small": self.small,
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "cuda": torch.version.cuda,
            "versions": tamt.versions(),
            "seconds": round(time.time() - self.began, 1),
            "rows": self.rows,
        }
        tamt.write_json(self.json_file, content)


def card_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def peak_of(device: str) -> float | None:
    for name, peak in PEAKS.items():
        if name in card_name(device):
            return peak
    return None


def quiet():
    """Within, what tamt.py prints does not get between the rows of the table."""
    return contextlib.redirect_stdout(io.StringIO())


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(call, device: str, num_calls: int, num_warm_up: int = 3) -> float:
    """Seconds of one call, each waited for."""
    seconds = []
    for number in range(-num_warm_up, num_calls):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        if number >= 0:
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def free_memory(device: str):
    """Nothing of the last variant is left, and the peak counts from here on."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_training(size: Size, objective: str, machine, rank: str = "global", compiled: bool = False) -> tamt.Training:
    """tamt.py's own Training, as find_mask() makes it, on random weights and random rows of tokens."""
    torch.manual_seed(0)
    model = bert.Model(bert.Config(**size.config())).requires_grad_(False).to(machine.device)
    vocabulary = data.Vocabulary(None, size.V, 0, 1, 2, 3, 4)
    rows = np.random.default_rng(0).integers(5, size.V, (64, size.T))

    settings = tamt.Settings(model="random", objective=objective, rank=rank, batch_size=size.B, lr=LEARNING_RATE,
                             compile=compiled)
    run = tamt.fill_in_defaults(settings, machine, model)
    layers = tamt.install_masked_layers(model, run.scope)
    inputs = tamt.Inputs(run, {}, model, vocabulary, rows, dev_rows=None)
    scores = tamt.Scores(layers, tamt.first_masks(layers, run), run.sparsity, run.rank)
    if run.rank == "global":
        tamt.pin_unlearnable_scores(scores, inputs)
        tamt.make_start_exact(scores)
    spread(scores)
    training = tamt.Training(inputs, layers, scores)
    model.train()
    return training


def spread(scores: tamt.Scores):
    """Gives scores the values that they have after some training, around 0 and around START_SCORE. The two values of
    the start are cheaper to rank. Pinned scores stay."""
    for layer in scores.masked_layers.values():
        noise = 0.005 * torch.randn(layer.scores.shape).to(layer.scores.device)
        spread_scores = tamt.START_SCORE * layer.mask + noise
        layer.scores.data.copy_(torch.where(tamt.is_pinned(layer.scores), layer.scores, spread_scores))
    scores.renew_masks()


def one_update(training: tamt.Training, learning_rate: float, update_number: int) -> float:
    loss = tamt.backpropagate(training, tamt.next_batch(training))
    loss_value = tamt.clip_and_check(training, loss, training.run.clip)
    tamt.optimizer_step(training, learning_rate, update_number)
    return loss_value


def one_step(training: tamt.Training, learning_rate: float = LEARNING_RATE) -> float:
    """What train_scores() does for each update -> the loss."""
    loss = one_update(training, learning_rate, training.updates_done + 1)
    training.updates_done += 1
    training.scores.renew_masks()
    return loss


def make_world(folder: Path, dropout: float):
    """A model folder and a text, for what needs files: 2 layers, 32 wide, a vocabulary of whole words."""
    words = "the a cat dog bird house tree sees likes finds big small red old new good bad runs sits here".split()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]
    sizes = Size(L=2, D=32, H=4, B=8, T=64, V=len(vocabulary), dropout=dropout)
    torch.manual_seed(0)
    model = bert.Model(bert.Config(**sizes.config()))
    bert.save(folder / "model", model.config, dict(model.named_parameters()), "ForMaskedLM")
    (folder / "model" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")

    generator = random.Random(0)
    lines = [" ".join(generator.sample(words, 8)) + " ." for _ in range(800)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")


def world_settings(folder: Path, device: str, dtype: str = "fp32", **more) -> tamt.Settings:
    return tamt.Settings(model=str(folder / "model"), data=str(folder / "text.txt"), objective="mlm+kd", steps=20,
                         seq_len=32, batch_size=8, lr=2e-3, save_every=5, eval_every=10, log_every=5, device=device,
                         dtype=dtype, **more)


# ---------------------------------------------------------------------------------------------------
# 2. The parts, the most important first
# ---------------------------------------------------------------------------------------------------


def part_tests(bench: Bench):
    """a: the tests marked cuda. Without CUDA they are skipped."""
    if importlib.util.find_spec("pytest") is None:
        bench.add("a", "tests marked cuda", "no pytest")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "dev/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last_line = done.stdout.strip().split("\n")[-1]
    bench.add("a", f"tests marked cuda: {last_line.strip('= ')}", done.returncode, "exit", "must <= 0")
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-1000:])


def part_agreement(bench: Bench):
    """b: the same run on the CPU and on the device."""
    if bench.device == "cuda":
        is_on = float(torch.are_deterministic_algorithms_enabled())
        bench.add("b", "deterministic algorithms are on", is_on, "", "must >= 1")
    for objective in ("mlm+kd", "kd"):  # kd has weight decay, and words that it never reads
        differences = compare_with_cpu(bench.device, objective)
        fp32 = f"{objective}, fp32"
        bench.add("b", f"{fp32}: loss against the CPU, relative", differences["loss"], "", "must <= 1e-5")
        bench.add("b", f"{fp32}: gradient, worst matrix, relative", differences["gradient"], "", "must <= 1e-3")
        bench.add("b", f"{fp32}: entries of the mask that differ after 20 updates", differences["mask"], "",
                  "must <= 1e-3")
        bench.add("b", "      entries that the 20 updates changed", differences["flips"], "", "must >= 1e-3")
        bench.add("b", f"{objective}, bf16: loss against the CPU in fp32, relative", differences["bf16_loss"], "",
                  "must <= 0.02")
    dtypes = ["fp32"] if bench.small else ["fp32", "bf16"]
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as folder:
            num_different = differences_after_resume(Path(folder), bench.device, dtype)
        bench.add("b", f"{dtype}: tensors that differ after a resume", num_different, "", "must <= 0")


def mask_vector(training: tamt.Training):
    return torch.cat([layer.mask.flatten() for layer in training.masked_layers.values()]).cpu()


def compare_with_cpu(device: str, objective: str = "mlm+kd") -> dict[str, float]:
    """Relative differences of loss and gradient, and shares of the mask's entries."""
    with quiet():
        cpu = tamt.start_machine("cpu", "fp32")
        exact = tamt.start_machine(device, "fp32")
        rounded = tamt.start_machine(device, "bf16")
    reference = make_training(TOY, objective, cpu)
    measured = make_training(TOY, objective, exact)
    in_bf16 = make_training(TOY, objective, rounded)
    start = mask_vector(reference)

    loss = float(tamt.backpropagate(reference, tamt.next_batch(reference)))
    measured_loss = float(tamt.backpropagate(measured, tamt.next_batch(measured)))
    bf16_loss = float(tamt.backpropagate(in_bf16, tamt.next_batch(in_bf16)))
    gradient_differences = []
    for name, parameter in reference.parameters.items():
        expected = parameter.grad
        found = measured.parameters[name].grad.cpu()
        gradient_differences.append(float((found - expected).norm() / expected.norm()))

    for training in (reference, measured):
        training.optimizer.zero_grad()
        for _ in range(20):
            one_step(training, learning_rate=1e-3)
    is_different = mask_vector(reference) != mask_vector(measured)
    is_flipped = mask_vector(reference) != start
    return {
        "loss": abs(measured_loss / loss - 1),
        "gradient": max(gradient_differences),
        "mask": float(is_different.float().mean()),
        "flips": float(is_flipped.float().mean()),
        "bf16_loss": abs(bf16_loss / loss - 1),
    }


def differences_after_resume(folder: Path, device: str, dtype: str) -> int:
    """Runs 20 updates at once, and 20 with an interruption after 10 -> how many tensors of the two last states
    (parameters, moments, masks) are not the same bits. Dropout is on: its random numbers must continue, too."""
    make_world(folder, dropout=0.1)
    whole = world_settings(folder, device, dtype, out=folder / "whole")
    parts = dataclasses.replace(whole, out=folder / "parts")
    save_state_if_due = tamt.save_state_if_due

    def save_and_stop(training):
        save_state_if_due(training)
        if training.updates_done == 10:
            raise KeyboardInterrupt

    with quiet(), mock.patch.dict(os.environ, {"TAMT_CACHE": str(folder / "cache")}):
        tamt.find_mask(whole)
        with contextlib.suppress(KeyboardInterrupt), mock.patch.object(tamt, "save_state_if_due", save_and_stop):
            tamt.find_mask(parts)
        assert tamt.read_state(folder / "parts")["step"] == 10
        tamt.find_mask(dataclasses.replace(parts, resume=True))

    expected = state_tensors(tamt.read_state(folder / "whole"))
    found = state_tensors(tamt.read_state(folder / "parts"))
    return sum(not torch.equal(expected[name], found[name]) for name in expected)


def state_tensors(state: dict) -> dict:
    tensors = state["parameters"] | state["masks"]
    for number, moments in state["optimizer"]["state"].items():
        for name, tensor in moments.items():
            tensors[f"{number} {name}"] = tensor
    return tensors


def part_steps(bench: Bench):
    """c: whole updates of mask training, and what others do."""
    machine = bench.machine()
    for objective in ("mlm", "kd", "mlm+kd"):
        if not bench.is_out_of_time:
            time_our_step(bench, objective, machine, compiled=False)

    if bench.device == "cuda":
        # What make_deterministic() in tamt.py costs.
        torch.use_deterministic_algorithms(False)
        training = make_training(bench.size, "mlm", machine)
        seconds = median_seconds(lambda: one_step(training), bench.device, bench.num_calls)
        bench.add("c", "mlm, not deterministic", seconds * 1e3, "ms/step")
        torch.use_deterministic_algorithms(True)
        del training

    add_step_rows(bench, "mlm, the released step", "mlm", *measure(bench, make_released_step(bench.size, machine)))
    if importlib.util.find_spec("transformers") is None:
        bench.add("c", "dense fine-tuning by transformers", "not installed")
    else:
        dense = make_dense_step(bench.size, machine)
        add_step_rows(bench, "mlm, dense fine-tuning by transformers", "mlm", *measure(bench, dense))

    for objective in ("mlm", "kd", "mlm+kd"):  # last, since compiling takes its time, and may fail
        if not bench.is_out_of_time:
            time_our_step(bench, objective, machine, compiled=True)


def time_our_step(bench: Bench, objective: str, machine, compiled: bool):
    began = time.perf_counter()
    training = make_training(bench.size, objective, machine, compiled=compiled)
    name = f"{objective}, --compile" if compiled else objective
    one_step(training)
    synchronize(bench.device)
    first = time.perf_counter() - began

    seconds, memory = measure(bench, lambda: one_step(training))
    goal = ">= 40" if objective == "mlm" else ""
    add_step_rows(bench, name, objective, seconds, memory, goal)
    if compiled:
        bench.add("c", f"{name}: until the first step is done", first, "s")
    bench.step_seconds[objective, compiled] = seconds


def measure(bench: Bench, step) -> tuple[float, float | None]:
    """Seconds of a step, and the peak of the memory that tensors take in a step, in bytes."""
    free_memory(bench.device)
    seconds = median_seconds(step, bench.device, bench.num_calls)
    memory = None
    if bench.device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return seconds, memory


def add_step_rows(bench: Bench, name: str, objective: str, seconds: float, memory, goal: str = ""):
    size = bench.size
    bench.add("c", name, seconds * 1e3, "ms/step")
    bench.add("c", f"{name}: tokens", size.B * size.T / seconds, "1/s")
    peak = peak_of(bench.device)
    if peak is not None:
        share = 100 * model_flops(size, objective) / seconds / peak
        bench.add("c", f"{name}: of {peak / 1e12:.0f}e12 operations/s", share, "%", goal)
    if memory is not None:
        bench.add("c", f"{name}: peak memory", memory / 1e9, "GB")


def model_flops(size: Size, objective: str) -> float:
    """Operations in the matrix products of one update, as the docstring of this file counts them."""
    num_weights = size.L * (4 * size.D**2 + 2 * size.D * 4 * size.D)
    num_tokens = size.B * size.T
    forward = 2 * num_weights * num_tokens + 4 * size.L * size.B * size.T**2 * size.D
    total = 3 * forward
    if "mlm" in objective:
        num_predictions = 0.15 * num_tokens
        total += 4 * num_predictions * size.V * size.D
    if "kd" in objective:
        total += forward
    return total


class Binarise(torch.autograd.Function):
    """The released mask: floats, made from the scores in each forward pass, straight through in the backward."""

    @staticmethod
    def forward(ctx, scores, threshold):
        mask = scores.clone()
        mask[scores <= threshold] = 0.0
        mask[scores > threshold] = 1.0
        return mask

    @staticmethod
    def backward(ctx, grad_mask):
        return grad_mask, None


def make_released_step(size: Size, machine):
    """The cost of the released code's step: masks in each forward pass, attention in single products, logits at
    all positions, an optimizer in Python. It ranks nothing: its threshold moves every 1000 updates."""
    torch.manual_seed(0)
    model = bert.Model(bert.Config(**size.config())).requires_grad_(False).to(machine.device).train()
    parameters = []
    for layer in tamt.maskable_layers(model).values():
        start = tamt.START_SCORE * (torch.rand_like(layer.weight) > 0.7) + 0.005 * torch.randn_like(layer.weight)
        scores = nn.Parameter(start)
        layer.forward = masked_forward(layer, scores)
        parameters.append(scores)
    for parameter in model.cls.parameters():
        parameters.append(parameter.requires_grad_(True))
    moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters]
    input_ids = torch.randint(5, size.V, (size.B, size.T), device=machine.device)
    labels = torch.where(torch.rand(input_ids.shape, device=machine.device) < 0.15, input_ids, -100)

    def step():
        on_a_gpu = mock.patch.object(F, "scaled_dot_product_attention", plain_attention)
        on_a_cpu = mock.patch.object(bert, "attention_with_dropout_on_a_cpu", plain_attention)
        with tamt.autocast(machine), on_a_gpu, on_a_cpu:
            logits = model.mlm_logits(model(input_ids)[-1])  # (B, T, V)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        trained = [(p, m, v) for p, (m, v) in zip(parameters, moments, strict=True) if p.grad is not None]
        nn.utils.clip_grad_norm_([parameter for parameter, _, _ in trained], 1.0)
        with torch.no_grad():
            for parameter, mean, square in trained:
                mean.mul_(0.9).add_(parameter.grad, alpha=0.1)
                square.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                parameter.addcdiv_(mean, square.sqrt().add_(1e-8), value=-LEARNING_RATE)
                parameter.grad = None
        loss.item()

    return step


def masked_forward(layer, scores):
    def forward(x):
        weight = layer.weight * Binarise.apply(scores, tamt.START_SCORE / 2)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.embedding(x, weight, layer.padding_idx)

    return forward


def plain_attention(query, key, value, attention_mask, dropout: float):
    weights = query @ key.mT * query.shape[-1]**-0.5  # (B, H, T, T)
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, -1e4)
    return F.dropout(weights.softmax(dim=-1), dropout) @ value


def make_dense_step(size: Size, machine):
    """Dense training as everybody does it: transformers, all weights train, SDPA, fused AdamW."""
    from transformers import BertConfig, BertForMaskedLM  # an optional package

    torch.manual_seed(0)
    config = BertConfig(**size.config(), attn_implementation="sdpa")
    model = BertForMaskedLM(config).to(machine.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)
    input_ids = torch.randint(5, size.V, (size.B, size.T), device=machine.device)
    labels = torch.where(torch.rand(input_ids.shape, device=machine.device) < 0.15, input_ids, -100)

    def step():
        with tamt.autocast(machine):
            loss = model(input_ids, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def part_ranking(bench: Bench):
    """d: the ranking alone, after moves of the scores as large as an update's; then the waits of an update."""
    machine = bench.machine()
    step = bench.step_seconds.get(("mlm", False))
    for rank in ("global", "local", "2:4"):
        free_memory(bench.device)
        training = make_training(bench.size, "mlm", machine, rank)
        scores = training.scores
        moves = []
        for layer in training.masked_layers.values():
            moves.append((layer.scores.data, LEARNING_RATE * torch.randn_like(layer.scores).clamp_(-1, 1)))
        seconds = []
        for _ in range(3 + bench.num_calls):
            for layer_scores, move in moves:
                layer_scores.add_(move)
                move.neg_()  # back and forth, so that the threshold moves at every call
            synchronize(bench.device)
            began = time.perf_counter()
            scores.renew_masks()
            synchronize(bench.device)
            seconds.append(time.perf_counter() - began)
        median = float(np.median(seconds[3:]))
        bench.add("d", f"ranking, {rank}", median * 1e3, "ms")
        if step is not None:
            bench.add("d", f"ranking, {rank}: of an mlm update", 100 * median / step, "%",
                      "<= 5" if rank == "global" else "")
        if rank == "global":
            count_waits(bench, training)
            layer_scores = {name: layer.scores.data for name, layer in training.masked_layers.items()}
            rank_in_full = partial(tamt.masks_of_largest, layer_scores, scores.sparsity, rank)
            full = median_seconds(rank_in_full, bench.device, 1, num_warm_up=0)
            bench.add("d", "ranking, global, without a guess of the threshold", full * 1e3, "ms")

    batch_seconds = median_seconds(lambda: tamt.next_batch(training), "cpu", bench.num_calls)
    bench.add("d", "making a batch on the CPU, while the GPU is idle", batch_seconds * 1e3, "ms")


def count_waits(bench: Bench, training):
    """Where one update waits for the GPU: torch warns at each such call."""
    one_step(training)
    if bench.device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one_step(training)
    finally:
        if bench.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")

    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    bench.add("d", "waits for the GPU in one update", len(waits), "", "<= 6")
    for warning in waits:
        bench.add("d", f"  at {Path(warning.filename).name}, line {warning.lineno}", "")


def part_two_four(bench: Bench):
    """e: the products of one encoder layer in inference, fp16, with dense weights and with 2:4 weights."""
    size = bench.size
    device = torch.device(bench.device)
    dtype = torch.float16 if bench.device == "cuda" else torch.float32
    num_tokens = size.B * size.T
    shapes = [(size.D, size.D), (4 * size.D, size.D), (size.D, 4 * size.D)]  # (out, in)
    for num_out, num_in in shapes:
        x = torch.randn(num_tokens, num_in, device=device, dtype=dtype)
        weight = torch.randn(num_out, num_in, device=device, dtype=dtype)
        pruned = weight * tamt.keep_largest_of_groups(weight.abs(), 2, 4)
        sparse = pruned
        if bench.device == "cuda":
            sparse = torch.sparse.to_sparse_semi_structured(pruned)

        with torch.inference_mode():
            expected = F.linear(x, pruned)
            found = F.linear(x, sparse)
            dense_seconds = time_many(F.linear, x, pruned, bench)
            sparse_seconds = time_many(F.linear, x, sparse, bench)
        difference = float((found - expected).abs().max() / expected.abs().max())
        name = f"{num_tokens} tokens, {num_in} -> {num_out}"
        bench.add("e", f"{name}: 2:4 against dense, largest difference", difference, "", "must <= 0.01")
        bench.add("e", f"{name}: dense", dense_seconds * 1e3, "ms")
        bench.add("e", f"{name}: dense / 2:4", dense_seconds / sparse_seconds, "x")


def time_many(function, x, weight, bench: Bench) -> float:
    """Seconds of one of 20 calls in a row: a single product is shorter than its launch."""
    def calls():
        for _ in range(20):
            function(x, weight)

    return median_seconds(calls, bench.device, bench.num_calls) / 20


def part_full_run(bench: Bench):
    """f: FULL_RUN updates, with a log line every 100, and an evaluation, a mask and a state every 1000."""
    machine = bench.machine()
    free_memory(bench.device)
    training = make_training(bench.size, "mlm", machine)
    one_step(training)
    dev_rows = training.inputs.rows[:32]
    with quiet(), tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(training.run, out=Path(folder), save_every=1, log_every=1)
        training.run = run
        training.log.run = run
        log = median_seconds(lambda: training.log.add(1, 1.0, 1e-5, {}), bench.device, 2, 1)
        save_state = median_seconds(lambda: tamt.save_state_if_due(training), bench.device, 1, 0)
        save_mask = median_seconds(lambda: tamt.save_mask_of_step(training, 0.7), bench.device, 1, 0)
    evaluate = median_seconds(
        lambda: tamt.dev_losses(training.model, dev_rows, training.inputs.vocabulary, machine), bench.device, 1, 1)
    evaluate *= DEV_ROWS / len(dev_rows)

    bench.add("f", "a progress line, every 100 updates", log * 1e3, "ms")
    bench.add("f", "state.pt, every 1000 updates", save_state, "s")
    bench.add("f", "step-N/mask.pt, every 1000 updates", save_mask, "s")
    bench.add("f", "dev losses, every 1000 updates", evaluate, "s")
    around = FULL_RUN / 100 * log + FULL_RUN / 1000 * (save_state + save_mask + evaluate)
    bench.add("f", f"{FULL_RUN:,} updates: all that is not an update", around / 60, "min")
    for (objective, compiled), seconds in bench.step_seconds.items():
        name = f"{objective}, --compile" if compiled else objective
        minutes = (FULL_RUN * seconds + around) / 60
        goal = "<= 10" if objective == "mlm" else ""
        bench.add("f", f"{FULL_RUN:,} updates, {name}, extrapolated", minutes, "min", goal)


def part_processes(bench: Bench):
    """g: two processes share the rows of each batch, on one card. NCCL may refuse to use a card twice."""
    backends = ["nccl", "gloo"] if bench.device == "cuda" else ["gloo"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_world(folder, dropout=0.0)
        with quiet(), mock.patch.dict(os.environ, {"TAMT_CACHE": str(folder / "cache")}):
            tamt.find_mask(world_settings(folder, bench.device, out=folder / "one"))
        expected = tamt.load_mask(folder / "one")

        for backend in backends:
            error = run_two_processes(folder, bench.device, backend)
            if error:
                bench.add("g", f"two processes by {backend}: {error[:80]}", "refused")
                continue
            found = tamt.load_mask(folder / backend)
            num_different = sum(int((expected[name] != found[name]).sum()) for name in expected)
            num_entries = sum(mask.numel() for mask in expected.values())
            bench.add("g", f"two processes by {backend}: entries of the mask that differ",
                      num_different / num_entries, "", "must <= 1e-3")
            return
    bench.add("g", "two processes that agree", 0, "", "must >= 1")


def run_two_processes(folder: Path, device: str, backend: str) -> str:
    """Starts this file twice with --worker -> "", or the last line of an error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = []
    for index in range(2):
        # LOCAL_RANK 0 for both: the same card.
        environment = {"RANK": str(index), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "TAMT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--worker", str(folder), "--backend", backend, "--device", device]
        workers.append(subprocess.Popen(command, env=os.environ | environment, text=True, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE))
    error = ""
    deadline = time.time() + 60
    for worker in workers:
        try:
            _, output = worker.communicate(timeout=max(deadline - time.time(), 1))
        except subprocess.TimeoutExpired:
            worker.kill()
            _, output = worker.communicate()
            output += "\nno end after 60 seconds"
        if worker.returncode:
            error = output.strip().split("\n")[-1] or f"exit status {worker.returncode}"
    return error


def worker(folder: Path, device: str, backend: str):
    torch.distributed.init_process_group(backend)
    tamt.find_mask(world_settings(folder, device, out=folder / backend))
    torch.distributed.destroy_process_group()


PARTS = {
    "tests": part_tests,
    "agreement": part_agreement,
    "steps": part_steps,
    "ranking": part_ranking,
    "two_four": part_two_four,
    "full_run": part_full_run,
    "processes": part_processes,
}

# ---------------------------------------------------------------------------------------------------
# 3. The command line
# ---------------------------------------------------------------------------------------------------


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Check and time the CUDA path.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="every part in miniature: shows that it runs")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas ({','.join(PARTS)})")
    parser.add_argument("--seconds", type=float, default=240, help="no new measurement begins after so many (240)")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="gets all rows of the table (gpu.json)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if not set(names) <= PARTS.keys():
        parser.error(f"--only {args.only}: expected some of {','.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU; --device cpu --small shows that all parts run")
    if args.device == "cpu" and not args.small and not args.worker:
        parser.error("--device cpu goes with --small: the full size takes hours")
    if args.worker:
        worker(args.worker, args.device, args.backend)
        return 0

    if args.device == "cuda":
        tamt.make_deterministic()  # before the first use of the GPU, which is to ask for its name
    bench = Bench(args.device, args.small, args.seconds, args.json)
    print(f"{card_name(args.device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for name in names:
        if bench.is_out_of_time:
            bench.add(name, "left out: no time", "")
            continue
        try:
            PARTS[name](bench)
        except Exception as error:  # the other parts are worth having
            traceback.print_exc()
            bench.add(name, f"FAILED: {type(error).__name__}: {error}"[:300], "")
            bench.failed = True
    print(f"{len(bench.rows)} rows in {args.json}, {time.time() - bench.began:.0f} s"
          f"{', FAILED' if bench.failed else ''}")
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
