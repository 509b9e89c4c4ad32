"""Fine-tune a pruned BERT on a GLUE task or SQuAD v1.1, and record its accuracy (or F1, correlation, ...).

    python finetune.py --task sst2 --mask mask.pt                   under a mask that tamt.py has found
    python finetune.py --task sst2 --model bert-base                the whole network, to compare

Here masks are fixed, and weights are trained: those that the masks keep, and all that has no mask (biases, LayerNorms,
the task head, and others). With TAMT it is the other way round. In short, for one task, with W for all weights (and 1
as the mask of those that have none):

    W = W * mask                                            zero_pruned_weights
    for batch in batches:                                   train
        gradient = derivative(loss(batch, W), W) * mask     batch_loss, zero_pruned_gradients
        W = adamw(W, gradient)                              optimizer_step
        now and then: evaluate                              evaluate_if_due
    report the best evaluation and the last one             finish

Not shown here: gradients are clipped, the learning rate falls, and there is dropout. A test compares train() with a
plain loop in which torch.nn.utils.prune multiplies the weights by the mask in each forward pass: the kept weights are
equal, bit for bit (test_tamt.py: test_fine_tuning_equals_a_plain_loop_with_torch_prune_bit_for_bit).

    1. One fine-tuning            read, train, finish
    2. The training loop
    3. Losses, predictions
    4. Tickets, tasks, network    what a fine-tuning is made of
    5. The result

Methods of other papers follow. Skip them if you came for TAMT:

    6. IMP on a task              --find imp: a mask by iterative magnitude pruning on the task itself
    7. Super Tickets              --find super: cut out whole attention heads and feed-forward networks, FFNs
    8. Several tasks              --task sst2,rte --mask a.pt,b.pt: one backbone; each task has its task head and ticket

    Appendix A                    what differs from the released code; ablations, states, records, predictions, export
    Appendix B                    settings, folders, and the command line

What chapters 1 to 8 use and do not define is in an appendix or in another module: the network (bert.py), vocabularies
and random streams (data.py), tasks, batches and metrics (glue_squad.py), and what both kinds of training need: masks,
the optimizer, devices and folders (tamt.py). "Released" is the code of the papers' authors: that of TAMT for chapters 1
to 5, of BERT-Tickets (Chen et al. 2020; LT_glue.py) for chapter 6, and of Liang et al. 2021 (mt_dnn) for chapters 7 and
8. A table at the start of appendix A says what differs.

The words:

    ticket        the content of a mask file. (From "lottery ticket".) An ordinary one prunes single entries of the
                  matrices, a Super Ticket whole attention heads and FFNs.
    backbone      what lies below the task head: embeddings, layers, pooler; "encoder" is its layers alone
    task head     what lies on top: a classifier, or for SQuAD the span layer
    sequence      token ids, and token type ids, of an example; of SQuAD, where long paragraphs give several, a window
    dense         without a mask (in the names of layers: a Linear)
    update        one batch, and one move of the optimizer; in files and on the screen "step" is the number of an update
    search        a run with --find: several fine-tunings, which IMP calls rounds
    unit          an attention head or an FFN (chapters 7 and 8)

A task predicts a class, a number (STS-B), or a span (SQuAD: the first and the last token of an answer).

The objects are made in the order Settings, Ticket, Run, Inputs, EncodedTask, Training. (These and other names, such
as read_inputs and optimizer_step, are also in tamt.py, for the same role in the training of masks.)

Letters in shapes: B sequences, T tokens, C classes, n examples, D hidden size, L layers, H attention heads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import bert
import data
import glue_squad
import tamt
from tamt import option

# ---------------------------------------------------------------------------------------------------
# 1. One fine-tuning
# ---------------------------------------------------------------------------------------------------


# A Run (appendix B) is the Settings, one field for each flag, with the defaults filled in, and a few fields more:
#
#     run.lr, run.epochs, run.batch_size, run.eval_every    as the flags; by default those of the task
#     run.out                    the folder of the run
#     run.seed                   of task head, order of the examples, dropout, --weights, and the choice of --limit
#     run.limit                  training examples (SQuAD: windows); None: all
#     run.max_len                tokens of an example, at most
#     run.weights                "pretrained"; "random" or "shuffled" for an ablation: is it the mask that counts, or
#                                the weights that it keeps?
#     run.predict, run.export    what else to write: predictions for test sets (SQuAD: for dev); an export
#     run.schedule_stretch       1; in a round of IMP 10: the learning rate falls as if the run were 10 times as long
#     run.machine                the device, and the dtype


def fine_tune(settings: Settings) -> dict:
    """Fine-tunes on the task, writes result.json into the folder of the run, adds a line to --results, and
    returns the content of result.json. (With --find it looks for a ticket, and returns the content of mask.json.)

    Raises ValueError or OSError, with a message of one line, for input that is wrong."""
    if settings.find == "imp":
        return find_imp(settings)  # chapter 6
    if settings.find == "super":
        return find_super(settings)  # chapter 7
    inputs = read_inputs(settings)
    result, state = open_run(inputs)  # with --resume: the result of a finished run, or the state to continue from
    if result is not None:
        print_summary(result)
        return result
    training = prepare_training(inputs, state)
    train(training)
    return finish(training)


@dataclass
class Ticket:
    """The content of a mask file. An ordinary ticket prunes single entries, a Super Ticket whole heads and FFNs."""
    file: Path  # or a folder with mask.pt in it
    masks: dict[str, torch.Tensor]  # {name of a matrix: True where an entry is kept}
    meta: dict  # how it was made: "model", "method", "sparsity", ...

    @property
    def is_super(self) -> bool:
        return self.meta.get("method") == "super"


@dataclass
class Inputs:
    """The settings of a run, and all that it reads."""
    run: Run
    identity: dict  # settings and checksums; open_run compares them with those of the run that a folder holds
    tasks: list[glue_squad.Task]  # nearly always one; or several that share the backbone
    examples: dict[str, dict[str, list]]  # {name of a task: {"train": examples, "dev": ..., ...}}
    tickets: list[Ticket]  # none, one, or one for each of several tasks
    model: bert.Model  # the pre-trained one; prepare_training turns this very object into the network that trains
    vocabulary: data.Vocabulary
    start_time: float  # for the seconds in result.json


@dataclass
class EncodedTask:
    """A task as token ids. A sequence is a pair (input_ids (T,), token_type_ids (T,)). For SQuAD each window gives one:
    a question and a stretch of its paragraph."""
    task: glue_squad.Task
    examples: dict[str, list]  # {split: examples, or questions of SQuAD}, as in Inputs
    train_sequences: list  # in file order, or a random choice of --limit
    train_targets: np.ndarray  # (n,) class ids or numbers, or (n, 2) first and last position of an answer
    dev_sequences: dict[str, list]  # {"dev": sequences}, for MNLI also "dev_mm"
    dev_windows: list = field(default_factory=list)  # of SQuAD's dev questions, to turn logits back into answers
    metric_prefix: str = ""  # "rte_", in front of "accuracy", if rte is one of several tasks


def read_inputs(settings: Settings, schedule_stretch: int = 1) -> Inputs:
    """Reads and checks what the user names. Nearly all that can be wrong shows here, before anything is trained."""
    start_time = time.time()
    machine = tamt.start_machine(settings.device, settings.dtype)
    tamt.refuse_several_processes(machine, "fine-tuning")

    # The tasks, the tickets, and the network that they belong to.
    tasks = named_tasks(settings)
    tickets = read_tickets(settings)
    model_name = choose_model_name(settings, tickets)  # --model, or the one that the tickets name, or the toy
    model, vocabulary = tamt.load_model(model_name)
    fit_tickets_to_model(tickets, model, settings)  # gives masks the model's names and order; or a ValueError

    # What follows from them: the settings with the defaults, and the examples. The folder comes last, since by default
    # its name ends with a hash of the identity.
    run = fill_in_defaults(settings, machine, tasks, model_name, model, schedule_stretch)
    examples = {task.name: read_examples(task, run) for task in tasks}  # from --data, or a download
    identity = identity_of_run(run, tickets, tasks, examples, vocabulary)
    run = replace(run, out=choose_folder(run, tickets, identity))
    check_files_of_run(run)
    return Inputs(run=run, identity=identity, tasks=tasks, examples=examples, tickets=tickets, model=model,
                  vocabulary=vocabulary, start_time=start_time)


def open_run(inputs: Inputs) -> tuple[dict | None, dict | None]:
    """Makes the folder of the run ready -> (result, state), of which at least one is None.

    what is there                       with --resume       without
    nothing                             (None, None)        (None, None)
    this run, finished                  (result, None)      (None, None), and the result is removed
    this run, interrupted               (None, state)       ValueError
    a run of other settings or files    ValueError          ValueError

    Also a ValueError: --resume of a finished run that lacks what --predict or --export now asks for."""
    run = inputs.run
    result, state = tamt.open_folder(run.out, inputs.identity, run.resume, "result.json", run.machine)
    if result is not None:
        complete_finished_run(inputs, result)
    return result, state


def prepare_training(inputs: Inputs, state: dict | None = None) -> Training:
    """Encodes the examples, and turns the pre-trained model into the network that trains. state: of an interrupted run,
    or None."""
    run = inputs.run
    model = inputs.model
    encoded_tasks = [encode_task(task, inputs) for task in inputs.tasks]
    prepare_network(model, inputs.tasks, run)  # on the CPU, so that task heads are the same on every device
    model.to(run.machine.device)
    masks, task_switch = apply_tickets(model, inputs.tasks, inputs.tickets)
    training = Training(inputs, encoded_tasks, masks, task_switch)  # last, since tickets may replace parameters
    if state is not None:
        restore_state(training, state)
    return training


def apply_tickets(model: bert.Model, tasks: list, tickets: list[Ticket]) -> tuple[dict, TaskSwitch | None]:
    """How each kind of ticket is applied:

    none                            the whole network trains
    an ordinary one, one task       the entries that it prunes become 0 (zero_pruned_weights), and get no gradient
                                    (zero_pruned_gradients)
    a Super Ticket, one task        its heads and FFNs are cut out of the network (cut_out_units, chapter 7)
    one for each of several tasks   each forward pass multiplies the weights, which stay whole, by the masks of its task
                                    (TaskSwitch, chapter 8; without tickets it changes task heads alone)

    An ordinary ticket costs hardly any time in an update, a Super Ticket makes the network smaller and faster, and only
    the last way lets tasks share weights.

    -> the masks of an ordinary ticket of one task, otherwise {}; the TaskSwitch of several tasks, otherwise None"""
    if len(tasks) > 1:
        return {}, TaskSwitch(model, tasks, tickets)
    if not tickets:
        return {}, None
    [ticket] = tickets
    if ticket.is_super:
        removed_heads, removed_ffns = units_from_masks(model.config, ticket)
        cut_out_units(model, removed_heads, removed_ffns)
        return {}, None
    return zero_pruned_weights(model, ticket), None


def zero_pruned_weights(model: bert.Model, ticket: Ticket) -> dict[str, torch.Tensor]:
    """Sets the entries that an ordinary ticket prunes to 0, before the loop -> {name of a matrix: its mask}. Masks are
    fixed here, so once is enough, as long as zero_pruned_gradients keeps the zeros."""
    parameters = dict(model.named_parameters())
    masks = {}
    for name, mask in ticket.masks.items():
        if name in parameters:  # a ticket may have a mask for a pooler, and this network none
            masks[name] = mask.to(parameters[name].device)
            parameters[name].data.mul_(masks[name])
    return masks


class Training:
    """A fine-tuning in progress. state.pt keeps what cannot be made again from the Inputs."""

    def __init__(self, inputs: Inputs, encoded_tasks: list[EncodedTask], masks: dict, task_switch: TaskSwitch | None):
        """masks, task_switch: as apply_tickets returns them."""
        self.inputs = inputs
        self.run = inputs.run
        self.encoded_tasks = encoded_tasks
        self.model = inputs.model
        self.masks = masks
        self.task_switch = task_switch
        # Every parameter trains.
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = tamt.make_optimizer(self.parameters.values(), self.run.machine.device)
        self.updates_done = 0
        self.batches = None  # of the current epoch, made by next_batch
        self.loss_since_evaluation = 0.0  # the sum over the updates since the last evaluation
        self.history = []  # the evaluations: {"step": 50, "loss": .7, "accuracy": .8}
        self.saved_at = time.time()  # when state.pt was written last

    @property
    def updates_per_epoch(self) -> int:
        return sum(math.ceil(len(encoded_task.train_sequences) / self.run.batch_size)
                   for encoded_task in self.encoded_tasks)

    @property
    def num_updates(self) -> int:
        return self.updates_per_epoch * self.run.epochs


# ---------------------------------------------------------------------------------------------------
# 2. The training loop
# ---------------------------------------------------------------------------------------------------


def train(training: Training):
    """Trains all weights; those that an ordinary ticket of a single task prunes stay 0. Ends with the network in eval
    mode.

    The order of the examples is drawn anew for each epoch, from the seed and the number of the epoch, and the dropout
    for each update, from the seed and its number. So an interrupted run continues exactly."""
    run = training.run
    schedule_length = training.num_updates * run.schedule_stretch  # the update at which the learning rate would reach 0
    progress = Progress(training.updates_done, training.num_updates)
    training.model.train()
    while training.updates_done < training.num_updates:
        learning_rate = run.lr * (1 - training.updates_done / schedule_length)  # linear decay, no warm-up
        encoded_task, indices = next_batch(training)
        tamt.seed_dropout(run.seed, training.updates_done)
        loss = batch_loss(training, encoded_task, indices)
        loss.backward()
        zero_pruned_gradients(training)
        loss_value = tamt.clip_and_check(training, loss, max_norm=1.0)  # the gradients; ValueError if not finite
        optimizer_step(training, learning_rate)
        training.loss_since_evaluation += loss_value
        training.updates_done += 1
        evaluate_if_due(training, progress)
        save_state_if_due(training)
    training.model.eval()


def next_batch(training: Training) -> tuple[EncodedTask, np.ndarray]:
    """The batch of the next update: a task, and indices into its training set."""
    epoch, batch_number = divmod(training.updates_done, training.updates_per_epoch)
    if batch_number == 0 or training.batches is None:  # an epoch begins, or a resumed run goes on inside one
        training.batches = epoch_batches(training.encoded_tasks, training.run, epoch)
    return training.batches[batch_number]


def epoch_batches(encoded_tasks: list[EncodedTask], run: Run, epoch: int) -> list[tuple[EncodedTask, np.ndarray]]:
    """The batches of an epoch, as pairs (task, indices into its training set). Each batch is of one task; those of
    several tasks are shuffled together."""
    generator = data.random_stream(run.seed, "order", epoch)
    batches = []
    for encoded_task in encoded_tasks:
        lengths = [len(input_ids) for input_ids, _ in encoded_task.train_sequences]
        for indices in glue_squad.bucketed_batches(lengths, run.batch_size, generator):
            batches.append((encoded_task, indices))
    if len(encoded_tasks) > 1:
        batches = [batches[index] for index in generator.permutation(len(batches))]
    return batches


def zero_pruned_gradients(training: Training):
    """A pruned weight is 0. With a gradient of 0 AdamW's moments stay 0, so it never moves the weight. (This comes
    before clipping, so that pruned weights do not count in the norm.)"""
    for name, mask in training.masks.items():
        training.parameters[name].grad.mul_(mask)


def optimizer_step(training: Training, learning_rate: float):
    """AdamW without weight decay. Its eps depends on the number of the update, from 1: with it torch's AdamW computes
    what the released one does (tamt.optimizer_settings)."""
    options = tamt.optimizer_settings("fine-tuning", learning_rate, training.updates_done + 1)
    training.optimizer.param_groups[0].update(options)
    training.optimizer.step()
    training.optimizer.zero_grad()


def evaluate_if_due(training: Training, progress: Progress):
    """Every --eval-every updates, and after each epoch."""
    if is_epoch_end(training) or training.updates_done % training.run.eval_every == 0:
        record_evaluation(training)
        progress.show_evaluation(training.history[-1])
    else:
        progress.show_time_left(training.updates_done)


def save_state_if_due(training: Training):
    """After each epoch (the last one, too, since finish may be killed), and when the last state is old."""
    if is_epoch_end(training) or time.time() - training.saved_at > tamt.SAVE_SECONDS:
        training.saved_at = time.time()
        save_state(training)


def is_epoch_end(training: Training) -> bool:
    return training.updates_done % training.updates_per_epoch == 0


def record_evaluation(training: Training):
    """Evaluates, and adds the metrics and the mean loss since the last evaluation to the history."""
    last_step = training.history[-1]["step"] if training.history else 0
    mean_loss = training.loss_since_evaluation / (training.updates_done - last_step)
    training.history.append({"step": training.updates_done, "loss": mean_loss, **evaluate(training)})
    training.loss_since_evaluation = 0.0


def evaluate(training: Training) -> dict[str, float]:
    """The metrics of all tasks on their dev sets: {"accuracy": .9}, with several tasks {"rte_accuracy": .6, ...}."""
    metrics = {}
    for encoded_task in training.encoded_tasks:
        task = encoded_task.task
        for split, sequences in encoded_task.dev_sequences.items():
            predictions = to_predictions(encoded_task, predict_logits(training, task, sequences))
            if task.predicts == "span":
                split_metrics = glue_squad.squad_scores(predictions, encoded_task.examples[split])
            else:  # the metrics of MNLI's second dev set, dev_mm, have names of their own
                split_metrics = glue_squad.score(task, predictions, encoded_task.examples[split], split)
            metrics |= {encoded_task.metric_prefix + name: value for name, value in split_metrics.items()}
    return metrics


# ---------------------------------------------------------------------------------------------------
# 3. Losses and predictions
# ---------------------------------------------------------------------------------------------------


def batch_loss(training: Training, encoded_task: EncodedTask, indices):
    """The mean loss of these examples of a task's training set, as a scalar with a gradient."""
    sequences = [encoded_task.train_sequences[index] for index in indices]
    targets = tamt.to_device(encoded_task.train_targets[indices], training.run.machine.device)
    logits = task_logits(training, encoded_task.task, sequences)
    return task_loss(encoded_task.task, logits, targets)


