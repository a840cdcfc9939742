import contextlib
import importlib
import io
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import eval_retrieval
from common import augment, features
from common.distributed import RunError
from common.images import open_images
from common.retrieval_sets import read_annotations, revisited

PIXELS = ["--checkpoint", "pixels", "--workers", 0]
RANDOM = ["--checkpoint", "random", "--workers", 0]


@pytest.fixture(autouse=True)
def _one_untrained_network(monkeypatch):
    monkeypatch.setattr(features, "RANDOM_INITIALISATIONS", 1)


@pytest.fixture
def weights(tmp_path):
    """A file with an untrained network for the digits."""
    torch.save(features.build(features.DIGITS).state_dict(), tmp_path / "backbone.pth")
    return tmp_path / "backbone.pth"


def run(*flags):
    """What the script prints, and the line at its end (None: nothing, of another process)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        eval_retrieval.main(eval_retrieval.parse_args([*map(str, flags)]))
    text = out.getvalue()
    return text, json.loads(text.splitlines()[-1]) if text else None


def refused(*flags):
    with pytest.raises(RunError) as error:
        run(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------- parse_args


@pytest.mark.parametrize("flags, named", [
    (["--pool", "max"], "'max'"),
    (["--p", "3"], "--p does not go with --pool other than gem"),
    (["--whiten-dim", "8"], "--whiten-dim 8 goes with --whiten"),
    (["--scales", "0"], "'0'"),
    (["--max-side", "32", "--resize", "20"], "--resize does not go with --max-side"),
    (["--max-side", "32"], "--max-side 32"),  # pixels
    (["--max-side", "32", "--batch-size", "8"], "--batch-size does not go with --max-side"),
    (["--data", "rparis6k"], "--max-side 1024"),
    (["--data", "copydays", "--limit", "5"], "--limit does not go with --data copydays"),
    (["--data", "copydays", "--save-features", "x"], "--save-features does not go with"),
    (["--leave-one-out", "--test-data", "x"], "--test-data does not go with --leave-one-out"),
])
def test_a_bad_argument_is_one_line_with_its_value(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        eval_retrieval.parse_args(["--checkpoint", "pixels", *flags])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and named in printed and printed.count("\n") == 1


# ------------------------------------------------------------------------------------------ vectors


def maps_of(n=3, c=5, h=7, w=4):
    return np.random.default_rng(h * w).normal(size=(n, c, h, w)) * 3


@pytest.mark.parametrize("p", [1.0, 3.0, 4.5, math.inf])
def test_gem_equals_the_loop(p):
    maps = maps_of()
    wanted = np.zeros(maps.shape[:2])
    for n, c in np.ndindex(wanted.shape):
        values = maps[n, c].ravel().tolist()
        wanted[n, c] = max(values) if p == math.inf else (
            sum(max(v, 1e-6) ** p for v in values) / len(values)) ** (1 / p)
    np.testing.assert_allclose(eval_retrieval.gem(torch.from_numpy(maps), p), wanted, rtol=1e-12)


def test_the_numbers_are_vissls():
    args = eval_retrieval.parse_args(["--checkpoint", "random"])
    assert (args.p, args.k, eval_retrieval.LEVELS) == (4, [1, 5, 10], 3)


def test_gem_of_half_precision_and_of_large_maps_is_finite():
    maps = torch.from_numpy(np.abs(maps_of()))
    half = eval_retrieval.gem(maps.half(), 3.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), eval_retrieval.gem(maps, 3.0), rtol=1e-3, atol=0)
    large = eval_retrieval.gem(1e4 * maps.float(), 20.0)
    torch.testing.assert_close(large.double(), eval_retrieval.gem(1e4 * maps, 20.0))
    nothing = eval_retrieval.gem(torch.zeros(1, 2, 3, 3), 4.0)
    torch.testing.assert_close(nothing, torch.full((1, 2), 1e-6))


def loop_rmac(maps, levels):
    """R-MAC of maps (N, C, H, W), one region at a time."""
    n, _, h, w = maps.shape
    m, longest = min(h, w), max(h, w)
    overlaps = [1 - (longest - m) / (e * m) for e in range(1, 7)]
    nearest = min(round(abs(o - 0.4), 12) for o in overlaps)
    e = [round(abs(o - 0.4), 12) for o in overlaps].index(nearest) + 1 if longest > m else 0
    total = np.zeros(maps.shape[:2])
    for level in range(1, levels + 1):
        side = math.floor(2 * m / (level + 1))
        if side == 0:
            continue
        rows, columns = level + (e if h > w else 0), level + (e if w > h else 0)
        for i in range(rows):
            for j in range(columns):
                top = math.floor(i * (h - side) / (rows - 1)) if rows > 1 else 0
                left = math.floor(j * (w - side) / (columns - 1)) if columns > 1 else 0
                for image in range(n):
                    region = maps[image, :, top : top + side, left : left + side].max((1, 2))
                    length = math.sqrt((region**2).sum())
                    total[image] += region / length if length else 0
    lengths = np.sqrt((total**2).sum(1, keepdims=True))
    return total / np.where(lengths > 0, lengths, 1)


# 3 x 11, 5 x 9 and 6 x 22: two numbers of squares overlap as nearly by 0.4
@pytest.mark.parametrize("size", [(7, 7), (4, 7), (9, 5), (3, 11), (22, 6), (1, 4), (1, 1),
                                  (2, 64)])
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_rmac_equals_the_loop(size, levels):
    maps = np.abs(maps_of(2, 3, *size))
    maps[1] = 0  # of which nothing is known
    found = eval_retrieval.rmac(torch.from_numpy(maps), levels)
    np.testing.assert_allclose(found, loop_rmac(maps, levels), rtol=1e-12)


def test_of_equally_near_overlaps_the_fewer_squares_count():
    assert len(eval_retrieval.region_boxes(3, 11, 1)) == 5  # 1 + 4: overlaps 1/3 and 7/15 of 4, 5
    assert eval_retrieval.region_boxes(4, 4, 2) == [(0, 0, 4), (0, 0, 2), (0, 2, 2), (2, 0, 2),
                                                   (2, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_equals_the_loop(dtype):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 6)) @ np.diag([5, 3, 1, 0.5, 1e-4, 0]) @ rng.normal(size=(6, 6)) + 2
    mean, covariance = np.zeros(6), np.zeros((6, 6))
    for row in x:
        mean += row / len(x)
    for row in x:
        covariance += np.outer(row - mean, row - mean) / len(x)
    values, axes = np.linalg.eigh(covariance)
    values, axes = values[::-1], axes[:, ::-1]
    wanted = axes * np.maximum(values, 1e-5 * values[0]) ** -0.5
    found_mean, found = eval_retrieval.whitening(torch.from_numpy(x).to(dtype), 4)
    assert found.shape == (6, 4) and found_mean.dtype == found.dtype == dtype
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(found_mean, mean, rtol=rtol)
    signs = np.sign((found.double().numpy() * wanted[:, :4]).sum(0))
    np.testing.assert_allclose(found.double().numpy() * signs, wanted[:, :4], rtol=rtol, atol=rtol)
    floored = eval_retrieval.whitening(torch.from_numpy(x), 6)[1].numpy()[:, 4:]
    np.testing.assert_allclose((floored**2).sum(0), 1e5 / values[0], rtol=1e-9)


def test_regions_are_whitened_one_by_one():
    vectors = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, projection = torch.randn(4).double(), torch.randn(4, 2).double()
    found = eval_retrieval.together(vectors, (mean, projection)).numpy()
    for image, wanted in zip(vectors.numpy(), found, strict=True):
        total = np.zeros(2)
        for region in image:
            turned = (region - mean.numpy()) @ projection.numpy()
            total += turned / np.linalg.norm(turned)
        np.testing.assert_allclose(total / np.linalg.norm(total), wanted, rtol=1e-9)


# ----------------------------------------------------------------------------------------- measures


def ranking(scores, positive, junk):
    """Whether each ranked item is relevant, nearest first, ties in order, junk left out."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [bool(positive[i]) for i in order if not junk[i]]


