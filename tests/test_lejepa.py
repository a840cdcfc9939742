import math

import numpy as np
import pytest
import torch
from torch import nn

import lejepa
from common import optim
from helpers import check_joined, joined, own_gradients, raw_collectives, train

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_that_of_the_official_readme():
    args = lejepa.parse_args(["--recipe", "imagenet"])
    assert (args.num_crops, args.crop_sizes) == ([2, 6], [224, 98])
    assert args.crop_scales == [0.3, 1.0, 0.05, 0.3]
    assert args.lr * args.batch_size / 256 == 5e-4 and args.weight_decay == 0.05
    assert (args.lambda_, args.num_directions, args.projector_dim) == (0.05, 1024, 2048)
    assert lejepa.parse_args(["--recipe", "imagenet_resnet50"]).weight_decay == 5e-4


def test_the_imagenette_recipe_is_the_official_minimal_example():
    args = lejepa.parse_args(["--recipe", "imagenette"])
    assert (args.arch, args.patch_size, args.drop_path) == ("vit_small", 8, 0.1)
    assert (args.num_crops, args.crop_sizes, args.crop_scales) == ([4], [128], [0.08, 1.0])
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (256, 800, 2e-3, 0.05)
    assert (args.lambda_, args.num_directions, args.embedding_dim) == (0.02, 256, 16)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--lambda", "1.5"], "1.5"),
        (["--drop-path", "0.1"], "--arch is resnet_tiny"),
        (["--jitter", "0.4", "0.4", "0.2", "0"], "--jitter 0.4 0.4 0.2 0"),
        (["--jitter", "0.4", "0.2", "0", "0"], "--jitter 0.4 0.2 0 0"),
        (["--solarize", "0.2"], "--solarize 0.2 are not for --views digits"),
        (["--arch", "vit_micro", "--crop-sizes", "18"], "--crop-sizes 18"),
    ],
)
def test_what_does_not_fit_is_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        lejepa.parse_args(flags)
    printed = capsys.readouterr().err
    assert named in printed and printed.count("\n") == 1


def test_digits_are_shaded_as_strongly_as_jitter_says():
    flags = ["--jitter", "0.3", "0.3", "0", "0", "--solarize", "0"]
    for view in lejepa.build_views(lejepa.parse_args(flags)):
        (jitter,) = [step for step in view.colour if type(step).__name__ == "ColorJitter"]
        assert (jitter.brightness, jitter.contrast) == (0.3, 0.3)


# -------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("flags, p", [([], 0.2 * 0.5), (["--solarize", "0.3"], 0.3)])
def test_the_minimal_example_solarizes_one_view_in_ten(flags, p):
    views = lejepa.build_views(lejepa.parse_args(["--recipe", "imagenette", *flags]))
    chances = [step.p for view in views for step in view.colour
               if type(step).__name__ == "Solarize"]
    assert chances == [p] * 4


def test_all_crops_have_the_same_colours():
    views = lejepa.build_views(lejepa.parse_args(["--recipe", "imagenet"]))
    assert [view.size[0] for view in views] == [224] * 2 + [98] * 6
    assert [view.geometry[0].scale for view in views[1:3]] == [(0.3, 1.0), (0.05, 0.3)]
    for view in views:
        steps = {type(step).__name__: step for step in view.geometry + view.colour}
        chances = [steps[name].p for name in ("GaussianBlur", "Solarize", "Grayscale")]
        assert chances == [0.5, 0.2, 0.2]
        jitter = steps["ColorJitter"]
        assert (jitter.brightness, jitter.contrast) == (0.4, 0.4)
        assert (jitter.saturation, jitter.hue, jitter.p) == (0.2, 0.1, 0.8)


# -------------------------------------------------------------------------------------------- model


def test_crops_of_two_sizes_come_back_in_their_order():
    backbone = lejepa.backbones.build_backbone(
        "vit_micro", in_chans=3, image_size=16, patch_size=4, positions="learned", drop_path=0.0
    )
    model = lejepa.LeJEPA(backbone, projector_dim=16, embedding_dim=8).eval()
    views = [torch.rand(3, 3, side, side) for side in (16, 16, 8)]
    z = model(views)
    assert z.shape == (3, 3, 8)
    for each, view in zip(z, views, strict=True):
        torch.testing.assert_close(each, model([view])[0])


def test_the_projector_is_the_official_one():
    backbone = nn.Identity()
    backbone.num_features = 12
    model = lejepa.LeJEPA(backbone, 32, 8)
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert all(layer.bias is not None for layer in model.projector if isinstance(layer, nn.Linear))


# --------------------------------------------------------------------------------------------- loss


def embeddings(views=3, n=12, d=5):
    rng = np.random.default_rng(1)
    return 0.7 * rng.normal(size=(views, n, d)) + rng.normal(size=(views, 1, d))


def directions(d=5, m=4):
    return lejepa.draw_directions(seed=3, step=8, embedding_dim=d, count=m)


