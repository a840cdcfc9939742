"""Processes: joining them, the collectives with and without gradient, SyncBN, failing together.

Plain torchrun and DDP. Without torchrun's environment every function here is the identity of one
process, so `python simclr.py`, a debugger and a notebook work unchanged.

The gradient contract of the repository: the gradient that DDP averages over processes equals the
gradient of the same loss on the joined batch in one process. A loss that looks at other processes'
rows keeps it by gathering or summing them with `all_gather_with_grad` or `all_reduce_with_grad`.
"""

import contextlib
import functools
import os
import shutil
import signal
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunError(Exception):
    """An error that the user can mend: its message is one line with the value and the remedy."""


@dataclass(frozen=True)
class World:
    """Who this process is: its rank among `size` processes, and the device it trains on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's contiguous part of so many things."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


def setup(device: str = "auto", deterministic: bool = False) -> World:
    """Join the process group that torchrun describes, if any, and choose the device.

    Args:
        device: "auto" (CUDA where there is one), "cuda" or "cpu".
        deterministic: ask torch for deterministic kernels (slower on CUDA).

    Raises:
        RunError: "cuda" was asked for and there is none, or fewer GPUs than processes; the
            environment describes no group of processes, or none that can be joined.
    """
    if environment_fault():
        raise RunError(environment_fault())
    local_rank = env_int("LOCAL_RANK", 0)
    local_size = max(env_int("LOCAL_WORLD_SIZE", 1), local_rank + 1)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    # Slurm's --gpus-per-task=1 shows each process its own GPU alone.
    several = min(local_size, env_int("WORLD_SIZE", 1)) > 1
    one_each = kind == "cuda" and several and torch.cuda.device_count() == 1
    target = torch.device(kind)
    if kind == "cuda":
        target = torch.device(kind, 0 if one_each else local_rank)
        if not torch.cuda.is_available():
            raise RunError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
        if local_size > torch.cuda.device_count() and not one_each:
            raise RunError(f"{local_size} processes need a GPU each and there are "
                           f"{torch.cuda.device_count()}; lower --nproc_per_node or pass --device "
                           "cpu")
        torch.cuda.set_device(target)
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing reads it
    if env_int("WORLD_SIZE", 1) > 1 and not dist.is_initialized():
        # gloo beside NCCL, in one group: flags on the CPU are exchanged without touching the GPU.
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        except (RuntimeError, ValueError, OverflowError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            message = (f"process {env_int('RANK', 0)} cannot join the others at {address}: "
                       f"{str(error).splitlines()[0]}")
            if not prints():
                print_error(message)
            raise RunError(message) from error
    if one_each:
        cards = all_gather_objects(str(torch.cuda.get_device_properties(target).uuid))
        if len(set(cards)) < len(cards):
            raise RunError(f"{len(cards)} processes need a GPU each, and several see the same one "
                           "alone; lower --nproc_per_node, or let each see all or one of its own")
    return World(rank(), size(), target)


def env_int(name: str, missing: int) -> int:
    """A number of torchrun's environment; unset and empty are the same."""
    value = os.environ.get(name, "").strip()
    return int(value) if value.isdecimal() else missing


