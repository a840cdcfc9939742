"""Training with labels: full fine-tuning, with few labels, and the supervised network from scratch.

1. Make one view of every image, as the protocol augments.
2. Write its class as a target of C probabilities, smoothed; mix images and targets in pairs.
3. Cross-entropy, on all weights: the backbone of `--checkpoint` (`random`: a new one) and a new
   linear layer.
4. After the last epoch, count on the central view of every test image.

Letters: N images per process, W processes, C classes (channels, of images), H x W pixels.

The protocols are the papers' (`PROTOCOLS`), but the digits have views of their own; the backbone
and its images are those of the checkpoint. Nothing is chosen on the test images: the last epoch
counts, where SwAV's, Barlow Twins' and VICReg's semi-supervised code reports the best epoch on the
test split, and MMSelfSup the best of a grid. `--sweep` chooses rates on a tenth of the training
images, which it leaves out, and then trains on all. `--train-fraction` and `--train-images` take
class-balanced parts, a smaller one inside a larger one; `--subset-list` the files that a list
names, such as SimCLR's 1 % and 10 %.

With `--labels` the classes are given numbers, one for each image of pre-training, as ClusterFit's;
of several rows the first; an image with a negative number is left out. The test images have no such
class, so what is reported is `train_top1`, on the images trained on, and `top1` is null.

Differs from the official codes: images are mixed with partners of the same process (the reversed
part of the batch), by one lambda for all processes; the warm-up of a schedule by epochs rises every
step; erasing draws its noise from one long row. Left out of `deit`: repeated augmentation and the
moving average of the weights. In `backbone.pth` of a protocol that pools patches, `norm` is the
layer norm behind the pool, as it is where the evaluations load MAE's fine-tuned weights.

    python finetune.py --checkpoint runs/simclr-digits-resnet_tiny
    python finetune.py --checkpoint random --train-images 10 --epochs 200 --lr 0.1
    torchrun --nproc_per_node=8 finetune.py --checkpoint runs/mae --protocol mae --data in1k
    python finetune.py --checkpoint runs/swav --protocol semi_swav --train-fraction 0.01
"""

import argparse
import contextlib
import math
import os
import re
import sys
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, features, labelled, optim, rng
from common.training import Training

