"""Labelled images: a training and a test split, parts of the classes, and the mean over them."""

import argparse
import itertools
import os

import numpy as np
import torch
from torch import Tensor

from common import cli, distributed as comm, rng
from common.distributed import RunError
from common.images import FileImages, NoSplit, open_images, some
from common.labelled_sets import MEAN_PER_CLASS, NOTES, class_members, of_each_class
from common.log import Diverged

# -------------------------------------------------------------------------------------- both splits


def open_splits(data: str, channels: int, *, test_data: str | None = None,
                limit_per_class: int | None = None, several_classes: bool = False,
                **options) -> list:
    """Open the labelled images to train and to test on.

    Args:
        data: a source with both splits (`images.open_images`); with `test_data` it may be all of
            the training images: a folder of class folders or a list `path label`.
        test_data: a folder or list that is tested on instead. Its class folders are those of the
            same name among the training images (of a list: named by their numbers), its labels
            the same numbers.
        limit_per_class: number of evenly spaced training images of every class, if not all.
        several_classes: whether labels (N, C) are taken as well.
        options: of `open_images`; `limit` is of each split.

    Raises:
        NoSplit: there are no labels, or several of an image.
        RunError: a source cannot be opened; a class is unknown, or without a training image.
    """
    train = open_images(data, "train", channels, whole=test_data is not None, **options)
    check_labels(f"--data {data}", train, several_classes and not test_data)
    if test_data is None:
        test = open_images(data, "test", channels, **options)
        check_labels(f"--data {data}", test, several_classes)
    else:
        test = open_test(test_data, train, channels, **options)
    if limit_per_class:
        train = train.subset(rows_per_class(train, limit_per_class))
    return [train, test]


def open_test(path: str, train, channels: int, flag: str = "--test-data", **options):
    """Open images to test on, whose classes are some of the training images'.

    A class folder is found by its name, or where no class is named by a number, also by the
    class's place in the order of the names: as ImageNetV2's folders are, from 0 to 999.

    Raises:
        RunError: there is no such folder or list, it has no labels, or a class is not among those
            that have a training image.
    """
    if not os.path.exists(path):
        raise RunError(f"{flag} {path}: no such folder or list")
    names = train.class_names or []
    numbers = {name: label for label, name in enumerate(names)}
    if not any(map(str.isdecimal, names)):
        numbers |= {str(label): label for label in train.present.tolist()}
    try:
        test = open_images(path, "test", channels, whole=True, classes=numbers, **options)
    except RunError as error:
        told = str(error).replace(f"--data {path}", f"{flag} {path}")
        raise type(error)(told) from error
    check_labels(f"{flag} {path}", test, False)
    unseen = np.setdiff1d(test.present, train.present)
    if len(unseen):
        told = [names[label] if label < len(names) else str(label) for label in unseen]
        raise RunError(f"{flag} {path}: no training image of {some(told)}")
    if shared := shared_files(train, test):
        comm.print_main(f"warning: {len(shared)} of the {len(test)} test images are training "
                        f"images too: {some(shared)}")
    return test


def open_unlabelled(data: str, channels: int, *, limit_per_class=None, **options) -> list:
    """Open the images of pre-training, with their labels if they have some, and the test split.

    Args:
        options: of `open_splits`. The test split is None where the images have no such splits.
    """
    sources = {name: value for name, value in options.items()
               if name not in ("test_data", "several_classes")}
    images = open_images(data, "pretrain", channels, **sources)
    try:
        train, test = open_splits(data, channels, **options)
    except NoSplit:
        if options.get("test_data"):
            raise
        return [images, None]
    return [train if train.identity() == images.identity() else images, test]


