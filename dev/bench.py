"""How fast is it? An update of mask training against two other ways, and what its pieces cost.

    python dev/bench.py                      # everything: about half an hour on one thread
    python dev/bench.py --toy                # every part in miniature, in seconds: shows that it runs
    python dev/bench.py --only step,ranking --rounds 9 --json bench.jsonl

    equal      ours and the released step compute the same loss and the same gradients
    step       an update of ours against the two others
    ranking    what the exact global ranking takes of an update
    memory     peak memory, each variant in a fresh process, above what its imports take
    tokens     reading a text into rows of token ids
    finetune   batches of SST-2's lengths: similar lengths together, against padding to 128
    two_four   the encoder with dense weights against 2:4 weights in the sparse tensor cores (needs a GPU)

The variants of a step:

    ours       one update and the ranking, as train_scores() calls them
    released   the released code's step re-created with transformers: a mask from the scores in every forward pass,
               attention in single products, logits at all positions, AdamW in Python tensor by tensor. For mlm+kd
               its teacher computes logits and a loss that nobody reads. For kd both models stop below the
               masked-LM head, and the teacher drops out, too (train_kd.py never calls eval)
    dense      fine-tuning by transformers: all weights train, no mask, SDPA, fused AdamW

How it measures: one process and one thread; the variants take turns (A B A B); a time is CPU time of this process,
so other programs disturb little. Ratios are taken within a round; the table has their median and range. Weights and
tokens are random, which is right for cost and says nothing about learning. dev/gpu.py measures the GPU.

Letters: B sequences, T tokens, D hidden size, H heads, L layers, V vocabulary.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for all
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import bert  # noqa: E402
import data  # noqa: E402
import glue_squad  # noqa: E402
import tamt  # noqa: E402
from dev import gpu  # noqa: E402
from dev.gpu import Size  # noqa: E402

LEARNING_RATE = 5e-5
SIZES = {
    "4L": Size(L=4, D=256, H=4, B=8, T=128, V=30522),
    "6L": Size(L=6, D=384, H=12, B=8, T=512, V=30522),
    "base": Size(L=12, D=768, H=12, B=8, T=128, V=30522),
}
TOY = Size(L=2, D=32, H=2, B=4, T=16, V=300)

# ---------------------------------------------------------------------------------------------------
# 1. The variants: each function returns a step, to be called without arguments
# ---------------------------------------------------------------------------------------------------


def make_our_step(size: Size, objective: str = "mlm") -> Callable:
    training = gpu.make_training(size, objective, cpu())

    def step():
        gpu.one_update(training, LEARNING_RATE, training.updates_done + 1)
        training.updates_done += 1
        training.scores.renew_masks()

    return step


def make_dense_step(size: Size, objective: str = "mlm") -> Callable:
    return gpu.make_dense_step(size, cpu())


def make_released_step(size: Size, objective: str = "mlm") -> Callable:
    released = Released(size, objective)
    batches = random_batches(size)

    def step():
        released.loss(next(batches)).backward()
        released.update()

    return step


STEPS = {"ours": make_our_step, "released": make_released_step, "dense": make_dense_step}


def cpu() -> tamt.Machine:
    with gpu.quiet():
        return tamt.start_machine("cpu", "fp32")


def random_batches(size: Size):
    vocabulary = data.Vocabulary(None, size.V, 0, 1, 2, 3, 4)
    generator = np.random.default_rng(0)
    while True:
        rows = generator.integers(5, size.V, (size.B, size.T))
        yield tamt.make_batch(rows, vocabulary, generator)


class Released:
    """The released step, with the transformers of today."""

    def __init__(self, size: Size, objective: str):
        self.objective = objective
        self.network = transformers_model(size)
        self.teacher = None
        if "kd" in objective:
            teacher_dropout = size.dropout if objective == "kd" else 0.0
            self.teacher = transformers_model(dataclasses.replace(size, dropout=teacher_dropout))
        self.parameters = self.select_parameters()
        self.moments = {}
        for name, parameter in self.parameters.items():
            self.moments[name] = (torch.zeros_like(parameter), torch.zeros_like(parameter))
        self.t = 0

    def select_parameters(self) -> dict:
        """{name: parameter} of what trains: the head without the decoder (not with kd), and the scores, which this
        puts into the layers."""
        parameters = {}
        for name, parameter in self.network.named_parameters():
            is_head = name.startswith("cls.") and "decoder.weight" not in name
            parameter.requires_grad_(is_head and self.objective != "kd")
            if parameter.requires_grad:
                parameters[name] = parameter

        for name, layer in self.network.bert.named_modules(prefix="bert"):
            if isinstance(layer, nn.Linear) or name.endswith("word_embeddings"):
                is_kept = torch.rand_like(layer.weight) > 0.7
                noise = 0.005 * torch.randn_like(layer.weight)
                scores = nn.Parameter(tamt.START_SCORE * is_kept + noise)
                layer.forward = gpu.masked_forward(layer, scores)
                parameters[f"{name}.scores"] = scores
        return parameters

    def loss(self, batch: tamt.Batch):
        labels = torch.from_numpy(np.where(batch.is_predicted, batch.input_ids, -100))
        input_ids = torch.from_numpy(batch.input_ids if self.objective == "kd" else batch.corrupted_ids)
        output = self.read(self.network, input_ids, labels)
        loss = 0.0
        if self.objective != "kd":
            loss = loss + output.loss
        if self.teacher is not None:
            with torch.no_grad():
                teacher_states = self.read(self.teacher, input_ids, labels).hidden_states[1:]
            student_states = output.hidden_states[1:]
            for of_teacher, of_student in zip(teacher_states, student_states, strict=True):
                distance = 1 - F.cosine_similarity(of_teacher, of_student, dim=-1)  # (B, T)
                loss = loss + distance.mean() / len(student_states)
        return loss

    def read(self, network, input_ids, labels):
        if self.objective == "kd":
            return network.bert(input_ids, output_hidden_states=True)
        return network(input_ids, labels=labels, output_hidden_states=self.teacher is not None)

    @torch.no_grad()
    def update(self):
        """Clipping and AdamW. The pooler's scores have no gradient."""
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.t += 1
        rate = LEARNING_RATE * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                mean, square = self.moments[name]
                mean.mul_(0.9).add_(parameter.grad, alpha=0.1)
                square.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                parameter.addcdiv_(mean, square.sqrt().add_(1e-8), value=-rate)
                parameter.grad = None


