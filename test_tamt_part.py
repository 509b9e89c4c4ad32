"""The promises of tamt.py, in its order. Models and text are made at run time: two layers, 32 wide."""

import ast
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

import bert
import data
import finetune
import glue_squad
import tamt

ROOT = Path(__file__).parent
RELEASED = ROOT.parent / "shared" / "data"  # real weights, and what the released code made of them
WORDS = "the a cat dog bird house tree sees likes finds big small red old new and runs sits here".split()

# ---------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------


def run(main, *argv):
    """Calls a program as its command line does -> exit status."""
    try:
        tamt.run_command(lambda: main([str(word) for word in argv]))
    except SystemExit as end:
        return end.code
    return 0


def tiny(folder, family="bert", seed=0, **sizes):
    """An ordinary model folder: two layers, 32 wide; BERT knows words, RoBERTa letters."""
    torch.manual_seed(seed)
    letters = sorted(set("".join(WORDS)))
    values = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if family == "bert":
        continuations = [f"##{letter}" for letter in letters]
        tokens = [*data.WORDPIECE_SPECIALS, ".", *WORDS, *letters, *continuations]
        values["max_position_embeddings"] = 64
    else:
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, ".", "Ġ", "<mask>"]
        values |= {"model_type": "roberta", "max_position_embeddings": 66, "type_vocab_size": 1,
                   "pad_token_id": 1, "layer_norm_eps": 1e-5}
    tokens = list(dict.fromkeys(tokens))

    model = bert.Model(bert.Config(**{"vocab_size": len(tokens)} | values | sizes))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05  # no zeros, no ones: every tensor matters
    bert.save(folder, model.config, dict(model.named_parameters()), "ForMaskedLM")
    if family == "bert":
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    else:
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny model of each family, one without dropout, and a text with some order in it."""
    folder = tmp_path_factory.mktemp("world")
    os.environ["TAMT_CACHE"] = str(folder / "cache")
    generator = random.Random(0)
    lines = []
    for _ in range(900):
        words = ["the", generator.choice(WORDS[6:9]), *generator.sample(WORDS[:-1], 5)]  # nothing is "here"
        lines.append(" ".join(words) + " .\n")
    (folder / "text.txt").write_text("".join(lines))
    tiny(folder / "bert")
    tiny(folder / "roberta", "roberta")
    tiny(folder / "no-dropout", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return folder


@pytest.fixture(params=["bert", "roberta"])
def model(request, world):
    return bert.load(world / request.param)


def settings(world, out=None, family="bert", **changes):
    """Settings of a short run; changes: objective="kd", steps=30 and so on."""
    values = {"model": str(world / family), "data": str(world / "text.txt"), "steps": 12, "lr": 2e-3,
              "seq_len": 16, "batch_size": 8, "log_every": 4, "eval_every": 100, "save_every": 5, "out": out,
              "device": "cpu"}
    return tamt.Settings(**values | changes)


def shell(world, out, *more):
    """The same from the command line, without the learning rate -> exit status."""
    return run(tamt.main, "--model", world / "bert", "--data", world / "text.txt", "--steps", 12, "--seq-len", 16,
               "--batch-size", 8, "--log-every", 4, "--eval-every", 100, "--save-every", 5, "--out", out, *more)


def begin(settings):
    """A run of tamt as it stands before its first update."""
    machine = tamt.start_machine("cpu")
    model, vocabulary = tamt.open_model(settings, machine)
    run = tamt.resolve(settings, machine, model)
    rows = tamt.open_text(run, vocabulary, "train")
    layers = tamt.mask_model(model, run.scope)
    masks = tamt.start_masks(layers, run)
    tamt.set_masks(layers, masks)
    without_gradient = tamt.entries_without_gradient(layers, run, vocabulary, rows)
    scores = tamt.Scores(layers, masks, run.sparsity, run.rank, without_gradient)
    model.train()
    return tamt.Training(run, {}, model, vocabulary, layers, scores, rows, None)


def watch_updates(monkeypatch, look):
    """Calls look(layers, step) after every update of a run, when the masks are those of the next one."""
    write_line = tamt.Log.step

    def look_and_write_line(log, step, *arguments):
        look(log.layers, step)
        write_line(log, step, *arguments)

    monkeypatch.setattr(tamt.Log, "step", look_and_write_line)


def stop_after_update(monkeypatch, number):
    """Ctrl-C after an update, once."""

    def look(layers, step):
        if step == number:
            monkeypatch.undo()
            raise KeyboardInterrupt

    watch_updates(monkeypatch, look)


def num_pruned(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


def num_entries(masks):
    return sum(mask.numel() for mask in masks.values())


def masks_of(layers):
    return {name: layer.mask.clone() for name, layer in layers.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def num_different(a, b):
    return sum(int((a[name] ^ b[name]).sum()) for name in a)


def is_within(a, b):
    """Whether all that mask a keeps is kept in b."""
    return not any((a[name] & ~b[name]).any() for name in a)


def refuses(capsys, words, main, *argv):
    """The program ends with exit status 2 and one line on stderr, in which the words occur in this order."""
    capsys.readouterr()
    status = run(main, *argv)
    line = capsys.readouterr().err.strip()
    assert status == 2
    assert line.startswith("error: ") and "\n" not in line
    assert re.search(words, line), line


# ---------------------------------------------------------------------------------------------------
# 1. Masked layers
# ---------------------------------------------------------------------------------------------------


def test_the_masked_set_is_word_embeddings_six_matrices_a_layer_and_the_pooler(model):
    family = model.config.model_type
    names = list(tamt.maskable_layers(model))
    in_layer = [name.removeprefix(f"{family}.encoder.layer.1.") for name in names if ".layer.1." in name]
    assert in_layer == ["attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight",
                        "attention.output.dense.weight", "intermediate.dense.weight", "output.dense.weight"]
    assert len(names) == 2 * 6 + 2
    assert names[0] == f"{family}.embeddings.word_embeddings.weight"
    assert names[-1] == f"{family}.pooler.dense.weight"
    assert list(tamt.maskable_layers(model, "encoder")) == names[1:]


def test_straight_through_gives_scores_the_gradient_of_the_mask(model):
    """Eq. 4. The oracle lets autograd differentiate W * M with respect to a real-valued M."""
    input_ids = torch.randint(6, model.config.vocab_size - 1, (4, 20))
    pretrained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    dense_states = [states.detach() for states in model(input_ids)]

    layers = tamt.mask_model(model.requires_grad_(False))
    start = tamt.magnitude_masks(layers, 0.6, "local")
    tamt.Scores(layers, start, 0.6, "local", {})
    loss = toy_loss(model, model(input_ids), dense_states, input_ids)
    loss.backward()

    oracle = bert.Model(model.config)
    oracle.load_state_dict(pretrained)
    oracle.eval()
    real_masks = {name: mask.float().requires_grad_() for name, mask in start.items()}
    products = {name: pretrained[name] * mask for name, mask in real_masks.items()}
    states = torch.func.functional_call(oracle, products, input_ids)
    oracle_loss = toy_loss(oracle, states, dense_states, input_ids)
    oracle_loss.backward()

    assert loss.item() == pytest.approx(oracle_loss.item(), abs=1e-6)
    for name, layer in layers.items():
        if "pooler" in name:
            assert layer.scores.grad is None  # neither loss reads it
        else:
            expected = real_masks[name].grad
            assert (layer.scores.grad - expected).norm() <= 1e-5 * expected.norm(), name


def toy_loss(model, states, dense_states, input_ids):
    """Both losses; outside of functional_call the decoder is dense."""
    logits = model.mlm_logits(states[-1].flatten(0, 1))
    return tamt.mlm_loss(logits, input_ids.flatten()) + tamt.kd_loss(dense_states, states)


def test_the_mask_of_the_embeddings_leaves_the_tied_decoder_dense(model):
    input_ids = torch.randint(6, model.config.vocab_size - 1, (4, 20))
    states = model(input_ids)
    logits = model.mlm_logits(states[-1])
    layers = tamt.mask_model(model)
    tamt.set_masks(layers, tamt.magnitude_masks(layers, 0.9, "local"))
    assert torch.equal(model.mlm_logits(states[-1]), logits)
    assert not torch.equal(model(input_ids)[0], states[0])


def test_a_mask_that_keeps_everything_changes_nothing(model):
    input_ids = torch.randint(6, model.config.vocab_size - 1, (4, 20))
    dense = model(input_ids)
    layers = tamt.mask_model(model)
    tamt.set_masks(layers, tamt.magnitude_masks(layers, 0.0, "global"))
    for expected, found in zip(dense, model(input_ids), strict=True):
        assert torch.equal(expected, found)


# ---------------------------------------------------------------------------------------------------
# 2. The ranking
# ---------------------------------------------------------------------------------------------------


def brute_force(values, num_pruned):
    """Prunes the smallest values; of equal ones those that come last."""
    order = sorted(range(len(values)), key=lambda index: (values[index], -index))
    mask = [True] * len(values)
    for index in order[:num_pruned]:
        mask[index] = False
    return mask


def random_case(generator):
    """Few values, so most of them are tied; and a number to prune."""
    num_values = generator.randint(1, 60)
    values = [float(generator.randint(-3, 3)) for _ in range(num_values)]
    if generator.random() < 0.3:
        values = [generator.gauss(0, 1) for _ in range(num_values)]
    return torch.tensor(values), generator.randint(0, num_values)


def test_rank_gives_the_example_of_its_docstring():
    assert tamt.rank(torch.tensor([3.0, 1, 2, 2, 2]), 3).int().tolist() == [1, 0, 1, 0, 0]


def test_rank_is_brute_force_with_ties():
    generator = random.Random(0)
    for _ in range(300):
        values, count = random_case(generator)
        assert tamt.rank(values, count).tolist() == brute_force(values.tolist(), count)


def test_rank_near_equals_rank_whatever_the_guess():
    """The guess may lie anywhere, and the radius may be a millionth of what is needed."""
    generator = random.Random(1)
    for _ in range(300):
        values, count = random_case(generator)
        threshold = generator.uniform(-4, 4)
        radius = 10 ** generator.uniform(-6, 1)
        mask = torch.rand(len(values)) < 0.5  # whatever was there before
        new_threshold = tamt.rank_near(values, count, threshold, radius, mask)
        assert torch.equal(mask, tamt.rank(values, count))
        pruned = values[~mask]
        kept = values[mask]
        assert len(pruned) == 0 or pruned.max() <= new_threshold
        assert len(kept) == 0 or new_threshold <= kept.min()


def test_the_threshold_of_rank_near_separates_kept_from_pruned():
    generator = random.Random(2)
    mask = torch.zeros(1000, dtype=torch.bool)
    for _ in range(50):
        values = torch.randn(1000)
        count = generator.randint(0, 1000)
        threshold = tamt.rank_near(values, count, 0.0, 0.1, mask)
        assert torch.equal(values > threshold, mask)


def test_rank_near_works_in_pieces_and_without_scores_in_between():
    values = torch.cat([torch.zeros(300_000), torch.ones(300_000)])  # more than two pieces of numpy's cache
    mask = torch.empty(600_000, dtype=torch.bool)
    for count in (0, 1, 299_999, 300_000, 300_001, 600_000):
        tamt.rank_near(values, count, 0.5, 1e-3, mask)
        assert torch.equal(mask, tamt.rank(values, count))


@pytest.mark.parametrize("n,m", [(1, 2), (2, 4), (3, 4), (1, 8), (4, 8)])
def test_rank_groups_keeps_n_of_every_m_in_a_row_as_brute_force_does(n, m):
    torch.manual_seed(n)
    values = torch.randint(-2, 3, (30, 2 * m)).float()
    mask = tamt.rank_groups(values, n, m)
    for row, mask_row in zip(values.split(m, dim=1), mask.split(m, dim=1), strict=True):
        for group, mask_group in zip(row.tolist(), mask_row.tolist(), strict=True):
            assert mask_group == brute_force(group, m - n)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.7, 0.9, 0.999])
def test_make_masks_prunes_the_exact_count(model, sparsity):
    """round(N s) over everything, or round(n s) in each matrix; magnitudes and random draws alike."""
    layers = tamt.mask_model(model)
    local_masks = [tamt.magnitude_masks(layers, sparsity, "local"), tamt.random_masks(layers, sparsity, "local", 1)]
    for masks in local_masks:
        for mask in masks.values():
            assert int((~mask).sum()) == round(mask.numel() * sparsity)
    global_masks = [tamt.magnitude_masks(layers, sparsity, "global"), tamt.random_masks(layers, sparsity, "global", 1)]
    for masks in global_masks:
        assert num_pruned(masks) == round(num_entries(masks) * sparsity)


@pytest.mark.parametrize("rule", ["1:2", "2:4", "1:4", "4:8"])
def test_make_masks_keeps_n_of_m(model, rule):
    n, m = (int(number) for number in rule.split(":"))
    for mask in tamt.magnitude_masks(tamt.mask_model(model), 1 - n / m, rule).values():
        assert (mask.view(-1, m).sum(dim=1) == n).all()


def test_magnitude_masks_keep_the_largest_weights(model):
    layers = tamt.mask_model(model)
    for name, mask in tamt.magnitude_masks(layers, 0.6, "local").items():
        magnitudes = layers[name].weight.detach().abs()
        assert magnitudes[mask].min() >= magnitudes[~mask].max()


@pytest.mark.parametrize("rule", ["local", "global"])
def test_what_magnitude_pruning_pruned_stays_pruned(model, rule):
    """The levels of IMP are nested, even if a weight below the mask has grown since."""
    layers = tamt.mask_model(model)
    before = masks_of(layers)
    for level in tamt.imp_levels(0.65):
        masks = tamt.magnitude_masks(layers, level, rule)
        assert is_within(masks, before)
        tamt.set_masks(layers, masks)
        before = masks
        for layer in layers.values():
            layer.weight.data[~layer.mask] = 100.0


def test_levels_of_imp_are_tenths_and_then_the_rest():
    assert tamt.imp_levels(0.35) == [0.1, 0.2, 0.3, 0.35]
    assert tamt.imp_levels(0.3) == [0.1, 0.2, 0.3]
    assert tamt.imp_levels(0.05) == [0.05]


def test_random_masks_depend_on_the_seed_alone(model):
    layers = tamt.mask_model(model)
    first = tamt.random_masks(layers, 0.6, "local", 3)
    torch.manual_seed(99)
    assert equal(first, tamt.random_masks(layers, 0.6, "local", 3))
    assert not equal(first, tamt.random_masks(layers, 0.6, "local", 4))


# ---------------------------------------------------------------------------------------------------
# 3. Scores
# ---------------------------------------------------------------------------------------------------


def test_scores_start_at_two_phi_where_omp_keeps_and_at_zero_elsewhere(model):
    layers = tamt.mask_model(model)
    start = tamt.magnitude_masks(layers, 0.7, "local")
    scores = tamt.Scores(layers, start, 0.7, "local", {})
    assert equal(masks_of(layers), start)
    assert torch.equal(scores.vector, 0.02 * scores.mask)  # Eq. 5
    scores.update_masks()
    assert equal(masks_of(layers), start)
    for group in scores.groups:
        group.threshold = tamt.PHI
    scores.gate()
    assert equal(masks_of(layers), start)


def test_under_a_global_rank_the_start_is_exact_and_omp_but_for_rounding(model):
    layers = tamt.mask_model(model)
    start = tamt.magnitude_masks(layers, 0.7, "local")
    scores = tamt.Scores(layers, start, 0.7, "global", {})
    masks = masks_of(layers)
    assert num_pruned(masks) == round(num_entries(masks) * 0.7)
    assert num_different(masks, start) <= len(layers)
    assert torch.equal(scores.vector, 0.02 * scores.mask)


def test_scores_and_masks_of_a_layer_are_views_of_the_long_vectors(model):
    """What the optimiser writes into a layer is ranked, and what the ranking writes is multiplied with."""
    layers = tamt.mask_model(model)
    scores = tamt.Scores(layers, tamt.magnitude_masks(layers, 0.5, "local"), 0.5, "global", {})
    for layer in layers.values():
        layer.scores.data.normal_()
    scores.update_masks()
    learned = torch.cat([layer.scores.detach().flatten() for layer in layers.values()])
    mask = torch.cat([layer.mask.flatten() for layer in layers.values()])
    assert torch.equal(mask, tamt.rank(learned, round(len(learned) * 0.5)))


def test_entries_without_gradient_are_pooler_padding_and_words_that_kd_never_reads(world):
    training = begin(settings(world, objective="kd"))
    vocabulary = training.vocabulary
    without_gradient = tamt.entries_without_gradient(training.layers, training.run, vocabulary, training.rows)
    assert without_gradient["bert.pooler.dense.weight"].all()

    is_unread = without_gradient["bert.embeddings.word_embeddings.weight"].flatten()
    assert is_unread[vocabulary.pad_id]
    assert is_unread[vocabulary.tokenizer.token_to_id("here")]  # a word that the text does not contain
    assert not is_unread[vocabulary.tokenizer.token_to_id("the")]

    run = dataclasses.replace(training.run, objective="mlm")  # corruption may put any word anywhere
    is_unread = tamt.entries_without_gradient(training.layers, run, vocabulary, training.rows)[
        "bert.embeddings.word_embeddings.weight"]
    assert is_unread.sum() == 1 and is_unread[vocabulary.pad_id]


@pytest.mark.parametrize("objective", ["mlm", "kd"])
def test_pinned_entries_keep_their_start_mask_while_the_total_stays_exact(world, objective):
    training = begin(settings(world, objective=objective, steps=30, lr=1e-2))
    without_gradient = tamt.entries_without_gradient(training.layers, training.run, training.vocabulary,
                                                     training.rows)
    start = masks_of(training.layers)
    for step in range(30):
        tamt.update(training, tamt.next_batch(training), 1e-2, t=step + 1)
        training.step += 1
        training.scores.update_masks(radius=2e-2)
        masks = masks_of(training.layers)
        assert num_pruned(masks) == round(num_entries(masks) * 0.7)

    for name, is_pinned in without_gradient.items():
        assert not ((masks[name] ^ start[name]) & is_pinned).any()
    assert num_different(masks, start) > 100


def test_between_refreshes_the_threshold_stands_still_and_scores_above_it_are_kept(model):
    layers = tamt.mask_model(model)
    scores = tamt.Scores(layers, tamt.magnitude_masks(layers, 0.5, "local"), 0.5, "local", {})
    scores.vector.normal_()
    thresholds = [group.threshold for group in scores.groups]
    scores.gate()
    assert [group.threshold for group in scores.groups] == thresholds == [tamt.PHI] * len(layers)
    assert torch.equal(scores.mask, scores.vector > tamt.PHI)


# ---------------------------------------------------------------------------------------------------
# 4. Losses
# ---------------------------------------------------------------------------------------------------


def test_kd_loss_is_0_for_equal_states_and_2_for_opposite_ones():
    states = [torch.randn(2, 5, 8) for _ in range(3)]
    opposite = [-state for state in states]
    assert tamt.kd_loss(states, states).item() == pytest.approx(0, abs=1e-6)
    assert tamt.kd_loss(states, opposite).item() == pytest.approx(2, abs=1e-6)


def test_kd_loss_is_the_mean_over_tokens_and_layers_without_embeddings_and_padding():
    a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # (1, 2, 2): of two tokens ...
    b = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])  # ... the first is orthogonal, the second equal
    embedded = torch.randn(1, 2, 2)
    assert tamt.kd_loss([embedded, a], [-embedded, b]).item() == 0.5
    assert tamt.kd_loss([embedded, a, a], [-embedded, b, a]).item() == 0.25
    assert tamt.kd_loss([embedded, a], [-embedded, b], torch.tensor([[False, True]])).item() == 0.0
    assert tamt.kd_loss([embedded, a], [-embedded, b], torch.tensor([[True, False]])).item() == 1.0


def test_mlm_loss_is_the_mean_cross_entropy():
    logits = torch.randn(6, 10)
    labels = torch.randint(10, (6,))
    assert tamt.mlm_loss(logits, labels).item() == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    assert tamt.mlm_loss(logits[:0], labels[:0]).item() == 0.0  # a batch in which nothing was chosen


@pytest.mark.parametrize("objective", ["mlm", "kd", "mlm+kd"])
def test_micro_batches_add_up_to_the_loss_and_the_gradient_of_the_batch(world, objective):
    """Also if they hold different numbers of predictions and of padding."""
    gradients = []
    losses = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        training = begin(settings(world, family="no-dropout", objective=objective, batch_size=batch_size,
                                  accumulate=accumulate))
        batch = tamt.next_batch(training)
        batch.is_token[3, 9:] = False
        batch.is_chosen[3, 9:] = False
        losses.append(tamt.backward(training, batch))
        gradients.append([parameter.grad for parameter in training.parameters.values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_the_teacher_is_the_dense_model_without_a_copy(model):
    input_ids = torch.randint(6, model.config.vocab_size - 1, (4, 20))
    dense = model(input_ids)
    layers = tamt.mask_model(model)
    tamt.set_masks(layers, tamt.magnitude_masks(layers, 0.5, "local"))
    addresses = {name: layer.weight.data_ptr() for name, layer in layers.items()}
    model.train()
    with tamt.dense_teacher(model):
        teacher = model(input_ids)
    for expected, found in zip(dense, teacher, strict=True):
        assert torch.equal(expected, found) and not found.requires_grad
    assert addresses == {name: layer.weight.data_ptr() for name, layer in layers.items()}


def test_after_the_teacher_the_model_is_the_student_again(model):
    layers = tamt.mask_model(model)
    for is_training in (True, False):
        model.train(is_training)
        with tamt.dense_teacher(model):
            assert not model.training and all(layer.is_teacher for layer in layers.values())
        assert model.training == is_training and not any(layer.is_teacher for layer in layers.values())
        with pytest.raises(RuntimeError), tamt.dense_teacher(model):
            raise RuntimeError
        assert model.training == is_training and not any(layer.is_teacher for layer in layers.values())


def test_dev_losses_are_means_over_batches_on_one_fixed_corruption(world):
    training = begin(settings(world))
    rows = training.rows[:40]
    found = tamt.dev_losses(training.model, rows, training.vocabulary, training.run.machine)
    assert training.model.training

    training.model.eval()
    generator = np.random.default_rng(42)
    losses = []
    for start in (0, 16, 32):
        batch = tamt.make_batch(rows[start:start + 16], training.vocabulary, generator)
        states = training.model(torch.from_numpy(batch.corrupted_ids))
        is_chosen = torch.from_numpy(batch.is_chosen)
        logits = training.model.mlm_logits(states[-1])[is_chosen]
        losses.append(F.cross_entropy(logits, torch.from_numpy(batch.input_ids)[is_chosen]).item())
    assert found["dev_mlm_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_the_dense_model_has_no_distance_to_itself(world):
    training = begin(settings(world, sparsity=0.0))
    losses = tamt.dev_losses(training.model, training.rows[:32], training.vocabulary, training.run.machine)
    assert 0 <= losses["dev_kd_loss"] < 1e-6


# ---------------------------------------------------------------------------------------------------
# 5. Training
# ---------------------------------------------------------------------------------------------------


class ReleasedAdamW:
    """The AdamW of transformers 2.10 without decay, in plain torch operations."""

    def __init__(self):
        self.m = 0.0
        self.v = 0.0
        self.t = 0

    def step(self, x, gradient, learning_rate):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        rate = learning_rate * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        x -= rate * self.m / (self.v.sqrt() + 1e-8)


class ReleasedBertAdam:
    """The optimiser of TinyBERT's code: no bias correction, and decay along with the step."""

    def __init__(self):
        self.m = 0.0
        self.v = 0.0

    def step(self, x, gradient, learning_rate):
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        x -= learning_rate * (self.m / (self.v.sqrt() + 1e-6) + 0.01 * x)


