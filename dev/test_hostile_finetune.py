"""finetune.py under a hostile user, disk and clock: python -m pytest dev/test_hostile_finetune.py"""

import errno
import itertools
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bert
import data
import finetune
import tamt
from helpers import lines_of_results, run_finetune, stop_fine_tuning_at
from test_tamt import dense_settings, finetune_settings, folder_content, tiny, write


def refused(capsys, tasks, out, *argv, **more):
    """Runs a command that must fail with one line -> that line."""
    capsys.readouterr()
    assert run_finetune(tasks, out, *argv, **more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 1100
    return error


# Files of others


def test_files_of_others_stay_in_the_folder_of_a_run(tasks, tmp_path):
    write(tmp_path / "run/film.part", ["x"])
    write(tmp_path / "run/b/dump.20261130.part", ["x"])
    assert run_finetune(tasks, tmp_path) == 0
    assert len(list(tmp_path.rglob("*.part"))) == 2


def test_results_are_not_appended_to_a_table_or_a_mask(tasks, tmp_path, capsys):
    table = shutil.copy(tasks / "RTE/dev.tsv", tmp_path / "dev.tsv")
    mask = shutil.copy(tasks / "bert.pt", tmp_path / "mask.pt")
    for file in (table, mask):
        content = file.read_bytes()
        assert "holds something else than results" in refused(capsys, tasks, tmp_path, "rte", "--results", file)
        assert file.read_bytes() == content


def test_a_run_and_a_search_do_not_share_a_folder(tasks, tmp_path, capsys):
    search = ("--find", "imp", "--sparsity", 0.1, "--model", tasks / "bert")
    assert run_finetune(tasks, tmp_path, "rte", *search, mask=None) == 0
    assert "holds a search" in refused(capsys, tasks, tmp_path, "rte")
    assert run_finetune(tasks, tmp_path / "b", "rte") == 0
    assert "holds another run" in refused(capsys, tasks, tmp_path / "b", "rte", *search, mask=None)


def test_predictions_of_others_do_not_matter_to_a_finished_run(tasks, tmp_path):
    assert run_finetune(tasks, tmp_path, "rte", "--predict") == 0
    shutil.copy(tmp_path / "run/RTE.tsv", tmp_path / "run/RTE-backup.tsv")
    assert run_finetune(tasks, tmp_path, "rte", "--predict", "--resume") == 0


@pytest.mark.parametrize("damage", [
    {"optimizer": None}, {"history": [1]}, {"history": 5}, {"total_loss": "x"}, {"step": -1}, {"step": 1000}])
def test_a_state_with_a_wrong_content_is_one_line(tasks, tmp_path, monkeypatch, capsys, damage):
    with monkeypatch.context() as patch:
        stop_fine_tuning_at(patch, 4)
        assert run_finetune(tasks, tmp_path, "rte") == 130
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    torch.save(state | damage, tmp_path / "run/state.pt")
    assert "state.pt: damaged" in refused(capsys, tasks, tmp_path, "rte", "--resume")


def test_the_default_length_fits_the_model(tasks, tmp_path, capsys):
    """The paper's 128 tokens; this network has 64 positions. A length that a user asks for is never changed."""
    settings = finetune_settings(tasks, tmp_path, max_len=None, epochs=1)
    assert finetune.fine_tune(settings)["settings"]["max_len"] == 64
    assert "--max-len 64: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="--max-len 65: expected 6 to 64 tokens"):
        finetune.fine_tune(replace(settings, max_len=65))


@pytest.mark.parametrize("changes, message", [
    ({"task": None}, "--task None: expected a value"), ({"seed": None}, "--seed None: expected a value"),
    ({"device": None}, "--device None"), ({"weights": None}, "--weights None"),
    ({"task": "rte,mrpc", "mask": ["a.pt", "b.pt"]}, "expected one value")])
def test_wrong_settings_from_python_are_one_line(tasks, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune_settings(tasks, tmp_path, **changes)


def test_from_python_a_task_may_be_a_path(tasks, tmp_path):
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path, task=tasks / "mood.json", epochs=1))
    assert result["task"] == "mood"


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_foreign_result_json_is_refused(tasks, tmp_path, capsys, more):
    write(tmp_path / "run/result.json", {"score": 1})
    assert "result.json is not a file of this program" in refused(capsys, tasks, tmp_path, "rte", *more)
    assert json.loads((tmp_path / "run/result.json").read_text()) == {"score": 1}


