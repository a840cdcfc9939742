"""Whether every script does on one GPU what it does on a CPU: minutes.

    python benchmarks/cuda_check.py --jobs 8
    python benchmarks/cuda_check.py --only simclr dino --kinds values waits

For every recipe of tests/golden_digits.json, each in fresh processes, by the scripts' own `main`:

- values: the first steps in float64; every number of the log beside those of the CPU;
- pair: the same with two processes on the one GPU, joined by gloo, as NCCL takes no GPU twice:
  DDP, the collectives, synchronised batch norm by the GPU's kernels;
- resume: with --deterministic, stopped after two steps and started again: the same numbers, bit
  for bit;
- waits: in bf16, steps without a log line, in which nothing may wait for the GPU (as torch's own
  check reports it), and how many kernels and copies a step takes (as its profiler counts them);
- compile: some steps with --compile, in bf16;
- evaluations: k-NN, linear and SVM of an untrained backbone, on the GPU and on the CPU.

Prints a line each and a JSON object last; the exit status is 1 if one failed.
"""

import argparse
import collections
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
KINDS = ("values", "waits", "pair", "evaluations", "resume", "compile")
RANDOM = ["--checkpoint", "random", "--data", "digits", "--workers", "0"]
EVALUATIONS = {
    "eval_knn": [*RANDOM, "--shots"],
    "eval_linear": RANDOM,
    "eval_linear-moco": [*RANDOM, "--protocol", "moco", "--epochs", "3"],
    "eval_linear-mae": [*RANDOM, "--arch", "vit_micro", "--protocol", "mae", "--epochs", "3"],
    "eval_linear-aim": [*RANDOM, "--arch", "vit_micro", "--probe", "attentive", "--epochs", "3"],
    "eval_retrieval": RANDOM,
    "eval_segmentation": [*RANDOM, "--limit", "60"],
    "eval_svm": [*RANDOM, "--costs", "0.01", "0.1"],
}
NEED_FAISS = ("eval_knn", "eval_segmentation")  # on a CPU
SECONDS = 240  # for one check


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="RECIPE")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--jobs", type=int, default=4, help="checks side by side")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "RECIPE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------- inside a process


def train(name: str, folder, device: str, *flags, after_step=lambda step: False) -> list[dict]:
    """Train by the recipe until `after_step` says to stop; the lines of the log."""
    from torch import nn

    import test_golden
    from common import checkpoint, training

    script, *own = test_golden.RECIPES[name]
    script = importlib.import_module(script)
    steps = [0]

    def seed_step(self):
        steps[0] += 1
        seed(self)

    def agree(self, epoch_ends):
        self.stopping = steps[0] > 0 and after_step(steps[0])  # 0: before the first one
        return self.stopping, self.stopping

    def normal(tensor, mean=0.0, std=1.0, **_):  # as the golden numbers were made
        return nn.init.normal_(tensor, mean, std)

    seed = training.Training.seed_step
    with mock.patch.object(checkpoint.Run, "agree", agree), \
            mock.patch.object(training.Training, "seed_step", seed_step), \
            mock.patch.object(nn.init, "trunc_normal_", normal):
        script.main(script.parse_args([*own, *flags, "--output", str(folder), "--device", device,
                                       "--workers", "0"]))
    lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in test_golden.MEASURED} for line in lines]


def furthest(found: list[dict], wanted: list[dict]) -> tuple[float, str]:
    """The largest relative difference of a number of the logs, and where."""
    worst = (0.0, "")
    assert len(found) == len(wanted), f"{len(found)} lines, not {len(wanted)}"
    for line, golden in zip(found, wanted, strict=True):
        for field, value in golden.items():
            off = abs(line[field] - value) / max(abs(value), 1e-6)
            worst = max(worst, (off if off == off else float("inf"),
                                f"{field} in step {line['step']}: {line[field]}, CPU {value}"))
    return worst


def check_values(name: str, device: str, folder) -> dict:
    import torch

    import test_golden

    torch.set_default_dtype(torch.float64)
    size = int(os.environ.get("WORLD_SIZE", 1))
    golden = json.loads(test_golden.GOLDEN.read_text())[name]
    steps = test_golden.STEPS
    found = train(name, Path(folder, "gpu"), device, "--log-every", "1", "--amp", "none",
                  after_step=lambda step: step == steps)
    if str(size) in golden:
        wanted = golden[str(size)][:steps]
    else:  # two processes, where a trace holds the numbers
        wanted = train(name, Path(folder, "cpu"), "cpu", "--log-every", "1",
                       after_step=lambda step: step == steps)
    off, where = furthest(found, wanted)
    return {"ok": off < 1e-5, "off": off, "where": where}


