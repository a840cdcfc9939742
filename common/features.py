"""Features of a frozen backbone for the three evaluations: what to load, one pass, keeping them.

An evaluation goes through `sources`, which yields the features of every checkpoint or feature file
that its command line names (`cli.evaluation_parser`). The pieces serve alone as well:
`find_checkpoint` and `resolve` say what to load and how to feed it, `models` builds and loads it,
`extract` applies a function to every image, `Features` holds both splits and is written and read.
"""

import argparse
import contextlib
import json
import math
import os
import pickle
import re
import statistics
import zipfile
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
    settings: dict  # what the file and the run that made it say; empty if nothing does


def find_checkpoint(name: str) -> Checkpoint:
    """Look up `random`, `pixels`, a run folder, or a file (with run.json beside it, or not).

    What a file says of itself (`checkpoint.described`) counts more than the run.json beside it.

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
    with contextlib.suppress(RunError):  # a file that does not load: whoever loads it says why
        own = getattr(load_tensors(weights), "_metadata", {}).get("settings")
        if isinstance(own, dict):  # or it is the version of a foreign model's part of that name
            settings = settings | {name: own[name] for name in FOLDER if name in own}
    return Checkpoint(name, weights, settings)


def resolve(args, checkpoints: list[Checkpoint], data: str | None = None) -> dict:
    """What to evaluate on and with: flags first, then the first described run, then assumptions.

    `data`, if given, is what the images are whatever the checkpoints say.

    Raises:
        RunError: a flag is not what weights were trained with, and they cannot be without; or
            settings do not go together.
    """
    described = next((c.settings for c in checkpoints if c.settings), {})
    source = data or args.data or described.get("data") or "digits"
    assumed = DIGITS if source == "digits" else dict(FOLDER, data=source)
    given = {name: getattr(args, name) for name in DIGITS if getattr(args, name) is not None}
    settings = {name: {**assumed, **described, **given}[name] for name in DIGITS}
    settings["data"] = source
    for checkpoint in checkpoints:
        for name in ("arch", "in_chans", of_this_kind(settings)):
            said = checkpoint.settings.get(name, settings[name])
            if name in given and said != settings[name]:
                flag = f"--{name.replace('_', '-')}"
                raise RunError(f"{flag} {settings[name]}, and {checkpoint.name} is of {flag} "
                               f"{said}; is {flag} right?")
    for name in ("mean", "std"):
        values = settings[name]
        if len(values) in (1, settings["in_chans"]):
            continue
        if name in given:
            raise RunError(f"--{name} has {len(values)} values for --in-chans "
                           f"{settings['in_chans']}; give one, or one a channel")
        settings[name] = [sum(values) / len(values)]
    size, patch = settings["image_size"], settings["patch_size"]
    if settings["arch"].startswith("vit") and size % patch:
        raise RunError(f"--image-size {size} is no multiple of --patch-size {patch}")
    return settings


def of_this_kind(settings: dict) -> str:
    """The setting that only this kind of backbone has."""
    return "patch_size" if settings["arch"].startswith("vit") else "stem"


def as_flag(name: str, settings: dict) -> str:
    value = settings[name]
    values = value if isinstance(value, list | tuple) else [value]
    return f"--{name.replace('_', '-')} {' '.join(map(str, values))}"


def assumed(checkpoint: Checkpoint, settings: dict) -> str:
    """One line of what is taken for granted of weights that do not say it; "" where they do."""
    names = ["arch", of_this_kind(settings), "image_size", "in_chans", "mean", "std"]
    names = [name for name in names if name not in checkpoint.settings]
    if not names:
        return ""
    line = (f"{checkpoint.name} does not say how it was trained; taken: "
            f"{' '.join(as_flag(name, settings) for name in names)}")
    if "stem" in names and settings["stem"] == "small":
        line += " (of padding 1; where it is solo-learn's, of padding 2: --stem small-pad2)"
    return line


def resize_of(settings: dict, resize: int | None) -> int:
    """Shorter side before the crop: as given, else the image size up to 96 px, 8/7 of it above.

    Raises:
        RunError: less than the image size.
    """
    size = settings["image_size"]
    resize = resize or (size if size <= 96 else round(size * 256 / 224))
    if resize < size:
        raise RunError(f"--resize {resize} is less than --image-size {size}")
    return resize


def sources(args, world: World, *, open_split, make_view, build, layers, default_workers: int):
    """Go through what `--checkpoint` or `--features` name.

    Args:
        args: of a parser made by `cli.evaluation_parser`.
        open_split: (settings, "train" or "test") to a source of labelled images; called once for
            each channel count.
        make_view: settings to an `augment.View` without random numbers, and words for it.
        build: settings to a new backbone; "trained_size" among them is the size of its images.
        layers: (backbone, images, names or None for the usual one) to rows by name.
        default_workers: loader processes where images are files and no flag says.

    Yields:
        The name, of `random` with its backbone's, and the `Features`, one after the other: five for
        `random`, one for all others.

    Raises:
        RunError: something named is not there, does not fit or has no labels.
    """
    for path in args.features or ():
        yield path, read_all(path, args.layers)
    checkpoints = [find_checkpoint(name) for name in args.checkpoint or ()]
    shared = resolve(args, checkpoints) if checkpoints else {}
    opened = {}  # both splits, by channel count: listed once for all checkpoints
    said = set()

    def extracted(checkpoint, settings):
        view, words = make_view(settings)
        train, test = opened[settings["in_chans"]]
        workers = args.workers
        if workers is None:
            workers = default_workers if train.reads_files else 0
        protocol = (f"{settings['data']}: {len(train)} training and {len(test)} test images of "
                    f"{settings['image_size']} px ({words})")
        if protocol not in said:
            dist.say(protocol)
            said.add(protocol)
        names = None if checkpoint.name == "pixels" else args.layers
        for backbone in models(checkpoint, settings, build, args.seed, world):

            def function(images, backbone=backbone):
                try:
                    return layers(backbone, images, names)
                except ValueError as error:
                    raise RunError(f"{checkpoint.name}: {error}") from error

            parts = [
                Split(
                    extract(function, images, view, world, batch_size=args.batch_size,
                            workers=workers),
                    np.asarray(images.labels, dtype=np.int64), images.index,
                )
                for images in (train, test)
            ]
            found = Features(checkpoint.name, protocol, *parts)
            if args.save_features:
                write(found, args.save_features, world)
            yield found

    for checkpoint in checkpoints:
        settings = dict(shared)
        if checkpoint.weights is not None:
            settings = resolve(args, [checkpoint], shared["data"])
            own = checkpoint.settings.get("data", shared["data"])
            if own != shared["data"] and not args.data:
                dist.say(f"warning: {checkpoint.name} was trained on {own}, and is evaluated on "
                         f"{shared['data']} like the first run; --data chooses")
        settings["trained_size"] = checkpoint.settings.get("image_size", settings["image_size"])
        if settings["in_chans"] not in opened:
            splits = [open_split(settings, split) for split in ("train", "test")]
            if any(images.labels is None for images in splits):
                raise RunError(f"--data {settings['data']}: no class folders, so no labels")
            opened[settings["in_chans"]] = splits
        arch = f" ({settings['arch']})" if checkpoint.name == "random" else ""
        yield checkpoint.name + arch, extracted(checkpoint, settings)


def mean_of(runs: list):
    """The results of several initialisations, averaged number by number."""
    first = runs[0]
    if all(run == first for run in runs):
        return first
    if isinstance(first, dict):
        return {key: mean_of([run[key] for run in runs]) for key in first}
    if isinstance(first, list):
        return [mean_of(list(parts)) for parts in zip(*runs, strict=True)]
    return statistics.fmean(runs)


# ---------------------------------------------------------------------------------------- backbones

RANDOM_INITIALISATIONS = 5


class Pixels(nn.Module):
    """The baseline that learns nothing: the normalised image is its feature."""

    def layer_widths(self) -> dict:
        return {"pixels": None}

    def layers(self, images: Tensor, _names) -> dict[str, Tensor]:
        return {"pixels": images.flatten(1)}


def models(checkpoint: Checkpoint, settings: dict, build, seed: int, world: World):
    """Yield a checkpoint's frozen backbone; for `random` five untrained ones, of seeds from `seed`.

    Args:
        build: settings to a new backbone.
    """
    if checkpoint.name == "pixels":
        yield freeze(Pixels(), None, world)
    elif checkpoint.weights is None:
        for number in range(RANDOM_INITIALISATIONS):
            torch.manual_seed(seed + number)
            yield freeze(build(settings), None, world)
    else:
        line = assumed(checkpoint, settings)
        if line:
            dist.say(line)
        for name in ("mean", "std"):
            said, now = checkpoint.settings.get(name, settings[name]), settings[name]
            if list(said) != list(now) and len({*said, *now}) > 1:
                dist.say(f"warning: {as_flag(name, settings)}, and {checkpoint.name} was trained "
                         f"with {as_flag(name, checkpoint.settings)}")
        yield freeze(build(settings), checkpoint.weights, world)


def freeze(backbone: nn.Module, weights: str | None, world: World) -> nn.Module:
    """Put a backbone on the device in eval mode, with weights from a file or as it stands."""
    with dist.together():
        if weights is not None:
            load_backbone(backbone, weights)
    return backbone.to(world.device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------- weights files

# What is known of the files that others release: words for it; the keys to go down to the state
# dict; what stands before the names of the backbone's tensors; what else stands there (heads). The
# first layout that fits counts, so a teacher comes before its student. What stands in WRAPPERS is
# left out of the names before, wherever it stands.
WRAPPERS = re.compile(r"(^|(?<=\.))((module|_orig_mod|_fsdp_wrapped_module|"
                      r"_checkpoint_wrapped_module)\.)+")
LAYOUTS = (
    ("VISSL, teacher of DINO", "loss",
     r"momentum_teacher\.(trunk\.)?(_feature_blocks\.)?", r"heads\."),
    ("VISSL, teacher of DINO", "classy_state_dict.loss",
     r"momentum_teacher\.(trunk\.)?(_feature_blocks\.)?", r"heads\."),
    ("VISSL, teacher of DINO", "loss.teacher", r"(trunk\.)?(_feature_blocks\.)?", r"heads\."),
    ("VISSL", "classy_state_dict.base_model.model.trunk", r"(_feature_blocks\.)?", None),
    ("VISSL, converted", "model_state_dict", r"(trunk\.)?(_feature_blocks\.)?", r"heads\.|fc\."),
    ("DINO, teacher", "teacher", r"backbone\.", None),
    ("MoCo", "state_dict", r"encoder_q\.", r"fc\."),
    ("MoCo v3", "state_dict", r"base_encoder\.", r"(fc|head)\."),
    ("lightly, teacher", "state_dict", r"teacher_backbone\.(vit\.)?", r"(fc|head)\.|mask_token$"),
    ("MMSelfSup, lightly or solo-learn", "state_dict", r"(model\.)?backbone\.(vit\.)?",
     r"(fc|head)\.|mask_token$"),
    ("SimSiam or an older solo-learn", "state_dict", r"encoder\.", r"fc\."),
    ("Barlow Twins", "model", r"backbone\.", r"fc\."),
    ("MAE", "model", "", r"decoder_|mask_token$|head\."),
    ("state_dict with a head, as SwAV's or lemniscate's", "state_dict", "",
     r"projection_head\.|prototypes|(fc|head)\."),
    ("plain state dict", "", "", r"projection_head\.|prototypes|(fc|head)\."),
)
# Other names of the same tensors: a Sequential of torchvision's ResNet (lightly), OpenMMLab's
# transformer, and the last norm of a transformer that was fine-tuned with pooled patches.
RENAMED = (
    (r"0\.", "conv1."), (r"1\.", "bn1."), (r"4\.", "layer1."), (r"5\.", "layer2."),
    (r"6\.", "layer3."), (r"7\.", "layer4."),
    (r"patch_embed\.projection\.", "patch_embed.proj."), (r"(ln1|fc_norm)\.", "norm."),
    (r"layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
    (r"layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
)


def load_backbone(backbone: nn.Module, path: str) -> None:
    """Load a weights file of a layout in `LAYOUTS`, and say which and what was left out.

    Every tensor of the backbone must be there, in its shape.

    Raises:
        RunError: the file does not load, or a tensor is missing, unknown, of another shape or not
            finite.
    """
    loaded = load_tensors(path)
    if loaded.keys() >= {"step", "settings", "state"}:
        raise RunError(f"{path} is the state of a run in training; name its folder, or the "
                       "backbone.pth in it")
    wanted = backbone.state_dict()
    layout, found, ignored = recognise(loaded, wanted, path)
    fit_positions(backbone, found.get("pos_embed"))
    wanted = backbone.state_dict()
    for key in wanted:  # a counter that older files do not have and no forward uses
        if key.endswith("num_batches_tracked"):
            found.setdefault(key, wanted[key])
    for key in (*wanted, *sorted(found.keys() - wanted.keys())):
        if key not in found or key not in wanted:
            what = "has no" if key not in found else "has an unknown"
            raise RunError(f"{path} ({layout}) {what} tensor {key}; is --arch right?")
        if getattr(found[key], "shape", None) != wanted[key].shape:
            got = tuple(getattr(found[key], "shape", ())) or type(found[key]).__name__
            raise RunError(f"{path} ({layout}): {key} is {got}, not {tuple(wanted[key].shape)}; "
                           "are --arch, --stem, --in-chans, --image-size and --patch-size right?")
        wrong = (~found[key].isfinite()).sum().item()
        if wrong:
            raise RunError(f"{path} ({layout}): {key} is not finite ({wrong} of "
                           f"{found[key].numel()} values); take a checkpoint from before that")
    backbone.load_state_dict(found)
    dist.say(f"{path}: {layout}, {len(wanted)} of {len(wanted)} tensors of the backbone loaded"
             f"{', left out: ' if ignored else ''}{' '.join(ignored)}")


def fit_positions(backbone: nn.Module, table) -> None:
    """Give a transformer room for positions of another image size; it interpolates them itself."""
    own = getattr(backbone, "pos_embed", None)
    if own is None or getattr(table, "shape", own.shape)[::2] != own.shape[::2]:
        return
    side = math.isqrt(table.shape[1] - 1)
    if table.shape != own.shape and side**2 == table.shape[1] - 1:
        backbone.pos_embed = nn.Parameter(torch.zeros_like(table), own.requires_grad)
        backbone.grid = (side, side)


def load_tensors(path: str) -> dict:
    """Read what `torch.save` wrote, or a safetensors file.

    Tensors, plain values, argparse's namespaces and NumPy's scalars are read.

    Raises:
        RunError: the file does not load, asks for anything else, or holds no dictionary.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        loaded = read_safetensors(path) if start[8:9] == b"{" else read_pickled(path)
    except Exception as error:  # a foreign file raises many things
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            reason = f"it asks to run {code[1]}, which is refused"
        elif isinstance(error, OSError):
            reason = error.strerror or type(error).__name__
        else:
            reason = what_it_is(path, start) or type(error).__name__
        raise RunError(f"{path} does not load: {reason}") from error
    if not isinstance(loaded, dict):
        raise RunError(f"{path} is no state dict: it holds a {type(loaded).__name__}")
    return loaded


