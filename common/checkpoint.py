"""The folder of a run: its lock, its checkpoints, and going on after any kind of stop.

A run writes `run.json` (what was asked, with which versions), `log.jsonl` (see `common/log.py`),
`checkpoint.pt` with `checkpoint.prev.pt` behind it, and `backbone.pth`, the product. Every file is
written beside its place, synced and renamed, so a kill at any moment leaves a whole one.
"""

import contextlib
import errno
import fcntl
import glob
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import numpy as np
import PIL
import torch
import torchvision
from torch import nn

from common import backbones, distributed as comm
from common.distributed import RunError, World
from common.log import Diverged
from common.workers import set_malloc_thresholds

RECORD = {"step", "settings", "identity", "processes", "state"}  # what a checkpoint holds
DESCRIBED = ("arch", "stem", "patch_size", "image_size", "in_chans", "mean", "std", "bits",
             "exif_orientation")
KEPT = ("backbone-epoch*.pth", "events.out.tfevents.*", "trace.json")  # of flags
# What a file system answers that cannot do what it was asked.
NOT_THERE = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Run:
    """An output folder held by one run at a time, and the signals that ask the run to stop.

    Use it as a context: at its end, however it comes, the folder and the signals are let go.

    Args:
        folder: the `--output`; made if missing.
        settings: every setting that changes the weights, by name (`cli.settings`).
        images: the training images; their identity is compared instead of their path.
        product: file name of what the run makes.

    Raises:
        RunError: another run holds the folder; it cannot be written; its checkpoints do not load or
            were made with other settings.
    """

    def __init__(self, folder, settings, images, world: World, *, resume, save_every_minutes,
                 product="backbone.pth"):
        self.product = product
        self.folder, self.settings, self.world = folder, settings, world
        self.identity = images.identity()
        self.save_every = 60 * save_every_minutes
        self.last_save = time.monotonic()
        self.saved_step = None
        self.keeps_previous = False
        self.stop_requested = self.stopping = self.interrupted = self.profiled = False
        self.lock, self.handlers = None, {}
        self.resume, self.checkpoint = resume, None

    def __enter__(self):
        try:
            with comm.same_error_on_all_ranks(writing=self.folder):
                if self.world.is_main:
                    os.makedirs(self.folder, exist_ok=True)
                    self.lock = lock_file(self.path(".lock"))
            with comm.same_error_on_all_ranks():
                if self.resume:
                    self.checkpoint = self.newest_checkpoint()
                    self.compare_settings()
            step = self.checkpoint["step"] if self.checkpoint else 0
            if len(set(comm.all_gather_objects((step, self.identity)))) > 1:
                raise RunError(f"the processes see different images or different checkpoints in "
                               f"{self.folder}; all machines need the same files")
        except RunError:
            self.__exit__(RunError)
            raise
        if self.world.device.type == "cpu":
            set_malloc_thresholds()
        self.handlers = {n: signal.signal(n, self.request_stop) for n in STOP_SIGNALS}
        return self

    def __exit__(self, kind=None, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self.lock:
            self.lock.close()
        if kind is None and self.stopping:
            where = "before the first step" if self.saved_step is None else (
                f"at step {self.saved_step} and saved")
            left_out = {"--no-resume": not self.resume, "--profile": self.profiled}
            without = "".join(f" without {flag}" for flag, given in left_out.items() if given)
            comm.print_main(f"stopped {where}; the same command{without} goes on")
            if self.interrupted and self.world.size == 1:
                raise KeyboardInterrupt  # so that a shell does not run its next command
        elif kind is None:
            comm.print_main(f"finished: {self.path(self.product)}")

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def request_stop(self, number, _frame):
        """Finish the step, save and stop; a second Ctrl-C stops at once."""
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested, self.interrupted = True, number == signal.SIGINT
        if self.world.is_main:
            with contextlib.suppress(OSError):  # Ctrl-C ends a `| tee` as well
                os.write(2, b"\nstopping after this step; interrupt again to stop at once\n")

    # ---------------------------------------------------------------------------------- starting

    def newest_checkpoint(self) -> dict | None:
        failures = []
        for name in ("checkpoint.pt", "checkpoint.prev.pt"):
            if not os.path.exists(self.path(name)):
                continue
            try:
                loaded = torch.load(self.path(name), map_location="cpu", weights_only=True)
                if not (isinstance(loaded, dict) and loaded.keys() >= RECORD):
                    raise ValueError("no checkpoint of a run")
            except Exception as error:  # a torn file raises many things
                failures.append(f"{name} ({type(error).__name__})")
                continue
            self.keeps_previous = name == "checkpoint.pt"
            if name != "checkpoint.pt":
                missing = failures[0] + " does not load" if failures else "checkpoint.pt is missing"
                comm.print_main(f"warning: {missing}; going on from {name}")
            return loaded
        if failures:
            raise RunError(f"{self.folder}: {' and '.join(failures)} cannot be read; delete what "
                           "is broken, or start anew with --no-resume")
        return None

    def compare_settings(self):
        """Refuse to go on with other settings than the checkpoint's."""
        if self.checkpoint is None:
            return
        saved = dict(self.checkpoint["settings"], data=self.checkpoint["identity"])
        now = dict(self.settings, data=self.identity)
        if saved.keys() != now.keys():
            other = " ".join("--" + n.replace("_", "-") for n in sorted(saved.keys() ^ now.keys()))
            raise RunError(f"{self.folder} holds a run of another script, or of another version of "
                           f"this one ({other}); choose another --output, or start anew with "
                           "--no-resume")
        hashes = ("init", "checkpoint")  # of files, first: other settings follow from them
        for name in (*hashes, *sorted(now)):
            if saved.get(name) != now.get(name):
                what = f"is {now[name]} and was {saved[name]} in {self.folder}; repeat the old"
                if name in hashes:
                    what = (f"does not name the weights that the run in {self.folder} started "
                            "from, or it started from none; repeat the old")
                raise RunError(f"--{name.replace('_', '-')} {what} value, or start anew with "
                               "--no-resume, or choose another --output")

    def start(self, state: dict) -> int:
        """Load the checkpoint into `state`, if there is one, and note the start in run.json.

        Args:
            state: what a run must remember: modules, optimisers, scalers (anything with a
                state_dict) and tensors, by name. Tensors are filled in place.

        Returns:
            The number of steps done.
        """
        step = 0
        if self.checkpoint:
            step = self.saved_step = self.checkpoint["step"]
            with comm.same_error_on_all_ranks():
                for name, part in state.items():
                    self.restore(name, part)
            processes = self.checkpoint["processes"]
            note = f"resuming {self.folder} at step {step}"
            if processes != self.world.size:
                note += f" (saved by {processes} processes, now {self.world.size})"
            comm.print_main(note)
            self.checkpoint = None
        with comm.same_error_on_all_ranks(writing=self.folder):
            if self.world.is_main:
                if not self.resume:
                    self.delete_old_run()
                self.write_run_json(state)
                truncate_log(self.path("log.jsonl"), -1 if self.saved_step is None else step)
        return step

    def restore(self, name: str, part):
        """Fill one part of the state from the checkpoint."""
        try:
            saved = self.checkpoint["state"][name]
            if isinstance(part, torch.Tensor):
                part.copy_(saved)
            elif saved:  # empty: the scaler of a run without float16
                if isinstance(part, torch.optim.Optimizer):  # it would take the saved options over
                    now, then = ([sorted(group) for group in groups] for groups in (
                        part.state_dict()["param_groups"], saved["param_groups"]))
                    if now != then:
                        raise ValueError("other options of parameter groups")
                part.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise RunError(f"{self.folder} is of another version of this script ({name}: {reason})"
                           "; start anew with --no-resume, or choose another --output") from error

    def delete_old_run(self):
        """Remove what an older run made: nothing can go on from it or be taken for this run's."""
        for name in ("checkpoint.pt", "checkpoint.prev.pt", self.product, *KEPT):
            for path in glob.glob(name, root_dir=self.folder):
                os.remove(self.path(path))

    def write_run_json(self, state: dict):
        record = {"starts": []}
        if os.path.exists(self.path("run.json")):
            with open(self.path("run.json")) as file, contextlib.suppress(ValueError):
                record = {**record, **json.load(file)}
        start = {
            "argv": sys.argv,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.world.device)
            if self.world.device.type == "cuda" else platform.machine(),
            "git": git_commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": np.__version__,
                "pillow": PIL.__version__,
                "scikit-learn": importlib.metadata.version("scikit-learn"),
            },
        }
        modules = [part for part in state.values() if isinstance(part, nn.Module)]
        record["starts"].append(start)
        record["settings"] = self.settings
        record["data"] = self.identity
        record["parameters"] = sum(p.numel() for m in modules for p in m.parameters())
        with atomic_write(self.path("run.json")) as file:
            file.write(json.dumps(record, indent=1).encode())

    # ------------------------------------------------------------------------------------ saving

    def agree(self, epoch_ends: bool) -> tuple[bool, bool]:
        """Whether to save now and whether to stop then: the same answer on every process."""
        due = self.world.is_main and time.monotonic() - self.last_save > self.save_every
        self.stopping, due = comm.any_rank(self.stop_requested, due)
        return self.stopping or due or epoch_ends, self.stopping

    def save(self, step: int, state: dict, backbone: nn.Module, keep_as: str | None = None):
        """Write the product (backbone.pth) and the checkpoint of `step`; all processes call it.

        Args:
            keep_as: a file name under which the product stays as well.

        Raises:
            RunError: the disk is full or the like, or a weight is not finite; the last good
                checkpoint stays.
        """
        with comm.same_error_on_all_ranks(writing=self.folder):
            if self.world.is_main:
                self.check_finite(step, state)
                self.write(step, state, backbone, keep_as)
        self.saved_step, self.last_save = step, time.monotonic()

    def write(self, step: int, state: dict, backbone: nn.Module, keep_as: str | None):
        kept = {name: part if isinstance(part, torch.Tensor) else part.state_dict()
                for name, part in state.items()}
        record = {"step": step, "settings": self.settings, "identity": self.identity,
                  "processes": self.world.size, "state": kept}
        for name in filter(None, (keep_as, self.product)):
            with atomic_write(self.path(name)) as file:
                torch.save(described(backbone.state_dict(), self.settings), file)
        # What is moved behind the new checkpoint is this run's, and whole.
        newest, previous = self.path("checkpoint.pt"), self.path("checkpoint.prev.pt")
        with atomic_write(newest, previous if self.keeps_previous else None) as file:
            torch.save(record, file)
        self.keeps_previous = True

    def check_finite(self, step: int, state: dict):
        for key, part in state.items():
            tensors = part.state_dict() if isinstance(part, nn.Module) else {key: part}
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor) and not value.isfinite().all():
                    last_good = ("there is no checkpoint yet" if self.saved_step is None else
                                 f"the checkpoint of step {self.saved_step} is untouched")
                    raise Diverged(f"{name} is not finite after step {step}; {last_good}; lower "
                                   "--lr or raise --warmup-epochs")


