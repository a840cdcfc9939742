import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import dino
import helpers
import moco
from common import backbones, optim
from helpers import check_joined, own_gradients, own_rows

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_papers():
    args = dino.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.patch_size, args.drop_path) == ("vit_small", 16, 0.1)
    assert (args.num_crops, args.crop_sizes) == ([2, 8], [224, 96])
    assert args.crop_scales == [0.4, 1.0, 0.05, 0.4] and args.image_size == 224
    assert (args.hidden_dim, args.bottleneck_dim, args.num_outputs) == (2048, 256, 65536)
    assert not args.bn_in_head
    assert (args.norm_last_layer, args.freeze_last_layer_epochs) == (False, 1)
    assert (args.student_temperature, args.teacher_temperature) == (0.1, 0.07)
    assert args.warmup_teacher_temperature == 0.04
    assert args.warmup_teacher_temperature_epochs == 30
    assert (args.center_momentum, args.momentum, args.clip_per_parameter) == (0.9, 0.996, 3.0)
    assert (args.optimizer, args.lr, args.warmup_epochs) == ("adamw", 5e-4, 10)
    assert (args.weight_decay, args.final_weight_decay) == (0.04, 0.4)
    assert (args.batch_size, args.epochs) == (1024, 300)
    assert args.final_lr * args.batch_size / 256 == pytest.approx(1e-6)  # not scaled officially


def test_the_resnet_recipe_is_the_official_readmes():
    args = dino.parse_args(["--recipe", "imagenet_resnet50"])
    assert (args.arch, args.optimizer, args.lr, args.sync_bn) == ("resnet50", "sgd", 0.03, True)
    assert (args.weight_decay, args.final_weight_decay) == (1e-4, 1e-4)
    assert args.crop_scales == [0.14, 1.0, 0.05, 0.14]
    assert (args.teacher_temperature, args.warmup_teacher_temperature_epochs) == (0.04, 0)
    assert args.norm_last_layer and args.batch_size == 512
    assert args.final_lr * args.batch_size / 256 == pytest.approx(1e-6)


TRANSFORMER = ["--arch", "vit_micro", "--num-crops", "2", "2", "--crop-sizes", "16", "8",
               "--crop-scales", "0.6", "1", "0.3", "0.6"]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--crop-sizes", "16", "10"], "--crop-sizes 16 10 are not all multiples of --patch-size"),
        (["--num-crops", "1", "4"], "--num-crops 1"),
        (["--teacher-temperature", "0"], "'0'"),
        (["--momentum", "1.5"], "'1.5'"),
        (["--arch", "resnet18", "--grad-checkpoint"], "batches of --arch resnet18 twice"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        dino.parse_args([*TRANSFORMER, *flags])
    assert named in capsys.readouterr().err
    dino.parse_args([*TRANSFORMER, "--arch", "resnet_tiny", "--crop-sizes", "16", "10"])


def test_stochastic_depth_of_a_resnet_is_refused(capsys):
    with pytest.raises(SystemExit):
        dino.parse_args(["--arch", "resnet_tiny", "--drop-path", "0.1"])
    assert "--drop-path is for transformers" in capsys.readouterr().err
    assert dino.parse_args(["--arch", "vit_micro", "--drop-path", "0.1"]).drop_path == 0.1


# -------------------------------------------------------------------------------------------- views


def test_crops_have_the_papers_blur_and_solarisation():
    views = dino.build_views(dino.parse_args(["--recipe", "imagenet"]))
    assert [view.size[0] for view in views] == [224] * 2 + [96] * 8
    assert [view.geometry[0].scale for view in views[1:3]] == [(0.4, 1), (0.05, 0.4)]
    assert {view.geometry[0].interpolation for view in views} == {"bicubic"}
    for view, blur_p, solarize_p in zip(views, [1, 0.1] + [0.5] * 8, [0, 0.2] + [0] * 8,
                                        strict=True):
        jitter, gray, blur, solarize, _ = view.colour
        assert (jitter.brightness, jitter.contrast, jitter.saturation) == (0.4, 0.4, 0.2)
        assert (jitter.hue, jitter.p, gray.p) == (0.1, 0.8, 0.2)
        assert (blur.p, blur.sigma) == (blur_p, (0.1, 2.0))
        assert (solarize.p, solarize.threshold * 255) == (solarize_p, 128)


# -------------------------------------------------------------------------------------------- model


def small_model(arch="vit_micro", norm_last_layer=True, drop_path=0.0):
    torch.manual_seed(0)
    backbone = backbones.build_backbone(
        arch, in_chans=3, stem="small", zero_init_residual=False, image_size=16, patch_size=4,
        positions="learned", drop_path=drop_path,
    )
    return dino.DINO(backbone, 32, 8, 20, norm_last_layer, bn_in_head=False)


@pytest.mark.parametrize("arch", ["vit_micro", "resnet_tiny"])
def test_the_backbone_is_called_once_per_resolution(arch):
    model, sizes = small_model(arch), []
    model.backbone.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape))
    z, logits = model([torch.rand(4, 3, side, side) for side in (16, 16, 8, 8, 8)])
    assert [tuple(shape) for shape in sizes] == [(8, 3, 16, 16), (12, 3, 8, 8)]
    assert z.shape == (5, 4, 8) and logits.shape == (5, 4, 20)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(5, 4))


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_the_last_layer_is_torchs_weight_norm(norm_last_layer):
    model = small_model(norm_last_layer=norm_last_layer)
    directions, scales = model.last_layer["directions"], model.last_layer["scales"]
    assert (directions.abs() <= 8**-0.5).all() and directions.abs().max() > 0.34
    assert torch.equal(scales, torch.ones(20, 1)) and scales.requires_grad != norm_last_layer
    scales.data = torch.rand(20, 1) + 0.5
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(8, 20, bias=False))
    theirs.parametrizations.weight.original0.data.copy_(scales)
    theirs.parametrizations.weight.original1.data.copy_(directions)
    z, logits = model([torch.rand(3, 3, 16, 16)] * 2)
    torch.testing.assert_close(logits, theirs(z))


