"""eval_linear.py: further test sets with some of the classes, and the attentive probe."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import drill
import eval_linear
from common import checkpoint, features, labelled, solver
from common.backbones import VIT_SIZES
from common.distributed import RunError, World
from common.images import open_images
from test_eval_linear import evaluate, tiny

ALONE = World(0, 1, torch.device("cpu"))
FOUR = (1, 3, 4, 8)
FEW = ["--weight-decays", 0.01, "--folds", 2]


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """The digits' test images of four classes, two pixels to the right, and an empty class 9."""
    folder, images = tmp_path_factory.mktemp("shifted"), open_images("digits", "test", 1)
    for row in np.flatnonzero(np.isin(images.labels, FOUR)):
        pixels = np.pad(np.asarray(images.read(row)[0]), ((0, 0), (2, 0)))[:, :-2]
        place = folder / str(images.labels[row])
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place / f"{row}.png")
    (folder / "9").mkdir()
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(tiny("vit_micro").state_dict(), path)
    return path


VIT = ["--arch", "vit_micro", "--image-size", 16, "--patch-size", 4]


def pixels_of(images):
    rows = [np.asarray(images.read(i)[0], dtype=np.float64).ravel() for i in range(len(images))]
    return (np.array(rows) / 255 - 0.5) / 0.5


def counted_by_loops(logits, truth, classes):
    """Top-1 and top-5 of logits (N, C) among some classes, image by image; top-5 of six or more."""
    right = np.zeros(2)
    for row, label in zip(logits, truth, strict=True):
        order = sorted(classes, key=lambda c: -row[c])
        right += [label == order[0], label in order[:5]]
    return right / len(truth) * [1, 1 if len(classes) > 5 else np.nan]


# ------------------------------------------------------------------------------ further test images


def test_a_papers_protocol_counts_what_a_loop_counts(shifted, tmp_path):
    line = evaluate("--checkpoint", "pixels", "--protocol", "swav", "--epochs", 3, "--output",
                    tmp_path, "--in-chans", 1, "--also-test", shifted)
    (also,) = line["also"]
    assert line["results"][0]["also"] == [also]
    assert (also["data"], also["num_test"], also["num_classes"]) == (str(shifted), 142, 4)
    head = torch.load(tmp_path / "swav-pixels/heads.pth", weights_only=True)
    weight, bias = (head[f"pixels.linear.{part}"].double().numpy() for part in ("weight", "bias"))
    images = open_images(str(shifted), "test", 1, whole=True,
                         classes={str(c): c for c in range(10)})
    logits = pixels_of(images) @ weight.T + bias
    masked = counted_by_loops(logits, images.labels, FOUR)
    assert also["top1"] == pytest.approx(masked[0], abs=1e-12) and also["top5"] is None
    assert masked[0] > counted_by_loops(logits, images.labels, range(10))[0]


def test_auto_counts_among_the_classes_that_are_there():
    rng = np.random.default_rng(0)
    labels, truth = np.arange(210) % 7, rng.choice([0, 2, 3], 90)
    train = torch.tensor(np.eye(7)[labels] + rng.normal(size=(210, 7)), dtype=torch.float32)
    test = torch.tensor(np.eye(7)[truth] + rng.normal(size=(90, 7)), dtype=torch.float32)
    found = solver.cross_validated(train, labels, test, truth, decays=[0.01], folds=2,
                                   num_classes=7, seed=0, world=ALONE,
                                   also=[(test, truth, [0, 2, 3])])
    mean, scale = solver.standardisation(train)
    x = (train.double() - mean) * scale
    axes, variances = solver.principal_axes(x, len(x))
    points = solver.fit(x @ axes, torch.tensor(labels), torch.full((210, 1), 1 / 210).double(),
                        torch.tensor([0.01]).double(), variances, 7)
    head = points.view(8, 7)
    logits = ((test.double() - mean) * scale @ axes @ head[:-1] + head[-1]).numpy()
    for counts, classes in ((found, range(7)), (found["also"][0], [0, 2, 3])):
        np.testing.assert_allclose([counts["top1"], counts["top5"]],
                                   counted_by_loops(logits, truth, classes), atol=1e-12)
    assert found["also"][0]["top1"] > found["top1"]


