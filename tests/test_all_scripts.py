"""The contract that every method script keeps. A script joins by standing in the repository root.

What it needs beside `RECIPES` with `digits`, `parse_args`, `build_views` and `main`: an entry in
`helpers.EXTRA` if it cannot train with `TINY`, one in `STILL` if some trainable parameters rightly
stay where they are, one in `DECAYED` if weight decay is on more than weights; and its first steps
in golden_digits.json, written by `python tests/test_golden.py`. What `common/` does alike for every
script is tested with SimCLR alone.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import drill
from common import backbones, cli
from common.checkpoint import Run
from common.distributed import RunError
from common.log import Log
from helpers import EXTRA, ROOT, SCRIPTS, TINY, lines, parsed

DRILL = {  # for a run that is stopped
    "dinov2": ["--koleo-weight", "0"],  # KoLeo's neighbours are those of a process
    "simmim": ["--relative-positions"],
    "swav": ["--queue-length", "32", "--queue-start-epoch", "0", "--teacher-momentum", "0.9"],
}
QUICK = {  # what keeps an evaluation short
    "eval_linear": ["--folds", "2", "--weight-decays", "0.001", "0.1"],
    "eval_segmentation": ["--memory", "2000", "--windows", "whole"],
    "eval_svm": ["--costs", "1", "--low-shot", "1", "--draws", "1"],
}
RESULT = {  # of an evaluation, if not top1
    "eval_retrieval": "map", "eval_segmentation": "miou", "eval_svm": "map",
}
STILL: dict[str, set[str]] = {}  # trainable parameters that two steps need not move
DECAYED = {  # whole, biases and norms as well
    "moco", "densecl", "simsiam", "swav", "deepcluster_v2", "npid_pirl", "lejepa",
    "deepcluster_odc",
}
SPARED = {"simmim": {"backbone.cls_token", "backbone.pos_embed"}}  # not decayed though not vectors
SHARED = {
    "data", "limit", "recipe", "arch", "image_size", "in_chans", "mean", "std", "epochs",
    "batch_size", "lr", "weight_decay", "warmup_epochs", "sync_bn", "output", "resume",
    "save_every_minutes", "workers", "device", "amp", "seed", "compile", "deterministic",
    "log_every", "index", "bits", "exif_orientation",
}

CROPS = {"crop_scale", "num_crops", "crop_sizes", "crop_scales", "stem"}  # where a script has them
BUDGET = {  # lines that `git diff --patience` of two neighbours may show, of both sides together
    ("simclr", "barlow_twins"): 180, ("simclr", "moco"): 330, ("simclr", "simclr_multicrop"): 205,
    ("moco", "densecl"): 220,
    ("deepcluster_v2", "swav"): 400,  # 25 of them its teacher
    ("swav", "dino"): 480, ("dino", "dinov2"): 670,
    ("simsiam", "byol"): 180, ("byol", "moco_v3"): 275, ("moco_v3", "dino"): 470,
    ("barlow_twins", "vicreg"): 160, ("vicreg", "lejepa"): 290, ("simclr", "pretext"): 495,
    ("mae", "simmim"): 370, ("mae", "ijepa"): 470, ("simmim", "cae"): 440,
}

every_script = pytest.mark.parametrize("script", SCRIPTS)


def equal(one, other):
    """Whether two nested structures hold the same numbers, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (dict, list, tuple)):
        pairs = one.items() if isinstance(one, dict) else enumerate(one)
        return len(one) == len(other) and all(equal(value, other[key]) for key, value in pairs)
    return one == other


def same_tensors(one, other):
    return equal(*(torch.load(path, weights_only=True) for path in (one, other)))


# -------------------------------------------------------------------------- importing, command line


