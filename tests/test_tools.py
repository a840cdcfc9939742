import ast
import builtins
import hashlib
import os
import re
import subprocess
import symtable
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import tools
from common import backbones, checkpoint, features, weights
from common.distributed import RunError
from helpers import ROOT, TINY, lines

SETTINGS = dict(arch="resnet_tiny", stem="small", image_size=16, in_chans=3, mean=[0.5], std=[0.5],
                data="/home/somebody/images")


def run(*flags):
    tools.main(tools.parse_args(list(map(str, flags))))


# -------------------------------------------------------------------------------------------- count


def row(printed, name):
    """The three numbers of a part, in millions."""
    line = next(line for line in printed.splitlines() if line.startswith(f"{name}  "))
    return [float(cell.replace(",", "")) for cell in line[len(name):].split()]


def test_the_sizes_that_everybody_knows(capsys):
    run("count", "resnet50")
    parameters, products, activations = row(capsys.readouterr().out, "both")
    assert (parameters, round(products / 1e3, 2), round(activations, 1)) == (25.557, 4.09, 11.1)


@pytest.mark.parametrize("size, tokens", [(224, 197), (96, 37)])
def test_a_transformer_is_counted_as_the_formula_has_it(size, tokens, capsys):
    run("count", "vit_small", "--image-size", size)
    printed = capsys.readouterr().out
    dim, patches = 384, tokens - 1
    products = 12 * tokens * dim * (12 * dim + 2 * tokens) + patches * 768 * dim
    activations = 12 * tokens * (3 + 1 + 4 + 1 + 1) * dim + 12 * 6 * tokens**2 + patches * dim
    parameters = (12 * (12 * dim**2 + 13 * dim) + (768 + 1) * dim + (tokens + 1) * dim + 2 * dim)
    assert row(printed, "backbone") == [
        pytest.approx(number / 1e6, abs=6e-4) for number in (parameters, products, activations)]


@pytest.mark.parametrize("arch", ["resnet_tiny", "vit_micro", "torchvision:convnext_tiny"])
def test_the_parts_add_up(arch):
    model = backbones.build_backbone(arch, in_chans=3, image_size=32, stem="small", patch_size=4,
                                     positions="sincos", zero_init_residual=True, drop_path=0.0)
    table = tools.count_parts(model.eval(), torch.rand(1, 3, 32, 32))
    whole = table.pop("")
    assert [sum(column) for column in zip(*table.values(), strict=True)] == whole
    assert len(table) >= 2 and min(whole) > 1000


def test_what_cannot_be_counted_is_said(capsys):
    for flags, named in ((["resnet51"], "resnet50"), (["vit_tiny", "--image-size", "100"], "100"),
                         (["resnet18", "--patch-size", "8"], "--patch-size 8"),
                         (["vit_tiny", "--stem", "small"], "--stem small")):
        with pytest.raises(SystemExit):
            tools.parse_args(["count", *flags])
        assert named in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ publish


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "simclr-tiny"
    made.mkdir()
    model = features.build(features.DIGITS)
    for buffer in model.buffers():
        buffer.copy_(torch.rand(buffer.shape) * 4)
    torch.save(checkpoint.described(model.state_dict(), SETTINGS), made / "backbone.pth")
    return made


def published(capsys):
    return capsys.readouterr().out.partition(": ")[0]


