"""Train every method on the built-in digits, and evaluate all of them.

    python benchmarks/digits_table.py --folder runs/digits

Some 40 minutes on two cores. Runs that are finished are not repeated: give the same command again
after an interruption. Prints one table and, last, one JSON object; the baselines are the pixels and
untrained backbones of the same kind.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # name: script and flags
    "SimCLR": ["simclr.py"],
    "SimCLR, multi-crop": ["simclr_multicrop.py"],
    "MoCo v2": ["moco.py"],
    "DenseCL": ["densecl.py"],
    "MoCo v3": ["moco_v3.py"],
    "NPID": ["npid_pirl.py"],
    "PIRL": ["npid_pirl.py", "--method", "pirl"],
    "DeepCluster": ["deepcluster_odc.py"],
    "ODC": ["deepcluster_odc.py", "--method", "odc"],
    "DeepCluster v2": ["deepcluster_v2.py"],
    "SwAV": ["swav.py"],
    "SimSiam": ["simsiam.py"],
    "BYOL": ["byol.py"],
    "DINO": ["dino.py"],
    "DINOv2": ["dinov2.py"],
    "iBOT": ["dinov2.py", "--method", "ibot", "--koleo-weight", "0"],
    "Barlow Twins": ["barlow_twins.py"],
    "VICReg": ["vicreg.py"],
    "LeJEPA": ["lejepa.py"],
    "MAE": ["mae.py"],
    "SimMIM": ["simmim.py"],
    "I-JEPA": ["ijepa.py"],
    "CAE": ["cae.py"],
    "Rotation": ["pretext.py"],
    "Jigsaw": ["pretext.py", "--task", "jigsaw"],
    "Relative location": ["pretext.py", "--task", "location"],
}
TRANSFORMERS = {  # and the layer that is evaluated
    "DINOv2": "cls", "iBOT": "cls", "MAE": "patches", "SimMIM": "patches", "I-JEPA": "patches",
    "CAE": "patches",
}
EVALUATIONS = {  # and their flags
    "knn": [], "linear": [], "svm": ["--costs", "0.1", "1", "10", "--low-shot", "1"],
    "retrieval": [],
}


def run(command, processes=1):
    """Run a script of the repository to its end; all that it printed."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone",
                     f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    if processes > 1:
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, env=environment, text=True,
                          capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def train(folder: Path, processes: int) -> dict:
    """Seconds that each method took; of earlier commands where it was finished already."""
    seconds = {}
    for name, command in METHODS.items():
        output = folder / name.lower().replace(",", "").replace(" ", "-")
        noted = output / f"seconds-{processes}.json"
        if not noted.exists():
            started = time.perf_counter()
            run([*command, "--output", output, "--no-resume"], processes)
            noted.write_text(json.dumps(round(time.perf_counter() - started, 1)))
        seconds[name] = json.loads(noted.read_text())
        print(f"{name}: trained in {seconds[name]} s", flush=True)
    return seconds


def evaluate(folder: Path) -> dict:
    """Results by name, then by evaluation."""
    groups = [(None, ["pixels", "random"], [n for n in METHODS if n not in TRANSFORMERS])]
    groups += [(layer, ["random"], [name]) for name, layer in TRANSFORMERS.items()]
    found = {}
    for layer, baselines, names in groups:
        runs = [folder / name.lower().replace(",", "").replace(" ", "-") for name in names]
        suffix = f" ({names[0]}'s, {layer})" if layer else ""  # each has an untrained twin
        titles = [b if b == "pixels" else f"random{suffix or ' (ResNet)'}" for b in baselines]
        for kind, flags in EVALUATIONS.items():
            layers = ["--layers", layer] if layer else []
            printed = run([f"eval_{kind}.py", "--checkpoint", *baselines, *runs, *flags, *layers])
            rows = json.loads(printed.splitlines()[-1])["checkpoints"]
            for name, row in zip([*titles, *names], rows, strict=True):
                found.setdefault(name, {})[kind] = row
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/digits"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seconds = train(folder, args.processes)
    found = evaluate(folder)
    print("\n| | training, s | k-NN | 5 labels a class | 1 label a class | linear | "
          "SVM, mAP | retrieval, mAP |")
    print("|---|---|---|---|---|---|---|---|")
    for name, results in found.items():
        knn, linear, svm, retrieval = (results[kind] for kind in EVALUATIONS)
        few = [f"{knn['shots'][s]['mean']:.3f} ±{knn['shots'][s]['std']:.3f}" for s in ("5", "1")]
        print(f"| {name} | {seconds.get(name, ''):} | {knn['top1']:.3f} | {few[0]} | {few[1]} | "
              f"{linear['top1']:.3f} | {svm['map']:.3f} | {retrieval['map']:.3f} |")
    print(json.dumps({
        "benchmark": "digits_table", "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "processes": args.processes, "seconds": seconds, "results": found,
    }))


if __name__ == "__main__":
    main()
