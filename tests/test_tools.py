import hashlib
import re
from pathlib import Path

import pytest
import torch

import tools
from common import backbones, checkpoint, features, weights
from common.distributed import RunError

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
    for flags, named in ((["resnet51"], "resnet50"), (["vit_tiny", "--image-size", "100"], "100")):
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
