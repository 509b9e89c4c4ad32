"""Several tasks with one backbone: reports, exports, and --resume.

    python -m pytest dev/test_several_tasks.py
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bert
import finetune
import tamt
from helpers import stop_fine_tuning_at, transformers_logits, updates_made, weight_bytes
from test_tamt import assert_close, dense_settings, finetune_settings, new_training, write


def test_several_tasks_report_their_metrics_under_their_names(tasks, tmp_path, two_masks):
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path, task="rte,stsb", mask=two_masks))
    assert list(result["best"]) == ["rte_accuracy", "stsb_pearson", "stsb_spearman"]


@pytest.mark.parametrize("name", ["keys", "train", "a.b"])
def test_a_task_that_shares_an_encoder_may_have_any_name(tasks, tmp_path, name):
    """Also one that a module of torch has for itself."""
    mood = json.loads((tasks / "mood.json").read_text())
    for split in ("train", "dev", "test"):
        mood[split] = str(tasks / mood[split])
    write(tmp_path / "own.json", mood | {"name": name})
    result = finetune.fine_tune(dense_settings(tasks, tmp_path, task=f"rte,{tmp_path / 'own.json'}"))
    assert f"{name}_f1" in result["best"]


def test_two_tasks_of_one_name_do_not_share_an_encoder(tasks, tmp_path):
    """Their examples and metrics would go under one name."""
    mood = json.loads((tasks / "mood.json").read_text())
    for split in ("train", "dev", "test"):
        mood[split] = str(tasks / mood[split])
    write(tmp_path / "other.tsv", ["the cat\tglad", "the dog\tsad"] * 8)
    write(tmp_path / "first.json", mood)
    write(tmp_path / "second.json", mood | {"train": str(tmp_path / "other.tsv")})
    with pytest.raises(ValueError, match="tasks that share a backbone are different ones"):
        dense_settings(tasks, tmp_path, task=f"{tmp_path / 'first.json'},{tmp_path / 'second.json'}")


@pytest.fixture
def exported_tasks(tasks, tmp_path, two_masks):
    """The training of two tasks after training and export."""
    settings = finetune_settings(tasks, tmp_path, task="rte,stsb", mask=two_masks, export=tmp_path / "x")
    training = new_training(settings)
    finetune.train(training)
    finetune.finish(training)
    return training


def test_the_exports_of_several_tasks_are_masked_each_by_its_ticket(exported_tasks):
    for encoded_task in exported_tasks.encoded_tasks:
        tensors = bert.read_safetensors(exported_tasks.run.export / encoded_task.task.name / "model.safetensors")
        masks = exported_tasks.task_switch.parts[encoded_task.task.name].masks
        for name, mask in masks.items():
            assert torch.equal(tensors[name], exported_tasks.model.get_parameter(name).data * mask)


@pytest.mark.parametrize("tickets", ["two_masks", "two_super_tickets"])
def test_transformers_loads_the_exports_of_several_tasks_with_equal_logits(tasks, tmp_path, request, tickets):
    masks = request.getfixturevalue(tickets)
    settings = finetune_settings(tasks, tmp_path, task="rte,stsb", mask=masks, export=tmp_path / "x")
    training = new_training(settings)
    finetune.train(training)
    finetune.finish(training)
    for encoded_task in training.encoded_tasks:
        sequences = encoded_task.train_sequences[:8]
        folder = tmp_path / "x" / encoded_task.task.name
        theirs, _ = transformers_logits(folder, encoded_task, sequences, training.model.config)
        ours = np.stack(finetune.predict_logits(training, encoded_task.task, sequences))
        assert_close(torch.from_numpy(ours), theirs)


@pytest.mark.parametrize("tickets", ["two_masks", "two_super_tickets"])
def test_several_tasks_resume_bit_for_bit(tasks, tmp_path, monkeypatch, request, tickets):
    values = {"task": "rte,stsb", "mask": request.getfixturevalue(tickets), "results": None}
    expected = finetune.fine_tune(finetune_settings(tasks, tmp_path / "a", export=tmp_path / "a/x", **values))
    values["export"] = tmp_path / "b/x"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_fine_tuning_at(patch, 6)
        finetune.fine_tune(finetune_settings(tasks, tmp_path / "b", **values))
    numbers = updates_made(monkeypatch)
    resumed = finetune.fine_tune(finetune_settings(tasks, tmp_path / "b", resume=True, **values))
    assert numbers[0] == 6  # it does not start over
    assert resumed["evaluations"] == expected["evaluations"]
    for task in ("rte", "stsb"):
        assert weight_bytes(tmp_path / "b/x" / task) == weight_bytes(tmp_path / "a/x" / task)


def test_a_task_head_gets_gradients_only_from_its_own_task(tasks, tmp_path, two_masks):
    training = new_training(finetune_settings(tasks, tmp_path, task="rte,stsb", mask=two_masks))
    rte = training.encoded_tasks[0]
    finetune.batch_loss(training, rte, np.arange(8)).backward()
    parts = training.task_switch.parts
    assert parts["rte"].task_head.weight.grad is not None
    assert parts["stsb"].task_head.weight.grad is None


def test_a_shared_weight_gets_gradients_only_from_the_tasks_that_keep_it(tasks, tmp_path, two_masks):
    training = new_training(finetune_settings(tasks, tmp_path, task="rte,stsb", mask=two_masks))
    for encoded_task in training.encoded_tasks:
        training.model.zero_grad()
        finetune.batch_loss(training, encoded_task, np.arange(8)).backward()
        for name, mask in training.task_switch.parts[encoded_task.task.name].masks.items():
            gradient = training.model.get_parameter(name).grad
            assert not gradient[~mask].any()
            assert gradient[mask].any()


def train_in_plain_torch(training, backpropagate) -> float:
    """Trains the network as the released code does -> the largest norm of its gradients. backpropagate(encoded_task,
    sequences, targets) leaves gradients in the model. The order of the examples and the seeds of dropout are shared
    with finetune; clipping, the schedule and the optimizer are not."""
    model = training.model
    run = training.run
    batches = []
    for epoch in range(run.epochs):
        batches += finetune.epoch_batches(training.encoded_tasks, run, epoch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)  # fused, so that bits are equal
    norms = []
    model.train()
    for step, (encoded_task, rows) in enumerate(batches):
        tamt.seed_dropout(run.seed, step)
        sequences = [encoded_task.train_sequences[row] for row in rows]
        backpropagate(encoded_task, sequences, torch.from_numpy(encoded_task.train_targets[rows]))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        # The AdamW of transformers 2.10 adds eps before the bias correction, and torch's after it.
        eps = 1e-8 / math.sqrt(1 - 0.999 ** (step + 1))
        optimizer.param_groups[0].update({"lr": run.lr * (1 - step / len(batches)), "eps": eps})
        optimizer.step()
        optimizer.zero_grad()
    return max(norms)


def test_with_two_tasks_a_shared_weight_gets_gradients_only_from_those_whose_mask_keeps_it(tasks, tmp_path, two_masks):
    """The plain loop multiplies the weights by a task's mask before its batch, restores them afterwards, and sets the
    gradients of what the mask prunes to zero. By AdamW's momentum such a weight may still move."""
    ours = new_training(finetune_settings(tasks, tmp_path / "ours", task="rte,stsb", mask=two_masks))
    theirs = new_training(dense_settings(tasks, tmp_path / "theirs", task="rte,stsb"))
    parameters = dict(theirs.model.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    masks = {name: tamt.load_mask(file) for name, file in zip(["rte", "stsb"], two_masks.split(","), strict=True)}

    def backpropagate(encoded_task, sequences, targets):
        masks_of_task = masks[encoded_task.task.name]
        whole = {name: parameters[name].data.clone() for name in masks_of_task}
        for name, mask in masks_of_task.items():
            parameters[name].data.mul_(mask)
        finetune.select_task(theirs, encoded_task.task)
        logits = finetune.task_logits(theirs, encoded_task.task, sequences)
        is_rte = encoded_task.task.name == "rte"
        loss = F.cross_entropy(logits, targets) if is_rte else F.mse_loss(logits[:, 0], targets)
        loss.backward()
        for name, mask in masks_of_task.items():
            parameters[name].data.copy_(whole[name])
            parameters[name].grad.mul_(mask)

    finetune.train(ours)
    train_in_plain_torch(theirs, backpropagate)
    for name, parameter in parameters.items():
        assert not torch.equal(parameter, start[name]), name
        assert_close(ours.model.get_parameter(name), parameter, 1e-6)
