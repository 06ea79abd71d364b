"""The distances against closed forms and torch-fidelity; the statistics of features, and their cache."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from diffusion.fakes import fake_accelerator
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from w2s.diffusion.frechet import (
    Statistics,
    cached_statistics,
    feature_statistics,
    frechet_distance,
    kernel_distance,
)
from w2s.engine.errors import InputError


def identity(batch: torch.Tensor) -> torch.Tensor:
    """Features that are the "images" themselves."""
    return batch


def statistics_of(features: torch.Tensor) -> Statistics:
    return feature_statistics(identity, features, fake_accelerator(), count=len(features))


def statistics_by_processes(world: int, features: Callable, images: torch.Tensor, batch_size: int) -> list[Statistics]:
    """What each of several processes gets that work together; here they are threads."""
    barrier, parts = threading.Barrier(world), {}

    def run(rank: int) -> Statistics:
        def reduce(tensor: torch.Tensor, how: str) -> torch.Tensor:
            parts[rank] = tensor
            barrier.wait(60)
            total = sum(parts[other] for other in range(world))
            barrier.wait(60)
            return total

        accelerator = fake_accelerator(rank, world)
        accelerator.reduce = reduce
        return feature_statistics(features, images, accelerator, count=len(images), batch_size=batch_size)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mixing + torch.randn(d, generator=generator)


# ---- distances ----


def exact(mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    """The statistics of a distribution, without any images."""
    return Statistics(np.asarray(mean, float), np.asarray(covariance, float), np.zeros((2, len(mean))))


def test_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    mu, identity = rng.normal(size=6), np.eye(6)
    assert frechet_distance(exact(np.zeros(6), identity), exact(mu, identity)) == pytest.approx(mu @ mu)
    # commuting covariances: the sum of (s - t)^2 over their common axes
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    s, t = rng.uniform(0, 3, (2, 6))
    one, other = (axes * s**2) @ axes.T, (axes * t**2) @ axes.T
    expected = mu @ mu + ((s - t) ** 2).sum()
    assert frechet_distance(exact(mu, one), exact(np.zeros(6), other)) == pytest.approx(expected)


def test_a_set_with_itself_is_at_distance_zero():
    statistics = statistics_of(gaussian(500, 16, 0))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-9)


def test_singular_covariances():
    one, other = statistics_of(gaussian(5, 16, 0)), statistics_of(gaussian(5, 16, 1))  # of rank 4
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, other) == pytest.approx(
        fidelity_distance({"mu": one.mean, "sigma": one.covariance}, {"mu": other.mean, "sigma": other.covariance}),
        rel=1e-5,
    )
    point = exact(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(point, exact([1, 2, 2], np.eye(3))) == pytest.approx(9 + 3)


def fidelity_distance(one: dict, other: dict) -> float:
    """torch-fidelity's FID of its own statistics."""
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def test_frechet_distance_is_torch_fidelitys():
    one, other = gaussian(400, 24, 1), gaussian(300, 24, 2)
    theirs = fidelity_distance(fid_features_to_statistics(one.double()), fid_features_to_statistics(other.double()))
    assert frechet_distance(statistics_of(one), statistics_of(other)) == pytest.approx(theirs, rel=1e-9)


def test_kid_is_torch_fidelitys():
    one, other = gaussian(1100, 8, 1), gaussian(1050, 8, 1) + 0.1
    theirs = kid_features_to_metric(one.double(), other.double(), kid_subsets=10, kid_subset_size=1000, verbose=False)
    ours = kernel_distance(statistics_of(one), statistics_of(other))
    assert ours == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)
    small = kernel_distance(statistics_of(one[:60]), statistics_of(other))  # a set too small for subsets
    assert np.isfinite(small)


def test_statistics_are_of_float64():
    features = gaussian(5000, 4, 0) + 1000  # in float32 sums of squares the covariance would drown
    statistics = statistics_of(features)
    reference = np.cov(features.double().numpy(), rowvar=False)
    assert np.allclose(statistics.covariance, reference, rtol=1e-9)
    assert np.allclose(statistics.mean, features.double().mean(0).numpy(), rtol=1e-12)
    with pytest.raises(InputError, match="two images"):
        statistics_of(features[:1])


def test_features_that_are_not_finite_give_nan():
    broken = gaussian(10, 4, 0)
    broken[0, 0] = torch.inf
    assert np.isnan(frechet_distance(statistics_of(broken), statistics_of(gaussian(10, 4, 1))))


def assert_close_statistics(one: Statistics, other: Statistics) -> None:
    """Equal but for the rounding of float32 features of magnitude 1: some 1e-7, and 1e-6 to be safe."""
    np.testing.assert_allclose(one.features, other.features, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one.mean, other.mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one.covariance, other.covariance, rtol=0, atol=1e-6)


