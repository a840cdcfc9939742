"""Does a cell of a backbone's map find its own place in another crop of the image?

    python benchmarks/dense.py --checkpoint random runs/moco-digits runs/densecl-digits

Two crops of a test image whose boxes are known, neither mirrored nor coloured. For every cell of
the first crop's map whose centre lies in the second one as well, the cell of the second map with
the largest cosine is looked up; it is right if the same point of the image lies in it. Printed:
the share that is right, the mean distance between point and found cell's centre (larger side, in
cells), for comparison those of a cell drawn at random ("any cell") and of the cell at the same
place of the map ("same cell": what a backbone finds that knows places in the crop and no content).
Means and standard deviations over draws of the crops. Last, one JSON object.
"""

import argparse
import json
import os
import platform
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from common import augment, distributed as comm, features, rng  # noqa: E402
from common.images import open_images  # noqa: E402
from densecl import match_cells  # noqa: E402

CPU = torch.device("cpu")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="RUN",
                        help="run folders of ResNets, or `random`")
    parser.add_argument("--data", help="images, if not those of the run")
    parser.add_argument("--limit", type=int, default=1000, help="test images at most")
    parser.add_argument("--layer", choices=("res3", "res4", "res5"), default="res5")
    parser.add_argument("--size", type=int, help="side of a crop in pixels, if not the run's")
    parser.add_argument("--scale", type=float, nargs=2, default=[0.3, 0.6],
                        help="area of a crop, in areas of the image")
    parser.add_argument("--draws", type=int, default=10, help="of the crops")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def points(boxes, grid: int) -> torch.Tensor:
    """Centres (n, L, 2) of the cells of crops with boxes (n, 4): x and y in the image's pixels."""
    boxes = torch.as_tensor(boxes, dtype=torch.float64)
    middle = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return boxes[:, None, :2] + torch.stack([x, y], -1).reshape(1, -1, 2) * boxes[:, None, 2:]


def distances(boxes, others, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From cells of the first crops to those of the second (n, L, L), along the longer side.

    In cells: up to a half, the point is in it. And whether it is in the second crop (n, L).
    """
    there = torch.as_tensor(others, dtype=torch.float64)
    at = (points(boxes, grid) - there[:, None, :2]) / there[:, None, 2:]  # (n, L, 2), of the side
    centres = points(np.array([[0, 0, 1, 1]]), grid)
    return (at[:, :, None] - centres[:, None]).abs().amax(3) * grid, ((at - 0.5).abs() < 0.5).all(2)


@torch.no_grad()
def measure(backbone, images, view, args) -> dict[str, list[float]]:
    """Share right and mean distance in each draw, of the backbone and of two that see nothing."""
    found = {}
    sizes = np.array([images.read(i)[0].size[::-1] for i in range(len(images))])
    for draw in range(args.draws):
        generator, boxes, maps = rng.philox(args.seed, rng.SAMPLE, draw), [], []
        for _ in range(2):
            (box,), colour = view.draw(generator.random((len(images), view.num_uniforms)), sizes)
            crops = np.stack([view.crop(images.read(i), [box[i]]) for i in range(len(images))])
            crops = view.finish(torch.from_numpy(crops), torch.from_numpy(colour), CPU)
            maps.append(torch.cat([features.resnet_maps(backbone, part, [args.layer])[args.layer]
                                   for part in crops.split(64)]))
            boxes.append(box)
        grid = maps[0].shape[2]
        distance, inside = distances(*boxes, grid)
        best = match_cells(*(m.flatten(2).transpose(1, 2) for m in maps))[:, :, None]
        here = torch.arange(grid**2)[None, :, None].expand_as(best)
        for name, of in {"matched": distance.gather(2, best), "any cell": distance,
                         "same cell": distance.gather(2, here)}.items():
            right = (of <= 0.5)[inside].double().mean().item()
            found.setdefault(f"{name}, right", []).append(right)
            found.setdefault(f"{name}, distance", []).append(of[inside].mean().item())
    return found | {"grid": grid}


def main(args):
    checkpoints = [features.resolve_checkpoint(name) for name in args.checkpoint]
    known = next((c.settings for c in checkpoints if c.settings), None)
    if known is None:
        sys.exit("--checkpoint random has no settings of its own; name a run beside it")
    results = {}
    for checkpoint in checkpoints:
        settings = {"patch_size": None} | known | checkpoint.settings
        images = open_images(args.data or settings["data"], "test", settings["in_chans"],
                             limit=args.limit)
        view = augment.View(args.size or settings["image_size"], [
            augment.RandomResizedCrop(args.scale, ratio=(1, 1), interpolation="bilinear"),
            augment.Normalize(settings["mean"], settings["std"])], settings["in_chans"])
        torch.manual_seed(args.seed)
        backbone = features.freeze(features.build(settings), checkpoint.weights,
                                   comm.World(0, 1, CPU))
        found = results[checkpoint.name] = measure(backbone, images, view, args)
        print(f"{checkpoint.name}: {args.layer} of {len(images)} images, {found['grid']} x "
              f"{found['grid']} cells")
        for name in ("matched", "same cell", "any cell"):
            right, far = found[f"{name}, right"], found[f"{name}, distance"]
            print(f"    {name:9}  right {np.mean(right):.3f} ±{np.std(right):.3f}   "
                  f"distance {np.mean(far):.2f}", flush=True)
    print(json.dumps({"benchmark": "dense", "date": time.strftime("%Y-%m-%d"), **vars(args),
                      "machine": platform.machine(), "torch": torch.__version__, "runs": results}))


if __name__ == "__main__":
    main(parse_args())
