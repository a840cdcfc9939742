import argparse
import copy

import pytest

import simclr
from common import cli

RECIPES = {
    "imagenet": dict(arch="big", in_chans=3, mean=[0.1, 0.2, 0.6], std=[1.0, 2.0, 3.0], epochs=100,
                     batch_size=4096, warmup_epochs=10, lr=0.3, crops=[0.08, 1.0], blur=True),
    "cifar10": dict(arch="small", in_chans=3, mean=[0.5], std=[0.25], epochs=1000, batch_size=512,
                    warmup_epochs=10, lr=1.0, crops=[0.08, 1.0], blur=False),
    "digits": dict(arch="tiny", in_chans=3, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], epochs=60,
                   batch_size=256, warmup_epochs=5, lr=1.5, crops=[0.6, 1.0], blur=False),
}
DOC = """Method: one line.

    1. An indented step.
"""


def parse(*flags, recipes=RECIPES):
    parser = cli.parser("/somewhere/method.py", DOC)
    parser.add_argument("--arch", choices=("big", "small", "tiny"), help="backbone")
    parser.add_argument("--in-chans", type=cli.pos_int, help="channels")
    parser.add_argument("--mean", type=cli.number, nargs="+", help="subtracted")
    parser.add_argument("--std", type=cli.positive, nargs="+", help="divided by")
    parser.add_argument("--epochs", type=cli.pos_int, help="passes")
    parser.add_argument("--batch-size", type=cli.pos_int, help="images")
    parser.add_argument("--warmup-epochs", type=cli.nonneg_int, help="linear from 0")
    parser.add_argument("--lr", type=cli.positive, help="per 256 images")
    parser.add_argument("--crops", type=cli.fraction, nargs=2, help="area")
    parser.add_argument("--blur", action=cli.Switch, help="of half of the views")
    parser.add_argument("--keep", default="90 %", help="share, 100 %% is all")
    parser.add_argument("--seed", type=cli.nonneg_int, default=0, help="of all")
    return cli.parse(parser, recipes, [str(flag) for flag in flags])


def refused(capsys, *flags):
    """The one line that a refused command line prints."""
    with pytest.raises(SystemExit) as ended:
        parse(*flags)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err.startswith("method.py: error: ") and printed.err.count("\n") == 1
    return printed.err


# ------------------------------------------------------------------------------------------ recipes


def test_a_folder_named_like_a_recipe_chooses_none():
    assert parse("--data", "half", recipes=RECIPES | {"half": RECIPES["cifar10"]}).lr == 0.3


@pytest.mark.parametrize(
    "flags, recipe",
    [
        ([], "digits"),
        (["--data", "digits"], "digits"),
        (["--data", "cifar10"], "cifar10"),
        (["--data=cifar10"], "cifar10"),
        (["--data", "imagenet"], "imagenet"),
        (["--data", "svhn"], "imagenet"),
        (["--data", "/images/cifar10"], "imagenet"),
        (["--recipe", "cifar10"], "cifar10"),
        (["--recipe=cifar10", "--data", "/images"], "cifar10"),
        (["--data", "cifar10", "--recipe", "digits"], "digits"),
        (["--data-root", "cifar10"], "digits"),
        (["--output", "cifar10"], "digits"),
    ],
)
def test_the_recipe_is_the_named_one_else_that_of_the_data_else_imagenet(flags, recipe):
    args = parse(*flags)
    assert args.recipe == recipe
    assert {name: getattr(args, name) for name in RECIPES[recipe]} == RECIPES[recipe]


@pytest.mark.parametrize("before", [True, False])
def test_a_flag_wins_over_the_recipe_wherever_it_stands(before):
    flags = ["--lr", 0.7, "--no-blur", "--crops", 0.2, 0.3, "--warmup-epochs", 0]
    recipe = ["--recipe", "imagenet"]
    args = parse(*flags, *recipe) if before else parse(*recipe, *flags)
    assert (args.lr, args.blur, args.crops, args.warmup_epochs) == (0.7, False, [0.2, 0.3], 0)
    assert (args.epochs, args.batch_size) == (100, 4096)


def test_a_switch_can_be_turned_on_and_off():
    assert parse("--blur").blur is True and parse("--recipe", "imagenet", "--no-blur").blur is False
    assert parse().resume is True and parse("--no-resume").resume is False


