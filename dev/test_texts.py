"""Vocabularies and texts as others write them: token ids equal those of transformers.

    python -m pytest dev/test_texts.py
"""

import copy
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

import bert
import data
import glue_squad
from helpers import edit_json, raises_one_line
from test_tamt import REAL, needs_real_inputs, write

# ---------------------------------------------------------------------------------------------------
# data: vocabularies
# ---------------------------------------------------------------------------------------------------


NASTY = ["the", "a cat", "Don't", "x1,y", "é", "e\u0301", "İ", "ß", "Σ", "中文", "が", "か\u3099", "Möchte",
         "😀", "w" * 150, "...", "##", "ﬁ", "½", " ", "  ", "\n", "\n\n", "\t", "\r\n",
         *"\0\x0b\x1c\x1f\x7f\x85\xa0\u180e\u2003\u200b\u2028\u2029\u3000\ufeff\ufffd",
         "[MASK]", "[SEP]", "<mask>", "</s>", "<s>", "<", "[E1]", "[e1]", "[NEW]", "extra", "Extra"]


def nasty_texts(count, seed=0):
    """Texts of up to forty things that tokenizers have got wrong."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        words = rng.choices([*NASTY, *[" "] * len(NASTY)], k=rng.randint(1, 40))
        texts.append("".join(words))
    return texts


def write_files(folder, **files):
    """write_files(folder, vocab_txt="..", config_json={..}): underscores in front of the suffix are dots."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, str) else json.dumps(content)
        (folder / ".".join(name.rsplit("_", 1))).write_bytes(content.encode())
    return folder


BERT_WORDS = ["[E1]", "the", "cat", "don", "Don", "möchte", "mochte", "が", "か", "中", "文", "中文", "ex",
              "Ex", "##tra", *"'.,<>[]é01ß", *"abcdefghijklmnopqrstuvwxyz",
              *(f"##{letter}" for letter in "abcdeghtwx12")]
MERGES = ["Ġ t", "h e", "Ġt he", "c a", "ca t", "Ġ a", "Ċ Ċ", "Ġ Ġ", "d o", "do n"]


def bert_folder(folder, words=BERT_WORDS, **files):
    vocab = "\n".join([*data.WORDPIECE_SPECIALS, *words]) + "\n"
    return write_files(folder, vocab_txt=vocab, config_json={"model_type": "bert"}, **files)


def roberta_folder(folder, **files):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, *merged, "[E1]", "<mask>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return write_files(folder, vocab_json=vocab, merges_txt="#version: 0.2\n" + "\n".join(MERGES),
                       config_json={"model_type": "roberta"}, **files)


def token(content, special=True, **options):
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special} | plain | options


NUM_WORDS = len(data.WORDPIECE_SPECIALS) + len(BERT_WORDS)  # the next free id
BERT_SETTINGS = {  # setting: what a file of the folder says
    "lower case": {"do_lower_case": True},
    "cased": {"do_lower_case": False},
    "accents stay": {"strip_accents": False},
    "accents go": {"strip_accents": True},
    "Chinese words": {"tokenize_chinese_chars": False},
    "special in an unused slot": {"additional_special_tokens": ["[E1]"]},
    "special beyond the vocabulary": {"extra_special_tokens": ["[E1]", "[NEW]"]},
    "a role of its own": {"entity_token": "[E1]"},
    "mask takes its space": {"mask_token": {"__type": "AddedToken"} | token("[MASK]", lstrip=True)},
    "another unknown token": {"unk_token": "[E1]"},
    "class": {"tokenizer_class": "BertTokenizerFast", "model_max_length": 9, "never_split": None},
    "added_tokens_decoder": {"added_tokens_decoder": {
        "4": token("[MASK]"), NUM_WORDS: token("extra", special=False, normalized=True)}},
    "added_tokens.json": {"added_tokens_json": {"[NEW]": NUM_WORDS, "Extra": NUM_WORDS + 1}},
    "special_tokens_map.json": {"special_tokens_map_json": {"additional_special_tokens": ["[E1]"]}},
}
ROBERTA_SETTINGS = {
    "space in front": {"add_prefix_space": True},
    "special in an unused slot": {"additional_special_tokens": ["[E1]"]},
    "special beyond the vocabulary": {"extra_special_tokens": ["[NEW]"]},
    "mask takes its space": {"mask_token": {"__type": "AddedToken"} | token("<mask>", lstrip=True)},
    "class": {"tokenizer_class": "RobertaTokenizer", "trim_offsets": False},
    "meant for BERT": {"do_lower_case": True, "strip_accents": True},
    "special_tokens_map.json": {"special_tokens_map_json": {"mask_token": token("<mask>", lstrip=True)}},
}
FAMILIES = [(bert_folder, BERT_SETTINGS), (roberta_folder, ROBERTA_SETTINGS)]


def with_settings(make_folder, folder, settings):
    """A folder in which tokenizer_config.json and its neighbours hold these settings."""
    files = {"tokenizer_config_json": {}}
    for setting in settings:
        for key, value in setting.items():
            if key.endswith("_json"):
                files[key] = value
            else:
                files["tokenizer_config_json"] |= {key: value}
    return make_folder(folder, **files)


def assert_same_ids(vocabulary, theirs, texts):
    ours = data.encode(texts, vocabulary)
    for text, ids in zip(texts, ours, strict=True):
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
    assert vocabulary.special_ids[:5] == [theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id,
                                          theirs.sep_token_id, theirs.mask_token_id]


