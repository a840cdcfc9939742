"""Features of a frozen backbone: what the evaluations load, how they feed it, and what they get.

An evaluation loops over `sources`: every checkpoint or feature file that its command line names
(`parser`), with its backbones, labelled images and view. `Source.features` passes all images
through a backbone once. The parts are usable alone as well: `resolve_checkpoint`,
`evaluation_settings`, `layers`, `extract`, and `Features`, written and read.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import string
import zipfile
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, labelled, optim, trunks, weights
from common.checkpoint import atomic_write
from common.distributed import RunError, World
from common.images import UnreadableImage
from common.workers import end_if_unsent, made_ahead

# ------------------------------------------------------------------------------------- command line


def parser(script: str, description: str, *, resnet_layer: str = "avgpool",
           resize: str = "the image size up to 96 px, 256/224 of it above",
           several: bool = True) -> cli.Parser:
    """Make an evaluation's parser; flags that default to those of a run are None.

    Args:
        resnet_layer: the default of `--layers` for a ResNet.
        resize: the default of this flag, in words.
        several: whether one call takes several checkpoints and layers.
    """
    made = cli.Parser(script, description)
    group = made.add_argument_group("features")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", nargs="+" if several else 1, metavar="WHAT",
                       help="run folders, weights files, random, pixels")
    which.add_argument("--features", nargs="+" if several else 1, metavar="FILE",
                       help="files made by --save-features, instead of checkpoints and images")
    group.add_argument("--save-features", metavar="FILE",
                       help="write the features of the one checkpoint to a .npz")
    group.add_argument("--layers", nargs="+" if several else 1, metavar="LAYER",
                       help="ResNet: conv1 res2 res3 res4 res5 avgpool, means of maps or, as in "
                       "res4-grid, about 9,000 numbers; transformer: cls patches cls4 patches4 (of "
                       f"the last 4 blocks); default: {resnet_layer}; cls, else patches")
    made.set_defaults(resnet_layer=resnet_layer)
    group = made.add_argument_group("images (default: as the first run among the checkpoints)")
    group.add_argument("--data", help="labelled images, with a train and a test split")
    cli.source_flags(group)
    cli.test_flags(group)
    group.add_argument("--image-size", type=cli.pos_int, help="side in pixels")
    group.add_argument("--resize", type=cli.pos_int,
                       help=f"shorter side before the central crop; default: {resize}")
    cli.channel_flags(group)
    backbone_flags(made.add_argument_group("backbone (default: as above)"))
    run_flags(made.add_argument_group("run"))
    return made


def run_flags(group) -> None:
    """How an evaluation runs."""
    group.add_argument("--batch-size", type=cli.pos_int, default=256,
                       help="images, or windows of them, in one forward pass")
    group.add_argument("--workers", type=cli.nonneg_int, metavar="N",
                       help="loader processes; default: the share of the cores, 0 if no files")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="device")
    group.add_argument("--amp", choices=("none", "tf32", "bf16", "fp16"),
                       help="precision of the frozen backbone; default: none, float32 (on CUDA "
                       "convolutions in TF32); tf32: matrix products too; bf16, fp16: autocast")
    group.add_argument("--seed", type=cli.nonneg_int, default=0, help="random seed")


HEAD_FLAGS = ("epochs", "train_batch_size", "lr", "flip")  # None: as published


def head_flags(group, output: str) -> None:
    """How an evaluation trains heads, in folders below one of its own."""
    group.add_argument("--epochs", type=cli.pos_int, help="passes; what is told in epochs scales")
    group.add_argument("--train-batch-size", type=cli.pos_int, metavar="N",
                       help="global batch; default: as published, or the largest power of two")
    group.add_argument("--lr", type=cli.positive, help="learning rate per 256 images")
    group.add_argument("--flip", action=cli.Switch,
                       help="mirror half of the crops; default: yes, but for images of digits")
    group.add_argument("--output", metavar="FOLDER", default=output,
                       help="parent of the heads' folders")
    cli.run_flags(group)


def backbone_flags(group) -> None:
    """What a backbone is, where nothing describes its weights."""
    cli.arch_flag(group, backbones.NAMES)
    group.add_argument("--stem", choices=tuple(backbones.STEMS),
                       help="small: 3x3 stride 1, no pool; small-pad2: solo-learn's, padded by 2")
    group.add_argument("--patch-size", type=cli.pos_int, help="side of a transformer's patches")


def parse(made: cli.Parser, argv=None) -> argparse.Namespace:
    """Parse an evaluation's flags, with the checks that hold for all of them."""
    args = made.parse_args(argv)
    cli.check_arch_flags(made, args, argv)
    if args.save_features and (args.features or len(args.checkpoint) > 1
                               or args.checkpoint == ["random"]):
        given = " ".join(args.features or args.checkpoint)
        made.error(f"--save-features takes the features of one --checkpoint, not of {given}")
    if args.features:
        for name in (*DIGITS, "test_data", "resize", "limit", "limit_per_class", "workers", "amp"):
            if getattr(args, name) is not None:
                made.error(f"--{name.replace('_', '-')} does not go with --features")
    if args.limit and args.limit_per_class:
        made.error(f"--limit {args.limit} and --limit-per-class {args.limit_per_class}: give one")
    args.amp = args.amp or "none"
    return args


