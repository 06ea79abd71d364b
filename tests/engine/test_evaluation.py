"""--eval-only takes its options from the run that it evaluates, and the command line overrides them."""

from pathlib import Path

import pytest
import yaml
from helpers import refused

from train_cls import build_parser
from w2s.engine.evaluation import parse_options


@pytest.fixture
def run_folder(tmp_path):
    """A run's args.yaml, and an empty file where its exported weights would be."""
    folder = tmp_path / "output" / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").touch()
    options = {"dataset": "digits", "model": "resnet26", "img_size": 16, "model_kwargs": {"stem_width": 8}, "lr": 0.5}
    options |= {"teacher": "gone", "kd_control": "random", "pretrained": True, "workers": 9, "name": "run", "seed": 3}
    (folder / "args.yaml").write_text(yaml.safe_dump(options))
    return folder


def parse(*words: object):
    return parse_options(build_parser(), ["--eval-only", *map(str, words)])


@pytest.mark.parametrize("part", [".", "model", "model/model.safetensors"])
def test_model_size_and_data_are_those_of_the_run(part, run_folder):
    args = parse("--initial-checkpoint", run_folder / part)
    assert (args.dataset, args.model, args.img_size, args.model_kwargs) == ("digits", "resnet26", 16, {"stem_width": 8})
    assert Path(args.initial_checkpoint) == run_folder / part
    # how a training starts and how this machine reads the data are no matter of the run's
    assert (args.teacher, args.kd_control, args.pretrained, args.name) == (None, None, False, None)
    assert args.workers == build_parser().get_default("workers")


def test_a_run_is_found_by_its_name(run_folder):
    args = parse("--output", run_folder.parent, "--name", "run")
    assert (args.model, args.initial_checkpoint) == ("resnet26", str(run_folder))


def test_a_run_is_found_by_its_recipe_which_it_overrides(run_folder, tmp_path):
    recipe = tmp_path / "resnet.yaml"
    recipe.write_text("{model: resnet50, img-size: 64, seed: 1}")
    run_folder.rename(run_folder.parent / "resnet-seed1")
    args = parse("-c", recipe, "--output", run_folder.parent)
    assert (args.model, args.img_size) == ("resnet26", 16)


def test_the_command_line_overrides_the_run(run_folder):
    args = parse("--initial-checkpoint", run_folder, "--img-size", "24", "--model", "resnet50", "--seed", "0")
    assert (args.img_size, args.model, args.seed, args.dataset) == (24, "resnet50", 0, "digits")


def test_other_data_take_the_place_of_all_of_the_runs(run_folder):
    args = parse("--initial-checkpoint", run_folder, "--data-dir", "elsewhere")
    assert (args.dataset, args.data_dir, args.model) == ("", "elsewhere", "resnet26")


def test_pretrained_weights_need_no_run():
    args = parse("--pretrained", "--model", "resnet18")
    assert (args.pretrained, args.initial_checkpoint, args.model) == (True, None, "resnet18")


def test_weights_that_belong_to_no_run_take_the_options_of_the_command_line(tmp_path):
    (tmp_path / "weights.pth").touch()
    args = parse("--initial-checkpoint", tmp_path / "weights.pth", "--model", "resnet18", "--img-size", "48")
    assert (args.model, args.img_size) == ("resnet18", 48)


@pytest.mark.parametrize("words", ["--name nobody", "--initial-checkpoint nowhere"])
def test_a_model_that_is_not_there_is_refused(words):
    with refused(words.split()[1], "holds no exported model", "--initial-checkpoint"):
        parse(*words.split())


def test_a_training_takes_nothing_from_a_run(run_folder):
    args = parse_options(build_parser(), ["--initial-checkpoint", str(run_folder)])
    assert (args.model, args.dataset) == ("resnet50", "")
