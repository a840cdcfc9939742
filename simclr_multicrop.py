"""SimCLR (2002.05709) with multi-crop (SwAV, 2006.09882) and gradient caching (2101.06983).

1. Make two global crops and some local ones, smaller in pixels and in area, of every image.
2. Embed all of them, one pass per crop size: backbone h, projector z.
3. For every ordered pair of crops of an image, the one is the positive of the other; the negatives
   are all crops of all other images, of all processes. NT-Xent is the cross-entropy of identifying
   the positive. With `--grad-cache` the gradient of a large batch is computed in chunks.

Letters: N images per process, W processes, V views, D embedding size, H backbone width.

With two crops the loss is that of `simclr.py`, where the differences from the official code stand.

    python simclr_multicrop.py
    torchrun --nproc_per_node=8 simclr_multicrop.py --data /path/to/imagenet --output runs/multicrop
"""

import contextlib
import itertools
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # simclr.py, with the crops of SwAV's paper (section 4.4): two of 160, four of 96
    arch="resnet50", stem="imagenet", in_chans=3, mean=[0.0], std=[1.0],
    views="photo", num_crops=[2, 4], crop_sizes=[160, 96], crop_scales=[0.08, 1.0, 0.05, 0.14],
    jitter_strength=1.0, blur=True,
    projector_dim=2048, embedding_dim=128, temperature=0.1,
    epochs=100, batch_size=4096, lr=0.3, weight_decay=1e-6, warmup_epochs=10, sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    # That of simclr.py: for gradient caching, or with --num-crops, --crop-sizes, --crop-scales.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small",
        num_crops=[2], crop_sizes=[32], crop_scales=[0.08, 1.0], jitter_strength=0.5, blur=False,
        projector_dim=512, temperature=0.5, epochs=1000, batch_size=512, lr=1.0,
    ),
    # Ours, chosen on the built-in digits, whose small crops say little: a minute on two cores.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", mean=[0.5], std=[0.5],
        views="digits", num_crops=[2, 1], crop_sizes=[16, 12], crop_scales=[0.6, 1.0, 0.5, 0.9],
        jitter_strength=0.5, blur=False,
        projector_dim=128, embedding_dim=64, temperature=0.2,
        epochs=40, batch_size=256, lr=1.0, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.POOLED, crops="multi")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--jitter-strength", type=cli.not_negative, help="strength of colour jitter")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--projector-dim", type=cli.pos_int, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--temperature", type=cli.positive, help="lower: hard negatives count more")
    group.add_argument("--grad-cache", type=cli.pos_int, metavar="CHUNK", help="embed this many "
                       "images of a process at a time, twice: large batches in little memory")
    args = cli.parse(parser, RECIPES, argv)
    images = args.batch_size // cli.processes()
    if args.grad_cache and images % args.grad_cache:
        parser.error(f"--grad-cache {args.grad_cache} does not divide the {images} images of a "
                     "process")
    if args.grad_cache and args.sync_bn:
        parser.error("--grad-cache has batch statistics of each chunk, which --sync-bn excludes; "
                     "pass --no-sync-bn")
    if args.grad_cache and ":" in args.arch:
        parser.error(f"--grad-cache embeds images twice, which may differ by the stochastic depth "
                     f"of --arch {args.arch}")
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(crops, jitter, blur):
    """Crops of the same kind but for their size (paper, appendix A)."""
    views = []
    for count, size, scale in crops:
        steps = [
            augment.RandomResizedCrop(scale, ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
            augment.HorizontalFlip(p=0.5),
            augment.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter, p=0.8),
            augment.Grayscale(p=0.2),
            augment.GaussianBlur(sigma=(0.1, 2.0), p=0.5 if blur else 0.0),
        ]
        views += [(size, steps)] * count
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
        """Embed V views (N, C, H, W), sorted by size, in one pass per size; (V, N, D)."""
        sizes = itertools.groupby(views, key=lambda view: view.shape[-2:])
        h = torch.cat([self.backbone(torch.cat(list(same))) for _, same in sizes])
        z = self.projector(h)
        return z.view(len(views), -1, z.shape[1])


