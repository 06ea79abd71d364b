"""first@tau on hand-made and random curves, the clock on a hand-moved time, and the files a run leaves behind."""

import ast
import csv
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from w2s import crossing
from w2s.crossing import Clock, best_value, crossings, reaches, target_key
from w2s.record import RunRecord, read_metrics, replacing

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


# --- RunRecord: metrics.csv ------------------------------------------------------------------------------------------

HEADER = (
    "epoch,update,samples,train_seconds,total_seconds,teacher_seconds,pflops,lr,kd_weight,kd_temperature,kd_active,"
    "train_loss,task_loss,kd_loss,top1,top5,switch_top1"
)


def record(folder: Path | None, **changes) -> RunRecord:
    arguments = {
        "metric": "top1", "mode": "max", "targets": [65.0, 65.5, 80.0], "reported": ("top1", "top5"),
        "facts": {"task": "cls", "seed": 3},
    }  # fmt: skip
    return RunRecord(folder, **{**arguments, **changes})


def row(update: int, top1: float | None, **more: float | None) -> dict:
    axes = {"update": update, "epoch": update / 10, "samples": 64 * update, "train_seconds": update / 3}
    return {**axes, "top1": top1, "top5": None if top1 is None else top1 / 0.9, **more}


CURVE = [row(10 * i, top1) for i, top1 in enumerate((50.0, 66.0, 64.0, 65.0, 100 / 1.5, 66.0), start=1)]


def filled(folder: Path | None, rows: list[dict] = CURVE, **changes) -> RunRecord:
    made = record(folder, **changes)
    for values in rows:
        made.add(**values)
    return made


def same(a: float | None, b: float | None) -> bool:
    """Equal, to the sign of zero and to NaN."""
    return repr(None if a is None else float(a)) == repr(None if b is None else float(b))


def test_metrics_csv_has_one_header_with_the_agreed_columns_and_a_line_an_evaluation(tmp_path):
    filled(tmp_path)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == HEADER
    assert [line.split(",")[1] for line in lines[1:]] == ["10", "20", "30", "40", "50", "60"]


def test_read_metrics_reads_back_exactly_what_was_written(tmp_path):
    odd = (0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, -1e-300, 2.0**60, NAN, INF, -INF, None, 7)
    rows = [row(i, value, top5=None, lr=value, switch_top1=value) for i, value in enumerate(odd, start=1)]
    filled(tmp_path, rows)
    read = read_metrics(tmp_path / "metrics.csv")
    assert [list(r) for r in read] == [HEADER.split(",")] * len(rows)
    for got, wrote in zip(read, rows, strict=True):
        assert all(same(got[k], wrote.get(k)) for k in ("update", "lr", "top1", "switch_top1", "train_seconds"))
        assert got["pflops"] is None


@pytest.mark.parametrize("value", [True, False, np.float64(1 / 3)], ids=repr)
def test_what_counts_as_a_float_in_python_is_read_back_as_one(tmp_path, value):
    record(tmp_path).add(update=1, kd_active=value)
    assert read_metrics(tmp_path / "metrics.csv")[0]["kd_active"] == float(value)


def test_each_row_is_on_disk_as_soon_as_it_is_added(tmp_path):
    growing = record(tmp_path)
    for count, values in enumerate(CURVE, start=1):
        growing.add(**values)
        assert len(read_metrics(tmp_path / "metrics.csv")) == count
        assert json.loads((tmp_path / "summary.json").read_text())["last"] == values["top1"]


