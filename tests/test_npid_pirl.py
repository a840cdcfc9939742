import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import helpers
import npid_pirl
from common import augment, backbones, distributed as comm
from common.checkpoint import Run
from common.images import open_images
from common.loader import Loader
from helpers import check_joined, lines, own_gradients, own_rows, parsed
from test_all_scripts import watched_run

# --------------------------------------------------------------------------------------- parse_args


def settings(recipe, method="npid"):
    args = npid_pirl.parse_args(["--recipe", recipe, "--method", method])
    return lambda *names: tuple(getattr(args, name) for name in names)


def test_the_recipes_of_npid_are_those_of_paper_and_code():
    of = settings("imagenet")
    assert of("arch", "embedding_dim", "loss") == ("resnet50", 128, "nce")
    assert of("num_negatives", "temperature", "memory_momentum") == (4096, 0.07, 0.5)
    assert of("epochs", "batch_size", "lr", "weight_decay") == (200, 256, 0.03, 1e-4)
    assert of("schedule", "views", "crop_scale") == ("step", "npid", [0.2, 1.0])
    assert of("decay_norms", "sync_bn", "mlp_head", "flip") == (True, False, False, True)
    of = settings("imagenet_plus")
    assert of("num_negatives", "epochs", "batch_size", "lr") == (32000, 800, 1024, 0.03)
    assert of("schedule", "decay_norms", "crop_scale") == ("cosine", False, [0.08, 1.0])
    of = settings("cifar10")
    assert of("arch", "stem", "num_negatives", "temperature") == ("resnet18", "small", 0, 0.1)
    assert of("batch_size", "weight_decay", "flip") == (128, 5e-4, False)
    assert of("lr")[0] * 128 / 256 == 0.03


def test_the_recipes_of_pirl_are_those_of_paper_and_code():
    of = settings("imagenet", "pirl")
    assert of("jigsaw_size", "jigsaw_patch_size") == (255, 64)
    assert of("crop_scale", "jigsaw_crop_scale") == ([0.08, 1.0], [0.6, 1.0])
    assert of("num_negatives", "temperature", "loss", "epochs") == (32000, 0.07, "nce", 800)
    assert of("batch_size", "lr", "decay_norms", "schedule") == (1024, 0.03, False, "cosine")
    assert of("mlp_head", "blur") == (False, False)
    of = settings("imagenet_plus", "pirl")
    assert of("mlp_head", "blur", "loss", "temperature") == (True, True, "cross_entropy", 0.1)
    assert npid_pirl.parse_args(["--method", "pirl", "--epochs", "7"]).epochs == 7


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--jigsaw-patch-size", "6"], "--jigsaw-patch-size 6 needs --method pirl"),
        (["--method", "pirl", "--jigsaw-patch-size", "9", "--jigsaw-size", "26"], "cells of 8 px"),
        (["--method", "moco"], "moco"),
        (["--num-negatives", "-1"], "'-1'"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        npid_pirl.parse_args(flags)
    assert named in capsys.readouterr().err


def test_the_cosine_ends_at_a_thousandth_as_in_vissl(tmp_path):
    flags = ["--limit", "16", "--batch-size", "16", "--epochs", "4", "--warmup-epochs", "0",
             "--workers", "0", "--log-every", "1", "--output", str(tmp_path)]
    npid_pirl.main(npid_pirl.parse_args(flags))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").open()]
    lr = 0.12 * 16 / 256
    wanted = [lr * (0.001 + 0.999 * (1 + math.cos(math.pi * epoch / 4)) / 2) for epoch in range(4)]
    assert rates == pytest.approx(wanted)


# -------------------------------------------------------------------------------------------- views


def jigsaw_view(size=255, side=64, flip=True, kind="pirl", channels=3):
    crop = augment.View(size, npid_pirl.crop_steps(kind, (0.6, 1), flip=False), channels)
    colour = [*npid_pirl.color_steps(kind, False), augment.Normalize([0.0], [1.0])]
    return npid_pirl.JigsawView(crop, augment.View(side, colour, channels), flip)


def uniforms(view, n=3, seed=0):
    return np.random.default_rng(seed).random((n, view.num_uniforms))


def coordinates(side):
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:side, :side].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, rows * 0], axis=2))


