"""Where the time of a training step, and of an image's way to it, goes.

    python benchmarks/shares.py all --data /path/to/cifar10-jpegs
    python benchmarks/shares.py dino --data /path/to/cifar10-jpegs --small-crops 4

The step: torch's profiler around some steps of the script's own loop on one fixed batch, self time
of its operators by kind; what the process does outside operators is `python`. The data path: the
script's loader without workers, by stage. Flags are those of `throughput.py`; the last line is a
JSON object. On CUDA the kernels' time is counted.
"""

import contextlib
import functools
import itertools
import json
import sys
import time
from unittest import mock

import throughput
import torch

from common import augment, rng
from common.loader import RankBatches

KINDS = {  # the first kind with a part in the operator's name
    "convolution": ("convolution", "conv2d", "cudnn_conv", "implicit_gemm", "fprop", "dgrad",
                    "wgrad"),
    "matrix product": ("addmm", "::mm", "::bmm", "matmul", "einsum", "linear", "attention",
                       "baddbmm", "gemm", "flash", "cutlass", "nvjet"),
    "norm": ("batch_norm", "layer_norm", "vector_norm", "linalg_norm", "foreach_norm", "bn_"),
    "optimiser, moving average": ("fused_adam", "fused_sgd", "_foreach", "multi_tensor", "lerp"),
    "gather, sort": ("gather", "index", "scatter", "topk", "sort"),
}


def kind_of(name: str) -> str:
    lowered = name.lower()
    for kind, parts in KINDS.items():
        if any(part in lowered for part in parts):
            return kind
    return "elementwise, copies, the rest"


def step_shares(args) -> dict[str, float]:
    """Shares of the time of a step by kind of operator; `ms` is the whole step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_cuda = torch.cuda.is_available() and args.device != "cpu"
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    found = {}

    def feed(run, steps):
        batches = throughput.repeated(run, steps)
        yield from itertools.islice(batches, args.warmup)
        profiler.start()
        started = time.perf_counter()
        yield from itertools.islice(batches, args.steps)
        if on_cuda:
            torch.cuda.synchronize()
        found["seconds"] = time.perf_counter() - started
        profiler.stop()

    throughput.run_script(args, "step", feed)
    totals = {}
    counted = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if event.device_type == counted and not event.key.startswith(("Optimizer.", "Activity")):
            totals[kind_of(event.key)] = totals.get(kind_of(event.key), 0) + own / 1e6
    rest = found["seconds"] - sum(totals.values())
    totals["python, waiting"] = max(0.0, rest)
    shares = {kind: value / found["seconds"] for kind, value in totals.items()}
    return {**shares, "ms": 1e3 * found["seconds"] / args.steps}


def data_shares(args) -> dict[str, float]:
    """Shares of the data path by stage; `us` is one image's whole way on one core."""
    spent = {}

    def timed(stage, function):
        @functools.wraps(function)
        def inner(*arguments, **named):
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - started
        return inner

    def feed(run, steps):
        batches = throughput.loaded(run)
        next(batches)  # warm
        spent.clear()
        started = time.perf_counter()
        for _ in range(args.steps):
            next(batches)
        spent["all"] = time.perf_counter() - started
        yield from ()

    stages = [(RankBatches, "read_or_replace", "read and decode"), (rng, "philox", "generators"),
              (augment.View, "draw", "parameters"), (augment.View, "crop", "crop and resize"),
              (augment.View, "finish", "colours, normalise")]
    with contextlib.ExitStack() as stack:
        for owner, name, stage in stages:
            stack.enter_context(
                mock.patch.object(owner, name, timed(stage, getattr(owner, name))))
        throughput.run_script(args, "step", feed)
    whole = spent.pop("all")
    shares = {stage: seconds / whole for stage, seconds in spent.items()}
    shares["python, order"] = 1 - sum(shares.values())
    return {**shares, "us": 1e6 * whole / args.steps / args.batch_size}


def main():
    given = sys.argv[1:]
    if not given or "--data" not in given:
        raise SystemExit("usage: shares.py SCRIPT|all --data FOLDER [flags of throughput.py]")
    jobs = {given[0]: given}
    if given[0] == "all":
        jobs = {name: [script, *given[1:], *own]
                for name, (script, *own) in (throughput.PAIRED | throughput.ALONE).items()}
    found = {}
    for name, argv in jobs.items():
        args = throughput.parse_args(argv)
        if not any(flag in argv for flag in ("--warmup", "--steps")):
            args.warmup, args.steps = 2, 5
        found[name] = {"step": step_shares(args), "data": data_shares(args)}
        print(name)
        for part, unit in (("step", "ms"), ("data", "us")):
            shares = dict(found[name][part])
            whole = shares.pop(unit)
            listed = sorted(shares.items(), key=lambda item: -item[1])
            print(f"  {part:4} {whole:7.0f} {unit}: "
                  + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in listed), flush=True)
    print(json.dumps({
        "benchmark": "shares", "date": time.strftime("%Y-%m-%d"),
        "machine": throughput.machine_name(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "shares": found,
    }))


if __name__ == "__main__":
    main()
