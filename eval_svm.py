"""Linear support vector machines on frozen features: VOC07 classification, full and low-shot.

1. Take pooled layers of the whole images and divide each by its length. An image is resized twice,
   its shorter side to 256 px (where `--image-size` is 224), then to a square.
2. For every class and cost, train a linear SVM, class against rest, on two thirds of the training
   images and measure its average precision on the last third, three times.
3. Train on all training images with each class's best cost; the mean over classes of the average
   precision on the test images is the result (mAP).
4. Low-shot: the same with k images of every class, drawn five times.

Three things differ from VISSL: its low-shot images are resized once, straight to the square; its
costs are chosen by scikit-learn's average precision, which does not interpolate, ours by the one
that is reported; and of equal scores its sort decides, here they count together.

Nothing is chosen on the test images. The layer that counts is the one with the best precision in
step 2. A low-shot cost is the best one on the training images that were not drawn. The literature
takes the cost that is best on the test images: that number is reported too, as `oracle`.

`--data` is a VOC folder (Annotations, ImageSets/Main, JPEGImages), where an image may show several
classes, or whatever the other evaluations take. An image in which a class is only marked as
difficult is neither for nor against that class, in training and in the test; the public code
(VISSL) trains on it as one without the class, which `--vissl-labels` repeats.

With `--output`, every fit is noted there, and the same command after an interruption goes on.

Letters: N images, C classes, D feature size, k images of a class.

Reference: Goyal et al., arXiv 1905.01235, section 4.1 and appendix B; numbers as in VISSL.

    python eval_svm.py --checkpoint runs/simclr-digits-resnet_tiny --costs 0.1 1 10 --low-shot 1 8
    python eval_svm.py --checkpoint runs/simclr --data VOCdevkit/VOC2007 --output runs/simclr-voc07
"""

import contextlib
import glob
import json
import math
import os
import sys
import warnings
import zlib
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np

from common import augment, checkpoint, cli, data, dist, features

# What the VOC07 benchmark of VISSL sets, beside the costs and the shots.
SVM = dict(
    penalty="l2", loss="squared_hinge", dual=True, tol=1e-4, max_iter=2000, intercept_scaling=1.0,
    class_weight={1: 2, -1: 1},
)
COSTS = [0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0]
LOW_SHOT = [1, 2, 4, 8, 16, 32, 64, 96]
NOTES = 2  # raised when a noted fit means something else than before
MUCH_WORK = 2**26  # numbers that fits go through, from which on more processes are worth starting


def parse_args(argv=None):
    parser = features.parser(
        __file__, __doc__, layers="res5-grid or cls",
        resize="the whole image, squeezed to a square",
    )
    group = parser.add_argument_group("protocol")
    group.add_argument("--costs", type=cli.positive, nargs="+", default=COSTS,
                       help="of a training image on the wrong side, to choose from")
    group.add_argument("--folds", type=cli.count, default=3, help="of the cross-validation")
    group.add_argument("--low-shot", type=cli.count, nargs="*", default=LOW_SHOT, metavar="K",
                       help="images of every class in the small training sets")
    group.add_argument("--draws", type=cli.count, default=5, help="small training sets of each k")
    group.add_argument("--vissl-labels", action="store_true",
                       help="train on difficult images as if the class were not there")
    group = parser.add_argument_group("fits")
    group.add_argument("--output", metavar="FOLDER",
                       help="note every fit here and do not repeat those noted")
    group.add_argument("--jobs", type=cli.count, metavar="N",
                       help="processes that fit; default: the share of the cores")
    args = features.parse(parser, argv)
    if args.folds < 2:
        parser.error(f"--folds {args.folds}: a cross-validation has at least 2")
    return args


# ------------------------------------------------------------------------------------------- images


def is_voc(folder: str) -> bool:
    return os.path.isdir(os.path.join(folder, "Annotations"))


