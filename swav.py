"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, 2006.09882.

1. Scale the prototypes to unit norm.
2. Make two global crops and some local ones of every image, embed all of them, one pass per crop
   size: backbone h, projector z on the unit sphere, scores = cosines of z with the prototypes.
3. Assign each global crop a code: Sinkhorn-Knopp turns its scores into assignments that use every
   prototype equally over the batch of all processes (and the queue, where batches are small).
4. Predict the code of each global crop from every other crop of the same image.
5. Step; the prototypes stay frozen for the first epochs.
6. Replace the oldest embeddings of the queue with those of the global crops.

Letters: N images per process, W processes, V crops of an image, A of them global, D embedding size,
K prototypes, L length of the queue, H backbone width.

Differs from the official code (facebookresearch/swav): Sinkhorn works on logarithms, so that it
stays right at any epsilon; scores are computed in float32 regardless of autocast; batch norm is
synchronised over all processes, there in groups of eight; the queue is one tensor, equal on every
process, of which each process scores its shard. Prototypes are frozen for epochs, there for 313 or
5,005 steps, one epoch of batch 4,096 or 256. Blur is a true Gaussian, as in the released runs; the
code has Pillow's chain of box filters by now.

`--teacher-momentum`, from VISSL, is not in the paper and has no published number: the scores of
step 3 and the queue's embeddings are then those of a teacher, an EMA of the whole network.

    python swav.py
    torchrun --nproc_per_node=8 swav.py --data /path/to/imagenet --recipe imagenet_small_batch
"""

import copy
import itertools
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim
from common.images import open_images
from common.training import Training

IMAGENET = dict(  # paper, appendix A: batch 4,096, rates .3 to 4.8 to .0048, here per 256 images
    arch="resnet50", stem="imagenet", in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.228, 0.224, 0.225],  # .228 as in the released runs
    views="photo", num_crops=[2, 6], crop_sizes=[224, 96], crop_scales=[0.14, 1.0, 0.05, 0.14],
    jitter_strength=1.0, blur=True,
    projector_dim=2048, embedding_dim=128, num_prototypes=[3000], temperature=0.1,
    epsilon=0.05, sinkhorn_iterations=3, freeze_prototypes_epochs=1,
    queue_length=0, queue_start_epoch=0, teacher_momentum=0.0,
    epochs=400, batch_size=4096, lr=0.3, start_lr=0.3 / 16, final_lr=0.0048 / 16,
    weight_decay=1e-6, warmup_epochs=10, sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    # Paper, section 4.3: batch 256 with a queue.
    "imagenet_small_batch": IMAGENET | dict(
        queue_length=3840, queue_start_epoch=15,
        batch_size=256, lr=0.6, start_lr=0.6, final_lr=0.0006, warmup_epochs=0,
    ),
    # Sizes, queue, batch and epochs of solo-learn's CIFAR-10 run, with this script's optimiser.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small",
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        num_crops=[2], crop_sizes=[32], crop_scales=[0.08, 1.0], blur=False,
        freeze_prototypes_epochs=2, queue_length=3840, queue_start_epoch=50,
        epochs=1000, batch_size=256, lr=0.6, start_lr=0.0, final_lr=0.0006,
    ),
    # Ours, chosen on the built-in digits: less than a minute on two cores. Local crops of such
    # small images made it worse, and at an epsilon of .05 the loss stayed at ln K.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", mean=[0.5], std=[0.5],
        views="digits", num_crops=[2], crop_sizes=[16], crop_scales=[0.6, 1.0],
        jitter_strength=0.5, blur=False,
        projector_dim=128, embedding_dim=64, num_prototypes=[60], epsilon=0.03,
        epochs=40, batch_size=256, lr=3.0, start_lr=0.0, final_lr=0.003, warmup_epochs=5,
    ),
}


def parse_args(argv=None):
    parser, group = cli.method_parser(__file__, __doc__, backbones.POOLED, crops="multi",
                                      decay="all")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--jitter-strength", type=cli.not_negative, help="strength of colour jitter")
    group.add_argument("--blur", action=cli.Switch, help="Gaussian blur of half of the views")
    group.add_argument("--projector-dim", type=cli.pos_int, help="hidden width of the projector")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="D, size of an embedding")
    group.add_argument("--num-prototypes", type=cli.pos_int, nargs="+",
                       help="K; several numbers: several sets, their losses averaged")
    group.add_argument("--temperature", type=cli.positive, help="temperature of the predictions")
    group.add_argument("--epsilon", type=cli.positive, help="weight of the codes' entropy: lower "
                       "makes harder codes; if the loss stays at ln K, try .03")
    group.add_argument("--sinkhorn-iterations", type=cli.pos_int,
                       help="more make the use of the prototypes more equal")
    group.add_argument("--queue-length", type=cli.nonneg_int,
                       help="earlier embeddings that join in the codes, for batches below a few "
                       "times K; a multiple of the batch size; 0: none")
    group.add_argument("--queue-start-epoch", type=cli.nonneg_int, help="when it starts to fill")
    group.add_argument("--freeze-prototypes-epochs", type=cli.nonneg_int,
                       help="prototypes frozen so long; more, if the loss stays at ln K")
    group.add_argument("--teacher-momentum", type=cli.fraction,
                       help="EMA momentum of a teacher that makes the codes, as .99; 0: none")
    group.add_argument("--start-lr", type=cli.not_negative, help="per 256, where warm-up starts")
    group.add_argument("--final-lr", type=cli.not_negative, help="per 256, where the cosine ends")
    args = cli.parse(parser, RECIPES, argv)
    if args.queue_length % args.batch_size:
        fits = args.queue_length - args.queue_length % args.batch_size
        parser.error(f"--queue-length {args.queue_length} is not a multiple of --batch-size "
                     f"{args.batch_size}; try {fits or 'none, 0,'} or {fits + args.batch_size}")
    if args.queue_length and args.queue_start_epoch >= args.epochs:
        parser.error(f"--queue-start-epoch {args.queue_start_epoch} comes after the end of "
                     f"--epochs {args.epochs}; pass --queue-length 0 for no queue")
    return args


# -------------------------------------------------------------------------------------------- views


def photo_views(crops, jitter, blur):
    """Crops of the same kind but for their size (paper, section 3.2)."""
    views = []
    for count, size, scale in crops:
        steps = [
            augment.RandomResizedCrop(scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
            augment.HorizontalFlip(p=0.5),
            augment.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter, p=0.8),
            augment.Grayscale(p=0.2),
            augment.GaussianBlur(sigma=(0.1, 2.0), p=0.5 if blur else 0.0),
        ]
        views += [(size, steps)] * count
    return views


# -------------------------------------------------------------------------------------------- model


class SwAV(nn.Module):
    """Backbone, projector H -> hidden -> D with batch norm inside, and sets of prototypes."""

    def __init__(self, backbone: nn.Module, projector_dim: int, embedding_dim: int,
                 num_prototypes: list[int]):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, projector_dim),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, embedding_dim),
        )
        self.prototypes = nn.ModuleList(
            nn.Linear(embedding_dim, count, bias=False) for count in num_prototypes
        )

    def forward(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Embed V views (N, C, H, W), sorted by size, in one backbone pass per size.

        Returns:
            Unit embeddings (V, N, D), and for each set of prototypes the scores (V, N, K).
        """
        sizes = itertools.groupby(views, key=lambda view: view.shape[-2:])
        h = torch.cat([self.backbone(torch.cat(list(same))) for _, same in sizes])
        z = self.projector(h)
        with torch.autocast(z.device.type, enabled=False):  # codes need full precision
            z = F.normalize(comm.upcast(z), dim=1)
            z = z.view(len(views), -1, z.shape[1])
            return z, [layer(z) for layer in self.prototypes]

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        for layer in self.prototypes:
            layer.weight.copy_(F.normalize(layer.weight, dim=1))


