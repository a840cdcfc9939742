"""Retrieval with frozen features: rank a database for every query by cosine, nothing is trained.

1. A backbone's map of an image becomes one vector: its class token, or the mean, the generalised
   mean (GeM) or regional maxima (R-MAC) of its places; of several `--scales` the mean, or all
   regions. It is divided by its length.
2. With `--whiten`, vectors are turned to the principal axes of those of other images, each axis of
   unit variance, and divided by their length again; of R-MAC every region, before they are added.
3. The database is ranked by cosine for every query. Equal ones stay in the database's order.
4. Average precision, recall at k (is a relevant image among the first k?) and precision at k: means
   over the queries that have a relevant image. Images to be ignored do not take a rank.

`--data` says what is relevant to a query:
- Labelled images: those of its class. The test images are searched for in the training images, or
  with `--leave-one-out` every image of a split, or of a folder without splits, in the others.
- roxford5k, rparis6k: `gnd_roxford5k.pkl` and `jpg/` in a folder of that name below `--data-root`,
  at medium, hard and easy. A query is cut out by its box.
- copydays: `original/`, copies (`strong/`, `crops/10/`, ...; a row of the table each) and maybe
  `distractors/` in a folder of that name. 200305.jpg is a copy of 200300.jpg.

Baselines: `pixels` (whatever `--pool` is) and `random` (the mean over five untrained backbones).
The last line of the output is one JSON object, which describes the checkpoint named last and holds
all of them under "checkpoints"; its "map" is that of the table's first row of the checkpoint.

Differs from VISSL: whitened vectors are divided by their length; GeM's vector gets no channel of
ones; images are only made smaller, a query's box as any image; originals are no queries.

Letters: N images, C channels, D feature size, R regions, M queries or what they are compared with.

Reference: average precision: Radenovic et al., arXiv 1803.11285; GeM: 1711.02512; R-MAC: Tolias et
al., 1511.05879. Numbers as in VISSL.

    python eval_retrieval.py --checkpoint pixels random runs/simclr-digits-resnet_tiny
    python eval_retrieval.py --checkpoint runs/simclr --data photos --leave-one-out --max-side 512
    python eval_retrieval.py --checkpoint runs/swav --data rparis6k --pool gem --whiten oxford/jpg
"""

import dataclasses
import math
import os
import sys
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import augment, cli, distributed as comm, features, labelled, trunks
from common.images import NoSplit, open_images
from common.retrieval_sets import BoxedImages, copies, revisited
from common.whitening import ROWS, whitening

LEVELS = 3  # of R-MAC
SETS = ("roxford5k", "rparis6k", "copydays")


def parse_args(argv=None):
    parser = features.parser(__file__, __doc__)
    group = parser.add_argument_group("protocol")
    group.add_argument("--pool", choices=("cls", "avg", "gem", "rmac"),
                       help="how a map becomes a vector; default: cls, without a class token avg")
    group.add_argument("--p", type=cli.positive, default=4.0,
                       help="exponent of GeM; 1: the mean of what is above 0")
    group.add_argument("--scales", type=cli.positive, nargs="+", default=[1.0], metavar="FACTOR",
                       help="image sizes to take features at, as factors; DINO's: 1 0.7071 0.5")
    group.add_argument("--max-side", type=cli.pos_int, metavar="PX",
                       help="whole images with a longer side of at most so many pixels, singly; "
                       "default: 1024 of revisited sets, of copies a square, else as for k-NN")
    group.add_argument("--whiten", metavar="SOURCE",
                       help="images to whiten by, such as rparis6k/jpg for roxford5k")
    group.add_argument("--whiten-dim", type=cli.pos_int, metavar="D",
                       help="dimensions to keep; default: all, or one less than there are vectors")
    group.add_argument("--leave-one-out", choices=("train", "test"), nargs="?", const="test",
                       help="search a split, or a folder without any, for each of its own images")
    group.add_argument("--crop-queries", action=cli.Switch, default=True,
                       help="cut revisited sets' queries out by their boxes")
    group.add_argument("--k", type=cli.pos_int, nargs="+", default=[1, 5, 10],
                       help="ranks up to which recall and precision count")
    group.add_argument("--chunk", type=cli.pos_int, default=64,
                       help="queries at a time (bounds the memory)")
    args = features.parse(parser, argv)
    if args.data in SETS[:2]:
        args.max_side = args.max_side or 1024
    given = [name for name in vars(args) if getattr(args, name) != parser.get_default(name)]
    excluded = {  # with what is given, what would say nothing or something else
        "--features": args.features and ["pool", "scales", "max_side", "whiten"],
        f"--data {args.data}": args.data in SETS and [
            "features", "test_data", "limit", "limit_per_class", "download", "leave_one_out",
            "resize", "save_features", "index"],
        "--leave-one-out": args.leave_one_out and ["test_data", "limit_per_class"],
        "--max-side": args.max_side and ["resize", "batch_size"],
        "--pool other than gem": args.pool != "gem" and ["p"],
    }
    for flag, names in excluded.items():
        for name in set(names or ()) & set(given):
            parser.error(f"--{name.replace('_', '-')} does not go with {flag}")
    if args.whiten_dim and not args.whiten:
        parser.error(f"--whiten-dim {args.whiten_dim} goes with --whiten")
    if args.max_side:
        if "pixels" in (args.checkpoint or ()):
            parser.error(f"pixels have no vectors of one length, for with --max-side "
                         f"{args.max_side} images differ in size; leave them out")
        args.batch_size = 1
    return args


