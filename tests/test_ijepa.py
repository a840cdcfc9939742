import json
import math
from unittest import mock

import numpy as np
import pytest
import torch

import eval_knn
import ijepa
import mae
from common import features
from common.distributed import RunError
from helpers import EXTRA, check_joined, own_gradients, own_rows, parsed, state_of, train

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_official_configuration():
    args = ijepa.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.patch_size, args.image_size) == ("vit_huge", 14, 224)
    assert (args.num_targets, args.min_keep, args.crop_scale) == (4, 10, [0.3, 1.0])
    assert (args.predictor_dim, args.predictor_depth, args.class_token) == (384, 12, False)
    assert (args.batch_size, args.epochs, args.warmup_epochs, args.stretch) == (2048, 300, 40, 1)
    rates = [rate * 2048 / 256 for rate in (args.start_lr, args.lr, args.final_lr)]
    assert rates == pytest.approx([2e-4, 1e-3, 1e-6])
    assert (args.weight_decay, args.final_weight_decay, args.momentum) == (0.04, 0.4, 0.996)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--image-size", "17"], "--image-size 17 is not a multiple of --patch-size"),
        (["--recipe", "imagenet", "--patch-size", "56"], "4 x 4 patches, whose context block may "
         "have 9, not more than --min-keep 10"),
        (["--image-size", "4", "--patch-size", "4"], "1 x 1 patches, whose context block may have"),
        (["--predictor-dim", "50"], "--predictor-dim 50"),
        (["--arch", "vit_tiny", "--predictor-dim", "32"], "the 3 heads of vit_tiny"),
        (["--stretch", "0.5"], "--stretch 0.5 is less than 1"),
        (["--num-targets", "0"], "'0'"),
        (["--arch", "resnet18"], "resnet18"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        ijepa.parse_args(flags)
    assert named in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- views


def test_a_photo_is_cropped_and_no_more():
    (view,) = ijepa.build_views(ijepa.parse_args(["--recipe", "imagenet"]))
    assert [type(step).__name__ for step in view.geometry] == ["RandomResizedCrop"]
    assert [type(step).__name__ for step in view.colour] == ["Normalize"]


# -------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "r, rows, columns, target, context",
    [  # by hand: area, ratio, roots
        (0.0, 14, 14, (5, 6), (13, 13)),  # 29 patches of .75: 4.66 x 6.22; 166: 12.9
        (1.0, 14, 14, (8, 5), (13, 13)),  # 39 of 1.5: 7.6 x 5.1; 196: 14, cut to 13
        (0.5, 16, 16, (7, 6), (15, 15)),  # 44 of 1.125: 7.04 x 6.25; 236: 15.4
        (1.0, 8, 8, (4, 3), (7, 7)),  # 12 of 1.5: 4.2 x 2.8
        (0.0, 2, 40, (1, 4), (1, 8)),  # 12 of .75: 3 x 4; 68: 8.2
    ],
)
def test_one_number_decides_area_and_aspect_of_a_block(r, rows, columns, target, context):
    assert ijepa.block_sizes(r, r, rows, columns) == (target, context)


def places(indices, rows, columns, size):
    """Where a block lies; it must be one."""
    grid = np.zeros(rows * columns, dtype=bool)
    grid[indices] = True
    at, across = np.nonzero(grid.reshape(rows, columns))
    assert (np.diff(indices) > 0).all() and indices.dtype == np.int64
    assert (np.ptp(at) + 1, np.ptp(across) + 1) == size and len(indices) == math.prod(size)
    return at.min(), across.min()


