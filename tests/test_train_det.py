"""train_det.py end to end on a handful of tiny canvases: both detectors, both arms, silence, faults, bad input."""

import contextlib
import json
import re
import shutil
import signal
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    COCO,
    DETECT,
    call_script,
    checkpoint_tensors,
    read_rows,
    read_summary,
    refused,
    signal_in_evaluation,
    start_script,
    timeless,
    under_a_scaler,
    weights_of,
)
from huggingface_hub import ModelCard
from PIL import Image
from torchvision.models.detection import FasterRCNN

import train_det
from w2s.detection.metric import COCO_METRICS
from w2s.detection.models import RetinaNet, export_detector, load_detector
from w2s.engine.errors import InputError, NonFiniteLoss, Preempted
from w2s.engine.optim import build_optimizer, scaled_lr
from w2s.engine.sharing import share_folder
from w2s.engine.training import Job
from w2s.teacher import Teacher

LOSSES = ("classification", "bbox_regression")
FASTER = "--detector fasterrcnn --detector-kwargs box_batch_size_per_image=16 rpn_post_nms_top_n_train=50 --epochs 1"
WEAK = "--model-kwargs channels=(8,8,8,8) stem_width=8 --fpn-channels 8"
TAUGHT = "--kd-weight 1 --kd-warmup 0.5 --kd-hold 0.5 --kd-decay 0.5 --kd-temperature 2 1 --kd-patience 9"
FASTER_TAUGHT = f"{TAUGHT} --kd-balance --kd-off running --kd-warmup 0 --kd-hold 1 --kd-decay 0 --name taught --teacher"


@contextlib.contextmanager
def stopped_at(update: int):
    """The run in here gets SIGTERM once so many updates are done, and ends saved."""
    step = Job.step

    def stepped(job, *losses):
        step(job, *losses)
        if job.update == update:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Job, "step", stepped), pytest.raises(Preempted):
        yield


@pytest.fixture(scope="module")
def teacher(digits_det, tmp_path_factory):
    """A finished run, small enough to be anyone's weak teacher."""
    output = tmp_path_factory.mktemp("teacher")
    call_script(train_det.main, DETECT, WEAK, "--epochs 1 --seed 7 --name weak --data", digits_det, "--output", output)
    return output / "weak"


@pytest.fixture(scope="module")
def baseline(digits_det, tmp_path_factory):
    output = tmp_path_factory.mktemp("baseline")
    more = "--target AP50=1 90 --log-with tensorboard --name run --data"
    call_script(train_det.main, DETECT, more, digits_det, "--output", output)
    return output / "run"