@pytest.mark.parametrize("make_folder, table", FAMILIES)
def test_each_setting_alone_and_each_pair_gives_the_ids_of_transformers(tmp_path, make_folder, table):
    transformers = pytest.importorskip("transformers", "5")
    texts = nasty_texts(200)
    pairs = [*itertools.combinations(table, 1), *itertools.combinations(table, 2)]
    for number, names in enumerate(pairs):
        folder = with_settings(make_folder, tmp_path / str(number), [table[name] for name in names])
        assert_same_ids(data.vocabulary(folder), transformers.AutoTokenizer.from_pretrained(folder), texts)


@pytest.mark.parametrize("make_folder, table", FAMILIES)
def test_an_export_carries_every_setting_for_us_and_for_transformers(tmp_path, make_folder, table):
    transformers = pytest.importorskip("transformers", "5")
    texts = nasty_texts(50)
    for number, setting in enumerate(table.values()):
        folder = with_settings(make_folder, tmp_path / str(number), [setting])
        vocabulary = data.vocabulary(folder)
        ids = data.encode(texts, vocabulary)

        family = make_folder.__name__.removesuffix("_folder")
        export = write_files(tmp_path / f"export {number}", config_json={"model_type": family})
        data.save_vocabulary(vocabulary, export, family, 512)
        again = data.vocabulary(export)
        theirs = transformers.AutoTokenizer.from_pretrained(export)
        assert data.encode(texts, again) == ids and again.special_ids == vocabulary.special_ids
        assert_same_ids(vocabulary, theirs, texts)
        assert theirs.model_max_length == 512
        original = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.encode("a cat", "the") == original.encode("a cat", "the")  # with [CLS] and [SEP]


@pytest.mark.parametrize("make_folder", [bert_folder, roberta_folder])
def test_what_transformers_saves_opens_by_its_tokenizer_json_alone(tmp_path, make_folder):
    transformers = pytest.importorskip("transformers", "5")
    theirs = transformers.AutoTokenizer.from_pretrained(make_folder(tmp_path / "original"))
    theirs.save_pretrained(tmp_path / "saved")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "saved" / "tokenizer.json", tmp_path / "alone")
    for folder in ("saved", "alone"):
        assert_same_ids(data.vocabulary(tmp_path / folder), theirs, nasty_texts(200))


def test_a_tokenizer_json_neither_cuts_nor_pads_nor_adds_cls(tmp_path):
    vocabulary = data.vocabulary(bert_folder(tmp_path))
    vocabulary.tokenizer.enable_truncation(3)
    vocabulary.tokenizer.enable_padding(length=9)
    data.save_vocabulary(vocabulary, tmp_path, "bert", 512)
    again = data.vocabulary(tmp_path).tokenizer
    assert again.encode("the cat the cat").tokens == ["the", "cat", "the", "cat"]


PAIRS = {
    "bert's": (processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)), 1),
    "roberta's": (processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)), 2),
    "a template": (processors.TemplateProcessing(single="[CLS] $0 [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]",
                                                 special_tokens=[("[CLS]", 2), ("[SEP]", 3)]), 2),
}


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_tokenizer_json_says_how_many_separators_a_pair_has_whatever_the_model(tmp_path, name, model_type):
    tokenizer = data.vocabulary(bert_folder(tmp_path / "plain")).tokenizer
    tokenizer.post_processor, expected = PAIRS[name]
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    vocabulary = data.vocabulary(tmp_path)
    assert vocabulary.num_separators == expected

    data.save_vocabulary(vocabulary, tmp_path, model_type, 512)
    exported = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    [(input_ids, token_type_ids)] = glue_squad.encode([glue_squad.Example("the cat", "the")], vocabulary, 99)
    assert exported.encode("the cat", "the").ids == input_ids.tolist()
    assert exported.encode("the cat", "the").type_ids == token_type_ids.tolist()


def test_separators_are_counted_even_if_the_tokenizer_cannot_read_unknown_words(tmp_path):
    """A WordLevel model without unknown token raises an error for a word that it lacks."""
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(data.WORDPIECE_SPECIALS)}))
    tokenizer.post_processor, expected = PAIRS["roberta's"]
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    assert data.vocabulary(tmp_path).num_separators == expected


@pytest.mark.parametrize("model_type, num_token_types, expected", [
    ("bert", 2, [0, 0, 0, 0, 1, 1]), ("bert", 1, None), ("roberta", 1, None), ("roberta", 2, [0, 0, 0, 0, 1, 1])])
def test_the_export_of_an_unusual_tokenizer_gives_token_types_to_a_model_that_has_them(
        tmp_path, model_type, num_token_types, expected):
    """Transformers has no class for a WordPiece tokenizer that splits digits."""
    from transformers import AutoTokenizer
    vocabulary = data.vocabulary(bert_folder(tmp_path / "plain"))
    steps = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    vocabulary.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    data.save_vocabulary(vocabulary, tmp_path, model_type, 512, num_token_types)
    assert AutoTokenizer.from_pretrained(tmp_path)("the cat", "the").get("token_type_ids") == expected


