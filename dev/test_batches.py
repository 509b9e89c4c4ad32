"""Token ids and batches of the tasks: what is cut, and which examples go together.

    python -m pytest dev/test_batches.py
"""

import itertools

import numpy as np
import pytest

import glue_squad
from test_tamt import batches_of, both_families

EXAMPLES = [glue_squad.Example("Anna met Bob in Rome", "last May"), glue_squad.Example("Anna met Bob in Rome last May")]


@both_families
@pytest.mark.parametrize("max_len", range(6, 20))  # less than 6 is refused
def test_only_what_is_longer_than_max_len_is_cut_to_it(vocabularies, family, max_len):
    whole = glue_squad.encode(EXAMPLES, vocabularies[family], 99)
    cut = glue_squad.encode(EXAMPLES, vocabularies[family], max_len)
    assert [len(input_ids) for input_ids, _ in cut] == [min(len(input_ids), max_len) for input_ids, _ in whole]


@both_families
def test_a_text_that_is_too_long_loses_its_end_but_not_the_separator(vocabularies, family):
    [(whole, _)] = glue_squad.encode(EXAMPLES[1:], vocabularies[family], 99)
    [(cut, _)] = glue_squad.encode(EXAMPLES[1:], vocabularies[family], 6)
    assert cut.tolist() == [*whole[:5], vocabularies[family].sep_id]


def test_truncation_drops_tokens_one_by_one():
    for num_a, num_b, room in itertools.product(range(12), range(12), range(26)):
        a = list(range(num_a))
        b = list(range(num_b))
        while len(a) + len(b) > room:
            longer = a if len(a) > len(b) else b
            longer.pop()
        assert glue_squad.truncate_pair(list(range(num_a)), list(range(num_b)), room) == (a, b)


def test_batches_come_in_random_order():
    lengths, batches = batches_of(1000, 32)
    longest = [lengths[batch].max() for batch in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def batches_with(seed):
    lengths = np.random.default_rng(0).integers(3, 60, 300)
    return [tuple(batch) for batch in glue_squad.bucketed_batches(lengths, 4, np.random.default_rng(seed))]


def test_the_same_seed_gives_the_same_batches():
    assert batches_with(seed=1) == batches_with(seed=1)


def test_another_seed_puts_other_examples_together():
    first, second = ({frozenset(batch) for batch in batches_with(seed)} for seed in (1, 2))
    assert len(first & second) < 0.1 * len(first)


def test_the_other_chosen_tokens_become_random_ones_spread_evenly_over_the_vocabulary(corrupted):
    vocabulary, input_ids, corrupted_ids, is_predicted = corrupted
    is_random = is_predicted & (corrupted_ids != input_ids) & (corrupted_ids != vocabulary.mask_id)
    counts = np.bincount(corrupted_ids[is_random], minlength=vocabulary.size)
    counts = np.delete(counts, vocabulary.mask_id)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    degrees_of_freedom = len(counts) - 1  # the mean of chi-square; its variance is twice that
    assert abs(chi_square - degrees_of_freedom) < 5 * (2 * degrees_of_freedom) ** 0.5
