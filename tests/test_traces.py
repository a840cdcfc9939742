"""Each script's own `main`, step by step, against the authors' code (see traces/README.md).

Losses of 10 to 13 steps, and every weight, momentum, queue, bank and centre after the last one, in
float64. Inputs and start values are functions of the trace, so that both sides make them anew.
"""

import contextlib
import importlib
import json
import math
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from common import backbones, checkpoint, distributed as comm, log, rng, training
from common.loader import Batch

TRACES = {path.stem: path for path in sorted((Path(__file__).parent / "traces").glob("*.json"))}
# Settings that compute the same on two processes: batch norm over both of them, or none at all.
TWO_PROCESSES = ("barlow_twins", "byol", "deepcluster_v2", "dino", "ibot", "ijepa", "mae",
                 "moco_shuffle",
                 "moco_v3_2", "moco_v3_resnet", "moco_v3_vit", "simsiam", "swav", "vicreg")
SEVERAL_ONLY = ("moco_v3_2",)  # each process has its own batch norm
TOLERANCE = 1e-9
ROUNDING = 1e-6  # of tensors whose gradient is zero but for rounding, which AdamW blows up

# ----------------------------------------------------------------- inputs and start values (NumPy)


def philox(name, number):
    """The stream of random numbers of a name and a number."""
    return np.random.Generator(np.random.Philox(key=[zlib.crc32(name.encode()), number]))


def start_value(kind, name, shape, seed):
    z = philox(name, seed).standard_normal(tuple(shape))
    if kind == "weight":
        return z / math.sqrt(z.size / shape[0])
    if kind in ("unit_rows", "unit_columns"):
        return z / np.sqrt((z * z).sum(1 if kind == "unit_rows" else 0, keepdims=True))
    return {"scale": 1 + 0.1 * z, "bias": 0.1 * z, "token": 0.2 * z, "mean": 0.1 * z,
            "variance": 1 + 0.1 * abs(z), "zero": 0 * z}[kind]


