"""Image sources: built-in sets, folders, tars, lists and arrays, decoded to Pillow planes."""

import contextlib
import copy
import io
import math
import os
import re
import sys
import zlib
from xml.etree import ElementTree

import numpy as np
import torchvision
from PIL import Image

from common import distributed as comm, labelled_sets, rng, shards
from common.distributed import RunError
from common.labelled_sets import LABELLED, evenly, every_fifth

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Folders of a system or an archiver, ignored like names that begin with a dot.
NO_DATA = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
UPRIGHT = dict(zip(range(2, 9), (  # what to do about each value of EXIF's orientation
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), strict=True))
TORCHVISION = {name.lower(): name for name in ("CIFAR10", "CIFAR100", "STL10", "SVHN", "MNIST")}
TARS = (".tar", *shards.COMPRESSED)
HELD_OUT = ("val", "test")  # folders that are not trained on
BUILT_IN = ("digits", *TORCHVISION, *LABELLED, "fake")


class NoSplit(RunError):
    """The images are not divided into a training and a test split."""


class RefusedImage(RunError):
    """An image that must not be replaced by another one, but stop the run."""


class UnreadableImage(RunError):
    """An image that cannot be decoded."""


class Images:
    """What all sources have: labels, and a subset of images that know their place in the whole.

    Args:
        items: (N,) what names each image to `read`.
        labels: (N,) integers, or (N, C) where an image may show several classes, or None.
        channels: channel count wanted.
    """

    bits = 8  # a channel
    exif_orientation = False  # whether files are turned as their EXIF tag says
    classes = None  # names of the columns of labels (N, C)
    class_names = None  # of labels (N,), where they have names: label 0 is that of the first
    present = None  # labels (N,) that occur, also where a limit leaves all images of one out

    def __init__(self, items: np.ndarray, labels: np.ndarray | None, channels: int):
        self.items, self.labels, self.channels = items, labels, channels
        self.index = np.arange(len(items))  # of each image in the data set
        self.notes = []  # what reading has met that is to be told once; shared by subsets

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> list[Image.Image]:
        """The image as Pillow planes: one RGB or L image, or one L image per channel.

        Of 16 bits one F image per channel, from 0 to 65535: white is white at any depth.
        """
        planes = self.load(index)
        if self.bits == 8 or planes[0].mode == "F":
            return planes
        return [as_float(np.asarray(band, np.float32) * 257) for p in planes for band in p.split()]

    def read_or_name(self, index: int) -> list[Image.Image]:
        """`read`, whose every error is a RunError that names the image."""
        try:
            return self.read(index)
        except RunError:
            raise
        except Exception as error:  # Pillow's decoders raise what they like
            raise UnreadableImage(f"{self.name(index)} cannot be read: {error}") from error

    def converted(self, image: Image.Image) -> list[Image.Image]:
        """An image of 8 bits a channel as planes, see `read`."""
        pixels = image.convert(MODES[self.channels])
        return list(pixels.split()) if self.channels == 4 else [pixels]

    def renumbered(self, indices: np.ndarray) -> "Images":
        """Some of the images as a data set of their own."""
        part = self.subset(indices)
        part.index = np.arange(len(part))
        return part

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
            raise RunError(f"--in-chans {channels}: the images have {there} channels; "
                           f"pass --in-chans {there}")
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

    def load(self, index: int) -> list[Image.Image]:
        image = np.ascontiguousarray(self.images[self.items[index]])
        image = image if image.ndim == 3 else image[..., None]
        if image.shape[-1] == 3:
            whole = Image.fromarray(image)
            return [whole if self.channels == 3 else whole.convert("L")]
        planes = [Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
        if len(planes) == self.channels:
            return planes
        return [planes[0].convert("RGB")] if self.channels == 3 else planes * self.channels


class EncodedImages(Images):
    """Images in files, decoded by Pillow when they are read.

    Args:
        channels: 1 (L), 3 (RGB) or 4 (RGBA): what files are converted to.

    Raises:
        RunError: files cannot give that many channels.
    """

    reads_files = True

    def __init__(self, items: np.ndarray, labels: np.ndarray | None, channels: int):
        if channels not in MODES:
            raise RunError(f"--in-chans {channels}: files give 1 (L), 3 (RGB) or 4 (RGBA) channels")
        super().__init__(items, labels, channels)

    def decode(self, file, name: str) -> list[Image.Image]:
        """The image as Pillow planes, see `read`.

        Args:
            file: a path or an open file. name: of it, for an error.

        Raises:
            RefusedImage: more bits a channel than `bits`: to cut them down is the user's choice.
            Exception: any that Pillow raises for a file that it cannot decode.
        """
        with Image.open(file) as image:
            turn = self.turn_of(image)
            if image.format == "TIFF" and not self.notes and image.n_frames > 1:
                self.notes.append(f"{name} has {image.n_frames} pages; of such files the first "
                                  "one is read")
            if not is_deep(image):
                if image.mode == "P" and self.channels != 4:  # of which Pillow would warn
                    image.info.pop("transparency", None)
                planes = self.converted(image)
            elif self.bits == 16:
                planes = deep_planes(image, lambda: Image.open(file), name, self.channels)
            else:
                raise RefusedImage(f"{name} has more than 8 bits a channel (Pillow mode "
                                   f"{image.mode}); pass --bits 16, or convert it to 8 bits")
        return planes if turn is None else [plane.transpose(turn) for plane in planes]

    def contents(self) -> str:
        """A checksum of some of the files, as far as they can be read."""
        crc = 0
        for index in evenly(len(self), 16).tolist():
            with contextlib.suppress(OSError, RunError):
                crc = zlib.crc32(self.encoded(index), crc)
        return f"{crc:08x}"

    def turn_of(self, image: Image.Image):
        """How an opened file is to be turned, if it is. Pillow turns TIFFs itself."""
        if self.exif_orientation and image.format != "TIFF":
            with contextlib.suppress(Exception):  # a broken tag does not make a broken image
                return UPRIGHT.get(image.getexif().get(0x0112))
        return None


class FileImages(EncodedImages):
    """Image files.

    Args:
        paths: of the files. root: what they are relative to in `identity`.
    """

    def __init__(self, paths, labels: np.ndarray | None, channels: int, root: str):
        super().__init__(shards.as_bytes(paths), labels, channels)
        self.root = root

    def name(self, index: int) -> str:
        return os.fsdecode(self.items[index])

    def identity(self) -> str:
        """What the images are, regardless of the path they were opened by."""
        start = len(os.fsencode(os.path.join(self.root, "")))
        return identity_of_files([path[start:] for path in self.items.tolist()])

    def encoded(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()

    def load(self, index: int) -> list[Image.Image]:
        return self.decode(self.name(index), self.name(index))


class TarImages(EncodedImages):
    """Image files inside tars, which stay as they are.

    Args:
        tars: their indexes. prefixes: what the names of each one's images begin with, as bytes.
    """

    def __init__(self, tars: list[shards.Tar], prefixes: list[bytes], channels: int):
        names = [prefix + name for tar, prefix in zip(tars, prefixes, strict=True)
                 for name in tar.names.tolist()]
        rows = np.empty(len(names), dtype=[("name", f"S{max(map(len, names), default=1)}"),
                                           ("tar", "i4"), ("offset", "i8"), ("size", "i8")])
        rows["name"] = names
        rows["tar"] = np.repeat(np.arange(len(tars)), [len(tar.names) for tar in tars])
        rows["offset"] = np.concatenate([tar.offsets for tar in tars])
        rows["size"] = np.concatenate([tar.sizes for tar in tars])
        super().__init__(rows, None, channels)
        self.tars = [(tar.path, tar.size, tar.mtime) for tar in tars]
        self.prefixes = prefixes

    def name(self, index: int) -> str:
        name, tar, *_ = self.items[index].item()
        return os.path.join(self.tars[tar][0], os.fsdecode(name[len(self.prefixes[tar]) :]))

    def identity(self) -> str:
        """What the images are; the same as of files of these names."""
        return identity_of_files(self.items["name"].tolist())

    def encoded(self, index: int) -> bytes:
        _, tar, offset, size = self.items[index].item()
        return shards.read_member(*self.tars[tar], offset, size)

    def load(self, index: int) -> list[Image.Image]:
        return self.decode(io.BytesIO(self.encoded(index)), self.name(index))


def identity_of_files(names: list[bytes]) -> str:
    crc = zlib.crc32(b"\n".join(names))
    return f"{len(names)} files, crc32 of the names {crc:08x}"


class DecodedImages(Images):
    """Images that a torchvision data set, of some name, reads itself: pairs (image, label)."""

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

    def load(self, index: int) -> list[Image.Image]:
        return self.converted(self.loaded[self.items[index]][0])


class JoinedImages(Images):
    """Images of several sources, those of the first one first; without labels."""

    def __init__(self, parts: list, channels: int):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])
        super().__init__(np.arange(self.ends[-1]), None, channels)
        self.reads_files = any(part.reads_files for part in parts)
        for part in parts:
            part.notes = self.notes

    def place(self, index: int) -> tuple[Images, int]:
        """The source of an image, and its number there."""
        item = int(self.items[index])
        part = int(np.searchsorted(self.ends, item, side="right"))
        return self.parts[part], item - int(self.ends[part]) + len(self.parts[part])

    def name(self, index: int) -> str:
        part, row = self.place(index)
        return part.name(row)

    def identity(self) -> str:
        """What the images are: of each source those that are taken.

        Contents of some files tell two sources of the same names apart, such as two cameras'.
        """
        pieces = np.split(self.items, np.searchsorted(self.items, self.ends[:-1]))
        taken = [part.subset(rows - end + len(part))
                 for part, rows, end in zip(self.parts, pieces, self.ends, strict=True)]
        return "; ".join(
            f"{part.identity()}, of contents {part.contents()}" if isinstance(part, EncodedImages)
            else part.identity() for part in taken if len(part))

    def load(self, index: int) -> list[Image.Image]:
        part, row = self.place(index)
        return part.load(row)


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