def check_labels(source: str, images, several_classes: bool) -> None:
    """Stop at images without labels, or with several where one is wanted."""
    if images.labels is None:
        raise NoSplit(f"{source}: no class folders, so no labels")
    if images.labels.ndim > 1 and not several_classes:
        raise NoSplit(f"{source}: its images show several classes; that is for eval_svm.py, "
                      "without --test-data")
    if images.labels.ndim == 1 and images.labels.min() < 0:
        raise RunError(f"{source}: label {images.labels.min()}; the least is 0")


def shared_files(train, test) -> set[str]:
    """Files that are among both images."""
    if not (isinstance(train, FileImages) and isinstance(test, FileImages)):
        return set()
    tested, trained = ({os.path.abspath(images.name(i)) for i in range(len(images))}
                       for images in (test, train))
    return tested & trained


def rows_per_class(images, most: int) -> np.ndarray:
    """Rising rows of so many images of every class, or of all that a class has, which is told."""
    if images.labels.ndim > 1:
        raise RunError(f"--limit-per-class {most}: the images show several classes")
    names = images.class_names or list(map(str, range(images.labels.max() + 1)))
    counts = np.bincount(images.labels, minlength=len(names))
    if images.class_names is not None and not counts.all():
        empty = [names[label] for label in np.flatnonzero(counts == 0)]
        raise RunError(f"--limit-per-class {most}: no training image of {some(empty)}")
    if few := [names[label] for label in np.flatnonzero((counts > 0) & (counts < most))]:
        comm.print_main(f"warning: --limit-per-class {most}: {some(few)} have fewer")
    return of_each_class(images.labels, most)


def described(data: str, args, train, test) -> str:
    """What the images of an evaluation are, in words."""
    data = cli.as_given(data)
    few = f" ({args.limit_per_class} a class)" if args.limit_per_class else ""
    where = f" (of {args.test_data})" if args.test_data else ""
    notes = [NOTES.get(data), "its usual number is the mean per class" * (data in MEAN_PER_CLASS)]
    notes = "".join(f" ({note})" for note in notes if note)
    tested = f" and {len(test)} test images{where}" if test is not None else " images"
    return f"{data}{notes}: {len(train)} training{few}{tested}"


# ------------------------------------------------------------------ images to train a classifier on


def image_flags(group) -> None:
    """What `labelled_images` opens, beside where the images come from."""
    part = group.add_mutually_exclusive_group()
    part.add_argument("--train-fraction", type=cli.share, metavar="SHARE",
                      help="class-balanced fraction of the training images")
    part.add_argument("--train-images", type=cli.pos_int, metavar="N",
                      help="number of training images, class-balanced")
    part.add_argument("--subset-list", metavar="FILE", help="text file that names those to take")
    cli.test_flags(group)
    group.add_argument("--labels", metavar="FILE", help=".npy of other classes to train on")


def sweep_flags(group) -> None:
    """The rates that `sweep` chooses from."""
    group.add_argument("--sweep", type=cli.positive, nargs="+", metavar="LR",
                       help="rates to choose from on a tenth of the training images")
    group.add_argument("--sweep-head", type=cli.positive, nargs="+", metavar="FACTOR",
                       help="the linear layer's rates to choose from, as multiples")


def check_flags(parser: cli.Parser, args: argparse.Namespace, argv) -> None:
    """Refuse flags of these two that do not go together."""
    if args.limit_per_class and args.limit:
        parser.error(f"--limit {args.limit} and --limit-per-class {args.limit_per_class}: give one")
    if args.labels and (args.test_data or args.limit_per_class):
        parser.error(f"--labels {args.labels} goes with no --test-data and no --limit-per-class")
    if args.sweep_head and not args.sweep:
        parser.error("--sweep-head goes with --sweep")
    for flag, other in (("--lr", "--sweep"), ("--head-lr", "--sweep-head")):
        if args.sweep and (value := cli.peek(argv, flag, str)):
            parser.error(f"{flag} {value} goes with no --sweep; give {other} what to choose from")


