"""Where a run lives, what it decides before it begins, and its randomness."""

import json
import os
import random
from pathlib import Path

import accelerate
import numpy as np
import pytest
import timm.layers
import torch
import yaml
from helpers import on_processes, refused

import w2s.engine.checkpoint
from train_cls import build_parser, resolve
from w2s.engine.checkpoint import plain
from w2s.engine.errors import Finished, InputError
from w2s.engine.files import LOCK
from w2s.engine.launch import default_precision, environment, processor_name
from w2s.engine.run import Run


def on_hardware(
    monkeypatch, launcher: str | None, kind: str, gpu_has_bf16: bool, cpu: dict, use_cpu: str = "no"
) -> None:
    """Let this machine have another accelerator and CPU, and a launcher that has decided on the precision, or not."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind != "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)


AVX512, AMX, AVX2 = {"avx512_bf16": True, "amx_bf16": False}, {"amx_bf16": True}, {"avx2": True, "avx512_bf16": False}


@pytest.mark.parametrize(
    ("kind", "gpu_has_bf16", "cpu", "use_cpu", "expected"),
    [
        ("cuda", True, AVX2, "no", "bf16"),
        ("cuda", False, AVX512, "no", None),
        ("mps", True, AVX512, "no", None),
        ("cpu", True, AVX512, "no", "bf16"),
        ("cpu", True, AMX, "no", "bf16"),
        ("cpu", True, AVX2, "no", None),
        ("cuda", True, AVX2, "true", None),  # what trains is the CPU
        ("cuda", False, AVX512, "true", "bf16"),
    ],
)
def test_bf16_is_the_default_where_the_hardware_has_it(kind, gpu_has_bf16, cpu, use_cpu, expected, monkeypatch):
    on_hardware(monkeypatch, None, kind, gpu_has_bf16, cpu, use_cpu)
    assert default_precision() == expected


@pytest.mark.parametrize("launcher", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_launcher_decides_on_the_precision(launcher, kind, monkeypatch):
    on_hardware(monkeypatch, launcher, kind, True, AVX512)
    assert default_precision() is None


@pytest.mark.parametrize(("cpu", "expected"), [(AVX512, "bf16"), (AVX2, "no")])
def test_a_run_records_the_precision_that_its_cpu_has_by_default(cpu, expected, run_of, monkeypatch):
    on_hardware(monkeypatch, None, "cpu", False, cpu)
    assert environment(run_of().accelerator, earlier=[])["mixed_precision"] == expected
    assert torch.backends.cuda.flash_sdp_enabled() == (expected == "no")  # slow in bf16
    assert timm.layers.use_fused_attn() == (expected == "no")  # likewise


# --- its facts ---


def test_the_environment_names_versions_device_and_commit(accelerator):
    found = environment(accelerator, earlier=[])
    assert json.loads(json.dumps(found)) == found
    assert (found["torch"], found["accelerate"]) == (torch.__version__, accelerate.__version__)
    assert {"cuda", "cudnn", "tf32"} <= set(found)
    assert found["device"] == f"{processor_name()}, {os.cpu_count()} cores"
    assert found["processes"] == 1 and found["mixed_precision"] == "no"
    assert found["git"] is None or len(found["git"]) == 40


def test_a_run_on_a_cpu_names_its_processor_since_seconds_of_two_kinds_cannot_be_compared(monkeypatch):
    lines = "processor\t: 0\nmodel name\t: Xeon 6\nflags\t\t: fpu\n\nprocessor\t: 1\nmodel name\t: Xeon 6\n"
    monkeypatch.setattr(Path, "read_text", lambda path: lines if str(path) == "/proc/cpuinfo" else "")
    assert processor_name() == "Xeon 6"
    monkeypatch.setattr(Path, "read_text", lambda path: "processor\t: 0\n")  # as ARM has it
    monkeypatch.setattr("platform.processor", lambda: "aarch64")
    assert processor_name() == "aarch64"
    monkeypatch.setattr("platform.processor", lambda: "")
    assert processor_name() == "cpu"


def test_the_environment_is_told_where_git_is_not_installed(accelerator, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(accelerator, earlier=[])["git"] is None


def test_options_are_written_as_yaml_and_json_know_them():
    args = build_parser().parse_recipe(["--model-kwargs", "dims=(1, 2)", "--lr", "1e-7", "-c", os.devnull])
    options = plain(vars(args))
    assert yaml.safe_load(yaml.safe_dump(options)) == json.loads(json.dumps(options)) == options
    assert options["model_kwargs"] == {"dims": [1, 2]} and options["lr"] == 1e-7
    assert "config" not in options


# --- its folder ---


def leave_run(folder: Path, status: str = "running", **changes: object) -> None:
    """What a run of the same options has left in its folder."""
    words = f"--dataset digits --model resnet10t --output {folder.parent} --name run".split()
    args = build_parser().parse_recipe(words)
    resolve(args)
    folder.mkdir(parents=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(plain(vars(args)) | changes))
    (folder / "summary.json").write_text(json.dumps({"status": status}))


def test_making_a_run_creates_nothing_on_disk(run_of, tmp_path):
    run_of()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_in_it_is_refused(run_of, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all of it")
    with refused(str(tmp_path / "run"), "--name"):
        run_of()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_used(run_of, tmp_path):
    (tmp_path / "run").mkdir()
    assert run_of().folder == tmp_path / "run"


def test_what_a_kill_left_before_the_options_were_written_is_used(run_of, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (LOCK, "log.txt"):
        (tmp_path / "run" / name).touch()
    assert run_of().state is None
    assert run_of(resume="auto").state is None


def test_a_run_is_not_overwritten(run_of, tmp_path):
    leave_run(tmp_path / "run")
    with refused(str(tmp_path / "run"), "--resume auto"):
        run_of()


def test_a_run_of_other_options_is_not_resumed(run_of, tmp_path):
    leave_run(tmp_path / "run", epochs=7, lr=0.5)
    with refused("--lr", "0.5", "2 options differ"):
        run_of(resume="auto")


def test_options_that_change_no_result_may_change_on_resume(run_of, tmp_path):
    leave_run(tmp_path / "run", workers=9, log_interval=3, checkpoint_hist=7)
    assert run_of(resume="auto").state is None


def test_a_finished_run_is_not_resumed(run_of, tmp_path):
    leave_run(tmp_path / "run", status="finished")
    with pytest.raises(Finished, match="already finished"):
        run_of(resume="auto")


def resumed_on_a_disk_of_its_own(accelerator: accelerate.Accelerator, root: str) -> None:
    w2s.engine.checkpoint.READ_PATIENCE = 0.5
    os.chdir(Path(root) / str(accelerator.process_index))
    command = "--dataset digits --model resnet10t --batch-size 32 --output output --name run --resume auto"
    args = build_parser().parse_recipe(command.split())
    resolve(args)
    Run(args, task="cls")


def test_a_run_is_not_resumed_where_one_process_cannot_read_what_the_main_one_has_chosen(tmp_path):
    """Its machine has a disk of its own, where no run has begun."""
    folder = tmp_path / "0" / "output" / "run"
    leave_run(folder, batch_size=32)
    (folder / "checkpoints" / "update-00000001").mkdir(parents=True)
    state = {"update": 1, "files": {}, "mixed_precision": "no", "sizes": [2], "batch": 64}
    (folder / "checkpoints" / "update-00000001" / "state.json").write_text(json.dumps(state))
    (tmp_path / "1").mkdir()
    for error in on_processes(2, resumed_on_a_disk_of_its_own, str(tmp_path)):
        assert isinstance(error, InputError) and "process 1 on " in str(error)
        assert "update-00000001" in str(error) and "all machines share" in str(error)


def test_a_run_is_not_resumed_in_another_precision_and_the_message_says_how_to_keep_it(run_of, tmp_path):
    leave_run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "update-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"files": {}, "mixed_precision": "bf16"}))
    with refused("bf16", "no", "ACCELERATE_MIXED_PRECISION=bf16", "accelerate launch --mixed_precision bf16"):
        run_of(resume="auto")


@pytest.mark.parametrize("text", ["", "- a\n", "lr: [\n"])
def test_a_run_with_a_broken_args_yaml_is_refused(run_of, tmp_path, text):
    leave_run(tmp_path / "run")
    (tmp_path / "run" / "args.yaml").write_text(text)
    with refused(str(tmp_path / "run")):
        run_of(resume="auto")


@pytest.mark.parametrize("option", ["dry_run", "eval_only"])
def test_a_run_that_keeps_nothing_looks_at_no_folder(run_of, tmp_path, option):
    leave_run(tmp_path / "run", epochs=7)
    assert run_of(**{option: True}).keeps is False


def test_the_clock_of_a_run_waits_for_its_device(run_of, monkeypatch):
    """Of any kind that is not the CPU."""
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(accelerate.Accelerator, "device", torch.device("meta"))
    run_of().clock.start()
    assert waits == [1]


def test_the_randomness_of_an_update_is_a_function_of_seed_update_and_micro_batch(run_of):
    def draw(seed: int, update: int, micro: int = 0) -> tuple:
        run = run_of(seed=seed)
        run.seed_micro_batch(update, micro)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(0, 5) == draw(0, 5)
    for other in (draw(0, 6), draw(1, 5), draw(0, 5, 1)):
        assert all(a != b for a, b in zip(draw(0, 5), other, strict=True))
