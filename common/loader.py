"""The batches of a run, in an order that processes, workers and interruptions do not change.

One rule: every random choice about a sample is a function of (seed, epoch, data-set index, view),
and of nothing else. The order of an epoch is a permutation drawn from (seed, epoch), or as a method
chooses it; step t of the epoch takes the same global batch whatever the number of processes, and
process r takes its contiguous share of it.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import distributed as comm, rng
from common.distributed import RunError, World
from common.workers import default_workers, read_ahead, start_worker

FATAL, NOTE = -1, -2  # in a worker's report: stop the run; tell this once


@dataclass
class Batch:
    """This process's share of a global batch: one tensor a view, and the data-set indices."""

    views: list[Tensor]  # (n, C, H, W) each, on the training device
    index: Tensor  # int64 (n,), on the CPU
    drawn: Tensor | list[Tensor] | None = None  # what `draw` gave for it, on the training device


class RankBatches(torch.utils.data.Dataset):
    """Item t is this process's share of step t: crops and parameters of every view.

    Those of views of one kind stand below each other in one tensor.

    An image that cannot be decoded is replaced by the one in the same slot of the next global batch
    of the epoch that can be, so that no image stands in a batch twice and workers share no state.
    """

    def __init__(self, images, views: list, batch_size: int, seed: int, rank: int, size: int,
                 draw=None):
        self.images, self.views, self.seed, self.draw = images, views, seed, draw
        self.batch_size, self.share = batch_size, batch_size // size
        self.first = rank * self.share
        self.steps_per_epoch = len(images) // batch_size
        self.order = None  # of all epochs' images, instead of a permutation for each

    def __getitem__(self, item: int):
        epoch, step = divmod(item, self.steps_per_epoch)
        order = self.order
        if order is None:
            order = rng.epoch_order(self.seed, epoch, len(self.images))
        problems = {}
        decoded = [self.read_or_replace(order, step, slot, problems)
                   for slot in range(self.first, self.first + self.share)]
        index = [i for i, _ in decoded]
        sizes = np.array([planes[0].size[::-1] for _, planes in decoded])
        parts = []
        for numbers in alike(self.views):
            view = self.views[numbers[0]]
            crops = torch.empty(len(numbers), self.share, view.channels, *view.size,
                                dtype=torch.uint16 if self.images.bits == 16 else torch.uint8)
            parameters = []
            for number, out in zip(numbers, crops.numpy(), strict=True):
                view = self.views[number]
                uniforms = np.empty((self.share, view.num_uniforms))
                for row, i in enumerate(index):
                    rng.philox(self.seed, rng.SAMPLE, epoch, i, number).random(out=uniforms[row])
                geometry, colour = view.draw(uniforms, sizes)
                for row, (_, planes) in enumerate(decoded):
                    out[row] = view.crop(planes, [p[row] for p in geometry])
                parameters.append(torch.from_numpy(colour))
            parts.append((crops.flatten(0, 1), torch.cat(parameters)))
        if self.images.notes:
            problems[NOTE] = self.images.notes[0]
        index = torch.tensor(index)
        drawn = None if self.draw is None else self.draw(index, step=item)
        return parts, index, drawn, problems

    def read_or_replace(self, order: np.ndarray, step: int, slot: int, problems: dict):
        """Index and planes of the first readable image in a slot, from this step onwards."""
        for later in range(self.steps_per_epoch):
            at = (step + later) % self.steps_per_epoch
            index = int(order[at * self.batch_size + slot])
            try:
                return index, self.images.read(index)
            except RunError as error:  # not to be replaced by another image
                problems[FATAL] = str(error)
                return index, self.blank()
            except Exception as error:  # Pillow's decoders raise what they like
                reason = str(error).replace("\n", " ") or type(error).__name__
                problems[index] = reason
        problems[FATAL] = (f"no image that could stand in slot {slot} of a batch can be read, such "
                           f"as {self.images.name(index)}: {problems[index]}")
        return index, self.blank()

    def blank(self) -> list[Image.Image]:
        """What stands for an image in a batch that will not be trained on."""
        planes = [Image.new("L", (8, 8))] * self.views[0].channels
        return [Image.merge("RGB", planes)] if len(planes) == 3 else planes


def alike(views: list) -> list[list[int]]:
    """The places of the views of each kind: those that are finished alike, in one call."""
    kinds = [view.kind for view in views]
    first = [kinds.index(kind) for kind in kinds]
    return [[n for n, other in enumerate(first) if other == one] for one in dict.fromkeys(first)]


