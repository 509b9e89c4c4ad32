"""What the released code computed, recomputed here: its masks entry for entry, and the losses of its updates.

    python -m pytest dev/test_released.py
"""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bert
import tamt
from helpers import edit_json, masks_of, num_different
from test_tamt import REAL, assert_close, needs_real_inputs

# shared/data/released holds what the released code did with 40 (mlm) and 60 (kd) batches: the batches, the loss at each
# of them, and the mask at the end. The tests make the same updates, from the same start mask and without dropout, and
# compare. A score within rounding of its threshold may fall on either side of it, depending on the order in which a
# processor adds up. Then a few entries differ, or change one update earlier or later, and with them the loss.


RELEASED_RATES = {"mlm": 1e-3, "kd": 3e-4}


def released_arrays(expected, prefix) -> dict:
    """{name: array} of the arrays that are called <prefix>:<name> in the file."""
    return {key.removeprefix(f"{prefix}:"): expected[key] for key in expected.files if key.startswith(f"{prefix}:")}


def released_masks(expected, parameters) -> dict:
    """{name: bool tensor}; the file has eight entries to a byte."""
    masks = {}
    for name, packed in released_arrays(expected, "bits").items():
        shape = parameters[name].shape
        bits = np.unpackbits(packed, count=math.prod(shape)).astype(bool)
        masks[name] = torch.from_numpy(bits).view(shape)
    return masks


def released_batches(expected, objective) -> list:
    input_ids = expected["ids"].astype(np.int64)  # (updates, 8, 64)
    corrupted_ids = input_ids
    is_predicted = np.zeros(input_ids.shape, bool)
    if objective == "mlm":
        corrupted_ids = expected["shown"].astype(np.int64)
        is_predicted = np.unpackbits(expected["chosen"]).astype(bool).reshape(input_ids.shape)
    is_token = np.ones(input_ids.shape, bool)
    return [tamt.Batch(*arrays) for arrays in zip(input_ids, corrupted_ids, is_predicted, is_token, strict=True)]


