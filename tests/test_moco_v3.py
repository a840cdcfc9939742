import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import helpers
import moco_v3
from common import backbones, distributed as comm
from helpers import check_joined, joined, own_gradients, own_rows

VIT = ["--arch", "vit_micro", "--optimizer", "adamw", "--lr", "0.01"]

# --------------------------------------------------------------------------------------- parse_args


@pytest.mark.parametrize("recipe, epochs, lr, decay, momentum", [
    ("imagenet", 1000, 0.3, 1.5e-6, 0.996), ("imagenet_300", 300, 0.3, 1e-6, 0.99),
    ("imagenet_100", 100, 0.6, 1e-6, 0.99),
])
def test_the_recipes_of_resnet50_are_the_official_ones(recipe, epochs, lr, decay, momentum):
    args = moco_v3.parse_args(["--recipe", recipe])
    assert (args.epochs, args.lr, args.weight_decay, args.momentum) == (epochs, lr, decay, momentum)
    assert (args.arch, args.batch_size, args.warmup_epochs) == ("resnet50", 4096, 10)
    assert (args.hidden_dim, args.embedding_dim, args.temperature) == (4096, 256, 1.0)
    assert (args.optimizer, args.sync_bn, args.crop_scale) == ("lars", True, [0.2, 1.0])


@pytest.mark.parametrize("recipe, arch", [
    ("imagenet_vit_small", "vit_small_12heads"), ("imagenet_vit_base", "vit_base")])
def test_the_recipes_of_transformers_are_the_official_ones(recipe, arch):
    args = moco_v3.parse_args(["--recipe", recipe])
    assert (args.arch, args.patch_size, args.freeze_patches) == (arch, 16, True)
    assert (args.epochs, args.batch_size, args.warmup_epochs) == (300, 4096, 40)
    assert (args.optimizer, args.lr, args.weight_decay) == ("adamw", 1.5e-4, 0.1)
    assert (args.temperature, args.momentum, args.crop_scale) == (0.2, 0.99, [0.08, 1.0])


def test_an_image_that_is_no_multiple_of_the_patch_is_refused(capsys):
    with pytest.raises(SystemExit):
        moco_v3.parse_args(["--arch", "vit_micro", "--image-size", "18"])
    assert "--image-size 18 is not a multiple of --patch-size 4" in capsys.readouterr().err
    assert moco_v3.parse_args(["--image-size", "18"]).image_size == 18  # a ResNet's may be any


# -------------------------------------------------------------------------------------------- views


def test_the_two_views_are_of_two_kinds():
    views = moco_v3.build_views(moco_v3.parse_args(["--recipe", "imagenet"]))
    for view, blur_p, solarize_p in zip(views, (1.0, 0.1), (0.0, 0.2), strict=True):
        steps = {type(step).__name__: step for step in view.geometry + view.colour}
        assert steps["GaussianBlur"].p == blur_p and steps["Solarize"].p == solarize_p
        jitter = steps["ColorJitter"]
        assert (jitter.brightness, jitter.contrast) == (0.4, 0.4)
        assert (jitter.saturation, jitter.hue, jitter.p) == (0.2, 0.1, 0.8)
        assert steps["RandomResizedCrop"].interpolation == "bilinear"


# -------------------------------------------------------------------------------------------- model


def transformer(arch="vit_micro"):
    return backbones.build_backbone(arch, in_chans=3, image_size=16, patch_size=4,
                                    positions="sincos", drop_path=0.0)


def model_of(kind):
    backbone = transformer() if kind == "transformer" else backbones.build_backbone(
        "resnet_tiny", stem="small", in_chans=3, zero_init_residual=True)
    return moco_v3.MoCoV3(backbone, hidden_dim=16, embedding_dim=8)


@pytest.mark.parametrize("kind, projector, predictor", [
    ("ResNet", "LBRLb", "LBRL"), ("transformer", "LBRLBRLb", "LBRLb")])
