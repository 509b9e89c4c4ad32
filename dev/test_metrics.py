"""Metrics where they are undefined, and the files that GLUE and SQuAD take as submissions.

    python -m pytest dev/test_metrics.py
"""

import json

import numpy as np
import pytest

import glue_squad


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews", "pearson", "spearman"])
def test_a_metric_of_no_predictions_is_0(name):
    assert getattr(glue_squad, name)([], []) == 0


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
@pytest.mark.parametrize("predicted, labels", [([1], [1]), ([np.nan, 1], [0, 3])])
def test_a_correlation_of_one_pair_or_of_nan_is_0(name, predicted, labels):
    assert getattr(glue_squad, name)(predicted, labels) == 0


def test_the_mismatched_dev_set_of_mnli_has_its_own_accuracy():
    examples = [glue_squad.Example("", "", label) for label in (0, 1, 2, 2)]
    predictions = np.array([0, 1, 2, 0])
    assert glue_squad.score(glue_squad.TASKS["mnli"], predictions, examples, "dev") == {"accuracy": 0.75}
    assert glue_squad.score(glue_squad.TASKS["mnli"], predictions, examples, "dev_mm") == {"accuracy_mm": 0.75}


def test_predictions_without_labels_are_an_error():
    examples = [glue_squad.Example("", "", 1), glue_squad.Example("", "")]
    with pytest.raises(ValueError, match="task rte: 2 predictions for 1 labels"):
        glue_squad.score(glue_squad.TASKS["rte"], [0, 0], examples)


def test_for_squad_the_floor_is_0():
    assert glue_squad.majority_scores(glue_squad.TASKS["squad"], []) == {"f1": 0, "em": 0}


def submission(name, predictions, tmp_path):
    glue_squad.write_submission(glue_squad.TASKS[name], predictions, tmp_path / "submission")
    return (tmp_path / "submission").read_bytes()


def test_a_submission_of_classes_holds_their_labels(tmp_path):
    found = submission("rte", np.array([1, 0]), tmp_path)
    assert found == b"index\tprediction\n0\tnot_entailment\n1\tentailment\n"


def test_a_submission_of_numbers_has_three_decimals(tmp_path):
    assert submission("stsb", np.array([3.14159]), tmp_path) == b"index\tprediction\n0\t3.142\n"


def test_a_submission_of_answers_is_a_json_object(tmp_path):
    assert json.loads(submission("squad", {"q": "Café"}, tmp_path)) == {"q": "Café"}


def test_majority_scores_are_those_of_always_answering_the_most_frequent_class():
    examples = [glue_squad.Example("", "", int(i < 279)) for i in range(408)]  # as in MRPC's dev set
    share = 279 / 408  # the accuracy, and the precision, too; the recall is 1
    expected = {"accuracy": share, "f1": pytest.approx(2 * share / (share + 1))}
    assert glue_squad.majority_scores(glue_squad.TASKS["mrpc"], examples) == expected