def open_voc(root: str, split: str, channels: int) -> tuple[data.FileImages, list[str]]:
    """Open the training (`trainval`) or test split of a VOC folder as it is distributed.

    Returns:
        The images, with labels (N, C): 1 where a class is present, -1 where all of its objects are
        marked as difficult, 0 where it is absent; and the names of the classes, which are those in
        the annotations of trainval.

    Raises:
        RunError: a file is missing or is no annotation.
    """
    names, found = [], []
    for part in ("trainval", "test"):
        path = os.path.join(root, "ImageSets", "Main", f"{part}.txt")
        if not os.path.isfile(path):
            raise dist.RunError(f"--data {root}: no {path}")
        with open(path, encoding="utf-8") as file:
            ids = [line.split()[0] for line in file if line.strip()]
        if part == "trainval" or split == "test":
            found = [annotated(os.path.join(root, "Annotations", f"{i}.xml")) for i in ids]
        if part == "trainval":
            names = sorted({name for objects in found for name in objects})
        if part == "trainval" and split == "train":
            break
    number = {name: column for column, name in enumerate(names)}
    labels = np.zeros((len(ids), len(names)), dtype=np.int64)
    for row, objects in enumerate(found):
        for name, difficult in objects.items():
            if name in number:
                labels[row, number[name]] = -1 if difficult else 1
    folder = os.path.join(root, "JPEGImages")
    return data.FileImages([os.path.join(folder, f"{i}.jpg") for i in ids], labels, channels,
                           folder), names


def annotated(path: str) -> dict[str, bool]:
    """The classes of the objects in an annotation; True if all objects of one are difficult."""
    try:
        tree = ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        raise dist.RunError(f"{path} is no annotation: {error}") from error
    classes = {}
    for thing in tree.iter("object"):
        name = thing.findtext("name", "").strip()
        difficult = thing.findtext("difficult", "0").strip() == "1"
        classes[name] = classes.get(name, True) and difficult
    return classes


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


def precision_and_recall(targets, scores) -> tuple[np.ndarray, np.ndarray]:
    """Precision, made to never rise with recall, and hits down to each score, the best one first.

    Images of equal scores enter together: their order tells nothing.
    """
    scores = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], len(scores) > 0))  # of each score
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
    precision, hits = precision_and_recall(targets, scores)
    if not len(hits) or hits[-1] == 0:
        return math.nan
    return float((precision * np.diff(hits, prepend=0)).sum() / hits[-1])


def average_precision_11_point(targets, scores) -> float:
    """Average the interpolated precision at recalls 0, 0.1, ... 1, as VOC did in 2007.

    A recall of 3 in 10 reaches the threshold 0.3: compared in whole numbers.
    """
    precision, hits = precision_and_recall(targets, scores)
    if not len(hits) or hits[-1] == 0:
        return math.nan
    reached = [int((10 * hits < i * hits[-1]).sum()) for i in range(11)]
    return float(precision[reached].mean())


