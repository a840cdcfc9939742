"""Loader processes: how many, how they are forked, and how they end."""

import atexit
import contextlib
import ctypes
import datetime
import gc
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import time

import torch

from common import distributed as comm
from common.distributed import RunError

PROGRESS_SECONDS = 10  # between two lines of a pass over images


def default_workers() -> int:
    """This process's share of the cores, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cores // comm.env_int("LOCAL_WORLD_SIZE", 1))


def workers_for(images, workers: int | None) -> int:
    """Loader processes of one pass: as given, else this process's share if there are files."""
    if workers is not None:
        return workers
    return default_workers() if images.reads_files else 0


def read_ahead(dataset, items, workers: int, device: torch.device, *, start_worker,
               ahead: int = 2, context=None):
    """Iterate over some items of a data set, read by loader processes, which end with this one.

    Args:
        start_worker: what a loader process calls first.
        ahead: items that each of them reads before they are asked for.
        context: multiprocessing's, if not `worker_context`.
    """
    workers = min(workers, len(items))
    context = context or (worker_context() if workers else None)
    atexit.unregister(end_workers)
    atexit.register(end_workers)  # after multiprocessing's own, so that it runs before it
    gc.freeze()  # in the workers, whose collections would copy every page that they share
    try:
        return iter(torch.utils.data.DataLoader(
            dataset, sampler=items, batch_size=None, num_workers=workers,
            worker_init_fn=start_worker, prefetch_factor=ahead if workers else None,
            pin_memory=device.type == "cuda", multiprocessing_context=context))
    finally:
        gc.unfreeze()


class Made(torch.utils.data.Dataset):
    """Item i is what a function makes of images and i, or the message of a RunError."""

    def __init__(self, function, images):
        self.function, self.images = function, images

    def __getitem__(self, item):
        try:
            return self.function(self.images, item)
        except RunError as error:
            return str(error)


def made_ahead(function, images, items, workers: int | None, device: torch.device, start_worker):
    """Yield function(images, item) of some items, made by loader processes; errors are RunErrors.

    Without a number of them, it is this process's share of the cores if there are files. A line
    every few seconds tells how far the pass is.
    """
    workers = workers_for(images, workers)
    start = told = time.monotonic()
    for number, made in enumerate(read_ahead(Made(function, images), items, workers, device,
                                             start_worker=start_worker), start=1):
        if isinstance(made, str):
            raise RunError(made)
        yield made
        if (now := time.monotonic()) - told >= PROGRESS_SECONDS:
            told, share = now, number / len(items)
            left = datetime.timedelta(seconds=round((now - start) * (1 / share - 1)))
            comm.print_main(f"{share:.0%} of {len(images):,} images, eta {left}", transient=True)


def worker_context(patience: float = 5.0):
    """How loader processes are started: forked, on Linux, as soon as no other thread runs.

    A gloo thread frees the tensors of an exchange shortly after it, and takes locks of the
    interpreter to do so. A child forked in that moment inherits them held and can hang (seen with
    Python 3.11, python/cpython#112275). Forked, not spawned as Python 3.14 would, so that workers
    share the images of this process.

    Args:
        patience: seconds to wait for other threads before forking anyway, with a warning.
    """
    if not os.path.isdir("/proc/self/task"):  # not Linux
        return multiprocessing.get_context()
    before, end = None, time.monotonic() + patience
    this = os.path.basename(os.readlink("/proc/thread-self"))
    while time.monotonic() < end:
        time.sleep(0.002)  # release the GIL
        now = [what for task, what in task_states().items() if task != this]
        if now == before and all("S (sleeping)" in what for what in now):
            break  # none has run in between, nor wants to
        before = now
    else:
        comm.print_main(f"warning: another thread still runs after {patience:g} s; the loader's "
                        "workers are forked beside it, and may hang")
    return multiprocessing.get_context("fork")


def task_states() -> dict[str, str]:
    """For each thread of this process, whether it runs, and how often it has stopped to."""
    states = {}
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/status") as file:
            lines = re.findall(r"^(?:State|\w*ctxt_switches):.*", file.read(), re.MULTILINE)
            states[task] = " ".join(lines)
    return states


def start_worker(worker: int) -> None:
    """Ignore stop signals in a worker, and see that it does not live on without sending.

    One sent to every process (Slurm, Ctrl-C) must not take the loader from under a step that is to
    be finished. Workers end with the main process: `end_workers`, or torch's own watch on it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_if_unsent(worker)


def end_if_unsent(_worker: int) -> None:
    """End a loader process, of which this is the start, with a batch that it cannot send.

    It goes through shared memory, of which containers have little. multiprocessing would print a
    traceback and keep the process, for whose batch the main process would wait for ever.
    """

    def end(error, item):
        if not isinstance(error, (RuntimeError, OSError)):
            report(error, item)
        os._exit(1)

    report = multiprocessing.queues.Queue._on_queue_feeder_error
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)


def end_workers() -> None:
    """At exit after an error: multiprocessing would wait for ever for workers to obey SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch reports each of them as a failure
    for child in multiprocessing.active_children():
        if child.daemon:  # a loader's workers are; anybody else's processes are left alone
            child.kill()


def set_malloc_thresholds() -> None:
    """Ask glibc, where that is the C library, to keep freed memory for the next tensors.

    Given back and faulted in again in every step, it costs a tenth of the step on a CPU.
    """
    mmap_threshold, trim_threshold = -3, -1  # of mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        if libc.mallopt(mmap_threshold, 2**30):
            libc.mallopt(trim_threshold, 2**28)
