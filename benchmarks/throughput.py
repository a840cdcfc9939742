"""Images per second of a script: its data path alone, its step alone, and end to end.

    python benchmarks/throughput.py simclr --data /path/to/cifar10-jpegs --peer lightly
    python benchmarks/throughput.py all --data /path/to/cifar10-jpegs --peer lightly --pairs 3

Each figure comes from a process of its own that runs the script's own `main`:

- data: the script's loader with the script's views, colour work included, and nothing else;
- step: the script's loop on one fixed batch;
- both: the script's loop on its loader; `data_wait` is its share of time spent waiting for images.

Memory is that of the process tree at its peak, and CUDA's own peak where there is one: of each
process the proportional set size, plus what its highest resident set was above the present one. A
peak between two readings counts, so that a process which keeps freed memory, as ours do, is not
set beside the dips of one that gives it back.

With --peer lightly the same three are measured for lightly's method on the same backbone, batch,
views, workers and process count, in turn with ours. The ratio of each pair is taken; the median and
range of the ratios are what to quote. The last line is a JSON object.

With --mfu the step's floating-point operations are counted too (matrix products and convolutions,
forward and backward, by torch's counter on one small batch), and their rate is set beside that of
a large matrix product at the same precision, measured here or given: the share of the peak.

Without --data, small JPEGs are made first (smooth random fields).
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
PARTS = ("data", "step", "both")
HEAD = ["--", "--optimizer", "adamw", "--hidden-dim", "2048", "--bottleneck-dim", "256",
        "--num-outputs", "4096", "--no-bn-in-head"]  # of DINO, as the peer's
VIT = ["--arch", "vit_tiny"]
FEW = [*VIT, "--batch-size", "64", "--warmup", "1", "--steps", "3"]  # slow on a CPU
PAIRED = {  # what `all` measures beside the peer: script, flags
    "SimCLR": ["simclr"],
    "MoCo v2": ["moco", "--", "--bn-groups", "1", "--mlp-head"],
    "MoCo v3": ["moco_v3"],
    "SimSiam": ["simsiam"],
    "BYOL": ["byol"],
    "Barlow Twins": ["barlow_twins"],
    "VICReg": ["vicreg"],
    "LeJEPA 4x32": ["lejepa"],
    "SwAV 2x32": ["swav"],
    "SwAV 2x32 + 4x16": ["swav", "--small-crops", "4"],
    "DINO ResNet-18, 2x32 + 4x16": ["dino", "--small-crops", "4", *HEAD],
    "DINO ViT-tiny/4, 2x32 + 4x16": ["dino", *FEW, "--small-crops", "4", *HEAD],
    "MAE ViT-tiny/4": ["mae", *VIT, "--warmup", "1", "--steps", "4", "--",
                       "--decoder-dim", "192", "--decoder-depth", "4", "--decoder-heads", "3"],
}
ALONE = {  # and by itself, once
    "SimMIM ViT-tiny/4": ["simmim", *VIT],
    "CAE ViT-tiny/4": ["cae", *VIT],
    "I-JEPA ViT-tiny/4": ["ijepa", *VIT],
    "iBOT ViT-tiny/4": ["dinov2", *FEW, "--", "--method", "ibot"],
    "DINOv2 ViT-tiny/4": ["dinov2", *FEW],
    "DenseCL": ["densecl", "--", "--bn-groups", "1"],
    "DeepCluster v2 2x32": ["deepcluster_v2", "--", "--limit", "12800"],
    "DeepCluster": ["deepcluster_odc", "--", "--limit", "12800", "--num-clusters", "100"],
    "ODC": ["deepcluster_odc", "--", "--method", "odc", "--limit", "12800",
            "--num-clusters", "100"],
    "NPID": ["npid_pirl"],
    "PIRL": ["npid_pirl", "--", "--method", "pirl"],
    "Rotation": ["pretext"],
    "Jigsaw": ["pretext", "--", "--task", "jigsaw"],
}
SMALL_CROP_SCALES = {  # of the full and of the small crops, as the peer's
    "swav": (0.14, 1, 0.05, 0.14), "deepcluster_v2": (0.14, 1, 0.05, 0.14),
    "dino": (0.4, 1, 0.05, 0.4), "simclr_multicrop": (0.08, 1, 0.05, 0.14),
    "lejepa": (0.3, 1, 0.05, 0.3),
}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="simclr, ..., or all: every method in turn")
    parser.add_argument("--data", help="a folder of images with class folders under train/")
    parser.add_argument("--peer", choices=["lightly", "none"], default="none")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--stem", default="imagenet", help="torchvision's, as lightly's")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--small-crops", type=int, default=0,
                        help="of scripts with multi-crop: crops of half the size beside the two")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, help="default: cores / processes")
    parser.add_argument("--amp", default="none", help="of the script; the peer's is --peer-amp")
    parser.add_argument("--peer-amp", default="none")
    parser.add_argument("--peer-channels-last", action="store_true",
                        help="and cuDNN's choice of kernels by trial: as ours, not in its examples")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mfu", type=float, nargs="?", const=0.0, metavar="PEAK",
                        help="the step's TFLOP/s, and their share of the measured or given PEAK")
    parser.add_argument("--warmup", type=int, default=5, help="steps not counted")
    parser.add_argument("--steps", type=int, default=20, help="steps counted")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "PART"), help=argparse.SUPPRESS)
    parser.epilog = "Flags behind a -- go to the script."
    mine, behind = parted(argv)
    args = parser.parse_args(mine)
    args.flags, args.peer = behind, None if args.peer == "none" else args.peer
    return args


def parted(flags: list[str]) -> tuple[list[str], list[str]]:
    """The flags before a -- and those behind it."""
    cut = flags.index("--") if "--" in flags else len(flags)
    return flags[:cut], flags[cut + 1 :]


# -------------------------------------------------------------------------------- inside a process


class Clock:
    """Limits a loop to some steps and times them; the device is waited for at both ends."""

    def __init__(self, warmup: int, steps: int):
        self.warmup, self.steps, self.seconds = warmup, steps, None

    def limit(self, batches):
        """Pass on the batches of the warm-up and of the steps that count."""
        batches = iter(batches)
        yield from itertools.islice(batches, self.warmup)
        started = self.now()
        yield from itertools.islice(batches, self.steps)
        self.seconds = self.now() - started

    @staticmethod
    def now() -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def run_script(args, part: str, feed) -> None:
    """Run the script's own `main`, whose loop gets what `feed` yields.

    Args:
        feed: (`Training`, its own steps) to the (step, batch) pairs that the loop gets instead.
    """
    import importlib

    from common.training import Training

    module, steps = importlib.import_module(args.script), Training.steps
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(
            Training, "steps", lambda run, **rest: feed(run, steps(run, **rest))):
        module.main(module.parse_args(script_flags(args, part, folder)))


def repeated(run, steps):
    """The first batch again and again, in an epoch without end: nothing is saved."""
    _, batch = next(steps)
    run.steps_per_epoch = sys.maxsize
    while True:
        yield run.step, batch
        run.step += 1
        run.folder.agree(False)


def loaded(run):
    """Batches of a loader of its own, nothing else."""
    loader = run.load(run.views, epochs=run.args.epochs, start_step=0, draw=run.draw)
    return itertools.chain.from_iterable(map(loader.epoch, range(run.args.epochs)))


def measure_ours(args, part: str) -> dict:
    """Time the script's loop, on its loader or on one fixed batch, or its loader alone."""
    clock = Clock(args.warmup, args.steps)
    waited = [0.0]  # for images, in all, when each batch had come

    def noted(run, steps):
        for pair in steps:
            waited.append(run.loader.wait_seconds)
            yield pair

    def feed(run, steps):
        if part == "data":
            for _ in clock.limit(loaded(run)):
                pass
        else:
            yield from clock.limit(repeated(run, steps) if part == "step" else noted(run, steps))

    run_script(args, part, feed)
    share = (waited[-1] - waited[args.warmup]) / clock.seconds if part == "both" else None
    return {"seconds": clock.seconds, "data_wait": share}


