"""The two programs as a user starts them: what they print, what they refuse, and what --resume goes on with.

    python -m pytest dev/test_commands.py
"""

import ast
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

import bert
import data
import finetune
import tamt
from helpers import (
    assert_one_error_line,
    edit_json,
    exit_status,
    lines_of_results,
    run_finetune,
    run_tamt,
    share_of_flips,
    stop_fine_tuning_at,
    watch_rankings,
    weight_bytes,
)
from test_tamt import (
    ROOT,
    finetune_settings,
    interrupt_after,
    mask_settings,
    same_masks,
    tiny,
    write,
)

# ---------------------------------------------------------------------------------------------------
# tamt: folders and --resume
# ---------------------------------------------------------------------------------------------------


def test_find_mask_and_the_command_line_learn_the_same_mask(inputs, tmp_path):
    tamt.find_mask(mask_settings(inputs, tmp_path / "a", objective="kd"))
    assert run_tamt(inputs, tmp_path / "b", "--objective", "kd", "--lr", 2e-3, "--device", "cpu") == 0
    assert (tmp_path / "a" / "mask.pt").read_bytes() == (tmp_path / "b" / "mask.pt").read_bytes()
    assert share_of_flips(tmp_path / "a") > 0.01  # it is not the start mask


@pytest.fixture
def unfinished(inputs, tmp_path, monkeypatch):
    """The folder of a run that was interrupted after its state was saved at update 5."""
    interrupt_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        tamt.find_mask(mask_settings(inputs, tmp_path / "unfinished", save_every=5))
    return tmp_path / "unfinished"


def test_unfinished_mask_training_is_not_overwritten(inputs, unfinished):
    state = (unfinished / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="unfinished at step 5.*--resume"):
        tamt.find_mask(mask_settings(inputs, unfinished, save_every=5))
    assert (unfinished / "state.pt").read_bytes() == state


def test_unfinished_mask_training_is_not_resumed_with_other_settings(inputs, unfinished):
    state = (unfinished / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="another run.*clip 1.0 there, 0.5 here"):
        tamt.find_mask(mask_settings(inputs, unfinished, save_every=5, resume=True, clip=0.5))
    assert (unfinished / "state.pt").read_bytes() == state


def test_resume_of_finished_mask_training_can_still_export(inputs, tmp_path):
    settings = mask_settings(inputs, tmp_path / "run", steps=3, export=tmp_path / "at once")
    tamt.find_mask(settings)
    tamt.find_mask(dataclasses.replace(settings, resume=True, export=tmp_path / "later"))
    assert weight_bytes(tmp_path / "later") == weight_bytes(tmp_path / "at once")


def test_resume_of_a_finished_run_changes_nothing_and_returns_its_result(inputs, tmp_path, capsys):
    content = tamt.find_mask(mask_settings(inputs, tmp_path, steps=3))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    printed = capsys.readouterr().out
    assert tamt.find_mask(mask_settings(inputs, tmp_path, steps=3, resume=True)) == content
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    assert capsys.readouterr().out.partition("---")[2] == printed.partition("---")[2]  # the block that grep reads

    (tmp_path / "mask.pt").unlink()
    with pytest.raises(ValueError, match="its mask.pt is gone"):
        tamt.find_mask(mask_settings(inputs, tmp_path, steps=3, resume=True))


@pytest.mark.parametrize("change", ["text", "dev_text", "weights", "config"])
def test_resume_of_mask_training_is_refused_after_its_input_has_changed(inputs, tmp_path, monkeypatch, change):
    shutil.copytree(inputs / "bert", tmp_path / "model")
    shutil.copyfile(inputs / "text.txt", tmp_path / "text.txt")
    values = {"model": str(tmp_path / "model"), "data": str(tmp_path / "text.txt"), "resume": True}
    interrupt_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        tamt.find_mask(mask_settings(inputs, tmp_path / "run", **values))

    text = (tmp_path / "text.txt").read_text()
    if change == "text":
        (tmp_path / "text.txt").write_text(text.replace("the", "cat", 1))
    if change == "dev_text":
        position = text.rindex("the")
        (tmp_path / "text.txt").write_text(f"{text[:position]}cat{text[position + 3:]}")
    if change == "weights":
        tiny(tmp_path / "model", seed=1)
    if change == "config":
        edit_json(tmp_path / "model" / "config.json", num_attention_heads=2)
    with pytest.raises(ValueError, match=f"another run \\({change} .* there, .* here\\)"):
        tamt.find_mask(mask_settings(inputs, tmp_path / "run", **values))