def deep_planes(image: Image.Image, again, name: str, channels: int) -> list[Image.Image]:
    """The channels, from 0 to 65535, of an opened file of 16 bits a channel (PNG, TIFF, PGM).

    Pillow cuts RGB to its high bytes. Told that the bytes of a pixel come in the other order, it
    gives the low ones.

    Args:
        again: opens the file once more.

    Raises:
        RefusedImage: pixels that Pillow cannot give in full.
    """
    raws = re.findall(r"[^\s'(]*;16[^\s',)]*", str([tile.args for tile in image.tile]))
    gray = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not gray and not (image.format in ("PNG", "TIFF") and len(raws) == len(image.tile) and all(
            re.fullmatch(r"RGBA?;16[LBN]", raw) for raw in raws)):
        raise RefusedImage(f"{name}: Pillow cannot give all bits of its pixels (mode {image.mode}, "
                           f"{image.format} {' '.join({*raws})}); read are gray and RGB of 16 bits "
                           "in PNG and TIFF, and gray in PGM")
    image.load()
    values = np.asarray(image).astype(np.float32)
    if gray:
        bands = [values] * min(channels, 3)
    else:
        with again() as other:
            other.tile = [tile._replace(args=other_end(tile.args)) for tile in other.tile]
            other.load()  # numpy would not tell its errors
            values = values * 256 + np.asarray(other)
        bands = list(values.transpose(2, 0, 1))
        if channels == 1:  # Pillow's weights
            bands = [0.299 * bands[0] + 0.587 * bands[1] + 0.114 * bands[2]]
    if channels == 4 and len(bands) == 3:
        bands.append(np.full_like(values[..., 0] if values.ndim == 3 else values, 65535))
    return [as_float(band) for band in bands[:channels]]