def task_logits(training: Training, task: glue_squad.Task, sequences: list):
    """B sequences -> logits (B, C), for numbers C = 1; or (B, T, 2) for spans."""
    select_task(training, task)  # with several tasks: switches the network to this one (chapter 8)
    model = training.model
    input_ids, attention_mask, token_type_ids = batch_tensors(model, sequences)
    with tamt.autocast(training.run.machine):
        hidden_states = model(input_ids, attention_mask, token_type_ids)  # L + 1 tensors (B, T, D)
    # What follows (pooler, task head) computes in fp32, since the two or three digits of bf16 are too few for logits.
    last_hidden_state = hidden_states[-1].float()  # (B, T, D)
    if task.predicts != "span":
        return model.class_logits(last_hidden_state)
    logits = model.span_logits(last_hidden_state)
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask[..., None], -1e4)  # so far down that padding gets no probability
    return logits


def batch_tensors(model, sequences: list) -> tuple:
    """B sequences -> input_ids, attention_mask (None without padding) and token_type_ids (None where the network
    has a single type, as RoBERTa), (B, T) each, on the device of the model."""
    device = next(model.parameters()).device
    input_ids, attention_mask, token_type_ids = glue_squad.pad_batch(sequences, model.config.pad_token_id)
    attention_mask = None if attention_mask.all() else tamt.to_device(attention_mask, device)
    token_type_ids = tamt.to_device(token_type_ids, device) if model.config.type_vocab_size > 1 else None
    return tamt.to_device(input_ids, device), attention_mask, token_type_ids


def task_loss(task: glue_squad.Task, logits, targets):
    """The mean loss of a batch. Logits and targets are

    (B, C) and (B,)          for classes: cross-entropy
    (B, 1) and (B,)          for numbers: squared error
    (B, T, 2) and (B, 2)     for spans: the mean of the cross-entropies of first and last position"""
    if task.predicts == "class":
        return F.cross_entropy(logits, targets)
    if task.predicts == "number":
        return F.mse_loss(logits[:, 0], targets)
    start_loss = F.cross_entropy(logits[..., 0], targets[:, 0])
    end_loss = F.cross_entropy(logits[..., 1], targets[:, 1])
    return (start_loss + end_loss) / 2


