"""Augmentation: geometry per image in the loader's workers, colour per batch on the device.

A view is a list of steps. Each step turns some uniform numbers in [0, 1) into the parameters of one
image (`draw`), so a view is a function of the image and of those numbers, and of nothing else: the
loader makes them from (seed, epoch, data-set index, view). The geometric steps then run on the
decoded image with Pillow and give a uint8 crop; the colour steps run on the whole batch, with one
row of parameters per image, wherever the batch is. No value has a default here: the script says it.

    view = View(
        32,
        [
            RandomResizedCrop(scale=(0.08, 1), ratio=(3 / 4, 4 / 3), interpolation="bicubic"),
            HorizontalFlip(p=0.5),
            ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8),
            Grayscale(p=0.2),
            GaussianBlur(sigma=(0.1, 2.0), p=0.5),
            Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ],
        channels=3,
    )

Letters: n images, C channels, H x W pixels. Colour steps take and give float images in [0, 1].
"""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

INTERPOLATION = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds them
ORDERS = np.array(list(itertools.permutations(range(4))))  # the 24 orders of four colour changes


class View:
    """One view of an image: its size in pixels and its steps, geometry first.

    With a channel count other than 3, the steps (or parts of steps) that are defined on RGB are
    left out; `left_out` names them.
    """

    def __init__(self, size: int | tuple[int, int], steps: list, channels: int):
        self.size = (size, size) if isinstance(size, int) else size  # (H, W)
        self.channels = channels
        self.left_out = []
        if channels != 3:
            self.left_out = [step.needs_rgb for step in steps if step.needs_rgb]
            steps = [s for s in (step.without_rgb() for step in steps) if s is not None]
        self.geometry = [s for s in steps if s.geometric]
        self.colour = [s for s in steps if not s.geometric]
        if self.geometry + self.colour != steps:
            raise ValueError("a view's geometric steps come before its colour steps")
        # What `finish` depends on: parameters tell how often a step is taken.
        self.kind = (self.size, channels, [dataclasses.replace(s, p=None) if hasattr(s, "p") else s
                                           for s in self.colour])
        self.num_uniforms = sum(s.num_uniforms for s in steps)
        # Parameters are drawn for the decoded size: images keep it until the last resizing step.
        resizing = [number for number, s in enumerate(self.geometry) if s.resizes]
        self.resized_by = resizing[-1] if resizing else None

    def draw(self, uniforms: np.ndarray, sizes: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Turn uniform numbers into parameters.

        Args:
            uniforms: (n, num_uniforms) in [0, 1).
            sizes: (n, 2) height and width of each decoded image.

        Returns:
            The geometric steps' parameters, an array (n, p) each, and one float32 array (n, P) that
            holds the colour steps' parameters side by side.
        """
        drawn, start = [], 0
        for step in self.geometry + self.colour:
            own = uniforms[:, start : start + step.num_uniforms]
            drawn.append(step.draw(own, sizes))
            start += step.num_uniforms
        colour = [np.empty((len(sizes), 0)), *drawn[len(self.geometry) :]]
        return drawn[: len(self.geometry)], np.concatenate(colour, axis=1).astype(np.float32)

    def crop(self, planes: list[Image.Image], parameters: list[np.ndarray]) -> np.ndarray:
        """Apply the geometric steps to one image, given as Pillow planes; uint8 (C, H, W).

        Of 16 bits, which Pillow resizes as floats (mode F) alone, uint16.
        """
        size = planes[0].size[::-1]
        for number, (step, own) in enumerate(zip(self.geometry, parameters, strict=True)):
            size = self.size if number == self.resized_by else size
            planes = [step.apply(plane, own, size) for plane in planes]
        arrays = [np.asarray(plane) for plane in planes]
        if planes[0].mode == "F":  # not cut to its range, as Pillow does with integers
            return np.stack(arrays).round().clip(0, 65535).astype(np.uint16)
        if arrays[0].ndim == 3:
            return arrays[0].transpose(2, 0, 1)
        return np.stack(arrays)

    @torch.no_grad()
    def finish(self, crops: Tensor, parameters: Tensor, device: torch.device) -> Tensor:
        """Move uint8 or uint16 crops (n, C, H, W) to the device and apply the colour steps there.

        A step reads how many images it changes on the CPU, and which ones on the device: it neither
        waits for the device nor sends it lists.

        Args:
            crops: uint8 or uint16 (n, C, H, W), on the CPU.
            parameters: (n, P) from `draw`, on the CPU.

        Returns:
            Images (n, C, H, W) of torch's default dtype.
        """
        white = 65535 if crops.dtype == torch.uint16 else 255
        images = crops.to(device, non_blocking=True).to(torch.get_default_dtype()).div_(white)
        here = parameters.to(device, non_blocking=True).to(images.dtype)
        start = 0
        for step in self.colour:
            own = slice(start, start + step.num_parameters)
            images = step.apply(images, here[:, own], parameters[:, own])
            start += step.num_parameters
        return images


class Step:
    """What all steps share: how many numbers they draw, and whether they are geometry."""

    geometric = False
    resizes = False  # a geometric step that can give another size
    needs_rgb = None  # what is left out where images are not RGB, in words
    num_uniforms = 0
    num_parameters = 0

    def without_rgb(self) -> "Step | None":
        """The step, or what is left of it, for images that are not RGB."""
        return self

    def draw(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return u


class Chosen(Step):
    """A step that an image takes with probability p, which is drawn as a parameter of 0 or 1."""

    num_uniforms = num_parameters = 1

    def draw(self, u, sizes):
        return u < self.p


# ---------------------------------------------------------------------------- geometry, with Pillow


@dataclass
class RandomResizedCrop(Step):
    """Crop a box of random area and aspect, and resize it to the view's size.

    The law is torchvision's: up to ten tries of an area share in `scale` and a log-uniform aspect
    (width / height) in `ratio`, then the largest central box of an allowed aspect. At the box's rim
    Pillow's filter reads the pixels beside it too, where torchvision cuts the box out first.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str
    geometric = resizes = True
    tries = 10
    num_uniforms = 2 * tries + 2

    def draw(self, u, sizes):
        """Boxes (n, 4): left, top, width, height in pixels."""
        tries = self.tries
        height, width = sizes[:, :1], sizes[:, 1:]  # (n, 1)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, :tries])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = np.exp(low + (high - low) * u[:, tries : 2 * tries])
        box_width, box_height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
        rows, first = np.arange(len(u)), fits.argmax(axis=1)
        w, h = box_width[rows, first], box_height[rows, first]
        left = np.floor(u[:, -2] * (width[:, 0] - w + 1))
        top = np.floor(u[:, -1] * (height[:, 0] - h + 1))
        boxes = np.stack([left, top, w, h], axis=1)
        for row in np.flatnonzero(~fits.any(axis=1)):
            boxes[row] = self.central_box(*sizes[row])
        return boxes.astype(np.int64)

    def central_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The largest central box whose aspect is allowed: left, top, width, height."""
        w, h = width, height
        if width / height < self.ratio[0]:
            h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(height * self.ratio[1])
        return (width - w) // 2, (height - h) // 2, w, h

    def apply(self, plane, box, size):
        left, top, width, height = box.tolist()
        resample = INTERPOLATION[self.interpolation]
        return plane.resize(size[::-1], resample, box=(left, top, left + width, top + height))


@dataclass
class RandomAffine(Step):
    """Rotate, shift, scale and shear about the centre, then resize to the view's size.

    Args:
        degrees: largest rotation to either side. translate: largest shift, as a share of the side.
        scale: range of the zoom. shear: largest horizontal shear in degrees. fill: 0-255, the value
        of pixels from outside the image.
    """

    degrees: float
    translate: float
    scale: tuple[float, float]
    shear: float
    fill: int
    interpolation: str
    geometric = resizes = True
    num_uniforms = 5

    def draw(self, u, sizes):
        """Coefficients (n, 6) of the map from output pixels to input pixels."""
        height, width = sizes[:, 0], sizes[:, 1]
        angle = np.radians(self.degrees) * (2 * u[:, 0] - 1)
        shift_x = self.translate * (2 * u[:, 1] - 1) * width
        shift_y = self.translate * (2 * u[:, 2] - 1) * height
        zoom = self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 3]
        shear = np.tan(np.radians(self.shear) * (2 * u[:, 4] - 1))
        d, e = -np.sin(angle) / zoom, np.cos(angle) / zoom
        a, b = e + shear * d, -d + shear * e  # x gains a share of y; rows of the map: [a b], [d e]
        centre_x, centre_y = width / 2, height / 2
        c = centre_x + a * (shift_x - centre_x) + b * (shift_y - centre_y)
        f = centre_y + d * (shift_x - centre_x) + e * (shift_y - centre_y)
        return np.stack([a, b, c, d, e, f], axis=1)

    def apply(self, plane, coefficients, size):
        resample = INTERPOLATION[self.interpolation]
        fill = self.fill if plane.mode == "L" else (self.fill,) * len(plane.getbands())
        fill = self.fill * 257 if plane.mode == "F" else fill
        plane = plane.transform(
            plane.size, Image.Transform.AFFINE, coefficients.tolist(), resample, fillcolor=fill
        )
        return plane if plane.size == size[::-1] else plane.resize(size[::-1], resample)


@dataclass
class CenterCrop(Step):
    """Resize the shorter side to `resize` pixels and cut the view's size from the centre.

    The view of the evaluations; equal to torchvision's Resize and CenterCrop, black rims where the
    resized image is smaller than the view included. `resize` equal to the view's size leaves a
    square image whole.
    """

    resize: int
    interpolation: str
    geometric = resizes = True

    def apply(self, plane, _, size):
        plane = shorter_side_to(self.resize, plane, self.interpolation)
        extra = [there - wanted for there, wanted in zip(plane.size, size[::-1], strict=True)]
        left, top = (round(x / 2) if x > 0 else -(-x // 2) for x in extra)
        return plane.crop((left, top, left + size[1], top + size[0]))

    def __str__(self):
        return f"shorter side to {self.resize} px ({self.interpolation}), centre crop"


@dataclass
class RandomCrop(Step):
    """Resize the shorter side to `resize` pixels and cut the view's size out at any place.

    With `padding`, black pixels on each side count as the image's.
    """

    resize: int
    padding: int
    interpolation: str
    geometric = resizes = True
    num_uniforms = 2

    def apply(self, plane, u, size):
        plane = shorter_side_to(self.resize, plane, self.interpolation)
        left, top = (math.floor(share * (there + 2 * self.padding - wanted + 1)) - self.padding
                     for share, there, wanted in zip(u, plane.size, size[::-1], strict=True))
        return plane.crop((left, top, left + size[1], top + size[0]))


@dataclass
class Resize(Step):
    """Resize the whole image to the view's size, whatever that does to its aspect."""

    interpolation: str
    geometric = resizes = True

    def apply(self, plane, _, size):
        return plane.resize(size[::-1], INTERPOLATION[self.interpolation])

    def __str__(self):
        return f"the whole image resized ({self.interpolation})"


@dataclass
class LongerSide(Step):
    """Make an image smaller, where needed, so that its longer side is `max_side` pixels."""

    max_side: int
    interpolation: str
    geometric = True

    def apply(self, plane, _, size):
        factor = self.max_side / max(plane.size)
        if factor >= 1:
            return plane
        return plane.resize([max(1, round(factor * side)) for side in plane.size],
                            INTERPOLATION[self.interpolation])

    def __str__(self):
        return f"longer side at most {self.max_side} px ({self.interpolation})"


def shorter_side_to(resize: int, plane: Image.Image, interpolation: str) -> Image.Image:
    """Resize as torchvision does, which drops the fraction of the longer side."""
    size = [int(resize * side / min(plane.size)) for side in plane.size]
    return plane.resize(size, INTERPOLATION[interpolation])


@dataclass
class HorizontalFlip(Chosen):
    """Mirror left and right with probability p."""

    p: float
    geometric = True

    def apply(self, plane, flip, size):
        return plane.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip[0] else plane


@dataclass
class RandAugment(Step):
    """Take `num_ops` operations, each drawn from `OPERATIONS` and done with probability p.

    An operation's strength is a level from 0 to 10, drawn from a normal distribution and cut off
    there; which way it goes is drawn too. The law is that of timm's `rand-m9-mstd0.5-inc1` for
    magnitude 9, deviation .5, two operations, p .5, which MAE, DeiT and others train with;
    torchvision's RandAugment has other operations and levels.

    Args:
        magnitude, deviation: of the level's distribution.
        fill: 0-255, of pixels from outside the image: one value for each channel, or one for all.

    Reference: Cubuk et al., arXiv 1909.13719; there without the probability.
    """

    num_ops: int
    magnitude: float
    deviation: float
    p: float
    fill: tuple[int, ...]
    interpolation: str
    geometric = True

    @property
    def num_uniforms(self):
        return 5 * self.num_ops

    def draw(self, u, sizes):
        """For each operation in turn its number (-1: none), level and sign (n, 3 num_ops)."""
        which, done, first, second, sign = np.moveaxis(u.reshape(len(u), self.num_ops, 5), 2, 0)
        normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)  # Box and Muller
        level = np.clip(self.magnitude + self.deviation * normal, 0, 10)
        number = np.where(done < self.p, np.floor(which * len(OPERATIONS)), -1)
        drawn = np.stack([number, level, np.where(sign < 0.5, -1, 1)], axis=2)
        return drawn.reshape(len(u), -1)

    def apply(self, plane, drawn, size):
        fill, bands = tuple(self.fill), len(plane.getbands())
        if len(fill) != bands:  # Pillow would take a single value for that of red
            fill = (round(sum(fill) / len(fill)),) * bands
        for number, level, sign in drawn.reshape(-1, 3).tolist():
            if number >= 0:
                plane = operate(plane, OPERATIONS[int(number)], level / 10, int(sign), fill,
                                INTERPOLATION[self.interpolation])
        return plane


