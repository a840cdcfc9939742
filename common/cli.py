"""The command line that all scripts share: run flags, recipes, checks.

Flags that change the learned weights are declared in the script. Here are only the flags that say
where data come from and how a run is carried out, and the parsing that lets a recipe set defaults.
"""

import argparse
import copy
import difflib
import math
import os
import re
import sys

from common import backbones, distributed as comm, images

# Settings that do not change what is computed beyond rounding: they may differ when a run resumes.
RUN_FLAGS = {
    "accum_steps", "amp", "compile", "data_root", "deterministic", "device", "download",
    "grad_checkpoint", "index", "keep_every", "log_every", "lr_divided", "output", "probe_data",
    "probe_every", "profile", "recipe", "resume", "save_every_minutes", "tensorboard", "workers",
}
Switch = argparse.BooleanOptionalAction  # --flag and --no-flag
MANY = 6  # choices that are listed once, in the help text


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, printed by one process.

    Its name, of a script, may be given as the path of the file.
    """

    def __init__(self, prog=None, description=None, **options):
        options = dict(formatter_class=HelpFormatter, allow_abbrev=False) | options
        super().__init__(prog and os.path.basename(prog), description=description, **options)

    def parse_known_args(self, args=None, namespace=None):
        comm.print_any_character()
        return super().parse_known_args(args, namespace)

    def error(self, message):
        for flag in re.findall(r"--[\w-]+", message.partition("unrecognized arguments: ")[2]):
            known = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            message += f"; {flag}: did you mean {known[0]}?" if known else ""
        if comm.prints():
            print(f"{self.prog}: error: {message} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)

    def exit(self, status=0, message=None):
        comm.end_output()  # --help | head
        super().exit(status, message)


class OneOrMore(argparse.Action):
    """A flag whose value is a string, or of several a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class HelpFormatter(argparse.HelpFormatter):
    """Keep the docstring as it is written, and show the default in force behind every help text."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)

    def _fill_text(self, text, width, indent):
        return text

    def _metavar_formatter(self, action, default_metavar):
        listed = action.choices is not None and len(action.choices) > MANY
        return (lambda size: (default_metavar,) * size) if listed else (
            super()._metavar_formatter(action, default_metavar))

    def _get_help_string(self, action):
        text = action.help.replace(" (default: %(default)s)", "")  # Python 3.10's own, for a Switch
        if action.choices is not None and len(action.choices) > MANY:
            text += f": {' '.join(action.choices)}"
        if action.default is None or action.default is argparse.SUPPRESS:
            return text
        shown = action.default
        if isinstance(shown, (list, tuple)):
            shown = " ".join(str(value) for value in shown)
        return f"{text} [{str(shown).replace('%', '%%')}]"


def parser(script: str, description: str) -> Parser:
    """Make a script's parser from its file name and docstring, with the shared flags."""
    made = Parser(script, description)
    data = made.add_argument_group("data")
    data.add_argument("--data", default="digits", metavar="SOURCE", nargs="+", action=OneOrMore,
                      help="digits (built in), cifar10 and other names of torchvision's sets, "
                      "fake (noise), a folder of images, a tar, a folder of tars, a text list or a "
                      ".npy (docs/guide.md); several are joined in this order")
    source_flags(data)
    run = made.add_argument_group("run (none of these changes the method; --amp its precision)")
    run.add_argument("--output", metavar="FOLDER", help="default: in runs/, named by "
                     "script, data, backbone and method")
    run_flags(run)
    run.add_argument("--keep-every", type=pos_int, metavar="EPOCHS",
                     help="keep backbone-epoch0010.pth and so on beside the newest")
    run.add_argument("--probe-every", type=pos_int, metavar="EPOCHS",
                     help="log the k-NN accuracy of eval_knn.py, from step 0 on; without labels "
                     "the effective rank of the features alone")
    run.add_argument("--probe-data", metavar="SOURCE",
                     help="labelled images to probe on; default: --data")
    run.add_argument("--tensorboard", action=Switch, default=False,
                     help="write the log's numbers to an event file as well")
    run.add_argument("--profile", type=pos_int, metavar="STEPS",
                     help="profile so many steps after five others, save and stop")
    run.add_argument("--workers", type=nonneg_int, metavar="N",
                     help="loader processes a training process; default: its share of cores")
    run.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="device")
    run.add_argument("--amp", choices=("auto", "bf16", "fp16", "none"), default="auto",
                     help="autocast precision; auto: bf16 on CUDA, none on CPU")
    run.add_argument("--compile", action=Switch, default=False,
                     help="compile the backbone (slow start, then faster on CUDA)")
    run.add_argument("--deterministic", action=Switch, default=False,
                     help="deterministic kernels on CUDA (slower)")
    return made


