"""Mask files of this program and of others, to which models they fit, and exported folders.

    python -m pytest dev/test_masks.py
"""

import itertools
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

import bert
import data
import tamt
from helpers import ids_of
from test_tamt import (
    assert_close,
    finetune_settings,
    mask_settings,
    new_training,
    num_entries,
    num_pruned,
    ordinary_ids,
    same_masks,
    tiny,
)


def test_a_mask_file_can_be_read_with_torch_load_and_unpackbits_alone(tmp_path, masks):
    tamt.save_mask(tmp_path / "mask.pt", masks, {"seed": 3})
    content = torch.load(tmp_path / "mask.pt", weights_only=True)
    assert content["format"] == 1 and content["meta"] == {"seed": 3}
    for name, mask in masks.items():
        assert content["shapes"][name] == list(mask.shape)
        bits = np.unpackbits(content["bits"][name].numpy(), count=mask.numel())
        assert np.array_equal(bits, mask.flatten().numpy())


@pytest.mark.parametrize("shape", [[1, 1], [3, 5], [8, 8], [1, 17]])
def test_unpacking_gives_back_what_was_packed(shape):
    mask = torch.rand(shape) < 0.5
    assert torch.equal(tamt.unpack(tamt.pack(mask), shape), mask)


def test_the_first_bit_is_the_highest_of_its_byte():
    assert tamt.pack(torch.tensor([True, False, False])).tolist() == [0b1000_0000]


@pytest.mark.parametrize("spelling", [
    lambda masks: masks,
    lambda masks: {f"{name}_mask": mask for name, mask in masks.items()},
    lambda masks: {f"module.{name}": mask for name, mask in masks.items()},
    lambda masks: {name: mask.to(torch.uint8) for name, mask in masks.items()},
    lambda masks: {name: mask.float() for name, mask in masks.items()},
    lambda masks: {"state_dict": masks},
], ids=["weight", "weight_mask", "module.", "uint8", "float", "state_dict"])
def test_masks_of_the_released_code_are_read(tmp_path, masks, spelling):
    torch.save(spelling(masks), tmp_path / "theirs.pt")
    assert same_masks(tamt.load_mask(tmp_path / "theirs.pt"), masks)


def test_a_state_dict_that_torch_has_pruned_is_a_mask(tmp_path, model):
    layers = tamt.maskable_layers(model)
    for layer in layers.values():
        prune.l1_unstructured(layer, "weight", amount=0.5)
    masks = {name: layer.weight_mask.bool() for name, layer in layers.items()}
    pruned = {}
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            pruned[f"{name.removesuffix('weight')}{key}"] = tensor
    torch.save(pruned, tmp_path / "pruned.pt")
    assert same_masks(tamt.load_mask(tmp_path / "pruned.pt"), masks)


def test_a_mask_whose_names_lack_bert_or_roberta_in_front_is_read(masked_layers, masks):
    bare = {name.split(".", 1)[1]: mask for name, mask in masks.items()}
    assert same_masks(tamt.fit_masks(masked_layers, bare, "file"), masks)


@pytest.fixture
def encoder_masks(masks):
    """Masks without pooler and word embeddings."""
    return {name: mask for name, mask in masks.items() if ".encoder." in name}


def test_a_mask_may_lack_pooler_and_word_embeddings(masked_layers, encoder_masks):
    assert same_masks(tamt.fit_masks(masked_layers, encoder_masks, "file"), encoder_masks)


def test_a_model_may_lack_the_pooler_and_word_embeddings_of_a_mask(masked_layers, masks, encoder_masks):
    encoder_layers = {name: layer for name, layer in masked_layers.items() if ".encoder." in name}
    assert same_masks(tamt.fit_masks(encoder_layers, masks, "file"), encoder_masks)


def test_a_matrix_without_a_mask_becomes_dense_again(masked_layers, masks, encoder_masks):
    tamt.set_masks(masked_layers, masks)
    tamt.set_masks(masked_layers, encoder_masks)
    for name, layer in masked_layers.items():
        assert bool(layer.mask.all()) == (name not in encoder_masks)


def test_a_mask_has_similarity_1_with_itself_even_if_it_keeps_nothing():
    for mask in (torch.tensor([True, False]), torch.tensor([False, False])):
        assert tamt.similarity({"x": mask}, {"x": mask}) == 1


def test_only_masks_of_the_same_matrices_have_a_similarity():
    mask = torch.tensor([True, False])
    with pytest.raises(ValueError, match="masks of different models or scopes"):
        tamt.similarity({"x": mask, "y": mask}, {"x": mask})


