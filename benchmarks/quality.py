"""What every method learns from 10,000 images of CIFAR-10, beside lightly's at equal settings.

    python benchmarks/quality.py --data /path/to/cifar10-jpegs --folder runs/quality
    python benchmarks/quality.py --data /path/to/cifar10-jpegs --epochs 40 --only simclr moco

The data folder holds train/<class>/ and test/<class>/. Trained on the first 1,000 training files of
each class by name, tested on the first 200 test files: k-NN, five and one labels a class, linear.
Runs that are finished are not repeated, and ours resume in the middle: give the same command again
after an interruption. Where the two code bases differ by more than a point, a second seed follows
on both sides (--seeds: that many of each, always). Prints one table, beside the pixels and
untrained backbones, and a JSON object last.

Equal are backbone, start values of it, the law of the views, head sizes, batch, precision,
optimiser, schedule and epochs: lightly's side has lightly's views, modules, losses and moving
averages, and our LARS, LARC, clipping and schedules. What stays each code's own: start values and
biases of the heads, and that lightly passes every view through the network alone where our SimCLR,
SwAV and DINO pass views of a size together, so that batch norm sees both. Without `lightly`
installed, or with --peer none, only our runs are made.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
MEAN_STD = ["--mean", "0.4914", "0.4822", "0.4465", "--std", "0.247", "0.2435", "0.2616"]
RESNET = ["--arch", "resnet18_quarter", "--stem", "small"]
CLUSTERS = ["--lr", "2", "--final-lr", "0.002", "--crop-scales", "0.14", "1",
            "--jitter-strength", "0.5"]
VIT = ["--arch", "vit_micro", "--num-crops", "2", "4", "--crop-sizes", "32", "16", "--crop-scales",
       "0.3", "1", "0.1", "0.3", "--momentum", "0.99", "--lr", "1e-3", "--warmup-epochs", "1"]
METHODS = {  # our script, and what it is given beyond the cifar10 recipe for so short a run
    "SimCLR": ["simclr", *RESNET, "--warmup-epochs", "1"],
    "MoCo v2": ["moco", *RESNET, "--warmup-epochs", "1", "--lr", "0.12", "--mlp-head",
                "--bn-groups", "1"],  # lightly has no shuffled batch norm
    "DenseCL": ["densecl", *RESNET, "--warmup-epochs", "1", "--lr", "0.12", "--bn-groups", "1",
                "--dense-warmup-steps", "200"],
    "MoCo v3": ["moco_v3", *RESNET, "--warmup-epochs", "1", "--lr", "2", "--hidden-dim", "1024",
                "--momentum", "0.99"],
    "SimSiam": ["simsiam", *RESNET, "--warmup-epochs", "1", "--projector-dim", "1024",
                "--embedding-dim", "1024", "--predictor-dim", "256"],
    "BYOL": ["byol", *RESNET, "--warmup-epochs", "1", "--lr", "2", "--projector-dim", "1024",
             "--predictor-dim", "1024"],
    "SwAV": ["swav", *RESNET, *CLUSTERS, "--warmup-epochs", "1", "--num-prototypes", "100",
             "--freeze-prototypes-epochs", "1", "--queue-length", "0"],
    "DINO": ["dino", *RESNET, "--warmup-epochs", "1"],
    "Barlow Twins": ["barlow_twins", *RESNET, "--warmup-epochs", "1", "--lr", "1",
                     "--lr-biases", "0.005", "--projector-dim", "1024", "--embedding-dim", "1024"],
    "VICReg": ["vicreg", *RESNET, "--warmup-epochs", "1", "--lr", "1", "--projector-dim", "1024",
               "--embedding-dim", "1024"],
    "LeJEPA": ["lejepa", *RESNET, "--warmup-epochs", "1"],
    "DeepCluster v2": ["deepcluster_v2", *RESNET, *CLUSTERS, "--warmup-epochs", "1",
                       "--num-clusters", "100", "100", "100"],
    "NPID": ["npid_pirl", *RESNET, "--warmup-epochs", "1", "--lr", "0.12", "--schedule", "cosine"],
    "PIRL": ["npid_pirl", "--method", "pirl", *RESNET, "--warmup-epochs", "1", "--lr", "0.12",
             "--schedule", "cosine"],
    "Rotation": ["pretext", *RESNET, "--warmup-epochs", "1"],
    "Jigsaw": ["pretext", "--task", "jigsaw", *RESNET, "--warmup-epochs", "1"],
    "Relative location": ["pretext", "--task", "location", *RESNET, "--warmup-epochs", "1"],
    "DeepCluster": ["deepcluster_odc", *RESNET, "--warmup-epochs", "1", "--lr", "0.4",
                    "--top-lr-scale", "10", "--num-clusters", "100"],
    "ODC": ["deepcluster_odc", "--method", "odc", *RESNET, "--warmup-epochs", "1", "--lr", "0.4",
            "--num-clusters", "100"],
    "DINO ViT": ["dino", *VIT, "--optimizer", "adamw", "--no-bn-in-head", "--hidden-dim", "1024",
                 "--bottleneck-dim", "128", "--num-outputs", "4096", "--weight-decay", "0.04",
                 "--final-weight-decay", "0.2"],
    "DINOv2": ["dinov2", *VIT, "--drop-path", "0"],
    "iBOT": ["dinov2", "--method", "ibot", *VIT, "--drop-path", "0", "--koleo-weight", "0"],
    "I-JEPA": ["ijepa", "--arch", "vit_micro", "--predictor-dim", "96", "--predictor-depth", "2",
               "--warmup-epochs", "1", "--lr", "2e-3"],
    "SimMIM": ["simmim", "--arch", "vit_micro", "--drop-path", "0", "--warmup-epochs", "1",
               "--lr", "1e-3"],
    "MAE": ["mae", "--arch", "vit_micro", "--decoder-dim", "96", "--decoder-depth", "2",
            "--decoder-heads", "3", "--warmup-epochs", "1", "--lr", "1e-3"],
    "CAE": ["cae", "--arch", "vit_micro", "--regressor-depth", "2", "--decoder-depth", "2",
            "--drop-path", "0", "--warmup-epochs", "1", "--lr", "2e-3"],
}
TRANSFORMERS = {  # and the layer that is evaluated
    "MAE": "patches", "SimMIM": "patches", "CAE": "patches", "I-JEPA": "patches",
    "DINO ViT": "cls", "DINOv2": "cls", "iBOT": "cls",
}
PEERS = (
    "SimCLR", "MoCo v2", "MoCo v3", "SimSiam", "BYOL", "SwAV", "DINO", "Barlow Twins", "VICReg",
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--amp", choices=["bf16", "none"], default="bf16")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these methods or scripts")
    parser.add_argument("--peer", choices=["lightly", "none"], default="lightly")
    parser.add_argument("--images", type=int, nargs=2, default=[1000, 200],
                        metavar=("TRAIN", "TEST"), help="of each class")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each run")
    parser.add_argument("--seeds", type=int, help="so many of every method and side; by default "
                        "a second one where the two sides differ by more than a point")
    parser.add_argument("--minutes", type=float, default=40, help="at most, for one run")
    parser.add_argument("--train-lightly", nargs=3, metavar=("NAME", "SEED", "OUTPUT"),
                        help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def subset(args) -> Path:
    """The folder of links to the first files of each class by name, made if it is not there."""
    train, test = args.images
    made = args.folder / f"images-{train}-{test}-a-class"
    for split, count in (("train", train), ("test", test)):
        for group in sorted(p for p in (args.data / split).iterdir() if p.is_dir()):
            place = made / split / group.name
            place.mkdir(parents=True, exist_ok=True)
            for file in sorted(group.iterdir())[:count]:
                link = place / file.name
                if not link.is_symlink():
                    link.symlink_to(file.resolve())
    return made


def flags(args, name: str, seed: int, output: Path) -> list[str]:
    """The command line of our script; lightly's run takes its settings from the same."""
    return [
        *METHODS[name][1:], "--data", str(subset(args)), "--recipe", "cifar10",
        "--epochs", str(args.epochs), "--batch-size", str(args.batch_size), "--amp", args.amp,
        "--seed", str(seed), "--workers", str(args.workers), "--output", str(output), *MEAN_STD,
    ]