def test_torch_hub_takes_what_is_published(folder, tmp_path, capsys):
    run("publish", folder, "--output", tmp_path / "out")
    path = published(capsys)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    assert path == str(tmp_path / "out" / f"simclr-tiny-{digest}.pth")
    found = torch.hub.load_state_dict_from_url(
        f"file://{path}", str(tmp_path / "hub"), progress=False, check_hash=True, weights_only=True)
    wanted = torch.load(folder / "backbone.pth", weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_published_file_says_what_it_is_and_not_where_it_was_made(folder, tmp_path, capsys):
    run("publish", folder / "backbone.pth", "--output", tmp_path, "--name", "mine")
    path = published(capsys)
    assert re.fullmatch(r"mine-[0-9a-f]{8}\.pth", path.rpartition("/")[2])
    said = features.resolve_checkpoint(path).settings
    assert said == {name: value for name, value in SETTINGS.items() if name != "data"}
    assert b"somebody" not in Path(path).read_bytes()


def test_half_is_half_and_loads(folder, tmp_path, capsys):
    for flags in ([], ["--half"]):
        run("publish", folder, "--output", tmp_path, *flags)
    whole, half = (line.partition(": ")[0] for line in capsys.readouterr().out.splitlines())
    models = [features.build(features.DIGITS) for _ in range(2)]
    for model, path in zip(models, (whole, half), strict=True):
        weights.load_backbone(model, path)
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        wanted = one.half().float() if one.is_floating_point() else one
        assert other.dtype == one.dtype and torch.equal(other, wanted)
    assert Path(half).stat().st_size < 0.6 * Path(whole).stat().st_size


def test_of_a_part_of_a_tensor_the_rest_is_not_published(folder, tmp_path, capsys):
    state = torch.load(folder / "backbone.pth", weights_only=True)
    before = (folder / "backbone.pth").stat().st_size
    state["bn1.weight"] = torch.rand(10**6)[: len(state["bn1.weight"])]
    torch.save(state, folder / "backbone.pth")
    run("publish", folder, "--output", tmp_path)
    assert Path(published(capsys)).stat().st_size < before + 10**5


def test_what_cannot_be_published_is_said(folder, tmp_path):
    state = torch.load(folder / "backbone.pth", weights_only=True)
    for value, flags, named in ((1e6, ["--half"], "bn1.weight is not finite, being beyond 65504"),
                                (float("nan"), [], "bn1.weight is not finite$")):
        state["bn1.weight"][0] = value
        torch.save(state, tmp_path / "bad.pth")
        with pytest.raises(RunError, match=named):
            run("publish", tmp_path / "bad.pth", "--output", tmp_path / "out", *flags)
    torch.save({"step": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="step is no tensor; convert.py"):
        run("publish", tmp_path / "checkpoint.pt", "--output", tmp_path / "out")
    with pytest.raises(RunError, match="nowhere: no file"):
        run("publish", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- env


def test_the_block_of_a_bug_report(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run("env")
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in printed and "timm" in printed
    assert "OMP_NUM_THREADS=3" in printed and "GPUs:" in printed and "\n\n" not in printed


# ------------------------------------------------------------------------------------------ flatten


def flattened(script, out):
    run("flatten", script, out)
    return Path(out).read_text()


def unresolved(table, known):
    """Global names that a scope of a module uses and that are not among the known ones."""
    if table.get_type() == "module":
        known = known | {symbol.get_name() for symbol in table.get_symbols()
                         if symbol.is_assigned() or symbol.is_imported()}
    used = {symbol.get_name() for symbol in table.get_symbols()
            if symbol.is_referenced() and symbol.is_global()}
    return (used - known).union(*(unresolved(child, known) for child in table.get_children()))


@pytest.mark.parametrize("script", [
    p.stem for p in sorted(ROOT.glob("*.py")) if p.stem != "visualize"])
def test_every_script_is_flattened_and_every_name_is_there(script, tmp_path):
    source, text = ROOT / f"{script}.py", flattened(ROOT / f"{script}.py", tmp_path / "flat.py")
    builtin = {*dir(builtins), "__file__", "__name__", "__doc__"}
    assert not unresolved(symtable.symtable(text, "flat.py", "exec"), builtin)
    tree = ast.parse(text)
    assert ast.get_docstring(tree) == ast.get_docstring(ast.parse(source.read_text()))
    defined = [node.name for node in tree.body
               if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "_"]
    assert len(set(defined)) == len(defined) > 20
    imported = [str(getattr(node, "module", None) or node.names[0].name)
                for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(name.partition(".")[0] == "common" for name in imported)
    head = text[: text.index('"""')]
    assert f"flatten {script}.py`" in head and "MIT License" in head and "(c) 2026" in head
    assert text.count("\n# THE SOFTWARE IS PROVIDED") == 1


def test_no_definition_is_there_for_nothing(tmp_path):
    """Each is used somewhere, and what the script does not use is left out."""
    tree = ast.parse(flattened(ROOT / "simsiam.py", tmp_path / "flat.py"))
    tops = {node.name for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)} - {"_"}
    assert not tops - {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert {"Training", "View", "SyncBatchNorm"} <= tops
    assert not tops & {"knn_predict", "all_gather_with_grad", "LARS", "RandAugment"}


def package(root, **modules):
    """A small repository of modules of `common/` and a licence, for `tools.HERE`."""
    (root / "common").mkdir()
    (root / "LICENSE").write_text("Some Licence\n\nCopyright (c) me\n")
    for name, text in modules.items():
        (root / "common" / f"{name}.py").write_text(textwrap.dedent(text))
    return root


def test_names_meet_and_comments_stay(tmp_path, monkeypatch):
    one = '''
        """Module one."""

        import math
        import os

        # ---------------------------------------------------------------- numbers

        LIMIT = 3  # a constant
        UNUSED = 4


        # why size is so
        def size(scale=LIMIT):
            return scale  # trailing


        def area(x):
            return math.prod([size(), x])


        def left_out():
            return os.getcwd()


        def table():
            return {}


        REGISTERED = table()


        @REGISTERED.setdefault  # acts on it
        def _(name):
            return name


        REGISTERED.update(seen=area)
    '''
    two = '''
        from common import one
        from common.one import area as surface


        def area(size):
            return [f"{one.size()} size", one.LIMIT * one.size(scale=one.LIMIT,
                                                               ), surface(size)]


        def compile(x):
            return [size for size in range(x)], lambda size: (size, one.size())
    '''
    script = '''
        """Script."""

        import sys

        from common import one, two
        from common.two import area


        def main():
            size = 5
            area_two = area(size)
            print(one.size() + size, area_two, two.compile(2)[0], one.area(2))
            print(len(one.REGISTERED))


        main()
    '''
    monkeypatch.setattr(tools, "HERE", str(package(tmp_path, one=one, two=two)))
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    text = flattened(tmp_path / "script.py", tmp_path / "alone" / "script.py")
    printed = [subprocess.run([sys.executable, str(path)], capture_output=True, text=True,
                              cwd=tmp_path).stdout
               for path in (tmp_path / "script.py", tmp_path / "alone" / "script.py")]
    assert printed[0] == printed[1] != ""
    for there in ("# why size is so\n", "LIMIT = 3  # a constant\n", "return scale  # trailing\n",
                  "def one_size(scale=LIMIT)", "def one_area(x)", "def two_area(size)",
                  "def two_compile(x)", "numbers\n", "# Module one.\n", "# acts on it",
                  'f"{one_size()} size", LIMIT * one_size(scale=LIMIT,\n' + 51 * " " + ")"):
        assert there in text, there
    for gone in ("UNUSED", "left_out", "import os", "import sys", "common import"):
        assert gone not in text, gone


@pytest.mark.parametrize("line, named", [
    ("vars(one)", "line 4: `vars\\(one\\)` does not name"),
    ("one.nothing()", "`one.nothing` does not name"),
    ("import common.one", "line 4 imports common.one; only"),
    ("def f():\n    from common.one import x", "line 5 imports x; only"),
    ("import other", "imports other"),
    ("x = (", "cannot be read"),
])
def test_what_cannot_be_flattened_is_said(line, named, tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "HERE", str(package(tmp_path, one="x = 1\n")))
    (tmp_path / "other.py").write_text("")
    (tmp_path / "script.py").write_text(f'"""Script."""\nfrom common import one\n\n{line}\n')
    with pytest.raises(RunError, match=named):
        run("flatten", tmp_path / "script.py", tmp_path / "out.py")
    assert not (tmp_path / "out.py").exists()


def test_a_file_is_replaced_only_if_asked(tmp_path):
    flattened(ROOT / "simclr.py", tmp_path / "out.py")
    with pytest.raises(RunError, match="there already"):
        run("flatten", ROOT / "simclr.py", tmp_path / "out.py")
    run("flatten", ROOT / "simclr.py", tmp_path / "out.py", "--overwrite")


# Slow for the processes that it starts; the other scripts were trained so by hand.
@pytest.mark.parametrize("script, workers", [("simclr", 1), ("mae", 0)])
def test_alone_in_a_folder_it_learns_the_same_with_spawned_workers(script, workers, tmp_path):
    alone, flags = tmp_path / "alone", [*TINY, "--workers", str(workers)]
    text = flattened(ROOT / f"{script}.py", alone / f"{script}.py")
    assert text.count('get_context("fork")') == 1
    (alone / f"{script}.py").write_text(text.replace('get_context("fork")', 'get_context("spawn")'))
    found = []
    for folder in (ROOT, alone):
        output = str(tmp_path / folder.name / "run")
        done = subprocess.run(
            [sys.executable, f"{script}.py", *flags, "--output", output],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append([line["loss"] for line in lines(output)])
    assert found[0] == found[1] and len(found[0]) == 2
