"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction, arXiv 2103.03230.

1. Make two views of every image, of two kinds: the first always blurred, the second solarized at
   times.
2. Embed both: backbone h, projector z, one view after the other.
3. Standardise each dimension over the batch, and correlate the dimensions of the first view with
   those of the second: a D x D matrix, over the images of all processes.
4. Pull it to the identity: each dimension agrees between views (diagonal 1), and no two dimensions
   say the same (off-diagonal 0). There are no negatives.

Letters: N images per process, W processes, D embedding size, H backbone width.

Differs from the official code (facebookresearch/barlowtwins): the sum over processes is
differentiated, so the gradient is the true one; there it is 1/W of it, with W = 16 in the published
run. With the true gradient its weight decay 1e-6 is 1.6e-5, and its rate .0048 of biases and norms
is .0003; LARS hides the factor from all else. The last, short batch of an epoch is kept there. Blur
is a true Gaussian, there Pillow's chain of box filters.

    python barlow_twins.py
    torchrun --nproc_per_node=8 barlow_twins.py --data /path/to/imagenet --output runs/barlow_twins
"""

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import augment, backbones, cli, data, dist, optim
from common.checkpoint import Run
from common.log import Log

RECIPES = {
    # Paper, section 2.2; weight decay and rate of biases and norms: see above.
    "imagenet": dict(
        arch="resnet50", stem="imagenet", image_size=224, in_chans=3, mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225], views="photo", crop_scale=[0.08, 1.0], blur=True,
        projector_dim=8192, embedding_dim=8192, lambda_=0.0051, epochs=1000, batch_size=2048,
        lr=0.2, lr_biases=0.0003, weight_decay=1.6e-5, warmup_epochs=10, sync_bn=True,
    ),
    # Sizes, batch, rates and decay of solo-learn's CIFAR-10 run, with this script's optimiser. Its
    # loss is a tenth of this one: decay 1e-4 there is 1e-3 here, and .3 of biases is .03.
    "cifar10": dict(
        arch="resnet18", stem="small", image_size=32, in_chans=3, mean=[0.4914, 0.4822, 0.4465],
        std=[0.247, 0.2435, 0.2616], views="photo", crop_scale=[0.08, 1.0], blur=False,
        projector_dim=2048, embedding_dim=2048, lambda_=0.0051, epochs=1000, batch_size=256,
        lr=0.3, lr_biases=0.03, weight_decay=1e-3, warmup_epochs=10, sync_bn=True,
    ),
    # Ours, chosen on the built-in digits: about a minute on two cores.
    "digits": dict(
        arch="resnet_tiny", stem="small", image_size=16, in_chans=3, mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5], views="digits", crop_scale=[0.6, 1.0], blur=False,
        projector_dim=256, embedding_dim=256, lambda_=0.0051, epochs=60, batch_size=256,
        lr=1.0, lr_biases=0.0048, weight_decay=1e-6, warmup_epochs=5, sync_bn=True,
    ),
}


def parse_args(argv=None):
    parser = cli.parser(__file__, __doc__)
    group = parser.add_argument_group("images")
    group.add_argument("--image-size", type=cli.count, help="side of a view in pixels")
    group.add_argument("--in-chans", type=cli.count, help="channels of the images")
    group.add_argument("--mean", type=cli.number, nargs="+", help="subtracted from each channel")
    group.add_argument("--std", type=cli.positive, nargs="+", help="each channel is divided by it")
    group = parser.add_argument_group("method")
    group.add_argument("--arch", choices=backbones.RESNETS, help="backbone")
    group.add_argument("--stem", choices=("imagenet", "small"), help="small: 3x3 stride 1, no pool")
    group.add_argument("--views", choices=("photo", "digits"), help="what views are made of")
    group.add_argument("--crop-scale", type=cli.share, nargs=2, help="smallest, largest area share")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of both kinds of view")
    group.add_argument("--projector-dim", type=cli.count, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.count, help="D, size of an embedding")
    group.add_argument("--lambda", dest="lambda_", metavar="LAMBDA", type=cli.not_negative,
                       help="weight of the off-diagonal part")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=cli.count, help="passes over the images")
    group.add_argument("--batch-size", type=cli.count, help="images over all processes")
    group.add_argument("--lr", type=cli.positive, help="learning rate per 256 images")
    group.add_argument("--lr-biases", type=cli.not_negative,
                       help="the same of biases and norms, which LARS does not adapt")
    group.add_argument("--weight-decay", type=cli.not_negative, help="of weights, not of norms")
    group.add_argument("--warmup-epochs", type=cli.whole, help="linear from 0")
    group.add_argument("--sync-bn", action=cli.Switch, help="batch norm over all processes")
    group.add_argument("--seed", type=cli.whole, default=0, help="of every random choice")
    return cli.parse(parser, RECIPES, argv)


# -------------------------------------------------------------------------------------------- views


def photo_views(image_size, channels, crop_scale, blur, mean, std):
    """Two views of two kinds (paper, section 2.2 and appendix)."""

    def view(blur_p, solarize_p):
        steps = [
            augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
            augment.HorizontalFlip(p=0.5),
            augment.ColorJitter(0.4, 0.4, saturation=0.2, hue=0.1, p=0.8),
            augment.Grayscale(p=0.2),
            augment.GaussianBlur(sigma=(0.1, 2.0), p=blur_p if blur else 0.0),
            augment.Solarize(threshold=128 / 255, p=solarize_p),
            augment.Normalize(mean, std),
        ]
        return augment.View(image_size, steps, channels)

    return [view(blur_p=1.0, solarize_p=0.0), view(blur_p=0.1, solarize_p=0.2)]


def digit_views(image_size, channels, crop_scale, blur, mean, std):
    """Two views that leave a digit what it is: it is moved and shaded, never mirrored."""
    steps = [
        augment.RandomAffine(degrees=15, translate=0.1, scale=(0.8, 1.2), shear=10, fill=0,
                             interpolation="bilinear"),
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
        augment.ColorJitter(0.5, 0.5, saturation=0.0, hue=0.0, p=0.8),
        augment.GaussianBlur(sigma=(0.1, 1.0), p=0.5 if blur else 0.0),
        augment.Normalize(mean, std),
    ]
    return [augment.View(image_size, steps, channels)] * 2


# -------------------------------------------------------------------------------------------- model


class BarlowTwins(nn.Module):
    """Backbone and projector H -> hidden -> hidden -> D, with batch norm between its layers."""

    def __init__(self, backbone: nn.Module, projector_dim: int, embedding_dim: int):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, projector_dim, bias=False),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, projector_dim, bias=False),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, embedding_dim, bias=False),
        )

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Embed each view (N, C, H, W) on its own, with its own batch statistics; (N, D) each."""
        return [self.projector(self.backbone(view)) for view in views]


