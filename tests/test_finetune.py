import contextlib
import io
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import drill
import eval_linear
import finetune
from common import augment, backbones, checkpoint, features, labelled, rng
from common.distributed import RunError, World
from common.images import open_images
from common.loader import Loader
from common.log import Diverged, Log
from common.weights import load_backbone
from helpers import lines, state_of

ALONE = World(0, 1, torch.device("cpu"))
VIT = ["--arch", "vit_micro", "--patch-size", "4"]
TINY = ["--workers", "0", "--limit", "64", "--batch-size", "16", "--epochs", "2",
        "--warmup-epochs", "0", "--log-every", "1"]


def parsed(*flags):
    return finetune.parse_args(["--checkpoint", "random", *map(str, flags)])


def finetuned(*flags):
    """The JSON line of a run in this process; None if it prints none."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        finetune.main(finetune.parse_args([str(flag) for flag in flags]))
    found = printed.getvalue().splitlines()
    return json.loads(found[-1]) if found and found[-1].startswith("{") else None


def tiny(folder, *flags):
    """A tiny run of the supervised network, or of what `--checkpoint` among the flags says."""
    start = [] if "--checkpoint" in flags else ["--checkpoint", "random"]
    return finetuned(*start, *TINY, "--output", folder, *flags)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights files of a small ResNet and a small transformer."""
    folder, made = tmp_path_factory.mktemp("weights"), {}
    for arch in ("resnet_tiny", "vit_micro"):
        torch.manual_seed(1)
        backbone = backbones.build_backbone(
            arch, in_chans=3, stem="small", zero_init_residual=False, image_size=16, patch_size=4,
            positions="sincos", drop_path=0.0)
        made[arch] = folder / f"{arch}.pth"
        state = checkpoint.described(backbone.state_dict(), dict(
            arch=arch, stem="small", patch_size=4, image_size=16, in_chans=3, mean=[0.5],
            std=[0.5]))
        torch.save(state, made[arch])
    return made


# --------------------------------------------------------------------------------------- parse_args


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--protocol", "nobody"], "nobody"),
        (["--data", "folder"], "--protocol: choose one for --data folder"),
        (["--train-fraction", "0"], "--train-fraction: '0'"),
        (["--train-fraction", "0.1", "--train-images", "10"], "not allowed with"),
        (["--protocol", "mae", "--arch", "resnet_tiny"], "vit_huge, not for resnet"),
        (["--drop-path", "0.1"], "drop path 0.1"),
        (["--freeze-blocks", "5"], "--freeze-blocks 5: resnet_tiny has 4"),
        (["--sweep-head", "2"], "--sweep-head goes with --sweep"),
        (["--sweep", "1", "2", "--lr", "0.1"], "--lr 0.1 goes with no --sweep; give --sweep"),
        (["--sweep", "1", "2", "--head-lr", "2"], "--head-lr 2 goes with no --sweep; give --sweep"),
        (["--protocol", "low_shot", "--data", "fake", "--crop-scale", ".5", "1"], "does not crop"),
        (["--arch", "torchvision:resnet18", "--stem", "small"], "--stem small is for ResNets"),
        (["--arch", "torchvision:swin_t", "--drop-path", "0.1"], "not for torchvision:swin_t"),
        (["--checkpoint", "pixels"], "pixels has no weights"),
        (["--epochs", "5"], "--warmup-epochs 5 leaves nothing"),
        (["--probe-data", "digits"], "--probe-data digits is measured with --probe-every alone"),
        (["--mean", "1", "2"], "2 values"),
    ],
)
def test_a_bad_argument_is_one_line_with_its_value(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(*flags)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and named in printed and printed.count("\n") == 1


def test_weights_that_are_not_there_are_refused_first():
    args = parsed("--checkpoint", "nowhere", "--data", "no/images", "--protocol", "vissl")
    with pytest.raises(RunError, match="--checkpoint nowhere: no file nowhere"):
        finetune.main(args)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        parsed("--batch-size", 7)
    assert "--batch-size 7 does not divide among 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "protocol, optimizer, lr, head_lr, decay, batch_size, epochs",
    [  # rates at the published batch size
        ("mae", "adamw", 2e-3, 2e-3, 0.05, 1024, 100),
        ("deit", "adamw", 1e-3, 1e-3, 0.05, 1024, 300),
        ("vissl", "nesterov", 0.1, 0.1, 0, 256, 105),
        ("supervised", "sgd", 0.1, 0.1, 1e-4, 256, 90),
        ("semi_swav", "sgd", 0.02, 5, 0, 256, 20),
        ("semi_barlow_twins", "sgd", 0.005, 0.5, 0, 256, 20),
        ("semi_vicreg", "sgd", 0.03, 0.08, 0, 256, 20),
        ("semi_vissl", "nesterov", 0.05, 0.05, 0, 256, 70),
        ("low_shot", "nesterov", 0.1, 0.1, 5e-4, 256, 90),
        ("clusterfit", "sgd", 0.1, 0.1, 1e-4, 256, 105),
    ],
)
def test_the_protocols_are_the_published_ones(
    protocol, optimizer, lr, head_lr, decay, batch_size, epochs
):
    args = parsed("--protocol", protocol, "--data", "fake")
    scale = batch_size / 256
    assert (args.optimizer, args.weight_decay, args.batch_size, args.epochs) == (
        optimizer, decay, batch_size, epochs)
    assert (args.lr * scale, (args.head_lr or args.lr) * scale) == pytest.approx((lr, head_lr))
    assert args.arch == ("vit_base" if optimizer == "adamw" else "resnet50")
    assert len(finetune.PROTOCOLS) == 11


