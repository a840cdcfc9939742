"""LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics, arXiv 2511.08544.

1. Make two global crops and some local ones, smaller in pixels and in area, of every image.
2. Embed all of them, one pass per crop size: backbone h, projector z.
3. Draw directions, anew in each step and equal on all processes. For each view and direction SIGReg
   measures how far the projections of all processes' images are from a standard normal. Where every
   direction is normal, the embeddings are an isotropic Gaussian: they have not collapsed, and no
   two dimensions carry the same information.
4. Pull all crops of an image to the mean of its global ones. There are no negatives, no teacher, no
   predictor, and the gradient goes everywhere.

Letters: N images per process, W processes, V crops of an image, G of them global, D embedding size,
M directions, H backbone width.

Differs from the official code (rbalestr-lab/lejepa): SIGReg is computed in float32 regardless of
autocast; in its minimal example a Linear of 512 outputs stands between backbone and projector, the
mean of all crops is the goal (there all are global), and the rate never falls below 1e-3. Blur is a
true Gaussian, there one of 7 pixels.

    python lejepa.py
    torchrun --nproc_per_node=8 lejepa.py --data /path/to/imagenet --output runs/lejepa
"""

import itertools
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim, rng
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # official README, rate 5e-4; batch, warm-up, drop path and D are ours: not in it
    arch="vit_large", stem="imagenet", patch_size=14, drop_path=0.1, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", num_crops=[2, 6], crop_sizes=[224, 98], crop_scales=[0.3, 1.0, 0.05, 0.3],
    jitter=[0.4, 0.4, 0.2, 0.1], blur=True, solarize=0.2,
    projector_dim=2048, embedding_dim=128, num_directions=1024, lambda_=0.05,
    epochs=100, batch_size=512, lr=5e-4 / 2, weight_decay=0.05, warmup_epochs=10, sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    "imagenet_resnet50": IMAGENET | dict(arch="resnet50", weight_decay=5e-4),  # likewise
    # The official minimal example, on Imagenette: 90.7 % with a linear probe trained beside it.
    "imagenette": IMAGENET | dict(
        arch="vit_small", patch_size=8, num_crops=[4], crop_sizes=[128], crop_scales=[0.08, 1.0],
        jitter=[0.8, 0.8, 0.8, 0.2], solarize=0.1,  # as there: .2 times torchvision's own .5
        embedding_dim=16, num_directions=256, lambda_=0.02,
        epochs=800, batch_size=256, lr=2e-3, warmup_epochs=1,
    ),
    # Ours, the authors give none: their rate and decay of ResNets, the example's crops and lambda.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", patch_size=4, drop_path=0.0,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        num_crops=[4], crop_sizes=[32], crop_scales=[0.08, 1.0], blur=False,
        embedding_dim=64, num_directions=256, lambda_=0.02,
        epochs=800, batch_size=256, lr=5e-4, weight_decay=5e-4,
    ),
    # Ours, chosen on the built-in digits: a minute on two cores.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", patch_size=4, drop_path=0.0, mean=[0.5], std=[0.5],
        views="digits", num_crops=[2], crop_sizes=[16], crop_scales=[0.6, 1.0],
        jitter=[0.5, 0.5, 0.0, 0.0], blur=False, solarize=0.0,
        projector_dim=256, embedding_dim=64, num_directions=128, lambda_=0.01,
        epochs=60, batch_size=128, lr=4e-3, weight_decay=5e-4, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.NAMES, crops="multi",
                                      decay="all")
    group.add_argument("--patch-size", type=cli.pos_int,
                       help="transformer: side of a patch in pixels; smaller is better, and slower")
    group.add_argument("--drop-path", type=cli.fraction,
                       help="transformer: stochastic depth of the last block")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--jitter", type=cli.not_negative, nargs=4, metavar="X",
                       help="strength of changes of brightness, contrast, saturation and hue")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--solarize", type=cli.fraction, metavar="P",
                       help="how often a view is solarised")
    group.add_argument("--projector-dim", type=cli.pos_int, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--num-directions", type=cli.pos_int,
                       help="M, directions of a step; more is steadier, and slower")
    group.add_argument("--lambda", dest="lambda_", metavar="LAMBDA", type=cli.fraction,
                       help="weight of SIGReg; the rest to 1 is that of the invariance; .01 to .1")
    args = cli.parse(parser, RECIPES, argv)
    x = args.jitter[0]
    if args.views == "digits" and (args.jitter != [x, x, 0, 0] or args.solarize):
        given = " ".join(f"{value:g}" for value in args.jitter)
        parser.error(f"--jitter {given} --solarize {args.solarize:g} are not for --views digits; "
                     f"pass --jitter {x:g} {x:g} 0 0 --solarize 0")
    if args.arch not in backbones.VITS and cli.peek(argv, "--drop-path", float):
        parser.error(f"--drop-path is for transformers, and --arch is {args.arch}")
    cli.check_patches(parser, args)
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(crops, jitter, blur, solarize):
    """Crops of the same kind but for their size and area."""
    views = []
    for count, size, scale in crops:
        steps = [
            augment.RandomResizedCrop(scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
            augment.HorizontalFlip(p=0.5),
            augment.ColorJitter(*jitter, p=0.8),
            augment.Grayscale(p=0.2),
            augment.GaussianBlur(sigma=(0.1, 2.0), p=0.5 if blur else 0.0),
            augment.Solarize(threshold=128 / 255, p=solarize),
        ]
        views += [(size, steps)] * count
    return views


# -------------------------------------------------------------------------------------------- model


class LeJEPA(nn.Module):
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
            nn.Linear(projector_dim, embedding_dim),
        )

    def forward(self, views: list[Tensor]) -> Tensor:
        """Embed V views (N, C, H, W), sorted by size, in one pass per size; (V, N, D)."""
        sizes = itertools.groupby(views, key=lambda view: view.shape[-2:])
        h = torch.cat([self.backbone(torch.cat(list(same))) for _, same in sizes])
        z = self.projector(h)
        return z.view(len(views), -1, z.shape[1])


