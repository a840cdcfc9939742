"""Linear classification of frozen features: the probes of the papers, and one that needs no tuning.

The backbone is in eval mode and never trained: its hash is printed before and after.

`--protocol auto`, the default, takes the features of one central view of every image:
1. Standardise them by the mean and deviation of the training images, and turn them to their
   principal axes, along which the curvature of the loss is known.
2. For many weight decays at once, minimise cross-entropy + decay / 2 |W|^2 on all training images
   but a fifth, for each fifth in turn (only the first one beyond 20,000 images), by L-BFGS on all
   images together (`common/solver.py`): there is no learning rate to choose.
3. Take the decay, and of several `--layers` the layer, that is right most often on the images left
   out; train once more on all training images; count on the test images.
It saves nothing on the way; keep the features of a large data set with `--save-features`.

The other protocols are the papers': heads trained on new random crops in every epoch, with the
published numbers (`PROTOCOLS`). They stop, save and resume as the methods do. Two things differ
from the public code of MoCo, SwAV, Barlow Twins, DINO and MAE: the last epoch counts, not the one
that is best on the test images; and a short last batch of an epoch is dropped (MAE's code drops it
too). `--probe attentive` trains another head, by protocol `aim`: a learned query attends to a
transformer's patches.

Nothing is chosen on the test images. `--train-fraction 0.01` takes so many training images,
class-balanced. `--also-test` takes further test images with some of the classes, such as
ImageNet-A, -R, -Sketch and V2: of each, only the classes that it has are predicted.

Letters: N images, H heads, C classes, L tokens, D feature size.

    python eval_linear.py --checkpoint pixels random runs/simclr-digits-resnet_tiny
    python eval_linear.py --checkpoint runs/simclr --data /path/to/imagenet --train-fraction 0.01
    python eval_linear.py --checkpoint runs/dino --data in1k --also-test imagenet-a imagenet-r
    torchrun --nproc_per_node=8 eval_linear.py --protocol dino --checkpoint runs/dino --data in1k
    torchrun --nproc_per_node=8 eval_linear.py --probe attentive --checkpoint runs/mae --data in1k
"""

import argparse
import math
import os
import sys
import zlib
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, cli, distributed as comm, features, labelled, optim, solver, weights
from common.backbones import VITS
from common.loader import fitting_batch
from common.training import Training
from common.workers import workers_for

# lr: per 256 images, at the published batch size. schedule: milestones, where it is multiplied by
# 0.1; "cosine" to 0 every step, "epochs": once an epoch. norm: batch norm before the linear layer,
# over all processes. init: of the linear layer's weights.
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
    ("simclr", "nesterov", 0.1, 0.0, 4096, 90, "cosine", 0, "none", "zero", "bicubic", "bicubic"),
    # Caron et al., arXiv 2104.14294, appendix F; facebookresearch/dino, eval_linear.py. Narrow
    # transformers: class tokens of the last four blocks; from width 768 on: last one, mean patch.
    ("dino", "sgd", 0.001, 0.0, 1024, 100, "epochs", 0, "none", "normal", "bilinear", "bicubic"),
    # He et al., arXiv 2111.06377, appendix A.1; facebookresearch/mae, main_linprobe.py. Its random
    # crop tries once where ours tries ten times; its batch norm is of each GPU's own 512 images; it
    # runs in fp16. ViT-L and ViT-H: 50 epochs, 10 of them warm-up (`--epochs 50` here: 5.6).
    ("mae", "lars", 0.1, 0.0, 16384, 90, "cosine", 10, "plain", "truncated", "bicubic", "bicubic"),
    # Goyal et al., arXiv 1905.01235; VISSL, eval_resnet_8gpu_transfer_in1k_linear: one head on each
    # of the pooled maps conv1 to res5 and two on the mean of res5, without batch norm and, which
    # counts, with it; no weight decay on the batch norm.
    ("vissl", "nesterov", 0.01, 5e-4, 256, 28, [8, 16, 24], 0, "affine", "torch", "bilinear",
     "bilinear"),
)}
# Of `AttentiveHead`. El-Nouby et al., arXiv 2401.08541: AdamW, 100 epochs. Only the head's code is
# public (apple/ml-aim), so nothing was compared with its training. Crops and mirroring alone here,
# one rate, the last layer's tokens.
ATTENTIVE = {"aim": dict(zip(COLUMNS, (
    "adamw", 0.001 / 4, 0.1, 1024, 100, "cosine", 0, "plain", "torch", "bicubic", "bicubic",
), strict=True))}
DECAYS = [float(f"{10 ** (half / 2 - 6):.1e}") for half in range(13)]  # 1e-6, 3.2e-6, ... 1
AUTO_ONLY = ("weight_decays", "folds", "features", "save_features")
NOT_MIRRORED = ("digits", "mnist", "svhn", "gtsrb", "sst2")  # a mirrored sign is another sign
INIT = {"zero": nn.init.zeros_, "normal": partial(nn.init.normal_, std=0.01),
        "truncated": partial(nn.init.trunc_normal_, std=0.01)}  # "torch": as torch has it
