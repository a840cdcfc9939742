"""Every method as on a GPU, by benchmarks/fake_cuda.py: no op on two devices, no wait."""

import shutil
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, SCRIPTS

HARNESS = ROOT / "benchmarks" / "fake_cuda.py"


def test_no_method_waits_for_the_gpu_in_a_step(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if not torch.version.cuda:
        pytest.skip("needs a CUDA build of torch")
    found = subprocess.run(
        [sys.executable, HARNESS, "--only", "tiny-moco-x1", *(f"tiny-{s}-x8" for s in SCRIPTS)],
        capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in found.stdout.splitlines() if line.startswith("tiny")]
    assert found.returncode == 0, found.stdout + found.stderr
    assert len(lines) == len(SCRIPTS) + 1 and all("runs, no sync" in line for line in lines)
