"The measurements for a GPU: left out without one, and their code runs on a CPU at small size."
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_nothing_is_measured():
    done = subprocess.run([sys.executable, "-m", "tests.bench", "--quick", "--only", "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "left out: PyTorch sees no CUDA device" in done.stdout


def test_the_same_calls_run_on_a_cpu():
    from tests.bench.gpu import gpu

    rows = list(gpu(True, device="cpu", name="dit-sr-tiny", batch=1, side=16, steps=1))
    assert [label for label, _, _ in rows] == ["dit-sr-tiny, training, batch 1"] * 2 + ["dit-sr-tiny, 1 steps, 64 px"] * 3
    assert all("peak 0.00 GiB" in note for _, _, note in rows)
