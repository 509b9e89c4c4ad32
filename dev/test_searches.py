"""Searches for tickets on a task: how they resume, what they refuse, and what --find super reports.

    python -m pytest dev/test_searches.py
"""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import bert
import finetune
import tamt
from helpers import (
    assert_masks_differ,
    edit_json,
    is_subset,
    lines_of_results,
    logits_of_export,
    stop_fine_tuning_at,
    updates_made,
)
from test_tamt import (
    HEAD_SIZE,
    IMP_SEARCH,
    REMOVED_FFNS,
    REMOVED_HEADS,
    assert_close,
    dense_settings,
    finetune_settings,
    new_training,
    num_entries,
    num_pruned,
    same_masks,
    save_super_ticket,
)


@pytest.fixture(params=["bert", "roberta"])
def super_ticket(request, tasks, tmp_path):
    """The path of a Super Ticket of each family, which removes three heads and an FFN."""
    return save_super_ticket(tmp_path / "super.pt", tasks / request.param, REMOVED_HEADS, REMOVED_FFNS)


@pytest.fixture
def cut_training(tasks, tmp_path, super_ticket):
    """A training with the Super Ticket, before its first update."""
    return new_training(finetune_settings(tasks, tmp_path, mask=super_ticket, export=tmp_path / "export"))


def test_each_round_of_imp_reports_the_sparsity_that_it_began_with(imp_folder):
    rounds = json.loads((imp_folder / "mask.json").read_text())["rounds"]
    assert [entry["sparsity"] for entry in rounds] == pytest.approx([0, 0.1, 0.2], abs=1e-3)


@pytest.fixture
def imp_rounds(imp_folder):
    """The masks after the three rounds of --find imp."""
    return [tamt.load_mask(imp_folder / f"round-{number}") for number in (1, 2, 3)]


def test_what_a_round_of_imp_prunes_stays_pruned(imp_rounds):
    for earlier, later in itertools.pairwise(imp_rounds):
        assert is_subset(later, earlier)


def test_resume_of_imp_goes_on_in_the_round_that_was_interrupted(tasks, tmp_path, monkeypatch, imp_folder):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_fine_tuning_at(patch, 8 + 6)  # eight updates of the first round, five of the second
        finetune.find_imp(dense_settings(tasks, tmp_path, **IMP_SEARCH))

    numbers = updates_made(monkeypatch)
    finetune.find_imp(dense_settings(tasks, tmp_path, resume=True, **IMP_SEARCH))
    assert numbers == [6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8]  # the rest of the second round, and the third
    assert (tmp_path / "run/mask.pt").read_bytes() == (imp_folder / "mask.pt").read_bytes()


def test_resume_of_a_finished_imp_trains_nothing(tasks, tmp_path, monkeypatch, imp_folder):
    shutil.copytree(imp_folder, tmp_path / "run")
    numbers = updates_made(monkeypatch)
    finetune.find_imp(dense_settings(tasks, tmp_path, resume=True, **IMP_SEARCH))
    assert numbers == []


def test_a_default_that_is_given_by_hand_does_not_make_another_search(tasks, tmp_path, monkeypatch, imp_folder):
    shutil.copytree(imp_folder, tmp_path / "run")
    numbers = updates_made(monkeypatch)
    finetune.find_imp(dense_settings(tasks, tmp_path, resume=True, eval_every=50, **IMP_SEARCH))
    with pytest.raises(ValueError, match=r"holds another run \(eval_every 50 there, 49 here\)"):
        finetune.find_imp(dense_settings(tasks, tmp_path, resume=True, eval_every=49, **IMP_SEARCH))
    assert numbers == []


def test_a_finished_search_is_not_the_result_for_other_tables(tasks, tmp_path, imp_folder):
    shutil.copytree(imp_folder, tmp_path / "run")
    shutil.copytree(tasks / "RTE", tmp_path / "data/RTE")
    table = tmp_path / "data/RTE/train.tsv"
    table.write_text(table.read_text() + table.read_text().splitlines()[-1] + "\n")
    settings = dense_settings(tasks, tmp_path, resume=True, **IMP_SEARCH)
    with pytest.raises(ValueError, match="holds another run .*texts"):
        finetune.find_imp(replace(settings, data=tmp_path / "data"))


def test_a_search_is_the_same_with_the_dtype_that_auto_chooses(tasks, tmp_path, monkeypatch, imp_folder):
    shutil.copytree(imp_folder, tmp_path / "run")
    numbers = updates_made(monkeypatch)
    finetune.find_imp(dense_settings(tasks, tmp_path, resume=True, dtype="fp32", **IMP_SEARCH))
    assert numbers == []


