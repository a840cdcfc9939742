"""Optimisers with a trust ratio, parameter groups, schedules, precision."""

import contextlib
import math

import numpy as np
import torch
from torch import Tensor, nn


class _TrustRatioSGD(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled by a trust ratio for each tensor.

    Never waits for the device. A subclass defines `factors`: the (a, b) of each tensor in
    buffer = momentum buffer + a grad + b param.
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
            if params:
                self.update(params, [p.grad for p in params], group)
        return loss

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict):
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        decay = group["weight_decay"] if group["decay"] else 0.0
        if group["adapt"]:
            of_grads, of_params = self.factors(params, grads, decay, group["trust_coefficient"])
            torch._foreach_addcmul_(buffers, of_grads, grads)  # few kernels, the factors first
            if decay:
                torch._foreach_addcmul_(buffers, of_params, params)
        else:
            torch._foreach_add_(buffers, grads)
            if decay:
                torch._foreach_add_(buffers, params, alpha=decay)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])


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

    def factors(self, params, grads, decay, trust_coefficient):
        p_norms = torch.stack(torch._foreach_norm(params))
        decayed = torch._foreach_add(grads, params, alpha=decay) if decay else grads
        d_norms = torch.stack(torch._foreach_norm(decayed))
        moves = (p_norms > 0) & (d_norms > 0)
        q = torch.where(moves, trust_coefficient * p_norms / d_norms, 1)
        return q.unbind(), (q * decay).unbind()


class LARC(_TrustRatioSGD):
    """The trust ratio of SwAV and DeepCluster v2: on every parameter, biases and norms included.

    q = trust_coefficient ||p|| / (||g|| + wd ||p|| + 1e-8);  d = q (g + wd p), but the raw gradient
    without decay if either norm is 0;  buffer = momentum buffer + d;  p = p - lr buffer.

    Reference: NVIDIA Apex, LARC with clip=False.
    """

    def factors(self, params, grads, decay, trust_coefficient):
        p_norms, g_norms = (torch.stack(torch._foreach_norm(x)) for x in (params, grads))
        moves = (p_norms > 0) & (g_norms > 0)
        q = trust_coefficient * p_norms / (g_norms + decay * p_norms + 1e-8)
        return torch.where(moves, q, 1).unbind(), torch.where(moves, q * decay, 0).unbind()


def split_by_dimension(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with two or more dimensions, and those with fewer (biases, norms)."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]


def warmup_cosine(*, start: float, base: float, final: float, warmup_steps: int, total_steps: int,
                  warmup_endpoint: bool) -> list[float]:
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


def cosine(first: float, last: float, total_steps: int) -> list[float]:
    """A value for every step on half a cosine, which would reach `last` at step total_steps."""
    return warmup_cosine(start=first, base=first, final=last, warmup_steps=0,
                         total_steps=total_steps, warmup_endpoint=True)


def precision(amp: str, device: torch.device):
    """What `--amp` means on a device: a context to compute in, and the gradient scaler.

    "auto" is bfloat16 on CUDA devices that have it, float16 on older ones, float32 on the CPU.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if dtype is None:
        return contextlib.nullcontext, scaler
    return lambda: torch.autocast(device.type, dtype), scaler


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group; a group's `lr_scale`, if it has one, multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def lr_by_epoch(lr: float, schedule: str | list[float], epochs: int, warmup_epochs: int,
                steps_per_epoch: int, final: float = 0.0, start: float = 0.0, gamma: float = 0.1
                ) -> list[float]:
    """A rate for every step that changes once an epoch, but for the linear warm-up from `start`.

    "cosine" falls from lr towards final x lr; a list of epochs multiplies by gamma at each.
    """
    rates, warmup = [], warmup_epochs * steps_per_epoch
    for step in range(epochs * steps_per_epoch):
        epoch = step // steps_per_epoch
        if step < warmup:
            rates.append(start + (lr - start) * step / warmup)
        elif schedule == "cosine":
            rates.append(lr * (final + (1 - final) * (1 + math.cos(math.pi * epoch / epochs)) / 2))
        else:
            rates.append(lr * gamma ** sum(epoch >= at for at in schedule))
    return rates
