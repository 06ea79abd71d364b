"""The features that samples are judged by, and the names that they give to the distances."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity_inception
from torch.testing import assert_close

from w2s.diffusion.features import Classifier, Inception, load_features, metric_names
from w2s.engine.errors import InputError
from w2s.images.models import create_model, export


@pytest.fixture(scope="module")
def classifier_run(tmp_path_factory):
    """A run folder as train_cls.py leaves it, untrained."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = create_model("resnet10t", 10, 3, model_kwargs={"channels": (8, 8, 16, 24), "stem_width": 8})
    cfg = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"}
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    export(model, folder / "model")
    (folder / "args.yaml").write_text("dataset: hfds/some/cifar10\n")
    return folder


def test_classifier_features_are_its_penultimate_ones(classifier_run):
    features = load_features(str(classifier_run), None, 3)
    assert features.name == "cifar10-resnet10t"
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    out = features(images)
    assert out.shape == (4, 24)
    x = (images / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    network = features.network
    assert_close(network.get_classifier()(out), network(x))
    assert features(images[:, :1, ::4, ::4]).shape == (4, 24)  # grey and small: repeated and enlarged
    assert not network.training


def test_names_say_features_and_number(classifier_run):
    names = ("fd512_cifar10-resnet10t", "mmd512_cifar10-resnet10t")
    assert metric_names(Classifier(str(classifier_run)), 512) == names
    assert metric_names(Classifier(str(classifier_run / "model")), 5000)[0] == "fd5k_cifar10-resnet10t"
    assert metric_names(SimpleNamespace(is_inception=True, name="inception"), 10_000) == ("fid10k", "kid10k")


def test_inception_is_torch_fidelitys_and_its_weights_are_checked(tmp_path):
    cls = fidelity_inception.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with mock.patch.object(fidelity_inception, "load_state_dict_from_url"), mock.patch.object(cls, "load_state_dict"):
        theirs = cls("inception-v3-compat", ["2048"])  # random weights
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    ours = load_features(None, str(tmp_path / "inception.pth"), 1)
    assert (ours.is_inception, ours.name) == (True, "inception")
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    # the layout of the images in memory differs, and with it perhaps the kernel
    assert_close(ours(images), theirs(images.repeat(1, 3, 1, 1))[0], rtol=1e-4, atol=1e-4)
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    for path in ("bad.pth", "missing.pth"):
        with pytest.raises(InputError, match=f"--fid-weights .*{path}"):
            Inception(str(tmp_path / path))
    offline = mock.patch.object(fidelity_inception, "load_state_dict_from_url", side_effect=OSError("no route"))
    with offline, pytest.raises(InputError, match=r"cannot download .*no route; give --fid-weights FILE or --fd-feat"):
        Inception()


def test_bad_features_are_named(classifier_run, tmp_path):
    with pytest.raises(InputError, match="give one"):
        load_features(str(classifier_run), "x.pth", 3)
    with pytest.raises(InputError, match="holds no exported model"):
        load_features(str(tmp_path), None, 3)
    grey = create_model("resnet10t", 10, 1, model_kwargs={"channels": (8, 8, 8, 8), "stem_width": 8})
    grey.pretrained_cfg = {**grey.pretrained_cfg, "input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    export(grey, tmp_path / "model")
    assert load_features(str(tmp_path), None, 1).name == "resnet10t"
    with pytest.raises(InputError, match=r"takes 1 channel\(s\), the images have 3"):
        load_features(str(tmp_path), None, 3)
