"""Images and the order in which a run sees them.

One rule: every random choice about a sample is a function of (seed, epoch, data-set index, view),
and of nothing else. The order of an epoch is a permutation drawn from (seed, epoch); step t of the
epoch takes the same global batch whatever the number of processes, and process r takes its
contiguous share. So the number of processes, of loader workers, and an interruption change nothing.
"""

import atexit
import contextlib
import functools
import gc
import math
import multiprocessing
import os
import re
import signal
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image
from torch import Tensor

from common import distributed as comm
from common.distributed import RunError, World

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What turns a photograph upright, by its EXIF orientation.
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), start=2))
# Folders of a system or of an archiver, not of images. So is what begins with a dot.
NO_DATA = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
TORCHVISION = {
    "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "svhn": "SVHN",
    "mnist": "MNIST",
}
FATAL = -1  # in a worker's report: stop the run
HELD_OUT = ("val", "test")  # folders that are not trained on
BUILT_IN = ("digits", *TORCHVISION, "fake")
# Streams of random numbers that never meet.
SAMPLE, ORDER, FAKE, SHUFFLE, CLUSTERS, MASK, NEGATIVES, DEPTH = range(1, 9)


def philox(seed: int, stream: int, *key: int) -> np.random.Generator:
    """A random generator that is a function of its arguments; up to three numbers in the key."""
    counter = [0, *key, *[0] * (3 - len(key))]
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The permutation of the data-set indices that an epoch goes through."""
    return philox(seed, ORDER, epoch).permutation(num_images)


# ------------------------------------------------------------------------------------ image sources


class RefusedImage(RunError):
    """An image that must not be replaced by another one, but stop the run."""


class ArrayImages:
    """Images held in one uint8 array (M, H, W, C) or (M, H, W), in memory or memory-mapped.

    Args:
        images: the array.
        labels: (N,) integers, or None.
        channels: channel count wanted: the array's, or any if the array is gray.
        rows: (N,) the row of each image, if not all in order.
        index: (N,) the data-set index of each image, if it is a subset.

    Raises:
        RunError: the array's channels cannot become the wanted ones.
    """

    reads_files = False

    def __init__(self, images, labels: np.ndarray | None, channels: int, rows=None, index=None):
        own = images.shape[3] if images.ndim == 4 else 1
        if own not in (1, channels) and not (own == 3 and channels == 1):
            raise RunError(f"--in-chans {channels}: the images have {own} channels")
        self.images, self.labels, self.channels = images, labels, channels
        self.rows = np.arange(len(images)) if rows is None else rows
        self.index = np.arange(len(self.rows)) if index is None else index

    def __len__(self) -> int:
        return len(self.rows)

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
        """What the images are, whatever path they were opened by."""
        crc = 0
        for row in self.rows[:: math.ceil(len(self) / 1000)]:
            crc = zlib.crc32(np.ascontiguousarray(self.images[row]), crc)
        return f"{len(self)} images {self.images.shape[1:]}, crc32 {crc:08x}"

    def read(self, index: int) -> list[Image.Image]:
        """The image as Pillow planes: one RGB or L image, or one L image per channel."""
        image = np.ascontiguousarray(self.images[self.rows[index]])
        image = image if image.ndim == 3 else image[..., None]
        if image.shape[-1] == 3:
            whole = Image.fromarray(image)
            return [whole if self.channels == 3 else whole.convert("L")]
        planes = [Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
        if len(planes) == self.channels:
            return planes
        return [planes[0].convert("RGB")] if self.channels == 3 else planes * self.channels

    def subset(self, indices: np.ndarray) -> "ArrayImages":
        labels = None if self.labels is None else self.labels[indices]
        return ArrayImages(self.images, labels, self.channels, self.rows[indices],
                           self.index[indices])


class FileImages:
    """Image files, decoded by Pillow when they are read.

    Args:
        paths: of the files.
        labels: (N,) integers, or None.
        channels: 1 (L), 3 (RGB) or 4 (RGBA): what files are converted to.
        root: what the paths are relative to in `identity`.
        index: (N,) the data-set index of each image, if it is a subset.

    Raises:
        RunError: files cannot give that many channels.
    """

    reads_files = True

    def __init__(self, paths, labels: np.ndarray | None, channels: int, root: str, index=None):
        if channels not in MODES:
            raise RunError(f"--in-chans {channels}: files give 1 (L), 3 (RGB) or 4 (RGBA) channels")
        self.paths = np.array([os.fsencode(path) for path in paths])  # a byte a character, not four
        self.labels, self.channels, self.root = labels, channels, root
        self.index = np.arange(len(self.paths)) if index is None else index

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def identity(self) -> str:
        """What the images are, whatever path they were opened by."""
        start = len(os.fsencode(os.path.join(self.root, "")))
        names = b"\n".join(path[start:] for path in self.paths.tolist())
        return f"{len(self)} files, crc32 of the names {zlib.crc32(names):08x}"

    def read(self, index: int) -> list[Image.Image]:
        """The upright image as Pillow planes: one RGB or L image, or one L image per channel.

        Raises:
            RefusedImage: more than 8 bits a channel: to cut them down is the user's choice.
            Exception: whatever Pillow raises for a file that it cannot decode.
        """
        with Image.open(self.name(index)) as image:
            if is_deep(image):
                raise RefusedImage(f"{self.name(index)} has more than 8 bits a channel "
                                   f"(Pillow mode {image.mode}); convert it to 8 bits")
            pixels = image.convert(MODES[self.channels])
            turn = None
            with contextlib.suppress(Exception):  # a broken tag does not make a broken image
                turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        pixels = pixels if turn is None else pixels.transpose(turn)
        return list(pixels.split()) if self.channels == 4 else [pixels]

    def subset(self, indices: np.ndarray) -> "FileImages":
        labels = None if self.labels is None else self.labels[indices]
        return FileImages(self.paths[indices], labels, self.channels, self.root,
                          self.index[indices])


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
    limit: int | None = None,
):
    """Open the images of one split of a data source.

    Args:
        data: a name of `BUILT_IN`, a folder, a text list, or a `.npy` file (docs/guide.md).
        split: "pretrain" (all that may be learned from without labels), "train" or "test".
        channels: channel count wanted.
        root: the folder of torchvision's data sets.
        download: fetch a torchvision data set that is not there.
        limit: number of evenly spaced images to take, if not all.

    Raises:
        RunError: there is no such source, or it holds no image.
    """
    if data in TORCHVISION and download:
        with comm.together(writing=root):  # one process a machine fetches, the others wait for it
            if comm.told("LOCAL_RANK", 0) == 0:
                torchvision_images(data, split, channels, root, download=True)
    with comm.together():
        if data == "digits":
            images = digits(split, channels)
        elif data == "fake":
            images = fake(split, channels)
        elif data in TORCHVISION:
            images = torchvision_images(data, split, channels, root, download=False)
        elif os.path.isdir(data):
            images = folder(data, split, channels)
        elif os.path.isfile(data) and split == "pretrain":
            read = array_file if data.endswith(".npy") else text_list
            images = read(data, channels)
        elif os.path.isfile(data):
            raise RunError(f"--data {data}: one file has no {split} split; give a folder with "
                           "train/ and val/ or test/, and class folders in them")
        else:
            raise RunError(f"--data {data}: no such file or folder, and no built-in name "
                           f"({' '.join(BUILT_IN)})")
    if limit is not None and limit < len(images):
        images = images.subset(np.arange(limit) * len(images) // limit)
    return images


def digits(split: str, channels: int) -> ArrayImages:
    """The 1,797 handwritten digits inside scikit-learn, enlarged from 8 to 16 px.

    Every fifth image of a class is the test split.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    labels = loaded.target
    rank_in_class = np.zeros(len(labels), dtype=int)
    for label in range(10):
        rank_in_class[labels == label] = np.arange((labels == label).sum())
    chosen = (rank_in_class % 5 == 4) == (split == "test")
    small = (loaded.images[chosen] * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(i).resize((16, 16), Image.Resampling.BICUBIC) for i in small]
    images = np.stack([np.asarray(i) for i in large])[..., None]
    return ArrayImages(images, labels[chosen], channels)