def loop_measures(ranked, cutoffs):
    """AP by trapezoids, recall and precision at each k of one ranking."""
    total, last = sum(ranked), max((i for i, hit in enumerate(ranked) if hit), default=-1)
    hits, ap = 0, 0.0
    for rank, hit in enumerate(ranked):
        if hit:
            before = hits / rank if rank else 1.0
            hits += 1
            ap += (before + hits / (rank + 1)) / 2 / total
    taken = [min(k, last + 1) for k in cutoffs]
    return [ap, *(float(any(ranked[:k])) for k in cutoffs),
            *(sum(ranked[:k]) / k for k in taken)]


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_equals_the_loop(seed):
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, 40, p=[0.6, 0.25, 0.15])
    scores = rng.normal(size=40) if seed % 2 else rng.integers(0, 5, 40).astype(float)  # ties
    positive, junk = kind == 1, kind == 2
    given = [torch.from_numpy(x) for x in (scores, positive, junk)]
    wanted = loop_measures(ranking(scores, positive, junk), [1, 5, 10, 100])
    assert eval_retrieval.average_precision(*given).item() == pytest.approx(wanted[0], rel=1e-12)
    found = eval_retrieval.measures(eval_retrieval.positive_ranks(*given), [1, 5, 10, 100])
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_average_precision_of_one_positive_is_half_of_one_by_its_rank():
    for rank in range(5):
        scores, positive = -torch.arange(5.0), torch.arange(5) == rank
        found = eval_retrieval.average_precision(scores, positive, torch.zeros(5).bool())
        assert found.item() == pytest.approx(0.5 / (rank + 1) if rank else 1)
    none = torch.zeros(5).bool()
    assert math.isnan(eval_retrieval.average_precision(scores, none, none))
    assert math.isnan(eval_retrieval.average_precision(scores, none, ~none))


