"""What builds a detector: defaults, and what is refused."""

import pytest
from detection.detectors import NAMES, tiny
from torchvision.models.detection.retinanet import _default_anchorgen

from w2s.detection.config import DETECTOR_KINDS, DetectorConfig, check_classes
from w2s.engine.errors import InputError


def test_the_default_retinanet_has_torchvisions_anchors():
    assert DetectorConfig("retinanet", "resnet50", NAMES).anchors() == _default_anchorgen().sizes


def test_the_default_faster_rcnn_has_torchvisions_anchors():
    assert DetectorConfig("fasterrcnn", "resnet50", NAMES).anchors() == ((32,), (64,), (128,), (256,), (512,))


def test_the_columns_of_metrics_are_torchvisions_losses_and_the_terms():
    assert DETECTOR_KINDS["retinanet"].loss_columns == ("classification", "bbox_regression", "kd_cls", "kd_box")


def test_data_of_other_classes_are_refused():
    check_classes(tiny(), NAMES, source="old_run")
    with pytest.raises(InputError, match="old_run has 5 classes, which are not the 5 of the data"):
        check_classes(tiny(), NAMES[::-1], source="old_run")
