import contextlib
import importlib
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import eval_knn
from common import backbones, knn, labelled
from common.distributed import RunError
from common.features import Source
from common.images import open_images

# --------------------------------------------------------------------------------------- parse_args


def test_the_protocol_is_20_neighbours_at_temperature_007_and_at_least_50_draws():
    args = eval_knn.parse_args(["--checkpoint", "pixels"])
    assert (args.k, args.temperature) == ([20], [0.07])
    assert sorted(args.shots) == [1, 5] and args.draws >= 50


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--checkpoint", "pixels", "--draws", "49"], "--draws 49"),
        (["--checkpoint", "pixels", "--chunk", "0"], "'0'"),
        (["--checkpoint", "pixels", "--leave-one-out", "all"], "'all'"),
        (["--checkpoint", "pixels", "random", "--save-features", "x.npz"], "not of pixels random"),
        (["--checkpoint", "random", "--save-features", "x.npz"], "not of random"),
        (["--features", "x.npz", "--image-size", "32"], "--image-size does not go with --features"),
        (["--features", "x.npz", "--checkpoint", "pixels"], "--checkpoint"),
        ([], "--checkpoint"),
    ],
)
def test_a_bad_argument_is_one_line_with_its_value(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        eval_knn.parse_args(flags)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and named in printed and printed.count("\n") == 1


def test_no_few_label_banks_need_no_draws():
    assert eval_knn.parse_args(["--checkpoint", "pixels", "--shots", "--draws", "1"]).draws == 1


# ----------------------------------------------------------------------------------------- protocol


def loops(bank, labels, queries, k, temperature, num_classes):
    """Votes exp(cosine / T) of the k nearest, one query at a time in float64."""
    bank, queries = (x / np.sqrt((x.astype(float) ** 2).sum(1))[:, None] for x in (bank, queries))
    scores = np.zeros((len(queries), num_classes))
    for row, query in enumerate(queries):
        cosines = bank @ query
        for neighbour in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            scores[row, labels[neighbour]] += math.exp(cosines[neighbour] / temperature)
    return scores


def features(num_bank=60, num_queries=25, d=7, num_classes=4):
    rng = np.random.default_rng(3)
    bank, queries = rng.normal(size=(num_bank, d)), rng.normal(size=(num_queries, d))
    return bank, rng.integers(0, num_classes, num_bank), queries


def predict(bank, labels, queries, k, temperature, num_classes, dtype=torch.float64):
    bank, queries = (torch.as_tensor(x).to(dtype) for x in (bank, queries))
    labels = torch.as_tensor(labels)
    return eval_knn.knn_predict(bank, labels, queries, k, temperature, num_classes).numpy()


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("k", [1, 6, 59])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_scores_equal_the_loops_with_and_without_faiss(k, temperature, dtype, rtol):
    bank, labels, queries = features()
    got = predict(bank, labels, queries, k, temperature, 4, dtype)
    np.testing.assert_allclose(got, loops(bank, labels, queries, k, temperature, 4), rtol=rtol)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_a_large_bank_gives_the_votes_of_float64(k):
    """More rows than are compared in float64 at once, so they are found in the own precision."""
    bank, labels, queries = features(num_bank=1000, num_queries=15, d=64, num_classes=7)
    bank, queries = bank.astype(np.float32), queries.astype(np.float32)
    expected = loops(bank.astype(float), labels, queries.astype(float), k, 0.07, 7)
    for dtype in (torch.float32, torch.float64):
        got = predict(bank, labels, queries, k, 0.07, 7, dtype)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("block", [10, 300, 5000])
def test_a_bank_is_searched_in_blocks_of_any_size(block, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK", block)
    bank, labels, queries = features(num_bank=1000, num_queries=15)
    got = predict(bank, labels, queries, 30, 0.5, 4, torch.float64)
    np.testing.assert_allclose(got, loops(bank, labels, queries, 30, 0.5, 4), rtol=1e-12)


@pytest.mark.parametrize("num_bank", [60, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_nothing_not_even_ties(dtype, num_bank):
    """Every image stands in the bank four times, in different classes: ties at every k."""
    bank, labels, queries = features(num_bank=num_bank, num_queries=50, d=33)
    bank = np.random.default_rng(1).permutation(bank[: num_bank // 4].repeat(4, axis=0))
    bank, queries = (torch.as_tensor(x).to(dtype) for x in (bank, queries))
    labels = torch.as_tensor(labels)

    def scores(chunk):
        return eval_knn.knn_predict(bank, labels, queries, 10, 0.07, 4, chunk=chunk)

    whole = scores(1024)
    for chunk in (1, 7, 25, 49):
        assert torch.equal(scores(chunk).argmax(1), whole.argmax(1))
        torch.testing.assert_close(scores(chunk), whole, rtol=1e-12, atol=0)


def test_neighbours_that_float32_cannot_tell_apart_are_told_apart():
    bank, _, queries = features(num_bank=150, num_queries=50, d=64)
    noise = np.random.default_rng(1).normal(size=(600, 64))
    bank, queries = bank.repeat(4, axis=0) + 3e-7 * noise, queries
    bank, queries = (torch.as_tensor(x / np.linalg.norm(x, axis=1, keepdims=True)).float()
                     for x in (bank, queries))
    exact = queries.double() @ bank.double().T
    assert (exact.sort(dim=1).values.diff(dim=1) < 1e-7).sum() > 1000
    for chunk in (1, 50):
        found = [knn.nearest(bank, part, 10) for part in queries.split(chunk)]
        rows = torch.cat([rows for _, rows in found])
        expected = exact.round(decimals=13).argsort(dim=1, descending=True, stable=True)[:, :10]
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("num_bank", [60, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_is_left_out_is_as_if_it_were_not_there(dtype, num_bank):
    bank, labels, _ = features(num_bank=num_bank, d=16)
    itself = torch.arange(num_bank)
    itself[5] = -1
    tensors = torch.as_tensor(bank).to(dtype), torch.as_tensor(labels)
    got = eval_knn.knn_predict(*tensors, tensors[0], 7, 0.2, 4, itself).numpy()
    for row in range(0, num_bank, 5):
        keep = np.arange(num_bank) != (row if row != 5 else -1)
        expected = loops(bank[keep], labels[keep], bank[row][None], 7, 0.2, 4)
        np.testing.assert_allclose(got[row], expected[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_images_the_other_one_votes(dtype):
    """Every image stands in the bank three times; the first of the two others classifies it."""
    bank = torch.as_tensor(features(num_bank=200, d=16)[0]).to(dtype).repeat(3, 1)
    labels, itself = torch.arange(600) // 200, torch.arange(600)
    scores = eval_knn.knn_predict(bank, labels, bank, 1, 0.2, 3, itself)
    assert torch.equal(scores.argmax(1), (labels == 0).long())


def test_no_bank_left_means_no_vote():
    one = torch.ones(1, 3)
    scores = eval_knn.knn_predict(one, torch.tensor([1]), one, 20, 0.07, 3, torch.tensor([0]))
    assert (scores == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k_is_clipped_to_the_bank(dtype):
    bank, labels, queries = features(num_bank=5)
    got = predict(bank, labels, queries, 20, 0.5, 4, dtype)
    np.testing.assert_allclose(got, loops(bank, labels, queries, 5, 0.5, 4), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_k_1_an_image_of_the_bank_finds_itself(dtype):
    bank, labels, _ = features()
    scores = predict(bank, labels, bank, 1, 0.5, 4, dtype)
    assert (scores.argmax(1) == labels).all()
    np.testing.assert_allclose(scores.max(1), math.exp(2), rtol=1e-5)
    assert ((scores > 0).sum(1) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "temperature, one, two",
    [(1.0, math.e, 2 * math.exp(0.5)), (0.5, math.exp(2), 2 * math.e)],
)
def test_the_temperature_weighs_one_near_image_against_two_farther_ones(
    temperature, one, two, dtype
):
    sixty = [0.5, math.sqrt(0.75)]
    bank = [[1, 0], sixty, [0.5, -sixty[1]], [-1, 0]]  # cosines 1, 1/2, 1/2, -1
    scores = predict(bank, [0, 1, 1, 2], [[1, 0]], 3, temperature, 3, dtype)
    np.testing.assert_allclose(scores, [[one, two, 0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_length_of_features_does_not_count(dtype):
    bank, labels, queries = features()
    lengths = np.random.default_rng(4).uniform(0.01, 100, (60, 1))
    plain = predict(bank, labels, queries, 6, 0.2, 4, dtype)
    scaled = predict(bank * lengths, labels, queries * 37, 6, 0.2, 4, dtype)
    np.testing.assert_allclose(scaled, plain, rtol=1e-4)


def test_classes_that_are_not_in_the_bank_get_no_vote():
    bank, labels, queries = features()
    scores = predict(bank, labels * 2, queries, 6, 0.5, 11)
    assert scores.shape == (25, 11)
    assert (scores[:, [1, 3, 5, 7, 8, 9, 10]] == 0).all() and (scores.sum(1) > 0).all()


def test_a_small_temperature_does_not_overflow():
    bank, labels, queries = features()
    bank, queries = bank + 10, queries + 10  # cosines near 1, as features after a ReLU have
    scores = predict(bank, labels, queries, 20, 0.01, 4, torch.float32)
    assert np.isfinite(scores).all()
    expected = loops(bank, labels, queries, 20, 0.01, 4)
    assert (scores.argmax(1) == expected.argmax(1)).all()
    with pytest.raises(ValueError, match="overflows"):
        predict(bank, labels, queries, 20, 0.001, 4, torch.float32)


@pytest.mark.parametrize("sign", [1, -1])
def test_at_a_tiny_temperature_the_nearest_neighbour_decides(sign):
    bank, labels, queries = map(torch.as_tensor, features())
    bank, queries = (torch.nn.functional.normalize(x, dim=1)
                     for x in (bank + 10, sign * (queries + 10)))  # cosines near 1 or -1
    truth = torch.arange(len(queries)) % 4
    right, _ = knn.count_right(bank, labels, queries, truth, [(1, 0.07), (20, 1e-7)], 4, None, 9)
    assert right[0] == right[1] == right[0].round()


def few_label_bank(labels, *arguments):
    return eval_knn.few_label_bank(eval_knn.class_members(labels), *arguments)


def test_a_few_label_bank_has_so_many_images_of_every_class():
    labels = np.array([0, 1, 2, 5] * 10)
    for shots in (1, 3):
        rows = few_label_bank(labels, shots, 0, 0)
        assert len(set(rows)) == len(rows)
        assert {c: list(labels[rows]).count(c) for c in (0, 1, 2, 5)} == dict.fromkeys(
            (0, 1, 2, 5), shots
        )


def test_a_few_label_bank_takes_all_of_a_class_with_fewer():
    labels = np.array([7] * 20 + [3] * 2)
    rows = few_label_bank(labels, 5, 0, 0)
    assert len(rows) == 7 and {20, 21} < set(rows)


def test_few_label_banks_are_reproducible_and_differ_from_draw_to_draw():
    labels = np.arange(300) % 3
    draws = [few_label_bank(labels, 5, 0, draw).tolist() for draw in range(10)]
    assert draws == [few_label_bank(labels, 5, 0, draw).tolist() for draw in range(10)]
    assert len({tuple(sorted(rows)) for rows in draws}) == 10
    assert draws[0] != few_label_bank(labels, 5, 1, 0).tolist()


def test_few_label_banks_take_every_image_equally_often():
    labels = np.repeat([0, 1], 10)
    counts = np.zeros(20)
    for draw in range(1000):
        counts[few_label_bank(labels, 2, 0, draw)] += 1
    assert (abs(counts - 200) < 5 * math.sqrt(1000 * 0.2 * 0.8)).all()


# --------------------------------------------------------------------------------------------- main


def evaluate(*flags):
    """The JSON line of an evaluation in this process; None if it prints nothing."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        eval_knn.main(eval_knn.parse_args([str(flag) for flag in flags]))
    lines = printed.getvalue().splitlines()
    return json.loads(lines[-1]) if lines else None


def save_backbone(path, seed, arch="resnet_tiny", in_chans=3):
    torch.manual_seed(seed)
    backbone = backbones.build_backbone(
        arch, stem="small", in_chans=in_chans, zero_init_residual=False
    )
    torch.save(backbone.state_dict(), path)
    return path


FEW = ["--limit", 100, "--draws", 50]


def test_the_json_line_has_the_documented_keys():
    line = evaluate("--checkpoint", "pixels", *FEW)
    assert {"eval", "top1", "results", "shots", "num_train", "num_test"} <= line.keys()
    assert (line["eval"], line["num_train"], line["num_test"]) == ("knn", 100, 100)
    (result,) = line["results"]
    assert result.keys() == {"layer", "k", "temperature", "top1"}
    assert (result["k"], result["temperature"]) == (20, 0.07)
    assert line["shots"].keys() == {"1", "5"}
    assert all(few.keys() == {"mean", "std"} for few in line["shots"].values())
    shares = [line["top1"], *[few["mean"] for few in line["shots"].values()]]
    assert all(0 < share <= 1 for share in shares)


def test_of_several_checkpoints_the_line_describes_the_last_and_holds_all(tmp_path):
    one, two = (save_backbone(tmp_path / f"{seed}.pth", seed) for seed in (1, 2))
    names = [one, "pixels", two]
    line = evaluate("--checkpoint", *names, *FEW)
    assert [row["checkpoint"] for row in line["checkpoints"]] == [str(name) for name in names]
    for name, row in zip(names, line["checkpoints"], strict=True):
        alone = evaluate("--checkpoint", name, *FEW)
        assert all(alone[key] == value for key, value in row.items())
    assert all(line[key] == value for key, value in line["checkpoints"][-1].items())


def pixel_features(split):
    images = open_images("digits", split, 3)
    pixels = np.stack([np.asarray(images.read(i)[0]) for i in range(len(images))])
    return (pixels / 255 - 0.5).reshape(len(images), -1) / 0.5, images.labels


def test_pixels_are_classified_as_the_images_themselves_are():
    bank, labels = pixel_features("train")
    queries, truth = pixel_features("test")
    scores = loops(bank, labels, queries, 20, 0.07, 10)
    few = []
    for draw in range(50):
        rows = few_label_bank(labels, 1, 0, draw)
        guess = loops(bank[rows], labels[rows], queries, 20, 0.07, 10).argmax(1)
        few.append((guess == truth).mean())
    line = evaluate("--checkpoint", "pixels", "--shots", 1, "--draws", 50)
    assert line["num_train"] == len(labels) == 1442 and line["num_test"] == len(truth) == 355
    assert line["top1"] == pytest.approx((scores.argmax(1) == truth).mean(), abs=1e-12)
    assert line["shots"]["1"]["mean"] == pytest.approx(np.mean(few), abs=1e-12)
    assert line["shots"]["1"]["std"] == pytest.approx(np.std(few), abs=1e-12)


def test_random_is_the_mean_of_five_initialisations(tmp_path):
    files = [save_backbone(tmp_path / f"{seed}.pth", seed) for seed in range(7, 12)]
    rows = evaluate("--checkpoint", *files, *FEW, "--seed", 7)["checkpoints"]
    line = evaluate("--checkpoint", "random", *FEW, "--seed", 7)
    assert len({row["top1"] for row in rows}) > 1
    assert line["top1"] == pytest.approx(np.mean([row["top1"] for row in rows]), abs=1e-12)
    for shots in ("1", "5"):
        mean = np.mean([row["shots"][shots]["mean"] for row in rows])
        assert line["shots"][shots]["mean"] == pytest.approx(mean, abs=1e-12)


def test_random_reports_k_and_temperature_as_they_were_given():
    line = evaluate("--checkpoint", "random", "--temperature", 0.007, "--shots", "--limit", 20)
    assert (line["results"][0]["k"], line["results"][0]["temperature"]) == (20, 0.007)


def test_several_k_and_temperatures_give_what_each_gives_alone():
    line = evaluate("--checkpoint", "pixels", "--k", 3, 1, 50, "--temperature", 0.05, 2, *FEW)
    pairs = [(result["k"], result["temperature"]) for result in line["results"]]
    assert pairs == [(k, t) for k in (3, 1, 50) for t in (0.05, 2)]
    assert line["top1"] == line["results"][0]["top1"]
    for result in line["results"]:
        k, temperature = result["k"], result["temperature"]
        alone = evaluate("--checkpoint", "pixels", "--k", k, "--temperature", temperature, *FEW)
        assert alone["top1"] == result["top1"]
        if (k, temperature) == (3, 0.05):
            assert alone["shots"] == line["shots"]


def test_a_setting_given_twice_counts_once():
    line = evaluate("--checkpoint", "pixels", "--k", 5, 5, "--temperature", 0.1, 0.1, "--limit", 20,
                    "--shots")
    assert [(r["k"], r["temperature"]) for r in line["results"]] == [(5, 0.1)]


def test_every_layer_is_evaluated_and_the_first_one_counts(tmp_path):
    weights = save_backbone(tmp_path / "weights.pth", 1)
    names = ["res4-grid", "avgpool", "conv1"]
    line = evaluate("--checkpoint", weights, "--layers", *names, "--k", 3, 20, *FEW)
    found = [(r["layer"], r["k"], r["temperature"]) for r in line["results"]]
    assert found == [(name, k, 0.07) for name in names for k in (3, 20)]
    for number, name in enumerate(names):
        alone = evaluate("--checkpoint", weights, "--layers", name, "--k", 3, 20, *FEW)
        assert alone["results"] == line["results"][2 * number : 2 * number + 2]
        if number == 0:
            assert (alone["top1"], alone["shots"]) == (line["top1"], line["shots"])
    assert evaluate("--checkpoint", weights, *FEW)["results"][0]["layer"] == "avgpool"


def test_every_k_temperature_and_layer_is_printed(capsys):
    flags = ["--checkpoint", "random", "pixels", "--layers", "res4", "res5", "--k", "3", "20",
             "--temperature", "0.07", "0.5", "--limit", "100", "--shots"]
    eval_knn.main(eval_knn.parse_args(flags))
    *_, header, one, two, pixels, line = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == (
        "checkpoint k 3 T 0.07 k 3 T 0.5 k 20 T 0.07 k 20 T 0.5"
    )
    rows = [row for entry in json.loads(line)["checkpoints"] for row in entry["results"]]
    shown, random = [text.split() for text in (one, two, pixels)], ["random", "(resnet_tiny)"]
    assert [s[:-4] for s in shown] == [[*random, "res4"], [*random, "res5"], ["pixels"]]
    assert [float(x) for s in shown for x in s[-4:]] == [round(r["top1"], 3) for r in rows]


def test_a_layer_that_is_not_there_is_named():
    assert "no layer res7; there are conv1 res2" in refused(
        "--checkpoint", "random", "--layers", "res7", *FEW
    )


@pytest.mark.parametrize("chunk", [1, 13, 355])
def test_the_chunk_does_not_count(chunk):
    flags = ["--checkpoint", "pixels", "--k", 5, 20, "--shots", 1, "--draws", 50]
    assert evaluate(*flags, "--chunk", chunk) == evaluate(*flags)


@pytest.mark.parametrize("split, size", [("test", 355), ("train", 1442)])
def test_leave_one_out_classifies_a_split_by_its_other_images(split, size):
    line = evaluate("--checkpoint", "pixels", "--leave-one-out", split, "--k", 3, "--shots")
    pixels, labels = pixel_features(split)
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    near = np.argsort(-cosines, axis=1)[:, :3]
    votes = np.zeros((size, 10))
    for row in range(size):
        for other in near[row]:
            votes[row, labels[other]] += math.exp(cosines[row, other] / 0.07)
    assert line["top1"] == pytest.approx((votes.argmax(1) == labels).mean(), abs=1e-12)
    assert (line["num_train"], line["num_test"], line["leave_one_out"]) == (size, size, split)


def test_leaving_out_makes_single_images_of_their_class_wrong():
    """Two images in all, of two classes: without itself, each is given the other's class."""
    line = evaluate("--checkpoint", "pixels", "--leave-one-out", "--limit", 2, "--draws", 50)
    assert line["leave_one_out"] == "test" and line["top1"] == 0
    assert line["shots"]["1"] == {"mean": 0, "std": 0}


def test_a_few_label_bank_votes_without_the_image_itself():
    line = evaluate("--checkpoint", "pixels", "--leave-one-out", *FEW, "--shots", 2,
                    "--seed", 3)
    pixels, labels = pixel_features("test")
    rows = np.arange(100) * len(labels) // 100
    unit, labels = pixels[rows] / np.linalg.norm(pixels[rows], axis=1)[:, None], labels[rows]
    shares = []
    for draw in range(50):
        bank = few_label_bank(labels, 2, 3, draw)
        cosines = unit @ unit[bank].T
        cosines[bank, np.arange(len(bank))] = -np.inf  # of each row of the bank with itself
        votes = np.exp(cosines / 0.07) @ np.eye(10)[labels[bank]]  # no more than 20 neighbours
        shares.append((votes.argmax(1) == labels).mean())
    assert line["shots"]["2"]["mean"] == pytest.approx(np.mean(shares), abs=1e-12)


def test_classes_with_equally_many_votes_are_right_by_chance():
    """The neighbours of every query are one of each of three classes, equally near."""
    bank = torch.eye(9).roll(1, 0) + 1
    labels, truth = torch.arange(9) // 3, torch.tensor([0, 1, 2, 3])
    queries = torch.ones(4, 9)
    for order in (torch.arange(9), torch.arange(9).flip(0)):
        right, undecided = knn.count_right(bank[order], labels[order], queries, truth,
                                                [(9, 0.07)], 4, None, 3).tolist()
        assert right == [pytest.approx(1 / 3 * 3)] and undecided == [0]


def test_equally_near_neighbours_that_do_not_vote_are_told_of(tmp_path, capsys):
    """Images of one colour each; two classes have the same one, in the bank three times each."""
    for split, copies in (("train", 3), ("test", 1)):
        for name, colours in (("a", (10, 200)), ("b", (10, 90))):
            (tmp_path / split / name).mkdir(parents=True)
            for number, colour in enumerate(colours * copies):
                pixels = np.full((8, 8, 3), 20, dtype=np.uint8)
                pixels[0, 0] = colour
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    flags = ["--checkpoint", "pixels", "--data", tmp_path, "--image-size", "8", "--workers", "0",
             "--shots", "--k"]

    def warnings(*ks):
        eval_knn.main(eval_knn.parse_args([*map(str, flags), *map(str, ks)]))
        return [line for line in capsys.readouterr().out.splitlines() if "warning" in line]

    assert warnings(12) == []
    (one,) = warnings(3)
    assert "pixels" in one and "k 3: 2 of 4 images" in one


def test_feature_files_stand_for_their_checkpoints(tmp_path, capsys):
    weights = save_backbone(tmp_path / "weights.pth", 1)
    path = tmp_path / "features.npz"
    flags = ["--layers", "res4", "avgpool", "--draws", 50, "--k", 5, 20]
    first = evaluate("--checkpoint", weights, *flags, "--limit", 100, "--save-features", path)
    again = evaluate("--features", path, *flags)
    changed = {"checkpoint", "checkpoints"}
    assert {k: v for k, v in first.items() if k not in changed} == {
        k: v for k, v in again.items() if k not in changed
    }
    assert again["checkpoint"] == str(path)
    with np.load(path, allow_pickle=False) as file:
        for split, total in (("train", 1442), ("test", 355)):
            assert file[f"{split}/index"].tolist() == [i * total // 100 for i in range(100)]
            labels = open_images("digits", split, 3, limit=100).labels
            assert np.array_equal(file[f"{split}/labels"], labels)
            assert file[f"{split}/avgpool"].shape == (100, 128)
    both = evaluate("--features", path, path, "--layers", "avgpool", "--shots")
    assert [row["top1"] for row in both["checkpoints"]] == [again["results"][3]["top1"]] * 2


def saved_features(*flags):
    evaluate(*flags)


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_writes_the_same_features(size, pool, tmp_path):
    weights = save_backbone(tmp_path / "weights.pth", 1)
    flags = ["--checkpoint", weights, *FEW, "--batch-size", 16, "--save-features"]
    evaluate(*flags, tmp_path / "alone.npz")
    pool.run(size, saved_features, *map(str, flags), str(tmp_path / "several.npz"))
    with np.load(tmp_path / "alone.npz") as one, np.load(tmp_path / "several.npz") as other:
        assert one.files == other.files
        assert all(np.array_equal(one[name], other[name]) for name in one.files)
    alone = evaluate("--features", tmp_path / "alone.npz")
    first, *others = pool.run(size, evaluate, "--features", str(tmp_path / "alone.npz"))
    assert first == alone and others == [None] * (size - 1)


def test_a_run_folder_says_how_its_backbone_is_fed(tmp_path):
    save_backbone(tmp_path / "backbone.pth", 1, "resnet18_quarter", in_chans=1)
    plain = save_backbone(tmp_path / "plain.pth", 1, "resnet18_quarter", in_chans=1)
    flags = ["--arch", "resnet18_quarter", "--in-chans", 1, "--image-size", 20, "--mean", 0.3,
             "--std", 0.2]
    by_flags = evaluate("--checkpoint", plain, *flags, *FEW)
    settings = dict(data="digits", arch="resnet18_quarter", stem="small", in_chans=1,
                    image_size=20, mean=[0.3], std=[0.2])
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    by_run = evaluate("--checkpoint", tmp_path, *FEW)
    for key in ("top1", "results", "shots"):
        assert by_run[key] == by_flags[key]


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_gives_the_same_line(size, pool, tmp_path):
    weights = save_backbone(tmp_path / "weights.pth", 1)
    flags = ["--checkpoint", "pixels", "random", str(weights), "--k", "5", "20", *FEW,
             "--leave-one-out", "train", "--chunk", "9"]
    alone = evaluate(*flags[:-4])
    first, *others = pool.run(size, evaluate, *flags[:-4])
    assert first == alone and others == [None] * (size - 1)
    alone = evaluate(*flags)
    first, *others = pool.run(size, evaluate, *flags)
    assert first == alone
    assert others == [None] * (size - 1)


def test_fewer_test_images_than_processes_are_enough(pool):
    flags = ["--checkpoint", "pixels", "--limit", "2", "--draws", "50"]
    assert pool.run(3, evaluate, *flags)[0] == evaluate(*flags)


def test_loader_processes_change_nothing():
    flags = ["--checkpoint", "pixels", "random", *FEW, "--batch-size", 30]
    assert evaluate(*flags, "--workers", 2) == evaluate(*flags)


TINY = ["--arch", "resnet_tiny", "--stem", "small", "--image-size", 16, "--draws", 50]


def test_a_folder_of_sixteen_images_is_enough(image_folder):
    line = evaluate("--checkpoint", "pixels", "random", "--data", image_folder, *TINY)
    assert (line["num_train"], line["num_test"]) == (16, 16)
    assert [row["checkpoint"] for row in line["checkpoints"]] == ["pixels", "random (resnet_tiny)"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_folder_is_read_with_any_channel_count_a_file_can_have(channels, image_folder):
    flags = ["--data", image_folder, *TINY, "--in-chans", channels]
    assert 0 <= evaluate("--checkpoint", "random", *flags)["top1"] <= 1


def patches(folder, classes):
    """A folder with three PNGs a class, the same in every split for the same class."""
    for split, names in classes.items():
        for name in names:
            rng = np.random.default_rng(ord(name))
            (folder / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("tested", ["abc", "ac", "c"])
def test_a_class_folder_means_the_same_class_in_both_splits(tested, tmp_path):
    folder = patches(tmp_path, {"train": "abc", "val": tested})
    line = evaluate("--checkpoint", "pixels", "--data", folder, "--k", 1, *TINY)
    assert line["top1"] == 1.0


# ------------------------------------------------------------------------------------------- errors


def refused(*flags):
    with pytest.raises(RunError) as error:
        evaluate(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    assert f"--checkpoint {missing}" in refused("--checkpoint", "pixels", missing)


def test_weights_of_another_backbone_are_refused(tmp_path, monkeypatch):
    weights = save_backbone(tmp_path / "weights.pth", 1, "resnet18_quarter")
    assert str(weights) in refused("--checkpoint", weights, *FEW)
    monkeypatch.setattr(eval_knn, "evaluate", None)  # nor is one before it evaluated
    assert str(weights) in refused("--checkpoint", "pixels", weights, *FEW)


def test_a_transformer_is_fed_with_the_patches_and_any_size_that_fits(tmp_path):
    backbone = backbones.build_backbone("vit_micro", in_chans=3, image_size=24, patch_size=8,
                                        positions="learned", drop_path=0.0)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    settings = dict(data="digits", arch="vit_micro", patch_size=8, image_size=24, in_chans=3,
                    mean=[0.5], std=[0.5])
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    for size in ((), ("--image-size", 16)):  # its positions are interpolated
        line = evaluate("--checkpoint", tmp_path, *size, "--layers", "cls4", "patches", *FEW)
        assert [r["layer"] for r in line["results"]] == ["cls4", "patches"]
        assert 0 < line["top1"] <= 1
    printed = refused("--checkpoint", tmp_path, "--image-size", 20)
    assert "--image-size 20 is not a multiple of --patch-size 8" in printed


def test_a_released_checkpoint_is_evaluated_as_its_backbone_is(tmp_path, capsys):
    plain = save_backbone(tmp_path / "plain.pth", 1)
    state = {f"module.encoder_q.{key}": value
             for key, value in torch.load(plain, weights_only=True).items()}
    torch.save({"state_dict": {**state, "module.queue": torch.zeros(3)}}, tmp_path / "moco.pth.tar")
    one, other = evaluate("--checkpoint", plain, tmp_path / "moco.pth.tar", *FEW)["checkpoints"]
    assert (one["results"], one["shots"]) == (other["results"], other["shots"])


def test_a_folder_without_labels_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / split / "one.png")
    printed = refused("--checkpoint", "pixels", "--data", tmp_path)
    assert f"--data {tmp_path}" in printed and "labels" in printed


def test_a_folder_without_a_test_split_is_refused(tmp_path):
    patches(tmp_path, {"train": "ab"})
    printed = refused("--checkpoint", "pixels", "--data", tmp_path)
    assert f"--data {tmp_path}" in printed and "test" in printed


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--mean", 0.1, 0.2], "--mean has 2 values for --in-chans 3"),
        (["--in-chans", 1, "--std", 1, 2, 3], "--std has 3 values for --in-chans 1"),
    ],
)
def test_means_that_do_not_fit_the_channels_are_refused(flags, named, capsys):
    with pytest.raises((SystemExit, RunError)) as ended:
        evaluate("--checkpoint", "pixels", *flags, *FEW)
    assert named in f"{ended.value} {capsys.readouterr().err}"


def test_each_run_of_a_table_is_fed_as_it_was_trained(tmp_path, capsys):
    tables = []
    for name, mean in (("one", 0.5), ("other", 0.1)):
        settings = dict(data="digits", arch="resnet_tiny", stem="small", image_size=16, in_chans=3,
                        mean=[mean], std=[0.2])
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"settings": settings}))
        torch.manual_seed(0)
        backbone = backbones.build_backbone(
            "resnet_tiny", stem="small", in_chans=3, zero_init_residual=False
        )
        torch.save(backbone.state_dict(), tmp_path / name / "backbone.pth")
    for names in (["other"], ["one", "other"]):
        flags = ["--checkpoint", *(str(tmp_path / name) for name in names), "--shots", "1"]
        eval_knn.main(eval_knn.parse_args(flags))
        tables.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert tables[0]["shots"] == tables[1]["shots"]
    assert tables[1]["checkpoints"][0]["shots"] != tables[1]["shots"]


def test_runs_on_other_images_are_said_to_be(tmp_path, capsys):
    for name, images in (("one", "digits"), ("other", "/elsewhere")):
        (tmp_path / name).mkdir()
        save_backbone(tmp_path / name / "backbone.pth", 1)
        settings = dict(data=images, arch="resnet_tiny", stem="small", image_size=16, in_chans=3,
                        mean=[0.5], std=[0.2])
        (tmp_path / name / "run.json").write_text(json.dumps({"settings": settings}))
    flags = ["--checkpoint", str(tmp_path / "one"), str(tmp_path / "other"), *map(str, FEW)]
    eval_knn.main(eval_knn.parse_args(flags))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == 1 and "other was trained on /elsewhere, and is evaluated on" in said[0]
    eval_knn.main(eval_knn.parse_args([*flags, "--data", "digits"]))
    assert "warning" not in capsys.readouterr().out


def test_the_state_of_a_run_is_told_from_its_product(tmp_path):
    torch.save({"step": 1, "settings": {}, "state": {}}, tmp_path / "checkpoint.pt")
    said = refused("--checkpoint", tmp_path / "checkpoint.pt", *FEW)
    assert "checkpoint.pt is the state of a run in training" in said and "backbone.pth" in said


@pytest.mark.parametrize("name, flags, seen", [
    ("eval_knn", [], "shorter side to 256 px (bicubic), centre crop"),
    ("eval_knn", ["--image-size", "96"], "shorter side to 96 px (bicubic), centre crop"),
    ("eval_knn", ["--resize", "240"], "shorter side to 240 px (bicubic), centre crop"),
    ("eval_linear", [], "shorter side to 256 px (bicubic), centre crop"),
    ("eval_linear", ["--protocol", "dino"], "shorter side to 256 px (bicubic), centre crop"),
    ("eval_linear", ["--protocol", "moco"], "shorter side to 256 px (bilinear), centre crop"),
    ("eval_svm", [], "shorter side to 256 px (bilinear), then to a square"),
    ("eval_svm", ["--resize", "240"], "shorter side to 240 px (bilinear), centre crop"),
    ("eval_retrieval", [], "shorter side to 256 px (bicubic), centre crop"),
])
def test_images_are_seen_as_the_protocol_says(name, flags, seen, monkeypatch, capsys):
    def refuse(_):
        raise RunError("enough")

    monkeypatch.setattr(Source, "backbones", refuse)
    evaluation = importlib.import_module(name)
    with pytest.raises(RunError, match="enough"):
        evaluation.main(evaluation.parse_args(
            ["--checkpoint", "pixels", "--image-size", "224", *flags]))
    assert seen in capsys.readouterr().out


@pytest.mark.parametrize("name", ["eval_knn", "eval_linear", "eval_svm"])
def test_an_evaluation_fetches_images_if_told_to(name, monkeypatch):
    asked, evaluation = [], importlib.import_module(name)

    def refuse(*_, download, **__):
        asked.append(download)
        raise RunError("enough")

    monkeypatch.setattr(labelled, "open_images", refuse)
    for flags in ([], ["--download"]):
        with pytest.raises(RunError, match="enough"):
            evaluation.main(evaluation.parse_args(["--checkpoint", "pixels", *flags]))
    assert asked == [False, True]
