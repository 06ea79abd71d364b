"""Every recipe says how to start it, parses, is fair to its counterpart, and really runs a few updates.

The recipes are found, not listed, so that a new one is tested by being there. Each runs with its own model, optimiser,
schedule, augmentation and data format; only the images are a handful of 8 px digits, written in that format.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import nbclient
import nbformat
import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from helpers import ON_CPU, ROOT, TIMEOUT, call_script, read_summary, words
from PIL import Image
from sklearn.datasets import load_digits

import train_cls
import train_det
from w2s.detection.models import build_detector, export_detector
from w2s.diffusion.denoisers import unet
from w2s.diffusion.exports import export_denoiser
from w2s.diffusion.process import noise_schedule
from w2s.images.models import create_model, export

FOLDER = ROOT / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
BASELINES = [name for name in RECIPES if name.endswith("_baseline")]
TAUGHT = [name for name, path in RECIPES.items() if "teacher" in yaml.safe_load(path.read_text())]
CONFIGS = sorted((FOLDER / "accelerate").glob("*.yaml"))
TINY_DETECTOR = (
    "--no-pretrained-backbone --min-size 64 --max-size 64 --fpn-channels 16 --model resnet10t "
    "--model-kwargs channels=(8,8,16,16) stem_width=8"
)
# what has to agree for teacher and student to hold out the same images
SPLIT_OPTIONS = (
    "dataset",
    "data_dir",
    "data",
    "train_split",
    "target_key",
    "switch_split",
    "switch_seed",
    "num_classes",
)


def head(path: Path) -> str:
    """The comment that a recipe begins with, one line for a command that goes on after a backslash."""
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]).replace("\\\n#", "")


def commands(path: Path) -> list[str]:
    return [line for line in head(path).splitlines()[:6] if "accelerate launch" in line or "python" in line]


def script_of(name: str) -> str:
    """The training script that a recipe's own launch line starts."""
    own = [line for line in commands(RECIPES[name]) if re.search(rf"-c recipes/{name}\.yaml(\s|$)", line)]
    assert own, f"no launch line of {name} in its first comment lines"
    return re.search(r"\b(train_\w+)\.py ", own[0])[1]


def parse(name: str, *argv: str):
    parser = importlib.import_module(script_of(name)).build_parser()
    return parser.parse_recipe(["-c", str(RECIPES[name]), *argv])


def is_distillation(key: str) -> bool:
    return key == "teacher" or key.startswith(("teacher-", "kd-"))


# ---- what is written in them ----


def test_there_are_recipes():
    assert {"cifar10_r50_w2s", "imagenet_r50_r18", "digits_w2s"} <= set(RECIPES)
    assert len(CONFIGS) == 6


@pytest.mark.parametrize("name", RECIPES)
def test_parses_and_names_its_launch_line(name):
    args = parse(name)
    assert {k.replace("-", "_") for k in yaml.safe_load(RECIPES[name].read_text())} <= set(vars(args))
    for line in commands(RECIPES[name]):
        for mentioned in re.findall(r"recipes/\S+?\.(?:yaml|sh)", line):
            assert (ROOT / mentioned).is_file(), f"{name}: {mentioned} is not there"


@pytest.mark.parametrize("baseline", BASELINES)
def test_arms_differ_in_the_distillation_only(baseline):
    stem = baseline.removesuffix("_baseline")
    treated = [name for name in (stem, f"{stem}_w2s") if name in RECIPES]
    assert treated, f"{baseline} has no counterpart"
    plain = yaml.safe_load(RECIPES[baseline].read_text())
    assert not any(map(is_distillation, plain))
    for name in treated:
        taught = yaml.safe_load(RECIPES[name].read_text())
        assert {k: v for k, v in taught.items() if not is_distillation(k)} == plain
        assert taught["teacher"]
        # nor by a default that one of the two scripts has and the other has not
        assert script_of(name) == script_of(baseline)


