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

import hashlib
import json
import math
import os
import sys

import numpy as np
import torch
from torch import Tensor, nn

from common import augment, backbones, cli, data, dist, features, optim
from common.checkpoint import Run
from common.log import Log

# lr: per 256 images, at the published batch size. schedule: "steps" multiplies by 0.1 at the
# milestones, "epochs" is a cosine to 0 that moves once an epoch, "cosine" one that moves each step.
# norm: batch norm before the linear layer, over all processes. init: of the linear layer's weights.
PROTOCOLS = {
    # He et al., arXiv 1911.05722, section 4.1; facebookresearch/moco, main_lincls.py
    "moco": dict(
        optimizer="sgd", lr=30.0, weight_decay=0.0, batch_size=256, epochs=100, schedule="steps",
        milestones=[60, 80], warmup_epochs=0, norm="none", init="normal", crop="bilinear",
        resize="bilinear",
    ),
    # Caron et al., arXiv 2006.09882, appendix; facebookresearch/swav, eval_linear.py. Its std has
    # .228 for .229, as in its pre-training; released weights want `--std 0.228 0.224 0.225`.
    "swav": dict(
        optimizer="sgd", lr=0.3, weight_decay=1e-6, batch_size=256, epochs=100, schedule="epochs",
        milestones=[], warmup_epochs=0, norm="none", init="normal", crop="bilinear",
        resize="bilinear",
    ),
    # Zbontar et al., arXiv 2103.03230, appendix; facebookresearch/barlowtwins, evaluate.py
    "barlow_twins": dict(
        optimizer="sgd", lr=0.3, weight_decay=1e-6, batch_size=256, epochs=100, schedule="epochs",
        milestones=[], warmup_epochs=0, norm="none", init="normal", crop="bilinear",
        resize="bilinear",
    ),
    # Chen et al., arXiv 2002.05709, appendix B.6
    "simclr": dict(
        optimizer="nesterov", lr=0.1, weight_decay=0.0, batch_size=4096, epochs=90,
        schedule="cosine", milestones=[], warmup_epochs=0, norm="none", init="zero",
        crop="bicubic", resize="bicubic",
    ),
    # Caron et al., arXiv 2104.14294, appendix F; facebookresearch/dino, eval_linear.py. Narrow
    # transformers: class tokens of the last four blocks; from width 768 on: last one, mean patch.
    "dino": dict(
        optimizer="sgd", lr=0.001, weight_decay=0.0, batch_size=1024, epochs=100,
        schedule="epochs", milestones=[], warmup_epochs=0, norm="none", init="normal",
        crop="bilinear", resize="bicubic",
    ),
    # He et al., arXiv 2111.06377, appendix A.1; facebookresearch/mae, main_linprobe.py. Its random
    # crop tries once where ours tries ten times; its batch norm is of each GPU's own 512 images; it
    # runs in fp16. ViT-L and ViT-H: 50 epochs, 10 of them warm-up (`--epochs 50` here: 5.6).
    "mae": dict(
        optimizer="lars", lr=0.1, weight_decay=0.0, batch_size=16384, epochs=90,
        schedule="cosine", milestones=[], warmup_epochs=10, norm="plain", init="truncated",
        crop="bicubic", resize="bicubic",
    ),
    # Goyal et al., arXiv 1905.01235; VISSL, eval_resnet_8gpu_transfer_in1k_linear: one head on each
    # of the pooled maps conv1 to res5 and two on the mean of res5, without batch norm and, which
    # counts, with it; no weight decay on the batch norm.
    "vissl": dict(
        optimizer="nesterov", lr=0.01, weight_decay=5e-4, batch_size=256, epochs=28,
        schedule="steps", milestones=[8, 16, 24], warmup_epochs=0, norm="affine", init="torch",
        crop="bilinear", resize="bilinear",
    ),
}
DECAYS = [float(f"{10 ** (half / 2 - 6):.1e}") for half in range(13)]  # 1e-6, 3.2e-6, ... 1
NOT_MIRRORED = ("digits", "mnist", "svhn")  # a mirrored digit is another sign
MANY_IMAGES = 20_000  # from here on, one fifth left out tells enough
LOGITS_AT_A_TIME = 2**25
PLAIN = "-mlp"  # behind a layer's name: its head has no batch norm; VISSL's name for such a head
P_SPREAD = 0.05  # p (1 - p) of a usual probability p: the curvature that a logit is taken to have


