"""Image sources: built-in sets, folders, lists and arrays, decoded to Pillow planes."""

import contextlib
import copy
import math
import os
import re
import zlib
from xml.etree import ElementTree

import numpy as np
import torchvision
from PIL import Image, ImageOps

from common import distributed as comm, labelled_sets, rng
from common.distributed import RunError
from common.labelled_sets import LABELLED, evenly, every_fifth

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Folders of a system or an archiver, ignored like names that begin with a dot.
NO_DATA = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
TORCHVISION = {name.lower(): name for name in ("CIFAR10", "CIFAR100", "STL10", "SVHN", "MNIST")}
HELD_OUT = ("val", "test")  # folders that are not trained on
BUILT_IN = ("digits", *TORCHVISION, *LABELLED, "fake")


class NoSplit(RunError):
    """The images are not divided into a training and a test split."""


class RefusedImage(RunError):
    """An image that must not be replaced by another one, but stop the run."""


class Images:
    """What all sources have: labels, and a subset of images that know their place in the whole.

    Args:
        items: (N,) what names each image to `read`.
        labels: (N,) integers, or (N, C) where an image may show several classes, or None.
        channels: channel count wanted.
    """

    classes = None  # names of the columns of labels (N, C)
    class_names = None  # of labels (N,), where they have names: label 0 is that of the first

    def __init__(self, items: np.ndarray, labels: np.ndarray | None, channels: int):
        self.items, self.labels, self.channels = items, labels, channels
        self.index = np.arange(len(items))  # of each image in the data set

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, indices: np.ndarray) -> "Images":
        part = copy.copy(self)
        part.items, part.index = self.items[indices], self.index[indices]
        part.labels = None if self.labels is None else self.labels[indices]
        return part


