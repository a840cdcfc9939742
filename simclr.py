"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709.

1. Make two views of every image: strong crops, colour and blur.
2. Embed both: backbone h, projector z.
3. For every embedding, the other view of the same image is the positive, and both views of all
   other images, of all processes, are the negatives. NT-Xent is the cross-entropy of finding the
   positive. With more crops than two (multi-crop, from SwAV) every pair of crops counts.

Letters: N images per process, W processes, V views, D embedding size, H backbone width.

Differs from the official code (google-research/simclr, TensorFlow): there the two directions of the
loss are added, so it is twice ours, which is the paper's mean over the 2N rows (LARS does not see
the factor); and there the learning rate is inside the momentum buffer, so a changed rate acts with
a delay. Weight decay is on weights only, as there. Layers start as torch's do, there as
TensorFlow's; contrast changes about the mean gray of an image, there about each channel's mean.
Left out: the square-root rule for the learning rate, .075 sqrt(batch size), which the paper prefers
for short runs of small batches (pass its value times 256 / batch size as --lr).

    python simclr.py
    torchrun --nproc_per_node=8 simclr.py --data /path/to/imagenet --output runs/simclr
"""

import contextlib
import itertools
import math
import sys

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import augment, backbones, cli, data, dist, optim
from common.checkpoint import Run
from common.log import Log

RECIPES = {
    # Paper, section 2 and appendix B.9; no normalisation of the input, as in the official code.
    "imagenet": dict(
        arch="resnet50", stem="imagenet", in_chans=3, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0],
        views="photo", num_crops=[2], crop_sizes=[224], crop_scales=[0.08, 1.0],
        jitter_strength=1.0, blur=True, projector_dim=2048, embedding_dim=128, temperature=0.1,
        epochs=100, batch_size=4096, lr=0.3, weight_decay=1e-6, warmup_epochs=10, sync_bn=True,
    ),
    # The same with the crops of SwAV's paper (section 4.4 there): two of 160 and four of 96 px.
    "imagenet_multicrop": dict(
        arch="resnet50", stem="imagenet", in_chans=3, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0],
        views="photo", num_crops=[2, 4], crop_sizes=[160, 96], crop_scales=[0.08, 1.0, 0.05, 0.14],
        jitter_strength=1.0, blur=True, projector_dim=2048, embedding_dim=128, temperature=0.1,
        epochs=100, batch_size=4096, lr=0.3, weight_decay=1e-6, warmup_epochs=10, sync_bn=True,
    ),
    # README of the official code's first release: ResNet-18, small stem, about 91 % linear after
    # 1,000 epochs. Since 2020-06 it says weight decay 1e-4 and a projector of three layers.
    "cifar10": dict(
        arch="resnet18", stem="small", in_chans=3, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0],
        views="photo", num_crops=[2], crop_sizes=[32], crop_scales=[0.08, 1.0],
        jitter_strength=0.5, blur=False, projector_dim=512, embedding_dim=128, temperature=0.5,
        epochs=1000, batch_size=512, lr=1.0, weight_decay=1e-6, warmup_epochs=10, sync_bn=True,
    ),
    # Ours, chosen on the built-in digits: a minute on two cores.
    "digits": dict(
        arch="resnet_tiny", stem="small", in_chans=3, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5],
        views="digits", num_crops=[2], crop_sizes=[16], crop_scales=[0.6, 1.0],
        jitter_strength=0.5, blur=False, projector_dim=128, embedding_dim=64, temperature=0.5,
        epochs=60, batch_size=256, lr=1.0, weight_decay=1e-6, warmup_epochs=5, sync_bn=True,
    ),
}


def parse_args(argv=None):
    parser = cli.parser(__file__, __doc__)
    group = parser.add_argument_group("images")
    group.add_argument("--image-size", type=cli.count,
                       help="side of a full crop in pixels: the first of --crop-sizes")
    group.add_argument("--in-chans", type=cli.count, help="channels of the images")
    group.add_argument("--mean", type=cli.number, nargs="+", help="subtracted from each channel")
    group.add_argument("--std", type=cli.positive, nargs="+", help="each channel is divided by it")
    group = parser.add_argument_group("method")
    group.add_argument("--arch", choices=backbones.RESNETS, help="backbone")
    group.add_argument("--stem", choices=("imagenet", "small"), help="small: 3x3 stride 1, no pool")
    group.add_argument("--views", choices=("photo", "digits"), help="what views are made of")
    group.add_argument("--num-crops", type=cli.count, nargs="+", help="views of each size")
    group.add_argument("--crop-sizes", type=cli.count, nargs="+", help="their sides in pixels")
    group.add_argument("--crop-scales", type=cli.share, nargs="+",
                       help="smallest, largest area share for each size")
    group.add_argument("--jitter-strength", type=cli.not_negative, help="of the colour changes")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of half of the views")
    group.add_argument("--projector-dim", type=cli.count, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.count, help="D, size of an embedding")
    group.add_argument("--temperature", type=cli.positive, help="lower: hard negatives count more")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=cli.count, help="passes over the images")
    group.add_argument("--batch-size", type=cli.count, help="images over all processes")
    group.add_argument("--grad-cache", type=cli.count, metavar="CHUNK", help="embed so many images "
                       "of a process at a time, twice: large batches in little memory")
    group.add_argument("--lr", type=cli.positive, help="learning rate per 256 images")
    group.add_argument("--weight-decay", type=cli.not_negative, help="of weights, not of norms")
    group.add_argument("--warmup-epochs", type=cli.whole, help="linear from 0")
    group.add_argument("--sync-bn", action=cli.Switch, help="batch norm over all processes")
    group.add_argument("--seed", type=cli.whole, default=0, help="of every random choice")
    args = cli.parse(parser, RECIPES, argv)
    cli.check_crops(parser, args)
    share = args.batch_size // cli.processes()
    if args.grad_cache and share % args.grad_cache:
        parser.error(f"--grad-cache {args.grad_cache} does not divide the {share} images of a "
                     "process")
    if args.grad_cache and args.sync_bn:
        parser.error("--grad-cache has batch statistics of each chunk, which --sync-bn excludes; "
                     "pass --no-sync-bn")
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(num_crops, crop_sizes, crop_scales, channels, jitter_strength, blur, mean, std):
    """Views of the same kind (paper, appendix A), of some sizes."""
    s, views = jitter_strength, []
    for count, size, scale in zip(num_crops, crop_sizes, crop_scales, strict=True):
        steps = [
            augment.RandomResizedCrop(scale, ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
            augment.HorizontalFlip(p=0.5),
            augment.ColorJitter(0.8 * s, 0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8),
            augment.Grayscale(p=0.2),
            augment.GaussianBlur(sigma=(0.1, 2.0), p=0.5 if blur else 0.0),
            augment.Normalize(mean, std),
        ]
        views += [augment.View(size, steps, channels)] * count
    return views


def digit_views(num_crops, crop_sizes, crop_scales, channels, jitter_strength, blur, mean, std):
    """Views that leave a digit what it is: it is moved and shaded, never mirrored."""
    s, views = jitter_strength, []
    for count, size, scale in zip(num_crops, crop_sizes, crop_scales, strict=True):
        steps = [
            augment.RandomAffine(degrees=15, translate=0.1, scale=(0.8, 1.2), shear=10, fill=0,
                                 interpolation="bilinear"),
            augment.RandomResizedCrop(scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
            augment.ColorJitter(brightness=s, contrast=s, saturation=0.0, hue=0.0, p=0.8),
            augment.GaussianBlur(sigma=(0.1, 1.0), p=0.5 if blur else 0.0),
            augment.Normalize(mean, std),
        ]
        views += [augment.View(size, steps, channels)] * count
    return views


# -------------------------------------------------------------------------------------------- model


class SimCLR(nn.Module):
    """Backbone and projector H -> hidden -> D, batch norm after both (the last without shift)."""

    def __init__(self, backbone: nn.Module, projector_dim: int, embedding_dim: int):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, projector_dim, bias=False),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        self.projector[4].bias.requires_grad_(False)  # stays 0
        for layer in (self.projector[0], self.projector[3]):
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, views: list[Tensor]) -> Tensor:
        """Embed V views (N, C, H, W), sorted by size, in one pass a size; (V, N, D)."""
        # All views of a size go through together: one pass, and batch norm sees both views.
        sizes = itertools.groupby(views, key=lambda view: view.shape[-2:])
        h = torch.cat([self.backbone(torch.cat(list(same))) for _, same in sizes])
        z = self.projector(h)
        return z.view(len(views), -1, z.shape[1])


# --------------------------------------------------------------------------------------------- loss


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Compute the normalised temperature-scaled cross-entropy of two views.

    The mean over processes of the result is the loss of the joined batch, and so is the gradient
    that DDP averages.

    Args:
        z1, z2: embeddings (N, D) of the two views; normalised here.
        temperature: divides the cosines.

    Returns:
        Scalar: mean over this process's 2N rows of -log softmax at the positive, among the 2WN - 1
        other rows of all processes.

    Reference: section 2.1 and algorithm 1.
    """
    z = torch.stack([z1, z2], dim=1)
    z = nn.functional.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1)  # (N, 2, D)
    everyone = dist.all_gather_with_grad(z).flatten(0, 1)  # (W*N*2, D): views of an image adjacent
    own = z.flatten(0, 1)  # (N*2, D)
    logits = own @ everyone.T / temperature  # (2N, 2WN)
    itself = torch.arange(len(own), device=own.device) + dist.rank() * len(own)
    logits = logits.scatter(1, itself[:, None], -math.inf)
    return nn.functional.cross_entropy(logits, itself ^ 1)  # rows 2i and 2i + 1 find each other