def of_rows(database, labels, queries, asked, *flags):
    """The results for given features, float32."""
    split = [features.Split({"x": torch.from_numpy(rows).float()}, classes, np.arange(len(rows)))
             for rows, classes in ((database, labels), (queries, asked))]
    found = features.Features("given", "", *split)
    world = eval_retrieval.comm.World(0, 1, torch.device("cpu"))
    args = eval_retrieval.parse_args(["--checkpoint", "pixels", *map(str, flags)])
    return eval_retrieval.evaluate(found, features.Source("given", args, world))


def rows_and_labels(n=60, m=13, d=6, classes=4):
    rng = np.random.default_rng(7)
    return (rng.normal(size=(n, d)), rng.integers(0, classes, n), rng.normal(size=(m, d)),
            rng.integers(0, classes, m))


def test_results_are_the_loops_means_whatever_order_scale_and_chunk():
    database, labels, queries, asked = rows_and_labels()
    result = of_rows(database, labels, queries, asked)
    unit = database / np.linalg.norm(database, axis=1, keepdims=True)
    wanted = np.mean([
        loop_measures(ranking(unit @ query, labels == label, labels < 0), [1, 5, 10])
        for query, label in zip(queries, asked, strict=True)], axis=0)
    (found,) = result["results"]
    numbers = [found["map"], *found["recall"].values(), *found["precision"].values()]
    np.testing.assert_allclose(numbers, wanted, rtol=1e-9)
    order = np.random.default_rng(0).permutation(len(database))
    assert of_rows(database[order], labels[order], queries, asked) == result
    scales = np.random.default_rng(0).uniform(0.1, 9, (len(database), 1))
    assert of_rows(scales * database, labels, 1e-3 * queries, asked) == result
    assert of_rows(database, labels, queries, asked, "--chunk", 3) == result


def test_equal_images_rank_in_the_order_of_the_database():
    """A matrix product rounds the cosines of equal rows differently: the last of so many digits."""
    rng = np.random.default_rng(0)
    database, queries = rng.normal(size=(1, 129)).repeat(1003, 0), rng.normal(size=(5, 129))
    labels = np.arange(1003) >= 1002
    for classes, rank in ((labels, 1002), (labels[::-1], 0)):
        found = of_rows(database, classes.astype(int), queries, np.ones(5, int))
        assert found["map"] == pytest.approx(0.5 / (rank + 1) if rank else 1)


