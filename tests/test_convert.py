import json
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision

import convert
from common import backbones
from common.distributed import RunError
from common.weights import load_backbone

SETTINGS = dict(data="/images", arch="resnet18", stem="imagenet", image_size=64, in_chans=3,
                mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.25])


def shuffled(backbone):
    """The state dict of a backbone whose every tensor has values of its own."""
    state = backbone.state_dict()
    return {k: torch.rand(v.shape) + 0.1 if v.is_floating_point() else v for k, v in state.items()}


def build(arch, stem="imagenet", **settings):
    return backbones.build_backbone(
        arch, stem=stem, zero_init_residual=False, positions="learned", drop_path=0.0,
        **{"in_chans": 3, "image_size": 32, "patch_size": 16, **settings},
    )


def run_folder(tmp_path, **settings):
    """A run folder with a backbone of random numbers; the folder and the weights."""
    settings = {**SETTINGS, **settings}
    folder = tmp_path / "run"
    folder.mkdir()
    names = ("in_chans", "image_size", "patch_size", "relative_positions")
    given = {k: settings[k] for k in names if k in settings}
    weights = shuffled(build(settings["arch"], settings["stem"], **given))
    torch.save(weights, folder / "backbone.pth")
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    return folder, weights


def converted(source, to, out, *flags):
    convert.main(convert.parse_args([str(source), "--to", to, str(out), *map(str, flags)]))
    return out


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# -------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_a_run_goes_to_torchvision_and_back(to, tmp_path, capsys):
    folder, weights = run_folder(tmp_path)
    out = converted(folder, to, tmp_path / "new" / "out.pth")
    model = torchvision.models.resnet18()
    found = torch.load(out, weights_only=True)
    answer = model.load_state_dict(found, strict=False)
    assert sorted(answer.missing_keys) == ["fc.bias", "fc.weight"] and not answer.unexpected_keys
    assert same(found, weights)
    assert f"minus {SETTINGS['mean']}" in capsys.readouterr().out

    model.fc, backbone, images = torch.nn.Identity(), build("resnet18"), torch.rand(2, 3, 64, 64)
    load_backbone(backbone, str(out))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), backbone.eval()(images))
    again = converted(out, to, tmp_path / "again.pth")  # it says its settings itself
    assert "taken" not in capsys.readouterr().out
    assert same(torch.load(again, weights_only=True), weights)


def test_a_released_checkpoint_is_taken_apart(tmp_path):
    weights = shuffled(build("resnet18"))
    state = {f"module.encoder_q.{key}": value for key, value in weights.items()}
    state |= {"module.queue": torch.zeros(3), "module.encoder_q.fc.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": state, "epoch": 200}, tmp_path / "moco.pth.tar")
    out = converted(tmp_path / "moco.pth.tar", "torchvision", tmp_path / "out.pth", "--arch",
                    "resnet18")
    assert same(torch.load(out, weights_only=True), weights)


def test_what_was_assumed_is_said_and_does_not_become_a_fact(tmp_path, capsys):
    torch.save(shuffled(build("resnet18", "small")), tmp_path / "foreign.pth")
    flags = ("--arch", "resnet18", "--stem", "small-pad2")
    out = converted(tmp_path / "foreign.pth", "torchvision", tmp_path / "out.pth", *flags)
    printed = capsys.readouterr().out
    assert "taken: --arch resnet18 --stem small-pad2 --image-size 224" in printed
    assert "conv1 is 3x3 with stride 1 and padding 2" in printed
    said = torch.load(out, weights_only=True)._metadata["settings"]
    assert said == dict(arch="resnet18", stem="small-pad2", in_chans=3)


def test_a_transformer_goes_to_timm_alone(tmp_path):
    folder, weights = run_folder(tmp_path, arch="vit_micro", image_size=32, patch_size=16,
                                 relative_positions=True)
    out = torch.load(converted(folder, "timm", tmp_path / "vit.pth"), weights_only=True)
    assert same(out, weights) and out._metadata["settings"]["relative_positions"] is True
    assert {"cls_token", "blocks.0.attn.qkv.weight", "norm.bias"} < weights.keys()
    for to, name in (("torchvision", "a.pth"), ("detectron2", "a.pkl")):
        with pytest.raises(RunError, match="vit_micro goes --to timm only"):
            converted(folder, to, tmp_path / name)


