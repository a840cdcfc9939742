"""What several test files need: tiny runs of the scripts, and gradients on several processes."""

import contextlib
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common import distributed as comm

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if "\nRECIPES = " in p.read_text())
TINY = ["--recipe", "digits", "--limit", "32", "--batch-size", "16", "--epochs", "1",
        "--warmup-epochs", "0", "--workers", "0", "--log-every", "1"]
SMALL_CROPS = ["--num-crops", "2", "1", "--crop-sizes", "16", "8", "--crop-scales", "0.6", "1",
               "0.3", "0.6"]
EXTRA: dict[str, list[str]] = {  # what a script needs for a tiny run
    "deepcluster_odc": ["--num-clusters", "8", "--pca-dim", "4", "--top-lr-scale", "1",
                        "--sync-bn"],
    "deepcluster_v2": ["--num-clusters", "8", "8"],
    "densecl": ["--bn-groups", "2", "--dense-warmup-steps", "1"],
    "dino": ["--freeze-last-layer-epochs", "0", *SMALL_CROPS],
    "dinov2": ["--targets", "centering", *SMALL_CROPS],  # whose centres are to be remembered
    "ijepa": ["--start-lr", "0.0005", "--final-weight-decay", "0.04"],
    "lejepa": SMALL_CROPS,
    "moco": ["--bn-groups", "2"],
    "npid_pirl": ["--sync-bn"],
    "pretext": ["--sync-bn"],
    "swav": ["--freeze-prototypes-epochs", "0", *SMALL_CROPS],
}

# --------------------------------------------------------------------------------------------- runs


def parsed(script, *flags):
    """A script's module, and its settings for a tiny run."""
    module = importlib.import_module(script)
    return module, module.parse_args([*TINY, *EXTRA.get(script, []), *map(str, flags)])


def lines(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").open()]


def train(module, folder, *flags, dtype="float64"):
    """Train with flags behind those of `TINY`; the loss of every step."""
    torch.set_default_dtype(getattr(torch, dtype))
    module.main(module.parse_args([*TINY, "--output", str(folder), *map(str, flags)]))
    return [line["loss"] for line in lines(folder)]


def state_of(folder):
    """What the newest checkpoint of a run remembers."""
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["state"]


def random_images(n=20, channels=3, size=12):
    """Noise (n, size, size, channels) in uint8."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)


# ---------------------------------------------------------------------------------------- gradients


def own_rows(x, dim=0):
    """This process's share of an array along a dimension, as a tensor."""
    own = np.split(x, comm.size(), axis=dim)[comm.rank()]
    return torch.from_numpy(np.ascontiguousarray(own))


def own_gradients(loss, *inputs, dim=0):
    """The loss of this process's rows of some arrays, and the gradients as DDP averages them."""
    leaves = [own_rows(x, dim).requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward()
    return value.item(), *((leaf.grad / comm.size()).numpy() for leaf in leaves)


def joined(parts, dim=0):
    """What `own_gradients` gave on every process as one: the mean loss, all rows."""
    value, *grads = zip(*parts, strict=True)
    return np.mean(value), *(np.concatenate(each, dim) for each in grads)


def check_joined(pool, size, function, *arguments, dim=0):
    """A function that gives `own_gradients` computes on any processes those of the joined batch."""
    wanted_loss, *wanted = function(*arguments)
    loss, *found = joined(pool.run(size, function, *arguments), dim)
    assert loss == pytest.approx(wanted_loss, rel=1e-9)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


@contextlib.contextmanager
def raw_collectives():
    """Collectives without the gradient over processes, as scripts have them that forget it."""
    gather, reduce = comm.all_gather_with_grad, comm.all_reduce_with_grad
    comm.all_gather_with_grad = comm.all_gather_no_grad
    comm.all_reduce_with_grad = lambda x: x + (reduce(x) - x).detach()
    try:
        yield
    finally:
        comm.all_gather_with_grad, comm.all_reduce_with_grad = gather, reduce