def test_the_report_counts_what_is_pruned(model, masks):
    report = tamt.sparsity_report(model, masks)
    assert (report["pruned"], report["entries"]) == (num_pruned(masks), num_entries(masks))


def test_the_report_gives_the_sparsity_of_each_matrix(model, masks):
    report = tamt.sparsity_report(model, masks)
    assert report["matrices"] == {name: int((~mask).sum()) / mask.numel() for name, mask in masks.items()}


@pytest.fixture(params=itertools.product(["bert", "roberta"], ["local", "2:4"]), ids="-".join)
def exported(request, inputs, tmp_path):
    """A masked model, and the folder that --export has made of it."""
    family, rank = request.param
    tamt.find_mask(mask_settings(inputs, tmp_path / "run", family, method="omp", rank=rank, export=tmp_path / "export"))
    model = bert.load(inputs / family)
    tamt.set_masks(tamt.install_masked_layers(model), tamt.load_mask(tmp_path / "run"))
    return model, tmp_path / "export"


@torch.no_grad()
def test_transformers_loads_an_export_with_equal_logits(exported):
    from transformers import AutoModelForMaskedLM

    model, folder = exported
    theirs, notes = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not notes["missing_keys"]
    input_ids = ordinary_ids(model)
    assert_close(theirs(input_ids).logits, model.mlm_logits(model(input_ids)[-1]))


def test_the_manuals_lines_put_a_mask_on_a_network_of_transformers(inputs, tmp_path):
    """Its hidden states are those of the exported subnetwork, and training leaves what is pruned at zero."""
    from transformers import AutoModelForMaskedLM

    tamt.find_mask(mask_settings(inputs, tmp_path / "run", method="omp", export=tmp_path / "export"))
    masks = tamt.load_mask(tmp_path / "run")
    manual = (Path(tamt.__file__).parent / "dev/MANUAL.md").read_text()
    code = textwrap.dedent(manual[manual.index("    import tamt\n    from torch.nn.utils"):].partition("\n\n## ")[0])
    code = code.replace("my-mask/mask.pt", str(tmp_path / "run/mask.pt")).replace("my-bert", str(inputs / "bert"))
    names = {}
    exec(code, names)
    model = names["model"].eval()

    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "export").eval()
    input_ids = ordinary_ids(bert.load(inputs / "bert"))
    hidden_states = model.bert(input_ids).last_hidden_state
    assert_close(hidden_states, theirs.bert(input_ids).last_hidden_state)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    hidden_states.square().sum().backward()
    optimizer.step()
    model.bert(input_ids)  # torch's prune multiplies by the mask in the forward pass
    for name, mask in masks.items():
        if "pooler" not in name:
            assert torch.equal(model.get_submodule(name.removesuffix(".weight")).weight != 0, mask)


@torch.no_grad()
def test_an_export_loads_here_with_equal_logits(exported):
    model, folder = exported
    again = bert.load(folder)
    input_ids = ordinary_ids(model)
    assert torch.equal(again.mlm_logits(again(input_ids)[-1]), model.mlm_logits(model(input_ids)[-1]))


def test_the_tokenizer_of_an_export_gives_the_ids_of_the_model_here_and_in_transformers(exported, inputs):
    from transformers import AutoTokenizer

    model, folder = exported
    text = "The cat sees a BIG red house ."
    expected = ids_of(text, data.vocabulary(inputs / model.config.model_type))
    assert ids_of(text, data.vocabulary(folder)) == expected
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"][1:-1] == expected


def test_the_folder_of_a_run_stands_for_its_mask(tmp_path, masks):
    tamt.save_mask(tmp_path / "mask.pt", masks, {})
    assert same_masks(tamt.load_mask(tmp_path), masks)


def test_the_sparsity_of_the_masked_set_is_the_share_of_its_entries_that_are_pruned(model, masks):
    assert tamt.sparsity_report(model, masks)["masked_set"] == num_pruned(masks) / num_entries(masks)


def test_the_sparsity_of_the_encoder_leaves_out_word_embeddings_and_pooler(model, masks):
    encoder = {name: mask for name, mask in masks.items() if ".encoder." in name}
    assert tamt.sparsity_report(model, masks)["encoder"] == num_pruned(encoder) / num_entries(encoder)


def test_the_sparsity_of_the_whole_model_counts_all_its_weights_but_the_head(model, masks):
    num_weights = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert tamt.sparsity_report(model, masks)["whole_model"] == num_pruned(masks) / num_weights


