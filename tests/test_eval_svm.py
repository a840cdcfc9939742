import contextlib
import io
import json
import math
from functools import partial

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torchvision import transforms

import drill
import eval_svm
from common import distributed as comm, images
from common.distributed import RunError
from common.images import open_images

# --------------------------------------------------------------------------------------- parse_args


def test_the_protocol_is_the_published_one():
    args = eval_svm.parse_args(["--checkpoint", "pixels"])
    assert args.costs == [0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000]
    assert args.low_shot == [1, 2, 4, 8, 16, 32, 64, 96]
    assert (args.folds, args.draws, args.vissl_labels) == (3, 5, False)
    assert dict(
        penalty="l2", loss="squared_hinge", dual=True, tol=1e-4, max_iter=2000,
        intercept_scaling=1, class_weight={1: 2, -1: 1},
    ) == eval_svm.SVM


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--checkpoint", "pixels", "--folds", "1"], "--folds: '1'"),
        (["--checkpoint", "pixels", "--costs", "0"], "'0'"),
        (["--checkpoint", "pixels", "--low-shot", "-1"], "'-1'"),
        ([], "--checkpoint"),
    ],
)
def test_a_bad_argument_is_one_line_with_its_value(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        eval_svm.parse_args(flags)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and named in printed and printed.count("\n") == 1


# ---------------------------------------------------------------------------------------- precision

average_precision_11_point = partial(eval_svm.average_precision, points=11)
# One ranking, best first: precision rises again at places 7, 8, 13 and 14; recalls are tenths.
RANKING = [1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0]


def falling(n):
    return np.linspace(1, 0, n)


def test_average_precision_is_the_area_under_the_envelope():
    # Precision at the hits 3/3 three times, 4/5, 5/7, 6/8, 7/10, 8/13, 9/14, 10/16; the envelope
    # lifts 5/7 to 6/8 and 8/13 to 9/14.
    by_hand = (3 + 4 / 5 + 6 / 8 + 6 / 8 + 7 / 10 + 9 / 14 + 9 / 14 + 10 / 16) / 10
    got = eval_svm.average_precision(RANKING, falling(17))
    assert got == pytest.approx(by_hand, abs=1e-15) and round(got, 4) == 0.7911
    without_envelope = average_precision_score(RANKING, falling(17))
    assert round(without_envelope, 4) == 0.7848


def test_the_11_points_reach_their_thresholds_exactly():
    # Thresholds 0 to .3: 1; .4: 4/5; .5, .6: 6/8; .7: 7/10; .8, .9: 9/14; 1: 10/16
    by_hand = (4 + 4 / 5 + 6 / 8 + 6 / 8 + 7 / 10 + 9 / 14 + 9 / 14 + 10 / 16) / 11
    got = average_precision_11_point(RANKING, falling(17))
    assert got == pytest.approx(by_hand, abs=1e-15) and round(got, 4) == 0.8101


def test_the_11_points_of_seven_hits_interpolate():
    # Two images, the second is the one: precision 1/2 at every recall.
    assert average_precision_11_point([0, 1], [2.0, 1.0]) == 0.5
    # Three positives: recalls 1/3, 2/3, 1 with precision 1, 2/4, 3/5, so 3/5 from the second on.
    targets = [1, 0, 0, 1, 1]
    expected = (4 * 1 + 7 * 3 / 5) / 11
    assert average_precision_11_point(targets, falling(5)) == pytest.approx(expected)
    assert eval_svm.average_precision(targets, falling(5)) == pytest.approx((1 + 2 * 3 / 5) / 3)


def test_equal_scores_count_together():
    targets, scores = [0, 0, 0, 1, 1], [0.0, 0.0, 1.0, 0.0, 1.0]
    # Above 0: one of two, half of the recall; from 0 on: two of five.
    assert eval_svm.average_precision(targets, scores) == pytest.approx(1 / 2 / 2 + 2 / 5 / 2)
    assert average_precision_11_point(targets, scores) == pytest.approx(
        (6 * 1 / 2 + 5 * 2 / 5) / 11)
    assert eval_svm.average_precision([0, 1, 1, 0], [3.0] * 4) == 0.5  # the share of the class
    assert average_precision_11_point([0, 1, 1, 0], [3.0] * 4) == pytest.approx(0.5)


@pytest.mark.parametrize("precision",
                         [eval_svm.average_precision, average_precision_11_point])
def test_the_order_of_the_images_does_not_count(precision):
    rng = np.random.default_rng(0)
    targets, scores = np.arange(1000) % 3 == 0, rng.integers(0, 5, 1000).astype(float)
    orders = [rng.permutation(1000) for _ in range(10)] + [np.argsort(targets, kind="stable")]
    found = {precision(targets[order], scores[order]) for order in orders}
    assert len(found) == 1 and 0.3 < found.pop() < 0.4


@pytest.mark.parametrize("seed", range(3))
def test_equal_scores_are_scikit_learns_thresholds(seed):
    """Where precision only falls, interpolation changes nothing."""
    rng = np.random.default_rng(seed)
    targets, scores = [], []
    for level, share in zip(range(9, 0, -1), np.linspace(0.9, 0.1, 9), strict=True):
        own = rng.integers(10, 20)
        targets += [1] * round(share * own) + [0] * (own - round(share * own))
        scores += [level] * own
    order = rng.permutation(len(targets))
    targets, scores = np.array(targets)[order], np.array(scores, dtype=float)[order]
    assert eval_svm.average_precision(targets, scores) == pytest.approx(
        average_precision_score(targets, scores), abs=1e-12)


@pytest.mark.parametrize("precision",
                         [eval_svm.average_precision, average_precision_11_point])
def test_precision_at_its_ends(precision):
    assert precision([1, 1, 0, 0], [4, 3, 2, 1]) == 1
    assert precision([0, 0, 0, 1], [4, 3, 2, 1]) == 0.25
    assert precision([1], [0]) == 1
    assert math.isnan(precision([0, 0], [1, 2])) and math.isnan(precision([], []))
    assert precision([-1, 1], [1, 2]) == 1  # -1 is no positive


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_the_loop(seed):
    rng = np.random.default_rng(seed)
    targets, scores = rng.integers(0, 2, 60), rng.normal(size=60)
    scores = scores.round(1) if seed > 2 else scores  # some are equal
    points = []
    for threshold in sorted(set(scores), reverse=True):
        tp, taken = sum(targets[scores >= threshold]), sum(scores >= threshold)
        points.append((tp / targets.sum(), tp / taken))
    area, before = 0, 0
    for recall, _ in points:
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    assert eval_svm.average_precision(targets, scores) == pytest.approx(area, abs=1e-12)


def test_equal_images_have_equal_scores():
    """Though the sums of a matrix product are rounded by their place in it."""
    rng = np.random.default_rng(0)
    rows, targets = rng.normal(size=(60, 2048)) / 45, np.where(np.arange(60) % 3, 1, -1)
    held_out = [(np.zeros(n, int), hits) for n in (3, 7, 32) for hits in np.eye(n)]
    found, _ = eval_svm.fit("", rows, (np.arange(60), targets, held_out, 1.0), 0)
    for precisions, (_, hits) in zip(found, held_out, strict=True):
        assert precisions == pytest.approx((hits.mean(),) * 2)  # one threshold


def test_what_cannot_be_measured_is_nan():
    rows = np.random.default_rng(0).normal(size=(6, 4))
    nobody, some = np.arange(0), (np.arange(3), np.array([1, -1, 1]))

    def fit(targets):
        return eval_svm.fit("", rows, (np.arange(6), targets, [(nobody, nobody), some], 1.0), 0)

    (nothing, found), _ = fit(np.array([1, -1] * 3))
    assert np.isnan(nothing).all() and 0 < min(found) <= 1
    for targets in (np.ones(6, int), -np.ones(6, int)):
        found, stopped = fit(targets)
        assert np.isnan(found).all() and np.shape(found) == (2, 2) and stopped == 0


# ------------------------------------------------------------------------------------------- images

CLASSES = ("bird", "car", "dog")
XML = "<annotation><filename>{}.jpg</filename>{}</annotation>"
THING = ("<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>1</xmin></bndbox>"
         "<part><name>head</name></part></object>")


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A VOC folder of 60 + 30 images of three classes, told by colour; some objects difficult."""
    root = tmp_path_factory.mktemp("VOC2007")
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, numbers in (("trainval", range(60)), ("test", range(60, 90))):
        (root / "ImageSets/Main" / f"{part}.txt").write_text("".join(f"{n:06d}\n" for n in numbers))
        for n in numbers:
            objects, color = [], rng.integers(0, 130, 3)
            for c, name in enumerate(CLASSES):
                if rng.random() < 0.4:
                    hard = rng.random() < 0.3
                    color[c] += 40 if hard else 80
                    objects += [THING.format(name, int(hard))] * 2
            if n in (0, 60):  # a difficult bird and one that is not: present
                objects = [THING.format("bird", 1), THING.format("bird", 0)]
            (root / "Annotations" / f"{n:06d}.xml").write_text(
                XML.format(f"{n:06d}", "".join(objects)))
            pixels = np.clip(color + rng.integers(-20, 20, (24, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{n:06d}.jpg")
    return root


def test_voc_labels_are_present_absent_or_difficult(voc):
    images = open_images(str(voc), "train", 3)
    assert images.classes == list(CLASSES) and images.labels.shape == (60, 3) and len(images) == 60
    assert set(np.unique(images.labels)) == {-1, 0, 1}
    assert images.labels[0].tolist() == [1, 0, 0]
    assert images.name(7).endswith("JPEGImages/000007.jpg")
    for n in range(1, 60):
        text = (voc / "Annotations" / f"{n:06d}.xml").read_text()
        for c, name in enumerate(CLASSES):
            hard, easy = (THING.format(name, d) in text for d in (1, 0))
            assert images.labels[n, c] == (1 if easy else -1 if hard else 0)
    test = open_images(str(voc), "test", 3)
    assert len(test) == 30 and test.labels[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "remove, named",
    [("ImageSets/Main/test.txt", "test.txt: No such"), ("Annotations/000003.xml", "000003.xml")],
)
def test_a_missing_voc_file_is_named(remove, named, voc, tmp_path):
    import shutil

    root = shutil.copytree(voc, tmp_path / "voc")
    (root / remove).unlink()
    with pytest.raises(RunError, match=named):
        evaluate("--checkpoint", "pixels", "--data", root, *SMALL)


@pytest.mark.parametrize("height, width", [(8, 16), (100, 37), (9, 9)])
def test_the_view_resizes_the_shorter_side_and_then_squeezes_the_whole_image(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    view = eval_svm.augment.View(8, [eval_svm.WholeImage(9, "bilinear")], 3)
    geometry, _ = view.draw(np.empty((1, 0)), np.array([[height, width]]))
    twice = transforms.Compose([transforms.Resize(9), transforms.Resize([8, 8])])
    np.testing.assert_array_equal(view.crop([image], [g[0] for g in geometry]),
                                  np.asarray(twice(image)).transpose(2, 0, 1))


# ----------------------------------------------------------------------------------------- protocol


def test_difficult_images_are_ignored_or_absent():
    labels = np.array([1, 0, -1, 1])
    rows, targets = eval_svm.labelled_rows(labels, False)
    assert (rows.tolist(), targets.tolist()) == ([0, 1, 3], [1, -1, 1])
    rows, targets = eval_svm.labelled_rows(labels, True)
    assert (rows.tolist(), targets.tolist()) == ([0, 1, 2, 3], [1, -1, -1, 1])


def test_a_low_shot_set_has_k_with_and_so_many_without_the_class():
    labels = np.array([1] * 10 + [0] * 50 + [-1] * 5)
    drawn = [eval_svm.low_shot_rows(labels, 3, 4, 0, draw, 0) for draw in range(20)]
    for rows in drawn:
        assert (labels[rows] == 1).sum() == 3 and (labels[rows] == 0).sum() == 9
        assert len(set(rows)) == len(rows) == 12
    assert len({tuple(rows) for rows in drawn}) == 20
    assert np.array_equal(drawn[0], eval_svm.low_shot_rows(labels, 3, 4, 0, 0, 0))


def test_the_best_cost_is_the_lowest_of_equal_ones():
    assert eval_svm.best_cost([0.1, 1, 10], [0.5, 0.7, 0.7]) == 1
    assert eval_svm.best_cost([0.1, 1], [math.nan, 0.2]) == 1
    assert eval_svm.best_cost([0.1, 1], [math.nan, math.nan]) is None


def test_a_class_that_cannot_be_measured_takes_the_cost_of_the_others():
    rows, three, one = np.arange(6), np.array([1, -1] * 3), np.array([1, *[-1] * 5])

    def run(tasks):  # as `fit` does: the higher the cost the better, where it can be measured
        return [[[cost / 10 if 1 in targets and 1 in held_out[0][1] else math.nan] * 2]
                for _, targets, held_out, cost in tasks]

    assert eval_svm.choose_costs(run, [(rows, one), (rows, three)], [1, 2, 5], 3) == ([5, 5], 0.5)
    costs, value = eval_svm.choose_costs(run, [(rows, one)], [1, 2, 5], 3)
    assert costs == [1] and math.isnan(value)


# --------------------------------------------------------------------------------------------- main

SMALL = ["--image-size", 8, "--workers", 0, "--low-shot", "--costs", 1, 10, "--jobs", 1]


def evaluate(*flags):
    """The JSON line of an evaluation in this process; None if it prints nothing."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        eval_svm.main(eval_svm.parse_args([str(flag) for flag in flags]))
    lines = printed.getvalue().splitlines()
    return json.loads(lines[-1]) if lines else None


VOC = ["--checkpoint", "pixels", "--image-size", 8, "--low-shot", 1, 4, "--costs", 0.1, 1, 10,
       "--draws", 3, "--workers", 0, "--jobs", 1]


def test_voc_goes_through_all_of_it(voc):
    line = evaluate(*VOC, "--data", voc)
    assert {"eval", "map", "map_11point", "low_shot", "results"} <= line.keys()
    assert (line["eval"], line["num_train"], line["num_test"]) == ("svm", 60, 30)
    (result,) = line["results"]
    assert result["per_class"].keys() == set(CLASSES) and result["layer"] == "pixels"
    assert line["map"] == pytest.approx(np.mean(list(result["per_class"].values())))
    assert 0.6 < line["map"] < 1  # colour tells the classes, but not always
    assert line["low_shot"].keys() == {"1", "4"}
    for few in line["low_shot"].values():
        assert 0.3 < few["map"] <= few["oracle_map"] < 1
        assert few["cost"] in (0.1, 1, 10) and few["oracle_cost"] in (0.1, 1, 10)


def voc_pixels(voc, split):
    images = open_images(str(voc), split, 3)
    rows = []
    for i in range(len(images)):
        small = transforms.Resize([8, 8])(transforms.Resize(8)(images.read(i)[0]))
        pixels = np.asarray(small, dtype=np.float64).transpose(2, 0, 1) / 255
        mean, std = (np.array(x)[:, None, None] for x in
                     ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        rows.append(((pixels - mean) / std).ravel())
    rows = np.array(rows)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5), images.labels


@pytest.mark.parametrize("vissl", [False, True])
def test_the_result_is_that_of_the_protocol_written_out(voc, vissl):
    """Three folds in order, stratified; the cost by class; difficult test images dropped."""
    from sklearn.model_selection import StratifiedKFold
    from sklearn.svm import LinearSVC

    (train, labels), (test, truth) = voc_pixels(voc, "train"), voc_pixels(voc, "test")
    expected, costs = [], {}

    def svm(cost):
        return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True,
                         random_state=0)

    for c, name in enumerate(CLASSES):
        use = np.arange(60) if vissl else np.flatnonzero(labels[:, c] != -1)
        x, y = train[use], np.where(labels[use, c] == 1, 1, -1)
        values = []
        for cost in (0.1, 1, 10):
            folds = StratifiedKFold(3).split(x, y)
            values.append(np.mean([eval_svm.average_precision(
                y[b] > 0, svm(cost).fit(x[a], y[a]).decision_function(x[b])) for a, b in folds]))
        costs[name] = (0.1, 1, 10)[int(np.argmax(values))]
        keep = truth[:, c] != -1
        scores = svm(costs[name]).fit(x, y).decision_function(test[keep])
        expected.append(eval_svm.average_precision(truth[keep, c] > 0, scores))
    flags = ["--vissl-labels"] if vissl else []
    line = evaluate(*VOC, "--data", voc, "--low-shot", *flags)
    assert line["results"][0]["costs"] == costs
    assert list(line["results"][0]["per_class"].values()) == pytest.approx(expected, abs=1e-6)
    assert line["map"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_low_shot_is_that_of_the_protocol_written_out(voc):
    """k with and 2 k without each class of three; the cost from what was not drawn."""
    from sklearn.svm import LinearSVC

    (train, labels), (test, truth) = voc_pixels(voc, "train"), voc_pixels(voc, "test")
    costs, k = (0.1, 1, 10), 4
    on_rest, on_test = np.zeros((2, 3, 3, 3))  # draw, class, cost
    for draw in range(3):
        for c in range(3):
            own = eval_svm.low_shot_rows(labels[:, c], k, 3, 0, draw, c)
            rest = [i for i in range(60) if i not in own and labels[i, c] != -1]
            keep = truth[:, c] != -1
            for number, cost in enumerate(costs):
                svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True,
                                random_state=0)
                svm.fit(train[own], np.where(labels[own, c] == 1, 1, -1))
                on_rest[draw, c, number] = eval_svm.average_precision(
                    labels[rest, c], svm.decision_function(train[rest]))
                on_test[draw, c, number] = eval_svm.average_precision(
                    truth[keep, c], svm.decision_function(test[keep]))
    chosen, oracle = (values.mean((0, 1)).argmax() for values in (on_rest, on_test))
    few = evaluate(*VOC, "--data", voc)["low_shot"][str(k)]
    assert (few["cost"], few["oracle_cost"]) == (costs[chosen], costs[oracle])
    assert few["map"] == pytest.approx(on_test[:, :, chosen].mean(), abs=1e-6)
    assert few["std"] == pytest.approx(on_test[:, :, chosen].mean(1).std(), abs=1e-6)
    assert few["oracle_map"] == pytest.approx(on_test[:, :, oracle].mean(), abs=1e-6)


