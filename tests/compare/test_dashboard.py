"""An offline W&B run read back from its file: what the dashboard draws is really in it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from compare.wandb_files import complete_records
from helpers import DIGITS, RESNET, call_script, read_rows, read_summary

import train_cls
from w2s.compare import dashboard
from w2s.crossing import AXES
from w2s.engine.trackers import arm_of

AXIS_OF = {"eval": "epoch", "by_train_seconds": "train_seconds", "by_pflops": "pflops"}


class Logged:
    """A run as its offline file has it; `summary`, `group` and `job_type` as W&B's API would give them."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        self.rows, self.axes, self.summary = [], {}, {}
        for record in complete_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.group, self.job_type = record.run.run_group, record.run.job_type
            elif kind == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                self.rows.append(row)
                self.summary |= row  # the last value of everything logged
            elif kind == "metric":
                self.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
            elif kind == "summary":
                for item in record.summary.update:
                    self.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_teacher) -> Path:
    """A taught run that crosses one target of two, and whose teacher falls silent half-way."""
    output = tmp_path_factory.mktemp("dashboard")
    options = (
        "--epochs 1 --evals-per-epoch 4 --kd-warmup 0 --kd-hold 0.5 --kd-decay 0 --kd-patience 9 --target top1=0.5 99.9"
    )
    call_script(
        *(train_cls.main, DIGITS, RESNET, options, "--log-with wandb --seed 3 --name run --output", output),
        *("--teacher", tiny_teacher),
    )
    return output / "run"


@pytest.fixture(scope="module")
def logged(folder) -> Logged:
    return Logged(folder)


def test_the_run_carries_group_job_type_and_tags(logged, folder):
    run = logged.run
    assert (run.project, run.display_name) == ("w2s", "run")
    assert (run.run_group, run.job_type, list(run.tags)) == ("cls-digits-resnet10t", "w2s", ["w2s", "cls", "seed-3"])
    assert yaml.safe_load((folder / "args.yaml").read_text())["group"] == run.run_group  # where a comparison finds it


@pytest.mark.parametrize(
    ("options", "arm"),
    [
        ({"teacher": None}, "baseline"),
        ({}, "w2s"),
        ({"kd_off": "running"}, "w2s-running"),
        ({"kd_off": "never"}, "w2s-never-off"),
        ({"kd_off": 4.0}, "w2s-off-at-4"),
        ({"kd_control": "labels", "kd_off": 2.5}, "labels-off-at-2.5"),
    ],
)
def test_an_arm_is_named_by_what_its_options_say(options, arm):
    assert arm_of({"teacher": "x", "kd_off": "surpass", "kd_control": None} | options) == arm


def test_every_evaluation_is_there_over_each_axis(logged, folder):
    rows = read_rows(folder)
    teacher = read_summary(folder)["teacher"]["switch"]
    assert len(logged.rows) == len(rows) == 4
    for row, wanted in zip(logged.rows, rows, strict=True):
        for axis in AXIS_OF.values():
            assert row[axis] == float(wanted[axis])
        for prefix in AXIS_OF:
            assert row[f"{prefix}/top1"] == float(wanted["top1"])
        assert row["eval/kd_weight"] == float(wanted["kd_weight"])
        if wanted["switch_top1"]:
            assert row["eval/teacher_gap"] == pytest.approx(teacher - float(wanted["switch_top1"]))
    assert "eval/teacher_gap" in logged.rows[0] and "eval/teacher_gap" not in logged.rows[-1]


def test_each_curve_has_its_own_x_axis(logged):
    for prefix, axis in AXIS_OF.items():
        assert logged.axes[f"{prefix}/*"] == axis
        assert axis in logged.axes


def test_the_summary_holds_crossings_and_switch_off(logged, folder):
    facts, found = read_summary(folder), logged.summary
    for kind in ("first", "confirmed"):
        for axis in AXES:
            assert found[f"{kind}@0.5/{axis}"] == facts["targets"]["0.5"][kind][axis]
    assert not [key for key in found if "@99.9" in key]
    assert {key: found[f"kd_off/{key}"] for key in ("epoch", "update", "reason")} == facts["kd_off"]
    assert {key: found[f"teacher/{key}"] for key in ("switch", "report")} == {
        key: facts["teacher"][key] for key in ("switch", "report")
    }
    assert [found[key] for key in ("best", "last", "metric", "mode", "status")] == [
        *(facts["best"], facts["last"], "top1", "max", "finished")
    ]


def drawn(workspace) -> list[tuple[str, set[str]]]:
    """Each panel's kind and the keys it draws, out of the specification that W&B would store."""
    spec = workspace._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    panels = []
    for section in spec["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            config = panel["config"]
            names = [*config.get("metrics", []), *(config[key] for key in ("xAxis", "yAxis") if key in config)]
            panels.append((panel["viewType"], {name.removeprefix("summary:") for name in names}))
    return panels


def test_the_dashboard_draws_only_what_is_there(logged):
    pytest.importorskip("wandb_workspaces", reason="the optional library of the dashboard")
    group, runs = dashboard.choose_group([logged], None)
    workspace = dashboard.build_workspace("someone", "w2s", group, runs)
    panels = drawn(workspace)
    assert {key for _, keys in panels for key in keys} <= set(logged.summary)
    lines = [keys for kind, keys in panels if kind == "Run History Line Plot"]
    for prefix, axis in AXIS_OF.items():
        assert {axis, f"{prefix}/top1"} in lines
    assert {"epoch", "eval/kd_weight"} in lines and {"epoch", "eval/teacher_gap"} in lines
    bars = [keys for kind, keys in panels if kind == "Bar Chart"]
    assert bars == [{f"first@0.5/{axis}"} for axis in AXIS_OF.values()]
    assert [keys for kind, keys in panels if kind == "Scatter Plot"] == [{"kd_off/epoch", "last"}]
    assert group in workspace.runset_settings.filters


def test_the_command_saves_it_and_names_what_is_wrong(logged, monkeypatch, capsys):
    ws = pytest.importorskip("wandb_workspaces.workspaces", reason="the optional library of the dashboard")
    import wandb

    runs, saved = [logged], []

    def of_project(path: str) -> list:
        if path != "me/w2s":
            raise ValueError("Could not find project\nmore")
        return runs

    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="me", runs=of_project))
    monkeypatch.setattr(ws.Workspace, "save", lambda self: saved.append(self._to_model()))
    monkeypatch.setattr(ws.Workspace, "url", "https://a.view")
    assert dashboard.main(["--project", "w2s"]) == 0
    assert capsys.readouterr().out == "https://a.view\n"
    assert (saved[0].entity, saved[0].project, saved[0].display_name) == ("me", "w2s", "w2s cls-digits-resnet10t")

    other = SimpleNamespace(group="other", job_type="w2s", summary={})
    for members, words, message in (
        ([logged], ["--project", "none"], "cannot read project none: ValueError: Could not find project"),
        ([logged, other], [], "choose runs with --group: it has cls-digits-resnet10t, other"),
        ([logged, other], ["--group", "x"], "no group x: it has cls-digits-resnet10t, other"),
        ([other], [], "no run of group other has ended yet"),
        ([], [], "it has no runs that the scripts have logged"),
    ):
        runs[:] = members
        assert dashboard.main(["--project", "w2s", *words]) == 2
        check_one_line(capsys, message)
    assert len(saved) == 1


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)
    assert dashboard.main(["--project", "w2s"]) == 2
    check_one_line(capsys, "pip install wandb-workspaces")
    assert dashboard.main([]) == 2
    check_one_line(capsys, "--project")


def check_one_line(capsys, message: str) -> None:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
