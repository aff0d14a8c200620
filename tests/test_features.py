"""features.py: a feature space has a name that goes with every number, and what is measured does not depend on how it was read.

The statistics of batches are those of the whole, whatever their size; files keep ADM's layout and say which space they are of;
the shipped judge sees noise that was added to digits. Spaces that cannot be compared are refused in test_bad_input.py.
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import checkpoint
import data
import features
import inception
import metrics
from refusals import refusal
from scoring import METRICS
from test_scoring import extract

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge():
    return features.space_of(str(features.JUDGE), CPU)


@pytest.fixture(scope="module")
def digits():
    """Held-out digits (200, 32, 32, 1) uint8."""
    return data.load(split="test").batch(np.arange(200))[0]


@pytest.fixture(scope="module")
def network():
    """An Inception of random weights that neither shrink nor grow what passes."""
    torch.manual_seed(0)
    network = inception.Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return inception.load(network.state_dict())


@pytest.fixture(scope="module")
def space(network):
    return features.inception_space(network, CPU)


@pytest.fixture(scope="module")
def measured(space, digits):
    """Six digits in that Inception's features."""
    return features.measure(digits[:6].split(4), space)


def moments(rows):
    """Mean and covariance of all rows at once, in float64."""
    return rows.double().mean(dim=0), torch.cov(rows.double().T)


def statistics_file(path, **changes):
    """An .npz of statistics of 2 numbers with some entries changed, or left out by None."""
    tables = dict(mu=np.zeros(2), sigma=np.eye(2), mu_s=np.zeros(3), sigma_s=np.eye(3)) | changes
    np.savez(path, **{key: value for key, value in tables.items() if value is not None})
    return str(path)


def assert_same(a, b):
    """Equal statistics, and equal rows where both have them."""
    assert a.n == b.n and torch.equal(a.pool.mu, b.pool.mu) and torch.equal(a.pool.sigma, b.pool.sigma)
    assert (a.spatial is None) == (b.spatial is None)
    if a.spatial:
        assert torch.equal(a.spatial.mu, b.spatial.mu) and torch.equal(a.spatial.sigma, b.spatial.sigma)


# Spaces and their names

def test_the_shipped_judge_is_small_and_learned_the_training_digits(judge):
    assert features.JUDGE.stat().st_size < 1e6 and judge.name == "vit-mnist" and judge.sha256 == features.sha256_of(features.JUDGE)
    assert checkpoint.load(features.JUDGE).data.spec == "mnist"


def test_fid_is_inceptions_with_tensorflows_resize_and_nothing_elses(judge, network, space):
    assert [space.title(metric) for metric in METRICS] == ["IS", "FID", "sFID", "precision", "recall", "accuracy"]
    other = features.inception_space(network, CPU, tf1_resize=False)
    for named, name in ((judge, "vit-mnist"), (other, "inception-pytorch-resize")):
        assert [named.title(metric) for metric in METRICS] == [f"{metric}[{name}]" for metric in METRICS]


def test_a_vits_pooled_features_are_its_class_token_and_its_probabilities_those_of_its_classes(judge, digits):
    network = checkpoint.load_network(features.JUDGE)
    with torch.no_grad():
        found, x = judge.extract(digits[:9]), data.to_float(digits[:9])
        torch.testing.assert_close(found["pool"], network.tokens(x)[:, 0])
        torch.testing.assert_close(found["probabilities"], network(x).softmax(dim=1))
    assert set(found) == {"pool", "probabilities"} and found["pool"].shape == (9, 64)


@pytest.mark.parametrize("tf1", [True, False])
def test_inceptions_features_are_those_of_its_network_by_the_resize_asked_for(network, digits, tf1):
    found, theirs = features.inception_space(network, CPU, tf1).extract(digits[:1]), network.features(digits[:1], tf1)
    assert torch.equal(found["pool"], theirs["pool"]) and torch.equal(found["spatial"], theirs["spatial"])
    assert torch.equal(found["probabilities"], theirs["logits"].softmax(dim=1)) and found["probabilities"].shape == (1, 1008)
    assert not torch.equal(found["pool"], network.features(digits[:1], not tf1)["pool"])


def test_a_space_knows_its_classes_by_name(judge, space):
    assert judge.knows([str(i) for i in range(10)]) and judge.knows(["3", "7"])          # a file of fewer classes has these
    assert judge.numbers(np.array([1, 0, 1], np.uint8), ["3", "7"]).tolist() == [7, 3, 7]
    for classes in (None, ["3", "cat"], [str(i) for i in range(11)]):
        assert not judge.knows(classes)
    assert not space.knows(["0"])


def test_features_names_a_file_of_fids_weights(tmp_path, monkeypatch, network, digits):
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(inception, "SHA256", features.sha256_of(path))
    found = features.space_of(str(path), CPU)
    assert (found.name, found.sha256) == ("inception", inception.SHA256)
    assert features.space_of(str(path), CPU, tf1_resize=False).name == "inception-pytorch-resize"
    assert torch.equal(found.extract(digits[:1])["pool"], network.features(digits[:1])["pool"])


