"""Does a run survive being killed? This kills tamt.py and finetune.py at random moments, resumes them until they end,
and compares every file with that of an undisturbed run, bit for bit (times excepted).

    python dev/kill.py                  # 30 kills by SIGKILL over twelve cases, about a minute
    python dev/kill.py --kills 4        # only the first four cases
    python dev/kill.py --signal INT     # Ctrl-C instead, which must end with exit status 130

Half of the kills wait until a file is half-written. A file too many is a difference, too: part of a file that was
being written, or a second line of the same run in results.jsonl.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (the optimizers would import it in every run, at their first use)

import bert  # noqa: E402
import finetune  # noqa: E402
import tamt  # noqa: E402

FIND = (
    "--model model --data text.txt --seq-len 16 --batch-size 8 --lr 2e-3 --steps 30 "
    "--save-every 2 --eval-every 5 --log-every 3 --prune-every 6"
)
TUNE = "--data . --batch-size 8 --max-len 24 --eval-every 3 --epochs 7"


@dataclass(frozen=True)
class Case:
    program: ModuleType
    arguments: str


CASES = [
    Case(tamt, f"{FIND} --method tamt --objective mlm+kd"),
    Case(finetune, f"{TUNE} --task sst2 --mask mask.pt"),
    Case(tamt, f"{FIND} --method imp --sparsity 0.45"),
    Case(finetune, f"{TUNE} --task squad --mask mask.pt"),
    Case(tamt, f"{FIND} --method tamt --objective kd"),
    Case(tamt, f"{FIND} --method tamt --refresh-every 3 --rank local"),
    Case(tamt, f"{FIND} --method imp --no-rewind --rank global"),
    Case(finetune, f"{TUNE} --task sst2 --model model --limit 50"),
    Case(finetune, f"{TUNE} --task sst2 --model model --find imp --sparsity 0.15"),
    Case(tamt, f"{FIND} --method omp"),
    Case(finetune, f"{TUNE} --task sst2 --model model --find super --orders losing --limit 20"),
    Case(tamt, f"{FIND} --method random"),
]

# ---------------------------------------------------------------------------------------------------
# 1. One case: an undisturbed run, and runs that are killed
# ---------------------------------------------------------------------------------------------------


def try_case(case: Case, num_kills: int, folder: Path, generator, number: int) -> int:
    """Sends signal `number` to runs of this case until num_kills of them have been hit.

    Returns how many of the kills left no trace."""
    log = folder / "log.txt"
    began = time.monotonic()
    status = wait(start(case, folder / "whole"), folder / "whole")
    seconds = time.monotonic() - began
    if status != 0:
        sys.exit(f"the undisturbed run ended with exit status {status}:\n{log.read_text()}")
    expected = contents(folder / "whole")

    num_done = 0
    num_in_a_save = 0
    num_identical = 0
    for index in range(20 * num_kills):  # a signal may come after the end; then the next run is tried
        out = folder / f"run-{index}"
        statuses = []
        while num_done + len(statuses) < num_kills and len(statuses) < 3 and 0 not in statuses:
            due = time.monotonic() + generator.random() * seconds
            waits_for_save = generator.random() < 0.5
            status = wait(start(case, out, resume=True), out, number, due, waits_for_save)
            statuses.append(status)
            if status != 0 and any(out.rglob("*.part")):
                num_in_a_save += 1
        num_hits = sum(status != 0 for status in statuses)
        last_status = wait(start(case, out, resume=True), out)

        found = contents(out)
        differences = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        expected_status = 130 if number == signal.SIGINT else -number
        is_identical = not differences and last_status == 0 and set(statuses) <= {0, expected_status}
        if is_identical:
            num_identical += num_hits
        else:
            where = ", ".join(differences) or "no file"
            print(f"run {index}: exit statuses {[*statuses, last_status]}; differs in {where}")

        num_done += num_hits
        if num_done >= num_kills:
            break

    steps = [line.split()[-1] for line in log.read_text().splitlines() if line.startswith("resuming")]
    name = f"{case.program.__name__} {case.arguments.removeprefix(FIND).removeprefix(TUNE).strip()}"
    print(f"{name:62} {seconds:4.1f} s  {num_done} kills, {num_in_a_save} in a save  {num_identical} identical  "
          f"resumed at {' '.join(steps) or 'the start'}", flush=True)
    return num_identical


def start(case: Case, out: Path, resume: bool = False) -> int:
    """Runs the case in a forked process, so that torch is imported only once -> the id of the process.

    What it prints goes into log.txt beside `out`."""
    out.mkdir(parents=True, exist_ok=True)
    process_id = os.fork()
    if process_id != 0:
        return process_id

    arguments = [*case.arguments.split(), "--out", str(out)]
    if case.program is finetune:
        arguments += ["--results", f"{out}/results.jsonl"]
    if "--find" not in arguments:
        arguments += ["--export", f"{out}/model"]
    if resume:
        arguments.append("--resume")
    sys.argv = ["kill.py", *arguments]

    status = 1
    try:
        with open(out.parent / "log.txt", "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        tamt.run_command(case.program.main)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(status)  # without the clean-up of the parent, which would remove the folder


def wait(process_id: int, out: Path, number: int = 0, due: float = float("inf"), waits_for_save: bool = False) -> int:
    """Waits for the end of the process -> its exit status, or minus the number of the signal that ended it.

    Sends signal `number` at the time `due`, with waits_for_save at the first half-written file after it."""
    is_sent = False
    while True:
        ended_id, status = os.waitpid(process_id, os.WNOHANG)
        if ended_id != 0:
            return os.waitstatus_to_exitcode(status)
        if not is_sent and time.monotonic() >= due:
            if not waits_for_save or any(out.rglob("*.part")):
                os.kill(process_id, number)
                is_sent = True
        time.sleep(0.0005)


# ---------------------------------------------------------------------------------------------------
# 2. What is compared
# ---------------------------------------------------------------------------------------------------

TIMES = {"time", "ms_per_step", "seconds", "command"}


def contents(out: Path) -> dict:
    """{path below out: what is compared}"""
    return {str(file.relative_to(out)): content(file) for file in out.rglob("*") if file.is_file()}


def content(file: Path):
    """The bytes of a file. Of JSON the values without times, numbers as they are written; of state.pt the values,
    since equal values can have different pickles."""
    if file.suffix == ".json":
        return read_json(file.read_text())
    if file.suffix == ".jsonl":
        return [read_json(line) for line in file.read_text().splitlines()]
    if file.name == "state.pt":
        return comparable(torch.load(file, weights_only=True))
    return file.read_bytes()


def read_json(text: str):
    return json.loads(text, parse_float=str, object_hook=without_times)


def without_times(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name not in TIMES}


def comparable(value):
    """The same value with every tensor as its type, shape and bytes, and every dict as its pairs."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return [comparable(pair) for pair in value.items()]
    if isinstance(value, (list, tuple)):
        return [comparable(element) for element in value]
    return value