@pytest.mark.parametrize("change", ["no regex", "ignore merges"])
def test_the_export_of_an_unusual_byte_level_bpe_gives_the_same_ids_in_transformers(tmp_path, change):
    from transformers import AutoTokenizer
    vocabulary = data.vocabulary(roberta_folder(tmp_path / "plain"))
    rules = json.loads(vocabulary.tokenizer.to_str())
    if change == "no regex":
        rules["pre_tokenizer"]["use_regex"] = False
        rules["model"]["merges"].append(["Ġthe", "Ġ"])  # a token that crosses a space
        rules["model"]["vocab"]["ĠtheĠ"] = 999
    else:
        rules["model"] |= {"ignore_merges": True, "vocab": rules["model"]["vocab"] | {"Ġthere": 999}}
    (tmp_path / "unusual").mkdir()
    (tmp_path / "unusual" / "tokenizer.json").write_text(json.dumps(rules))
    unusual = data.vocabulary(tmp_path / "unusual")
    text = "see the cat is there , the cat"
    expected = unusual.tokenizer.encode(text, add_special_tokens=False).ids
    assert expected != vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    export = write_files(tmp_path / "export", config_json={"model_type": "roberta"})
    data.save_vocabulary(unusual, export, "roberta", 512)
    assert AutoTokenizer.from_pretrained(export)(text)["input_ids"][1:-1] == expected


@pytest.mark.parametrize("setting, words", [
    ({"do_lower_case": True}, "lowercase is false, but tokenizer_config.json has do_lower_case true"),
    ({"strip_accents": True}, "strip_accents is false, but tokenizer_config.json has strip_accents true"),
    ({"tokenize_chinese_chars": False}, "handle_chinese_chars is true, but .* tokenize_chinese_chars false")])
def test_a_setting_that_contradicts_tokenizer_json_is_refused(tmp_path, setting, words):
    cased = data.vocabulary(bert_folder(tmp_path / "plain", tokenizer_config_json={"do_lower_case": False})).tokenizer
    write_files(tmp_path, tokenizer_json=json.loads(cased.to_str()), tokenizer_config_json=setting)
    raises_one_line(data.vocabulary, tmp_path, match=f"tokenizer.json: {words}; make the two agree")


@pytest.mark.parametrize("step, setting", [("Lowercase", "do_lower_case"), ("StripAccents", "strip_accents")])
def test_a_setting_that_contradicts_the_name_of_a_step_is_refused(tmp_path, step, setting):
    rules = json.loads(data.vocabulary(bert_folder(tmp_path / "plain")).tokenizer.to_str())
    rules["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": step}]}
    write_files(tmp_path, tokenizer_json=rules, tokenizer_config_json={setting: True})
    data.vocabulary(tmp_path)
    write_files(tmp_path, tokenizer_config_json={setting: False})
    raises_one_line(data.vocabulary, tmp_path, match=f"is true, but .* {setting} false; make the two agree")


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_setting_that_contradicts_a_step_of_tokenizer_json_is_refused(tmp_path, part):
    make_folder = bert_folder if part == "normalizer" else roberta_folder
    rules = json.loads(data.vocabulary(make_folder(tmp_path / "plain")).tokenizer.to_str())
    rules[part] = {"type": "Sequence", f"{part.replace('_', '')}s": [rules[part]]}
    setting, name = ("do_lower_case", "lowercase") if part == "normalizer" else ("add_prefix_space",) * 2
    found = rules[part][f"{part.replace('_', '')}s"][0][name]
    write_files(tmp_path, tokenizer_json=rules, tokenizer_config_json={setting: found})
    data.vocabulary(tmp_path)
    write_files(tmp_path, tokenizer_config_json={setting: not found})
    raises_one_line(data.vocabulary, tmp_path, match=f"{name} is {json.dumps(found)}, but .*; make the two agree")


def test_a_tokenizer_that_splits_words_at_random_is_refused(tmp_path):
    rules = json.loads(data.vocabulary(roberta_folder(tmp_path / "plain")).tokenizer.to_str())
    rules["model"]["dropout"] = 0.1
    write_files(tmp_path, tokenizer_json=rules)
    raises_one_line(data.vocabulary, tmp_path, match="with dropout 0.1 it splits words at random; expected null")


@pytest.mark.parametrize("name, kind", [("bert-base-uncased", "Bert"), ("roberta-base", "Roberta")])
@needs_real_inputs
def test_the_ids_of_the_real_vocabularies_match_transformers(name, kind):
    transformers = pytest.importorskip("transformers", "5")  # in 4.45 <mask> ate the space before it
    folder = REAL / "tokenizers" / name
    theirs = getattr(transformers, f"{kind}Tokenizer").from_pretrained(folder)
    assert_same_ids(data.vocabulary(folder), theirs, nasty_texts(300))


@needs_real_inputs
def test_fairseqs_files_of_roberta_give_the_ids_of_its_hub_files(tmp_path):
    source = REAL / "tokenizers" / "roberta-base"
    for theirs, ours in (("dict.txt", "dict.txt"), ("fairseq_encoder.json", "encoder.json"),
                         ("fairseq_vocab.bpe", "vocab.bpe")):
        (tmp_path / ours).symlink_to(source / theirs)
    vocabulary = data.vocabulary(tmp_path / "model.pt")
    assert vocabulary.tokenizer.get_vocab() == bert.read_json(source / "vocab.json")
    assert not vocabulary.one_row_per_line


@pytest.mark.parametrize("setting, words", [
    ({"tokenizer_class": "BertJapaneseTokenizer"}, "BertJapaneseTokenizer is not supported"),
    ({"do_basic_tokenize": False}, "do_basic_tokenize false is not supported"),
    ({"never_split": ["don't"]}, "never_split is not supported"),
    ({"split_special_tokens": True}, "split_special_tokens is not supported"),
    ({"mask_token": "[HIDE]"}, r"no \[HIDE\] among"),
    ({"added_tokens_json": {"extra": 500}}, "'extra' should have id 500, but has 69: the files do")])
