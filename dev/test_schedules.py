"""Learning rates of short runs, and the updates after which thresholds move.

    python -m pytest dev/test_schedules.py
"""

import itertools
import math
from types import SimpleNamespace

import pytest

import glue_squad
import tamt
from helpers import masks_of, share_of_flips, watch_rankings
from test_tamt import mask_settings, num_entries, num_pruned

PAPER_RATES = {"mlm": 5e-5, "kd": 2e-5}


def sum_of_steps(objective, learning_rate, num_updates, horizon):
    """How far a score moves whose gradient is the same at every update."""
    distance = 0.0
    for t in range(1, num_updates + 1):
        step = learning_rate * (1 - (t - 1) / horizon)
        if objective == "kd":  # BertAdam's missing bias correction
            step *= (1 - 0.9**t) / math.sqrt(1 - 0.999**t)
        distance += step
    return distance


@pytest.mark.parametrize("objective", ["mlm", "kd"])
@pytest.mark.parametrize("num_updates", [500, 3000, 10_000])
def test_the_steps_of_a_short_run_add_up_to_those_of_the_papers_run(objective, num_updates):
    """This rule lets a score move as far as in the paper's run. At 70 % the paper made 17,000 updates (its Table 2) of
    a schedule of 27,920, which is two epochs of WikiText-103."""
    rate = tamt.learning_rate_of(objective, 0.7, num_updates)
    of_the_paper = sum_of_steps(objective, PAPER_RATES[objective], 17_000, horizon=27_920)
    assert sum_of_steps(objective, rate, num_updates, horizon=num_updates) == pytest.approx(of_the_paper)


@pytest.mark.parametrize("objective", ["mlm", "kd"])
def test_the_learning_rate_lies_between_the_papers_and_0_01(objective):
    rates = [tamt.learning_rate_of(objective, 0.7, 10**exponent) for exponent in range(7)]
    assert rates[0] == 0.01
    assert rates[-1] == rates[-2] == PAPER_RATES[objective]


@pytest.mark.parametrize("num_updates,reason", [
    (50, "the highest that is chosen: scores travel less far than in the 17,000 updates of a full run"),
    (600, "the paper's 5e-05 x 39.35: scores can travel as far as in the 17,000 updates of a full run")])
def test_the_reason_for_the_learning_rate_says_whether_scores_travel_as_far_as_in_a_full_run(num_updates, reason):
    values = {"method": "tamt", "objective": "mlm", "sparsity": 0.7, "steps": num_updates, "lr": None}
    _, found = tamt.choose_learning_rate(values, num_updates)
    assert found == reason


@pytest.mark.parametrize("objective", ["mlm", "kd"])
def test_the_shorter_the_run_the_higher_the_learning_rate(objective):
    rates = [tamt.learning_rate_of(objective, 0.7, num_updates) for num_updates in (500, 1000, 2000, 4000, 8000)]
    assert all(earlier > later for earlier, later in itertools.pairwise(rates))


def test_between_the_sparsities_of_the_paper_its_numbers_of_updates_are_interpolated():
    assert tamt.paper_updates(0.7) == 17_000
    assert tamt.paper_updates(0.75) == 18_500
    assert tamt.paper_updates(0.8) == 20_000


def test_beyond_the_sparsities_of_the_paper_its_nearest_number_of_updates_is_taken():
    assert tamt.paper_updates(0.1) == tamt.paper_updates(0.2) == 3000
    assert tamt.paper_updates(0.99) == tamt.paper_updates(0.9) == 22_000


def refreshes(objective, **changes):
    """The updates of 2,500 after which --refresh-every 1000 moves the thresholds."""
    values = {"objective": objective, "refresh_every": 1000, "eval_every": 10**6, "save_every": 10**6,
              "num_updates": 2500}
    run = SimpleNamespace(**values | changes)
    return [step for step in range(1, 2501) if tamt.is_refresh_due(run, step)]


@pytest.mark.parametrize("objective, expected", [("mlm", [1000, 2000, 2500]), ("kd", [1, 999, 1999, 2500])])
def test_thresholds_move_when_the_released_code_moves_them_and_at_the_end(objective, expected):
    """The released loop for kd counts one update ahead: it refreshes when (step + 1) % 1000 == 0, and after the first
    update, too."""
    assert refreshes(objective) == expected


def test_a_refresh_is_due_whenever_a_mask_is_evaluated_or_saved():
    found = refreshes("mlm", eval_every=600, save_every=700)
    assert found == [600, 700, 1000, 1200, 1400, 1800, 2000, 2100, 2400, 2500]


def test_a_short_run_flips_nothing_at_the_learning_rate_of_the_paper_but_does_at_a_higher_one(inputs, tmp_path):
    for learning_rate, flips in ((2e-5, False), (5e-3, True)):
        tamt.find_mask(mask_settings(inputs, tmp_path / str(learning_rate), objective="kd", lr=learning_rate))
        assert (share_of_flips(tmp_path / str(learning_rate)) > 0) == flips


@pytest.fixture
def refreshed_every_six(inputs, tmp_path, monkeypatch):
    """A run of twelve updates with --refresh-every 6, whose masks are saved at 5 and 10 -> its folder, how many entries
    each update's mask prunes, and how many it should."""
    counts = {}
    watch_rankings(monkeypatch, lambda layers, step: counts.update({step: num_pruned(masks_of(layers))}))
    tamt.find_mask(mask_settings(
        inputs, tmp_path, rank="global", sparsity=0.7, refresh_every=6, save_every=5, lr=4e-3))
    return tmp_path, counts, round(num_entries(tamt.load_mask(tmp_path)) * 0.7)


def test_between_refreshes_the_sparsity_drifts(refreshed_every_six):
    _, counts, exact = refreshed_every_six
    for step in (4, 9, 11):  # the last ones before a refresh
        assert counts[step] != exact


def test_the_sparsity_is_exact_at_a_refresh_at_a_save_and_at_the_end(refreshed_every_six):
    folder, counts, exact = refreshed_every_six
    assert [counts[step] for step in (5, 6, 10, 12)] == [exact] * 4
    assert num_pruned(tamt.load_mask(folder / "step-5")) == num_pruned(tamt.load_mask(folder)) == exact


@pytest.mark.parametrize("name, lr, epochs, batch_size, max_len, eval_every", [
    ("cola", 2e-5, 3, 32, 128, 50), ("sst2", 2e-5, 3, 32, 128, 50), ("rte", 2e-5, 3, 32, 128, 50),
    ("mrpc", 2e-5, 3, 32, 128, 50), ("stsb", 2e-5, 3, 32, 128, 50), ("mnli", 2e-5, 3, 32, 128, 500),
    ("squad", 3e-5, 2, 16, 384, 1000)])
def test_fine_tuning_has_the_settings_of_the_released_scripts(name, lr, epochs, batch_size, max_len, eval_every):
    task = glue_squad.TASKS[name]
    assert (task.lr, task.epochs, task.batch_size) == (lr, epochs, batch_size)
    assert (task.max_len, task.eval_every) == (max_len, eval_every)
