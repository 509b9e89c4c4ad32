"""Tables and tasks of your own: which columns and labels glue_squad.py reads, and what it refuses.

    python -m pytest dev/test_tables.py
"""


import pytest

import glue_squad
from helpers import squad_file
from test_tamt import REAL, needs_real_inputs, write

MOOD = {"name": "mood", "columns": ["text"], "label": "mood", "labels": ["sad", "glad"], "metric": "f1",
        "train": "a.tsv", "dev": "a.tsv"}


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    write(tmp_path / "SST-2/dev.tsv", "\ufeffsentence\tlabel\r\na\t1\r\n\r\n")
    assert glue_squad.load_glue("sst2", "dev", tmp_path) == [("a", None, 1)]


def test_the_folder_may_be_the_tasks_own(tmp_path):
    write(tmp_path / "dev.tsv", "sentence\tlabel\na\t1\n")
    assert glue_squad.load_glue("sst2", "dev", tmp_path) == [("a", None, 1)]


def test_cola_has_no_line_of_names_but_its_test_file_has(tmp_path):
    write(tmp_path / "CoLA/dev.tsv", "gj04\t1\t\tFirst row.\nbc\t0\t*\tSecond row.\n")
    write(tmp_path / "CoLA/test.tsv", "index\tsentence\n0\tWho knows?\n")
    assert glue_squad.load_glue("cola", "dev", tmp_path) == [("First row.", None, 1), ("Second row.", None, 0)]
    assert glue_squad.load_glue("cola", "test", tmp_path) == [("Who knows?", None, None)]


def test_two_columns_of_the_same_name_are_refused(tmp_path):
    write(tmp_path / "STS-B/dev.tsv", "sentence1\tsentence2\tsentence1\tscore\na\tb\tc\t3.2\n")
    with pytest.raises(ValueError, match="line 1: several columns are called 'sentence1'"):
        glue_squad.load_glue("stsb", "dev", tmp_path)


def test_a_missing_file_names_both_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="task rte: no dev file; expected .*RTE/dev.tsv or .*/dev.tsv"):
        glue_squad.load_glue("rte", "dev", tmp_path)


def test_an_unknown_task_or_split_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'snli'; known: cola, sst2, .*squad"):
        glue_squad.find_task("snli")
    with pytest.raises(ValueError, match="task rte has no split 'dev_mm'; it has train, dev, test"):
        glue_squad.load_glue("rte", "dev_mm", tmp_path)


# A task of your own.


def test_a_task_of_your_own_may_predict_numbers_from_a_table_without_names(tmp_path):
    write(tmp_path / "a.tsv", "hello\tyou\t0.5\n")
    change = {"columns": [0, 1], "label": 2, "labels": None, "metric": "pearson"}
    task = glue_squad.find_task(write(tmp_path / "task.json", MOOD | change))
    assert (task.predicts, task.num_outputs) == ("number", 1)
    assert glue_squad.load_glue(task, "train", tmp_path) == [("hello", "you", 0.5)]


def test_one_column_with_a_name_means_that_every_table_has_a_line_of_names(tmp_path):
    """The test file has no label column; its first line is not a row even if the text has a number."""
    write(tmp_path / "a.tsv", "id\ttext\tmood\n1\thello\tglad\n")
    write(tmp_path / "b.tsv", "id\ttext\n2\tyou\n")
    task = glue_squad.find_task(write(tmp_path / "task.json", MOOD | {"columns": [1], "test": "b.tsv"}))
    assert glue_squad.load_glue(task, "train", tmp_path) == [("hello", None, 1)]
    assert glue_squad.load_glue(task, "test", tmp_path) == [("you", None, None)]