def test_what_regularises_is_as_published():
    names = ("drop_path", "layer_decay", "erasing", "mixup", "cutmix", "smoothing")
    mae, deit, vissl = (parsed("--protocol", protocol, "--data", "fake")
                        for protocol in ("mae", "deit", "vissl"))
    assert [getattr(mae, name) for name in names] == [0.1, 0.65, 0.25, 0.8, 1.0, 0.1]
    assert [getattr(deit, name) for name in names] == [0.1, 1.0, 0.25, 0.8, 1.0, 0.1]
    assert [getattr(vissl, name) for name in names] == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    sync = {name for name, protocol in finetune.PROTOCOLS.items() if protocol["sync_bn"]}
    decayed = {name for name, protocol in finetune.PROTOCOLS.items() if protocol["decay_norms"]}
    assert (sync, decayed) == ({"semi_swav"}, {"supervised"})


def test_the_other_columns_of_mae_and_a_flag_wins():
    large = parsed("--protocol", "mae", "--data", "fake", "--arch", "vit_large")
    assert (large.lr, large.epochs, large.layer_decay, large.drop_path) == (1e-3, 50, 0.75, 0.2)
    huge = parsed("--protocol", "mae", "--data", "fake", "--arch", "vit_huge", "--patch-size", 14,
                  "--epochs", 100)
    assert (huge.lr, huge.epochs, huge.drop_path) == (1e-3, 100, 0.3)


def test_images_and_backbone_are_the_checkpoints(weights):
    args = finetune.parse_args(["--checkpoint", str(weights["vit_micro"])])
    assert (args.protocol, args.arch, args.data, args.image_size) == (
        "mae", "vit_micro", "digits", 16)
    args = finetune.parse_args(["--checkpoint", str(weights["resnet_tiny"])])
    assert (args.protocol, args.arch, args.views, args.flip) == (
        "small", "resnet_tiny", "digits", False)
    args = parsed("--data", "cifar10")
    assert (args.protocol, args.arch, args.stem, args.image_size, args.flip) == (
        "small", "resnet18", "small", 32, True)
    for signs in ("digits", "gtsrb", "mnist", "sst2", "svhn"):
        assert not parsed("--data", signs, "--protocol", "vissl").flip
    assert {*finetune.NOT_MIRRORED} == {*eval_linear.NOT_MIRRORED}


# --------------------------------------------------------------------------------- training images


