"""Where the time of a step goes: `--profile` by torch's profiler."""

import contextlib
import os
import time
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

from common import distributed as comm
from common.distributed import World

WARM_UP = 5  # steps before those that are recorded


@contextlib.contextmanager
def named_ranges(state: dict):
    """Name forwards and backward in a profile; optimisers name their steps themselves."""
    hooks = []
    for name, module in state.items():
        if isinstance(module, nn.Module):
            span = record_function(f"forward {name}")
            hooks += [module.register_forward_pre_hook(lambda *_, span=span: begin(span)),
                      module.register_forward_hook(lambda *_, span=span: end(span))]
    backward = Tensor.backward

    def named_backward(*args, **options):
        with record_function("backward"):
            return backward(*args, **options)

    try:
        with mock.patch.object(Tensor, "backward", named_backward):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def begin(span) -> None:
    span.__enter__()


def end(span) -> None:
    span.__exit__(None, None, None)


@contextlib.contextmanager
def profiled(steps: int, state: dict, loader, folder: str, world: World):
    """Record so many steps after `WARM_UP` others; yields a function to call after every step.

    It returns True once the steps are recorded: `trace.json` is in the folder then, and a table of
    the costliest operators is printed.
    """
    activities = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
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
        if done[0] == WARM_UP + steps:
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
