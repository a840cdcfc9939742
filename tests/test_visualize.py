import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mae
import simsiam
import visualize
from common import distributed as comm, rng
from common.images import open_images
from helpers import SCRIPTS, TINY, train


def run(*flags):
    visualize.main(visualize.parse_args(list(map(str, flags))))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_views_of_every_script_become_one_picture(script, tmp_path):
    picture = tmp_path / "views.png"
    run("views", script, "--image", picture, "--rows", 3)
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape[0] >= 3 * visualize.TILE and pixels.shape[2] == 3
    assert len(np.unique(pixels)) > 20


def test_views_are_those_of_the_scripts_flags(tmp_path):
    widths = []
    small = ["--num-crops", 2, 3, "--crop-sizes", 16, 8, "--crop-scales", 0.5, 1, 0.2, 0.5]
    for flags in ([], small):
        run("views", "simclr_multicrop.py", "--image", tmp_path / "views.png", "--rows", 2, *flags)
        widths.append(Image.open(tmp_path / "views.png").width)
    assert [round(width / visualize.TILE) for width in widths] == [4, 6]


def test_masked_patches_are_gray(tmp_path):
    for kind in ("views", "masks"):
        run(kind, "dinov2", "--image", tmp_path / f"{kind}.png", "--rows", 4)
    views, masks = (np.asarray(Image.open(tmp_path / f"{kind}.png")) for kind in ("views", "masks"))
    legend = masks[len(views) :]
    assert views.shape[1:] == masks.shape[1:] and 10 < len(legend) < 30
    assert (legend == visualize.GRAY).all(2).sum() > 150 and (legend == 0).all(2).sum() > 20
    masks = masks[: len(views)]
    changed = (views != masks).any(2)
    assert 0.02 < changed.mean() < 0.25 and (masks[changed] == 128).all()
    with pytest.raises(comm.RunError, match="simclr masks no patches"):
        run("masks", "simclr", "--image", tmp_path / "none.png")


def test_the_first_column_is_the_image_itself():
    args = visualize.parse_args(["views", "simclr", "--image", "x.png", "--rows", "2"])
    picture = np.asarray(visualize.views_picture(args))
    images = open_images("digits", "pretrain", 3)
    first = int(rng.epoch_order(0, 0, len(images))[0])
    original = np.asarray(images.read(first)[0].convert("RGB"))
    factor = round(visualize.TILE / len(original))
    tile = picture[visualize.GAP :, visualize.GAP :][: factor * len(original)]
    np.testing.assert_array_equal(tile[::factor, : factor * len(original) : factor], original)


def test_a_photograph_is_as_high_as_its_views(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (500, 750, 3), dtype=np.uint8)
    for number in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    for size, height in ((32, 96), (128, 128)):
        run("views", "simclr", "--data", tmp_path, "--recipe", "cifar10", "--image-size", size,
            "--image", tmp_path / "out" , "--rows", 2, "--batch-size", 2)
        picture = Image.open(tmp_path / "out")
        assert picture.height == 2 * height + 3 * visualize.GAP
        assert picture.width == round(1.5 * height) + 2 * height + 4 * visualize.GAP


def test_a_legend_is_below_the_picture_and_wide_enough():
    picture = Image.new("RGB", (20, 10), "blue")
    made = np.asarray(visualize.with_legend(picture, {"some words": (1, 2, 3), "x": (4, 5, 6)}))
    assert (made[:10, :20] == (0, 0, 255)).all() and made.shape[1] > 100
    for colour in ((1, 2, 3), (4, 5, 6)):
        rows, columns = np.nonzero((made[10:] == colour).all(2))
        assert len(rows) == 15**2 and columns.max() < made.shape[1]


def test_normalisation_is_undone_and_many_channels_become_gray():
    images = torch.rand(2, 3, 4, 4)
    normalised = (images - 0.4) / 0.2
    pixels = visualize.to_pixels(normalised, [0.4] * 3, [0.2] * 3)
    np.testing.assert_allclose(pixels, images.permute(0, 2, 3, 1) * 255, atol=0.51)
    assert visualize.to_pixels(torch.rand(2, 5, 4, 4), [0.5], [0.5]).shape == (2, 4, 4, 3)


@pytest.fixture(scope="module")
def mae_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    mae.main(mae.parse_args([*TINY, "--output", str(folder)]))
    return folder


@pytest.mark.parametrize("kind, columns", [("reconstruction", 3), ("attention", 4), ("patches", 2)])
def test_pictures_of_a_run(mae_run, tmp_path, kind, columns):
    run(kind, "--checkpoint", mae_run, "--image", tmp_path / "out.png", "--rows", 4)
    picture = Image.open(tmp_path / "out.png")
    assert [round(side / visualize.TILE) for side in picture.size] == [columns, 4]


