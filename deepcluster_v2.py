"""DeepCluster v2: the appendix of SwAV's paper (2006.09882) on DeepCluster (1807.05520).

1. Before each epoch, cluster the embeddings of all images from the epoch before (a memory bank, one
   for each global crop) by spherical k-means, once for each head. The centroids are the head's
   prototypes for this epoch, and the clusters the labels of the images.
2. Make two global crops and some local ones of every image, embed all of them, one pass per crop
   size: backbone h, projector z on the unit sphere.
3. Classify every crop into the cluster of its image: softmax over the cosines with the centroids.
4. Put the embeddings of the global crops into the memory bank, in the rows of their images.

Letters: N images per process, W processes, M images in all, V crops of an image, A of them global,
D embedding size, K clusters, H heads.

Differs from the official code (facebookresearch/swav): the memory bank is one tensor in the order
of the data set, equal on every process; k-means starts from images of all processes, there of the
first; its sums are float64; batch norm is synchronised over all processes, there in groups of
eight. Images that were not in the last epoch (incomplete batches are dropped) have no label, as
there. The first bank is filled as there, one crop a pass, with the images of the first epoch in
separate crops. Blur is a true Gaussian, as in the released runs; the code has Pillow's chain of box
filters by now. The official run is float32; here CUDA has bf16 unless `--amp none`.

    python deepcluster_v2.py
    torchrun --nproc_per_node=8 deepcluster_v2.py --data /path/to/imagenet --output runs/deepcluster
"""

import itertools
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, optim, rng
from common.images import open_images
from common.kmeans import join_parts, own_part
from common.training import Training

IMAGENET = dict(  # SwAV's paper, appendix: batch 4,096, rates .3 to 4.8 to .0048, per 256 images
    arch="resnet50", stem="imagenet", in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.228, 0.224, 0.225],  # .228 as in the released runs
    views="photo", num_crops=[2, 6], crop_sizes=[224, 96], crop_scales=[0.14, 1.0, 0.05, 0.14],
    jitter_strength=1.0, blur=True,
    projector_dim=2048, embedding_dim=128, num_clusters=[3000, 3000, 3000], temperature=0.1,
    kmeans_iterations=10,
    epochs=800, batch_size=4096, lr=0.3, start_lr=0.3 / 16, final_lr=0.0048 / 16,
    weight_decay=1e-6, warmup_epochs=10, sync_bn=True,
)
RECIPES = {
    "imagenet": IMAGENET,
    # Sizes, batch and epochs of solo-learn's CIFAR-10 run, with this script's optimiser.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small",
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616],
        num_crops=[2], crop_sizes=[32], crop_scales=[0.08, 1.0], blur=False,
        epochs=1000, batch_size=256, lr=0.6, start_lr=0.0, final_lr=0.0006, warmup_epochs=11,
    ),
    # Ours, chosen on the built-in digits: about a minute on two cores.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", mean=[0.5], std=[0.5],
        views="digits", num_crops=[2, 2], crop_sizes=[16, 8], crop_scales=[0.6, 1.0, 0.3, 0.6],
        jitter_strength=0.5, blur=False,
        projector_dim=128, embedding_dim=64, num_clusters=[60, 60, 60],
        epochs=40, batch_size=256, lr=4.0, start_lr=0.1, final_lr=0.004, warmup_epochs=5,
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
    group.add_argument("--num-clusters", type=cli.pos_int, nargs="+",
                       help="K of each head; head h labels by global crop h mod A")
    group.add_argument("--temperature", type=cli.positive, help="temperature of the predictions")
    group.add_argument("--kmeans-iterations", type=cli.pos_int, help="before each epoch")
    group.add_argument("--start-lr", type=cli.not_negative, help="per 256, where warm-up starts")
    group.add_argument("--final-lr", type=cli.not_negative, help="per 256, where the cosine ends")
    return cli.parse(parser, RECIPES, argv)


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


class DeepCluster(nn.Module):
    """Backbone, and projector -> hidden -> D with batch norm inside."""

    def __init__(self, backbone: nn.Module, projector_dim: int, embedding_dim: int):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, projector_dim),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, embedding_dim),
        )

    def forward(self, views: list[Tensor]) -> Tensor:
        """Embed V views (N, C, H, W), sorted by size, in one backbone pass per size.

        Returns:
            Unit embeddings (V, N, D).
        """
        sizes = itertools.groupby(views, key=lambda view: view.shape[-2:])
        h = torch.cat([self.backbone(torch.cat(list(same))) for _, same in sizes])
        z = self.projector(h)
        z = F.normalize(comm.upcast(z), dim=1)
        return z.view(len(views), -1, z.shape[1])


# --------------------------------------------------------------------------------------------- loss


