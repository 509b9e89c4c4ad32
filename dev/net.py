"""A net below the rewriting: records what one version of the program computes, and compares another with it.

    python dev/net.py --code OLD --work FOLDER --write dev/net.json
    python dev/net.py --code NEW --work FOLDER2 --compare dev/net.json --against FOLDER

A case is one run of tamt.py or finetune.py, or one set of token ids. Of a run are kept: every mask, every
loss, every score. Only what stays the same over the rewriting is used: the two command lines, the files that
runs write, and seven functions, called in a process of their own with the checkout as working folder:
tamt.load_mask, data.vocabulary, data.corpus, glue_squad.load_glue, encode, load_squad, windows.

--against names the --work folder of the recording that is compared with: there lie the bits of its masks,
with which differing entries are counted. --toy FOLDER takes a toy that is made already (CACHE/toy of another
--work folder) instead of making it. --only TEXT runs the cases whose name holds TEXT. The folders cache,
models, texts, runs and bits below --work are made anew at each call.

A full run takes about five minutes on one free core, of which the toy takes a minute and a half.
Exit status 1: a run failed, something is missing, a mask differs in more than 1 of 10,000 entries, a loss or
a score by more than 1e-5, or token ids differ. Runs amplify rounding: gradients of the scores larger by one
part in 2^23 left all masks alone that were tried (6 cases), but moved a loss of toy/mlm+kd/local by 7e-5.
This file goes when the rewriting is done.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

LARGEST_SHARE = 1e-4  # of differing mask entries
LARGEST_DIFFERENCE = 1e-5  # of losses and scores
TIMEOUT = 600  # seconds for one run


class Case(NamedTuple):
    name: str
    command: list[str]  # program and arguments; --out and the like are added by run_case
    needs: str | None = None  # name of the case whose mask it reads


# ---------------------------------------------------------------------------------------------
# 1. The cases
# ---------------------------------------------------------------------------------------------


def all_cases(work: Path, shared: Path) -> list[Case]:
    """Every run. The toy comes first: it makes the model and the texts that the other toy cases read."""
    toy = ["--model", str(work / "models/toy"), "--data", "toy"]
    tiny = ["--model", str(work / "models/tiny"), "--data", str(work / "texts/wiki")]
    cases = [Case("toy/made", ["tamt.py", "--model", "toy", "--method", "omp", "--data", "toy"])]

    for model_name, model in (("toy", toy), ("tiny", tiny)):
        cases += mask_cases(model_name, model)

    # The toy under its own name has dropout; the copy in models/ has none.
    named_toy = ["--model", "toy", "--data", "toy"]
    cases.append(Case("toy/dropout", tamt_command(named_toy, "mlm", "global")))
    refresh = [*tamt_command(toy, "mlm", "global"), "--refresh-every", "10"]
    cases.append(Case("toy/refresh-10", refresh))

    cases += task_cases(work, shared)
    cases += search_cases(work)
    return cases


def tamt_command(model: list[str], objective: str, rank: str) -> list[str]:
    command = ["tamt.py", *model, "--method", "tamt", "--objective", objective, "--rank", rank]
    command += ["--sparsity", "0.7", "--steps", "60", "--lr", "1e-3", "--batch-size", "8"]
    return [*command, "--seq-len", "64", "--log-every", "1", "--eval-every", "30", "--save-every", "60"]


def mask_cases(model_name: str, model: list[str]) -> list[Case]:
    cases = []
    for objective in ("mlm", "kd", "mlm+kd"):
        for rank in ("global", "local"):
            cases.append(Case(f"{model_name}/{objective}/{rank}", tamt_command(model, objective, rank)))

    for method in ("omp", "random"):
        for rank in ("global", "local"):
            command = ["tamt.py", *model, "--method", method, "--rank", rank, "--sparsity", "0.7"]
            cases.append(Case(f"{model_name}/{method}/{rank}", [*command, "--seq-len", "64"]))

    command = ["tamt.py", *model, "--method", "imp", "--rank", "local", "--sparsity", "0.5"]
    command += ["--prune-every", "8", "--lr", "1e-3", "--batch-size", "8", "--seq-len", "64"]
    cases.append(Case(f"{model_name}/imp", [*command, "--log-every", "1"]))
    return cases


def task_cases(work: Path, shared: Path) -> list[Case]:
    """Fine-tuning under OMP masks: of bert-tiny, and of the toy on tasks with metrics of their own."""
    mask_case = "tiny/omp/local"
    ticket = ["--mask", str(run_folder(work, mask_case) / "out/mask.pt")]
    ticket += ["--model", str(work / "models/tiny")]

    rte = ["finetune.py", "--task", "rte", *ticket, "--data", str(shared / "data/glue")]
    rte += ["--limit", "200", "--epochs", "1", "--batch-size", "32", "--max-len", "64"]
    rte += ["--lr", "3e-4", "--eval-every", "5"]

    squad = ["finetune.py", "--task", "squad", *ticket, "--data", str(work / "texts/squad")]
    squad += ["--epochs", "1", "--batch-size", "16", "--max-len", "128"]
    squad += ["--lr", "3e-4", "--eval-every", "5"]

    cases = [Case("task/rte", rte, mask_case), Case("task/squad", squad, mask_case)]
    toy_mask_case = "toy/omp/local"
    for task in ("cola", "mrpc", "stsb"):
        command = ["finetune.py", "--task", task, *toy_task(work)]
        command += ["--mask", str(run_folder(work, toy_mask_case) / "out/mask.pt")]
        cases.append(Case(f"task/toy-{task}", command, toy_mask_case))
    return cases


def toy_task(work: Path) -> list[str]:
    """What all runs of finetune.py on the toy share."""
    arguments = ["--model", str(work / "models/toy"), "--data", str(work / "cache/toy/tasks")]
    arguments += ["--epochs", "1", "--limit", "200", "--batch-size", "16", "--max-len", "64"]
    return [*arguments, "--lr", "1e-3", "--eval-every", "5"]


def search_cases(work: Path) -> list[Case]:
    """Tickets found on the toy's tasks."""
    imp = ["finetune.py", "--task", "sst2", "--find", "imp", "--sparsity", "0.3", *toy_task(work)]
    super_tickets = ["finetune.py", "--task", "rte", "--find", "super", *toy_task(work)]
    super_tickets += ["--orders", "winning", "losing"]
    return [Case("find/imp", imp), Case("find/super", super_tickets)]


