"""Retrieval with frozen features: rank a database for every query by cosine, nothing is trained.

1. A backbone's maps of an image become one vector: its class token, or the mean, the generalised
   mean (GeM) or regional maxima (R-MAC) of the places; of several `--scales` the mean, of R-MAC all
   regions. Divided by its length.
2. With `--whiten`, turned to the principal axes of other images, each of unit variance, and divided
   by its length once more; R-MAC does so with each region before it adds them up.
3. The database is ranked by cosine for each query. Equal ones stay in the database's order.
4. Average precision (AP), recall at k (is a relevant image among the first k?) and precision at k,
   averaged over the queries that have a relevant image. Ignored images are not in a ranking.

What is relevant, `--data` says:
- labelled images: those of the query's class. The test images are searched in the training images,
  or with `--leave-one-out` the images of one split, or of a folder without splits, in its others.
- roxford5k, rparis6k: revisited Oxford and Paris, in a folder of that name below `--data-root`
  (`gnd_roxford5k.pkl`, `jpg/`), at medium, hard and easy. A query is cut out by its box.
- copydays: folders below `--data-root`/copydays: `original`, copies (`strong`, `crops/10`, ...: a
  table row each, searched in the originals) and, with distractor in a name, others to search in.
  200305.jpg is a copy of 200300.jpg. Folders named train are left out: for `--whiten`.

Baselines: `pixels` (whatever `--pool`) and `random` (the mean over five untrained backbones). The
last line of the output is one JSON object, which describes the checkpoint named last and holds all
of them under "checkpoints"; "map" is of the first table row.

Differs from VISSL: whitened vectors have unit length again, the image's whole vector is scaled
without a bias, images are only ever made smaller, and an original is no query.

Letters: N images, C channels, D feature size, R regions of an image.

Reference: AP and datasets: Radenovic et al., arXiv 1803.11285; GeM: 1711.02512; R-MAC: Tolias et
al., 1511.05879.

    python eval_retrieval.py --checkpoint pixels random runs/simclr-digits-resnet_tiny
    python eval_retrieval.py --checkpoint runs/simclr --data photos --leave-one-out --max-side 512
    python eval_retrieval.py --checkpoint runs/swav --data roxford5k --pool rmac --whiten rparis6k/jpg
"""

import argparse
import dataclasses
import functools
import math
import os
import pickle
import re
import sys
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, backbones, cli, distributed as comm, features, labelled, trunks
from common.images import FileImages, open_images, some, walk
from common.whitening import ROWS, whitening

LEVELS = 3  # of R-MAC
REVISITED = {  # what is relevant to a query, and what is ignored
    "medium": (("easy", "hard"), ("junk",)), "hard": (("hard",), ("junk", "easy")),
    "easy": (("easy",), ("junk", "hard")),
}
SETS = ("roxford5k", "rparis6k", "copydays")


