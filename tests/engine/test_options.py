"""Recipes and command lines, their refusals in one line; timm's optimisers and schedules built from them."""

import math

import pytest
import torch
import yaml
from helpers import refused
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
)
from torch import nn

from train_cls import build_parser, resolve
from w2s.engine.checkpoint import plain
from w2s.engine.optim import build_optimizer, scaled_lr
from w2s.engine.options import Parser, add_switch, early_phase, parse_targets


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
        ("min-lr: -1.0e-7", "min_lr", -1e-7),
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
    assert getattr(parse("-c", path, f"--no-{option}"), name) is False
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
    with refused("recipe.yaml", "unknown key", f"'{key}'", *([f"did you mean '{meant}'"] if meant else [])):
        parse("-c", recipe(f"{key}: 3\n"))


@pytest.mark.parametrize("key", ["config: other.yaml", "help: true", "no-dry-run: true", "no_pretrained: true", "3: 4"])
def test_keys_that_make_no_sense_in_a_recipe_are_refused(recipe, key):
    with refused("recipe.yaml", "unknown key"):
        parse("-c", recipe(key))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: fast", ("lr", "'fast'")),
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
        ("--model-kwargs", "patch_size=4", "act_layer='gelu'", "dims=[1, 2]", "--mean", "-0.5", "0", "1e-7"),
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
    ],
)
def test_numbers_below_their_range_are_refused(words):
    with refused(words[0]):
        parse(*words)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--lernrate", "1"), ("--lernrate",)),
        (("--lr",), ("--lr", "expected one argument")),
        (("--lr", "fast"), ("--lr", "'fast'")),
        (("stray",), ("stray",)),
        (("--epo", "3"), ("--epo",)),  # no abbreviations
        (("-c",), ("--config",)),
        (("--model-kwargs", "depth"), ("--model-kwargs", "depth")),
        (("--log-with", "pen"), ("--log-with", "pen")),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(words, parts):
    with refused(*parts):
        parse(*words)


def test_a_parser_of_ones_own_reads_recipes_too(tmp_path):
    parser = Parser("mine")
    add_switch(parser.add_argument_group("mine"), "--loud", "help")
    path = tmp_path / "mine.yaml"
    path.write_text("loud: true")
    assert parser.parse_recipe(["-c", str(path)]).loud is True


# --- targets ---------------------------------------------------------------------------------------------------------


def test_targets_are_numbers_with_or_without_the_metrics_name():
    assert parse_targets(["65", "top1=80.5", "100"], "top1", 0, 100) == [65.0, 80.5, 100.0]


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
    ],
)
def test_an_impossible_target_is_refused(value, words):
    with refused("--target", *words):
        parse_targets(["65", value], "top1", 0, 100)


# --- the early phase -------------------------------------------------------------------------------------------------


def phase(words: str = "", length: float = 100):
    args = parse(*words.split())
    return early_phase(args, length, "max"), args


def test_the_default_window_is_a_share_of_the_run_and_is_written_down():
    made, args = phase(length=40)
    assert (args.kd_warmup, args.kd_hold, args.kd_decay) == (2, 22, 8)
    assert (made.warmup, made.hold, made.decay) == (2, 22, 8)


def test_the_options_reach_the_phase():
    made, _ = phase("--kd-weight 2 --kd-warmup 1 --kd-hold 3 --kd-decay 4 --kd-temperature 5 2 --kd-patience 3")
    assert (made.full_weight, made.warmup, made.hold, made.decay, made.patience) == (2, 1, 3, 4, 3)
    assert (made.temperature(0), made.temperature(8), made.mode, made.off) == (5, 2, "max", "surpass")


def test_one_temperature_is_constant():
    made, _ = phase("--kd-temperature 4")
    assert made.temperature(0) == made.temperature(40) == 4


def test_a_window_as_long_as_the_run_is_accepted():
    made, _ = phase("--kd-warmup 0.1 --kd-hold 0.2 --kd-decay 0.7", length=1)
    assert made.window == pytest.approx(1)


def test_a_window_longer_than_the_run_is_refused():
    with refused("longer than the run of 10", "--kd-hold 8"):
        phase("--kd-warmup 1 --kd-hold 8 --kd-decay 2", length=10)