@contextlib.contextmanager
def precision(amp: str, device: torch.device):
    """What an evaluation's `--amp` means on a device: a context, or decorator, of the backbone."""
    before = torch.get_float32_matmul_precision()
    if amp == "tf32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        with optim.precision(amp, device)[0]():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ----------------------------------------------------------------------------------------- settings

# Assumed where neither run.json nor a flag says it: the built-in images and a backbone for them, or
# a file in torchvision's layout.
DIGITS = dict(
    data="digits", arch="resnet_tiny", stem="small", patch_size=4, image_size=16, in_chans=3,
    mean=[0.5], std=[0.5], bits=8, exif_orientation=False,
)
FOLDER = DIGITS | dict(
    arch="resnet50", stem="imagenet", patch_size=16, image_size=224,
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
)
SAID = (*DIGITS, *backbones.VIT_PARTS)  # what a run says of images and backbone


@dataclass(frozen=True)
class Checkpoint:
    """What an evaluation's `--checkpoint` names: a baseline, or weights and how to feed them."""

    name: str
    weights: str | None  # a file, or None for `random` and `pixels`
    settings: dict  # what the file and the run that made it say; empty if nothing does


def resolve_checkpoint(name: str, flag: str = "--checkpoint",
                       baselines: tuple = ("random", "pixels")) -> Checkpoint:
    """Look up one of some baselines, a run folder, or a file, maybe with a run.json beside it.

    What a file says of itself (`checkpoint.described`) counts more than the run.json.

    Raises:
        RunError: nothing of that name, or a run folder without a backbone.
    """
    if name in baselines:
        return Checkpoint(name, None, {})
    path = os.path.join(name, "backbone.pth") if os.path.isdir(name) else name
    if not os.path.isfile(path):
        raise RunError(f"{flag} {name}: no file {path}; give "
                       f"{', '.join(('a run folder', 'a weights file', *baselines))}")
    described = os.path.join(os.path.dirname(path), "run.json")
    settings = {}
    if os.path.isfile(described):
        with open(described) as file, contextlib.suppress(ValueError, KeyError, TypeError):
            settings = json.load(file)["settings"]
    with contextlib.suppress(RunError):  # a file that does not load: loading it will say why
        said = getattr(weights.load_tensors(path), "_metadata", {}).get("settings")
        if isinstance(said, dict):  # or it is the version of a foreign model's part of that name
            settings = settings | {name: said[name] for name in SAID if name in said}
    return Checkpoint(name, path, settings)