@pytest.mark.parametrize("flags", [FEW, ["--protocol", "swav", "--epochs", 1]])
def test_a_limit_leaves_the_classes_that_a_further_set_has(flags, shifted, tmp_path):
    """One image of one class of the folder: still one of four classes, not the only one."""
    line = evaluate("--checkpoint", "random", "--arch", "resnet_tiny", "--also-test", shifted,
                    "--limit", 5, *flags, "--output", tmp_path)
    (also,) = line["also"]
    assert (also["num_test"], also["num_classes"]) == (5, 4)


def test_a_limit_leaves_the_places_of_classes(tmp_path):
    train = open_images(str(folders(tmp_path / "words", *"abcdef")), "train", 1, whole=True)
    test = labelled.open_test(str(folders(tmp_path / "numbered", *"0245")), train.subset([0, 5]), 1,
                              limit=2)
    assert test.labels.tolist() == [0, 4] and test.present.tolist() == [0, 2, 4, 5]


def test_several_folders_and_checkpoints_are_a_row_each(shifted, capsys):
    flags = ["--checkpoint", "pixels", "random", "--arch", "resnet_tiny", "--also-test", shifted,
             shifted, "--limit", 100, *FEW]
    eval_linear.main(eval_linear.parse_args([str(flag) for flag in flags]))
    printed = capsys.readouterr().out
    assert printed.count(f"\n  {shifted} (4 classes)   ") == 4
    assert len(re.findall(r" \(4 classes\) +0\.\d+ +-\n", printed)) == 4  # no top-5
    assert f"class folders of {shifted} without an image: 9" in printed
    assert printed.count("hash of the backbone") == 1  # of five untrained ones


def test_processes_agree_on_further_images(shifted, vit, pool):
    flags = list(map(str, ["--checkpoint", vit, *VIT, "--also-test", shifted, "--limit", 90, *FEW,
                           "--workers", 0]))
    assert pool.run(2, evaluate, *flags)[0] == evaluate(*flags)


def folders(top, *names):
    for name in names:
        (top / name).mkdir(parents=True)
        Image.new("L", (8, 8), len(name) * 40).save(top / name / "0.png")
    return top


@pytest.mark.parametrize("names, said", [
    (["b", "zebra"], "class folders of .* that the training set does not have: zebra"),
    (["b", "7"], "does not have: 7"),
    (["b", "empty"], "--also-test .*: no training image of empty"),
    ([], "no image file in it"),
])
def test_a_class_that_is_not_trained_on_is_refused_by_name(names, said, tmp_path):
    folders(tmp_path / "data/train", "a", "b", "c")
    (tmp_path / "data/train/empty").mkdir()
    folders(tmp_path / "data/val", "a", "b", "c")
    (tmp_path / "new").mkdir()
    with pytest.raises(RunError, match=said) as error:
        evaluate("--checkpoint", "pixels", "--data", tmp_path / "data", "--image-size", 8,
                 "--also-test", folders(tmp_path / "new", *names))
    assert f"--also-test {tmp_path / 'new'}" in str(error.value) and "\n" not in str(error.value)


def test_places_in_the_order_of_the_names_are_names_too(tmp_path):
    """ImageNetV2's folders are numbers; where training classes are numbers, names alone count."""
    train = open_images(str(folders(tmp_path / "words", "n01", "n02", "n10")), "train", 1,
                        whole=True)
    numbered = folders(tmp_path / "numbered", "0", "2")
    assert labelled.open_test(str(numbered), train, 1).labels.tolist() == [0, 2]
    train = open_images(str(folders(tmp_path / "digits", "3", "5", "7")), "train", 1, whole=True)
    with pytest.raises(RunError, match="does not have: 0 2"):
        labelled.open_test(str(numbered), train, 1)


# ----------------------------------------------------------------------------------- attentive head