# Rates are per 256 images, head_lr that of the linear layer (None: lr). schedule: "cosine" every
# step, "epochs": once an epoch, or the epochs at which the rate is multiplied by gamma. pool: what
# the linear layer sees, "usual": the backbone's output. head_std: of its weights; None: torch's.
VISSL = dict(  # full fine-tuning: Goyal et al., arXiv 1905.01235; VISSL, fulltune
    optimizer="nesterov", lr=0.1, head_lr=None, weight_decay=0.0, decay_norms=False,
    batch_size=256, epochs=105, warmup_epochs=0, start_lr=0.0, final_lr=0.0,
    schedule=[30, 60, 90, 100], gamma=0.1, layer_decay=1.0, drop_path=0.0, sync_bn=False,
    pool="usual", head_std=None, views="photo", crop_scale=[0.08, 1.0], interpolation="bilinear",
    jitter=[0.0, 0.0, 0.0, 0.0], rand_augment=False, erasing=0.0, mixup=0.0, cutmix=0.0,
    smoothing=0.0,
)
MAE = VISSL | dict(  # He et al., arXiv 2111.06377, appendix A.2; facebookresearch/mae, FINETUNE.md:
    # ViT-B 83.6 (the paper's text has rate 1e-3 and layer decay .75); others: `SIZES`
    optimizer="adamw", lr=5e-4, weight_decay=0.05, batch_size=1024, epochs=100, warmup_epochs=5,
    final_lr=2.5e-7, schedule="cosine", layer_decay=0.65, drop_path=0.1, pool="patches",
    head_std=2e-5, interpolation="bicubic", rand_augment=True, erasing=0.25, mixup=0.8, cutmix=1.0,
    smoothing=0.1,
)
SEMI = VISSL | dict(optimizer="sgd", epochs=20, schedule="epochs")
PROTOCOLS = {
    "vissl": VISSL,
    "mae": MAE,
    # Touvron et al., arXiv 2012.12877; facebookresearch/deit, main.py: ViT-B 81.8
    "deit": MAE | dict(lr=2.5e-4, epochs=300, start_lr=2.5e-7, final_lr=2.5e-6, schedule="epochs",
                       layer_decay=1.0, pool="usual", head_std=0.02),
    # torchvision's references/classification, first weights of ResNet-50: 76.1
    "supervised": VISSL | dict(optimizer="sgd", weight_decay=1e-4, decay_norms=True, epochs=90,
                               schedule=[30, 60]),
    # Caron et al., arXiv 2006.09882; facebookresearch/swav, eval_semisup.py: 53.9 with 1 % of the
    # labels; with 10 %, 70.2, `--lr 0.01 --head-lr 0.2`
    "semi_swav": SEMI | dict(lr=0.02, head_lr=5.0, schedule=[12, 16], gamma=0.2, sync_bn=True),
    # Zbontar et al., arXiv 2103.03230; facebookresearch/barlowtwins, evaluate.py: 55.0; 69.7, with
    # the same rates by the authors' word
    "semi_barlow_twins": SEMI | dict(lr=0.005, head_lr=0.5, head_std=0.01),
    # Bardes et al., arXiv 2105.04906; facebookresearch/vicreg, evaluate.py: 54.8; with 10 %, 69.5,
    # `--lr 0.01 --head-lr 0.1`
    "semi_vicreg": SEMI | dict(lr=0.03, head_lr=0.08, head_std=0.01),
    # VISSL, semi-supervised ImageNet; PIRL's has rate .01
    "semi_vissl": VISSL | dict(lr=0.05, epochs=70, schedule=[30]),
    # VISSL, low_shot_transfer: 1,000 images of each data set (`--train-images 1000`)
    "low_shot": VISSL | dict(weight_decay=5e-4, epochs=90, schedule=[30, 60], views="whole"),
    # Yan et al., arXiv 1912.03330, second step; VISSL, clusterfit. The warm-up starts at a quarter:
    # its file has .25, which is more than the rate.
    "clusterfit": VISSL | dict(optimizer="sgd", weight_decay=1e-4, warmup_epochs=5, start_lr=0.025,
                               jitter=[0.4, 0.4, 0.4, 0.2]),
    # Ours, for small images.
    "small": VISSL | dict(lr=0.2, weight_decay=5e-4, batch_size=128, epochs=60, warmup_epochs=5,
                          schedule="cosine", crop_scale=[0.3, 1.0], interpolation="bicubic",
                          smoothing=0.1),
}
SIZES = {  # the papers' other columns; what is not there has ViT-B's numbers
    ("mae", "vit_large"): dict(lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.2),  # 85.9
    ("mae", "vit_huge"): dict(lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.3),  # 86.9
    ("mae", "vit_micro"): dict(  # ours, for the digits
        lr=4e-3, batch_size=128, epochs=100, layer_decay=0.75, drop_path=0.0, erasing=0.0),
}
STARTS = {  # of `random`, beside features.DIGITS and features.FOLDER
    "cifar10": dict(arch="resnet18", stem="small", image_size=32, patch_size=4,
                    mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616]),
}
TRANSFORMERS = {"digits": "vit_micro", "cifar10": "vit_small"}  # where a protocol wants one
DIGIT_VIEWS = dict(views="digits", crop_scale=[0.6, 1.0])
NOT_MIRRORED = ("digits", "gtsrb", "mnist", "sst2", "svhn")  # mirrored, it is another sign


