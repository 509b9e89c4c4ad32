"""The losses in corners: leaving the teacher, and dev batches in which no token was chosen.

    python -m pytest dev/test_losses.py
"""

import copy

import numpy as np
import pytest
import torch

import data
import tamt
from test_tamt import begin, mask_settings, ordinary_ids


def test_mlm_loss_of_a_batch_in_which_nothing_was_chosen_is_0():
    no_logits = torch.empty(0, 10)
    no_labels = torch.empty(0, dtype=torch.long)
    assert tamt.mlm_loss(no_logits, no_labels).item() == 0


def test_the_teacher_shares_the_weights_of_the_student(model):
    """Changing a weight changes the teacher."""
    input_ids = ordinary_ids(model)
    name = next(iter(tamt.maskable_layers(model)))
    changed = copy.deepcopy(model)
    changed.get_parameter(name).data.mul_(2)

    layers = tamt.mask_model(model)
    tamt.set_masks(layers, tamt.magnitude_masks(layers, 0.5, "local"))
    layers[name].weight.data.mul_(2)
    with tamt.dense_teacher(model):
        assert torch.equal(model(input_ids)[-1], changed(input_ids)[-1])


def test_leaving_the_teacher_restores_the_masked_model(model, layers, masks):
    tamt.set_masks(layers, masks)
    input_ids = ordinary_ids(model)
    before = model(input_ids)[-1]
    with tamt.dense_teacher(model):
        assert not torch.equal(model(input_ids)[-1], before)
    assert torch.equal(model(input_ids)[-1], before)


@pytest.mark.parametrize("is_training", [True, False])
def test_leaving_the_teacher_restores_train_or_eval_mode(model, layers, is_training):
    model.train(is_training)
    with tamt.dense_teacher(model):
        pass
    assert all(module.training == is_training for module in model.modules())


def test_an_error_inside_the_teacher_restores_the_masked_model(model, layers, masks):
    tamt.set_masks(layers, masks)
    input_ids = ordinary_ids(model)
    before = model(input_ids)[-1]
    with pytest.raises(ZeroDivisionError), tamt.dense_teacher(model):
        raise ZeroDivisionError
    assert torch.equal(model(input_ids)[-1], before)


def test_after_the_dev_losses_training_goes_on_with_dropout(world):
    training = begin(mask_settings(world))
    tamt.dev_losses(training.model, training.rows[:16], training.vocabulary, training.run.machine)
    assert all(module.training for module in training.model.modules())


def test_the_dev_kd_loss_of_the_unpruned_model_is_0(world):
    training = begin(mask_settings(world, sparsity=0.0))
    losses = tamt.dev_losses(training.model, training.rows[:32], training.vocabulary, training.run.machine)
    assert 0 <= losses["dev_kd_loss"] < 1e-6


@pytest.fixture
def empty_row(world):
    """(1, 16): [CLS] and [SEP], so that there is nothing to predict."""
    vocabulary = data.vocabulary(world / "bert")
    row = np.full((1, 16), vocabulary.pad_id)
    row[0, :2] = vocabulary.cls_id, vocabulary.sep_id
    return row


def test_a_dev_batch_in_which_nothing_was_chosen_does_not_count(world, empty_row):
    training = begin(mask_settings(world))
    rows = training.rows[:16]  # one batch; the short row is the second one
    expected = tamt.dev_losses(training.model, rows, training.vocabulary, training.run.machine)
    with_short_row = np.concatenate([rows, empty_row])
    found = tamt.dev_losses(training.model, with_short_row, training.vocabulary, training.run.machine)
    assert found["dev_mlm_loss"] == expected["dev_mlm_loss"]


def test_without_any_chosen_token_there_is_no_dev_mlm_loss(world, empty_row):
    training = begin(mask_settings(world))
    losses = tamt.dev_losses(training.model, empty_row, training.vocabulary, training.run.machine)
    assert losses.keys() == {"dev_kd_loss"}