def test_attention_of_a_backbone_that_was_moved(mae_run, tmp_path):
    shutil.copy(mae_run / "backbone.pth", tmp_path / "moved.pth")
    for source, name in ((mae_run, "run.png"), (tmp_path / "moved.pth", "moved.png")):
        run("attention", "--checkpoint", source, "--image", tmp_path / name, "--rows", 2)
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "moved.png").read_bytes()


def test_attention_of_weights_that_do_not_say_what_they_are_is_refused(mae_run, tmp_path):
    found = torch.load(mae_run / "backbone.pth", weights_only=True)
    del found._metadata["settings"]["mean"]
    torch.save(found, tmp_path / "some.pth")
    with pytest.raises(comm.RunError, match="some.pth does not say its mean"):
        run("attention", "--checkpoint", tmp_path / "some.pth", "--image", tmp_path / "out.png")


def test_what_was_not_removed_is_shown_as_it_is(mae_run, tmp_path):
    run("reconstruction", "--checkpoint", mae_run, "--image", tmp_path / "out.png", "--rows", 1)
    pixels = np.asarray(Image.open(tmp_path / "out.png"))[4:-4, :, 0]
    side = (pixels.shape[1] - 16) // 3
    image, left, made = (pixels[:, 4 + i * (side + 4) :][:, :side] for i in range(3))
    kept = left != 128
    assert 0.2 < kept.mean() < 0.5
    np.testing.assert_array_equal(image[kept], made[kept])


@pytest.mark.parametrize(
    "flags, named",
    [
        (["views", "nothing"], "nothing is not a method script"),
        (["attention", "--checkpoint", "nowhere"], "nowhere: no run.json"),
        (["reconstruction", "--checkpoint", "nowhere"], "a run of mae.py"),
    ],
)
def test_what_cannot_be_shown_is_said(flags, named, tmp_path):
    with pytest.raises(comm.RunError, match=named):
        run(*flags, "--image", tmp_path / "out.png")


def test_a_run_that_masks_but_reconstructs_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "settings_of", lambda *_: {"mask_ratio": [0.1, 0.5]})
    with pytest.raises(comm.RunError, match="is not a run of mae.py"):
        run("reconstruction", "--checkpoint", "dinov2", "--image", tmp_path / "out.png")


def test_a_picture_needs_a_folder(tmp_path, capsys):
    for image in (tmp_path, tmp_path / "none" / "x.png"):
        with pytest.raises(SystemExit):
            visualize.parse_args(["curves", "run", "--image", str(image)])
        assert f"--image {image}: give a PNG" in capsys.readouterr().err


# --------------------------------------------------------------------------------- features of runs


def colours_of(picture, *colours):
    pixels = np.asarray(Image.open(picture))
    return [int((pixels == colour).all(2).sum()) for colour in colours]


def test_neighbours_are_those_of_the_same_pixels(tmp_path):
    """Of `pixels`, they are what a search by hand finds, and the bars tell their classes."""
    out = tmp_path / "near.png"
    run("neighbours", "--checkpoint", "pixels", "--image", out, "--rows", 12, "--columns", 3,
        "--limit", 100)
    picture = np.asarray(Image.open(out))
    train, test = (open_images("digits", split, 3, limit=100) for split in ("train", "test"))
    bank = np.stack([np.asarray(train.read(i)[0], dtype=float).ravel() for i in range(len(train))])
    bank = bank / 127.5 - 1
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    wrong = 0
    for row in range(12):
        place = row * len(test) // 12
        query = np.asarray(test.read(place)[0], dtype=float).ravel() / 127.5 - 1
        nearest = np.argsort(-(bank @ query), kind="stable")[:3]
        wrong += (train.labels[nearest] != test.labels[place]).sum()
        for column, (images, index) in enumerate([(test, place), *((train, i) for i in nearest)]):
            top, left = 4 + row * 106, 4 + column * 100
            tile = picture[top : top + 96 : 6, left : left + 96 : 6]
            np.testing.assert_array_equal(tile, np.asarray(images.read(int(index))[0]))
    green, red = colours_of(out, visualize.GREEN, visualize.RED)
    assert (red - 225, green - 225) == (wrong * 576, (36 - wrong) * 576)  # and the legend's
    assert 0 < wrong < 36


def test_without_labels_an_image_is_not_its_own_neighbour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    for number in range(5):
        Image.fromarray(pixels[number]).save(tmp_path / f"{number}.png")
    out = tmp_path / "out"
    run("neighbours", "--checkpoint", "pixels", "--data", tmp_path, "--image-size", 16,
        "--image", out, "--rows", 5)
    picture = np.asarray(Image.open(out))
    assert picture.shape == (5 * 100 + 4, 5 * 100 + 4, 3)  # four others, and no legend
    for row in range(5):
        tiles = [picture[4 + row * 100 :, 4 + column * 100 :][:96:6, :96:6] for column in range(5)]
        np.testing.assert_array_equal(tiles[0], pixels[row])
        assert len({tile.tobytes() for tile in tiles}) == 5


