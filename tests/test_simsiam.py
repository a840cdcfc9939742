import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import helpers
import simsiam
from common import backbones
from helpers import check_joined, own_gradients, own_rows

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_papers():
    args = simsiam.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.epochs, args.batch_size, args.lr) == ("resnet50", 100, 512, 0.05)
    assert (args.projector_dim, args.embedding_dim, args.predictor_dim) == (2048, 2048, 512)
    assert (args.weight_decay, args.warmup_epochs, args.sync_bn) == (1e-4, 0, True)
    assert args.fix_predictor_lr and args.crop_scale == [0.2, 1.0]


# -------------------------------------------------------------------------------------------- views


def test_both_views_are_moco_v2s():
    first, second = simsiam.build_views(simsiam.parse_args(["--recipe", "imagenet"]))
    assert first is second and first.geometry[0].interpolation == "bilinear"
    steps = {type(step).__name__: step for step in first.colour}
    jitter = steps["ColorJitter"]
    assert (jitter.brightness, jitter.contrast) == (0.4, 0.4)
    assert (jitter.saturation, jitter.hue, jitter.p) == (0.4, 0.1, 0.8)
    assert steps["GaussianBlur"].p == 0.5 and steps["Grayscale"].p == 0.2


# -------------------------------------------------------------------------------------------- model


def small_model():
    backbone = backbones.build_backbone("resnet_tiny", stem="small", in_chans=3,
                                        zero_init_residual=True)
    return simsiam.SimSiam(backbone, projector_dim=16, embedding_dim=8, predictor_dim=4)


def test_the_layers_are_the_papers():
    """Three layers with batch norm, the last without scale and shift; a bottleneck of two."""
    model = small_model()
    names = [type(layer).__name__ for layer in model.projector]
    assert names == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert not model.projector[7].affine
    names = [type(layer).__name__ for layer in model.predictor]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    biases = [name for name, layer in model.named_modules()
              if isinstance(layer, nn.Linear) and layer.bias is not None]
    assert biases == ["projector.6", "predictor.3"]
    still = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert still == ["projector.6.bias"]


def test_each_view_has_its_own_batch_statistics():
    model = small_model()
    views = [torch.rand(6, 3, 16, 16), 5 + torch.rand(6, 3, 16, 16)]
    together = model(views)
    for number, view in enumerate(views):
        for found, alone in zip(together, model([view]), strict=True):
            torch.testing.assert_close(found[number], alone[0])


# --------------------------------------------------------------------------------------------- loss


def embeddings(n=8, d=5):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, d)), rng.normal(size=(n, d))


def loops(p, z):
    """Equation 1 of the paper, one number at a time."""
    total = 0.0
    for one, other in zip(p, z, strict=True):
        dot = sum(a * b for a, b in zip(one, other, strict=True))
        total -= dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))
    return total / len(p)


def test_the_loss_equals_the_papers_loops():
    p, z = embeddings()
    loss = simsiam.negative_cosine(torch.from_numpy(p), torch.from_numpy(z))
    assert loss.item() == pytest.approx(loops(p, z), rel=1e-12)


def test_the_loss_goes_from_minus_1_to_1_whatever_the_lengths():
    p = torch.from_numpy(embeddings()[0])
    for z, wanted in ((p, -1), (3e-9 * p, -1), (-2 * p, 1), (p.roll(1, 1) * 0, 0)):
        assert simsiam.negative_cosine(p, z).item() == pytest.approx(wanted, abs=1e-12)


def test_the_gradient_is_that_of_the_value_and_none_reaches_what_is_predicted():
    p, z = (torch.from_numpy(x).requires_grad_() for x in embeddings(3))
    assert torch.autograd.gradcheck(lambda p: simsiam.negative_cosine(p, z), p)
    simsiam.negative_cosine(p, z).backward()
    assert p.grad.abs().sum() > 0 and z.grad is None


