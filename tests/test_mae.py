import math
from unittest import mock

import numpy as np
import pytest
import torch

import mae
from helpers import check_joined, lines, own_gradients, own_rows, train

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_papers():
    args = mae.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.patch_size, args.image_size) == ("vit_base", 16, 224)
    assert (args.mask_ratio, args.norm_pix, args.crop_scale) == (0.75, True, [0.2, 1.0])
    assert (args.decoder_dim, args.decoder_depth, args.decoder_heads) == (512, 8, 16)
    assert (args.batch_size, args.epochs, args.warmup_epochs) == (4096, 800, 40)
    assert (args.lr, args.weight_decay, args.accum_steps) == (1.5e-4, 0.05, 1)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--image-size", "18"], "--image-size 18 is not a multiple of --patch-size 4"),
        (["--mask-ratio", "1"], "keeps 0 of 16 patches"),
        (["--mask-ratio", "0"], "keeps 16 of 16 patches"),
        (["--mask-ratio", "0.95"], "keeps 0 of 16 patches"),
        (["--decoder-heads", "3"], "--decoder-dim 64"),
        (["--batch-size", "10", "--accum-steps", "4"], "--accum-steps 4 does not divide 10"),
        (["--arch", "resnet18"], "resnet18"),
        (["--sync-bn"], "--sync-bn"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        mae.parse_args(flags)
    assert named in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("kind", ["photo", "digits"])
def test_there_is_one_view_without_changes_of_colour(kind):
    (view,) = mae.build_views(mae.parse_args(["--recipe", "imagenet", "--views", kind]))
    assert [type(step).__name__ for step in view.colour] == ["Normalize"]
    crop = next(s for s in view.geometry if type(s).__name__ == "RandomResizedCrop")
    assert crop.scale == [0.2, 1.0]
    flips = [step.p for step in view.geometry if type(step).__name__ == "HorizontalFlip"]
    assert flips == ([0.5] if kind == "photo" else [])


# -------------------------------------------------------------------------------------------- model


def model(image_size=16, patch_size=4, in_chans=3, mask_ratio=0.75):
    backbone = mae.backbones.build_backbone(
        "vit_micro", in_chans=in_chans, image_size=image_size, patch_size=patch_size,
        positions="sincos", drop_path=0.0,
    )
    return mae.MAE(backbone, mask_ratio, in_chans, decoder_dim=32, decoder_depth=1, decoder_heads=2)


def test_linear_weights_and_the_patch_projection_start_uniform():
    net = model()
    for name, value in net.named_parameters():
        weight = value.detach().flatten(1) if "patch_embed.proj.weight" in name else value
        if name.endswith(("cls_token", "mask_token")):
            assert 0.01 < value.std() < 0.03
        elif "pos" not in name and value.ndim > 1:
            bound = math.sqrt(6 / sum(weight.shape))
            assert bound * 0.97 < weight.abs().max() <= bound, name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert (value == 0).all(), name


def test_the_decoders_positions_are_fixed():
    net = model(image_size=(8, 16))
    assert not net.positions.requires_grad and not net.backbone.pos_embed.requires_grad
    assert (net.positions[0, 0] == 0).all()
    assert torch.equal(net.positions[0, 1:], mae.backbones.sincos_positions(32, 2, 4))


def test_what_is_removed_does_not_reach_the_encoder():
    net, images, noise = model(), torch.rand(4, 3, 16, 16), torch.rand(4, 16)
    encoded = []
    net.backbone.norm.register_forward_hook(lambda _, __, out: encoded.append(out))
    with torch.no_grad():
        pred, mask = net(images, noise)
        assert encoded[-1].shape == (4, 1 + 4, 96) and (mask.sum(1) == 12).all()
        removed = mae.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4, 3)
        changed = torch.where(removed == 1, torch.rand_like(images), images)
        again, _ = net(changed, noise)
        assert torch.equal(encoded[0], encoded[1]) and torch.equal(pred, again)
        assert not torch.equal(net(images + 0.1 * (1 - removed), noise)[0], pred)


