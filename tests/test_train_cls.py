"""train_cls.py from its command line to what it leaves: real runs of tiny models on the digits, nothing mocked."""

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import struct
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.task
import torch
import yaml
from accelerate import Accelerator, PartialState
from helpers import (
    DIGITS,
    FOLDER,
    RESNET,
    TIMEOUT,
    VIT,
    call_script,
    checkpoint_tensors,
    image_folder,
    read_rows,
    read_summary,
    refused,
    run_script,
    signal_in_evaluation,
    start_script,
    timeless,
    under_a_scaler,
    watching_forwards,
    weights_of,
    words,
)
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

import train_cls
from w2s.compare import __main__ as compare
from w2s.engine.errors import Finished, NonFiniteLoss, Preempted
from w2s.engine.loading import EpochBatches
from w2s.engine.main import call_main
from w2s.engine.tensors import tensor_names
from w2s.images.data import load_data
from w2s.images.digits import Digits
from w2s.images.models import create_model, export

HEADER = (
    "epoch,update,samples,train_seconds,total_seconds,teacher_seconds,pflops,lr,kd_weight,kd_temperature,kd_active,"
    "train_loss,task_loss,kd_loss,top1,top5,eval_loss,switch_top1\n"
)
# all randomness of training at once, and all state
EVERYTHING = (
    "--model-ema --model-ema-decay 0.9 --drop 0.2 --drop-path 0.1 --mixup 0.2 --cutmix 0.5 --reprob 0.3 --clip-grad 1 "
    "--grad-accum-steps 2 --batch-size 16"
)


def run(output: Path, name: str, *parts: object) -> Path:
    """A run of the ResNet in this process (a model named in `parts` wins); its folder."""
    call_script(train_cls.main, DIGITS, RESNET, *parts, "--output", output, "--name", name)
    return output / name


def snapshot(folder: Path) -> dict:
    """Every file under a folder with its bytes and its time, but for the lock, which whoever looks takes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".w2s.lock"]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def assert_same_run(run: Path, other: Path) -> None:
    """Equal to the last bit in all that does not measure time."""
    assert timeless(run) == timeless(other)
    for part in ("model", "best"):
        assert weights_of(run, part) == weights_of(other, part), part
    ours, theirs = read_summary(run), read_summary(other)
    for key in ("status", "best", "last", "kd_off", "flops", "params", "data"):
        assert ours[key] == theirs[key], key


def timm_logits(folder: Path, images: list[Image.Image]) -> torch.Tensor:
    """What timm alone makes of an exported model and the data config inside it."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        return model(torch.stack([transform(image.convert("RGB")) for image in images]))


def timm_top1(folder: Path) -> float:
    """Its accuracy on the 597 test digits, in percent."""
    digits = Digits("test")
    hits = timm_logits(folder, [image for image, _ in digits]).argmax(1).numpy() == digits.targets
    return 100 * hits.sum() / 597


@contextlib.contextmanager
def forwards():
    """The forwards of whole models while it lasts: (parameters, in training, digest of the input), in order."""
    seen = []

    def see(module: torch.nn.Module, inputs: tuple) -> None:
        if hasattr(module, "pretrained_cfg") and inputs[0].device.type != "meta":  # the FLOPs are counted on meta
            digest = hashlib.sha256(inputs[0].contiguous().numpy().tobytes()).hexdigest()
            seen.append((sum(p.numel() for p in module.parameters()), module.training, digest))

    with watching_forwards(see):
        yield seen


def trained_on(seen: list) -> list[str]:
    """The digests of the batches that the student trained on."""
    return [digest for _, training, digest in seen if training]


@contextlib.contextmanager
def signal_in_update(update: int, micro_batches: int = 1, number: int = signal.SIGTERM):
    """A real signal in the middle of an update, counted from 0 and from the start of this process."""
    count = 0

    def see(module: torch.nn.Module, inputs: tuple) -> None:
        nonlocal count
        if hasattr(module, "pretrained_cfg") and module.training and inputs[0].device.type != "meta":
            if count == update * micro_batches:
                signal.raise_signal(number)
            count += 1

    with watching_forwards(see):
        yield


def preempted_run(update: int, output: Path, name: str, *parts: object) -> Path:
    """A run that a SIGTERM ends during `update`: saved with one more update done."""
    micro_batches = 2 if "--grad-accum-steps" in words(*parts) else 1
    with signal_in_update(update, micro_batches), pytest.raises(Preempted, match="--resume auto"):
        run(output, name, *parts)
    assert read_summary(output / name)["status"] == "preempted"
    return output / name


# ---- a baseline's run folder ----


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> tuple[Path, list]:
    """A finished run without a teacher, evaluated twice an epoch, and its forwards."""
    with forwards() as seen:
        folder = run(tmp_path_factory.mktemp("baseline"), "baseline", "--evals-per-epoch 2 --target top1=0.5 99.5")
    return folder, seen


def test_baseline_args_yaml_holds_every_resolved_option(baseline):
    options = yaml.safe_load((baseline[0] / "args.yaml").read_text())
    assert set(options) == set(vars(train_cls.build_parser().parse_args([]))) - {"config"}
    assert options["model_kwargs"] == {"channels": [8, 8, 16, 16], "stem_width": 8}
    assert (options["lr"], options["batch_size"], options["seed"], options["name"]) == (3e-3, 32, 0, "baseline")
    assert (options["val_split"], options["hflip"], options["mean"]) == ("test", 0.0, [0.5] * 3)  # the digits' own


def test_baseline_metrics_csv(baseline):
    folder = baseline[0]
    assert (folder / "metrics.csv").read_text().startswith(HEADER)
    rows = read_rows(folder)
    assert [float(row["epoch"]) for row in rows] == [0.5, 1.0, 1.5, 2.0]
    assert [int(row["update"]) for row in rows] == [2, 4, 6, 8]
    assert [int(row["samples"]) for row in rows] == [64, 128, 192, 256]
    update_flops = read_summary(folder)["flops"]["student_update"]
    assert [float(row["pflops"]) for row in rows] == pytest.approx([n * update_flops / 1e15 for n in (2, 4, 6, 8)])
    cosine = [3e-3 * (1 + math.cos(math.pi * (n - 1) / 8)) / 2 for n in (2, 4, 6, 8)]  # of the update just done
    assert [float(row["lr"]) for row in rows] == pytest.approx(cosine)
    for column in ("train_seconds", "total_seconds"):
        seconds = [float(row[column]) for row in rows]
        assert seconds == sorted(seconds) and seconds[-1] > 0
    for row in rows:
        assert (row["kd_weight"], row["kd_active"], row["teacher_seconds"]) == ("0.0", "0", "0.0")
        assert row["kd_temperature"] == row["kd_loss"] == row["switch_top1"] == ""
        assert row["train_loss"] == row["task_loss"]
        assert float(row["train_seconds"]) < float(row["total_seconds"])
        assert 0 <= float(row["top1"]) <= float(row["top5"]) <= 100
        for column in ("top1", "top5"):  # a count of the 597 test images
            assert float(row[column]) * 5.97 == pytest.approx(round(float(row[column]) * 5.97))


