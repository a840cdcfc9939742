import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed

import simclr
from common import dist

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_papers():
    args = simclr.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.image_size, args.projector_dim, args.embedding_dim) == ("resnet50", 224, 2048, 128)  # noqa: E501
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (4096, 100, 0.3, 1e-6)
    assert (args.temperature, args.warmup_epochs, args.sync_bn) == (0.1, 10, True)
    assert (args.num_crops, args.crop_scales) == ([2], [0.08, 1.0])
    assert (args.jitter_strength, args.blur) == (1.0, True)


def test_the_multicrop_recipe_is_the_one_of_swavs_paper():
    args = simclr.parse_args(["--recipe", "imagenet_multicrop"])
    assert (args.num_crops, args.crop_sizes, args.image_size) == ([2, 4], [160, 96], 160)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--num-crops", "2", "4"], "--num-crops has 2 values, --crop-sizes 1"),
        (["--num-crops", "1"], "--num-crops 1"),
        (["--crop-scales", "1", "0.2"], "--crop-scales 1 0.2"),
        (["--image-size", "32", "--crop-sizes", "16"], "--image-size 32"),
    ],
)
def test_crops_that_do_not_fit_together_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        simclr.parse_args(flags)
    printed = capsys.readouterr().err
    assert named in printed and printed.count("\n") == 1


def test_the_cifar10_recipe_is_that_of_the_official_readme():
    args = simclr.parse_args(["--recipe", "cifar10"])
    assert (args.arch, args.stem, args.image_size) == ("resnet18", "small", 32)
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (512, 1000, 1.0, 1e-6)
    assert (args.temperature, args.jitter_strength, args.blur) == (0.5, 0.5, False)


def test_an_image_size_alone_sets_the_size_of_the_full_crops():
    args = simclr.parse_args(["--recipe", "imagenet_multicrop", "--image-size", "128"])
    assert (args.image_size, args.crop_sizes) == (128, [128, 96])


# -------------------------------------------------------------------------------------------- views


def test_photo_views_have_the_papers_strengths():
    first, second = simclr.photo_views([2], [224], [(0.08, 1)], 3, 1.0, True, [0.0] * 3, [1.0] * 3)
    assert first is second and first.size == (224, 224)
    jitter = next(s for s in first.colour if type(s).__name__ == "ColorJitter")
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, jitter.p) == (0.8, 0.8, 0.8, 0.2, 0.8)  # noqa: E501
    blur = next(s for s in first.colour if type(s).__name__ == "GaussianBlur")
    assert (blur.sigma, blur.p) == ((0.1, 2.0), 0.5)


def test_digit_views_never_mirror():
    view, _ = simclr.digit_views([2], [16], [(0.6, 1)], 3, 0.5, False, [0.5], [0.5])
    assert not any("Flip" in type(step).__name__ for step in view.geometry)


# -------------------------------------------------------------------------------------------- model


def small_model():
    backbone = simclr.backbones.build_backbone(
        "resnet_tiny", stem="small", in_chans=3, zero_init_residual=True
    )
    return simclr.SimCLR(backbone, projector_dim=32, embedding_dim=8)


def test_views_of_one_size_go_through_the_backbone_in_one_pass():
    model, calls = small_model(), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    views = [torch.rand(4, 3, side, side) for side in (16, 16, 8, 8, 8)]
    assert model(views[:2]).shape == (2, 4, 8) and len(calls) == 1
    assert model(views).shape == (5, 4, 8) and len(calls) == 3


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nt_xent_computes_in_float32_at_least(dtype):
    z1, z2 = (torch.from_numpy(z).to(dtype) for z in embeddings())
    loss = simclr.nt_xent(z1, z2, 0.05)
    assert loss.dtype == torch.float32
    expected = loops(z1.double().numpy(), z2.double().numpy(), 0.05)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def own_gradient(z1, z2, raw):
    """This process's share of the loss, and of its gradient averaged as DDP does."""
    if raw:  # what a script would do without the differentiable collective
        dist.all_gather_with_grad = dist.all_gather_no_grad
    share = len(z1) // dist.size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    a, b = (torch.from_numpy(z[own]).requires_grad_() for z in (z1, z2))
    loss = simclr.nt_xent(a, b, 0.2)
    loss.backward()
    return loss.item(), (a.grad / dist.size()).numpy(), (b.grad / dist.size()).numpy()


def own_gradient_with_raw_gather(z1, z2):
    kept = dist.all_gather_with_grad
    try:
        return own_gradient(z1, z2, raw=True)
    finally:
        dist.all_gather_with_grad = kept


def joined(parts):
    return (
        np.mean([p[0] for p in parts]),
        np.concatenate([p[1] for p in parts]),
        np.concatenate([p[2] for p in parts]),
    )


@pytest.mark.parametrize("size", [2, 4])
def test_nt_xent_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    z1, z2 = embeddings()
    alone = own_gradient(z1, z2, raw=False)
    parts = joined(pool.run(size, own_gradient, z1, z2, False))
    for got, wanted in zip(parts, alone, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-12)


def test_the_gradient_test_fails_for_the_raw_collective(pool):
    z1, z2 = embeddings()
    alone = own_gradient(z1, z2, raw=False)
    loss, grad, _ = joined(pool.run(2, own_gradient_with_raw_gather, z1, z2))
    assert loss == pytest.approx(alone[0], rel=1e-9)  # the loss alone would not show it
    assert np.abs(grad - alone[1]).max() > 1e-2 * np.abs(alone[1]).max()


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
    loss = simclr.multicrop_nt_xent(torch.from_numpy(z).flatten(0, 1), views, 0.2)
    assert loss.item() == pytest.approx(multicrop_loops(z, 0.2), rel=1e-12)