TOKENS = ("patches", "tokens")  # what an attentive head may look at
PLAIN = "-mlp"  # behind a layer's name: its head has no batch norm; VISSL's name for such a head


def parse_args(argv=None):
    parser = features.parser(__file__, __doc__)
    group = parser.add_argument_group("protocol")
    group.add_argument("--probe", choices=("linear", "attentive"), default="linear",
                       help="the head that is trained; attentive: for transformers, sees all "
                       "patches, or with --layers tokens the class token as well")
    group.add_argument("--protocol", choices=("auto", *PROTOCOLS, *ATTENTIVE),
                       help="how the head is trained: auto (described above), a paper's way, or "
                       "for --probe attentive aim; default: auto, or aim. One of")
    group.add_argument("--train-fraction", type=cli.share, default=1.0, metavar="SHARE",
                       help="class-balanced fraction of the training images")
    group.add_argument("--also-test", nargs="+", metavar="FOLDER",
                       help="further test images, of some of the classes: class folders named as "
                       "in training (or 0, 1, ... in the order of those names), or lists")
    group = parser.add_argument_group("auto")
    group.add_argument("--weight-decays", type=cli.positive, nargs="+",
                       help="weight decays to choose from [1e-6 to 1]")
    group.add_argument("--folds", type=cli.two_or_more, help="folds of the cross-validation [5]")
    group = parser.add_argument_group("protocols of the papers (default: as published)")
    features.head_flags(group, "runs/eval_linear")
    args = features.parse(parser, argv)
    attentive = args.probe == "attentive"
    args.protocol = args.protocol or ("aim" if attentive else "auto")
    args.also_test = args.also_test or []
    if attentive != (args.protocol in ATTENTIVE):
        parser.error(f"--protocol {args.protocol} does not go with --probe {args.probe}, "
                     + ("whose only one is aim" if attentive else "it needs --probe attentive"))
    if attentive and (other := set(args.layers or ()) - set(TOKENS)):
        parser.error(f"--layers {' '.join(sorted(other))}: an attentive probe has "
                     f"{' '.join(TOKENS)}")
    if args.features and args.also_test:
        parser.error(f"--also-test {args.also_test[0]} does not go with --features")
    for name in features.HEAD_FLAGS if args.protocol == "auto" else AUTO_ONLY:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} does not go with --protocol {args.protocol}")
    args.folds, args.weight_decays = args.folds or 5, args.weight_decays or DECAYS
    if (args.train_batch_size or 0) % cli.processes():
        parser.error(f"--train-batch-size {args.train_batch_size} does not divide among "
                     f"{cli.processes()} processes")
    return args