@torch.no_grad()
def predict_logits(training: Training, task: glue_squad.Task, sequences: list, batch_size: int = 64) -> list:
    """The logits of each sequence, in order, in eval mode: arrays (C,) or (T, 2), T the length of the longest sequence
    of its batch."""
    model = training.model
    was_training = model.training
    model.eval()
    logits = [None] * len(sequences)
    lengths = [len(input_ids) for input_ids, _ in sequences]
    by_length = np.argsort(lengths, kind="stable")  # neighbours in length share a batch, so there is little padding
    for start in range(0, len(sequences), batch_size):
        indices = by_length[start:start + batch_size]
        batch_logits = task_logits(training, task, [sequences[index] for index in indices])
        for index, row in zip(indices, batch_logits.cpu().numpy(), strict=True):
            logits[index] = row
    model.train(was_training)
    return logits


def to_predictions(encoded_task: EncodedTask, logits: list):
    """Logits -> class ids (n,), numbers (n,), or, for SQuAD's dev questions, {question id: text}."""
    if encoded_task.task.predicts == "class":
        return np.array([row.argmax() for row in logits])
    if encoded_task.task.predicts == "number":
        return np.array([row[0] for row in logits])
    start_logits = [row[:, 0] for row in logits]
    end_logits = [row[:, 1] for row in logits]
    return glue_squad.best_answers(encoded_task.examples["dev"], encoded_task.dev_windows, start_logits, end_logits)


# ---------------------------------------------------------------------------------------------------
# 4. Tickets, tasks, network: what a fine-tuning is made of
# ---------------------------------------------------------------------------------------------------


def read_tickets(settings) -> list[Ticket]:
    """The mask files of --mask: none, one, or one for each of several tasks."""
    tickets = []
    for file in split_per_task(settings.mask or "", settings):  # at commas, if --task names several tasks
        masks, meta = tamt.read_mask(file)
        tickets.append(Ticket(Path(file), masks, meta))
    return tickets


def read_examples(task: glue_squad.Task, run) -> dict[str, list]:
    """{split: examples, or questions of SQuAD}: train, dev, and the test files if they are to be predicted.
    MNLI's mismatched and diagnostic files may be missing from --data."""
    folder = task_folder(task, run)
    if run.predict and task.predicts != "span" and "test" not in task.files:
        raise ValueError(f"--predict: task {task.name} names no test file")

    examples = {}
    for split in wanted_splits(task, run.predict):
        try:
            if task.predicts == "span":
                examples[split] = glue_squad.load_squad(glue_squad.find_file(task, split, folder))
            else:
                examples[split] = glue_squad.load_glue(task, split, folder)
        except FileNotFoundError as error:
            is_optional = split in ("dev_mm", "test_mm", "ax")
            if not is_optional:
                raise
            print(f"{split} is left out: {error}")
    return examples


def encode_task(task: glue_squad.Task, inputs: Inputs) -> EncodedTask:
    """Token ids of train and dev."""
    run = inputs.run
    examples = inputs.examples[task.name]
    if task.predicts == "span":
        encoded_task = encode_squad(task, examples, inputs.vocabulary, run.max_len)
    else:
        encoded_task = encode_glue(task, examples, inputs.vocabulary, run.max_len)
    if run.limit:  # after encoding, since for SQuAD it counts windows
        limit_training_set(encoded_task, run.limit, run.seed)
    if len(inputs.tasks) > 1:
        encoded_task.metric_prefix = f"{task.name}_"
    return encoded_task


def encode_glue(task: glue_squad.Task, examples: dict[str, list], vocabulary, max_len: int) -> EncodedTask:
    dtype = np.int64 if task.predicts == "class" else np.float32
    return EncodedTask(
        task, examples,
        train_sequences=glue_squad.encode(examples["train"], vocabulary, max_len),
        train_targets=np.array([example.label for example in examples["train"]], dtype),
        dev_sequences={split: glue_squad.encode(examples[split], vocabulary, max_len)
                       for split in ("dev", "dev_mm") if split in examples})


def encode_squad(task: glue_squad.Task, examples: dict[str, list], vocabulary, max_len: int) -> EncodedTask:
    """Each question gives one or more windows."""
    train_windows = glue_squad.make_windows(examples["train"], vocabulary, max_len, training=True)
    if not train_windows:
        raise ValueError(f"task {task.name}: no training question has its answer where the file says")
    dev_windows = glue_squad.make_windows(examples["dev"], vocabulary, max_len)
    return EncodedTask(
        task, examples,
        train_sequences=[(window.input_ids, window.token_type_ids) for window in train_windows],
        # Where the answer is not in the window, both positions are 0, that of [CLS].
        train_targets=np.array([(window.start_position, window.end_position) for window in train_windows], np.int64),
        dev_sequences={"dev": [(window.input_ids, window.token_type_ids) for window in dev_windows]},
        dev_windows=dev_windows)


def limit_training_set(encoded_task: EncodedTask, limit: int, seed: int):
    """--limit keeps that many random training examples, or windows of SQuAD, as for the low-data curves of TAMT's
    paper."""
    num_sequences = len(encoded_task.train_sequences)
    if limit < num_sequences:
        chosen = data.random_stream(seed, "limit").permutation(num_sequences)[:limit]
        encoded_task.train_sequences = [encoded_task.train_sequences[index] for index in chosen]
        encoded_task.train_targets = encoded_task.train_targets[chosen]


def prepare_network(model: bert.Model, tasks: list[glue_squad.Task], run: Run):
    """Turns the pre-trained model into one for these tasks, with task heads that are drawn at random."""
    torch.manual_seed(run.seed)  # for a fresh pooler and the task heads
    remove_pretraining_heads(model)
    add_or_remove_pooler(model, tasks[0])  # tasks that share a backbone all need one (RoBERTa's: none)
    if run.weights != "pretrained":
        replace_weights(model, run.weights, run.seed)  # an ablation; task heads are the same with and without it
    if len(tasks) == 1:
        add_task_head(model, tasks[0])
    else:
        add_several_task_heads(model, tasks)  # chapter 8


def remove_pretraining_heads(model):
    for name in ("cls", "lm_head"):  # BERT's, RoBERTa's
        if hasattr(model, name):
            delattr(model, name)


def add_or_remove_pooler(model, task: glue_squad.Task):
    """BERT's classifier reads the pooler, so a checkpoint without one gets a fresh one. RoBERTa's classifier, which has
    a layer of its own, and SQuAD's task head read the last hidden states directly: for them the pooler is removed."""
    needs_pooler = task.predicts != "span" and model.config.model_type == "bert"
    if needs_pooler and not model.has_pooler:
        model.add_pooler()
        model.backbone.pooler.is_fresh = True  # so IMP (chapter 6) does not rank it
        print("the checkpoint has no pooler: a fresh one is trained, dense")
    if not needs_pooler and model.has_pooler:
        del model.backbone.pooler


def add_task_head(model, task: glue_squad.Task):
    if task.predicts == "span":
        model.add_span_head()
    else:
        model.add_classifier(task.num_outputs)


# ---------------------------------------------------------------------------------------------------
# 5. The result
# ---------------------------------------------------------------------------------------------------


def finish(training: Training) -> dict:
    """Writes the predictions and the export, if asked for; both are of the weights after the last update, not of the
    best evaluation. Then writes result.json, and the line in --results -> the content of result.json:

        {"task": "sst2", "best": {"accuracy": .95}, "final": {"accuracy": .94}, "floor": {"accuracy": .51}, ...}

    best: the evaluation that is highest in the first metric (of several tasks, in their sum). It is chosen on the dev
    set that it is reported on, so it is a little too high. final: the last evaluation. floor: the metrics of answering
    every dev example with the most frequent class; 0 for numbers and spans. Metrics are fractions or correlations,
    but those of SQuAD percentages, as in its official script."""
    run = training.run
    for encoded_task in training.encoded_tasks:
        if run.predict:
            write_predictions(training, encoded_task)
        if run.export:
            export_model(training, encoded_task)
    best, final = best_and_final(training)
    result = make_result(training, best, final, floor_metrics(training))  # with the command, settings and versions
    tamt.write_json(run.out / "result.json", result)
    append_to_results(run, result)
    (run.out / "state.pt").unlink(missing_ok=True)  # three times the size of the model, and of no more use
    print_summary(result)
    return result


def best_and_final(training: Training) -> tuple[dict, dict]:
    """The evaluation that is best in the first metric of the task (of several tasks, in their sum), and the last."""
    names = [encoded_task.metric_prefix + encoded_task.task.metrics[0] for encoded_task in training.encoded_tasks]
    best = max(training.history, key=lambda evaluation: sum(evaluation[name] for name in names))
    return best, training.history[-1]


def floor_metrics(training: Training) -> dict[str, float]:
    metrics = {}
    for encoded_task in training.encoded_tasks:
        for split in encoded_task.dev_sequences:
            split_metrics = glue_squad.majority_scores(encoded_task.task, encoded_task.examples[split], split)
            metrics |= {encoded_task.metric_prefix + name: value for name, value in split_metrics.items()}
    return metrics


# ---------------------------------------------------------------------------------------------------
# 6. Iterative magnitude pruning on a task
# ---------------------------------------------------------------------------------------------------


# A search (--find) is several fine-tunings, which in IMP are called rounds, each in a folder of its own inside that of
# the search. With --resume finished ones are not repeated. What looks after its settings and folders is in appendix B,
# and can be passed over: fill_in_search, check_search_folder, settings_of_one_run, open_run_of_search, claim_folders,
# finish_search.


def find_imp(settings: Settings) -> dict:
    """Finds a ticket by iterative magnitude pruning (Chen et al. 2020; LT_glue.py), and writes it as mask.pt -> the
    content of mask.json. In short:

        mask = 1
        for sparsity in .1, .2, ... up to --sparsity:
            W = pre-trained weights
            fine-tune W under the mask
            mask = largest(abs(W), as many as this sparsity leaves)

    By default all matrices of the encoder are ranked as one, and that of the pooler with them if the checkpoint has one
    and the task reads it (--rank global, --scope encoder). --scope all adds the word embeddings. Each round begins with
    a fresh task head. (The IMP of tamt.py trains on text, prunes before its first round, and ranks each matrix by
    itself.)

    The last mask has not been evaluated yet: the command that is printed at the end fine-tunes it."""
    start_time = time.time()
    search_settings = fill_in_search(settings)
    check_search_folder(search_settings)
    sparsities = tamt.imp_sparsities(search_settings.sparsity)  # .1, .2, ... up to the one that was asked for
    mask_file = None  # the first round trains the whole network
    rounds = []
    for number, next_sparsity in enumerate(sparsities, 1):
        print(f"round {number} of {len(sparsities)}; after it {100 * next_sparsity:.4g} % are pruned")
        folder = search_settings.out / f"round-{number}"
        round_settings = settings_of_one_run(
            search_settings, mask=mask_file, out=folder, results=None)  # rounds add no lines to --results
        # Each round reads the checkpoint again: the weights are back at their pre-trained values. The schedule begins
        # anew, too. As in BERT-Tickets it is as long as ten rounds, so the learning rate falls by a tenth in each. In
        # the end save_next_mask makes the next mask of the trained weights.
        result = fine_tune_in_search(
            search_settings, round_settings, schedule_stretch=10,
            write_tickets=partial(save_next_mask, sparsity=next_sparsity, search_settings=search_settings))
        # The sparsity of a result is that of the mask under which the round was trained.
        rounds.append({"sparsity": result["sparsity"], "best": result["best"], "final": result["final"]})
        mask_file = str(folder / "mask.pt")
    return finish_search(search_settings, mask_file, {"rounds": rounds}, start_time)