# ------------------------------------------------------------------------------------ lightly's run


def make_optimizer(script: str, args, model, steps_per_epoch: int):
    """The optimiser of our script over lightly's model, and its rate at every step."""
    import torch

    from common import optim

    lr, scale = args.lr * args.batch_size / 256, args.batch_size / 256
    same = dict(lr=lr, momentum=0.9, weight_decay=args.weight_decay)
    weights, others = optim.split_by_dimension(model)
    if script == "moco":
        optimizer = torch.optim.SGD([*weights, *others], **same)
    elif script == "simsiam":
        predictor = [*model.predictor.parameters()]
        ids = {id(p) for p in predictor}
        rest = [p for p in (*weights, *others) if id(p) not in ids]
        optimizer = torch.optim.SGD([{"params": rest}, {"params": predictor}], **same)
    elif script == "dino":
        optimizer = torch.optim.SGD([{"params": weights}, {"params": others, "weight_decay": 0.0}],
                                    **same)
    elif script == "swav":
        optimizer = optim.LARC([*weights, *others], trust_coefficient=0.001, **same)
    else:
        plain = {"params": others, "decay": False, "adapt": False}
        optimizer = optim.LARS([{"params": weights}, plain], trust_coefficient=0.001, **same)
    if script == "barlow_twins":
        optimizer.param_groups[1]["lr_scale"] = args.lr_biases / args.lr
    if script in ("moco", "simsiam"):
        schedule = getattr(args, "schedule", "cosine")
        return optimizer, optim.lr_by_epoch(lr, schedule, args.epochs, args.warmup_epochs,
                                            steps_per_epoch)
    return optimizer, optim.warmup_cosine(
        start=getattr(args, "start_lr", 0.0) * scale, base=lr,
        final=0.001 * lr if script in ("barlow_twins", "vicreg")
        else getattr(args, "final_lr", 0.0) * scale,
        warmup_steps=args.warmup_epochs * steps_per_epoch,
        total_steps=args.epochs * steps_per_epoch, warmup_endpoint=script in ("swav", "dino"),
    )


