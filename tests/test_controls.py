"""What stands in for the teacher: by closed forms, and in real runs of the scripts."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import DIGITS, RESNET, call_script, read_rows, read_summary, refused, watching_forwards
from torch import nn

import train_cls
import train_det
import train_diffusion
from w2s.controls import Control, cyclic_permutation
from w2s.engine.errors import InputError
from w2s.engine.randomness import mix_seed
from w2s.engine.teaching import build_control, early_phase, untrain
from w2s.images.models import create_model
from w2s.losses import kl_softmax
from w2s.teacher import Teacher

UPDATE, MICRO = 7, 0
IMAGES, TARGETS = torch.zeros(6, 1, 2, 2), torch.tensor([3, 1, 4, 1, 5, 9])


def control(kind: str, seed: int = 0, process: int = 0) -> Control:
    """As the options --kd-control and --seed make it on one process."""
    return build_control(SimpleNamespace(kd_control=kind, seed=seed, batch_size=2), process=process)


class Fixed(nn.Module):
    """A teacher that says `logits`, whatever it is shown."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.num_classes = logits, logits.shape[1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


@pytest.fixture
def teacher() -> Teacher:
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)) * 4
    return Teacher(Fixed(logits), name="fixed", source="nowhere", device="cpu")


def outputs(made: Control, teacher: Teacher, targets=TARGETS, temperature=2.0, update=UPDATE, micro=MICRO):
    """What stands in for the teacher's logits of IMAGES."""
    return made.outputs(teacher, IMAGES, targets=targets, temperature=temperature, update=update, micro=micro)


@pytest.mark.parametrize("count", [2, 3, 32])
def test_a_cyclic_permutation_leaves_no_row_in_its_place(count):
    for seed in range(20):
        order = cyclic_permutation(count, seed).tolist()
        assert sorted(order) == list(range(count))
        assert all(row != place for place, row in enumerate(order))


def test_the_order_is_asked_for_on_the_device_of_the_outputs():
    teacher = Teacher(torch.nn.Linear(3, 10), name="linear", source="nowhere", device="meta")
    asked = []

    def permutation(count: int, device: torch.device) -> torch.Tensor:
        asked.append((count, device.type))
        return torch.arange(count, device=device)

    assert teacher.shuffled(permutation, torch.zeros(4, 3, device="meta")).shape == (4, 10)
    assert asked == [(4, "meta")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cyclic_permutation_is_drawn_on_a_gpu_without_waiting_for_it():
    cyclic_permutation(6, 0, "cuda")  # the context is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        order = cyclic_permutation(32, 1, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert order.device.type == "cuda"
    assert sorted(order.tolist()) == list(range(32)) and all(row != k for k, row in enumerate(order.tolist()))


def test_shuffled_depends_on_seed_update_process_and_micro_batch_alone():
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    teacher = Teacher(Fixed(logits), name="fixed", source="nowhere", device="cpu")
    first = outputs(control("shuffled"), teacher)
    state = torch.get_rng_state()
    assert torch.equal(first, outputs(control("shuffled"), teacher))
    assert torch.equal(state, torch.get_rng_state())
    others = [
        outputs(control("shuffled", seed=1), teacher),
        outputs(control("shuffled", process=1), teacher),
        outputs(control("shuffled"), teacher, update=UPDATE + 1),
        outputs(control("shuffled"), teacher, micro=MICRO + 1),
    ]
    assert not any(torch.equal(first, other) for other in others)
    second = build_control(SimpleNamespace(kd_control="shuffled", seed=0, batch_size=2), process=1, processes=2)
    assert torch.equal(outputs(second, teacher), others[-1])  # of two processes: the second micro-batch of one


def test_shuffled_logits_are_the_teachers_of_other_images(teacher):
    shuffled = outputs(control("shuffled"), teacher)
    order = cyclic_permutation(6, mix_seed(0, UPDATE, 0, MICRO))
    assert torch.equal(shuffled, teacher.model.logits[order])
    assert torch.equal(outputs(control("random"), teacher), teacher.model.logits)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_uniform_is_the_divergence_from_the_uniform_distribution_and_asks_no_teacher(teacher, temperature):
    student = torch.randn(6, 10)
    uniform = outputs(control("uniform"), teacher, temperature=temperature)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=torch.full((6, 10), 0.1)),
        torch.distributions.Categorical(logits=student / temperature),
    )
    assert float(kl_softmax(student, uniform, temperature)) == pytest.approx(
        float(temperature**2 * wanted.mean()), rel=1e-4
    )
    assert teacher.calls == 0


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_labels_have_the_teachers_confidence_and_none_of_its_opinions(teacher, temperature):
    softened = outputs(control("labels"), teacher, temperature=temperature)
    got = torch.softmax(softened / temperature, -1)
    confidence = torch.softmax(teacher.model.logits / temperature, -1).amax(-1).mean()
    wanted = torch.full((6, 10), float(1 - confidence) / 9)
    wanted[torch.arange(6), TARGETS] = confidence
    torch.testing.assert_close(got, wanted)
    hard = torch.nn.functional.one_hot(TARGETS, 10)
    mixed = outputs(control("labels"), teacher, targets=(hard + hard.flip(0)) / 2, temperature=temperature)
    torch.testing.assert_close(torch.softmax(mixed / temperature, -1), (wanted + wanted.flip(0)) / 2)


