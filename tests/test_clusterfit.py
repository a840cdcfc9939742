import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

import clusterfit
import eval_knn
from common import features
from common.distributed import RunError
from common.images import open_images
from helpers import random_images

FLAGS = ["--checkpoint", "pixels", "--num-clusters", 12, "--workers", 0]


def run(*flags, module=clusterfit):
    """What a script prints, and the line at its end (None: nothing, of another process)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        module.main(module.parse_args([*map(str, flags)]))
    text = out.getvalue()
    return text, json.loads(text.splitlines()[-1]) if text else None


def refused(*flags):
    with pytest.raises(RunError) as error:
        run(*flags)
    return str(error.value)


@pytest.fixture
def photos(tmp_path):
    """Twenty images without labels, told by their gray, ten dark and ten bright."""
    for number in range(20):
        gray = 10 * (number % 2) * 15 + number
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("L", (8, 8), gray).save(tmp_path / "photos" / f"{number:02d} x.png")
    return tmp_path / "photos"


# ----------------------------------------------------------------------------------------- clusters


def test_whitened_rows_have_unit_variance_but_where_there_is_none():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3000, 4)) @ rng.normal(size=(4, 5)) + 3  # rank 4 of 5
    mean, projection = clusterfit.whitening(torch.from_numpy(x), 5)
    rows = ((torch.from_numpy(x) - mean) @ projection).numpy()
    wanted = np.diag([1, 1, 1, 1, 0])
    np.testing.assert_allclose(rows.T @ rows / len(x), wanted, atol=1e-9)
    variances = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    lengths = np.linalg.norm(projection.numpy(), axis=0)
    np.testing.assert_allclose(lengths[:4], variances[:4] ** -0.5)
    np.testing.assert_allclose(lengths[4], (1e-5 * variances[0]) ** -0.5)
    assert clusterfit.whitening(torch.from_numpy(x), 2)[1].shape == (5, 2)
    alike = torch.full((7, 3), 0.1)
    mean, projection = clusterfit.whitening(alike, 2)
    assert ((alike - mean) @ projection).abs().max() < 0.1


# ------------------------------------------------------------------------------------------ running


def test_every_image_has_its_cluster_in_the_order_of_the_data(tmp_path):
    text, line = run(*FLAGS, "--output", tmp_path)
    images = {split: open_images("digits", split, 3) for split in ("pretrain", "test")}
    for split, ending in (("pretrain", ""), ("test", "-test")):
        found = np.load(tmp_path / f"assignments{ending}.npy")
        assert found.dtype == np.int64 and found.shape == (len(images[split]),)
        name = ending.replace("-", "_")
        sizes = np.bincount(found, minlength=12)
        assert (line[f"smallest{name}"], line[f"largest{name}"]) == (sizes.min(), sizes.max())
        assert line[f"median{name}"] == np.median(sizes)
        nmi = normalized_mutual_info_score(images[split].labels, found)
        assert line[f"nmi{name}"] == pytest.approx(nmi) and nmi > 0.4
    assert (line["eval"], line["num_clusters"]) == ("clusterfit", 12)
    assert (line["num_train"], line["num_test"]) == (1442, 355)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["assignments-test.npy", "assignments.npy"]
    # The same with numpy: unit rows, the same start, the means that it ends with.
    x = np.stack([np.asarray(images["pretrain"].read(i)[0]) for i in range(1442)])
    x = ((x / 255 - 0.5) / 0.5).reshape(1442, -1)
    x = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)
    found = np.load(tmp_path / "assignments.npy")
    means = np.stack([x[found == c].mean(0) for c in range(12)])
    nearest = ((x[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == found).mean() > 0.99


def test_the_seed_alone_decides(tmp_path):
    found = []
    for number, flags in enumerate(([], ["--batch-size", 100], ["--seed", 1], ["--pca-dim", 5])):
        run(*FLAGS, "--limit", 300, *flags, "--output", tmp_path / str(number))
        found.append((tmp_path / str(number) / "assignments.npy").read_bytes())
    assert found[0] == found[1] and len({*found}) == 3


def test_two_processes_write_the_same_files(pool, tmp_path):
    flags = [*FLAGS, "--limit", 500, "--pca-dim", 8, "--output"]
    text, line = run(*flags, tmp_path / "one")
    first, second = pool.run(2, run, *flags, tmp_path / "two")
    assert first[1] == line and second == ("", None)
    for name in ("assignments.npy", "assignments-test.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_stored_features_have_the_same_clusters(tmp_path):
    run("--checkpoint", "pixels", "--limit", 300, "--save-features", tmp_path / "x.npz", "--shots",
        module=eval_knn)
    run("--features", tmp_path / "x.npz", "--num-clusters", 12, "--output", tmp_path / "stored")
    found = np.load(tmp_path / "stored" / "assignments.npy")
    images = open_images("digits", "pretrain", 3, limit=300)
    run(*FLAGS, "--limit", 300, "--output", tmp_path / "seen", "--seed", 0)
    assert np.array_equal(found, np.load(tmp_path / "seen" / "assignments.npy"))
    assert normalized_mutual_info_score(images.labels, found) > 0.4


SMALL = ["--image-size", 8, "--workers", 0, "--mean", 0, "--std", 1]


def test_a_folder_without_labels_gives_a_list_that_others_read(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(*FLAGS, "--limit", 30, "--output", out)  # leaves a test split there
    monkeypatch.chdir(tmp_path)
    text, line = run("--checkpoint", "pixels", "--data", "photos", "--num-clusters", 2, *SMALL,
                     "--output", out)
    assert line["nmi"] is None and "nmi" not in text.splitlines()[-2] and "num_test" not in line
    assert sorted(p.name for p in out.iterdir()) == ["assignments.npy", "labels.txt"]
    found = np.load(out / "assignments.npy")
    listed = open_images(str(out / "labels.txt"), "pretrain", 3)
    images = open_images(str(photos), "pretrain", 3)
    assert [listed.name(i) for i in range(20)] == [images.name(i) for i in range(20)]
    assert np.array_equal(listed.labels, found)
    _, tested = run("--checkpoint", "pixels", "--data", out / "labels.txt", "--test-data",
                    out / "labels.txt", "--arch", "resnet_tiny", *SMALL, "--k", 1, "--shots",
                    module=eval_knn)
    assert (tested["num_train"], tested["num_test"]) == (20, 20)


def test_separated_groups_are_the_clusters(tmp_path):
    """Images of three kinds, each in many strengths: the same direction, so the same unit row."""
    kinds = random_images(3, size=8)
    names = []
    for number in range(30):
        names.append(f"{number}.png {number % 3}")
        image = (kinds[number % 3] * (0.5 + number / 60)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "list.txt").write_text("\n".join(names))
    seeds = []
    for seed in range(6):  # some start has one image of each kind
        _, line = run("--checkpoint", "pixels", "--data", tmp_path / "list.txt", "--num-clusters",
                      3, *SMALL, "--seed", seed, "--output", tmp_path / "out")
        seeds.append((line["nmi"], line["smallest"], line["largest"], line["empty"]))
    assert (pytest.approx(1), 10, 10, 0) in seeds


@pytest.mark.parametrize("flags, said", [
    (["--num-clusters", 31, "--limit", 30], "--num-clusters 31 is more than the 30 images"),
    (["--pca-dim", 31, "--limit", 30], "--pca-dim 31 is more than the 30 images or their 768"),
    (["--pca-dim", 769], "--pca-dim 769 is more"),
])
def test_what_cannot_be_is_one_line(flags, said, tmp_path):
    assert said in refused(*FLAGS, *flags, "--output", tmp_path)


@pytest.mark.parametrize("flags, said", [
    (["--checkpoint", "pixels", "random"], "unrecognized arguments: random"),
    (["--layers", "res4", "res5"], "unrecognized arguments: res5"),
    (["--limit-per-class", 3], "--limit-per-class 3 needs labels"),
])
def test_one_network_and_no_labels(flags, said, capsys):
    with pytest.raises(SystemExit):
        clusterfit.parse_args([*map(str, [*FLAGS, "--output", "x", *flags])])
    assert said in capsys.readouterr().err


def test_features_without_labels_are_not_stored_for_evaluations(photos, tmp_path):
    said = refused(*FLAGS, "--data", photos, *SMALL, "--output", tmp_path / "out",
                   "--save-features", tmp_path / "x.npz")
    assert "no labels, or no test split" in said


def test_a_name_that_breaks_a_list_is_told(photos, tmp_path):
    (photos / "00 x.png").rename(photos / "0\n0.png")
    said = refused(*FLAGS, "--data", photos, *SMALL, "--output", tmp_path / "out")
    assert "does not go into a list" in said and "\n" not in said


def test_a_file_with_several_layers_wants_one_named(tmp_path):
    rows = {name: torch.randn(20, 3) for name in ("a", "b")}
    split = features.Split(rows, np.arange(20) % 2, np.arange(20))
    world = features.World(0, 1, torch.device("cpu"))
    found = features.Features("some", "images", split, split)
    features.write(found, str(tmp_path / "x.npz"), world)
    flags = ["--features", tmp_path / "x.npz", "--num-clusters", 2, "--output", tmp_path / "out"]
    assert "has the layers a b; choose one with --layers" in refused(*flags)
    assert run(*flags, "--layers", "b")[1]["num_test"] == 20
