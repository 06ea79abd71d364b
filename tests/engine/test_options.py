"""Recipes and command lines, their refusals in one line."""

import argparse
import math
import re
from importlib import import_module

import pytest
import yaml
from helpers import refused

from train_cls import build_parser, resolve
from w2s.engine.checkpoint import plain
from w2s.engine.elsewhere import REMEDIES
from w2s.engine.parsing import Parser, add_switch
from w2s.engine.targets import parse_targets


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def parse(*words: str):
    return build_parser().parse_recipe(list(words))


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_a_recipe_holds_options_under_their_names(recipe):
    args = parse("-c", recipe("model: resnet26\nepochs: 8\nlr: 1e-3\nbatch-size: 64\ntrain_samples: 100\n"))
    assert (args.model, args.epochs, args.lr, args.batch_size, args.train_samples) == ("resnet26", 8, 0.001, 64, 100)


@pytest.mark.parametrize("order", ["-c {} --lr 0.5", "--lr 0.5 -c {}", "--lr=0.5 --config={}"])
def test_the_command_line_wins_over_the_recipe_wherever_it_stands(recipe, order):
    path = recipe("lr: 0.1\nepochs: 8\n")
    args = parse(*(word.format(path) for word in order.split()))
    assert (args.lr, args.epochs) == (0.5, 8)


def test_a_default_on_the_command_line_wins_too(recipe):
    assert parse("-c", recipe("epochs: 8\n"), "--epochs", "100").epochs == 100


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("target: [65, 80.5]", "target", ["65", "80.5"]),
        ("target: 65", "target", ["65"]),
        ("kd_temperature: [4, 2]", "kd_temperature", [4.0, 2.0]),
        ("kd-temperature: 4", "kd_temperature", [4.0]),
        ("kd-off: never", "kd_off", "never"),
        ("kd-off: 4", "kd_off", 4.0),
        ("mean: [-0.5, 1.0e-7, 0]", "mean", [-0.5, 1e-7, 0.0]),
        ("lr: -1.0e-7", "lr", -1e-7),
        ("torchcompile: inductor", "torchcompile", "inductor"),
        ("name: 2026", "name", "2026"),
        ("output: --odd", "output", "--odd"),
        ("teacher: null", "teacher", None),
        ("model-kwargs: {patch_size: 4, act: it's, dims: [1, 2], none: null, yes: true}", "model_kwargs",
         {"patch_size": 4, "act": "it's", "dims": [1, 2], "none": None, True: True}),
        ("model_kwargs: {}", "model_kwargs", {}),
    ],
)  # fmt: skip
def test_values_of_a_recipe_arrive_as_from_the_command_line(recipe, text, name, value):
    if isinstance(value, dict):
        value = {str(k): v for k, v in value.items()}
    assert getattr(parse("-c", recipe(text)), name) == value


def test_an_empty_recipe_changes_nothing(recipe):
    path = recipe("# nothing yet\n")
    assert vars(parse("-c", path)) == vars(parse()) | {"config": path}


@pytest.mark.parametrize("text", ["target: []", "teacher-kwargs: {}"])
def test_an_empty_list_in_a_recipe_means_the_empty_default(recipe, text):
    path = recipe(text)
    assert vars(parse("-c", path)) == vars(parse()) | {"config": path}


@pytest.mark.parametrize("switch", ["pretrained", "small-stem", "channels_last", "no-aug", "no_aug", "bce_loss"])
def test_a_switch_is_turned_on_by_a_recipe_and_off_by_the_command_line(recipe, switch):
    name, option = switch.replace("-", "_"), switch.replace("_", "-")
    path = recipe(f"{switch}: true\n")
    assert getattr(parse("-c", path), name) is True
    opposite = "--aug" if name == "no_aug" else f"--no-{option}"
    assert getattr(parse("-c", path, opposite), name) is False
    assert getattr(parse("-c", recipe(f"{switch}: false\n")), name) is False


@pytest.mark.parametrize("switch", ["--pretrained", "--no-aug", "--dry-run"])
def test_a_switch_is_off_unless_given(switch):
    name = switch[2:].replace("-", "_")
    assert getattr(parse(), name) is False
    assert getattr(parse(switch), name) is True


