import errno
import functools
import os
import pickle
import shutil
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from common import augment, features
from common.distributed import RunError, World
from common.images import MODES, TORCHVISION, ArrayImages, NoSplit, RefusedImage, open_images
from common.loader import Loader
from helpers import random_images

# ------------------------------------------------------------------------------------------ sources


def test_digits_are_all_there_balanced_and_split_without_overlap():
    train, test = (open_images("digits", split, 3) for split in ("train", "test"))
    assert len(train) + len(test) == 1797 and (len(train), len(test)) == (1442, 355)
    share = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert np.allclose(share, 0.2, atol=0.01)
    seen = {train.images[row].tobytes() for row in train.items}
    assert not any(test.images[row].tobytes() in seen for row in test.items)
    assert train.read(0)[0].size == (16, 16) and train.read(0)[0].mode == "RGB"


@pytest.fixture
def fifty(tmp_path):
    """The same fifty images in every form of `--data`."""
    rng = np.random.default_rng(0)
    names = [f"{number:02d} x.png" for number in range(50)]
    flat, nested, classes = tmp_path / "flat", tmp_path / "nested", tmp_path / "classes"
    for number, name in enumerate(names):
        pixels = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        nests = [nested / str(number % 3) / str(number % 2), classes / "train" / "ab"[number % 2]]
        for place in (flat, *nests):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / name)
    (classes / "val").mkdir()
    (flat / "notes.md").write_text("not an image")
    (tmp_path / "list.txt").write_text("".join(f"flat/{name}\n" for name in names))
    labelled = "".join(f"flat/{name} {number % 2}\n" for number, name in enumerate(names))
    (tmp_path / "labelled.txt").write_text(labelled)
    np.save(tmp_path / "paths.npy", np.array([f"flat/{name}" for name in names]))
    return tmp_path


@pytest.mark.parametrize(
    "form", ["flat", "nested", "classes", "list.txt", "labelled.txt", "paths.npy"]
)
def test_the_same_images_in_any_form_are_the_same_set(fifty, form):
    images = open_images(str(fifty / form), "pretrain", 3)
    pixels = {images.read(i)[0].tobytes() for i in range(len(images))}
    expected = {Image.open(p).tobytes() for p in (fifty / "flat").glob("*.png")}
    assert len(images) == 50 and pixels == expected
    assert all(images.name(i).endswith("x.png") for i in range(50))


def names(images):
    return [images.name(i) for i in range(len(images))]


def test_a_link_to_a_folder_that_holds_it_is_not_followed(fifty):
    (fifty / "linked" / "deep").mkdir(parents=True)
    (fifty / "linked" / "deep" / "back").symlink_to(fifty / "linked")
    (fifty / "linked" / "deep" / "here").symlink_to(fifty / "flat")
    images = open_images(str(fifty / "linked"), "pretrain", 3)
    assert len(images) == 50 and all("deep/here/" in name for name in names(images))


def test_a_list_that_names_no_file_is_refused_with_its_first_line(fifty):
    (fifty / "words.txt").write_text("flat/00x.png cat\nflat/01x.png dog\n")
    with pytest.raises(RunError, match=r"first line names no file, .*00x\.png cat; .*number"):
        open_images(str(fifty / "words.txt"), "pretrain", 3)


def test_labels_come_from_class_folders_and_lists(fifty):
    classes = open_images(str(fifty / "classes"), "train", 3)
    assert ["ab"[y] for y in classes.labels] == [p.split(os.sep)[-2] for p in names(classes)]
    listed = open_images(str(fifty / "labelled.txt"), "pretrain", 3)
    assert listed.labels.tolist() == [number % 2 for number in range(50)]
    assert open_images(str(fifty / "flat"), "pretrain", 3).labels is None


def test_limit_takes_evenly_spaced_images_of_the_sorted_list(fifty):
    images = open_images(str(fifty / "flat"), "pretrain", 3, limit=5)
    assert [os.path.basename(p)[:2] for p in names(images)] == ["00", "10", "20", "30", "40"]