def auto_probe(found: features.Features, also: list, args, world) -> dict:
    """Probe every layer of one backbone's features without settings (`solver.cross_validated`).

    Args:
        also: further images to test on, and their features, pairs.
    """
    labels, truth = found.train.labels, found.test.labels
    if labels.ndim != 1:
        raise comm.RunError(f"{found.checkpoint}: the probe needs images of one class each")
    num_classes = count_classes(labels, truth, *(images.labels for images, _ in also))
    chosen = labelled.class_balanced(labels, args.train_fraction, args.seed)
    if len(chosen) < 2:
        raise comm.RunError(f"{found.checkpoint}: {len(chosen)} training image; give 2 or more")
    results = []
    for layer, rows in found.train.layers.items():
        rows = rows if args.train_fraction == 1 else rows[torch.from_numpy(chosen)]
        results.append({"layer": layer, **solver.cross_validated(
            rows, labels[chosen], found.test.layers[layer], truth, folds=args.folds,
            decays=sorted(args.weight_decays), num_classes=num_classes, seed=args.seed, world=world,
            also=[(split.layers[layer], split.labels, images.present) for images, split in also],
        )})
    best = max(results, key=lambda result: result["validation"])
    sizes = {"num_train": len(chosen), "num_test": len(truth)}
    return summary(best, results, found.protocol, sizes, args.also_test,
                   [images for images, _ in also])


def count_classes(*labels: np.ndarray) -> int:
    """How many classes there are: one more than the largest label."""
    return 1 + int(max(part.max() for part in labels))


def summary(counts: dict, results: list[dict], protocol: str, sizes: dict, paths, also) -> dict:
    """What is told of one backbone: the result that counts, and all of them.

    Args:
        paths: of `--also-test`. also: the images of each.
    """
    usual = labelled.mean_per_class_is_usual(protocol)
    for result in results:
        tested = zip(paths, also, result.pop("also"), strict=True)
        if further := [{"data": path, "num_test": len(images.labels),
                        "num_classes": len(images.present), **numbers}
                       for path, images, numbers in tested]:
            result["also"] = further
    top = ("top1", "top5", "mean_per_class", "also")
    shown = [{name: value for name, value in result.items() if usual or name != "mean_per_class"}
             for result in results]
    return {**{name: counts[name] for name in top if name in counts}, "results": shown, **sizes}


# -------------------------------------------------------------------------- protocols of the papers


def protocol_layers(protocol: str, backbone: nn.Module) -> list[str]:
    """What the heads of a protocol look at."""
    known = features.layer_names(backbone)
    if protocol == "vissl" and "res5" in known:
        return [*(f"{name}-grid" for name in features.GRIDS), f"avgpool{PLAIN}", "avgpool"]
    if protocol == "dino" and "cls" in known:
        return ["cls4"] if backbone.num_features < 768 else ["cls+patches"]
    return known[-1:]