def test_mask_training_is_the_same_under_another_spelling_of_its_paths(inputs, tmp_path, monkeypatch):
    shutil.copytree(inputs / "bert", tmp_path / "model")
    shutil.copyfile(inputs / "text.txt", tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    interrupt_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        tamt.find_mask(mask_settings(inputs, Path("run"), model="model", data="text.txt"))
    steps = []
    watch_rankings(monkeypatch, lambda layers, step: steps.append(step))
    tamt.find_mask(mask_settings(inputs, tmp_path / "run", model=f"{tmp_path}/./model",
                                 data=f"{tmp_path}/model/../text.txt", resume=True))
    assert steps == list(range(steps[0], 13)) and steps[0] > 1  # resumed, not begun anew


def test_next_after_evaluating_the_whole_network_is_mask_training_on_the_same_text(inputs, capsys):
    tamt.evaluate_mask(mask_settings(inputs, evaluate=True, lines=True))
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line == f"next: python tamt.py --model {inputs}/bert --data {inputs}/text.txt --seq-len 16 --lines"


NAMES = {"bert-tamt-mlm-0.7-s1": {},
         "bert-tamt-kd-0.5-local-s1": {"objective": "kd", "sparsity": 0.5, "rank": "local"},
         "bert-tamt-mlm+kd-0.7-encoder-s2": {"objective": "mlm+kd", "scope": "encoder", "seed": 2},
         "bert-tamt-mlm-0.5-2-4-s1": {"rank": "2:4"},
         "bert-omp-0.7-s1": {"method": "omp", "objective": "kd"},
         "bert-random-0.7-global-encoder-s1": {"method": "random", "rank": "global", "scope": "encoder"},
         "bert-imp-0.35-s1": {"method": "imp", "sparsity": 0.35, "prune_every": 12}}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_out_goes_into_a_folder_named_after_it(inputs, name):
    machine = tamt.Machine(torch.device("cpu"))
    run = tamt.fill_in_defaults(mask_settings(inputs, **NAMES[name]), machine, bert.load(inputs / "bert"))
    assert run.out == Path("out") / name


@pytest.mark.parametrize("method,flags,noted", [
    ("omp", ["--lr", 1e-3, "--objective", "kd", "--compile"], ["--objective", "--lr", "--compile"]),
    ("imp", ["--init", "random", "--refresh-every", 5, "--prune-every", 1, "--sparsity", 0.2],
     ["--init", "--refresh-every"]),
    ("tamt", ["--prune-every", 5, "--no-rewind"], ["--prune-every", "--no-rewind"])])
def test_a_flag_without_effect_is_noted_and_the_run_goes_on(inputs, tmp_path, capsys, method, flags, noted):
    argv = ["--model", inputs / "bert", "--data", inputs / "text.txt", "--seq-len", 16, "--out", tmp_path]
    if method == "tamt":
        argv += ["--steps", 2]
    assert exit_status(tamt.main, *argv, "--method", method, *flags) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    for flag in noted:
        assert f"note: {flag} has no effect with --method {method}" in notes
    assert (tmp_path / "mask.pt").exists()



WITHOUT_EFFECT = {
    "omp": {"objective": "kd", "init": "random", "steps": 3, "lr": 1e-2, "clip": 0.1, "batch_size": 4, "accumulate": 2,
            "refresh_every": 5, "log_every": 2, "eval_every": 2, "save_every": 2, "prune_every": 5, "no_rewind": True},
    "imp": {"init": "random", "refresh_every": 5, "eval_every": 2},
    "tamt": {"prune_every": 5, "no_rewind": True}}
WITHOUT_EFFECT["random"] = WITHOUT_EFFECT["omp"]


@pytest.mark.parametrize("method", WITHOUT_EFFECT)
def test_flags_that_are_noted_as_without_effect_change_no_mask(inputs, tmp_path, capsys, method):
    flags = WITHOUT_EFFECT[method]
    values = {"method": method, "steps": 6, "sparsity": 0.2} | ({"prune_every": 3} if method == "imp" else {})
    tamt.find_mask(mask_settings(inputs, tmp_path / "plain", **values))
    capsys.readouterr()
    settings = mask_settings(inputs, tmp_path / "flags", **values | flags)
    tamt.note_flags_without_effect(settings)
    notes = capsys.readouterr().out
    assert all(f"note: --{name.replace('_', '-')} has no effect" in notes for name in flags)
    tamt.find_mask(settings)
    assert same_masks(tamt.load_mask(tmp_path / "flags"), tamt.load_mask(tmp_path / "plain"))


def test_flags_that_evaluating_a_mask_ignores_are_noted(inputs, tmp_path, capsys):
    tamt.find_mask(mask_settings(inputs, tmp_path, method="omp"))
    argv = ["--mask", tmp_path, "--model", inputs / "bert", "--export", tmp_path / "export"]
    assert exit_status(tamt.main, *argv, "--method", "omp", "--sparsity", 0.5) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: --{flag} has no effect with --evaluate or --mask"
                     for flag in ("method", "sparsity")]