# --------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Turn scores into codes that use every prototype equally over all processes.

    One iteration scales each prototype to the mass 1 / K, then each row to the mass 1. On
    logarithms: exp(score / epsilon) would overflow float32 below epsilon 0.0113.

    Args:
        scores: cosines (N, K).
        epsilon: weight of the entropy; towards 0 the codes become one-hot.
        iterations: at least 1.

    Returns:
        Codes (N, K), rows that sum to 1; float32, or float64 for such scores.

    Reference: section 3.1, equations 3 to 5; Cuturi, arXiv 1306.0895.
    """
    scores = comm.upcast(scores)
    log_codes = scores / epsilon
    for _ in range(iterations):
        masses = log_codes.logsumexp(0, keepdim=True)  # (1, K) of this process
        log_codes -= comm.all_gather_no_grad(masses).logsumexp(0)  # of all
        log_codes -= log_codes.logsumexp(1, keepdim=True)
    return log_codes.exp_()


@comm.outside_autocast
def swapped_prediction_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Compute the cross-entropy of predicting each global crop's code from every other crop.

    Args:
        scores: cosines (V, N, K) of all crops.
        codes: (A, N, K) of the first A crops, detached.
        temperature: divides the cosines.

    Returns:
        Scalar: mean over the A (V - 1) pairs of crops and the N images.

    Reference: section 3, equations 1 and 2; multi-crop: section 3.2, equation 6.
    """
    scores = comm.upcast(scores)
    log_p = (scores / temperature).log_softmax(2)
    pairs = torch.einsum("ank,vnk->nav", codes.detach().to(log_p.dtype), log_p).sum(0)
    a, v = pairs.shape
    return -(pairs.sum() - pairs.diagonal().sum()) / (a * (v - 1) * scores.shape[1])


@torch.no_grad()
def update_queue(queue: Tensor, pointer: int, z: Tensor) -> int:
    """Write the embeddings of all processes, in rank order, over the oldest of the queue.

    Args:
        queue: (A, L, D), written in place.
        pointer: the oldest row.
        z: this process's embeddings (A, N, D); W N divides L.

    Returns:
        The new pointer.
    """
    z = comm.all_gather_no_grad(z.transpose(0, 1)).transpose(0, 1)
    queue[:, pointer : pointer + z.shape[1]] = z.to(queue.dtype)
    return (pointer + z.shape[1]) % queue.shape[1]


