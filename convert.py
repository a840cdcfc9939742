"""Take a backbone away: from a run or a released checkpoint to torchvision, timm or detectron2.

The source is a run folder, a `backbone.pth`, or a file in any layout that the evaluations read
(README); every tensor of the backbone must be there. Heads stay behind. What is written:

- torchvision: a state dict of a ResNet; `load_state_dict(..., strict=False)` misses `fc.*` alone.
- timm: a state dict of a ResNet or a vision transformer; strict with `num_classes=0`, and with the
  options that are printed.
- detectron2: a `.pkl` of a ResNet for `MODEL.WEIGHTS`, in detectron2's names; the settings that go
  with it are printed, since detectron2's defaults (BGR, other means) are those of other weights.

    python convert.py runs/simclr --to torchvision simclr-resnet50.pth
    python convert.py runs/simclr --to detectron2 simclr-resnet50.pkl
    python convert.py dino_deitsmall16_pretrain.pth --arch vit_small --to timm dino-vit-small.pth
"""

import math
import os
import pickle
import re
import sys

import numpy as np
import torch
from torch import Tensor, nn

from common import backbones, checkpoint, cli, distributed as comm, features, weights

DETECTRON2_NAMES = (  # what stands in torchvision's names, and in detectron2's
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer1\.", "res2."), (r"^layer2\.", "res3."), (r"^layer3\.", "res4."),
    (r"^layer4\.", "res5."),
    (r"\.downsample\.0\.", ".shortcut."), (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
)


def parse_args(argv=None):
    parser = cli.Parser("convert.py", __doc__)
    parser.add_argument("source", help="run folder or weights file")
    parser.add_argument("--to", choices=("torchvision", "timm", "detectron2"), required=True,
                        help="whose names to write")
    parser.add_argument("out", help="file to write; .pkl for detectron2")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    group = parser.add_argument_group("backbone (default: the run's, else resnet50 of 224 px)")
    features.backbone_flags(group)
    group.add_argument("--in-chans", type=cli.pos_int, help="channels of the images")
    group.add_argument("--image-size", type=cli.pos_int, help="side in pixels, of a transformer's")
    parser.set_defaults(data=None, mean=None, std=None)
    args = parser.parse_args(argv)
    if args.out.endswith(".pkl") != (args.to == "detectron2"):
        ending = "must end" if args.to == "detectron2" else "must not end"
        parser.error(f"{args.out}: a file for {args.to} {ending} with .pkl")
    return args


def to_detectron2(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Give a ResNet's state dict detectron2's names; counters of batches are left out."""
    renamed = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in DETECTRON2_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value.contiguous().numpy()
    return renamed


def fold_class_position(state: dict[str, Tensor], backbone: nn.Module) -> None:
    """Add the class token's position to the token: timm has none for it beside registers."""
    first = state["pos_embed"].shape[1] - math.prod(backbone.grid)
    if first:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :first]
        state["pos_embed"] = state["pos_embed"][:, first:]


def advice(to: str, settings: dict, backbone: nn.Module) -> list[str]:
    """What to do with the file, and what it needs beside itself."""
    mean, std = (list(settings[name]) * (settings["in_chans"] if len(settings[name]) == 1 else 1)
                 for name in ("mean", "std"))
    if to == "detectron2":
        depth = re.sub(r"\D*(\d+).*", r"\1", settings["arch"])
        return [
            f"MODEL.PIXEL_MEAN {[round(255 * m, 3) for m in mean]}",
            f"MODEL.PIXEL_STD {[round(255 * s, 3) for s in std]}",
            f'INPUT.FORMAT "RGB", MODEL.RESNETS.DEPTH {depth}, MODEL.RESNETS.STRIDE_IN_1X1 False',
            *(["MODEL.RESNETS.RES2_OUT_CHANNELS 64"] if depth in ("18", "34") else []),
        ]
    lines = [f"images in [0, 1], minus {mean}, divided by {std}"]
    if settings["arch"] in backbones.RESNETS and settings["stem"].endswith("-sobel"):
        lines.append("conv1 takes the two Sobel maps of backbones.SobelConv2d: change the model's")
    if settings["arch"] in backbones.RESNETS and not settings["stem"].startswith("imagenet"):
        kernel, stride, padding = backbones.STEMS[settings["stem"]]
        lines.append(f"conv1 is {kernel}x{kernel} with stride {stride} and padding {padding}, and "
                     "there is no max-pool: change the model's")
    if settings["arch"] in backbones.VITS:
        relative, scaled = backbone.pos_embed is None, hasattr(backbone.blocks[0].ls1, "gamma")
        height, width = (side * backbone.patch_size for side in backbone.grid)
        options = [f"img_size=({height}, {width})", f"patch_size={backbone.patch_size}"]
        options += ["num_heads=12"] * (settings["arch"] == "vit_small_12heads")
        if relative:
            options += ["class_token=True", "shared_rel_pos=True", "rel_pos_type='bias'",
                        "global_pool='token'"]
        if backbone.cls_token is None:
            options += ["class_token=False", "global_pool='avg'", "fc_norm=False"]
        if backbone.reg_token is not None:
            options += [f"reg_tokens={backbone.reg_token.shape[1]}", "no_embed_class=True"]
        if relative or scaled:
            options.append(f"init_values={1.0 if scaled else None}")
        lines.append(f"timm's VisionTransformer{'RelPos' * relative}: {', '.join(options)}")
    if settings["in_chans"] != 3:
        lines.append(f"the first layer takes {settings['in_chans']} channels: change the model's")
    return lines


def main(args):
    source = features.resolve_checkpoint(args.source, "SOURCE", baselines=())
    args.data = source.settings.get("data", "folder")  # what is not described is as for photos
    settings = features.evaluation_settings(args, [source])
    arch = settings["arch"]
    only = "timm" if arch in backbones.VITS else arch.partition(":")[0] if ":" in arch else args.to
    if args.to != only:
        raise comm.RunError(f"{arch} goes --to {only} only: {args.to} has no model in its layout")
    if arch in backbones.SMALL:
        raise comm.RunError(f"{arch} does not go to {args.to}, which has no such model; take "
                            "common/backbones.py along, which builds it, or train a resnet18")
    plain = re.fullmatch(r"resnet(18|34|50|101|152)", arch)
    if args.to == "detectron2" and (not plain or settings["stem"] != "imagenet"):
        raise comm.RunError(f"{arch} with the {settings['stem']} stem does not go to detectron2: "
                            "resnet18 to resnet152 with the ImageNet stem do")
    if os.path.exists(args.out) and not args.overwrite:
        raise comm.RunError(f"{args.out} is there already; give another name or --overwrite")

    size = source.settings.get("image_size", settings["image_size"])
    backbone = features.build(settings | {"trained_size": size})
    weights.load_backbone(backbone, source.weights)
    # What is assumed is no fact about the weights: the file does not say it.
    known = {name: settings[name] for name in ("arch", "in_chans")}
    if arch in backbones.VITS:
        known["patch_size"] = settings["patch_size"]
    known |= {name: value for name, value in vars(args).items() if value is not None}
    state = backbone.state_dict()
    if args.to == "timm" and getattr(backbone, "reg_token", None) is not None:
        fold_class_position(state, backbone)
    state = checkpoint.described(state, known | source.settings)

    out = args.out
    with comm.same_error_on_all_ranks(writing=out), checkpoint.atomic_write(out) as file:
        if args.to == "detectron2":
            pickle.dump({"model": to_detectron2(state), "__author__": "converted by convert.py",
                         "matching_heuristics": True}, file)
        else:
            torch.save(state, file)
    comm.print_main("\n  ".join([
        f"{args.out}: {arch} for {args.to}", *advice(args.to, settings, backbone),
        *filter(None, [features.assumed(source, settings)])]))


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