def transformers_model(size: Size):
    from transformers import BertConfig, BertForMaskedLM  # an optional package

    return BertForMaskedLM(BertConfig(**size.config(), attn_implementation="eager")).train()


# ---------------------------------------------------------------------------------------------------
# 2. The clock
# ---------------------------------------------------------------------------------------------------


def take_turns(steps: dict[str, Callable], rounds: int, clock: Callable = time.process_time) -> dict[str, np.ndarray]:
    """{name: step} -> {name: seconds of each round (rounds,)}

    Two rounds before them do not count. In these the memory that all variants share still grows, and a fresh page
    costs 2 to 11 microseconds on a shared machine."""
    seconds = {name: [] for name in steps}
    for number in range(-2, rounds):
        for name, step in steps.items():
            began = clock()
            step()
            if number >= 0:
                seconds[name].append(clock() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory() -> float:
    """The most memory that this process has had, in MB. (ru_maxrss would count the parent's, too.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1000
    raise OSError("/proc/self/status: no line VmHWM; peak memory is measured on Linux only")


# ---------------------------------------------------------------------------------------------------
# 3. The parts: each yields figures
# ---------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    name: str
    values: list  # of the rounds
    unit: str
    goal: tuple | None = None  # (">=" or "<=", bound)


def part_equal(args):
    """The same batch, weights, scores and masks, without dropout: relative differences."""
    size = dataclasses.replace(TOY, dropout=0.0)
    for objective in ("mlm", "kd", "mlm+kd"):
        training = gpu.make_training(size, objective, cpu())
        # The released threshold stands at half of START_SCORE.
        for layer in training.masked_layers.values():
            layer.scores.data.copy_(tamt.START_SCORE * layer.mask)
        released = Released(size, objective)
        copy_weights(training, released)

        batch = tamt.next_batch(training)
        loss = tamt.backpropagate(training, batch)
        released_loss = released.loss(batch)
        released_loss.backward()
        differences = [abs(float(loss) / released_loss.item() - 1)]
        for name, parameter in training.parameters.items():
            expected = released.parameters[name].grad
            differences.append(float((parameter.grad - expected).abs().max() / expected.abs().max()))
        name = f"equal: {objective}, loss and {len(training.parameters)} gradients, worst"
        yield Figure(name, [max(differences)], "relative", ("<=", 1e-5))


def copy_weights(training: tamt.Training, released: Released):
    weights = {name: tensor for name, tensor in training.model.named_parameters() if not name.endswith(".scores")}
    for network in (released.network, released.teacher):
        if network is not None:
            network.load_state_dict(weights, strict=False)  # the decoder is tied, the pooler missing
    for name, layer in training.masked_layers.items():
        scores = name.removesuffix(".weight") + ".scores"
        if scores in released.parameters:
            released.parameters[scores].data.copy_(layer.scores.data)


def part_step(args):
    """mlm at three sizes against both others, kd and mlm+kd at the smallest against the released step."""
    goals = {"4L": 2.4, "6L": 2.2, "base": 1.4}
    for key, size in args.sizes.items():
        rounds = args.rounds * (3 if key == "4L" else 1)
        seconds = take_turns({name: make(size) for name, make in STEPS.items()}, rounds)
        yield Figure(f"step, mlm, {describe(size)}: ours", 1e3 * seconds["ours"], "ms")
        for name in ("released", "dense"):
            goal = (">=", goals[key]) if name == "released" else None
            yield Figure(f"step, mlm, {describe(size)}: {name} / ours", seconds[name] / seconds["ours"], "x", goal)

    size = args.sizes["4L"]
    for objective, bound in (("kd", 1.5), ("mlm+kd", 3.5)):
        steps = {name: STEPS[name](size, objective) for name in ("ours", "released")}
        seconds = take_turns(steps, 3 * args.rounds)
        yield Figure(f"step, {objective}, {describe(size)}: released / ours", seconds["released"] / seconds["ours"],
                     "x", (">=", bound))


def part_ranking(args):
    """The three things that mask training does and fine-tuning does not, as shares of an update."""
    size = args.sizes["base"]
    training = gpu.make_training(size, "mlm", cpu())
    encoder_layers = [layer for name, layer in training.masked_layers.items() if ".layer." in name]
    scores = training.scores

    def update():
        gpu.one_update(training, LEARNING_RATE, training.updates_done + 1)
        training.updates_done += 1

    def rank():
        scores.renew_masks()

    def multiply():  # W * M forward, and dL/dS = dL/d(W * M) * W backward
        for layer in encoder_layers:
            torch.mul(layer.weight, layer.mask)
            torch.mul(layer.weight, layer.weight)

    seconds = take_turns({"update": update, "rank": rank, "multiply": multiply}, args.rounds)
    step = seconds["update"] + seconds["rank"]
    name = f"share of an update, {describe(size)}"
    yield Figure(f"{name}: exact ranking", 100 * seconds["rank"] / step, "%", ("<=", 5))
    yield Figure(f"{name}: products of weights and masks", 100 * seconds["multiply"] / step, "%")


def part_memory(args):
    size = args.sizes["base"]
    peaks = {}
    names = ["ours"] if args.toy else STEPS  # the peak of a toy is that of the imports
    for name in names:
        command = [sys.executable, __file__, "--worker", name, "--dropout", str(args.dropout)]
        if args.toy:
            command.append("--toy")
        peaks[name] = np.array([float(subprocess.check_output(command).split()[-1]) for _ in range(args.rounds)])
    yield Figure(f"peak memory, {describe(size)}: ours", peaks["ours"], "MB")
    if not args.toy:
        for name, bound in (("dense", 1.2), ("released", 0.75)):
            yield Figure(f"peak memory, {describe(size)}: ours / {name}", peaks["ours"] / peaks[name], "x",
                         ("<=", bound))


def measure_memory(name: str, size: Size):
    """In a fresh process: a toy step loads the libraries; the growth after it is the variant's."""
    STEPS[name](TOY)()
    before = peak_memory()
    step = STEPS[name](size)
    step()
    step()
    print(peak_memory() - before)


def part_tokens(args):
    """A text as rows of 512 token ids by data.py, and line by line with the tokenizer alone."""
    if args.text is None:
        vocabulary, text = random_text(num_words=40_000 if args.toy else 1_000_000)
    else:
        vocabulary = data.vocabulary(args.vocab)
        text = args.text.read_text(encoding="utf-8")

    def by_blocks():
        return np.concatenate(list(data.packed_blocks(iter([text]), vocabulary, 512)))

    def by_lines():
        return np.concatenate(data.encode(text.split("\n"), vocabulary))

    rows = by_blocks()
    stream = rows[:, 1:-1].flatten()  # without [CLS] and [SEP]
    if not np.array_equal(stream, by_lines()[:len(stream)]):
        raise ValueError("data.packed_blocks changes the ids of this text")
    seconds = take_turns({"blocks": by_blocks, "lines": by_lines}, args.rounds)
    megabytes = len(text.encode()) / 1e6
    yield Figure(f"tokenising {megabytes:.1f} MB: data.packed_blocks", megabytes / seconds["blocks"], "MB/s")
    yield Figure(f"tokenising {megabytes:.1f} MB: line by line", megabytes / seconds["lines"], "MB/s")


def random_text(num_words: int):
    """A vocabulary of 6760 words and a text of them, eight a line."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c for a in letters for b in letters for c in "aeioulnrst"]
    with tempfile.TemporaryDirectory() as folder:
        lines = [*data.WORDPIECE_SPECIALS, *words]
        Path(folder, "vocab.txt").write_text("\n".join(lines) + "\n")
        with gpu.quiet():
            vocabulary = data.vocabulary(folder)
    chosen = np.random.default_rng(0).choice(words, num_words)
    text = "\n".join(" ".join(line) for line in chosen.reshape(-1, 8))
    return vocabulary, text


def part_finetune(args):
    """Eight bucketed batches against one that is padded to 128 tokens."""
    size = args.sizes["6L"]
    config = bert.Config(**dataclasses.replace(size, T=128).config())
    model = bert.Model(config, with_mlm_head=False).train()
    model.add_classifier(2)
    optimizer = tamt.make_optimizer(model.parameters(), torch.device("cpu"))

    generator = np.random.default_rng(0)
    lengths = 3 + generator.gamma(1.7, 6.6, 20_000).astype(int)  # SST-2's mean, 13.3 tokens, and its spread
    lengths = np.minimum(lengths, 128)
    batches = glue_squad.bucketed_batches(lengths, 32, generator)
    next_batch = iter(batches * 10)

    def update(is_padded):
        sequences = []
        for length in lengths[next(next_batch)]:
            input_ids = generator.integers(5, size.V, length)
            sequences.append((input_ids, np.zeros(length, np.int64)))
        arrays = glue_squad.pad_batch(sequences, 0)
        if is_padded:
            arrays = [pad_to_128(array) for array in arrays]
        input_ids, attention_mask, token_type_ids = (torch.from_numpy(array) for array in arrays)
        labels = input_ids[:, 1] % 2
        logits = model.class_logits(model(input_ids, attention_mask, token_type_ids)[-1])
        F.cross_entropy(logits, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def eight_updates():
        for _ in range(8):
            update(is_padded=False)

    seconds = take_turns({"padded": lambda: update(is_padded=True), "bucketed": eight_updates}, 2 * args.rounds)
    ratio = 8 * seconds["padded"] / seconds["bucketed"]
    yield Figure(f"fine-tuning, L={size.L} D={size.D}, SST-2: padded to 128 / bucketed", ratio, "x", (">=", 8))


def pad_to_128(array):
    return np.pad(array, ((0, 0), (0, 128 - array.shape[1])))


def part_two_four(args):
    """The encoder of BERT-base's shape in inference, in bf16. The second copy has its weights in torch's
    semi-structured form. Both have the same 2:4 mask, so their logits should agree."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        print("two_four: skipped; it needs a CUDA GPU of compute capability 8.0 or later (A100, H100, ...)")
        return
    yield from compare_two_four(args, "cuda", torch.bfloat16, torch.sparse.to_sparse_semi_structured, cuda_clock)


def compare_two_four(args, device: str, dtype, to_sparse: Callable, clock: Callable):
    size = dataclasses.replace(args.sizes["base"], T=512, dropout=0.0)
    torch.manual_seed(0)
    dense = bert.Model(bert.Config(**size.config())).eval().requires_grad_(False).to(device, dtype)
    sparse = bert.Model(dense.config).eval().requires_grad_(False).to(device, dtype)
    sparse.load_state_dict(dense.state_dict())
    for model in (dense, sparse):
        for layer in encoder_matrices(model):
            pruned = layer.weight * tamt.keep_largest_of_groups(layer.weight.abs(), 2, 4)
            if model is sparse:
                pruned = to_sparse(pruned)
            layer.weight = nn.Parameter(pruned, requires_grad=False)

    shapes = [(1, 16)] if args.toy else [(1, 128), (32, 128), (16, 512)]
    for num_rows, seq_len in shapes:
        input_ids = torch.randint(5, size.V, (num_rows, seq_len), device=device)
        with torch.inference_mode():
            expected = dense.mlm_logits(dense(input_ids)[-1]).float()
            found = sparse.mlm_logits(sparse(input_ids)[-1]).float()
            difference = float((found - expected).abs().max() / expected.abs().max())
            del expected, found
            steps = {"dense": lambda x=input_ids: dense(x), "2:4": lambda x=input_ids: sparse(x)}
            seconds = take_turns(steps, 6 * args.rounds, clock)
        name = f"two_four, L={size.L} D={size.D}, {num_rows} x {seq_len}"
        yield Figure(f"{name}: logits, largest difference", [difference], "relative", ("<=", 0.05))
        yield Figure(f"{name}: dense", 1e3 * seconds["dense"], "ms")
        yield Figure(f"{name}: dense / 2:4", seconds["dense"] / seconds["2:4"], "x")


def encoder_matrices(model: bert.Model) -> list[nn.Linear]:
    return [module for module in model.backbone.encoder.modules() if isinstance(module, nn.Linear)]


PARTS = {
    "equal": part_equal,
    "memory": part_memory,
    "tokens": part_tokens,
    "finetune": part_finetune,
    "ranking": part_ranking,
    "step": part_step,
    "two_four": part_two_four,
}

# ---------------------------------------------------------------------------------------------------
# 4. The table and the command line
# ---------------------------------------------------------------------------------------------------


def describe(size: Size) -> str:
    return f"L={size.L} D={size.D}, {size.B} x {size.T}"


def row(figure: Figure, is_judged: bool) -> str:
    """A line of the table. is_judged: whether a goal was met; in miniature that means nothing."""
    median = np.median(figure.values)
    goal = ""
    verdict = ""
    if figure.goal is not None:
        sign, bound = figure.goal
        goal = f"{sign} {bound:g}"
        is_met = median >= bound if sign == ">=" else median <= bound
        if is_judged:
            verdict = "met" if is_met else "MISSED"
    span = ""
    if len(figure.values) > 1:
        span = f"{np.min(figure.values):.3g} .. {np.max(figure.values):.3g}"
    return f"{figure.name:66} {goal:>9} {median:9.3g} {span:>16} {figure.unit:9}{verdict}"


def json_line(figure: Figure, about: dict) -> dict:
    values = figure.values
    return {
        "figure": figure.name,
        "goal": figure.goal,
        "median": float(np.median(values)),
        "range": [float(np.min(values)), float(np.max(values))],
        "unit": figure.unit,
    } | about


def hardware() -> str:
    name = "unknown processor"
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
    words = [name, f"{os.cpu_count()} cores", torch.backends.cpu.get_cpu_capability(), "1 thread"]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Time and memory of mask training against other ways.")
    parser.add_argument("--toy", action="store_true", help="every part in miniature: shows that it runs")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas ({','.join(PARTS)})")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant (5)")
    parser.add_argument("--dropout", type=float, default=0.1, help="of all variants of a step (0.1)")
    parser.add_argument("--text", type=Path, help="tokens: a text file (made-up words)")
    parser.add_argument("--vocab", type=Path, help="tokens: the folder of its tokenizer")
    parser.add_argument("--json", type=Path, help="file that gets one line per figure")
    parser.add_argument("--worker", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if not set(names) <= PARTS.keys():
        parser.error(f"--only {args.only}: expected some of {','.join(PARTS)}")
    if (args.text is None) != (args.vocab is None):
        parser.error("--text and --vocab go together")
    sizes = dict.fromkeys(SIZES, TOY) if args.toy else SIZES
    args.sizes = {key: dataclasses.replace(size, dropout=args.dropout) for key, size in sizes.items()}
    if args.toy:
        args.rounds = 1
    torch.set_num_threads(1)
    if args.worker:
        measure_memory(args.worker, args.sizes["base"])
        return

    arguments = sys.argv[1:] if argv is None else argv
    about = {
        "command": " ".join(["python dev/bench.py", *arguments]),
        "hardware": hardware(),
        "versions": tamt.versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(f"{about['hardware']}, torch {torch.__version__}, {about['date']}\n{about['command']}\n")
    print(f"{'figure':66} {'goal':>9} {'median':>9} {'range':>16}")
    for name in names:
        for figure in PARTS[name](args):
            print(row(figure, is_judged=not args.toy or name == "equal"), flush=True)
            if args.json:
                data.append_line(args.json, json_line(figure, about))


if __name__ == "__main__":
    main()