# ---------------------------------------------------------------------------------------------------
# tamt: mask files, and what is printed
# ---------------------------------------------------------------------------------------------------


def test_two_masks_for_the_same_matrix_are_refused(masked_layers, masks):
    name = next(iter(masks))
    short_name = name.partition(".")[2]
    with pytest.raises(ValueError, match="file: it has two masks for the same matrix"):
        tamt.fit_masks(masked_layers, masks | {short_name: ~masks[name]}, "file")


@pytest.mark.parametrize("problem", ["missing", "unexpected", "wrong shape"])
def test_a_mask_of_another_model_is_refused_by_name(masked_layers, masks, problem):
    query = next(name for name in masks if "query" in name)
    words = f"file.*{problem}: {query}"
    if problem == "missing":
        del masks[query]
    if problem == "unexpected":
        masks["bert.encoder.layer.7.attention.self.query.weight"] = masks[query]
        masks["bert.pooler.dense2.weight"] = masks[query]
        words = "file.*unexpected: bert.encoder.layer.7.attention.self.query.weight, bert.pooler.dense2.weight"
    if problem == "wrong shape":
        masks[query] = masks[query][:5]
        words += r" \[5, 32\], not \[32, 32\]"
    with pytest.raises(ValueError, match=words):
        tamt.fit_masks(masked_layers, masks, "file")


@pytest.mark.parametrize("content, words", [
    ({"x.weight": torch.tensor([0.0, 2.0])}, "x.weight holds values other than 0 and 1"),
    ({"x": torch.ones(2)}, "x is not a mask: expected names <module>.weight or .weight_mask"),
    ({"x.weight": torch.ones(2), "module.x.weight": torch.zeros(2)}, "it has two masks for x.weight"),
    ({"x.weight_orig": torch.ones(2), "x.weight_mask": torch.ones(2), "x.bias_mask": torch.zeros(2)},
     "x.bias_mask is not a mask: expected names <module>.weight or .weight_mask"),
    ([1], "holds a list, not a dict of tensors"),
    ({}, "holds a dict, not a dict of tensors"),
    ({"format": 2}, "not a mask file of format 1, the one this version knows"),
    ({"format": 1, "shapes": {}, "bits": {}, "meta": {"model": torch.zeros(1)}}, "what it says of itself: .*Tensor")])
def test_what_is_no_mask_file_is_refused_by_name(tmp_path, content, words):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=f"bad.pt: {words}"):
        tamt.load_mask(tmp_path / "bad.pt")


def test_compare_prints_a_table(tmp_path, capsys, masks):
    flipped = {name: ~mask for name, mask in masks.items()}
    tamt.save_mask(tmp_path / "a.pt", masks, {})
    tamt.save_mask(tmp_path / "b.pt", flipped, {})
    assert exit_status(tamt.main, "--compare", tmp_path / "a.pt", tmp_path / "b.pt") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["1.0000", "0.0000", "distance", "0.0000", str(tmp_path / "a.pt")]
    assert second.split() == ["0.0000", "1.0000", "distance", "1.0000", str(tmp_path / "b.pt")]


def test_evaluate_of_the_dense_model_needs_no_mask_and_the_dev_text_only(inputs, tmp_path, capsys):
    (tmp_path / "wiki.valid.raw").write_text((inputs / "text.txt").read_text())
    assert exit_status(tamt.main, "--model", inputs / "bert", "--data", tmp_path, "--seq-len", 16, "--evaluate") == 0
    lines = capsys.readouterr().out.splitlines()
    block = dict(line.split(": ", 1) for line in lines[lines.index("---") + 1:])
    assert block["sparsity"] == "0.0000" and block["dev_kd_loss"] == "0.0000"
    assert float(block["dev_mlm_loss"]) > 0
    assert "mask" not in block


