import hashlib
import itertools
import math
import time

import numpy as np
import pytest
import torch
from torch import nn

import helpers
import pretext
from common import augment, backbones, distributed as comm, rng
from common.images import open_images
from common.loader import Loader
from helpers import check_joined, lines, own_gradients, own_rows, parsed
from test_all_scripts import watched_run

TASKS = ("rotation", "jigsaw", "location")

# --------------------------------------------------------------------------------------- parse_args


def settings(task, recipe="imagenet"):
    args = pretext.parse_args(["--task", task, "--recipe", recipe])
    return lambda *names: tuple(getattr(args, name) for name in names)


def drops(task, recipe="imagenet"):
    shares, epochs = settings(task, recipe)("lr_drops", "epochs")
    return [round(share * epochs) for share in shares], epochs


def test_the_recipes_of_rotation_are_those_of_the_official_codes():
    of = settings("rotation")  # VISSL
    assert of("arch", "angles", "batch_size", "lr") == ("resnet50", "one", 256, 0.1)
    assert of("weight_decay", "decay_norms", "lr_factor", "sync_bn") == (1e-4, False, 0.1, False)
    assert drops("rotation") == ([30, 60, 90, 100], 105)
    of = settings("rotation", "imagenet_all")  # MMSelfSup: 8 GPUs of 16 images, each four times
    assert of("angles", "sync_bn") == ("all", True) and of("lr")[0] * 128 / 256 == 0.2
    assert of("batch_size") == (8 * 16,) and drops("rotation", "imagenet_all") == ([30, 50], 70)
    of = settings("rotation", "cifar10")  # RotNet
    assert of("angles", "nesterov", "weight_decay", "batch_size") == ("all", True, 5e-4, 128)
    assert of("resize", "crop_padding", "crop_scale", "lr_factor") == (32, 4, None, 0.2)
    assert of("lr")[0] * 128 / 256 == 0.1
    assert drops("rotation", "cifar10") == ([60, 120, 160], 200)


def test_the_recipes_of_patches_are_those_of_the_official_codes():
    of = settings("jigsaw")  # VISSL
    assert of("resize", "jigsaw_size", "jigsaw_patch_size") == (256, 255, 64)
    assert of("grayscale", "flip", "num_permutations") == (0.66, True, 2000)
    assert of("head_dim", "lr", "batch_size", "weight_decay") == (1000, 0.1, 256, 1e-4)
    assert of("warmup_epochs", "warmup_start", "decay_norms") == (5, 0.25, False)
    assert drops("jigsaw") == ([30, 60, 90, 100], 105)
    of = settings("location")  # MMSelfSup
    assert of("resize", "jigsaw_size", "jigsaw_patch_size") == (292, 255, 64)
    assert of("grayscale", "flip", "head_dim", "dropout") == (0.66, False, 4096, 0.5)
    assert of("batch_size", "warmup_epochs", "warmup_start") == (512, 5, 0.1)
    assert of("lr")[0] * 512 / 256 == 0.2 and drops("location") == ([30, 50], 70)
    assert of("weight_decay", "head_decay") == (1e-4, 5.0)


