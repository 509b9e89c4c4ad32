"""SQuAD in corners: files that are refused, answers that are misplaced or in odd characters, long strides.

    python -m pytest dev/test_squad.py
"""

import itertools
import random

import numpy as np
import pytest

import data
import glue_squad
from helpers import squad_file
from test_tamt import WORKED_EXAMPLE, both_families, question_with, write

# Words whose characters and tokens do not match one to one: composed and separate accents, scripts without
# spaces, emoji of several code points, ligatures, letters that grow in lower case, invisible characters.


TEXT = ["Anna", "met", "Bob", "in", "Rome,", "last", "the", "café", "cafe\u0301", "naïve", "東京の夏", "한국", "",
        "👨\u200d👩\u200d👧", "🎉🎉", "I'm", "U.S.", "x\u200by", "ﬁne", "İstanbul", "a\u0323\u0307", "नमस्ते", "\u00a0"]


@pytest.fixture(scope="session")
def odd_vocabularies(tmp_path_factory):
    """Two vocabularies: a WordPiece of the characters of TEXT and a few words, and a byte-level BPE with four
    merges -> {"bert": Vocabulary, "roberta": Vocabulary}."""
    folder = tmp_path_factory.mktemp("letters")
    words = "anna met bob in rome last may where cafe".split()
    characters = sorted(set("".join(TEXT).lower()) | set("?aeioucn.,'"))
    characters = [character for character in characters if not character.isspace()]
    pieces = ["##" + character for character in characters]
    lines = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *characters, *pieces])
    write(folder / "bert/vocab.txt", "\n".join(lines) + "\n")
    write(folder / "bert/tokenizer_config.json", {"do_lower_case": True})

    merges = ["Ġ R", "o m", "ĠR om", "ĠRom e"]
    alphabet = sorted(data.pre_tokenizers.ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, *merged, "<mask>"]
    write(folder / "roberta/vocab.json", {token: number for number, token in enumerate(tokens)})
    write(folder / "roberta/merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    return {family: data.vocabulary(folder / family) for family in ("bert", "roberta")}


def test_squad_2_is_refused_by_its_version(tmp_path):
    with pytest.raises(ValueError, match=r"SQuAD 2\.0.*v1\.1"):
        glue_squad.load_squad(write(tmp_path / "dev.json", squad_file(3) | {"version": "v2.0"}))


def test_squad_2_without_its_version_is_refused_by_its_impossible_questions(tmp_path):
    content = squad_file(3)
    del content["version"]
    question = content["data"][0]["paragraphs"][0]["qas"][0]
    question |= {"is_impossible": True, "answers": []}
    with pytest.raises(ValueError, match=r"SQuAD 2\.0.*v1\.1"):
        glue_squad.load_squad(write(tmp_path / "dev.json", content))


@pytest.mark.parametrize("end", [
    pytest.param(9, id="before its start"),
    pytest.param(40, id="31 tokens long"),
    pytest.param(70, id="in the padding")])
def test_an_answer_has_no_impossible_end(odd_vocabularies, end):
    """The surest end is impossible, and the second one is the last that is possible."""
    question = WORKED_EXAMPLE._replace(context="in " * 50)
    [window] = glue_squad.make_windows([question], odd_vocabularies["bert"], max_len=99)
    start_logits = np.zeros((1, 99))
    end_logits = np.zeros((1, 99))
    start_logits[0, 10] = 5
    end_logits[0, end] = 6
    end_logits[0, 10 + 29] = 1  # the last of 30 tokens
    assert glue_squad.best_answers([question], [window], start_logits, end_logits) == {"q": " ".join(["in"] * 30)}


def test_a_stride_longer_than_the_window_skips_no_token(odd_vocabularies):
    vocabulary = odd_vocabularies["bert"]
    windows = glue_squad.make_windows([WORKED_EXAMPLE], vocabulary, max_len=7, doc_stride=128)
    texts = [" ".join(map(vocabulary.tokenizer.id_to_token, window.input_ids.tolist())) for window in windows]
    assert texts == ["[CLS] where ? [SEP] anna met [SEP]", "[CLS] where ? [SEP] bob in [SEP]",
                     "[CLS] where ? [SEP] rome last [SEP]", "[CLS] where ? [SEP] may [SEP]"]


@pytest.fixture
def one_misplaced_answer(tmp_path):
    """Two questions; the answer of the second does not start where the file says."""
    return glue_squad.load_squad(write(tmp_path / "train.json", squad_file(3, 2)))


def test_questions_whose_answer_does_not_start_where_the_file_says_do_not_train(
        one_misplaced_answer, odd_vocabularies, capsys):
    windows = glue_squad.make_windows(one_misplaced_answer, odd_vocabularies["bert"], training=True)
    assert [window.question_index for window in windows] == [0]
    assert "left out 1 of 2 questions" in capsys.readouterr().err


def test_questions_whose_answer_does_not_start_where_the_file_says_are_evaluated(
        one_misplaced_answer, odd_vocabularies):
    windows = glue_squad.make_windows(one_misplaced_answer, odd_vocabularies["bert"])
    assert [window.question_index for window in windows] == [0, 1]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_answers_in_odd_characters_come_back_with_at_most_their_neighbours(odd_vocabularies, family):
    """From characters to positions and back again. BERT's tokenizer deletes some characters at the ends of a
    text, and a WordPiece token may be wider than the answer: then it comes back with its neighbours."""
    rng = random.Random(1)
    num_windows = 0
    for _ in range(300):
        words = rng.choices(TEXT, k=rng.randrange(1, 40))
        first = rng.randrange(len(words))
        before = " ".join([*words[:first], ""])
        answer = " ".join(words[first : first + rng.randrange(1, 5)])
        question = glue_squad.Question("q", "Where?", " ".join(words), [(answer, len(before))])
        max_len = rng.randrange(12, 60)
        doc_stride = rng.randrange(1, 30)

        for window in glue_squad.make_windows([question], odd_vocabularies[family], max_len, doc_stride, training=True):
            if window.end_position == 0:
                continue  # it does not hold the whole answer (tested above)
            num_windows += 1
            start_logits = np.zeros((1, len(window.input_ids)))
            end_logits = np.zeros((1, len(window.input_ids)))
            start_logits[0, window.start_position] = 9
            end_logits[0, window.end_position] = 9
            alone = window._replace(is_max_context=np.ones_like(window.is_max_context))
            found = glue_squad.best_answers([question], [alone], start_logits, end_logits, n_best_size=20,
                                            max_answer_length=1000)["q"]
            if family == "roberta":
                assert found == answer.strip()
            else:
                assert answer.strip().strip("\u200b") in found
                assert len(found) <= len(answer) + 2 * max(len(word) for word in words)
    assert num_windows > 300


def test_load_squad_reads_questions_with_their_paragraph_and_answers(tmp_path):
    question = {"id": "q", "question": "Where?", "answers": [{"text": "Rome", "answer_start": 3}]}
    paragraph = {"context": "in Rome", "qas": [question]}
    file = write(tmp_path / "dev.json", {"version": "1.1", "data": [{"paragraphs": [paragraph]}]})
    assert glue_squad.load_squad(file) == [("q", "Where?", "in Rome", [("Rome", 3)])]


@both_families
def test_an_answer_of_plain_words_comes_back_exactly(vocabularies, family):
    words = "anna met bob in rome last may".split()
    for first, last in itertools.combinations(range(len(words) + 1), 2):
        answer = " ".join(words[first:last])
        start = len(" ".join([*words[:first], ""]))
        question = glue_squad.Question("q", "Where?", " ".join(words), [(answer, start)])
        [window] = glue_squad.make_windows([question], vocabularies[family], max_len=99, training=True)
        start_logits = np.eye(99)[[window.start_position]]
        end_logits = np.eye(99)[[window.end_position]]
        found = glue_squad.best_answers([question], [window], start_logits, end_logits)
        assert found == {"q": answer}


def test_squad_scores_are_means_over_all_questions_and_an_unanswered_one_counts_0():
    questions = [question_with("one"), question_with("two")._replace(id="2")]
    assert glue_squad.squad_scores({"1": "one"}, questions) == {"em": 50, "f1": 50}