@pytest.mark.parametrize("name", TAUGHT)
def test_teacher_can_be_had(name):
    args = parse(name)
    made = re.fullmatch(r"output/(\w+)-seed\d+(?:/best)?", args.teacher)
    if not made:  # a published model, which has seen the switch split: its held-out score is needed
        import timm

        assert args.teacher in timm.list_pretrained(args.teacher.partition(".")[0] + "*")
        assert args.teacher_score is not None
        return
    maker = made[1]
    assert maker in RECIPES, f"no recipe makes {args.teacher}"
    assert maker in head(RECIPES[name]), f"{name} does not say that {maker} comes first"
    makers = parse(maker)
    assert {k: getattr(makers, k, None) for k in SPLIT_OPTIONS} == {k: getattr(args, k, None) for k in SPLIT_OPTIONS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts_the_config(path):
    config = load_config_from_file(str(path))
    line = commands(path)[0]
    ranks = ["--machine_rank=0", "--main_process_ip=HOST"] if "--machine_rank" in line else []
    argv = ["--config_file", str(path), *ranks, "train_cls.py", "-c", "x.yaml"]
    args, _, from_file = _validate_launch_command(launch_command_parser().parse_args(argv))
    processes, precision = {
        "cpu": (1, "no"),
        "cpu_two": (2, "no"),
        "one_gpu": (1, "bf16"),
        "one_node_8gpu": (8, "bf16"),
        "two_nodes": (16, "bf16"),
        "fsdp": (8, "bf16"),
    }[path.stem]
    assert (args.num_processes, args.mixed_precision, from_file) == (processes, precision, True)
    assert (args.multi_gpu, args.use_fsdp) == (processes > 1 and path.stem != "fsdp", path.stem == "fsdp")
    assert args.use_cpu == path.stem.startswith("cpu")
    assert config.num_machines == int(args.num_machines) == (2 if path.stem == "two_nodes" else 1)
    assert f"recipes/accelerate/{path.name}" in line


# ---- they run ----


@pytest.fixture(scope="session")
def digits() -> list[tuple[Image.Image, int]]:
    """Eight images of each digit."""
    data = load_digits()
    rows = [row for label in range(10) for row in np.flatnonzero(data.target == label)[:8]]
    images = (data.images[rows] * (255 / 16)).astype(np.uint8)
    return [(Image.fromarray(image), int(label)) for image, label in zip(images, data.target[rows], strict=True)]


@pytest.fixture(scope="session")
def image_folder(digits, tmp_path_factory) -> Path:
    """train/ and val/ with a folder a class, as ImageNet comes."""
    root = tmp_path_factory.mktemp("folder")
    for i, (image, label) in enumerate(digits):
        folder = root / ("val" if i % 8 >= 6 else "train") / f"n{label:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def hub_folder(digits, tmp_path_factory) -> Path:
    """Parquet files with the columns that CIFAR-10 and CIFAR-100 have on the hub."""
    root = tmp_path_factory.mktemp("hub")
    label = datasets.ClassLabel(num_classes=10)
    features = datasets.Features({"img": datasets.Image(), "label": label, "fine_label": label})
    for split, kept in (("train", lambda i: i % 8 < 6), ("test", lambda i: i % 8 >= 6)):
        rows = [(image, label) for i, (image, label) in enumerate(digits) if kept(i)]
        images, labels = zip(*rows, strict=True)
        columns = {"img": list(images), "label": list(labels), "fine_label": list(labels)}
        datasets.Dataset.from_dict(columns, features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture(scope="session")
def weak_teacher(tmp_path_factory) -> Path:
    """An exported model of ten classes at 32 px."""
    folder = tmp_path_factory.mktemp("weak") / "model"
    model = create_model("resnet10t", 10, model_kwargs={"channels": [8, 8, 8, 8], "stem_width": 8})
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 1.0}
    export(model, folder)
    return folder


def weak_denoiser(args, folder: Path) -> Path:
    """A denoiser of the recipe's process at 8 px."""
    process = noise_schedule(args.betas, args.diffusion_steps, args.prediction)
    export_denoiser(unet("nc8-rb1", 8, 1 if args.dataset == "digits" else 3), process, folder / "model")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_runs_dry(name, request, tmp_path, capfd):
    """`python SCRIPT.py -c RECIPE --dry-run` on a handful of images in the recipe's data format."""
    script, args = script_of(name), parse(name)
    kinds = {"train_cls": small_images, "train_det": small_detection, "train_diffusion": small_denoising}
    small = kinds[script](args, request, tmp_path)
    main = importlib.import_module(script).main

    call_script(main, ["-c", RECIPES[name], *small], "--workers 0 --dry-run --output", tmp_path / "out")

    said = capfd.readouterr().err
    assert f"{name}-seed0: " in said
    assert "3 updates" in said
    assert "done: " in said
    assert ("distillation: lambda" in said) == bool(args.teacher)
    assert not (tmp_path / "out").exists()


def small_detection(args, request, tmp_path: Path) -> list:
    """COCO recipes on a tiny backbone, and a pyramid to match: theirs take minutes here."""
    small = words("--data", request.getfixturevalue("digits_det"), "--batch-size 4 --check-images 0")
    if args.data == "coco":
        small += words(TINY_DETECTOR)
    if args.teacher:
        config = train_det.resolve(train_det.build_parser().parse_recipe(["-c", args.config, *small]))
        config.classes = [str(digit) for digit in range(10)]
        folder = tmp_path / "weak"
        export_detector(build_detector(config), folder)
        small += ["--teacher", folder, "--teacher-score", "50"]
    return small


def small_images(args, request, tmp_path: Path) -> list:
    data = []
    if args.dataset.startswith("hfds/"):
        data = ["--dataset", f"hfds/{request.getfixturevalue('hub_folder')}", "--data-dir", tmp_path / "cache"]
        data += ["--val-split", "test"]
    elif not args.dataset:
        data = ["--data-dir", request.getfixturevalue("image_folder")]
    else:
        assert args.dataset == "digits"
    if args.train_samples:
        data += ["--train-samples", "40"]
    if args.teacher:
        data += ["--teacher", request.getfixturevalue("weak_teacher")]
    return words(data, "--img-size 32 --batch-size 4 --grad-accum-steps 1")


def small_denoising(args, request, tmp_path: Path) -> list:
    """Samples of 8 px, judged on the features of a small classifier."""
    small = words(
        "--img-size 8 --batch-size 4 --grad-accum-steps 1 --fd-features", request.getfixturevalue("weak_teacher")
    )
    if args.dataset.startswith("hfds/"):
        small += ["--dataset", f"hfds/{request.getfixturevalue('hub_folder')}", "--data-dir", tmp_path / "cache"]
    if args.train_samples:
        small += ["--train-samples", "40"]
    if args.teacher:
        small += ["--teacher", weak_denoiser(args, tmp_path / "teacher")]
    return small


# ---- slurm.sh ----

SLURM = FOLDER / "slurm.sh"
DECISIONS = {  # (status, written by this launch, crashes so far) -> what to do
    ("finished", "yes", 1): "done",
    ("finished", "no", 1): "done",  # it was finished before
    ("preempted", "yes", 1): "requeue",
    ("preempted", "yes", 3): "requeue",
    ("preempted", "no", 1): "refused",  # the status of an earlier launch: this one did not begin
    ("failed", "yes", 1): "failed",
    ("failed", "no", 1): "refused",
    ("running", "yes", 1): "retry",
    ("running", "yes", 2): "retry",
    ("running", "yes", 3): "hopeless",
    ("running", "no", 1): "refused",
    ("none", "no", 1): "refused",  # bad input: there is no run folder
    ("none", "yes", 1): "retry",  # half a file
}


def bash(code: str, *argv: object, **env: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, **{k: str(v) for k, v in env.items()}}
    return subprocess.run(
        ["bash", "-c", code, "bash", *map(str, argv)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_shell_syntax(path):
    done = bash('bash -n "$1"', path)
    assert (done.returncode, done.stderr) == (0, "")


def test_slurm_decides_by_status_and_by_who_wrote_it():
    calls = "\n".join(f"decide {status} {written} {crashes}" for status, written, crashes in DECISIONS)
    done = bash(f". recipes/slurm.sh\n{calls}")
    assert dict(zip(DECISIONS, done.stdout.split(), strict=True)) == DECISIONS
    assert done.stderr == ""


def test_slurm_reads_the_status(tmp_path):
    summary, other = tmp_path / "summary.json", tmp_path / "other.json"
    code = '. recipes/slurm.sh; status_of "$1"; version_of "$1"'
    assert bash(code, summary).stdout.split() == ["none", "absent"]
    summary.write_text('{"status": "preempted", "best": null}')
    status, first = bash(code, summary).stdout.split("\n", 1)
    assert status == "preempted"
    assert bash(code, summary).stdout.split("\n", 1)[1] == first
    other.write_text(summary.read_text())
    other.rename(summary)  # the same words, written anew
    assert bash(code, summary).stdout.split("\n", 1)[1] != first
    summary.write_text('{"status": ')
    assert bash(code, summary).stdout.split()[0] == "none"


def test_slurm_wants_a_script_a_recipe_and_no_name():
    for argv in ("", "train_cls.py", "train_cls.py x.yaml --name y", "train_cls.py x.yaml --seed=1"):
        done = bash(f"bash recipes/slurm.sh {argv}")
        assert done.returncode == 2, argv
        assert len(done.stderr.splitlines()) == 1


SRUN = """#!/usr/bin/env bash
# for srun: a node is a process group on this machine
echo "srun" >> "$CALLS"
until [ "$1" = bash ]; do shift; done
SLURM_NODEID=0 setsid "$@" & group=$!
if [ ! -e "$CALLS.signalled" ] && [ -n "$SIGNAL_WHEN" ]; then
    until [ -e "$SIGNAL_WHEN" ] || ! kill -0 "$group" 2> /dev/null; do sleep 0.1; done
    touch "$CALLS.signalled"
    kill -TERM -- "-$group"
fi
wait "$group"; code=$?
while kill -0 -- "-$group" 2> /dev/null; do sleep 0.1; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") echo node1 ;;
    "show node") echo "NodeName=node1 NodeAddr=127.0.0.1 NodeHostName=node1" ;;
    *) echo "scontrol $*" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path) -> dict:
    """The environment of a job of one node, on which only SLURM's own commands are not the real ones."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        "TOOLS": tools,
        "CALLS": tmp_path / "calls",
        "SIGNAL_WHEN": "",
        "SLURM_NNODES": 1,
        "SLURM_GPUS_ON_NODE": 1,
        "SLURM_JOB_ID": 77,
        "SLURM_JOB_NODELIST": "node[1]",
        "ACCELERATE_CONFIG": "recipes/accelerate/cpu.yaml",
        "OUTPUT": tmp_path / "out",
    }


def submit(cluster: dict, recipe: Path) -> tuple[int, list[str], str]:
    """The exit code of slurm.sh, the SLURM commands it has called so far, and what was printed."""
    done = bash('PATH=$TOOLS:$PATH; bash recipes/slurm.sh train_cls.py "$1"', recipe, **cluster)
    return done.returncode, cluster["CALLS"].read_text().splitlines(), done.stdout + done.stderr


TINY = {
    "dataset": "digits",
    "train-samples": 400,
    "img-size": 16,
    "model": "resnet10t",
    "model-kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8},
    "batch-size": 8,
    "epochs": 2,
    "workers": 0,
}


def test_slurm_saves_queues_again_and_finishes(cluster, tmp_path):
    """Signalled in the middle, it comes back and ends; the codes of the launcher say nothing of this."""
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "out" / "tiny-seed0"
    recipe.write_text(yaml.safe_dump({**TINY, "recovery-interval": 5}))
    code, calls, said = submit({**cluster, "SIGNAL_WHEN": run / "checkpoints" / "update-00000005"}, recipe)
    assert (code, calls) == (0, ["srun", "scontrol requeue 77"]), said
    assert yaml.safe_load((run / "summary.json").read_text())["status"] == "preempted"
    code, calls, said = submit(cluster, recipe)
    assert (code, calls[2:]) == (0, ["srun"]), said
    assert yaml.safe_load((run / "summary.json").read_text())["status"] == "finished"
    assert "resumed from" in said


def test_slurm_does_not_repeat_bad_input(cluster, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "bach-size": 8}))
    code, calls, said = submit(cluster, recipe)
    assert (code, calls) == (2, ["srun"]), said
    assert "bach-size" in said
    assert not (tmp_path / "out").exists()