def parse_args(argv=None):
    parser = features.parser(__file__, __doc__)
    group = parser.add_argument_group("protocol")
    group.add_argument("--pool", choices=("cls", "avg", "gem", "rmac"),
                       help="a map's way to a vector; default: cls, or without a class token avg")
    group.add_argument("--p", type=cli.positive, default=4.0,
                       help="exponent of GeM; 1: the mean, inf: the maximum")
    group.add_argument("--scales", type=cli.positive, nargs="+", default=[1.0], metavar="FACTOR",
                       help="sizes to take features at; DINO's: 1 0.7071 0.5")
    group.add_argument("--max-side", type=cli.pos_int, metavar="PX",
                       help="whole images whose longer side is at most so many pixels, one in a "
                       "forward pass; default: 1024 of revisited sets, else as for k-NN; of copies "
                       "squeezed to a square")
    group.add_argument("--whiten", metavar="SOURCE",
                       help="images to whiten by, such as rparis6k/jpg for roxford5k")
    group.add_argument("--whiten-dim", type=cli.pos_int, metavar="D",
                       help="dimensions to keep; default: all, or one less than there are vectors")
    group.add_argument("--leave-one-out", choices=("train", "test"), nargs="?", const="test",
                       help="search this split for each of its images, without itself; in a folder "
                       "without splits: all")
    group.add_argument("--crop-queries", action=cli.Switch, default=True,
                       help="cut revisited sets' queries out by their boxes")
    group.add_argument("--k", type=cli.pos_int, nargs="+", default=[1, 5, 10],
                       help="ranks up to which recall and precision count")
    group.add_argument("--chunk", type=cli.pos_int, default=64,
                       help="queries at a time (bounds the memory)")
    args = features.parse(parser, argv)
    only_labelled = ("test_data", "limit", "limit_per_class", "download", "leave_one_out")
    refused = {
        f"--data {args.data}": only_labelled if args.data in SETS else (),
        "--features": ("pool", "scales", "max_side", "whiten") if args.features else (),
        "--leave-one-out": ("test_data", "limit_per_class") if args.leave_one_out else (),
        "--max-side": ("resize",) if args.max_side or args.data in SETS else (),
    }
    for flag, others in refused.items():
        for name in others:
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} does not go with {flag}")
    if args.features and args.data in SETS:
        parser.error(f"--data {args.data} does not go with --features, whose images are fixed")
    if args.whiten_dim and not args.whiten:
        parser.error(f"--whiten-dim {args.whiten_dim} goes with --whiten")
    if args.data in SETS[:2]:
        args.max_side = args.max_side or 1024
    if args.max_side:
        if "pixels" in (args.checkpoint or ()):
            parser.error(f"pixels are of one size, and with --max-side {args.max_side} (the "
                         "default of revisited sets) images are not; leave one out")
        args.batch_size = 1
    return args


# ------------------------------------------------------------------------------------------- images


@dataclasses.dataclass
class LongerSide(augment.Step):
    """Make an image smaller, where needed, so that its longer side is `max_side` pixels."""

    max_side: int
    interpolation: str
    geometric = True

    def apply(self, plane, _, size):
        factor = self.max_side / max(plane.size)
        if factor >= 1:
            return plane
        return plane.resize([max(1, round(factor * side)) for side in plane.size],
                            augment.INTERPOLATION[self.interpolation])


class BoxedImages(FileImages):
    """Image files of which boxes are cut out: left, top, right, bottom in pixels, (N, 4)."""

    boxes = None

    def read(self, index):
        planes = super().read(index)
        left, top, *ends = np.maximum(np.rint(self.boxes[index]), 0).astype(int).tolist()
        right, bottom = map(min, ends, planes[0].size)
        if left >= right or top >= bottom:
            raise comm.RunError(f"{self.name(index)}: its box {self.boxes[index].tolist()} is "
                                "beside the image")
        return [plane.crop((left, top, right, bottom)) for plane in planes]


def open_sets(args, data: str, channels: int, **options) -> list:
    """Open the database and the queries; these have a `truth` where labels do not tell.

    A truth is, by name of a table row and number of a query, the rows of the database that are
    relevant and those that are ignored.
    """
    if data in SETS:
        opened = open_copies if data == "copydays" else open_revisited
        with comm.same_error_on_all_ranks():
            return opened(os.path.join(args.data_root, data), data, channels, args.crop_queries)
    if args.leave_one_out:
        sources = {name: options[name] for name in ("root", "download", "limit")}
        images = open_images(data, args.leave_one_out, channels, whole=True, **sources)
        labelled.check_labels(f"--data {data}", images, False)
        return [images, images]
    return labelled.open_splits(data, channels, **options)