def test_balanced_draws_have_the_law_of_the_low_shot_sets_and_are_nested():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], 30))
    before = set()
    for count in range(4, 60):
        rows = labelled.balanced(labels, count, 0)
        wanted = [count // 4 + (place < count % 4) for place in range(4)]
        assert np.bincount(labels[rows]).tolist() == wanted
        assert (np.diff(rows) > 0).all() and before < set(rows.tolist())
        before = set(rows.tolist())
    assert not np.array_equal(rows, labelled.balanced(labels, 59, 1))
    for count in (3, 121):
        with pytest.raises(RunError, match=f"--train-images {count}"):
            labelled.balanced(labels, count, 0)


def test_one_percent_is_inside_ten_percent():
    labels = np.random.default_rng(0).integers(0, 7, 3000)
    one, ten = (set(labelled.class_balanced(labels, share, 3).tolist()) for share in (0.01, 0.1))
    assert one < ten and (len(one), len(ten)) == (30, 300)


def test_parts_of_the_training_images(tmp_path):
    whole = parsed("--train-fraction", 0.1)
    images, test, num_classes = labelled.labelled_images(whole)
    assert (len(images), len(test), num_classes) == (144, 355, 10)
    others, _, _ = labelled.labelled_images(parsed("--train-fraction", 0.1, "--seed", 1))
    assert len(others) == 144 and not np.array_equal(others.index, images.index)
    images, _, _ = labelled.labelled_images(parsed("--train-images", 12))
    assert np.bincount(images.labels).tolist() == [2, 2] + [1] * 8


def test_a_list_names_its_files_by_name_or_path(image_folder, tmp_path):
    path, data = tmp_path / "list.txt", ["--data", image_folder, "--protocol", "vissl"]

    def chosen(*names):
        path.write_text("\n".join(names) + "\n")
        args = parsed(*data, "--subset-list", path)
        images, _, _ = labelled.labelled_images(args)
        return [Path(images.name(row)).name for row in range(len(images))]

    assert chosen("02.jpg", "dogs/03.jpg", "00.jpg") == ["00.jpg", "02.jpg", "03.jpg"]
    for names, message in (
        (["00.jpg", "01.jpg", "77.jpg"], "1 of 3 names are not among .* such as 77.jpg"),
        (["00.jpg", "cats/00.jpg", "01.jpg"], "names an image twice"),
        ([], "0 of 0 names"),
        (["00.jpg", "02.jpg"], "class 1 has no training image"),
    ):
        with pytest.raises(RunError, match=message):
            chosen(*names)
    with pytest.raises(RunError, match="the images are not files"):
        labelled.labelled_images(parsed("--subset-list", path))


def test_a_name_of_two_files_is_refused(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.copy(tmp_path / "images/train/cats/00.jpg", tmp_path / "images/train/dogs/00.jpg")
    (tmp_path / "list.txt").write_text("00.jpg\n01.jpg\n")
    args = parsed("--data", tmp_path / "images", "--protocol", "vissl", "--subset-list",
                  tmp_path / "list.txt")
    with pytest.raises(RunError, match="the name of several training images, such as 00.jpg"):
        labelled.labelled_images(args)


def test_given_labels_are_numbered_and_negative_ones_left_out(tmp_path):
    path = tmp_path / "assignments.npy"
    rows = np.random.default_rng(0).integers(0, 3, (2, 64)) * 5
    rows[0, :4] = -100
    np.save(path, rows)
    images, test, num_classes = labelled.labelled_images(
        parsed("--labels", path, "--limit", 64))
    assert num_classes == 3 and images is test
    assert (images.labels * 5 == rows[0, 4:]).all() and len(images) == 60


@pytest.mark.parametrize("array, message", [
    (np.zeros(63, int), r"int64 of shape \(63,\); wanted a whole number for each of the 64"),
    (np.zeros(64), "float64 of shape"),
    (np.zeros((64, 2), int), r"\(64, 2\)"),
    (np.zeros((0, 64), int), r"\(0, 64\)"),
    (np.zeros(64, int), "1 class, and there must be two"),
    (np.full(64, -100), "0 class"),
])
def test_other_labels_are_refused(array, message, tmp_path):
    np.save(tmp_path / "labels.npy", array)
    with pytest.raises(RunError, match=message):
        labelled.labelled_images(parsed("--labels", tmp_path / "labels.npy", "--limit", 64))


def test_a_file_that_holds_no_labels_is_refused(tmp_path):
    path = tmp_path / "labels.npy"
    for write in (lambda: path.write_text("3\n4\n"), lambda: np.savez(path.open("wb"), a=[1])):
        write()
        with pytest.raises(RunError, match=f"--labels {path}"):
            labelled.read_labels(str(path), 2)
    with pytest.raises(RunError, match="nothing.npy"):
        labelled.labelled_images(parsed("--labels", tmp_path / "nothing.npy"))


def test_a_class_without_a_training_image_is_refused():
    assert labelled.check_classes(np.array([0, 1, 2]), np.array([2, 0])) == 3
    for train, test in (([0, 2], [0]), ([0, 1], [2])):
        with pytest.raises(RunError, match=r"class [12] has no training image"):
            labelled.check_classes(np.array(train), np.array(test))


# -------------------------------------------------------------------------------------------- views


def names_of(args):
    (view,) = finetune.build_views(args)
    steps = [step for step in view.geometry + view.colour if getattr(step, "p", 1) != 0]
    return [type(step).__name__ for step in steps]


def test_the_views_of_the_protocols():
    def steps(protocol):
        return names_of(parsed("--protocol", protocol, "--data", "fake"))

    assert steps("vissl") == ["RandomResizedCrop", "HorizontalFlip", "Normalize"]
    assert steps("mae") == steps("deit") == [
        "RandomResizedCrop", "HorizontalFlip", "RandAugment", "Normalize", "RandomErasing"]
    assert steps("low_shot") == ["Resize", "HorizontalFlip", "Normalize"]
    assert steps("clusterfit") == ["RandomResizedCrop", "HorizontalFlip", "ColorJitter",
                                   "Normalize"]
    assert names_of(parsed()) == ["RandomAffine", "RandomResizedCrop", "Normalize"]
    (view,) = finetune.build_views(parsed("--protocol", "mae", "--data", "fake"))
    crop, _, operations = view.geometry
    assert crop == augment.RandomResizedCrop([0.08, 1.0], (3 / 4, 4 / 3), "bicubic")
    assert operations == augment.RandAugment(2, 9, 0.5, 0.5, (124, 116, 104), "bicubic")
    assert view.colour[-1] == augment.RandomErasing(224, (0.02, 1 / 3), (0.3, 1 / 0.3), 0.25)
    (view,) = finetune.build_views(parsed("--protocol", "clusterfit", "--data", "fake"))
    assert view.colour[0] == augment.ColorJitter(0.4, 0.4, 0.4, 0.2, p=1.0)
    whole = finetune.test_view(parsed("--protocol", "low_shot", "--data", "fake"))
    assert isinstance(whole.geometry[0], augment.Resize)
    central = finetune.test_view(parsed("--protocol", "mae", "--data", "fake"))
    assert (central.geometry[0].resize, central.geometry[0].interpolation) == (256, "bicubic")


# -------------------------------------------------------------------------------------------- model


def test_pooled_patches_go_through_the_norm_after_their_mean():
    model = finetune.Classifier(backbones.build_backbone(
        "vit_micro", in_chans=3, image_size=16, patch_size=4, positions="learned", drop_path=0.0),
        10, "patches", 0.5).double()
    images, trunk = torch.randn(3, 3, 16, 16).double(), model.backbone
    nn.init.normal_(trunk.norm.weight)
    last = []
    trunk.blocks[-1].register_forward_hook(lambda *given: last.append(given[2]))
    trunk(images)
    rows = []
    for tokens in last[0]:
        mean = sum(tokens[1:]) / 16
        mean = (mean - mean.mean()) / (mean.var(correction=0) + 1e-6).sqrt()
        rows.append(model.head(mean * trunk.norm.weight + trunk.norm.bias))
    torch.testing.assert_close(model(images), torch.stack(rows))
    usual = finetune.Classifier(trunk, 10, "usual", None)
    torch.testing.assert_close(usual.head.double()(trunk(images)), usual(images))


def test_a_new_linear_layer_starts_as_the_protocol_has_it():
    for std in (2e-5, 0.01):
        head = finetune.Classifier(backbones.build_backbone(
            "resnet_tiny", in_chans=3, stem="small", zero_init_residual=False), 50, "usual",
            std).head
        assert head.weight.std().item() == pytest.approx(std, rel=0.1) and (head.bias == 0).all()


# --------------------------------------------------------------------------------------------- loss


def test_targets_share_a_part_among_all_classes():
    labels = torch.tensor([2, 0])
    got = finetune.smooth(labels, 4, 0.1)
    torch.testing.assert_close(got, torch.tensor([[0.025, 0.025, 0.925, 0.025],
                                                  [0.925, 0.025, 0.025, 0.025]]))
    logits = torch.randn(2, 4)
    torch.testing.assert_close(F.cross_entropy(logits, got),
                               F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.equal(finetune.smooth(labels, 4, 0.0), F.one_hot(labels, 4).float())


@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.parametrize("box", [None, (1, 2, 4, 3), (0, 0, 5, 7), (2, 2, 2, 6)])
def test_images_and_targets_are_mixed_as_written_in_loops(n, box):
    draw = np.random.default_rng(n)
    images, targets, lambda_ = draw.random((n, 3, 5, 7)), draw.dirichlet([1] * 4, n), 0.3
    wanted_images, wanted_targets = np.empty_like(images), np.empty_like(targets)
    kept = lambda_
    if box is not None:
        inside = [(y, x) for y in range(5) for x in range(7)
                  if box[0] <= y < box[2] and box[1] <= x < box[3]]
        kept = 1 - len(inside) / 35
    for i in range(n):
        partner = n - 1 - i
        for c, y, x in itertools.product(range(3), range(5), range(7)):
            own, other = images[i, c, y, x], images[partner, c, y, x]
            if box is None:
                wanted_images[i, c, y, x] = lambda_ * own + (1 - lambda_) * other
            else:
                wanted_images[i, c, y, x] = other if (y, x) in inside else own
        wanted_targets[i] = kept * targets[i] + (1 - kept) * targets[partner]
    given = torch.from_numpy(images.copy()), torch.from_numpy(targets.copy())
    got = finetune.mix(*given, lambda_, box)
    np.testing.assert_allclose(got[0].numpy(), wanted_images, rtol=1e-12)
    np.testing.assert_allclose(got[1].numpy(), wanted_targets, rtol=1e-12)
    assert (given[0].numpy() == images).all() and (given[1].numpy() == targets).all()
    np.testing.assert_allclose(got[1].sum(1), 1)


def test_mixing_nothing_and_all():
    images, targets = torch.rand(4, 3, 2, 2), torch.eye(4)
    for nothing in ((1.0,), (0.5, (0, 0, 0, 0))):
        got = finetune.mix(images, targets, *nothing)
        assert torch.equal(got[0], images) and torch.equal(got[1], targets)
    swapped = finetune.mix(images, targets, 0.9, (0, 0, 2, 2))
    assert torch.equal(swapped[0], images.flip(0)) and torch.equal(swapped[1], targets.flip(0))


def test_what_is_mixed_how_much_follows_the_beta_law():
    draw = np.random.default_rng(0)
    draws = [finetune.draw_mix(draw, 0.8, 1.0, 32) for _ in range(4000)]
    blends = [lambda_ for lambda_, box in draws if box is None]
    assert 0.47 < len(blends) / 4000 < 0.53
    assert np.var(blends) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.08)
    for lambda_, box in draws:
        if box is not None:
            top, left, bottom, right = box
            side = 2 * (int(32 * math.sqrt(1 - lambda_)) // 2)
            assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 32
            assert bottom - top <= side and right - left <= side
            if top > 0 and bottom < 32:
                assert bottom - top == side
    for alphas, cut in (((0.8, 0), False), ((0, 1), True)):
        kinds = {finetune.draw_mix(draw, *alphas, 32)[1] is not None for _ in range(50)}
        assert kinds == {cut}


# --------------------------------------------------------------------------------------- optimiser


@pytest.mark.parametrize("name, layer", [
    ("cls_token", 0), ("pos_embed", 0), ("patch_embed.proj.weight", 0), ("mask_token", 0),
    ("reg_token", 0), ("register_tokens", 0), ("blocks.0.attn.qkv.weight", 1),
    ("blocks.1.norm1.weight", 2), ("blocks.10.mlp.fc2.bias", 11), ("blocks.11.ls1.gamma", 12),
    ("norm.weight", 13), ("fc_norm.bias", 13), ("head.weight", 13),
])
def test_the_rate_of_a_layer(name, layer):
    factor = 1.0
    for _ in range(13 - layer):
        factor *= 0.65
    assert finetune.layer_scale_of(name, 12, 0.65) == pytest.approx(factor, rel=1e-12)
    assert finetune.layer_scale_of(name, 12, 1.0) == 1


def test_timm_has_the_same_groups_but_for_the_last_norm():
    """timm takes the norm behind the last block for a part of that block; MAE does not."""
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", reg_tokens=2, num_classes=7)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.6)
    names = {p: name for name, p in model.named_parameters()}
    theirs = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups
              for p in group["params"]}
    found = {}
    for name, p in model.named_parameters():
        plain = p.ndim < 2 or name in model.no_weight_decay()
        found[name] = (finetune.layer_scale_of(name, 12, 0.6), 0.0 if plain else 0.05)
    differ = {name for name in found if found[name] != pytest.approx(theirs[name])}
    assert differ == {"norm.weight", "norm.bias"} and theirs["norm.bias"][0] == 0.6


def test_the_groups_of_a_transformer_and_of_a_resnet():
    vit = finetune.Classifier(backbones.build_backbone(
        "vit_micro", in_chans=3, image_size=16, patch_size=4, positions="learned", drop_path=0.0),
        10, "patches", None)
    groups = finetune.parameter_groups(vit, 0.05, False, 1.0, 0.5)
    name_of = {p: name for name, p in vit.named_parameters()}
    found = {name_of[p]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(name_of.values())
    for name, (scale, decay) in found.items():
        plain = vit.get_parameter(name).ndim < 2 or "token" in name or "pos_embed" in name
        assert decay == (0 if plain else 0.05), name
        assert scale == finetune.layer_scale_of(name.removeprefix("backbone."), 4, 0.5), name
    assert found["backbone.norm.weight"] == (1, 0) and found["backbone.cls_token"] == (1 / 32, 0)
    resnet = finetune.Classifier(backbones.build_backbone(
        "resnet_tiny", in_chans=3, stem="small", zero_init_residual=False), 10, "usual", None)
    groups = finetune.parameter_groups(resnet, 5e-4, False, 250.0, 1.0)
    sizes = {(g["lr_scale"], g["weight_decay"]): [p.ndim for p in g["params"]] for g in groups}
    assert sizes[250, 5e-4] == [2] and sizes[250, 0] == [1]
    assert set(sizes[1, 5e-4]) == {4} and set(sizes[1, 0]) == {1}
    (whole,) = finetune.parameter_groups(resnet, 1e-4, True, 1.0, 1.0)
    assert len(whole["params"]) == len(list(resnet.parameters()))


def rates(protocol, *flags, steps=4):
    args = parsed("--protocol", protocol, "--data", "fake", *flags)
    return finetune.learning_rates(
        args.schedule, 1.0, start=args.start_lr / args.lr, final=args.final_lr / args.lr,
        gamma=args.gamma, epochs=args.epochs, warmup_epochs=args.warmup_epochs,
        steps_per_epoch=steps)


def test_the_learning_rates_end_where_they_should():
    mae = rates("mae")
    assert len(mae) == 400 and mae[0] == 0 and mae[10] == 0.5 and mae[20] == 1
    floor = 1e-6 / 2e-3  # of the peak at the published batch
    step = 0.5 * (1 - math.cos(math.pi / 380))
    assert mae[-1] == pytest.approx(floor + (1 - floor) * step)
    assert mae[210] == pytest.approx((1 + floor) / 2)  # half way behind the warm-up
    deit = rates("deit")
    assert deit[0] == pytest.approx(1e-3) and deit[19] < deit[20] < 1
    assert deit[20] == deit[23] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 60)) / 2)
    assert deit[600] == pytest.approx((1 + 0.01) / 2)
    vissl = rates("vissl")
    assert [vissl[4 * e] for e in (29, 30, 59, 60, 89, 90, 99, 100)] == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4])
    assert rates("vissl", "--epochs", 21) == pytest.approx(vissl[::5])
    swav = rates("semi_swav")
    assert [swav[4 * e] for e in (0, 11, 12, 15, 16, 19)] == pytest.approx(
        [1, 1, 0.2, 0.2, 0.04, 0.04])
    barlow = rates("semi_barlow_twins")
    assert barlow[0] == barlow[3] == 1 and barlow[40] == pytest.approx(0.5)
    cluster = rates("clusterfit")
    assert cluster[0] == 0.25 and cluster[10] == pytest.approx(0.625) and cluster[20] == 1