def evaluation_settings(args, checkpoints: list[Checkpoint], data: str | None = None) -> dict:
    """Images and backbone: flags first, then the first described run, then assumptions.

    `data`, if given, overrides the images of the checkpoints.

    Raises:
        RunError: a flag contradicts what weights were trained with and depend on; or settings do
            not go together.
    """
    described = next((c.settings for c in checkpoints if c.settings), {})
    described = {name: described[name] for name in SAID if name in described}
    given = {name: value for name, value in vars(args).items()
             if name in DIGITS and value is not None}
    source = data or args.data or described.get("data") or "digits"
    settings = (DIGITS if source == "digits" else FOLDER) | described | given | {"data": source}
    for checkpoint in checkpoints:
        for name in ("arch", "in_chans", *of_this_kind(settings)):
            trained = checkpoint.settings.get(name, settings[name])
            if name in given and trained != settings[name]:
                flag = f"--{name.replace('_', '-')}"
                raise RunError(f"{flag} {settings[name]}, and {checkpoint.name} is of {flag} "
                               f"{trained}; is {flag} right?")
    for name in ("mean", "std"):
        settings[name] = cli.per_channel(name, settings[name], settings["in_chans"], name in given)
    size, patch = settings["image_size"], settings["patch_size"]
    if settings["arch"] in backbones.VITS and size % patch:
        raise RunError(f"--image-size {size} is not a multiple of --patch-size {patch}")
    return settings


def settings_of(args) -> dict:
    """What `build` and `central_view` need to know of a backbone that a script is training."""
    return DIGITS | {name: value for name, value in vars(args).items() if name in SAID}


def of_this_kind(settings: dict) -> list[str]:
    """The setting that only this kind of backbone has, if there is one."""
    if settings["arch"] in backbones.VITS:
        return ["patch_size"]
    return ["stem"] if settings["arch"] in backbones.RESNETS else []


def as_flag(name: str, settings: dict) -> str:
    value = settings[name]
    values = value if isinstance(value, list | tuple) else [value]
    return f"--{name.replace('_', '-')} {' '.join(map(str, values))}"


def assumed(checkpoint: Checkpoint, settings: dict) -> str:
    """One line of what is assumed of weights that do not say it; "" where they do."""
    names = ["arch", *of_this_kind(settings), "image_size", "in_chans", "mean", "std"]
    names = [name for name in names if name not in checkpoint.settings]
    if not names:
        return ""
    line = (f"{checkpoint.name} does not say how it was trained; taken: "
            f"{' '.join(as_flag(name, settings) for name in names)}")
    if "stem" in names and settings["stem"] == "small":
        line += " (of padding 1; where it is solo-learn's, of padding 2: --stem small-pad2)"
    return line


def print_doubts(checkpoint: Checkpoint, settings: dict) -> None:
    """Say what is assumed of weights, and warn where they were trained on other numbers."""
    if line := assumed(checkpoint, settings):
        comm.print_main(line)
    for name in ("mean", "std"):
        said, now = checkpoint.settings.get(name, settings[name]), settings[name]
        if list(said) != list(now) and len({*said, *now}) > 1:
            comm.print_main(f"warning: {as_flag(name, settings)}, and {checkpoint.name} was "
                            f"trained with {as_flag(name, checkpoint.settings)}; repeat that, "
                            "unless the change is meant")


# ------------------------------------------------------------------------------------------ sources

RANDOM_INITIALISATIONS = 5


