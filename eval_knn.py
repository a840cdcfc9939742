"""Weighted k-nearest-neighbour classification of frozen features.

Features of the training images are the bank. A test image is given the class with the most votes
among its k nearest bank images by cosine, each voting exp(cosine / T). Nothing is trained and no
setting is chosen on the test images. With `--shots s` the bank is s labelled images a class, drawn
again and again; the mean and standard deviation over the draws are reported.

Baselines: `pixels` (the normalised image itself) and `random` (the mean over five untrained
backbones). The last line of the output is one JSON object, which describes the checkpoint named
last and holds all of them under "checkpoints".

Reference: Wu et al., arXiv 1805.01978, section 3.4.

    python eval_knn.py --checkpoint pixels random runs/simclr-digits-resnet_tiny
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint runs/simclr --data /path/to/imagenet
"""

import json
import statistics
import sys

import numpy as np
import torch
from torch import Tensor

from common import augment, backbones, cli, data, dist, features

RANDOM_INITIALISATIONS = 5


def parse_args(argv=None):
    parser = cli.Parser(prog="eval_knn.py", description=__doc__,
                        formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="WHAT",
                        help="run folders, weights files, random, pixels; one table of all")
    group = parser.add_argument_group("protocol")
    group.add_argument("--k", type=cli.count, nargs="+", default=[20], help="neighbours")
    group.add_argument("--temperature", type=cli.positive, nargs="+", default=[0.07],
                       help="of the votes")
    group.add_argument("--shots", type=cli.count, nargs="*", default=[5, 1],
                       help="labelled images a class in the few-label banks")
    group.add_argument("--draws", type=cli.count, default=100,
                       help="few-label banks to average over")
    group.add_argument("--seed", type=cli.whole, default=0, help="of the draws and of random")
    group = parser.add_argument_group("images (default: as the first run among the checkpoints)")
    group.add_argument("--data", help="labelled images, with a train and a test split")
    group.add_argument("--data-root", default="data", metavar="FOLDER",
                       help="where torchvision's data sets are")
    group.add_argument("--image-size", type=cli.count, help="side in pixels")
    group.add_argument("--resize", type=cli.count,
                       help="shorter side before the central crop; default: the image size up to "
                       "96 px, 256/224 of it above")
    group.add_argument("--in-chans", type=cli.count, help="channels of the images")
    group.add_argument("--mean", type=cli.number, nargs="+", help="subtracted from each channel")
    group.add_argument("--std", type=cli.positive, nargs="+", help="each channel is divided by it")
    group.add_argument("--limit", type=cli.count, metavar="N",
                       help="take N evenly spaced images of each split")
    group = parser.add_argument_group("backbone (default: as above)")
    group.add_argument("--arch", choices=backbones.NAMES, help="backbone")
    group.add_argument("--stem", choices=("imagenet", "small"), help="small: 3x3 stride 1, no pool")
    group.add_argument("--patch-size", type=cli.count, help="side of a transformer's patches")
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=cli.count, default=256, help="images in one pass")
    group.add_argument("--workers", type=cli.whole, metavar="N",
                       help="loader processes; default: the share of the cores, 0 if no files")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------- protocol


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and bank rows (M, k) of each query's k nearest bank rows, nearest first.

    Args:
        bank: unit rows (N, D).
        queries: unit rows (M, D).
    """
    if bank.device.type == "cpu" and bank.dtype == torch.float32:
        import faiss  # after torch, and never in a loader process: the other order can hang

        cosines, rows = faiss.knn(
            queries.contiguous().numpy(), bank.contiguous().numpy(), k,
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        return torch.from_numpy(cosines), torch.from_numpy(rows)
    found = [(part @ bank.T).topk(k, dim=1) for part in queries.split(256)]  # bounds the memory
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def vote(cosines: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Class scores (M, num_classes) from the cosines and labels (M, k) of the neighbours."""
    votes = (cosines.double() / temperature).exp()  # float32 overflows below temperature 0.0113
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, labels, votes)


