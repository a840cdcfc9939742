"""Real runs of the scripts in processes of their own, to be watched, stopped and killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# 16 steps an epoch of tiny images: a few seconds, long enough to be interrupted anywhere.
SMALL = ["--limit", "256", "--batch-size", "16", "--workers", "1", "--log-every", "1"]
WATCHED = {
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",  # `give_up` asks where a process stands
    "RES_OPTIONS": "timeout:1 attempts:1",  # or 10 s for each name that torchrun asks for
}


def command(script, *flags, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def start(script, *flags, processes=1, **options):
    """Start a script without waiting for it."""
    environment = {**os.environ, **WATCHED, **options.pop("env", {})}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    return subprocess.Popen(
        command(script, *flags, processes=processes), env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )


def finish(process, timeout=180):
    """Wait for a started script; its exit status and all it printed."""
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        give_up(process, f"{process.args} did not end within {timeout} s")
    return process.returncode, printed


def run(script, *flags, processes=1, timeout=180, **options):
    """Run a script to its end; its exit status and all it printed."""
    return finish(start(script, *flags, processes=processes, **options), timeout)


def log_of(folder):
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # being written
    return lines


def wait_for(condition, process, timeout=180, pause=0.01):
    """Wait until a condition holds while a process runs."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended too early:\n{process.communicate()[0]}"
        if time.monotonic() > end:
            give_up(process, "the awaited moment did not come")
        time.sleep(pause)


def tree(pid):
    """A process and all that came from it."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            children.setdefault(int(stat.rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def send(number, process):
    """Send a signal to a launcher, its workers and their loader processes, all by pid."""
    for pid in tree(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(process):
    """End them all, without a chance to clean up."""
    send(signal.SIGKILL, process)
    process.wait()
    process.stdout.close()


def give_up(process, reason):
    """End them all, and fail with what they printed and the line where each one stood."""
    family = tree(process.pid)
    send(signal.SIGABRT, process)
    time.sleep(2)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    printed = process.communicate()[0].splitlines()
    told = [line for line in printed if not line.startswith("Extension modules")]
    raise AssertionError("\n".join([f"{reason}; it printed:", *told]))