def test_the_forward_is_that_of_loops():
    torch.set_default_dtype(torch.float64)
    net, images, noise = model(image_size=(8, 12)), torch.rand(3, 3, 8, 12), torch.rand(3, 6)
    net.mask_ratio = 0.6  # 2 of 6
    with torch.no_grad():
        pred, mask = net(images, noise)
        for n in range(3):
            order = sorted(range(6), key=lambda place, n=n: noise[n, place].item())
            tokens = net.backbone.embed(images[n : n + 1])[0]
            encoded = net.backbone.encode(tokens[order[:2]][None])[0][0]
            places = [net.mask_token[0, 0]] * 6
            for place, token in zip(order[:2], encoded[1:], strict=True):
                places[place] = net.narrow(token)
            x = torch.stack([net.narrow(encoded[0]), *places]) + net.positions[0]
            x = net.norm(net.blocks[0](x[None]))[0]
            expected = torch.stack([net.predict(token) for token in x[1:]])
            torch.testing.assert_close(pred[n], expected)
            assert mask[n].tolist() == [float(place not in order[:2]) for place in range(6)]


@pytest.mark.parametrize(
    "patches, ratio, kept",
    [(196, 0.75, 49), (256, 0.75, 64), (100, 0.9, 9), (100, 0.8, 19), (100, 0.7, 30),
     (100, 0.6, 40), (16, 0.75, 4), (64, 0.9, 6)],
)
def test_the_number_of_kept_patches_is_rounded_down(patches, ratio, kept):
    tokens, mask, _ = mae.random_masking(torch.rand(2, patches, 3), ratio, torch.rand(2, patches))
    assert tokens.shape == (2, kept, 3) and (mask.sum(1) == patches - kept).all()


def test_the_smallest_noise_is_kept_and_all_finds_its_place_again():
    tokens, noise = torch.rand(5, 12, 7), torch.rand(5, 12)
    kept, mask, restore = mae.random_masking(tokens, 0.7, noise)
    assert kept.shape == (5, 3, 7) and restore.dtype == torch.int64 and mask.is_floating_point()
    for row in range(5):
        order = noise[row].tolist()
        order = sorted(range(12), key=order.__getitem__)
        assert torch.equal(kept[row], tokens[row, order[:3]])
        assert torch.equal(tokens[row, order][restore[row]], tokens[row])
        assert mask[row].nonzero()[:, 0].tolist() == sorted(order[3:])


def test_of_equal_noise_the_first_patches_are_kept():
    tokens = torch.rand(1, 200, 2)
    kept, mask, restore = mae.random_masking(tokens, 0.5, torch.zeros(1, 200))
    assert torch.equal(kept, tokens[:, :100]) and torch.equal(restore[0], torch.arange(200))
    assert (mask[0, 100:] == 1).all() and (mask[0, :100] == 0).all()


def test_noise_belongs_to_an_image_of_an_epoch():
    index = torch.tensor([7, 3, 1000])
    key = dict(patches=16, seed=0, steps_per_epoch=5)
    noise = mae.mask_noise(index, 10, **key)
    assert noise.shape == (3, 16) and noise.min() >= 0 and noise.max() <= 1
    assert torch.equal(mae.mask_noise(index.flip(0), 14, **key), noise.flip(0))
    assert torch.equal(mae.mask_noise(index[1:2], 10, **key), noise[1:2])
    for other in (mae.mask_noise(index, 10, **key | dict(seed=1)),
                  mae.mask_noise(index, 15, **key), noise.roll(1)):
        assert (other != noise).all()
    many = mae.mask_noise(torch.arange(2000), 0, **key)
    removed = mae.random_masking(torch.zeros(2000, 16, 1), 0.75, many)[1].mean(0)
    assert (removed - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 2000)


