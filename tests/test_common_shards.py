import bz2
import gzip
import io
import os
import tarfile
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import simclr
from common import distributed as comm, shards
from common.distributed import RunError, World
from common.images import NoSplit, open_images
from common.labelled import open_splits
from common.loader import Loader, RankBatches
from helpers import train
from test_common_loader import small_views


def jpeg(number):
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    size = (*rng.integers(10, 40, 2), 3)
    Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def make_tar(path, files, **options):
    """A tar of (name, contents); contents may be a link, as (kind, target)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            else:
                member.type, member.linkname = data
                tar.addfile(member)
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same forty JPEGs in two classes as a folder and in tars of all kinds."""
    root = tmp_path_factory.mktemp("forms")
    files = [(f"{'ab'[number % 2]}/{number:02d}.jpg", jpeg(number)) for number in range(40)]
    for name, data in files:
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(data)
    mixed = [files[number] for number in np.random.default_rng(0).permutation(40)]
    make_tar(root / "plain.tar", mixed)
    make_tar(root / "dotted.tar", [(f"./{name}", data) for name, data in mixed],
             format=tarfile.GNU_FORMAT)
    (root / "tars").mkdir()
    for name in "ba":
        make_tar(root / "tars" / f"{name}.tar", [f for f in mixed if f[0][0] == name])
        make_tar(root / "tars" / f"{name}.tar", [(f[2:], d) for f, d in mixed if f[0] == name])
    make_tar(root / "outer.tar",
             [(f"{n}.tar", (root / "tars" / f"{n}.tar").read_bytes()) for n in "ba"])
    make_tar(root / "web.tar", [pair for name, data in mixed for pair in (
        (name, data), (f"{name[:-3]}cls", b"%d\n" % "ab".index(name[0])),
        (f"{name[:-3]}json", b"{}"))])
    return root


FORMS = ("plain.tar", "dotted.tar", "outer.tar", "web.tar", "tars")


def pretrain(path, **options):
    return open_images(str(path), "pretrain", 3, **options)


@pytest.mark.parametrize("form", FORMS)
def test_images_in_tars_are_those_of_a_folder_of_the_same_names(form, forms, tmp_path):
    folder, images = pretrain(forms / "folder"), pretrain(forms / form, index=str(tmp_path))
    assert len(images) == 40 and images.identity() == folder.identity()
    for i in (0, 7, 39):
        assert images.read(i)[0].tobytes() == folder.read(i)[0].tobytes()
        assert images.name(i).endswith(folder.name(i)[-6:])


def test_a_tar_and_a_folder_of_its_name_are_one_folder(tmp_path):
    (tmp_path / "a").mkdir()
    make_tar(tmp_path / "a.tar", [(f"{n}.jpg", jpeg(n)) for n in (0, 9)])
    make_tar(tmp_path / "a" / "5.tar", [("x.jpg", jpeg(5))])
    images = pretrain(tmp_path)
    assert images.items["name"].tolist() == [b"a/0.jpg", b"a/5/x.jpg", b"a/9.jpg"]
    assert [images.read(i)[0].tobytes() for i in range(3)] == [
        Image.open(io.BytesIO(jpeg(n))).convert("RGB").tobytes() for n in (0, 5, 9)]