def test_a_search_is_the_same_under_another_spelling_of_its_task(tasks, tmp_path, monkeypatch):
    settings = dense_settings(tasks, tmp_path, str(tasks / "mood.json"), epochs=1, find="imp", sparsity=0.1)
    finetune.fine_tune(settings)
    numbers = updates_made(monkeypatch)
    monkeypatch.chdir(tasks)
    finetune.fine_tune(replace(settings, task="./mood.json", resume=True))
    assert numbers == []


def test_a_search_on_a_short_network_shortens_the_default_length(tasks, tmp_path):
    settings = dense_settings(tasks, tmp_path, epochs=1, max_len=None, find="imp", sparsity=0.1)
    finetune.fine_tune(settings)
    result = json.loads((tmp_path / "run/round-1/result.json").read_text())
    assert result["settings"]["max_len"] == 64


def test_another_search_is_refused_in_the_same_folder(tasks, tmp_path, imp_folder):
    shutil.copytree(imp_folder, tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds another run \(rank 'global' there, 'local' here\)"):
        finetune.find_imp(dense_settings(tasks, tmp_path, resume=True, rank="local", **IMP_SEARCH))


def test_another_search_is_refused_in_the_folder_of_an_interrupted_one(tasks, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_fine_tuning_at(patch, 8 + 6)  # in the second round
        finetune.find_imp(dense_settings(tasks, tmp_path, **IMP_SEARCH))
    with pytest.raises(ValueError, match=r"holds another run \(rank 'global' there, 'local' here\)"):
        finetune.find_imp(dense_settings(tasks, tmp_path, resume=True, rank="local", **IMP_SEARCH))


def test_a_result_on_another_task_names_the_task_of_its_ticket(tasks, tmp_path, imp_folder):
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path, task="stsb", mask=str(imp_folder)))
    assert result["mask"]["task"] == "rte"


def test_the_export_of_a_super_ticket_has_full_sizes_with_zeros_where_heads_are_gone(cut_training):
    finetune.export_model(cut_training, cut_training.encoded_tasks[0])
    tensors = bert.read_safetensors(cut_training.run.export / "model.safetensors")
    query = tensors[f"{cut_training.model.config.model_type}.encoder.layer.0.attention.self.query.weight"]
    assert query.shape == (32, 32)
    is_left = query.view(-1, HEAD_SIZE, 32).any(dim=(1, 2))
    assert is_left.tolist() == (~REMOVED_HEADS[0]).tolist()


def test_the_export_of_a_super_ticket_has_equal_logits_in_transformers(cut_training):
    encoded_task = cut_training.encoded_tasks[0]
    finetune.export_model(cut_training, encoded_task)
    with torch.no_grad():
        ours = finetune.task_logits(cut_training, encoded_task.task, encoded_task.train_sequences[:8])
    theirs, _ = logits_of_export(cut_training, encoded_task.train_sequences[:8])
    assert_close(ours, theirs)


def test_a_super_ticket_that_cuts_into_a_head_is_refused(tasks, tmp_path, super_ticket):
    masks, meta = tamt.read_mask(super_ticket)
    next(iter(masks.values()))[0, 0] ^= True
    tamt.save_mask(super_ticket, masks, meta)
    with pytest.raises(ValueError, match="a Super Ticket takes out whole heads"):
        new_training(finetune_settings(tasks, tmp_path, mask=str(super_ticket)))


@pytest.mark.parametrize("order", finetune.ORDERS)
def test_layers_of_few_heads_keep_one_each_even_if_the_level_removes_more(order):
    """Of 3 x 2 heads level 8 would remove int(6 * .8) = 4."""
    removed, _ = finetune.choose_units(torch.rand(3, 2), torch.rand(3), order, 8, seed=1)
    assert removed.sum(axis=1).tolist() == [1, 1, 1]


def test_tamt_does_not_mistake_a_super_ticket_for_an_ordinary_mask(super_ticket):
    """It would leave the bias of an FFN that is taken out."""
    _, meta = tamt.read_mask(super_ticket)
    settings = tamt.Settings(model=meta["model"], mask=super_ticket, evaluate=True, data="toy")
    with pytest.raises(ValueError, match="a Super Ticket removes whole units: finetune.py scores and exports it"):
        tamt.evaluate_mask(settings)


@pytest.fixture(scope="session")
def super_search(tasks, tmp_path_factory):
    """A finished --find super with two orders -> its content, {ticket: its point of the curve}, and its folder."""
    out = tmp_path_factory.mktemp("super")
    settings = dense_settings(tasks, out, find="super", orders=("winning", "random"), epochs=1)
    content = finetune.find_super(settings)
    return content, {point["ticket"]: point for point in content["curve"]}, out


