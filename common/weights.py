"""Weights files: foreign layouts, safetensors and pickles, read without running code in them.

`load_backbone` loads any of `LAYOUTS` into a backbone, every tensor or none; `load_tensors` reads
a file as it is; `fingerprint` tells whether weights have changed.
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import zipfile

import numpy as np
import torch
from torch import Tensor, nn

from common import backbones, distributed as comm
from common.distributed import RunError

# Released files: a description; the keys that lead to the state dict; the prefix of the backbone's
# tensors; other tensors behind that prefix (heads). The first layout that fits counts, so a teacher
# comes before its student. WRAPPERS are removed from names first, wherever they occur.
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
    ("DINO, teacher", "teacher", r"backbone\.", r"mask_token$"),
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
    ("plain state dict", "", "", r"projection_head\.|prototypes|(fc|head)\.|mask_token$"),
)
# Other names of the same tensors: torchvision's ResNet as a Sequential (lightly), DINOv2's
# registers and blocks in chunks, OpenMMLab's transformer, and the last norm of a transformer
# fine-tuned with pooled patches.
RENAMED = (
    (r"0\.", "conv1."), (r"1\.", "bn1."), (r"4\.", "layer1."), (r"5\.", "layer2."),
    (r"6\.", "layer3."), (r"7\.", "layer4."),
    (r"register_tokens$", "reg_token"), (r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"patch_embed\.projection\.", "patch_embed.proj."), (r"(ln1|fc_norm)\.", "norm."),
    (r"layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
    (r"layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
)
PARTS = re.compile(r"^reg_token$|\.ls[12]\.gamma$")  # what `fit_transformer` adds


def load_backbone(backbone: nn.Module, path: str) -> None:
    """Load a weights file of any of `LAYOUTS`; print which one, and what was ignored.

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
    layout, found, ignored = detect_layout(loaded, wanted, path,
                                           getattr(backbone, "classifier_names", ()))
    if isinstance(backbone, backbones.VisionTransformer):
        small = backbone.num_features == 384
        if layout == "MoCo v3" and small and backbone.blocks[0].attn.num_heads != 12:
            raise RunError(f"{path} (MoCo v3) has 12 attention heads: --arch vit_small_12heads")
        fit_transformer(backbone, found)
        said = getattr(loaded, "_metadata", {}).get("settings")
        ours = isinstance(said, dict) and "mean" in said  # which no converted foreign file says
        backbone.antialias = backbone.reg_token is not None and not ours
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
    wanted.update((key, found[key]) for key in wanted)  # which keeps the versions of modules
    backbone.load_state_dict(wanted)
    comm.print_main(f"{path}: {layout}, {len(wanted)} of {len(wanted)} tensors of the backbone "
                    f"loaded{', left out: ' if ignored else ''}{' '.join(ignored)}")


def fit_transformer(backbone: nn.Module, found: dict) -> None:
    """Give a transformer the parts and positions that the tensors of a file are for.

    Layer scales; registers; relative positions; no class token, or one without a position;
    positions of another image size, which the backbone interpolates itself.
    """
    dim, current = backbone.num_features, backbone.pos_embed
    table, registers = (found.get(name) for name in ("pos_embed", "reg_token"))
    if "blocks.0.ls1.gamma" in found:
        for block in backbone.blocks:
            block.ls1, block.ls2 = (backbones.LayerScale(dim, 1.0) for _ in range(2))
    if getattr(registers, "ndim", 0) == 3:
        backbone.reg_token = nn.Parameter(torch.zeros(1, registers.shape[1], dim))
    if "shared_rel_pos.relative_position_bias_table" in found:
        heads = backbone.blocks[0].attn.num_heads
        backbone.shared_rel_pos = backbones.RelativePositions(heads, backbone.grid)
        backbone.pos_embed = None
        return
    if current is None:
        backbone.shared_rel_pos, current = None, nn.Parameter(torch.zeros(1, 0, dim))
        backbone.pos_embed = current
    if getattr(table, "ndim", 0) != 3 or table.shape[::2] != current.shape[::2]:
        return
    firsts = (1, 0) if "cls_token" in found else (0,)  # rows before those of the patches
    squares = [(math.isqrt(max(0, table.shape[1] - first)),) * 2 for first in firsts]
    for grid, first in zip((*[backbone.grid] * len(firsts), *squares), firsts * 2, strict=True):
        if table.shape[1] - first == math.prod(grid) > 0:
            backbone.grid = grid
            if table.shape != current.shape:
                backbone.pos_embed = nn.Parameter(torch.zeros_like(table), current.requires_grad)
            if "cls_token" not in found:
                backbone.cls_token = None
            return


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
        raise RunError(f"{path} is not a state dict: it holds a {type(loaded).__name__}")
    return loaded


