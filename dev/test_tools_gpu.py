"""dev/gpu.py in miniature on the CPU: where a GPU is at hand, only the numbers are missing.

    python -m pytest dev/test_tools_gpu.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev import gpu

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_every_part_runs_in_miniature(tmp_path):
    command = [sys.executable, "dev/gpu.py", "--device", "cpu", "--small", "--json", tmp_path / "gpu.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set("abcdefg")
    assert not [row for row in rows if row["verdict"] == "MISSED" or "left out" in row["name"]]


def test_the_operations_of_bert_base_are_those_of_the_docstring():
    for objective, count in (("mlm", 4.75e12), ("kd", 6.19e12), ("mlm+kd", 6.30e12)):
        assert gpu.model_flops(gpu.BERT_BASE, objective) == pytest.approx(count, rel=0.002)


def test_the_released_step_has_our_mask_and_our_attention():
    """The released step that is timed computes what ours does, in its own way."""
    import torch

    import tamt

    machine = gpu.Bench("cpu", True, 60, Path("unused.json")).machine()
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    attention_mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    attention_mask[1, :, :, 3:] = False
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attention_mask)
    assert torch.allclose(gpu.plain_attention(q, k, v, attention_mask, 0.0), expected, atol=1e-5)

    training = gpu.make_training(gpu.TOY, "mlm", machine)
    scores = training.masked_layers["bert.encoder.layer.0.output.dense.weight"].scores
    ours = tamt.StraightThrough.apply(torch.ones_like(scores), scores, scores > tamt.START_SCORE / 2)
    theirs = gpu.Binarise.apply(scores, tamt.START_SCORE / 2)
    assert torch.equal(ours, theirs)
