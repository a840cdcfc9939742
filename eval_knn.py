"""Weighted k-nearest-neighbour classification of frozen features.

1. Take features of the training images, the bank, and of the test images.
2. Find the k images of the bank that are nearest to a test image by cosine.
3. Each votes exp(cosine / T) for its class; the class with the most votes is the prediction. Where
   s classes have equally many, the right one among them counts 1 / s.

Nothing is trained and no setting is chosen on the test images. With `--shots s` the bank is s
labelled images a class, drawn again and again; the mean and standard deviation over the draws are
reported, of the first layer, k and T. With `--leave-one-out` the bank is the tested split itself,
without the image in question.

Baselines: `pixels` (the normalised image itself) and `random` (the mean over five untrained
backbones). The last line of the output is one JSON object, which describes the checkpoint named
last and holds all of them under "checkpoints".

Letters: N images in the bank, M queries, D feature size, T temperature.

Reference: Wu et al., arXiv 1805.01978, section 3.4; k and T as in DINO, arXiv 2104.14294.

    python eval_knn.py --checkpoint pixels random runs/simclr-digits-resnet_tiny
    python eval_knn.py --checkpoint runs/simclr-digits-resnet_tiny --layers avgpool res4 --k 20 200
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint runs/simclr --data /path/to/imagenet
"""

import itertools
import math
import statistics
import sys

import numpy as np
import torch
from torch import Tensor

from common import cli, distributed as comm, features

EXTRA = 8  # candidates beyond k, so that rounding does not decide who is among the k
TOLERANCE = 1e-6  # cosines nearer than this are computed again in float64
SMALL_BANK = 256  # rows that are compared in float64 at once
BLOCK = 2**15  # rows of a bank on the GPU that queries are compared with at a time


def parse_args(argv=None):
    parser = features.parser(__file__, __doc__)
    group = parser.add_argument_group("protocol")
    group.add_argument("--k", type=cli.pos_int, nargs="+", default=[20], help="neighbours")
    group.add_argument("--temperature", type=cli.positive, nargs="+", default=[0.07],
                       help="temperature of the votes")
    group.add_argument("--leave-one-out", choices=("train", "test"), nargs="?", const="test",
                       help="classify the images of this split by its other images")
    group.add_argument("--shots", type=cli.pos_int, nargs="*", default=[5, 1],
                       help="labelled images a class in the few-label banks")
    group.add_argument("--draws", type=cli.pos_int, default=100,
                       help="few-label banks to average over, at least 50")
    group.add_argument("--chunk", type=cli.pos_int, default=2048,
                       help="queries at a time (bounds the memory)")
    args = features.parse(parser, argv)
    if args.shots and args.draws < 50:
        parser.error(f"--draws {args.draws} is too few to trust their mean; take 50 or more, or "
                     "none with an empty --shots")
    return args


# ----------------------------------------------------------------------------------------- protocol


