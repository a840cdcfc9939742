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
import statistics
import sys

import numpy as np
import torch

from common import cli, distributed as comm, features, labelled
from common.knn import count_right, knn_predict  # noqa: F401  knn_predict: to be copied
from common.labelled_sets import class_members


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


def few_label_bank(members: list[np.ndarray], shots: int, *seed: int) -> np.ndarray:
    """Rows of a bank with `shots` images of every class, or all of a class that has fewer."""
    rng = np.random.default_rng([shots, *seed])
    return np.concatenate([rng.permutation(rows)[:shots] for rows in members])


def evaluate(given: features.Features, args, world) -> dict:
    """Accuracies of one backbone's features, each process taking a part of the queries."""
    train, test = given.train, given.test
    if args.leave_one_out:
        train = test = getattr(given, args.leave_one_out)
    if train.labels.ndim != 1:
        raise comm.RunError(f"{given.checkpoint}: k-NN needs images of one class each")
    n, m = len(train.labels), len(test.labels)
    shard = world.part(m)
    labels = torch.from_numpy(train.labels).to(world.device)
    truth = torch.from_numpy(test.labels[shard]).to(world.device)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    settings = list(dict.fromkeys(itertools.product(args.k, args.temperature)))  # each once

    def accuracies(bank, queries, chosen, settings, by_class=None):
        """Share of right and of undecided ones for each (k, T), with these rows of the bank."""
        self_index = None
        if args.leave_one_out:  # where each query stands among the chosen rows, if it does
            self_index = torch.full((n,), -1, device=world.device)
            self_index[chosen] = torch.arange(len(self_index[chosen]), device=world.device)
            self_index = self_index[shard]
        counts = count_right(bank[chosen], labels[chosen], queries, truth, settings, num_classes,
                             self_index, args.chunk, by_class)
        return (comm.sum_over_processes(counts) / m).tolist()

    results, means, shots = [], [], {}
    members, everything = class_members(train.labels), slice(None)
    for number, (layer, rows) in enumerate(train.layers.items()):
        bank = torch.nn.functional.normalize(rows.to(world.device), dim=1)
        queries = torch.nn.functional.normalize(test.layers[layer][shard].to(world.device), dim=1)
        by_class = truth.new_zeros(len(settings), num_classes, dtype=torch.float64)
        found, undecided = accuracies(bank, queries, everything, settings, by_class)
        by_class = comm.sum_over_processes(by_class)
        for (k, temperature), top1, right in zip(settings, found, by_class, strict=True):
            results.append({"layer": layer, "k": k, "temperature": temperature, "top1": top1})
            means.append(labelled.mean_per_class(right, test.labels))
            if labelled.mean_per_class_is_usual(given.protocol):
                results[-1]["mean_per_class"] = means[-1]
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
    return {"top1": results[0]["top1"], "mean_per_class": means[0], "results": results,
            "shots": shots, "num_train": n, "num_test": m}


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
    measures = ["top1"]
    if all("mean_per_class" in r for row in table for r in row["results"]):
        measures = ["top1", "mean_per_class"]
        columns = [name for column in columns for name in (column, "mean per class")]
    few = [f"{shots} a class" for shots in table[0]["shots"]]
    features.print_table(["checkpoint", *columns, *few], table_rows(table, measures))
    features.print_json({"eval": "knn", "leave_one_out": args.leave_one_out, **table[-1],
                         "checkpoints": table})


def table_rows(table: list[dict], measures: list[str]) -> list[list[str]]:
    """A row for each checkpoint and layer: these of every k and T, then top-1 of few labels."""
    rows = []
    for entry in table:
        layers = {}
        for r in entry["results"]:
            layers.setdefault(r["layer"], []).extend(f"{r[name]:.3f}" for name in measures)
        for number, (layer, cells) in enumerate(layers.items()):
            shots = entry["shots"].values() if number == 0 else ()
            name = f"{entry['checkpoint']} {layer}" if len(layers) > 1 else entry["checkpoint"]
            rows.append([name, *cells, *(f"{s['mean']:.3f} ±{s['std']:.3f}" for s in shots)])
    return rows


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
