"""Semantic segmentation with a frozen backbone: the class of every pixel, told from its patch.

Features of a patch: a transformer's last patch token, or a place of a ResNet's last map. Images are
resized (`--resize` is the shorter side, the longer one at most four times that) and seen through
square windows that overlap by a third, or `--windows whole`. Scores of the patches are enlarged to
pixels, bilinearly, averaged where windows overlap, and enlarged to the label map as it was given.

`--method knn`, the default, trains nothing:
1. Remember patches of the training images with the share that each class has of their pixels.
2. Find the k remembered patches that are nearest to a test patch by cosine.
3. They vote with weights softmax(cosine / T); a vote is their share of every class.
After Balazevic et al., arXiv 2306.01667, section 3, where what is remembered is drawn with more
weight on rare classes, and in augmented crops; here evenly, as the images are.

`--method linear` trains batch norm and a 1x1 convolution on the map with cross-entropy of pixels,
by the protocol of DINOv3's linear segmentation (`PROTOCOL`; arXiv 2508.10104). Left out are its
photometric distortion, its clipping of gradients at norm 35, and its rule that a crop of which one
class fills three quarters is drawn anew. It stops, saves and resumes as the methods do. Nothing is
chosen on the test images: the last step counts.

Counted are all pixels of the test images together: a class's IoU (intersection over union) is the
number of pixels that are right / (predicted or true). Pixels of `--ignore` count nowhere. Baselines
are `random` (the mean over five untrained backbones) and `pixels` (those of the patch).

Letters: N images, C classes, D feature size, M remembered patches; H x W pixels, h x w patches.

    python eval_segmentation.py --checkpoint pixels random runs/densecl-digits-resnet_tiny
    python eval_segmentation.py --method linear --checkpoint runs/dino --data voc2012
    python eval_segmentation.py --checkpoint runs/dino --data images --labels maps --ignore 0 255
"""

import argparse
import itertools
import math
import os
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, features, label_maps, optim
from common.knn import nearest
from common.label_maps import IGNORED, MappedView, ScaledCrop
from common.loader import fitting_batch
from common.rng import MASK, SAMPLE, philox
from common.training import Training
from common.weights import fingerprint
from common.windows import enlarged, enlarged_argmax, scores_of_pixels, windows
from common.workers import workers_for

# AdamW of betas .9 and .999; lr per 256 images, 0.001 at the published batch size; warm-up from a
# millionth of it, then a cosine to 0. Crops are cut from images of `factor` times the test images'
# size. dropout: chance of a channel of an image's map.
PROTOCOL = dict(lr=0.016, weight_decay=1e-3, batch_size=16, steps=40_000, warmup_steps=1500,
                dropout=0.1, factor=(0.5, 2.0))
WINDOW = 512  # side in pixels, or the next smaller multiple of the patch
LAYERS = ("res2", "res3", "res4", "res5")
KNN_ONLY = ("k", "temperature", "memory")


