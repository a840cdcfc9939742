"""Small tools around runs: sizes of backbones, weights to publish, bug reports.

count: parameters, multiplications and activations of a backbone, part by part, for one image.
publish: a run's backbone as NAME-HASH.pth, which torch.hub downloads and checks.
env: what a bug report needs to say of machine and versions, in one block.

    python tools.py count resnet50
    python tools.py publish runs/simclr-digits-resnet_tiny --half
    python tools.py env
"""

import collections
import functools
import hashlib
import importlib.metadata
import io
import math
import os
import platform
import sys

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from common import backbones, checkpoint, cli, distributed as comm, features, weights


def parse_args(argv=None):
    parser = cli.Parser(prog="tools.py", description=__doc__, formatter_class=cli.HelpFormatter,
                        allow_abbrev=False)
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    add = functools.partial(tools.add_parser, allow_abbrev=False,
                            formatter_class=cli.HelpFormatter)
    count = add("count", help="parameters, multiplications and activations of a backbone")
    count.add_argument("arch", help=f"backbone: {' '.join(backbones.NAMES)}")
    count.add_argument("--image-size", type=cli.pos_int, default=224, help="side in pixels")
    count.add_argument("--in-chans", type=cli.pos_int, default=3, help="channels of the images")
    count.add_argument("--stem", choices=tuple(backbones.STEMS), default="imagenet",
                       help="stem of a ResNet")
    count.add_argument("--patch-size", type=cli.pos_int, default=16,
                       help="side of a transformer's patches")
    count.add_argument("--num-classes", type=cli.pos_int, default=1000,
                       help="outputs of the linear classifier that is counted as well")
    publish = add("publish", help="a run's backbone as NAME-HASH.pth for torch.hub")
    publish.add_argument("run", help="run folder or its backbone.pth")
    publish.add_argument("--name", help="default: the run folder's")
    publish.add_argument("--half", action="store_true", help="halve the file: float16")
    publish.add_argument("--output", default=".", metavar="FOLDER", help="where to write")
    add("env", help="machine and versions for a bug report")
    args = parser.parse_args(argv)
    if args.tool == "count":
        try:
            backbones.check_name(args.arch)
        except comm.RunError as error:
            parser.error(str(error))
        if args.arch in backbones.VITS and args.image_size % args.patch_size:
            parser.error(f"--image-size {args.image_size} is not a multiple of --patch-size "
                         f"{args.patch_size}")
    return args


# -------------------------------------------------------------------------------------------- count


def count_parts(model: nn.Module, image: torch.Tensor) -> dict[str, list[int]]:
    """Count parameters, multiply-adds and activations of a model's parts, by name; "" is the whole.

    Multiply-adds are those of convolutions and matrix products, half of what torch's counter calls
    floating-point operations. Activations are the numbers that come out of them, attention's too.

    Args:
        image: (1, C, H, W), on the model's device, which may be "meta".
    """
    def numbers_out(*_, out_shape, **__):
        return math.prod(out_shape)

    counters = [FlopCounterMode(display=False),
                FlopCounterMode(display=False,
                                custom_mapping=dict.fromkeys(flop_registry, numbers_out))]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # attention as the products that it is
        for counter in counters:
            with counter:
                model(image)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    table = {}
    for part in (*dict.fromkeys(name.partition(".")[0] for name in sizes), ""):
        row = [sum(n for name, n in sizes.items() if part in ("", name.partition(".")[0]))]
        for counter in counters:
            counts = {name.partition(".")[2]: sum(by_operator.values())
                      for name, by_operator in counter.get_flop_counts().items()}
            blocks = [n for name, n in counts.items() if name.rpartition(".")[0] == part]
            row.append(counts[part] if part in counts else sum(blocks))  # a list is never called
        table[part] = [row[0], row[1] // 2, row[2]]
    return table


def count(args) -> None:
    size, classes = args.image_size, args.num_classes
    model = backbones.build_backbone(
        args.arch, in_chans=args.in_chans, image_size=size, stem=args.stem,
        patch_size=args.patch_size, positions="sincos", zero_init_residual=False, drop_path=0.0)
    image = torch.empty(1, args.in_chans, size, size, device="meta")  # counted, not computed
    table = count_parts(model.to("meta").eval(), image)
    whole, width = table.pop(""), model.num_features
    linear = [(width + 1) * classes, width * classes, classes]
    table |= {"backbone": whole, f"classifier of {classes}": linear,
              "both": [a + b for a, b in zip(whole, linear, strict=True)]}
    comm.print_main(f"{args.arch} on one image of {args.in_chans} x {size} x {size}, in millions")
    features.print_table(["part", "parameters", "multiply-adds", "activations"], [
        [part, *(f"{number / 1e6:,.3f}" for number in row)] for part, row in table.items()])


# ------------------------------------------------------------------------------------------ publish


def publish(args) -> None:
    """Write a backbone on the CPU; its name ends in the first 8 digits of the file's SHA-256."""
    source = features.resolve_checkpoint(args.run, "RUN")
    if source.weights is None:
        raise comm.RunError(f"{args.run} has no weights to publish; give a run folder")
    loaded = weights.load_tensors(source.weights)
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise comm.RunError(f"{source.weights} is no backbone.pth: {name} is no tensor; "
                                "convert.py makes one of released weights")
    state = checkpoint.described(loaded, source.settings)
    for name, value in state.items():
        halved = args.half and value.is_floating_point()
        state[name] = value.half() if halved else value.clone()  # a part's storage is the whole's
        if not state[name].isfinite().all():
            why = ", being beyond 65504; leave out --half" if value.isfinite().all() else ""
            raise comm.RunError(f"{source.weights}: {name} is not finite{why}")
    content = io.BytesIO()
    torch.save(state, content)
    folder = args.run if os.path.isdir(args.run) else os.path.dirname(source.weights)
    name = args.name or os.path.basename(os.path.abspath(folder))
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    path = os.path.join(args.output, f"{name}-{digest[:8]}.pth")
    with comm.same_error_on_all_ranks(writing=args.output):
        os.makedirs(args.output, exist_ok=True)
        with checkpoint.atomic_write(path) as file:
            file.write(content.getvalue())
    comm.print_main(f"{path}: {len(content.getvalue()):,} bytes, {len(state)} tensors"
                    f"{' in float16' if args.half else ''}, SHA-256 {digest}")


# ---------------------------------------------------------------------------------------------- env

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-learn", "faiss-cpu", "timm",
            "matplotlib", "tensorboard")
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE",
             "LOCAL_WORLD_SIZE", "SLURM_JOB_NUM_NODES")


def environment() -> dict[str, str]:
    """What a bug report needs to say of machine and versions."""
    def version(package):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} none"

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    cards = collections.Counter(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "commit": checkpoint.git_commit() or "outside of a checkout",
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "packages": ", ".join(map(version, PACKAGES)),
        "CUDA": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
                f"NCCL {'.'.join(map(str, torch.cuda.nccl.version())) if gpus else None}",
        "GPUs": ", ".join(f"{number} x {card}" for card, number in cards.items()) or "none",
        "CPU": f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads of torch",
        "/dev/shm": f"{comm.free_bytes('/dev/shm') / 2**30:.1f} GiB free",
        "variables": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES
                               if name in os.environ) or "none set",
    }


def env(args) -> None:
    found = environment()
    comm.print_main("\n".join(f"{name + ':':<11}{value}" for name, value in found.items()))


# --------------------------------------------------------------------------------------------- main


def main(args):
    {"count": count, "publish": publish, "env": env}[args.tool](args)


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