def nearest(
    bank: Tensor, queries: Tensor, k: int, self_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find each query's k nearest bank rows by cosine, nearest first, of equal ones the lower row.

    They are found in the features' own precision. Where that cannot tell one from the next, float64
    decides, so that neither a chunk's size nor the number of processes changes the result.

    Args:
        bank: unit rows (N, D).
        queries: unit rows (M, D).
        k: at most N.
        self_index: int64 (M,), a bank row for each query that does not count; -1 for none.

    Returns:
        Float64 cosines and bank rows (M, k); cosine -inf where there are fewer than k.
    """
    if len(bank) <= SMALL_BANK:
        rows = torch.arange(len(bank), device=bank.device).expand(len(queries), -1)
        cosines, rows = sort_by_similarity(queries.double() @ bank.double().T, rows, self_index)
    else:
        cosines, rows = candidates(bank, queries, min(k + EXTRA, len(bank)))
        cosines, rows = sort_by_similarity(cosines.double(), rows, self_index)
        close = (cosines[:, : k + 1].diff(dim=1) > -TOLERANCE).any(1).nonzero()[:, 0]
        for part in close.split(64):
            near = rows[part].sort(dim=1).values
            exact = (bank[near].double() @ queries[part].double()[:, :, None])[..., 0]
            left_out = None if self_index is None else self_index[part]
            cosines[part], rows[part] = sort_by_similarity(exact, near, left_out)
    return cosines[:, :k], rows[:, :k]


def sort_by_similarity(
    cosines: Tensor, rows: Tensor, self_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sort float64 cosines and their rows (M, C), the highest first; `self_index` becomes -inf."""
    cosines = cosines.round(decimals=13)  # equal images have equal cosines, up to rounding
    if self_index is not None:
        cosines = cosines.masked_fill(rows == self_index[:, None], -math.inf)
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    return cosines, rows.gather(1, order)


def candidates(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and rows (M, k) of the bank nearest to each query, up to rounding."""
    if bank.device.type == "cpu" and bank.dtype == torch.float32:
        import faiss  # after torch, and never in a loader process: the other order can hang

        bank, queries = bank.contiguous().numpy(), queries.contiguous().numpy()
        cosines, rows = faiss.knn(queries, bank, k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(cosines), torch.from_numpy(rows)
    best, rows = queries[:, :0], torch.empty_like(queries[:, :0], dtype=torch.int64)
    for start in range(0, len(bank), BLOCK):
        found = queries @ bank[start : start + BLOCK].T
        found, places = found.topk(min(k, found.shape[1]), dim=1)
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, places + start], dim=1)
        best, places = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, places)
    return best, rows


def vote(cosines: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Class scores (M, num_classes) from the cosines and labels (M, k) of the neighbours."""
    votes = (cosines.double() / temperature).exp()  # float32 overflows below temperature 0.0113
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, labels, votes)


def knn_predict(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int,
    self_index: Tensor | None = None, chunk: int = 2048,
) -> Tensor:
    """Classify queries by their k nearest bank rows.

    Args:
        bank: features (N, D), normalised here.
        labels: int64 (N,), in [0, num_classes).
        queries: features (M, D), normalised here.
        k: neighbours; clipped to N.
        temperature: a neighbour votes exp(cosine / temperature).
        self_index: int64 (M,), a bank row for each query that does not vote; -1 for none.
        chunk: queries at a time.

    Returns:
        Float64 class scores (M, num_classes); the highest is the prediction.
    """
    bank, queries = (torch.nn.functional.normalize(x, dim=1) for x in (bank, queries))
    scores = []
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        left_out = None if self_index is None else self_index[part]
        cosines, rows = nearest(bank, queries[part], min(k, len(bank)), left_out)
        scores.append(vote(cosines, labels[rows], temperature, num_classes))
    return torch.cat(scores) if scores else bank.new_zeros(0, num_classes, dtype=torch.float64)


def class_members(labels: np.ndarray) -> list[np.ndarray]:
    """Rows of every class that there is, by rising class."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def few_label_bank(members: list[np.ndarray], shots: int, *seed: int) -> np.ndarray:
    """Rows of a bank with `shots` images of every class, or all of a class that has fewer."""
    rng = np.random.default_rng([shots, *seed])
    return np.concatenate([rng.permutation(rows)[:shots] for rows in members])


def count_right(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, settings: list, num_classes: int,
    self_index: Tensor | None, chunk: int,
) -> Tensor:
    """How many queries each (k, T) of `settings` classifies correctly, and how many are undecided.

    Rows are unit rows; the other arguments are those of `knn_predict`.

    Returns:
        Float64 (2, len(settings)); undecided is where the neighbour after the k-th is as near.
    """
    counts = torch.zeros(2, len(settings), dtype=torch.float64, device=bank.device)
    most = min(max(k for k, _ in settings) + 1, len(bank))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        left_out = None if self_index is None else self_index[part]
        cosines, rows = nearest(bank, queries[part], most, left_out)
        for number, (k, temperature) in enumerate(settings):
            scores = vote(cosines[:, :k], labels[rows[:, :k]], temperature, num_classes)
            counts[0, number] += features.share_right(scores, truth[part], 1).sum()
            last, after = cosines[:, k - 1 : k], cosines[:, k : k + 1]
            if after.shape[1]:
                counts[1, number] += ((last == after) & last.isfinite()).sum()
    return counts


def evaluate(given: features.Features, args, world) -> dict:
    """Accuracies of one backbone's features, each process taking a part of the queries."""
    train, test = given.train, given.test
    if args.leave_one_out:
        train = test = getattr(given, args.leave_one_out)
    if train.labels.ndim != 1:
        raise comm.RunError(f"{given.checkpoint}: k-NN needs images of one class each")
    n, m = len(train.labels), len(test.labels)
    shard = slice(m * world.rank // world.size, m * (world.rank + 1) // world.size)
    labels = torch.from_numpy(train.labels).to(world.device)
    truth = torch.from_numpy(test.labels[shard]).to(world.device)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    settings = list(dict.fromkeys(itertools.product(args.k, args.temperature)))  # each once

    def accuracies(bank, queries, chosen, settings):
        """Share of right and of undecided ones for each (k, T), with these rows of the bank."""
        self_index = None
        if args.leave_one_out:  # where each query stands among the chosen rows, if it does
            self_index = torch.full((n,), -1, device=world.device)
            self_index[chosen] = torch.arange(len(self_index[chosen]), device=world.device)
            self_index = self_index[shard]
        counts = count_right(bank[chosen], labels[chosen], queries, truth, settings, num_classes,
                             self_index, args.chunk)
        return (comm.sum_over_processes(counts) / m).tolist()

    results, shots = [], {}
    members, everything = class_members(train.labels), slice(None)
    for number, (layer, rows) in enumerate(train.layers.items()):
        bank = torch.nn.functional.normalize(rows.to(world.device), dim=1)
        queries = torch.nn.functional.normalize(test.layers[layer][shard].to(world.device), dim=1)
        found, undecided = accuracies(bank, queries, everything, settings)
        for (k, temperature), top1 in zip(settings, found, strict=True):
            results.append({"layer": layer, "k": k, "temperature": temperature, "top1": top1})
        shares = {k: share for (k, _), share in zip(settings, undecided, strict=True)}
        for k, share in shares.items():
            if share:
                comm.print_main(f"warning: {given.checkpoint} {layer}, k {k}: {share * m:.0f} of "
                                f"{m} images have more neighbours as near as the last of the k; "
                                "the first in the data set vote")
        for count in args.shots if number == 0 else ():
            draws = []
            for draw in range(args.draws):
                few = torch.from_numpy(few_label_bank(members, count, args.seed, draw))
                draws += accuracies(bank, queries, few.to(world.device), settings[:1])[0]
            shots[str(count)] = {"mean": statistics.fmean(draws), "std": statistics.pstdev(draws)}
    return {"top1": results[0]["top1"], "results": results, "shots": shots,
            "num_train": n, "num_test": m}


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = comm.setup(args.device, deterministic=True)
    # 1. Features; 2. neighbours and 3. votes of each checkpoint
    bank = f", in the {args.leave_one_out} split without the image itself"
    few = f"; few labels: mean and standard deviation of {args.draws} draws"
    comm.print_main(f"k-NN by cosine, k {args.k[0]}, votes exp(cosine / {args.temperature[0]})"
                    f"{bank if args.leave_one_out else ''}{few if args.shots else ''}")
    table = []
    for source in features.sources(args, world, interpolation="bicubic"):
        runs = [evaluate(source.features(backbone), args, world) for backbone in source.backbones()]
        table.append({"checkpoint": source.name, **features.mean_of(runs)})

    settings = {(r["k"], r["temperature"]): f"k {r['k']} T {r['temperature']:g}"
                for r in table[0]["results"]}
    columns = list(settings.values()) if len(settings) > 1 else ["all labels"]
    few = [f"{shots} a class" for shots in table[0]["shots"]]
    features.print_table(["checkpoint", *columns, *few], table_rows(table))
    line = {"eval": "knn", **table[-1], "checkpoints": table}
    if args.leave_one_out:
        line["leave_one_out"] = args.leave_one_out
    features.print_json(line)


def table_rows(table: list[dict]) -> list[list[str]]:
    """A row for each checkpoint and layer: the top-1 of every k and T, then of the few labels."""
    rows = []
    for entry in table:
        layers = {}
        for r in entry["results"]:
            layers.setdefault(r["layer"], []).append(f"{r['top1']:.3f}")
        for number, (layer, cells) in enumerate(layers.items()):
            shots = entry["shots"].values() if number == 0 else ()
            name = f"{entry['checkpoint']} {layer}" if len(layers) > 1 else entry["checkpoint"]
            rows.append([name, *cells, *(f"{s['mean']:.3f} ±{s['std']:.3f}" for s in shots)])
    return rows


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
