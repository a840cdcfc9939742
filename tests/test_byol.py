import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import byol
import helpers
from common import backbones, optim
from helpers import check_joined, own_gradients, own_rows

# --------------------------------------------------------------------------------------- parse_args


@pytest.mark.parametrize("recipe, epochs, lr, decay, momentum", [
    ("imagenet", 1000, 0.2, 1.5e-6, 0.996), ("imagenet_300", 300, 0.3, 1e-6, 0.99),
    ("imagenet_100", 100, 0.45, 1e-6, 0.99),
])
def test_the_imagenet_recipes_are_the_official_ones(recipe, epochs, lr, decay, momentum):
    args = byol.parse_args(["--recipe", recipe])
    assert (args.epochs, args.lr, args.weight_decay, args.momentum) == (epochs, lr, decay, momentum)
    assert (args.arch, args.batch_size, args.warmup_epochs) == ("resnet50", 4096, 10)
    assert (args.projector_dim, args.embedding_dim, args.predictor_dim) == (4096, 256, 4096)
    assert args.sync_bn and args.crop_scale == [0.08, 1.0]


# -------------------------------------------------------------------------------------------- views


def test_the_two_views_are_of_two_kinds():
    views = byol.build_views(byol.parse_args(["--recipe", "imagenet"]))
    for view, blur_p, solarize_p in zip(views, (1.0, 0.1), (0.0, 0.2), strict=True):
        steps = {type(step).__name__: step for step in view.geometry + view.colour}
        assert steps["GaussianBlur"].p == blur_p and steps["Solarize"].p == solarize_p
        jitter = steps["ColorJitter"]
        assert (jitter.brightness, jitter.contrast) == (0.4, 0.4)
        assert (jitter.saturation, jitter.hue, jitter.p) == (0.2, 0.1, 0.8)
        assert steps["RandomResizedCrop"].interpolation == "bicubic"


# -------------------------------------------------------------------------------------------- model


def small_model():
    backbone = backbones.build_backbone("resnet_tiny", stem="small", in_chans=3,
                                        zero_init_residual=True)
    return byol.BYOL(backbone, projector_dim=16, embedding_dim=8, predictor_dim=4)


def test_projector_and_predictor_are_the_papers():
    model = small_model()
    for head in (model.projector, model.predictor):
        names = [type(layer).__name__ for layer in head]
        assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert head[0].bias is not None and head[3].bias is None


def test_each_view_has_its_own_batch_statistics():
    model = small_model()
    views = [torch.rand(6, 3, 16, 16), 5 + torch.rand(6, 3, 16, 16)]
    together = model(views)
    for number, view in enumerate(views):
        for found, alone in zip(together, model([view]), strict=True):
            torch.testing.assert_close(found[number], alone[0])


def test_the_target_starts_as_a_copy_without_predictor_and_is_not_trained():
    model = small_model()
    target = byol.make_target(model)
    assert all(not p.requires_grad for p in target.parameters()) and target.training
    assert all(p.requires_grad for p in model.parameters())
    views = [torch.rand(6, 3, 16, 16)]
    z, same = target(views)
    assert torch.equal(z[0], same[0]) and torch.equal(z[0], model(views)[0][0])
    names = {name for name, _ in model.named_parameters() if not name.startswith("predictor")}
    assert {name for name, _ in target.named_parameters()} == names


# --------------------------------------------------------------------------------- loss and updates


def embeddings(n=8, d=5):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, d)), rng.normal(size=(n, d))


def loops(p, z):
    """Equation 2 of the paper, one number at a time."""
    total = 0.0
    for one, other in zip(p, z, strict=True):
        a, b = (math.sqrt(sum(x * x for x in row)) for row in (one, other))
        total += sum((x / a - y / b) ** 2 for x, y in zip(one, other, strict=True))
    return total / len(p)


def test_the_loss_equals_the_papers_loops():
    p, z = embeddings()
    loss = byol.byol_loss(torch.from_numpy(p), torch.from_numpy(z))
    assert loss.item() == pytest.approx(loops(p, z), rel=1e-12)


def test_the_loss_goes_from_0_to_4_whatever_the_lengths():
    p = torch.from_numpy(embeddings()[0])
    for z, wanted in ((p, 0), (3e-9 * p, 0), (-2 * p, 4), (0 * p, 2)):
        assert byol.byol_loss(p, z).item() == pytest.approx(wanted, abs=1e-12)
    noise = torch.randn(2, 4000, 64)
    assert byol.byol_loss(*noise).item() == pytest.approx(2, abs=0.02)  # half of chance


def test_the_gradient_is_that_of_the_value_and_none_reaches_the_target():
    p, z = (torch.from_numpy(x).requires_grad_() for x in embeddings(3))
    assert torch.autograd.gradcheck(lambda p: byol.byol_loss(p, z), p)
    byol.byol_loss(p, z).backward()
    assert p.grad.abs().sum() > 0 and z.grad is None


