"""Runs of mask training: logs, reports, options, fresh heads, and work that several processes share.

    python -m pytest dev/test_runs.py
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import bert
import data
import tamt
from helpers import (
    assert_masks_differ,
    begin,
    exit_status,
    masks_of,
    num_different,
    read_log,
    share_of_flips,
    watch_rankings,
)
from test_tamt import MLM_HEAD, ROOT, interrupt_after, mask_settings, num_entries, num_pruned, same_masks


def test_find_mask_returns_the_content_of_mask_json(inputs, tmp_path):
    content = tamt.find_mask(mask_settings(inputs, tmp_path))
    assert content == json.loads((tmp_path / "mask.json").read_text())


def test_the_report_counts_the_entries_of_the_mask(inputs, tmp_path):
    content = tamt.find_mask(mask_settings(inputs, tmp_path))
    masks = tamt.load_mask(tmp_path)
    assert content["sparsity"]["pruned"] == num_pruned(masks)
    assert content["sparsity"]["entries"] == num_entries(masks)


def test_the_log_has_a_line_every_few_updates_and_for_each_evaluation(inputs, tmp_path):
    tamt.find_mask(mask_settings(inputs, tmp_path, steps=12, log_every=4, eval_every=6))
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [4, 6, 8, 12]
    assert "dev_mlm_loss" in lines[1] and "dev_kd_loss" in lines[1]


def test_the_log_says_how_much_is_kept(inputs, tmp_path):
    tamt.find_mask(mask_settings(inputs, tmp_path, lr=1e-2))
    assert [line["kept"] for line in read_log(tmp_path)] == pytest.approx([0.3] * 3, abs=1e-4)


def test_the_log_says_which_share_of_the_entries_changed_sides(inputs, tmp_path, monkeypatch):
    masks = []
    watch_rankings(monkeypatch, lambda layers, step: masks.append(masks_of(layers)))
    tamt.find_mask(mask_settings(inputs, tmp_path, lr=1e-2, log_every=1, refresh_every=1))
    expected = [num_different(a, b) / num_entries(a) for a, b in itertools.pairwise(masks)]
    assert max(expected) > 0
    assert [line["flips"] for line in read_log(tmp_path)][1:] == pytest.approx(expected)


def test_masks_are_saved_on_the_way(inputs, tmp_path, monkeypatch):
    masks = {}
    watch_rankings(monkeypatch, lambda layers, step: masks.update({step: masks_of(layers)}))
    tamt.find_mask(mask_settings(inputs, tmp_path, steps=12, save_every=5, lr=1e-2))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-10", "step-5"]
    assert same_masks(tamt.load_mask(tmp_path / "step-5"), masks[5])
    assert same_masks(tamt.load_mask(tmp_path / "step-10"), masks[10])
    assert_masks_differ(masks[5], masks[10])


def test_at_sparsity_0_the_student_is_the_teacher(inputs, tmp_path):
    content = tamt.find_mask(mask_settings(inputs, tmp_path, objective="kd", steps=3, sparsity=0.0))
    assert content["sparsity"]["pruned"] == 0
    assert content["dev_kd_loss"] == pytest.approx(0, abs=1e-6)


def test_at_sparsity_0_999_one_entry_of_a_thousand_is_left(inputs, tmp_path):
    content = tamt.find_mask(mask_settings(inputs, tmp_path, objective="kd", steps=3, sparsity=0.999))
    assert content["sparsity"]["pruned"] == round(content["sparsity"]["entries"] * 0.999)


def test_scope_encoder_leaves_the_word_embeddings_dense(inputs, tmp_path):
    content = tamt.find_mask(mask_settings(inputs, tmp_path, scope="encoder", steps=3))
    masks = tamt.load_mask(tmp_path)
    assert not any("word_embeddings" in name for name in masks)
    assert content["sparsity"]["masked_set"] == pytest.approx(0.7, abs=1e-4)


def test_init_random_starts_from_a_random_mask(inputs, tmp_path):
    tamt.find_mask(mask_settings(inputs, tmp_path / "start", method="random"))
    # The learning rate is too small to flip anything.
    tamt.find_mask(mask_settings(inputs, tmp_path / "run", init="random", lr=1e-6, rank="local"))
    assert same_masks(tamt.load_mask(tmp_path / "start"), tamt.load_mask(tmp_path / "run"))


def test_a_slow_run_says_between_its_progress_lines_how_far_it_is(inputs, tmp_path, capsys, monkeypatch):
    """Here each update counts as slow."""
    monkeypatch.setattr(tamt, "SHOW_SECONDS", -1)
    tamt.find_mask(mask_settings(inputs, tmp_path, steps=4, log_every=4))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    for number, line in enumerate(lines[:3], 1):
        assert re.fullmatch(rf"step {number}/4  ETA \d+:\d\d", line)
    assert lines[3].startswith("step 4/4  loss ")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_with_lines_each_row_is_a_line_of_the_text_padded(inputs, tmp_path, monkeypatch):
    rows = []
    next_batch = tamt.next_batch

    def look(training):
        batch = next_batch(training)
        for input_ids, is_token in zip(batch.input_ids, batch.is_token, strict=True):
            rows.append(tuple(input_ids[is_token]))
        return batch

    monkeypatch.setattr(tamt, "next_batch", look)
    tamt.find_mask(mask_settings(inputs, tmp_path, lines=True, objective="mlm+kd", steps=3))
    tokenizer = data.vocabulary(inputs / "bert").tokenizer
    lines = {tuple(tokenizer.encode("[CLS]" + line + "[SEP]", add_special_tokens=False).ids)
             for line in (inputs / "text.txt").read_text().splitlines()}
    assert len(rows) == 3 * 8
    assert set(rows) <= lines


@pytest.fixture
def headless(inputs, tmp_path):
    """A checkpoint without a masked-LM head."""
    tensors = {}
    for name, parameter in bert.load(inputs / "bert").named_parameters():
        if not name.startswith("cls."):
            tensors[name] = parameter
    shutil.copytree(inputs / "bert", tmp_path / "headless")
    bert.save(tmp_path / "headless", bert.load(inputs / "bert").config, tensors, "Model")
    return str(tmp_path / "headless")


@pytest.fixture
def with_fresh_head(inputs, tmp_path, headless, capsys):  # capsys comes first, to see what the run prints
    """A run of masked LM on a checkpoint without a head -> the content of its mask.json, and its export."""
    export = tmp_path / "export"
    settings = mask_settings(inputs, tmp_path / "run", model=headless, objective="mlm", export=export)
    return tamt.find_mask(settings), export


@pytest.mark.usefixtures("with_fresh_head")
def test_a_fresh_masked_lm_head_is_announced(capsys):
    assert "has no masked-LM head: a fresh one is trained" in capsys.readouterr().out


def test_a_fresh_masked_lm_head_is_not_scored(with_fresh_head):
    content, _ = with_fresh_head
    assert "dev_kd_loss" in content and "dev_mlm_loss" not in content


def test_a_fresh_masked_lm_head_is_not_exported(with_fresh_head):
    _, export = with_fresh_head
    assert not any(name.startswith("cls.") for name in bert.read_safetensors(export / "model.safetensors"))


def test_for_kd_a_model_without_masked_lm_head_needs_none_and_reports_no_mlm_loss(inputs, tmp_path, headless):
    content = tamt.find_mask(mask_settings(inputs, tmp_path / "run", model=headless, objective="kd"))
    assert "dev_mlm_loss" not in content


def test_accumulated_micro_batches_learn_the_mask_of_one_big_batch(inputs, tmp_path):
    """Without dropout, but for rounding."""
    contents = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        contents.append(tamt.find_mask(mask_settings(
            inputs, tmp_path / str(accumulate), "no-dropout", objective="mlm+kd", batch_size=batch_size,
            accumulate=accumulate, lr=1e-2)))
    masks = [tamt.load_mask(tmp_path / name) for name in ("1", "4")]
    assert num_different(*masks) <= 1e-3 * num_entries(masks[0])
    assert share_of_flips(tmp_path / "1") > 0.1
    assert contents[0]["dev_mlm_loss"] == pytest.approx(contents[1]["dev_mlm_loss"], abs=1e-3)


@pytest.mark.slow
def test_two_processes_learn_the_mask_of_one(inputs, tmp_path):
    """With two micro-batches in each update; dev/test_hosts.py has one."""
    accumulate = 2
    common = ["--model", inputs / "no-dropout", "--data", inputs / "text.txt", "--steps", 6, "--seq-len", 16,
              "--lr", 1e-2, "--objective", "mlm+kd", "--device", "cpu", "--batch-size", 8 // accumulate]
    assert exit_status(tamt.main, *common, "--accumulate", accumulate, "--out", tmp_path / "one") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tamt.py",
               *common, "--accumulate", accumulate, "--out", tmp_path / "two"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True, cwd=tmp_path,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = (tamt.load_mask(tmp_path / name) for name in ("one", "two"))
    assert num_different(one, two) <= 1e-3 * num_entries(one)
    assert share_of_flips(tmp_path / "one") > 0.01
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["loss"]
              for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    contents = [json.loads((tmp_path / name / "mask.json").read_text()) for name in ("one", "two")]
    assert contents[0]["dev_mlm_loss"] == pytest.approx(contents[1]["dev_mlm_loss"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_training_has_nearly_the_losses_and_the_mask_of_the_usual_one(inputs, tmp_path):
    """With dropout: the compiled network draws the same numbers."""
    losses = []
    for is_compiled in (False, True):
        out = tmp_path / str(is_compiled)
        tamt.find_mask(mask_settings(inputs, out, objective="mlm+kd", compile=is_compiled, lr=1e-2))
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(*losses, atol=1e-4)
    assert share_of_flips(tmp_path / "True") > 0.1
    assert tamt.similarity(tamt.load_mask(tmp_path / "False"), tamt.load_mask(tmp_path / "True")) > 0.99


def test_a_mask_says_how_it_was_found(inputs, tmp_path):
    tamt.find_mask(mask_settings(inputs, tmp_path, objective="kd", steps=4))
    _, meta = tamt.read_mask(tmp_path)
    assert meta["model"] == str(inputs / "bert")
    assert meta["method"] == "tamt" and meta["objective"] == "kd"
    assert meta["sparsity"] == 0.7 and meta["step"] == 4
    assert "dev_kd_loss" in meta


def test_seed_dropout_gives_each_update_and_each_seed_its_own_draws():
    draws = []
    for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        tamt.seed_dropout(seed, step)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[3]
    assert draws[0] != draws[1] and draws[0] != draws[2]


def test_an_interrupted_run_leaves_no_mask(inputs, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        tamt.find_mask(mask_settings(inputs, tmp_path, steps=12, save_every=5))
    assert not (tmp_path / "mask.pt").exists()


def test_imp_prunes_other_weights_than_omp(inputs, tmp_path):
    """So the training between its prunings matters."""
    for method in ("imp", "omp"):
        tamt.find_mask(mask_settings(inputs, tmp_path / method, method=method, prune_every=3, sparsity=0.3, lr=1e-2))
    assert_masks_differ(tamt.load_mask(tmp_path / "imp"), tamt.load_mask(tmp_path / "omp"))


def test_mask_training_has_dropout(inputs, tmp_path):
    for family in ("bert", "no-dropout"):  # the same weights
        tamt.find_mask(mask_settings(inputs, tmp_path / family, family, log_every=1))
    with_dropout, without = (read_log(tmp_path / family)[0]["loss"] for family in ("bert", "no-dropout"))
    assert with_dropout != pytest.approx(without, abs=1e-3)


def test_the_learning_rate_falls_linearly_to_0(inputs, tmp_path):
    tamt.find_mask(mask_settings(inputs, tmp_path, steps=12, lr=2e-3, log_every=1))
    expected = [2e-3 * (1 - step / 12) for step in range(12)]  # 0 would be that of update 13
    assert [line["lr"] for line in read_log(tmp_path)] == pytest.approx(expected)


def trained_names(inputs, objective):
    return begin(mask_settings(inputs, objective=objective)).parameters.keys()


@pytest.mark.parametrize("objective", ["mlm", "kd", "mlm+kd"])
def test_the_scores_of_all_matrices_but_the_pooler_are_trained(inputs, objective):
    scores = [name for name in trained_names(inputs, objective) if name.endswith(".scores")]
    assert len(scores) == 1 + 2 * 6  # word embeddings, and six in each layer
    assert not any("pooler" in name for name in scores)


@pytest.mark.parametrize("objective, expected", [("mlm", MLM_HEAD), ("mlm+kd", MLM_HEAD), ("kd", set())])
def test_the_masked_lm_head_is_trained_only_if_the_objective_has_masked_lm(inputs, objective, expected):
    assert {name for name in trained_names(inputs, objective) if not name.endswith(".scores")} == expected


def batch_of(inputs, seed, step):
    training = begin(mask_settings(inputs, seed=seed))
    training.updates_done = step
    found = tamt.next_batch(training)
    return [found.input_ids.tolist(), found.corrupted_ids.tolist(), found.is_predicted.tolist()]


def test_a_batch_does_not_depend_on_what_torch_drew_before(inputs):
    first = batch_of(inputs, seed=1, step=3)
    torch.manual_seed(20)
    assert batch_of(inputs, seed=1, step=3) == first


@pytest.mark.parametrize("seed, step", [(1, 4), (2, 3)])
def test_seed_and_step_each_change_the_batch(inputs, seed, step):
    assert batch_of(inputs, seed, step)[0] != batch_of(inputs, seed=1, step=3)[0]  # the rows themselves


@pytest.mark.parametrize("method", ["tamt", "imp"])
def test_find_mask_and_evaluate_report_the_same_dev_losses(inputs, tmp_path, method):
    """--evaluate knows the mask and the pretrained model, and nothing else of the run."""
    content = tamt.find_mask(mask_settings(inputs, tmp_path, method=method, prune_every=3, lr=1e-2))
    found = tamt.evaluate_mask(mask_settings(inputs, evaluate=True, mask=tmp_path / "mask.pt"))
    assert found["dev_mlm_loss"] == content["dev_mlm_loss"]
    assert found["dev_kd_loss"] == content["dev_kd_loss"]


def test_distillation_brings_the_student_nearer_to_its_teacher(inputs, tmp_path):
    start = tamt.find_mask(mask_settings(inputs, tmp_path / "omp", method="omp"))
    learned = tamt.find_mask(mask_settings(inputs, tmp_path / "tamt", objective="kd", steps=120, lr=5e-3))
    assert learned["dev_kd_loss"] < 0.9 * start["dev_kd_loss"]


def test_after_resuming_the_speed_is_that_of_the_updates_since_then(inputs, tmp_path, monkeypatch, capsys):
    """The first line after it has the mean loss of all updates since the last line, but the time of a part of them."""
    now = 0.0
    monkeypatch.setattr(tamt.time, "time", lambda: now)
    training = begin(mask_settings(inputs, tmp_path))  # a line after every fourth update
    training.log.add(1, 1.0, 1e-3, {})
    training.log.add(2, 1.0, 1e-3, {})
    state = training.log.state()

    log = tamt.Log(training.run, training.masked_layers)  # as a new process has it
    log.restore(state)
    for step in (3, 4):
        now += 5.0
        log.add(step, 2.0, 1e-3, {})
    line = read_log(tmp_path)[-1]
    assert line["loss"] == 1.5
    assert line["ms_per_step"] == 5000


def test_what_several_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="fine-tuning takes one process: start it without torchrun"):
        tamt.refuse_several_processes(tamt.Machine(torch.device("cpu"), num_processes=2), "fine-tuning")


def test_a_run_of_two_processes_is_not_resumed_by_one(inputs, tmp_path):
    """Their dropout differs."""
    identities = []
    for num_processes in (1, 2):
        machine = tamt.Machine(torch.device("cpu"), num_processes=num_processes)
        run = tamt.fill_in_defaults(mask_settings(inputs, tmp_path), machine, bert.load(inputs / "bert"))
        identities.append(tamt.identity_of_run(run, None, None))
    torch.save({"format": 2, "settings": identities[1], "step": 3}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="num_processes"):
        tamt.check_folder(tmp_path, identities[0], "mask.json")

    (tmp_path / "state.pt").unlink()  # finished: it does not matter any more
    tamt.write_json(tmp_path / "mask.json", {"settings": identities[0] | {"num_processes": 8}})
    tamt.check_folder(tmp_path, identities[0], "mask.json")


def test_the_time_of_an_update_does_not_include_evaluations(inputs, tmp_path, monkeypatch):
    now = 0.0

    def evaluate(*_):
        nonlocal now
        now += 1000.0
        return {"dev_kd_loss": 1.0}

    def backpropagate(*_):
        nonlocal now
        now += 3.0
        return torch.tensor(1.0)

    monkeypatch.setattr(tamt.time, "time", lambda: now)
    monkeypatch.setattr(tamt, "dev_losses", evaluate)
    monkeypatch.setattr(tamt, "backpropagate", backpropagate)
    monkeypatch.setattr(tamt, "clip_and_check", lambda *_: 1.0)
    monkeypatch.setattr(tamt, "optimizer_step", lambda *_: None)
    tamt.find_mask(mask_settings(inputs, tmp_path, eval_every=4))
    assert [line["ms_per_step"] for line in read_log(tmp_path)] == [3000] * 3


def test_a_state_is_sent_to_other_processes_without_a_vector_behind_its_scores(inputs, tmp_path, monkeypatch):
    """In states of earlier versions the scores share one vector, and pickle would send it with each of them."""
    tamt.find_mask(mask_settings(inputs, tmp_path))
    (tmp_path / "mask.json").unlink()  # as if it were not finished
    state = tamt.read_state(tmp_path)
    vector = torch.cat([tensor.flatten() for tensor in state["parameters"].values()])
    state["parameters"] = tamt.cut_into_matrices(vector, state["parameters"])
    tamt.write_torch(tmp_path / "state.pt", state)
    monkeypatch.setattr(tamt, "refuse_different_inputs", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda outcome, src: None)
    machine = tamt.Machine(torch.device("cpu"), num_processes=2)
    _, sent = tamt.open_folder(tmp_path, state["settings"], True, "mask.json", machine)
    for name, tensor in sent["parameters"].items():
        assert torch.equal(tensor, state["parameters"][name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_state_with_scores_that_are_not_finite_is_refused(inputs, tmp_path, value):
    training = begin(mask_settings(inputs, tmp_path, objective="kd"))
    some_layer = next(iter(training.masked_layers.values()))
    some_layer.scores.data[0, 3] = value
    training.run = replace(training.run, save_every=1)
    tamt.save_state_if_due(training)
    with pytest.raises(ValueError, match="state.pt: .* not finite; remove the file to start anew"):
        tamt.restore_state(training, tamt.read_state(training.run.out))