def test_the_attentive_head_is_the_one_written_in_loops():
    torch.manual_seed(0)
    head = eval_linear.AttentiveHead(6, 2, 3).double()
    tokens = torch.randn(4, 5, 6, dtype=torch.float64) * 3 + 1
    matrices = [layer.weight for layer in (head.key, head.value, head.linear)]
    assert sum(p.numel() for p in head.parameters()) == 6 + sum(m.numel() for m in matrices)
    key, value, linear = (matrix.detach().numpy() for matrix in matrices)
    rows = tokens.reshape(20, 6).numpy()
    normed = ((tokens.numpy() - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-6))
    query = head.query.detach().numpy().ravel()
    wanted = np.zeros((4, 3))
    for n in range(4):
        pooled = []
        for part in (slice(0, 3), slice(3, 6)):  # the heads
            scores = [query[part] @ (key @ token)[part] / math.sqrt(3) for token in normed[n]]
            shares = np.exp(scores) / np.exp(scores).sum()
            pooled += list(sum(s * (value @ t)[part]
                               for s, t in zip(shares, normed[n], strict=True)))
        wanted[n] = linear @ np.array(pooled)
    np.testing.assert_allclose(head(tokens).detach().numpy(), wanted, atol=1e-12)
    assert head.query.std() < 0.04


def test_tokens_with_and_without_the_class_token():
    images = torch.randn(2, 3, 16, 16)
    for backbone, length in ((tiny("vit_micro"), 17), (tiny("vit_micro", class_token=False), 16)):
        found = eval_linear.probed_tokens(backbone, images, ["patches", "tokens"])
        assert [rows.shape[1] for rows in found.values()] == [16, length]
        torch.testing.assert_close(found["patches"].mean(1),
                                   features.layers(backbone, images, ["patches"])["patches"])


def test_its_protocol_is_the_documented_one():
    aim = eval_linear.ATTENTIVE["aim"]
    assert (aim["lr"] * 1024 / 256, aim["weight_decay"], aim["batch_size"], aim["epochs"]) == (
        0.001, 0.1, 1024, 100)
    rates = eval_linear.learning_rates(aim, 1.0, 100, 2)
    assert rates[0] == 1 and rates[100] == pytest.approx(0.5) and rates[-1] < 1e-3
    heads = nn.ModuleDict({"patches": eval_linear.AttentiveHead(4, 2, 3)})
    optimizer = eval_linear.build_optimizer(heads, "adamw", 0.1, aim["weight_decay"])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [(0.1, 4)]


PROBE = ["--probe", "attentive", "--workers", 0, "--limit", 64, "--epochs", 2,
         "--train-batch-size", 16]


def heads_in(folder):
    return torch.load(next(folder.iterdir()) / "heads.pth", weights_only=True)


def test_it_is_the_same_on_any_number_of_processes(vit, shifted, pool, tmp_path):
    flags = list(map(str, ["--checkpoint", vit, *VIT, *PROBE, "--layers", "patches", "tokens",
                           "--also-test", shifted, "--output"]))
    line = evaluate(*flags, tmp_path / "one")
    first, other = pool.run(2, evaluate, *flags, str(tmp_path / "two"))
    assert (line["probe"], line["protocol"], other) == ("attentive", "aim", None)
    one, two = heads_in(tmp_path / "one"), heads_in(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 14
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)
    for a, b in zip(line["results"], first["results"], strict=True):
        assert abs(a["top1"] - b["top1"]) <= 1 / 64 + 1e-9
    # And a finished probe is only tested, in batches of any size.
    assert evaluate(*flags, tmp_path / "one", "--batch-size", 7)["results"] == line["results"]