@pytest.mark.parametrize("form", ["plain.tar", "outer.tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_folder_for_any_number_of_workers(form, workers, forms):
    made = [Loader(pretrain(forms / name), small_views(), batch_size=8, epochs=2, seed=0,
                   world=World(0, 1, torch.device("cpu")), workers=workers, start_step=3)
            for name in ("folder", form)]
    for one, other in zip(*(each.epoch(0) for each in made), strict=True):
        assert torch.equal(one.index, other.index)
        assert all(map(torch.equal, one.views, other.views))


@pytest.mark.parametrize("form", ["plain.tar", "outer.tar"])
def test_shares_of_processes_are_those_of_a_folder(form, forms):
    whole = RankBatches(pretrain(forms / "folder"), small_views(), 8, 0, 0, 1)[7]
    parts = [RankBatches(pretrain(forms / form), small_views(), 8, 0, r, 4)[7] for r in range(4)]
    assert whole[1].tolist() == sum((part[1].tolist() for part in parts), [])


def test_losses_are_equal_bit_for_bit_and_a_run_goes_on_with_another_form(forms, tmp_path):
    losses = {form: train(simclr, tmp_path / form, "--data", forms / form, "--workers", 1,
                          "--epochs", 2, "--index", tmp_path / "index")
              for form in ("folder", "plain.tar", "outer.tar", "web.tar")}
    assert len(losses["folder"]) == 4 and len(set(map(tuple, losses.values()))) == 1
    assert {path.name.split("-")[0] for path in (tmp_path / "index").iterdir()} == {
        ".lock", "plain.tar", "outer.tar", "web.tar"}
    shown = train(simclr, tmp_path / "folder", "--data", forms / "plain.tar", "--epochs", 2)
    assert shown == losses["folder"]


# ------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize("form", FORMS)
def test_classes_are_folders_cls_files_or_the_names_of_tars(form, forms):
    folder, images = (open_images(str(forms / name), "train", 3, whole=True)
                      for name in ("folder", form))
    assert images.labels.tolist() == folder.labels.tolist() == [0] * 20 + [1] * 20
    assert images.class_names == (None if form == "web.tar" else ["a", "b"])


def in_splits(forms, tmp_path, form):
    """Tars with both splits of the forty images: b has another number without the training set."""
    train, test = ([(f"{split}/{name}", jpeg(number)) for number, name in enumerate(names)]
                   for split, names in (("train", ["a/0.jpg", "b/1.jpg", "b/2.jpg"]),
                                        ("val", ["b/3.jpg"])))
    if form == "one tar":
        return make_tar(tmp_path / "both.tar", [(f"birds/{n}", d) for n, d in train + test])
    (tmp_path / "tars").mkdir()
    for name, files in (("train", train), ("val", test)):
        cut = len(name) + 1
        make_tar(tmp_path / "tars" / f"{name}.tar", [(n[cut:], d) for n, d in files])
    return tmp_path / "tars"


@pytest.mark.parametrize("form", ["one tar", "tars named like splits"])
def test_splits_in_tars_are_those_of_folders(form, forms, tmp_path):
    source = in_splits(forms, tmp_path, form)
    train, test = open_splits(str(source), 3)
    assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [1]
    assert train.index.tolist() == [0, 1, 2] and test.index.tolist() == [0]
    assert pretrain(source).identity() == train.identity()


def test_a_tar_may_be_tested_on_with_another_and_needs_a_split_without(forms):
    plain, outer = str(forms / "plain.tar"), str(forms / "outer.tar")
    train, test = open_splits(plain, 3, test_data=outer)
    assert train.labels.tolist() == test.labels.tolist() and train.class_names == ["a", "b"]
    with pytest.raises(NoSplit, match="no train and val or test folder"):
        open_splits(plain, 3)


def test_flat_train_beside_classes_is_a_class_and_held_out_images_are_told(tmp_path, capsys):
    path = make_tar(tmp_path / "x.tar", [(n, jpeg(0)) for n in ("bus/0.jpg", "train/1.jpg")])
    assert len(pretrain(path)) == 2 and "train is taken for a class" in capsys.readouterr().out
    path = make_tar(tmp_path / "y.tar", [(n, jpeg(0)) for n in ("bus/0.jpg", "val/1.jpg")])
    assert len(pretrain(path)) == 1 and "val taken for held-out" in capsys.readouterr().out


def test_images_without_a_class_are_left_out_with_labels_and_told(tmp_path, capsys):
    path = make_tar(tmp_path / "x.tar", [(n, jpeg(0)) for n in ("a/0.jpg", "b/1.jpg", "2.jpg")])
    images = open_images(str(path), "train", 3, whole=True)
    assert images.labels.tolist() == [0, 1] and "2.jpg" in capsys.readouterr().out
    web = make_tar(tmp_path / "w.tar", [("0.jpg", jpeg(0)), ("0.cls", b"7"), ("1.jpg", jpeg(1))])
    images = open_images(str(web), "train", 3, whole=True)
    assert images.labels.tolist() == [7] and "no .cls file: 1 of 2" in capsys.readouterr().out
    web = make_tar(tmp_path / "v.tar", [("0.jpg", jpeg(0)), ("0.cls", b"cat")])
    with pytest.raises(RunError, match=r"0\.jpg: its \.cls file holds b'cat'; wanted a whole"):
        open_images(str(web), "train", 3, whole=True)
    large = make_tar(tmp_path / "large.tar", [("0.jpg", jpeg(0)), ("0.cls", b"9" * 20)])
    with pytest.raises(RunError, match="wanted a whole"):
        open_images(str(large), "train", 3, whole=True)
    assert len(pretrain(web)) == 1  # which never looks at labels


def test_a_cls_file_of_the_whole_name_comes_first(tmp_path):
    files = [(f"07.{n}.jpg", jpeg(n)) for n in range(3)] + [("8.left.jpg", jpeg(3))]
    told = [(f"07.{n}.cls", b"%d" % (5 - n)) for n in range(3)] + [("8.cls", b"9")]
    images = open_images(str(make_tar(tmp_path / "x.tar", files + told)), "train", 3, whole=True)
    assert images.labels.tolist() == [5, 4, 3, 9]


@pytest.mark.parametrize("told, lacks", [("train", "test"), ("val", "train")])
def test_classes_are_not_told_in_two_ways(told, lacks, tmp_path):
    for name in ("train", "val"):
        files = [("a/0.jpg", jpeg(0)), ("b/1.jpg", jpeg(1))]
        make_tar(tmp_path / f"{name}.tar",
                 files + [("a/0.cls", b"1"), ("b/1.cls", b"0")] * (name == told))
    with pytest.raises(RunError, match=f"no image of the {lacks} split has a .cls file, and"):
        open_splits(str(tmp_path), 3)


def test_the_tar_of_a_split_may_have_all_in_a_folder_of_its_name(tmp_path):
    for name, files in (("train", ["a/0.jpg", "train/1.jpg"]), ("val", ["train/2.jpg"])):
        for top in ("", f"{name}/"):
            folder = tmp_path / f"with {top}"[:5]
            folder.mkdir(exist_ok=True)
            make_tar(folder / f"{name}.tar", [(f"{top}{f}", jpeg(0)) for f in files])
    for folder in tmp_path.iterdir():
        train, test = open_splits(str(folder), 3)
        assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1], [1])


