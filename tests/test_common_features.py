import itertools
import json
import math
import os
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import augment, backbones, checkpoint, distributed as comm, features, workers
from common.distributed import RunError, World
from common.images import ArrayImages, FileImages

WORLD = World(0, 1, torch.device("cpu"))

# ------------------------------------------------------------------------------- resolve_checkpoint

SETTINGS = dict(data="digits", arch="resnet18_quarter", stem="small", patch_size=5, image_size=20,
                in_chans=1, mean=[0.3], std=[0.2], bits=16, exif_orientation=True, lr=1.0)


@pytest.mark.parametrize("name", ["random", "pixels"])
def test_a_baseline_has_no_weights(name):
    assert features.resolve_checkpoint(name) == features.Checkpoint(name, None, {})


@pytest.mark.parametrize("ending", ["", "/", "/backbone.pth"])
def test_a_run_is_found_by_its_folder_and_by_its_file(ending, tmp_path):
    (tmp_path / "backbone.pth").touch()
    (tmp_path / "run.json").write_text(json.dumps({"starts": [], "settings": SETTINGS}))
    found = features.resolve_checkpoint(f"{tmp_path}{ending}")
    assert os.path.samefile(found.weights, tmp_path / "backbone.pth")
    assert found.settings == SETTINGS and found.name == f"{tmp_path}{ending}"


def test_a_file_that_no_run_describes_has_no_settings(tmp_path):
    (tmp_path / "resnet50.pth").touch()
    found = features.resolve_checkpoint(str(tmp_path / "resnet50.pth"))
    assert (found.weights, found.settings) == (str(tmp_path / "resnet50.pth"), {})


def test_a_file_that_was_moved_says_how_it_was_trained(tmp_path):
    settings = dict(SETTINGS, arch="resnet_tiny", in_chans=3)
    torch.save(checkpoint.described(tiny().state_dict(), settings), tmp_path / "moved.pth")
    alone = features.resolve_checkpoint(str(tmp_path / "moved.pth")).settings
    assert alone == {name: settings[name] for name in checkpoint.DESCRIBED}
    other = {"settings": dict(settings, mean=[0.9], arch="resnet50", lr=2.0)}
    (tmp_path / "run.json").write_text(json.dumps(other))  # of another run
    assert features.resolve_checkpoint(str(tmp_path / "moved.pth")).settings == {
        **other["settings"], **alone}


@pytest.mark.parametrize("said", [None, "words", {}, {"version": 1}])
def test_what_a_foreign_file_calls_its_settings_is_no_error(said, tmp_path):
    weights = OrderedDict(tiny().state_dict())
    weights._metadata = OrderedDict(settings=said)
    torch.save(weights, tmp_path / "other.pth")
    assert features.resolve_checkpoint(str(tmp_path / "other.pth")).settings == {}


@pytest.mark.parametrize("there", [[], ["run.json"]])
def test_a_name_without_weights_is_refused(there, tmp_path):
    for name in there:
        (tmp_path / name).write_text("{}")
    for name in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(RunError, match=f"--checkpoint {name}: no file") as error:
            features.resolve_checkpoint(str(name))
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ resolve


def resolved(*described, **flags):
    given = SimpleNamespace(**{**dict.fromkeys(features.DIGITS), **flags})
    checkpoints = [features.Checkpoint("some", None, settings) for settings in described]
    return features.evaluation_settings(given, checkpoints)


def test_a_flag_wins_over_the_run_and_the_run_over_what_is_assumed():
    assert resolved(SETTINGS) == {name: SETTINGS[name] for name in features.DIGITS}
    wanted = dict(SETTINGS, image_size=28, mean=[0.1], data="/images")
    got = resolved(SETTINGS, image_size=28, mean=[0.1], data="/images")
    assert got == {name: wanted[name] for name in features.DIGITS}


def test_the_first_described_run_counts():
    assert resolved({}, SETTINGS, dict(SETTINGS, arch="resnet50"))["arch"] == "resnet18_quarter"