@pytest.mark.parametrize(
    ("key", "meant"),
    [("zzz", None), ("epoch", "epochs"), ("kd_wieght", "kd-weight"), ("batchsize", "batch-size")],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(recipe, key, meant):
    with refused("recipe.yaml", "unknown key", f"'{key}'", *([f"did you mean {meant}?"] if meant else [])):
        parse("-c", recipe(f"{key}: 3\n"))


@pytest.mark.parametrize("key", ["config: other.yaml", "help: true", "3: 4"])
def test_keys_that_make_no_sense_in_a_recipe_are_refused(recipe, key):
    with refused("recipe.yaml", "unknown key"):
        parse("-c", recipe(key))


@pytest.mark.parametrize(("key", "meant"), [("no-dry-run", "dry-run"), ("no_kd_fade", "kd-fade"), ("aug", "no-aug")])
def test_the_opposite_of_a_switch_is_refused_with_what_a_recipe_says_instead(recipe, key, meant):
    for value, opposite in (("true", "false"), ("false", "true")):
        with refused("recipe.yaml", f"write '{meant}: {opposite}'", f"'{key}'"):
            parse("-c", recipe(f"{key}: {value}"))


@pytest.mark.parametrize(
    "text", ["epochs: 1\nepochs: 2\n", "batch-size: 64\nbatch_size: 32\n", "b: 1\nbatch-size: 2\n"]
)
def test_a_key_that_is_given_twice_is_refused(recipe, text):
    with refused("recipe.yaml"):
        parse("-c", recipe(text))


def test_a_merged_mapping_may_be_overridden(recipe):
    args = parse("-c", recipe("model-kwargs:\n  <<: {depth: 2, num_heads: 4}\n  depth: 3\n"))
    assert args.model_kwargs == {"depth": 3, "num_heads": 4}


@pytest.mark.parametrize("text", ["lr: {{ lr }}\n", "[1, 2]: 3\n"])
def test_a_key_that_can_be_none_is_refused(recipe, text):
    with refused("recipe.yaml", "no valid YAML"):
        parse("-c", recipe(text))


def test_a_keyword_may_be_an_empty_string(recipe):
    assert parse("-c", recipe("model-kwargs: {stem_type: ''}\n")).model_kwargs == {"stem_type": ""}
    assert parse("--model-kwargs", "stem_type=").model_kwargs == {"stem_type": ""}


def test_a_key_that_is_given_twice_in_a_mapping_is_refused(recipe):
    with refused("recipe.yaml", "'depth' is given twice", "line 3"):
        parse("-c", recipe("model-kwargs:\n  depth: 2\n  depth: 3\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: fast", ("lr", "fast")),
        ("lr: .nan", ("lr", "finite")),
        ("crop-pct: 87.5", ("crop-pct", "share", "87.5")),
        ("weight-decay: -1", ("weight-decay", "0 or more")),
        ("mixup-off-epoch: -3", ("mixup-off-epoch", "0 or more")),
        ("decay-milestones: [5, .nan]", ("decay-milestones", "nan")),
        ("scale: [8, 100]", ("scale", "up to 1")),
        ("lr: [0.1, 0.2]", ("'lr'", "one value")),
        ("lr: {a: 1}", ("'lr'",)),
        ("lr: true", ("'lr'", "True")),
        ("epochs: true", ("'epochs'", "True")),
        ("epochs: 1.5", ("epochs", "1.5")),
        ("epochs: 0", ("epochs", "at least 1")),
        ("epochs: |\n  a\n  b\n", ("epochs",)),
        ("pretrained: 1", ("'pretrained'", "true or false")),
        ("pretrained: yes please", ("'pretrained'", "true or false")),
        ("model-kwargs: 4", ("'model-kwargs'", "mapping")),
        ("model-kwargs: [a, b]", ("'model-kwargs'", "mapping")),
        ("kd-temperature: [6, cold]", ("kd-temperature", "'cold'")),
        ("kd-temperature: [6, [1]]", ("'kd-temperature'",)),
        ("scale: [0.5]", ("scale",)),
        ("log-with: pen", ("log-with", "pen")),
        ("mixup-mode: all", ("mixup-mode", "all")),
        ("kd-off: later", ("kd-off", "later")),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_key(recipe, text, words):
    with refused("recipe.yaml", *words):
        parse("-c", recipe(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: [0.1", ("YAML",)),
        ("a: b: c", ("YAML",)),
        ("\tlr: 1", ("YAML",)),
        ("- lr\n- 0.1", ("mapping", "list")),
        ("resnet50", ("mapping", "str")),
    ],
)
def test_what_is_no_mapping_in_yaml_is_refused(recipe, text, words):
    with refused("recipe.yaml", *words):
        parse("-c", recipe(text))


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(128, 256)))
    with refused(str(path)):
        parse("-c", str(path))


@pytest.mark.parametrize("where", ["nowhere.yaml", "."])
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path, where):
    with refused(str(tmp_path / where), "cannot read"):
        parse("-c", str(tmp_path / where))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--model", "resnet26", "--target", "65", "80", "--pretrained", "--lr", "1e-5", "--kd-off", "4"),
        ("--model-kwargs", "patch_size=4", "act_layer='gelu'", "dims=[1, 2]", "--mean", "0.5", "0", "1e-7"),
        ("--mixup", "0.2", "--torchcompile", "--channels-last", "--train-samples", "100", "--opt-betas", "0.9", "0.95"),
        ("--no-aug",),
    ],
)
@pytest.mark.parametrize("resolved", [False, True])
def test_args_yaml_as_a_recipe_gives_the_same_options(tmp_path, words, resolved):
    args = parse(*words)
    if resolved:
        resolve(args)
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(plain(vars(args))))
    again = parse("-c", str(path))
    assert plain(vars(again)) == plain(vars(args))


