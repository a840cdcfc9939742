"""SimMIM: a Simple Framework for Masked Image Modeling, arXiv 2111.09886.

1. Make one view of every image, a crop, and cut it into patches.
2. Hide cells of several patches at random: one mask token takes the place of their patches.
3. Encode all patches, hidden and visible: there is no decoder.
4. Predict the pixels of the hidden patches by one linear layer, and compare by absolute distance.

Letters: N images per process, C channels, P patch side, L patches of an image, R x Q cells.

Three differences to MAE: the encoder sees mask tokens, the head is linear, the loss is L1 on plain
pixels. Evaluate `--layers patches`: nothing trains the class token but attention.

Positions are relative, one table for all blocks, as in the official ViT-B. The recipes of small
images have learned ones, added to the patches, as its setting USE_APE does.

Differs from the official code (microsoft/SimMIM): keys have a bias, which changes nothing. Which
cells are hidden depends on seed, epoch and image alone. The loss is divided by the hidden pixels of
a process in both, as many on each.

    python simmim.py
    torchrun --nproc_per_node=8 simmim.py --data /path/to/imagenet --output runs/simmim
"""

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

IMAGENET = dict(  # the official configuration of ViT-B
    arch="vit_base", patch_size=16, image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.67, 1.0],
    mask_ratio=0.6, cell_size=32, relative_positions=True, layer_scale=0.1, drop_path=0.1,
    epochs=800, batch_size=2048, lr=5e-5, start_lr=2.5e-7, final_lr=5e-6, drop_epoch=700,
    weight_decay=0.05, warmup_epochs=10, clip=5.0,
)
RECIPES = {
    "imagenet": IMAGENET,
    "imagenet_100": IMAGENET | dict(  # Swin-B's 100 epochs
        epochs=100, lr=1e-4, start_lr=5e-7, drop_epoch=0,
    ),
    # Ours, not promised; backbone, patch, batch and epochs as mae.py has them.
    "cifar10": IMAGENET | dict(
        arch="vit_small", patch_size=4, image_size=32, cell_size=8, relative_positions=False,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        epochs=1000, batch_size=256, lr=2e-4, start_lr=1e-6, final_lr=1e-6, drop_epoch=0,
    ),
    # Ours, chosen on the built-in digits.
    "digits": IMAGENET | dict(
        arch="vit_micro", patch_size=4, image_size=16, cell_size=4, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], relative_positions=False, drop_path=0.0,
        epochs=80, batch_size=128, lr=4e-3, start_lr=4e-5, final_lr=4e-5, drop_epoch=0,
        warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.VITS, crops="one",
                                      batch_norm=False)
    group.add_argument("--patch-size", type=cli.pos_int, help="P, side of a patch in pixels")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--mask-ratio", type=cli.fraction, help="fraction of the cells hidden")
    group.add_argument("--cell-size", type=cli.pos_int, help="side of a cell in pixels")
    group.add_argument("--relative-positions", action=cli.Switch,
                       help="one table of them for all blocks; no: learned, added to the patches")
    group.add_argument("--layer-scale", type=cli.not_negative,
                       help="start of the trained scale of every branch; 0: none")
    group.add_argument("--drop-path", type=cli.fraction, help="stochastic depth, last block")
    group.add_argument("--start-lr", type=cli.not_negative, help="per 256 images, first step")
    group.add_argument("--final-lr", type=cli.not_negative, help="per 256 images, of the cosine")
    group.add_argument("--drop-epoch", type=cli.nonneg_int, metavar="E",
                       help="epoch from which the rate is a tenth; 0: a cosine instead")
    group.add_argument("--clip", type=cli.positive, help="largest norm of all gradients together")
    args = cli.parse(parser, RECIPES, argv)
    if args.image_size % args.cell_size or args.cell_size % args.patch_size:
        parser.error(f"--image-size {args.image_size} is not a multiple of --cell-size "
                     f"{args.cell_size}, or that of --patch-size {args.patch_size}")
    num_cells = (args.image_size // args.cell_size) ** 2
    hidden = math.ceil(num_cells * args.mask_ratio)
    if not 1 <= hidden < num_cells:
        parser.error(f"--mask-ratio {args.mask_ratio} hides {hidden} of {num_cells} cells")
    if args.drop_epoch >= args.epochs:
        parser.error(f"--drop-epoch {args.drop_epoch} is not among --epochs {args.epochs}; 0 is a "
                     "cosine")
    if args.drop_epoch and cli.peek(argv, "--final-lr", float) is not None:
        parser.error(f"--final-lr {args.final_lr:g} is of the cosine; pass --drop-epoch 0")
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(image_size, crop_scale):
    """One view, without changes of colour (paper, section 4.1)."""
    return [(image_size, [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
        augment.HorizontalFlip(p=0.5),
    ])]


# -------------------------------------------------------------------------------------------- model


class SimMIM(nn.Module):
    """An encoder of patches and mask tokens, and a linear layer from each to its pixels."""

    def __init__(self, backbone: nn.Module, in_chans: int):
        super().__init__()
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.num_features))
        outputs = in_chans * backbone.patch_size**2
        self.predict = nn.Conv2d(backbone.num_features, outputs, kernel_size=1)

        narrow = functools.partial(nn.init.trunc_normal_, std=0.02, a=-0.02, b=0.02)
        backbones.init_linears(backbone, narrow)
        for weight in (backbone.patch_embed.proj.weight, backbone.cls_token, backbone.pos_embed,
                       self.mask_token):
            if weight is not None:
                narrow(weight)
        nn.init.zeros_(backbone.patch_embed.proj.bias)
        with torch.no_grad():
            for number, block in enumerate(backbone.blocks, start=1):
                for last in (block.attn.proj, block.mlp.fc2):
                    last.weight.div_(math.sqrt(2 * number))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict images (N, C, H, W) from the patches that mask (N, H / P, W / P) leaves."""
        hidden = mask.flatten(1).bool()
        tokens = self.backbone.encode(self.backbone.embed(images, hidden, self.mask_token))[0]
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, mask.shape[1:])  # (N, D, H / P, W / P)
        return F.pixel_shuffle(self.predict(maps), self.backbone.patch_size)


def cell_mask(noise: Tensor, mask_ratio: float, patches_per_cell: int) -> Tensor:
    """Hide the cells with the smallest noise.

    Args:
        noise: (N, R, Q), a number for each cell; of equal values, the first is hidden.
        mask_ratio: share of the cells to hide, rounded up.
        patches_per_cell: patches along a cell's side.

    Returns:
        Mask of patches (N, R * patches_per_cell, Q * patches_per_cell), 1 for a hidden one, else 0.

    Reference: section 3.2.
    """
    rank = noise.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
    mask = (rank < math.ceil(rank.shape[1] * mask_ratio)).to(noise.dtype).view_as(noise)
    return mask.repeat_interleave(patches_per_cell, 1).repeat_interleave(patches_per_cell, 2)


def mask_noise(index: Tensor, step: int, *, cells: int, seed: int, steps_per_epoch: int) -> Tensor:
    """Uniform numbers (N, cells, cells) of a step for the images of index (N,), anywhere."""
    epoch = step // steps_per_epoch
    rows = [rng.philox(seed, rng.MASK, epoch, i).random((cells, cells)) for i in index.tolist()]
    return torch.from_numpy(np.stack(rows)).to(torch.get_default_dtype())


# -------------------------------------------------------------------------------- loss and schedule


def masked_l1(pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean absolute difference on the hidden pixels.

    With as many hidden patches on every process, the mean over processes of the result is the loss
    of the joined batch, and so is the gradient that DDP averages.

    Args:
        pred, images: (N, C, H, W).
        mask: (N, H / P, W / P), 1 for a hidden patch.

    Returns:
        Scalar: sum over hidden pixels / (their number + 1e-5) / C.

    Reference: equation 1.
    """
    pred, images = comm.upcast(pred), comm.upcast(images)
    side = images.shape[2] // mask.shape[1]
    mask = mask.to(pred.dtype).repeat_interleave(side, 1).repeat_interleave(side, 2)  # (N, H, W)
    errors = (pred - images).abs().sum(1)
    return (errors * mask).sum() / (mask.sum() + 1e-5) / images.shape[1]


