"""tamt.py under a hostile user, disk and clock: python -m pytest dev/test_hostile_tamt.py"""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bert
import tamt
from helpers import assert_one_error_line, edit_json, run_tamt, watch_rankings
from test_tamt import folder_content, interrupt_after, mask_settings, same_masks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def interrupted(inputs, tmp_path, monkeypatch):
    """The folder of a run that was interrupted after the seventh of twelve updates; its state is of the fifth."""
    interrupt_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        tamt.find_mask(mask_settings(inputs, tmp_path / "run"))
    return tmp_path / "run"


def refuses_to_resume(capsys, inputs, folder, words):
    before = folder_content(folder)
    assert_one_error_line(capsys, words, tamt.main, "--model", inputs / "bert", "--data", inputs / "text.txt",
                          "--steps", 12, "--lr", 2e-3, "--seq-len", 16, "--batch-size", 8, "--log-every", 4,
                          "--eval-every", 100, "--save-every", 5, "--device", "cpu", "--out", folder, "--resume")
    assert folder_content(folder) == before


# ---------------------------------------------------------------------------------------------------
# Full disks, vanished folders
# ---------------------------------------------------------------------------------------------------

# A process that may write 100 kB to a file, no more.
ON_A_FULL_DISK = """
import resource, sys, torch, tamt
masks = {"bert.encoder.layer.0.output.dense.weight": torch.ones(2000, 1000, dtype=torch.bool)}
tamt.save_mask(sys.argv[1], masks, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tamt.run_command(lambda: tamt.save_mask(sys.argv[1], masks, {"again": True}))
"""


def test_a_full_disk_keeps_the_old_mask_and_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", ON_A_FULL_DISK, tmp_path / "mask.pt"], capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "mask.pt" in done.stderr and done.stderr.count("\n") == 1
    _, meta = tamt.read_mask(tmp_path / "mask.pt")
    assert meta == {}
    assert [file.name for file in tmp_path.iterdir()] == ["mask.pt"]


def test_a_folder_that_vanishes_during_a_run_is_one_line(inputs, tmp_path, monkeypatch, capsys):
    def remove(layers, step):
        if step == 6:
            shutil.rmtree(tmp_path / "run")

    watch_rankings(monkeypatch, remove)
    assert run_tamt(inputs, tmp_path / "run") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "run" in error and "\n" not in error


