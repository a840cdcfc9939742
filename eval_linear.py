"""Linear classification of frozen features: the probes of the papers, and one that needs no tuning.

The backbone is in eval mode and nothing of it is trained: its hash is printed before and after.

`--protocol auto`, the default, takes the features of one central view of every image:
1. Standardise them by the mean and deviation of the training images, and turn them to their
   principal axes, along which the steps of 2. are known to be short or long.
2. For many weight decays at once, minimise cross-entropy + decay / 2 |W|^2 on all training images
   but a fifth, for each fifth in turn (only the first one beyond 20,000 images), by L-BFGS on all
   images together: one matrix product serves all heads, and there is no learning rate to choose.
3. Take the decay, and of several `--layers` the layer, that is right most often on the images left
   out; train once more on all training images; count on the test images.
It takes seconds to minutes and saves nothing on the way: the same command gives the same numbers.
Keep the features of a large data set with `--save-features`.

The other protocols are the papers': the heads are trained by SGD on new random crops in every
epoch, with the published numbers (`PROTOCOLS`). They stop, save and resume as the methods do. Two
things differ from the public code of MoCo, SwAV, Barlow Twins, DINO and MAE: the last epoch counts
here, there the one that is best on the test images; and a short last batch of an epoch is left out
here, there (but in MAE) it is trained on.

Nothing is chosen on the test images. `--train-fraction 0.01` takes so many training images, as
equally many of every class as there are.

Letters: N images, H heads, C classes, D feature size.

    python eval_linear.py --checkpoint pixels random runs/simclr-digits-resnet_tiny
    python eval_linear.py --checkpoint runs/simclr --data /path/to/imagenet --train-fraction 0.01
    torchrun --nproc_per_node=8 eval_linear.py --protocol dino --checkpoint runs/dino --data in1k
"""

import argparse
import hashlib
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, cli, dist, features, optim, solver
from common.training import Training

# lr: per 256 images, at the published batch size. schedule: milestones, where it is multiplied by
# 0.1; "epochs" is a cosine to 0 that moves once an epoch, "steps" one that moves every step. norm:
# batch norm before the linear layer, over all processes. init: of the linear layer's weights.
COLUMNS = ("optimizer", "lr", "weight_decay", "batch_size", "epochs", "schedule", "warmup_epochs",
           "norm", "init", "crop", "resize")
PROTOCOLS = {name: dict(zip(COLUMNS, row, strict=True)) for name, *row in (
    # He et al., arXiv 1911.05722, section 4.1; facebookresearch/moco, main_lincls.py
    ("moco", "sgd", 30.0, 0.0, 256, 100, [60, 80], 0, "none", "normal", "bilinear", "bilinear"),
    # Caron et al., arXiv 2006.09882, appendix; facebookresearch/swav, eval_linear.py. Its std has
    # .228 for .229, as in its pre-training; released weights want `--std 0.228 0.224 0.225`.
    ("swav", "sgd", 0.3, 1e-6, 256, 100, "epochs", 0, "none", "normal", "bilinear", "bilinear"),
    # Zbontar et al., arXiv 2103.03230, appendix; facebookresearch/barlowtwins, evaluate.py
    ("barlow_twins", "sgd", 0.3, 1e-6, 256, 100, "epochs", 0, "none", "normal", "bilinear",
     "bilinear"),
    # Chen et al., arXiv 2002.05709, appendix B.6
    ("simclr", "nesterov", 0.1, 0.0, 4096, 90, "steps", 0, "none", "zero", "bicubic", "bicubic"),
    # Caron et al., arXiv 2104.14294, appendix F; facebookresearch/dino, eval_linear.py. Narrow
    # transformers: class tokens of the last four blocks; from width 768 on: last one, mean patch.
    ("dino", "sgd", 0.001, 0.0, 1024, 100, "epochs", 0, "none", "normal", "bilinear", "bicubic"),
    # He et al., arXiv 2111.06377, appendix A.1; facebookresearch/mae, main_linprobe.py. Its random
    # crop tries once where ours tries ten times; its batch norm is of each GPU's own 512 images; it
    # runs in fp16. ViT-L and ViT-H: 50 epochs, 10 of them warm-up (`--epochs 50` here: 5.6).
    ("mae", "lars", 0.1, 0.0, 16384, 90, "steps", 10, "plain", "truncated", "bicubic", "bicubic"),
    # Goyal et al., arXiv 1905.01235; VISSL, eval_resnet_8gpu_transfer_in1k_linear: one head on each
    # of the pooled maps conv1 to res5 and two on the mean of res5, without batch norm and, which
    # counts, with it; no weight decay on the batch norm.
    ("vissl", "nesterov", 0.01, 5e-4, 256, 28, [8, 16, 24], 0, "affine", "torch", "bilinear",
     "bilinear"),
)}
DECAYS = [float(f"{10 ** (half / 2 - 6):.1e}") for half in range(13)]  # 1e-6, 3.2e-6, ... 1
AUTO_ONLY = ("weight_decays", "folds", "features", "save_features")
PAPERS_ONLY = ("epochs", "train_batch_size", "lr", "flip")
NOT_MIRRORED = ("digits", "mnist", "svhn")  # a mirrored digit is another sign
MANY_IMAGES = 20_000  # from here on, one fifth left out tells enough
PLAIN = "-mlp"  # behind a layer's name: its head has no batch norm; VISSL's name for such a head


