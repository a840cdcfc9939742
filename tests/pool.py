"""Four processes that run functions as gloo groups of 1, 2 or 4: started once for all tests."""

import faulthandler
import multiprocessing
import os
import queue
import tempfile
import threading
import time
import traceback

PROCESSES = 4
TIMEOUT = 60


def _end_with_parent():
    """End this process when the one that started it has ended, killed or not."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _serve(rank, tasks, results):
    _end_with_parent()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        task = tasks.get()
        if task is None:
            return
        function, size, rendezvous, arguments = task
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ["LOCAL_WORLD_SIZE"] = str(size)
        faulthandler.dump_traceback_later(TIMEOUT - 5)  # where it hung, if it does
        try:
            if size > 1:
                dist.init_process_group(
                    "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size
                )
                dist.barrier()  # nobody leaves while others still connect
            answer = function(*arguments)
            if dist.is_initialized():
                dist.destroy_process_group()  # before the parent deletes its file: it would wait
            results.put((rank, True, answer))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()
            torch.set_default_dtype(torch.float32)


class Pool:
    """The processes. After a failure they are replaced, so that one test cannot spoil the next."""

    def __init__(self):
        self.start()

    def start(self):
        context = multiprocessing.get_context("forkserver")  # which imports once, for all of them
        context.set_forkserver_preload(["pytest", "torch", "torchvision", "sklearn.svm"])
        self.tasks = [context.Queue() for _ in range(PROCESSES)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, self.tasks[rank], self.results), daemon=True)
            for rank in range(PROCESSES)
        ]
        for process in self.processes:
            process.start()

    def run(self, size, function, *arguments):
        """Call `function(*arguments)` on `size` processes; its results in rank order.

        The function is a module-level one of a test module, its arguments and results picklable
        (NumPy arrays rather than tensors).
        """
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.begin(size, folder, function, *arguments)
                return self.collect(size, function.__name__)
        except AssertionError:
            self.replace()
            raise

    def kill(self, moment, size, function, *arguments):
        """Begin as `run` does, and kill the processes once `moment()` holds."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.begin(size, folder, function, *arguments)
                end = time.monotonic() + TIMEOUT
                while not moment():
                    assert time.monotonic() < end, "the awaited moment did not come"
                    assert self.results.empty(), f"ended too early: {self.results.get()}"
                    time.sleep(0.0002)  # some moments are short
        finally:
            self.replace()

    def begin(self, size, folder, function, *arguments):
        for rank in range(size):
            self.tasks[rank].put((function, size, os.path.join(folder, "store"), arguments))

    def collect(self, size, name):
        answers, end = {}, time.monotonic() + TIMEOUT
        while len(answers) < size:
            try:
                rank, fine, answer = self.results.get(timeout=1)
            except queue.Empty:
                dead = [r for r, process in enumerate(self.processes) if not process.is_alive()]
                assert not dead, f"process {dead[0]} died in {name} on {size} processes"
                assert time.monotonic() < end, f"{name} hung on {size} processes"
                continue
            assert fine, f"process {rank} of {size}:\n{answer}"
            answers[rank] = answer
        return [answers[rank] for rank in range(size)]

    def replace(self):
        self.close()
        self.start()

    def close(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