# ---- the recipes that run many arms ----

# for python: notes what it is asked to train or compare and does nothing
NOTES = """#!/usr/bin/env bash
case "$1" in
    -c) exec "$REAL" "$@" ;;
    *) echo "$*" >> "$CALLS"; [[ "$*" != *"$FAILS"* ]] || { echo "error: as told" >&2; exit 2; } ;;
esac
"""


def many(tmp_path: Path, script: str, *argv: str, **env: object) -> tuple[list[str], subprocess.CompletedProcess]:
    """What a script would run, in the order of its words."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").write_text(NOTES)
    (tools / "python").chmod(0o755)
    here = {"TOOLS": tools, "CALLS": tmp_path / "calls", "REAL": sys.executable, "VIRTUAL_ENV": sys.prefix}
    env = {"OUTPUT": tmp_path / "out", "SEEDS": "0 1", "FAILS": "nothing"} | here | env
    done = bash('PATH=$TOOLS:$PATH; bash "recipes/$@"', script, *argv, **env)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return [call for call in calls if not call.startswith("-m pip")], done


def parsed(calls: list[str]) -> list:
    """The trainings among calls, through the script's own parser."""
    return [train_cls.build_parser().parse_recipe(call.split()[1:]) for call in calls if call.startswith("train_cls")]


