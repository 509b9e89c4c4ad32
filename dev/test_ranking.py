"""The ranking in corners: thresholds, infinities, entries without a gradient, and masks between two refreshes.

    python -m pytest dev/test_ranking.py
"""

import math
import random

import numpy as np
import pytest
import torch

import data
import tamt
from helpers import begin, expected_pins, is_subset, masks_of, num_different, one_update
from test_tamt import mask_settings, num_entries, num_pruned, ordinary_ids, random_case, same_masks


def keep_largest_near(values, num_kept, threshold, radius):
    """tamt.keep_largest_near() for a single vector -> mask, the new threshold."""
    [mask], threshold = tamt.keep_largest_near([values], num_kept, threshold, radius)
    return mask, threshold


def keep_from_a_fixed_guess(values, num_kept):
    return keep_largest_near(values, num_kept, 0.5, 0.1)


def test_the_threshold_of_keep_largest_near_lies_between_pruned_and_kept_values():
    """Of tied values some may be kept and some pruned; then all of them equal the threshold."""
    generator = random.Random(2)
    for _ in range(300):
        values, num_kept = random_case(generator)
        mask, threshold = keep_from_a_fixed_guess(values, num_kept)
        assert (values[~mask] <= threshold).all() and (values[mask] >= threshold).all()


def test_without_ties_the_values_above_the_threshold_are_those_that_are_kept():
    generator = random.Random(3)
    for _ in range(50):
        values = torch.randn(1000)
        mask, threshold = keep_from_a_fixed_guess(values, generator.randint(0, 1000))
        assert torch.equal(values > threshold, mask)


def test_keep_largest_near_ranks_vectors_that_are_longer_than_one_piece():
    assert tamt.PIECE_SIZE < 300_000  # as many values are compared at a time
    values = torch.cat([torch.zeros(300_000), torch.ones(300_000)])
    for num_kept in (0, 1, 299_999, 300_000, 300_001, 600_000):
        mask, _ = keep_largest_near(values, num_kept, 0.5, 1e-3)  # no value is near .5
        assert torch.equal(mask, tamt.keep_largest(values, num_kept))


def test_keep_largest_near_keeps_plus_infinity_and_prunes_minus_infinity():
    """(The number to keep leaves room for them.)"""
    values = torch.tensor([math.inf, 0.0, -math.inf, 0.02, 0.01, math.inf, -math.inf])
    for num_kept in (2, 3, 4, 5):
        mask, _ = keep_largest_near(values, num_kept, 5.0, 0.001)
        assert mask[[0, 5]].all() and not mask[[2, 6]].any()
        assert torch.equal(mask, tamt.keep_largest(values, num_kept))


def test_keep_largest_near_ranks_several_vectors_as_one():
    """Ties at the border may lie in different vectors: those of the first stay."""
    generator = random.Random(4)
    for _ in range(300):
        values, num_kept = random_case(generator)
        if len(values) < 2:
            continue
        border = generator.randint(1, len(values) - 1)
        vectors = [values[:border], values[border:]]
        masks, _ = tamt.keep_largest_near(vectors, num_kept, generator.uniform(-4, 4), 10 ** generator.uniform(-6, 1))
        assert torch.equal(torch.cat(masks), tamt.keep_largest(values, num_kept))


def test_pinned_scores_survive_the_weight_decay_of_a_gpu():
    """The fused AdamW of CUDA computes x - lr * decay * x, which for an infinite x is no number."""
    scores = torch.tensor([tamt.PINNED_SCORE, -tamt.PINNED_SCORE])
    for _ in range(tamt.HORIZON):
        scores -= tamt.HIGHEST_RATE * 0.01 * scores
    assert tamt.is_pinned(scores).all() and torch.isfinite(scores).all()
    assert not tamt.is_pinned(torch.tensor([1e6, -1e6])).any()  # farther than any other score ever comes


def test_between_refreshes_pinned_scores_stay_pruned_though_they_decay(masked_layers):
    """Also if no others are pruned, so that the threshold lies between them and the rest."""
    scores = tamt.Scores(masked_layers, tamt.magnitude_masks(masked_layers, 0.1, "local"), 0.1, "local")
    start = masks_of(masked_layers)
    for layer in masked_layers.values():
        layer.scores.data[~layer.mask] = -tamt.PINNED_SCORE
    tamt.set_thresholds(scores)
    for layer in masked_layers.values():
        layer.scores.data *= 0.999
    tamt.apply_old_thresholds(scores)
    assert same_masks(masks_of(masked_layers), start)


