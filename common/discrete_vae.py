"""The encoder of DALL-E's discrete VAE, which names the word of every 8 x 8 pixels of an image."""

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import weights
from common.distributed import RunError


class DiscreteVAE(nn.Module):
    """Convolutions and three pools by 2, from pixels to logits of words.

    Of any width and number of words; those of the released weights are 256 and 8192.

    Reference: Ramesh et al., arXiv 2102.12092, appendix A.1; tensors are named as released, but for
    weight and bias, which are w and b there.
    """

    def __init__(self, width: int, num_words: int):
        super().__init__()
        self.num_words = num_words
        parts, inputs = {"input": nn.Conv2d(3, width, 7, padding="same")}, width
        for group in range(1, 5):
            outputs = width * 2 ** (group - 1)
            parts[f"group_{group}"] = nn.Sequential(OrderedDict(
                block_1=Block(inputs, outputs), block_2=Block(outputs, outputs),
                pool=nn.MaxPool2d(2) if group < 4 else nn.Identity()))
            inputs = outputs
        parts["output"] = nn.Sequential(OrderedDict(
            relu=nn.ReLU(), conv=nn.Conv2d(inputs, num_words, 1)))
        self.blocks = nn.Sequential(OrderedDict(parts))

    @torch.no_grad()
    def forward(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """Words int64 (N, rows * columns) of images (N, 3, H, W) from 0 to 1.

        Images are resized to 8 pixels a word, with antialiasing.
        """
        small = F.interpolate(images, (8 * rows, 8 * columns), mode="bicubic", antialias=True)
        return self.blocks(0.8 * small.clamp(0, 1) + 0.1).argmax(1).flatten(1)


class Block(nn.Module):
    """Four convolutions, a small share of which is added to their input."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        hidden, parts = outputs // 4, OrderedDict()
        self.id_path = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        widths = (inputs, hidden, hidden, hidden, outputs)
        for n in range(1, 5):
            parts[f"relu_{n}"] = nn.ReLU()
            parts[f"conv_{n}"] = nn.Conv2d(*widths[n - 1 : n + 1], 3 if n < 4 else 1,
                                           padding="same")
        self.res_path = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.res_path(x) / 64  # the square of the number of blocks


def load_encoder(path: str, flag: str) -> DiscreteVAE:
    """Build the encoder from its state dict, or a dictionary with that as `state_dict`.

    Args:
        flag: what named the file, for messages.

    Raises:
        RunError: the file does not load, such as the released module, a pickle that runs code; a
            tensor is missing, unknown, of another shape or not finite.
    """
    try:
        found = weights.load_tensors(path)
    except RunError as error:
        remedy = (". Give the state dict: where dall_e is installed and the file trusted, "
                  "torch.save(torch.load(FILE, weights_only=False).state_dict(), OTHER)"
                  if "asks to run" in str(error) else "")
        raise RunError(f"{flag} {error}{remedy}") from error
    if isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    ours = {".w": ".weight", ".b": ".bias"}
    found = {re.sub(r"\.[wb]$", lambda end: ours[end[0]], str(name)): value
             for name, value in found.items()}
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in found.items()}
    first, last = (shapes.get(f"blocks.{name}.weight") for name in ("input", "output.conv"))
    if not first or not last:
        raise RunError(f"{flag} {path} is not the state dict of the discrete VAE's encoder, with "
                       "blocks.input.w and blocks.output.conv.w")
    vae = DiscreteVAE(first[0], last[0])
    wanted = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise RunError(f"{flag} {path}: {name} is {shapes.get(name, 'missing')}, not "
                           f"{wanted.get(name, 'known')}; is it DALL-E's encoder?")
        if not found[name].isfinite().all():
            raise RunError(f"{flag} {path}: {name} is not finite")
    vae.load_state_dict(found)
    return vae.requires_grad_(False)