# The next three functions serve --num-crops beyond two and --grad-cache: plain SimCLR ends here.


def multicrop_nt_xent(z: Tensor, num_views: int, temperature: float) -> Tensor:
    """Compute the normalised temperature-scaled cross-entropy of any number of views.

    One term for each ordered pair of views of an image: the positive is found among itself and all
    views of all other images; the image's remaining views are left out. Two views: `nt_xent`. The
    mean over processes is the loss of the joined batch.

    Args:
        z: embeddings (V*N, D), view by view; normalised here.
        num_views: V, at least 2.
        temperature: divides the cosines.

    Returns:
        Scalar: mean over this process's V(V-1)N pairs.

    Reference: the multi-crop of 2006.09882, section 3.2, applied to SimCLR's equation 1.
    """
    z = nn.functional.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
    n = len(z) // num_views
    z = z.view(num_views, n, -1).transpose(0, 1)  # (N, V, D): views of an image adjacent
    everyone = dist.all_gather_with_grad(z)  # (W*N, V, D)
    logits = torch.einsum("nvd,mud->nvmu", z, everyone) / temperature  # (N, V, W*N, V)
    image = torch.arange(n, device=z.device)
    same = logits[image, :, image + dist.rank() * n]  # (N, V, V): the views of the image itself
    own = torch.eye(n, dtype=torch.bool, device=z.device)
    own = nn.functional.pad(own, (dist.rank() * n, len(everyone) - (dist.rank() + 1) * n))
    others = logits.masked_fill(own[:, None, :, None], -math.inf).flatten(2).logsumexp(2)  # (N, V)
    terms = torch.logaddexp(same, others[:, :, None]) - same  # (N, V, V)
    pairs = terms.sum() - terms.diagonal(dim1=1, dim2=2).sum()  # of two different views
    return pairs / (n * num_views * (num_views - 1))