def test_a_failed_run_ends_the_others_and_the_script(tmp_path):
    """The one beside it hears of it and may save; no other one begins."""
    code = """
    set -euo pipefail
    export logs=$1/logs
    . recipes/pool.sh
    start beside bash -c 'trap "touch $logs/told; exit 1" TERM; touch $logs/there; for i in {1..50}; do sleep .1; done'
    until [ -e "$logs/there" ]; do sleep 0.1; done
    start bad bash -c 'seq 3 >&2; echo why >&2; exit 3'
    start late touch "$logs/late"
    finish
    """
    done = bash(code, tmp_path, JOBS=2)
    assert (done.returncode, done.stdout, done.stderr) == (1, "beside\nbad\n", "2\n3\nwhy\n")
    assert (tmp_path / "logs" / "told").exists() and not (tmp_path / "logs" / "late").exists()


@pytest.mark.parametrize(("code", "returned"), [(3, 0), (2, 1)])
def test_a_run_may_fail_in_one_way_where_the_script_says_so(code, returned, tmp_path):
    text = f"""
    set -euo pipefail
    logs=$1/logs may_fail=3
    . recipes/pool.sh
    start bad bash -c 'exit {code}'
    finish
    echo over
    """
    done = bash(text, tmp_path)
    assert (done.returncode, "over" in done.stdout) == (returned, returned == 0), done.stderr


