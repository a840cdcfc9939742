import contextlib
import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn

import drill
import eval_segmentation
from common import augment, backbones, checkpoint, features, images, label_maps, workers
from common.distributed import RunError, World
from common.loader import Loader
from common.windows import enlarged, enlarged_argmax, scores_of_pixels, starts
from eval_segmentation import class_shares, kept_channels, knn_scores, mean_iou, pixel_loss
from helpers import check_joined, own_rows

ALONE = World(0, 1, torch.device("cpu"))
IGNORED = label_maps.IGNORED


def evaluate(*flags):
    """The JSON line, which the first process alone prints, and all that was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        eval_segmentation.main(eval_segmentation.parse_args([str(flag) for flag in flags]))
    lines = printed.getvalue().splitlines()
    return json.loads(lines[-1]) if lines else None, printed.getvalue()


# --------------------------------------------------------------------------------------- parse_args


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--epochs", "3"], "--epochs does not go with --method knn"),
        (["--method", "linear", "--k", "3"], "--k does not go with --method linear"),
        (["--data", "somewhere"], "--data somewhere needs its label maps: --labels FOLDER"),
        (["--data", "voc2012", "--labels", "x"], "--data voc2012 has its label maps"),
        (["--labels", "x"], "--labels x are of a folder --data"),
        (["--windows", "whole", "--stride", "8"], "--stride 8 is for --windows slide"),
        (["--image-size", "16", "--stride", "17"], "--stride 17 leaves pixels"),
        (["--num-classes", "256"], "--num-classes 256: at most 255"),
        (["--index", "x"], "--index x is of tars"),
        (["--num-classes", "1"], "'1'"),
        (["--ignore", "-1"], "'-1'"),
        (["--layer", "avgpool"], "avgpool"),
    ],
)
def test_a_bad_argument_is_one_line_with_its_value(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        eval_segmentation.parse_args(["--checkpoint", "random", *flags])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and named in printed and printed.count("\n") == 1


def test_a_batch_that_does_not_divide_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        eval_segmentation.parse_args(["--checkpoint", "random", "--method", "linear"])
    assert "--train-batch-size 16 does not divide among 3" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ measure


def iou_by_loops(pred, target, num_classes, ignore):
    ious = []
    for c in range(num_classes):
        both = either = 0
        for p, t in zip(pred.ravel().tolist(), target.ravel().tolist(), strict=True):
            if t != ignore:
                both += p == c and t == c
                either += p == c or t == c
        ious.append(both / either if either else math.nan)
    return ious, np.nanmean(ious) if not np.isnan(ious).all() else math.nan


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.int32])
@pytest.mark.parametrize("ignore", [255, 0, 3])
def test_mean_iou_is_that_of_loops(dtype, ignore):
    rng = np.random.default_rng(0)
    pred = rng.integers(0, 5, (3, 7, 9)).astype(dtype)
    target = rng.integers(0, 4, (3, 7, 9)).astype(dtype)  # 5 is in neither, 4 is never true
    target[rng.random(target.shape) < 0.2] = ignore
    ious, mean = mean_iou(torch.from_numpy(pred), torch.from_numpy(target), 6, ignore)
    wanted, wanted_mean = iou_by_loops(pred, target, 6, ignore)
    assert ious.dtype == torch.float64 and ious[5].isnan() and ious[4] == 0
    np.testing.assert_allclose(ious.numpy(), wanted, rtol=1e-12)
    assert mean.item() == pytest.approx(wanted_mean, rel=1e-12)


def test_mean_iou_is_that_of_scikit_learns_confusion_matrix():
    rng = np.random.default_rng(1)
    pred, target = rng.integers(0, 21, (2, 64, 64)), rng.integers(0, 21, (2, 64, 64))
    target[:, :5] = 255
    matrix = confusion_matrix(target[target != 255], pred[target != 255], labels=range(21))
    right = np.diag(matrix)
    wanted = right / (matrix.sum(0) + matrix.sum(1) - right)
    ious, mean = mean_iou(torch.from_numpy(pred), torch.from_numpy(target), 21, 255)
    np.testing.assert_allclose(ious.numpy(), wanted, rtol=1e-12)
    assert mean.item() == pytest.approx(wanted.mean(), rel=1e-12)


def test_mean_iou_of_nothing_and_of_everything():
    zeros = torch.zeros(4, 4, dtype=torch.uint8)
    ious, mean = mean_iou(zeros, torch.full_like(zeros, 255), 3, 255)
    assert ious.isnan().all() and mean.isnan()
    ious, mean = mean_iou(zeros, zeros, 3, 255)
    assert ious[0] == 1 and ious[1:].isnan().all() and mean == 1
    ious, _ = mean_iou(torch.full_like(zeros, 255), zeros, 3, 255)  # no class is a wrong one
    assert ious[0] == 0 and ious[1:].isnan().all()
    with pytest.raises(ValueError, match="targets from 0 to 200"):
        mean_iou(zeros, zeros.clone().fill_diagonal_(200), 3, 255)


# ----------------------------------------------------------------------------------- maps, windows


def test_windows_begin_as_published():
    assert starts(512, 512, 341) == [0] and starts(300, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]  # the last one ends with the image
    assert starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]
    assert starts(854, 512, 341) == [0, 341, 342] and starts(853, 512, 341) == [0, 341]


@pytest.mark.parametrize("size", [(12, 20), (5, 7), (16, 4), (3, 30)])
@pytest.mark.parametrize("window, stride", [(8, 5), (8, 8), (7, 2), (40, 40)])
def test_windows_together_are_the_image(size, window, stride):
    image = torch.randn(3, *size)
    found = scores_of_pixels(lambda cut: cut, image, window, stride, side=1)
    torch.testing.assert_close(found, image)
    filled = scores_of_pixels(lambda cut: cut, image, window, stride, side=4)
    torch.testing.assert_close(filled, image)  # what is filled up is cut off again
    seen = []
    scores_of_pixels(lambda cut: seen.append(cut.shape) or cut[:, :, ::4, ::4], image, window,
                     stride, side=4)
    assert all(s % 4 == 0 for shape in seen for s in shape[2:])


def test_where_windows_overlap_scores_are_averaged():
    """Two windows of a row of six pixels, whose scores are 1 and 3."""
    image = torch.zeros(3, 4, 6)
    values = torch.tensor([1.0, 3.0])
    found = scores_of_pixels(lambda cut: values[:, None, None, None].expand(-1, 1, 1, 1), image,
                             window=4, stride=2, side=4)
    torch.testing.assert_close(found, torch.tensor([1.0, 1, 2, 2, 3, 3]).expand(1, 4, 6))


@pytest.mark.parametrize("size", [(5, 7), (31, 40), (2, 3), (1, 64)])
def test_enlarging_is_torchs_bilinear_interpolation(size):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    wanted = F.interpolate(x, size=size, mode="bilinear")
    torch.testing.assert_close(enlarged(x, size), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_the_best_class_is_that_of_all_enlarged_scores(chunk):
    scores = torch.randn(11, 5, 7)
    wanted = F.interpolate(scores[None], size=(31, 40), mode="bilinear")[0].argmax(0)
    found = enlarged_argmax(scores, (31, 40), chunk)
    assert torch.equal(found, wanted)
    assert not enlarged_argmax(torch.zeros(11, 5, 7), (31, 40), chunk).any()  # of equals the first


@pytest.mark.parametrize("arch, stem, layer, side", [
    ("resnet18", "imagenet", "res5", 32), ("resnet50", "imagenet", "res4", 16),
    ("resnet_tiny", "small", "res5", 8), ("resnet_tiny", "small", "res2", 1),
    ("vit_micro", None, "patches", 4),
])
def test_a_map_has_a_place_for_each_patch(arch, stem, layer, side):
    settings = features.DIGITS | dict(arch=arch, stem=stem)
    assert eval_segmentation.patch_side(settings, layer) == side
    backbone = features.build(settings).eval()
    for parts in ((), ("class_token",)) if arch == "vit_micro" else ((),):
        if parts:
            backbone = features.build(settings | dict(class_token=False, registers=2)).eval()
        with torch.no_grad():
            found = eval_segmentation.feature_map(backbone, torch.randn(2, 3, 64, 96), layer, side)
        assert found.shape[2:] == (64 // side, 96 // side)


def test_patch_tokens_stand_where_their_patches_are():
    """A transformer without blocks, one patch of whose image is changed, changes there alone."""
    backbone = features.build(features.DIGITS | dict(arch="vit_micro")).eval()
    backbone.blocks[0].forward = lambda x, bias: x
    backbone.blocks = backbone.blocks[:1]
    image = torch.randn(1, 3, 16, 24)
    other = image.clone()
    other[:, :, 4:8, 16:20] += 1
    with torch.no_grad():
        one, two = (eval_segmentation.feature_map(backbone, x, "", 4) for x in (image, other))
    moved = (one != two).any(1)[0]
    assert moved.nonzero().tolist() == [[1, 4]]
    pixels = eval_segmentation.feature_map(features.Pixels(), image, "", 4)
    assert torch.equal(pixels[0, :, 1, 4].view(3, 4, 4), image[0, :, 4:8, 16:20])


# -------------------------------------------------------------------------------------------- k-NN


@pytest.mark.parametrize("grid", [(2, 3), (3, 5), (9, 12)])  # the second does not divide the map
def test_the_classes_of_patches_are_those_of_their_pixels(grid):
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, (2, 9, 12)).astype(np.uint8)
    classes[rng.random(classes.shape) < 0.3] = IGNORED
    wanted = np.zeros((2, *grid, 4))
    for n, y, x in itertools.product(*map(range, classes.shape)):
        if classes[n, y, x] != IGNORED:
            wanted[n, y * grid[0] // 9, x * grid[1] // 12, classes[n, y, x]] += 1
    found = class_shares(torch.from_numpy(classes), grid, 4)
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("k", [3, 500])
def test_votes_are_those_of_loops(k):
    rng = np.random.default_rng(0)
    maps, bank = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(400, 5))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    shares = rng.dirichlet(np.ones(6), 400)
    wanted = np.zeros((2, 6, 3, 4))
    for n, y, x in itertools.product(range(2), range(3), range(4)):
        query = maps[n, :, y, x] / np.linalg.norm(maps[n, :, y, x])
        cosines = bank @ query
        order = np.argsort(-cosines, kind="stable")[:k]
        votes = np.exp((cosines[order] - cosines.max()) / 0.1)
        wanted[n, :, y, x] = (votes[:, None] / votes.sum() * shares[order]).sum(0)
    found = knn_scores(*map(torch.from_numpy, (maps, bank, shares)), k, 0.1)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)
    scaled = knn_scores(*map(torch.from_numpy, (7 * maps, bank, shares)), k, 0.1)
    torch.testing.assert_close(scaled, found)
    low = knn_scores(*(torch.from_numpy(x).float() for x in (maps, bank, shares)), k, 0.001)
    assert low.isfinite().all()  # exp(1000) is not


# ------------------------------------------------------------------------------------------ linear


def bilinear(values, size):
    """Values (h, w) enlarged by loops: pixels' centres, edges repeated."""
    found = np.zeros(size)
    for y, x in itertools.product(range(size[0]), range(size[1])):
        at = [min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
              for i, n, m in zip((y, x), values.shape, size, strict=True)]
        low = [int(a) for a in at]
        high = [min(b + 1, n - 1) for b, n in zip(low, values.shape, strict=True)]
        (dy, dx) = (a - b for a, b in zip(at, low, strict=True))
        found[y, x] = ((1 - dy) * ((1 - dx) * values[low[0], low[1]] + dx * values[low[0], high[1]])
                       + dy * ((1 - dx) * values[high[0], low[1]] + dx * values[high[0], high[1]]))
    return found


