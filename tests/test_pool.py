import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def test_processes_end_with_a_killed_parent():
    code = (
        "import time, pool; pool.PROCESSES = 2; made = pool.Pool();"
        "print(*(process.pid for process in made.processes), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, text=True,
                              stdout=subprocess.PIPE)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(1)  # at work, or still starting
    assert len(pids) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < end, "a process of the pool stayed"
        time.sleep(0.1)
