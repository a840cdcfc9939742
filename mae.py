"""MAE: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.

1. Make one view of every image, a crop, and cut it into patches.
2. Remove most of the patches at random; encode only those that are left.
3. Decode: a light transformer on the encoded patches, with one mask token in all other places.
4. Predict the pixels of the removed patches, each patch normalised by its own mean and variance.

Letters: N images per process, C channels, P patch side, L patches of an image, D backbone width, E
decoder width.

Differs from the official code (facebookresearch/mae): which patches are removed depends on seed,
epoch and image alone, not on processes and their order; an epoch is drawn as in every script here.

    python mae.py
    torchrun --nproc_per_node=8 mae.py --data /path/to/imagenet --accum-steps 4 --output runs/mae
"""

import contextlib
import functools
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim, rng
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # paper, appendix A.1; others: --arch vit_large; vit_huge --patch-size 14
    arch="vit_base", patch_size=16, image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.2, 1.0],
    mask_ratio=0.75, norm_pix=True, decoder_dim=512, decoder_depth=8, decoder_heads=16,
    epochs=800, batch_size=4096, lr=1.5e-4, weight_decay=0.05, warmup_epochs=40,
)
RECIPES = {
    "imagenet": IMAGENET,
    # The authors give none: backbone, patch, rate, batch and epochs of solo-learn's recipe.
    "cifar10": IMAGENET | dict(
        arch="vit_small", patch_size=4, image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        epochs=1000, batch_size=256, lr=2e-4, warmup_epochs=10,
    ),
    # Ours, chosen on the built-in digits.
    "digits": IMAGENET | dict(
        arch="vit_micro", patch_size=4, image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], decoder_dim=64, decoder_depth=2, decoder_heads=4,
        epochs=80, batch_size=128, lr=4e-3, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.VITS, crops="one",
                                      batch_norm=False)
    group.add_argument("--patch-size", type=cli.pos_int, help="P, side of a patch in pixels")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--mask-ratio", type=cli.fraction, help="fraction of the patches removed")
    group.add_argument("--norm-pix", action=cli.Switch, help="normalise every patch of the target")
    group.add_argument("--decoder-dim", type=cli.pos_int, help="E, width of the decoder's tokens")
    group.add_argument("--decoder-depth", type=cli.pos_int, help="blocks of the decoder")
    group.add_argument("--decoder-heads", type=cli.pos_int, help="attention heads of the decoder")
    group.add_argument("--accum-steps", type=cli.pos_int, default=1, help="parts in which a batch "
                       "goes through the model one by one: less memory, the same gradient")
    args = cli.parse(parser, RECIPES, argv)
    cli.check_patches(parser, args)
    num_patches = (args.image_size // args.patch_size) ** 2
    kept = num_kept(num_patches, args.mask_ratio)
    if not 1 <= kept < num_patches:
        parser.error(f"--mask-ratio {args.mask_ratio} keeps {kept} of {num_patches} patches")
    if args.decoder_dim % 4 or args.decoder_dim % args.decoder_heads:
        parser.error(f"--decoder-dim {args.decoder_dim} is not a multiple of 4 and of "
                     f"--decoder-heads {args.decoder_heads}")
    images = args.batch_size // cli.processes()
    if images % args.accum_steps:
        parser.error(f"--accum-steps {args.accum_steps} does not divide {images} images a process")
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(image_size, crop_scale):
    """One view, without changes of colour (paper, appendix A.1)."""
    return [(image_size, [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
        augment.HorizontalFlip(p=0.5),
    ])]


# -------------------------------------------------------------------------------------------- model


class MAE(nn.Module):
    """An encoder of the patches that are left, and a decoder D -> E -> pixels of all patches."""

    def __init__(self, backbone: nn.Module, mask_ratio: float, in_chans: int, decoder_dim: int,
                 decoder_depth: int, decoder_heads: int):
        super().__init__()
        self.backbone, self.mask_ratio = backbone, mask_ratio
        self.narrow = nn.Linear(backbone.num_features, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        positions = backbones.sincos_positions(decoder_dim, *backbone.grid)
        positions = F.pad(positions, (0, 0, 1, 0))  # the class token's is 0
        self.positions = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            backbones.Block(decoder_dim, decoder_heads, drop_path=0.0) for _ in range(decoder_depth)
        )
        self.norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.predict = nn.Linear(decoder_dim, backbone.patch_size**2 * in_chans)

        backbones.init_linears(self, nn.init.xavier_uniform_)
        nn.init.xavier_uniform_(backbone.patch_embed.proj.weight.detach().flatten(1))  # as a matrix
        for token in (backbone.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Predict images (N, C, H, W) from the patches that noise (N, L) leaves of them.

        Returns:
            Predicted patches (N, L, P*P*C), and the mask (N, L) that says which were removed.
        """
        kept, mask, restore = random_masking(self.backbone.embed(images), self.mask_ratio, noise)
        tokens = self.narrow(self.backbone.encode(kept)[0])  # (N, 1 + kept, E)
        first, kept = tokens[:, :1], tokens[:, 1:]
        removed = self.mask_token.expand(len(kept), mask.shape[1] - kept.shape[1], -1)
        patches = torch.cat([kept, removed], dim=1)
        patches = patches.gather(1, restore[:, :, None].expand_as(patches))  # (N, L, E), in place
        x = torch.cat([first, patches], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x[:, 1:])), mask


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """How many patches are left; rounded down, in floating point as in the official code."""
    return int(num_patches * (1 - mask_ratio))


def random_masking(tokens: Tensor, mask_ratio: float, noise: Tensor
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the tokens with the smallest noise.

    Args:
        tokens: (N, L, D).
        mask_ratio: share of the L tokens to remove.
        noise: (N, L); of equal values, the first stays.

    Returns:
        The int(L * (1 - mask_ratio)) kept tokens, in the order of their noise; the mask (N, L), 1
        for a removed token and 0 for a kept one; and int64 indices (N, L) that bring [kept, removed
        in the order of their noise] back into the order of `tokens`.

    Reference: section 3, "simple implementation".
    """
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    keep = order[:, : num_kept(tokens.shape[1], mask_ratio)]
    kept = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))
    mask = (restore >= keep.shape[1]).to(noise.dtype)
    return kept, mask, restore


