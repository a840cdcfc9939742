"""What to know of these scripts on one GPU, by one command, in pieces.

    python benchmarks/cuda.py --data /path/to/cifar10-jpegs --folder runs/cuda
    python benchmarks/cuda.py --data /path/to/cifar10-jpegs --small --workers 1

It ends within --minutes, and the same command goes on where it stopped. In this order:

a. peak: a large matrix product in bf16.
b. flops, step, compile, lightly: the training step of six methods at ImageNet's sizes in bf16 on
   one fixed batch, as it is, with --compile, and lightly's, where lightly is installed.
c. loader: images a second from JPEGs of 256 to 500 px (enlarged CIFAR images, smoother and so
   quicker to decode than photos) with a worker a core, as a share of the step's rate.
d. cifar10: every method trained on all images by its recipe, a slice of time after another, with
   k-NN (k 200, T 0.1) after each slice and the linear probe at the end. Training seconds are steps
   x batch / images a second from the log: saves count, starts and evaluations do not.

The data folder holds train/<class>/ and test/<class>/. A finished job is a JSON file in --folder;
one that failed is noted with its last lines and tried again with --retry only. Prints tables of
all that is there, and a JSON object last, also in summary.json. --small is a rehearsal on a CPU.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
STEPS = {  # script, backbone, a batch for a card of 139 GB (half of it for one of 80), flags
    "SimCLR": ["simclr", "resnet50", 512],
    "SwAV 2x224 + 6x96": ["swav", "resnet50", 256],
    "Barlow Twins": ["barlow_twins", "resnet50", 512],
    "MoCo v2": ["moco", "resnet50", 1024, "--bn-groups", 1],  # a GPU's share of eight
    "DINO 2x224 + 8x96": ["dino", "vit_small", 512, "--drop-path", 0],  # the peer's has none
    "MAE": ["mae", "vit_base", 1024],
    "SimSiam": ["simsiam", "resnet50", 512],
    "BYOL": ["byol", "resnet50", 512],
    "MoCo v3": ["moco_v3", "resnet50", 512],
    "VICReg": ["vicreg", "resnet50", 512],
    "DINOv2 2x224 + 8x96": ["dinov2", "vit_small", 256],
    "SimMIM": ["simmim", "vit_base", 512],
    "I-JEPA": ["ijepa", "vit_base", 512, "--patch-size", 16],
}
NO_PEER = ("DINOv2 2x224 + 8x96", "SimMIM", "I-JEPA")
LOADERS = ("SimCLR", "SwAV 2x224 + 6x96")
PARTS = {  # a job's name to throughput.py's side and part, and the seconds that it usually takes
    "peak": ("ours", "peak", 20), "flops": ("ours", "flops", 30), "step": ("ours", "step", 60),
    "compile": ("ours", "step", 120), "lightly": ("lightly", "step", 60),
    "loader": ("ours", "data", 60),
}
CIFAR10 = {  # script, flags beyond its recipe
    "SimCLR": ["simclr"], "MoCo": ["moco"], "Barlow Twins": ["barlow_twins"], "SwAV": ["swav"],
    "DINO": ["dino"], "MAE": ["mae"], "DeepCluster v2": ["deepcluster_v2"],
    "NPID": ["npid_pirl", "--schedule", "cosine"],
    "PIRL": ["npid_pirl", "--method", "pirl", "--schedule", "cosine"],
}
PUBLISHED = {
    "SimCLR": "k-NN 84.8 / 87.9, linear 90.7", "MoCo": "k-NN 82.6 / 88.7, linear 92.9 (v2+)",
    "Barlow Twins": "k-NN 81.9 / 85.9, linear 92.1", "SwAV": "k-NN 84.2 / 88.4, linear 89.2",
    "DINO": "k-NN 81.3 / 84.8, linear 89.5", "DeepCluster v2": "linear 88.9",
}
SETTING = """Published, ResNet-18 with a small stem: k-NN (k 200), the best epoch on the test
images of 200 / 800 epochs at batch 512, by lightly (MoCo: by its authors' notebook); linear after
1,000 epochs at batch 256, by solo-learn, trained beside the backbone (MoCo: symmetric, larger
head). Ours: the last epoch; MAE is ViT-S/4, mean of patches."""
SMALL = {  # of a rehearsal
    "swav": ["--num-prototypes", 10], "dino": ["--num-outputs", 64],
    "dinov2": ["--num-outputs", 64], "ijepa": ["--patch-size", 4, "--predictor-dim", 96],
    "simmim": ["--patch-size", 4, "--cell-size", 8],
    "barlow_twins": ["--projector-dim", 64, "--embedding-dim", 64], "moco": ["--queue-length", 64],
    "mae": ["--decoder-dim", 64, "--decoder-depth", 1, "--decoder-heads", 4],
    "deepcluster_v2": ["--num-clusters", 10, 10],
}
STOPPING, EVALUATION = 30, 45  # seconds: at most to stop a run, usually for an evaluation


class Failed(Exception):
    """A job ended with an error or took too long."""


class OutOfTime(Exception):
    """The minutes are over: the job is for the next call."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/cuda"))
    parser.add_argument("--minutes", type=float, default=9.5, help="for this call")
    parser.add_argument("--only", nargs="+", metavar="JOB", default=[""],
                        help="those whose names start so, such as step compile/MAE cifar10/SimCLR")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--batch-size", type=int, help="of every step, instead of our choice")
    parser.add_argument("--epochs", type=int, help="of each CIFAR-10 run [100; small: 2]")
    parser.add_argument("--cifar-batch-size", type=int, help="instead of the recipes'")
    parser.add_argument("--slice", type=float, default=90, help="seconds of training between k-NN")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--small", action="store_true", help="a rehearsal")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (2 if args.small else 100)
    args.data = args.data.resolve()
    args.folder = args.folder.resolve() / ("small" if args.small else "full")
    end = time.monotonic() + 60 * args.minutes - 20  # seconds for the tables
    args.left = lambda: end - time.monotonic()
    args.pace = 0.3 if args.small else 1.0  # of all usual times
    return args


