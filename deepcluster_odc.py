"""DeepCluster, arXiv 1807.05520, and ODC, arXiv 2006.10645: a network learns its own clusters.

1. Cluster the features of all images, a central crop of each, by k-means. DeepCluster does so
   before every epoch, on whitened features of the backbone; ODC once, on embeddings of the
   untrained network.
2. A cluster is a class. DeepCluster starts a new top layer for new clusters, and an epoch takes
   images from all clusters equally often; ODC keeps its layer, and weighs small classes more.
3. Classify a view of every image into the image's cluster.
4. ODC: the memory keeps a unit row for every image. Move the row towards the image's embedding;
   the centroid with the largest dot product is the image's new class.
5. ODC: every few steps, centroids are again the means of their rows; after every step, clusters
   that have become too small are dissolved, and the largest ones split instead.

Letters: N images per process, W processes, M images in all, H width of the backbone, D size of what
is classified (DeepCluster: H), K clusters.

Memory: ODC's rows take 4 M D bytes on every device (1.3 GB for ImageNet). While DeepCluster
clusters, features take 4 M H bytes in every process (10.5 GB) and 1 / W of it on its device. ODC
waits for the GPU once a step, to read which clusters are small.

Differs from the official codes (facebookresearch/deepcluster; OpenMMLab's MMSelfSup, whose settings
of a ResNet-50 these are, since there is no AlexNet here): k-means runs on all processes, and an
empty cluster takes half of one of the largest, there of a random one. Rotation comes before the
crop. An image that an epoch of DeepCluster takes several times has the same view each time, there
another one. ODC goes through a permutation of the images each epoch, there it draws with
replacement; clusters are split by the same k-means, there by scikit-learn's; loss weights are
normalised over all processes; dropout is drawn for (seed, step, image). The official runs are
float32; here CUDA has bf16 unless `--amp none`.

    python deepcluster_odc.py
    python deepcluster_odc.py --method odc --output runs/odc-digits
    torchrun --nproc_per_node=8 deepcluster_odc.py --method odc --data /path/to/imagenet
"""

import functools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, features, optim, rng
from common.images import open_images
from common.kmeans import cluster_means, first_centroids, join_parts, kmeans, own_part
from common.training import Training
from common.whitening import ROWS, principal_axes

IMAGENET = dict(  # DeepCluster on a ResNet-50: MMSelfSup; k-means and whitening: paper, section 4
    arch="resnet50", stem="imagenet", sobel=True, image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    views="photo", crop_scale=[0.08, 1.0],
    num_clusters=10_000, kmeans_iterations=20, pca_dim=256,
    schedule="step", lr_drops=[], top_lr_scale=1.0,
    epochs=200, batch_size=512, lr=0.05, weight_decay=1e-5, warmup_epochs=0, sync_bn=False,
)
RECIPES = {
    "imagenet": IMAGENET,
    # Ours, not tuned: 50 images a cluster.
    "cifar10": IMAGENET | dict(
        arch="resnet18", stem="small", sobel=False, image_size=32,
        mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616], crop_scale=[0.2, 1.0],
        num_clusters=1000, schedule="cosine", batch_size=256,
    ),
    # Ours, chosen on the built-in digits: under a minute on two cores. A top layer that starts anew
    # has only 45 steps to learn in, and no momentum.
    "digits": IMAGENET | dict(
        arch="resnet_tiny", stem="small", sobel=False, image_size=16, mean=[0.5], std=[0.5],
        views="digits", crop_scale=[0.6, 1.0],
        num_clusters=30, pca_dim=32, schedule="cosine", top_lr_scale=10.0,
        epochs=20, batch_size=32, lr=0.8, warmup_epochs=1,
    ),
}
NECK = dict(pca_dim=None, hidden_dim=512, embedding_dim=256, dropout=0.5, memory_momentum=0.5,
            centroid_steps=10, min_cluster=20)
ODC = {  # what `--method odc` changes
    "imagenet": NECK | dict(  # MMSelfSup
        sobel=False, epochs=440, lr=0.03, lr_drops=[400 / 440], sync_bn=True,
    ),
    # Ours, on DeepCluster's settings. Rows that move faster lose what k-means found (digits).
    "cifar10": NECK | dict(memory_momentum=0.9),
    "digits": NECK | dict(hidden_dim=128, embedding_dim=64, dropout=0.0, memory_momentum=0.9,
                          min_cluster=10, epochs=24, lr=0.4),
}


