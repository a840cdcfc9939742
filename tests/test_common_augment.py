import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torchvision.transforms
import torchvision.transforms.functional as reference
from PIL import Image

from common import augment

LEVEL = 1 / 255  # a level of an 8-bit image
CPU = torch.device("cpu")
ORDERS = list(itertools.permutations(range(4)))  # brightness, contrast, saturation, hue
NO_SIZES = None  # colour steps do not look at the size of the decoded image


def picture(height=12, width=17, mode="RGB"):
    """Noise as a Pillow image."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def pixels(n=1, channels=3, height=6, width=9):
    """Noise (n, C, H, W) in float64, with a few gray, black, white and pure pixels."""
    images = torch.from_numpy(np.random.default_rng(1).random((n, channels, height, width)))
    images[..., 0, 0], images[..., 0, 1], images[..., 0, 2] = 0, 1, 0.4
    images[:, 0, 1, 0], images[:, 1:, 1, 0] = 1, 0
    images[:, -1, 1, 1], images[:, :-1, 1, 1] = 1, 0
    return images


def crop_step(scale=(0.08, 1), ratio=(3 / 4, 4 / 3)):
    return augment.RandomResizedCrop(scale=scale, ratio=ratio, interpolation="bicubic")


def drawn(step, uniforms):
    return torch.from_numpy(step.draw(np.array(uniforms), NO_SIZES)).to(torch.float64)


def applied(step, images, parameters):
    return step.apply(images.clone(), parameters, parameters)


# --------------------------------------------------------------------------------------------- View


def photo_view(size=8, channels=3, p=0.6):
    return augment.View(
        size,
        [
            crop_step(scale=(0.2, 1)),
            augment.HorizontalFlip(p=0.5),
            augment.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=p),
            augment.Grayscale(p=p / 3),
            augment.GaussianBlur(sigma=(0.1, 2.0), p=p),
            augment.Solarize(threshold=0.5, p=p / 3),
            augment.Normalize(mean=[0.4] * channels, std=[0.3] * channels),
        ],
        channels=channels,
    )


def test_parameters_of_an_image_depend_on_its_own_numbers_alone():
    view, rng = photo_view(), np.random.default_rng(2)
    uniforms, sizes = rng.random((16, view.num_uniforms)), rng.integers(1, 50, (16, 2))
    geometry, colour = view.draw(uniforms, sizes)
    for row in range(16):
        own_geometry, own_colour = view.draw(uniforms[row : row + 1], sizes[row : row + 1])
        np.testing.assert_array_equal(colour[row], own_colour[0])
        for together, alone in zip(geometry, own_geometry, strict=True):
            np.testing.assert_array_equal(together[row], alone[0])


def test_each_step_reads_its_own_numbers_in_the_order_of_the_steps():
    crop, jitter = crop_step(), augment.ColorJitter(0.8, 0.8, saturation=0.8, hue=0.2, p=0.8)
    steps = [crop, augment.HorizontalFlip(p=0.5), jitter, augment.Grayscale(p=0.5)]
    uniforms, sizes = np.random.default_rng(3).random((40, 22 + 1 + 6 + 1)), np.full((40, 2), 30)
    view = augment.View(8, steps, channels=3)
    (boxes, flips), colour = view.draw(uniforms, sizes)
    assert view.num_uniforms == uniforms.shape[1]
    np.testing.assert_array_equal(boxes, crop.draw(uniforms[:, :22], sizes))
    np.testing.assert_array_equal(flips[:, 0], uniforms[:, 22] < 0.5)
    np.testing.assert_allclose(colour[:, :-1], jitter.draw(uniforms[:, 23:29], sizes), rtol=1e-6)
    np.testing.assert_array_equal(colour[:, -1], uniforms[:, 29] < 0.5)


def test_the_colour_steps_act_in_their_order_each_with_its_own_parameters():
    torch.set_default_dtype(torch.float64)
    steps = [
        augment.ColorJitter(brightness=0.8, contrast=0, saturation=0, hue=0, p=0.5),
        augment.Grayscale(p=0.5),
        augment.GaussianBlur(sigma=(1.0, 1.0), p=0.5),
        augment.Solarize(threshold=0.5, p=0.5),
        augment.Normalize(mean=[0.4] * 3, std=[0.3] * 3),
    ]
    view = augment.View((6, 9), steps, channels=3)
    choices = list(itertools.product([True, False], repeat=4))
    uniforms = np.array([
        [jitter, 0.5, 0.75, 0.5, 0.5, 0.5, gray, blur, 0.5, solarize]
        for jitter, gray, blur, solarize in 0.9 - 0.8 * np.array(choices)
    ])
    crops = torch.randint(0, 256, (16, 3, 6, 9), dtype=torch.uint8)
    _, colour = view.draw(uniforms, np.full((16, 2), 9))
    got = view.finish(crops, torch.from_numpy(colour), CPU)
    for (jitter, gray, blur, solarize), crop, result in zip(choices, crops, got, strict=True):
        image = crop / 255
        if jitter:
            image = reference.adjust_brightness(image, 1.4)
        if gray:
            image = reference.rgb_to_grayscale(image, num_output_channels=3)
        if blur:
            image = torch.from_numpy(true_gaussian(image.numpy(), 1.0, radius=(0, 4, 4)))
        if solarize:
            image = reference.solarize(image, 0.5)
        torch.testing.assert_close(result, (image - 0.4) / 0.3, rtol=0, atol=1e-5)


def test_a_batch_is_finished_as_its_images_are_one_by_one():
    torch.set_default_dtype(torch.float64)
    view, rng = photo_view(), np.random.default_rng(4)
    crops = torch.from_numpy(rng.integers(0, 256, (24, 3, 8, 8), dtype=np.uint8))
    _, colour = view.draw(rng.random((24, view.num_uniforms)), np.full((24, 2), 8))
    colour = torch.from_numpy(colour)
    batch = view.finish(crops, colour, CPU)
    alone = [view.finish(crops[i : i + 1], colour[i : i + 1], CPU) for i in range(24)]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_have_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    crops = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    view = augment.View(16, [augment.Solarize(threshold=0.5, p=0.0)], channels=1)
    images = view.finish(crops, torch.zeros(1, 1), CPU)
    assert images.dtype == dtype
    assert torch.equal(images, crops.to(dtype) / 255)


def test_a_view_refuses_geometry_after_colour():
    with pytest.raises(ValueError, match="geometric steps come before"):
        augment.View(8, [augment.Grayscale(p=0.2), augment.HorizontalFlip(p=0.5)], channels=3)


def test_a_view_with_three_channels_leaves_nothing_out():
    assert photo_view(channels=3).left_out == []


@pytest.mark.parametrize("channels", [1, 2, 4, 10])
def test_steps_that_need_rgb_are_left_out_and_named(channels):
    view = photo_view(channels=channels)
    assert view.left_out == ["saturation and hue", "grayscale"]
    crops = torch.randint(0, 256, (3, channels, 8, 8), dtype=torch.uint8)
    _, colour = view.draw(np.random.default_rng(5).random((3, view.num_uniforms)), np.ones((3, 2)))
    assert view.finish(crops, torch.from_numpy(colour), CPU).shape == crops.shape


@pytest.mark.parametrize("channels", [1, 2, 4, 10])
def test_brightness_and_contrast_act_on_any_channel_count(channels):
    torch.set_default_dtype(torch.float64)
    jitter = augment.ColorJitter(brightness=0.6, contrast=0.5, saturation=0.9, hue=0.4, p=1.0)
    view = augment.View(9, [jitter], channels)
    crops = torch.randint(0, 256, (24, channels, 6, 9), dtype=torch.uint8)
    uniforms = np.array([[0.0, (order + 0.5) / 24, 0.9, 0.1, 0.7, 0.2] for order in range(24)])
    _, colour = view.draw(uniforms, np.ones((24, 2)))
    got = view.finish(crops, torch.from_numpy(colour), CPU).numpy()
    brightness, contrast = 0.4 + 0.9 * 1.2, 0.5 + 0.1 * 1.0
    for order, image, result in zip(ORDERS, crops.numpy() / 255, got, strict=True):
        for change in order:
            if change == 0:
                image = np.clip(brightness * image, 0, 1)
            if change == 1:  # about the mean over channels and pixels
                image = np.clip(contrast * image + (1 - contrast) * image.mean(), 0, 1)
        np.testing.assert_allclose(result, image, atol=1e-6)


# ----------------------------------------------------------------------------------------- geometry


def torchvision_box(u, height, width, scale, ratio):
    """Left, top, width, height by the law of torchvision's RandomResizedCrop."""
    for share, position in zip(u[:10], u[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** position
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    if width / height > ratio[1]:
        w = round(height * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize(
    "scale, ratio",
    [((0.08, 1), (3 / 4, 4 / 3)), ((0.05, 0.14), (3 / 4, 4 / 3)), ((0.6, 1), (1, 1))],
)
def test_boxes_equal_torchvisions_law_fed_with_the_same_numbers(scale, ratio):
    rng = np.random.default_rng(6)
    sizes = np.array([(32, 32), (480, 640), (10, 1000), (1000, 10), (7, 50), (3, 2), (1, 1)] * 40)
    uniforms = rng.random((len(sizes), 22))
    wanted = [
        torchvision_box(u, *map(int, size), scale, ratio)
        for u, size in zip(uniforms, sizes, strict=True)
    ]
    np.testing.assert_array_equal(crop_step(scale, ratio).draw(uniforms, sizes), wanted)


def test_a_long_image_gives_its_central_box_of_the_nearest_aspect():
    uniforms = np.random.default_rng(7).random((50, 22))
    step = crop_step(scale=(0.9, 1))  # no box of an allowed aspect has such an area
    wide = step.draw(uniforms, np.array([(10, 1000)] * 50))
    tall = step.draw(uniforms, np.array([(1000, 10)] * 50))
    assert (wide == (493, 0, 13, 10)).all() and (tall == (0, 493, 10, 13)).all()


def test_boxes_have_the_statistics_of_torchvisions():
    scale, ratio, n = (0.08, 1), (3 / 4, 4 / 3), 4000
    image = torch.empty(3, 48, 64)
    law = torchvision.transforms.RandomResizedCrop
    theirs = np.array([law.get_params(image, scale, ratio) for _ in range(n)])[:, [1, 0, 3, 2]]
    uniforms = np.random.default_rng(8).random((n, 22))
    ours = crop_step(scale, ratio).draw(uniforms, np.full((n, 2), (48, 64)))
    for measure in (
        lambda box: box[:, 2] * box[:, 3] / (48 * 64),
        lambda box: np.log(box[:, 2] / box[:, 3]),
        lambda box: box[:, 0] / 64,
        lambda box: box[:, 1] / 48,
    ):
        one, other = measure(ours), measure(theirs)
        assert one.mean() == pytest.approx(other.mean(), abs=4 * one.std() * math.sqrt(2 / n))
        assert scipy.stats.ks_2samp(one, other).statistic < 0.0436  # 0.1 % by chance


def test_boxes_lie_inside_the_image():
    rng = np.random.default_rng(9)
    sizes = rng.integers(1, 70, (3000, 2))
    uniforms = rng.random((3000, 22))
    uniforms[:1000, 20:] = 0
    uniforms[1000:2000, 20:] = np.nextafter(1, 0)
    left, top, width, height = crop_step().draw(uniforms, sizes).T
    assert (left >= 0).all() and (top >= 0).all() and (width >= 1).all() and (height >= 1).all()
    assert (left + width <= sizes[:, 1]).all() and (top + height <= sizes[:, 0]).all()


@pytest.mark.parametrize("name, filter", [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
def test_a_crop_is_pillows_resize_of_the_box(name, filter):
    image, box = picture(40, 30), np.array([4, 7, 20, 25])
    step = augment.RandomResizedCrop(scale=(0.1, 1), ratio=(1, 1), interpolation=name)
    got = augment.View((11, 16), [step], channels=3).crop([image], [box])
    wanted = np.asarray(image.resize((16, 11), filter, box=(4, 7, 24, 32))).transpose(2, 0, 1)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("channels", [1, 2, 4, 10])
def test_planes_are_cropped_alike_and_stacked(channels):
    planes = [Image.fromarray(np.roll(np.asarray(picture(mode="L")), c)) for c in range(channels)]
    view = augment.View(6, [crop_step(), augment.HorizontalFlip(p=1)], channels)
    got = view.crop(planes, [np.array([2, 1, 10, 9]), np.array([True])])
    assert got.shape == (channels, 6, 6)
    for plane, own in zip(planes, got, strict=True):
        small = plane.resize((6, 6), Image.BICUBIC, box=(2, 1, 12, 10))
        np.testing.assert_array_equal(own, np.asarray(small)[:, ::-1])


def test_a_flip_mirrors_left_and_right_with_probability_p():
    image, size = picture(), (12, 17)
    for p, flips in ((0, [False] * 4), (0.5, [True, True, False, False]), (1, [True] * 4)):
        step = augment.HorizontalFlip(p=p)
        decisions = step.draw(np.array([[0.0], [0.49], [0.5], [0.99]]), NO_SIZES)
        for own, flip in zip(decisions, flips, strict=True):
            wanted = np.asarray(image)[:, :: -1 if flip else 1]
            np.testing.assert_array_equal(np.asarray(step.apply(image, own, size)), wanted)


def affine(degrees=0.0, translate=0.0, scale=(1.0, 1.0), shear=0.0, fill=0):
    return augment.RandomAffine(degrees, translate, scale, shear, fill, interpolation="bilinear")


def moved(step, image, u):
    """An image (H, W) or (H, W, 3) after a step whose five uniform numbers are u."""
    size = image.shape[:2]
    coefficients = step.draw(np.array([u], dtype=float), np.array([size]))[0]
    return np.asarray(step.apply(Image.fromarray(image), coefficients, size))


def test_an_affine_map_of_no_strength_is_the_identity():
    uniforms, sizes = np.random.default_rng(10).random((4, 5)), np.array([(8, 8), (5, 9)] * 2)
    np.testing.assert_allclose(affine().draw(uniforms, sizes), [[1, 0, 0, 0, 1, 0]] * 4, atol=1e-12)
    image = np.asarray(picture(5, 9))
    np.testing.assert_array_equal(moved(affine(), image, [0.1, 0.9, 0.3, 0.5, 0.7]), image)


def test_an_affine_shift_moves_a_pixel_by_its_share_of_the_sides():
    image = np.zeros((8, 12), np.uint8)
    image[4, 6] = 255
    ends = {}
    for u in ((0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1)):
        out = moved(affine(translate=0.25), image, [0.5, *u, 0.5, 0.5])
        assert out.sum() == 255
        ends[u] = tuple(np.argwhere(out)[0] - (4, 6))
    assert {ends[0, 0.5], ends[1, 0.5]} == {(0, -3), (0, 3)}
    assert {ends[0.5, 0], ends[0.5, 1]} == {(-2, 0), (2, 0)}


def test_an_affine_map_turns_about_the_centre():
    image = np.asarray(picture(8, 8))
    ends = [moved(affine(degrees=90), image, [u, 0.5, 0.5, 0.5, 0.5]) for u in (0, 1)]
    turned = [np.rot90(image, 1), np.rot90(image, -1)]
    if np.abs(ends[0].astype(int) - turned[0]).max() > 1:  # either sense will do
        turned.reverse()
    np.testing.assert_allclose(ends, turned, atol=1)  # Pillow rounds 0.999... of a level down


def test_an_affine_zoom_above_one_enlarges():
    image = np.zeros((8, 8), np.uint8)
    image[2:6, 2:6] = 255
    step = affine(scale=(0.5, 2))
    small, large = (moved(step, image, [0.5, 0.5, 0.5, u, 0.5]) > 127 for u in (0, 1))
    assert (small.sum(), large.sum()) == (4, 64)


def test_an_affine_turn_and_zoom_equal_torchvisions():
    image = picture(40, 30)
    got = moved(affine(degrees=20, scale=(1, 1.4)), np.asarray(image), [0.9, 0.5, 0.5, 0.5, 0.5])
    bilinear = reference.InterpolationMode.BILINEAR
    wanted = [reference.affine(image, angle, [0, 0], 1.2, [0, 0], bilinear) for angle in (16, -16)]
    assert min(np.abs(got.astype(int) - np.asarray(turned)).max() for turned in wanted) <= 1


def test_an_affine_shear_is_horizontal():
    upright = np.zeros((9, 9), np.uint8)
    upright[:, 4] = 255
    ends = [moved(affine(shear=45), upright, [0.5, 0.5, 0.5, 0.5, u]) > 127 for u in (0, 1)]
    diagonal = np.eye(9, dtype=bool)
    assert np.array_equal(ends[0] | ends[1], diagonal | diagonal[::-1])
    level = moved(affine(shear=45), upright.T.copy(), [0.5, 0.5, 0.5, 0.5, 1])
    np.testing.assert_array_equal(level, upright.T)


def test_an_affine_map_keeps_the_centre_and_scales_areas_by_the_zoom_alone():
    step, rng = affine(degrees=40, scale=(0.5, 2), shear=30), np.random.default_rng(13)
    uniforms = rng.random((20, 5))
    a, b, c, d, e, f = step.draw(uniforms, np.full((20, 2), (30, 50))).T
    zoom = 0.5 + 1.5 * uniforms[:, 3]
    np.testing.assert_allclose(a * e - b * d, 1 / zoom**2, rtol=1e-9)
    np.testing.assert_allclose([a * 25 + b * 15 + c, d * 25 + e * 15 + f], [[25] * 20, [15] * 20])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_affine_map_fills_what_comes_from_outside(mode):
    image = np.asarray(picture(8, 8, mode))
    out = moved(affine(translate=0.5, fill=77), image, [0.5, 0, 0.5, 0.5, 0.5])
    sides = sorted([(out[:, :4] == 77).all(), (out[:, 4:] == 77).all()])
    assert sides == [False, True]


def test_an_affine_view_of_another_size_is_resized():
    image = picture(20, 30)
    view = augment.View((10, 12), [affine()], channels=3)
    geometry, _ = view.draw(np.full((1, 5), 0.5), np.array([(20, 30)]))
    wanted = np.asarray(image.resize((12, 10), Image.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(view.crop([image], [geometry[0][0]]), wanted)


@pytest.mark.parametrize("resize, size, padding", [(256, 255, 0), (32, 32, 4), (40, (32, 24), 0)])
def test_a_random_crop_lies_anywhere_and_is_torchvisions(resize, size, padding):
    view = augment.View(size, [augment.RandomCrop(resize, padding, "bilinear")], channels=3)
    found = set()
    for height, width in [(40, 40), (300, 290), (31, 47)]:
        image = picture(height, width)
        whole = reference.resize(image, resize, reference.InterpolationMode.BILINEAR)
        wide, high = (side + 2 * padding - own + 1
                      for side, own in zip(whole.size, view.size[::-1], strict=True))
        for u in np.random.default_rng(0).random((40, 2)):
            left, top = int(u[0] * wide), int(u[1] * high)
            geometry, _ = view.draw(u[None], np.array([(height, width)]))
            got = view.crop([image], [geometry[0][0]])
            padded = reference.pad(whole, padding)
            wanted = reference.crop(padded, top, left, *view.size)
            np.testing.assert_array_equal(got, np.asarray(wanted).transpose(2, 0, 1))
            found |= {("left", left == 0), ("right", left == wide - 1), ("top", top == 0)}
    assert len(found) == (6 if padding or resize == 40 else len(found))


def center_crop(image, resize, size, interpolation="bicubic"):
    view = augment.View(size, [augment.CenterCrop(resize, interpolation=interpolation)], channels=3)
    geometry, _ = view.draw(np.empty((1, 0)), np.array([image.size[::-1]]))
    return view.crop([image], [geometry[0][0]])


@pytest.mark.parametrize("side", [8, 16, 50])
def test_a_center_crop_leaves_a_square_image_whole_when_resize_is_the_size(side):
    image = picture(side, side)
    wanted = np.asarray(image.resize((16, 16), Image.BICUBIC)).transpose(2, 0, 1)
    np.testing.assert_array_equal(center_crop(image, 16, 16), wanted)


SIDES = np.random.default_rng(14).integers(9, 400, (30, 2)).tolist()  # height and width


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize, size", [(256, 224), (36, 32), (32, 32), (30, (37, 24))])
def test_a_center_crop_is_torchvisions(resize, size, interpolation):
    """Also of small images, of those that need no resizing, and of those that a crop surpasses."""
    mode = reference.InterpolationMode(interpolation)
    for height, width in [*SIDES, (resize, resize + 7), (resize + 20, resize), (12, 9), (600, 30)]:
        image = picture(height, width)
        wanted = reference.center_crop(reference.resize(image, resize, mode), size)
        got = center_crop(image, resize, size, interpolation)
        np.testing.assert_array_equal(got, np.asarray(wanted).transpose(2, 0, 1))


def test_a_center_crop_of_an_image_of_the_right_size_only_cuts():
    image = picture(32, 45)
    wanted = np.asarray(image)[4:28, 10:34].transpose(2, 0, 1)  # 10.5 goes to the even number
    np.testing.assert_array_equal(center_crop(image, 32, 24), wanted)


# ------------------------------------------------------------------------------------------- colour


def in_order(image, order, brightness, contrast, saturation, hue):
    """Torchvision's four changes of a float image, one after another."""
    changes = (
        (reference.adjust_brightness, brightness),
        (reference.adjust_contrast, contrast),
        (reference.adjust_saturation, saturation),
        (reference.adjust_hue, hue),
    )
    for change in order:
        function, factor = changes[change]
        image = function(image, factor)
    return image


@pytest.mark.parametrize("order", range(24))
def test_colour_jitter_equals_torchvisions_changes_in_every_order(order):
    step = augment.ColorJitter(brightness=0.8, contrast=0.7, saturation=0.6, hue=0.2, p=0.8)
    images = pixels(n=6).float()
    uniforms = np.random.default_rng(order).random((6, 6))
    uniforms[:, 0], uniforms[:, 1] = 0.79, (order + 0.5) / 24
    got = applied(step, images, drawn(step, uniforms).float())
    for image, result, u in zip(images, got, uniforms, strict=True):
        factors = 0.2 + 1.6 * u[2], 0.3 + 1.4 * u[3], 0.4 + 1.2 * u[4], 0.2 * (2 * u[5] - 1)
        wanted = in_order(image, ORDERS[order], *factors)
        torch.testing.assert_close(result, wanted, rtol=0, atol=LEVEL)


def test_jitter_factors_start_at_zero_for_strengths_above_one():
    step = augment.ColorJitter(brightness=1.5, contrast=0, saturation=0, hue=0, p=1)
    images = pixels(n=3) / 3
    uniforms = [[0, 0.5, u, 0.5, 0.5, 0.5] for u in (0.0, 0.4, 1.0)]
    got = applied(step, images, drawn(step, uniforms))
    wanted = (images * torch.tensor([0.0, 1.0, 2.5]).view(-1, 1, 1, 1)).clamp(max=1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        augment.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.3),
        augment.Grayscale(p=0.3),
        augment.GaussianBlur(sigma=(0.5, 2.0), p=0.3),
        augment.Solarize(threshold=0.5, p=0.3),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_colour_step_changes_a_share_p_of_the_images_and_no_bit_of_the_others(step):
    images = pixels(n=100)
    uniforms = np.full((100, step.num_uniforms), 0.9)
    uniforms[:, 0] = np.arange(100) / 100
    changed = applied(step, images, drawn(step, uniforms)) != images
    assert changed.flatten(1).any(1).tolist() == [True] * 30 + [False] * 70


@pytest.mark.parametrize("shift", [-0.5, -0.21, -0.05, 0.0, 0.1, 1 / 3, 0.5])
def test_a_hue_turn_equals_torchvisions(shift):
    images = pixels(n=2, height=30, width=30).float()
    wanted = reference.adjust_hue(images, shift)
    got = augment.turn_hue(images, torch.full((2,), shift))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_a_third_of_the_circle_turns_red_to_green_to_blue():
    primaries = torch.eye(3).view(3, 3, 1, 1)
    turned = augment.turn_hue(primaries, torch.full((3,), 1 / 3))
    torch.testing.assert_close(turned, primaries[[1, 2, 0]], rtol=0, atol=1e-6)


def test_each_image_turns_by_its_own_shift():
    images, shifts = pixels(n=5).float(), torch.linspace(-0.5, 0.5, 5)
    wanted = [reference.adjust_hue(i, s) for i, s in zip(images, shifts.tolist(), strict=True)]
    got = augment.turn_hue(images, shifts)
    torch.testing.assert_close(got, torch.stack(wanted), rtol=0, atol=1e-5)


def test_grayscale_equals_torchvisions():
    images, step = pixels(n=2), augment.Grayscale(p=0.5)
    got = applied(step, images, drawn(step, [[0.1], [0.9]]))
    wanted = reference.rgb_to_grayscale(images[0], num_output_channels=3)
    torch.testing.assert_close(got[0], wanted, rtol=0, atol=LEVEL)


def test_solarize_equals_torchvisions():
    images = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, 16, 16).double() / 255
    for threshold in (0.0, 128 / 255, 0.9):
        step = augment.Solarize(threshold=threshold, p=0.5)
        got = applied(step, images, drawn(step, [[0.1], [0.9]]))
        assert torch.equal(got[0], reference.solarize(images[0], threshold))


def blur_weights(sigma, radius):
    return torch.from_numpy(augment.gaussian_weights(sigma.double().numpy(), radius))


def true_gaussian(image, sigma, **cut):
    return scipy.ndimage.gaussian_filter(image, (0, sigma, sigma), mode="nearest", **cut)


@pytest.mark.parametrize("channels, height, width", [(3, 20, 31), (1, 5, 7), (10, 1, 12)])
def test_blur_equals_scipys_gaussian_filter(channels, height, width):
    images = torch.from_numpy(np.random.default_rng(11).random((4, channels, height, width)))
    sigma = torch.tensor([0.1, 0.7, 1.3, 3.0], dtype=torch.float64)
    got = augment.gaussian_blur(images, blur_weights(sigma, 12))
    for image, result, own in zip(images, got, sigma.tolist(), strict=True):
        wanted = true_gaussian(image.numpy(), own, radius=(0, 12, 12))
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-12)


def test_the_blur_step_draws_sigma_in_its_range_and_cuts_off_far_out():
    step = augment.GaussianBlur(sigma=(0.5, 2.0), p=1)
    images = torch.from_numpy(np.random.default_rng(12).random((3, 3, 24, 17)))
    got = applied(step, images, drawn(step, [[0.3, u] for u in (0.0, 0.5, 1.0)]))
    for image, result, sigma in zip(images, got, (0.5, 1.25, 2.0), strict=True):
        wanted = true_gaussian(image.numpy(), sigma, truncate=10)
        np.testing.assert_allclose(result, wanted, rtol=0, atol=2e-4)


def test_blur_leaves_a_flat_image_flat():
    flat = torch.full((2, 3, 9, 14), 0.3, dtype=torch.float64)
    got = augment.gaussian_blur(flat, blur_weights(torch.tensor([0.5, 6.0]), 24))
    torch.testing.assert_close(got, flat, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3, 10])
def test_normalize_is_taken_per_channel(channels):
    images = pixels(n=2, channels=channels)
    mean, std = np.linspace(0.2, 0.6, channels), np.linspace(0.1, 0.9, channels)
    normalize = augment.Normalize(mean.tolist(), std.tolist())
    got = applied(normalize, images, torch.empty(2, 0))
    for channel in range(channels):
        wanted = (images[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(got[:, channel], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decoded, size", [(16, 16), (16, 32), (40, 8)])
def test_a_crop_after_an_affine_sees_the_image_as_it_was_decoded(decoded, size):
    affine = augment.RandomAffine(0, 0, (1, 1), 0, fill=0, interpolation="bilinear")
    crop = augment.RandomResizedCrop((1, 1), (1, 1), interpolation="bilinear")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (decoded, decoded), np.uint8))
    crops = []
    for steps in ([affine, crop], [crop]):
        view = augment.View(size, steps, channels=1)
        uniforms = np.full((1, view.num_uniforms), 0.5)
        geometry, _ = view.draw(uniforms, np.array([[decoded, decoded]]))
        crops.append(view.crop([image], [parameters[0] for parameters in geometry]))
    assert crops[0].shape == (1, size, size) and np.array_equal(crops[0], crops[1])


# -------------------------------------------------------------------------------- views of a script


def test_digit_views_are_moved_and_shaded_and_never_mirrored():
    views = augment.digit_views([(2, 16, (0.6, 1)), (1, 8, (0.3, 0.6))], 0.5, blur=True)
    assert [size for size, _ in views] == [16, 16, 8]
    names = [type(step).__name__ for step in views[2][1]]
    assert names == ["RandomAffine", "RandomResizedCrop", "ColorJitter", "GaussianBlur"]
    assert views[2][1][1].scale == (0.3, 0.6) and views[0][1][3].p == 0.5


def test_views_are_normalised_last_and_those_of_one_kind_are_one():
    crop, solarize = crop_step(), augment.Solarize(threshold=0.5, p=1.0)
    specs = [*[(8, [crop, solarize])] * 2, (16, [crop])]
    one, same, other = augment.normalized(specs, 1, [0.4], [0.2])
    assert one is same and one is not other and (one.size, other.size) == ((8, 8), (16, 16))
    white = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)  # 0 when solarised
    images = one.finish(white, torch.ones(1, 1), CPU)
    torch.testing.assert_close(images, torch.full((1, 1, 8, 8), (0 - 0.4) / 0.2))


# ------------------------------------------------------------------------------ supervised training


def rand_augment(p=0.5):
    return augment.RandAugment(num_ops=2, magnitude=9, deviation=0.5, p=p, fill=(10, 20, 30),
                               interpolation="bicubic")


def test_rand_augment_draws_operation_level_and_sign():
    step = rand_augment()
    drawn = step.draw(np.random.default_rng(0).random((20_000, 10)), NO_SIZES).reshape(-1, 3)
    done = drawn[drawn[:, 0] >= 0]
    assert len(done) / len(drawn) == pytest.approx(0.5, abs=0.01)
    shares = np.bincount(done[:, 0].astype(int)) / len(done)
    assert len(shares) == 15 and np.abs(shares - 1 / 15).max() < 0.006
    assert (drawn[:, 1] <= 10).all() and (drawn[:, 1] == 10).mean() == pytest.approx(
        scipy.stats.norm.sf(2), abs=0.003)
    assert drawn[:, 1].mean() == pytest.approx(9, abs=0.02)
    assert np.std(drawn[drawn[:, 1] < 9, 1] - 9) == pytest.approx(
        0.5 * np.sqrt(1 - 2 / np.pi), rel=0.03)  # half of a normal distribution
    assert set(drawn[:, 2]) == {-1, 1} and abs(drawn[:, 2].mean()) < 0.02


@pytest.mark.parametrize("mode, fill, corner", [
    ("RGB", (10, 20, 30), (10, 20, 30)), ("RGB", (128,), (128, 128, 128)), ("L", (10, 20, 30), 20),
    ("L", (128,), 128),
])
def test_rand_augment_fills_every_channel(mode, fill, corner):
    step = dataclasses.replace(rand_augment(), fill=fill)
    turned = step.apply(Image.new(mode, (16, 16), "white"), np.array([[3, 10, 1]]), None)  # rotate
    assert turned.getpixel((0, 0)) == corner


def test_rand_augments_operations_are_those_of_timm():
    timm = pytest.importorskip("timm.data.auto_augment")
    step = rand_augment()
    kwargs = dict(fillcolor=(10, 20, 30), resample=Image.Resampling.BICUBIC)
    for number, name in enumerate(timm._RAND_INCREASING_TRANSFORMS):
        for level, sign in itertools.product((7.3, 9.0, 9.6), (-1, 1)):
            arguments = ()
            if timm.LEVEL_TO_ARG[name] is not None:
                negate, timm._randomly_negate = timm._randomly_negate, lambda v, s=sign: s * v
                try:
                    arguments = timm.LEVEL_TO_ARG[name](level, {})
                finally:
                    timm._randomly_negate = negate
            wanted = timm.NAME_TO_OP[name](picture(), *arguments, **kwargs)
            drawn = np.array([number, level, sign, -1, 9.0, 1])
            got = step.apply(picture(), drawn, None)
            assert np.array_equal(np.asarray(got), np.asarray(wanted)), (name, level, sign)


def test_rand_augment_takes_gray_planes_and_the_strongest_level():
    for number in range(15):
        drawn = np.array([number, 10.0, 1, number, 10.0, -1])
        for mode in ("L", "RGB"):
            got = rand_augment().apply(picture(mode=mode), drawn, None)
            assert got.mode == mode and got.size == (17, 12)


def erasing(p=1.0, side=20):
    return augment.RandomErasing(side, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), p=p)


def test_a_box_of_noise_stands_where_it_was_drawn_and_nowhere_else():
    step = erasing(p=0.5)
    u = np.random.default_rng(0).random((400, step.num_uniforms))
    boxes = torch.from_numpy(step.draw(u, NO_SIZES))
    erased = boxes[:, 2] > 0
    assert 0.4 < erased.double().mean() < 0.6
    assert torch.equal(erased, torch.from_numpy(u[:, -1] < 0.5))
    images = torch.full((400, 3, 20, 20), 7.0, dtype=torch.float64)
    got = applied(step, images, boxes)
    for image, (top, left, bottom, right, _) in zip(got, boxes.long().tolist(), strict=True):
        inside = torch.zeros(20, 20, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert (image[:, ~inside] == 7).all() and (image[:, inside].abs() < 6).all()
    noise = got[got != 7]
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    whole = torch.tensor([[0, 0, 20, 20, start] for start in (0, 0, 5000)]).double()
    one, same, other = applied(step, torch.zeros(3, 3, 20, 20).double(), whole)
    assert torch.equal(one, same) and len({*one.flatten().tolist(), *other.flatten().tolist()}) > (
        2 * 1190)  # neither channels nor images share their noise


def test_the_sizes_of_boxes_have_the_published_law():
    """By its loop: up to ten tries, the first that fits."""
    step, side = erasing(side=64), 64
    u = np.random.default_rng(1).random((300, step.num_uniforms))
    for row, got in zip(u, step.draw(u, NO_SIZES), strict=True):
        for k in range(10):
            area = side**2 * (0.02 + (1 / 3 - 0.02) * row[k])
            aspect = math.exp(math.log(0.3) - 2 * math.log(0.3) * row[10 + k])
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < side and w < side:
                break
        top, left = int(row[20] * (side - h + 1)), int(row[21] * (side - w + 1))
        assert got[:4].tolist() == [top, left, top + h, left + w]


def test_a_whole_image_is_resized_whatever_its_aspect():
    view = augment.View(8, [augment.Resize("bilinear"), augment.HorizontalFlip(p=0.0)], channels=3)
    got = view.crop([picture()], [np.empty(0), np.array([0])])
    wanted = picture().resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(got, np.asarray(wanted).transpose(2, 0, 1))
