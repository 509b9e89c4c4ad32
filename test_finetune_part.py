"""The promises of finetune.py, in its order. Models and tables are made at run time: two layers, 32 wide."""

import contextlib
import io
import json
import math
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook

import bert
import data
import finetune
import glue_squad
import tamt

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
    """A folder with a tiny model of each family."""
    folder = tmp_path_factory.mktemp("world")
    os.environ["TAMT_CACHE"] = str(folder / "cache")
    tiny(folder / "bert")
    tiny(folder / "roberta", "roberta")
    return folder


@pytest.fixture(scope="session")
def tasks(world):
    """A folder with small tables in GLUE's layout, a small SQuAD, an own task, and a mask of each model.

    The label of RTE and STS-B depends on how many words the two sentences share."""
    folder = world / "tasks"
    generator = random.Random(0)
    pairs = []
    for _ in range(48):
        pairs.append((" ".join(generator.sample(WORDS[:9], 4)), " ".join(generator.sample(WORDS[:9], 3))))

    for name, label_column in (("RTE", "label"), ("STS-B", "score")):
        rows = []
        for a, b in pairs:
            num_common = len(set(a.split()) & set(b.split()))
            label = num_common
            if name == "RTE":
                label = "entailment" if num_common >= 2 else "not_entailment"
            rows.append(f"{a}\t{b}\t{label}")
        header = f"sentence1\tsentence2\t{label_column}"
        write_lines(folder / name / "train.tsv", [header, *rows[:32]])
        write_lines(folder / name / "dev.tsv", [header, *rows[32:]])
        write_lines(folder / name / "test.tsv", [header, *rows])

    paragraphs = []
    for a, b in pairs[:24]:
        answer = {"text": "red tree", "answer_start": len(a) + 1}
        question = {"id": a + b, "question": "where", "answers": [answer]}
        paragraphs.append({"context": f"{a} red tree {b} " + "the dog runs " * 5, "qas": [question]})
    for split in ("train", "dev"):
        write_json(folder / "squad" / f"{split}-v1.1.json", {"data": [{"paragraphs": paragraphs}]})

    write_lines(folder / "mood.tsv", ["the big dog\tglad", "the small dog\tsad"] * 24)
    files = {"train": "mood.tsv", "dev": "mood.tsv", "test": "mood.tsv"}
    write_json(folder / "mood.json", {"name": "mood", "columns": [0], "label": 1, "labels": ["sad", "glad"],
                                      "metric": "f1", **files})

    for family in ("bert", "roberta"):
        layers = tamt.mask_model(bert.load(world / family))
        masks = tamt.magnitude_masks(layers, 0.6, "local")
        tamt.save_mask(folder / f"{family}.pt", masks, {"model": str(world / family), "method": "omp"})
    return folder


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_json(path, content):
    write_lines(path, [json.dumps(content)])


def settings(tasks, out, task="rte", **changes):
    """Settings of a short run of the tiny BERT's ticket; changes: mask=None, model=... and so on."""
    out.mkdir(parents=True, exist_ok=True)
    values = {"task": task, "mask": str(tasks / "bert.pt"), "data": tasks, "max_len": 48, "lr": 1e-3,
              "batch_size": 8, "epochs": 2, "out": out / "run", "results": out / "results.jsonl"}
    return finetune.Settings(**values | changes)


def dense(tasks, out, task="rte", **changes):
    """The same for the dense tiny BERT."""
    values = {"mask": None, "model": str(tasks.parent / "bert")} | changes
    return settings(tasks, out, task, **values)


def shell(tasks, out, task="rte", *more, mask="bert.pt"):
    """The same as settings(), from the command line -> exit status."""
    out.mkdir(parents=True, exist_ok=True)
    argv = ["--task", task, "--data", tasks, "--max-len", 48, "--lr", 1e-3, "--batch-size", 8, "--epochs", 2,
            "--out", out / "run", "--results", out / "results.jsonl"]
    if mask:
        argv += ["--mask", tasks / mask]
    return run(finetune.main, *argv, *more)


def opened(settings):
    """An experiment that is ready to train; its network in eval mode."""
    experiment = finetune.open_experiment(settings)
    experiment.model.eval()
    return experiment


