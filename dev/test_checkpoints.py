"""Checkpoints as others write them: which of them bert.load reads, and what it refuses.

    python -m pytest dev/test_checkpoints.py
"""

import argparse
import base64
import io
import json
import re
import resource
import zlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import bert
from dev import fuzz
from helpers import raises_one_line
from test_tamt import REAL, assert_close, both_families, needs_real_inputs, padded_batch, transformers_model, write


def assert_equal(found, expected):
    """Two dicts hold the same names, and tensors of the same types and values."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name

# ---------------------------------------------------------------------------------------------------
# bert: which checkpoints load() reads
# ---------------------------------------------------------------------------------------------------


def read_folder(folder):
    """-> the tensors of a folder and its config.json, to be changed and written again."""
    return bert.read_safetensors(folder / "model.safetensors"), bert.read_json(folder / "config.json")


def write_folder(folder, tensors, settings):
    folder.mkdir(exist_ok=True)
    bert.write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_pickle(folder, content, settings, name="pytorch_model.bin", **options):
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name, **options)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def without(dictionary, *names):
    return {name: value for name, value in dictionary.items() if name not in names}


def assert_loads_as(folder, expected_folder):
    model = bert.load(folder)
    assert_equal(model.state_dict(), bert.load(expected_folder).state_dict())
    assert not model.training


DECODERS = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder"}
BIASES = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}


# Names: one model, spelled in many ways.


@both_families
@pytest.mark.parametrize("prefix", [
    "module.",  # DistributedDataParallel
    "model.",  # Lightning
    "_orig_mod.",  # torch.compile
    "module._orig_mod.",
    "_orig_mod.module.model.",
])
def test_what_training_programs_put_in_front_of_names_is_dropped(inputs, tmp_path, family, prefix):
    tensors, settings = read_folder(inputs / family)
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    assert_loads_as(write_folder(tmp_path / "wrapped", wrapped, settings), inputs / family)


def test_a_compiled_module_inside_the_model_is_read(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    compiled = {}
    for name, tensor in tensors.items():
        compiled[name.replace("bert.encoder.", "bert.encoder._orig_mod.")] = tensor
    assert_loads_as(write_folder(tmp_path / "compiled", compiled, settings), inputs / "bert")


@both_families
def test_the_spelling_of_2018_is_read(inputs, tmp_path, family):
    tensors, settings = read_folder(inputs / family)
    old = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        old[name] = tensor
    assert f"{family}.embeddings.LayerNorm.gamma" in old
    assert_loads_as(write_folder(tmp_path / "old", old, settings), inputs / family)


@both_families
def test_without_model_type_the_names_of_the_weights_tell_the_family(inputs, tmp_path, family):
    tensors, settings = read_folder(inputs / family)
    settings = without(settings, "model_type", "architectures")
    assert_loads_as(write_folder(tmp_path / "untyped", tensors, settings), inputs / family)


@both_families
def test_the_architecture_tells_the_family_of_a_bare_encoder(inputs, tmp_path, family):
    """transformers' BertModel has names without bert. in front; old configs have no model_type."""
    tensors, settings = read_folder(inputs / family)
    bare = {name.removeprefix(f"{family}."): t for name, t in tensors.items() if name.startswith(family)}
    settings = without(settings, "model_type") | {"architectures": [f"{family.title()}Model"]}

    model = bert.load(write_folder(tmp_path / "bare", bare, settings))

    expected = {f"{family}.{name}": tensor for name, tensor in bare.items()}
    assert_equal(model.state_dict(), expected)
    assert model.has_pooler
    assert model.mlm_head is None