# --------------------------------------------------------------------------------------------- loss


def draw_directions(seed: int, step: int, embedding_dim: int, count: int) -> Tensor:
    """Unit columns (D, M), uniform on the sphere: equal on every process and after a resume."""
    normal = rng.philox(seed, rng.DIRECTIONS, step).standard_normal((embedding_dim, count))
    return F.normalize(torch.from_numpy(normal), dim=0)


def normal_cf(like: Tensor) -> tuple[Tensor, Tensor]:
    """17 points t from 0 to 3, and the standard normal's characteristic function there."""
    t = torch.linspace(0, 3, 17, dtype=like.dtype, device=like.device)
    return t, (-t.square() / 2).exp()


@comm.outside_autocast
def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """Measure how far embeddings are from an isotropic Gaussian, along some directions.

    Of each view and direction the statistic of Epps and Pulley: the squared distance of the
    characteristic functions, integrated over t under exp(-t^2 / 2), times the number of images.
    Every process returns the number of the joined batch; DDP averages to its gradient. Uses
    `normal_cf`.

    Args:
        z: embeddings (V, N, D).
        directions: (D, M), unit columns, equal on all processes.

    Returns:
        Scalar: mean over the views and directions. About 1 for Gaussian embeddings whatever their
        number; for a collapse to 0 it is 0.4 W N.

    Reference: sections 4.2 and 4.3, with the integral over [0, 3] doubled, as the official code.
    """
    z = comm.upcast(z)
    t, normal = normal_cf(z)
    count = z.shape[1] * comm.size()
    angles = (z @ directions.to(z))[..., None] * t  # (V, N, M, 17)
    sums = torch.stack([angles.cos().sum(1), angles.sin().sum(1)])
    real, imaginary = comm.all_reduce_with_grad(sums) / count  # (V, M, 17) each
    distance = (real - normal).square() + imaginary.square()
    return 2 * count * torch.trapezoid(distance * normal, t).mean()


def invariance(z: Tensor, num_global: int) -> Tensor:
    """Mean squared difference of embeddings (V, N, D) to the mean of their image's global views.

    The first `num_global` views are global; the gradient goes to their mean as well. The mean over
    processes is the joined loss.
    """
    z = comm.upcast(z)
    return (z - z[:num_global].mean(0)).square().mean()


def chance_loss(num_views: int, num_global: int, lambda_: float) -> float:
    """The loss to expect of embeddings that are independent Gaussian noise."""
    t, normal = normal_cf(torch.zeros((), dtype=torch.float64, device="cpu"))
    gaussian = 2 * torch.trapezoid((1 - normal.square()) * normal, t).item()
    return lambda_ * gaussian + (1 - lambda_) * (1 + 1 / num_global - 2 / num_views)


@torch.no_grad()
def indicators(z: Tensor, gaussian: Tensor, distance: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged; z (N, D) are the embeddings of one view."""
    unit = F.normalize(comm.upcast(z), dim=1)
    return {
        "sigreg": gaussian,  # to about 1
        "invariance": distance,  # to 0
        "z_std": unit.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    if args.views == "digits":
        views = augment.digit_views(cli.crops(args), jitter=args.jitter[0], blur=args.blur)
    else:
        views = photo_views(cli.crops(args), args.jitter, args.blur, args.solarize)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, stem=args.stem, zero_init_residual=True,
        image_size=args.image_size, patch_size=args.patch_size, positions="learned",
        drop_path=args.drop_path)
    model = LeJEPA(backbone, args.projector_dim, args.embedding_dim)
    model = comm.prepare(model, world, args.sync_bn)
    if args.compile:
        backbones.compile(backbone)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999),
                                  weight_decay=args.weight_decay, fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    num_global, num_views = args.num_crops[0], sum(args.num_crops)
    with Training(args, world, images, build_views(args),
                  chance_loss=chance_loss(num_views, num_global, args.lambda_),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)}) as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.01 * lr, base=lr, final=0.001 * lr,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=False)
        for step, batch in run.steps(export=model.backbone):  # 1. global and local crops
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                z = ddp_model(batch.views)  # 2. embeddings
            directions = draw_directions(args.seed, step, z.shape[2], args.num_directions)
            gaussian = sigreg(z, comm.send(directions, world.device))  # 3. an isotropic Gaussian
            distance = invariance(z, num_global)  # 4. one embedding for all crops
            loss = args.lambda_ * gaussian + (1 - args.lambda_) * distance
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z[0], gaussian, distance)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