def contrast(z: Tensor, temperature: float) -> Tensor:
    """`nt_xent` of the embeddings (2, N, D) of two views, `multicrop_nt_xent` of more."""
    if len(z) == 2:
        return nt_xent(z[0], z[1], temperature)
    return multicrop_nt_xent(z.flatten(0, 1), len(z), temperature)


def backward_in_chunks(model: nn.Module, views: list[Tensor], chunk: int, temperature: float,
                       autocast, scaler) -> tuple[Tensor, Tensor]:
    """Fill the gradients of a whole batch with the graph of one chunk in memory at a time.

    Embed all chunks without a graph; take the loss and its gradient at the embeddings; embed every
    chunk again and go back from there. Exact for a model that treats images one by one; batch norm
    has the statistics of a chunk, and the second pass leaves its running ones alone.

    Args:
        model: views (N, C, H, W) to embeddings (V, N, D), in DDP or not.
        chunk: images at a time; divides N.
        temperature: of `contrast`.

    Returns:
        The loss and the embeddings, detached.

    Reference: Gao et al., arXiv 2101.06983, section 3.2.
    """
    chunks = list(zip(*[view.split(chunk) for view in views], strict=True))
    with torch.no_grad(), autocast():
        z = torch.cat([model(list(part)) for part in chunks], dim=1)
    loss = contrast(z.requires_grad_(), temperature)
    scaler.scale(loss).backward()
    buffers = [buffer.clone() for buffer in model.buffers()]
    for number, (part, grad) in enumerate(zip(chunks, z.grad.split(chunk, dim=1), strict=True), 1):
        adds_up = number == len(chunks) or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if adds_up else model.no_sync():
            with autocast():
                again = model(list(part))
            again.backward(grad)
    for buffer, first in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(first)
    return loss.detach(), z.detach()


