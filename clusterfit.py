"""ClusterFit, arXiv 1912.03330: the clusters of a network's features, labels for another to learn.

1. Take features of all images of pre-training, one central view each, and divide them by their
   length; with `--pca-dim` turn them to so many principal axes of unit variance.
2. k-means: from K different images on, every image goes to the nearest centroid and every centroid
   to the mean of its images, 50 times. An empty cluster takes half of one of the largest.
3. Write the nearest centroid of every image: `assignments.npy`, int64 (N,), in the order of
   `--data`, and if images are files `labels.txt`, `path label` a line; the same of the test split
   under the same centroids, if there is one (`assignments-test.npy`, `labels-test.txt`).

A new network then learns them (`finetune.py --checkpoint random --labels`). It is often better than
the first, for it was never fitted to the pretext task. Labels of the images are not needed; where
there are some, their normalised mutual information (NMI) with the clusters is printed.

Letters: N images, D feature size, K clusters.

Differs from VISSL, whose numbers these are: every image counts in k-means, there at most 256 a
cluster; which large cluster is split is drawn at random there. 16,000 clusters of ImageNet want a
GPU.

    python clusterfit.py --checkpoint runs/simclr --num-clusters 16000 --output runs/clusterfit
    python clusterfit.py --checkpoint runs/simclr-digits-resnet_tiny --num-clusters 30 --output out
"""

import os
import sys

import numpy as np
from sklearn.metrics import normalized_mutual_info_score

from common import cli, distributed as comm, features, labelled, rng
from common.checkpoint import atomic_write
from common.images import FileImages
from common.kmeans import first_centroids, join_parts, kmeans, nearest_centroids, own_part
from common.whitening import whitening


def parse_args(argv=None):
    parser = features.parser(__file__, __doc__, several=False)
    group = parser.add_argument_group("clusters")
    group.add_argument("--num-clusters", type=cli.pos_int, required=True, metavar="K",
                       help="16000 in the paper, for ImageNet")
    group.add_argument("--kmeans-iterations", type=cli.pos_int, default=50, metavar="N",
                       help="most iterations of k-means")
    group.add_argument("--pca-dim", type=cli.pos_int, metavar="D",
                       help="whiten the features to so many principal axes")
    group.add_argument("--output", metavar="FOLDER", required=True, help="where the files go")
    args = features.parse(parser, argv)
    if args.limit_per_class:
        parser.error(f"--limit-per-class {args.limit_per_class} needs labels; --limit does not")
    return args


# -------------------------------------------------------------------------------------------- files


def write(folder: str, ending: str, assignment: np.ndarray | None, images) -> None:
    """Write assignments and the list, each whole or not at all; those of an earlier run go."""
    array, listed = (os.path.join(folder, f"{name}{ending}.{kind}")
                     for name, kind in (("assignments", "npy"), ("labels", "txt")))
    for path in filter(os.path.exists, (array, listed)):
        os.remove(path)
    if assignment is None:
        return
    with atomic_write(array) as file:
        np.save(file, assignment)
    if isinstance(images, FileImages):
        names = [os.path.abspath(images.name(i)) for i in range(len(images))]
        if broken := [name for name in names if "\n" in name or "\r" in name]:
            raise comm.RunError(f"{broken[0]!r} does not go into a list; rename it")
        with atomic_write(listed) as file:
            for name, label in zip(names, assignment.tolist(), strict=True):
                file.write(os.fsencode(f"{name} {label}\n"))


def describe(assignment: np.ndarray, labels: np.ndarray | None, num_clusters: int) -> dict:
    """How many images the clusters have, and how far they agree with labels of one class each."""
    sizes, nmi = np.bincount(assignment, minlength=num_clusters), None
    if labels is not None and labels.ndim == 1 and (labels >= 0).any():
        known = labels >= 0
        nmi = float(normalized_mutual_info_score(labels[known], assignment[known]))
    return {"smallest": int(sizes.min()), "median": float(np.median(sizes)),
            "largest": int(sizes.max()), "empty": int((sizes == 0).sum()), "nmi": nmi}


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = comm.setup(args.device, deterministic=True)
    with comm.same_error_on_all_ranks(writing=args.output):
        os.makedirs(args.output, exist_ok=True)
    if os.path.exists(os.path.join(args.output, "assignments.npy")):
        comm.print_main(f"warning: {args.output} holds clusters already, which will be replaced; "
                        "to keep them interrupt now, and choose another --output")
    # 1. Features
    (source,) = features.sources(args, world, interpolation="bilinear",
                                 open_splits=labelled.open_unlabelled)
    found = source.features(next(source.backbones()))
    if len(found.train.layers) > 1:
        raise comm.RunError(f"{source.name} has the layers {' '.join(found.train.layers)}; choose "
                            "one with --layers")
    splits = {"": (found.train, source.train), "-test": (found.test, source.test)}
    rows = {}
    for ending, (split, _) in splits.items():
        for x in split.layers.values() if split else ():
            rows[ending] = x / (x.norm(dim=1, keepdim=True) + 1e-5)
    n, d = rows[""].shape
    if args.num_clusters > n:
        raise comm.RunError(f"--num-clusters {args.num_clusters} is more than the {n} images")
    if (args.pca_dim or 0) > min(n, d):
        raise comm.RunError(f"--pca-dim {args.pca_dim} is more than the {n} images or their "
                            f"{d} features")
    if args.pca_dim:
        mean, projection = whitening(rows[""], args.pca_dim)
        rows = {ending: (x - mean) @ projection for ending, x in rows.items()}
    # 2. k-means
    own = {ending: own_part(x).to(world.device) for ending, x in rows.items()}
    start = first_centroids(own[""], args.num_clusters, rng.philox(args.seed, rng.CLUSTERS))
    centroids, _ = kmeans(own[""], start, args.kmeans_iterations)
    # 3. Nearest centroids
    line = {"eval": "clusterfit", "checkpoint": found.checkpoint, "num_clusters": args.num_clusters}
    for ending, (split, images) in splits.items():
        assignment = None
        if split:
            nearest = nearest_centroids(own[ending], centroids)
            assignment = join_parts(nearest, len(rows[ending])).cpu().numpy()
            told = describe(assignment, split.labels, args.num_clusters)
            line[f"num_{ending[1:] or 'train'}"] = len(assignment)
            line |= {name + ending.replace("-", "_"): value for name, value in told.items()}
            comm.print_main(f"{len(assignment)} {ending[1:] or 'training'} images: " + ", ".join(
                f"{name} {value:.4g}" for name, value in told.items() if value is not None))
        with comm.same_error_on_all_ranks(writing=args.output):
            if world.is_main:
                write(args.output, ending, assignment, images)
    path = os.path.join(args.output, "assignments.npy")
    data = f" --data {cli.as_given(source.settings['data'])}" if source.settings else ""
    comm.print_main(f"to train on them: finetune.py --checkpoint random{data} --labels {path}")
    features.print_json(line)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
