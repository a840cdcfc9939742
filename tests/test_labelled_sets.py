"""Torchvision's labelled sets in the layout that it reads, other test images, few of each class."""

import contextlib
import importlib
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

import eval_knn
from common import labelled
from common.distributed import RunError
from common.images import NoSplit, open_images
from common.labelled_sets import LABELLED, MEAN_PER_CLASS, divide

TRAIN, VAL, TEST = range(3)
CLASSES = 3
ALL = [(split, label, number) for split in (TRAIN, VAL, TEST) for label in range(CLASSES)
       for number in range(2)]


def put(path, split=0, label=0):
    """An image that tells its split and label by its gray."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (10 * label + split,) * 3).save(path, format="PNG")


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def class_folders(root, splits, suffix="jpg", names="abc"):
    for split, folder in splits.items():
        for label in range(len(names)):
            for number in range(2):
                put(root / folder / names[label] / f"{number}.{suffix}", split, label)


def food101(root, monkeypatch):
    for split, name in ((TRAIN, "train"), (TEST, "test")):
        listed = {c: [f"{c}/{name}{n}" for n in range(2)] for c in "cab"}  # in any order
        lines(root / f"food-101/meta/{name}.json", [json.dumps(listed)])
        for label, c in enumerate("abc"):
            for path in listed[c]:
                put(root / f"food-101/images/{path}.jpg", split, label)


def flowers102(root, monkeypatch):
    folder = root / "flowers-102"
    ids = {"trnid": [], "valid": [], "tstid": []}
    for number, (split, label, _) in enumerate(ALL, 1):
        ids[list(ids)[split]].append(number)
        put(folder / f"jpg/image_{number:05d}.jpg", split, label)
    savemat(folder / "setid.mat", ids)
    savemat(folder / "imagelabels.mat", {"labels": [label + 1 for _, label, _ in ALL]})
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)


def pets(root, monkeypatch):
    for name, splits in (("trainval", (TRAIN, VAL)), ("test", (TEST,))):
        chosen = [one for one in ALL if one[0] in splits]
        lines(root / f"oxford-iiit-pet/annotations/{name}.txt",
              [f"kind_{label}_{split}{number} {label + 1} 1 1" for split, label, number in chosen])
    for split, label, number in ALL:
        put(root / f"oxford-iiit-pet/images/kind_{label}_{split}{number}.jpg", split, label)


def dtd(root, monkeypatch):
    for split, name in enumerate(("train", "val", "test")):
        chosen = [one for one in ALL if one[0] == split]
        lines(root / f"dtd/dtd/labels/{name}1.txt",
              [f"{'abc'[c]}/{s}{n}.jpg" for s, c, n in chosen])
    for split, label, number in ALL:
        put(root / f"dtd/dtd/images/{'abc'[label]}/{split}{number}.jpg", split, label)


def aircraft(root, monkeypatch):
    folder = root / "fgvc-aircraft-2013b/data"
    lines(folder / "variants.txt", ["707 b", "A 3", "Z"])
    names = ["707 b", "A 3", "Z"]
    for name, splits in (("trainval", (TRAIN, VAL)), ("test", (TEST,))):
        lines(folder / f"images_variant_{name}.txt",
              [f"{s}{c}{n} {names[c]}" for s, c, n in ALL if s in splits])
    for split, label, number in ALL:
        put(folder / f"images/{split}{label}{number}.jpg", split, label)


def cars(root, monkeypatch):
    folder = root / "stanford_cars"
    kind = [("fname", object), ("class", int)]
    for split, name, path in ((TRAIN, "cars_train", "devkit/cars_train_annos.mat"),
                              (TEST, "cars_test", "cars_test_annos_withlabels.mat")):
        chosen = [(f"{c}{n}.jpg", c + 1) for s, c, n in ALL if s == split]
        for file, label in chosen:
            put(folder / name / file, split, label - 1)
        (folder / "devkit").mkdir(exist_ok=True)
        savemat(folder / path, {"annotations": np.array(chosen, dtype=kind)})
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["x", "y", "z"], object)})


def gtsrb(root, monkeypatch):
    class_folders(root / "gtsrb/GTSRB", {TRAIN: "Training"}, "ppm", ["00000", "00001", "00002"])
    rows = [(f"{c}{n}.ppm", c) for s, c, n in ALL if s == TEST]
    lines(root / "gtsrb/GT-final_test.csv", ["Filename;ClassId", *(f"{p};{c}" for p, c in rows)])
    for path, label in rows:
        put(root / "gtsrb/GTSRB/Final_Test/Images" / path, TEST, label)


def clevr(root, monkeypatch):
    folder = root / "clevr/CLEVR_v1.0"
    for split, name in enumerate(("train", "val")):
        chosen = [(f"{c}{n}.png", c) for s, c, n in ALL if s == split]
        scenes = [{"image_filename": p, "objects": [0] * (c + 3)} for p, c in chosen]
        lines(folder / f"scenes/CLEVR_{name}_scenes.json", [json.dumps({"scenes": scenes})])
        for path, label in chosen:
            put(folder / "images" / name / path, split, label)


def country211(root, monkeypatch):
    class_folders(root / "country211", {TRAIN: "train", VAL: "valid", TEST: "test"})


def sst2(root, monkeypatch):
    class_folders(root / "rendered-sst2", {TRAIN: "train", VAL: "valid", TEST: "test"}, "png",
                  ["negative", "positive"])


def pcam(root, monkeypatch):
    """Arrays that a stand-in for h5py reads, which is no requirement of ours."""

    @contextlib.contextmanager
    def opened(path):
        yield np.load(path)

    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=opened))
    (root / "pcam").mkdir()
    for split, name in enumerate(("train", "valid", "test")):
        labels = [c for s, c, _ in ALL if s == split]
        images = np.stack([np.full((6, 6, 3), 10 * c + split, np.uint8) for c in labels])
        for key, array in (("x", images), ("y", np.reshape(labels, (-1, 1, 1, 1)))):
            with open(root / f"pcam/camelyonpatch_level_2_split_{name}_{key}.h5", "wb") as file:
                np.savez(file, **{key: array})


LAYOUTS = {
    "food101": (food101, {TRAIN}, {TEST}), "flowers102": (flowers102, {TRAIN, VAL}, {TEST}),
    "pets": (pets, {TRAIN, VAL}, {TEST}), "dtd": (dtd, {TRAIN, VAL}, {TEST}),
    "aircraft": (aircraft, {TRAIN, VAL}, {TEST}), "cars": (cars, {TRAIN}, {TEST}),
    "gtsrb": (gtsrb, {TRAIN}, {TEST}), "clevr-count": (clevr, {TRAIN}, {VAL}),
    "country211": (country211, {TRAIN, VAL}, {TEST}), "sst2": (sst2, {TRAIN, VAL}, {TEST}),
    "pcam": (pcam, {TRAIN, VAL}, {TEST}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_split_has_its_images_with_their_labels(name, tmp_path, monkeypatch):
    make, trained, tested = LAYOUTS[name]
    make(tmp_path, monkeypatch)
    for split, wanted in (("train", trained), ("test", tested), ("pretrain", trained)):
        images = open_images(name, split, 1, root=f"{tmp_path}/.")
        pixels = np.array([images.read(i)[0].getpixel((0, 0)) for i in range(len(images))])
        assert set(pixels % 10) == wanted
        assert images.labels.tolist() == (pixels // 10).tolist() and images.labels.min() == 0
        assert len(images) == 2 * len(wanted) * (images.labels.max() + 1)
        named = [images.name(i) for i in range(len(images))]
        assert len(set(named)) == len(named) and (name == "pcam" or named == sorted(named))
    assert images.read(0)[0].mode == "L"
    assert len(open_images(name, "train", 4, root=str(tmp_path)).read(0)) == 4
    if images.class_names is not None and name != "flowers102":  # all 102 names
        assert len(images.class_names) == images.labels.max() + 1


def sun397(root, names, counts):
    lines(root / "SUN397/ClassName.txt", [f"/{c[0]}/{c}" for c in names])
    for label, (name, count) in enumerate(zip(names, counts, strict=True)):
        for number in range(count):
            put(root / f"SUN397/{name[0]}/{name}/sun_{number:04d}.jpg", label=label)


def caltech101(root, names, counts):
    for label, (name, count) in enumerate(zip(names, counts, strict=True)):
        for number in range(1, count + 1):
            put(root / f"caltech101/101_ObjectCategories/{name}/image_{number:04d}.jpg",
                label=label)
    put(root / "caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg")


def eurosat(root, names, counts):
    for label, (name, count) in enumerate(zip(names, counts, strict=True)):
        for number in range(count):
            put(root / f"eurosat/2750/{name}/{number:03d}.jpg", label=label)


@pytest.mark.parametrize("make, counts, wanted", [
    (sun397, [130, 100], ([50, 50], [50, 50])),
    (caltech101, [45, 31], ([30, 30], [15, 1])),
    (eurosat, [10, 23], ([8, 19], [2, 4])),
])
def test_a_set_without_splits_is_divided_by_class(make, counts, wanted, tmp_path, capsys):
    make(tmp_path, ["apes", "bees"], counts)
    splits = [open_images(make.__name__, split, 3, root=str(tmp_path)) for split in
              ("train", "test")]
    for images, numbers in zip(splits, wanted, strict=True):
        assert np.bincount(images.labels).tolist() == numbers
        assert [images.read(i)[0].getpixel((0, 0))[0] // 10 for i in range(len(images))
                ] == images.labels.tolist()
    train, test = ({images.name(i) for i in range(len(images))} for images in splits)
    assert not train & test
    args = SimpleNamespace(test_data=None, limit_per_class=None)
    assert "a class" in labelled.described(make.__name__, args, *splits)


def test_a_class_is_divided_evenly_by_its_order_alone():
    labels = np.array([0, 1] * 60)
    train, test = divide("caltech101", labels)
    assert train[labels[train] == 0].tolist() == list(range(0, 120, 4))
    assert sorted([*train, *test]) == list(range(120))
    assert divide("eurosat", labels)[1][:3].tolist() == [8, 9, 18]


@pytest.mark.parametrize("name", LABELLED)
def test_a_set_that_is_not_there_is_one_line(name, tmp_path):
    with pytest.raises(RunError, match=f"--data {name}: missing or incomplete") as error:
        open_images(name, "train", 3, root=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_of_a_sets_name_is_reached_by_its_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path, {TRAIN: "cars/train"})
    with pytest.raises(RunError, match="--data cars: missing or incomplete"):
        open_images("cars", "train", 3)
    assert "for the folder pass ./cars" in capsys.readouterr().out
    assert len(open_images("./cars", "train", 3)) == 6


def test_a_set_with_a_part_missing_is_one_line(tmp_path, monkeypatch):
    food101(tmp_path, monkeypatch)
    (tmp_path / "food-101/meta/test.json").unlink()
    with pytest.raises(RunError, match=r"food101: missing or incomplete.*test\.json"):
        open_images("food101", "test", 3, root=str(tmp_path))


# -------------------------------------------------------------------------------- other test images


@pytest.fixture
def photos(tmp_path):
    """Training images of three classes, all of a folder; test images of two, in other numbers."""
    class_folders(tmp_path, {TRAIN: "all"})
    class_folders(tmp_path, {TEST: "new"}, names=["b", "c"])
    lines(tmp_path / "all.txt", [f"all/{'abc'[c]}/{n}.jpg {c}" for c in range(3) for n in range(2)])
    lines(tmp_path / "new.txt", [f"new/{'bc'[c]}/{n}.jpg {c + 1}" for c in range(2)
                                 for n in range(2)])
    class_folders(tmp_path, {TEST: "numbers"}, names=["2", "0"])
    class_folders(tmp_path, {TRAIN: "both/train", VAL: "both/val"})
    return tmp_path


@pytest.mark.parametrize("data, test, trained, labels", [
    ("all", "new", "aabbcc", [1, 1, 2, 2]),
    ("all", "new.txt", "aabbcc", [1, 1, 2, 2]),
    ("all.txt", "new.txt", "aabbcc", [1, 1, 2, 2]),
    ("all.txt", "numbers", "aabbcc", [0, 0, 2, 2]),  # of a list, the numbers are the names
    ("both", "new", "aabbcc", [1, 1, 2, 2]),
    ("all", "both", "aabbcc", [0, 0, 1, 1, 2, 2]),  # its val
    ("digits", "numbers", "", [0, 0, 2, 2]),
])
def test_classes_are_told_by_their_names(data, test, trained, labels, photos):
    source = data if data == "digits" else str(photos / data)
    train, tested = labelled.open_splits(source, 3, test_data=str(photos / test))
    assert tested.labels.tolist() == labels
    if trained:
        assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert [train.name(i).split("/")[-2] for i in range(6)] == list(trained)


@pytest.mark.parametrize("data, test, said", [
    ("all", "stranger", "class folders of .*stranger that the training set does not have: z"),
    ("all.txt", "new", "training set does not have: b c"),
    ("all", "label.txt", "no training image of 3"),
    ("all", "all/a", "--test-data .*all/a: no class folders, so no labels"),
    ("all", "digits", "--test-data digits: no such folder or list"),
    ("all", "nothing", "--test-data .*nothing: no such folder or list"),
    ("flat.txt", "new", "--data .*flat.txt: no class folders, so no labels"),
    ("minus.txt", "new", "--data .*minus.txt: label -1; the least is 0"),
])
def test_test_images_that_do_not_fit_are_refused(data, test, said, photos):
    class_folders(photos, {TEST: "stranger"}, names=["a", "z"])
    lines(photos / "label.txt", ["new/b/0.jpg 1", "new/b/1.jpg 3"])
    lines(photos / "flat.txt", ["new/b/0.jpg", "new/b/1.jpg"])
    lines(photos / "minus.txt", ["new/b/0.jpg -1", "new/b/1.jpg 0"])
    test = test if test == "digits" else str(photos / test)
    with pytest.raises(RunError, match=said):
        labelled.open_splits(str(photos / data), 3, test_data=test)


def test_a_test_image_that_was_trained_on_is_told(photos, capsys):
    lines(photos / "some.txt", ["all/b/0.jpg 1", "new/b/1.jpg 1"])
    labelled.open_splits(str(photos / "all"), 3, test_data=str(photos / "some.txt"))
    assert f"1 of the 2 test images are training images too: {photos}/all/b/0.jpg" in (
        capsys.readouterr().out)


def test_a_list_alone_has_no_test_images(photos):
    with pytest.raises(NoSplit, match="or --test-data"):
        labelled.open_splits(str(photos / "all.txt"), 3)


# ------------------------------------------------------------------------- few images of each class


def test_some_images_of_every_class(capsys):
    train, test = labelled.open_splits("digits", 3, limit_per_class=4)
    whole = open_images("digits", "train", 3)
    assert np.bincount(train.labels).tolist() == [4] * 10 and len(test) == 355
    assert np.array_equal(train.labels, whole.labels[train.index])
    zeros = np.flatnonzero(whole.labels == 0)
    assert train.index[train.labels == 0].tolist() == [zeros[i * len(zeros) // 4] for i in range(4)]
    assert capsys.readouterr().out == ""
    assert len(labelled.open_splits("digits", 3, limit_per_class=145)[0]) < 1450
    assert "have fewer" in capsys.readouterr().out


def test_a_class_without_images_has_no_few(photos):
    (photos / "all" / "d").mkdir()
    with pytest.raises(RunError, match="--limit-per-class 1: no training image of d"):
        labelled.open_splits(str(photos / "all"), 3, test_data=str(photos / "new"),
                             limit_per_class=1)


@pytest.mark.parametrize("flags, said", [
    (["--checkpoint", "pixels", "--limit", "5", "--limit-per-class", "2"], "--limit 5 and"),
    (["--features", "x.npz", "--test-data", "a"], "--test-data does not go with --features"),
    (["--features", "x.npz", "--limit-per-class", "1"], "--limit-per-class does not go with"),
])
def test_flags_that_contradict_each_other(flags, said, capsys):
    with pytest.raises(SystemExit):
        eval_knn.parse_args(flags)
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------ the mean of classes


def evaluate(name, *flags):
    """The line and all of the output; of another process than the first nothing."""
    script, out = importlib.import_module(name), io.StringIO()
    with contextlib.redirect_stdout(out):
        script.main(script.parse_args([*map(str, flags)]))
    text = out.getvalue()
    return json.loads(text.splitlines()[-1]) if text else None, text


def test_the_mean_per_class_is_that_of_a_loop():
    truth = np.array([0, 0, 0, 2, 2, 5])
    hit = np.array([1.0, 0, 1, 0.5, 0, 1])
    right = np.bincount(truth, hit, minlength=7)
    wanted = np.mean([hit[truth == c].mean() for c in (0, 2, 5)])
    found = labelled.mean_per_class(torch.from_numpy(right), truth)
    assert found == pytest.approx(wanted, abs=1e-15)


QUICK = ["--arch", "resnet_tiny", "--stem", "small", "--image-size", 8, "--workers", 0]
KNN = ("eval_knn", ["--k", 1, 3, "--shots"])
LINEAR = ("eval_linear", ["--folds", 2, "--weight-decays", 0.001])
PAPER = ("eval_linear", ["--protocol", "simclr", "--epochs", 1])


@pytest.mark.parametrize("script, flags", [KNN, LINEAR, PAPER])
def test_where_it_is_the_convention_the_table_has_it(script, flags, tmp_path, monkeypatch):
    """Unbalanced test images: the three classes have 2, 2 and 6 of them."""
    monkeypatch.chdir(tmp_path)
    pets(tmp_path, monkeypatch)
    more = [f"kind_2_9{n}" for n in range(4)]
    with open(tmp_path / "oxford-iiit-pet/annotations/test.txt", "a") as file:
        file.writelines(f"{name} 3 1 1\n" for name in more)
    for name in more:
        put(tmp_path / f"oxford-iiit-pet/images/{name}.jpg", TEST, 0)  # look like class 0
    line, text = evaluate(script, "--checkpoint", "pixels", "--data", "pets", "--data-root",
                          tmp_path, *QUICK, *flags)
    assert "mean per class" in text.split("\n{")[0].splitlines()[-2]
    for result in line["results"]:
        top1, mean = result["top1"], result["mean_per_class"]
        if script == "eval_knn":  # a perfect classifier by gray: 2, 2 and 2 of 6
            assert (top1, mean) == (0.6, pytest.approx((1 + 1 + 1 / 3) / 3))
        assert 0 <= mean <= 1
    assert line["mean_per_class"] == line["results"][0]["mean_per_class"]
    assert {*MEAN_PER_CLASS} == {"aircraft", "caltech101", "flowers102", "pets"}
    assert "pets (its usual number is the mean per class): 12" in text


def test_elsewhere_it_is_in_the_json_alone():
    line, text = evaluate("eval_knn", "--checkpoint", "pixels", "--limit", 50, "--shots")
    assert "mean per class" not in text and 0 < line["mean_per_class"] < 1


def test_processes_agree_on_the_mean_of_classes(pool):
    flags = ["--checkpoint", "pixels", "--limit-per-class", 5, "--folds", 2, "--weight-decays", 0.1]
    alone, _ = evaluate("eval_linear", *flags)
    first, *_ = pool.run(2, evaluate, "eval_linear", *flags)
    assert first[0]["mean_per_class"] == alone["mean_per_class"] and alone["num_train"] == 50


def test_a_class_of_another_folder_is_found_by_its_look(photos):
    line, text = evaluate("eval_knn", "--checkpoint", "pixels", "--data", photos / "all",
                          "--test-data", photos / "new.txt", *QUICK, "--k", 1, "--shots")
    assert (line["num_train"], line["num_test"]) == (6, 4)
    assert f"6 training and 4 test images (of {photos / 'new.txt'}) of 8 px" in text