def test_queries_without_a_relevant_image_do_not_count(capsys):
    database, labels, queries, asked = rows_and_labels()
    wanted = of_rows(database, labels, queries[:9], asked[:9])
    asked[9:] = 7
    found = of_rows(database, labels, queries, asked)
    assert found["results"] == wanted["results"] and found["num_test"] == 13
    assert "4 of 13 queries have no relevant one" in capsys.readouterr().out
    with pytest.raises(RunError, match="of 13 queries .* none"):
        of_rows(database, labels, queries, asked * 0 + 9)


# ------------------------------------------------------------------------------------------ running


def test_pixels_find_digits_as_the_loops_say_and_better_than_an_untrained_network():
    text, line = run("--checkpoint", "random", "pixels", "--limit", 200, "--workers", 0)
    images = [open_images("digits", split, 1, limit=200) for split in ("train", "test")]
    database, queries = (np.stack([np.asarray(split.read(i)[0]) for i in range(200)])
                         .reshape(200, -1) / 127.5 - 1 for split in images)
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (database, queries)]
    cosines = (queries / lengths[1]) @ (database / lengths[0]).T
    labels, asked = (split.labels for split in images)
    wanted = np.mean([loop_measures(ranking(row, labels == label, labels < 0), [1, 5, 10])
                      for row, label in zip(cosines, asked, strict=True)], axis=0)
    assert line["map"] == pytest.approx(wanted[0], abs=1e-5)
    assert [*line["results"][0]["recall"].values()] == pytest.approx(wanted[1:4].tolist(), abs=1e-9)
    untrained = line["checkpoints"][0]
    assert untrained["checkpoint"] == "random (resnet_tiny)" and untrained["map"] < line["map"]
    assert (line["num_train"], line["num_test"]) == (200, 200) and "recall@10" in text


def test_within_one_split_an_image_does_not_find_itself(tmp_path):
    _, line = run(*PIXELS, "--leave-one-out", "test", "--limit", 100)
    images = open_images("digits", "test", 1, limit=100)
    x = np.stack([np.asarray(images.read(i)[0]) for i in range(100)]).reshape(100, -1) / 127.5 - 1
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    own = np.eye(100, dtype=bool)
    wanted = np.mean([loop_measures(
        ranking(x @ x[q], (images.labels == images.labels[q]) & ~own[q], own[q]), [1, 5, 10])[0]
        for q in range(100)])
    assert line["map"] == pytest.approx(wanted, abs=1e-5) and line["leave_one_out"] == "test"
    for i in range(100):  # the same as a folder without splits
        (tmp_path / str(images.labels[i])).mkdir(exist_ok=True)
        images.read(i)[0].save(tmp_path / str(images.labels[i]) / f"{i:03d}.png")
    _, folder = run(*PIXELS, "--leave-one-out", "--data", tmp_path, "--image-size", 16, "--mean",
                    0.5, "--std", 0.5)
    assert folder["map"] == pytest.approx(line["map"]) and folder["num_test"] == 100


def test_two_processes_find_the_same(pool, weights):
    flags = ["--checkpoint", weights, "--limit", 60, "--pool", "rmac", "--scales", 1, 0.5,
             "--whiten", "digits", "--whiten-dim", 20, "--batch-size", 16, "--chunk", 7]
    wanted = run(*flags)[1]
    first, second = pool.run(2, run, *flags)
    assert first[1] == wanted and second == ("", None)


def test_regions_that_an_image_does_not_have_do_not_whiten(weights):
    """Whole images may have more regions than squares have: as many are set aside."""
    flags = ["--checkpoint", weights, "--limit", 40, "--pool", "rmac", "--whiten", "digits"]
    square, whole = run(*flags)[1], run(*flags, "--max-side", 16)[1]
    assert square["map"] == pytest.approx(whole["map"], abs=1e-6)


def test_stored_features_give_the_same(tmp_path, weights):
    flags = ["--limit", 80, "--pool", "gem", "--p", 3, "--save-features", tmp_path / "x.npz"]
    _, line = run("--checkpoint", weights, *flags)
    text, stored = run("--features", tmp_path / "x.npz")
    assert stored["results"] == line["results"]
    assert "pool gem of p 3, scales 1" in text and "cls or avg" not in text