def described(weights: OrderedDict, settings: dict) -> OrderedDict:
    """A state dict that says how to build and feed its model, wherever its file is moved to.

    The settings of `DESCRIBED` stand in `_metadata`, where torch keeps the versions of the modules:
    `torch.load` brings that back, and nothing that loads the weights takes it for a tensor.
    """
    found = OrderedDict((name, value.cpu().contiguous()) for name, value in weights.items())
    names = (*DESCRIBED, *backbones.VIT_PARTS)
    said = {name: settings[name] for name in names if name in settings}
    found._metadata = OrderedDict(getattr(weights, "_metadata", {}), settings=said)
    return found


def lock_file(path: str):
    """Lock a file until it is closed or this process ends; forked loader workers do not keep it.

    Where the file system has no locks, this is said, and the run goes on without.
    """
    file = open(path, "a+")  # noqa: SIM115  held for the whole run
    try:
        with unless_missing("locks, so see that no second run writes there", path):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise RunError(f"{os.path.dirname(path)} is in use by the run with pid {holder}; wait for "
                       "it or choose another --output") from None
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    os.register_at_fork(after_in_child=file.close)
    return file


@contextlib.contextmanager
def unless_missing(what: str | None = None, path: str = ""):
    """Pass over what a file system does not have, such as Lustre without locks; say it, if told."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        if what:
            comm.print_main(f"warning: the file system of {os.path.dirname(path)} has no {what} "
                            f"({error.strerror})")


@contextlib.contextmanager
def atomic_write(path: str, previous: str | None = None):
    """Open a file that takes the place of `path` once it is whole and on the disk.

    What stood at `path` before is kept at `previous`, if that is given; its folder is made.
    """
    temporary = path + ".tmp"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            with unless_missing():
                os.fsync(file.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            with unless_missing():
                os.fsync(folder)  # the names too
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, RuntimeError):  # how torch.save reports a full disk
            raise OSError(0, str(error).splitlines()[0], path) from error
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path
        raise


def truncate_log(path: str, step: int):
    """Drop the log lines after `step`: they will be written again."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
    with atomic_write(path) as file:
        file.write(b"".join(kept))


def git_commit() -> str | None:
    """The commit of the checkout that this file is in, with + if there are changes, or None."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        describe = ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=12"]
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
