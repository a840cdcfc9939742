"""Images with a label map each, which gives every pixel a class: sources, checks, one view of both.

`read` of such a source gives the image's Pillow planes and, last, the map as a plane of mode "P",
which Pillow resizes without mixing values. Pixels that do not count are `IGNORED` in it.
"""

import math
import os
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from common import augment, cli, distributed as comm, images, rng
from common.distributed import RunError, World
from common.images import ArrayImages, FileImages, RefusedImage, evenly
from common.shards import as_bytes
from common.workers import end_if_unsent, made_ahead

IGNORED = 255
BUILT_IN = ("digits", "voc2012")
SPLITS = {"train": ("train", "training"), "test": ("val", "validation", "test")}  # folders' names

# ------------------------------------------------------------------------------------------ sources


class Mapped:
    """What a source of images gains by having label maps; the first of two bases."""

    ignore = (IGNORED,)  # what maps say of pixels that do not count

    def read(self, index: int) -> list[Image.Image]:
        """The image's planes and its map.

        Raises:
            RefusedImage: the map is of another size, has colours, or numbers that are no classes.
        """
        planes, values = super().read(index), self.label_map(index)
        counted = ~np.isin(values, self.ignore)
        wrong = values[counted & ((values < 0) | (values >= IGNORED))]
        if len(wrong):
            raise RefusedImage(f"the label map of {self.name(index)} has class {wrong.max()}; the "
                               f"largest there can be is {IGNORED - 1} (--ignore takes others out)")
        classes = np.where(counted, values, IGNORED).astype(np.uint8)
        size = classes.shape[::-1]
        if planes[0].size != size:
            raise RefusedImage("{} has {} x {} px, and its label map {} x {}".format(
                self.name(index), *planes[0].size, *size))
        return [*planes, Image.frombytes("P", size, classes.tobytes())]


class MappedFiles(Mapped, FileImages):
    """Image files, and `labels` (N,) the paths of their maps: PNG, palette or gray."""

    def label_map(self, index: int) -> np.ndarray:
        path = os.fsdecode(self.labels[index])
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
        if values.ndim != 2 or values.dtype.kind not in "bui":
            raise RefusedImage(f"{path} is no label map (Pillow mode {mode}): that has one whole "
                               "number a pixel, palette or gray")
        return values


class MappedArrays(Mapped, ArrayImages):
    """Images in an array, and `labels` (N, H, W) their maps."""

    def label_map(self, index: int) -> np.ndarray:
        return self.labels[index]


def open_mapped(data: str, split: str, channels: int, *, labels: str | None, ignore,
                root: str = "data", download: bool = False, limit: int | None = None,
                exif_orientation: bool = False) -> MappedFiles | MappedArrays:
    """Open the images of a split, "train" or "test", with their label maps.

    Args:
        data: one of `BUILT_IN`, or a folder with a folder for each split.
        labels: of a folder, that of the maps: `train/a.jpg` has the map `train/a.png`.
        ignore: what maps say of pixels that do not count.
        exif_orientation: turn photographs upright, as their maps are then.

    Raises:
        RunError: there is no such source; an image has no map.
    """
    if data == "voc2012" and download:
        with comm.same_error_on_all_ranks(writing=root):  # one process a machine fetches
            if comm.env_int("LOCAL_RANK", 0) == 0:
                voc2012(split, channels, root, download=True)
    with comm.same_error_on_all_ranks():
        if data == "digits":
            found = drawn_digits(split, channels)
        elif data == "voc2012":
            found = voc2012(split, channels, root, download=False)
        elif labels and isinstance(data, str) and os.path.isdir(data):
            found = folders(data, labels, split, channels)
        else:
            raise RunError(f"--data {cli.as_given(data)} has no label maps; give one of "
                           f"{' '.join(BUILT_IN)}, or two folders: --data and --labels")
    found.ignore, found.exif_orientation = ignore, exif_orientation
    return found if limit is None else found.subset(evenly(len(found), limit))


def voc2012(split: str, channels: int, root: str, download: bool) -> MappedFiles:
    """VOC 2012: 1,464 training images, and the 1,449 validation images to test on."""
    try:
        loaded = torchvision.datasets.VOCSegmentation(
            root, year="2012", image_set="train" if split == "train" else "val", download=download)
    except (RuntimeError, OSError) as error:
        raise RunError(f"--data voc2012: not (whole) under --data-root {root}, as VOCdevkit/VOC2012"
                       "; pass --download to fetch it, or name another folder") from error
    found = MappedFiles(loaded.images, as_bytes(loaded.masks), channels, root)
    known = torchvision.models.segmentation.FCN_ResNet50_Weights.DEFAULT.meta["categories"]
    found.class_names = ("background", *known[1:])
    return found