def parse_args(argv=None):
    parser = cli.parser(__file__, __doc__)
    group = parser.add_argument_group("start")
    group.add_argument("--checkpoint", metavar="WHAT", required=True,
                       help="run folder or weights file to start from, or random")
    group.add_argument("--freeze-blocks", type=cli.nonneg_int, default=0, metavar="K",
                       help="do not train the stem and the first K blocks (of a ResNet: stages)")
    features.backbone_flags(group)
    group = parser.add_argument_group("images (default: all to train on)")
    labelled.image_flags(group)
    group.add_argument("--image-size", type=cli.pos_int, help="side in pixels")
    cli.channel_flags(group)
    group = parser.add_argument_group("protocol")
    group.add_argument("--protocol", choices=PROTOCOLS, help="named defaults; needed, except for "
                       "digits and cifar10: there small, or for a transformer mae. One of")
    group.add_argument("--crop-scale", type=cli.fraction, nargs=2,
                       help="smallest, largest area fraction of a crop")
    group.add_argument("--flip", action=cli.Switch,
                       help="mirror half of the crops; default: yes, but for digits, signs, text")
    group.add_argument("--rand-augment", action=cli.Switch, help="two random operations an image")
    group.add_argument("--erasing", type=cli.fraction, help="chance of a box of noise")
    group.add_argument("--mixup", type=cli.not_negative, help="alpha of mixup; 0: none")
    group.add_argument("--cutmix", type=cli.not_negative, help="alpha of cutmix; 0: none")
    group.add_argument("--smoothing", type=cli.fraction, help="share of a target for all classes")
    group.add_argument("--sync-bn", action=cli.Switch, help="synchronised batch norm")
    group.add_argument("--drop-path", type=cli.fraction, help="stochastic depth of a transformer")
    cli.length_flags(group)
    group.add_argument("--head-lr", type=cli.positive, help="the linear layer's, if not --lr")
    group.add_argument("--layer-decay", type=cli.fraction,
                       help="a block's rate as a share of the next one's")
    labelled.sweep_flags(group)

    # What the checkpoint and the protocol say, then the flags
    checkpoint = cli.peek(argv, "--checkpoint", str) or "random"
    if checkpoint == "pixels":
        parser.error("--checkpoint pixels has no weights; give a run folder, a file or random")
    given = features.Checkpoint(checkpoint, None, {})
    with contextlib.suppress(comm.RunError):  # nothing of that name: `main` says so
        given = features.resolve_checkpoint(checkpoint)
    try:
        data = cli.peek(argv, "--data", str) or given.settings.get("data", "digits")
        protocol = cli.peek(argv, "--protocol", str)
        if given.weights is None:
            start = STARTS.get(data, {})
            if PROTOCOLS.get(protocol, VISSL)["optimizer"] == "adamw":
                start = start | {"arch": TRANSFORMERS.get(data, "vit_base")}
            given = replace(given, settings=start)
        arch = cli.peek(argv, "--arch", str) or given.settings.get("arch", "")
        if protocol is None and data in ("digits", "cifar10"):
            protocol = "mae" if arch.startswith("vit") else "small"
        parser.set_defaults(data=data, protocol=protocol, **{
            **PROTOCOLS.get(protocol, {}), **SIZES.get((protocol, arch), {}),
            **(DIGIT_VIEWS if data == "digits" else {})})
        args = parser.parse_args(argv)
        if given.weights is None:  # then a flag contradicts nothing
            given = replace(given, settings={
                name: value for name, value in start.items() if getattr(args, name) is None})
        vars(args).update(features.evaluation_settings(args, [given]))
        if given.weights and args.arch in backbones.VITS and "arch" not in given.settings:
            vars(args).update(features.parts_in(given.weights, vars(args)))
    except comm.RunError as error:
        parser.error(str(error))
    if protocol is None:
        parser.error(f"--protocol: choose one for --data {cli.as_given(data)}: "
                     f"{' '.join(PROTOCOLS)}")
    labelled.check_flags(parser, args, argv)
    cli.check_arch_flags(parser, args, argv)
    if args.flip is None:
        args.flip = cli.as_given(data) not in NOT_MIRRORED
    if isinstance(args.schedule, list):  # in shares of the published epochs
        published = PROTOCOLS[protocol]["epochs"]
        args.schedule = [at * args.epochs / published for at in args.schedule]
    depth = 4 if args.arch in backbones.RESNETS else backbones.VIT_SIZES.get(args.arch, (0, 0))[1]
    if args.freeze_blocks > depth:
        parser.error(f"--freeze-blocks {args.freeze_blocks}: {args.arch} has {depth}")
    if args.arch not in backbones.VITS:
        for flag, without in (("pool", "usual"), ("layer_decay", 1.0), ("drop_path", 0.0)):
            if getattr(args, flag) != without:
                parser.error(f"--protocol {protocol} ({flag.replace('_', ' ')} "
                             f"{getattr(args, flag)}) is for {' '.join(backbones.VITS)}, not for "
                             f"{args.arch}")
    if args.bits == 16 and args.rand_augment:
        parser.error("--bits 16: RandAugment knows 8 bits; pass --no-rand-augment")
    if args.views == "whole" and cli.peek(argv, "--crop-scale", str):
        parser.error(f"--crop-scale: --protocol {protocol} does not crop")
    if args.output is None:
        source, start = (re.sub(r"\.\w+$", "", os.path.basename(os.path.normpath(name)))
                         for name in (cli.source_name(args.data), args.checkpoint))
        labels = args.labels and os.path.basename(os.path.dirname(os.path.abspath(args.labels)))
        part = args.train_fraction or args.train_images
        parts = "finetune", source, protocol, labels, part, start
        args.output = os.path.join("runs", "-".join(str(part) for part in parts if part))
    cli.check(parser, args)
    return args


