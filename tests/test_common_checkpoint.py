import contextlib
import copy
import errno
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common import checkpoint, distributed as comm
from common.checkpoint import Run
from common.distributed import RunError, World
from common.images import ArrayImages, FileImages

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SETTINGS = {"data": "digits", "epochs": 10, "lr": 0.5, "crop_scale": [0.08, 1.0], "sync_bn": True}


@pytest.fixture(autouse=True)
def _same_signal_handlers():
    before = {number: signal.getsignal(number) for number in checkpoint.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def noise(seed=0, n=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return ArrayImages(pixels, None, 3)


def opened(folder, images=None, world=None, resume=True, save_every_minutes=60, **settings):
    world = world or comm.setup("cpu")
    return Run(str(folder), {**SETTINGS, **settings}, images or noise(), world, resume=resume,
               save_every_minutes=save_every_minutes)


class Training:
    """A training that is small and still has all kinds of state."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.queue = torch.rand(5, 2)
        self.state = {"model": self.net, "optimizer": self.optimizer, "queue": self.queue}

    def step(self, number):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        self.net(x).square().sum().backward()
        self.optimizer.step()
        self.queue.mul_(0.5).add_(number)

    def everything(self):
        """All numbers of the state, by name, copied."""
        momenta = {i: s["momentum_buffer"] for i, s in self.optimizer.state_dict()["state"].items()}
        named = {**self.net.state_dict(), **momenta, "queue": self.queue}
        return {str(name): value.clone() for name, value in named.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def trained(folder, steps, save_at, seed=0, **options):
    """Start or go on in a folder, train up to a step, save on the way; the training, its start."""
    training = Training(seed)
    with opened(folder, **options) as run:
        first = run.start(training.state)
        for number in range(first + 1, steps + 1):
            training.step(number)
            if number in save_at:
                run.save(number, training.state, training.net)
    return training, first


def step_in(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)["step"]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------- starting, resuming


def test_a_run_in_a_new_folder_starts_at_step_0_and_changes_nothing(tmp_path):
    training, fresh = Training(), Training().everything()
    with opened(tmp_path / "a" / "new" / "folder") as run:
        assert run.start(training.state) == 0
    assert same(training.everything(), fresh)


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    whole, _ = trained(tmp_path / "whole", 7, save_at=[3, 7])
    trained(tmp_path / "cut", 5, save_at=[3])
    resumed, first = trained(tmp_path / "cut", 7, save_at=[7], seed=99)
    assert first == 3
    assert same(resumed.everything(), whole.everything())


def test_resuming_fills_what_is_there_in_place(tmp_path):
    saved, _ = trained(tmp_path, 3, save_at=[3])
    training = Training(seed=99)
    places = [p.data_ptr() for p in training.net.parameters()], training.queue.data_ptr()
    with opened(tmp_path) as run:
        assert run.start(training.state) == 3
    assert same(training.everything(), saved.everything())
    assert (
        places == ([p.data_ptr() for p in training.net.parameters()], training.queue.data_ptr())
    )


def test_without_resume_a_run_starts_anew(tmp_path):
    trained(tmp_path, 3, save_at=[3])
    training, first = trained(tmp_path, 1, save_at=[], resume=False)
    fresh = Training()
    fresh.step(1)
    assert first == 0 and same(training.everything(), fresh.everything())


def test_after_a_new_start_nothing_goes_on_from_what_was_before(tmp_path):
    trained(tmp_path, 3, save_at=[2, 3])
    trained(tmp_path, 1, save_at=[], resume=False)  # killed before its first save, say
    assert not (tmp_path / "backbone.pth").exists()
    assert trained(tmp_path, 0, save_at=[])[1] == 0


def test_a_stopped_new_start_says_what_goes_on(tmp_path, capsys):
    training = Training()
    with opened(tmp_path, resume=False) as run:
        run.start(training.state)
        run.request_stop(signal.SIGTERM, None)
        assert run.agree(False) == (True, True)
        run.save(1, training.state, training.net)
    assert "the same command without --no-resume goes on" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 4])
def test_another_number_of_processes_is_said(size, tmp_path, capsys):
    trained(tmp_path, 3, save_at=[3], world=World(0, 4, CPU))
    capsys.readouterr()
    trained(tmp_path, 3, save_at=[], world=World(0, size, CPU))
    printed = capsys.readouterr().out
    assert f"resuming {tmp_path} at step 3" in printed
    assert ("(saved by 4 processes, now 1)" in printed) == (size == 1)


def starts_of(folder):
    training = Training()
    with opened(folder) as run:
        run.start(training.state)
    return json.loads((folder / "run.json").read_text())


def test_run_json_gathers_the_starts(tmp_path):
    record = starts_of(tmp_path)
    assert record["settings"] == SETTINGS and record["data"] == noise().identity()
    assert record["parameters"] == 16 + 8 + 10
    assert starts_of(tmp_path)["starts"][:1] == record["starts"]
    (start, other) = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start.keys() == other.keys() >= {"argv", "time", "processes", "threads", "versions"}
    assert start["versions"]["torch"] == torch.__version__ and start["processes"] == 1


def test_a_torn_run_json_is_written_anew(tmp_path):
    (tmp_path / "run.json").write_text('{"starts": [')
    assert len(starts_of(tmp_path)["starts"]) == 1


# ------------------------------------------------------------------------------ newest and previous


def test_the_checkpoint_before_is_kept_behind_the_newest(tmp_path):
    trained(tmp_path, 3, save_at=[1])
    assert not (tmp_path / "checkpoint.prev.pt").exists()
    trained(tmp_path, 4, save_at=[2, 3])
    assert (step_in(tmp_path), step_in(tmp_path, "checkpoint.prev.pt")) == (3, 2)
    trained(tmp_path, 4, save_at=[4])
    assert (step_in(tmp_path), step_in(tmp_path, "checkpoint.prev.pt")) == (4, 3)


def spoil_missing(path):
    path.unlink()


def spoil_empty(path):
    path.write_bytes(b"")


def spoil_torn(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil_foreign(path):
    torch.save([1, 2, 3], path)


SPOILERS = [spoil_missing, spoil_empty, spoil_torn, spoil_foreign]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_if_the_newest_does_not_load_the_one_before_is_used_and_said(spoil, tmp_path, capsys):
    whole, _ = trained(tmp_path, 3, save_at=[2, 3])
    spoil(tmp_path / "checkpoint.pt")
    capsys.readouterr()
    again, first = trained(tmp_path, 3, save_at=[])
    assert first == 2 and same(again.everything(), whole.everything())
    printed = capsys.readouterr().out
    assert "warning: checkpoint.pt" in printed and "going on from checkpoint.prev.pt" in printed


@pytest.mark.parametrize("spoil", SPOILERS[1:])
def test_if_both_are_broken_the_run_stops_and_names_them(spoil, tmp_path):
    trained(tmp_path, 3, save_at=[2, 3])
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        spoil(tmp_path / name)
    with pytest.raises(RunError) as error:
        trained(tmp_path, 3, save_at=[])
    message = one_line(error)
    assert str(tmp_path) in message and "--no-resume" in message
    assert "checkpoint.pt" in message and "checkpoint.prev.pt" in message
    assert trained(tmp_path, 1, save_at=[], resume=False)[1] == 0


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_broken_checkpoint_does_not_take_the_place_of_the_one_before(spoil, tmp_path):
    trained(tmp_path, 3, save_at=[2, 3])
    spoil(tmp_path / "checkpoint.pt")
    trained(tmp_path, 5, save_at=[5])
    assert (step_in(tmp_path), step_in(tmp_path, "checkpoint.prev.pt")) == (5, 2)


def test_a_new_start_does_not_keep_the_older_runs_checkpoints_behind_its_own(tmp_path):
    trained(tmp_path, 8, save_at=[7, 8])
    trained(tmp_path, 2, save_at=[1], resume=False)
    assert step_in(tmp_path) == 1
    assert not (tmp_path / "checkpoint.prev.pt").exists()
    trained(tmp_path, 2, save_at=[2])
    assert (step_in(tmp_path), step_in(tmp_path, "checkpoint.prev.pt")) == (2, 1)


# --------------------------------------------------------------------------- what must not be other


@pytest.mark.parametrize(
    "name, new, named",
    [
        ("lr", 0.25, "--lr is 0.25 and was 0.5"),
        ("epochs", 11, "--epochs is 11 and was 10"),
        ("sync_bn", False, "--sync-bn is False and was True"),
        ("crop_scale", [0.08, 0.9], "--crop-scale is [0.08, 0.9] and was [0.08, 1.0]"),
        ("temperature", 0.1, "another script, or of another version of this one (--temperature)"),
    ],
)
def test_another_setting_is_refused_with_both_values_and_the_remedies(name, new, named, tmp_path):
    trained(tmp_path, 1, save_at=[1])
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(RunError) as error:
        trained(tmp_path, 2, save_at=[2], **{name: new})
    message = one_line(error)
    assert named in message and "--no-resume" in message and "--output" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    trained(tmp_path, 2, save_at=[2])  # the folder was let go


def test_moved_images_are_the_same_images(tmp_path):
    def files(root, *names):
        return FileImages([f"{root}/{name}" for name in names], None, 3, root)

    trained(tmp_path, 1, save_at=[1], data="/here", images=files("/here", "a/1.png", "a/2.png"))
    moved = files("/there", "a/1.png", "a/2.png")
    assert trained(tmp_path, 1, save_at=[], data="/there", images=moved)[1] == 1


@pytest.mark.parametrize("other", [noise(seed=1), noise(n=7)])
def test_other_images_are_refused(other, tmp_path):
    trained(tmp_path, 1, save_at=[1])
    with pytest.raises(RunError, match="--data is .* and was .*--no-resume"):
        trained(tmp_path, 1, save_at=[], images=other)


# --------------------------------------------------------------------------------------------- lock


def test_a_folder_in_use_is_refused_with_the_pid_until_the_run_ends(tmp_path):
    with opened(tmp_path):
        with pytest.raises(RunError) as error, opened(tmp_path):
            pass
        assert f"{tmp_path} is in use by the run with pid {os.getpid()}" in one_line(error)
        with opened(tmp_path / "other"):
            pass
    with opened(tmp_path):
        pass


def refusal(folder):
    with pytest.raises(RunError) as error, opened(folder):
        pass
    return str(error.value)


def test_a_folder_in_use_is_refused_on_every_process(pool, tmp_path):
    with opened(tmp_path):
        messages = pool.run(2, refusal, tmp_path)
    assert len(set(messages)) == 1 and f"pid {os.getpid()};" in messages[0]


def test_an_error_in_a_run_lets_the_folder_go(tmp_path):
    with pytest.raises(KeyError), opened(tmp_path):
        raise KeyError
    with opened(tmp_path):
        pass


@contextlib.contextmanager
def forked(body):
    """A forked process that has run `body()` and stays until it is killed; its pid."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kept = body()
            os.write(tell, b"1")
            signal.pause()
            del kept
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"1"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_another_processs_folder_is_refused_with_its_pid_and_free_once_it_is_killed(tmp_path):
    holder = forked(lambda: opened(tmp_path).__enter__())
    with holder as pid, pytest.raises(RunError) as error, opened(tmp_path):
        pass
    assert f"in use by the run with pid {pid};" in one_line(error)
    with opened(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def refusing(number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    return refuse


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.fcntl, "flock", refusing(number))
    with opened(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    said = capsys.readouterr().out
    assert f"warning: the file system of {tmp_path} has no locks" in said


@pytest.mark.parametrize("number, fine", [(errno.EINVAL, True), (errno.ENOSYS, True),
                                          (errno.EIO, False), (errno.ENOSPC, False)])
def test_a_file_system_without_syncing_is_used_but_no_failure_to_sync_is_passed_over(
    number, fine, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", refusing(number))
    outcome = contextlib.nullcontext() if fine else pytest.raises(OSError)
    with outcome, checkpoint.atomic_write(str(tmp_path / "file")) as file:
        file.write(b"whole")
    assert os.listdir(tmp_path) == (["file"] if fine else [])


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    with contextlib.ExitStack() as children:
        with opened(tmp_path):
            children.enter_context(forked(lambda: None))
            with pytest.raises(RunError, match="in use"), opened(tmp_path):
                pass
        with opened(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as error, opened(tmp_path / "file"):
        pass
    assert f"cannot write {tmp_path}/file: " in one_line(error)


# ------------------------------------------------------------------------------------------- saving


def test_every_file_loads_with_weights_only(tmp_path):
    training, _ = trained(tmp_path, 2, save_at=[1, 2])
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        record = torch.load(tmp_path / name, weights_only=True)
        assert record["settings"] == SETTINGS and record["processes"] == 1
        assert record["state"].keys() == {"model", "optimizer", "queue"}
    backbone = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert same(backbone, dict(training.net.state_dict()))


def test_the_product_says_how_it_is_built_and_fed_and_still_is_a_state_dict(tmp_path):
    model, settings = torchvision.models.resnet18(), dict(
        arch="resnet18", stem="imagenet", image_size=64, in_chans=3, mean=[0.1, 0.2, 0.3],
        std=[0.5])
    fresh, model.fc = torchvision.models.resnet18(), nn.Identity()
    with opened(tmp_path, **settings) as run:
        run.start({"model": model})
        run.save(1, {"model": model}, model)
    found = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert found._metadata["settings"] == settings  # no more, the name of the data for one
    assert same(found, dict(model.state_dict())) and found._metadata["bn1"]["version"] == 2
    answer = fresh.load_state_dict(found, strict=False)
    assert sorted(answer.missing_keys) == ["fc.bias", "fc.weight"] and not answer.unexpected_keys
    model.load_state_dict(found)  # strictly


def test_saving_changes_nothing(tmp_path):
    training = Training()
    training.step(1)
    training.net[1].eval()

    def besides_the_numbers():
        modes = [module.training for module in training.net.modules()]
        gradients = [(p.requires_grad, p.grad.tolist()) for p in training.net.parameters()]
        generators = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]
        return modes, gradients, generators, random.getstate()

    with opened(tmp_path) as run:
        run.start(training.state)
        before, numbers = besides_the_numbers(), training.everything()
        run.save(1, training.state, training.net)
        assert besides_the_numbers() == before and same(training.everything(), numbers)


def test_only_the_first_process_writes(tmp_path):
    folder = tmp_path / "run"
    trained(folder, 2, save_at=[1, 2], world=World(1, 2, CPU))
    assert not folder.exists()


def test_a_weight_that_is_not_finite_is_refused_and_the_old_checkpoint_stays(tmp_path):
    training, _ = trained(tmp_path, 1, save_at=[1])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("2.weight", "1.running_var"):
        broken = copy.deepcopy(training.net)
        broken.state_dict()[name].view(-1)[-1] = float("nan")
        with pytest.raises(RunError) as error, opened(tmp_path) as run:
            run.start(training.state)
            run.save(2, {**training.state, "model": broken}, broken)
        message = one_line(error)
        assert f"{name} is not finite after step 2" in message and "step 1 is untouched" in message
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.pop("run.json") != after.pop("run.json") and before == after


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    trained(tmp_path, 2, save_at=[1, 2])
    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(RunError) as error:
        trained(tmp_path, 3, save_at=[3])
    message = one_line(error)
    assert f"cannot write {tmp_path}" in message and "No space left on device" in message
    free = int(message.split("(")[1].split(" bytes free")[0].replace(",", ""))
    stat = os.statvfs(tmp_path)
    assert abs(free - stat.f_bavail * stat.f_frsize) < 1e9
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    assert trained(tmp_path, 2, save_at=[])[1] == 2


def grow_beyond(folder, largest):
    """Save step 2 while the system lets no file grow beyond `largest` bytes; what is said."""
    training, limits = Training(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(folder) as run:
        assert run.start(training.state) == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
        try:
            with pytest.raises(RunError) as error:
                run.save(2, training.state, training.net)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(error.value)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("share", [0.2, 0.99])
def test_a_write_that_the_system_refuses_stops_all_and_spoils_nothing(share, size, pool, tmp_path):
    trained(tmp_path, 1, save_at=[1])
    largest = int(share * (tmp_path / "checkpoint.pt").stat().st_size)
    messages = pool.run(size, grow_beyond, tmp_path, largest)
    assert len(set(messages)) == 1 and "\n" not in messages[0]
    assert f"cannot write {tmp_path}" in messages[0] and "bytes free" in messages[0]
    assert not list(tmp_path.glob("*.tmp"))
    assert step_in(tmp_path) == 1


class Killed(BaseException):
    """Stands for kill -9: nothing that the code does after it counts."""


@pytest.mark.parametrize("newest", ["whole", "broken"])
@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_kill_between_two_renames_loses_at_most_a_save(moment, newest, tmp_path, monkeypatch):
    trained(tmp_path, 3, save_at=[2, 3])
    if newest == "broken":
        spoil_torn(tmp_path / "checkpoint.pt")
    renames, replace, before = [], os.replace, None

    def killed(source, target):
        renames.append(target)
        if len(renames) > moment:
            raise Killed
        replace(source, target)

    with contextlib.suppress(Killed), opened(tmp_path) as run:
        training = Training()
        before = run.start(training.state)
        monkeypatch.setattr(os, "replace", killed)
        run.save(4, training.state, training.net)
    monkeypatch.undo()
    assert trained(tmp_path, 0, save_at=[])[1] in (before, 4)


def test_what_a_kill_left_half_written_is_not_used(tmp_path):
    trained(tmp_path, 1, save_at=[1])
    for name in ("checkpoint.pt.tmp", "backbone.pth.tmp", "run.json.tmp", "log.jsonl.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert trained(tmp_path, 2, save_at=[2])[1] == 1
    assert step_in(tmp_path) == 2


# ------------------------------------------------------------------------------------------ cut_log


def test_log_lines_after_the_checkpoint_and_torn_ones_are_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    kept = [json.dumps({"step": step, "loss": step / 7}) for step in (1, 5, 10)]
    torn = ['{"step": 3, "lo', "", "\0\0\0"]
    log.write_text("\n".join([*kept, *torn, '{"step": 11, "loss": 0.1}', '{"step": 12, "l']))
    checkpoint.truncate_log(str(log), 10)
    assert log.read_text() == "\n".join(kept) + "\n"


def test_a_line_added_to_a_cut_log_is_a_line_of_its_own(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}')  # the line's end did not reach the disk
    checkpoint.truncate_log(str(log), 2)
    with log.open("a") as file:
        file.write('{"step": 3}\n')
    assert {"step": 3} in [json.loads(line) for line in log.read_text().splitlines()]


def test_a_start_cuts_the_log_to_the_checkpoints_step(tmp_path):
    log = tmp_path / "log.jsonl"
    trained(tmp_path, 3, save_at=[2])
    log.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    trained(tmp_path, 2, save_at=[])
    assert [json.loads(line)["step"] for line in log.open()] == [1, 2]
    trained(tmp_path, 0, save_at=[], resume=False)
    assert log.read_text() == ""


# -------------------------------------------------------------------------------- stopping, cadence


@pytest.mark.parametrize("number", checkpoint.STOP_SIGNALS)
def test_a_stop_signal_asks_to_save_and_stop(number, tmp_path, capsys):
    training = Training()
    interrupted = number == signal.SIGINT  # the shell hears of that
    told = pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext()
    with told, opened(tmp_path) as run:
        run.start(training.state)
        assert run.agree(False) == (False, False) and run.agree(True) == (True, False)
        os.kill(os.getpid(), number)
        assert run.agree(False) == (True, True)
        run.save(5, training.state, training.net)
    assert "stopped at step 5 and saved" in capsys.readouterr().out
    with opened(tmp_path) as run:
        assert run.agree(False) == (False, False)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    with opened(tmp_path):
        pass


def agreed(folder, signalled):
    """What each process answers before and after one of them gets a signal."""
    with opened(folder) as run:
        before = run.agree(False)
        if comm.rank() == signalled:
            os.kill(os.getpid(), signal.SIGUSR1)
        return before, run.agree(False)


@pytest.mark.parametrize("signalled", [0, 1])
def test_all_processes_stop_together(signalled, pool, tmp_path):
    answers = pool.run(2, agreed, tmp_path, signalled)
    assert answers == [((False, False), (True, True))] * 2


def agreed_by_clock(folder, minutes):
    with opened(folder, save_every_minutes=minutes[comm.rank()]) as run:
        return run.agree(False)


@pytest.mark.parametrize("minutes, save", [([1e-9, 60], True), ([60, 1e-9], False)])
def test_the_first_processs_clock_says_when_to_save(minutes, save, pool, tmp_path):
    assert pool.run(2, agreed_by_clock, tmp_path, minutes) == [(save, False)] * 2


def test_the_clock_starts_again_with_every_save(tmp_path, monkeypatch):
    now, training = [100.0], Training()
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    with opened(tmp_path, save_every_minutes=2) as run:
        answers = []
        for _ in range(5):
            now[0] += 50
            save, _ = run.agree(False)
            answers.append(save)
            if save:
                run.save(1, training.state, training.net)
    assert answers == [False, False, True, False, False]


def handlers():
    return [signal.getsignal(number) for number in checkpoint.STOP_SIGNALS]


def test_the_signals_are_handled_as_before_once_the_run_ends(tmp_path):
    for number in checkpoint.STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    before = handlers()
    with opened(tmp_path):
        assert not set(before) & set(handlers())
        with pytest.raises(RunError), opened(tmp_path):
            pass
        assert not set(before) & set(handlers())
    assert handlers() == before
    with pytest.raises(KeyError), opened(tmp_path):
        raise KeyError
    assert handlers() == before


def sees_its_own_folder(folder):
    """Two machines without a shared folder: each process has an output folder of its own."""
    from common import distributed as comm

    world = World(comm.rank(), comm.size(), torch.device("cpu"))
    images = ArrayImages(np.zeros((4, 2, 2, 1), np.uint8), None, 1)
    own = os.path.join(folder, str(comm.rank()))
    try:
        with Run(own, {}, images, world, resume=True, save_every_minutes=1):
            return None
    except RunError as error:
        return str(error)


def test_processes_that_see_different_checkpoints_stop(pool, tmp_path):
    (tmp_path / "0").mkdir()
    identity = ArrayImages(np.zeros((4, 2, 2, 1), np.uint8), None, 1).identity()
    record = {"step": 3, "settings": {}, "identity": identity, "processes": 2, "state": {}}
    torch.save(record, tmp_path / "0" / "checkpoint.pt")
    said = pool.run(2, sees_its_own_folder, str(tmp_path))
    assert all("all machines need the same files" in message for message in said)


def test_a_checkpoint_of_another_version_of_the_script_is_told(tmp_path):
    trained(tmp_path, 1, save_at=[1])
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved["state"] = {}
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="another version of this script"):
        trained(tmp_path, 2, save_at=[2])


def test_a_group_of_other_options_is_told_and_not_taken_over(tmp_path):
    with opened(tmp_path) as run:
        weight = torch.nn.Parameter(torch.zeros(2))
        run.checkpoint = {"state": {"optimizer": torch.optim.SGD([weight], lr=1.0).state_dict()}}
        run.restore("optimizer", torch.optim.SGD([weight], lr=0.5))  # the rate is set each step
        scaled = torch.optim.SGD([{"params": [weight], "lr_scale": 0.01}], lr=1.0)
        with pytest.raises(RunError, match="another version of this script"):
            run.restore("optimizer", scaled)
        assert scaled.param_groups[0]["lr_scale"] == 0.01


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_a_run_does_not_fault_its_memory_in_again_in_every_step(tmp_path):
    code = f"""
import resource, sys, torch
sys.path[:0] = ["tests"]
from test_common_checkpoint import opened
faults = []
with opened({str(tmp_path)!r}):
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 16,384 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 1000, done.stderr