def test_mask_training_ends_with_lines_that_grep_reads(inputs, tmp_path, capsys):
    assert run_tamt(inputs, tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    block = dict(line.split(": ", 1) for line in lines[lines.index("---") + 1:])
    assert list(block) == ["mask", "sparsity", "dev_mlm_loss", "dev_kd_loss", "seconds", "next"]
    assert block["mask"] == str(tmp_path / "run" / "mask.pt")
    assert block["sparsity"] == "0.7000"
    assert block["next"].split()[:2] == ["python", "finetune.py"] and block["mask"] in block["next"]


def test_omp_and_random_need_no_text(inputs, tmp_path):
    for method in ("omp", "random"):
        out = tmp_path / method
        assert exit_status(tamt.main, "--model", inputs / "bert", "--method", method, "--out", out) == 0
        assert "dev_mlm_loss" not in json.loads((out / "mask.json").read_text())


# ---------------------------------------------------------------------------------------------------
# tamt: wrong input
# ---------------------------------------------------------------------------------------------------


BAD_ARGUMENTS = {
    "an unknown model": (["--model", "bert-huge"], "bert-huge.*bert-base.*toy"),
    "imp without learning rate": (["--method", "imp", "--steps", "3", "--prune-every", "8"],
                                  "--steps 3:.* round of 8 updates; expected at least --prune-every"),
    "sparsity 1": (["--sparsity", "1.0"], r"--sparsity 1.0.*\[0, 1\)"),
    "a negative sparsity": (["--sparsity=-0.1"], r"--sparsity -0.1.*\[0, 1\)"),
    "a percentage": (["--sparsity", "70"], r"--sparsity 70.*\[0, 1\).*0.7"),
    "sparsity nan": (["--sparsity", "nan"], r"--sparsity nan.*\[0, 1\)"),
    "no number": (["--sparsity", "much"], "--sparsity.*much"),
    "an unknown flag": (["--sparsty", "0.5"], "--sparsty"),
    "an unknown method": (["--method", "magic"], "--method.*magic.*tamt.*imp"),
    "an unknown objective": (["--objective", "nsp"], "--objective.*nsp.*mlm.*kd"),
    "no steps": (["--steps", "0"], "--steps 0.*above 0"),
    "half a step": (["--steps", "1.5"], "--steps.*1.5"),
    "learning rate 0": (["--lr", "0"], "--lr 0.*above 0"),
    "a negative seed": (["--seed=-1"], "--seed -1.*0 to"),
    "a missing text": (["--data", "no/such.txt"], "no/such.txt.*wikitext-103"),
    "rows that are too long": (["--seq-len", "65"], "--seq-len 65.*3 to 64"),
    "rows that are too short": (["--seq-len", "2"], "--seq-len 2.*3 to 64"),
    "an unknown rank": (["--rank", "best"], "--rank best.*global.*local.*2:4"),
    "4:2": (["--rank", "4:2"], "--rank 4:2.*N < M"),
    "2:4 with another sparsity": (["--rank", "2:4", "--sparsity", "0.7"], "--rank 2:4 removes 0.5.*--sparsity 0.7"),
    "2:4 with imp": (["--rank", "2:4", "--method", "imp"], "--rank 2:4.*imp"),
    "2:4 with a threshold": (["--rank", "2:4", "--refresh-every", "9"], "--rank 2:4.*--refresh-every"),
    "groups that do not divide a row": (["--rank", "2:5"], "--rank 2:5.*32 entries.*multiple of 5"),
    "imp with kd": (["--method", "imp", "--objective", "kd"], "--method imp.*--objective kd"),
    "a mask for nothing": (["--mask", "x.pt"], "--mask.*--evaluate or --export"),
    "a missing mask": (["--evaluate", "--mask", "no.pt"], "no.pt"),
    "a missing mask to compare": (["--compare", "no.pt"], "no.pt"),
    "an export onto the model": (["--export", "model"], "--export.*the model itself"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line_with_exit_status_2(inputs, tmp_path, monkeypatch, capsys, case):
    argv, words = BAD_ARGUMENTS[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(inputs / "bert")
    assert_one_error_line(capsys, words, tamt.main, "--model", inputs / "bert", "--data", inputs / "text.txt",
                       "--seq-len", 16, "--out", "out", *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [
    {"sparsity": 1.5}, {"sparsity": "0.7"}, {"method": "magic"}, {"seed": 1.5}, {"steps": -3}, {"rank": "2:2"},
    {"method": "imp", "objective": "kd"}])
def test_bad_settings_in_python_are_a_value_error_that_names_the_flag(inputs, changes):
    with pytest.raises(ValueError, match=f"^--{list(changes)[0]} "):
        mask_settings(inputs, **changes)


def test_settings_are_never_changed(inputs):
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask_settings(inputs).sparsity = 0.5


def test_2_4_is_fine_with_the_sparsity_it_has(inputs):
    machine = tamt.Machine(torch.device("cpu"))
    run = tamt.fill_in_defaults(mask_settings(inputs, rank="2:4", sparsity=0.5), machine, bert.load(inputs / "bert"))
    assert run.sparsity == 0.5


BAD_FILES = {"an empty text": ("empty.txt", "empty.txt.*empty"),
             "a text shorter than a row": ("short.txt", "short.txt.*16 tokens"),
             "a text of unknown words": ("foreign.txt", "foreign.txt.*nothing to predict.*unknown"),
             "a table": ("text.csv", "text.csv.*plain text.*csv.DictReader")}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_text_that_cannot_be_used_is_one_line(inputs, tmp_path, capsys, case):
    name, words = BAD_FILES[case]
    texts = {"empty.txt": "", "short.txt": "the cat\nsees\n", "foreign.txt": "東京 " * 900,
             "text.csv": "text\nthe cat\n"}
    (tmp_path / name).write_text(texts[name])
    assert_one_error_line(capsys, words, tamt.main, "--model", inputs / "bert", "--data", tmp_path / name,
                          "--seq-len", 16, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_with_more_words_than_the_model_is_refused(inputs, tmp_path, capsys):
    tiny(tmp_path / "model")
    with open(tmp_path / "model" / "vocab.txt", "a") as file:
        file.write("more\n")
    assert_one_error_line(capsys, "vocabulary has 63 tokens, the model only 62", tamt.main,
                          "--model", tmp_path / "model", "--method", "omp", "--out", tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tamt, "mlm_loss", lambda *arguments: torch.tensor(math.nan, requires_grad=True))
    assert_one_error_line(capsys, "loss is nan.*update 1.*--lr", shell_main(inputs, tmp_path / "out"))
    assert not (tmp_path / "out" / "mask.pt").exists()


def shell_main(inputs, out):
    return lambda argv: tamt.main(["--model", str(inputs / "bert"), "--data", str(inputs / "text.txt"), "--steps", "12",
                                   "--seq-len", "16", "--batch-size", "8", "--out", str(out), *argv])


def test_ctrl_c_keeps_the_last_state_and_is_130(inputs, tmp_path, monkeypatch, capsys):
    interrupt_after(monkeypatch, 7)
    assert run_tamt(inputs, tmp_path) == 130
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "state.pt").exists() and not (tmp_path / "mask.pt").exists()
    assert run_tamt(inputs, tmp_path, "--resume") == 0


def test_an_error_of_the_program_itself_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        tamt.run_command(lambda: 1 / 0)


def test_no_module_imports_what_the_design_does_not_allow():
    """The chapters build on each other, and on torch, numpy, tokenizers and requests alone."""
    allowed = {"bert": {"torch", "numpy"},
               "data": {"bert", "numpy", "tokenizers", "requests"},
               "tamt": {"bert", "data", "dev", "torch", "numpy"},
               "glue_squad": {"data", "bert", "numpy"},
               "finetune": {"bert", "data", "tamt", "glue_squad", "torch", "numpy"}}
    for name, packages in allowed.items():
        found = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        found -= sys.stdlib_module_names | {"fcntl"}
        assert found <= packages, name


def test_python_and_the_command_line_give_the_same_best_result_and_settings(tasks, tmp_path):
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path / "python", results=None))
    assert run_finetune(tasks, tmp_path / "shell") == 0
    line = lines_of_results(tmp_path / "shell")[0]
    assert line["best"] == result["best"]
    assert line["settings"] == result["settings"]


# ---------------------------------------------------------------------------------------------------
# finetune: folders, results and --resume
# ---------------------------------------------------------------------------------------------------


def test_a_run_ends_with_lines_that_grep_reads(tasks, tmp_path, capsys):
    assert run_finetune(tasks, tmp_path) == 0
    lines = capsys.readouterr().out.split("\n---\n")[1].splitlines()
    [result] = lines_of_results(tmp_path)
    best, final = result["best"]["accuracy"], result["final"]["accuracy"]
    assert best >= final
    assert {"task: rte", f"best_accuracy: {best:.4f}", f"final_accuracy: {final:.4f}"} <= set(lines)


def test_an_unfinished_run_is_neither_overwritten_nor_continued_with_other_settings(
        tasks, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_fine_tuning_at(patch, 6)
        assert run_finetune(tasks, tmp_path) == 130
    capsys.readouterr()

    assert run_finetune(tasks, tmp_path) == 2
    assert "unfinished at step 5: continue with --resume" in capsys.readouterr().err
    assert run_finetune(tasks, tmp_path, "rte", "--resume", "--eval-every", 3) == 2
    assert "holds another run (eval_every 50 there, 3 here)" in capsys.readouterr().err


def test_resume_of_a_finished_run_changes_nothing(tasks, tmp_path):
    assert run_finetune(tasks, tmp_path) == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run_finetune(tasks, tmp_path, "rte", "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


def test_resume_refuses_to_export_a_finished_run_since_its_model_is_gone(tasks, tmp_path, capsys):
    assert run_finetune(tasks, tmp_path) == 0
    assert run_finetune(tasks, tmp_path, "rte", "--resume", "--export", tmp_path / "x") == 2
    assert "its model gone, and what --export asks for is not there" in capsys.readouterr().err


def test_resume_of_a_finished_run_finds_the_export_that_it_wrote(tasks, tmp_path):
    more = ("--export", tmp_path / "x")
    assert run_finetune(tasks, tmp_path, "rte", *more) == 0
    assert run_finetune(tasks, tmp_path, "rte", "--resume", *more) == 0


def test_resume_of_a_finished_run_refuses_an_export_that_another_run_wrote(tasks, tmp_path, capsys):
    for seed in (1, 2):
        more = ("--seed", seed, "--export", tmp_path / "x")
        assert run_finetune(tasks, tmp_path / str(seed), "rte", *more) == 0
    more = ("--seed", 1, "--resume", "--export", tmp_path / "x")
    assert run_finetune(tasks, tmp_path / "1", "rte", *more) == 2
    assert "what --export asks for is not there as this run would write it" in capsys.readouterr().err


def test_resume_of_a_finished_run_refuses_the_predictions_for_another_test_file(copied, capsys):
    argv = (copied / "tasks", copied, "rte", "--predict")
    assert run_finetune(*argv) == 0
    assert run_finetune(*argv, "--resume") == 0
    test_file = copied / "tasks/RTE/test.tsv"
    test_file.write_text("\n".join(test_file.read_text().split("\n")[:3]) + "\n")
    assert run_finetune(*argv, "--resume") == 2
    assert "what --predict asks for is not there" in capsys.readouterr().err


@pytest.fixture
def copied(tasks, tmp_path):
    """Copies of the model, the tables and the mask, to be changed."""
    shutil.copytree(tasks / "bert", tmp_path / "bert")
    shutil.copytree(tasks, tmp_path / "tasks")
    return tmp_path


@pytest.mark.parametrize("change, name", [("text", "texts"), ("mask", "masks"), ("weights", "checkpoint"),
                                          ("config", "config"), ("tokenizer", "tokenizer")])
def test_resume_is_refused_after_its_input_has_changed(copied, monkeypatch, capsys, change, name):
    argv = (copied / "tasks", copied, "rte", "--model", copied / "bert")
    with monkeypatch.context() as patch:
        stop_fine_tuning_at(patch, 6)
        assert run_finetune(*argv) == 130
    if change == "text":
        table = copied / "tasks/RTE/train.tsv"
        table.write_text(table.read_text().replace("cat", "dog", 1))
    elif change == "mask":
        masks, meta = tamt.read_mask(copied / "tasks/bert.pt")
        masks["bert.encoder.layer.0.output.dense.weight"][3, 5] ^= True
        tamt.save_mask(copied / "tasks/bert.pt", masks, meta)
    elif change == "config":
        edit_json(copied / "bert/config.json", hidden_dropout_prob=0.0)
    elif change == "tokenizer":
        vocab = copied / "bert/vocab.txt"
        vocab.write_text(vocab.read_text().replace("cat\ndog\n", "dog\ncat\n"))
    else:
        tiny(copied / "bert", seed=1)
    capsys.readouterr()
    assert run_finetune(*argv, "--resume") == 2
    assert f"holds another run ({name} " in capsys.readouterr().err


def test_a_run_is_the_same_under_another_spelling_of_its_paths(copied, monkeypatch):
    argv = ("--task", "rte", "--max-len", 48, "--batch-size", 8, "--epochs", 2,
            "--results", copied / "results.jsonl")
    monkeypatch.chdir(copied)
    with monkeypatch.context() as patch:
        stop_fine_tuning_at(patch, 6)
        assert exit_status(finetune.main, *argv, "--data", "tasks", "--mask", "tasks/bert.pt", "--model", "bert",
                   "--out", "run") == 130
    monkeypatch.chdir(copied / "tasks")
    assert exit_status(finetune.main, *argv, "--data", copied / "tasks", "--mask", "bert.pt", "--model",
               "../tasks/../bert/", "--out", copied / "run", "--resume") == 0
    assert len(lines_of_results(copied)) == 1


def test_runs_with_other_settings_get_other_folders_by_default(tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for epochs in (1, 2):
        finetune.fine_tune(finetune.Settings(task="rte", mask=str(tasks / "bert.pt"), data=tasks, max_len=48,
                                             epochs=epochs))
    assert len(list(tmp_path.glob(f"out/rte-{tasks.name}-s1-*/result.json"))) == 2


def test_mnli_is_reported_without_its_mismatched_file(tasks, tmp_path, capsys):
    rows = ["the cat\tthe dog\tneutral", "a cat\ta cat\tentailment"] * 8
    for name in ("train", "dev_matched"):
        write(tmp_path / "MNLI" / f"{name}.tsv", ["sentence1\tsentence2\tgold_label", *rows])
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path, task="mnli", data=tmp_path, epochs=1))
    assert list(result["best"]) == ["accuracy"]
    assert "dev_mm is left out" in capsys.readouterr().out


@pytest.mark.parametrize("module, function", [(data, "append_line"), (tamt, "write_json")],
                         ids=["before the line", "before result.json"])
def test_a_kill_before_the_end_neither_loses_nor_doubles_the_line(
        tasks, tmp_path, monkeypatch, module, function):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, function, kill)
        finetune.fine_tune(finetune_settings(tasks, tmp_path))
    for _ in range(2):
        finetune.fine_tune(finetune_settings(tasks, tmp_path, resume=True))
        assert len(lines_of_results(tmp_path)) == 1
    assert not (tmp_path / "run/state.pt").exists()


def test_the_same_run_once_more_is_one_line_more(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.time, "time", lambda: 0.0)  # even if both take equally long
    finetune.fine_tune(finetune_settings(tasks, tmp_path))
    finetune.fine_tune(finetune_settings(tasks, tmp_path))
    assert len(lines_of_results(tmp_path)) == 2


def test_a_kill_after_the_line_does_not_double_it(tasks, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    append_line = data.append_line

    def kill_afterwards(*arguments):
        append_line(*arguments)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(data, "append_line", kill_afterwards)
        finetune.fine_tune(finetune_settings(tasks, tmp_path))
    finetune.fine_tune(finetune_settings(tasks, tmp_path, resume=True))
    assert len(lines_of_results(tmp_path)) == 1


# ---------------------------------------------------------------------------------------------------
# finetune: wrong input
# ---------------------------------------------------------------------------------------------------


WRONG_INPUT = [
    ("--task sst3", "unknown task 'sst3'; known: cola, sst2"),
    ("--task rte,squad", "different ones with different names, without squad"),
    ("--task rte,rte", "different ones with different names, without squad"),
    ("--task rte,stsb", "1 files for 2 tasks; expected one for each"),
    ("--task rte,stsb --mask a.pt,", "an empty name"),
    ("--task rte,stsb --mask {tasks}/bert.pt,{tasks}/roberta.pt", "tickets of different models"),
    ("--data {tmp}/none", "{tmp}/none: no such folder"),
    ("--data {tmp}", "task rte: no train file; expected {tmp}/RTE/train.tsv or"),
    ("--data {tmp}/bad", "dev.tsv line 3: 2 fields where line 1 has 3"),
    ("--model {tasks}/roberta", "mask of another model"),
    ("--model {tmp}/none", "{tmp}/none"),
    ("--mask {tasks}/RTE/dev.tsv", "RTE/dev.tsv"),
    ("--mask {tmp}/none.pt", "{tmp}/none.pt: No such file"),
    ("--max-len 65", "--max-len 65: expected 6 to 64 tokens"),
    ("--max-len 5", "--max-len 5: expected 6 to 64 tokens"),
    ("--epochs 0", "--epochs 0: expected a number above 0"),
    ("--epochs two", "argument --epochs: invalid int value: 'two'"),
    ("--lr nan", "--lr nan: expected a number above 0"),
    ("--seed -1", "--seed -1: expected a whole number from 0"),
    ("--weights none", "--weights: invalid choice: 'none'"),
    ("--find imp", "--find goes with one --task and without --mask"),
    ("--sparsity 0.5", "--sparsity goes with --find imp"),
    ("--orders losing", "--orders goes with --find super"),
    ("--results {tmp}/none/r", "--results {tmp}/none/r: expected a file in a folder that exists"),
    ("--results {tmp}/run/result.json --out {tmp}/run", "expected a file in a folder that exists"),
    ("--export {tasks}/bert.pt", "--export {tasks}/bert.pt: a file stands there"),
    ("--export {tasks}/bert.pt/x", "a file stands there; expected a folder"),
    ("--export {tasks}/bert", "is the folder of the model"),
]


@pytest.mark.parametrize("argv, message", WRONG_INPUT, ids=[argv for argv, _ in WRONG_INPUT])
def test_wrong_input_is_one_line_with_exit_status_2(tasks, tmp_path, capsys, argv, message):
    header = "sentence1\tsentence2\tlabel"
    write(tmp_path / "bad/RTE/train.tsv", [header, "a\tb\tentailment"])
    write(tmp_path / "bad/RTE/dev.tsv", [header, "a\tb\tentailment", "a\tb"])
    files = set(tmp_path.rglob("*"))

    words = [word.format(tasks=tasks, tmp=tmp_path) for word in argv.split()]
    assert run_finetune(tasks, tmp_path, "rte", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.format(tasks=tasks, tmp=tmp_path) in error
    assert set(tmp_path.rglob("*")) == files  # nothing half-written is left behind


def test_wrong_settings_in_python_are_a_value_error():
    with pytest.raises(ValueError, match="--epochs 0: expected a number above 0"):
        finetune.Settings(task="rte", epochs=0)
    with pytest.raises(ValueError, match="--weights 'none': expected one of pretrained, random, shuffled"):
        finetune.Settings(task="rte", weights="none")


@pytest.mark.parametrize("main,flags", [
    (finetune.main, ["--task", "sst2", "--mask", ""]), (finetune.main, ["--task", ""]),
    (finetune.main, ["--task", "sst2", "--model", ""]), (finetune.main, ["--task", "sst2", "--export", ""]),
    (tamt.main, ["--model", ""]), (tamt.main, ["--out", ""]), (tamt.main, ["--mask", "", "--evaluate"])])
def test_an_empty_text_is_refused(capsys, main, flags):
    """Such as "$MASK" without a value: it would mean no mask at all."""
    flag = flags[flags.index("") - 1]
    assert_one_error_line(capsys, f"{flag}: the text is empty", main, *flags)


def test_an_empty_text_in_a_list_is_refused(capsys):
    assert_one_error_line(capsys, "--compare: the text is empty", tamt.main, "--compare", "a.pt", "")


@pytest.mark.parametrize("meta", [{"model": 5}, {"data": ["a"]}, {"lines": "False", "data": "x"}, {"seq_len": "64"},
                                  {"seq_len": -1}, {"seq_len": True}])
def test_metadata_of_a_wrong_kind_are_refused(inputs, tmp_path, capsys, meta):
    layers = tamt.maskable_layers(bert.load(inputs / "bert"))
    tamt.save_mask(tmp_path / "mask.pt", tamt.random_masks(layers, 0.5, "local", seed=1), meta)
    assert_one_error_line(capsys, "in its metadata", tamt.main, "--evaluate", "--mask", tmp_path / "mask.pt")
