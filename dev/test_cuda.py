"""CUDA against the CPU, and against itself after a resume. Skipped where torch finds no GPU.

    python -m pytest -m cuda dev/test_cuda.py
"""

import pytest
import torch

import bert
import finetune
import tamt
from dev import gpu
from test_tamt import (
    REMOVED_FFNS,
    REMOVED_HEADS,
    finetune_settings,
    mask_settings,
    same_masks,
    save_super_ticket,
)

if torch.cuda.is_available():
    tamt.make_deterministic()  # before a test uses the GPU

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_loss_gradient_and_mask_are_those_of_the_cpu():
    differences = gpu.compare_with_cpu("cuda")
    assert differences["loss"] <= 1e-5
    assert differences["gradient"] <= 1e-3
    assert differences["flips"] >= 1e-3  # the 20 updates did something
    assert differences["mask"] <= 1e-3
    assert differences["bf16_loss"] <= 0.02


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, dtype):
    assert gpu.differences_after_resume(tmp_path, "cuda", dtype) == 0


@pytest.mark.parametrize("num_values", [1, 1000, 1_000_000])
def test_the_ranking_is_exact(num_values):
    """The plain ranking and the fast one give on the GPU the mask of the plain one on the CPU, with many equal
    values, too."""
    generator = torch.Generator().manual_seed(0)
    for values in (torch.randn(num_values, generator=generator),
                   torch.randint(0, 9, (num_values,), generator=generator).float()):
        num_pruned = round(0.7 * num_values)
        expected = tamt.keep_largest(values, len(values) - num_pruned)
        assert torch.equal(tamt.keep_largest(values.cuda(), len(values) - num_pruned).cpu(), expected)
        [mask], threshold = tamt.keep_largest_near([values.cuda()], len(values) - num_pruned, 0.4, 0.1)
        assert torch.equal(mask.cpu(), expected)
        assert num_pruned == 0 or threshold <= float(values[~expected].max())


@pytest.mark.parametrize("rank", ["global", "local"])
def test_the_fast_ranking_of_several_matrices_is_exact(rank):
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(rows, 100, generator=generator).cuda() for name, rows in (("a", 30), ("b", 70))}
    ranking = tamt.FastRanking(values, 0.7, rank)
    for _ in range(5):
        values = {name: matrix + 0.01 for name, matrix in values.items()}
        expected = tamt.masks_of_largest(values, 0.7, rank)
        assert same_masks(ranking.masks(values), expected)


def test_groups_of_four_are_ranked_as_on_the_cpu():
    values = torch.randint(0, 5, (64, 128), generator=torch.Generator().manual_seed(0)).float()
    expected = tamt.keep_largest_of_groups(values, 2, 4)
    assert torch.equal(tamt.keep_largest_of_groups(values.cuda(), 2, 4).cpu(), expected)


def test_padding_changes_nothing_for_the_tokens():
    """A padding mask takes another kernel of scaled_dot_product_attention than no mask does."""
    torch.manual_seed(0)
    model = bert.Model(bert.Config(**gpu.TOY.config())).eval().cuda()
    input_ids = torch.randint(5, gpu.TOY.V, (4, 20), device="cuda")
    padded = torch.nn.functional.pad(input_ids, (0, 7))
    attention_mask = torch.arange(27, device="cuda").expand(4, 27) < 20
    with torch.no_grad():
        expected = model(input_ids)[-1]
        found = model(padded, attention_mask)[-1][:, :20]
    assert torch.allclose(found, expected, atol=1e-5)


def test_cuda_agrees_with_the_cpu(inputs, tmp_path):
    for device in ("cpu", "cuda"):
        tamt.find_mask(mask_settings(inputs, tmp_path / f"omp-{device}", method="omp", device=device))
        for objective in ("kd", "mlm+kd"):  # kd has weight decay
            tamt.find_mask(mask_settings(inputs, tmp_path / f"{objective}-{device}", "no-dropout", objective=objective,
                                         device=device, dtype="fp32"))
    assert same_masks(tamt.load_mask(tmp_path / "omp-cpu"), tamt.load_mask(tmp_path / "omp-cuda"))
    for objective in ("kd", "mlm+kd"):
        on_cpu, on_cuda = (tamt.load_mask(tmp_path / f"{objective}-{device}") for device in ("cpu", "cuda"))
        assert tamt.similarity(on_cpu, on_cuda) > 0.98


def test_the_ranking_on_cuda_settles_ties_as_on_the_cpu():
    values = torch.randint(-5, 5, (10_000,)).float()
    for count in (0, 1, 3333, 9999, 10_000):
        [mask], _ = tamt.keep_largest_near([values.cuda()], len(values) - count, 1.0, 1e-3)
        expected = tamt.keep_largest(values, len(values) - count)
        assert torch.equal(mask.cpu(), expected)
        assert torch.equal(tamt.keep_largest(values.cuda(), len(values) - count).cpu(), expected)
        groups = values.view(100, 100)
        expected = tamt.keep_largest_of_groups(groups, 2, 4)
        assert torch.equal(tamt.keep_largest_of_groups(groups.cuda(), 2, 4).cpu(), expected)


def test_an_ordinary_ticket_and_a_super_ticket_fine_tune_and_are_exported(tasks, tmp_path):
    super_ticket = save_super_ticket(tmp_path / "super.pt", tasks / "bert", REMOVED_HEADS, REMOVED_FFNS)
    for name, mask in (("ordinary", tasks / "bert.pt"), ("super", super_ticket)):
        settings = finetune_settings(tasks, tmp_path / name, mask=str(mask), model=str(tasks / "bert"), epochs=1,
                                     export=tmp_path / name / "export", device="cuda")
        assert 0 <= finetune.fine_tune(settings)["final"]["accuracy"] <= 1
        weight = bert.read_safetensors(tmp_path / name / "export/model.safetensors")[QUERY]
        assert torch.equal(weight != 0, tamt.load_mask(mask)[QUERY])


def test_two_tasks_share_an_encoder_under_tickets_without_word_embeddings(tasks, tmp_path):
    layers = tamt.maskable_layers(bert.load(tasks / "bert"), "encoder")
    tamt.save_mask(tmp_path / "mask.pt", tamt.random_masks(layers, 0.5, "local", seed=1), {})
    mask = f"{tmp_path / 'mask.pt'},{tmp_path / 'mask.pt'}"
    result = finetune.fine_tune(finetune_settings(tasks, tmp_path / "run", "rte,stsb", mask=mask, epochs=1,
                                                  model=str(tasks / "bert"), device="cuda"))
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