def cluster_loss(scores: Tensor, assignment: Tensor, temperature: float) -> Tensor:
    """Compute the cross-entropy of every crop's cosines with the cluster of its image.

    The mean over processes of the result is the mean over all labelled crops of all processes.

    Args:
        scores: cosines (V, N, K) with the centroids.
        assignment: int64 (N,), the clusters; -100: no label.
        temperature: divides the cosines.

    Returns:
        Scalar; 0 where no image of any process has a label.

    Reference: 2006.09882, appendix on DeepCluster v2.
    """
    scores = comm.upcast(scores)
    labels = assignment.repeat(len(scores))  # (V*N,)
    total = F.cross_entropy(scores.flatten(0, 1) / temperature, labels, ignore_index=-100,
                            reduction="sum")
    labelled = comm.sum_over_processes((labels != -100).sum()).clamp(min=1)
    return total * comm.size() / labelled


@torch.no_grad()
@comm.outside_autocast
def nearest_centroids(x: Tensor, centroids: Tensor) -> Tensor:
    """For each of x (n, D) the row (n,) of the centroids (K, D) with the largest dot product.

    Of equal ones it is the lowest.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32:
        import faiss  # after torch, and never in a loader process: the other order can hang

        metric = faiss.METRIC_INNER_PRODUCT
        _, rows = faiss.knn(x.contiguous().numpy(), centroids.contiguous().numpy(), 1, metric)
        rows = torch.from_numpy(rows)[:, 0]
        if len(centroids.sum(1).unique()) == len(centroids):
            return rows
        # Equal centroids, as in a collapse, differ by rounding in there.
        _, group = centroids.unique(dim=0, return_inverse=True)
        lowest = torch.full_like(group, len(group)).scatter_reduce_(
            0, group, torch.arange(len(group)), "amin")
        return lowest[group[rows]]
    return torch.cat([(part @ centroids.T).argmax(1) for part in x.split(8192)])


@torch.no_grad()
def spherical_kmeans(x: Tensor, num_clusters: int, iterations: int, generator: torch.Generator,
                     init: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster unit rows by cosine, over all processes.

    Args:
        x: unit rows (N, D), this process's part; N may differ among processes.
        num_clusters: K.
        iterations: assignments followed by new centroids; one more assignment comes last.
        generator: on the CPU, in the same state on every process; draws the start, which is K
            different rows of all processes. An empty cluster keeps its centroid.
        init: start from these centroids (K, D) instead.

    Returns:
        Centroids (K, D), unit rows, equal on every process; clusters int64 (N,) of the rows here.

    Raises:
        ValueError: fewer rows on all processes than clusters to start from.

    Reference: Dhillon and Modha, "Concept decompositions for large sparse text data using
    clustering", 2001; 2006.09882, appendix.
    """
    x = comm.upcast(x)
    if init is None:
        counts = comm.all_gather_no_grad(torch.tensor([len(x)], device=x.device)).tolist()
        if sum(counts) < num_clusters:
            raise ValueError(f"{sum(counts)} rows do not make {num_clusters} clusters")
        chosen = torch.randperm(sum(counts), generator=generator)[:num_clusters].to(x.device)
        chosen -= sum(counts[: comm.rank()])
        here = (chosen >= 0) & (chosen < len(x))
        init = x.new_zeros(num_clusters, x.shape[1])
        init[here] = x[chosen[here]]
        init = comm.sum_over_processes(init)  # each row is on one process
    centroids = init.to(x.dtype)
    for _ in range(iterations):
        sums = torch.zeros_like(centroids, dtype=torch.float64)
        nearest = nearest_centroids(x, centroids)
        for rows, part in zip(nearest.split(8192), x.split(8192), strict=True):
            sums += torch.zeros_like(centroids).index_add_(0, rows, part)
        sums = comm.sum_over_processes(sums)
        norms = sums.norm(dim=1, keepdim=True)  # 0: the cluster is empty
        means = (sums / norms.clamp(min=1e-12)).to(x.dtype)
        centroids = torch.where(norms > 0, means, centroids)
    return centroids, nearest_centroids(x, centroids)


@torch.no_grad()
def cluster_memory(memory: Tensor, num_clusters: int, iterations: int, generator: torch.Generator
                   ) -> tuple[Tensor, Tensor]:
    """Cluster the rows of one crop's memory bank, each process a contiguous part of them.

    Args:
        memory: (M, D), unit rows, and zeros for the images that were not seen.

    Returns:
        Centroids (K, D) and the assignment int64 (M,), -100 for the images not seen.
    """
    seen = memory.any(1).nonzero()[:, 0]
    centroids, nearest = spherical_kmeans(memory[own_part(seen)], num_clusters, iterations,
                                          generator)
    assignment = torch.full((len(memory),), -100, device=memory.device)
    assignment[seen] = join_parts(nearest, len(seen))
    return centroids, assignment