def parse_args(argv=None):
    parser = features.parser(__file__, __doc__)
    group = parser.add_argument_group("protocol")
    group.add_argument("--protocol", choices=("auto", *PROTOCOLS), default="auto",
                       help="how the linear layer is trained")
    group.add_argument("--train-fraction", type=cli.share, default=1.0, metavar="SHARE",
                       help="class-balanced fraction of the training images")
    group = parser.add_argument_group("auto")
    group.add_argument("--weight-decays", type=cli.positive, nargs="+",
                       help="weight decays to choose from [1e-6 to 1]")
    group.add_argument("--folds", type=cli.count,
                       help="parts of the training images, each left out in turn [5]")
    group = parser.add_argument_group("protocols of the papers (default: as published)")
    group.add_argument("--epochs", type=cli.count, help="passes; milestones and warm-up scale")
    group.add_argument("--train-batch-size", type=cli.count, metavar="N",
                       help="images a step over all processes; the largest power of two there is "
                       "where there are fewer images than published")
    group.add_argument("--lr", type=cli.positive, help="learning rate per 256 images")
    group.add_argument("--flip", action=cli.Switch, help="mirror half of the crops; default: yes, "
                       "but for images of digits")
    group.add_argument("--output", metavar="FOLDER", default="runs/eval_linear",
                       help="parent of the folders of the probes")
    group.add_argument("--resume", action=cli.Switch, default=True,
                       help="go on from the checkpoint in the folder, where there is one")
    group.add_argument("--save-every-minutes", type=cli.positive, default=15.0, metavar="M",
                       help="save within an epoch as well")
    group.add_argument("--log-every", type=cli.count, default=20, metavar="STEPS",
                       help="steps between two log lines")
    args = features.parse(parser, argv)
    for name in PAPERS_ONLY if args.protocol == "auto" else AUTO_ONLY:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} does not go with --protocol {args.protocol}")
    args.folds, args.weight_decays = args.folds or 5, args.weight_decays or DECAYS
    if args.train_fraction == 0:
        parser.error("--train-fraction 0 leaves no image to train on")
    if args.folds < 2:
        parser.error(f"--folds {args.folds}: at least 2")
    if args.train_batch_size and args.train_batch_size % cli.processes():
        parser.error(f"--train-batch-size {args.train_batch_size} does not divide among "
                     f"{cli.processes()} processes")
    return args


