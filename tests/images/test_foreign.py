"""Classifiers of transformers and torchvision as teachers: the library's own logits on the library's own pixels."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import refused
from torch import nn
from torchvision import models

from w2s.images.classes import Classes
from w2s.images.foreign import load_transformers, torchvision_model
from w2s.images.teacher import ImageTeacher, build_image_teacher

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

HALF = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}  # of the student
NAMES = tuple(f"kind {letter}" for letter in "abcde")
KIND = Classes(5, (NAMES,))


def pixels(size: int = 32) -> torch.Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def teacher_of(spec: object, classes: Classes = KIND, config: dict = HALF, **options: object) -> ImageTeacher:
    options = {"model_name": None, "model_kwargs": {}, **options}
    return build_image_teacher(str(spec), classes=classes, data_config=config, device="cpu", **options)


def spread(model: nn.Module) -> nn.Module:
    """The model with weights that show in its logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


# ---- transformers ----


def save_vit(folder: Path, image_size: int = 24, names: tuple | None = NAMES, **processor: object) -> nn.Module:
    labels = {"id2label": dict(enumerate(names))} if names else {"num_labels": 5}
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=image_size,
        patch_size=8,
        **labels,
    )
    torch.manual_seed(0)
    model = spread(transformers.ViTForImageClassification(config))
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    transformers.ViTImageProcessor(**{"size": size, **processor}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("transformers") / "vit"
    return folder, save_vit(folder, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])


@torch.no_grad()
def test_a_transformer_gets_the_pixels_that_its_own_processor_makes(vit):
    folder, model = vit
    images = (pixels(24) * 255).round() / 255
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    own = processor((images * 255).to(torch.uint8), return_tensors="pt")["pixel_values"]
    teacher = teacher_of(folder, config={**HALF, "input_size": (3, 24, 24)})
    given = teacher((images - 0.5) / 0.5)
    torch.testing.assert_close(given, model(own).logits, atol=1e-4, rtol=1e-4)
    assert (teacher.name, teacher.source, teacher.size, teacher.known) == ("vit", str(folder), (24, 24), None)
    assert not torch.allclose(given, model((images - 0.5) / 0.5).logits, atol=1e-2)


@torch.no_grad()
def test_a_transformer_gets_images_of_its_own_size(vit):
    folder, model = vit
    own = F.interpolate(
        (pixels() - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)), (24, 24), mode="bicubic", antialias=True
    )
    own = own / torch.tensor([0.5, 0.6, 0.7]).view(-1, 1, 1)
    given = teacher_of(folder)((pixels() - 0.5) / 0.5)
    torch.testing.assert_close(given, model(own).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_classes_go_by_the_names_of_id2label(vit):
    folder, _ = vit
    in_order, images = teacher_of(folder)(pixels()), pixels()
    turned = Classes(5, (NAMES[::-1],))
    assert torch.equal(teacher_of(folder, turned)(images), in_order.flip(-1))
    fewer = teacher_of(folder, Classes(2, ((NAMES[3], NAMES[1]),)))
    assert torch.equal(fewer(images), in_order[:, [3, 1]]) and fewer.known is None
    more = teacher_of(folder, Classes(6, (("kind z", *NAMES),)))
    assert more.known.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(more(images)[:, 1:], in_order) and (more(images)[:, 0] == -torch.inf).all()
    assert "knows 5 of the 6 classes, matched by name" in more.note
    assert more.model.num_classes == 6


def test_made_up_names_are_none(tmp_path):
    save_vit(tmp_path, names=None)
    model = load_transformers(str(tmp_path))
    assert model.pretrained_cfg["label_names"] is None
    teacher_of(tmp_path, KIND)  # equally many: by position


@pytest.mark.parametrize(
    ("processor", "size", "mean", "std"),
    [
        ({"do_normalize": False}, (24, 24), 0.0, 1.0),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, (24, 24), 0.5, 0.2),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}, (24, 24), 0.5, 0.25),
    ],
)
def test_the_processors_scale_is_taken_into_account(tmp_path, processor, size, mean, std):
    save_vit(tmp_path, **processor)
    config = load_transformers(str(tmp_path)).pretrained_cfg
    assert config["input_size"] == (3, *size)
    assert config["mean"] == pytest.approx((mean,) * 3) and config["std"] == pytest.approx((std,) * 3)


def test_a_centre_crop_is_the_size(tmp_path):
    save_vit(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24}).save_pretrained(
        tmp_path
    )
    assert load_transformers(str(tmp_path)).pretrained_cfg["input_size"] == (3, 24, 24)


def test_an_untrained_transformer_has_the_same_shape_and_other_weights(vit):
    teacher = teacher_of(vit[0])
    trained = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    untrained = teacher.rebuild().state_dict()
    assert {name: tensor.shape for name, tensor in untrained.items()} == {n: t.shape for n, t in trained.items()}
    assert not torch.equal(untrained["model.classifier.weight"], trained["model.classifier.weight"])