def begin_as_released(tmp_path, objective, num_updates):
    """Mask training of bert-tiny at 75 %, local rank, without dropout, before its first update."""
    shutil.copytree(REAL / "models" / "bert-tiny-mlm", tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = tamt.Settings(model=str(tmp_path / "model"), objective=objective, sparsity=0.75, rank="local",
                             refresh_every=20, lr=RELEASED_RATES[objective], steps=num_updates, batch_size=8,
                             seq_len=64, data="toy", eval_every=10**6, save_every=10**6)
    machine = tamt.Machine(torch.device("cpu"))
    model, vocabulary = tamt.read_model(settings, machine)
    run = tamt.fill_in_defaults(settings, machine, model)
    layers = tamt.install_masked_layers(model)
    scores = tamt.Scores(layers, tamt.first_masks(layers, run), 0.75, "local")
    model.train()
    inputs = tamt.Inputs(run, {}, model, vocabulary, rows=None, dev_rows=None)
    return tamt.Training(inputs, layers, scores)


def released_run(tmp_path, objective, settle_after=None):
    """The updates of mlm.npz or kd.npz, made here, and how the result differs from what is in that file. After update
    number settle_after scores are settled that lie within rounding of a threshold."""
    expected = np.load(REAL / "released" / f"{objective}.npz")
    batches = released_batches(expected, objective)
    training = begin_as_released(tmp_path, objective, len(batches))
    start = masks_of(training.masked_layers)
    losses = []
    num_tied = 0
    for step, batch in enumerate(batches, 1):
        learning_rate = RELEASED_RATES[objective] * (1 - (step - 1) / len(batches))
        loss = tamt.backpropagate(training, batch)
        losses.append(tamt.clip_and_check(training, loss, training.run.clip))
        tamt.optimizer_step(training, learning_rate, step)
        if step == settle_after:
            num_tied = settle_ties(training.scores)
        if tamt.is_refresh_due(training.run, step):
            training.scores.renew_masks()
            tamt.set_thresholds(training.scores)
        else:
            tamt.apply_old_thresholds(training.scores)

    released = released_masks(expected, start)
    return SimpleNamespace(
        num_changed=num_different(released, start),  # by the released code, from the start to the end
        num_differing=num_different(released, masks_of(training.masked_layers)),
        loss_differences=np.abs(np.array(losses) - expected["losses"]),
        num_tied=num_tied)

UNIT_IN_THE_LAST_PLACE = 2.0**-30  # of a float32 near .01, where the thresholds are


def settle_ties(scores) -> int:
    """Puts scores that lie within two units in the last place of their threshold onto it -> how many those are."""
    num_tied = 0
    for layer, last in zip(scores.masked_layers.values(), scores.fast_ranking.last_rankings, strict=True):
        is_tied = (layer.scores - last.threshold).abs() <= 2 * UNIT_IN_THE_LAST_PLACE
        layer.scores.data[is_tied] = last.threshold
        num_tied += int(is_tied.sum())
    return num_tied


@pytest.fixture(scope="module")
def released_mlm_run(tmp_path_factory):
    """After update 24 one score of 4,300,032 lies within rounding of its threshold. On which side it falls depends on
    the order in which a processor adds up, and decides 12 entries of the final mask. So it is put onto the threshold,
    where the released run had it, at or below. (With AVX-512 it is further away, on the right side.)"""
    run = released_run(tmp_path_factory.mktemp("released"), "mlm", settle_after=24)
    assert run.num_tied <= 1
    assert run.num_changed > 8000  # the released run moved the mask
    return run


@needs_real_inputs
def test_the_mlm_mask_matches_the_released_code_entry_for_entry_once_its_one_tie_is_settled(released_mlm_run):
    assert released_mlm_run.num_differing == 0


@needs_real_inputs
def test_at_most_two_of_the_mlm_losses_differ_from_the_released_code(released_mlm_run):
    """Where they do, a score crosses a threshold one update earlier or later than in the released run."""
    assert (released_mlm_run.loss_differences > 1e-5).sum() <= 2
    assert released_mlm_run.loss_differences.max() < 1e-3


@pytest.fixture(scope="module")
def released_kd_run(tmp_path_factory):
    run = released_run(tmp_path_factory.mktemp("released"), "kd")
    assert run.num_changed > 13_000  # the released run moved the mask
    return run


@needs_real_inputs
def test_the_kd_mask_agrees_with_the_released_code_but_for_scores_near_a_threshold(released_kd_run):
    """Here roundings grow: an entry that falls on the other side of a threshold changes the gradients of others. Where
    this was written, 464 of the 13,654 entries that changed were different in the end."""
    assert released_kd_run.num_differing < 0.05 * released_kd_run.num_changed


@needs_real_inputs
def test_the_kd_losses_stay_within_0_002_of_the_released_code(released_kd_run):
    """They lie between .09 and .27. Where scores fall on the other side of a threshold, they differ."""
    assert released_kd_run.loss_differences.max() < 2e-3


def remove_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, bert.SelfAttention):
            module.dropout_prob = 0.0


@needs_real_inputs
def test_network_and_optimizer_reproduce_a_fine_tuning_run_of_the_released_code():
    """Thirty updates of RTE under a mask. The loop is written out here; that of finetune.py is compared with torch's
    prune below."""
    expected = np.load(REAL / "released" / "finetune_rte.npz")
    model = bert.load(REAL / "models" / "bert-tiny-mlm")
    model.add_pooler()
    model.add_classifier(2)
    del model.cls
    remove_dropout(model)
    parameters = dict(model.named_parameters())
    for name, array in released_arrays(expected, "start").items():
        parameters[name].data = torch.from_numpy(array).clone()
    masks = released_masks(expected, parameters)
    for name, mask in masks.items():
        parameters[name].data.mul_(mask)

    optimizer = tamt.make_optimizer(parameters.values(), torch.device("cpu"))
    model.train()
    num_updates = len(expected["losses"])
    for step in range(num_updates):
        rows = slice(8 * step, 8 * step + 8)
        input_ids = torch.from_numpy(expected["ids"][rows].astype(np.int64))
        attention_mask = torch.from_numpy(expected["attention_mask"][rows])
        token_type_ids = torch.from_numpy(expected["token_type_ids"][rows].astype(np.int64))
        logits = model.class_logits(model(input_ids, attention_mask, token_type_ids)[-1])
        loss = F.cross_entropy(logits, torch.from_numpy(expected["labels"][rows]))
        assert loss.item() == pytest.approx(float(expected["losses"][step]), abs=2e-6)
        loss.backward()
        for name, mask in masks.items():
            parameters[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        learning_rate = 1e-3 * (1 - step / num_updates)
        optimizer.param_groups[0].update(tamt.optimizer_settings("fine-tuning", learning_rate, step + 1))
        optimizer.step()
        optimizer.zero_grad()

    for name, array in released_arrays(expected, "end").items():
        assert_close(parameters[name].data, torch.from_numpy(array), 2e-5)