def test_importing_does_nothing():
    code = (
        f"import sys, {', '.join(SCRIPTS)}, torch.distributed;"
        "assert not torch.distributed.is_initialized() and 'faiss' not in sys.modules;"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@every_script
def test_every_step_of_the_docstring_has_its_comment_in_the_loop(script):
    source = (ROOT / f"{script}.py").read_text()
    steps = re.findall(r"^(\d+)\. ", source.split('"""')[1], re.M)
    assert steps == [str(number) for number in range(1, len(steps) + 1)] and len(steps) >= 3
    loop = source[source.index(" in run.steps(") :]
    noted = {number for comment in re.findall(r"#(.*)", loop)
             for number in re.findall(r"(?<![\d.])(\d+)\.(?!\d)", comment)}
    assert noted == set(steps)


def changed_lines(one, other):
    """Lines that differ between two scripts, counted on both sides."""
    paths = [ROOT / f"{script}.py" for script in (one, other)]
    if shutil.which("git"):
        command = ["git", "diff", "--no-index", "--no-ext-diff", "--patience", "--numstat", *paths]
        done = subprocess.run(command, capture_output=True, text=True)
        return sum(map(int, done.stdout.split()[:2]))
    texts = [path.read_text().splitlines() for path in paths]
    blocks = difflib.SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks()
    return sum(map(len, texts)) - 2 * sum(block.size for block in blocks)


@pytest.mark.parametrize("pair", BUDGET, ids=" ".join)
def test_the_difference_between_neighbours_is_a_lesson_not_noise(pair):
    assert 50 < changed_lines(*pair) <= BUDGET[pair]


@every_script
def test_help_shows_the_values_in_force(script, capsys):
    module = importlib.import_module(script)
    for recipe, values in module.RECIPES.items():
        with pytest.raises(SystemExit) as ended:
            module.parse_args(["--recipe", recipe, "--help"])
        assert ended.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"[{values['lr']}]" in shown and f"[{values['batch_size']}]" in shown


@every_script
def test_the_recipe_follows_the_data_and_a_flag_wins(script):
    module = importlib.import_module(script)
    assert module.parse_args([]).recipe == "digits"
    assert module.parse_args(["--data", "/some/folder"]).recipe == "imagenet"
    assert module.parse_args(["--recipe", "cifar10"]).epochs == module.RECIPES["cifar10"]["epochs"]
    assert module.parse_args(["--recipe", "cifar10", "--epochs", "77"]).epochs == 77


def flags_of(script, monkeypatch):
    """Every flag of a script by name: its spelling, type, choices and number of values."""
    caught = []

    def catch(parser, recipes, argv=None):
        caught.append(parser)
        raise InterruptedError

    monkeypatch.setattr(cli, "parse", catch)
    with contextlib.suppress(InterruptedError):
        importlib.import_module(script).parse_args([])
    actions = [a for a in caught[0]._actions if not isinstance(a, argparse._HelpAction)]
    kinds = {a.dest: (a.option_strings, a.type, a.choices, a.nargs, type(a)) for a in actions}
    return kinds | {"recipe": None}


@every_script
def test_how_images_are_read_reaches_the_images(script, monkeypatch):
    """A script that forgot it would train on other pixels without a word."""
    module, args = parsed(script, "--bits", 16, "--exif-orientation", "--index", "here")
    told = {}

    def opened(*_, **how):
        told.update(how)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "open_images", opened)
    with pytest.raises(KeyboardInterrupt):
        module.main(args)
    assert told == cli.sources(args)
    assert (told["bits"], told["exif_orientation"], told["index"]) == (16, True, "here")


@every_script
def test_shared_flags_are_the_same_everywhere(script, monkeypatch):
    flags = flags_of(script, monkeypatch)
    recipe = importlib.import_module(script).RECIPES["digits"]
    shared = SHARED if "sync_bn" in recipe else SHARED - {"sync_bn"}  # there is no batch norm
    assert flags.keys() >= shared and ("sync_bn" in flags) == ("sync_bn" in recipe)
    for reference in (flags_of(name, monkeypatch) for name in ("simclr", "swav")):
        for name in (shared | CROPS) & flags.keys() & reference.keys() - {"arch"}:
            assert flags[name] == reference[name], name


