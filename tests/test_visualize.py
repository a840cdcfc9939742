import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mae
import visualize
from common import distributed as comm, rng
from common.images import open_images
from helpers import SCRIPTS, TINY


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
    assert views.shape == masks.shape
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


@pytest.mark.parametrize("kind, columns", [("reconstruction", 3), ("attention", 4)])
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
