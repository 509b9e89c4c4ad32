"""Task-agnostic mask training: learn WHICH weights of a pre-trained BERT to keep, and change none of them.

Liu et al., Learning to Win Lottery Tickets in BERT Transfer via Task-agnostic Mask Training, NAACL 2022.

    python tamt.py --model bert-base --sparsity 0.7 --objective kd

Each entry of the word embeddings and of the matrices in the layers gets a score, and the entries with the highest
scores are kept. The loss that trains the scores is that of masked language modelling (mlm), the distance of the pruned
network, as a student, from the whole one, its teacher (kd, knowledge distillation), or their sum (mlm+kd). The method
in eight steps, with the function that takes each, and the equation of the paper:

    1  read a checkpoint; its weights are frozen                     read_model
    2  cut plain text into rows of token ids                         read_rows
    3  first mask: keep the largest |weights| of each matrix         first_masks
    4  scores: 0.02 where the mask keeps, 0 where it prunes          Scores                 Eq. 5
       repeat, each time with the next rows:                         train_scores
    5      the loss of W * mask (kd: Eq. 6)                          micro_batch_loss
           its gradient with respect to the mask, which is used as   StraightThrough        Eq. 4
           that of the scores
    6      Adam moves the scores (kd: without bias correction,       optimizer_step
           with a weight decay of .01)
    7      new mask: keep the highest scores of all matrices         Scores.renew_masks     Eq. 2, 3
    8  save the mask, and its losses on held-out text                finish

find_mask() takes them in this order, and learn_masks() those from 3 to 7. (In file names and on the screen "step" is
the number of an update, which is one turn of steps 5 to 7.) Gradients are also clipped, the learning rate falls, and
the student has dropout. The test test_mask_training_gives_the_masks_of_a_plain_loop, in test_tamt.py, has the method as
a loop of 30 lines, for mlm+kd and without dropout and clipping.

In three things step 7 departs from the paper or from the released code, which is that of its authors: all matrices are
ranked together (the paper does not say; the code ranks each by itself: --rank local); this happens after each update
(in the code after every 1,000, with kd 100: --refresh-every); and the signs of the scores count, as in the code and in
Eq. 3 (the paper's text ranks |scores|). A table at the start of appendix A has the rest. "TAMT FILE.py" is a file of
the released code.

Three kinds of parameters are treated otherwise:

    * biases, LayerNorms, position and token type embeddings have no mask;
    * the pooler, which no loss reads, and the embedding of [PAD] (and rows beyond the vocabulary) have a mask, but get
      no gradient; with kd neither do the embeddings of words that the text does not contain. Where all matrices
      compete, these are held at the mask of step 3;
    * the head that predicts masked words is trained, too, with mlm and mlm+kd, and set back afterwards, so that all
      masks are measured with the same one.

Three baselines are in the same program: `--method omp`, one-shot magnitude pruning, leaves out steps 4 to 7; `--method
random` does so, too, and draws a random mask in step 3; `--method imp`, iterative magnitude pruning, trains the weights
themselves between prunings.

The chapters:

    The eight steps      find_mask, the training loop, reading, and the end
    Masked layers        weights * mask, and the straight-through estimator (step 5)
    The ranking          which entries stay: global, local, N:M; OMP and random masks (steps 3 and 7)
    Scores               one for each entry, and the masks that follow from them (4 and 7)
    Batches              the rows of an update, and what masked LM makes of them (5)
    Losses               masked LM, distillation, dev losses (5 and 8)
    Training             what an update computes (5 and 6)
    IMP                  the baseline that trains weights
    Appendices           A how paper, released code and this program differ (also: first scores, optimizer, schedule);
                         B fast rankings; C mask files; D the folder of a run; E settings; F devices and processes.
                         What a chapter uses and no chapter defines is in an appendix; a first reading may skip them.

bert.py has the network: model(input_ids, attention_mask) returns the hidden states, those of the embeddings and of each
layer, and model.mlm_logits(last_hidden_states) the predictions of the masked-LM head. data.py has the vocabulary, the
rows of a text, and their corruption for masked LM.

Most functions take one of these objects:

    Settings    what the user chose on the command line (appendix E)
    Run         the same with the defaults filled in, and the Machine: device, dtype, processes (appendices E, F)
    Inputs      the Run, and the model, vocabulary and rows of text that were read
    Training    the Inputs, what trains, the optimizer, and how many updates are done

Words and letters:

    entry       a single number of a weight matrix; it is kept or pruned
    masks       {name of a matrix: its mask}, which is what a run finds
    dense       without a mask
    W, M, S     a weight matrix (theta in the paper), its mask, its scores (the paper's underlined M)
    b, T        rows of a forward pass, and tokens of a row; P of these tokens masked LM predicts
    D, L, V     hidden size; layers of the network; rows of the word embeddings
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import platform
import shlex
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import bert
import data

# ---------------------------------------------------------------------------------------------------
# The eight steps
# ---------------------------------------------------------------------------------------------------


# A run has a field for each flag of the command line, and a few more. These occur most:
#
#     run.method, run.objective      tamt, imp, omp or random; mlm, kd or mlm+kd (imp: always mlm)
#     run.sparsity                   the fraction of entries that is pruned
#     run.rank                       which entries compete: those of all matrices ("global"), of each matrix ("local"),
#                                    or of neighbours in a row of a matrix ("2:4": two of four stay)
#     run.scope                      whether the word embeddings have a mask ("all") or not ("encoder")
#     run.init                       the first mask: "omp" or "random"
#     run.num_updates                of the whole run (with imp run.prune_every in each round)
#     run.lr, run.horizon            the first learning rate; after how many updates it would have fallen to 0
#     run.refresh_every              updates between two rankings: 1, except to reproduce the released code
#     run.batch_size                 rows of a forward pass, of all processes together
#     run.accumulate                 forward passes of an update
#     run.rows_per_update            batch_size * accumulate
#     run.trains                     False for omp and random
#     run.trains_head                whether the masked-LM head trains, too: with mlm, mlm+kd and imp


def find_mask(settings: Settings) -> dict:
    """Finds a mask, saves it in the folder of the run, and returns the content of its mask.json. (Of several processes
    the first one saves. The others return {}, unless the run was finished before.)

    Raises ValueError or OSError, with one line that a user understands, for input that is wrong."""
    start_time = time.time()
    machine = start_machine(settings.device, settings.dtype)
    with first_process_first(machine):  # the first one downloads and tokenises, and the others find its files
        inputs = read_inputs(settings, machine)  # steps 1 and 2
    run = inputs.run

    # With --resume a finished run gives its result, and an interrupted one its state; else both are None (appendix D).
    result, state = open_folder(run.out, inputs.identity, run.resume, "mask.json", machine)
    if result is not None:
        return report_finished(inputs, result)
    masks = learn_masks(inputs, state)  # steps 3 to 7
    return finish(inputs, masks, start_time)  # step 8


def learn_masks(inputs: Inputs, state: dict | None) -> dict[str, torch.Tensor]:
    """Steps 3 to 7 -> {name of a matrix: its mask}. state: of an interrupted run, or None."""
    run = inputs.run
    # From here on inputs.model multiplies by the masks of these layers, which keep everything at first.
    masked_layers = install_masked_layers(inputs.model, run.scope)
    if run.method == "tamt":
        learn_by_tamt(inputs, masked_layers, state)
    elif run.method == "imp":
        learn_by_imp(inputs, masked_layers, state)  # a chapter of its own
    else:  # omp and random go on with step 8
        set_masks(masked_layers, first_masks(masked_layers, run))
    return current_masks(masked_layers)


def learn_by_tamt(inputs: Inputs, masked_layers: dict, state: dict | None):
    """Steps 3 to 7 of task-agnostic mask training. The layers have the masks in the end."""
    run = inputs.run
    masks = first_masks(masked_layers, run)  # step 3
    scores = Scores(masked_layers, masks, run.sparsity, run.rank)  # step 4: the layers now hold masks and scores
    if run.rank == "global":
        # Scores that can get no gradient stand still, while the threshold between kept and pruned ones moves and could
        # pass them. So they become plus or minus 1e30: their entries keep the mask of step 3, and still count.
        pin_unlearnable_scores(scores, inputs)
        make_start_exact(scores)  # step 3 has rounded in each matrix, so the count of all may be off by a few
    training = prepare_training(inputs, masked_layers, scores, state)
    train_scores(training)  # steps 5 to 7


def train_scores(training: Training):
    """Steps 5 to 7, from where the training stands to its end."""
    run = training.run
    training.model.train()
    while training.updates_done < run.num_updates:
        # Linear decay without warm-up, to 0 after run.horizon updates. (With --steps, and for the toy, the run ends
        # there. Else it ends earlier, where the paper takes its masks.)
        learning_rate = run.lr * (1 - training.updates_done / run.horizon)
        batch = next_batch(training)
        loss = backpropagate(training, batch)  # step 5
        loss_value = clip_and_check(training, loss, run.clip)
        optimizer_step(training, learning_rate, training.updates_done + 1)  # step 6
        training.updates_done += 1
        if run.refresh_every == 1:
            training.scores.renew_masks()  # step 7
        else:
            refresh_as_released(training)  # ranks now and then; in between old thresholds decide (appendix A)
        report_progress(training, loss_value, learning_rate)  # now and then a line of the log, dev losses, a mask file
        save_state_if_due(training)
    restore_weights(training)  # of the head, if it was trained: only the masks are kept


@dataclass
class Inputs:
    """The settings of a run, and all that it reads."""
    run: Run
    identity: dict  # settings and checksums, which --resume compares
    model: bert.Model  # learn_masks puts masked layers into it
    vocabulary: data.Vocabulary
    rows: np.ndarray | None  # (rows, T); omp and random need none
    dev_rows: np.ndarray | None  # for dev losses; omp and random may have none


# Steps 1, 2 and 8 follow here; what the others call has chapters of its own.


def read_inputs(settings: Settings, machine: Machine) -> Inputs:
    model, vocabulary = read_model(settings, machine)  # step 1
    run = fill_in_defaults(settings, machine, model)  # some defaults depend on the model
    rows = read_rows(run, vocabulary, "train") if run.trains else None  # step 2
    dev_rows = read_rows(run, vocabulary, "dev") if run.data else None  # None: omp or random without --data
    return Inputs(run, identity_of_run(run, rows, dev_rows), model, vocabulary, rows, dev_rows)


def read_model(settings, machine) -> tuple[bert.Model, data.Vocabulary]:
    """Step 1: the checkpoint, with all weights frozen, and its vocabulary."""
    model, vocabulary = load_model(settings.model)
    if settings.trains_head and model.mlm_head is None:
        print(f"{settings.model} has no masked-LM head: a fresh one is trained, too, and left out of dev losses and "
              "exports")
        add_fresh_head(model, settings.seed)
    return model.requires_grad_(False).to(machine.device), vocabulary


def read_rows(run, vocabulary, split: str):
    """Step 2: rows of token ids (rows, T), of "train" or "dev"."""
    source = toy_folder("text") if run.data == "toy" else run.data
    return data.corpus_rows(source, vocabulary, run.seq_len, split, run.lines)


def finish(inputs: Inputs, masks: dict, start_time: float) -> dict:
    """Step 8: saves the masks, with their sparsity and their dev losses -> the content of mask.json."""
    run = inputs.run
    if run.machine.process_index > 0:
        return {}
    sparsities = sparsity_report(inputs.model, masks)
    losses = {}
    if inputs.dev_rows is not None:
        # The model still has its masked layers.
        losses = dev_losses(inputs.model, inputs.dev_rows, inputs.vocabulary, run.machine)
    result = write_results(inputs, masks, sparsities, losses, start_time)
    print_summary(run.out / "mask.pt", result, run)
    return result


# ---------------------------------------------------------------------------------------------------
# Masked layers
# ---------------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """The masked weight W * M, differentiable with respect to the scores S that M was ranked from.

    M is a step function of S, so its true derivative is zero almost everywhere. The straight-through
    estimator treats M in the backward pass as if it were S (Eq. 4):

        d loss / d S  :=  d loss / d M  =  W * (d loss / d (W * M))

    The factor is W, and not W * M. So the scores of pruned entries get a gradient, too, and the entries can come back.
    """

    @staticmethod
    def forward(ctx, weight, scores, mask):  # three tensors of one shape; scores only so that they get a gradient
        ctx.save_for_backward(weight)
        return weight * mask

    @staticmethod
    def backward(ctx, grad_masked_weight):
        (weight,) = ctx.saved_tensors
        grad_scores = weight * grad_masked_weight
        return None, grad_scores, None  # W is frozen, and M follows from S


class MaskedLayer(nn.Module):
    """What masked linear layers and embeddings share. They compute in one of three ways:

    with scores      W * M, with the straight-through gradient to the scores: while a mask is learned
    without scores   W * M, through which W itself may train, as in IMP
    is_dense         W, for the teacher of kd (dense_teacher, in the chapter on losses)"""

    def __init__(self, layer):
        super().__init__()
        self.weight = layer.weight
        # Everything is kept at first, and the class Scores puts its scores here later. (The mask is a plain attribute,
        # so it is in no state_dict.)
        self.mask = torch.ones_like(layer.weight, dtype=torch.bool)
        self.register_parameter("scores", None)
        self.is_dense = False

    def apply_mask(self, weight, scores, mask):
        """The masked weight. The arguments are whole matrices for a linear layer, and for an embedding the rows that it
        has looked up."""
        if self.is_dense:
            return weight
        if scores is None:
            return weight * mask
        return StraightThrough.apply(weight, scores, mask)


class MaskedLinear(MaskedLayer):
    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.bias = linear.bias

    def forward(self, x):  # (..., in) -> (..., out)
        masked_weight = self.apply_mask(self.weight, self.scores, self.mask)
        return F.linear(x, masked_weight, self.bias)


class MaskedEmbedding(MaskedLayer):
    """Looks up rows of the weight, the scores and the mask, and masks only those. The decoder of the masked-LM head,
    if it shares the weight, uses self.weight itself, unmasked, as in the released code."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__(embedding)
        self.padding_idx = embedding.padding_idx  # the row of [PAD], which gets no gradient through this lookup

    def forward(self, input_ids):  # (b, T) -> (b, T, D)
        weight_rows = F.embedding(input_ids, self.weight, self.padding_idx)
        score_rows = None
        if self.scores is not None:
            score_rows = F.embedding(input_ids, self.scores, self.padding_idx)
        return self.apply_mask(weight_rows, score_rows, self.mask[input_ids])