def parse_args(argv=None):
    recipes, method = RECIPES, cli.peek(argv, "--method", str) or "deepcluster"
    if method == "odc":
        recipes = {name: recipe | ODC[name] for name, recipe in RECIPES.items()}
    parser, group = cli.method_parser(__file__, __doc__, backbones.RESNETS, crops="one",
                                      decay="all")
    group.add_argument("--method", choices=("deepcluster", "odc"), default=method,
                       help="clusters of each epoch, or of each step; sets what its paper sets "
                       "(its numbers: --method odc --help)")
    group.add_argument("--sobel", action=cli.Switch,
                       help="the backbone sees edges in place of colours")
    group.add_argument("--views", choices=("photo", "digits"), help="kind of augmentation")
    group.add_argument("--num-clusters", type=cli.two_or_more, help="K")
    group.add_argument("--kmeans-iterations", type=cli.pos_int, help="at most, in step 1")
    group.add_argument("--pca-dim", type=cli.pos_int,
                       help="deepcluster: whitened dimensions that are clustered")
    group.add_argument("--hidden-dim", type=cli.pos_int, help="odc: width of the neck")
    group.add_argument("--embedding-dim", type=cli.pos_int, help="odc: D, size of an embedding")
    group.add_argument("--dropout", type=cli.fraction, help="odc: of the neck's hidden layer")
    group.add_argument("--memory-momentum", type=cli.fraction, help="odc: EMA momentum of a row")
    group.add_argument("--centroid-steps", type=cli.pos_int,
                       help="odc: steps between two updates of the centroids")
    group.add_argument("--min-cluster", type=cli.pos_int, metavar="IMAGES",
                       help="odc: smaller clusters are dissolved")
    group.add_argument("--schedule", choices=("cosine", "step"),
                       help="once an epoch: a cosine to 0, or times 0.4 at --lr-drops")
    group.add_argument("--lr-drops", type=cli.fraction, nargs="*",
                       help="when the rate falls: shares of the run, rounded to whole epochs")
    group.add_argument("--top-lr-scale", type=cli.positive,
                       help="rate of the top layer, which has no momentum, as a multiple of --lr")
    args = cli.parse(parser, recipes, argv)
    if args.method == "odc" and cli.peek(argv, "--output", str) is None:
        args.output += "-odc"
    for name in NECK:
        own = "deepcluster" if name == "pca_dim" else "odc"
        if args.method != own and getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} needs --method {own}")
    if args.dropout == 1:
        parser.error("--dropout 1 leaves nothing; pass less")
    if args.schedule == "cosine" and cli.peek(argv, "--lr-drops", str) is not None:
        parser.error("--lr-drops needs --schedule step")
    if args.sobel:
        args.stem += "-sobel"  # of the backbone wherever it goes
    return args


# -------------------------------------------------------------------------------------------- views