def test_a_mask_file_gives_back_what_was_saved(tmp_path, masks):
    tamt.save_mask(tmp_path / "mask.pt", masks, {"model": "x", "seed": 3})
    found, meta = tamt.read_mask(tmp_path / "mask.pt")
    assert same_masks(found, masks)
    assert meta == {"model": "x", "seed": 3}


NOTE = "this mask was found for other weights"


def says_that_weights_differ(inputs, out, capsys, **changes):
    """Whether opening a training says that its mask belongs to other weights."""
    capsys.readouterr()
    new_training(finetune_settings(inputs, out, **changes))
    return NOTE in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["kd", "mlm"])
def test_a_mask_used_for_other_weights_of_the_same_shapes_is_noted(inputs, tmp_path, capsys, objective):
    """Other heads do not matter. The mask of `inputs`, which no run has made, does not say which weights it is for."""
    other = tiny(tmp_path / "other", seed=1)
    tamt.find_mask(mask_settings(inputs, tmp_path / "mask", objective=objective, steps=2))
    mask = str(tmp_path / "mask" / "mask.pt")
    assert not says_that_weights_differ(inputs, tmp_path / "a", capsys, mask=mask)
    assert says_that_weights_differ(inputs, tmp_path / "b", capsys, mask=mask, model=str(other))
    assert not says_that_weights_differ(inputs, tmp_path / "c", capsys, model=str(other))


def test_evaluating_a_mask_with_other_weights_is_noted(inputs, tmp_path, capsys):
    other = tiny(tmp_path / "other", seed=1)
    tamt.find_mask(mask_settings(inputs, tmp_path / "mask", method="omp"))
    for model, is_noted in ((inputs / "bert", False), (other, True)):
        capsys.readouterr()
        export = tmp_path / "export" / model.name
        tamt.main(["--mask", str(tmp_path / "mask"), "--model", str(model), "--export", str(export)])
        assert (NOTE in capsys.readouterr().out) == is_noted


def test_a_layer_without_a_mask_keeps_everything_on_the_device_where_its_weight_lies_now(inputs):
    """The model is moved after its layers were masked: a mask that was left behind would not fit its weight. The device
    "meta" plays the GPU."""
    model = bert.load(inputs / "bert")
    layers = tamt.install_masked_layers(model)
    model.to("meta")
    tamt.set_masks(layers, {})
    for layer in layers.values():
        assert layer.weight.device.type == layer.mask.device.type == "meta"


@pytest.mark.parametrize("lines", [False, True])
def test_evaluating_a_mask_gives_the_dev_losses_that_its_file_holds(inputs, tmp_path, capsys, lines):
    """With the model, the text and the rows of its run, if nothing else is asked for."""
    tamt.find_mask(mask_settings(inputs, tmp_path / "mask", lines=lines, steps=2))
    _, meta = tamt.read_mask(tmp_path / "mask")
    found = tamt.evaluate_mask(tamt.Settings(evaluate=True, mask=tmp_path / "mask"))
    assert found["dev_mlm_loss"] == pytest.approx(meta["dev_mlm_loss"], rel=1e-6)
    assert found["dev_kd_loss"] == pytest.approx(meta["dev_kd_loss"], rel=1e-6)
    assert f"the held-out text of {inputs / 'text.txt'}, 16 tokens a row" in capsys.readouterr().out


def test_evaluating_a_mask_with_another_text_and_rows_as_asked(inputs, tmp_path):
    (tmp_path / "other.txt").write_text("the dog sees a cat .\n" * 100)
    tamt.find_mask(mask_settings(inputs, tmp_path / "mask", method="omp"))
    asked = {"evaluate": True, "data": str(tmp_path / "other.txt"), "seq_len": 12}
    of_mask = tamt.evaluate_mask(tamt.Settings(mask=tmp_path / "mask", **asked))
    expected = tamt.evaluate_mask(tamt.Settings(mask=tmp_path / "mask", model=str(inputs / "bert"), **asked))
    assert of_mask["dev_kd_loss"] == expected["dev_kd_loss"]
    _, meta = tamt.read_mask(tmp_path / "mask")
    assert of_mask["dev_kd_loss"] != pytest.approx(meta["dev_kd_loss"], rel=1e-3)


def test_the_next_command_names_the_model_if_the_mask_does_not(inputs, tmp_path, model, masks, capsys):
    folder = model.config.model_type
    tamt.save_mask(tmp_path / "mask.pt", masks, {})
    tamt.evaluate_mask(mask_settings(inputs, folder=folder, evaluate=True, mask=tmp_path / "mask.pt"))
    assert capsys.readouterr().out.endswith(f"--mask {tmp_path / 'mask.pt'} --model {inputs / folder}\n")
