"""Sharing a run: the folder and its card, the push to a hub on this machine, and the refusals before a training."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from helpers import DIGITS, RESNET, call_script, read_summary, refused
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train_cls
from w2s.compare.runs import read_run
from w2s.engine.card import METHOD_DEFAULTS
from w2s.engine.sharing import check_hub, share_folder
from w2s.record import BOOKKEEPING_OPTIONS
from w2s.share.__main__ import main

SHARED = {"README.md", "args.yaml", "config.json", "metrics.csv", "model.safetensors", "summary.json"}


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that a push uses. It keeps the files that are committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.role, self.commit_status = "write", 200
        self.files: dict[str, bytes] = {}


class HubRequest(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: dict, status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": self.server.role}}})
        else:
            self.answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            self.answer({"name": f"me/{name}", "url": f"{self.server.address}/me/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path and self.server.commit_status == 200:
            lines = [json.loads(line)["value"] for line in body.splitlines()]
            self.server.files |= {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
            place = f"{self.server.address}/me/shared/commit/{'0' * 40}"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": place, "hookOutput": ""})
        else:
            self.answer({"error": "no space left"}, self.server.commit_status)


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, and someone who is logged in to it."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def taught(tiny_teacher, tmp_path_factory) -> Path:
    """A finished run with a teacher; it reaches one of its targets."""
    output = tmp_path_factory.mktemp("taught")
    phase = "--kd-warmup 0 --kd-off 0.5 --no-kd-fade --kd-balance"
    options = ("--epochs 1 --target 1 99.5 --small-stem --name taught --output", output)
    call_script(train_cls.main, DIGITS, RESNET, phase, "--teacher", tiny_teacher, *options)
    return output / "taught"


def test_a_finished_run_becomes_a_folder_that_others_load(taught):
    folder, summary = share_folder(taught), read_summary(taught)
    assert folder == taught / "hub" and {path.name for path in folder.iterdir()} == SHARED
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    weights = load_file(taught / "model" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    card = ModelCard.load(folder / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value) == ("top1", summary["last"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line[:1] == "|"]
    first = summary["targets"]["1"]["first"]
    assert ["1", "1", "4", "128", f"{first['train_seconds']:.4g}"] in [row[:5] for row in rows]
    assert ["99.5", *["not reached"] * 6] in rows
    assert ["model", "resnet10t"] in rows and ["torch", torch.__version__] in rows
    assert ["silent from", "epoch 0.5, update 2: as --kd-off said"] in rows
    assert ["other options", "`--kd-off 0.5 --no-kd-fade --kd-balance`"] in rows
    assert {row[0] for row in rows} >= {"train seconds", "of these in the teacher", "PFLOPs"}
    for line in ("import w2s.images.models", "train_cls.py -c args.yaml", "Data: digits (", "resnet10t"):
        assert line in card.text

    assert read_run(folder).summary["targets"].keys() == {"1", "99.5"}  # the comparison reads it
    options = yaml.safe_load((folder / "args.yaml").read_text())
    assert options["small_stem"] and not options.keys() & set(BOOKKEEPING_OPTIONS)


def test_a_card_has_a_row_for_each_of_several_teachers(taught, tiny_teacher, tmp_path):
    phase = "--epochs 1 --kd-warmup 0 --kd-off 0.5 --kd-control random"
    parts = ("--teacher", tiny_teacher, taught, "--name two --output", tmp_path)
    call_script(train_cls.main, DIGITS, RESNET, phase, *parts)
    folder = tmp_path / "two"
    text = (share_folder(folder) / "README.md").read_text()
    _, _, first, second, *_ = (line for line in text.split("## Teachers")[1].splitlines() if line[:1] == "|")
    assert first.split(" | ")[4:7] == ["0", "epoch 0.5, update 2: as --kd-off said", "2"]
    assert second.split(" | ")[4:7] == ["0.5", "epoch 1, update 4: as --kd-off said", "2"]
    assert "with `--kd-control random` in the place of a frozen resnet10t and then a " in text
    assert "| in its place (control) | random |" in text
    summary = read_summary(folder) | {"kd_control": None}
    for silent, words in ((1, "taught early in its training by a frozen resnet10t (weak"), (0, "which never taught.")):
        summary["teachers"][silent]["updates"] = 0  # as if the student had passed it before it taught
        (folder / "summary.json").write_text(json.dumps(summary))
        assert words in (share_folder(folder) / "README.md").read_text()


def test_the_card_of_a_run_whose_teacher_never_taught_says_so(taught, tmp_path):
    folder = shutil.copytree(taught, tmp_path / "silent")
    summary = read_summary(folder)
    summary["kd_off"] = {"epoch": 0.0, "update": 0, "reason": "fixed"}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = (share_folder(folder) / "README.md").read_text()
    assert "with a resnet10t as its teacher, which never taught." in text and "taught early" not in text


def test_options_that_a_card_leaves_out_are_the_defaults():
    defaults = vars(train_cls.build_parser().parse_args([]))
    assert {name: defaults[name] for name in METHOD_DEFAULTS} == METHOD_DEFAULTS


def test_a_student_alone_and_a_second_time(tiny_teacher, capsys):
    for _ in range(2):
        assert main([str(tiny_teacher)]) == 0
        assert capsys.readouterr().out == f"{tiny_teacher / 'hub'}\n"
    card = ModelCard.load(tiny_teacher / "hub" / "README.md")
    assert "without a teacher" in card.text and "first@tau" not in card.text
    assert "weak-to-strong" not in card.data.tags


@pytest.mark.parametrize("what", ["no folder", "not finished", "no model"])
def test_what_is_no_finished_run_is_refused(what, tmp_path, taught, capsys):
    folder = tmp_path / "run"
    if what != "no folder":
        folder.mkdir()
        for name in ("args.yaml", "metrics.csv", "summary.json"):
            (folder / name).write_bytes((taught / name).read_bytes())
    if what == "not finished":
        (folder / "summary.json").write_text(json.dumps(read_summary(taught) | {"status": "preempted"}))
    assert main([str(folder)]) == 2
    words = {"no folder": "no run folder", "not finished": "it is preempted", "no model": "no exported model"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words[what] in line
    assert not (folder / "hub").exists()


def test_a_training_pushes_at_its_end(hub, tmp_path):
    options = ("--epochs 1 --push-to-hub shared --name run --output", tmp_path)
    call_script(train_cls.main, DIGITS, RESNET, *options)
    folder = tmp_path / "run"
    assert hub.files.keys() == SHARED
    for name, content in hub.files.items():
        assert (folder / "hub" / name).read_bytes() == content
    assert 'timm.create_model("hf-hub:me/shared", pretrained=True)' in hub.files["README.md"].decode()
    assert f"pushed to {hub.address}/me/shared" in (folder / "log.txt").read_text()


def test_a_push_that_fails_loses_nothing_and_can_be_made_later(hub, tmp_path, capsys):
    hub.commit_status = 403
    options = ("--epochs 1 --push-to-hub shared --name run --output", tmp_path)
    call_script(train_cls.main, DIGITS, RESNET, *options)
    folder = tmp_path / "run"
    assert read_summary(folder)["status"] == "finished" and (folder / "model").is_dir() and not hub.files
    last = (folder / "log.txt").read_text().splitlines()[-1]
    assert last.startswith("warning: cannot push")
    assert last.endswith(f"push it later: python -m w2s.share {folder} --repo shared")

    command = last.split("python -m w2s.share ")[1].split()
    capsys.readouterr()
    assert main(command) == 2 and capsys.readouterr().err.count("\n") == 1
    hub.commit_status = 200
    assert main(command) == 0 and capsys.readouterr().out == f"{hub.address}/me/shared\n"
    assert hub.files.keys() == SHARED


def test_a_hub_that_would_refuse_at_the_end_refuses_before_the_training(hub, tmp_path, monkeypatch):
    options = (DIGITS, RESNET, "--name run --output", tmp_path, "--push-to-hub")
    with refused("--push-to-hub a/b/c", "'a/b/c'"):
        call_script(train_cls.main, *options, "a/b/c")
    hub.role = "read"
    with refused("--push-to-hub me/shared", "may only read"):
        call_script(train_cls.main, *options, "me/shared")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with refused("--push-to-hub me/shared", "cannot log in to the hub"):
        call_script(train_cls.main, *options, "me/shared")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with refused("--push-to-hub me/shared", "not logged in", "hf auth login"):
        call_script(train_cls.main, *options, "me/shared")
    assert list(tmp_path.iterdir()) == []


def test_a_process_beside_the_first_does_not_ask_the_hub(hub, monkeypatch):
    hub.role = "read"
    monkeypatch.setenv("RANK", "1")
    check_hub("me/shared", option="--push-to-hub")
