import numpy as np
import pytest
import torch

import vicreg
from common import optim
from helpers import check_joined, joined, own_gradients, raw_collectives, train

WEIGHTS = (25.0, 25.0, 1.0)
EACH = pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), WEIGHTS])

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_papers():
    args = vicreg.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.projector_dim, args.embedding_dim) == ("resnet50", 8192, 8192)
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (2048, 1000, 0.2, 1e-6)
    assert (args.sim_weight, args.std_weight, args.cov_weight) == WEIGHTS
    assert (args.warmup_epochs, args.sync_bn) == (10, True)
    args = vicreg.parse_args(["--recipe", "imagenet_100"])
    assert (args.batch_size, args.epochs, args.lr) == (2048, 100, 0.3)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--solarize", "0", "0.3"], "--solarize 0 0.3"),
        (["--recipe", "cifar10", "--views", "digits"], "--solarize 0.1 0.1"),
        (["--embedding-dim", "1"], "'1' is not a whole number of at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        vicreg.parse_args(flags)
    printed = capsys.readouterr().err
    assert named in printed and printed.count("\n") == 1


def test_the_remedy_of_the_refusal_is_accepted():
    assert vicreg.parse_args(["--views", "digits", "--solarize", "0", "0"]).solarize == [0, 0]


# -------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize(
    "recipe, blurs, solarize",
    [("imagenet", (1.0, 0.1), (0.0, 0.2)), ("cifar10", (0.0, 0.0), (0.1, 0.1))],
)
def test_the_two_views_are_of_two_kinds(recipe, blurs, solarize):
    views = vicreg.build_views(vicreg.parse_args(["--recipe", recipe]))
    for view, blur_p, solarize_p in zip(views, blurs, solarize, strict=True):
        steps = {type(step).__name__: step for step in view.geometry + view.colour}
        assert steps["GaussianBlur"].p == blur_p and steps["Solarize"].p == solarize_p
        jitter = steps["ColorJitter"]
        assert (jitter.brightness, jitter.contrast) == (0.4, 0.4)
        assert (jitter.saturation, jitter.hue, jitter.p) == (0.2, 0.1, 0.8)
        assert steps["RandomResizedCrop"].interpolation == "bicubic"


# -------------------------------------------------------------------------------------------- model


def small_model():
    backbone = vicreg.backbones.build_backbone(
        "resnet_tiny", stem="small", in_chans=3, zero_init_residual=True
    )
    return vicreg.VICReg(backbone, projector_dim=16, embedding_dim=8)


def test_each_view_has_its_own_batch_statistics():
    model = small_model()
    views = [torch.rand(6, 3, 16, 16), 5 + torch.rand(6, 3, 16, 16)]
    alone = [model([view])[0] for view in views]
    for z, expected in zip(model(views), alone, strict=True):
        torch.testing.assert_close(z, expected)


def test_only_the_last_layer_of_the_expander_has_no_bias():
    biases = [n for n, _ in small_model().projector.named_parameters() if n.endswith("bias")]
    assert biases == ["0.bias", "1.bias", "3.bias", "4.bias"]  # Linear, norm, Linear, norm


# --------------------------------------------------------------------------------------------- loss


def embeddings(n=12, d=5):
    rng = np.random.default_rng(1)
    z1 = 0.8 * rng.normal(size=(n, d)) + 3  # some standard deviations under 1, some above
    return z1, z1 + rng.normal(size=(n, d))


