"""I-JEPA: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture,
arXiv 2301.08243.

1. Make one view of every image, a crop, and cut it into patches.
2. Draw four small blocks of patches, the targets, and a large one, the context, without the
   targets' patches.
3. Encode the whole image with the target encoder. No gradient goes there.
4. Encode the context alone; from it a light transformer predicts each target block, given where it
   is: mask tokens with the positions of its patches.
5. Compare with the target encoder's normalised features, in place of MAE's pixels.
6. Move the target encoder a little towards the encoder (EMA), less and less over the run.

Letters: N images per process, L patches of an image, D backbone width, E predictor width, T target
blocks, K patches of the context, M of a target block.

The export is the target encoder, without class token: evaluate `--layers patches`. Collapse does
not show in the loss, which then goes to 0: watch `z_std`.

As in the official code (facebookresearch/ijepa), unlike the paper's text: one number decides both
the area and the aspect of a block, so they rise together; blocks never touch the last row and
column; contexts are cut to the smallest of a batch by leaving out their last patches, so they lose
the bottom of the image; attention's and perceptron's last weights start like all others, for the
code that divides them by sqrt(2 layer) is undone by what it calls next. Differs from it: the batch
whose smallest context counts is the global one, there a process's; sizes and places depend on seed,
step, epoch and image alone; a target block may have few patches, where the code never ends; the
patches' projection starts as torch's convolutions do, which for 16 x 16 x 3 is the code's standard
deviation of 0.02, and makes small patches count beside their positions.

    python ijepa.py
    torchrun --nproc_per_node=8 ijepa.py --data /path/to/imagenet --output runs/ijepa
"""