def count_flops(args, part: str) -> dict:
    """FLOPs an image of the script's own step: forward and backward of one small batch."""
    from torch.utils.flop_counter import FlopCounterMode

    args.batch_size = min(args.batch_size, 16)
    args.flags = [flag for flag in args.flags if flag not in ("--compile", "--grad-checkpoint")]
    counter = FlopCounterMode(display=False)

    def feed(run, steps):
        batches = repeated(run, steps)
        yield next(batches)  # the first step is logged, with indicators of its own
        with counter:
            yield next(batches)

    run_script(args, "step", feed)
    return {"gflop": counter.get_total_flops() / args.batch_size / 1e9}


def measure_peak(args, part: str) -> dict:
    """TFLOP/s of a large matrix product at the precision of --amp, the best of some."""
    import torch

    cuda = torch.cuda.is_available() and args.device != "cpu"
    side, repeats = (8192, 50) if cuda else (1024, 10)
    dtype = {"none": torch.float32, "fp16": torch.float16}.get(args.amp, torch.bfloat16)
    a, b = torch.randn(2, side, side, device="cuda" if cuda else "cpu").to(dtype)
    best = math.inf
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(a, b)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return {"tflops": 2 * side**3 / best / 1e12}


def script_flags(args, part: str, folder: str) -> list[str]:
    """The command line of our script; the peer takes its settings from the same."""
    workers = 0 if part == "step" else args.workers
    flags = [
        "--data", args.data, "--recipe", args.recipe, "--arch", args.arch,
        "--image-size", args.image_size, "--batch-size", args.batch_size, "--workers", workers,
        "--device", args.device, "--amp", args.amp, "--output", folder, "--log-every", 1000,
    ]
    if not args.arch.startswith("vit"):
        flags += ["--stem", args.stem]
    if args.small_crops:
        size, half = args.image_size, args.image_size // 2
        flags += ["--num-crops", 2, args.small_crops, "--crop-sizes", size, half,
                  "--crop-scales", *SMALL_CROP_SCALES[args.script]]
    return [str(flag) for flag in flags + args.flags]


