"""Time of DeepCluster v2's k-means beside faiss's own, and what each reaches.

    python benchmarks/kmeans.py

50,000 random unit rows of 128 numbers, ten iterations from the same start, in turn; median of the
ratios of the pairs. The objective is the sum of the rows' cosines with their centroids.
"""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faiss  # noqa: E402
import torch  # noqa: E402

from deepcluster_v2 import spherical_kmeans  # noqa: E402

ROWS, WIDTH, ITERATIONS, PAIRS = 50_000, 128, 10, 5


def main():
    faiss.omp_set_num_threads(torch.get_num_threads())
    x = torch.nn.functional.normalize(torch.randn(ROWS, WIDTH), dim=1)
    results = []
    for clusters in (300, 3000):
        ratios, objectives, seconds = [], [], []
        for pair in range(PAIRS):
            generator = torch.Generator().manual_seed(pair)
            init = x[torch.randperm(ROWS, generator=generator)[:clusters]]
            generator = torch.Generator().manual_seed(pair)
            start = time.perf_counter()
            centroids, nearest = spherical_kmeans(x, clusters, ITERATIONS, generator)
            ours = time.perf_counter() - start
            found = float((x * centroids[nearest]).sum())
            start = time.perf_counter()
            peer = faiss.Kmeans(WIDTH, clusters, niter=ITERATIONS, spherical=True,
                                max_points_per_centroid=ROWS, min_points_per_centroid=1)
            peer.train(x.numpy(), init_centroids=init.numpy())
            theirs = time.perf_counter() - start
            wanted = float(peer.index.search(x.numpy(), 1)[0].sum())
            ratios.append(ours / theirs)
            objectives.append(found / wanted)
            seconds.append((ours, theirs))
        row = {"clusters": clusters, "ours_s": statistics.median(s[0] for s in seconds),
               "faiss_s": statistics.median(s[1] for s in seconds),
               "ours_over_faiss": [statistics.median(ratios), min(ratios), max(ratios)],
               "objective_over_faiss": statistics.median(objectives)}
        results.append(row)
        print(f"{clusters:>5} clusters: ours {row['ours_s']:.2f} s, faiss {row['faiss_s']:.2f} s, "
              f"ratio {row['ours_over_faiss'][0]:.2f} ({min(ratios):.2f}-{max(ratios):.2f}), "
              f"objective {row['objective_over_faiss']:.4f} of faiss's", flush=True)
    print(json.dumps({"benchmark": "kmeans", "machine": platform.machine(),
                      "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "faiss": faiss.__version__, "results": results}))


if __name__ == "__main__":
    main()
