"""The losses in corners: leaving the teacher, and dev batches in which no token was chosen.

    python -m pytest dev/test_losses.py
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import tamt
from helpers import begin
from test_tamt import EAST_NORTH, EMBEDDINGS, NORTH_NORTH, mask_settings, ordinary_ids


def test_mlm_loss_of_a_batch_in_which_nothing_was_chosen_is_0():
    no_logits = torch.empty(0, 10)
    no_labels = torch.empty(0, dtype=torch.long)
    assert tamt.mlm_loss(no_logits, no_labels, batch_num_predicted=0).item() == 0


def test_the_teacher_shares_the_weights_of_the_student(model):
    """Changing a weight changes the teacher."""
    input_ids = ordinary_ids(model)
    name = next(iter(tamt.maskable_layers(model)))
    changed = copy.deepcopy(model)
    changed.get_parameter(name).data.mul_(2)

    layers = tamt.install_masked_layers(model)
    tamt.set_masks(layers, tamt.magnitude_masks(layers, 0.5, "local"))
    layers[name].weight.data.mul_(2)
    with tamt.dense_teacher(model):
        assert torch.equal(model(input_ids)[-1], changed(input_ids)[-1])


def test_leaving_the_teacher_restores_the_masked_model(model, masked_layers, masks):
    tamt.set_masks(masked_layers, masks)
    input_ids = ordinary_ids(model)
    before = model(input_ids)[-1]
    with tamt.dense_teacher(model):
        assert not torch.equal(model(input_ids)[-1], before)
    assert torch.equal(model(input_ids)[-1], before)


@pytest.mark.parametrize("is_training", [True, False])
def test_leaving_the_teacher_restores_train_or_eval_mode(model, masked_layers, is_training):
    model.train(is_training)
    with tamt.dense_teacher(model):
        pass
    assert all(module.training == is_training for module in model.modules())


def test_an_error_inside_the_teacher_restores_the_masked_model(model, masked_layers, masks):
    tamt.set_masks(masked_layers, masks)
    input_ids = ordinary_ids(model)
    before = model(input_ids)[-1]
    with pytest.raises(ZeroDivisionError), tamt.dense_teacher(model):
        raise ZeroDivisionError
    assert torch.equal(model(input_ids)[-1], before)


def test_after_the_dev_losses_training_goes_on_with_dropout(inputs):
    training = begin(mask_settings(inputs))
    tamt.dev_losses(training.model, training.inputs.rows[:16], training.inputs.vocabulary, training.run.machine)
    assert all(module.training for module in training.model.modules())


def test_the_dev_kd_loss_of_the_unpruned_model_is_0(inputs):
    training = begin(mask_settings(inputs, sparsity=0.0))
    inputs = training.inputs
    losses = tamt.dev_losses(training.model, inputs.rows[:32], inputs.vocabulary, training.run.machine)
    assert 0 <= losses["dev_kd_loss"] < 1e-6


@pytest.fixture
def empty_row(inputs):
    """(1, 16): [CLS] and [SEP], so that there is nothing to predict."""
    vocabulary = data.vocabulary(inputs / "bert")
    row = np.full((1, 16), vocabulary.pad_id)
    row[0, :2] = vocabulary.cls_id, vocabulary.sep_id
    return row


def test_a_dev_batch_in_which_nothing_was_chosen_does_not_count(inputs, empty_row):
    training = begin(mask_settings(inputs))
    rows = training.inputs.rows[:16]  # one batch; the short row is the second one
    expected = tamt.dev_losses(training.model, rows, training.inputs.vocabulary, training.run.machine)
    with_short_row = np.concatenate([rows, empty_row])
    found = tamt.dev_losses(training.model, with_short_row, training.inputs.vocabulary, training.run.machine)
    assert found["dev_mlm_loss"] == expected["dev_mlm_loss"]


def test_without_any_chosen_token_there_is_no_dev_mlm_loss(inputs, empty_row):
    training = begin(mask_settings(inputs))
    losses = tamt.dev_losses(training.model, empty_row, training.inputs.vocabulary, training.run.machine)
    assert losses.keys() == {"dev_kd_loss"}


@pytest.mark.parametrize("is_token, expected", [([True, False], 1.0), ([False, True], 0.0)])
def test_kd_loss_leaves_padding_out(is_token, expected):
    states = [EMBEDDINGS, EAST_NORTH], [-EMBEDDINGS, NORTH_NORTH]
    loss = tamt.kd_loss(*states, torch.tensor([is_token]), batch_num_tokens=1)
    assert loss.item() == expected


@pytest.mark.parametrize("objective", ["mlm", "kd", "mlm+kd"])
def test_micro_batches_add_up_to_the_loss_and_the_gradient_of_the_batch(inputs, objective):
    """Row 3 is cut to nine tokens, so that the micro-batches hold different numbers of tokens and predictions."""
    gradients = []
    losses = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        training = begin(mask_settings(inputs, folder="no-dropout", objective=objective, batch_size=batch_size,
                                       accumulate=accumulate))
        batch = tamt.next_batch(training)
        batch.is_token[3, 9:] = False
        batch.is_predicted[3, 9:] = False
        losses.append(float(tamt.backpropagate(training, batch)))
        gradients.append([parameter.grad for parameter in training.parameters.values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(*gradients, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("objective", ["mlm", "kd", "mlm+kd"])
def test_the_shares_of_two_processes_add_up_to_the_loss_and_the_gradient_of_one(inputs, monkeypatch, objective):
    """Adam hardly notices a constant factor, so masks alone would not show a mean in the place of the sum."""
    sums = []
    monkeypatch.setattr(tamt, "sum_over_processes", lambda tensors, machine: None)  # the test adds them up
    for num_processes in (1, 2):
        training = begin(mask_settings(inputs, folder="no-dropout", objective=objective))
        batch = tamt.next_batch(training)
        loss = 0.0
        for index in range(num_processes):
            machine = replace(training.run.machine, process_index=index, num_processes=num_processes)
            training.run = replace(training.run, machine=machine)
            loss += float(tamt.backpropagate(training, batch))  # adds to the gradients, too
        sums.append((loss, [parameter.grad for parameter in training.parameters.values()]))
    (one_loss, one_gradients), (two_loss, two_gradients) = sums
    assert one_loss == pytest.approx(two_loss, rel=1e-6)
    for a, b in zip(one_gradients, two_gradients, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


@pytest.fixture
def dev_batches(inputs):
    """A model, its dev losses on 40 rows (any will do), and these rows in batches of 16, 16 and 8, corrupted with the
    seed of the released evaluation."""
    training = begin(mask_settings(inputs))
    rows = training.inputs.rows[:40]
    found = tamt.dev_losses(training.model, rows, training.inputs.vocabulary, training.run.machine, batch_size=16)
    training.model.eval()
    generator = np.random.default_rng(42)
    batches = [tamt.make_batch(rows[start:start + 16], training.inputs.vocabulary, generator) for start in (0, 16, 32)]
    return training.model, found, batches


def test_the_dev_mlm_loss_is_the_mean_of_the_losses_of_its_batches(dev_batches):
    model, found, batches = dev_batches
    losses = []
    for batch in batches:
        is_predicted = torch.from_numpy(batch.is_predicted)
        logits = model.mlm_logits(model(torch.from_numpy(batch.corrupted_ids))[-1])
        losses.append(F.cross_entropy(logits[is_predicted], torch.from_numpy(batch.input_ids)[is_predicted]).item())
    # The batch of 8 weighs as much as one of 16; so it does in the released evaluation.
    assert found["dev_mlm_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_the_dev_kd_loss_is_the_mean_over_batches_of_clean_text(dev_batches):
    model, found, batches = dev_batches
    losses = []
    for batch in batches:
        student = model(torch.from_numpy(batch.input_ids))
        with tamt.dense_teacher(model):
            teacher = model(torch.from_numpy(batch.input_ids))
        losses.append(tamt.kd_loss(teacher, student, None, batch.num_tokens).item())
    assert found["dev_kd_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_every_masked_matrix_but_the_pooler_gets_a_gradient(model):
    """The hidden states, which both losses read, depend on all of them."""
    layers = tamt.install_masked_layers(model.requires_grad_(False))
    tamt.Scores(layers, tamt.magnitude_masks(layers, 0.6, "local"), 0.6, "local")
    model(ordinary_ids(model))[-1].square().sum().backward()
    without_gradient = [name for name, layer in layers.items() if layer.scores.grad is None]
    assert without_gradient == [f"{model.config.model_type}.pooler.dense.weight"]
