"""VICReg: Variance-Invariance-Covariance Regularization, arXiv 2105.04906.

1. Make two views of every image: the first always blurred, the second sometimes solarised.
2. Embed both: backbone h, projector z (the paper's expander), one view after the other.
3. Pull the two embeddings of an image together (invariance), and regularise each view by itself,
   over the images of all processes: every dimension keeps a standard deviation of at least 1
   (variance), so the embeddings cannot collapse, and no two dimensions carry the same information
   (covariance). There are no negatives, and neither view sees the statistics of the other.

Letters: N images per process, W processes, D embedding size, H backbone width.

Differs from the paper, as the official code (facebookresearch/vicreg) does: the invariance is
divided by D, the two terms of variance by 2. Differs from the official code: the loss is computed
in float32 regardless of autocast.
An epoch's last, short batch is kept there. Blur is a true Gaussian, there Pillow's box filters.

    python vicreg.py
    torchrun --nproc_per_node=8 vicreg.py --data /path/to/imagenet --output runs/vicreg
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # paper, section 4.2
    arch="resnet50", stem="imagenet", image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.08, 1.0], blur=True, solarize=[0.0, 0.2],
    projector_dim=8192, embedding_dim=8192, sim_weight=25.0, std_weight=25.0, cov_weight=1.0,
    epochs=1000, batch_size=2048, lr=0.2, weight_decay=1e-6, warmup_epochs=10, sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    "imagenet_100": IMAGENET | dict(epochs=100, lr=0.3),  # the author, when asked (issue 13)
    # Sizes, views, weights, batch, rate and decay of solo-learn's CIFAR-10 run. Its 92.1 linear
    # is not promised: its LARS takes steps of .02 |p| at any rate, but no longer than SGD's; ours
    # are .001 lr |p|. It does not halve the terms of variance: its weight 25 is 50 here. Its stem
    # pads by 2 pixels.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        crop_scale=[0.2, 1.0], blur=False, solarize=[0.1, 0.1],
        projector_dim=2048, embedding_dim=2048, std_weight=50.0,
        batch_size=256, lr=0.3, weight_decay=1e-4,
    ),
    # Ours, chosen on the built-in digits: a minute on two cores.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], blur=False, solarize=[0.0, 0.0],
        projector_dim=256, embedding_dim=256,
        epochs=60, batch_size=256, lr=1.0, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.POOLED, crops="one")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--solarize", type=cli.fraction, nargs=2, metavar="P",
                       help="how often the first and the second view are solarised")
    group.add_argument("--projector-dim", type=cli.pos_int, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.two_or_more, help="D, size of an embedding")
    group.add_argument("--sim-weight", type=cli.not_negative, help="weight of the invariance")
    group.add_argument("--std-weight", type=cli.not_negative,
                       help="weight of the variance; 0 and all embeddings collapse to one")
    group.add_argument("--cov-weight", type=cli.not_negative, help="weight of the covariance")
    args = cli.parse(parser, RECIPES, argv)
    if args.views == "digits" and any(args.solarize):
        parser.error("--solarize {:g} {:g}: --views digits are never solarised; pass --solarize 0 0"
                     .format(*args.solarize))
    return args


# -------------------------------------------------------------------------------------------- views


def photo_view(image_size, crop_scale, blur, blur_p, solarize_p):
    """A view of one of two kinds, those of Barlow Twins (paper, appendix C)."""
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


class VICReg(nn.Module):
    """Backbone and projector H -> hidden -> hidden -> D, with batch norm between its layers."""

    def __init__(self, backbone: nn.Module, projector_dim: int, embedding_dim: int):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, projector_dim),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, projector_dim),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, embedding_dim, bias=False),
        )

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Embed each view (N, C, H, W) on its own, with its own batch statistics; (N, D) each."""
        return [self.projector(self.backbone(view)) for view in views]


# --------------------------------------------------------------------------------------------- loss


@comm.outside_autocast
def covariance(z: Tensor) -> Tensor:
    """Compute the covariance (D, D) of embeddings (N, D) over all processes' rows; unbiased."""
    z = comm.upcast(z)
    count = len(z) * comm.size()
    z = z - comm.all_reduce_with_grad(z.sum(0)) / count
    return comm.all_reduce_with_grad(z.T @ z) / (count - 1)


def off_diagonal(matrix: Tensor) -> Tensor:
    """All entries (D - 1, D) of a contiguous square matrix but its diagonal, without a copy."""
    size = len(matrix)
    return matrix.view(-1)[:-1].view(size - 1, size + 1)[:, 1:]


def vicreg_loss(z1: Tensor, z2: Tensor, sim_weight: float, std_weight: float,
                cov_weight: float) -> Tensor:
    """Compute the weighted sum of invariance, variance and covariance.

    The mean over processes is the loss of the joined batch, and DDP averages to its gradient. Uses
    the two functions above.

    Args:
        z1, z2: embeddings (N, D) of the two views.
        sim_weight: of the mean squared difference of the views, over images and dimensions.
        std_weight: of the mean over dimensions of max(0, 1 - standard deviation), and over views.
        cov_weight: of the sum of the squared covariances of any two dimensions, divided by D; both
            views' are added.

    Returns:
        Scalar.

    Reference: equations 1 to 6, with the divisors of the official code.
    """
    z1, z2 = comm.upcast(z1), comm.upcast(z2)
    c1, c2 = covariance(z1), covariance(z2)
    invariance = F.mse_loss(z1, z2)
    # Without the 1e-4 a dimension that has collapsed has no finite gradient.
    variance = sum(F.relu(1 - (c.diagonal() + 1e-4).sqrt()).mean() / 2 for c in (c1, c2))
    redundancy = sum(off_diagonal(c).square().sum() / len(c) for c in (c1, c2))
    return sim_weight * invariance + std_weight * variance + cov_weight * redundancy


@torch.no_grad()
def indicators(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: z1's covariance over all processes, distance, and spread."""
    c = covariance(z1)
    unit = F.normalize(comm.upcast(z1), dim=1)
    return {
        "dimension_std": c.diagonal().sqrt().mean(),  # to 1; 0 in collapse
        "off_diagonal_rms": off_diagonal(c).square().mean().sqrt(),  # to 0
        "view_distance": F.mse_loss(comm.upcast(z1), comm.upcast(z2)),  # to 0; 2 where unrelated
        "z_std": unit.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    size, scale, blur = args.image_size, args.crop_scale, args.blur
    if args.views == "digits":
        views = augment.digit_views([(2, size, scale)], jitter=0.5, blur=blur)
    else:
        views = [photo_view(size, scale, blur, blur_p=1.0, solarize_p=args.solarize[0]),
                 photo_view(size, scale, blur, blur_p=0.1, solarize_p=args.solarize[1])]
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        image_size=args.image_size, zero_init_residual=True)
    model = VICReg(backbone, args.projector_dim, args.embedding_dim)
    model = comm.prepare(model, world, args.sync_bn)
    if args.compile:
        backbones.compile(backbone)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    weights, others = optim.split_by_dimension(model)
    groups = [
        {"params": weights},
        {"params": others, "decay": False, "adapt": False},
    ]
    optimizer = optim.LARS(groups, lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                           trust_coefficient=0.001)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    with Training(args, world, images, build_views(args),
                  chance_loss=0.99 * args.std_weight,  # of one embedding for all images
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
            loss = vicreg_loss(z1, z2, args.sim_weight, args.std_weight,
                               args.cov_weight)  # 3. invariance, variance, covariance
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z1, z2)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
