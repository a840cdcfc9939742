from unittest import mock

import numpy as np
import pytest
import torch

import barlow_twins
from helpers import check_joined, joined, own_gradients, raw_collectives

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_papers():
    args = barlow_twins.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.projector_dim, args.embedding_dim) == ("resnet50", 8192, 8192)
    assert (args.batch_size, args.epochs, args.lr) == (2048, 1000, 0.2)
    assert args.weight_decay == 16 * 1e-6  # likewise
    assert (args.lambda_, args.warmup_epochs, args.sync_bn) == (0.0051, 10, True)
    assert args.lr_biases == 0.0048 / 16  # the official gradient was 1/16 of the true one


def test_one_dimension_has_nothing_off_the_diagonal_and_is_refused(capsys):
    with pytest.raises(SystemExit):
        barlow_twins.parse_args(["--embedding-dim", "1"])
    printed = capsys.readouterr().err
    assert "'1' is not a whole number of at least 2" in printed and printed.count("\n") == 1
    assert barlow_twins.parse_args(["--embedding-dim", "2"]).embedding_dim == 2


# -------------------------------------------------------------------------------------------- views


def test_the_two_views_are_of_two_kinds():
    views = barlow_twins.build_views(barlow_twins.parse_args(["--recipe", "imagenet"]))
    for view, blur_p, solarize_p in zip(views, (1.0, 0.1), (0.0, 0.2), strict=True):
        steps = {type(step).__name__: step for step in view.geometry + view.colour}
        assert steps["GaussianBlur"].p == blur_p and steps["Solarize"].p == solarize_p
        jitter = steps["ColorJitter"]
        assert (jitter.brightness, jitter.contrast) == (0.4, 0.4)
        assert (jitter.saturation, jitter.hue, jitter.p) == (0.2, 0.1, 0.8)
        assert steps["RandomResizedCrop"].interpolation == "bicubic"


# -------------------------------------------------------------------------------------------- model


def test_each_view_has_its_own_batch_statistics():
    backbone = barlow_twins.backbones.build_backbone(
        "resnet_tiny", stem="small", in_chans=3, zero_init_residual=True
    )
    model = barlow_twins.BarlowTwins(backbone, projector_dim=16, embedding_dim=8)
    views = [torch.rand(6, 3, 16, 16), 5 + torch.rand(6, 3, 16, 16)]
    together = model(views)
    alone = [model([view])[0] for view in views]
    for z, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(z, expected)


# --------------------------------------------------------------------------------------------- loss


def embeddings(n=12, d=5):
    rng = np.random.default_rng(1)
    z1 = rng.normal(size=(n, d)) + 3
    return z1, z1 + rng.normal(size=(n, d))


def loops(z1, z2, lambda_):
    """Equations 1 and 2 of the paper, one number at a time."""
    n, d = z1.shape
    columns = []
    for z in (z1, z2):
        means = [sum(z[:, i]) / n for i in range(d)]
        variances = [sum((z[:, i] - means[i]) ** 2) / n for i in range(d)]
        columns.append([(z[:, i] - means[i]) / (variances[i] + 1e-5) ** 0.5 for i in range(d)])
    loss = 0.0
    for i in range(d):
        for j in range(d):
            c = sum(columns[0][i][row] * columns[1][j][row] for row in range(n)) / n
            loss += (1 - c) ** 2 if i == j else lambda_ * c**2
    return loss


@pytest.mark.parametrize("lambda_", [0.0, 0.0051, 1.0])
def test_the_loss_equals_the_papers_loops(lambda_):
    z1, z2 = embeddings()
    loss = barlow_twins.barlow_twins_loss(torch.from_numpy(z1), torch.from_numpy(z2), lambda_)
    assert loss.item() == pytest.approx(loops(z1, z2, lambda_), rel=1e-10)


def test_identical_views_have_nothing_on_the_diagonal():
    z = 100 * torch.from_numpy(embeddings(200)[0])  # eps does not count at this size
    assert barlow_twins.barlow_twins_loss(z, z, 0.0).item() < 1e-15


def test_opposite_views_lose_four_a_dimension():
    z = 100 * torch.from_numpy(embeddings(200)[0])
    assert barlow_twins.barlow_twins_loss(z, -z, 0.0).item() == pytest.approx(4 * 5, rel=1e-6)


def test_the_loss_does_not_see_shift_and_scale_of_a_view():
    z1, z2 = map(torch.from_numpy, embeddings(50))
    one, other = (barlow_twins.barlow_twins_loss(100 * z1, z, 0.5) for z in (100 * z2, 70 * z2 - 9))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_off_diagonal_is_a_view_of_all_that_is_off_the_diagonal():
    matrix = torch.arange(16.0).view(4, 4)
    found = barlow_twins.off_diagonal(matrix)
    assert sorted(found.flatten().tolist()) == [x for x in range(16) if x % 5]
    assert found.data_ptr() == matrix[0, 1].data_ptr()


def test_noise_scores_the_chance_loss():
    n, d = 4000, 64
    z1, z2 = torch.randn(2, n, d, dtype=torch.float64)
    expected = barlow_twins.chance_loss(n, d, 0.5)
    assert barlow_twins.barlow_twins_loss(z1, z2, 0.5).item() == pytest.approx(expected, rel=0.02)


def test_the_gradient_of_the_loss_is_that_of_its_value():
    z1, z2 = (torch.from_numpy(z).requires_grad_() for z in embeddings(n=4, d=3))
    loss = barlow_twins.barlow_twins_loss
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, 0.1), (z1, z2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_computes_in_float32_at_least(dtype):
    z1, z2 = (torch.from_numpy(z).to(dtype) for z in embeddings())
    loss = barlow_twins.barlow_twins_loss(z1, z2, 0.1)
    expected = loops(z1.double().numpy(), z2.double().numpy(), 0.1)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-4)


def own_gradient(z1, z2):
    return own_gradients(lambda a, b: barlow_twins.barlow_twins_loss(a, b, 0.1), z1, z2)


def raw_gradient(z1, z2):  # the sum over processes without its gradient, as in the official code
    with raw_collectives():
        return own_gradient(z1, z2)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *embeddings())


@pytest.mark.parametrize("size", [2, 4])
def test_the_raw_sum_gives_a_smaller_gradient(pool, size):
    z1, z2 = embeddings()
    alone = own_gradient(z1, z2)
    raw = joined(pool.run(size, raw_gradient, z1, z2))
    assert raw[0] == pytest.approx(alone[0], rel=1e-9)  # the loss alone would not show it
    assert np.abs(raw[1] - alone[1]).max() > 0.1 * np.abs(alone[1]).max()


def gradient_of_the_sum_alone(gradient):
    """A gradient of the loss where only the last sum is over processes."""
    with mock.patch.object(barlow_twins, "standardize", lambda z: z):
        return gradient(*embeddings())


@pytest.mark.parametrize("size", [2, 4])
def test_the_official_gradient_is_one_wth_of_the_true_one(pool, size):
    """Why `--lr-biases` is the official rate divided by the official number of processes."""
    true = joined(pool.run(size, gradient_of_the_sum_alone, own_gradient))
    official = joined(pool.run(size, gradient_of_the_sum_alone, raw_gradient))
    np.testing.assert_allclose(official[1], true[1] / size, rtol=1e-6)