def save_next_mask(training: Training, sparsity: float, search_settings: Settings):
    """At the end of a round: writes the next mask into its folder."""
    masks = next_masks(training, sparsity, search_settings.rank, search_settings.scope)
    save_ticket(training.run.out / "mask.pt", training, masks, {
        "method": "imp", "rank": search_settings.rank, "scope": search_settings.scope})


def next_masks(training: Training, sparsity: float, rank: str, scope: str) -> dict[str, torch.Tensor]:
    """Masks that prune this share of all entries of the matrices: the smallest ones, by their trained values. What is
    pruned already stays so, since it is ranked below all others."""
    magnitudes = {}
    for name in tamt.maskable_layers(training.model, scope):
        is_pooler = name.endswith("pooler.dense.weight")
        if is_pooler and training.model.backbone.pooler.is_fresh:
            continue  # it has no pre-trained weights, and stays dense
        magnitudes[name] = training.parameters[name].detach().abs()
        if name in training.masks:
            magnitudes[name].masked_fill_(~training.masks[name], -1.0)  # below every magnitude
    return tamt.masks_of_largest(magnitudes, sparsity, rank)


def fine_tune_in_search(
    search_settings: Settings, run_settings: Settings, write_tickets, schedule_stretch: int = 1
) -> dict:
    """fine_tune() for a run of a search -> its result. It differs in two ways: the folder is that of the search; and
    write_tickets(training) makes tickets of the trained weights before they are gone."""
    inputs = read_inputs(run_settings, schedule_stretch)
    result, state = open_run_of_search(search_settings, inputs)
    if result is not None:
        return result
    training = prepare_training(inputs, state)
    claim_folders(search_settings, inputs.run)  # the folders now become those of this search
    train(training)
    write_tickets(training)
    return finish(training)  # last: where --resume finds the result, the tickets are there, too


def save_ticket(path, training: Training, masks: dict, origin: dict):
    """Writes a mask file. Its metadata say how it was made; origin: what the caller adds to them."""
    run = training.run
    report = tamt.sparsity_report(training.model, masks)
    meta = {
        "model": run.model,
        "backbone_checksum": run.backbone_checksum,
        "weights": run.weights,
        "seed": run.seed,
        "lr": run.lr,
        "data": tamt.plain(run.data),
        "task": task_names(training.inputs.tasks),
        "sparsity": report["masked_set"],
        # The fractions that are pruned: of the entries that have a mask, of the encoder, of the whole model.
        "found": {name: report[name] for name in ("masked_set", "encoder", "whole_model")},
    }
    tamt.save_mask(path, masks, meta | origin)


# ---------------------------------------------------------------------------------------------------
# 7. Super Tickets: whole attention heads and feed-forward networks (FFNs)
# ---------------------------------------------------------------------------------------------------

# 7a. The search.

# A unit is an attention head or an FFN. An order says which units are cut out first:
#
#     "winning"   the least important ones
#     "losing"    the most important ones
#     "random"    any
#
# With all three, and eight levels each, a search has 25 fine-tunings; the first is that of the whole network.
ORDERS = ("winning", "random", "losing")
LEVELS = range(1, 9)  # level 3 removes at most 3 tenths of all heads, and 3 twelfths of all FFNs


def find_super(settings: Settings) -> dict:
    """Finds Super Tickets (Liang et al. 2021) -> the content of mask.json. In short:

        fine-tune the whole network; measure how important each unit is
        write a ticket, which says what to cut out, for each order and level
        for each ticket of the orders that --orders asks for:
            W = pre-trained weights
            fine-tune W without the units that the ticket cuts out
        of the "winning" tickets, if --orders has them, the best on dev becomes mask.pt

    (The paper calls only that one, the best, the super ticket; here all of them are called so.)"""
    start_time = time.time()
    search_settings = fill_in_search(settings)
    check_search_folder(search_settings)

    # Fine-tune the whole network, and write all tickets.
    dense_settings = settings_of_one_run(search_settings, out=search_settings.out / "dense")
    result_of = {}  # {"dense", or the name of a ticket: its result}
    result_of["dense"] = fine_tune_in_search(
        search_settings, dense_settings, write_tickets=partial(save_super_tickets, folder=search_settings.out))

    # Fine-tune the tickets of the orders that --orders asks for. (Those of the others can be fine-tuned with --mask.)
    for order in search_settings.orders:
        for level in LEVELS:
            name = f"{order}-{level}"
            mask_file = str(search_settings.out / f"{name}.pt")
            result_of[name] = fine_tune(  # an ordinary one, since nothing but its result is needed
                settings_of_one_run(search_settings, mask=mask_file, out=search_settings.out / name))

    first_metric = named_tasks(search_settings)[0].metrics[0]
    curve = report_curve(result_of, first_metric)
    best_file = None
    if "winning" in search_settings.orders:
        winning = [f"winning-{level}" for level in LEVELS]
        best_name = max(winning, key=lambda name: result_of[name]["best"][first_metric])
        best_file = search_settings.out / f"{best_name}.pt"
    return finish_search(search_settings, best_file, {"curve": curve}, start_time)


def save_super_tickets(training: Training, folder: Path):
    """Measures the importance of all units, and writes it, and the tickets of all orders and levels."""
    head_importance, ffn_importance = measure_importance(training)  # (L, H), (L,)
    tamt.write_json(folder / "importance.json", {
        "heads": head_importance.tolist(), "ffn": ffn_importance.tolist()})
    for order in ORDERS:
        for level in LEVELS:
            removed_heads, removed_ffns = choose_units(
                head_importance, ffn_importance, order, level, training.run.seed)
            masks = masks_from_units(training.model.config, removed_heads, removed_ffns)
            save_ticket(folder / f"{order}-{level}.pt", training, masks, {
                "method": "super", "order": order, "level": level})


def report_curve(result_of: dict[str, dict], metric: str) -> list[dict]:
    """How much of the model remains under each ticket (biases count as if all remained), and what it scores. Prints it,
    too."""
    curve = []
    for name, result in result_of.items():
        ticket_meta = result["mask"]  # how the ticket was made (save_ticket), None for "dense"
        pruned = ticket_meta["found"]["whole_model"] if ticket_meta else 0.0  # a fraction
        remaining = 1.0 - pruned
        curve.append({"ticket": name, "remaining": remaining, "best": result["best"], "final": result["final"]})
        print(f"{name:10} {remaining:.1%} of the weights remain  best_{metric}: {result['best'][metric]:.4f}")
    return curve


# 7b. How important units are.


def measure_importance(training: Training) -> tuple[torch.Tensor, torch.Tensor]:
    """How sensitive the loss is to each head (L, H) and each FFN (L,), in eval mode (mt_dnn/inference.py). Let o be the
    output of one head (its context vector) or of one FFN at one token:

        importance = mean over batches ( sum over tokens | sum over dimensions (d loss / d o) * o | )

    The inner sum is, to first order, how much the loss falls if this o is set to 0. The importances of the heads of a
    layer are then divided by their l2 norm, as in the released code, so that every layer has heads that count. Those of
    FFNs stay as they are. (The released code divides all of them by one norm, which leaves their order the same.)"""
    config = training.model.config
    batch_size = training.run.batch_size
    training.model.eval()
    head_importance = torch.zeros(config.num_hidden_layers, config.num_attention_heads)
    ffn_importance = torch.zeros(config.num_hidden_layers)
    num_examples = len(training.encoded_tasks[0].train_sequences)
    batches = [range(start, min(start + batch_size, num_examples)) for start in range(0, num_examples, batch_size)]
    for indices in batches:
        of_heads, of_ffns = importance_in_batch(training, indices)
        head_importance += of_heads / len(batches)
        ffn_importance += of_ffns / len(batches)
    norms = head_importance.norm(dim=1, keepdim=True)
    return head_importance / (norms + 1e-20), ffn_importance


