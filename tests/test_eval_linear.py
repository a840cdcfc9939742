import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

import drill
import eval_linear
from common import augment, backbones, checkpoint, features, labelled
from common.distributed import RunError, World
from common.images import open_images
from common.loader import Loader

ALONE = World(0, 1, torch.device("cpu"))

# --------------------------------------------------------------------------------------- parse_args


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--epochs", "3"], "--epochs does not go with --protocol auto"),
        (["--lr", "3"], "--lr does not go"),
        (["--protocol", "moco", "--save-features", "x.npz"], "--save-features does not go"),
        (["--protocol", "nobody"], "nobody"),
        (["--train-fraction", "0"], "--train-fraction: '0'"),
        (["--train-fraction", "1.5"], "'1.5'"),
        (["--folds", "1"], "--folds: '1'"),
    ],
)
def test_a_bad_argument_is_one_line_with_its_value(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        eval_linear.parse_args(["--checkpoint", "pixels", *flags])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and named in printed and printed.count("\n") == 1


def test_feature_files_go_with_auto_only(capsys):
    with pytest.raises(SystemExit):
        eval_linear.parse_args(["--features", "x.npz", "--protocol", "mae"])
    assert "--features does not go with --protocol mae" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        eval_linear.parse_args(["--checkpoint", "pixels", "--protocol", "moco",
                                "--train-batch-size", "7"])
    assert "--train-batch-size 7 does not divide among 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, optimizer, lr, weight_decay, batch_size, epochs, others",
    [
        ("moco", "sgd", 30, 0, 256, 100, "none normal bilinear bilinear"),
        ("swav", "sgd", 0.3, 1e-6, 256, 100, "none normal bilinear bilinear"),
        ("barlow_twins", "sgd", 0.3, 1e-6, 256, 100, "none normal bilinear bilinear"),
        ("simclr", "nesterov", 1.6 / 16, 0, 4096, 90, "none zero bicubic bicubic"),
        ("dino", "sgd", 0.001, 0, 1024, 100, "none normal bilinear bicubic"),
        ("mae", "lars", 6.4 / 64, 0, 16384, 90, "plain truncated bicubic bicubic"),
        ("vissl", "nesterov", 0.01, 5e-4, 256, 28, "affine torch bilinear bilinear"),
    ],
)
def test_the_protocols_are_the_published_ones(
    name, optimizer, lr, weight_decay, batch_size, epochs, others
):
    protocol = eval_linear.PROTOCOLS[name]
    assert [protocol[key] for key in ("norm", "init", "crop", "resize")] == others.split()
    assert protocol["optimizer"] == optimizer and protocol["lr"] == pytest.approx(lr)
    assert (protocol["weight_decay"], protocol["batch_size"], protocol["epochs"]) == (
        weight_decay, batch_size, epochs)
    assert len(eval_linear.PROTOCOLS) == 7


def rates(name, epochs, steps=4):
    return eval_linear.learning_rates(eval_linear.PROTOCOLS[name], 1.0, epochs, steps)


def test_the_learning_rates_step_or_fall_as_published():
    moco = rates("moco", 100)
    assert len(moco) == 400
    assert (moco[239], moco[240], moco[319], moco[320]) == pytest.approx((1, 0.1, 0.1, 0.01))
    vissl = rates("vissl", 28)
    assert [vissl[4 * e] for e in (7, 8, 15, 16, 23, 24)] == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.01, 0.001])
    assert rates("moco", 10) == pytest.approx(moco[::10])  # milestones scale
    swav = rates("swav", 100)
    assert swav == rates("barlow_twins", 100) == rates("dino", 100)
    assert swav[:4] == [1] * 4 and swav[200] == pytest.approx(0.5)  # once an epoch
    assert swav[-1] == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)
    mae = rates("mae", 90)
    assert mae[0] == 0 and mae[20] == pytest.approx(0.5) and mae[40] == 1 and mae[41] < 1
    simclr = rates("simclr", 90)
    assert simclr[0] == 1 and simclr[180] == pytest.approx(0.5) and simclr[1] < 1


# ---------------------------------------------------------------------------------- training images


