"""From the options of the method to its phase, its control and its teacher's score."""

import pytest
from helpers import refused
from torch import nn

from train_cls import build_parser
from w2s.engine.teaching import early_phase, kd_window, score_teacher
from w2s.teacher import Teacher


def phase(words: str = "", length: float = 100):
    words = f"--teacher somewhere {words}"
    args = build_parser().parse_recipe(words.split())
    args.kd_warmup, args.kd_hold, args.kd_decay = kd_window(args, length)
    return early_phase(args, length=length, mode="max"), args


def test_the_default_window_is_a_share_of_the_run_and_is_written_down():
    made, args = phase(length=40)
    assert (args.kd_warmup, args.kd_hold, args.kd_decay) == (2, 22, 8)
    assert (made.warmup, made.hold, made.decay) == (2, 22, 8)


def test_the_options_reach_the_phase():
    made, _ = phase("--kd-weight 2 --kd-warmup 1 --kd-hold 3 --kd-decay 4 --kd-temperature 5 2 --kd-patience 3")
    assert (made.full_weight, made.warmup, made.hold, made.decay, made.patience) == (2, 1, 3, 4, 3)
    assert (made.temperature(0), made.temperature(8), made.mode, made.off) == (5, 2, "max", "surpass")


def test_a_running_comparison_is_a_switch_off_by_what_is_compared():
    args = build_parser().parse_recipe(
        ["--teacher", "somewhere", "--kd-off", "running", "--kd-warmup", "1", "--kd-hold", "3", "--kd-decay", "4"]
    )
    assert (early_phase(args, length=10, mode="max").off, early_phase(args, length=10, mode="max").mode) == (
        "surpass",
        "max",
    )
    assert early_phase(args, length=10, mode="max", running="min").mode == "min"


@pytest.mark.parametrize("words", ["--kd-control shuffled", "--teacher-score 60"])
def test_a_running_comparison_needs_the_teacher_itself(words):
    with refused("--kd-off running", words.split()[0]):
        phase(f"--kd-off running {words}")


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


def test_without_a_teacher_there_is_no_phase():
    assert early_phase(build_parser().parse_recipe([]), length=10, mode="max") is None


@pytest.mark.parametrize(
    ("score", "images", "parts"),
    [
        (100.0, 3, ("no student can beat a teacher of 100", "on 3 images", "33 points", "--switch-split")),
        (100.0, 400, ("no student can beat a teacher of 100",)),
        (90.0, 10, ("on 10 images", "10 points")),
        (99.75, 400, ()),
        (1e9, None, ()),  # a distance
    ],
)
def test_a_switch_split_that_decides_nothing_is_named_in_one_warning(score, images, parts, run_of, capsys):
    teacher = Teacher(nn.Linear(2, 2), name="net", source="here", device="cpu")
    score_teacher(
        teacher,
        run_of(),
        metric="top1",
        mode="max",
        evaluate={"report": score, "switch": score}.get,
        report="report",
        switch="switch",
        images=images,
    )
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == (1 if parts else 0)
    assert all(part in warnings[0] for part in parts)
