import importlib
import json
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import drill
import eval_knn
from common import features
from common.checkpoint import Run
from common.distributed import RunError
from helpers import SCRIPTS, lines, parsed, state_of

KNN = ["--shots", "--workers", "0", "--device", "cpu"]


def trained(script, folder, *flags):
    module, args = parsed(script, "--output", folder, *flags)
    module.main(args)
    return folder


def backbone(folder, name="backbone.pth"):
    return torch.load(folder / name, weights_only=True)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def knn_of(capsys, *flags):
    capsys.readouterr()
    eval_knn.main(eval_knn.parse_args([*map(str, flags), *KNN]))
    return json.loads(capsys.readouterr().out.splitlines()[-1])["top1"]


# ------------------------------------------------------------------------------------------- --init


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_backbone_starts_from_another_run_and_waits_for_the_heads(script, tmp_path):
    """After the frozen epoch it is the source bit for bit, a teacher's as well; then it moves."""
    source = trained(script, tmp_path / "source", "--lr", "0.1")
    end = trained(script, tmp_path / "end", "--init", source, "--epochs", "2", "--keep-every", "1",
                  "--seed", "1", "--lr", "0.1")
    assert same(backbone(end, "backbone-epoch0001.pth"), backbone(source))
    assert not same(backbone(end), backbone(source))
    previous = torch.load(end / "checkpoint.prev.pt", weights_only=True)["state"]
    for part in previous.values():
        if isinstance(part, dict) and "param_groups" not in part:
            trunk = {name.removeprefix("backbone."): value for name, value in part.items()
                     if name.startswith("backbone.")}
            assert not trunk or same(trunk, backbone(source))
    _, args = parsed(script, "--init", source, "--epochs", "2")
    assert args.lr == pytest.approx(parsed(script)[1].lr / 10) and args.freeze_backbone_epochs == 1


