"""EarlyPhase at points worked out by hand, its switch-off, and its state in the middle of a run."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from w2s import EarlyPhase, schedule

NAN = math.nan


def phase(**changes) -> EarlyPhase:
    """Weight 2, up over 2, hold 3, down over 4: a window of 9."""
    return EarlyPhase(**{"weight": 2.0, "warmup": 2.0, "hold": 3.0, "decay": 4.0, **changes})


# --- lambda(u) -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("u", "expected"),
    [
        (-1.0, 0.0), (0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (1.75, 1.75), (2.0, 2.0),
        (3.5, 2.0), (5.0, 2.0), (6.0, 1.5), (7.0, 1.0), (8.5, 0.25),
    ],
)  # fmt: skip
def test_weight_rises_holds_and_falls(u, expected):
    assert phase().weight(u) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("u", [-math.inf, -5.0, -1e-9, 9.0, 9.000001, 1000.0, math.inf])
def test_weight_is_exactly_zero_outside_the_window(u):
    assert phase().weight(u) == 0.0


@pytest.mark.parametrize("u", [1e-6, 9 - 1e-6])
def test_weight_is_positive_just_inside_the_window(u):
    assert 0 < phase().weight(u) < 1e-5


@pytest.mark.parametrize(("u", "expected"), [(-1e-9, 0.0), (0.0, 2.0), (1.0, 2.0), (3.0, 2.0), (5.0, 1.0), (7.0, 0.0)])
def test_without_warmup_the_weight_is_full_from_the_start(u, expected):
    assert phase(warmup=0).weight(u) == pytest.approx(expected)


@pytest.mark.parametrize(("u", "expected"), [(1.0, 1.0), (4.999999, 2.0), (5.0, 0.0), (6.0, 0.0)])
def test_without_decay_the_weight_drops_at_the_end_of_the_hold(u, expected):
    assert phase(decay=0).weight(u) == expected


@pytest.mark.parametrize(("u", "expected"), [(1.0, 1.0), (2.0, 2.0), (4.0, 1.0), (6.0, 0.0)])
def test_without_hold_the_weight_falls_at_once(u, expected):
    assert phase(hold=0).weight(u) == pytest.approx(expected)


@pytest.mark.parametrize("u", [0.0, 0.5])
def test_a_window_of_length_zero_never_distils(u):
    assert EarlyPhase(warmup=0, hold=0, decay=0).weight(u) == 0.0


@pytest.mark.parametrize("u", [0.0, 1e9])
def test_by_default_the_weight_is_one_until_the_teacher_is_surpassed(u):
    assert EarlyPhase().weight(u) == 1.0


@pytest.mark.parametrize("u", [0.0, 1.0, 3.0, 6.0])
def test_full_weight_zero_is_zero_everywhere(u):
    assert phase(weight=0).weight(u) == 0.0


def test_the_windows_may_be_given_in_updates():
    assert [EarlyPhase(3.0, 100, 0, 200).weight(u) for u in (0, 50, 100, 150, 300)] == [0.0, 1.5, 3.0, 2.25, 0.0]


# --- T(u) ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("u", "expected"), [(0.0, 6.0), (1.8, 5.0), (4.5, 3.5), (7.2, 2.0), (9.0, 1.0)])
def test_temperature_falls_from_six_to_one_over_the_window(u, expected):
    assert phase().temperature(u) == pytest.approx(expected)


@pytest.mark.parametrize(("u", "expected"), [(-3.0, 6.0), (20.0, 1.0), (math.inf, 1.0)])
def test_temperature_stays_at_its_ends_outside_the_window(u, expected):
    assert phase().temperature(u) == expected


@pytest.mark.parametrize(("u", "expected"), [(0.0, 4.0), (4.5, 3.0), (9.0, 2.0)])
def test_temperature_takes_the_given_ends(u, expected):
    assert phase(temperature=(4.0, 2.0)).temperature(u) == pytest.approx(expected)


@pytest.mark.parametrize("u", [0.0, 5.0, 1e6])
def test_temperature_of_a_window_without_end_is_the_start_value(u):
    assert EarlyPhase(hold=math.inf, temperature=(6.0, 1.0)).temperature(u) == 6.0


# --- surpass ---------------------------------------------------------------------------------------------------------


def outcomes(phase: EarlyPhase, students: list[float], teacher: float = 50.0) -> list[bool]:
    """`active` after each evaluation."""
    return [phase.observe(student, teacher, u) for u, student in enumerate(students)]


def test_two_wins_in_a_row_switch_off_by_default():
    assert outcomes(phase(), [40, 51, 52, 53]) == [True, True, False, False]


@pytest.mark.parametrize(("patience", "expected"), [(1, [False] * 4), (3, [True, True, False, False])])
def test_patience_is_the_number_of_wins_needed(patience, expected):
    assert outcomes(phase(patience=patience), [51, 52, 53, 54]) == expected


def test_a_tie_is_not_a_win():
    assert outcomes(phase(), [50, 50, 50, 51, 50, 51, 50]) == [True] * 7


def test_wins_that_are_not_consecutive_do_not_count():
    assert outcomes(phase(), [51, 49, 51, 49, 51, 49]) == [True] * 6


def test_the_count_starts_anew_after_a_loss():
    assert outcomes(phase(patience=3), [51, 52, 49, 51, 52, 53]) == [True, True, True, True, True, False]


def test_in_min_mode_lower_is_better():
    assert outcomes(phase(mode="min"), [60, 51, 49, 48]) == [True, True, True, False]


def test_in_min_mode_a_tie_is_not_a_win():
    assert outcomes(phase(mode="min"), [49, 50, 49, 50]) == [True] * 4


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(("student", "teacher"), [(NAN, 50.0), (50.0, NAN), (NAN, NAN)])
def test_nan_wins_nothing(mode, student, teacher):
    assert outcomes(phase(mode=mode, patience=1), [student, student], teacher) == [True, True]


@pytest.mark.parametrize(("mode", "good"), [("max", 51), ("min", 49)])
def test_nan_breaks_the_row_of_wins(mode, good):
    assert outcomes(phase(mode=mode), [good, NAN, good, NAN]) == [True] * 4


def test_surpass_leaves_its_place_and_reason():
    surpassed = phase()
    assert (surpassed.active, surpassed.reason, surpassed.kd_off) == (True, None, None)
    surpassed.observe(51, 50, 1.5)
    surpassed.observe(51, 50, 2.5)
    assert (surpassed.active, surpassed.reason) == (False, "surpass")
    assert surpassed.kd_off == {"at": 2.5, "reason": "surpass"}


def test_after_the_switch_off_the_weight_is_zero_everywhere():
    surpassed = phase(patience=1)
    surpassed.observe(51, 50, 3.0)
    assert [surpassed.weight(u) for u in (0.0, 1.0, 3.0, 4.0, 6.0, 100.0)] == [0.0] * 6


def test_the_switch_off_is_permanent():
    surpassed = phase(patience=1)
    surpassed.observe(51, 50, 3.0)
    assert not surpassed.observe(10, 50, 4.0)
    assert not surpassed.advance(1.0)
    assert not surpassed.active


def test_a_later_end_of_the_window_does_not_overwrite_the_surpass():
    surpassed = phase(patience=1)
    surpassed.observe(51, 50, 3.0)
    surpassed.advance(20.0)
    surpassed.observe(60, 50, 21.0)
    assert surpassed.kd_off == {"at": 3.0, "reason": "surpass"}


# --- end of the window -----------------------------------------------------------------------------------------------


def test_advance_keeps_the_phase_active_inside_the_window():
    running = phase()
    assert [running.advance(u) for u in (0.0, 2.0, 5.0, 9 - 1e-6)] == [True] * 4
    assert running.kd_off is None


@pytest.mark.parametrize("u", [9.0, 9.3])
def test_advance_switches_off_at_the_end_of_the_window(u):
    ended = phase()
    assert not ended.advance(u)
    assert (ended.active, ended.reason, ended.kd_off) == (False, "window", {"at": u, "reason": "window"})


def test_the_end_of_the_window_is_permanent_and_keeps_its_first_place():
    ended = phase()
    ended.advance(9.0)
    assert not ended.advance(3.0)
    assert not ended.observe(10, 50, 9.5)
    assert ended.weight(3.0) == 0.0
    assert not ended.advance(12.0)
    assert ended.kd_off["at"] == 9.0


def test_a_window_without_end_never_closes():
    assert EarlyPhase().advance(1e12)


# --- other rules of switching off ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("u", "expected"), [(-1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (5.0, 2.0), (7.0, 2.0), (1e6, 2.0)])
def test_never_holds_the_full_weight_for_the_whole_run(u, expected):
    assert phase(off="never").weight(u) == expected


def test_never_is_switched_off_by_nothing():
    always = phase(off="never", patience=1)
    assert all(always.observe(99, 50, u) for u in range(20))
    assert always.advance(1e9)
    assert always.kd_off is None


@pytest.mark.parametrize(("u", "expected"), [(1.0, 1.0), (3.999999, 2.0), (4.0, 0.0), (5.0, 0.0)])
def test_a_number_cuts_the_weight_at_that_progress(u, expected):
    assert phase(off=4.0).weight(u) == expected


def test_a_number_switches_off_there():
    fixed = phase(off=4)
    assert [fixed.advance(u) for u in (0.0, 3.999999, 4.0, 4.5)] == [True, True, False, False]
    assert fixed.kd_off == {"at": 4.0, "reason": "fixed"}


def test_a_number_does_not_look_at_who_is_better():
    fixed = phase(off=4.0, patience=1)
    assert outcomes(fixed, [99, 99, 99]) == [True] * 3
    assert fixed.weight(3.0) == 2.0


def test_a_number_after_the_window_leaves_the_end_of_the_window():
    fixed = phase(off=50.0)
    assert (fixed.weight(8.5), fixed.weight(9.0)) == (0.25, 0.0)
    assert not fixed.advance(9.0)


# --- state -----------------------------------------------------------------------------------------------------------

RUNS = {
    "surpass": ({}, [40, 51, 49, 51, 52, 48, 30, 20, 10, 10, 10]),
    "patience 3": ({"patience": 3}, [51, 52, 49, 51, 52, 53, 20, 10, 10, 10, 10]),
    "min": ({"mode": "min"}, [60, 49, 51, 49, 48, 70, 80, 90, 90, 90, 90]),
    "window": ({}, [40, 51, 49, 51, 49, 51, 49, 51, 49, 51, 52]),
    "number": ({"off": 4.5}, [51] * 11),
    "never": ({"off": "never"}, [51] * 11),
}


def step(phase: EarlyPhase, index: int, students: list[float]) -> tuple:
    """One update of a run with four updates an epoch and an evaluation at the end of each epoch: all it shows."""
    u = index / 4
    seen = (phase.advance(u), phase.weight(u), phase.temperature(u))
    if index % 4 == 3:
        phase.observe(students[index // 4], 50.0, u)
    return (*seen, phase.active, phase.reason, phase.kd_off)


@pytest.mark.parametrize(("changes", "students"), RUNS.values(), ids=RUNS)
def test_a_run_resumed_at_any_point_has_the_same_future(changes, students):
    running, states, shown = phase(**changes), [], []
    for index in range(44):
        states.append(json.dumps(running.state_dict()))
        shown.append(step(running, index, students))
    assert running.active == (changes.get("off") == "never")
    for start, state in enumerate(states):
        resumed = phase(**changes)
        resumed.load_state_dict(json.loads(state))
        assert [step(resumed, index, students) for index in range(start, 44)] == shown[start:]


def test_a_win_before_the_interruption_counts_after_it():
    before = phase()
    before.observe(51, 50, 1.0)
    after = phase()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert not after.observe(51, 50, 2.0)


@pytest.mark.parametrize("end", ["surpass", "window"])
def test_a_phase_that_was_off_stays_off_after_loading_its_state(end):
    before = phase(patience=1)
    _ = before.observe(51, 50, 1.0) if end == "surpass" else before.advance(9.0)
    after = phase(patience=1)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert (after.active, after.reason, after.kd_off) == (False, end, before.kd_off)
    assert after.weight(3.0) == 0.0
    assert not after.advance(3.0)


# --- arguments and imports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": -1.0}, {"weight": NAN}, {"weight": math.inf},
        {"warmup": -0.1}, {"hold": -1}, {"decay": -1e-9}, {"warmup": NAN}, {"hold": NAN}, {"decay": NAN},
        {"temperature": (0.0, 1.0)}, {"temperature": (6.0, 0.0)}, {"temperature": (-1.0, 1.0)},
        {"temperature": (NAN, 1.0)}, {"temperature": (6.0, math.inf)}, {"temperature": (6.0,)},
        {"patience": 0}, {"patience": -1},
        {"mode": "best"}, {"mode": ""},
        {"off": "always"}, {"off": "4"}, {"off": NAN},
    ],
    ids=str,
)  # fmt: skip
def test_an_argument_out_of_range_is_an_error(bad):
    with pytest.raises(ValueError):
        EarlyPhase(**bad)


@pytest.mark.parametrize("edge", [{"weight": 0}, {"warmup": 0}, {"decay": 0}, {"patience": 1}, {"off": 0}], ids=str)
def test_the_smallest_allowed_argument_is_accepted(edge):
    assert phase(**edge).weight(-1.0) == 0.0


def test_the_module_imports_only_the_standard_library():
    imported = set()
    for node in ast.walk(ast.parse(Path(schedule.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported <= sys.stdlib_module_names


def test_a_copy_of_the_file_works_alone(tmp_path):
    copied = tmp_path / "copied.py"
    copied.write_text(Path(schedule.__file__).read_text() + "\nprint(EarlyPhase(2.0, 2, 3, 4).weight(6))\n")
    done = subprocess.run([sys.executable, "-I", "-S", copied], capture_output=True, text=True, check=True)
    assert done.stdout == "1.5\n"


def fading(**kwargs):
    return EarlyPhase(**{"weight": 4.0, "hold": 10.0, "fade": True, **kwargs})


def test_fading_lambda_is_what_is_left_of_the_teachers_first_lead():
    phase = fading()
    weights = []
    for u, student in enumerate((30.0, 50.0, 60.0)):  # leads of 40, 20 and 10, averaged over two: 40, 30, 15
        phase.observe(student, 70.0, u)
        weights.append(phase.weight(u))
    assert weights == [4.0, 3.0, 1.5]


def test_fading_lambda_never_rises_again():
    phase = fading()
    for student in (30.0, 50.0, 30.0, 30.0):  # leads of 40, 20, 40 and 40
        phase.observe(student, 70.0)
    assert phase.weight(1.0) == 3.0


def test_fade_follows_a_metric_that_falls():
    phase = fading(mode="min")
    for student in (200.0, 150.0):  # leads of 100 and 50
        phase.observe(student, 100.0)
    assert phase.weight(1.0) == 3.0


def test_fade_multiplies_the_window():
    phase = fading(warmup=2.0, hold=2.0, decay=2.0, patience=1)
    phase.observe(30.0, 70.0)
    phase.observe(50.0, 70.0)  # half of the lead is left
    assert [phase.weight(u) for u in (1.0, 3.0, 5.0, 6.0)] == [1.0, 2.0, 1.0, 0.0]


def test_fade_that_reaches_zero_is_the_switch_off():
    phase = fading()
    phase.observe(60.0, 70.0, 1.0)
    assert phase.observe(66.0, 70.0, 2.0)  # 7 on average
    assert not phase.observe(75.0, 70.0, 3.0)  # 4 behind, then 5 ahead
    assert phase.kd_off == {"at": 3.0, "reason": "surpass"}


def test_fade_reaches_zero_at_no_evaluation_that_the_student_has_lost():
    phase = fading()
    phase.observe(60.0, 70.0)
    phase.observe(75.0, 70.0)  # 2.5 on average
    assert phase.observe(66.0, 70.0)  # -0.5 on average, but the teacher is ahead by 4
    assert phase.weight(1.0) == 1.0  # as before, for lambda never rises
    assert phase.observe(69.0, 70.0)
    assert phase.weight(1.0) == 1.0
    assert not phase.observe(71.0, 70.0)


def test_a_student_that_is_level_on_average_is_level_whatever_the_rounding():
    phase = fading()
    for student in (50.0, 59.9):
        phase.observe(student, 60.1)
    leads = [60.1 - 59.9, 60.1 - 60.3]
    assert sum(leads) > 0  # by rounding
    assert not phase.observe(60.3, 60.1)


def test_student_that_starts_ahead_fades_nothing_and_is_passed_by_patience():
    phase = fading()
    assert phase.observe(75.0, 70.0, 1.0)
    assert phase.weight(1.0) == 4.0
    assert not phase.observe(75.0, 70.0, 2.0)


def test_a_metric_that_is_not_a_number_leaves_the_fade_alone():
    phase = fading()
    phase.observe(30.0, 70.0)
    phase.observe(math.nan, 70.0)
    assert phase.weight(1.0) == 4.0


@pytest.mark.parametrize("off", ["never", 5.0])
def test_fade_waits_for_the_switch_off_that_compares(off):
    phase = fading(off=off)
    phase.observe(30.0, 70.0)
    phase.observe(60.0, 70.0)
    assert phase.weight(1.0) == 4.0


def test_fade_goes_on_after_a_resume():
    phase, resumed = fading(), fading()
    phase.observe(30.0, 70.0)
    phase.observe(50.0, 70.0)
    resumed.load_state_dict(phase.state_dict())
    for one in (phase, resumed):
        one.observe(60.0, 70.0)
    assert resumed.weight(1.0) == phase.weight(1.0) == 1.5