def open_revisited(folder: str, name: str, channels: int, crop: bool) -> list:
    """Revisited Oxford or Paris."""
    path = os.path.join(folder, f"gnd_{name}.pkl")
    given = read_plain_pickle(path)
    try:
        paths = [[os.path.join(folder, "jpg", f"{image}.jpg") for image in given[which]]
                 for which in ("imlist", "qimlist")]
        boxes = np.array([truth["bbx"] for truth in given["gnd"]], dtype=float)
        rows = [{kind: np.array(truth[kind], dtype=np.int64).reshape(-1)
                 for kind in ("easy", "hard", "junk")} for truth in given["gnd"]]
        if boxes.shape != (len(paths[1]), 4) or not np.isfinite(boxes).all():
            raise ValueError(f"boxes {boxes.shape} of {len(paths[1])} queries")
        for each in rows:
            found = np.concatenate(list(each.values()))
            if len({*found.tolist(), *range(len(paths[0]))}) > len(paths[0]) or (
                    len({*found.tolist()}) < len(found)):
                raise ValueError("an image that is not in imlist, or in two lists of a query")
    except (KeyError, TypeError, ValueError) as error:
        raise comm.RunError(f"{path} is no annotation of {name} ({error!r}); it has imlist, "
                            "qimlist, and gnd with easy, hard, junk and bbx") from error
    missing = [path for path in sum(paths, []) if not os.path.isfile(path)]
    if missing or not all(paths):
        raise comm.RunError(f"{folder}: {len(missing)} of {len(sum(paths, []))} images are missing"
                            f", such as {some(missing[:1])}")
    database, queries = (kind(files, None, channels, folder) for kind, files in zip(
        (FileImages, BoxedImages if crop else FileImages), paths, strict=True))
    queries.boxes = boxes
    queries.truth = {
        row: {query: [np.concatenate([each[kind] for kind in kinds]) for kinds in (good, ignored)]
              for query, each in enumerate(rows)}
        for row, (good, ignored) in REVISITED.items()}
    return [database, queries]


def open_copies(folder: str, name: str, channels: int, _) -> list:
    """Copydays, or anything in such folders."""
    if not os.path.isdir(folder):
        raise comm.RunError(f"--data {name}: no folder {folder}; --data-root is the one above it")
    originals, distractors, copies, blocks = [], [], [], {}
    for parent, files in walk(folder):
        part = os.path.relpath(parent, folder)
        for path in sorted(os.path.join(parent, file) for file in files):
            number = re.match(r"\d+", os.path.basename(path))
            if "distractor" in os.path.relpath(path, folder):
                distractors.append(path)
            elif "train" not in part.split(os.sep):
                if not number:
                    raise comm.RunError(f"{path}: its name does not begin with a number, which "
                                        "would tell what it is a copy of")
                blocks[path] = int(number[0]) // 100
                (originals if "original" in part else copies).append((part, path))
    originals, copies = sorted(path for _, path in originals), sorted(
        copies, key=lambda pair: (pair[0] != "strong", pair))  # of the usual number first
    numbers = np.array([blocks[path] for path in originals], dtype=np.int64)
    truth, nothing = {}, np.zeros(0, np.int64)
    for query, (part, path) in enumerate(copies):
        found = np.flatnonzero(numbers == blocks[path])
        if not len(found):
            raise comm.RunError(f"{path}: no original of number {blocks[path]}00 in {folder}")
        truth.setdefault(part, {})[query] = [found, nothing]
    if not copies:
        raise comm.RunError(f"{folder}: no copies; it has the folders original and strong, or "
                            "others than original")
    database = FileImages([*originals, *sorted(distractors)], None, channels, folder)
    queries = FileImages([path for _, path in copies], None, channels, folder)
    queries.truth = truth
    return [database, queries]


def read_plain_pickle(path: str):
    """Read a pickle of containers, strings, numbers and NumPy arrays; anything else is refused.

    No function is called but those that make arrays.

    Raises:
        RunError: there is no such file, it is no pickle, or something else is in it.
    """
    rebuild, scalar = (x.__reduce__()[0] for x in (np.zeros(1), np.float64(0)))
    core = ("numpy.core.multiarray", "numpy._core.multiarray")
    admitted = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
                ("_codecs", "encode"): lambda text, _: text.encode("latin1")}  # bytes, of old ones
    admitted |= {(module, "_reconstruct"): rebuild for module in core}
    admitted |= {(module, "scalar"): scalar for module in core}

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in admitted:
                raise comm.RunError(f"{path} is refused, and nothing in it was run: it asks for "
                                    f"{module}.{name}, and annotations are plain lists and arrays")
            return admitted[module, name]

    if not os.path.isfile(path):
        raise comm.RunError(f"{path}: no such file; --data-root is the folder above that of the set")
    with open(path, "rb") as file:
        try:
            return Plain(file, encoding="latin1").load()
        except comm.RunError:
            raise
        except Exception as error:  # a damaged pickle raises whatever it likes
            raise comm.RunError(f"{path} cannot be read: {error!r}") from error