def test_linear_layers_start_truncated_normal_with_biases_of_0():
    backbone = small_model().backbone
    model = dino.DINO(backbone, 256, 64, 20, True, bn_in_head=True)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 4 * 4 + 3
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0).all()


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        z, logits = small_model()([torch.rand(3, 3, 16, 16)] * 2)
    assert z.dtype == logits.dtype == torch.float32


def test_the_teacher_is_a_copy_without_gradient_and_without_stochastic_depth():
    student = small_model(drop_path=0.9)
    teacher = dino.make_teacher(student)
    images = [torch.rand(8, 3, 16, 16)] * 2
    one, other = teacher(images)[1], teacher(images)[1]
    assert torch.equal(one, other) and not one.requires_grad and teacher.training
    assert not torch.equal(student(images)[1], student(images)[1])
    torch.testing.assert_close(one, student.eval()(images)[1])
    assert [block.drop_path for block in student.backbone.blocks][-1] == pytest.approx(0.9)
    assert all(p.requires_grad for p in student.backbone.parameters())


# --------------------------------------------------------------------------------- loss and updates


def tensors(v=4, g=2, n=8, k=5):
    rng = np.random.default_rng(3)
    return rng.normal(size=(v, n, k)), rng.normal(size=(g, n, k)), rng.normal(size=k)


def loops(student, teacher, center, student_temperature, teacher_temperature):
    """Algorithm 1 with multi-crop (equation 3), one number at a time."""
    def softmax(row):
        powers = [math.exp(x) for x in row]
        return [x / sum(powers) for x in powers]

    terms = []
    for g in range(len(teacher)):
        for v in range(len(student)):
            if v == g:
                continue
            for n in range(student.shape[1]):
                target = softmax((teacher[g, n] - center) / teacher_temperature)
                predicted = softmax(student[v, n] / student_temperature)
                terms.append(-sum(t * math.log(p) for t, p in zip(target, predicted, strict=True)))
    return np.mean(terms)


@pytest.mark.parametrize("v, g", [(2, 2), (4, 2), (5, 3)])
def test_the_loss_equals_the_papers_loops(v, g):
    student, teacher, center = tensors(v, g)
    loss = dino.dino_loss(*map(torch.from_numpy, (student, teacher, center)), 0.1, 0.04)
    assert loss.item() == pytest.approx(loops(student, teacher, center, 0.1, 0.04), rel=1e-12)


def test_zero_logits_give_ln_k_exactly():
    given = torch.zeros(4, 3, 16), torch.zeros(2, 3, 16), torch.zeros(16)
    loss = dino.dino_loss(*(x.double() for x in given), 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(16), rel=1e-14)
    assert dino.dino_loss(*given, 0.1, 0.04).item() == pytest.approx(math.log(16), rel=1e-6)