@pytest.mark.parametrize("rows, columns", [(14, 14), (16, 16), (9, 12)])
def test_targets_lie_anywhere_but_at_the_far_ends_and_out_of_the_context(rows, columns):
    numbers, found = np.random.default_rng(0), []
    target, context = ijepa.block_sizes(0.4, 0.2, rows, columns)
    for _ in range(400):
        kept, targets = ijepa.sample_masks(numbers, rows, columns, (target, context))
        assert len(targets) == 4 and len(kept) > 10 and (np.diff(kept) > 0).all()
        overlapping = [k for k, block in enumerate(targets) if np.isin(kept, block).any()]
        assert overlapping == list(range(4 - len(overlapping), 4))  # the last are freed first
        found += [places(block, rows, columns, target) for block in targets]
    for side, length, at in zip(target, (rows, columns), zip(*found, strict=True), strict=True):
        counts = np.bincount(at)
        assert len(counts) == length - side  # from 0 to length - side - 1
        assert abs(counts / 1600 * len(counts) - 1).max() < 5 * math.sqrt(len(counts) / 1600)


def test_the_context_is_its_block_without_the_targets():
    sizes = (3, 4), (7, 8)
    for seed in range(50):
        kept, targets = ijepa.sample_masks(np.random.default_rng(seed), 9, 12, sizes)
        again = np.random.default_rng(seed)
        for block in targets:
            top, left = again.integers(9 - 3), again.integers(12 - 4)
            assert block[0] == top * 12 + left
        top, left = again.integers(9 - 7), again.integers(12 - 8)
        cells = [row * 12 + column for row in range(top, top + 7)
                 for column in range(left, left + 8)]
        wanted = [cell for cell in cells if not any(cell in block for block in targets)]
        assert len(wanted) > 10 and kept.tolist() == wanted


class Counted:
    """A generator that counts its draws of integers."""

    def __init__(self, seed):
        self.numbers, self.calls = np.random.default_rng(seed), 0

    def integers(self, *bounds):
        self.calls += 1
        return self.numbers.integers(*bounds)


def test_after_twenty_failures_the_last_target_is_freed():
    """A grid whose context is one block: only freeing targets can help, 20 tries each."""
    sizes = (3, 3), (4, 4)  # in 5 x 5: always the upper left 4 x 4
    seen = set()
    for seed in range(200):
        numbers = Counted(seed)
        kept, targets = ijepa.sample_masks(numbers, 5, 5, sizes, min_keep=5)
        tries = (numbers.calls - 8) // 2
        block = {row * 5 + column for row in range(4) for column in range(4)}
        left = [len(block.difference(*targets[:count])) for count in (4, 3, 2, 1, 0)]
        freed = next(k for k, count in enumerate(left) if count > 5)
        assert tries == 20 * freed + 1 and len(kept) == left[freed]
        seen.add(freed)
    assert len(seen) >= 3


def test_without_sizes_they_are_drawn_first_the_targets_then_the_contexts():
    numbers, again = np.random.default_rng(5), np.random.default_rng(5)
    kept, targets = ijepa.sample_masks(numbers, 14, 14)
    sizes = ijepa.block_sizes(again.random(), again.random(), 14, 14)
    other, others = ijepa.sample_masks(again, 14, 14, sizes)
    assert np.array_equal(kept, other)
    assert all(map(np.array_equal, targets, others))


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (1, 40), (2, 11)])
def test_a_grid_too_small_for_a_context_is_an_error(grid):
    with pytest.raises(ValueError, match=f"in {grid[0]} x {grid[1]} patches has no more than 10"):
        ijepa.sample_masks(np.random.default_rng(0), *grid)


DRAW = dict(seed=3, steps_per_epoch=5, rows=8, columns=8, num_targets=2, min_keep=4)


def test_masks_belong_to_an_image_of_an_epoch_and_sizes_to_a_step():
    index = torch.tensor([7, 3, 1000, 0])
    context, targets = ijepa.draw_masks(index, 12, **DRAW)
    assert context.dtype == targets.dtype == torch.int64 and targets.shape[:2] == (4, 2)
    flipped, others = ijepa.draw_masks(index.flip(0), 12, **DRAW)
    assert torch.equal(flipped.flip(0), context) and torch.equal(others.flip(0), targets)
    alone, other = ijepa.draw_masks(index[1:2], 12, **DRAW)
    assert torch.equal(alone[0, : context.shape[1]], context[1])  # the first ones of what is left
    assert torch.equal(other[0], targets[1])
    for changed in (dict(seed=4), dict(steps_per_epoch=4)):
        found = ijepa.draw_masks(index, 12, **DRAW | changed)[1]
        assert found.shape != targets.shape or not torch.equal(found, targets)
    shapes = [ijepa.draw_masks(index, step, **DRAW)[1].shape[2] for step in range(40)]
    assert len(set(shapes)) > 1  # not of the epoch