def test_each_task_has_its_recipes_and_its_folder():
    assert pretext.parse_args([]).task == "rotation"
    outputs = [pretext.parse_args(["--task", task]).output for task in TASKS]
    assert len(set(outputs)) == 3 and outputs[0] == "runs/pretext-digits-resnet_tiny"
    assert pretext.parse_args(["--task", "jigsaw", "--output", "here"]).output == "here"
    for task, recipes in pretext.TASKS.items():
        for recipe in recipes:
            pretext.parse_args(["--task", task, "--recipe", recipe])


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--task", "colour"], "colour"),
        (["--jigsaw-patch-size", "6"], "--jigsaw-patch-size 6 is not a flag of --task rotation"),
        (["--task", "jigsaw", "--angles", "one"], "--angles one is not a flag"),
        (["--task", "location", "--num-permutations", "9"], "--num-permutations 9 is not a flag"),
        (["--task", "location", "--dropout", "1"], "--dropout 1 leaves nothing"),
        (["--task", "jigsaw", "--recipe", "imagenet_all"], "imagenet_all"),
        (["--task", "jigsaw", "--jigsaw-size", "26", "--jigsaw-patch-size", "9"], "cells of 8 px"),
        (["--task", "jigsaw", "--num-permutations", "362881"], "362880 orders"),
        (["--recipe", "cifar10", "--crop-scale", "0.2", "1"], "--resize 32 and --crop-scale"),
        (["--recipe", "imagenet", "--crop-padding", "4"], "--crop-padding 4 needs --resize"),
        (["--recipe", "cifar10", "--image-size", "64"], "--resize 32 is too small for crops of 64"),
        (["--flip"], "not for --views digits"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        pretext.parse_args(flags)
    assert named in capsys.readouterr().err


# -------------------------------------------------------------------------------- views and puzzles


def test_the_views_of_photographs():
    (view,) = pretext.build_views(pretext.parse_args(["--recipe", "imagenet"]))
    assert view.size == (224, 224) and [type(s) for s in view.geometry] == [
        augment.RandomResizedCrop, augment.HorizontalFlip]
    (view,) = pretext.build_views(pretext.parse_args(["--recipe", "imagenet", "--task", "jigsaw"]))
    assert view.size == (255, 255) and type(view.geometry[0]) is augment.RandomCrop
    assert view.colour[0].p == 0.66 and view.geometry[1].p == 0.5
    assert len(view.colour) == 2  # gray and the mean


def numbered(n=3, channels=2, side=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, channels, side, side))


def quarter_turn(image):
    """(C, S, S), one pixel at a time: the right-hand side goes to the top."""
    side, turned = image.shape[1], np.empty_like(image)
    for row in range(side):
        for column in range(side):
            turned[:, row, column] = image[:, column, side - 1 - row]
    return turned


def test_rotations_are_quarter_turns_counter_clockwise():
    images = numbered()
    turned, labels = pretext.rotations(torch.from_numpy(images))
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 1, 2, 3] * 3
    expected = []
    for image in images:
        for _ in range(4):
            expected.append(image)
            image = quarter_turn(image)
    assert np.array_equal(turned, expected)
    small, _ = pretext.rotations(torch.tensor([[[[1, 2], [3, 4]]]]))
    assert small[1].tolist() == [[[2, 4], [1, 3]]]


@pytest.mark.parametrize("angles", ["one", "all"])
def test_one_angle_or_all_four_of_each_image(angles):
    images, drawn = torch.from_numpy(numbered()), torch.tensor([[2, 0], [0, 0], [3, 0]])
    made, answers = pretext.rotation_puzzles(images, drawn, angles)
    every, labels = pretext.rotations(images)
    if angles == "one":
        rows = [2, 4, 11]
        every, labels = every[rows], labels[rows]
    assert torch.equal(made, every) and torch.equal(answers, labels)


def test_turning_after_a_crop_is_turning_before_it():
    """The law of a crop: that of the turned image is the turned one of the image."""
    crop = augment.RandomResizedCrop((0.1, 1), ratio=(3 / 4, 4 / 3), interpolation="bilinear")
    u = np.random.default_rng(0).random((20_000, crop.num_uniforms))
    left, top, width, height = crop.draw(u, np.full((20_000, 2), [60, 90])).T
    turned = top, 90 - left - width, height, width  # of the image turned counter-clockwise
    again = crop.draw(u[::-1], np.full((20_000, 2), [90, 60])).T
    for one, other in zip(turned, again, strict=True):
        assert abs(one.mean() - other.mean()) < 5 * one.std() / 100
        assert one.std() == pytest.approx(other.std(), rel=0.03)


def patches_by_loops(images, places, side):
    cell, found = images.shape[2] // 3, []
    for image, own in zip(images, places, strict=True):
        for number, (row, column) in enumerate(own):
            top, left = number // 3 * cell + row, number % 3 * cell + column
            found.append(image[:, top : top + side, left : left + side])
    return np.array(found).reshape(len(images), 9, -1, side, side)


@pytest.mark.parametrize("size, side", [(255, 64), (24, 7), (26, 8)])
def test_nine_patches_each_from_inside_its_own_cell(size, side):
    images, choices = numbered(4, side=size), size // 3 - side + 1
    places = np.random.default_rng(1).integers(choices, size=(4, 9, 2))
    places[0], places[1] = 0, choices - 1
    cut = pretext.cut_patches(*map(torch.from_numpy, (images, places)), side)
    assert cut.shape == (4, 9, 2, side, side)
    assert np.array_equal(cut, patches_by_loops(images, places, side))