def folders(data: str, labels: str, split: str, channels: int) -> MappedFiles:
    """Images below a folder of the split, and their maps below that of the labels."""
    top, maps = (split_folder(flag, folder, split)
                 for flag, folder in (("--data", data), ("--labels", labels)))
    if os.path.realpath(top) == os.path.realpath(maps):
        raise RunError(f"--labels {labels} is --data; the label maps need a folder of their own")
    found = sorted(os.path.join(parent, name) for parent, names in images.walk(top)
                   for name in names)
    if not found:
        raise RunError(f"--data {data}: no image file in {top}")
    wanted = [os.path.join(maps, os.path.splitext(os.path.relpath(path, top))[0] + ".png")
              for path in found]
    missing = [pair for pair in zip(found, wanted, strict=True) if not os.path.isfile(pair[1])]
    if missing:
        raise RunError(f"{len(missing)} of {len(found)} images have no label map, such as "
                       f"{missing[0][0]}, which needs {missing[0][1]}")
    return MappedFiles(found, as_bytes(wanted), channels, top)


def split_folder(flag: str, folder: str, split: str) -> str:
    for name in SPLITS[split]:
        if os.path.isdir(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise RunError(f"{flag} {folder}: no folder {' or '.join(SPLITS[split])} in it")


def drawn_digits(split: str, channels: int, side: int = 48, noise: int = 96) -> MappedArrays:
    """Three of the built-in digits of a split on noise; a stroke's pixels are of the digit's class.

    400 training and 200 test images. `native_side` is the size at which digits are as in training.
    """
    shapes = images.digits(split, 1)
    count = 400 if split == "train" else 200
    pixels = np.empty((count, side, side), np.uint8)
    classes = np.zeros_like(pixels)
    for i in range(count):
        generator = rng.philox(0, rng.FAKE, i, split == "test")
        pixels[i] = generator.integers(0, noise, (side, side))
        for row in generator.integers(len(shapes), size=3):
            shape = np.asarray(shapes.read(row)[0])
            top, left = generator.integers(side - len(shape) + 1, size=2)
            box = i, slice(top, top + len(shape)), slice(left, left + len(shape))
            pixels[box], classes[box] = shape, shapes.labels[row] + 1
    found = MappedArrays(pixels[..., None], classes, channels)
    found.class_names, found.native_side = ("background", *"0123456789"), side
    return found


# -------------------------------------------------------------------------------------------- sizes


def fitted(size: tuple[int, int], shorter: float) -> tuple[int, int]:
    """The (width, height) with this shorter side, or a longer one of four times that."""
    scale = min(shorter / min(size), 4 * shorter / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def resized(source, index: int, shorter: int) -> tuple[Tensor, Tensor, Tensor]:
    """An image (C, h, w) and its map (h, w), of the `fitted` size, and the map as it was; uint8."""
    planes = source.read_or_name(index)
    size = fitted(planes[0].size, shorter)
    small = [np.asarray(plane.resize(size, Image.Resampling.BILINEAR)) for plane in planes]
    *pixels, classes = small
    pixels = pixels[0].transpose(2, 0, 1) if pixels[0].ndim == 3 else np.stack(pixels)
    return tuple(torch.from_numpy(x.copy()) for x in (pixels, classes, np.asarray(planes[-1])))


class MappedView(augment.View):
    """A view of an image and of its map: what it gives has the classes as one more channel."""

    def __init__(self, size, steps: list, channels: int):
        super().__init__(size, steps, channels)
        self.channels = channels + 1

    def crop(self, planes, parameters):
        image = super().crop(planes[:-1], parameters)
        return np.concatenate([image, super().crop(planes[-1:], parameters)])

    def finish(self, crops, parameters, device):
        finished = super().finish(crops[:, :-1], parameters, device)
        classes = crops[:, -1:].to(device, non_blocking=True)
        return torch.cat([finished, classes.to(finished.dtype)], dim=1)


@dataclass
class ScaledCrop(augment.Step):
    """Resize to `fitted` of `resize` times a random factor; cut the view out at any place.

    Args:
        factor: range of the factor, which is uniform.
        fill: 0-255, of each channel beyond the image, where its map is `IGNORED`.
    """

    resize: int
    factor: tuple[float, float]
    fill: tuple[int, ...]
    interpolation: str
    geometric = resizes = True
    num_uniforms = 3

    def apply(self, plane, u, size):
        factor = self.factor[0] + (self.factor[1] - self.factor[0]) * u[0]
        plane = plane.resize(fitted(plane.size, self.resize * factor),
                             augment.INTERPOLATION[self.interpolation])
        left, top = (math.floor(share * (max(0, there - wanted) + 1))
                     for share, there, wanted in zip(u[1:], plane.size, size[::-1], strict=True))
        fill = tuple(self.fill)
        if plane.mode == "P":
            fill = IGNORED
        elif len(fill) != len(plane.getbands()):
            fill = round(sum(fill) / len(fill))
        canvas = Image.new(plane.mode, size[::-1], fill)
        canvas.paste(plane, (-left, -top))
        return canvas


# --------------------------------------------------------------------------------------- one by one


def each(source, function, world: World, workers: int | None):
    """Iterate over (index, function(source, index)) of this process's part of the images.

    An image or a map that cannot be read is a RunError, on this process alone.
    """
    part = range(len(source))[world.part(len(source))]
    made = made_ahead(function, source, part, workers, world.device, end_if_unsent)
    return zip(part, made, strict=True)


def size_and_counts(source, index: int) -> tuple[Tensor, Tensor]:
    """Width, height and checksum of a map (3,), and how many pixels have each number (256,)."""
    classes = np.asarray(source.read_or_name(index)[-1])
    counts = np.bincount(classes.ravel(), minlength=IGNORED + 1)
    size = *classes.shape[::-1], zlib.crc32(classes.tobytes())
    return torch.tensor(size), torch.from_numpy(counts)


def survey(source, num_classes: int | None, world: World, workers) -> tuple[Tensor, Tensor]:
    """Read every image and map once, before anything is made of them.

    Returns:
        Widths, heights and checksums (N, 3), and how many pixels there are of each number (256,);
        int64, equal on every process.

    Raises:
        RunError: one cannot be read, does not fit its image, or has a class too many.
    """
    sizes, counts = torch.zeros(len(source), 3, dtype=torch.int64), torch.zeros(256).long()
    with comm.same_error_on_all_ranks():
        for index, (size, found) in each(source, size_and_counts, world, workers):
            beyond = found[num_classes or IGNORED : IGNORED].nonzero()
            if len(beyond):
                raise RunError(f"{source.name(index)}: class {num_classes + beyond[-1].item()} in "
                               f"its label map, and classes are 0 to {num_classes - 1} (raise "
                               "--num-classes, or give the number to --ignore)")
            sizes[index] = size
            counts += found
    return comm.sum_over_processes(sizes), comm.sum_over_processes(counts)


class Splits:
    """Training and test images with label maps, read once for a check.

    Args:
        num_classes: 0 to C - 1; None: as the data set has it, or up to the largest in training.
        options: of `open_mapped`.

    Attributes:
        splits: both. sizes: widths and heights (N, 2) of both.
        num_classes: C. names: of the classes.
        there: (c,), the classes that a training pixel has.
        number: (256,), the place of each among these, or `IGNORED`.
        digest: of the training images' label maps.

    Raises:
        RunError: something cannot be read or does not fit; nothing to tell apart.
    """

    def __init__(self, data, channels: int, num_classes: int | None, world: World, workers,
                 **options):
        self.splits = [open_mapped(data, split, channels, **options) for split in ("train", "test")]
        names, found = self.splits[0].class_names, []
        num_classes = num_classes or (len(names) if names else None)
        for source, split in zip(self.splits, ("training", "test"), strict=True):
            found.append(survey(source, num_classes, world, workers))
            there = found[-1][1][:IGNORED].nonzero()[:, 0].tolist()
            if len(there) < 2 - (split == "test"):
                what = f"class {there[0]} has every pixel that counts" if there else (
                    "no pixel counts")
                ignored = " ".join(map(str, options["ignore"]))
                raise RunError(f"--data {data}: {what} of the {len(source)} {split} images "
                               f"(--ignore {ignored}); nothing to tell apart")
            num_classes = num_classes or there[-1] + 1
        self.num_classes, (sizes, (counts, tested)) = num_classes, zip(*found, strict=True)
        self.sizes = [rows[:, :2] for rows in sizes]
        self.names = [*(names or ()), *map(str, range(len(names or ()), num_classes))][:num_classes]
        self.digest = f"{zlib.crc32(sizes[0].numpy().tobytes()):08x}"
        self.there = counts[:IGNORED].nonzero()[:, 0].to(world.device)
        self.number = torch.full((256,), IGNORED, device=world.device)
        self.number[self.there] = torch.arange(len(self.there), device=world.device)
        unseen = [self.names[c] for c in range(num_classes) if tested[c] and not counts[c]]
        if unseen:
            comm.print_main(f"warning: classes without a training pixel: {' '.join(unseen)}")

    def check_patches(self, resize: int, side: int) -> None:
        """Stop at an image that is narrower than a patch."""
        for source, sizes in zip(self.splits, self.sizes, strict=True):
            for index, size in enumerate(sizes.tolist()):
                now = fitted(size, resize)
                if min(now) < side:
                    raise RunError("{} has {} x {} px, so {} x {} at --resize {}, less than a "
                                   "patch of {} px".format(source.name(index), *size, *now, resize,
                                                           side))
