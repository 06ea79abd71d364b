"""first@tau on hand-made and random curves, and the clock on a hand-moved time."""

import ast
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from w2s import crossing
from w2s.crossing import Clock, best_value, crossings, reaches, target_key

NAN, INF = math.nan, math.inf
MISSING = object()


def curve(*values: object) -> list[dict]:
    """One row an evaluation at updates 10, 20, ..."""
    rows = [{"update": 10 * i, "epoch": float(i), "top1": value} for i, value in enumerate(values, start=1)]
    return [{k: v for k, v in row.items() if v is not MISSING} for row in rows]


def places(rows: list[dict], target: float, mode: str = "max") -> tuple[int | None, int | None]:
    """The updates of (first, confirmed)."""
    return tuple(found and found["update"] for found in crossings(rows, "top1", target, mode))


# --- crossings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((50, 64.99, 66, 70), (30, 30)),
        ((50, 65, 60, 66, 67), (20, 40)),  # confirmed later than first
        ((66, 60, 66, 60, 66), (10, None)),  # never twice in a row
        ((50, 60, 65), (30, None)),  # nothing follows to confirm
        ((70, 70), (10, 10)),
        ((70,), (10, None)),
        ((50, 60, 64.999), (None, None)),
        ((), (None, None)),
    ],
)
def test_first_and_confirmed_where_higher_is_better(values, expected):
    assert places(curve(*values), 65.0) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((90, 61, 59, 40), (30, 30)),
        ((90, 60, 61, 60, 55), (20, 40)),
        ((90, 70, 60), (30, None)),
        ((90, 70, 60.001), (None, None)),
    ],
)
def test_first_and_confirmed_where_lower_is_better(values, expected):
    assert places(curve(*values), 60.0, "min") == expected


@pytest.mark.parametrize("mode", ["max", "min"])
def test_exactly_the_target_is_a_crossing(mode):
    assert places(curve(65.0, 65.0), 65.0, mode) == (10, 10)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("gap", [NAN, None, MISSING])
def test_an_evaluation_without_a_value_crosses_nothing_and_confirms_nothing(gap, mode):
    assert places(curve(gap, 65, gap, 65, 65), 65.0, mode) == (20, 40)


@pytest.mark.parametrize("gap", [NAN, None, MISSING])
def test_a_curve_without_values_never_crosses(gap):
    assert places(curve(gap, gap), 0.0) == (None, None)


def test_the_last_row_of_an_update_counts():
    rows = [*curve(70, 50, 66, 66), {"update": 10, "epoch": 1.0, "top1": 60}]
    assert places(rows, 65.0) == (30, 30)


def test_a_repeated_update_is_one_evaluation_not_two():
    assert places([*curve(50, 66), {"update": 20, "epoch": 2.0, "top1": 67}], 65.0) == (20, None)


def test_rows_are_taken_in_the_order_of_their_updates():
    rows = curve(50, 66, 60, 67, 68)
    assert places([rows[i] for i in (4, 1, 3, 0, 2)], 65.0) == (20, 40)


def test_a_crossing_tells_its_value_and_place_on_every_axis():
    place = {"epoch": 2.0, "update": 20, "samples": 1280, "train_seconds": 5.5, "total_seconds": 9.25, "pflops": 0.5}
    rows = [{"update": 10, "top1": 50.0}, {**place, "top1": 66.0, "lr": 0.1, "top5": 90.0}]
    assert crossings(rows, "top1", 65.0) == ({"value": 66.0, **place}, None)


def test_a_crossing_leaves_out_the_axes_its_row_lacks():
    assert crossings([{"update": 20, "top1": 66.0}], "top1", 65.0)[0] == {"value": 66.0, "update": 20}


def test_an_axis_that_was_not_measured_is_one_that_the_row_lacks():
    row = {"update": 10, "epoch": 1.0, "pflops": None, "top1": 70.0}
    assert crossings([row], "top1", 65.0) == ({"value": 70.0, "epoch": 1.0, "update": 10}, None)