def test_the_curve_has_a_point_for_the_whole_model_and_for_each_order_and_level(super_search):
    _, curve, _ = super_search
    tickets = [f"{order}-{level}" for order in ("winning", "random") for level in range(1, 9)]
    assert list(curve) == ["dense", *tickets]


def test_each_ticket_of_the_curve_adds_a_line_to_the_results(super_search):
    _, curve, out = super_search
    assert len(lines_of_results(out)) == len(curve)


def test_along_the_curve_each_level_leaves_less_than_the_whole_and_no_more_than_the_one_before(super_search):
    _, curve, _ = super_search
    remaining = [curve[f"winning-{level}"]["remaining"] for level in range(1, 9)]
    assert curve["dense"]["remaining"] == 1
    assert sorted(remaining, reverse=True) == remaining
    assert remaining[-1] < 0.7  # six of eight heads and one of two FFNs are gone


def test_the_super_ticket_is_the_winning_ticket_with_the_best_score(tasks, tmp_path, monkeypatch):
    """The scores are made up, and a random ticket has an even better one."""
    finish = finetune.finish

    def finish_with_made_up_score(training):
        scores = {"winning-5": 0.9, "random-3": 0.95}
        return finish(training) | {"best": {"accuracy": scores.get(training.run.out.name, 0.5)}}

    monkeypatch.setattr(finetune, "finish", finish_with_made_up_score)
    settings = dense_settings(tasks, tmp_path, find="super", orders=("winning", "random"), epochs=1, limit=8)
    finetune.find_super(settings)
    _, meta = tamt.read_mask(tmp_path / "run")
    assert (meta["order"], meta["level"]) == ("winning", 5)


def test_mask_json_holds_the_curve(super_search):
    content, _, out = super_search
    assert json.loads((out / "run/mask.json").read_text())["curve"] == content["curve"]


def test_without_winning_tickets_there_is_no_super_ticket(tasks, tmp_path, capsys):
    finetune.find_super(dense_settings(tasks, tmp_path, find="super", orders=("losing",), epochs=1, limit=8))
    assert "no mask.pt" in capsys.readouterr().out
    assert not (tmp_path / "run/mask.pt").exists()


def test_weights_that_a_ticket_prunes_stay_zero_on_another_task(tasks, tmp_path, imp_folder):
    finetune.fine_tune(finetune_settings(tasks, tmp_path, task="stsb", mask=str(imp_folder), export=tmp_path / "x"))
    weights = bert.read_safetensors(tmp_path / "x/model.safetensors")
    for name, mask in tamt.load_mask(imp_folder).items():
        assert not weights[name][~mask].any()
        assert weights[name][mask].any()  # the ticket keeps something


def test_a_round_of_imp_prunes_other_weights_than_one_shot_pruning(tasks, imp_folder):
    layers = tamt.install_masked_layers(bert.load(tasks / "bert"), "encoder")
    one_shot = tamt.magnitude_masks(layers, 0.1, "global")
    first_round = tamt.load_mask(imp_folder / "round-1")
    assert_masks_differ(one_shot, first_round)


def test_imp_on_a_task_prunes_encoder_and_pooler_but_not_the_word_embeddings(tasks, imp_folder):
    every_name = list(tamt.maskable_layers(bert.load(tasks / "bert")))
    assert list(tamt.load_mask(imp_folder)) == every_name[1:]  # the first one is that of the word embeddings


def test_imp_on_a_task_does_not_prune_a_pooler_that_the_checkpoint_lacks(tasks, tmp_path):
    """The task head needs one, so a fresh one is trained, and no ticket may have a mask for it."""
    model = bert.load(tasks / "bert")
    tensors = {name: tensor for name, tensor in model.named_parameters() if "pooler" not in name}
    shutil.copytree(tasks / "bert", tmp_path / "bert")
    bert.save(tmp_path / "bert", model.config, tensors, "ForMaskedLM")
    finetune.find_imp(dense_settings(tasks, tmp_path, model=str(tmp_path / "bert"), find="imp", sparsity=0.2, epochs=1,
                                     limit=8))
    names = tamt.load_mask(tmp_path / "run").keys()
    assert len(names) == 12
    assert not any("pooler" in name for name in names)


def test_rounds_of_imp_prune_exactly_10_and_20_and_25_percent(imp_folder):
    for number, level in enumerate((0.1, 0.2, 0.25), 1):
        masks = tamt.load_mask(imp_folder / f"round-{number}")
        assert num_pruned(masks) == round(num_entries(masks) * level)