def test_a_foreign_mask_is_not_overwritten_by_a_search(tasks, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(tasks / "roberta.pt", tmp_path / "run/mask.pt")
    argv = ("rte", "--model", tasks / "bert", "--find", "imp", "--resume")
    assert "holds another mask.pt" in refused(capsys, tasks, tmp_path, *argv, mask=None)
    assert (tmp_path / "run/mask.pt").read_bytes() == (tasks / "roberta.pt").read_bytes()


def test_an_export_never_overwrites_its_model(tasks, tmp_path, capsys):
    shutil.copytree(tasks / "bert", tmp_path / "x/stsb")
    argv = ("rte,stsb", "--model", tmp_path / "x/stsb/model.safetensors", "--export", tmp_path / "x")
    assert "is the folder of the model" in refused(capsys, tasks, tmp_path, *argv, mask=None)
    assert not (tmp_path / "x/rte").exists()


def test_the_results_file_is_not_a_file_of_the_run(tasks, tmp_path, capsys):
    assert run_finetune(tasks, tmp_path) == 0
    for name in ("result.json", "state.pt"):
        error = refused(capsys, tasks, tmp_path, "rte", "--results", tmp_path / "run" / name)
        assert "a file that the run itself writes" in error
    assert json.loads((tmp_path / "run/result.json").read_text())["task"] == "rte"


def test_a_results_file_without_a_last_newline_keeps_its_lines(tasks, tmp_path):
    (tmp_path / "results.jsonl").write_text('{"a": 1}')
    assert run_finetune(tasks, tmp_path) == 0
    lines = lines_of_results(tmp_path)
    assert len(lines) == 2
    assert lines[0] == {"a": 1}


# Damaged files


def test_a_mask_that_is_cut_anywhere_is_one_line(tasks, tmp_path, capsys):
    content = (tasks / "bert.pt").read_bytes()
    generator = random.Random(0)
    for size in [0, 1, 10, len(content) - 1, *(generator.randrange(len(content)) for _ in range(6))]:
        (tmp_path / "cut.pt").write_bytes(content[:size])
        assert "cut.pt" in refused(capsys, tasks, tmp_path, "rte", "--mask", tmp_path / "cut.pt")


@pytest.mark.parametrize("model", [None, 3, ["bert"], "", "x" * 5000, "\0", "a\nb"], ids=repr)
def test_a_mask_whose_metadata_is_odd_is_one_line(tasks, tmp_path, capsys, model):
    tamt.save_mask(tmp_path / "odd.pt", tamt.load_mask(tasks / "bert.pt"), {"model": model})
    refused(capsys, tasks, tmp_path, "rte", "--mask", tmp_path / "odd.pt")


def test_a_mask_folder_without_mask_is_one_line(tasks, tmp_path, capsys):
    assert "mask.pt" in refused(capsys, tasks, tmp_path, "rte", "--mask", tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"settings": 3}', '{"settings": {}}', "\0" * 9])
def test_a_damaged_result_json_is_one_line(tasks, tmp_path, capsys, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text(content)
    assert "result.json" in refused(capsys, tasks, tmp_path, "rte", "--resume") or content.endswith("{}}")


def test_a_result_json_without_its_figures_is_one_line(tasks, tmp_path, capsys):
    assert run_finetune(tasks, tmp_path) == 0
    file = tmp_path / "run/result.json"
    result = json.loads(file.read_text())
    for name in ("best", "final", "sparsity", "mask", "evaluations"):
        file.write_text(json.dumps({key: value for key, value in result.items() if key != name}))
        assert "not a result of this version" in refused(capsys, tasks, tmp_path, "rte", "--resume")


@pytest.mark.parametrize("damage", ["cut", "empty", "format", "parameters"])
def test_a_damaged_state_is_one_line(tasks, tmp_path, monkeypatch, capsys, damage):
    with monkeypatch.context() as patch:
        stop_fine_tuning_at(patch, 4)
        assert run_finetune(tasks, tmp_path) == 130
    file = tmp_path / "run/state.pt"
    state = torch.load(file, weights_only=True)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        if damage == "format":
            state["format"] = 1
        else:
            del state["parameters"]["classifier.weight"]
        torch.save(state, file)
    assert "state.pt" in refused(capsys, tasks, tmp_path, "rte", "--resume")


# A disk that is full, a clock that runs backwards, a user in a hurry


@pytest.mark.parametrize("function", ["write_torch", "write_json"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tasks, tmp_path, monkeypatch, capsys, function):
    assert run_finetune(tasks, tmp_path / "a") == 0

    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(tamt, function, full)
        assert "No space left" in refused(capsys, tasks, tmp_path / "b")
    assert run_finetune(tasks, tmp_path / "b", "rte", "--resume") == 0
    a, b = (lines_of_results(tmp_path / name) for name in "ab")
    assert len(b) == 1
    assert a[0]["final"] == b[0]["final"]


def test_a_full_disk_under_the_results_does_not_lose_the_run(tasks, tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "results.jsonl").symlink_to("/dev/full")
    capsys.readouterr()
    assert run_finetune(tasks, tmp_path) == 2
    assert not capsys.readouterr().err.count("\n") > 1
    (tmp_path / "results.jsonl").unlink()
    assert run_finetune(tasks, tmp_path, "rte", "--resume") == 0


def test_a_clock_that_runs_backwards_does_no_harm(tasks, tmp_path, monkeypatch):
    ticks = itertools.count(0, -100)
    monkeypatch.setattr(finetune.time, "time", lambda: float(next(ticks)))
    assert run_finetune(tasks, tmp_path, "rte", "--eval-every", 1) == 0


def test_ctrl_c_before_the_first_state_leaves_a_folder_that_can_be_used(tasks, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_fine_tuning_at(patch, 1)
        assert run_finetune(tasks, tmp_path) == 130
    assert run_finetune(tasks, tmp_path, "rte", "--resume") == 0
    assert len(lines_of_results(tmp_path)) == 1


@pytest.mark.parametrize("number", range(1, 17, 3))
def test_stopped_anywhere_several_tasks_end_alike(tasks, tmp_path, monkeypatch, number):
    expected = finetune.fine_tune(dense_settings(tasks, tmp_path / "a", task="rte,stsb"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_fine_tuning_at(patch, number)
        finetune.fine_tune(dense_settings(tasks, tmp_path / "b", task="rte,stsb"))
    resumed = finetune.fine_tune(dense_settings(tasks, tmp_path / "b", task="rte,stsb", resume=True))
    assert resumed["evaluations"] == expected["evaluations"]


# Odd tables


@pytest.mark.parametrize("rows", [[], ["a\tb\tmaybe"], ["a\tb\t"], ["a\tb\tentailment\tc"]], ids=str)
@pytest.mark.parametrize("split", ["train", "dev"])
def test_odd_tables_are_one_line_that_names_the_file(tasks, tmp_path, capsys, split, rows):
    for name in ("train", "dev"):
        write(tmp_path / "RTE" / f"{name}.tsv", ["sentence1\tsentence2\tlabel", "a\tb\tentailment"])
    write(tmp_path / "RTE" / f"{split}.tsv", ["sentence1\tsentence2\tlabel", *rows])
    assert f"{split}.tsv" in refused(capsys, tasks, tmp_path, "rte", "--data", tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_one_example_is_enough(tasks, tmp_path, task):
    for folder, label, word in (("RTE", "label", "entailment"), ("STS-B", "score", "2.5")):
        for split in ("train", "dev"):
            rows = [f"sentence1\tsentence2\t{label}", f"\U0001f600\t\t{word}"]
            write(tmp_path / folder / f"{split}.tsv", rows)
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path, task=task, data=tmp_path))
    assert all(np.isfinite(value) for value in result["final"].values())


@pytest.mark.parametrize("paragraphs", [[], [{"context": "", "qas": []}], [{"context": "a b", "qas": [
    {"id": "1", "question": "where", "answers": [{"text": "z", "answer_start": 0}]}]}]], ids=str)
def test_a_squad_without_answers_is_one_line(tasks, tmp_path, capsys, paragraphs):
    for split in ("train", "dev"):
        write(tmp_path / f"squad/{split}-v1.1.json", {"data": [{"paragraphs": paragraphs}]})
    assert run_finetune(tasks, tmp_path, "squad", "--data", tmp_path) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]  # before it, how many questions were left out
    assert last_line.startswith("error: ")
    assert "question" in last_line
    assert not (tmp_path / "run/result.json").exists()


def test_a_question_that_leaves_no_room_is_one_line(tasks, tmp_path, capsys):
    answer = {"text": "tree", "answer_start": 4}
    question = {"id": "1", "question": "where the cat " * 50, "answers": [answer]}
    for split in ("train", "dev"):
        write(tmp_path / f"squad/{split}-v1.1.json",
                   {"data": [{"paragraphs": [{"context": "the tree", "qas": [question]}]}]})
    error = refused(capsys, tasks, tmp_path, "squad", "--data", tmp_path)
    assert "max_len 48: no room for text after 'where the cat" in error


def test_a_limit_above_the_number_of_examples_is_all_of_them(tasks, tmp_path):
    a = finetune.fine_tune(finetune_settings(tasks, tmp_path / "a"))
    b = finetune.fine_tune(finetune_settings(tasks, tmp_path / "b", limit=10**6))
    assert a["evaluations"] == b["evaluations"]


def test_a_task_file_with_a_comma_in_its_path_is_one_task(tasks, tmp_path):
    shutil.copy(tasks / "mood.tsv", tmp_path / "mood.tsv")
    shutil.copy(tasks / "mood.json", tmp_path / "mood,glad.json")
    assert run_finetune(tasks, tmp_path, str(tmp_path / "mood,glad.json")) == 0


# Tickets


def super_file(tasks, path, removed_heads, removed_feed_forward):
    config = bert.load(tasks / "bert").config
    masks = finetune.masks_from_units(config, np.array(removed_heads), np.array(removed_feed_forward))
    tamt.save_mask(path, masks, {"method": "super", "model": str(tasks / "bert")})
    return path


def test_a_super_ticket_never_takes_all_heads_of_a_layer(tasks, tmp_path, capsys):
    file = super_file(tasks, tmp_path / "s.pt", [[True] * 4, [False] * 4], [False, False])
    assert "not all of a layer" in refused(capsys, tasks, tmp_path, "rte", "--mask", file)


def test_a_super_ticket_with_a_pooler_mask_is_refused(tasks, tmp_path, capsys):
    file = super_file(tasks, tmp_path / "s.pt", [[False] * 4, [False] * 4], [False, True])
    masks, meta = tamt.read_mask(file)
    masks["bert.pooler.dense.weight"] = torch.zeros(32, 32, dtype=torch.bool)
    tamt.save_mask(file, masks, meta)
    assert "takes out whole heads" in refused(capsys, tasks, tmp_path, "rte", "--mask", file)


def test_a_super_ticket_without_any_feed_forward_network_trains_resumes_and_exports(
        tasks, tmp_path, monkeypatch):
    file = super_file(tasks, tmp_path / "s.pt", [[True, True, True, False]] * 2, [True, True])
    assert run_finetune(tasks, tmp_path / "a", "rte", "--mask", file, "--export", tmp_path / "a/x") == 0
    with monkeypatch.context() as patch:
        stop_fine_tuning_at(patch, 6)
        assert run_finetune(tasks, tmp_path / "b", "rte", "--mask", file) == 130
    assert run_finetune(tasks, tmp_path / "b", "rte", "--mask", file, "--resume", "--export", tmp_path / "b/x") == 0
    a, b = ((tmp_path / name / "x/model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_a_mask_that_prunes_everything_still_trains(tasks, tmp_path):
    masks = {name: torch.zeros_like(mask) for name, mask in tamt.load_mask(tasks / "bert.pt").items()}
    tamt.save_mask(tmp_path / "none.pt", masks, {"model": str(tasks / "bert")})
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path, mask=str(tmp_path / "none.pt")))
    assert result["sparsity"] == 1
    assert np.isfinite(result["evaluations"][-1]["loss"])


def test_a_super_ticket_and_a_mask_share_an_encoder(tasks, tmp_path):
    file = super_file(tasks, tmp_path / "s.pt", [[True, False, False, False]] * 2, [True, False])
    masks = f"{file},{tasks / 'bert.pt'}"
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path, task="rte,stsb", mask=masks))
    assert [meta.get("method") for meta in result["mask"]] == ["super", "omp"]


def test_no_search_without_find_from_python(tasks, tmp_path):
    for name, value in (("sparsity", 0.5), ("rank", "local"), ("scope", "all"), ("orders", ("losing",))):
        with pytest.raises(ValueError, match=f"--{name} goes with --find"):
            finetune_settings(tasks, tmp_path, **{name: value})


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.05, 0.9999])
def test_imp_reaches_any_sparsity_exactly(tasks, tmp_path, sparsity):
    finetune.find_imp(dense_settings(tasks, tmp_path, find="imp", sparsity=sparsity, scope="all", rank="local",
                            epochs=1, limit=8))
    for mask in tamt.load_mask(tmp_path / "run").values():
        assert int((~mask).sum()) == round(mask.numel() * sparsity)