def test_distillation_that_never_ends_needs_no_window_within_the_run():
    made, _ = phase("--kd-warmup 1 --kd-hold 8 --kd-decay 2 --kd-off never", length=10)
    assert made.weight(9.9) == made.full_weight


@pytest.mark.parametrize("words", ["--kd-temperature 6 3 1", "--kd-temperature 0", "--kd-temperature 6 -1"])
def test_an_impossible_temperature_is_refused(words):
    with refused("temperature"):
        phase(words)


@pytest.mark.parametrize("words", ["--kd-weight inf", "--kd-hold inf"])
def test_an_infinite_weight_or_window_is_refused(words):
    with refused("inf"):
        phase(words)


# --- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "samples", "expected"),
    [
        ("--lr 0.3", 1024, 0.3),
        ("--lr 0.3 --lr-base 7", 64, 0.3),
        ("--opt sgd", 256, 0.1),
        ("--opt sgd", 1024, 0.4),
        ("--opt sgd --lr-base 0.05 --lr-base-size 512", 128, 0.0125),
        ("--opt adamw --lr-base 0.001", 1024, 0.002),
        ("--opt AdamW --lr-base 0.001", 64, 0.0005),
        ("--opt lamb --lr-base 0.005", 4096, 0.02),
        ("--opt adafactor --lr-base 0.001", 1024, 0.002),
        ("--opt sgd --lr-base-scale sqrt", 1024, 0.2),
        ("--opt adamw --lr-base 0.001 --lr-base-scale linear", 1024, 0.004),
    ],
)
def test_the_learning_rate_scales_with_the_global_batch_as_in_timm(words, samples, expected):
    """lr_base x ratio, with the ratio's square root for names with "ada" or "lamb", as in timm's train.py."""
    assert scaled_lr(parse(*words.split()), samples) == pytest.approx(expected, rel=1e-12)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def built(words: str, epochs: int = 10, updates_per_epoch: int = 8, model: nn.Module | None = None):
    args = parse(*words.split())
    return build_optimizer(args, model or tiny(), args.lr or 0.1, epochs, updates_per_epoch)


def rates(words: str, updates: int = 80) -> list[float]:
    """The learning rate of each update, as the training loop sets it."""
    optimizer, scheduler = built(words)
    values = []
    for update in range(updates):
        scheduler.step_update(update)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_cosine_falls_from_the_rate_to_the_minimum_along_half_a_wave():
    expected = [0.01 + 0.5 * 0.39 * (1 + math.cos(math.pi * update / 80)) for update in range(80)]
    assert rates("--lr 0.4 --min-lr 0.01") == pytest.approx(expected, rel=1e-12)


def test_warm_up_rises_in_a_line_and_joins_the_cosine():
    values = rates("--lr 0.4 --warmup-epochs 2 --warmup-lr 0.08")
    assert values[:16] == pytest.approx([0.08 + 0.32 * update / 16 for update in range(16)], rel=1e-12)
    assert values[16:] == pytest.approx([0.2 * (1 + math.cos(math.pi * u / 80)) for u in range(16, 80)], rel=1e-12)


def test_a_warm_up_of_half_an_epoch_is_counted_in_updates():
    values = rates("--lr 0.4 --warmup-epochs 0.5 --warmup-lr 0")
    assert values[:5] == pytest.approx([0, 0.1, 0.2, 0.3, 0.2 * (1 + math.cos(math.pi * 4 / 80))])