def fake(split: str, channels: int) -> ArrayImages:
    """Noise of 256 px, for timing: 10,000 images (1,000 in the test split), 64 different ones."""
    count = 1000 if split == "test" else 10_000
    noise = philox(0, FAKE).integers(0, 256, (64, 256, 256, channels), dtype=np.uint8)
    return ArrayImages(noise, np.arange(count) % 10, channels, rows=np.arange(count) % 64)


def torchvision_images(name: str, split: str, channels: int, root: str, download: bool):
    """A data set of torchvision, held in memory. STL-10's unlabelled images are pre-trained on."""
    if name == "stl10":
        which = dict(split={"pretrain": "train+unlabeled"}.get(split, split))
    elif name == "svhn":
        which = dict(split="test" if split == "test" else "train")
    else:
        which = dict(train=split != "test")
    try:
        loaded = getattr(torchvision.datasets, TORCHVISION[name])(root, download=download, **which)
    except RuntimeError as error:  # torchvision's word for files that are missing or damaged
        raise RunError(f"--data {name}: not (whole) under --data-root {root}; pass --download to "
                       "fetch it, or name the folder that has it") from error
    images = np.asarray(loaded.data)
    if name in ("stl10", "svhn"):
        images = images.transpose(0, 2, 3, 1)
    labels = np.asarray(loaded.labels if name in ("stl10", "svhn") else loaded.targets)
    return ArrayImages(images, labels, channels)