def test_the_loss_is_that_of_loops():
    rng = np.random.default_rng(0)
    logits, classes = rng.normal(size=(2, 4, 2, 3)), rng.integers(0, 4, (2, 7, 8))
    classes[rng.random(classes.shape) < 0.3] = IGNORED
    total = counted = 0
    for image, target in zip(logits, classes, strict=True):
        large = np.stack([bilinear(plane, target.shape) for plane in image])
        for y, x in itertools.product(range(7), range(8)):
            if target[y, x] != IGNORED:
                total += math.log(np.exp(large[:, y, x]).sum()) - large[target[y, x], y, x]
                counted += 1
    found = pixel_loss(torch.from_numpy(logits), torch.from_numpy(classes))
    assert found.item() == pytest.approx(total / counted, rel=1e-9)
    assert pixel_loss(torch.zeros(2, 4, 2, 3), torch.from_numpy(classes)).item() == pytest.approx(
        math.log(4))
    nothing = torch.zeros(2, 4, 2, 3, requires_grad=True)
    pixel_loss(nothing, torch.full((2, 7, 8), IGNORED)).backward()
    assert not nothing.grad.any()


def loss_and_gradients(logits, classes):
    leaf = own_rows(logits).requires_grad_()
    value = pixel_loss(leaf, own_rows(classes))
    value.backward()
    return value.item(), (leaf.grad / eval_segmentation.comm.size()).numpy()


