"""What can go wrong for a user ends on every process with one line that says what to do.

With SimCLR, whose command line, loop and folder are those of all scripts.
"""

import contextlib
import importlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import drill
from common import distributed as comm
from helpers import EXTRA, SCRIPTS, TINY, state_of


def launched(script, flags, file_limit=None):
    """Exit status and error output of a script on this process, as its command gives them."""
    module, errors = importlib.import_module(script), io.StringIO()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, hard))
            status = comm.launch(module.main, module.parse_args(flags))
        except SystemExit as ended:  # from the parser
            status = ended.code
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return status, errors.getvalue()


def fails(pool, *flags, script="simclr", file_limit=None):
    """Run a script that must fail on two processes; the one line it says."""
    flags = [*TINY, *EXTRA.get(script, []), *map(str, flags)]
    started = time.monotonic()
    (status0, said0), (status1, said1) = pool.run(2, launched, script, flags, file_limit)
    assert time.monotonic() - started < 60
    assert (status0, status1) == (2, 2)
    assert said1 == "" and said0.count("\n") == 1 and "error: " in said0, (said0, said1)
    return said0


@pytest.fixture
def pictures(tmp_path):
    """Ten small PNGs in a folder."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(10):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


FROM_FOLDER = ["--recipe", "digits", "--batch-size", "4"]


def test_data_that_is_not_there(pool, tmp_path):
    out = ["--output", tmp_path / "out"]
    assert "nowhere: no such file" in fails(pool, "--data", tmp_path / "nowhere", *out)
    (tmp_path / "empty").mkdir()
    assert "no image file" in fails(pool, "--data", tmp_path / "empty", *out)
    said = fails(pool, "--data", "cifar10", "--data-root", tmp_path, *out)
    assert "--download" in said and str(tmp_path) in said


def test_data_that_cannot_be_used(pool, pictures, tmp_path):
    out = ["--output", tmp_path / "out"]
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(pictures / "deep.png")
    said = fails(pool, "--data", pictures, *FROM_FOLDER, *out)
    assert "deep.png has more than 8 bits" in said
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]))
    assert "objects.npy" in fails(pool, "--data", tmp_path / "objects.npy", *out)


def test_arguments_that_cannot_be(pool):
    assert "--batch-size 7" in fails(pool, "--batch-size", 7)
    assert "resnet51" in fails(pool, "--arch", "resnet51")
    assert "'-1'" in fails(pool, "--epochs", -1)


def test_an_output_that_cannot_be_written(pool, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = fails(pool, "--output", tmp_path / "file" / "out")
    assert "cannot write" in said and "bytes free" in said and str(tmp_path / "file") in said


def test_a_full_disk_leaves_the_last_checkpoint(pool, tmp_path):
    flags = ["--output", tmp_path, "--epochs", 3]
    said = fails(pool, *flags, file_limit=20_000)
    assert "cannot write" in said and "bytes free" in said and "backbone.pth" in said
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "checkpoint.pt").exists()

    one_epoch = tmp_path / "whole"
    flags = ["--output", one_epoch, "--epochs", 3]
    pool.run(2, launched, "simclr", [*TINY, *map(str, flags)])
    kept = torch.load(one_epoch / "checkpoint.prev.pt", weights_only=True)["step"]
    shutil.copy(one_epoch / "checkpoint.prev.pt", one_epoch / "checkpoint.pt")
    os.remove(one_epoch / "checkpoint.prev.pt")
    size = (one_epoch / "backbone.pth").stat().st_size + 1000  # the export fits, the checkpoint not
    said = fails(pool, *flags, file_limit=size)
    assert "checkpoint.pt" in said and not list(one_epoch.glob("*.tmp"))
    assert torch.load(one_epoch / "checkpoint.pt", weights_only=True)["step"] == kept


def test_checkpoints_that_do_not_fit(pool, tmp_path):
    flags = ["--output", tmp_path]
    pool.run(2, launched, "simclr", [*TINY, *map(str, flags)])
    said = fails(pool, *flags, "--arch", "resnet18_quarter")
    assert "--arch" in said and "resnet18_quarter" in said and "--no-resume" in said
    for path in tmp_path.glob("checkpoint*.pt"):
        path.write_bytes(path.read_bytes()[:500])
    assert "cannot be read" in fails(pool, *flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loss_that_is_not_finite_stops_all_and_spoils_nothing(script, pool, tmp_path):
    flags = ["--limit", 64, "--epochs", 3, "--warmup-epochs", 1, "--lr", 1e30]
    assert "not finite" in fails(pool, *flags, "--output", tmp_path, script=script)
    with contextlib.suppress(FileNotFoundError):
        saved = state_of(tmp_path)
        tensors = [v for part in saved.values() if isinstance(part, dict) for v in part.values()]
        tensors = [v for v in tensors if isinstance(v, torch.Tensor) and v.is_floating_point()]
        assert tensors and all(v.isfinite().all() for v in tensors)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_batch_of_more_images_than_there_are_is_refused_with_one_that_fits(
    script, pictures, tmp_path
):
    flags = ["--data", pictures, "--recipe", "digits", "--batch-size", 64, "--output", tmp_path]
    flags = [*EXTRA.get(script, []), *map(str, flags)]
    status, said = launched(script, flags)
    assert status == 2 and "64" in said and "10 images" in said and "--batch-size 10 fits" in said


def test_a_loss_that_is_not_finite_ends_real_processes(tmp_path):
    flags = [*drill.SMALL, "--lr", "1e30", "--warmup-epochs", 1, "--epochs", 3]
    flags += ["--output", tmp_path]
    status, printed = drill.run("simclr.py", *flags, processes=2, timeout=60)
    assert status != 0 and "not finite" in printed and printed.count("error: ") == 1, printed
    assert 'simclr.py", line' not in printed and "common/" not in printed


def test_a_real_process_says_one_line_and_exits_without_a_traceback(tmp_path):
    status, printed = drill.run("simclr.py", "--data", tmp_path / "nowhere")
    assert status == 2 and printed.startswith("error: ") and printed.count("\n") == 1


def test_a_crash_in_the_loop_ends_the_process_and_its_loader(tmp_path):
    """A bug shows its traceback, and nothing is left waiting."""
    code = (
        "import sys, simclr; simclr.nt_xent = lambda *_: 1 / 0;"
        "sys.exit(simclr.main(simclr.parse_args(sys.argv[1:])))"
    )
    command = [sys.executable, "-c", code, *drill.SMALL, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=drill.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


BUFFERED = {"PYTHONUNBUFFERED": ""}  # what is left in the buffer is tried once more at the end


def test_a_pipe_that_has_closed_ends_no_run_and_spoils_no_exit(tmp_path):
    """As with `| head`, or a terminal that is closed: the run goes on in silence to its end."""
    process = drill.start("simclr.py", *drill.SMALL, "--epochs", 1, "--warmup-epochs", 0,
                          "--output", tmp_path, env=BUFFERED)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 16
    assert len(drill.log_of(tmp_path)) == 16 and (tmp_path / "backbone.pth").exists()


def test_a_stop_signal_saves_though_nobody_reads_what_is_said(tmp_path):
    """As with Ctrl-C, which ends the `tee` behind a run too."""
    process = drill.start("simclr.py", *drill.SMALL, "--epochs", 200, "--output", tmp_path)
    drill.wait_for(lambda: len(drill.log_of(tmp_path)) > 3, process)
    process.stdout.close()
    process.send_signal(signal.SIGUSR1)  # SIGTERM: test_all_scripts.py
    assert process.wait(timeout=60) == 0
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] > 3


def little_shared_memory():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


@pytest.mark.parametrize("script, flags", [
    ("simclr.py", ["--recipe", "cifar10", "--arch", "resnet_tiny", "--batch-size", 64,
                   "--image-size", 96, "--limit", 256, "--output", "out"]),
    ("eval_knn.py", ["--checkpoint", "pixels", "--image-size", 96, "--limit", 256]),
])
def test_a_batch_that_a_loader_process_cannot_send_ends_the_run(script, flags, tmp_path):
    """Shared memory is short, as in a container: the sender must not wait, nor be waited for."""
    flags = [tmp_path / flag if flag == "out" else flag for flag in flags]
    status, printed = drill.run(script, "--data", "fake", "--workers", 1, *flags, timeout=60,
                                preexec_fn=little_shared_memory)
    assert status == 2 and printed.count("error: ") == 1, printed
    assert "shared memory" in printed and "--workers" in printed and "Traceback" not in printed


def printed_in(encoding, script, *flags):
    """Exit status and output of a script on a terminal that takes one encoding."""
    module, out = importlib.import_module(script), io.BytesIO()
    terminal = io.TextIOWrapper(out, encoding=encoding, errors="strict")
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        status = comm.launch(module.main, module.parse_args(list(map(str, flags))))
        terminal.flush()
    return status, out.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_and_tables_are_printed_on_any_terminal(encoding, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = os.fsencode(tmp_path) + os.fsencode(f"/caf/{split}/") + b"caf\xe9"
        os.makedirs(folder)
        for number in range(8):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            with open(folder + b"/%d\xe9.png" % number, "wb") as file:
                Image.fromarray(pixels).save(file, format="PNG")
    with open(folder.replace(b"/val/", b"/train/") + b"/broken\xe9.png", "wb"):
        pass
    status, printed = printed_in(encoding, "simclr", "--data", tmp_path / "caf", *FROM_FOLDER,
                                 "--workers", 0, "--epochs", 1, "--warmup-epochs", 0, "--output",
                                 tmp_path / "out")
    assert status == 0 and "broken\\udce9.png" in printed, printed
    status, printed = printed_in(encoding, "eval_knn", "--checkpoint", "pixels", "--data",
                                 tmp_path / "caf")
    assert status == 2 and "broken\\udce9.png" in printed and "Traceback" not in printed, printed
    for evaluation in ("eval_knn", "eval_svm"):  # tables with a sign beyond ASCII
        flags = ["--costs", 1, "--low-shot", 1] if evaluation == "eval_svm" else []
        status, printed = printed_in(encoding, evaluation, "--checkpoint", "pixels", "--limit", 100,
                                     "--image-size", 8, *flags)
        assert status == 0 and ("\\xb1" if encoding == "ascii" else "\u00b1") in printed, printed


@pytest.mark.parametrize("script", ["simclr.py", "convert.py"])  # a long one, and a short one
def test_help_may_be_cut_short(script):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, drill.ROOT / script, "--help"], stdout=writer,
                          env={**os.environ, **BUFFERED}, stderr=subprocess.PIPE,
                          text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