def maskable_layers(model: bert.Model, scope: str = "all") -> dict[str, nn.Module]:
    """{name of the weight, as in checkpoints: module} of the matrices that get a mask, in model order: word embeddings
    (not with scope "encoder"), six matrices in each layer, the pooler if there is one (TAMT masking/maskers.py)."""
    layers = {}
    for name, module in model.backbone.named_modules(prefix=model.config.model_type):
        is_linear = isinstance(module, nn.Linear)  # in the backbone these are six a layer, and the pooler
        is_word_embedding = isinstance(module, nn.Embedding) and name.endswith("word_embeddings")
        if is_linear or (is_word_embedding and scope == "all"):
            layers[f"{name}.weight"] = module
    return layers


def install_masked_layers(model: bert.Model, scope: str = "all") -> dict[str, MaskedLayer]:
    """Puts masked layers, which keep everything at first, in the place of the maskable ones."""
    masked_layers = {}
    for name, layer in maskable_layers(model, scope).items():
        masked_layer = MaskedLinear(layer) if isinstance(layer, nn.Linear) else MaskedEmbedding(layer)
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), child, masked_layer)
        masked_layers[name] = masked_layer
    return masked_layers


def set_masks(masked_layers: dict, masks: dict):
    """Sets the mask of each layer; one that has none in `masks` keeps everything."""
    for name, layer in masked_layers.items():
        layer.mask = masks[name] if name in masks else torch.ones_like(layer.weight, dtype=torch.bool)


def current_masks(masked_layers: dict) -> dict[str, torch.Tensor]:
    return {name: layer.mask for name, layer in masked_layers.items()}


# ---------------------------------------------------------------------------------------------------
# The ranking: which entries stay
# ---------------------------------------------------------------------------------------------------


def masks_of_largest(values: dict, sparsity: float, rank: str) -> dict:
    """{name: values} -> {name: mask}: the largest values stay. rank, as in --rank, says which entries compete: all of
    them ("global"), those of each matrix ("local"), or neighbours in a row of a matrix ("2:4": two of four stay,
    whatever the sparsity)."""
    if rank == "global":  # all matrices as one vector
        vector = torch.cat([matrix.flatten() for matrix in values.values()])
        vector_mask = keep_largest(vector, num_kept_of(len(vector), sparsity))
        return cut_into_matrices(vector_mask, values)

    if rank == "local":
        masks = {}
        for name, matrix in values.items():
            mask = keep_largest(matrix.flatten(), num_kept_of(matrix.numel(), sparsity))
            masks[name] = mask.view(matrix.shape)
        return masks

    num_kept, group_size = parse_pattern(rank)  # "2:4" -> 2, 4
    return {name: keep_largest_of_groups(matrix, num_kept, group_size) for name, matrix in values.items()}


def cut_into_matrices(vector, matrices: dict) -> dict:
    """Cuts a vector into pieces (views), one after the other, with the names and shapes of these matrices."""
    pieces = vector.split([matrix.numel() for matrix in matrices.values()])
    return {name: piece.view(matrices[name].shape) for name, piece in zip(matrices, pieces, strict=True)}


def num_kept_of(num_entries: int, sparsity: float) -> int:
    return num_entries - round(num_entries * sparsity)


def keep_largest(values, num_kept: int):  # (n,) -> (n,) bool; or (rows, n), each row by itself
    """The mask that keeps exactly the `num_kept` largest values.

    Of equal values at the border, those with lower indices stay. So the count is always exact:

        values 3 1 2 2 2, num_kept 2   ->   mask 1 0 1 0 0
    """
    order = torch.argsort(values, dim=-1, descending=True, stable=True)  # largest first, equals in their order
    mask = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    return mask.scatter_(-1, order[..., :num_kept], True)


def keep_largest_of_groups(values, num_kept: int, group_size: int):  # matrix -> bool matrix
    """N:M sparsity, as in 2:4, which sparse tensor cores run: of every `group_size` consecutive entries of a row the
    `num_kept` largest stay."""
    groups = values.reshape(-1, group_size)
    return keep_largest(groups, num_kept).view_as(values)


def magnitude_masks(masked_layers: dict, sparsity: float, rank: str) -> dict:
    """Masks by |W|. On layers that keep everything this is OMP. On masked ones it is the next mask of IMP: what is
    pruned stays pruned, since it counts as -1, which is below every magnitude."""
    magnitudes = {}
    for name, layer in masked_layers.items():
        magnitudes[name] = layer.weight.detach().abs().masked_fill(~layer.mask, -1.0)
    return masks_of_largest(magnitudes, sparsity, rank)


def random_masks(masked_layers: dict, sparsity: float, rank: str, seed: int) -> dict:
    """Masks by random numbers in place of magnitudes."""
    generator = data.random_stream(seed, "masks")
    values = {}
    for name, layer in masked_layers.items():
        draws = generator.random(layer.weight.shape, np.float32)
        values[name] = torch.from_numpy(draws).to(layer.weight.device)
    return masks_of_largest(values, sparsity, rank)


def first_masks(masked_layers: dict, run: Run) -> dict:
    """Step 3: the OMP mask or the random mask. With omp and random it is the result.

    TAMT starts from a ranking inside each matrix, as in the paper, even if all matrices compete later."""
    rank = run.rank
    if run.method == "tamt" and rank == "global":
        rank = "local"
    if run.method == "random" or (run.method == "tamt" and run.init == "random"):
        return random_masks(masked_layers, run.sparsity, rank, run.seed)
    return magnitude_masks(masked_layers, run.sparsity, rank)


# ---------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------


START_SCORE = 0.02  # of kept entries; pruned ones start at 0 (Eq. 5)


class Scores:
    """One score for each entry that has a mask, in layer.scores, and the masks that follow from them, in layer.mask."""

    def __init__(self, masked_layers: dict, masks: dict, sparsity: float, rank: str):
        """Puts masks and scores into the layers. masks {name: mask}: those of step 3; sparsity and rank as in
        masks_of_largest."""
        self.masked_layers = masked_layers
        self.sparsity = sparsity
        self.rank = rank
        for name, layer in masked_layers.items():
            layer.mask = masks[name]
            layer.scores = nn.Parameter(START_SCORE * masks[name].float())  # Eq. 5
        self.fast_ranking = FastRanking(masks, sparsity, rank)  # appendix B

    @torch.no_grad()
    def renew_masks(self):
        """Step 7: keep the highest scores, exactly as many as the sparsity asks for (the constraint of Eq. 2). In terms
        of Eq. 3: those that reach a threshold, which moves so that the count stays right. A score below 0 says that the
        entry does harm, so the sign counts, as in the released code. (The paper's text ranks |S|.)"""
        layer_scores = {name: layer.scores for name, layer in self.masked_layers.items()}
        masks = self.fast_ranking.masks(layer_scores)  # = masks_of_largest(layer_scores, self.sparsity, self.rank)
        set_masks(self.masked_layers, masks)


# ---------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------


# A batch has the rows of one update, in numpy, and a micro-batch those of one forward pass, on the device. By default
# there is one forward pass for each update. With --accumulate N there are N, and a batch has N times run.batch_size
# rows. (If several processes share the work, each takes its share of the run.batch_size rows of a forward pass.)


@dataclass
class Batch:
    """The rows of one update, and what masked LM makes of them; all arrays (rows, T)."""
    input_ids: np.ndarray  # int64
    corrupted_ids: np.ndarray  # int64; for masked LM
    is_predicted: np.ndarray  # bool: the positions whose original token is to be predicted
    is_token: np.ndarray  # bool: False at padding

    @property
    def num_predicted(self) -> int:
        return int(self.is_predicted.sum())

    @property
    def num_tokens(self) -> int:
        return int(self.is_token.sum())


def make_batch(rows, vocabulary: data.Vocabulary, generator) -> Batch:
    """Rows (rows, T), corrupted for masked LM. (Training with kd does not use the corruption, but dev losses do.)"""
    input_ids = rows.astype(np.int64)
    corrupted_ids, is_predicted = data.corrupt(input_ids, vocabulary, generator)
    return Batch(input_ids, corrupted_ids, is_predicted, is_token=input_ids != vocabulary.pad_id)


@dataclass
class MicroBatch:
    """The rows of one forward pass, as tensors on the device."""
    input_ids: torch.Tensor  # (b, T)
    corrupted_ids: torch.Tensor  # (b, T)
    attention_mask: torch.Tensor | None  # (b, T) bool, None without padding
    predicted_positions: torch.Tensor  # (P,) indices into the b * T tokens
    labels: torch.Tensor  # (P,) the original ids at these positions
    # Counts of the whole batch: the losses of its micro-batches are divided by them, and so add up to its mean.
    batch_num_tokens: int
    batch_num_predicted: int


def make_micro_batch(batch: Batch, row_slice: slice, device) -> MicroBatch:
    input_ids = batch.input_ids[row_slice]
    is_token = batch.is_token[row_slice]
    predicted_positions = np.flatnonzero(batch.is_predicted[row_slice])
    return MicroBatch(
        input_ids=to_device(input_ids, device),
        corrupted_ids=to_device(batch.corrupted_ids[row_slice], device),
        attention_mask=None if is_token.all() else to_device(is_token, device),
        predicted_positions=to_device(predicted_positions, device),
        labels=to_device(input_ids.reshape(-1)[predicted_positions], device),
        batch_num_tokens=batch.num_tokens,
        batch_num_predicted=batch.num_predicted)


def micro_batches(batch: Batch, run: Run):
    """Yields the micro-batches of this process, one for each forward pass. With 2 processes and a run.batch_size of 16
    those of the first process have the rows 0 .. 7, 16 .. 23, and so on."""
    share = run.batch_size // run.machine.num_processes
    for first_row in range(0, len(batch.input_ids), run.batch_size):  # of a forward pass of all processes
        start = first_row + run.machine.process_index * share
        yield make_micro_batch(batch, slice(start, start + share), run.machine.device)


# ---------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------