def class_balanced(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Rows of a share of the images, as equally many of every class as there are; rising.

    A smaller share is part of a larger one. There is at least one image of every class.
    """
    if fraction == 1:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    members = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    order = rng.permutation(len(classes))  # who gets one of what does not divide
    wanted, taken = max(round(fraction * len(labels)), len(classes)), []
    for turn in range(max(len(rows) for rows in members)):
        for c in order:
            if turn < len(members[c]):
                taken.append(members[c][turn])
        if len(taken) >= wanted:
            break
    return np.sort(np.array(taken[:wanted]))


# --------------------------------------------------------------------------------------------- auto


def assign_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold (N,) for every image; each has equally many of every class, or one more."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def top_1_and_5(logits: Tensor, truth: Tensor) -> Tensor:
    """Whether the true class is the best and among the best five: (N, 2) of (N, C) and (N,)."""
    return torch.stack([features.share_right(logits, truth, min(k, logits.shape[1]))
                        for k in (1, 5)], dim=1)


def auto_probe(
    train, labels, test, truth, *, decays: list[float], folds: int, num_classes: int, seed: int,
    world: dist.World,
) -> dict:
    """Choose a weight decay on the training rows, train on all of them, count on the test rows.

    Args:
        train: (N, D) and test: (M, D) on the CPU; every process has them and takes its part.
        labels: int64 (N,). truth: int64 (M,).
    """
    # 1. Standardise. On the CPU in float64, so that no sum's order decides near a border
    dtype = torch.float64 if world.device.type == "cpu" else torch.float32
    mean, scale = solver.standardisation(train)

    def local(rows, numbers):
        """This process's part, its standardised rows and its labels."""
        part = slice(*(len(rows) * r // world.size for r in (world.rank, world.rank + 1)))
        x = rows[part].to(world.device, dtype, copy=True)
        x.sub_(mean.to(x)).mul_(scale.to(x))
        return part, x, torch.from_numpy(numbers[part]).to(world.device)

    part, x, y = local(train, labels)
    axes, variances = solver.principal_axes(x, len(labels))
    x = x @ axes.to(x)

    # 2. Many heads: every weight decay, with every fold left out
    folds = min(folds, len(labels))
    fold = torch.from_numpy(assign_folds(labels, folds, seed))
    held_out = range(1 if len(labels) > MANY_IMAGES else folds)
    heads = [(decay, out) for decay in decays for out in held_out]
    used = torch.stack([fold != out for _, out in heads], dim=1)  # (N, H)
    shares = (used.double() / used.sum(0))[part].to(x)
    points = solver.fit(x, y, shares, x.new_tensor([d for d, _ in heads]), variances, num_classes)

    # 3. The best of them; once more on all training images
    unused = ~used[part].to(world.device)
    correct = torch.zeros(len(heads), dtype=torch.float64, device=world.device)
    for start, logits in solver.iter_logits(points, x, num_classes):
        rows = slice(start, start + len(logits))
        truths = y[rows, None].expand(-1, len(heads))
        correct += (features.share_right(logits, truths, 1) * unused[rows]).sum(0)
    correct = dist.sum_over_processes(correct).view(len(decays), -1).sum(1)
    accuracy = correct / (~used).sum(0)[: len(held_out)].sum().item()
    validation, decay = max(zip(accuracy.tolist(), decays, strict=True))  # a tie: the largest decay
    shares = x.new_full((len(x), 1), 1 / len(labels))
    points = solver.fit(x, y, shares, x.new_tensor([decay]), variances, num_classes)

    _, x, y = local(test, truth)
    x = x @ axes.to(x)
    correct = torch.zeros(2, dtype=torch.float64, device=world.device)
    for start, logits in solver.iter_logits(points, x, num_classes):
        correct += top_1_and_5(logits[:, 0], y[start : start + len(logits)]).sum(0)
    top1, top5 = (dist.sum_over_processes(correct) / len(truth)).tolist()
    return {"top1": top1, "top5": top5, "validation": validation, "weight_decay": decay}


def auto_results(found: features.Features, args, world) -> dict:
    """Probe every layer of one backbone's features."""
    if found.train.labels.ndim != 1:
        raise dist.RunError(f"{found.checkpoint}: the probe needs images of one class each")
    chosen = class_balanced(found.train.labels, args.train_fraction, args.seed)
    if len(chosen) < 2:
        raise dist.RunError(f"{found.checkpoint}: {len(chosen)} training image; give 2 or more")
    labels, truth = found.train.labels[chosen], found.test.labels
    num_classes = int(max(found.train.labels.max(), truth.max())) + 1
    results = []
    for layer, rows in found.train.layers.items():
        rows = rows if args.train_fraction == 1 else rows[torch.from_numpy(chosen)]
        result = auto_probe(
            rows, labels, found.test.layers[layer], truth, decays=sorted(args.weight_decays),
            folds=args.folds, num_classes=num_classes, seed=args.seed, world=world,
        )
        results.append({"layer": layer, **result})
    best = max(results, key=lambda result: result["validation"])
    sizes = {"num_train": len(labels), "num_test": len(truth)}
    return {"top1": best["top1"], "top5": best["top5"], "results": results, **sizes}


# -------------------------------------------------------------------------- protocols of the papers


def protocol_layers(protocol: str, backbone: nn.Module) -> list[str]:
    """What the heads of a protocol look at."""
    known = list(features.layer_widths(backbone))
    if protocol == "vissl" and "res5" in known:
        return [*(f"{name}-grid" for name in features.GRIDS), f"avgpool{PLAIN}", "avgpool"]
    if protocol == "dino" and "cls" in known:
        return ["cls4"] if backbone.num_features < 768 else ["cls+patches"]
    return known[-1:]


def probed_layers(backbone: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Layers as rows (N, D), by name; `a+b` is a and b side by side, `a-mlp` is a."""
    parts = {name: name.removesuffix(PLAIN).split("+") for name in names}
    flat = features.flat_layers(backbone, images, list(dict.fromkeys(sum(parts.values(), []))))
    return {name: torch.cat([flat[p] for p in layers], dim=1) for name, layers in parts.items()}


class Head(nn.Module):
    """Batch norm, if there is one, and a linear layer.

    Args:
        channels: of the map that the rows (N, D) are, flattened: what batch norm counts as one.
        norm: "none", "affine" or "plain", without scale and shift.
        init: "normal" or "truncated" with deviation 0.01, "zero", or "torch" as torch has it; the
            offsets are 0, but for "torch".
    """

    def __init__(self, channels: int, dim: int, num_classes: int, norm: str, init: str):
        super().__init__()
        self.channels = channels
        self.norm = None
        if norm != "none":
            plain = norm == "plain"
            self.norm = nn.BatchNorm1d(channels, eps=1e-6 if plain else 1e-5, affine=not plain)
        self.linear = nn.Linear(dim, num_classes)
        if init == "normal":
            nn.init.normal_(self.linear.weight, std=0.01)
        elif init == "truncated":
            nn.init.trunc_normal_(self.linear.weight, std=0.01)
        elif init == "zero":
            nn.init.zeros_(self.linear.weight)
        if init != "torch":
            nn.init.zeros_(self.linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        if self.norm is not None:
            rows = self.norm(rows.view(len(rows), self.channels, -1)).flatten(1)
        return self.linear(rows)


def build_heads(backbone, names, images, num_classes: int, norm: str, init: str) -> nn.ModuleDict:
    """A head for each layer; `images` tell how large the layers are."""
    widths = features.layer_widths(backbone)
    with torch.no_grad():
        dims = {name: rows.shape[1] for name, rows in
                probed_layers(backbone, images, names).items()}
    return nn.ModuleDict({
        name: Head(widths.get(name.removesuffix("-grid")) or dim, dim, num_classes,
                   "none" if name.endswith(PLAIN) else norm, init)
        for name, dim in dims.items()
    })


def build_optimizer(heads: nn.Module, kind: str, lr: float, weight_decay: float):
    """The optimiser of a protocol. Batch norm has no weight decay."""
    norms = [p for name, p in heads.named_parameters() if ".norm." in name]
    others = [p for name, p in heads.named_parameters() if ".norm." not in name]
    if kind == "lars":
        groups = [{"params": [p for p in others if p.ndim > 1]},
                  {"params": [p for p in others if p.ndim == 1] + norms, "decay": False,
                   "adapt": False}]
        return optim.LARS(groups, lr=lr, momentum=0.9, weight_decay=weight_decay,
                          trust_coefficient=0.001)
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=0.9,
                           weight_decay=weight_decay, nesterov=kind == "nesterov")


def learning_rates(protocol: dict, base: float, epochs: int, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step; milestones and warm-up scale with the epochs."""
    scale, schedule = epochs / protocol["epochs"], protocol["schedule"]
    if schedule == "steps":
        warmup = round(protocol["warmup_epochs"] * scale * steps_per_epoch)
        return optim.warmup_cosine(start=0.0, base=base, final=0.0, warmup_steps=warmup,
                                   total_steps=epochs * steps_per_epoch, warmup_endpoint=False)
    if schedule == "epochs":
        return optim.lr_by_epoch(base, "cosine", epochs, 0, steps_per_epoch)
    return [base * 0.1 ** sum(epoch >= milestone * scale for milestone in schedule)
            for epoch in range(epochs) for _ in range(steps_per_epoch)]


def train_views(image_size, channels, interpolation, flip, mean, std):
    """One view: a random crop, mirrored or not."""
    steps = [
        augment.RandomResizedCrop(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3),
                                  interpolation=interpolation),
        augment.HorizontalFlip(p=0.5 if flip else 0.0),
        augment.Normalize(mean, std),
    ]
    return [augment.View(image_size, steps, channels)]


def fit_batch(wanted: int, num_images: int) -> int:
    """The batch size, or the largest power of two of images that there are."""
    return wanted if wanted <= num_images else 2 ** (num_images.bit_length() - 1)


def paper_probe(source: features.Source, backbone, mark: str, args, world) -> dict | None:
    """Train a protocol's heads on a frozen backbone and test them; None if it was told to stop."""
    protocol, settings = PROTOCOLS[args.protocol], source.settings
    train, test = source.train, source.test
    if args.train_fraction < 1:
        train = train.subset(class_balanced(train.labels, args.train_fraction, args.seed))
    epochs = args.epochs or protocol["epochs"]
    batch_size = fit_batch(args.train_batch_size or protocol["batch_size"], len(train))
    if batch_size % world.size:
        raise dist.RunError(f"--train-batch-size {batch_size} does not divide among {world.size} "
                            "processes")
    base_lr = args.lr or protocol["lr"]
    lr = base_lr * batch_size / 256
    flip = settings["data"] not in NOT_MIRRORED if args.flip is None else args.flip
    names = protocol_layers(args.protocol, backbone)
    if args.layers and "pixels" not in names:
        names = args.layers
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1

    # Heads and optimiser
    torch.manual_seed(args.seed)
    size, channels = settings["image_size"], settings["in_chans"]
    blank = torch.zeros(2, channels, size, size, device=world.device)
    try:
        heads = build_heads(backbone, names, blank, num_classes, protocol["norm"], protocol["init"])
    except ValueError as error:
        raise dist.RunError(f"{args.protocol}: {error}") from error
    heads = dist.convert_sync_batchnorm(heads.to(world.device), world.device)
    optimizer = build_optimizer(heads, protocol["optimizer"], lr, protocol["weight_decay"])
    views = train_views(size, channels, protocol["crop"], flip, settings["mean"], settings["std"])
    train_labels, test_labels = (torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
                                 for images in (train, test))
    dist.say(f"{args.protocol}: {len(train)} images, {epochs} epochs, batch {batch_size}, lr "
             f"{base_lr:g} x {batch_size} / 256 = {lr:g}, heads on {' '.join(names)}, "
             f"{'mirrored' if flip else 'unmirrored'} crops")

    changing = dict(
        protocol, protocol=args.protocol, checkpoint=mark, layers=names, epochs=epochs,
        train_batch_size=batch_size, lr=base_lr, flip=flip, train_fraction=args.train_fraction,
        seed=args.seed, num_classes=num_classes,
        **{name: settings[name] for name in ("image_size", "in_chans", "mean", "std")},
    )
    fraction = "" if args.train_fraction == 1 else f"-{args.train_fraction:g}"
    folder = os.path.join(args.output, f"{args.protocol}{fraction}-{mark}")
    run_args = argparse.Namespace(
        **vars(args) | dict(output=folder, batch_size=batch_size, epochs=epochs, lr=base_lr,
                            workers=source.workers))
    with Training(run_args, world, train, views, settings=changing, product="heads.pth",
                  chance_loss=len(names) * math.log(num_classes)) as run:
        run.resume(heads=heads, optimizer=optimizer)
        lr_of_step = learning_rates(protocol, lr, epochs, run.steps_per_epoch)
        for step, batch in run.steps(export=heads):
            optim.set_lr(optimizer, lr_of_step[step])
            with torch.no_grad():  # so many images at a time, whatever the batch
                parts = [probed_layers(backbone, part, names)
                         for part in batch.views[0].split(args.batch_size)]
            rows = {name: torch.cat([part[name] for part in parts]) for name in names}
            truth = train_labels[batch.index].to(world.device, non_blocking=True)
            loss = sum(F.cross_entropy(head(rows[name]), truth) for name, head in heads.items())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for parameter in heads.parameters():
                parameter.grad = dist.mean_over_processes(parameter.grad)
            optimizer.step()
            run.log(loss, lr_of_step[step], dict)
        if run.folder.stopping:
            return None

    # Test
    heads.eval()

    def correct(images, truth):
        rows = probed_layers(backbone, images, names)
        return {name: top_1_and_5(head(rows[name]), truth) for name, head in heads.items()}

    scores = features.extract(correct, test, source.view, world, batch_size=args.batch_size,
                              workers=source.workers, labels=test_labels)
    results = []
    for name, rows in scores.items():
        top1, top5 = rows.double().mean(0).tolist()
        results.append({"layer": name, "top1": top1, "top5": top5})
    sizes = {"num_train": len(train), "num_test": len(test)}
    return {"top1": results[-1]["top1"], "top5": results[-1]["top5"], "results": results, **sizes}


# ------------------------------------------------------------------------------------ frozen or not


def backbone_hash(backbone: nn.Module | None) -> str | None:
    """Twelve hexadecimal digits of all parameters and buffers, bit for bit; None without any."""
    state = backbone.state_dict() if backbone is not None else {}
    if not state:
        return None
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def check_frozen(name: str, before: str | None, after: str | None) -> None:
    """Print the hashes of a backbone before and after its use.

    Raises:
        RunError: they differ on some process.
    """
    if before:
        dist.say(f"{name}: hash of the backbone {before} before, {after} after")
    if any(dist.agree(before != after)):
        raise dist.RunError(f"{name}: the backbone has changed")


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = dist.setup(args.device, deterministic=True)
    protocol = PROTOCOLS.get(args.protocol)
    if not protocol:
        dist.say(f"linear probe: standardised features, L-BFGS, weight decay of "
                 f"{len(args.weight_decays)} on {args.folds} parts of the training images")
    table = []
    interpolation = protocol["resize"] if protocol else "bicubic"
    for source in features.sources(args, world, interpolation=interpolation):
        runs = []
        for backbone in source.backbones():
            before = backbone_hash(backbone)
            if protocol:
                result = paper_probe(source, backbone, before or source.name, args, world)
                if result is None:
                    return
            else:
                result = auto_results(source.features(backbone), args, world)
            check_frozen(source.name, before, backbone_hash(backbone))
            runs.append(result)
        table.append({"checkpoint": source.name, **features.mean_of(runs)})

    if world.is_main:
        print_table(table)
        line = {"eval": "linear", "protocol": args.protocol, **table[-1], "checkpoints": table}
        print(json.dumps(line), flush=True)


def print_table(table: list[dict]) -> None:
    """Print a line for each checkpoint and layer."""
    several = any(len(row["results"]) > 1 for row in table)
    lines = [(f"{row['checkpoint']} {r['layer']}" if several else row["checkpoint"], r)
             for row in table for r in row["results"]]
    width = max(len("checkpoint"), *(len(title) for title, _ in lines))
    chosen = "validation" in lines[0][1]
    more = f"{'validation':>12}{'weight decay':>14}" if chosen else ""
    print(f"{'checkpoint':<{width}}{'top-1':>8}{'top-5':>8}{more}")
    for title, r in lines:
        more = f"{r['validation']:>12.3f}{r['weight_decay']:>14.2g}" if chosen else ""
        print(f"{title:<{width}}{r['top1']:>8.3f}{r['top5']:>8.3f}{more}")


if __name__ == "__main__":
    sys.exit(dist.launch(main, parse_args()))