def test_what_is_in_a_tar_beside_images(tmp_path, capsys):
    long = "d" * 90 + "/" + "é" * 60 + ".jpg"
    path = make_tar(tmp_path / "x.tar", [
        ("a/0.jpg", jpeg(0)), ("a/._0.jpg", jpeg(1)), ("__MACOSX/1.jpg", jpeg(1)),
        ("notes.md", b"-"), ("a/0.jpg", (tarfile.SYMTYPE, "away.jpg")), (long, jpeg(2)),
        ("a/0.jpg", jpeg(3)),
        ("b/hard.jpg", (tarfile.LNKTYPE, "a/0.jpg")),
        ("b/more.jpg", (tarfile.SYMTYPE, "soft.jpg")),
        ("b/soft.jpg", (tarfile.SYMTYPE, "../a/0.jpg")),
        ("b/lost.jpg", (tarfile.SYMTYPE, "away.jpg"))])
    images = pretrain(path)
    named = [images.name(i)[len(f"{path}/") :] for i in range(len(images))]
    assert named == ["a/0.jpg", "b/hard.jpg", "b/more.jpg", "b/soft.jpg", long]
    last = Image.open(io.BytesIO(jpeg(3))).convert("RGB").tobytes()  # of a name, the last counts
    assert [images.read(i)[0].tobytes() == last for i in range(5)] == [True] * 4 + [False]
    assert "1, such as b/lost.jpg" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- index


def test_an_index_is_made_once_and_again_for_a_changed_one(tmp_path, monkeypatch, capsys):
    path, made, make = tmp_path / "x.tar", [], shards.make_index
    monkeypatch.setattr(shards, "make_index", lambda *a: made.append(1) or make(*a))
    make_tar(path, [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1))])
    index = tmp_path / "index"
    for _ in range(2):
        assert len(pretrain(path, index=str(index))) == 2
    assert len(made) == 1 and f"{path}: indexing\n" in capsys.readouterr().out  # no 0 MB
    make_tar(path, [("0.jpg", jpeg(0))])
    assert len(pretrain(path, index=str(index))) == 1
    assert len(made) == 2 and "it has changed since" in capsys.readouterr().out
    os.utime(path, ns=(0, 10**18))
    pretrain(path, index=str(index))
    assert len(made) == 3
    kept = next(index.glob("*.npz"))
    kept.write_bytes(kept.read_bytes()[:200])
    assert len(pretrain(path, index=str(index))) == 1 and len(made) == 4
    other = dict(np.load(kept)) | {"offsets": np.array([10**6])}  # a place outside of the tar
    np.savez(kept, **other)
    assert len(pretrain(path, index=str(index))) == 1 and len(made) == 5


def test_another_tar_of_the_same_size_and_time_is_not_taken_for_it(tmp_path):
    for names, size in ("ab", 300), ("cd", 700):
        path = make_tar(tmp_path / "x.tar", [(f"{n}.jpg", bytes(size)) for n in names])
        os.utime(path, ns=(0, 10**18))
        images = pretrain(path, index=str(tmp_path / "index"))
        assert path.stat().st_size == 10240 and images.items["size"].tolist() == [size] * 2
        assert [images.name(i)[-5] for i in range(2)] == list(names)


def test_a_folder_that_cannot_hold_indexes_is_told(forms, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--index .*file: .*name a folder that can be written"):
        pretrain(forms / "plain.tar", index=str(tmp_path / "file"))


def open_on_all(path, index):
    made, make = [], shards.make_index
    with mock.patch.object(shards, "make_index", lambda *a: made.append(1) or make(*a)):
        return len(pretrain(path, index=index)), sum(map(len, comm.all_gather_objects(made)))


def test_processes_that_start_together_share_an_index(forms, tmp_path, pool):
    assert pool.run(4, open_on_all, forms / "outer.tar", str(tmp_path)) == [(40, 1)] * 4


# ------------------------------------------------------------------------------------------- errors


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])
    return path