def test_the_metric_is_the_one_that_was_asked_for():
    rows = [{"update": 10, "top1": 50.0, "top5": 80.0}, {"update": 20, "top1": 70.0, "top5": 90.0}]
    assert [crossings(rows, metric, 65.0)[0]["update"] for metric in ("top1", "top5")] == [20, 10]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_random_curves_agree_with_brute_force(mode):
    draw = random.Random(mode)
    found = set()
    for _ in range(3000):
        points = [(draw.randrange(12), draw.choice([*range(10), NAN, None])) for _ in range(draw.randrange(14))]
        target = draw.randrange(10)
        # independent: the last value given for each update, then every index tried
        values = [([v for w, v in points if w == u] or ["none"])[-1] for u in range(12)]
        values = [(u, v) for u, v in enumerate(values) if v != "none"]
        hits = [v in (range(target, 10) if mode == "max" else range(target + 1)) for _, v in values]
        first = min((u for (u, _), hit in zip(values, hits, strict=True) if hit), default=None)
        confirmed = min((values[i - 1][0] for i in range(1, len(hits)) if hits[i - 1 : i + 1] == [1, 1]), default=None)
        result = crossings([{"update": u, "top1": v} for u, v in points], "top1", target, mode)
        assert tuple(c and c["update"] for c in result) == (first, confirmed), (points, target)
        found.add((first is None, confirmed is None, first == confirmed))
    assert len(found) == 4  # never, once only, confirmed at once, confirmed later


@pytest.mark.parametrize(
    ("value", "mode", "expected"),
    [
        (65.0, "max", True), (65.1, "max", True), (64.9, "max", False),
        (65.0, "min", True), (65.1, "min", False), (64.9, "min", True),
        (None, "max", False), (NAN, "max", False), (None, "min", False), (NAN, "min", False),
    ],
)  # fmt: skip
def test_reaches(value, mode, expected):
    assert reaches(value, 65.0, mode) is expected


@pytest.mark.parametrize(("mode", "expected"), [("max", 70.0), ("min", 50.0)])
def test_best_value_leaves_out_what_is_not_a_number(mode, expected):
    assert best_value(curve(60.0, NAN, 70.0, None, INF, -INF, MISSING, 50.0), "top1", mode) == expected


@pytest.mark.parametrize("rows", [[], curve(NAN, None, MISSING)])
def test_best_value_of_nothing_is_none(rows):
    assert best_value(rows, "top1", "max") is None


@pytest.mark.parametrize(
    ("target", "key"), [(65, "65"), (65.0, "65"), (65.5, "65.5"), (0.1 + 0.2, "0.3"), (60000.0, "60000")]
)
def test_target_key_has_one_spelling(target, key):
    assert target_key(target) == key


# --- Clock -----------------------------------------------------------------------------------------------------------