class Inert:
    """Takes the place of an object that is not needed, and forgets all that it is given."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


# The log in a checkpoint of OpenMMLab's engine, by what is refused first, and what else it asks
# for. None of it is imported or run: `Inert` stands for each.
LOGGED = "mmengine.logging.history_buffer.HistoryBuffer"
IN_A_LOG = (LOGGED, "builtins.getattr", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct")


def read_pickled(path: str):
    """Read a file of `torch.save` without running anything that stands in it."""
    scalar = np.float64(0).__reduce__()[0]  # NumPy's, under the names that it had and has
    allowed = [argparse.Namespace, np.dtype, (scalar, "numpy.core.multiarray.scalar"),
               (scalar, "numpy._core.multiarray.scalar"),
               *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]
    mapped = zipfile.is_zipfile(path)  # then only the tensors that are used are read

    def read(*more):
        with torch.serialization.safe_globals([*allowed, *more]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        return read()
    except pickle.UnpicklingError as error:
        if f"GLOBAL {LOGGED} " not in str(error):
            raise
    return read(*((Inert, name) for name in IN_A_LOG))


SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(path: str) -> dict[str, Tensor]:
    """Read a safetensors file: length of the header (8 bytes), JSON header, tensors one by one.

    Reference: https://github.com/huggingface/safetensors, section Format.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    size = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header, data, found = json.loads(data[8:size].tobytes()), data[size:], {}
    header.pop("__metadata__", None)
    for name, part in header.items():
        first, last = part["data_offsets"]
        own, dtype = torch.from_numpy(data[first:last].copy()), SAFETENSORS[part["dtype"]]
        found[name] = (own.view(dtype) if len(own) else own.to(dtype)).reshape(part["shape"])
    return found