# --------------------------------------------------------------------------------------------- loss


def standardize(z: Tensor) -> Tensor:
    """Give each dimension of embeddings (N, D) mean 0 and variance 1 over all processes' rows."""
    z = z if z.dtype == torch.float64 else z.float()
    count = len(z) * dist.size()
    z = z - dist.all_reduce_with_grad(z.sum(0)) / count
    variance = dist.all_reduce_with_grad(z.square().sum(0)) / count  # biased, as batch norm's
    return z * (variance + 1e-5).rsqrt()


def cross_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """Correlate dimension i of the first view with dimension j of the second; (D, D)."""
    products = standardize(z1).T @ standardize(z2)
    return dist.all_reduce_with_grad(products) / (len(z1) * dist.size())


def off_diagonal(matrix: Tensor) -> Tensor:
    """All entries (D - 1, D) of a contiguous square matrix but its diagonal, without a copy."""
    size = len(matrix)
    return matrix.view(-1)[:-1].view(size - 1, size + 1)[:, 1:]


def barlow_twins_loss(z1: Tensor, z2: Tensor, lambda_: float) -> Tensor:
    """Compute the squared distance of the cross-correlation from the identity.

    Every process returns the whole loss, that of the joined batch; so is the gradient that DDP
    averages.

    Args:
        z1, z2: embeddings (N, D) of the two views; standardised here over the global batch.
        lambda_: weight of the off-diagonal part.

    Returns:
        Scalar: sum over i of (1 - c_ii)^2, plus lambda_ times the sum over i != j of c_ij^2.

    Reference: equations 1 and 2.
    """
    c = cross_correlation(z1, z2)
    invariance = (1 - c.diagonal()).square().sum()
    redundancy = torch.linalg.vector_norm(off_diagonal(c)).square()
    return invariance + lambda_ * redundancy