def test_as_many_runs_at_a_time_as_jobs_and_one_may_be_waited_for(tmp_path):
    code = """
    set -euo pipefail
    export logs=$1 JOBS=2
    . recipes/pool.sh
    start long bash -c 'until [ -e "$logs/go" ]; do sleep 0.05; done'
    start short sleep 0.1
    finish short
    wc -w <<< "$running"
    jobs=1
    (sleep 0.3; touch "$logs/go") &
    start next test -e "$logs/go"
    finish
    echo "over: $running"
    """
    done = bash(code, tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["long", "short", "1", "next", "over:"]), done.stderr


@pytest.mark.parametrize(("script", "runs"), [("quickstart.sh", 5), ("digits_det.sh", 10), ("digits_diffusion.sh", 8)])
def test_every_run_begins_with_its_recipe_once(script, runs, tmp_path):
    calls, done = many(tmp_path, script)
    assert done.returncode == 0, done.stderr
    trained = [call for call in calls if call.startswith("train_")]
    assert len(trained) == len(set(trained)) == runs
    for call in trained:
        parser = importlib.import_module(call.split(".")[0]).build_parser()
        assert parser.parse_recipe(call.split()[1:]).resume == "auto"


def test_quickstart_on_cifar10_takes_a_folder(tmp_path):
    calls, done = many(tmp_path, "quickstart.sh", "cifar10", str(tmp_path))
    assert done.returncode == 0, done.stderr
    runs = parsed(calls)
    assert {run.dataset for run in runs} == {f"hfds/{tmp_path}"}
    assert {Path(run.config).stem for run in runs} == {f"cifar10_muon_{arm}" for arm in ("teacher", "baseline", "w2s")}
    assert {run.teacher for run in runs} == {None, f"{tmp_path}/out/cifar10_muon_teacher-seed0"}
    assert calls[-1].startswith(f"-m w2s.compare --arm baseline={tmp_path}/out/cifar10_muon_baseline-seed0 ")
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/out/cifar10_muon/curves.png"


@pytest.mark.parametrize("words", [("imagenet",), ("cifar10", "/no/such/folder"), ("digits", "/tmp")])
def test_quickstart_refuses_what_it_does_not_know(words, tmp_path):
    done = bash(f"bash recipes/quickstart.sh {' '.join(words)}", OUTPUT=tmp_path / "no")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "no").exists()