def test_no_gradient_reaches_teacher_and_center_and_the_students_is_the_closed_form():
    student, teacher, center = (torch.from_numpy(x).requires_grad_() for x in tensors(v=3))
    dino.dino_loss(student, teacher, center, 0.1, 0.5).backward()
    assert teacher.grad is None and center.grad is None
    p = (student / 0.1).softmax(2).detach()
    q = ((teacher - center) / 0.5).softmax(2).detach()
    wanted = torch.stack([p[0] - q[1], p[1] - q[0], 2 * p[2] - q[0] - q[1]]) / (0.1 * 2 * 2 * 8)
    torch.testing.assert_close(student.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_computes_in_float32_at_least(dtype):
    student, teacher, center = map(torch.from_numpy, tensors())
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = dino.dino_loss(student, teacher, center.float(), 0.1, 0.04)
    expected = loops(student.double().numpy(), teacher.double().numpy(), center.numpy(), 0.1, 0.04)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def own_gradient(student, teacher, center):
    teacher, center = own_rows(teacher, dim=1), torch.from_numpy(center)
    return own_gradients(lambda x: dino.dino_loss(x, teacher, center, 0.1, 0.04), student, dim=1)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *tensors(), dim=1)


def moved_center(teacher, center):
    center = torch.from_numpy(center.copy())
    dino.update_center(center, own_rows(teacher, dim=1), 0.9)
    return center.numpy()


@pytest.mark.parametrize("size", [2, 4])
def test_the_center_moves_alike_on_any_number_of_processes(pool, size):
    _, teacher, center = tensors()
    alone = moved_center(teacher, center)
    for found in pool.run(size, moved_center, teacher, center):
        np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_the_center_moves_to_the_mean_of_all_rows():
    _, teacher, center = tensors()
    moved = torch.from_numpy(center.copy())
    dino.update_center(moved, torch.from_numpy(teacher), 0.9)
    rows = [row for crop in teacher for row in crop]
    np.testing.assert_allclose(moved, 0.9 * center + 0.1 * sum(rows) / len(rows), rtol=1e-12)
    moved = torch.zeros(5)
    dino.update_center(moved, torch.from_numpy(teacher).bfloat16(), 0.0)
    assert moved.dtype == torch.float32
    np.testing.assert_allclose(moved, teacher.mean((0, 1)), atol=0.01)


def test_ema_moves_parameters_only_and_is_mocos():
    student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    teacher = copy.deepcopy(student)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    student(torch.randn(5, 2))
    by_moco = copy.deepcopy(teacher)
    dino.update_ema(teacher, student, 0.9)
    moco.update_ema(by_moco, student, 0.9)
    for name, value in teacher.state_dict().items():
        moved = 0.9 * before[name] + 0.1 * student.state_dict()[name]
        parameter = name in dict(teacher.named_parameters())
        torch.testing.assert_close(value, moved if parameter else before[name])
        assert torch.equal(value, by_moco.state_dict()[name])