def test_metrics_csv_is_read_by_a_plain_csv_reader(tmp_path):
    filled(tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [float(r["top1"]) for r in csv.DictReader(file)] == [r["top1"] for r in CURVE]


def test_a_repeated_update_replaces_the_row_before_it(tmp_path):
    twice = filled(tmp_path, [*CURVE[:2], row(20, 12.5), CURVE[2]])
    assert [r["top1"] for r in twice.rows] == [50.0, 12.5, 64.0]
    assert [r["top1"] for r in read_metrics(tmp_path / "metrics.csv")] == [50.0, 12.5, 64.0]


def test_a_row_out_of_order_is_an_error_and_changes_nothing(tmp_path):
    ordered = filled(tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match="59"):
        ordered.add(**row(59, 70.0))
    assert [r["update"] for r in ordered.rows] == [10, 20, 30, 40, 50, 60]
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_an_unknown_column_is_an_error_that_names_it_and_changes_nothing(tmp_path):
    known = filled(tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match="top2"):
        known.add(**row(70, 70.0), top2=1.0)
    assert len(known.rows) == len(CURVE)
    assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("max", (50, 60, 60, 55, 61), [True, True, False, False, True]),
        ("min", (50, 60, 50, 45, 45), [True, False, False, True, False]),
        ("max", (NAN, 50, NAN, None, 51), [False, True, False, False, True]),
    ],
)
def test_add_tells_whether_the_metric_is_the_best_so_far(mode, values, expected):
    judged = record(None, mode=mode)
    assert [judged.add(update=i, top1=value) for i, value in enumerate(values)] == expected


def test_a_row_that_replaces_the_best_one_is_judged_without_it():
    judged = filled(None, [row(10, 50.0), row(20, 90.0)])
    assert judged.add(**row(20, 60.0))
    assert judged.summary()["best"] == 60.0


