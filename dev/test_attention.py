"""Attention on a CPU: with dropout it is computed in pieces, with random bits of its own.

    python -m pytest dev/test_attention.py
"""

import itertools

import pytest
import torch

import bert
from test_tamt import assert_close


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_pieces_matches_torch_with_the_same_dropout_mask(padded, monkeypatch):
    """Five sequences in pieces of 2, 2 and 1; the gradients of query, key and value are compared as well."""
    dropout_masks = []
    draw = bert.dropout_mask

    def remember(shape, dropout):
        dropout_masks.append(draw(shape, dropout))
        return dropout_masks[-1]

    monkeypatch.setattr(bert, "dropout_mask", remember)
    inputs = [torch.randn(5, 2, 512, 8, requires_grad=True) for _ in range(3)]
    lengths = torch.tensor([512, 100, 1, 37, 300])
    attention_mask = (torch.arange(512) < lengths[:, None])[:, None, None] if padded else None
    loss_weights = torch.randn(5, 2, 512, 8)

    found = bert.attention_with_dropout_on_a_cpu(*inputs, attention_mask, dropout_prob=0.25)
    found_gradients = torch.autograd.grad((found * loss_weights).sum(), inputs)
    assert [len(mask) for mask in dropout_masks] == [2, 2, 1]

    # torch's own function for tests takes the random mask, and padding as -inf to add.
    dropout_mask = torch.cat(dropout_masks).bool()
    padding = torch.zeros(5, 1, 1, 512)
    if padded:
        padding.masked_fill_(~attention_mask, float("-inf"))
    theirs = torch.ops.aten._scaled_dot_product_attention_math
    expected, _ = theirs(*inputs, padding, 0.25, False, dropout_mask)
    gradients = torch.autograd.grad((expected * loss_weights).sum(), inputs)

    assert_close(found, expected)
    for found_gradient, gradient in zip(found_gradients, gradients, strict=True):
        assert_close(found_gradient, gradient, tolerance=1e-4)


@pytest.mark.parametrize("dropout_prob", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_a_dropout_mask_is_0_as_often_as_requested(dropout_prob):
    """Four entries are made from one random number, so each of the four is counted on its own."""
    is_dropped = bert.dropout_mask((1000, 1000), dropout_prob).view(-1, 4) == 0
    standard_error = (dropout_prob * (1 - dropout_prob) / len(is_dropped)) ** 0.5
    for column in is_dropped.double().T:
        assert abs(column.mean() - dropout_prob) < 5 * standard_error


@pytest.mark.parametrize("dropout_prob", [0.1, 0.25, 0.5, 0.9])
def test_the_four_entries_of_one_random_number_are_independent(dropout_prob):
    is_dropped = (bert.dropout_mask((1000, 1000), dropout_prob).view(-1, 4) == 0).double()
    share_of_pairs = dropout_prob**2
    standard_error = (share_of_pairs * (1 - share_of_pairs) / len(is_dropped)) ** 0.5
    for first, second in itertools.combinations(is_dropped.T, 2):
        assert abs((first * second).mean() - share_of_pairs) < 5 * standard_error


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 5), (4, 4)])
def test_a_dropout_mask_has_the_requested_shape(shape):
    mask = bert.dropout_mask(shape, 0.5)
    assert mask.shape == shape
    assert mask.dtype == torch.uint8
    assert mask.max() <= 1


def test_a_dropout_mask_holds_zeros_and_ones():
    assert bert.dropout_mask((1000,), 0.5).unique().tolist() == [0, 1]


def test_dropout_masks_follow_manual_seed():
    torch.manual_seed(7)
    first = bert.dropout_mask((100,), 0.5)
    assert not torch.equal(bert.dropout_mask((100,), 0.5), first)
    torch.manual_seed(7)
    assert torch.equal(bert.dropout_mask((100,), 0.5), first)