def test_gradients_are_clipped_one_parameter_at_a_time():
    module = nn.Linear(2, 2)
    module.weight.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # norm 5
    module.bias.grad = torch.tensor([0.3, 0.4])  # norm 0.5: stays
    dino.clip_per_parameter(module, 1.0)
    torch.testing.assert_close(module.weight.grad, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(module.bias.grad, torch.tensor([0.3, 0.4]))
    module.bias.grad = None
    dino.clip_per_parameter(module, 0.5)
    assert module.weight.grad.norm().item() == pytest.approx(0.5, rel=1e-5)


# ---------------------------------------------------------------------------------------- schedules


def test_the_teachers_temperature_rises_once_an_epoch_and_reaches_its_end_one_epoch_early():
    table = dino.temperature_schedule(0.04, 0.07, warmup_epochs=4, epochs=6)
    assert table == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert dino.temperature_schedule(0.04, 0.07, 0, 3) == [0.07] * 3
    assert dino.temperature_schedule(0.04, 0.07, 4, 2) == pytest.approx([0.04, 0.05])


def test_the_tables_of_rate_decay_and_momentum_are_the_official_ones():
    rates = optim.warmup_cosine(start=0.0, base=1.0, final=0.0, warmup_steps=6, total_steps=20,
                                warmup_endpoint=True)
    found = [rates[step] for step in (0, 1, 4, 5, 6, 7, 18, 19)]
    assert found == pytest.approx([0, 0.2, 0.8, 1, 1, 0.9875, 0.0495, 0.0125], abs=1e-4)
    momenta = optim.cosine(0.99, 1.0, 20)
    assert [momenta[step] for step in (0, 10, 19)] == pytest.approx([0.99, 0.995, 0.999938])


# ------------------------------------------------------------------------------------------- bounds


def test_the_indicators_name_both_ways_to_collapse():
    z = nn.functional.normalize(torch.randn(6, 8), dim=1)
    zeros, center = torch.zeros(2, 6, 16), torch.zeros(16)
    loss = dino.dino_loss(torch.zeros(4, 6, 16), zeros, center, 0.1, 0.04)
    seen = dino.indicators(z, zeros, center, 0.04, loss)
    assert seen["teacher_entropy"].item() == pytest.approx(math.log(16), rel=1e-6)
    assert seen["teacher_student_kl"].item() == pytest.approx(0, abs=1e-5)
    assert seen["z_std"].item() == pytest.approx(z.std(0, correction=0).mean().item())
    one_hot = torch.zeros(2, 6, 16)
    one_hot[..., 3] = 9
    seen = dino.indicators(z, one_hot, center, 0.04, loss)
    assert seen["teacher_entropy"].item() == pytest.approx(0, abs=1e-6)
    student, teacher, center = map(torch.from_numpy, tensors())
    loss = dino.dino_loss(student, teacher, center, 0.1, 0.04)
    kl = []
    for g in range(2):
        for v in range(4):
            if v != g:
                target = ((teacher[g] - center) / 0.04).softmax(1)
                log_p = (student[v] / 0.1).log_softmax(1)
                kl.append(nn.functional.kl_div(log_p, target, reduction="batchmean").item())
    seen = dino.indicators(z, teacher, center, 0.04, loss)
    assert seen["teacher_student_kl"].item() == pytest.approx(np.mean(kl), rel=1e-9)


# --------------------------------------------------------------------------------------------- main

RUN = ["--limit", "64", "--epochs", "2", "--freeze-last-layer-epochs", "1", *TRANSFORMER]


def train(folder, *flags, dtype="float64"):
    return helpers.train(dino, folder, *RUN, *flags, dtype=dtype)


def watched(folder, *flags):
    """Losses and centre of a run in float64, and what each step used and left behind."""
    steps, loss_of, ema_of, center_of = [], dino.dino_loss, dino.update_ema, dino.update_center

    def watch_loss(student, teacher, center, *temperatures):
        steps.append({"crops": (len(student), len(teacher)), "temperature": temperatures[1],
                      "center": center.clone().numpy(), "events": ["loss"]})
        return loss_of(student, teacher, center, *temperatures)

    def watch_ema(teacher, student, momentum):
        steps[-1]["events"].append("ema")
        steps[-1]["momentum"] = momentum
        steps[-1]["frozen"] = student.last_layer.directions.grad is None
        steps[-1]["directions"] = student.last_layer.directions.detach().clone().numpy()
        assert all(p.grad is None for p in teacher.parameters())
        ema_of(teacher, student, momentum)

    def watch_center(center, teacher, momentum):
        steps[-1]["events"].append("center")
        center_of(center, teacher, momentum)

    with mock.patch.multiple(dino, dino_loss=watch_loss, update_ema=watch_ema,
                             update_center=watch_center):
        losses = train(folder, *flags)
    return losses, helpers.state_of(folder)["center"].numpy(), steps


def test_recomputed_blocks_change_nothing(tmp_path):
    flags = ["--drop-path", "0.5", "--epochs", "1"]
    losses, center, _ = watched(tmp_path / "kept", *flags)
    other_losses, same, _ = watched(tmp_path / "twice", *flags, "--grad-checkpoint")
    assert other_losses == losses and (same == center).all()


@pytest.mark.parametrize("flags", [[], ["--arch", "resnet_tiny", "--optimizer", "sgd"]])
def test_any_number_of_processes_computes_the_same(pool, tmp_path, flags):
    flags = ["--limit", "48", *flags]
    losses, center, _ = pool.run(1, watched, tmp_path / "1", *flags)[0]
    for size in (2, 4):
        other = pool.run(size, watched, tmp_path / str(size), *flags)[0]
        np.testing.assert_allclose(other[0], losses, rtol=1e-6)
        np.testing.assert_allclose(other[1], center, rtol=1e-6, atol=1e-9)


def test_each_step_follows_its_schedules_and_the_order_of_updates(tmp_path):
    flags = ["--warmup-teacher-temperature-epochs", "2", "--teacher-temperature", "0.07",
             "--momentum", "0.99"]
    _, center, steps = watched(tmp_path, *flags)
    assert [step["crops"] for step in steps] == [(4, 2)] * 8  # the teacher's are the global ones
    assert [step["temperature"] for step in steps] == [0.03] * 4 + [0.07] * 4
    assert [step["momentum"] for step in steps] == pytest.approx(
        [1 - 0.01 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)])
    assert all(step["events"] == ["loss", "ema", "center"] for step in steps)
    assert (steps[0]["center"] == 0).all() and (steps[1]["center"] != 0).any()
    assert (steps[-1]["center"] != center).any()
    assert [step["frozen"] for step in steps] == [True] * 4 + [False] * 4
    frozen, moved = [step["directions"] for step in steps[:4]], steps[4]["directions"]
    assert all((w == frozen[0]).all() for w in frozen) and (moved != frozen[0]).any()


