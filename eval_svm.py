"""Linear support vector machines on frozen features: VOC07 classification, full and low-shot.

1. Take pooled layers of the whole images and divide each by its length. An image is resized twice,
   its shorter side to 256 px (where `--image-size` is 224), then to a square.
2. For every class and cost, train a linear SVM, class against rest, on two thirds of the training
   images and measure its average precision on the last third, three times.
3. Train on all training images with each class's best cost; the mean over classes of the average
   precision on the test images is the result (mAP).
4. Low-shot: the same with k images of every class, drawn five times.

Nothing is chosen on the test images: the layer that counts is the best in step 2, a low-shot cost
the best on the training images not drawn; only `oracle`, the literature's, is the best on the test
images. Differs from VISSL: its low-shot images are resized once, to the square; its costs are
chosen by a precision that is not interpolated; its sort tells equal scores apart. `--data` is a VOC
folder or labelled images as for the other evaluations. An image in which a class is only marked as
difficult is neither for nor against it; VISSL trains on it as one without (`--vissl-labels`).

Reference: Goyal et al., arXiv 1905.01235, section 4.1 and appendix B; numbers as in VISSL.
Letters: N training and M test images, C classes, D feature size, k images of a class.

    python eval_svm.py --checkpoint runs/simclr-digits-resnet_tiny --costs 0.1 1 10 --low-shot 1 8
    python eval_svm.py --checkpoint runs/simclr --data VOCdevkit/VOC2007 --output runs/simclr-voc07
"""

import math
import os
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path

import joblib
import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from common import augment, cli, distributed as comm, features

SVM = dict(penalty="l2", loss="squared_hinge", dual=True, tol=1e-4, max_iter=2000,  # as VISSL's
           intercept_scaling=1.0, class_weight={1: 2, -1: 1})
COSTS = [0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0]
PARALLEL_FROM = 2**26  # feature values in all fits, from which on more processes are worth starting
VERSION = joblib.hash([Path(__file__).read_bytes(), sklearn.__version__])  # of cached fits


def parse_args(argv=None):
    parser = features.parser(__file__, __doc__, resnet_layer="res5-grid",
                             resize="the whole image, squeezed to a square")
    group = parser.add_argument_group("protocol")
    group.add_argument("--costs", type=cli.positive, nargs="+", default=COSTS,
                       help="costs of margin violations (C) to choose from")
    group.add_argument("--folds", type=cli.two_or_more, default=3,
                       help="folds of the cross-validation")
    group.add_argument("--low-shot", type=cli.pos_int, nargs="*", metavar="K",
                       default=[1, 2, 4, 8, 16, 32, 64, 96], help="images a class in low-shot sets")
    group.add_argument("--draws", type=cli.pos_int, default=5, help="low-shot sets of each size")
    group.add_argument("--vissl-labels", action="store_true",
                       help="train on difficult images as images without the class")
    group.add_argument("--output", metavar="FOLDER", help="cache of fits: existing ones are reused")
    group.add_argument("--jobs", type=cli.pos_int, help="parallel fits; default: share of cores")
    return features.parse(parser, argv)


class WholeImage(augment.CenterCrop):
    """Resize the shorter side to `resize` pixels, then squeeze the image to the view's size."""

    def apply(self, plane, _, size):
        plane = augment.shorter_side_to(self.resize, plane, self.interpolation)
        return plane.resize(size[::-1], augment.INTERPOLATION[self.interpolation])

    def __str__(self):
        return f"shorter side to {self.resize} px ({self.interpolation}), then to a square"


# ---------------------------------------------------------------------------------- precision, fits


def average_precision(targets, scores, points: int | None = None) -> float:
    """Compute the area under the interpolated precision-recall curve, as VOC does from 2010 on.

    Args:
        targets: (N,), above 0 where the class is present.
        scores: (N,), higher where it is more likely. Equal ones are one threshold.
        points: average the precision at so many recalls from 0 to 1 instead; VOC's 11 in 2007.

    Returns:
        In [0, 1]; NaN without a positive.
    """
    _, threshold = np.unique(-np.asarray(scores, dtype=np.float64), return_inverse=True)
    taken = np.bincount(threshold).cumsum()
    hits = np.bincount(threshold, np.asarray(targets) > 0).cumsum()
    if not hits.any():
        return math.nan
    precision = np.maximum.accumulate((hits / taken)[::-1])[::-1]
    if points:  # compared as whole numbers, which is exact
        reached = [((points - 1) * hits < i * hits[-1]).sum() for i in range(points)]
        return float(precision[reached].mean())
    return float((precision * np.diff(hits, prepend=0)).sum() / hits[-1])