INDEX = "tar-index"  # the folder of tars' indexes, beside those of runs


def source_flags(group) -> None:
    """Where torchvision's data sets and the indexes of tars are, and how many images to take."""
    group.add_argument("--data-root", default="data", metavar="FOLDER",
                       help="folder of torchvision's data sets")
    group.add_argument("--download", action=Switch, default=False,
                       help="fetch a torchvision data set that is not there")
    group.add_argument("--index", metavar="FOLDER",
                       help=f"where indexes of tars are kept; default: {INDEX} beside --output, "
                       "or in runs/")
    group.add_argument("--limit", type=pos_int, metavar="N",
                       help="number of images (of each split), evenly spaced")


def sources(args: argparse.Namespace) -> dict:
    """What `images.open_images` needs to know of the flags that say how images are read."""
    beside = os.path.dirname(os.path.normpath(getattr(args, "output", None) or "runs/any"))
    return dict(root=args.data_root, download=args.download, limit=args.limit,
                index=args.index or os.path.join(beside, INDEX), bits=args.bits,
                exif_orientation=args.exif_orientation)


def test_flags(group) -> None:
    """Other test images, and fewer training images of every class."""
    group.add_argument("--test-data", metavar="SOURCE",
                       help="tested on instead of the test split: a folder of class folders named "
                       "as in training, or a list `path label`; --data may then be one as well")
    group.add_argument("--limit-per-class", type=pos_int, metavar="K",
                       help="number of training images of every class, evenly spaced")


def channel_flags(group) -> None:
    """The channels of images, how they are read, and how they are normalised."""
    group.add_argument("--in-chans", type=pos_int, help="channels of the images")
    group.add_argument("--bits", type=int, choices=(8, 16), help="bits a channel that are read of "
                       "PNG, TIFF and PGM files; with 8, deeper ones are refused")
    group.add_argument("--exif-orientation", action=Switch,
                       help="turn photographs upright as their EXIF tag says")
    group.add_argument("--mean", type=number, nargs="+", help="mean of each channel")
    group.add_argument("--std", type=positive, nargs="+", help="standard deviation of each channel")


def arch_flag(group, archs, name: str = "--arch") -> None:
    """The backbone, one of some names (`backbones.check_name`)."""
    def arch(text):
        try:
            return backbones.check_name(text, archs)
        except comm.RunError as error:
            raise argparse.ArgumentTypeError(error) from error

    group.add_argument(name, type=arch, help=f"backbone: {' '.join(archs)}")


def check_arch_flags(made: Parser, args: argparse.Namespace, argv) -> None:
    """Refuse flags that another library's trunk would ignore."""
    for flag, kind in (("--stem", "ResNets"), ("--patch-size", "our own transformers")):
        if ":" in (args.arch or "") and (value := peek(argv, flag, str)):
            made.error(f"{flag} {value} is for {kind}, and --arch is {args.arch}")


def run_flags(group) -> None:
    """The flags of a script that trains, saves and resumes."""
    group.add_argument("--resume", action=Switch, default=True,
                       help="resume from the checkpoint in the output folder, if any; "
                       "--no-resume starts anew and replaces what the folder holds")
    group.add_argument("--save-every-minutes", type=positive, default=15.0, metavar="M",
                       help="minutes between saves within an epoch; its end saves too")
    group.add_argument("--log-every", type=pos_int, default=20, metavar="STEPS",
                       help="steps between log lines")


def method_parser(script: str, description: str, archs, *, crops: str, batch_norm: bool = True,
                  decay: str = "weights"):
    """Make a method's parser with the flags of every method, and the group of the method's.

    Args:
        archs: names of the backbones that the method can train.
        crops: "one" kind of crop; "multi": groups of crops of several sizes.
        batch_norm: whether a backbone can have it, and so a stem.
        decay: what decays, for the help: "weights" (not biases and norms), "all" parameters, or
            "both": as the optimiser has it.
    """
    made = parser(script, description)
    group = made.add_argument_group("images")
    group.add_argument("--image-size", type=pos_int, help="side of a view in pixels" + (
        ": the first of --crop-sizes" if crops == "multi" else ""))
    channel_flags(group)
    made.set_defaults(bits=8, exif_orientation=False)
    if crops == "multi":
        group.add_argument("--num-crops", type=pos_int, nargs="+",
                           help="number of crops of each size, the global ones first")
        group.add_argument("--crop-sizes", type=pos_int, nargs="+", help="their sides in pixels")
        group.add_argument("--crop-scales", type=fraction, nargs="+",
                           help="smallest, largest area fraction for each size")
    else:
        group.add_argument("--crop-scale", type=fraction, nargs=2,
                           help="smallest, largest area fraction of a crop")
    group = made.add_argument_group("optimisation")
    group.add_argument("--init", metavar="WHAT",
                       help="run folder or weights file that the backbone starts from; the "
                       "recipe's learning rates are divided by 10, unless --lr is given")
    group.add_argument("--freeze-backbone-epochs", type=nonneg_int, metavar="E",
                       help="epochs that spare the backbone; default: 1 with --init, else 0")
    arch_flag(group, archs)
    if batch_norm:
        group.add_argument("--stem", choices=("imagenet", "small"),
                           help="stem of a ResNet; small: 3x3 stride 1, no pool")
        group.add_argument("--sync-bn", action=Switch, help="synchronised batch norm")
    length_flags(group, {"weights": " of weights, not of biases and norms",
                         "all": " of all parameters",
                         "both": " of weights; with adamw of biases and norms too"}[decay])
    return made, made.add_argument_group("method")


