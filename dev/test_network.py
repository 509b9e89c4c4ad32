"""The network in corners: what an attention mask may hold, fresh weights, heads that are added or removed, dropout.

    python -m pytest dev/test_network.py
"""


import math

import pytest
import torch
from torch import nn

import bert
from test_tamt import assert_close, padded_batch


@torch.no_grad()
def test_bert_ignores_the_ids_of_padding():
    """RoBERTa does not: it finds its positions by the pad token."""
    model = bert.Model(bert.Config(vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                   intermediate_size=64, max_position_embeddings=64)).eval()
    input_ids, attention_mask = padded_batch("bert", vocab_size=20)
    other_ids = input_ids.masked_fill(~attention_mask, 7)

    found = model(other_ids, attention_mask)[-1]
    assert torch.equal(found[attention_mask], model(input_ids, attention_mask)[-1][attention_mask])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@torch.no_grad()
def test_an_attention_mask_may_hold_ones_and_zeros(model, dtype):
    input_ids, attention_mask = padded_batch(model.config.model_type, vocab_size=20)
    expected = model(input_ids, attention_mask)[-1]
    assert torch.equal(model(input_ids, attention_mask.to(dtype))[-1], expected)


@pytest.fixture(params=["bert", "roberta"])
def fresh_parameters(request):
    """{name: parameter} of a model that was not read from a file."""
    config = bert.Config(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=128, max_position_embeddings=64, model_type=request.param,
                         pad_token_id=1 if request.param == "roberta" else 0)
    return dict(bert.Model(config).named_parameters())


def test_fresh_matrices_are_normal_with_mean_0_and_deviation_0_02(fresh_parameters):
    """Within five standard errors. Moments of the standard normal distribution: x^2 has mean 1 and variance 2, x^4 has
    mean 3 and variance 105 - 9."""
    for name, parameter in fresh_parameters.items():
        if parameter.ndim == 2:
            values = parameter.double() / 0.02
            size = values.numel() ** 0.5
            assert abs(values.mean()) < 5 / size, name
            assert abs(values.square().mean() - 1) < 5 * 2**0.5 / size, name
            assert abs(values.pow(4).mean() - 3) < 5 * 96**0.5 / size, name


def test_fresh_layer_norm_scales_are_1_and_all_biases_0(fresh_parameters):
    for name, parameter in fresh_parameters.items():
        if parameter.ndim == 1:
            is_scale = name.lower().endswith(("layernorm.weight", "layer_norm.weight"))
            assert (parameter == (1 if is_scale else 0)).all(), name


@pytest.mark.parametrize("seed, is_same", [(4, True), (5, False)])
def test_a_head_that_is_added_later_depends_on_the_seed(model, seed, is_same):
    torch.manual_seed(4)
    model.add_classifier(3)
    first = next(model.classifier.parameters())
    torch.manual_seed(seed)
    model.add_classifier(3)
    assert torch.equal(first, next(model.classifier.parameters())) == is_same


def test_a_new_head_inherits_train_or_eval_mode(model):
    model.eval().add_classifier(3)
    assert not model.classifier.training
    model.train().add_classifier(3)
    assert model.classifier.training


@torch.no_grad()
def test_removing_a_head_equals_zeroing_its_output(inputs):
    """A structured ticket removes heads: the layer counts them from its query matrix."""
    input_ids, attention_mask = padded_batch("bert", vocab_size=20)
    silenced = bert.load(inputs / "bert")
    removed = bert.load(inputs / "bert")
    silenced.bert.encoder.layer[0].attention.output.dense.weight[:, 24:] = 0  # 4 heads of 8 columns

    attention = removed.bert.encoder.layer[0].attention
    for linear in (attention.self.query, attention.self.key, attention.self.value):
        linear.weight = nn.Parameter(linear.weight[:24])
        linear.bias = nn.Parameter(linear.bias[:24])
    attention.output.dense.weight = nn.Parameter(attention.output.dense.weight[:, :24])

    assert_close(removed(input_ids, attention_mask)[-1], silenced(input_ids, attention_mask)[-1])


@torch.no_grad()
def test_dropout_acts_in_training_only(model):
    input_ids, _ = padded_batch(model.config.model_type, vocab_size=20)
    assert torch.equal(model(input_ids)[-1], model(input_ids)[-1])
    model.train()
    assert not torch.equal(model(input_ids)[-1], model(input_ids)[-1])


def assert_mean_is(draws, expected):
    draws = torch.stack(draws).detach()
    standard_error = draws.std(dim=0).max() / len(draws) ** 0.5
    assert (draws.mean(dim=0) - expected).abs().max() < 6 * standard_error
    assert not torch.equal(draws[0], draws[1])


def test_dropout_of_hidden_states_keeps_their_expected_value(inputs):
    """What survives is scaled up."""
    dropout = bert.load(inputs / "bert").train().bert.encoder.layer[0].attention.output.dropout
    states = torch.randn(6, 32)
    assert_mean_is([dropout(states) for _ in range(2000)], states)


def test_dropout_of_attention_keeps_the_expected_value_of_the_context_vectors(inputs):
    attention = bert.load(inputs / "bert").bert.encoder.layer[0].attention.self
    states = torch.randn(1, 6, 32)
    expected = attention(states, None)
    attention.train()
    assert_mean_is([attention(states, None) for _ in range(2000)], expected)


def test_max_tokens_is_the_number_of_positions_that_tokens_can_have(inputs):
    assert bert.load(inputs / "bert").config.max_tokens == 64  # all 64 rows of the table
    assert bert.load(inputs / "roberta").config.max_tokens == 64  # of 66: nothing is at 0, and only padding at 1


def test_more_tokens_than_positions_are_an_error(model):
    assert model(torch.full((1, 64), 5))[-1].shape == (1, 64, 32)
    with pytest.raises(ValueError, match="65 tokens, but the model has 64 positions"):
        model(torch.full((1, 65), 5))


def test_bert_counts_positions_from_0(inputs):
    model = bert.load(inputs / "bert")
    input_ids = torch.tensor([[2, 7, 8, 3, 0, 0]])  # [CLS] two words [SEP] [PAD] [PAD]
    assert model.backbone.embeddings.position_ids(input_ids).tolist() == [0, 1, 2, 3, 4, 5]


def test_roberta_counts_positions_from_2_and_gives_padding_position_1(inputs):
    """The positions depend on the padding of each row."""
    model = bert.load(inputs / "roberta")
    input_ids = torch.tensor([[0, 7, 8, 2, 1, 1]])  # <s> two letters </s> <pad> <pad>
    assert model.backbone.embeddings.position_ids(input_ids).tolist() == [[2, 3, 4, 5, 1, 1]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_the_softmax_of_scaled_products_times_the_values(inputs, padded, training):
    """Both in evaluation, which calls torch's function, and in training on a CPU, here with next to no dropout."""
    layer = bert.load(inputs / "bert").backbone.encoder.layer[0].attention.self.train(training)
    layer.dropout_prob = 1e-9
    x = torch.randn(5, 16, 32)
    key_mask = (torch.arange(16) < 11).expand(5, 1, 1, 16) if padded else None
    query, key, value = (layer.split_heads(linear(x)) for linear in (layer.query, layer.key, layer.value))
    products = query @ key.transpose(2, 3) / math.sqrt(layer.head_size)
    if padded:
        products[..., 11:] = -math.inf
    expected = (products.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    assert_close(layer(x, key_mask), expected)