# ------------------------------------------------------------------------------------------- images


def step_of(args, resize: int, interpolation: str) -> augment.Step:
    """How images are seen: whole, squeezed to a square, or their middle."""
    if args.max_side:
        return augment.LongerSide(args.max_side, interpolation)
    if args.data == "copydays":
        return augment.Resize(interpolation)
    return augment.CenterCrop(resize, interpolation)


def open_sets(args, data: str, channels: int, **options) -> list:
    """Open the database and the queries; these have a `truth` where labels do not tell."""
    if data in SETS:
        folder = os.path.join(args.data_root, data)
        with comm.same_error_on_all_ranks():
            found = copies(folder, channels) if data == "copydays" else (
                revisited(folder, data, channels, args.crop_queries))
        for images in found:
            images.bits = options["bits"]
            images.exif_orientation = options["exif_orientation"]
        if options["exif_orientation"] and isinstance(found[1], BoxedImages):
            raise comm.RunError(f"--exif-orientation: the boxes of {data}'s queries are of images "
                                "as they lie; pass --no-exif-orientation or --no-crop-queries")
        return found
    if args.leave_one_out:
        for name in ("test_data", "limit_per_class", "several_classes"):
            options.pop(name)
        images = open_images(data, args.leave_one_out, channels, whole=True, **options)
        labelled.check_labels(f"--data {data}", images, False)
        return [images, images]
    try:
        return labelled.open_splits(data, channels, **options)
    except NoSplit as error:
        raise comm.RunError(f"{error}. Or search class folders in themselves with "
                            "--leave-one-out") from error


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
    """Images (N, C, H, W) times a factor, bilinear; the sides become multiples."""
    sides = [max(1, round(side * scale / multiple)) * multiple for side in images.shape[2:]]
    if sides == [*images.shape[2:]]:
        return images
    return F.interpolate(images, sides, mode="bilinear", align_corners=False)


def layers_of(backbone: nn.Module, pool: str | None, wanted: list[str] | None) -> list[str]:
    """Layers that are pooled so: those wanted, or the usual one.

    Raises:
        RunError: the backbone, or what is wanted of it, is not pooled so.
    """
    known = features.layer_names(backbone)
    if known == ["pixels"]:
        return known
    fits = known if pool is None else [
        name for name in known if name.startswith("cls") == (pool == "cls")]
    if not fits or (known == ["features"] and pool in ("gem", "rmac")):
        raise comm.RunError(f"--pool {pool} needs what the backbone does not have, only "
                            f"{' '.join(known)}; give another --pool")
    for name in wanted or ():
        if name not in fits and (pool not in (None, "avg") or not name.endswith("-grid")):
            raise comm.RunError(f"--layers {name}: there are {' '.join(fits)}"
                                f"{f' for --pool {pool}' if pool else ''}")
    return list(dict.fromkeys(wanted or fits[-1:]))


def vectors_of(backbone: nn.Module, images: Tensor, names: list[str], pool: str | None, p: float,
               scales: list[float]) -> dict[str, Tensor]:
    """Vectors of unit norm (N, R, D) of images by layer: one of each, or R-MAC's regions."""
    if isinstance(backbone, features.Pixels):
        pool, scales = None, [1.0]
    by_scale = []
    for scale in scales:
        scaled = at_scale(images, scale, getattr(backbone, "patch_size", 1))
        trunks.check_sizes(backbone, images.shape[1], {tuple(scaled.shape[2:])})
        if pool in ("gem", "rmac"):
            found = {name: regions(x, LEVELS) if pool == "rmac" else gem(x, p)[:, None]
                     for name, x in features.maps(backbone, scaled, names).items()}
        else:
            rows = features.layers(backbone, scaled, names)
            found = {name: comm.upcast(x)[:, None] for name, x in rows.items()}
        by_scale.append(found)
    join = partial(torch.cat, dim=1) if pool == "rmac" else sum
    return {name: F.normalize(join([found[name] for found in by_scale]), dim=2) for name in names}