def test_a_picture_shows_the_context_and_each_target():
    args, index = ijepa.parse_args(["--image-size", "32"]), torch.tensor([4, 9])
    side = 32 // args.patch_size
    (_, context), *targets = ijepa.visible_patches(args, index)
    assert len(targets) == args.num_targets and context.shape == (2, side, side)
    drawn = ijepa.build_draw(args, 1)(index, 0)[0]
    for n in range(2):
        assert context[n].flatten().nonzero()[:, 0].tolist() == drawn[n].tolist()
        assert all(3 <= target[n].sum() < context.shape[1] ** 2 / 4 for _, target in targets)


# -------------------------------------------------------------------------------------------- model


def model(image_size=16, patch_size=4, in_chans=3):
    backbone = ijepa.backbones.build_backbone(
        "vit_micro", in_chans=in_chans, image_size=image_size, patch_size=patch_size,
        positions="sincos", drop_path=0.0, class_token=False)
    return ijepa.IJEPA(backbone, predictor_dim=24, predictor_depth=2)


def test_linear_weights_start_normal_and_undivided_in_every_block():
    net = model()
    for name, value in net.named_parameters():
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight", "qkv.weight", "mask_token")):
            assert 0.015 < value.std() < 0.025, name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert (value == 0).all(), name
    assert not net.positions.requires_grad and not net.backbone.pos_embed.requires_grad


def test_the_forward_is_that_of_loops():
    torch.set_default_dtype(torch.float64)
    net, images = model(image_size=(8, 12), patch_size=2), torch.rand(2, 3, 8, 12)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    context = torch.tensor([[0, 1, 9, 20, 23], [3, 4, 5, 6, 7]])
    targets = torch.tensor([[[2, 8], [10, 11], [2, 3]], [[14, 15], [20, 21], [22, 23]]])
    with torch.no_grad():
        found = net(images, context, targets)
        assert found.shape == (2, 3, 2, 96)
        for n in range(2):
            tokens = net.backbone.embed(images[n : n + 1])[:, context[n]]
            encoded = net.narrow(net.backbone.encode(tokens)[0])[0]
            for t in range(3):
                rows = [encoded[k] + net.positions[0, place]
                        for k, place in enumerate(context[n].tolist())]
                rows += [net.mask_token[0, 0] + net.positions[0, place]
                         for place in targets[n, t].tolist()]
                x = torch.stack(rows)[None]
                for block in net.blocks:
                    x = block(x)
                torch.testing.assert_close(net.predict(net.norm(x[0, 5:])), found[n, t])


def test_what_is_not_in_the_context_does_not_reach_the_predictions():
    net, images = model(), torch.rand(2, 3, 16, 16)
    context, targets = torch.tensor([[0, 1, 4], [2, 3, 7]]), torch.tensor([[[5, 6]], [[9, 10]]])
    patches = torch.zeros(2, 16, 48).scatter(1, context[:, :, None].expand(-1, -1, 48), 1.0)
    seen = mae.unpatchify(patches, 4, 3)
    with torch.no_grad():
        found = net(images, context, targets)
        changed = torch.where(seen == 1, images, torch.rand_like(images))
        assert torch.equal(net(changed, context, targets), found)
        assert not torch.equal(net(images + 0.1 * seen, context, targets), found)