def test_the_judge_is_the_default_for_its_digits_and_inception_for_all_else():
    assert features.default_space("mnist", (32, 32, 1)) == str(features.JUDGE)
    for spec, shape in (("mnist", (28, 28, 1)), ("digits.npz", (32, 32, 1)), ("cifar10", (32, 32, 3))):
        assert features.default_space(spec, shape) == "inception"


def test_full_precision_is_for_the_measurement_only():
    torch.set_float32_matmul_precision("high")
    try:
        with features.full_precision():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        with torch.autocast("cpu", torch.bfloat16), features.full_precision():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


# Measuring

@given(cuts=st.lists(st.integers(0, 40), max_size=5))
@settings(max_examples=10)
def test_statistics_of_batches_are_those_of_the_whole(judge, digits, cuts):
    cuts = sorted({0, *cuts, 40})
    measured = features.measure([digits[a:b] for a, b in zip(cuts, cuts[1:])], judge)
    with torch.no_grad():
        rows = judge.extract(digits[:40])["pool"]
    mu, sigma = moments(rows)
    assert measured.n == measured.pool.n == 40 and measured.spatial is None
    torch.testing.assert_close(measured.rows, rows)
    torch.testing.assert_close(measured.pool.mu, mu, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured.pool.sigma, sigma, rtol=1e-4, atol=1e-4)


def test_spatial_statistics_are_those_of_the_spatial_features(measured, network, digits):
    found = network.features(digits[:6])
    for statistics, rows in ((measured.pool, found["pool"]), (measured.spatial, found["spatial"])):
        mu, sigma = moments(rows)
        torch.testing.assert_close(statistics.mu, mu, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.sigma, sigma, rtol=1e-3, atol=1e-8)
    assert measured.spatial.mu.shape == (2023,) and measured.pool.mu.shape == (2048,)


@pytest.mark.parametrize("keep", [0, 5, 16, 20, 99])
def test_only_the_first_rows_are_kept_and_all_are_counted(judge, digits, keep):
    whole, some = (features.measure(digits[:40].split(16), judge, keep) for keep in (None, keep))
    assert (some.rows is None if keep == 0 else torch.equal(some.rows, whole.rows[:keep])) and some.probabilities is None
    assert len(whole.rows) == len(whole.probabilities) == 40
    assert_same(some, whole)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_a_data_set_is_measured_in_the_order_asked_for_with_its_labels(judge, monkeypatch, batch):
    monkeypatch.setattr(features, "BATCH", batch)
    held_out = data.load(split="test")
    order = np.random.default_rng(0).permutation(50)
    images, labels = held_out.batch(order)
    measured, expected = features.measure_dataset(held_out, order, judge, keep=30), features.measure([images], judge)
    torch.testing.assert_close(measured.rows, expected.rows[:30], rtol=1e-4, atol=1e-4)
    assert torch.equal(measured.labels, labels) and measured.n == 50 and expected.labels is None
    named = data.Dataset("pets", held_out.images, held_out.labels % 2, ["cat", "dog"])
    assert features.measure_dataset(named, order, judge).labels is None                  # the judge knows neither


def test_nothing_measured_is_nothing_and_merges_as_nothing(judge, digits):
    empty, some = features.measure([], judge), features.measure([digits[:4]], judge)
    assert empty.n == 0 and empty.rows is None and empty.probabilities is None
    assert_same(features.measure([], judge).merge(some), some)
    assert torch.equal(some.merge(empty).rows, features.measure([digits[:4]], judge).rows) and some.n == 4


def test_a_merge_is_the_images_of_one_behind_those_of_the_other(digits):
    space = features.Space("pixels", 64 * "a", extract, None, CPU)
    first, second, measured = (features.measure([digits[a:b]], space) for a, b in ((0, 2), (2, 6), (0, 6)))
    whole = features.Measured().merge(first).merge(second)
    assert whole.n == 6 and len(whole.rows) == len(whole.probabilities) == 6
    torch.testing.assert_close(whole.rows, measured.rows)
    torch.testing.assert_close(whole.probabilities, measured.probabilities)
    for ours, theirs in ((whole.pool, measured.pool), (whole.spatial, measured.spatial)):
        assert ours.n == 6
        torch.testing.assert_close(ours.mu, theirs.mu, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.sigma, theirs.sigma, rtol=1e-3, atol=1e-7)


# What the scores see

def test_noise_on_digits_raises_the_distance_step_by_step(judge, digits):
    real = features.measure_dataset(data.load(), np.arange(300), judge)
    noise = torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))
    found = [metrics.distance(real.pool, features.measure((digits + level * noise).clamp(0, 255).byte().split(64), judge).pool)
             for level in (0, 30, 60, 120)]
    assert all(b > 1.2 * a for a, b in zip(found, found[1:])), found


# Files of statistics