def test_stopped_it_ends_with_the_same_heads(vit, tmp_path, monkeypatch):
    flags = ["--checkpoint", vit, *VIT, *PROBE, "--output"]
    whole = evaluate(*flags, tmp_path / "whole")
    agree, steps = checkpoint.Run.agree, []

    def stop_at_three(self, epoch_ends):
        steps.append(1)
        self.stop_requested = len(steps) == 3
        return agree(self, epoch_ends)

    monkeypatch.setattr(checkpoint.Run, "agree", stop_at_three)
    eval_linear.main(eval_linear.parse_args([str(f) for f in (*flags, tmp_path / "cut")]))
    monkeypatch.undo()
    assert len(steps) == 3 and evaluate(*flags, tmp_path / "cut") == whole
    one, two = heads_in(tmp_path / "whole"), heads_in(tmp_path / "cut")
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_killed_it_ends_with_the_same_heads(vit, tmp_path):
    flags = ["--checkpoint", vit, *VIT, *PROBE[:2], "--limit", 128, "--epochs", 30,
             "--train-batch-size", 16, "--log-every", 1, "--save-every-minutes", 0.0005,
             "--output"]
    status, whole = drill.run("eval_linear.py", *flags, tmp_path / "whole")
    assert status == 0, whole
    process = drill.start("eval_linear.py", *flags, tmp_path / "cut")
    drill.wait_for(lambda: max((len(drill.log_of(p)) for p in (tmp_path / "cut").glob("aim-*")),
                               default=0) >= 20, process)
    drill.kill(process)
    status, printed = drill.run("eval_linear.py", *flags, tmp_path / "cut")
    assert status == 0 and "resuming" in printed, printed
    assert printed.splitlines()[-1] == whole.splitlines()[-1]
    one, two = heads_in(tmp_path / "whole"), heads_in(tmp_path / "cut")
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("checkpoints, said", [
    (["random", "--arch", "resnet_tiny"], "random .resnet_tiny.: --probe attentive looks at the"),
    (["random", "pixels", *VIT], "^pixels: .*and this is pixels"),
])
def test_what_has_no_patches_is_refused_before_anything_is_trained(checkpoints, said, tmp_path):
    with pytest.raises(RunError, match=said) as error:
        evaluate("--checkpoint", *checkpoints, *PROBE, "--output", tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, named", [
    (["--probe", "attentive", "--protocol", "mae"], "--protocol mae does not go with --probe att"),
    (["--protocol", "aim"], "--protocol aim does not go with --probe linear"),
    (["--probe", "attentive", "--layers", "cls"], "--layers cls: an attentive probe has patches"),
    (["--probe", "attentive", "--folds", "3"], "--folds does not go with --protocol aim"),
    (["--amp", "bf17"], "bf17"),
])
def test_a_bad_argument_is_one_line_with_its_value(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        eval_linear.parse_args(["--checkpoint", "random", *flags])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and named in printed and printed.count("\n") == 1


@pytest.mark.parametrize("flag, value", [("--also-test", "a"), ("--amp", "bf16")])
def test_feature_files_have_neither_backbone_nor_images(flag, value, capsys):
    with pytest.raises(SystemExit):
        eval_linear.parse_args(["--features", "x.npz", flag, value])
    printed = capsys.readouterr().err
    assert flag in printed and "does not go with --features" in printed


# ---------------------------------------------------------------------------------------- precision


def test_the_precision_is_of_the_backbone_alone_and_told(vit, tmp_path):
    files = {}
    for amp in ("none", "bf16", "tf32"):
        files[amp] = tmp_path / f"{amp}.npz"
        evaluate("--checkpoint", vit, *VIT, "--limit", 40, *FEW, "--amp", amp, "--save-features",
                 files[amp])
    read = {amp: features.read(str(path)) for amp, path in files.items()}
    rows = {amp: found.train.layers["cls"] for amp, found in read.items()}
    assert torch.equal(rows["tf32"], rows["none"])  # on the CPU nothing is done
    difference = (rows["bf16"] - rows["none"]).abs().max()
    assert 1e-4 < difference < 0.1 and rows["bf16"].dtype == torch.float32
    assert read["bf16"].protocol == read["none"].protocol + ", features in bf16"


def test_heads_of_another_precision_are_not_taken_for_those_of_this_one(
        vit, tmp_path, monkeypatch):
    flags, asked = ["--checkpoint", vit, *VIT, *PROBE, "--output", tmp_path], []
    head = eval_linear.AttentiveHead
    monkeypatch.setattr(eval_linear, "AttentiveHead",
                        lambda *sizes: asked.append(sizes) or head(*sizes))
    evaluate(*flags)
    assert asked == [(96, VIT_SIZES["vit_micro"][2], 10)]  # as many heads as the backbone's
    with pytest.raises(RunError, match="--amp.*--no-resume"):
        evaluate(*flags, "--amp", "bf16")


def test_tf32_ends_with_the_backbone():
    class Card:
        type = "cuda"

    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), features.precision("tf32", Card()):
        assert torch.get_float32_matmul_precision() == "high"
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == before