def test_the_precision_is_of_the_backbone_not_of_pooling_and_whitening(weights, tmp_path):
    """Features in bfloat16 are whitened as the float32 ones they are stored as."""
    flags = ["--checkpoint", weights, "--limit", 40, "--amp", "bf16"]
    run(*flags, "--save-features", tmp_path / "plain.npz")
    run(*flags, "--whiten", "digits", "--whiten-dim", 8, "--save-features", tmp_path / "white.npz")
    plain, white = (features.read(str(tmp_path / name)) for name in ("plain.npz", "white.npz"))
    rows = plain.train.layers["avgpool"]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(40), rtol=1e-6, atol=1e-6)
    mean, projection = eval_retrieval.whitening(rows, 8)
    wanted = torch.nn.functional.normalize((rows - mean) @ projection)
    torch.testing.assert_close(white.train.layers["avgpool"], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags", [
    ["--pool", "cls"], ["--pool", "avg"], ["--pool", "gem", "--layers", "patches"],
    ["--pool", "rmac", "--max-side", 13, "--scales", 1, 1.4, "--whiten", "digits"],
    ["--layers", "cls2", "patches"],
])
def test_a_transformers_token_and_patches_are_pooled(flags):
    _, line = run(*RANDOM, "--arch", "vit_micro", "--limit", 30, *flags)
    assert 0 < line["map"] < 1


@pytest.mark.parametrize("flags, named", [
    (["--pool", "cls"], "--pool cls needs what the backbone does not have"),
    (["--pool", "gem", "--layers", "res4-grid"], "--layers res4-grid"),
    (["--layers", "res6"], "--layers res6: there are conv1"),
    (["--arch", "vit_micro", "--pool", "gem", "--layers", "cls"], "--layers cls: there are"),
    (["--arch", "torchvision:mobilenet_v3_small", "--pool", "rmac", "--image-size", 64],
     "--pool rmac"),
    (["--whiten", "digits", "--whiten-dim", 200], "--whiten-dim 200: digits gives"),
    (["--whiten", "nowhere"], "nowhere"),
])
def test_what_is_not_there_is_told_in_one_line(flags, named):
    assert named in refused(*RANDOM, "--limit", 12, *flags)


def test_means_over_scales_and_places_are_those_of_the_layers():
    """Of one scale, `avg` and GeM of p 1 are the feature of the other scripts."""
    torch.manual_seed(0)
    backbone = features.build(features.DIGITS).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        usual = features.layers(backbone, images)["avgpool"]
        unit = torch.nn.functional.normalize(usual)[:, None]
        found = eval_retrieval.vectors_of(backbone, images, ["avgpool"], None, 4, [1.0])["avgpool"]
        torch.testing.assert_close(found, unit)
        gem = eval_retrieval.vectors_of(backbone, images, ["res5"], "gem", 1.0, [1.0])["res5"]
        torch.testing.assert_close(gem, unit, rtol=1e-3, atol=1e-4)
        small = torch.nn.functional.interpolate(images, (8, 8), mode="bilinear")
        both = usual + features.layers(backbone, small)["avgpool"]
        found = eval_retrieval.vectors_of(backbone, images, ["avgpool"], "avg", 4, [1, 0.5])
        torch.testing.assert_close(found["avgpool"][:, 0], torch.nn.functional.normalize(both))


# ----------------------------------------------------------------------------- images of odd shapes


def save(path, size, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)


RESNET = ["--arch", "resnet_tiny", "--stem", "small"]
VIT = ["--arch", "vit_micro", "--patch-size", 4]


@pytest.mark.parametrize("flags", [
    RESNET, [*RESNET, "--pool", "rmac", "--max-side", 64], [*RESNET, "--pool", "gem"],
    [*VIT, "--pool", "rmac", "--max-side", 64]])