def test_groups_may_be_large():
    mask = tamt.keep_largest_of_groups(torch.zeros(2, 800), 300, 400)
    expected = torch.arange(800).remainder(400) < 300  # of equal entries the first stay
    assert torch.equal(mask, expected.expand(2, 800))


@pytest.fixture
def local_scores(masked_layers):
    """Scores that start from OMP at 70 %, ranked inside each matrix -> the start mask, and the scores."""
    start = tamt.magnitude_masks(masked_layers, 0.7, "local")
    return start, tamt.Scores(masked_layers, start, 0.7, "local")


def test_ranking_the_start_scores_gives_the_start_mask(masked_layers, local_scores):
    start, scores = local_scores
    tamt.set_masks(masked_layers, {})
    scores.renew_masks()
    assert same_masks(masks_of(masked_layers), start)


def test_thresholding_at_phi_gives_the_start_mask(masked_layers, local_scores):
    start, scores = local_scores
    for last in scores.fast_ranking.last_rankings:
        assert last.threshold == tamt.START_SCORE / 2
    tamt.set_masks(masked_layers, {})
    tamt.apply_old_thresholds(scores)
    assert same_masks(masks_of(masked_layers), start)


@pytest.fixture
def global_scores(masked_layers):
    """Scores that start from OMP at 70 %, ranked over all matrices -> the start mask, and the scores. OMP rounds in
    each matrix, so its total may differ from 70 % of all entries by a few."""
    start = tamt.magnitude_masks(masked_layers, 0.7, "local")
    assert num_pruned(start) != round(num_entries(start) * 0.7)
    scores = tamt.Scores(masked_layers, start, 0.7, "global")
    tamt.make_start_exact(scores)
    return start, scores


@pytest.mark.parametrize("rank", ["global", "local"])
def test_scores_have_the_masks_of_a_sort_of_all_scores(masked_layers, rank):
    """After moves of all sizes, small ones first, as in training."""
    scores = tamt.Scores(masked_layers, tamt.magnitude_masks(masked_layers, 0.7, rank), 0.7, rank)
    generator = torch.Generator().manual_seed(0)
    for size in [1e-4] * 5 + [1e-2] * 5 + [1.0] * 2:
        for layer in masked_layers.values():
            layer.scores.data += size * torch.randn(layer.scores.shape, generator=generator)
        scores.renew_masks()
        expected = tamt.masks_of_largest({name: layer.scores for name, layer in masked_layers.items()}, 0.7, rank)
        assert same_masks(masks_of(masked_layers), expected)


def test_scores_have_the_masks_of_a_count_in_each_group(masked_layers):
    """2:4: an entry stays if fewer than two of its group are larger, or equal and further left."""
    scores = tamt.Scores(masked_layers, tamt.magnitude_masks(masked_layers, 0.5, "2:4"), 0.5, "2:4")
    generator = torch.Generator().manual_seed(0)
    for layer in masked_layers.values():
        layer.scores.data.copy_(torch.randint(-3, 4, layer.scores.shape, generator=generator))
    scores.renew_masks()
    position = torch.arange(4)
    is_left = position[None, :] < position[:, None]
    for layer in masked_layers.values():
        groups = layer.scores.detach().view(-1, 4)
        others = groups[:, None, :]
        own = groups[:, :, None]
        num_ahead = ((others > own) | ((others == own) & is_left)).sum(2)
        assert torch.equal(layer.mask.view(-1, 4), num_ahead < 2)


@pytest.mark.usefixtures("global_scores")
def test_the_first_global_mask_prunes_the_exact_total(masked_layers):
    masks = masks_of(masked_layers)
    assert num_pruned(masks) == round(num_entries(masks) * 0.7)


def test_the_first_global_mask_differs_from_omp_in_no_more_entries_than_there_are_matrices(
        masked_layers, global_scores):
    """OMP rounds once in each matrix, so its total is off by less than that."""
    start, _ = global_scores
    assert num_different(masks_of(masked_layers), start) <= len(masked_layers)


def test_global_scores_start_at_two_phi_exactly_where_their_first_mask_keeps(global_scores):
    _, scores = global_scores
    for layer in scores.masked_layers.values():
        assert torch.equal(layer.scores, tamt.START_SCORE * layer.mask)