def test_a_folder_without_an_image_processor_is_refused(vit, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((vit[0] / name).read_bytes())
    with refused(str(tmp_path), "preprocessor_config.json", "save its image processor beside it"):
        teacher_of(tmp_path)


def test_a_model_without_a_trained_classifier_is_refused(tmp_path):
    model = save_vit(tmp_path)
    model.vit.save_pretrained(tmp_path)
    with refused(str(tmp_path), "no weights for classifier"):
        teacher_of(tmp_path)


def test_a_name_that_the_hub_does_not_give_is_refused():
    with refused("somebody/nothing", "image processor"):
        teacher_of("transformers:somebody/nothing")


def test_without_transformers_one_line_says_what_to_install(vit):
    with mock.patch.dict(sys.modules, {"transformers": None}), refused("pip install transformers"):
        teacher_of(vit[0])


# ---- torchvision ----


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = spread(models.resnet18(num_classes=5))
    path = tmp_path_factory.mktemp("torchvision") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return path, model


@torch.no_grad()
def test_a_torchvision_file_is_given_the_students_pixels(resnet):
    path, model = resnet
    teacher = teacher_of(path, model_name="torchvision/resnet18")
    torch.testing.assert_close(teacher(pixels()), model(pixels()), atol=1e-4, rtol=1e-4)
    assert (teacher.name, teacher.size, teacher.same_range) == ("torchvision/resnet18", (32, 32), True)


def test_a_tag_says_which_images_the_weights_take(resnet):
    model = torchvision_model("torchvision/resnet50.IMAGENET1K_V2", model_kwargs={}, num_classes=1000)
    entry = models.ResNet50_Weights.IMAGENET1K_V2
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert model.pretrained_cfg["mean"] == entry.transforms().mean
    assert model.pretrained_cfg["label_names"] == tuple(entry.meta["categories"])
    teacher = teacher_of(resnet[0], Classes(5), model_name="torchvision/resnet18.IMAGENET1K_V1")  # a finetuned head
    assert (teacher.size, teacher.same_range) == ((224, 224), False)


@torch.no_grad()
def test_a_map_takes_classes_out_of_a_torchvision_file(resnet, tmp_path):
    path, model = resnet
    (tmp_path / "map.txt").write_text("4\n-\n0\n")
    teacher = teacher_of(path, Classes(3), model_name="torchvision/resnet18", map_file=str(tmp_path / "map.txt"))
    torch.testing.assert_close(teacher(pixels())[:, [0, 2]], model(pixels())[:, [4, 0]], atol=1e-4, rtol=1e-4)
    assert teacher.known.tolist() == [0, 2]
    with refused("the teacher has 5 classes, the data 3", "--teacher-classes"):
        teacher_of(path, Classes(3), model_name="torchvision/resnet18")


@pytest.mark.parametrize(
    ("arch", "model", "name"),
    [
        ("resnet18", lambda: models.resnet18(num_classes=5), "resnet18"),  # timm's has the same weights
        ("mobilenet_v2", lambda: models.mobilenet_v2(num_classes=5), "torchvision/mobilenet_v2"),
    ],
)
def test_a_checkpoint_that_names_its_architecture_needs_no_more(tmp_path, arch, model, name):
    torch.save(
        {"arch": arch, "state_dict": {f"module.{k}": v for k, v in model().state_dict().items()}}, tmp_path / "c.pth"
    )
    assert teacher_of(tmp_path / "c.pth").name == name


def test_a_timm_checkpoint_brings_the_arguments_of_its_architecture(tmp_path):
    import argparse

    from w2s.images.models import create_model

    tiny = {"channels": (8, 8, 16, 16), "stem_width": 8}
    model = create_model("resnet10t", 5, model_kwargs=tiny)
    options = argparse.Namespace(model_kwargs=tiny)
    torch.save({"arch": "resnet10t", "state_dict": model.state_dict(), "args": options}, tmp_path / "last.pth")
    assert teacher_of(tmp_path / "last.pth").params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision/resnet19", ("no classification model 'resnet19'", "did you mean")),
        ("torchvision/resnet18.COCO", ("no weights 'COCO', it has IMAGENET1K_V1",)),
        ("torchvision/retinanet_resnet50_fpn", ("no classification model",)),
    ],
)
def test_unknown_models_of_torchvision_are_refused(resnet, name, words):
    with refused(*words):
        teacher_of(resnet[0], model_name=name)


# ---- what is no classifier ----


@pytest.mark.parametrize(
    ("config", "words"),
    [({"detector": "retinanet", "backbone": "resnet18"}, "a detector (retinanet)"), ({"name": "x"}, "another kind")],
)
def test_another_kind_of_model_is_called_so(tmp_path, config, words):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors").touch()
    with refused("is no classifier", words):
        teacher_of(tmp_path)


def test_the_weights_of_a_detector_are_called_so(tmp_path):
    torch.save({"backbone.body.conv1.weight": torch.zeros(1)}, tmp_path / "detector.pth")
    with refused("detector.pth", "holds the weights of a detector"):
        teacher_of(tmp_path / "detector.pth", model_name="resnet18")
