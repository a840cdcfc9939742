"""k-means by distance over all processes, each of which has a part of the rows.

What it needs of other processes are sums of whole numbers, so neither their number nor any order
changes a mean. An empty cluster takes half of one of the largest.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed as comm

ROWS = 8192  # that are worked on at a time


def own_part(x: Tensor) -> Tensor:
    """This process's contiguous part of rows that are the same on every process."""
    return x.tensor_split(comm.size())[comm.rank()]


def join_parts(part: Tensor, count: int) -> Tensor:
    """All `count` rows, on every process, of which each has its `own_part`."""
    whole = part.new_zeros(count, *part.shape[1:])
    own_part(whole).copy_(part)
    return comm.sum_over_processes(whole)


@torch.no_grad()
@comm.outside_autocast
def nearest_centroids(x: Tensor, centroids: Tensor) -> Tensor:
    """The row (n,) of the centroids (K, D) at the smallest distance of each row of x (n, D)."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        import faiss  # after torch, and never in a loader process: the other order can hang

        _, rows = faiss.knn(x.contiguous().numpy(), centroids.contiguous().numpy(), 1)
        return torch.from_numpy(rows)[:, 0]
    half = centroids.square().sum(1) / 2
    return torch.cat([(part @ centroids.T - half).argmax(1) for part in x.split(ROWS)])


@torch.no_grad()
def cluster_means(x: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Average the rows of all processes by label; the host does not wait.

    Args:
        x: finite (n, D), this process's part of the rows.
        labels: int64 (n,), in [0, K).
        centroids: (K, D), what an empty cluster keeps.

    Returns:
        Means (K, D) and numbers of rows int64 (K,), equal on every process. The means are exact up
        to 2^-60 of the largest number times the number of rows.
    """
    peak = x.abs().amax() if len(x) else x.new_zeros(())
    peaks, counts = comm.all_gather_no_grad(
        torch.stack([peak.double(), torch.full_like(peak, len(x), dtype=torch.float64)])[None]).T
    # Times a power of two, and rounded: all rows together stay below 2^61.
    scale = 2.0 ** (61 - torch.frexp(peaks.amax() * counts.sum()).exponent).double()
    sums = torch.zeros(len(centroids), x.shape[1] + 1, dtype=torch.int64, device=x.device)
    for part, rows in zip(x.split(ROWS), labels.split(ROWS), strict=True):
        sums.index_add_(0, rows, F.pad((part.double() * scale).round().long(), (0, 1), value=1))
    sums, sizes = comm.sum_over_processes(sums).tensor_split([-1], dim=1)
    means = sums.double() / scale / sizes.clamp(min=1)
    return torch.where(sizes > 0, means, centroids).to(centroids.dtype), sizes[:, 0]


def beside(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Two points beside each centroid (..., D), to split its cluster by."""
    signs = 1 - 2 * (torch.arange(centroids.shape[-1], device=centroids.device) % 2)
    return centroids * (1 + signs / 1024), centroids * (1 - signs / 1024)


@torch.no_grad()
def first_centroids(x: Tensor, num_clusters: int, draw: np.random.Generator) -> Tensor:
    """Draw K different rows (K, D) of all processes, equal on every process.

    Args:
        x: (n, D), this process's part of the rows; n may differ among processes, and be 0.
        num_clusters: K, at most as many as there are rows.
        draw: in the same state on every process.
    """
    counts = comm.all_gather_no_grad(torch.tensor([len(x)], device=x.device)).tolist()
    generator = torch.Generator().manual_seed(int(draw.integers(2**63)))
    chosen = torch.randperm(sum(counts), generator=generator)[:num_clusters].to(x.device)
    chosen -= sum(counts[: comm.rank()])
    here = (chosen >= 0) & (chosen < len(x))
    centroids = x.new_zeros(num_clusters, x.shape[1])
    centroids[here] = x[chosen[here]]
    return comm.sum_over_processes(centroids)  # each row is on one process


@torch.no_grad()
def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Cluster rows by distance.

    Args:
        x: finite (n, D), this process's part of the rows; n may differ among processes, and be 0.
        centroids: (K, D), to start from, equal on every process.
        iterations: assignments followed by new centroids, fewer if none moves any more; one more
            assignment comes last.

    Returns:
        Centroids (K, D), equal on every process; clusters int64 (n,) of the rows here. The largest
        clusters give half of theirs to empty ones, which may stay empty at the end.
    """
    for _ in range(iterations):
        moved, sizes = cluster_means(x, nearest_centroids(x, centroids), centroids)
        order = sizes.argsort(descending=True, stable=True)
        large, small = (rows[: len(centroids) // 2] for rows in (order, order.flip(0)))
        empty = (sizes[small] == 0)[:, None]
        one, other = beside(moved[large])
        moved[large] = torch.where(empty, one, moved[large])
        moved[small] = torch.where(empty, other, moved[small])
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids, nearest_centroids(x, centroids)
