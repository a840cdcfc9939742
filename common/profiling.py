"""Where the time of a step goes: `--profile` by torch's profiler."""

import contextlib
import os
import time
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from common import distributed as comm
from common.distributed import World

WARM_UP = 5  # steps before those that are recorded


@contextlib.contextmanager
def named_ranges(state: dict):
    """Name forwards and backward in a profile; optimisers name their steps themselves."""
    named = {f"forward {name}": (module, "forward") for name, module in state.items()
             if isinstance(module, nn.Module)} | {"backward": (Tensor, "backward")}
    with contextlib.ExitStack() as patches:
        for name, (owner, method) in named.items():
            with_name = record_function(name)(getattr(owner, method))
            patches.enter_context(mock.patch.object(owner, method, with_name))
        yield


@contextlib.contextmanager
def profiled(steps: int, state: dict, loader, folder: str, world: World):
    """Record so many steps after `WARM_UP` others; yields a function to call after every step.

    It returns True as soon as the steps are recorded, and is not called again: `trace.json` is in
    the folder then, and a table of the costliest operators is printed.
    """
    profiler = torch.profiler.profile()
    started, done = [], [0]

    def after_step() -> bool:
        done[0] += 1
        if done[0] in (WARM_UP, WARM_UP + steps) and world.device.type == "cuda":
            torch.cuda.synchronize()
        if done[0] == WARM_UP:
            started[:] = time.perf_counter(), loader.wait_seconds
            profiler.start()
        if done[0] < WARM_UP + steps:
            return False
        seconds = time.perf_counter() - started[0]
        profiler.stop()
        report(profiler, steps, seconds, loader.wait_seconds - started[1], folder, world)
        return True

    try:
        with named_ranges(state):
            yield after_step
    finally:
        if WARM_UP <= done[0] < WARM_UP + steps:
            profiler.stop()
        if done[0] < WARM_UP + steps:
            comm.print_main("warning: stopped before the profile was complete; no trace.json")


def report(profiler, steps: int, seconds: float, waited: float, folder: str, world: World) -> None:
    """Write the trace and print the table; rank 0 only."""
    path = os.path.join(folder, "trace.json")
    with comm.same_error_on_all_ranks(writing=folder):
        if world.is_main:
            profiler.export_chrome_trace(path)
    key = "self_cuda_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    comm.print_main(profiler.key_averages().table(sort_by=key, row_limit=20))
    comm.print_main(f"{steps} steps, {1000 * seconds / steps:.1f} ms each, {waited / seconds:.1%} "
                    f"of it waiting for images; {path} opens in chrome://tracing or Perfetto")