def parse_args(argv=None):
    parser = cli.Parser(__file__, __doc__)
    group = parser.add_argument_group("features")
    group.add_argument("--checkpoint", nargs="+", metavar="WHAT", required=True,
                       help="run folders, weights files, random, pixels")
    group.add_argument("--layer", choices=LAYERS, default="res5", help="map of a ResNet")
    group = parser.add_argument_group(
        "images (default: as the first run among the checkpoints; --image-size 512 above 96 px)")
    group.add_argument("--data", metavar="SOURCE",
                       help="voc2012; digits (on noise); a folder with train/ and val/ or test/")
    group.add_argument("--labels", metavar="FOLDER",
                       help="the label maps of a folder: PNG, palette or gray, named as the images")
    group.add_argument("--ignore", type=cli.nonneg_int, nargs="+", default=[IGNORED],
                       help="numbers in label maps of pixels that do not count")
    group.add_argument("--num-classes", type=cli.two_or_more,
                       help="classes 0 to C - 1; default: up to the largest of the training maps")
    cli.source_flags(group)
    group.add_argument("--image-size", type=cli.pos_int, help="side of a window in pixels")
    group.add_argument("--resize", type=cli.pos_int,
                       help="shorter side of the images; default: --image-size, of digits 48")
    group.add_argument("--windows", choices=("slide", "whole"), default="slide",
                       help="square windows, or one that is the image")
    group.add_argument("--stride", type=cli.pos_int,
                       help="pixels between windows; default: two thirds of their side")
    cli.channel_flags(group)
    features.backbone_flags(parser.add_argument_group("backbone (default: as above)"))
    group = parser.add_argument_group("protocol")
    group.add_argument("--method", choices=("knn", "linear"), default="knn", help="protocol")
    group.add_argument("--k", type=cli.pos_int, help="knn: neighbours [30]")
    group.add_argument("--temperature", type=cli.positive, help="knn: of the votes [0.02]")
    group.add_argument("--memory", type=cli.pos_int,
                       help="knn: patches to remember at most, equally many of each image, but one "
                       "at least [2**20]")
    group = parser.add_argument_group("method linear (default: DINOv3's {steps:,} steps of "
                                      "{batch_size}, lr {lr})".format_map(PROTOCOL))
    features.head_flags(group, "runs/eval_segmentation")
    features.run_flags(parser.add_argument_group("run"))
    args = parser.parse_args(argv)
    cli.check_arch_flags(parser, args, argv)
    for name in features.HEAD_FLAGS if args.method == "knn" else KNN_ONLY:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} does not go with --method {args.method}")
    built_in = args.data in label_maps.BUILT_IN
    if args.data and built_in == bool(args.labels):
        parser.error(f"--data {args.data} has its label maps; no --labels go with it" if built_in
                     else f"--data {args.data} needs its label maps: --labels FOLDER; built in are "
                     f"{' '.join(label_maps.BUILT_IN)}")
    if args.labels and not args.data:
        parser.error(f"--labels {args.labels} are of a folder --data")
    if args.index:
        parser.error(f"--index {args.index} is of tars, and none is read with label maps")
    if args.windows == "whole" and args.stride:
        parser.error(f"--stride {args.stride} is for --windows slide")
    if args.image_size and (args.stride or 1) > args.image_size:
        parser.error(f"--stride {args.stride} leaves pixels between windows of --image-size "
                     f"{args.image_size} out")
    if (args.num_classes or 2) > IGNORED:
        parser.error(f"--num-classes {args.num_classes}: at most {IGNORED}")
    size = args.train_batch_size or PROTOCOL["batch_size"]
    if args.method == "linear" and size % cli.processes():
        parser.error(f"--train-batch-size {size} does not divide among {cli.processes()} processes")
    args.k, args.temperature = args.k or 30, args.temperature or 0.02
    args.memory, args.amp = args.memory or 2**20, args.amp or "none"
    return args


# ------------------------------------------------------------------------------------------ measure