@pytest.mark.parametrize("kept", range(1, 6))
def test_a_killed_run_that_is_resumed_leaves_the_files_of_an_uninterrupted_one(tmp_path, kept):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    filled(tmp_path / "whole")
    checkpoint = json.loads(json.dumps(filled(None, CURVE[:kept]).rows))
    filled(tmp_path / "killed", CURVE[: kept + 1])
    lines = (tmp_path / "killed" / "metrics.csv").read_bytes()
    (tmp_path / "killed" / "metrics.csv").write_bytes(lines[:-12])  # the last line is half written

    resumed = record(tmp_path / "killed")
    resumed.rewrite(checkpoint)
    for values in CURVE[kept:]:
        resumed.add(**values)
    for name in ("metrics.csv", "summary.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_rewrite_drops_the_rows_after_the_checkpoint(tmp_path):
    filled(tmp_path)
    record(tmp_path).rewrite(CURVE[:2])
    assert [r["update"] for r in read_metrics(tmp_path / "metrics.csv")] == [10, 20]


def test_rewrite_without_rows_starts_a_new_run_over_an_old_file(tmp_path):
    filled(tmp_path)
    record(tmp_path).rewrite()
    assert (tmp_path / "metrics.csv").read_text() == HEADER + "\n"


def test_rewrite_keeps_the_rows_at_hand(tmp_path):
    kept = filled(tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_text("spoilt")
    kept.rewrite()
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_adding_to_a_resumed_record_does_not_change_the_rows_it_was_given(tmp_path):
    checkpoint = CURVE[:2]
    resumed = record(tmp_path)
    resumed.rewrite(checkpoint)
    resumed.add(**CURVE[2])
    assert len(checkpoint) == 2


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    silent = filled(None)
    silent.rewrite(CURVE)
    silent.write_summary(status="done")
    assert os.listdir(tmp_path) == []


def test_without_a_folder_the_summary_is_the_same(tmp_path):
    assert filled(None).summary() == filled(tmp_path).summary()


def test_log_gets_the_tracker_values_and_the_update_of_each_row():
    logged = []
    made = filled(None, log=lambda values, update: logged.append((update, values)))
    assert logged == [(r["update"], made.tracker_values(r)) for r in CURVE]


# --- RunRecord: summary.json -----------------------------------------------------------------------------------------


def strict(text: str) -> dict:
    """JSON without the NaN and Infinity that Python's reader lets through."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_summary_tells_facts_best_last_and_crossings(tmp_path):
    filled(tmp_path, targets=[65, 65.5, 80.0])
    place = {"update": 20, "epoch": 2.0, "samples": 1280, "train_seconds": 20 / 3}
    late = {"update": 40, "epoch": 4.0, "samples": 2560, "train_seconds": 40 / 3}
    later = {"update": 50, "epoch": 5.0, "samples": 3200, "train_seconds": 50 / 3}
    assert strict((tmp_path / "summary.json").read_text()) == {
        "task": "cls",
        "seed": 3,
        "metric": "top1",
        "mode": "max",
        "best": 100 / 1.5,
        "last": 66.0,
        "targets": {
            "65": {"first": {"value": 66.0, **place}, "confirmed": {"value": 65.0, **late}},
            "65.5": {"first": {"value": 66.0, **place}, "confirmed": {"value": 100 / 1.5, **later}},
            "80": {"first": None, "confirmed": None},
        },
    }


def test_summary_of_a_metric_where_lower_is_better():
    summary = filled(None, mode="min", targets=[64.5]).summary()
    assert (summary["mode"], summary["best"], summary["targets"]["64.5"]["first"]["update"]) == ("min", 50.0, 10)


def test_summary_before_the_first_evaluation(tmp_path):
    record(tmp_path, targets=[65.0]).write_summary()
    summary = strict((tmp_path / "summary.json").read_text())
    assert (summary["best"], summary["last"]) == (None, None)
    assert summary["targets"] == {"65": {"first": None, "confirmed": None}}


def test_write_summary_adds_and_replaces_facts_for_good(tmp_path):
    made = filled(tmp_path, CURVE[:1])
    made.write_summary(status="running", seed=4)
    made.write_summary(status="done")
    made.add(**CURVE[1])
    summary = strict((tmp_path / "summary.json").read_text())
    assert (summary["task"], summary["status"], summary["seed"], summary["last"]) == ("cls", "done", 4, 66.0)


def test_what_is_no_number_becomes_null_in_valid_json(tmp_path):
    facts = {"flops": NAN, "teacher": {"switch": INF, "report": [1.5, -INF]}, "pair": (NAN, 2)}
    filled(tmp_path, [*CURVE, row(70, NAN, train_seconds=NAN)], facts=facts)
    summary = strict((tmp_path / "summary.json").read_text())
    assert (summary["last"], summary["best"], summary["flops"]) == (None, 100 / 1.5, None)
    assert summary["teacher"] == {"switch": None, "report": [1.5, None]}
    assert summary["pair"] == [None, 2]


def test_a_failing_write_leaves_the_summary_as_it_was(tmp_path):
    made = filled(tmp_path)
    before = (tmp_path / "summary.json").read_bytes()
    with pytest.raises(TypeError):
        made.write_summary(zzz=object())  # no JSON for it; comes after much that could be written
    assert (tmp_path / "summary.json").read_bytes() == before


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old"


def test_replacing_shows_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_replacing_takes_bytes_and_another_name_until_then(tmp_path):
    path = tmp_path / "file.png"
    with replacing(path, "wb", ".7.partial") as file:
        file.write(b"\x89PNG\r\n")
        assert os.listdir(tmp_path) == ["file.png.7.partial"]
    assert path.read_bytes() == b"\x89PNG\r\n" and os.listdir(tmp_path) == ["file.png"]


def test_replacing_recovers_from_what_an_earlier_failure_left(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(KeyError), replacing(path) as file:
        file.write("a long half-written text")
        raise KeyError
    with replacing(path) as file:
        file.write("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


# --- RunRecord: trackers ---------------------------------------------------------------------------------------------


def test_tracker_values_hold_each_metric_under_every_axis():
    values = record(None).tracker_values({"update": 10, "epoch": 1.0, "train_seconds": 5.0, "pflops": 0.5, "lr": 0.1,
                                          "top1": 66.0, "switch_top1": 70.0})  # fmt: skip
    assert {k: v for k, v in values.items() if k not in ("eval/update", "eval/lr")} == {
        "epoch": 1.0, "train_seconds": 5.0, "pflops": 0.5,
        "eval/top1": 66.0, "eval/switch_top1": 70.0,
        "by_train_seconds/top1": 66.0, "by_train_seconds/switch_top1": 70.0,
        "by_pflops/top1": 66.0, "by_pflops/switch_top1": 70.0,
    }  # fmt: skip
    assert values["eval/lr"] == 0.1


def test_tracker_values_leave_out_what_is_missing():
    values = record(None).tracker_values({"update": 10, "epoch": None, "lr": None, "top1": None, "top5": 90.0})
    assert not any(name.endswith(("epoch", "/lr", "top1")) for name in values)
    assert values["eval/top5"] == 90.0


def test_tracker_summary_holds_best_last_and_every_axis_of_each_crossing():
    assert filled(None, CURVE[:5], targets=[65.0]).tracker_summary() == {
        "best": 100 / 1.5, "last": 100 / 1.5,
        "first@65/value": 66.0, "first@65/update": 20, "first@65/epoch": 2.0,
        "first@65/samples": 1280, "first@65/train_seconds": 20 / 3,
        "confirmed@65/value": 65.0, "confirmed@65/update": 40, "confirmed@65/epoch": 4.0,
        "confirmed@65/samples": 2560, "confirmed@65/train_seconds": 40 / 3,
    }  # fmt: skip


def test_the_gap_to_the_teacher_is_positive_while_it_is_better():
    for mode, teacher, gap in (("max", 72.0, 2.0), ("max", 69.5, -0.5), ("min", 68.0, 2.0)):
        made = record(None, mode=mode, facts={"teacher": {"switch": teacher}})
        values = made.tracker_values({"update": 10, "epoch": 1.0, "train_seconds": 5.0, "switch_top1": 70.0})
        assert [values[key] for key in ("eval/teacher_gap", "by_train_seconds/teacher_gap")] == [gap, gap]
        assert "eval/teacher_gap" not in made.tracker_values({"update": 20, "epoch": 2.0, "top1": 70.0})


def test_tracker_summary_holds_the_teachers_scores_and_its_end():
    facts = {"teacher": {"switch": 72.0, "report": 71.0}, "kd_off": {"epoch": 2.0, "update": 20, "reason": "surpass"}}
    assert record(None, facts=facts).tracker_summary() == {
        "teacher/switch": 72.0, "teacher/report": 71.0,
        "kd_off/epoch": 2.0, "kd_off/update": 20, "kd_off/reason": "surpass",
    }  # fmt: skip


def test_tracker_summary_leaves_out_censored_targets():
    assert filled(None, CURVE[:1], targets=[65.0, 80.0]).tracker_summary() == {"best": 50.0, "last": 50.0}


def test_tracker_summary_before_the_first_evaluation_is_empty():
    assert record(None).tracker_summary() == {}


# --- read_metrics ----------------------------------------------------------------------------------------------------


def test_read_metrics_takes_any_columns_and_empty_cells(tmp_path):
    (tmp_path / "m.csv").write_text("fid,update\n7.5,10\n,2e1\n")
    assert read_metrics(tmp_path / "m.csv") == [{"fid": 7.5, "update": 10.0}, {"fid": None, "update": 20.0}]


def test_read_metrics_of_a_header_alone_is_no_rows(tmp_path):
    (tmp_path / "m.csv").write_text("update,top1\n")
    assert read_metrics(tmp_path / "m.csv") == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("update,top1\n10,50\n20\n30,60\n", 3),  # too few
        ("update,top1\n10,50,1\n", 2),  # too many
        ("update,top1\n10,50\n20,60\n30,sixty\n", 4),
        ("update,top1\n10,50\nupdate,top1\n20,60\n", 3),  # a second header
        ("update,top1\n10,50\n,60\n", 3),  # no update
        ("update,top1\n10,50\n\n20,60\n", 3),  # a blank line
        ("epoch,top1\n1,50\n", 1),  # no update column
    ],
)
def test_read_metrics_names_the_line_that_is_wrong(tmp_path, text, line):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"m\.csv line {line}\b"):
        read_metrics(tmp_path / "m.csv")


def test_read_metrics_of_an_empty_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "m.csv").write_text("")
    with pytest.raises(ValueError, match=r"m\.csv"):
        read_metrics(tmp_path / "m.csv")


def test_read_metrics_refuses_a_half_written_line(tmp_path):
    filled(tmp_path, [row(10, 50.0), row(20, None)])
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="line 3"):
        read_metrics(path)


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