# ---------------------------------------------------------------------------------------- tiny runs


@pytest.mark.parametrize("arch, flags, rates", [
    ("vit_micro", ["--protocol", "mae", "--lr", 2, "--warmup-epochs", 1, "--drop-path", 0.3],
     [0, 1 / 2, *((1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))]),
    ("resnet_tiny", ["--protocol", "supervised", "--lr", 4, "--head-lr", 12],
     [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ("resnet_tiny", ["--protocol", "low_shot", "--lr", 2, "--smoothing", 0.2],
     [1, 1, 0.1, 0.1, 0.01, 0.01]),
])
def test_training_is_the_loop_written_out(arch, flags, rates, weights, tmp_path):
    """Six steps in float64: rates of steps and layers, decay, momentum, targets and mixing."""
    torch.set_default_dtype(torch.float64)
    args = finetune.parse_args(list(map(str, [
        "--checkpoint", weights[arch], *TINY, "--limit", 16, "--batch-size", 8, "--epochs", 3,
        "--seed", 3, *flags, "--output", tmp_path])))
    images = open_images("digits", "train", 3, limit=16)
    trained = finetune.train(args, ALONE, images, 10).state_dict()

    torch.manual_seed(3)
    backbone = features.build(vars(args), positions="learned", drop_path=args.drop_path)
    std = 2e-5 if arch == "vit_micro" else None
    model = finetune.Classifier(backbone, 10, args.pool, std)
    load_backbone(backbone, str(weights[arch]))
    if arch == "vit_micro":
        backbone.norm.reset_parameters()
    groups, scales = [], []
    for name, p in model.named_parameters():
        token = name in ("backbone.cls_token", "backbone.pos_embed")
        decay = {"mae": 0.05, "supervised": 1e-4, "low_shot": 5e-4}[args.protocol]
        plain = (p.ndim < 2 or token) and args.protocol != "supervised"
        groups.append({"params": [p], "weight_decay": 0 if plain else decay})
        scales.append(finetune.layer_scale_of(name.removeprefix("backbone."), 4, 0.75)
                      if args.protocol == "mae" else 3 if args.head_lr and "head" in name else 1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999)) if arch == "vit_micro" else (
        torch.optim.SGD(groups, momentum=0.9, nesterov=args.protocol == "low_shot"))
    loader = Loader(images, finetune.build_views(args), batch_size=8, epochs=3, seed=3,
                    world=ALONE, workers=0)
    for step, batch in enumerate(itertools.chain(*map(loader.epoch, range(3)))):
        floor = 2.5e-7 / 2 if args.protocol == "mae" and step > 1 else 0
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = args.lr * 8 / 256 * (floor + (1 - floor) * rates[step]) * scale
        mixed, labels = batch.views[0], torch.from_numpy(images.labels)[batch.index]
        targets = finetune.smooth(labels, 10, args.smoothing)
        if args.protocol == "mae":
            drawn = finetune.draw_mix(rng.philox(3, rng.MIX, step), 0.8, 1.0, 16)
            mixed, targets = finetune.mix(mixed, targets, *drawn)
        torch.manual_seed(int(rng.philox(3, rng.DEPTH, step, 0).integers(2**63)))
        loss = -(targets * model(mixed).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=1e-7, atol=1e-8)


def test_the_json_line_has_the_documented_keys(weights, tmp_path):
    line = tiny(tmp_path, "--checkpoint", weights["resnet_tiny"])
    assert (line["eval"], line["protocol"]) == ("finetune", "small")
    assert (line["num_train"], line["num_test"]) == (64, 64)
    assert 0 <= line["top1"] <= line["top5"] <= 1 and 0 <= line["mean_per_class"] <= 1
    exported = torch.load(tmp_path / "backbone.pth", weights_only=True)
    start = torch.load(weights["resnet_tiny"], weights_only=True)
    assert exported.keys() == start.keys()
    assert exported._metadata["settings"]["arch"] == "resnet_tiny"
    assert not any(torch.equal(exported[key], start[key]) for key in exported if key in (
        "conv1.weight", "layer4.0.conv2.weight", "bn1.running_mean"))


def test_top_1_and_mean_per_class_are_those_of_the_finished_network(tmp_path):
    flags = ["--limit", 200, "--train-images", 20, "--epochs", 8]
    line = tiny(tmp_path, *flags)
    args = parsed(*TINY, *flags)
    _, images, _ = labelled.labelled_images(args)
    model = finetune.Classifier(features.build(vars(args)), 10, "usual", None)
    model.load_state_dict(state_of(tmp_path)["model"])
    view, right = finetune.test_view(args), []
    for row in range(len(images)):
        crop = torch.from_numpy(view.crop(images.read(row), [np.empty(0)]).copy())[None]
        logits = model.eval()(view.finish(crop, torch.empty(1, 0), torch.device("cpu")))
        right.append(logits.argmax().item() == images.labels[row])
    assert line["top1"] == pytest.approx(np.mean(right), abs=1e-9) and 0.05 < line["top1"] < 1
    each = [np.mean(np.array(right)[images.labels == label]) for label in range(10)]
    assert line["mean_per_class"] == pytest.approx(np.mean(each), abs=1e-9)


def test_the_first_step_starts_from_the_checkpoint(weights, tmp_path):
    """With frozen stages the export has them unchanged, statistics too; the rest has moved."""
    tiny(tmp_path, "--checkpoint", weights["resnet_tiny"], "--freeze-blocks", 3)
    start, end = (torch.load(path, weights_only=True)
                  for path in (weights["resnet_tiny"], tmp_path / "backbone.pth"))
    for key in start:
        frozen = key.startswith(("conv1", "bn1", "layer1", "layer2", "layer3"))
        assert torch.equal(start[key], end[key]) == frozen, key


def test_frozen_blocks_of_a_transformer_stay_and_the_norm_is_new(weights, tmp_path):
    flags = ["--checkpoint", weights["vit_micro"], "--freeze-blocks", 2]
    tiny(tmp_path, *flags)
    start, end = (torch.load(path, weights_only=True)
                  for path in (weights["vit_micro"], tmp_path / "backbone.pth"))
    for key in start:
        frozen = key.startswith(("cls_token", "pos_embed", "patch_embed", "blocks.0", "blocks.1"))
        assert torch.equal(start[key], end[key]) == frozen, key


@pytest.mark.parametrize("protocol", finetune.PROTOCOLS)
def test_every_protocol_runs_on_sixteen_images(protocol, image_folder, tmp_path):
    vit = finetune.PROTOCOLS[protocol]["optimizer"] == "adamw"
    line = finetuned(
        "--checkpoint", "random", "--arch", "vit_micro" if vit else "resnet_tiny", "--stem",
        "small", "--image-size", 16, "--patch-size", 4, "--data", image_folder, "--protocol",
        protocol, "--epochs", 2, "--warmup-epochs", 1, "--batch-size", 8, "--workers", 0,
        "--log-every", 1, "--output", tmp_path)
    assert line["num_train"] == 16 and line["top5"] is None  # of two classes
    assert np.isfinite([entry["loss"] for entry in lines(tmp_path)]).all()


def test_given_labels_have_no_test_accuracy(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(64) % 3)
    line = tiny(tmp_path / "run", "--labels", tmp_path / "a.npy", "--protocol", "clusterfit")
    assert line["top1"] is None and line["num_test"] == 0 and 0 <= line["train_top1"] <= 1
    np.save(tmp_path / "a.npy", np.arange(64) % 4)
    with pytest.raises(RunError, match="--labels is .* and was"):
        tiny(tmp_path / "run", "--labels", tmp_path / "a.npy", "--protocol", "clusterfit")


def test_a_sweep_chooses_on_images_that_it_leaves_out(tmp_path):
    flags = ["--sweep", 1e-6, 0.3, "--sweep-head", 1, 2, "--limit", 100, "--batch-size", 45,
             "--epochs", 4]
    line = tiny(tmp_path, *flags)
    assert len(line["sweep"]) == 4 and line["num_train"] == 100
    best = max(line["sweep"], key=lambda tried: tried["validation"])
    assert (line["lr"], line["head_lr"]) == (best["lr"], best["head_lr"]) and line["lr"] == 0.3
    tenths = [10 * tried["validation"] for tried in line["sweep"]]  # of ten images
    assert tenths == pytest.approx(np.round(tenths).tolist())
    folders = sorted(path.name for path in tmp_path.glob("sweep-*"))
    assert folders == ["sweep-0.3-1", "sweep-0.3-2", "sweep-1e-06-1", "sweep-1e-06-2"]
    identity = json.loads((tmp_path / folders[0] / "run.json").read_text())["data"]
    assert identity.startswith("90 images")
    assert tiny(tmp_path, *flags) == line  # all of it finished: only tested
    flags.insert(1, 1e-7)  # a longer list: what was tried is not trained again
    trained = [(tmp_path / name / "checkpoint.pt").stat().st_mtime_ns for name in folders]
    longer = tiny(tmp_path, *flags)
    assert len(longer["sweep"]) == 6 and all(tried in longer["sweep"] for tried in line["sweep"])
    assert trained == [(tmp_path / name / "checkpoint.pt").stat().st_mtime_ns for name in folders]


def test_a_sweep_leaves_out_rates_that_diverge_and_stops_at_other_errors(tmp_path, capsys):
    args = parsed("--protocol", "semi_swav", "--sweep", 1, 2, 3, "--output", tmp_path)
    images, _, _ = labelled.labelled_images(args)

    def accuracy(tried, kept, held):
        if tried.lr == 2:
            raise Diverged("the loss of step 3 is not finite")
        assert len(kept) + len(held) == 1442 and not set(kept.index) & set(held.index)
        return tried.lr / 10

    found = labelled.sweep(args, images, accuracy)
    assert [tried["lr"] for tried in found] == [3, 1]
    assert "sweep: lr 3, head 750: validation 0.300\n" in capsys.readouterr().out
    assert [tried["head_lr"] for tried in found] == pytest.approx([750, 250])  # 5 / .02 as much
    assert labelled.sweep(args, images, lambda *given: None) is None
    held = []
    for args.seed in (0, 0, 1):
        labelled.sweep(args, images, lambda *given: held.append(given[2].index.tolist()))
    assert held[0] == held[1] != held[2]

    def full(*given):
        raise RunError("the disk is full")

    with pytest.raises(RunError, match="disk is full"):
        labelled.sweep(args, images, full)


# ----------------------------------------------------------------- processes, stopping, going on


def test_any_number_of_processes_trains_the_same(pool, tmp_path):
    flags = ["--sync-bn", "--smoothing", "0.1"]
    line = tiny(str(tmp_path / "one"), *flags)
    first, other = pool.run(2, tiny, str(tmp_path / "two"), *flags)
    assert other is None and first["num_test"] == 64
    one, two = (torch.load(tmp_path / name / "backbone.pth", weights_only=True)
                for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)
    assert abs(line["top1"] - first["top1"]) <= 2 / 64


def test_a_finished_run_is_tested_alike_on_any_number_of_processes(pool, tmp_path):
    """Each process has batch statistics of its own; those of the first one count."""
    line, _ = pool.run(2, tiny, str(tmp_path), "--protocol", "vissl")
    assert tiny(str(tmp_path), "--protocol", "vissl") == line
    assert pool.run(2, tiny, str(tmp_path), "--protocol", "vissl")[0] == line


def stopped(folder, last_step, *flags):
    """A run that is told to stop in a certain step."""
    write = Log.write

    def write_and_stop(self, step, **values):
        write(self, step, **values)
        if step == last_step and self.world.is_main:
            drill.signal.raise_signal(drill.signal.SIGUSR1)

    Log.write = write_and_stop
    try:
        return tiny(folder, *flags)
    finally:
        Log.write = write


@pytest.mark.parametrize("size", [1, 2])
def test_stopped_in_an_epoch_it_ends_with_the_same_weights(size, weights, pool, tmp_path):
    """With mixing, stochastic depth and erasing, which draw from (seed, step) and the image."""
    flags = ["--checkpoint", str(weights["vit_micro"]), "--drop-path", "0.2", "--erasing", "0.25",
             "--epochs", "3"]
    whole, *_ = pool.run(size, tiny, str(tmp_path / "whole"), *flags)
    assert pool.run(size, stopped, str(tmp_path / "cut"), 5, *flags)[0] is None
    assert len(lines(tmp_path / "cut")) == 5
    assert pool.run(size, tiny, str(tmp_path / "cut"), *flags)[0] == whole
    one, two = (state_of(tmp_path / name)["model"] for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert [x["loss"] for x in lines(tmp_path / "whole")] == [
        x["loss"] for x in lines(tmp_path / "cut")]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_it_ends_with_the_same_numbers(processes, weights, tmp_path):
    flags = ["--checkpoint", weights["vit_micro"], *drill.SMALL, "--epochs", 5, "--output"]
    flags[2:2] = ["--warmup-epochs", 1]
    status, whole = drill.run("finetune.py", *flags, tmp_path / "whole", processes=processes)
    assert status == 0, whole
    process = drill.start("finetune.py", *flags, tmp_path / "cut", processes=processes)
    drill.wait_for(lambda: len(drill.log_of(tmp_path / "cut")) >= 20, process)
    drill.kill(process)
    status, printed = drill.run("finetune.py", *flags, tmp_path / "cut", processes=processes)
    assert status == 0 and "resuming" in printed, printed
    assert printed.splitlines()[-1] == whole.splitlines()[-1]


@pytest.mark.parametrize("parts", [dict(registers=2, layer_scale=0.1), dict(class_token=False),
                                   dict(relative_positions=True)])
def test_a_file_that_does_not_say_it_keeps_the_parts_of_its_transformer(parts, tmp_path):
    backbone = backbones.build_backbone(
        "vit_micro", in_chans=3, image_size=16, patch_size=4, positions="learned", drop_path=0.0,
        **parts)
    torch.save(dict(backbone.state_dict()), tmp_path / "bare.pth")
    tiny(tmp_path / "run", "--checkpoint", tmp_path / "bare.pth", *VIT, "--protocol", "mae",
         "--freeze-blocks", 1)
    exported = torch.load(tmp_path / "run/backbone.pth", weights_only=True)
    assert exported.keys() == backbone.state_dict().keys()
    frozen = "blocks.0.ls1.gamma" if "layer_scale" in parts else "blocks.0.attn.qkv.weight"
    assert torch.equal(exported[frozen], backbone.state_dict()[frozen])
    if "relative_positions" in parts:
        assert (exported["shared_rel_pos.relative_position_bias_table"] == 0).all()


def test_other_labels_of_the_same_files_are_refused(image_folder, tmp_path):
    files = sorted(Path(image_folder).glob("train/*/*.jpg"))

    def run(period):
        (tmp_path / "list.txt").write_text("".join(
            f"{file} {row % period}\n" for row, file in enumerate(files)))
        return tiny(tmp_path / "run", "--data", tmp_path / "list.txt", "--test-data",
                    tmp_path / "list.txt", "--protocol", "small", "--arch", "resnet_tiny", "--stem",
                    "small", "--image-size", 16, "--batch-size", 8)

    run(2)
    with pytest.raises(RunError, match="--labels is .* and was"):
        run(4)


def test_other_settings_and_other_weights_are_refused(weights, tmp_path):
    flags = ["--checkpoint", weights["resnet_tiny"]]
    tiny(tmp_path / "run", *flags)
    with pytest.raises(RunError, match=r"--lr is 9\.0 and was .*--no-resume"):
        tiny(tmp_path / "run", *flags, "--lr", 9)
    with pytest.raises(RunError, match="--checkpoint does not name the weights"):
        tiny(tmp_path / "run")
    moved = tmp_path / "moved.pth"
    shutil.copy(weights["resnet_tiny"], moved)
    tiny(tmp_path / "run", "--checkpoint", moved)  # the same weights in another place
    start = torch.load(moved, weights_only=True)
    del start["conv1.weight"]
    torch.save(start, moved)
    with pytest.raises(RunError, match="has no tensor conv1.weight"):
        tiny(tmp_path / "other", "--checkpoint", moved)


def test_positions_of_another_size_are_resampled(weights, tmp_path):
    tiny(tmp_path, "--checkpoint", weights["vit_micro"], "--image-size", 32)
    exported = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert exported["pos_embed"].shape == (1, 65, 96)


def test_a_batch_larger_than_the_images_is_all_of_them(tmp_path):
    line = tiny(tmp_path, "--train-images", 10, "--limit", 200)
    assert line["num_train"] == 10 and len(lines(tmp_path)) == 2
