"""Weighted k-nearest-neighbour classification by cosine: exact, in bounded memory."""

import math

import torch
from torch import Tensor

from common.features import share_right

EXTRA = 8  # candidates beyond k, so that rounding does not decide who is among the k
TOLERANCE = 1e-6  # cosines nearer than this are computed again in float64
SMALL_BANK = 256  # rows that are compared in float64 at once
BLOCK = 2**15  # rows of a bank on the GPU that queries are compared with at a time


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float,
                num_classes: int, self_index: Tensor | None = None, chunk: int = 2048) -> Tensor:
    """Classify queries by their k nearest bank rows.

    Args:
        bank: features (N, D), normalised here.
        labels: int64 (N,), in [0, num_classes).
        queries: features (M, D), normalised here.
        k: neighbours; clipped to N.
        temperature: a neighbour votes exp(cosine / temperature).
        self_index: int64 (M,), a bank row for each query that does not vote; -1 for none.
        chunk: queries at a time.

    Returns:
        Float64 class scores (M, num_classes); the highest is the prediction.

    Raises:
        ValueError: the temperature is so small that a vote could overflow.
    """
    if temperature < 1 / 700:
        raise ValueError(f"temperature {temperature:g} is below 1 / 700: exp(1 / it) overflows")
    bank, queries = (torch.nn.functional.normalize(x, dim=1) for x in (bank, queries))
    scores = []
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        left_out = None if self_index is None else self_index[part]
        cosines, rows = nearest(bank, queries[part], min(k, len(bank)), left_out)
        scores.append(vote(cosines, labels[rows], temperature, num_classes))
    return torch.cat(scores) if scores else bank.new_zeros(0, num_classes, dtype=torch.float64)


def count_right(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, settings: list,
                num_classes: int, self_index: Tensor | None, chunk: int,
                by_class: Tensor | None = None) -> Tensor:
    """How many queries each (k, T) of `settings` classifies correctly, and how many are undecided.

    Rows are unit rows; the other arguments are those of `knn_predict`.

    Args:
        by_class: float64 (len(settings), num_classes), to which the correct ones of each class are
            added.

    Returns:
        Float64 (2, len(settings)); undecided is where the neighbour after the k-th is as near.
    """
    counts = torch.zeros(2, len(settings), dtype=torch.float64, device=bank.device)
    most = min(max(k for k, _ in settings) + 1, len(bank))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        left_out = None if self_index is None else self_index[part]
        cosines, rows = nearest(bank, queries[part], most, left_out)
        below = cosines - cosines[:, :1].clamp(min=-1)  # votes of the nearest: 1, at any T
        for number, (k, temperature) in enumerate(settings):
            scores = vote(below[:, :k], labels[rows[:, :k]], temperature, num_classes)
            right = share_right(scores, truth[part], 1)
            counts[0, number] += right.sum()
            if by_class is not None:
                by_class[number].index_add_(0, truth[part], right)
            last, after = cosines[:, k - 1 : k], cosines[:, k : k + 1]
            if after.shape[1]:
                counts[1, number] += (last == after).sum()
    return counts


def nearest(bank: Tensor, queries: Tensor, k: int,
            self_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find each query's k nearest bank rows by cosine, nearest first, of equal ones the lower row.

    They are found in the features' own precision. Where that cannot tell one from the next, float64
    decides, so that neither a chunk's size nor the number of processes changes the result.

    Args:
        bank: unit rows (N, D).
        queries: unit rows (M, D).
        k: at most N.
        self_index: int64 (M,), a bank row for each query that does not count; -1 for none.

    Returns:
        Float64 cosines and bank rows (M, k); cosine -inf where there are fewer than k.
    """
    if len(bank) <= SMALL_BANK:
        rows = torch.arange(len(bank), device=bank.device).expand(len(queries), -1)
        cosines, rows = sort_by_similarity(queries.double() @ bank.double().T, rows, self_index)
    else:
        cosines, rows = candidates(bank, queries, min(k + EXTRA, len(bank)))
        cosines, rows = sort_by_similarity(cosines.double(), rows, self_index)
        close = (cosines[:, : k + 1].diff(dim=1) > -TOLERANCE).any(1).nonzero()[:, 0]
        for part in close.split(64):
            near = rows[part].sort(dim=1).values
            exact = (bank[near].double() @ queries[part].double()[:, :, None])[..., 0]
            left_out = None if self_index is None else self_index[part]
            cosines[part], rows[part] = sort_by_similarity(exact, near, left_out)
    return cosines[:, :k], rows[:, :k]


def sort_by_similarity(cosines: Tensor, rows: Tensor,
                       self_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sort float64 cosines and their rows (M, C), the highest first; `self_index` becomes -inf."""
    cosines = cosines.round(decimals=13)  # equal images have equal cosines, up to rounding
    if self_index is not None:
        cosines = cosines.masked_fill(rows == self_index[:, None], -math.inf)
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    return cosines, rows.gather(1, order)


def candidates(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and rows (M, k) of the bank nearest to each query, up to rounding."""
    if bank.device.type == "cpu" and bank.dtype == torch.float32:
        import faiss  # after torch, and never in a loader process: the other order can hang

        bank, queries = bank.contiguous().numpy(), queries.contiguous().numpy()
        cosines, rows = faiss.knn(queries, bank, k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(cosines), torch.from_numpy(rows)
    best, rows = queries[:, :0], torch.empty_like(queries[:, :0], dtype=torch.int64)
    for start in range(0, len(bank), BLOCK):
        found = queries @ bank[start : start + BLOCK].T
        found, places = found.topk(min(k, found.shape[1]), dim=1)
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, places + start], dim=1)
        best, places = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, places)
    return best, rows


def vote(cosines: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Class scores (M, num_classes) from the cosines and labels (M, k) of the neighbours."""
    votes = (cosines.double() / temperature).exp()  # float32 overflows below temperature 0.0113
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, labels, votes)