def chance_loss(count: int, embedding_dim: int, lambda_: float) -> float:
    """Expect this loss of `count` images whose embeddings are independent noise."""
    off = embedding_dim * (embedding_dim - 1) / count
    return embedding_dim * (1 + 1 / count) + lambda_ * off


@torch.no_grad()
def indicators(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """What tells learning from collapse: the matrix over all processes, and the spread of z1."""
    c = cross_correlation(z1, z2)
    unit = nn.functional.normalize(z1.float(), dim=1)
    return {
        "diagonal": c.diagonal().mean(),  # to 1
        "off_diagonal_rms": off_diagonal(c).square().mean().sqrt(),  # to 0
        "z_std": unit.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = dist.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = data.open_images(args.data, "pretrain", args.in_chans, root=args.data_root,
                              download=args.download, limit=args.limit)
    make_views = {"photo": photo_views, "digits": digit_views}[args.views]
    views = make_views(args.image_size, args.in_chans, args.crop_scale, args.blur, args.mean,
                       args.std)

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        zero_init_residual=True)
    model = BarlowTwins(backbone, args.projector_dim, args.embedding_dim).to(world.device)
    model = model.to(memory_format=torch.channels_last)
    if args.sync_bn:
        model = dist.convert_sync_batchnorm(model, world.device)
    if args.compile:
        backbone.compile(dynamic=False)

    # Optimiser
    lr, lr_biases = (rate * args.batch_size / 256 for rate in (args.lr, args.lr_biases))
    weights, others = optim.split_by_dimension(model)
    groups = [
        {"params": weights, "base_lr": lr},
        {"params": others, "base_lr": lr_biases, "decay": False, "adapt": False},
    ]
    optimizer = optim.LARS(groups, lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                           trust_coefficient=0.001)
    autocast, scaler = optim.precision(args.amp, world.device)
    dist.say(f"{len(images)} images; batch {args.batch_size} = {args.batch_size // world.size} on "
             f"each of {world.size}; lr {args.lr:g} x {args.batch_size} / 256 = {lr:g}, of biases "
             f"{lr_biases:g}")

    with Run(args.output, cli.settings(args), images, world, resume=args.resume,
             save_every_minutes=args.save_every_minutes) as run:
        # Resume
        state = {"model": model, "optimizer": optimizer, "scaler": scaler}
        step = run.start(state)
        loader = data.Loader(images, views, batch_size=args.batch_size, epochs=args.epochs,
                             seed=args.seed, world=world, workers=args.workers, start_step=step)
        lr_factor = optim.warmup_cosine(
            start=0.0, base=1.0, final=0.001, warmup_endpoint=False,
            warmup_steps=args.warmup_epochs * loader.steps_per_epoch,
            total_steps=args.epochs * loader.steps_per_epoch,
        )
        log = Log(args.output, world, batch_size=args.batch_size, total_steps=len(lr_factor),
                  first_step=step, every=args.log_every,
                  chance_loss=chance_loss(args.batch_size, args.embedding_dim, args.lambda_),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)})
        ddp_model = DistributedDataParallel(model) if world.size > 1 else model

        # Train
        for epoch in range(step // loader.steps_per_epoch, args.epochs):
            for batch in loader.epoch(epoch):  # 1. two views
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * lr_factor[step]
                optimizer.zero_grad(set_to_none=True)
                with autocast():
                    z1, z2 = ddp_model(batch.views)  # 2. embeddings
                loss = barlow_twins_loss(z1, z2, args.lambda_)  # 3. correlate, 4. to the identity
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

                step += 1
                seen = indicators(z1, z2) if log.due(step) else {}
                log.write(step, epoch=epoch, loss=loss, lr=lr * lr_factor[step - 1],
                          waited=loader.waited, **seen)
                save, stop = run.agree(step % loader.steps_per_epoch == 0)  # the same everywhere
                if save:
                    log.check()
                    run.save(step, state, model.backbone)
                if stop:
                    return


if __name__ == "__main__":
    sys.exit(dist.launch(main, parse_args()))