def learning_rates(start: float, base: float, final: float, warmup_steps: int, drop_step: int,
                   total_steps: int) -> list[float]:
    """A rate for every step: linear from start, then a cosine that began at step 0, or a drop.

    The first rate stands twice, for the official code moves the schedule on behind a step.
    """
    if drop_step:
        after = [base if step < drop_step else base / 10 for step in range(total_steps)]
    else:
        after = optim.warmup_cosine(start=base, base=base, final=final, warmup_steps=0,
                                    total_steps=total_steps, warmup_endpoint=False)
    warmup = np.linspace(start, base, warmup_steps, endpoint=False).tolist()
    rates = warmup + after[warmup_steps:]
    return [rates[0], *rates[:-1]]


@torch.no_grad()
def indicators(images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Logged beside the loss: that of predicting each image's mean."""
    return {"mean_loss": masked_l1(images.mean((2, 3), keepdim=True), images, mask)}


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    make = {"photo": photo_views, "digits": augment.moved_digit}[args.views]
    views = make(args.image_size, args.crop_scale)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def build_draw(args, steps_per_epoch):
    return functools.partial(mask_noise, cells=args.image_size // args.cell_size, seed=args.seed,
                             steps_per_epoch=steps_per_epoch)


def visible_patches(args, index: Tensor) -> list[tuple[int, Tensor]]:
    """For a picture: the view's number, and bool (N, H / P, W / P) of what is not hidden."""
    noise = build_draw(args, 1)(index, 0)
    return [(0, cell_mask(noise, args.mask_ratio, args.cell_size // args.patch_size) == 0)]


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, drop_path=args.drop_path, image_size=args.image_size,
        patch_size=args.patch_size, positions="learned",
        relative_positions=args.relative_positions, layer_scale=args.layer_scale)
    model = SimMIM(backbone, args.in_chans)
    model = model.to(world.device, memory_format=torch.channels_last)
    if args.compile:
        backbones.compile(model)

    # Optimiser
    lr, start_lr, final_lr = (rate * args.batch_size / 256
                              for rate in (args.lr, args.start_lr, args.final_lr))
    weights, others = optim.split_by_dimension(model)
    spared = {backbone.cls_token, backbone.pos_embed}  # officially mask token and table decay
    groups = [{"params": [p for p in weights if p not in spared]},
              {"params": others + [p for p in weights if p in spared], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                  fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    draw = build_draw(args, len(images) // args.batch_size)
    with Training(args, world, images, build_views(args), draw=draw) as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = learning_rates(
            start_lr, lr, final_lr, args.warmup_epochs * run.steps_per_epoch,
            args.drop_epoch * run.steps_per_epoch, run.total_steps)
        for step, batch in run.steps(export=model.backbone):  # 1. one view
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            view = batch.views[0]
            mask = cell_mask(batch.drawn, args.mask_ratio, args.cell_size // args.patch_size)  # 2.
            with autocast():
                pred = ddp_model(view, mask)  # 3. encode
            loss = masked_l1(pred, view, mask)  # 4. compare
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, view, mask)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