def whitening_of(take, source: features.Source, args) -> dict[str, tuple[Tensor, Tensor]]:
    """`whitening` by layer, of the vectors of `--whiten`.

    Args:
        take: images to vectors (N, R, D) by layer.
    """
    images = open_images(args.whiten, "pretrain", source.settings["in_chans"],
                         **features.reading(args, source.settings))
    # So many regions has an image at most: a map that is no square has more, by up to 6 in a row.
    more = 6 if args.max_side else 0
    most = len(args.scales) * sum(level * (level + more) for level in range(1, LEVELS + 1))
    most = most if args.pool == "rmac" else 1

    def rows(x):  # as many of each image, filled up with zeros
        return {name: F.pad(vectors, (0, 0, 0, most - vectors.shape[1])).flatten(1)
                for name, vectors in take(x).items()}

    found = {}
    for name, flat in source.extract(rows, images).items():
        x = flat.view(-1, flat.shape[1] // most)
        x = x[x.any(1)].to(source.world.device)
        largest = min(x.shape[1], len(x) - 1)
        dim = args.whiten_dim or largest
        if not 0 < dim <= largest:
            raise comm.RunError(f"--whiten-dim {dim}: {args.whiten} gives {len(x)} vectors of "
                                f"{x.shape[1]} numbers ({name}); dimensions are at most {largest}")
        if dim < x.shape[1] and not args.whiten_dim:
            source.say(f"warning: --whiten {args.whiten} gives {len(x)} vectors ({name}), so {dim} "
                       "dimensions are kept, the last ones mostly noise; give more images")
        found[name] = whitening(x, dim)
    return found


def describe(source: features.Source, backbone: nn.Module | None, args) -> features.Features:
    """Vectors (N, D) of both splits, whitened if that is wanted."""
    if backbone is None:
        return source.features(None)
    take = source.precision(partial(
        vectors_of, backbone, names=layers_of(backbone, args.pool, args.layers), pool=args.pool,
        p=args.p, scales=args.scales))
    whitened = whitening_of(take, source, args) if args.whiten else {}
    return source.features(backbone, lambda images: {
        name: together(vectors, whitened.get(name)) for name, vectors in take(images).items()})


# ----------------------------------------------------------------------------------------- measures


def positive_ranks(scores: Tensor, positive: Tensor, junk: Tensor) -> Tensor:
    """Ranks from 0, rising, of the positives among what is not junk; int64 (P,).

    Args:
        scores: (M,), higher is nearer. Equal ones keep their order.
        positive, junk: bool (M,); no item is both.
    """
    order = (-scores).argsort(stable=True)  # faster on a CPU than descending
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


def measures(ranks: Tensor, cutoffs: list[int]) -> Tensor:
    """AP, then recall at each k, then precision at each, of rising ranks; NaN without a positive.

    Precision at k is that of the first k, or of those up to the last positive if they are fewer.

    Returns:
        Float64 (1 + 2K,).
    """
    if not len(ranks):
        return torch.full((1 + 2 * len(cutoffs),), math.nan, dtype=torch.float64)
    taken = torch.tensor(cutoffs, device=ranks.device).clamp(max=ranks[-1] + 1)
    hits = (ranks < taken[:, None]).sum(1).double()
    return torch.cat([area(ranks)[None], (hits > 0).double(), hits / taken])


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
    found = torch.zeros(len(names), len(queries), 1 + 2 * len(args.k), dtype=torch.float64)
    for start in chunks[world.part(len(chunks))]:
        some_queries = queries[start : start + args.chunk].to(world.device)
        for query, scores in enumerate(similarities(some_queries, database), start):
            found[:, query] = math.nan
            for name, (positive, junk) in relevance(query).items():
                ranks = positive_ranks(scores, positive, junk)
                found[names.index(name), query] = measures(ranks, args.k)
    return comm.sum_over_processes(found)


def relevance_of(truth: dict, count: int, device: torch.device, query: int) -> dict:
    """What `measure` asks for, of lists of rows among `count` (`common/retrieval_sets.py`)."""
    masks = {name: torch.zeros(2, count, dtype=torch.bool, device=device)
             for name, by_query in truth.items() if query in by_query}
    for name, both in masks.items():
        for mask, rows in zip(both, truth[name][query], strict=True):
            mask[torch.from_numpy(rows).to(device)] = True
    return masks


def relevance_of_classes(labels: Tensor, asked: Tensor, leave_one_out: bool, query: int) -> dict:
    """What `measure` asks for, of classes of the database (N,) and of queries (M,)."""
    positive, junk = labels == asked[query], torch.zeros_like(labels, dtype=torch.bool)
    if leave_one_out:
        positive[query], junk[query] = False, True
    return {"class": (positive, junk)}


def evaluate(found: features.Features, source: features.Source) -> dict:
    """Measures of one backbone's features."""
    database, queries, args, world = found.train, found.test, source.args, source.world
    if args.leave_one_out:
        database = queries = getattr(found, args.leave_one_out)
    n, m = (len(next(iter(split.layers.values()))) for split in (database, queries))
    if truth := getattr(source.test, "truth", None):
        names, relevance = list(truth), partial(relevance_of, truth, n, world.device)
    elif database.labels.ndim == 1:
        labels = (torch.from_numpy(split.labels).to(world.device) for split in (database, queries))
        names, relevance = ["class"], partial(relevance_of_classes, *labels, args.leave_one_out)
    else:
        raise comm.RunError(f"{found.checkpoint}: retrieval needs images of one class each")

    results, k = [], list(map(str, args.k))
    for layer in database.layers:
        rows, asked = (F.normalize(split.layers[layer].to(world.device), dim=1)
                       for split in (database, queries))
        for name, values in zip(names, measure(asked, rows, relevance, names, args, world),
                                strict=True):
            values = values[~values[:, 0].isnan()]
            if not len(values):
                raise comm.RunError(f"{found.checkpoint}: of {m} queries ({name}) none has a "
                                    f"relevant one among the {n} images")
            ap, *shares = values.mean(0).tolist()
            results.append({
                "layer": layer, "relevant": name, "map": ap,
                "recall": dict(zip(k, shares, strict=False)),
                "precision": dict(zip(k, shares[len(k):], strict=True)),
                "num_queries": len(values)})
    if not truth and len(values) < m:
        source.say(f"warning: {found.checkpoint}: {m - len(values)} of {m} queries have no "
                   f"relevant one among the {n} images and do not count")
    return {"map": results[0]["map"], "results": results, "num_train": n, "num_test": m}


# --------------------------------------------------------------------------------------------- main


def main(args):
    world = comm.setup(args.device, deterministic=True)
    by = f", whitened by {args.whiten} ({args.whiten_dim or 'all'} dimensions)"
    pooled = (f", pool {args.pool or 'cls or avg'}{f' of p {args.p:g}' * (args.pool == 'gem')}, "
              f"scales {' '.join(f'{scale:g}' for scale in args.scales)}{by * bool(args.whiten)}")
    comm.print_main("retrieval by cosine" + ("" if args.features else pooled))
    table = []
    # 1. Vectors, 2. whitened; 3. ranks and 4. their measures
    for source in features.sources(
            args, world, interpolation="bicubic", crop=partial(step_of, args),
            open_splits=partial(open_sets, args), described=partial(described, args)):
        source = dataclasses.replace(source, protocol=source.protocol + pooled)  # of stored ones
        runs = [evaluate(describe(source, backbone, args), source)
                for backbone in source.backbones()]
        table.append({"checkpoint": source.name, **features.mean_of(runs)})

    measure, short = ("precision", "mP") if args.data in SETS else ("recall", "recall")
    several = [key for key in ("layer", "relevant")
               if any(len({r[key] for r in row["results"]}) > 1 for row in table)]
    columns = ["checkpoint", "mAP", *(f"{short}@{k}" for k in dict.fromkeys(args.k)), "queries"]
    features.print_table(columns, [
        [" ".join([row["checkpoint"], *(r[key] for key in several)]), f"{r['map']:.3f}",
         *(f"{share:.3f}" for share in r[measure].values()), str(r["num_queries"])]
        for row in table for r in row["results"]])
    how = {} if args.features else {name: getattr(args, name) for name in (
        "pool", "p", "scales", "max_side", "whiten", "whiten_dim")}
    features.print_json({"eval": "retrieval", "leave_one_out": args.leave_one_out, **how,
                         **table[-1], "checkpoints": table})


if __name__ == "__main__":
    sys.exit(comm.launch(main, parse_args()))