def mlm_loss(logits, labels, batch_num_predicted: int):  # (P, V), (P,) -> scalar
    """The sum of the cross-entropies at the P predicted positions, divided by their number in the whole batch."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total / max(batch_num_predicted, 1)  # 0 if no token is to be predicted


def kd_loss(teacher_states, student_states, attention_mask, batch_num_tokens: int):
    """Eq. 6: the mean of 1 - cosine between the hidden states of the teacher (the whole network) and of the student
    (the same under its mask), over the tokens and the layers 1 .. L: 0 for equal states, 2 for opposite ones.

    Two lists of L + 1 tensors (b, T, D); attention_mask (b, T) or None -> scalar:

        the sum of 1 - cosine over the layers 1 .. L and all tokens / (L * batch_num_tokens)

    batch_num_tokens is the number in the whole batch."""
    total = 0.0
    for teacher_state, student_state in zip(teacher_states[1:], student_states[1:], strict=True):
        cosine = F.cosine_similarity(teacher_state.float(), student_state.float(), dim=-1)  # (b, T)
        distance = 1 - cosine
        if attention_mask is not None:
            distance = distance * attention_mask
        total = total + distance.sum()
    num_layers = len(teacher_states) - 1
    return total / (num_layers * batch_num_tokens)


@contextmanager
def dense_teacher(model):
    """Inside the with block the model is its own teacher: dense, without gradients, and without dropout (which the
    student has in training). There is no second copy of the weights, since those of the backbone stay frozen."""
    layers = [module for module in model.modules() if isinstance(module, MaskedLayer)]
    was_training = model.training
    for layer in layers:
        layer.is_dense = True
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.is_dense = False
        model.train(was_training)


def micro_batch_loss(model, student_forward, objective: str, micro_batch: MicroBatch):
    """The share of a micro-batch in the loss of its batch. Student and teacher are one network: the model, for the
    teacher with its masks switched off. student_forward is the model, too, or with --compile its compiled form.

    mlm+kd adds the two losses. Teacher and student always read the same text: with kd the clean one, with mlm+kd the
    corrupted one."""
    input_ids = micro_batch.input_ids if objective == "kd" else micro_batch.corrupted_ids
    student_states = student_forward(input_ids, micro_batch.attention_mask)  # L + 1 times (b, T, D)
    loss = 0.0

    if "mlm" in objective:  # mlm, mlm+kd
        # Other positions do not count in this loss, so no logits are computed there. The head itself has no mask.
        predicting_states = student_states[-1].flatten(0, 1)[micro_batch.predicted_positions]  # (P, D)
        logits = model.mlm_logits(predicting_states)  # (P, V)
        loss = loss + mlm_loss(logits, micro_batch.labels, micro_batch.batch_num_predicted)

    if "kd" in objective:  # kd, mlm+kd
        with dense_teacher(model):
            teacher_states = model(input_ids, micro_batch.attention_mask)
        loss = loss + kd_loss(teacher_states, student_states, micro_batch.attention_mask, micro_batch.batch_num_tokens)
    return loss


def has_pretrained_head(model: bert.Model) -> bool:
    return model.mlm_head is not None and not model.mlm_head.is_fresh


@torch.no_grad()
def dev_losses(model: bert.Model, rows, vocabulary, machine, batch_size: int = 16) -> dict[str, float]:
    """What a mask is worth on held-out rows, in eval mode; each loss is a mean over batches, so a shorter last batch
    counts as much as any (TAMT mask_training/eval_mlm.py, eval_kd.py).

    dev_mlm_loss: on one corruption, the same for all masks of a model and a text. It is left out if the checkpoint has
    no masked-LM head, or if the rows are so few that no token is to be predicted.
    dev_kd_loss: Eq. 6 on the clean rows."""
    objectives = ["mlm", "kd"] if has_pretrained_head(model) else ["kd"]
    batch_losses = {objective: [] for objective in objectives}
    was_training = model.training
    model.eval()
    generator = np.random.default_rng(42)  # any seed would do, but all masks must meet the same corruption
    for start in range(0, len(rows), batch_size):
        batch = make_batch(rows[start:start + batch_size], vocabulary, generator)
        micro_batch = make_micro_batch(batch, slice(None), machine.device)
        for objective in objectives:
            if objective == "mlm" and batch.num_predicted == 0:
                continue  # a last batch may be so short that it says nothing
            with autocast(machine):
                loss = micro_batch_loss(model, model, objective, micro_batch)
            batch_losses[objective].append(max(float(loss), 0.0))  # for equal states 1 - cosine may round to below 0
    model.train(was_training)

    losses = {}
    for objective, values in batch_losses.items():
        if values:
            losses[f"dev_{objective}_loss"] = sum(values) / len(values)
    return losses


# ---------------------------------------------------------------------------------------------------
# Training: what an update computes
# ---------------------------------------------------------------------------------------------------


class Training:
    """The training of a run: what it is given, and what changes from update to update. (state.pt keeps the latter.) The
    constructor unfreezes the parameters that train."""

    def __init__(self, inputs: Inputs, masked_layers: dict, scores: Scores | None):
        """scores: None with imp, where weights train."""
        run = inputs.run
        self.inputs = inputs
        self.run = run
        self.model = inputs.model
        self.masked_layers = masked_layers
        self.scores = scores
        self.parameters = unfreeze(self.model, run)  # {name: parameter}
        self.student_forward = compile_if_asked(self.model, run)
        # The first values of the trained parameters that are not scores. kd: none; mlm: the head; imp: nearly all.
        self.starting_weights = {}
        for name, parameter in self.parameters.items():
            if not name.endswith(".scores"):
                self.starting_weights[name] = parameter.detach().clone()
        self.optimizer = make_optimizer(self.parameters.values(), run.machine.device)
        self.log = Log(run, masked_layers)
        self.updates_done = 0
        self.saved_at = time.time()  # when state.pt was written last


def prepare_training(inputs: Inputs, masked_layers: dict, scores: Scores | None, state: dict | None) -> Training:
    """A training at its start; or, with the state of an interrupted run, where that run stopped."""
    run = inputs.run
    print(f"{len(inputs.rows):,} rows of {run.seq_len} tokens, {run.num_updates:,} updates, lr {run.lr:.3g} "
          f"({run.lr_reason})")
    training = Training(inputs, masked_layers, scores)
    if state is not None:
        restore_state(training, state)
    return training


def unfreeze(model, run: Run) -> dict[str, nn.Parameter]:
    """Unfreezes the parameters that train in this run, and freezes all others -> {name: parameter} of the former."""
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(should_train(name, run))
        if parameter.requires_grad:
            trained[name] = parameter
    return trained


def should_train(name: str, run: Run) -> bool:
    """With tamt the scores are trained (Scores has put them into the layers), and for masked LM its head without the
    decoder (TAMT masking/maskers.py:524); with imp all weights but the pooler's."""
    if "pooler" in name:  # no loss reads it
        return False
    if run.method == "imp" or name.endswith(".scores"):
        return True
    is_head = name.startswith(("cls.", "lm_head.")) and "decoder" not in name
    return is_head and run.trains_head


def next_batch(training: Training) -> Batch:
    """The rows of the next update, corrupted. They follow from the seed of the run and the number of the update alone,
    so a resumed run sees what an uninterrupted one sees."""
    run = training.run
    rows = training.inputs.rows
    first_row = training.updates_done * run.rows_per_update
    indices = data.row_indices(len(rows), run.seed, first_row, run.rows_per_update)
    generator = data.random_stream(run.seed, "corruption", training.updates_done)
    return make_batch(rows[indices], training.inputs.vocabulary, generator)


def backpropagate(training: Training, batch: Batch) -> torch.Tensor:
    """Step 5: the loss of a batch, and its gradients, which StraightThrough hands to the scores (with imp they are
    those of the weights) -> the loss, a scalar on the device. Both are sums over the micro-batches, and over the
    processes, if there are several."""
    run = training.run
    machine = run.machine
    seed_dropout(run.seed, training.updates_done, machine.process_index)  # so a resumed run draws the same
    total_loss = torch.zeros((), device=machine.device)
    for micro_batch in micro_batches(batch, run):
        with autocast(machine):
            loss = micro_batch_loss(training.model, training.student_forward, run.objective, micro_batch)
        loss.backward()  # adds to the gradients
        total_loss += loss.detach()
    gradients = [parameter.grad for parameter in training.parameters.values()]
    sum_over_processes([total_loss, *gradients], machine)  # in place
    return total_loss


def clip_and_check(training, loss: torch.Tensor, max_norm: float) -> float:
    """Scales all gradients down, by one factor, if the norm of all of them together is above max_norm -> the loss as a
    number. Raises ValueError if the loss or the norm is not finite, before anything has moved. (finetune.py calls this
    with a training of its own.)"""
    norm = nn.utils.clip_grad_norm_(training.parameters.values(), max_norm)
    loss_value, norm = torch.stack([loss.detach(), norm]).tolist()  # together: a GPU is waited for only once
    if not (math.isfinite(loss_value) and math.isfinite(norm)):
        raise ValueError(f"the loss is {loss_value:.3g} and the norm of its gradient {norm:.3g} at update "
                         f"{training.updates_done + 1}: try a lower --lr (here {training.run.lr:.2g}) or --dtype fp32")
    return loss_value


def optimizer_step(training: Training, learning_rate: float, update_number: int):
    """Step 6: one update by Adam of all parameters that train. update_number: that of the optimizer, from 1; with imp
    it starts anew in each round.

    The optimizers are those of the released code: AdamW without weight decay; with kd, Adam without bias correction and
    with a weight decay of .01. (Without the correction its first updates move a score by up to 6.6 times the learning
    rate, if its gradient is constant.) torch's AdamW always corrects; optimizer_settings() chooses its rate, eps and
    decay so that it computes the same (appendix A)."""
    options = optimizer_settings(training.run.objective, learning_rate, update_number)
    training.optimizer.param_groups[0].update(options)
    training.optimizer.step()
    training.optimizer.zero_grad()


def make_optimizer(parameters, device):
    """AdamW, whose learning rate, eps and weight decay are set at each update."""
    is_fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, betas=(0.9, 0.999), fused=is_fused)


def restore_weights(training: Training, prefix: str = ""):
    """Sets the weights that were trained, and whose names start with the prefix, back to their first values. The scores
    stay."""
    for name, weight in training.starting_weights.items():
        if name.startswith(prefix):
            training.parameters[name].data.copy_(weight)


# ---------------------------------------------------------------------------------------------------
# Iterative magnitude pruning, the baseline that trains W
# ---------------------------------------------------------------------------------------------------