def other_end(arguments):
    """A decoder's arguments, with the bytes of 16-bit pixels in the other order."""
    if isinstance(arguments, tuple):
        return tuple(map(other_end, arguments))
    native = "L" if sys.byteorder == "little" else "B"
    return re.sub(r";16([LBN])$", lambda raw: ";16B" if raw[1].replace("N", native) == "L" else
                  ";16L", arguments) if isinstance(arguments, str) else arguments


def as_float(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(values, np.float32))


def open_images(data: str | list[str], split: str, channels: int, *, root: str = "data",
                download: bool = False, limit: int | None = None, whole: bool = False,
                classes: dict[str, int] | None = None, index: str | None = None, bits: int = 8,
                exif_orientation: bool = False):
    """Open the images of one split of a data source.

    Args:
        data: a name of `BUILT_IN`, a folder, a tar, a folder of tars, a text list, or a `.npy` file
            (docs/guide.md). Several, of pre-training alone, are joined in their order.
        split: "pretrain" (all that may be learned from without labels), "train" or "test".
        channels: channel count wanted.
        root: the folder of torchvision's data sets.
        download: fetch a torchvision data set that is not there.
        limit: number of evenly spaced images to take, if not all.
        whole: a list, or a folder without a folder for this split, is all of the split.
        classes: numbers of the classes by name, where other images have fixed them.
        index: the folder where the indexes of tars are kept; None: they are not.
        bits: 8 or 16 a channel (`Images.read`). exif_orientation: turn photographs upright.

    Raises:
        RunError: there is no such source, it holds no image, or a class that is not in `classes`.
    """
    if isinstance(data, list):
        if split != "pretrain":
            raise NoSplit(f"--data {' '.join(data)}: several sources have no {split} split; name "
                          "one that has labels with --data")
        options = dict(root=root, download=download, whole=whole, classes=classes, index=index,
                       bits=bits, exif_orientation=exif_orientation)
        images = JoinedImages([open_images(one, split, channels, **options) for one in data],
                              channels)
        images.bits = bits
        return images if limit is None else images.subset(evenly(len(images), limit))
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
            images = folder(data, split, channels, whole, classes, index)
        elif os.path.isfile(data) and data.lower().endswith(TARS):
            images = tar_images([data], data, split, channels, whole, classes, index)
        elif os.path.isfile(data) and (split == "pretrain" or whole):
            read = array_file if data.endswith(".npy") else text_list
            images = read(data, channels)
        elif os.path.isfile(data):
            raise NoSplit(f"--data {data}: one file has no {split} split; give a folder with "
                           "train/ and val/ or test/, and class folders in them, or --test-data")
        else:
            raise RunError(f"--data {data}: no such file or folder, and no built-in name "
                           f"({' '.join(BUILT_IN)})")
    images.bits, images.exif_orientation = bits, exif_orientation
    if images.labels is not None and images.labels.ndim == 1:
        images.present = np.unique(images.labels)
    return images if limit is None else images.subset(evenly(len(images), limit))


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
        raise RunError(f"--data {name}: missing or incomplete under --data-root {root}; pass "
                       "--download to fetch it, or name the folder that has it") from error
    images = np.asarray(loaded.data)
    if name in ("stl10", "svhn"):
        images = images.transpose(0, 2, 3, 1)
    labels = np.asarray(loaded.labels if name in ("stl10", "svhn") else loaded.targets)
    images = ArrayImages(images, labels, channels)
    images.class_names = getattr(loaded, "classes", None)
    return images