def length_flags(group, decayed: str = "") -> None:
    """How long and how fast to train; `decayed`: what decays, in words."""
    group.add_argument("--epochs", type=pos_int, help="passes over the images")
    group.add_argument("--batch-size", type=pos_int, help="global batch, over all processes")
    group.add_argument("--lr", type=positive, help="learning rate per 256 images")
    group.add_argument("--weight-decay", type=not_negative, help=f"weight decay{decayed}")
    group.add_argument("--warmup-epochs", type=nonneg_int, help="epochs of linear warm-up")
    group.add_argument("--seed", type=nonneg_int, default=0, help="random seed")


def source_name(data: str | list[str]) -> str:
    """What the images of `--data` are called in the names of folders."""
    first, *others = [data] if isinstance(data, str) else data
    name = os.path.basename(os.path.normpath(first))
    for ending in (".txt", ".npy", ".tar"):
        name = name.removesuffix(ending)
    return f"{name}-and-{len(others)}" if others else name


def as_given(data: str | list[str]) -> str:
    """The value of `--data` as one words it on the command line."""
    return data if isinstance(data, str) else " ".join(data)


def crops(args: argparse.Namespace) -> list[tuple[int, int, tuple[float, float]]]:
    """(count, side in pixels, (smallest, largest area fraction)) for each size of crop."""
    scales = zip(args.crop_scales[::2], args.crop_scales[1::2], strict=True)
    return list(zip(args.num_crops, args.crop_sizes, scales, strict=True))


def parse(made: Parser, recipes: dict, argv=None) -> argparse.Namespace:
    """Parse in two passes: the recipe's name first, then everything with the recipe's defaults.

    The recipe is `--recipe`, else the one named like a built-in `--data`, else `imagenet`. A flag
    on the command line always wins. Checks that hold for every script are made here.
    """
    made.add_argument_group("recipe").add_argument(
        "--recipe", choices=sorted(recipes), help="named defaults; default: the one named like "
        "a built-in --data, else imagenet")
    first = Parser(made.prog, add_help=False)
    first.add_argument("--recipe")
    first.add_argument("--data", default="digits", nargs="+", action=OneOrMore)
    chosen, _ = first.parse_known_args(argv)
    own = chosen.data in images.BUILT_IN and chosen.data in recipes  # no folder of that name
    name = chosen.recipe or (chosen.data if own else "imagenet")
    made.set_defaults(**copy.deepcopy(recipes.get(name, {})))
    args = made.parse_args(argv)
    args.recipe = name
    if args.output is None:
        parts = made.prog.removesuffix(".py"), source_name(args.data), args.arch.replace(":", "-")
        args.output = os.path.join("runs", "-".join(parts))
    check_arch_flags(made, args, argv)

    if "init" in args:
        args.lr_divided = args.init is not None and args.lr is made.get_default("lr")
        for rate in ("lr", "lr_biases", "start_lr", "final_lr") if args.lr_divided else ():
            if rate in args and getattr(args, rate) is made.get_default(rate):
                setattr(args, rate, getattr(args, rate) / 10)
        if args.freeze_backbone_epochs is None:
            args.freeze_backbone_epochs = int(args.init is not None)
        if args.freeze_backbone_epochs >= args.epochs:
            made.error(f"--freeze-backbone-epochs {args.freeze_backbone_epochs} (1 with --init) "
                       f"leaves nothing of --epochs {args.epochs}; pass more --epochs, or 0")
    check(made, args)
    return args


