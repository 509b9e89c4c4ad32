"""What several files of tests in this folder share."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import finetune
import glue_squad
import tamt
from test_tamt import num_entries


def exit_status(main, *argv) -> int:
    """Calls a program as its command line does -> exit status."""
    def call():
        main([str(word) for word in argv])

    try:
        tamt.run_command(call)
    except SystemExit as end:
        return end.code
    return 0


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def run_tamt(inputs, out, *more):
    """mask_settings() from the command line, without its learning rate and device -> exit status."""
    return exit_status(
        tamt.main, "--model", inputs / "bert", "--data", inputs / "text.txt", "--steps", 12, "--seq-len", 16,
        "--batch-size", 8, "--log-every", 4, "--eval-every", 100, "--save-every", 5, "--out", out, *more)


def run_finetune(tasks, out, task="rte", *more, mask="bert.pt"):
    """The same as finetune_settings(), from the command line -> exit status."""
    out.mkdir(parents=True, exist_ok=True)
    argv = ["--task", task, "--data", tasks, "--max-len", 48, "--lr", 1e-3, "--batch-size", 8, "--epochs", 2,
            "--out", out / "run", "--results", out / "results.jsonl"]
    if mask:
        argv += ["--mask", tasks / mask]
    return exit_status(finetune.main, *argv, *more)


def assert_one_error_line(capsys, words, main, *argv):
    """Runs the program, which must end with exit status 2 and one line on stderr; the pattern `words` matches it."""
    capsys.readouterr()
    status = exit_status(main, *argv)
    line = capsys.readouterr().err.strip()
    assert status == 2
    assert line.startswith("error: ") and "\n" not in line
    assert re.search(words, line), line


def stop_fine_tuning_at(monkeypatch, number):
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


def watch_rankings(monkeypatch, look):
    """Calls look(layers, step) after every update of a run: when its ranking is done, find_mask() calls Log.add()."""
    add = tamt.Log.add

    def look_and_log(log, step, *arguments):
        look(log.masked_layers, step)
        add(log, step, *arguments)

    monkeypatch.setattr(tamt.Log, "add", look_and_log)


def updates_made(monkeypatch):
    """A list that gets the number, within its round, of every update that is made from now on."""
    numbers = []
    optimizer_step = finetune.optimizer_step

    def counted(training, *arguments):
        numbers.append(training.updates_done + 1)
        return optimizer_step(training, *arguments)

    monkeypatch.setattr(finetune, "optimizer_step", counted)
    return numbers


def weight_bytes(folder):
    return (folder / "model.safetensors").read_bytes()


def lines_of_results(out):
    """The lines of a results file."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def logits_of_export(training, sequences):
    """The logits of the exported model in transformers, (B, C) or (B, T, 2), and the attention mask, (B, T)."""
    return transformers_logits(training.run.export, training.encoded_tasks[0], sequences, training.model.config)


def transformers_logits(folder, encoded_task, sequences, config):
    transformers = pytest.importorskip("transformers")
    batch = glue_squad.pad_batch(sequences, config.pad_token_id)
    input_ids, attention_mask, token_type_ids = (torch.from_numpy(array) for array in batch)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = token_type_ids
    with torch.no_grad():
        if encoded_task.task.predicts == "span":
            output = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()(**inputs)
            return torch.stack([output.start_logits, output.end_logits], dim=-1), attention_mask.bool()
        output = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs)
        return output.logits, attention_mask.bool()


def raises_one_line(call, *args, match):
    """The error is one line; -> its text."""
    with pytest.raises((ValueError, OSError), match=match) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


def squad_file(*starts):
    """The content of a file with a question for each start that is given for the answer "Rome"."""
    entries = []
    for start in starts:
        answers = [{"text": "Rome", "answer_start": start}]
        entries.append({"id": str(start), "question": "Where?", "answers": answers})
    return {"version": "1.1", "data": [{"paragraphs": [{"context": "in Rome", "qas": entries}]}]}


def share_of_flips(folder):
    """How many entries changed sides along a run, as a share of all, summed over the lines of its log."""
    return sum(line["flips"] for line in read_log(folder))


def is_subset(a, b):
    """Whether mask b keeps all that mask a keeps."""
    return not any((a[name] & ~b[name]).any() for name in a)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def begin(settings):
    """A run before its first update. This repeats what find_mask() does up to there."""
    machine = tamt.start_machine("cpu")
    inputs = replace(tamt.read_inputs(settings, machine), dev_rows=None)
    run = inputs.run  # the settings with all defaults filled in
    layers = tamt.install_masked_layers(inputs.model, run.scope)
    scores = None
    if run.method == "tamt":
        scores = tamt.Scores(layers, tamt.first_masks(layers, run), run.sparsity, run.rank)
        if run.rank == "global":
            tamt.pin_unlearnable_scores(scores, inputs)
            tamt.make_start_exact(scores)
    inputs.model.train()
    return tamt.Training(inputs, layers, scores)


def one_update(training, learning_rate, update_number):
    """What train_scores() and learn_by_imp() do before the masks -> the loss."""
    loss = tamt.backpropagate(training, tamt.next_batch(training))
    loss_value = tamt.clip_and_check(training, loss, training.run.clip)
    tamt.optimizer_step(training, learning_rate, update_number)
    return loss_value


def three_updates(training):
    for t in (1, 2, 3):
        one_update(training, 2e-3, t)
        training.updates_done += 1


def weights_of(model):
    """{name: tensor} of the weights, which are copied, without the scores."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if not name.endswith(".scores")}


def masks_of(layers):
    return {name: layer.mask.clone() for name, layer in layers.items()}


def num_different(a, b):
    return sum(int((a[name] ^ b[name]).sum()) for name in a)


def assert_masks_differ(before, after):
    """At least 1 % of the entries differ. A guard against runs that change nothing."""
    assert num_different(before, after) > 0.01 * num_entries(before)


def expected_pins(training):
    """The pooler, the row of [PAD], whose embedding never gets a gradient (padding_idx), and with kd the rows of words
    that the text does not contain. With mlm, corruption may put any other word anywhere."""
    vocabulary = training.inputs.vocabulary
    is_unread = torch.zeros(vocabulary.size, dtype=torch.bool)
    if training.run.objective == "kd":
        is_unread = torch.from_numpy(~np.isin(np.arange(vocabulary.size), training.inputs.rows))
    is_unread[vocabulary.pad_id] = True
    return {"bert.embeddings.word_embeddings.weight": is_unread, "bert.pooler.dense.weight": slice(None)}


def ids_of(text, vocabulary):
    return vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