def folder(root: str, split: str, channels: int, whole: bool = False, numbers: dict | None = None,
           index: str | None = None) -> EncodedImages:
    """Image files below a folder, or below its `train`, `val` or `test` folder if it has one.

    Labels are the class folders; pre-training never looks at them. A file beside class folders has
    no label and is left out with them, as are hidden files and folders in any case. A folder of
    tars alone gives the images in them.

    Args:
        whole: without such a folder, all is the split.
        numbers: of the classes by name, if not in the order of the training split's folders.
        index: the folder of the tars' indexes.

    Raises:
        RunError: no image; no such split; a class of the test split that is not in the training
            split, where it has another number or none.
    """
    names = HELD_OUT if split == "test" else ("train",)
    found = [os.path.join(root, n) for n in names if os.path.isdir(os.path.join(root, n))]
    anything = whole or split == "pretrain"
    if anything and split != "test" and found and train_is_a_class(root):
        found = []
    top = found[0] if found else os.path.normpath(root)
    held_out = [] if found else [n for n in HELD_OUT if holds_images(os.path.join(root, n))]
    paths = tars = []
    if anything or found:
        paths, tars = files_below(top, [os.path.join(top, n) for n in held_out])
    if not paths and (tars := files_below(os.path.normpath(root))[1]):  # of all splits
        return tar_images(tars, root, split, channels, whole, numbers, index)
    if not anything and not found:
        raise NoSplit(f"--data {root}: no {' or '.join(names)} folder in it to evaluate with; "
                      "give a folder with train/ and val/ or test/, or --test-data")
    beside = f", {' and '.join(held_out)} held out" if held_out else ""
    if not paths:
        raise RunError(f"--data {top}: no image file in it{beside} ({' '.join(EXTENSIONS)})")
    if tars:
        comm.print_main(f"warning: not read beside images: {some(tars)}; pass them to --data")
    if held_out:
        comm.print_main(f"warning: {top}: {' and '.join(held_out)} taken for held-out images and "
                        "not trained on; a class needs another name")
    inside = [path[len(os.path.join(top, "")) :].split(os.sep) for path in paths]
    images = FileImages(paths, None, channels, top)
    if split == "pretrain" or all(len(parts) == 1 for parts in inside):
        return images
    classes = [parts[0] if len(parts) > 1 else None for parts in inside]
    # A class has the same number in every split: that of the training split.
    train = top if anything else os.path.join(root, "train")
    known = None
    if numbers is None:
        known = subfolders(train) if os.path.isdir(train) else sorted({*classes} - {None})
        known = [name for name in known if found or name not in HELD_OUT]
    return with_classes(images, classes, known, numbers, root, top,
                        "the training set" if anything else train, split)