# -------------------------------------------------------------------------------------------- views


def build_views(args):
    size, interpolation = args.image_size, args.interpolation
    ratio = (3 / 4, 4 / 3)
    if args.views == "digits":
        steps = [augment.RandomAffine(degrees=15, translate=0.1, scale=(0.8, 1.2), shear=10, fill=0,
                                      interpolation="bilinear"),
                 augment.RandomResizedCrop(args.crop_scale, ratio, interpolation)]
    elif args.views == "whole":
        steps = [augment.Resize(interpolation)]
    else:
        steps = [augment.RandomResizedCrop(args.crop_scale, ratio, interpolation)]
    steps.append(augment.HorizontalFlip(p=0.5 if args.flip else 0.0))
    if args.rand_augment:  # timm's rand-m9-mstd0.5-inc1
        steps.append(augment.RandAugment(
            num_ops=2, magnitude=9, deviation=0.5, p=0.5, interpolation=interpolation,
            fill=tuple(min(255, round(255 * mean)) for mean in args.mean)))
    steps += [
        augment.ColorJitter(*args.jitter, p=1.0 if any(args.jitter) else 0.0),
        augment.Normalize(args.mean, args.std),
        augment.RandomErasing(size, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), p=args.erasing),
    ]
    return [augment.View(size, steps, args.in_chans)]


def test_view(args):
    """The central crop, or the whole image where it is trained on."""
    if args.views != "whole":
        return features.central_view(vars(args), augment.CenterCrop, args.interpolation)
    steps = [augment.Resize(args.interpolation), augment.Normalize(args.mean, args.std)]
    return augment.View(args.image_size, steps, args.in_chans)


# -------------------------------------------------------------------------------------------- model


class Classifier(nn.Module):
    """A backbone and a linear layer on its output, or on its patches' mean behind `norm`."""

    def __init__(self, backbone: nn.Module, num_classes: int, pool: str, head_std: float | None):
        super().__init__()
        self.backbone, self.pool = backbone, pool
        self.head = nn.Linear(backbone.num_features, num_classes)
        if head_std is not None:
            nn.init.normal_(self.head.weight, std=head_std)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C)."""
        if self.pool == "usual":
            return self.head(self.backbone(images))
        patches = self.backbone.embed(images)
        x = self.backbone.with_first_tokens(patches)
        bias = self.backbone.position_bias(self.backbone.grid_of(*images.shape[2:]))
        for block in self.backbone.blocks:
            x = block(x, bias)
        return self.head(self.backbone.norm(x[:, -patches.shape[1]:].mean(1)))


# --------------------------------------------------------------------------------------------- loss


def smooth(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Targets (N, C) of labels (N,): a share `smoothing` is spread evenly over all classes."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)


def mix(images: Tensor, targets: Tensor, lambda_: float, box=None) -> tuple[Tensor, Tensor]:
    """Mix every image and its target with its partner's, in the reversed batch.

    Args:
        images: (N, C, H, W). targets: (N, K) probabilities.
        lambda_: share of the own image, in [0, 1].
        box: None: the images are blended (mixup); (top, left, bottom, right) in pixels, the last
            two excluded: the partner's pixels stand in it, and the share of the targets is that of
            the pixels that were kept, whatever `lambda_` (CutMix).

    Reference: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899; partners: timm.
    """
    partners = images.flip(0)
    if box is None:
        mixed = lambda_ * images + (1 - lambda_) * partners
    else:
        top, left, bottom, right = box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        lambda_ = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    return mixed, lambda_ * targets + (1 - lambda_) * targets.flip(0)


def draw_mix(draw: np.random.Generator, mixup: float, cutmix: float, side: int):
    """`lambda_` and `box` of `mix` for a batch: one of the two kinds, with equal chances if both.

    lambda ~ Beta(alpha, alpha); a box has sides sqrt(1 - lambda) of the image's, a centre anywhere,
    and ends at the image's rim.
    """
    cut = cutmix > 0 and (mixup == 0 or draw.random() < 0.5)
    alpha = cutmix if cut else mixup
    lambda_ = float(draw.beta(alpha, alpha))
    if not cut:
        return lambda_, None
    half, centres = int(side * math.sqrt(1 - lambda_)) // 2, draw.integers(side, size=2).tolist()
    return lambda_, (*(max(0, c - half) for c in centres), *(min(side, c + half) for c in centres))


@torch.no_grad()
def indicators(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logged, of this process's part of the batch."""
    return {"accuracy": (logits.argmax(1) == labels).float().mean()}  # mixed images included


