"""The benchmark runs the real updates and counts what they cost; how long they take is not tested."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import bench
import beside
import growth
import pytest
import reference_loops
from helpers import DETECT, DIGITS, FOLDER, RESNET, ROOT, TEACHER, call_script, image_folder, words

import train_cls
from w2s.detection.config import DetectorConfig
from w2s.detection.models import build_detector, export_detector
from w2s.diffusion.denoisers import unet
from w2s.diffusion.exports import export_denoiser
from w2s.diffusion.process import noise_schedule
from w2s.engine.errors import InputError


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> tuple[dict, str, Path]:
    """What a short benchmark wrote and printed, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("bench")
    call_script(train_cls.main, DIGITS, TEACHER, "--epochs 1 --name teacher --output", folder)
    command = words(DIGITS, RESNET, "--name bench --rounds 2 --round-updates 2 --output", folder, "--json")
    with redirect_stdout(StringIO()) as printed:
        call_script(bench.main, command, folder / "b.json", "--teacher", folder / "teacher")
    return json.loads((folder / "b.json").read_text()), printed.getvalue(), folder


def test_the_bound_is_that_of_the_flops(figures):
    flops = figures[0]["flops_per_update"]
    assert flops["plain"] == flops["after"] < flops["teacher"]
    assert figures[0]["flops_bound"] == flops["teacher"] / flops["plain"]


def test_flops_are_those_of_a_run(figures):
    summary = json.loads((figures[2] / "teacher" / "summary.json").read_text())
    ratio = (figures[0]["flops_per_update"]["teacher"] - figures[0]["flops_per_update"]["plain"]) / summary["flops"][
        "student_update"
    ]
    assert ratio == pytest.approx(1 / 3, rel=0.03)  # a forward is a third of an update, but for the first layer


def test_further_knowledge_costs_what_its_branches_cost(figures):
    """A linear map from the student's 16 features to the teacher's 8, forward and backward, for 32 images."""
    folder = figures[2]
    command = words(DIGITS, RESNET, "--kd-term nd --kd-target taid", ONCE, folder, "--teacher", folder / "teacher")
    call_script(bench.main, command, "--json", folder / "term.json")
    flops, before = (json.loads((folder / f"{name}.json").read_text())["flops_per_update"] for name in ("term", "b"))
    assert flops == before | {"teacher": before["teacher"] + 3 * 2 * 16 * 8 * 32}


def test_all_that_others_read_is_there(figures):
    names = ("teacher_ratio", "after_ratio", "loader_images_per_second", "step_images_per_second")
    assert all(figures[0][name] > 0 for name in names)
    for part in ("images_per_second", "utilisation", "memory_bytes"):
        assert set(figures[0][part]) == {"plain", "teacher", "after"}
    assert "teacher / plain" in figures[1] and "loader" in figures[1]


def test_nothing_is_kept(figures):
    assert not (figures[2] / "bench").exists()


def test_a_benchmark_without_a_teacher_is_refused():
    with pytest.raises(InputError, match="--teacher"):
        call_script(bench.main, DIGITS, RESNET)
    with pytest.raises(InputError, match="--kd-control: a benchmark"):
        call_script(bench.main, DIGITS, RESNET, "--teacher nowhere --kd-control random")
    with pytest.raises(InputError, match="a benchmark times one --teacher"):
        call_script(bench.main, DIGITS, RESNET, "--teacher weak strong")


# ---- the other scripts, and the libraries' own loops beside them ----

ONCE = "--rounds 1 --round-updates 1 --name bench --output"


@pytest.fixture
def denoiser(tmp_path) -> list:
    """Options of train_diffusion.py: a teacher without any training, and a student for it."""
    weak = unet("nc8-rb1", 8, in_chans=1, channel_mult=(1,), attention=())
    export_denoiser(weak, noise_schedule(), tmp_path / "weak" / "model")
    model = "--model nc8-rb1 --model-kwargs channel_mult=(1,2) attention=(4,) --fd-samples 4 --sample-steps 2"
    return words("--dataset digits --train-samples 64 -b 8 --workers 0", model, "--teacher", tmp_path / "weak")


@pytest.fixture
def detector(digits_det, tmp_path) -> list:
    """Options of train_det.py: a teacher without any training, and a student for it."""
    config = DetectorConfig(
        "retinanet",
        backbone="resnet10t",
        classes=list("0123456789"),
        norm="gn",
        strides=[8, 16],
        extra_levels=0,
        anchor_scale=2.0,
        fpn_channels=8,
        min_size=64,
        max_size=64,
        model_kwargs={"channels": (8, 8, 8, 8), "stem_width": 8},
    )
    export_detector(build_detector(config), tmp_path / "weak" / "model")
    return words(DETECT, "--data", digits_det, "--teacher", tmp_path / "weak")