@pytest.mark.parametrize("change, message", [
    ({"color": 1}, "unknown key 'color'; needed: name, columns, .*possible: test"),
    ({"train": "c.tsv"}, "no train file; expected .*c.tsv"),
    ({"columns": []}, '"columns" must be a list of one or two'),
    ({"columns": [True]}, "header names or indices from 0"),
    ({"labels": ["a"]}, "two or more different words, or null"),
    ({"labels": None}, "valid: pearson, spearman"),
    ({"metric": "bleu"}, "'bleu' does not fit these labels; valid: accuracy, f1, matthews"),
    ({"labels": ["a", "b", "c"]}, "valid: accuracy$"),
    ({"name": "cola"}, "no official task|not an official task"),
    ({"name": "SST-2"}, "no official task|not an official task"),
    ({"name": "../mood"}, '"name" must be a word')])
def test_a_task_of_your_own_that_is_wrong_says_what_would_be_valid(tmp_path, change, message):
    write(tmp_path / "a.tsv", "id\ttext\tmood\n1\thello\tglad\n")
    with pytest.raises((ValueError, OSError), match=message):
        glue_squad.find_task(write(tmp_path / "task.json", MOOD | change))


def test_a_task_of_your_own_that_lacks_a_key_says_so(tmp_path):
    content = {key: value for key, value in MOOD.items() if key != "metric"}
    with pytest.raises(ValueError, match="missing key 'metric'; needed: name, columns, "):
        glue_squad.find_task(write(tmp_path / "task.json", content))


def test_a_malformed_question_is_named_by_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"dev.json: data\[0\].paragraphs\[0\].qas\[1\]: no 'answer_start'"):
        glue_squad.load_squad(write(tmp_path / "dev.json", squad_file(3, "2")))


def test_in_a_table_of_one_column_an_empty_line_is_an_empty_text(tmp_path):
    task = MOOD | {"test": "test.tsv"}
    write(tmp_path / "a.tsv", "text\tmood\nhello\tglad\n")
    write(tmp_path / "test.tsv", "text\nhello\n\nbye\n\n\n")
    found = glue_squad.load_glue(glue_squad.find_task(write(tmp_path / "task.json", task)), "test", tmp_path)
    assert [example.text_a for example in found] == ["hello", "", "bye", "", ""]


def test_the_submission_of_your_own_numbers_has_seven_digits(tmp_path):
    write(tmp_path / "a.tsv", "text\trate\nhello\t0.5\n")
    task = glue_squad.find_task(write(tmp_path / "task.json", {
        "name": "rate", "columns": ["text"], "label": "rate", "labels": None, "metric": "pearson", "train": "a.tsv",
        "dev": "a.tsv"}))
    glue_squad.write_submission(task, [0.00041234567, 1234567.0], tmp_path / "rate.tsv")
    assert (tmp_path / "rate.tsv").read_text() == "index\tprediction\n0\t0.0004123457\n1\t1234567\n"


def test_quotation_marks_in_a_table_mean_nothing(tmp_path):
    write(tmp_path / "SST-2/dev.tsv", 'sentence\tlabel\n"half a quote\t1\n"b" c"\t0\n')
    assert glue_squad.load_glue("sst2", "dev", tmp_path) == [('"half a quote', None, 1), ('"b" c"', None, 0)]


def test_only_a_newline_ends_a_row(tmp_path):
    write(tmp_path / "SST-2/dev.tsv", "sentence\tlabel\none\u0085two\u2028three\x0bfour\t1\n")
    assert glue_squad.load_glue("sst2", "dev", tmp_path) == [("one\u0085two\u2028three\x0bfour", None, 1)]


def test_in_qqp_rows_that_are_broken_in_two_are_skipped_with_a_note(tmp_path, capsys):
    """A line break inside a question leaves two short rows."""
    write(tmp_path / "QQP/dev.tsv", ["id\tquestion1\tquestion2\tis_duplicate", "1\tx\ty\t1", "4\tcut", "here\tz\t0"])
    assert glue_squad.load_glue("qqp", "dev", tmp_path) == [("x", "y", 1)]
    assert "skipped 2 rows without 4 fields" in capsys.readouterr().err


def test_in_all_other_tasks_a_short_row_is_an_error(tmp_path):
    write(tmp_path / "RTE/dev.tsv", ["index\tsentence1\tsentence2\tlabel", "0\tx\ty\tentailment", "4\tcut"])
    with pytest.raises(ValueError, match="dev.tsv line 3: 2 fields where line 1 has 4"):
        glue_squad.load_glue("rte", "dev", tmp_path)


