"""Finds masks and fine-tunes them: methods x sparsities x seeds x tasks. Each run adds a line to --results.

    python dev/sweep.py --model bert-base --methods dense,mlm,kd --sparsities 0.5,0.7 --tasks sst2,mrpc \\
        --task-seeds 1,2 -- --steps 1000

    python dev/sweep.py --model rxnfp --data reactions.txt --methods dense,omp,mlm --tasks classes.json \\
        --tune="--lr 3e-4" -- --lines --seq-len 256       # a chemical BERT: a reaction a line, a task of its own

Methods: dense omp random imp mlm kd mlm+kd, and with a random start mlm-random kd-random mlm+kd-random. Flags after --
go to tamt.py, those in --tune to finetune.py. What they mean for imp is different (--steps is its horizon), so imp is
best swept in a call of its own.

A run whose command is in --results already (of a fine-tuning: for the same mask) is skipped, with a line that says so,
and one that was interrupted is resumed. For results of your own, give a file of your own with --results.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tamt  # noqa: E402


def main():
    args = parse_arguments()
    for mask in wanted_masks(args):
        folder = args.out / f"{mask.method}-{mask.sparsity}-s{mask.seed}"
        find_mask(mask, folder, args)
        if args.tasks:
            for mask_file in mask_files(folder, args.checkpoints):
                fine_tune(mask, mask_file, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find masks and fine-tune them.")
    parser.add_argument("--model", default="toy", help="name or path (toy)")
    parser.add_argument("--data", help="text of tamt.py")
    parser.add_argument("--task-data", help="folder with the tasks")
    parser.add_argument("--methods", type=comma_list, default=["omp"], help="(omp)")
    parser.add_argument("--sparsities", type=comma_list, default=["0.7"], help="(0.7)")
    parser.add_argument("--seeds", type=comma_list, default=["1"], help="of the masks (1)")
    parser.add_argument("--tasks", type=comma_list, default=[], help="names or FILE.json (none)")
    parser.add_argument("--task-seeds", type=comma_list, default=["1"], help="of the fine-tunings (1)")
    parser.add_argument("--limit", type=comma_list, default=[""], help="numbers of training examples (all)")
    parser.add_argument("--tune", type=shlex.split, default=[], metavar="FLAGS", help="flags for finetune.py")
    parser.add_argument("--checkpoints", action="store_true", help="also fine-tune the masks of all steps")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="folder of the runs (out/sweep)")
    parser.add_argument("--results", type=Path, default=Path("dev/results.jsonl"), help="(dev/results.jsonl)")
    parser.add_argument("extra", nargs="*", metavar="-- FLAGS", help="flags for tamt.py")
    return parser.parse_args()


def comma_list(text: str) -> list[str]:
    return text.split(",")


# ---------------------------------------------------------------------------------------------------
# 1. The runs
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    method: str
    sparsity: str
    seed: str


def wanted_masks(args) -> list[Mask]:
    """Without repetition: there is one dense model, and one OMP mask for each sparsity, whatever the seed."""
    masks = []
    for sparsity, seed, method in product(args.sparsities, args.seeds, args.methods):
        if method == "dense":
            mask = Mask(method, "0", "1")
        elif method == "omp":
            mask = Mask(method, sparsity, "1")
        else:
            mask = Mask(method, sparsity, seed)
        if mask not in masks:
            masks.append(mask)
    return masks


def find_mask(mask: Mask, folder: Path, args):
    """One call of tamt.py. The dense model is an OMP mask that removes nothing."""
    objective, _, start = mask.method.partition("-")
    words = ["tamt.py", "--resume", "--model", args.model, "--out", str(folder)]
    if objective == "dense":
        words += ["--method", "omp"]
    elif objective in ("mlm", "kd", "mlm+kd"):
        words += ["--objective", objective]
        if start:
            words += ["--init", start]
    else:
        words += ["--method", objective]
    words += ["--sparsity", mask.sparsity, "--seed", mask.seed]
    if args.data:
        words += ["--data", args.data]
    words += args.extra

    command = shlex.join(["python", *words])
    is_in_results = is_done(command, args.results)
    is_needed = bool(args.tasks) and not (folder / "mask.pt").exists()
    if is_in_results and not is_needed:
        say_skipped(command, args)
        return
    run(words, command)
    if not is_in_results:
        add_line(mask_line(folder), command, args)
    (folder / "state.pt").unlink(missing_ok=True)  # three times the size of the model, and no longer needed


def mask_files(folder: Path, with_checkpoints: bool) -> list[Path]:
    """The final mask, after those of the earlier steps if they are wanted, too."""
    files = [folder / "mask.pt"]
    if with_checkpoints:
        num_updates = mask_line(folder)["steps"]
        checkpoints = sorted(folder.glob("step-*/mask.pt"), key=step_of)
        files = [file for file in checkpoints if step_of(file) < num_updates] + files
    return files


def step_of(file: Path) -> int:
    return int(file.parent.name.removeprefix("step-"))


def fine_tune(mask: Mask, mask_file: Path, args):
    """Calls of finetune.py: each task, each seed, each number of examples."""
    for task, seed, limit in product(args.tasks, args.task_seeds, args.limit):
        name = f"{Path(task).stem}-s{seed}"
        if limit:
            name += f"-n{limit}"
        folder = mask_file.parent / (name + "".join(args.tune).replace("/", "_"))

        words = ["finetune.py", "--resume", "--model", args.model, "--out", str(folder), "--task", task, "--seed", seed]
        if mask.method != "dense":
            words += ["--mask", str(mask_file)]
        if args.task_data:
            words += ["--data", args.task_data]
        if limit:
            words += ["--limit", limit]
        # finetune.py's own lines have paths of this machine in them; the sweep adds its lines itself.
        words += [*args.tune, "--results", str(args.out / "lines.jsonl")]

        command = shlex.join(["python", *words])
        meta = None if mask.method == "dense" else tamt.read_mask(mask_file)[1]
        if is_done(command, args.results, for_export(meta, args)):
            say_skipped(command, args)
        else:
            run(words, command)
            add_line(json.loads((folder / "result.json").read_text()), command, args)


def say_skipped(command: str, args):
    print(f"in {args.results} already, skipped: {command}")


def run(words: list[str], command: str):
    """Runs a program; the sweep ends where one of them fails."""
    print(command, flush=True)
    status = subprocess.run([sys.executable, *words]).returncode
    if status != 0:
        sys.exit(status)


# ---------------------------------------------------------------------------------------------------
# 2. The lines of --results
# ---------------------------------------------------------------------------------------------------


def read_lines(path) -> list[dict]:
    """The lines of a file of JSON lines. A half one, which a killed program left, is passed over with a note."""
    path = Path(path)
    lines = []
    texts = path.read_text().splitlines() if path.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{path}: line {number} is not whole and is passed over", file=sys.stderr)
    return lines


def is_done(command: str, results: Path, meta: dict | None = None) -> bool:
    """Whether a line has this command and, of a fine-tuning, a mask with these metadata. (Lines of older masks have
    fewer.)"""
    for line in read_lines(results):
        of_line = line.get("mask") or {}
        if line.get("command") == command and all((meta or {}).get(name) == of_line[name] for name in of_line):
            return True
    return False


def mask_line(folder: Path) -> dict:
    """What a run of tamt.py left in mask.json and log.jsonl, as one line: settings, dev losses, speed."""
    content = json.loads((folder / "mask.json").read_text())
    settings = content.pop("settings")
    found = content.pop("sparsity")  # that of each matrix; the settings have the one that was asked for
    log = read_lines(folder / "log.jsonl")

    curve = []
    for line in log:
        if "dev_kd_loss" in line:
            curve.append({name: line[name] for name in line if name == "step" or name.startswith("dev_")})
    times = sorted(line["ms_per_step"] for line in log)
    return {
        "task": "pretraining",
        **settings,
        "found": found,
        **content,
        "steps": settings["num_updates"],
        "ms_per_step": times[len(times) // 2] if times else 0,
        "curve": curve,
    }


def for_export(fields: dict | None, args) -> dict | None:
    """Without the paths of this machine."""
    if fields is None:
        return None
    known = {"model": args.model}
    if fields.get("data") is not None:
        known["data"] = Path(str(fields["data"])).name
    return fields | known


def add_line(line: dict, command: str, args):
    """Appends a line, with the model's name as it was typed and of paths to data only the last part."""
    line |= for_export(line, args)
    for name in ("mask", "settings"):
        if line.get(name):
            line[name] = for_export(line[name], args)
    line["command"] = command
    with open(args.results, "ab", buffering=0) as file:  # a single write: the whole line or nothing
        file.write(f"{json.dumps(line)}\n".encode())


def stop(number, frame):
    sys.exit(128 + number)  # subprocess.run ends the program that it waits for


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    main()