def check_pair(name: str, device: str, folder) -> dict:
    """As process `RANK` of two."""
    import torch
    import torch.distributed as dist

    from common import distributed as comm

    def all_gather_rows(x):  # gloo has no gather into one tensor on a GPU
        parts = [x.new_empty(x.shape) for _ in range(comm.size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    join, setup = dist.init_process_group, comm.setup
    if device == "cuda":
        torch.cuda.init()

    def setup_on_one(*arguments):
        own = SimpleNamespace(uuid=comm.env_int("RANK", 0))
        with mock.patch.object(torch.cuda, "get_device_properties", lambda _: own), \
                mock.patch.object(dist, "init_process_group", lambda *_: join("gloo")):
            return setup(*arguments)

    with mock.patch.object(comm, "setup", setup_on_one), \
            mock.patch.object(comm, "_gather", all_gather_rows):
        result = check_values(name, device, folder)
    dist.destroy_process_group()
    return result


def check_resume(name: str, device: str, folder) -> dict:
    flags = ("--deterministic", "--log-every", "1")
    whole = train(name, Path(folder, "whole"), device, *flags, after_step=lambda step: step == 4)
    train(name, Path(folder, "parts"), device, *flags, after_step=lambda step: step == 2)
    parts = train(name, Path(folder, "parts"), device, *flags, after_step=lambda step: step == 2)
    off, where = furthest(parts, whole)
    return {"ok": off == 0, "off": off, "where": where}


def check_waits(name: str, device: str, folder) -> dict:
    import torch

    found, seen = {}, []
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA,
                                                  torch.profiler.ProfilerActivity.CPU])

    def after_step(step):
        if step == 4:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        if step == 8:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            profiler.start()
        if step == 12:
            torch.cuda.synchronize()
            profiler.stop()
        return step == 12

    def show(message, category, filename, lineno, *_):
        if "called a synchronizing" in str(message):
            import traceback

            own = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack()
                   if str(ROOT) in f.filename and "cuda_check" not in f.filename]
            seen.append(own[-1] if own else f"{filename}:{lineno}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        lines = train(name, folder, device, "--log-every", "1000", "--amp", "bf16",
                      after_step=after_step)
    kinds = collections.Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.elapsed_us():
            copied = event.name.startswith(("Memcpy", "Memset"))
            kinds["copies" if copied else "kernels"] += 1
    found["waits"] = dict(collections.Counter(seen))
    found |= {kind: count / 4 for kind, count in kinds.items()}
    found["loss"] = lines[-1]["loss"]
    return {"ok": not seen and kinds["kernels"] > 0, **found}


def check_compile(name: str, device: str, folder) -> dict:
    started = time.perf_counter()
    plain = train(name, Path(folder, "plain"), device, "--log-every", "1", "--amp", "bf16",
                  after_step=lambda step: step == 2)
    compiled = train(name, Path(folder, "compiled"), device, "--log-every", "1", "--amp", "bf16",
                     "--compile", after_step=lambda step: step == 2)
    off = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(compiled, plain, strict=True))
    return {"ok": off < 0.03, "off": off, "seconds": round(time.perf_counter() - started)}


def check_evaluations(name: str, device: str, folder) -> dict:
    results = []
    no_faiss = name in NEED_FAISS and not importlib.util.find_spec("faiss")
    for each in (device,) if no_faiss else (device, "cpu"):
        script, flags = name.split("-")[0], EVALUATIONS[name]
        printed = subprocess.run(
            [sys.executable, ROOT / f"{script}.py", *flags, "--device", each], cwd=folder,
            text=True, capture_output=True)
        if printed.returncode:
            return {"ok": False, "error": printed.stderr[-1500:]}
        results.append(json.loads(printed.stdout.splitlines()[-1]))
    results = [{k: v for k, v in r.items() if isinstance(v, float)} for r in results]
    off = max(abs(results[0][k] - v) for k, v in results[-1].items())
    return {"ok": off < 0.02, "off": off, "gpu": results[0], "cpu": results[1:]}


# ----------------------------------------------------------------------------------- all processes


def environment(kind: str, folder: str) -> list[dict]:
    """Variables of each process of a check."""
    plain = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    if kind != "pair":
        return [plain]
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [{**plain, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
             "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for rank in (0, 1)]


def check(args, kind: str, name: str) -> dict:
    """Run a check in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", kind, name, "--device", args.device]
        processes = [subprocess.Popen(command, cwd=folder, env=env, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                     for env in environment(kind, folder)]
        try:
            printed = [each.communicate(timeout=SECONDS) for each in processes]
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            return {"ok": False, "error": f"took more than {SECONDS} s"}
    out, errors = printed[0]
    if any(each.returncode for each in processes):
        return {"ok": False, "error": "\n".join((e or o)[-1500:] for o, e in printed)}
    return json.loads(out.splitlines()[-1])


def main(args):
    if args.one:
        kind, name = args.one
        print(json.dumps(globals()[f"check_{kind}"](name, args.device, os.getcwd())))
        return 0
    import test_golden

    checks = [(kind, name) for kind in KINDS if kind in args.kinds
              for name in (EVALUATIONS if kind == "evaluations" else test_golden.RECIPES)
              if not args.only or name in args.only]
    found, started = {}, time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {each: pool.submit(check, args, *each) for each in checks}
        for (kind, name), future in waiting.items():
            result = found[f"{kind}/{name}"] = future.result()
            shown = {k: v for k, v in result.items() if k != "ok"}
            print("ok    " if result["ok"] else "FAILED", kind, name, json.dumps(shown), flush=True)
    failed = [name for name, result in found.items() if not result["ok"]]
    print(f"{len(found) - len(failed)} of {len(found)} as they should be, "
          f"{time.perf_counter() - started:.0f} s; failed: {' '.join(failed) or 'none'}")
    print(json.dumps(found))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
