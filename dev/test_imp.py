"""Iterative magnitude pruning with masked LM: levels, what is trained between prunings, and what each pruning leaves.

    python -m pytest dev/test_imp.py
"""

import itertools

import pytest
import torch

import tamt
from helpers import begin, is_subset, one_update, three_updates, weights_of
from test_tamt import (
    IMP,
    IMP_LEVELS,
    MLM_HEAD,
    imp_masks,
    mask_settings,
    names_of_changed,
    prune_all_by_sorting,
    same_masks,
)


def test_the_levels_of_imp_rise_by_tenths_and_end_at_the_sparsity_asked_for():
    assert tamt.imp_sparsities(0.35) == [0.1, 0.2, 0.3, 0.35]
    assert tamt.imp_sparsities(0.3) == [0.1, 0.2, 0.3]
    assert tamt.imp_sparsities(0.05) == [0.05]


@pytest.mark.parametrize("rank", ["local", "global"])
def test_what_imp_has_pruned_stays_pruned(inputs, tmp_path, rank):
    for earlier, later in itertools.pairwise(imp_masks(inputs, tmp_path, rank)):
        assert is_subset(later, earlier)


def second_pruning(inputs, out, **changes):
    """The first two prunings of IMP, with three updates between them -> the weights before and after the second."""
    training = begin(mask_settings(inputs, out, **IMP, **changes))
    tamt.prune(training, 0.1)
    three_updates(training)
    trained = weights_of(training.model)
    tamt.prune(training, 0.2)
    if not training.run.no_rewind:
        tamt.restore_weights(training, f"{training.run.family}.")
    return trained, weights_of(training.model)


def test_without_rewinding_imp_leaves_all_weights_as_they_were_trained(inputs, tmp_path):
    before, after = second_pruning(inputs, tmp_path, no_rewind=True)
    assert names_of_changed(before, after) == set()


def test_imp_finds_the_masks_of_a_plain_loop_over_rounds(inputs, tmp_path):
    """The loop makes its updates by the program's functions. When to prune, what to prune and what to rewind is its
    own."""
    found = imp_masks(inputs, tmp_path, "global")
    training = begin(mask_settings(inputs, **IMP))
    pretrained = weights_of(training.model)
    for round_number, level in enumerate(IMP_LEVELS):
        # What was pruned before counts as 0, so it stays pruned. (Its weight is still there, under the mask.)
        magnitudes = {name: layer.weight.abs() * layer.mask for name, layer in training.masked_layers.items()}
        masks = prune_all_by_sorting(magnitudes, level)
        assert same_masks(masks, found[round_number])

        tamt.set_masks(training.masked_layers, masks)
        for name in pretrained.keys() - MLM_HEAD:
            training.model.get_parameter(name).data.copy_(pretrained[name])
        training.optimizer = tamt.make_optimizer(training.parameters.values(), torch.device("cpu"))
        for t in (1, 2, 3):
            learning_rate = 2e-3 * (1 - (t - 1) / 30)  # falls as if a round had 30 updates, ten times as many as it has
            one_update(training, learning_rate, t)
            training.updates_done += 1


def test_a_pruning_of_imp_leaves_the_head_as_it_was_trained(inputs, tmp_path):
    before, after = second_pruning(inputs, tmp_path)
    assert names_of_changed(before, after).isdisjoint(MLM_HEAD)