def test_no_parse_changes_what_the_next_one_gives():
    recipes = copy.deepcopy(RECIPES)
    assert parse("--in-chans", 1, recipes=recipes).mean == [0.5]
    assert parse("--crops", 0.3, 0.4, recipes=recipes).crops == [0.3, 0.4]
    again = parse(recipes=recipes)
    assert (again.mean, again.crops) == ([0.5, 0.5, 0.5], [0.6, 1.0])
    assert recipes == RECIPES


def test_the_values_that_come_out_are_not_the_recipes_own_lists():
    recipes = copy.deepcopy(RECIPES)
    args = parse(recipes=recipes)
    args.mean.append(7.0)
    args.crops[0] = 0.0
    assert recipes == RECIPES


def test_flags_are_not_abbreviated(capsys):
    assert "--epoch" in refused(capsys, "--epoch", 3)
    assert "--dat" in refused(capsys, "--dat", "cifar10")


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are(capsys):
    printed = refused(capsys, "--recipe", "imagenette")
    assert "imagenette" in printed and all(name in printed for name in RECIPES)


# --------------------------------------------------------------------------------------------- help


def shown_help(capsys, *flags):
    with pytest.raises(SystemExit) as ended:
        parse(*flags, "--help")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_the_values_of_each_recipe(recipe, capsys):
    for flags in (["--recipe", recipe], ["--data", recipe]):
        shown = " ".join(shown_help(capsys, *flags).split())
        values = RECIPES[recipe]
        assert f"backbone [{values['arch']}]" in shown
        assert f"per 256 images [{values['lr']}]" in shown
        assert f"area [{values['crops'][0]} {values['crops'][1]}]" in shown
        assert f"subtracted [{' '.join(map(str, values['mean']))}]" in shown
        assert "share, 100 % is all [90 %]" in shown


def test_help_keeps_the_docstring_as_it_is_written(capsys):
    assert DOC in shown_help(capsys)


def test_help_shows_no_default_twice(capsys):
    shown = shown_help(capsys)
    assert "default: True" not in shown and "default: False" not in shown
    assert "None" not in shown


# -------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (cli.nonneg_int, "0", 0),
        (cli.nonneg_int, "12", 12),
        (cli.pos_int, "1", 1),
        (cli.positive, "1e-6", 1e-6),
        (cli.positive, "3", 3.0),
        (cli.not_negative, "0", 0.0),
        (cli.not_negative, "0.5", 0.5),
        (cli.fraction, "0", 0.0),
        (cli.fraction, "1", 1.0),
        (cli.fraction, "0.08", 0.08),
        (cli.number, "-2.5", -2.5),
        (cli.number, "0", 0.0),
    ],
)
def test_a_value_within_the_limits_is_taken(kind, text, value):
    taken = kind(text)
    assert taken == value and type(taken) is type(value)


@pytest.mark.parametrize(
    "kind, refused",
    [
        (cli.nonneg_int, ["-1", "1.5", "1e3"]),
        (cli.pos_int, ["0", "-1", "2.0"]),
        (cli.positive, ["0", "-0.0", "-1"]),
        (cli.not_negative, ["-0.001", "-1"]),
        (cli.fraction, ["-0.001", "1.001", "2"]),
        (cli.number, ["1,5"]),
    ],
    ids=["whole", "count", "positive", "not_negative", "share", "number"],
)
def test_a_value_outside_the_limits_is_refused_by_name(kind, refused):
    for text in [*refused, "", "x", "inf", "-inf", "nan", "1e999", "None"]:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert repr(text) in str(error.value)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--lr", "inf"], "--lr: 'inf'"),
        (["--epochs", "0"], "--epochs: '0'"),
        (["--crops", "0.2"], "--crops"),
        (["--arch", "huge"], "huge"),
        (["--data"], "--data"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--epochs", 5, "--warmup-epochs", 5], "--warmup-epochs 5 leaves nothing of --epochs 5"),
    ],
)
def test_an_error_is_one_line_with_the_value(flags, named, capsys):
    assert named in refused(capsys, *flags)


