"""Checkpoints that are complete or absent, whatever kills the process; and what every script does with its run."""

import math
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.utils import broadcast
from helpers import on_processes, refused
from timm.utils import ModelEmaV3
from torch import nn

import w2s.engine.checkpoint
from w2s.engine.checkpoint import (
    check_readable,
    load_checkpoint,
    newest_state,
    read_state,
    rewrite_state,
    save_checkpoint,
)
from w2s.engine.errors import InputError
from w2s.engine.tensors import Trained, tensor_names
from w2s.images.models import create_model
from w2s.images.teacher import ImageTeacher

ROOT = Path(__file__).parents[2]


@contextmanager
def fresh_accelerator(**options: object):
    """An accelerator with options of its own: Accelerate keeps those of the first one made in a process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True, **options)
    accelerate.state.AcceleratorState._reset_state(True)


def student_of(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 36, 2))


class Training:
    """A student, its optimiser and moving average, prepared; two steps make all three of them its own."""

    def __init__(self, accelerator: accelerate.Accelerator, seed: int = 0, steps: int = 2, **sizes: int) -> None:
        self.accelerator, self.bare = accelerator, student_of(seed, **sizes)
        self.ema = ModelEmaV3(self.bare, 0.5)
        optimizer = torch.optim.AdamW(self.bare.parameters(), 1e-2)
        self.model, self.optimizer = accelerator.prepare(self.bare, optimizer)
        for step in range(steps):
            self.step(step)

    def step(self, seed: int) -> None:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.accelerator.backward(nn.functional.cross_entropy(self.model(images), torch.tensor([0, 1, 0, 1])))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.bare)

    def save(self, root: Path, update: int, keep: int = 2, **state: object) -> Path:
        save_checkpoint(root, update, state, self.accelerator, self.trained, keep)
        return root / f"update-{update:08d}"

    @property
    def trained(self) -> Trained:
        return Trained(self.bare, self.ema.module, self.optimizer, self.accelerator.scaler)

    def tensors(self) -> list[torch.Tensor]:
        moments = [t for state in self.optimizer.state_dict()["state"].values() for t in state.values()]
        return [*self.bare.state_dict().values(), *self.ema.module.state_dict().values(), *moments]

    def like(self, other: "Training") -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.tensors(), other.tensors(), strict=True))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- what a checkpoint holds -----------------------------------------------------------------------------------------


def test_weights_optimiser_and_moving_average_come_back_bit_for_bit(tmp_path):
    with fresh_accelerator() as accelerator:
        before = Training(accelerator)
        path = before.save(tmp_path, 2)
    with fresh_accelerator() as accelerator:
        after = Training(accelerator, seed=1, steps=3)
        assert not after.like(before)
        load_checkpoint(path, after.trained)
        assert after.like(before)


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    with fresh_accelerator() as accelerator:
        whole = Training(accelerator, steps=2)
        whole.save(tmp_path, 2)
        whole.step(2)
    with fresh_accelerator() as accelerator:
        resumed = Training(accelerator, seed=1, steps=0)
        load_checkpoint(tmp_path / "update-00000002", resumed.trained)
        resumed.step(2)
        assert resumed.like(whole)


def test_the_state_comes_back_exactly(accelerator, tmp_path):
    state = {
        "floats": [0.1 + 0.2, math.pi, 1e-308, 5e-324, 1.7976931348623157e308, -0.0, 1 / 3],
        "infinite": math.inf,
        "words": 'ä "quoted"\n',
        "nothing": None,
        "nested": {"rows": [{"top1": 65.432109876543}], "flag": True},
    }
    found = read_state(Training(accelerator, steps=0).save(tmp_path, 7, **state))
    assert {k: found[k] for k in state} == state
    assert math.copysign(1, found["floats"][5]) == -1
    assert found["update"] == 7


def test_not_a_number_stays_so(accelerator, tmp_path):
    assert math.isnan(read_state(Training(accelerator, steps=0).save(tmp_path, 1, loss=math.nan))["loss"])


def test_the_teacher_is_in_no_file_of_a_checkpoint(accelerator, tmp_path):
    training = Training(accelerator)
    model = create_model("resnet10t", 2, model_kwargs={"channels": (16, 16, 32, 32), "stem_width": 8})
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 8, 8)}
    teacher = ImageTeacher(model, source="here", device="cpu", mean=(0.5,) * 3, std=(0.5,) * 3)
    teacher(torch.zeros(1, 3, 8, 8))
    path = training.save(tmp_path, 1)
    found, own = tensor_names(path), set(training.bare.state_dict())
    for part in ("student", "ema"):
        assert {name.removeprefix(f"{part}.") for name in found if name.startswith(f"{part}.")} == own
    states = {name.split(".")[2] for name in found if name.startswith("optimizer.state.")}
    assert len(states) == len(list(training.bare.parameters()))
    assert sum(p.stat().st_size for p in path.rglob("*")) < teacher.params * 4


def test_a_moving_average_in_channels_last_format_is_saved(accelerator, tmp_path):
    training, ema, again = Training(accelerator), student_of().to(memory_format=torch.channels_last), student_of(seed=1)
    save_checkpoint(tmp_path, 1, {}, accelerator, training.trained._replace(ema=ema), 2)
    load_checkpoint(tmp_path / "update-00000001", training.trained._replace(ema=again))
    assert torch.equal(again[0].weight, ema[0].weight)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_a_fused_optimiser_of_channels_last_weights_goes_on_in_the_same_bits(accelerator, tmp_path, optimizer):
    """It goes through weights and moments in the order of their memory."""
    models = [student_of(seed).to(memory_format=torch.channels_last) for seed in range(2)]
    whole, resumed = (Trained(m, None, optimizer(m.parameters(), lr=0.1, fused=True)) for m in models)

    def step(trained: Trained, seed: int) -> None:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        trained.student(images).square().mean().backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()

    step(whole, 0)
    save_checkpoint(tmp_path, 1, {}, accelerator, whole, 2)
    load_checkpoint(tmp_path / "update-00000001", resumed)
    for trained in (whole, resumed):
        step(trained, 1)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_a_run_without_a_moving_average_saves_none(accelerator, tmp_path):
    trained = Training(accelerator).trained._replace(ema=None)
    save_checkpoint(tmp_path, 1, {}, accelerator, trained, 2)
    assert not any(name.startswith("ema.") for name in tensor_names(tmp_path / "update-00000001"))
    load_checkpoint(tmp_path / "update-00000001", trained)


# --- how many are kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(accelerator, tmp_path, keep):
    training = Training(accelerator, steps=0)
    for update in (8, 9, 10, 100):
        training.save(tmp_path, update, keep)
    assert names(tmp_path) == [f"update-{update:08d}" for update in (8, 9, 10, 100)[-keep:]]


def test_an_update_saved_again_takes_the_place_of_the_one_before(accelerator, tmp_path):
    training = Training(accelerator, steps=0)
    training.save(tmp_path, 5, try_=1)
    training.save(tmp_path, 5, try_=2)
    assert names(tmp_path) == ["update-00000005"]
    assert read_state(tmp_path / "update-00000005")["try_"] == 2


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_a_run_taken_up_from_an_earlier_checkpoint_keeps_what_it_writes_then(accelerator, tmp_path, keep):
    training = Training(accelerator, steps=0)
    for update in (10, 20, 30):
        training.save(tmp_path, update, keep=4, branch="old")
    training.save(tmp_path, 15, keep, branch="new")
    assert newest_state(tmp_path, print)[1]["branch"] == "new"


def test_what_is_left_of_a_save_that_was_killed_goes_with_the_next_one(accelerator, tmp_path):
    (tmp_path / ".update-00000003.partial").mkdir()
    (tmp_path / ".update-00000003.partial" / "model.safetensors").write_bytes(b"half")
    training = Training(accelerator, steps=0)
    training.save(tmp_path, 4)
    assert names(tmp_path) == ["update-00000004"]


def test_the_partial_folder_of_the_same_update_does_not_get_into_the_checkpoint(accelerator, tmp_path):
    (tmp_path / ".update-00000003.partial").mkdir()
    (tmp_path / ".update-00000003.partial" / "stray").write_bytes(b"half")
    assert "stray" not in names(Training(accelerator, steps=0).save(tmp_path, 3))


# --- complete or absent ----------------------------------------------------------------------------------------------


def test_a_save_that_dies_leaves_the_checkpoint_before_and_no_new_one(accelerator, tmp_path):
    training = Training(accelerator)
    training.save(tmp_path, 1)
    with pytest.raises(TypeError):  # its tensors are written, its state cannot be
        training.save(tmp_path, 2, state=object())
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["update-00000001"]
    assert newest_state(tmp_path, pytest.fail)[0] == tmp_path / "update-00000001"


SAVING = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from engine.test_checkpoint import Training, fresh_accelerator

root, written = Path(sys.argv[3]), lambda: sorted(root.glob("update-*"))
for round_ in range(8):
    before, partial = written(), lambda: list(root.glob(".update-*.partial"))
    child = os.fork()
    if not child:
        with fresh_accelerator() as accelerator:
            training = Training(accelerator)
            update = int(before[-1].name[7:]) if before else 0
            while True:
                update += 1
                training.save(root, update, keep=3)
    end = time.monotonic() + 100
    while written() == before and time.monotonic() < end:
        time.sleep(0.001)
    while not partial() and time.monotonic() < end:  # the next save is under way: let it get a little further each time
        pass
    time.sleep(0.002 * round_)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(written()[-1].name, flush=True)
"""


