"""The files a run leaves behind: rows, summary, tracker values, and files that are written whole or not at all."""

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from w2s.record import RunRecord, read_metrics, replacing

NAN, INF = math.nan, math.inf


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


def test_a_run_starts_with_its_options_and_the_rows_of_its_checkpoint(tmp_path):
    made = record(tmp_path / "new" / "run")
    made.start({"lr": 0.1, "kd_hold": INF}, rows=CURVE[:2])
    made.add(**CURVE[2])
    assert yaml.safe_load((tmp_path / "new" / "run" / "args.yaml").read_text()) == {"lr": 0.1, "kd_hold": INF}
    assert [row["update"] for row in read_metrics(tmp_path / "new" / "run" / "metrics.csv")] == [10, 20, 30]
    assert json.loads((tmp_path / "new" / "run" / "summary.json").read_text())["seed"] == 3


def test_a_run_that_keeps_nothing_starts_without_a_folder():
    made = record(None)
    made.start({"lr": 0.1}, rows=CURVE[:2])
    assert made.rows == CURVE[:2]


def test_the_switch_split_has_the_column_of_the_metric(tmp_path):
    record(tmp_path).add(switch=61.5, **CURVE[0])
    assert read_metrics(tmp_path / "metrics.csv")[0]["switch_top1"] == 61.5


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