OPERATIONS = ("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize",
              "solarize add", "color", "contrast", "brightness", "sharpness", "shear x", "shear y",
              "translate x", "translate y")


def operate(plane: Image.Image, name: str, strength: float, sign: int, fill, resample):
    """One of `OPERATIONS` on an RGB or L image, the more the greater the strength in [0, 1]."""
    if name in ("autocontrast", "equalize", "invert"):
        return getattr(ImageOps, name)(plane)
    if name == "posterize":
        return ImageOps.posterize(plane, max(1, 4 - int(4 * strength)))  # 0: black, or refused
    if name == "solarize":
        return ImageOps.solarize(plane, 256 - int(256 * strength))
    if name == "solarize add":
        more = min(128, int(110 * strength))
        values = [min(255, value + more) if value < 128 else value for value in range(256)]
        return plane.point(values * len(plane.getbands()))
    if name in ("color", "contrast", "brightness", "sharpness"):
        factor = max(0.1, 1 + 0.9 * sign * strength)
        return getattr(ImageEnhance, name.capitalize())(plane).enhance(factor)
    if name == "rotate":
        return plane.rotate(30 * sign * strength, resample, fillcolor=fill)
    shear, shift = 0.3 * sign * strength, 0.45 * sign * strength
    affine = {"shear x": (1, shear, 0, 0, 1, 0), "shear y": (1, 0, 0, shear, 1, 0),
              "translate x": (1, 0, shift * plane.width, 0, 1, 0),
              "translate y": (1, 0, 0, 0, 1, shift * plane.height)}[name]
    return plane.transform(plane.size, Image.Transform.AFFINE, affine, resample, fillcolor=fill)


