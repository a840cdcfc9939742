"""MoCo v1 and v2: Momentum Contrast, arXiv 1911.05722, and improved baselines, arXiv 2003.04297.

1. Make two views of every image: the query's and the key's.
2. Embed the query with the encoder, which is trained.
3. Momentum update: the key encoder is an EMA of the encoder. Embed the key with it, without a
   gradient.
4. The key of the same image is the positive; the negatives are a queue of keys of past batches.
5. Replace the oldest keys of the queue with the new ones.

Letters: N images per process, W processes, D embedding size, K queue length.

Batch-norm statistics would leak which key belongs to a query, because both are normalised beside
the same images. So both are normalised in groups (`--bn-groups`, over all processes), and the keys'
groups are drawn anew each step (shuffle-BN). One GPU with `--bn-groups 8` trains as 8 GPUs do; the
running statistics, which evaluations use, follow the groups of process 0.

Differs from the official code (facebookresearch/moco): the queue is (K, D), and its length need not
be a multiple of the batch; the permutation comes from (seed, step), not from process 0; with
`--symmetric` the keys of the second view enter the queue first, in the authors' notebook last. Blur
is a true Gaussian, there Pillow's chain of box filters. The official runs are float32; here CUDA
has bf16 unless `--amp none`.

    python moco.py
    torchrun --nproc_per_node=8 moco.py --data /path/to/imagenet --output runs/moco
"""

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim, rng
from common.images import open_images
from common.training import Training

V1 = dict(views="v1", mlp_head=False, temperature=0.07, schedule="step", blur=False)
V2 = dict(views="v2", mlp_head=True, temperature=0.2, schedule="cosine")
IMAGENET = V2 | dict(  # the papers, v2 unless `--version 1`
    arch="resnet50", stem="imagenet", image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], crop_scale=[0.2, 1.0], blur=True,
    embedding_dim=128, queue_length=65536, momentum=0.999, symmetric=False, bn_groups=8,
    epochs=200, batch_size=256, lr=0.03, weight_decay=1e-4, warmup_epochs=0, sync_bn=False,
)
RECIPES = {
    "imagenet": IMAGENET,
    # The authors' CIFAR-10 notebook (its std, too); its symmetric loss: --symmetric.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010],
        crop_scale=[0.08, 1.0], blur=False,
        mlp_head=False, temperature=0.1, queue_length=4096, momentum=0.99,
        batch_size=512, weight_decay=5e-4,
    ),
    # Ours, chosen on the built-in digits: a minute on two cores. The warm-up lets the queue,
    # which starts as noise, fill with keys first: without it so short a run collapses.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0], blur=False,
        embedding_dim=64, queue_length=1024, momentum=0.99, symmetric=True, bn_groups=4,
        epochs=60, batch_size=256, lr=0.12, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    version = {1: V1, 2: V2}.get(cli.peek(argv, "--version"), {})
    recipes = {name: recipe | version for name, recipe in RECIPES.items()}
    parser, group = cli.method_parser(__file__, __doc__, backbones.POOLED, crops="one",
                                      decay="all")
    group.add_argument("--version", type=int, choices=(1, 2),
                       help="sets views, head, temperature, schedule as in that paper")
    group.add_argument("--views", choices=("v1", "v2", "digits"), help="kind of augmentation")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of the views")
    group.add_argument("--mlp-head", action=cli.Switch, help="a hidden layer in the head")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--temperature", type=cli.positive, help="lower: hard negatives count more")
    group.add_argument("--queue-length", type=cli.pos_int, help="K, keys kept as negatives")
    group.add_argument("--momentum", type=cli.fraction, help="EMA momentum of the key encoder")
    group.add_argument("--symmetric", action=cli.Switch, help="use each view as query and as key")
    group.add_argument("--bn-groups", type=cli.pos_int, help="batch-norm groups (the paper's GPUs)")
    group.add_argument("--schedule", choices=("cosine", "step"),
                       help="once an epoch: a cosine to 0, or divided by 10 at 60 %% and 80 %%")
    args = cli.parse(parser, recipes, argv)
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


def photo_views(image_size, crop_scale, blur, kind):
    """Two views of the same kind (v1, section 3.3; v2, section 3)."""
    colors = {
        "v1": [augment.Grayscale(p=0.2), augment.ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0)],
        "v2": [augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), augment.Grayscale(p=0.2)],
    }
    steps = [
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
        augment.HorizontalFlip(p=0.5),
        *colors[kind],
        augment.GaussianBlur(sigma=(0.1, 2.0), p=0.5 if blur else 0.0),
    ]
    return [(image_size, steps)] * 2


