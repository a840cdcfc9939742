"""Pictures of what the methods do, one PNG each.

views: some images, and beside each the views that a script trains on, exactly as its loader gives
them (any flag of the script may follow).
masks: the same, with the patches that are masked in gray.
neighbours: some test images, and beside each the training images that are nearest by cosine, with a
bar in green under those of its class (any flag of the evaluations that says which images, backbone
and layer may follow, here as below).
embedding: test images as points in the plane, by t-SNE, coloured by class; a panel for every
checkpoint (needs matplotlib).
attention: what the class token of a vision transformer looks at, head by head, in its last block.
patches: a transformer's patch tokens as colours, by the three principal components of those of all
images shown: what has one colour is alike to the network.
reconstruction: images, what a masked autoencoder sees of them, and what it makes of that; where it
was trained on normalised patches, each patch gets its true mean and variance back.
curves: the numbers in the logs of runs, finished or not, one panel each (needs matplotlib).

    python visualize.py views simclr --image views.png
    python visualize.py views npid_pirl --image jigsaw.png --method pirl
    python visualize.py masks dinov2 --image masks.png
    python visualize.py neighbours --checkpoint runs/simclr-digits-resnet_tiny --image near.png
    python visualize.py embedding --checkpoint pixels runs/simclr-digits-resnet_tiny --image map.png
    python visualize.py attention --checkpoint runs/dinov2-digits-vit_micro --image attention.png
    python visualize.py patches --checkpoint runs/dinov2-digits-vit_micro --image patches.png
    python visualize.py reconstruction --checkpoint runs/mae-digits-vit_micro --image mae.png
    python visualize.py curves runs/simclr runs/moco --image curves.png
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import sys

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common import augment, backbones, checkpoint, cli, distributed as comm, features, labelled
from common.images import evenly, open_images
from common.knn import nearest
from common.loader import Loader
from common.weights import load_backbone

TILE = 96  # smallest side of an image in a picture, in pixels
GAP = 4
GRAY, GREEN, RED = (128, 128, 128), (44, 160, 44), (214, 39, 40)
WORLD = comm.World(0, 1, torch.device("cpu"))


def parse_args(argv=None):
    parser = cli.Parser("visualize.py", __doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, what, scripts in (("views", "the views of a script", "simclr, moco, ..."),
                                ("masks", "the views that a script masks, masked",
                                 "cae, dinov2, ijepa or simmim")):
        views = kinds.add_parser(name, help=f"{what}; its flags may follow", epilog="Any flag of "
                                 "the script may follow, such as --data FOLDER --recipe cifar10.")
        views.add_argument("script", help=scripts)
    for name, what in (("neighbours", "test images and their nearest training images"),
                       ("embedding", "test images as points, by t-SNE")):
        kinds.add_parser(name, help=f"{what}; flags of the evaluations follow", epilog="And the "
                         "flags of eval_knn.py: --checkpoint, --data, --layers, --limit, ...")
    kinds.choices["neighbours"].add_argument("--columns", type=cli.pos_int, default=8,
                                             help="number of neighbours")
    kinds.choices["embedding"].add_argument("--points", type=cli.two_or_more, default=2000,
                                            help="most images to draw, evenly spaced")
    for name in ("attention", "reconstruction", "patches"):
        kind = kinds.add_parser(name, help=f"{name} of a trained run")
        kind.add_argument("--checkpoint", required=True, metavar="RUN",
                          help="run folder; its backbone.pth, except for reconstruction")
        kind.add_argument("--data", help="default: as the run")
        kind.add_argument("--data-root", default="data", metavar="FOLDER",
                          help="folder of torchvision's data sets")
    kinds.choices["patches"].add_argument(
        "--image-size", type=cli.pos_int, help="side in pixels, for more patches than in training")
    for name in kinds.choices.keys() - {"embedding"}:
        kinds.choices[name].add_argument("--rows", type=cli.pos_int, default=6,
                                         help="number of images")
    curves = kinds.add_parser("curves", help="the logged numbers of one or several runs")
    curves.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    for kind in kinds.choices.values():
        kind.add_argument("--image", required=True, metavar="PNG", help="the picture to write")
    args, others = parser.parse_known_args(argv)
    if args.kind in ("neighbours", "embedding"):
        evaluation = features.parser("visualize.py", __doc__)
        evaluation.prog = f"visualize.py {args.kind}"
        args.given = features.parse(evaluation, others)
        if args.given.features:
            evaluation.error(f"--features {args.given.features[0]} has no images; --checkpoint")
        if args.given.save_features:
            evaluation.error(f"--save-features {args.given.save_features} goes with evaluations")
        if args.kind == "neighbours" and len(args.given.checkpoint) > 1:
            evaluation.error(f"--checkpoint {' '.join(args.given.checkpoint)}: give one")
        if len(args.given.layers or ()) > 1:
            evaluation.error(f"--layers {' '.join(args.given.layers)}: give one")
    elif others and args.kind not in ("views", "masks"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if os.path.isdir(args.image) or not os.path.isdir(os.path.dirname(args.image) or "."):
        parser.error(f"--image {args.image}: give a PNG file in a folder that is there")
    args.flags = others
    return args


# ----------------------------------------------------------------------------------------- pictures


def to_pixels(images: Tensor, mean, std) -> np.ndarray:
    """Undo a normalisation: images (n, C, H, W) to uint8 (n, H, W, 3); C other than 3 as gray."""
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(x, dtype=images.dtype).view(shape) for x in (mean, std))
    images = (images.cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    if images.shape[1] != 3:
        images = images.float().mean(1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def enlarge(pixels: np.ndarray, side: int) -> Image.Image:
    """One image (H, W, 3) with a long side of `side` pixels or more, its pixels left square."""
    factor = max(1, round(side / max(pixels.shape[:2])))
    return Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))


def grid(rows: list[list[np.ndarray]]) -> Image.Image:
    """A picture of rows of uint8 images (H, W, 3) of any sizes, on white."""
    tiles = [[enlarge(pixels, TILE) for pixels in row] for row in rows]
    widths = [max(tile.width for tile in column) for column in zip(*tiles, strict=True)]
    heights = [max(tile.height for tile in row) for row in tiles]
    size = (sum(widths) + GAP * (len(widths) + 1), sum(heights) + GAP * (len(heights) + 1))
    picture = Image.new("RGB", size, "white")
    top = GAP
    for row, height in zip(tiles, heights, strict=True):
        left = GAP
        for tile, width in zip(row, widths, strict=True):
            picture.paste(tile, (left, top))
            left += width + GAP
        top += height + GAP
    return picture


def at_height(image: Image.Image, height: int) -> np.ndarray:
    """An image at a height in pixels, its aspect kept; enlarged by a whole number, its pixels."""
    whole = height % image.height == 0
    size = (max(1, round(image.width * height / image.height)), height)
    return np.asarray(image.resize(size, Image.Resampling.NEAREST if whole else
                                   Image.Resampling.LANCZOS))


def as_seen(images, index: int) -> Image.Image:
    """An image of a source in RGB; the mean of many channels as gray."""
    planes = images.read(index)
    pixels = np.dstack([np.asarray(plane) for plane in planes])  # (H, W, C)
    if planes[0].mode == "F":  # 16 bits
        pixels = pixels / 257
    if pixels.shape[2] != 3:
        pixels = pixels.mean(2, keepdims=True).repeat(3, axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def with_legend(picture: Image.Image, meanings: dict) -> Image.Image:
    """A picture with a line below it that says what colours mean, {words: colour}."""
    font = ImageFont.load_default(14)
    ends = np.cumsum([math.ceil(font.getlength(words)) + 22 + 5 * GAP for words in meanings])
    size = (max(picture.width, int(ends[-1])), picture.height + 14 + 2 * GAP)
    made = Image.new("RGB", size, "white")
    made.paste(picture, (0, 0))
    draw, top = ImageDraw.Draw(made), picture.height + GAP
    for left, (words, colour) in zip((0, *ends.tolist()), meanings.items(), strict=False):
        draw.rectangle((left + GAP, top, left + GAP + 14, top + 14), fill=colour)
        draw.text((left + 22 + GAP, top + 7), words, fill="black", font=font, anchor="lm")
    return made


def joined(patches: np.ndarray) -> np.ndarray:
    """Nine patches (9, H, W, 3) as one image, with white lines between them."""
    tiles = torch.from_numpy(patches).permute(0, 3, 1, 2)
    framed = torchvision.utils.make_grid(tiles, nrow=3, padding=1, pad_value=255)
    return framed[:, 1:-1, 1:-1].permute(1, 2, 0).numpy()


# -------------------------------------------------------------------------------------------- views


def method(name: str):
    """The module of a method script."""
    try:
        module = importlib.import_module(os.path.basename(name).removesuffix(".py"))
        module.build_views  # noqa: B018  a method script has it
    except (ImportError, AttributeError, ValueError):
        raise comm.RunError(f"{name} is not a method script; try simclr") from None
    return module


def masked(pixels: np.ndarray, visible: Tensor) -> np.ndarray:
    """Images (n, H, W, 3), gray where a patch of theirs (n, rows, columns) is not visible."""
    seen = visible.numpy()
    for axis in (1, 2):
        seen = seen.repeat(pixels.shape[axis] // seen.shape[axis], axis)
    return np.where(seen[..., None], pixels, np.uint8(GRAY))


def views_picture(args) -> Image.Image:
    """Images, and beside each its views in the first epoch, or what its masks leave of them."""
    module = method(args.script)
    if args.kind == "masks" and not hasattr(module, "visible_patches"):
        raise comm.RunError(f"{args.script} masks no patches of its views; cae, dinov2, "
                            "ijepa, mae and simmim do")
    given = module.parse_args(args.flags)
    images = open_images(given.data, "pretrain", given.in_chans, **cli.sources(given))
    rows = min(args.rows, len(images))
    loader = Loader(images, module.build_views(given), batch_size=rows, epochs=1, seed=given.seed,
                    world=WORLD, workers=0)
    batch = next(loader.epoch(0))
    pictures = [to_pixels(view, given.mean, given.std) for view in batch.views]
    gray = "masked"
    if args.kind == "masks":
        left = module.visible_patches(given, batch.index)
        pictures = [masked(pictures[number], visible) for number, visible in left]
        if len({number for number, _ in left}) < len(left):  # of one view
            gray = "outside of the block: first the context, then the targets"
    table = []
    for row, index in enumerate(batch.index.tolist()):
        parts = [joined(p[9 * row : 9 * row + 9]) if len(p) == 9 * rows else p[row]
                 for p in pictures]
        height = max(enlarge(part, TILE).height for part in parts)
        table.append([at_height(as_seen(images, index), height), *parts])
    return with_legend(grid(table), {gray: GRAY}) if args.kind == "masks" else grid(table)


# --------------------------------------------------------------------------------- features of runs


def neighbours_picture(args) -> Image.Image:
    """Test images, and beside each its nearest training images, without itself."""
    world = comm.setup(args.given.device, deterministic=True)
    source, = features.sources(args.given, world, interpolation="bicubic",
                                open_splits=labelled.open_unlabelled)
    bank, asked = source.train, source.test or source.train
    asked = asked.subset(evenly(len(asked), args.rows))
    found = dataclasses.replace(source, test=asked).features(next(source.backbones()))
    train, queries = (torch.nn.functional.normalize(next(iter(split.layers.values())), dim=1)
                      for split in (found.train, found.test))
    own = torch.from_numpy(evenly(len(bank), args.rows)) if source.test is None else None
    count = min(args.columns, len(bank) - (own is not None))
    labels = [split.labels for split in (found.train, found.test)]
    known = all(each is not None and each.ndim == 1 for each in labels)
    table = []
    for row, places in enumerate(nearest(train, queries, count, own)[1].tolist()):
        tiles = [at_height(as_seen(*shown), TILE)
                 for shown in ((asked, row), *((bank, place) for place in places))]
        for column, tile in enumerate(tiles if known else ()):
            right = column == 0 or labels[0][places[column - 1]] == labels[1][row]
            bar = np.full((6, *tile.shape[1:]), GREEN if right else RED, dtype=np.uint8)
            bar = bar if column else np.full_like(bar, 255)
            tiles[column] = np.concatenate([tile, bar])
        table.append(tiles)
    meanings = {"of its class": GREEN, "of another class": RED}
    return with_legend(grid(table), meanings) if known else grid(table)


def embedding_picture(args) -> Image.Image:
    """Test images as points of t-SNE, a panel for every checkpoint, a colour for every class."""
    from sklearn.manifold import TSNE

    figures = matplotlib_figure("the embedding is")
    world = comm.setup(args.given.device, deterministic=True)
    panels = []
    for source in features.sources(args.given, world, interpolation="bicubic",
                                   open_splits=labelled.open_unlabelled):
        shown = source.test or source.train
        shown = shown.subset(evenly(len(shown), args.points))
        found = dataclasses.replace(source, train=shown, test=None).features(
            next(source.backbones())).train
        rows = next(iter(found.layers.values())).numpy()
        perplexity = min(30, (len(rows) - 1) / 3)
        points = TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(rows)
        several = found.labels is None or found.labels.ndim > 1
        panels.append((source.name, points, np.zeros(len(rows), int) if several else found.labels,
                       None if several else shown.class_names or range(found.labels.max() + 1)))
    figure = figures((5.2 * len(panels), 5.8))
    for axis, (name, points, labels, names) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, label in enumerate(np.unique(labels)):
            colour = f"C{number}" if number < 10 else f"{0.3 + 0.6 * (number % 7) / 7}"
            axis.scatter(*points[labels == label].T, s=8, color=colour,
                         label=str(names[label]) if names and number < 10 else None)
        axis.set_title(os.path.basename(os.path.normpath(name)))
        axis.set(xticks=[], yticks=[])
    if names:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", markerscale=2,
                      ncols=min(10, len(np.unique(labels))), handletextpad=0)
    return drawn(figure)


# ------------------------------------------------------------------------ attention, reconstruction


def some_images(args, settings: dict) -> Tensor:
    """Some evenly spaced images (n, C, S, S) of the test split (all images, if there is none)."""
    data, channels, size = (settings[name] for name in ("data", "in_chans", "image_size"))
    opened = functools.partial(
        open_images, args.data or data, channels=channels, root=args.data_root, limit=args.rows,
        bits=settings["bits"], exif_orientation=settings["exif_orientation"])
    try:
        images = opened(split="test")
    except comm.RunError:
        images = opened(split="pretrain")
    view = features.central_view(settings, augment.CenterCrop, "bicubic", size)
    flat = features.extract(lambda x: {"images": x.flatten(1)}, images, view, WORLD, workers=0,
                            batch_size=len(images))["images"]
    return flat.view(-1, channels, size, size)


def settings_of(args, script: str) -> dict:
    """The settings of a run of a certain script, from its run.json or its backbone.pth."""
    settings = {}
    with contextlib.suppress(comm.RunError):
        settings = features.resolve_checkpoint(args.checkpoint).settings
    if "arch" not in settings:
        raise comm.RunError(f"--checkpoint {args.checkpoint}: no run.json that can be read there; "
                            f"give the folder of a run of {script}")
    if settings["arch"] not in backbones.VITS:
        raise comm.RunError(f"--checkpoint {args.checkpoint}: {settings['arch']} is no transformer")
    missing = {*checkpoint.DESCRIBED} - {"stem", "bits", "exif_orientation"} - settings.keys()
    if missing:
        raise comm.RunError(f"--checkpoint {args.checkpoint} does not say its {min(missing)}; give "
                            f"the folder of a run of {script}")
    return {"data": "digits", "bits": 8, "exif_orientation": False, **settings}


@torch.inference_mode()
def attention_picture(args) -> Image.Image:
    """Images, and beside each every head's attention: white at its strongest patch, black at its
    weakest."""
    settings = settings_of(args, "dino.py")
    backbone = features.build(settings)
    load_backbone(backbone, features.resolve_checkpoint(args.checkpoint).weights)
    if backbone.cls_token is None:
        raise comm.RunError(f"--checkpoint {args.checkpoint} has no class token to draw")
    images = some_images(args, settings)
    heads = backbone.eval().attention(images)[:, :, 1:]  # (n, heads, L)
    low, high = heads.amin(2, keepdim=True), heads.amax(2, keepdim=True)
    heads = (heads - low) / (high - low).clamp(min=1e-12)
    heads = heads.view(*heads.shape[:2], *backbone.grid)
    originals = to_pixels(images, settings["mean"], settings["std"])
    maps = heads.mul(255).to(torch.uint8).numpy()
    return grid([[original, *(m[..., None].repeat(3, axis=-1) for m in each)]
                 for original, each in zip(originals, maps, strict=True)])


@torch.inference_mode()
def patches_picture(args) -> Image.Image:
    """Images, and beside each its patches in the colours of three principal components."""
    settings = settings_of(args, "dino.py")
    settings["trained_size"] = settings["image_size"]
    settings["image_size"] = size = args.image_size or settings["image_size"]
    if size % settings["patch_size"]:
        raise comm.RunError(f"--image-size {size} is not a multiple of {settings['patch_size']}")
    backbone = features.build(settings)
    load_backbone(backbone, features.resolve_checkpoint(args.checkpoint).weights)
    images = some_images(args, settings)
    tokens = backbone.eval().tokens(images)[0][:, int(backbone.cls_token is not None):]
    colours, share = principal_colours(tokens.flatten(0, 1))
    comm.print_main(f"the three components hold {share:.0%} of the variance of the patch tokens")
    maps = colours.view(len(images), *backbone.grid_of(size, size), 3).numpy()
    side = settings["patch_size"]
    originals = to_pixels(images, settings["mean"], settings["std"])
    return grid([[original, each.repeat(side, axis=0).repeat(side, axis=1)]
                 for original, each in zip(originals, maps, strict=True)])


def principal_colours(x: Tensor) -> tuple[Tensor, float]:
    """Rows (n, D) as uint8 colours (n, 3) by their principal components, and the share they hold.

    Each component spans black to white from its 1 % to its 99 % quantile; its largest weight is
    positive, so that colours are always the same.
    """
    _, values, axes = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    axes = axes[:3] * axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True)).sign()
    parts = x.double() @ axes.T
    low, high = parts.quantile(torch.tensor([0.01, 0.99], dtype=x.double().dtype), dim=0)
    colours = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    share = values[:3].square().sum() / values.square().sum()
    return torch.nn.functional.pad(colours, (0, 3 - len(axes))).to(torch.uint8), share.item()


@torch.inference_mode()
def reconstruction_picture(args) -> Image.Image:
    """Original, visible patches, and the reconstruction with the visible patches pasted in."""
    import mae

    settings = settings_of(args, "mae.py")
    if not {"mask_ratio", "decoder_dim", "norm_pix"} <= settings.keys():
        raise comm.RunError(f"--checkpoint {args.checkpoint} is not a run of mae.py")
    path = os.path.join(args.checkpoint, "checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state"]["model"]
    except Exception as error:
        raise comm.RunError(f"{path} cannot be read: {type(error).__name__}") from error
    patch = settings["patch_size"]
    backbone = features.build(settings)
    model = mae.MAE(backbone, settings["mask_ratio"], settings["in_chans"],
                    settings["decoder_dim"], settings["decoder_depth"], settings["decoder_heads"])
    model.load_state_dict(state)
    images = some_images(args, settings)
    noise = mae.mask_noise(torch.arange(len(images)), 0, seed=0, steps_per_epoch=1,
                           patches=len(backbone.pos_embed[0]) - 1)
    predicted, mask = model.eval()(images, noise)
    target = mae.patchify(images, patch)
    if settings["norm_pix"]:
        variance, mean = torch.var_mean(target, dim=2, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    removed = mask[:, :, None].bool()
    whole = torch.where(removed, predicted, target)
    rows = []
    for patches in (target, whole):
        pixels = mae.unpatchify(patches, patch, settings["in_chans"], backbone.grid)
        rows.append(to_pixels(pixels, settings["mean"], settings["std"]))
    gaps = mae.unpatchify(removed.expand_as(target).float(), patch, settings["in_chans"],
                          backbone.grid)
    gaps = gaps.permute(0, 2, 3, 1)[..., :1].bool().numpy()
    left = np.where(gaps, np.uint8(GRAY), rows[0])
    return grid([list(row) for row in zip(rows[0], left, rows[1], strict=True)])


# ------------------------------------------------------------------------------------------- curves

# Numbers of a log line that say how fast a run is, not what it learns, and the order of the others.
SPEED = ("step", "epoch", "images_per_second", "data_wait", "memory_gb")
FIRST = ("loss", "lr", "probe_knn", "probe_effective_rank", "effective_rank", "grad_norm")


def read_log(folder: str) -> list[dict]:
    """The lines of a run's log, but for one that is just being written."""
    path, lines = os.path.join(folder, "log.jsonl"), []
    if not os.path.isfile(path):
        raise comm.RunError(f"{folder}: no log.jsonl in it; give the folder of a run")
    with open(path) as file, contextlib.suppress(ValueError):
        for line in file:
            lines.append(json.loads(line))
    if not lines:
        raise comm.RunError(f"{path} has no line yet")
    return lines