def swapped(path, at, data):
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    if at < 512:  # the sum of the first header's bytes
        whole[148:156] = b"%06o\0 " % (sum(whole[:148]) + sum(whole[156:512]) + 8 * 32)
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize("make, said", [
    (lambda p: cut(p, 1000), "0.jpg ends at byte"),
    (lambda p: cut(p, 512 + 2048 + 100), "cut short"),
    (lambda p: cut(p, 2 * (512 + 2048)), "the tar's end is missing: it is cut short"),
    (lambda p: swapped(p, 512 + 2048, b"x" * 512), "at byte 2,560 has no header"),
    (lambda p: cut(p, 0), "empty file: not a tar, or cut short"),
    (lambda p: p.write_bytes(b"no tar at all" * 100) and p, "not a tar"),
    (lambda p: p.write_bytes(gzip.compress(p.read_bytes())) and p, r"compressed.*gunzip"),
    (lambda p: p.rename(p.with_suffix(".tar.bz2")), r"compressed.*bunzip2"),
    (lambda p: make_tar(p, [("../0.jpg", jpeg(0))]), r"member \.\./0\.jpg lies outside of it"),
    (lambda p: p.write_bytes(p.read_bytes() * 2) and p, "more follows behind .* joined by cat"),
    (lambda p: swapped(p, 156, b"S" + bytes(100) + b"ustar  \0"), "0.jpg is stored in pieces"),
    (lambda p: make_tar(p, [("notes.md", b"-")]), "no image file in it"),
    (lambda p: make_tar(p, [("in.tar.gz", gzip.compress(b"-"))]), "x.tar/in.tar.gz is compressed"),
    (lambda p: make_tar(p, [("in.tar", bz2.compress(b"-"))]), "x.tar/in is compressed"),
    (lambda p: make_tar(p, [("in.tar", b"-" * 1024)]), "x.tar/in: at byte 0 has no header"),
    (lambda p: p.unlink() or os.mkfifo(p) or p, "no such file or folder"),
])
def test_a_tar_that_cannot_be_used_is_one_line(make, said, tmp_path):
    whole = make_tar(tmp_path / "x.tar", [(f"{n}.jpg", bytes(2048)) for n in range(2)])
    with pytest.raises(RunError, match=said) as error:
        pretrain(make(whole))
    assert "\n" not in str(error.value)


def test_a_folder_of_compressed_tars_is_refused_and_tars_beside_images_are_told(tmp_path, capsys):
    (tmp_path / "x.tgz").write_bytes(gzip.compress(b""))
    with pytest.raises(RunError, match="x.tgz is compressed"):
        pretrain(tmp_path)
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    assert len(pretrain(tmp_path)) == 1 and "x.tgz; pass them to --data" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_that_changes_while_it_is_read_stops_the_run(workers, tmp_path):
    path = make_tar(tmp_path / "x.tar", [(f"{n:02d}.jpg", jpeg(n)) for n in range(16)])
    loader = Loader(pretrain(path), small_views(), batch_size=4, epochs=9, seed=0,
                    world=World(0, 1, torch.device("cpu")), workers=workers)
    next(loader.epoch(0))
    make_tar(path, [(f"{n:02d}.jpg", jpeg(n + 1)) for n in range(17)])
    with pytest.raises(RunError, match=r"x\.tar has changed since it was indexed; start again"):
        for epoch in range(9):
            list(loader.epoch(epoch))


def test_an_unreadable_member_is_replaced_and_named_once(tmp_path, capsys):
    path = make_tar(tmp_path / "x.tar", [
        (f"{n:02d}.jpg", b"no image" if n == 5 else jpeg(n)) for n in range(16)])
    loader = Loader(pretrain(path), small_views(), batch_size=4, epochs=2, seed=0,
                    world=World(0, 1, torch.device("cpu")), workers=0)
    seen = [i for epoch in range(2) for batch in loader.epoch(epoch) for i in batch.index.tolist()]
    told = [line for line in capsys.readouterr().out.splitlines() if "unreadable" in line]
    assert 5 not in seen and len(told) == 1 and f"{path}/05.jpg: " in told[0]


def test_more_tars_than_may_be_open_are_read(tmp_path):
    for number in range(shards.OPEN + 6):
        make_tar(tmp_path / f"{number:03d}.tar", [("x.jpg", jpeg(number))])
    images, before = pretrain(tmp_path), len(os.listdir("/proc/self/fd"))
    for i in range(len(images)):
        assert images.read(i)[0].size == Image.open(io.BytesIO(jpeg(i))).size
    assert len(os.listdir("/proc/self/fd")) - before <= shards.OPEN