# ---------------------------------------------------------------------------------------------------
# 3. A small world, and the command line
# ---------------------------------------------------------------------------------------------------

WORDS = "the a cat dog bird house tree sees likes finds big small red old new good bad runs sits here".split()


def make_world():
    """Writes into the working folder a model (2 layers, 32 wide, whole words), a text, a mask, SST-2 and SQuAD."""
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    config = bert.Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = bert.Model(config)
    bert.save("model", config, dict(model.named_parameters()), "ForMaskedLM")
    Path("model/vocab.txt").write_text("\n".join(vocabulary) + "\n")
    masks = tamt.magnitude_masks(tamt.install_masked_layers(model), 0.5, "local")
    tamt.save_mask("mask.pt", masks, {"model": "model"})

    generator = random.Random(0)
    sentences = [" ".join(generator.sample(WORDS, 8)) + " ." for _ in range(800)]
    Path("text.txt").write_text("\n".join(sentences) + "\n")
    write_tasks("train", sentences[:64])
    write_tasks("dev", sentences[64:96])


def write_tasks(split: str, sentences: list[str]):
    """SST-2: is there the word "good"? SQuAD: the answer is always the first word."""
    rows = ["sentence\tlabel"]
    paragraphs = []
    for number, sentence in enumerate(sentences):
        rows.append(f"{sentence}\t{int('good' in sentence)}")
        answer = {"text": sentence.split()[0], "answer_start": 0}
        question = {"id": str(number), "question": "likes", "answers": [answer]}
        paragraphs.append({"context": sentence, "qas": [question]})
    Path(f"{split}.tsv").write_text("\n".join(rows))
    Path(f"{split}-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Kill, resume, compare.")
    parser.add_argument("--kills", type=int, default=30, help="spread over the cases (30)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (1)")
    parser.add_argument("--signal", choices=["KILL", "INT"], default="KILL")
    args = parser.parse_args(argv)
    number = signal.Signals[f"SIG{args.signal}"]

    num_identical = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["TAMT_CACHE"] = f"{folder}/cache"
        make_world()
        for index, case in enumerate(CASES):
            num_kills = len(range(index, args.kills, len(CASES)))  # the kills go round all cases
            if num_kills > 0:
                generator = random.Random(args.seed * 100 + index)
                num_identical += try_case(case, num_kills, Path(f"case-{index}"), generator, number)
        os.chdir("/")
    print(f"{num_identical} of {args.kills} identical")
    return int(num_identical != args.kills)


if __name__ == "__main__":
    sys.exit(main())