def test_images_of_three_pixels_height_or_width(flags, tmp_path):
    for number in range(3):
        save(tmp_path / "wide" / f"{number}.png", (3000, 3), number)
        save(tmp_path / "high" / f"{number}.png", (3, 3000), number)
    _, line = run(*RANDOM, "--data", tmp_path, "--leave-one-out", "--image-size", 16, *flags)
    assert 0 < line["map"] <= 1 and line["results"][0]["num_queries"] == 6


def test_one_image_a_class_and_an_empty_class(tmp_path):
    for name in "abc":
        save(tmp_path / "train" / name / "1.png", (20, 20), ord(name))
        save(tmp_path / "test" / name / "1.png", (20, 20), ord(name))
    flags = [*PIXELS, "--data", tmp_path, "--image-size", 16]
    assert run(*flags)[1]["map"] == 1
    told = refused(*flags, "--leave-one-out", "test")
    assert "of 3 queries (class) none has a relevant one among the 3 images" in told
    os.remove(tmp_path / "train" / "b" / "1.png")  # a class without an image in the database
    text, line = run(*flags)
    assert "1 of 3 queries have no relevant one" in text and line["map"] == 1
    assert "class folders of" in text and "without an image: b" in text
    os.remove(tmp_path / "test" / "c" / "1.png")
    assert run(*flags)[1]["num_test"] == 2


def test_a_longer_side_is_made_smaller_and_never_larger():
    step = augment.LongerSide(10, "bicubic")
    for size, wanted in (((40, 20), (10, 5)), ((3, 3000), (1, 10)), ((9, 4), (9, 4))):
        assert step.apply(Image.new("L", size), None, None).size == wanted
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40), dtype=np.uint8))
    assert step.apply(image, None, None) == image.resize((10, 5), Image.Resampling.BICUBIC)


def test_copies_are_squeezed_and_scaled_images_have_whole_patches():
    args = eval_retrieval.parse_args(["--checkpoint", "random", "--data", "copydays"])
    assert eval_retrieval.step_of(args, 256, "bicubic") == augment.Resize("bicubic")
    images = torch.zeros(1, 3, 32, 16)  # 22.6 and 11.3 pixels: 6 and 3 patches
    assert eval_retrieval.at_scale(images, 0.7071, 4).shape[2:] == (24, 12)


# --------------------------------------------------------------------------------------------- sets


@pytest.fixture
def paris(tmp_path):
    """Twelve images and two queries; the function writes their annotation."""
    folder = tmp_path / "rparis6k"
    for number in range(14):
        save(folder / "jpg" / f"p{number}.jpg", (40, 24), number, quality=95)
    both = [Image.open(folder / "jpg" / f"p{number}.jpg") for number in (0, 5)]
    for number, image in zip((12, 13), both, strict=True):  # queries: parts of images 0 and 5
        whole = Image.new("RGB", (60, 60), "red")
        whole.paste(image, (10, 20))
        whole.save(folder / "jpg" / f"p{number}.jpg", quality=95)
    gnd = [{"easy": [0, 1], "hard": [2], "junk": [3], "bbx": [9.8, 20.0, 50.1, 44.0]},
           {"easy": [], "hard": np.array([5, 6]), "junk": [0], "bbx": np.array([10, 20, 50, 44])}]
    given = {"imlist": [f"p{i}" for i in range(12)], "qimlist": ["p12", "p13"], "gnd": gnd}

    def write(protocol=2, **changed):
        with open(folder / "gnd_rparis6k.pkl", "wb") as file:
            pickle.dump(given | changed, file, protocol=protocol)
        return [*RANDOM, "--data", "rparis6k", "--data-root", tmp_path, "--arch", "resnet_tiny",
                "--stem", "small"]

    return write