@pytest.mark.parametrize("parts", [
    {}, dict(class_token=False), dict(registers=2, layer_scale=0.1), dict(relative_positions=True),
    dict(relative_positions=True, layer_scale=0.1), dict(class_token=False, registers=2),
], ids=" ".join)
def test_the_options_that_are_printed_make_timms_transformer(parts, tmp_path, capsys):
    """Of weights that do not say it themselves; strict, and of the same features."""
    models = pytest.importorskip("timm.models")
    ours = build("vit_micro", image_size=32, patch_size=8, **parts).eval()
    ours.load_state_dict(shuffled(ours))
    torch.save(ours.state_dict(), tmp_path / "foreign.pth")
    out = converted(tmp_path / "foreign.pth", "timm", tmp_path / "timm.pth", "--arch", "vit_micro",
                    "--patch-size", 8, "--image-size", 32)
    name, options = re.search(r"timm's (\w+): (.*)", capsys.readouterr().out).groups()
    theirs = getattr(models, name)(embed_dim=96, depth=4, num_heads=3, num_classes=0,
                                   **eval(f"dict({options})")).eval()
    theirs.load_state_dict(torch.load(out, weights_only=True))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)


def test_what_a_model_has_to_change_is_said(tmp_path, capsys):
    folder, _ = run_folder(tmp_path, stem="small", in_chans=4, mean=[0.5], std=[0.5])
    converted(folder, "torchvision", tmp_path / "out.pth")
    printed = capsys.readouterr().out
    assert "conv1 is 3x3 with stride 1 and padding 1" in printed and "4 channels" in printed


# --------------------------------------------------------------------------------------- detectron2


def detectron2_names(bottleneck, blocks):
    """Names in detectron2's ResNet, written from its modules: stem, res2 to res5."""
    norm = ("weight", "bias", "running_mean", "running_var")
    convolutions = ["stem.conv1"]
    for stage, count in enumerate(blocks):
        for block in range(count):
            start = f"res{stage + 2}.{block}"
            convolutions += [f"{start}.conv{n + 1}" for n in range(3 if bottleneck else 2)]
            if block == 0 and (bottleneck or stage > 0):
                convolutions.append(f"{start}.shortcut")
    return {f"{c}.weight" for c in convolutions} | {f"{c}.norm.{n}" for c in convolutions
                                                    for n in norm}


@pytest.mark.parametrize(
    "arch, bottleneck, blocks",
    [("resnet18", False, (2, 2, 2, 2)), ("resnet50", True, (3, 4, 6, 3))],
)
def test_detectron2s_names_are_those_of_its_resnet(arch, bottleneck, blocks):
    weights = shuffled(build(arch))
    found = convert.to_detectron2(weights)
    assert found.keys() == detectron2_names(bottleneck, blocks)
    for ours, theirs in {
        "conv1.weight": "stem.conv1.weight", "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv2.weight": "res2.0.conv2.weight",
        "layer4.1.bn2.bias": "res5.1.conv2.norm.bias",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer2.0.downsample.1.running_mean": "res3.0.shortcut.norm.running_mean",
    }.items():
        assert np.array_equal(found[theirs], weights[ours].numpy())


def test_the_file_for_detectron2_is_a_pickle_of_arrays(tmp_path, capsys):
    folder, weights = run_folder(tmp_path)
    out = converted(folder, "detectron2", tmp_path / "out.pkl")
    with out.open("rb") as file:
        found = pickle.load(file)
    assert found.keys() == {"model", "__author__", "matching_heuristics"}
    assert found["matching_heuristics"] is True
    assert all(type(v) is np.ndarray and v.dtype == np.float32 for v in found["model"].values())
    assert np.array_equal(found["model"]["stem.conv1.weight"], weights["conv1.weight"].numpy())
    printed = capsys.readouterr().out
    assert "PIXEL_MEAN [102.0, 127.5, 153.0]" in printed and "DEPTH 18" in printed
    assert 'FORMAT "RGB"' in printed