def parse_args(argv=None):
    parser = cli.evaluation_parser(__file__, __doc__, backbones.NAMES)
    group = parser.add_argument_group("protocol")
    group.add_argument("--protocol", choices=("auto", *PROTOCOLS), default="auto",
                       help="how the linear layer is trained")
    group.add_argument("--train-fraction", type=cli.share, default=1.0, metavar="SHARE",
                       help="of the training images to train on, by class")
    group = parser.add_argument_group("auto")
    group.add_argument("--weight-decays", type=cli.positive, nargs="+",
                       help="to choose from [1e-6 to 1]")
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
                       help="where each probe gets a folder of its own")
    group.add_argument("--resume", action=cli.Switch, default=True,
                       help="go on from the checkpoint in the folder, where there is one")
    group.add_argument("--save-every-minutes", type=cli.positive, default=15.0, metavar="M",
                       help="save within an epoch as well")
    group.add_argument("--log-every", type=cli.count, default=20, metavar="STEPS",
                       help="steps between two log lines")
    args = cli.parse_evaluation(parser, argv)
    papers = ("epochs", "train_batch_size", "lr", "flip")
    for name in papers if args.protocol == "auto" else ():
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} does not go with --protocol auto")
    for name in ("folds", "weight_decays") if args.protocol != "auto" else ():
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes with --protocol auto only")
    args.folds, args.weight_decays = args.folds or 5, args.weight_decays or DECAYS
    for name in ("features", "save_features") if args.protocol != "auto" else ():
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} goes with --protocol auto only: "
                         f"{args.protocol} makes new crops in every epoch")
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