@pytest.fixture(scope="module")
def treated(digits_det, teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("treated")
    options = [DETECT, TAUGHT, "--target 1 --name run --data", digits_det, "--teacher", teacher]
    call_script(train_det.main, *options, "--output", output)
    return output / "run"


# ---- what a run leaves ----


def test_a_baseline(baseline):
    rows, summary = read_rows(baseline), read_summary(baseline)
    assert summary["task"] == "det" and summary["status"] == "finished" and summary["metric"] == "AP50"
    assert [row["epoch"] for row in rows] == ["1.0", "2.0"]
    assert set(summary["targets"]) == {"1", "90"} and summary["teacher"] is None
    assert summary["data"]["report"] == 7 and summary["data"]["switch"] > 0
    for row in rows:
        assert all(float(row[name]) >= -1 for name in COCO_METRICS[:6])
        parts = sum(float(row[name]) for name in LOSSES)
        assert parts == pytest.approx(float(row["task_loss"]), rel=1e-5)
        assert row["train_loss"] == row["task_loss"] and row["kd_loss"] == row["kd_cls"] == ""
    assert summary["flops"]["student_update"] > 0 and summary["flops"]["teacher_forward"] == 0
    assert list(baseline.glob("tensorboard/**/events*"))
    picture = np.asarray(Image.open(baseline / "predictions.png"))
    assert picture.shape[0] > 2 * 256 and picture.shape[1] > 7 * 256


def test_a_taught_run_falls_silent_at_the_end_of_its_window(treated, teacher):
    rows, summary = read_rows(treated), read_summary(treated)
    assert summary["teacher"]["checkpoint"] == str(teacher / "model")
    assert summary["teacher"]["model"] == "retinanet_resnet10t"
    assert summary["kd_off"]["reason"] == "window"
    assert summary["kd_off"]["epoch"] == pytest.approx(1.5, abs=1 / int(rows[0]["update"]))
    assert all(float(row[f"kd_{name}"]) > 0 for row in rows for name in ("cls", "box"))
    for row in rows:
        kd = float(row["kd_cls"]) + float(row["kd_box"])
        assert kd == pytest.approx(float(row["kd_loss"]), rel=1e-5)
    assert rows[0]["switch_AP50"] != "" and rows[1]["switch_AP50"] == ""
    assert summary["flops"]["teacher_forward"] > 0
    assert float(rows[1]["teacher_seconds"]) > 0


def test_teacher_is_scored_by_the_students_pipeline(treated, teacher):
    last = read_rows(teacher)[-1]
    assert read_summary(treated)["teacher"]["report"] == pytest.approx(float(last["AP50"]), abs=1e-9)


def test_weight_zero_is_bit_equal_to_no_teacher_and_never_calls_it(digits_det, teacher, baseline, tmp_path):
    options = [DETECT, "--kd-weight 0 --kd-off never --name run --target AP50=1 90 --data", digits_det]
    forward = RetinaNet.head_outputs
    with mock.patch.object(RetinaNet, "head_outputs", autospec=True, side_effect=forward) as head_outputs:
        call_script(train_det.main, *options, "--teacher", teacher, "--teacher-score 99 --output", tmp_path)
    assert head_outputs.call_count == 1, "once to count its FLOPs"
    assert weights_of(tmp_path / "run") == weights_of(baseline)


def test_surpass_switches_off_for_good(digits_det, teacher, tmp_path):
    def always_fifty(args, run, model, split):
        return dict.fromkeys(COCO_METRICS, 50.0), [np.zeros((0, 6))] * len(split)

    options = [DETECT, "--kd-warmup 0 --kd-hold 2 --kd-decay 0 --kd-patience 1 --data", digits_det]
    forward = RetinaNet.head_outputs
    with (
        mock.patch.object(RetinaNet, "head_outputs", autospec=True, side_effect=forward) as head_outputs,
        mock.patch.object(train_det, "validate", always_fifty),
    ):
        call_script(train_det.main, *options, "--teacher", teacher, "--teacher-score 49 --name run --output", tmp_path)
    summary, rows = read_summary(tmp_path / "run"), read_rows(tmp_path / "run")
    assert summary["kd_off"]["epoch"] == 1 and summary["status"] == "finished"
    assert [row["kd_active"] for row in rows] == ["0", "0"] and rows[1]["kd_loss"] == ""
    assert head_outputs.call_count == int(rows[0]["update"]) + 1  # and once to count its FLOPs


def test_teachers_hand_over_to_one_another(digits_det, teacher, baseline, tmp_path):
    """At the end of a window between two evaluations, for which the run saves and both are compared."""
    options = [DETECT, "--epochs 1 --kd-warmup 0 --kd-hold 0.34 --kd-decay 0 --data", digits_det]
    call_script(train_det.main, *options, "--teacher", teacher, baseline, "--name run --output", tmp_path)
    summary, rows = read_summary(tmp_path / "run"), read_rows(tmp_path / "run")
    weak, strong = summary["teachers"]
    updates = int(rows[0]["update"])
    hand_over = weak["off"]["update"]
    assert 0 < hand_over < updates and weak["off"]["reason"] == strong["off"]["reason"] == "window"
    assert strong["since"]["update"] == hand_over and summary["kd_off"] == strong["off"]
    assert weak["updates"] == strong["updates"] == hand_over
    assert strong["report"] == pytest.approx(read_summary(baseline)["last"], abs=1e-9)
    flops = updates * summary["flops"]["student_update"] / 1e15 + weak["pflops"] + strong["pflops"]
    assert float(rows[0]["pflops"]) == pytest.approx(flops) and strong["pflops"] > 1.2 * weak["pflops"]


def test_a_compiled_teacher_is_gone_once_it_is_released(digits_det, teacher, tmp_path):
    build_teacher, release, models, left = train_det.build_teacher, Teacher.release, [], []

    def watched(*args):
        built = build_teacher(*args)
        models.append(weakref.ref(built.model))
        return built

    def released(self):
        release(self)
        left.append(models[-1]())

    options = [DETECT, "--dry-run --kd-warmup 0 --kd-hold 0.3 --kd-decay 0 --torchcompile eager --data", digits_det]
    with mock.patch.object(train_det, "build_teacher", watched), mock.patch.object(Teacher, "release", released):
        call_script(train_det.main, *options, "--teacher", teacher, "--output", tmp_path)
    assert left == [None], "main's own frame holds it no longer"


@pytest.fixture(scope="module")
def faster(digits_det, tmp_path_factory):
    """A folder with a Faster R-CNN `weak` and one that it `taught`."""
    output = tmp_path_factory.mktemp("faster")
    common = (train_det.main, DETECT, FASTER, "--output", output, "--data", digits_det)
    call_script(*common, WEAK, "--name weak")
    call_script(*common, FASTER_TAUGHT, output / "weak")
    return output


def test_faster_rcnn_both_arms(faster):
    (checkpoint,) = (faster / "taught" / "checkpoints").iterdir()
    student, teacher, count = json.loads((checkpoint / "state.json").read_text())["running"]
    assert 0 < student < float("inf") and 0 < teacher < float("inf") and count > 1  # --kd-off running compared them
    row = read_rows(faster / "taught")[-1]
    assert all(float(row[f"kd_{name}"]) > 0 for name in ("rpn_cls", "rpn_box", "roi_cls"))
    names = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    assert sum(float(row[name]) for name in names) == pytest.approx(float(row["task_loss"]), rel=1e-5)
    assert load_detector(str(faster / "taught"))[0].first_label == 1


@pytest.mark.parametrize(("batch_size", "tolerance"), [(8, 1e-6), (1, 0.1)])
def test_eval_only_prints_the_twelve_metrics_of_the_run(batch_size, tolerance, baseline, digits_det, tmp_path, capsys):
    """The run's own batches are 8 images. Batches of another size may round differently, and so let two detections of
    almost equal score change places."""
    options = ["--eval-only --name again --check-images 0 --workers 0 --validation-batch-size", str(batch_size)]
    options += ["--data", digits_det, "--initial-checkpoint", baseline]
    call_script(train_det.main, *options, "--output", tmp_path)
    metrics, row = json.loads(capsys.readouterr().out), read_rows(baseline)[-1]
    assert tuple(metrics) == COCO_METRICS
    assert metrics["AP50"] == pytest.approx(float(row["AP50"]), abs=tolerance) and metrics["AP50"] > 2 * tolerance
    assert isinstance(json.loads((tmp_path / "again" / "detections.json").read_text()), list)
    assert (tmp_path / "again" / "predictions.png").is_file()


def test_a_shared_run_is_evaluated_as_it_was(baseline, digits_det, tmp_path, capsys):
    folder = share_folder(shutil.copytree(baseline, tmp_path / "run"))
    options = ["--eval-only --check-images 0 --workers 0 --validation-batch-size 8 --data", digits_det]
    call_script(train_det.main, *options, "--initial-checkpoint", folder, "--output", tmp_path)
    assert json.loads(capsys.readouterr().out)["AP50"] == pytest.approx(read_summary(baseline)["last"], abs=1e-6)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "object-detection" and card.data.eval_results[0].metric_name == "AP50"
    assert "retinanet on resnet10t" in card.text and "train_det.py --eval-only --initial-checkpoint" in card.text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (64, 64)),
        ("--min-size 32", (32, 64)),
        ("--max-size 48 --min-size 48", (48, 48)),
        ("--max-size 96", (64, 96)),
    ],
)
def test_eval_only_keeps_the_runs_image_size_unless_the_command_line_names_another(
    words, expected, baseline, digits_det, tmp_path
):
    (tmp_path / "recipe.yaml").write_text("min-size: 40\nmax-size: 200\n")
    validate = mock.Mock(return_value=({}, []))
    options = ["-c", tmp_path / "recipe.yaml", words, "--eval-only --check-images 0 --name size --data", digits_det]
    with mock.patch.multiple(train_det, validate=validate, write_detections=mock.Mock(), draw_predictions=mock.Mock()):
        call_script(train_det.main, *options, "--initial-checkpoint", baseline, "--output", tmp_path)
    _, _, model, _ = validate.call_args.args
    assert (*model.transform.min_size, model.transform.max_size) == expected