def write_mrpc(folder):
    names = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    write(folder / "MRPC/msr_paraphrase_train.txt", names + '1\t7\t8\ta "\tb\r\n0\t8\t7\tc\td\r\n')


def test_mrpcs_file_may_have_a_byte_order_mark_windows_line_ends_and_stray_quotes(tmp_path):
    write_mrpc(tmp_path)
    write(tmp_path / "MRPC/dev_ids.tsv", "8\t7\n")
    assert glue_squad.load_glue("mrpc", "train", tmp_path) == [('a "', "b", 1)]
    assert glue_squad.load_glue("mrpc", "dev", tmp_path) == [("c", "d", 0)]


def test_without_the_list_of_ids_mrpc_has_no_dev_set(tmp_path):
    write_mrpc(tmp_path)
    with pytest.raises(FileNotFoundError, match="mrpc_dev_ids.tsv or .*dev_ids.tsv"):
        glue_squad.load_glue("mrpc", "dev", tmp_path)


def test_a_wrong_label_is_named_with_its_line_and_the_valid_ones(tmp_path):
    write(tmp_path / "RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tx\ty\tmaybe\n")
    with pytest.raises(ValueError, match="dev.tsv line 2: label 'maybe' is not one of entailment, not_entailment"):
        glue_squad.load_glue("rte", "dev", tmp_path)

def test_a_task_of_your_own_is_a_json_file_beside_its_tables(tmp_path, monkeypatch):
    write(tmp_path / "a.tsv", "id\ttext\tmood\n1\thello\tglad\n")
    task = glue_squad.find_task(write(tmp_path / "task.json", MOOD))
    assert (task.predicts, task.num_outputs, task.metrics) == ("class", 2, ("f1",))
    monkeypatch.chdir("/")
    assert glue_squad.load_glue(task, "dev", ".") == [("hello", None, 1)]


def test_labels_of_stsb_are_numbers(tmp_path):
    write(tmp_path / "STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t3.200\n")
    assert glue_squad.load_glue("stsb", "dev", tmp_path) == [("a", "b", 3.2)]


def test_mrpcs_dev_set_is_the_rows_whose_ids_are_listed_and_the_others_train(tmp_path):
    rows = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\ta\tb", "0\t8\t7\tc\td"]
    write(tmp_path / "MRPC/msr_paraphrase_train.txt", rows)
    write(tmp_path / "MRPC/dev_ids.tsv", "8\t7\n")
    assert glue_squad.load_glue("mrpc", "dev", tmp_path) == [("c", "d", 0)]
    assert glue_squad.load_glue("mrpc", "train", tmp_path) == [("a", "b", 1)]


@needs_real_inputs
@pytest.mark.parametrize("name, num_train, num_dev", [
    ("cola", 8551, 1043), ("sst2", 67349, 872), ("mrpc", 3668, 408), ("stsb", 5749, 1500), ("rte", 2490, 277),
    ("wnli", 635, 71)])
def test_real_tables_have_the_known_numbers_of_rows(name, num_train, num_dev):
    assert len(glue_squad.load_glue(name, "train", REAL / "glue")) == num_train
    assert len(glue_squad.load_glue(name, "dev", REAL / "glue")) == num_dev


def test_columns_are_found_by_their_names_wherever_they_are(tmp_path):
    write(tmp_path / "MNLI/train.tsv", "gold_label\tsentence2\tsentence1\nneutral\tb\ta\n")
    names = "sentence1\tsentence2\tlabel1\tgold_label\n"
    write(tmp_path / "MNLI/dev_mismatched.tsv", names + "a\tb\tneutral\tentailment\n")
    assert glue_squad.load_glue("mnli", "train", tmp_path) == [("a", "b", 1)]  # neutral
    assert glue_squad.load_glue("mnli", "dev_mm", tmp_path) == [("a", "b", 0)]  # entailment