# -------------------------------------------------------------------------------------------- model


class MoCo(nn.Module):
    """Backbone and head: one linear layer H -> D, or H -> H -> D (v2); no batch norm in it."""

    def __init__(self, backbone: nn.Module, mlp_head: bool, embedding_dim: int):
        super().__init__()
        self.backbone = backbone
        width = backbone.num_features
        self.head = nn.Linear(width, embedding_dim)
        if mlp_head:
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), self.head)

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """Embed each view (N, C, H, W) on its own, with its own batch statistics; (N, D) each."""
        return [self.head(self.backbone(view)) for view in views]


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

    Reference: equation 1 and algorithm 1.
    """
    q, k = F.normalize(comm.upcast(q), dim=1), F.normalize(comm.upcast(k.detach()), dim=1)
    positive = (q * k).sum(1, keepdim=True)  # (N, 1)
    negative = q @ queue.detach().to(q.dtype).T  # (N, K)
    logits = torch.cat([positive, negative], dim=1) / temperature
    first = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(logits, first)


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
    Reference: equation 2.
    """
    torch._foreach_lerp_([*teacher.parameters()], [*student.parameters()], 1 - momentum)


@torch.no_grad()
def encode_keys(encoder: nn.Module, images: list[Tensor], order: Tensor) -> list[Tensor]:
    """Embed images in batch-norm groups drawn from the whole batch (shuffle-BN, section 3.3).

    Args:
        images: views (N, C, H, W) of this process.
        order: a permutation (W*N,) of the whole batch, equal on every process.

    Returns:
        Unit embeddings (N, D) of each view, in the order of the images.
    """
    n = len(images[0])
    own = slice(comm.rank() * n, (comm.rank() + 1) * n)
    shuffled = [comm.all_gather_no_grad(view.permute(0, 2, 3, 1))[order[own]].permute(0, 3, 1, 2)
                for view in images]  # as channels_last, which they are
    back = order.argsort()[own]
    keys = [comm.all_gather_no_grad(key)[back] for key in encoder(shuffled)]
    return [F.normalize(comm.upcast(key), dim=1) for key in keys]


@torch.no_grad()
def indicators(q: Tensor, k: Tensor, queue: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: on this process's queries and keys (N, D)."""
    q = F.normalize(comm.upcast(q), dim=1)
    positive = (q * k).sum(1)
    return {
        "contrast_accuracy": (positive > (q @ queue.T).amax(1)).float().mean(),
        "positive_similarity": positive.mean(),
        "z_std": q.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
    }


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    size, scale, blur = args.image_size, args.crop_scale, args.blur
    if args.views == "digits":
        views = augment.digit_views([(2, size, scale)], jitter=0.5, blur=blur)
    else:
        views = photo_views(size, scale, blur, args.views)
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        image_size=args.image_size, zero_init_residual=False)
    model = MoCo(backbone, args.mlp_head, args.embedding_dim)
    model = comm.prepare(model, world, args.sync_bn)
    if not args.sync_bn:
        model = group_batchnorm(model, args.bn_groups // world.size)
    key_encoder = backbones.without_dropping(copy.deepcopy(model).requires_grad_(False))
    if args.compile:
        backbones.compile(backbone, key_encoder.backbone)
    queue = F.normalize(torch.randn(args.queue_length, args.embedding_dim).to(world.device), dim=1)

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
        run.resume(model=model, key_encoder=key_encoder, queue=queue, optimizer=optimizer,
                   scaler=scaler)
        ddp_model = comm.data_parallel(model)
        pointer = run.step * args.batch_size * directions % args.queue_length
        schedule = [0.6 * args.epochs, 0.8 * args.epochs] if args.schedule == "step" else "cosine"
        lr_of_step = optim.lr_by_epoch(lr, schedule, args.epochs, args.warmup_epochs,
                                       run.steps_per_epoch, gamma=0.1)
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
            # 4. identify the key; of two directions the sum, as in the authors' notebook
            loss = sum(info_nce(*pair, queue, args.temperature) for pair in zip(q, k, strict=True))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, q[0], k[0], queue)
            for new_keys in k:
                pointer = update_queue(queue, pointer, new_keys)  # 5. replace the oldest


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