def test_a_bare_encoder_of_unknown_family_is_refused(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    bare = {name.removeprefix("bert."): t for name, t in tensors.items() if name.startswith("bert.")}
    folder = write_folder(tmp_path / "bare", bare, without(settings, "model_type", "architectures"))
    match = "model.safetensors: .*must name one family, bert or roberta; found: none"
    raises_one_line(bert.load, folder, match=match)


def test_a_model_type_that_contradicts_the_weights_is_refused(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    folder = write_folder(tmp_path / "odd", tensors, settings | {"model_type": "roberta"})
    raises_one_line(bert.load, folder, match="must name one family, bert or roberta; found: bert and roberta")


def test_old_roberta_configs_lack_three_settings(inputs, tmp_path, capsys):
    tensors, settings = read_folder(inputs / "roberta")
    settings = without(settings, "pad_token_id", "type_vocab_size", "layer_norm_eps")
    config = bert.load(write_folder(tmp_path / "old", tensors, settings)).config
    assert (config.pad_token_id, config.type_vocab_size, config.layer_norm_eps) == (1, 1, 1e-5)
    assert capsys.readouterr().out == "config.json does not say layer_norm_eps: 1e-05, as in the original RoBERTa\n"


def test_googles_config_lacks_layer_norm_eps(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    folder = write_folder(tmp_path / "old", tensors, without(settings, "layer_norm_eps", "pad_token_id"))
    assert bert.load(folder).config.layer_norm_eps == 1e-12
    assert bert.load(folder).config.pad_token_id == 0


# What a file holds, and what it lacks.


@both_families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_weights_become_fp32(inputs, tmp_path, family, dtype):
    tensors, settings = read_folder(inputs / family)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    model = bert.load(write_folder(tmp_path / "typed", tensors, settings))
    assert_equal(model.state_dict(), {name: tensor.float() for name, tensor in tensors.items()})


@both_families
def test_a_model_has_the_pooler_and_the_head_that_its_file_has(inputs, tmp_path, family):
    tensors, settings = read_folder(inputs / family)
    head = {"bert": "cls", "roberta": "lm_head"}[family]
    no_pooler = {name: t for name, t in tensors.items() if ".pooler." not in name}
    no_head = {name: t for name, t in tensors.items() if not name.startswith(head)}

    model = bert.load(write_folder(tmp_path / "no_pooler", no_pooler, settings))
    assert not model.has_pooler
    assert model.mlm_head is not None

    model = bert.load(write_folder(tmp_path / "no_head", no_head, settings))
    assert model.has_pooler
    assert model.mlm_head is None


def test_tensors_without_use_are_named_in_one_line_and_old_buffers_are_not(inputs, tmp_path, capsys):
    tensors, settings = read_folder(inputs / "bert")
    tensors |= {"cls.seq_relationship.bias": torch.ones(2), "other.x": torch.ones(1)}
    tensors |= {"bert.embeddings.position_ids": torch.arange(9)}
    bert.load(write_folder(tmp_path / "more", tensors, settings))
    assert capsys.readouterr().out == "model.safetensors: not used: cls.seq_relationship.bias, other.x\n"


@both_families
def test_a_tied_matrix_may_be_stored_under_the_decoders_name_alone(inputs, tmp_path, family):
    """safetensors stores shared memory once, and programs chose either name."""
    tensors, settings = read_folder(inputs / family)
    words = f"{family}.embeddings.word_embeddings.weight"
    renamed = without(tensors, words) | {f"{DECODERS[family]}.weight": tensors[words]}
    assert_loads_as(write_folder(tmp_path / "renamed", renamed, settings), inputs / family)


@both_families
def test_a_tied_matrix_and_its_bias_may_be_stored_twice(inputs, tmp_path, family, capsys):
    tensors, settings = read_folder(inputs / family)
    decoder = {
        f"{DECODERS[family]}.weight": tensors[f"{family}.embeddings.word_embeddings.weight"].clone(),
        f"{DECODERS[family]}.bias": tensors[BIASES[family]].clone(),
    }
    assert_loads_as(write_folder(tmp_path / "twice", tensors | decoder, settings), inputs / family)
    assert capsys.readouterr().out == ""  # nothing is called unused


@both_families
def test_the_bias_of_the_decoder_may_be_stored_under_the_decoders_name_alone(inputs, tmp_path, family):
    tensors, settings = read_folder(inputs / family)
    bias = {f"{DECODERS[family]}.bias": tensors[BIASES[family]]}
    folder = write_folder(tmp_path / "bias", without(tensors, BIASES[family]) | bias, settings)
    assert_loads_as(folder, inputs / family)


@both_families
@pytest.mark.parametrize("said", [True, False])
@torch.no_grad()
def test_a_decoder_that_differs_counts_whatever_the_config_says(inputs, tmp_path, family, said):
    tensors, settings = read_folder(inputs / family)
    words = tensors[f"{family}.embeddings.word_embeddings.weight"]
    doubled = tensors | {f"{DECODERS[family]}.weight": 2 * words}
    folder = write_folder(tmp_path / "untied", doubled, settings | {"tie_word_embeddings": said})

    hidden_states = torch.randn(4, 32)
    untied = bert.load(folder)
    tied_logits = bert.load(inputs / family).mlm_logits(hidden_states)
    bias = tensors[BIASES[family]]
    assert_close(untied.mlm_logits(hidden_states) - bias, 2 * (tied_logits - bias))
    assert not untied.config.tie_word_embeddings


@both_families
def test_of_an_untied_model_neither_matrix_may_be_missing(inputs, tmp_path, family):
    tensors, settings = read_folder(inputs / family)
    words = f"{family}.embeddings.word_embeddings.weight"
    settings = settings | {"tie_word_embeddings": False}
    folder = write_folder(tmp_path / "no_decoder", tensors, settings)
    raises_one_line(bert.load, folder, match=f"missing: {DECODERS[family]}.weight;")

    moved = without(tensors, words) | {f"{DECODERS[family]}.weight": tensors[words]}
    folder = write_folder(tmp_path / "no_words", moved, settings)
    raises_one_line(bert.load, folder, match=f"missing: {words};")


# Files and folders.


@both_families
def test_a_file_of_a_folder_is_read_as_the_folder_is(inputs, family):
    assert_loads_as(inputs / family / "model.safetensors", inputs / family)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "epoch=3.ckpt", "model.pt", "weights.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_new_and_legacy_are_read(inputs, tmp_path, name, zipped):
    tensors, settings = read_folder(inputs / "bert")
    write_pickle(tmp_path, tensors, settings, name, _use_new_zipfile_serialization=zipped)
    assert_loads_as(tmp_path / name, inputs / "bert")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_weights_inside_a_training_checkpoint_are_read(inputs, tmp_path, key):
    tensors, settings = read_folder(inputs / "bert")
    content = {"epoch": 3, key: tensors, "optimizer": {"lr": 1e-4}}
    assert_loads_as(write_pickle(tmp_path / "run", content, settings, "last.ckpt"), inputs / "bert")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_state_dict_of_torch_prune_is_read(inputs, tmp_path, suffix):
    """torch.nn.utils.prune keeps weight_orig and weight_mask until prune.remove is called."""

    _, settings = read_folder(inputs / "bert")
    pruned = bert.load(inputs / "bert")
    query = pruned.bert.encoder.layer[0].attention.self.query
    prune.l1_unstructured(query, "weight", amount=0.7)
    if suffix == "bin":
        folder = write_pickle(tmp_path / "pruned", pruned.state_dict(), settings)
    else:
        folder = write_folder(tmp_path / "pruned", pruned.state_dict(), settings)

    found = bert.load(folder).bert.encoder.layer[0].attention.self.query.weight
    assert (found == 0).sum() == round(0.7 * 32 * 32)
    assert torch.equal(found, query.weight)


def test_a_prune_mask_of_another_shape_is_refused(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    weight = tensors.pop("bert.pooler.dense.weight")
    halves = {"bert.pooler.dense.weight_orig": weight, "bert.pooler.dense.weight_mask": torch.ones(3, 32)}
    folder = write_pickle(tmp_path / "odd", tensors | halves, settings)
    message = r"pytorch_model.bin: bert.pooler.dense.weight_mask has shape \[3, 32\] instead of \[32, 32\]"
    raises_one_line(bert.load, folder, match=message)


def test_a_sharded_model_of_transformers_is_read(tmp_path):
    theirs = transformers_model("roberta")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    theirs.save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_loads_as(tmp_path / "sharded", tmp_path / "whole")
    assert_loads_as(tmp_path / "sharded" / "model.safetensors.index.json", tmp_path / "whole")


def write_shards(folder, tensors, settings):
    """Half of the tensors in a.bin, half in b.safetensors; -> the index, and its content."""
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[::2]}
    second = {name: tensors[name] for name in names[1::2]}
    write_pickle(folder, first, settings, "a.bin")
    bert.write_safetensors(folder / "b.safetensors", second)
    weight_map = dict.fromkeys(first, "a.bin") | dict.fromkeys(second, "b.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index, weight_map


def test_shards_may_be_pickles(inputs, tmp_path):
    write_shards(tmp_path / "sharded", *read_folder(inputs / "bert"))
    assert_loads_as(tmp_path / "sharded", inputs / "bert")


def test_a_tensor_that_no_shard_holds_is_named(inputs, tmp_path):
    index, weight_map = write_shards(tmp_path / "sharded", *read_folder(inputs / "bert"))
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "b.safetensors"}}))
    raises_one_line(bert.load, index, match="index.json: its shards lack more")