def test_controls_runs_every_arm_and_compares_them(tmp_path):
    calls, done = many(tmp_path, "controls.sh")
    assert done.returncode == 0, done.stderr
    teacher, *runs = parsed(calls)
    assert (teacher.name, Path(teacher.config).stem) == (None, "digits_teacher")
    found = {run.name: (run.kd_control, run.kd_off, bool(run.teacher), run.seed) for run in runs}
    arms = {"baseline": (None, "surpass", False), "w2s": (None, "surpass", True)}
    arms |= {kind: (kind, "surpass", True) for kind in ("shuffled", "uniform", "labels", "random")}
    arms |= {"never": (None, "never", True), "fixed": (None, 8.0, True)}
    assert found == {f"digits_{arm}-seed{seed}": (*facts, seed) for arm, facts in arms.items() for seed in (0, 1)}
    assert {run.teacher for run in runs} == {None, f"{tmp_path}/out/digits_teacher-seed0"}
    assert all(run.resume == "auto" for run in (teacher, *runs))
    compared = [f"--arm {arm}={tmp_path}/out/digits_{arm}-seed{seed}" for arm in arms for seed in (0, 1)]
    assert calls[-1] == f"-m w2s.compare {' '.join(compared)} --out {tmp_path}/out/digits_controls"


def test_controls_on_cifar10_hands_on_options_and_adds_a_short_schedule(tmp_path):
    calls, done = many(tmp_path, "controls.sh", "cifar10", "--dataset", "hfds/here", SEEDS=3)
    assert done.returncode == 0, done.stderr
    runs = parsed(calls)
    assert {run.dataset for run in runs} == {"hfds/here"} and len(runs) == 10
    assert {run.name: run.epochs for run in runs}["cifar10_cpu_short-seed3"] == 4
    assert "short" not in calls[-2] and "--allow epochs grid" in calls[-1] and "short" in calls[-1]


def test_controls_stops_where_a_run_fails(tmp_path):
    calls, done = many(tmp_path, "controls.sh", FAILS="--kd-control labels", SEEDS=0)
    assert done.returncode == 1 and done.stderr == "error: as told\n"
    assert not [call for call in calls if "w2s.compare" in call]
    assert bash("bash recipes/controls.sh imagenet", OUTPUT=tmp_path / "no").returncode == 2
    assert not (tmp_path / "no").exists()


def test_teacher_strength_gives_each_arm_a_teacher_of_its_own(tmp_path):
    calls, done = many(tmp_path, "teacher_strength.sh", TEACHERS="1:300 12:1000", SEEDS="4 5")
    assert done.returncode == 0, done.stderr
    runs = {run.name: run for run in parsed(calls)}
    for epochs, images in ((1, 300), (12, 1000)):
        arm = f"{epochs}epochs-{images}"
        teacher = runs[f"digits_teacher-{arm}"]
        assert (teacher.epochs, teacher.train_samples) == (epochs, images)
        assert runs[f"digits_w2s-{arm}-seed5"].teacher == f"{tmp_path}/out/digits_teacher-{arm}"
    assert len(runs) == 2 + 3 * 2
    assert calls[-1].startswith(f"-m w2s.compare --arm baseline={tmp_path}/out/digits_baseline-seed4 ")
    assert "--arm 12epochs-1000=" in calls[-1] and " --strength " in calls[-1]


def test_the_quickstart_notebook_runs(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "recipes" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    setup = notebook.cells[1]
    for line, shorter in (("EPOCHS = 10", "EPOCHS = 2"), ('OUTPUT = "output/notebook"', f'OUTPUT = "{tmp_path}"')):
        assert setup.source.count(line) == 1
        setup.source = setup.source.replace(line, shorter)
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    resources = {"metadata": {"path": str(ROOT / "recipes")}}
    nbclient.NotebookClient(notebook, timeout=2 * TIMEOUT, kernel_name="python3", resources=resources).execute()

    assert [read_summary(tmp_path / name)["status"] for name in ("teacher", "alone", "taught")] == ["finished"] * 3
    taught = read_summary(tmp_path / "taught")
    assert taught["teacher"]["checkpoint"] == str(tmp_path / "teacher" / "model")
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "distillation: lambda 3" in printed and "error: " not in printed
    (picture,) = [out for out in notebook.cells[-2].outputs if "image/png" in out.get("data", {})]
    assert len(picture["data"]["image/png"]) > 10_000