def probed_layers(backbone: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Layers as rows (N, D), by name; `a+b` is a and b side by side, `a-mlp` is a."""
    parts = {name: name.removesuffix(PLAIN).split("+") for name in names}
    rows = features.layers(backbone, images, list(dict.fromkeys(sum(parts.values(), []))))
    return {name: comm.upcast(torch.cat([rows[p] for p in layers], dim=1))
            for name, layers in parts.items()}


def probed_tokens(backbone: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """A transformer's last tokens (N, L, D), by name: all of them, or the patches alone."""
    tokens = comm.upcast(backbone.tokens(images)[0])
    patches = tokens if backbone.cls_token is None else tokens[:, 1:]
    return {name: tokens if name == "tokens" else patches for name in names}


class Head(nn.Module):
    """Batch norm over the channels of a flattened map, if there is one, and a linear layer."""

    def __init__(self, channels: int, dim: int, num_classes: int, norm: str, init: str):
        super().__init__()
        self.channels, self.norm = channels, None
        if norm != "none":
            plain = norm == "plain"
            self.norm = nn.BatchNorm1d(channels, eps=1e-6 if plain else 1e-5, affine=not plain)
        self.linear = nn.Linear(dim, num_classes)
        if init != "torch":
            INIT[init](self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        if self.norm is not None:
            rows = self.norm(rows.view(len(rows), self.channels, -1)).flatten(1)
        return self.linear(rows)


class AttentiveHead(nn.Module):
    """A learned query attends to tokens, and a linear layer to what it finds.

    Three matrices, of keys, values and logits; batch norm of the tokens before, no bias anywhere.

    Args:
        num_heads: of the attention; here as many as the backbone's.

    Reference: El-Nouby et al., arXiv 2401.08541; start values as in its code (apple/ml-aim): the
    query normal with standard deviation 0.02, the matrices as torch has it.
    """

    def __init__(self, dim: int, num_heads: int, num_classes: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.linear = nn.Linear(dim, num_classes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        n, length, dim = tokens.shape
        tokens = self.norm(tokens.flatten(0, 1)).view(n, length, dim)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (
            self.query.expand(n, -1, -1), self.key(tokens), self.value(tokens)))
        found = F.scaled_dot_product_attention(q, k, v)  # (N, heads, 1, D / heads)
        return self.linear(found.flatten(1))


@torch.no_grad()
def build_heads(backbone, names, images, num_classes: int, norm: str, init: str) -> nn.ModuleDict:
    """A head for each layer; `images` tell how large the layers are."""
    means = probed_layers(backbone, images, [name.removesuffix("-grid") for name in names])
    heads = nn.ModuleDict()
    for name, rows in probed_layers(backbone, images, names).items():
        channels = means[name.removesuffix("-grid")].shape[1]  # a map's mean has one value of each
        heads[name] = Head(channels, rows.shape[1], num_classes,
                           "none" if name.endswith(PLAIN) else norm, init)
    return heads


def build_optimizer(heads: nn.Module, kind: str, lr: float, weight_decay: float):
    """The optimiser of a protocol. Batch norm has no weight decay; LARS adapts the weights only."""
    norms = [p for name, p in heads.named_parameters() if ".norm." in name]
    others = [p for name, p in heads.named_parameters() if ".norm." not in name]
    if kind == "lars":
        groups = [{"params": [p for p in others if p.ndim > 1]},
                  {"params": [p for p in others if p.ndim == 1] + norms, "decay": False,
                   "adapt": False}]
        return optim.LARS(groups, lr=lr, momentum=0.9, weight_decay=weight_decay,
                          trust_coefficient=0.001)
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay,
                           nesterov=kind == "nesterov")


def learning_rates(protocol: dict, base: float, epochs: int, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step; milestones and warm-up scale with the epochs."""
    scale, schedule = epochs / protocol["epochs"], protocol["schedule"]
    if schedule == "cosine":
        warmup = round(protocol["warmup_epochs"] * scale * steps_per_epoch)
        return optim.warmup_cosine(start=0.0, base=base, final=0.0, warmup_steps=warmup,
                                   total_steps=epochs * steps_per_epoch, warmup_endpoint=False)
    drops = "cosine" if schedule == "epochs" else [milestone * scale for milestone in schedule]
    return optim.lr_by_epoch(base, drops, epochs, 0, steps_per_epoch)


def train_views(interpolation: str, flip: bool, image_size: int, in_chans: int, mean, std) -> list:
    """One view: a random crop, mirrored or not."""
    crop = augment.RandomResizedCrop(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3),
                                     interpolation=interpolation)
    mirror = augment.HorizontalFlip(p=0.5 if flip else 0.0)
    return augment.normalized([(image_size, [crop, mirror])], in_chans, mean, std)


def top_1_and_5(logits: Tensor, truth: Tensor) -> Tensor:
    """Whether the true class is the best and among the best five: (N, 2) of (N, C) and (N,)."""
    return torch.stack([features.share_right(logits, truth, min(k, logits.shape[1]))
                        for k in (1, 5)], dim=1)


def accuracies(logits_of, images, source: features.Source, num_classes: int,
               present: np.ndarray | None = None) -> dict[str, dict]:
    """How often heads are right on some images, by layer.

    Args:
        logits_of: images (n, channels, H, W) to logits (n, C), by layer.
        present: the classes that are predicted, if not all; of five or fewer top-5 is NaN.
    """
    truth = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
    present = np.arange(num_classes) if present is None else present
    left_out = labelled.absent(present, num_classes).to(source.world.device)

    def correct(batch, truth):
        return {name: top_1_and_5(logits.masked_fill(left_out, -math.inf), truth)
                for name, logits in logits_of(batch).items()}

    found = {}
    for name, rows in source.extract(correct, images, truth).items():
        top1, top5 = rows.double().mean(0).tolist()
        right = torch.zeros(num_classes, dtype=torch.float64)
        right.index_add_(0, truth, rows[:, 0].double())
        found[name] = {"top1": top1, "top5": top5 if len(present) > 5 else math.nan,
                       "mean_per_class": labelled.mean_per_class(right, images.labels)}
    return found


def paper_probe(source: features.Source, backbone, mark: str, args, world) -> dict | None:
    """Train a protocol's heads on a frozen backbone and test them; None if it was told to stop."""
    protocol, settings = (PROTOCOLS | ATTENTIVE)[args.protocol], source.settings
    train, test, attentive = source.train, source.test, args.probe == "attentive"
    if args.train_fraction < 1:
        train = train.subset(labelled.class_balanced(train.labels, args.train_fraction, args.seed))
    epochs, base_lr = args.epochs or protocol["epochs"], args.lr or protocol["lr"]
    batch_size = fitting_batch(args.train_batch_size or protocol["batch_size"], train, world)
    lr = base_lr * batch_size / 256
    flip = settings["data"] not in NOT_MIRRORED if args.flip is None else args.flip
    names = ["patches"] if attentive else protocol_layers(args.protocol, backbone)
    if args.layers and "pixels" not in names:
        names = args.layers
    train_labels = torch.from_numpy(np.asarray(train.labels, dtype=np.int64))
    num_classes = count_classes(*(part.labels for part in (train, test, *source.also)))

    @torch.no_grad()
    def look(images):
        with source.precision:
            return (probed_tokens if attentive else probed_layers)(backbone, images, names)

    # Heads and optimiser
    torch.manual_seed(args.seed)
    shown = {name: settings[name] for name in ("image_size", "in_chans", "mean", "std")}
    blank = torch.zeros(2, shown["in_chans"], *[shown["image_size"]] * 2, device=world.device)
    if attentive:
        num_heads = backbone.blocks[-1].attn.num_heads
        heads = nn.ModuleDict({name: AttentiveHead(backbone.num_features, num_heads, num_classes)
                               for name in names})
    else:
        heads = build_heads(backbone, names, blank, num_classes, protocol["norm"], protocol["init"])
    heads = comm.convert_sync_batchnorm(heads.to(world.device))
    optimizer = build_optimizer(heads, protocol["optimizer"], lr, protocol["weight_decay"])
    views = train_views(protocol["crop"], flip, **shown)

    # Train
    comm.print_main(f"{args.protocol}: {args.probe} heads on {' '.join(names)}, --epochs {epochs}, "
                    f"{'mirrored' if flip else 'unmirrored'} crops")
    changing = dict(
        protocol, protocol=args.protocol, checkpoint=mark, layers=names, epochs=epochs, lr=base_lr,
        train_batch_size=batch_size, flip=flip, train_fraction=args.train_fraction, seed=args.seed,
        num_classes=num_classes, labels=zlib.crc32(train_labels.numpy()), **source.seen_as)
    fraction = "" if args.train_fraction == 1 else f"-{args.train_fraction:g}"
    fraction += f"-{args.limit_per_class}-a-class" if args.limit_per_class else ""
    folder = os.path.join(args.output, f"{args.protocol}{fraction}-{mark}")
    run_args = argparse.Namespace(**vars(args) | dict(
        output=folder, batch_size=batch_size, epochs=epochs, lr=base_lr,
        workers=workers_for(train, args.workers)))
    with Training(run_args, world, train, views, settings=changing, product="heads.pth",
                  chance_loss=len(names) * math.log(num_classes)) as run:
        run.resume(heads=heads, optimizer=optimizer)
        lr_of_step = learning_rates(protocol, lr, epochs, run.steps_per_epoch)
        for step, batch in run.steps(export=heads):
            optim.set_lr(optimizer, lr_of_step[step])
            # --batch-size images at a time, regardless of the batch
            parts = [look(part) for part in batch.views[0].split(args.batch_size)]
            rows = {name: torch.cat([part[name] for part in parts]) for name in names}
            truth = train_labels[batch.index].to(world.device, non_blocking=True)
            loss = sum(F.cross_entropy(head(rows[name]), truth) for name, head in heads.items())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            comm.average_gradients(heads)
            optimizer.step()
            run.log(loss, lr_of_step[step], dict)
        if run.folder.stopping:
            return None

    # Test
    heads.eval()

    def logits_of(images):
        rows = look(images)
        return {name: head(rows[name]) for name, head in heads.items()}

    tested = accuracies(logits_of, test, source, num_classes)
    also = [accuracies(logits_of, images, source, num_classes, images.present)
            for images in source.also]
    results = [{"layer": name, **found, "also": [part[name] for part in also]}
               for name, found in tested.items()]
    sizes = {"num_train": len(train), "num_test": len(test)}
    return summary(results[-1], results, source.protocol, sizes, args.also_test, source.also)


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = comm.setup(args.device, deterministic=True)
    protocol = (PROTOCOLS | ATTENTIVE).get(args.protocol)
    if not protocol:
        part = f"; {args.train_fraction:g} of the training images" * (args.train_fraction < 1)
        comm.print_main(f"auto: {len(args.weight_decays)} weight decays, {args.folds} folds{part}")
    table = []
    interpolation = protocol["resize"] if protocol else "bicubic"
    sources = list(features.sources(args, world, interpolation=interpolation,
                                    also_test=args.also_test))
    for source in sources if args.probe == "attentive" else ():  # before any of them is trained
        arch = source.name if source.name == "pixels" else source.settings["arch"]
        if arch not in VITS:
            raise comm.RunError(f"{source.name}: --probe attentive looks at the patches of "
                                f"{' '.join(VITS)}, and this is {arch}; take --probe linear")
    for source in sources:
        runs = []
        for backbone in source.backbones():
            before = weights.fingerprint(backbone)
            if protocol:
                runs.append(paper_probe(source, backbone, before or source.name, args, world))
                if runs[-1] is None:
                    return
            else:
                found = source.features(backbone)
                also = [(images, source.split(backbone, images)) for images in source.also]
                runs.append(auto_probe(found, also, args, world))
            after = weights.fingerprint(backbone)
            if before and len(runs) == 1:  # of untrained ones the first
                comm.print_main(f"{source.name}: hash of the backbone {before} before, "
                                f"{after} after")
            if any(comm.any_rank(before != after)):
                raise comm.RunError(f"{source.name}: the backbone has changed")
        table.append({"checkpoint": source.name, **features.mean_of(runs)})

    columns = {"top-1": "{top1:.3f}"}
    if any(r["top5"] == r["top5"] for row in table for r in row["results"]):
        columns |= {"top-5": "{top5:.3f}"}
    if all("mean_per_class" in r for row in table for r in row["results"]):
        columns |= {"mean per class": "{mean_per_class:.3f}"}
    shared = list(columns.values())
    if not protocol:
        columns |= {"validation": "{validation:.3f}", "weight decay": "{weight_decay:.2g}"}
    lines = []
    for row in table:
        for r in row["results"]:
            cells = [cell.format_map(r) for cell in columns.values()]
            lines.append([f"{row['checkpoint']} {r['layer']}", *cells])
            lines += [[f"  {part['data']} ({part['num_classes']} classes)",
                       *(cell.format_map(part) for cell in shared)] for part in r.get("also", ())]
    features.print_table(["checkpoint", *columns], lines)
    features.print_json({"eval": "linear", "probe": args.probe, "protocol": args.protocol,
                         **table[-1], "checkpoints": table})


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