def test_no_optimiser_touches_what_is_frozen(tmp_path):
    source = trained("simclr", tmp_path / "source")
    trained("simclr", tmp_path / "end", "--init", source, "--epochs", "2", "--keep-every", "1")
    state = torch.load(tmp_path / "end" / "checkpoint.prev.pt", weights_only=True)["state"]
    heads = [name for name in state["model"] if name.startswith("projector")
             and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert 0 < len(state["optimizer"]["state"]) < len(heads) + 1


@pytest.mark.parametrize("script", ["moco", "simsiam", "dino"])
def test_it_goes_on_exactly_from_where_the_freeze_ends(script, tmp_path):
    """Fused SGD takes the buffers of all parameters or of none."""
    flags = ["--epochs", "2", "--lr", "0.1"]
    source = trained(script, tmp_path / "source")
    whole = trained(script, tmp_path / "whole", "--init", source, *flags)
    module, args = parsed(script, "--output", tmp_path / "cut", "--init", source, *flags)
    with mock.patch.object(Run, "agree", lambda run, ends: (True, ends)):
        module.main(args)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    module.main(args)
    assert same(backbone(tmp_path / "cut"), backbone(whole))


def test_all_rates_of_a_recipe_are_divided_and_a_given_one_is_not():
    for script, names in (("swav", ("lr", "final_lr")), ("barlow_twins", ("lr", "lr_biases"))):
        usual = parsed(script, "--epochs", "2")[1]
        divided = parsed(script, "--epochs", "2", "--init", "x")[1]
        given = parsed(script, "--epochs", "2", "--init", "x", "--lr", "0.5")[1]
        for name in names:
            assert getattr(divided, name) == pytest.approx(getattr(usual, name) / 10)
        assert given.lr == 0.5 and getattr(given, names[1]) == getattr(usual, names[1])


@pytest.mark.parametrize("script", ["dino", "dinov2"])
def test_new_heads_learn_while_given_weights_are_frozen(script):
    def frozen(*flags):
        args = importlib.import_module(script).parse_args(["--data", "x", *flags])
        return args.freeze_last_layer_epochs

    assert frozen() > 0 and frozen("--init", "x") == 0
    assert frozen("--init", "x", "--freeze-backbone-epochs", "0") == frozen()
    assert frozen("--init", "x", "--freeze-last-layer-epochs", "2") == 2


def test_a_run_does_not_start_from_what_it_would_replace(tmp_path):
    trained("simclr", tmp_path)
    with pytest.raises(RunError, match="is in --output, where it would be replaced"):
        trained("simclr", tmp_path, "--init", tmp_path, "--epochs", "2", "--no-resume")


def test_other_normalisation_than_the_weights_is_warned_of(tmp_path, capsys):
    source = trained("simclr", tmp_path / "source")
    trained("simclr", tmp_path / "end", "--init", source, "--epochs", "2", "--mean", "0.1", "0.2",
            "0.3")
    assert "warning: --mean 0.1 0.2 0.3, and" in capsys.readouterr().out


def test_it_goes_on_after_a_stop_wherever_the_file_has_gone(tmp_path):
    flags = ["--epochs", "2", "--lr", "0.1", "--save-every-minutes", "1e-9"]
    source = trained("simclr", tmp_path / "source")
    whole = trained("simclr", tmp_path / "whole", "--init", source, *flags)
    module, args = parsed("simclr", "--output", tmp_path / "cut", "--init", source, *flags)
    signalled = []

    def stop(*_):
        if not signalled:
            signalled.append(signal.raise_signal(signal.SIGUSR1))
        return indicators(*_)

    indicators, module.indicators = module.indicators, stop
    try:
        module.main(args)
    finally:
        module.indicators = indicators
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 1
    moved = shutil.move(source, tmp_path / "moved")
    trained("simclr", tmp_path / "cut", "--init", moved, *flags)
    assert same(backbone(tmp_path / "cut"), backbone(whole))
    other = trained("simclr", tmp_path / "other", "--seed", "5")
    with pytest.raises(RunError, match="--init does not name the weights that the run in"):
        trained("simclr", tmp_path / "cut", "--init", other, *flags)


def test_positions_are_resampled_to_another_image_size(tmp_path, capsys):
    small = trained("mae", tmp_path / "small")
    large = trained("dino", tmp_path / "large", "--arch", "vit_micro", "--patch-size", "4",
                    "--init", small, "--crop-sizes", "24", "8", "--epochs", "2",
                    "--keep-every", "1")
    table, before = backbone(large, "backbone-epoch0001.pth")["pos_embed"], backbone(small)
    assert table.shape == (1, 1 + 36, 96) and before["pos_embed"].shape == (1, 1 + 16, 96)
    assert torch.equal(table[:, 0], before["pos_embed"][:, 0])
    corners = table[0, 1:].unflatten(0, (6, 6))[[0, 0, -1, -1], [0, -1, 0, -1]]
    old = before["pos_embed"][0, 1:].unflatten(0, (4, 4))[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.nn.functional.cosine_similarity(corners, old).min() > 0.9
    assert "positions resampled from 4 x 4 patches to 6 x 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--arch", "resnet18_quarter"], "--arch resnet18_quarter, and --init .* --arch resnet_ti"),
        (["--stem", "imagenet"], "--stem imagenet, and --init .* is of --stem small"),
        (["--in-chans", "1"], "--in-chans 1, and --init .* is of --in-chans 3"),
    ],
)
def test_another_kind_of_backbone_is_refused_by_name(flags, named, tmp_path):
    source = trained("simclr", tmp_path / "source")
    with pytest.raises(RunError, match=named):
        trained("barlow_twins", tmp_path / "end", "--init", source, "--epochs", "2", *flags)
    assert not (tmp_path / "end").exists()


@pytest.mark.parametrize(
    "spoil, named", [pytest.param(*what, id=what[1]) for what in (
        (lambda w: w.pop("layer3.0.conv1.weight"), "has no tensor layer3.0.conv1.weight"),
        (lambda w: w.update({"layer9.weight": torch.zeros(1)}), "unknown tensor layer9.weight"),
        (lambda w: w["conv1.weight"].fill_(torch.nan), "conv1.weight is not finite"),
    )],
)
def test_a_part_of_a_backbone_is_refused_by_tensor(spoil, named, tmp_path):
    weights = backbone(trained("simclr", tmp_path / "source"))
    spoil(weights)
    torch.save(dict(weights), tmp_path / "spoiled.pth")
    with pytest.raises(RunError, match=named):
        trained("simclr", tmp_path / "end", "--init", tmp_path / "spoiled.pth", "--epochs", "2")


@pytest.mark.parametrize("what", ["random", "pixels", "nowhere"])
def test_what_is_no_file_is_refused(what, tmp_path):
    with pytest.raises(RunError, match=f"--init {what}"):
        trained("simclr", tmp_path / "end", "--init", what, "--epochs", "2")


def test_torchvisions_own_weights_start_a_run(tmp_path, capsys):
    import torchvision

    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    trained("simclr", tmp_path / "end", "--arch", "resnet18", "--stem", "imagenet", "--init",
            tmp_path / "resnet18.pth", "--epochs", "2", "--limit", "16", "--keep-every", "1")
    kept = backbone(tmp_path / "end", "backbone-epoch0001.pth")
    assert same(dict(kept), {n: v for n, v in model.state_dict().items() if n[:3] != "fc."})
    assert "120 of 120 tensors of the backbone loaded, left out: fc.weight" in (
        capsys.readouterr().out)