# --------------------------------------------------------------------------------------------- loss


@comm.outside_autocast
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
    z = F.normalize(comm.upcast(z), dim=1)
    n = len(z) // num_views
    z = z.view(num_views, n, -1).transpose(0, 1)  # (N, V, D): views of an image adjacent
    z_all = comm.all_gather_with_grad(z)  # (W*N, V, D)
    logits = torch.einsum("nvd,mud->nvmu", z, z_all) / temperature  # (N, V, W*N, V)
    image = torch.arange(n, device=z.device)
    same = logits[image, :, image + comm.rank() * n]  # (N, V, V): the views of the image itself
    eye = torch.eye(n, dtype=torch.bool, device=z.device)
    eye = F.pad(eye, (comm.rank() * n, len(z_all) - (comm.rank() + 1) * n))
    others = logits.masked_fill(eye[:, None, :, None], -math.inf).flatten(2).logsumexp(2)  # (N, V)
    terms = torch.logaddexp(same, others[:, :, None]) - same  # (N, V, V)
    pairs = terms.sum() - terms.diagonal(dim1=1, dim2=2).sum()  # of two different views
    return pairs / (n * num_views * (num_views - 1))


def grad_cache_backward(model: nn.Module, views: list[Tensor], chunk: int, temperature: float,
                        autocast, scaler) -> tuple[Tensor, Tensor]:
    """Fill the gradients of a whole batch with the graph of one chunk in memory at a time.

    Embed all chunks without a graph; take the loss and its gradient at the embeddings; embed every
    chunk again and go back from there. Exact for a model that treats images one by one; batch norm
    has the statistics of a chunk, and the second pass leaves its running ones alone.

    Args:
        model: views (N, C, H, W) to embeddings (V, N, D); in DDP on several processes.
        chunk: images at a time; divides N.
        temperature: of the loss.

    Returns:
        The loss and the embeddings, detached.

    Reference: Gao et al., arXiv 2101.06983, section 3.2.
    """
    chunks = list(zip(*[view.split(chunk) for view in views], strict=True))
    with torch.no_grad(), autocast():
        z = torch.cat([model(list(part)) for part in chunks], dim=1)
    loss = multicrop_nt_xent(z.requires_grad_().flatten(0, 1), len(z), temperature)
    scaler.scale(loss).backward()
    buffers = [buffer.clone() for buffer in model.buffers()]
    for number, (part, grad) in enumerate(zip(chunks, z.grad.split(chunk, dim=1), strict=True), 1):
        is_last = number == len(chunks) or comm.size() == 1
        with contextlib.nullcontext() if is_last else model.no_sync():
            with autocast():
                z_chunk = model(list(part))
            z_chunk.backward(grad)
    for buffer, first in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(first)
    return loss.detach(), z.detach()


@torch.no_grad()
def indicators(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: on this process's embeddings (N, D) of the first two crops."""
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
    make = {"photo": photo_views, "digits": augment.digit_views}[args.views]
    views = make(cli.crops(args), args.jitter_strength, args.blur)
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
                  chance_loss=math.log(1 + sum(args.num_crops) * (args.batch_size - 1)),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)}) as run:
        run.resume(model=model, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=0.0, base=lr, final=0.0,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=False)
        for step, batch in run.steps(export=model.backbone):  # 1. crops
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            if args.grad_cache:  # 2. embeddings, 3. identify the other crop
                loss, z = grad_cache_backward(ddp_model, batch.views, args.grad_cache,
                                              args.temperature, autocast, scaler)
            else:
                with autocast():
                    z = ddp_model(batch.views)  # 2.
                loss = multicrop_nt_xent(z.flatten(0, 1), len(z), args.temperature)  # 3.
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z[0], z[1])


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