def test_tokens_in_finds_the_ids_that_occur(vocabulary):
    rows = np.array([[2, 5, 5, 3], [2, 9, 5, 3]], np.uint16)
    assert np.flatnonzero(data.tokens_in(rows, vocabulary)).tolist() == [2, 3, 5, 9]


def found_pins(training):
    """{name: bool tensor}: (V, 1) for the word embeddings, of which rows are pinned, (1, 1) for the pooler."""
    return tamt.entries_without_gradient(training.masked_layers, training.inputs)


@pytest.mark.parametrize("objective", ["mlm", "kd"])
def test_the_pooler_is_pinned(inputs, objective):
    training = begin(mask_settings(inputs, objective=objective))
    assert found_pins(training)["bert.pooler.dense.weight"].all()


def test_with_kd_the_words_that_the_text_does_not_contain_are_pinned(inputs):
    training = begin(mask_settings(inputs, objective="kd"))
    vocabulary = training.inputs.vocabulary
    is_pinned = found_pins(training)["bert.embeddings.word_embeddings.weight"][:, 0]
    assert is_pinned[vocabulary.pad_id]
    assert is_pinned[vocabulary.tokenizer.token_to_id("here")]  # no line of the text has this word
    assert not is_pinned[vocabulary.tokenizer.token_to_id("the")]


def test_with_mlm_the_only_pinned_word_embedding_is_that_of_padding(inputs):
    """Corruption may put any word anywhere."""
    training = begin(mask_settings(inputs, objective="mlm"))
    is_pinned = found_pins(training)["bert.embeddings.word_embeddings.weight"][:, 0]
    assert is_pinned.nonzero().flatten().tolist() == [training.inputs.vocabulary.pad_id]


def test_the_scope_encoder_leaves_out_the_word_embeddings(model):
    names = list(tamt.maskable_layers(model))
    assert list(tamt.maskable_layers(model, "encoder")) == names[1:]


def test_a_mask_that_keeps_everything_changes_nothing(model):
    input_ids = ordinary_ids(model)
    dense = model(input_ids)
    layers = tamt.install_masked_layers(model)
    tamt.set_masks(layers, tamt.magnitude_masks(layers, 0.0, "global"))
    for expected, found in zip(dense, model(input_ids), strict=True):
        assert torch.equal(expected, found)


def test_locally_ranked_scores_start_with_the_mask_that_they_were_given(masked_layers, local_scores):
    start, _ = local_scores
    assert same_masks(masks_of(masked_layers), start)


@pytest.fixture
def between_refreshes(masked_layers, local_scores):
    """Scores that have moved since the last refresh -> the scores, and the thresholds of that refresh."""
    _, scores = local_scores
    move_at_random(masked_layers)
    scores.renew_masks()
    thresholds = thresholds_of(scores)
    assert thresholds != [tamt.START_SCORE / 2] * len(masked_layers)
    move_at_random(masked_layers)
    tamt.apply_old_thresholds(scores)
    return scores, thresholds


def move_at_random(masked_layers):
    for layer in masked_layers.values():
        layer.scores.data.normal_()


def thresholds_of(scores):
    return [last.threshold for last in scores.fast_ranking.last_rankings]


def test_between_refreshes_the_thresholds_stand_still(between_refreshes):
    scores, thresholds = between_refreshes
    assert thresholds_of(scores) == thresholds


def test_between_refreshes_the_scores_above_the_old_threshold_are_kept(between_refreshes):
    scores, thresholds = between_refreshes
    for layer, threshold in zip(scores.masked_layers.values(), thresholds, strict=True):
        assert torch.equal(layer.mask, layer.scores > threshold)


def seeded_random_masks(layers, sparsity, rank):
    return tamt.random_masks(layers, sparsity, rank, seed=1)


@pytest.mark.parametrize("make_masks", [tamt.magnitude_masks, seeded_random_masks])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.7, 0.999])
def test_local_masks_prune_the_requested_share_of_each_matrix_exactly(masked_layers, sparsity, make_masks):
    for mask in make_masks(masked_layers, sparsity, "local").values():
        assert int((~mask).sum()) == round(mask.numel() * sparsity)


@pytest.mark.parametrize("make_masks", [tamt.magnitude_masks, seeded_random_masks])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.7, 0.999])
def test_global_masks_prune_the_requested_share_of_all_entries_exactly(masked_layers, sparsity, make_masks):
    masks = make_masks(masked_layers, sparsity, "global")
    assert num_pruned(masks) == round(num_entries(masks) * sparsity)


