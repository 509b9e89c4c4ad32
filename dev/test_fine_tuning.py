"""Fine-tunings: what is evaluated and written, exports and predictions, and the options --weights and --limit.

    python -m pytest dev/test_fine_tuning.py
"""

import functools
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bert
import finetune
import glue_squad
import tamt
from helpers import lines_of_results, logits_of_export, stop_fine_tuning_at, updates_made, weight_bytes
from test_tamt import assert_close, dense_settings, finetune_settings, new_training, num_entries, num_pruned


def test_fine_tune_returns_what_result_json_holds(tasks, tmp_path):
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path))
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())


def test_each_run_adds_a_line_to_the_results(tasks, tmp_path):
    """A line leaves out the evaluations on the way; result.json has them."""
    file = tmp_path / "results.jsonl"
    first = finetune.fine_tune(finetune_settings(tasks, tmp_path / "first", seed=1, results=file))
    second = finetune.fine_tune(finetune_settings(tasks, tmp_path / "second", seed=2, results=file))
    del first["evaluations"], second["evaluations"]
    assert lines_of_results(tmp_path) == [first, second]


@pytest.fixture
def result(tasks, tmp_path):
    """The result of a short run on rte."""
    return finetune.fine_tune(finetune_settings(tasks, tmp_path))


def test_a_result_counts_its_updates(result):
    assert result["steps"] == 8  # two epochs of 32 examples in batches of 8


def test_a_result_says_how_its_mask_was_made(result):
    assert result["mask"]["method"] == "omp"

HISTORY = [{"step": 1, "accuracy": 0.6, "f1": 0.9},
           {"step": 2, "accuracy": 0.8, "f1": 0.1},
           {"step": 3, "accuracy": 0.7, "f1": 0.5}]


def training_on_mrpc():
    mrpc = SimpleNamespace(task=glue_squad.MRPC, metric_prefix="")
    return SimpleNamespace(encoded_tasks=[mrpc], history=HISTORY)


def test_best_is_the_evaluation_with_the_highest_primary_metric():
    best, _ = finetune.best_and_final(training_on_mrpc())
    assert best == HISTORY[1]  # the whole line: f1 is not the best one, but that of the same step


def test_final_is_the_last_evaluation():
    _, final = finetune.best_and_final(training_on_mrpc())
    assert final == HISTORY[2]


def test_under_bf16_the_task_head_computes_in_fp32(tasks, tmp_path):
    """A bf16 number has three digits: too few to order the predictions of STS-B."""
    training = new_training(finetune_settings(tasks, tmp_path, task="stsb", device="cpu", dtype="bf16"))
    encoded_task = training.encoded_tasks[0]
    with torch.no_grad():
        logits = finetune.task_logits(training, encoded_task.task, encoded_task.train_sequences[:8])
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_evaluations_come_every_few_updates_and_at_the_end_of_each_epoch(tasks, tmp_path):
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path, eval_every=3))
    assert [line["step"] for line in result["evaluations"]] == [3, 4, 6, 8]