def autocast(module, device: str):
    """Let a module compute in bf16 and give float32, as ours do before every loss."""
    import torch

    plain = module.forward

    def forward(x):
        with torch.autocast(device, torch.bfloat16):
            return plain(x).float()

    module.forward = forward


def train_lightly(script: str, settings, workers: int):
    """Train lightly's method at the settings of our script and save its backbone."""
    import peers
    import torch

    from common import optim
    from dino import clip_per_parameter

    cuda = torch.cuda.is_available() and settings.device != "cpu"
    device = "cuda" if cuda else "cpu"
    method = peers.LIGHTLY[script](settings)
    if script in ("simclr", "byol", "barlow_twins", "vicreg", "dino"):
        peers.crop_bicubic(method.transform)
    loader = peers.make_loader(settings.data, method.transform, settings.batch_size, workers, cuda)
    torch.manual_seed(settings.seed)
    model = method.build().to(device)
    if settings.amp == "bf16":
        for part in model.modules():
            if isinstance(part, peers.Embedder):
                autocast(part.backbone, device)
                autocast(getattr(part.head, "layers", part.head), device)
            if isinstance(part, peers.Siamese):
                autocast(part.predictor, device)
    trained = model.student if script == "dino" else model
    optimizer, lr_of_step = make_optimizer(script, settings, trained, len(loader))
    step = 0
    for epoch in range(settings.epochs):
        for views, *_ in loader:
            optim.set_lr(optimizer, lr_of_step[step])
            if script == "simsiam" and settings.fix_predictor_lr:
                optimizer.param_groups[1]["lr"] = settings.lr * settings.batch_size / 256
            loss = method.step(model, [view.to(device) for view in views], step / len(lr_of_step))
            optimizer.zero_grad()
            loss.backward()
            if script == "dino":
                clip_per_parameter(trained, settings.clip_per_parameter)
                trained.head.cancel_last_layer_gradients(epoch)
            optimizer.step()
            step += 1
        print(f"epoch {epoch + 1}/{settings.epochs}  loss {loss.item():.4f}", flush=True)
    print("finished")
    product = model.teacher if script == "dino" else model
    torch.save(product.backbone.state_dict(), Path(settings.output) / "backbone.pth")


# ----------------------------------------------------------------------------- the list, one by one


def run(args, command: list, log: Path | None = None) -> str:
    """Run a script to its end with this run's share of the cores; what it printed."""
    threads = max(1, len(os.sched_getaffinity(0)) // args.at_once)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    title = " ".join(map(str, command))
    with open(log or os.devnull, "w") as errors:
        try:
            done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE.parent, text=True,
                                  env=environment, stdout=subprocess.PIPE, stderr=errors,
                                  timeout=60 * args.minutes)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{title}\ntook more than {args.minutes:g} minutes (our scripts go on "
                             "at the same command, lightly's run starts anew)") from None
    if done.returncode:
        raise SystemExit(f"{title} failed; {log or ''}\n{done.stdout}")
    return done.stdout


def evaluate(args, checkpoints: list, extra: list) -> list[dict]:
    """k-NN and linear results of each checkpoint."""
    shared = ["--data", subset(args), "--image-size", "32", "--in-chans", "3", *MEAN_STD,
              "--checkpoint", *checkpoints, *extra, "--workers", args.workers]
    knn, linear = (json.loads(run(args, [script, *shared]).splitlines()[-1])["checkpoints"]
                   for script in ("eval_knn.py", "eval_linear.py"))
    return [{"knn": a["top1"], "five": a["shots"]["5"]["mean"], "one": a["shots"]["1"]["mean"],
             "linear": b["top1"]} for a, b in zip(knn, linear, strict=True)]