def test_revisited_sets_at_three_settings(paris, monkeypatch, tmp_path):
    rows = {}
    measure = eval_retrieval.measure

    def kept(queries, database, *others):
        rows["cosines"] = (queries.double() @ database.double().T).numpy()
        return measure(queries, database, *others)

    monkeypatch.setattr(eval_retrieval, "measure", kept)
    text, line = run(*paris(), "--max-side", 32, "--pool", "gem", "--whiten",
                     tmp_path / "rparis6k" / "jpg", "--whiten-dim", 12)
    assert rows["cosines"].argmax(1).tolist() == [0, 5]  # for queries were cut out
    kinds = {"medium": ([{0, 1, 2}, {5, 6}], [{3}, {0}]), "hard": ([{2}, {5, 6}], [{0, 1, 3}, {0}]),
             "easy": ([{0, 1}, set()], [{2, 3}, {0, 5, 6}])}
    assert [result["relevant"] for result in line["results"]] == [*kinds]
    for result, (good, ignored) in zip(line["results"], kinds.values(), strict=True):
        wanted = np.mean([
            loop_measures(ranking(row, [i in yes for i in range(12)], [i in no for i in range(12)]),
                          [1, 5, 10])
            for row, yes, no in zip(rows["cosines"], good, ignored, strict=True) if yes], axis=0)
        found = [result["map"], *result["recall"].values(), *result["precision"].values()]
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
        assert result["num_queries"] == sum(map(bool, good))
    assert line["map"] == line["results"][0]["map"] and "mP@10" in text
    assert "2 queries searched for in 12 images" in text
    assert "pass --no-exif-orientation or --no-crop" in refused(*paris(), "--exif-orientation")
    queries = revisited(str(tmp_path / "rparis6k"), "rparis6k", 3, crop=True)[1]
    assert queries.read(0)[0].size == (40, 24)  # its box is rounded
    queries.boxes[0] = [-5, 20, 900, 900]
    assert queries.read(0)[0].size == (60, 40)  # and ends with the image
    run(*paris(), "--max-side", 32, "--no-crop-queries", "--exif-orientation")
    assert rows["cosines"].shape == (2, 12)


@pytest.mark.parametrize("protocol", range(6))
def test_annotations_of_every_protocol_are_read(protocol, tmp_path):
    given = {"gnd": [{"easy": np.arange(3), "bbx": np.array([0.5, 1, 2, 3])}], "n": np.int64(3),
             "imlist": ["a", "b"], "more": (1, {2}, b"", b"x", None, 0.5, True),
             "object": np.array([[1], "x"], dtype=object)}
    with open(tmp_path / "x.pkl", "wb") as file:
        pickle.dump(given, file, protocol=protocol)
    found = read_annotations(str(tmp_path / "x.pkl"))
    assert found["gnd"][0]["easy"].tolist() == [0, 1, 2] and found["imlist"] == ["a", "b"]
    assert found["gnd"][0]["bbx"].tolist() == [0.5, 1, 2, 3] and found["more"] == given["more"]


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", [
    (os.system, "touch {}"), (eval, "open('{}', 'w')"), (exec, "open('{}', 'w')"),
    (open, "{}", "w"), (importlib.import_module, "antigravity"), (np.load, "{}"),
    (np.fromfile, "{}")],
    ids=lambda call: call[0].__name__)
def test_an_annotation_that_calls_anything_is_refused_and_nothing_runs(call, protocol, paris,
                                                                      tmp_path):
    trace = tmp_path / "was run"
    bad = Calls(call[0], *(argument.format(str(trace)) for argument in call[1:]))
    for changed in ({"more": bad}, {"gnd": np.array([bad], dtype=object)}):
        told = refused(*paris(protocol, **changed))
        assert "gnd_rparis6k.pkl is refused: it asks for" in told and not trace.exists()


def test_what_is_wrong_with_an_annotation_is_told(paris, tmp_path):
    path = tmp_path / "rparis6k" / "gnd_rparis6k.pkl"
    flags = [*RANDOM, "--data", "rparis6k", "--data-root", tmp_path]
    assert f"{path}: no such file" in refused(*flags)
    for content in (b"", b"no pickle", pickle.dumps([1])[:-1], b"\x80\x04\x8c\x02os\x8c\x06system"):
        path.write_bytes(content)
        assert "is refused" in refused(*flags)
    box = [0, 0, 5, 5]
    for gnd in ([], [{}], [{"easy": [12], "hard": [], "junk": [], "bbx": box}] * 2,
                [{"easy": [1], "hard": [1], "junk": [], "bbx": box}] * 2,
                [{"easy": ["a"], "hard": [], "junk": [], "bbx": box}] * 2,
                [{"easy": [1], "hard": [], "junk": [], "bbx": [math.nan] * 4}] * 2):
        assert "is no annotation of rparis6k" in refused(*paris(gnd=gnd))
    beside = [{"easy": [1], "hard": [], "junk": [], "bbx": [90, 0, 95, 5]}] * 2
    assert "is beside the image" in refused(*paris(gnd=beside))
    flags = paris()
    os.remove(tmp_path / "rparis6k" / "jpg" / "p3.jpg")
    assert "1 of 14 images are missing" in refused(*flags)