def environment_fault() -> str | None:
    """What keeps the environment from describing this process among others, if anything.

    Platforms set some of torchrun's variables without it. Alone, none of them makes a group.
    """
    given = {name: os.environ.get(name, "").strip() for name in (
        "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "LOCAL_RANK")}
    remedy = "; start with torchrun, or unset what it would set: " + " ".join(given)
    for name, value in given.items():
        if name == "MASTER_PORT" and env_int("WORLD_SIZE", 1) == 1:  # of a service named master
            continue
        if value and name != "MASTER_ADDR" and not value.isdecimal():
            return f"{name} is {value!r} in the environment, not a whole number{remedy}"
    for number, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if number == "LOCAL_RANK" and not given[of]:
            continue
        if env_int(number, 0) >= max(1, env_int(of, 1)):
            return (f"{number} is {given[number]} in the environment and {of} is "
                    f"{given[of] or 'not set'}{remedy}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not given[name]]
    if env_int("WORLD_SIZE", 1) > 1 and missing and not dist.is_initialized():
        return (f"WORLD_SIZE is {given['WORLD_SIZE']} in the environment and {' '.join(missing)} "
                f"not set{remedy}")
    return None


def prints() -> bool:
    """Whether this process prints: the first of a group, and any that belongs to none."""
    return env_int("RANK", 0) == 0 or environment_fault() is not None


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launch(main, args) -> int:
    """Run `main(args)` as a program.

    Returns:
        The exit status: 0, or 2 after one line that names the error, or 130 if interrupted, or 141
        if whoever reads the output has left before its end (`| head`).
    """
    print_any_character()
    try:
        main(args)
        status = 0
    except RunError as error:  # raised on every process: see `same_error_on_all_ranks`
        print_main(f"error: {error}", sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
        if dist.is_initialized():  # others may wait in a collective, until torchrun ends them
            os._exit(status)
    except torch.OutOfMemoryError:  # of this process alone, likewise
        print_error(f"process {rank()} is out of GPU memory; lower --batch-size or pass --amp bf16")
        os._exit(2)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch's word for one that is dead
            raise
        reason = str(error).splitlines()[0].removesuffix(".")
        print_error(f"process {rank()} has lost a loader process ({reason}): shared memory "
                    f"({free_bytes('/dev/shm'):,} bytes free in /dev/shm; Docker: --shm-size) or "
                    "memory is short; lower --workers (0: none) or --batch-size")
        status = 2
        if dist.is_initialized():
            os._exit(status)
    except OSError as error:  # raised by `print`?
        lost = end_output("\n")
        if lost is None or (lost.errno, error.filename) != (error.errno, None):
            raise
        status = 128 + signal.SIGPIPE
        if not isinstance(lost, BrokenPipeError):
            print_main(f"error: cannot print the results: {lost.strerror or error}", sys.stderr)
            status = 2
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()  # leaving it to the interpreter's exit can abort
    end_output()
    return status


def print_error(message: str) -> None:
    """Print an error of this process, of which the others may not know."""
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)


def print_any_character() -> None:
    """Have \\x escapes printed for what a terminal or log cannot take, such as names of files."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's takes all
            stream.reconfigure(errors="backslashreplace")


def end_output(last: str = "") -> OSError | None:
    """Write what waits to be printed, and a last word. If nobody takes it, return the error.

    Then it is dropped: the interpreter would try once more at its end, print a traceback and change
    the exit status.
    """
    try:
        print(last, end="", flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # no file of the system
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return error
    return None


def print_main(message: str, stream=None, transient: bool = False):
    """Print a line on one process. On a terminal, a transient one gives way to the next."""
    stream = stream or sys.stdout
    if stream is None or not prints():  # None: started with its output closed
        return
    with contextlib.suppress(OSError):  # a terminal that has gone away does not end a run
        if stream.isatty():
            print(f"\r\x1b[K{message}", end="" if transient else "\n", file=stream, flush=True)
        else:
            print(message, file=stream, flush=True)


@contextlib.contextmanager
def same_error_on_all_ranks(writing: str | None = None):
    """Make an error on any process the same `RunError` on every process.

    The body holds no collective, so that a process that fails in it is not waited for by others.

    Args:
        writing: the folder that the body writes to; a failure then names path and free bytes.
    """
    kind = message = None
    try:
        yield
    except RunError as error:
        kind, message = type(error), str(error)
    except OSError as error:
        reason = error.strerror or str(error).split("\n")[0]
        kind, message = RunError, f"{error.filename or writing or 'input or output'}: {reason}"
        if writing is not None:
            message = f"cannot write {message} ({free_bytes(writing):,} bytes free)"
    failures = [(k, m) for k, m in all_gather_objects((kind, message)) if k is not None]
    if failures:
        kind, message = failures[0]
        raise kind(message)


def free_bytes(folder: str) -> int:
    """Free space where a folder is, or will be."""
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder or ".").free


# -------------------------------------------------------------------------------------- collectives


def _gather(x: Tensor) -> Tensor:
    """Rows (N, ...) of all processes, in rank order, of a contiguous tensor."""
    joined = x.new_empty(size() * len(x), *x.shape[1:])
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # by torch's version
    gather(joined, x)
    return joined


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        return _gather(x)

    @staticmethod
    def backward(ctx, grad):
        grad = sum_over_processes(grad.contiguous())  # every process's loss depends on our rows
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return sum_over_processes(x)

    @staticmethod
    def backward(ctx, grad):
        return sum_over_processes(grad.contiguous())


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Concatenate the rows (N, ...) of all processes in rank order to (W*N, ...).

    The gradient of a row is the sum over processes of the gradients of their losses.
    """
    return _AllGather.apply(x.contiguous()) if size() > 1 else x


def all_reduce_with_grad(x: Tensor) -> Tensor:
    """Sum a tensor over processes; its gradient is summed over processes as well."""
    return _AllReduce.apply(x.contiguous()) if size() > 1 else x


@torch.no_grad()
def all_gather_no_grad(x: Tensor) -> Tensor:
    """Concatenate the rows (N, ...) of all processes in rank order to (W*N, ...), detached."""
    x = x.detach()
    return x if size() == 1 else _gather(x.contiguous())


@torch.no_grad()
def broadcast_rows(x: Tensor, bounds: list[int], piece: int = 2**24) -> None:
    """Complete a CPU tensor (n, ...) of which every process holds some rows, in place.

    No process needs more memory than for the tensor itself and a piece of it.

    Args:
        x: contiguous; rows bounds[r] to bounds[r + 1] are filled in on process r.
        bounds: W + 1 row numbers from 0 to n, in rising order.
        piece: numbers sent at a time.
    """
    if size() == 1:
        return
    rows = max(1, piece // max(1, x[:1].numel()))
    for sender in range(size()):
        for part in x[bounds[sender] : bounds[sender + 1]].split(rows):
            if len(part):
                dist.broadcast(part, sender)


@torch.no_grad()
def copy_from_first(*tensors: Tensor) -> None:
    """Give every process what the first one has, in place, of contiguous tensors."""
    for x in tensors if size() > 1 else ():
        dist.broadcast(x, 0)


@torch.no_grad()
def sum_over_processes(x: Tensor) -> Tensor:
    """Add a tensor over processes, detached."""
    total = x.detach().clone()
    if size() > 1:
        dist.all_reduce(total)
    return total


@torch.no_grad()
def mean_over_processes(x: Tensor) -> Tensor:
    """Average a tensor over processes, detached."""
    return x.detach() if size() == 1 else sum_over_processes(x) / size()


def average_gradients(module: nn.Module) -> None:
    """Average a module's gradients over processes, as DDP does."""
    for parameter in module.parameters():
        parameter.grad = mean_over_processes(parameter.grad)


def all_gather_objects(value) -> list:
    """Collect one picklable value from every process, in rank order."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Each flag is true on every process as soon as it is true on one (one small exchange)."""
    votes = all_gather_no_grad(torch.tensor([flags], dtype=torch.uint8))
    return tuple(bool(vote) for vote in votes.amax(0).tolist())


def smallest(count: int) -> int:
    """The least of the processes' whole numbers (one small exchange)."""
    return count if size() == 1 else int(all_gather_no_grad(torch.tensor([count])).min())


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it, which takes pinned memory."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def upcast(x: Tensor) -> Tensor:
    """To float32, whatever the autocast made of it; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def outside_autocast(function):
    """Have a function compute in the precision of what it is given, wherever it is called.

    A decorator: autocast would round the factors of matrix products to bfloat16. Call
    `backward` outside the region, as torch advises: inside, its products are rounded all the same.
    """
    @functools.wraps(function)
    def exact(*args, **kwargs):
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)
    return exact


# -------------------------------------------------------------------------- synchronised batch norm


# Custom operators, which torch.compile treats as opaque calls. Each of the three has kernels for
# the GPU, those of torch's SyncBatchNorm (which waits for the GPU three times a layer to ask for
# numbers of rows that here are equal), and for the CPU, for which torch has none.


@torch.library.custom_op("common::batch_statistics", mutates_args=("running_mean", "running_var"),
                         device_types="cuda")
def _statistics(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
                momentum: float, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) (C,) of the joined batch; running ones follow."""
    own = torch.stack(torch.batch_norm_stats(x, eps))
    means, inv_stds = _gather(own[None]).unbind(1)
    counts = own.new_full((size(),), x.numel() / x.shape[1])
    return torch.batch_norm_gather_stats_with_counts(  # the first tells the dtype alone
        own, means, inv_stds, running_mean, running_var, momentum, eps, counts)


@_statistics.register_kernel("cpu")
def _(x, running_mean, running_var, momentum, eps):
    own = torch.stack(torch.batch_norm_update_stats(upcast(x), None, None, 0.0))
    means, variances = _gather(own[None]).unbind(1)
    mean = means.mean(0)
    var = variances.mean(0) + (means - mean).square().mean(0)
    if running_mean is not None:
        count = size() * x.numel() / x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
    return mean, (var + eps).rsqrt()


@torch.library.custom_op("common::normalize_batch", mutates_args=(), device_types="cuda")
def _normalize(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inv_std: Tensor) -> Tensor:
    """Normalise by statistics that are functions of all processes' x."""
    return torch.batch_norm_elemt(x, weight, bias, mean, inv_std, 0.0)


@_normalize.register_kernel("cpu")
def _(x, weight, bias, mean, inv_std):
    var = inv_std.square().reciprocal_()
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, 0.0, False)


@torch.library.custom_op("common::normalize_batch_backward", mutates_args=(), device_types="cuda")
def _normalize_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inv_std: Tensor
                        ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, over the joined batch, and of weight and bias, over this process's rows."""
    grad = grad.contiguous(memory_format=_memory_format(x))  # the kernels assume it
    *sums, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
        grad, x, mean, inv_std, weight, True, True, True)
    sums = torch.stack(sums)  # of grad, and of grad (x - mean)
    dist.all_reduce(sums)
    counts = torch.full((size(),), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
    grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inv_std, weight, *sums, counts)
    return grad_x, grad_weight, grad_bias


@_normalize_backward.register_kernel("cpu")
def _(grad, x, weight, mean, inv_std):
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide, grad_wide = x.to(mean.dtype), grad.to(mean.dtype)
    # Own sums of grad * x_hat and of grad, by torch's kernel: much faster than in parts.
    _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad_wide, wide, weight, None, None, mean, inv_std, True, 0.0, [False, True, True])
    # Gathered, then added: for so few numbers gloo gathers three times as fast as it reduces.
    sums = _gather(torch.stack([grad_bias, grad_weight])[None]).sum(0)
    mean_grad, mean_grad_x = sums / (size() * x.numel() / x.shape[1])
    # grad_x = scale (grad - mean_grad - x_hat mean_grad_x), in as few passes as there can be.
    scale = inv_std * weight
    offset, slope = -scale * mean_grad, -scale * inv_std * mean_grad_x
    grad_x = torch.addcmul(offset.view(shape), wide - mean.view(shape), slope.view(shape))
    return torch.addcmul(grad_x, grad_wide, scale.view(shape)).to(x.dtype), grad_weight, grad_bias


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _empty_statistics(x, *_):
    return tuple(x.new_empty(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)))


