"""FSDP2 on two CPU processes: the same training as DDP's and one process's, evaluated, exported, killed and resumed.

Classification shows all of it; detection and denoising show what is their own: odd numbers of images and samples, the
losses that detectors compute in their forward, proposals, and the forwards of a sampler.
"""

import signal
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    DETECT,
    DIGITS,
    ROOT,
    VIT,
    Started,
    call_script,
    checkpoint_tensors,
    free_port,
    on_processes,
    read_rows,
    read_summary,
    run_script,
    start_script,
    timeless,
    watching_forwards,
    weights_of,
    words,
)

import train_cls
import train_det
import train_diffusion
from w2s.detection.config import DETECTOR_KINDS
from w2s.detection.metric import COCO_METRICS
from w2s.detection.models import load_detector
from w2s.diffusion.exports import load_denoiser
from w2s.engine.tensors import tensor_names

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# 20 updates of 32 images with every kind of state: a moving average, clipped gradients, dropout, mixup, and a teacher
# from update 0 to 12; the 597 images of an evaluation make 3 batches for the one process and 2 for the other
TRAINING = words(
    DIGITS,
    VIT,
    "--batch-size 16 --epochs 5 --validation-batch-size 149 --no-channels-last --clip-grad 1",
    "--model-ema --model-ema-decay 0.9 --drop 0.1 --mixup 0.2 --recovery-interval 6 --checkpoint-hist 9",
    "--kd-warmup 0.5 --kd-hold 2 --kd-decay 0.5 --kd-patience 99",
)
LOSSES, METRICS = ("train_loss", "task_loss", "kd_loss", "eval_loss"), ("top1", "top5", "switch_top1")


def started(folder: Path, script: str, command: list[str], processes: int, sharded: bool) -> Started:
    """The run of this folder, begun or gone on with."""
    command = words(command, "--output", folder.parent, "--name", folder.name, "--resume auto")
    env = SHARDED if sharded else None
    return start_script(script, folder.parent / f"{folder.name}.log", command, processes=processes, env=env)


def ended(folder: Path, script: str, command: list[str], processes: int, sharded: bool) -> Path:
    """The folder of a run that has ended by itself."""
    process = started(folder, script, command, processes, sharded)
    assert process.wait() == [0] * processes, process.text
    return folder


def interrupted(folder: Path, script: str, command: list[str], processes: int, sharded: bool, update: int) -> None:
    """Kill a run once it has saved this update."""
    process = started(folder, script, command, processes, sharded)
    state = folder / "checkpoints" / f"update-{update:08d}" / "state.json"
    assert process.wait_for(state.exists), process.text
    process.kill()
    process.wait()
    assert read_summary(folder)["status"] == "running"


def trained(output: Path, name: str, teacher: Path, processes: int = 1, sharded: bool = False, more: str = "") -> Path:
    """The folder of a run of train_cls.py that has ended by itself."""
    return ended(output / name, "train_cls", words(TRAINING, "--teacher", teacher, more), processes, sharded)


def killed(output: Path, name: str, teacher: Path, update: int, processes: int = 1, sharded: bool = False) -> None:
    """Have a run of train_cls.py go on, and kill it once it has saved this update."""
    interrupted(output / name, "train_cls", words(TRAINING, "--teacher", teacher), processes, sharded, update)


def assert_alike(run: Path, other: Path, losses: tuple[str, ...] = LOSSES, metrics: tuple[str, ...] = METRICS) -> None:
    """Losses equal to within rounding at every evaluation, and all but these and the metrics, which follow, equal."""
    rounded = {*losses, *metrics}
    for row, expected in zip(timeless(run), timeless(other), strict=True):
        assert {k: row[k] for k in row.keys() - rounded} == {k: expected[k] for k in row.keys() - rounded}
        for column in losses:
            assert float(row[column] or 0) == pytest.approx(float(expected[column] or 0), abs=1e-5), column
    assert read_summary(run)["kd_off"] == read_summary(other)["kd_off"]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def sharded(output, tiny_teacher) -> Path:
    """A run that was sharded over two processes from its beginning to its end."""
    return trained(output, "sharded", tiny_teacher, processes=2, sharded=True)


def test_sharded_weights_train_as_those_of_ddp_and_of_one_process(output, sharded, tiny_teacher):
    pair = trained(output, "pair", tiny_teacher, processes=2)
    one = trained(output, "one", tiny_teacher, more="--grad-accum-steps 2")
    assert_alike(sharded, pair)
    assert_alike(sharded, one)
    assert len(read_rows(sharded)) == 5 and int(read_rows(sharded)[-1]["update"]) == 20
    assert (read_summary(sharded)["environment"]["sharding"], read_summary(pair)["environment"]["sharding"]) == (
        "fsdp2",
        None,
    )


