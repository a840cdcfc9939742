import contextlib
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch

from common import distributed as comm, log
from common.distributed import RunError
from common.log import Log

NAN = float("nan")


def made(folder, every=5, total_steps=12, first_step=0, floors=(), batch_size=16, ceilings=None):
    return Log(str(folder), comm.setup("cpu"), batch_size=batch_size, total_steps=total_steps,
               first_step=first_step, every=every, chance_loss=3.4340, floors=dict(floors),
               ceilings=ceilings)


def write(watched, step, loss=1.0, **indicators):
    indicators = {name: torch.tensor(value) for name, value in indicators.items()}
    watched.write(step, epoch=step // 4, loss=torch.tensor(loss), lr=0.5, wait_seconds=0.0,
                  **indicators)


def lines(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "log.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# ------------------------------------------------------------------------------------ lines in JSON


@pytest.mark.parametrize(
    "first_step, every, total, steps",
    [
        (0, 5, 12, [1, 5, 10, 12]),
        (6, 5, 12, [7, 10, 12]),
        (0, 1, 3, [1, 2, 3]),
        (0, 100, 7, [1, 7]),
        (0, 5, 5, [1, 5]),
        (11, 5, 12, [12]),
    ],
)
def test_the_first_every_few_and_the_last_step_get_a_line(
    first_step, every, total, steps, tmp_path
):
    watched = made(tmp_path, every, total, first_step)
    for step in range(first_step + 1, total + 1):
        write(watched, step)
        assert watched.due(step) == (step in steps)
    assert [line["step"] for line in lines(tmp_path)] == steps


def test_a_line_has_the_documented_fields_and_the_indicators(tmp_path):
    watched = made(tmp_path)
    watched.write(1, epoch=3, loss=torch.tensor(2.5), lr=torch.tensor(0.25), wait_seconds=0.0,
                  z_std=torch.tensor(0.125))
    (line,) = lines(tmp_path)
    assert line.keys() == {"step", "epoch", "loss", "lr", "images_per_second", "data_wait",
                           "memory_gb", "z_std"}
    assert (line["step"], line["epoch"], line["loss"]) == (1, 3, 2.5)
    assert (line["lr"], line["z_std"]) == (0.25, 0.125)
    assert 0.01 < line["memory_gb"] < 100


def test_rates_are_those_since_the_last_line(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watched = made(tmp_path, every=4, first_step=8, batch_size=32)
    for step, moment, waited in [(9, 102, 0.5), (10, 103, 0.6), (11, 104, 0.7), (12, 108, 2.0)]:
        now[0] = moment
        watched.write(step, epoch=0, loss=torch.tensor(1.0), lr=0.1, wait_seconds=waited)
    first, last = lines(tmp_path)
    assert (first["images_per_second"], first["data_wait"]) == (16.0, 0.25)
    assert (last["images_per_second"], last["data_wait"]) == (16.0, 0.25)


def test_lines_are_added_to_those_of_the_run_before(tmp_path):
    write(made(tmp_path), 1)
    write(made(tmp_path, first_step=1), 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def logged_by_rank(folder):
    watched = made(folder)
    write(watched, 1, loss=10.0 + comm.rank(), z_std=2.0 * comm.rank())


def test_numbers_are_means_over_processes_and_one_process_writes(pool, tmp_path):
    pool.run(4, logged_by_rank, tmp_path)
    (line,) = lines(tmp_path)
    assert (line["loss"], line["z_std"]) == (11.5, 3.0)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(RunError) as error:
        write(made(tmp_path / "gone"), 1)
    assert f"cannot write {tmp_path}/gone/log.jsonl: " in str(error.value)
    assert "bytes free" in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- bad losses


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [1, 3, 5, 12])
def test_a_loss_that_is_not_finite_stops_at_the_next_line_and_its_step_is_named(
    step, bad, tmp_path
):
    watched, due = made(tmp_path), min(s for s in (1, 5, 10, 12) if s >= step)
    with pytest.raises(RunError) as error:
        for number in range(1, 13):
            reached = number
            write(watched, number, loss=bad if number == step else 1.0)
    assert reached == due
    assert f"the loss of step {step} is not finite" in str(error.value)
    assert "\n" not in str(error.value)
    if due > 1:
        assert all(line["step"] < step for line in lines(tmp_path))


def test_the_first_of_several_bad_steps_is_named(tmp_path):
    watched = made(tmp_path)
    for step in (1, 2):
        write(watched, step)
    for step in (3, 4):
        write(watched, step, loss=NAN)
    with pytest.raises(RunError, match="the loss of step 3 is"):
        write(watched, 5, loss=NAN)


def test_before_a_save_the_check_need_not_wait_for_a_line(tmp_path):
    watched = made(tmp_path)
    write(watched, 1)
    watched.check()
    write(watched, 2, loss=NAN)
    write(watched, 3)
    with pytest.raises(RunError, match="the loss of step 2 is"):
        watched.check()


def stopped(folder, bad_steps):
    """Where each process stops if the loss of process r is bad at step bad_steps[r]."""
    watched = made(folder)
    for step in range(1, 13):
        try:
            write(watched, step, loss=NAN if step == bad_steps[comm.rank()] else 1.0)
        except RunError as error:
            return step, str(error)


@pytest.mark.parametrize("bad_steps, first", [([0, 3], 3), ([3, 0], 3), ([4, 2], 2), ([0, 5], 5)])
def test_a_bad_loss_on_one_process_stops_all_at_the_same_step(bad_steps, first, pool, tmp_path):
    (step, message), other = pool.run(2, stopped, tmp_path, bad_steps)
    assert (step, message) == other and step == 5
    assert f"the loss of step {first} is not finite" in message
    assert [line["step"] for line in lines(tmp_path)] == [1]


def checked(folder):
    watched = made(folder)
    write(watched, 1)
    write(watched, 2, loss=NAN if comm.rank() == 1 else 1.0)
    with pytest.raises(RunError) as error:
        watched.check()
    return str(error.value)


def test_the_check_before_a_save_stops_all_processes(pool, tmp_path):
    messages = pool.run(2, checked, tmp_path)
    assert len(set(messages)) == 1 and "the loss of step 2 is" in messages[0]


# ------------------------------------------------------------------------------------------- floors


def test_an_indicator_below_its_floor_for_two_lines_is_named_until_it_is_back(tmp_path, capsys):
    watched = made(tmp_path, every=1, floors={"z_std": 0.1, "entropy": 0.5})
    warnings = []
    for step, z_std, entropy in [
        (1, 0.3, 0.9), (2, 0.1, 0.5), (3, 0.09, 0.9), (4, 0.01, 0.4), (5, 0.3, 0.3),
        (6, 0.01, 0.1), (7, 0.02, 0.9), (8, 0.03, 0.4),
    ]:
        write(watched, step, z_std=z_std, entropy=entropy)
        said = re.findall(r"warning: (\w+) is (\S+), below (\S+):", capsys.readouterr().out)
        warnings += [(step, *words) for words in said]
    assert warnings == [(4, "z_std", "0.01", "0.1"), (5, "entropy", "0.3", "0.5"),
                        (7, "z_std", "0.02", "0.1")]


def test_an_indicator_with_two_bounds_is_named_for_each(tmp_path, capsys):
    watched = made(tmp_path, every=1, floors={"entropy": 0.5}, ceilings={"entropy": 2.0})
    warnings = []
    for step, entropy in enumerate([1, 2, 2.25, 3, 4, 0.25, 0.125, 2.5, 2.75], start=1):
        write(watched, step, entropy=entropy)
        said = re.findall(r"warning: (.*): the emb", capsys.readouterr().out)
        warnings += [(step, words) for words in said]
    assert warnings == [(4, "entropy is 3, above 2"), (7, "entropy is 0.125, below 0.5"),
                        (9, "entropy is 2.75, above 2")]


# ----------------------------------------------------------------------------------------- progress


def test_elsewhere_than_on_a_terminal_each_line_is_a_line(tmp_path, capsys):
    watched = made(tmp_path, every=1, total_steps=4)
    for step in range(1, 5):
        write(watched, step, loss=1.5)
    printed = capsys.readouterr().out
    assert "\r" not in printed and "\x1b" not in printed
    progress = [row for row in printed.splitlines() if row.startswith("epoch")]
    assert [re.search(r"step (\S+)", row)[1] for row in progress] == ["1/4", "2/4", "3/4", "4/4"]
    assert all("loss 1.5000" in row and "lr 0.5" in row and "img/s" in row for row in progress)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_screen(printed):
    """What a terminal shows: a carriage return with an erasure starts the row again."""
    return [row.split("\r\x1b[K")[-1] for row in printed.split("\n")]


def test_on_a_terminal_the_progress_line_updates_in_place_and_the_last_one_stays(
    tmp_path, monkeypatch
):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    watched = made(tmp_path, every=1, total_steps=4, floors={"z_std": 0.1})
    for step in range(1, 5):
        write(watched, step, z_std=0.01 if step in (2, 3) else 1.0)
        if step == 2:
            rows = on_screen(terminal.getvalue())
            assert len(rows) == 2 and "first loss" in rows[0] and "step 2/4" in rows[1]
    rows = on_screen(terminal.getvalue())
    assert len(rows) == 4 and "warning: z_std" in rows[1]
    assert "step 4/4" in rows[2] and rows[3] == ""


def test_the_chance_loss_stands_beside_the_first_loss_of_a_run_only(tmp_path, capsys):
    watched = made(tmp_path, every=1)
    for step in (1, 2):
        write(watched, step, loss=3.5)
    printed = capsys.readouterr().out
    assert printed.count("chance") == 1
    assert "first loss 3.5000 (chance: 3.4340)" in printed.splitlines()[0]
    write(made(tmp_path, every=1, first_step=2), 3)
    assert "chance" not in capsys.readouterr().out


def printed_by(folder):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        watched = made(folder, every=1, floors={"z_std": 1.0})
        for step in (1, 2):
            write(watched, step, z_std=0.1)
    return printed.getvalue()


def test_one_process_prints(pool, tmp_path):
    first, other = pool.run(2, printed_by, tmp_path)
    assert "first loss" in first and "warning" in first and other == ""


def test_the_time_left_follows_from_the_speed(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watched = made(tmp_path, total_steps=3726)
    now[0] = 1.0
    write(watched, 1)
    assert capsys.readouterr().out.endswith("16 img/s  eta 1:02:05\n")