def knn_predict(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Classify queries by their k nearest bank rows.

    Args:
        bank: features (N, D), normalised here.
        labels: int64 (N,), in [0, num_classes).
        queries: features (M, D), normalised here.
        k: neighbours; clipped to N.
        temperature: a neighbour votes exp(cosine / temperature).

    Returns:
        Class scores (M, num_classes); their argmax is the prediction.
    """
    bank, queries = (torch.nn.functional.normalize(x, dim=1) for x in (bank, queries))
    cosines, rows = nearest(bank, queries, min(k, len(bank)))
    return vote(cosines, labels[rows], temperature, num_classes)


def few_label_bank(labels: np.ndarray, shots: int, *seed: int) -> np.ndarray:
    """Rows of a bank with `shots` images of every class, or all of a class that has fewer."""
    rng = np.random.default_rng([shots, *seed])
    classes = [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)]
    return np.concatenate(classes)


def evaluate(train, train_labels, test, test_labels, args, world) -> dict:
    """Accuracies of one set of features, each process taking a part of the test images."""
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    own = slice(len(test) * world.rank // world.size, len(test) * (world.rank + 1) // world.size)
    bank = torch.nn.functional.normalize(train, dim=1).to(world.device)
    queries = torch.nn.functional.normalize(test[own], dim=1).to(world.device)
    labels = torch.from_numpy(train_labels).long().to(world.device)
    truth = torch.from_numpy(test_labels[own]).long().to(world.device)

    def accuracy(scores):
        right = (scores.argmax(1) == truth).sum(dtype=torch.float64)[None]
        return float(dist.all_gather_no_grad(right).sum()) / len(test_labels)

    cosines, rows = nearest(bank, queries, min(max(args.k), len(bank)))
    results = []
    for k in args.k:
        for temperature in args.temperature:
            scores = vote(cosines[:, :k], labels[rows[:, :k]], temperature, num_classes)
            results.append({"layer": "avgpool", "k": k, "temperature": temperature,
                            "top1": accuracy(scores)})
    shots = {}
    for count in args.shots:
        draws = []
        for draw in range(args.draws):
            few = torch.from_numpy(few_label_bank(train_labels, count, args.seed, draw))
            few = few.to(world.device)
            scores = knn_predict(bank[few], labels[few], queries, args.k[0], args.temperature[0],
                                 num_classes)
            draws.append(accuracy(scores))
        shots[str(count)] = {"mean": statistics.fmean(draws), "std": statistics.pstdev(draws)}
    return {"top1": results[0]["top1"], "results": results, "shots": shots}


def mean_of(runs: list[dict]) -> dict:
    """The results of several initialisations, averaged number by number."""
    first = runs[0]
    if all(run == first for run in runs):
        return first
    if isinstance(first, dict):
        return {key: mean_of([run[key] for run in runs]) for key in first}
    if isinstance(first, list):
        return [mean_of(list(parts)) for parts in zip(*runs, strict=True)]
    return statistics.fmean(runs)


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = dist.setup(args.device)
    checkpoints = [features.find_checkpoint(name) for name in args.checkpoint]
    settings = features.resolve(args, checkpoints)

    opened = {}  # both splits, by channel count: listed once for all checkpoints

    def features_of(settings, function):
        """Features of both splits through one view without random numbers, and their labels."""
        if settings["in_chans"] not in opened:
            opened[settings["in_chans"]] = [
                data.open_images(settings["data"], split, settings["in_chans"],
                                 root=args.data_root, limit=args.limit)
                for split in ("train", "test")
            ]
        splits = opened[settings["in_chans"]]
        if any(images.labels is None for images in splits):
            raise dist.RunError(f"--data {settings['data']}: no class folders, so no labels")
        size = settings["image_size"]
        resize = args.resize or (size if size <= 96 else round(size * 256 / 224))
        if resize < size:
            raise dist.RunError(f"--resize {resize} is less than --image-size {size}")
        steps = [
            augment.CenterCrop(resize, interpolation="bicubic"),
            augment.Normalize(settings["mean"], settings["std"]),
        ]
        view = augment.View(size, steps, settings["in_chans"])
        workers = args.workers
        if workers is None:
            workers = data.default_workers() if splits[0].reads_files else 0
        found = [features.extract(function, images, view, world, batch_size=args.batch_size,
                                  workers=workers) for images in splits]
        protocol = (f"{settings['data']}: {len(splits[0])} training and {len(splits[1])} test "
                    f"images of {size} px (shorter side to {resize}, central crop)")
        return (found[0], splits[0].labels, found[1], splits[1].labels), protocol

    def frozen(settings, weights, trained_size=None):
        size, patch = settings["image_size"], settings["patch_size"]
        if settings["arch"] in backbones.VITS and size % patch:
            raise dist.RunError(f"--image-size {size} is no multiple of --patch-size {patch}")
        backbone = backbones.build_backbone(
            settings["arch"], in_chans=settings["in_chans"], stem=settings["stem"],
            zero_init_residual=False, image_size=trained_size or size, patch_size=patch,
            positions="sincos", drop_path=0.0,
        )
        return features.freeze(backbone, weights, world)

    # Features and votes of each checkpoint
    dist.say(f"k-NN by cosine, k {args.k[0]}, votes exp(cosine / {args.temperature[0]}); few "
             f"labels: mean and standard deviation of {args.draws} draws")
    table, protocols = [], []
    for checkpoint in checkpoints:
        own = settings
        if checkpoint.name == "pixels":
            models = [lambda images: images.flatten(1)]
        elif checkpoint.name == "random":
            models = []
            for number in range(RANDOM_INITIALISATIONS):
                torch.manual_seed(args.seed + number)
                models.append(frozen(settings, None))
        else:
            own = {**features.resolve(args, [checkpoint]), "data": settings["data"]}
            trained_size = checkpoint.settings.get("image_size")
            models = [frozen(own, checkpoint.weights, trained_size)]
        results = []
        for model in models:
            found, protocol = features_of(own, model)
            if protocol not in protocols:
                protocols.append(protocol)
                dist.say(protocol)
            results.append(evaluate(*found, args, world))
        sizes = {"num_train": len(found[1]), "num_test": len(found[3])}
        table.append({"checkpoint": checkpoint.name, **mean_of(results), **sizes})

    if world.is_main:
        width = max(len(row["checkpoint"]) for row in table)
        few = "".join(f"{f'{s} a class':>18}" for s in args.shots)
        print(f"{'checkpoint':<{width}}{'all labels':>12}{few}")
        for row in table:
            few = "".join(f"{s['mean']:>11.3f} ±{s['std']:.3f}" for s in row["shots"].values())
            print(f"{row['checkpoint']:<{width}}{row['top1']:>12.3f}{few}")
        line = {"eval": "knn", **table[-1], "checkpoints": table}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(dist.launch(main, parse_args()))