def test_low_shot_costs_are_chosen_on_images_that_were_not_drawn(voc, monkeypatch):
    (_, labels), fit, seen = voc_pixels(voc, "train"), eval_svm.fit, []
    monkeypatch.setattr(eval_svm, "fit", lambda key, features, task, seed: seen.append(task)
                        or fit(key, features, task, seed))
    evaluate(*VOC, "--data", voc)
    usable = {tuple(np.flatnonzero(labels[:, c] >= 0)) for c in range(3)}
    seen = [(drawn, *held_out) for drawn, _, held_out, _ in seen if len(held_out) == 2]
    assert len(seen) == 2 * 3 * 3 * 3
    for drawn, (rest, _), (test, _) in seen:
        assert not set(drawn) & set(rest) and tuple(sorted({*drawn, *rest})) in usable
        assert min(test) >= 60


def test_difficult_training_images_count_only_with_the_published_labels(voc):
    one, two = (evaluate(*VOC, "--data", voc, "--low-shot", *flags)["results"][0]
                for flags in ([], ["--vissl-labels"]))
    assert one["validation_map"] != two["validation_map"]


def test_test_labels_choose_nothing_but_the_oracle(voc, monkeypatch):
    """Other test labels: costs and everything else that was chosen stay."""
    line = evaluate(*VOC, "--data", voc)
    opened = images.voc

    def shuffled(root, split, channels):
        opened_split = opened(root, split, channels)
        if split == "test":
            opened_split.labels = np.roll(opened_split.labels, 7, axis=0)
        return opened_split

    monkeypatch.setattr(images, "voc", shuffled)
    other = evaluate(*VOC, "--data", voc)
    assert other["map"] != line["map"]
    for key in ("costs", "validation_map"):
        assert other["results"][0][key] == line["results"][0][key]
    for k in ("1", "4"):
        assert other["low_shot"][k]["cost"] == line["low_shot"][k]["cost"]