def test_a_ratio_of_gradients_is_that_of_ddp(tmp_path, tiny_teacher):
    """The outputs that FSDP2 watches for its own backward are those whose gradients are measured."""
    more = "--epochs 3 --kd-balance --grad-accum-steps 2 --batch-size 8"
    sharded = trained(tmp_path, "sharded", tiny_teacher, processes=2, sharded=True, more=more)
    assert_alike(sharded, trained(tmp_path, "pair", tiny_teacher, processes=2, more=more))
    assert [float(row["kd_weight"]) > 0 for row in read_rows(sharded)] == [True, True, False]


def test_each_process_writes_what_it_alone_holds_and_the_main_one_exports_all(sharded):
    path = sharded / "checkpoints" / "update-00000020"
    assert {file.name for file in path.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert {name.partition(".")[0] for name in tensor_names(path)} == {"student", "ema", "optimizer"}
    assert checkpoint_tensors(path)["head.weight"].shape == (10, 32)


def test_the_exported_model_is_the_one_that_was_evaluated(sharded, capsys):
    call_script(train_cls.main, "--eval-only --output", sharded.parent, "--name sharded")
    found = yaml.safe_load(capsys.readouterr().out.strip().splitlines()[-1])
    row = read_rows(sharded)[-1]
    assert found["eval_loss"] == pytest.approx(float(row["eval_loss"]), abs=1e-5)
    assert found["top1"] == pytest.approx(float(row["top1"]), abs=0.2)


def test_killed_and_resumed_by_as_many_processes_it_ends_in_the_same_bits(tmp_path, sharded, tiny_teacher):
    killed(tmp_path, "again", tiny_teacher, 6, processes=2, sharded=True)
    again = trained(tmp_path, "again", tiny_teacher, processes=2, sharded=True)
    assert timeless(again) == timeless(sharded)
    assert weights_of(again) == weights_of(sharded)


def test_killed_it_goes_on_with_one_process_with_two_of_ddp_and_sharded_again(tmp_path, sharded, tiny_teacher):
    killed(tmp_path, "moved", tiny_teacher, 4, processes=2, sharded=True)
    killed(tmp_path, "moved", tiny_teacher, 8, processes=1)
    killed(tmp_path, "moved", tiny_teacher, 12, processes=2)
    moved = trained(tmp_path, "moved", tiny_teacher, processes=2, sharded=True)
    assert_alike(moved, sharded)
    assert read_summary(moved)["environment"]["earlier_processes"] == [2, 1]


def test_a_signal_to_one_process_ends_the_evaluation_of_both(tmp_path, tiny_teacher):
    command = words(TRAINING, "--validation-batch-size 1 --teacher", tiny_teacher, "--output", tmp_path, "--name run")
    process = start_script("train_cls", tmp_path / "log", command, processes=2, env=SHARDED)
    state = tmp_path / "run" / "checkpoints" / "update-00000004" / "state.json"
    assert process.wait_for(state.exists), process.text
    process.kill(signal.SIGTERM, rank=1)
    assert process.wait(60) == [75, 75], process.text
    assert read_rows(tmp_path / "run") == []


def teacher_is_gone(accelerator, argv: list[str]) -> bool:
    """Whether the teacher's weights have been freed at the end of a run, in which it has been called."""
    seen = []

    def see(module: torch.nn.Module, inputs: tuple) -> None:
        if hasattr(module, "pretrained_cfg") and module.pretrained_cfg["architecture"] == "resnet10t":
            seen.extend(weakref.ref(parameter) for parameter in module.parameters() if not seen)

    with watching_forwards(see):
        train_cls.main(argv)
    return len(seen) > 0 and all(ref() is None for ref in seen)


def test_the_switch_off_frees_the_teacher(tmp_path, tiny_teacher, monkeypatch):
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    command = words(TRAINING, "--epochs 4 --teacher", tiny_teacher, "--output", tmp_path, "--name run")
    assert on_processes(2, teacher_is_gone, command, env=SHARDED) == [True, True]
    assert read_summary(tmp_path / "run")["kd_off"]["update"] == 12


# ---- the other scripts ----

# 10 updates of 16 images with a teacher up to the eighth; the 9 samples make 2 batches for one process and 1 for the
# other. Without NHWC, in whose order dropout would be drawn where weights are not sharded
DENOISING = words(
    "--dataset digits --train-samples 64 --batch-size 8 --workers 0 --updates 10 --eval-interval 10 --lr 1e-3",
    "--model nc8-rb1 --model-kwargs channel_mult=(1,2) attention=(4,) dropout=0.1 --no-channels-last --clip-grad 1",
    "--model-ema-decay 0.9 --fd-samples 9 --sample-steps 2 --validation-batch-size 4 --switch-split 0.1",
    "--opt adamw --recovery-interval 5",
)
EARLY = "--no-kd-balance --kd-weight 2 --kd-warmup 2 --kd-hold 4 --kd-decay 2 --kd-patience 99"


def test_a_sharded_denoiser_is_trained_sampled_killed_and_resumed_as_a_whole_one(tmp_path, tiny_teacher):
    common = words(DENOISING, "--fd-features", tiny_teacher, "--fd-cache", tmp_path / "cache")
    weak = words("--updates 2 --eval-interval 2 --seed 7 --name weak --output", tmp_path)
    call_script(train_diffusion.main, common, weak)
    common += words(EARLY, "--teacher", tmp_path / "weak")
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    interrupted(sharded, "train_diffusion", common, 2, True, update=5)
    ended(sharded, "train_diffusion", common, 2, True)
    call_script(train_diffusion.main, common, "--grad-accum-steps 2 --name whole --output", tmp_path)
    distances = [name for name in read_rows(whole)[0] if "fd9" in name or "mmd9" in name]
    assert_alike(sharded, whole, losses=LOSSES[:3], metrics=tuple(distances))
    # a pixel whose value is rounded to the uint8 beside it moves a distance by some 1e-4 of itself
    for row, expected in zip(read_rows(sharded), read_rows(whole), strict=True):
        for name in distances:
            assert float(row[name] or 0) == pytest.approx(float(expected[name] or 0), rel=1e-2), name
    assert "resumed from" in (sharded / "log.txt").read_text() and (sharded / "samples.png").exists()
    average = checkpoint_tensors(sharded / "checkpoints" / "update-00000010", "ema")
    exported = load_denoiser(str(sharded))[0].state_dict()
    assert all(torch.equal(average[name], tensor) for name, tensor in exported.items())


# 7 updates of 4 images with a teacher from update 0 to 5; of the 7 images to report on, one process has 4 in 2 batches
# and the other 3 in 1. Later a ReLU within rounding of 0 falls to the other side, on all of the blank canvas at once
DETECTING = words(
    DETECT,
    "--batch-size 2 --epochs 1 --validation-batch-size 3 --opt sgd --lr 2e-3 --clip-grad 1",
    "--model-ema --model-ema-decay 0.9 --recovery-interval 4 --no-channels-last",
)
DETECTORS = {
    "retinanet": "",
    "fasterrcnn": "--detector fasterrcnn --detector-kwargs box_batch_size_per_image=16 rpn_post_nms_top_n_train=50",
}
EARLY_EPOCHS = "--kd-weight 1 --kd-warmup 0.2 --kd-hold 0.3 --kd-decay 0.2 --kd-patience 99"


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_sharded_detector_is_trained_evaluated_killed_and_resumed_as_a_whole_one(tmp_path, digits_det, detector):
    common = words(DETECTING, DETECTORS[detector], "--data", digits_det)
    call_script(train_det.main, common, "--seed 7 --name weak --output", tmp_path)
    common += words(EARLY_EPOCHS, "--teacher", tmp_path / "weak")
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    if detector == "retinanet":
        interrupted(sharded, "train_det", common, 2, True, update=4)
    ended(sharded, "train_det", common, 2, True)
    call_script(train_det.main, common, "--grad-accum-steps 2 --name whole --output", tmp_path)
    losses = (*LOSSES[:3], *DETECTOR_KINDS[detector].loss_columns)
    assert_alike(sharded, whole, losses=losses, metrics=(*COCO_METRICS, "switch_AP50"))
    for row, expected in zip(read_rows(sharded), read_rows(whole), strict=True):
        for name in COCO_METRICS[:6]:  # in percent; two detections of almost equal score may have changed places
            assert float(row[name]) == pytest.approx(float(expected[name]), abs=0.5), name
    average = checkpoint_tensors(sharded / "checkpoints" / "update-00000007", "ema")
    exported = load_detector(str(sharded))[0].state_dict()
    assert all(torch.equal(average[name], tensor) for name, tensor in exported.items())


# ---- the launch ----


def test_the_launcher_shards_as_the_config_says(tmp_path):
    config = yaml.safe_load((ROOT / "recipes/accelerate/fsdp.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no", "main_process_port": free_port()}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(config))
    done = run_script(
        "train_cls", DIGITS, VIT, "--epochs 1 --name run --output", tmp_path, processes=2, config=tmp_path / "fsdp.yaml"
    )
    assert done.returncode == 0, done.stderr
    assert read_summary(tmp_path / "run")["environment"]["sharding"] == "fsdp2"


def test_deepspeed_is_refused(tmp_path):
    env = {"ACCELERATE_USE_DEEPSPEED": "true"}
    process = start_script("train_cls", tmp_path / "log", DIGITS, VIT, "--name run --output", tmp_path / "out", env=env)
    assert process.wait() == [2]
    (line,) = [line for line in process.text.splitlines() if line.startswith("error: ")]
    assert "DeepSpeed" in line and "FSDP2" in line and "recipes/accelerate/fsdp.yaml" in line
    assert not (tmp_path / "out").exists()
