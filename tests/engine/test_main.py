"""How a script ends: its exit code, its one line, and what summary.json says of it."""

import json
import os

import pytest

from w2s.engine.errors import Finished, InputError, NonFiniteLoss, Preempted
from w2s.engine.main import _end_with_peer, call_main


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (None, 0, ""),
        (InputError("the model is unknown"), 2, "error: the model is unknown"),
        (NonFiniteLoss("the loss is not finite"), 3, "error: the loss is not finite"),
        (Preempted("saved at update 7"), 75, "saved at update 7"),
        (Finished("already finished"), 0, "already finished"),
        (SystemExit(0), 0, ""),
        (
            InputError(
                "Caught InputError in DataLoader worker process 0.\nTraceback ...\n"
                "w2s.engine.errors.InputError: corrupt image a.png\n"
            ),
            2,
            "error: corrupt image a.png",
        ),
    ],
    ids=["done", "bad input", "not finite", "preempted", "finished", "help", "from a worker"],
)
def test_a_script_ends_with_its_code_and_one_line(capsys, error, code, last):
    def main() -> None:
        if error:
            raise error

    with pytest.raises(SystemExit) as exit_:
        call_main(main)
    assert exit_.value.code == code
    assert capsys.readouterr().err == (f"{last}\n" if last else "")


def test_other_errors_end_with_code_1_and_their_traceback(capsys):
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(SystemExit) as exit_:
        call_main(main)
    assert exit_.value.code == 1
    assert "Traceback" in (printed := capsys.readouterr().err) and "ZeroDivisionError" in printed


@pytest.mark.parametrize(
    ("error", "processes", "status"),
    [
        (InputError("corrupt image"), 1, "failed"),
        (InputError("corrupt image"), 8, "failed"),
        (ZeroDivisionError(), 1, "failed"),
        (RuntimeError("connection closed by peer"), 8, "running"),  # the peer may have been killed
        (KeyboardInterrupt(), 1, "running"),
        (Preempted("saved"), 1, "preempted"),
    ],
)
def test_what_ends_an_open_run_stands_in_its_summary(run_of, tmp_path, error, processes, status):
    def main() -> None:
        run = run_of()
        run.sizes = [processes]
        run.open(metric="top1", mode="max", targets=[50.0], reported=("top1",), facts={})
        run.record.add(epoch=1, update=4, top1=60.0)
        if status == "preempted":
            run.finish(status)
        raise error

    with pytest.raises(SystemExit):
        call_main(main)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["best"], summary["targets"]["50"]["first"]["update"]) == (status, 60.0, 4)
    assert not list((tmp_path / "run").glob("*.partial"))


def test_an_error_of_another_process_stands_in_the_summary_too(run_of, tmp_path, monkeypatch, capsys):
    """This process ends while the main thread waits for the other one."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    run_of().open(metric="top1", mode="max", targets=[], reported=("top1",), facts={})
    _end_with_peer("process 1: corrupt image")
    assert codes == [2] and capsys.readouterr().err.endswith("error: process 1: corrupt image\n")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_refusal_leaves_the_run_before_it_alone(run_of, tmp_path):
    run = run_of()
    run.open(metric="top1", mode="max", targets=[], reported=("top1",), facts={})

    def main() -> None:
        raise InputError("the model is unknown")

    with pytest.raises(SystemExit):
        call_main(main)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "running"
