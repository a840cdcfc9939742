"""Four processes that run functions as gloo groups of 1, 2 or 4: started once for all tests."""

import multiprocessing
import os
import queue
import tempfile
import traceback

PROCESSES = 4
TIMEOUT = 120


def _serve(rank, tasks, results):
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
        try:
            if size > 1:
                dist.init_process_group(
                    "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size
                )
            results.put((rank, True, function(*arguments)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
        finally:
            torch.set_default_dtype(torch.float32)
            if dist.is_initialized():
                dist.destroy_process_group()


class Pool:
    def __init__(self):
        context = multiprocessing.get_context("spawn")
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
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(size):
                self.tasks[rank].put((function, size, os.path.join(folder, "store"), arguments))
            answers = {}
            for _ in range(size):
                try:
                    rank, fine, answer = self.results.get(timeout=TIMEOUT)
                except queue.Empty:
                    raise AssertionError(f"{function.__name__} hung on {size} processes") from None
                assert fine, f"process {rank} of {size}:\n{answer}"
                answers[rank] = answer
        return [answers[rank] for rank in range(size)]

    def close(self):
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(5)
            process.kill()
