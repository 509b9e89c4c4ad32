"""The tools in dev/ run: the toy's vocabulary and texts, kill.py, sweep.py and bench.py in miniature.

    python -m pytest dev/test_tools.py
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import bert
import tamt
from dev import bench, reactions, sweep, toy
from test_tamt import tiny

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run_tool(*arguments, **environment) -> str:
    """Runs a script of this folder as its reader would -> what it printed."""
    command = [sys.executable, *[str(argument) for argument in arguments]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | ONE_THREAD | environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


# The README and RESULTS.md


def rounds_to(text: str, value) -> bool:
    """Whether a number of a table, such as .970 or 5.29, is this value, rounded."""
    num_decimals = len(text.partition(".")[2])
    return value is not None and f"{value:.{num_decimals}f}" == f"{float(text):.{num_decimals}f}"


def test_every_pair_of_losses_in_a_table_is_in_the_results():
    """Tables give them as masked-LM loss / KD loss, with at least two decimals."""
    lines = sweep.read_lines(ROOT / "dev/results.jsonl")
    pairs = re.findall(r"\| (\d?\.\d\d+) / (\d?\.\d\d+|0) ", (ROOT / "dev/RESULTS.md").read_text())
    assert pairs
    for mlm, kd in pairs:
        assert any(rounds_to(mlm, line.get("dev_mlm_loss")) and rounds_to(kd, line.get("dev_kd_loss"))
                   for line in lines), (mlm, kd)


def test_the_results_hold_no_path_of_the_machine_that_made_them():
    assert '"/' not in (ROOT / "dev/results.jsonl").read_text()


def test_every_mean_over_seeds_is_that_of_the_results():
    """Such as 65.6 ± 4.9: mean and standard deviation of the best scores of one mask with three seeds, unless the text
    says two."""
    scores = defaultdict(dict)
    for line in sweep.read_lines(ROOT / "dev/results.jsonl"):
        if line.get("best"):
            settings = line["settings"]
            network = (line["model"], settings.get("checkpoint"))
            mask = settings.get("masks") or json.dumps(line["mask"])  # a hash of its entries, or how it was made
            options = tuple(settings.get(name) for name in ("limit", "weights", "epochs"))
            experiment = (network, line["task"], mask, options)
            scores[experiment][line["seed"]] = 100 * next(iter(line["best"].values()))
    known = set()
    for by_seed in scores.values():
        if len(by_seed) > 1:
            values = list(by_seed.values())
            known.add(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} ({len(values)})")
    for text in (results_of_today(), (ROOT / "README.md").read_text()):
        cells = re.findall(r"(\d+\.\d ± \d+\.\d)(, two\s+seeds)?", text)
        assert cells
        for cell, two_seeds in cells:
            assert f"{cell} ({2 if two_seeds else 3})" in known, cell


def results_of_today() -> str:
    """RESULTS.md without section 5, which is of older code, and whose tickets differ between seeds."""
    sections = re.split(r"^## ", (ROOT / "dev/RESULTS.md").read_text(), flags=re.MULTILINE)
    text = "## ".join(section for section in sections if not section.startswith("5. "))
    return " ".join(text.split())


def test_every_score_of_the_readme_is_in_a_table_of_results():
    """Such as 81.5, for which there is a cell 81.5 ± 0.3. 82.5 is the paper's, and 50.6 the score of the most frequent
    class."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    results = readme[readme.index("## Does it work?"):readme.index("## With a real BERT")]
    found = set(re.findall(r"(?<![±\d] )\b\d\d\.\d\b(?! million)", results))
    in_tables = set(re.findall(r"(\d\d\.\d) ± \d+\.\d", results_of_today()))
    assert found - in_tables == {"82.5", "50.6"}


def test_each_mask_of_the_readmes_table_was_used_for_both_tasks():
    """Entry for entry: a line holds a hash of the masks that it was fine-tuned under."""
    hashes = defaultdict(lambda: defaultdict(set))
    for line in sweep.read_lines(ROOT / "dev/results.jsonl"):
        if line.get("task") in ("rxn", "pair") and line["mask"]:
            mask = line["mask"]
            made = (mask["method"], mask.get("objective"), mask.get("step"), mask.get("seed"), mask["rank"])
            hashes[made][line["task"], line["settings"]["limit"]].add(line["settings"]["masks"])
    used = {("tamt", "kd", 2400, 2, "global"), ("tamt", "mlm", 2400, 2, "global"), ("imp", None, 2400, 1, "local"),
            ("omp", None, 0, 1, "local")}
    for made in used:
        [of_second_task] = hashes[made]["pair", 256]
        assert of_second_task in hashes[made]["rxn", 1000], made


