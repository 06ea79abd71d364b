"""A comparison as a W&B run of its own, and the refusals before any work is done."""

import pytest
import wandb
from compare.folders import check_refused, command, result_of
from compare.wandb_files import complete_records

from w2s.compare.__main__ import main


def test_the_comparison_is_logged_as_a_run_of_its_own(tmp_path, arms, drawing):
    result_of(tmp_path, *arms, "--log-with", "wandb", "--group", "digits-group")
    (path,) = (tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb")
    complete_records(path)
    logged = path.read_bytes()
    for text in (b"speedup@60/treated/epoch", b"digits-group", b"curves", b"report", b"speedups"):
        assert text in logged


def test_wandb_that_is_not_installed_is_refused(tmp_path, arms, capsys, monkeypatch):
    monkeypatch.setattr("w2s.compare.wandb_run.importlib.util.find_spec", lambda name: None)
    words = command(*arms, tmp_path / "out", "--log-with", "wandb")
    check_refused(tmp_path, capsys, words, "--log-with wandb: not installed; pip install wandb")


@pytest.fixture
def without_credentials(tmp_path, monkeypatch):
    """The environment of someone who has not logged in to W&B and has no terminal."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    wandb.teardown()
    yield
    wandb.teardown()


def test_wandb_without_credentials_is_refused(tmp_path, arms, capsys, without_credentials):
    words = command(*arms, tmp_path / "out", "--log-with", "wandb")
    check_refused(tmp_path, capsys, words, "--log-with wandb: No API key configured", "WANDB_MODE=offline")


def test_what_wandb_refuses_later_is_one_line_beside_whole_files(tmp_path, arms, capsys, monkeypatch):
    def refuse(**_: object) -> None:
        raise wandb.errors.CommError("no such\nserver")

    monkeypatch.setattr(wandb, "init", refuse)
    assert main(command(*arms, tmp_path / "out", "--log-with", "wandb")) == 2
    assert capsys.readouterr().err == "error: --log-with wandb: no such server (WANDB_MODE=offline needs no account)\n"
    assert (tmp_path / "out" / "speedup.json").exists()