# Runs in the checkout; its arguments are the work folder and shared/. Prints {name: sha256} as JSON.
TOKEN_IDS = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
import data, glue_squad

work, shared = map(Path, sys.argv[1:])
glue = shared / "data/glue"
found = {}

def digest(arrays):
    sha256 = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array, np.int64)
        sha256.update(f"{array.shape}".encode() + array.tobytes())
    return sha256.hexdigest()

def add_task(name, task, folder, vocab):
    pairs = glue_squad.encode(glue_squad.load_glue(task, "dev", folder), vocab, 128)
    found[f"{name}: {len(pairs)} examples"] = digest([ids for ids, _ in pairs])
    found[f"{name}: segments"] = digest([segments for _, segments in pairs])

def add_text(name, source, vocab, seq_len):
    read_corpus = getattr(data, "corpus_rows", None) or data.corpus
    rows = read_corpus(source, vocab, seq_len, "dev")
    found[f"{name}: {len(rows)} rows"] = digest([rows])

wordpiece = data.vocabulary(work / "models/tiny")
bpe = data.vocabulary(shared / "data/tokenizers/roberta-base")
fairseq_bpe = data.vocabulary(work / "models/fairseq-bpe")
symbols = data.vocabulary(shared / "data/models/sapiens-fairseq")

for task in ("cola", "sst2", "mrpc", "stsb", "mnli", "rte", "wnli"):
    add_task(task, task, work / "texts/MRPC" if task == "mrpc" else glue, wordpiece)