def mean_iou(pred: Tensor, target: Tensor, num_classes: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Intersection over union of every class, over all pixels whose target is not `ignore`.

    Args:
        pred, target: integers of any type and equal shape; targets in [0, num_classes). A
            prediction that is no class is wrong.

    Returns:
        Float64 (num_classes,), NaN for a class that is in neither, and the mean of the rest.

    Raises:
        ValueError: a target that is no class.
    """
    ious = iou(pixel_counts(pred, target, num_classes, ignore))
    return ious, ious.nanmean()


def pixel_counts(pred: Tensor, target: Tensor, num_classes: int, ignore: int) -> Tensor:
    """How many pixels of each class are right, are predicted and are true: int64 (3, C)."""
    pred, target = (torch.as_tensor(x).long().flatten() for x in (pred, target))
    counted = target != ignore
    pred, target = pred[counted], target[counted]
    if ((target < 0) | (target >= num_classes)).any():
        raise ValueError(f"targets from {target.min()} to {target.max()}, and there are "
                         f"{num_classes} classes")
    known = pred[(pred >= 0) & (pred < num_classes)]
    return torch.stack([torch.bincount(x, minlength=num_classes)
                        for x in (target[pred == target], known, target)])


def iou(counts: Tensor) -> Tensor:
    """Right / (predicted or true), of `pixel_counts`: float64 (C,), NaN where that is 0 / 0."""
    right, predicted, true = counts.double()
    return right / (predicted + true - right)


# -------------------------------------------------------------------------------------------- maps


def patch_side(settings: dict, layer: str) -> int:
    """Pixels that a place of the map stands for, along one side.

    Raises:
        RunError: a backbone of another library, which gives no map.
    """
    if settings["arch"] in backbones.VITS:
        return settings["patch_size"]
    if settings["arch"] not in backbones.RESNETS:
        raise comm.RunError(f"{settings['arch']} gives a pooled feature alone, and this needs a "
                            "map; choose another backbone")
    return (4 if settings["stem"].startswith("imagenet") else 1) * 2 ** (int(layer[-1]) - 2)


def feature_map(backbone: nn.Module, images: Tensor, layer: str, side: int) -> Tensor:
    """Features (N, D, h, w) of images whose sides are multiples of a patch's: (N, C, H, W)."""
    if isinstance(backbone, features.Pixels):
        return F.pixel_unshuffle(images, side)
    return features.maps(backbone, images, [layer])[layer]


# -------------------------------------------------------------------------------------------- k-NN


def class_shares(classes: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """How many pixels of each class a patch has: float32 (n, h, w, C) of label maps (n, H, W).

    The patches of the grid share the map evenly. Pixels that are `IGNORED` count nowhere.
    """
    n, height, width = classes.shape
    rows = torch.arange(height, device=classes.device) * grid[0] // height
    columns = torch.arange(width, device=classes.device) * grid[1] // width
    patch = (torch.arange(n, device=classes.device)[:, None, None] * grid[0] + rows[:, None])
    patch = patch * grid[1] + columns  # (n, H, W)
    counted = classes != IGNORED
    number = (patch * num_classes + classes.long())[counted]
    counts = torch.bincount(number, minlength=n * grid[0] * grid[1] * num_classes)
    return counts.view(n, *grid, num_classes).float()


def knn_scores(maps: Tensor, bank: Tensor, shares: Tensor, k: int, temperature: float) -> Tensor:
    """Shares of every class (N, C, h, w) that the nearest patches give those of maps (N, D, h, w).

    Args:
        bank: unit rows (M, D). shares: (M, C), of each row's classes.
        k: neighbours; clipped to M.
    """
    queries = F.normalize(maps.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
    scores = []
    for part in queries.split(2048):
        cosines, rows = nearest(bank, part, min(k, len(bank)))
        votes = (cosines / temperature).softmax(1).to(shares.dtype)
        scores.append(torch.einsum("mk,mkc->mc", votes, shares[rows]))
    return torch.cat(scores).view(len(maps), *maps.shape[2:], -1).permute(0, 3, 1, 2)


@torch.no_grad()
def remember(task: "Task", most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit features (M, D) of patches of the training images and their classes' shares (M, C).

    Each image gives equally many, drawn by (seed, image). Equal on every process.
    """
    images, world, number = task.source.train, task.source.world, task.images.number
    quota, num_classes = max(1, most // len(images)), len(task.images.there)
    rows, shares, taken = [], [], []
    with comm.same_error_on_all_ranks():
        for index, (pixels, classes, _) in task.read(images):
            image, classes = task.on_device(pixels), number[classes.to(world.device).long()]
            cut, _ = windows(image, task.window, task.window, task.side, fill=0.0)
            maps = task.map_of(cut)
            cut, _ = windows(classes[None], task.window, task.window, task.side, fill=IGNORED)
            share = class_shares(cut[:, 0], maps.shape[2:], num_classes).flatten(0, 2)
            known = share.sum(1).nonzero()[:, 0]
            drawn = philox(seed, SAMPLE, int(images.index[index])).permutation(len(known))
            known = known[torch.from_numpy(np.sort(drawn[:quota])).to(known.device)]
            rows.append(F.normalize(maps.permute(0, 2, 3, 1).flatten(0, 2)[known], dim=1).cpu())
            shares.append(F.normalize(share[known], p=1, dim=1).cpu())
            taken.append(len(known))
            features.check_finite(rows[-1], f"of {images.name(index)}")
    totals = comm.all_gather_objects((sum(taken), rows[0].shape[1] if rows else 0))
    bounds = [0, *itertools.accumulate(count for count, _ in totals)]
    own = slice(bounds[world.rank], bounds[world.rank + 1])
    bank = torch.empty(bounds[-1], max(width for _, width in totals))
    of_classes = torch.empty(bounds[-1], num_classes)
    for whole, parts in ((bank, rows), (of_classes, shares)):
        if parts:
            torch.cat(parts, out=whole[own])
        comm.broadcast_rows(whole, bounds)
    return bank.to(world.device), of_classes.to(world.device)


# ------------------------------------------------------------------------------------------ linear


class Head(nn.Module):
    """Batch norm and a 1x1 convolution of maps (N, D, h, w), some channels of which are dropped."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, num_classes, kernel_size=1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)

    def forward(self, maps: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logits (N, C, h, w); `kept` (N, D) are factors of the channels."""
        if kept is not None:
            maps = maps * kept[:, :, None, None]
        return self.conv(self.norm(maps))


def pixel_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of the pixels that count, of logits (N, C, h, w) enlarged to maps (N, H, W).

    The mean over processes is that of all their pixels; 0 if none counts.
    """
    logits = enlarged(comm.upcast(logits), classes.shape[1:])
    rows, classes = logits.permute(0, 2, 3, 1).flatten(0, 2), classes.flatten()
    total = F.cross_entropy(rows, classes, ignore_index=IGNORED, reduction="sum")
    counted = comm.sum_over_processes((classes != IGNORED).sum())
    return total * comm.size() / counted.clamp(min=1)


def kept_channels(dim: int, share: float, seed: int, index: Tensor, step: int) -> Tensor:
    """Dropout of whole channels: factors (n, dim), a function of (seed, step, image)."""
    drawn = np.stack([philox(seed, MASK, step, i).random(dim) for i in index.tolist()])
    return torch.from_numpy((drawn >= share) / (1 - share)).float()


def build_views(task: "Task", flip: bool) -> list:
    """A crop of the window's size, of the image at any of some sizes."""
    settings = task.source.settings
    mean = np.broadcast_to(settings["mean"], settings["in_chans"])
    crop = ScaledCrop(task.resize, PROTOCOL["factor"], interpolation="bilinear",
                      fill=tuple(round(255 * value) for value in mean.tolist()))
    mirror = augment.HorizontalFlip(p=0.5 if flip else 0.0)
    normalize = augment.Normalize(settings["mean"], settings["std"])
    return [MappedView(settings["image_size"], [crop, mirror, normalize], settings["in_chans"])]


def train_head(task: "Task", mark: str, args) -> Head | None:
    """Train the protocol's head on the frozen backbone; None if it was told to stop."""
    train, world, settings = task.source.train, task.source.world, task.source.settings
    number, num_classes = task.images.number, len(task.images.there)
    batch_size = fitting_batch(args.train_batch_size or PROTOCOL["batch_size"], train, world)
    steps_per_epoch = len(train) // batch_size
    epochs = args.epochs or math.ceil(PROTOCOL["steps"] / steps_per_epoch)
    base_lr = args.lr or PROTOCOL["lr"]
    lr = base_lr * batch_size / 256
    flip = settings["data"] != "digits" if args.flip is None else args.flip
    views = build_views(task, flip)

    # Head and optimiser
    torch.manual_seed(args.seed)
    size = settings["image_size"]
    blank = torch.zeros(settings["in_chans"], size, size, device=world.device)
    dim = task.map_of(windows(blank, size, size, task.side, 0.0)[0]).shape[1]
    head = comm.convert_sync_batchnorm(Head(dim, num_classes).to(world.device))
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, betas=(0.9, 0.999),
                                  weight_decay=PROTOCOL["weight_decay"])

    # Train
    comm.print_main(f"linear: --epochs {epochs} of {steps_per_epoch} steps, "
                    f"{'mirrored' if flip else 'unmirrored'} crops of {size} px")
    changing = dict(
        PROTOCOL, checkpoint=mark, layer=task.layer, epochs=epochs, lr=base_lr, flip=flip,
        train_batch_size=batch_size, seed=args.seed, resize=task.resize, side=task.side,
        labels=task.images.digest, **task.source.seen_as)
    data = os.path.basename(os.path.normpath(settings["data"]))
    run_args = argparse.Namespace(**vars(args) | dict(
        output=os.path.join(args.output, f"{data}-{task.layer}-{mark}"), batch_size=batch_size,
        epochs=epochs, lr=base_lr, workers=workers_for(train, args.workers)))
    with Training(run_args, world, train, views, settings=changing, product="head.pth",
                  chance_loss=math.log(num_classes),
                  draw=partial(kept_channels, dim, PROTOCOL["dropout"], args.seed)) as run:
        run.resume(head=head, optimizer=optimizer)
        share = PROTOCOL["warmup_steps"] / PROTOCOL["steps"]
        lr_of_step = optim.warmup_cosine(
            start=lr * 1e-6, base=lr, final=0.0, total_steps=run.total_steps,
            warmup_steps=round(share * run.total_steps), warmup_endpoint=False)
        for step, batch in run.steps(export=head):
            optim.set_lr(optimizer, lr_of_step[step])
            images, classes = batch.views[0][:, :-1], batch.views[0][:, -1].long()
            right, below = -images.shape[3] % task.side, -images.shape[2] % task.side
            with torch.no_grad():
                maps = task.map_of(F.pad(images, (0, right, 0, below)))
            classes = F.pad(number[classes], (0, right, 0, below), value=IGNORED)
            loss = pixel_loss(head(maps, batch.drawn), classes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            comm.average_gradients(head)
            optimizer.step()
            run.log(loss, lr_of_step[step], dict)
        return None if run.folder.stopping else head.eval()


# --------------------------------------------------------------------------------------------- main


@dataclass(frozen=True)
class Task:
    """The images of a checkpoint, how they are seen, and one of its backbones."""

    source: features.Source
    images: label_maps.Splits
    backbone: nn.Module
    layer: str  # or "patches", or "pixels"
    window: int  # side in pixels
    stride: int
    resize: int
    side: int  # of a patch

    def read(self, images):
        """This process's images and maps: `label_maps.resized`, one by one."""
        function = partial(label_maps.resized, shorter=self.resize)
        return label_maps.each(images, function, self.source.world, self.source.args.workers)

    def on_device(self, pixels: Tensor) -> Tensor:
        """An image, normalised."""
        settings = self.source.settings
        normalize = augment.Normalize(settings["mean"], settings["std"])
        view = augment.View(self.window, [normalize], settings["in_chans"])
        return view.finish(pixels[None], torch.empty(1, 0), self.source.world.device)[0]

    def map_of(self, images: Tensor) -> Tensor:
        """Features of windows, so many at a time, in float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        with self.source.precision:
            return torch.cat([comm.upcast(feature_map(self.backbone, part, self.layer, self.side))
                              for part in images.split(self.source.args.batch_size)])


@torch.no_grad()
def measure(task: Task, score) -> Tensor:
    """`pixel_counts` of all test images; `score` makes scores (n, C, h, w) of feature maps."""
    device, num_classes = task.source.world.device, task.images.num_classes
    counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)
    with comm.same_error_on_all_ranks():
        for _, (pixels, _, classes) in task.read(task.source.test):
            scores = scores_of_pixels(lambda cut: score(task.map_of(cut)), task.on_device(pixels),
                                      task.window, task.stride, task.side)
            if not scores.isfinite().all():
                raise comm.RunError("the scores are not finite; no number can be made of them")
            found = task.images.there[enlarged_argmax(scores, tuple(classes.shape))]
            counts += pixel_counts(found, classes.to(device), num_classes, IGNORED)
    return comm.sum_over_processes(counts)


def tasks(args, world):
    """Yield the name of each checkpoint, and one `Task` for each of its backbones."""
    opened, said = {}, set()
    for checkpoint, settings in features.checkpoints_of(args):
        if settings["bits"] != 8:
            raise comm.RunError(f"{checkpoint.name}: --bits {settings['bits']}; images with label "
                                "maps are read with 8 bits")
        side = patch_side(settings, args.layer)
        if args.image_size is None and settings["image_size"] > 96:
            settings["image_size"] = WINDOW // side * side
        window, channels = settings["image_size"], settings["in_chans"]
        read_as = channels, settings["exif_orientation"]
        if read_as not in opened:
            opened[read_as] = label_maps.Splits(
                settings["data"], channels, args.num_classes, world, args.workers,
                labels=args.labels, ignore=tuple(args.ignore), root=args.data_root,
                download=args.download, limit=args.limit,
                exif_orientation=settings["exif_orientation"])
        images = opened[read_as]
        train, test = images.splits
        resize = args.resize or getattr(train, "native_side", window)
        images.check_patches(resize, side)
        stride = args.stride or max(1, window * 2 // 3)
        if stride > window:
            raise comm.RunError(f"--stride {stride} leaves pixels out: windows have {window}")
        seen = f"windows of {window} px every {stride}"
        if args.windows == "whole":
            seen, window = "whole", max(max(label_maps.fitted(size, resize))
                                        for sizes in images.sizes for size in sizes.tolist())
        protocol = (f"{settings['data']}: {len(train)} training and {len(test)} test images, "
                    f"{images.num_classes} classes, shorter side {resize} px, {seen}, patches of "
                    f"{side}")
        arch = f" ({settings['arch']})" if checkpoint.name == "random" else ""
        source = features.Source(checkpoint.name + arch, args, world, checkpoint, settings, train,
                                 test, said=said)
        source.say(protocol)
        layer = "patches" if settings["arch"] in backbones.VITS else args.layer
        layer = "pixels" if checkpoint.name == "pixels" else layer
        yield source.name, map(partial(Task, source, images, layer=layer, window=window, side=side,
                                       stride=stride, resize=resize), source.backbones())


def evaluate(task: Task, args) -> dict | None:
    """The numbers of one backbone; None if the training of its head was told to stop."""
    before, name, remembered = fingerprint(task.backbone), task.source.name, {}
    if args.method == "knn":
        # 1. Remember patches; 2. neighbours and 3. votes of the test images'
        bank, shares = remember(task, args.memory, args.seed)
        score = partial(knn_scores, bank=bank, shares=shares, k=args.k,
                        temperature=args.temperature)
        remembered = {"memory": len(bank)}
    else:
        score = train_head(task, before or name, args)
        if score is None:
            return None
    counts = measure(task, score)
    if any(comm.any_rank(before != fingerprint(task.backbone))):
        raise comm.RunError(f"{name}: the backbone has changed")
    ious, (right, _, true) = iou(counts), counts.sum(1).tolist()
    return {"layer": task.layer, "miou": ious.nanmean().item(), "accuracy": right / true,
            "per_class": dict(zip(task.images.names, ious.tolist(), strict=True)), **remembered,
            "num_train": len(task.source.train), "num_test": len(task.source.test)}


def main(args):
    world = comm.setup(args.device, deterministic=True)
    comm.print_main(f"k-NN by cosine of patches, k {args.k}, votes softmax(cosine / "
                    f"{args.temperature:g}), --memory {args.memory}"
                    if args.method == "knn" else
                    "linear, DINOv3's protocol: batch norm and 1x1 convolution, AdamW")
    table = []
    for name, of_backbones in list(tasks(args, world)):  # before results of the first can be lost
        runs = []
        for task in of_backbones:
            runs.append(evaluate(task, args))
            if runs[-1] is None:
                return
        table.append({"checkpoint": name, **features.mean_of(runs)})
    features.print_table(["checkpoint", "mean IoU", "pixels right"], [
        [row["checkpoint"], f"{row['miou']:.3f}", f"{row['accuracy']:.3f}"] for row in table])
    features.print_table(["IoU", *(row["checkpoint"] for row in table)], [
        [name, *(f"{row['per_class'][name]:.3f}" for row in table)]
        for name in table[0]["per_class"]])
    features.print_json({"eval": "segmentation", "method": args.method, **table[-1],
                         "checkpoints": table})


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