def test_statistics_do_not_depend_on_processes_or_batches():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (23, 1, 8, 8), dtype=torch.uint8)
    network = torch.nn.Linear(64, 7)

    def features(batch: torch.Tensor) -> torch.Tensor:
        return network(batch.float().flatten(1) / 255)

    whole = feature_statistics(features, images, fake_accelerator(), count=23, batch_size=5)
    assert whole.features.shape == (23, 7)
    for world in (2, 3, 8):  # 8: more processes than batches
        for each in statistics_by_processes(world, features, images, batch_size=5):
            assert_close_statistics(whole, each)
    for batch_size in (1, 7, 100):
        other = feature_statistics(features, images, fake_accelerator(), count=23, batch_size=batch_size)
        assert_close_statistics(whole, other)

    def read(batches: list[range]) -> Iterator[torch.Tensor]:
        yield from (images[rows.start : rows.stop] for rows in batches)

    assert_close_statistics(whole, feature_statistics(features, read, fake_accelerator(), count=23, batch_size=5))


@pytest.mark.parametrize("offset", [0, 1000])
def test_sums_over_batches_are_those_of_all_at_once(offset):
    features = gaussian(10_100, 6, 0) + offset  # more than KID keeps
    mean, covariance = features.double().numpy().mean(0), np.cov(features.double().numpy(), rowvar=False)
    scale = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
    for world, batch_size in ((1, 1000), (1, 33), (3, 512)):
        for found in statistics_by_processes(world, identity, features, batch_size):
            assert np.allclose(found.mean, mean, rtol=1e-9, atol=0)
            assert (np.abs(found.covariance - covariance) / scale).max() < 1e-9
            assert np.array_equal(found.features, statistics_of(features).features)  # copied, not computed
            assert len(found.features) == 10_000


def test_images_are_read_a_batch_at_a_time():
    read, used = [], []

    def serve(batches: list[range]) -> Iterator[torch.Tensor]:
        for rows in batches:
            read.append(rows)
            assert len(read) == len(used) + 1
            yield torch.rand(len(rows), 3)

    def features(batch: torch.Tensor) -> torch.Tensor:
        used.append(len(batch))
        return batch

    feature_statistics(features, serve, fake_accelerator(), count=23, batch_size=5)
    assert [row for rows in read for row in rows] == list(range(23))
    assert max(used) == 5


def test_features_kept_for_kid_are_of_all_classes():
    features = (torch.arange(20_000) % 10).float()[:, None]  # the class of a sample is its index modulo the classes
    kept = statistics_of(features).features
    assert len(kept) == 10_000 and np.bincount(kept[:, 0].astype(int)).min() > 900
    assert np.array_equal(kept, statistics_of(features).features)
    assert np.array_equal(statistics_of(features[:10_000]).features, features[:10_000].numpy())


def test_root_that_is_not_found_gives_nan():
    one, other = statistics_of(gaussian(50, 4, 0)), statistics_of(gaussian(50, 4, 1))
    with mock.patch("numpy.linalg.eigh", side_effect=np.linalg.LinAlgError("Eigenvalues did not converge")):
        assert np.isnan(frechet_distance(one, other))


# ---- the cache ----


def test_reference_statistics_are_computed_once_for_a_key(tmp_path):
    calls = 0

    def compute() -> Statistics:
        nonlocal calls
        calls += 1
        return statistics_of(gaussian(50, 4, calls))

    def cached(folder, key: dict) -> Statistics:
        return cached_statistics(folder, key, compute=compute, accelerator=fake_accelerator())

    key = {"dataset": "digits", "split": "train", "size": 8, "n": 50, "features": "abc"}
    first, again = cached(tmp_path / "cache", key), cached(tmp_path / "cache", key)
    assert calls == 1
    for part in ("mean", "covariance", "features"):  # written and read: equal bits
        assert np.array_equal(getattr(first, part), getattr(again, part))
    for change in ({"n": 51}, {"split": "test"}, {"size": 16}, {"features": "abd"}, {"dataset": "x"}):
        cached(tmp_path / "cache", {**key, **change})
    assert calls == 6 and len(list((tmp_path / "cache").iterdir())) == 6
    assert cached(None, key) is not None and calls == 7


def test_damaged_cache_is_made_anew(tmp_path):
    statistics = statistics_of(gaussian(50, 4, 0))

    def cached() -> Statistics:
        return cached_statistics(tmp_path, {"n": 1}, compute=lambda: statistics, accelerator=fake_accelerator())

    cached()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert cached() is statistics and path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
