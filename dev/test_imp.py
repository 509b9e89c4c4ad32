"""Iterative magnitude pruning with masked LM: levels, what is trained between prunings, and what each pruning leaves.

    python -m pytest dev/test_imp.py
"""

import itertools

import pytest

import tamt
from helpers import is_subset
from test_tamt import imp_masks, names_of_changed, second_pruning


def test_the_levels_of_imp_rise_by_tenths_and_end_at_the_sparsity_asked_for():
    assert tamt.imp_levels(0.35) == [0.1, 0.2, 0.3, 0.35]
    assert tamt.imp_levels(0.3) == [0.1, 0.2, 0.3]
    assert tamt.imp_levels(0.05) == [0.05]


@pytest.mark.parametrize("rank", ["local", "global"])
def test_what_imp_has_pruned_stays_pruned(models, tmp_path, rank):
    for earlier, later in itertools.pairwise(imp_masks(models, tmp_path, rank)):
        assert is_subset(later, earlier)


def test_without_rewinding_imp_leaves_all_weights_as_they_were_trained(models, tmp_path):
    weights = second_pruning(models, tmp_path, no_rewind=True)
    assert names_of_changed(weights.trained, weights.rewound) == set()
