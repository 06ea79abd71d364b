"""The wheel: what it needs, what is in it, and that each part works or says which extra it lacks."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

import w2s

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ROOMS = {"engine": "cls", "images": "cls", "detection": "det", "diffusion": "diffusion"}  # and their extras
CORE = ("losses", "schedule", "crossing", "record", "distillation", "teacher", "controls")
# everything that the extras install and the project imports
LIBRARIES = (
    *("accelerate", "datasets", "diffusers", "faster_coco_eval", "huggingface_hub", "matplotlib", "numpy", "PIL"),
    *("psutil", "safetensors", "scipy", "sklearn", "tensorboard", "timm", "torch_fidelity", "torchvision", "tqdm"),
    *("wandb", "wandb_workspaces", "webdataset", "yaml", "lightning", "transformers"),
)


def python(*words: object, environment: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run Python (of an environment) outside the checkout, whose w2s is found only where `variables` say so."""
    executable = environment / "bin" / "python" if environment else sys.executable
    command = [str(word) for word in (executable, *words)]
    environ = {**os.environ, **variables}
    return subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, check=False)


def requirements(extra: str) -> set[str]:
    """What an extra installs, with the extras in it."""
    found = set()
    for requirement in EXTRAS[extra]:
        if match := re.fullmatch(r"w2s\[(.*)\]", requirement):
            found |= set().union(*(requirements(name) for name in match[1].split(",")))
        else:
            found.add(requirement)
    return found


def test_requirements_are_those_of_the_extras():
    needed = {*PROJECT["dependencies"], *(requirements("all") - requirements("dashboard"))}
    assert set((ROOT / "requirements.txt").read_text().split()) == needed


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory) -> dict[str, str]:
    """Variables for a Python that has torch, and nothing else that an extra would install; w2s is the checkout's."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({LIBRARIES}))\n")
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def test_the_method_needs_torch_alone_and_the_rest_names_its_extra(without_extras):
    program = "\n".join(f"import w2s.{module}" for module in CORE)
    for room in ROOMS:
        program += f"\ntry: import w2s.{room}\nexcept ModuleNotFoundError as error: print('{room}:', error)"
    done = python("-c", program, **without_extras)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(said) == set(ROOMS)
    for room, extra in ROOMS.items():
        assert re.fullmatch(rf"\w+ is not installed; pip install 'w2s\[{extra}\]'", said[room])


@pytest.mark.parametrize(
    ("adapter", "extra"), [("hf", "transformers"), ("lightning", "lightning"), ("timm_task", "cls")]
)
def test_an_adapter_without_its_library_names_the_extra(without_extras, adapter, extra):
    done = python("-c", f"import w2s.adapters.{adapter}", **without_extras)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"ModuleNotFoundError: \w+ is not installed; pip install 'w2s\[{extra}\]'", done.stderr.splitlines()[-1]
    )


def test_the_comparison_without_its_libraries_names_the_extra(without_extras):
    done = python("-m", "w2s.compare", "--help", **without_extras)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .* (numpy|yaml) .*; pip install 'w2s\[compare\]'", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that `python -m build` makes of the source distribution, with no network."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    for name in ("w2s", "tests", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    done = python("-m", "build", "--no-isolation", "--outdir", dist, source)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel in it, which sees the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    libraries = Path(sysconfig.get_path("purelib", vars=paths)) / "libraries.pth"
    libraries.write_text(sysconfig.get_path("purelib") + "\n")
    done = python("-m", "pip", "--python", folder, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    package = {path for path in (ROOT / "w2s").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(f"w2s-{w2s.__version__}.dist-info/")}
    assert names == {str(path.relative_to(ROOT)) for path in package}
    assert f"\n## {w2s.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_installed_command_compares_runs_without_the_checkout(environment, tmp_path):
    runs = ROOT / "recipes" / "results" / "quickstart"
    words = ["--baseline", runs / "quickstart_baseline-seed0", "--treated", runs / "quickstart_w2s-seed0", "--out"]
    subprocess.run([environment / "bin" / "w2s-compare", *words, tmp_path / "out"], cwd="/", check=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.md", "report.html", "curves.png"}
