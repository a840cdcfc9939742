"""DenseCL: Dense Contrastive Learning for Self-Supervised Visual Pre-Training, 2011.09157.

1. Make two views of every image: the query's and the key's.
2. Embed the query with the encoder, which is trained: the image, from the mean of its last map, and
   every cell of that map.
3. Momentum update: the key encoder is an EMA of the encoder. Embed the key with it, without a
   gradient.
4. The key of the same image is the positive; the negatives are a queue of keys of past batches.
5. The same for every cell: its positive is the embedding of the key's cell that is most like it in
   the backbones' maps, its negatives are a second queue, with the mean cell of past keys.
6. Replace the oldest keys of both queues with the new ones.

Letters: N images per process, W processes, L cells of a map, C its channels, D embedding size, K
queue length.

The views, both heads' shape, queue and grouped batch norm are MoCo v2's. An untrained backbone
matches cells by their place in the map, and the loss would teach just that: it starts with its
image term alone (`--dense-warmup-steps`; `same_place` in the log should stay below 1).

Differs from the official code (WXinlong/DenseCL; GPL, so this is written from the paper alone):
both heads start as torch's layers do, there the image's linear layers by Kaiming's rule; the cells'
term has the paper's warm-up, which is not in their ImageNet config. Queues, permutation, blur,
running statistics and precision are those of `moco.py`, which says how they differ from the
official ones.

    python densecl.py
    torchrun --nproc_per_node=8 densecl.py --data /path/to/imagenet --output runs/densecl
"""

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, features, optim, rng
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # section 4.1, on top of MoCo v2
    arch="resnet50", stem="imagenet", image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.2, 1.0], blur=True,
    embedding_dim=128, temperature=0.2, queue_length=65536, momentum=0.999, symmetric=False,
    dense_weight=0.5, dense_warmup_steps=1000, bn_groups=8,
    epochs=200, batch_size=256, lr=0.03, weight_decay=1e-4, warmup_epochs=0, sync_bn=False,
)
RECIPES = {
    "imagenet": IMAGENET,
    # MoCo's CIFAR-10 notebook (its std, too) but for the heads.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010],
        crop_scale=[0.08, 1.0], blur=False,
        temperature=0.1, queue_length=4096, momentum=0.99,
        batch_size=512, weight_decay=5e-4,
    ),
    # Ours, chosen on the built-in digits: a minute on two cores. The warm-up lets the queue,
    # which starts as noise, fill with keys first: without it so short a run collapses. Dense from
    # step 40, every cell of the 2 x 2 maps matched the one at its own place, whatever was there.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], blur=False,
        embedding_dim=64, queue_length=1024, momentum=0.99, symmetric=True,
        dense_warmup_steps=200, bn_groups=4,
        epochs=60, batch_size=256, lr=0.12, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.RESNETS, crops="one",
                                      decay="all")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--temperature", type=cli.positive, help="lower: hard negatives count more")
    group.add_argument("--queue-length", type=cli.pos_int, help="K, keys kept in each queue")
    group.add_argument("--momentum", type=cli.fraction, help="EMA momentum of the key encoder")
    group.add_argument("--symmetric", action=cli.Switch, help="use each view as query and as key")
    group.add_argument("--dense-weight", type=cli.fraction,
                       help="share of the cells' term in the loss; the image's has the rest")
    group.add_argument("--dense-warmup-steps", type=cli.nonneg_int,
                       help="steps that the cells' term is left out of the loss")
    group.add_argument("--bn-groups", type=cli.pos_int, help="batch-norm groups (the paper's GPUs)")
    args = cli.parse(parser, RECIPES, argv)
    keys = args.batch_size * (2 if args.symmetric else 1)
    if keys > args.queue_length:
        parser.error(f"--queue-length {args.queue_length} does not hold the {keys} keys of a batch")
    if args.sync_bn and args.bn_groups > 1:
        parser.error(f"--sync-bn excludes --bn-groups {args.bn_groups}; pass --bn-groups 1")
    if not args.sync_bn and (args.bn_groups % cli.processes() or args.batch_size % args.bn_groups
                             or args.batch_size < 2 * args.bn_groups):
        parser.error(f"--bn-groups {args.bn_groups} must be a multiple of the number of processes, "
                     f"{cli.processes()}, and cut --batch-size {args.batch_size} into equal parts "
                     "of two images or more")
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(image_size, crop_scale, blur):
    """Two views of the same kind (MoCo v2, section 3)."""
    steps = [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
        augment.HorizontalFlip(p=0.5),
        augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augment.Grayscale(p=0.2),
        augment.GaussianBlur(sigma=(0.1, 2.0), p=0.5 if blur else 0.0),
    ]
    return [(image_size, steps)] * 2


# -------------------------------------------------------------------------------------------- model