def importance_in_batch(training: Training, indices: range) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over the tokens of one batch -> (L, H) for heads, (L,) for FFNs."""
    [encoded_task] = training.encoded_tasks
    num_heads = training.model.config.num_attention_heads
    with recorded_outputs(training.model) as (contexts, ffn_outputs):
        loss = batch_loss(training, encoded_task, indices)
    gradients = torch.autograd.grad(loss, [*contexts, *ffn_outputs])  # 2 L times (B, T, D)
    context_gradients = gradients[:len(contexts)]
    ffn_gradients = gradients[len(contexts):]

    of_heads = []
    for context, gradient in zip(contexts, context_gradients, strict=True):
        product = (context.float() * gradient.float()).detach()  # (B, T, D)
        head_products = product.unflatten(-1, (num_heads, -1)).sum(-1)  # (B, T, H)
        of_heads.append(head_products.abs().sum((0, 1)).cpu())
    of_ffns = []
    for output, gradient in zip(ffn_outputs, ffn_gradients, strict=True):
        ffn_products = (output.float() * gradient.float()).detach().sum(-1)  # (B, T)
        of_ffns.append(ffn_products.abs().sum().cpu())
    return torch.stack(of_heads), torch.stack(of_ffns)


@contextmanager
def recorded_outputs(model):
    """Inside the with block a forward pass of the model fills two lists, with a tensor (B, T, D) for each layer: the
    context vectors of all heads, side by side, and the output of the FFN."""
    contexts = []
    ffn_outputs = []
    hooks = []
    for layer in model.backbone.encoder.layer:
        # What the output matrix of the attention reads: the context vectors.
        hooks.append(layer.attention.output.dense.register_forward_pre_hook(
            lambda module, arguments: contexts.append(arguments[0])))
        # What the second matrix of the FFN gives, before dropout and the residual.
        hooks.append(layer.output.dense.register_forward_hook(
            lambda module, arguments, output: ffn_outputs.append(output)))
    try:
        yield contexts, ffn_outputs
    finally:
        for hook in hooks:
            hook.remove()


# 7c. Which units go, and tickets that say so.


def choose_units(head_importance, ffn_importance, order: str, level: int, seed: int):
    """Which units an order removes on a level: (L, H), (L,) -> removed_heads (L, H), removed_ffns (L,), bool.

    All levels sort the units alike. Then each removes the first of them: int(L H level / 10) heads, but no more than
    L (H - 1), and int(L level / 12) FFNs. So each level removes all that the one below removes. The head that would be
    the last of its layer to go always stays."""
    generator = data.random_stream(seed, "tickets")  # draws the same on every level, so random tickets are nested, too
    num_layers, num_heads = head_importance.shape
    # Units are removed in the order of their keys, the smallest first.
    if order == "random":
        head_keys = generator.random(head_importance.shape)
        ffn_keys = generator.random(ffn_importance.shape)
    else:
        sign = {"winning": 1, "losing": -1}[order]
        head_keys = sign * head_importance.numpy()  # a new array, which is written to below
        ffn_keys = sign * ffn_importance.numpy()

    head_keys[np.arange(num_layers), head_keys.argmax(axis=1)] = np.inf  # of each layer the head that would go last
    num_heads_removed = min(num_layers * num_heads * level // 10, num_layers * (num_heads - 1))
    return mark_smallest(head_keys, num_heads_removed), mark_smallest(ffn_keys, num_layers * level // 12)


def mark_smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """True at the `count` smallest keys; of equal ones the first."""
    chosen = np.zeros(keys.size, bool)
    chosen[np.argsort(keys, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(keys.shape)


def masks_from_units(config, removed_heads, removed_ffns) -> dict[str, torch.Tensor]:
    """removed_heads (L, H), removed_ffns (L,) -> the masks of the six matrices of each layer. A head has rows in query,
    key and value, and columns in the output matrix, which reads its context vector.

    So a Super Ticket is stored as a mask file like any other. units_from_masks() gets the units back.

    Biases have no masks. For heads this makes no difference: whatever the biases make of a context vector, the columns
    of the output matrix that read it are masked. But a masked FFN would still add its output bias. So where a Super
    Ticket is applied, the FFNs that it removes are skipped as a whole. (tamt.py cannot do that, and refuses to evaluate
    or export one.)"""
    D = config.hidden_size
    head_size = D // config.num_attention_heads
    masks = {}
    for index in range(config.num_hidden_layers):
        layer = f"{config.model_type}.encoder.layer.{index}"
        kept_dims = torch.from_numpy(np.repeat(~removed_heads[index], head_size))  # (D,) of the context vectors
        for name in ("query", "key", "value"):
            masks[f"{layer}.attention.self.{name}.weight"] = kept_dims[:, None].repeat(1, D)  # whole rows
        masks[f"{layer}.attention.output.dense.weight"] = kept_dims.repeat(D, 1)  # whole columns
        is_kept = not removed_ffns[index]
        masks[f"{layer}.intermediate.dense.weight"] = torch.full((config.intermediate_size, D), is_kept)
        masks[f"{layer}.output.dense.weight"] = torch.full((D, config.intermediate_size), is_kept)
    return masks


def units_from_masks(config, ticket: Ticket):  # -> (L, H), (L,) bool
    """The units that the masks of a Super Ticket remove, the reverse of masks_from_units(). Raises ValueError if the
    masks are not made of whole units."""
    head_size = config.hidden_size // config.num_attention_heads
    removed_heads = []
    removed_ffns = []
    for index in range(config.num_hidden_layers):
        layer = f"{config.model_type}.encoder.layer.{index}"
        first_row = ticket.masks[f"{layer}.attention.output.dense.weight"][0]
        removed_heads.append(~first_row[::head_size].numpy())  # the first entry of each head
        removed_ffns.append(not ticket.masks[f"{layer}.output.dense.weight"].any())
    removed_heads = np.stack(removed_heads)
    removed_ffns = np.array(removed_ffns)

    expected = masks_from_units(config, removed_heads, removed_ffns)
    is_whole = ticket.masks.keys() == expected.keys()
    is_whole = is_whole and all(torch.equal(ticket.masks[name], expected[name]) for name in expected)
    leaves_no_head = removed_heads.all(axis=1).any()  # in some layer
    if leaves_no_head or not is_whole:
        raise ValueError(f"{ticket.file}: a Super Ticket takes out whole heads, not all of a layer, and whole "
                         "feed-forward networks")
    return removed_heads, removed_ffns


# 7d. How a Super Ticket is applied.


def cut_out_units(model, removed_heads, removed_ffns):
    """Cuts heads, (L, H), and FFNs, (L,), out of the network: matrices become smaller, and the logits are what they
    would be if the units gave zeros."""
    for index, layer in enumerate(model.backbone.encoder.layer):
        attention = layer.attention.self
        kept_dims = torch.from_numpy(np.repeat(~removed_heads[index], attention.head_size))  # (D,)
        attention.kept_dims = kept_dims  # the export (appendix A) fills zeros in where rows are gone
        for linear in (attention.query, attention.key, attention.value):  # bert.py infers the heads from their rows
            linear.weight = nn.Parameter(linear.weight.data[kept_dims])
            linear.bias = nn.Parameter(linear.bias.data[kept_dims])
        output_matrix = layer.attention.output.dense
        output_matrix.weight = nn.Parameter(output_matrix.weight.data[:, kept_dims])
        if removed_ffns[index]:
            layer.output.is_skipped = True
            layer.output.dense = None  # so the layer keeps only the residual and the LayerNorm of its FFN
            layer.intermediate = nn.Identity()  # its output is not read any more


# ---------------------------------------------------------------------------------------------------
# 8. Several tasks, one backbone
# ---------------------------------------------------------------------------------------------------


@dataclass
class TaskParts:
    """What each of several tasks has of its own. Everything else of the model serves all of them."""
    task_head: nn.Module  # a classifier
    masks: dict[str, torch.Tensor]  # its ticket; {} without tickets
    skipped_ffns: list[bool]  # (L,) whether its ticket takes the FFN of a layer out


def add_several_task_heads(model: bert.Model, tasks: list[glue_squad.Task]):
    """A classifier for each of several tasks."""
    model.task_heads = nn.ModuleList()  # so that all of them are among the model's parameters
    for task in tasks:
        model.add_classifier(task.num_outputs)  # in the place of the one before
        model.task_heads.append(model.classifier)
    del model.classifier  # TaskSwitch.select() puts one of them back


class TaskSwitch:
    """Ticket sharing (Liang et al. 2021): one backbone, a task head for each task, every batch under its task's ticket.

    As in tamt.py, masked layers multiply the weights by masks, here by those of the ticket of the batch. No weight is
    set to 0. In a batch of one task

        a weight that its ticket prunes has a gradient of 0: AdamW's momentum, from batches of tasks that keep the
        weight, still moves it a little
        an FFN that its ticket skips, and the other task heads, have no gradient: AdamW leaves them alone. (The
        count of their updates, on which eps depends, is then too high, which matters little.)"""

    def __init__(self, model: bert.Model, tasks: list[glue_squad.Task], tickets: list[Ticket]):
        """model: with its task heads. tickets: none, or one for each task."""
        self.model = model
        self.selected = None  # the name of a task
        self.masked_layers = {}  # {name of a matrix: its layer, with a mask}; without tickets there are none
        if tickets:
            self.masked_layers = tamt.install_masked_layers(model)

        device = next(model.parameters()).device
        self.parts = {}  # {name of a task: its parts}
        for index, task in enumerate(tasks):
            masks = {}
            skipped_ffns = [False] * model.config.num_hidden_layers
            if tickets:
                ticket = tickets[index]
                masks = {name: mask.to(device) for name, mask in ticket.masks.items()}
                if ticket.is_super:
                    _, removed_ffns = units_from_masks(model.config, ticket)
                    skipped_ffns = removed_ffns.tolist()
            self.parts[task.name] = TaskParts(model.task_heads[index], masks, skipped_ffns)

    def select(self, task: glue_squad.Task):
        """From now on the model serves this task: with its task head, its masks, and the FFNs that its ticket keeps."""
        if task.name == self.selected:
            return
        self.selected = task.name
        parts = self.parts[task.name]
        self.model.classifier = parts.task_head
        if self.masked_layers:
            tamt.set_masks(self.masked_layers, parts.masks)
            for layer, is_skipped in zip(self.model.backbone.encoder.layer, parts.skipped_ffns, strict=True):
                # To mask an FFN is not enough: its output bias would still be added.
                layer.output.is_skipped = is_skipped


def select_task(training: Training, task: glue_squad.Task):
    """Called before the model computes for a task, or is exported: if there are several, switches it to this one."""
    if training.task_switch is not None:
        training.task_switch.select(task)


# ---------------------------------------------------------------------------------------------------
# Appendix A: what differs; ablations, states, records, predictions, export. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------

# The released code is that of TAMT (glue_trans.py, squad_trans.py), for IMP that of BERT-Tickets (Chen et al. 2020,
# LT_glue.py), and for Super Tickets and several tasks that of Liang et al. 2021 (mt_dnn). Under an ordinary ticket
# AdamW does bit for bit what it does under torch's prune.custom_from_mask, which TAMT's code uses. What differs:
#
#     |                  | released                             | here
#     | batches          | random examples, padded to max_len   | examples of like length, padded to the longest
#     | evaluation       | every N updates                      | also after each epoch, and so after the last update
#     | best step, MRPC  | by max(accuracy, mean of it and F1)  | by accuracy
#     | best step, MNLI  | by mismatched accuracy, as "acc"     | by matched accuracy; both have names of their own
#     | SQuAD, training  | answers become whole words where no  | answers are found by their characters
#     |                  | tokens spell them (0.2 %)            |
#     | SQuAD, loss      | padding takes part in the softmax    | it does not
#     | SQuAD, answers   | from the 20 best starts and ends of  | from the 20 best starts and ends in the paragraph
#     |                  | a window, question included; their   |
#     |                  | text may grow to whole words         |
#     | IMP rounds       | keep the task head                   | begin with a fresh one
#     |                  | go on in the order of examples       | all have the same order and dropout
#     |   on SQuAD       | 4 epochs each, the pooler is ranked  | 2 epochs each, no pooler
#     | Super Tickets    | Adamax, warm-up, decay .01, lr 5e-5, | AdamW, lr 2e-5 and 3 epochs, as in any fine-tuning
#     |                  | 3 or 6 epochs                        | on GLUE
#     |   importance     | gradients of batches add up; that of | each batch counts once; that of FFNs is not
#     |                  | FFNs is divided by its norm          | (their order is the same)
#     |   random tickets | drawn with replacement               | without
#     | --weights        | shuffled: whole layers change places | the entries of each matrix do


def replace_weights(model, kind: str, seed: int):
    """The ablations of BERT-Tickets: is it the mask that counts, or the pre-trained weights below it? A seed draws the
    same weights whether a fresh pooler was drawn before or not, and task heads are the same as without an ablation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "random":
            fresh = bert.Model(model.config, with_mlm_head=False)  # with a pooler, whether the model has one or not
            model.backbone.load_state_dict(fresh.backbone.state_dict(), strict=False)  # the model may have no pooler
        if kind == "shuffled":
            for layer in tamt.maskable_layers(model, "encoder").values():
                weight = layer.weight.data
                order = torch.randperm(weight.numel())
                layer.weight.data = weight.flatten()[order].view(weight.shape)