def test_a_setting_that_would_change_ids_is_refused_if_it_is_not_supported(tmp_path, setting, words):
    with pytest.raises(ValueError, match=words):
        data.vocabulary(with_settings(bert_folder, tmp_path, [setting]))


@pytest.mark.parametrize("setting, words", [
    ({"do_lower_case": "false"}, "the tokenizer setting do_lower_case cannot be 'false'"),
    ({"strip_accents": 1}, "the tokenizer setting strip_accents cannot be 1"),
    ({"never_split": 5}, "the tokenizer setting never_split cannot be 5"),
    ({"added_tokens_decoder": []}, r"the tokenizer setting added_tokens_decoder cannot be \[\]"),
    ({"added_tokens_decoder": {"x": token("[E1]")}}, "'x' is no id of a token"),
    ({"added_tokens_json": {"[E1]": [6]}}, r"\[6\] is no id of a token"),
    ({"extra_special_tokens": "[E1]"}, "the tokenizer setting extra_special_tokens cannot be '\\[E1\\]'"),
    ({"special_tokens_map_json": {"extra_special_tokens": "ab"}}, "extra_special_tokens cannot be 'ab'"),
    ({"mask_token": 5}, "tokenizer settings: 5 is no token")])
def test_a_setting_of_the_wrong_type_is_refused(tmp_path, setting, words):
    with pytest.raises(ValueError, match=words):
        data.vocabulary(with_settings(bert_folder, tmp_path, [setting]))


def tokens_and_output(folder, words, settings, capsys):
    """What "CAT" becomes, and what was printed. The name of the folder means nothing."""
    files = {} if settings is None else {"tokenizer_config_json": settings}
    vocabulary = data.vocabulary(bert_folder(folder / "my-cased-model", words, **files))
    return vocabulary.tokenizer.encode("CAT").tokens, capsys.readouterr().out


@pytest.mark.parametrize("words, tokens, line", [
    (["cat"], ["cat"], "no word has a capital, so text is lower-cased"),
    (["cat", "Cat", "CAT"], ["CAT"], "words such as 'Cat' have capitals, so text keeps its case")])
def test_without_settings_the_words_decide_about_the_case_and_a_line_says_so(tmp_path, capsys, words, tokens, line):
    found, output = tokens_and_output(tmp_path, words, None, capsys)
    assert found == tokens
    assert line in output and output.count("\n") == 1


@pytest.mark.parametrize("words, do_lower_case, tokens", [
    (["cat", "CAT"], True, ["cat"]), (["cat"], False, ["[UNK]"])])
def test_a_setting_decides_about_the_case_and_nothing_is_printed(tmp_path, capsys, words, do_lower_case, tokens):
    assert tokens_and_output(tmp_path, words, {"do_lower_case": do_lower_case}, capsys) == (tokens, "")


def test_settings_that_are_silent_about_the_case_mean_what_they_mean_in_transformers(tmp_path, capsys):
    found, output = tokens_and_output(tmp_path, ["cat", "CAT"], {}, capsys)
    assert found == ["cat"]
    assert "lower-cased, as transformers does it" in output


def test_in_a_hub_cache_the_path_as_given_counts_not_where_its_links_lead(tmp_path):
    blobs = bert_folder(tmp_path / "blobs", ["cat"])
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("vocab.txt", "config.json"):
        (blobs / name).rename(blobs / f"0123{name[:1]}")
        (snapshot / name).symlink_to(blobs / f"0123{name[:1]}")
    (blobs / "4567").write_bytes(b"")
    (snapshot / "model.safetensors").symlink_to(blobs / "4567")
    assert data.vocabulary(snapshot / "model.safetensors").size == 6


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 1000])
def test_windows_line_ends_are_newlines_however_the_file_is_cut(tmp_path, monkeypatch, chunk_size):
    monkeypatch.setattr(data, "CHUNK", chunk_size)
    content = b"one\r\ntwo\rthree\r\n\r\nfour\r"
    (tmp_path / "text.txt").write_bytes(content)
    found = "".join(data.read_text(tmp_path / "text.txt", 0, len(content), quiet=True))
    assert found == "one\ntwo\rthree\n\nfour\r"


def lengths_of_splits(tmp_path, content, one_row_per_line):
    file = write(tmp_path / "text.txt", content)
    border = data.dev_border(file, len(content), one_row_per_line)
    return border, len(content) - border


def test_twenty_lines_are_cut_between_lines_and_nineteen_at_a_space(tmp_path):
    line = "three more words\n"  # 17 bytes
    assert lengths_of_splits(tmp_path, 20 * line, one_row_per_line=False) == (19 * 17, 17)
    # 95 % of 19 * 17 bytes are 306, and the last space before that is the 300th byte.
    assert lengths_of_splits(tmp_path, 19 * line, one_row_per_line=False) == (299, 24)


@pytest.mark.parametrize("blank", ["\n", "\n \r\n\n"])
@pytest.mark.parametrize("num_lines, one_row_per_line", [(25, False), (25, True), (5, True)])
def test_blank_lines_at_the_end_are_no_dev_text(tmp_path, blank, num_lines, one_row_per_line):
    lines = num_lines * "three more words\n"
    expected, _ = lengths_of_splits(tmp_path, lines, one_row_per_line)
    assert expected == (num_lines - 1) * 17
    assert lengths_of_splits(tmp_path, lines + blank, one_row_per_line)[0] == expected