def test_each_round_of_imp_runs_the_first_tenth_of_a_schedule_made_for_ten_rounds(tasks, tmp_path, monkeypatch):
    """As in the code of Chen et al. 2020, whose schedule is that of all its ten rounds, and begins anew with each."""
    learning_rates = []

    def no_step(training, learning_rate):
        learning_rates.append(learning_rate)
        training.optimizer.zero_grad()

    monkeypatch.setattr(finetune, "optimizer_step", no_step)
    finetune.find_imp(dense_settings(tasks, tmp_path, find="imp", sparsity=0.2))
    updates_per_round = 2 * 4  # two epochs of 32 examples in batches of 8
    schedule = [1e-3 * (1 - step / (10 * updates_per_round)) for step in range(10 * updates_per_round)]
    assert learning_rates == pytest.approx(2 * schedule[:updates_per_round])


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_the_next_command_of_a_search_fine_tunes_as_the_search_did(tasks, tmp_path, capsys, weights):
    """Below the same weights, on the same examples, at the same learning rate."""
    settings = dense_settings(tasks, tmp_path, find="imp", sparsity=0.1, weights=weights, epochs=1, limit=8, seed=3)
    finetune.find_imp(settings)
    next_command = capsys.readouterr().out.splitlines()[-1]
    assert next_command.startswith("next: python finetune.py")
    flags = next_command.split()
    assert ("--weights" in flags) == (weights == "random")
    for flag in ("data", "epochs", "limit", "seed", "lr"):
        assert flags[flags.index(f"--{flag}") + 1] == str(getattr(settings, flag))
    assert "--sparsity" not in flags  # which is the mask's


def test_find_super_writes_a_ticket_for_each_order_and_level_from_what_it_measures(tasks, tmp_path):
    values = {"epochs": 1, "limit": 8}
    orders = ("winning",)  # those whose tickets are fine-tuned as well
    finetune.find_super(dense_settings(tasks, tmp_path, find="super", orders=orders, **values))

    training = new_training(dense_settings(tasks, tmp_path / "by hand", **values))
    finetune.train(training)
    importance = finetune.measure_importance(training)
    for order, level in itertools.product(finetune.ORDERS, finetune.LEVELS):
        removed_units = finetune.choose_units(*importance, order, level, seed=1)  # the default seed
        expected = finetune.masks_from_units(training.model.config, *removed_units)
        assert same_masks(tamt.load_mask(tmp_path / f"run/{order}-{level}.pt"), expected)


NUM_HEADS = 4  # in each layer of the tiny model


def importance_by_gates(training, num_batches=4, batch_size=8):
    """The definition of Liang et al. 2021: a gate of 1 multiplies every context vector and every output of an FFN, and
    importance is the absolute gradient of the loss at the gates -> (L, H), (L,), means over batches of rte."""
    encoded_task = training.encoded_tasks[0]
    training.model.eval()
    layers = training.model.backbone.encoder.layer
    head_gates = {}
    output_gates = {}

    def gate_heads(module, inputs):  # (B, T, D)
        head_gates[module] = torch.ones(*inputs[0].shape[:2], NUM_HEADS, 1, requires_grad=True)
        return (inputs[0].unflatten(-1, (NUM_HEADS, HEAD_SIZE)) * head_gates[module]).flatten(-2)

    def gate_output(module, inputs, output):  # (B, T, D)
        output_gates[module] = torch.ones(*output.shape[:2], 1, requires_grad=True)
        return output * output_gates[module]

    for layer in layers:
        layer.attention.output.dense.register_forward_pre_hook(gate_heads)
        layer.output.dense.register_forward_hook(gate_output)
    heads = torch.zeros(len(layers), NUM_HEADS)
    ffns = torch.zeros(len(layers))
    for start in range(0, num_batches * batch_size, batch_size):
        batch = slice(start, start + batch_size)
        logits = finetune.task_logits(training, encoded_task.task, encoded_task.train_sequences[batch])
        F.cross_entropy(logits, torch.from_numpy(encoded_task.train_targets[batch])).backward()
        for index, layer in enumerate(layers):
            heads[index] += head_gates[layer.attention.output.dense].grad.abs().sum((0, 1, 3)) / num_batches
            ffns[index] += output_gates[layer.output.dense].grad.abs().sum() / num_batches
    return heads, ffns