def test_epochs_are_left_for_the_backbone(capsys):
    with pytest.raises(SystemExit):
        parsed("simclr", "--init", "x", "--epochs", "1")
    said = capsys.readouterr().err
    assert "--freeze-backbone-epochs 1 (1 with --init) leaves nothing of --epochs 1" in said


# ------------------------------------------------------------------------------------ --probe-every


def with_and_without(folder):
    """A run of two epochs with and without the probe, on this many processes."""
    flags = ["--epochs", "2", "--device", "cpu", "--limit", "64"]
    trained("simclr", folder / "plain", *flags)
    trained("simclr", folder / "probed", "--probe-every", "1", *flags)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_probe_measures_what_eval_knn_does_and_changes_nothing(processes, pool, tmp_path, capsys):
    pool.run(processes, with_and_without, tmp_path)
    assert same(backbone(tmp_path / "plain"), backbone(tmp_path / "probed"))
    plain, probed = (lines(tmp_path / name) for name in ("plain", "probed"))
    steps = [line for line in probed if "loss" in line]
    assert [line["loss"] for line in steps] == [line["loss"] for line in plain]
    found = [line for line in probed if "loss" not in line]
    assert [(line["step"], line["epoch"]) for line in found] == [(0, 0), (4, 1), (8, 2)]
    assert found[-1]["probe_knn"] == knn_of(capsys, "--checkpoint", tmp_path / "probed")
    assert 1 < found[-1]["probe_effective_rank"] < 128


def test_without_labels_the_rank_is_measured_alone(tmp_path, image_folder, capsys):
    trained("simclr", tmp_path / "run", "--data", image_folder / "train" / "cats", "--batch-size",
            "4", "--probe-every", "1")
    found = [line for line in lines(tmp_path / "run") if "loss" not in line]
    assert found and all(line.keys() == {"step", "epoch", "probe_effective_rank"} for line in found)
    assert "effective rank alone, for there are no labels" in capsys.readouterr().out


def test_other_labelled_images_may_be_probed(tmp_path, image_folder, capsys):
    trained("simclr", tmp_path / "run", "--probe-data", image_folder, "--probe-every", "1")
    found = [line["probe_knn"] for line in lines(tmp_path / "run") if "loss" not in line]
    assert found[-1] == knn_of(capsys, "--checkpoint", tmp_path / "run", "--data", image_folder)
    with pytest.raises(RunError, match="no train folder"):
        trained("simclr", tmp_path / "run", "--probe-every", "1", "--probe-data",
                image_folder / "train" / "cats")


def test_an_older_runs_probe_is_not_taken_for_this_ones(tmp_path):
    trained("simclr", tmp_path, "--probe-every", "1", "--seed", "1")
    before = next(line for line in lines(tmp_path) if line["step"] == 0)
    trained("simclr", tmp_path, "--probe-every", "1", "--no-resume")
    found = [line for line in lines(tmp_path) if line["step"] == 0]
    assert len(found) == 1 and found != [before]


def test_an_image_that_training_replaces_does_not_end_a_run_in_its_probe(tmp_path, capsys):
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_text("spoiled")
    trained("simclr", tmp_path / "run", "--data", tmp_path, "--batch-size", "4", "--limit", "8",
            "--probe-every", "1")
    assert "warning: no probe after epoch 0: " in capsys.readouterr().out
    found = [line for line in lines(tmp_path / "run") if "loss" not in line]
    assert [line["probe_effective_rank"] for line in found] == [None, None]


def test_only_images_without_splits_are_measured_without_labels(tmp_path):
    with pytest.raises(RunError, match="pass --download"):
        trained("simclr", tmp_path / "run", "--probe-data", "svhn", "--data-root", tmp_path,
                "--probe-every", "1")
    with pytest.raises(SystemExit):
        parsed("simclr", "--probe-data", "digits")


