"""The distances against closed forms and torch-fidelity; features; the cache of reference statistics."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity_inception
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from w2s.diffusion.frechet import (
    Classifier,
    Inception,
    Statistics,
    cached_statistics,
    frechet_distance,
    kernel_distance,
    load_features,
    measure,
    metric_labels,
)
from w2s.engine.errors import InputError
from w2s.images.models import create_model, export


def process(rank: int = 0, world: int = 1) -> SimpleNamespace:
    """One of several processes, each of which sees only its own part of a sum."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        process_index=rank,
        num_processes=world,
        is_main_process=rank == 0,
        autocast=nullcontext,
        reduce=lambda tensor, how: tensor.clone(),
    )


def of(features: torch.Tensor) -> Statistics:
    """The statistics of features that are there already."""
    return measure(lambda batch: batch, features, len(features), process())


def by_processes(world: int, *call) -> list[Statistics]:
    """What each of several processes that work together gets from `measure`; here they are threads."""
    barrier, parts = threading.Barrier(world), {}

    def reducing(rank: int):
        def reduce(tensor: torch.Tensor, how: str) -> torch.Tensor:
            parts[rank] = tensor
            barrier.wait(60)
            total = sum(parts[rank] for rank in range(world))
            barrier.wait(60)
            return total

        return reduce

    def run(rank: int) -> Statistics:
        images, count, batch_size = call[1:]
        one = process(rank, world)
        one.reduce = reducing(rank)
        return measure(call[0], images, count, one, batch_size)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mixing + torch.randn(d, generator=generator)


# ---- distances ----


def exact(mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    return Statistics(np.asarray(mean, float), np.asarray(covariance, float), np.zeros((2, len(mean))))


def test_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    mu, identity = rng.normal(size=6), np.eye(6)
    assert frechet_distance(exact(np.zeros(6), identity), exact(mu, identity)) == pytest.approx(mu @ mu)
    # commuting covariances: the sum of (s - t)^2 over their common axes
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    s, t = rng.uniform(0, 3, (2, 6))
    one, other = ((axes * v**2) @ axes.T for v in (s, t))
    expected = mu @ mu + ((s - t) ** 2).sum()
    assert frechet_distance(exact(mu, one), exact(np.zeros(6), other)) == pytest.approx(expected)


def test_a_set_with_itself_is_at_distance_zero():
    statistics = of(gaussian(500, 16, 0))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-9)


def test_singular_covariances():
    few = [of(gaussian(5, 16, seed)) for seed in (0, 1)]  # rank 4
    assert frechet_distance(few[0], few[0]) == pytest.approx(0, abs=1e-6)
    ours = frechet_distance(*few)
    theirs = fid_statistics_to_metric(*({"mu": s.mean, "sigma": s.covariance} for s in few), verbose=False)[
        KEY_METRIC_FID
    ]
    assert ours == pytest.approx(theirs, rel=1e-5)
    point = exact(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(point, exact([1, 2, 2], np.eye(3))) == pytest.approx(9 + 3)


def test_frechet_distance_is_torch_fidelitys():
    one, other = gaussian(400, 24, 1), gaussian(300, 24, 2)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f.double()) for f in (one, other)), verbose=False)[
        KEY_METRIC_FID
    ]
    assert frechet_distance(of(one), of(other)) == pytest.approx(theirs, rel=1e-9)


def test_kid_is_torch_fidelitys():
    one, other = gaussian(1100, 8, 1), gaussian(1050, 8, 1)[:, :8] + 0.1
    theirs = kid_features_to_metric(one.double(), other.double(), kid_subsets=10, kid_subset_size=1000, verbose=False)
    ours = kernel_distance(of(one), of(other))
    assert ours == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)
    small = kernel_distance(of(one[:60]), of(other))  # a set too small for subsets
    assert np.isfinite(small)


def test_statistics_are_of_float64():
    features = gaussian(5000, 4, 0) + 1000  # in float32 sums of squares the covariance would drown
    statistics = of(features)
    reference = np.cov(features.double().numpy(), rowvar=False)
    assert np.allclose(statistics.covariance, reference, rtol=1e-9)
    assert np.allclose(statistics.mean, features.double().mean(0).numpy(), rtol=1e-12)
    with pytest.raises(InputError, match="two images"):
        of(features[:1])


def test_features_that_are_not_finite_give_nan():
    bad = gaussian(10, 4, 0)
    bad[0, 0] = torch.inf
    assert np.isnan(frechet_distance(of(bad), of(gaussian(10, 4, 1))))


def same_bits(one: Statistics, other: Statistics) -> bool:
    return all(np.array_equal(getattr(one, k), getattr(other, k)) for k in ("mean", "covariance", "features"))