@torch.no_grad()
def update_teacher(teacher: SwAV, student: SwAV, momentum: float) -> None:
    """Move the teacher's parameters to the student's, keeping a share `momentum` of their own.

    Running statistics are copied: the teacher is in eval mode. Its prototypes stay unit rows.
    """
    torch._foreach_lerp_([*teacher.parameters()], [*student.parameters()], 1 - momentum)
    torch._foreach_copy_([*teacher.buffers()], [*student.buffers()])
    teacher.normalize_prototypes()


@torch.no_grad()
@comm.outside_autocast
def compute_codes(scores: Tensor, queue: Tensor | None, prototypes: Tensor, epsilon: float,
                  iterations: int) -> Tensor:
    """Codes (A, N, K) of the global crops with scores (A, N, K).

    Where there is a queue (A, L, D), this process's shard of it joins in, scored with the current
    prototypes (K, D).
    """
    codes = []
    for a, local in enumerate(scores):
        if queue is not None:
            share = queue.shape[1] // comm.size()
            rows = queue[a, comm.rank() * share : (comm.rank() + 1) * share]
            local = torch.cat([rows @ prototypes.T, local])
        codes.append(sinkhorn(local, epsilon, iterations)[-scores.shape[1] :])
    return torch.stack(codes)


@torch.no_grad()
def indicators(z: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: on the global crops' z (A, N, D) and scores (A, N, K)."""
    nearest = comm.all_gather_no_grad(scores.argmax(2).flatten())
    use = nearest.bincount(minlength=scores.shape[2]) / len(nearest)
    return {
        "prototype_entropy": torch.special.entr(use).sum(),  # ln K if all are used alike
        "largest_prototype": use.amax(),  # share of the crops that are nearest to one prototype
        "z_std": z[0].std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
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
    if args.queue_length > len(images):
        fits = len(images) - len(images) % args.batch_size
        raise comm.RunError(f"--queue-length {args.queue_length} is more than the {len(images)} "
                            f"images of --data; at most {fits}")

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        image_size=args.image_size, zero_init_residual=False)
    model = SwAV(backbone, args.projector_dim, args.embedding_dim, args.num_prototypes)
    model = comm.prepare(model, world, args.sync_bn)
    teacher = model  # who makes the codes
    if args.teacher_momentum:
        teacher = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        backbones.compile(backbone, teacher.backbone)
    num_global = args.num_crops[0]
    queue = torch.zeros(num_global, args.queue_length, args.embedding_dim, device=world.device)

    # Optimiser
    lr, start_lr, final_lr = (rate * args.batch_size / 256
                              for rate in (args.lr, args.start_lr, args.final_lr))
    optimizer = optim.LARC(model.parameters(), lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                           trust_coefficient=0.001)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    max_entropy = math.log(min(args.num_prototypes[0], num_global * args.batch_size))
    with Training(args, world, images, build_views(args),
                  chance_loss=sum(map(math.log, args.num_prototypes)) / len(args.num_prototypes),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim),
                          "prototype_entropy": max_entropy / 2}) as run:
        run.resume(model=model, queue=queue, optimizer=optimizer, scaler=scaler,
                   **({"teacher": teacher} if args.teacher_momentum else {}))
        ddp_model = comm.data_parallel(model)
        queue_start = args.queue_start_epoch * run.steps_per_epoch
        lr_of_step = optim.warmup_cosine(
            start=start_lr, base=lr, final=final_lr,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=True)
        for step, batch in run.steps(export=model.backbone):
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            model.normalize_prototypes()  # 1. prototypes on the unit sphere
            with autocast():
                z, all_scores = ddp_model(batch.views)  # 2. embeddings and scores
                target_z, target_scores = z[:num_global], all_scores
                if args.teacher_momentum:
                    update_teacher(teacher, model, args.teacher_momentum)
                    target_z, target_scores = teacher(batch.views[:num_global])
            num_queued = max(0, step - queue_start) * args.batch_size
            queue_or_none = queue if 0 < args.queue_length <= num_queued else None  # once full
            losses = []
            for scores, target, layer in zip(all_scores, target_scores, teacher.prototypes,
                                             strict=True):
                codes = compute_codes(target[:num_global].detach(), queue_or_none, layer.weight,
                                      args.epsilon, args.sinkhorn_iterations)  # 3. codes
                losses.append(swapped_prediction_loss(scores, codes, args.temperature))  # 4.
            loss = torch.stack(losses).mean()
            scaler.scale(loss).backward()
            if step < args.freeze_prototypes_epochs * run.steps_per_epoch:
                model.prototypes.zero_grad(set_to_none=True)
            scaler.step(optimizer)  # 5. step
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z[:num_global], all_scores[0][:num_global])
            if args.queue_length and step >= queue_start:  # 6. replace the oldest
                update_queue(queue, num_queued % args.queue_length, target_z)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
