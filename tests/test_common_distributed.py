import ast
import contextlib
import errno
import io
import os
import re
import socket
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import drill
from common import distributed as comm

CPU = torch.device("cpu")
two_and_four = pytest.mark.parametrize("size", [2, 4])


def own_rows(values):
    """This process's contiguous share of the rows."""
    share = len(values) // comm.size()
    return torch.from_numpy(values[comm.rank() * share : (comm.rank() + 1) * share])


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# ------------------------------------------------------------------------------- setting up, saying


def test_without_torchrun_there_is_one_process():
    world = comm.setup("cpu")
    assert (world.rank, world.size, world.device, world.is_main) == (0, 1, CPU, True)
    assert not torch.distributed.is_initialized()


def test_asking_for_cuda_where_there_is_none_names_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(comm.RunError, match="--device cuda.*use --device cpu"):
        comm.setup("cuda")
    assert comm.setup("auto").device == CPU


def test_more_processes_than_gpus_is_an_error_that_names_both(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(comm.RunError, match="8 processes.*there are 3"):
        comm.setup("cuda")


GROUP = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
         "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.fixture
def environment(monkeypatch):
    """Sets torchrun's variables to given ones, and no others."""
    def become(given):
        for name in GROUP:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
    return become


@pytest.mark.parametrize(
    "given, named",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 .* RANK MASTER_ADDR MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE is 2 .* MASTER_ADDR MASTER_PORT not set"),
        ({**GROUP, "MASTER_PORT": ""}, "MASTER_PORT not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({**GROUP, "RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1"}, "RANK is 1 .* WORLD_SIZE is not set"),
        ({**GROUP, "RANK": "2"}, "RANK is 2 .* WORLD_SIZE is 2"),
        ({**GROUP, "LOCAL_RANK": "3"}, "LOCAL_RANK is 3 .* LOCAL_WORLD_SIZE is 2"),
        ({**GROUP, "MASTER_PORT": "99999"}, "process 0 cannot join .* localhost:99999"),
    ],
)
def test_an_environment_that_makes_no_group_is_one_line_on_every_process(
    given, named, environment, capsys
):
    environment(given)
    assert comm.launch(lambda _: comm.setup("cpu"), None) == 2
    out, err = capsys.readouterr()
    assert re.search(f"^error: .*{named}", err) and err.count("\n") == 1 and out == ""


def test_a_port_alone_is_not_torchruns(environment):
    environment({"MASTER_PORT": "tcp://10.0.0.1:7077", "MASTER_ADDR": "10.0.0.1"})
    assert comm.setup("cpu").size == 1 and comm.prints()


def test_a_port_in_use_is_one_line(environment, capsys):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        environment({**GROUP, "MASTER_PORT": port})
        assert comm.launch(lambda _: comm.setup("cpu"), None) == 2
    err = capsys.readouterr().err
    assert f"localhost:{port}" in err and err.count("error: ") == 1


@pytest.mark.parametrize("given", [{"WORLD_SIZE": ""}, dict.fromkeys(GROUP, ""),
                                   {"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "0"}])
def test_an_environment_of_one_process_is_one_process(given, environment):
    environment(given)
    assert comm.setup("cpu") == comm.World(0, 1, CPU)


def test_a_process_whose_number_has_no_gpu_is_told(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environment({"LOCAL_RANK": "1"})
    with pytest.raises(comm.RunError, match="2 processes.*there are 1"):
        comm.setup("cuda")


def setup_with_one_gpu_each(cards):
    """What `setup` gives where every process sees one GPU, of the given names."""
    with mock.patch.multiple(
            torch.cuda, is_available=lambda: True, device_count=lambda: 1,
            set_device=lambda _: None,
            get_device_properties=lambda _: SimpleNamespace(uuid=cards[comm.rank()])):
        try:
            return str(comm.setup("cuda").device)
        except comm.RunError as error:
            return str(error)


def test_processes_that_see_a_gpu_of_their_own_alone_take_it(pool):
    assert pool.run(2, setup_with_one_gpu_each, ["a", "b"]) == ["cuda:0", "cuda:0"]
    for said in pool.run(2, setup_with_one_gpu_each, ["a", "a"]):
        assert "2 processes need a GPU each, and several see the same one" in said


def interrupted(_args):
    raise KeyboardInterrupt


def test_a_shell_hears_of_an_interrupt():
    assert comm.launch(interrupted, None) == 130


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_passing_line_gives_way_on_a_terminal_and_stays_elsewhere():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        comm.print_main("step 1", stream, transient=True)
        comm.print_main("step 2", stream, transient=True)
        comm.print_main("done", stream)
    assert file.getvalue() == "step 1\nstep 2\ndone\n"
    written = terminal.getvalue()
    assert written.count("\r") == 3 and written.count("\n") == 1 and written.endswith("done\n")


class Gone(io.StringIO):
    def write(self, _):
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_has_gone_away_does_not_end_a_run():
    comm.print_main("step 1", Gone())


ODD = "caf\udce9 \u00b1"  # from a name that is not UTF-8, and a sign beyond ASCII


def say_and_fail(_):
    comm.print_main(ODD)
    print(ODD)
    raise comm.RunError(ODD)


@pytest.mark.parametrize("encoding, printed", [("ascii", rb"caf\udce9 \xb1"),
                                               ("utf-8", b"caf\\udce9 \xc2\xb1")])
def test_what_a_terminal_cannot_print_is_escaped(encoding, printed, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding, errors="strict"))
    assert comm.launch(say_and_fail, None) == 2
    sys.stderr.flush()
    assert sys.stdout.buffer.getvalue() == 2 * (printed + b"\n")
    assert sys.stderr.buffer.getvalue() == b"error: " + printed + b"\n"


PROGRAMS = """
import os, sys
from common import distributed as comm
for body, output in eval(sys.argv[1]):  # each in a process that ends as Python ends
    reader, errors = os.pipe()
    if os.fork() == 0:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.exit(comm.launch(eval(body), None))
    os.close(errors)
    said = open(reader).read()
    sys.stderr.write(repr((os.waitstatus_to_exitcode(os.wait()[1]), said)) + "\\n")
"""


def printing(buffered, *programs):
    """Exit status and errors of programs (body, stdout) that print where nobody takes it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAMS, repr(programs)], cwd=drill.ROOT,
                          env=environment, text=True, capture_output=True,
                          pass_fds=sorted({output for _, output in programs}))
    return [ast.literal_eval(line) for line in done.stderr.splitlines()]


@pytest.fixture
def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_left_is_no_error_and_a_full_disk_is_one_line(buffered, broken_pipe):
    said = "lambda _: comm.print_main('progress')"
    result = "lambda _: [comm.print_main('progress'), print('result', flush=True)]"
    failure = "lambda _: open('/no/such/file')"
    with open("/dev/full", "w") if os.path.exists("/dev/full") else open(os.devnull) as full:
        silent, unread, failed, no_room, (status, errors) = printing(
            buffered, (said, broken_pipe), (result, broken_pipe), (failure, broken_pipe),
            (said, full.fileno()), (result, full.fileno()))
    assert (silent, unread, no_room) == ((0, ""), (141, ""), (0, ""))
    if os.path.exists("/dev/full"):
        assert status == 2 and errors.startswith("error: cannot print") and errors.count("\n") == 1
    assert failed[0] == 1 and "FileNotFoundError" in failed[1]  # a lost output hides no other error


def test_an_error_of_the_system_that_is_not_of_the_output_keeps_its_traceback():
    with pytest.raises(BrokenPipeError):
        comm.launch(raise_it, BrokenPipeError())


def test_a_closed_output_is_no_error():
    code = ("from common import distributed as comm; comm.print_main('progress');"
            "raise SystemExit(comm.launch(print, 1))")
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code],
                          cwd=drill.ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def spoken():
    stream = io.StringIO()
    comm.print_main("hello", stream)
    return stream.getvalue()


def test_one_process_speaks_for_all(pool):
    assert pool.run(2, spoken) == ["hello\n", ""]


# ----------------------------------------------------------------------------------------- together


def ending(failures, writing):
    """How `same_error_on_all_ranks` ends where each rank raises its own failure, or none."""
    try:
        with comm.same_error_on_all_ranks(writing):
            failure = failures[comm.rank()]
            if failure is not None:
                raise failure
        return "fine"
    except comm.RunError as error:
        return str(error)


@pytest.mark.parametrize(
    "failure, message",
    [
        (comm.RunError("--data x: no such folder"), "--data x: no such folder"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/list.txt"), "a/list.txt: No such file"),
    ],
)
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_process_is_the_same_on_all(pool, failure, message, failing):
    failures = [failure if rank == failing else None for rank in range(2)]
    assert pool.run(2, ending, failures, None) == [message] * 2


def test_of_several_errors_all_processes_name_the_first(pool):
    failures = [None, comm.RunError("one"), None, comm.RunError("two")]
    assert pool.run(4, ending, failures, None) == ["one"] * 4


def test_without_an_error_all_go_on(pool):
    assert pool.run(2, ending, [None, None], None) == ["fine"] * 2


def test_a_failed_write_is_one_line_on_all_processes(pool, tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    failures = [OSError(errno.ENOSPC, "No space left on device", path), None]
    one, other = pool.run(2, ending, failures, str(tmp_path))
    assert one == other and "\n" not in one
    assert one.startswith(f"cannot write {path}: No space left on device (")


@pytest.mark.parametrize(
    "failure, reason",
    [
        (OSError(errno.ENOSPC, "No space left", "run/new/a.pt"), "run/new/a.pt: No space left ("),
        (OSError(errno.EIO, "Input/output error"), "run/new: Input/output error ("),
    ],
)
def test_a_failed_write_names_path_and_free_bytes(failure, reason, monkeypatch, tmp_path):
    asked = []

    def disk_usage(folder):
        asked.append(folder)
        return namedtuple("usage", "total used free")(0, 0, 1234567)

    monkeypatch.setattr(comm.shutil, "disk_usage", disk_usage)
    message = ending([failure], str(tmp_path / "run" / "new"))
    assert reason in message and message.endswith("(1,234,567 bytes free)") and "\n" not in message
    assert asked == [str(tmp_path)]  # the folder that would hold those yet to be made


@pytest.mark.parametrize("writing", [None, "."])
@pytest.mark.parametrize("failure", [ValueError("a bug"), RuntimeError("shapes"), KeyError(1)])
def test_a_programming_error_keeps_its_traceback(failure, writing):
    with pytest.raises(type(failure)):
        ending([failure], writing)


# ------------------------------------------------------------------------------------------- launch


def raise_it(error):
    if error is not None:
        raise error


def test_a_run_error_is_one_line_on_stderr_and_status_2(capsys):
    assert comm.launch(raise_it, comm.RunError("--lr -1: must be above 0")) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: --lr -1: must be above 0\n")


def test_a_run_without_error_ends_with_status_0(capsys):
    assert comm.launch(raise_it, None) == 0
    assert capsys.readouterr() == ("", "")


def test_launch_does_not_hide_a_programming_error():
    with pytest.raises(ZeroDivisionError):
        comm.launch(raise_it, ZeroDivisionError())


def test_a_loader_process_that_was_killed_is_one_line(capsys):
    killed = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible ..."
    assert comm.launch(raise_it, RuntimeError(killed)) == 2
    err = capsys.readouterr().err
    assert "signal: Bus error" in err and "--shm-size" in err and err.count("\n") == 1
    with pytest.raises(RuntimeError):
        comm.launch(raise_it, RuntimeError("shapes do not fit"))


def fail_on_the_last(_):
    with comm.same_error_on_all_ranks():
        if comm.rank() == comm.size() - 1:
            raise OSError(errno.EACCES, "Permission denied", "images")


def launched():
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        status = comm.launch(fail_on_the_last, None)
    return status, error.getvalue(), torch.distributed.is_initialized()


def test_an_error_on_one_process_ends_all_with_status_2_and_one_line(pool):
    first, second = pool.run(2, launched)
    assert first == (2, "error: images: Permission denied\n", False)
    assert second == (2, "", False)


# -------------------------------------------------------------------------------------- collectives


def gathered_loss(rows):
    """A loss of every own row against all rows: its own mean, and its gradient as DDP averages."""
    x = own_rows(rows).requires_grad_()
    loss = (x @ comm.all_gather_with_grad(x).T).tanh().square().mean()
    loss.backward()
    return loss.item(), (x.grad / comm.size()).numpy()


def raw_gathered_loss(rows):
    kept = comm.all_gather_with_grad
    comm.all_gather_with_grad = comm.all_gather_no_grad
    try:
        return gathered_loss(rows)
    finally:
        comm.all_gather_with_grad = kept


def reduced_loss(rows):
    """A loss of every own row about the mean of all rows."""
    x = own_rows(rows).requires_grad_()
    mean = comm.all_reduce_with_grad(x.sum(0)) / len(rows)
    loss = (x - mean).pow(3).tanh().mean()
    loss.backward()
    return loss.item(), (x.grad / comm.size()).numpy()


@two_and_four
@pytest.mark.parametrize("function", [gathered_loss, reduced_loss])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, function, size):
    rows = noise(12, 5)
    loss, grad = function(rows)  # here, in one process
    parts = pool.run(size, function, rows)
    assert np.mean([part[0] for part in parts]) == pytest.approx(loss, rel=1e-12)
    whole = np.concatenate([part[1] for part in parts])
    np.testing.assert_allclose(whole, grad, rtol=1e-6, atol=1e-12)


def test_the_gradient_test_fails_for_the_raw_gather(pool):
    rows = noise(12, 5)
    loss, grad = gathered_loss(rows)
    parts = pool.run(2, raw_gathered_loss, rows)
    assert np.mean([part[0] for part in parts]) == pytest.approx(loss, rel=1e-12)
    whole = np.concatenate([part[1] for part in parts])
    assert np.abs(whole - grad).max() > 0.1 * np.abs(grad).max()


def collected(rows):
    """What each collective makes of the own rows, some of them laid out with strides."""
    x = own_rows(rows).requires_grad_()
    strided = x.detach().to(memory_format=torch.channels_last)
    gathered = [
        comm.all_gather_no_grad(x),
        comm.all_gather_no_grad(strided),
        comm.all_gather_with_grad(strided),
    ]
    means = [comm.mean_over_processes(x), comm.mean_over_processes(strided)]
    sums = [comm.all_reduce_with_grad(strided)]
    detached = not any(t.requires_grad for t in (*gathered, *means))
    return *([t.numpy() for t in ts] for ts in (gathered, means, sums)), detached


@two_and_four
def test_rows_come_in_rank_order_and_detached(pool, size):
    rows = noise(8, 3, 2, 5)
    parts = rows.reshape(size, 8 // size, 3, 2, 5)
    for gathered, means, sums, detached in pool.run(size, collected, rows):
        assert detached
        for got in gathered:
            np.testing.assert_array_equal(got, rows)
        for got in means:
            np.testing.assert_allclose(got, parts.mean(0), rtol=1e-12, atol=1e-15)
        for got in sums:
            np.testing.assert_allclose(got, parts.sum(0), rtol=1e-12, atol=1e-15)


def test_in_one_process_collectives_are_the_identity():
    x = torch.rand(4, 3, requires_grad=True)
    assert comm.all_gather_with_grad(x) is x and comm.all_reduce_with_grad(x) is x
    for alone in (comm.all_gather_no_grad(x), comm.mean_over_processes(x)):
        assert torch.equal(alone, x) and not alone.requires_grad
    assert comm.all_gather_objects({"a": 1}) == [{"a": 1}]
    assert comm.any_rank(True, False) == (True, False)


def votes(table):
    return comm.any_rank(*table[comm.rank()]), comm.all_gather_objects({"rank": comm.rank()})


@pytest.mark.parametrize("dtype, wanted", [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_what_is_narrow_becomes_float32_and_what_is_wide_stays(dtype, wanted):
    assert comm.upcast(torch.ones(2, dtype=dtype)).dtype == wanted


def test_a_flag_is_up_for_all_when_it_is_for_one(pool):
    down = (False, False, False)
    table = [(False, False, True), down, (True, False, True), down]
    objects = [{"rank": rank} for rank in range(4)]
    assert pool.run(4, votes, table) == [((True, False, True), objects)] * 4


# -------------------------------------------------------------------------- synchronised batch norm


def batch_norm(x, target, weight, bias, dtype):
    """Train a batch norm for some steps, then evaluate: torch's in one process, ours in several.

    Args:
        x, target: (steps, N, C, ...) for the joined batch. weight, bias: (C,), or None.

    Returns:
        Own rows of the outputs and of the gradient of the input, the gradients of weight and bias
        (the loss is a mean over the own rows, and DDP's mean over processes is yet to be taken for
        the last two), the buffers, and the own rows evaluated.
    """
    settings = dict(eps=1e-3, momentum=0.3, affine=weight is not None)
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    kind = kinds[x.ndim - 1] if comm.size() == 1 else comm.SyncBatchNorm
    norm = kind(x.shape[2], **settings)
    if weight is not None:
        norm.weight.data, norm.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
    norm.to(torch.float64 if dtype == "float64" else torch.float32)
    outputs, grads = [], []
    for rows, wanted in zip(x, target, strict=True):
        rows = own_rows(rows).to(getattr(torch, dtype))
        if rows.ndim == 4:
            rows = rows.contiguous(memory_format=torch.channels_last)
        rows.requires_grad_()
        out = norm(rows)
        loss = ((out - own_rows(wanted)).tanh().flatten(1).sum(1)).mean()
        loss.backward()
        assert out.dtype == rows.grad.dtype == rows.dtype
        outputs.append(out.detach().double().numpy())
        grads.append(rows.grad.double().numpy() / comm.size())
    norm.eval()
    evaluated = norm(own_rows(x[0]).to(getattr(torch, dtype))).detach().double().numpy()
    affine = [] if weight is None else [norm.weight.grad.numpy(), norm.bias.grad.numpy()]
    buffers = norm.running_mean.numpy(), norm.running_var.numpy(), norm.num_batches_tracked.item()
    return np.stack(outputs), np.stack(grads), affine, buffers, evaluated


class GpuKernels:
    """What torch's kernels of the GPU compute and ask for, for those on the CPU are missing."""

    @staticmethod
    def over_rows(x):
        return x.movedim(1, -1).flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))

    @classmethod
    def batch_norm_stats(cls, x, eps):
        var, mean = torch.var_mean(cls.over_rows(x), 0, correction=0)
        return mean, (var + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(x, means, inv_stds, running_mean, running_var, momentum,
                                            eps, counts):
        assert means.dtype == counts.dtype == x.dtype == running_mean.dtype
        n = counts.sum()
        mean = (counts[:, None] * means).sum(0) / n
        squares = (counts[:, None] * (inv_stds**-2 - eps + (means - mean) ** 2)).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(squares / (n - 1), momentum)
        return mean, (squares / n + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(x, weight, bias, mean, inv_std, eps):
        factors = [each.view(1, -1, *[1] * (x.ndim - 2)) for each in (mean, inv_std, weight, bias)]
        mean, inv_std, weight, bias = factors
        return ((x - mean) * inv_std * weight + bias).to(x.dtype)

    @classmethod
    def batch_norm_backward_reduce(cls, grad, x, mean, inv_std, weight, *wanted):
        assert all(wanted) and grad.stride() == x.stride() and grad.dtype == x.dtype
        grad = cls.over_rows(grad)
        products = (grad * (cls.over_rows(x) - mean)).sum(0)
        return grad.sum(0), products, products * inv_std, grad.sum(0)

    @staticmethod
    def batch_norm_backward_elemt(grad, x, mean, inv_std, weight, sums, products, counts):
        assert counts.dtype == torch.int32 and grad.stride() == x.stride()
        n, shape = counts.sum(), (1, -1, *[1] * (x.ndim - 2))
        slope, mean_grad, mean, scale = (
            each.view(shape)
            for each in (products * inv_std**2 / n, sums / n, mean, inv_std * weight))
        return ((grad - mean_grad - (x - mean) * slope) * scale).to(x.dtype)


def batch_norm_of_gpus(*arguments):
    """As `batch_norm`, by the operators of the GPU on emulated kernels."""
    with contextlib.ExitStack() as stack:
        for name in [name for name in vars(GpuKernels) if name.startswith("batch_norm")]:
            stack.enter_context(mock.patch.object(torch, name, getattr(GpuKernels, name)))
        for op in (comm._statistics, comm._normalize, comm._normalize_backward):
            stack.enter_context(
                mock.patch.dict(op._backend_fns, {"cpu": op._backend_fns["cuda"]}))
        return batch_norm(*arguments)


def joined(parts):
    outputs, grads, affine, buffers, evaluated = zip(*parts, strict=True)
    for mean, var, tracked in buffers:  # every process ends with the same
        assert (mean == buffers[0][0]).all() and (var == buffers[0][1]).all()
        assert tracked == buffers[0][2]
    affine = [np.mean(own, axis=0) for own in zip(*affine, strict=True)]
    return (
        np.concatenate(outputs, axis=1), np.concatenate(grads, axis=1), affine, buffers[0],
        np.concatenate(evaluated),
    )


def assert_alike(got, wanted, **tolerance):
    for one, other in zip(got, wanted, strict=True):
        if isinstance(one, list | tuple):
            assert_alike(one, other, **tolerance)
        else:
            np.testing.assert_allclose(one, other, **tolerance)


def activations(*shape, offset=1.0):
    """Three steps of inputs whose channels and rows differ in mean and spread."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, *shape)) * rng.uniform(0.5, 2, (1, 1, shape[1], *[1] * len(shape[2:])))
    return x + offset * rng.normal(size=(3, shape[0], shape[1], *[1] * len(shape[2:])))


@two_and_four
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 3, 4, 5)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ours", [batch_norm, batch_norm_of_gpus])
def test_sync_batch_norm_is_torchs_on_the_joined_batch(pool, ours, shape, affine, size):
    weight, bias = (noise(3, seed=2), noise(3, seed=3)) if affine else (None, None)
    arguments = activations(*shape), noise(3, *shape, seed=4), weight, bias, "float64"
    got = joined(pool.run(size, ours, *arguments))
    assert_alike(got, batch_norm(*arguments), rtol=1e-9, atol=1e-12)


def test_sync_batch_norm_stays_accurate_far_from_zero(pool):
    x = (activations(32, 3, 2, 2) + 1e4).astype(np.float32).astype(np.float64)
    affine = np.ones(3), np.zeros(3)
    target = noise(3, 32, 3, 2, 2, seed=4)
    outputs, grads, _, buffers, _ = joined(pool.run(4, batch_norm, x, target, *affine, "float32"))
    wanted = batch_norm(x, target, *affine, "float64")
    np.testing.assert_allclose(outputs, wanted[0], atol=2e-3)  # x has steps of 1e-3
    np.testing.assert_allclose(grads, wanted[1], atol=2e-3 * np.abs(wanted[1]).max())
    assert_alike(buffers, wanted[3], rtol=1e-4)


@pytest.mark.parametrize("ours", [batch_norm, batch_norm_of_gpus])
def test_sync_batch_norm_of_bfloat16_has_float32_statistics(pool, ours):
    x = torch.from_numpy(activations(32, 3)).bfloat16().double().numpy()
    affine, target = (np.ones(3), np.zeros(3)), noise(3, 32, 3, seed=4)
    outputs, grads, _, buffers, _ = joined(pool.run(2, ours, x, target, *affine, "bfloat16"))
    wanted = batch_norm(x, target, *affine, "float64")
    np.testing.assert_allclose(outputs, wanted[0], rtol=2**-7, atol=1e-3)
    np.testing.assert_allclose(grads, wanted[1], atol=0.02 * np.abs(wanted[1]).max())
    assert_alike(buffers, wanted[3], rtol=1e-5, atol=1e-6)


def network(dtype=None):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=0.1, momentum=0.3), nn.ReLU(), nn.Flatten(),
        nn.Sequential(nn.Linear(16, 6), nn.BatchNorm1d(6, affine=False)), nn.Linear(6, 3),
    ).to(dtype=dtype)


def network_gradients(images, compiled=False):
    """Gradients of a network's parameters on the own images, averaged by DDP over processes."""
    torch.set_default_dtype(torch.float64)
    net = comm.convert_sync_batchnorm(network())
    if compiled:  # or an error, where it does not become one graph
        net.compile(backend="aot_eager", fullgraph=True)
    model = DistributedDataParallel(net) if comm.size() > 1 else net
    model(own_rows(images)).square().mean().backward()
    return [p.grad.numpy() for p in net.parameters()]


@two_and_four
def test_with_sync_batch_norm_ddp_gives_the_gradient_of_the_joined_batch(pool, size):
    images = noise(8, 2, 4, 4)
    alone = network_gradients(images)
    for parts in pool.run(size, network_gradients, images):
        assert_alike(parts, alone, rtol=1e-6, atol=1e-12)


def test_sync_batch_norm_does_not_break_a_compiled_graph(pool):
    images = noise(8, 2, 4, 4)
    for parts in pool.run(2, network_gradients, images, True):
        assert_alike(parts, network_gradients(images), rtol=1e-6, atol=1e-12)


def conversion():
    net = network()
    net[1].bias.requires_grad_(False)
    nn.init.normal_(net[1].running_mean)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    params = dict(net.named_parameters())
    converted = comm.convert_sync_batchnorm(net)
    after = converted.state_dict()
    return {
        "kinds": [type(converted[1]).__name__, type(converted[4][1]).__name__],
        "settings": (converted[1].eps, converted[1].momentum),
        "keys": list(after) == list(before),
        "values": all(torch.equal(after[name], before[name]) for name in before),
        "same parameters": all(p is params[name] for name, p in converted.named_parameters()),
        "frozen": [name for name, p in converted.named_parameters() if not p.requires_grad],
    }


def test_conversion_keeps_parameters_what_is_frozen_and_the_state(pool):
    wanted = {
        "kinds": ["SyncBatchNorm"] * 2, "settings": (0.1, 0.3), "keys": True, "values": True,
        "same parameters": True, "frozen": ["1.bias"],
    }
    assert pool.run(2, conversion) == [wanted] * 2


def conversion_in_eval():
    converted = comm.convert_sync_batchnorm(network().eval())
    return [module.training for module in converted.modules()]


def test_conversion_keeps_a_frozen_network_in_eval(pool):
    assert not any(pool.run(2, conversion_in_eval)[0])


def conversion_in_float64():
    converted = comm.convert_sync_batchnorm(network(torch.float64))
    return [str(value.dtype) for name, value in converted.state_dict().items()
            if value.is_floating_point()]


def test_conversion_keeps_the_dtype(pool):
    assert set(pool.run(2, conversion_in_float64)[0]) == {"torch.float64"}


def conversion_of_one_layer():
    return type(comm.convert_sync_batchnorm(nn.BatchNorm1d(3))).__name__


def test_a_batch_norm_that_stands_alone_is_converted(pool):
    assert pool.run(2, conversion_of_one_layer) == ["SyncBatchNorm"] * 2


def test_in_one_process_conversion_changes_nothing():
    net = network()
    assert comm.convert_sync_batchnorm(net) is net
    assert type(net[1]) is nn.BatchNorm2d


def test_sync_batch_norm_refuses_rows_without_channels():
    with pytest.raises(ValueError, match="batch norm needs"):
        comm.SyncBatchNorm(3)(torch.rand(3))


class OddBatchNorm(nn.BatchNorm2d):
    """A batch norm that does something else as well."""

    def forward(self, x):
        return super().forward(x) + 1


def convert_odd():
    with pytest.raises(comm.RunError, match="OddBatchNorm cannot be .*--no-sync-bn"):
        comm.convert_sync_batchnorm(nn.Sequential(OddBatchNorm(3)))


def test_a_batch_norm_that_does_more_is_not_replaced_in_silence(pool):
    pool.run(2, convert_odd)