def test_a_fraction_has_equally_many_of_every_class():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 7], 50))
    rows = labelled.class_balanced(labels, 0.1, 0)
    assert np.bincount(labels[rows]).tolist() == [5, 5, 5, 0, 0, 0, 0, 5]
    assert len(set(rows)) == 20 and (np.diff(rows) > 0).all()
    more = labelled.class_balanced(labels, 0.25, 0)
    assert len(more) == 50 and set(rows) < set(more)
    assert sorted(np.bincount(labels[more])[[0, 1, 2, 7]]) == [12, 12, 13, 13]
    assert np.array_equal(rows, labelled.class_balanced(labels, 0.1, 0))
    assert not np.array_equal(rows, labelled.class_balanced(labels, 0.1, 1))
    assert len(labelled.class_balanced(labels, 0.001, 0)) == 4  # one of each at least
    assert np.array_equal(labelled.class_balanced(labels, 1.0, 0), np.arange(200))


def test_a_class_with_fewer_images_gives_all_it_has():
    labels = np.array([0] * 2 + [1] * 98)
    rows = labelled.class_balanced(labels, 0.1, 0)
    assert np.bincount(labels[rows]).tolist() == [2, 8]


# -------------------------------------------------------------------------------------------- heads


def tiny(arch="resnet_tiny", **options):
    torch.manual_seed(0)
    options = dict(in_chans=3, stem="small", zero_init_residual=False, image_size=16, patch_size=4,
                   positions="sincos", drop_path=0.0) | options
    return backbones.build_backbone(arch, **options).eval().requires_grad_(False)


