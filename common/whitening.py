"""Principal axes of the rows of all processes, and whitening with them."""

import torch
from torch import Tensor

from common import distributed as comm

ROWS = 8192  # that are raised to float64 at a time


@torch.no_grad()
def principal_axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), variances (d,), the largest first, and their axes (d, d) in columns; float64.

    Args:
        x: (n, d), this process's part of the rows, or on every process all of them, which gives the
            same.
    """
    parts = x.split(ROWS)
    count = comm.sum_over_processes(torch.tensor(len(x), device=x.device)).double()
    mean = comm.sum_over_processes(sum(part.double().sum(0) for part in parts)) / count
    centred = (part.double() - mean for part in parts)
    covariance = comm.sum_over_processes(sum(part.T @ part for part in centred)) / count
    variances, axes = torch.linalg.eigh(covariance)
    variances, axes = variances.flip(0), axes.flip(1).contiguous()  # NCCL broadcasts no other
    comm.copy_from_first(variances, axes)  # signs, and rounding on another kind of device
    return mean, variances, axes


def whitening(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean (d,) and projection (d, dim) of rows (n, d) to axes of unit variance.

    Used as (x - mean) @ projection; axes by falling variance, signs are free. A variance below 1e-5
    of the largest is taken for that, one of equal rows for 1e-30. Of x's dtype but float32 at
    least, computed in float64.
    """
    mean, variances, axes = principal_axes(x)
    floor = (1e-5 * variances[0]).clamp(min=1e-30)
    projection = (axes * variances.maximum(floor).rsqrt())[:, :dim]
    dtype = comm.upcast(x[:0]).dtype
    return mean.to(dtype), projection.to(dtype)