def test_eval_only_without_a_name_writes_beside_the_model(baseline, digits_det, tmp_path):
    shutil.copytree(baseline / "model", tmp_path / "some" / "model")
    (tmp_path / "val").mkdir()
    for part in ("val2017", "annotations"):  # it needs no training images
        (tmp_path / "val" / part).symlink_to(digits_det / part)
    options = ["--eval-only --check-images 0 --workers 0 --output", tmp_path / "out", "--data", tmp_path / "val"]
    call_script(train_det.main, *options, "--initial-checkpoint", tmp_path / "some")
    assert (tmp_path / "some" / "detections.json").is_file() and (tmp_path / "some" / "predictions.png").is_file()
    assert not (tmp_path / "out").exists()


def test_eval_only_of_a_weights_file_takes_the_detector_from_the_options(baseline, digits_det, tmp_path, capsys):
    weights = tmp_path / "some" / "weights.safetensors"
    weights.parent.mkdir()
    shutil.copy(baseline / "model" / "model.safetensors", weights)
    call_script(
        train_det.main, DETECT, "--eval-only --initial-checkpoint", weights, "--data", digits_det, "--output", tmp_path
    )
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["AP50"] == pytest.approx(float(read_rows(baseline)[-1]["AP50"]), abs=1e-6)
    assert (weights.parent / "detections.json").is_file()