def test_a_jigsaw_has_its_patches_in_the_order_of_the_answer():
    images = numbered(3, side=24)
    permutations = np.array([np.arange(9)[::-1], np.roll(range(9), 1)])
    drawn = np.random.default_rng(2).integers(2, size=(3, 19))
    drawn[:, 0] = [1, 0, 1]
    made, answers = pretext.jigsaw_puzzles(
        *map(torch.from_numpy, (images, drawn)), 7, torch.from_numpy(permutations))
    assert made.shape == (27, 2, 7, 7) and answers.tolist() == [1, 0, 1]
    patches = patches_by_loops(images, drawn[:, 1:].reshape(3, 9, 2), 7)
    for number, answer in enumerate(answers.tolist()):
        for place in range(9):
            wanted = patches[number, permutations[answer][place]]
            assert np.array_equal(made[9 * number + place], wanted)


def test_a_location_is_which_of_the_eight_around_the_middle():
    images, drawn = numbered(2, side=24), np.zeros((2, 19), dtype=int)
    made, answers = pretext.location_puzzles(*map(torch.from_numpy, (images, drawn)), 8)
    assert np.array_equal(made, patches_by_loops(images, np.zeros((2, 9, 2), int), 8).reshape(
        18, 2, 8, 8))
    assert answers.tolist() == [*range(8), *range(8)]
    pairs = pretext.Pairs()(torch.arange(18)[:, None])  # row by row: the middle is number 4
    wanted = [[9 * n + 4, 9 * n + k] for n in range(2) for k in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert pairs.tolist() == wanted


def drawn_for(index, step=0, seed=3, answers=7, places=2):
    return pretext.draw_puzzles(torch.tensor(index), step, 10, seed, answers, places)


def test_what_is_drawn_hangs_on_seed_epoch_and_image_alone():
    found = drawn_for([5, 9, 2])
    assert found.shape == (3, 19) and found.dtype == torch.int64
    assert torch.equal(drawn_for([2, 5, 11], step=9)[:2], found[[2, 0]])
    for other in (drawn_for([5, 9, 2], step=10), drawn_for([5, 9, 2], seed=4)):
        assert not torch.equal(other, found)


def test_all_answers_and_places_are_alike():
    found = drawn_for(range(7000)).numpy()
    counts = np.bincount(found[:, 0], minlength=7)
    assert len(counts) == 7 and abs(counts - 1000).max() < 5 * math.sqrt(1000)
    assert set(found[:, 1:].flatten()) == {0, 1}
    assert abs(found[:, 1:].mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(7000)
    drawn_places = drawn_for(range(500), places=22)[:, 1:]
    assert (drawn_places.min(), drawn_places.max()) == (0, 21)


def loaded(size):
    """Views and what is drawn of the first batches of the digits."""
    args = pretext.parse_args(["--task", "jigsaw", "--in-chans", "1"])
    world = comm.World(comm.rank(), size, torch.device("cpu"))

    def draw(index, step):
        return pretext.draw_puzzles(index, step, 2, 0, 5, 2)

    loader = Loader(open_images("digits", "pretrain", 1, limit=16), pretext.build_views(args),
                    batch_size=8, epochs=1, seed=3, world=world, workers=0, draw=draw)
    permutations = torch.from_numpy(
        pretext.hamming_permutations(5, 9, "mean", np.random.default_rng(0)))
    made = (pretext.jigsaw_puzzles(batch.views[0], batch.drawn, 7, permutations)
            for batch in loader.epoch(0))
    return [[x.numpy() for x in pair] for pair in made]


def test_every_number_of_processes_gets_the_same_puzzles(pool):
    whole = loaded(1)
    assert whole[0][0].shape == (72, 1, 7, 7)
    parts = pool.run(2, loaded, 2)
    for step, pair in enumerate(whole):
        for number, array in enumerate(pair):
            joined = np.concatenate([part[step][number] for part in parts])
            np.testing.assert_allclose(joined, array, atol=1e-6)


# ------------------------------------------------------------------------------------- permutations


def chosen_by_loops(count, pieces, criterion, first):
    """Algorithm 1 of the jigsaw paper, with all distances computed anew each time."""
    pool = list(itertools.permutations(range(pieces)))
    chosen = [pool.pop(first)]
    while len(chosen) < count:
        best, at = -1, None
        for number, one in enumerate(pool):
            distances = [sum(a != b for a, b in zip(one, other, strict=True)) for other in chosen]
            value = sum(distances) if criterion == "mean" else min(distances)
            if value > best:
                best, at = value, number
        chosen.append(pool.pop(at))
    return chosen


@pytest.mark.parametrize("criterion", ["mean", "min"])
@pytest.mark.parametrize("count, pieces", [(1, 3), (6, 3), (24, 4), (17, 5)])
def test_the_permutations_are_those_of_the_greedy_rule(count, pieces, criterion):
    for seed in range(3):
        first = int(np.random.default_rng(seed).integers(math.factorial(pieces)))
        found = pretext.hamming_permutations(count, pieces, criterion, np.random.default_rng(seed))
        assert found.dtype == np.int64 and found.shape == (count, pieces)
        wanted = chosen_by_loops(count, pieces, criterion, first)
        assert list(map(tuple, found.tolist())) == wanted


@pytest.mark.parametrize("count, criterion", [(25, "mean"), (0, "mean"), (3, "median")])
def test_more_permutations_than_there_are_or_another_criterion(count, criterion):
    with pytest.raises(ValueError):
        pretext.hamming_permutations(count, 4, criterion, np.random.default_rng(0))


@pytest.mark.parametrize(
    "criterion, mean, least, digest",
    [("mean", 8.004, 2, "0bc233c818ee01d9"), ("min", 7.963, 4, "fd55d936d8c96684")],
)
def test_two_thousand_of_nine_are_made_in_seconds_and_the_same_everywhere(
        criterion, mean, least, digest):
    started = time.process_time()
    found = pretext.hamming_permutations(2000, 9, criterion, rng.philox(0, rng.PERMUTATIONS))
    assert time.process_time() - started < 20
    assert len(np.unique(found, axis=0)) == 2000
    apart = nn.functional.pdist(torch.from_numpy(found).float(), p=0)
    assert apart.mean().item() == pytest.approx(mean, abs=1e-3) and apart.min() == least
    assert hashlib.sha256(found.astype("<i8").tobytes()).hexdigest()[:16] == digest


# -------------------------------------------------------------------------------------------- model


def model(task, answers=5, dropout=0.0):
    backbone = backbones.build_backbone("resnet_tiny", stem="small", in_chans=1,
                                        zero_init_residual=False)
    head = pretext.build_head(task, backbone.num_features, 16, answers, dropout)
    return pretext.Pretext(backbone, head)


@pytest.mark.parametrize("task, rows, puzzles", [
    ("rotation", 8, 8), ("jigsaw", 18, 2), ("location", 18, 16)])
def test_the_heads_join_the_parts_of_a_puzzle(task, rows, puzzles):
    network = model(task).eval()
    parts = torch.rand(rows, 1, 7, 7)
    h, logits = network(parts)
    assert h.shape == (rows, 128) and logits.shape == (puzzles, 5)
    per_puzzle = logits.view(2, -1) if task != "rotation" else logits
    own = len(parts) // len(per_puzzle)
    alone = network(parts[own : 2 * own])[1].flatten()  # a puzzle by itself
    torch.testing.assert_close(per_puzzle[1], alone)


def test_the_jigsaw_head_tells_the_order():
    network = model("jigsaw").eval()
    parts = torch.rand(9, 1, 7, 7)
    assert not torch.allclose(network(parts)[1], network(parts.flip(0))[1])
    joined = torch.cat([network.head[:3](h[None])[0] for h in network.backbone(parts)])
    torch.testing.assert_close(network(parts)[1][0], network.head[5](joined))
    assert joined.shape == (9 * 16,)


def test_the_heads_have_the_papers_layers():
    sizes = {task: [tuple(p.shape) for p in model(task).head.parameters()] for task in TASKS}
    assert sizes == {
        "rotation": [(5, 128), (5,)],
        "jigsaw": [(16, 128), (16,), (16,), (5, 144), (5,)],
        "location": [(16, 256), (16,), (16,), (5, 16), (5,)],
    }
    assert any(isinstance(layer, nn.Dropout) and layer.p == 0.3
               for layer in model("location", dropout=0.3).head)


# --------------------------------------------------------------------------------------------- loss


def logits_and_answers(rows=12, answers=5):
    draws = np.random.default_rng(4)
    return draws.normal(size=(rows, answers)) * 3, draws.integers(answers, size=rows)


def test_the_loss_is_the_mean_cross_entropy():
    logits, answers = logits_and_answers()
    total = 0.0
    for row, answer in zip(logits, answers, strict=True):
        total -= math.log(math.exp(row[answer]) / sum(math.exp(x) for x in row))
    found = pretext.answer_loss(*map(torch.from_numpy, (logits, answers)))
    assert found.item() == pytest.approx(total / len(answers), rel=1e-12)
    half = pretext.answer_loss(torch.from_numpy(logits).bfloat16(), torch.from_numpy(answers))
    assert half.dtype == torch.float32
    chance = pretext.answer_loss(torch.zeros(4, 7), torch.tensor([0, 1, 2, 6]))
    assert chance.item() == pytest.approx(math.log(7))


def own_gradient(logits, answers):
    return own_gradients(lambda x: pretext.answer_loss(x, own_rows(answers)), logits)


@pytest.mark.parametrize("size", [2, 3])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *logits_and_answers())


def test_the_indicators_say_what_is_right_and_what_is_chance():
    logits = torch.eye(4)[[0, 1, 2, 2]]
    found = pretext.indicators(torch.rand(4, 8), logits, torch.tensor([0, 1, 3, 2]))
    assert (found["pretext_accuracy"], found["chance_accuracy"]) == (0.75, 0.25)


# --------------------------------------------------------------------------------------------- main


@pytest.mark.parametrize("task", ["jigsaw", "location"])
def test_two_steps_of_patches_move_every_trainable_parameter(pool, task, tmp_path):
    for size in (1, 2):
        flags = ("pretext", str(tmp_path / str(size)), "--task", task)
        for unmoved, _, losses in pool.run(size, watched_run, *flags):
            assert unmoved == [] and len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_patches_of_any_channel_count(channels, tmp_path):
    module, args = parsed("pretext", "--task", "location", "--in-chans", channels, "--output",
                          tmp_path, "--views", "photo", "--flip", "--grayscale", "0.5")
    module.main(args)
    assert len(lines(tmp_path)) == 2


def train(folder, *flags):
    """Train in float64; losses, and the backbone's first weights."""
    losses = helpers.train(pretext, folder, "--limit", 48, "--sync-bn", *flags)
    return losses, helpers.state_of(folder)["model"]["backbone.conv1.weight"].numpy()


@pytest.mark.parametrize("flags", [
    ("--angles", "one"), ("--task", "jigsaw"), ("--task", "location")], ids=" ".join)
def test_any_number_of_processes_computes_the_same(pool, flags, tmp_path):
    losses, weights = pool.run(1, train, str(tmp_path / "1"), *flags)[0]
    assert len(losses) == 3
    others, same = pool.run(4, train, str(tmp_path / "4"), *flags)[0]
    np.testing.assert_allclose(others, losses, rtol=1e-7)
    np.testing.assert_allclose(same, weights, atol=1e-7)


def test_a_run_with_dropout_is_repeated_exactly(tmp_path):
    flags = ("--task", "location", "--dropout", 0.5)
    runs = []
    for name in "ab":
        torch.manual_seed(ord(name))
        runs.append(helpers.train(pretext, tmp_path / name, *flags))
    assert runs[0] == runs[1]
    assert runs[0] != helpers.train(pretext, tmp_path / "c", *flags[:2])


def test_the_head_decays_by_a_multiple_of_its_own(tmp_path, monkeypatch):
    groups = []

    class Noted(torch.optim.SGD):
        def __init__(self, given, **options):
            groups.extend((len(g["params"]), g["weight_decay"]) for g in given)
            super().__init__(given, **options)

    monkeypatch.setattr(torch.optim, "SGD", Noted)
    module, args = parsed("pretext", "--task", "location", "--weight-decay", "0.01",
                          "--head-decay", "5", "--output", tmp_path)
    module.main(args)
    assert [decay for _, decay in groups] == [0.01, 0.0, 0.05, 0.0]
    assert [count for count, _ in groups[2:]] == [2, 3]