# ------------------------------------------------------------------- colour, batched, on the device


@dataclass
class ColorJitter(Step):
    """Change brightness, contrast, saturation and hue in random order, with probability p.

    A strength s gives factors in [max(0, 1 - s), 1 + s]; hue h turns by a share of the circle in
    [-h, h]. Brightness, contrast and saturation are one blend each,
    x <- clamp(a x + b gray(x) + c mean(gray(x))). A batch, sorted by how many blends come before an
    image's hue turn, goes through three places for blends, the turn of all, three more places;
    an image uses those that touch the turn, so that each place takes neighbouring rows.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float
    num_uniforms = 6
    num_parameters = 20  # six places (a, b, c), hue turn, blends before it; -1: no change at all

    @property
    def needs_rgb(self):
        return "saturation and hue" if self.saturation or self.hue else None

    def draw(self, u, sizes):
        n = len(u)
        order = ORDERS[(u[:, 1] * 24).astype(int)]  # (n, 4): which change is made when
        parameters = np.zeros((n, 20))
        blends = parameters[:, :18].reshape(n, 6, 3)
        turn = (order == 3).argmax(axis=1)
        before = turn if self.hue > 0 else np.zeros_like(turn)
        rows = np.arange(n)
        for change, strength in enumerate((self.brightness, self.contrast, self.saturation)):
            low, high = max(0.0, 1 - strength), 1 + strength
            factor = low + (high - low) * u[:, 2 + change]
            at = (order == change).argmax(axis=1)
            at = 3 - before + at - (at > turn)
            blends[rows, at, 0] = factor
            if change:
                blends[rows, at, 3 - change] = 1 - factor
        parameters[:, 18] = self.hue * (2 * u[:, 5] - 1)
        parameters[:, 19] = np.where(u[:, 0] < self.p, before, -1)
        return parameters

    def without_rgb(self):
        return dataclasses.replace(self, saturation=0, hue=0)

    def apply(self, images, own, on_cpu):
        starts = [int((on_cpu[:, 19] < before).sum()) for before in range(4)]
        order = own[:, 19].argsort()[starts[0] :]
        if not len(order):
            return images
        starts = [start - starts[0] for start in starts]
        changed, own = images[order], own[order]
        blends = own[:, :18].unflatten(1, (6, 3)) @ blend_basis(images)
        blends = blends.unflatten(2, (2, images.shape[1], -1))  # (n, 6, 2, C, C)
        for place in range(6):
            if place == 3 and self.hue > 0:
                turn_hue(changed, own[:, 18], out=changed)
            rows = slice(starts[3 - place], None) if place < 3 else slice(starts[6 - place])
            blend_(changed[rows], *blends[rows, place].unbind(1))
        images[order] = changed
        return images


def blend_(images: Tensor, matrix: Tensor, of_mean: Tensor) -> None:
    """clamp(matrix x + of_mean mean(x), 0, 1) in place, both (n, C, C) on the channels."""
    if len(images):
        x = images.flatten(2)
        offset = of_mean @ x.mean(2, keepdim=True)
        torch.clamp(torch.baddbmm(offset, matrix, x), 0, 1, out=x)


@functools.cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed numbers, sent to a device once."""
    return torch.tensor(values, dtype=dtype).to(device)