def test_a_dry_run_leaves_nothing(digits_det, tmp_path, capfd):
    more = "--dry-run --lsj 64 --photometric --model-ema --grad-accum-steps 2 --clip-grad 1 --channels-last --data"
    call_script(train_det.main, DETECT, more, digits_det, "--output", tmp_path / "out")
    assert "done: AP50" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_no_step_is_fused_under_a_scaler(digits_det, tmp_path):
    with under_a_scaler() as steps:
        call_script(train_det.main, DETECT, "--dry-run --data", digits_det, "--output", tmp_path)
    assert steps == [False] * 3


@pytest.mark.parametrize(("detector", "lr"), [("retinanet", 0.01), ("fasterrcnn", 0.02)])
def test_the_defaults_are_torchvisions_reference(detector, lr):
    args = train_det.build_parser().parse_recipe(["--detector", detector])
    train_det.resolve(args)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    assert scaled_lr(args, 16) == lr and scaled_lr(args, 32) == 2 * lr
    assert (args.min_size, args.max_size) == (800, 1333)
    warmup = train_det.reference_warmup(args, lr, 7000)
    optimizer, scheduler = build_optimizer(args, model, lr=lr, length=args.epochs, updates_per_unit=7000, **warmup)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD and len(group["params"]) == 4
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 1e-4)
    expected = {0: lr / 1000, 500: lr * 1.001 / 2, 1000: lr, 15 * 7000: lr, 16 * 7000: lr / 10, 25 * 7000: lr / 100}
    for update, value in expected.items():
        scheduler.step_update(update)
        assert group["lr"] == pytest.approx(value, rel=1e-6)
    short = train_det.reference_warmup(args, lr, 50)
    assert short["warmup"] == 49 / 50, "the first epoch, but for its last update"
    assert args.warmup_epochs is None and args.warmup_lr is None, "as args.yaml shall have them"


# ---- faults ----


def test_sigterm_saves_and_exits_75(digits_det, baseline, tmp_path):
    parts = (DETECT, "--target AP50=1 90 --log-with tensorboard --name run --data", digits_det, "--output", tmp_path)
    started = start_script("train_det", tmp_path / "log", *parts, "--recovery-interval 2")
    assert started.wait_for((tmp_path / "run" / "checkpoints" / "update-00000004").exists), started.text
    started.kill(signal.SIGTERM)
    assert started.wait() == [75], started.text
    assert read_summary(tmp_path / "run")["status"] == "preempted"
    call_script(train_det.main, *parts, "--recovery-interval 2 --resume auto")
    assert weights_of(tmp_path / "run") == weights_of(baseline)