def described(args, data: str, _, database, queries) -> str:
    """What is searched for and in, in words."""
    if args.leave_one_out:
        return f"{data}: each of {len(queries)} images searched for in the others"
    if data in SETS:
        return f"{data}: {len(queries)} queries searched for in {len(database)} images"
    return labelled.described(data, args, database, queries)


# ------------------------------------------------------------------------------------------ vectors


def gem(maps: Tensor, p: float) -> Tensor:
    """Generalised mean of maps (N, C, H, W) over their places, (N, C); the floor is 1e-6.

    Args:
        p: exponent; 1 is the mean, infinity the maximum, which has no floor.

    Reference: Radenovic et al., arXiv 1711.02512, equation 3.
    """
    maps = comm.upcast(maps).flatten(2)
    largest = maps.amax(2)
    if math.isinf(p):
        return largest
    largest = largest.clamp(min=1e-6)  # powers of shares of it do not overflow
    shares = maps.clamp(min=1e-6) / largest[:, :, None]
    return largest * shares.pow(p).mean(2).pow(1 / p)


def region_boxes(height: int, width: int, levels: int) -> list[tuple[int, int, int]]:
    """R-MAC's squares on a map: top, left and side of each, level by level.

    Level l has l squares along the shorter side, and along the longer one so many more that
    neighbours share 40 % of their sides, as nearly as with 1 to 6 more.
    """
    shorter, longer = sorted((height, width))
    more = min(range(1, 7), key=lambda e: abs(  # exact: there are ties, of which the fewer count
        1 - Fraction(longer - shorter, e * shorter) - Fraction(2, 5)))
    boxes = []
    for level in range(1, levels + 1):
        side = 2 * shorter // (level + 1)
        starts = []
        for length in (height, width):
            count = level + (more if length > shorter else 0)
            starts.append([i * (length - side) // max(count - 1, 1) for i in range(count)])
        boxes += [(top, left, side) for top in starts[0] for left in starts[1] if side]
    return boxes


def regions(maps: Tensor, levels: int) -> Tensor:
    """Maxima of maps (N, C, H, W) in R-MAC's squares, each of unit norm: (N, R, C)."""
    maps = comm.upcast(maps)
    maxima = [maps[:, :, top : top + side, left : left + side].amax((2, 3))
              for top, left, side in region_boxes(*maps.shape[2:], levels)]
    return F.normalize(torch.stack(maxima, 1), dim=2)


def rmac(maps: Tensor, levels: int) -> Tensor:
    """Regional max-pooling of maps (N, C, H, W): the sum over their squares, of unit norm (N, C).

    Reference: Tolias et al., arXiv 1511.05879, section 3.2.
    """
    return together(regions(maps, levels))


def together(vectors: Tensor, whitened: tuple | None = None) -> Tensor:
    """One unit vector (N, D) of the regions (N, R, D) of each image, which are whitened first."""
    if whitened is not None:
        mean, projection = whitened
        vectors = F.normalize((vectors - mean) @ projection, dim=2)
    return F.normalize(vectors.sum(1), dim=1)


def at_scale(images: Tensor, scale: float, multiple: int) -> Tensor:
    """Images (N, C, H, W) times a factor, bilinear; sides are multiples of a transformer's patch."""
    sides = [max(1, round(side * scale / multiple)) * multiple for side in images.shape[2:]]
    if sides == [*images.shape[2:]]:
        return images
    return F.interpolate(images, sides, mode="bilinear", align_corners=False)


def maps_of(backbone: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Maps (N, C, H, W) of a ResNet's stages, or of a transformer's patches, by layer."""
    if backbones.is_resnet(backbone):
        maps = features.resnet_maps(backbone, images, names)
        return {name: maps[name] for name in names}
    depths = {name: int(name.removeprefix("patches") or 1) for name in names}
    tokens = backbone.tokens(images, max(depths.values()))
    first, grid = int(backbone.cls_token is not None), backbone.grid_of(*images.shape[2:])
    return {name: torch.cat(tokens[-n:], 2)[:, first:].transpose(1, 2).unflatten(2, grid)
            for name, n in depths.items()}


def layers_of(backbone: nn.Module, pool: str | None, wanted: list[str] | None) -> list[str]:
    """Layers that a pooling is of: those wanted, or the usual one.

    Raises:
        RunError: the backbone or a layer has nothing that could be pooled so.
    """
    known = features.layer_names(backbone)
    if known == ["pixels"]:
        return known
    maps = pool in ("gem", "rmac")
    fits = [name for name in known if pool is None or name.startswith("cls") == (pool == "cls")]
    fits = [] if known == ["features"] and pool not in (None, "avg") else fits
    if not fits:
        raise comm.RunError(f"--pool {pool}: the backbone has no such layer, only "
                            f"{' '.join(known)}; give another --pool")
    for name in wanted or ():
        if name not in fits and (maps or name.removesuffix("-grid") not in fits):
            raise comm.RunError(f"--pool {pool or 'cls or avg'}: no layer {name} for that; there "
                                f"are {' '.join(fits)}")
    return list(dict.fromkeys(wanted or fits[-1:]))


def vectors_of(backbone: nn.Module, images: Tensor, names: list[str], args) -> dict[str, Tensor]:
    """Vectors of unit norm (N, R, D) of images by layer: one of each, or R-MAC's regions."""
    at_scales = []
    plain = isinstance(backbone, features.Pixels)
    for scale in [1.0] if plain else args.scales:
        scaled = at_scale(images, scale, getattr(backbone, "patch_size", 1))
        trunks.check_sizes(backbone, images.shape[1], {tuple(scaled.shape[2:])})
        if plain or args.pool not in ("gem", "rmac"):
            found = features.layers(backbone, scaled, names)
            found = {name: rows[:, None] for name, rows in found.items()}
        elif args.pool == "gem":
            found = {name: gem(x, args.p)[:, None]
                     for name, x in maps_of(backbone, scaled, names).items()}
        else:
            found = {name: regions(x, LEVELS)
                     for name, x in maps_of(backbone, scaled, names).items()}
        at_scales.append(found)
    joined = {name: [found[name] for found in at_scales] for name in names}
    if args.pool == "rmac" and not plain:
        return {name: torch.cat(parts, 1) for name, parts in joined.items()}
    return {name: F.normalize(sum(parts) / len(parts), dim=2) for name, parts in joined.items()}


def fit_whitening(take, source, args) -> dict[str, tuple]:
    """Mean and projection by layer, of the vectors of all regions of other images.

    Args:
        take: images to vectors (N, R, D) by layer.
    """
    images = open_images(args.whiten, "pretrain", source.settings["in_chans"], root=args.data_root,
                         download=args.download, limit=args.limit)
    beyond = 6 if args.max_side else 0  # squares that a level has more where a map is no square
    most = len(args.scales) * sum(level * (level + beyond) for level in range(1, LEVELS + 1))
    most = most if args.pool == "rmac" else 1

    def rows(x):  # as many of each image, filled up with zeros
        return {name: F.pad(vectors, (0, 0, 0, most - vectors.shape[1])).flatten(1)
                for name, vectors in take(x).items()}

    whitened = {}
    for name, found in source.extract(rows, images).items():
        found = found.view(-1, found.shape[1] // most)
        found = found[found.any(1)].to(source.world.device)
        n, d = found.shape
        dim = args.whiten_dim or min(d, n - 1)
        if not 0 < dim <= min(d, n - 1):
            raise comm.RunError(f"--whiten-dim {dim}: {args.whiten} gives {n} vectors of {d} "
                                f"features ({name}), and dimensions are fewer than vectors")
        comm.print_main(f"whitened by {n} vectors of {len(images)} images of {args.whiten}: {name}, "
                        f"{dim} of {d} dimensions")
        whitened[name] = whitening(found, dim)
    return whitened


# ----------------------------------------------------------------------------------------- measures


def positive_ranks(scores: Tensor, positive: Tensor, junk: Tensor) -> Tensor:
    """Ranks from 0, rising, of the positives among what is not junk; int64 (P,).

    Args:
        scores: (M,), higher is nearer. Equal ones keep their order.
        positive, junk: bool (M,); no item is both.
    """
    order = scores.argsort(descending=True, stable=True)
    return ((~junk)[order].cumsum(0) - 1)[positive[order]]


def area(ranks: Tensor) -> Tensor:
    """Area under the precision-recall curve of positives at these ranks; NaN if there is none."""
    ranks, before = ranks.double(), torch.arange(len(ranks), device=ranks.device)
    precision_before = torch.where(ranks > 0, before / ranks, 1.0)
    return ((precision_before + (before + 1) / (ranks + 1)) / 2).mean()


def average_precision(scores: Tensor, positive: Tensor, junk: Tensor) -> Tensor:
    """Area under the precision-recall curve of one query by trapezoids, in [0, 1].

    Args:
        scores: (M,), higher is nearer. Equal ones keep their order.
        positive, junk: bool (M,): relevant; taken out of the ranking. No item is both.

    Returns:
        Float64; NaN without a positive.

    Reference: revisited Oxford and Paris, Radenovic et al., arXiv 1803.11285.
    """
    return area(positive_ranks(scores, positive, junk))


def measures(ranks: Tensor, cutoffs: list[int]) -> list[float]:
    """AP, then recall at each k, then precision at each, of rising ranks; NaN without a positive.

    Precision at k is that of the first k, or of those up to the last positive if they are fewer.
    """
    if not len(ranks):
        return [math.nan] * (1 + 2 * len(cutoffs))
    ranks = ranks.cpu()
    taken = [min(k, int(ranks[-1]) + 1) for k in cutoffs]
    hits = [int((ranks < k).sum()) for k in taken]
    return [area(ranks).item(), *(float(hit > 0) for hit in hits),
            *(hit / k for hit, k in zip(hits, taken, strict=True))]


def similarities(queries: Tensor, database: Tensor) -> Tensor:
    """Cosines, float64 (M, N), of unit rows; those of equal images are equal, up to rounding."""
    queries = queries.double()
    return torch.cat([queries @ part.double().T for part in database.split(ROWS)], 1).round(
        decimals=13)


def measure(queries: Tensor, database: Tensor, relevance, names: list[str], args, world) -> Tensor:
    """`measures` of every query, (names, M, 1 + 2K); each process has a part of the chunks.

    Args:
        relevance: of a query's number, positive and junk, bool (N,), of those names it belongs to.
    """
    chunks = range(0, len(queries), args.chunk)
    parts = [len(chunks) * rank // world.size for rank in (world.rank, world.rank + 1)]
    found = torch.zeros(len(names), len(queries), 1 + 2 * len(args.k), dtype=torch.float64)
    for start in chunks[parts[0] : parts[1]]:
        some_queries = queries[start : start + args.chunk].to(world.device)
        for query, scores in enumerate(similarities(some_queries, database), start):
            found[:, query] = math.nan
            for name, (positive, junk) in relevance(query).items():
                ranks = positive_ranks(scores, positive, junk)
                found[names.index(name), query] = torch.tensor(measures(ranks, args.k))
    return comm.sum_over_processes(found)


def evaluate(found: features.Features, truth: dict | None, args, world) -> dict:
    """Measures of one backbone's features."""
    database, queries = found.train, found.test
    if args.leave_one_out:
        database = queries = getattr(found, args.leave_one_out)
    n, m = (len(next(iter(split.layers.values()))) for split in (database, queries))
    names = list(truth or [args.data or "class"])
    if truth is None:
        if database.labels.ndim != 1:
            raise comm.RunError(f"{found.checkpoint}: retrieval needs images of one class each")
        of_database = torch.from_numpy(database.labels).to(world.device)

    def relevance(query):
        if truth is None:
            positive = of_database == int(queries.labels[query])
            junk = torch.zeros_like(positive)
            if args.leave_one_out:
                positive[query], junk[query] = False, True
            return {names[0]: (positive, junk)}
        masks = {}
        for name in names:
            if query in truth[name]:
                masks[name] = torch.zeros(2, n, dtype=torch.bool, device=world.device)
                for mask, rows in zip(masks[name], truth[name][query], strict=True):
                    mask[torch.from_numpy(rows).to(world.device)] = True
        return masks

    results = []
    for layer, rows in database.layers.items():
        rows, asked = (F.normalize(x, dim=1) for x in (rows.to(world.device), queries.layers[layer]))
        table = measure(asked, rows, relevance, names, args, world)
        for name, values in zip(names, table, strict=True):
            values = values[~values[:, 0].isnan()]
            if not len(values):
                raise comm.RunError(f"{found.checkpoint}, {name}: none of the {m} queries has a "
                                    "relevant image in the database")
            ap, *rest = values.mean(0).tolist()
            at = [dict(zip(map(str, args.k), part, strict=True))
                  for part in (rest[: len(args.k)], rest[len(args.k) :])]
            results.append({"layer": layer, "queries": name, "map": ap, "recall": at[0],
                            "precision": at[1], "num_queries": len(values)})
    asked = results[0]["num_queries"]
    if truth is None and asked < m:
        comm.print_main(f"warning: {found.checkpoint}: {m - asked} of {m} queries have no relevant "
                        "image in the database and do not count")
    return {"map": results[0]["map"], "results": results, "num_train": n, "num_test": m}


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = comm.setup(args.device, deterministic=True)
    pool = {"gem": f"GeM of p {args.p:g}", "rmac": f"R-MAC of {LEVELS} levels"}
    comm.print_main(f"retrieval by cosine, --pool {pool.get(args.pool, args.pool or 'cls or avg')}, "
                    f"scales {' '.join(f'{scale:g}' for scale in args.scales)}"
                    f"{f', whitened by {args.whiten}' if args.whiten else ''}; equal cosines in the "
                    "database's order")
    crop, table = augment.CenterCrop, []
    if args.max_side:
        crop = lambda _, interpolation: LongerSide(args.max_side, interpolation)  # noqa: E731
    elif args.data == "copydays":
        crop = lambda _, interpolation: augment.Resize(interpolation)  # noqa: E731
    for source in features.sources(args, world, interpolation="bicubic", crop=crop,
                                   open_splits=functools.partial(open_sets, args),
                                   described=functools.partial(described, args)):
        runs = []
        for backbone in source.backbones():
            function = None
            if backbone is not None:
                # 1. Vectors
                names = layers_of(backbone, args.pool, args.layers)
                take = functools.partial(vectors_of, backbone, names=names, args=args)
                # 2. Whitening
                whitened = fit_whitening(take, source, args) if args.whiten else {}

                def function(images, take=take, whitened=whitened):
                    return {name: together(vectors, whitened.get(name))
                            for name, vectors in take(images).items()}

            # 3. Ranking, and 4. its measures
            found = source.features(backbone, function)
            runs.append(evaluate(found, getattr(source.test, "truth", None), args, world))
        table.append({"checkpoint": source.name, **features.mean_of(runs)})

    shown = "precision" if args.data in SETS else "recall"
    rows = []
    for entry in table:
        for result in entry["results"]:
            several = [key for key in ("layer", "queries")
                       if len({each[key] for each in entry["results"]}) > 1]
            rows.append([" ".join([entry["checkpoint"], *(result[key] for key in several)]),
                         f"{result['map']:.3f}", *(f"{x:.3f}" for x in result[shown].values()),
                         str(result["num_queries"])])
    short = "mP" if shown == "precision" else shown
    features.print_table(["checkpoint", "mAP", *(f"{short}@{k}" for k in table[0]["results"][0][
        shown]), "queries"], rows)
    features.print_json({"eval": "retrieval", **table[-1], "checkpoints": table}
                        | ({"leave_one_out": args.leave_one_out} if args.leave_one_out else {}))


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