def check(made: Parser, args: argparse.Namespace) -> None:
    """Check what every script has that trains; the sides of `--crop-sizes` are set as well."""
    if getattr(args, "probe_data", None) and not args.probe_every:
        made.error(f"--probe-data {args.probe_data} is measured with --probe-every alone")
    if args.batch_size % processes():
        above = math.ceil(args.batch_size / processes()) * processes()
        made.error(f"--batch-size {args.batch_size} does not divide among {processes()} processes; "
                   f"try {above}")
    if args.warmup_epochs >= args.epochs:
        made.error(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}"
                   "; pass --warmup-epochs 0, or more --epochs")
    if "sync_bn" in args and args.batch_size < 2 * processes():
        made.error(f"--batch-size {args.batch_size} gives less than two images to each of "
                   f"{processes()} processes, too few for batch norm")
    if "crop_sizes" in args:
        check_crops(made, args)
    for flag in ("crop_scale", "jigsaw_crop_scale", "crop_scales"):
        values = getattr(args, flag, None) or ()
        for low, high in zip(values[::2], values[1::2], strict=True):
            if not 0 < low <= high:
                made.error(f"--{flag.replace('_', '-')} {low:g} {high:g} is not a range of area "
                           "fractions above 0")
    try:
        for flag in ("mean", "std"):
            values, usual = getattr(args, flag), made.get_default(flag)
            setattr(args, flag, per_channel(flag, values, args.in_chans, values is not usual))
    except comm.RunError as error:
        made.error(str(error))


def per_channel(flag: str, values: list[float], channels: int, given: bool) -> list[float]:
    """One mean or deviation a channel, or one for all; a default that does not fit is averaged.

    Raises:
        RunError: as many values were given as cannot fit.
    """
    if len(values) in (1, channels):
        return values
    if given:
        raise comm.RunError(f"--{flag} has {len(values)} values for --in-chans {channels}; give "
                            "one, or one a channel")
    return [sum(values) / len(values)]


def processes() -> int:
    """Number of processes started by torchrun."""
    return max(1, comm.env_int("WORLD_SIZE", 1))


def peek(argv, flag: str, kind=int):
    """The value of a flag, before other defaults that depend on it are known."""
    first = Parser(add_help=False)
    first.add_argument(flag, type=kind, dest="value")
    return first.parse_known_args(argv)[0].value


def check_crops(made: Parser, args: argparse.Namespace) -> None:
    """Check the flags of a script with crops of several sizes, and set the size of the global ones.

    `--num-crops`, `--crop-sizes` and `--crop-scales` describe the same groups of crops; the global
    crops, the first group, are at least two; the evaluations use their size, `--image-size`.
    """
    groups = len(args.num_crops)
    if len(args.crop_sizes) != groups or len(args.crop_scales) != 2 * groups:
        made.error(f"--num-crops has {groups} values, --crop-sizes {len(args.crop_sizes)} and "
                   f"--crop-scales {len(args.crop_scales)}; give one, one and two for each size")
    if args.num_crops[0] < 2:
        made.error(f"--num-crops {args.num_crops[0]}: the first size needs at least two crops")
    if args.image_size is None:
        args.image_size = args.crop_sizes[0]
    elif args.crop_sizes is made.get_default("crop_sizes"):
        args.crop_sizes = [args.image_size, *args.crop_sizes[1:]]
    if args.image_size != args.crop_sizes[0]:
        made.error(f"--image-size {args.image_size} is not the first of --crop-sizes "
                   f"{args.crop_sizes[0]}; give --crop-sizes alone")


def check_patches(made: Parser, args: argparse.Namespace) -> None:
    """Refuse images that do not divide into the patches of a transformer."""
    sizes = getattr(args, "crop_sizes", None) or [args.image_size]
    if args.arch in backbones.VITS and any(size % args.patch_size for size in sizes):
        told = f"--image-size {args.image_size} is not a multiple"
        if "crop_sizes" in args:
            told = f"--crop-sizes {' '.join(map(str, sizes))} are not all multiples"
        made.error(f"{told} of --patch-size {args.patch_size}")


def settings(args: argparse.Namespace) -> dict:
    """The settings that change the learned weights, by name: what a resumed run must repeat."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in RUN_FLAGS}


# ------------------------------------------------------------------ types for argparse, with limits


def _number(kind, accept, wanted):
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return convert


nonneg_int = _number(int, lambda v: 0 <= v < 2**63, "a whole number of at least 0")
pos_int = _number(int, lambda v: v >= 1, "a whole number of at least 1")
two_or_more = _number(int, lambda v: v >= 2, "a whole number of at least 2")
positive = _number(float, lambda v: 0 < v < math.inf, "a number above 0")
not_negative = _number(float, lambda v: 0 <= v < math.inf, "a number of at least 0")
fraction = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
share = _number(float, lambda v: 0 < v <= 1, "a number above 0, at most 1")
number = _number(float, math.isfinite, "a number")