def labelled_images(args) -> tuple:
    """Open the images to train on and those to test on, with labels from 0 to C - 1; and C.

    What is trained on, `labels`, `subset_list`, `train_images` and `train_fraction` of `args` say.
    With `labels`, which no test image has, the test images are those trained on.

    Raises:
        RunError: no labels, or such as do not fit; a class without a training image.
    """
    if args.labels:
        train = test = open_images(args.data, "pretrain", args.in_chans, **cli.sources(args))
    else:
        train, test = open_splits(args.data, args.in_chans, test_data=args.test_data,
                                  limit_per_class=args.limit_per_class, **cli.sources(args))
    with comm.same_error_on_all_ranks():
        if args.labels:
            labels = read_labels(args.labels, len(train))
            train = train.subset(np.flatnonzero(labels >= 0))
            train.labels = np.unique(labels[labels >= 0], return_inverse=True)[1]
            comm.print_main(f"{args.labels}: {int(train.labels.max(initial=-1)) + 1} classes of "
                           f"{len(train)} of {len(labels)} images")
        if args.subset_list:
            train = train.subset(listed(args.subset_list, train))
        elif args.train_images:
            train = train.subset(balanced(train.labels, args.train_images, args.seed))
        elif args.train_fraction:
            train = train.subset(class_balanced(train.labels, args.train_fraction, args.seed))
        test = train if args.labels else test
        return train, test, check_classes(train.labels, test.labels)


def check_classes(train: np.ndarray, test: np.ndarray) -> int:
    """The number of classes, of which each must have a training image, and there be two."""
    num_classes = int(max(train.max(initial=-1), test.max(initial=-1))) + 1
    missing = sorted(set(range(num_classes)) - set(train.tolist()))
    if missing or num_classes < 2:
        what = f"class {missing[0]} has no training image" if missing else (
            f"{num_classes} class, and there must be two")
        raise RunError(f"{what} ({len(train)} images, {num_classes} classes); take more of them")
    return num_classes