def with_classes(images, classes: list, known: list | None, numbers: dict | None, source: str,
                 top: str, train: str, split: str):
    """The images that have a class, with its number as label.

    Args:
        classes: name of each image's class, or None. known: the classes in order; or None, and
            `numbers` by name. source, top, train: of the images, in messages.

    Raises:
        RunError: a class that is not known.
    """
    has_class = np.array([name is not None for name in classes])
    if not has_class.all():
        stray = [images.name(row) for row in np.flatnonzero(~has_class)]
        comm.print_main(f"warning: left out, for no class folder holds it: {some(stray)}")
        images = images.renumbered(np.flatnonzero(has_class))
        classes = [name for name in classes if name is not None]
    if numbers is None:
        numbers = {name: label for label, name in enumerate(known)}
    there = subfolders(top) if os.path.isdir(top) and split != "train" else known or classes
    unknown, empty = set(classes) - set(numbers), set(there) - set(classes)
    if unknown:
        raise RunError(f"--data {source}: class folders of {top} that {train} does not have: "
                       f"{some(unknown)}; a class has one name in both")
    if empty:
        comm.print_main(f"warning: class folders of {top} without an image: {some(empty)}")
    images.labels = np.array([numbers[name] for name in classes])
    images.class_names = known
    return images


def train_is_a_class(root: str) -> bool:
    """Whether the folder `train` is a class: one flat folder of images among others."""
    train = os.path.join(root, "train")
    beside = [name for name in subfolders(root)
              if name not in ("train", *HELD_OUT) and holds_images(os.path.join(root, name))]
    nested = any(holds_images(os.path.join(train, name)) for name in subfolders(train))
    return is_a_class(train, beside, nested or any(
        os.path.isdir(os.path.join(root, name)) for name in HELD_OUT))