def loops(z1, z2, sim_weight, std_weight, cov_weight):
    """Equations 1 to 6 of the paper with the official divisors, one number at a time."""
    n, d = z1.shape
    distance = sum((z1[i, j] - z2[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    loss = sim_weight * distance
    for z in (z1, z2):
        means = [sum(z[:, j]) / n for j in range(d)]
        for j in range(d):
            for k in range(d):
                c = sum((z[i, j] - means[j]) * (z[i, k] - means[k]) for i in range(n)) / (n - 1)
                if j == k:
                    loss += std_weight * max(0.0, 1 - (c + 1e-4) ** 0.5) / d / 2
                else:
                    loss += cov_weight * c**2 / d
    return loss


@EACH
def test_the_loss_equals_the_papers_loops(weights):
    z1, z2 = embeddings()
    loss = vicreg.vicreg_loss(torch.from_numpy(z1), torch.from_numpy(z2), *weights)
    assert loss.item() == pytest.approx(loops(z1, z2, *weights), rel=1e-10)
    assert loss.item() > 0.01


@EACH
def test_the_gradient_is_that_of_small_differences_for_both_views(weights):
    z1, z2 = (torch.from_numpy(z).requires_grad_() for z in embeddings(6, 3))
    assert torch.autograd.gradcheck(lambda a, b: vicreg.vicreg_loss(a, b, *weights), (z1, z2))
    vicreg.vicreg_loss(z1, z2, *weights).backward()
    assert z1.grad.abs().max() > 0 and z2.grad.abs().max() > 0


def test_one_embedding_for_all_images_scores_the_chance_loss_and_has_a_finite_gradient():
    z = torch.full((20, 6), 0.7, dtype=torch.float64, requires_grad=True)
    loss = vicreg.vicreg_loss(z, z, *WEIGHTS)
    loss.backward()
    assert loss.item() == pytest.approx(0.99 * 25, rel=1e-12)
    assert torch.isfinite(z.grad).all()


def test_equal_views_with_independent_dimensions_of_deviation_one_score_nothing():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)  # (16, 4)
    z = corners + 7  # variance 16 / 15
    assert vicreg.vicreg_loss(z, z, *WEIGHTS).item() == pytest.approx(0, abs=1e-20)
    assert vicreg.vicreg_loss(z, -z, 1, 25, 1).item() == pytest.approx((2 * 7) ** 2 + 4, rel=1e-12)


def test_equal_dimensions_are_redundant():
    """Covariances are all 1: D - 1 squared ones for each dimension, of both views."""
    column = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(8)[:, None] * (15 / 16) ** 0.5
    z = column.expand(16, 5).contiguous()
    assert vicreg.vicreg_loss(z, z, 0, 0, 1).item() == pytest.approx(2 * (5 - 1), rel=1e-12)


def test_a_shift_of_a_view_costs_invariance_alone():
    z1, z2 = map(torch.from_numpy, embeddings(50))
    one, other = (vicreg.vicreg_loss(z, z2, 0, 25, 1) for z in (z1, z1 - 9))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)
    assert vicreg.vicreg_loss(z1, z1 - 9, 1, 0, 0).item() == pytest.approx(81, rel=1e-12)


def test_the_views_are_alike_and_their_order_of_images_and_dimensions_is_free():
    z1, z2 = map(torch.from_numpy, embeddings())
    rows, columns = torch.randperm(12), torch.randperm(5)
    loss = vicreg.vicreg_loss(z1, z2, *WEIGHTS)
    for a, b in ((z2, z1), (z1[rows], z2[rows]), (z1[:, columns], z2[:, columns])):
        torch.testing.assert_close(vicreg.vicreg_loss(a, b, *WEIGHTS), loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_computes_in_float32_at_least_whatever_the_autocast(dtype):
    z1, z2 = (torch.from_numpy(z).to(dtype) for z in embeddings())
    with torch.autocast("cpu", torch.bfloat16):
        loss = vicreg.vicreg_loss(z1, z2, *WEIGHTS)
    expected = loops(z1.double().numpy(), z2.double().numpy(), *WEIGHTS)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-4)


def own_gradient(weights, z1, z2):
    return own_gradients(lambda a, b: vicreg.vicreg_loss(a, b, *weights), z1, z2)


def raw_gradient(weights, z1, z2):  # the sum over processes without its gradient
    with raw_collectives():
        return own_gradient(weights, z1, z2)


@pytest.mark.parametrize("size", [2, 4])
@EACH
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size, weights):
    check_joined(pool, size, own_gradient, weights, *embeddings())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("weights", [(0, 1, 0), (0, 0, 1)])
def test_the_raw_sum_gives_another_gradient(pool, size, weights):
    z1, z2 = embeddings()
    alone = own_gradient(weights, z1, z2)
    raw = joined(pool.run(size, raw_gradient, weights, z1, z2))
    assert raw[0] == pytest.approx(alone[0], rel=1e-9)  # the loss alone would not show it
    assert np.abs(raw[1] - alone[1]).max() > 0.1 * np.abs(alone[1]).max()


# --------------------------------------------------------------------------------------------- main


def test_the_rate_starts_at_0_and_falls_to_a_thousandth(tmp_path, monkeypatch):
    made, warmup_cosine = [], optim.warmup_cosine
    monkeypatch.setattr(optim, "warmup_cosine", lambda **kw: made.append(kw) or warmup_cosine(**kw))
    train(vicreg, tmp_path, "--epochs", 3, "--warmup-epochs", 1, "--lr", 0.8)
    (kept,) = made  # 2 steps an epoch, batches of 16
    assert (kept["warmup_steps"], kept["total_steps"]) == (2, 6)
    rates = warmup_cosine(**kept | dict(total_steps=10_002))
    assert rates[:3] == pytest.approx([0, 0.025, 0.05])
    assert rates[-1] == pytest.approx(5e-5, rel=1e-3)


def test_a_collapse_is_warned_of(tmp_path, monkeypatch, capsys):
    collapsed = {"z_std": torch.tensor(0.09 / vicreg.RECIPES["digits"]["embedding_dim"] ** 0.5)}
    monkeypatch.setattr(vicreg, "indicators", lambda *_: collapsed)
    train(vicreg, tmp_path)
    assert "warning: z_std is" in capsys.readouterr().out


def test_indicators_of_a_collapse_and_of_spread_embeddings():
    z = torch.ones(64, 16)
    found = vicreg.indicators(z, z)
    assert found["z_std"] < 1e-6 and found["dimension_std"] < 1e-6 and found["view_distance"] == 0
    z1, z2 = torch.randn(2, 20000, 16)
    found = vicreg.indicators(z1, z2)
    assert found["z_std"].item() == pytest.approx(1 / 4, rel=0.02)
    assert found["dimension_std"].item() == pytest.approx(1, rel=0.02)
    assert found["view_distance"].item() == pytest.approx(2, rel=0.02)