def test_the_heads_are_the_official_ones(kind, projector, predictor):
    """Linear layers without bias; b: a batch norm without scale and shift."""
    model = model_of(kind)
    for head, wanted in ((model.projector, projector), (model.predictor, predictor)):
        found = "".join("b" if isinstance(layer, nn.BatchNorm1d) and not layer.affine
                        else type(layer).__name__[0] for layer in head)
        assert found == wanted
        assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
        assert head[-1 if wanted[-1] == "L" else -2].out_features == 8


@pytest.mark.parametrize("kind", ["ResNet", "transformer"])
def test_each_view_has_its_own_batch_statistics(kind):
    model = model_of(kind)
    views = [torch.rand(6, 3, 16, 16), 5 + torch.rand(6, 3, 16, 16)]
    for found, view in zip(model(views), views, strict=True):
        torch.testing.assert_close(found, model([view])[0])


def test_a_transformer_starts_as_the_papers():
    net = transformer("vit_tiny")
    moco_v3.start_transformer(net, freeze_patches=True)
    dim, still = 192, [name for name, p in net.named_parameters() if not p.requires_grad]
    assert still == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    state = net.state_dict()
    for name, value in state.items():
        if name.endswith("qkv.weight"):  # three square matrices
            bounds = [(part, math.sqrt(6 / (dim + dim))) for part in value.chunk(3)]
        elif name == "patch_embed.proj.weight":
            bounds = [(value, math.sqrt(6 / (3 * 4 * 4 + dim)))]
        elif value.ndim == 2:
            bounds = [(value, math.sqrt(6 / sum(value.shape)))]
        else:
            bounds = []
            if name.endswith("bias"):
                assert (value == 0).all(), name
        for part, bound in bounds:
            assert 0.99 * bound < part.abs().max() <= bound, name
            assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert 0 < state["cls_token"].abs().max() < 1e-5
    moco_v3.start_transformer(net, freeze_patches=False)
    assert net.patch_embed.proj.weight.requires_grad and not net.pos_embed.requires_grad


def test_the_positions_have_the_row_in_the_first_half():
    net = transformer()
    moco_v3.start_transformer(net, freeze_patches=True)
    table, half = net.pos_embed[0, 1:].view(4, 4, 96), 48
    assert all(torch.equal(table[2, 0, :half], table[2, c, :half]) for c in range(4))
    assert all(torch.equal(table[0, 2, half:], table[r, 2, half:]) for r in range(4))
    assert table[3, 1, 0].item() == pytest.approx(math.sin(3))
    assert table[3, 1, half].item() == pytest.approx(math.sin(1))
    assert (net.pos_embed[0, 0] == 0).all()