def mean(values) -> float:
    """The mean of the numbers that are not NaN; NaN if there is none."""
    values = [value for value in values if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


# --------------------------------------------------------------------------------------------- fits


def decide(rows, targets, others, cost: float, seed: int) -> tuple[np.ndarray | None, int]:
    """Train one SVM and score other rows with it; None if all targets are alike.

    Args:
        rows: (N, D). targets: (N,) of 1 and -1. others: (M, D).

    Returns:
        Scores (M,), and 1 if the training stopped at `max_iter` passes before it had converged.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    if abs(targets.sum()) == len(targets):
        return None, 0
    svm = LinearSVC(C=cost, random_state=seed, **SVM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `Fits` tells of all in one line
        scores = svm.fit(rows, targets).decision_function(others)
    # Equal images have equal scores, up to rounding.
    return scores.round(12), int(svm.n_iter_ >= SVM["max_iter"])


def both_precisions(targets, scores) -> list[float]:
    if scores is None:
        return [math.nan, math.nan]
    return [average_precision(targets, scores), average_precision_11_point(targets, scores)]


def cross_validated(train, use, targets, cost, folds, seed) -> list[float]:
    """Mean average precision over the folds of the training rows `use`; how many SVMs stopped."""
    from sklearn.model_selection import StratifiedKFold

    found, stopped = [], 0
    folds = min(folds, int(max((targets > 0).sum(), (targets < 0).sum())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds
        splits = list(StratifiedKFold(folds).split(use, targets)) if folds > 1 else ()
    for own, other in splits:
        scores, early = decide(train[use[own]], targets[own], train[use[other]], cost, seed)
        found.append(math.nan if scores is None else average_precision(targets[other], scores))
        stopped += early
    return [mean(found), stopped]


def fitted(train, use, targets, test, held, held_targets, cost, seed) -> list[float]:
    """Both average precisions on the test rows `held`, trained on the training rows `use`."""
    scores, stopped = decide(train[use], targets, test[held], cost, seed)
    return [*both_precisions(held_targets, scores), stopped]


def low_shot_fitted(train, own, targets, rest, rest_targets, test, held, held_targets, cost, seed):
    """Average precision on training rows that were not drawn, then both on the test rows."""
    others = np.concatenate([train[rest], test[held]])
    scores, stopped = decide(train[own], targets, others, cost, seed)
    if scores is None:
        return [math.nan] * 3 + [stopped]
    return [average_precision(rest_targets, scores[: len(rest)]),
            *both_precisions(held_targets, scores[len(rest) :]), stopped]


def noted(path: str | None, key: str, function, *arguments) -> tuple[str, list[float]]:
    """Call a function and append its key and result to a file, in one write."""
    value = function(*arguments)
    if path is not None:
        with open(path, "a") as file:
            file.write(json.dumps([key, value]) + "\n")
    return key, value


class Fits:
    """Carries out fits on all processes, and remembers in a folder those that are done.

    The last number of a fit's result says how many of its SVMs stopped before they had converged.

    Args:
        folder: where to note them, or None.
        jobs: processes of each process, or None for its share of the cores.
    """

    def __init__(self, folder: str | None, jobs: int | None, world: dist.World):
        self.world, self.path, self.lock, self.known = world, None, None, {}
        self.jobs, self.stopped = jobs, 0
        if folder is None:
            return
        with dist.together(writing=folder):
            os.makedirs(folder, exist_ok=True)
            self.path = os.path.join(folder, f"fits-{world.rank}.jsonl")
            if world.is_main:
                self.lock = checkpoint.hold(os.path.join(folder, ".lock"))
                for path in glob.glob(os.path.join(glob.escape(folder), "fits-*.jsonl")):
                    self.known.update(read_fits(path))
        self.known = dist.all_gather_objects(self.known)[0]
        with dist.together(writing=folder), open(self.path, "a") as file:
            file.write("\n")  # behind a line that a kill may have torn
        if self.known:
            dist.say(f"{folder}: {len(self.known)} fits are done already")

    def run(self, tasks: dict[str, tuple], work: int) -> dict[str, list[float]]:
        """Results by key. A task is a function and its arguments; `work`: numbers it goes through.

        Equal on every process.
        """
        from joblib import Parallel, cpu_count, delayed

        missing = [key for key in tasks if key not in self.known]
        own = missing[self.world.rank :: self.world.size]
        share = cpu_count() // dist.told("LOCAL_WORLD_SIZE", 1)
        jobs = (self.jobs or max(1, share)) if work * len(own) >= MUCH_WORK else 1
        with dist.together(writing=self.path):
            done = dict(Parallel(n_jobs=min(jobs, max(1, len(own))))(
                delayed(noted)(self.path, key, *tasks[key]) for key in own
            ))
        for part in dist.all_gather_objects(done):
            self.known.update(part)
        results = {key: self.known[key] for key in tasks}
        self.stopped += sum(result[-1] for result in results.values())
        return results

    def tell_of_stopped(self, name: str):
        """Warn of the SVMs that had not converged since the last time."""
        if self.stopped:
            dist.say(f"warning: {name}: {self.stopped} SVMs, as a rule of high costs, stopped at "
                     f"the published limit of {SVM['max_iter']} passes before they had converged")
        self.stopped = 0

    def close(self):
        if self.lock:
            self.lock.close()


def read_fits(path: str) -> dict[str, list[float]]:
    """The keys and results in a file; a torn last line is left out."""
    found = {}
    with open(path) as file:
        for line in file:
            with contextlib.suppress(ValueError):
                key, value = json.loads(line)
                found[key] = value
    return found


# ----------------------------------------------------------------------------------------- protocol


def one_against_rest(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels (N, C) of 1 present, 0 absent and -1 difficult from class numbers (N,), or as is."""
    return labels if labels.ndim == 2 else (labels[:, None] == np.arange(num_classes)).astype(int)


def usable(labels: np.ndarray, difficult_is_absent: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one class's labels (N,) that count, and their targets 1 or -1."""
    rows = np.arange(len(labels)) if difficult_is_absent else np.flatnonzero(labels >= 0)
    return rows, np.where(labels[rows] == 1, 1, -1)


def low_shot_rows(labels: np.ndarray, k: int, num_classes: int, *seed: int) -> np.ndarray:
    """Draw k rows with a class and (num_classes - 1) k without it, or all if there are fewer."""
    rng = np.random.default_rng([k, *seed])
    positives, negatives = (rng.permutation(np.flatnonzero(labels == x)) for x in (1, 0))
    return np.sort(np.concatenate([positives[:k], negatives[: (num_classes - 1) * k]]))


def best(costs: list[float], values: list[float]) -> float | None:
    """The cost with the highest value, the lowest of equal ones; None if all values are NaN."""
    order = sorted((-value, cost) for cost, value in zip(costs, values, strict=True)
                   if not math.isnan(value))
    return order[0][1] if order else None


def evaluate(found: features.Features, args, fits: Fits, names: list[str]) -> dict:
    """Precisions of one backbone's features; the fits are shared among all processes."""
    num_classes = len(names)
    if found.train.labels.ndim == 1:
        num_classes = int(max(found.train.labels.max(), found.test.labels.max())) + 1
    elif not names:
        num_classes = found.train.labels.shape[1]
    names = names or [str(number) for number in range(num_classes)]
    train_labels = one_against_rest(found.train.labels, num_classes)
    test_labels = one_against_rest(found.test.labels, num_classes)
    costs = sorted(set(args.costs))

    layers = []
    for layer in found.train.layers:
        train, test = (unit(split.layers[layer].numpy()) for split in (found.train, found.test))
        mark = crc(train, test, train_labels, test_labels, args.vissl_labels, args.seed, SVM)
        numbers = train.size * (args.folds - 1)

        def named(*words, mark=mark):
            return " ".join(map(str, [mark, *words]))

        # 2. Choose each class's cost on the training images
        use = [usable(train_labels[:, c], args.vissl_labels) for c in range(num_classes)]
        tasks = {
            named("cv", args.folds, c, cost):
                (cross_validated, train, rows, targets, cost, args.folds, args.seed)
            for c, (rows, targets) in enumerate(use) for cost in costs
        }
        done = fits.run(tasks, numbers)
        tried = [[done[named("cv", args.folds, c, cost)][0] for cost in costs]
                 for c in range(num_classes)]
        usual = best(costs, [mean(column) for column in zip(*tried, strict=True)]) or costs[0]
        chosen = [best(costs, values) or usual for values in tried]

        # 3. Train on all of them
        held = [usable(test_labels[:, c], False) for c in range(num_classes)]
        tasks = {
            named("full", c, chosen[c]):
                (fitted, train, *use[c], test, *held[c], chosen[c], args.seed)
            for c in range(num_classes)
        }
        done = list(fits.run(tasks, numbers).values())
        layers.append({
            "layer": layer, "map": mean(ap for ap, _, _ in done),
            "map_11point": mean(ap for _, ap, _ in done),
            "validation_map": mean(max(v for v in values) for values in tried
                                   if not any(map(math.isnan, values))),
            "costs": dict(zip(names, chosen, strict=True)),
            "per_class": {name: ap for name, (ap, *_) in zip(names, done, strict=True)
                          if not math.isnan(ap)},
        })
    counted = [-1 if math.isnan(r["validation_map"]) else r["validation_map"] for r in layers]
    layer = layers[counted.index(max(counted))]

    # 4. Low-shot, of the layer that counts
    parts = (split.layers[layer["layer"]].numpy() for split in (found.train, found.test))
    train, test = (unit(rows) for rows in parts)
    mark = crc(train, test, train_labels, test_labels, args.seed, SVM)
    low_shot = {}
    for k in args.low_shot:
        fewest = min((n for n in (train_labels == 1).sum(0) if n), default=0)
        if fewest < k:
            dist.say(f"low-shot {k}: left out, for a class has {fewest} training images")
            continue
        low_shot[str(k)] = low_shot_results(
            k, train, train_labels, test, test_labels, costs, args.draws, args.seed, mark, fits)
    sizes = {"num_train": len(train), "num_test": len(test)}
    return {"map": layer["map"], "map_11point": layer["map_11point"], "low_shot": low_shot,
            "results": layers, **sizes}


def low_shot_results(k, train, train_labels, test, test_labels, costs, draws, seed, mark, fits):
    """Mean and deviation over draws: at the cost chosen on undrawn images, and at the oracle's."""
    num_classes = train_labels.shape[1]
    tasks, keys = {}, {}
    for draw in range(draws):
        for c in range(num_classes):
            labels = train_labels[:, c]
            own = low_shot_rows(labels, k, num_classes, seed, draw, c)
            rest = np.setdiff1d(np.flatnonzero(labels >= 0), own)
            rows, targets = usable(test_labels[:, c], False)
            for cost in costs:
                key = f"{mark} low-shot {k} {draw} {c} {cost}"
                keys[draw, c, cost] = key
                tasks[key] = (
                    low_shot_fitted, train, own, np.where(labels[own] == 1, 1, -1), rest,
                    labels[rest], test, rows, targets, cost, seed,
                )
    done = fits.run(tasks, (len(own) + len(rest) + len(test)) * train.shape[1])

    def means(cost, which):
        """Of every draw: the mean over the classes."""
        return [mean(done[keys[draw, c, cost]][which] for c in range(num_classes))
                for draw in range(draws)]

    chosen = best(costs, [mean(means(cost, 0)) for cost in costs])
    if chosen is None:  # no image is left to choose on
        chosen = 1.0 if 1.0 in costs else costs[len(costs) // 2]
    oracle = best(costs, [mean(means(cost, 1)) for cost in costs]) or chosen
    return {
        "map": mean(means(chosen, 1)), "std": float(np.std(means(chosen, 1))), "cost": chosen,
        "map_11point": mean(means(chosen, 2)), "oracle_map": mean(means(oracle, 1)),
        "oracle_std": float(np.std(means(oracle, 1))), "oracle_cost": oracle,
    }


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their length, with VISSL's 1e-5 against a length of 0."""
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def crc(*values) -> str:
    """A mark by which noted fits are found again: of arrays and settings."""
    total = NOTES
    for value in values:
        array = isinstance(value, np.ndarray)
        total = zlib.crc32(np.ascontiguousarray(value) if array else repr(value).encode(), total)
    return f"{total:08x}"


# --------------------------------------------------------------------------------------------- main


def main(args):
    # The same features again, bit for bit, find the fits that were noted.
    world = dist.setup(args.device, deterministic=True)
    names = []

    def open_images(source, split, channels, **options):
        if not is_voc(source):
            return data.open_images(source, split, channels, **options)
        with dist.together():
            images, names[:] = open_voc(source, split, channels)
        if args.limit is not None and args.limit < len(images):
            images = images.subset(np.arange(args.limit) * len(images) // args.limit)
        return images

    treated = "absent in training" if args.vissl_labels else "ignored"
    dist.say(f"linear SVM of each class against the rest, unit-norm features; cost of "
             f"{len(args.costs)} by {args.folds}-fold cross-validation; difficult: {treated}")
    fits, table = Fits(args.output, args.jobs, world), []
    try:
        for source in features.sources(args, world, interpolation="bilinear",
                                       crop=augment.CenterCrop if args.resize else WholeImage,
                                       open_images=open_images, resnet_layer="res5-grid"):
            runs = [evaluate(source.features(backbone), args, fits, names)
                    for backbone in source.backbones()]
            fits.tell_of_stopped(source.name)
            table.append({"checkpoint": source.name, **features.mean_of(runs)})
    finally:
        fits.close()

    if world.is_main:
        print_table(table)
        line = {"eval": "svm", **table[-1], "checkpoints": table}
        print(json.dumps(without_nan(line)), flush=True)


def without_nan(value):
    """The same with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def print_table(table: list[dict]) -> None:
    """Print the precisions of every checkpoint and layer, then those of few labels."""
    width = max(len("checkpoint"), *(len(f"{row['checkpoint']} {result['layer']}") + 2
                                     for row in table for result in row["results"]))
    print(f"{'checkpoint':<{width}}{'mAP':>8}{'11-point':>10}{'validation':>12}")
    for row in table:
        for r in row["results"]:
            counts = "*" if len(row["results"]) > 1 and r["map"] == row["map"] else ""
            title = f"{row['checkpoint']} {r['layer']}{counts}"
            print(f"{title:<{width}}{r['map']:>8.3f}{r['map_11point']:>10.3f}"
                  f"{r['validation_map']:>12.3f}")
    if any(len(row["results"]) > 1 for row in table):
        print("* the layer with the best precision in the cross-validation; it counts below")
    for row in table:
        for k, few in row["low_shot"].items():
            print(f"{row['checkpoint']}, {k} a class: mAP {few['map']:.3f} ±{few['std']:.3f} "
                  f"(cost {few['cost']:g}, chosen without the test images); oracle, as in the "
                  f"literature: {few['oracle_map']:.3f} ±{few['oracle_std']:.3f} "
                  f"(cost {few['oracle_cost']:g})")


if __name__ == "__main__":
    sys.exit(dist.launch(main, parse_args()))