# --------------------------------------------------------------------------------------- optimiser


def layer_scale_of(name: str, depth: int, decay: float) -> float:
    """The factor of a parameter's learning rate: decay^(depth + 1 - its layer).

    Layer 0 are tokens, positions and the embedding of patches, i + 1 is block i, and depth + 1 the
    rest, the last norm included.

    Args:
        name: in timm's layout. depth: number of blocks.

    Reference: Bao et al., arXiv 2106.08254; MAE, util/lr_decay.py.
    """
    layer = depth + 1
    if re.match(r"(cls_token|pos_embed|patch_embed|mask_token|reg_token|register_tokens)", name):
        layer = 0
    elif found := re.match(r"blocks\.(\d+)", name):
        layer = int(found[1]) + 1
    return decay ** (depth + 1 - layer)


def parameter_groups(model: Classifier, weight_decay: float, decay_norms: bool, head_scale: float,
                     layer_decay: float) -> list[dict]:
    """Trainable parameters by `lr_scale`, their factor of the learning rate, and weight decay.

    Decay is of weights alone, not of biases, norms, positions and tokens, unless `decay_norms`.
    """
    groups, depth = {}, len(getattr(model.backbone, "blocks", ()))
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("backbone.")
            plain = p.ndim < 2 or name in ("cls_token", "reg_token", "pos_embed")
            scale = head_scale if name.startswith("head.") else (
                layer_scale_of(name, depth, layer_decay))
            decay = 0.0 if plain and not decay_norms else weight_decay
            groups.setdefault((scale, decay), []).append(p)
    return [{"params": params, "lr_scale": scale, "weight_decay": decay}
            for (scale, decay), params in groups.items()]