def results(out):
    """The lines of a results file."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def stop_at_update(monkeypatch, number):
    """Ctrl-C in update `number` (from 1); the state is saved after every update before it."""
    task_loss = finetune.task_loss
    num_calls = 0

    def interrupted(*arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls == number:
            raise KeyboardInterrupt
        return task_loss(*arguments)

    monkeypatch.setattr(tamt, "SAVE_SECONDS", -1)
    monkeypatch.setattr(finetune, "task_loss", interrupted)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------
# 1. One experiment
# ---------------------------------------------------------------------------------------------------


def test_fine_tune_returns_what_result_json_holds(tasks, tmp_path):
    result = finetune.fine_tune(settings(tasks, tmp_path))
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["task"] == "rte"
    assert result["steps"] == 8  # two epochs of 32 examples in batches of 8
    assert result["mask"]["method"] == "omp"
    assert result["sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_a_run_adds_one_line_to_the_results(tasks, tmp_path):
    result = finetune.fine_tune(settings(tasks, tmp_path))
    result.pop("evaluations")
    assert results(tmp_path) == [result]


def test_python_and_the_command_line_are_one_program(tasks, tmp_path):
    result = finetune.fine_tune(settings(tasks, tmp_path / "python", results=None))
    assert shell(tasks, tmp_path / "shell") == 0
    line = results(tmp_path / "shell")[0]
    assert line["best"] == result["best"]
    assert line["settings"] == result["settings"]


# ---------------------------------------------------------------------------------------------------
# 2. Training under a fixed mask
# ---------------------------------------------------------------------------------------------------


def test_pruned_weights_are_exactly_zero_after_every_update(tasks, tmp_path):
    experiment = opened(settings(tasks, tmp_path, task="stsb"))
    num_nonzero = []

    def count(*_):
        pruned = [experiment.model.get_parameter(name)[~mask] for name, mask in experiment.masks.items()]
        num_nonzero.append(int(torch.cat(pruned).count_nonzero()))

    with contextlib.closing(register_hook(count)):
        finetune.train(experiment)
    assert len(experiment.masks) == 14  # word embeddings, six in each of two layers, the pooler
    assert num_nonzero == [0] * 8


def register_hook(function):
    handle = register_optimizer_step_post_hook(function)
    return SimpleNamespace(close=handle.remove)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_training_equals_torchs_pruning_bit_for_bit(tasks, tmp_path, family):
    values = {"task": "stsb", "epochs": 3, "model": str(tasks.parent / family)}
    ours = opened(settings(tasks, tmp_path / "ours", mask=str(tasks / f"{family}.pt"), **values))
    theirs = opened(settings(tasks, tmp_path / "theirs", mask=None, **values))
    finetune.train(ours)

    # The same in plain torch, as the released code does it.
    model = theirs.model
    for name, mask in ours.masks.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(module, "weight", mask)
        if "bias" in module._parameters:  # pruning put the weight last; norms depend on the order
            module._parameters["bias"] = module._parameters.pop("bias")

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    task_data = theirs.tasks[0]
    norms = []
    model.train()
    for step in range(12):
        rows = finetune.epoch_batches(theirs.tasks, theirs.run, epoch=step // 4)[step % 4][1]
        torch.manual_seed((1_000_003 + step) * 1021)  # seed 1
        logits = finetune.task_logits(model, task_data, [task_data.train[row] for row in rows])
        targets = torch.from_numpy(task_data.targets[rows])
        (((logits[:, 0] - targets) ** 2).sum() / len(rows)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 12)
        eps_of_transformers_2 = 1e-8 / math.sqrt(1 - 0.999 ** (step + 1))
        optimizer.param_groups[0]["eps"] = eps_of_transformers_2
        optimizer.step()
        optimizer.zero_grad()

    assert max(norms) > 1  # some gradients were clipped
    for name, parameter in ours.model.named_parameters():
        module, _, leaf = name.rpartition(".")
        pruned = getattr(model.get_submodule(module), leaf + "_orig", None)
        expected = getattr(model.get_submodule(module), leaf)
        if pruned is not None:
            expected = pruned.data * ours.masks[name]
        assert torch.equal(parameter.data, expected.data), name


def test_best_is_the_highest_in_the_first_metric_and_final_is_the_last():
    history = [{"step": 1, "accuracy": 0.6, "f1": 0.9},
               {"step": 2, "accuracy": 0.8, "f1": 0.1},
               {"step": 3, "accuracy": 0.7, "f1": 0.5}]
    mrpc = SimpleNamespace(task=glue_squad.MRPC, prefix="")
    best, final = finetune.best_and_final(SimpleNamespace(tasks=[mrpc], history=history))
    assert best == history[1]  # the whole line: f1 is not the best one, but that of the same step
    assert final == history[2]


def test_evaluations_come_every_few_updates_and_at_the_end_of_each_epoch(tasks, tmp_path):
    result = finetune.fine_tune(settings(tasks, tmp_path, eval_every=3))
    assert [line["step"] for line in result["evaluations"]] == [3, 4, 6, 8]


def test_a_loss_that_overflows_is_an_error(tasks, tmp_path, capsys):
    assert shell(tasks, tmp_path, "stsb", "--lr", 1e9) == 2
    assert "a lower --lr" in capsys.readouterr().err


# What a run leaves

RUNS = [("rte", "bert"), ("stsb", "roberta"), ("squad", "bert"), ("squad", "roberta"), ("mood", "bert")]


@pytest.fixture(scope="session", params=RUNS, ids="-".join)
def finished(request, tasks, tmp_path_factory):
    """A finished run with predictions and an export: its experiment, and what it printed."""
    name, family = request.param
    out = tmp_path_factory.mktemp("finished")
    task = str(tasks / "mood.json") if name == "mood" else name
    experiment = finetune.open_experiment(settings(
        tasks, out, task=task, mask=str(tasks / f"{family}.pt"), predict=True, export=out / "export"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        finetune.train(experiment)
        finetune.finish(experiment)
    return experiment, printed.getvalue()


def test_a_run_ends_with_lines_that_grep_reads(finished):
    experiment, printed = finished
    lines = printed.split("\n---\n")[1].splitlines()
    task = experiment.tasks[0].task
    metric = task.metrics[0]
    best = experiment.result["best"][metric]
    final = experiment.result["final"][metric]
    assert best >= final
    assert {f"task: {task.name}", f"best_{metric}: {best:.4f}", f"final_{metric}: {final:.4f}"} <= set(lines)


def test_a_result_holds_the_metrics_of_its_task_and_how_to_repeat_it(finished):
    experiment, _ = finished
    result = experiment.result
    task = experiment.tasks[0].task
    assert list(result["best"]) == list(result["final"]) == list(task.metrics)
    assert {"model", "mask", "seed", "best_step", "seconds", "command", "device", "versions"} <= result.keys()


def test_predictions_are_glues_table_or_squads_json(finished):
    experiment, _ = finished
    task = experiment.tasks[0].task
    if task.predicts == "span":
        predictions = json.loads((experiment.run.out / "predictions.json").read_text())
        scores = glue_squad.squad_scores(predictions, experiment.tasks[0].texts["dev"])
        assert scores == pytest.approx(experiment.result["final"])
        return

    header, *rows = (experiment.run.out / f"{task.folder}.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert len(rows) == 48
    for index, row in enumerate(rows):
        number, prediction = row.split("\t")
        assert number == str(index)
        assert prediction in task.labels if task.labels else math.isfinite(float(prediction))


def test_transformers_loads_the_export_with_equal_logits(finished):
    experiment, _ = finished
    model = experiment.model
    task_data = experiment.tasks[0]
    sequences = task_data.train[:8]
    with torch.no_grad():
        ours = finetune.task_logits(model, task_data, sequences)
        folder = experiment.run.export
        theirs, attention_mask = transformers_logits(folder, task_data, sequences, model.config)
    if task_data.task.predicts == "span":  # in the padding ours are -10,000
        ours = ours[attention_mask]
        theirs = theirs[attention_mask]
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-5)


def transformers_logits(folder, task_data, sequences, config):
    """The logits of an export in transformers, (B, C) or (B, T, 2), and the attention mask, (B, T)."""
    transformers = pytest.importorskip("transformers")
    batch = glue_squad.pad_batch(sequences, config.pad_token_id)
    input_ids, attention_mask, token_type_ids = (torch.from_numpy(array) for array in batch)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = token_type_ids
    if task_data.task.predicts == "span":
        output = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()(**inputs)
        return torch.stack([output.start_logits, output.end_logits], dim=-1), attention_mask.bool()
    output = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs)
    return output.logits, attention_mask.bool()


def test_the_exported_tokenizer_gives_the_ids_of_training(finished):
    experiment, _ = finished
    transformers = pytest.importorskip("transformers")
    task_data = experiment.tasks[0]
    if task_data.task.predicts == "span":
        pytest.skip("windows of paragraphs are ours")
    tokenizer = transformers.AutoTokenizer.from_pretrained(experiment.run.export)
    for example, (input_ids, _) in zip(task_data.texts["train"][:8], task_data.train, strict=False):
        encoded = tokenizer(example.text_a, example.text_b, truncation=True, max_length=48)
        assert encoded["input_ids"] == list(input_ids)


# The command line's --resume


@pytest.mark.parametrize("task", ["rte", "squad"])
def test_a_resumed_run_ends_bit_for_bit_like_one_without_interruption(tasks, tmp_path, monkeypatch, task):
    expected = finetune.fine_tune(settings(tasks, tmp_path / "a", task, export=tmp_path / "a/x"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_update(patch, 6)
        finetune.fine_tune(settings(tasks, tmp_path / "b", task, export=tmp_path / "b/x"))

    resumed = finetune.fine_tune(settings(tasks, tmp_path / "b", task, export=tmp_path / "b/x", resume=True))
    for each in (expected, resumed):
        del each["seconds"]
    assert resumed == expected
    assert weights(tmp_path / "b/x") == weights(tmp_path / "a/x")


def test_an_unfinished_run_is_neither_overwritten_nor_continued_with_other_settings(
        tasks, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at_update(patch, 6)
        assert shell(tasks, tmp_path) == 130
    capsys.readouterr()

    assert shell(tasks, tmp_path) == 2
    assert "unfinished at step 5: continue with --resume" in capsys.readouterr().err
    assert shell(tasks, tmp_path, "rte", "--resume", "--eval-every", 3) == 2
    assert "holds another run (eval_every 50 there, 3 here)" in capsys.readouterr().err


def test_resume_of_a_finished_run_changes_nothing(tasks, tmp_path):
    assert shell(tasks, tmp_path) == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert shell(tasks, tmp_path, "rte", "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


def test_a_finished_run_has_no_model_left_to_export(tasks, tmp_path, capsys):
    assert shell(tasks, tmp_path) == 0
    assert shell(tasks, tmp_path, "rte", "--resume", "--export", tmp_path / "x") == 2
    assert "--predict and --export need it again, without --resume" in capsys.readouterr().err


@pytest.fixture
def copy(tasks, tmp_path):
    """Copies of the model, the tables and the mask, to be changed."""
    shutil.copytree(tasks.parent / "bert", tmp_path / "bert")
    shutil.copytree(tasks, tmp_path / "tasks")
    return tmp_path


@pytest.mark.parametrize("change, name", [("text", "texts"), ("mask", "masks"), ("weights", "checkpoint")])
def test_resume_is_refused_after_its_input_has_changed(copy, monkeypatch, capsys, change, name):
    argv = (copy / "tasks", copy, "rte", "--model", copy / "bert")
    with monkeypatch.context() as patch:
        stop_at_update(patch, 6)
        assert shell(*argv) == 130
    if change == "text":
        table = copy / "tasks/RTE/train.tsv"
        table.write_text(table.read_text().replace("cat", "dog", 1))
    elif change == "mask":
        masks, meta = tamt.read_mask(copy / "tasks/bert.pt")
        masks["bert.encoder.layer.0.output.dense.weight"][3, 5] ^= True
        tamt.save_mask(copy / "tasks/bert.pt", masks, meta)
    else:
        tiny(copy / "bert", seed=1)
    capsys.readouterr()
    assert shell(*argv, "--resume") == 2
    assert f"holds another run ({name} " in capsys.readouterr().err


def test_a_run_is_the_same_under_another_spelling_of_its_paths(copy, monkeypatch):
    argv = ("--task", "rte", "--max-len", 48, "--batch-size", 8, "--epochs", 2,
            "--results", copy / "results.jsonl")
    monkeypatch.chdir(copy)
    with monkeypatch.context() as patch:
        stop_at_update(patch, 6)
        assert run(finetune.main, *argv, "--data", "tasks", "--mask", "tasks/bert.pt", "--model", "bert",
                   "--out", "run") == 130
    monkeypatch.chdir(copy / "tasks")
    assert run(finetune.main, *argv, "--data", copy / "tasks", "--mask", "bert.pt", "--model",
               "../tasks/../bert/", "--out", copy / "run", "--resume") == 0
    assert len(results(copy)) == 1


def test_runs_with_other_settings_get_other_folders_by_default(tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for epochs in (1, 2):
        finetune.fine_tune(finetune.Settings(task="rte", mask=str(tasks / "bert.pt"), data=tasks, max_len=48,
                                             epochs=epochs))
    assert len(list(tmp_path.glob("out/rte-tasks-s1-*/result.json"))) == 2


# The other settings


def test_weights_shuffled_permutes_each_matrix_and_random_draws_them(tasks, tmp_path):
    experiments = {}
    for kind in ("pretrained", "shuffled", "random"):
        experiments[kind] = opened(dense(tasks, tmp_path / kind, weights=kind))
    name = "bert.encoder.layer.0.output.dense.weight"
    pretrained, shuffled, fresh = (each.model.get_parameter(name).detach() for each in experiments.values())

    assert not torch.equal(shuffled, pretrained)
    assert torch.equal(shuffled.flatten().sort().values, pretrained.flatten().sort().values)
    assert float(fresh.std()) == pytest.approx(0.02, rel=0.1)  # BERT's initialisation
    layer_norm = "bert.embeddings.LayerNorm.weight"
    assert torch.equal(experiments["random"].model.get_parameter(layer_norm), torch.ones(32))
    heads = [each.model.classifier.weight for each in experiments.values()]
    assert torch.equal(heads[0], heads[1])  # the head is drawn first


def test_weights_stay_zero_under_the_mask_whatever_they_are(tasks, tmp_path):
    for kind in ("shuffled", "random"):
        experiment = opened(settings(tasks, tmp_path / kind, weights=kind))
        for name, mask in experiment.masks.items():
            assert torch.equal(experiment.model.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("task", ["rte", "squad"])
def test_limit_draws_training_examples_by_the_seed(tasks, tmp_path, task):
    def train_data(**changes):
        task_data = opened(dense(tasks, tmp_path / str(changes), task=task, max_len=24, **changes)).tasks[0]
        assert len(task_data.targets) == len(task_data.train)
        return [(tuple(input_ids), tuple(np.ravel(target)))
                for (input_ids, _), target in zip(task_data.train, task_data.targets, strict=True)]

    all_examples = train_data()
    nine = train_data(limit=9)
    assert len(nine) == 9
    assert set(nine) <= set(all_examples)  # each with its own target
    assert nine == train_data(limit=9, epochs=3)
    assert nine != train_data(limit=9, seed=2)


def test_limit_counts_the_windows_of_squad(tasks, tmp_path):
    task_data = opened(dense(tasks, tmp_path, task="squad", max_len=24)).tasks[0]
    num_questions = len(task_data.texts["train"])
    assert num_questions == 24 < len(task_data.train)  # a long paragraph gives several windows
    task_data = opened(dense(tasks, tmp_path / "30", task="squad", max_len=24, limit=30)).tasks[0]
    assert len(task_data.train) == 30


def test_a_checkpoint_without_pooler_gets_a_fresh_one_that_is_dense(tasks, tmp_path, capsys):
    model = bert.load(tasks.parent / "bert")
    tensors = {name: tensor for name, tensor in model.named_parameters() if "pooler" not in name}
    shutil.copytree(tasks.parent / "bert", tmp_path / "bert")
    bert.save(tmp_path / "bert", model.config, tensors, "ForMaskedLM")
    experiment = opened(settings(tasks, tmp_path, model=str(tmp_path / "bert")))
    assert "no pooler: a fresh one is trained, dense" in capsys.readouterr().out
    assert experiment.model.has_pooler
    assert not any("pooler" in name for name in [*experiment.masks, *experiment.prunable])


def test_mnli_is_reported_without_its_mismatched_file(tasks, tmp_path, capsys):
    rows = ["the cat\tthe dog\tneutral", "a cat\ta cat\tentailment"] * 8
    for name in ("train", "dev_matched"):
        write_lines(tmp_path / "MNLI" / f"{name}.tsv", ["sentence1\tsentence2\tgold_label", *rows])
    result = finetune.fine_tune(settings(tasks, tmp_path, task="mnli", data=tmp_path, epochs=1))
    assert list(result["best"]) == ["accuracy"]
    assert "nothing is reported for dev_mm" in capsys.readouterr().out


@pytest.mark.parametrize("module, function", [(data, "append_line"), (tamt, "write_json")],
                         ids=["before the line", "before result.json"])
def test_a_kill_before_the_end_neither_loses_nor_doubles_the_line(
        tasks, tmp_path, monkeypatch, module, function):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, function, kill)
        finetune.fine_tune(settings(tasks, tmp_path))
    for _ in range(2):
        finetune.fine_tune(settings(tasks, tmp_path, resume=True))
        assert len(results(tmp_path)) == 1
    assert not (tmp_path / "run/state.pt").exists()


def test_the_same_run_once_more_is_one_line_more(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.time, "time", lambda: 0.0)  # even if both take equally long
    finetune.fine_tune(settings(tasks, tmp_path))
    finetune.fine_tune(settings(tasks, tmp_path))
    assert len(results(tmp_path)) == 2


def test_a_kill_after_the_line_does_not_double_it(tasks, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    append_line = data.append_line

    def kill_afterwards(*arguments):
        append_line(*arguments)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(data, "append_line", kill_afterwards)
        finetune.fine_tune(settings(tasks, tmp_path))
    finetune.fine_tune(settings(tasks, tmp_path, resume=True))
    assert len(results(tmp_path)) == 1


# ---------------------------------------------------------------------------------------------------
# 3. IMP on a task
# ---------------------------------------------------------------------------------------------------

IMP = {"find": "imp", "sparsity": 0.25}


@pytest.fixture(scope="session")
def imp_folder(tasks, tmp_path_factory):
    """The folder of a finished --find imp: rounds at 10 %, 20 % and 25 %, eight updates each."""
    out = tmp_path_factory.mktemp("imp")
    content = finetune.find_imp(dense(tasks, out, **IMP))
    assert [entry["sparsity"] for entry in content["rounds"]] == pytest.approx([0, 0.1, 0.2], abs=1e-3)
    return out / "run"


def test_rounds_of_imp_are_exact_and_nested(imp_folder):
    rounds = [tamt.load_mask(imp_folder / f"round-{number}") for number in (1, 2, 3)]
    num_entries = sum(mask.numel() for mask in rounds[0].values())
    for masks, level in zip(rounds, (0.1, 0.2, 0.25), strict=True):
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(num_entries * level)
    for earlier, later in zip(rounds, rounds[1:], strict=False):
        assert all((earlier[name] >= later[name]).all() for name in earlier)  # what is pruned stays pruned


def test_imp_prunes_encoder_and_pooler_by_default(imp_folder):
    names = tamt.load_mask(imp_folder).keys()
    assert len(names) == 13
    assert "bert.pooler.dense.weight" in names
    assert "bert.embeddings.word_embeddings.weight" not in names


def test_imp_equals_doing_the_rounds_by_hand(tasks, tmp_path, imp_folder):
    names = tamt.load_mask(imp_folder).keys()  # encoder and pooler
    mask_file = None
    for number, level in enumerate((0.1, 0.2, 0.25), 1):
        round_settings = dense(tasks, tmp_path / str(number), mask=mask_file)
        experiment = finetune.open_experiment(round_settings, horizon_rounds=10)
        finetune.train(experiment)
        trained = {}
        for name in names:
            trained[name] = experiment.model.get_parameter(name).detach().abs()

        magnitudes = torch.cat([weight.flatten() for weight in trained.values()])  # pruned ones are 0
        threshold = magnitudes.sort().values[round(level * len(magnitudes)) - 1]
        masks = {name: weight > threshold for name, weight in trained.items()}
        mask_file = str(tmp_path / f"{number}.pt")
        tamt.save_mask(mask_file, masks, {})

        expected = tamt.load_mask(imp_folder / f"round-{number}")
        assert masks.keys() == expected.keys()
        assert all(torch.equal(masks[name], expected[name]) for name in masks)


def test_imp_does_not_prune_the_pretrained_weights(tasks, imp_folder):
    layers = tamt.mask_model(bert.load(tasks.parent / "bert"), "encoder")
    one_shot = tamt.magnitude_masks(layers, 0.1, "global")
    assert tamt.similarity(tamt.load_mask(imp_folder / "round-1"), one_shot) < 1


def test_resume_of_imp_skips_the_rounds_that_are_finished(tasks, tmp_path, monkeypatch, imp_folder):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_update(patch, 8 + 6)  # in the second round
        finetune.find_imp(dense(tasks, tmp_path, **IMP))

    updates = []
    update = finetune.update

    def counted(*arguments, **more):
        updates.append(more["t"])
        return update(*arguments, **more)

    monkeypatch.setattr(finetune, "update", counted)
    finetune.find_imp(dense(tasks, tmp_path, resume=True, **IMP))
    assert updates == [6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8]  # the rest of the second round, and the third
    assert (tmp_path / "run/mask.pt").read_bytes() == (imp_folder / "mask.pt").read_bytes()
    finetune.find_imp(dense(tasks, tmp_path, resume=True, **IMP))
    assert len(updates) == 11


def test_another_search_does_not_resume_in_the_same_folder(tasks, imp_folder):
    with pytest.raises(ValueError, match=r"holds another run \(rank 'global' there, 'local' here\)"):
        finetune.find_imp(dense(tasks, imp_folder.parent, resume=True, rank="local", **IMP))


def test_a_ticket_of_one_task_can_be_tried_on_another(tasks, tmp_path, imp_folder):
    result = finetune.fine_tune(settings(tasks, tmp_path, task="stsb", mask=str(imp_folder)))
    assert result["mask"]["task"] == "rte"
    assert result["sparsity"] == pytest.approx(0.25, abs=1e-3)


# ---------------------------------------------------------------------------------------------------
# 4. Super Tickets
# ---------------------------------------------------------------------------------------------------


def test_importance_is_the_gradient_of_a_gate_at_every_position(tasks, tmp_path):
    experiment = opened(dense(tasks, tmp_path))
    heads, feed_forward = finetune.importance(experiment)

    # A gate of 1 in front of every context vector and of every output; the l1 norm of their gradients.
    task_data = experiment.tasks[0]
    layers = experiment.model.backbone.encoder.layer
    head_gates = {}
    output_gates = {}

    def gate_heads(module, inputs):  # (B, T, D)
        gate = torch.ones(*inputs[0].shape[:2], 4, 1, requires_grad=True)
        head_gates[module] = gate
        return (inputs[0].unflatten(-1, (4, 8)) * gate).flatten(-2)

    def gate_output(module, inputs, output):  # (B, T, D)
        output_gates[module] = torch.ones(*output.shape[:2], 1, requires_grad=True)
        return output * output_gates[module]

    for layer in layers:
        layer.attention.output.dense.register_forward_pre_hook(gate_heads)
        layer.output.dense.register_forward_hook(gate_output)
    expected_heads = torch.zeros(2, 4)
    expected_feed_forward = torch.zeros(2)
    for start in range(0, 32, 8):  # four batches
        logits = finetune.task_logits(experiment.model, task_data, task_data.train[start:start + 8])
        nn.functional.cross_entropy(logits, torch.from_numpy(task_data.targets[start:start + 8])).backward()
        for index, layer in enumerate(layers):
            head_gradient = head_gates[layer.attention.output.dense].grad  # (B, T, 4, 1)
            output_gradient = output_gates[layer.output.dense].grad  # (B, T, 1)
            expected_heads[index] += head_gradient.abs().sum((0, 1, 3)) / 4
            expected_feed_forward[index] += output_gradient.abs().sum() / 4
    expected_heads /= expected_heads.norm(dim=1, keepdim=True)

    assert torch.allclose(heads, expected_heads, rtol=1e-4)
    assert torch.allclose(feed_forward, expected_feed_forward, rtol=1e-4)


@pytest.mark.parametrize("order", finetune.ORDERS)
def test_the_eight_levels_are_the_papers_and_nested(order):
    torch.manual_seed(0)
    heads = torch.rand(12, 12)
    feed_forward = torch.rand(12)
    levels = [finetune.choose_units(heads, feed_forward, order, level, seed=1) for level in range(1, 9)]
    assert [int(removed_heads.sum()) for removed_heads, _ in levels] == [14, 28, 43, 57, 72, 86, 100, 115]
    assert [int(removed_ffns.sum()) for _, removed_ffns in levels] == [1, 2, 3, 4, 5, 6, 7, 8]

    for (heads_before, ffns_before), (heads_after, ffns_after) in zip(levels, levels[1:], strict=False):
        assert (heads_before <= heads_after).all()
        assert (ffns_before <= ffns_after).all()


def test_winning_tickets_lose_the_least_important_units_and_losing_ones_the_most():
    heads = torch.tensor([[0.1, 0.9, 0.5, 0.6], [0.2, 0.3, 0.8, 0.4]])
    feed_forward = torch.arange(12.0)
    removed, _ = finetune.choose_units(heads, feed_forward[:2], "winning", 3, seed=1)  # 8 * 3 / 10: two heads
    assert removed.tolist() == [[True, False, False, False], [True, False, False, False]]
    removed, _ = finetune.choose_units(heads, feed_forward[:2], "losing", 3, seed=1)
    assert removed.tolist() == [[False, True, False, False], [False, False, True, False]]
    _, removed = finetune.choose_units(torch.rand(12, 12), feed_forward, "winning", 2, seed=1)
    assert np.flatnonzero(removed).tolist() == [0, 1]
    _, removed = finetune.choose_units(torch.rand(12, 12), feed_forward, "losing", 2, seed=1)
    assert np.flatnonzero(removed).tolist() == [10, 11]


@pytest.mark.parametrize("order", finetune.ORDERS)
def test_a_layer_keeps_at_least_one_head(order):
    heads = torch.ones(12, 12)
    heads[3] = 1e-6  # a layer whose heads are all unimportant
    heads[5] = 1e6
    removed, _ = finetune.choose_units(heads, torch.ones(12), order, 8, seed=1)
    assert not removed.all(axis=1).any()


@pytest.mark.parametrize("level, percent", [(1, 93.2), (8, 44.9)])
def test_the_remaining_weights_of_bert_base_are_those_of_the_paper(level, percent):
    config = bert.Config(30522, 768, 12, 12, 3072, 512)
    removed = finetune.choose_units(torch.rand(12, 12), torch.rand(12), "winning", level, seed=1)
    masks = finetune.unit_masks(config, *removed)
    num_pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert 100 * (1 - num_pruned / 109_482_240) == pytest.approx(percent, abs=0.05)


REMOVED_HEADS = np.array([[True, False, True, False], [False, False, True, False]])
REMOVED_FEED_FORWARD = np.array([False, True])


@pytest.fixture(params=["bert", "roberta"])
def super_ticket(request, tasks, tmp_path):
    """A Super Ticket of each family that takes out three heads and a feed-forward network."""
    model = tasks.parent / request.param
    masks = finetune.unit_masks(bert.load(model).config, REMOVED_HEADS, REMOVED_FEED_FORWARD)
    tamt.save_mask(tmp_path / "super.pt", masks, {"method": "super", "model": str(model)})
    return tmp_path / "super.pt"


def test_a_super_ticket_makes_the_model_smaller(tasks, tmp_path, super_ticket):
    experiment = opened(settings(tasks, tmp_path, mask=str(super_ticket)))
    first, second = experiment.model.backbone.encoder.layer
    assert first.attention.self.query.weight.shape == (16, 32)  # two of four heads of size 8
    assert second.attention.output.dense.weight.shape == (32, 24)
    assert not any("output.dense" in name or "intermediate" in name
                   for name, _ in second.named_parameters() if "attention" not in name)


def test_the_smaller_model_gives_the_logits_that_gates_would_give(tasks, tmp_path, super_ticket):
    small = opened(settings(tasks, tmp_path / "small", mask=str(super_ticket)))
    full = opened(dense(tasks, tmp_path / "full", model=small.run.model))
    for index, layer in enumerate(full.model.backbone.encoder.layer):
        head_gate = torch.from_numpy(np.repeat(~REMOVED_HEADS[index], 8)).float()  # (D,)
        output_gate = float(not REMOVED_FEED_FORWARD[index])
        layer.attention.output.dense.register_forward_pre_hook(
            lambda module, inputs, gate=head_gate: inputs[0] * gate)
        layer.output.dense.register_forward_hook(
            lambda module, inputs, output, gate=output_gate: output * gate)
    sequences = small.tasks[0].train[:8]
    with torch.no_grad():
        found = finetune.task_logits(small.model, small.tasks[0], sequences)
        expected = finetune.task_logits(full.model, full.tasks[0], sequences)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_export_of_a_super_ticket_has_full_sizes_and_equal_logits(tasks, tmp_path, super_ticket):
    experiment = opened(settings(tasks, tmp_path, mask=str(super_ticket), export=tmp_path / "export"))
    finetune.export_model(experiment, experiment.tasks[0])
    tensors = bert.read_safetensors(tmp_path / "export/model.safetensors")
    family = experiment.model.config.model_type
    query = tensors[f"{family}.encoder.layer.0.attention.self.query.weight"]
    assert query.shape == (32, 32)
    assert not query[0:8].any() and not query[16:24].any()  # the first and the third head are gone
    assert query[8:16].all() and query[24:32].all()

    model = experiment.model
    task_data = experiment.tasks[0]
    with torch.no_grad():
        ours = finetune.task_logits(model, task_data, task_data.train[:8])
        theirs, _ = transformers_logits(tmp_path / "export", task_data, task_data.train[:8], model.config)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_super_ticket_that_takes_half_a_head_is_refused(tasks, tmp_path, super_ticket):
    masks, meta = tamt.read_mask(super_ticket)
    next(iter(masks.values()))[0, 0] ^= True
    tamt.save_mask(super_ticket, masks, meta)
    with pytest.raises(ValueError, match="a Super Ticket takes out whole heads"):
        opened(settings(tasks, tmp_path, mask=str(super_ticket)))


def test_the_super_ticket_is_the_winning_ticket_with_the_best_score(tasks, tmp_path):
    orders = ("winning", "random")
    content = finetune.find_super(dense(tasks, tmp_path, find="super", orders=orders, epochs=1))
    curve = {entry["ticket"]: entry for entry in content["curve"]}
    assert len(curve) == len(results(tmp_path)) == 17  # the dense model, and eight levels of each order
    assert curve["dense"]["remaining"] == 1
    assert curve["dense"]["remaining"] > curve["random-4"]["remaining"] > curve["random-8"]["remaining"]

    best = max(curve[f"winning-{level}"]["best"]["accuracy"] for level in range(1, 9))
    _, meta = tamt.read_mask(tmp_path / "run")
    assert meta["order"] == "winning"
    assert curve[f"winning-{meta['level']}"]["best"]["accuracy"] == best
    assert json.loads((tmp_path / "run/mask.json").read_text())["curve"] == content["curve"]


def test_losing_orders_alone_give_no_super_ticket(tasks, tmp_path, capsys):
    finetune.find_super(dense(tasks, tmp_path, find="super", orders=("losing",), epochs=1, limit=8))
    printed = capsys.readouterr().out
    assert "no super ticket" in printed
    assert "next:" not in printed
    assert not (tmp_path / "run/mask.pt").exists()
    assert len(json.loads((tmp_path / "run/mask.json").read_text())["curve"]) == 9


# ---------------------------------------------------------------------------------------------------
# 5. Several tasks, one encoder
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_masks(tasks, tmp_path):
    """For rte the mask of all tests, for stsb a random one."""
    layers = tamt.mask_model(bert.load(tasks.parent / "bert"))
    masks = tamt.random_masks(layers, 0.5, "local", seed=1)
    tamt.save_mask(tmp_path / "second.pt", masks, {"model": str(tasks.parent / "bert")})
    return f"{tasks / 'bert.pt'},{tmp_path / 'second.pt'}"


@pytest.fixture
def two_super_tickets(tasks, tmp_path):
    """They skip the feed-forward networks of different layers."""
    model = tasks.parent / "bert"
    for index, feed_forward in enumerate(([True, False], [False, True])):
        removed_heads = REMOVED_HEADS[[index, 1 - index]]
        masks = finetune.unit_masks(bert.load(model).config, removed_heads, np.array(feed_forward))
        tamt.save_mask(tmp_path / f"{index}.pt", masks, {"method": "super", "model": str(model)})
    return f"{tmp_path / '0.pt'},{tmp_path / '1.pt'}"


@pytest.mark.parametrize("tickets", ["two_masks", "two_super_tickets"])
def test_in_a_shared_encoder_each_task_predicts_as_it_would_alone(tasks, tmp_path, request, tickets):
    masks = request.getfixturevalue(tickets)
    shared = opened(settings(tasks, tmp_path / "shared", task="rte,stsb", mask=masks))
    for task_data, mask in zip(shared.tasks, masks.split(","), strict=True):
        alone = opened(settings(tasks, tmp_path / task_data.task.name, task=task_data.task.name, mask=mask))
        alone.model.classifier = task_data.head
        found = finetune.predict_logits(shared, task_data, task_data.train)
        expected = finetune.predict_logits(alone, alone.tasks[0], task_data.train)
        assert np.allclose(np.stack(found), np.stack(expected), atol=1e-5)


def test_a_shared_weight_gets_gradients_from_the_tasks_that_keep_it(tasks, tmp_path, two_masks):
    experiment = opened(settings(tasks, tmp_path, task="rte,stsb", mask=two_masks))
    rte, stsb = experiment.tasks
    finetune.switch_to(experiment.model, rte)
    finetune.task_logits(experiment.model, rte, rte.train[:8]).sum().backward()
    for name, mask in rte.masks.items():
        gradient = experiment.model.get_parameter(name).grad
        assert not gradient[~mask].any()
        assert gradient[mask].any()
    assert rte.head.weight.grad is not None
    assert stsb.head.weight.grad is None


def test_several_tasks_report_their_metrics_under_their_names(tasks, tmp_path, two_masks):
    result = finetune.fine_tune(settings(tasks, tmp_path, task="rte,stsb", mask=two_masks))
    assert list(result["best"]) == ["rte_accuracy", "stsb_pearson", "stsb_spearman"]
    assert result["steps"] == 16
    assert len(result["mask"]) == 2
    assert result["task"] == "rte,stsb"


def test_the_exports_of_several_tasks_are_masked_each_by_its_ticket(tasks, tmp_path, two_masks):
    experiment = opened(settings(tasks, tmp_path, task="rte,stsb", mask=two_masks, export=tmp_path / "x"))
    finetune.train(experiment)
    finetune.finish(experiment)
    for task_data in experiment.tasks:
        tensors = bert.read_safetensors(tmp_path / "x" / task_data.task.name / "model.safetensors")
        for name, mask in task_data.masks.items():
            assert torch.equal(tensors[name], experiment.model.get_parameter(name).data * mask)
        sequences = task_data.train[:8]
        folder = tmp_path / "x" / task_data.task.name
        theirs, _ = transformers_logits(folder, task_data, sequences, experiment.model.config)
        ours = np.stack(finetune.predict_logits(experiment, task_data, sequences))
        assert np.allclose(ours, theirs.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("tickets", ["two_masks", "two_super_tickets"])
def test_several_tasks_resume_bit_for_bit(tasks, tmp_path, monkeypatch, request, tickets):
    values = {"task": "rte,stsb", "mask": request.getfixturevalue(tickets), "results": None}
    expected = finetune.fine_tune(settings(tasks, tmp_path / "a", export=tmp_path / "a/x", **values))
    values["export"] = tmp_path / "b/x"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_update(patch, 6)
        finetune.fine_tune(settings(tasks, tmp_path / "b", **values))
    resumed = finetune.fine_tune(settings(tasks, tmp_path / "b", resume=True, **values))
    assert resumed["evaluations"] == expected["evaluations"]
    for task in ("rte", "stsb"):
        assert weights(tmp_path / "b/x" / task) == weights(tmp_path / "a/x" / task)


# ---------------------------------------------------------------------------------------------------
# Wrong input
# ---------------------------------------------------------------------------------------------------

WRONG_INPUT = [
    ("--task sst3", "unknown task 'sst3'; known: cola, sst2"),
    ("--task rte,squad", "different ones, without squad"),
    ("--task rte,rte", "different ones, without squad"),
    ("--task rte,stsb", "1 files for 2 tasks; expected one for each"),
    ("--task rte,stsb --mask a.pt,", "an empty name"),
    ("--task rte,stsb --mask {tasks}/bert.pt,{tasks}/roberta.pt", "tickets of different models"),
    ("--data {tmp}/none", "{tmp}/none: no such folder"),
    ("--data {tmp}", "task rte: no train file; expected {tmp}/RTE/train.tsv or"),
    ("--data {tmp}/bad", "dev.tsv line 3: 2 fields where line 1 has 3"),
    ("--model {tasks}/../roberta", "mask of another model"),
    ("--model {tmp}/none", "{tmp}/none"),
    ("--mask {tasks}/RTE/dev.tsv", "RTE/dev.tsv"),
    ("--mask {tmp}/none.pt", "{tmp}/none.pt: No such file"),
    ("--max-len 65", "--max-len 65: expected 6 to 64 tokens"),
    ("--max-len 5", "--max-len 5: expected 6 to 64 tokens"),
    ("--epochs 0", "--epochs 0: expected a number above 0"),
    ("--epochs two", "argument --epochs: invalid int value: 'two'"),
    ("--lr nan", "--lr nan: expected a number above 0"),
    ("--seed -1", "--seed -1: expected a whole number from 0"),
    ("--weights none", "--weights: invalid choice: 'none'"),
    ("--find imp", "--find goes with one --task and without --mask"),
    ("--sparsity 0.5", "--sparsity goes with --find imp"),
    ("--orders losing", "--orders goes with --find super"),
    ("--results {tmp}/none/r", "--results {tmp}/none/r: expected a file in a folder that exists"),
    ("--results {tmp}/run/result.json --out {tmp}/run", "expected a file in a folder that exists"),
    ("--export {tasks}/bert.pt", "--export {tasks}/bert.pt: a file stands there"),
    ("--export {tasks}/bert.pt/x", "a file stands there; expected a folder"),
    ("--export {tasks}/../bert", "is the folder of the model"),
]


@pytest.mark.parametrize("argv, message", WRONG_INPUT, ids=[argv for argv, _ in WRONG_INPUT])
def test_wrong_input_is_one_line_with_exit_status_2(tasks, tmp_path, capsys, argv, message):
    header = "sentence1\tsentence2\tlabel"
    write_lines(tmp_path / "bad/RTE/train.tsv", [header, "a\tb\tentailment"])
    write_lines(tmp_path / "bad/RTE/dev.tsv", [header, "a\tb\tentailment", "a\tb"])
    files = set(tmp_path.rglob("*"))

    words = [word.format(tasks=tasks, tmp=tmp_path) for word in argv.split()]
    assert shell(tasks, tmp_path, "rte", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.format(tasks=tasks, tmp=tmp_path) in error
    assert set(tmp_path.rglob("*")) == files  # nothing half-written is left behind


def test_wrong_settings_in_python_are_a_value_error():
    with pytest.raises(ValueError, match="--epochs 0: expected a number above 0"):
        finetune.Settings(task="rte", epochs=0)
    with pytest.raises(ValueError, match="--weights 'none': expected one of pretrained, random, shuffled"):
        finetune.Settings(task="rte", weights="none")