def test_true_and_false_mean_on_the_command_line_what_they_mean_in_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model-kwargs: {class_token: false, qk_norm: true, global_pool: avg}")
    words = ("--model-kwargs", "class_token=false", "qk_norm=true", "global_pool=avg")
    expected = {"class_token": False, "qk_norm": True, "global_pool": "avg"}
    assert parse(*words).model_kwargs == parse("-c", str(path)).model_kwargs == expected


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("--kd-weight", "-1"),
        ("--clip-grad", "-1"),
        ("--clip-grad", "0"),
        ("--kd-warmup", "-0.1"),
        ("--kd-hold", "nan"),
        ("--kd-patience", "0"),
        ("--epochs", "-3"),
        ("--batch-size", "0"),
        ("--train-samples", "-5"),
        ("--checkpoint-hist", "0"),
        ("--smoothing", "-0.1"),
        ("--kd-off", "-2"),
        ("--workers", "-1"),
        ("--recovery-interval", "-1"),
        ("--seed", "-1"),
        ("--switch-seed", "-1"),
        ("--min-lr", "-1"),
        ("--pad-crop", "-1"),
        ("--ratio", "0", "1"),
        ("--std", "0"),
    ],
)
def test_numbers_below_their_range_are_refused(words):
    with refused(words[0]):
        parse(*words)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--qqqq", "1"), ("unknown option --qqqq", "--help")),
        (("--modle", "resnet50"), ("unknown option --modle", "did you mean --model?")),
        (("--batch_size=64",), ("unknown option --batch_size", "did you mean --batch-size?")),
        (("--amp",), ("--amp", "accelerate launch --mixed_precision")),
        (("--input-size", "3", "32", "32"), ("--input-size", "--img-size")),
        (("--lr",), ("--lr", "expected one argument")),
        (("--lr", "fast"), ("--lr", "fast")),
        (("--model-kwargs", "channels=[8,8"), ("--model-kwargs", "channels=[8,8")),
        (("imagenet",), ("'imagenet'", "--data-dir imagenet")),
        (("--epo", "3"), ("--epo",)),  # no abbreviations
        (("-c",), ("--config",)),
        (("--model-kwargs", "depth"), ("--model-kwargs", "depth")),
        (("--log-with", "pen"), ("--log-with", "pen")),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(words, parts):
    with refused(*parts):
        parse(*words)


@pytest.mark.parametrize("option", ["--teacher", "--initial-checkpoint", "--resume"])
def test_an_empty_name_is_no_option_that_was_left_out(option):
    with refused(option, "is a variable of the shell not set?"):
        parse(option, "")


@pytest.mark.parametrize("words", [("--kd-weight", "1"), ("--teacher-model", "resnet18", "--kd-hold", "3")])
def test_options_of_the_teacher_without_one_are_named_in_a_warning(words, recipe, capsys):
    parse(*words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: without --teacher") and all(word in line for word in words if word[0] == "-")
    parse(*words, "--teacher", "run")
    assert capsys.readouterr().err == ""


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["train_cls", "train_det", "train_diffusion"])
def script_parser(request):
    return import_module(request.param).build_parser()