def test_a_single_line_is_cut_at_a_space_also_when_each_line_is_a_row(tmp_path):
    content = "ten bytes " * 10 + "\n"
    assert lengths_of_splits(tmp_path, content, one_row_per_line=True) == (93, 8)


@pytest.mark.parametrize("make_folder, names", [
    (bert_folder, ["vocab.txt"]), (roberta_folder, ["merges.txt"])])
def test_windows_line_ends_and_a_byte_order_mark_change_no_id(tmp_path, make_folder, names):
    plain = data.vocabulary(make_folder(tmp_path / "plain"))
    folder = make_folder(tmp_path / "windows")
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert data.vocabulary(folder).tokenizer.to_str() == plain.tokenizer.to_str()


# Id = 4 + number of the line, after <s> <pad> </s> <unk>.
@pytest.mark.parametrize("symbols, text, ids", [
    ("L 9\nA 8\nK 1\n", "LA AK", [4, 5, 5, 6]),  # single letters: the space means nothing
    ("L 9\nA 8\nmadeupword0000 0\n", "LA A", [4, 5, 5]),
    ("L 9\r\nA 8\r\nK 1\r\n", "L X <mask>\tK", [4, 3, 7, 6]),
    ("C@@ 9\nCl 8\nO 1\n", "Cl C@@ O ClO", [5, 4, 6, 3])])  # longer ones: split at spaces
def test_symbols_of_a_dict_txt_are_letters_or_else_words(tmp_path, symbols, text, ids):
    vocabulary = data.vocabulary(write_files(tmp_path, dict_txt=symbols) / "model.pt")
    assert vocabulary.tokenizer.encode(text).ids == ids
    assert vocabulary.one_row_per_line and vocabulary.size == 8


def test_a_dictionary_of_sentencepiece_is_refused(tmp_path):
    write_files(tmp_path, dict_txt="▁the 9\ning 8\n")
    (tmp_path / "sentencepiece.bpe.model").touch()
    with pytest.raises(ValueError, match="dict.txt: its symbols are pieces of sentencepiece.bpe.model"):
        data.vocabulary(tmp_path)


@pytest.mark.parametrize("symbols", ["L 9\nA 8\n", "Cl 9\nBr 8\n"])
def test_the_export_of_a_dict_txt_model_reloads_here_and_in_transformers(tmp_path, symbols):
    transformers = pytest.importorskip("transformers", "5")
    vocabulary = data.vocabulary(write_files(tmp_path / "fairseq", dict_txt=symbols))
    export = write_files(tmp_path / "export", config_json={"model_type": "roberta"})
    data.save_vocabulary(vocabulary, export, "roberta", 128)
    again = data.vocabulary(export)
    assert again.one_row_per_line and again.special_ids == vocabulary.special_ids
    texts = ["LAL A", "Cl Br", "ClBr <mask> ?"]
    assert data.encode(texts, again) == data.encode(texts, vocabulary)
    assert_same_ids(vocabulary, transformers.AutoTokenizer.from_pretrained(export), texts)


@pytest.mark.parametrize("files, words", [
    ({"vocab_txt": "[PAD]\na\na\n"}, "vocab.txt: token 'a' occurs twice, as number 1 and 2 from 0"),
    ({"vocab_txt": "[PAD]\n\na\n"}, "vocab.txt: token number 1 from 0 is empty"),
    ({"vocab_txt": "[PAD]\na\n"}, r"vocab.txt: no \[UNK\] or <unk> among 2 tokens"),
    ({"dict_txt": "L 1\nL 2\n"}, "dict.txt: token 'L' occurs twice"),
    ({"vocab_json": {"a": 0, "b": 2}, "merges_txt": ""}, "vocab.json: ids are not 0 .. 1, each once"),
    ({"vocab_json": {"a": 0}, "merges_txt": "a q\n"}, "merges.txt: .*Token `q` out of vocabulary"),
    ({"tokenizer_json": {}}, "tokenizer.json: the tokenizers library cannot read it"),
    ({}, "no tokenizer.json, no vocab.txt")])
def test_a_damaged_vocabulary_is_refused_in_one_line_that_names_the_file(tmp_path, files, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        data.vocabulary(write_files(tmp_path, **files))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------
# data: text to rows
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [" ", " " * 50 + "\n"])
def test_a_text_of_few_lines_is_cut_inside_a_line(vocabulary, tmp_path, between):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five " * 150 + between + "six seven eight nine " * 50)
    num_train = data.corpus_rows(text, vocabulary, 3, "train").size
    num_dev = data.corpus_rows(text, vocabulary, 3, "dev").size
    assert num_train + num_dev == 3 * 950
    assert 0.04 < num_dev / (num_train + num_dev) < 0.06


