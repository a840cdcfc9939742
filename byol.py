"""BYOL: Bootstrap Your Own Latent, arXiv 2006.07733.

1. Make two views of every image: the first always blurred, the second sometimes solarised.
2. Embed both with the online network: backbone h, projector z, predictor p, one view after the
   other.
3. Embed both with the target network, which has no predictor. No gradient goes there.
4. Predict the target's embedding of each view from the other view. There are no negatives.
5. Move the target a little towards the online network (EMA), less and less over the run.

Letters: N images per process, W processes, D embedding size, H backbone width.

Collapse does not show in the loss, which then goes to 0: watch `z_std`.

Differs from the official code (google-deepmind/deepmind-research, JAX). There the target starts
from values of its own, not as a copy; layers start as haiku's (Linear weights normal, cut off at 2
standard deviations of H^-1/2), not as torch's; brightness is added (-.4 to .4), not multiplied;
contrast changes about each channel's mean, not about the mean gray of the image; saturation is a
factor in HSV, not a blend with gray; blur reaches 11 pixels to each side, not 8; and a linear
classifier is trained beside it on detached features, which is left out here. The official runs are
float32; here CUDA has bf16 unless `--amp none`.

    python byol.py
    torchrun --nproc_per_node=8 byol.py --data /path/to/imagenet --output runs/byol
"""

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # paper, section 3.2, and the official settings for other numbers of epochs
    arch="resnet50", stem="imagenet", image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.08, 1.0], blur=True,
    projector_dim=4096, embedding_dim=256, predictor_dim=4096, momentum=0.996,
    trust_coefficient=0.001,
    epochs=1000, batch_size=4096, lr=0.2, weight_decay=1.5e-6, warmup_epochs=10, sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    "imagenet_300": IMAGENET | dict(epochs=300, lr=0.3, weight_decay=1e-6, momentum=0.99),
    "imagenet_100": IMAGENET | dict(epochs=100, lr=0.45, weight_decay=1e-6, momentum=0.99),
    # Sizes, batch, rate and decay of solo-learn's CIFAR-10 run. Its 92.6 linear is not promised:
    # its LARS takes steps of .02 |p| at any rate, but no longer than SGD's; ours are .001 lr |p|.
    # Its stem pads by 2 pixels.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616], blur=False,
        momentum=0.99, batch_size=256, lr=1.0, weight_decay=1e-5,
    ),
    # Ours, chosen on the built-in digits: a minute and a half on two cores.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.75, 1.0], blur=False,
        projector_dim=512, embedding_dim=64, predictor_dim=1024, momentum=0.9,
        trust_coefficient=0.005,
        epochs=42, batch_size=128, lr=3.0, weight_decay=1e-6, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.POOLED, crops="one")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--projector-dim", type=cli.pos_int, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--predictor-dim", type=cli.pos_int, help="hidden width of the predictor")
    group.add_argument("--momentum", type=cli.fraction,
                       help="EMA momentum of the target in the first step, a cosine takes it to 1; "
                       "lower for short runs")
    group.add_argument("--trust-coefficient", type=cli.positive,
                       help="LARS: step length of weights relative to their norm; unlike --lr it "
                       "leaves biases and norms alone")
    return cli.parse(parser, RECIPES, argv)


# -------------------------------------------------------------------------------------------- views


def photo_view(image_size, crop_scale, blur, blur_p, solarize_p):
    """A view of one of two kinds (paper, appendix B)."""
    steps = [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
        augment.HorizontalFlip(p=0.5),
        augment.ColorJitter(0.4, 0.4, saturation=0.2, hue=0.1, p=0.8),
        augment.Grayscale(p=0.2),
        augment.GaussianBlur(sigma=(0.1, 2.0), p=blur_p if blur else 0.0),
        augment.Solarize(threshold=0.5, p=solarize_p),
    ]
    return image_size, steps


# -------------------------------------------------------------------------------------------- model


class BYOL(nn.Module):
    """Backbone, projector H -> hidden -> D and predictor D -> hidden -> D, batch norm in both."""

    def __init__(self, backbone: nn.Module, projector_dim: int, embedding_dim: int,
                 predictor_dim: int):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, projector_dim),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, embedding_dim, bias=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(embedding_dim, predictor_dim),
            nn.BatchNorm1d(predictor_dim),
            nn.ReLU(inplace=True),
            nn.Linear(predictor_dim, embedding_dim, bias=False),
        )

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Embed each view (N, C, H, W) on its own, with its own batch statistics.

        Returns:
            Embeddings z and predictions p, (N, D) for each view.
        """
        z = [self.projector(self.backbone(view)) for view in views]
        return z, [self.predictor(each) for each in z]


def make_target(online: nn.Module) -> nn.Module:
    """A copy without predictor that is never trained; in train mode like the online network."""
    target = backbones.without_dropping(copy.deepcopy(online).requires_grad_(False))
    target.predictor = nn.Identity()
    return target


# --------------------------------------------------------------------------------- loss and updates


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """Compute the mean squared distance of predictions from what they predict, both of norm 1.

    Args:
        p: predictions (N, D) of one view; normalised here.
        z: the target's embeddings (N, D) of the other view, row by row; normalised here, detached.

    Returns:
        Scalar: mean over the N rows of 2 - 2 cos; a row of norm 0 has a cosine of 0.

    Reference: equation 2.
    """
    p, z = F.normalize(comm.upcast(p), dim=1), F.normalize(comm.upcast(z.detach()), dim=1)
    return (2 - 2 * (p * z).sum(1)).mean()


@torch.no_grad()
def update_ema(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the target's parameters to the online network's of the same names.

    They keep a share `momentum` of their own. Buffers stay as they are: the target's batch
    statistics come from its own forwards.
    """
    old = dict(target.named_parameters())
    torch._foreach_lerp_([*old.values()], [*map(online.get_parameter, old)], 1 - momentum)


@torch.no_grad()
def indicators(z: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: on this process's embeddings (N, D) of one view."""
    z = F.normalize(comm.upcast(z), dim=1)
    return {"z_std": z.std(0, correction=0).mean()}  # 1 / sqrt(D) where they spread, 0 in collapse


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
    model = BYOL(backbone, args.projector_dim, args.embedding_dim, args.predictor_dim)
    model = comm.prepare(model, world, args.sync_bn)
    target = make_target(model)
    if args.compile:
        backbones.compile(backbone, target.backbone)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    weights, others = optim.split_by_dimension(model)
    groups = [
        {"params": weights},
        {"params": others, "decay": False, "adapt": False},
    ]
    optimizer = optim.LARS(groups, lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                           trust_coefficient=args.trust_coefficient)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    with Training(args, world, images, build_views(args), chance_loss=4.0,
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)}) as run:
        run.resume(model=model, target=target, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=0.0,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=False)
        momentum_of_step = optim.cosine(args.momentum, 1.0, run.total_steps)
        for step, batch in run.steps(export=model.backbone):  # 1. two views
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                z, p = ddp_model(batch.views)  # 2. embeddings and predictions
                with torch.no_grad():
                    targets, _ = target(batch.views)  # 3. targets
            # 4. predict each view's target from the other one
            loss = byol_loss(p[0], targets[1]) + byol_loss(p[1], targets[0])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            update_ema(target, model, momentum_of_step[step])  # 5. target
            run.log(loss, lr_of_step[step], indicators, z[0])


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