import copy
import functools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim, rng
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # the official configuration
    arch="vit_huge", class_token=False, patch_size=14, image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.3, 1.0],
    num_targets=4, min_keep=10, predictor_dim=384, predictor_depth=12, momentum=0.996,
    epochs=300, stretch=1.0, batch_size=2048, lr=1.25e-4, start_lr=2.5e-5, final_lr=1.25e-7,
    weight_decay=0.04, final_weight_decay=0.4, warmup_epochs=40,
)
RECIPES = {
    "imagenet": IMAGENET,
    # That of amirbar/StoP, by people around the authors, who published none.
    "imagenet_base": IMAGENET | dict(
        arch="vit_base", patch_size=16, predictor_depth=6,
        epochs=600, lr=1e-4, final_lr=1.25e-5, warmup_epochs=15,
    ),
    # Ours, not promised: no one has published numbers of small images.
    "cifar10": IMAGENET | dict(
        arch="vit_small", patch_size=4, image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        min_keep=4, predictor_dim=192, predictor_depth=6,
        epochs=600, batch_size=256, lr=5e-4, start_lr=1e-4, final_lr=1e-6, warmup_epochs=15,
    ),
    # Ours, chosen on the built-in digits. In batches of 64 and 128, at higher rates or with a
    # faster target, features collapse in part within 300 steps, and recover slowly.
    "digits": IMAGENET | dict(
        arch="vit_micro", patch_size=4, image_size=16, mean=[0.3], std=[0.38],
        views="digits", crop_scale=[0.6, 1.0],
        num_targets=2, min_keep=4, predictor_dim=96, predictor_depth=2,
        epochs=220, stretch=1.5, batch_size=256, lr=2e-3, start_lr=2e-4, final_lr=1e-5,
        warmup_epochs=10,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.VITS, crops="one",
                                      batch_norm=False)
    group.add_argument("--patch-size", type=cli.pos_int, help="side of a patch in pixels")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--num-targets", type=cli.pos_int, help="T, target blocks of an image")
    group.add_argument("--min-keep", type=cli.nonneg_int, metavar="PATCHES",
                       help="a context has more than these; fewer for coarse grids")
    group.add_argument("--predictor-dim", type=cli.pos_int, help="E, width of the predictor")
    group.add_argument("--predictor-depth", type=cli.pos_int, help="blocks of the predictor")
    group.add_argument("--momentum", type=cli.fraction, help="EMA momentum of the target in the "
                       "first step, a line takes it to 1; lower for short runs")
    group.add_argument("--start-lr", type=cli.not_negative, help="per 256 images, first step")
    group.add_argument("--final-lr", type=cli.not_negative, help="per 256 images, at the end")
    group.add_argument("--final-weight-decay", type=cli.not_negative, help="to which a cosine goes")
    group.add_argument("--stretch", type=cli.positive, help="schedules are those of a run so many "
                       "times as long, which ends early; at least 1")
    args = cli.parse(parser, RECIPES, argv)
    cli.check_patches(parser, args)
    side = args.image_size // args.patch_size
    least = math.prod(block_sizes(0.0, 0.0, side, side)[1])
    if least <= args.min_keep:
        parser.error(f"--patch-size {args.patch_size} makes {side} x {side} patches, whose context "
                     f"block may have {least}, not more than --min-keep {args.min_keep}; use "
                     "smaller patches, or a smaller --min-keep")
    heads = backbones.VIT_SIZES[args.arch][2]
    if args.predictor_dim % 4 or args.predictor_dim % heads:
        parser.error(f"--predictor-dim {args.predictor_dim} is not a multiple of 4 and of the "
                     f"{heads} heads of {args.arch}")
    if args.stretch < 1:
        parser.error(f"--stretch {args.stretch:g} is less than 1")
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(image_size, crop_scale):
    """One view: a crop, neither mirrored nor changed in colour (paper, appendix A.1)."""
    return [(image_size, [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
    ])]


# -------------------------------------------------------------------------------------------- masks


def block_sizes(r_target: float, r_context: float, rows: int, columns: int
                ) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of target blocks and of context blocks, from uniform numbers (0 to 1)."""

    def size(r, scale, aspect):
        area = int(rows * columns * (scale[0] + r * (scale[1] - scale[0])))
        ratio = aspect[0] + r * (aspect[1] - aspect[0])  # of the same r as the area
        return (min(round(math.sqrt(area * ratio)), rows - 1),
                min(round(math.sqrt(area / ratio)), columns - 1))

    return size(r_target, (0.15, 0.2), (0.75, 1.5)), size(r_context, (0.85, 1.0), (1.0, 1.0))


def sample_masks(rng: np.random.Generator, rows: int, columns: int, sizes=None,
                 num_targets: int = 4, min_keep: int = 10) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw the blocks of an image of rows x columns patches.

    Args:
        sizes: `block_sizes` of the image's batch; drawn as well if not given.
        num_targets: T.
        min_keep: a context has more patches. After every 20 blocks that leave no more, it may
            overlap one target more, the last first.

    Returns:
        Rising indices of patches, row by row: the context's, and those of each target.

    Raises:
        ValueError: the whole context block has no more than min_keep patches.

    Reference: section 3, and the official code.
    """
    target, context = sizes or block_sizes(rng.random(), rng.random(), rows, columns)
    if math.prod(context) <= min_keep:
        raise ValueError(f"a context block of {context[0]} x {context[1]} in {rows} x {columns} "
                         f"patches has no more than {min_keep}")

    def block(height, width):  # the upper ends are excluded: not in the last row and column
        top, left = rng.integers(rows - height), rng.integers(columns - width)
        return (np.arange(top, top + height)[:, None] * columns + np.arange(left, left + width))

    targets = [block(*target).ravel() for _ in range(num_targets)]
    for tries_left in range(20 * num_targets, -1, -1):
        is_free = np.ones(rows * columns, dtype=bool)
        for other in targets[: math.ceil(tries_left / 20)]:
            is_free[other] = False
        kept = block(*context).ravel()
        kept = kept[is_free[kept]]
        if len(kept) > min_keep:
            return kept, targets


def draw_masks(index: Tensor, step: int, *, seed: int, steps_per_epoch: int, rows: int,
               columns: int, num_targets: int, min_keep: int) -> list[Tensor]:
    """Masks of a step for the images of index (N,), on whatever process.

    Returns:
        Context (N, K), cut to the first K of each, and targets (N, T, M).
    """
    batch = rng.philox(seed, rng.MASK, step, 0, 1)  # never an image's key
    sizes = block_sizes(batch.random(), batch.random(), rows, columns)
    epoch = step // steps_per_epoch
    contexts, targets = zip(*(
        sample_masks(rng.philox(seed, rng.MASK, epoch, i), rows, columns, sizes, num_targets,
                     min_keep) for i in index.tolist()), strict=True)
    fewest = min(map(len, contexts))
    return [torch.from_numpy(np.stack([context[:fewest] for context in contexts])),
            torch.from_numpy(np.array(targets))]


# -------------------------------------------------------------------------------------------- model


class IJEPA(nn.Module):
    """An encoder of the context, and a predictor D -> E -> D of the target blocks."""

    def __init__(self, backbone: nn.Module, predictor_dim: int, predictor_depth: int):
        super().__init__()
        self.backbone = backbone
        self.narrow = nn.Linear(backbone.num_features, predictor_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, predictor_dim))
        positions = backbones.sincos_positions(predictor_dim, *backbone.grid)
        self.positions = nn.Parameter(positions[None], requires_grad=False)
        heads = backbone.blocks[0].attn.num_heads
        self.blocks = nn.ModuleList(
            backbones.Block(predictor_dim, heads, drop_path=0.0) for _ in range(predictor_depth)
        )
        self.norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predict = nn.Linear(predictor_dim, backbone.num_features)

        backbones.init_linears(self, functools.partial(nn.init.trunc_normal_, std=0.02))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predict features (N, T, M, D) of target patches (N, T, M) from the context's (N, K)."""
        kept = take(self.backbone.embed(images), context)
        seen = self.narrow(self.backbone.encode(kept)[0]) + self.positions[0, context]  # (N, K, E)
        asked = self.mask_token + self.positions[0, targets.flatten(0, 1)]  # (N*T, M, E)
        x = torch.cat([seen.repeat_interleave(targets.shape[1], dim=0), asked], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x[:, context.shape[1] :])).unflatten(0, targets.shape[:2])


