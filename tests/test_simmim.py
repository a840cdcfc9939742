import json
import math
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

import eval_knn
import finetune
import simmim
import visualize
from common import features, weights
from common.distributed import RunError
from helpers import TINY, check_joined, lines, own_gradients, own_rows, state_of, train

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_official_configuration_of_vit_b():
    args = simmim.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.patch_size, args.image_size) == ("vit_base", 16, 224)
    assert (args.mask_ratio, args.cell_size, args.crop_scale) == (0.6, 32, [0.67, 1.0])
    assert (args.layer_scale, args.drop_path, args.clip) == (0.1, 0.1, 5)
    assert args.relative_positions
    assert (args.batch_size, args.epochs, args.warmup_epochs) == (2048, 800, 10)
    assert (args.drop_epoch, args.weight_decay) == (700, 0.05)
    rates = [rate * 512 / 256 for rate in (args.start_lr, args.lr)]  # the authors' unit
    assert rates == pytest.approx([5e-7, 1e-4])


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--image-size", "18"], "--image-size 18 is not a multiple of --cell-size 4"),
        (["--cell-size", "6", "--image-size", "24"], "that of --patch-size 4"),
        (["--mask-ratio", "1"], "hides 16 of 16 cells"),
        (["--mask-ratio", "0"], "hides 0 of 16 cells"),
        (["--mask-ratio", "0.95"], "hides 16 of 16 cells"),
        (["--drop-epoch", "100"], "--drop-epoch 100 is not among --epochs 80"),
        (["--drop-epoch", "9", "--final-lr", "0.1"], "--final-lr 0.1 is of the cosine"),
        (["--clip", "0"], "'0'"),
        (["--arch", "resnet18"], "resnet18"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        simmim.parse_args(["--cell-size", "4", *flags])
    assert named in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- model


def model(image_size=16, in_chans=3, **parts):
    backbone = simmim.backbones.build_backbone(
        "vit_micro", in_chans=in_chans, image_size=image_size, patch_size=4, positions="learned",
        drop_path=0.0, **parts)
    return simmim.SimMIM(backbone, in_chans)


@pytest.mark.parametrize("relative", [False, True])
def test_start_values_are_cut_at_one_deviation_and_smaller_in_later_blocks(relative):
    net = model(layer_scale=0.1, relative_positions=relative)
    for name, value in net.backbone.named_parameters():
        if name.endswith("gamma"):
            assert (value == 0.1).all()
        elif name.endswith("table"):
            assert (value == 0).all()
        elif "norm" not in name and not name.endswith("bias"):
            last = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            bound = 0.02 / math.sqrt(2 * (int(name.split(".")[1]) + 1) if last else 1)
            assert bound * 0.9 < value.abs().max() <= bound * 1.0001, name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
    assert 0.01 < net.mask_token.abs().max() <= 0.02


def test_hidden_patches_do_not_reach_the_prediction_and_visible_ones_do():
    net, images = model(), torch.rand(4, 3, 16, 16)
    mask = simmim.cell_mask(torch.rand(4, 2, 2), 0.5, 2)
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    with torch.no_grad():
        found = net(images, mask)
        assert found.shape == images.shape
        assert torch.equal(net(torch.where(pixels == 1, torch.rand(1), images), mask), found)
        assert not torch.equal(net(images + 0.1 * (1 - pixels), mask), found)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_forward_is_that_of_loops(channels):
    torch.set_default_dtype(torch.float64)
    net, images = model((8, 12), channels, layer_scale=0.5), torch.rand(2, channels, 8, 12)
    mask = torch.tensor([[[1.0, 0, 0], [1, 1, 0]], [[0, 0, 1], [0, 1, 0]]])
    with torch.no_grad():
        found, vit = net(images, mask), net.backbone
        weight, bias = net.predict.weight[:, :, 0, 0], net.predict.bias
        for n in range(2):
            rows = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
            for place in range(6):
                row, column = divmod(place, 3)
                patch = images[n, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                embedded = (vit.patch_embed.proj.weight * patch).sum((1, 2, 3))
                embedded = embedded + vit.patch_embed.proj.bias
                if mask[n, row, column]:
                    embedded = net.mask_token[0, 0]
                rows.append(embedded + vit.pos_embed[0, 1 + place])
            x = torch.stack(rows)[None]
            for block in vit.blocks:
                x = block(x)
            x = vit.norm(x)[0, 1:]
            for place in range(6):
                row, column = divmod(place, 3)
                for c in range(channels):
                    for i in range(4):
                        for j in range(4):
                            output = (c * 4 + i) * 4 + j
                            value = weight[output] @ x[place] + bias[output]
                            assert torch.isclose(value, found[n, c, 4 * row + i, 4 * column + j])


@pytest.mark.parametrize(
    "cells, ratio, hidden", [((6, 6), 0.6, 22), ((7, 7), 0.6, 30), ((2, 2), 0.6, 3),
                             ((5, 5), 0.6, 15), ((2, 3), 0.5, 3), ((4, 4), 0.01, 1)],
)
def test_the_cells_with_the_smallest_noise_are_hidden_whole(cells, ratio, hidden):
    noise = torch.rand(3, *cells)
    mask = simmim.cell_mask(noise, ratio, 2)
    assert mask.shape == (3, 2 * cells[0], 2 * cells[1]) and mask.dtype == noise.dtype
    for n in range(3):
        order = sorted(range(cells[0] * cells[1]), key=noise[n].flatten().tolist().__getitem__)
        for rank, cell in enumerate(order):
            row, column = divmod(cell, cells[1])
            square = mask[n, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert (square == float(rank < hidden)).all()


def test_of_equal_noise_the_first_cells_are_hidden():
    mask = simmim.cell_mask(torch.zeros(1, 20, 10), 0.5, 1)
    assert (mask[0, :10] == 1).all() and (mask[0, 10:] == 0).all()


def test_noise_belongs_to_an_image_of_an_epoch():
    index, key = torch.tensor([7, 3, 1000]), dict(cells=4, seed=0, steps_per_epoch=5)
    noise = simmim.mask_noise(index, 12, **key)
    assert noise.shape == (3, 4, 4) and noise.min() >= 0 and noise.max() <= 1
    assert torch.equal(simmim.mask_noise(index.flip(0), 10, **key), noise.flip(0))
    for other in (simmim.mask_noise(index, 12, **key | dict(seed=1)),
                  simmim.mask_noise(index, 9, **key), noise.roll(1, 0)):
        assert (other != noise).all()


# -------------------------------------------------------------------------------- loss and schedule


def tensors(n=4, channels=3, grid=(2, 3), patch=2):
    rng = np.random.default_rng(1)
    shape = n, channels, grid[0] * patch, grid[1] * patch
    mask = np.stack([rng.permutation(6) < 3 for _ in range(n)]).astype(float)
    return rng.normal(size=shape), rng.normal(size=shape), mask.reshape(n, *grid)


def loops(pred, images, mask):
    n, channels, height, width = images.shape
    patch, total, hidden = height // mask.shape[1], 0.0, 0
    for i in range(n):
        for y in range(height):
            for x in range(width):
                if mask[i, y // patch, x // patch]:
                    hidden += 1
                    for c in range(channels):
                        total += abs(pred[i, c, y, x] - images[i, c, y, x])
    return total / (hidden + 1e-5) / channels


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_that_of_loops(channels):
    given = tensors(channels=channels)
    loss = simmim.masked_l1(*map(torch.from_numpy, given))
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(loops(*given), rel=1e-12)


def test_visible_pixels_do_not_count():
    pred, images, mask = map(torch.from_numpy, tensors())
    pred.requires_grad_()
    simmim.masked_l1(pred, images, mask).backward()
    pixels = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand_as(pred)
    torch.testing.assert_close(pred.grad, (pred - images).detach().sign() * pixels
                               / (pixels[:, 0].sum() + 1e-5) / 3)
    assert simmim.masked_l1(pred, images, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_computes_in_float32_at_least(dtype):
    pred, images, mask = map(torch.from_numpy, tensors())
    loss = simmim.masked_l1(pred.to(dtype), images.to(dtype), mask.to(dtype))
    wanted = loops(*(x.double().numpy() for x in (pred.to(dtype), images.to(dtype), mask)))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted, rel=1e-5)


def own_gradient(pred, images, mask):
    others = own_rows(images), own_rows(mask)
    return own_gradients(lambda x: simmim.masked_l1(x, *others), pred)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    # Up to the 1e-5 beside each process's hidden pixels, which are many here.
    check_joined(pool, size, own_gradient, *tensors(n=8, channels=1, patch=64))


def test_rates_are_one_step_late_and_the_cosine_counts_the_warm_up():
    rates = simmim.learning_rates(0.1, 1.0, 0.01, 4, 0, 12)
    after = [0.01 + 0.495 * (1 + math.cos(math.pi * t / 12)) for t in range(4, 11)]
    assert rates == pytest.approx([0.1, 0.1, 0.325, 0.55, 0.775, *after])
    rates = simmim.learning_rates(0.1, 1.0, 0.01, 2, 5, 8)
    assert rates == pytest.approx([0.1, 0.1, 0.55, 1, 1, 1, 0.1, 0.1])


# --------------------------------------------------------------------------------------------- main


def traced(folder, *flags):
    """Losses of four steps in float64, and the weights at the end."""
    losses = train(simmim, folder, "--limit", 64, *flags)
    weights = torch.load(folder / "backbone.pth", weights_only=True)
    return losses, {k: v.numpy() for k, v in weights.items()}


def test_processes_change_nothing(pool, tmp_path):
    losses, weights = pool.run(1, traced, tmp_path / "1")[0]
    for size in (2, 4):
        others = pool.run(size, traced, tmp_path / str(size))
        np.testing.assert_allclose(others[0][0], losses, rtol=1e-6)
        for name, weight in weights.items():
            np.testing.assert_allclose(others[0][1][name], weight, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("relative", [False, True])
def test_weight_decay_is_for_matrices_and_the_mask_token(relative, tmp_path):
    made, step = [], torch.optim.AdamW.step

    def look(self, *args):
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
        made.append((self.param_groups, norm.item()))
        return step(self, *args)

    with mock.patch.object(torch.optim.AdamW, "step", look):
        positions = "--relative-positions" if relative else "--no-relative-positions"
        train(simmim, tmp_path, "--limit", 16, "--clip", 0.01, positions, dtype="float32")
    (decayed, others), norm = made[0]
    assert norm == pytest.approx(0.01, rel=1e-4)  # of all gradients together
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0)
    # Of each of the 4 blocks 4 matrices; patches, prediction; the mask token; relative positions.
    assert len(decayed["params"]) == 4 * 4 + 3 + relative
    assert all(p.ndim > 1 for p in decayed["params"])
    assert sum(p.ndim > 1 for p in others["params"]) == 2 - relative  # class token, positions


def test_relative_positions_travel_with_the_backbone(tmp_path, capsys):
    """Every evaluation builds the transformer from what the file says, for images of any size."""
    train(simmim, tmp_path / "run", "--relative-positions", "--lr", 1, dtype="float32")
    moved = str(shutil.copy(tmp_path / "run/backbone.pth", tmp_path / "moved.pth"))
    given, images = features.resolve_checkpoint(moved), torch.rand(4, 3, 16, 16)
    found = features.build(features.DIGITS | given.settings)
    weights.load_backbone(found, moved)
    trained = model(relative_positions=True, layer_scale=0.1)
    trained.load_state_dict(state_of(tmp_path / "run")["model"])
    with torch.no_grad():
        wanted = trained.backbone.eval().tokens(images)[0]
        assert torch.equal(found.eval().tokens(images)[0], wanted)
        found.shared_rel_pos.relative_position_bias_table.zero_()
        assert (found.tokens(images)[0] - wanted).abs().max() > 1e-4
    printed = []
    for source in (str(tmp_path / "run"), moved):
        for flags in ([], ["--image-size", "32"]):
            eval_knn.main(eval_knn.parse_args([
                "--checkpoint", source, "--layers", "patches", "--limit", "64", *flags]))
            printed.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [line["top1"] for line in printed[:2]] == [line["top1"] for line in printed[2:]]
    visualize.main(visualize.parse_args([
        "attention", "--checkpoint", moved, "--image", str(tmp_path / "out.png")]))
    finetune.main(finetune.parse_args([
        "--checkpoint", moved, "--protocol", "mae", *TINY[2:], "--output", str(tmp_path / "fine")]))
    tuned = torch.load(tmp_path / "fine/backbone.pth", weights_only=True)
    assert tuned._metadata["settings"]["relative_positions"] is True
    assert tuned.keys() == found.state_dict().keys()


def test_a_backbone_starts_from_one_of_its_own_positions(tmp_path):
    def start(name, flag, *more):
        train(simmim, tmp_path / name, flag, *more, "--freeze-backbone-epochs", 0, dtype="float32")

    kinds = {"relative": "--relative-positions", "learned": "--no-relative-positions"}
    for name, flag in kinds.items():
        train(simmim, tmp_path / name, flag, dtype="float32")
        start("again", flag, "--init", tmp_path / name)
        shutil.rmtree(tmp_path / "again")
    for name, flag in zip(kinds, reversed(kinds.values()), strict=True):
        with pytest.raises(RunError, match="does not fit: pos_embed is "):
            start("other", flag, "--init", tmp_path / name)
    with pytest.raises(RunError, match="table is .52, 3., not .228, 3.; .* --image-size"):
        start("large", kinds["relative"], "--image-size", 32, "--init", tmp_path / "relative")


def test_the_log_says_what_predicting_the_mean_scores(tmp_path):
    train(simmim, tmp_path, "--limit", 64, "--batch-size", 64, dtype="float32")
    (line,) = lines(tmp_path)
    assert 0.2 < line["mean_loss"] < line["loss"]


def test_a_picture_shows_what_the_first_epoch_hides():
    args, index = simmim.parse_args(["--mask-ratio", "0.3"]), torch.tensor([4, 9])
    ((view, visible),) = simmim.visible_patches(args, index)
    assert view == 0 and visible.shape == (2, 4, 4) and visible.dtype == torch.bool
    assert ((~visible).sum((1, 2)) == 5).all()  # of 16