def test_killed_within_an_epoch_it_ends_in_the_same_bits(digits_det, teacher, treated, tmp_path):
    parts = (DETECT, TAUGHT, "--target 1 --name run --data", digits_det, "--teacher", teacher)
    parts += ("--output", tmp_path, "--recovery-interval 2 --resume auto")
    started = start_script("train_det", tmp_path / "log", *parts)
    assert started.wait_for((tmp_path / "run" / "checkpoints" / "update-00000004" / "state.json").exists), started.text
    started.kill(signal.SIGKILL)
    started.wait()
    call_script(train_det.main, *parts)
    assert "resumed from" in (tmp_path / "run" / "log.txt").read_text()
    assert weights_of(tmp_path / "run") == weights_of(treated)
    assert timeless(tmp_path / "run") == timeless(treated)


def test_faster_rcnn_stopped_within_an_epoch_and_an_evaluation_ends_in_the_same_bits(digits_det, faster, tmp_path):
    parts = (train_det.main, DETECT, FASTER, FASTER_TAUGHT, faster / "weak", "--resume auto --data", digits_det)
    with stopped_at(3):
        call_script(*parts, "--output", tmp_path)
    in_evaluation = signal_in_evaluation(1, lambda module: isinstance(module, FasterRCNN))
    with in_evaluation as evaluated, pytest.raises(Preempted, match="saved at update 7"):
        call_script(*parts, "--validation-batch-size 2 --output", tmp_path)
    assert evaluated == [2, 2]  # of seven images
    call_script(*parts, "--output", tmp_path)
    assert "resumed from" in (tmp_path / "taught" / "log.txt").read_text()
    assert weights_of(tmp_path / "taught") == weights_of(faster / "taught")
    assert timeless(tmp_path / "taught") == timeless(faster / "taught")


@pytest.mark.skipif(not COCO.is_dir(), reason="the COCO subset is not there")
def test_photographs_are_trained_on_and_evaluated_and_a_stop_changes_no_bit(tmp_path, capsys):
    truth = json.loads((COCO / "annotations" / "instances_train2017.json").read_text())
    truth["images"] = [i for i in truth["images"] if any(a["image_id"] == i["id"] for a in truth["annotations"])][:4]
    ids = {image["id"] for image in truth["images"]}
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
    (tmp_path / "four.json").write_text(json.dumps(truth))
    data = ["--fix-boxes --train-images", COCO / "train2017", "--train-json", tmp_path / "four.json"]
    data += ["--val-images", COCO / "train2017", "--val-json", tmp_path / "four.json"]
    parts = (train_det.main, DETECT, "--batch-size 2 --switch-split 0 --resume auto --name run", *data, "--output")
    with stopped_at(3):
        call_script(*parts, tmp_path / "stopped")
    for name in ("stopped", "straight"):
        call_script(*parts, tmp_path / name)
    ours, theirs = (tmp_path / name / "run" for name in ("stopped", "straight"))
    assert weights_of(ours) == weights_of(theirs) and timeless(ours) == timeless(theirs)
    assert [row["update"] for row in read_rows(ours)] == ["2", "4"]
    capsys.readouterr()
    call_script(*parts, tmp_path / "straight", "--eval-only")
    metrics, last = json.loads(capsys.readouterr().out), read_rows(theirs)[-1]
    assert [metrics[name] for name in COCO_METRICS[:6]] == [
        pytest.approx(float(last[name])) for name in COCO_METRICS[:6]
    ]


def test_the_twelve_metrics_are_the_same_on_one_process_and_on_three(baseline, digits_det, tmp_path):
    """Seven images; every box counts, however unsure this small model is."""
    model, _ = load_detector(str(baseline))
    model.config.detector_kwargs = {"score_thresh": 0.0}
    export_detector(model, tmp_path / "model")
    parts = ("--eval-only --workers 0 --check-images 0 --validation-batch-size 2 --data", digits_det)
    parts += ("--initial-checkpoint", tmp_path, "--output", tmp_path)
    printed, written = [], []
    for count in (1, 3):
        started = start_script("train_det", tmp_path / f"log{count}", *parts, "--name", f"of{count}", processes=count)
        assert started.wait() == [0] * count, started.text
        printed += [json.loads(line) for line in started.text.splitlines() if line.startswith("{")]
        written.append(json.loads((tmp_path / f"of{count}" / "detections.json").read_text()))
    assert len(printed) == 2 and tuple(printed[0]) == COCO_METRICS and printed[0]["AP50"] > 0
    # the batches are the same, so at most rounding differs: scores to 1e-5, boxes to 0.001 px, and in the metrics (in
    # percent) two detections of almost equal score may have changed places
    assert printed[1] == pytest.approx(printed[0], abs=0.1)
    alone, together = written
    assert [d["image_id"] for d in together] == [d["image_id"] for d in alone]
    scores = [torch.tensor([d["score"] for d in detections]) for detections in written]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-5)
    for ours, theirs in zip(together, alone, strict=True):
        if ours["category_id"] == theirs["category_id"]:  # else they have changed places
            assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)