@torch.no_grad()
def indicators(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """What tells learning from collapse, on this process's embeddings (N, D) of the two views."""
    z1, z2 = (nn.functional.normalize(z.float(), dim=1) for z in (z1, z2))
    cosines = z1 @ z2.T
    found = cosines.argmax(1) == torch.arange(len(z1), device=z1.device)
    return {
        "contrast_accuracy": found.float().mean(),  # the other view is the nearest in this batch
        "positive_similarity": cosines.diagonal().mean(),
        "z_std": z1.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = dist.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = data.open_images(args.data, "pretrain", args.in_chans, root=args.data_root,
                              download=args.download, limit=args.limit)
    scales = list(zip(args.crop_scales[::2], args.crop_scales[1::2], strict=True))  # (low, high)s
    make_views = {"photo": photo_views, "digits": digit_views}[args.views]
    views = make_views(args.num_crops, args.crop_sizes, scales, args.in_chans,
                       args.jitter_strength, args.blur, args.mean, args.std)

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        zero_init_residual=True)
    model = SimCLR(backbone, args.projector_dim, args.embedding_dim).to(world.device)
    model = model.to(memory_format=torch.channels_last)
    if args.sync_bn:
        model = dist.convert_sync_batchnorm(model, world.device)
    if args.compile:
        backbone.compile(dynamic=False)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    weights, others = optim.split_by_dimension(model)
    groups = [{"params": weights}, {"params": others, "decay": False, "adapt": False}]
    optimizer = optim.LARS(groups, lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                           trust_coefficient=0.001)
    autocast, scaler = optim.precision(args.amp, world.device)
    dist.say(f"{len(images)} images; batch {args.batch_size} = {args.batch_size // world.size} on "
             f"each of {world.size}; lr {args.lr:g} x {args.batch_size} / 256 = {lr:g}")

    with Run(args.output, cli.settings(args), images, world, resume=args.resume,
             save_every_minutes=args.save_every_minutes) as run:
        # Resume
        state = {"model": model, "optimizer": optimizer, "scaler": scaler}
        step = run.start(state)
        loader = data.Loader(images, views, batch_size=args.batch_size, epochs=args.epochs,
                             seed=args.seed, world=world, workers=args.workers, start_step=step)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=0.0, warmup_steps=args.warmup_epochs * loader.steps_per_epoch,
            total_steps=args.epochs * loader.steps_per_epoch, warmup_endpoint=False,
        )
        log = Log(args.output, world, batch_size=args.batch_size, total_steps=len(lr_of_step),
                  first_step=step, every=args.log_every,
                  chance_loss=math.log(1 + len(views) * (args.batch_size - 1)),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)})
        ddp_model = DistributedDataParallel(model) if world.size > 1 else model

        # Train
        for epoch in range(step // loader.steps_per_epoch, args.epochs):
            for batch in loader.epoch(epoch):  # 1. two views
                for group in optimizer.param_groups:
                    group["lr"] = lr_of_step[step]
                optimizer.zero_grad(set_to_none=True)
                if args.grad_cache:  # 2. and 3. in chunks
                    loss, z = backward_in_chunks(ddp_model, batch.views, args.grad_cache,
                                                 args.temperature, autocast, scaler)
                else:
                    with autocast():
                        z = ddp_model(batch.views)  # 2. embeddings
                    loss = contrast(z, args.temperature)  # 3. find the other view
                    scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

                step += 1
                seen = indicators(z[0], z[1]) if log.due(step) else {}
                log.write(step, epoch=epoch, loss=loss, lr=lr_of_step[step - 1],
                          waited=loader.waited, **seen)
                save, stop = run.agree(step % loader.steps_per_epoch == 0)  # the same everywhere
                if save:
                    log.check()
                    run.save(step, state, model.backbone)
                if stop:
                    return


if __name__ == "__main__":
    sys.exit(dist.launch(main, parse_args()))