def test_a_small_transformer_has_twelve_heads_and_the_tensors_of_the_one_with_six():
    twelve, six = transformer("vit_small_12heads"), transformer("vit_small")
    assert {block.attn.num_heads for block in twelve.blocks} == {12}
    shapes = [{name: value.shape for name, value in net.state_dict().items()}
              for net in (twelve, six)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", ["ResNet", "transformer"])
def test_the_key_encoder_starts_as_a_copy_without_predictor_and_is_not_trained(kind):
    model = model_of(kind)
    keys = moco_v3.make_key_encoder(model)
    assert all(not p.requires_grad for p in keys.parameters()) and keys.training
    views = [torch.rand(6, 3, 16, 16)]
    torch.testing.assert_close(model.predictor(keys(views)[0]), model(views)[0])
    names = {name for name, _ in model.named_parameters() if not name.startswith("predictor")}
    assert {name for name, _ in keys.named_parameters()} == names


# --------------------------------------------------------------------------------- loss and updates


def embeddings(n=8, d=5):
    rng = np.random.default_rng(1)
    return rng.normal(size=(n, d)), rng.normal(size=(n, d))


def loops(q, k, temperature):
    """Algorithm 1 of the paper, one number at a time."""
    q, k = ([row / math.sqrt((row**2).sum()) for row in x] for x in (q, k))
    total = 0.0
    for i, query in enumerate(q):
        scores = [math.exp(query @ key / temperature) for key in k]
        total -= math.log(scores[i] / sum(scores))
    return 2 * temperature * total / len(q)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_the_loss_equals_the_papers_loops(temperature):
    q, k = embeddings()
    loss = moco_v3.contrastive_loss(torch.from_numpy(q), torch.from_numpy(k), temperature)
    assert loss.item() == pytest.approx(loops(q, k, temperature), rel=1e-12)


def test_closed_forms():
    ones, unit = torch.ones(8, 3, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for t in (0.2, 1.0):
        alike = moco_v3.contrastive_loss(ones, 2 * ones, t)
        assert alike.item() == pytest.approx(2 * t * math.log(8), rel=1e-12)  # chance
        apart = moco_v3.contrastive_loss(3 * unit, unit, t)
        assert apart.item() == pytest.approx(2 * t * math.log(1 + 5 * math.exp(-1 / t)), rel=1e-12)


def test_the_gradient_is_that_of_the_value_and_none_reaches_the_keys():
    q, k = (torch.from_numpy(x).requires_grad_() for x in embeddings(3))
    assert torch.autograd.gradcheck(lambda q: moco_v3.contrastive_loss(q, k, 0.5), q)
    moco_v3.contrastive_loss(q, k, 0.5).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_computes_in_float32_at_least(dtype):
    q, k = (torch.from_numpy(x).to(dtype) for x in embeddings())
    loss = moco_v3.contrastive_loss(q, k, 0.05)
    expected = loops(q.double().numpy(), k.double().numpy(), 0.05)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def own_gradient(q, k):
    """Keys have no gradient, so the gradient of the joined batch needs no collective for it."""
    return own_gradients(lambda q: moco_v3.contrastive_loss(q, own_rows(k), 0.2), q)


def lonely_gradient(q, k):  # each process with the keys of its own images alone
    keys = own_rows(k)

    def loss(q):
        with mock.patch.multiple(comm, all_gather_no_grad=lambda x: x, rank=lambda: 0):
            return moco_v3.contrastive_loss(q, keys, 0.2)

    return own_gradients(loss, q)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *embeddings())


@pytest.mark.parametrize("size", [2, 4])
def test_the_gradient_test_fails_without_the_other_processes_keys(pool, size):
    q, k = embeddings()
    alone = own_gradient(q, k)
    lonely = joined(pool.run(size, lonely_gradient, q, k))
    assert lonely[0] < alone[0] - 0.1
    assert np.abs(lonely[1] - alone[1]).max() > 0.05 * np.abs(alone[1]).max()


def test_ema_moves_all_parameters_that_the_key_encoder_has_fixed_ones_too():
    model = model_of("transformer")
    keys = moco_v3.make_key_encoder(model)
    before = copy.deepcopy(keys.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model([torch.rand(6, 3, 16, 16)])
    moco_v3.update_ema(keys, model, 0.9)
    parameters = dict(keys.named_parameters())
    assert "backbone.pos_embed" in parameters
    for name, value in keys.state_dict().items():
        moved = 0.9 * before[name] + 0.1 * model.state_dict()[name]
        torch.testing.assert_close(value, moved if name in parameters else before[name])


def test_the_indicators_tell_spread_from_collapse():
    q = torch.randn(400, 64)
    seen = moco_v3.indicators(q, 3 * q)
    assert seen["contrast_accuracy"] == 1 and seen["z_std"].item() == pytest.approx(1 / 8, rel=0.02)
    assert seen["positive_similarity"].item() == pytest.approx(1, rel=1e-5)
    seen = moco_v3.indicators(torch.ones(50, 64), torch.ones(50, 64))
    assert seen["z_std"].item() == pytest.approx(0, abs=1e-6) and seen["contrast_accuracy"] < 0.1


# --------------------------------------------------------------------------------------------- main


RUN = ["--limit", "48", "--epochs", "4"]  # 3 steps each


def watched(folder, *flags):
    """Losses and a key weight of a run in float64, and the order and momenta of its steps."""
    events, loss, ema = [], moco_v3.contrastive_loss, moco_v3.update_ema
    forward = moco_v3.MoCoV3.forward

    def watch_forward(model, views):
        events.append("k" if isinstance(model.predictor, nn.Identity) else "q")
        return forward(model, views)

    def watch_loss(q, k, temperature):
        events.append("loss")
        assert q.requires_grad and not k.requires_grad
        return loss(q, k, temperature)

    def watch_ema(key_encoder, model, momentum):
        events.append(momentum)
        assert all(p.grad is None for p in [*model.parameters(), *key_encoder.parameters()])
        ema(key_encoder, model, momentum)

    with mock.patch.multiple(moco_v3, contrastive_loss=watch_loss, update_ema=watch_ema), \
            mock.patch.object(moco_v3.MoCoV3, "forward", watch_forward):
        losses = helpers.train(moco_v3, folder, *RUN, *flags)
    return losses, helpers.state_of(folder)["key_encoder"]["projector.0.weight"].numpy(), events


def test_the_keys_come_after_the_update_of_their_encoder_which_comes_before_the_step(tmp_path):
    _, _, events = watched(tmp_path, "--momentum", "0.9")
    momenta = [1 - 0.1 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(12)]
    wanted = [event for m in momenta for event in ("q", pytest.approx(m), "k", "loss", "loss")]
    assert events == wanted and momenta[0] == 0.9


@pytest.mark.parametrize("flags", [[], VIT], ids=["ResNet", "transformer"])
def test_any_number_of_processes_computes_the_same(pool, tmp_path, flags):
    losses, keys, _ = pool.run(1, watched, tmp_path / "1", *flags)[0]
    for size in (2, 4):
        other_losses, other, _ = pool.run(size, watched, tmp_path / str(size), *flags)[0]
        np.testing.assert_allclose(other_losses, losses, atol=1e-9)
        np.testing.assert_allclose(other, keys, atol=1e-9)


@pytest.mark.parametrize("flags", [[], VIT], ids=["ResNet", "transformer"])
def test_a_stopped_run_goes_on_exactly(tmp_path, flags):
    whole, keys, _ = watched(tmp_path / "whole", *flags)

    class Stop(Exception):
        pass

    calls, ema = [], moco_v3.update_ema

    def stop_in_the_third_epoch(*args):
        calls.append(1)
        if len(calls) == 8:
            raise Stop
        ema(*args)

    with mock.patch.object(moco_v3, "update_ema", stop_in_the_third_epoch), pytest.raises(Stop):
        helpers.train(moco_v3, tmp_path / "cut", *RUN, *flags)
    losses, found, _ = watched(tmp_path / "cut", *flags)
    assert losses == whole and (found == keys).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_adamw_decays_every_parameter_and_the_patch_projection_stays_where_it_is_frozen(
    frozen, tmp_path
):
    groups, step = [], torch.optim.AdamW.step

    def remember(self, *args):
        groups.append([(g["lr"], g["weight_decay"], {p.ndim for p in g["params"]})
                       for g in self.param_groups])
        return step(self, *args)

    flags = [*VIT, "--weight-decay", "0.1", "--freeze-patches" if frozen else "--no-freeze-patches"]
    with mock.patch.object(torch.optim.AdamW, "step", remember):
        helpers.train(moco_v3, tmp_path, *RUN, *flags, dtype="float32")
    rates = [0.01 / 16 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(12)]
    assert [group for (group,) in groups] == [(pytest.approx(r), 0.1, {1, 2, 3, 4}) for r in rates]
    state = helpers.state_of(tmp_path)
    torch.manual_seed(0)
    args = moco_v3.parse_args(["--arch", "vit_micro"])
    net = transformer()
    moco_v3.start_transformer(net, frozen)
    assert args.freeze_patches
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        same = torch.equal(state["model"][f"backbone.{name}"], net.state_dict()[name])
        assert same == frozen, name


def test_a_collapse_is_said(tmp_path, capsys, monkeypatch):
    def collapsed(model, views):
        still = 0 * sum(p.sum() for p in model.parameters())
        return [torch.ones(len(view), 64) + still for view in views]

    monkeypatch.setattr(moco_v3.MoCoV3, "forward", collapsed)
    losses = helpers.train(moco_v3, tmp_path, *RUN, dtype="float32")
    temperature = moco_v3.RECIPES["digits"]["temperature"]
    assert losses == pytest.approx([4 * temperature * math.log(16)] * 12, rel=1e-5)
    assert "warning: z_std is" in capsys.readouterr().out