def test_every_checkpoint_is_readable_after_kills_in_the_midst_of_saves(accelerator, tmp_path):
    words = [sys.executable, "-c", SAVING, str(ROOT), str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 8  # each round got further
    found = sorted(tmp_path.glob("update-*"))
    assert found[-1].name >= "update-00000008"
    training = Training(accelerator, seed=1)
    for path in found:
        assert read_state(path)["update"] == int(path.name[7:])
        load_checkpoint(path, training.trained)


# --- damaged ---------------------------------------------------------------------------------------------------------

FILES = ["state.json", "__0_0.distcp", ".metadata", "rest.pt"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), Path.unlink], ids=["cut", "empty", "gone"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(accelerator, tmp_path, file, damage):
    training, warnings = Training(accelerator, steps=0), []
    training.save(tmp_path, 1, place="first")
    second = training.save(tmp_path, 2, place="second")
    damage(second / file)
    with refused(str(second), file):
        read_state(second)
    path, state = newest_state(tmp_path, warnings.append)
    assert (path.name, state["place"]) == ("update-00000001", "first")
    assert len(warnings) == 1 and file in warnings[0] and "\n" not in warnings[0]


def test_without_damage_the_newest_is_used_without_a_word(accelerator, tmp_path):
    training = Training(accelerator, steps=0)
    for update in (9, 10):
        training.save(tmp_path, update)
    path, state = newest_state(tmp_path, pytest.fail)
    assert (path.name, state["update"]) == ("update-00000010", 10)


def test_where_all_checkpoints_are_damaged_the_run_does_not_silently_start_again(accelerator, tmp_path):
    training, warnings = Training(accelerator, steps=0), []
    for update in (1, 2):
        cut(training.save(tmp_path, update) / "rest.pt")
    with refused(str(tmp_path), "damaged"):
        newest_state(tmp_path, warnings.append)
    assert len(warnings) == 2


@pytest.mark.parametrize("there", [(), ("checkpoints",), ("checkpoints/.update-00000001.partial",)])
def test_no_checkpoints_are_no_error(tmp_path, there):
    for folder in there:
        (tmp_path / folder).mkdir(parents=True)
    assert newest_state(tmp_path / "checkpoints", pytest.fail) == (None, None)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"files": 3}'])