def restore_state(training: Training, state: dict):
    file = training.run.out / "state.pt"
    tamt.restore_parameters(training.parameters, training.optimizer, state, file)
    with tamt.damage_named(file):
        training.updates_done = state["step"]
        training.loss_since_evaluation = float(state["total_loss"])
        training.history = [dict(evaluation) for evaluation in state["history"]]
    if not 0 <= training.updates_done <= training.num_updates:
        raise ValueError(f"{file}: damaged (step {training.updates_done}); remove it to start anew")


def save_state(training: Training):
    tamt.write_torch(training.run.out / "state.pt", {
        "format": 2,
        "settings": training.inputs.identity,  # open_run() compares them
        "step": training.updates_done,
        "history": training.history,
        "total_loss": training.loss_since_evaluation,  # under the name that earlier versions gave it
        "parameters": {name: parameter.data for name, parameter in training.parameters.items()},
        "optimizer": training.optimizer.state_dict(),
    })


def make_result(training: Training, best: dict, final: dict, floor: dict) -> dict:
    run = training.run
    inputs = training.inputs
    metric_names = list(floor)  # all metrics, the main one first; best and final hold "step" and "loss", too
    # Not the masks themselves, but how they were made: a dict or None, and of several tasks a list.
    metas = [ticket.meta for ticket in inputs.tickets]
    if len(inputs.tasks) == 1:
        metas = metas[0] if metas else None
    return {
        "task": task_names(inputs.tasks),
        "model": run.model,
        "mask": metas,
        "sparsity": inputs.identity["sparsity"],  # removed share of the entries that have a mask
        "seed": run.seed,
        "best": {name: best[name] for name in metric_names},
        "final": {name: final[name] for name in metric_names},
        "best_step": best["step"],
        "steps": final["step"],
        "floor": floor,
        "written": written_files(inputs),  # hashes, which --resume compares
        "seconds": round(time.time() - inputs.start_time, 1),
        "command": run.command,
        "settings": inputs.identity | {"data": tamt.plain(run.data)},
        "device": str(run.machine.device),
        "threads": torch.get_num_threads(),
        "versions": tamt.versions(),
        "evaluations": training.history,
    }


class Progress:
    """A line for each evaluation, with the time that is left. (A slow run has shorter lines in between.)"""

    def __init__(self, step: int, num_updates: int):
        self.first_step = step
        self.num_updates = num_updates
        self.began = time.time()
        self.shown_at = self.began  # when the terminal had its last line

    def show_evaluation(self, evaluation: dict):
        values = [f"{name} {value:.4f}" for name, value in evaluation.items() if name != "step"]
        self.show(evaluation["step"], values)

    def show_time_left(self, step: int):
        if time.time() - self.shown_at > tamt.SHOW_SECONDS:
            self.show(step, [])

    def show(self, step: int, values: list[str]):
        seconds_per_update = (time.time() - self.began) / max(step - self.first_step, 1)
        time_left = tamt.minutes_and_seconds(seconds_per_update * (self.num_updates - step))
        print("  ".join([f"step {step}/{self.num_updates}", *values, f"ETA {time_left}"]), flush=True)
        self.shown_at = time.time()


def append_to_results(run, result: dict, is_resumed: bool = False):
    """Adds the line of a finished run to --results exactly once, even if the program is killed in between: a run that
    is resumed may have added it already."""
    line = {name: value for name, value in result.items() if name != "evaluations"}
    is_recorded = False
    if is_resumed and run.results is not None and run.results.is_file():
        is_recorded = json.dumps(line).encode() in run.results.read_bytes()
    if run.results is not None and not is_recorded:
        data.append_line(run.results, line)


def complete_finished_run(inputs: Inputs, result: dict):
    """--resume of a run that is finished: adds its line to --results if that was left to do, and raises ValueError if
    it has not written what is asked for now."""
    run = inputs.run
    if not {"task", "best", "final", "floor", "seconds", "sparsity", "mask", "evaluations"} <= result.keys():
        raise ValueError(f"{run.out / 'result.json'}: not a result of this version; remove it to start anew")
    if (run.out / "state.pt").exists():  # killed just before the end
        append_to_results(run, result, is_resumed=True)
        (run.out / "state.pt").unlink()
    written = result.get("written")
    for name, hashes in written_files(inputs).items():
        if not isinstance(written, dict) or written.get(name) != hashes:
            raise ValueError(f"{run.out} is finished, its model gone, and what --{name} asks for is not there as this "
                             "run would write it: run it again, without --resume")


def written_files(inputs: Inputs) -> dict[str, list]:
    """Hashes of the predictions, if --predict asks for them, and of the test texts; and of the exported weights, if
    --export does: {"predict": [...], "export": [...]}. None stands for weights that are missing."""
    run = inputs.run
    written = {}
    if run.predict:
        files = [run.out / name for task in inputs.tasks for name in prediction_files(task).values()]
        files = sorted(file for file in files if file.is_file())
        texts = [inputs.examples[task.name].get(split) for task in inputs.tasks for split in ("test", "test_mm", "ax")]
        written["predict"] = [digest(texts), *[data.file_sha256(file) for file in files]]
    if run.export:
        files = [folder / "model.safetensors" for folder in export_folders(run, inputs.tasks)]
        written["export"] = [data.file_sha256(file) if file.is_file() else None for file in files]
    return written


def print_summary(result: dict):
    """Lines for people and for grep."""
    print("---")
    print(f"task: {result['task']}")
    print(f"sparsity: {result['sparsity']:.4f}")
    for kind in ("best", "final", "floor"):
        for name, value in result[kind].items():
            print(f"{kind}_{name}: {value:.4f}")
    print(f"seconds: {result['seconds']:.4f}")


def write_predictions(training: Training, encoded_task: EncodedTask):
    """GLUE's table for each test file, or SQuAD's JSON for dev, by the model after its last update."""
    run = training.run
    task = encoded_task.task
    for split, name in prediction_files(task).items():
        if split not in encoded_task.examples:
            continue
        sequences = encoded_task.dev_sequences.get(split)
        if sequences is None:
            sequences = glue_squad.encode(encoded_task.examples[split], training.inputs.vocabulary, run.max_len)
        predictions = to_predictions(encoded_task, predict_logits(training, encoded_task.task, sequences))
        glue_squad.write_submission(task, predictions, run.out / name)
        print(f"{run.out / name}: {len(predictions):,} predictions")


def prediction_files(task) -> dict[str, str]:
    """{split: name of the file that --predict writes for it}"""
    if task.predicts == "span":
        return {"dev": "predictions.json"}
    if task.name == "mnli":
        return glue_squad.SUBMISSION_FILES
    return {"test": f"{task.folder}.tsv"}


def export_model(training: Training, encoded_task: EncodedTask):
    """Writes what transformers' AutoModelForSequenceClassification or AutoModelForQuestionAnswering loads."""
    model = training.model
    task = encoded_task.task
    architecture = "ForQuestionAnswering"
    extra = {}
    if task.predicts != "span":
        architecture = "ForSequenceClassification"
        labels = task.labels or ("score",)
        extra["id2label"] = dict(enumerate(labels))
        extra["label2id"] = {label: index for index, label in enumerate(labels)}
    if task.predicts == "number":
        extra["problem_type"] = "regression"
    select_task(training, task)
    folder = training.run.export
    if len(training.encoded_tasks) > 1:
        folder = folder / task.name
    bert.save(folder, model.config, full_size_tensors(model), architecture, **extra)
    config = model.config
    vocabulary = training.inputs.vocabulary
    data.save_vocabulary(vocabulary, folder, config.model_type, config.max_tokens, config.type_vocab_size)


def full_size_tensors(model) -> dict[str, torch.Tensor]:
    """The tensors in the sizes of the config, with zeros where weights and units are gone: transformers 5 does
    not read pruned_heads from a config any more."""
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith("task_heads."):
            tensors[name] = parameter.data
    for name, layer in model.named_modules():
        if isinstance(layer, tamt.MaskedLayer):  # tasks share the backbone
            tensors[f"{name}.weight"] = layer.weight.data * layer.mask
        if isinstance(layer, bert.DenseAddNorm) and layer.is_skipped and layer.dense is not None:
            tensors[f"{name}.dense.bias"] = torch.zeros_like(layer.dense.bias)  # what skips the FFN skips its bias

    with torch.device("meta"):
        full = bert.Backbone(model.config, model.has_pooler)
    for name, expected in full.named_parameters(prefix=model.config.model_type):
        if name in tensors and tensors[name].shape == expected.shape:
            continue
        filled = torch.zeros(expected.shape)
        if name in tensors:  # a head is gone: its rows in query, key, value, its columns in the output
            layer = model.backbone.encoder.layer[int(name.split(".")[3])]
            kept_dims = layer.attention.self.kept_dims
            if ".output." in name:
                filled[:, kept_dims] = tensors[name].cpu()
            else:
                filled[kept_dims] = tensors[name].cpu()
        tensors[name] = filled
    return tensors


def export_folders(run, tasks: list) -> list[Path]:
    if not run.export:
        return []
    if len(tasks) == 1:
        return [Path(run.export)]
    return [Path(run.export) / task.name for task in tasks]


