"""Images of one class each to train on: all, a class-balanced part, or with labels from a file."""

import numpy as np

from common import distributed as comm, features, rng
from common.distributed import RunError
from common.images import open_images


def labelled_images(args) -> tuple:
    """Open the images to train on and those to test on, with labels from 0 to C - 1; and C.

    What is trained on, `labels`, `subset_list`, `train_images` and `train_fraction` of `args` say.
    With `labels`, which no test image has, the test images are those trained on.

    Raises:
        RunError: no labels, or such as do not fit; a class without a training image.
    """
    options = dict(root=args.data_root, download=args.download, limit=args.limit)
    if args.labels:
        train = test = open_images(args.data, "pretrain", args.in_chans, **options)
    else:
        train, test = features.open_splits(args.data, args.in_chans, test_data=args.test_data,
                                           limit_per_class=args.limit_per_class, **options)
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
            train = train.subset(
                features.class_balanced(train.labels, args.train_fraction, args.seed))
        test = train if args.labels else test
        return train, test, check_classes(train.labels, test.labels)


def check_classes(train: np.ndarray, test: np.ndarray) -> int:
    """The number of classes, of which each must have a training image, and there be two."""
    num_classes = int(max(train.max(initial=-1), test.max(initial=-1))) + 1
    missing = sorted(set(range(num_classes)) - set(train.tolist()))
    if missing or num_classes < 2:
        what = f"class {missing[0]} has no training image" if missing else (
            f"{num_classes} class, and there must be two")
        raise RunError(f"{what} ({len(train)} images, {num_classes} classes); take more of "
                           "them, or other labels")
    return num_classes


def balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rising rows of `count` images: count // C of each class, one more of the first count mod C.

    A smaller count is a part of a larger one. VISSL's low-shot sets have this law.

    Raises:
        RunError: there are not as many images of a class.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    taken = []
    for place, (label, size) in enumerate(zip(classes, sizes, strict=True)):
        wanted = count // len(classes) + (place < count % len(classes))
        if not 0 < wanted <= size:
            raise RunError(f"--train-images {count}: {wanted} of class {label}, which has "
                           f"{size} images; give another number")
        order = rng.philox(seed, rng.SUBSET, int(label)).permutation(size)
        taken.append(np.flatnonzero(labels == label)[order[:wanted]])
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
        raise RunError(f"--labels {path}: {found}; wanted whole numbers, one for each of the "
                           f"{count} images of --data")
    return (array[0] if array.ndim == 2 else array).astype(np.int64)