_statistics.register_fake(_empty_statistics)
_normalize.register_fake(lambda x, *_: torch.empty_like(x))
_normalize_backward.register_fake(lambda _, x, *__: (torch.empty_like(x), *_empty_statistics(x)))


def _keep(ctx, inputs, output):
    x, weight, _, mean, inv_std = inputs
    ctx.save_for_backward(x, weight, mean, inv_std)


_normalize.register_autograd(
    lambda ctx, grad: (*_normalize_backward(grad, *ctx.saved_tensors), None, None),
    setup_context=_keep)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the joined batch of all processes, on any device (torch's is CUDA only).

    Every process passes the same number of rows. Statistics are float32 or wider.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch norm needs (N, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and size() > 1):
            return super().forward(x)
        x = x.contiguous(memory_format=_memory_format(x))
        if self.track_running_stats:
            self.num_batches_tracked += 1
        mean, inv_std = _statistics(x.detach(), self.running_mean, self.running_var, self.momentum,
                                    self.eps)
        weight, bias = self.weight, self.bias
        if not self.affine:
            weight, bias = torch.ones_like(mean), torch.zeros_like(mean)
        return _normalize(x, weight, bias, mean, inv_std)


def prepare(module: nn.Module, world: World, sync_bn: bool) -> nn.Module:
    """Put a model on the device, in channels_last, with synchronised batch norm if asked for."""
    module = module.to(world.device, memory_format=torch.channels_last)
    return convert_sync_batchnorm(module) if sync_bn else module


def data_parallel(module: nn.Module) -> nn.Module:
    """The model in DDP, where there are several processes."""
    return nn.parallel.DistributedDataParallel(module) if size() > 1 else module


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every batch norm by one that shares its statistics among all processes.

    Raises:
        RunError: a batch norm does more than that.
    """
    plain = nn.modules.batchnorm._BatchNorm
    for layer in module.modules():
        if size() > 1 and isinstance(layer, plain):
            if type(layer).forward not in (plain.forward, SyncBatchNorm.forward):
                raise RunError(f"{type(layer).__name__} cannot be synchronised; pass --no-sync-bn")
            layer.__class__ = SyncBatchNorm  # parameters, statistics and modes stay as they are
    return module