def loops(z, axes):
    """The statistic of Epps and Pulley for each view and direction, one number at a time."""
    views, n, _ = z.shape
    total, step = 0.0, 3 / 16
    for v in range(views):
        for m in range(axes.shape[1]):
            heights = [float(z[v, i] @ axes[:, m]) for i in range(n)]
            for k in range(17):
                t = k * step
                real = sum(math.cos(t * h) for h in heights) / n
                imaginary = sum(math.sin(t * h) for h in heights) / n
                normal = math.exp(-(t**2) / 2)
                width = step if k in (0, 16) else 2 * step  # of -t as well
                total += n * width * normal * ((real - normal) ** 2 + imaginary**2)
    return total / (views * axes.shape[1])


def test_directions_are_unit_columns_and_a_function_of_seed_and_step():
    first = directions(6, 50)
    assert first.shape == (6, 50) and first.dtype == torch.float64
    torch.testing.assert_close(first.norm(dim=0), torch.ones(50, dtype=torch.float64))
    assert torch.equal(first, directions(6, 50))
    others = [lejepa.draw_directions(seed, step, 6, 50) for seed, step in ((3, 9), (4, 8))]
    assert all((first - other).abs().max() > 0.1 for other in others)


def test_directions_are_uniform_on_the_sphere():
    found = directions(4, 20000)
    spread = found @ found.T / 20000
    torch.testing.assert_close(spread, torch.eye(4).double() / 4, atol=0.01, rtol=0)
    assert found.mean(1).abs().max() < 0.02


def test_sigreg_equals_the_papers_loops():
    z, axes = embeddings(), directions()
    found = lejepa.sigreg(torch.from_numpy(z), axes).item()
    assert found == pytest.approx(loops(z, axes.numpy()), rel=1e-10) and found > 0.1


def test_the_gradient_of_sigreg_is_that_of_small_differences():
    z = torch.from_numpy(embeddings(2, 4, 3)).requires_grad_()
    axes = directions(3, 2)
    assert torch.autograd.gradcheck(lambda x: lejepa.sigreg(x, axes), (z,))


def integral(f):
    """Twice the integral of f from 0 to 3 with 17 points."""
    t = np.linspace(0, 3, 17)
    y = f(t)
    return 2 * (y.sum() - (y[0] + y[-1]) / 2) * 3 / 16


def test_a_collapse_costs_as_much_as_there_are_images():
    z = torch.zeros(2, 30, 5, dtype=torch.float64)
    each = integral(lambda t: np.exp(-(t**2) / 2) * (1 - np.exp(-(t**2) / 2)) ** 2)
    assert lejepa.sigreg(z, directions()).item() == pytest.approx(30 * each, rel=1e-12)
    assert each == pytest.approx(0.4, abs=0.005)  # as the docstring says


def test_two_images_on_either_side_have_a_cosine_for_their_characteristic_function():
    z = torch.tensor([[[1.5], [-1.5]]], dtype=torch.float64)
    normal = lambda t: np.exp(-(t**2) / 2)  # noqa: E731
    expected = 2 * integral(lambda t: normal(t) * (np.cos(1.5 * t) - normal(t)) ** 2)
    found = lejepa.sigreg(z, torch.ones(1, 1, dtype=torch.float64)).item()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [50, 2000])
def test_gaussian_noise_scores_the_chance_loss_whatever_its_number(n):
    views, num_global, lambda_ = 5, 2, 0.3
    found = []
    for step in range(40):
        z = torch.randn(views, n, 8, dtype=torch.float64)
        axes = lejepa.draw_directions(0, step, 8, 16)
        found.append(lambda_ * lejepa.sigreg(z, axes) + (1 - lambda_) * lejepa.invariance(z, 2))
    expected = lejepa.chance_loss(views, num_global, lambda_)
    assert torch.stack(found).mean().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("change", [lambda z: 2 * z, lambda z: z / 2, lambda z: z + 0.5,
                                    lambda z: z.sign(), lambda z: z[..., :1].expand_as(z)])
def test_whatever_is_no_isotropic_gaussian_scores_more(change):
    z, axes = torch.randn(1, 500, 6, dtype=torch.float64), directions(6, 64)
    assert lejepa.sigreg(change(z), axes) > 2 * lejepa.sigreg(z, axes)


def test_sigreg_is_the_mean_over_views_and_does_not_see_order_or_sign():
    z, axes = torch.from_numpy(embeddings()), directions()
    whole = lejepa.sigreg(z, axes)
    each = torch.stack([lejepa.sigreg(view[None], axes) for view in z])
    torch.testing.assert_close(each.mean(), whole)
    assert each.std() > 0.01  # pooled, the views would give another number
    torch.testing.assert_close(lejepa.sigreg(z[:, torch.randperm(12)], axes), whole)
    torch.testing.assert_close(lejepa.sigreg(-z, axes), whole)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    torch.testing.assert_close(lejepa.sigreg(z @ turn, turn.T @ axes), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sigreg_computes_in_float32_at_least_whatever_the_autocast(dtype):
    z, axes = torch.from_numpy(20 * embeddings()).to(dtype), directions()
    with torch.autocast("cpu", torch.bfloat16):
        found = lejepa.sigreg(z, axes)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loops(z.double().numpy(), axes.numpy()), rel=1e-4)