# -------------------------------------------------------------------------------------------- cache

NUM_FITS = 3 * 3 * 3 + 3 + 2 * 3 * 3 * 3  # folds, all, low-shot


def count_fits(monkeypatch):
    """A list that grows with every SVM that is trained in this process."""
    calls, svm = [], eval_svm.LinearSVC
    monkeypatch.setattr(eval_svm, "LinearSVC", lambda **flags: calls.append(1) or svm(**flags))
    return calls


def entries(folder):
    """Files of fits; not that of the first call, which fits nothing."""
    return sorted(path for path in folder.rglob("output.pkl") if joblib.load(path)[0])


def test_a_fit_is_done_once(voc, tmp_path, monkeypatch):
    whole, calls = evaluate(*VOC, "--data", voc), count_fits(monkeypatch)
    assert evaluate(*VOC, "--data", voc, "--output", tmp_path) == whole
    assert len(calls) == NUM_FITS
    assert evaluate(*VOC, "--data", voc, "--output", tmp_path) == whole
    assert len(calls) == NUM_FITS  # none again
    other = [*VOC, "--data", voc, "--costs", 0.1, 1, 10, 100]
    line = evaluate(*other, "--output", tmp_path)
    new = list(line["results"][0]["costs"].values()).count(100)
    assert len(calls) == NUM_FITS + 3 * 3 + 2 * 3 * 3 + new  # those of the cost that is new
    assert line == evaluate(*other)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_evaluation_goes_on(processes, pool, tmp_path):
    flags = ["--checkpoint", "pixels", "--limit", 200, "--costs", 1, 10, "--low-shot", 2, 8,
             "--draws", 10, "--output", tmp_path / "svm"]
    pool.kill(lambda: len(entries(tmp_path)) >= 40, processes, evaluate, *flags)
    before = {path: path.stat().st_mtime_ns for path in entries(tmp_path)}
    line = pool.run(processes, evaluate, *flags)[0]
    assert 40 <= len(before) < len(entries(tmp_path))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # not again
    assert line == evaluate(*flags[:-2])


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another file": lambda content: b"not a result",
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_result_is_not_taken(damage, voc, tmp_path, monkeypatch, capsys, caplog):
    whole = evaluate(*VOC, "--data", voc, "--output", tmp_path)
    for path in entries(tmp_path)[::2]:
        path.write_bytes(damage(path.read_bytes()))
    calls = count_fits(monkeypatch)
    eval_svm.main(eval_svm.parse_args([*map(str, VOC), "--data", str(voc), "--output",
                                       str(tmp_path)]))
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == whole and len(calls) == NUM_FITS // 2
    told = f"warning: a damaged fit in {tmp_path} is done again"
    assert printed.out.splitlines().count(told) == NUM_FITS // 2  # a line each, and no traceback
    assert "raceback" not in printed.out + printed.err + caplog.text
    assert evaluate(*VOC, "--data", voc, "--output", tmp_path) == whole
    assert len(calls) == NUM_FITS // 2  # mended