NOT_WEIGHTS = (  # how files begin that are often given for weights, and what to say of them
    (rb"\Z", "it is empty"),
    (rb"version https://git-lfs", "it is a pointer of Git LFS, not the file itself, which "
     "`git lfs pull` fetches"),
    (rb"(\xef\xbb\xbf)?\s*<", "it is a web page, not the file that was to be downloaded"),
    (rb"[\s\x20-\x7e]+\Z", "it is text, not weights"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd", "it is compressed; unpack it"),
    (rb"\x89HDF", "it is HDF5, as Keras writes it, not a file of torch.save"),
    (rb"\x93NUMPY", "it is a NumPy array, not a state dict"),
)


def what_it_is(path: str, start: bytes) -> str | None:
    """Words for a file that does not load, from how it begins; None if nothing is known."""
    for beginning, words in NOT_WEIGHTS:
        if re.match(beginning, start):
            return words
    cut = "it breaks off before its end; copy or download it again"
    if start[8:9] == b"{":
        return cut
    if not start.startswith(b"PK"):
        return None
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, OSError):
        return cut
    if any(name.endswith("/constants.pkl") for name in names):
        return ("it is TorchScript; torch.jit.load reads it, and what torch.save writes of the "
                "state_dict() is weights")
    if not any(name.endswith("data.pkl") for name in names):
        return f"it is an archive of {' '.join(names[:3])}, not a file of torch.save"
    return None