def test_the_best_and_the_best_five():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5], [1.0] * 6])
    got = eval_linear.top_1_and_5(logits, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(got, torch.tensor([[1, 1], [0, 0], [1 / 6, 5 / 6]]).double())
    assert eval_linear.top_1_and_5(logits[:, :3], torch.tensor([2, 2, 2]))[:, 1].tolist() == [1] * 3


def test_the_layers_of_the_protocols():
    resnet, vit = tiny(), tiny("vit_micro")
    assert eval_linear.protocol_layers("moco", resnet) == ["avgpool"]
    assert eval_linear.protocol_layers("vissl", resnet) == [
        "conv1-grid", "res2-grid", "res3-grid", "res4-grid", "res5-grid", "avgpool-mlp",
        "avgpool"]
    assert eval_linear.protocol_layers("dino", resnet) == ["avgpool"]
    assert eval_linear.protocol_layers("dino", vit) == ["cls4"]
    assert eval_linear.protocol_layers("mae", vit) == ["cls"]
    vit.num_features = 384  # as ViT-S
    assert eval_linear.protocol_layers("dino", vit) == ["cls4"]
    vit.num_features = 768
    assert eval_linear.protocol_layers("dino", vit) == ["cls+patches"]
    assert eval_linear.protocol_layers("moco", features.Pixels()) == ["pixels"]


def test_published_pooling_gives_the_published_sizes():
    with torch.device("meta"):  # shapes alone
        resnet = tiny("resnet50", stem="imagenet")
        names = eval_linear.protocol_layers("vissl", resnet)
        heads = eval_linear.build_heads(resnet, names, torch.zeros(1, 3, 224, 224), 10, "affine",
                                        "torch")
    sizes = [(head.norm and head.norm.num_features, head.linear.in_features)
             for head in heads.values()]
    assert sizes == [(64, 9216), (256, 9216), (512, 8192), (1024, 9216), (2048, 8192),
                     (None, 2048), (2048, 2048)]


def test_layers_stand_side_by_side():
    vit, images = tiny("vit_micro"), torch.randn(2, 3, 16, 16)
    got = eval_linear.probed_layers(vit, images, ["cls+patches", "cls"])
    parts = features.layers(vit, images, ["cls", "patches"])
    assert torch.equal(got["cls+patches"], torch.cat([parts["cls"], parts["patches"]], 1))
    assert torch.equal(got["cls"], parts["cls"])
    resnet = tiny()
    got = eval_linear.probed_layers(resnet, images, ["avgpool-mlp", "avgpool"])
    assert torch.equal(got["avgpool-mlp"], got["avgpool"])


def test_batch_norm_of_a_flattened_map_counts_its_channels():
    head = eval_linear.Head(4, 36, 3, "affine", "normal")
    maps = torch.randn(8, 4, 3, 3) * 5 + 2
    expected = nn.BatchNorm2d(4)(maps).flatten(1)
    torch.testing.assert_close(head(maps.flatten(1)), head.linear(expected))
    assert head.linear.weight.detach().std() == pytest.approx(0.01, rel=0.3)
    assert (head.linear.bias == 0).all()
    plain = eval_linear.Head(4, 4, 3, "plain", "truncated")
    assert plain.norm.weight is None and plain.norm.eps == 1e-6
    assert (eval_linear.Head(4, 4, 3, "none", "zero").linear.weight == 0).all()


def test_batch_norm_is_not_decayed_and_lars_adapts_the_weights_only():
    heads = nn.ModuleDict({"a": eval_linear.Head(4, 4, 3, "affine", "torch")})
    groups = eval_linear.build_optimizer(heads, "nesterov", 0.1, 5e-4).param_groups
    assert [(g["weight_decay"], len(g["params"]), g["nesterov"]) for g in groups] == [
        (5e-4, 2, True), (0.0, 2, True)]
    groups = eval_linear.build_optimizer(heads, "lars", 0.1, 0.0).param_groups
    assert [(g["adapt"], [p.ndim for p in g["params"]]) for g in groups] == [
        (True, [2]), (False, [1, 1, 1])]


@pytest.mark.parametrize("name, interpolation, norm, init, rates", [
    ("dino", "bilinear", "none", "normal",
     [(1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]),
    ("vissl", "bilinear", "affine", "torch", [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001]),
    ("mae", "bicubic", "plain", "truncated",
     [0, *((1 + math.cos(math.pi * step / 8)) / 2 for step in range(8))]),
])
def test_training_is_the_loop_written_out(name, interpolation, norm, init, rates, tmp_path):
    """Of one batch an epoch: crops, lr x batch / 256, momentum, Nesterov's or LARS, decay."""
    torch.set_default_dtype(torch.float64)
    evaluate("--checkpoint", "pixels", "--protocol", name, "--epochs", len(rates), "--lr", 8,
             "--limit", 16, "--seed", 3, "--output", tmp_path)
    trained = torch.load(tmp_path / f"{name}-pixels/heads.pth", weights_only=True)
    images = open_images("digits", "train", 3, limit=16)
    view = augment.View(16, [augment.RandomResizedCrop((0.08, 1), (3 / 4, 4 / 3), interpolation),
                             augment.HorizontalFlip(p=0.0), augment.Normalize([0.5], [0.5])], 3)
    loader = Loader(images, [view], batch_size=16, epochs=len(rates), seed=3, world=ALONE,
                    workers=0)
    torch.manual_seed(3)
    head = eval_linear.Head(768, 768, len(trained["pixels.linear.bias"]), norm, init)
    buffers = dict.fromkeys(dict(head.named_parameters()), 0)
    for epoch, rate in enumerate(rates):
        (batch,) = loader.epoch(epoch)
        loss = nn.functional.cross_entropy(head(batch.views[0].flatten(1)),
                                           torch.tensor(images.labels)[batch.index])
        loss.backward()
        with torch.no_grad():
            for key, p in head.named_parameters():
                d, p.grad = p.grad, None
                if name == "vissl" and not key.startswith("norm"):
                    d = d + 5e-4 * p
                if name == "mae" and p.ndim > 1:
                    d = 0.001 * p.norm() / d.norm() * d
                buffers[key] = 0.9 * buffers[key] + d
                p -= 8 * 16 / 256 * rate * (d + 0.9 * buffers[key] if name == "vissl" else
                                            buffers[key])
    for key, value in head.state_dict().items():
        torch.testing.assert_close(trained[f"pixels.{key}"], value, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------- main


def evaluate(*flags):
    """The JSON line of an evaluation in this process; None if it prints nothing."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        eval_linear.main(eval_linear.parse_args([str(flag) for flag in flags]))
    lines = printed.getvalue().splitlines()
    return json.loads(lines[-1]) if lines else None


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(tiny().state_dict(), path)
    return path


FEW = ["--limit", 100, "--weight-decays", 0.001, 0.01, "--folds", 2]


def test_the_json_line_has_the_documented_keys(weights):
    line = evaluate("--checkpoint", "pixels", "random", weights, *FEW)
    assert {"eval", "protocol", "top1", "top5", "results"} <= line.keys()
    assert (line["eval"], line["protocol"]) == ("linear", "auto")
    assert (line["num_train"], line["num_test"]) == (100, 100)
    names = ["pixels", "random (resnet_tiny)", str(weights)]
    assert [row["checkpoint"] for row in line["checkpoints"]] == names
    for row in line["checkpoints"]:
        (result,) = row["results"]
        assert result.keys() == {"layer", "top1", "top5", "validation", "weight_decay"}
        assert 0.5 < row["top1"] == result["top1"] <= row["top5"] <= 1


def test_auto_on_digits_equals_scikit_learns_tuned_logistic_regression():
    """Within half a point, on the images themselves; benchmarks/linear.py compares more."""
    line = evaluate("--checkpoint", "pixels", "--in-chans", 1, "--folds", 3)
    splits = {}
    for split in ("train", "test"):
        images = open_images("digits", split, 1)
        rows = [np.asarray(images.read(i)[0], dtype=np.float64) for i in range(len(images))]
        splits[split] = np.array(rows).reshape(len(images), -1), images.labels
    (x, y), (test, truth) = splits["train"], splits["test"]
    center, scale = x.mean(0), x.std(0)
    x, test = ((rows - center) / np.where(scale > 0, scale, 1) for rows in (x, test))
    fold = np.arange(len(y)) % 3
    costs = np.logspace(-3, 1, 5)
    right = [sum((LogisticRegression(C=c, max_iter=300).fit(x[fold != f], y[fold != f])
                  .predict(x[fold == f]) == y[fold == f]).sum() for f in range(3)) for c in costs]
    theirs = LogisticRegression(C=costs[int(np.argmax(right))], max_iter=1000).fit(x, y)
    assert abs(line["top1"] - theirs.score(test, truth)) <= 0.005


def test_the_layer_is_chosen_on_the_training_images(tmp_path):
    """One layer is better on the training images, the other one on the test images."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 3

    def rows(signal):
        return (rng.normal(size=(60, 3)) + signal * np.eye(3)[labels]).astype(np.float32)

    arrays = {"checkpoint": "x", "protocol": "x"}
    for split in ("train", "test"):
        arrays |= {f"{split}/labels": labels, f"{split}/index": np.arange(60)}
    arrays |= {"train/a": rows(1), "test/a": rows(9), "train/b": rows(4), "test/b": rows(0)}
    np.savez(tmp_path / "f.npz", **arrays)
    line = evaluate("--features", tmp_path / "f.npz")
    assert [r["layer"] for r in line["results"]] == ["a", "b"]
    assert line["top1"] == line["results"][1]["top1"] < line["results"][0]["top1"]
    other = evaluate("--features", tmp_path / "f.npz", "--seed", 1, "--layers", "b", "a")
    assert other["top1"] == other["results"][0]["top1"] == line["top1"]
    assert other["results"][1]["validation"] != line["results"][0]["validation"]  # other folds


def test_several_layers_are_a_line_each(weights):
    line = evaluate("--checkpoint", weights, "--layers", "conv1", "res4-grid", *FEW)
    assert [r["layer"] for r in line["results"]] == ["conv1", "res4-grid"]


def test_heads_are_tested_with_the_statistics_of_the_training(weights, tmp_path):
    flags = ["--checkpoint", weights, "--protocol", "vissl", "--limit", 64, "--epochs", 2,
             "--train-batch-size", 16, "--output", tmp_path, "--batch-size"]
    line = evaluate(*flags, 64)
    assert evaluate(*flags, 7) == line
    first, last = line["results"][0], line["results"][-1]
    assert line["top1"] == last["top1"] != first["top1"] and last["layer"] == "avgpool"


def test_heads_train_as_if_alone(weights, tmp_path):
    flags = ["--checkpoint", weights, "--protocol", "vissl", "--limit", 32, "--epochs", 2,
             "--train-batch-size", 16, "--layers", "avgpool"]
    found = []
    for more in ([], ["res4-grid"]):
        evaluate(*flags, *more, "--output", tmp_path / f"{len(more)}")
        (folder,) = (tmp_path / f"{len(more)}").iterdir()
        found.append(torch.load(folder / "heads.pth", weights_only=True))
    one, two = found
    assert len(one) < len(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_random_is_the_mean_of_five_initialisations(weights, tmp_path):
    files = []
    for seed in range(5):
        torch.manual_seed(seed)
        backbone = backbones.build_backbone("resnet_tiny", in_chans=3, stem="small",
                                            zero_init_residual=False)
        files.append(tmp_path / f"{seed}.pth")
        torch.save(backbone.state_dict(), files[-1])
    rows = evaluate("--checkpoint", *files, *FEW)["checkpoints"]
    line = evaluate("--checkpoint", "random", *FEW)
    assert line["top1"] == pytest.approx(np.mean([row["top1"] for row in rows]), abs=1e-12)


def test_feature_files_stand_for_their_checkpoints(weights, tmp_path):
    path = tmp_path / "f.npz"
    first = evaluate("--checkpoint", weights, *FEW, "--save-features", path)
    again = evaluate("--features", path, *FEW[2:])
    assert again["results"] == first["results"]


def test_a_fraction_of_the_training_images(weights, tmp_path):
    for flags in (FEW[2:], ["--protocol", "swav", "--epochs", 9, "--output", tmp_path]):
        line = evaluate("--checkpoint", "pixels", "--train-fraction", 0.1, *flags)
        assert (line["num_train"], line["num_test"]) == (144, 355) and line["top1"] > 0.4
    flags = ["--checkpoint", "pixels", "--train-fraction", 0.02, *FEW[2:], "--seed"]
    one, two = (evaluate(*flags, seed) for seed in (0, 1))
    assert one["top1"] != two["top1"]


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_gives_the_same_line(size, pool, weights):
    flags = list(map(str, ["--checkpoint", "pixels", weights, *FEW]))
    first, *others = pool.run(size, evaluate, *flags)
    assert first == evaluate(*flags) and others == [None] * (size - 1)
    flags = ["--checkpoint", "pixels", "--limit", "2"]  # as many images as processes, or fewer
    assert pool.run(size, evaluate, *flags)[0] == evaluate(*flags)


@pytest.mark.parametrize("protocol", ["vissl", "mae"])
def test_a_papers_protocol_is_the_same_on_any_number_of_processes(
    protocol, pool, weights, tmp_path
):
    flags = ["--checkpoint", str(weights), "--protocol", protocol, "--epochs", "2", "--limit",
             "64", "--train-batch-size", "16", "--output"]
    line = evaluate(*flags, tmp_path / "one")
    first, other = pool.run(2, evaluate, *flags, str(tmp_path / "two"))
    assert other is None and first["num_test"] == 64
    names = [next((tmp_path / name).iterdir()) for name in ("one", "two")]
    one, two = (torch.load(name / "heads.pth", weights_only=True) for name in names)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)
    for a, b in zip(line["results"], first["results"], strict=True):
        assert abs(a["top1"] - b["top1"]) <= 1 / 64 + 1e-9


@pytest.mark.parametrize("protocol", eval_linear.PROTOCOLS)
@pytest.mark.parametrize("arch", ["resnet_tiny", "vit_micro"])
def test_every_protocol_runs_on_sixteen_images_and_leaves_the_backbone(
    protocol, arch, image_folder, tmp_path, capsys
):
    torch.save(tiny(arch).state_dict(), tmp_path / "w.pth")
    flags = ["--checkpoint", tmp_path / "w.pth", "--arch", arch, "--stem", "small", "--image-size",
             16, "--patch-size", 4, "--data", image_folder, "--epochs", 2, "--output", tmp_path]
    eval_linear.main(eval_linear.parse_args(
        [*map(str, flags), "--protocol", protocol, "--workers", "0"]))
    *printed, line = capsys.readouterr().out.splitlines()
    line = json.loads(line)
    assert (line["protocol"], line["num_train"], line["num_test"]) == (protocol, 16, 16)
    assert 0 <= line["top1"] <= 1 and line["top5"] is None  # two classes
    assert not any("top-5" in text for text in printed)
    assert sum(text.endswith(" --epochs 2, mirrored crops") for text in printed) == 1
    (hashes,) = [text for text in printed if "hash of the backbone" in text]
    before, after = hashes.split()[-4], hashes.split()[-2]
    assert before == after and len(before) == 12
    assert len(line["results"]) == (7 if (protocol, arch) == ("vissl", "resnet_tiny") else 1)


@pytest.mark.parametrize("flags", [[], ["--protocol", "swav", "--epochs", "2"]])
def test_a_backbone_that_changes_is_noticed(flags, weights, tmp_path, monkeypatch):
    freeze = features.freeze

    def thawed(*arguments):
        return freeze(*arguments).train()  # batch norm statistics move

    monkeypatch.setattr(features, "freeze", thawed)
    with pytest.raises(RunError, match="the backbone has changed"):
        evaluate("--checkpoint", weights, *flags, "--limit", 64, "--output", tmp_path)


def test_a_papers_protocol_learns(tmp_path):
    line = evaluate("--checkpoint", "pixels", "--protocol", "swav", "--epochs", 5, "--output",
                    tmp_path)
    assert line["top1"] > 0.6 and line["num_train"] == 1442


def test_other_settings_are_refused_and_a_finished_run_is_only_tested(weights, tmp_path):
    flags = ["--checkpoint", weights, "--protocol", "swav", "--limit", 64, "--train-batch-size",
             16, "--output", tmp_path]
    line = evaluate(*flags, "--epochs", 2)
    (folder,) = tmp_path.iterdir()
    written = (folder / "checkpoint.pt").stat().st_mtime_ns
    assert evaluate(*flags, "--epochs", 2) == line
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == written
    for name, *value in (("--lr", 9), ("--seed", 1), ("--flip",), ("--image-size", 20),
                         ("--std", 0.3), ("--stem", "small-pad2"), ("--exif-orientation",)):
        with pytest.raises(RunError, match=f"{name} is .* and was .*--no-resume"):
            evaluate(*flags, "--epochs", 2, name, *value)
    evaluate(*flags, "--epochs", 2, "--lr", 9, "--no-resume")


def test_other_labels_of_the_same_files_are_refused(image_folder, tmp_path):
    files = sorted(Path(image_folder).glob("train/*/*.jpg"))

    def run(first):
        (tmp_path / "list.txt").write_text("".join(
            f"{file} {(row + first) % 2}\n" for row, file in enumerate(files)))
        evaluate("--checkpoint", "pixels", "--protocol", "swav", "--data", tmp_path / "list.txt",
                 "--test-data", tmp_path / "list.txt", "--image-size", 8, "--epochs", 1,
                 "--workers", 0, "--output", tmp_path / "out")

    run(0)
    with pytest.raises(RunError, match="--labels is .* and was"):
        run(1)


def test_stopped_at_any_moment_it_ends_with_the_same_numbers(weights, tmp_path, monkeypatch):
    flags = ["--checkpoint", weights, "--protocol", "vissl", "--limit", 64, "--epochs", 3,
             "--train-batch-size", 16, "--output"]
    whole = evaluate(*flags, tmp_path / "whole")
    agree = checkpoint.Run.agree

    def stop_at_six(self, epoch_ends, steps=[]):  # noqa: B006
        steps.append(1)
        self.stop_requested = len(steps) == 6
        return agree(self, epoch_ends)

    monkeypatch.setattr(checkpoint.Run, "agree", stop_at_six)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        eval_linear.main(eval_linear.parse_args([str(f) for f in (*flags, tmp_path / "cut")]))
    assert "stopped at step 6" in printed.getvalue() and '"eval"' not in printed.getvalue()
    monkeypatch.undo()
    assert evaluate(*flags, tmp_path / "cut") == whole
    one, two = (torch.load(next((tmp_path / name).iterdir()) / "heads.pth", weights_only=True)
                for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_it_ends_with_the_same_numbers(processes, weights, tmp_path):
    flags = ["--checkpoint", weights, "--protocol", "swav", "--epochs", 20, "--log-every", 1,
             "--train-batch-size", 64, "--output"]
    status, whole = drill.run("eval_linear.py", *flags, tmp_path / "whole", processes=processes)
    assert status == 0, whole
    process = drill.start("eval_linear.py", *flags, tmp_path / "cut", processes=processes)

    def step():
        return max((len(drill.log_of(p)) for p in (tmp_path / "cut").glob("swav-*")), default=0)

    drill.wait_for(lambda: step() >= 50, process)
    drill.kill(process)
    status, printed = drill.run("eval_linear.py", *flags, tmp_path / "cut", processes=processes)
    assert status == 0 and "resuming" in printed, printed
    assert printed.splitlines()[-1] == whole.splitlines()[-1]


@pytest.mark.parametrize("flags", [[], ["--protocol", "moco"]])
def test_images_without_labels_are_refused(flags, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / "0.png")
    with pytest.raises(RunError, match="no class folders, so no labels"):
        evaluate("--checkpoint", "pixels", "--data", tmp_path, "--image-size", 8, *flags)


@pytest.mark.parametrize("flags", [[], ["--protocol", "moco"]])
def test_a_layer_that_is_not_there_is_named(flags, weights, tmp_path):
    with pytest.raises(RunError, match="no layer res7; there are conv1 res2"):
        evaluate("--checkpoint", weights, "--layers", "res7", "--limit", 50, "--output", tmp_path,
                 *flags)


def test_images_of_several_classes_are_refused(tmp_path):
    arrays = {"checkpoint": "x", "protocol": "x"}
    for split in ("train", "test"):
        arrays |= {f"{split}/labels": np.eye(4, dtype=int), f"{split}/index": np.arange(4),
                   f"{split}/a": np.eye(4, dtype=np.float32)}
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(RunError, match="one class each"):
        evaluate("--features", tmp_path / "f.npz")
