"""Finds masks and fine-tunes them: methods x sparsities x seeds x tasks, one line in --results for each run.

    python dev/sweep.py --model bert-base --methods dense,mlm --tasks sst2 --task-seeds 1,2 -- --steps 1000

Methods: dense omp random imp mlm kd mlm+kd, mlm-random (random start), ... Flags after -- go to tamt.py (imp
has its own: call it apart), those in --tune="--lr 3e-4" to finetune.py. What --results holds is skipped.
"""
import argparse
import json
import shlex
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

LISTS = {"methods": "omp", "sparsities": "0.7", "seeds": "1", "tasks": "", "task-seeds": "1", "limit": ""}
FLAGS = LISTS | {"model": "toy", "data": "", "task-data": "", "tune": "", "out": "out/sweep"}


def read_lines(path) -> list[dict]:
    return [json.loads(x) for x in Path(path).read_text().splitlines()] if Path(path).exists() else []


def mask_line(folder: Path) -> dict:
    """What a run of tamt.py left in mask.json and log.jsonl, as one line: settings, dev losses, pace."""
    made, log = json.loads((folder / "mask.json").read_text()), read_lines(folder / "log.jsonl")
    curve = [{k: x[k] for k in x if k == "step" or "dev_" in k} for x in log if "dev_kd_loss" in x]
    steps, pace = max([x["step"] for x in log] or [0]), sorted([x["ms_per_step"] for x in log] or [0])
    return {"task": "pretraining", **made.pop("settings"), "found": made.pop("sparsity"), **made,
            "steps": steps, "ms_per_step": pace[len(pace) // 2], "curve": curve}


def run(words: list[str], folder: Path, args):
    """One call of a program, resumable in `folder`, and its line in --results unless it is there already."""
    words = [words[0], "--resume", "--model", args.model, "--out", str(folder), *words[1:]]
    command, find = shlex.join(["python", *words]), words[0] == "tamt.py"
    held = any(line.get("command") == command for line in read_lines(args.results))
    if held and not (find and args.tasks and not (folder / "mask.pt").exists()):
        return
    print(command, flush=True)
    if code := subprocess.run([sys.executable, *words]).returncode:
        sys.exit(code)
    line = mask_line(folder) if find else json.loads((folder / "result.json").read_text())
    for part in filter(None, (line.get("mask"), line.get("settings"))):  # paths as typed, or names
        part |= {"model": args.model, "data": Path(str(part.get("data"))).name}
    line = b"" if held else f"{json.dumps({**line, 'model': args.model, 'command': command})}\n".encode()
    with open(args.results, "ab", buffering=0) as file:  # one write: the whole line or nothing
        file.write(line)
    (folder / "state.pt").unlink(missing_ok=True)  # three times the model's size, and no longer needed


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name, default in {**FLAGS, "results": "dev/results.jsonl"}.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--checkpoints", action="store_true", help="also fine-tune all but the last step-N")
    parser.add_argument("extra", nargs="*", metavar="-- FLAGS")
    args = parser.parse_args()
    methods, sparsities, seeds, *tunes = (vars(args)[name.replace("-", "_")].split(",") for name in LISTS)
    flags = lambda **given: [x for k, v in given.items() if v for x in (f"--{k}", str(v))]  # noqa: E731
    runs = {(m, s if m != "dense" else "0", seed if m not in ("dense", "omp") else "1"): m.partition("-")
            for s, seed, m in product(sparsities, seeds, methods)}  # one dense model, one OMP mask a sparsity
    for (method, s, seed), (kind, _, init) in runs.items():
        own, folder = flags(method=kind.replace("dense", "omp")), Path(args.out, f"{method}-{s}-s{seed}")
        own = flags(objective=kind, init=init) if kind in ("mlm", "kd", "mlm+kd") else own
        run(["tamt.py", *own, *flags(sparsity=s, seed=seed, data=args.data), *args.extra], folder, args)
        steps = sorted(folder.glob("step-*/mask.pt"), key=lambda path: int(path.parent.name[5:]))[:-1]
        masks = (steps * args.checkpoints + [folder / "mask.pt"]) * bool(args.tasks)
        for mask, task, t, n in product(masks, *tunes):
            own = [*flags(mask=kind != "dense" and mask, data=args.task_data, limit=n), *args.tune.split()]
            words = ["finetune.py", "--task", task, "--seed", t, *own, "--results", f"{args.out}/lines.jsonl"]
            run(words, mask.parent / "".join([task, "-s", t, n and "-n", n, *args.tune.split()]), args)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # subprocess.run takes its child along
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    main()