def test_without_a_run_the_data_says_what_is_assumed():
    assert resolved({}) == features.DIGITS
    folder = resolved({}, data="/images")
    assert (folder["data"], folder["arch"], folder["image_size"]) == ("/images", "resnet50", 224)
    assert (folder["mean"], folder["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("flag, value, said", [
    ("arch", "resnet50", "resnet18_quarter"), ("stem", "small-pad2", "small"), ("in_chans", 3, 1),
])
def test_a_flag_that_cannot_be_right_is_an_error_of_both_values(flag, value, said):
    name = f"--{flag.replace('_', '-')}"
    with pytest.raises(RunError, match=f"{name} {value}, and some is of {name} {said}; is {name}"):
        resolved(SETTINGS, **{flag: value})
    assert resolved(SETTINGS, patch_size=8)["patch_size"] == 8  # a ResNet has none
    with pytest.raises(RunError, match="--patch-size 4, and some is of --patch-size 5"):
        resolved(dict(SETTINGS, arch="vit_tiny"), patch_size=4)


def tiny(seed=0, arch="resnet_tiny"):
    torch.manual_seed(seed)
    return backbones.build_backbone(arch, stem="small", in_chans=3, zero_init_residual=False)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def loaded(settings, tmp_path, **flags):
    """A file that says of itself `settings`, as an evaluation with these flags loads it."""
    weights = checkpoint.described(tiny().state_dict(), settings)
    torch.save(weights, tmp_path / "tiny.pth")
    flags = {"arch": "resnet_tiny", "stem": "small", **flags}
    args = SimpleNamespace(**{**dict.fromkeys(features.DIGITS), **flags})
    found = features.resolve_checkpoint(str(tmp_path / "tiny.pth"))
    wanted = dict(features.evaluation_settings(args, [found]), trained_size=16)
    return next(features.Source("tiny", args, WORLD, found, wanted).backbones())


def test_what_is_assumed_of_a_file_is_printed(tmp_path, capsys):
    whole = dict(SETTINGS, arch="resnet_tiny", in_chans=3)
    loaded(whole, tmp_path)
    assert "taken" not in capsys.readouterr().out
    loaded({}, tmp_path, data="/images", mean=[0.25])
    printed = capsys.readouterr().out
    assert f"{tmp_path}/tiny.pth does not say how it was trained; taken: " in printed
    assert ("--arch resnet_tiny --stem small --image-size 224 --in-chans 3 --mean 0.25 "
            "--std 0.229 0.224 0.225 (of padding 1; ") in printed
    assert "of padding 2: --stem small-pad2)\n" in printed
    del whole["std"]
    loaded(whole, tmp_path, data="/images")
    assert "taken: --std 0.229 0.224 0.225\n" in capsys.readouterr().out


@pytest.mark.parametrize("mean, warned", [([0.4], True), ([0.3], False), ([0.3] * 3, False)])
def test_another_mean_than_in_training_is_a_warning(mean, warned, tmp_path, capsys):
    loaded(dict(SETTINGS, arch="resnet_tiny", in_chans=3), tmp_path, mean=mean)
    printed = capsys.readouterr().out
    assert ("warning: --mean 0.4, and" in printed) == warned == ("with --mean 0.3" in printed)


def test_resolving_changes_no_assumption():
    before = json.dumps([features.DIGITS, features.FOLDER])
    resolved({}, data="/images", arch="resnet18")["mean"] = None
    resolved(SETTINGS)
    assert json.dumps([features.DIGITS, features.FOLDER]) == before


# --------------------------------------------------------------------------------- layers, by name

META = torch.device("meta")  # shapes without numbers: the widest nets cost nothing


def build(arch, stem="imagenet"):
    return backbones.build_backbone(
        arch, in_chans=3, stem=stem, zero_init_residual=False, image_size=16, patch_size=4,
        positions="learned", drop_path=0.0,
    )


def shuffled(net):
    """Give every tensor of a net, running statistics included, values that none starts with."""
    for name, tensor in net.state_dict().items():
        if tensor.ndim > 1:
            nn.init.normal_(tensor, std=0.1)
        elif not name.endswith("num_batches_tracked"):
            nn.init.uniform_(tensor, 0.5, 1.5)
    return net


