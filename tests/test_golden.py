"""The first steps of every `digits` recipe are what they were: losses, rates and indicators.

A change of the views, the start values, the order or any rule of a step fails here, on one process
and, where there is no trace of it on two, on two; in float64, so that machines and versions of
torch agree. After a change that is meant, write the numbers anew:

    python tests/test_golden.py
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from common import checkpoint  # noqa: E402
from helpers import SCRIPTS  # noqa: E402
from test_traces import TWO_PROCESSES  # noqa: E402

GOLDEN = Path(__file__).parent / "golden_digits.json"
RECIPES = {script: [script] for script in SCRIPTS if script != "npid_pirl"} | {
    "npid": ["npid_pirl"], "pirl": ["npid_pirl", "--method", "pirl"],
    "jigsaw": ["pretext", "--task", "jigsaw"], "location": ["pretext", "--task", "location"],
    "odc": ["deepcluster_odc", "--method", "odc", "--dropout", "0.5"],
}
CASES = [(name, processes) for name in RECIPES for processes in (1, 2)
         if processes == 1 or name not in TWO_PROCESSES]
STEPS = 3
MEASURED = {"images_per_second", "data_wait", "memory_gb"}  # not computed


def first_steps(name, folder):
    """Train for some steps as the recipe says; the fields of each line of the log."""
    torch.set_default_dtype(torch.float64)
    script, *flags = RECIPES[name]
    script = importlib.import_module(script)
    log = Path(folder) / "log.jsonl"

    def enough(self, epoch_ends):
        done = log.exists() and len(log.read_text().splitlines()) >= STEPS
        self.stopping = done
        return False, done

    def normal(tensor, mean=0.0, std=1.0, **_):  # torch 2.11 and 2.14 cut the tails by other draws
        return nn.init.normal_(tensor, mean, std)

    with mock.patch.object(checkpoint.Run, "agree", enough), \
            mock.patch.object(nn.init, "trunc_normal_", normal):
        script.main(script.parse_args([*flags, "--output", str(folder), "--device", "cpu",
                                       "--workers", "0", "--log-every", "1"]))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


@pytest.mark.parametrize("name, processes", CASES)
def test_the_first_steps_are_what_they_were(name, processes, tmp_path, pool):
    golden = json.loads(GOLDEN.read_text())
    assert name in golden, "a new recipe: write its numbers by `python tests/test_golden.py`"
    wanted = golden[name][str(processes)][:STEPS]
    found = pool.run(processes, first_steps, name, tmp_path)[0]
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for line, golden in zip(found, wanted, strict=True):
        for field, value in golden.items():
            assert line[field] == pytest.approx(value, rel=1e-5, abs=1e-9), (line["step"], field)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pool import Pool
    from test_golden import first_steps as steps

    workers, found = Pool(), {recipe: {} for recipe in RECIPES}
    for recipe, size in CASES:
        with tempfile.TemporaryDirectory() as output:
            found[recipe][size] = workers.run(size, steps, recipe, output)[0]
    workers.close()
    GOLDEN.write_text(json.dumps(found, indent=0) + "\n")
