import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn

import simclr
import simclr_multicrop
from common import distributed as comm
from helpers import check_joined, joined, own_gradients, own_rows, raw_collectives, train
from simclr_multicrop import grad_cache_backward, multicrop_nt_xent

# --------------------------------------------------------------------------------------- parse_args


def test_the_multicrop_recipe_is_the_one_of_swavs_paper():
    args = simclr_multicrop.parse_args(["--recipe", "imagenet"])
    assert (args.num_crops, args.crop_sizes, args.image_size) == ([2, 4], [160, 96], 160)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--crop-sizes", "16"], "--num-crops has 2 values, --crop-sizes 1"),
        (["--num-crops", "1", "2"], "--num-crops 1"),
        (["--crop-scales", "0.6", "1", "1", "0.2"], "--crop-scales 1 0.2"),
        (["--image-size", "32", "--crop-sizes", "16", "8"], "--image-size 32"),
    ],
)
def test_crops_that_do_not_fit_together_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        simclr_multicrop.parse_args(flags)
    printed = capsys.readouterr().err
    assert named in printed and printed.count("\n") == 1


def test_an_image_size_alone_sets_the_size_of_the_global_crops():
    args = simclr_multicrop.parse_args(["--recipe", "imagenet", "--image-size", "128"])
    assert (args.image_size, args.crop_sizes) == (128, [128, 96])


def test_what_is_not_about_crops_is_as_in_simclr():
    for name in ("imagenet", "cifar10"):
        recipe = simclr_multicrop.RECIPES[name]
        same = simclr.RECIPES[name].keys() & recipe.keys() - {"epochs"}
        assert {k: recipe[k] for k in same} == {k: simclr.RECIPES[name][k] for k in same}, name


# -------------------------------------------------------------------------------------------- views


def test_crops_come_global_ones_first_and_differ_from_simclrs_in_size_only():
    views = simclr_multicrop.build_views(simclr_multicrop.parse_args(["--recipe", "imagenet"]))
    assert [view.size[0] for view in views] == [160] * 2 + [96] * 4
    assert [view.geometry[0].scale for view in views[1:3]] == [(0.08, 1), (0.05, 0.14)]
    theirs, _ = simclr.build_views(simclr.parse_args(["--recipe", "imagenet"]))
    for view in views:
        for own, other in zip(view.geometry[1:] + view.colour, theirs.geometry[1:] + theirs.colour,
                              strict=True):
            assert type(own) is type(other) and vars(own) == vars(other)


# -------------------------------------------------------------------------------------------- model


def small_model():
    backbone = simclr_multicrop.backbones.build_backbone(
        "resnet_tiny", stem="small", in_chans=3, zero_init_residual=True
    )
    return simclr_multicrop.SimCLR(backbone, projector_dim=32, embedding_dim=8)


def test_views_of_one_size_go_through_the_backbone_in_one_pass():
    model, calls = small_model(), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    views = [torch.rand(4, 3, side, side) for side in (16, 16, 8, 8, 8)]
    assert model(views[:2]).shape == (2, 4, 8) and len(calls) == 1
    assert model(views).shape == (5, 4, 8) and len(calls) == 3


# --------------------------------------------------------------------------------------------- loss


def multicrop_loops(z, temperature):
    """z (V, N, D): one term for each ordered pair of views, one number at a time."""
    v, n, _ = z.shape
    z = z / np.sqrt((z**2).sum(2, keepdims=True))
    terms = []
    for i in range(n):
        for a in range(v):
            others = sum(math.exp(z[a, i] @ z[b, j] / temperature)
                         for j in range(n) if j != i for b in range(v))
            for p in range(v):
                if p != a:
                    positive = math.exp(z[a, i] @ z[p, i] / temperature)
                    terms.append(-math.log(positive / (positive + others)))
    return np.mean(terms)


@pytest.mark.parametrize("views", [2, 3, 5])
def test_multicrop_nt_xent_equals_loops(views):
    z = np.random.default_rng(2).normal(size=(views, 6, 5))
    loss = multicrop_nt_xent(torch.from_numpy(z).flatten(0, 1), views, 0.2)
    assert loss.item() == pytest.approx(multicrop_loops(z, 0.2), rel=1e-12)


def test_the_gradient_of_multicrop_nt_xent_is_that_of_its_value():
    z = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: multicrop_nt_xent(z, 3, 0.5), (z,))