def learn_by_imp(inputs: Inputs, masked_layers: dict, state: dict | None):
    """Iterative magnitude pruning (Chen et al. 2020), here with the masked-LM loss on text:

        sparsity .7    prune to .1; train, prune to .2, rewind; train, prune to .3, rewind; ... train, prune to .7

    To prune is to take the smallest entries of each matrix out (with --rank global, of all together), and to rewind is
    to set all weights but the head's back to their pre-trained values. All weights but the pooler's train under the
    mask. (Pruned word embeddings train, too, within a round: the decoder of the masked-LM head reads them.)

    A round of training has run.prune_every updates: in this example run.num_updates is 6 times that. In each round the
    optimizer and the schedule start anew. run.horizon is ten rounds long, so within one the learning rate falls to nine
    tenths, unless --steps gives another horizon (TAMT LT_pretrain.py). There are no dev losses before the end, since
    they would be those of trained weights. (After the last pruning all weights are set back.)"""
    run = inputs.run
    training = prepare_training(inputs, masked_layers, None, state)  # without scores
    sparsities = imp_sparsities(run.sparsity)  # .1, .2, ... up to the one that was asked for
    training.model.train()
    if training.updates_done == 0:  # not resumed
        prune(training, sparsities[0])
    while training.updates_done < run.num_updates:
        update_in_round = training.updates_done % run.prune_every
        learning_rate = run.lr * (1 - update_in_round / run.horizon)
        batch = next_batch(training)
        loss = backpropagate(training, batch)
        loss_value = clip_and_check(training, loss, run.clip)
        optimizer_step(training, learning_rate, update_in_round + 1)
        training.updates_done += 1
        if training.updates_done % run.prune_every == 0:  # a round ends
            prune(training, sparsities[training.updates_done // run.prune_every])
            if not run.no_rewind:  # the weights below the head have names with bert. or roberta. in front
                restore_weights(training, f"{run.family}.")
            training.optimizer = make_optimizer(training.parameters.values(), run.machine.device)  # a fresh one
        training.log.add(training.updates_done, loss_value, learning_rate, {})
        save_state_if_due(training)
    restore_weights(training)  # of all that was trained the masks alone are the result


def prune(training: Training, sparsity: float):
    """Prunes up to this sparsity, by the weights as they are trained, and saves the mask in a file."""
    set_masks(training.masked_layers, magnitude_masks(training.masked_layers, sparsity, training.run.rank))
    save_mask_of_step(training, sparsity)


def imp_sparsities(target: float) -> list[float]:
    """.1, .2, ... up to the target: fractions of all entries, not of those that are left. If the target is not a
    multiple of 10 %, the last round prunes less than the others."""
    tenths = [tenth / 10 for tenth in range(1, 10)]
    return [tenth for tenth in tenths if tenth < target - 1e-9] + [target]  # a target of .7000000001 counts as .7


# ---------------------------------------------------------------------------------------------------
# Appendix A: how paper, released code and this program differ; with it the corrections of the first scores, the
# optimizer, the released refreshes and the schedule. Skip it at a first reading, like all appendices.
# ---------------------------------------------------------------------------------------------------

# How the paper, the released code and this program differ in mask training. (finetune.py has a table of its own.) An
# empty cell means "as in the released code", a dash that the paper does not say, as far as we know. n is the number of
# entries that compete, and s the sparsity.
#
#     |                 | paper                | released code                   | here
#     | what is ranked  | absolute scores      | signed scores                   |
#     | who competes    | -                    | the entries of a matrix         | all; --rank local: those of a matrix
#     | how many go     | a fraction s         | int(n s), and all ties at the   | round(n s); of equal scores the
#     |                 |                      | threshold                       | first ones stay
#     | when            | -                    | every 1000 (kd: 100) updates; s | after every update;
#     |                 |                      | drifts in between               | --refresh-every as released
#     | gate            | S >= threshold       | S > threshold                   | rank; between refreshes as released
#     | masked set      | without the pooler   | with the pooler                 |
#     | decoder         | -                    | shares W of the embeddings, but |
#     |                 |                      | not their mask                  |
#     | entries without | -                    | compete like all others, though | --rank global: keep their start mask,
#     | gradient        |                      | no gradient moves their scores  | and count like all others
#     | optimizer       | -                    | AdamW; kd: BertAdam             |
#     | clipping at 1.0 | -                    | all gradients; kd: each tensor  | all gradients
#     | text of kd      | -                    | sentence pairs, one token of    | the rows of mlm, uncorrupted
#     |                 |                      | each corrupted                  |
#     | mean of kd      | over tokens          | over tokens and padding         | over tokens
#     | teacher of kd   | -                    | with dropout; mlm+kd: without   | without
#     | short runs      | -                    | the rate of full runs           | a higher rate (learning_rate_of);
#     |                 |                      | and their decay                 | it falls to 0
#     | rewinding (imp) | to the pre-trained W | none: the trained W are copied  | to the pre-trained W;
#     |                 |                      | onto themselves                 | --no-rewind as released
#     | corruption      | 15 %                 | 15 % of all but special tokens  | [UNK] is a special token, too
#
# Left out, as in the released runs: distillation of attention, schedules of the sparsity. Also left out: FSDP.
# torch.save(tamt.load_mask("mask.pt"), "theirs.pt") makes a mask file for the released code.

HIGHEST_RATE = 0.01  # of those that are raised for short runs
HORIZON = 27920  # updates of the released schedule: two epochs of WikiText-103 in batches of 16 x 512 tokens
# After so many updates the paper takes its masks at each sparsity (Table 2), before the learning rate reaches 0.
PAPER_UPDATES = {0.2: 3000, 0.3: 6000, 0.4: 8000, 0.5: 11000, 0.6: 14000, 0.7: 17000, 0.8: 20000, 0.9: 22000}


PINNED_SCORE = 1e30  # plus or minus, of entries that can get no gradient (pin_unlearnable_scores)
PINNED_LIMIT = 1e20  # pinned scores lie beyond it, though kd's weight decay lets them shrink, and all others within


def pin_unlearnable_scores(scores: Scores, inputs: Inputs):
    """Entries that can get no gradient keep their first mask, and still count among those that are kept or pruned.
    (Only where all matrices are ranked together. With --rank local they compete, as in the released code.)

    A score without a gradient stands still while the threshold moves. Say the threshold starts at .01 and rises: as
    soon as it passed .02, all kept entries of the pooler would go at once. So the score becomes PINNED_SCORE if an
    entry starts as kept, and minus that if it starts as pruned. (Not infinity: kd's weight decay subtracts a share of
    each score, and infinity minus infinity is no number.)"""
    for name, is_unlearnable in entries_without_gradient(scores.masked_layers, inputs).items():
        layer = scores.masked_layers[name]
        layer.scores.data.masked_fill_(is_unlearnable & layer.mask, PINNED_SCORE)
        layer.scores.data.masked_fill_(is_unlearnable & ~layer.mask, -PINNED_SCORE)


def is_pinned(scores):
    return scores.abs() > PINNED_LIMIT


def entries_without_gradient(masked_layers: dict, inputs: Inputs) -> dict:
    """{name: bool tensor, True where no gradient can come, whatever part of the text is read}: the pooler; the
    embedding of [PAD], and those beyond the vocabulary; and with the objective kd, which reads clean text, those of all
    words that the text does not contain. (With masked LM any may be read, since a tenth of the tokens to be predicted
    become random words.)

    The tensor of the word embeddings has the shape (V, 1), since a word gets a gradient for its whole row or not at
    all, and that of the pooler (1, 1). Both broadcast over the matrix."""
    without = {}
    vocabulary = inputs.vocabulary
    for name, layer in masked_layers.items():
        device = layer.weight.device
        if name.endswith("pooler.dense.weight"):
            without[name] = torch.ones(1, 1, dtype=torch.bool, device=device)
        if name.endswith("word_embeddings.weight"):
            is_read = torch.ones(len(layer.weight), dtype=torch.bool)
            if inputs.run.objective == "kd":
                is_read[:] = False
                is_read[:vocabulary.size] = torch.from_numpy(data.tokens_in(inputs.rows, vocabulary))
            is_read[vocabulary.size:] = False  # some matrices have more rows than there are words
            is_read[vocabulary.pad_id] = False
            is_read[layer.padding_idx] = False  # the same row, unless config.json says otherwise
            without[name] = ~is_read.to(device)[:, None]
    return without


@torch.no_grad()
def make_start_exact(scores: Scores):
    """Lets a few entries change sides, so that the count is exact before the first update, too. The first mask is
    rounded in each matrix: with a sparsity of .5 two matrices of 3 entries lose round(1.5) = 2 each, together 4, where
    3 are due.

    But for pinned ones, all kept scores are still equal, and so are all pruned ones. So a ranking, in which the first
    of equal scores win, does no more than this: if too few are kept, the first pruned ones (in the order of the model)
    come back; if too many, the last kept ones go. Each gets the start score of its new side."""
    layers = scores.masked_layers
    first_scores = {name: layer.scores.data for name, layer in layers.items()}
    set_masks(layers, masks_of_largest(first_scores, scores.sparsity, scores.rank))
    for layer in layers.values():
        start_scores = START_SCORE * layer.mask
        layer.scores.data.copy_(torch.where(is_pinned(layer.scores), layer.scores, start_scores))


def optimizer_settings(objective: str, learning_rate: float, t: int) -> dict:
    """Settings with which torch's AdamW computes in update number t (from 1) what the released optimizers do. Let m and
    v be the moving averages of the gradient and of its square, x what trains, and for the bias correction
    c_m = 1 - .9^t, c_v = sqrt(1 - .999^t):

        torch's AdamW        x <- x - lr (c_v / c_m) m / (sqrt(v) + c_v eps) - lr decay x
        released AdamW       x <- x - lr (c_v / c_m) m / (sqrt(v) + 1e-8)
                             (mlm, mlm+kd, imp, and finetune.py: transformers 2.10, optimization.py)
        released BertAdam    x <- x - lr             m / (sqrt(v) + 1e-6)    - lr .01 x
                             (kd: mask_training/train_kd.py with TinyBERT's optimizer)

    (The first line is torch's m^ / (sqrt(v^) + eps), with m^ = m / c_m and sqrt(v^) = sqrt(v) / c_v.) So eps is divided
    by c_v; and for BertAdam the rate is multiplied by c_m / c_v, and the decay divided by it, since torch multiplies
    the decay by the rate."""
    c_m = 1 - 0.9**t
    c_v = math.sqrt(1 - 0.999**t)
    if objective == "kd":
        return {"lr": learning_rate * c_m / c_v, "eps": 1e-6 / c_v, "weight_decay": 0.01 * c_v / c_m}
    return {"lr": learning_rate, "eps": 1e-8 / c_v, "weight_decay": 0.0}


def refresh_as_released(training: Training):
    """Step 7 with --refresh-every: the masks follow from new thresholds only now and then, and from the old ones in
    between."""
    scores = training.scores
    if is_refresh_due(training.run, training.updates_done):
        scores.renew_masks()
        set_thresholds(scores)
    else:
        apply_old_thresholds(scores)


@torch.no_grad()
def set_thresholds(scores: Scores):
    """Each threshold becomes the largest score that was pruned; if only pinned entries are pruned, or none, a number
    between these and all others."""
    parts = competitions(scores.masked_layers, scores.rank)
    for layers, last in zip(parts, scores.fast_ranking.last_rankings, strict=True):
        pruned_scores = torch.cat([layer.scores[~layer.mask] for layer in layers.values()])
        threshold = float(pruned_scores.max()) if len(pruned_scores) else -PINNED_LIMIT
        last.threshold = max(threshold, -PINNED_LIMIT)


@torch.no_grad()
def apply_old_thresholds(scores: Scores):
    """In place of renew_masks: the thresholds stand still, S > threshold decides, and the sparsity drifts."""
    parts = competitions(scores.masked_layers, scores.rank)
    for layers, last in zip(parts, scores.fast_ranking.last_rankings, strict=True):
        for layer in layers.values():
            layer.mask = layer.scores > last.threshold


def is_refresh_due(run: Run, updates_done: int) -> bool:
    """Whether the thresholds move after this update. With --refresh-every N mlm moves them after the updates N, 2 N,
    ..., and kd after 1, N - 1, 2 N - 1, ..., as the released code does; here both also do when they evaluate or save,
    and at the end."""
    if updates_done % run.eval_every == 0 or updates_done % run.save_every == 0 or updates_done == run.num_updates:
        return True
    if run.objective == "kd":
        return updates_done == 1 or (updates_done + 1) % run.refresh_every == 0
    return updates_done % run.refresh_every == 0


def learning_rate_of(objective: str, sparsity: float, num_updates: int) -> float:
    """The learning rate of a short run with --steps, whose decay reaches 0 at its end.

    An update moves a score by about the learning rate (kd's first ones by more), and the mask changes where scores have
    moved by about half of START_SCORE. At the paper's rates this takes one or two hundred updates, so a short run would
    change little. So the rate is raised until the scores can travel as far as in the paper's full run. It is never
    lowered, and at most 0.01."""
    full_run = paper_updates(sparsity)
    factor = travel(full_run, HORIZON, objective) / travel(num_updates, num_updates, objective)
    return min(paper_learning_rate(objective) * max(factor, 1.0), HIGHEST_RATE)


def paper_learning_rate(objective: str) -> float:
    return 2e-5 if objective == "kd" else 5e-5


def paper_updates(sparsity: float) -> int:
    """The paper's number of updates at this sparsity; between its values a straight line, beyond them the nearest."""
    return round(float(np.interp(sparsity, [*PAPER_UPDATES], [*PAPER_UPDATES.values()])))


def travel(num_updates: int, horizon: int, objective: str) -> float:
    """How far a score travels under a constant gradient, in units of the first learning rate: the sum over all
    updates of the linear decay times, for kd's BertAdam, its missing bias correction."""
    t = np.arange(1, num_updates + 1)
    distances = 1 - (t - 1) / horizon
    if objective == "kd":
        distances = distances * (1 - 0.9**t) / np.sqrt(1 - 0.999**t)
    return float(distances.sum())


# ---------------------------------------------------------------------------------------------------
# Appendix B: fast rankings
# ---------------------------------------------------------------------------------------------------


def competitions(values: dict, rank: str) -> list[dict]:
    """{name: anything} -> the same in parts, whose entries compete with each other and with no others. (rank: "global",
    or "local".)"""
    if rank == "global":
        return [values]
    return [{name: value} for name, value in values.items()]


@dataclass
class LastRanking:
    """Where the last ranking has drawn the line between entries that compete. Kept scores lie at or above the
    threshold, pruned ones at or below it. (With --refresh-every it decides between two rankings.)"""
    threshold: float = START_SCORE / 2  # halfway between the two start scores, as in the paper
    radius: float = START_SCORE / 4  # how far the threshold may move until the next ranking, a guess

    @property
    def guess(self) -> float:
        """Where the next search begins. (If nothing is pruned but pinned scores, or nothing at all, the threshold lies
        far off.)"""
        return self.threshold if abs(self.threshold) < PINNED_LIMIT else START_SCORE / 2

    def update(self, threshold: float):
        """Guesses that the threshold will move by about as much as this time."""
        moved = abs(threshold - self.guess)
        self.radius = min(max(2 * moved, self.radius / 2, 1e-9), 1.0)
        self.threshold = threshold


class FastRanking:
    """masks_of_largest() for values that move little from call to call."""

    def __init__(self, values: dict, sparsity: float, rank: str):
        """values {name: anything}: only the names count."""
        self.sparsity = sparsity
        self.rank = rank
        self.last_rankings = [LastRanking() for _ in competitions(values, rank)]  # N:M does without them

    def masks(self, values: dict) -> dict:
        if self.rank not in ("global", "local"):  # N:M: many small competitions, in which a guess gains nothing
            return masks_of_largest(values, self.sparsity, self.rank)
        masks = {}
        for competing, last in zip(competitions(values, self.rank), self.last_rankings, strict=True):
            masks |= self.masks_of_competition(competing, last)
        return masks

    def masks_of_competition(self, values: dict, last: LastRanking) -> dict:
        vectors = [matrix.detach().flatten() for matrix in values.values()]
        if len(vectors) > 1 and vectors[0].device.type != "cpu":
            vectors = [torch.cat(vectors)]  # a GPU likes one long vector; on a CPU copying takes as long as ranking
        num_kept = num_kept_of(sum(len(vector) for vector in vectors), self.sparsity)
        vector_masks, threshold = keep_largest_near(vectors, num_kept, last.guess, last.radius)
        last.update(threshold)
        if len(vectors) < len(values):
            return cut_into_matrices(vector_masks[0], values)
        return {name: mask.view(values[name].shape) for name, mask in zip(values, vector_masks, strict=True)}


def keep_largest_near(vectors: list, num_kept: int, threshold: float, radius: float) -> tuple[list, float]:
    """The mask of each vector, in which together the num_kept largest values are kept, as keep_largest does it for one
    vector; and about where the threshold now lies.

    Nearly every entry is settled by a comparison with the old threshold: it is kept if it lies above threshold +
    radius, and pruned if it lies at or below threshold - radius. Only the few in between are sorted:

        values .1 .4 .2 .3, num_kept 2, threshold .25, radius .1
        .4 > .35 stays, .1 <= .15 goes, and of .2 and .3 one more has to stay   ->   mask 0 1 0 1, threshold .2

    If the radius, which is above 0, is too small, another attempt follows with one eight times as large; the result
    is exact in any case."""
    while True:
        low = threshold - radius
        high = threshold + radius
        masks = []  # of each vector: values > high
        undecided = []  # of each vector: the positions where low < value <= high
        num_above = 0
        for vector in vectors:
            mask, num_above_here, positions = split_at(vector, low, high)
            masks.append(mask)
            undecided.append(positions)
            num_above += num_above_here
        num_undecided = sum(len(positions) for positions in undecided)
        num_undecided_to_keep = num_kept - num_above
        if 0 <= num_undecided_to_keep <= num_undecided:
            break
        radius *= 8

    if num_undecided == 0:  # as in the first updates of a run: kept and pruned scores are far apart
        return masks, threshold
    undecided_values = torch.cat([vector[positions] for vector, positions in zip(vectors, undecided, strict=True)])
    undecided_mask = keep_largest(undecided_values, num_undecided_to_keep)
    pieces = undecided_mask.split([len(positions) for positions in undecided])
    for mask, positions, piece in zip(masks, undecided, pieces, strict=True):
        mask[positions] = piece
    if num_undecided_to_keep == num_undecided:
        return masks, low  # a lower bound of where the threshold lies is good enough as the next guess
    return masks, float(undecided_values[~undecided_mask].max())


PIECE_SIZE = 1 << 18  # so many values fit into the processor's cache


def split_at(values, low: float, high: float):
    """(n,) -> the mask of values > high, how many those are, and the positions of the values in between, low < value <=
    high, in ascending order.

    On a CPU numpy compares in pieces that stay in its cache: over BERT-base's 109 M scores that takes 0.1 s
    and torch 1.4 to 2 s, a fifth of a training step."""
    if values.device.type != "cpu":
        mask = values > high
        is_between = (values > low) ^ mask
        return mask, int(mask.sum()), is_between.nonzero().squeeze(1)

    values = values.numpy()
    mask = np.empty(len(values), bool)
    num_above = 0
    between = []
    for begin in range(0, len(values), PIECE_SIZE):
        piece = values[begin:begin + PIECE_SIZE]
        above = np.greater(piece, high, out=mask[begin:begin + PIECE_SIZE])
        num_above += np.count_nonzero(above)
        between.append(begin + np.flatnonzero((piece > low) ^ above))
    return torch.from_numpy(mask), num_above, torch.from_numpy(np.concatenate(between))


# ---------------------------------------------------------------------------------------------------
# Appendix C: mask files, reports, export
# ---------------------------------------------------------------------------------------------------


def write_results(inputs: Inputs, masks: dict, report: dict, losses: dict, start_time: float) -> dict:
    """Writes mask.pt, the export if one was asked for, and mask.json -> the content of mask.json. report: of
    sparsity_report; losses: of dev_losses."""
    run = inputs.run
    empty = [name for name, fraction in report["matrices"].items() if fraction == 1]
    if empty:
        print(f"{len(empty)} of {len(masks)} matrices keep nothing: {bert.shorten(empty)}")
    # mask.pt has no times in it, so that equal runs give equal files.
    meta = metadata(run, run.num_updates, run.sparsity)
    meta["found"] = {name: report[name] for name in ("masked_set", "encoder", "whole_model")}
    save_mask(run.out / "mask.pt", masks, meta | losses)
    if run.export:
        export_model(inputs.model, masks, inputs.vocabulary, run.export)
    content = {
        "settings": inputs.identity | {"data": plain(run.data)},
        "sparsity": report,
        **losses,
        "seconds": round(time.time() - start_time, 1),
        "device": str(run.machine.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(run.out / "mask.json", content)  # last: it tells --resume that the run is finished
    return content


def save_mask(path, masks: dict[str, torch.Tensor], meta: dict):
    """{name: bool tensor} and metadata of plain types, bit-packed. Equal content gives equal bytes."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    bits = {name: pack(mask) for name, mask in masks.items()}
    write_torch(path, {"format": 1, "shapes": shapes, "bits": bits, "meta": plain(meta)})


def load_mask(path) -> dict[str, torch.Tensor]:
    """{"<module>.weight": bool tensor, True = kept}.

    path: our mask.pt, the folder of a run, a dict of bool or 0/1 tensors as the released programs save it
    (names ending in .weight or .weight_mask), or a state_dict that torch.nn.utils.prune has masked. Raises
    ValueError for anything else, and OSError if the file cannot be read."""
    masks, _ = read_mask(path)
    return masks


def read_mask(path) -> tuple[dict[str, torch.Tensor], dict]:
    """The masks, and what the file says of itself; files of other programs say nothing: {}."""
    path = Path(path)
    if path.is_dir():
        path = path / "mask.pt"
    content = bert.read_pickle(path)
    if isinstance(content, dict) and "format" in content:
        return read_packed_mask(content, path)

    content = bert.find_state_dict(content, path)
    if any(name.endswith("weight_orig") for name in content):  # the weights of a model that torch's prune has pruned
        content = {name: tensor for name, tensor in content.items() if name.endswith("_mask")}
    masks = {}
    for name, tensor in content.items():
        name = bert.WRAPPERS.sub("", name)
        if name.endswith(".bias_mask") and tensor.all():
            continue  # it prunes nothing; any other mask of a bias is an error
        if not name.endswith((".weight", ".weight_mask")):
            raise ValueError(f"{path}: {name:.100} is not a mask: expected names <module>.weight or .weight_mask")
        if tensor.dtype != torch.bool and not ((tensor == 0) | (tensor == 1)).all():
            raise ValueError(f"{path}: {name:.100} holds values other than 0 and 1")
        name = name.removesuffix("_mask")
        if name in masks:
            raise ValueError(f"{path}: it has two masks for {name:.100}")
        masks[name] = tensor.bool()
    return masks, {}


def read_packed_mask(content: dict, path) -> tuple[dict, dict]:
    shapes = content.get("shapes")
    bits = content.get("bits")
    meta = content.get("meta")
    if content["format"] != 1 or not all(isinstance(entry, dict) for entry in (shapes, bits, meta)):
        raise ValueError(f"{path}: not a mask file of format 1, the one this version knows")
    with bert.file_named_in_errors(f"{path}: what it says of itself"):
        json.dumps(meta)  # reports repeat it
    if not shapes:
        raise ValueError(f"{path}: it holds no masks")
    if shapes.keys() != bits.keys():
        raise ValueError(f"{path}: its shapes and its bits name different matrices")
    masks = {}
    for name, shape in shapes.items():
        with bert.file_named_in_errors(f"{path}: {name:.100}"):
            masks[name] = unpack(bits[name], shape)
    return masks, meta


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Eight entries to a byte, row-major, the first entry in the highest bit, 1 = kept."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack(bits: torch.Tensor, shape: list) -> torch.Tensor:
    num_entries = math.prod(shape)
    num_bytes = (num_entries + 7) // 8
    is_packed = isinstance(bits, torch.Tensor) and bits.dtype == torch.uint8 and bits.shape == (num_bytes,)
    if not is_packed or min(shape, default=0) < 0:
        raise ValueError(f"its bits are not the {num_bytes} bytes of a mask of shape {shape}")
    entries = np.unpackbits(bits.numpy(), count=num_entries).view(bool)
    return torch.from_numpy(entries).view(*shape)


def fit_masks(layers: dict[str, nn.Module], masks: dict, source) -> dict[str, torch.Tensor]:
    """The masks in the order of `layers`; a ValueError lists what does not fit.

    Pooler and word embeddings may be absent on either side; absent means dense."""
    family = next(iter(layers)).split(".")[0]
    full_names = {name: name if name.startswith(("bert.", "roberta.")) else f"{family}.{name}" for name in masks}
    if len(set(full_names.values())) < len(masks):
        raise ValueError(f"{source}: it has two masks for the same matrix, one with {family}. in front of its name")
    masks = {full_names[name]: mask for name, mask in masks.items()}

    def is_required(name):
        return not name.endswith((".pooler.dense.weight", ".embeddings.word_embeddings.weight"))

    missing = [name for name in layers if name not in masks and is_required(name)]
    unexpected = [name for name in masks if name not in layers and is_required(name)]
    wrong_shape = []
    for name, mask in masks.items():
        if name in layers and mask.shape != layers[name].weight.shape:
            wrong_shape.append(f"{name} {list(mask.shape)}, not {list(layers[name].weight.shape)}")

    problems = []
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong_shape)):
        if names:
            problems.append(f"{problem}: {bert.shorten(names)}")
    if problems:
        raise ValueError(f"{source}: the mask of another model: {'; '.join(problems)}")
    return {name: masks[name].to(layer.weight.device) for name, layer in layers.items() if name in masks}


def say_if_weights_differ(meta: dict, checksum: str, file):
    """A mask is worth little for other weights of the same shapes: for a checkpoint that took the place of the first
    one, or the toy of another machine. checksum: of the weights below the head that it is to be used for."""
    if meta.get("backbone_checksum", checksum) != checksum:
        print(f"{file}: note: this mask was found for other weights than those of this model")


def say_if_ablation_differs(meta: dict, file, weights: str = "pretrained", seed: int | None = None):
    """A mask that finetune.py found on random or shuffled weights belongs to these. weights, seed: of those that it is
    to be used on. (Masks of this program, all found on pre-trained weights, do not say it.)"""
    found_on = (meta.get("weights", "pretrained"), meta.get("seed"))
    if found_on[0] != "pretrained" and found_on != (weights, seed):
        print(f"{file}: note: this mask was found on {found_on[0]} weights (seed {found_on[1]}), not on those that it "
              "is used on now")


def sparsity_report(model: bert.Model, masks: dict[str, torch.Tensor]) -> dict:
    """How many entries are pruned, and their fraction, in the three ways in which people count, and of each matrix.

    masked_set: of all entries that have a mask; encoder: of the 6 L encoder matrices; whole_model: of all
    parameters of embeddings, encoder and, if there is one, pooler, without heads."""
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    sizes = {name: mask.numel() for name, mask in masks.items()}
    encoder = [name for name in masks if ".encoder." in name]
    encoder_zeros = sum(zeros[name] for name in encoder)
    encoder_size = sum(sizes[name] for name in encoder)
    model_size = sum(parameter.numel() for name, parameter in model.backbone.named_parameters()
                     if not name.endswith(".scores"))
    return {
        "pruned": sum(zeros.values()),
        "entries": sum(sizes.values()),
        "masked_set": sum(zeros.values()) / max(sum(sizes.values()), 1),
        "encoder": encoder_zeros / max(encoder_size, 1),
        "whole_model": sum(zeros.values()) / model_size,
        "matrices": {name: zeros[name] / sizes[name] for name in masks},
    }


def similarity(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Jaccard similarity of the kept entries: the unweighted mean over matrices, paired by name (released
    code: compare_mask.py). A matrix that keeps nothing in either mask counts as 1."""
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        raise ValueError("masks of different models or scopes")
    similarities = []
    for name in a:
        num_both = int((a[name] & b[name]).sum())
        num_either = int((a[name] | b[name]).sum())
        similarities.append(num_both / num_either if num_either else 1.0)
    return sum(similarities) / len(similarities)


def compare_masks(files: list):
    """Prints the similarity of each mask with every other, and its distance (1 - that) from the first."""
    masks = [load_mask(file) for file in files]
    for file, mask in zip(files, masks, strict=True):
        try:
            row = [similarity(mask, other) for other in masks]
        except ValueError as error:
            raise ValueError(f"{file} cannot be compared with all of the others: {error}") from None
        values = "  ".join(f"{value:.4f}" for value in row)
        print(f"{values}  distance {1 - row[0]:.4f}  {file}")


def evaluate_mask(settings: Settings) -> dict:
    """--evaluate and --export of a finished mask, or of the dense model."""
    start_time = time.time()
    settings = dataclasses.replace(settings, **{
        each.name: each.default for each in fields(settings) if each.name in ignored_by_evaluation(settings)})
    machine = start_machine(settings.device, settings.dtype)
    refuse_several_processes(machine, "--evaluate or --mask")
    masks = {}
    meta = {}
    if settings.mask:
        masks, meta = read_mask(settings.mask)
        if meta.get("method") == "super":  # a mask keeps biases, and a Super Ticket takes those of FFNs out
            raise ValueError(f"{settings.mask}: a Super Ticket removes whole units: finetune.py scores and exports it")
        settings = settings_of_mask(settings, meta)

    model, vocabulary = load_model(settings.model)
    run = fill_in_defaults(settings, machine, model)
    model.requires_grad_(False).to(machine.device)
    masked_layers = install_masked_layers(model)
    if settings.mask:
        say_if_weights_differ(meta, run.backbone_checksum, settings.mask)
        say_if_ablation_differs(meta, settings.mask)
        masks = fit_masks(masked_layers, masks, settings.mask)
        set_masks(masked_layers, masks)

    content = {"metadata": meta, "sparsity": sparsity_report(model, masks)}
    print(json.dumps(content, indent=1))
    if settings.evaluate:
        print(f"dev losses: on the held-out text of {run.data}, {run.seq_len} tokens a row")
        content |= dev_losses(model, read_rows(run, vocabulary, "dev"), vocabulary, machine)
    if settings.export:
        export_model(model, masks, vocabulary, settings.export)
    content["seconds"] = round(time.time() - start_time, 1)
    print_summary(settings.mask, content, run)
    return content


def settings_of_mask(settings: Settings, meta: dict) -> Settings:
    """The model (instead of the toy, the default) and the text with its rows are those of the mask's run, if no others
    are asked for. So --evaluate gives the dev losses that the mask file holds, with the same --dtype."""
    known = {}
    is_valid = isinstance(meta.get("model") or "", str) and isinstance(meta.get("data") or "", str)
    if not is_valid or not isinstance(meta.get("lines", False), bool):
        raise ValueError(f"{settings.mask}: model and data in its metadata are no texts, or lines is not true or false")
    seq_len = meta.get("seq_len")
    if seq_len is not None and (type(seq_len) is not int or seq_len < 3):
        raise ValueError(f"{settings.mask}: seq_len in its metadata is no number of tokens: {seq_len!r:.60}")
    if settings.model == "toy" and meta.get("model", "toy") != "toy":  # the default
        known["model"] = meta["model"]
        print(f"model: {meta['model']}, for which the mask was found")
    if settings.data is None and meta.get("data") and "task" not in meta:  # else the data are those of a task
        known["data"] = meta["data"]
        known["lines"] = settings.lines or meta.get("lines", False)
        known["seq_len"] = settings.seq_len or seq_len
    return dataclasses.replace(settings, **known)


def report_finished(inputs: Inputs, result: dict) -> dict:
    """What is left to do with --resume where a run is finished: the export, if it is asked for, and the summary."""
    run = inputs.run
    if run.export and run.machine.process_index == 0:
        masks = fit_masks(maskable_layers(inputs.model, run.scope), load_mask(run.out), run.out)
        export_model(inputs.model, masks, inputs.vocabulary, run.export)
    with damage_named(run.out / "mask.json"):
        print_summary(run.out / "mask.pt", result, run)
    return result


def export_model(model: bert.Model, masks: dict, vocabulary, folder: Path):
    """The subnetwork as a folder that transformers' AutoModelForMaskedLM loads, zeros baked in.

    The decoder stays dense: where the word embeddings are masked it cannot share their matrix any more, and is
    written by itself."""
    family = model.config.model_type
    head = bert.MLM_HEADS[family]
    words = f"{family}.embeddings.word_embeddings.weight"
    tensors = {name: parameter.data for name, parameter in model.named_parameters() if not name.endswith(".scores")}
    has_head = has_pretrained_head(model)
    if not has_head:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{head}.")}

    is_tied = model.config.tie_word_embeddings
    if has_head and is_tied and words in masks:
        print("the masked word embeddings differ from the dense decoder: written as two matrices, untied")
        tensors[f"{head}.decoder.weight"] = tensors[words]
        is_tied = False

    for name, mask in masks.items():
        tensors[name] = tensors[name] * mask
    bert.save(folder, model.config, tensors, "ForMaskedLM", tie_word_embeddings=is_tied)
    data.save_vocabulary(vocabulary, folder, family, model.config.max_tokens, model.config.type_vocab_size)


def print_summary(mask, content: dict, run):
    """The block of lines that grep reads, and what to do next."""
    print("---")
    if mask:
        print(f"mask: {mask}")
    print(f"sparsity: {content['sparsity']['masked_set']:.4f}")
    for name in ("dev_mlm_loss", "dev_kd_loss", "seconds"):
        if name in content:
            print(f"{name}: {content[name]:.4f}")
    if mask:
        task = "toy" if run.model == "toy" else "sst2"
        words = ["finetune.py", "--task", task, "--mask", str(mask)]
        meta = content.get("metadata")  # with --evaluate
        if meta is not None and meta.get("model") != run.model:
            words += ["--model", run.model]
    else:  # --evaluate of the whole network
        words = ["tamt.py", "--model", run.model, "--data", str(run.data), "--seq-len", str(run.seq_len)]
        if run.lines:
            words.append("--lines")
    print(f"next: {shlex.join(['python', *words])}")


# ---------------------------------------------------------------------------------------------------
# Appendix D: the folder of a run, and evaluations on the way
# ---------------------------------------------------------------------------------------------------

SAVE_SECONDS = 300  # state.pt is written about this often: a crash costs no more work than that, and an update


def identity_of_run(run, rows, dev_rows) -> dict:
    """What makes this run this run; --resume refuses any other. The text and the weights
    count by their content, the weights also by their path, so a changed file is noticed."""
    names = ("model", "method", "objective", "sparsity", "rank", "scope", "init", "lines", "num_updates",
             "horizon", "seed", "batch_size", "accumulate", "seq_len", "lr", "clip", "refresh_every",
             "prune_every", "no_rewind", "log_every", "eval_every", "save_every", "weights", "config")
    identity = {name: plain(getattr(run, name)) for name in names}
    identity["dtype"] = str(run.machine.dtype)
    identity["num_processes"] = run.machine.num_processes if run.trains else 1  # dropout differs between them
    for name, text in (("text", rows), ("dev_text", dev_rows)):
        identity[name] = None if text is None else Path(text.filename).stem  # a hash of text, tokenizer and T
    return identity


def check_folder(out: Path, identity: dict, result_name: str):
    """Raises ValueError if the folder holds another run, or a mask that is not this run's.

    A run is finished when the file `result_name` is there; until then state.pt says how far it came."""
    result = out / result_name
    state = read_state(out)
    if state is not None:
        held = state["settings"]
    elif result.exists():
        held = bert.read_json(result).get("settings")
    else:
        if (out / "mask.pt").exists():
            _, meta = read_mask(out / "mask.pt")
            is_other = any(meta[name] != identity[name] for name in meta.keys() & identity.keys())
            if not meta or is_other or meta.get("step") != identity.get("num_updates", meta.get("step")):
                raise ValueError(f"{out} holds another mask.pt: choose another --out, or move it away")
        return

    if not isinstance(held, dict):
        raise ValueError(f"{result} is not a file of this program: choose another --out, or move it away")
    held = dict(held)
    if state is None or result.exists():
        held["num_processes"] = identity.get("num_processes")  # of a finished run it does not matter any more
    differences = [f"{name} {held.get(name)!r} there, {identity[name]!r} here"
                   for name in identity if held.get(name) != identity[name]]
    if differences:
        raise ValueError(f"{out} holds another run ({'; '.join(differences)}): choose another --out or remove "
                         "that folder")


def read_state(out: Path) -> dict | None:
    file = out / "state.pt"
    if not file.exists():
        return None
    state = bert.read_pickle(file)
    is_state = isinstance(state, dict) and state.get("format") == 2
    if not is_state or not isinstance(state.get("settings"), dict) or type(state.get("step")) is not int:
        raise ValueError(f"{file}: not a state of this version; remove it to start anew")
    return state


def open_folder(out: Path, identity: dict, resume: bool, result_name: str, machine) -> tuple:
    """-> (result, None) if the folder holds the result of this run and --resume is given; (None, state) if it holds
    the state of an unfinished one and --resume is given; else (None, None), and the result, state and log of an earlier
    run are removed. Raises ValueError if it holds something else, or an unfinished run without --resume.

    Of several processes the first one looks, since the folder lies on its host, and tells the others."""
    if machine.num_processes == 1:
        return open_own_folder(out, identity, resume, result_name)
    refuse_different_inputs(identity, machine)
    outcome = [None, None]  # what was found, or the error
    if machine.process_index == 0:
        try:
            result, state = open_own_folder(out, identity, resume, result_name)
            if state is not None and isinstance(state.get("parameters"), dict):  # else restore_parameters refuses it
                # In states of earlier versions scores are views of one vector, and each would be sent with all of it.
                state["parameters"] = {name: tensor.clone() for name, tensor in state["parameters"].items()}
            outcome[0] = (result, state)
        except (ValueError, OSError) as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def refuse_different_inputs(identity: dict, machine: Machine):
    """Raises ValueError, in all processes, if they read different files or have different settings: the gradients that
    they add up would be those of different networks or texts."""
    identities = [None] * machine.num_processes
    torch.distributed.all_gather_object(identities, identity)
    differing = [name for name in identity if any(other[name] != identity[name] for other in identities)]
    if differing:
        raise ValueError(f"the processes differ in {', '.join(differing)}: expected equal files and settings on all "
                         "hosts")


def open_own_folder(out: Path, identity: dict, resume: bool, result_name: str) -> tuple:
    check_folder(out, identity, result_name)
    state = read_state(out)
    result = out / result_name
    if resume and result.exists():
        if result_name == "mask.json" and not (out / "mask.pt").exists():
            raise ValueError(f"{out} is finished, but its mask.pt is gone: run it again, without --resume")
        print(f"{out} is finished: its figures are in {result}")
        return bert.read_json(result), None
    if state is not None and not resume and not result.exists():
        raise ValueError(f"{out} holds this run, unfinished at step {state['step']}: continue with --resume, or "
                         "choose another --out, or remove that folder")

    out.mkdir(parents=True, exist_ok=True)
    for part in out.rglob(f"*{bert.PART_SUFFIX}"):  # what a killed run was writing
        part.unlink(missing_ok=True)
    if resume and state is not None:
        print(f"resuming {out} at step {state['step']}")
        cut_log(out / "log.jsonl", state["step"])
        return None, state
    for name in (result_name, "state.pt", "log.jsonl"):
        (out / name).unlink(missing_ok=True)
    return None, None


def cut_log(file: Path, step: int):
    """Removes the lines after the saved state: those updates will be done and logged again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().split("\n")[:-1]:
        try:
            is_before = json.loads(line)["step"] <= step
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{file}: damaged; remove it, the run can do without") from None
        if is_before:
            kept.append(f"{line}\n")
    with bert.atomic_write(file) as output:
        output.write("".join(kept).encode())


def save_state_if_due(training: Training):
    """state.pt: all that the next update depends on. Order, corruption and dropout follow from (seed, step)."""
    run = training.run
    is_due = training.updates_done % run.save_every == 0 or training.updates_done == run.num_updates
    if run.machine.process_index > 0 or not (is_due or time.time() - training.saved_at > SAVE_SECONDS):
        return
    training.saved_at = time.time()
    write_torch(run.out / "state.pt", {
        "format": 2,
        "settings": training.inputs.identity,
        "step": training.updates_done,
        "parameters": {name: parameter.data for name, parameter in training.parameters.items()},
        "optimizer": training.optimizer.state_dict(),
        "masks": {name: pack(layer.mask) for name, layer in training.masked_layers.items()},
        "thresholds": thresholds_of(training),
        "log": training.log.state(),
    })


def thresholds_of(training: Training) -> list[float]:
    """With --refresh-every they decide between two rankings. Otherwise they are only guesses for the next one."""
    if training.scores is None or training.run.refresh_every == 1:
        return []
    return [last.threshold for last in training.scores.fast_ranking.last_rankings]


def restore_state(training: Training, state: dict):
    file = training.run.out / "state.pt"
    restore_parameters(training.parameters, training.optimizer, state, file)
    with damage_named(file):
        for name, layer in training.masked_layers.items():
            layer.mask = unpack(state["masks"][name], list(layer.mask.shape)).to(layer.mask.device)
        if thresholds_of(training):
            for last, threshold in zip(training.scores.fast_ranking.last_rankings, state["thresholds"], strict=True):
                if not math.isfinite(threshold):
                    raise ValueError(f"threshold {threshold}")
                last.threshold = float(threshold)
        training.log.restore(state["log"])
        training.updates_done = state["step"]
        if not 0 <= training.updates_done <= training.run.num_updates:
            raise ValueError(f"step {training.updates_done}")


def restore_parameters(parameters: dict, optimizer, state: dict, file):
    """Puts parameters and the optimizer's moments back. ValueError if they are not those of this model."""
    saved = state.get("parameters")
    is_dict = isinstance(saved, dict) and all(isinstance(value, torch.Tensor) for value in saved.values())
    if not is_dict or saved.keys() != parameters.keys():
        raise ValueError(f"{file}: its parameters are not those of this run; remove it to start anew")
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape:
            raise ValueError(f"{file}: {name} has the shape {list(saved[name].shape)}, not {list(parameter.shape)}; "
                             "remove the file to start anew")
        if not saved[name].isfinite().all():
            raise ValueError(f"{file}: numbers of {name} are not finite; remove the file to start anew")
        parameter.data.copy_(saved[name])
    with damage_named(file):
        optimizer.load_state_dict(state["optimizer"])
        for name, parameter in parameters.items():
            moments = optimizer.state.get(parameter, {})
            for kind in moments.keys() & {"exp_avg", "exp_avg_sq"}:
                if moments[kind].shape != parameter.shape or not moments[kind].isfinite().all():
                    raise ValueError(f"{kind} of {name}")


@contextmanager
def damage_named(file):
    """Turns the errors of a state that lacks something, or holds something else, into a ValueError of one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file}: damaged ({type(error).__name__}: {error}); remove it to start anew") from None


def save_mask_of_step(training: Training, sparsity: float):
    """step-N/mask.pt, the mask after N updates."""
    run = training.run
    if run.machine.process_index > 0:
        return
    folder = run.out / f"step-{training.updates_done}"
    folder.mkdir(exist_ok=True)
    masks = current_masks(training.masked_layers)
    save_mask(folder / "mask.pt", masks, metadata(run, training.updates_done, sparsity))


def metadata(run, step: int, sparsity: float) -> dict:
    """What a mask file says of itself. Times and versions are left out: equal runs give equal bytes."""
    names = ["model", "backbone_checksum", "method", "rank", "scope", "init", "seed", "lr", "data", "lines", "seq_len"]
    if run.method == "tamt":
        names.append("objective")
    meta = {name: plain(getattr(run, name)) for name in names}
    return meta | {
        "step": step,
        "sparsity": sparsity,
        "ties": "among equals the lower index is kept",
        "bits": "row-major, first entry in the highest bit, 1 = kept",
    }


def plain(value):
    """A value as torch.load(weights_only=True) and JSON know it."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, float):
        return float(value)
    return value if value is None or isinstance(value, (bool, int)) else str(value)


def versions() -> dict:
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def write_torch(path, content):
    """torch.save by way of memory, so that the bytes depend on the content alone."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with bert.atomic_write(path) as file:
        file.write(buffer.getbuffer())


def write_json(path, content: dict):
    with bert.atomic_write(path) as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())


def weights_checksum(model: nn.Module) -> str:
    """CRC-32 of all weights: 0.2 s for BERT-base."""
    checksum = 0
    for parameter in model.state_dict().values():
        checksum = zlib.crc32(parameter.cpu().contiguous().numpy().data, checksum)
    return f"{checksum:08x}"


def config_checksum(model: bert.Model) -> str:
    """CRC-32 of what config.json says: with other heads, or another dropout, the same weights are another model."""
    return f"{zlib.crc32(json.dumps(dataclasses.asdict(model.config)).encode()):08x}"


SHOW_SECONDS = 60  # after so much silence a slow run says how far it is


def minutes_and_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


class Log:
    """A progress line at each interval on the terminal, and most of its figures as a line of log.jsonl. (A slow run has
    shorter lines in between, on the terminal alone.)"""

    def __init__(self, run, masked_layers):
        self.run = run
        self.masked_layers = masked_layers
        self.began = time.time()
        self.shown_at = self.began  # when the terminal had its last line
        self.total_loss = 0.0  # since the last line
        self.num_updates = 0
        self.num_timed = 0  # of these, those since the program was started: after --resume only a part of them
        self.bits = self.pack_masks()

    def pack_masks(self) -> np.ndarray:
        return np.concatenate([pack(layer.mask).numpy() for layer in self.masked_layers.values()])

    def add(self, step: int, loss: float, learning_rate: float, losses: dict):
        run = self.run
        self.total_loss += loss
        self.num_updates += 1
        self.num_timed += 1
        is_due = step % run.log_every == 0 or step == run.num_updates or losses
        if run.machine.process_index > 0:
            return
        if not is_due:
            if time.time() - self.shown_at > SHOW_SECONDS:
                self.show(f"step {step}/{run.num_updates}  ETA {self.time_left(step)}")
            return

        bits = self.pack_masks()
        num_entries = sum(layer.mask.numel() for layer in self.masked_layers.values())
        kept = int(np.bitwise_count(bits).sum()) / num_entries
        flips = int(np.bitwise_count(bits ^ self.bits).sum()) / num_entries
        seconds = self.seconds_per_update()
        tokens_per_second = run.rows_per_update * run.seq_len / seconds
        mean_loss = self.total_loss / self.num_updates

        shown_losses = "".join(f"  {name} {value:.4f}" for name, value in losses.items())
        self.show(f"step {step}/{run.num_updates}  loss {mean_loss:.4f}  kept {kept:.4%}  flips {flips:.4%}  "
                  f"lr {learning_rate:.2e}  {seconds * 1e3:.0f} ms/step  {tokens_per_second:,.0f} tokens/s  "
                  f"ETA {self.time_left(step)}{shown_losses}")
        data.append_line(run.out / "log.jsonl", {
            "step": step, "loss": mean_loss, "kept": kept, "flips": flips, "lr": learning_rate, **losses,
            "ms_per_step": round(seconds * 1e3, 3), "time": round(time.time(), 1)})

        self.began = time.time()
        self.total_loss = 0.0
        self.num_updates = 0
        self.num_timed = 0
        self.bits = bits

    def show(self, line: str):
        print(line, flush=True)
        self.shown_at = time.time()

    def seconds_per_update(self) -> float:
        return (time.time() - self.began) / self.num_timed

    def time_left(self, step: int) -> str:
        return minutes_and_seconds(self.seconds_per_update() * (self.run.num_updates - step))

    def state(self) -> dict:
        return {"total_loss": self.total_loss, "num_updates": self.num_updates, "bits": torch.from_numpy(self.bits)}

    def restore(self, state: dict):
        self.total_loss = float(state["total_loss"])
        self.num_updates = state["num_updates"]
        self.bits = state["bits"].numpy()


def report_progress(training: Training, loss: float, learning_rate: float):
    """Now and then a line of the log, the dev losses, and the mask as a file."""
    run = training.run
    losses = {}
    is_last = training.updates_done == run.num_updates  # then finish() evaluates
    if training.updates_done % run.eval_every == 0 and not is_last:
        with starting_weights_in_place(training):  # with the head as it was before training, so that masks compare
            losses = evaluate_on_dev(training)
    training.log.add(training.updates_done, loss, learning_rate, losses)
    if training.updates_done % run.save_every == 0:
        save_mask_of_step(training, run.sparsity)


def evaluate_on_dev(training: Training) -> dict[str, float]:
    inputs = training.inputs
    if inputs.dev_rows is None or training.run.machine.process_index > 0:
        return {}
    start_time = time.time()
    losses = dev_losses(training.model, inputs.dev_rows, inputs.vocabulary, training.run.machine)
    training.log.began += time.time() - start_time  # the next line gives the time of updates, and this was none
    return losses


@contextmanager
def starting_weights_in_place(training: Training):
    """Inside the with block the weights that train have their values from before the training: with mlm, those of the
    head. Afterwards the trained ones are back."""
    trained = {name: training.parameters[name].data.clone() for name in training.starting_weights}
    restore_weights(training)
    try:
        yield
    finally:
        for name, weight in trained.items():
            training.parameters[name].data.copy_(weight)


# ---------------------------------------------------------------------------------------------------
# Appendix E: settings and the command line
# ---------------------------------------------------------------------------------------------------


def option(default, help: str, check: str | None = None, **argparse_options):
    """A field of Settings, with what the command line and check_settings need to know of it."""
    return field(default=default, metadata={"help": help, "check": check, **argparse_options})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user can choose: a field is a flag of the command line. None: fill_in_defaults() chooses, or nothing does.

    The toy has defaults of its own (TOY), so that its run takes a minute."""
    model: str = option("toy", f"{', '.join(data.MODELS)}, toy (default; with --mask its model), or a path: a folder, "
                        "a .safetensors, .bin, .pt, .pth or .ckpt file, a TensorFlow prefix, a .zip or .tar.gz")
    method: str = option("tamt", "how the mask is found (tamt)", choices=["tamt", "imp", "omp", "random"])
    objective: str = option("mlm", "loss of tamt (mlm)", choices=["mlm", "kd", "mlm+kd"])
    sparsity: float | None = option(None, "fraction of weights REMOVED, in [0, 1) (0.7; with N:M 1 - N/M)",
                                    "fraction", type=float)
    rank: str | None = option(None, "where entries compete: global (one list), local (inside each matrix), or N:M "
                              "(N of every M consecutive entries of a row stay) (global for tamt, else local)")
    scope: str = option("all", "encoder: the word embeddings stay dense (all)", choices=["all", "encoder"])
    init: str = option("omp", "start of the scores (omp)", choices=["omp", "random"])
    data: str | None = option(None, "wikitext-103 (default; with --mask its text), wikitext-2, toy, a text file, or a "
                              "folder with wiki.train.raw and wiki.valid.raw")
    lines: bool = option(False, "each line of the text is a padded row, instead of packed blocks")
    steps: int | None = option(None, "updates of tamt; horizon of imp's schedule (the paper's)", "positive", type=int)
    batch_size: int = option(16, "rows in a forward pass, over all processes (16)", "positive", type=int)
    accumulate: int = option(1, "forward passes per update (1)", "positive", type=int)
    seq_len: int | None = option(None, "tokens in a row (512, or the positions of the model)", "positive", type=int)
    lr: float | None = option(None, "learning rate (5e-5, kd 2e-5; raised where --steps shortens the run)",
                              "positive", type=float)
    clip: float = option(1.0, "largest l2 norm of all gradients together (1.0)", "positive", type=float)
    seed: int = option(1, "of data order, corruption, dropout, random masks and fresh heads (1)", "seed", type=int)
    refresh_every: int = option(1, "updates between two rankings; 1 keeps the sparsity exact (1)", "positive", type=int)
    device: str = option("auto", "where to compute (auto)", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option("auto", "of the forward pass (auto)", choices=["auto", "fp32", "bf16"])
    compile: bool = option(False, "run the student through torch.compile")
    out: Path | None = option(None, "folder of the run (out/MODEL-METHOD-...)", type=Path)
    log_every: int | None = option(None, "updates between progress lines (100)", "positive", type=int)
    eval_every: int | None = option(None, "updates between dev evaluations (1000)", "positive", type=int)
    save_every: int | None = option(None, "updates between saved states, and masks but for imp's (1000)", "positive",
                                    type=int)
    resume: bool = option(False, "continue the run in --out exactly where it stopped")
    prune_every: int | None = option(None, "imp: updates between two prunings (2792)", "positive", type=int)
    no_rewind: bool = option(False, "imp: keep the trained weights, as the released code does")
    evaluate: bool = option(False, "only report on --mask, or on the dense model; no training")
    mask: Path | None = option(None, "mask file, or folder of a run, for --evaluate and --export", type=Path)
    compare: tuple | None = option(None, "only print the mean Jaccard similarities of these masks", nargs="+",
                                   metavar="MASK")
    export: Path | None = option(None, "write the subnetwork as a folder that transformers loads", type=Path,
                                 metavar="DIR")

    @property
    def trains_head(self) -> bool:
        """Whether the masked-LM head trains, too: where masked LM is the loss, or a part of it."""
        return self.method == "imp" or (self.method == "tamt" and self.objective != "kd")

    def __post_init__(self):
        check_settings(self)
        if self.method == "imp" and self.objective != "mlm":
            raise ValueError(f"--method imp trains the weights with the masked-LM loss: --objective {self.objective} "
                             "goes with tamt only")
        if self.rank not in (None, "global", "local"):
            self.check_pattern()
        if self.mask and not (self.evaluate or self.export):
            raise ValueError("--mask goes with --evaluate or --export")
        if self.export:
            check_new_folder("--export", Path(self.export))

    def check_pattern(self):
        n, m = parse_pattern(self.rank)
        if self.method == "imp":
            raise ValueError(f"--rank {self.rank} goes with tamt, omp and random, not with imp")
        if self.refresh_every > 1:
            raise ValueError(f"--rank {self.rank} has no threshold that could stand still: leave --refresh-every out")
        if self.sparsity is not None and abs(self.sparsity - (1 - n / m)) > 1e-4:
            raise ValueError(f"--rank {self.rank} removes {1 - n / m:.4g}: leave --sparsity {self.sparsity:g} out")


TOY = {"data": "toy", "steps": 300, "seq_len": 64, "prune_every": 50, "log_every": 50, "eval_every": 100,
       "save_every": 100}
DEFAULTS = {"log_every": 100, "eval_every": 1000, "save_every": 1000, "prune_every": 2792}


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """The settings of one run, with the defaults filled in."""
    machine: Machine
    family: str  # bert or roberta
    weights: str  # a checksum of those of the checkpoint
    backbone_checksum: str  # the same without heads: a mask belongs to these weights
    config: str  # a checksum of config.json
    num_updates: int
    horizon: int  # updates until the learning rate would reach 0
    lr_reason: str

    @property
    def trains(self) -> bool:
        return self.method in ("tamt", "imp")

    @property
    def rows_per_update(self) -> int:
        return self.batch_size * self.accumulate


def fill_in_defaults(settings: Settings, machine: Machine, model: bert.Model) -> Run:
    """Fills in everything that the settings leave open; what this model cannot do is a ValueError."""
    values = {each.name: getattr(settings, each.name) for each in fields(Settings)}
    # Numbers of numpy become plain ones.
    values |= {name: float(value) for name, value in values.items() if isinstance(value, float)}
    values |= {each.name: each.default for each in fields(Settings)
               if each.name in flags_without_effect(settings)}
    if settings.model == "toy":
        values |= {name: value for name, value in TOY.items() if values[name] is None}
        if settings.method == "imp":
            values["steps"] = settings.steps  # its horizon is ten rounds for the toy, too
    values |= {name: value for name, value in DEFAULTS.items() if values[name] is None}
    if values["data"] is None and (settings.method in ("tamt", "imp") or settings.evaluate):
        values["data"] = "wikitext-103"
    if values["data"] not in (None, "toy", *data.CORPORA):
        values["data"] = os.path.abspath(values["data"])
    values["model"] = absolute_model(settings.model)
    refuse_own_folder(values["model"], settings.export)

    if values["rank"] is None:
        values["rank"] = "global" if settings.method == "tamt" else "local"
    if is_pattern(values["rank"]):
        n, m = parse_pattern(values["rank"])
        values["sparsity"] = 1 - n / m
        check_widths(model, settings.scope, values["rank"])
    elif values["sparsity"] is None:
        values["sparsity"] = 0.7

    positions = model.config.max_tokens
    if values["seq_len"] is None:
        values["seq_len"] = min(512, positions)
    if not 3 <= values["seq_len"] <= positions:
        raise ValueError(f"--seq-len {values['seq_len']}: {settings.model} takes 3 to {positions} tokens")
    if settings.method in ("tamt", "imp") and settings.batch_size % machine.num_processes:
        raise ValueError(f"--batch-size {settings.batch_size} cannot be shared evenly by {machine.num_processes} "
                         "processes")
    if values["out"] is None:
        values["out"] = Path("out") / default_name(values)
    values["out"] = Path(values["out"])

    num_updates, horizon = schedule(values)
    values["lr"], lr_reason = choose_learning_rate(values, num_updates)
    if settings.method == "tamt" and values["objective"] == "kd":
        # Weight decay, .01 of the learning rate, shrinks all scores: by about exp(-20) over the whole run at most, so
        # that pinned ones stay beyond PINNED_LIMIT.
        sum_of_decay = num_updates - num_updates * (num_updates - 1) / (2 * horizon)  # 1 + (1 - 1 / horizon) + ...
        highest = min(10.0, float(f"{20 / 0.01 / sum_of_decay:.2g}"))
        if values["lr"] > highest:
            raise ValueError(f"--lr {values['lr']:g}: expected at most {highest:g} with kd and {num_updates:,} "
                             f"updates; scores start at {START_SCORE}")
    return Run(**values, machine=machine, family=model.config.model_type, weights=weights_checksum(model),
               backbone_checksum=weights_checksum(model.backbone), config=config_checksum(model),
               num_updates=num_updates, horizon=horizon, lr_reason=lr_reason)


def is_pattern(rank: str) -> bool:
    return ":" in rank


def parse_pattern(rank: str) -> tuple[int, int]:
    """Of "2:4" the numbers 2 and 4. ValueError if it is not N:M with 0 < N < M."""
    try:
        num_kept, group_size = (int(number) for number in rank.split(":"))
    except ValueError:
        num_kept, group_size = 0, 0
    if not 0 < num_kept < group_size:
        raise ValueError(f"--rank {rank}: expected global, local, or N:M with 0 < N < M, such as 2:4")
    return num_kept, group_size


def schedule(values: dict) -> tuple[int, int]:
    """The number of updates, and the horizon of the linear decay."""
    if values["method"] in ("omp", "random"):
        return 0, 0
    if values["method"] == "imp":
        num_rounds = len(imp_sparsities(values["sparsity"])) - 1
        horizon = values["steps"] or 10 * values["prune_every"]
        if horizon < values["prune_every"]:
            raise ValueError(f"--steps {horizon}: imp's learning rate would be 0 from there on in each round of "
                             f"{values['prune_every']} updates; expected at least --prune-every")
        return values["prune_every"] * num_rounds, horizon
    if values["steps"]:
        return values["steps"], values["steps"]
    return paper_updates(values["sparsity"]), HORIZON


def choose_learning_rate(values: dict, num_updates: int) -> tuple[float | None, str]:
    """The learning rate, and the reason that is printed."""
    if values["method"] in ("omp", "random"):
        return None, "nothing trains"
    if values["lr"]:
        return values["lr"], "as asked"
    paper_rate = paper_learning_rate(values["objective"])
    if values["method"] == "imp" or not values["steps"] or num_updates >= HORIZON:  # as long as the decay
        return paper_rate, "the paper's"
    rate = learning_rate_of(values["objective"], values["sparsity"], num_updates)
    full_run = f"{paper_updates(values['sparsity']):,} updates of a full run"
    if rate == HIGHEST_RATE:
        return rate, f"the highest that is chosen: scores travel less far than in the {full_run}"
    return rate, f"the paper's {paper_rate:g} x {rate / paper_rate:.4g}: scores can travel as far as in the {full_run}"


def check_widths(model: bert.Model, scope: str, rank: str):
    _, m = parse_pattern(rank)
    for name, layer in maskable_layers(model, scope).items():
        width = layer.weight.shape[1]
        if width % m:
            raise ValueError(f"--rank {rank}: the rows of {name} have {width} entries, not a multiple of {m}")


def default_name(values: dict) -> str:
    """MODEL-METHOD[-OBJECTIVE]-SPARSITY[-RANK][-SCOPE]-sSEED."""
    parts = [Path(values["model"]).name, values["method"]]
    if values["method"] == "tamt":
        parts.append(values["objective"])
    parts.append(f"{values['sparsity']:g}")
    if values["rank"] != ("global" if values["method"] == "tamt" else "local"):
        parts.append(values["rank"].replace(":", "-"))
    if values["scope"] != "all":
        parts.append(values["scope"])
    parts.append(f"s{values['seed']}")
    return "-".join(parts)


def absolute_model(name: str) -> str:
    """A name stays a name; a path becomes absolute, but links in it are not followed."""
    if name in data.MODELS or name == "toy":
        return name
    return os.path.abspath(os.path.expanduser(name))


def refuse_own_folder(model: str, folder: Path | None):
    """An export must not replace the original checkpoint."""
    if folder is None:
        return
    path = data.model_path(model)
    own_folder = path if path.is_dir() else path.parent  # where a link lies, not what it points to
    if Path(folder).resolve() == own_folder.resolve():
        raise ValueError(f"--export {folder} is the folder of the model itself: choose another")


def check_new_folder(flag: str, folder: Path):
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ValueError(f"{flag} {folder}: a file stands there; expected a folder, new or old")


def check_settings(settings):
    """Ranges and choices of all fields, whether they come from the command line or from Python."""
    for each in fields(settings):
        if not each.metadata:
            continue  # a field of Run
        value = getattr(settings, each.name)
        choices = each.metadata.get("choices")
        check = each.metadata.get("check")
        flag = "--" + each.name.replace("_", "-")
        if value is None:
            if isinstance(each.default, (str, int, float)):
                raise ValueError(f"{flag} None: expected a value, such as {each.default}")
            continue
        if isinstance(value, (list, tuple)) and "nargs" not in each.metadata:
            raise ValueError(f"{flag} {value!r}: expected one value")
        chosen = value if isinstance(value, (list, tuple)) else [value]
        if "" in chosen:  # such as "$MASK" without a value
            raise ValueError(f"{flag}: the text is empty")
        for word in chosen:
            if choices and word not in choices:
                raise ValueError(f"{flag} {word!r}: expected one of {', '.join(choices)}")
        if each.metadata.get("type") is int and type(value) is not int:
            raise ValueError(f"{flag} {value!r}: expected a whole number")
        if isinstance(each.default, bool) and type(value) is not bool:
            raise ValueError(f"{flag} {value!r}: expected True or False")
        is_text = "type" not in each.metadata and not isinstance(each.default, bool)
        if is_text and not all(isinstance(word, (str, os.PathLike)) for word in chosen):
            raise ValueError(f"{flag} {value!r}: expected a text")
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        if check == "positive" and not (is_number and 0 < value < 2**31):
            raise ValueError(f"{flag} {value!r}: expected a number above 0 and below {2**31}")
        if check == "fraction" and not (is_number and 0 <= value < 1):
            raise ValueError(f"{flag} {value!r}: expected a fraction in [0, 1); 0.7 removes 70 %")
        if check == "seed" and not (is_number and 0 <= value < 2**31):
            raise ValueError(f"{flag} {value!r}: expected a whole number from 0 to {2**31 - 1}")


def parse_settings(settings_class, description: str, argv: list[str] | None):
    """The command line that a class of settings describes -> its settings."""
    parser = Parser(description=description)
    for each in fields(settings_class):
        options = {key: value for key, value in each.metadata.items() if key not in ("help", "check")}
        if options.get("type") is Path:
            options["type"] = path_of
        if each.default is False:
            options["action"] = "store_true"
        if each.default is dataclasses.MISSING:
            options["required"] = True
        default = None if each.default is dataclasses.MISSING else each.default
        parser.add_argument("--" + each.name.replace("_", "-"), default=default, help=each.metadata["help"], **options)
    return settings_class(**vars(parser.parse_args(argv)))


def path_of(text: str) -> Path | str:
    """Path("") would be the folder where one is; check_settings refuses an empty text."""
    return Path(text) if text else text


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def flags_without_effect(settings: Settings) -> list[str]:
    """The fields of Settings that a method does not heed."""
    if settings.method in ("omp", "random"):
        ignored = ["objective", "init", "steps", "lr", "clip", "batch_size", "accumulate", "refresh_every", "compile",
                   "log_every", "eval_every", "save_every", "prune_every", "no_rewind"]
        has_text = settings.data or settings.model == "toy"
        return ignored if has_text else [*ignored, "lines", "seq_len"]
    if settings.method == "imp":
        return ["init", "refresh_every", "eval_every"]
    return ["prune_every", "no_rewind"]


def ignored_by_evaluation(settings: Settings) -> list[str]:
    """The fields that --evaluate and --export of a mask do not heed."""
    heeded = ["model", "device", "evaluate", "mask", "export"]
    if settings.evaluate:
        heeded += ["data", "lines", "seq_len", "dtype"]
    return [each.name for each in fields(settings) if each.name not in heeded]


def note_flags_without_effect(settings: Settings):
    """A flag without effect is reported, not refused, so that a sweep can pass the same flags to all methods."""
    ignored = flags_without_effect(settings)
    reason = f"--method {settings.method}"
    if settings.evaluate or settings.mask:
        ignored = ignored_by_evaluation(settings)
        reason = "--evaluate or --mask"
    if settings.compare:
        ignored = [each.name for each in fields(settings) if each.name != "compare"]
        reason = "--compare"
    for each in fields(settings):
        if each.name in ignored and getattr(settings, each.name) != each.default:
            print(f"note: --{each.name.replace('_', '-')} has no effect with {reason}")


# ---------------------------------------------------------------------------------------------------
# Appendix F: devices, processes, models
# ---------------------------------------------------------------------------------------------------


def to_device(array: np.ndarray, device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only from pinned memory does a copy run beside the computation
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and which of the processes of a torchrun this is."""
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the forward pass; scores stay fp32
    process_index: int = 0
    num_processes: int = 1


def refuse_several_processes(machine: Machine, what: str):
    if machine.num_processes > 1:
        raise ValueError(f"{what} takes one process: start it without torchrun (WORLD_SIZE={machine.num_processes})")


def start_machine(device: str = "auto", dtype: str = "auto") -> Machine:
    """Chooses the device and the type of the forward pass, prints both, and joins the other processes if torchrun has
    started several."""
    process_index = number_in_environment("RANK", 0)
    num_processes = number_in_environment("WORLD_SIZE", 1)
    if not 0 <= process_index < num_processes:
        raise ValueError(f"RANK={process_index}, WORLD_SIZE={num_processes} in the environment: not torchrun's")

    device = choose_device(device)
    if device == "cuda":
        index = number_in_environment("LOCAL_RANK", 0)  # among the processes of this host, each with a GPU of its own
        if index >= torch.cuda.device_count():
            raise ValueError(f"process {index} of this host, counted from 0, has no GPU: expected torchrun with "
                             f"--nproc_per_node={torch.cuda.device_count()}")
        device = f"cuda:{index}"
        torch.cuda.set_device(device)

    is_bf16 = uses_bf16(device, dtype)
    reason = "as asked"
    if dtype == "auto":
        reason = "this GPU has it; scores stay fp32" if is_bf16 else "exact"

    if num_processes > 1 and not torch.distributed.is_initialized():
        # The others wait for the first one while it downloads, tokenises, and computes dev losses.
        torch.distributed.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=12))
    if process_index > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    print(f"device {device}, {torch.get_num_threads()} threads, {num_processes} process(es), "
          f"{'bf16' if is_bf16 else 'fp32'} forward pass ({reason}), torch {torch.__version__}")
    return Machine(torch.device(device), torch.bfloat16 if is_bf16 else torch.float32, process_index, num_processes)


def number_in_environment(name: str, default: int) -> int:
    """What torchrun tells its processes."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text:.60} in the environment: not torchrun's") from None


def choose_device(device: str) -> str:
    """cuda, mps or cpu. (With cuda torch is made deterministic, too.)"""
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    if device == "cuda" and not has_cuda or device == "mps" and not has_mps:
        raise ValueError(f"--device {device}: torch {torch.__version__} finds none; --device cpu always works")
    if device == "cuda":
        make_deterministic()  # before anything else is asked of the GPU
    return device


def uses_bf16(device: str, dtype: str) -> bool:
    if dtype == "auto":
        return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype == "bf16"


def make_deterministic():
    """Equal runs give equal masks on a GPU, too, and a resumed run is the uninterrupted one. Without this, parts
    of attention's gradient are added in the order in which they happen to be finished.

    cuBLAS has a setting of its own, which counts only if it is made before the GPU is used."""
    setting = "CUBLAS_WORKSPACE_CONFIG"
    is_too_late = torch.cuda.is_initialized() and setting not in os.environ
    if is_too_late:
        print(f"note: equal runs may differ by rounding, since the GPU was used before {setting}=:4096:8 was set")
    else:
        os.environ.setdefault(setting, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=is_too_late)  # some versions of torch raise an error otherwise
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost time, and serves debugging alone


def autocast(machine: Machine):
    if machine.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(machine.device.type, machine.dtype)


def compile_if_asked(model: bert.Model, run: Run):
    """The student, as torch.compile makes it with --compile; the parameters are the model's."""
    if run.compile:
        return torch.compile(model, options={"fallback_random": True})  # dropout as without compiling
    return model


def seed_dropout(seed: int, step: int, process_index: int = 0):
    """Dropout depends on these three numbers alone. The two primes keep the seeds of different updates (up to a
    million) and processes (up to a thousand) apart."""
    torch.manual_seed((seed * 1_000_003 + step) * 1021 + process_index)


def sum_over_processes(tensors: list[torch.Tensor], machine: Machine):
    """Each tensor becomes its sum over all processes."""
    if machine.num_processes > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


@contextmanager
def first_process_first(machine: Machine):
    """The first process of each host downloads, makes the toy and caches token ids; then the others go on."""
    is_first = number_in_environment("LOCAL_RANK", 0) == 0
    if machine.num_processes > 1 and not is_first:
        torch.distributed.barrier()
    try:
        yield
    finally:  # after an error, too: the others will meet the same one
        if machine.num_processes > 1 and is_first:
            torch.distributed.barrier()


def leave_together():
    """Ends several processes at the same time, and does nothing for a single one. A process that closed its connections
    earlier would break those of the others, which may still be waiting for a message.

    It ends them by os._exit, because torch's threads for the connections are not always stopped in time when Python
    ends, and then abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def load_model(name: str) -> tuple[bert.Model, data.Vocabulary]:
    """A model and its vocabulary, by name or path."""
    path = toy_folder("model") if name == "toy" else data.model_path(name)
    model = bert.load(path)
    vocabulary = data.vocabulary(path)
    if vocabulary.size > model.config.vocab_size:
        raise ValueError(f"{path}: the vocabulary has {vocabulary.size} tokens, the model only "
                         f"{model.config.vocab_size}")
    return model, vocabulary


def add_fresh_head(model: bert.Model, seed: int):
    """A masked-LM head that is used for training alone."""
    torch.manual_seed(seed)
    model.add_mlm_head()
    model.mlm_head.is_fresh = True
    model.mlm_head.decoder = None  # the word embeddings serve as its decoder, whatever config.json says


def toy_folder(name: str) -> Path:
    """The embedded example: made at its first use, from then on files like any others."""
    folder = data.cache() / "toy"
    if not (folder / "model" / "config.json").exists():
        from dev import toy
        toy.make(folder)
    return folder / name


def run_command(main):
    """Calls a program. What its user can fix becomes one line and exit status 2; Ctrl-C is 130."""
    try:
        main()
        leave_together()
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last saved state", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        is_about_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_about_memory and "can't allocate memory" not in str(error):  # the words of torch on a CPU
            raise
        print(f"error: out of memory, try a smaller --batch-size (tamt.py: and --accumulate): {one_line(error)}",
              file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(error) -> str:
    """The text of an error, without the number that Python puts before the name of a file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{str(error.filename):.1000}: {error.strerror}"
    return f"{' '.join(str(error).split()):.1000}"


def main(argv=None):
    settings = parse_settings(Settings, "Find a sparse subnetwork of a pre-trained BERT, by default with TAMT.", argv)
    note_flags_without_effect(settings)
    if settings.compare:
        compare_masks(settings.compare)
        return
    if settings.evaluate or settings.mask:
        evaluate_mask(settings)
    else:
        find_mask(settings)


if __name__ == "__main__":
    run_command(main)
