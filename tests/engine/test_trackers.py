"""Trackers before a run begins. What they are told is tested with the scripts."""

from pathlib import Path

import pytest
import wandb
from helpers import refused

from w2s.engine.trackers import check_trackers

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
    assert check_trackers("wandb") == ["wandb"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "machine elsewhere.org login user password secret", "no netrc file"])
def test_without_a_key_for_its_server_wandb_is_refused(nobody, text, capfd):
    (nobody / ".netrc").write_text(text)
    with refused("no API key", "WANDB_MODE=offline"):
        check_trackers("wandb")
    assert capfd.readouterr() == ("", "")


def test_settings_that_wandb_does_not_take_hide_no_key(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    with refused("no API key"):
        check_trackers("wandb")
    (nobody / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}")
    assert check_trackers("wandb") == ["wandb"]


def test_offline_wandb_needs_no_key(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check_trackers("wandb") == ["wandb"]