def test_multicrop_nt_xent_of_two_views_is_nt_xent():
    z1, z2 = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 12, 5)))
    two = multicrop_nt_xent(torch.cat([z1, z2]), 2, 0.2)
    assert two.item() == pytest.approx(simclr.nt_xent(z1, z2, 0.2).item(), rel=1e-12)


def test_multicrop_nt_xent_of_embeddings_that_are_all_alike_is_chance():
    z = torch.ones(4 * 6, 3)
    assert multicrop_nt_xent(z, 4, 0.1).item() == pytest.approx(math.log(21), rel=1e-6)


def own_gradient(z):
    return own_gradients(lambda z: multicrop_nt_xent(z.flatten(0, 1), len(z), 0.2), z, dim=1)


def raw_gradient(z):
    with raw_collectives():
        return own_gradient(z)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, np.random.default_rng(3).normal(size=(3, 8, 5)), dim=1)


def test_the_gradient_test_fails_for_the_raw_collective(pool):
    z = np.random.default_rng(3).normal(size=(3, 8, 5))
    loss, grad = own_gradient(z)
    found = joined(pool.run(2, raw_gradient, z), dim=1)
    assert found[0] == pytest.approx(loss, rel=1e-9)
    assert np.abs(found[1] - grad).max() > 1e-2 * np.abs(grad).max()


# ----------------------------------------------------------------------------------- gradient cache


class Plain(nn.Module):
    """A model that treats images one by one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, 5)

    def forward(self, views):
        return torch.stack([self.layer(view.flatten(1)).tanh() for view in views])


def gradients(make, views, chunk, cached):
    """Loss, gradients and buffers of one step, in the joined batch or in chunks of it."""
    torch.manual_seed(0)
    model = make().double()
    if comm.size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    own = [own_rows(view) for view in views]
    if cached:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        loss, _ = grad_cache_backward(model, own, chunk, 0.2, contextlib.nullcontext, scaler)
    else:
        parts = zip(*[v.split(chunk) for v in own], strict=True)
        z = torch.cat([model(list(part)) for part in parts], dim=1)
        loss = multicrop_nt_xent(z.flatten(0, 1), len(z), 0.2)
        loss.backward()
    grads = [p.grad.numpy() for p in model.parameters() if p.requires_grad]
    return loss.item(), grads, [b.double().numpy() for b in model.buffers()]


@pytest.mark.parametrize("views, make, chunk", [(2, Plain, 2), (3, Plain, 4), (2, small_model, 4)])
def test_the_gradient_cache_is_exact(views, make, chunk):
    """Batch norm (the small model) has the statistics of a chunk in both."""
    views = np.random.default_rng(6).random((views, 8, 3, 4, 4))
    alike = gradients(make, list(views), 8 if make is Plain else chunk, cached=False)
    cached = gradients(make, list(views), chunk, cached=True)
    assert cached[0] == pytest.approx(alike[0], rel=1e-9)
    for got, wanted in zip(cached[1] + cached[2], alike[1] + alike[2], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-12)


def test_the_gradient_cache_is_exact_on_two_processes(pool):
    views = list(np.random.default_rng(6).random((2, 8, 3, 4, 4)))
    wanted = gradients(Plain, views, 8, cached=False)
    for _, grads, _ in pool.run(2, gradients, Plain, views, 2, True):
        for got, alone in zip(grads, wanted[1], strict=True):
            np.testing.assert_allclose(got, alone, rtol=1e-6, atol=1e-12)


def test_the_gradient_cache_trains_as_without_it_where_a_chunk_is_all(tmp_path):
    plain, whole, half = (
        train(simclr_multicrop, tmp_path / name, "--no-sync-bn", *flags, dtype="float32")
        for name, flags in (("plain", []), ("whole", ["--grad-cache", 16]),
                            ("half", ["--grad-cache", 8])))
    assert whole == pytest.approx(plain, rel=1e-5)
    assert half != pytest.approx(plain, rel=1e-5)  # other batch statistics


def test_the_gradient_cache_excludes_sync_bn_and_needs_whole_chunks(capsys):
    for flags, named in ((["64"], "which --sync-bn excludes"),
                         (["100", "--no-sync-bn"], "--grad-cache 100 does not divide the 256")):
        with pytest.raises(SystemExit):
            simclr_multicrop.parse_args(["--grad-cache", *flags])
        assert named in capsys.readouterr().err
    assert simclr_multicrop.parse_args(["--grad-cache", "64", "--no-sync-bn"]).grad_cache == 64