def test_a_damaged_copy_of_the_code_is_one_line_with_the_remedy(tmp_path):
    flags = ["--checkpoint", "pixels", "--limit", 60, *SMALL, "--output", tmp_path / "svm"]
    assert drill.run("eval_svm.py", *flags)[0] == 0
    (path,) = tmp_path.rglob("func_code.py")
    for content in (b"\xff\xfe", b"# first line: x"):
        path.write_bytes(content)
        status, printed = drill.run("eval_svm.py", *flags)
        told = f"error: {tmp_path}/svm/fits is damaged; delete that folder"
        assert status == 2 and told in printed and "Traceback" not in printed


def test_no_bit_of_a_result_can_turn_unseen(tmp_path):
    """Or it changes nothing, as those of the header that name the compressing system."""
    cached = eval_svm.cached_fit(str(tmp_path), comm.World(0, 1, torch.device("cpu")))
    rows, targets = np.random.default_rng(0).random((30, 4)), np.where(np.arange(30) % 3, 1, -1)
    task = (np.arange(20), targets[:20], [(np.arange(20, 30), targets[20:])], 1.0)
    result = cached("key", rows, task, 0)
    (path,) = entries(tmp_path)
    content = path.read_bytes()
    for place in range(8 * len(content)):
        turned = bytearray(content)
        turned[place // 8] ^= 1 << place % 8
        path.write_bytes(turned)
        assert cached("key", rows, task, 0) == result


def test_fits_of_other_features_or_labels_are_not_taken(voc, tmp_path, monkeypatch):
    first = evaluate(*VOC, "--data", voc, "--output", tmp_path)
    calls = count_fits(monkeypatch)
    other = evaluate(*VOC, "--data", voc, "--output", tmp_path, "--image-size", 6)
    assert len(calls) == NUM_FITS and other["results"] != first["results"]
    assert other == evaluate(*VOC, "--data", voc, "--image-size", 6)
    calls.clear()
    assert evaluate(*VOC, "--data", voc, "--output", tmp_path, "--vissl-labels") == evaluate(
        *VOC, "--data", voc, "--vissl-labels")
    assert len(calls) == (27 + 3) + NUM_FITS  # the low-shot fits do not hang on it


def test_fits_of_another_seed_or_program_are_not_taken(voc, tmp_path, monkeypatch):
    flags = [*VOC, "--data", voc, "--output", tmp_path]
    evaluate(*flags)
    calls = count_fits(monkeypatch)
    assert evaluate(*flags, "--seed", 1) == evaluate(*flags[:-2], "--seed", 1)
    assert len(calls) == 2 * NUM_FITS
    calls.clear()
    monkeypatch.setattr(eval_svm, "VERSION", "another")
    evaluate(*flags)
    assert len(calls) == NUM_FITS
    calls.clear()
    monkeypatch.setitem(eval_svm.SVM, "class_weight", None)
    assert evaluate(*flags) == evaluate(*flags[:-2])
    assert len(calls) == 2 * NUM_FITS


def test_two_evaluations_may_share_a_folder(voc, tmp_path):
    flags = [[*VOC, "--data", voc, "--seed", seed] for seed in (0, 0)]
    running = [drill.start("eval_svm.py", *own, "--output", tmp_path) for own in flags]
    for process, own in zip(running, flags, strict=True):
        status, printed = drill.finish(process)
        assert status == 0 and "arning" not in printed, printed
        assert json.loads(printed.splitlines()[-1]) == evaluate(*own)


def test_an_output_that_is_no_folder_is_one_line(voc, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write .*file"):
        evaluate(*VOC, "--data", voc, "--output", tmp_path / "file")


# ---------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_gives_the_same_line(size, pool, voc, tmp_path, monkeypatch):
    flags = [*map(str, VOC), "--data", str(voc)]
    first, *others = pool.run(size, evaluate, *flags, "--output", str(tmp_path))
    assert first == evaluate(*flags) and others == [None] * (size - 1)
    assert len(entries(tmp_path)) == NUM_FITS  # each by one of them
    calls = count_fits(monkeypatch)
    assert evaluate(*flags, "--output", tmp_path) == first and not calls


def test_fitting_in_other_processes_changes_nothing(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_svm, "PARALLEL_FROM", 0)
    flags, calls = ["--data", voc, *VOC[:-1]], count_fits(monkeypatch)
    line = evaluate(*flags, 1)
    assert len(calls) == NUM_FITS
    assert evaluate(*flags, 2, "--output", tmp_path) == line
    assert len(calls) == NUM_FITS and len(entries(tmp_path)) == NUM_FITS  # not in this process
    assert evaluate(*flags, 1, "--output", tmp_path) == line
    assert len(calls) == NUM_FITS  # taken from them


def test_svms_that_do_not_converge_are_told_of_whenever_they_were_fitted(
    voc, tmp_path, monkeypatch, capsys
):
    def warnings(*costs):
        flags = [*SMALL, "--data", voc, "--output", tmp_path, "--costs", *costs]
        eval_svm.main(eval_svm.parse_args(["--checkpoint", "pixels", *map(str, flags)]))
        return [line for line in capsys.readouterr().out.splitlines() if "warning" in line]

    assert warnings(0.01) == []
    monkeypatch.setitem(eval_svm.SVM, "max_iter", 3)
    (first,) = warnings(0.01, 1e4)
    assert "pixels: " in first and "limit of 3 passes" in first
    assert int(first.split("pixels: ")[1].split()[0]) >= 3 * (3 + 1)  # classes, folds and all
    assert warnings(0.01, 1e4) == [first]  # as noted


def test_class_folders_are_each_class_against_the_rest(image_folder):
    line = evaluate("--checkpoint", "pixels", "random", "--data", image_folder, "--arch",
                    "resnet_tiny", "--stem", "small", *SMALL, "--low-shot", 1, 2, 64)
    assert (line["num_train"], line["num_test"]) == (16, 16)
    assert line["low_shot"].keys() == {"1", "2"}  # no class has 64 images
    assert line["results"][0]["per_class"].keys() == {"0", "1"}
    assert line["results"][0]["layer"] == "res5-grid"
    assert [row["checkpoint"] for row in line["checkpoints"]] == ["pixels", "random (resnet_tiny)"]


def test_the_layer_is_chosen_on_the_training_images(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3

    def rows(signal):
        noise = rng.normal(size=(60, 3))
        return (noise + signal * np.eye(3)[labels]).astype(np.float32)

    arrays = {"checkpoint": "x", "protocol": "x"}
    for split in ("train", "test"):
        arrays |= {f"{split}/labels": labels, f"{split}/index": np.arange(60)}
    # One layer is better on the training images, the other one on the test images.
    arrays |= {"train/b": rows(4), "test/b": rows(0), "train/a": rows(1), "test/a": rows(9)}
    np.savez(tmp_path / "f.npz", **arrays)
    line = evaluate("--features", tmp_path / "f.npz", "--costs", 1, "--low-shot", 5)
    assert [r["layer"] for r in line["results"]] == ["b", "a"]
    assert line["map"] == line["results"][0]["map"] < line["results"][1]["map"]
    assert line["low_shot"]["5"]["map"] < 0.7  # of the same layer, whose test images tell nothing
    other = evaluate("--features", tmp_path / "f.npz", "--costs", 1, "--low-shot", 5, "--seed", 1,
                     "--layers", "a", "b")
    assert other["map"] == pytest.approx(line["map"], abs=0.01)
    assert other["map"] == other["results"][1]["map"] and other["low_shot"] != line["low_shot"]


@pytest.mark.parametrize("train, test", [([0, 0], [0, 0]), ([0, 1], [2, 2])])
def test_classes_that_cannot_be_measured_are_refused(train, test, tmp_path):
    arrays = {"checkpoint": "x", "protocol": "x"}
    for split, labels in (("train", train), ("test", test)):
        arrays |= {f"{split}/labels": np.array(labels), f"{split}/index": np.arange(2),
                   f"{split}/a": np.eye(2, dtype=np.float32)}
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(RunError, match="no class has training images with and without it and"):
        evaluate("--features", tmp_path / "f.npz")


def test_digits_by_pixels_are_recognised():
    line = evaluate("--checkpoint", "pixels", "--limit", 300, "--costs", 1, 10, "--low-shot", 8,
                    "--draws", 1)
    assert 0.9 < line["map"] <= 1 and 0.75 < line["low_shot"]["8"]["map"] <= 1
    assert line["num_test"] == 300


def test_images_without_labels_are_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / "0.png")
    with pytest.raises(RunError, match="no class folders, so no labels"):
        evaluate("--checkpoint", "pixels", "--data", tmp_path, *SMALL)


def test_difficult_images_are_told_of_once_and_where_there_are_some(voc, image_folder, capsys):
    for data, times in ((voc, 1), (image_folder, 0)):
        flags = ["--data", data, "--checkpoint", "pixels", "pixels", *SMALL, "--low-shot", 96]
        eval_svm.main(eval_svm.parse_args(list(map(str, flags))))
        printed = capsys.readouterr().out
        assert printed.count("difficult") == times
        assert printed.count("low-shot 96: left out") == 1


def test_the_table_names_the_oracle(voc, capsys):
    eval_svm.main(eval_svm.parse_args([str(f) for f in (*VOC, "--data", voc)]))
    printed = capsys.readouterr().out
    assert "chosen without the test images" in printed
    assert "oracle, as in the literature" in printed