def cross_entropies(rows, labels, shares, decays, num_classes: int):
    """The functions to minimise: sum of share x cross-entropy + decay / 2 |W|^2 of every head.

    Their value and gradient are of the rows of all processes.

    Args:
        rows: (N, D), this process's. labels: (N,).
        shares: (N, H), weight of a row's loss in each head.
        decays: (H,), of the weights, not of the offsets.

    Returns:
        A function of points (n, (D + 1) C), the weights and offsets of some heads, and which heads
        they are (n,); it gives values (n,) and gradients (n, (D + 1) C).
    """
    d = rows.shape[1]

    def function(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        n = len(which)
        heads = points.view(n, d + 1, num_classes)
        weights = heads[:, :d].transpose(0, 1).reshape(d, n * num_classes)
        offsets = heads[:, d].reshape(-1)
        total = points.new_zeros(n + points.numel())  # values and gradients, to sum in one go
        values, gradient = total[:n], total[n:].view(d + 1, n * num_classes)
        step = max(1, LOGITS_AT_A_TIME // (n * num_classes))
        for own in range(0, len(rows), step):
            x, share = rows[own : own + step], shares[own : own + step, which]
            truth = labels[own : own + step, None, None].expand(-1, n, 1)
            logits = torch.addmm(offsets, x, weights).view(len(x), n, num_classes)
            logits.sub_(logits.gather(2, truth))  # so that a small loss is no small difference
            log_sum = logits.logsumexp(2, keepdim=True)
            values += (share * log_sum[:, :, 0]).sum(0)
            error = (logits - log_sum).exp_()
            error.scatter_add_(2, truth, error.new_full((1, 1, 1), -1).expand_as(truth))
            error = error.mul_(share[:, :, None]).view(len(x), -1)
            gradient[:d] += x.T @ error
            gradient[d] += error.sum(0)
        total = dist.mean_over_processes(total) * dist.size()
        values = total[:n] + decays[which] / 2 * heads[:, :d].square().sum((1, 2))
        gradient = total[n:].view(d + 1, n, num_classes).transpose(0, 1).contiguous()
        gradient[:, :d] += decays[which, None, None] * heads[:, :d]
        return values, gradient.view(n, -1)

    return function


def minimise(
    function, points: Tensor, curvatures: Tensor, *, least: Tensor, tolerance: float,
    iterations: int, memory: int = 10,
) -> Tensor:
    """Minimise several smooth convex functions at once by L-BFGS with backtracking.

    Warns of those that are not minimised in so many iterations, or as far as rounding lets it.

    Args:
        function: of points (n, P) and which functions they are for (n,), to values (n,) and
            gradients (n, P).
        points: where to start, (H, P).
        curvatures: (H, P), above 0: about how strongly each function is curved along each
            coordinate. Right ones save most of the steps.
        least: (H,), above 0: how strongly each function is curved at the least. It tells how far
            above its least value a function is, at most: |gradient|^2 / 2 over it.
        tolerance: the share of its value, or of 0.1 where it is more, that this may be.

    Returns:
        Where the functions are least, (H, P).

    Reference: Liu and Nocedal, 1989; Nocedal and Wright, algorithms 7.4 and 3.1.
    """
    unit = curvatures.rsqrt()  # coordinates in which the curvature is about 1

    def function_of(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = function(x * unit[which], which)
        return value, gradient * unit[which]

    found = points / unit
    left = torch.arange(len(points), device=points.device)  # functions that are not done
    x, (value, gradient) = found.clone(), function_of(found, left)
    steps, changes = x.new_zeros(2, memory, *x.shape)
    curvature = x.new_zeros(memory, len(x))  # 1 / (step . change), 0 where there is none
    stuck, missed = torch.zeros_like(left, dtype=torch.bool), 0
    for iteration in range(iterations):
        above = (gradient / unit[left]).square().sum(1) / 2 / least[left]
        far = ~(above <= tolerance * value.clamp(max=0.1))  # also where they are not numbers
        going = far & ~stuck
        if not going.all():
            found[left] = x
            missed += int((far & stuck).sum())
            left, x, value, gradient = left[going], x[going], value[going], gradient[going]
            if not len(left):
                break
            steps, changes, curvature = steps[:, going], changes[:, going], curvature[:, going]

        # Direction: minus the gradient times the inverse of the Hessian as the last steps show it
        direction, weights = -gradient, {}
        recent = [(iteration - 1 - age) % memory for age in range(min(iteration, memory))]
        for at in recent:
            weights[at] = curvature[at] * (steps[at] * direction).sum(1)
            direction = direction - weights[at][:, None] * changes[at]
        if recent:
            squares = changes[recent[0]].square().sum(1) * curvature[recent[0]]
            direction = direction / torch.where(squares > 0, squares, 1)[:, None]
        for at in reversed(recent):
            back = curvature[at] * (changes[at] * direction).sum(1)
            direction = direction + (weights[at] - back)[:, None] * steps[at]

        # Length: halved, for those functions that need it, until they fall enough
        slope = (gradient * direction).sum(1)
        length = torch.ones_like(value)
        new_x, new_value, new_gradient = x.clone(), value.clone(), gradient.clone()
        trying = torch.arange(len(x), device=x.device)
        for _ in range(30):
            tried = x[trying] + length[trying, None] * direction[trying]
            got, got_gradient = function_of(tried, left[trying])
            falls = got <= value[trying] + 1e-4 * length[trying] * slope[trying]
            fine = trying[falls]
            new_x[fine], new_value[fine] = tried[falls], got[falls]
            new_gradient[fine] = got_gradient[falls]
            trying = trying[~falls]
            if not len(trying):
                break
            length[trying] /= 2
        stuck = torch.zeros_like(left, dtype=torch.bool)
        stuck[trying] = True  # no step falls: as far as rounding lets it

        at = iteration % memory
        steps[at], changes[at] = new_x - x, new_gradient - gradient
        bend = (steps[at] * changes[at]).sum(1)
        curvature[at] = torch.where(bend > 0, 1 / bend, 0)
        x, value, gradient = new_x, new_value, new_gradient
    found[left] = x
    if missed + len(left):
        dist.say(f"warning: {missed + len(left)} of {len(points)} heads are not trained to the end "
                 f"(in {iterations} steps, or as far as rounding lets it)")
    return found * unit


def fold_of(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold (N,) for every image; each has equally many of every class, or one more."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def logits_of(points: Tensor, rows: Tensor, num_classes: int):
    """Yield where a part of the rows starts and the logits (n, H, C) of all heads on it."""
    heads = points.view(len(points), -1, num_classes)
    weights, offsets = heads[:, :-1], heads[:, -1:]
    step = max(1, LOGITS_AT_A_TIME // offsets.numel())
    for start in range(0, len(rows), step):
        yield start, (rows[start : start + step] @ weights + offsets).transpose(0, 1)


def top_1_and_5(logits: Tensor, truth: Tensor) -> Tensor:
    """Whether the true class is the best and among the best five: (N, 2) of (N, C) and (N,)."""
    return torch.stack([features.share_right(logits, truth, min(k, logits.shape[1]))
                        for k in (1, 5)], dim=1)


def of_all(counts: Tensor) -> Tensor:
    """Counts of all processes together."""
    return dist.all_gather_no_grad(counts[None]).sum(0)


def auto_probe(
    train, labels, test, truth, *, decays: list[float], folds: int, num_classes: int, seed: int,
    world: dist.World,
) -> dict:
    """Choose a weight decay on the training rows, train on all of them, count on the test rows.

    Args:
        train: (N, D) and test: (M, D) on the CPU; every process has them and takes its part.
        labels: int64 (N,). truth: int64 (M,).
    """
    # On the CPU in float64, so that no sum's order decides about an image near a border.
    kind = torch.float64 if world.device.type == "cpu" else torch.float32
    center, scale = standardisation(train)

    def own(rows, numbers):
        """This process's part, its standardised rows and its labels."""
        part = slice(*(len(rows) * r // world.size for r in (world.rank, world.rank + 1)))
        x = rows[part].to(world.device, kind, copy=True)
        x.sub_(center.to(x)).mul_(scale.to(x))
        return part, x, torch.from_numpy(numbers[part]).to(world.device)

    part, x, y = own(train, labels)
    axes, variances = principal_axes(x, len(labels))
    x = x @ axes.to(x)

    def trained(decays: Tensor, shares: Tensor) -> Tensor:
        """The heads (H, (D + 1) C) of decays (H,) and shares (N, H)."""
        function = cross_entropies(x, y, shares, decays, num_classes)
        points = x.new_zeros(len(decays), (x.shape[1] + 1) * num_classes)
        spread = torch.full_like(decays, P_SPREAD)[:, None]
        for tolerance in (1.0, 1e-2, 1e-6 if kind == torch.float64 else 1e-3):
            curvatures = torch.cat([spread * variances.to(x) + decays[:, None], spread], dim=1)
            points = minimise(function, points, curvatures.repeat_interleave(num_classes, dim=1),
                              least=decays, tolerance=tolerance, iterations=10_000)
            # Where the loss is small, so are p (1 - p) and the curvature.
            losses, _ = function(points, torch.arange(len(points), device=x.device))
            spread = (0.3 * losses).clamp(max=P_SPREAD)[:, None]
        return points

    # 2. Many heads: every weight decay, with every fold left out
    fold = torch.from_numpy(fold_of(labels, min(folds, len(labels)), seed))
    tried = range(1 if len(labels) > MANY_IMAGES else min(folds, len(labels)))
    heads = [(decay, out) for decay in decays for out in tried]
    used = torch.stack([fold != out for _, out in heads], dim=1)  # (N, H)
    shares = (used.double() / used.sum(0))[part].to(x)
    left_out = ~used[part].to(world.device)
    points = trained(x.new_tensor([decay for decay, _ in heads]), shares)

    # 3. The best of them; once more on all training images
    right = torch.zeros(len(heads), dtype=torch.float64, device=world.device)
    for first, logits in logits_of(points, x, num_classes):
        rows = slice(first, first + len(logits))
        truths = y[rows, None].expand(-1, len(heads))
        right += (features.share_right(logits, truths, 1) * left_out[rows]).sum(0)
    right = of_all(right).view(len(decays), -1).sum(1) / (~used).sum(0)[: len(tried)].sum().item()
    validation, decay = max(zip(right.tolist(), decays, strict=True))  # of equal ones the largest
    shares = x.new_full((len(x), 1), 1 / len(labels))
    points = trained(x.new_tensor([decay]), shares)

    _, x, y = own(test, truth)
    x = x @ axes.to(x)
    hits = torch.zeros(2, dtype=torch.float64, device=world.device)
    for first, logits in logits_of(points, x, num_classes):
        hits += top_1_and_5(logits[:, 0], y[first : first + len(logits)]).sum(0)
    top1, top5 = (of_all(hits) / len(truth)).tolist()
    return {"top1": top1, "top5": top5, "validation": validation, "weight_decay": decay}


def standardisation(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and one over the deviation of features; 0 for a feature that does not vary."""
    mean, square, n = 0, 0, len(rows)
    for part in rows.split(2**16):
        mean = mean + part.double().sum(0) / n
    for part in rows.split(2**16):
        square = square + (part.double() - mean).square().sum(0) / n
    deviation = square.sqrt()
    varies = deviation > 1e-6 * deviation.max()
    return mean, torch.where(varies, 1 / deviation, 0)


def principal_axes(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Principal axes (D, R) and variances (R,) of n centred rows, of which x are this process's.

    In these coordinates the functions to minimise are curved along the axes, and the weight decay
    is what it was. Axes along which nothing varies are left out: their weights would stay 0.
    """
    if x.shape[1] > 4096:  # would take longer than what it saves
        variances = dist.sum_over_processes(x.square().sum(0).double()) / n
        return torch.eye(len(variances), dtype=x.dtype, device=x.device), variances
    covariance = dist.sum_over_processes((x.T @ x).double()) / n
    variances, axes = torch.linalg.eigh(covariance)
    found = torch.cat([axes, variances[None]]).cpu().contiguous()
    dist.share_rows(found, [0] + [len(found)] * dist.size())  # the same ones on every machine
    found = found[:, found[-1] > 1e-12 * found[-1].max()]
    return found[:-1], found[-1]


def evaluate(found: features.Features, args, world) -> dict:
    """`auto` on every layer of one backbone's features."""
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
    known = list(backbones.layer_widths(backbone))
    if protocol == "vissl" and "res5" in known:
        return [*(f"{name}-grid" for name in backbones.GRIDS), f"avgpool{PLAIN}", "avgpool"]
    if protocol == "dino" and "cls" in known:
        return ["cls4"] if backbone.num_features < 768 else ["cls+patches"]
    return known[-1:]


def probed_layers(backbone: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Layers as rows (N, D), by name; `a+b` is a and b side by side, `a-mlp` is a."""
    parts = {name: name.removesuffix(PLAIN).split("+") for name in names}
    flat = backbones.flat_layers(backbone, images, list(dict.fromkeys(sum(parts.values(), []))))
    return {name: torch.cat([flat[p] for p in own], dim=1) for name, own in parts.items()}


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
    widths = backbones.layer_widths(backbone)
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
    scale = epochs / protocol["epochs"]
    if protocol["schedule"] == "cosine":
        warmup = round(protocol["warmup_epochs"] * scale * steps_per_epoch)
        return optim.warmup_cosine(start=0.0, base=base, final=0.0, warmup_steps=warmup,
                                   total_steps=epochs * steps_per_epoch, warmup_endpoint=False)
    if protocol["schedule"] == "steps":
        rates = [base * 0.1 ** sum(e >= m * scale for m in protocol["milestones"])
                 for e in range(epochs)]
    else:
        rates = [base * (1 + math.cos(math.pi * e / epochs)) / 2 for e in range(epochs)]
    return [rate for rate in rates for _ in range(steps_per_epoch)]


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


def paper_probe(backbone, train, test, test_view, settings: dict, mark: str, args, world):
    """Train a protocol's heads on a frozen backbone and test them; None if it was told to stop."""
    protocol = PROTOCOLS[args.protocol]
    epochs = args.epochs or protocol["epochs"]
    batch_size = fit_batch(args.train_batch_size or protocol["batch_size"], len(train))
    if batch_size % world.size:
        raise dist.RunError(f"--train-batch-size {batch_size} does not divide among {world.size} "
                            "processes")
    lr = (args.lr or protocol["lr"]) * batch_size / 256
    flip = settings["data"] not in NOT_MIRRORED if args.flip is None else args.flip
    names = protocol_layers(args.protocol, backbone)
    if args.layers and "pixels" not in names:
        names = args.layers
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1

    # Heads and optimiser
    torch.manual_seed(args.seed)
    size = settings["image_size"]
    blank = torch.zeros(2, settings["in_chans"], size, size, device=world.device)
    try:
        heads = build_heads(backbone, names, blank, num_classes, protocol["norm"], protocol["init"])
    except ValueError as error:
        raise dist.RunError(f"{args.protocol}: {error}") from error
    heads = dist.convert_sync_batchnorm(heads.to(world.device), world.device)
    optimizer = build_optimizer(heads, protocol["optimizer"], lr, protocol["weight_decay"])
    views = train_views(size, settings["in_chans"], protocol["crop"], flip, settings["mean"],
                        settings["std"])
    labels = torch.from_numpy(np.asarray(train.labels, dtype=np.int64))
    dist.say(f"{args.protocol}: {len(train)} images, {epochs} epochs, batch {batch_size}, lr "
             f"{args.lr or protocol['lr']:g} x {batch_size} / 256 = {lr:g}, heads on "
             f"{' '.join(names)}, {'mirrored' if flip else 'unmirrored'} crops")

    changing = dict(
        protocol, protocol=args.protocol, checkpoint=mark, layers=names, epochs=epochs,
        train_batch_size=batch_size, lr=args.lr or protocol["lr"], flip=flip,
        train_fraction=args.train_fraction, seed=args.seed, num_classes=num_classes,
        **{name: settings[name] for name in ("image_size", "in_chans", "mean", "std")},
    )
    share = "" if args.train_fraction == 1 else f"-{args.train_fraction:g}"
    folder = os.path.join(args.output, f"{args.protocol}{share}-{mark}")
    with Run(folder, changing, train, world, resume=args.resume,
             save_every_minutes=args.save_every_minutes, product="heads.pth") as run:
        state = {"heads": heads, "optimizer": optimizer}
        step = run.start(state)
        workers = args.workers if args.workers is not None or train.reads_files else 0
        loader = data.Loader(train, views, batch_size=batch_size, epochs=epochs, seed=args.seed,
                             world=world, workers=workers, start_step=step)
        lr_of_step = learning_rates(protocol, lr, epochs, loader.steps_per_epoch)
        log = Log(folder, world, batch_size=batch_size, total_steps=len(lr_of_step),
                  first_step=step, every=args.log_every,
                  chance_loss=len(names) * math.log(num_classes), floors={})
        for epoch in range(step // loader.steps_per_epoch, epochs):
            for batch in loader.epoch(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = lr_of_step[step]
                with torch.no_grad():  # so many images at a time, whatever the batch
                    parts = [probed_layers(backbone, part, names)
                             for part in batch.views[0].split(args.batch_size)]
                rows = {name: torch.cat([part[name] for part in parts]) for name in names}
                truth = labels[batch.index].to(world.device, non_blocking=True)
                loss = sum(nn.functional.cross_entropy(head(rows[name]), truth)
                           for name, head in heads.items())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for parameter in heads.parameters():
                    parameter.grad = dist.mean_over_processes(parameter.grad)
                optimizer.step()

                step += 1
                log.write(step, epoch=epoch, loss=loss, lr=lr_of_step[step - 1],
                          waited=loader.waited)
                save, stop = run.agree(step % loader.steps_per_epoch == 0)  # the same everywhere
                if save:
                    log.check()
                    run.save(step, state, heads)
                if stop:
                    return None

    # Test
    heads.eval()

    def right(images, truth):
        rows = probed_layers(backbone, images, names)
        return {name: top_1_and_5(head(rows[name]), truth) for name, head in heads.items()}

    workers = args.workers if args.workers is not None else data.default_workers()
    found = features.extract(right, test, test_view, world, batch_size=args.batch_size,
                             workers=workers if test.reads_files else args.workers or 0,
                             labels=torch.from_numpy(np.asarray(test.labels, dtype=np.int64)))
    results = []
    for name, hits in found.items():
        top1, top5 = hits.double().mean(0).tolist()
        results.append({"layer": name, "top1": top1, "top5": top5})
    sizes = {"num_train": len(train), "num_test": len(test)}
    return {"top1": results[-1]["top1"], "top5": results[-1]["top5"], "results": results, **sizes}


def paper_table(args, world, open_split, make_view) -> list[dict] | None:
    """The results of a paper's protocol on every checkpoint; None if it was told to stop."""
    checkpoints = [features.find_checkpoint(name) for name in args.checkpoint]
    shared = features.resolve(args, checkpoints)
    table = []
    for checkpoint in checkpoints:
        settings = dict(shared)
        if checkpoint.weights is not None:
            settings = features.resolve(args, [checkpoint], shared["data"])
        settings["trained_size"] = checkpoint.settings.get("image_size", settings["image_size"])
        train, test = (open_split(settings, split) for split in ("train", "test"))
        if train.labels is None or test.labels is None:
            raise dist.RunError(f"--data {settings['data']}: no class folders, so no labels")
        if args.train_fraction < 1:
            train = train.subset(class_balanced(train.labels, args.train_fraction, args.seed))
        view, words = make_view(settings)
        dist.say(f"{settings['data']}: {len(train)} training and {len(test)} test images of "
                 f"{settings['image_size']} px ({words} in the test)")
        runs = []
        for backbone in features.models(checkpoint, settings, backbones.build_frozen, args.seed,
                                        world):
            watched = Watched()
            watched.watch(backbone)
            mark = watched.before or checkpoint.name
            runs.append(paper_probe(backbone, train, test, view, settings, mark, args, world))
            if runs[-1] is None:
                return None
            watched.check(checkpoint.name)
        table.append({"checkpoint": checkpoint.name, **features.mean_of(runs)})
    return table


# ------------------------------------------------------------------------------------ frozen or not


def fingerprint(backbone: nn.Module) -> str | None:
    """Twelve hexadecimal digits of all parameters and buffers, bit for bit; None without any."""
    if not backbone.state_dict():
        return None
    found = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        found.update(name.encode())
        found.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


class Watched:
    """Tells whether a backbone is after its use what it was before."""

    def __init__(self):
        self.backbone, self.before = None, None

    def watch(self, backbone: nn.Module) -> None:
        self.backbone, self.before = backbone, fingerprint(backbone)

    def layers(self, backbone: nn.Module, images: Tensor, names) -> dict[str, Tensor]:
        """`backbones.flat_layers` of a backbone that is watched from here on."""
        if backbone is not self.backbone:
            self.watch(backbone)
        return backbones.flat_layers(backbone, images, names)

    def check(self, name: str) -> None:
        """Print the hashes before and after. A process may have had no image, so no backbone.

        Raises:
            RunError: they differ.
        """
        pair = self.before, None if self.backbone is None else fingerprint(self.backbone)
        for before, after in dict.fromkeys(dist.all_gather_objects(pair)):
            if before:
                dist.say(f"{name}: hash of the backbone {before} before, {after} after")
            if before != after:
                raise dist.RunError(f"{name}: the backbone has changed")
        self.backbone, self.before = None, None


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = dist.setup(args.device, deterministic=True)
    protocol = PROTOCOLS.get(args.protocol)

    def open_split(settings, split):
        return data.open_images(settings["data"], split, settings["in_chans"],
                                root=args.data_root, download=args.download,
                                limit=args.limit)

    def make_view(settings):
        resize = features.resize_of(settings, args.resize)
        interpolation = protocol["resize"] if protocol else "bicubic"
        steps = [
            augment.CenterCrop(resize, interpolation=interpolation),
            augment.Normalize(settings["mean"], settings["std"]),
        ]
        view = augment.View(settings["image_size"], steps, settings["in_chans"])
        return view, f"shorter side to {resize}, central crop"

    if protocol:
        table = paper_table(args, world, open_split, make_view)
        if table is None:
            return
    else:
        dist.say(f"linear probe: standardised features, L-BFGS, weight decay of "
                 f"{len(args.weight_decays)} on {args.folds} parts of the training images")
        table, watched = [], Watched()
        for name, found in features.sources(args, world, open_split=open_split, make_view=make_view,
                                            build=backbones.build_frozen, layers=watched.layers,
                                            default_workers=data.default_workers()):
            runs = []
            for one in found:
                watched.check(name)
                runs.append(evaluate(one, args, world))
            table.append({"checkpoint": name, **features.mean_of(runs)})

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