def test_a_line_of_chinese_without_a_space_is_cut_between_two_characters(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMT_CACHE", str(tmp_path / "cache"))
    vocabulary = data.vocabulary(bert_folder(tmp_path / "model"))
    (tmp_path / "text.txt").write_text("中文" * 200, encoding="utf-8")
    lengths = [len(data.corpus_rows(tmp_path / "text.txt", vocabulary, 3, split)) for split in ("train", "dev")]
    assert lengths == [380, 20]


@pytest.mark.parametrize("text", ["one two\nthree\n", "\ufeffone two\r\nthree\r\n"])
def test_line_ends_and_a_byte_order_mark_change_no_token(tmp_path, monkeypatch, text):
    monkeypatch.setenv("TAMT_CACHE", str(tmp_path / "cache"))
    vocabulary = data.vocabulary(roberta_folder(tmp_path / "model"))
    (tmp_path / "wiki.valid.raw").write_bytes(text.encode())
    ids = vocabulary.tokenizer.encode("one two\nthree\n").ids
    rows = data.corpus_rows(tmp_path, vocabulary, len(ids) + 2, "dev")
    assert rows[0, 1:-1].tolist() == ids


SEPARATORS = {"spaces": [" "], "two spaces": ["  "], "mixed": [" ", "\n", " \n ", "\xa0"], "line ends": ["\n"],
              "tabs": ["\t"]}


@needs_real_inputs
@pytest.mark.parametrize("separators", SEPARATORS)
@pytest.mark.parametrize("kind", ["plain bert", "plain", "space in front", "mask takes its space"])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(tmp_path, kind, separators):
    folder = REAL / "tokenizers" / "bert-base-uncased"
    if kind != "plain bert":
        folder = tmp_path
        for name in ("vocab.json", "merges.txt"):
            (folder / name).symlink_to(REAL / "tokenizers" / "roberta-base" / name)
        settings = {"add_prefix_space": kind == "space in front"}
        if kind == "mask takes its space":
            settings["mask_token"] = {"__type": "AddedToken"} | token("<mask>", lstrip=True, rstrip=True)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = data.vocabulary(folder)
    rng = random.Random(3)
    words = "the cat, Don't <mask> x-1 é 中国。 [MASK] newline</s> end. ...".split()
    text = "".join(rng.choice(words) + rng.choice(SEPARATORS[separators]) for _ in range(20_000))
    texts = [text[begin:begin + 50_000] for begin in range(0, len(text), 50_000)]
    ids = []
    for pieces in data.cut_pieces(texts, vocabulary.tokenizer):
        for piece_ids in data.encode(pieces, vocabulary):
            ids += piece_ids
    assert ids == vocabulary.tokenizer.encode(text).ids


def test_a_text_is_cut_after_punctuation_too(vocabulary):
    """Lines of Chinese end with a full stop, and have no space."""
    line = "中" * 60 + "。\n"
    *pieces, rest = itertools.chain(*data.cut_pieces([line * 500], vocabulary.tokenizer))
    assert len(pieces) > 10
    assert all(2000 <= len(piece) <= 2000 + len(line) for piece in pieces)
    assert "".join([*pieces, rest]) == line * 500


def test_a_text_is_not_cut_behind_an_added_token(vocabulary):
    """The white space after the name of a town belongs to it here."""
    tokenizer = copy.deepcopy(vocabulary.tokenizer)
    tokenizer.add_special_tokens([AddedToken("York", rstrip=True)])
    text = "York\n" * 1000 + "one "  # the only place to cut is before the last space
    ids = tokenizer.encode(text).ids
    pieces = list(itertools.chain(*data.cut_pieces([text], tokenizer)))
    assert pieces == [text[:-1], " "]
    assert sum((tokenizer.encode(piece).ids for piece in pieces), []) == ids


STEPS_THAT_CROSS_WHITE_SPACE = {
    "something in front of each text": (normalizers.Prepend("nine "), None),
    "white space at the ends is stripped": (normalizers.Strip(), None),
    "words are not split": (None, pre_tokenizers.ByteLevel(use_regex=False)),
    "split at another place": (None, pre_tokenizers.Split(".", "isolated")),
    "words with their spaces": (None, pre_tokenizers.Metaspace(split=False)),
}


@pytest.mark.parametrize("name", STEPS_THAT_CROSS_WHITE_SPACE)
def test_a_text_stays_whole_if_tokens_may_cross_its_white_space(vocabulary, name):
    tokenizer = copy.deepcopy(vocabulary.tokenizer)
    normalizer, pre_tokenizer = STEPS_THAT_CROSS_WHITE_SPACE[name]
    tokenizer.normalizer = normalizer or tokenizer.normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or tokenizer.pre_tokenizer
    text = "one two\n" * 1000
    assert list(itertools.chain(*data.cut_pieces([text], tokenizer))) == [text]


def test_a_text_stays_whole_if_an_added_token_has_several_words(vocabulary):
    tokenizer = copy.deepcopy(vocabulary.tokenizer)
    tokenizer.add_tokens([AddedToken("new york", normalized=True)])
    text = "NEW YORK\n" * 1000
    assert list(itertools.chain(*data.cut_pieces([text], tokenizer))) == [text]


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_two_lists_of_special_tokens_count_as_in_transformers(tmp_path, key):
    from transformers import AutoTokenizer

    folder = bert_folder(tmp_path / "model", [*BERT_WORDS, "[E2]"], tokenizer_config_json={
        "additional_special_tokens": ["[E1]"]}, special_tokens_map_json={key: ["[E2]"]})
    text = "the [E1] [E2] cat"
    theirs = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert data.vocabulary(folder).tokenizer.encode(text).ids == theirs


@pytest.mark.parametrize("make_folder", [bert_folder, roberta_folder])
def test_with_lines_each_line_is_one_padded_row_for_any_tokenizer(tmp_path, monkeypatch, make_folder):
    monkeypatch.setenv("TAMT_CACHE", str(tmp_path / "cache"))
    vocabulary = data.vocabulary(make_folder(tmp_path / "model"))
    (tmp_path / "wiki.train.raw").write_text("a cat\n\n" + "a " * 300 + "\n  the\n")
    rows = data.corpus_rows(tmp_path, vocabulary, 12, "train", one_row_per_line=True)
    for row, line in zip(rows.tolist(), ["a cat", "a " * 300, "the"], strict=True):
        ids = vocabulary.tokenizer.encode(line.strip()).ids[:10]
        expected = [vocabulary.cls_id, *ids, vocabulary.sep_id]
        assert row == expected + [vocabulary.pad_id] * (12 - len(expected))


def test_symbols_have_a_row_for_each_line_and_spaces_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMT_CACHE", str(tmp_path / "cache"))
    vocabulary = data.vocabulary(write_files(tmp_path, dict_txt="L 9\nA 8\n"))
    rows = []
    for name, lines in (("plain", "LLAL\n" * 19 + "\nALLLLL"), ("spaced", "L L A L\n" * 19 + "\nA L L LLL")):
        (tmp_path / name).write_text(lines)
        splits = [data.corpus_rows(tmp_path / name, vocabulary, 6, split) for split in ("train", "dev")]
        rows.append([split.tolist() for split in splits])
    assert rows[0] == rows[1] == [[[0, 4, 4, 5, 4, 2]] * 19, [[0, 5, 4, 4, 4, 2]]]


def test_the_rows_are_named_after_what_made_them(vocabulary, tmp_path):
    text = "one two three\n" * 40
    for name in ("a", "b"):
        write_files(tmp_path / name)
        (tmp_path / name / "wiki.train.raw").write_text(text)
    first = Path(data.corpus_rows(tmp_path / "a", vocabulary, 8, "train").filename)
    assert Path(data.corpus_rows(tmp_path / "b", vocabulary, 8, "train").filename) == first  # the same text elsewhere
    assert os.listdir(tmp_path / "cache" / "blocks") == [first.name]

    (tmp_path / "b" / "wiki.train.raw").write_text(text.replace("one", "two"))
    others = [data.corpus_rows(tmp_path / "b", vocabulary, 8, "train"),
              data.corpus_rows(tmp_path / "a", vocabulary, 9, "train"),
              data.corpus_rows(tmp_path / "a", vocabulary, 8, "train", one_row_per_line=True)]
    assert len({first, *(Path(rows.filename) for rows in others)}) == 4


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
    ("a.json", '[{"text": "one"}, {"text": "two"}]'),
    ("a.csv", 'id,text\n1,one\n2,two\n')])