def test_a_row_of_norm_0_has_a_cosine_of_0_and_a_finite_gradient():
    p, z = (torch.from_numpy(x).float() for x in embeddings(4))
    p[1], z[2] = 0, 0
    p.requires_grad_()
    loss = simsiam.negative_cosine(p, z)
    loss.backward()
    wanted = (2 * loops(p.detach()[[0, 3]].numpy(), z[[0, 3]].numpy())) / 4
    assert loss.item() == pytest.approx(wanted, rel=1e-5) and p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_computes_in_float32_at_least(dtype):
    p, z = (torch.from_numpy(x).to(dtype) for x in embeddings())
    loss = simsiam.negative_cosine(p, z)
    expected = loops(p.double().numpy(), z.double().numpy())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def own_gradient(p, z):
    return own_gradients(lambda p: simsiam.negative_cosine(p, own_rows(z)), p)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *embeddings())


def test_the_indicator_tells_spread_from_collapse():
    spread, n = simsiam.indicators(torch.randn(4000, 64))["z_std"].item(), 64
    assert spread == pytest.approx(1 / math.sqrt(n), rel=0.01)
    alike = torch.ones(50, n) * torch.rand(50, 1)
    assert simsiam.indicators(alike)["z_std"].item() == pytest.approx(0, abs=1e-6)


# --------------------------------------------------------------------------------------------- main


RUN = ["--limit", "48", "--epochs", "4"]  # 3 steps each


def rates_of_a_run(folder, *flags):
    """The rates of both groups at every step."""
    seen, step = [], torch.optim.SGD.step

    def remember(self, *args):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    with mock.patch.object(torch.optim.SGD, "step", remember):
        helpers.train(simsiam, folder, *RUN, *flags, dtype="float32")
    return seen


def test_the_predictor_keeps_its_rate_while_that_of_the_rest_falls_once_an_epoch(tmp_path):
    rates = rates_of_a_run(tmp_path / "fixed", "--lr", "0.16")
    falling = [0.01 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [rate for rate, _ in rates] == pytest.approx([x for x in falling for _ in range(3)])
    assert [rate for _, rate in rates] == pytest.approx([0.01] * 12)
    rates = rates_of_a_run(tmp_path / "falling", "--lr", "0.16", "--no-fix-predictor-lr")
    assert all(rate == other for rate, other in rates)


def losses_and_weights(folder, *flags):
    losses = helpers.train(simsiam, folder, *RUN, *flags)
    return losses, helpers.state_of(folder)["model"]["predictor.0.weight"].numpy()


def test_any_number_of_processes_computes_the_same(pool, tmp_path):
    losses, weights = pool.run(1, losses_and_weights, tmp_path / "1")[0]
    assert len(losses) == 12
    for size in (2, 4):
        other_losses, other_weights = pool.run(size, losses_and_weights, tmp_path / str(size))[0]
        np.testing.assert_allclose(other_losses, losses, atol=1e-9)
        np.testing.assert_allclose(other_weights, weights, atol=1e-9)


def test_a_stopped_run_goes_on_exactly(tmp_path):
    whole, weights = losses_and_weights(tmp_path / "whole")

    class Stop(Exception):
        pass

    calls, loss = [], simsiam.negative_cosine

    def stop_in_the_third_epoch(p, z):
        calls.append(1)
        if len(calls) == 15:
            raise Stop
        return loss(p, z)

    with mock.patch.object(simsiam, "negative_cosine", stop_in_the_third_epoch), \
            pytest.raises(Stop):
        losses_and_weights(tmp_path / "cut")
    losses, found = losses_and_weights(tmp_path / "cut")
    assert losses == whole and (found == weights).all()


def test_a_collapse_is_said(tmp_path, capsys, monkeypatch):
    def collapsed(model, views):
        still = 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        z = [torch.ones(len(view), 64) + still for view in views]
        return z, z

    monkeypatch.setattr(simsiam.SimSiam, "forward", collapsed)
    losses = helpers.train(simsiam, tmp_path, *RUN, dtype="float32")
    assert losses == pytest.approx([-1] * 12)  # nothing to be seen there
    assert "warning: z_std is" in capsys.readouterr().out