add_task("mnli, original columns", "mnli", glue / "MNLI-original-columns", wordpiece)
add_task("rte, roberta-base", "rte", glue, bpe)
add_task("rte, roberta-base of fairseq", "rte", glue, fairseq_bpe)

add_text("wiki.valid", shared / "data/wiki/wikitext-103", wordpiece, 128)
add_text("wiki.valid, its first 60 kB", work / "texts/wiki", wordpiece, 64)
add_text("wiki.valid, its first 60 kB, roberta-base", work / "texts/wiki", bpe, 128)
add_text("one file, vl.txt", shared / "data/antibody/vl.txt", symbols, 100)
add_text("a folder, all of vl.txt", work / "texts/antibody", symbols, 100)

questions = glue_squad.load_squad(work / "texts/squad/dev-v1.1.json")
for max_len in (128, 384):
    make_windows = getattr(glue_squad, "make_windows", None) or glue_squad.windows
    windows = make_windows(questions, wordpiece, max_len)
    # The second and third field of a window are token ids and segments, whatever they are called.
    found[f"squad, {max_len}: {len(windows)} windows"] = digest([window[1] for window in windows])
    found[f"squad, {max_len}: segments"] = digest([window[2] for window in windows])

print(json.dumps(found))
"""


# ---------------------------------------------------------------------------------------------
# 2. Inputs below --work
# ---------------------------------------------------------------------------------------------


def make_inputs(work: Path, shared: Path, toy: Path | None):
    """Copies and small parts of the real inputs. The toy's model follows in copy_toy, once it is made."""
    for name in ("cache", "models", "texts", "runs", "bits"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir(parents=True)
    if toy:
        shutil.copytree(toy, work / "cache/toy")
    copy_without_dropout(shared / "data/models/bert-tiny-mlm", work / "models/tiny")

    # RoBERTa's tokenizer as fairseq ships it, without the Hugging Face files beside it.
    roberta, fairseq = shared / "data/tokenizers/roberta-base", work / "models/fairseq-bpe"
    fairseq.mkdir()
    shutil.copy(roberta / "dict.txt", fairseq)
    shutil.copy(roberta / "fairseq_encoder.json", fairseq / "encoder.json")
    shutil.copy(roberta / "fairseq_vocab.bpe", fairseq / "vocab.bpe")

    wiki = work / "texts/wiki"
    wiki.mkdir()
    cut_lines(shared / "data/wiki/enwiki_subset.txt", wiki / "wiki.train.tokens", 3_000_000)
    cut_lines(shared / "data/wiki/wikitext-103/wiki.valid.tokens", wiki / "wiki.valid.tokens", 60_000)

    (work / "texts/antibody").mkdir()
    shutil.copy(shared / "data/antibody/vl.txt", work / "texts/antibody/wiki.valid.raw")
    shutil.copytree(shared / "data/glue/MRPC", work / "texts/MRPC")
    make_squad(shared / "data/squad/dev-v1.1.rebuilt.json", work / "texts/squad", 200)


def copy_without_dropout(source: Path, target: Path):
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["hidden_dropout_prob"] = 0.0
    config["attention_probs_dropout_prob"] = 0.0
    (target / "config.json").write_text(json.dumps(config, indent=1))


def cut_lines(source: Path, target: Path, num_bytes: int):
    """The first num_bytes of a text, up to the last whole line."""
    with open(source, "rb") as file:
        text = file.read(num_bytes)
    target.write_bytes(text[:text.rindex(b"\n") + 1])


def make_squad(source: Path, folder: Path, num_questions: int):
    """train-v1.1.json and dev-v1.1.json: both the first questions of `source`."""
    content = json.loads(source.read_text())
    left = num_questions
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = paragraph["qas"][:left]
            left -= len(paragraph["qas"])
        article["paragraphs"] = [x for x in article["paragraphs"] if x["qas"]]
    content["data"] = [article for article in content["data"] if article["paragraphs"]]

    folder.mkdir()
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (folder / name).write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------
# 3. Run and read
# ---------------------------------------------------------------------------------------------


def run_folder(work: Path, name: str) -> Path:
    return work / "runs" / name.replace("/", "-")


def run_python(code: Path, work: Path, arguments: list[str]) -> subprocess.CompletedProcess:
    """Python in the checkout under test, with one thread, a cache of its own and no network."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", TAMT_CACHE=str(work / "cache"))
    environment.update(HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    for name in ("PYTHONPATH", "RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    return subprocess.run([sys.executable, *arguments], cwd=code, env=environment, text=True,
                          capture_output=True, timeout=TIMEOUT)


def run_case(case: Case, code: Path, work: Path) -> dict:
    """Runs it -> {"masks": {}, "numbers": {..}}, or {"error": last line of stderr}; masks come later."""
    folder = run_folder(work, case.name)
    folder.mkdir(parents=True)
    arguments = [*case.command, "--seed", "1", "--device", "cpu", "--dtype", "fp32"]
    arguments += ["--out", str(folder / "out")]
    if case.command[0] == "finetune.py":
        arguments += ["--results", str(folder / "results.jsonl")]

    result = run_python(code, work, arguments)
    (folder / "output.txt").write_text(result.stdout + result.stderr)
    if result.returncode:
        return {"error": (result.stderr.strip() or "no message").splitlines()[-1]}

    for state in folder.rglob("state.pt"):  # large, and nothing that is compared
        state.unlink()
    return {"masks": {}, "numbers": read_numbers(folder)}


def read_numbers(folder: Path) -> dict[str, list[float]]:
    """All losses and scores in the files of a run, as {"file: what": list}."""
    numbers = {}
    for path in sorted(folder.rglob("*.json*")):
        name = str(path.relative_to(folder))
        if path.name == "log.jsonl":
            lines = read_lines(path)
            for key in ("loss", "dev_mlm_loss", "dev_kd_loss"):
                numbers[f"{name}: {key}"] = [line[key] for line in lines if key in line]
        elif path.name == "results.jsonl":
            for number, line in enumerate(read_lines(path), 1):
                numbers[f"{name}: line {number}"] = scores_of(line)
        elif path.name == "result.json":
            result = json.loads(path.read_text())
            numbers[f"{name}: best, final"] = scores_of(result)
            for evaluation in result["evaluations"]:
                values = [evaluation[key] for key in sorted(evaluation) if key != "step"]
                numbers[f"{name}: step {evaluation['step']}"] = values
        elif path.name == "importance.json":
            importance = json.loads(path.read_text())
            numbers[f"{name}: heads"] = np.ravel(importance["heads"]).tolist()
            numbers[f"{name}: ffn"] = np.ravel(importance["ffn"]).tolist()
        elif path.name == "mask.json":
            report = json.loads(path.read_text())
            found = [report[key] for key in ("dev_mlm_loss", "dev_kd_loss") if key in report]
            numbers[f"{name}: dev losses"] = found

    rounded = {}
    for name, values in numbers.items():
        if values:
            rounded[name] = [round(float(value), 7) for value in values]
    return rounded


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores_of(result: dict) -> list[float]:
    """Best and final scores, each in the order of their names, and the step of the best."""
    scores = [result["best"][name] for name in sorted(result["best"])]
    scores += [result["final"][name] for name in sorted(result["final"])]
    return [*scores, result["best_step"]]


# Runs in the checkout; its arguments are the folder for bits and, in pairs, a name for a mask and its file.
# "kept" holds the number of kept entries of each matrix, in the order of the matrices' names.
READ_MASKS = """
import hashlib, json, sys
import numpy as np
import tamt

def sha256(content):
    return hashlib.sha256(content).hexdigest()

folder, *pairs = sys.argv[1:]
found = {}
for name, file in zip(pairs[::2], pairs[1::2]):
    masks = tamt.load_mask(file)
    names = sorted(masks)
    entries = np.concatenate([masks[x].numpy().ravel() for x in names])
    bits = np.packbits(entries)
    np.save(f"{folder}/{name}.npy", bits)
    kept = [int(masks[x].sum()) for x in names]
    shapes = " ".join(f"{x} {list(masks[x].shape)}" for x in names)
    found[name] = {"sha256": sha256(bits.tobytes()), "names and shapes": sha256(shapes.encode())[:16],
                   "entries": len(entries), "kept": kept}
print(json.dumps(found))
"""


def mask_name(case_name: str, path: str) -> str:
    """A file name for the bits of a mask."""
    return f"{case_name}/{path}".replace("/", "-")


def add_masks(values: dict, code: Path, work: Path):
    """Reads the masks of all runs in one process of the checkout."""
    places, pairs = {}, []
    for case_name, found in values.items():
        folder = run_folder(work, case_name)
        for path in sorted(folder.rglob("*.pt")):
            if "masks" in found:
                place = str(path.relative_to(folder))
                name = mask_name(case_name, place)
                places[name] = (found["masks"], place)
                pairs += [name, str(path)]
    if not pairs:
        return

    result = run_python(code, work, ["-c", READ_MASKS, str(work / "bits"), *pairs])
    if result.returncode:
        raise SystemExit(f"the masks could not be read:\n{result.stderr}")
    for name, mask in json.loads(result.stdout.splitlines()[-1]).items():
        masks, place = places[name]
        masks[place] = mask


def run_token_ids(code: Path, work: Path, shared: Path) -> dict:
    result = run_python(code, work, ["-c", TOKEN_IDS, str(work), str(shared)])
    if result.returncode:
        return {"error": result.stderr.strip().splitlines()[-1]}
    return {"hashes": json.loads(result.stdout.splitlines()[-1])}


def hash_files(folder: Path) -> dict[str, str]:
    """The toy, file by file for its model and text, all tasks as one."""
    hashes, tasks = {}, hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_file() and place.parts[0] == "tasks":
            tasks.update(str(place).encode() + path.read_bytes())
        elif path.is_file():
            hashes[str(place)] = hashlib.sha256(path.read_bytes()).hexdigest()
    hashes["tasks"] = tasks.hexdigest()
    return hashes


def record(cases: list[Case], args) -> dict:
    """Runs the chosen cases -> {case name: what it computed}."""
    chosen = {case.name for case in cases if args.only in case.name}
    chosen |= {case.needs for case in cases if case.name in chosen and case.needs}
    if any(name.startswith(("toy/", "task/toy", "find/")) for name in chosen):
        chosen.add("toy/made")

    make_inputs(args.work, args.shared, args.toy)
    values = {}
    for case in cases:
        if case.name not in chosen:
            continue
        began = time.time()
        found = run_case(case, args.code, args.work)
        if case.name == "toy/made" and "error" not in found:
            found["hashes"] = hash_files(args.work / "cache/toy")
            copy_without_dropout(args.work / "cache/toy/model", args.work / "models/toy")
        values[case.name] = found
        print(f"ran {case.name} in {time.time() - began:.1f} s", found.get("error", ""), flush=True)

    add_masks(values, args.code, args.work)
    if args.only in "token ids":
        values["token ids"] = run_token_ids(args.code, args.work, args.shared)
    return values


# ---------------------------------------------------------------------------------------------
# 4. Compare
# ---------------------------------------------------------------------------------------------


def compare_case(name: str, old: dict, new: dict, work: Path, against: Path | None) -> tuple[str, bool]:
    """-> what differs, in words ("equal" if nothing does), and whether that is too much."""
    if "error" in new:
        return f"FAILED: {new['error']}", True
    remarks, failed = [], False

    for kind in ("masks", "numbers", "hashes"):
        differing = sorted(old.get(kind, {}).keys() ^ new.get(kind, {}).keys())
        if differing:
            remarks.append(f"{kind} on one side only: {', '.join(differing)}")
            failed = True

    count, total, unknown = count_mask_entries(name, old, new, work, against)
    if count:
        remarks.append(f"masks differ in {count:,} of {total:,} entries")
        failed |= count > LARGEST_SHARE * total
    if unknown:
        remarks.append(f"masks differ in an unknown number of entries: {', '.join(unknown)}")
        failed = True

    largest, place = largest_difference(old.get("numbers", {}), new.get("numbers", {}))
    if largest:
        remarks.append(f"largest difference of numbers {largest:.1e} ({place})")
        failed |= not largest <= LARGEST_DIFFERENCE

    old_hashes, new_hashes = old.get("hashes", {}), new.get("hashes", {})
    changed = [key for key in old_hashes if key in new_hashes and old_hashes[key] != new_hashes[key]]
    if changed:
        remarks.append(f"contents differ: {', '.join(changed)}")
        failed = True

    return "; ".join(remarks) or "equal", failed


def count_mask_entries(name, old, new, work, against) -> tuple[int, int, list[str]]:
    """Over the masks that differ in a case, the worst one: differing entries, entries; and masks whose
    differing entries cannot be counted."""
    worst, worst_total, unknown = 0, 1, []
    for place, mask in old.get("masks", {}).items():
        other = new["masks"].get(place)
        if other is None or other == mask:
            continue
        file = f"{mask_name(name, place)}.npy"
        if other["names and shapes"] != mask["names and shapes"]:
            unknown.append(f"{place} (names or shapes)")
            continue
        if against is None or not (against / "bits" / file).is_file():
            unknown.append(place)
            continue
        old_bits, new_bits = np.load(against / "bits" / file), np.load(work / "bits" / file)
        count = int(np.unpackbits(old_bits ^ new_bits).sum())
        if count / mask["entries"] > worst / worst_total:
            worst, worst_total = count, mask["entries"]
    return worst, worst_total, unknown


def largest_difference(old: dict, new: dict) -> tuple[float, str]:
    """-> the largest, and where it is. Lists of unlike length differ by infinity."""
    largest, place = 0.0, ""
    for key in old.keys() & new.keys():
        difference = float("inf")
        if len(old[key]) == len(new[key]):
            difference = float(np.abs(np.subtract(old[key], new[key])).max())
        if difference > largest or np.isnan(difference):
            largest, place = difference, key
    return largest, place


def compare(values: dict, recorded: dict, args) -> bool:
    """Prints one line per case -> whether anything differs by too much."""
    any_failed = False
    for name in values:
        if name not in recorded:
            print(f"{name:22} not in {args.compare}")
            any_failed = True
            continue
        text, failed = compare_case(name, recorded[name], values[name], args.work, args.against)
        print(f"{name:22} {'TOO MUCH: ' if failed else ''}{text}")
        any_failed |= failed
    return any_failed


def write_values(path: Path, values: dict):
    """One line per case."""
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in values.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description="Records what a version computes, or compares with that.")
    parser.add_argument("--code", type=Path, required=True, help="checkout under test")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs, made anew")
    parser.add_argument("--shared", type=Path, help="real inputs (../shared of the checkout)")
    parser.add_argument("--toy", type=Path, help="a toy made already, e.g. OTHER_WORK/cache/toy")
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--against", type=Path, help="--work folder of the recording")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, help="file for the recorded values")
    action.add_argument("--compare", type=Path, help="file of recorded values")
    args = parser.parse_args()

    args.code, args.work = args.code.resolve(), args.work.resolve()
    args.shared = (args.shared or args.code.parent / "shared").resolve()
    args.toy = args.toy.resolve() if args.toy else None
    if args.against and args.against.resolve() == args.work:
        parser.error("--against is the --work folder, which is made anew")
    if args.toy and args.work in args.toy.parents:
        parser.error("--toy lies below the --work folder, which is made anew")

    values = record(all_cases(args.work, args.shared), args)
    if args.write:
        write_values(args.write, values)
        failed = any("error" in found for found in values.values())
    else:
        failed = compare(values, json.loads(args.compare.read_text()), args)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