def digit_copies(folder, count=40):
    """Enlarged digits, and the same shifted by a pixel and re-encoded, as Copydays names them."""
    images = open_images("digits", "test", 1, limit=count)
    for i in range(count):
        image = images.read(i)[0].resize((64, 64), Image.Resampling.BICUBIC)
        moved = Image.fromarray(np.roll(np.asarray(image), 1, axis=i % 2))
        crop = image.crop((2, 2, 62, 62))
        for part, copy, name in (("original", image, "00.png"), ("strong", moved, "01.jpg"),
                                 ("crops/10", crop, "12.png")):
            path = folder / part / f"{2000 + i}{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            copy.save(path)
    distractors = open_images("digits", "train", 1, limit=100)
    for i in range(100):
        path = folder / "distractors" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        distractors.read(i)[0].resize((64, 64)).save(path)
    save(folder / "train" / "no number.png", (9, 9))


def test_copies_are_found_among_distractors(tmp_path):
    digit_copies(tmp_path / "copydays")
    text, line = run("--checkpoint", "random", "pixels", "--data", "copydays", "--data-root",
                     tmp_path, "--image-size", 16, "--arch", "resnet_tiny", "--stem", "small",
                     "--workers", 0)
    assert (line["num_train"], line["num_test"]) == (140, 80)
    for entry in line["checkpoints"]:
        strong, crops = entry["results"]
        assert (strong["relevant"], crops["relevant"]) == ("strong", "crops/10")
        assert strong["num_queries"] == crops["num_queries"] == 40
    assert line["results"][0]["recall"]["1"] == line["results"][0]["precision"]["1"] == 1.0
    assert "pixels strong" in text and "80 queries searched for in 140 images" in text


def test_near_duplicates_are_found_by_class_as_well(tmp_path):
    """Every image is its own class: recall at 1 is 1 where each finds its shifted copy."""
    digit_copies(tmp_path / "copies", 20)
    for split, part in (("train", "original"), ("test", "strong")):
        for path in (tmp_path / "copies" / part).iterdir():
            target = tmp_path / split / path.stem[:4] / path.name
            target.parent.mkdir(parents=True)
            path.rename(target)
    _, line = run(*PIXELS, "--data", tmp_path, "--image-size", 32)
    assert line["results"][0]["recall"]["1"] == line["map"] == 1.0


@pytest.mark.parametrize("file, told", [
    ("strong/999901.png", "no original 999900"), ("strong/cat.png", "begins with no number")])
def test_a_copy_without_its_original_is_told(file, told, tmp_path):
    flags = [*PIXELS, "--data", "copydays", "--data-root", tmp_path]
    assert "--data-root is the folder above it" in refused(*flags)
    save(tmp_path / "copydays" / "original" / "200000.png", (9, 9))
    assert "no copies" in refused(*flags)
    save(tmp_path / "copydays" / file, (9, 9))
    assert told in refused(*flags)


def test_a_warning_comes_once_and_the_last_line_says_what_was_pooled(monkeypatch):
    monkeypatch.setattr(features, "RANDOM_INITIALISATIONS", 2)
    text, line = run(*RANDOM, "--limit", 40, "--pool", "gem", "--scales", 1, 0.5, "--whiten",
                     "digits")
    assert text.count("so 39 dimensions are kept") == 1
    assert [line[name] for name in ("pool", "p", "scales", "whiten", "whiten_dim", "max_side",
                                    "leave_one_out")] == [
        "gem", 4, [1, 0.5], "digits", None, None, None]