def test_other_forms_of_text_are_refused_with_the_line_of_python_that_converts_them(
        vocabulary, tmp_path, monkeypatch, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="expected plain text") as caught:
        data.corpus_rows(tmp_path / name, vocabulary, 18, "train")
    line = str(caught.value).partition("makes text.txt of it: ")[2]
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", line], check=True)
    assert (tmp_path / "text.txt").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("text, words", [
    (None, "no such file or folder; known names: wikitext-103, "),
    (b"", "the file is empty"),
    (b"one two", "its train text gives no row of 18 tokens"),
    (b"a cat\n" * 99 + b"\xff\n" + b"a\n" * 99, "no UTF-8 text near byte 594")])
def test_a_corpus_that_gives_no_rows_is_refused_and_leaves_nothing(vocabulary, tmp_path, text, words):
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        data.corpus_rows(path, vocabulary, 18, "train")
    assert str(path) in str(caught.value)
    assert list(tmp_path.glob("cache/blocks/*")) == []


def test_corruption_never_chooses_additional_special_tokens(tmp_path):
    settings = {"additional_special_tokens": ["[E1]"]}
    vocabulary = data.vocabulary(with_settings(bert_folder, tmp_path, [settings]))
    marker = vocabulary.tokenizer.token_to_id("[E1]")
    assert vocabulary.extra_special_ids == (marker,)
    _, is_predicted = data.corrupt(np.full((50, 50), marker), vocabulary, np.random.default_rng(0))
    assert not is_predicted.any()


def test_a_token_that_only_the_settings_call_special_is_not_chosen_either(tmp_path):
    tokenizer = data.vocabulary(bert_folder(tmp_path / "plain")).tokenizer
    tokenizer.add_tokens([AddedToken("[E1]", special=False)])
    write_files(tmp_path, tokenizer_json=json.loads(tokenizer.to_str()),
                tokenizer_config_json={"additional_special_tokens": ["[E1]"]})
    vocabulary = data.vocabulary(tmp_path)
    assert vocabulary.extra_special_ids == (vocabulary.tokenizer.token_to_id("[E1]"),)


def test_progress_says_how_far_how_fast_and_how_long(capsys):
    progress = data.Progress("f", 2_000_000)
    for _ in range(2):
        progress.add(1_000_000)
    assert re.fullmatch(r"f: 2.0 of 2.0 MB, 0 s left, [0-9.]+ MB/s\n", capsys.readouterr().err)


@pytest.mark.parametrize("num_unknown, warned", [(4, False), (5, True)])
def test_a_text_with_5_percent_unknown_tokens_gets_a_warning(vocabulary, tmp_path, capsys, num_unknown, warned):
    words = ["one"] * (100 - num_unknown) + ["Ω", "xyz", "Ω", "?", "!"][:num_unknown]
    (tmp_path / "wiki.valid.raw").write_text(" ".join(words))
    data.corpus_rows(tmp_path, vocabulary, 100 + 2, "dev")  # one row: the words, [CLS] and [SEP]
    warning = "5.0% of its tokens are unknown to this vocabulary, such as 'Ω', 'xyz', '?'"
    assert (warning in capsys.readouterr().err) == warned