def test_baseline_summary_json(baseline):
    folder = baseline[0]
    summary, rows = read_summary(folder), read_rows(folder)
    assert {"task", "name", "status", "metric", "mode", "best", "last", "targets", "seed"} <= set(summary)
    assert {"teacher", "kd_off", "flops", "params", "environment"} <= set(summary)
    assert (summary["task"], summary["name"], summary["status"]) == ("cls", "baseline", "finished")
    assert (summary["metric"], summary["mode"], summary["seed"]) == ("top1", "max", 0)
    assert summary["teacher"] is None and summary["kd_off"] is None
    assert summary["last"] == float(rows[-1]["top1"])
    assert summary["best"] == max(float(row["top1"]) for row in rows)
    assert set(summary["targets"]) == {"0.5", "99.5"}
    axes = ("epoch", "update", "samples", "train_seconds", "total_seconds", "pflops")
    expected = {"value": float(rows[0]["top1"]), **{axis: float(rows[0][axis]) for axis in axes}}
    assert summary["targets"]["0.5"] == {"first": expected, "confirmed": expected}
    assert summary["targets"]["99.5"] == {"first": None, "confirmed": None}
    assert {"torch", "timm", "accelerate", "device", "processes", "git"} <= set(summary["environment"])
    assert summary["environment"]["processes"] == 1
    model = timm.create_model("resnet10t", num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    assert summary["params"] == sum(p.numel() for p in model.parameters())


def test_the_first_lines_say_what_will_happen(baseline):
    first, data, targets, *_ = (baseline[0] / "log.txt").read_text().splitlines()
    assert first.startswith("baseline: resnet10t (0.0") and " on cpu in float32; adamw lr 0.003 cosine; " in first
    assert first.endswith("8 updates of 32 images, 4 an epoch")
    assert data == (
        "data: 128 images to train on, 20 held out for the switch-off, 597 to report on; the raw weights are evaluated"
    )
    assert targets.startswith("first@tau of top1 at 0.5, 99.5; PFLOPs an update: student ") and "teacher" not in targets


def test_baseline_files(baseline):
    folder = baseline[0]
    assert checkpoints(folder) == ["update-00000006", "update-00000008"]  # the newest two
    files = {"state.json", "__0_0.distcp", ".metadata", "rest.pt"}
    assert {path.name for path in (folder / "checkpoints" / "update-00000008").iterdir()} == files
    top = {".w2s.lock", "args.yaml", "log.txt", "metrics.csv", "summary.json", "checkpoints", "best", "model"}
    assert {path.name for path in folder.iterdir()} == top
    assert "done: top1" in (folder / "log.txt").read_text()


def test_a_student_at_chance_level_is_warned_of_with_what_to_lower(baseline):
    """Eight updates leave it there; what is at chance level is tested in images/test_chance.py."""
    assert float(read_rows(baseline[0])[-1]["eval_loss"]) > math.log(10)
    lines = (baseline[0] / "log.txt").read_text().splitlines()
    (*_, line) = [line for line in lines if line.startswith("warning: ")]
    assert "chance level" in line and "lower --lr, or" in line
    first, second = [i for i, line in enumerate(lines) if line.startswith("epoch ") and ", eval_loss " in line][:2]
    assert not any("chance level" in line for line in lines[first:second])  # it may hardly have begun to learn


def test_baseline_exports_give_the_reported_top1_through_timm_alone(baseline):
    folder = baseline[0]
    rows = [float(row["top1"]) for row in read_rows(folder)]
    assert timm_top1(folder / "model") == pytest.approx(rows[-1])
    assert timm_top1(folder / "best") == pytest.approx(max(rows))


# ---- with a teacher ----

PHASE = "--kd-weight 2 --kd-warmup 0.5 --kd-hold 0.5 --kd-decay 0.5 --kd-temperature 4 2 --no-kd-fade"


@pytest.fixture(scope="module")
def treated(tmp_path_factory, tiny_teacher) -> tuple[Path, list]:
    """A run whose distillation ends with its window, evaluated after every update, and its forwards."""
    with forwards() as seen:
        folder = run(
            tmp_path_factory.mktemp("treated"),
            "treated",
            PHASE,
            "--kd-patience 99 --evals-per-epoch 4 --checkpoint-hist 9 --teacher",
            tiny_teacher,
        )
    return folder, seen


def test_lambda_and_temperature_follow_the_schedule(treated):
    rows = read_rows(treated[0])
    assert [float(row["epoch"]) for row in rows] == [0.25 * k for k in range(1, 9)]
    for row in rows:
        u = float(row["epoch"])
        assert float(row["kd_weight"]) == pytest.approx(np.interp(u, [0, 0.5, 1, 1.5], [0, 2, 2, 0]))
        if u < 1.5:
            assert row["kd_active"] == "1"
            assert float(row["kd_temperature"]) == pytest.approx(4 - 2 * u / 1.5)
            assert float(row["switch_top1"]) % 5 == pytest.approx(0)  # 20 images
        if u > 1.5:
            assert row["kd_active"] == "0" and row["switch_top1"] == ""


def test_lambda_fades_with_the_lead_unless_told_not_to(tmp_path, tiny_teacher):
    options = "--epochs 5 --kd-weight 2 --kd-warmup 0 --kd-hold 5 --kd-decay 0 --teacher-score 100 --teacher"
    rows = read_rows(run(tmp_path, "faded", QUICK, options, tiny_teacher))[:-1]  # the window ends with the last row
    leads, left = [100 - float(row["switch_top1"]) for row in rows], [1.0]
    for k, row in enumerate(rows):  # a row has the weight up to its evaluation
        assert float(row["kd_weight"]) == pytest.approx(2 * min(left))
        left.append(np.mean(leads[max(k - 1, 0) : k + 1]) / leads[0])
    assert min(left[:-1]) < 1


def test_losses_add_up_with_the_weight_of_their_update(treated):
    for k, row in enumerate(read_rows(treated[0])):  # one update a row
        weight = np.interp(k / 4, [0, 0.5, 1, 1.5], [0, 2, 2, 0])
        assert (row["kd_loss"] != "") == (weight > 0)
        total = float(row["task_loss"]) + weight * float(row["kd_loss"] or 0)
        assert float(row["train_loss"]) == pytest.approx(total, rel=1e-5)
    assert float(read_rows(treated[0])[2]["kd_loss"]) > 0


def test_the_end_of_the_window_is_recorded(treated):
    summary = read_summary(treated[0])
    assert summary["kd_off"] == {"epoch": 1.5, "update": 6, "reason": "window"}
    rows, flops = read_rows(treated[0]), summary["flops"]
    taught = 5  # updates with lambda > 0: all but the first, until the window ends before the seventh
    total = 8 * flops["student_update"] + taught * flops["teacher_forward"]
    assert float(rows[-1]["pflops"]) == pytest.approx(total / 1e15)
    assert flops["student_update"] > flops["teacher_forward"] > 0
    seconds = [float(row["teacher_seconds"]) for row in rows]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < float(rows[-1]["train_seconds"])


def test_the_teacher_is_scored_first_and_called_only_while_lambda_is_above_zero(treated, tiny_teacher):
    seen, summary = treated[1], read_summary(treated[0])
    params = summary["teacher"]["params"]
    assert params != summary["params"]
    is_teacher = [size == params for size, _, _ in seen]
    first_training = next(i for i, (_, training, _) in enumerate(seen) if training)
    scoring = math.ceil(597 / 32) + 1  # both splits in batches of 32
    assert is_teacher[:first_training] == [True] * scoring
    assert not any(training for (_, training, _), teacher in zip(seen, is_teacher, strict=True) if teacher)
    taught = [digest for (_, _, digest), teacher in zip(seen, is_teacher, strict=True) if teacher][scoring:]
    assert taught == trained_on(seen)[1:6]  # the same pixels as the student


def test_the_teachers_scores_are_those_of_its_export(treated, tiny_teacher):
    facts = read_summary(treated[0])["teacher"]
    assert set(facts) == {"model", "switch", "report", "params", "checkpoint"}
    assert facts["model"] == "resnet10t" and Path(facts["checkpoint"]) == tiny_teacher / "model"
    assert facts["report"] == read_summary(tiny_teacher)["last"]
    args = train_cls.build_parser().parse_recipe(words(DIGITS, RESNET))
    held_out = load_data(args, train_cls.resolve(args), Accelerator(), cache=args.cache).switch
    assert np.bincount(held_out.dataset.targets[held_out.rows]).tolist() == [2] * 10
    logits = timm_logits(tiny_teacher / "model", [held_out.dataset[i][0] for i in held_out.rows])
    hits = logits.argmax(1).numpy() == held_out.dataset.targets[held_out.rows]
    assert facts["switch"] == pytest.approx(100 * hits.mean())


def test_an_image_classifier_of_transformers_teaches_the_classes_it_knows(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    names = ["7", "2", "5", "eleven", "0"]
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        id2label=dict(enumerate(names)),
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    size = {"height": 8, "width": 8}
    processor = transformers.ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(tmp_path / "vit")
    options = (PHASE, "--kd-patience 99 --epochs 1 --img-size 8 --kd-warmup 0 --teacher", tmp_path / "vit")
    with refused("only 4 of their names agree", "--teacher-classes"):
        run(tmp_path, "refused", *options)
    (tmp_path / "map.txt").write_text("0\n-\n2\n-\n-\n5\n-\n7\n-\n-\n")
    folder = run(tmp_path, "taught", *options, "--teacher-classes", tmp_path / "map.txt")
    digits = Digits("test")
    student = timm.create_model(f"local-dir:{folder / 'model'}")
    transform = create_transform(**resolve_model_data_config(student), is_training=False)
    pixels = torch.stack([transform(image.convert("RGB")) for image, _ in digits]) / 2 + 0.5
    with torch.no_grad():
        logits = model((pixels - 0.4) / 0.3).logits[:, [4, 1, 2, 0]]  # 0, 2, 5, 7
    hits = torch.tensor([0, 2, 5, 7])[logits.argmax(1)].numpy() == digits.targets
    facts, rows = read_summary(folder)["teacher"], read_rows(folder)
    assert facts["report"] == pytest.approx(100 * hits.sum() / 597)  # over all images, also those of other classes
    assert facts["model"] == "vit" and facts["checkpoint"] == str(tmp_path / "vit")
    assert "the teacher knows 4 of the 10 classes" in (folder / "log.txt").read_text()
    assert 0 < float(rows[-1]["kd_loss"]) < math.inf


def test_a_run_teaches_data_of_some_of_its_classes(tiny_teacher, tmp_path):
    assert timm.create_model(f"local-dir:{tiny_teacher / 'model'}").pretrained_cfg["label_names"] == list("0123456789")
    data = tmp_path / "data"
    image_folder(data)
    for split in ("train", "val"):
        (data / split / "class0").rename(data / split / "7")
        (data / split / "class1").rename(data / split / "3")
    call_script(train_cls.main, FOLDER, data, RESNET, "--teacher", tiny_teacher, "--name some --output", tmp_path)
    assert "the teacher knows 2 of the 2 classes, matched by name" in (tmp_path / "some" / "log.txt").read_text()


def test_the_teacher_is_in_no_file_of_the_student(treated, baseline):
    plain = load_file(baseline[0] / "model" / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in plain.items()}
    folder = treated[0]
    for path in [folder / "model", folder / "best", *(folder / "checkpoints").iterdir()]:
        exported = path.parent == folder
        tensors = load_file(path / "model.safetensors") if exported else checkpoint_tensors(path)
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
        assert exported or {name.partition(".")[0] for name in tensor_names(path)} == {"student", "optimizer"}
    states = {
        name.split(".")[1] for name in checkpoint_tensors(folder / "checkpoints" / "update-00000004", "optimizer")
    }
    assert len(states) == len(list(timm.create_model(f"local-dir:{folder / 'model'}").parameters()))


SURPASS = (  # a bar so low that every evaluation is won: off at the second one
    "--switch-split 0.1 --teacher-score 1 --kd-weight 2 --kd-warmup 0 --kd-hold 2 --kd-decay 0 --kd-patience 2 "
    "--evals-per-epoch 2"
)


@pytest.fixture(scope="module")
def surpassed(tmp_path_factory, tiny_teacher) -> tuple[Path, list, Path]:
    """A run that switched its teacher off at epoch 1, its forwards, and its own copy of the teacher."""
    output = tmp_path_factory.mktemp("surpassed")
    teacher = shutil.copytree(tiny_teacher, output / "own-teacher")
    with forwards() as seen:
        folder = run(output, "surpassed", SURPASS, "--teacher", teacher)
    return folder, seen, teacher


def test_surpass_switches_off_for_good(surpassed):
    folder, seen, _ = surpassed
    summary, rows = read_summary(folder), read_rows(folder)
    assert summary["kd_off"] == {"epoch": 1.0, "update": 4, "reason": "surpass"}
    assert summary["teacher"]["switch"] == 1.0
    assert [row["kd_active"] for row in rows] == ["1", "0", "0", "0"]
    assert [row["kd_weight"] for row in rows[2:]] == ["0.0", "0.0"]
    assert [row["kd_loss"] != "" for row in rows] == [True, True, False, False]
    assert [row["switch_top1"] != "" for row in rows] == [True, True, False, False]
    assert "off for good at epoch 1, update 4 (surpass)" in (folder / "log.txt").read_text()
    fifth = [i for i, (_, training, _) in enumerate(seen) if training][4]
    assert summary["teacher"]["params"] in {size for size, _, _ in seen[:fifth]}
    assert {size for size, _, _ in seen[fifth:]} == {summary["params"]}


def test_running_scores_switch_off_without_a_switch_split(tmp_path, tiny_teacher):
    """An untrained teacher is passed by a student that learns, at the second evaluation that shows it."""
    weak = run(tmp_path, "weak", "--epochs 1 --lr 1e-9")
    options = "--epochs 8 --kd-off running --kd-hold 7 --kd-warmup 0 --kd-decay 1 --kd-weight 0.1 --switch-split 0"
    folder = run(tmp_path, "taught", options, "--no-kd-fade --teacher", weak)
    summary, rows, log = read_summary(folder), read_rows(folder), (folder / "log.txt").read_text()
    assert summary["teacher"]["switch"] is None and summary["teacher"]["report"] == read_summary(weak)["last"]
    scores = [tuple(map(float, pair)) for pair in re.findall(r"; in training (\S+), teacher (\S+)", log)]
    assert summary["kd_off"]["reason"] == "surpass" and len(scores) == summary["kd_off"]["epoch"]
    assert all(student > teacher for student, teacher in scores[-2:])
    assert {row["switch_top1"] for row in rows} == {""}
    assert "off (running): 2 evaluations in a row better than the teacher in training" in log


def test_a_switch_off_survives_a_resume_without_the_teachers_files(surpassed):
    whole, seen, teacher = surpassed
    command = (whole.parent, "again", SURPASS, "--teacher", teacher)
    folder = preempted_run(5, *command)
    assert read_summary(folder)["kd_off"] == {"epoch": 1.0, "update": 4, "reason": "surpass"}
    shutil.rmtree(teacher)
    with forwards() as after:
        run(*command, "--resume auto")
    assert {size for size, _, _ in after} == {read_summary(folder)["params"]}
    assert trained_on(after) == trained_on(seen)[6:]
    assert read_summary(folder)["teacher"] == read_summary(whole)["teacher"]
    assert_same_run(folder, whole)


def test_while_distilling_a_resume_needs_the_teacher(tmp_path, tiny_teacher):
    teacher = shutil.copytree(tiny_teacher, tmp_path / "own-teacher")
    folder = preempted_run(1, tmp_path, "run", PHASE, "--teacher", teacher)
    shutil.rmtree(teacher)
    before = snapshot(folder)
    message = refusal(DIGITS, RESNET, PHASE, "--teacher", teacher, "--resume auto --name run --output", tmp_path)
    assert str(teacher) in message
    assert snapshot(folder) == before


def test_kd_weight_zero_is_bit_equal_to_no_teacher(tmp_path, tiny_teacher, baseline):
    plain, seen = baseline
    with forwards() as mine:
        options = "--evals-per-epoch 2 --target top1=0.5 99.5 --kd-weight 0 --kd-patience 99 --teacher"
        folder = run(tmp_path, "zero", options, tiny_teacher)
    params = read_summary(folder)["teacher"]["params"]
    first_training = next(i for i, (_, training, _) in enumerate(mine) if training)
    assert params in {size for size, _, _ in mine[:first_training]}  # it was scored
    assert params not in {size for size, _, _ in mine[first_training:]}
    assert trained_on(mine) == trained_on(seen)
    assert weights_of(folder) == weights_of(plain)
    for row, other in zip(timeless(folder), timeless(plain), strict=True):
        differ = {column for column in row if row[column] != other[column]}
        assert differ <= {"kd_active", "kd_temperature", "switch_top1"}


def test_both_arms_see_the_same_batches(treated, baseline):
    assert trained_on(treated[1]) == trained_on(baseline[1])
    assert len(set(trained_on(baseline[1]))) == 8
    assert weights_of(treated[0]) != weights_of(baseline[0])


def test_both_arms_see_the_same_mixed_and_erased_images(tmp_path, tiny_teacher):
    batches = []
    for name, arm in (("b", []), ("t", ["--kd-warmup", "0", "--teacher", tiny_teacher])):
        with forwards() as seen:
            run(tmp_path, name, EVERYTHING, "--epochs 1", arm)
        batches.append(trained_on(seen))
    assert len(set(batches[0])) == 8 and batches[0] == batches[1]


def test_one_step_is_timms_logit_distillation(tmp_path, tiny_teacher):
    """The first update of SGD against timm.task.LogitDistillationTask on the same batch: the same weights after it."""
    before, batch = {}, []

    def see(module: torch.nn.Module, inputs: tuple) -> None:
        if hasattr(module, "pretrained_cfg") and module.training and inputs[0].device.type != "meta":
            before.update({k: v.clone() for k, v in module.state_dict().items()})
            batch.append(inputs[0].clone())

    command = "--train-samples 32 --epochs 1 --opt momentum --weight-decay 0 --lr 0.1 --no-aug --smoothing 0.1"
    phase = "--kd-weight 1 --kd-warmup 0 --kd-hold 1 --kd-decay 0 --kd-temperature 4 4"
    with watching_forwards(see):
        folder = run(tmp_path, "step", command, phase, "--teacher", tiny_teacher)
    assert len(batch) == 1
    # the labels, found by the pixels: without augmentation an image is what the evaluation transform makes of it
    digits = Digits("train")
    student = timm.create_model(f"local-dir:{folder / 'model'}").train()
    transform = create_transform(**resolve_model_data_config(student), is_training=False)
    labels = {transform(image.convert("RGB")).numpy().tobytes(): target for image, target in digits}
    targets = torch.tensor([labels[image.numpy().tobytes()] for image in batch[0]])

    student.load_state_dict(before)
    teacher = timm.create_model(f"local-dir:{tiny_teacher / 'model'}", pretrained=True)
    task = timm.task.LogitDistillationTask(
        student, teacher, timm.loss.LabelSmoothingCrossEntropy(0.1), distill_loss_weight=1.0, task_loss_weight=1.0,
        temperature=4.0, device=torch.device("cpu"), verbose=False,
    )  # fmt: skip
    task.train()
    loss = task(batch[0], targets)["loss"]
    loss.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 0.1 * parameter.grad
    row, after = read_rows(folder)[0], load_file(folder / "model" / "model.safetensors")
    assert float(row["train_loss"]) == pytest.approx(loss.item(), rel=1e-6)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


# ---- interrupted and resumed ----


@pytest.mark.parametrize("kind", ["baseline", "everything"])
def test_killed_again_and_again_it_ends_in_the_same_bits(kind, tmp_path, tiny_teacher):
    more = [EVERYTHING, PHASE, "--kd-balance --kd-off running --teacher", tiny_teacher] if kind == "everything" else []
    command = words(*more, "--epochs 4 --recovery-interval 3")
    whole = run(tmp_path, "whole", command)
    log, folder = tmp_path / "killed.log", tmp_path / "killed"

    def start():
        return start_script(
            "train_cls", log, DIGITS, RESNET, command, "--workers 1 --resume auto --name killed --output", tmp_path
        )

    chance = random.Random(kind)
    newest = []
    for kill in range(4):
        known = set(checkpoints(folder))

        def another_checkpoint(known=known):
            return any(name.startswith("update-") and name not in known for name in checkpoints(folder))

        process = start()
        assert process.wait_for(another_checkpoint if kill else folder.exists), process.text
        time.sleep(chance.uniform(0, 0.2) if kill else 0)
        process.kill()
        assert process.wait() == [-signal.SIGKILL], process.text
        assert not kill or read_summary(folder)["status"] == "running"
        newest.append(max((c for c in checkpoints(folder) if c.startswith("update-")), default=None))
    assert newest[0] is None  # killed before the first checkpoint
    assert any(int(name.split("-")[1]) % 4 for name in newest[1:])  # and in the middle of an epoch
    process = start()
    assert process.wait() == [0], process.text
    assert "resumed from" in (folder / "log.txt").read_text()
    assert_same_run(folder, whole)
    assert checkpoints(folder) == checkpoints(whole) == ["update-00000015", "update-00000016"]


FEATURES = {
    "plain": "",
    "model-ema": "--model-ema --model-ema-decay 0.9",
    "drop": "--drop 0.5",
    "drop-path": "--drop-path 0.5",
    "mixup": "--mixup 0.5",
    "reprob": "--reprob 1",
    "grad-accum": "--grad-accum-steps 2 --batch-size 16",
    "momentum": "--opt sgd --lr 0.1",
    "kron": "--opt kron",
    "teacher": "--kd-warmup 0.25 --kd-hold 0.25 --kd-decay 0.5 --kd-patience 9",
    "shuffled": "--kd-warmup 0.25 --kd-control shuffled --grad-accum-steps 2 --batch-size 16",
    "random": "--kd-warmup 0.25 --kd-control random",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_resume_within_an_epoch_ends_in_the_same_bits(feature, tmp_path, tiny_teacher):
    command = words("--epochs 1", FEATURES[feature], ["--teacher", tiny_teacher] if "--kd" in FEATURES[feature] else [])
    with forwards() as seen, torch.compiler.set_stance("force_eager"):  # kron compiles itself, which takes minutes
        whole = run(tmp_path, "whole", command)
    with forwards() as mine, torch.compiler.set_stance("force_eager"):
        folder = preempted_run(1, tmp_path, "resumed", command)
        assert checkpoints(folder) == ["update-00000002"]
        run(tmp_path, "resumed", command, "--resume auto")
    assert trained_on(mine) == trained_on(seen)  # exactly the batches that were left
    assert_same_run(folder, whole)


def test_sigterm_saves_and_exits_75(tmp_path, baseline):
    command = words(
        DIGITS, RESNET, "--evals-per-epoch 2 --target top1=0.5 99.5 --recovery-interval 3 --output", tmp_path
    )
    command += ["--name", "run"]
    process = start_script("train_cls", tmp_path / "log", command)
    assert process.wait_for((tmp_path / "run" / "checkpoints" / "update-00000003").exists), process.text
    process.kill(signal.SIGTERM)
    assert process.wait() == [75], process.text
    assert re.search(r"^stopped by a signal and saved at update \d+", process.text, re.M)
    assert read_summary(tmp_path / "run")["status"] == "preempted"
    process = start_script("train_cls", tmp_path / "log", command, "--resume auto")
    assert process.wait() == [0], process.text
    assert_same_run(tmp_path / "run", baseline[0])


def is_classifier(module: torch.nn.Module) -> bool:
    return hasattr(module, "pretrained_cfg")


def test_sigterm_during_an_evaluation_ends_it_and_the_resumed_run_begins_with_it(tmp_path, stopped):
    stop = signal_in_evaluation(2, is_classifier)
    with stop as evaluated, pytest.raises(Preempted, match="saved at update 4; go on with"):
        run(tmp_path, "run", "--epochs 1")
    assert len(evaluated) == 3
    assert read_rows(tmp_path / "run") == [] and read_summary(tmp_path / "run")["status"] == "preempted"
    assert checkpoints(tmp_path / "run") == ["update-00000004"]
    with forwards() as seen:
        run(tmp_path, "run", "--epochs 1 --resume auto")
    assert trained_on(seen) == []
    assert_same_run(tmp_path / "run", stopped[1])


def test_a_kill_during_an_evaluation_costs_no_update(tmp_path, stopped):
    command = words(DIGITS, RESNET, "--epochs 1 --validation-batch-size 1 --name run --output", tmp_path)
    process = start_script("train_cls", tmp_path / "log", command)
    state = tmp_path / "run" / "checkpoints" / "update-00000004" / "state.json"
    assert process.wait_for(state.exists), process.text
    process.kill()
    process.wait()
    assert json.loads(state.read_text())["evaluation_due"] and read_rows(tmp_path / "run") == []
    with forwards() as seen:
        run(tmp_path, "run", "--epochs 1 --resume auto")
    assert trained_on(seen) == []
    assert_same_run(tmp_path / "run", stopped[1])


def test_ctrl_c_saves_and_exits_75(tmp_path, stopped):
    with signal_in_update(1, number=signal.SIGINT), pytest.raises(SystemExit) as exit:
        call_main(lambda: run(tmp_path, "run", "--epochs 1"))
    assert exit.value.code == 75
    assert read_summary(tmp_path / "run")["status"] == "preempted"
    assert checkpoints(tmp_path / "run") == ["update-00000002"]
    assert_same_run(run(tmp_path, "run", "--epochs 1 --resume auto"), stopped[1])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, Path]:
    """A run that was preempted at update 3 of 4, with checkpoints at 2 and 3; and the same run uninterrupted."""
    output = tmp_path_factory.mktemp("stopped")
    whole = run(output, "whole", "--epochs 1")
    return preempted_run(2, output, "stopped", "--epochs 1 --recovery-interval 2"), whole


@pytest.mark.parametrize("name", ["__0_0.distcp", "rest.pt", "state.json"])
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(name, how, stopped, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    assert checkpoints(folder) == ["update-00000002", "update-00000003"]
    path = folder / "checkpoints" / "update-00000003" / name
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    run(tmp_path, "run", "--epochs 1 --recovery-interval 2 --resume auto")
    log = (folder / "log.txt").read_text()
    warning = next(line for line in log.splitlines() if line.startswith("warning: "))
    assert "update-00000003" in warning and name in warning
    assert re.search(r"resumed from \S+update-00000002$", log, re.M)
    assert_same_run(folder, stopped[1])


def test_resume_of_a_finished_run_changes_nothing(tmp_path, baseline):
    folder = shutil.copytree(baseline[0], tmp_path / "baseline")
    before = snapshot(folder)
    with pytest.raises(Finished):
        run(tmp_path, "baseline", "--evals-per-epoch 2 --target top1=0.5 99.5 --resume auto")
    assert snapshot(folder) == before


def test_resume_auto_starts_a_run_that_is_not_there_yet(tmp_path, stopped):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml.partial").write_text("aug")  # killed while it wrote its first file
    assert_same_run(run(tmp_path, "run", "--epochs 1 --resume auto"), stopped[1])


def test_resume_from_an_earlier_checkpoint_by_path(tmp_path, treated, tiny_teacher):
    whole = treated[0]
    command = words(PHASE, "--kd-patience 99 --evals-per-epoch 4 --teacher", tiny_teacher)
    checkpoint = whole / "checkpoints" / "update-00000004"
    copy = run(tmp_path, "copy", command, "--resume", checkpoint)
    assert_same_run(copy, whole)
    assert checkpoints(whole) == [f"update-{update:08d}" for update in range(1, 9)]  # untouched

    again = shutil.copytree(whole, tmp_path / "again")  # in place: later rows and checkpoints give way
    run(tmp_path, "again", command, "--resume", again / "checkpoints" / "update-00000004")
    assert_same_run(again, whole)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path, baseline):
    command = words(
        DIGITS, RESNET, "--evals-per-epoch 2 --target top1=0.5 99.5 --recovery-interval 1 --output", tmp_path
    )
    command += ["--name", "run", "--resume", "auto"]
    first = start_script("train_cls", tmp_path / "log", command)
    assert first.wait_for((tmp_path / "run" / "checkpoints" / "update-00000001").exists), first.text
    first.kill(signal.SIGSTOP)
    before = snapshot(tmp_path / "run")
    second = start_script("train_cls", tmp_path / "second.log", command)
    assert second.wait() == [2], second.text
    (line,) = [line for line in second.text.splitlines() if line.startswith("error: ")]
    assert f"in use by process {first.processes[0].pid} on " in line
    assert snapshot(tmp_path / "run") == before
    first.kill()
    first.wait()
    third = start_script("train_cls", tmp_path / "third.log", command)
    assert third.wait() == [0], third.text
    assert_same_run(tmp_path / "run", baseline[0])


def test_resume_by_path_does_not_overwrite_another_run(tmp_path, treated, tiny_teacher):
    other = run(tmp_path, "other", "--dry-run --epochs 1")
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    shutil.copy(treated[0] / "summary.json", other)
    message = refusal(
        *(DIGITS, RESNET, PHASE, "--kd-patience 99 --evals-per-epoch 4 --teacher", tiny_teacher, "--resume"),
        *(treated[0] / "checkpoints" / "update-00000004", "--name other --output", tmp_path),
    )
    assert "other" in message
    assert sorted(path.name for path in other.iterdir()) == ["summary.json", "thesis.txt"]


def test_options_that_change_the_result_may_not_change_on_resume(stopped, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    before = snapshot(folder)
    message = refusal(DIGITS, RESNET, "--epochs 1 --lr 0.5 --resume auto --name run --output", tmp_path)
    assert "different run" in message and "--lr" in message
    assert snapshot(folder) == before
    run(tmp_path, "run", "--epochs 1 --recovery-interval 1 --log-interval 1 --checkpoint-hist 1 --resume auto")
    assert_same_run(folder, stopped[1])


CACHED = "--pad-crop 2 --color-jitter 0"  # what can be done on the device, so that auto keeps it there


def test_a_cached_run_continues_within_an_epoch_in_the_same_bits(tmp_path):
    whole = run(tmp_path, "whole", CACHED)
    assert yaml.safe_load((whole / "args.yaml").read_text())["cache"] == "device"
    folder = preempted_run(2, tmp_path, "again", CACHED)
    assert_same_run(run(tmp_path, "again", CACHED, "--resume auto"), whole)
    assert folder == tmp_path / "again"


def test_a_resumed_run_keeps_to_its_cache(tmp_path):
    preempted_run(2, tmp_path, "run", CACHED, "--cache none")
    folder = run(tmp_path, "run", CACHED, "--resume auto")  # auto would keep the images
    assert yaml.safe_load((folder / "args.yaml").read_text())["cache"] == "none"
    assert_same_run(folder, run(tmp_path, "whole", CACHED, "--cache none"))


# ---- several processes ----


def test_two_processes_train_as_one(tmp_path, tiny_teacher):
    command = words(
        *(VIT, "--epochs 1 --evals-per-epoch 4 --kd-weight 1 --kd-warmup 0.25 --kd-hold 0.5 --kd-decay 0.25"),
        *("--warmup-epochs 0.5 --teacher", tiny_teacher),
    )
    one = run(tmp_path, "one", command)
    done = run_script("train_cls", DIGITS, command, "--batch-size 16 --name two --output", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two"
    exact = ("epoch", "update", "samples", "lr", "kd_weight", "kd_temperature", "kd_active", "pflops")
    rows, others = read_rows(one), read_rows(two)
    assert len({row["lr"] for row in rows}) == 4
    for row, other in zip(rows, others, strict=True):
        assert {k: row[k] for k in exact} == {k: other[k] for k in exact}
        for column in ("train_loss", "task_loss", "kd_loss", "top1", "top5", "eval_loss", "switch_top1"):
            assert (row[column] == "") == (other[column] == ""), column
            assert float(row[column] or 0) == pytest.approx(float(other[column] or 0), abs=1e-4), column
    ours, theirs = read_summary(one), read_summary(two)
    assert (ours["environment"]["processes"], theirs["environment"]["processes"]) == (1, 2)
    for key in ("data", "flops", "params", "kd_off", "teacher"):
        assert ours[key] == theirs[key], key
    assert ours["data"] == {"train": 128, "switch": 20, "report": 597}


TERM_PHASE = "--kd-weight 1 --kd-warmup 0.25 --kd-hold 0.5 --kd-decay 0.25"


@pytest.mark.parametrize("term", ["nd", "ofa --kd-target taid"])
def test_two_processes_train_the_branches_of_a_term_as_one(term, tmp_path, tiny_teacher):
    """Through an update before the teacher speaks, three with it, and four after it; nothing of them is exported."""
    command = words(VIT, TERM_PHASE, "--warmup-epochs 0.5 --evals-per-epoch 4 --model-ema --kd-term", term)
    one = run(tmp_path, "one", command, "--teacher", tiny_teacher)
    log = tmp_path / "two.log"
    process = start_script(
        "train_cls", log, DIGITS, command, "--batch-size 16 --name two --output", tmp_path, "--teacher", tiny_teacher,
        processes=2,
    )  # fmt: skip
    assert process.wait() == [0, 0], process.text
    two = tmp_path / "two"
    for row, other in zip(read_rows(one), read_rows(two), strict=True):
        for column in ("train_loss", "task_loss", "kd_loss", "eval_loss"):
            assert float(row[column] or 0) == pytest.approx(float(other[column] or 0), abs=1e-3), column
        assert row["pflops"] == other["pflops"]
    ours, theirs = read_summary(one), read_summary(two)
    for key in ("flops", "params", "kd_off", "teacher"):
        assert ours[key] == theirs[key], key
    assert ours["kd_off"]["reason"] == "window" and ours["flops"]["branches"] > 0
    rows, flops = read_rows(one), ours["flops"]
    total = 8 * flops["student_update"] + 3 * (flops["teacher_forward"] + flops["branches"])
    assert float(rows[-1]["pflops"]) == pytest.approx(total / 1e15)
    student = timm.create_model(f"local-dir:{one / 'model'}")
    assert set(load_file(one / "model" / "model.safetensors")) == set(student.state_dict())
    assert ours["params"] == sum(parameter.numel() for parameter in student.parameters())
    saved = checkpoint_tensors(one / "checkpoints" / "update-00000008")
    assert any(not name.startswith("student.") for name in saved)
    assert set(checkpoint_tensors(one / "checkpoints" / "update-00000008", "ema")) == set(student.state_dict())


@pytest.mark.parametrize(
    "term", ["features --kd-control shuffled", "ofa --kd-target taid --grad-accum-steps 2 --batch-size 16 --model-ema"]
)
def test_a_run_with_branches_that_is_killed_ends_in_the_same_bits(term, tmp_path, tiny_teacher):
    command = words("--epochs 3 --kd-warmup 0.25 --kd-hold 2 --recovery-interval 3 --kd-term", term, "--teacher")
    whole = run(tmp_path, "whole", command, tiny_teacher)
    folder = tmp_path / "killed"
    options = (DIGITS, RESNET, command, tiny_teacher, "--name killed --resume auto --output", tmp_path)
    process = start_script("train_cls", tmp_path / "killed.log", *options)
    assert process.wait_for(lambda: "update-00000003" in checkpoints(folder)), process.text
    process.kill()
    assert process.wait() == [-signal.SIGKILL], process.text
    assert read_summary(folder)["status"] == "running"
    run(tmp_path, "killed", command, tiny_teacher, "--resume auto")
    assert_same_run(folder, whole)


def test_a_moving_target_leaves_the_rates_of_the_layers_as_they_are(tmp_path, tiny_teacher):
    decayed = "--epochs 1 --layer-decay 0.5"
    alone = run(tmp_path, "alone", decayed)
    taught = run(tmp_path, "taught", decayed, "--kd-target taid --kd-weight 0 --teacher", tiny_teacher)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (alone, taught)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_teacher_that_never_taught_took_no_time(tmp_path, tiny_teacher):
    folder = run(tmp_path, "silent", "--epochs 1 --kd-off 0 --teacher", tiny_teacher)
    assert [float(row["teacher_seconds"]) for row in read_rows(folder)] == [0.0]


def test_a_term_is_resumed_after_the_switch_off_without_the_teachers_files(tmp_path, tiny_teacher):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    command = words("--kd-warmup 0 --kd-hold 0.5 --kd-decay 0 --kd-term nd --epochs 2 --teacher", teacher)
    whole = run(tmp_path, "whole", command)
    folder = preempted_run(5, tmp_path, "resumed", command)
    shutil.rmtree(teacher)
    run(tmp_path, "resumed", command, "--resume auto")
    assert_same_run(folder, whole)


def evaluated(tmp_path: Path, processes: int, *parts: object) -> dict:
    """What `--eval-only` prints, which is one line."""
    log = tmp_path / f"eval-{processes}.log"
    log.unlink(missing_ok=True)
    process = start_script("train_cls", log, DIGITS, "--eval-only", *parts, processes=processes)
    assert process.wait() == [0] * processes, process.text
    (line,) = [line for line in process.text.splitlines() if line.startswith("{")]
    return json.loads(line)


def test_eval_only_counts_alike_on_one_and_two_processes(baseline, tmp_path):
    """597 images divide neither by two processes nor by their batches."""
    folder = baseline[0]
    before = snapshot(folder)
    options = words(RESNET, "--name", folder.name, "--output", folder.parent)
    one = evaluated(tmp_path, 1, options)
    two = evaluated(tmp_path, 2, options, "--batch-size 16")
    row = read_rows(folder)[-1]
    for metrics in (one, two):  # the run's own weights were in another memory format
        assert (metrics["top1"], metrics["top5"]) == (float(row["top1"]), float(row["top5"]))
        assert metrics["eval_loss"] == pytest.approx(float(row["eval_loss"]), rel=1e-6)
    assert snapshot(folder) == before


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_two_processes_report_the_metrics_of_the_weights_they_export(weights, tmp_path):
    """BatchNorm statistics differ between processes; those that are evaluated must be those that are written."""
    ema = "--model-ema --model-ema-decay 0.5" if weights == "ema" else ""
    command = words(RESNET, "--epochs 1 --batch-size 16 --name two --output", tmp_path)
    process = start_script("train_cls", tmp_path / "log", DIGITS, command, ema, processes=2)
    assert process.wait() == [0, 0], process.text
    row = read_rows(tmp_path / "two")[-1]
    alone = evaluated(tmp_path, 1, command)
    assert alone["eval_loss"] == pytest.approx(float(row["eval_loss"]), rel=1e-6)
    assert alone["top1"] == pytest.approx(float(row["top1"]))


def test_sigterm_to_one_of_two_processes_stops_both_and_they_resume(tmp_path, tiny_teacher):
    command = words(*(DIGITS, RESNET, "--batch-size 16 --recovery-interval 3 --drop 0.2 --mixup 0.2"))
    command += words(PHASE, "--kd-balance --kd-off running --teacher", tiny_teacher, "--output", tmp_path)
    whole = start_script("train_cls", tmp_path / "whole.log", command, "--name whole", processes=2)
    assert whole.wait() == [0, 0], whole.text
    process = start_script("train_cls", tmp_path / "log", command, "--name run", processes=2)
    assert process.wait_for((tmp_path / "run" / "checkpoints" / "update-00000003").exists), process.text
    process.kill(signal.SIGTERM, rank=1)
    assert process.wait() == [75, 75], process.text
    assert process.text.count("stopped by a signal") == 1
    assert read_summary(tmp_path / "run")["status"] == "preempted"
    process = start_script("train_cls", tmp_path / "log", command, "--name run --resume auto", processes=2)
    assert process.wait() == [0, 0], process.text
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_a_corrupt_image_that_one_process_meets_ends_both_with_one_line(tmp_path):
    """The other one waits for it in a collective operation, which may take for ever."""
    data = image_folder(tmp_path / "data", train=16)
    options = words(RESNET, FOLDER, data, "--batch-size 4 --check-images 0 --cache none --name run --output", tmp_path)
    args = train_cls.build_parser().parse_recipe(options)
    split = load_data(args, train_cls.resolve(args), PartialState(), cache="none").train
    batches = iter(EpochBatches(len(split), 4, batches=3, seed=args.seed, rank=1, world=2))
    _, (_, position) = next(batches), next(batches)[0]
    image = Path(split.dataset.filename(int(split.rows[position]), absolute=True))
    damage(image, "cut")
    process = start_script("train_cls", tmp_path / "log", options, processes=2)
    assert process.wait_for((tmp_path / "run" / "args.yaml").exists), process.text
    begun = time.monotonic()
    assert process.wait() == [2, 2], process.text
    assert time.monotonic() - begun < 60
    (line,) = [line for line in process.text.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process 1: corrupt image") and image.name in line
    assert "Traceback" not in process.text and read_summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_without_an_accelerator_processes_are_joined_however_they_were_started(tmp_path):
    """As torchrun starts them; `accelerate launch` does not hand use_cpu down to several processes either."""
    options = words(DIGITS, RESNET, "--epochs 1 --batch-size 16 --name run --output", tmp_path)
    process = start_script("train_cls", tmp_path / "log", options, processes=2, env={"ACCELERATE_USE_CPU": "false"})
    assert process.wait() == [0, 0], process.text
    assert read_summary(tmp_path / "run")["environment"]["processes"] == 2
    assert len(read_rows(tmp_path / "run")) == 1


RESIZED = "--batch-size 16 --mixup 0.2 --drop 0.2 --kd-control shuffled --model-ema --model-ema-decay 0.9"


def test_a_run_goes_on_with_one_process_and_with_two_again(tmp_path, tiny_teacher):
    """Batches, augmentation, mixup, dropout and the control are those of the run that kept to its two processes."""
    command = words(DIGITS, VIT, RESIZED, PHASE, "--evals-per-epoch 4 --teacher", tiny_teacher, "--output", tmp_path)
    whole = start_script("train_cls", tmp_path / "whole.log", command, "--name whole", processes=2)
    assert whole.wait() == [0, 0], whole.text
    process = start_script("train_cls", tmp_path / "log", command, "--name run", processes=2)
    assert process.wait_for((tmp_path / "run" / "checkpoints" / "update-00000002" / "state.json").exists), process.text
    process.kill(signal.SIGTERM)
    assert process.wait() == [75, 75], process.text
    done = int(max(checkpoints(tmp_path / "run"))[7:])
    assert done < 6, "the machine was too slow to stop it in time"
    with signal_in_update(0, micro_batches=2), pytest.raises(Preempted):
        call_script(train_cls.main, command, "--name run --resume auto")
    assert max(checkpoints(tmp_path / "run")) == f"update-{done + 1:08d}"
    process = start_script("train_cls", tmp_path / "log", command, "--name run --resume auto", processes=2)
    assert process.wait() == [0, 0], process.text
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "the 1 of now make the same updates of 32 images, as 2 micro-batch(es) of 16 each" in log
    assert "the 2 of now make the same updates of 32 images, as 1 micro-batch(es) of 16 each" in log
    measured = {"train_loss", "task_loss", "kd_loss", "top1", "top5", "eval_loss", "switch_top1"}
    for row, other in zip(timeless(tmp_path / "run"), timeless(tmp_path / "whole"), strict=True):
        assert {k: row[k] for k in row.keys() - measured} == {k: other[k] for k in row.keys() - measured}
        for column in ("train_loss", "task_loss", "kd_loss", "eval_loss"):
            assert float(row[column] or 0) == pytest.approx(float(other[column] or 0), abs=1e-4), column
    environment = read_summary(tmp_path / "run")["environment"]
    assert (environment["processes"], environment["earlier_processes"]) == (2, [2, 1])


def test_a_run_is_not_resumed_by_processes_that_cannot_share_its_updates(stopped):
    folder = stopped[0]
    before = snapshot(folder)
    options = words(RESNET, "--epochs 1 --recovery-interval 2 --resume auto --name stopped --output", folder.parent)
    done = run_script("train_cls", DIGITS, options, processes=3)
    assert done.returncode == 1  # the launcher's, whatever the script returned
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "32 images cannot be shared out evenly among 3 processes; resume it with 2" in line
    assert snapshot(folder) == before


# ---- a loss that is not finite ----

EXPLODING = "--epochs 3 --sched step --decay-epochs 1 --decay-rate 1e25 --lr 1e-3"  # from the second epoch on


def test_a_non_finite_loss_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    process = start_script("train_cls", tmp_path / "log", DIGITS, RESNET, EXPLODING, "--name run --output", tmp_path)
    assert process.wait() == [3], process.text
    (line,) = [line for line in process.text.splitlines() if line.startswith("error: ")]
    folder = tmp_path / "run"
    assert checkpoints(folder) == ["update-00000004"]
    assert "not finite" in line and str(folder / "checkpoints" / "update-00000004") in line
    assert read_summary(folder)["status"] == "failed"
    kept = checkpoint_tensors(folder / "checkpoints" / "update-00000004")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert not (folder / "model").exists()


def test_a_non_finite_loss_before_any_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLoss, match="No checkpoint"):
        run(tmp_path, "run", "--lr 1e20 --epochs 5 --opt sgd --sched constant")
    assert read_summary(tmp_path / "run")["status"] == "failed"


def test_on_a_terminal_the_error_stands_on_a_line_of_its_own(tmp_path):
    """Not behind the progress bar."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # tqdm draws nothing on 0 columns
    shown = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the terminal is closed
            while chunk := os.read(master, 65536):
                shown.append(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    process = start_script(
        "train_cls", Path(os.ttyname(slave)), DIGITS, RESNET, EXPLODING, "--epochs 2 --name run --output", tmp_path
    )
    for child in process.processes:
        child.join(TIMEOUT)
    os.close(slave)
    reader.join(10)
    os.close(master)
    lines = re.split(r"[\r\n]+", b"".join(shown).decode())
    assert any("update" in line and "/8" in line for line in lines)  # there was a bar
    assert sum(line.startswith("error: ") for line in lines) == 1, lines[-3:]


# ---- bad input ----


def refusal(*parts: object) -> str:
    """The one line with which the script refuses a command line, after exit code 2."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as exit:
        call_main(lambda: call_script(train_cls.main, *parts))
    assert exit.value.code == 2
    lines = [line for line in stderr.getvalue().splitlines() if line]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    assert not any("Traceback" in line for line in lines)
    return errors[0]


RECIPES = {  # what is wrong: recipe, words of the message
    "unknown key": ("epoch: 3", ["'epoch'", "epochs"]),
    "text for a number": ("epochs: many", ["epochs", "many"]),
    "fraction for an integer": ("epochs: 2.5", ["epochs", "2.5"]),
    "list for one value": ("epochs: [1, 2]", ["epochs"]),
    "number for a switch": ("model-ema: 3", ["model-ema", "true or false"]),
    "switch for a number": ("mixup: true", ["mixup", "True"]),
    "mapping for a value": ("lr: {a: 1}", ["lr"]),
    "value for a mapping": ("model-kwargs: 3", ["model-kwargs", "mapping"]),
    "no mapping": ("- epochs", ["mapping"]),
    "no YAML": ("epochs: [1", ["YAML"]),
    "not among the choices": ("log-with: paper", ["log-with", "paper"]),
}


@pytest.mark.parametrize("what", RECIPES)
def test_a_bad_recipe_is_refused(what, tmp_path):
    recipe, needed = RECIPES[what]
    (tmp_path / "recipe.yaml").write_text(recipe)
    message = refusal("-c", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    assert all(word in message for word in ["recipe.yaml", *needed]), message
    assert not (tmp_path / "out").exists()


COMMANDS = {  # what is wrong: options, words of the message
    "unknown option": ("--epoch 3", ["--epoch"]),
    "zero epochs": ("--epochs 0", ["--epochs", "at least 1"]),
    "missing recipe": ("-c nowhere.yaml", ["nowhere.yaml"]),
    "unknown model": ("--model resnet1O", ["resnet1O", "did you mean"]),
    "argument without a value": ("--model-kwargs depth", ["--model-kwargs", "depth"]),
    "statistics of two channels": ("--mean 0.5 0.5", ["--mean", "3"]),
    "model arguments": ("--model-kwargs colour=3", ["resnet10t", "colour"]),
    "unknown optimiser": ("--opt adamv", ["adamv"]),
    "impossible optimiser": ("--opt adamw --lr=-1", ["adamw", "-1"]),
    "unknown schedule": ("--sched cosinus", ["cosinus"]),
    "schedule on a metric": ("--sched plateau", ["plateau"]),
    "warm-up longer than the run": ("--warmup-epochs 3", ["--warmup-epochs", "3"]),
    "no dataset": ("--dataset=", ["--dataset", "--data-dir"]),
    "unknown dataset": ("--dataset nodigits", ["nodigits"]),
    "missing folder": ("--dataset= --data-dir /nowhere/at-all", ["/nowhere/at-all"]),
    "missing hub dataset": ("--dataset hfds/nobody/nothing-here", ["nobody/nothing-here"]),
    "unknown split": ("--val-split validation", ["validation", "test"]),
    "label out of range": ("--num-classes 9", ["label 9", "0..8"]),
    "class with no image": ("--num-classes 11", ["class 10", "no image"]),
    "more images than there are": ("--train-samples 5000", ["--train-samples", "5000"]),
    "fewer images than one update": ("--batch-size 129", ["128", "129", "--batch-size"]),
    "channels": ("--in-chans 4", ["--in-chans", "1 or 3"]),
    "odd batch to mix": ("--mixup 0.2 --batch-size 31", ["--batch-size", "even"]),
    "target zero": ("--target 0", ["--target", "0"]),
    "target above 100": ("--target 65 101", ["--target", "101"]),
    "target of another metric": ("--target top5=90", ["top5", "top1"]),
    "target no number": ("--target high", ["high"]),
    "switch split": ("--switch-split 1.5", ["--switch-split", "1.5"]),
    "resume of nothing": ("--resume /nowhere/checkpoint", ["/nowhere/checkpoint", "no checkpoint"]),
    "no model to evaluate": ("--eval-only", ["model"]),
    "missing start": ("--initial-checkpoint /nowhere/w.safetensors", ["/nowhere/w.safetensors"]),
}


def test_a_student_for_larger_images_is_refused_before_the_teacher_is_scored(tmp_path, tiny_teacher):
    model = "--dataset digits --model inception_v3 --img-size 32 --num-classes 10 --teacher"
    message = refusal(model, tiny_teacher, "--name run --output", tmp_path / "out")
    assert "--model inception_v3 cannot be trained on images of 32 px: " in message and "scores" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", COMMANDS)
def test_a_bad_command_is_refused(what, tmp_path):
    options, needed = COMMANDS[what]
    message = refusal(DIGITS, RESNET, options, "--name run --output", tmp_path / "out")
    assert all(word in message for word in needed), message
    assert list(tmp_path.iterdir()) == []


KD = {  # what is wrong: options beside a good teacher, words of the message
    "window longer than the run": ("--kd-warmup 1 --kd-hold 1 --kd-decay 0.5", ["2.5", "longer", "2"]),
    "three temperatures": ("--kd-temperature 6 3 1", ["--kd-temperature", "3"]),
    "temperature zero": ("--kd-temperature 0", ["temperature"]),
    "negative weight": ("--kd-weight=-1", ["--kd-weight", "-1"]),
    "patience zero": ("--kd-patience 0", ["--kd-patience"]),
    "unknown end": ("--kd-off sometimes", ["--kd-off", "sometimes"]),
    "nothing held out": ("--switch-split 0", ["--switch-split"]),
    "compiled features": ("--kd-term nd --torchcompile eager", ["--kd-term nd", "--torchcompile"]),
    "layers of branches": ("--kd-term ofa --layer-decay 0.9", ["--kd-term ofa", "--layer-decay"]),
    "features of labels": ("--kd-term features --kd-control labels", ["--kd-control labels", "features"]),
    "centres in their order": ("--kd-term nd --kd-control shuffled", ["--kd-term nd", "--kd-control shuffled"]),
    "student without features": (
        "--kd-term nd --model deit_tiny_distilled_patch16_224 --model-kwargs patch_size=4 depth=1",
        ["--kd-term nd", "deit_tiny_distilled_patch16_224", "features"],
    ),
}


@pytest.mark.parametrize("what", KD)
def test_a_bad_distillation_option_is_refused(what, tmp_path, tiny_teacher):
    options, needed = KD[what]
    message = refusal(DIGITS, RESNET, "--teacher", tiny_teacher, options, "--name run --output", tmp_path / "out")
    assert all(word in message for word in needed), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "needed"),
    {
        "other classes": ["7 classes", "10"],
        "other channels": ["1 channels", "3"],
        "missing folder": ["nowhere"],
        "folder without a model": ["empty", "no exported model"],
        "missing weights": ["model.safetensors"],
        "truncated weights": ["model.safetensors", "cannot read"],
        "weights of another architecture": ["model.safetensors"],
        "file without its architecture": ["--teacher-model"],
        "architecture without its file": ["--teacher-model"],
        "file of another architecture": ["vit.safetensors", "another architecture"],
        "missing file": ["nothing.safetensors"],
        "damaged config": ["cannot build the model", "JSON"],
    }.items(),
)
def test_a_bad_teacher_is_refused(what, needed, tmp_path, tiny_teacher):
    teacher, more = tmp_path / "teacher", ""
    narrow = {"channels": (8, 8, 8, 8), "stem_width": 8}
    if what == "other classes":
        export(create_model("resnet10t", 7, model_kwargs=narrow), teacher)
    elif what == "other channels":
        export(create_model("resnet10t", 10, 1, model_kwargs=narrow), teacher)
    elif what == "missing folder":
        teacher = tmp_path / "nowhere"
    elif what == "folder without a model":
        teacher = tmp_path / "empty"
        teacher.mkdir()
    elif what == "architecture without its file":
        teacher, more = tiny_teacher, "--teacher-model resnet10t"
    elif what == "file of another architecture":
        export(create_model("vit_tiny_patch16_224", 10, model_kwargs={"embed_dim": 24, "depth": 1}), tmp_path / "vit")
        teacher = (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "vit.safetensors")
        more = "--teacher-model resnet10t"
    elif what == "missing file":
        teacher, more = tmp_path / "nothing.safetensors", "--teacher-model resnet10t"
    else:
        shutil.copytree(tiny_teacher / "model", teacher)
        weights = teacher / "model.safetensors"
        if what == "missing weights":
            weights.unlink()
        elif what == "truncated weights":
            os.truncate(weights, weights.stat().st_size // 2)
        elif what == "weights of another architecture":
            export(create_model("resnet10t", 10, model_kwargs=narrow | {"channels": (8, 8, 8, 16)}), tmp_path / "other")
            shutil.copy(tmp_path / "other" / "model.safetensors", weights)
        elif what == "file without its architecture":
            teacher = weights.rename(tmp_path / "old.safetensors")
        elif what == "damaged config":
            (teacher / "config.json").write_text('{"architecture": ')
    message = refusal(DIGITS, RESNET, "--teacher", teacher, more, "--name run --output", tmp_path / "out")
    assert all(word in message for word in needed), message
    assert not (tmp_path / "out").exists()


def damage(path: Path, how: str) -> None:
    """Make an image unreadable in one of the ways that downloads do."""
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404</html>")
    elif how == "cut":
        os.truncate(path, path.stat().st_size * 2 // 3)
    else:  # flipped bits in the compressed data
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
        path.write_bytes(data)


def test_an_image_folder_trains(tmp_path):
    data = image_folder(tmp_path / "data")
    call_script(train_cls.main, RESNET, FOLDER, data, "--name run --output", tmp_path)
    assert read_summary(tmp_path / "run")["data"] == {"train": 14, "switch": 2, "report": 8}
    assert "top5" not in read_rows(tmp_path / "run")[0]  # which is 100 of two classes


def test_pooling_and_gradient_checkpointing_as_in_timm(tmp_path):
    plain, checkpointed, pooled = (
        run(tmp_path, name, more, "--epochs 1 --img-size 64")
        for name, more in (("plain", ""), ("checkpointed", "--grad-checkpointing"), ("pooled", "--gp max"))
    )
    rows = [timeless(folder)[-1] for folder in (plain, checkpointed, pooled)]
    assert float(rows[0]["train_loss"]) == pytest.approx(float(rows[1]["train_loss"]), rel=1e-4)
    assert rows[0]["train_loss"] != rows[2]["train_loss"]
    model = timm.create_model(f"local-dir:{pooled / 'model'}", pretrained=True)
    assert model.global_pool.pool_type == "max"


def test_gradient_checkpointing_where_there_is_none_is_refused(tmp_path):
    message = refusal(DIGITS, "--model dla34 --grad-checkpointing --output", tmp_path)
    assert "--grad-checkpointing" in message


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("how", ["empty", "text", "cut", "bits"])
def test_a_corrupt_image_is_named(how, split, tmp_path):
    data = image_folder(tmp_path / "data")
    damage(data / split / "class1" / "2.png", how)
    message = refusal(RESNET, FOLDER, data, "--name run --output", tmp_path / "out")
    assert "corrupt image" in message and "class1/2.png" in message
    assert str(data / split / "class1" / "2.png") in message  # the other split has a class1/2.png, too
    assert not (tmp_path / "out").exists()


def test_a_corrupt_image_is_named_in_training_too(tmp_path):
    """Nothing was decoded beforehand, and a loader's worker meets it."""
    data = image_folder(tmp_path / "data")
    for k in range(8):
        damage(data / "train" / "class1" / f"{k}.png", "cut")
    options = words(RESNET, FOLDER, data, "--check-images 0 --workers 1 --name run --output", tmp_path / "out")
    process = start_script("train_cls", tmp_path / "log", options)
    assert process.wait() == [2], process.text
    (line,) = [line for line in process.text.splitlines() if line.startswith("error: ")]
    assert "corrupt image" in line and "class1/" in line and "Traceback" not in process.text
    assert read_summary(tmp_path / "out" / "run")["status"] == "failed"  # else slurm.sh would launch it again
    # it trained nothing, so the name is free for another attempt
    other = image_folder(tmp_path / "other")
    call_script(train_cls.main, RESNET, FOLDER, other, "--name run --output", tmp_path / "out")
    assert read_summary(tmp_path / "out" / "run")["status"] == "finished"


def test_a_corrupt_image_found_late_leaves_the_checkpoint_and_the_run_goes_on_once_it_is_mended(tmp_path, monkeypatch):
    data = image_folder(tmp_path / "data")
    image, train, calls = data / "val" / "class1" / "2.png", train_cls.train, []
    whole = image.read_bytes()

    def damaging(*args: object) -> None:
        train(*args)
        calls.append(len(calls))
        if calls == [0, 1]:
            damage(image, "cut")

    monkeypatch.setattr(train_cls, "train", damaging)
    options = words(RESNET, FOLDER, data, "--check-images 0 --epochs 2 --name run --output", tmp_path)
    assert "2.png" in refusal(options)
    assert read_summary(tmp_path / "run")["status"] == "failed"
    assert checkpoints(tmp_path / "run") == [
        "update-00000001",
        "update-00000002",
    ]  # the second one before its evaluation
    image.write_bytes(whole)
    call_script(train_cls.main, options, "--resume auto")
    assert read_summary(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize(
    ("what", "needed"),
    {
        "empty split": ["val"],
        "missing split": ["val"],
        "class with no image": ["class1"],
        "class only in val": ["class2"],
        "one image": ["class 1", "switch split"],
    }.items(),
)
def test_a_bad_image_folder_is_refused(what, needed, tmp_path):
    data = image_folder(tmp_path / "data")
    if what == "empty split":
        for path in (data / "val").rglob("*.png"):
            path.unlink()
    elif what == "missing split":
        shutil.rmtree(data / "val")
    elif what == "class with no image":
        for path in (data / "train" / "class1").iterdir():
            path.unlink()
    elif what == "class only in val":
        shutil.copytree(data / "val" / "class1", data / "val" / "class2")
    else:
        for k in range(1, 8):
            (data / "train" / "class1" / f"{k}.png").unlink()
    message = refusal(RESNET, FOLDER, data, "--name run --output", tmp_path / "out")
    assert all(word in message for word in needed), message
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_taken_is_refused(baseline):
    folder = baseline[0]
    before = snapshot(folder)
    command = words(DIGITS, RESNET, "--name baseline --output", folder.parent)
    assert "--resume auto" in refusal(command, "--evals-per-epoch 2 --target top1=0.5 99.5")
    message = refusal(command, "--resume auto --evals-per-epoch 1")
    assert "different run" in message
    assert snapshot(folder) == before


@pytest.mark.parametrize("resume", ["", "--resume auto"])
@pytest.mark.parametrize("what", ["a folder of something else", "a file", "below a file"])
def test_an_output_that_cannot_be_is_refused(what, resume, tmp_path):
    name, output = "run", tmp_path
    if what == "a folder of something else":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("years of work")
    elif what == "a file":
        (tmp_path / "run").write_text("years of work")
    else:
        (tmp_path / "file").write_text("years of work")
        output = tmp_path / "file" / "out"
    before = snapshot(tmp_path)
    message = refusal(DIGITS, RESNET, resume, "--name", name, "--output", output)
    assert str(tmp_path) in message
    assert snapshot(tmp_path) == before


def test_resume_of_a_folder_that_is_no_checkpoint_is_refused(tmp_path, baseline):
    command = words(DIGITS, RESNET, "--evals-per-epoch 2 --target top1=0.5 99.5 --name run --output", tmp_path / "out")
    folder = baseline[0]
    assert "no checkpoint" in refusal(command, "--resume", folder)  # a run is none
    broken = shutil.copytree(folder / "checkpoints" / "update-00000006", tmp_path / "broken")
    os.truncate(broken / "rest.pt", 100)
    message = refusal(command, "--resume", broken)
    assert "truncated" in message and "rest.pt" in message
    message = refusal(command, "--lr 0.1 --resume", folder / "checkpoints" / "update-00000006")
    assert "different run" in message and "--lr" in message
    assert not (tmp_path / "out").exists()


def test_wandb_without_a_key_names_the_way_offline(tmp_path):
    nobody = dict.fromkeys(("WANDB_MODE", "WANDB_API_KEY"), "")
    nobody |= {"HOME": tmp_path, "NETRC": tmp_path / "netrc", "WANDB_CONFIG_DIR": tmp_path / "config"}
    options = words(DIGITS, RESNET, "--log-with wandb --name run --output", tmp_path / "out")
    process = start_script("train_cls", tmp_path / "log", options, env=nobody)
    assert process.wait() == [2], process.text
    (line,) = process.text.splitlines()  # no warning of wandb's beside it
    assert line.startswith("error: ") and "WANDB_MODE=offline" in line
    assert not (tmp_path / "out").exists()


def test_the_command_itself(tmp_path, baseline):
    """`python train_cls.py`: exit codes 2 and 0."""
    (tmp_path / "recipe.yaml").write_text("dataset: digits\nepoch: 3\n")
    done = run_script("train_cls", "-c", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "'epoch'" in line

    command = words(DIGITS, RESNET, "--evals-per-epoch 2 --target top1=0.5 99.5 --resume auto --name baseline --output")
    done = run_script("train_cls", command, baseline[0].parent)
    assert (done.returncode, done.stdout) == (0, "")
    assert "finished" in done.stderr and "error" not in done.stderr


# ---- recipes, dry runs, evaluation, trackers ----


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = {"dataset": "digits", "img_size": 16, "train-samples": 32, "batch-size": 16, "lr": 1.0, "opt": "adamw"}
    recipe |= {"model": "resnet10t", "model-kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}, "epochs": 3}
    recipe |= {"target": [65, 80], "model-ema": True, "workers": 0, "scale": [0.5, 1], "name": None}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    command = ["-c", tmp_path / "tiny.yaml", "--epochs", "1", "--lr", "1e-3", "--no-model-ema", "--target", "70"]
    call_script(train_cls.main, command, "--output", tmp_path)
    options = yaml.safe_load((tmp_path / "tiny-seed0" / "args.yaml").read_text())
    assert (options["epochs"], options["lr"], options["model_ema"], options["target"]) == (1, 1e-3, False, ["70"])
    assert (options["scale"], options["batch_size"], options["img_size"]) == ([0.5, 1.0], 16, 16)


def test_args_yaml_is_a_recipe_that_repeats_the_run(baseline, tmp_path):
    call_script(train_cls.main, "-c", baseline[0] / "args.yaml", "--name again --output", tmp_path)
    assert_same_run(tmp_path / "again", baseline[0])


DRY = {
    "muon": (VIT, "--opt muon"),
    "lamb": ("--opt lamb",),
    "sgd": ("--opt sgd --sched step --warmup-epochs 1",),
    "layer decay": (VIT, "--layer-decay 0.7"),
    "bce": ("--bce-loss --bce-target-thresh 0.2",),
    "bce, mixed": ("--bce-loss --mixup 0.2",),
    "cutmix": ("--cutmix 1 --mixup-off-epoch 1",),
    "small stem": ("--small-stem",),
    "one channel": ("--in-chans 1",),
    "policy": ("--aa rand-m9-mstd0.5 --pad-crop 2 --crop-pct 0.9",),
}


@pytest.mark.parametrize("what", DRY)
def test_a_dry_run_trains_and_leaves_nothing(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # --output is the default
    call_script(train_cls.main, DIGITS, RESNET, *DRY[what], "--log-with tensorboard --log-interval 1 --dry-run")
    losses = re.findall(r"update \d+/3 loss (\S+)", capsys.readouterr().err)
    assert len(losses) == 3 and all(0 < float(loss) < 100 for loss in losses)
    assert list(tmp_path.iterdir()) == []


def test_no_step_is_fused_under_a_scaler(tmp_path, tiny_teacher):
    for more in ("", "--kd-warmup 0 --kd-term nd"):
        with under_a_scaler() as steps:
            run(tmp_path, "run", "--dry-run --teacher", tiny_teacher, more)
        assert steps == [False] * 3


def test_a_dry_run_with_a_teacher_leaves_a_run_of_that_name_alone(tmp_path, tiny_teacher):
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    before = snapshot(tmp_path)
    with forwards() as seen:
        run(tmp_path, "teacher", "--kd-warmup 0 --dry-run --teacher", teacher)
    assert len(trained_on(seen)) == 3
    assert snapshot(tmp_path) == before


def test_eval_only_prints_one_json_line(baseline, tmp_path, capsys):
    folder = baseline[0]
    rows = read_rows(folder)
    best = max(rows, key=lambda row: float(row["top1"]))
    for part, row in (("best", best), ("model/model.safetensors", rows[-1])):
        run(tmp_path, "none", "--eval-only --validation-batch-size 64 --initial-checkpoint", folder / part)
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        metrics = json.loads(out)
        assert metrics == pytest.approx({name: float(row[name]) for name in ("top1", "top5", "eval_loss")}, rel=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_eval_only_takes_size_model_and_data_from_the_run(baseline, tmp_path, capsys):
    last, options = read_rows(baseline[0])[-1], words("--eval-only --workers 0 --initial-checkpoint", baseline[0])
    call_script(train_cls.main, options)
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == pytest.approx({name: float(last[name]) for name in metrics}, rel=1e-6) and len(metrics) == 3
    call_script(train_cls.main, options, "--img-size 24")
    assert json.loads(capsys.readouterr().out) != metrics


def test_tensorboard_gets_every_evaluation(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(tmp_path, "run", "--epochs 1 --evals-per-epoch 2 --log-with tensorboard")
    files = list((folder / "tensorboard").rglob("events.out.tfevents.*"))
    scalars = {}
    for parent in {file.parent for file in files}:
        events = EventAccumulator(str(parent)).Reload()
        scalars |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for tag, column in (("eval/top1", "top1"), ("eval/eval_loss", "eval_loss"), ("eval/lr", "lr"), ("epoch", "epoch")):
        expected = [(int(row["update"]), pytest.approx(float(row[column]), rel=1e-6)) for row in read_rows(folder)]
        assert [(event.step, event.value) for event in scalars[tag]] == expected, tag


def test_wandb_offline_keeps_its_run_over_a_resume(tmp_path):
    command = words(DIGITS, RESNET, "--recovery-interval 3 --log-with wandb --name run --output", tmp_path)
    process = start_script("train_cls", tmp_path / "log", command)
    folder = tmp_path / "run"
    assert process.wait_for((folder / "checkpoints" / "update-00000003").exists), process.text
    process.kill(signal.SIGTERM)
    assert process.wait() == [75], process.text
    process = start_script("train_cls", tmp_path / "log", command, "--resume auto")
    assert process.wait() == [0], process.text
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({path.name.rsplit("-", 1)[1] for path in runs}) == 1
    logged = b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert b"eval/top1" in logged and b"by_train_seconds/top1" in logged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "run"]


# ---- variants of the model ----


def test_torch_compile_leaves_plain_names(tmp_path, tiny_teacher):
    folder = run(tmp_path, "run", "--torchcompile eager --epochs 1 --model-ema --kd-warmup 0 --teacher", tiny_teacher)
    for path in (folder / "model", folder / "best", folder / "checkpoints" / "update-00000004"):
        for file in path.glob("*.safetensors"):
            assert not [name for name in load_file(file) if "_orig_mod" in name]
    assert timm_top1(folder / "model") == pytest.approx(read_summary(folder)["last"])


def test_the_student_is_compiled_once_with_and_without_its_teacher(tmp_path, tiny_teacher):
    compiled = []  # for each graph, whether with gradients

    def counting(graph: torch.fx.GraphModule, inputs: list) -> object:
        compiled.append(torch.is_grad_enabled())
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(counting, name="counting")
    phase = "--kd-warmup 0 --kd-hold 0.5 --kd-decay 0 --evals-per-epoch 4"
    folder = run(tmp_path, "run", "--torchcompile counting --epochs 1", phase, "--teacher", tiny_teacher)
    assert [row["kd_active"] for row in read_rows(folder)] == ["1", "0", "0", "0"]
    assert compiled.count(True) == 1  # what trains, in the first update; the rest is the teacher and evaluations


@pytest.mark.parametrize("more", ["", "--model-ema --model-ema-decay 0.5"])
def test_channels_last(more, tmp_path, tiny_teacher):
    folder = run(tmp_path, "run", "--channels-last --epochs 1 --kd-warmup 0 --teacher", tiny_teacher, more)
    assert timm_top1(folder / "model") == pytest.approx(read_summary(folder)["last"])


def test_the_moving_average_is_evaluated_and_exported(tmp_path):
    folder = run(tmp_path, "run", "--model-ema --model-ema-decay 0.5 --epochs 1")
    assert read_summary(folder)["weights"] == "ema"
    checkpoint = folder / "checkpoints" / "update-00000004"
    exported, raw = load_file(folder / "model" / "model.safetensors"), checkpoint_tensors(checkpoint)
    average = checkpoint_tensors(checkpoint, "ema")
    assert exported.keys() == raw.keys() == average.keys()
    assert all(torch.equal(exported[name], average[name]) for name in exported)
    assert not torch.equal(exported["fc.weight"], raw["fc.weight"])
    assert timm_top1(folder / "model") == pytest.approx(read_summary(folder)["last"])


def test_an_export_with_another_stem_and_one_channel_is_a_teacher(tmp_path):
    """What train_cls.py writes is what --teacher takes, whatever the model."""
    grey = words("--in-chans 1 --small-stem --epochs 1")
    teacher = run(tmp_path, "teacher", grey)
    folder = run(tmp_path, "student", grey, "--kd-warmup 0 --teacher", teacher)
    assert read_summary(folder)["teacher"]["report"] == read_summary(teacher)["last"]


# ---- several teachers ----

QUICK = "--train-samples 256 --switch-split 0.1 --lr 1e-2 --no-aug --model-kwargs channels=(16,16,32,32) stem_width=16"
LADDER = (
    f"{QUICK} --epochs 4 --kd-weight 1 --kd-warmup 0 --kd-hold 3 --kd-decay 1 --kd-patience 1 --recovery-interval 5 "
    "--teacher"
)


@pytest.fixture(scope="module")
def rungs(tmp_path_factory) -> list[Path]:
    """A teacher that was never trained, one that hardly was, and one that knows something."""
    output = tmp_path_factory.mktemp("rungs")
    narrow = "--model-kwargs channels=(8,8,8,8) stem_width=8"
    return [
        run(output, "a", QUICK, narrow, "--epochs 1 --lr 1e-9"),
        run(output, "b", QUICK, narrow, "--epochs 1 --train-samples 128 --seed 1"),
        run(output, "c", QUICK, "--epochs 3 --model-kwargs channels=(16,16,32,32) stem_width=24"),
    ]


@pytest.fixture(scope="module")
def climbed(tmp_path_factory, rungs) -> tuple[Path, list]:
    """A run that passes its first teacher, skips the second and passes the third, with its forwards."""
    with forwards() as seen:
        folder = run(tmp_path_factory.mktemp("climbed"), "climbed", LADDER, rungs, "--target 20")
    return folder, seen


def test_teachers_hand_over_to_one_another(climbed, rungs):
    folder, seen = climbed
    summary, rows, log = read_summary(folder), read_rows(folder), (folder / "log.txt").read_text()
    weak, skipped, strong = summary["teachers"]
    assert [rung["checkpoint"] for rung in summary["teachers"]] == [str(rung / "model") for rung in rungs]
    assert [rung["report"] for rung in summary["teachers"]] == [read_summary(rung)["last"] for rung in rungs]
    passed = weak["off"]["update"]
    assert weak["off"]["reason"] == strong["off"]["reason"] == "surpass" and weak["since"]["update"] == 0
    assert skipped["off"] == {"epoch": passed / 8, "update": passed, "reason": "passed before it taught"}
    assert strong["since"] == skipped["since"] == {"epoch": passed / 8, "update": passed}
    assert summary["kd_off"] == strong["off"] and 0 < passed < strong["off"]["update"] < 32
    assert (weak["updates"], skipped["updates"]) == (passed, 0)
    assert strong["updates"] == strong["off"]["update"] - passed
    assert yaml.safe_load((folder / "args.yaml").read_text())["teacher"] == [str(rung) for rung in rungs]

    assert f"{rungs[0]} (surpass) hands over to {rungs[1]}" in log and f"{rungs[1]} is skipped" in log
    assert f"{rungs[1]} (passed before it taught) hands over to {rungs[2]}" in log
    row = next(row for row in rows if int(row["update"]) == passed + 8)
    assert float(row["kd_weight"]) == 1 and float(row["kd_temperature"]) == pytest.approx(6 - 5 / 4)

    flops, taught = summary["flops"], weak["pflops"] + strong["pflops"]
    assert weak["pflops"] == pytest.approx(passed * flops["teacher_forward"] / 1e15)
    assert strong["pflops"] / strong["updates"] > 2 * weak["pflops"] / weak["updates"], "each at its own cost"
    assert float(rows[-1]["pflops"]) == pytest.approx(32 * flops["student_update"] / 1e15 + taught)
    assert float(rows[-1]["teacher_seconds"]) == pytest.approx(weak["seconds"] + strong["seconds"])
    first = [i for i, (_, training, _) in enumerate(seen) if training]
    sizes = [{size for size, training, _ in seen[i : i + 2]} - {summary["params"]} for i in first]
    own = [set()] * (32 - strong["off"]["update"])
    assert sizes == [{weak["params"]}] * weak["updates"] + [{strong["params"]}] * strong["updates"] + own


def test_a_run_that_is_killed_under_each_teacher_ends_in_the_same_bits(climbed, rungs, tmp_path):
    whole, folder = climbed[0], tmp_path / "climbed"
    command = (LADDER, rungs, "--target 20 --resume auto")
    for rung in (0, 2):
        began = read_summary(whole)["teachers"][rung]
        reached = {f"update-{update:08d}" for update in range(began["since"]["update"] + 1, began["off"]["update"])}
        options = (DIGITS, RESNET, *command, "--name climbed --output", tmp_path)
        process = start_script("train_cls", tmp_path / "log", *options)
        assert process.wait_for(lambda reached=reached: reached & set(checkpoints(folder))), process.text
        process.kill()
        assert process.wait() == [-signal.SIGKILL], process.text
    run(tmp_path, "climbed", *command)
    assert (folder / "log.txt").read_text().count("resumed from") == 2
    assert_same_run(folder, whole)
    assert_same_teachers(folder, whole)


def assert_same_teachers(folder: Path, other: Path) -> None:
    ours, theirs = read_summary(folder)["teachers"], read_summary(other)["teachers"]
    assert [{**rung, "seconds": 0} for rung in ours] == [{**rung, "seconds": 0} for rung in theirs]


def test_a_signal_at_a_hand_over_ends_in_the_same_bits_without_the_teachers_that_are_passed(climbed, rungs, tmp_path):
    whole = climbed[0]
    params = read_summary(whole)["teachers"][2]["params"]
    own = [shutil.copytree(rung, tmp_path / "teachers" / rung.name) for rung in rungs]
    trained = False

    def see(module: torch.nn.Module, inputs: tuple) -> None:  # the score of the third one is being measured
        nonlocal trained
        if hasattr(module, "pretrained_cfg") and inputs[0].device.type != "meta":
            trained |= module.training
            if trained and not module.training and sum(p.numel() for p in module.parameters()) == params and not hit:
                hit.append(signal.raise_signal(signal.SIGTERM))

    hit: list = []
    command = (LADDER, own, "--target 20 --resume auto")
    with watching_forwards(see), pytest.raises(Preempted, match="--resume auto"):
        run(tmp_path, "climbed", *command)
    folder = tmp_path / "climbed"
    assert read_summary(folder)["status"] == "preempted"
    shutil.rmtree(own[0])
    run(tmp_path, "climbed", *command)
    assert_same_run(folder, whole)
    ours, theirs = read_summary(folder)["teachers"], read_summary(whole)["teachers"]
    assert [rung["off"] for rung in ours] == [rung["off"] for rung in theirs]


def test_two_processes_climb_as_one(rungs, tmp_path):
    """By windows that end between two evaluations, with all that is measured in training."""
    command = words(
        *(VIT, "--epochs 2 --kd-weight 1 --kd-warmup 0 --kd-hold 0.75 --kd-decay 0 --kd-balance --kd-fade"),
        *("--kd-off running --kd-patience 9 --switch-split 0 --teacher", rungs[0], rungs[2]),
    )
    one, log = run(tmp_path, "one", command), tmp_path / "log"
    started = start_script(
        "train_cls", log, DIGITS, command, "--batch-size 16 --name two --output", tmp_path, processes=2
    )
    assert started.wait() == [0, 0], started.text
    two = tmp_path / "two"
    assert read_summary(one)["kd_off"] == {"epoch": 1.5, "update": 6, "reason": "window"}
    assert_same_teachers(one, two)
    for row, other in zip(read_rows(one), read_rows(two), strict=True):
        assert row["pflops"] == other["pflops"] and row["kd_weight"] == other["kd_weight"]
        for column in ("train_loss", "task_loss", "kd_loss", "eval_loss"):
            assert float(row[column] or 0) == pytest.approx(float(other[column] or 0), abs=1e-4), column


def test_a_control_takes_the_place_of_each_teacher(rungs, tmp_path):
    options = "--epochs 1 --kd-control uniform --kd-off 0.5 --kd-warmup 0 --kd-hold 1 --kd-decay 0 --teacher"
    summary = read_summary(run(tmp_path, "run", options, rungs[0], rungs[2]))
    assert [rung["updates"] for rung in summary["teachers"]] == [2, 2]
    assert [rung["off"]["reason"] for rung in summary["teachers"]] == ["fixed", "fixed"]
    assert [rung["switch"] > 0 for rung in summary["teachers"]] == [True, True]
    assert [rung["pflops"] for rung in summary["teachers"]] == [0, 0], "it asks no teacher"


@pytest.mark.parametrize("what", ["a missing one", "other classes"])
def test_a_later_teacher_that_does_not_fit_is_refused_at_the_start(what, tiny_teacher, tmp_path):
    bad = tmp_path / "bad"
    if what == "other classes":
        export(create_model("resnet10t", 7, model_kwargs={"channels": (8, 8, 8, 8), "stem_width": 8}), bad)
    command = ("--teacher", tiny_teacher, bad, "--name run --output", tmp_path / "out")
    assert str(bad) in refusal(DIGITS, RESNET, *command)
    assert not (tmp_path / "out").exists()


def test_compare_pays_for_all_teachers_that_taught(climbed, rungs, tmp_path):
    folder, weak = climbed[0], rungs[0]
    arms = ("--arm", f"again={shutil.copytree(folder, tmp_path / 'again')}", "--arm", f"climbed={folder}")
    assert compare.main([str(word) for word in (*arms, "--out", tmp_path / "out")]) == 0
    paid = json.loads((tmp_path / "out" / "speedup.json").read_text())["costs"]["climbed"]
    spent = [float(read_rows(rung)[-1]["pflops"]) for rung in (weak, rungs[2])]
    assert paid["teacher_training"]["run"] == "a, c" and paid["teacher_training"]["pflops"] == pytest.approx(sum(spent))
    taught, flops = read_summary(folder)["teachers"], read_summary(folder)["flops"]["student_update"]
    forward = 1e15 * sum(rung["pflops"] for rung in taught) / sum(rung["updates"] for rung in taught)
    assert paid["flops_bound"] == pytest.approx(1 + forward / flops)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "3 teachers, teacher resnet10t" in report and "(passed before it taught)" in report
