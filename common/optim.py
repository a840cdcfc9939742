"""Optimisers with a trust ratio, parameter groups, schedules, precision."""

import contextlib

import numpy as np
import torch
from torch import nn


class _TrustRatioSGD(torch.optim.Optimizer):
    """SGD whose update of each tensor is scaled by a trust ratio, without waiting for the device.

    A subclass defines `directions`: the scaled gradients that enter the momentum buffers.
    """

    def __init__(self, params, lr, momentum, weight_decay, trust_coefficient):
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay,
            trust_coefficient=trust_coefficient, decay=True, adapt=True,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step with the gradients in `.grad`; tensors without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = self.directions(params, [p.grad for p in params], group)
            buffers = []
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(self.state[p]["momentum_buffer"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


class LARS(_TrustRatioSGD):
    """Layer-wise adaptive rate scaling, as SimCLR, Barlow Twins and MAE's linear probe use it.

    d = g + wd p;  q = trust_coefficient ||p|| / ||d||, 1 if either norm is 0;
    buffer = momentum buffer + q d;  p = p - lr buffer. The learning rate is outside the buffer, so
    that a changed rate acts at once.

    Args:
        params: tensors or groups. A group with `decay=False` has no weight decay, one with
            `adapt=False` has q = 1: biases and norms, in all the papers.

    Reference: You et al., arXiv 1708.03888, algorithm 1 (with the rate inside the buffer there).
    """

    def __init__(self, params, lr, momentum, weight_decay, trust_coefficient):
        super().__init__(params, lr, momentum, weight_decay, trust_coefficient)

    def directions(self, params, grads, group):
        decay = group["weight_decay"] if group["decay"] else 0
        d = list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads
        if not group["adapt"]:
            return d
        p_norm, d_norm = torch._foreach_norm(params), torch._foreach_norm(d)
        ratios = [
            torch.where((p > 0) & (q > 0), group["trust_coefficient"] * p / q, 1)
            for p, q in zip(p_norm, d_norm, strict=True)
        ]
        return torch._foreach_mul(d, ratios)


class LARC(_TrustRatioSGD):
    """The trust ratio of SwAV and DeepCluster v2: on every parameter, biases and norms included.

    q = trust_coefficient ||p|| / (||g|| + wd ||p|| + 1e-8);  d = q (g + wd p), but the raw gradient
    without decay if either norm is 0;  buffer = momentum buffer + d;  p = p - lr buffer.

    Reference: NVIDIA Apex, LARC with clip=False.
    """

    def __init__(self, params, lr, momentum, weight_decay, trust_coefficient):
        super().__init__(params, lr, momentum, weight_decay, trust_coefficient)

    def directions(self, params, grads, group):
        decay = group["weight_decay"] if group["decay"] else 0
        if not group["adapt"]:
            return list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads
        scaled = []
        norms = zip(torch._foreach_norm(params), torch._foreach_norm(grads), strict=True)
        for p, g, (p_norm, g_norm) in zip(params, grads, norms, strict=True):
            moves = (p_norm > 0) & (g_norm > 0)
            q = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + 1e-8)
            scaled.append(torch.addcmul(g * torch.where(moves, q, 1), p, q * decay * moves))
        return scaled


def split_by_dimension(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with two or more dimensions, and those with fewer (biases, norms)."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]


def warmup_cosine(
    *, start: float, base: float, final: float, warmup_steps: int, total_steps: int,
    warmup_endpoint: bool,
) -> list[float]:
    """A value for every step: linear from start to base, then a cosine to final.

    The cosine begins at `base` right after the warm-up and would reach `final` at step total_steps,
    one after the last. With warmup_endpoint the warm-up's last step is `base` already, so that it
    stands twice (SwAV, DINO); without, the warm-up would reach it one step later (SimCLR, MAE).
    """
    if warmup_steps > total_steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps in a run of {total_steps}")
    warmup = np.linspace(start, base, warmup_steps, endpoint=warmup_endpoint)
    t = np.arange(total_steps - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = final + (base - final) * (1 + np.cos(np.pi * t)) / 2
    return [*warmup.tolist(), *cosine.tolist()]


def precision(amp: str, device: torch.device):
    """What `--amp` means on a device: a context to compute in, and the gradient scaler.

    "auto" is bfloat16 on CUDA devices that have it, float16 on older ones, float32 on the CPU.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if dtype is None:
        return contextlib.nullcontext, scaler
    return lambda: torch.autocast(device.type, dtype), scaler