class Time:
    """A clock on the wall that moves only when told to."""

    def __init__(self, seconds: float = 1000.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds

    def passes(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def time() -> Time:
    return Time()


def test_a_new_clock_counts_total_but_no_train_seconds(time):
    clock = Clock(now=time)
    time.passes(7)
    assert (clock.running, clock.train_seconds, clock.total_seconds) == (False, 0, 7)


def test_train_seconds_are_those_between_start_and_pause(time):
    clock = Clock(now=time)
    time.passes(1)
    clock.start()
    time.passes(10)
    clock.pause()
    time.passes(100)
    clock.start()
    time.passes(20)
    clock.pause()
    time.passes(1000)
    assert (clock.train_seconds, clock.total_seconds) == (30, 1131)


def test_a_running_clock_can_be_read_at_any_time(time):
    clock = Clock(now=time)
    clock.start()
    time.passes(3)
    assert (clock.running, clock.train_seconds) == (True, 3)
    time.passes(4)
    assert clock.train_seconds == 7


def test_starting_twice_does_not_lose_the_time_in_between(time):
    clock = Clock(now=time)
    clock.start()
    time.passes(3)
    clock.start()
    time.passes(4)
    clock.pause()
    assert clock.train_seconds == 7


def test_pausing_twice_does_not_count_twice(time):
    clock = Clock(now=time)
    clock.start()
    time.passes(3)
    clock.pause()
    time.passes(4)
    clock.pause()
    assert clock.train_seconds == 3


def test_a_paused_block_is_left_out_of_train_time_only(time):
    clock = Clock(now=time)
    clock.start()
    time.passes(3)
    with clock.paused():
        assert not clock.running
        time.passes(50)
    time.passes(4)
    assert (clock.running, clock.train_seconds, clock.total_seconds) == (True, 7, 57)


def test_paused_blocks_nest(time):
    clock = Clock(now=time)
    clock.start()
    time.passes(3)
    with clock.paused():
        time.passes(10)
        with clock.paused():
            time.passes(20)
        assert not clock.running
        time.passes(30)
    time.passes(4)
    assert clock.train_seconds == 7


def test_a_paused_block_does_not_start_a_clock_that_stood(time):
    clock = Clock(now=time)
    with clock.paused():
        time.passes(10)
    time.passes(10)
    assert (clock.running, clock.train_seconds) == (False, 0)


def test_the_clock_runs_on_after_an_error_in_a_paused_block(time):
    clock = Clock(now=time)
    clock.start()
    with pytest.raises(KeyError), clock.paused():
        time.passes(10)
        raise KeyError
    time.passes(5)
    assert clock.train_seconds == 5


def test_work_queued_before_start_is_not_train_time_and_work_queued_before_pause_is(time):
    clock = Clock(sync=lambda: time.passes(100), now=time)  # waiting for the device takes 100 s
    clock.start()
    assert clock.train_seconds == 0
    time.passes(1)
    clock.pause()
    assert (clock.train_seconds, clock.total_seconds) == (101, 201)


def test_sync_is_called_at_boundaries_only(time):
    calls = []
    clock = Clock(sync=lambda: calls.append(None), now=time)
    clock.pause()
    _ = clock.train_seconds, clock.total_seconds
    assert len(calls) == 0
    clock.start()
    clock.start()
    _ = clock.train_seconds, clock.total_seconds
    assert len(calls) == 1
    with clock.paused(), clock.paused():
        pass
    assert len(calls) == 3


def stopped_and_resumed(clock: Clock, time: Time) -> tuple[Clock, Time]:
    """Another process, on a machine whose clock shows something else."""
    later = Time(time.seconds + 1e6)
    resumed = Clock(now=later)
    later.passes(2)  # start-up
    resumed.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    return resumed, later


def test_a_resumed_clock_continues_all_three_sums_and_leaves_out_the_gap(time):
    clock = Clock(now=time)
    clock.start()
    time.passes(10)
    clock.teacher_seconds += 1.5
    clock.pause()
    time.passes(5)
    resumed, later = stopped_and_resumed(clock, time)
    assert (resumed.train_seconds, resumed.total_seconds, resumed.teacher_seconds) == (10, 17, 1.5)
    resumed.start()
    later.passes(4)
    assert (resumed.train_seconds, resumed.total_seconds, resumed.teacher_seconds) == (14, 21, 1.5)


def test_the_state_of_a_running_clock_holds_the_train_time_so_far(time):
    clock = Clock(now=time)
    clock.start()
    time.passes(10)
    resumed, later = stopped_and_resumed(clock, time)
    later.passes(100)
    assert (resumed.running, resumed.train_seconds) == (False, 10)


def test_a_clock_may_be_resumed_twice(time):
    clock = Clock(now=time)
    for expected in (10, 20, 30):
        clock.start()
        time.passes(10)
        assert clock.train_seconds == expected
        clock, time = stopped_and_resumed(clock, time)
    assert (clock.train_seconds, clock.total_seconds) == (30, 36)


def test_the_default_clock_goes_forward():
    clock = Clock()
    clock.start()
    readings = [clock.train_seconds for _ in range(1000)]
    assert readings == sorted(readings)
    assert 0 <= readings[0] < readings[-1] < 60
    assert clock.total_seconds >= readings[-1]


# --- imports ---------------------------------------------------------------------------------------------------------


def test_the_module_imports_only_the_standard_library():
    imported = set()
    for node in ast.walk(ast.parse(Path(crossing.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported <= sys.stdlib_module_names


def test_a_copy_of_the_file_works_alone(tmp_path):
    copied = tmp_path / "copied.py"
    copied.write_text(Path(crossing.__file__).read_text() + '\nprint(crossings([{"update": 3, "m": 1}], "m", 1))\n')
    done = subprocess.run([sys.executable, "-I", "-S", copied], capture_output=True, text=True, check=True)
    assert done.stdout == "({'value': 1, 'update': 3}, None)\n"