def test_a_state_that_is_none_is_refused(accelerator, tmp_path, text):
    path = Training(accelerator, steps=0).save(tmp_path, 1)
    (path / "state.json").write_text(text)
    with refused(str(path), "state.json"):
        read_state(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with refused("--resume", str(tmp_path)):
        read_state(tmp_path)
    with refused("--resume", str(tmp_path / "nowhere")):
        read_state(tmp_path / "nowhere")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with fresh_accelerator() as accelerator:
        path = Training(accelerator).save(tmp_path, 1)
    with fresh_accelerator() as accelerator:
        other = Training(accelerator, width=7)
        with refused("cannot load checkpoint", str(path)):
            load_checkpoint(path, other.trained)


@pytest.mark.parametrize("file", FILES[1:])
def test_a_file_with_wrong_bytes_of_the_right_length_is_refused(accelerator, tmp_path, file):
    training = Training(accelerator)
    path = training.save(tmp_path, 1)
    (path / file).write_bytes(b"\xff" * (path / file).stat().st_size)
    assert read_state(path)
    with refused("cannot load checkpoint", str(path)):
        load_checkpoint(path, training.trained)


# --- several processes -----------------------------------------------------------------------------------------------


def save_with_scaler(accelerator: accelerate.Accelerator, root: str) -> tuple[float, bool, list[str]]:
    save, written = torch.save, []

    def watched_save(value: object, file: object, *args: object, **options: object) -> None:
        written.extend([file.name] if isinstance(file, Path) else [])
        save(value, file, *args, **options)

    torch.save = watched_save  # in this process, which ends after this function
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    training = Training(accelerator, steps=1)
    with torch.no_grad():
        training.bare[1].running_mean += accelerator.process_index  # BatchNorm has seen other images there
    path = training.save(Path(root), 1)
    first = broadcast(training.bare[1].running_mean.clone())
    accelerator.scaler.load_state_dict(torch.amp.GradScaler("cpu", init_scale=64.0).state_dict())
    load_checkpoint(path, training.trained)
    return accelerator.scaler.get_scale(), torch.equal(training.bare[1].running_mean, first), written


def test_what_the_first_process_holds_is_written_and_all_read_it(tmp_path):
    assert on_processes(2, save_with_scaler, str(tmp_path)) == [(4.0, True, ["rest.pt"]), (4.0, True, [])]


def read_on_a_disk_of_its_own(accelerator: accelerate.Accelerator, root: str) -> None:
    own = Path(root) / str(accelerator.process_index)
    w2s.engine.checkpoint.READ_PATIENCE = 0.5
    check_readable(own / "update-00000001", {"update": 1, "files": {}, "loss": math.nan})


@pytest.mark.parametrize("other", ["", '{"update": 1, "files": {}, "loss": 2.0}'])
def test_a_checkpoint_that_one_process_cannot_read_is_refused_by_all(tmp_path, other):
    """Its machine has a disk of its own, with nothing there, or something else."""
    for rank, text in enumerate(['{"update": 1, "files": {}, "loss": NaN}', other]):
        (tmp_path / str(rank) / "update-00000001").mkdir(parents=True)
        if text:
            (tmp_path / str(rank) / "update-00000001" / "state.json").write_text(text)
    for error in on_processes(2, read_on_a_disk_of_its_own, str(tmp_path)):
        assert type(error) is InputError and "\n" not in str(error)
        assert "process 1 on " in str(error) and "all machines share" in str(error)


def test_a_checkpoint_that_appears_late_is_waited_for(accelerator, tmp_path, monkeypatch):
    path = Training(accelerator, steps=0).save(tmp_path, 1)
    state = read_state(path)
    path.rename(tmp_path / "hidden")
    monkeypatch.setattr(w2s.engine.checkpoint.time, "sleep", lambda seconds: (tmp_path / "hidden").rename(path))
    check_readable(path, state)


def test_another_state_takes_the_place_of_the_one_before(accelerator, tmp_path):
    path = Training(accelerator, steps=0).save(tmp_path, 3, rows=[1])
    rewrite_state(tmp_path, 3, {"rows": [1, 2]}, accelerator)
    state = read_state(path)
    assert (state["update"], state["rows"]) == (3, [1, 2])