def test_neighbours_in_several_sources_joined(tmp_path):
    run_of = tmp_path / "run"
    train(simsiam, run_of, "--data", "digits", "digits", "--recipe", "digits", "--limit", 40,
          dtype="float32")
    run("neighbours", "--checkpoint", run_of, "--image", tmp_path / "x.png", "--rows", 2)
    assert Image.open(tmp_path / "x.png").height == 2 * 100 + 4


def test_an_embedding_has_a_panel_for_every_checkpoint_and_a_colour_for_every_class(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "map.png"
    flags = ["embedding", "--image", out, "--points", 60, "--image-size", 8]
    run(*flags, "--checkpoint", "pixels")
    alone = Image.open(out).size
    blue, orange, pink = colours_of(out, (31, 119, 180), (255, 127, 14), (227, 119, 194))
    assert min(blue, orange, pink) > 40  # six points each, and the legend's
    first = out.read_bytes()
    run(*flags, "--checkpoint", "pixels")
    assert out.read_bytes() == first
    run(*flags, "--checkpoint", "pixels", "random")
    assert Image.open(out).size == (2 * alone[0], alone[1])


@pytest.mark.parametrize("flags, named", [
    (["neighbours", "--checkpoint", "pixels", "random"], "pixels random: give one"),
    (["embedding", "--features", "x.npz"], "x.npz has no images"),
    (["neighbours", "--checkpoint", "pixels", "--save-features", "x.npz"], "x.npz goes with eval"),
    (["embedding", "--checkpoint", "pixels", "--rows", "3"], "--rows"),
    (["patches", "--checkpoint", "x", "--bits", "3"], "--bits"),
])
def test_flags_that_say_nothing_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        visualize.parse_args([*flags, "--image", "out.png"])
    assert named in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ patches


def test_colours_are_the_three_principal_components():
    axes = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    parts = torch.randn(400, 6, dtype=torch.float64) * torch.tensor([9, 5, 3, 0.1, 0.1, 0.1])
    colours, share = visualize.principal_colours(parts @ axes + 7)
    assert share > 0.999 and colours.shape == (400, 3)
    for column in range(3):
        assert np.corrcoef(colours[:, column], parts[:, column])[0, 1] ** 2 > 0.95
    again, _ = visualize.principal_colours((parts @ axes).flip(0) * 2)
    assert (colours.flip(0).int() - again.int()).abs().max() <= 1


def test_fewer_components_than_three_leave_colours_black():
    colours, share = visualize.principal_colours(torch.tensor([[1.0, 2.0], [3.0, 5.0], [2.0, 1.0]]))
    assert colours.shape == (3, 3) and (colours[:, 2] == 0).all() and share == pytest.approx(1)


def test_patches_of_larger_images_are_finer(mae_run, tmp_path):
    for size in (16, 48):
        run("patches", "--checkpoint", mae_run, "--image", tmp_path / f"{size}.png", "--rows", 2,
            "--image-size", size)
    count = [len(np.unique(np.asarray(Image.open(tmp_path / f"{size}.png"))[4:100, 104:200]
                           .reshape(-1, 3), axis=0)) for size in (16, 48)]
    assert 8 < count[0] <= 16 < count[1] <= 144
    with pytest.raises(comm.RunError, match="--image-size 30 is not a multiple"):
        run("patches", "--checkpoint", mae_run, "--image", tmp_path / "x", "--image-size", 30)


# ------------------------------------------------------------------------------------------- curves


def logged(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_have_a_panel_for_every_number_and_a_colour_for_every_run(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"step": s, "epoch": 0, "loss": 5 / s, "lr": 0.1, "z_std": 0.2} for s in range(1, 9)]
    one = logged(tmp_path / "one", *lines)
    two = logged(tmp_path / "two", {"step": 0, "epoch": 0, "probe_knn": 0.5}, *lines[:3])
    with (two / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # being written
    picture = tmp_path / "curves.png"
    run("curves", one, "--image", picture)
    alone = np.asarray(Image.open(picture))
    run("curves", one, two, "--image", picture)
    both = np.asarray(Image.open(picture))
    assert alone.shape[1] == both.shape[1] == 1200 and both.shape[0] > alone.shape[0] + 200
    colour = np.array([255, 127, 14])  # of the second run
    assert not (alone == colour).all(2).any() and (both == colour).all(2).sum() > 50


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(comm.RunError, match="no log.jsonl in it"):
        run("curves", tmp_path, "--image", tmp_path / "x.png")
    with pytest.raises(comm.RunError, match="no line yet"):
        run("curves", logged(tmp_path / "empty"), "--image", tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(comm.RunError, match="pip install -r requirements-extra.txt"):
        run("curves", logged(tmp_path / "one", {"step": 1}), "--image", tmp_path / "x.png")
