"""The order of the tests, and fixtures for those in this folder: those of test_tamt.py, and more tasks."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start

pytest.register_assert_rewrite("helpers")

from test_tamt import (  # noqa: E402, F401
    corrupted,
    fixed_seed,
    imp_folder,
    inputs,
    masked_layers,
    masks,
    model,
    two_masks,
    two_super_tickets,
    two_windows,
    vocabularies,
    vocabulary,
    write,
)


def pytest_collection_modifyitems(items):
    """Of two processes one begins with the first half of the tests, and one with the second: the longest test comes
    first, and the other slow ones in the middle. So at the end no process waits for a slow test that began late."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    slow.sort(key=lambda item: "on_the_toy" not in item.name)
    num_before = max(len(items) // 2 - 1, 0)
    items[:] = slow[:1] + fast[:num_before] + slow[1:] + fast[num_before:]


@pytest.fixture(scope="session")
def tasks(inputs):  # noqa: F811
    """The tasks of test_tamt.py with test tables, a small SQuAD, and an own task."""
    for name in ("RTE", "STS-B"):
        header, *train = (inputs / name / "train.tsv").read_text().splitlines()
        _, *dev = (inputs / name / "dev.tsv").read_text().splitlines()
        write(inputs / name / "test.tsv", [header, *train, *dev])

    paragraphs = []
    for row in train[:24]:
        a, b, _ = row.split("\t")
        answer = {"text": "red tree", "answer_start": len(a) + 1}
        question = {"id": a + b, "question": "where", "answers": [answer]}
        paragraphs.append({"context": f"{a} red tree {b} " + "the dog runs " * 5, "qas": [question]})
    for split in ("train", "dev"):
        write(inputs / "squad" / f"{split}-v1.1.json", {"data": [{"paragraphs": paragraphs}]})

    write(inputs / "mood.tsv", ["the big dog\tglad", "the small dog\tsad"] * 24)
    files = {"train": "mood.tsv", "dev": "mood.tsv", "test": "mood.tsv"}
    write(inputs / "mood.json", {"name": "mood", "columns": [0], "label": 1, "labels": ["sad", "glad"],
                                 "metric": "f1", **files})
    return inputs