@dataclass(frozen=True)
class Source:
    """A row of an evaluation's table: a checkpoint and its labelled images, or a feature file."""

    name: str
    args: argparse.Namespace
    world: World
    checkpoint: Checkpoint | None = None  # None for a feature file, which has only a name
    settings: dict | None = None  # `evaluation_settings`, and the "trained_size" of images
    train: object = None  # images, as `images.open_images` opens them
    test: object = None
    also: tuple = ()  # further images to test on
    view: augment.View | None = None  # without random numbers
    protocol: str = ""  # what the images are, in words
    said: set = field(default_factory=set)  # lines, of all sources

    def backbones(self):
        """Yield the frozen backbone: five untrained ones of `random`, None of a feature file."""
        checkpoint, settings = self.checkpoint, self.settings
        if checkpoint is None:
            yield None
        elif checkpoint.name == "pixels":
            yield freeze(Pixels(), None, self.world)
        elif checkpoint.weights is None:
            for number in range(RANDOM_INITIALISATIONS):
                torch.manual_seed(self.args.seed + number)
                yield freeze(build(settings), None, self.world)
        else:
            print_doubts(checkpoint, settings)
            yield freeze(build(settings), checkpoint.weights, self.world)

    def say(self, line: str) -> None:
        """Print a line, of several backbones and sources once."""
        if line not in self.said:
            self.said.add(line)
            comm.print_main(line)

    @property
    def seen_as(self) -> dict:
        """The settings that change the features of the same weights, which a head must repeat."""
        names = ["image_size", "in_chans", "mean", "std", "bits", "exif_orientation"]
        if self.name != "pixels":
            names += ["arch", *of_this_kind(self.settings)]
        seen = {name: self.settings[name] for name in names}
        return seen if self.args.amp == "none" else seen | {"amp": self.args.amp}

    @property
    def precision(self):
        """`precision` as the command line has it."""
        return precision(self.args.amp, self.world.device)

    def extract(self, function, images, labels=None) -> dict[str, Tensor]:
        """`extract` with the source's view, and the command line's batches and workers."""
        return extract(function, images, self.view, self.world, workers=self.args.workers,
                       batch_size=self.args.batch_size, labels=labels)

    def features(self, backbone: nn.Module | None, function=None) -> "Features":
        """Features of both splits under one of the backbones; `--save-features` writes them.

        Args:
            function: images (n, C, H, W) to rows (n, D) by name; None: `layers` that are asked for,
                in the precision of `--amp`.

        Raises:
            RunError: the backbone has no such layer; an image, a file or a number is broken.
        """
        if backbone is None:
            with comm.same_error_on_all_ranks():
                stored = read(self.name, self.args.layers)
            comm.print_main(f"{self.name}: {stored.checkpoint} on {stored.protocol}")
            return stored
        splits = {None: None}
        for images in (self.train, self.test):
            if images not in splits:
                splits[images] = self.split(backbone, images, function)
        found = Features(self.checkpoint.name, self.protocol, splits[self.train], splits[self.test])
        if self.args.save_features:
            write(found, self.args.save_features, self.world)
        return found

    def split(self, backbone: nn.Module, images, function=None) -> "Split":
        """Features of some images under one of the backbones, see `features`."""
        names = None if self.checkpoint.name == "pixels" else self.args.layers
        if names is None and backbones.is_resnet(backbone):
            names = [self.args.resnet_layer]
        function = function or self.precision(functools.partial(layers, backbone, names=names))
        rows = self.extract(function, images)
        labels = None if images.labels is None else np.asarray(images.labels, dtype=np.int64)
        return Split(rows, labels, images.index)


def checkpoints_of(args):
    """List what `--checkpoint` names, a `Checkpoint` each, and the settings to evaluate it with.

    Those are `evaluation_settings` and the "trained_size" of images. All are evaluated on the same
    data.

    Raises:
        RunError: something named is not there or does not fit; of several, weights do not load.
    """
    checkpoints = [resolve_checkpoint(name) for name in args.checkpoint or ()]
    shared, found = evaluation_settings(args, checkpoints) if checkpoints else {}, []
    for checkpoint in checkpoints:
        settings = dict(shared)
        if checkpoint.weights is not None:
            settings = evaluation_settings(args, [checkpoint], shared["data"])
            trained_on = checkpoint.settings.get("data", shared["data"])
            if trained_on != shared["data"] and not args.data:
                before, now = map(cli.as_given, (trained_on, shared["data"]))
                comm.print_main(f"warning: {checkpoint.name} was trained on {before}, and is "
                                f"evaluated on {now} like the first run; --data chooses")
        settings["trained_size"] = checkpoint.settings.get("image_size", settings["image_size"])
        found.append((checkpoint, settings))
    for checkpoint, settings in found if len(found) > 1 else ():  # before results can be lost
        with comm.same_error_on_all_ranks(), contextlib.redirect_stdout(None):
            if checkpoint.weights is not None:
                weights.load_backbone(build(settings), checkpoint.weights)
    return found


def reading(args, settings: dict) -> dict:
    """How images are opened and read, as options of `images.open_images`."""
    return cli.sources(args) | {name: settings[name] for name in ("bits", "exif_orientation")}