RELEASED_OPTIMIZERS = {"mlm": ReleasedAdamW, "kd": ReleasedBertAdam}


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("objective", ["mlm", "kd"])
def test_optimizer_settings_make_torchs_adamw_the_released_optimizer(objective, dtype, tolerance):
    """Gradients of all sizes down to 1e-9, where the eps decides."""
    torch.manual_seed(0)
    x = torch.randn(200, dtype=dtype)
    expected = x.clone()
    parameter = torch.nn.Parameter(x.clone())
    optimizer = tamt.make_optimizer([parameter], torch.device("cpu"))
    released = RELEASED_OPTIMIZERS[objective]()
    sizes = 10.0 ** torch.linspace(-9, 1, 200, dtype=dtype)
    for t in range(1, 31):
        learning_rate = 1e-2 * (1 - t / 40)
        parameter.grad = torch.randn(200, dtype=dtype) * sizes
        released.step(expected, parameter.grad, learning_rate)
        optimizer.param_groups[0].update(tamt.optimizer_settings(objective, learning_rate, t))
        optimizer.step()
    assert (expected - x).abs().median() > 1e-3
    torch.testing.assert_close(parameter.detach(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("objective", ["mlm", "kd"])
def test_thirty_updates_equal_a_plain_loop_mask_for_mask(world, objective):
    """The golden test. The plain loop has real-valued masks that autograd differentiates, the released optimiser
    as written out above, and rank() over all scores; it shares the network, the losses and the batches only."""
    training = begin(settings(world, family="no-dropout", objective=objective, steps=30, lr=3e-3))
    vocabulary = training.vocabulary

    # The plain loop's own model, masks and scores.
    model = bert.load(world / "no-dropout").train()
    pretrained = {name: parameter.detach() for name, parameter in model.named_parameters()}
    head = []
    for name, parameter in model.named_parameters():
        trains = name.startswith("cls.") and objective == "mlm"
        parameter.requires_grad_(trains)
        if trains:
            head.append(parameter)
    masks = masks_of(training.layers)
    scores = {name: 0.02 * mask for name, mask in masks.items()}
    pins = {name: torch.zeros(mask.shape) for name, mask in masks.items()}  # infinite where no gradient comes
    is_unread = torch.zeros(vocabulary.size, dtype=torch.bool)
    if objective == "kd":
        is_unread = torch.from_numpy(~np.isin(np.arange(vocabulary.size), training.rows))
    is_unread[vocabulary.pad_id] = True
    for name, is_pinned in (("embeddings.word_embeddings", is_unread), ("pooler.dense", slice(None))):
        start = masks[f"bert.{name}.weight"]
        pins[f"bert.{name}.weight"][is_pinned] = torch.where(start, math.inf, -math.inf)[is_pinned]
    total = num_entries(masks)
    num_to_prune = round(total * 0.7)
    optimizers = {}

    flips = 0
    for step in range(30):
        learning_rate = 3e-3 * (1 - step / 30)
        batch = tamt.next_batch(training)
        loss = tamt.update(training, batch, learning_rate, t=step + 1)
        training.step += 1
        training.scores.update_masks(radius=2 * learning_rate)

        real_masks = {name: mask.float().requires_grad_() for name, mask in masks.items()}
        products = {name: pretrained[name] * mask for name, mask in real_masks.items()}
        if objective == "mlm":
            states = torch.func.functional_call(model, products, torch.from_numpy(batch.corrupted_ids))
            is_chosen = torch.from_numpy(batch.is_chosen)
            logits = model.mlm_logits(states[-1])[is_chosen]
            plain_loss = F.cross_entropy(logits, torch.from_numpy(batch.input_ids)[is_chosen])
        else:
            input_ids = torch.from_numpy(batch.input_ids)
            states = torch.func.functional_call(model, products, input_ids)
            with torch.no_grad():
                teacher = model(input_ids)
            cosines = [F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(teacher, states, strict=True)]
            plain_loss = 1 - sum(cosines[1:]) / 2
        plain_loss.backward()
        assert loss == pytest.approx(plain_loss.item(), abs=2e-6)

        trained = [(scores[name], mask.grad) for name, mask in real_masks.items() if mask.grad is not None]
        trained += [(parameter.data, parameter.grad) for parameter in head]
        norm = math.sqrt(sum(float(gradient.square().sum()) for _, gradient in trained))
        for number, (x, gradient) in enumerate(trained):
            optimizer = optimizers.setdefault(number, RELEASED_OPTIMIZERS[objective]())
            optimizer.step(x, gradient / max(norm, 1.0), learning_rate)
        for parameter in head:
            parameter.grad = None

        vector = torch.cat([(scores[name] + pins[name]).flatten() for name in masks])
        mask_pieces = tamt.rank(vector, num_to_prune).split([mask.numel() for mask in masks.values()])
        new_masks = {name: piece.view(masks[name].shape) for name, piece in zip(masks, mask_pieces, strict=True)}
        flips += num_different(masks, new_masks)
        masks = new_masks
        assert num_different(masks, masks_of(training.layers)) == 0, f"after update {step + 1}"
    assert flips > 0.01 * total


def test_the_pooler_has_no_gradient_so_it_is_not_trained(world):
    training = begin(settings(world))
    assert not any("pooler" in name for name in training.parameters)


def test_masked_lm_trains_scores_and_head_and_kd_scores_alone(world):
    for objective in ("mlm", "mlm+kd"):
        trained = begin(settings(world, objective=objective)).parameters
        others = {name for name in trained if not name.endswith(".scores")}
        assert others == {"cls.predictions.bias", "cls.predictions.transform.dense.weight",
                          "cls.predictions.transform.dense.bias", "cls.predictions.transform.LayerNorm.weight",
                          "cls.predictions.transform.LayerNorm.bias"}
    assert all(name.endswith(".scores") for name in begin(settings(world, objective="kd")).parameters)


@pytest.mark.parametrize("objective", ["mlm", "kd"])
def test_a_short_run_travels_as_far_as_the_papers_but_never_slower_or_above_a_hundredth(objective):
    """At 70 % the paper made 17,000 updates of a schedule of 27,920."""

    def travel(learning_rate, num_updates, horizon):
        distance = 0.0
        for t in range(1, num_updates + 1):
            step = learning_rate * (1 - (t - 1) / horizon)
            if objective == "kd":  # BertAdam's missing bias correction
                step *= (1 - 0.9**t) / math.sqrt(1 - 0.999**t)
            distance += step
        return distance

    paper_rate = {"mlm": 5e-5, "kd": 2e-5}[objective]
    for num_updates in (500, 3000, 10_000):
        rate = tamt.learning_rate_of(objective, 0.7, num_updates)
        assert travel(rate, num_updates, num_updates) == pytest.approx(travel(paper_rate, 17_000, 27_920))
    assert tamt.learning_rate_of(objective, 0.7, 3) == 1e-2
    assert tamt.learning_rate_of(objective, 0.7, 100_000) == paper_rate


def test_the_papers_updates_are_interpolated_between_its_sparsities():
    assert tamt.paper_updates(0.7) == 17_000
    assert tamt.paper_updates(0.75) == 18_500
    assert tamt.paper_updates(0.1) == 3000 and tamt.paper_updates(0.99) == 22_000


@pytest.mark.parametrize("objective,expected", [("mlm", [1000, 2000, 2500]), ("kd", [1, 999, 1999, 2500])])
def test_thresholds_move_when_the_released_code_moves_them(objective, expected):
    run = types.SimpleNamespace(objective=objective, refresh_every=1000, eval_every=10**6, save_every=10**6,
                                num_updates=2500)
    assert [step for step in range(1, 2501) if tamt.is_refresh_due(run, step)] == expected
    run.eval_every = 600
    run.save_every = 700
    found = [step for step in range(1, 2501) if tamt.is_refresh_due(run, step)]
    assert found == sorted({*expected, 600, 1200, 1800, 2400, 700, 1400, 2100})


def test_order_and_corruption_depend_on_seed_and_step_alone(world):
    training = begin(settings(world))
    batches = []
    for step in (3, 0, 3):
        training.step = step
        batches.append(tamt.next_batch(training))
    assert np.array_equal(batches[0].corrupted_ids, batches[2].corrupted_ids)
    assert not np.array_equal(batches[0].input_ids, batches[1].input_ids)