def test_many_choices_are_listed_once_few_as_they_are():
    made = cli.Parser(formatter_class=cli.HelpFormatter)
    made.add_argument("--arch", choices=[f"net{n}" for n in range(9)], default="net3", help="net")
    made.add_argument("--stem", choices=["small", "large"], default="small", help="stem")
    shown = " ".join(made.format_help().split())
    assert "--arch ARCH net: net0 net1 net2" in shown and "net8 [net3]" in shown
    assert "--stem {small,large}" in shown and shown.count("net5") == 1


def test_only_the_first_process_prints_an_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert "--lr" in refused(capsys, "--lr", "nan")
    group = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    for flags in (["--lr", "nan"], ["--data"], ["--epochs", "1", "--warmup-epochs", "1"]):
        with pytest.raises(SystemExit) as ended:
            parse(*flags)
        assert ended.value.code == 2 and capsys.readouterr() == ("", "")


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    printed = refused(capsys, "--batch-size", 256)
    assert "--batch-size 256" in printed and "3 processes" in printed and "try 258" in printed
    assert parse("--batch-size", 258).batch_size == 258


# ---------------------------------------------------------------------------------------- mean, std


@pytest.mark.parametrize("channels", [1, 4, 10])
def test_a_recipes_means_are_averaged_for_images_that_are_not_rgb(channels):
    args = parse("--recipe", "imagenet", "--in-chans", channels)
    assert args.mean == pytest.approx([0.3]) and args.std == pytest.approx([2.0])


def test_a_recipes_means_stay_where_they_fit():
    args = parse("--recipe", "imagenet", "--in-chans", 3)
    assert (args.mean, args.std) == ([0.1, 0.2, 0.6], [1.0, 2.0, 3.0])
    args = parse("--recipe", "cifar10", "--in-chans", 7)
    assert (args.mean, args.std) == ([0.5], [0.25])


@pytest.mark.parametrize("flag", ["--mean", "--std"])
@pytest.mark.parametrize("channels, given", [(1, 3), (3, 2), (4, 3)])
def test_means_that_are_given_are_refused_if_they_do_not_fit(flag, channels, given, capsys):
    values = RECIPES["digits"]["mean"][:given]  # equal to the recipe's, and still the user's
    printed = refused(capsys, "--in-chans", channels, flag, *values)
    assert f"{flag} has {given} values for --in-chans {channels}" in printed


def test_one_mean_or_one_a_channel_can_be_given():
    args = parse("--in-chans", 2, "--mean", 0.1, "--std", 0.3, 0.4)
    assert (args.mean, args.std) == ([0.1], [0.3, 0.4])


# ------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize(
    "data, name",
    [
        ("digits", "method-digits-tiny"),
        ("cifar10", "method-cifar10-small"),
        ("/images/flowers", "method-flowers-big"),
        ("/images/flowers/", "method-flowers-big"),
        ("flowers//", "method-flowers-big"),
        ("./flowers/.", "method-flowers-big"),
        ("lists/flowers.txt", "method-flowers-big"),
        ("/arrays/flowers.npy", "method-flowers-big"),
    ],
)
def test_the_output_folder_is_named_after_script_data_and_backbone(data, name):
    assert parse("--data", data).output == f"runs/{name}"


def test_an_output_folder_that_is_given_is_kept():
    assert parse("--output", "/somewhere/else").output == "/somewhere/else"


# ----------------------------------------------------------------------------------------- settings


def test_settings_leave_out_the_run_flags_and_nothing_else():
    args = argparse.Namespace(**dict.fromkeys([*cli.RUN_FLAGS, "lr", "data", "limit", "seed"], 1))
    assert cli.settings(args) == dict(data=1, limit=1, lr=1, seed=1)


def test_run_flags_are_those_that_cannot_change_the_weights():
    args = simclr.parse_args([])
    left_out = vars(args).keys() - cli.settings(args).keys()
    assert left_out == cli.RUN_FLAGS - {"accum_steps", "grad_checkpoint"}  # not with batch norm
    assert left_out == {
        "amp", "compile", "data_root", "deterministic", "device", "download", "index", "keep_every",
        "log_every", "lr_divided", "output", "probe_data", "probe_every", "profile", "recipe",
        "resume", "save_every_minutes", "tensorboard", "workers",
    }


def test_settings_do_not_depend_on_how_a_value_came_in():
    spelled = ["--lr", 1.5, "--mean", 0.5, 0.5, 0.5, "--crops", 0.6, 1, "--no-blur"]
    assert cli.settings(parse(*spelled)) == cli.settings(parse())