@pytest.mark.parametrize(
    "arch, widths",
    [
        ("resnet_tiny", (16, 16, 32, 64, 128, 128)),
        ("resnet18", (64, 64, 128, 256, 512, 512)),
        ("resnet50", (64, 256, 512, 1024, 2048, 2048)),
        ("wide_resnet50_2", (64, 256, 512, 1024, 2048, 2048)),
    ],
)
def test_the_layers_of_a_resnet_have_the_widths_it_names(arch, widths):
    with META:
        net = build(arch)
        images = torch.empty(2, 3, 224, 224)
        maps = features.resnet_maps(net, images, features.RESNET_LAYERS)
        rows = features.layers(net, images, features.RESNET_LAYERS)
    assert features.layer_names(net) == list(features.RESNET_LAYERS)
    sides = (112, 56, 28, 14, 7, 7)
    shapes_wanted = [(2, w, s, s) for w, s in zip(widths, sides, strict=True)]
    assert [tuple(x.shape) for x in maps.values()] == shapes_wanted
    assert [tuple(x.shape) for x in rows.values()] == [(2, w) for w in widths]


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("arch", ["resnet_tiny", "resnet18", "resnet50"])
def test_layers_are_what_the_modules_give_in_one_pass(arch, stem):
    net, seen, passes = shuffled(build(arch, stem)).eval(), {}, []
    modules = {"conv1": net.relu, "res2": net.layer1, "res3": net.layer2, "res4": net.layer3,
               "res5": net.layer4}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda _, __, out, name=name: seen.setdefault(name, out.clone())
        )
    net.conv1.register_forward_hook(lambda *_: passes.append(1))
    images = torch.rand(2, 3, 48, 32)
    with torch.no_grad():
        seen["avgpool"] = net(images)
        maps = features.resnet_maps(net, images, features.RESNET_LAYERS)
        rows = features.layers(net, images, features.RESNET_LAYERS)
    assert len(passes) == 3
    for name in features.RESNET_LAYERS[:-1]:
        assert torch.equal(maps[name], seen[name]), name
        torch.testing.assert_close(rows[name], seen[name].mean((2, 3)))
    assert torch.equal(rows["avgpool"], seen["avgpool"])


def test_a_pass_ends_with_the_deepest_layer_asked_for():
    net = build("resnet_tiny", "small").eval()
    net.layer4.register_forward_hook(lambda *_: pytest.fail("res5 was computed"))
    found = features.layers(net, torch.rand(1, 3, 16, 16), ["res4", "conv1"])
    assert list(found) == ["res4", "conv1"]


def test_naming_layers_leaves_the_keys_alone():
    net = build("resnet50")
    assert not any("res2" in key or "layers" in key for key in net.state_dict())
    for names in (["res6"], ["cls"], ["layer4"]):
        with pytest.raises(RunError, match=f"no layer {names[0]}; there are conv1 res2"):
            features.layers(net, torch.rand(1, 3, 32, 32), names)


def test_grids_at_224_px_are_those_of_the_protocol():
    with META:
        net = build("resnet50")
        names = [f"{name}-grid" for name in features.RESNET_LAYERS[:-1]]
        found = features.layers(net, torch.empty(2, 3, 224, 224), [*names, "res5", "conv1"])
    assert [x.shape[1] for x in found.values()] == [9216, 9216, 8192, 9216, 8192, 2048, 64]
    x = torch.rand(2, 5, 14, 14)
    wanted = torch.stack([
        torch.stack([x[:, :, a : a + 8, b : b + 8].mean((2, 3)) for b in (0, 3, 6)], 2)
        for a in (0, 3, 6)
    ], 2)
    torch.testing.assert_close(features.pool_to_grid("res4", x), wanted)


def test_grids_at_other_sizes_have_as_many_cells_or_the_whole_map():
    x = torch.rand(2, 5, 12, 9)
    cells = features.pool_to_grid("res4", x)
    torch.testing.assert_close(cells[:, :, 2, 1], x[:, :, 8:, 3:6].mean((2, 3)))
    small = torch.rand(2, 5, 2, 1)
    assert torch.equal(features.pool_to_grid("res4", small), small)


def test_layers_average_a_map_over_its_places():
    net, images = shuffled(build("resnet_tiny", "small")).eval(), torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        maps = features.resnet_maps(net, images, ["res3"])
        flat = features.layers(net, images, ["res3-grid", "res3", "res5", "avgpool"])
    assert list(flat) == ["res3-grid", "res3", "res5", "avgpool"]
    torch.testing.assert_close(flat["res3"], maps["res3"].mean((2, 3)))
    torch.testing.assert_close(flat["res3-grid"].view(3, 32, 16).mean(2), flat["res3"])
    assert torch.equal(flat["res5"], flat["avgpool"]) and torch.equal(flat["avgpool"], net(images))
    for name in ("avgpool-grid", "res6-grid", "nothing"):
        with pytest.raises(RunError, match=f"no layer {name}"):
            features.layers(net, images, [name])