def photo_view(image_size, crop_scale):
    """MMSelfSup's view of both methods."""
    return image_size, [
        augment.RandomAffine(degrees=2, translate=0.0, scale=(1.0, 1.0), shear=0, fill=0,
                             interpolation="bilinear"),
        augment.RandomResizedCrop(crop_scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
        augment.HorizontalFlip(p=0.5),
        augment.ColorJitter(0.4, 0.4, saturation=1.0, hue=0.5, p=1.0),
        augment.Grayscale(p=0.2),
    ]


# -------------------------------------------------------------------------------------------- model


class ClusterClassifier(nn.Module):
    """Backbone, ODC's neck H -> hidden -> D or none, and a linear top layer D -> K."""

    def __init__(self, backbone: nn.Module, hidden_dim: int | None, embedding_dim: int | None,
                 num_clusters: int):
        super().__init__()
        self.backbone = backbone
        self.hidden = self.neck = nn.Identity()
        self.num_features = backbone.num_features
        if hidden_dim is not None:
            self.hidden = nn.Sequential(
                nn.Linear(backbone.num_features, hidden_dim),
                nn.BatchNorm1d(hidden_dim, momentum=0.001, affine=False),
                nn.ReLU(inplace=True),
            )
            self.neck = nn.Sequential(nn.Linear(hidden_dim, embedding_dim), nn.ReLU(inplace=True))
            self.num_features = embedding_dim
        self.top = nn.Linear(self.num_features, num_clusters)
        nn.init.normal_(self.top.weight, std=0.01)
        nn.init.zeros_(self.top.bias)

    def embed(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """What is clustered and classified, (N, D); `kept` (N, hidden) are factors of dropout."""
        h = self.hidden(self.backbone(images))
        return self.neck(h if kept is None else h * kept)

    def forward(self, views: list[Tensor], kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed the one view (N, C, H, W); (N, D) and logits (N, K)."""
        z = self.embed(views[0], kept)
        return z, self.top(z)


@torch.no_grad()
def start_top(layer: nn.Linear, seed: int, epoch: int) -> None:
    """Start a top layer anew, in place, as a function of (seed, epoch)."""
    draw = rng.philox(seed, rng.CLUSTERS, epoch, 1)
    layer.weight.copy_(torch.from_numpy(draw.normal(0.0, 0.01, layer.weight.shape)))
    layer.bias.zero_()


def draw_dropout(index: Tensor, step: int, *, width: int, rate: float, seed: int) -> Tensor:
    """Dropout's factors (N, width), 0 or 1 / (1 - rate), for the images (N,) of a step."""
    rows = [rng.philox(seed, rng.MASK, step, i).random(width) for i in index.tolist()]
    return torch.from_numpy(np.stack(rows) >= rate).to(torch.get_default_dtype()) / (1 - rate)


# --------------------------------------------------------------------------------------------- loss


def class_weights(counts: Tensor) -> Tensor:
    """Weigh classes by the inverse square root of their size.

    Args:
        counts: (K,) numbers of images.

    Returns:
        (K,), proportional to (count + 1e-10)^-0.5, of sum 1.

    Reference: ODC, section 3.2 (loss re-weighting).
    """
    weights = (comm.upcast(counts) + 1e-10).rsqrt()
    return weights / weights.sum()


def cluster_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the cross-entropy with the clusters, each image weighted by its cluster.

    The mean over processes of the result is the weighted mean over the images of all processes.

    Args:
        logits: (N, K).
        labels: int64 (N,).
        weights: (K,), or None for equal ones.
    """
    logits = comm.upcast(logits)
    if weights is None:
        return F.cross_entropy(logits, labels)
    weights = weights.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weights, reduction="sum")
    return total * comm.size() / comm.sum_over_processes(weights[labels].sum())


# ----------------------------------------------------------------------------------------- clusters


@torch.no_grad()
def pca_whiten(x: Tensor, dim: int) -> Tensor:
    """Project rows on their principal axes, at equal variance, and then to unit norm.

    Args:
        x: (n, d), this process's part of the rows; the axes are those of all processes.
        dim: axes to keep, by falling variance.

    Returns:
        (n, dim), of x's dtype but float32 at least. An axis without variance gives 0: below 1e-10
        of the largest in float64, or beyond d; a row of norm 0 stays.

    Reference: DeepCluster, section 4.1.
    """
    x = comm.upcast(x)
    mean, variances, axes = principal_axes(x)
    # Of equal rows, only rounding would be left.
    least = torch.maximum(1e-10 * variances[0], 1e-26 * (variances.sum() + mean.square().sum()))
    scale = torch.where(variances > least, variances.clamp(min=1e-300).rsqrt(), 0)[:dim]
    projection = F.pad(axes[:, :dim] * scale, (0, dim - len(scale)))
    rows = torch.cat([(part - mean) @ projection for part in x.split(ROWS)])
    return F.normalize(rows, eps=1e-8).to(x.dtype)  # a row at the mean is 0 but for rounding


def cluster_sizes(assignment: Tensor, num_clusters: int) -> Tensor:
    """Number of images (K,) in each cluster; the host does not wait, as for bincount."""
    sizes = torch.zeros(num_clusters, device=assignment.device)
    return sizes.index_add_(0, assignment, torch.ones_like(assignment, dtype=sizes.dtype))


@torch.no_grad()
def cluster_images(x: Tensor, num_clusters: int, iterations: int, pca_dim: int | None, seed: int,
                   key: tuple, device: torch.device) -> Tensor:
    """Cluster rows that are equal on every process, each process a part of them on its device.

    Args:
        x: (n, D), on any device.
        pca_dim: whitened dimensions, or None to cluster unit rows.
        seed, key: the start is drawn from them.

    Returns:
        Clusters int64 (n,), on the device, equal on every process.
    """
    rows = own_part(x).to(device)
    rows = F.normalize(rows) if pca_dim is None else pca_whiten(rows, pca_dim)
    start = first_centroids(rows, num_clusters, rng.philox(seed, rng.CLUSTERS, *key))
    return join_parts(kmeans(rows, start, iterations)[1], len(x))


def balanced_order(assignment: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Draw an epoch's images so that all clusters come equally often.

    Args:
        assignment: (M,), the clusters of all images.

    Returns:
        Indices (M,): those of a small cluster several times, of a large one only some.

    Reference: DeepCluster, section 3.3 (trivial parametrization).
    """
    draw = rng.philox(seed, rng.ORDER, epoch)
    ends = np.bincount(assignment).cumsum()
    members = np.split(assignment.argsort(kind="stable"), ends[:-1])
    members = [rows for rows in members if len(rows)]
    each = len(assignment) // len(members) + 1
    drawn = [draw.choice(rows, each, replace=len(rows) < each) for rows in members]
    return draw.permutation(np.concatenate(drawn))[: len(assignment)]


# --------------------------------------------------------------------------------------- ODC, steps


@torch.no_grad()
@comm.outside_autocast
def update_memory(memory: Tensor, assignment: Tensor, centroids: Tensor, index: Tensor, z: Tensor,
                  momentum: float) -> None:
    """Move the rows of the images of all processes, and label them by the centroids.

    Args:
        memory: unit rows (M, D), written in place: normalise(momentum old + (1 - momentum) new).
        assignment: int64 (M,), written in place: the largest dot products with the rows.
        centroids: (K, D), not of unit norm.
        index: (N,) the images, none of them twice, on the memory's device.
        z: their embeddings (N, D).
        momentum: share that a row keeps of itself.

    Reference: ODC, section 3.2.
    """
    z = F.normalize(comm.upcast(z).to(memory.dtype))
    rows = F.normalize(momentum * memory[index] + (1 - momentum) * z)
    labels = (rows @ centroids.T).argmax(1)
    index, rows, labels = map(comm.all_gather_no_grad, (index, rows, labels))
    memory[index], assignment[index] = rows, labels


@torch.no_grad()
def update_centroids(centroids: Tensor, memory: Tensor, assignment: Tensor) -> None:
    """Write the means of the clusters' rows (M, D) to (K, D); that of an empty one stays."""
    centroids.copy_(cluster_means(own_part(memory), own_part(assignment), centroids)[0])


@torch.no_grad()
@comm.outside_autocast
def repair_clusters(memory: Tensor, assignment: Tensor, centroids: Tensor, min_cluster: int,
                    seed: int, step: int) -> None:
    """Dissolve clusters of fewer images than `min_cluster`, and split the largest ones instead.

    Their images go to the other clusters with the largest dot products; each cluster then gets one
    side of 2-means on what is the largest by then. The counts are read on the host.

    Args:
        memory: unit rows (M, D).
        assignment: int64 (M,), written in place.
        centroids: (K, D), written in place where a cluster is split.
        seed, step: 2-means starts from two images drawn from them.

    Reference: ODC, section 3.2 (dealing with small clusters).
    """
    small = cluster_sizes(assignment, len(centroids)) < min_cluster
    dissolved = small.nonzero()[:, 0].tolist()
    if not dissolved:
        return
    members = small[assignment].nonzero()[:, 0]
    scores = (memory[members] @ centroids.T).masked_fill(small, -torch.inf)
    assignment[members] = scores.argmax(1)
    comm.copy_from_first(assignment)  # where processes round differently
    for new in dissolved:
        largest = cluster_sizes(assignment, len(centroids)).argmax()
        rows = (assignment == largest).nonzero()[:, 0]
        side = cluster_images(memory[rows], 2, 20, None, seed, (step, new), memory.device)
        if not 0 < side.sum() < len(rows):  # all alike
            side = torch.arange(len(rows), device=memory.device) % 2
        assignment[rows[side == 1]] = new
        for k, which in ((largest, 0), (new, 1)):
            centroids[k] = memory[rows[side == which]].mean(0)
    comm.copy_from_first(centroids)


@torch.no_grad()
def indicators(z: Tensor, logits: Tensor, labels: Tensor, assignment: Tensor, nmi: Tensor
               ) -> dict[str, Tensor]:
    """Collapse indicators, logged: on logits (N, K), the labels (N,), those of all images (M,)."""
    use = cluster_sizes(assignment, logits.shape[1]) / len(assignment)
    return {
        "cluster_entropy": torch.special.entr(use).sum(),  # ln K: all of equal size
        "largest_cluster": use.amax(),  # its share of the images
        "cluster_accuracy": (logits.argmax(1) == labels).float().mean(),
        "nmi": nmi,  # of this epoch's first clusters with those an epoch before; 0 in the first
    }


def agreement(one: Tensor, other: Tensor) -> float:
    """Normalised mutual information of two clusterings (M,): 1 if they are the same."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(one.cpu().numpy(), other.cpu().numpy()))


# --------------------------------------------------------------------------------------------- main


def build_views(args):
    if args.views == "digits":
        views = augment.digit_views([(1, args.image_size, args.crop_scale)], jitter=0.5, blur=False)
    else:
        views = [photo_view(args.image_size, args.crop_scale)]
    return augment.normalized(views, args.in_chans, args.mean, args.std)


def main(args):
    world = comm.setup(args.device, args.deterministic)
    torch.manual_seed(args.seed)
    odc = args.method == "odc"

    # Data
    images = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))
    most = len(images) // (args.min_cluster or 1)
    if args.batch_size <= len(images) and args.num_clusters > most:
        each = f" with --min-cluster {args.min_cluster}" if odc else ""
        raise comm.RunError(f"--num-clusters {args.num_clusters}{each} is too many for the "
                            f"{len(images)} images of --data; at most {most}")

    # Model
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        zero_init_residual=False)
    model = ClusterClassifier(backbone, args.hidden_dim, args.embedding_dim, args.num_clusters)
    model = comm.prepare(model, world, args.sync_bn)
    if args.compile:
        backbones.compile(backbone)
    assignment = torch.zeros(len(images), dtype=torch.int64, device=world.device)
    before = torch.zeros_like(assignment)  # at the start of the epoch before
    nmi = torch.zeros((), device=world.device)
    memory = torch.zeros(len(images) if odc else 0, model.num_features, device=world.device)
    centroids = torch.zeros(args.num_clusters if odc else 0, model.num_features,
                            device=world.device)

    # Optimiser
    lr = args.lr * args.batch_size / 256
    trunk = [p for name, p in model.named_parameters() if not name.startswith("top.")]
    top = {"params": model.top.parameters(), "momentum": 0.0, "lr_scale": args.top_lr_scale}
    groups = [{"params": trunk, "lr_scale": 1.0}, top]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=True)
    autocast, scaler = optim.precision(args.amp, world.device)

    # Train
    draw = functools.partial(draw_dropout, width=args.hidden_dim, rate=args.dropout,
                             seed=args.seed) if args.dropout else None
    whole = features.central_view(vars(args), augment.CenterCrop, "bilinear")
    with Training(args, world, images, build_views(args), draw=draw,
                  chance_loss=math.log(args.num_clusters),
                  floors={"cluster_entropy": math.log(args.num_clusters) / 2}) as run:
        run.resume(model=model, assignment=assignment, before=before, nmi=nmi, memory=memory,
                   centroids=centroids, optimizer=optimizer, scaler=scaler)
        ddp_model = comm.data_parallel(model)
        drops = [max(1, round(share * args.epochs)) for share in args.lr_drops]
        lr_of_step = optim.lr_by_epoch(lr, drops if args.schedule == "step" else "cosine",
                                       args.epochs, args.warmup_epochs, run.steps_per_epoch,
                                       gamma=0.4)

        def embed(given):
            with autocast():
                return comm.upcast(model.embed(given))

        def start_epoch(epoch):
            """Cluster, unless an epoch goes on; which images it takes, None for a permutation."""
            if run.step == epoch * run.steps_per_epoch:
                if not odc or epoch == 0:
                    x = run.features(embed, whole)
                    assignment.copy_(cluster_images(
                        x, args.num_clusters, args.kmeans_iterations, args.pca_dim, args.seed,
                        (epoch,), world.device))
                if not odc:
                    start_top(model.top, args.seed, epoch)
                elif epoch == 0:
                    memory.copy_(F.normalize(x))
                    update_centroids(centroids, memory, assignment)
                nmi.fill_(agreement(before, assignment) if epoch else 0.0)
                before.copy_(assignment)
                run.write_array("assignments.npy", assignment)
            return None if odc else balanced_order(assignment.cpu().numpy(), args.seed, epoch)

        for step, batch in run.steps(export=model.backbone, order=start_epoch):  # 1. and 2.
            optim.set_lr(optimizer, lr_of_step[step])
            optimizer.zero_grad(set_to_none=True)
            index = batch.index.to(world.device, non_blocking=True)
            labels, weights = assignment[index], None
            if odc:
                weights = class_weights(cluster_sizes(assignment, args.num_clusters))
            with autocast():
                z, logits = ddp_model(batch.views, batch.drawn)
            loss = cluster_loss(logits, labels, weights)  # 3. classify
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            run.log(loss, lr_of_step[step], indicators, z, logits, labels, assignment, nmi)
            if odc:
                update_memory(memory, assignment, centroids, index, z, args.memory_momentum)  # 4.
                if (step + 1) % args.centroid_steps == 0:  # 5. centroids, small clusters
                    update_centroids(centroids, memory, assignment)
                repair_clusters(memory, assignment, centroids, args.min_cluster, args.seed, step)
                if step + 1 == run.total_steps:  # those of the last step
                    run.write_array("assignments.npy", assignment)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
