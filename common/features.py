"""Features of a frozen backbone for the evaluations: what to load, and one pass over the images."""

import contextlib
import json
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common import dist
from common.dist import RunError, World

# What to assume where no run.json and no flag says it: the built-in images and the backbone for
# them, or a file in torchvision's layout.
DIGITS = dict(
    data="digits", arch="resnet_tiny", stem="small", patch_size=4, image_size=16, in_chans=3,
    mean=[0.5], std=[0.5],
)
FOLDER = dict(
    arch="resnet50", stem="imagenet", patch_size=16, image_size=224, in_chans=3,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
)


@dataclass(frozen=True)
class Checkpoint:
    """What an evaluation's `--checkpoint` names: a baseline, or weights and how to feed them."""

    name: str
    weights: str | None  # a file, or None for `random` and `pixels`
    settings: dict  # of the run that made it; empty if nothing says


def find_checkpoint(name: str) -> Checkpoint:
    """Look up `random`, `pixels`, a run folder, or a file (with run.json beside it, or not).

    Raises:
        RunError: nothing of that name, or a run folder without a backbone.
    """
    if name in ("random", "pixels"):
        return Checkpoint(name, None, {})
    weights = os.path.join(name, "backbone.pth") if os.path.isdir(name) else name
    if not os.path.isfile(weights):
        raise RunError(
            f"--checkpoint {name}: no file {weights}; give a run folder, a weights file, "
            "random or pixels"
        )
    described = os.path.join(os.path.dirname(weights), "run.json")
    settings = {}
    if os.path.isfile(described):
        with open(described) as file, contextlib.suppress(ValueError, KeyError, TypeError):
            settings = json.load(file)["settings"]
    return Checkpoint(name, weights, settings)


def resolve(args, checkpoints: list[Checkpoint]) -> dict:
    """What to evaluate on and with: flags first, then the first described run, then assumptions."""
    described = next((c.settings for c in checkpoints if c.settings), {})
    source = args.data or described.get("data") or "digits"
    assumed = DIGITS if source == "digits" else dict(FOLDER, data=source)
    given = {name: getattr(args, name) for name in DIGITS if getattr(args, name) is not None}
    settings = {name: {**assumed, **described, **given}[name] for name in DIGITS}
    for name in ("mean", "std"):
        values = settings[name]
        if len(values) in (1, settings["in_chans"]):
            continue
        if name in given:
            raise RunError(f"--{name} has {len(values)} values for --in-chans "
                           f"{settings['in_chans']}; give one, or one a channel")
        settings[name] = [sum(values) / len(values)]
    return settings


def freeze(backbone: nn.Module, weights: str | None, world: World) -> nn.Module:
    """Put a backbone on the device in eval mode, with weights from a file or as it stands."""
    with dist.together():
        if weights is not None:
            load_backbone(backbone, weights)
    return backbone.to(world.device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_backbone(backbone: nn.Module, path: str) -> None:
    """Load a flat state dict; every tensor of the backbone must be there, in its shape.

    A classifier (`fc.*`, as in torchvision's files) is left out, and said.

    Raises:
        RunError: the file does not load, or a tensor is missing, unknown or of another shape.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file raises many things
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {code[1]}, which is refused" if code else type(error).__name__
        raise RunError(f"{path} does not load: {reason}") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise RunError(f"{path} is no state dict: it holds a {type(loaded).__name__}")
    heads = [key for key in loaded if key.startswith("fc.")]
    loaded = {key: value for key, value in loaded.items() if key not in heads}
    wanted = backbone.state_dict()
    for key in wanted:  # a counter that older files do not have and no forward uses
        if key.endswith("num_batches_tracked"):
            loaded.setdefault(key, wanted[key])
    for key in sorted({*wanted, *loaded}):
        if key not in loaded or key not in wanted:
            what = "has no" if key not in loaded else "has an unknown"
            raise RunError(f"{path} {what} tensor {key}; is --arch right?")
        if getattr(loaded[key], "shape", None) != wanted[key].shape:
            got = tuple(getattr(loaded[key], "shape", ())) or type(loaded[key]).__name__
            raise RunError(f"{path}: {key} is {got}, not {tuple(wanted[key].shape)}; are --arch, "
                           "--stem and --in-chans right?")
    backbone.load_state_dict(loaded)
    if heads:
        dist.say(f"{path}: {len(loaded)} tensors loaded, left out: {' '.join(heads)}")


class Chunks(torch.utils.data.Dataset):
    """Item b is the b-th chunk of a range of images, through one view without random numbers."""

    def __init__(self, images, view, first: int, last: int, size: int):
        self.images, self.view, self.last = images, view, last
        self.starts = list(range(first, last, size))
        self.size = size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, item: int):
        start = self.starts[item]
        crops = []
        for index in range(start, min(start + self.size, self.last)):
            try:
                planes = self.images.read(index)
            except Exception as error:  # Pillow's decoders raise what they like
                if isinstance(error, RunError):
                    return str(error)
                return f"{self.images.name(index)} cannot be read: {error}"
            sizes = np.array([planes[0].size[::-1]])
            geometry, colour = self.view.draw(np.empty((1, 0)), sizes)
            crops.append(torch.from_numpy(self.view.crop(planes, [g[0] for g in geometry]).copy()))
        return torch.stack(crops), torch.from_numpy(colour).expand(len(crops), -1)


def extract(function, images, view, world: World, *, batch_size: int, workers: int) -> Tensor:
    """Apply `function` to one view of every image, each process taking a contiguous part.

    Args:
        function: images (n, C, H, W) on the device to features (n, D); called without gradient.
        view: an `augment.View` that draws no random numbers.

    Returns:
        Float32 features (len(images), D) on the CPU, in data-set order, equal on every process.

    Raises:
        RunError: an image cannot be read.
    """
    n = len(images)
    first, last = n * world.rank // world.size, n * (world.rank + 1) // world.size
    chunks = Chunks(images, view, first, last, batch_size)
    loader = torch.utils.data.DataLoader(
        chunks, batch_size=None, num_workers=min(workers, len(chunks))
    )
    parts = []
    with dist.together(), torch.inference_mode():
        for chunk in loader:
            if isinstance(chunk, str):
                raise RunError(chunk)
            parts.append(function(view.finish(*chunk, world.device)).float().cpu())
    parts = dist.all_gather_objects(torch.cat(parts).numpy() if parts else None)
    return torch.from_numpy(np.concatenate([p for p in parts if p is not None]))