def mean(values) -> float:
    """The mean of the numbers that are not NaN; NaN if there is none."""
    values = [value for value in values if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


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
        return [[math.nan] * 2] * len(held_out), 0
    svm = LinearSVC(C=cost, random_state=seed, **SVM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `main` counts them in one line
        svm.fit(features[rows], targets)
    precisions = []
    for rows, targets in held_out:  # rounded, so that equal images have equal scores
        scores = svm.decision_function(features[rows]).round(12) if len(rows) else []
        precisions.append([average_precision(targets, scores, points) for points in (None, 11)])
    return precisions, int(svm.n_iter_ >= SVM["max_iter"])


def cached_fit(folder: str, world: comm.World):
    """`fit`, which keeps its results in a folder and takes those that are there."""
    with comm.same_error_on_all_ranks(writing=folder):
        # A damaged file fails its compression's checksum; joblib logs a traceback and fits again.
        memory = joblib.Memory(os.path.join(folder, "fits"), compress=True, verbose=0)
        cached = memory.cache(fit, ignore=["features", "task", "seed"])
        cached.warn = lambda _: print(f"warning: a damaged fit in {folder} is done again")
        if world.is_main:  # a first call sets the folder up, before others use it
            try:
                cached("", None, ([], np.zeros(0), [], 1.0), 0)
            except ValueError as error:  # joblib's copy of the function's code is damaged
                raise comm.RunError(f"{memory.location} is damaged; delete that folder") from error
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
        seed, local = self.args.seed, tasks[self.world.part(len(tasks))]
        jobs = self.args.jobs or joblib.cpu_count() // comm.env_int("LOCAL_WORLD_SIZE", 1)
        work = sum(len(rows) for rows, *_ in local) * features.shape[1]
        jobs = max(1, min(jobs, len(local))) if work >= PARALLEL_FROM else 1
        with comm.same_error_on_all_ranks():
            done = joblib.Parallel(n_jobs=jobs)(joblib.delayed(self.fit)(
                joblib.hash([fingerprint, task, seed]), features, task, seed) for task in local)
        results = sum(comm.all_gather_objects(done), [])
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


def choose_costs(run, train, costs: list[float], num_folds: int) -> tuple[list[float], float]:
    """Each class's best cost in a cross-validation; the mean over classes of its precision.

    Args:
        run: `Fits.run` of some features. train: rows and targets of each class.
    """
    tasks, counts = [], []
    for rows, targets in train:
        folds = min(num_folds, max((targets > 0).sum(), (targets < 0).sum()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds
            splits = list(StratifiedKFold(folds).split(targets, targets)) if folds > 1 else []
        tasks += [(rows[kept], targets[kept], [(rows[out], targets[out])], cost)
                  for cost in costs for kept, out in splits]
        counts.append(len(splits))
    fold_ap = (on_fold[0][0] for on_fold in run(tasks))
    values = [[mean(islice(fold_ap, count)) for _ in costs] for count in counts]
    fallback_cost = best_cost(costs, [mean(v) for v in zip(*values, strict=True)]) or costs[0]
    return ([best_cost(costs, v) or fallback_cost for v in values],
            mean(max(v) for v in values if not any(map(math.isnan, v))))


def low_shot(run, k: int, labels, test, costs: list[float], draws: int, seed: int) -> dict:
    """Mean and deviation over draws: at the cost chosen on undrawn images, and at the oracle's."""
    tasks = []
    for draw, (c, column) in product(range(draws), enumerate(labels.T)):
        drawn = low_shot_rows(column, k, len(test), seed, draw, c)
        rest = np.setdiff1d(np.flatnonzero(column >= 0), drawn)
        held_out = [(rest, column[rest]), test[c]]
        tasks += [(drawn, 2 * column[drawn] - 1, held_out, cost) for cost in costs]
    shape = draws, len(test), len(costs), 2, 2  # the last two: held-out images, measures
    by_draw = np.apply_along_axis(mean, 1, np.reshape(run(tasks), shape))  # mean over classes
    by_cost = np.apply_along_axis(mean, 0, by_draw)

    middle = 1.0 if 1.0 in costs else costs[len(costs) // 2]  # where no image is left to choose on
    chosen = best_cost(costs, by_cost[:, 0, 0].tolist()) or middle
    found, oracle = {}, best_cost(costs, by_cost[:, 1, 0].tolist()) or chosen
    for name, cost in (("", chosen), ("oracle_", oracle)):
        aps = by_draw[:, costs.index(cost), 1, 0]
        found |= {f"{name}map": mean(aps), f"{name}std": float(np.std(aps)), f"{name}cost": cost}
    return found | {"map_11point": by_cost[costs.index(chosen), 1, 1].item()}


def evaluate(found: features.Features, source: features.Source, fits: Fits) -> dict:
    """Precisions of one backbone's features."""
    args, names = source.args, getattr(source.train, "classes", None)
    splits, n = (found.train, found.test), len(found.train.labels)
    labels = np.concatenate([split.labels for split in splits])
    if labels.ndim == 1:  # class numbers
        labels = (labels[:, None] == np.arange(1 + labels.max())).astype(int)
    if labels.min() < 0:
        source.say(f"difficult images {'absent' if args.vissl_labels else 'ignored'}")
    names = names or [str(number) for number in range(labels.shape[1])]
    train = [labelled_rows(column[:n], args.vissl_labels) for column in labels.T]
    test = [labelled_rows(np.append([-1] * n, column[n:]), False) for column in labels.T]
    costs, layers = sorted(set(args.costs)), []
    if not any(len(set(targets.tolist())) == 2 and (tested > 0).any()
               for (_, targets), (_, tested) in zip(train, test, strict=True)):
        raise comm.RunError(f"{found.checkpoint}: no class has training images with and without it "
                            "and test images with it; nothing can be measured")

    def run_on(layer):
        """`Fits.run` on the layer's rows divided by their length."""
        rows = np.concatenate([split.layers[layer].numpy() for split in splits])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5  # VISSL's, for a length of 0
        return partial(fits.run, rows, joblib.hash([rows, SVM, VERSION]))

    for layer in found.train.layers:
        run = run_on(layer)
        # 2. Choose each class's cost on the training images
        chosen, validation_map = choose_costs(run, train, costs, args.folds)
        # 3. Train on all of them
        precisions = run([(*train[c], [test[c]], cost) for c, cost in enumerate(chosen)])
        test_ap, test_ap_11point = np.array(precisions)[:, 0].T.tolist()
        layers.append({
            "layer": layer, "map": mean(test_ap), "map_11point": mean(test_ap_11point),
            "validation_map": validation_map, "costs": dict(zip(names, chosen, strict=True)),
            "per_class": {name: ap for name, ap in zip(names, test_ap, strict=True) if ap == ap},
        })
    best = max(layers, key=lambda layer: np.nan_to_num(layer["validation_map"], nan=-1))

    if len(layers) > 1:
        source.say(f"{found.checkpoint}: {best['layer']} counts, best in the cross-validation")

    # 4. Low-shot, of the layer that counts
    run, few = run_on(best["layer"]), {}
    fewest = min(filter(None, (labels[:n] == 1).sum(0)), default=0)
    for k in args.low_shot:
        if fewest < k:
            source.say(f"low-shot {k}: left out, a class has {fewest} training images")
        else:
            few[str(k)] = low_shot(run, k, labels[:n], test, costs, args.draws, args.seed)
    return {"map": best["map"], "map_11point": best["map_11point"], "low_shot": few,
            "results": layers, "num_train": n, "num_test": len(labels) - n}


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = comm.setup(args.device, deterministic=True)  # the same bits find their cached fits
    comm.print_main("linear SVM of each class against the rest, unit-norm features; "
                    f"{len(args.costs)} costs, {args.folds} folds")
    fit_once, table = cached_fit(args.output, world) if args.output else fit, []
    for source in features.sources(args, world, interpolation="bilinear",
                                   crop=augment.CenterCrop if args.resize else WholeImage,
                                   several_classes=True):
        fits = Fits(fit_once, args, world)
        runs = [evaluate(source.features(backbone), source, fits)
                for backbone in source.backbones()]
        table.append({"checkpoint": source.name, **features.mean_of(runs)})
        if fits.stopped:
            comm.print_main(f"warning: {source.name}: {fits.stopped} SVMs, usually of high costs, "
                            f"not converged in the published limit of {SVM['max_iter']} passes")

    measures = {"mAP": "map", "11-point": "map_11point", "validation": "validation_map"}
    features.print_table(["checkpoint", *measures], [
        [f"{row['checkpoint']} {r['layer']}", *(f"{r[name]:.3f}" for name in measures.values())]
        for row in table for r in row["results"]])
    features.print_table(
        ["low-shot", "mAP, chosen without the test images", "oracle, as in the literature"],
        [[f"{row['checkpoint']}, {k} a class",
          *(f"{few[of + 'map']:.3f} ±{few[of + 'std']:.3f} (cost {few[of + 'cost']:g})"
            for of in ("", "oracle_"))] for row in table for k, few in row["low_shot"].items()])
    features.print_json({"eval": "svm", **table[-1], "checkpoints": table})


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