@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_gradients_of_processes_are_those_of_the_joined_batch(pool, size):
    """Where they have unequal numbers of pixels that count."""
    rng = np.random.default_rng(0)
    logits, classes = rng.normal(size=(4, 3, 2, 2)), rng.integers(0, 3, (4, 6, 6))
    classes[0] = IGNORED
    classes[1, :3] = IGNORED
    check_joined(pool, size, loss_and_gradients, logits, classes)


def test_dropped_channels_are_a_function_of_seed_step_and_image():
    index = torch.tensor([5, 3, 9])
    found = kept_channels(200, 0.1, 0, index, 7)
    assert torch.equal(found[1:2], kept_channels(200, 0.1, 0, index[1:2], 7))
    for other in (kept_channels(200, 0.1, 1, index, 7), kept_channels(200, 0.1, 0, index, 8)):
        assert not torch.equal(found, other)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.9])
    many = kept_channels(1000, 0.1, 0, torch.arange(100), 0)
    assert many.mean().item() == pytest.approx(1, abs=0.005)


def test_the_head_normalises_then_classifies_the_kept_channels():
    head, maps = eval_segmentation.Head(6, 3), 5 + torch.randn(4, 6, 2, 2)
    kept = torch.tensor([1.0, 0, 1, 0, 1, 1]).expand(4, 6) / 0.5
    torch.testing.assert_close(head(maps, kept), head.conv(head.norm(maps * kept[..., None, None])))
    assert head.conv.weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert not head.conv.bias.any()


def test_the_protocol_is_the_published_one():
    p = eval_segmentation.PROTOCOL
    assert p["lr"] * p["batch_size"] / 256 == pytest.approx(1e-3) and p["weight_decay"] == 1e-3
    assert (p["steps"], p["warmup_steps"], p["dropout"]) == (40_000, 1500, 0.1)
    assert p["factor"] == (0.5, 2.0)
    args = eval_segmentation.parse_args(["--checkpoint", "random"])
    assert (args.k, args.temperature, args.memory) == (30, 0.02, 2**20)


# ------------------------------------------------------------------------------ sources and views