def test_random_masks_depend_on_their_seed_alone(masked_layers):
    """Not on the weights, and not on what torch has drawn before."""
    first = tamt.random_masks(masked_layers, 0.6, "local", 3)
    torch.manual_seed(99)
    for layer in masked_layers.values():
        layer.weight.data.normal_()
    assert same_masks(first, tamt.random_masks(masked_layers, 0.6, "local", 3))
    assert not same_masks(first, tamt.random_masks(masked_layers, 0.6, "local", 4))


def test_renew_masks_prunes_the_smallest_of_the_scores_that_the_layers_hold(model):
    layers = tamt.install_masked_layers(model)
    scores = tamt.Scores(layers, tamt.magnitude_masks(layers, 0.5, "local"), 0.5, "global")
    move_at_random(layers)
    scores.renew_masks()
    learned = torch.cat([layer.scores.detach().flatten() for layer in layers.values()])
    mask = torch.cat([layer.mask.flatten() for layer in layers.values()])
    assert torch.equal(mask, tamt.keep_largest(learned, len(learned) - round(len(learned) * 0.5)))


@pytest.mark.parametrize("objective", ["mlm", "kd"])
def test_pinned_entries_keep_their_start_mask_even_when_the_threshold_passes_their_scores(inputs, objective):
    training = begin(mask_settings(inputs, objective=objective, sparsity=0.7, rank="global", steps=30))
    start = masks_of(training.masked_layers)
    for step in range(30):
        one_update(training, 1e-2, step + 1)
        training.updates_done += 1
        training.scores.renew_masks()
        for name, rows in expected_pins(training).items():
            assert torch.equal(training.masked_layers[name].mask[rows], start[name][rows])
    [threshold] = thresholds_of(training.scores)
    # Without pins these scores would stay at 0 or 2 phi. The threshold has left that interval, so all of them would now
    # be kept, or all pruned.
    assert not 0 <= threshold < tamt.START_SCORE


@pytest.mark.parametrize("rank", ["local", "global"])
def test_magnitude_masks_never_bring_a_pruned_weight_back(model, rank):
    layers = tamt.install_masked_layers(model)
    before = masks_of(layers)
    for level in tamt.imp_sparsities(0.65):
        for layer in layers.values():
            layer.weight.data[~layer.mask] = 100.0  # as if pruned weights had grown
        masks = tamt.magnitude_masks(layers, level, rank)
        assert is_subset(masks, before) and num_pruned(masks) > num_pruned(before)
        tamt.set_masks(layers, masks)
        before = masks


# keep_largest_near() is the fast way: it guesses that the threshold has moved by no more than a radius since the
# last update, and sorts only the values within that radius.


def test_keep_largest_near_equals_keep_largest_whatever_the_guess():
    """The guess may be far off, and the radius as small as a millionth."""
    generator = random.Random(1)
    for _ in range(300):
        values, num_kept = random_case(generator)
        threshold = generator.uniform(-4, 4)
        radius = 10 ** generator.uniform(-6, 1)
        mask, _ = keep_largest_near(values, num_kept, threshold, radius)
        assert torch.equal(mask, tamt.keep_largest(values, num_kept))


def test_rankings_in_which_nothing_is_pruned_never_fail(masked_layers):
    """Their threshold is a large negative number after a refresh."""
    start = tamt.magnitude_masks(masked_layers, 0.0, "local")
    scores = tamt.Scores(masked_layers, start, 0.0, "local")
    for _ in range(1200):
        scores.renew_masks()
    tamt.set_thresholds(scores)
    scores.renew_masks()
    assert num_pruned(masks_of(masked_layers)) == 0


def test_nothing_is_sorted_while_kept_and_pruned_scores_are_far_apart(masked_layers, monkeypatch):
    scores = tamt.Scores(masked_layers, tamt.magnitude_masks(masked_layers, 0.5, "local"), 0.5, "local")
    start = masks_of(masked_layers)

    def refuse(*_):
        raise AssertionError("sorted")

    monkeypatch.setattr(tamt, "keep_largest", refuse)
    for _ in range(20):
        for layer in masked_layers.values():
            layer.scores.data += 1e-4 * torch.randn(layer.scores.shape)
        scores.renew_masks()
    assert same_masks(masks_of(masked_layers), start)