def epoch_index(trace, epoch):
    """Data-set indices (steps, batch) of an epoch."""
    order = np.argsort(philox("order", epoch).random(trace["images"]), kind="stable")
    size = trace["batch_size"]
    return order[: trace["images"] // size * size].reshape(-1, size)


def view(number, step, index, side, rows):
    """A view (rows * batch, 3, side, side): 4 x 4 cells of the image, and noise of the step."""
    cells = np.stack([philox("image", int(i)).standard_normal((3, 4, 4)) for i in index])
    cells = cells.repeat(rows, 0).repeat(side // 4, 2).repeat(side // 4, 3)
    return cells + 0.5 * philox(f"view{number}", step).standard_normal(cells.shape)


def negatives(step, index, images, count, batch_size):
    """Rows (n, K) of other images; `index` (n,) are this process's of the whole batch."""
    drawn = np.floor(philox("negatives", step).random((batch_size, count)) * (images - 1))
    drawn = here(torch.from_numpy(drawn.astype(np.int64)))
    return drawn + (drawn >= index[:, None])


def here(rows):
    """This process's rows of a global batch."""
    share = len(rows) // comm.size()
    return rows[comm.rank() * share :][:share]


# ------------------------------------------------------------------------------ our side of a trace


class Images:
    reads_files = False

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def identity(self):
        return "a trace"


def loader_of(trace):
    class Loader:
        def __init__(self, images, views, draw=None, **_):
            self.draw = draw
            self.steps_per_epoch = trace["steps_per_epoch"]
            self.wait_seconds, self.num_views = 0.0, len(views)

        def epoch(self, epoch):
            for at, index in enumerate(epoch_index(trace, epoch)):
                step = epoch * self.steps_per_epoch + at
                views = [here(torch.from_numpy(view(n, step, index, side, rows)))
                         for n, (side, rows) in enumerate(trace["views"][: self.num_views])]
                views = [v.contiguous(memory_format=torch.channels_last) for v in views]
                index = here(torch.from_numpy(index))
                yield Batch(views, index, self.draw and self.draw(index, step=step))

    return Loader


@torch.no_grad()
def fill(state, trace):
    """Give every tensor of the state its start value; none may be without one."""
    for part, tensors in trace["initial"].items():
        ours = state[part].state_dict() if hasattr(state[part], "state_dict") else {"": state[part]}
        assert {name.split("[")[0] for name, *_ in tensors.values()} == set(ours), part
        for theirs, (name, kind, shape) in tensors.items():
            if kind == "kept":
                continue
            if kind == "own":  # fixed positions, which the authors keep in float32
                ours[name].copy_(ours[name].float())
                continue
            value = torch.from_numpy(np.asarray(start_value(kind, theirs, shape, trace["seed"])))
            value = value.T if trace["layouts"].get(part) == "transposed" else value
            assert value.shape == named(ours, name).shape, (part, name)
            named(ours, name).copy_(value)


def named(tensors, name):
    """A tensor by its name; with [0], [1] or [2] behind it that third (queries, keys, values)."""
    name, *third = name.rstrip("]").split("[")
    return tensors[name].chunk(3)[int(third[0])] if third else tensors[name]


def run(name, folder):
    """Train as a trace says: the loss of each step, and the digests of the tensors at the end."""
    trace = json.loads(TRACES[name].read_text())
    assert philox("check", 7).standard_normal(3).tolist() == trace["check"], "another NumPy"
    torch.set_default_dtype(torch.float64)
    script = importlib.import_module(trace["script"].removesuffix(".py"))
    state, losses, philox_of = {}, [], rng.philox
    rates_of = getattr(script, "learning_rates", None)
    starts = iter(range(10**6))

    def start(_, found):
        state.update(found)
        fill(state, trace)
        return 0

    def write(_, step, *, loss, **__):
        losses.append(comm.mean_over_processes(loss).item())

    def shuffled(seed, stream, *key):
        if stream != rng.SHUFFLE:
            return philox_of(seed, stream, *key)
        numbers = philox("shuffle", key[0])
        return mock.Mock(permutation=lambda n: np.argsort(numbers.random(n), kind="stable"))

    def mask_noise(_, step, *, patches, **__):
        noise = philox("mask", step).random((trace["batch_size"], patches))
        return here(torch.from_numpy(noise))

    def draw_masks(index, step, **_):
        masks = [here(crop) for crop in trace["masks"][step]]
        length = (trace["views"][0][0] // 8) ** 2  # of the traces with masks, the patch is 8
        return torch.tensor([(crop * len(index) + row) * length + place
                             for crop, rows in enumerate(masks)
                             for row, places in enumerate(rows) for place in places],
                            dtype=torch.int64)

    def blocks(_, step, **__):
        masks = trace["masks"][step]
        return [here(torch.tensor(masks["context"])),
                here(torch.tensor(masks["targets"]).transpose(0, 1))]

    def cells(_, step, *, cells, **__):
        side = 4  # patches along an image
        noise = torch.ones(trace["batch_size"], side * side)  # hidden are those with the smallest
        noise.scatter_(1, torch.tensor(trace["masks"][step]), 0.0)
        return here(noise.view(-1, side, side)[:, :: side // cells, :: side // cells])

    def rates(*given):
        ours, theirs = rates_of(*given), trace["lr"]
        until = trace["steps_per_epoch"] * 3 + 1  # the second drop, a step late
        assert ours[:until] == pytest.approx(theirs[:until], rel=1e-12)
        return theirs

    def kmeans_start(n, **_):
        return torch.from_numpy(np.argsort(philox("kmeans", next(starts)).random(n), kind="stable"))

    replaced = [
        (script, "open_images", lambda *_, **__: Images(trace["images"])),
        (training, "Loader", loader_of(trace)),
        (checkpoint.Run, "start", start),
        (checkpoint.Run, "save", lambda *_: None),
        (log.Log, "write", write),
        (log.Log, "check", lambda _: None),
    ]
    draws = {
        "mask": (script, "mask_noise", mask_noise),
        "masks": (script, "draw_masks", draw_masks),
        "blocks": (script, "draw_masks", blocks),
        "cells": (script, "mask_noise", cells),
        "rates": (script, "learning_rates", rates),
        "negatives": (script, "draw_negatives", lambda index, num_images, num_negatives, step, **_:
                      negatives(step, index, num_images, num_negatives, trace["batch_size"])),
        "shuffle": (rng, "philox", shuffled),
        "kmeans": (torch, "randperm", kmeans_start),
    }
    with contextlib.ExitStack() as stack:
        for what in replaced + [draws[kind] for kind in trace["draws"]]:
            stack.enter_context(mock.patch.object(*what))
        if "vit" in trace:
            sizes = {"vit_micro": tuple(trace["vit"])}
            stack.enter_context(mock.patch.dict(backbones.VIT_SIZES, sizes))
        script.main(script.parse_args([
            *trace["settings"]["ours"], "--output", str(folder), "--device", "cpu", "--workers",
            "0", "--data", "digits",
        ]))
    ends = {title: {theirs: digest(named(ours, want[0]).detach()
                                   / group.get("factors", {}).get(theirs, 1))
                    for theirs, want in group["tensors"].items() if want[0] is not None}
            for title, group in trace["final"].items() if is_here(group, comm.rank())
            for ours in [tensors_of(trace, group, state)]}
    return losses, ends


def is_here(group, rank):
    """Whether a process has these numbers: some are of one process's rows alone."""
    return group.get("process", rank) == rank


def tensors_of(trace, group, state):
    """The tensors of a group of a trace by our names, in the authors' layout."""
    part = state[group["part"]]
    if "key" in group:
        names = {p: name for name, p in state[group["of"]].named_parameters()}
        return {names[p]: kept[group["key"]] for p, kept in part.state.items()
                if kept.get(group["key"]) is not None}
    if hasattr(part, "state_dict"):
        return part.state_dict()
    if group.get("layout") == "transposed":
        part = part.T
    if group.get("layout") == "newest_first":  # ours is a ring, written by whole batches
        blocks = part.split(trace["batch_size"], 1)
        done = (trace["epochs"] - group["starts"]) * trace["steps_per_epoch"]
        part = torch.cat([blocks[(done - 1 - i) % len(blocks)] for i in range(len(blocks))], 1)
    return {"": part}


def digest(x):
    """Shape, sum, sum of squares, and three entries."""
    flat = x.reshape(-1).numpy()
    places = sorted({flat.size // 7, flat.size // 2, flat.size - 1})
    return [list(x.shape), math.fsum(flat), math.fsum(flat * flat), flat[places].tolist()]


# -------------------------------------------------------------------------------------------- tests


def check(name, losses, ends, rank=0):
    """Compare with the authors' numbers, as traces/README.md says."""
    trace = json.loads(TRACES[name].read_text())
    assert losses == pytest.approx(trace["loss"], rel=TOLERANCE, abs=0)
    groups = {title: group for title, group in trace["final"].items() if is_here(group, rank)}
    assert ends.keys() == groups.keys()
    compared = 0
    for title, group in groups.items():
        wanted = {theirs: want for theirs, want in group["tensors"].items() if want[0] is not None}
        count = sum(math.prod(shape) for _, shape, *_ in wanted.values())
        overall = math.sqrt(sum(squares for *_, squares, _ in wanted.values()) / count)
        for theirs, (ours, shape, total, squares, entries) in wanted.items():
            found, n = ends[title][theirs], math.prod(shape)
            within = ROUNDING if theirs in trace.get("rounding", ()) else TOLERANCE
            scale = max(math.sqrt(squares / n), 1e-3 * overall)
            assert found[0] == shape, (title, ours)
            assert abs(found[1] - total) <= within * n * scale, (title, ours)
            assert abs(found[2] - squares) <= within * n * scale**2, (title, ours)
            for one, other in zip(found[3], entries, strict=True):
                assert abs(one - other) <= within * max(abs(other), scale), (title, ours)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", [name for name in TRACES if name not in SEVERAL_ONLY])
def test_every_step_is_the_authors(name, tmp_path):
    check(name, *run(name, tmp_path))


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_every_step_is_the_authors_on_two_processes(name, tmp_path, pool):
    for rank, (losses, ends) in enumerate(pool.run(2, run, name, tmp_path)):
        check(name, losses, ends, rank)