def sources(args, world: World, *, interpolation: str, crop=augment.CenterCrop,
            several_classes: bool = False, open_splits=labelled.open_splits,
            described=labelled.described, also_test=()):
    """Yield a `Source` for each of what `--checkpoint` or `--features` name.

    Args:
        args: of `parse`.
        interpolation, crop: of the view (`central_view`).
        several_classes: whether labels (N, C) are taken as well, of images that show several.
        open_splits: what opens both splits; of `labelled.open_unlabelled` the test split and labels
            may be None. One that is both is passed through a backbone once.
        described: what tells in words what they are.
        also_test: further folders or lists to test on, each with some of the classes.

    Raises:
        RunError: something named is not there, does not fit or has no labels.
    """
    opened, said = {}, set()  # both splits by how they are read; what is printed once
    found = []  # all, before results of the first can be lost
    for path in args.features or ():
        yield Source(path, args, world, said=said)
    for checkpoint, settings in checkpoints_of(args):
        channels, size = settings["in_chans"], settings["image_size"]
        how = reading(args, settings)
        read_as = channels, how["bits"], how["exif_orientation"]
        if read_as not in opened:
            train, test = open_splits(
                settings["data"], channels, test_data=args.test_data,
                limit_per_class=args.limit_per_class, several_classes=several_classes, **how)
            opened[read_as] = train, test, tuple(
                labelled.open_test(path, train, channels, "--also-test", **how)
                for path in also_test)
        train, test, also = opened[read_as]
        view = central_view(settings, crop, interpolation, args.resize)
        protocol = described(settings["data"], args, train, test)
        protocol += f" of {size} px" if view.geometry[0].resizes else ""
        protocol += f", {view.geometry[0]}"
        if args.amp == "tf32" and world.device.type != "cuda":
            protocol += ", features in float32 (tf32 is CUDA's)"
        elif args.amp != "none":
            protocol += f", features in {args.amp}"
        arch = f" ({settings['arch']})" if checkpoint.name == "random" else ""
        found.append(Source(checkpoint.name + arch, args, world, checkpoint, settings, train, test,
                            also, view, protocol, said))
    for source in found:
        source.say(source.protocol)
        for path, images in zip(also_test, source.also, strict=True):
            source.say(f"also tested: {len(images)} images of {path}, of {len(images.present)} "
                       "classes; no other is predicted")
        yield source


def central_view(settings: dict, crop, interpolation: str, resize: int | None = None):
    """The view of an evaluation: resized, cropped in the middle, normalised.

    `resize` is what the shorter side becomes: the image size up to 96 px, 8/7 of it above.
    """
    size = settings["image_size"]
    resize = resize or (size if size <= 96 else round(size * 256 / 224))
    if resize < size:
        raise RunError(f"--resize {resize} is less than --image-size {size}")
    steps = [crop(resize, interpolation=interpolation),
             augment.Normalize(settings["mean"], settings["std"])]
    return augment.View(size, steps, settings["in_chans"])


class Pixels(nn.Flatten):
    """The baseline that learns nothing: the normalised image is its feature."""


def build(settings: dict, positions: str = "sincos", drop_path: float = 0.0) -> nn.Module:
    """Build a backbone for weights from a file, or to be taken untrained."""
    size = settings["image_size"]
    backbone = backbones.build_backbone(
        settings["arch"], in_chans=settings["in_chans"], stem=settings.get("stem"),
        zero_init_residual=False, patch_size=settings["patch_size"], positions=positions,
        image_size=settings.get("trained_size", size), drop_path=drop_path,
        **{name: settings[name] for name in backbones.VIT_PARTS if name in settings})
    trunks.check_sizes(backbone, settings["in_chans"], {size})
    return backbone


def parts_in(path: str, settings: dict) -> dict:
    """Which of `backbones.VIT_PARTS` the transformer in a file has that does not say it."""
    backbone = build(settings)
    weights.load_backbone(backbone, path)
    registers = 0 if backbone.reg_token is None else backbone.reg_token.shape[1]
    return {"class_token": backbone.cls_token is not None, "registers": registers,
            "layer_scale": float(hasattr(backbone.blocks[0].ls1, "gamma")),
            "relative_positions": backbone.pos_embed is None}