class ArrayImages(Images):
    """Images held in one uint8 array (M, H, W, C) or (M, H, W), in memory or memory-mapped.

    Args:
        images: the array. rows: (N,) the row of each image, if not all in order.
        channels: the array's, or any if the array is gray, or 1 if it is RGB.

    Raises:
        RunError: the array's channels cannot become the wanted ones.
    """

    reads_files = False

    def __init__(self, images, labels: np.ndarray | None, channels: int, rows=None):
        there = images.shape[3] if images.ndim == 4 else 1
        if there not in (1, channels) and not (there == 3 and channels == 1):
            raise RunError(f"--in-chans {channels}: the images have {there} channels")
        super().__init__(np.arange(len(images)) if rows is None else rows, labels, channels)
        self.images = images

    def __getstate__(self):
        """A memory-mapped array goes to another process by its path, not by its contents."""
        state = dict(self.__dict__)
        if isinstance(self.images, np.memmap):
            state["images"] = self.images.filename
        return state

    def __setstate__(self, state):
        if not isinstance(state["images"], np.ndarray):
            state["images"] = np.load(state["images"], mmap_mode="r", allow_pickle=False)
        self.__dict__.update(state)

    def name(self, index: int) -> str:
        return f"image {index}"

    def identity(self) -> str:
        """What the images are, regardless of the path they were opened by."""
        crc = 0
        for row in self.items[:: math.ceil(len(self) / 1000)]:
            crc = zlib.crc32(np.ascontiguousarray(self.images[row]), crc)
        return f"{len(self)} images {self.images.shape[1:]}, crc32 {crc:08x}"

    def read(self, index: int) -> list[Image.Image]:
        """The image as Pillow planes: one RGB or L image, or one L image per channel."""
        image = np.ascontiguousarray(self.images[self.items[index]])
        image = image if image.ndim == 3 else image[..., None]
        if image.shape[-1] == 3:
            whole = Image.fromarray(image)
            return [whole if self.channels == 3 else whole.convert("L")]
        planes = [Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
        if len(planes) == self.channels:
            return planes
        return [planes[0].convert("RGB")] if self.channels == 3 else planes * self.channels


class FileImages(Images):
    """Image files, decoded by Pillow when they are read.

    Args:
        paths: of the files. root: what they are relative to in `identity`.
        channels: 1 (L), 3 (RGB) or 4 (RGBA): what files are converted to.

    Raises:
        RunError: files cannot give that many channels.
    """

    reads_files = True

    def __init__(self, paths, labels: np.ndarray | None, channels: int, root: str):
        if channels not in MODES:
            raise RunError(f"--in-chans {channels}: files give 1 (L), 3 (RGB) or 4 (RGBA) channels")
        paths = np.array([os.fsencode(path) for path in paths])  # a byte a character, not four
        super().__init__(paths, labels, channels)
        self.root = root

    def name(self, index: int) -> str:
        return os.fsdecode(self.items[index])

    def identity(self) -> str:
        """What the images are, regardless of the path they were opened by."""
        start = len(os.fsencode(os.path.join(self.root, "")))
        names = b"\n".join(path[start:] for path in self.items.tolist())
        return f"{len(self)} files, crc32 of the names {zlib.crc32(names):08x}"

    def read(self, index: int) -> list[Image.Image]:
        """The upright image as Pillow planes: one RGB or L image, or one L image per channel.

        Raises:
            RefusedImage: more than 8 bits a channel: to cut them down is the user's choice.
            Exception: any that Pillow raises for a file that it cannot decode.
        """
        with Image.open(self.name(index)) as image:
            if is_deep(image):
                raise RefusedImage(f"{self.name(index)} has more than 8 bits a channel "
                                   f"(Pillow mode {image.mode}); convert it to 8 bits")
            image.load()
            with contextlib.suppress(Exception):  # a broken tag does not make a broken image
                ImageOps.exif_transpose(image, in_place=True)
            pixels = image.convert(MODES[self.channels])
        return list(pixels.split()) if self.channels == 4 else [pixels]


class DecodedImages(Images):
    """Images that a torchvision data set reads itself, as pairs (image, label).

    Args:
        loaded: the data set. name: of it.
        channels: 1 (L), 3 (RGB) or 4 (RGBA).
    """

    reads_files = True

    def __init__(self, loaded, labels: np.ndarray, channels: int, name: str):
        if channels not in MODES:
            raise RunError(f"--in-chans {channels}: {name} gives 1 (L), 3 (RGB) or 4 (RGBA)")
        super().__init__(np.arange(len(labels)), labels, channels)
        self.loaded, self.set = loaded, name

    def name(self, index: int) -> str:
        return f"image {self.items[index]} of {self.set}"

    def identity(self) -> str:
        return f"{len(self)} images of {self.set}, crc32 of the rows {zlib.crc32(self.items):08x}"

    def read(self, index: int) -> list[Image.Image]:
        pixels = self.loaded[self.items[index]][0].convert(MODES[self.channels])
        return list(pixels.split()) if self.channels == 4 else [pixels]


def is_deep(image: Image.Image) -> bool:
    """Whether an opened file has more than 8 bits a channel.

    Pillow opens 16-bit RGB as 8-bit RGB; only the decoder's arguments tell. "BGR;16" is a pixel
    of 5, 6 and 5 bits; the decoder of PPM is told the largest value.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return True
    for decoder, _, _, args in image.tile:
        values = [v for v in args if isinstance(v, int)] if decoder.startswith("ppm") else []
        if max(values, default=0) > 255 or re.search(r"(?<!BGR);16", str(args)):
            return True
    return False


def open_images(
    data: str, split: str, channels: int, *, root: str = "data", download: bool = False,
    limit: int | None = None, whole: bool = False, classes: dict[str, int] | None = None,
):
    """Open the images of one split of a data source.

    Args:
        data: a name of `BUILT_IN`, a folder, a text list, or a `.npy` file (docs/guide.md).
        split: "pretrain" (all that may be learned from without labels), "train" or "test".
        channels: channel count wanted.
        root: the folder of torchvision's data sets.
        download: fetch a torchvision data set that is not there.
        limit: number of evenly spaced images to take, if not all.
        whole: a list, or a folder without a folder for this split, is all of the split.
        classes: numbers of the classes by name, where other images have fixed them.

    Raises:
        RunError: there is no such source, it holds no image, or a class that is not in `classes`.
    """
    named = torchvision_images if data in TORCHVISION else labelled_set
    if data in LABELLED and os.path.isdir(data) and os.path.normpath(root) != ".":
        comm.print_main(f"warning: --data {data} is torchvision's set; for the folder pass "
                        f"./{data}")
    if data in (*TORCHVISION, *LABELLED) and download:
        with comm.same_error_on_all_ranks(writing=root):  # one process a machine fetches
            if comm.env_int("LOCAL_RANK", 0) == 0:
                named(data, split, channels, root, download=True)
    with comm.same_error_on_all_ranks():
        if data == "digits":
            images = digits(split, channels)
        elif data == "fake":
            images = fake(split, channels)
        elif data in (*TORCHVISION, *LABELLED):
            images = named(data, split, channels, root, download=False)
        elif split != "pretrain" and os.path.isdir(os.path.join(data, "Annotations")):
            images = voc(data, split, channels)
        elif os.path.isdir(data):
            images = folder(data, split, channels, whole, classes)
        elif os.path.isfile(data) and (split == "pretrain" or whole):
            read = array_file if data.endswith(".npy") else text_list
            images = read(data, channels)
        elif os.path.isfile(data):
            raise NoSplit(f"--data {data}: one file has no {split} split; give a folder with "
                           "train/ and val/ or test/, and class folders in them, or --test-data")
        else:
            raise RunError(f"--data {data}: no such file or folder, and no built-in name "
                           f"({' '.join(BUILT_IN)})")
        if classes is not None and images.labels is not None and images.labels.ndim == 1:
            unknown = sorted(set(images.labels.tolist()) - set(classes.values()))
            if unknown:
                raise RunError(f"--data {data}: labels that no training image has, such as "
                               f"{unknown[0]}")
    if limit is not None:
        images = images.subset(evenly(len(images), limit))
    return images


def digits(split: str, channels: int) -> ArrayImages:
    """The 1,797 handwritten digits inside scikit-learn, enlarged from 8 to 16 px.

    Every fifth image of a class is the test split.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    labels = loaded.target
    chosen = every_fifth(labels) == (split == "test")
    small = (loaded.images[chosen] * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(i).resize((16, 16), Image.Resampling.BICUBIC) for i in small]
    images = np.stack([np.asarray(i) for i in large])[..., None]
    return ArrayImages(images, labels[chosen], channels)


def fake(split: str, channels: int) -> ArrayImages:
    """Noise of 256 px, for timing: 10,000 images (1,000 in the test split), 64 different ones."""
    count = 1000 if split == "test" else 10_000
    noise = rng.philox(0, rng.FAKE).integers(0, 256, (64, 256, 256, channels), dtype=np.uint8)
    return ArrayImages(noise, np.arange(count) % 10, channels, rows=np.arange(count) % 64)


def labelled_set(name: str, split: str, channels: int, root: str, download: bool):
    """A data set of torchvision whose images are files, sorted by path, or PCAM's array."""
    root = os.path.normpath(os.path.expanduser(root))
    found, labels, names = labelled_sets.read_set(name, split, root, download)
    if name == "pcam":
        return DecodedImages(found, labels, channels, name)
    images = FileImages(found, labels, channels, root)
    images.class_names = names
    if LABELLED[name][1] is None:
        images = images.subset(labelled_sets.divide(name, labels)[split == "test"])
    return images


def torchvision_images(name: str, split: str, channels: int, root: str, download: bool):
    """A data set of torchvision, in memory. Pre-training includes STL-10's unlabelled images."""
    which = dict(train=split != "test")
    if name in ("stl10", "svhn"):
        which = dict(split=split if split != "pretrain" else
                     "train+unlabeled" if name == "stl10" else "train")
    try:
        loaded = getattr(torchvision.datasets, TORCHVISION[name])(root, download=download, **which)
    except RuntimeError as error:  # torchvision's word for files that are missing or damaged
        raise RunError(f"--data {name}: not (whole) under --data-root {root}; pass --download to "
                       "fetch it, or name the folder that has it") from error
    images = np.asarray(loaded.data)
    if name in ("stl10", "svhn"):
        images = images.transpose(0, 2, 3, 1)
    labels = np.asarray(loaded.labels if name in ("stl10", "svhn") else loaded.targets)
    images = ArrayImages(images, labels, channels)
    images.class_names = getattr(loaded, "classes", None)
    return images


def folder(
    root: str, split: str, channels: int, whole: bool = False, numbers: dict | None = None,
) -> FileImages:
    """Image files below a folder, or below its `train`, `val` or `test` folder if it has one.

    Labels are the class folders; pre-training never looks at them. A file beside class folders has
    no label and is left out with them, as are hidden files and folders in any case.

    Args:
        whole: without such a folder, all is the split.
        numbers: of the classes by name, if not in the order of the training split's folders.

    Raises:
        RunError: no image; no such split; a class of the test split that is not in the training
            split, where it has another number or none.
    """
    names = HELD_OUT if split == "test" else ("train",)
    found = [os.path.join(root, n) for n in names if os.path.isdir(os.path.join(root, n))]
    whole = whole or split == "pretrain"
    if whole and split != "test" and found and train_is_a_class(root):
        found = []
    if not whole and not found:
        raise NoSplit(f"--data {root}: no {' or '.join(names)} folder in it to evaluate with")
    top = found[0] if found else os.path.normpath(root)
    held_out = [] if found else [n for n in HELD_OUT if holds_images(os.path.join(root, n))]
    paths = sorted(os.path.join(parent, file)
                   for parent, files in walk(top, [os.path.join(top, n) for n in held_out])
                   for file in files)
    beside = f", {' and '.join(held_out)} held out" if held_out else ""
    if not paths:
        raise RunError(f"--data {top}: no image file in it{beside} ({' '.join(EXTENSIONS)})")
    if held_out:
        comm.print_main(f"warning: {top}: {' and '.join(held_out)} taken for held-out images and "
                        "not trained on; a class needs another name")
    inside = [path[len(os.path.join(top, "")) :].split(os.sep) for path in paths]
    if split == "pretrain" or all(len(parts) == 1 for parts in inside):
        return FileImages(paths, None, channels, top)
    stray = [path for path, parts in zip(paths, inside, strict=True) if len(parts) == 1]
    if stray:
        comm.print_main(f"warning: left out, for no class folder holds it: {some(stray)}")
        paths = [path for path, parts in zip(paths, inside, strict=True) if len(parts) > 1]
    classes = [parts[0] for parts in inside if len(parts) > 1]
    # A class has the same number in every split: that of the training split.
    train = top if whole else os.path.join(root, "train")
    known = None
    if numbers is None:
        known = subfolders(train) if os.path.isdir(train) else sorted(set(classes))
        known = [name for name in known if found or name not in HELD_OUT]
        numbers = {name: label for label, name in enumerate(known)}
    there = numbers if split == "train" else subfolders(top)
    unknown, empty = set(classes) - set(numbers), set(there) - set(classes)
    if unknown:
        train = "the training set" if whole else train
        raise RunError(f"--data {root}: class folders of {top} that {train} does not have: "
                       f"{some(unknown)}; a class has one name in both")
    if empty:
        comm.print_main(f"warning: class folders of {top} without an image: {some(empty)}")
    images = FileImages(paths, np.array([numbers[name] for name in classes]), channels, top)
    images.class_names = known
    return images


def train_is_a_class(root: str) -> bool:
    """Whether the folder `train` is a class: one flat folder of images among others.

    With a test split beside it, or with class folders in it, it is the training split.
    """
    train = os.path.join(root, "train")
    beside = [name for name in subfolders(root)
              if name not in ("train", *HELD_OUT) and holds_images(os.path.join(root, name))]
    nested = any(holds_images(os.path.join(train, name)) for name in subfolders(train))
    if not beside:
        return False
    if nested or any(os.path.isdir(os.path.join(root, name)) for name in HELD_OUT):
        comm.print_main(f"warning: {train} is taken for the training split; beside it, not trained "
                        f"on: {some(beside)}")
        return False
    comm.print_main(f"warning: {train} is taken for a class like {some(beside)}; for the training "
                    f"split pass --data {train}")
    return True


def some(names) -> str:
    """Names in order, of many the first and how many there are."""
    names = sorted(names)
    return " ".join(names) if len(names) <= 5 else f"{' '.join(names[:3])} ... ({len(names)})"


def subfolders(top: str) -> list[str]:
    """Names of the folders in a folder that may hold images, in order."""
    return sorted(entry.name for entry in os.scandir(top)
                  if entry.is_dir() and not is_hidden(entry.name))


def holds_images(top: str) -> bool:
    """Whether there is an image below a folder, as far as it can be read."""
    try:
        return any(files for _, files in walk(top))
    except RunError:
        return os.path.isdir(top)


def is_hidden(name: str) -> bool:
    """Whether a file or folder was put there by a system and is not data."""
    return name.startswith(".") or name in NO_DATA


def walk(top: str, without=()):
    """Folders below `top` and their image files; a link to a folder that holds it is not followed.

    Args:
        top: a folder.
        without: paths of folders below it that are left out.

    Raises:
        RunError: a folder cannot be read; `os.walk` alone would pass over it in silence.
    """

    def stop(error):
        raise RunError(f"{error.filename}: {error.strerror}; make the folder readable, or move it "
                       "out of --data")

    for parent, folders, files in os.walk(top, followlinks=True, onerror=stop):
        inside = os.path.join(os.path.realpath(parent), "")
        for name in list(folders):
            path = os.path.join(parent, name)
            loops = os.path.islink(path) and inside.startswith(
                os.path.join(os.path.realpath(path), ""))
            if loops or is_hidden(name) or path in without:
                folders.remove(name)
        yield parent, [file for file in files
                       if file.lower().endswith(EXTENSIONS) and not is_hidden(file)]


def text_list(path: str, channels: int) -> FileImages:
    """Image files listed in a text file, `path` or `path label` a line, relative to its folder."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # as file names are
        text = file.read()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise RunError(f"--data {path}: no line in it")
    labels = None
    here = os.path.dirname(path)
    split = [line.rsplit(maxsplit=1) for line in lines]
    if all(len(parts) == 2 and parts[1].lstrip("-").isdecimal() for parts in split):
        lines, labels = [parts[0] for parts in split], np.array([int(parts[1]) for parts in split])
    paths = [os.path.join(here, line) for line in lines]
    if not any(os.path.exists(path) for path in paths[:100] if "\0" not in path):
        if "\0" in text or not os.fsencode(text).decode(errors="ignore") == text:
            raise RunError(f"--data {path}: neither a text list nor a .npy file")
        raise RunError(f"--data {path}: its first line names no file, {paths[0]}; a line is a "
                       "path, or a path and a whole number, relative to the list's folder")
    return FileImages(paths, labels, channels, here or ".")


def array_file(path: str, channels: int) -> ArrayImages | FileImages:
    """A `.npy` file: uint8 images (N, H, W[, C]), memory-mapped; or strings, as paths."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise RunError(f"--data {path}: {error}; save a plain uint8 array or strings") from error
    if not isinstance(array, np.ndarray):
        raise RunError(f"--data {path}: a .npz; save one array with numpy.save")
    if array.dtype.kind == "U" and array.ndim == 1 and len(array):
        here = os.path.dirname(path)
        return FileImages([os.path.join(here, str(p)) for p in array], None, channels, here or ".")
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or not array.size:
        raise RunError(f"--data {path}: {array.dtype} of shape {array.shape}; wanted uint8 images "
                       "(N, H, W, C), or strings (N,) with their paths")
    return ArrayImages(array, None, channels)


def voc(root: str, split: str, channels: int) -> FileImages:
    """The training (`trainval`) or test split of a VOC folder, whose images show several classes.

    The labels (N, C) are 1 where a class is present, -1 where all of its objects are marked as
    difficult, 0 where it is absent. A file that is missing or no annotation is a RunError.
    """
    ids, annotations = read_annotations(root, "trainval")
    names = sorted(set().union(*annotations))
    if split == "test":
        ids, annotations = read_annotations(root, "test")
    labels = np.array([[objects.get(name, 0) for name in names] for objects in annotations], int)
    folder = os.path.join(root, "JPEGImages")
    paths = [os.path.join(folder, f"{i}.jpg") for i in ids]
    images = FileImages(paths, labels.reshape(len(ids), len(names)), channels, folder)
    images.classes = names
    return images


def read_annotations(root: str, split: str) -> tuple[list[str], list[dict[str, int]]]:
    """The ids of a split's images, and the labels, 1 or -1, of the classes in each of them."""
    path = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        with open(path, encoding="utf-8") as file:
            ids = [line.split()[0] for line in file if line.strip()]
        annotations = [{} for _ in ids]
        for i, labels in zip(ids, annotations, strict=True):
            path = os.path.join(root, "Annotations", f"{i}.xml")
            for thing in ElementTree.parse(path).iter("object"):
                name = thing.findtext("name", "").strip()
                difficult = thing.findtext("difficult", "0").strip() == "1"
                labels[name] = max(labels.get(name, -1), -1 if difficult else 1)
    except (OSError, ElementTree.ParseError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"--data {root}: cannot read {path}: {reason}") from error
    return ids, annotations
