import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import eval_knn
from common import backbones, data
from common.dist import RunError

# --------------------------------------------------------------------------------------- parse_args


def test_the_protocol_is_20_neighbours_at_temperature_007_and_at_least_50_draws():
    args = eval_knn.parse_args(["--checkpoint", "pixels"])
    assert (args.k, args.temperature) == ([20], [0.07])
    assert sorted(args.shots) == [1, 5] and args.draws >= 50


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


def test_a_few_label_bank_has_so_many_images_of_every_class():
    labels = np.array([0, 1, 2, 5] * 10)
    for shots in (1, 3):
        rows = eval_knn.few_label_bank(labels, shots, 0, 0)
        assert len(set(rows)) == len(rows)
        assert {c: list(labels[rows]).count(c) for c in (0, 1, 2, 5)} == dict.fromkeys(
            (0, 1, 2, 5), shots
        )


def test_a_few_label_bank_takes_all_of_a_class_with_fewer():
    labels = np.array([7] * 20 + [3] * 2)
    rows = eval_knn.few_label_bank(labels, 5, 0, 0)
    assert len(rows) == 7 and {20, 21} < set(rows)


def test_few_label_banks_are_reproducible_and_differ_from_draw_to_draw():
    labels = np.arange(300) % 3
    draws = [eval_knn.few_label_bank(labels, 5, 0, draw).tolist() for draw in range(10)]
    assert draws == [eval_knn.few_label_bank(labels, 5, 0, draw).tolist() for draw in range(10)]
    assert len({tuple(sorted(rows)) for rows in draws}) == 10
    assert draws[0] != eval_knn.few_label_bank(labels, 5, 1, 0).tolist()


def test_few_label_banks_take_every_image_equally_often():
    labels = np.repeat([0, 1], 10)
    counts = np.zeros(20)
    for draw in range(1000):
        counts[eval_knn.few_label_bank(labels, 2, 0, draw)] += 1
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


FEW = ["--limit", 100, "--draws", 3]


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
    images = data.open_images("digits", split, 3)
    pixels = np.stack([np.asarray(images.read(i)[0]) for i in range(len(images))])
    return (pixels / 255 - 0.5).reshape(len(images), -1) / 0.5, images.labels


def test_pixels_are_classified_as_the_images_themselves_are():
    bank, labels = pixel_features("train")
    queries, truth = pixel_features("test")
    scores = loops(bank, labels, queries, 20, 0.07, 10)
    few = []
    for draw in range(4):
        rows = eval_knn.few_label_bank(labels, 1, 0, draw)
        guess = loops(bank[rows], labels[rows], queries, 20, 0.07, 10).argmax(1)
        few.append((guess == truth).mean())
    line = evaluate("--checkpoint", "pixels", "--shots", 1, "--draws", 4)
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
    flags = ["--checkpoint", "pixels", "random", str(weights), "--k", "5", "20", *FEW]
    alone = evaluate(*flags)
    first, *others = pool.run(size, evaluate, *flags)
    assert first == alone
    assert others == [None] * (size - 1)


def test_fewer_test_images_than_processes_are_enough(pool):
    flags = ["--checkpoint", "pixels", "--limit", "2", "--draws", "2"]
    assert pool.run(3, evaluate, *flags)[0] == evaluate(*flags)


def test_loader_processes_change_nothing():
    flags = ["--checkpoint", "pixels", "random", *FEW, "--batch-size", 30]
    assert evaluate(*flags, "--workers", 2) == evaluate(*flags)


TINY = ["--arch", "resnet_tiny", "--stem", "small", "--image-size", 16, "--draws", 3]


def test_a_folder_of_sixteen_images_is_enough(image_folder):
    line = evaluate("--checkpoint", "pixels", "random", "--data", image_folder, *TINY)
    assert (line["num_train"], line["num_test"]) == (16, 16)
    assert [row["checkpoint"] for row in line["checkpoints"]] == ["pixels", "random"]


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


def test_weights_of_another_backbone_are_refused(tmp_path):
    weights = save_backbone(tmp_path / "weights.pth", 1, "resnet18_quarter")
    assert str(weights) in refused("--checkpoint", weights, *FEW)


def test_a_transformer_is_fed_with_the_patches_and_any_size_that_fits(tmp_path):
    backbone = backbones.build_backbone("vit_micro", in_chans=3, image_size=24, patch_size=8,
                                        positions="learned", drop_path=0.0)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    settings = dict(data="digits", arch="vit_micro", patch_size=8, image_size=24, in_chans=3,
                    mean=[0.5], std=[0.5])
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    for size in ((), ("--image-size", 16)):  # its positions are interpolated
        assert 0 < evaluate("--checkpoint", tmp_path, *size, *FEW)["top1"] <= 1
    printed = refused("--checkpoint", tmp_path, "--image-size", 20)
    assert "--image-size 20 is no multiple of --patch-size 8" in printed


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
        backbone = eval_knn.backbones.build_backbone(
            "resnet_tiny", stem="small", in_chans=3, zero_init_residual=False
        )
        torch.save(backbone.state_dict(), tmp_path / name / "backbone.pth")
    for names in (["other"], ["one", "other"]):
        flags = ["--checkpoint", *(str(tmp_path / name) for name in names), "--shots", "1"]
        eval_knn.main(eval_knn.parse_args(flags))
        tables.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert tables[0]["shots"] == tables[1]["shots"]
    assert tables[1]["checkpoints"][0]["shots"] != tables[1]["shots"]
