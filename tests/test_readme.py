"""Every command of the README and the guide is one that the scripts accept."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README + GUIDE, re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()
         if not line.startswith(("#", "git "))]
DOCSTRINGS = [
    line.strip()
    for script in ROOT.glob("*.py")
    for line in script.read_text().split('"""')[1].splitlines()
    if line.startswith("    ")
]


def calls(line):
    """(script, flags) for every script that a command line calls."""
    for part in line.split("&&"):
        found = re.search(r"\b([a-z_]+\.py)\b(.*)", part)
        if found:
            yield found[1], shlex.split(found[2])


CALLS = [call for line in [*LINES, *DOCSTRINGS] for call in calls(line)]


@pytest.mark.parametrize("script, flags", CALLS, ids=lambda value: str(value)[:40])
def test_every_command_parses(script, flags):
    if any(flag.startswith("timm:") for flag in flags):
        pytest.importorskip("timm")
    args = importlib.import_module(Path(script).stem).parse_args(flags)
    if script == "visualize.py" and args.kind == "views":  # the rest is for the script
        assert importlib.import_module(Path(args.script).stem).parse_args(args.flags)


def test_the_commands_are_found():
    assert len(CALLS) >= 8 and {"simclr.py", "eval_knn.py"} <= {script for script, _ in CALLS}


def test_every_script_and_every_file_named_exists():
    for name in re.findall(r"`([a-z_/]+\.(?:py|txt))`", README):
        assert (ROOT / name).exists(), name
    for script in ROOT.glob("*.py"):
        assert script.name in README, script.name


def test_ci_runs_the_readmes_test_command():
    assert "grep -m1 'python -m pytest' README.md" in (ROOT / ".ci" / "run").read_text()
    assert sum("python -m pytest" in line for line in LINES) == 1


def test_the_lengths_in_the_method_table():
    found = re.findall(r"\| `([a-z0-9_]+\.py)` \((\d+)\) \|", README)
    methods = {path.name for path in ROOT.glob("*.py") if "\nRECIPES = " in path.read_text()}
    assert {script for script, _ in found} == methods
    for script, lines in found:
        there = len((ROOT / script).read_text().splitlines())
        assert abs(there - int(lines)) <= 10, f"{script} has {there} lines"


def test_the_readme_is_short_and_the_guide_is_linked():
    assert len(README.encode()) <= 10 * 1024 and "docs/guide.md" in README