def freeze(backbone: nn.Module, path: str | None, world: World) -> nn.Module:
    """Put a backbone on the device in eval mode, with weights from a file or as it stands."""
    with comm.same_error_on_all_ranks():
        if path is not None:
            weights.load_backbone(backbone, path)
    return backbone.to(world.device, memory_format=torch.channels_last).eval().requires_grad_(False)


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


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print rows of cells, if any, in columns: the first to the left; a row may end early."""
    rows = [header, *rows] if rows else []
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    for name, *cells in rows:
        cells = ["-" if cell == "nan" else cell for cell in cells]
        comm.print_main("   ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))


def print_json(line: dict) -> None:
    """Print the results as one line of JSON, which does not know NaN: it becomes null."""
    line = json.loads(json.dumps(line), parse_constant=lambda nan: None)
    comm.print_main(json.dumps(line))


# ---------------------------------------------------------------------------------- layers, by name

RESNET_LAYERS = ("conv1", "res2", "res3", "res4", "res5", "avgpool")
# Average pooling to about 9,000 numbers, as the linear and SVM protocols have it for 224 px: side
# of the map, side of what is left of it, and kernel, stride and padding in between.
GRIDS = {
    "conv1": (112, 12, (10, 10, 4)), "res2": (56, 6, (16, 8, 0)), "res3": (28, 4, (13, 5, 0)),
    "res4": (14, 3, (8, 3, 0)), "res5": (7, 2, (6, 1, 0)),
}


def layer_names(backbone: nn.Module) -> list[str]:
    """Names of a backbone's layers; the last one is the usual feature.

    A ResNet has `conv1` (after batch norm and ReLU, before the pool), its stages `res2` to `res5`,
    and `avgpool`, the mean of `res5`. A transformer has `patches`, the mean of the last patch
    tokens, and if it has a class token, `cls`, the last one; `cls2` and up, or without a class
    token `patches2` and up, are those of so many last blocks side by side. A trunk of another
    library has `features` alone.
    """
    if isinstance(backbone, Pixels):
        return ["pixels"]
    if isinstance(backbone, backbones.VisionTransformer):
        names = ["patches"] if backbone.cls_token is None else ["patches", "cls"]
        return [*(f"{names[-1]}{n}" for n in range(len(backbone.blocks), 1, -1)), *names]
    return list(RESNET_LAYERS) if backbones.is_resnet(backbone) else ["features"]


def layers(backbone: nn.Module, images: Tensor, names=None) -> dict[str, Tensor]:
    """Compute layers as rows (n, D), in one pass that ends with the deepest one asked for.

    Args:
        images: (n, C, H, W).
        names: of `layer_names`, a map being averaged over all of its places; or with a suffix, as
            in `res4-grid`, averaged to a few cells by `pool_to_grid`. None: the usual feature.

    Raises:
        RunError: the backbone has no layer of that name.
    """
    known = layer_names(backbone)
    plain = {name: name.removesuffix("-grid") for name in names or known[-1:]}
    for name, layer in plain.items():
        if layer not in known or (name != layer and layer not in GRIDS):
            raise RunError(f"no layer {name}; there are {' '.join(known)}, and with -grid "
                           f"{' '.join(GRIDS)}")
    if known[0] in ("pixels", "features"):
        return {known[0]: backbone(images)}
    if isinstance(backbone, backbones.VisionTransformer):
        depths = {name: int(name.strip(string.ascii_letters) or 1) for name in plain}
        tokens = backbone.tokens(images, max(depths.values()))
        first = int(backbone.cls_token is not None)
        return {name: torch.cat([t[:, 0] if name.startswith("cls") else t[:, first:].mean(1)
                                 for t in tokens[-n:]], 1) for name, n in depths.items()}
    found = resnet_maps(backbone, images, plain.values())
    return {name: (pool_to_grid(layer, found[layer]) if name != layer else
                   nn.functional.adaptive_avg_pool2d(found[layer], 1)).flatten(1)
            for name, layer in plain.items()}


def maps(backbone: nn.Module, images: Tensor, names) -> dict[str, Tensor]:
    """Maps (n, width, H', W') of a ResNet's layers, or of a transformer's patches, by layer."""
    if backbones.is_resnet(backbone):
        found = resnet_maps(backbone, images, names)
        return {name: found[name] for name in names}
    depths = {name: int(name.removeprefix("patches") or 1) for name in names}
    tokens = backbone.tokens(images, max(depths.values()))
    first, grid = int(backbone.cls_token is not None), backbone.grid_of(*images.shape[2:])
    return {name: torch.cat(tokens[-n:], 2)[:, first:].transpose(1, 2).unflatten(2, grid)
            for name, n in depths.items()}


def resnet_maps(backbone: nn.Module, images: Tensor, names) -> dict[str, Tensor]:
    """The maps (n, width, H', W') of a ResNet down to the deepest asked for; `avgpool` is res5."""
    x = backbone.relu(backbone.bn1(backbone.conv1(images)))
    found = {"conv1": x}
    x = backbone.maxpool(x)
    for number in (2, 3, 4, 5):
        if found.keys() >= set(names):
            break
        x = found[f"res{number}"] = getattr(backbone, f"layer{number - 1}")(x)
    return found | {"avgpool": x}


def pool_to_grid(name: str, x: Tensor) -> Tensor:
    """Average a map (n, width, H, W) of a ResNet's layer down to a few cells (n, width, S, S).

    At 224 px with the protocols' own kernels; at other sizes to as many cells, which then share the
    map evenly, or to the map itself where it has fewer.

    Reference: Goyal et al., arXiv 1905.01235; the numbers are those of VISSL's linear evaluation.
    """
    side, cells, window = GRIDS[name]
    if tuple(x.shape[2:]) == (side, side):
        return nn.functional.avg_pool2d(x, *window)
    return nn.functional.adaptive_avg_pool2d(x, [min(cells, s) for s in x.shape[2:]])


# ----------------------------------------------------------------------------------------- one pass


def crops_of(view: augment.View, blanks: bool, images, rows: range) -> tuple[Tensor, Tensor, list]:
    """Some images through a view without random numbers, what it draws, and a note of the images'.

    With `blanks`, an image that cannot be decoded is black.
    """
    crops = []
    for index in rows:
        try:
            planes = images.read_or_name(index)
        except UnreadableImage:
            if not blanks:
                raise
            blank = Image.new("F" if images.bits == 16 else "L", view.size[::-1])
            planes = [blank] * view.channels
        geometry, colour = view.draw(np.empty((1, 0)), np.array([planes[0].size[::-1]]))
        crops.append(torch.from_numpy(view.crop(planes, [g[0] for g in geometry]).copy()))
    return torch.stack(crops), torch.from_numpy(colour).expand(len(crops), -1), images.notes[:1]


@torch.no_grad()
def extract(function, images, view, world: World, *, batch_size: int, workers: int | None,
            labels: Tensor | None = None, start_worker=end_if_unsent,
            blanks: bool = False) -> dict[str, Tensor]:
    """Apply `function` to one view of every image, each process taking a contiguous part.

    A process takes whole batches, so the features are the same bit for bit on any number of
    processes. None needs more memory than for the features of all images.

    Args:
        function: images (n, C, H, W) on the device to rows (n, D) by name; called without gradient.
        view: an `augment.View` that draws no random numbers.
        workers: loader processes; None: this process's share of the cores if there are files.
        labels: (len(images),), where the function takes those of its images as well.
        start_worker: what a loader process calls first.
        blanks: take black images for those that cannot be read.

    Returns:
        By name, float32 rows (len(images), D) on the CPU in data-set order, equal on every process.

    Raises:
        RunError: an image cannot be read, or a feature is not finite.
    """
    n = len(images)
    chunks = [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    local = chunks[world.part(len(chunks))]
    made = made_ahead(functools.partial(crops_of, view, blanks), images, local, workers,
                      world.device, start_worker)
    found, notes = {}, []
    with comm.same_error_on_all_ranks():
        for chunk, (*loaded, new) in zip(local, made, strict=True):
            notes = notes or new
            given, part = [view.finish(*loaded, world.device)], slice(chunk.start, chunk.stop)
            if labels is not None:
                given.append(labels[part].to(world.device))
            for name, rows in function(*given).items():
                if name not in found:
                    found[name] = torch.empty(n, rows.shape[1])
                found[name][part] = rows
                check_finite(found[name][part], f"of {name}", chunk.start)
    widths = {name: rows.shape[1] for name, rows in found.items()}
    told = comm.all_gather_objects((widths, notes))
    widths = next(w for w, _ in told if w)  # some process may have no image
    for note in [note for _, notes in told for note in notes][:1]:
        comm.print_main(note)
    bounds = [min(len(chunks) * rank // world.size * batch_size, n)
              for rank in range(world.size + 1)]
    for name, width in widths.items():
        comm.broadcast_rows(found.setdefault(name, torch.empty(n, width)), bounds)
    return {name: found[name] for name in widths}


def check_finite(rows: Tensor, words: str, first: int = 0) -> None:
    """Stop at features (N, D) that are not finite; the rows begin with that of image `first`."""
    wrong = (~rows.isfinite()).any(1).nonzero()
    if len(wrong):
        raise RunError(f"the features {words} are not finite, first of image "
                       f"{first + wrong[0].item()}; no number can be made of them")


def effective_rank(x: Tensor) -> Tensor:
    """How many dimensions the rows (n, d) fill, from 1 to min(n, d); NaN if a row is not finite.

    exp of the entropy of the singular values, each divided by their sum.

    Reference: RankMe, Garrido et al., arXiv 2210.02885, equation 1 without its epsilon.
    """
    x = comm.upcast(x.detach())
    values = torch.linalg.svdvals(x.nan_to_num())
    shares = values / values.sum()
    rank = torch.special.entr(shares).sum().exp()
    return torch.where(x.isfinite().all(), rank, torch.nan)


def share_right(scores: Tensor, truth: Tensor, k: int) -> Tensor:
    """Whether the true class is among the k highest scores: 1 if it is, 0 if not.

    Where equal scores straddle the border, which of them are among the k is chance: then it is the
    chance of the true class, so that no order of classes, images or a sort decides.

    Args:
        scores: (..., C). A NaN is above all others and never right.
        truth: int64 (...), in [0, C).
        k: at most C.

    Returns:
        Float64 (...), in [0, 1].
    """
    score = scores.gather(-1, truth[..., None])
    above = scores.shape[-1] - (scores <= score).sum(-1)
    equal = (scores == score).sum(-1).clamp(min=1)
    return ((k - above).double() / equal).clamp(0, 1)


# -------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Split:
    """Features of one split, in data-set order, no image twice."""

    layers: dict[str, Tensor]  # float32 (N, D) on the CPU, by name
    labels: np.ndarray | None  # int64 (N,), or (N, C) where an image may have several
    index: np.ndarray  # int64 (N,), rising: which images of the data set


@dataclass(frozen=True)
class Features:
    """Features of both splits under one backbone; without a test split if `sources` allows it."""

    checkpoint: str
    protocol: str  # what the images were, in words
    train: Split
    test: Split | None


def write(features: Features, path: str, world: World) -> None:
    """Write features to a `.npz`: `train/<layer>`, `train/labels`, `train/index`, `test/...`.

    Raises:
        RunError: the file cannot be written.
    """
    if features.test is None or features.train.labels is None:
        raise RunError(f"--save-features {path}: the images have no labels, or no test split")
    arrays = {"checkpoint": np.array(features.checkpoint), "protocol": np.array(features.protocol)}
    for name, split in (("train", features.train), ("test", features.test)):
        arrays |= {f"{name}/{layer}": rows.numpy() for layer, rows in split.layers.items()}
        arrays |= {f"{name}/labels": split.labels, f"{name}/index": split.index}
    with comm.same_error_on_all_ranks(writing=path):
        if world.is_main:
            with atomic_write(path) as file:
                np.savez(file, **arrays)
    comm.print_main(f"features written to {path}")


def read(path: str, layers: list[str] | None = None) -> Features:
    """Read a file of `write`: all of its layers, or some.

    Raises:
        RunError: there is no such file or layer, it is another kind of file, or not finite.
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