def measure_lightly(args, part: str) -> dict:
    """Run lightly's method in the loop that its documentation shows."""
    import importlib

    import peers

    clock = Clock(args.warmup, args.steps)
    settings = importlib.import_module(args.script).parse_args(script_flags(args, part, "unused"))
    optimizers = {"moco": "sgd", "simsiam": "sgd", "dino": "adamw", "mae": "adamw",
                  "lejepa": "adamw"}
    peers.loop(args, part, clock.limit, peers.LIGHTLY[args.script](settings),
               optimizers.get(args.script, "lars"))
    return {"seconds": clock.seconds, "data_wait": None}


def measure(args):
    side, part = args.measure
    whole = {"ours": measure_ours, "lightly": measure_lightly}[side]
    result = {"flops": count_flops, "peak": measure_peak}.get(part, whole)(args, part)
    import torch

    if torch.cuda.is_available():
        result["cuda_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if int(os.environ.get("RANK", 0)) == 0:
        print("RESULT " + json.dumps(result), flush=True)


# ------------------------------------------------------------------------------- outside: the pairs


def peak_gb(pid: int) -> float:
    """Memory of a process and its descendants, each at its own highest so far."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                children.setdefault(int(stat.rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    pids, total = [pid], 0
    for parent in pids:
        pids += children.get(parent, [])
    for each in pids:
        with contextlib.suppress(OSError, KeyError):  # it ended, or ends while it is read
            kilobytes = {}
            for file in ("smaps_rollup", "status"):
                for line in Path(f"/proc/{each}/{file}").read_text().splitlines():
                    if line.endswith("kB"):
                        name, value = line.removesuffix("kB").split(":")
                        kilobytes[name] = int(value)
            total += kilobytes["Pss"] + kilobytes["VmHWM"] - kilobytes["VmRSS"]
    return total * 1024 / 1e9


def one(args, argv: list[str], side: str, part: str) -> dict:
    """Measure one part of one side in a fresh process (or torchrun's processes)."""
    launcher = [sys.executable]
    if args.processes > 1 and part not in ("flops", "peak"):
        launcher += ["-m", "torch.distributed.run", "--standalone",
                     f"--nproc_per_node={args.processes}"]
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.processes)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [*launcher, __file__, "--measure", side, part, *argv], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    peak = [0.0]

    def watch():
        while process.poll() is None:
            peak[0] = max(peak[0], peak_gb(process.pid))
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, errors = process.communicate()
    watcher.join()
    lines = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{side} {part} failed:\n{printed}\n{errors}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    if "seconds" in result:
        result["images_per_second"] = args.steps * args.batch_size / result.pop("seconds")
    return {**result, "memory_gb": peak[0]}


def make_jpegs(folder: Path, count: int, size: int):
    """Smooth random fields as JPEGs, in ten class folders under train/."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / "train" / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(place / f"{number}.jpg")


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main(args, argv):
    import torch

    fits = args.arch in {"cifar10": ("resnet18", "vit_tiny"),
                         "imagenet": ("resnet50", "vit_small", "vit_base")}.get(args.recipe, ())
    if args.peer and not (fits and args.stem == "imagenet"):
        raise SystemExit("--peer lightly is written for torchvision's stem and for --recipe "
                         "cifar10 with resnet18 or vit_tiny, or imagenet with resnet50, vit_small "
                         "or vit_base")
    blurs = args.recipe == "imagenet" and args.script != "mae" and "--no-blur" not in args.flags
    if args.peer and blurs:
        raise SystemExit("the peer's views have no blur: pass -- --no-blur")

    sides = ["ours", *([args.peer] if args.peer else [])]
    found = {(side, part): [] for side in sides for part in args.parts}
    for pair in range(args.pairs):
        for part in args.parts:
            for side in sides[:: -1 if pair % 2 else 1]:  # in turn the first
                result = one(args, argv, side, part)
                found[side, part].append(result)
                speed, memory = result["images_per_second"], result["memory_gb"]
                print(f"pair {pair + 1}  {part:5} {side:8} {speed:8.1f} img/s  {memory:.2f} GB",
                      file=sys.stderr, flush=True)
    summary = {
        "script": args.script,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "setting": {name: value for name, value in vars(args).items() if name not in ("measure",)},
        "images_per_second": {}, "memory_gb": {}, "data_wait": {}, "ratio": {}, "memory_ratio": {},
    }
    print(f"{'part':6}" + "".join(f"{side + ' img/s':>20}{side + ' GB':>16}" for side in sides)
          + ("   ours / peer (range)" if args.peer else ""))
    for part in args.parts:
        row = f"{part:6}"
        for side in sides:
            results = found[side, part]
            speeds = spread([r["images_per_second"] for r in results])
            memory = spread([r["memory_gb"] for r in results])
            summary["images_per_second"].setdefault(side, {})[part] = speeds
            summary["memory_gb"].setdefault(side, {})[part] = memory
            if "cuda_gb" in results[0]:
                peaks = spread([r["cuda_gb"] for r in results])
                summary.setdefault("cuda_gb", {}).setdefault(side, {})[part] = peaks
            row += f"{speeds['median']:>20.1f}{memory['median']:>16.2f}"
        if part == "both":
            summary["data_wait"] = spread([r["data_wait"] for r in found["ours", "both"]])
        if args.peer:
            pairs = list(zip(found["ours", part], found[args.peer, part], strict=True))
            ratio = spread([a["images_per_second"] / b["images_per_second"] for a, b in pairs])
            summary["ratio"][part] = ratio
            memory = spread([a["memory_gb"] / b["memory_gb"] for a, b in pairs])
            summary["memory_ratio"][part] = memory
            row += f"   {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
            row += f"   memory {memory['median']:.2f}"
        print(row)
    if args.mfu is not None and "step" in args.parts:
        summary["mfu"] = mfu = utilisation(args, argv, found["ours", "step"])
        print("step: {gflop:.1f} GFLOP an image, {tflops:.3g} TFLOP/s, {share:.0%} of the peak of "
              "{peak_tflops:.3g}".format(**mfu))
    print(json.dumps(summary))


def utilisation(args, argv: list[str], steps: list[dict]) -> dict:
    """What the step computes in a second beside what the device can."""
    gflop = one(args, argv, "ours", "flops")["gflop"]
    peak = args.mfu or one(args, argv, "ours", "peak")["tflops"]
    speed = statistics.median(step["images_per_second"] for step in steps) / args.processes
    tflops = speed * gflop / 1e3
    return {"gflop": gflop, "tflops": tflops, "peak_tflops": peak, "share": tflops / peak}


def run_all(args, given: list[str]):
    """Measure every method with the same settings in turn; one table at the end."""
    rows = []
    shared, behind = parted([flag for flag in given if flag != "all"])
    for name, (script, *own) in (PAIRED | ALONE).items():
        alone = [] if name in PAIRED else ["--peer", "none", "--pairs", "1"]
        own, theirs = parted(own)
        flags = [*shared, *alone, *own, "--", *behind, *theirs]
        done = subprocess.run([sys.executable, __file__, script, *flags], stdout=subprocess.PIPE,
                              text=True)
        if done.returncode:
            rows.append(f"| {name} | failed |")
            continue
        print(done.stdout, end="", flush=True)
        result = json.loads(done.stdout.splitlines()[-1])
        row = f"| {name}"
        for part in args.parts:
            row += f" | {result['images_per_second']['ours'][part]['median']:,.0f}"
            if part in result["ratio"]:
                ratio = result["ratio"][part]
                row += (f" | {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
                        f" | {result['memory_ratio'][part]['median']:.2f}")
            else:
                row += " | | "
        rows.append(row + " |")
    heads = [f"{part}, img/s | over {args.peer} | memory" for part in args.parts]
    print("| method | " + " | ".join(heads) + " |")
    print("|---" * (1 + 3 * len(args.parts)) + "|")
    print("\n".join(rows))


def machine_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    given = sys.argv[1:]
    arguments = parse_args(given)
    if arguments.measure:
        measure(arguments)
    elif arguments.data and arguments.script == "all":
        run_all(arguments, given)
    elif arguments.data:
        main(arguments, given)
    else:
        with tempfile.TemporaryDirectory() as made:
            needed = (arguments.warmup + arguments.steps + 1) * arguments.batch_size
            make_jpegs(Path(made), needed, arguments.image_size)
            given = ["--data", made, *given]
            (run_all if arguments.script == "all" else main)(parse_args(given), given)
