import math

import numpy as np
import pytest
import torch

import simclr
from helpers import check_joined, joined, own_gradients, raw_collectives, train

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_papers():
    args = simclr.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.image_size, args.projector_dim, args.embedding_dim) == ("resnet50", 224, 2048, 128)  # noqa: E501
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (4096, 100, 0.3, 1e-6)
    assert (args.temperature, args.warmup_epochs, args.sync_bn) == (0.1, 10, True)
    assert args.crop_scale == [0.08, 1.0]
    assert (args.jitter_strength, args.blur) == (1.0, True)


def test_the_cifar10_recipe_is_that_of_the_official_readme():
    args = simclr.parse_args(["--recipe", "cifar10"])
    assert (args.arch, args.stem, args.image_size) == ("resnet18", "small", 32)
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (512, 1000, 1.0, 1e-6)
    assert (args.temperature, args.jitter_strength, args.blur) == (0.5, 0.5, False)


# -------------------------------------------------------------------------------------------- views


def test_photo_views_have_the_papers_strengths():
    args = simclr.parse_args(["--recipe", "imagenet"])
    first, second = simclr.build_views(args)
    assert first is second and first.size == (224, 224)
    assert first.geometry[0].scale == [0.08, 1.0]
    jitter = next(s for s in first.colour if type(s).__name__ == "ColorJitter")
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, jitter.p) == (0.8, 0.8, 0.8, 0.2, 0.8)  # noqa: E501
    blur = next(s for s in first.colour if type(s).__name__ == "GaussianBlur")
    assert (blur.sigma, blur.p) == ((0.1, 2.0), 0.5)


# -------------------------------------------------------------------------------------------- model


def small_model():
    backbone = simclr.backbones.build_backbone(
        "resnet_tiny", stem="small", in_chans=3, zero_init_residual=True
    )
    return simclr.SimCLR(backbone, projector_dim=32, embedding_dim=8)


def test_the_last_batch_norm_has_a_scale_and_no_shift():
    trainable = {n for n, p in small_model().named_parameters() if p.requires_grad}
    assert "projector.4.weight" in trainable and "projector.4.bias" not in trainable


# --------------------------------------------------------------------------------------------- loss


def loops(z1, z2, temperature):
    """Algorithm 1 of the paper, one number at a time."""
    rows = [row / math.sqrt((row**2).sum()) for pair in zip(z1, z2, strict=True) for row in pair]
    total = 0.0
    for i in range(len(rows)):
        positive = i + 1 if i % 2 == 0 else i - 1
        exponentials = [
            math.exp(float(rows[i] @ rows[j]) / temperature) if j != i else 0.0
            for j in range(len(rows))
        ]
        total -= math.log(exponentials[positive] / sum(exponentials))
    return total / len(rows)


def embeddings(n=12, d=5):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, d)), rng.normal(size=(n, d))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_equals_the_papers_loops(temperature):
    z1, z2 = embeddings()
    loss = simclr.nt_xent(torch.from_numpy(z1), torch.from_numpy(z2), temperature)
    assert loss.item() == pytest.approx(loops(z1, z2, temperature), rel=1e-12)


def test_nt_xent_of_embeddings_that_are_all_alike_is_chance():
    z = torch.ones(8, 3)
    assert simclr.nt_xent(z, 2 * z, 0.1).item() == pytest.approx(math.log(15), rel=1e-6)


def test_nt_xent_of_orthogonal_images_has_its_closed_form():
    z = torch.eye(6, dtype=torch.float64)
    expected = math.log(1 + 10 * math.exp(-1 / 0.5))
    assert simclr.nt_xent(z, z, 0.5).item() == pytest.approx(expected, rel=1e-12)


def test_nt_xent_does_not_see_the_length_of_embeddings_or_the_order_of_views():
    z1, z2 = map(torch.from_numpy, embeddings())
    loss = simclr.nt_xent(z1, z2, 0.2)
    assert torch.allclose(loss, simclr.nt_xent(3 * z2, 0.5 * z1, 0.2), rtol=1e-12)


def test_nt_xent_falls_as_views_of_an_image_come_together():
    z1, z2 = map(torch.from_numpy, embeddings())
    losses = [simclr.nt_xent(z1, z2.lerp(z1, t), 0.2).item() for t in (0.0, 0.5, 1.0)]
    assert losses[0] > losses[1] > losses[2]


def test_the_gradient_of_nt_xent_is_that_of_its_value():
    z1, z2 = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: simclr.nt_xent(a, b, 0.5), (z1, z2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nt_xent_computes_in_float32_at_least(dtype):
    z1, z2 = (torch.from_numpy(z).to(dtype) for z in embeddings())
    loss = simclr.nt_xent(z1, z2, 0.05)
    assert loss.dtype == torch.float32
    expected = loops(z1.double().numpy(), z2.double().numpy(), 0.05)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def own_gradient(z1, z2):
    return own_gradients(lambda a, b: simclr.nt_xent(a, b, 0.2), z1, z2)


def raw_gradient(z1, z2):
    with raw_collectives():
        return own_gradient(z1, z2)


@pytest.mark.parametrize("size", [2, 4])
def test_nt_xent_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *embeddings())


def test_the_gradient_test_fails_for_the_raw_collective(pool):
    z1, z2 = embeddings()
    alone = own_gradient(z1, z2)
    loss, grad, _ = joined(pool.run(2, raw_gradient, z1, z2))
    assert loss == pytest.approx(alone[0], rel=1e-9)  # the loss alone would not show it
    assert np.abs(grad - alone[1]).max() > 1e-2 * np.abs(alone[1]).max()


# --------------------------------------------------------------------------------------------- main


@pytest.mark.parametrize("dtype, steps, within", [("float64", 20, 1e-9), ("float32", 1, 1e-5)])
def test_with_sync_bn_two_processes_compute_what_one_does(pool, dtype, steps, within, tmp_path):
    one, two = (pool.run(size, first_losses, tmp_path / str(size), dtype, steps)[0]
                for size in (1, 2))
    assert len(one) == steps
    np.testing.assert_allclose(two, one, atol=within)


def first_losses(folder, dtype, steps):
    return train(simclr, folder, "--limit", 16 * steps, dtype=dtype)