def test_a_hub_caches_links_count_as_they_are_named(inputs, tmp_path):
    """In a hub cache snapshots/<commit>/model.safetensors is a link to blobs/<hash>, which has no suffix."""
    blobs = tmp_path / "blobs"
    snapshot = tmp_path / "snapshots" / "86b5e0934494"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(["config.json", "model.safetensors"]):
        (blobs / f"abcdef{number}").write_bytes((inputs / "bert" / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/abcdef{number}")
    assert_loads_as(snapshot, inputs / "bert")
    assert_loads_as(snapshot / "model.safetensors", inputs / "bert")


def test_the_shadow_files_of_macos_are_ignored(inputs, tmp_path):
    write_google(tmp_path / "google", *read_folder(inputs / "bert"))
    for file in list((tmp_path / "google").iterdir()):
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7 Mac OS X")
    assert_loads_as(tmp_path / "google", inputs / "bert")


def test_of_several_checkpoints_one_must_be_named(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    write_pickle(tmp_path, tensors, settings, "x.pt")
    write_pickle(tmp_path, tensors, settings, "y.pt")
    raises_one_line(bert.load, tmp_path, match="several checkpoints, name one: x.pt, y.pt")
    assert_loads_as(tmp_path / "y.pt", inputs / "bert")


def test_a_folder_without_weights_says_what_is_looked_for(tmp_path):
    match = r"no model.safetensors, pytorch_model.bin, model.pt or \*.ckpt.index in it"
    raises_one_line(bert.load, tmp_path, match=match)


def test_a_path_that_is_not_there_is_named(tmp_path):
    raises_one_line(bert.load, tmp_path / "gone", match="gone: no such checkpoint file or folder")


def test_a_file_of_another_kind_is_refused(inputs):
    file = inputs / "bert" / "config.json"
    raises_one_line(bert.load, file, match="config.json: not a checkpoint: expected .safetensors")


def test_weights_without_a_config_are_refused(inputs, tmp_path):
    bert.write_safetensors(tmp_path / "model.safetensors", read_folder(inputs / "bert")[0])
    raises_one_line(bert.load, tmp_path, match="no config.json or bert_config.json beside model.safetensors")


# TensorFlow.


def google_name(name):
    """bert.encoder.layer.0.output.dense.weight -> bert/encoder/layer_0/output/dense/kernel"""
    if "LayerNorm" in name:
        name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
    elif name == "cls.predictions.bias":
        name = "cls.predictions.output_bias"
    elif "_embeddings" in name:
        name = name.removesuffix(".weight")
    else:
        name = name.replace(".weight", ".kernel")
    return name.replace(".layer.", ".layer_").replace(".", "/")


def write_google(folder, tensors, settings, **options):
    """A folder as Google ships it, with two variables of the optimizer."""
    variables = {"global_step": torch.tensor(7), "bert/pooler/dense/bias/adam_m": torch.ones(32)}
    for name, tensor in tensors.items():
        new = google_name(name)
        variables[new] = tensor.T if new.endswith("/kernel") else tensor
    folder.mkdir(exist_ok=True)
    fuzz.write_tensorflow(folder / "bert_model.ckpt", variables, **options)
    settings = without(settings, "model_type", "architectures", "layer_norm_eps", "pad_token_id")
    (folder / "bert_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("snappy", [False, True])
@pytest.mark.parametrize("name", ["", "bert_model.ckpt", "bert_model.ckpt.index",
                                  "bert_model.ckpt.data-00000-of-00001"])
def test_googles_layout_is_read_from_any_of_its_names(inputs, tmp_path, name, snappy):
    write_google(tmp_path / "google", *read_folder(inputs / "bert"), snappy=snappy)
    assert_loads_as(tmp_path / "google" / name, inputs / "bert")


# Index and data of a checkpoint that TensorFlow 2.21 wrote, zlib and base85.
GOOGLE = """
c-rmQe{2(F7zgmTUAtaOS+6&{VOQ))CRQA~k<bL<T>FP88e$d$(HKm*u5W*2*B`rH#TjExA!JiDixMG(U~xtlA~L}kqG%dJ$Pi=Dh%6$cQG-Mc
5@O6iV*I`vj;t%(AN$YJ<kO~o-uJ!tdEV#Rq=eLSCa;+@kvm*bs%jEVM`<jU$|UmA8o8gUk7m`h6s4NXnFNbq=D2_uY`oy#?zOrTaymWzu_z*N
`gpRJZ*0nC^C>Nr%|xy*hG85VHaRpL(9J<dyM7PvY0|R2G!xPKb9DA-^W^A~IS>w>R6L7#SM$cK8k;?ipB$&x1$0Yr{ju?h`gS4HlZ{bTQdkO+
4oTKDnqga#vIQ+y&~A{MsN0am)ua1{JFLRY^olHUpoQDD*dfGdCQqekO3qJ*ODue(FMO=6zPXpG8LG_4xNKu7uUL7e(LZ0vQzb6-(*Bt%l<iny
-ToJr2CA;0JJ<??`!0Xb>Ja)0RIQk<J2Blgc;)z#s?&>3HhpB%(h#OUEh~kJ{TCZB{mHw2J5_ypsew&DczOFC(k4vxNkxTI8I7uG8cWF<m1Y%)
7fU=&aoe*8|EQK8FY0b~c<WN-<sOe<a7G?%b<3UB*B8$^BNiF{^x;uo^)q7OcjJk!MHO3^>YuWQZ6Q9a4OrbmE}K=5U6obJw_}w}?dF~)n;^+C
IUPw~-<lV(SC*VxCR9HJFRNl~$iJDi2t7((%Bd(=59`bPwZ@FhC|c2nqMeOAxSL-fXsVpa$5}OQP?xd~7jGFVpKPtHi@p$%RV$nC_ExP+k%d=3
_Q)!+`q?jJyLRp@d~NZecl#nLRpiM%CsVm9+ct|Oe}D_Fed?#JK3mg9no1<KnRoP<A8AEhVIP^-kWjKwS&8H|n&a#O5eG!f{p8e}Zi2@$Ga=7g
2&rRl2D|T#vsV*)DqY$$N=$W0ve!QSSs?Mtnf-R|u-!!rACLd7zua1Q==9V({XRT(5)uX-ico@b=gni}{+q{m5TOIY&<z_P2RaPE5bS^=jKC-y
f)b3u2^fbmoQI1r!LHjyhy^%s0uQ&r0`P$dtq_1V=z!(00y-fK55Q_z1KqF|o`ChR0b-B@1#+OlGw>Yf@M728bFbC9ZH6r{058E-col}=HP{Ak
zz*06yI?mI;VpO@-hmO=3-7`EFbW6YL-+^|!N+hIK7$f`4oBc9jKLT1C42=Z;2ZcBzJqc29)5tcP=+7jXE+Dv;aB(_F2F^&1b@O`FacNKD*OW^
gxeL&P!}>jd!xQE>X};aC!^eJ{XR3wz1F{fjB>B_@8!AXe(U$_|Mh!j0V~vl4LGoa1LlDf=0gLxLdIur)E7oQbE}_ftDksqg8+>o<FhyFi(2oQ
x#n&(*Jxd%Yu5Vx`(N&J%inhGe}R7i!@(ir"""


def test_what_tensorflow_itself_wrote_is_read(tmp_path):
    """Variable number i, in the order of the names, holds ((0, 1, 2, ... mod 251) + i) / 256."""
    content = zlib.decompress(base64.b85decode("".join(GOOGLE.split())))
    (tmp_path / "c.index").write_bytes(content[:1280])
    (tmp_path / "c.data-00000-of-00001").write_bytes(content[1280:])

    variables = bert.read_tensorflow(tmp_path / "c")
    assert variables.pop("global_step") == 7
    assert len(variables) == 31
    for number, name in enumerate(sorted(variables)):
        count = variables[name].numel()
        expected = (torch.arange(count) % 251 + number) / 256
        assert torch.equal(variables[name].flatten(), expected), name

    config = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 16, "max_position_embeddings": 8}
    (tmp_path / "bert_config.json").write_text(json.dumps(config))
    query = bert.load(tmp_path).bert.encoder.layer[0].attention.self.query.weight
    assert torch.equal(query, variables["bert/encoder/layer_0/attention/self/query/kernel"].T)


@needs_real_inputs
@torch.no_grad()
def test_a_real_checkpoint_of_googles_run_pretraining_is_read(capsys):
    """Its next-sentence head has no use here, and its name is printed as Hugging Face spells it."""
    assert_matches_transformers(bert.load(REAL / "tf/tf_keras_bert_test_checkpoint"), num_heads=4)
    assert "not used: cls.seq_relationship.bias, cls.seq_relationship.weight\n" in capsys.readouterr().out


def assert_matches_transformers(ours, num_heads):
    """transformers has no reader for these files any more, so it gets the weights from here."""
    import transformers

    assert ours.config.num_attention_heads == num_heads
    family = ours.config.model_type.title()
    config = getattr(transformers, f"{family}Config")(**vars(ours.config))
    theirs = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    report = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert all("decoder" in name for name in report.missing_keys)
    theirs.tie_weights()
    input_ids = torch.randint(4, config.vocab_size, (2, 9))
    assert_close(ours.mlm_logits(ours(input_ids)[-1]), theirs(input_ids).logits)


@needs_real_inputs
def test_a_real_index_of_googles_lists_its_variables():
    path = REAL / "tf/google_index_only/uncased_L-4_H-256_A-4.bert_model.ckpt.index"
    num_shards, entries = bert.read_tensorflow_index(path)
    assert num_shards == 1
    assert "bert/encoder/layer_3/attention/self/query/kernel" in entries
    assert "bert/encoder/layer_4/attention/self/query/kernel" not in entries


def test_an_object_checkpoint_of_tensorflow_2_is_named(tmp_path):
    variables = {
        "_CHECKPOINTABLE_OBJECT_GRAPH": torch.ones(1),
        "model/x/.ATTRIBUTES/VARIABLE_VALUE": torch.ones(2),
    }
    fuzz.write_tensorflow(tmp_path / "ckpt-1", variables)
    match = "ckpt-1.index: an object checkpoint of TensorFlow 2; expected .*bert_model.ckpt"
    raises_one_line(bert.load, tmp_path, match=match)


@pytest.mark.parametrize("variable", [
    "bert/encoder/transformer/group_0/inner_group_0/attention_1/self/query/kernel",  # ALBERT
    "electra/encoder/layer_0/attention/self/query/kernel",
])
def test_albert_and_electra_of_tensorflow_are_named(tmp_path, variable):
    fuzz.write_tensorflow(tmp_path / "model.ckpt", {variable: torch.ones(2, 2)})
    raises_one_line(bert.load, tmp_path, match=f"model.ckpt.index: {variable} belongs to ALBERT or ELECTRA")


def test_a_tensorflow_checkpoint_of_anything_else_shows_its_variables(tmp_path):
    fuzz.write_tensorflow(tmp_path / "model.ckpt", {"resnet/conv/kernel": torch.ones(2, 2)})
    match = "model.ckpt.index: no variable bert/.*; the file has: resnet/conv/kernel"
    raises_one_line(bert.load, tmp_path, match=match)


# fairseq.


def fairseq_tensors(tensors, fused=False, side="decoder", norm="emb_layer_norm"):
    """Hugging Face's names -> fairseq's. The token types do not exist there, nor does the pooler."""
    modules = {new: old for old, new in bert.FAIRSEQ_NAMES.items()}
    modules["embeddings.LayerNorm"] = norm
    renamed = {
        f"{side}.lm_head.weight": tensors["roberta.embeddings.word_embeddings.weight"],
        f"{side}.sentence_encoder.version": torch.ones(1),
        "classification_heads.mnli.dense.bias": torch.ones(1),
    }
    for name, tensor in tensors.items():
        if "token_type" in name or "pooler" in name:
            continue
        if name.startswith("lm_head."):
            renamed[f"{side}.{name}"] = tensor
            continue
        match = re.fullmatch(r"roberta\.(?:encoder\.layer\.(\d+)\.)?(.+)\.(weight|bias)", name)
        layer, module, kind = match.groups()
        prefix = f"{side}.sentence_encoder."
        if layer is not None:
            prefix += f"layers.{layer}."
        if fused and module == "attention.self.query":
            three = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            renamed[f"{prefix}self_attn.in_proj_{kind}"] = torch.cat(three)
        elif not (fused and module.startswith("attention.self.")):
            renamed[f"{prefix}{modules[module]}.{kind}"] = tensor
    return renamed


def write_fairseq(folder, tensors, settings_of_fairseq):
    folder.mkdir(exist_ok=True)
    torch.save({"model": tensors, "last_optimizer_state": None} | settings_of_fairseq, folder / "model.pt")
    return folder


@pytest.fixture
def roberta_tensors(inputs):
    """RoBERTa as fairseq trains it: no pooler, and token types that are all zero."""
    tensors, _ = read_folder(inputs / "roberta")
    tensors["roberta.embeddings.token_type_embeddings.weight"].zero_()
    return {name: tensor for name, tensor in tensors.items() if "pooler" not in name}


FAIRSEQ_ARGS = argparse.Namespace(encoder_attention_heads=4, activation_fn="gelu", encoder_layers=2)


@pytest.mark.parametrize("layout", [
    {"fused": True},  # 2019: query, key and value in one matrix
    {"fused": False},
    {"side": "encoder", "norm": "layernorm_embedding"},  # since 2020
], ids=str)
def test_fairseqs_layouts_are_read(roberta_tensors, tmp_path, layout):
    tensors = fairseq_tensors(roberta_tensors, **layout)
    folder = write_fairseq(tmp_path / "f", tensors, {"args": FAIRSEQ_ARGS})
    assert_equal(bert.load(folder).state_dict(), roberta_tensors)


@pytest.mark.parametrize("place", ["args", "cfg of Namespace", "cfg of dict", "Namespace of Namespace"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_fairseqs_settings_are_read_from_args_and_from_cfg(roberta_tensors, tmp_path, place, activation):
    options = argparse.Namespace(encoder_attention_heads=4, activation_fn=activation)
    if place == "args":
        settings = {"args": options}
    elif place == "cfg of Namespace":
        settings = {"args": None, "cfg": {"model": options}}
    elif place == "cfg of dict":
        settings = {"args": None, "cfg": {"model": vars(options)}}
    else:
        settings = {"args": None, "cfg": argparse.Namespace(model=options)}

    folder = write_fairseq(tmp_path / "f", fairseq_tensors(roberta_tensors), settings)
    if activation == "gelu":
        assert bert.load(folder).config.num_attention_heads == 4
    else:
        raises_one_line(bert.load, folder, match="model.pt: activation_fn 'relu' is not supported; expected gelu")


def test_fairseqs_dropout_is_read(roberta_tensors, tmp_path):
    options = argparse.Namespace(encoder_attention_heads=4, dropout=0.0, attention_dropout=0.2)
    config = bert.load(write_fairseq(tmp_path / "f", fairseq_tensors(roberta_tensors), {"args": options})).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.2)


def test_relu_in_a_fairseq_file_is_refused_whatever_a_config_beside_it_says(inputs, roberta_tensors, tmp_path):
    relu = argparse.Namespace(encoder_attention_heads=4, activation_fn="relu")
    folder = write_fairseq(tmp_path / "f", fairseq_tensors(roberta_tensors), {"cfg": {"model": relu}})
    (folder / "config.json").write_text((inputs / "roberta" / "config.json").read_text())
    raises_one_line(bert.load, folder, match="model.pt: activation_fn 'relu' is not supported")


def test_a_fairseq_file_without_its_settings_needs_a_config(inputs, roberta_tensors, tmp_path):
    """The shapes tell everything but the number of heads."""
    folder = write_fairseq(tmp_path / "f", fairseq_tensors(roberta_tensors), {})
    raises_one_line(bert.load, folder, match="model.pt: missing num_attention_heads")
    (folder / "config.json").write_text((inputs / "roberta" / "config.json").read_text())
    assert_equal(bert.load(folder).state_dict(), roberta_tensors)


def test_a_fairseq_file_with_a_number_in_the_place_of_a_matrix_is_refused_in_one_line(roberta_tensors, tmp_path):
    tensors = fairseq_tensors(roberta_tensors, fused=True)
    name = next(name for name in tensors if name.endswith("in_proj_weight"))
    folder = write_fairseq(tmp_path / "f", tensors | {name: torch.tensor(1.0)}, {"args": FAIRSEQ_ARGS})
    raises_one_line(bert.load, folder, match="model.pt: .*dimension")


def test_a_fairseq_file_with_layers_of_another_kind_is_refused(roberta_tensors, tmp_path):
    more = {"decoder.sentence_encoder.layer_norm.weight": torch.ones(32)}
    folder = write_fairseq(tmp_path / "f", fairseq_tensors(roberta_tensors) | more, {"args": FAIRSEQ_ARGS})
    match = "model.pt: decoder.sentence_encoder.layer_norm.weight is not a part of RoBERTa"
    raises_one_line(bert.load, folder, match=match)


@needs_real_inputs
@torch.no_grad()
def test_a_real_fairseq_model_is_read():
    assert_matches_transformers(bert.load(REAL / "models/sapiens-fairseq"), num_heads=8)


@needs_real_inputs
@torch.no_grad()
def test_a_real_legacy_pickle_of_a_12_layer_model_is_read():
    assert_matches_transformers(bert.load(REAL / "models/rxnfp"), num_heads=4)


# ---------------------------------------------------------------------------------------------------
# bert: what load() refuses
# ---------------------------------------------------------------------------------------------------


def test_all_missing_and_misshaped_tensors_stand_in_one_error(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    del tensors["cls.predictions.transform.dense.weight"]
    tensors["bert.pooler.dense.weight"] = torch.ones(2, 2)
    tensors["bert.embeddings.LayerNorm.bias"] = torch.ones(3)

    folder = write_folder(tmp_path / "odd", tensors, settings)
    message = raises_one_line(bert.load, folder, match="model.safetensors: ")
    missing = "bert.encoder.layer.1.output.dense.bias, cls.predictions.transform.dense.weight"
    assert f"missing: {missing};" in message
    assert "bert.embeddings.LayerNorm.bias [3] instead of [32]" in message
    assert "bert.pooler.dense.weight [2, 2] instead of [32, 32]" in message


def test_a_long_list_of_missing_tensors_is_cut_and_shows_what_the_file_has(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    tensors = {name.replace(".attention.", ".attn."): tensor for name, tensor in tensors.items()}
    folder = write_folder(tmp_path / "odd", tensors, settings)
    message = raises_one_line(bert.load, folder, match="and 16 more; the file has: ")
    assert message.count("attention.self") == 4
    assert len(message) < 700


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_weights_that_are_whole_numbers_are_refused(inputs, tmp_path, dtype):
    """Quantised weights of the right shape would load, and compute nonsense in silence."""
    tensors, settings = read_folder(inputs / "bert")
    tensors["bert.pooler.dense.weight"] = torch.ones(32, 32, dtype=dtype)
    folder = write_folder(tmp_path / "whole", tensors, settings)
    match = f"wrong values: bert.pooler.dense.weight holds {dtype}, not floating-point"
    raises_one_line(bert.load, folder, match=match)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(inputs, tmp_path, value):
    tensors, settings = read_folder(inputs / "bert")
    tensors["bert.pooler.dense.weight"][3, 4] = value
    folder = write_folder(tmp_path / "infinite", tensors, settings)
    raises_one_line(bert.load, folder, match="bert.pooler.dense.weight holds values that are not finite")


def test_fp64_weights_beyond_fp32_are_refused(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    tensors["bert.pooler.dense.weight"] = torch.full((32, 32), 1e300, dtype=torch.float64)
    folder = write_folder(tmp_path / "large", tensors, settings)
    raises_one_line(bert.load, folder, match="bert.pooler.dense.weight holds values that are not finite")


@pytest.mark.parametrize("model_type", [
    "albert", "camembert", "deberta", "distilbert", "electra", "mpnet", "xlm-roberta", "modernbert",
])
def test_a_hugging_face_folder_of_another_family_is_named(inputs, tmp_path, model_type):
    tensors, settings = read_folder(inputs / "bert")
    folder = write_folder(tmp_path / "other", tensors, settings | {"model_type": model_type})
    match = f"this is a model of the family {model_type}; only bert and roberta are read"
    raises_one_line(bert.load, folder, match=match)


@pytest.mark.parametrize("prefix", ["albert", "electra", "distilbert"])
def test_another_family_is_named_by_its_weights_alone(inputs, tmp_path, prefix):
    tensors, settings = read_folder(inputs / "bert")
    tensors = {name.replace("bert.", f"{prefix}.", 1): tensor for name, tensor in tensors.items()}
    folder = write_folder(tmp_path / "other", tensors, without(settings, "model_type", "architectures"))
    raises_one_line(bert.load, folder, match=f"this is a model of the family {prefix};")


def test_two_names_for_one_tensor_are_refused(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    tensors["module.bert.pooler.dense.bias"] = torch.ones(32)
    folder = write_folder(tmp_path / "twice", tensors, settings)
    raises_one_line(bert.load, folder, match="another name both mean bert.pooler.dense.bias")


@pytest.mark.parametrize("name, value, valid", [
    ("num_attention_heads", 0, "a whole number from 1 to 10,000,000"),
    ("num_attention_heads", "4", "a whole number from 1"),
    ("num_attention_heads", [4], "a whole number from 1"),
    ("hidden_size", True, "a whole number from 1"),
    ("vocab_size", 2.5, "a whole number from 1"),
    ("num_hidden_layers", 10**30, "a whole number from 1"),
    ("type_vocab_size", 0, "a whole number from 1"),
    ("pad_token_id", -1, "a whole number from 0"),
    ("layer_norm_eps", "x", "a number in "),
    ("layer_norm_eps", float("nan"), "a number in "),
    ("hidden_dropout_prob", 1, "a number in "),
    ("tie_word_embeddings", "no", "true or false"),
    ("tie_word_embeddings", 1, "true or false"),
    ("hidden_act", "relu", "expected gelu"),
    ("hidden_act", "gelu_new", "expected gelu"),
    ("is_decoder", True, "expected False"),
    ("position_embedding_type", "relative_key", "expected absolute"),
], ids=str)
def test_a_setting_that_cannot_be_is_refused_with_what_would_be_valid(inputs, tmp_path, name, value, valid):
    tensors, settings = read_folder(inputs / "bert")
    folder = write_folder(tmp_path / "odd", tensors, settings | {name: value})
    raises_one_line(bert.load, folder, match=f"config.json: {name} .*{valid}")


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                  "intermediate_size", "max_position_embeddings"])
@pytest.mark.parametrize("null", [False, True])
def test_a_size_that_the_config_lacks_is_named(inputs, tmp_path, name, null):
    tensors, settings = read_folder(inputs / "bert")
    settings = without(settings, name)
    if null:
        settings[name] = None
    folder = write_folder(tmp_path / "odd", tensors, settings)
    raises_one_line(bert.load, folder, match=f"config.json: missing {name}$")


def test_heads_that_do_not_divide_the_hidden_size_are_refused(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    folder = write_folder(tmp_path / "odd", tensors, settings | {"num_attention_heads": 5})
    raises_one_line(bert.load, folder, match="num_attention_heads 5 does not divide hidden_size 32")


def test_more_layers_than_the_file_has_are_refused_before_they_are_built(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    folder = write_folder(tmp_path / "odd", tensors, settings | {"num_hidden_layers": 1000})
    raises_one_line(bert.load, folder, match="num_hidden_layers is 1000, but the weights have 2 layers")


def test_a_pad_token_outside_the_vocabulary_is_refused(inputs, tmp_path):
    tensors, settings = read_folder(inputs / "bert")
    folder = write_folder(tmp_path / "odd", tensors, settings | {"pad_token_id": 10**5})
    raises_one_line(bert.load, folder, match="pad_token_id 100000 leaves no words or no positions")


# ---------------------------------------------------------------------------------------------------
# bert: save(), and the files that everything else is written with
# ---------------------------------------------------------------------------------------------------


def test_save_writes_extra_settings_into_the_config(model, tmp_path):
    bert.save(tmp_path, model.config, {}, "ForSequenceClassification", id2label={"0": "no", "1": "yes"})
    settings = bert.read_json(tmp_path / "config.json")
    assert settings["id2label"] == {"0": "no", "1": "yes"}
    assert settings["architectures"] == [f"{model.config.model_type.title()}ForSequenceClassification"]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_on_a_full_disk_save_leaves_the_old_files(inputs, tmp_path):
    """For a moment files may have at most 10,000 bytes: the config fits, the weights do not."""
    model = bert.load(inputs / "bert")
    bert.save(tmp_path, model.config, model.state_dict(), "ForMaskedLM")
    before = contents(tmp_path)
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        match = "too large: .*model.safetensors"
        raises_one_line(bert.save, tmp_path, model.config, doubled, "ForOther", match=match)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert contents(tmp_path) == before


def test_save_into_a_file_is_an_error_that_names_it(model, tmp_path):
    (tmp_path / "taken").touch()
    raises_one_line(bert.save, tmp_path / "taken", model.config, {}, "ForMaskedLM", match="exists: .*taken")


def test_an_atomic_write_appears_when_it_is_complete(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"old")
    with bert.atomic_write(file) as stream:
        stream.write(b"new")
        assert file.read_bytes() == b"old"
    assert contents(tmp_path) == {"x": b"new"}


def test_an_atomic_write_that_is_interrupted_leaves_no_trace(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        with bert.atomic_write(file) as stream:
            stream.write(b"half of the ne")
            raise KeyboardInterrupt
    assert contents(tmp_path) == {"x": b"old"}


@pytest.mark.parametrize("content, match", [
    (b"", "x.json: not readable as JSON"),
    (b'{"a": ', "x.json: not readable as JSON"),
    (b"\xff\xfe{\0}\0", "x.json: not readable as JSON"),
    (b"[" * 100_000, "x.json: not readable as JSON"),
    (b"[1]", "x.json: expected a JSON object, not a list"),
])
def test_read_json_refuses_all_but_objects(tmp_path, content, match):
    (tmp_path / "x.json").write_bytes(content)
    raises_one_line(bert.read_json, tmp_path / "x.json", match=match)


def test_read_json_ignores_a_byte_order_mark(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}')
    assert bert.read_json(tmp_path / "x.json") == {"a": "ä"}


# safetensors, beside the library of that name.


def tensors_of_all_kinds():
    tensors = {}
    for dtype in bert.SAFETENSORS_DTYPES.values():
        for shape in ((), (0,), (3, 0, 2), (5,), (3, 7)):
            tensors[f"{dtype} of shape {shape}"] = torch.randint(0, 2, shape).to(dtype)
    return tensors


def test_the_library_reads_what_is_written_here(tmp_path):
    from safetensors.torch import load_file

    tensors = tensors_of_all_kinds()
    bert.write_safetensors(tmp_path / "x", tensors)
    assert_equal(load_file(tmp_path / "x"), tensors)


def test_what_the_library_writes_is_read_here(tmp_path):
    from safetensors.torch import save_file

    tensors = tensors_of_all_kinds()
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    assert_equal(bert.read_safetensors(tmp_path / "x"), tensors)


def test_transposed_tensors_and_parameters_are_written_as_they_look(tmp_path):
    from safetensors.torch import load_file

    tensors = {"transposed": torch.arange(6.0).view(2, 3).T, "parameter": nn.Parameter(torch.ones(2))}
    bert.write_safetensors(tmp_path / "x", tensors)
    assert_equal(load_file(tmp_path / "x"), tensors)


def test_writing_to_a_loaded_tensor_never_reaches_the_file(tmp_path):
    bert.write_safetensors(tmp_path / "x", {"a": torch.ones(5)})
    before = (tmp_path / "x").read_bytes()
    bert.read_safetensors(tmp_path / "x")["a"] += 1
    assert (tmp_path / "x").read_bytes() == before


# TensorFlow's small change: checksums, numbers, snappy. The right values come from their specifications.


@pytest.mark.parametrize("content, crc", [
    (b"123456789", 0xE3069283),  # the check value of every catalogue of checksums
    (bytes(32), 0x8A9136AA),  # these three stand in RFC 3720, B.4
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
])
def test_checksums_are_crc32c_rotated_by_15_bits_plus_a_constant(content, crc):
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    assert bert.masked_crc32c(content) == (rotated + 0xA282EAD8) % 2**32


def read_varint(content):
    return bert.read_varint(io.BytesIO(content))


def test_a_varint_has_seven_bits_a_byte_the_low_ones_first():
    assert read_varint(b"\x00") == 0
    assert read_varint(b"\x7f") == 127
    assert read_varint(b"\x80\x01") == 128
    assert read_varint(b"\xac\x02") == 300
    assert read_varint(b"\xff" * 9 + b"\x01") == 2**64 - 1


def test_a_varint_without_end_is_refused():
    raises_one_line(read_varint, b"\xac", match="cut short")
    raises_one_line(read_varint, b"\x80" * 10 + b"\x01", match="more than ten bytes")


def test_snappy_copies_may_overlap_themselves():
    literal = b"\x05\x04ab"  # five bytes; the first two are "ab"
    assert bert.decompress_snappy(literal + b"\x0a\x02\0") == b"ababa"  # 3 from 2 back, distance in two bytes
    assert bert.decompress_snappy(literal + b"\x0b\x02\0\0\0") == b"ababa"  # distance in four bytes
    assert bert.decompress_snappy(b"\x06\x04ab\x01\x02") == b"ababab"  # 4 from 2 back, distance in one byte


@pytest.mark.parametrize("length, tag", [
    (60, b"\xec"),  # up to 60 the length stands in the tag: 4 * 59
    (61, b"\xf0\x3c"),  # then the next byte holds the length less one
    (256, b"\xf0\xff"),
    (257, b"\xf4\x00\x01"),
    (65_537, b"\xf8\x00\x00\x01"),
])
def test_snappy_literals_of_all_sizes_are_read(length, tag):
    content = bytes(number % 251 for number in range(length))
    assert bert.decompress_snappy(fuzz.write_varint(length) + tag + content) == content


def test_load_reads_what_save_writes(model, tmp_path):
    bert.save(tmp_path / "new" / "folder", model.config, model.state_dict(), "ForMaskedLM")
    found = bert.load(tmp_path / "new" / "folder")
    assert_equal(found.state_dict(), model.state_dict())
    assert found.config == model.config


def test_a_loaded_model_does_not_depend_on_its_file_any_more(model, tmp_path):
    bert.save(tmp_path, model.config, model.state_dict(), "ForMaskedLM")
    loaded = bert.load(tmp_path)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as stream:  # the same file, written over
        stream.write(bytes(size))
    assert_equal(loaded.state_dict(), model.state_dict())


def test_dropout_is_a_tenth_if_config_json_does_not_say(model, tmp_path):
    bert.save(tmp_path, model.config, model.state_dict(), "ForMaskedLM")
    settings = bert.read_json(tmp_path / "config.json")
    del settings["hidden_dropout_prob"], settings["attention_probs_dropout_prob"]
    write(tmp_path / "config.json", settings)
    config = bert.load(tmp_path).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)


@pytest.mark.parametrize("is_tied", [True, False])
@torch.no_grad()
def test_transformers_opens_what_save_writes_with_equal_logits(model, tmp_path, is_tied):
    import transformers

    family = model.config.model_type
    if not is_tied:
        model = bert.Model(replace(model.config, tie_word_embeddings=False)).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape)
    bert.save(tmp_path, model.config, model.state_dict(), "ForMaskedLM")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == f"{family.title()}ForMaskedLM"

    input_ids, attention_mask = padded_batch(family, vocab_size=20)
    expected = theirs(input_ids, attention_mask=attention_mask.long()).logits
    found = model.mlm_logits(model(input_ids, attention_mask)[-1])
    assert_close(found[attention_mask], expected[attention_mask])
