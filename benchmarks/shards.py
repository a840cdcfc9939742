"""Images per second from one tar beside a folder of the same files, in pairs.

    python benchmarks/shards.py --images 2000 --side 256 --pairs 5

Makes JPEGs (smooth random fields), reads and decodes all of them in one random order in one
process, from the folder and from the tar in turn, which of them is first alternating. Warm: the
page cache holds all. Cold: the pages are given back before (posix_fadvise), as far as the system
does so; names and inodes stay cached. The median of the pairs' ratios is what to quote, of CPU
seconds where others use the machine. The last line is a JSON object.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def make(root: Path, count: int, side: int) -> None:
    """The same JPEGs in `root/folder`, 100 a class, and in `root/all.tar`."""
    rng = np.random.default_rng(0)
    with tarfile.open(root / "all.tar", "w") as tar:
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            file, name = io.BytesIO(), f"{number // 100:04d}/{number:06d}.jpg"
            small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "folder" / name).write_bytes(file.getvalue())
            tar.add(root / "folder" / name, name)


def drop(root: Path) -> None:
    """Give back the cached pages of all files."""
    for path in root.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def measure(images, order) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    for i in order:
        images.read(i)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"images_per_second": len(order) / wall, "cpu_ms_per_image": 1000 * cpu / len(order)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--where", help="folder to make the files in, on the disk to measure")
    args = parser.parse_args()
    from common.images import open_images

    with tempfile.TemporaryDirectory(dir=args.where) as name:
        root = Path(name)
        make(root, args.images, args.side)
        sources = {kind: open_images(str(root / kind), "pretrain", 3)
                   for kind in ("folder", "all.tar")}
        order = np.random.default_rng(1).permutation(args.images).tolist()
        results = {"machine": platform.platform(), "images": args.images, "side": args.side,
                   "bytes": (root / "all.tar").stat().st_size}
        for cache in ("warm", "cold"):
            pairs = []
            for number in range(args.pairs + (cache == "warm")):  # one warms up
                kinds = list(sources)[:: -1 if number % 2 else 1]
                pair = {}
                for kind in kinds:
                    if cache == "cold":
                        drop(root)
                    pair[kind] = measure(sources[kind], order)
                pairs.append(pair)
            pairs = pairs[-args.pairs :]
            for what in ("images_per_second", "cpu_ms_per_image"):
                of = {kind: statistics.median(p[kind][what] for p in pairs) for kind in sources}
                ratios = sorted(p["all.tar"][what] / p["folder"][what] for p in pairs)
                results[f"{cache} {what}"] = of | {"ratio": statistics.median(ratios),
                                                   "range": [ratios[0], ratios[-1]]}
                print(f"{cache} {what}: folder {of['folder']:.3g}, tar {of['all.tar']:.3g}, ratio "
                      f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
        print(json.dumps(results))


if __name__ == "__main__":
    main()