def write(root, count=6, size=(24, 32), channels=3, split="train", values=3):
    """Images whose red is 40 times the class of the pixel, and their maps, in blocks of 4 px."""
    rng = np.random.default_rng(len(split))
    for i in range(count):
        blocks = rng.integers(0, values, (size[0] // 4, size[1] // 4))
        classes = blocks.repeat(4, 0).repeat(4, 1).astype(np.uint8)
        noise = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
        noise[..., 0] = 40 * classes
        for kind, array in (("images", noise), ("labels", classes)):
            folder = root / kind / split / "a"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"{i}.png")
    return root


@pytest.fixture
def pictures(tmp_path):
    """Six images in train/ and three in val/; classes 0, 1 and 2."""
    write(tmp_path)
    return write(tmp_path, count=3, split="val")


def given(root, *flags):
    return ["--data", root / "images", "--labels", root / "labels", "--workers", 0, *flags]


def test_maps_are_read_as_palette_gray_and_one_bit(tmp_path):
    classes = np.array([[0, 1], [7, 255]], dtype=np.uint8)
    Image.new("RGB", (2, 2)).save(tmp_path / "image.png")

    def read(*ignore):
        source = label_maps.MappedFiles([tmp_path / "image.png"],
                                        label_maps.as_bytes([tmp_path / "x.png"]), 3, str(tmp_path))
        source.ignore = ignore
        found = np.asarray(source.read(0)[-1])
        assert found.dtype == np.uint8
        return found.tolist()

    gray = Image.fromarray(classes)
    palette = gray.convert("P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    for image in (gray, palette):
        image.save(tmp_path / "x.png")
        assert read(255) == classes.tolist()
    assert read(7, 0, 255) == [[255, 1], [255, 255]]
    Image.fromarray(classes > 0).save(tmp_path / "x.png")
    assert read(255) == [[0, 1], [1, 1]]
    Image.fromarray(np.array([[3, 65535], [0, 0]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert read(65535) == [[3, 255], [0, 0]]
    with pytest.raises(RunError, match="image.png has class 65535; the largest there can be is 25"):
        read(255)


def test_voc2012_is_read_as_torchvision_does(tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, names in (("train", ["b", "a"]), ("val", ["c"])):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            noise = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
            Image.fromarray(noise).save(voc / "JPEGImages" / f"{name}.jpg")
            classes = Image.fromarray(rng.integers(0, 21, (40, 56), dtype=np.uint8))
            classes.convert("P").save(voc / "SegmentationClass" / f"{name}.png")
    line, printed = evaluate("--checkpoint", "pixels", "--arch", "vit_micro", "--patch-size", 8,
                             "--image-size", 32, "--data", "voc2012", "--data-root", tmp_path)
    assert "2 training and 1 test images, 21 classes" in printed and "tvmonitor" in printed
    assert line["num_test"] == 1 and len(line["per_class"]) == 21
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(RunError, match="voc2012: not .whole. under"):
        evaluate("--checkpoint", "pixels", "--data", "voc2012", "--data-root", tmp_path)


def test_sizes_that_images_are_resized_to():
    assert label_maps.fitted((500, 375), 512) == (683, 512)
    assert label_maps.fitted((375, 500), 512) == (512, 683)
    assert label_maps.fitted((3000, 3), 512) == (2048, 2)
    assert label_maps.fitted((10_000, 1), 8) == (32, 1)


def test_an_image_and_its_map_are_cropped_alike(pictures):
    """Where the image is not enlarged, red tells the class of every pixel."""
    source = label_maps.open_mapped(str(pictures / "images"), "train", 3, ignore=(255,),
                                    labels=str(pictures / "labels"))
    crop = label_maps.ScaledCrop(24, (1, 1), fill=(250, 0, 0), interpolation="bilinear")
    view = label_maps.MappedView(32, [crop, augment.HorizontalFlip(p=0.5),
                                      augment.Normalize([0.0], [1.0])], 3)
    corners = set()
    for i, draw in itertools.product(range(3), range(8)):
        u = np.random.default_rng(draw).random((1, view.num_uniforms))
        geometry, colour = view.draw(u, np.array([[24, 32]]))
        crops = view.crop(source.read(i), [p[0] for p in geometry])
        found = view.finish(torch.from_numpy(crops)[None], torch.from_numpy(colour), ALONE.device)
        assert found.shape == (1, 4, 32, 32)
        red, classes = (found[0, 0] * 255 / 40).round(), found[0, 3]
        assert torch.equal(classes == IGNORED, red == 6) and (classes == IGNORED).sum() == 8 * 32
        assert torch.equal(red[classes != IGNORED], classes[classes != IGNORED])
        corners.add(tuple(classes[0, :8].tolist()))
    assert len(corners) > 3
    halves = label_maps.ScaledCrop(24, (0.5, 0.5), fill=(9, 0, 0), interpolation="bilinear")
    small = halves.apply(source.read(0)[1], np.array([0.0, 0, 0]), (32, 32))
    assert set(np.unique(np.asarray(small))) <= {0, 1, 2, IGNORED}  # no mixture of two classes
    assert (np.asarray(small) != IGNORED).sum() == 12 * 16
    some = label_maps.ScaledCrop(24, (0.5, 1.5), fill=(9, 0, 0), interpolation="bilinear")
    small = some.apply(source.read(0)[1], np.array([0.25, 0, 0]), (32, 32))  # 3/4 of the size
    assert (np.asarray(small) != IGNORED).sum() == 18 * 24
    twice = label_maps.ScaledCrop(24, (2, 2), fill=(9, 0, 0), interpolation="bilinear")
    for plane, how in zip(source.read(0), ("BILINEAR", "NEAREST"), strict=True):
        large = plane.resize((64, 48), Image.Resampling[how])
        found = twice.apply(plane, np.array([0, 0.5, 0.25]), (32, 32))
        assert np.array_equal(found, large.crop((16, 4, 48, 36)))


def test_the_drawn_digits_are_the_same_everywhere_and_have_their_split():
    train, test = (label_maps.open_mapped("digits", split, 1, labels=None, ignore=(255,))
                   for split in ("train", "test"))
    again = label_maps.open_mapped("digits", "train", 1, labels=None, ignore=(255,), limit=10)
    assert (len(train), len(test), len(again)) == (400, 200, 10)
    assert np.array_equal(np.asarray(again.read(1)[0]), np.asarray(train.read(40)[0]))
    assert np.array_equal(np.asarray(again.read(1)[1]), np.asarray(train.read(40)[1]))
    assert set(np.unique(test.labels)) == set(range(11))
    train.ignore = (0, 255)
    assert set(np.unique(np.asarray(train.read(0)[-1]))) < {*range(1, 11), IGNORED}


# ------------------------------------------------------------------------------------------ errors


def broken(root, kind, split="train", number=2):
    return root / kind / split / "a" / f"{number}.png"


def spoil(root, how):
    """Something wrong with one image or map of `pictures`."""
    name = broken(root, "images")
    if how == "no map":
        broken(root, "labels").unlink()
    elif how == "another size":
        Image.new("L", (24, 32)).save(broken(root, "labels"))
    elif how == "too many classes":
        Image.new("L", (32, 24), 3).save(broken(root, "labels", "val"))
        name = broken(root, "images", "val")
    elif how == "colours":
        Image.new("RGB", (32, 24)).save(broken(root, "labels"))
    elif how == "no image":
        broken(root, "images", "val").write_bytes(b"no image")
    elif how == "narrow":
        for kind, mode in (("images", "RGB"), ("labels", "L")):
            Image.new(mode, (3000, 3)).save(broken(root, kind, "val"))
        name = broken(root, "images", "val")
    elif how == "all ignored":
        for number in range(3):
            Image.new("L", (32, 24), 255).save(broken(root, "labels", "val", number))
    elif how == "one class":
        for number in range(6):
            Image.fromarray(np.eye(24, 32, dtype=np.uint8) * 255).save(
                broken(root, "labels", number=number))
    elif how == "no test images":
        (root / "images" / "val").rename(root / "images" / "other")
    return str(name)


FAULTS = {
    "no map": "1 of 6 images have no label map, such as {}, which needs",
    "another size": "{} has 32 x 24 px, and its label map 24 x 32",
    "too many classes": "{}: class 3 in its label map, and classes are 0 to 2 ",
    "colours": "is no label map (Pillow mode RGB)",
    "no image": "cannot be read",
    "narrow": "{} has 3000 x 3 px, so 64 x 1 at --resize 16, less than a patch of 4 px",
    "all ignored": "no pixel counts of the 3 test images (--ignore 255)",
    "one class": "class 0 has every pixel that counts of the 6 training images (--ignore 255)",
    "no test images": "no folder val or validation or test in it",
}


def test_more_classes_than_a_set_has_are_numbered_and_fewer_refused():
    flags = ["--checkpoint", "pixels", "--image-size", 48, "--limit", 3, "--num-classes"]
    line, _ = evaluate(*flags, 13)
    assert [*line["per_class"]][-3:] == ["9", "11", "12"] and line["per_class"]["12"] is None
    with pytest.raises(RunError, match="in its label map, and classes are 0 to 2"):
        evaluate(*flags, 3)


def test_photographs_are_turned_as_asked(pictures):
    """Of maps that are drawn on the upright photograph."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = broken(pictures, "images")
    Image.open(path).rotate(90, expand=True).save(path, exif=exif)
    flags = ["--checkpoint", "pixels", "--image-size", 32, *given(pictures)]
    with pytest.raises(RunError, match="24 x 32 px, and its label map 32 x 24"):
        evaluate(*flags)
    assert evaluate(*flags, "--exif-orientation")[0]["num_train"] == 6


def test_the_precision_is_of_the_backbone_alone(pictures):
    flags = ["--checkpoint", "random", "--arch", "vit_micro", "--patch-size", 4, "--image-size", 16,
             *given(pictures)]
    lines = [evaluate(*flags, "--amp", amp)[0] for amp in ("none", "bf16")]
    assert lines[0]["miou"] != lines[1]["miou"] == pytest.approx(lines[0]["miou"], abs=0.05)


@pytest.mark.parametrize("how", FAULTS)
def test_what_does_not_fit_is_told_before_anything_is_made_of_it(how, pictures):
    name = spoil(pictures, how)
    with pytest.raises(RunError) as error:
        evaluate("--checkpoint", "pixels", "--arch", "vit_micro", "--patch-size", 4,
                 "--image-size", 16, *given(pictures))
    assert FAULTS[how].format(name) in str(error.value) and "\n" not in str(error.value)


def fault_on_a_process(flags):
    with pytest.raises(RunError) as error:
        evaluate(*flags)
    return str(error.value)


def test_a_fault_that_one_process_meets_is_told_by_all(pool, pictures):
    name = spoil(pictures, "too many classes")
    found = pool.run(2, fault_on_a_process, ["--checkpoint", "pixels", "--image-size", 16,
                                             *given(pictures)])
    assert found[0] == found[1] and name in found[0]


def test_maps_in_the_place_of_the_images_are_refused(pictures):
    with pytest.raises(RunError, match="the label maps need a folder of their own"):
        evaluate("--checkpoint", "pixels", "--data", pictures / "labels", "--labels",
                 pictures / "labels")


def test_images_without_maps_and_backbones_without_a_map_are_refused():
    with pytest.raises(RunError, match="--data digits2 has no label maps; give one of digits"):
        label_maps.open_mapped("digits2", "train", 3, labels=None, ignore=(255,))
    with pytest.raises(RunError, match="torchvision:alexnet gives a pooled feature alone"):
        evaluate("--checkpoint", "random", "--arch", "torchvision:alexnet", "--image-size", 64)


def test_what_does_not_fit_is_refused_before_the_first_is_measured(tmp_path, monkeypatch):
    net = backbones.build_backbone("resnet_tiny", in_chans=3, stem="small",
                                   zero_init_residual=False)
    files = [tmp_path / f"{bits}.pth" for bits in (8, 16)]
    for bits, file in zip((8, 16), files, strict=True):
        torch.save(checkpoint.described(net.state_dict(), {"bits": bits}), file)
    line, _ = evaluate("--checkpoint", "pixels", files[0], "--limit", 2)
    assert [row["layer"] for row in line["checkpoints"]] == ["pixels", "res5"]  # each its own
    monkeypatch.setattr(eval_segmentation, "evaluate", None)
    with pytest.raises(RunError, match=f"{files[1]}: --bits 16"):
        evaluate("--checkpoint", *files, "--limit", 2)


def test_a_class_that_no_training_pixel_has_is_told_and_never_predicted(pictures):
    Image.fromarray(np.full((24, 32), 3, np.uint8)).save(broken(pictures, "labels", "val"))
    flags = ["--checkpoint", "pixels", "--arch", "vit_micro", "--patch-size", 4, "--image-size", 16,
             *given(pictures, "--num-classes", 5, "--ignore", 255, 1)]
    for method in ([], ["--method", "linear", "--epochs", 2, "--output", pictures / "out"]):
        line, printed = evaluate(*flags, *method)
        assert "warning: classes without a training pixel: 3\n" in printed
        assert line["per_class"]["3"] == 0 and line["per_class"]["4"] is None
        assert line["per_class"]["1"] is None  # ignored, and not predicted


# ---------------------------------------------------------------------------------- parts by loops


def task_of(*flags):
    """What a command does first, and its flags."""
    args = eval_segmentation.parse_args(["--checkpoint", "pixels", *map(str, flags)])
    _, found = next(eval_segmentation.tasks(args, ALONE))
    return next(found), args


def test_remembered_are_patches_with_the_shares_of_their_pixels(pictures):
    """Of images that are made smaller, to sides that patches do not divide; half of one ignored."""
    classes = np.array(Image.open(broken(pictures, "labels")))
    classes[:, :16] = 1
    Image.fromarray(classes).save(broken(pictures, "labels"))
    task, _ = task_of("--arch", "vit_micro", "--patch-size", 8, "--image-size", 40, "--resize", 20,
                      "--mean", 0, "--std", 1, *given(pictures, "--ignore", 1, 255))
    rows, shares = [], []
    for i in range(6):
        image, classes = (Image.open(broken(pictures, kind, number=i)).resize(
            (27, 20), how) for kind, how in (("images", Image.Resampling.BILINEAR),
                                             ("labels", Image.Resampling.NEAREST)))
        pixels = np.pad(np.asarray(image) / 255, ((0, 4), (0, 5), (0, 0)))
        classes = np.pad(np.asarray(classes), ((0, 4), (0, 5)), constant_values=IGNORED)
        for top, left in itertools.product(range(0, 24, 8), range(0, 32, 8)):
            there = slice(top, top + 8), slice(left, left + 8)
            counts = np.array([(classes[there] == c).sum() for c in (0, 2)])
            if counts.any():
                rows.append(pixels[there].transpose(2, 0, 1).ravel())
                shares.append(counts / counts.sum())
    bank, found = eval_segmentation.remember(task, 10**6, 0)
    rows = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    assert len(rows) == 6 * 12 - 3 and len(np.unique(shares)) > 10
    np.testing.assert_allclose(bank, rows, atol=1e-6)
    np.testing.assert_allclose(found, shares, atol=1e-6)
    few, other = (eval_segmentation.remember(task, 12, seed)[0] for seed in (0, 1))
    assert len(few) == len(other) == 12 and not torch.equal(few, other)
    whole = label_maps.resized(task.source.train, 0, 20)[2]  # what is tested stays as it is
    assert np.array_equal(whole, task.source.train.read(0)[-1])


def test_training_is_the_loop_written_out(pictures):
    """Patches do not divide the crop; a class is ignored, so that the last one is the second."""
    torch.set_default_dtype(torch.float64)
    task, args = task_of("--method", "linear", "--arch", "resnet_tiny", "--stem", "small",
                         "--layer", "res4", "--image-size", 18, "--train-batch-size", 3,
                         "--epochs", 3, "--lr", 5, "--seed", 3, "--output", pictures / "out",
                         *given(pictures, "--ignore", 1, 255))
    trained = eval_segmentation.train_head(task, "x", args)
    loader = Loader(task.source.train, eval_segmentation.build_views(task, flip=True), workers=0,
                    batch_size=3, epochs=3, seed=3, world=ALONE)
    torch.manual_seed(3)
    head = eval_segmentation.Head(48, 2)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=1e-3)
    batches = itertools.chain(*map(loader.epoch, range(3)))
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 5 * 3 / 256 * (1 + math.cos(math.pi * step / 6)) / 2
        images, classes = batch.views[0][:, :3], batch.views[0][:, 3]
        target = torch.full((3, 20, 20), IGNORED)
        for number, c in enumerate((0, 2)):
            target[:, :18, :18][classes == c] = number
        maps = F.pixel_unshuffle(F.pad(images, (0, 2, 0, 2)), 4)
        loss = pixel_loss(head(maps, kept_channels(48, 0.1, 3, batch.index, step)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert step == 5 and not trained.training
    for key, value in head.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[key], value, rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------- whole evaluations


def test_pixels_that_tell_their_class_are_all_right(pictures):
    """Patches of one pixel whose one channel is the class, in images of any size."""
    for kind in ("train", "val"):
        for path in (pictures / "images" / kind / "a").iterdir():
            classes = np.asarray(Image.open(str(path).replace("images", "labels")))
            shades = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], np.uint8) * 255
            Image.fromarray(shades[classes]).save(path)
    line, _ = evaluate("--checkpoint", "pixels", "--arch", "vit_micro", "--patch-size", 1,
                       "--image-size", 8, "--resize", 24, "--k", 1, "--mean", 0, "--std", 1,
                       *given(pictures))
    assert line["miou"] == line["accuracy"] == 1 and line["memory"] == 6 * 24 * 32
    assert line["num_train"] == 6 and line["num_test"] == 3
    without, _ = evaluate("--checkpoint", "pixels", "--arch", "vit_micro", "--patch-size", 1,
                          "--image-size", 8, "--resize", 24, "--k", 1, "--mean", 0, "--std", 1,
                          *given(pictures, "--ignore", 255, 1))
    assert without["per_class"] == {"0": 1, "1": None, "2": 1} and without["miou"] == 1
    shifted, _ = evaluate("--checkpoint", "pixels", "--arch", "vit_micro", "--patch-size", 1,
                          "--image-size", 8, "--resize", 24, "--k", 1, "--memory", 60,
                          "--windows", "whole", "--mean", 0, "--std", 1, *given(pictures))
    assert shifted["miou"] == 1 and shifted["memory"] == 60


def outcome(flags):
    line, _ = evaluate(*flags)
    return line


def test_processes_change_nothing_in_k_nn(pool, pictures, tmp_path):
    flags = ["--checkpoint", "random", "--arch", "vit_micro", "--patch-size", 4, "--image-size", 16,
             "--memory", 50, *given(pictures)]
    wanted = pool.run(1, outcome, flags)[0]
    for size in (2, 4):  # more than there are test images
        assert pool.run(size, outcome, flags)[0] == wanted


LINEAR = ["--method", "linear", "--epochs", 3, "--train-batch-size", 4, "--log-every", 1, "--limit",
          16, "--layer", "res4"]


def test_processes_change_nothing_but_rounding_in_linear(pool, weights, tmp_path):
    flags = ["--checkpoint", weights, *LINEAR, "--output"]
    one = pool.run(1, outcome, [*flags, tmp_path / "one"])[0]
    two = pool.run(2, outcome, [*flags, tmp_path / "two"])[0]
    logs = [drill.log_of(next((tmp_path / name).iterdir())) for name in ("one", "two")]
    losses = [[line["loss"] for line in log] for log in logs]
    assert len(losses[0]) == 12
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert two["miou"] == pytest.approx(one["miou"], abs=0.01)


def test_the_rates_of_linear_are_the_protocols(tmp_path):
    evaluate("--checkpoint", "random", *LINEAR, "--epochs", 20, "--limit", 8, "--output", tmp_path)
    rates = [line["lr"] for line in drill.log_of(next(tmp_path.iterdir()))]
    base = 0.016 * 4 / 256  # 1e-3 at the published batch of 16
    warm_up = [base * 1e-6, base * (1 + 1e-6) / 2]  # 1500 / 40000 of 40 steps
    cosine = [base * (1 + math.cos(math.pi * step / 38)) / 2 for step in range(38)]
    np.testing.assert_allclose(rates, warm_up + cosine, rtol=1e-6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small ResNet that has been taught the digits for two seconds."""
    torch.manual_seed(0)
    digits = images.digits("train", 3)
    pixels = np.stack([np.asarray(digits.read(i)[0]) for i in range(len(digits))])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.from_numpy(digits.labels)
    net = backbones.build_backbone("resnet_tiny", in_chans=3, stem="small",
                                   zero_init_residual=False)
    head = nn.Linear(net.num_features, 10)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(60):
        rows = torch.randint(len(pixels), (64,))
        loss = F.cross_entropy(head(net(pixels[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(net.state_dict(), path)
    return str(path)


def test_a_trained_resnet_is_above_an_untrained_one(weights, monkeypatch):
    monkeypatch.setattr(features, "RANDOM_INITIALISATIONS", 2)
    line, printed = evaluate("--checkpoint", "random", weights, "--layer", "res4", "--limit", 50)
    untrained, trained = line["checkpoints"]
    assert trained["miou"] > untrained["miou"] + 0.03 > 0.03
    assert untrained["checkpoint"] == "random (resnet_tiny)" and untrained["memory"] == 50 * 144
    assert "digits: 50 training and 50 test images, 11 classes, shorter side 48 px" in printed
    assert line["eval"] == "segmentation" and line["miou"] == trained["miou"]
    assert trained["miou"] == pytest.approx(
        np.nanmean([x for x in trained["per_class"].values() if x is not None]))


def test_how_far_a_pass_is_is_told(monkeypatch):
    monkeypatch.setattr(workers, "PROGRESS_SECONDS", 0)
    _, printed = evaluate("--checkpoint", "pixels", "--limit", 4)
    passes = printed.split("shorter side 48 px")[1]  # to remember and to test
    assert passes.count("\n50% of 4 images, eta 0:00:0") == 2


def test_windows_and_the_whole_image_are_two_ways_to_look(weights, tmp_path):
    flags = ["--checkpoint", weights, "--layer", "res4", "--limit", 10]
    slid, printed = evaluate(*flags)
    assert "windows of 16 px every 10, patches of 4" in printed
    whole, printed = evaluate(*flags, "--windows", "whole")
    assert "48 px, whole, patches of 4" in printed and slid["miou"] != whole["miou"]
    large, printed = evaluate(*flags, "--image-size", 48)  # a window that is the image
    assert large["per_class"] == whole["per_class"] and "windows of 48 px every 32" in printed
    line, printed = evaluate(*flags, "--windows", "whole", "--method", "linear", "--epochs", 1,
                             "--output", tmp_path)
    assert "unmirrored crops of 16 px" in printed and line["layer"] == "res4"


@pytest.mark.parametrize("patch, window", [(14, 504), (16, 512)])
def test_above_96_px_windows_are_of_512_px_or_what_patches_allow(patch, window, monkeypatch):
    asked = []
    monkeypatch.setattr(eval_segmentation, "evaluate", lambda task, *_: asked.append(task))
    monkeypatch.setitem(features.DIGITS, "image_size", 16 * patch)  # as of a run
    flags = ["--checkpoint", "random", "--arch", "vit_micro", "--patch-size", str(patch), "--limit",
             "2", "--resize", "600"]
    for more in ([], ["--image-size", str(2 * patch)], ["--stride", "7"]):
        eval_segmentation.main(eval_segmentation.parse_args([*flags, *more]))  # ends at the first
        assert asked[-1].window == (2 * patch if "--image-size" in more else window)
        assert asked[-1].stride == (7 if "--stride" in more else asked[-1].window * 2 // 3)
        assert asked[-1].resize == 600


def test_the_same_command_again_trains_nothing(weights, tmp_path):
    flags = ["--checkpoint", weights, *LINEAR, "--output", tmp_path]
    line, _ = evaluate(*flags)
    (folder,) = tmp_path.iterdir()
    written = (folder / "checkpoint.pt").stat().st_mtime_ns
    assert evaluate(*flags)[0] == line
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == written
    for name, *value in (("--lr", 9), ("--seed", 1), ("--flip",), ("--resize", 50),
                         ("--std", 0.3), ("--stem", "small-pad2"), ("--exif-orientation",)):
        with pytest.raises(RunError, match=f"{name} is .* and was .*--no-resume"):
            evaluate(*flags, name, *value)
    evaluate("--checkpoint", "pixels", *flags[2:])
    with pytest.raises(RunError, match="--side is 2 and was 4"):
        evaluate("--checkpoint", "pixels", *flags[2:], "--layer", "res3")


def test_other_label_maps_of_the_same_names_are_another_training(pictures, tmp_path):
    flags = ["--checkpoint", "pixels", "--image-size", 32, "--method", "linear", "--epochs", 1,
             *given(pictures, "--output", tmp_path / "out")]
    evaluate(*flags)
    one, other = (broken(pictures, "labels", number=number) for number in (2, 3))
    whole = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(whole)  # of as many pixels of every class
    with pytest.raises(RunError, match=r"--labels is .* and was "):
        evaluate(*flags)


def test_stopped_at_any_moment_it_ends_with_the_same_numbers(weights, tmp_path, monkeypatch):
    flags = ["--checkpoint", weights, *LINEAR, "--output"]
    whole, _ = evaluate(*flags, tmp_path / "whole")
    agree = checkpoint.Run.agree

    def stop_at_six(self, epoch_ends, steps=[]):  # noqa: B006
        steps.append(1)
        self.stop_requested = len(steps) == 6
        return agree(self, epoch_ends)

    monkeypatch.setattr(checkpoint.Run, "agree", stop_at_six)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        eval_segmentation.main(eval_segmentation.parse_args(
            [str(flag) for flag in (*flags, tmp_path / "cut")]))
    assert "stopped at step 6" in printed.getvalue() and '"eval"' not in printed.getvalue()
    monkeypatch.undo()
    assert evaluate(*flags, tmp_path / "cut")[0] == whole
    one, two = (torch.load(next((tmp_path / name).iterdir()) / "head.pth", weights_only=True)
                for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_killed_it_ends_with_the_same_numbers(weights, tmp_path):
    flags = ["--checkpoint", weights, *LINEAR, "--limit", 100, "--epochs", 20, "--output"]
    status, whole = drill.run("eval_segmentation.py", *flags, tmp_path / "whole")
    assert status == 0, whole
    process = drill.start("eval_segmentation.py", *flags, tmp_path / "cut")

    def step():
        return max((len(drill.log_of(p)) for p in (tmp_path / "cut").glob("digits-*")), default=0)

    drill.wait_for(lambda: step() >= 100, process)
    drill.kill(process)
    status, printed = drill.run("eval_segmentation.py", *flags, tmp_path / "cut")
    assert status == 0 and "resuming" in printed, printed
    assert printed.splitlines()[-1] == whole.splitlines()[-1]
