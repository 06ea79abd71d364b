"""Folders that are whole or not there, the trial whether one can be written, and the lock of one."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, refused

import w2s.engine.files
from w2s.engine.files import LOCK, check_writable, drop_folder, lock_folder, put_in_place, replacing_folder


@pytest.mark.parametrize("folder", ["", "new", "new/deep/deeper"])
def test_trying_to_write_leaves_nothing_behind(tmp_path, folder):
    check_writable(tmp_path / folder)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_may_be_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable(Path("new/run"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("cannot write", str(tmp_path / "file"), "--output"):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with refused("cannot write", str(tmp_path), "--output"):
        check_writable(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_a_folder_takes_the_place_of_the_one_before_only_when_it_is_written(tmp_path):
    folder = tmp_path / "model"
    for text in ("old", "new"):
        with replacing_folder(folder) as beside:
            (beside / "weights").write_text(text)
            assert not folder.exists() if text == "old" else (folder / "weights").read_text() == "old"
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_block_that_fails_leaves_the_folder_as_it_was(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing_folder(folder) as beside:
        (beside / "weights").write_text("half")
        raise ZeroDivisionError
    assert (folder / "weights").read_text() == "old"
    with replacing_folder(folder) as beside:  # what was left half-written does not get into the next one
        assert list(beside.iterdir()) == []
    assert list(folder.iterdir()) == []


def test_what_an_earlier_kill_left_does_not_stop_the_next_one(tmp_path):
    for name in (".model.dropped", "model", "beside"):
        (tmp_path / name / "deep").mkdir(parents=True)
    put_in_place(tmp_path / "beside", tmp_path / "model")
    drop_folder(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_stay_is_written_once(tmp_path):
    folder = tmp_path / "new" / "data"
    for text in ("first", "second"):
        with replacing_folder(folder, keep_existing=True) as beside:
            (beside / "file").write_text(text)
    assert (folder / "file").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_of_two_that_write_the_same_folder_at_once_the_first_to_finish_provides_it(tmp_path):
    folder = tmp_path / "data"
    with replacing_folder(folder, keep_existing=True) as slow:
        (slow / "file").write_text("slow")
        with replacing_folder(folder, keep_existing=True) as quick:
            (quick / "file").write_text("quick")
        assert (slow / "file").read_text() == "slow"
    assert (folder / "file").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_block_that_fails_leaves_nothing_where_the_folder_may_stay(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "data", keep_existing=True) as beside:
        (beside / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


# --- locks -----------------------------------------------------------------------------------------------------------

HOLDING = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from w2s.engine.files import lock_folder

lock = lock_folder(Path(sys.argv[2]), print)
if not os.fork():  # as a loader's worker, which may live on for a while
    time.sleep(30)
    os._exit(0)
print("held", flush=True)
time.sleep(30)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path, with a child."""
    command = [sys.executable, "-c", HOLDING, str(ROOT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_a_folder_that_another_process_has_locked_is_refused_until_that_is_killed(tmp_path, holder):
    with refused(str(tmp_path), f"process {holder.pid} on ", "--name"):
        lock_folder(tmp_path, pytest.fail)
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path, pytest.fail):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_of_another_machine_is_waited_for(tmp_path, holder, monkeypatch):
    """A file server keeps the locks of a machine that has crashed for a while."""
    said, slept = [], []
    monkeypatch.setattr(w2s.engine.files.socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(w2s.engine.files.time, "monotonic", lambda: 1 + sum(slept))
    monkeypatch.setattr(w2s.engine.files.time, "sleep", slept.append)
    with refused(str(tmp_path), f"process {holder.pid} on "):
        lock_folder(tmp_path, said.append)
    assert 120 < sum(slept) <= 140 and all("waiting for process" in line for line in said)


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    said = []
    monkeypatch.setattr(fcntl, "lockf", none)
    lock_folder(tmp_path, said.append).close()
    assert len(said) == 1 and "No locks available" in said[0]


def test_a_folder_that_cannot_be_written_is_refused_before_it_is_locked(tmp_path):
    (tmp_path / LOCK).mkdir()
    with refused("cannot write", str(tmp_path), "--output"):
        lock_folder(tmp_path, pytest.fail)