def recognise(loaded: dict, wanted: dict, path: str) -> tuple[str, dict, list[str]]:
    """Find the layout of a file by its keys: words, tensors under our names, and what is left out.

    Raises:
        RunError: no layout has a tensor of the backbone.
    """
    best, most = None, 0
    for words, container, prefix, heads in LAYOUTS:
        inner, beside = loaded, []
        for name in filter(None, container.split(".")):
            beside += [str(key) for key in inner if key != name]
            inner = inner.get(name)
            if not isinstance(inner, dict):
                break
        else:
            found, ignored = {}, []
            for key, value in inner.items():
                plain = WRAPPERS.sub("", str(key))
                start = re.match(prefix, plain)
                name = our_name(plain[start.end() :], wanted) if start and key == str(key) else None
                if name is None or (name not in wanted and heads and re.match(heads, name)):
                    ignored.append(str(key))
                elif name in found:
                    raise RunError(f"{path} ({words}) has two tensors {name}")
                else:
                    found[name] = value
            if any(re.search(r"\bfc_norm\.", key) for key in map(str, inner)):
                words += ", fc_norm taken for norm"
            share = len(found.keys() & wanted.keys()) / len(wanted)
            if share > most:
                best, most = (words, found, [*in_groups(ignored), *sorted(beside)]), share
            if share > 0.5:
                break
    if best is None:
        keys = [str(key) for key in loaded]
        if isinstance(loaded.get("state_dict"), dict):
            keys = [f"state_dict.{key}" for key in loaded["state_dict"]]
        if any(re.match(r"(state_dict\.)?features\.", WRAPPERS.sub("", key)) for key in keys):
            raise RunError(f"{path} is an AlexNet or a VGG, as DeepCluster's are, which is not "
                           "among the backbones")
        raise RunError(f"{path} is in no known layout, or of another --arch: it holds "
                       f"{' '.join(keys[:4]) or 'nothing'}")
    return best