@pytest.mark.parametrize("task", ["detector", "denoiser"])
def test_all_is_measured_for_the_other_scripts_too(task, tmp_path, monkeypatch, request):
    monkeypatch.setattr(bench, "WARMUP", 1)
    call_script(bench.main, request.getfixturevalue(task), ONCE, tmp_path, "--json", tmp_path / "b.json")
    figures = json.loads((tmp_path / "b.json").read_text())
    assert all(figures[name] > 0 for name in ("teacher_ratio", "after_ratio", "loader_images_per_second"))
    assert set(figures["images_per_second"]) == {"plain", "teacher", "after"}
    flops = figures["flops_per_update"]
    assert 0 < flops["plain"] == flops["after"] < flops["teacher"]


def test_classification_beside_timms_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WARMUP", 1)
    data = words(FOLDER, image_folder(tmp_path / "data"), "--pad-crop 2 --color-jitter 0")
    call_script(train_cls.main, TEACHER, data, "--name weak --output", tmp_path)
    command = words("cls", RESNET, data, "--teacher", tmp_path / "weak", ONCE, tmp_path)
    call_script(beside.main, command, "--json", tmp_path / "b.json")
    figures = json.loads((tmp_path / "b.json").read_text())
    ours, theirs, held = {"plain", "teacher"}, {"reference", "reference_teacher"}, {"plain_held", "bare_held"}
    assert set(figures["images_per_second"]) == ours | theirs | held
    assert figures["cache"] == "device" and figures["loader_ratio"] > 0
    with pytest.raises(InputError, match="no mixup"):
        call_script(beside.main, command, "--mixup 0.2")


def test_detection_beside_torchvisions_loop(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WARMUP", 1)
    command = words("det", detector, ONCE, tmp_path, "--json")
    losses = []
    monkeypatch.setattr(reference_loops.Meters, "update", lambda self, **values: losses.append(values))
    call_script(beside.main, command, tmp_path / "b.json")
    figures = json.loads((tmp_path / "b.json").read_text())
    assert set(figures["seconds_per_update"]) == {"plain", "teacher", "reference"}
    assert 1 < figures["flops_bound"] < 4 / 3 and figures["reference_ratio"] > 0
    assert set(losses[0]) == {"loss", "classification", "bbox_regression", "lr"}  # torchvision's own, and nothing else
    assert losses[0]["loss"] == losses[0]["classification"] + losses[0]["bbox_regression"]


def test_diffusion_beside_diffusers_loop_and_pipeline(denoiser, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WARMUP", 1)
    call_script(beside.main, "diffusion", denoiser, ONCE, tmp_path, "--json", tmp_path / "b.json")
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["flops_bound"] > 1 and figures["sampling_reference_ratio"] > 0
    with pytest.raises(InputError, match="without classes"):
        call_script(beside.main, "diffusion", denoiser, "--class-cond", ONCE, tmp_path)


def test_growth_changes_one_thing_at_a_time():
    settings = growth.settings_of([128, 32], img_sizes=[32, 64, 96], processes=[1, 2])
    first, *others = settings
    assert first == (128, 32, 1) and len(set(settings)) == 5
    assert all(sum(a != b for a, b in zip(first, other, strict=True)) == 1 for other in others)


COUNTS_PROCESSES = """
import json, sys
from accelerate import Accelerator
accelerator = Accelerator()
if accelerator.is_main_process:
    with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
        json.dump({"processes": accelerator.num_processes, "argv": sys.argv[1:5]}, file)
"""


def test_growth_starts_as_many_processes_as_it_says(tmp_path, monkeypatch):
    script = tmp_path / "bench.py"
    script.write_text(COUNTS_PROCESSES)
    monkeypatch.setattr(growth, "BENCHMARK", script)
    monkeypatch.setattr(growth.torch.cuda, "is_available", lambda: False)  # two processes may share no GPU
    figures = growth.measure(growth.Setting(batch_size=8, img_size=16, processes=2), options=[])
    assert figures == {"processes": 2, "argv": ["--batch-size", "8", "--img-size", "16"]}


def test_the_benchmark_of_any_recipe_is_that_of_its_script():
    names = {"digits_w2s": "cls", "digits_det_w2s": "det", "digits_diffusion_w2s": "diffusion"}
    names |= {"imagenet_vit_s_r50": "cls", "coco_fasterrcnn_r50_w2s": "det", "cifar10_nc128rb3_w2s": "diffusion"}
    for recipe, name in names.items():
        assert bench.task_of(["-c", str(ROOT / "recipes" / f"{recipe}.yaml"), "--json", "x"]).name == name
    assert bench.task_of(["--data=coco", "--help"]).name == "det"
