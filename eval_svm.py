"""Linear support vector machines on frozen features: VOC07 classification, full and low-shot.

1. Take pooled layers of the whole images and divide each by its length. An image is resized twice,
   its shorter side to 256 px (where `--image-size` is 224), then to a square.
2. For every class and cost, train a linear SVM, class against rest, on two thirds of the training
   images and measure its average precision on the last third, three times.
3. Train on all training images with each class's best cost; the mean over classes of the average
   precision on the test images is the result (mAP).
4. Low-shot: the same with k images of every class, drawn five times.

Nothing is chosen on the test images: the layer that counts is the best in step 2, a low-shot cost
the best on the training images that were not drawn; `oracle`, the literature's, is the best on the
test images. Differs from VISSL: its low-shot images are resized once, straight to the square; its
costs are chosen by a precision that is not interpolated; its sort tells equal scores apart.

`--data` is a VOC folder (Annotations, ImageSets/Main, JPEGImages), where an image may show several
classes, or whatever the other evaluations take. An image in which a class is only marked as
difficult is neither for nor against it; VISSL trains on it as one without (`--vissl-labels`).

Letters: N training and M test images, C classes, D feature size, k images of a class.
Reference: Goyal et al., arXiv 1905.01235, section 4.1 and appendix B; numbers as in VISSL.

    python eval_svm.py --checkpoint runs/simclr-digits-resnet_tiny --costs 0.1 1 10 --low-shot 1 8
    python eval_svm.py --checkpoint runs/simclr --data VOCdevkit/VOC2007 --output runs/simclr-voc07
"""

import functools
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from common import augment, cli, distributed as comm, features

SVM = dict(  # as VISSL sets it for VOC07
    penalty="l2", loss="squared_hinge", dual=True, tol=1e-4, max_iter=2000, intercept_scaling=1.0,
    class_weight={1: 2, -1: 1},
)
COSTS = [0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0]
LOW_SHOT = [1, 2, 4, 8, 16, 32, 64, 96]
PARALLEL_FROM = 2**26  # feature values in all fits, from which on more processes are worth starting
VERSION = joblib.hash([Path(__file__).read_bytes(), sklearn.__version__])  # of cached fits


def parse_args(argv=None):
    parser = features.parser(
        __file__, __doc__, layers="res5-grid or cls",
        resize="the whole image, squeezed to a square",
    )
    group = parser.add_argument_group("protocol")
    group.add_argument("--costs", type=cli.positive, nargs="+", default=COSTS,
                       help="penalties of training images on the wrong side, to choose from")
    group.add_argument("--folds", type=cli.pos_int, default=3, help="of the cross-validation")
    group.add_argument("--low-shot", type=cli.pos_int, nargs="*", default=LOW_SHOT, metavar="K",
                       help="images of every class in the small training sets")
    group.add_argument("--draws", type=cli.pos_int, default=5, help="small training sets of each k")
    group.add_argument("--vissl-labels", action="store_true",
                       help="train on difficult images as if the class were not there")
    group = parser.add_argument_group("fits")
    group.add_argument("--output", metavar="FOLDER", help="cache of fits: what is there is reused")
    group.add_argument("--jobs", type=cli.pos_int, metavar="N",
                       help="processes that fit; default: the share of the cores")
    args = features.parse(parser, argv)
    if args.folds < 2:
        parser.error(f"--folds {args.folds}: a cross-validation has at least 2")
    return args


# --------------------------------------------------------------------------------------------- view


@dataclass
class WholeImage(augment.Step):
    """Resize the shorter side to `resize` pixels, then squeeze the image to the view's size."""

    resize: int
    interpolation: str
    geometric = resizes = True

    def apply(self, plane, _, size):
        resample = augment.INTERPOLATION[self.interpolation]
        plane = plane.resize(augment.shorter_side_to(self.resize, plane.size), resample)
        return plane.resize(size[::-1], resample)


# ---------------------------------------------------------------------------------------- precision


def precision_and_hits(targets, scores) -> tuple[np.ndarray, np.ndarray]:
    """Interpolated precision and number of hits down to each score, the best score first."""
    scores = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], len(scores) > 0))  # of equal scores
    hits = np.cumsum(np.asarray(targets)[order] > 0)[last]
    return np.maximum.accumulate((hits / (last + 1))[::-1])[::-1], hits