def test_multicrop_nt_xent_of_two_views_is_nt_xent():
    z1, z2 = map(torch.from_numpy, embeddings())
    two = simclr.multicrop_nt_xent(torch.cat([z1, z2]), 2, 0.2)
    assert two.item() == pytest.approx(simclr.nt_xent(z1, z2, 0.2).item(), rel=1e-12)


def test_multicrop_nt_xent_of_embeddings_that_are_all_alike_is_chance():
    z = torch.ones(4 * 6, 3)
    assert simclr.multicrop_nt_xent(z, 4, 0.1).item() == pytest.approx(math.log(21), rel=1e-6)


def own_multicrop_gradient(z, raw):
    kept = dist.all_gather_with_grad
    if raw:
        dist.all_gather_with_grad = dist.all_gather_no_grad
    try:
        share = z.shape[1] // dist.size()
        own = z[:, dist.rank() * share : (dist.rank() + 1) * share]
        leaf = torch.from_numpy(own.reshape(-1, z.shape[2]).copy()).requires_grad_()
        loss = simclr.multicrop_nt_xent(leaf, len(z), 0.2)
        loss.backward()
        return loss.item(), (leaf.grad / dist.size()).view(len(z), share, -1).numpy()
    finally:
        dist.all_gather_with_grad = kept


@pytest.mark.parametrize("size, raw", [(2, False), (4, False), (2, True)])
def test_multicrop_gradients_are_those_of_the_joined_batch_unless_gathered_raw(pool, size, raw):
    z = np.random.default_rng(3).normal(size=(3, 8, 5))
    loss, grad = own_multicrop_gradient(z, False)
    parts = pool.run(size, own_multicrop_gradient, z, raw)
    found = np.concatenate([g for _, g in parts], axis=1)
    assert np.mean([part[0] for part in parts]) == pytest.approx(loss, rel=1e-9)
    if raw:
        assert np.abs(found - grad).max() > 1e-2 * np.abs(grad).max()
    else:
        np.testing.assert_allclose(found, grad, rtol=1e-6, atol=1e-12)


class Plain(torch.nn.Module):
    """A model that treats images one by one."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 4 * 4, 5)

    def forward(self, views):
        return torch.stack([self.layer(view.flatten(1)).tanh() for view in views])


def gradients(make, views, chunk, cached):
    """Loss, gradients and buffers of one step, in the joined batch or in chunks of it."""
    torch.manual_seed(0)
    model = make().double()
    if dist.size() > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    share = len(views[0]) // dist.size()
    own = [torch.from_numpy(v[dist.rank() * share : (dist.rank() + 1) * share]) for v in views]
    if cached:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        loss, _ = simclr.backward_in_chunks(model, own, chunk, 0.2, contextlib.nullcontext, scaler)
    else:
        parts = zip(*[v.split(chunk) for v in own], strict=True)
        z = torch.cat([model(list(part)) for part in parts], dim=1)
        loss = simclr.contrast(z, 0.2)
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
    flags = ["--limit", "32", "--batch-size", "16", "--epochs", "1", "--warmup-epochs", "0",
             "--workers", "0", "--log-every", "1", "--no-sync-bn", "--output"]
    losses = []
    for name, extra in (("plain", []), ("whole", ["--grad-cache", "16"]),
                        ("half", ["--grad-cache", "8"])):
        simclr.main(simclr.parse_args([*flags, str(tmp_path / name), *extra]))
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-5)  # other batch statistics


def test_the_gradient_cache_excludes_sync_bn_and_needs_whole_chunks(capsys):
    for flags, named in ((["64"], "which --sync-bn excludes"),
                         (["100", "--no-sync-bn"], "--grad-cache 100 does not divide the 256")):
        with pytest.raises(SystemExit):
            simclr.parse_args(["--grad-cache", *flags])
        assert named in capsys.readouterr().err
    assert simclr.parse_args(["--grad-cache", "64", "--no-sync-bn"]).grad_cache == 64


# --------------------------------------------------------------------------------------------- main


def train(folder, dtype, steps):
    torch.set_default_dtype(getattr(torch, dtype))
    flags = ["--output", folder, "--limit", str(16 * steps), "--batch-size", "16", "--epochs", "1",
             "--warmup-epochs", "0", "--workers", "0", "--log-every", "1", "--sync-bn"]
    simclr.main(simclr.parse_args(flags))
    return [json.loads(line)["loss"] for line in (Path(folder) / "log.jsonl").open()]


def test_with_sync_bn_two_processes_compute_what_one_does(pool, tmp_path):
    one = pool.run(1, train, str(tmp_path / "one"), "float64", 20)[0]
    two = pool.run(2, train, str(tmp_path / "two"), "float64", 20)[0]
    assert len(one) == 20
    np.testing.assert_allclose(two, one, atol=1e-9)


def test_multicrop_trains(tmp_path):
    flags = ["--output", str(tmp_path), "--limit", "32", "--batch-size", "16", "--epochs", "1",
             "--warmup-epochs", "0", "--workers", "0", "--log-every", "1", "--num-crops", "2", "2",
             "--crop-sizes", "16", "8", "--crop-scales", "0.6", "1", "0.3", "0.6"]
    simclr.main(simclr.parse_args(flags))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_in_float32_the_first_loss_is_the_same_on_two_processes(pool, tmp_path):
    one = pool.run(1, train, str(tmp_path / "one"), "float32", 1)[0]
    two = pool.run(2, train, str(tmp_path / "two"), "float32", 1)[0]
    assert two[0] == pytest.approx(one[0], abs=1e-5)