def folder(root: str, split: str, channels: int) -> FileImages:
    """Image files below a folder, or below its `train`, `val` or `test` folder if it has one.

    Labels are the class folders; pre-training never looks at them. A file beside class folders has
    no label and is left out with them, as are hidden files and folders in any case.

    Raises:
        RunError: no image; no such split; a class of the test split that is not in the training
            split, where it has another number or none.
    """
    names = HELD_OUT if split == "test" else ("train",)
    found = [os.path.join(root, n) for n in names if os.path.isdir(os.path.join(root, n))]
    if split == "pretrain" and found and train_is_a_class(root):
        found = []
    if split != "pretrain" and not found:
        raise RunError(f"--data {root}: no {' or '.join(names)} folder in it to evaluate with")
    top = found[0] if found else os.path.normpath(root)
    held_out = [] if found else [n for n in HELD_OUT if holds_images(os.path.join(root, n))]
    paths = sorted(os.path.join(parent, file)
                   for parent, files in walk(top, [os.path.join(top, n) for n in held_out])
                   for file in files)
    beside = f", {' and '.join(held_out)} held out" if held_out else ""
    if not paths:
        raise RunError(f"--data {top}: no image file in it{beside} ({' '.join(EXTENSIONS)})")
    if held_out:
        comm.say(f"warning: {top}: {' and '.join(held_out)} taken for held-out images and not "
                 "trained on; a class needs another name")
    inside = [path[len(os.path.join(top, "")) :].split(os.sep) for path in paths]
    if split == "pretrain" or all(len(parts) == 1 for parts in inside):
        return FileImages(paths, None, channels, top)
    stray = [path for path, parts in zip(paths, inside, strict=True) if len(parts) == 1]
    if stray:
        comm.say(f"warning: left out, for no class folder holds it: {some(stray)}")
        paths = [path for path, parts in zip(paths, inside, strict=True) if len(parts) > 1]
    classes = [parts[0] for parts in inside if len(parts) > 1]
    # A class has the same number in every split: that of the training split.
    train = os.path.join(root, "train")
    known = subfolders(train) if os.path.isdir(train) else sorted(set(classes))
    unknown, empty = set(classes) - set(known), set(known) - set(classes)
    if unknown:
        raise RunError(f"--data {root}: class folders of {top} that {train} does not have: "
                       f"{some(unknown)}; a class has one name in both")
    if empty and split == "train":
        comm.say(f"warning: class folders of {train} without an image: {some(empty)}")
    number = {name: label for label, name in enumerate(known)}
    return FileImages(paths, np.array([number[name] for name in classes]), channels, top)