def average_precision(targets, scores) -> float:
    """Compute the area under the interpolated precision-recall curve, as VOC does from 2010 on.

    Args:
        targets: (N,), above 0 where the class is present.
        scores: (N,), higher where it is more likely. Equal ones are one threshold.

    Returns:
        In [0, 1]; NaN without a positive.
    """
    precision, hits = precision_and_hits(targets, scores)
    area = (precision * np.diff(hits, prepend=0)).sum()
    return float(area / hits[-1]) if hits.any() else math.nan


def average_precision_11_point(targets, scores) -> float:
    """Average the interpolated precision at recalls 0, 0.1, ... 1, as VOC did in 2007."""
    precision, hits = precision_and_hits(targets, scores)
    if not hits.any():
        return math.nan
    reached = [int((10 * hits < i * hits[-1]).sum()) for i in range(11)]  # exact: whole numbers
    return float(precision[reached].mean())


MEASURES = average_precision, average_precision_11_point


def mean(values) -> float:
    """The mean of the numbers that are not NaN; NaN if there is none."""
    values = [value for value in values if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


# --------------------------------------------------------------------------------------------- fits


def fit(key, features, task, seed):
    """Train one SVM and measure it on images that it was not trained on.

    Args:
        key: a hash of all the rest, for the cache. features: (N + M, D).
        task: rows to train on, their targets (1, -1), pairs of the same to measure on, the cost.

    Returns:
        Average precision and that at 11 points for each pair, NaN where the targets to train on
        are all alike; and 1 if the training stopped at `max_iter` before it had converged.
    """
    rows, targets, held_out, cost = task
    if abs(targets.sum()) == len(targets):
        return [[math.nan] * len(MEASURES)] * len(held_out), 0
    svm = LinearSVC(C=cost, random_state=seed, **SVM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `main` tells of all in one line
        svm.fit(features[rows], targets)
    precisions = []
    for rows, targets in held_out:
        # Rounded, equal images have equal scores.
        scores = svm.decision_function(features[rows]).round(12) if len(rows) else []
        precisions.append([measure(targets, scores) for measure in MEASURES])
    return precisions, int(svm.n_iter_ >= SVM["max_iter"])


def cached_fit(folder: str, world: comm.World):
    """`fit`, which keeps its results in a folder and takes those that are there."""
    with comm.same_error_on_all_ranks(writing=folder):
        # Compressed files have a checksum: a damaged one is not taken, its fit is done again.
        memory = joblib.Memory(os.path.join(folder, "fits"), compress=True, verbose=0)
        cached = memory.cache(fit, ignore=["features", "task", "seed"])
        if world.is_main:  # a first call sets the folder up, before others use it
            cached("", None, ([], np.zeros(0), [], 1.0), 0)
    return cached


@dataclass
class Fits:
    """Carries out fits on all processes, and counts the SVMs that had not converged."""

    fit: object  # `fit`, or that with a cache
    args: object
    world: comm.World
    stopped: int = 0

    def run(self, features: np.ndarray, fingerprint: str, tasks: list) -> list:
        """The precisions of every task, equal on every process."""
        seed, own = self.args.seed, tasks[self.world.rank :: self.world.size]
        jobs = self.args.jobs or joblib.cpu_count() // comm.env_int("LOCAL_WORLD_SIZE", 1)
        if sum(len(rows) for rows, *_ in own) * features.shape[1] < PARALLEL_FROM:
            jobs = 1
        with comm.same_error_on_all_ranks():
            found = joblib.Parallel(n_jobs=max(1, min(jobs, len(own))))(
                joblib.delayed(self.fit)(joblib.hash([fingerprint, task, seed]), features, task,
                                         seed) for task in own)
        results = [None] * len(tasks)
        for rank, part in enumerate(comm.all_gather_objects(found)):
            results[rank :: self.world.size] = part
        self.stopped += sum(stopped for _, stopped in results)
        return [precisions for precisions, _ in results]


# ----------------------------------------------------------------------------------------- protocol


def labelled_rows(labels: np.ndarray, difficult_is_absent: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one class's labels (N,) that count, and their targets 1 or -1."""
    rows = np.arange(len(labels)) if difficult_is_absent else np.flatnonzero(labels >= 0)
    return rows, np.where(labels[rows] == 1, 1, -1)


def low_shot_rows(labels: np.ndarray, k: int, num_classes: int, *seed: int) -> np.ndarray:
    """Draw k rows with a class and (num_classes - 1) k without it, or all if there are fewer."""
    rng = np.random.default_rng([k, *seed])
    positives, negatives = (rng.permutation(np.flatnonzero(labels == x)) for x in (1, 0))
    return np.sort(np.concatenate([positives[:k], negatives[: (num_classes - 1) * k]]))


def best_cost(costs: list[float], values: list[float]) -> float | None:
    """The cost with the highest value, the lowest of equal ones; None if all values are NaN."""
    known = [(value, -cost) for value, cost in zip(values, costs, strict=True) if value == value]
    return -max(known)[1] if known else None


def stratified_folds(targets: np.ndarray, folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows to measure on for each fold; none where no class has two rows."""
    folds = min(folds, max((targets > 0).sum(), (targets < 0).sum()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds
        return list(StratifiedKFold(folds).split(targets, targets)) if folds > 1 else []


def choose_costs(run, train, costs: list[float], num_folds: int) -> tuple[list[float], float]:
    """Each class's best cost in a cross-validation; the mean over classes of its precision.

    Args:
        run: `Fits.run` of some features. train: rows and targets of each class.
    """
    folds = [stratified_folds(targets, num_folds) for _, targets in train]
    found = iter(run([
        (rows[own], targets[own], [(rows[other], targets[other])], cost)
        for (rows, targets), splits in zip(train, folds, strict=True)
        for cost in costs for own, other in splits
    ]))
    values = [[mean(next(found)[0][0] for _ in splits) for _ in costs] for splits in folds]
    fallback_cost = best_cost(costs, [mean(v) for v in zip(*values, strict=True)]) or costs[0]
    return ([best_cost(costs, v) or fallback_cost for v in values],
            mean(max(v) for v in values if not any(map(math.isnan, v))))


def low_shot(run, k: int, labels, test, costs: list[float], draws: int, seed: int) -> dict:
    """Mean and deviation over draws: at the cost chosen on undrawn images, and at the oracle's."""
    tasks = []
    for draw in range(draws):
        for c, column in enumerate(labels.T):
            drawn = low_shot_rows(column, k, len(test), seed, draw, c)
            rest = np.setdiff1d(np.flatnonzero(column >= 0), drawn)
            held_out = [(rest, column[rest]), test[c]]
            tasks += [(drawn, np.where(column[drawn] == 1, 1, -1), held_out, cost)
                      for cost in costs]
    found = np.array(run(tasks)).reshape(draws, len(test), len(costs), 2, 2)

    def means(cost, held_out=1, measure=0):
        """Of every draw: the mean over the classes."""
        return [mean(classes) for classes in found[:, :, costs.index(cost), held_out, measure]]

    chosen = best_cost(costs, [mean(means(cost, held_out=0)) for cost in costs])
    if chosen is None:  # no image is left to choose on
        chosen = 1.0 if 1.0 in costs else costs[len(costs) // 2]
    oracle = best_cost(costs, [mean(means(cost)) for cost in costs]) or chosen
    return {
        "map": mean(means(chosen)), "std": float(np.std(means(chosen))), "cost": chosen,
        "map_11point": mean(means(chosen, measure=1)), "oracle_map": mean(means(oracle)),
        "oracle_std": float(np.std(means(oracle))), "oracle_cost": oracle,
    }


def evaluate(found: features.Features, args, fits: Fits, names: list[str]) -> dict:
    """Precisions of one backbone's features."""
    splits, n = (found.train, found.test), len(found.train.labels)
    labels = np.concatenate([split.labels for split in splits])
    if labels.ndim == 1:  # class numbers
        labels = (labels[:, None] == np.arange(1 + labels.max())).astype(int)
    names = names or [str(number) for number in range(labels.shape[1])]
    train = [labelled_rows(column[:n], args.vissl_labels) for column in labels.T]
    test = [labelled_rows(column[n:], False) for column in labels.T]
    test = [(n + rows, targets) for rows, targets in test]
    costs = sorted(set(args.costs))

    def run_on(layer):
        """`Fits.run` on the layer's rows divided by their length."""
        rows = np.concatenate([split.layers[layer].numpy() for split in splits])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5  # VISSL's, for a length of 0
        return functools.partial(fits.run, rows, joblib.hash([rows, SVM, VERSION]))

    layers = []
    for layer in found.train.layers:
        run = run_on(layer)
        # 2. Choose each class's cost on the training images
        chosen, validation_map = choose_costs(run, train, costs, args.folds)
        # 3. Train on all of them
        tasks = [(*train[c], [test[c]], cost) for c, cost in enumerate(chosen)]
        precisions = [on_test for on_test, in run(tasks)]
        layers.append({
            "layer": layer, "map": mean(ap for ap, _ in precisions),
            "map_11point": mean(ap for _, ap in precisions), "validation_map": validation_map,
            "costs": dict(zip(names, chosen, strict=True)),
            "per_class": {name: ap for name, (ap, _) in zip(names, precisions, strict=True)
                          if not math.isnan(ap)},
        })
    best = max(layers, key=lambda layer: np.nan_to_num(layer["validation_map"], nan=-1))

    # 4. Low-shot, of the layer that counts
    run, few = run_on(best["layer"]), {}
    for k in args.low_shot:
        fewest = min((count for count in (labels[:n] == 1).sum(0) if count), default=0)
        if fewest < k:
            comm.print_main(f"low-shot {k}: left out, for a class has {fewest} training images")
        else:
            few[str(k)] = low_shot(run, k, labels[:n], test, costs, args.draws, args.seed)
    return {"map": best["map"], "map_11point": best["map_11point"], "low_shot": few,
            "results": layers, "num_train": n, "num_test": len(labels) - n}


# --------------------------------------------------------------------------------------------- main


def main(args):
    # Only the same features, bit for bit, find their fits in the cache.
    world = comm.setup(args.device, deterministic=True)
    treated = "absent in training" if args.vissl_labels else "ignored"
    comm.print_main(f"linear SVM of each class against the rest, unit-norm features; cost of "
                    f"{len(args.costs)} by {args.folds}-fold cross-validation; difficult: "
                    f"{treated}")
    fit_once, table = cached_fit(args.output, world) if args.output else fit, []
    for source in features.sources(args, world, interpolation="bilinear",
                                   crop=augment.CenterCrop if args.resize else WholeImage,
                                   resnet_layer="res5-grid", several_classes=True):
        fits = Fits(fit_once, args, world)
        runs = [evaluate(source.features(backbone), args, fits, source.classes)
                for backbone in source.backbones()]
        table.append({"checkpoint": source.name, **features.mean_of(runs)})
        if fits.stopped:
            comm.print_main(f"warning: {source.name}: {fits.stopped} SVMs, as a rule of high "
                            f"costs, stopped at the published limit of {SVM['max_iter']} passes "
                            "before they had converged")

    if world.is_main:
        print_table(table)
        line = json.dumps({"eval": "svm", **table[-1], "checkpoints": table})
        line = json.loads(line, parse_constant=lambda nan: None)  # JSON does not know NaN
        print(json.dumps(line), flush=True)


def print_table(table: list[dict]) -> None:
    """Print the precisions of every checkpoint and layer, then those of few labels."""
    lines = [(f"{row['checkpoint']} {r['layer']}", r,
              len(row["results"]) > 1 and r["map"] == row["map"])
             for row in table for r in row["results"]]
    width = max(len("checkpoint"), *(len(title) + 2 for title, _, _ in lines))
    print(f"{'checkpoint':<{width}}{'mAP':>8}{'11-point':>10}{'validation':>12}")
    for title, r, counts in lines:
        print(f"{title + '*' * counts:<{width}}{r['map']:>8.3f}{r['map_11point']:>10.3f}"
              f"{r['validation_map']:>12.3f}")
    if any(counts for _, _, counts in lines):
        print("* the layer with the best precision in the cross-validation; it counts below")
    for row in table:
        for k, few in row["low_shot"].items():
            print(f"{row['checkpoint']}, {k} a class: mAP {few['map']:.3f} ±{few['std']:.3f} "
                  f"(cost {few['cost']:g}, chosen without the test images); oracle, as in the "
                  f"literature: {few['oracle_map']:.3f} ±{few['oracle_std']:.3f} "
                  f"(cost {few['oracle_cost']:g})")


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