class Target(nn.Module):
    """A copy of the backbone that is never trained; its features, normalised patch by patch."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, L, D) of all patches, each of mean 0 and variance 1."""
        tokens = self.backbone.tokens(images)[0]
        return F.layer_norm(tokens, tokens.shape[-1:])


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens (N, ..., D) at places (N, ...) of (N, L, D)."""
    flat = places.flatten(1)[:, :, None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, flat).unflatten(1, places.shape[1:])


# --------------------------------------------------------------------------------- loss and updates


def prediction_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean smooth L1 distance (beta 1) of predictions from targets of any one shape.

    Targets are detached. With as many numbers on every process, the mean over processes of the
    result is the loss of the joined batch, and so is the gradient that DDP averages.

    Reference: the official code; the paper's equation in section 3 has a squared distance.
    """
    return F.smooth_l1_loss(comm.upcast(predictions), comm.upcast(targets.detach()))


@torch.no_grad()
def update_ema(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the target's parameters to the online network's of the same names.

    They keep a share `momentum` of their own.
    """
    old = dict(target.named_parameters())
    torch._foreach_lerp_([*old.values()], [*map(online.get_parameter, old)], 1 - momentum)


@torch.no_grad()
def indicators(z: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Logged beside the loss: on features (N, D) of images and targets (N, T, M, D)."""
    return {
        "z_std": comm.upcast(z).std(0, correction=0).mean(),  # of a channel over images; collapse 0
        "zero_loss": prediction_loss(torch.zeros_like(targets), targets),  # of predicting zeros
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    make = {"photo": photo_views, "digits": augment.moved_digit}[args.views]
    views = make(args.image_size, args.crop_scale)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def build_draw(args, steps_per_epoch):
    side = args.image_size // args.patch_size
    return functools.partial(draw_masks, seed=args.seed, steps_per_epoch=steps_per_epoch, rows=side,
                             columns=side, num_targets=args.num_targets, min_keep=args.min_keep)


def visible_patches(args, index: Tensor) -> list[tuple[int, Tensor]]:
    """For a picture: the view's number, and bool (N, rows, columns), of context and each target."""
    context, targets = build_draw(args, 1)(index, 0)
    side = args.image_size // args.patch_size
    return [(0, torch.zeros(len(index), side**2).scatter(1, block, 1.0).view(-1, side, side) == 1)
            for block in (context, *targets.unbind(1))]


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, drop_path=0.0, image_size=args.image_size,
        patch_size=args.patch_size, positions="sincos", class_token=args.class_token)
    model = IJEPA(backbone, args.predictor_dim, args.predictor_depth)
    model = model.to(world.device, memory_format=torch.channels_last)
    target = Target(model.backbone)
    if args.compile:
        backbones.compile(target)
        backbones.compile(model, dynamic=True)

    # Optimiser
    lr, start_lr, final_lr = (rate * args.batch_size / 256
                              for rate in (args.lr, args.start_lr, args.final_lr))
    weights, others = optim.split_by_dimension(model)  # the mask token decays, as officially
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    draw = build_draw(args, len(images) // args.batch_size)
    with Training(args, world, images, build_views(args), draw=draw,
                  floors={"z_std": 0.02}) as run:
        run.resume(model=model, target=target, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        total = int(args.stretch * run.total_steps)
        # Step 0 takes the second value of each schedule, but the first of the EMA's.
        lr_of_step = [*optim.warmup_cosine(
            start=start_lr, base=lr, final=final_lr,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=total, warmup_endpoint=False), final_lr][1:]
        decay_of_step = [*optim.cosine(args.weight_decay, args.final_weight_decay, total),
                         args.final_weight_decay][1:]
        momentum_of_step = [args.momentum + (1 - args.momentum) * t / total for t in range(total)]
        for step, batch in run.steps(export=target.backbone):  # 1. one view
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.param_groups[0]["weight_decay"] = decay_of_step[step]
            optimizer.zero_grad(set_to_none=True)
            view, (context, targets) = batch.views[0], batch.drawn  # 2. blocks
            context = context[:, : comm.smallest(context.shape[1])]
            with autocast():
                with torch.no_grad():
                    features = target(view)  # 3. targets
                predictions = ddp_model(view, context, targets)  # 4. predict
            wanted = take(features, targets)
            loss = prediction_loss(predictions, wanted)  # 5. compare
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            update_ema(target, model, momentum_of_step[step])  # 6. target encoder
            run.log(loss, lr_of_step[step], indicators, features.mean(1), wanted)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