def train_is_a_class(root: str) -> bool:
    """Whether the folder `train` is a class: one flat folder of images among others.

    With a test split beside it, or with class folders in it, it is the training split.
    """
    own = os.path.join(root, "train")
    beside = [name for name in subfolders(root)
              if name not in ("train", *HELD_OUT) and holds_images(os.path.join(root, name))]
    nested = any(holds_images(os.path.join(own, name)) for name in subfolders(own))
    if not beside:
        return False
    if nested or any(os.path.isdir(os.path.join(root, name)) for name in HELD_OUT):
        comm.say(f"warning: {own} is taken for the training split; beside it, not trained on: "
                 f"{some(beside)}")
        return False
    comm.say(f"warning: {own} is taken for a class like {some(beside)}; for the training split "
             f"pass --data {own}")
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
    """Whether a file or folder is no data, but something that a system has put there."""
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


# ------------------------------------------------------------------------------------------ loading


@dataclass
class Batch:
    """This process's share of a global batch: one tensor a view, and the data-set indices."""

    views: list[Tensor]  # (n, C, H, W) each, on the training device
    index: Tensor  # int64 (n,), on the CPU


class StepShares(torch.utils.data.Dataset):
    """Item t is this process's share of step t: crops and parameters of every view.

    An image that cannot be decoded is replaced by the one in the same slot of the next global batch
    of the epoch that can be, so that no image stands in a batch twice and workers share no state.
    """

    def __init__(self, images, views: list, batch_size: int, seed: int, rank: int, size: int,
                 order_epoch: int | None = None):
        self.images, self.views, self.seed, self.order_epoch = images, views, seed, order_epoch
        self.batch_size, self.share = batch_size, batch_size // size
        self.first = rank * self.share
        self.steps_per_epoch = len(images) // batch_size

    def __getitem__(self, step: int):
        epoch, step = divmod(step, self.steps_per_epoch)
        ordered_as = epoch if self.order_epoch is None else self.order_epoch
        order = epoch_order(self.seed, ordered_as, len(self.images))
        problems = {}
        decoded = [
            self.read_slot(order, step, slot, problems)
            for slot in range(self.first, self.first + self.share)
        ]
        index = [i for i, _ in decoded]
        sizes = np.array([planes[0].size[::-1] for _, planes in decoded])
        crops, parameters = [], []
        for number, view in enumerate(self.views):
            uniforms = np.empty((self.share, view.num_uniforms))
            for row, i in enumerate(index):
                philox(self.seed, SAMPLE, epoch, i, number).random(out=uniforms[row])
            geometry, colour = view.draw(uniforms, sizes)
            crops.append(torch.empty(self.share, view.channels, *view.size, dtype=torch.uint8))
            out = crops[-1].numpy()
            for row, (_, planes) in enumerate(decoded):
                out[row] = view.crop(planes, [p[row] for p in geometry])
            parameters.append(torch.from_numpy(colour))
        return crops, parameters, torch.tensor(index), problems

    def read_slot(self, order: np.ndarray, step: int, slot: int, problems: dict):
        """Index and planes of the first readable image in a slot, from this step onwards."""
        for later in range(self.steps_per_epoch):
            at = (step + later) % self.steps_per_epoch
            index = int(order[at * self.batch_size + slot])
            try:
                return index, self.images.read(index)
            except RefusedImage as error:
                problems[FATAL] = str(error)
                return index, self.blank()
            except Exception as error:  # Pillow's decoders raise what they like
                reason = str(error).replace("\n", " ") or type(error).__name__
                problems[index] = reason
        problems[FATAL] = (
            f"none of the {self.steps_per_epoch} images that could stand in slot {slot} of a batch "
            f"can be read, such as {self.images.name(index)}: {problems[index]}"
        )
        return index, self.blank()

    def blank(self) -> list[Image.Image]:
        """What stands for an image in a batch that will not be trained on."""
        planes = [Image.new("L", (8, 8))] * self.views[0].channels
        return [Image.merge("RGB", planes)] if len(planes) == 3 else planes


