"""Two hosts, played by two torchrun agents on this one: each has a cache and a working folder of its own.

    python -m pytest dev/test_hosts.py
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tamt
from dev import gpu

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
STEPS = 20
# A file that runs tamt.py and dies like a killed host would, at the update that STOP_AT names.
PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import tamt
save_state_if_due = tamt.save_state_if_due

def save_and_stop(training):
    save_state_if_due(training)
    if training.updates_done == int(os.environ["STOP_AT"]):
        os._exit(9)

tamt.save_state_if_due = save_and_stop
tamt.run_command(tamt.main)
"""


@pytest.fixture
def inputs(tmp_path):
    gpu.make_world(tmp_path, dropout=0.0)  # each process draws dropout of its own: without it the runs are equal
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def arguments(inputs, *more):
    return ["--model", inputs / "model", "--data", inputs / "text.txt", "--objective", "mlm+kd", "--steps", STEPS,
            "--seq-len", 32, "--batch-size", 8, "--lr", 2e-3, "--save-every", 5, "--eval-every", 10,
            "--device", "cpu", *more]


def torchrun(inputs, *more, stop_at=0, num_hosts=2):
    """Starts one agent for each host, and waits for all -> [(exit status, stdout, stderr)]."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    for number in range(num_hosts):
        host = inputs / f"host-{number}"
        host.mkdir(exist_ok=True)
        environment = os.environ | {"TAMT_CACHE": str(host / "cache"), "OMP_NUM_THREADS": "1",
                                    "STOP_AT": str(stop_at)}
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={num_hosts}", f"--node_rank={number}",
                   "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}",
                   inputs / "program.py", *arguments(inputs, *more)]
        agents.append(subprocess.Popen([str(word) for word in command], env=environment, cwd=host, text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    results = []
    for agent in agents:
        try:
            output, error = agent.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            agent.kill()
            output, error = agent.communicate()
            error += "\nno end after 120 seconds"
        results.append((agent.returncode, output, error))
    return results


def check_all_well(results):
    for status, _, error in results:
        assert status == 0, error[-3000:]


def mask_of_one_process(inputs):
    words = [str(word) for word in arguments(inputs, "--out", inputs / "one")]
    tamt.main(words)
    return tamt.load_mask(inputs / "one")


def share_that_differs(a, b) -> float:
    num_different = sum(int((a[name] != b[name]).sum()) for name in a)
    return num_different / sum(mask.numel() for mask in a.values())


def test_two_hosts_find_the_mask_of_one_process_and_find_it_again_after_they_were_killed(inputs, monkeypatch):
    """Each host has text and cache of its own; the run and its state lie on the first, which tells the second."""
    monkeypatch.setenv("TAMT_CACHE", str(inputs / "cache"))
    first, second = (inputs / f"host-{number}" for number in range(2))
    check_all_well(torchrun(inputs, "--out", "whole"))
    assert share_that_differs(tamt.load_mask(first / "whole"), mask_of_one_process(inputs)) <= 1e-3
    for host in (first, second):
        assert list((host / "cache" / "blocks").glob("*.bin"))  # each has cut the text for itself
    assert not (second / "whole").exists()  # the run lies where process 0 works

    killed = torchrun(inputs, "--out", "run", stop_at=10)
    assert all(status != 0 for status, _, _ in killed)
    assert tamt.read_state(first / "run")["step"] == 10

    results = torchrun(inputs, "--out", "run", "--resume")
    check_all_well(results)
    assert "resuming run at step 10" in results[0][1] + results[1][1]
    assert (first / "run" / "mask.pt").read_bytes() == (first / "whole" / "mask.pt").read_bytes()


def test_hosts_with_different_texts_are_refused(inputs):
    """Else the gradients of two texts would be added up without a word."""
    for number in range(2):
        (inputs / f"host-{number}").mkdir()
        (inputs / f"host-{number}/own.txt").write_text(f"the cat sees dog number {number} .\n" * 200)
    results = torchrun(inputs, "--out", "run", "--data", "own.txt")
    assert all(status != 0 for status, _, _ in results)
    assert any("error: the processes differ in text" in error for _, _, error in results)
    assert not (inputs / "host-0/run/mask.pt").exists()


def test_a_wrong_folder_is_one_line_and_no_host_waits_forever(inputs):
    (inputs / "host-0" / "run").mkdir(parents=True)
    (inputs / "host-0" / "run" / "state.pt").write_bytes(b"nonsense")
    results = torchrun(inputs, "--out", "run")
    assert all(status != 0 for status, _, _ in results)
    assert any("error: " in error and "state.pt" in error for _, _, error in results)
