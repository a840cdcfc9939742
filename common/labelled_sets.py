"""Labelled data sets of torchvision that are image files: their splits, paths and labels."""

import os

import numpy as np
import torch
import torchvision

from common.distributed import RunError

# Sets of image files: torchvision's class; its splits to train on, validation images among them as
# in the tables of transfer, and to test on. None: it has no splits, see `divide`.
LABELLED = {
    "food101": ("Food101", ["train"], ["test"]),
    "flowers102": ("Flowers102", ["train", "val"], ["test"]),
    "pets": ("OxfordIIITPet", ["trainval"], ["test"]),
    "dtd": ("DTD", ["train", "val"], ["test"]),
    "aircraft": ("FGVCAircraft", ["trainval"], ["test"]),
    "cars": ("StanfordCars", ["train"], ["test"]),
    "sun397": ("SUN397", None, None),
    "caltech101": ("Caltech101", None, None),
    "eurosat": ("EuroSAT", None, None),
    "gtsrb": ("GTSRB", ["train"], ["test"]),
    "pcam": ("PCAM", ["train", "val"], ["test"]),
    "clevr-count": ("CLEVRClassification", ["train"], ["val"]),
    "country211": ("Country211", ["train", "valid"], ["test"]),
    "sst2": ("RenderedSST2", ["train", "val"], ["test"]),
}
# Sets whose usual number is the mean of the classes' accuracies (Kornblith et al., 1805.08974).
MEAN_PER_CLASS = ("aircraft", "caltech101", "flowers102", "pets")
NOTES = {  # where a split is not the usual one of the name
    "sun397": "50 + 50 images a class, evenly spaced: ours, not one of the official lists",
    "caltech101": "30 training images a class, evenly spaced, without the background class: ours",
    "eurosat": "every fifth image of a class tested: ours",
    "clevr-count": "tested on the validation split, for the test split has no labels",
}


def read_set(name: str, split: str, root: str, download: bool) -> tuple:
    """Paths in order, labels (N,) and names of the classes; both splits if a set has none.

    In place of paths of PCAM, whose images are in one file, torchvision's data set.

    Raises:
        RunError: it is not there, not whole, or cannot be read.
    """
    made, *splits = LABELLED[name]
    which = splits[split == "test"]
    options = [dict(split=one) for one in which] if which else [{}]
    try:
        parts = [getattr(torchvision.datasets, made)(root, download=download, **one)
                 for one in options]
        if name == "pcam":
            labels = np.concatenate([pcam_labels(root, one) for one in which])
            return torch.utils.data.ConcatDataset(parts), labels, None
        pairs = sorted((str(path), label) for part in parts for path, label in listed(part))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0].split(". You can use")[0]
        raise RunError(f"--data {name}: missing or incomplete under --data-root {root} ({reason}); "
                       "pass --download to fetch it, or name the folder that has it") from error
    if not pairs:
        raise RunError(f"--data {name}: no image under --data-root {root}")
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    if name == "clevr-count":
        labels -= 3  # scenes have 3 to 10 objects
    names = getattr(parts[0], "classes", getattr(parts[0], "categories", None))
    return [path for path, _ in pairs], labels, names


def listed(loaded) -> list[tuple[str, int]]:
    """Paths and labels of a torchvision data set of files, without reading them."""
    for name in ("samples", "_samples"):
        if hasattr(loaded, name):
            return getattr(loaded, name)
    if hasattr(loaded, "categories"):  # Caltech101
        folders = [os.path.join(loaded.root, "101_ObjectCategories", c) for c in loaded.categories]
        return [(os.path.join(folders[label], f"image_{number:04d}.jpg"), label)
                for label, number in zip(loaded.y, loaded.index, strict=True)]
    paths = loaded._images if hasattr(loaded, "_images") else loaded._image_files
    return list(zip(paths, loaded._labels, strict=True))


def pcam_labels(root: str, split: str) -> np.ndarray:
    """The labels of a split of PCAM, of which torchvision reads one at a time."""
    import h5py  # torchvision needs it for this set, and has said so

    split = {"val": "valid"}.get(split, split)
    path = os.path.join(root, "pcam", f"camelyonpatch_level_2_split_{split}_y.h5")
    with h5py.File(path) as file:
        return np.asarray(file["y"][:], dtype=np.int64).ravel()


def divide(name: str, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train and to test on of a set without splits: the usual numbers of every class.

    Caltech101: 30 to train on, the rest to test on. SUN397: 50 and 50, as in each of the official
    lists, which torchvision does not have. EuroSAT: four fifths and one (Helber et al.,
    1709.00029). Which images they are is not random: evenly spaced by name.
    """
    if name == "eurosat":
        tested = every_fifth(labels)
        return np.flatnonzero(~tested), np.flatnonzero(tested)
    train = of_each_class(labels, 30 if name == "caltech101" else 50)
    rest = np.setdiff1d(np.arange(len(labels)), train)
    return train, rest if name == "caltech101" else rest[of_each_class(labels[rest], 50)]


def every_fifth(labels: np.ndarray) -> np.ndarray:
    """Whether an image is one of the fifth, tenth, ... of its class: bool (N,)."""
    found = np.zeros(len(labels), dtype=bool)
    found[np.concatenate([rows[4::5] for rows in class_members(labels)])] = True
    return found


def of_each_class(labels: np.ndarray, most: int) -> np.ndarray:
    """Rising rows of at most so many images of every class, evenly spaced among its images."""
    return np.sort(np.concatenate([rows[evenly(len(rows), most)]
                                   for rows in class_members(labels)]))


def class_members(labels: np.ndarray) -> list[np.ndarray]:
    """Rising rows of every class that there is, by rising class."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers up to count, evenly spaced."""
    taken = min(count, most)
    return np.arange(taken) * count // taken