def is_a_class(train: str, beside: list[str], like_a_split: bool) -> bool:
    """Whether a folder `train` is a class like the folders of images beside it, which is told.

    With a test split beside it, or with class folders in it, it is the training split.
    """
    if not beside:
        return False
    if like_a_split:
        comm.print_main(f"warning: {train} is taken for the training split; beside it, not trained "
                        f"on: {some(beside)}")
        return False
    comm.print_main(f"warning: {train} is taken for a class like {some(beside)}; for the training "
                    f"split pass --data {train}")
    return True


def tar_images(paths: list[str], root: str, split: str, channels: int, whole: bool = False,
               numbers: dict | None = None, index: str | None = None) -> TarImages:
    """Images in tars, in the order of their names, as if each tar were a folder of its name.

    Folders that all images share are passed over. Splits are those of `folder`. The class of an
    image is what its `.cls` file says; or its folder inside the tar; or the name of its tar, if
    that is in another tar or in a folder of tars.

    Args:
        paths: of the tars. root: one tar, or the folder that all are in.

    Raises:
        RunError: as of `folder`; a tar that cannot be used; a `.cls` file without a whole number.
    """
    tars = [shards.read_index(path, index, is_data) for path in paths]
    start = 0 if paths == [root] else len(os.path.join(os.path.normpath(root), ""))
    prefixes = [os.fsencode(path[start:-len(".tar")] + "/") if start else b"" for path in paths]
    images = TarImages(tars, prefixes, channels)
    if not len(images):
        raise RunError(f"--data {root}: no image file in it ({' '.join(EXTENSIONS)})")
    inner = np.concatenate([len(prefix) + tar.inner for prefix, tar in zip(
        prefixes, tars, strict=True)])
    told = np.concatenate([tar.classes for tar in tars])
    order = np.argsort(images.items["name"], kind="stable")
    images = images.subset(order)
    inner, told, names = inner[order].tolist(), told[order], images.items["name"].tolist()
    shared = len(shared_folder(names))
    tops = [name[shared:].partition(b"/") for name in names]
    tops = np.array([os.fsdecode(top) if slash else "" for top, slash, _ in tops])

    wanted = HELD_OUT if split == "test" else ("train",)
    there = set(tops.tolist()) - {""}
    found = [name for name in wanted if name in there]
    anything = whole or split == "pretrain"
    if anything and found == ["train"]:
        nested = any(name.count(b"/", shared) > 1 for name, top in zip(names, tops, strict=True)
                     if top == "train")
        if is_a_class(f"{root}: train", sorted(there - {"train", *HELD_OUT}),
                      nested or not there.isdisjoint(HELD_OUT)):
            found = []
    if not anything and not {"train", *found[:1]} <= there:
        raise NoSplit(f"--data {root}: no train and {' or '.join(HELD_OUT)} folder in it to "
                      "evaluate with; or name those to test on with --test-data")
    held_out = [] if found else sorted(there.intersection(HELD_OUT))
    rows = np.flatnonzero(tops == found[0] if found else ~np.isin(tops, held_out))
    if not len(rows):
        raise RunError(f"--data {root}: no image file in it, {' and '.join(held_out)} held out")
    if held_out:
        comm.print_main(f"warning: {root}: {' and '.join(held_out)} taken for held-out images and "
                        "not trained on; a class needs another name")
    part = images.renumbered(rows)
    if split == "pretrain":
        return part

    if (told != b"").any():
        return with_numbers(part, told[rows], root, split)
    splits = {"train", *HELD_OUT} if found else ()
    starts = [shared + (len(top) + 1 if top in splits else 0) for top in tops.tolist()]
    insides = [name[max(pair) :] for name, *pair in zip(names, starts, inner, strict=True)]
    for top in splits:  # train.tar has all of its images in a folder train
        of = np.flatnonzero(tops == top)
        if all(insides[row].startswith(os.fsencode(f"{top}/")) for row in of):
            for row in of:
                insides[row] = insides[row][len(top) + 1 :]
    lead = len(shared_folder(insides))
    every = [name_of_class(name[start:end], inside[lead:]) for name, start, end, inside in
             zip(names, starts, inner, insides, strict=True)]
    classes, known = [every[row] for row in rows], None
    if not any(classes):
        return part
    if numbers is None:
        of = rows if anything else np.flatnonzero(tops == "train")
        known = sorted({every[row] for row in of} - {None})
    return with_classes(part, classes, known, numbers, root, root, "the training set", split)