def test_killed_in_a_probe_it_goes_on_with_the_probe(pool, tmp_path):
    flags = ["--recipe", "digits", *drill.SMALL, "--epochs", "2", "--warmup-epochs", "0",
             "--probe-every", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pool.run(1, trained, "simclr", whole, *flags, "--workers", "0")

    def saved_and_probing():
        there = (cut / "checkpoint.pt").exists()
        return there and not any(line["step"] == 16 and "probe_knn" in line
                                 for line in drill.log_of(cut))

    process = drill.start("simclr.py", *flags, "--output", cut)
    drill.wait_for(saved_and_probing, process, pause=0.001)
    drill.kill(process)
    assert torch.load(cut / "checkpoint.pt", weights_only=True)["step"] == 16
    status, printed = drill.run("simclr.py", *flags, "--output", cut)
    assert status == 0, printed
    assert same(backbone(cut), backbone(whole))
    assert [line for line in lines(cut) if "loss" not in line] == [
        line for line in lines(whole) if "loss" not in line]


# ----------------------------------------------------------------------- effective rank, gradients


def test_effective_rank_by_its_definition():
    x = np.random.default_rng(0).normal(size=(30, 7))
    values = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    shares = [value / sum(values) for value in values]
    wanted = np.exp(-sum(share * np.log(share) for share in shares))
    assert features.effective_rank(torch.from_numpy(x)).item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_effective_rank_counts_equal_directions(scale):
    for n in (1, 3, 8):
        x = torch.eye(n, 8, dtype=torch.float64).repeat(4, 1) * scale
        assert features.effective_rank(x).item() == pytest.approx(n, rel=1e-9)
    assert features.effective_rank(torch.ones(9, 5)).item() == pytest.approx(1, abs=1e-4)
    assert features.effective_rank(torch.full((2, 2), torch.nan)).isnan()


@pytest.mark.parametrize("script", ["simclr", "dino"])
def test_the_gradient_norm_is_that_before_clipping(script, tmp_path, monkeypatch):
    """Against the norm of what backward left, with the limit of DINO's clipping out of reach."""
    norms, backward = [], torch.Tensor.backward
    module, args = parsed(script, "--output", tmp_path, "--amp", "none")
    models, make = [], torch.optim.Optimizer.__init__

    def remember(self, params, defaults):
        params = list(params)
        models.append([p for group in params for p in group["params"]])
        make(self, params, defaults)

    def measured(loss, *args, **options):
        backward(loss, *args, **options)
        grads = [p.grad for p in models[0] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in grads]).double().norm().item())

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", remember)
    monkeypatch.setattr(torch.Tensor, "backward", measured)
    if script == "dino":
        args.clip_per_parameter = 1e-3
    module.main(args)
    assert [line["grad_norm"] for line in lines(tmp_path)] == pytest.approx(norms, rel=1e-5)
    assert all("effective_rank" in line for line in lines(tmp_path))


# ------------------------------------------------------------------------- --profile, --tensorboard


def test_a_profile_names_the_parts_of_a_step_and_stops(tmp_path, capsys):
    flags = ["--limit", "64", "--batch-size", "8", "--epochs", "2"]
    whole = trained("simclr", tmp_path / "whole", *flags)
    trained("simclr", tmp_path / "cut", *flags, "--profile", "3")
    printed = capsys.readouterr().out
    assert "3 steps, " in printed and "Self CPU %" in printed
    assert "stopped at step 8 and saved; the same command without --profile goes on" in printed
    events = json.loads((tmp_path / "cut" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    for name in ("forward model", "backward", "Optimizer.step#LARS.step"):
        assert names.count(name) >= 3, name
    trained("simclr", tmp_path / "cut", *flags)
    assert same(backbone(tmp_path / "cut"), backbone(whole))


def test_a_profile_that_does_not_come_is_told(tmp_path, capsys):
    flags = ["--limit", "64", "--batch-size", "8"]
    with pytest.raises(RunError, match=r"--profile 4 needs 4 \+ 5 steps, and 8 are left"):
        trained("simclr", tmp_path / "short", *flags, "--profile", "4")
    with mock.patch.object(Run, "agree", lambda run, ends: (True, True)):
        trained("simclr", tmp_path / "stopped", *flags, "--profile", "3")
    assert "stopped before the profile was complete" in capsys.readouterr().out


def test_tensorboard_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match="--tensorboard.*pip install tensorboard"):
        trained("simclr", tmp_path / "run", "--tensorboard")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained("simclr", tmp_path, "--tensorboard")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("loss", "lr", "z_std", "grad_norm"):
        got = [(event.step, event.value) for event in events.Scalars(name)]
        assert got == [(line["step"], pytest.approx(line[name])) for line in lines(tmp_path)]


# ----------------------------------------------------------------------------------- --keep-every


def test_kept_backbones_stay_and_a_new_run_removes_them(tmp_path):
    trained("simclr", tmp_path, "--epochs", "5", "--keep-every", "2")
    kept = sorted(path.name for path in tmp_path.glob("backbone-*.pth"))
    assert kept == ["backbone-epoch0002.pth", "backbone-epoch0004.pth"]
    assert not same(backbone(tmp_path, kept[0]), backbone(tmp_path, kept[1]))
    other, odd = tmp_path / "lr1", tmp_path / "lr[12]"  # which is no pattern
    for folder in (other, odd):
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("lr*"))
    trained("simclr", odd, "--no-resume")
    assert not list(odd.glob("backbone-*.pth")) and list(other.glob("backbone-*.pth"))
    assert state_of(odd)["model"] and state_of(other)["model"]
