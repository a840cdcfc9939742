"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction, arXiv 2103.03230.

1. Make two views of every image: the first always blurred, the second sometimes solarised.
2. Embed both: backbone h, projector z, one view after the other.
3. Standardise each dimension over the batch, and correlate the dimensions of the first view with
   those of the second: a D x D matrix, over the images of all processes.
4. Pull it to the identity: each dimension agrees between views (diagonal 1), and no two dimensions
   are redundant (off-diagonal 0). There are no negatives.

Letters: N images per process, W processes, D embedding size, H backbone width.

Differs from the official code (facebookresearch/barlowtwins): the sum over processes is
differentiated; there the gradient is 1/W of the true one, W = 16 by its README. So its weight decay
1e-6 is 1.6e-5 here, its rate .0048 of biases and norms .0003; LARS hides the factor from all else.
An epoch's last, short batch is kept there. Blur is a true Gaussian, there Pillow's box filters.

    python barlow_twins.py
    torchrun --nproc_per_node=8 barlow_twins.py --data /path/to/imagenet --output runs/barlow_twins
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # paper, section 2.2; weight decay and rate of biases and norms: see above
    arch="resnet50", stem="imagenet", image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.08, 1.0], blur=True,
    projector_dim=8192, embedding_dim=8192, lambda_=0.0051, lr_biases=0.0003,
    epochs=1000, batch_size=2048, lr=0.2, weight_decay=1.6e-5, warmup_epochs=10, sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    # Sizes, batch, rates and decay of solo-learn's CIFAR-10 run. Its 92.1 linear is not promised:
    # its LARS takes steps of .02 |p| at any rate, but no longer than SGD's; ours are .001 lr |p|.
    # It scales the loss by .1: its weight decay 1e-4 is 1e-3 here, and its rate .3 of biases .03.
    # Its stem pads by 2 pixels.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616], blur=False,
        projector_dim=2048, embedding_dim=2048, lr_biases=0.03,
        batch_size=256, lr=0.3, weight_decay=1e-3,
    ),
    # Ours, chosen on the built-in digits: a minute on two cores.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], blur=False,
        projector_dim=256, embedding_dim=256, lr_biases=0.0048,
        epochs=60, batch_size=256, lr=1.0, weight_decay=1e-6, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.POOLED, crops="one")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--projector-dim", type=cli.pos_int, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.two_or_more, help="D, size of an embedding")
    group.add_argument("--lambda", dest="lambda_", metavar="LAMBDA", type=cli.not_negative,
                       help="weight of the off-diagonal part")
    group.add_argument("--lr-biases", type=cli.not_negative,
                       help="learning rate of biases and norms, per 256 images")
    return cli.parse(parser, RECIPES, argv)


# -------------------------------------------------------------------------------------------- views


def photo_view(image_size, crop_scale, blur, blur_p, solarize_p):
    """A view of one of two kinds (paper, section 2.2 and appendix)."""
    steps = [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
        augment.HorizontalFlip(p=0.5),
        augment.ColorJitter(0.4, 0.4, saturation=0.2, hue=0.1, p=0.8),
        augment.Grayscale(p=0.2),
        augment.GaussianBlur(sigma=(0.1, 2.0), p=blur_p if blur else 0.0),
        augment.Solarize(threshold=128 / 255, p=solarize_p),
    ]
    return image_size, steps


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
    z = comm.upcast(z)
    count = len(z) * comm.size()
    z = z - comm.all_reduce_with_grad(z.sum(0)) / count
    variance = comm.all_reduce_with_grad(z.square().sum(0)) / count  # biased, as batch norm's
    return z * (variance + 1e-5).rsqrt()


@comm.outside_autocast
def cross_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """Correlate dimension i of the first view with dimension j of the second; (D, D)."""
    products = standardize(z1).T @ standardize(z2)
    return comm.all_reduce_with_grad(products) / (len(z1) * comm.size())


def off_diagonal(matrix: Tensor) -> Tensor:
    """All entries (D - 1, D) of a contiguous square matrix but its diagonal, without a copy."""
    size = len(matrix)
    return matrix.view(-1)[:-1].view(size - 1, size + 1)[:, 1:]


def barlow_twins_loss(z1: Tensor, z2: Tensor, lambda_: float) -> Tensor:
    """Compute the squared distance of the cross-correlation from the identity.

    Every process returns the loss of the joined batch; its gradient is the one that DDP averages
    to. Uses the three functions above.

    Args:
        z1, z2: embeddings (N, D) of the two views; standardised here over the global batch.
        lambda_: weight of the off-diagonal part.

    Returns:
        Scalar: sum over i of (1 - c_ii)^2, plus lambda_ times the sum over i != j of c_ij^2.

    Reference: equations 1 and 2.
    """
    c = cross_correlation(z1, z2)
    invariance = (1 - c.diagonal()).square().sum()
    redundancy = off_diagonal(c).square().sum()
    return invariance + lambda_ * redundancy


def chance_loss(count: int, embedding_dim: int, lambda_: float) -> float:
    """The loss to expect of `count` images whose embeddings are independent noise."""
    off = embedding_dim * (embedding_dim - 1) / count
    return embedding_dim * (1 + 1 / count) + lambda_ * off


@torch.no_grad()
def indicators(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: the matrix over all processes, and the spread of z1."""
    c = cross_correlation(z1, z2)
    unit = F.normalize(comm.upcast(z1), dim=1)
    return {
        "diagonal": c.diagonal().mean(),  # to 1
        "off_diagonal_rms": off_diagonal(c).square().mean().sqrt(),  # to 0
        "z_std": unit.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    size, scale, blur = args.image_size, args.crop_scale, args.blur
    if args.views == "digits":
        views = augment.digit_views([(2, size, scale)], jitter=0.5, blur=blur)
    else:
        views = [photo_view(size, scale, blur, blur_p=1.0, solarize_p=0.0),
                 photo_view(size, scale, blur, blur_p=0.1, solarize_p=0.2)]
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        image_size=args.image_size, zero_init_residual=True)
    model = BarlowTwins(backbone, args.projector_dim, args.embedding_dim)
    model = comm.prepare(model, world, args.sync_bn)
    if args.compile:
        backbones.compile(backbone)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    weights, others = optim.split_by_dimension(model)
    groups = [
        {"params": weights},
        {"params": others, "lr_scale": args.lr_biases / args.lr, "decay": False, "adapt": False},
    ]
    optimizer = optim.LARS(groups, lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                           trust_coefficient=0.001)
    autocast, scaler = optim.precision(args.amp, world.device)
    comm.print_main(f"lr of biases and norms {args.lr_biases * args.batch_size / 256:g}")

    # Train
    with Training(args, world, images, build_views(args),
                  chance_loss=chance_loss(args.batch_size, args.embedding_dim, args.lambda_),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)}) as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=0.001 * lr,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=False)
        for step, batch in run.steps(export=model.backbone):  # 1. two views
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                z1, z2 = ddp_model(batch.views)  # 2. embeddings
            loss = barlow_twins_loss(z1, z2, args.lambda_)  # 3. correlate, 4. to the identity
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z1, z2)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