def distances(z, num_global):
    """The invariance, one number at a time."""
    views, n, d = z.shape
    total = 0.0
    for i in range(n):
        for j in range(d):
            goal = sum(z[v, i, j] for v in range(num_global)) / num_global
            total += sum((z[v, i, j] - goal) ** 2 for v in range(views))
    return total / (views * n * d)


@pytest.mark.parametrize("num_global", [1, 2, 3])
def test_the_invariance_equals_the_loops_and_its_goal_is_not_detached(num_global):
    z = embeddings()
    leaf = torch.from_numpy(z).requires_grad_()
    found = lejepa.invariance(leaf, num_global)
    assert found.item() == pytest.approx(distances(z, num_global), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: lejepa.invariance(x, num_global), (leaf,))


def test_equal_views_are_invariant_and_a_shift_of_all_is_not_seen():
    z = torch.from_numpy(embeddings())
    assert lejepa.invariance(z[:1].expand(4, -1, -1), 2).item() == 0
    torch.testing.assert_close(lejepa.invariance(z + 7, 2), lejepa.invariance(z, 2))
    half = z.to(torch.bfloat16)
    assert lejepa.invariance(half, 2).dtype == torch.float32


def own_gradient(z):
    def loss(x):
        return 0.1 * lejepa.sigreg(x, directions()) + 0.9 * lejepa.invariance(x, 2)

    return own_gradients(loss, z, dim=1)


def raw_gradient(z):  # the sum over processes without its gradient
    with raw_collectives():
        return own_gradient(z)


def own_sigreg(z):
    return own_gradients(lambda x: lejepa.sigreg(x, directions()), z, dim=1)[0]


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, embeddings(), dim=1)


@pytest.mark.parametrize("size", [2, 4])
def test_sigreg_is_the_same_number_on_every_process(pool, size):
    found = pool.run(size, own_sigreg, embeddings())
    assert len(set(found)) == 1 and found[0] == pytest.approx(own_sigreg(embeddings()), rel=1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_the_raw_sum_gives_another_gradient(pool, size):
    alone = own_gradient(embeddings())
    raw = joined(pool.run(size, raw_gradient, embeddings()), dim=1)
    assert raw[0] == pytest.approx(alone[0], rel=1e-9)  # the loss alone would not show it
    assert np.abs(raw[1] - alone[1]).max() > 0.1 * np.abs(alone[1]).max()


# --------------------------------------------------------------------------------------------- main


def test_the_rate_goes_from_a_hundredth_to_a_thousandth(tmp_path, monkeypatch):
    made, warmup_cosine = [], optim.warmup_cosine
    monkeypatch.setattr(optim, "warmup_cosine", lambda **kw: made.append(kw) or warmup_cosine(**kw))
    train(lejepa, tmp_path, "--epochs", 3, "--warmup-epochs", 1, "--lr", 0.016)
    (kept,) = made  # 2 steps an epoch, batches of 16
    assert (kept["warmup_steps"], kept["total_steps"]) == (2, 6)
    rates = warmup_cosine(**kept | dict(total_steps=10_002))
    assert rates[0] == pytest.approx(1e-5) and rates[2] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-6, rel=1e-3)


def test_a_collapse_is_warned_of(tmp_path, monkeypatch, capsys):
    collapsed = {"z_std": torch.tensor(0.09 / lejepa.RECIPES["digits"]["embedding_dim"] ** 0.5)}
    monkeypatch.setattr(lejepa, "indicators", lambda *_: collapsed)
    train(lejepa, tmp_path)
    assert "warning: z_std is" in capsys.readouterr().out


def test_every_step_draws_its_own_directions_and_all_processes_the_same(tmp_path, pool):
    for drawn in pool.run(2, drawn_directions, str(tmp_path)):
        assert [(seed, step) for seed, step, _ in drawn] == [(5, 0), (5, 1)]
        for _, step, found in drawn:
            expected = lejepa.draw_directions(5, step, found.shape[0], found.shape[1])
            np.testing.assert_array_equal(found, expected.numpy())


def drawn_directions(folder):
    drawn, draw = [], lejepa.draw_directions

    def noted(seed, step, *sizes):
        found = draw(seed, step, *sizes)
        drawn.append((seed, step, found.numpy()))
        return found

    lejepa.draw_directions = noted
    try:
        train(lejepa, folder, "--seed", 5)
    finally:
        lejepa.draw_directions = draw
    return drawn


def test_a_transformer_trains_on_crops_of_two_sizes(tmp_path):
    losses = train(lejepa, tmp_path, "--arch", "vit_micro", "--num-crops", "2", "1", "--crop-sizes",
                   "16", "8", "--crop-scales", "0.6", "1", "0.3", "0.6", "--drop-path", "0.1")
    assert len(losses) == 2 and np.isfinite(losses).all()
