import hashlib
import os
import sys
import threading
import time

import pytest

from common import workers

linux = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")


def busy_thread(seconds):
    """A thread that runs for so long without the interpreter's lock, as gloo's and OpenMP's do."""
    def work():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 30_000)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@linux
def test_workers_are_forked_once_no_other_thread_runs(capsys):
    thread = busy_thread(0.4)
    assert workers.worker_context().get_start_method() == "fork"
    assert not thread.is_alive() and capsys.readouterr().out == ""


@linux
def test_a_thread_that_never_rests_is_told_of_and_does_not_keep_a_run_from_starting(capsys):
    thread, started = busy_thread(2), time.monotonic()
    workers.worker_context(patience=0.2)
    assert time.monotonic() - started < 1.5 and thread.is_alive()
    assert "warning: another thread still runs after 0.2 s" in capsys.readouterr().out
    thread.join()


@linux
def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(40))
    assert workers.default_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers.default_workers() == 5