def test_a_row_of_norm_0_has_a_cosine_of_0_and_a_finite_gradient():
    p, z = (torch.from_numpy(x).float() for x in embeddings(4))
    p[1], z[2] = 0, 0
    p.requires_grad_()
    loss = byol.byol_loss(p, z)
    loss.backward()
    wanted = (2 * loops(p.detach()[[0, 3]].numpy(), z[[0, 3]].numpy()) + 2 + 2) / 4
    assert loss.item() == pytest.approx(wanted, rel=1e-5) and p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_computes_in_float32_at_least(dtype):
    p, z = (torch.from_numpy(x).to(dtype) for x in embeddings())
    loss = byol.byol_loss(p, z)
    expected = loops(p.double().numpy(), z.double().numpy())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def own_gradient(p, z):
    return own_gradients(lambda p: byol.byol_loss(p, own_rows(z)), p)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *embeddings())


def test_ema_moves_the_parameters_that_the_target_has():
    online = small_model()
    target = byol.make_target(online)
    before = copy.deepcopy(target.state_dict())
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1)
    online([torch.rand(6, 3, 16, 16)])
    byol.update_ema(target, online, 0.9)
    parameters = dict(target.named_parameters())
    for name, value in target.state_dict().items():
        moved = 0.9 * before[name] + 0.1 * online.state_dict()[name]
        torch.testing.assert_close(value, moved if name in parameters else before[name])


def test_the_indicator_tells_spread_from_collapse():
    spread = byol.indicators(torch.randn(4000, 64))["z_std"].item()
    assert spread == pytest.approx(1 / 8, rel=0.01)
    alike = torch.ones(50, 64) * torch.rand(50, 1)
    assert byol.indicators(alike)["z_std"].item() == pytest.approx(0, abs=1e-6)


# --------------------------------------------------------------------------------------------- main


RUN = ["--limit", "48", "--epochs", "4"]  # 3 steps each


def watched(folder, *flags):
    """Losses and target of a run in float64, and the order and momenta of its steps."""
    events, loss, ema, step = [], byol.byol_loss, byol.update_ema, optim.LARS.step

    def watch_loss(p, z):
        events.append("loss")
        assert p.requires_grad and not z.requires_grad
        return loss(p, z)

    def watch_ema(target, online, momentum):
        events.append(momentum)
        assert all(p.grad is None for p in target.parameters())
        ema(target, online, momentum)

    def watch_step(self, *args):
        events.append("step")
        return step(self, *args)

    with mock.patch.multiple(byol, byol_loss=watch_loss, update_ema=watch_ema), \
            mock.patch.object(optim.LARS, "step", watch_step):
        losses = helpers.train(byol, folder, *RUN, *flags)
    target = helpers.state_of(folder)["target"]["projector.3.weight"]
    return losses, target.numpy(), events


def test_each_step_predicts_both_targets_steps_and_then_moves_the_target(tmp_path):
    _, _, events = watched(tmp_path, "--momentum", "0.9")
    momenta = [1 - 0.1 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(12)]
    wanted = [event for m in momenta for event in ("loss", "loss", "step", pytest.approx(m))]
    assert events == wanted and momenta[0] == 0.9


def test_any_number_of_processes_computes_the_same(pool, tmp_path):
    losses, target, _ = pool.run(1, watched, tmp_path / "1")[0]
    for size in (2, 4):
        other_losses, other, _ = pool.run(size, watched, tmp_path / str(size))[0]
        np.testing.assert_allclose(other_losses, losses, atol=1e-9)
        np.testing.assert_allclose(other, target, atol=1e-9)


def test_a_stopped_run_goes_on_exactly(tmp_path):
    whole, target, _ = watched(tmp_path / "whole")

    class Stop(Exception):
        pass

    calls, ema = [], byol.update_ema

    def stop_in_the_third_epoch(*args):
        calls.append(1)
        if len(calls) == 8:
            raise Stop
        ema(*args)

    with mock.patch.object(byol, "update_ema", stop_in_the_third_epoch), pytest.raises(Stop):
        helpers.train(byol, tmp_path / "cut", *RUN)
    losses, found, _ = watched(tmp_path / "cut")
    assert losses == whole and (found == target).all()


def test_the_export_is_the_online_network(tmp_path):
    helpers.train(byol, tmp_path, *RUN, dtype="float32")
    state = helpers.state_of(tmp_path)
    exported = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert all(torch.equal(value, state["model"][f"backbone.{name}"])
               for name, value in exported.items())
    assert not torch.equal(exported["conv1.weight"], state["target"]["backbone.conv1.weight"])


def test_a_collapse_is_said(tmp_path, capsys, monkeypatch):
    def collapsed(model, views):
        still = 0 * sum(p.sum() for p in model.parameters())
        z = [torch.ones(len(view), 64) + still for view in views]
        return z, z

    monkeypatch.setattr(byol.BYOL, "forward", collapsed)
    losses = helpers.train(byol, tmp_path, *RUN, dtype="float32")
    assert losses == pytest.approx([0] * 12, abs=1e-5)  # nothing to be seen there
    assert "warning: z_std is" in capsys.readouterr().out


def test_both_forwards_of_a_step_see_the_same_views(tmp_path, monkeypatch):
    seen, forward = [], byol.BYOL.forward

    def look(model, views):
        seen.append((isinstance(model.predictor, nn.Identity), [v.sum().item() for v in views]))
        return forward(model, views)

    monkeypatch.setattr(byol.BYOL, "forward", look)
    helpers.train(byol, tmp_path, "--limit", "16")
    (online, views), (target, same) = seen
    assert (online, target) == (False, True) and views == same and views[0] != views[1]
