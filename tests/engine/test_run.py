"""What a run decides before it begins. Folders, resumes, signals and exit codes are tested with the scripts."""

import pytest
import torch

from w2s.engine.run import default_precision


@pytest.mark.parametrize(
    ("launcher", "gpu", "has_bf16", "expected"),
    [
        (None, True, True, "bf16"),
        (None, True, False, None),
        (None, False, True, None),
        ("no", True, True, None),
        ("fp16", True, True, None),
    ],
)
def test_bf16_is_the_default_of_gpus_that_have_it_but_a_launcher_decides(
    launcher, gpu, has_bf16, expected, monkeypatch
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert default_precision() == expected