def blend_basis(images: Tensor) -> Tensor:
    """Matrix (3, 2 C C) that makes of (a, b, c) the two matrices of a blend.

    Gray is the luminance of RGB, and the mean of any other number of channels.
    """
    channels = images.shape[1]
    weights = GRAY_WEIGHTS if channels == 3 else (1 / channels,) * channels
    one = np.eye(channels).ravel()
    gray = np.tile(weights, len(weights))
    basis = np.kron([[1, 0]], one), np.kron([[1, 0]], gray), np.kron([[0, 1]], gray)
    return constant(tuple(map(tuple, np.concatenate(basis).tolist())), images.dtype, images.device)


def turn_hue(images: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn the hue of RGB images (n, 3, H, W) by `shift` (n,), a share of the colour circle.

    Through HSV: with lowest value l, chroma c and hue h as a share of the circle, a channel is
    l + c clamp(6 |u - 1/2| - 1, 0, 1), u = frac(h + n), n = 0, 2/3, 1/3 for red, green, blue.
    """
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    # The hue follows from which channel is the largest. A lerp with weights 0 and 1 is a choice,
    # on CPUs several times faster than torch.where.
    thirds, at = constant(((2 / 3, 0.0, 1 / 3), (1.0, 2 / 3, 4 / 3)), images.dtype, images.device
                          ).view(2, 3, 1, 1)  # the second more than any angle below 0
    if_blue, if_red, if_green = torch.addcdiv(
        thirds, images - images.roll(-1, 1), chroma.clamp(min=1e-12), value=1 / 6).split(1, 1)
    largest = torch.eq(images, value, out=torch.empty_like(images))
    hue = if_blue.lerp_(if_green, largest[:, 1:2]).lerp_(if_red, largest[:, :1])
    u = hue + (shift.view(-1, 1, 1, 1) + at)
    u.frac_().sub_(0.5).abs_().clamp_(1 / 6, 2 / 6)
    return torch.addcmul(low - chroma, chroma, u, value=6, out=out)


@dataclass
class Grayscale(Chosen):
    """Replace the image by its luminance in all three channels, with probability p."""

    p: float
    needs_rgb = "grayscale"

    def without_rgb(self):
        return None

    def apply(self, images, own, on_cpu):
        weights = constant((GRAY_WEIGHTS,), images.dtype, images.device)
        luminance = (weights @ images.flatten(2)).unflatten(2, images.shape[2:])  # (n, 1, H, W)
        return images.lerp_(luminance, own.view(-1, 1, 1, 1))  # a choice: weights 0 and 1


@dataclass
class GaussianBlur(Step):
    """Blur with a standard deviation in `sigma` pixels, with probability p.

    A true Gaussian; pixels beyond the border repeat the border, as in Pillow.
    """

    sigma: tuple[float, float]
    p: float
    num_uniforms = 2

    @property
    def num_parameters(self):  # the weights of pixels at so many pixels' distance
        return math.ceil(4 * self.sigma[1]) + 1

    def draw(self, u, sizes):
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * u[:, 1]
        return gaussian_weights(np.where(u[:, 0] < self.p, sigma, 0), self.num_parameters - 1)

    def apply(self, images, own, on_cpu):
        count = int((on_cpu[:, 0] < 1).sum())
        if count:
            chosen = own[:, 0].argsort()[:count]
            images[chosen] = gaussian_blur(images[chosen], own[chosen])
        return images


def gaussian_weights(sigma: np.ndarray, radius: int) -> np.ndarray:
    """Weights (n, radius + 1) of a pixel at distance 0, 1, ..., cut off behind the last; sum 1.

    A standard deviation of 0 is no blur.
    """
    distance = np.arange(radius + 1) / np.maximum(sigma, 1e-9)[:, None]
    weights = np.exp(-0.5 * np.square(distance))
    return weights / (2 * weights.sum(1, keepdims=True) - weights[:, :1])


def gaussian_blur(images: Tensor, weights: Tensor) -> Tensor:
    """Blur images (n, C, H, W) with `gaussian_weights` (n, radius + 1).

    As two matrix products per image, K_H x K_W^T: one kernel size for all, fast on every device.
    """
    n, channels, height, width = images.shape
    matrices = {side: (weights @ blur_basis(weights.shape[1], side, weights.dtype, weights.device)
                       ).unflatten(1, (side, side)) for side in {height, width}}
    rows, columns = matrices[height], matrices[width]
    images = images.reshape(n, channels * height, width) @ columns.transpose(1, 2)
    images = images.view(n, channels, height, width)
    return rows[:, None] @ images


@functools.cache
def blur_basis(count: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrix (count, side * side) that makes of weights by distance those of pixel j in pixel i."""
    basis = np.zeros((count, side, side))
    for distance in range(1 - count, count):
        there = np.clip(np.arange(side) + distance, 0, side - 1)  # beyond the border: its pixel
        basis[abs(distance), np.arange(side), there] += 1
    return torch.from_numpy(basis).to(dtype).flatten(1).to(device)


@dataclass
class Solarize(Chosen):
    """Invert the pixels at or above `threshold` (in [0, 1]), with probability p."""

    threshold: float
    p: float

    def apply(self, images, own, on_cpu):
        if not on_cpu.any():
            return images
        inverted = (images >= self.threshold) * own.view(-1, 1, 1, 1)
        return images.lerp_(1 - images, inverted)


@dataclass
class Normalize(Step):
    """Subtract the mean and divide by the standard deviation of each channel.

    Gives channels_last images, in which convolutions are faster.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images, own, on_cpu):
        scale = 1 / np.array(self.std, dtype=np.float64)
        scale, shift = (constant(tuple(x.tolist()), images.dtype, images.device).view(-1, 1, 1)
                        for x in (scale, -scale * self.mean))
        images = torch.addcmul(shift, images, scale, out=images)
        return images.contiguous(memory_format=torch.channels_last)


@dataclass
class RandomErasing(Step):
    """Replace a box by Gaussian noise of deviation 1, with probability p; after `Normalize`.

    The law is timm's: up to ten tries of an area share in `scale` and a log-uniform aspect (height
    / width) in `ratio`; a box as high or as wide as the image does not fit, and if none of the ten
    fits, nothing is erased. The noise is a piece of one long row of normal numbers, of which an
    image draws only the start.

    Args:
        side: of the view in pixels.

    Reference: Zhong et al., arXiv 1708.04896.
    """

    side: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    p: float
    tries = 10
    starts = 2**16
    num_uniforms = 2 * tries + 4
    num_parameters = 5  # top, left, bottom, right, where the noise starts

    def draw(self, u, sizes):
        tries, side = self.tries, self.side
        area = side**2 * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, :tries])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = np.exp(low + (high - low) * u[:, tries : 2 * tries])
        heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (heights < side) & (widths < side)
        rows, first = np.arange(len(u)), fits.argmax(axis=1)
        h, w = heights[rows, first], widths[rows, first]
        top = np.floor(u[:, -4] * (side - h + 1))
        left = np.floor(u[:, -3] * (side - w + 1))
        start = np.floor(u[:, -2] * self.starts)
        drawn = np.stack([top, left, top + h, left + w, start], axis=1)
        return drawn * (fits.any(axis=1) & (u[:, -1] < self.p))[:, None]  # else an empty box

    def apply(self, images, own, on_cpu):
        count = int((on_cpu[:, 2] > 0).sum())
        if count:
            chosen = own[:, 2].argsort(descending=True)[:count]
            old, box = images[chosen], own[chosen].T[:, :, None, None, None]
            y = torch.arange(old.shape[2], device=old.device)[:, None]
            x = torch.arange(old.shape[3], device=old.device)
            inside = (y >= box[0]) & (y < box[2]) & (x >= box[1]) & (x < box[3])
            row = normal_numbers(self.starts + old[0].numel(), old.dtype, old.device)
            noise = row.unfold(0, old[0].numel(), 1)[own[chosen, 4].long()].view(old.shape)
            images[chosen] = torch.where(inside, noise, old)
        return images


@functools.cache
def normal_numbers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A fixed row of normal numbers, made once."""
    rng = np.random.Generator(np.random.Philox(key=0))
    return torch.from_numpy(rng.standard_normal(count)).to(dtype).to(device)


# -------------------------------------------------------------------------------- views of a script


def moved_digit(size: int, scale) -> list:
    """One view that leaves a built-in digit what it is: it is moved, never mirrored."""
    return [(size, [
        RandomAffine(degrees=15, translate=0.1, scale=(0.8, 1.2), shear=10, fill=0,
                     interpolation="bilinear"),
        RandomResizedCrop(scale, ratio=(3 / 4, 4 / 3), interpolation="bilinear"),
    ])]


def digit_views(crops: list, jitter: float, blur: bool) -> list:
    """Views of the built-in digits for methods that compare views: moved, and shaded as well."""
    views = []
    for count, size, scale in crops:
        steps = [
            *moved_digit(size, scale)[0][1],
            ColorJitter(jitter, jitter, saturation=0.0, hue=0.0, p=0.8),
            GaussianBlur(sigma=(0.1, 1.0), p=0.5 if blur else 0.0),
        ]
        views += [(size, steps)] * count
    return views


def normalized(views: list, channels: int, mean, std) -> list[View]:
    """Make a view of each (size, steps), normalised at its end; equal pairs share one."""
    made = {id(view): View(view[0], [*view[1], Normalize(mean, std)], channels) for view in views}
    return [made[id(view)] for view in views]