def test_the_warning_comes_again_when_the_rows_are_read_from_the_cache(vocabulary, tmp_path, monkeypatch, capsys):
    (tmp_path / "wiki.valid.raw").write_text("Ω one " * 50)
    for _ in range(2):
        data.corpus_rows(tmp_path, vocabulary, 100 + 2, "dev")
        assert "50.0% of its tokens are unknown" in capsys.readouterr().err
        monkeypatch.setattr(data, "encode", None)  # the second time nothing is tokenised


def test_a_text_without_any_known_token_is_refused(vocabulary, tmp_path):
    (tmp_path / "wiki.valid.raw").write_text("αβγ δεζ " * 100)
    with pytest.raises(ValueError, match="valid.raw: nothing to predict, 100% of its tokens are unknown"):
        data.corpus_rows(tmp_path, vocabulary, 18, "dev")


def test_what_does_not_fill_a_row_is_dropped(vocabulary, tmp_path):
    (tmp_path / "wiki.train.raw").write_text("zero one two three four")
    assert data.corpus_rows(tmp_path, vocabulary, 6, "train").tolist() == [[2, 5, 6, 7, 8, 3]]


def test_the_same_seed_gives_the_same_corruption(vocabulary):
    input_ids = np.full((3, 20), 7)

    def corrupt(seed):
        corrupted_ids, is_predicted = data.corrupt(input_ids, vocabulary, np.random.default_rng(seed))
        return [corrupted_ids.tolist(), is_predicted.tolist()]

    assert corrupt(seed=1) == corrupt(seed=1)
    assert corrupt(seed=1) != corrupt(seed=2)


def test_the_last_twentieth_of_the_lines_of_a_file_is_dev(vocabulary, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two\n" * 38 + "three four\n" * 2)
    assert data.corpus_rows(text, vocabulary, 4, "train").tolist() == [[2, 6, 7, 3]] * 38
    assert data.corpus_rows(text, vocabulary, 4, "dev").tolist() == [[2, 8, 9, 3]] * 2


def test_another_seed_gives_another_order_of_rows():
    first = data.row_indices(99, seed=1, start=0, count=99).tolist()
    assert first != data.row_indices(99, seed=2, start=0, count=99).tolist()


def test_each_combination_of_seed_and_purpose_and_step_has_its_own_random_stream():
    keys = list(itertools.product(range(3), data.PURPOSES, range(1, 4)))
    first_draws = {data.random_stream(seed, purpose, step).random() for seed, purpose, step in keys}
    assert len(first_draws) == len(keys)


def test_a_text_whose_only_space_is_at_its_beginning_is_cut_at_95_per_cent(tmp_path):
    """Such as Chinese, or a line of DNA behind its name. The border lies between two characters."""
    text = "一 " + "汉" * 3000
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    _, begin, end = data.find_text(tmp_path / "text.txt", "dev", one_row_per_line=False)
    dev = (tmp_path / "text.txt").read_bytes()[begin:end].decode()
    assert dev == "汉" * len(dev)
    assert 0.045 < len(dev) / len(text) <= 0.05


def test_an_ordinary_token_with_the_name_of_a_special_one_of_the_other_family_is_not_taken_for_it(tmp_path):
    folder = roberta_folder(tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocab | {"[SEP]": len(vocab)}))
    assert data.vocabulary(folder).sep_id == vocab["</s>"]


@pytest.mark.parametrize("make_folder, separator, expected", [("bert", "</s>", 1), ("roberta", "[SEP]", 2)])
def test_the_files_of_a_family_stand_for_its_number_of_separators_whatever_their_name(
        tmp_path, make_folder, separator, expected):
    """As transformers' BertTokenizer and RobertaTokenizer have it."""
    folder = {"bert": bert_folder, "roberta": roberta_folder}[make_folder](tmp_path)
    write_files(folder, tokenizer_config_json={"sep_token": separator})
    if make_folder == "bert":
        with open(folder / "vocab.txt", "a") as file:
            file.write(f"{separator}\n")
    else:
        vocab = json.loads((folder / "vocab.json").read_text())
        write_files(folder, vocab_json=vocab | {separator: len(vocab)})
    assert data.vocabulary(folder).num_separators == expected


def test_null_for_the_class_of_a_tokenizer_leaves_that_of_the_config(tmp_path, inputs):
    shutil.copytree(inputs / "bert", tmp_path / "model")
    edit_json(tmp_path / "model/config.json", tokenizer_class="BertJapaneseTokenizer")
    (tmp_path / "model/tokenizer_config.json").write_text('{"tokenizer_class": null}')
    with pytest.raises(ValueError, match="tokenizer_class BertJapaneseTokenizer is not supported"):
        data.vocabulary(tmp_path / "model")


def test_unknown_words_without_a_token_for_them_are_one_error(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n[MASK]\n[UNK]\ncat\n")
    vocabulary = data.vocabulary(tmp_path)
    vocabulary.tokenizer.model.unk_token = "<nothing>"
    with pytest.raises(ValueError, match="the tokenizer cannot read the text: .*Missing"):
        data.encode(["cat dog"], vocabulary)


def test_the_unknown_token_is_of_the_family_of_the_other_special_tokens(tmp_path):
    (tmp_path / "vocab.txt").write_text("<s>\n<pad>\n</s>\n<unk>\n<mask>\n[UNK]\na\nb\n")
    vocabulary = data.vocabulary(tmp_path)
    assert data.encode(["a zzz b"], vocabulary) == [[6, vocabulary.unknown_id, 7]]
    assert vocabulary.unknown_id == 3