def test_the_layers_of_a_transformer_are_its_tokens():
    net, images = build("vit_micro").eval(), torch.rand(2, 3, 16, 16)
    found = features.layers(net, images, ["cls3", "patches", "cls"])
    tokens = net.tokens(images, 3)
    assert torch.equal(found["cls"], net(images))
    assert torch.equal(found["patches"], tokens[-1][:, 1:].mean(1))
    assert torch.equal(found["cls3"], torch.cat([t[:, 0] for t in tokens], dim=1))
    assert features.layer_names(net) == ["cls4", "cls3", "cls2", "patches", "cls"]
    widths = [rows.shape[1] for rows in features.layers(net, images, ["cls4", "cls2"]).values()]
    assert widths == [384, 192]
    with pytest.raises(RunError, match="no layer cls5"):
        features.layers(net, images, ["cls5"])


# ------------------------------------------------------------------------------------------ extract

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def centre_view(size):
    steps = [augment.CenterCrop(size, interpolation="bicubic"), augment.Normalize(MEAN, STD)]
    return augment.View(size, steps, 3)


def flat(images):
    return {"pixels": images.flatten(1)}


def noise(n, size=8):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def expected(pixels):
    """Normalised planes (n, 3 * H * W) of uint8 images (n, H, W, 3)."""
    planes = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    return planes.transpose(0, 3, 1, 2).reshape(len(pixels), -1)


def extracted(n, batch_size, workers=0, backbone=False):
    """Features of n images on as many processes as there are."""
    world, images = comm.setup("cpu"), ArrayImages(noise(n), None, 3)
    function = flat
    if backbone:
        frozen = features.freeze(tiny(1), None, world)

        def function(images):
            return features.layers(frozen, images, ["res3", "avgpool", "res2-grid"])

    found = features.extract(
        function, images, centre_view(8), world, batch_size=batch_size, workers=workers
    )
    return np.concatenate([rows.numpy() for rows in found.values()], axis=1)


