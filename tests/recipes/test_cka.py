"""recipes/cka.py on tensors with known answers, and on a pair of tiny runs."""

import json

import pytest
import torch
from cka import check_layers, linear_cka, main, variance_removed
from helpers import DIGITS, RESNET, call_script, words

import train_cls
from w2s.engine.errors import InputError
from w2s.images.models import create_model


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cka_is_1_for_equal_features_whatever_their_rotation_scale_and_place():
    features = normal(50, 8)
    rotation, _ = torch.linalg.qr(normal(8, 8, seed=1))
    assert linear_cka(features, 3 * features @ rotation + 5) == pytest.approx(1)
    assert linear_cka(features, features.reshape(50, 2, 2, 2)) == pytest.approx(1)


def test_cka_of_independent_features_is_0_where_there_are_more_features_than_images():
    values = [linear_cka(normal(40, 400, seed=k), normal(40, 400, seed=100 + k)) for k in range(20)]
    assert abs(sum(values) / 20) < 0.02  # the plain estimator gives 0.9


def test_cka_is_the_ratio_of_the_unbiased_estimators_of_hsic():
    """Song et al. 2007 as sums over the tuples of distinct images, which is what the closed form stands for."""
    features, others = normal(6, 2), normal(6, 3, seed=1) + normal(6, 2) @ normal(2, 3, seed=2)

    def hsic(x: torch.Tensor, y: torch.Tensor) -> float:
        k, l, n = x @ x.T, y @ y.T, range(6)  # noqa: E741
        pairs = [(i, j) for i in n for j in n if i != j]
        triples = [(i, j, q) for i, j in pairs for q in n if q not in (i, j)]
        quadruples = [(i, j, q, r) for i, j, q in triples for r in n if r not in (i, j, q)]
        return (
            sum(k[i, j] * l[i, j] for i, j in pairs) / len(pairs)
            - 2 * sum(k[i, j] * l[i, q] for i, j, q in triples) / len(triples)
            + sum(k[i, j] * l[q, r] for i, j, q, r in quadruples) / len(quadruples)
        )

    expected = hsic(features, others) / (hsic(features, features) * hsic(others, others)) ** 0.5
    assert linear_cka(features, others) == pytest.approx(float(expected))


def test_the_share_of_the_variance_that_is_removed():
    mean, noise = 10 * torch.ones(1, 100), normal(2000, 100)
    noise = noise - noise.mean(0)
    assert variance_removed(mean + noise, mean + noise) == pytest.approx(0)
    assert variance_removed(mean + noise, 7 * (mean + noise)) == pytest.approx(0)  # a longer gradient is no noisier one
    assert variance_removed(mean + noise, mean + 0.5 * noise) == pytest.approx(0.75, abs=1e-4)
    assert variance_removed(mean + noise, mean + 2 * noise) == pytest.approx(-3, abs=1e-3)
    # lambda times a teacher's term without noise, in the direction of the task: (1 + lambda)^2 times the signal
    assert variance_removed(mean + noise, 3 * mean + noise) == pytest.approx(8 / 9, abs=1e-4)


def test_layers():
    model = create_model("resnet10t", 10)
    assert check_layers(model, None, "--layers") == ["act1", "layer4"]
    assert check_layers(model, ["layer1"], "--layers") == ["layer1"]
    with pytest.raises(InputError, match="--layers: no layer 'layer9'"):
        check_layers(model, ["layer9"], "--layers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_teacher):
    """A student alone and the same one taught, with all their checkpoints."""
    folder = tmp_path_factory.mktemp("pair")
    command = words(DIGITS, RESNET, "--mixup 0.5 --checkpoint-hist 9 --output", folder, "--name")
    call_script(train_cls.main, command, "alone")
    call_script(train_cls.main, command, "taught --kd-term nd --kd-warmup 0 --kd-hold 2 --kd-decay 0",
                "--kd-off running --switch-split 0 --teacher", tiny_teacher)  # fmt: skip
    return folder


def test_two_runs_and_their_teacher(pair, capsys):
    files = ("--out", pair / "c.png", "--json", pair / "c.json")
    call_script(main, "--runs", pair / "alone", pair / "taught", "--images 64 --batches 3", *files)
    figures = json.loads((pair / "c.json").read_text())
    assert [row["update"] for row in figures["rows"]] == [4, 8] and figures["images"] == 64
    assert figures["layers"] == figures["teacher_layers"] == ["act1", "layer4"]
    for row in figures["rows"]:
        for layer in figures["layers"]:
            assert set(row["layers"][layer]) == {"between", "alone_teacher", "taught_teacher"}
            assert all(-0.5 < value <= 1 for value in row["layers"][layer].values())
    assert figures["rows"][0]["layers"]["act1"]["between"] > 0.5  # the same weights four updates ago
    assert (pair / "c.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("variance removed") == 2


def test_a_run_with_itself_has_a_similarity_of_1(pair):
    files = ("--out", pair / "s.png", "--json", pair / "s.json")
    call_script(main, "--runs", pair / "taught", pair / "taught", "--images 32 --batches 2 --layers layer1", 
                "--teacher-layers layer1", *files)  # fmt: skip
    rows = json.loads((pair / "s.json").read_text())["rows"]
    assert [row["layers"]["layer1"]["between"] for row in rows] == pytest.approx([1, 1])


def test_what_does_not_fit_is_refused(pair):
    with pytest.raises(InputError, match="has no teacher"):
        call_script(main, "--runs", pair / "taught", pair / "alone", "--out", pair / "x.png")
    with pytest.raises(InputError, match="holds no run"):
        call_script(main, "--runs", pair / "nowhere", pair / "taught", "--out", pair / "x.png")
    assert not (pair / "x.png").exists()