class Loader:
    """The batches of a run, from `start_step` to the end, prefetched across epochs.

    Args:
        images: a source (`open_images`).
        views: one `augment.View` for every view.
        batch_size: images over all processes.
        workers: loader processes; 0 loads in this process; None takes this process's share of the
            cores.
        start_step: the first step to load, for a run that goes on.
        order_epoch: the epoch whose images, in its order, every epoch takes, with crops of its own.

    Raises:
        RunError: fewer images than one batch; too many files that cannot be read.
    """

    def __init__(
        self, images, views, *, batch_size, epochs, seed, world: World, workers=None, start_step=0,
        order_epoch=None, multiprocessing_context=None,
    ):
        check_batch_size(images, batch_size, world)
        left_out = sorted({what for view in views for what in view.left_out})
        if left_out:
            comm.say(f"left out, for it needs RGB images: {', '.join(left_out)}")
        self.images, self.views, self.world = images, views, world
        self.steps_per_epoch = len(images) // batch_size
        self.step, self.bad_files, self.waited = start_step, {}, 0.0
        shares = StepShares(images, views, batch_size, seed, world.rank, world.size, order_epoch)
        steps = range(start_step, epochs * self.steps_per_epoch)
        workers = min(default_workers() if workers is None else workers, len(steps))
        # Large batches, as of many crops, are held to one waiting for each worker.
        large = shares.share * sum(v.channels * math.prod(v.size) for v in views) > 2**26
        context = (multiprocessing_context or comm.worker_context()) if workers else None
        atexit.unregister(end_workers)
        atexit.register(end_workers)  # after multiprocessing's own, so that it runs before it
        gc.freeze()  # in the workers, whose collections would copy every page that they share
        self.batches = iter(
            torch.utils.data.DataLoader(
                shares,
                batch_size=None,  # an item is a whole batch already
                sampler=steps,
                num_workers=workers,
                worker_init_fn=start_worker,
                prefetch_factor=(1 if large else 2) if workers else None,
                pin_memory=world.device.type == "cuda",
                multiprocessing_context=context,
            )
        )
        gc.unfreeze()

    def epoch(self, epoch: int):
        """The batches of an epoch that are still to come."""
        while self.step < (epoch + 1) * self.steps_per_epoch:
            started = time.perf_counter()
            crops, parameters, index, problems = next(self.batches)
            self.waited += time.perf_counter() - started
            if self.images.reads_files:
                self.report(problems)
            self.step += 1
            views = [
                view.finish(c, p, self.world.device)
                for view, c, p in zip(self.views, crops, parameters, strict=True)
            ]
            yield Batch(views, index)

    def report(self, problems: dict[int, str]) -> None:
        """Join all processes' unreadable files, name each once, and stop if there are too many."""
        new = {i: reason for i, reason in problems.items() if i not in self.bad_files}
        if not any(comm.any_rank(bool(new))):
            return
        joined = {i: r for part in comm.all_gather_objects(new) for i, r in part.items()}
        hopeless = joined.pop(FATAL, None)
        self.bad_files.update(joined)
        allowed = max(1, len(self.images) // 100)
        if len(self.bad_files) > allowed:
            first = min(self.bad_files)
            raise RunError(
                f"{len(self.bad_files)} of {len(self.images)} files cannot be read (at most "
                f"{allowed} may), such as {self.images.name(first)}: {self.bad_files[first]}"
            )
        if hopeless:
            raise RunError(hopeless)
        for i in sorted(joined):
            comm.say(f"unreadable, replaced: {self.images.name(i)}: {joined[i]}")


def check_batch_size(images, batch_size: int, world: World) -> None:
    """Refuse a batch of more images than there are."""
    if len(images) < batch_size:
        fits = len(images) - len(images) % world.size
        remedy = f"--batch-size {fits} fits" if fits else "start fewer processes"
        raise RunError(f"--batch-size {batch_size} is more than the {len(images)} images of "
                       f"--data; {remedy}")


def default_workers() -> int:
    """This process's share of the cores, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cores // comm.told("LOCAL_WORLD_SIZE", 1))


def start_worker(worker: int) -> None:
    """Ignore stop signals in a worker, and see that it does not live on without sending.

    One sent to every process (Slurm, Ctrl-C) must not take the loader from under a step that is to
    be finished. Workers end with the main process: `end_workers`, or torch's own watch on it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    comm.end_if_unsent(worker)


def end_workers() -> None:
    """At exit after an error: multiprocessing would wait for ever for workers to obey SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch reports each of them as a failure
    for child in multiprocessing.active_children():
        if child.daemon:  # a loader's workers are; anybody else's processes are left alone
            child.kill()