def caught(monkeypatch, name, *flags):
    """The parameter groups of every step of a run with an optimiser."""
    seen, step = [], getattr(torch.optim, name).step

    def remember(self, *args):
        seen.append([{**group, "params": [p.ndim for p in group["params"]]}
                     for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(getattr(torch.optim, name), "step", remember)
    train(*flags, dtype="float32")
    return seen


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_rate_and_decay_follow_their_tables_and_decay_is_for_weights(name, tmp_path, monkeypatch):
    steps = caught(monkeypatch, name, tmp_path, "--optimizer", name.lower(),
                   "--weight-decay", "0.04", "--final-weight-decay", "0.4", "--lr", "0.016")
    for t, (decayed, others) in enumerate(steps):
        cosine = (1 + math.cos(math.pi * t / 8)) / 2
        assert decayed["weight_decay"] == pytest.approx(0.4 - 0.36 * cosine)
        assert others["weight_decay"] == 0
        final = dino.RECIPES["digits"]["final_lr"] / 16
        assert decayed["lr"] == others["lr"] == pytest.approx(final + (0.001 - final) * cosine)
        assert min(decayed["params"]) > 1 and set(others["params"]) == {1}
    # Of each of 4 blocks 4 matrices; patches, three layers, directions; class token, positions.
    assert len(steps[0][0]["params"]) == 4 * 4 + 5 + 2 and len(steps) == 8


def test_stochastic_depth_is_drawn_anew_each_step_and_again_after_a_resume(tmp_path):
    flags = ["--drop-path", "0.5"]
    losses = train(tmp_path / "whole", *flags)
    assert losses != train(tmp_path / "none")
    torch.rand(7)  # another state of the generator
    assert train(tmp_path / "again", *flags) == losses

    class Stop(Exception):
        pass

    done, schedule = [], dino.update_center

    def stop_after_an_epoch(*args):
        done.append(1)
        if len(done) == 6:
            raise Stop
        schedule(*args)

    with mock.patch.object(dino, "update_center", stop_after_an_epoch), pytest.raises(Stop):
        train(tmp_path / "cut", *flags)
    assert train(tmp_path / "cut", *flags) == losses


def test_the_export_is_the_teacher(tmp_path):
    train(tmp_path, dtype="float32")
    state = helpers.state_of(tmp_path)
    exported = torch.load(tmp_path / "backbone.pth", weights_only=True)
    for name, value in exported.items():
        assert torch.equal(value, state["teacher"][f"backbone.{name}"])
    assert not torch.equal(exported["norm.weight"], state["model"]["backbone.norm.weight"])


def test_bf16_stays_within_two_percent_of_float32(tmp_path):
    plain, rounded = (train(tmp_path / amp, "--limit", 160, "--amp", amp, dtype="float32")
                      for amp in ("none", "bf16"))
    assert len(plain) == 20
    np.testing.assert_allclose(rounded, plain, rtol=0.02)


@pytest.mark.parametrize("alike, named", [(True, "above"), (False, "below")])
def test_both_collapses_raise_the_named_warning_within_an_epoch(
    alike, named, tmp_path, capsys, monkeypatch
):
    def collapsed(model, views):
        still = 0 * sum(p.sum() for p in model.parameters())
        z = torch.ones(len(views), len(views[0]), 64) / 8 + still
        logits = torch.zeros(len(views), len(views[0]), 512) + still
        if not alike:
            logits = logits + 9 * nn.functional.one_hot(torch.tensor(3), 512)
        return z, logits

    monkeypatch.setattr(dino.DINO, "forward", collapsed)
    train(tmp_path, "--epochs", "1", dtype="float32")
    said = capsys.readouterr().out
    assert f"warning: teacher_entropy is {'6.24' if alike else '0'}, {named} " in said
    assert "warning: z_std is" in said