def baselines(args) -> dict:
    kept = subset(args).with_suffix(".baselines.json")
    if not kept.exists():
        pixels, random = evaluate(args, ["pixels", "random"], RESNET)
        vit = ["--arch", "vit_micro", "--patch-size", "4", "--layers", "patches"]
        found = {"pixels": pixels, "random (ResNet)": random,
                 "random (transformer)": evaluate(args, ["random"], vit)[0]}
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def folder_of(args, name: str, side: str, seed: int) -> Path:
    title = f"{name.lower().replace(' ', '-')}-{args.epochs}-epochs-seed-{seed}"
    return args.folder / (title if side == "ours" else f"lightly-{title}")


def result(args, name: str, side: str, seed: int) -> dict:
    """Train and evaluate one run, unless that is done."""
    output = folder_of(args, name, side, seed)
    kept, given = output / "result.json", flags(args, name, seed, output)
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["flags"] != given:
            raise SystemExit(f"{output} was made with other settings; name another --folder")
        return found
    output.mkdir(parents=True, exist_ok=True)
    again, started = (output / "checkpoint.pt").exists(), time.perf_counter()
    if side == "ours":
        command = [f"{METHODS[name][0]}.py", *given]
        weights, extra = output, []
    else:
        command = ["benchmarks/quality.py", *shared_flags(args), "--train-lightly", name, seed,
                   output]
        weights, extra = output / "backbone.pth", RESNET
    if "finished" not in run(args, command, output / "errors.log"):
        raise SystemExit(f"{output}: stopped before the end")
    seconds = None if again else round(time.perf_counter() - started)
    layers = ["--layers", TRANSFORMERS[name]] if name in TRANSFORMERS else []
    found = {**evaluate(args, [weights], [*extra, *layers])[0], "seconds": seconds, "flags": given}
    kept.write_text(json.dumps(found))
    print(f"{name:15} {side:8} seed {seed}  k-NN {found['knn']:.3f}  linear {found['linear']:.3f}  "
          f"{seconds} s", flush=True)
    return found


def shared_flags(args) -> list[str]:
    """What a process of its own needs to know to train lightly's method."""
    train, test = map(str, args.images)
    return ["--data", str(args.data), "--folder", str(args.folder), "--images", train, test,
            "--epochs", str(args.epochs), "--batch-size", str(args.batch_size), "--amp", args.amp,
            "--workers", str(args.workers)]


def main(args):
    args.folder, args.data = args.folder.resolve(), args.data.resolve()
    subset(args)
    names = [n for n in METHODS if not args.only or {n, METHODS[n][0]} & {*args.only}]
    paired = [name for name in names if name in PEERS and args.peer == "lightly"]
    with ThreadPoolExecutor(args.at_once) as pool:
        def results(jobs):
            return dict(zip(jobs, pool.map(lambda job: result(args, *job), jobs), strict=True))

        def both(names, seed):
            return [(name, side, seed) for name in names
                    for side in ("ours", "lightly")[: 1 + (name in paired)]]

        found = results([job for seed in range(args.seeds or 1) for job in both(names, seed)])
        if not args.seeds:
            found |= results(both([
                name for name in paired
                if abs(found[name, "ours", 0]["knn"] - found[name, "lightly", 0]["knn"]) > 0.01
            ], 1))
        base = baselines(args)
    columns = ("knn", "five", "one", "linear")
    print("\n| | seeds | k-NN | 5 labels a class | 1 label a class | linear | s a run |")
    print("|---|---|---|---|---|---|---|")
    for name, row in base.items():
        print(f"| {name} | | " + " | ".join(f"{100 * row[c]:.1f}" for c in columns) + " | |")
    for name in names:
        for side in ("ours", "lightly"):
            rows = [row for (n, s, _), row in found.items() if (n, s) == (name, side)]
            if rows:
                means = [sum(row[c] for row in rows) / len(rows) for c in columns]
                seconds = [row["seconds"] for row in rows if row["seconds"]]
                title = name if side == "ours" else f"{name}, lightly"
                print(f"| {title} | {len(rows)} | "
                      + " | ".join(f"{100 * mean:.1f}" for mean in means)
                      + f" | {max(seconds, default=''):} |")
    import torch

    print(json.dumps({
        "benchmark": "quality", "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "setting": {key: str(value) for key, value in vars(args).items()},
        "baselines": base,
        "results": [{"method": name, "side": side, "seed": seed, **row}
                    for (name, side, seed), row in found.items()],
    }))


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.train_lightly:
        import importlib

        method, number, place = arguments.train_lightly
        script = METHODS[method][0]
        command_line = flags(arguments, method, int(number), Path(place))
        train_lightly(script, importlib.import_module(script).parse_args(command_line),
                      arguments.workers)
    else:
        main(arguments)