def class_balanced(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Rising rows of a fraction of the images, class-balanced, at least one image of every class.

    A smaller fraction is part of a larger one.
    """
    if fraction == 1:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    members = [rng.permutation(rows) for rows in class_members(labels)]
    order = rng.permutation(len(members))  # who gets one of what does not divide
    rounds = range(max(map(len, members)))
    taken = [members[c][i] for i in rounds for c in order if i < len(members[c])]
    return np.sort(np.array(taken[: max(round(fraction * len(labels)), len(members))]))


def balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rising rows of `count` images: count // C of each class, one more of the first count mod C.

    A smaller count is a part of a larger one. VISSL's low-shot sets have this law.

    Raises:
        RunError: there are not as many images of a class.
    """
    members, taken = class_members(labels), []
    for place, rows in enumerate(members):
        label = int(labels[rows[0]])
        wanted = count // len(members) + (place < count % len(members))
        if not 0 < wanted <= len(rows):
            raise RunError(f"--train-images {count}: {wanted} of class {label}, which has "
                           f"{len(rows)} images; give another number")
        order = rng.philox(seed, rng.SUBSET, label).permutation(len(rows))
        taken.append(rows[order[:wanted]])
    return np.sort(np.concatenate(taken))


def listed(path: str, images) -> np.ndarray:
    """Rising rows of the image files that a text file names, one a line: the name alone, or parts.

    Raises:
        RunError: images that are not files; a name that no file has, or several; one named twice.
    """
    if not images.reads_files:
        raise RunError(f"--subset-list {path}: the images are not files")
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        names = [line.strip() for line in file if line.strip()]
    parts = max((name.count("/") for name in names), default=0) + 1
    rows, twice = {}, set()
    for row in range(len(images)):
        pieces = images.name(row).split("/")
        for length in range(1, parts + 1):
            name = "/".join(pieces[-length:])
            twice |= {name} & rows.keys()
            rows[name] = row
    for wrong, what in ((set(names) - rows.keys(), "not among the training images"),
                        (twice & set(names), "the name of several training images")):
        if wrong or not names:
            raise RunError(f"--subset-list {path}: {len(wrong)} of {len(names)} names are "
                           f"{what}{f', such as {min(wrong)}' if wrong else ''}")
    if len({rows[name] for name in names}) < len(names):
        raise RunError(f"--subset-list {path}: it names an image twice")
    return np.sort([rows[name] for name in names])


def read_labels(path: str, count: int) -> np.ndarray:
    """Whole numbers (count,) of a `.npy`; of several rows, as of DeepCluster's heads, the first.

    Raises:
        RunError: no such file, or another one.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise RunError(f"--labels {path}: {error}; save an array with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or (
            array.ndim not in (1, 2) or array.shape[-1] != count or not array.size):
        found = f"{array.dtype} of shape {array.shape}" if hasattr(array, "dtype") else "a .npz"
        raise RunError(f"--labels {path}: {found}; wanted a whole number for each of the {count} "
                       "images of --data (with the same --limit as the labels were made with)")
    return (array[0] if array.ndim == 2 else array).astype(np.int64)


# ------------------------------------------------------------------------------------------- rates


def sweep(args: argparse.Namespace, images, accuracy) -> list[dict] | None:
    """Rates to choose from, best first on a tenth of the training images that is left out for it.

    Every pair of `args.sweep` and `args.sweep_head` is tried in a folder of its own, and what is
    finished there is only tested again. A rate at which the training diverges is left out.

    Args:
        accuracy: of (args, kept, held), on held images of a network trained on the kept ones with
            the rates of these `args`; None if the training was told to stop.

    Returns:
        "lr", "head_lr" and "validation" of each; None if one was told to stop.

    Raises:
        RunError: no rate trains to its end; a class without an image that is kept.
    """
    left_out = class_balanced(images.labels, 0.1, args.seed)
    kept = images.subset(np.setdiff1d(np.arange(len(images)), left_out))
    held, results = images.subset(left_out), []
    check_classes(kept.labels, held.labels)
    for lr, factor in itertools.product(
            args.sweep, args.sweep_head or [(args.head_lr or args.lr) / args.lr]):
        tried = dict(lr=lr, head_lr=lr * factor)
        options = dict(output=os.path.join(args.output, f"sweep-{lr:g}-{factor:g}"),
                       keep_every=None, probe_every=None, profile=None)
        try:
            found = accuracy(argparse.Namespace(**vars(args) | tried | options), kept, held)
        except Diverged as error:
            comm.print_main(f"sweep: lr {lr:g}, head {lr * factor:g}: {error}")
            continue
        if found is None:
            return None
        results.append(tried | {"validation": found})
        comm.print_main(f"sweep: lr {lr:g}, head {lr * factor:g}: validation {found:.3f}")
    if not results:
        raise RunError(f"--sweep {' '.join(map(str, args.sweep))}: no rate trains to its end")
    return sorted(results, key=lambda result: -result["validation"])


# ----------------------------------------------------------------------------------- mean per class


def mean_per_class(right: Tensor, labels: np.ndarray) -> float:
    """The mean of the classes' accuracies, of those that have an image.

    Args:
        right: (C,), how many images of each class are correct. labels: (N,), of all images.
    """
    counts = np.bincount(labels, minlength=len(right))
    return float((right.cpu().numpy()[counts > 0] / counts[counts > 0]).mean())


def absent(present: np.ndarray, num_classes: int) -> Tensor:
    """Whether a class (num_classes,) is none of these: of a test set with some classes alone it is
    not to be predicted.

    Reference: VISSL's evaluation out of distribution (ImageNet-A, -R, -Sketch, V2).
    """
    return torch.from_numpy(~np.isin(np.arange(num_classes), present))


def mean_per_class_is_usual(protocol: str) -> bool:
    """Whether the number usually told of a protocol's images is the mean of their classes'."""
    return protocol.split(" ")[0].rstrip(":") in MEAN_PER_CLASS