def matplotlib_figure(what: str):
    """matplotlib's class of figures, of a size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise comm.RunError(f"{what} drawn by matplotlib, which is not installed; "
                            "pip install -r requirements-extra.txt") from None
    return lambda size: Figure(figsize=size, layout="constrained")


def drawn(figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Image.open(file).convert("RGB")


def curves_picture(args) -> Image.Image:
    """Every logged number over the steps, a panel each, a colour for every run."""
    logs = {folder: read_log(folder) for folder in args.runs}
    figures = matplotlib_figure("curves are")
    logged = {name: None for lines in logs.values() for line in lines for name in line}
    panels = [name for name in FIRST if name in logged]
    panels += [name for name in logged if name not in FIRST + SPEED]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = figures((12, 0.6 + 2.6 * rows + 0.25 * len(logs)))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, panels, strict=False):
        for lines in logs.values():
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), linewidth=1.5,
                      marker="." if len(points) < 30 else None)
        axis.set_title(name.replace("_", " "))
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("step")
    names = [os.path.normpath(folder) for folder in logs]
    short = [os.path.basename(name) for name in names]
    figure.legend(axes[0].lines, short if len(set(short)) == len(short) else names,
                  loc="outside upper center", ncols=min(3, len(names)))
    return drawn(figure)


def main(args):
    pictures = {"views": views_picture, "masks": views_picture, "curves": curves_picture,
                "neighbours": neighbours_picture, "embedding": embedding_picture,
                "attention": attention_picture, "patches": patches_picture,
                "reconstruction": reconstruction_picture}
    picture = pictures[args.kind](args)
    with comm.same_error_on_all_ranks(writing=args.image):
        picture.save(args.image, format="PNG")
    comm.print_main(f"{args.image}: {picture.width} x {picture.height} pixels")


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