@pytest.mark.parametrize("settings", [
    dict(stem="small"), dict(arch="resnet_tiny"), dict(arch="wide_resnet50_2"),
])
def test_what_detectron2_does_not_have_is_refused(settings, tmp_path):
    folder, _ = run_folder(tmp_path, **settings)
    with pytest.raises(RunError, match="does not go to detectron2"):
        converted(folder, "detectron2", tmp_path / "out.pkl")


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("to", ["torchvision", "timm"])
@pytest.mark.parametrize("arch", ["resnet_tiny", "resnet18_quarter"])
def test_small_networks_of_our_own_are_refused(arch, to, tmp_path):
    folder, _ = run_folder(tmp_path, arch=arch)
    with pytest.raises(RunError, match=f"{arch} does not go to {to}.*train a resnet18"):
        converted(folder, to, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_a_file_that_is_there_is_kept_unless_told_otherwise(tmp_path):
    folder, weights = run_folder(tmp_path)
    out = tmp_path / "out.pth"
    out.write_bytes(b"precious")
    with pytest.raises(RunError, match=f"{out} is there already.*--overwrite"):
        converted(folder, "torchvision", out)
    assert out.read_bytes() == b"precious"
    converted(folder, "torchvision", out, "--overwrite")
    assert same(torch.load(out, weights_only=True), weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pth", "run"]


@pytest.mark.parametrize("source", ["random", "nowhere"])
def test_a_source_without_weights_is_refused(source, tmp_path):
    with pytest.raises(RunError, match=f"{source}.*no file"):
        converted(source, "timm", tmp_path / "out.pth")
    assert not list(tmp_path.iterdir())


def test_weights_of_another_backbone_are_refused_and_nothing_is_written(tmp_path):
    folder, _ = run_folder(tmp_path)
    with pytest.raises(RunError, match="is --arch right"):
        converted(folder, "torchvision", tmp_path / "out.pth", "--arch", "resnet34")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("to, out", [("detectron2", "out.pth"), ("timm", "out.pkl")])
def test_the_ending_tells_what_a_file_is(to, out, capsys):
    with pytest.raises(SystemExit):
        convert.parse_args(["runs/simclr", "--to", to, out])
    assert f"{out}: a file for {to} must" in capsys.readouterr().err


# --------------------------------------------------------------------------------- DINOv2's weights


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2_comes_from_timm_and_goes_back(name, tmp_path, monkeypatch, capsys):
    """Of two blocks. The features are timm's; away from 518 px without registers Meta's."""
    timm = pytest.importorskip("timm")
    monkeypatch.setitem(backbones.VIT_SIZES, "vit_small", (384, 2, 6))
    theirs = timm.create_model(name, depth=2, num_classes=0, dynamic_img_size=True).eval()
    state = {key: x + torch.randn_like(x) / 10 for key, x in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    torch.save(state, tmp_path / "timm.pth")
    flags = ("--arch", "vit_small", "--patch-size", 14)
    out = converted(tmp_path / "timm.pth", "timm", tmp_path / "back.pth", *flags)
    assert same(torch.load(out, weights_only=True), state)

    ours = build("vit_small", image_size=224, patch_size=14).eval()
    load_backbone(ours, str(tmp_path / "timm.pth"))
    assert ours.grid == (37, 37)
    small, large = torch.randn(2, 3, 224, 224), torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        torch.testing.assert_close(ours(large), theirs(large), rtol=1e-5, atol=1e-5)
        if "reg4" not in name:
            assert not torch.allclose(ours(small), theirs(small), rtol=1e-3, atol=1e-3)
            first, table = state["pos_embed"].split([1, 37 * 37], dim=1)
            table = torch.nn.functional.interpolate(
                table.unflatten(1, (37, 37)).permute(0, 3, 1, 2), size=(16, 16), mode="bicubic")
            theirs = timm.create_model(name, depth=2, num_classes=0, img_size=224).eval()
            table = torch.cat([first, table.flatten(2).transpose(1, 2)], dim=1)
            theirs.load_state_dict({**state, "pos_embed": table})
        torch.testing.assert_close(ours(small), theirs(small), rtol=1e-5, atol=1e-5)


def test_the_class_tokens_position_goes_into_the_token_beside_registers(tmp_path, capsys):
    """Meta's files have both, timm's the sum."""
    meta = build("vit_micro", patch_size=8, registers=2, layer_scale=0.1)
    torch.nn.init.normal_(meta.pos_embed)
    torch.save(meta.state_dict(), tmp_path / "meta.pth")
    out = converted(tmp_path / "meta.pth", "timm", tmp_path / "timm.pth", "--arch", "vit_micro",
                    "--patch-size", 8, "--image-size", 32)
    found = torch.load(out, weights_only=True)
    assert found["pos_embed"].shape == (1, 16, 96)
    assert torch.equal(found["cls_token"], meta.cls_token + meta.pos_embed[:, :1])
    timms, read = build("vit_micro", patch_size=8), build("vit_micro", patch_size=8)
    load_backbone(timms, str(out))
    load_backbone(read, str(tmp_path / "meta.pth"))
    images = torch.rand(2, 3, 32, 32)
    small = images[:, :, :16, :16]  # of other positions, with Meta's antialiasing
    with torch.no_grad():
        torch.testing.assert_close(timms(images), meta(images))
        torch.testing.assert_close(timms(small), read(small))


def test_another_librarys_trunk_goes_to_that_library_alone(tmp_path, capsys):
    trunk = build("torchvision:mnasnet0_5")
    torch.save(trunk.state_dict(), tmp_path / "run.pth")
    flags = ("--arch", "torchvision:mnasnet0_5", "--image-size", 32)
    out = converted(tmp_path / "run.pth", "torchvision", tmp_path / "out.pth", *flags)
    answer = torchvision.models.mnasnet0_5().load_state_dict(
        torch.load(out, weights_only=True), strict=False)
    assert answer.missing_keys == ["classifier.1.weight", "classifier.1.bias"]
    assert not answer.unexpected_keys
    with pytest.raises(RunError, match="goes --to torchvision only"):
        converted(tmp_path / "run.pth", "timm", tmp_path / "no.pth", *flags)
