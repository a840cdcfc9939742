"""SimSiam: Exploring Simple Siamese Representation Learning, arXiv 2011.10566.

1. Make two views of every image, of the same kind.
2. Embed both: backbone h, projector z, predictor p, one view after the other.
3. Predict the embedding of each view from the other view. The embedding that is predicted is a
   constant there (stop-gradient), which keeps the network from giving all images the same one.
   There are no negatives and no teacher.

Letters: N images per process, W processes, D embedding size, H backbone width.

Collapse does not show in the loss, which then goes to -1: watch `z_std` (section 4.1).

Differs from the official code (facebookresearch/simsiam): the hidden layers of the projector have
the width of --projector-dim, there that of the backbone (2,048 both, with ResNet-50). Blur is a
true Gaussian, there Pillow's chain of box filters. The official runs are float32; here CUDA has
bf16 unless `--amp none`.

    python simsiam.py
    torchrun --nproc_per_node=8 simsiam.py --data /path/to/imagenet --output runs/simsiam
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # paper, section 3 (with batch 256 the official README has 0.2 points more)
    arch="resnet50", stem="imagenet", image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.2, 1.0], blur=True,
    projector_dim=2048, embedding_dim=2048, predictor_dim=512, fix_predictor_lr=True,
    epochs=100, batch_size=512, lr=0.05, weight_decay=1e-4, warmup_epochs=0, sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    # solo-learn's CIFAR-10 run, 90.5 linear. There the rate changes every step, crops are bicubic,
    # and the stem pads by 2 pixels.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        crop_scale=[0.08, 1.0], blur=False,
        epochs=1000, batch_size=256, lr=0.5, weight_decay=1e-5, warmup_epochs=10,
    ),
    # Ours, chosen on the built-in digits: a minute and a half on two cores.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.75, 1.0], blur=False,
        projector_dim=128, embedding_dim=128, predictor_dim=32,
        epochs=62, batch_size=128, lr=1.0, weight_decay=3e-4, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.POOLED, crops="one",
                                      decay="all")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--projector-dim", type=cli.pos_int, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--predictor-dim", type=cli.pos_int, help="hidden width of the predictor: "
                       "a bottleneck, a quarter of D in the paper")
    group.add_argument("--fix-predictor-lr", action=cli.Switch, help="no schedule for the "
                       "predictor, which is to keep up with the embeddings")
    return cli.parse(parser, RECIPES, argv)


# -------------------------------------------------------------------------------------------- views


def photo_views(image_size, crop_scale, blur):
    """Two views of the same kind, as in MoCo v2 (paper, section 3)."""
    steps = [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
        augment.HorizontalFlip(p=0.5),
        augment.ColorJitter(0.4, 0.4, saturation=0.4, hue=0.1, p=0.8),
        augment.Grayscale(p=0.2),
        augment.GaussianBlur(sigma=(0.1, 2.0), p=0.5 if blur else 0.0),
    ]
    return [(image_size, steps)] * 2


# -------------------------------------------------------------------------------------------- model


class SimSiam(nn.Module):
    """Backbone, projector H -> hidden -> hidden -> D and predictor D -> hidden -> D.

    Batch norm follows every layer but the predictor's last; the projector's last one cancels the
    bias before it, which is therefore not trained.
    """

    def __init__(self, backbone: nn.Module, projector_dim: int, embedding_dim: int,
                 predictor_dim: int):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, projector_dim, bias=False),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, projector_dim, bias=False),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, embedding_dim),
            nn.BatchNorm1d(embedding_dim, affine=False),
        )
        self.projector[6].bias.requires_grad_(False)
        self.predictor = nn.Sequential(
            nn.Linear(embedding_dim, predictor_dim, bias=False),
            nn.BatchNorm1d(predictor_dim),
            nn.ReLU(inplace=True),
            nn.Linear(predictor_dim, embedding_dim),
        )

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Embed each view (N, C, H, W) on its own, with its own batch statistics.

        Returns:
            Embeddings z and predictions p, (N, D) for each view.
        """
        z = [self.projector(self.backbone(view)) for view in views]
        return z, [self.predictor(each) for each in z]


# --------------------------------------------------------------------------------------------- loss


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Compute minus the mean cosine of predictions and what they predict.

    Args:
        p: predictions (N, D) of one view; normalised here.
        z: embeddings (N, D) of the other view, row by row; normalised here, detached.

    Returns:
        Scalar: mean over the N rows; a row of norm 0 has a cosine of 0.

    Reference: equations 1 and 3, and algorithm 1.
    """
    p, z = F.normalize(comm.upcast(p), dim=1), F.normalize(comm.upcast(z.detach()), dim=1)
    return -(p * z).sum(1).mean()


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
        views = photo_views(size, scale, blur)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        image_size=args.image_size, zero_init_residual=True)
    model = SimSiam(backbone, args.projector_dim, args.embedding_dim, args.predictor_dim)
    model = comm.prepare(model, world, args.sync_bn)
    if args.compile:
        backbones.compile(backbone)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    groups = [
        {"params": [*model.backbone.parameters(), *model.projector.parameters()]},
        {"params": model.predictor.parameters()},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    with Training(args, world, images, build_views(args), chance_loss=0.0,
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)}) as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.lr_by_epoch(lr, "cosine", args.epochs, args.warmup_epochs,
                                       run.steps_per_epoch)
        for step, batch in run.steps(export=model.backbone):  # 1. two views
            optim.set_lr(optimizer, lr_of_step[step])
            if args.fix_predictor_lr:
                optimizer.param_groups[1]["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                z, p = ddp_model(batch.views)  # 2. embeddings and predictions
            # 3. predict each view from the other one
            loss = (negative_cosine(p[0], z[1]) + negative_cosine(p[1], z[0])) / 2
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z[0])


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