def learning_rates(schedule, lr: float, *, start: float, final: float, gamma: float, epochs: int,
                   warmup_epochs: int, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step, after a linear warm-up from `start`; see `PROTOCOLS`."""
    if schedule == "cosine":
        return optim.warmup_cosine(start=start, base=lr, final=final, warmup_endpoint=False,
                                   warmup_steps=warmup_epochs * steps_per_epoch,
                                   total_steps=epochs * steps_per_epoch)
    kind = "cosine" if schedule == "epochs" else schedule
    return optim.lr_by_epoch(lr, kind, epochs, warmup_epochs, steps_per_epoch, final / lr, start,
                             gamma)


# --------------------------------------------------------------------------------------------- main


def train(args, world, images, num_classes: int) -> Classifier | None:
    """Train a classifier to its last epoch; None if it was told to stop."""
    torch.manual_seed(args.seed)
    labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))
    fits = len(images) - len(images) % world.size
    if 0 < fits < args.batch_size:
        comm.print_main(f"--batch-size {args.batch_size} lowered to the {fits} images that there "
                        "are")
        args = argparse.Namespace(**vars(args) | {"batch_size": fits})

    # Model
    backbone = features.build(vars(args), positions="learned", drop_path=args.drop_path)
    model = Classifier(backbone, num_classes, args.pool, args.head_std)
    model = comm.prepare(model, world, args.sync_bn)
    backbones.freeze_blocks(backbone, args.freeze_blocks)
    if args.compile:
        backbones.compile(model)

    # Optimiser
    lr, start_lr, final_lr = (rate * args.batch_size / 256
                              for rate in (args.lr, args.start_lr, args.final_lr))
    head_scale = (args.head_lr or args.lr) / args.lr
    groups = parameter_groups(model, args.weight_decay, args.decay_norms, head_scale,
                              args.layer_decay)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9,
                                    nesterov=args.optimizer == "nesterov")
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    repeated = cli.settings(args) | {"subset_list": None, "test_data": None, "sweep": None,
                                     "sweep_head": None, "labels": zlib.crc32(labels.numpy())}
    with Training(args, world, images, build_views(args), chance_loss=math.log(num_classes),
                  settings=repeated, start="checkpoint") as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        if run.step == 0 and args.pool == "patches":
            backbone.norm.reset_parameters()  # new, as the linear layer is
        ddp_model = comm.data_parallel(model)
        lr_of_step = learning_rates(
            args.schedule, lr, start=start_lr, final=final_lr, gamma=args.gamma, epochs=args.epochs,
            warmup_epochs=args.warmup_epochs, steps_per_epoch=run.steps_per_epoch)
        for step, batch in run.steps(export=model.backbone):  # 1. one view
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            mixed, truth = batch.views[0], comm.send(labels[batch.index], world.device)
            targets = smooth(truth, num_classes, args.smoothing)
            if args.mixup or args.cutmix:  # 2. targets, mixed in pairs
                draw = rng.philox(args.seed, rng.MIX, step)
                drawn = draw_mix(draw, args.mixup, args.cutmix, args.image_size)
                mixed, targets = mix(mixed, targets, *drawn)
            with autocast():
                logits = ddp_model(mixed)
            loss = F.cross_entropy(comm.upcast(logits), targets)  # 3. cross-entropy
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], partial(indicators, logits, truth))
        if run.folder.stopping:
            return None
    comm.copy_from_first(*model.buffers())  # which are saved
    return model.eval()


def test(model: Classifier, images, args, world) -> dict:
    """Share of the images whose class is the first, or among the first five, of more than five."""
    labels = torch.from_numpy(np.asarray(images.labels, dtype=np.int64))

    def correct(views, truth):
        logits = model(views)
        return {"right": torch.stack([features.share_right(logits, truth, min(k, logits.shape[1]))
                                      for k in (1, 5)], dim=1)}

    right = features.extract(correct, images, test_view(args), world, batch_size=256,
                             workers=args.workers, labels=labels)["right"].double()
    top1, top5 = right.mean(0).tolist()
    num_classes = model.head.out_features
    by_class = right.new_zeros(num_classes).index_add(0, labels, right[:, 0])
    return {"top1": top1, "top5": top5 if num_classes > 5 else None,
            "mean_per_class": labelled.mean_per_class(by_class, images.labels)}


def main(args):
    world = comm.setup(args.device, args.deterministic)
    with comm.same_error_on_all_ranks():
        features.resolve_checkpoint(args.checkpoint, baselines=("random",))
    if args.arch in backbones.VITS and args.optimizer != "adamw":
        comm.print_main(f"warning: the rates of --protocol {args.protocol} are for ResNets, and "
                        f"{args.arch} is a transformer")
    images, test_images, num_classes = labelled.labelled_images(args)

    def accuracy(args, kept, held):
        model = train(args, world, kept, num_classes)
        return None if model is None else test(model, held, args, world)["top1"]

    if args.sweep:
        tried = labelled.sweep(args, images, accuracy)
        if tried is None:
            return
        args.lr, args.head_lr = tried[0]["lr"], tried[0]["head_lr"]
    model = train(args, world, images, num_classes)
    if model is None:
        return
    found = test(model, test_images, args, world)  # 4. count
    line = {"eval": "finetune", "protocol": args.protocol, "checkpoint": args.checkpoint, **found,
            "num_train": len(images), "num_test": len(test_images), "lr": args.lr,
            "head_lr": args.head_lr or args.lr}
    if args.labels:
        line |= {"top1": None, "top5": None, "mean_per_class": None, "train_top1": found["top1"],
                 "num_test": 0}
    if args.sweep:
        line["sweep"] = tried
    top1 = f"{found['top1']:.3f}"
    features.print_table(["", "training top-1" if args.labels else "top-1", "mean per class"], [
        [f"{args.checkpoint} ({args.protocol})", top1, f"{found['mean_per_class']:.3f}"]])
    features.print_json(line)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