def test_imp_on_squad_and_on_roberta_has_no_pooler_to_prune(tasks, tmp_path):
    model = str(tasks / "roberta")
    finetune.find_imp(dense_settings(tasks, tmp_path, model=model, find="imp", sparsity=0.1, epochs=1))
    names = tamt.load_mask(tmp_path / "run").keys()
    assert len(names) == 12
    assert not any("pooler" in name for name in names)


def test_another_vocabulary_size_is_refused(tasks, tmp_path, capsys):
    tiny(tmp_path / "small", vocab_size=20)
    error = refused(capsys, tasks, tmp_path, "rte", "--model", tmp_path / "small", mask=None)
    assert "the vocabulary has" in error


def test_lines_of_two_runs_at_once_stay_whole(tmp_path):
    import threading
    threads = [threading.Thread(target=data.append_line, args=(tmp_path / "r", {"n": n, "x": "y" * 9999}))
               for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert sorted(line["n"] for line in lines) == list(range(20))


# What --resume compares, and what a command that is refused leaves as it was


def test_the_masks_of_a_super_ticket_as_an_ordinary_ticket_are_another_run(tasks, tmp_path):
    """The first is cut out, the second set to zero, which leaves biases."""
    model = bert.load(tasks / "bert")
    heads = np.zeros((model.config.num_hidden_layers, model.config.num_attention_heads), bool)
    heads[0, 0] = True
    masks = finetune.masks_from_units(model.config, heads, np.zeros(model.config.num_hidden_layers, bool))
    tamt.save_mask(tmp_path / "super.pt", masks, {"method": "super"})
    tamt.save_mask(tmp_path / "plain.pt", masks, {"method": "omp"})
    settings = finetune_settings(tasks, tmp_path / "run", mask=str(tmp_path / "super.pt"), model=str(tasks / "bert"))
    finetune.fine_tune(settings)
    with pytest.raises(ValueError, match="holds another run"):
        finetune.fine_tune(replace(settings, mask=str(tmp_path / "plain.pt"), resume=True))


def own_task(tasks, folder, **changes):
    """mood.json and its table, copied into a folder, with some keys changed -> the path of the JSON file."""
    content = json.loads((tasks / "mood.json").read_text()) | changes
    shutil.copy(tasks / "mood.tsv", write(folder / "mood.tsv", ""))
    return str(write(folder / "mood.json", content))


def test_a_task_with_more_labels_is_another_run(tasks, tmp_path):
    settings = finetune_settings(tasks, tmp_path, task=own_task(tasks, tmp_path / "a", metric="accuracy"))
    finetune.fine_tune(settings)
    more = own_task(tasks, tmp_path / "a", metric="accuracy", labels=["sad", "glad", "angry"])
    with pytest.raises(ValueError, match="holds another run"):
        finetune.fine_tune(replace(settings, task=more, resume=True))


def test_predictions_do_not_replace_the_tables_of_the_task(tasks, tmp_path):
    task = own_task(tasks, tmp_path / "run")
    with pytest.raises(ValueError, match="tables of mood lie there"):
        finetune.fine_tune(finetune_settings(tasks, tmp_path, task=task, predict=True))
    assert (tmp_path / "run/mood.tsv").read_bytes() == (tasks / "mood.tsv").read_bytes()


def test_predictions_do_not_replace_the_test_table(tasks, tmp_path):
    shutil.copy(tasks / "mood.tsv", write(tmp_path / "run/mood.tsv", ""))
    task = own_task(tasks, tmp_path / "a", test="../run/mood.tsv")
    with pytest.raises(ValueError, match="tables of mood lie there"):
        finetune.fine_tune(finetune_settings(tasks, tmp_path, task=task, predict=True))
    assert (tmp_path / "run/mood.tsv").read_bytes() == (tasks / "mood.tsv").read_bytes()


def test_the_task_of_the_toy_is_for_the_toy_alone(tasks, tmp_path, capsys):
    assert "--task toy is made up for --model toy" in refused(capsys, tasks, tmp_path, "toy")


@pytest.mark.parametrize("name", ["MNLI-m", "MNLI-mm", "AX", "toy"])
def test_a_task_is_not_named_like_a_submission_file(tasks, tmp_path, capsys, name):
    assert "no official task" in refused(capsys, tasks, tmp_path, own_task(tasks, tmp_path / "a", name=name))


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"], ids=["nothing", "byte order mark"])
def test_an_empty_test_table_is_refused(tasks, tmp_path, capsys, content):
    task = own_task(tasks, tmp_path / "a", test="empty.tsv")
    (tmp_path / "a/empty.tsv").write_bytes(content)
    assert "empty.tsv: the file is empty" in refused(capsys, tasks, tmp_path, task, "--predict")


@pytest.mark.parametrize("name", ["log.jsonl", "predictions.json", "RTE.tsv"])
def test_the_results_file_is_no_other_file_of_the_run(tasks, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    error = refused(capsys, tasks, tmp_path, "rte", "--results", tmp_path / "run" / name)
    assert "a file that the run itself writes" in error


def search_settings(tasks, tmp_path, **changes):
    return dense_settings(tasks, tmp_path, find="imp", sparsity=0.2, epochs=1, limit=8, **changes)


def test_a_search_that_is_refused_leaves_a_finished_one_as_it_was(tasks, tmp_path):
    finetune.find_imp(search_settings(tasks, tmp_path))
    before = folder_content(tmp_path / "run")
    with pytest.raises((ValueError, OSError)):
        finetune.find_imp(search_settings(tasks, tmp_path, data=tmp_path / "nowhere"))
    assert folder_content(tmp_path / "run") == before


def test_an_unfinished_search_is_not_begun_anew(tasks, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_fine_tuning_at(patch, 2)
        finetune.find_imp(search_settings(tasks, tmp_path))
    before = folder_content(tmp_path / "run")
    with pytest.raises(ValueError, match="holds this search, unfinished"):
        finetune.find_imp(search_settings(tasks, tmp_path))
    assert folder_content(tmp_path / "run") == before


def test_a_round_that_was_killed_between_two_results_is_made_again(tasks, tmp_path):
    expected = finetune.find_imp(search_settings(tasks, tmp_path))
    (tmp_path / "run/mask.json").unlink()
    (tmp_path / "run/round-1/result.json").unlink()  # its mask.pt is left
    assert finetune.find_imp(search_settings(tasks, tmp_path, resume=True))["rounds"] == expected["rounds"]