# ---------------------------------------------------------------------------- processes and records


def run(args, command: list, seconds: float, stops: bool = False) -> str:
    """Run one of our programs for so many seconds at most; what it printed.

    One that `stops` is asked to when they are over, and that is no failure.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=HERE.parent, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    try:
        try:
            printed, errors = process.communicate(timeout=max(1, min(seconds, args.left())))
        except subprocess.TimeoutExpired:
            if not stops:
                raise
            process.terminate()
            printed, errors = process.communicate(timeout=STOPPING)
    except subprocess.TimeoutExpired:
        late = args.left() < 1 and not stops
        raise OutOfTime if late else Failed(f"took more than {seconds:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        process.wait()
    if process.returncode not in (0, -signal.SIGTERM if stops else 0):  # SIGTERM: not yet listening
        raise Failed("\n".join((printed + errors).split("\n")[-6:]).strip())
    return printed


def last_json(printed: str) -> dict:
    return json.loads(printed.splitlines()[-1].removeprefix("RESULT "))


def path_of(args, name: str) -> Path:
    setting = f"-{args.epochs}-epochs" if name.startswith("cifar10/") else ""
    return args.folder / "results" / (re.sub(r"\W+", "-", name) + setting + ".json")


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record))
    os.replace(partial, path)


# -------------------------------------------------------------------------- a. to c.: throughput.py


def enlarge(source: Path, made: Path) -> None:
    """Save an image with sides of 256 to 500 px."""
    from PIL import Image

    rng = random.Random(made.name)
    size = (rng.randint(256, 500), rng.randint(256, 500))
    made.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(made, quality=90)


def large_jpegs(args) -> Path:
    """A temporary folder of enlarged CIFAR images, made when it is first asked for."""
    if not hasattr(args, "jpegs"):
        args.jpegs = tempfile.TemporaryDirectory(prefix="cuda-jpegs-")
        files = sorted((args.data / "train").glob("*/*"))
        count = 64 if args.small else 4096
        files = files[:: max(1, len(files) // count)][:count]
        made = [Path(args.jpegs.name, "train", file.parent.name, file.name) for file in files]
        with ProcessPoolExecutor(args.workers) as pool:
            list(pool.map(enlarge, files, made, chunksize=16))
    return Path(args.jpegs.name)


def divisor() -> int:
    """By how much batches must be smaller than on a card of 139 GB: a power of two."""
    import torch

    if not torch.cuda.is_available():
        return 1
    share = torch.cuda.get_device_properties(0).total_memory / 139e9
    return 2 ** max(0, math.ceil(-math.log2(share * 1.1)))


def measure(args, name: str) -> dict:
    """One figure, in a process of its own."""
    kind, _, title = name.partition("/")
    script, arch, batch, *flags = STEPS[title or "SimCLR"]
    side, part, usual = PARTS[kind]
    batch, size, workers, warmup, steps = args.batch_size or batch // divisor(), 224, 2, 5, 20
    if kind == "loader":  # every worker's first batch is not counted
        batch, workers, warmup, steps = 128, args.workers, args.workers, 3 * args.workers
    if kind == "compile":
        flags += ["--compile"]
    if args.small:
        arch = "vit_micro" if arch.startswith("vit") else "resnet_tiny"
        batch, size, warmup, steps = 8, 32, 1, 2
        flags += [*SMALL.get(script, []),
                  *(["--crop-sizes", 32, 16] if script in ("swav", "dino", "dinov2") else [])]
    if args.left() < usual * args.pace:
        raise OutOfTime
    found = last_json(run(args, [
        HERE / "throughput.py", script, "--measure", side, part, "--recipe", "imagenet",
        *(["--data", large_jpegs(args)] if title else []), "--arch", arch, "--image-size", size,
        "--batch-size", batch, "--amp", "bf16", "--peer-amp", "bf16", "--workers", workers,
        "--warmup", warmup, "--steps", steps, "--", *flags,
    ], 4 * usual))
    if "seconds" in found:
        found |= {"batch": batch, "images_per_second": steps * batch / found.pop("seconds")}
    return found


# ------------------------------------------------------------------------------------- d.: training


def commands(args, name: str, folder: Path) -> tuple[list, list]:
    """The flags of a training run, and those of its evaluations."""
    script, *flags = CIFAR10[name]
    evaluation = ["--checkpoint", folder, "--workers", args.workers]
    evaluation += ["--layers", "patches"] if script == "mae" else []
    if script == "swav" and args.epochs <= 50:
        flags += ["--queue-length", 0]  # it would start in epoch 50
    if args.epochs <= 11:
        flags += ["--warmup-epochs", 0]
    if args.cifar_batch_size:
        flags += ["--batch-size", args.cifar_batch_size]
    if args.small:
        evaluation += ["--limit", 256]
        flags += [*SMALL.get(script, []), "--arch", "vit_micro" if script == "mae" else
                  "resnet_tiny", "--limit", 256, "--batch-size", 16]
    training = [f"{script}.py", *flags, "--data", args.data, "--recipe", "cifar10", "--amp", "bf16",
                "--epochs", args.epochs, "--workers", args.workers, "--output", folder]
    return training, evaluation


def times(lines: list[dict], start: int, batch: int) -> tuple[int, float]:
    """Steps that the log has times of since `start`, without the first one, and their seconds."""
    steps, seconds = 0, 0.0
    lines = [line for line in lines if line["step"] > start]
    for before, line in itertools.pairwise(lines):
        steps += line["step"] - before["step"]
        seconds += (line["step"] - before["step"]) * batch / line["images_per_second"]
    return steps, seconds


def train_slice(args, training: list, folder: Path, result: dict) -> None:
    """Train for some time, and note in `result` how far that went."""
    seconds = min(args.slice, args.left() - STOPPING * args.pace)
    printed = run(args, training, seconds, stops=True)
    start, stop = (re.search(rf"^{word}.* at step (\d+)", printed, re.MULTILINE)
                   for word in ("resuming", "stopped"))
    result["finished"] = "\nfinished: " in printed
    if not (stop or result["finished"]):
        if seconds < args.slice:
            raise OutOfTime
        raise Failed(f"no step in {seconds:.0f} s: raise --slice")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    batch = read(folder / "run.json")["settings"]["batch_size"]
    timed = times(lines, int(start[1]) if start else 0, batch)
    result.update(step=int(stop[1]) if stop else lines[-1]["step"], epoch=lines[-1]["epoch"] + 1,
                  batch=batch, **{key: lines[-1][key] for key in ("memory_gb", "data_wait")},
                  timed=[a + b for a, b in zip(result["timed"], timed, strict=True)])


def train(args, name: str, result: dict) -> None:
    """Train and evaluate, a slice after another, as far as the time reaches."""
    folder = args.folder / "runs" / path_of(args, name).stem
    training, evaluation = commands(args, name.removeprefix("cifar10/"), folder)
    result.update({"step": 0, "finished": False, "timed": [0, 0.0], "curve": [], **result})
    while "linear" not in result:
        if args.left() < EVALUATION * args.pace:
            raise OutOfTime
        if result["step"] > (result["curve"][-1]["step"] if result["curve"] else 0):
            found = last_json(run(args, ["eval_knn.py", *evaluation, "--k", 200, "--temperature",
                                         0.1, "--shots"], 8 * EVALUATION))
            steps, seconds = result["timed"]
            result["curve"].append({
                "step": result["step"], "epoch": result["epoch"], "knn": found["top1"],
                "seconds": round(result["step"] * seconds / steps, 1) if steps else None,
            })
        elif result["finished"]:
            found = last_json(run(args, ["eval_linear.py", *evaluation], 8 * EVALUATION))
            result["linear"] = found["top1"]
        else:
            train_slice(args, training, folder, result)
        write(path_of(args, name), result)


# ----------------------------------------------------------------------------- the list, the tables


def all_jobs() -> list[str]:
    kinds = ("flops", "step", "compile", "lightly")
    return ["peak", *(f"{kind}/{title}" for title in STEPS for kind in kinds
                      if kind != "lightly" or title not in NO_PEER),
            *(f"loader/{title}" for title in LOADERS), *(f"cifar10/{name}" for name in CIFAR10)]


def work(args, name: str) -> str | None:
    """Do a job or go on with it, if there is something to do; what became of it."""
    result = read(path_of(args, name))
    if result.get("done") or ("failed" in result and not args.retry):
        return None
    result.pop("failed", None)
    try:
        if name.startswith("cifar10/"):
            train(args, name, result)
        else:
            result |= measure(args, name)
        result["done"] = True
    except OutOfTime:
        return "for the next call"
    except Failed as error:
        result["failed"] = str(error)
    write(path_of(args, name), result)
    return "done" if "done" in result else f"failed: {result['failed']}"


def table(columns: str, rows: list[list]) -> None:
    heads = columns.split(", ")
    for row in [heads, ["---"] * len(heads), *rows]:
        print("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |")
    print()


def share(part: float | None, whole: float | None, form: str = ".0%") -> str:
    return format(part / whole, form) if part and whole else ""


def print_tables(found: dict[str, dict]) -> None:
    """Print what is there; a cell that is not is empty."""
    def speed(kind, title):
        return found.get(f"{kind}/{title}", {}).get("images_per_second")

    peak = found.get("peak", {}).get("tflops")
    print(f"\na bf16 matrix product: {peak or 0:.4g} TFLOP/s\n")
    rows = []
    for name, result in found.items():
        kind, _, title = name.partition("/")
        if kind in ("step", "compile", "lightly") and "batch" in result:
            rate, gflop = speed(kind, title), found.get(f"flops/{title}", {}).get("gflop", 0)
            suffix = {"compile": ", compiled", "lightly": ", lightly"}.get(kind, "")
            rows.append([title + suffix, result["batch"], f"{rate:,.0f}",
                         f"{result.get('cuda_gb', 0):.1f}", f"{gflop:.1f}",
                         f"{rate * gflop / 1e3:.4g}", share(rate * gflop / 1e3, peak),
                         share(rate, speed("lightly", title), ".2f")])
    table("step, batch, img/s, GPU GB, GFLOP an image, TFLOP/s, of the peak, over lightly", rows)
    table("loader, img/s, of the step's rate, of the compiled step's", [
        [title, f"{rate:,.0f}", share(rate, speed("step", title)),
         share(rate, speed("compile", title))]
        for title in LOADERS if (rate := speed("loader", title))
    ])
    rows = []
    for name in CIFAR10:
        result = found.get(f"cifar10/{name}", {})
        if result.get("curve"):
            steps, seconds = result["timed"]
            reached = [next((point["seconds"] for point in result["curve"] if point["knn"] >= goal),
                            None) for goal in (0.85, 0.9)]
            newest = result["curve"][-1]
            rows.append([name, newest["epoch"], share(steps * result["batch"], seconds, ",.0f"),
                         newest["seconds"], f"{100 * newest['knn']:.1f}", *reached,
                         share(100 * result.get("linear", 0), 1, ".1f"), PUBLISHED.get(name)])
    table("CIFAR-10, epochs, img/s, training s, k-NN, s to 85 %, s to 90 %, linear, published",
          rows)
    print(SETTING)
    for name, result in found.items():
        if "failed" in result:
            print(f"failed: {name}: {result['failed'].splitlines()[-1]}")


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `run` then ends its process
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    no_peer = importlib.util.find_spec("lightly") is None
    for name in all_jobs():
        skipped = (no_peer and name.startswith("lightly")
                   or args.small and name.startswith("compile") and "SimCLR" not in name)
        if name.startswith(tuple(args.only)) and not skipped and (outcome := work(args, name)):
            print(f"{time.strftime('%H:%M:%S')}  {name}: {outcome}", flush=True)
    found = {name: result for name in all_jobs() if (result := read(path_of(args, name)))}
    print_tables(found)

    import throughput
    import torch
    import torchvision

    summary = {
        "benchmark": "cuda", "date": time.strftime("%Y-%m-%d"),
        "machine": throughput.machine_name(), "cores": len(os.sched_getaffinity(0)),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__,
                     "cuda": torch.version.cuda, "python": platform.python_version()},
        "small": args.small, "cifar10_epochs": args.epochs, "results": found,
    }
    write(args.folder / "summary.json", summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(parse_args())
