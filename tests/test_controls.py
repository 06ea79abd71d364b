"""What stands in for the teacher: by closed forms, and in real runs of all three scripts."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers import DIGITS, RESNET, call_script, read_rows, read_summary, watching_forwards
from torch import nn

import train_cls
import train_det
import train_diffusion
from w2s.controls import Control, make_control, untrain
from w2s.detection.models import DetectorConfig, build_detector
from w2s.engine.errors import InputError
from w2s.images.models import create_model
from w2s.losses import kl_softmax
from w2s.teacher import Teacher

PLACE = (7, 0)


def control(kind: str, seed: int = 0, process: int = 0) -> Control:
    return Control(kind, seed, process)


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
    return Teacher(Fixed(logits), "fixed", "nowhere", Accelerator(cpu=True))


IMAGES, TARGETS = torch.zeros(6, 1, 2, 2), torch.tensor([3, 1, 4, 1, 5, 9])


@pytest.mark.parametrize("count", [2, 3, 32])
def test_shuffled_is_a_permutation_without_a_fixed_point(count):
    rows = torch.arange(count)
    for update in range(20):
        moved = control("shuffled").shuffle(rows, (update, 0))
        assert sorted(moved.tolist()) == rows.tolist()
        assert (moved != rows).all()
    for kind in ("uniform", "labels", "random"):
        assert control(kind).shuffle(rows, PLACE) is rows


def test_shuffled_depends_on_seed_update_process_and_micro_batch_alone():
    rows = torch.arange(64)
    first = control("shuffled").shuffle(rows, PLACE)
    state = torch.get_rng_state()
    assert torch.equal(first, control("shuffled").shuffle(rows, PLACE))
    assert torch.equal(state, torch.get_rng_state())
    others = [control("shuffled", 1), control("shuffled", process=1), control("shuffled"), control("shuffled")]
    for other, place in zip(others, [PLACE, PLACE, (8, 0), (7, 1)], strict=True):
        assert not torch.equal(first, other.shuffle(rows, place))


def test_shuffled_logits_are_the_teachers_of_other_images(teacher):
    spoken = control("shuffled").logits(teacher, IMAGES, TARGETS, 2.0, PLACE)
    order = control("shuffled").shuffle(torch.arange(6), PLACE)
    assert torch.equal(spoken, teacher.model.logits[order])
    assert torch.equal(control("random").logits(teacher, IMAGES, TARGETS, 2.0, PLACE), teacher.model.logits)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_uniform_is_the_divergence_from_the_uniform_distribution_and_asks_no_teacher(teacher, temperature):
    student = torch.randn(6, 10)
    spoken = control("uniform").logits(teacher, IMAGES, TARGETS, temperature, PLACE)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=torch.full((6, 10), 0.1)),
        torch.distributions.Categorical(logits=student / temperature),
    )
    assert float(kl_softmax(student, spoken, temperature)) == pytest.approx(
        float(temperature**2 * wanted.mean()), rel=1e-4
    )
    assert teacher.calls == 0


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_labels_have_the_teachers_confidence_and_none_of_its_opinions(teacher, temperature):
    spoken = control("labels").logits(teacher, IMAGES, TARGETS, temperature, PLACE)
    got = torch.softmax(spoken / temperature, -1)
    confidence = torch.softmax(teacher.model.logits / temperature, -1).amax(-1).mean()
    wanted = torch.full((6, 10), float(1 - confidence) / 9)
    wanted[torch.arange(6), TARGETS] = confidence
    torch.testing.assert_close(got, wanted)
    hard = torch.nn.functional.one_hot(TARGETS, 10)
    mixed = control("labels").logits(teacher, IMAGES, (hard + hard.flip(0)) / 2, temperature, PLACE)
    torch.testing.assert_close(torch.softmax(mixed / temperature, -1), (wanted + wanted.flip(0)) / 2)


def test_labels_of_a_teacher_that_is_quite_sure_keep_the_loss_finite(teacher):
    teacher.model.logits = torch.eye(10)[TARGETS] * 1e4
    spoken = control("labels").logits(teacher, IMAGES, TARGETS, 1.0, PLACE)
    torch.testing.assert_close(torch.softmax(spoken, -1), torch.eye(10)[TARGETS])
    assert torch.isfinite(kl_softmax(torch.randn(6, 10), spoken, 1.0))


def test_a_random_teacher_is_drawn_from_the_seed_and_nothing_else_moves():
    def build() -> nn.Module:
        return create_model("resnet10t", 10, model_kwargs={"channels": (8, 8, 16, 16), "stem_width": 8})

    def weights(seed: int) -> torch.Tensor:
        teacher = Teacher(build(), "resnet10t", "nowhere", Accelerator(cpu=True))
        trained = teacher.model.fc.weight.clone()
        state = torch.get_rng_state()
        untrain(teacher, build, seed)
        assert torch.equal(state, torch.get_rng_state())
        assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
        assert not torch.equal(teacher.model.fc.weight, trained)
        return teacher.model.fc.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("detector", ["retinanet", "fasterrcnn"])
def test_shuffled_images_give_the_detectors_outputs_of_other_images(detector):
    torch.manual_seed(0)
    more = {"rpn_pre_nms_top_n_train": 20, "rpn_post_nms_top_n_train": 10} if detector == "fasterrcnn" else {}
    config = DetectorConfig(
        *(detector, "resnet10t", ["a", "b"], "gn", [8, 16], 0, 2.0, 16, 64, 64, None),
        *({"channels": (8, 8, 16, 16), "stem_width": 8}, more),
    )
    model = build_detector(config).train()
    boxes = {"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}
    _, seen = model([torch.rand(3, 64, 64), torch.rand(3, 48, 64), torch.rand(3, 64, 40)], [boxes] * 3)
    order = control("shuffled").shuffle(torch.arange(3), PLACE).tolist()
    shown = control("shuffled").shuffle_images(seen, PLACE)
    assert shown.images.image_sizes == [seen.images.image_sizes[i] for i in order]
    assert shown.proposals is seen.proposals and shown.outputs is seen.outputs
    assert control("random").shuffle_images(seen, PLACE) is seen
    with torch.no_grad():
        plain, moved = (model.eval().look(batch) for batch in (seen, shown))
    for name in ("cls", "box") if detector == "retinanet" else ("rpn_cls", "rpn_box"):
        assert plain.keys() == moved.keys() and plain[name].shape == moved[name].shape
        torch.testing.assert_close(moved[name].unflatten(0, (3, -1)), plain[name].unflatten(0, (3, -1))[order])


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
                call_script(
                    *(
                        train_cls.main,
                        DIGITS,
                        RESNET,
                        "--epochs 1 --kd-warmup 0 --kd-hold 1 --kd-decay 0 --kd-weight 2",
                    ),
                    *("--teacher", tiny_teacher, "--output", output, "--name", name),
                    *(["--kd-control", kind] if kind else []),
                )
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
        (train_cls, "--kd-control shuffled --teacher x -b 1", "--batch-size must be at least 2"),
        (train_cls, "--kd-control swapped --teacher x", "invalid choice: 'swapped'"),
        (train_det, "--kd-control uniform --teacher x", "invalid choice: 'uniform'"),
        (train_diffusion, "--kd-control labels --teacher x", "invalid choice: 'labels'"),
    ],
)
def test_controls_that_cannot_be_are_refused_in_one_line(task, words, message):
    with pytest.raises(InputError) as refused:
        make_control(task.build_parser().parse_args(words.split()), 0)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_no_control_is_none():
    assert make_control(SimpleNamespace(kd_control=None), 0) is None