def test_an_array_of_any_channel_count_is_memory_mapped_also_in_other_processes(tmp_path):
    pixels = random_images(20, channels=10)
    np.save(tmp_path / "ten.npy", pixels)
    images = open_images(str(tmp_path / "ten.npy"), "pretrain", 10, limit=10)
    assert isinstance(images.images, np.memmap) and len(images) == 10
    sent = pickle.dumps(images)
    assert len(sent) < 2000
    again = pickle.loads(sent)
    for source in (images, again):
        read = np.stack([np.asarray(plane) for plane in source.read(3)], axis=-1)
        assert np.array_equal(read, pixels[6])


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_files_give_one_three_or_four_channels(fifty, channels, mode):
    images = open_images(str(fifty / "flat"), "pretrain", channels)
    planes = images.read(0)
    joined = np.concatenate([np.asarray(p).reshape(9, 11, -1) for p in planes], axis=-1)
    expected = np.asarray(Image.open(images.name(0)).convert(mode)).reshape(9, 11, -1)
    assert np.array_equal(joined, expected)


def test_several_sources_are_joined_in_their_order(fifty):
    (fifty / "few.txt").write_text("flat/03 x.png 1\nflat/01 x.png 0\n")
    np.save(fifty / "some.npy", random_images(5))
    with tarfile.open(fifty / "two.tar", "w") as tar:
        for number in (8, 9):
            tar.add(fifty / "flat" / f"{number:02d} x.png", f"{number}.png")
    given = [str(fifty / name) for name in ("few.txt", "two.tar", "some.npy", "nested")]
    images = open_images(given, "pretrain", 3)
    single = [open_images(one, "pretrain", 3) for one in given]
    assert len(images) == 2 + 2 + 5 + 50 and images.labels is None and images.reads_files
    expected = [part.read(i)[0].tobytes() for part in single for i in range(len(part))]
    assert [images.read(i)[0].tobytes() for i in range(59)] == expected
    assert [images.name(i)[-5:] for i in (0, 3, 4)] == ["x.png", "9.png", "age 0"]
    again = pickle.loads(pickle.dumps(images))
    assert again.read(8)[0].tobytes() == expected[8] and again.identity() == images.identity()
    other = open_images(given[::-1], "pretrain", 3)
    assert other.identity() != images.identity()
    few = open_images(given, "pretrain", 3, limit=12)
    assert few.index.tolist() == [59 * i // 12 for i in range(12)]
    assert [few.read(i)[0].tobytes() for i in range(12)] == [expected[i] for i in few.index]
    assert few.identity() not in (images.identity(), other.identity())
    with pytest.raises(NoSplit, match="several sources have no train split"):
        open_images(given, "train", 3)


def test_two_sources_of_the_same_names_are_told_apart(tmp_path):
    for camera in "ab":
        (tmp_path / camera).mkdir()
        for number in range(3):
            pixels = np.full((8, 8, 3), 100 * (camera == "b") + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / camera / f"{number}.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a", "a")
    (tmp_path / "a" / "1.png").write_bytes(b"")  # of none of the two, and no error
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.add(tmp_path / "a", ".")
    first, swapped, alike, other = (
        open_images([str(tmp_path / name) for name in names], "pretrain", 3).identity()
        for names in ("ab", "ba", ["empty.tar", "b"], ["a.tar", "b"]))
    assert first == alike and len({first, swapped, other}) == 3


def test_identity_is_that_of_the_images_not_of_their_place(fifty, tmp_path):
    here = open_images(str(fifty / "flat"), "pretrain", 3).identity()
    shutil.copytree(fifty / "flat", tmp_path / "moved")
    assert open_images(str(tmp_path / "moved"), "pretrain", 3).identity() == here
    os.remove(tmp_path / "moved" / "07 x.png")
    assert open_images(str(tmp_path / "moved"), "pretrain", 3).identity() != here


def test_torchvision_sets_are_read_and_their_absence_is_told(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"cifar10.*--data-root .*--download"):
        open_images("cifar10", "pretrain", 3, root=str(tmp_path))

    class Stl10:
        def __init__(self, root, download, split):
            self.data = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
            self.labels, self.split = np.array([1, 2]), split

    monkeypatch.setattr(torchvision.datasets, "STL10", Stl10)
    images = open_images("stl10", "pretrain", 3)
    expected = Stl10("", False, "").data[1].transpose(1, 2, 0)
    assert np.array_equal(np.asarray(images.read(1)[0]), expected)


@pytest.mark.parametrize(
    "name, split, which",
    [
        ("cifar10", "pretrain", {"train": True}),
        ("cifar100", "test", {"train": False}),
        ("stl10", "pretrain", {"split": "train+unlabeled"}),
        ("stl10", "train", {"split": "train"}),
        ("svhn", "pretrain", {"split": "train"}),
        ("svhn", "test", {"split": "test"}),
        ("mnist", "train", {"train": True}),
    ],
)
def test_each_split_of_a_torchvision_set_is_the_right_one(name, split, which, monkeypatch):
    asked = []

    def fake_set(root, download, **options):
        asked.append(options)
        raise RuntimeError("not there")

    monkeypatch.setattr(torchvision.datasets, TORCHVISION[name], fake_set)
    with pytest.raises(RunError):
        open_images(name, split, 3)
    assert asked == [which]


def test_a_colour_array_becomes_gray_as_files_do():
    pixels = random_images(1)
    gray = ArrayImages(pixels, None, 1).read(0)[0]
    assert np.array_equal(gray, Image.fromarray(pixels[0]).convert("L"))


def test_fake_images_cost_little_memory():
    images = open_images("fake", "pretrain", 3)
    assert len(images) == 10_000 and images.images.nbytes < 2e7
    assert images.read(0)[0].size == (256, 256)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: p / "nothing", "no such file or folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "no image file"),
        (lambda p: np.save(p / "f.npy", np.zeros((3, 4, 4, 3))) or p / "f.npy", "float64"),
        (lambda p: np.save(p / "f.npy", np.array([{}])) or p / "f.npy", "Python objects"),
        (lambda p: np.save(p / "f.npy", random_images(3, channels=5)) or p / "f.npy", "5 channels"),
        (lambda p: (p / "f.bin").write_bytes(b"\xff\xfe\x80") and p / "f.bin", "neither a text"),
        (lambda p: (p / "f.txt").write_text("\n") and p / "f.txt", "no line"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line(make, said, tmp_path):
    with pytest.raises(RunError, match=said) as error:
        open_images(str(make(tmp_path)), "pretrain", 3)
    assert "\n" not in str(error.value)


def test_ten_channels_cannot_come_from_files(fifty):
    with pytest.raises(RunError, match=r"--in-chans 10.*1 \(L\), 3 \(RGB\) or 4 \(RGBA\)"):
        open_images(str(fifty / "flat"), "pretrain", 10)


def test_a_gray_array_without_a_channel_axis_goes_whole_to_another_process(tmp_path):
    pixels = random_images(5, channels=1)[..., 0]
    np.save(tmp_path / "gray.npy", pixels)
    images = open_images(str(tmp_path / "gray.npy"), "pretrain", 3)
    for source in (images, pickle.loads(pickle.dumps(images))):
        assert np.array_equal(np.asarray(source.read(2)[0])[..., 1], pixels[2])


def test_identity_sees_every_image_of_a_small_array():
    images = ArrayImages(random_images(20), None, 3)
    reference = images.identity()
    assert ArrayImages(random_images(20), None, 3).identity() == reference
    changed = random_images(20)
    changed[13, 0, 0, 0] ^= 1
    assert ArrayImages(changed, None, 3).identity() != reference


def test_a_list_may_begin_with_a_mark_and_name_files_that_are_not_utf8(tmp_path):
    plain(tmp_path, "0.png", "1.png")
    os.rename(tmp_path / "1.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf0.png\r\ncaf\xe9.png\n")
    images = open_images(str(tmp_path / "list.txt"), "pretrain", 1)
    assert [images.read(i)[0].getpixel((0, 0)) for i in range(2)] == [0, 1]


# ---------------------------------------------------------------------- folders, splits and classes


def test_held_out_folders_are_never_trained_on(tmp_path):
    for name in ("a/0.png", "b/1.png", "val/a/2.png", "test/a/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_images(1)[0]).save(tmp_path / name)
    seen = open_images(str(tmp_path), "pretrain", 3)
    assert sorted(os.path.basename(path) for path in names(seen)) == ["0.png", "1.png"]
    with pytest.raises(RunError, match="no train folder"):
        open_images(str(tmp_path), "train", 3)


def plain(root, *paths):
    """A folder with a gray PNG at each path, of its number's gray."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(root / path)
    return root


def seen(root, split="pretrain"):
    """What a split uses, relative to its folder."""
    images = open_images(str(root), split, 3)
    return [os.path.relpath(name, root) for name in names(images)]


@pytest.mark.parametrize(
    "there, used, warned",
    [
        ("train/0 val/1 test/2", "train/0", ""),
        ("train/a/0 val/a/1", "train/a/0", ""),
        ("train/0", "train/0", ""),
        ("bus/0 car/1 train/2", "bus/0 car/1 train/2", "train is taken for a class like bus car"),
        ("train/bus/0 train/train/1 val/bus/2 val/train/3", "train/bus/0 train/train/1", ""),
        ("train/a/0 more/1", "train/a/0", "not trained on: more"),
        ("train/0 val/1 more/2", "train/0", "not trained on: more"),
        ("bus/0 test/1", "bus/0", "test taken for held-out images"),
        ("bus/0 val/1 test/a/2", "bus/0", "val and test taken for held-out images"),
        ("bus/0 tests/1 trains/2", "bus/0 tests/1 trains/2", ""),
    ],
)
def test_folders_named_like_splits_are_told_from_classes(there, used, warned, tmp_path, capsys):
    plain(tmp_path, *[f"{path}.png" for path in there.split()])
    assert seen(tmp_path) == [f"{path}.png" for path in used.split()]
    said = capsys.readouterr().out
    assert warned in said and said.count("warning") == (1 if warned else 0)


def test_a_folder_without_images_beside_train_changes_nothing(tmp_path, capsys):
    plain(tmp_path, "train/0.png")
    (tmp_path / "annotations").mkdir()
    assert seen(tmp_path) == ["train/0.png"] and capsys.readouterr().out == ""


def test_nothing_but_held_out_images_is_told(tmp_path):
    with pytest.raises(RunError, match="no image file in it, val held out"):
        seen(plain(tmp_path, "val/0.png"))


@pytest.mark.parametrize("tested", ["ac", "abc", "C", "cab"])
def test_a_test_class_that_training_does_not_have_is_refused_by_name(tested, tmp_path):
    plain(tmp_path, "train/a/0.png", "train/b/1.png", *[f"val/{name}/2.png" for name in tested])
    assert open_images(str(tmp_path), "train", 3).labels.tolist() == [0, 1]
    with pytest.raises(RunError, match="val that .*train does not have: [cC];"):
        open_images(str(tmp_path), "test", 3)


def test_a_class_without_a_training_image_is_told(tmp_path, capsys):
    plain(tmp_path, "train/a/0.png", "train/c/1.png", "val/c/2.png")
    (tmp_path / "train" / "b").mkdir()
    assert open_images(str(tmp_path), "train", 3).labels.tolist() == [0, 2]
    assert "without an image: b\n" in capsys.readouterr().out
    assert open_images(str(tmp_path), "test", 3).labels.tolist() == [2]
    assert capsys.readouterr().out == ""


def test_an_image_beside_class_folders_has_no_label_and_is_told(tmp_path, capsys):
    plain(tmp_path, "train/a/0.png", "train/b/1.png", "train/preview.png", "val/b/2.png")
    images = open_images(str(tmp_path), "train", 3)
    assert images.labels.tolist() == [0, 1] and "preview" not in " ".join(names(images))
    assert f"{tmp_path}/train/preview.png" in capsys.readouterr().out
    assert "train/preview.png" in seen(tmp_path)  # without labels it is an image like any other
    assert capsys.readouterr().out == ""


def test_what_a_system_has_put_beside_images_is_no_data(tmp_path):
    hidden = ("._0.png", ".ipynb_checkpoints/1.png", "__MACOSX/train/a/2.png", "a/@eaDir/3.png",
              ".4.jpg", "lost+found/5.png")
    plain(tmp_path, "train/a/0.png", *[f"train/{path}" for path in hidden],
          *[f"train/a/{path}" for path in hidden], ".ipynb_checkpoints/x.png", "val/a/0.png")
    assert seen(tmp_path) == seen(tmp_path, "train") == ["train/a/0.png"]
    under = plain(tmp_path / ".cache", "b/0.png", ".b/1.png")  # what the user names is data
    assert seen(under) == ["b/0.png"]


@pytest.mark.parametrize("split, closed", [("pretrain", "train/b"), ("train", "train/b/deep"),
                                           ("test", "val")])
def test_a_folder_that_cannot_be_read_is_named(split, closed, tmp_path, monkeypatch):
    plain(tmp_path, "train/a/0.png", "train/b/1.png", "train/b/deep/2.png", "val/a/3.png")
    scandir = os.scandir

    def refuse(path="."):  # as without the right to read, for root as well
        if os.fspath(path) == str(tmp_path / closed):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(RunError, match=f"{closed}: Permission denied; make the folder readable"):
        open_images(str(tmp_path), split, 3)


def test_held_out_images_need_not_be_readable(tmp_path, monkeypatch):
    plain(tmp_path, "train/a/0.png", "test/a/1.png")
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path).startswith(str(tmp_path / "test")):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert seen(tmp_path) == ["train/a/0.png"]


# ----------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("I;16", "tif")])
def test_any_file_of_16_bits_is_refused(mode, suffix, tmp_path):
    path = tmp_path / f"deep.{suffix}"
    if mode == "RGB":
        write_16_bit_rgb(path)
    else:
        Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(path)
    with pytest.raises(RefusedImage, match="more than 8 bits"):
        open_images(str(tmp_path), "pretrain", 3).read(0)


def write_16_bit_rgb(path):
    """A PNG of 4 x 4 pixels with three channels of 16 bits, which Pillow itself cannot write."""
    write_png(path, np.arange(48, dtype=np.uint16).reshape(4, 4, 3))


def write_png(path, pixels):
    """A PNG of pixels (H, W) or (H, W, C) of 16 bits."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2] if pixels.ndim == 3 else 1]
    header = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, colour, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def write_tiff(path, pixels, order, deflated):
    """A TIFF of pixels (H, W) or (H, W, C) of 16 bits, with bytes in the order < or >."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    data = pixels.astype(order + "u2").tobytes()
    data = zlib.compress(data) if deflated else data
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    entries = [(256, pixels.shape[1]), (257, pixels.shape[0]), (258, 16),
               (259, 8 if deflated else 1), (262, 2 if channels >= 3 else 1), (273, 0),
               (277, channels), (278, pixels.shape[0]), (279, len(data))]
    entries += [(338, 2)] if channels == 4 else []
    start = 8 + 2 + 12 * len(entries) + 4
    ifd = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        value = {258: start if channels > 2 else value, 273: start + len(bits)}.get(tag, value)
        count = channels if tag == 258 else 1
        wide = tag in (273, 279) or count > 2
        ifd += struct.pack(order + "HHI", tag, 4 if tag in (273, 279) else 3, count)
        ifd += struct.pack(order + "I", value) if wide else struct.pack(order + "HH", value, 0)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    path.write_bytes(head + ifd + bytes(4) + bits + data)


def deep_pixels(channels):
    shape = (9, 11) if channels == 1 else (9, 11, channels)
    return np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)


WRITERS = {
    "png": write_png,
    **{f"tiff {order}{' deflated' * deflated}": functools.partial(
        write_tiff, order=order, deflated=deflated) for order in "<>" for deflated in (0, 1)},
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", WRITERS)
def test_all_16_bits_are_read_of_png_and_tiff(kind, channels, tmp_path):
    pixels = deep_pixels(channels)
    WRITERS[kind](tmp_path / f"x.{kind[:3]}", pixels)
    planes = open_images(str(tmp_path), "pretrain", 3, bits=16).read(0)
    expected = np.stack([pixels] * 3 if channels == 1 else np.moveaxis(pixels, 2, 0)[:3])
    assert np.array_equal(np.stack(planes), expected)
    gray = open_images(str(tmp_path), "pretrain", 1, bits=16).read(0)
    assert np.allclose(gray[0], np.tensordot([0.299, 0.587, 0.114], expected, 1), atol=0.01)
    four = open_images(str(tmp_path), "pretrain", 4, bits=16).read(0)
    alpha = pixels[..., 3] if channels == 4 else 65535
    assert np.array_equal(four[:3], expected) and (np.asarray(four[3]) == alpha).all()


def test_files_and_arrays_of_8_bits_keep_their_values_among_those_of_16(tmp_path):
    pixels = random_images(2)
    Image.fromarray(pixels[0]).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", pixels)
    for source in (str(tmp_path), [str(tmp_path), str(tmp_path / "x.npy")]):
        images = open_images(source, "pretrain", 3, bits=16)
        for i in range(len(images)):
            assert np.array_equal(np.stack(images.read(i), 2), pixels[max(0, i - 1)] * 257.0)


def test_more_than_256_levels_reach_the_network(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    write_png(tmp_path / "x.png", np.stack([ramp, ramp // 2, ramp // 3], 2))
    write_tiff(tmp_path / "y.tif", ramp, "<", True)
    images = open_images(str(tmp_path), "pretrain", 3, bits=16)
    for geometry in (
        augment.RandomResizedCrop((1, 1), (1, 1), interpolation="bicubic"),
        augment.CenterCrop(64, interpolation="bicubic"), augment.HorizontalFlip(p=1),
        augment.RandomAffine(0, 0, (1, 1), 0, fill=255, interpolation="bilinear"),
    ):
        view = augment.View(64, [geometry, augment.Normalize([0.0], [1.0])], 3)
        [batch] = Loader(images, [view], batch_size=2, epochs=1, seed=0, workers=0,
                         world=World(0, 1, torch.device("cpu"))).epoch(0)
        for i, views in zip(batch.index.tolist(), batch.views[0], strict=True):
            levels = views[0].unique()
            assert len(levels) > 4000 and levels.min() < 1e-3 and levels.max() > 0.999
            crop = views if not isinstance(geometry, augment.HorizontalFlip) else views.flip(2)
            expected = torch.from_numpy(np.stack(images.read(i)) / 65535).float()
            torch.testing.assert_close(crop, expected, rtol=0, atol=1e-5)
    view = augment.View(64, [augment.CenterCrop(64, interpolation="bicubic")], 3)
    rows = features.extract(lambda x: {"x": x.flatten(1)}, images, view, batch_size=2, workers=0,
                            world=World(0, 1, torch.device("cpu")))["x"]
    assert len(rows[0].unique()) > 4000


def test_nothing_wraps_around_at_an_edge_and_what_lies_beyond_is_white():
    edge = np.zeros((8, 8), np.float32)
    edge[:, 4:] = 65535
    planes = [Image.fromarray(edge)]
    view = augment.View(32, [augment.CenterCrop(32, interpolation="bicubic")], 1)
    crop = view.crop(planes, [[]])[0, 16]
    assert (crop[:14] < 8000).all() and (crop[18:] > 57000).all() and crop.max() == 65535
    affine = augment.RandomAffine(0, 0, (1, 1), 0, fill=255, interpolation="bilinear")
    moved = affine.apply(planes[0], np.array([1, 0, -3, 0, 1, 0.0]), (8, 8))
    assert (np.asarray(moved)[:, :2] == 65535).all() and (np.asarray(moved)[:, 4:6] == 0).all()


def test_what_pillow_cannot_give_in_full_is_refused_also_with_16_bits(tmp_path):
    for name, pixels in (("x.png", deep_pixels(2)), ("x.tif", np.ones((4, 4), np.float32)),
                         ("y.tif", np.ones((4, 4), np.int32)), ("x.ppm", None)):
        folder = tmp_path / name
        folder.mkdir()
        if pixels is None:
            (folder / name).write_bytes(b"P6 1 1 65535\n" + bytes(6))
        elif name == "x.png":
            write_png(folder / name, pixels)
        else:
            Image.fromarray(pixels).save(folder / name)
        with pytest.raises(RefusedImage, match="Pillow cannot give all bits of its pixels"):
            open_images(str(folder), "pretrain", 3, bits=16).read(0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_photographs_are_upright_as_viewers_show_them(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(random_images(1)[0][:8]).save(tmp_path / f"x.{suffix}", exif=exif)
    with Image.open(tmp_path / f"x.{suffix}") as image:
        upright = ImageOps.exif_transpose(image)
    for channels, mode in MODES.items():
        planes = open_images(str(tmp_path), "pretrain", channels, exif_orientation=True).read(0)
        assert planes[0].size == ((8, 12) if 5 <= orientation <= 8 else (12, 8))
        for plane, expected in zip(planes, upright.convert(mode).split() if mode == "RGBA" else
                                   [upright.convert(mode)], strict=True):
            assert np.array_equal(np.asarray(plane), np.asarray(expected))


def test_photographs_are_left_as_they_lie_without_the_flag(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8)).save(tmp_path / "x.jpg", exif=exif)
    assert open_images(str(tmp_path), "pretrain", 3).read(0)[0].size == (12, 8)


def test_a_broken_orientation_does_not_make_a_broken_image(tmp_path):
    Image.new("RGB", (24, 16)).save(tmp_path / "x.jpg", exif=b"Exif\0\0no header of TIFF")
    images = open_images(str(tmp_path), "pretrain", 3, exif_orientation=True)
    assert images.read(0)[0].size == (24, 16)


def write_bmp(path, masks):
    """A BMP of 2 x 2 pixels with 16 bits a pixel, of the brightest red."""
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 2835, 2835, 0, 0)
    start = 14 + len(header) + 12
    content = header + struct.pack("<III", *masks) + struct.pack("<4H", *[masks[0]] * 4)
    path.write_bytes(b"BM" + struct.pack("<IHHI", start + 8, 0, 0, start) + content)


@pytest.mark.parametrize("masks", [(0xF800, 0x07E0, 0x001F), (0x7C00, 0x03E0, 0x001F)])
def test_16_bits_a_pixel_are_few_not_many(masks, tmp_path):
    write_bmp(tmp_path / "x.bmp", masks)
    pixel = open_images(str(tmp_path), "pretrain", 3).read(0)[0].getpixel((0, 0))
    assert pixel == (255, 0, 0)


@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("L", "png"), ("P", "png"), ("LA", "png"),
                                          ("P", "gif"), ("1", "tif"), ("CMYK", "tif"),
                                          ("CMYK", "jpg"), ("RGBA", "webp"), ("1", "bmp")])
def test_every_mode_of_8_bits_or_fewer_is_read(mode, suffix, tmp_path):
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    for channels in (1, 3, 4):
        planes = open_images(str(tmp_path), "pretrain", channels).read(0)
        assert np.concatenate([np.asarray(p).ravel() for p in planes]).min() >= 250


@pytest.mark.parametrize("content", [b"P6 1 1 65535\n" + bytes(6), b"P6 1 1 1023\n" + bytes(6),
                                     b"P3 1 1 65535\n0 0 0\n", b"P5 1 1 65535\n" + bytes(2)])
def test_a_portable_pixmap_of_more_than_8_bits_is_refused(content, tmp_path):
    (tmp_path / "x.ppm").write_bytes(content)
    with pytest.raises(RefusedImage, match="more than 8 bits"):
        open_images(str(tmp_path), "pretrain", 3).read(0)


def colours(mode):
    """An image of a mode with many values, saved as the second of the pair."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 11, 4), dtype=np.uint8)
    if mode == "P":
        image = Image.fromarray(pixels[..., :3]).quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
        return image, "png"
    if mode == "CMYK":
        return Image.fromarray(pixels, "CMYK"), "tif"
    if mode in ("YCCK", "YCbCr"):  # as JPEG has them inside
        return Image.fromarray(pixels, "CMYK") if mode == "YCCK" else (
            Image.fromarray(pixels[..., :3])), "jpg"
    return Image.fromarray(pixels).convert(mode), "png"


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCCK", "YCbCr", "LA", "1", "RGBA"])
@pytest.mark.parametrize("bits", [8, 16])
def test_other_modes_are_converted_by_pillows_rule_without_a_word(mode, bits, tmp_path, recwarn):
    image, suffix = colours(mode)
    transparency = image.info.get("transparency")
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / f"x.{suffix}", **options)
    for channels, wanted in MODES.items():
        with Image.open(tmp_path / f"x.{suffix}") as whole, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = np.asarray(whole.convert(wanted)).reshape(9, 11, channels)
        planes = open_images(str(tmp_path), "pretrain", channels, bits=bits).read(0)
        found = np.concatenate([np.asarray(p).reshape(9, 11, -1) for p in planes], axis=2)
        assert np.array_equal(found, expected * (257.0 if bits == 16 else 1))
    assert not [w for w in recwarn if "ransparency" in str(w.message)]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_read(suffix, tmp_path):
    frames = [Image.new("RGB", (16, 16), (shade, shade, shade)) for shade in (0, 128, 255)]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.n_frames == 3
    assert np.asarray(open_images(str(tmp_path), "pretrain", 3).read(0)[0]).max() < 8


def paged(folder, mode):
    """Four TIFFs of three pages, of which the first is 8 x 8."""
    for number in range(4):
        pages = [Image.new(mode, (size, size), 200) for size in (8, 9, 10)]
        pages[0].save(folder / f"{number}.tif", save_all=True, append_images=pages[1:])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode, bits", [("L", 8), ("I;16", 16)])
def test_of_a_tiff_of_many_pages_the_first_is_read_which_is_told_once(
        workers, mode, bits, tmp_path, capsys):
    paged(tmp_path, mode)
    images = open_images(str(tmp_path), "pretrain", 3, bits=bits)
    world = World(0, 1, torch.device("cpu"))
    view = augment.View(8, [augment.CenterCrop(8, interpolation="bicubic")], 3)
    loader = Loader(images, [view], batch_size=2, epochs=2, seed=0, workers=workers, world=world)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            assert torch.allclose(batch.views[0], torch.tensor(200 / (2**bits - 1)))
    assert capsys.readouterr().out.count("has 3 pages; of such files the first") == 1
    images = open_images(str(tmp_path), "pretrain", 3, bits=bits)
    features.extract(lambda x: {"x": x.flatten(1)}, images, view, world, batch_size=1,
                     workers=workers)
    assert capsys.readouterr().out.count("has 3 pages") == 1