class Loader:
    """The batches of a run, from `start_step` to the end, prefetched across epochs.

    Args:
        images: a source (`open_images`).
        views: one `augment.View` for every view.
        batch_size: images over all processes.
        workers: loader processes; 0 loads in this process; None takes this process's share of the
            cores.
        start_step: the first step to load, for a run that goes on.
        order: a function of an epoch, called when its batches are asked for: the data-set indices
            (len(images),) that it goes through, repeats allowed, or None for a permutation. Nothing
            is prefetched across epochs then.
        draw: a function of a batch's data-set indices and its step that the loader processes call.

    Raises:
        RunError: fewer images than one batch; too many files that cannot be read.
    """

    def __init__(self, images, views, *, batch_size, epochs, seed, world: World, workers=None,
                 start_step=0, order=None, draw=None, multiprocessing_context=None):
        check_batch_size(images, batch_size, world)
        left_out = sorted({what for view in views for what in view.left_out})
        if left_out:
            comm.print_main(f"left out, for it needs RGB images: {', '.join(left_out)}")
        self.images, self.views, self.world = images, views, world
        self.steps_per_epoch = len(images) // batch_size
        self.step, self.bad_files, self.wait_seconds = start_step, {}, 0.0
        self.noted = False
        self.shares = RankBatches(images, views, batch_size, seed, world.rank, world.size, draw)
        self.workers = default_workers() if workers is None else workers
        self.order, self.context = order, multiprocessing_context
        if order is None:
            self.start(range(start_step, epochs * self.steps_per_epoch))

    def start(self, steps: range) -> None:
        """Start loader processes for so many steps."""
        shares = self.shares
        # Large batches, as of many crops, are held to one waiting for each worker.
        large = shares.share * sum(v.channels * math.prod(v.size) for v in shares.views) > 2**26
        self.batches = read_ahead(shares, steps, self.workers, self.world.device,
                                  start_worker=start_worker, ahead=1 if large else 2,
                                  context=self.context)

    def epoch(self, epoch: int):
        """The batches of an epoch that are still to come."""
        if self.order is not None:
            self.batches = None  # ends the processes of the epoch before
            self.shares.order = self.order(epoch)
            self.start(range(self.step, (epoch + 1) * self.steps_per_epoch))
        while self.step < (epoch + 1) * self.steps_per_epoch:
            started = time.perf_counter()
            parts, index, drawn, problems = next(self.batches)
            self.wait_seconds += time.perf_counter() - started
            if self.images.reads_files:
                self.report(problems)
            self.step += 1
            views = {}
            for numbers, part in zip(alike(self.views), parts, strict=True):
                finished = self.views[numbers[0]].finish(*part, self.world.device)
                views |= zip(numbers, finished.chunk(len(numbers)), strict=True)
            if isinstance(drawn, Tensor):
                drawn = drawn.to(self.world.device, non_blocking=True)
            elif drawn is not None:
                drawn = [x.to(self.world.device, non_blocking=True) for x in drawn]
            yield Batch([views[number] for number in range(len(views))], index, drawn)

    def report(self, problems: dict[int, str]) -> None:
        """Join all processes' unreadable files, name each once, and stop if there are too many."""
        new = {i: reason for i, reason in problems.items()
               if i not in self.bad_files and not (i == NOTE and self.noted)}
        if not any(comm.any_rank(bool(new))):
            return
        joined = {i: r for part in comm.all_gather_objects(new) for i, r in part.items()}
        fatal, note = joined.pop(FATAL, None), joined.pop(NOTE, None)
        if note:
            self.noted = True
            comm.print_main(note)
        self.bad_files.update(joined)
        allowed = max(1, len(self.images) // 100)
        if len(self.bad_files) > allowed:
            first = min(self.bad_files)
            raise RunError(f"{len(self.bad_files)} of {len(self.images)} files cannot be read (at "
                           f"most {allowed} may), such as {self.images.name(first)}: "
                           f"{self.bad_files[first]}")
        if fatal:
            raise RunError(fatal)
        for i in sorted(joined):
            comm.print_main(f"unreadable, replaced: {self.images.name(i)}: {joined[i]}")


def fitting_batch(batch_size: int, images, world: World) -> int:
    """A batch size, or if there are fewer images, the largest power of two that they fill.

    Raises:
        RunError: it does not divide among the processes, or is too small for batch norm.
    """
    if batch_size > len(images):
        batch_size = 2 ** (len(images).bit_length() - 1)
    if batch_size % world.size:
        raise RunError(f"--train-batch-size {batch_size} does not divide by {world.size} processes")
    if batch_size < 2:
        raise RunError(f"batches of 1 of {len(images)} training images: batch norm wants 2 or more")
    return batch_size


def check_batch_size(images, batch_size: int, world: World) -> None:
    """Refuse a batch of more images than there are."""
    if len(images) < batch_size:
        fits = len(images) - len(images) % world.size
        remedy = f"--batch-size {fits} fits" if fits else "start fewer processes"
        raise RunError(f"--batch-size {batch_size} is more than the {len(images)} images of "
                       f"--data; {remedy}")
