"""recipes/choose_teacher.py: its measures by known answers, and a choice between two tiny teachers."""

import json

import pytest
import torch
from choose_teacher import Choice, calibration_error, correlations, diswot, main, parse_options, recommend
from helpers import DIGITS, RESNET, TEACHER, call_script, words

import train_cls
from w2s.engine.errors import InputError
from w2s.images.models import classifier_flops, create_model, find_model, load_folder


def test_calibration_error_by_hand():
    """Two images at confidence 0.9 of which one is right, two at 0.6 that are both right: (2 * 0.4 + 2 * 0.4) / 4."""
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert calibration_error(probabilities, torch.tensor([0, 1, 0, 0])) == pytest.approx(0.4)
    assert calibration_error(torch.eye(2), torch.tensor([0, 1])) == 0


def test_diswot_is_highest_for_a_network_and_itself():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    narrow, wide = (
        create_model("resnet10t", 10, model_kwargs={"channels": (8, 8, 16, width), "stem_width": 8}).eval()
        for width in (16, 32)
    )
    vit = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    transformer = create_model("vit_tiny_patch16_224", 10, img_size=32, model_kwargs=vit).eval()
    assert diswot(narrow, narrow, (images, images)) == pytest.approx(0, abs=1e-6)
    for other in (wide, transformer):
        score = diswot(narrow, other, (images, images))
        assert score < -0.01
        assert diswot(other, narrow, (images, images)) == pytest.approx(score)


def columns(probe: float, cost: float) -> dict:
    return {"probe": probe, "cost": cost, "bound": 1.0 + (cost - 1) / 2, "pays_at": 1 - 1 / cost}


def test_the_cheapest_of_those_that_cannot_be_told_from_the_best_is_recommended():
    candidates = {"large": columns(80.0, 1.5), "small": columns(79.0, 1.25), "weak": columns(60.0, 1.1)}
    sentence = recommend(candidates, alone=50.0, images=1000)
    assert sentence.startswith("small: 79.0") and "+29.0" in sentence
    assert "more than 20 % of the epochs" in sentence and "11 % by FLOPs" in sentence
    assert recommend(candidates, alone=50.0, images=100_000).startswith("large")
    assert recommend(candidates, alone=79.5, images=1000).startswith("none of them")


def test_rank_correlations():
    names = ("switch", "label", "ece_first", "ece_last", "diswot", "probe")
    values = {"probe": (1, 2, 3), "switch": (3, 2, 1), "label": (1, 3, 2)}
    candidates = {str(k): {name: values.get(name, (0, 0, 0))[k] for name in names} for k in range(3)}
    assert correlations(candidates, [10, 20, 30]) == pytest.approx({"switch": -1, "label": 0.5, "probe": 1})


def test_a_choice_between_two_teachers(tmp_path, tiny_teacher, capsys):
    call_script(train_cls.main, DIGITS, TEACHER, "--seed 8 --epochs 6 --name better --output", tmp_path)
    better = tmp_path / "better"
    command = words(
        DIGITS, RESNET, "--probe-updates 4 --measured 1 2 --name choice --output", tmp_path / "out", "--json"
    )
    call_script(main, command, tmp_path / "c.json", "--teacher", tiny_teacher, better)
    figures = json.loads((tmp_path / "c.json").read_text())
    assert list(figures["candidates"]) == [str(tiny_teacher), str(better)]
    student = create_model("resnet10t", 10, model_kwargs={"channels": (8, 8, 16, 16), "stem_width": 8})
    update = classifier_flops(student, (3, 16, 16), batch=32, train=True)
    for teacher, found in figures["candidates"].items():
        forward = classifier_flops(load_folder(find_model(teacher)), (3, 16, 16), batch=32, train=False)
        assert found["bound"] == pytest.approx(1 + forward / update)
        assert found["pays_at"] == pytest.approx(max(1 - 1 / found["cost"], 0))
        for share in (found["switch"], found["probe"]):  # of 20 images
            assert 0 <= share <= 100 and share / 5 == pytest.approx(round(share / 5), abs=1e-4)
    out = capsys.readouterr().out
    assert "recommended: " in out and "rank correlation" in out and "the student alone" in out
    assert not (tmp_path / "out").exists()


def test_the_probe_follows_the_recipes_balance(tmp_path, tiny_teacher):
    """--kd-balance gives lambda another meaning."""
    command = words(DIGITS, RESNET, "--kd-balance --name choice --output", tmp_path, "--teacher", tiny_teacher)
    args, _ = parse_options([*command, "--teacher", "./other"])
    job = Choice(args).job(taught=True)
    assert job.distillation.gradients and not job.distillation.running


def test_a_probe_leaves_no_student_behind(tmp_path, tiny_teacher):
    args, _ = parse_options(words(DIGITS, RESNET, "--name choice --output", tmp_path, "--teacher", tiny_teacher, "./b"))
    choice = Choice(args)
    choice.probe(2, taught=True)
    assert not choice.run.accelerator._models and not choice.run.accelerator._optimizers


def test_what_does_not_fit_is_refused(tmp_path, tiny_teacher):
    command = words(DIGITS, RESNET, "--output", tmp_path / "out", "--teacher", tiny_teacher)
    with pytest.raises(InputError, match="only one candidate: give at least two with --teacher"):
        call_script(main, command)
    with pytest.raises(InputError, match="nowhere"):
        call_script(main, command, "--teacher", tmp_path / "nowhere")
    with pytest.raises(InputError, match="--measured gives 3 speedups for 2 candidates"):
        call_script(main, command, "--teacher ./a --measured 1 2 3")
    with pytest.raises(InputError, match="--switch-split 0 leaves no images to compare the candidates on"):
        call_script(main, command, "--teacher ./a --switch-split 0")
    with pytest.raises(InputError, match="--probe-updates 99: this recipe trains for 8 updates"):
        call_script(main, command, "--teacher ./a --probe-updates 99")
    assert not (tmp_path / "out").exists()
