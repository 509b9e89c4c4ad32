"""Tables and JSON files that nobody ships: what glue_squad.py does about them.

    python -m pytest dev/test_hostile_glue.py
"""

import json
import random

import pytest

import glue_squad


@pytest.mark.parametrize("task, content, message", [
    ("sst2", b"", "the file is empty"),
    ("sst2", b"\xef\xbb\xbf", "the file is empty"),
    ("sst2", b"sentence\tlabel\n", "no rows for dev"),
    ("sst2", b"sentence\tlabel\na\tb\t1\n", "line 2: 3 fields where line 1 has 2"),
    ("sst2", b"sentence\tlabel\na\t1\n\nb\t0\n", "line 3: 1 fields where line 1 has 2"),
    ("sst2", b"sentence\tlabel\na\t1\n\xff\xfe\t0\n", "line 3: byte 1 of the line is not UTF-8"),
    ("sst2", b"sentence\tlabel\na\t" + b"9" * 10_000, "line 2: label '999"),
    ("stsb", b"sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: label 'nan' is not a finite number"),
    ("stsb", b"sentence1\tsentence2\tscore\na\tb\t1_0\n", "line 2: label '1_0' is not a finite number"),
    ("cola", b"a\t1\n", "line 1: no column 3"),
    ("cola", b"\x00" * 1000, "line 1: no column 3")])
def test_malformed_tables_say_where_in_one_line(tmp_path, task, content, message):
    (tmp_path / "dev.tsv").write_bytes(content)
    with pytest.raises(ValueError) as error:
        glue_squad.load_glue(task, "dev", tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


QUESTION = {"id": "q", "question": "?", "answers": [{"text": "Rome", "answer_start": 3}]}


@pytest.mark.parametrize("question, message", [
    ([], "no 'answers'|no 'id'"),
    (QUESTION | {"id": 3}, "no 'id' here that is"),
    (QUESTION | {"answers": []}, "no answers"),
    (QUESTION | {"answers": ["Rome"]}, "no 'text' here that is"),
    (QUESTION | {"answers": [{"text": "Rome", "answer_start": -1}]}, "answer_start -1"),
    (QUESTION | {"answers": [{"text": "Rome", "answer_start": 1.5}]}, "no 'answer_start' here that is"),
    (QUESTION | {"answers": [{"text": "Rome", "answer_start": True}]}, "no 'answer_start' here that is"),
    (QUESTION | {"id": "\ud800"}, "'id' holds half a character"),
    (QUESTION | {"question": "who\udfff?"}, "'question' holds half a character"),
    (QUESTION | {"answers": [{"text": "\ud800", "answer_start": 3}]}, "'text' holds half a character")])
def test_malformed_questions_say_where(tmp_path, question, message):
    content = {"data": [{"paragraphs": [{"context": "in Rome", "qas": [question]}]}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"data\[0\].paragraphs\[0\].qas\[0\]: .*({message})"):
        glue_squad.load_squad(tmp_path / "x.json")


@pytest.mark.parametrize("content, message", [
    ("{", "not readable as JSON"), ("[]", "expected a JSON object"), ("{}", "no 'data' here"),
    ('{"data": []}', "no questions"), ('{"data": [3]}', r"data\[0\]: no 'paragraphs'"), ("[" * 99_999, "not readable")])
def test_json_that_is_no_squad_says_so(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        glue_squad.load_squad(tmp_path / "x.json")


def test_half_a_character_in_a_paragraph_is_refused(tmp_path):
    content = {"data": [{"paragraphs": [{"context": "in \ud83d Rome", "qas": [QUESTION]}]}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"data\[0\].paragraphs\[0\]: 'context' holds half a character"):
        glue_squad.load_squad(tmp_path / "x.json")


def test_two_questions_of_one_id_are_refused(tmp_path):
    content = {"data": [{"paragraphs": [{"context": "in Rome", "qas": [QUESTION, QUESTION]}]}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"qas\[1\]: .*'q'"):
        glue_squad.load_squad(tmp_path / "x.json")


@pytest.mark.parametrize("name", [3, "", "..", "a/b", "RTE"])
@pytest.mark.parametrize("key", ["name", "columns", "label", "labels", "metric", "train"])
def test_wrong_values_in_a_task_of_your_own_are_one_line(tmp_path, key, name):
    (tmp_path / "a.tsv").write_text("text\tmood\nhello\tglad\n")
    content = {"name": "mood", "columns": ["text"], "label": "mood", "labels": ["sad", "glad"], "metric": "f1",
               "train": "a.tsv", "dev": "a.tsv"}
    (tmp_path / "task.json").write_text(json.dumps(content | {key: name}))
    try:
        task = glue_squad.find_task(tmp_path / "task.json")
        glue_squad.load_glue(task, "train", tmp_path)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
    else:
        raise AssertionError("accepted")


def test_mutated_files_load_or_say_why(tmp_path):
    rng = random.Random(0)
    table = "sentence\tlabel\n" + "".join(f"row {i} é\t{i % 2}\n" for i in range(9))
    squad = json.dumps({"data": [{"paragraphs": [{"context": "in Rome", "qas": [QUESTION]}]}]})
    for _ in range(400):
        for text, load in [
                (table, lambda: glue_squad.load_glue("sst2", "dev", tmp_path)),
                (squad, lambda: glue_squad.load_squad(tmp_path / "dev.tsv"))]:
            content = bytearray(text.encode())
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            (tmp_path / "dev.tsv").write_bytes(content[: rng.randrange(1, len(content) + 1)])
            try:
                assert load()
            except (ValueError, OSError) as error:
                assert str(tmp_path) in str(error)
                assert "\n" not in str(error)