@pytest.mark.parametrize("n, batch_size", [(37, 8), (37, 37), (37, 1000), (1, 1), (16, 8)])
def test_features_are_in_data_set_order_whatever_the_batch_size(n, batch_size):
    got = extracted(n, batch_size)
    assert got.dtype == np.float32 and got.shape == (n, 192)
    np.testing.assert_allclose(got, expected(noise(n)), atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("n, batch_size", [(37, 8), (2, 1), (1, 4)])
def test_every_process_has_the_features_of_all(n, batch_size, size, pool):
    alone = extracted(n, batch_size)
    for part in pool.run(size, extracted, n, batch_size):
        assert np.array_equal(part, alone)


@pytest.mark.parametrize("size", [2, 3])
def test_a_backbone_gives_the_same_on_any_number_of_processes(size, pool):
    alone = extracted(37, 8, backbone=True)
    assert alone.shape == (37, 32 + 128 + 16 * 6 * 6) and np.ptp(alone, axis=0).max() > 0.1
    for part in pool.run(size, extracted, 37, 8, 0, True):
        assert np.array_equal(part, alone)  # whole batches: bit for bit


def test_loader_processes_change_nothing():
    assert np.array_equal(extracted(37, 8, workers=2), extracted(37, 8))


def test_files_of_odd_sizes_keep_their_order(tmp_path):
    sizes = [(1, 1), (7, 31), (200, 3), (3, 200), (16, 16), (5, 5)]
    colours = np.random.default_rng(0).integers(0, 256, (len(sizes), 3), dtype=np.uint8)
    paths = [str(tmp_path / f"{number}.png") for number in range(len(sizes))]
    for path, size, colour in zip(paths, sizes, colours.tolist(), strict=True):
        Image.new("RGB", size, tuple(colour)).save(path)
    images = FileImages(paths, None, 3, str(tmp_path))
    got = features.extract(flat, images, centre_view(9), WORLD, batch_size=4, workers=0)["pixels"]
    wanted = expected(np.broadcast_to(colours[:, None, None], (len(sizes), 9, 9, 3)))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_workers_are_started_as_dist_says(monkeypatch):
    asked = []
    monkeypatch.setattr(workers, "worker_context", lambda: asked.append(1))  # None: torch's own way
    images = ArrayImages(noise(20), None, 3)
    for count in (0, 1):
        features.extract(flat, images, centre_view(9), WORLD, batch_size=4, workers=count)
    assert asked == [1]


def test_extraction_leaves_the_backbone_bit_for_bit_as_it_was():
    backbone = tiny(1)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    frozen = features.freeze(backbone, None, WORLD)
    features.extract(lambda x: {"h": frozen(x)}, ArrayImages(noise(20), None, 3), centre_view(8),
                     WORLD, batch_size=8, workers=0)
    assert same(backbone.state_dict(), before)
    assert not any(module.training for module in frozen.modules())
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def message_of_a_broken_file(folder, workers):
    images = FileImages([f"{folder}/{number}.png" for number in range(6)], None, 3, folder)
    with pytest.raises(RunError) as error:
        features.extract(flat, images, centre_view(4), comm.setup("cpu"), batch_size=2,
                         workers=workers)
    return str(error.value)


@pytest.fixture(params=[0, 5])
def broken_file(request, tmp_path):
    """The path of one file among six that Pillow cannot read: the first or the last."""
    for number in range(6):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    path = tmp_path / f"{request.param}.png"
    path.write_bytes(b"no image")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_is_named(workers, broken_file):
    message = message_of_a_broken_file(str(broken_file.parent), workers)
    assert f"{broken_file} cannot be read" in message and "\n" not in message


def test_a_file_that_cannot_be_read_stops_every_process(broken_file, pool):
    messages = pool.run(2, message_of_a_broken_file, str(broken_file.parent), 0)
    assert len(set(messages)) == 1 and f"{broken_file} cannot be read" in messages[0]


def message_of_features_without_number(value, size):
    def spoiled(images):
        rows = images.flatten(1)
        rows[rows[:, 0] == images[:, 0, 0, 0].max(), 2] = value
        return {"res4": rows}

    pixels = np.zeros((size, 4, 4, 3), dtype=np.uint8)
    pixels[-2] = 255
    with pytest.raises(RunError) as error:
        features.extract(spoiled, ArrayImages(pixels, None, 3), centre_view(4), comm.setup("cpu"),
                         batch_size=size, workers=0)
    return str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_named_with_its_image(value, pool):
    wanted = "the features of res4 are not finite, first of image 5"
    assert wanted in message_of_features_without_number(value, 7)
    for message in pool.run(2, message_of_features_without_number, value, 7):
        assert wanted in message


def test_the_chunk_of_sharing_does_not_count(pool):
    for part in pool.run(3, shared_rows):
        assert np.array_equal(part, np.arange(40).reshape(10, 4))


def shared_rows():
    x, rank = torch.zeros(10, 4), comm.setup("cpu").rank
    bounds = [0, 3, 3, 10]  # the second process has none
    for row in range(bounds[rank], bounds[rank + 1]):
        x[row] = torch.arange(4 * row, 4 * row + 4)
    comm.broadcast_rows(x, bounds, piece=9)
    return x.numpy()


# ------------------------------------------------------------------------------------ feature files


def some_features():
    rng = torch.Generator().manual_seed(0)
    splits = [
        features.Split(
            {"res4": torch.rand(n, 3, generator=rng), "avgpool": torch.rand(n, 2, generator=rng)},
            np.arange(n) % 3, np.arange(n) * 2,
        )
        for n in (8, 5)
    ]
    return features.Features("runs/some", "some images", *splits)


def test_features_are_read_as_they_were_written(tmp_path):
    written, path = some_features(), str(tmp_path / "new" / "file.npz")
    features.write(written, path, WORLD)
    assert os.listdir(tmp_path / "new") == ["file.npz"]
    found = features.read(path)
    assert (found.checkpoint, found.protocol) == ("runs/some", "some images")
    for one, other in ((found.train, written.train), (found.test, written.test)):
        assert same(one.layers, other.layers)
        assert np.array_equal(one.labels, other.labels) and np.array_equal(one.index, other.index)
    assert list(features.read(path, ["avgpool"]).train.layers) == ["avgpool"]
    with np.load(path, allow_pickle=False) as file:
        assert {"train/avgpool", "test/res4", "train/labels", "test/index"} < set(file.files)


@pytest.mark.parametrize("content", ["none", "text", "npy", "npz", "objects", "torn", "uneven"])
def test_what_is_no_feature_file_is_one_line_with_its_name(content, tmp_path):
    path = tmp_path / "file.npz"
    if content == "text":
        path.write_bytes(b"nothing of the kind")
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    elif content == "npz":
        np.savez(path, other=np.arange(3))
    elif content == "objects":
        np.savez(path, **{"train/labels": np.array([{}]), "train/avgpool": np.array([{}])})
    elif content != "none":
        features.write(some_features(), str(path), WORLD)
        if content == "torn":
            path.write_bytes(path.read_bytes()[:-100])
        else:
            with np.load(path) as file:
                arrays = dict(file)
            np.savez(path, **{**arrays, "test/labels": np.arange(3)})
    with pytest.raises(RunError) as error:
        features.read(str(path))
    assert f"--features {path}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_features_in_a_file_that_are_not_finite_are_named(value, tmp_path):
    written = some_features()
    written.test.layers["res4"][3, 1] = value
    features.write(written, str(tmp_path / "file.npz"), WORLD)
    with pytest.raises(RunError, match=f"test/res4 of {tmp_path}/file.npz are not finite.*image 3"):
        features.read(str(tmp_path / "file.npz"))
    assert features.read(str(tmp_path / "file.npz"), ["avgpool"])


def test_a_layer_that_is_not_in_a_feature_file_is_named_with_those_that_are(tmp_path):
    features.write(some_features(), str(tmp_path / "file.npz"), WORLD)
    with pytest.raises(RunError, match="no layer res2; there are res4 avgpool"):
        features.read(str(tmp_path / "file.npz"), ["avgpool", "res2"])


# ----------------------------------------------------------------------------------- right or wrong


def test_a_true_class_is_right_where_it_is_among_the_best():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    truth = torch.tensor([1, 1])
    got = [features.share_right(scores, truth, k).tolist() for k in (1, 2, 3, 4)]
    assert got == [[0, 0], [1, 0], [1, 1], [1, 1]]


def test_equal_scores_are_right_by_chance_in_any_order_of_classes():
    scores = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    for order in itertools.permutations(range(5)):
        order = torch.tensor(order)
        truth = order.argsort()  # where each class stands now
        rows = scores[order].expand(5, 5)
        for k, wanted in ((1, [1, 0, 0, 0, 0]), (2, [1, 1 / 3, 1 / 3, 1 / 3, 0]),
                          (4, [1, 1, 1, 1, 0]), (5, [1] * 5)):
            torch.testing.assert_close(features.share_right(rows, truth, k),
                                       torch.tensor(wanted, dtype=torch.float64))
    assert features.share_right(torch.zeros(7, 2, 4), torch.ones(7, 2).long(), 1).eq(0.25).all()


def test_a_score_that_is_no_number_is_never_right():
    scores = torch.tensor([[math.nan] * 3, [math.nan, 1.0, 0.0]])
    for truth in range(3):
        for k in (1, 2, 3):
            got = features.share_right(scores, torch.full((2,), truth), k).tolist()
            assert got == [0, float(truth > 0 and k > truth)]


def test_labels_go_along_with_their_images_on_any_number_of_processes(pool):
    assert pool.run(3, labelled) == [[[i, i] for i in range(11)]] * 3


def labelled():
    """Rows of what an image is and its label, where both are its number."""
    pixels = np.arange(11, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    images = ArrayImages(pixels, None, 1)
    view = augment.View(4, [augment.CenterCrop(4, interpolation="bicubic")], 1)

    def function(crops, labels):
        return {"pair": torch.stack([(crops[:, 0, 0, 0] * 255).round(), labels.float()], dim=1)}

    return features.extract(function, images, view, comm.setup("cpu"), batch_size=2, workers=0,
                            labels=torch.arange(11))["pair"].tolist()


def test_images_are_read_as_the_run_has_read_them(tmp_path):
    said = features.DIGITS | {"bits": 16, "exif_orientation": True}
    state = features.build(features.DIGITS).state_dict()
    torch.save(checkpoint.described(state, said), tmp_path / "backbone.pth")
    for flags, wanted in (([], (16, True)), (["--bits", "8", "--no-exif-orientation"], (8, False))):
        given = ["--checkpoint", str(tmp_path / "backbone.pth"), "--data", "digits", *flags]
        args = features.parse(features.parser("x.py", ""), given)
        world = World(0, 1, torch.device("cpu"))
        source = next(features.sources(args, world, interpolation="bicubic"))
        for images in (source.train, source.test):
            assert (images.bits, images.exif_orientation) == wanted