class Inert:
    """Placeholder for an object that is not needed; it ignores all that it is given."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


# The log in a checkpoint of OpenMMLab's engine: the class that is refused first, and what else it
# asks for. None of it is imported or run: `Inert` replaces each.
LOGGED = "mmengine.logging.history_buffer.HistoryBuffer"
IN_A_LOG = (LOGGED, "builtins.getattr", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct")


def read_pickled(path: str):
    """Read a file of `torch.save` without running any code in it."""
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
        content, dtype = torch.from_numpy(data[first:last].copy()), SAFETENSORS[part["dtype"]]
        values = content.view(dtype) if len(content) else content.to(dtype)
        found[name] = values.reshape(part["shape"])
    return found


NOT_WEIGHTS = (  # first bytes of files that are often mistaken for weights, and what they are
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


def detect_layout(loaded: dict, wanted: dict, path: str, classifiers: tuple[str, ...] = ()
                  ) -> tuple[str, dict, list[str]]:
    """Find the layout of a file by its keys: words, tensors under our names, and what is left out.

    Heads are left out: those of the layout, and layers that are named in `classifiers`.

    Raises:
        RunError: no layout has a tensor of the backbone.
    """
    best, most = None, 0
    for words, container, prefix, heads in LAYOUTS:
        inner, beside = loaded, []
        for name in filter(None, container.split(".")):
            beside += [str(key) for key in inner if key != name]
            inner = inner[name] if isinstance(inner.get(name), dict) else {}
        found, ignored = {}, []
        for key, value in inner.items():
            plain = WRAPPERS.sub("", str(key))
            start = re.match(prefix, plain) if isinstance(key, str) else None
            name = rename_key(plain[start.end() :], wanted) if start else None
            layer = name and name.rpartition(".")[0]
            if name is None or name not in wanted and (
                    layer in classifiers or heads and re.match(heads, name)):
                ignored.append(str(key))
            elif name in found:
                raise RunError(f"{path} ({words}) has two tensors {name}")
            else:
                found[name] = value
        if any(re.search(r"\bfc_norm\.", key) for key in map(str, inner)):
            words += ", fc_norm taken for norm"
        share = len(found.keys() & wanted.keys()) / len(wanted)
        if share > most:
            best, most = (words, found, [*abbreviate(ignored), *sorted(beside)]), share
        if share > 0.5:
            break
    if best is None:
        keys = [str(key) for key in loaded]
        if isinstance(loaded.get("state_dict"), dict):
            keys = [f"state_dict.{key}" for key in loaded["state_dict"]]
        if any(re.match(r"(state_dict\.)?features\.", WRAPPERS.sub("", key)) for key in keys):
            raise RunError(f"{path} is an AlexNet or a VGG, which are not among the backbones")
        raise RunError(f"{path} is in no known layout, or of another --arch: it holds "
                       f"{' '.join(keys[:4]) or 'nothing'}")
    return best


def rename_key(name: str, wanted: dict) -> str:
    """A tensor's name as our backbones have it."""
    if name in wanted:
        return name
    for pattern, ours in RENAMED:
        renamed, times = re.subn(f"^{pattern}", ours, name)
        if times and (renamed in wanted or PARTS.search(renamed) and "pos_embed" in wanted):
            return renamed
    return name


def abbreviate(keys: list[str]) -> list[str]:
    """Name keys, or where more than four begin alike, their beginning and number."""
    groups = {}
    for key in keys:
        start = re.match(rf"({WRAPPERS.pattern})?[^.]*", key)[0]
        groups.setdefault(start, []).append(key)
    return [text for start, group in groups.items()
            for text in (group if len(group) <= 4 else [f"{start}.* ({len(group)})"])]


def fingerprint(module: nn.Module | None) -> str | None:
    """Twelve hexadecimal digits of all parameters and buffers, bit for bit; None without any."""
    state = module.state_dict() if module is not None else {}
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12] if state else None