def test_the_readme_says_what_to_expect_of_the_toy():
    """At 90 %, of the mean of three fine-tunings."""
    scores = defaultdict(dict)
    for line in sweep.read_lines(ROOT / "dev/results.jsonl"):
        if line.get("task") == "toy":
            mask = line["mask"] or {"method": "whole toy"}
            scores[mask.get("objective") or mask["method"]][line["seed"]] = line["best"]["accuracy"]
    means = {}
    for name in ("kd", "omp", "whole toy"):
        assert scores[name].keys() == {1, 2, 3}
        means[name] = np.mean([*scores[name].values()])
    readme = (ROOT / "README.md").read_text()
    rows = ["| TAMT-KD | 0.13 to 0.14 | 0.7 to 1.0 |", "| OMP | 0.5 | 0.5 to 0.7 |", "| whole toy | 0 | nearly 1.0 |"]
    assert "\n".join(rows) in readme
    assert 0.8 < means["kd"] < 1 and 0.55 < means["omp"] < 0.65 and means["whole toy"] > 0.98


def test_the_readme_says_how_long_the_modules_are():
    """All lines, and those before the appendices, to the next ten."""
    readme = (ROOT / "README.md").read_text()
    for name in ("bert", "data", "tamt", "glue_squad", "finetune"):
        [lengths] = re.findall(rf"^\| \[{name}.py\]\({name}.py\) \| (\d+) \| (\d+) \|", readme, re.MULTILINE)
        text = (ROOT / f"{name}.py").read_text()
        for said, part in zip(lengths, (text, text.partition("# Appendix A")[0]), strict=True):
            assert abs(int(said) - part.count("\n")) <= 10, name


def test_every_distance_of_cls_in_a_table_is_in_the_results():
    """Cells such as *.031*."""
    lines = sweep.read_lines(ROOT / "dev/results.jsonl")
    known = {f"{line['cls_distance']:.3f}".removeprefix("0") for line in lines if "cls_distance" in line}
    cells = re.findall(r"\*(\.\d\d\d)\*", (ROOT / "dev/RESULTS.md").read_text())
    assert cells
    assert set(cells) <= known


# The toy


def test_the_toy_has_one_vocabulary(tmp_path):
    """The trainer of WordPiece keeps its words in hash tables, whose order differs between processes."""
    text = tmp_path / "text.txt"
    text.write_text(toy.wikitext(random.Random(0), 400))
    code = ("import sys; from pathlib import Path; from dev import toy; "
            "toy.learn_vocabulary(Path(sys.argv[1]), Path(sys.argv[2]))")
    for name in ("first", "second"):
        run_tool("-c", code, text, tmp_path / name)
    first = (tmp_path / "first" / "vocab.txt").read_bytes()
    second = (tmp_path / "second" / "vocab.txt").read_bytes()
    assert first == second
    assert first.count(b"\n") > 200


def test_the_seed_decides_the_toys_texts_and_tasks():
    assert toy.wikitext(random.Random(1), 3) == toy.wikitext(random.Random(1), 3)
    assert toy.wikitext(random.Random(1), 3) != toy.wikitext(random.Random(2), 3)
    for table in toy.GLUE.values():
        assert toy.draw(table, 5, random.Random(1)) == toy.draw(table, 5, random.Random(1))