def task_names(tasks: list[glue_squad.Task]) -> str:
    return ",".join(task.name for task in tasks)


# ---------------------------------------------------------------------------------------------------
# Appendix B: settings, folders, and the command line. Skip it at a first reading.
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user can choose: a field is a flag of the command line. None: the task, the tickets or fill_in_defaults()
    choose, or nothing is chosen."""
    task: str = option("sst2", f"{', '.join(glue_squad.TASKS)}; toy, which is made up for the model toy; or the "
                       "FILE.json of a task of your own; several, with commas, share a backbone", required=True)
    mask: str | None = option(None, "mask file or folder of a run, for several tasks one each; without it the dense "
                              "model is fine-tuned")
    model: str | None = option(None, "name or path of the checkpoint (the one the mask's metadata names; toy)")
    data: Path | None = option(None, "folder with GLUE's folders, train-v1.1.json, dev-v1.1.json (downloaded)",
                               type=Path)
    find: str | None = option(None, "look for a ticket on the task: by iterative magnitude pruning, or of whole heads "
                              "and feed-forward networks", choices=["imp", "super"])
    sparsity: float | None = option(None, "--find imp: fraction of weights to REMOVE (0.7)", "fraction", type=float)
    rank: str | None = option(None, "--find imp: where entries compete (global)", choices=["global", "local"])
    scope: str | None = option(None, "--find imp: all adds the word embeddings (encoder)", choices=["all", "encoder"])
    orders: tuple | None = option(None, "--find super: tickets to try (all three)", nargs="+", choices=ORDERS)
    weights: str = option("pretrained", "below the task head: random draws them, shuffled permutes each matrix "
                          "but the embeddings (pretrained)", choices=["pretrained", "random", "shuffled"])
    epochs: int | None = option(None, "passes over the training set (GLUE 3, SQuAD 2, several tasks 5; toy 6)",
                                "positive", type=int)
    batch_size: int | None = option(None, "examples per update (GLUE 32, SQuAD 16)", "positive", type=int)
    max_len: int | None = option(None, "tokens per example (GLUE 128, SQuAD 384; toy 128)", "positive", type=int)
    lr: float | None = option(None, "learning rate at the start (GLUE 2e-5, SQuAD 3e-5, several tasks 5e-5; toy 1e-3)",
                              "positive", type=float)
    seed: int = option(1, "of task head, order, dropout, --limit, --weights, random tickets (1)", "seed", type=int)
    limit: int | None = option(None, "train on this many random examples; SQuAD: windows (all)", "positive", type=int)
    eval_every: int | None = option(None, "updates between evaluations, besides the end of each epoch (50; MNLI, QQP "
                                    "and QNLI 500, SQuAD 1000)", "positive", type=int)
    device: str = option("auto", "where to compute (auto)", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option("auto", "of the forward pass (auto)", choices=["auto", "fp32", "bf16"])
    out: Path | None = option(None, "folder of the run (out/TASK-MASK-sSEED-...)", type=Path)
    results: Path | None = option(Path("results.jsonl"), "gets one line per run; of --find super one per ticket and "
                                  "one of the whole model, of --find imp none (results.jsonl)", type=Path)
    resume: bool = option(False, "continue the run in --out exactly where it stopped")
    predict: bool = option(False, "write GLUE's submission file, or SQuAD's of dev, into --out")
    export: Path | None = option(None, "write the fine-tuned model for transformers", type=Path, metavar="DIR")

    def __post_init__(self):
        tamt.check_settings(self)
        names = split_per_task(self.task, self)
        tasks = named_tasks(self)
        if len(names) > 1:
            is_repeated = (len({task.name for task in tasks}) < len(tasks)
                           or len({(task.folder, str(task.files)) for task in tasks}) < len(tasks))  # toy is an SST-2
            if is_repeated or any(task.predicts == "span" for task in tasks):
                raise ValueError("--task: tasks that share a backbone are different ones with different names, without "
                                 "squad")
            num_masks = len(split_per_task(self.mask or "", self))
            if self.mask and num_masks != len(names):
                raise ValueError(f"--mask: {num_masks} files for {len(names)} tasks; expected one for each")
        if self.find and (len(names) > 1 or self.mask or self.predict or self.export):
            raise ValueError("--find goes with one --task and without --mask, --predict and --export")
        for name, find in (("sparsity", "imp"), ("rank", "imp"), ("scope", "imp"), ("orders", "super")):
            if getattr(self, name) is not None and self.find != find:
                raise ValueError(f"--{name} goes with --find {find}")
        if self.results is not None:
            results = Path(self.results)
            is_file = results.is_file() or not results.exists() or str(results) == os.devnull
            if not is_file or not results.absolute().parent.is_dir():
                raise ValueError(f"--results {self.results}: expected a file in a folder that exists")
        for folder in export_folders(self, tasks):
            tamt.check_new_folder("--export", folder)


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """The settings of one run, with the defaults filled in (the folder comes last, see read_inputs)."""
    machine: tamt.Machine
    checkpoint: str  # a checksum of the pre-trained weights
    backbone_checksum: str  # the same without heads: a mask belongs to these weights
    config: str  # a checksum of config.json
    schedule_stretch: int  # as in read_inputs
    command: str


# In place of the paper's defaults: the toy's model is small.
TOY = {"epochs": 6, "lr": 1e-3, "max_len": 128}


def split_per_task(text: str, settings) -> list[str]:
    """Several tasks, or masks, are separated by commas."""
    text = str(text)  # from Python it may be a Path
    if "," not in str(settings.task) or Path(settings.task).is_file():
        return [text] if text else []
    names = [name.strip() for name in text.split(",")] if text else []
    if "" in names:
        raise ValueError(f"--task, --mask: an empty name in {text!r}")
    return names


def named_tasks(settings) -> list[glue_squad.Task]:
    return [glue_squad.find_task(name) for name in split_per_task(settings.task, settings)]


def choose_model_name(settings, tickets: list[Ticket]) -> str:
    """--model, or the model that the masks were made for."""
    if settings.model:
        return settings.model
    if not tickets:
        return "toy"  # the small model for a first try
    for ticket in tickets:
        if not ticket.meta.get("model"):
            raise ValueError(f"{ticket.file} does not say which model it belongs to: --model is needed")
    names = sorted({str(ticket.meta["model"]) for ticket in tickets})
    if len(names) > 1:
        raise ValueError(f"--mask: tickets of different models, {', '.join(names)}: --model is needed")
    return names[0]


def fit_tickets_to_model(tickets: list[Ticket], model: bert.Model, settings: Settings):
    """Puts the masks of each ticket in the order of the model's weights, with their full names. Raises ValueError if a
    ticket belongs to another network, and prints a note if it was found on other weights."""
    layers = tamt.maskable_layers(model)
    for ticket in tickets:
        ticket.masks = tamt.fit_masks(layers, ticket.masks, ticket.file)
        if ticket.is_super:
            units_from_masks(model.config, ticket)  # ValueError if it does not prune whole units
        tamt.say_if_weights_differ(ticket.meta, tamt.weights_checksum(model.backbone), ticket.file)
        tamt.say_if_ablation_differs(ticket.meta, ticket.file, settings.weights, settings.seed)


def fill_in_defaults(settings: Settings, machine, tasks: list, model_name: str, model, schedule_stretch: int) -> Run:
    """Fills in what the settings leave open, from the task, the toy, and the model."""
    values = {each.name: getattr(settings, each.name) for each in fields(Settings)}
    # Numbers of numpy become plain ones.
    values |= {name: float(value) for name, value in values.items() if isinstance(value, float)}
    for name in ("data", "out", "results", "export"):  # from Python they may be text
        if values[name] is not None:
            values[name] = Path(values[name])
    values["model"] = tamt.absolute_model(model_name)
    for folder in export_folders(settings, tasks):
        tamt.refuse_own_folder(values["model"], folder)

    values |= schedule_of(settings, tasks, values["model"])

    positions = model.config.max_tokens
    if settings.max_len is None and values["max_len"] > positions:
        print(f"--max-len {positions}: {values['model']} has no more positions")
        values["max_len"] = positions
    if not 6 <= values["max_len"] <= positions:
        raise ValueError(f"--max-len {values['max_len']}: expected 6 to {positions} tokens, the positions of "
                         f"{values['model']}")
    words = ["python", *sys.argv] if sys.argv and sys.argv[0] else ["python"]
    return Run(**values, machine=machine, checkpoint=tamt.weights_checksum(model),
               backbone_checksum=tamt.weights_checksum(model.backbone), config=tamt.config_checksum(model),
               schedule_stretch=schedule_stretch, command=shlex.join(words))


def schedule_of(settings: Settings, tasks: list, model_name: str) -> dict:
    """epochs, batch_size, max_len, lr and eval_every: as asked for; or else the toy's, or those of ticket sharing, or
    those of the (first) task."""
    task = tasks[0]
    schedule = {name: getattr(task, name) for name in ("epochs", "batch_size", "max_len", "lr", "eval_every")}
    if len(tasks) > 1:  # ticket sharing's own
        schedule |= {"epochs": 5, "lr": 5e-5, "eval_every": max(each.eval_every for each in tasks)}
    if model_name == "toy":
        schedule |= TOY
    for name in schedule:
        if getattr(settings, name) is not None:
            schedule[name] = getattr(settings, name)
    return schedule


def fill_in_search(settings: Settings) -> Settings:
    """The settings of a search, with its defaults filled in."""
    values = {"model": settings.model or "toy"}
    if settings.find == "imp":
        values["sparsity"] = 0.7 if settings.sparsity is None else settings.sparsity
        values["rank"] = settings.rank or "global"
        values["scope"] = settings.scope or "encoder"
        kind = f"imp-{values['sparsity']:g}"
    else:
        chosen = settings.orders or ORDERS
        values["orders"] = tuple(order for order in ORDERS if order in chosen)
        kind = "super"
    if settings.data is not None:
        values["data"] = Path(os.path.abspath(settings.data))
    task = named_tasks(settings)[0]
    values["task"] = str(settings.task)
    if task.name not in {*glue_squad.TASKS, "toy"}:
        values["task"] = os.path.abspath(settings.task)
    values["model"] = tamt.absolute_model(values["model"])
    name = f"{task.name}-{Path(values['model']).name}-{kind}-s{settings.seed}"
    values["out"] = Path(settings.out or Path("out", name))
    return replace(settings, **values)


def check_search_folder(settings: Settings):
    """Raises ValueError if the folder holds something else, or an unfinished search without --resume. Removes the files
    that a killed one has left half-written."""
    identity = search_identity(settings)
    if (settings.out / "result.json").exists():
        raise ValueError(f"{settings.out} holds another run (a fine-tuning): choose another --out, or remove that "
                         "folder")
    # mask.json says which search is finished, and until it is there search.json says which one the rounds belong to.
    is_finished = (settings.out / "mask.json").exists()
    tamt.check_folder(settings.out, identity, "mask.json" if is_finished else "search.json")
    is_begun = any(settings.out.glob("*/result.json")) or any(settings.out.glob("*/state.pt"))
    if is_begun and not is_finished and not settings.resume and (settings.out / "search.json").exists():
        raise ValueError(f"{settings.out} holds this search, unfinished: continue with --resume, or choose another "
                         "--out, or remove that folder")
    for part in settings.out.glob(f"*{bert.PART_SUFFIX}"):  # what a killed search was writing
        part.unlink(missing_ok=True)


def open_run_of_search(search_settings: Settings, inputs: Inputs) -> tuple[dict | None, dict | None]:
    """open_run() for a run of a search. If an earlier one was killed before its result was written, its mask goes,
    which is made again."""
    folder = inputs.run.out
    is_begun = (search_settings.out / "search.json").exists()  # and of this search, as check_search_folder has seen
    is_of_tamt = (folder / "mask.json").exists()  # a run of a search writes none
    if is_begun and not is_of_tamt and not (folder / "result.json").exists():
        (folder / "mask.pt").unlink(missing_ok=True)  # else open_run() would take it for the mask of something else
    return open_run(inputs)


def claim_folders(search_settings: Settings, run: Run):
    """Writes into the folder of a search which one it holds. Removes the old mask of this run, and, without --resume,
    the results of an earlier search that was finished there. This is called as late as possible, so that an error
    before costs an earlier search no more than its first result."""
    (run.out / "mask.pt").unlink(missing_ok=True)
    out = search_settings.out
    if (out / "mask.json").exists() and not search_settings.resume:
        for name in names_of_runs(search_settings):
            (out / name / "result.json").unlink(missing_ok=True)
        (out / "mask.pt").unlink(missing_ok=True)
        (out / "mask.json").unlink()  # last, so that a kill in between is noticed
    tamt.write_json(search_settings.out / "search.json", {"settings": search_identity(search_settings)})


def names_of_runs(search_settings: Settings) -> list[str]:
    """The folders of its runs, inside that of the search."""
    if search_settings.find == "imp":
        return [f"round-{number}" for number, _ in enumerate(tamt.imp_sparsities(search_settings.sparsity), 1)]
    return ["dense", *[f"{order}-{level}" for order in search_settings.orders for level in LEVELS]]


def settings_of_one_run(settings: Settings, **changes) -> Settings:
    """The settings of one run of a search."""
    return replace(settings, find=None, sparsity=None, rank=None, scope=None, orders=None, **changes)


def finish_search(search_settings, mask_file, story: dict, start_time: float) -> dict:
    """Copies the mask file that was found to mask.pt, and writes mask.json with the story of the search. mask_file:
    None if there is none."""
    chosen_file = search_settings.out / "mask.pt"
    content = {"settings": search_identity(search_settings), **story}
    print("---")
    print(f"task: {named_tasks(search_settings)[0].name}")
    if mask_file is not None:
        masks, meta = tamt.read_mask(mask_file)
        tamt.save_mask(chosen_file, masks, meta)
        content["meta"] = meta
        print(f"mask: {chosen_file}")
        print(f"sparsity: {meta['sparsity']:.4f}")
    else:
        print("no mask.pt: it would be the best of the winning tickets, and --orders leaves them out")
    tamt.write_json(search_settings.out / "mask.json", content)
    print(f"seconds: {time.time() - start_time:.4f}")
    if mask_file is not None:
        words = ["python", "finetune.py", "--task", search_settings.task, "--mask", str(chosen_file)]
        print(f"next: {shlex.join(words + fine_tuning_flags(search_settings))}")
    return content


def fine_tuning_flags(settings: Settings) -> list[str]:
    """The flags of a search that differ from the defaults, and that a fine-tuning has, too."""
    words = []
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if setting.name in FINE_TUNING_SETTINGS and value != setting.default:
            words += [f"--{setting.name.replace('_', '-')}", str(value)]
    return words


FINE_TUNING_SETTINGS = ("data", "weights", "epochs", "batch_size", "max_len", "lr", "seed", "limit", "eval_every",
                        "device", "dtype")


def search_identity(settings) -> dict:
    """What makes this search this search; its runs compare texts and weights, too. Defaults count as if they were given
    by hand."""
    names = ("task", "model", "find", "sparsity", "rank", "scope", "orders", "weights", "epochs", "batch_size",
             "max_len", "lr", "seed", "limit", "eval_every")
    values = {name: getattr(settings, name) for name in names}
    values |= schedule_of(settings, named_tasks(settings), settings.model)
    identity = {name: tamt.plain(value) for name, value in values.items()}
    identity["dtype"] = "bf16" if tamt.uses_bf16(tamt.choose_device(settings.device), settings.dtype) else "fp32"
    return identity


def task_folder(task, run) -> Path:
    """Where the files of a task are: the folder of a task of one's own, --data, the toy's tasks, or the cache, after a
    download."""
    if run.data is not None and not run.data.is_dir():
        raise FileNotFoundError(f"--data {run.data}: no such folder")
    if task.name == "toy" and (run.model != "toy" or run.data is not None):
        raise ValueError("--task toy is made up for --model toy, without --data: expected a task of GLUE, squad, or a "
                         "FILE.json")
    if task.name not in {*glue_squad.TASKS, "toy"}:
        return Path(task.files["train"][0]).parent
    if run.data is not None:
        return run.data
    if run.model == "toy":
        return tamt.toy_folder("tasks")
    return glue_squad.download(task, splits=wanted_splits(task, run.predict))


def wanted_splits(task, predict: bool) -> list[str]:
    splits = ["train", "dev", "dev_mm"]
    if predict:
        splits += ["test", "test_mm", "ax"]
    return [split for split in splits if split in task.files]


def identity_of_run(run, tickets: list[Ticket], tasks: list, examples: dict, vocabulary) -> dict:
    """What makes this run this run: a folder that holds another one is refused. Masks, texts, the tokenizer and weights
    count by content."""
    names = ("model", "epochs", "batch_size", "max_len", "lr", "seed", "limit", "eval_every", "weights", "checkpoint",
             "config")
    identity = {"task": task_names(tasks)} | {name: tamt.plain(getattr(run, name)) for name in names}
    identity["horizon_rounds"] = run.schedule_stretch  # under the name that earlier versions gave it
    identity["metrics"] = ",".join(metric for task in tasks for metric in task.metrics)
    own_labels = [task.labels for task in tasks if task.name not in {*glue_squad.TASKS, "toy"}]
    if own_labels:
        identity["labels"] = digest(own_labels)
    identity["dtype"] = str(run.machine.dtype)
    identity["tokenizer"] = digest([vocabulary.tokenizer.to_str(), vocabulary.special_ids, vocabulary.num_separators])
    identity["texts"] = digest([of_task.get(split) for of_task in examples.values()
                                for split in ("train", "dev", "dev_mm")])

    mask_digest = hashlib.sha256()
    num_pruned = 0
    num_entries = 0
    for ticket in tickets:
        if ticket.is_super:  # the same masks are applied in another way
            mask_digest.update(b"super")
        for name, mask in sorted(ticket.masks.items()):
            mask_digest.update(name.encode())
            mask_digest.update(tamt.pack(mask).numpy())
            num_pruned += int((~mask).sum())
            num_entries += mask.numel()
    identity["masks"] = mask_digest.hexdigest()[:16] if tickets else None
    identity["sparsity"] = num_pruned / max(num_entries, 1)
    return identity


def digest(values: list) -> str:
    """A short hash of values that repr() spells out."""
    return hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def choose_folder(run: Run, tickets: list[Ticket], identity: dict) -> Path:
    """--out, or out/TASK-MASK-sSEED-..., the end telling runs with other settings apart."""
    if run.out is not None:
        return run.out
    name = f"{Path(run.model).name}-dense"
    if tickets:
        file = tickets[0].file
        name = file.name if file.is_dir() else file.absolute().parent.name
    return Path("out") / f"{identity['task']}-{name}-s{run.seed}-{digest([identity])[:8]}"


def check_files_of_run(run: Run):
    """Raises ValueError if the run would write one of its files over another, over what it reads, or over what is no
    run's."""
    # (tamt.open_folder removes a log.jsonl, such as that of a run of tamt.py.)
    written = ["result.json", "state.pt", "log.jsonl", "predictions.json", *glue_squad.SUBMISSION_FILES.values()]
    written += [f"{task.folder}.tsv" for task in named_tasks(run)]
    for name in written:
        if run.results is not None and run.results.absolute() == (run.out / name).absolute():
            raise ValueError(f"--results {run.results} is a file that the run itself writes: choose another")
    if (run.out / "search.json").exists():
        raise ValueError(f"{run.out} holds a search (--find): choose another --out")
    if run.results is not None and run.results.is_file() and not holds_results(run.results):
        raise ValueError(f"--results {run.results} holds something else than results: choose another")
    if run.predict:
        refuse_folder_of_tables(run)


def holds_results(file: Path) -> bool:
    """Whether the first line of a file, if it has any, is a JSON object."""
    with open(file, "rb") as lines:
        first_line = next((line for line in lines if line.strip()), b"{}")
    try:
        return isinstance(json.loads(first_line), dict)
    except ValueError:
        return False


def refuse_folder_of_tables(run: Run):
    """--predict writes tables into the folder of the run. They must not replace those that the task is read from."""
    for task in named_tasks(run):
        folder = task_folder(task, run)
        for split in wanted_splits(task, run.predict):
            try:
                table = glue_squad.find_file(task, split, folder)
            except FileNotFoundError:
                continue  # not all tasks come with all files
            if Path(table).resolve().parent == run.out.resolve():
                raise ValueError(f"--out {run.out}: tables of {task.name} lie there, and --predict writes others: "
                                 "choose another")


def main(argv=None):
    settings = tamt.parse_settings(Settings, "Fine-tune a subnetwork of a pre-trained BERT.", argv)
    fine_tune(settings)


if __name__ == "__main__":
    tamt.run_command(main)