def test_out_is_a_file(inputs, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert run_tamt(inputs, tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert (tmp_path / "run").read_text() == "mine"


def test_export_is_a_file(inputs, tmp_path, capsys):
    (tmp_path / "export").write_text("mine")
    assert_one_error_line(capsys, "--export.*a file stands there", tamt.main, "--model", inputs / "bert",
                          "--method", "omp", "--out", tmp_path / "run", "--export", tmp_path / "export")
    assert (tmp_path / "export").read_text() == "mine" and not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write_is_one_line(inputs, tmp_path, capsys):
    (tmp_path / "run").mkdir(mode=0o500)
    assert run_tamt(inputs, tmp_path / "run") == 2
    assert "Permission denied" in capsys.readouterr().err


def test_what_a_killed_run_was_writing_is_removed(inputs, interrupted):
    (interrupted / "mask.pt.1234abcd.tamt.part").write_bytes(b"half")
    (interrupted / "step-5" / "mask.pt.1234abcd.tamt.part").write_bytes(b"half")
    tamt.find_mask(mask_settings(inputs, interrupted, resume=True))
    assert not list(interrupted.rglob("*.part"))


# ---------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------


def test_any_damage_to_a_mask_file_is_an_error_that_names_it(tmp_path):
    """300 files with a byte changed, a piece missing, or garbage in place of everything. Damage to bytes that
    carry nothing may pass, if the mask is then the one that was saved."""
    masks = {"bert.encoder.layer.0.output.dense.weight": torch.rand(40, 30) < 0.5}
    tamt.save_mask(tmp_path / "mask.pt", masks, {"model": "x"})
    good = (tmp_path / "mask.pt").read_bytes()
    generator = random.Random(0)
    num_refused = 0
    for trial in range(300):
        content = bytearray(good)
        position = generator.randrange(len(good))
        if trial % 3 == 0:
            content[position] ^= 1 << generator.randrange(8)
        elif trial % 3 == 1:
            content = content[:position]
        else:
            content[position:position + 50] = generator.randbytes(50)
        (tmp_path / "bad.pt").write_bytes(content)
        try:
            assert same_masks(tamt.load_mask(tmp_path / "bad.pt"), masks)
        except ValueError as error:
            assert "bad.pt" in str(error) and "\n" not in str(error)
            num_refused += 1
    assert num_refused > 150


MASK_FIELDS = {"no shapes": {"shapes": None}, "no bits": {"bits": None}, "no meta": {"meta": None},
               "format 2": {"format": 2}, "format of text": {"format": "one"}, "a list of bits": {"bits": []},
               "other names": {"bits": {"y.weight": torch.zeros(2, dtype=torch.uint8)}},
               "too few bits": {"bits": {"x.weight": torch.zeros(1, dtype=torch.uint8)}},
               "floats": {"bits": {"x.weight": torch.zeros(2)}},
               "no tensor": {"bits": {"x.weight": b"ab"}},
               "a shape of text": {"shapes": {"x.weight": "3 x 4"}},
               "a negative shape": {"shapes": {"x.weight": [-3, -4]}},
               "no shape": {"shapes": {"x.weight": None}}}


@pytest.mark.parametrize("case", MASK_FIELDS)
def test_a_mask_file_with_wrong_fields_is_refused_by_name(tmp_path, case):
    content = {"format": 1, "shapes": {"x.weight": [3, 4]},
               "bits": {"x.weight": torch.zeros(2, dtype=torch.uint8)}, "meta": {}}
    torch.save({**content, **MASK_FIELDS[case]}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt"):
        tamt.load_mask(tmp_path / "bad.pt")


def test_a_mask_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"x.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        tamt.load_mask(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "another object", "a mask"])
def test_a_damaged_state_is_refused_by_name(inputs, interrupted, capsys, damage):
    file = interrupted / "state.pt"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-500])
    if damage == "garbage":
        file.write_bytes(b"garbage" * 100)
    if damage == "empty":
        file.write_bytes(b"")
    if damage == "another object":
        torch.save([1, 2, 3], file)
    if damage == "a mask":
        shutil.copyfile(interrupted / "step-5" / "mask.pt", file)
    refuses_to_resume(capsys, inputs, interrupted, "state.pt")


STATE_FIELDS = ["format", "settings", "step", "parameters"]


@pytest.mark.parametrize("change", ["missing", "of another type"])
@pytest.mark.parametrize("name", STATE_FIELDS)
def test_a_state_with_a_wrong_field_is_refused_by_name(inputs, interrupted, capsys, name, change):
    file = interrupted / "state.pt"
    state = bert.read_pickle(file)
    if change == "missing":
        del state[name]
    else:
        state[name] = "something else"
    replace_state(file, state)
    refuses_to_resume(capsys, inputs, interrupted, "state.pt")


def replace_state(file, state):
    """The old file stays mapped into memory while `state` lives, so the new one is another file."""
    torch.save(state, f"{file}.new")
    os.replace(f"{file}.new", file)


def test_a_state_of_another_shape_is_refused_by_name(inputs, interrupted, capsys):
    state = bert.read_pickle(interrupted / "state.pt")
    name = next(iter(state["parameters"]))
    state["parameters"][name] = state["parameters"][name][:5]
    replace_state(interrupted / "state.pt", state)
    refuses_to_resume(capsys, inputs, interrupted, f"state.pt: {name} has the shape")


def test_a_damaged_log_is_refused_by_name(inputs, interrupted, capsys):
    with open(interrupted / "log.jsonl", "a") as file:
        file.write("not json\n")
    refuses_to_resume(capsys, inputs, interrupted, "log.jsonl: damaged")


def test_a_line_that_a_killed_run_was_writing_is_dropped(inputs, interrupted):
    with open(interrupted / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    tamt.find_mask(mask_settings(inputs, interrupted, resume=True))
    lines = (interrupted / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"settings": 3}', "\0\0"])
def test_a_damaged_result_is_refused_by_name(inputs, tmp_path, capsys, content):
    tmp_path.joinpath("run").mkdir()
    (tmp_path / "run" / "mask.json").write_text(content)
    refuses_to_resume(capsys, inputs, tmp_path / "run", "mask.json")


# ---------------------------------------------------------------------------------------------------
# Folders that hold something else
# ---------------------------------------------------------------------------------------------------


def test_a_mask_that_was_put_into_the_folder_is_not_overwritten(inputs, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    masks = {"bert.encoder.layer.0.output.dense.weight": torch.ones(3, 3, dtype=torch.bool)}
    torch.save(masks, tmp_path / "run" / "mask.pt")
    before = (tmp_path / "run" / "mask.pt").read_bytes()
    assert run_tamt(inputs, tmp_path / "run") == 2
    assert "another mask.pt" in capsys.readouterr().err
    assert (tmp_path / "run" / "mask.pt").read_bytes() == before


def test_a_finished_run_is_repeated_in_place_only_by_itself(inputs, tmp_path, capsys):
    tamt.find_mask(mask_settings(inputs, tmp_path / "run"))
    before = (tmp_path / "run" / "mask.pt").read_bytes()
    with pytest.raises(ValueError, match="another run.*seed 1 there, 2 here"):
        tamt.find_mask(mask_settings(inputs, tmp_path / "run", seed=2))
    assert (tmp_path / "run" / "mask.pt").read_bytes() == before
    tamt.find_mask(mask_settings(inputs, tmp_path / "run"))
    assert (tmp_path / "run" / "mask.pt").read_bytes() == before


def test_a_run_killed_between_mask_and_result_is_finished_by_resume(inputs, tmp_path):
    content = tamt.find_mask(mask_settings(inputs, tmp_path / "run"))
    (tmp_path / "run" / "mask.json").unlink()
    before = folder_content(tmp_path / "run")
    again = tamt.find_mask(mask_settings(inputs, tmp_path / "run", resume=True))
    del content["seconds"], again["seconds"]
    assert again == content
    after = folder_content(tmp_path / "run")
    del after["mask.json"]
    assert after == before


# ---------------------------------------------------------------------------------------------------
# The environment
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
def test_a_word_in_the_environment_is_one_line(inputs, monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "two")
    assert_one_error_line(capsys, f"{variable}=two", tamt.main, "--model", inputs / "bert", "--method", "omp")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line(capsys, error):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        tamt.run_command(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory, try a smaller --batch-size")


def test_another_runtime_error_keeps_its_traceback():
    def main():
        raise RuntimeError("an illegal memory access")
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        tamt.run_command(main)


def test_numbers_of_numpy_give_a_mask_file_that_can_be_read(inputs, tmp_path):
    settings = mask_settings(inputs, tmp_path, steps=2, sparsity=np.float64(0.6), lr=np.float64(1e-3))
    content = tamt.find_mask(settings)
    assert tamt.find_mask(replace(settings, resume=True)) == content  # state.pt can be read, too
    _, meta = tamt.read_mask(tmp_path)
    assert meta["sparsity"] == pytest.approx(0.6, abs=1e-3)
    numbers = {"x": np.float32(1), "y": [np.int64(2)], "z": np.bool_(True)}
    tamt.save_mask(tmp_path / "b.pt", tamt.load_mask(tmp_path), numbers)
    assert tamt.read_mask(tmp_path / "b.pt")[1] == {"x": 1.0, "y": [2], "z": True}


@pytest.mark.parametrize("changes, message", [
    ({"rank": 2}, "--rank 2: expected a text"), ({"model": None}, "--model None: expected a value"),
    ({"lines": "no"}, "--lines 'no': expected True or False"), ({"export": "{out}/file/sub"}, "a file stands there")])
def test_wrong_settings_from_python_are_one_line(inputs, tmp_path, changes, message):
    (tmp_path / "file").write_text("")
    changes = {name: value.format(out=tmp_path) if name == "export" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        mask_settings(inputs, tmp_path, **changes)


def test_a_run_in_the_folder_of_its_model_does_not_hide_the_model(inputs, tmp_path):
    model = bert.load(inputs / "bert")
    shutil.copytree(inputs / "bert", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink(missing_ok=True)
    (tmp_path / "model/pytorch_model.bin").unlink(missing_ok=True)
    torch.save(model.state_dict(), tmp_path / "model/model.pt")
    settings = mask_settings(inputs, tmp_path / "model", model=str(tmp_path / "model"), steps=2)
    content = tamt.find_mask(settings)
    assert tamt.find_mask(replace(settings, resume=True)) == content


def test_a_mask_of_other_updates_is_not_overwritten_though_its_state_is_gone(inputs, tmp_path):
    tamt.find_mask(mask_settings(inputs, tmp_path, steps=2))
    for name in ("state.pt", "mask.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="holds another mask.pt"):
        tamt.find_mask(mask_settings(inputs, tmp_path, steps=3))


def test_a_learning_rate_that_would_wear_pinned_scores_away_is_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match="--lr 0.5: expected at most 0.24 with kd and 17,000 updates"):
        tamt.find_mask(mask_settings(inputs, tmp_path, objective="kd", lr=0.5, steps=17000))
    with pytest.raises(ValueError, match="--lr 11: expected at most 10 with kd and 2 updates"):
        tamt.find_mask(mask_settings(inputs, tmp_path, objective="kd", lr=11.0, steps=2))
    # What the bound says: at a rate just below it, the weight decay of all updates leaves pinned scores recognisable.
    decays = 0.01 * 0.24 * (1 - np.arange(17000) / 17000)
    assert 1.5 * tamt.PINNED_LIMIT < tamt.PINNED_SCORE * np.prod(1 - decays)


@pytest.mark.parametrize("rank,size", [("2", "2"), ("-1", "1"), ("0", "0")])
def test_nonsense_in_the_environment_is_one_line(inputs, monkeypatch, capsys, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert_one_error_line(capsys, "RANK=.*WORLD_SIZE=", tamt.main, "--model", inputs / "bert", "--method", "omp")


def test_an_error_is_cut_to_a_readable_length(capsys):
    assert_one_error_line(capsys, "^error: .{900,1100}$", tamt.main, "--model", "x" * 100_000)


def test_a_seed_of_any_size_gives_a_run_or_one_line(inputs, tmp_path, capsys):
    assert run_tamt(inputs, tmp_path / "largest", "--seed", 2**31 - 1, "--steps", 2) == 0
    assert_one_error_line(capsys, "--seed", tamt.main, "--seed", 2**31)


# ---------------------------------------------------------------------------------------------------
# Found by reading
# ---------------------------------------------------------------------------------------------------


def test_flags_without_effect_do_not_make_another_run(inputs, tmp_path):
    settings = mask_settings(inputs, tmp_path / "run", method="omp")
    expected = tamt.find_mask(settings)
    found = tamt.find_mask(replace(settings, objective="kd", clip=0.5, init="random", resume=True))
    assert found == expected


def test_the_row_that_the_embedding_does_not_train_keeps_its_first_mask(inputs, tmp_path):
    """It is that of config.json's pad_token_id, which may be another than the tokenizer's."""
    shutil.copytree(inputs / "bert", tmp_path / "bert")
    edit_json(tmp_path / "bert/config.json", pad_token_id=7)
    settings = mask_settings(inputs, tmp_path / "run", model=str(tmp_path / "bert"), lr=1e-2, save_every=1)
    tamt.find_mask(settings)
    name = "bert.embeddings.word_embeddings.weight"
    first_masks = tamt.magnitude_masks(tamt.install_masked_layers(bert.load(tmp_path / "bert")), 0.7, "local")
    assert torch.equal(tamt.load_mask(tmp_path / "run")[name][7], first_masks[name][7])


def test_an_export_does_not_replace_a_checkpoint_that_is_a_link(inputs, tmp_path, capsys):
    (tmp_path / "blobs").mkdir()
    shutil.copytree(inputs / "bert", tmp_path / "hub")
    (tmp_path / "hub/model.safetensors").rename(tmp_path / "blobs/abc")
    (tmp_path / "hub/model.safetensors").symlink_to(tmp_path / "blobs/abc")
    tamt.find_mask(mask_settings(inputs, tmp_path / "run", method="omp"))
    assert_one_error_line(capsys, "is the folder of the model itself", tamt.main, "--mask", tmp_path / "run",
                          "--model", tmp_path / "hub/model.safetensors", "--export", tmp_path / "hub")
    assert (tmp_path / "hub/model.safetensors").is_symlink()


def test_an_export_may_lie_beside_the_folder_of_the_model(inputs, tmp_path):
    shutil.copytree(inputs / "bert", tmp_path / "x/bert")
    tamt.find_mask(mask_settings(inputs, tmp_path / "run", method="omp"))
    tamt.evaluate_mask(tamt.Settings(mask=tmp_path / "run", model=str(tmp_path / "x/bert"), export=tmp_path / "x"))
    assert (tmp_path / "x/model.safetensors").exists()


def test_a_finished_run_of_two_processes_is_finished_for_one(inputs, tmp_path):
    settings = mask_settings(inputs, tmp_path / "run")
    expected = tamt.find_mask(settings)
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    state["settings"]["num_processes"] = 2
    torch.save(state, tmp_path / "run/state.pt")
    assert tamt.find_mask(replace(settings, resume=True)) == expected


def test_a_mask_file_without_masks_is_refused(tmp_path, capsys):
    tamt.save_mask(tmp_path / "e.pt", {}, {})
    assert_one_error_line(capsys, "it holds no masks", tamt.main, "--compare", tmp_path / "e.pt", tmp_path / "e.pt")


def test_flags_that_evaluation_ignores_are_no_errors(inputs, tmp_path):
    tamt.find_mask(mask_settings(inputs, tmp_path / "run", method="omp"))
    settings = mask_settings(inputs, mask=tmp_path / "run", evaluate=True)
    expected = tamt.evaluate_mask(settings)
    found = tamt.evaluate_mask(replace(settings, rank="5:7", method="random"))
    assert found["dev_mlm_loss"] == expected["dev_mlm_loss"]


def test_the_model_of_a_mask_in_place_of_the_toy_is_said(inputs, tmp_path, capsys):
    tamt.find_mask(mask_settings(inputs, tmp_path / "run", method="omp"))
    capsys.readouterr()
    tamt.evaluate_mask(tamt.Settings(mask=tmp_path / "run", export=tmp_path / "x"))
    assert f"model: {inputs / 'bert'}, for which the mask was found" in capsys.readouterr().out


def test_imp_on_the_toy_has_a_horizon_of_ten_rounds(inputs):
    settings = tamt.Settings(model="toy", method="imp", prune_every=400)
    run = tamt.fill_in_defaults(settings, tamt.Machine(torch.device("cpu")), bert.load(inputs / "bert"))
    assert run.horizon == 4000
