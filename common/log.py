"""The log of a run: a JSON line every few steps, a progress line, and the watch for bad losses."""

import datetime
import json
import math
import os
import resource
import sys
import time

import torch
from torch import Tensor

from common import distributed as comm
from common.distributed import RunError, World


class Diverged(RunError):
    """A loss or a weight is not finite."""


class Log:
    """Writes log.jsonl and the progress line; rank 0 only, nothing leaves the device in between.

    Args:
        folder: the run's folder.
        batch_size: images over all processes.
        total_steps: steps of the whole run.
        first_step: steps done before this start.
        every: steps between two lines.
        chance_loss: the loss of a model that knows nothing, shown beside the first one, if known.
        tensorboard: write the numbers to an event file in the folder as well.
        floors, ceilings: collapse indicators by name, and the value below or above which to warn.
    """

    def __init__(self, folder: str, world: World, *, batch_size, total_steps, first_step, every,
                 chance_loss, floors, ceilings=None, tensorboard=False):
        self.path, self.world = os.path.join(folder, "log.jsonl"), world
        self.batch_size, self.total_steps, self.every = batch_size, total_steps, every
        self.chance_loss, self.floors, self.ceilings = chance_loss, floors, ceilings or {}
        self.first_step = self.last_step = first_step
        self.last_time, self.last_wait_seconds = time.perf_counter(), 0.0
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=world.device)
        self.out, self.warned = set(), set()
        self.board = None
        if tensorboard and world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder, purge_step=first_step + 1)

    def due(self, step: int) -> bool:
        """Whether this step gets a line: the first, every few, and the last."""
        return step == self.first_step + 1 or step % self.every == 0 or step == self.total_steps

    def write(self, step: int, *, epoch: int, loss: Tensor, lr: float, wait_seconds: float,
              **indicators):
        """Note a step; a line is written when one is due. All processes call it.

        Args:
            step: steps done, this one included.
            loss: scalar on the device; its mean over processes is the joined loss.
            wait_seconds: seconds spent waiting for images since the start.
            indicators: scalar tensors, averaged over processes; needed where a line is `due`.

        Raises:
            RunError: a loss since the last line was not finite.
        """
        bad = ~torch.isfinite(loss.detach()) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, step, self.bad_step)
        if not self.due(step):
            return
        tensors = {"loss": loss, **indicators}
        stacked = torch.stack([value.detach().to(loss.dtype) for value in tensors.values()])
        values = dict(zip(tensors, comm.mean_over_processes(stacked).tolist(), strict=True))
        self.check()
        now = time.perf_counter()
        seconds = max(now - self.last_time, 1e-9)
        line = {
            "step": step,
            "epoch": epoch,
            "loss": values.pop("loss"),
            "lr": float(lr),
            "images_per_second": round((step - self.last_step) * self.batch_size / seconds, 1),
            "data_wait": round((wait_seconds - self.last_wait_seconds) / seconds, 3),
            "memory_gb": round(memory_gb(self.world.device), 3),
            **values,
        }
        self.append(line)
        self.show(line)
        self.warn(line)
        self.last_step, self.last_time, self.last_wait_seconds = step, now, wait_seconds

    def append(self, line: dict):
        """Write a line of numbers, one of which is the step; null for what is not finite."""
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with comm.same_error_on_all_ranks(writing=self.path):
            if self.world.is_main:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
                for name in line.keys() - {"step"} if self.board else ():
                    if line[name] is not None:
                        self.board.add_scalar(name, line[name], line["step"])
                if self.board:
                    self.board.flush()

    def has(self, step: int, name: str) -> bool:
        """Whether a line of a step has a number of that name."""
        found = False
        if self.world.is_main and os.path.exists(self.path):
            with open(self.path) as file:
                found = any(line["step"] == step and name in line for line in map(json.loads, file))
        return any(comm.any_rank(found))

    def check(self):
        """Stop on every process if a loss was not finite on any; called before each save too."""
        bad_steps = comm.all_gather_no_grad(self.bad_step[None]).tolist()
        bad_steps = [step for step in bad_steps if step >= 0]
        if bad_steps:
            raise Diverged(f"the loss of step {min(bad_steps)} is not finite; checkpoints are "
                           "untouched; lower --lr, raise --warmup-epochs, or try --amp none")

    def warn(self, line: dict):
        """Name the collapse indicators out of bounds for two lines, once until they are back."""
        left = {(name, "below"): bound for name, bound in self.floors.items() if line[name] < bound}
        left |= {(name, "above"): bound for name, bound in self.ceilings.items()
                 if line[name] > bound}
        self.warned &= left.keys()
        for name, where in sorted(self.out & left.keys() - self.warned):
            self.warned.add((name, where))
            comm.print_main(f"warning: {name} is {line[name]:.3g}, {where} "
                            f"{left[name, where]:.3g}: the embeddings collapse (docs/guide.md)")
        self.out = set(left)

    def show(self, line: dict):
        """Update the progress line on a terminal; print a line elsewhere."""
        step = line["step"]
        if step == 1:
            chance = "" if self.chance_loss is None else f" (chance: {self.chance_loss:.4f})"
            comm.print_main(f"first loss {line['loss']:.4f}{chance}")
        left = (self.total_steps - step) * self.batch_size / max(line["images_per_second"], 0.1)
        left = datetime.timedelta(seconds=math.ceil(left))
        comm.print_main(
            f"epoch {line['epoch'] + 1}  step {step}/{self.total_steps}  loss {line['loss']:.4f}  "
            f"lr {line['lr']:.4g}  {line['images_per_second']:.0f} img/s  eta {left}",
            transient=step < self.total_steps,
        )


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