def test_the_importance_of_an_ffn_is_the_absolute_gradient_at_its_gates(tasks, tmp_path):
    training = new_training(dense_settings(tasks, tmp_path))
    training.model.train()
    _, found = finetune.measure_importance(training)  # it switches dropout off
    _, expected = importance_by_gates(training)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_the_importance_of_a_head_is_that_of_its_gates_divided_by_the_norm_of_all_heads_in_its_layer(tasks, tmp_path):
    """The scaling is that of the code of Liang et al."""
    training = new_training(dense_settings(tasks, tmp_path))
    training.model.train()
    found, _ = finetune.measure_importance(training)  # it switches dropout off
    expected, _ = importance_by_gates(training)
    assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4)


def test_random_weights_are_the_same_for_all_tasks(tasks, tmp_path):
    """Whatever the task heads, of one, two or three outputs, have drawn before."""
    weights = []
    for task in ("rte", "stsb", "squad"):  # squad has no pooler
        training = new_training(dense_settings(tasks, tmp_path / task, task=task, weights="random"))
        weights.append(training.model.bert.encoder.layer[0].attention.self.query.weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_a_ticket_used_on_other_than_its_random_weights_is_noted(tasks, tmp_path, capsys):
    finetune.find_imp(dense_settings(tasks, tmp_path / "found", find="imp", sparsity=0.1, weights="random", epochs=1,
                                     limit=8))
    mask = str(tmp_path / "found/run/mask.pt")
    for changes, is_noted in (({}, True), ({"weights": "random"}, False), ({"weights": "random", "seed": 2}, True)):
        capsys.readouterr()
        new_training(finetune_settings(tasks, tmp_path / str(changes), mask=mask, **changes))
        assert ("this mask was found on random weights (seed 1)" in capsys.readouterr().out) == is_noted


def test_a_search_begun_anew_and_killed_in_its_first_round_can_be_resumed(tasks, tmp_path, monkeypatch):
    settings = dense_settings(tasks, tmp_path, find="imp", sparsity=0.2, epochs=1, limit=8)
    expected = finetune.find_imp(settings)

    def kill(training):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "train", kill)
        finetune.find_imp(settings)
    assert finetune.find_imp(replace(settings, resume=True))["rounds"] == expected["rounds"]


def test_a_finished_search_that_is_run_again_is_not_stopped_by_its_old_rounds(tasks, tmp_path, imp_folder):
    """On another machine its first round may give another mask, and the old second round is that of another run."""
    shutil.copytree(imp_folder, tmp_path / "run")
    old_result = tmp_path / "run/round-2/result.json"
    edit_json(old_result, settings=json.loads(old_result.read_text())["settings"] | {"masks": "0123456789abcdef"})
    finetune.find_imp(dense_settings(tasks, tmp_path, **IMP_SEARCH))
    assert (tmp_path / "run/mask.pt").read_bytes() == (imp_folder / "mask.pt").read_bytes()


def test_a_search_that_is_run_again_leaves_other_runs_in_its_folder_alone(tasks, tmp_path, imp_folder):
    shutil.copytree(imp_folder, tmp_path / "run")
    for name in ("dense", "winning-1", "round-9", "round-2-sst2"):  # such as fine-tunings that a user has put there
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "result.json").write_text("{}")
    (tmp_path / "run/mask.json.55dce32d.tamt.part").touch()  # half-written by a search that was killed
    finetune.find_imp(dense_settings(tasks, tmp_path, **IMP_SEARCH))
    assert all((tmp_path / "run" / name / "result.json").exists() for name in ("dense", "winning-1", "round-9"))
    assert not [*(tmp_path / "run").glob("*.part")]


def test_a_search_does_not_touch_the_mask_of_another_run(tasks, tmp_path):
    folder = tmp_path / "run" / "round-1"
    folder.mkdir(parents=True)
    layers = tamt.maskable_layers(bert.load(tasks / "bert"))
    tamt.save_mask(folder / "mask.pt", tamt.random_masks(layers, 0.5, "local", seed=1), {"method": "random", "seed": 7})
    before = (folder / "mask.pt").read_bytes()
    with pytest.raises(ValueError, match="holds another mask.pt"):
        finetune.find_imp(dense_settings(tasks, tmp_path, find="imp", sparsity=0.1, epochs=1))
    assert (folder / "mask.pt").read_bytes() == before


def test_exporting_a_ticket_of_random_weights_with_tamt_is_noted(tasks, tmp_path, capsys):
    finetune.find_imp(dense_settings(tasks, tmp_path, find="imp", sparsity=0.1, weights="random", epochs=1, limit=8))
    capsys.readouterr()
    tamt.evaluate_mask(tamt.Settings(mask=tmp_path / "run", export=tmp_path / "export"))
    assert "this mask was found on random weights (seed 1), not on those" in capsys.readouterr().out