def test_the_colours_of_each_kind():
    def steps(kind, blur=False):
        return {type(s).__name__: s for s in npid_pirl.color_steps(kind, blur)}

    assert list(steps("npid")) == ["Grayscale", "ColorJitter", "GaussianBlur"]
    assert list(steps("pirl")) == ["ColorJitter", "Grayscale", "GaussianBlur"]
    assert "Grayscale" not in steps("npid_plus")
    for kind, blur, wanted in (
        ("npid", False, (0.4, 0.4, 0.4, 0.4, 1.0)), ("npid_plus", False, (0.4, 0.4, 0.4, 0.4, 1.0)),
        ("pirl", False, (0.4, 0.4, 0.4, 0.2, 1.0)), ("pirl", True, (0.8, 0.8, 0.8, 0.2, 0.8)),
    ):
        s = steps(kind, blur)["ColorJitter"]
        assert (s.brightness, s.contrast, s.saturation, s.hue, s.p) == wanted
        assert steps(kind, blur)["GaussianBlur"].p == (0.5 if blur else 0)


@pytest.mark.parametrize("size, side", [(255, 64), (48, 12), (24, 7), (26, 8)])
def test_nine_patches_each_from_inside_its_own_cell(size, side):
    view, cell = jigsaw_view(size, side, flip=False), size // 3
    view.whole.geometry = []  # the crop is the image itself
    image, offsets = coordinates(size), set()
    parameters, _ = view.draw(uniforms(view, n=40), np.full((40, 2), size))
    for places in parameters[-1]:
        patches = view.crop([image], [places]).reshape(3, 9, side, side)
        corners = patches[:2, :, 0, 0].astype(int)  # (left, top) of each patch
        for patch, (left, top) in zip(patches.transpose(1, 0, 2, 3), corners.T, strict=True):
            whole = np.asarray(image).transpose(2, 0, 1)
            assert np.array_equal(patch, whole[:, top : top + side, left : left + side])
        offsets |= set((corners % cell).flatten().tolist())
        cells = {(left // cell, top // cell) for left, top in corners.T.tolist()}
        assert cells == {(x, y) for x in range(3) for y in range(3)}
    assert offsets == set(range(cell - side + 1))  # all places


def test_the_order_of_the_patches_is_any_and_the_parameters_hang_on_the_numbers_alone():
    view = jigsaw_view()
    view.whole = augment.View(255, [], 3)
    view.num_uniforms -= 23
    orders = []
    for seed in (0, 0, 1):
        parameters, colour = view.draw(uniforms(view, 300, seed), np.full((300, 2), 255))
        corners = parameters[-1][:, :, :2] // 85
        orders.append((corners[..., 0] * 3 + corners[..., 1], colour))
    assert all(np.array_equal(a, b) for a, b in zip(orders[0], orders[1], strict=True))
    assert not np.array_equal(orders[0][0], orders[2][0])
    found = orders[0][0]
    assert len({tuple(order) for order in found}) > 295  # of 362,880
    for place in range(9):
        counts = np.bincount(found[:, place], minlength=9)  # 33 each, binomial
        assert counts.min() > 33 - 5 * 5.5 and counts.max() < 33 + 5 * 5.5


def test_half_of_the_patches_are_mirrored_each_on_its_own():
    view = jigsaw_view(24, 7)
    parameters, _ = view.draw(uniforms(view, 200), np.full((200, 2), 24))
    flips = parameters[-1][:, :, 2]
    assert 0.45 < flips.mean() < 0.55 and len({tuple(row) for row in flips}) > 100
    image = coordinates(24)
    view.whole.geometry = []
    places = np.array([[8, 9, 1], *[[0, 0, 0]] * 8])
    mirrored = view.crop([image], [places])[:, :7]
    whole = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(mirrored, whole[:, 8:15, 9:16][:, :, ::-1])


def test_each_patch_has_its_own_colours():
    view = jigsaw_view(24, 8)
    _, colour = view.draw(uniforms(view, 2), np.full((2, 2), 30))
    own = colour.reshape(18, -1)
    assert len({tuple(row) for row in own}) == 18
    crops = torch.randint(0, 256, (2, 3, 72, 8), dtype=torch.uint8)
    given = torch.from_numpy(colour)
    patches = view.finish(crops, given, torch.device("cpu"))
    assert patches.shape == (18, 3, 8, 8)
    for image in range(2):
        for number in range(9):
            patch = crops[image, None, :, 8 * number : 8 * number + 8]
            parameters = torch.from_numpy(own[9 * image + number][None])
            alone = view.patch.finish(patch, parameters, torch.device("cpu"))
            torch.testing.assert_close(patches[9 * image + number], alone[0], atol=1e-6, rtol=0)


def loaded(size):
    views = npid_pirl.build_views(npid_pirl.parse_args(["--method", "pirl", "--in-chans", "1"]))
    images = open_images("digits", "pretrain", 1, limit=32)
    world = comm.World(comm.rank(), size, torch.device("cpu"))
    loader = Loader(images, views, batch_size=8, epochs=1, seed=3, world=world, workers=0)
    batches = list(loader.epoch(0))
    return [[view.numpy() for view in batch.views] for batch in batches]


def test_every_number_of_processes_gets_the_same_jigsaws(pool):
    whole = loaded(1)
    assert whole[0][1].shape == (72, 1, 7, 7)
    parts = pool.run(2, loaded, 2)
    for step, views in enumerate(whole):
        for number, view in enumerate(views):
            joined = np.concatenate([part[step][number] for part in parts])
            np.testing.assert_allclose(joined, view, atol=1e-6)


# -------------------------------------------------------------------------------------------- model


def encoder(jigsaw, mlp_head=False):
    backbone = backbones.build_backbone("resnet_tiny", stem="small", in_chans=1,
                                        zero_init_residual=False)
    return npid_pirl.NPID(backbone, jigsaw, mlp_head, embedding_dim=8)


@pytest.mark.parametrize("mlp_head", [False, True])
def test_the_jigsaw_head_joins_the_nine_patches_of_an_image_in_order(mlp_head):
    model = encoder(True, mlp_head).eval()
    images, patches = torch.rand(4, 1, 16, 16), torch.rand(36, 1, 7, 7)
    z = model([images, patches])
    assert z.shape == (2, 4, 8)
    second = model.patch_head(model.backbone(patches[9:18])).flatten()
    torch.testing.assert_close(z[1, 1], model.jigsaw_head(second))
    torch.testing.assert_close(z[0], model.head(model.backbone(images)))
    assert encoder(False)([images]).shape == (1, 4, 8)


def test_the_heads_are_those_of_the_paper():
    model = encoder(True)
    assert [tuple(p.shape) for n, p in model.named_parameters() if "head" in n] == [
        (8, 128), (8,), (8, 128), (8,), (8, 72), (8,)]
    sizes = [tuple(p.shape) for n, p in encoder(True, True).named_parameters() if "head" in n]
    hidden = [(128, 128), (128,), (8, 128), (8,)]
    assert sizes == [*hidden, *hidden, (8, 72), (8,)]


# ---------------------------------------------------------------------------------- loss and memory


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tensors(n=8, d=5, rows=40, k=6, views=2):
    rng = np.random.default_rng(1)
    index = rng.permutation(rows)[:n]
    negatives = rng.integers(0, rows, (n, k))
    return unit(rng.normal(size=(views, n, d))), unit(rng.normal(size=(rows, d))), index, negatives


def logits_by_loops(z, memory, index, negatives, temperature):
    return np.array([
        [[row @ memory[i] / temperature for i in [own, *others]]
         for row, own, others in zip(view, index, negatives, strict=True)]
        for view in z
    ])


def z_by_loops(logits, num_images):
    values = [math.exp(logit) for row in logits for logit in row]
    return sum(values) / len(values) * num_images


def nce_by_loops(logits, num_images, z):
    """Section 3.2 of NPID, one number at a time."""
    noise, total = (len(logits[0]) - 1) / num_images, 0.0
    for row in logits:
        probability = [math.exp(logit) / z for logit in row]
        total -= math.log(probability[0] / (probability[0] + noise + 1e-7))
        for each in probability[1:]:
            total -= math.log(noise / (each + noise + 1e-7))
    return total / len(logits)


@pytest.mark.parametrize("padding", [0, 60_000])  # a bank whose rows are gathered
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_logits_equal_the_loops_for_small_and_large_banks(padding, temperature):
    z, memory, index, negatives = tensors()
    expected = logits_by_loops(z, memory, index, negatives, temperature)
    bank = torch.cat([torch.from_numpy(memory), torch.zeros(padding, 5, dtype=torch.float64)])
    z = torch.from_numpy(z).requires_grad_()
    found = npid_pirl.memory_logits(z, bank, torch.from_numpy(index), torch.from_numpy(negatives),
                                    temperature)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    rows = torch.from_numpy(memory)[torch.from_numpy(np.c_[index, negatives])]
    torch.testing.assert_close(z.grad, torch.einsum("vnk,nkd->vnd", weights, rows) / temperature)


def test_the_full_softmax_equals_the_loops():
    z, memory, index, _ = tensors()
    logits = npid_pirl.memory_logits(*map(torch.from_numpy, (z, memory, index)), None, 0.1)
    loss = nn.functional.cross_entropy(logits[0], torch.from_numpy(index))
    total = 0.0
    for row, own in zip(z[0], index, strict=True):
        scores = [math.exp(row @ other / 0.1) for other in memory]
        total -= math.log(scores[own] / sum(scores))
    assert loss.item() == pytest.approx(total / len(index), rel=1e-12)


@pytest.mark.parametrize("num_images, scale", [(40, 1.0), (1_281_167, 14.0)])
def test_nce_and_its_constant_equal_the_papers_loops(num_images, scale):
    logits = np.random.default_rng(2).normal(size=(5, 9)) * scale / 3
    z = npid_pirl.estimate_z(torch.from_numpy(logits), num_images)
    assert z.item() == pytest.approx(z_by_loops(logits, num_images), rel=1e-12)
    loss = npid_pirl.nce_loss(torch.from_numpy(logits), num_images, z)
    assert loss.item() == pytest.approx(nce_by_loops(logits, num_images, z.item()), rel=1e-12)
    single = npid_pirl.nce_loss(torch.from_numpy(logits).float(), num_images, z.float())
    assert single.dtype == torch.float32 and single.item() == pytest.approx(loss.item(), rel=1e-5)


def test_losses_of_rows_that_are_all_alike_are_chance():
    logits = torch.zeros(4, 7, dtype=torch.float64)
    found = npid_pirl.nce_loss(logits, 20, npid_pirl.estimate_z(logits, 20))
    assert found.item() == pytest.approx(npid_pirl.chance_loss("nce", 6, 20), rel=1e-5)
    assert npid_pirl.chance_loss("cross_entropy", 6, 20) == pytest.approx(math.log(7))
    assert npid_pirl.chance_loss("nce", 0, 20) == pytest.approx(math.log(20))


def test_the_gradient_of_nce_is_that_of_its_value_at_a_fixed_constant():
    z, memory, index, negatives = map(torch.from_numpy, tensors(n=3, k=4))
    z = (3 * z).requires_grad_()

    def loss(z):
        z = npid_pirl.unit_rows(z)
        logits = npid_pirl.memory_logits(z, memory, index, negatives, 0.5)
        return torch.stack([npid_pirl.nce_loss(each, len(memory), 60.0) for each in logits]).mean()

    assert torch.autograd.gradcheck(loss, (z,))


def test_no_gradient_reaches_the_bank():
    z, memory, index, negatives = map(torch.from_numpy, tensors())
    z, memory = z.requires_grad_(), memory.requires_grad_()
    npid_pirl.memory_logits(z, memory, index, negatives, 0.1).sum().backward()
    assert z.grad.abs().sum() > 0 and memory.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_at_least(dtype):
    z, memory, index, negatives = map(torch.from_numpy, tensors())
    z = npid_pirl.unit_rows(z.to(dtype))
    assert z.dtype == torch.float32
    logits = npid_pirl.memory_logits(z.to(dtype), memory.float(), index, negatives, 0.07)
    assert logits.dtype == npid_pirl.nce_loss(logits.to(dtype), 40, 100.0).dtype == torch.float32


def drawn(index, num_images, k, step):
    return npid_pirl.draw_negatives(own_rows(index), num_images, k, 7, step, comm.rank()).numpy()


def test_negatives_are_all_the_others_alike_and_hang_on_seed_and_step(pool):
    index = np.array([0, 3, 9, 5])
    found = drawn(index, 10, 9000, 4)
    for own, row in zip(index, found, strict=True):
        counts = np.bincount(row, minlength=10)
        assert counts[own] == 0
        others = np.delete(counts, own)
        assert abs(others - 1000).max() < 5 * math.sqrt(1000)
    assert not np.array_equal(found, drawn(index, 10, 9000, 5))
    assert not np.array_equal(found[0], found[1])
    for size in (2, 4):
        parts = pool.run(size, drawn, index, 10, 9000, 4)
        assert np.array_equal(np.concatenate(parts), found)


def own_gradient(z, memory, index, negatives, loss):
    others = None if loss == "full" else own_rows(negatives)
    memory, index = torch.from_numpy(memory), own_rows(index)
    target = index if others is None else torch.zeros_like(index)

    def mean_loss(z):
        logits = npid_pirl.memory_logits(z, memory, index, others, 0.1)
        constant = npid_pirl.estimate_z(logits[-1], len(memory))
        losses = [npid_pirl.nce_loss(each, len(memory), constant) if loss == "nce" else
                  nn.functional.cross_entropy(each, target) for each in logits]
        return torch.stack(losses).mean()

    return own_gradients(mean_loss, z, dim=1)


@pytest.mark.parametrize("loss", ["nce", "cross_entropy", "full"])
@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size, loss):
    check_joined(pool, size, own_gradient, *tensors(), loss, dim=1)


def updated(memory, index, embedding, momentum):
    bank = torch.from_numpy(memory.copy())
    npid_pirl.update_memory(bank, own_rows(index), own_rows(embedding), momentum)
    return bank.numpy()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_only_rows_whose_images_were_seen_move_and_the_last_of_two_counts(pool, size, momentum):
    (embedding, *_), memory, index, _ = tensors()
    index[6] = index[1]  # twice in the batch
    expected = memory.copy()
    for row in range(len(index)):
        moved = momentum * memory[index[row]] + (1 - momentum) * embedding[row]  # the old value
        expected[index[row]] = moved / math.sqrt((moved**2).sum())
    for bank in pool.run(size, updated, memory, index, embedding, momentum):
        np.testing.assert_allclose(bank, expected, rtol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, rtol=1e-12)
        unseen = np.setdiff1d(np.arange(len(memory)), index)
        assert np.array_equal(bank[unseen], memory[unseen])


# --------------------------------------------------------------------------------------------- main


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("extra", [[], ["--mlp-head", "--blur", "--loss", "nce"]])
def test_two_steps_of_pirl_move_every_trainable_parameter(pool, size, extra, tmp_path):
    flags = ("npid_pirl", str(tmp_path), "--method", "pirl", *extra)
    for unmoved, _, losses in pool.run(size, watched_run, *flags):
        assert unmoved == [] and len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.parametrize("channels", [1, 4, 10])
def test_pirl_trains_on_any_channel_count(channels, tmp_path):
    module, args = parsed("npid_pirl", "--method", "pirl", "--in-chans", channels,
                          "--views", "pirl", "--flip", "--output", tmp_path)
    module.main(args)
    assert len(lines(tmp_path)) == 2


def train(folder, *flags, stop_at=None):
    """Train in float64; losses, bank and Z. `stop_at` is the step of a stop signal."""
    agree = Run.agree
    if stop_at:
        left = iter(range(stop_at - 1, -1, -1))
        Run.agree = lambda self, epoch_ends: (next(left) == 0,) * 2
    try:
        losses = helpers.train(npid_pirl, folder, "--limit", 48, "--epochs", 2, "--sync-bn",
                               "--loss", "nce", "--num-negatives", 20, *flags)
    finally:
        Run.agree = agree
    saved = helpers.state_of(folder)
    return losses, saved["memory"].numpy(), saved["constant_z"].item()


def until(stop_at, folder, *flags):
    return train(folder, *flags, stop_at=stop_at)


@pytest.mark.parametrize("method", ["npid", "pirl"])
def test_any_number_of_processes_computes_the_same(pool, method, tmp_path):
    flags = ("--method", method)
    losses, memory, z = pool.run(1, train, str(tmp_path / "1"), *flags)[0]
    assert len(losses) == 6 and z > 0
    np.testing.assert_allclose(np.linalg.norm(memory, axis=1), 1, rtol=1e-12)
    for size in (2, 4):
        others, bank, constant = pool.run(size, train, str(tmp_path / str(size)), *flags)[0]
        np.testing.assert_allclose(others, losses, rtol=1e-7)
        np.testing.assert_allclose(bank, memory, atol=1e-7)
        assert constant == pytest.approx(z, rel=1e-9)


@pytest.mark.parametrize("size, later", [(1, 1), (2, 2), (2, 1)])
def test_bank_and_constant_resume_exactly(pool, size, later, tmp_path):
    whole = pool.run(size, train, str(tmp_path / "whole"), "--method", "pirl")[0]
    cut = str(tmp_path / "cut")
    before = pool.run(size, until, 2, cut, "--method", "pirl")[0]
    assert len(before[0]) == 2 and before[2] == whole[2]
    losses, memory, z = pool.run(later, train, cut, "--method", "pirl")[0]
    assert z == whole[2]  # not estimated again
    if size == later:
        assert losses == whole[0] and np.array_equal(memory, whole[1])
    np.testing.assert_allclose(losses, whole[0], rtol=1e-7)
    np.testing.assert_allclose(memory, whole[1], atol=1e-7)


def test_both_terms_see_the_bank_as_it_was_before_the_step(tmp_path, monkeypatch):
    """The order of a step: one read for both embeddings, Z from the jigsaws', then the update."""
    events = []

    def note(name):
        function = getattr(npid_pirl, name)

        def call(*arguments):
            result = function(*arguments)
            events.append((name, arguments, result))
            return result

        monkeypatch.setattr(npid_pirl, name, call)

    for name in ("memory_logits", "estimate_z", "nce_loss", "update_memory"):
        note(name)
    flags = ("--method", "pirl", "--loss", "nce", "--output", tmp_path)
    module, args = parsed("npid_pirl", *flags)
    module.main(args)
    names = [name for name, *_ in events]
    step = ["memory_logits", "nce_loss", "nce_loss", "update_memory"]
    assert names == [step[0], "estimate_z", *step[1:], *step]
    logits, used = events[0][2], events[1][1][0]
    assert logits.shape == (2, 16, 1 + args.num_negatives)
    assert torch.equal(used, logits[1])  # VISSL's first term is the jigsaw's
    losses = [result.item() for name, _, result in events[:4] if name == "nce_loss"]
    assert lines(tmp_path)[0]["loss"] == pytest.approx(np.mean(losses))  # weights .5 and .5
    assert torch.equal(events[4][1][2], events[0][1][0][0])  # the images' embeddings are stored