def test_step_falls_every_so_many_epochs_and_constant_never():
    stairs = [0.4 * 0.1 ** (update // 24) for update in range(80)]
    assert rates("--lr 0.4 --sched step --decay-epochs 3") == pytest.approx(stairs)
    assert rates("--lr 0.4 --sched constant") == [0.4] * 80


def test_multistep_falls_at_its_milestones():
    """timm counts to the update after: it falls one update before the epoch's end."""
    stairs = [0.4] * 15 + [0.2] * 24 + [0.1] * 41
    assert rates("--lr 0.4 --sched multistep --decay-milestones 2 5 --decay-rate 0.5") == pytest.approx(stairs)


@pytest.mark.parametrize(
    ("sched", "scheduler", "own"),
    [
        ("cosine", CosineLRScheduler, {"t_initial": 80, "lr_min": 0.01}),
        ("tanh", TanhLRScheduler, {"t_initial": 80, "lr_min": 0.01}),
        ("poly", PolyLRScheduler, {"t_initial": 80, "lr_min": 0.01, "power": 0.5}),
        ("step", StepLRScheduler, {"decay_t": 24, "decay_rate": 0.5}),
        ("multistep", MultiStepLRScheduler, {"decay_t": [16, 40], "decay_rate": 0.5}),
        ("constant", StepLRScheduler, {"decay_t": 24, "decay_rate": 1.0}),
    ],
)
def test_every_update_has_the_rate_of_timms_scheduler(sched, scheduler, own):
    optimizer = torch.optim.SGD(tiny().parameters(), 0.4)
    warm_up = {"warmup_t": 12, "warmup_lr_init": 0.02, "warmup_prefix": False}
    timms = scheduler(optimizer, **own, **warm_up, t_in_epochs=False)
    expected = []
    for update in range(80):
        timms.step_update(update)
        expected.append(optimizer.param_groups[0]["lr"])
    words = "--lr 0.4 --min-lr 0.01 --warmup-epochs 1.5 --warmup-lr 0.02 --decay-epochs 3 --decay-milestones 2 5"
    assert rates(f"{words} --decay-rate 0.5 --sched {sched}") == expected


def test_the_rate_is_a_function_of_the_update_so_that_a_resume_needs_no_state():
    optimizer, scheduler = built("--lr 0.4 --warmup-epochs 2")
    scheduler.step_update(37)
    assert optimizer.param_groups[0]["lr"] == rates("--lr 0.4 --warmup-epochs 2")[37]


def test_layer_decay_scales_the_rates_of_early_layers():
    from w2s.images.models import create_model

    model = create_model("resnet10t", 10, model_kwargs={"channels": (8, 8, 16, 16), "stem_width": 8})
    optimizer, scheduler = built("--lr 0.4 --sched constant --layer-decay 0.5", model=model)
    scheduler.step_update(0)
    values = sorted({group["lr"] for group in optimizer.param_groups})
    assert values[-1] == pytest.approx(0.4) and values[0] < 0.1


@pytest.mark.parametrize("sched", ["plateau", "none", "sawtooth"])
def test_a_schedule_that_is_no_function_of_the_update_is_refused(sched):
    with refused("--sched", sched):
        built(f"--sched {sched}")


@pytest.mark.parametrize(
    "words", ["--warmup-epochs 11", "--sched wsd --decay-epochs 30", "--sched step --decay-epochs 0"]
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(words):
    with refused("epochs"):
        rates(words)


# --- optimisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adamw", "lamb", "muon", "adafactor", "lion"])
def test_an_optimiser_takes_a_step_that_lowers_the_loss(opt):
    model = tiny()
    optimizer, scheduler = built(f"--opt {opt} --lr 1e-3 --sched constant", model=model)
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 2
    losses = []
    for update in range(5):
        scheduler.step_update(update)
        loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_options_reach_the_optimiser():
    words = "--opt adamw --opt-betas 0.8 0.9 --opt-eps 1e-6 --weight-decay 0.3 --opt-kwargs amsgrad=True"
    optimizer, _ = built(words)
    decayed = [group for group in optimizer.param_groups if group["weight_decay"]]
    assert {group["weight_decay"] for group in decayed} == {0.3}
    assert (tuple(decayed[0]["betas"]), decayed[0]["eps"], decayed[0]["amsgrad"]) == ((0.8, 0.9), 1e-6, True)
    assert built("--opt sgd --momentum 0.7")[0].param_groups[0]["momentum"] == 0.7


def test_biases_and_norms_are_not_decayed():
    optimizer, _ = built("--opt adamw --weight-decay 0.3")
    plain = [p for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]]
    assert len(plain) == 4 and all(p.ndim == 1 for p in plain)


@pytest.mark.parametrize(
    "words", ["--opt sdg", "--opt sgd --opt-kwargs nonsense=1", "--opt adamw --opt-betas 0.9 1.5", "--opt sgd --lr -1"]
)
def test_an_optimiser_that_cannot_be_built_is_refused(words):
    with refused("--opt", words.split()[1]):
        built(words)