def test_answers_stand_where_the_toys_questions_say():
    questions = toy.squad(random.Random(0), num_paragraphs=10, num_answers=3)
    num_answers = 0
    for article in questions["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                for answer in question["answers"]:
                    assert paragraph["context"][answer["answer_start"]:].startswith(answer["text"])
                    num_answers += 1
    assert num_answers == 10 * 8 * 3


# The scripts


@pytest.mark.slow
def test_killed_runs_leave_no_trace():
    assert run_tool("dev/kill.py", "--kills", "2").endswith("2 of 2 identical\n")


@pytest.mark.slow
def test_the_bench_runs_in_miniature(tmp_path):
    pytest.importorskip("transformers")
    lines = run_tool("dev/bench.py", "--toy", "--rounds", 2, "--json", tmp_path / "bench.jsonl")
    assert "MISSED" not in lines  # the losses and gradients of the released step are ours
    figures = sweep.read_lines(tmp_path / "bench.jsonl")
    assert len(figures) > 15
    assert all(np.isfinite(figure["median"]) for figure in figures)


def test_two_four_compares_equal_networks():
    """On a CPU, with the weights as they are instead of torch's semi-structured form."""
    args = argparse.Namespace(toy=True, rounds=1, sizes={"base": bench.TOY})
    figures = list(bench.compare_two_four(args, "cpu", torch.float32, torch.clone, time.perf_counter))
    assert figures[0].values == [0.0]
    assert len(figures) == 3


def test_a_sweep_names_each_mask_once():
    class Arguments:
        methods = ["dense", "omp", "kd"]
        sparsities = ["0.5", "0.7"]
        seeds = ["1", "2"]

    masks = sweep.wanted_masks(Arguments)
    counts = {method: sum(mask.method == method for mask in masks) for method in Arguments.methods}
    assert counts == {"dense": 1, "omp": 2, "kd": 4}


def test_a_sweep_passes_over_half_a_line_and_knows_which_mask_was_fine_tuned(tmp_path, capsys):
    """A mask of another run may lie where the first one lay: the command is the same, its metadata are not."""
    results = tmp_path / "results.jsonl"
    line = {"command": "python finetune.py", "mask": {"step": 1000, "model": "m"}}
    results.write_text(json.dumps(line) + '\n{"command": "pyth\n')
    assert sweep.read_lines(results) == [line]
    assert "line 2 is not whole" in capsys.readouterr().err
    assert sweep.is_done("python finetune.py", results, {"step": 1000, "model": "m", "seed": 1})
    assert not sweep.is_done("python finetune.py", results, {"step": 2000, "model": "m"})


def test_the_masks_of_all_steps_include_a_last_checkpoint_that_is_not_the_final_mask(tmp_path):
    for step in (100, 200, 300):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "mask.pt").touch()
    for num_updates, steps in ((300, [100, 200]), (350, [100, 200, 300])):
        content = {"settings": {"num_updates": num_updates}, "sparsity": {}}
        (tmp_path / "mask.json").write_text(json.dumps(content))
        files = sweep.mask_files(tmp_path, with_checkpoints=True)
        assert [file.parent.name for file in files[:-1]] == [f"step-{step}" for step in steps]
        assert files[-1] == tmp_path / "mask.pt"


def test_the_mask_of_another_program_is_not_drawn_as_the_whole_network():
    pytest.importorskip("matplotlib")
    from dev import figures
    line = {"task": "rte", "best": {"accuracy": 0.5}, "steps": 8, "seed": 1, "sparsity": 0.7,
            "settings": {"batch_size": 8, "epochs": 1, "limit": None}}
    assert figures.as_tuning(line | {"mask": None, "sparsity": 0.0})["name"] == "dense"
    assert figures.as_tuning(line | {"mask": {}})["name"] == "of another program"


@pytest.mark.slow
def test_figures_are_drawn_from_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    output = run_tool("dev/figures.py", "--runs", tmp_path, "--out", tmp_path, "--only", "fig3,fig5,fig8")
    assert "fig8: skipped, it needs folders" in output
    run_tool("dev/figures.py", "--model", "rxnfp", "--runs", tmp_path, "--out", tmp_path, "--only", "headline")
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["fig3.png", "fig5.png", "headline.png"]


def test_the_distance_of_a_mask_that_keeps_everything_is_0_and_of_another_above(tmp_path):
    model = tiny(tmp_path / "model", max_position_embeddings=128)
    (tmp_path / "text.txt").write_text("the cat sees a dog .\n" * 100)
    layers = tamt.install_masked_layers(bert.load(model))
    for sparsity in (0.0, 0.7):
        tamt.save_mask(tmp_path / f"{sparsity}.pt", tamt.magnitude_masks(layers, sparsity, "local"), {})
    run_tool("dev/distance.py", model, tmp_path / "text.txt", tmp_path / "0.0.pt", tmp_path / "0.7.pt",
             "--results", tmp_path / "results.jsonl", TAMT_CACHE=str(tmp_path))
    whole, pruned = sweep.read_lines(tmp_path / "results.jsonl")
    assert whole["cls_distance"] == pytest.approx(0, abs=1e-6)
    assert pruned["cls_distance"] > 0.01


def test_reactions_are_cut_into_atoms_bonds_and_rings():
    tokens = reactions.TOKEN.findall("CC[C@@H](Cl)%12=N.Br>>[nH]1")
    assert tokens == ["C", "C", "[C@@H]", "(", "Cl", ")", "%12", "=", "N", ".", "Br", ">>", "[nH]", "1"]
    tokenizer = reactions.make_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(tokens))])
    assert tokenizer.encode(" ".join(tokens), " ".join(tokens)).tokens == ["[CLS]", *tokens, "[SEP]", *tokens, "[SEP]"]
    assert tokenizer.encode("C ?").tokens == ["[CLS]", "C", "[UNK]", "[SEP]"]