def test_statistics_do_not_depend_on_processes_or_batches():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (23, 1, 8, 8), dtype=torch.uint8)
    network = torch.nn.Linear(64, 7)
    features = lambda batch: network(batch.float().flatten(1) / 255).detach()  # noqa: E731
    whole = measure(features, images, 23, process(), 5)
    assert whole.features.shape == (23, 7)
    for world in (2, 3, 8):  # 8: more processes than batches
        assert all(same_bits(whole, each) for each in by_processes(world, features, images, 23, 5))
    for batch_size in (1, 7, 100):
        other = measure(features, images, 23, process(), batch_size)
        assert np.allclose(whole.features, other.features, atol=1e-6)
        assert np.allclose(whole.mean, other.mean, atol=1e-6) and np.allclose(whole.covariance, other.covariance)
    assert same_bits(whole, measure(features, lambda rows: images[rows.start : rows.stop], 23, process(), 5))


@pytest.mark.parametrize("offset", [0, 1000])
def test_sums_over_batches_are_those_of_all_at_once(offset):
    features = gaussian(10_100, 6, 0) + offset  # more than KID keeps
    mean, covariance = features.double().numpy().mean(0), np.cov(features.double().numpy(), rowvar=False)
    scale = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
    for world, batch_size in ((1, 1000), (1, 33), (3, 512)):
        for found in by_processes(world, lambda batch: batch, features, len(features), batch_size):
            assert np.allclose(found.mean, mean, rtol=1e-9, atol=0)
            assert (np.abs(found.covariance - covariance) / scale).max() < 1e-9
            assert np.array_equal(found.features, of(features).features) and len(found.features) == 10_000


def test_images_are_read_a_batch_at_a_time():
    read = []
    measure(lambda batch: batch, lambda rows: read.append(rows) or torch.rand(len(rows), 3), 23, process(), 5)
    assert [row for rows in read for row in rows] == list(range(23)) and max(map(len, read)) == 5


def test_features_kept_for_kid_are_of_all_classes():
    features = (torch.arange(20_000) % 10).float()[:, None]  # the class of a sample is its index modulo the classes
    kept = of(features).features
    assert len(kept) == 10_000 and np.bincount(kept[:, 0].astype(int)).min() > 900
    assert np.array_equal(kept, of(features).features)
    assert np.array_equal(of(features[:10_000]).features, features[:10_000].numpy())


def test_root_that_is_not_found_gives_nan():
    one, other = (of(gaussian(50, 4, seed)) for seed in (0, 1))
    with mock.patch("numpy.linalg.eigh", side_effect=np.linalg.LinAlgError("Eigenvalues did not converge")):
        assert np.isnan(frechet_distance(one, other))


# ---- features ----


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
    assert torch.allclose(network.get_classifier()(out), network(x), atol=1e-5)
    assert features(images[:, :1, ::4, ::4]).shape == (4, 24)  # grey and small: repeated and enlarged
    assert not network.training


def test_labels_say_features_and_number(classifier_run):
    names = ("fd512_cifar10-resnet10t", "mmd512_cifar10-resnet10t")
    assert metric_labels(Classifier(str(classifier_run)), 512) == names
    assert metric_labels(Classifier(str(classifier_run / "model")), 5000)[0] == "fd5k_cifar10-resnet10t"
    assert metric_labels(SimpleNamespace(inception=True, name="inception"), 10_000) == ("fid10k", "kid10k")


def test_inception_is_torch_fidelitys_and_its_weights_are_checked(tmp_path):
    cls = fidelity_inception.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with mock.patch.object(fidelity_inception, "load_state_dict_from_url"), mock.patch.object(cls, "load_state_dict"):
        theirs = cls("inception-v3-compat", ["2048"])  # random weights
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    ours = load_features(None, str(tmp_path / "inception.pth"), 1)
    assert (ours.inception, ours.name) == (True, "inception")
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(ours(images), theirs(images.repeat(1, 3, 1, 1))[0])
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


# ---- the cache ----


def test_reference_statistics_are_computed_once_for_a_key(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return of(gaussian(50, 4, len(calls)))

    key = {"dataset": "digits", "split": "train", "size": 8, "n": 50, "features": "abc"}
    first = cached_statistics(tmp_path / "cache", key, make, process())
    again = cached_statistics(tmp_path / "cache", key, make, process())
    assert len(calls) == 1
    for part in ("mean", "covariance", "features"):
        assert np.array_equal(getattr(first, part), getattr(again, part))
    for change in ({"n": 51}, {"split": "test"}, {"size": 16}, {"features": "abd"}, {"dataset": "x"}):
        cached_statistics(tmp_path / "cache", {**key, **change}, make, process())
    assert len(calls) == 6 and len(list((tmp_path / "cache").iterdir())) == 6
    assert cached_statistics(None, key, make, process()) is not None and len(calls) == 7


def test_damaged_cache_is_made_anew(tmp_path):
    make = lambda: of(gaussian(50, 4, 0))  # noqa: E731
    cached_statistics(tmp_path, {"n": 1}, make, process())
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    statistics = cached_statistics(tmp_path, {"n": 1}, make, process())
    assert np.array_equal(statistics.mean, make().mean) and path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