def test_help_begins_with_what_most_runs_need_and_fits_80_columns(script_parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = script_parser.format_help().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("usage: ") and lines[1] == ""
    (common, *others) = [number for number, line in enumerate(lines) if re.fullmatch(r"[^ ].*:", line)]
    assert lines[common] == "what most runs need:"
    first = [line.split()[0].strip(",") for line in lines[common + 1 : others[0]] if re.match(r"  -", line)]
    assert len(first) == 12 and first[:2] == ["-h", "-c"]
    assert all(any(option in word for word in " ".join(lines[common : others[0]]).split()) for option in ("--lr", "-b"))


def test_help_lists_every_option_once_with_its_text_and_its_default(script_parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    entries = re.findall(r"^  (-.*(?:\n {20,}.*)*)", script_parser.format_help(), re.M)
    texts = {}
    for entry in entries:
        invocation, text = re.split(r"\s{2,}", entry, maxsplit=1)
        for name in re.findall(r"--(?:\[no-\])?([a-z-]+)", invocation):
            assert name not in texts
            texts[name] = " ".join(text.split())
    assert "no-no-aug" not in texts
    for action in script_parser._actions:
        text = texts[next(option[2:] for option in action.option_strings if option.startswith("--"))]
        if action.default not in (None, False, "", {}, [], argparse.SUPPRESS):
            assert "(default: " in text, action.dest


def test_names_of_other_trainers_are_no_options_here(script_parser):
    known = {option.lstrip("-") for action in script_parser._actions for option in action.option_strings}
    others = {"data-dir", "dataset", "epochs", "eval-interval", "evals-per-epoch"}  # some scripts have them
    assert known & set(REMEDIES) <= others


@pytest.mark.parametrize(
    ("option", "cls", "det", "diffusion"),
    [
        ("--input-size", "--in-chans", "--min-size", "--img-size"),
        ("--val-interval", "--evals-per-epoch", "--evals-per-epoch", "--eval-interval"),
        ("--dist-bn", "--sync-bn", "--sync-bn", "--help"),
        ("--lr-steps", "--decay-milestones", "--decay-milestones", "--decay-milestones"),
        ("--data-path", "is --data-dir", "is --data", "is --data-dir"),
    ],
)
def test_what_is_named_in_place_of_an_option_is_there(option, cls, det, diffusion):
    for script, meant in (("train_cls", cls), ("train_det", det), ("train_diffusion", diffusion)):
        with refused(f"unknown option {option}", meant):
            import_module(script).build_parser().parse_recipe([option, "1"])


@pytest.mark.parametrize(
    ("script", "option", "meant"),
    [
        ("train_det", "--data-dir", "is --data"),
        ("train_det", "--eval-interval", "--evals-per-epoch"),
        ("train_diffusion", "--evals-per-epoch", "--eval-interval"),
        ("train_diffusion", "--epochs", "--updates"),
    ],
)
def test_an_option_of_another_script_is_refused_with_ones_own(script, option, meant):
    with refused(f"unknown option {option}", meant):
        import_module(script).build_parser().parse_recipe([option, "1"])


def test_a_parser_of_ones_own_reads_recipes_too(tmp_path):
    parser = Parser("mine")
    add_switch(parser.add_argument_group("mine"), "--loud", "help")
    path = tmp_path / "mine.yaml"
    path.write_text("loud: true")
    assert parser.parse_recipe(["-c", str(path)]).loud is True


# --- targets ---------------------------------------------------------------------------------------------------------


def test_targets_are_numbers_with_or_without_the_metrics_name():
    assert parse_targets(["65", "top1=80.5", "100", "1"], "top1", 0, 100) == [65.0, 80.5, 100.0, 1.0]
    assert parse_targets(["top1=0.8"], "top1", 0, 100) == [0.8]
    assert parse_targets(["0.8"], "fid10k", 0, math.inf) == [0.8]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("top5=80", ("top5=80", "top1")),
        ("high", ("high", "not a number")),
        ("top1=", ("top1=", "not a number")),
        ("0", ("0 and up to 100",)),
        ("-5", ("-5",)),
        ("100.5", ("100.5",)),
        ("nan", ("nan",)),
        ("inf", ("inf",)),
        ("0.8", ("0.8 percent? Write 80", "top1=0.8")),
    ],
)
def test_an_impossible_target_is_refused(value, words):
    with refused("--target", *words):
        parse_targets(["65", value], "top1", 0, 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs two", "--epochs: takes a whole number of at least 1, got two"),
        ("--epochs 0", "--epochs: takes a whole number of at least 1, got 0"),
        ("--kd-off later", "--kd-off: takes surpass, running, never or a number of 0 or more, got later"),
        ("--hflip 2", "--hflip: takes a number in [0, 1], got 2"),
        ("--remode nonsense", "--remode: invalid choice: 'nonsense'"),
    ],
)
def test_a_wrong_value_is_refused_in_words(words, message):
    with refused(message):
        build_parser().parse_recipe(words.split())


@pytest.mark.parametrize("option", ["--drop-connect", "--lr-noise", "--save-images", "--train-crop-mode"])
def test_an_option_that_is_not_here_is_not_taken_for_another(option):
    with refused(f"unknown option {option}") as error:
        build_parser().parse_recipe([option, "1"])
    assert "did you mean" not in str(error.value)