@torch.no_grad()
def update_memory(memory: Tensor, index: Tensor, z: Tensor) -> None:
    """Write the embeddings of all processes into the rows of their images.

    Args:
        memory: (A, M, D), written in place.
        index: data-set indices (N,) of this process's images, on the bank's device.
        z: their embeddings (A, N, D).
    """
    rows = comm.all_gather_no_grad(index)
    z = comm.all_gather_no_grad(z.transpose(0, 1)).transpose(0, 1)
    memory[:, rows] = z.to(memory.dtype)


@torch.no_grad()
def indicators(z: Tensor, scores: Tensor, labels: Tensor, assignment: Tensor) -> dict[str, Tensor]:
    """Collapse indicators, logged: on the first crop's z (N, D) and scores (N, K).

    Labels (N,) are those of the images here, the assignment (M,) that of all images.
    """
    use = assignment[assignment >= 0].bincount(minlength=scores.shape[1])
    use = use / use.sum()
    found = (scores.argmax(1) == labels).sum() / (labels >= 0).sum().clamp(min=1)
    return {
        "cluster_entropy": torch.special.entr(use).sum(),  # ln K: all of equal size
        "largest_cluster": use.amax(),  # its share of the images
        "cluster_accuracy": found,
        "z_std": z.std(0, correction=0).mean(),  # 1 / sqrt(D) where they spread, 0 in collapse
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
    seen_images = len(images) - len(images) % args.batch_size
    if args.batch_size <= len(images) and max(args.num_clusters) > seen_images:
        raise comm.RunError(f"--num-clusters {max(args.num_clusters)} is more than the "
                            f"{seen_images} images of an epoch; at most that many")

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        image_size=args.image_size, zero_init_residual=False)
    model = DeepCluster(backbone, args.projector_dim, args.embedding_dim)
    model = comm.prepare(model, world, args.sync_bn)
    if args.compile:
        backbones.compile(backbone)
    num_global = args.num_crops[0]
    memory = torch.zeros(num_global, len(images), args.embedding_dim, device=world.device)
    assignments = torch.full((len(args.num_clusters), len(images)), -100, device=world.device)
    centroids = [torch.zeros(k, args.embedding_dim, device=world.device) for k in args.num_clusters]

    # Optimiser
    lr, start_lr, final_lr = (rate * args.batch_size / 256
                              for rate in (args.lr, args.start_lr, args.final_lr))
    optimizer = optim.LARC(model.parameters(), lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                           trust_coefficient=0.001)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    views = build_views(args)
    with Training(args, world, images, views,
                  chance_loss=sum(map(math.log, args.num_clusters)) / len(args.num_clusters),
                  floors={"z_std": 0.1 / math.sqrt(args.embedding_dim),
                          "cluster_entropy": math.log(args.num_clusters[0]) / 2}) as run:
        run.resume(model=model, memory=memory, assignments=assignments,
                   **{f"centroids{h}": c for h, c in enumerate(centroids)},
                   optimizer=optimizer, scaler=scaler)
        if run.step == 0:  # the first bank: one pass without a gradient; batch statistics move
            comm.print_main("filling the memory bank")
            for batch in run.first_epoch(views[:num_global]):
                with torch.no_grad(), autocast():
                    z = torch.cat([model([view]) for view in batch.views])
                update_memory(memory, batch.index.to(world.device), z)
        ddp_model = comm.data_parallel(model)
        lr_of_step = optim.warmup_cosine(
            start=start_lr, base=lr, final=final_lr,
            warmup_steps=args.warmup_epochs * run.steps_per_epoch,
            total_steps=run.total_steps, warmup_endpoint=True)
        for step, batch in run.steps(export=model.backbone):
            if step % run.steps_per_epoch == 0:  # 1. clusters of the epoch before
                draw = rng.philox(args.seed, rng.CLUSTERS, step // run.steps_per_epoch)
                for h, k in enumerate(args.num_clusters):
                    generator = torch.Generator().manual_seed(int(draw.integers(2**63)))
                    found = cluster_memory(memory[h % num_global], k, args.kmeans_iterations,
                                           generator)
                    centroids[h].copy_(found[0])
                    assignments[h].copy_(found[1])
                memory.zero_()
                run.write_array("assignments.npy", assignments)
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            index = batch.index.to(world.device, non_blocking=True)
            with autocast():
                z = ddp_model(batch.views)  # 2. embeddings
            labels = assignments[:, index]  # (H, N)
            all_scores = [z @ c.T for c in centroids]
            losses = [cluster_loss(scores, target, args.temperature)
                      for scores, target in zip(all_scores, labels, strict=True)]
            loss = torch.stack(losses).mean()  # 3. classify
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z[0], all_scores[0][0], labels[0],
                    assignments[0])
            update_memory(memory, index, z[:num_global])  # 4. for the next epoch's clusters


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