def test_two_processes_train_as_one(digits_det, teacher, tmp_path):
    parts = (DETECT, TAUGHT, "--epochs 1 --kd-hold 0 --opt sgd --lr 1e-2 --data", digits_det, "--teacher", teacher)
    parts += ("--output", tmp_path, "--recovery-interval 1 --checkpoint-hist 99")
    started = start_script("train_det", tmp_path / "log", *parts, "--batch-size 2 --name two", processes=2)
    call_script(train_det.main, *parts, "--name one")
    assert started.wait() == [0, 0], started.text
    # early on, where rounding is all that may differ: later a ReLU within rounding of 0 falls to the other side
    for update in ("update-00000001", "update-00000003"):
        ours, theirs = (checkpoint_tensors(tmp_path / n / "checkpoints" / update) for n in ("one", "two"))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    rows = [read_rows(tmp_path / name)[0] for name in ("one", "two")]
    assert rows[0]["update"] == rows[1]["update"] and rows[0]["lr"] == rows[1]["lr"]
    assert float(rows[0]["task_loss"]) == pytest.approx(float(rows[1]["task_loss"]), rel=1e-5)
    one, two = (read_summary(tmp_path / name)["teacher"] for name in ("one", "two"))
    assert (one["model"], one["checkpoint"]) == (two["model"], two["checkpoint"])
    # its metrics in percent, of the same batches of 7 images: rounding may swap two detections of almost equal score
    assert (two["report"], two["switch"]) == pytest.approx((one["report"], one["switch"]), abs=0.1)


def test_a_non_finite_loss_ends_the_run(digits_det, tmp_path):
    with pytest.raises(NonFiniteLoss, match="not finite"):
        call_script(train_det.main, DETECT, "--opt sgd --lr 1e20 --name run --data", digits_det, "--output", tmp_path)
    assert read_summary(tmp_path / "run")["status"] == "failed"


# ---- bad input ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data nowhere", "no such folder"),
        ("--data digits_det --model resnet51", "unknown model 'resnet51'"),
        ("--data digits_det --detector-kwargs topk_candidates=-1", "topk_candidates is a number from 1 up, got -1"),
        ("--data {data} --strides 3", "no stride 3"),
        ("--data {data} --norm ln", "--norm ln"),
        ("--data {data} --min-size 100", "--min-size 100 is above --max-size 64"),
        ("--data {data} --detector yolo", "invalid choice: 'yolo'"),
        ("--data {data} --target top1=3", "the reported metric of this run is AP50"),
        ("--data {data} --target AP50=120", "AP50 lies above 0 and up to 100"),
        ("--data {data} --batch-size 64", "fewer than one update of 64"),
        ("--data {data} --lsj 64 --scale-jitter 32 64", "exclude each other"),
        ("--data {data} --hflip 2", r"--hflip: takes a number in \[0, 1\], got 2"),
        ("--data {data} --anchor-scale 0", "--anchor-scale: takes a finite number above 0, got 0"),
        ("--data {data} --detector-kwargs num_classes=7", "'num_classes' follows from the other options"),
        ("--data {data} --scale-jitter 64 32", "takes LOW and HIGH"),
        ("--data {data} --scale-jitter 1 32", "--scale-jitter 1: give at least 32 pixels"),
        ("--data {data} --lsj 1", "--lsj 1: images shrink to a tenth of it"),
        ("--data {data} --teacher nowhere", "--teacher nowhere: no such run folder or file"),
        ("--data {data} --teacher {teacher} --strides 4 8", r"does not line up: its strides: \[8, 16\]"),
        ("--data {data} --teacher {teacher} --anchor-scale 4", "does not line up: its anchor sides"),
        ("--data {data} --teacher {teacher} --detector fasterrcnn", "does not line up: its detector"),
        ("--data {data} --teacher {teacher} --switch-split 0", "--switch-split 0 leaves no images to score"),
        ("--data {data} --teacher {teacher} --kd-hold 9", "longer than the run of 2"),
        ("--data {data} --teacher-score 3 --teacher {teacher} --resume nowhere", "is no checkpoint"),
        ("--data {data} --eval-only --name none", "holds no exported model"),
    ],
)
def test_bad_input_is_refused_before_any_work(words, message, digits_det, teacher, tmp_path):
    words = words.format(data=digits_det, teacher=teacher)
    with pytest.raises(InputError, match=message) as error:
        call_script(train_det.main, DETECT, words, "--output", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_built_in_digits_stay_where_a_run_begins_and_not_where_it_is_refused(tmp_path, monkeypatch):
    small = {"train": 12, "val": 2, "size": 64, "digits": 2, "seed": 0}
    monkeypatch.setattr("w2s.detection.digits.PARAMETERS", small)
    parts = (train_det.main, DETECT, "--epochs 1 --data digits_det --output", tmp_path / "out")
    with refused("12 training images are fewer than one update of 64", "--batch-size"):
        call_script(*parts, "--batch-size 64 --switch-split 0")
    assert not (tmp_path / "out").exists()
    call_script(*parts, "--name run")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"digits_det", "run"}
    train = tmp_path / "out" / "digits_det" / "annotations" / "instances_train2017.json"
    assert json.loads(train.read_text())["info"] == small