def test_labels_of_a_teacher_that_knows_some_classes_are_those_of_a_model_of_these_alone():
    known = torch.tensor([1, 3, 4, 5])
    own = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)) * 4
    wide = torch.full((6, 10), -torch.inf).index_copy(1, known, own)
    targets = torch.tensor([3, 1, 4, 1, 5, 9])  # the last one is of no class that the teacher knows
    alone, mapped = (Teacher(Fixed(rows), name="fixed", source="nowhere", device="cpu") for rows in (own, wide))
    given = outputs(control("labels"), mapped, targets=targets)[:, known].softmax(-1)
    expected = outputs(control("labels"), alone, targets=torch.tensor([1, 0, 2, 0, 3, 0])).softmax(-1)
    torch.testing.assert_close(given[:5], expected[:5])
    torch.testing.assert_close(given[5], torch.full((4,), 0.25))


def test_labels_of_a_teacher_that_is_quite_sure_keep_the_loss_finite(teacher):
    teacher.model.logits = torch.eye(10)[TARGETS] * 1e4
    softened = outputs(control("labels"), teacher, temperature=1.0)
    torch.testing.assert_close(torch.softmax(softened, -1), torch.eye(10)[TARGETS])
    assert torch.isfinite(kl_softmax(torch.randn(6, 10), softened, 1.0))


def test_a_random_teacher_is_drawn_from_the_seed_and_nothing_else_moves():
    def build() -> nn.Module:
        return create_model("resnet10t", 10, model_kwargs={"channels": (8, 8, 16, 16), "stem_width": 8})

    def weights(seed: int) -> torch.Tensor:
        teacher = Teacher(build(), name="r", source="nowhere", device="cpu", rebuild=build)
        trained = teacher.model.fc.weight.clone()
        state = torch.get_rng_state()
        untrain(teacher, seed)
        assert torch.equal(state, torch.get_rng_state())
        assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
        assert not torch.equal(teacher.model.fc.weight, trained)
        return teacher.model.fc.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


# ---- in the scripts ----


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tiny_teacher):
    """A run of train_cls.py for each control, and none: its folder and the teacher's forwards in its training."""
    output, runs = tmp_path_factory.mktemp("controls"), {}

    def start(kind: str | None):
        if kind not in runs:
            calls, name = [], kind or "w2s"

            def see(module: nn.Module, inputs: tuple) -> None:
                if hasattr(module, "pretrained_cfg") and inputs[0].device.type != "meta":
                    calls.append((sum(p.numel() for p in module.parameters()), module.training, len(inputs[0])))

            with watching_forwards(see):
                window = "--epochs 1 --kd-warmup 0 --kd-hold 1 --kd-decay 0 --kd-weight 2"
                place = ["--teacher", tiny_teacher, "--output", output, "--name", name]
                chosen = ["--kd-control", kind] if kind else []
                call_script(train_cls.main, DIGITS, RESNET, window, place, chosen)
            student = read_summary(output / name)["params"]
            first = next(i for i, (_, training, _) in enumerate(calls) if training)
            last = max(i for i, (_, training, _) in enumerate(calls) if training)
            runs[kind] = output / name, sum(size != student for size, _, _ in calls[first : last + 2])
        return runs[kind]

    return start


@pytest.mark.parametrize("kind", ["shuffled", "uniform", "labels", "random"])
def test_a_control_changes_the_term_and_nothing_of_its_schedule(kind, taught):
    (plain, _), (folder, forwards) = taught(None), taught(kind)
    ours, theirs = read_summary(folder), read_summary(plain)
    assert (ours["kd_control"], theirs["kd_control"]) == (kind, None)
    assert yaml.safe_load((folder / "args.yaml").read_text())["kd_control"] == kind
    assert ours["teacher"] == theirs["teacher"]  # the true one's score, also where an untrained one speaks
    assert ours["kd_off"] == theirs["kd_off"]
    (row,), (other,) = read_rows(folder), read_rows(plain)
    assert [row[key] for key in ("kd_weight", "kd_temperature")] == [
        other[key] for key in ("kd_weight", "kd_temperature")
    ]
    assert float(row["kd_loss"]) > 0 and row["kd_loss"] != other["kd_loss"]
    silent = kind == "uniform"
    assert forwards == (0 if silent else 4)
    assert (ours["flops"]["teacher_forward"] == 0) == (float(row["teacher_seconds"]) == 0) == silent
    assert f"in the teacher's place: --kd-control {kind}" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        (train_cls, "--kd-control shuffled", "give --teacher"),
        (train_cls, "--kd-control shuffled --teacher x -b 1", "give a --batch-size of at least 2"),
        (train_cls, "--kd-control swapped --teacher x", "invalid choice: 'swapped'"),
        (train_det, "--kd-control uniform --teacher x", "invalid choice: 'uniform'"),
        (train_diffusion, "--kd-control labels --teacher x", "invalid choice: 'labels'"),
    ],
)
def test_controls_that_cannot_be_are_refused_in_one_line(task, words, message):
    with pytest.raises(InputError) as refused:
        early_phase(task.build_parser().parse_args(words.split()), length=10, mode="max")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_no_control_is_none():
    assert build_control(SimpleNamespace(kd_control=None), process=0) is None


def test_a_run_that_a_resume_leaves_one_image_for_each_process_has_no_example_to_exchange():
    with refused("--kd-control shuffled", "fewer processes"):
        build_control(SimpleNamespace(kd_control="shuffled", seed=0, batch_size=1), process=2, processes=3)
