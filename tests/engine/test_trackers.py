"""Trackers before a run begins, and trackio; what TensorBoard and W&B are told is tested with the scripts."""

import contextlib
import os
import signal
import sqlite3
from pathlib import Path

import pytest
import wandb
from accelerate.tracking import get_available_trackers
from helpers import DIGITS, RESNET, call_script, on_processes, read_rows, refused, start_script, words

import train_cls
from w2s.engine.errors import InputError
from w2s.engine.run import Run
from w2s.engine.trackers import TRACKERS, check_login, check_trackers

KEY = "0123456789" * 4


@pytest.fixture
def nobody(tmp_path, monkeypatch) -> Path:
    """The home of someone who has not logged in to W&B."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


@pytest.mark.parametrize("place", ["WANDB_API_KEY", "~/.netrc", "~/_netrc", "NETRC", "own server"])
def test_a_key_of_wandb_is_found_wherever_it_may_be_without_a_word(nobody, monkeypatch, capfd, place):
    host, path = "api.wandb.ai", nobody / ".netrc"
    if place == "WANDB_API_KEY":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    if place == "NETRC":
        path = nobody / "elsewhere"
        monkeypatch.setenv("NETRC", str(path))
    if place == "~/_netrc":
        path = nobody / "_netrc"
    if place == "own server":
        host = "wandb.example.org:8080"
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
    if place != "WANDB_API_KEY":
        path.write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    check_login(["wandb"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "machine elsewhere.org login user password secret", "no netrc file"])
def test_without_a_key_for_its_server_wandb_is_refused(nobody, text, capfd):
    (nobody / ".netrc").write_text(text)
    with refused("no API key", "WANDB_MODE=offline"):
        check_login(["wandb"])
    assert capfd.readouterr() == ("", "")


def test_settings_that_wandb_does_not_take_hide_no_key(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    with refused("no API key"):
        check_login(["wandb"])
    (nobody / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}")
    check_login(["wandb"])


def test_offline_wandb_needs_no_key(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_login(["wandb"])


def test_trackers_are_named_by_one_or_several_or_all_and_must_be_installed(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check_trackers(None) is None
    assert check_trackers(["tensorboard", "wandb", "tensorboard"]) == ["tensorboard", "wandb"]
    assert {"tensorboard", "wandb"} <= set(check_trackers(["all"])) <= set(TRACKERS)
    installed = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in TRACKERS if name not in installed]
    assert missing  # nobody has them all
    for name in missing:
        with refused(f"--log-with {name}: not installed; pip install {name}"):
            check_trackers(["tensorboard", name])


def test_trackio_gets_every_evaluation_and_goes_on_after_a_resume(tmp_path):
    pytest.importorskip("trackio")
    options = "--recovery-interval 3 --evals-per-epoch 2 --log-with trackio tensorboard --name run --output"
    command = words(DIGITS, RESNET, options, tmp_path)
    env = {"TRACKIO_DIR": tmp_path / "trackio"}
    process = start_script("train_cls", tmp_path / "log", command, env=env)
    folder = tmp_path / "run"
    assert process.wait_for((folder / "checkpoints" / "update-00000003").exists), process.text
    process.kill(signal.SIGTERM)
    assert process.wait() == [75], process.text
    process = start_script("train_cls", tmp_path / "log", command, "--resume auto", env=env)
    assert process.wait() == [0], process.text
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "w2s.db")) as database:
        logged = database.execute("select run_name, step from metrics order by step").fetchall()
    assert logged == [("run", int(row["update"])) for row in read_rows(folder)] and len(logged) == 4
    assert list(folder.glob("tensorboard/**/events*"))


def test_a_tracker_that_refuses_leaves_no_run_behind(tmp_path, monkeypatch):
    def refuse(**_: object) -> None:
        raise wandb.errors.CommError("no such server\nsomewhere")

    monkeypatch.setattr(wandb, "init", refuse)
    with refused("--log-with wandb: no such server;", "WANDB_MODE=offline"):
        call_script(train_cls.main, DIGITS, RESNET, "--log-with wandb --name run --output", tmp_path)
    assert list(tmp_path.iterdir()) == []


def named_by_wandb(accelerator, folder: str, rank_with_key: int) -> str:
    """Begin a run that W&B follows, where one process alone has a key."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        os.environ.pop(name, None)
    os.environ["HOME"] = os.environ["WANDB_CONFIG_DIR"] = folder
    if accelerator.process_index == rank_with_key:
        os.environ["WANDB_API_KEY"] = KEY
    args = train_cls.build_parser().parse_recipe(["--model", "resnet10t", "--log-with", "wandb", "--output", folder])
    args.name = "run"
    return Run(args, task="cls").name


def test_a_key_of_wandb_is_asked_of_the_main_process_alone(tmp_path):
    assert on_processes(2, named_by_wandb, str(tmp_path), 0) == ["run", "run"]
    for error in on_processes(2, named_by_wandb, str(tmp_path), 1):
        assert isinstance(error, InputError) and "no API key" in str(error)