def other_classes(digits_det, teacher, tmp_path) -> list:
    """Options of a run whose data and teacher differ in the name of a class; alone they are refused."""
    folder = tmp_path / "data"
    (folder / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (folder / f"{part}2017").symlink_to(digits_det / f"{part}2017")
        name = f"instances_{part}2017.json"
        truth = json.loads((digits_det / "annotations" / name).read_text())
        truth["categories"][1]["name"] = "eins"
        (folder / "annotations" / name).write_text(json.dumps(truth))
    options = [
        DETECT,
        TAUGHT,
        "--epochs 1 --kd-decay 0 --data",
        folder,
        "--teacher",
        teacher,
        "--output",
        tmp_path / "out",
    ]
    with pytest.raises(InputError, match=r"of their names agree.*--teacher-classes"):
        call_script(train_det.main, *options)
    return options


def test_a_file_of_classes_lets_it_teach_those_that_are_shared(digits_det, teacher, tmp_path):
    options = other_classes(digits_det, teacher, tmp_path)
    others = [name for name in load_detector(str(teacher))[0].config.classes if name != "1"]
    (tmp_path / "map.json").write_text(json.dumps({name: name for name in others}))
    options += ["--teacher-classes", tmp_path / "map.json", "--name"]
    with refused("--kd-off running compares losses", "classes that the teacher does not know"):
        call_script(train_det.main, *options, "run --kd-off running")
    assert not (tmp_path / "out" / "run").exists()
    call_script(train_det.main, *options, "run")
    folder = tmp_path / "out" / "run"
    assert f"knows {len(others)} of the {len(others) + 1} classes" in (folder / "log.txt").read_text()
    losses = [float(row[column]) for row in read_rows(folder) for column in ("kd_cls", "kd_box") if row[column]]
    assert losses and all(0 < loss < float("inf") for loss in losses)


def test_args_yaml_is_a_recipe(baseline, digits_det):
    args = train_det.build_parser().parse_recipe(["-c", str(baseline / "args.yaml")])
    assert args.data == str(digits_det) and args.strides == [8, 16] and args.extra_levels == 0
    assert yaml.safe_load((baseline / "args.yaml").read_text())["norm"] == "gn"


def test_controls_teach_in_the_teachers_place(digits_det, teacher, tmp_path, capsys):
    """A few updates each; the term is there, and another one each time."""
    terms = set()
    for kind in ("--kd-control shuffled", "--kd-control random"):
        options = ["--kd-warmup 0 --log-interval 1 --dry-run --data", digits_det, "--teacher", teacher, kind]
        call_script(train_det.main, DETECT, *options, "--output", tmp_path)
        terms.add(tuple(re.findall(r"x kd (\S+)", capsys.readouterr().err)))
    assert len(terms) == 2 and all(len(run) == 3 and all(float(term) > 0 for term in run) for run in terms)