class DenseCL(nn.Module):
    """Backbone and two heads H -> H -> D without batch norm: of the image, and of every cell."""

    def __init__(self, backbone: nn.Module, embedding_dim: int):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
        self.head, self.dense_head = (  # on cells, a linear layer is a 1 x 1 convolution
            nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True),
                          nn.Linear(width, embedding_dim))
            for _ in range(2)
        )

    def forward(self, views: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Embed each view (N, C, H, W) on its own, with its own batch statistics.

        Returns:
            For each view the backbone's last map as cells (N, L, C), row by row, the embedding of
            the image (N, D), and those of the cells (N, L, D).
        """
        maps = [features.resnet_maps(self.backbone, view, ["res5"])["res5"] for view in views]
        cells = [each.flatten(2).transpose(1, 2) for each in maps]
        return [(x, self.head(x.mean(1)), self.dense_head(x)) for x in cells]


class GroupedBatchNorm(nn.BatchNorm2d):
    """Batch norm over `groups` contiguous parts of the batch, each with its own statistics.

    Running statistics follow the mean over the parts.
    """

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return super().forward(x)
        means = x.new_zeros(self.groups, x.shape[1], dtype=self.running_mean.dtype)
        variances, parts = torch.zeros_like(means), []
        for part, mean, var in zip(x.chunk(self.groups), means, variances, strict=True):
            parts.append(F.batch_norm(part, mean, var, self.weight, self.bias, training=True,
                                      momentum=1.0, eps=self.eps))
        self.num_batches_tracked += 1
        self.running_mean.lerp_(means.mean(0), self.momentum)
        self.running_var.lerp_(variances.mean(0), self.momentum)
        return torch.cat(parts)


def group_batchnorm(module: nn.Module, groups: int) -> nn.Module:
    """Have every batch norm split this process's batch into `groups` parts."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__, layer.groups = GroupedBatchNorm, groups
    return module


# --------------------------------------------------------------------------------- loss and updates


@comm.outside_autocast
def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Compute the cross-entropy of identifying the positive key among the queue.

    Args:
        q: embeddings (N, D) of the queries; normalised here.
        k: embeddings (N, D) of their keys, row by row; normalised here, detached.
        queue: negatives (K, D), unit rows, detached.
        temperature: divides the cosines.

    Returns:
        Scalar: mean over the N rows of -log softmax at the positive, among 1 + K.

    Reference: MoCo, equation 1 and algorithm 1.
    """
    q, k = F.normalize(comm.upcast(q), dim=1), F.normalize(comm.upcast(k.detach()), dim=1)
    positive = (q * k).sum(1, keepdim=True)  # (N, 1)
    negative = q @ queue.detach().to(q.dtype).T  # (N, K)
    logits = torch.cat([positive, negative], dim=1) / temperature
    first = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(logits, first)


@torch.no_grad()
@comm.outside_autocast
def match_cells(q: Tensor, k: Tensor) -> Tensor:
    """Find for each cell of the query the key's cell of the largest cosine.

    Args:
        q: cells (N, L, C) of the backbone's map.
        k: cells (N, L, C) of the same images' other views.

    Returns:
        Indices (N, L) of cells of the key, the lowest in a tie (up to rounding, which differs
        among the places of equal cells in a matrix product).

    Reference: section 3.4.
    """
    q, k = F.normalize(comm.upcast(q), dim=2), F.normalize(comm.upcast(k), dim=2)
    cosines = q @ k.transpose(1, 2)
    best = cosines.amax(2, keepdim=True) - 16 * torch.finfo(cosines.dtype).eps
    return (cosines >= best).byte().argmax(2)


def dense_info_nce(q: Tensor, k: Tensor, match: Tensor, queue: Tensor,
                   temperature: float) -> Tensor:
    """Compute `info_nce` of every cell, whose positive is the key's cell that it is matched with.

    Args:
        q: embeddings (N, L, D) of the queries' cells; normalised here.
        k: embeddings (N, L, D) of the keys' cells; normalised here, detached.
        match: for each cell of a query the index (N, L) of a cell of its key.
        queue: negatives (K, D), unit rows, detached.
        temperature: divides the cosines.

    Returns:
        Scalar: mean over the N L cells.

    Reference: section 3.3.
    """
    positives = k.gather(1, match[:, :, None].expand(-1, -1, k.shape[2]))  # (N, L, D)
    return info_nce(q.flatten(0, 1), positives.flatten(0, 1), queue, temperature)


@torch.no_grad()
def update_queue(queue: Tensor, pointer: int, keys: Tensor) -> int:
    """Write the keys of all processes, in rank order, over the oldest rows of the queue.

    Args:
        queue: (K, D), written in place.
        pointer: the oldest row.
        keys: this process's keys (N, D), unit rows.

    Returns:
        The new pointer.

    Raises:
        ValueError: more keys than rows.
    """
    keys = comm.all_gather_no_grad(keys)
    if len(keys) > len(queue):
        raise ValueError(f"{len(keys)} keys do not fit into a queue of {len(queue)}")
    rows = (pointer + torch.arange(len(keys), device=queue.device)) % len(queue)
    queue[rows] = keys.to(queue.dtype)
    return (pointer + len(keys)) % len(queue)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters to the student's, keeping a share `momentum` of their own.

    Buffers stay as they are: the teacher's batch statistics come from its own forwards.
    Reference: MoCo, equation 2.
    """
    torch._foreach_lerp_([*teacher.parameters()], [*student.parameters()], 1 - momentum)


@torch.no_grad()
def encode_keys(encoder: nn.Module, images: list[Tensor], order: Tensor) -> list[list[Tensor]]:
    """Embed images in batch-norm groups drawn from the whole batch (shuffle-BN; MoCo, 3.3).

    Args:
        images: views (N, C, H, W) of this process.
        order: a permutation (W*N,) of the whole batch, equal on every process.

    Returns:
        For each view what the encoder returns, in the order of the images.
    """
    n = len(images[0])
    own = slice(comm.rank() * n, (comm.rank() + 1) * n)
    shuffled = [comm.all_gather_no_grad(view.permute(0, 2, 3, 1))[order[own]].permute(0, 3, 1, 2)
                for view in images]  # as channels_last, which they are
    back = order.argsort()[own]
    return [[comm.all_gather_no_grad(part)[back] for part in parts] for parts in encoder(shuffled)]


@torch.no_grad()
def indicators(q: Tensor, k: Tensor, queue: Tensor, match: Tensor,
               dense_loss: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: on this process's queries, keys (N, D) and matches (N, L)."""
    q, k = F.normalize(comm.upcast(q), dim=1), F.normalize(comm.upcast(k), dim=1)
    positive = (q * k).sum(1)
    places = torch.arange(match.shape[1], device=match.device)
    return {
        "contrast_accuracy": (positive > (q @ queue.T).amax(1)).float().mean(),
        "positive_similarity": positive.mean(),
        "z_std": q.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
        "dense_loss": dense_loss,  # before its weight
        "same_place": (match == places).float().mean(),  # 1 where cells match by place alone
    }


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
                                        zero_init_residual=False)
    model = DenseCL(backbone, args.embedding_dim)
    model = comm.prepare(model, world, args.sync_bn)
    if not args.sync_bn:
        model = group_batchnorm(model, args.bn_groups // world.size)
    key_encoder = copy.deepcopy(model).requires_grad_(False)
    if args.compile:
        backbones.compile(model, key_encoder)
    queue, dense_queue = F.normalize(
        torch.randn(2, args.queue_length, args.embedding_dim).to(world.device), dim=2)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    directions = 2 if args.symmetric else 1
    with Training(args, world, images, build_views(args),
                  chance_loss=math.log(1 + args.queue_length) * directions,
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim)}) as run:
        if args.dense_weight and args.dense_warmup_steps >= run.total_steps:
            comm.print_main(f"warning: --dense-warmup-steps {args.dense_warmup_steps} leaves none "
                            f"of the {run.total_steps} steps to the cells' term; this is MoCo v2")
        run.resume(model=model, key_encoder=key_encoder, queue=queue, dense_queue=dense_queue,
                   optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        pointer = run.step * args.batch_size * directions % args.queue_length
        lr_of_step = optim.lr_by_epoch(lr, "cosine", args.epochs, args.warmup_epochs,
                                       run.steps_per_epoch)
        for step, batch in run.steps(export=model.backbone):  # 1. two views
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            queries, keys = batch.views[:1], batch.views[1:]
            if args.symmetric:
                queries, keys = batch.views, batch.views[::-1]
            with autocast():
                q = ddp_model(queries)  # 2. queries
                update_ema(key_encoder, model, args.momentum)  # 3. keys
                shuffle = rng.philox(args.seed, rng.SHUFFLE, step)
                order = torch.from_numpy(shuffle.permutation(args.batch_size))
                k = encode_keys(key_encoder, keys, comm.send(order, world.device))
            image_loss = dense_loss = 0.0  # of two directions the sum, as in MoCo's notebook
            for (q_cells, q_image, q_dense), (k_cells, k_image, k_dense) in zip(q, k, strict=True):
                image_loss += info_nce(q_image, k_image, queue, args.temperature)  # 4. the key
                match = match_cells(q_cells, k_cells)  # 5. every cell's key
                dense_loss += dense_info_nce(q_dense, k_dense, match, dense_queue, args.temperature)
            weight = args.dense_weight if step >= args.dense_warmup_steps else 0.0
            loss = (1 - weight) * image_loss + weight * dense_loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, q_image, k_image, queue, match, dense_loss)
            for _, k_image, k_dense in k:  # 6. replace the oldest
                k_cell = F.normalize(comm.upcast(k_dense).mean(1), dim=1)
                update_queue(dense_queue, pointer, k_cell)
                pointer = update_queue(queue, pointer, F.normalize(comm.upcast(k_image), dim=1))


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
