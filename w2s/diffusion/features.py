"""Feature extractors that samples are judged by: Inception, or a classifier that was trained with train_cls.py."""

import hashlib
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from w2s.engine.errors import InputError, first_line
from w2s.images.models import find_model, load_folder


class Inception(nn.Module):
    """torch-fidelity's Inception network and its 2048 features after the last pooling.

    Args:
        weights: path of its .pth file; None downloads it.

    Raises:
        InputError: there is no such file, it holds other weights, or the download fails.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        try:
            if weights is not None:  # torch-fidelity would unpickle anything; this lets only tensors through
                torch.load(weights, map_location="cpu", weights_only=True)
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights, verbose=False
            )
        except Exception as error:  # urllib, pickle and torch raise many kinds
            what = f"--fid-weights {weights}" if weights else f"cannot download {URL_INCEPTION_V3}"
            raise InputError(
                f"{what}: {type(error).__name__}: {first_line(error, limit=200)}; give --fid-weights FILE or "
                "--fd-features RUN"
            ) from None
        self.name, self.is_inception = "inception", True
        self.digest = weights_digest(self.network)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of uint8 images (B, 1 or 3, H, W)."""
        return self.network(images.expand(-1, 3, -1, -1))[0]


class Classifier(nn.Module):
    """The penultimate features of a classifier, as from timm's `forward_head(pre_logits=True)`.

    Args:
        run: a run folder of train_cls.py, or an exported model folder.

    Raises:
        InputError: there is no model, or it cannot be loaded.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        folder = find_model(run)
        self.network = load_folder(folder).eval().requires_grad_(False)
        config = self.network.pretrained_cfg
        self.size, self.mode = tuple(config["input_size"][-2:]), config.get("interpolation", "bicubic")
        self.channels = config["input_size"][0]
        for part in ("mean", "std"):
            self.register_buffer(part, torch.tensor(config[part]).view(1, -1, 1, 1))
        self.name, self.is_inception = _classifier_name(folder, config.get("architecture")), False
        self.digest = weights_digest(self.network)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, d) of uint8 images (B, C, H, W), which are scaled, resized and normalised for the classifier."""
        x = images.float() / 255
        if x.shape[1] != self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        if tuple(x.shape[-2:]) != self.size:
            mode = self.mode if self.mode in ("bilinear", "bicubic") else "bicubic"
            x = F.interpolate(x, self.size, mode=mode, antialias=True).clamp(0, 1)
        features = self.network.forward_features((x - self.mean) / self.std)
        return self.network.forward_head(features, pre_logits=True).flatten(1)


def _classifier_name(folder: Path, architecture: str | None) -> str:
    """DATASET-ARCHITECTURE of an exported model; the architecture alone if it is in no run folder."""
    model_args = json.loads((folder / "config.json").read_text()).get("model_args") or {}
    architecture = str(model_args.get("base") or architecture)
    try:
        dataset = yaml.safe_load((folder.parent / "args.yaml").read_text())["dataset"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):  # not a run folder
        dataset = ""
    name = "-".join(filter(None, [dataset.rpartition("/")[-1], architecture]))
    return re.sub(r"[^\w.-]+", "_", name)


def load_features(run: str | None, weights: str | None, channels: int) -> Inception | Classifier:
    """The feature extractor that --fd-features and --fid-weights choose.

    Args:
        run: --fd-features; None for Inception.
        weights: --fid-weights.
        channels: of the images.

    Raises:
        InputError: both are given, the extractor cannot be loaded, or the classifier takes another number of channels.
    """
    if run and weights:
        raise InputError("--fd-features and --fid-weights are two kinds of features; give one")
    features = Classifier(run) if run else Inception(weights)
    if run and channels != features.channels and channels != 1:
        raise InputError(f"--fd-features {run} takes {features.channels} channel(s), the images have {channels}")
    return features


def weights_digest(model: nn.Module) -> str:
    """A short hash of a model's weights."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


def metric_names(features: Inception | Classifier, count: int) -> tuple[str, str]:
    """The names of the Frechet and the kernel distance of `count` samples.

    On Inception features they are FID and KID: fid10k and kid10k. On other features they may not be called that, and
    their names say which features they are of: fd512_NAME and mmd512_NAME.
    """
    number = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    if features.is_inception:
        return f"fid{number}", f"kid{number}"
    return f"fd{number}_{features.name}", f"mmd{number}_{features.name}"
