"""Scores of an image's pixels, of overlapping windows that a network scores in patches."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from common.backbones import resizing_matrix


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side, the last one at its end."""
    return [*range(0, length - window, stride), max(0, length - window)]


def windows(x: Tensor, window: int, stride: int, side: int, fill: float) -> tuple[Tensor, list]:
    """Square windows of an image (C, H, W), filled up to multiples of a patch.

    Returns:
        (n, C, H', W'), and of each (top, left).
    """
    height, width = (min(window, length) for length in x.shape[1:])
    places = list(itertools.product(starts(x.shape[1], window, stride),
                                    starts(x.shape[2], window, stride)))
    cut = torch.stack([x[:, top : top + height, left : left + width] for top, left in places])
    return F.pad(cut, (0, -width % side, 0, -height % side), value=fill), places


def enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of (N, C, h, w) to (N, C, H, W), centres of pixels at halves.

    As two matrix products, whose backward is deterministic on every device, and fast.
    """
    down, across = (resizing_matrix(old, new, x, mode="bilinear")
                    for old, new in zip(x.shape[2:], size, strict=True))
    return down @ x @ across.T


def scores_of_pixels(score, image: Tensor, window: int, stride: int, side: int) -> Tensor:
    """Scores (C, H, W) of an image's pixels, the mean over the windows that see one.

    Args:
        score: images (n, 3, H', W') to scores (n, C, h, w) of their patches.
        image: (3, H, W), normalised; what windows lack to a multiple of a patch is 0, the mean.
    """
    cut, places = windows(image, window, stride, side, fill=0.0)
    scores = enlarged(score(cut), cut.shape[2:])
    height, width = (min(window, length) for length in image.shape[1:])
    total = scores.new_zeros(scores.shape[1], *image.shape[1:])
    times = torch.zeros_like(total[0])
    for (top, left), part in zip(places, scores, strict=True):
        box = slice(top, top + height), slice(left, left + width)
        total[(slice(None), *box)] += part[:, :height, :width]
        times[box] += 1
    return total / times


def enlarged_argmax(scores: Tensor, size: tuple[int, int], chunk: int = 16) -> Tensor:
    """The best class of each pixel, int64 (H, W), of scores (C, h, w) enlarged to this size.

    A few classes at a time, which bounds the memory.
    """
    best = scores.new_full(size, -torch.inf)
    found = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for first in range(0, len(scores), chunk):
        part, which = enlarged(scores[None, first : first + chunk], size)[0].max(0)
        better = part > best
        best, found = torch.where(better, part, best), torch.where(better, which + first, found)
    return found