def test_the_target_is_a_copy_without_gradient_whose_features_are_normalised():
    net, images = model(), torch.rand(2, 3, 16, 16)
    target = ijepa.Target(net.backbone)
    features = target(images)
    assert not features.requires_grad and features.shape == (2, 16, 96)
    tokens = net.backbone.tokens(images)[0].detach()
    for n in range(2):
        for place in range(16):
            row = tokens[n, place]
            wanted = (row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(features[n, place], wanted)
    with torch.no_grad():
        net.backbone.norm.bias.add_(1)
    assert torch.equal(target(images), features)


def test_take_picks_tokens_by_their_places():
    tokens, places = torch.rand(2, 9, 5), torch.randint(9, (2, 3, 4))
    found = ijepa.take(tokens, places)
    for n in range(2):
        assert torch.equal(found[n], tokens[n][places[n]])


# --------------------------------------------------------------------------------- loss and updates


def loops(predictions, targets):
    total = []
    for p, t in zip(predictions.ravel(), targets.ravel(), strict=True):
        distance = abs(p - t)
        total.append(distance**2 / 2 if distance < 1 else distance - 0.5)
    return math.fsum(total) / len(total)


def tensors(n=4):
    numbers = np.random.default_rng(1)
    return numbers.normal(size=(n, 2, 3, 5)), numbers.normal(size=(n, 2, 3, 5))


def test_the_loss_is_that_of_loops():
    given = tensors()
    loss = ijepa.prediction_loss(*map(torch.from_numpy, given))
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(loops(*given), rel=1e-12)
    predictions, targets = (torch.from_numpy(x).requires_grad_() for x in given)
    ijepa.prediction_loss(predictions, targets).backward()
    assert targets.grad is None
    wanted = np.clip(given[0] - given[1], -1, 1) / given[0].size
    np.testing.assert_allclose(predictions.grad.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_computes_in_float32_at_least(dtype):
    predictions, targets = (torch.from_numpy(x).to(dtype) for x in tensors())
    loss = ijepa.prediction_loss(predictions, targets)
    wanted = loops(predictions.double().numpy(), targets.double().numpy())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted, rel=1e-5)


def own_gradient(predictions, targets):
    targets = own_rows(targets)
    return own_gradients(lambda x: ijepa.prediction_loss(x, targets), predictions)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *tensors(n=8))


def test_the_target_keeps_a_share_of_its_own():
    net = model()
    target = ijepa.Target(net.backbone)
    old = {name: p.clone() for name, p in target.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    ijepa.update_ema(target, net, 0.75)
    for name, p in target.named_parameters():
        torch.testing.assert_close(p, old[name] + 0.25, msg=name)


# --------------------------------------------------------------------------------------------- main


def traced(folder, *flags):
    """Losses of steps in float64, the sizes of contexts, and the weights at the end."""
    sizes, forward = [], ijepa.IJEPA.forward

    def remember(self, images, context, targets):
        sizes.append((context.shape[1], *targets.shape[1:]))
        return forward(self, images, context, targets)

    with mock.patch.object(ijepa.IJEPA, "forward", remember):
        losses = train(ijepa, folder, *EXTRA["ijepa"], "--limit", 64, *flags)
    weights = torch.load(folder / "backbone.pth", weights_only=True)
    return losses, sizes, {k: v.numpy() for k, v in weights.items()}


def test_processes_change_nothing_for_contexts_are_cut_alike(pool, tmp_path):
    flags = ["--image-size", "32"]  # a grid with contexts of many sizes
    losses, sizes, weights = pool.run(1, traced, tmp_path / "1", *flags)[0]
    for size in (2, 4):
        others = pool.run(size, traced, tmp_path / str(size), *flags)
        np.testing.assert_allclose(others[0][0], losses, rtol=1e-6)
        assert all(other[1] == sizes for other in others)  # the smallest of the global batch
        for name, weight in weights.items():
            np.testing.assert_allclose(others[0][2][name], weight, atol=1e-8, err_msg=name)


def test_schedules_begin_one_value_later_but_for_the_emas(tmp_path):
    steps, update = [], ijepa.update_ema

    def remember(target, online, momentum):
        steps.append(momentum)
        update(target, online, momentum)

    decays, step = [], torch.optim.AdamW.step

    def look(self, *args):
        decays.append((*(group["weight_decay"] for group in self.param_groups),
                       self.param_groups[0]["lr"]))
        assert all(p.ndim > 1 for p in self.param_groups[0]["params"])
        assert all(p.ndim < 2 for p in self.param_groups[1]["params"])
        return step(self, *args)

    flags = ["--epochs", 5, "--warmup-epochs", 2, "--stretch", 1.2, "--lr", 0.016, "--start-lr",
             0.0032, "--final-lr", 0.00016, "--weight-decay", 0.04, "--final-weight-decay", 0.4,
             "--momentum", 0.9]  # 10 steps of 12, 4 of them the warm-up; batch 16 of 256
    with mock.patch.object(ijepa, "update_ema", remember), \
            mock.patch.object(torch.optim.AdamW, "step", look):
        train(ijepa, tmp_path, *flags, dtype="float32")
    assert steps == pytest.approx([0.9 + 0.1 * t / 12 for t in range(10)])
    for t, (decay, none, lr) in enumerate(decays, start=1):
        assert none == 0
        assert decay == pytest.approx(0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * t / 12)))
        cosine = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * (t - 4) / 8))
        assert lr == pytest.approx(2e-4 + t / 4 * (1e-3 - 2e-4) if t < 4 else cosine)


