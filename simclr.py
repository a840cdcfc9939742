"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709.

1. Make two views of every image: strong crops, colour and blur.
2. Embed both: backbone h, projector z.
3. For every embedding, the other view of the same image is the positive, and both views of all
   other images, of all processes, are the negatives. NT-Xent is the cross-entropy of identifying
   the positive.

Letters: N images per process, W processes, D embedding size, H backbone width.

Differs from the official code (google-research/simclr, TensorFlow): its loss adds the two
directions and is twice ours, which is the paper's mean over the 2N rows. LARS hides the factor from
weights, but their decay counts twice here, and biases and norms move half as fast. Its learning
rate is inside the momentum buffer, so a changed rate acts with a delay. The backbone starts as
torchvision's does, there as TensorFlow's; contrast changes about the mean gray of an image, there
about each channel's mean; saturation blends with gray, there it is a factor in HSV; blur reaches 8
pixels to each side, there 11. Left out: the square-root rule for the learning rate, .075 sqrt(batch
size), which the paper prefers for short runs of small batches (pass its value times 256 / batch
size as --lr). Multi-crop and gradient caching: `simclr_multicrop.py`.

    python simclr.py
    torchrun --nproc_per_node=8 simclr.py --data /path/to/imagenet --output runs/simclr
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # paper, sections 2 and 3; inputs not normalised, as in the official code
    arch="resnet50", stem="imagenet", image_size=224, in_chans=3,
    mean=[0.0], std=[1.0],
    views="photo", crop_scale=[0.08, 1.0], jitter_strength=1.0, blur=True,
    projector_dim=2048, embedding_dim=128, temperature=0.1,
    epochs=100, batch_size=4096, lr=0.3, weight_decay=1e-6, warmup_epochs=10, sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    # README of the official code's first release: about 91 % linear after 1,000 epochs. Since
    # 2020-06 it says weight decay 1e-4 and a projector of three layers.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32, jitter_strength=0.5, blur=False,
        projector_dim=512, temperature=0.5, epochs=1000, batch_size=512, lr=1.0,
    ),
    # Ours, chosen on the built-in digits: a minute on two cores.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], jitter_strength=0.5, blur=False,
        projector_dim=128, embedding_dim=64, temperature=0.5,
        epochs=60, batch_size=256, lr=1.0, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.POOLED, crops="one")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--jitter-strength", type=cli.not_negative, help="strength of colour jitter")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--projector-dim", type=cli.pos_int, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--temperature", type=cli.positive, help="lower: hard negatives count more")
    return cli.parse(parser, RECIPES, argv)


# -------------------------------------------------------------------------------------------- views


def photo_views(image_size, crop_scale, jitter, blur):
    """Two views of the same kind (paper, appendix A)."""
    steps = [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
        augment.HorizontalFlip(p=0.5),
        augment.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter, p=0.8),
        augment.Grayscale(p=0.2),
        augment.GaussianBlur(sigma=(0.1, 2.0), p=0.5 if blur else 0.0),
    ]
    return [(image_size, steps)] * 2


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
        """Embed two views (N, C, H, W) in one pass, so that batch norm sees both; (2, N, D)."""
        z = self.projector(self.backbone(torch.cat(views)))
        return z.view(len(views), -1, z.shape[1])


# --------------------------------------------------------------------------------------------- loss


@comm.outside_autocast
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Compute the normalised temperature-scaled cross-entropy of two views.

    Averaged over processes, the loss and its gradient are those of the joined batch.

    Args:
        z1, z2: embeddings (N, D) of the two views; normalised here.
        temperature: divides the cosines.

    Returns:
        Scalar: mean over this process's 2N rows of -log softmax at the positive, among the 2WN - 1
        other rows of all processes.

    Reference: section 2.1 and algorithm 1.
    """
    z = F.normalize(comm.upcast(torch.stack([z1, z2], dim=1)), dim=-1)  # (N, 2, D): pairs adjacent
    z_all = comm.all_gather_with_grad(z).flatten(0, 1)  # (W*N*2, D)
    z_local = z.flatten(0, 1)  # (N*2, D)
    logits = z_local @ z_all.T / temperature  # (2N, 2WN)
    self_index = torch.arange(len(z_local), device=z.device) + comm.rank() * len(z_local)
    logits = logits.scatter(1, self_index[:, None], -math.inf)
    # The views of an image are neighbours, rows 2i and 2i + 1: the positive of row r is r ^ 1.
    return F.cross_entropy(logits, self_index ^ 1)


@torch.no_grad()
def indicators(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: on this process's embeddings (N, D) of the two views."""
    z1, z2 = (F.normalize(comm.upcast(z), dim=1) for z in (z1, z2))
    cosines = z1 @ z2.T
    found = cosines.argmax(1) == torch.arange(len(z1), device=z1.device)
    return {
        "contrast_accuracy": found.float().mean(),  # the other view is the nearest in this batch
        "positive_similarity": cosines.diagonal().mean(),
        "z_std": z1.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    size, scale, blur = args.image_size, args.crop_scale, args.blur
    if args.views == "digits":
        views = augment.digit_views([(2, size, scale)], args.jitter_strength, blur)
    else:
        views = photo_views(size, scale, args.jitter_strength, blur)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        image_size=args.image_size, zero_init_residual=True)
    model = SimCLR(backbone, args.projector_dim, args.embedding_dim)
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
                  chance_loss=math.log(2 * args.batch_size - 1),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)}) as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=0.0,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=False)
        for step, batch in run.steps(export=model.backbone):  # 1. two views
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                z1, z2 = ddp_model(batch.views)  # 2. embeddings
            loss = nt_xent(z1, z2, args.temperature)  # 3. identify the other view
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z1, z2)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