def test_saved_statistics_are_read_back_as_they_were(tmp_path, judge, digits):
    measured, path = features.measure([digits], judge), str(tmp_path / "digits.npz")
    features.save_statistics(path, measured, digits[:50], judge)
    assert_same(features.read_statistics(path, judge), measured)
    with np.load(path) as archive:
        assert set(archive) == {"arr_0", "mu", "sigma", "n", "features", "features_sha256"}
        assert archive["arr_0"].dtype == np.uint8 and (archive["arr_0"] == digits[:50].numpy()).all()
        assert str(archive["features"]) == "vit-mnist" and str(archive["features_sha256"]) == judge.sha256


def test_inceptions_statistics_are_what_adms_evaluator_reads(tmp_path, measured, space, digits):
    """It takes arr_0 in colour, and the four tables if there is a mu."""
    path = str(tmp_path / "reference.npz")
    features.save_statistics(path, measured, digits[:6], space)
    with np.load(path) as archive:
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (6, 32, 32, 3)
        assert (archive["arr_0"] == digits[:6].numpy()).all()            # the same grey in all three
        for key, table in (("mu", measured.pool.mu), ("sigma", measured.pool.sigma), ("mu_s", measured.spatial.mu),
                           ("sigma_s", measured.spatial.sigma)):
            assert (archive[key] == table.numpy()).all()
    assert_same(features.read_statistics(path, space), measured)


def test_a_file_of_adms_is_inceptions_and_of_a_number_of_images_that_it_does_not_say(tmp_path, space):
    path = statistics_file(tmp_path / "adm.npz", sigma=np.eye(2, dtype=np.float32))
    found = features.read_statistics(path, space)
    assert found.n == math.inf and found.rows is None and found.pool.sigma.dtype == torch.float64
    assert found.pool.mu.shape == (2,) and found.spatial.sigma.shape == (3, 3)
    pytorch_fids = features.read_tables(statistics_file(tmp_path / "pool.npz", mu_s=None, sigma_s=None))
    assert pytorch_fids["features"] == "inception-pytorch-resize" and "mu_s" not in pytorch_fids


@pytest.mark.parametrize("changes", [
    dict(sigma=None), dict(sigma_s=None), dict(sigma=np.eye(3)), dict(sigma=np.eye(2)[:1]), dict(mu_s=np.zeros(2)),
    dict(mu=np.array("?")), dict(mu=np.array([None, None])), dict(n=np.array("many")), dict(sigma=np.ones(2)), dict(n=-5),
    dict(n=1)],
    ids=lambda changes: f"{next(iter(changes))} {next(iter(changes.values()))}".replace("\n", ""))
def test_tables_that_do_not_fit_are_refused(tmp_path, judge, changes):
    path = statistics_file(tmp_path / "odd.npz", **changes)
    refusal(lambda: features.read_statistics(path, judge), f"cannot use {path}")


@pytest.mark.parametrize("damage", [
    lambda whole: b"hello", lambda whole: whole[:10 ** 5], lambda whole: whole[:10 ** 5] + b"1" + whole[10 ** 5 + 1:]],
    ids=["text", "cut off", "another byte"])
def test_a_damaged_file_of_statistics_is_refused(tmp_path, judge, damage):
    path = statistics_file(tmp_path / "bad.npz", mu=np.arange(500.0), sigma=np.eye(500))
    Path(path).write_bytes(damage(Path(path).read_bytes()))
    refusal(lambda: features.read_statistics(path, judge), f"cannot use {path}")


def test_a_file_names_the_features_to_compare_it_in(tmp_path, judge):
    ours = statistics_file(tmp_path / "ours.npz", features="vit-mnist", features_sha256=judge.sha256)
    assert features.space_named_in(ours) == str(features.JUDGE)
    assert features.space_named_in(statistics_file(tmp_path / "adm.npz")) == "inception"
    assert features.space_named_in(statistics_file(tmp_path / "other.npz", features="inception-pytorch-resize")) == "inception"
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert features.space_named_in(str(tmp_path / "images.npz")) is None and features.space_named_in("photos") is None
    assert features.read_statistics(str(tmp_path / "images.npz"), judge) is None


def test_a_files_statistics_replace_those_of_its_images_and_leave_the_rows(tmp_path, judge, digits):
    path = str(tmp_path / "digits.npz")
    many, few = features.measure([digits], judge), features.measure([digits[:8]], judge)
    rows, own = few.rows, features.measure([digits[:8]], judge)
    features.save_statistics(path, many, digits[:8], judge)
    found = features.with_statistics(few, path, judge)
    assert_same(found, many)
    assert found.rows is rows and len(found.probabilities) == 8
    assert_same(features.with_statistics(None, path, judge), many)       # of a file without images
    np.savez(tmp_path / "images.npz", arr_0=digits[:8].numpy())
    for elsewhere in (str(tmp_path / "images.npz"), "mnist", None):
        assert_same(features.with_statistics(features.measure([digits[:8]], judge), elsewhere, judge), own)