def test_a_loss_that_overflows_is_an_error(tasks, tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (inf|nan) .* at update \d+: try a lower --lr "):
        finetune.fine_tune(finetune_settings(tasks, tmp_path, "stsb", lr=1e9))


@pytest.fixture(scope="session")
def finished(tasks, tmp_path_factory):
    """finished("squad", "bert") -> the training of a finished run, with predictions and an export."""

    @functools.cache
    def run(name, family):
        out = tmp_path_factory.mktemp("finished")
        task = str(tasks / "mood.json") if name == "mood" else name
        training = new_training(finetune_settings(
            tasks, out, task=task, mask=str(tasks / f"{family}.pt"), predict=True, export=out / "export"))
        finetune.train(training)
        finetune.finish(training)
        return training

    return run

RUNS = [("rte", "bert"), ("mood", "bert"), ("stsb", "roberta"), ("squad", "bert"), ("squad", "roberta")]
all_runs = pytest.mark.parametrize("name, family", RUNS)
squad_runs = pytest.mark.parametrize("name, family", [run for run in RUNS if run[0] == "squad"])
glue_runs = pytest.mark.parametrize("name, family", [run for run in RUNS if run[0] != "squad"])


def result_of(training):
    return json.loads((training.run.out / "result.json").read_text())


@all_runs
def test_a_result_holds_the_metrics_of_its_task(finished, name, family):
    training = finished(name, family)
    metrics = list(training.encoded_tasks[0].task.metrics)
    result = result_of(training)
    assert list(result["best"]) == list(result["final"]) == metrics


@all_runs
def test_a_result_names_the_settings_and_the_versions_that_repeat_it(finished, name, family):
    result = result_of(finished(name, family))
    assert (result["settings"]["task"], result["settings"]["lr"], result["seed"]) == (result["task"], 1e-3, 1)
    assert result["versions"]["torch"] == torch.__version__


@all_runs
@torch.no_grad()
def test_transformers_loads_the_export_with_equal_logits(finished, name, family):
    training = finished(name, family)
    encoded_task = training.encoded_tasks[0]
    ours = finetune.task_logits(training, encoded_task.task, encoded_task.train_sequences[:8])
    theirs, attention_mask = logits_of_export(training, encoded_task.train_sequences[:8])
    if name == "squad":  # in the padding ours are -10,000
        ours, theirs = ours[attention_mask], theirs[attention_mask]
    assert_close(ours, theirs)


@glue_runs
def test_the_exported_tokenizer_gives_the_ids_of_training(finished, name, family):
    transformers = pytest.importorskip("transformers")
    training = finished(name, family)
    encoded_task = training.encoded_tasks[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(training.run.export)
    for example, (input_ids, _) in zip(encoded_task.examples["train"][:8], encoded_task.train_sequences, strict=False):
        encoded = tokenizer(example.text_a, example.text_b, truncation=True, max_length=48)
        assert encoded["input_ids"] == list(input_ids)


@glue_runs
def test_the_predictions_in_the_file_are_those_of_the_export_in_transformers(finished, name, family):
    training = finished(name, family)
    encoded_task = training.encoded_tasks[0]
    task = encoded_task.task
    sequences = glue_squad.encode(encoded_task.examples["test"], training.inputs.vocabulary, training.run.max_len)
    logits, _ = logits_of_export(training, sequences)
    if name == "stsb":
        expected = [f"{value:.3f}" for value in logits[:, 0].tolist()]
    else:
        expected = [task.labels[index] for index in logits.argmax(dim=1).tolist()]
    header, *rows = (training.run.out / f"{task.folder}.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert rows == [f"{index}\t{word}" for index, word in enumerate(expected)]


@squad_runs
def test_the_answers_in_the_file_score_what_the_run_reports(finished, name, family):
    training = finished(name, family)
    answers = json.loads((training.run.out / "predictions.json").read_text())
    scores = glue_squad.squad_scores(answers, training.encoded_tasks[0].examples["dev"])
    assert scores == pytest.approx(result_of(training)["final"])


@pytest.mark.parametrize("task", ["rte", "squad"])
def test_a_resumed_run_ends_bit_for_bit_like_one_without_interruption(tasks, tmp_path, monkeypatch, task):
    expected = finetune.fine_tune(finetune_settings(tasks, tmp_path / "a", task, export=tmp_path / "a/x"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_fine_tuning_at(patch, 6)
        finetune.fine_tune(finetune_settings(tasks, tmp_path / "b", task, export=tmp_path / "b/x"))

    numbers = updates_made(monkeypatch)
    resumed = finetune.fine_tune(finetune_settings(tasks, tmp_path / "b", task, export=tmp_path / "b/x", resume=True))
    assert numbers[0] == 6  # it does not start over
    for each in (expected, resumed):
        del each["seconds"]
    assert resumed == expected
    assert weight_bytes(tmp_path / "b/x") == weight_bytes(tmp_path / "a/x")


def matrices(tasks, out, weights):
    """{name: matrix} of the network at the start of a run with --weights."""
    model = new_training(dense_settings(tasks, out, weights=weights)).model
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.ndim == 2}


def test_the_option_weights_shuffled_permutes_each_matrix_of_encoder_and_pooler(tasks, tmp_path):
    pretrained, shuffled = (matrices(tasks, tmp_path / kind, kind) for kind in ("pretrained", "shuffled"))
    names = [name for name in tamt.load_mask(tasks / "bert.pt") if "embeddings" not in name]
    assert len(names) == 2 * 6 + 1
    for name in names:
        assert not torch.equal(shuffled[name], pretrained[name])
        assert torch.equal(shuffled[name].flatten().sort().values, pretrained[name].flatten().sort().values)


def test_the_option_weights_random_draws_each_matrix_as_berts_initialisation_does(tasks, tmp_path):
    for name, matrix in matrices(tasks, tmp_path, "random").items():
        values = matrix / 0.02
        standard_error = values.numel() ** -0.5
        assert abs(values.mean()) < 5 * standard_error, name
        assert abs(values.square().mean() - 1) < 5 * 2**0.5 * standard_error, name


def test_the_option_weights_random_resets_biases_and_layer_norms(tasks, tmp_path):
    model = new_training(dense_settings(tasks, tmp_path, weights="random")).model
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if name.endswith("LayerNorm.weight") else 0)).all(), name


def test_with_the_same_seed_the_task_head_is_the_same_whatever_the_weights(tasks, tmp_path):
    heads = []
    for kind in ("pretrained", "shuffled", "random"):
        training = new_training(dense_settings(tasks, tmp_path / kind, weights=kind))
        heads.append(training.model.classifier.weight)
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


def test_shuffled_and_random_weights_start_at_zero_where_the_mask_prunes(tasks, tmp_path):
    for kind in ("shuffled", "random"):
        training = new_training(finetune_settings(tasks, tmp_path / kind, weights=kind))
        for name, mask in training.masks.items():
            assert torch.equal(training.model.get_parameter(name) != 0, mask)


def limited_data(tasks, out, task, **changes):
    """[(input_ids, target)] of the training examples of a task, under --limit and other settings."""
    settings = dense_settings(tasks, out / str(changes), task=task, max_len=24, **changes)
    encoded_task = new_training(settings).encoded_tasks[0]
    return [(tuple(input_ids), tuple(np.ravel(target)))
            for (input_ids, _), target in zip(encoded_task.train_sequences, encoded_task.train_targets, strict=True)]


@pytest.mark.parametrize("task", ["rte", "squad"])
def test_limit_keeps_that_many_training_examples_each_with_its_target(tasks, tmp_path, task):
    nine = limited_data(tasks, tmp_path, task, limit=9)
    assert len(nine) == 9
    assert set(nine) <= set(limited_data(tasks, tmp_path, task))


@pytest.mark.parametrize("task", ["rte", "squad"])
def test_limit_draws_by_the_seed_alone(tasks, tmp_path, task):
    nine = limited_data(tasks, tmp_path, task, limit=9)
    assert nine == limited_data(tasks, tmp_path, task, limit=9, epochs=3)
    assert nine != limited_data(tasks, tmp_path, task, limit=9, seed=2)


def test_for_squad_limit_is_a_number_of_windows(tasks, tmp_path):
    encoded_task = new_training(dense_settings(tasks, tmp_path, task="squad", max_len=24)).encoded_tasks[0]
    num_questions = len(encoded_task.examples["train"])
    assert num_questions == 24 < len(encoded_task.train_sequences)  # a long paragraph gives several windows
    settings = dense_settings(tasks, tmp_path / "30", task="squad", max_len=24, limit=30)
    assert len(new_training(settings).encoded_tasks[0].train_sequences) == 30


def test_a_checkpoint_without_pooler_gets_a_fresh_one_that_is_dense(tasks, tmp_path, capsys):
    model = bert.load(tasks / "bert")
    tensors = {name: tensor for name, tensor in model.named_parameters() if "pooler" not in name}
    shutil.copytree(tasks / "bert", tmp_path / "bert")
    bert.save(tmp_path / "bert", model.config, tensors, "ForMaskedLM")
    training = new_training(finetune_settings(tasks, tmp_path, model=str(tmp_path / "bert")))
    assert "no pooler: a fresh one is trained, dense" in capsys.readouterr().out
    assert training.model.has_pooler
    assert not any("pooler" in name for name in training.masks)


def test_each_epoch_of_fine_tuning_has_its_own_order(tasks, tmp_path):
    training = new_training(dense_settings(tasks, tmp_path))
    orders = []
    for epoch in (0, 1, 0):
        batches = finetune.epoch_batches(training.encoded_tasks, training.run, epoch)
        orders.append(np.concatenate([indices for _, indices in batches]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(32))
    assert orders[0] == orders[2] != orders[1]


def test_a_result_says_how_much_its_mask_removes(tasks, tmp_path):
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path))
    mask = tamt.load_mask(tasks / "bert.pt")
    assert result["sparsity"] == num_pruned(mask) / num_entries(mask)


def test_the_loss_of_classes_is_the_mean_negative_log_probability_of_the_right_ones():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    loss = finetune.task_loss(glue_squad.TASKS["mnli"], probabilities.log(), torch.tensor([0, 2]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(8)) / 2)


def test_the_loss_of_numbers_is_the_mean_squared_error():
    loss = finetune.task_loss(glue_squad.TASKS["stsb"], torch.tensor([[1.0], [5.0]]), torch.tensor([3.0, 4.0]))
    assert loss.item() == (2**2 + 1**2) / 2


def test_the_loss_of_an_answer_is_the_mean_of_the_losses_of_its_first_and_its_last_position():
    starts = torch.tensor([0.5, 0.25, 0.25])
    ends = torch.tensor([0.125, 0.125, 0.75])
    logits = torch.stack([starts, ends], dim=-1).log()[None]  # (1, 3, 2): one sequence of three tokens
    loss = finetune.task_loss(glue_squad.TASKS["squad"], logits, torch.tensor([[0, 1]]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(8)) / 2)


def test_a_slow_run_says_between_its_evaluations_how_far_it_is(tasks, tmp_path, capsys, monkeypatch):
    """Here each update counts as slow."""
    monkeypatch.setattr(tamt, "SHOW_SECONDS", -1)
    finetune.fine_tune(finetune_settings(tasks, tmp_path, epochs=1, limit=24))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [re.sub(r"\d+:\d\d", "M:SS", line) for line in lines[:2]] == ["step 1/3  ETA M:SS", "step 2/3  ETA M:SS"]
    assert len(lines) == 3 and "accuracy" in lines[2]
