"""Kills tamt.py and finetune.py at random moments, half of them while a file is half-written, resumes them
till they are done, compares all files with those of an undisturbed run, bit for bit (but times).

    python dev/kill.py                  30 times SIGKILL over twelve cases, about a minute
    python dev/kill.py --signal INT     Ctrl-C instead, which must end with status 130

A file too many (part of one, a second line in results.jsonl) is a difference, too.
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch._dynamo  # noqa: E402  (what the optimisers import at their first use)

import bert  # noqa: E402
import finetune  # noqa: E402
import tamt  # noqa: E402

WORDS = "the a cat dog bird house tree sees likes finds big small red old new good bad runs sits here".split()
FIND = ("--model model --data text.txt --seq-len 16 --batch-size 8 --lr 2e-3 --steps 30 --save-every 2 "
        "--eval-every 5 --log-every 3 --prune-every 6 --method")
TUNE = "--data . --batch-size 8 --max-len 24 --eval-every 3 --epochs 7 --task"
CASES = [(tamt, FIND, "tamt --objective mlm+kd"), (finetune, TUNE, "sst2 --mask mask.pt"),
         (tamt, FIND, "imp --sparsity 0.45"), (finetune, TUNE, "squad --mask mask.pt"),
         (tamt, FIND, "tamt --objective kd"), (tamt, FIND, "tamt --refresh-every 3 --rank local"),
         (tamt, FIND, "imp --no-rewind --rank global"), (finetune, TUNE, "sst2 --model model --limit 50"),
         (finetune, TUNE, "sst2 --model model --find imp --sparsity 0.15"), (tamt, FIND, "omp"),
         (finetune, TUNE, "sst2 --model model --find super --orders losing --limit 20"),
         (tamt, FIND, "random")]


def make_world():
    """In the working folder: a model of 2 layers, 32 wide, whole words; a text, a mask, SST-2 and SQuAD."""
    torch.manual_seed(0)
    rng, vocab = random.Random(0), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    model = bert.Model(bert.Config(len(vocab), 32, 2, 4, 64, 64))
    bert.save("model", model.config, dict(model.named_parameters()), "ForMaskedLM")
    Path("model/vocab.txt").write_text("\n".join(vocab) + "\n")
    masks = tamt.magnitude_masks(tamt.mask_model(model), 0.5, "local")
    tamt.save_mask("mask.pt", masks, {"model": "model"})
    lines = [" ".join(rng.sample(WORDS, 8)) + " ." for _ in range(800)]
    Path("text.txt").write_text("\n".join(lines) + "\n")
    for split, part in (("train", lines[:64]), ("dev", lines[64:96])):
        rows = [f"{x}\t{int('good' in x)}" for x in part]
        Path(f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
        asked = [{"context": x, "qas": [{"id": str(i), "question": "likes", "answers": [
            {"text": x.split()[0], "answer_start": 0}]}]} for i, x in enumerate(part)]
        Path(f"{split}-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": asked}]}))


def start(case: tuple, out: Path, more="") -> int:
    """-> process id. Forked, so that torch is imported only once; it prints into log.txt beside `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if child := os.fork():
        return child
    code, results = 1, f"--results {out}/results.jsonl" if case[0] is finetune else ""
    try:
        with open(out.parent / "log.txt", "ab") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        export = "" if "--find" in case[2] else f"--export {out}/model"
        sys.argv = f"kill.py {case[1]} {case[2]} --out {out} {export} {results} {more}".split()
        code = tamt.run(case[0].main) or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(code)


def wait(child: int, out: Path, due=float("inf"), saving=False, number=0) -> int:
    """-> exit status. Sends signal `number` when it is due; with `saving` at the next half-written file."""
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() >= due and (not saving or any(out.rglob("*.part"))):
            due = os.kill(child, number) or float("inf")
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(ended[1])


def content(file: Path):
    """Bytes; of JSON the values, numbers as written; of state.pt too, as pickles may differ in form."""
    def timeless(fields):
        return {k: x for k, x in fields.items() if k not in ("time", "ms_per_step", "seconds", "command")}

    def plain(x):
        if isinstance(x, (dict, list, tuple)):
            return [plain(part) for part in (x.items() if isinstance(x, dict) else x)]
        return (x.dtype, x.shape, x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x
    if file.suffix in (".json", ".jsonl"):
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        return [json.loads(line, parse_float=str, object_hook=timeless) for line in lines]
    return plain(torch.load(file, weights_only=True)) if file.name == "state.pt" else file.read_bytes()


def try_case(case: tuple, kills: int, folder: Path, rng, number: int) -> int:
    """-> how many of the kills left no trace. A run is hit up to three times before it may end."""
    def files(out):
        return {str(file.relative_to(out)): content(file) for file in out.rglob("*") if file.is_file()}
    began, log, hits, saves, good = time.monotonic(), folder / "log.txt", 0, 0, 0
    assert wait(start(case, folder / "whole"), folder) == 0, log.read_text()
    seconds, expected = time.monotonic() - began, files(folder / "whole")
    for run in range(20 * kills):  # a signal may come too late; then the next run is tried
        out, ends = folder / f"run-{run}", []
        while hits + len(ends) < kills and len(ends) < 3 and 0 not in ends:
            due, saving = time.monotonic() + rng.random() * seconds, rng.random() < 0.5
            ends.append(wait(start(case, out, "--resume"), out, due, saving, number))
            saves += ends[-1] != 0 and any(out.rglob("*.part"))
        ends.append(wait(start(case, out, "--resume"), out))
        found, stops = files(out), sum(status != 0 for status in ends[:-1])
        differ = sorted(f for f in {*expected, *found} if expected.get(f) != found.get(f))
        fine = not differ and not ends[-1] and {*ends} <= {0, 130 if number == signal.SIGINT else -number}
        if not fine:
            print(f"run {run}: exit status {ends}; differs in {', '.join(differ) or 'no file'}")
        hits, good = hits + stops, good + stops * fine
        if hits >= kills:
            break
    steps = " ".join(line.split()[-1] for line in log.read_text().splitlines() if line.startswith("resuming"))
    print(f"{case[0].__name__:8} {case[2]:66} {seconds:4.1f} s  {hits} kills, {saves} in a save  "
          f"{good} identical  went on at {steps or 'the start'}", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description="Kill, resume, compare.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--signal", choices=["KILL", "INT"], default="KILL")
    args, good = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["TAMT_CACHE"] = f"{folder}/cache"
        make_world()
        for i, case in enumerate(CASES):
            if kills := (args.kills - i + len(CASES) - 1) // len(CASES):
                rng, number = random.Random(args.seed * 100 + i), signal.Signals[f"SIG{args.signal}"]
                good += try_case(case, kills, Path(f"case-{i}"), rng, number)
        os.chdir("/")
    print(f"{good} of {args.kills} identical")
    sys.exit(good != args.kills)


if __name__ == "__main__":
    main()
