"""The built-in digits: the same every time, kept once, and inside their boxes."""

import numpy as np
import pytest
from detection.annotated import data_options
from PIL import Image

from w2s.detection import digits
from w2s.detection.options import open_training_data
from w2s.engine.errors import InputError


def test_the_built_in_digits_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        digits.write_digits(tmp_path / name, train=3, val=2, size=96)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 7
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    digits.write_digits(tmp_path / "c", train=3, val=2, size=96, seed=1)
    assert (tmp_path / "a" / files[2]).read_bytes() != (tmp_path / "c" / files[2]).read_bytes()
    data = open_training_data(data_options("--data", tmp_path / "a"), first_label=0)
    assert data.classes == [str(k) for k in range(10)] and len(data.train) == 3
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


def test_a_set_that_is_there_already_stays(tmp_path):
    digits.write_digits(tmp_path / "set", train=2, val=2, size=64)
    before = (tmp_path / "set" / "annotations" / "instances_val2017.json").read_bytes()
    digits.write_digits(tmp_path / "set", train=2, val=2, size=64, seed=1)
    assert (tmp_path / "set" / "annotations" / "instances_val2017.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_built_in_digits_are_kept_once_and_not_in_a_dry_run(tmp_path, monkeypatch):
    small, at_exit = {"train": 3, "val": 2, "size": 96, "digits": 2, "seed": 0}, []
    monkeypatch.setattr(digits, "PARAMETERS", small)
    monkeypatch.setattr(digits.atexit, "register", lambda *call, **kwargs: at_exit.append((*call, kwargs)))
    monkeypatch.setattr(digits.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    output = tmp_path / "out"
    args = data_options("--data digits_det --output", output)
    dry_run = data_options("--dry-run --data digits_det --output", output)
    assert len(open_training_data(dry_run, first_label=0).train) == 3
    assert not output.exists() and len(list((tmp_path / "scratch").iterdir())) == 1
    for remove, path, kwargs in at_exit:
        remove(path, **kwargs)
    assert not list((tmp_path / "scratch").iterdir())
    open_training_data(args, first_label=0)
    assert not output.exists(), "a run that is refused later leaves nothing"
    digits.keep_digits(output / "digits_det")
    assert not list(output.glob(".*")), "nothing half-written stays"
    written = (output / "digits_det" / "annotations" / "instances_val2017.json").stat().st_mtime_ns
    open_training_data(args, first_label=0)
    open_training_data(dry_run, first_label=0)
    digits.keep_digits(output / "digits_det")
    assert (output / "digits_det" / "annotations" / "instances_val2017.json").stat().st_mtime_ns == written
    monkeypatch.setattr(digits, "PARAMETERS", small | {"seed": 1})
    with pytest.raises(InputError, match="digits_det is not the built-in set as it is written today: remove"):
        open_training_data(args, first_label=0)


def test_digits_lie_in_their_boxes():
    class Bars:
        """A digit that is a full bar, on a background of nothing."""

        def __len__(self):
            return 1

        def __getitem__(self, index):
            pixels = np.zeros((8, 8), np.uint8)
            pixels[:, 3:5] = 255
            return Image.fromarray(pixels), 4

    counts = set()
    for seed in range(20):
        canvas, boxes = digits.draw_canvas(Bars(), np.random.default_rng(seed), size=96, digits=6)
        counts.add(len(boxes))
        blank, _ = digits.draw_canvas(Bars(), np.random.default_rng(seed), size=96, digits=1)
        covered = np.zeros((96, 96), int)
        for label, (x, y, width, height) in boxes:
            assert label == 4 and height > 2 * width and min(x, y) >= 0 and x + width <= 96 and y + height <= 96
            covered[y : y + height, x : x + width] += 1
        assert covered.max() == 1, "digits do not overlap"
        assert canvas.size == blank.size == (96, 96)
    assert len(counts) > 3 and max(counts) <= 6