def test_the_export_is_the_target_encoder(tmp_path):
    train(ijepa, tmp_path, dtype="float32")
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    state = state_of(tmp_path)
    assert "cls_token" not in weights
    for name, value in weights.items():
        assert torch.equal(value, state["target"][f"backbone.{name}"])
    assert any(not torch.equal(value, state["model"][f"backbone.{name}"])
               for name, value in weights.items())


def test_untrained_networks_beside_a_run_have_no_class_token_either(tmp_path, capsys):
    built, build = [], ijepa.backbones.build_backbone
    module, args = parsed("ijepa", "--output", tmp_path, "--probe-every", 1)
    module.main(args)
    for where in (tmp_path, tmp_path / "backbone.pth"):
        with mock.patch.object(ijepa.backbones, "build_backbone",
                               lambda *a, **k: built.append(build(*a, **k)) or built[-1]):
            eval_knn.main(eval_knn.parse_args(["--checkpoint", str(where), "random", "--limit",
                                               "100"]))
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert {row["layer"] for row in result["results"]} == {"patches"}
        (tmp_path / "run.json").unlink(missing_ok=True)  # then the file alone says it
    assert len(built) >= 12 and all(net.cls_token is None for net in built)


def test_averages_of_several_blocks_stand_side_by_side():
    vit, images = model().backbone.eval(), torch.rand(2, 3, 16, 16)
    assert features.layer_names(vit) == ["patches4", "patches3", "patches2", "patches"]
    found, tokens = features.layers(vit, images, ["patches4", "patches"]), vit.tokens(images, 4)
    assert torch.equal(found["patches4"], torch.cat([x.mean(1) for x in tokens], 1))
    assert torch.equal(found["patches"], features.layers(vit, images)["patches"])
    assert torch.equal(found["patches"], vit(images))


def test_a_backbone_with_other_parts_is_no_start(tmp_path):
    train(ijepa, tmp_path / "ijepa", dtype="float32")
    flags = ["--init", tmp_path / "ijepa", "--epochs", 2, "--patch-size",
             ijepa.RECIPES["digits"]["patch_size"]]
    with pytest.raises(RunError, match=r"cls_token is none there and \(1, 1, 96\) here"):
        train(mae, tmp_path / "mae", *flags, dtype="float32")
    train(ijepa, tmp_path / "again", *flags, dtype="float32")
    state = state_of(tmp_path / "again")
    assert state["target"].keys() == {k for k in state["model"] if k.startswith("backbone.")}