# --------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("channels", [1, 3, 4, 10])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (4, 1)])
def test_unpatchify_undoes_patchify(channels, grid):
    images = torch.rand(2, channels, grid[0] * 4, grid[1] * 4)
    patches = mae.patchify(images, 4)
    assert patches.shape == (2, grid[0] * grid[1], 16 * channels)
    assert torch.equal(mae.unpatchify(patches, 4, channels, grid), images)
    if grid[0] == grid[1]:
        assert torch.equal(mae.unpatchify(patches, 4, channels), images)
    for row in range(grid[0]):
        for column in range(grid[1]):
            window = images[1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            numbers = [window[c, i, j] for i in range(4) for j in range(4) for c in range(channels)]
            assert torch.equal(patches[1, row * grid[1] + column], torch.stack(numbers))


def test_what_makes_no_grid_is_refused():
    with pytest.raises(ValueError, match="images of 8 x 9 do not divide into patches of 4"):
        mae.patchify(torch.rand(1, 3, 8, 9), 4)
    with pytest.raises(ValueError, match="10 patches do not make 3 rows of 3"):
        mae.unpatchify(torch.rand(1, 10, 48), 4, 3)
    with pytest.raises(ValueError, match="10 patches do not make 3 rows of 4"):
        mae.unpatchify(torch.rand(1, 10, 48), 4, 3, (3, 4))


def tensors(n=4, channels=3, grid=(2, 3), patch=2):
    rng = np.random.default_rng(1)
    length = grid[0] * grid[1]
    images = rng.normal(size=(n, channels, grid[0] * patch, grid[1] * patch))
    mask = np.stack([rng.permutation(length) < length // 2 for _ in range(n)]).astype(float)
    return rng.normal(size=(n, length, patch * patch * channels)), images, mask


def loops(pred, images, mask, patch, norm_pix):
    """The mean over removed patches of the mean over their pixels, one number at a time."""
    n, channels, height, width = images.shape
    errors = []
    for i in range(n):
        for place in np.flatnonzero(mask[i]):
            row, column = divmod(int(place), width // patch)
            values = [images[i, c, row * patch + y, column * patch + x]
                      for y in range(patch) for x in range(patch) for c in range(channels)]
            if norm_pix:
                mean = sum(values) / len(values)
                variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
                values = [(v - mean) / math.sqrt(variance + 1e-6) for v in values]
            errors.append(sum((p - v) ** 2 for p, v in zip(pred[i, place], values, strict=True))
                          / len(values))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_that_of_loops(channels, norm_pix):
    given = tensors(channels=channels)
    loss = mae.reconstruction_loss(*map(torch.from_numpy, given), 2, norm_pix)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(loops(*given, 2, norm_pix), rel=1e-12)


def test_kept_patches_do_not_count():
    pred, images, mask = map(torch.from_numpy, tensors())
    pred.requires_grad_()
    loss = mae.reconstruction_loss(pred, images, mask, 2, True)
    loss.backward()
    reached = pred.grad.abs().sum(2) > 0
    assert torch.equal(reached, mask == 1)
    with torch.no_grad():
        spoiled = torch.where(mask[:, :, None] == 1, pred, 1e9)
    assert mae.reconstruction_loss(spoiled, images, mask, 2, True).item() == loss.item()


@pytest.mark.parametrize("channels, patch", [(3, 4), (1, 4), (3, 16)])
def test_predicting_nothing_scores_the_variance_of_normalised_pixels(channels, patch):
    images = torch.rand(8, channels, 8 * patch, 8 * patch)
    size = patch * patch * channels
    mask = (torch.rand(8, 64) < 0.75).float()
    loss = mae.reconstruction_loss(torch.zeros(8, 64, size), images, mask, patch, True)
    assert loss.item() == pytest.approx((size - 1) / size, abs=1e-3)


def test_a_perfect_prediction_scores_0():
    _, images, mask = map(torch.from_numpy, tensors())
    pred = mae.patchify(images, 2)
    assert mae.reconstruction_loss(pred, images, mask, 2, False).item() == 0
    assert mae.reconstruction_loss(pred, images, mask, 2, True).item() > 0.01


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_gradient_of_the_loss_is_that_of_its_value(norm_pix):
    pred, *given = map(torch.from_numpy, tensors(n=2, channels=1))
    pred.requires_grad_()
    loss = mae.reconstruction_loss
    assert torch.autograd.gradcheck(lambda pred: loss(pred, *given, 2, norm_pix), (pred,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_computes_in_float32_at_least(dtype):
    pred, images, mask = map(torch.from_numpy, tensors())
    pred = pred.to(dtype)
    loss = mae.reconstruction_loss(pred, images.float(), mask.float(), 2, True)
    expected = loops(pred.double().numpy(), images.numpy(), mask.numpy(), 2, True)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def own_gradient(pred, images, mask):
    others = own_rows(images), own_rows(mask)
    return own_gradients(lambda x: mae.reconstruction_loss(x, *others, 2, True), pred)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *tensors(n=8))


# --------------------------------------------------------------------------------------------- main


def traced(folder, *flags):
    """Losses of four steps in float64, the gradients of the first, and the weights at the end."""
    gradients, step = {}, torch.optim.AdamW.step

    def remember(self, *args):
        for group, parameters in enumerate(self.param_groups):
            for number, p in enumerate(parameters["params"]):
                gradients.setdefault((group, number), p.grad.clone().numpy())
        return step(self, *args)

    with mock.patch.object(torch.optim.AdamW, "step", remember):
        losses = train(mae, folder, "--limit", 64, *flags)
    weights = torch.load(folder / "backbone.pth", weights_only=True)
    return losses, gradients, {k: v.numpy() for k, v in weights.items()}


def test_processes_and_accumulation_change_nothing(pool, tmp_path):
    losses, gradients, weights = pool.run(1, traced, tmp_path / "1")[0]
    for size, parts in ((1, 4), (2, 1), (2, 2), (4, 1)):
        folder = tmp_path / f"{size}-{parts}"
        others = pool.run(size, traced, folder, "--accum-steps", parts)
        np.testing.assert_allclose(others[0][0], losses, rtol=1e-6)
        for _, other, _ in others:  # on every process
            for name, gradient in gradients.items():
                atol = 1e-6 * np.abs(gradient).max()
                np.testing.assert_allclose(other[name], gradient, rtol=1e-6, atol=atol)
        for name, weight in weights.items():
            np.testing.assert_allclose(others[0][2][name], weight, atol=1e-8, err_msg=name)


def test_weight_decay_is_for_matrices_and_tokens(tmp_path, monkeypatch):
    made = []

    class Caught(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            made.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Caught)
    train(mae, tmp_path, "--limit", "16", dtype="float32")
    decayed, others = made[0].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0)
    assert decayed["betas"] == others["betas"] == (0.9, 0.95)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in others["params"])
    # Of each of the 4 + 2 blocks 4 matrices; embedding, narrowing, prediction; two tokens.
    assert len(decayed["params"]) == 6 * 4 + 3 + 2


def test_bf16_stays_within_two_percent_of_float32(tmp_path):
    plain, rounded = (train(mae, tmp_path / amp, "--limit", 320, "--amp", amp, dtype="float32")
                      for amp in ("none", "bf16"))
    assert len(plain) == 20
    np.testing.assert_allclose(rounded, plain, rtol=0.02)


def test_the_log_says_what_predicting_nothing_scores(tmp_path):
    train(mae, tmp_path, "--limit", "64", "--batch-size", "64", dtype="float32")
    (line,) = lines(tmp_path)
    assert 0.5 < line["zero_loss"] <= 47 / 48 < line["loss"]


def test_a_picture_shows_what_the_first_epoch_leaves():
    args, index = mae.parse_args(["--seed", "3"]), torch.tensor([4, 9])
    ((view, visible),) = mae.visible_patches(args, index)
    noise = mae.mask_noise(index, 0, patches=16, seed=3, steps_per_epoch=11)
    assert view == 0 and visible.shape == (2, 4, 4) and visible.dtype == torch.bool
    assert (noise[visible.flatten(1)].view(2, 4).amax(1)
            < noise[~visible.flatten(1)].view(2, 12).amin(1)).all()