def our_name(name: str, wanted: dict) -> str:
    """A tensor's name as our backbones have it."""
    if name in wanted:
        return name
    for pattern, ours in RENAMED:
        renamed, times = re.subn(f"^{pattern}", ours, name)
        if times and renamed in wanted:
            return renamed
    return name


def in_groups(keys: list[str]) -> list[str]:
    """Name keys, or where more than four begin alike, their beginning and number."""
    groups = {}
    for key in keys:
        wrappers = WRAPPERS.match(key)
        start = wrappers[0] if wrappers else ""
        start += key[len(start) :].partition(".")[0]
        groups.setdefault(start, []).append(key)
    return [text for start, own in groups.items()
            for text in (own if len(own) <= 4 else [f"{start}.* ({len(own)})"])]


# ----------------------------------------------------------------------------------------- one pass


class Chunks(torch.utils.data.Dataset):
    """Item b is the b-th of some chunks of the images, through one view without random numbers."""

    def __init__(self, images, view, chunks: range, size: int):
        self.images, self.view, self.chunks, self.size = images, view, chunks, size

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, item: int):
        start = self.chunks[item] * self.size
        crops = []
        for index in range(start, min(start + self.size, len(self.images))):
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


@torch.no_grad()
def extract(
    function, images, view, world: World, *, batch_size: int, workers: int,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Apply `function` to one view of every image, each process taking a contiguous part.

    A process takes whole batches, so the features are the same bit for bit on any number of
    processes. None needs more memory than for the features of all images.

    Args:
        function: images (n, C, H, W) on the device to rows (n, D) by name; called without gradient.
        view: an `augment.View` that draws no random numbers.
        labels: (len(images),), where the function takes those of its images as well.

    Returns:
        By name, float32 rows (len(images), D) on the CPU in data-set order, equal on every process.

    Raises:
        RunError: an image cannot be read, or a feature is not finite.
    """
    n = len(images)
    num_chunks = -(-n // batch_size)
    parts = [num_chunks * rank // world.size for rank in range(world.size + 1)]
    own = range(parts[world.rank], parts[world.rank + 1])
    workers = min(workers, len(own))
    loader = torch.utils.data.DataLoader(
        Chunks(images, view, own, batch_size), batch_size=None, num_workers=workers,
        pin_memory=world.device.type == "cuda", worker_init_fn=dist.end_if_unsent,
        multiprocessing_context=dist.worker_context() if workers else None,
    )
    found, widths = {}, {}
    with dist.together():
        for chunk, loaded in zip(own, loader, strict=True):
            if isinstance(loaded, str):
                raise RunError(loaded)
            given = [view.finish(*loaded, world.device)]
            if labels is not None:
                given.append(labels[chunk * batch_size :][: len(given[0])].to(world.device))
            for name, rows in function(*given).items():
                if name not in found:
                    found[name] = torch.empty(n, rows.shape[1])
                kept = found[name][chunk * batch_size :][: len(rows)]
                kept.copy_(rows)
                check_finite(kept, f"of {name}", chunk * batch_size)
    widths = {name: rows.shape[1] for name, rows in found.items()}
    widths = next(w for w in dist.all_gather_objects(widths) if w)  # some process may have no image
    bounds = [min(part * batch_size, n) for part in parts]
    for name, width in widths.items():
        found.setdefault(name, torch.empty(n, width))
        dist.share_rows(found[name], bounds)
    return {name: found[name] for name in widths}


def check_finite(rows: Tensor, words: str, first: int = 0) -> None:
    """Stop at features (N, D) that are not finite; the rows begin with that of image `first`."""
    wrong = (~rows.isfinite()).any(1).nonzero()
    if len(wrong):
        raise RunError(f"the features {words} are not finite, first of image "
                       f"{first + wrong[0].item()}; no number can be made of them")


def share_right(scores: Tensor, truth: Tensor, k: int) -> Tensor:
    """How far the true class is among the k of the highest scores: 1 if it is, 0 if not.

    Where equal scores stand on both sides of the border, which of them are among the k is chance:
    it is the chance of the true class. So no order of classes, images or a sort decides.

    Args:
        scores: (..., C). One that is not a number is above all others, and right is none of them.
        truth: int64 (...), in [0, C).
        k: at most C.

    Returns:
        Float64 (...), in [0, 1].
    """
    own = scores.gather(-1, truth[..., None])
    above = scores.shape[-1] - (scores <= own).sum(-1)
    equal = (scores == own).sum(-1).clamp(min=1)
    return ((k - above).double() / equal).clamp(0, 1)


# -------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Split:
    """Features of one split, in data-set order, no image twice."""

    layers: dict[str, Tensor]  # float32 (N, D) on the CPU, by name
    labels: np.ndarray  # int64 (N,), or (N, C) where an image may have several
    index: np.ndarray  # int64 (N,), rising: which images of the data set


@dataclass(frozen=True)
class Features:
    """Features of both splits under one backbone."""

    checkpoint: str
    protocol: str  # what the images were, in words
    train: Split
    test: Split


def write(features: Features, path: str, world: World) -> None:
    """Write features to a `.npz`: `train/<layer>`, `train/labels`, `train/index`, `test/...`.

    Raises:
        RunError: the file cannot be written.
    """
    arrays = {"checkpoint": np.array(features.checkpoint), "protocol": np.array(features.protocol)}
    for name, split in (("train", features.train), ("test", features.test)):
        arrays |= {f"{name}/{layer}": rows.numpy() for layer, rows in split.layers.items()}
        arrays |= {f"{name}/labels": split.labels, f"{name}/index": split.index}
    folder = os.path.dirname(path) or "."
    with dist.together(writing=folder):
        if world.is_main:
            os.makedirs(folder, exist_ok=True)
            with open(f"{path}.tmp", "wb") as file:
                np.savez(file, **arrays)
            os.replace(f"{path}.tmp", path)
    dist.say(f"features written to {path}")


def read_all(path: str, layers: list[str] | None):
    """Yield what is in a feature file, once, after saying where it comes from."""
    with dist.together():
        found = read(path, layers)
    dist.say(f"{path}: {found.checkpoint} on {found.protocol}")
    yield found


def read(path: str, layers: list[str] | None = None) -> Features:
    """Read a file of `write`: all of its layers, or some.

    Raises:
        RunError: there is no such file or layer, it is no such file, or not finite.
    """
    if not os.path.isfile(path):
        raise RunError(f"--features {path}: no such file; --save-features makes one")
    try:
        with np.load(path, allow_pickle=False) as file:
            there = [key[len("train/"):] for key in file.files if key.startswith("train/")]
            there = [name for name in there if name not in ("labels", "index")]
            for name in layers or ():
                if name not in there:
                    raise RunError(f"--features {path}: no layer {name}; there are "
                                   f"{' '.join(there)}")
            splits = []
            for split in ("train", "test"):
                rows = {name: torch.from_numpy(file[f"{split}/{name}"]) for name in layers or there}
                labels, index = file[f"{split}/labels"], file[f"{split}/index"]
                if {len(labels), len(index)} != {len(r) for r in rows.values()}:
                    raise ValueError("parts of different lengths")
                splits.append(Split(rows, labels, index))
                for name, part in rows.items():
                    check_finite(part, f"{split}/{name} of {path}")
            return Features(str(file["checkpoint"]), str(file["protocol"]), *splits)
    except (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise RunError(f"--features {path}: not a file made by --save-features") from error