@every_script
@pytest.mark.parametrize(
    "flags, named",
    [
        (["--epochs", "-3"], "-3"),
        (["--arch", "resnet51"], "resnet51"),
        (["--batch-size", "0"], "'0'"),
        (["--lr", "nan"], "nan"),
        (["--epochs", "5", "--warmup-epochs", "9"], "9"),
        (["--mean", "1", "2"], "2 values"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_bad_argument_is_one_line_with_its_value(script, flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).parse_args(flags)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and named in printed and printed.count("\n") == 1


@every_script
def test_a_batch_of_one_image_is_too_few_for_batch_norm(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    if "sync_bn" not in module.RECIPES["digits"]:
        alone = ["--koleo-weight", "0"] if script == "dinov2" else []  # which needs a neighbour
        assert module.parse_args(["--batch-size", "1", *alone]).batch_size == 1
        return
    for processes in (1, 3):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        with pytest.raises(SystemExit):
            module.parse_args(["--batch-size", str(processes)])
        assert f"--batch-size {processes} gives less than two" in capsys.readouterr().err


@every_script
def test_a_batch_that_does_not_divide_among_processes_is_refused(script, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--batch-size", "7"])
    assert "--batch-size 7" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- a tiny run


def watched_run(script, folder, *flags):
    """Train in this process; parameters that did not move, and those with a gradient they lack."""
    module, args = parsed(script, "--output", folder, *flags)
    seen, start = {}, Run.start

    def remember(self, state):
        step = start(self, state)
        modules = {n: m for n, m in state.items() if isinstance(m, torch.nn.Module)}
        seen.update({(n, k): (p, p.detach().clone()) for n, m in modules.items()
                     for k, p in m.named_parameters()})
        return step

    Run.start = remember
    try:
        module.main(args)
    finally:
        Run.start = start
    unmoved = [k for (_, k), (p, old) in seen.items() if p.requires_grad and torch.equal(p, old)]
    reached = [k for (_, k), (p, _) in seen.items() if not p.requires_grad and p.grad is not None]
    return unmoved, reached, [line["loss"] for line in lines(folder)]


@every_script
@pytest.mark.parametrize("size", [1, 2])
def test_two_steps_move_every_trainable_parameter(script, size, pool, tmp_path):
    for unmoved, reached, losses in pool.run(size, watched_run, script, str(tmp_path)):
        assert set(unmoved) <= STILL.get(script, set())
        assert reached == []  # teachers and frozen parts are never reached
        assert len(losses) == 2 and np.isfinite(losses).all()


@every_script
@pytest.mark.parametrize("channels", [1, 4, 10])
def test_any_channel_count_trains(script, channels, tmp_path, capsys):
    module, args = parsed(script, "--in-chans", channels, "--output", tmp_path)
    module.main(args)
    assert len(lines(tmp_path)) == 2
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert any(value.ndim == 4 and value.shape[1] == channels for value in weights.values())


@every_script
def test_the_export_loads_in_every_evaluation(script, tmp_path, capsys):
    """In k-NN, and in the others, which load in the same way, of a ResNet and of a transformer."""
    module, args = parsed(script, "--output", tmp_path)
    module.main(args)
    evaluations = sorted(p.stem for p in ROOT.glob("eval_*.py"))
    for evaluation in evaluations if script in ("simclr", "mae") else ["eval_knn"]:
        capsys.readouterr()
        evaluator = importlib.import_module(evaluation)
        flags = ["--checkpoint", str(tmp_path), "--limit", "200", *QUICK.get(evaluation, [])]
        evaluator.main(evaluator.parse_args(flags))
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert f"eval_{result['eval']}" == evaluation and result["num_test"] == 200
        assert 0 < result[RESULT.get(evaluation, "top1")] <= 1


def test_run_json_says_what_was_run(tmp_path):
    module, args = parsed("simclr", "--output", tmp_path)
    module.main(args)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["batch_size"] == 16 and record["parameters"] > 1000
    assert record["starts"][0]["versions"]["torch"] == torch.__version__


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def unit(*shape):
    return torch.nn.functional.normalize(numbers(*shape), dim=-1)


def words(images, *_):
    return torch.nn.functional.conv2d(images, numbers(40, 3, 4, 4), stride=4).argmax(1).flatten(1)


AUTOCAST = {  # functions with a matrix product: float32 arguments, the first ones with gradient
    ("simclr", "nt_xent"): lambda: (numbers(8, 5), numbers(8, 5) + 1, 0.1),
    ("simclr_multicrop", "multicrop_nt_xent"): lambda: (numbers(24, 5), 3, 0.1),
    ("moco", "info_nce"): lambda: (numbers(8, 5), numbers(8, 5) + 1, unit(12, 5), 0.1),
    ("densecl", "info_nce"): lambda: (numbers(8, 5), numbers(8, 5) + 1, unit(12, 5), 0.1),
    ("densecl", "dense_info_nce"): lambda: (
        numbers(4, 9, 5), numbers(4, 9, 5) + 1, torch.arange(36).view(4, 9) % 7, unit(12, 5), 0.1),
    ("densecl", "match_cells"): lambda: (numbers(4, 900, 5), numbers(4, 900, 5) + 1),
    ("moco_v3", "contrastive_loss"): lambda: (numbers(8, 5), numbers(8, 5) + 1, 0.1),
    ("barlow_twins", "barlow_twins_loss"): lambda: (numbers(8, 5), numbers(8, 5) + 1, 0.1),
    ("vicreg", "vicreg_loss"): lambda: (numbers(8, 5), numbers(8, 5) + 1, 25.0, 25.0, 1.0),
    ("lejepa", "sigreg"): lambda: (numbers(2, 8, 5), unit(7, 5).T),
    ("npid_pirl", "memory_logits"): lambda: (
        unit(2, 4, 5), unit(12, 5), torch.arange(4), torch.arange(12).view(4, 3), 0.1),
    ("dinov2", "dino_loss"): lambda: (numbers(4, 3, 9), numbers(2, 3, 9).softmax(2), 0.1),
    ("dinov2", "patch_loss"): lambda: (
        numbers(6, 9), numbers(6, 9).softmax(1), torch.full((6,), 0.5), 4, 0.1),
    ("dinov2", "koleo_loss"): lambda: (unit(900, 5),),
    ("swav", "swapped_prediction_loss"): lambda: (
        numbers(4, 3, 9), numbers(2, 3, 9).softmax(2), 0.1),
    ("swav", "compute_codes"): lambda: (numbers(2, 3, 9), unit(2, 8, 5), unit(9, 5), 0.05, 3),
    ("dino", "dino_loss"): lambda: (numbers(4, 3, 9), numbers(2, 3, 9), numbers(9), 0.1, 0.04),
    ("deepcluster_odc", "update_memory"): lambda: (
        unit(900, 5), torch.arange(900), numbers(40, 5), torch.arange(900), numbers(900, 5), 0.5),
    ("deepcluster_odc", "repair_clusters"): lambda: (
        unit(900, 5), torch.arange(900) % 40, numbers(40, 5), 23, 0, 0),
    ("cae", "vae_words"): lambda: (
        numbers(8, 3, 64, 64), words, [0.0] * 3, [1.0] * 3, (16, 16)),
}


@pytest.mark.parametrize("script, name", AUTOCAST)
def test_pasted_into_an_autocast_region_a_loss_keeps_its_precision(script, name):
    function, found = getattr(importlib.import_module(script), name), []
    for enabled in (False, True):
        args = AUTOCAST[script, name]()
        args[0].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = function(*args)
        if value is not None and value.requires_grad:
            value.sum().backward()
        given = [x.detach() for x in args if isinstance(x, torch.Tensor)]  # some write to it
        found.append([value if value is None else value.detach(), args[0].grad, *given])
    assert equal(*found)


@every_script
def test_amp_bf16_stays_near_float32(script, tmp_path):
    losses = []
    for amp in ("none", "bf16"):
        module, args = parsed(script, "--amp", amp, "--output", tmp_path / amp)
        module.main(args)
        losses.append([line["loss"] for line in lines(tmp_path / amp)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05, atol=0.01)  # SimSiam's are near 0


def losses_of(script, folder, *flags):
    module, args = parsed(script, "--output", folder, *flags)
    module.main(args)
    return [line["loss"] for line in lines(folder)]


@every_script
def test_a_traced_backbone_computes_the_same_and_keeps_its_names(script, tmp_path, monkeypatch):
    """`--compile`, with the backend that runs the traced operations as they are."""
    traced, compile = [], torch.nn.Module.compile

    def trace(self, **options):
        traced.append(self)
        compile(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    torch.compiler.reset()  # what was traced before counts towards a limit
    plain = losses_of(script, tmp_path / "plain")
    same = losses_of(script, tmp_path / "traced", "--compile")
    np.testing.assert_allclose(same, plain, rtol=1e-4)
    weights = torch.load(tmp_path / "traced" / "backbone.pth", weights_only=True)
    assert traced and not any("_orig_mod" in key for key in weights)


@pytest.mark.slow
@every_script
def test_twenty_compiled_steps_are_twenty_steps_within_bf16_rounding(script, tmp_path):
    """As near to the plain steps in bf16 as those are to float32. Needs a C++ compiler."""
    torch.compiler.reset()
    flags = ["--limit", "320", "--lr", "0.01", "--amp"]
    exact = np.array(losses_of(script, tmp_path / "exact", *flags, "none"))
    plain = np.array(losses_of(script, tmp_path / "plain", *flags, "bf16"))
    compiled = losses_of(script, tmp_path / "compiled", *flags, "bf16", "--compile")
    rounding = np.square(plain - exact).mean() ** 0.5
    assert len(plain) == 20 and 0 < rounding < 0.05 * max(1, plain.mean())
    assert np.square(compiled - plain).mean() ** 0.5 < 2 * rounding


def optimiser_steps(script, folder, *flags):
    """Before each step of a run: by name, each parameter's rate, decay, trust ratio, dimensions."""
    module, args = parsed(script, "--output", folder, *flags)
    modules, kinds, steps, start = {}, set(), [], Run.start

    def remember(self, state):
        modules.update((n, m) for n, m in state.items() if isinstance(m, torch.nn.Module))
        return start(self, state)

    def look(optimizer, *_):
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        kinds.add(type(optimizer).__name__)
        steps.append({
            name: (group_of[p]["lr"], group_of[p]["weight_decay"] * group_of[p].get("decay", True),
                   group_of[p].get("adapt"), p.ndim)
            for m in modules.values() for name, p in m.named_parameters() if p in group_of
        })

    Run.start, hook = remember, register_optimizer_step_pre_hook(look)
    try:
        module.main(args)
    finally:
        Run.start = start
        hook.remove()
    return args, steps, *kinds


@every_script
def test_the_optimiser_has_the_rate_that_the_log_says(script, tmp_path):
    flags = ["--limit", "64", "--epochs", "4", "--warmup-epochs", "1"]
    args, steps, _ = optimiser_steps(script, tmp_path, *flags)
    logged = [line["lr"] for line in lines(tmp_path)]
    assert len(steps) == len(logged) == 16
    weight = next(name for name, (*_, ndim) in steps[0].items() if ndim > 1)
    assert [step[weight][0] for step in steps] == pytest.approx(logged)
    assert sorted(logged[:4]) == logged[:4] and logged[0] < logged[3]  # the warm-up, and then down
    peak = args.lr * args.batch_size / 256
    assert 0.85 * peak < max(logged) < 1.001 * peak
    assert logged[15] < logged[8] < logged[4]


@every_script
def test_weight_decay_and_trust_ratio_reach_the_parameters_that_the_paper_names(script, tmp_path):
    """Weights only; every parameter in the scripts of `DECAYED`."""
    args, steps, kind = optimiser_steps(script, tmp_path, "--warmup-epochs", "0")
    rates = {ndim > 1: rate for rate, _, _, ndim in steps[0].values()}
    biases = getattr(args, "lr_biases", args.lr) / args.lr
    assert rates[False] == pytest.approx(rates[True] * biases)
    for name, (_, decay, adapts, ndim) in steps[0].items():
        decayed = (ndim > 1 and name not in SPARED.get(script, ())) or script in DECAYED
        assert decay == pytest.approx(args.weight_decay if decayed else 0), name
        assert adapts == {"LARS": ndim > 1, "LARC": True}.get(kind), name


# -------------------------------------------------------------------- what is refused when resuming


def test_a_changed_setting_is_refused_with_both_values(tmp_path):
    module, args = parsed("simclr", "--output", tmp_path)
    module.main(args)
    module, args = parsed("simclr", "--output", tmp_path, "--lr", "0.12345")
    recipe_lr = module.RECIPES["digits"]["lr"]
    with pytest.raises(RunError, match=rf"--lr is 0\.12345 and was {recipe_lr}.*--no-resume"):
        module.main(args)
    module, args = parsed("simclr", "--output", tmp_path, "--lr", "0.12345", "--no-resume")
    module.main(args)  # starts anew
    assert len(lines(tmp_path)) == 2


def test_a_broken_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    module, args = parsed("simclr", "--output", tmp_path, "--epochs", "2")
    module.main(args)
    whole = (tmp_path / "backbone.pth").read_bytes(), lines(tmp_path)[-1]["loss"]
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        broken = (tmp_path / name).read_bytes()[:1000]
        (tmp_path / name).write_bytes(broken)
        if name == "checkpoint.pt":
            capsys.readouterr()
            module.main(args)  # the second epoch once more
            assert "going on from checkpoint.prev.pt" in capsys.readouterr().out
            assert lines(tmp_path)[-1]["loss"] == whole[1]
            (tmp_path / "checkpoint.pt").write_bytes(broken)
    with pytest.raises(RunError, match=r"checkpoint\.pt.*prev.*cannot be read"):
        module.main(args)


# --------------------------------------------------------------------- real processes, real signals


def run_to_the_end(script, flags):
    """Run a script in a process of the pool."""
    module = importlib.import_module(script)
    module.main(module.parse_args(list(map(str, flags))))


def run_until(script, flags, last_step):
    """The same, with a stop signal to the first process in a certain step."""
    write = Log.write

    def write_and_signal(self, step, **values):
        write(self, step, **values)
        if step == last_step and self.world.is_main:
            signal.raise_signal(signal.SIGUSR1)

    Log.write = write_and_signal
    try:
        run_to_the_end(script, flags)
    finally:
        Log.write = write


@every_script
def test_what_a_script_remembers_is_all_that_it_needs(script, pool, tmp_path):
    """Stopped on two processes in the middle of an epoch; gone on with on two, and on one."""
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    flags = [*TINY, "--limit", 48, "--epochs", 3, "--warmup-epochs", 1]  # 3 steps an epoch
    flags += [*EXTRA.get(script, []), *DRILL.get(script, []), "--output"]
    pool.run(2, run_to_the_end, script, [*flags, whole])
    pool.run(2, run_until, script, [*flags, cut], 4)
    saved = torch.load(cut / "checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["processes"], len(lines(cut))) == (4, 2, 4)
    shutil.copytree(cut, other)
    pool.run(2, run_to_the_end, script, [*flags, cut])
    assert same_tensors(whole / "checkpoint.pt", cut / "checkpoint.pt")
    assert same_tensors(whole / "backbone.pth", cut / "backbone.pth")
    losses = [[line["loss"] for line in lines(folder)] for folder in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    pool.run(1, run_to_the_end, script, [*flags, other])
    found = [line["loss"] for line in lines(other)]
    assert len(found) == 9
    np.testing.assert_allclose(found[:6], losses[0][:6], rtol=1e-3)  # other sums, other roundings


TRUNK = [*TINY, "--epochs", 2, "--image-size", 32]  # for trunks that halve the image five times


def test_a_trunk_of_torchvision_with_stochastic_depth_goes_on_exactly(pool, tmp_path, capsys):
    """Stopped after the first of four steps; then evaluated by what its file says of itself."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*TRUNK, "--arch", "torchvision:efficientnet_b0", "--output"]
    pool.run(2, run_to_the_end, "simclr", [*flags, whole])
    pool.run(2, run_until, "simclr", [*flags, cut], 1)
    pool.run(2, run_to_the_end, "simclr", [*flags, cut])
    assert same_tensors(whole / "checkpoint.pt", cut / "checkpoint.pt")
    assert [x["loss"] for x in lines(cut)] == [x["loss"] for x in lines(whole)]
    evaluator = importlib.import_module("eval_knn")
    flags = ["--checkpoint", str(cut / "backbone.pth"), "--limit", "200", "--shots"]
    evaluator.main(evaluator.parse_args(flags))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["results"][0]["layer"] == "features" and result["num_test"] == 200


@pytest.mark.parametrize("script", ["dino", "moco_v3"])
def test_a_transformer_of_timm_trains_on_crops_of_every_size(script, tmp_path):
    pytest.importorskip("timm")
    crops = ["--num-crops", "2", "1", "--crop-sizes", "32", "16", "--crop-scales", "0.6", "1",
             "0.3", "0.6", "--freeze-last-layer-epochs", "0"]
    module = importlib.import_module(script)
    module.main(module.parse_args([
        *map(str, TRUNK), "--epochs", "1", *(crops if script == "dino" else []),
        "--arch", "timm:vit_tiny_patch16_224", "--output", str(tmp_path)]))
    losses = [line["loss"] for line in lines(tmp_path)]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert "blocks.0.attn.qkv.weight" in torch.load(tmp_path / "backbone.pth", weights_only=True)


@pytest.mark.parametrize("script, flags, named", [
    ("simclr", ["--stem", "small"], "--stem small is for ResNets, and --arch is torchvision"),
    ("dino", ["--patch-size", "8"], "--patch-size 8 is for our own transformers"),
    ("dino", ["--grad-checkpoint"], "--grad-checkpoint"),
    ("simclr_multicrop", ["--no-sync-bn", "--grad-cache", "8"], "stochastic depth"),
    ("mae", [], "torchvision:efficientnet_b0 gives a pooled feature alone"),
    ("eval_knn", ["--checkpoint", "random", "--stem", "small"], "--stem small is for ResNets"),
])
def test_what_another_librarys_trunk_does_not_have_is_refused(script, flags, named, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args([
            *flags, "--arch", "torchvision:efficientnet_b0"])
    assert named in capsys.readouterr().err


def test_crops_that_a_trunk_does_not_take_are_refused_before_a_run_is_replaced(tmp_path):
    (tmp_path / "backbone.pth").write_text("of the run before")
    module, args = parsed("swav", "--arch", "torchvision:alexnet", "--image-size", "64",
                          "--crop-sizes", "64", "32", "--no-resume", "--output", tmp_path)
    with pytest.raises(RunError, match="torchvision:alexnet does not take images of 32x32 px"):
        module.main(args)
    assert (tmp_path / "backbone.pth").exists()


def test_weights_with_parts_that_the_backbone_lacks_are_refused_in_one_line(tmp_path):
    scaled = backbones.build_backbone(
        "vit_micro", in_chans=3, image_size=16, patch_size=4, positions="learned", drop_path=0.0,
        layer_scale=0.1)
    torch.save(scaled.state_dict(), tmp_path / "scaled.pth")
    module, args = parsed("dino", "--arch", "vit_micro", "--patch-size", "4", "--init",
                          tmp_path / "scaled.pth", "--freeze-backbone-epochs", "0", "--output",
                          tmp_path / "run")
    with pytest.raises(RunError, match=r"scaled\.pth does not fit: .*ls1\.gamma") as error:
        module.main(args)
    assert "\n" not in str(error.value)


def test_the_output_folder_of_another_librarys_trunk_has_a_plain_name():
    module = importlib.import_module("simclr")
    args = module.parse_args(["--arch", "torchvision:swin_t"])
    assert args.output == os.path.join("runs", "simclr-digits-torchvision-swin_t")


@pytest.mark.slow
@every_script
def test_killed_it_goes_on_as_if_nothing_had_been(script, pool, tmp_path):
    """Killed for real in the middle of an epoch."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*drill.SMALL, "--epochs", 3, "--warmup-epochs", 1]  # 16 steps an epoch
    flags += [*EXTRA.get(script, []), *DRILL.get(script, [])]
    pooled = [*flags, "--workers", 0, "--output"]
    pool.run(2, run_to_the_end, script, [*pooled, whole])
    process = drill.start(f"{script}.py", *flags, "--output", cut, processes=2)
    drill.wait_for(lambda: max((x["step"] for x in drill.log_of(cut)), default=0) >= 20, process)
    drill.kill(process)
    assert list(cut.glob("checkpoint*.pt")) and lines(cut)[-1]["step"] < 48
    pool.run(2, run_to_the_end, script, [*pooled, cut])
    assert same_tensors(whole / "checkpoint.pt", cut / "checkpoint.pt")
    assert [x["loss"] for x in lines(cut)] == [x["loss"] for x in lines(whole)]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_it_ends_with_the_same_weights(processes, pool, tmp_path):
    """With SimCLR, whose loop is that of the others; once it is killed during a save."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*drill.SMALL, "--workers", 0, "--epochs", 4, "--warmup-epochs", 1]
    flags += ["--output"]  # 16 steps an epoch
    pool.run(processes, run_to_the_end, "simclr", [*flags, whole])

    saving = cut / "checkpoint.pt.tmp"

    def step():
        return max((line["step"] for line in drill.log_of(cut)), default=0)

    for moment in (
        lambda: step() >= 20, lambda: step() >= 30 and saving.exists(), lambda: step() >= 50
    ):
        pool.kill(moment, processes, run_to_the_end, "simclr", [*flags, cut])
        assert list(cut.glob("checkpoint*.pt")) and step() < 64
    pool.run(processes, run_to_the_end, "simclr", [*flags, cut])
    assert same_tensors(whole / "checkpoint.pt", cut / "checkpoint.pt")
    assert [line["step"] for line in lines(cut)] == list(range(1, 65))
    assert [line["loss"] for line in lines(cut)] == [line["loss"] for line in lines(whole)]


def test_a_stop_signal_to_torchrun_saves(tmp_path):
    process = drill.start("simclr.py", *drill.SMALL, "--epochs", 60, "--output", tmp_path,
                          processes=2)
    drill.wait_for(lambda: len(drill.log_of(tmp_path)) >= 20, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    drill.finish(process)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["processes"] == 2 and 20 <= saved["step"] < 960


def test_the_contract_sees_the_scripts():
    assert "simclr" in SCRIPTS
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
