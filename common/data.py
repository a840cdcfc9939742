"""Images and the order in which a run sees them.

One rule: every random choice about a sample is a function of (seed, epoch, data-set index, view),
and of nothing else. The order of an epoch is a permutation drawn from (seed, epoch); step t of the
epoch takes the same global batch whatever the number of processes, and process r takes its
contiguous share. So the number of processes, of loader workers, and an interruption change nothing.
"""

import functools
import os
import signal
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import dist
from common.dist import RunError, World

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SAMPLE, ORDER = 1, 2  # streams of random numbers that never meet


def philox(seed: int, stream: int, *key: int) -> np.random.Generator:
    """A random generator that is a function of its arguments; up to three numbers in the key."""
    counter = [0, *key, *[0] * (3 - len(key))]
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The permutation of the data-set indices that an epoch goes through."""
    return philox(seed, ORDER, epoch).permutation(num_images)


# ------------------------------------------------------------------------------------ image sources


class ArrayImages:
    """Images held in one uint8 array (N, H, W, C), in memory or memory-mapped."""

    reads_files = False

    def __init__(self, images: np.ndarray, labels: np.ndarray | None):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def identity(self) -> str:
        """What the images are, whatever path they were opened by."""
        some = self.images[:: max(1, len(self) // 1000)]
        return f"{self.images.shape} uint8, crc32 {zlib.crc32(np.ascontiguousarray(some)):08x}"

    def read(self, index: int) -> list[Image.Image]:
        """The image as Pillow planes: one RGB or L image, or one L image per channel."""
        image = np.ascontiguousarray(self.images[index])
        if image.shape[-1] == 3:
            return [Image.fromarray(image)]
        return [Image.fromarray(image[..., c]) for c in range(image.shape[-1])]

    def subset(self, indices: np.ndarray) -> "ArrayImages":
        return ArrayImages(self.images[indices], take(self.labels, indices))


class FileImages:
    """Image files, decoded by Pillow when they are read."""

    reads_files = True

    def __init__(self, paths, labels: np.ndarray | None, channels: int, root: str):
        self.paths, self.labels, self.channels, self.root = np.array(paths), labels, channels, root

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def identity(self) -> str:
        """What the images are, whatever path they were opened by."""
        names = "\n".join(os.path.relpath(p, self.root) for p in self.paths)
        return f"{len(self)} files, crc32 of the names {zlib.crc32(names.encode()):08x}"

    def read(self, index: int) -> list[Image.Image]:
        """The image as Pillow planes: one RGB or L image, or one L image per channel.

        Raises:
            Exception: whatever Pillow raises for a file that it cannot decode.
        """
        with Image.open(self.paths[index]) as image:
            if image.mode.startswith("I") or image.mode == "F":
                raise ValueError(f"more than 8 bits a channel (Pillow mode {image.mode})")
            image = image.convert(MODES[self.channels])
        return [image] if self.channels != 4 else list(image.split())

    def subset(self, indices: np.ndarray) -> "FileImages":
        return FileImages(self.paths[indices], take(self.labels, indices), self.channels, self.root)


def take(labels: np.ndarray | None, indices: np.ndarray) -> np.ndarray | None:
    return None if labels is None else labels[indices]


def open_images(data: str, split: str, channels: int, limit: int | None = None):
    """Open the images of one split of a data source.

    Args:
        data: "digits" or a folder.
        split: "train" or "test".
        channels: channel count wanted; built-in gray images are repeated to it.
        limit: number of evenly spaced images to take, if not all.

    Raises:
        RunError: there is no such source, or it holds no image.
    """
    with dist.together():
        if data == "digits":
            images = digits(split, channels)
        elif os.path.isdir(data):
            images = folder(data, split, channels)
        else:
            raise RunError(f"--data {data}: neither a built-in name (digits) nor a folder")
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
    return ArrayImages(images.repeat(channels, axis=-1), labels[chosen])


def folder(root: str, split: str, channels: int) -> FileImages:
    """Image files below a folder, or below its `train`, `val` or `test` folder if it has one.

    Labels are the class folders, if every file lies in one; pre-training never looks at them.
    """
    if channels not in MODES:
        raise RunError(f"--in-chans {channels}: files give 1 (L), 3 (RGB) or 4 (RGBA) channels")
    names = ("train",) if split == "train" else ("val", "test")
    found = [os.path.join(root, n) for n in names if os.path.isdir(os.path.join(root, n))]
    if split == "test" and not found:
        raise RunError(f"--data {root}: no val or test folder in it to evaluate on")
    top = found[0] if found else root
    paths = sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(top, followlinks=True)
        for file in files
        if file.lower().endswith(EXTENSIONS)
    )
    if not paths:
        raise RunError(f"--data {top}: no image file in it ({' '.join(EXTENSIONS)})")
    classes = [os.path.relpath(p, top).split(os.sep)[:-1][:1] for p in paths]
    if not all(classes):
        return FileImages(paths, None, channels, top)
    _, labels = np.unique([c[0] for c in classes], return_inverse=True)
    return FileImages(paths, labels, channels, top)


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

    def __init__(self, images, views: list, batch_size: int, seed: int, rank: int, size: int):
        self.images, self.views, self.seed = images, views, seed
        self.batch_size, self.share = batch_size, batch_size // size
        self.first = rank * self.share
        self.steps_per_epoch = len(images) // batch_size

    def __getitem__(self, step: int):
        epoch, step = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.images))
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
            except Exception as error:  # Pillow's decoders raise what they like
                reason = str(error).replace("\n", " ") or type(error).__name__
                problems[index] = reason
        problems[-1] = f"none of the {self.steps_per_epoch} images of slot {slot} could be read"
        blank = [Image.new("L", (8, 8)) for _ in range(self.views[0].channels)]
        return index, blank if len(blank) != 3 else [Image.merge("RGB", blank)]


class Loader:
    """The batches of a run, from `start_step` to the end, prefetched across epochs.

    Args:
        images: a source (`open_images`).
        views: one `augment.View` for every view.
        batch_size: images over all processes.
        workers: loader processes; 0 loads in this process; None takes this process's share of the
            cores.
        start_step: the first step to load, for a run that goes on.

    Raises:
        RunError: fewer images than one batch; too many files that cannot be read.
    """

    def __init__(
        self, images, views, *, batch_size, epochs, seed, world: World, workers=None, start_step=0,
        multiprocessing_context=None,
    ):
        if len(images) < batch_size:
            fits = max(len(images) - len(images) % world.size, world.size)
            raise RunError(
                f"--batch-size {batch_size} is more than the {len(images)} images of --data; "
                f"--batch-size {fits} fits"
            )
        self.images, self.views, self.world = images, views, world
        self.steps_per_epoch = len(images) // batch_size
        self.step, self.bad_files, self.waited = start_step, {}, 0.0
        shares = StepShares(images, views, batch_size, seed, world.rank, world.size)
        steps = range(start_step, epochs * self.steps_per_epoch)
        workers = default_workers() if workers is None else workers
        self.batches = iter(
            torch.utils.data.DataLoader(
                shares,
                batch_size=None,  # an item is a whole batch already
                sampler=steps,
                num_workers=min(workers, len(steps)),
                worker_init_fn=leave_signals_to_the_main_process,
                pin_memory=world.device.type == "cuda",
                multiprocessing_context=multiprocessing_context if workers else None,
            )
        )

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
        if not any(dist.agree(bool(new))):
            return
        joined = {i: r for part in dist.all_gather_objects(new) for i, r in part.items()}
        hopeless = joined.pop(-1, None)
        for i in sorted(joined):
            dist.say(f"unreadable, replaced: {self.images.name(i)}: {joined[i]}")
        self.bad_files.update(joined)
        allowed = max(1, len(self.images) // 100)
        if hopeless or len(self.bad_files) > allowed:
            worst = min(self.bad_files)
            raise RunError(
                hopeless or f"{len(self.bad_files)} of {len(self.images)} files cannot be read (at "
                f"most {allowed} may), such as {self.images.name(worst)}: {self.bad_files[worst]}"
            )


def default_workers() -> int:
    """This process's share of the cores, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def leave_signals_to_the_main_process(_worker: int) -> None:
    """A stop signal sent to every process (Slurm, Ctrl-C) must not take the loader from under a
    step that is to be finished; workers end when the main process does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