def mask_noise(index: Tensor, step: int, *, patches: int, seed: int, steps_per_epoch: int
               ) -> Tensor:
    """Uniform numbers (N, L) of a step for the images of index (N,), on whatever process."""
    epoch = step // steps_per_epoch
    rows = [rng.philox(seed, rng.MASK, epoch, i).random(patches) for i in index.tolist()]
    return torch.from_numpy(np.stack(rows)).to(torch.get_default_dtype())


# --------------------------------------------------------------------------------------------- loss


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (N, C, H, W) into patches (N, L, P*P*C), row by row.

    A patch's numbers are ordered by row, column, channel.

    Raises:
        ValueError: the sides are not multiples of the patch size.
    """
    n, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} do not divide into patches of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(n, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int, channels: int,
               grid: tuple[int, int] | None = None) -> Tensor:
    """Put patches (N, L, P*P*C) together to images (N, C, H, W): undoes `patchify`.

    Args:
        grid: rows and columns of patches; square if not given.

    Raises:
        ValueError: L is not the grid's number of patches, or not a square.
    """
    n, length, _ = patches.shape
    rows, columns = grid or (round(length**0.5),) * 2
    if rows * columns != length:
        raise ValueError(f"{length} patches do not make {rows} rows of {columns}")
    x = patches.reshape(n, rows, columns, patch_size, patch_size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, rows * patch_size, columns * patch_size)


def reconstruction_loss(pred: Tensor, images: Tensor, mask: Tensor, patch_size: int,
                        norm_pix: bool) -> Tensor:
    """Compute the mean squared error on the removed patches.

    With as many removed patches on every process, the mean over processes of the result is the loss
    of the joined batch, and so is the gradient that DDP averages.

    Args:
        pred: predicted patches (N, L, P*P*C), ordered as by `patchify`.
        images: (N, C, H, W).
        mask: (N, L), 1 for a removed patch.
        norm_pix: the target is each patch less its mean, divided by sqrt(variance + 1e-6); the
            variance is the unbiased one.

    Reference: section 3, "reconstruction target".
    """
    pred, images = (comm.upcast(x) for x in (pred, images))
    target = patchify(images, patch_size)
    if norm_pix:
        variance, mean = torch.var_mean(target, dim=2, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    errors = (pred - target).square().mean(2)  # (N, L)
    mask = mask.to(errors.dtype)
    return (errors * mask).sum() / mask.sum()


@torch.no_grad()
def indicators(images: Tensor, mask: Tensor, patch_size: int, norm_pix: bool) -> dict[str, Tensor]:
    """Logged beside the loss: that of predicting zeros, on the last part of --accum-steps."""
    zeros = torch.zeros_like(patchify(images, patch_size))
    return {"zero_loss": reconstruction_loss(zeros, images, mask, patch_size, norm_pix)}


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    make = {"photo": photo_views, "digits": augment.moved_digit}[args.views]
    views = make(args.image_size, args.crop_scale)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def build_draw(args, steps_per_epoch):
    patches = (args.image_size // args.patch_size) ** 2
    return functools.partial(mask_noise, patches=patches, seed=args.seed,
                             steps_per_epoch=steps_per_epoch)


def visible_patches(args, index: Tensor) -> list[tuple[int, Tensor]]:
    """For a picture: the view's number, and bool (N, H / P, W / P) of what is not removed."""
    noise = build_draw(args, 1)(index, 0)
    side = args.image_size // args.patch_size
    mask = random_masking(noise[:, :, None], args.mask_ratio, noise)[1]
    return [(0, mask.unflatten(1, (side, side)) == 0)]


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, drop_path=0.0, image_size=args.image_size,
        patch_size=args.patch_size, positions="sincos")
    model = MAE(backbone, args.mask_ratio, args.in_chans, args.decoder_dim, args.decoder_depth,
                args.decoder_heads)
    model = model.to(world.device, memory_format=torch.channels_last)
    if args.compile:
        backbones.compile(model)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    weights, others = optim.split_by_dimension(model)  # class and mask token decay, as officially
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                                  fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    draw = build_draw(args, len(images) // args.batch_size)
    with Training(args, world, images, build_views(args), draw=draw,
                  chance_loss=1.0 if args.norm_pix else None) as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=0.0,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=False)
        for step, batch in run.steps(export=model.backbone):  # 1. one view
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            parts = [x.chunk(args.accum_steps) for x in (batch.views[0], batch.drawn)]
            loss = 0.0
            for number, (view, noise) in enumerate(zip(*parts, strict=True), start=1):
                # Processes add up their gradients once, after the last part.
                is_last = number == args.accum_steps or world.size == 1
                with contextlib.nullcontext() if is_last else ddp_model.no_sync():
                    with autocast():
                        pred, mask = ddp_model(view, noise)  # 2. encode, 3. decode
                    part = reconstruction_loss(pred, view, mask, args.patch_size,
                                               args.norm_pix) / args.accum_steps  # 4. compare
                    scaler.scale(part).backward()
                loss = loss + part.detach()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, view, mask, args.patch_size, args.norm_pix)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