def with_numbers(images: TarImages, told: np.ndarray, root: str, split: str):
    """The images whose class is known, with labels: the numbers that their `.cls` files hold."""
    if not (told != b"").any():  # folders' numbers would be others
        raise RunError(f"--data {root}: no image of the {split} split has a .cls file, and others "
                       "have; one or the other says the class of all")
    if wrong := [row for row, text in enumerate(told)
                 if text and not (text.isdigit() and len(text) < 10)]:
        raise RunError(f"{images.name(wrong[0])}: its .cls file holds {bytes(told[wrong[0]])!r}; "
                       "wanted a whole number")
    if not (told != b"").all():
        comm.print_main(f"warning: {root}: left out, for they have no .cls file: "
                        f"{(told == b'').sum()} of {len(told)} images")
    images = images.renumbered(np.flatnonzero(told != b""))
    images.labels = told[told != b""].astype(np.int64)
    return images


def shared_folder(names) -> bytes:
    """The folders that all names begin with, before one of images and before a split's."""
    both = os.path.commonprefix([min(names), max(names)])
    parts = both[: both.rfind(b"/") + 1].split(b"/")[:-1]
    if not all(name.count(b"/") > len(parts) for name in names):
        parts = parts[:-1]
    splits = [n for n, part in enumerate(parts) if part in (b"train", b"val", b"test")]
    return b"".join(part + b"/" for part in parts[: splits[0] if splits else None])


def name_of_class(tar: bytes, inside: bytes) -> str | None:
    """The folder that an image is in inside its tar, else the name of its tar."""
    top, slash, _ = inside.partition(b"/")
    return os.fsdecode(top if slash else tar.rstrip(b"/").rpartition(b"/")[2]) or None


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


def is_data(name: str, endings=EXTENSIONS) -> bool:
    """Whether a file of some name, with its folders, is one of data: an image, or of `endings`."""
    return name.lower().endswith(endings) and not any(map(is_hidden, name.split("/")))


def files_below(top: str, without=()) -> tuple[list[str], list[str]]:
    """Sorted paths of the image files and of the tars below a folder (`walk`)."""
    found = sorted(os.path.join(parent, file)
                   for parent, files in walk(top, without, (*EXTENSIONS, *TARS)) for file in files)
    tars = [path for path in found if path.lower().endswith(TARS)]
    return [path for path in found if not path.lower().endswith(TARS)] if tars else found, tars


def walk(top: str, without=(), endings=EXTENSIONS):
    """Folders below `top` and their image files; a link to a folder that holds it is not followed.

    Args:
        top: a folder. endings: of files, if not those of images.
        without: paths of folders below it that are left out.

    Raises:
        RunError: a folder cannot be read; `os.walk` alone would pass over it in silence.
    """

    def stop(error):
        raise RunError(f"{error.filename}: {error.strerror}; make the folder readable, or move it")

    for parent, folders, files in os.walk(top, followlinks=True, onerror=stop):
        inside = os.path.join(os.path.realpath(parent), "")
        for name in list(folders):
            path = os.path.join(parent, name)
            loops = os.path.islink(path) and inside.startswith(
                os.path.join(os.path.realpath(path), ""))
            if loops or is_hidden(name) or path in without:
                folders.remove(name)
        yield parent, [file for file in files
                       if file.lower().endswith(endings) and not is_hidden(file)]


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
