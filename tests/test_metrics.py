"""metrics.py: numbers of the evaluators in use, closed forms, properties, and definitions written out a second time.

Golden features are made from seeds here; the file has the sums they must have, and what pytorch-fid, ADM's evaluator and
torch-fidelity computed from them. Everything else is checked from another direction: the Fréchet distance as the cost of the
optimal transport between two Gaussians, the covariance as NumPy's, the Inception score as a difference of entropies, precision
and recall by their definition in whole numbers, where every tie is exact.

Tolerances. A distance is a difference of traces, so rounding is relative to tr S1 + tr S2. With all eigenvalues well above 0 it
is a few 1e-14 of that, WHOLE leaves room. Where the product is singular, an eigenvalue of rounding, D * 1e-16, enters by its
root, D times: 12 * (12 * 2e-16)^(1/2) = 6e-7 for the widest features here, SINGULAR.
"""
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

import data
import metrics
from formula import golden
from metrics import Statistics, distance, frechet_distance, inception_score, precision_recall, squared_distances, squared_radii
from refusals import refusal

WHOLE, SINGULAR = 1e-9, 1e-6

widths = st.integers(1, 12)
seeds = st.integers(0, 2 ** 32)
scales = st.floats(-3, 3).map(lambda exponent: 10 ** exponent)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(D, seed=0):
    return torch.linalg.qr(normal(D, D, seed=seed)).Q


def gaussian(D, seed, rank=None):
    """A random mean and a factor (D, rank) of a covariance; of many more columns than D unless told: well conditioned."""
    rank = 4 * D + 4 if rank is None else rank
    return normal(D, seed=seed), normal(D, rank, seed=seed + 1) / max(rank, 1) ** 0.5


def spread(factor):
    return factor @ factor.T


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def assert_distance(a, b, expected, precision=WHOLE):
    """Two Gaussians (mean, covariance) are as far apart as expected, up to rounding."""
    size = sum(value.trace().item() + value.abs().max().item() for value in (a[1], b[1])) + abs(expected)
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=0, abs=precision * size)


def statistics(*batches):
    collected = Statistics()
    for batch in batches:
        collected.add(batch)
    return collected


# Golden data

def toy_features(seed, n, d, mix=0.6, scale=1.0, shift=0.0, decay=0.0, relu=False, grid=0.0, dead=0):
    """Features (n, d) in float32 whose neighbours correlate; smaller later on, clipped, rounded or zero on demand."""
    x = np.random.RandomState(seed).standard_normal((n, d))
    x = (x + mix * np.roll(x, 1, axis=1)) * (scale / (1 + decay * np.arange(d))) + shift
    if relu:
        x = x.clip(min=0)
    if grid:
        x = grid * np.round(x / grid)
    x[:, d - dead:] = 0
    return torch.from_numpy(x.astype(np.float32))


def toy_logits(seed, n, k, scale=2.0, class_shift=1.5):
    """Logits (n, k) in float32; row i is for class i modulo k."""
    x = scale * np.random.RandomState(seed).standard_normal((n, k))
    rows = np.arange(n)
    x[rows, rows % k] += class_shift
    return torch.from_numpy(x.astype(np.float32))


def made(case, *keys, make=toy_features):
    """What a case says to make under these keys, checked to have the sums that it had there."""
    arrays = [make(**case[key]) for key in keys]
    checks = [case["check" if make is toy_logits else f"check_{key}"] for key in keys]
    assert [value.double().sum().item() for value in arrays] == pytest.approx(checks, rel=1e-9, abs=1e-6)
    return arrays


FRECHET, SCORE, MANIFOLD = (golden(f"metrics_{name}") for name in ("frechet", "inception_score", "precision_recall"))


@pytest.mark.parametrize("name", FRECHET[1]["cases"])
def test_frechet_distance_equals_the_evaluators(name):
    arrays, meta = FRECHET
    if name.startswith("stats_"):
        mu, sigma = arrays[f"in_{name}_mu"], arrays[f"in_{name}_sigma"]
    else:
        both = [statistics(features) for features in made(meta["cases"][name], "a", "b")]
        mu, sigma = [each.mu for each in both], [each.sigma for each in both]
    expected = arrays[f"out_{name}"].item()
    # the file would allow 1e-3 of the traces for singular ones, where scipy's root is off; the values stored are better than that
    tolerance = 1e-5 * abs(expected) + 1e-6 * (sigma[0].trace() + sigma[1].trace()).item()
    assert frechet_distance(mu[0], sigma[0], mu[1], sigma[1]) == pytest.approx(expected, rel=0, abs=tolerance)


@pytest.mark.parametrize("name", SCORE[1]["cases"])
def test_inception_score_equals_the_evaluators(name):
    case = SCORE[1]["cases"][name]
    [logits] = made(case, "logits", make=toy_logits)
    score = inception_score(logits.double().softmax(dim=1), case["split_size"])
    assert score == pytest.approx(SCORE[0][f"out_{name}_by_size"].item(), rel=1e-6)


MANIFOLD_CASES = [name for name, case in MANIFOLD[1]["cases"].items() if "clamp" not in case]    # which is not done here


@pytest.mark.parametrize("name", MANIFOLD_CASES)
def test_precision_and_recall_equal_the_evaluators(name):
    arrays, case = MANIFOLD[0], MANIFOLD[1]["cases"][name]
    real, fake = made(case, "ref", "gen")
    found = [precision_recall(real, fake, k) for k in case["ks"]]        # float32, where no decision of these is near rounding
    expected = torch.stack([arrays[f"out_{name}_precision"], arrays[f"out_{name}_recall"]], dim=1)
    assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MANIFOLD_CASES)
def test_radii_and_nearest_neighbours_equal_the_evaluators(name):
    arrays, case = MANIFOLD[0], MANIFOLD[1]["cases"][name]
    real, fake = (value.double() for value in made(case, "ref", "gen"))  # a radius of exactly 0 would be 1e-3 in float32
    radii, of_fakes = (torch.stack([squared_radii(rows, k) for k in case["ks"]], dim=1).sqrt() for rows in (real, fake))
    assert_close(radii[:8].float(), arrays[f"out_{name}_radii_ref"], rtol=1e-4, atol=1e-5)
    assert_close(torch.stack([radii.sum(dim=0), of_fakes.sum(dim=0)]), arrays[f"out_{name}_radii_sum"], rtol=1e-4, atol=0)
    nearest = arrays[f"out_{name}_nearest_ref"]                          # none where ties leave it open
    apart = squared_distances(fake[:len(nearest)], real, real.square().sum(dim=1))
    assert torch.equal(apart.argmin(dim=1), nearest)


# Statistics

@given(st.lists(st.integers(1, 7), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1), widths, scales, seeds)
def test_rows_in_batches_have_numpys_mean_and_covariance(sizes, D, scale, seed):
    x = scale * (normal(sum(sizes), D, seed=seed) + normal(D, seed=seed + 1))
    collected = statistics(*x.split(sizes))
    assert collected.n == len(x) and collected.mu.dtype == collected.sigma.dtype == torch.float64
    assert_close(collected.mu.numpy(), x.numpy().mean(axis=0), rtol=1e-12, atol=1e-13 * scale)
    assert_close(collected.sigma.numpy(), np.cov(x.numpy(), rowvar=False).reshape(D, D), rtol=1e-12, atol=1e-13 * scale ** 2)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6).filter(lambda sizes: sum(sizes) > 1), widths, seeds, st.randoms())
def test_merges_in_any_order_and_grouping_give_the_statistics_of_the_whole(sizes, D, seed, random):
    x = normal(sum(sizes), D, seed=seed)
    parts = [statistics(rows) if len(rows) else Statistics() for rows in x.split(sizes)]
    while len(parts) > 1:
        first, second = random.sample(range(len(parts)), 2)
        other = parts[second]
        parts[first].merge(other)
        parts.remove(other)
    whole = statistics(x)
    assert parts[0].n == len(x)
    assert_close((parts[0].mu, parts[0].sigma), (whole.mu, whole.sigma), rtol=1e-12, atol=1e-13)


def test_merging_leaves_the_other_as_it_is():
    one, other, empty = statistics(normal(5, 3)), statistics(normal(4, 3, seed=1)), Statistics()
    mu, sigma = other.mu.clone(), other.sigma.clone()
    one.merge(other)
    empty.merge(other).add(normal(6, 3, seed=2))                         # takes the other's tensors, but does not write to them
    assert torch.equal(other.mu, mu) and torch.equal(other.sigma, sigma) and (other.n, one.n, empty.n) == (4, 9, 10)


def test_a_batch_without_rows_changes_nothing():
    x = normal(5, 3)
    collected = statistics(x[:0], x, x[:0])
    assert_close((collected.mu, collected.sigma), (x.mean(dim=0), x.T.cov()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_large_mean_in_float32_costs_no_digit_of_a_small_variance(size):
    x = (1e4 + 0.01 * normal(1000, 5)).float()                           # a standard deviation of ten steps of float32
    collected, exact = statistics(*x.split(size)), x.double().numpy()
    assert_close(collected.mu.numpy(), exact.mean(axis=0), rtol=1e-13, atol=0)
    # rounding of 1e4 is 1e-12, of which a centred number of 0.01 has 1e-10; a sum of squares would be off by 1e-8 of 1e-4
    assert_close(collected.sigma.numpy(), np.cov(exact, rowvar=False), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("batches", [[], [normal(1, 3)]], ids=["none", "one"])
def test_a_covariance_of_fewer_than_two_rows_is_an_error(batches):
    with pytest.raises(ValueError, match=f"{len(batches)} samples: a covariance needs at least two"):
        statistics(*batches).sigma


# The Fréchet distance

@given(st.integers(1, 8), st.integers(2, 12), st.integers(2, 12), scales, seeds)
def test_distance_of_any_samples_is_symmetric_and_not_negative_and_that_to_themselves_is_zero(D, n, m, scale, seed):
    x, y = scale * normal(n, D, seed=seed), scale * normal(m, D, seed=seed + 1)
    a, b = ((each.mu, each.sigma) for each in (statistics(x), statistics(y)))        # of fewer samples than features, too
    there, back = frechet_distance(*a, *b), frechet_distance(*b, *a)
    rounding = SINGULAR * (a[1].trace() + b[1].trace()).item()
    assert there == pytest.approx(back, rel=0, abs=rounding) and min(there, back) >= -rounding
    assert_distance(a, a, 0, SINGULAR)


@given(widths, st.floats(0, 100), seeds)
def test_distance_is_unchanged_by_a_rotation_and_a_common_shift(D, far, seed):
    (m1, A), (m2, B), Q, shift = gaussian(D, seed), gaussian(D, seed + 2), rotation(D, seed), far * normal(D, seed=seed + 5)
    turned = [(Q @ mu + shift, spread(Q @ factor)) for mu, factor in ((m1, A), (m2, B))]
    assert_distance(*turned, frechet_distance(m1, spread(A), m2, spread(B)))


@given(widths, scales, seeds)
def test_distance_grows_with_the_square_of_a_common_scale(D, scale, seed):
    (m1, A), (m2, B) = gaussian(D, seed), gaussian(D, seed + 2)
    expected = scale ** 2 * frechet_distance(m1, spread(A), m2, spread(B))
    assert_distance((scale * m1, spread(scale * A)), (scale * m2, spread(scale * B)), expected)


@given(widths, st.integers(0, 12), seeds)
def test_of_gaussians_that_commute_only_means_and_standard_deviations_count(D, dead, seed):
    s, t = normal(2, D, seed=seed).abs()
    s[:dead], t[dead // 2:dead] = 0, 0                                   # directions without variance on one side, or both
    (m1, _), (m2, _), Q = gaussian(D, seed + 1), gaussian(D, seed + 3), rotation(D, seed)
    expected = ((m1 - m2).square().sum() + (s - t).square().sum()).item()
    assert_distance((m1, s.square().diag()), (m2, t.square().diag()), expected, SINGULAR)
    assert_distance((m1, spread(Q * s)), (m2, spread(Q * t)), expected, SINGULAR)


@pytest.mark.parametrize("orders", [2, 4, 6])
def test_a_small_variance_counts_by_its_root(orders):
    s, t, mu = 10 ** -torch.linspace(0, orders, 6, dtype=torch.float64), torch.ones(6), torch.zeros(6)
    expected = (s - t).square().sum().item()                             # a variance of 1e-12 of the largest is not rounding yet
    assert_distance((mu, s.square().diag()), (mu, t.diag()), expected)
    assert_distance((mu, t.diag()), (mu, s.square().diag()), expected)


@given(st.floats(-9, 9), st.floats(-9, 9), st.floats(0, 9), st.floats(0, 9))
def test_in_one_dimension_it_is_the_squared_distance_of_mean_and_standard_deviation(m1, m2, s, t):
    a, b = ((torch.tensor([m]), torch.tensor([[deviation ** 2]])) for m, deviation in ((m1, s), (m2, t)))
    a, b = ((m.double(), variance.double()) for m, variance in (a, b))
    expected = (a[0] - b[0]).square().item() + (a[1].sqrt() - b[1].sqrt()).square().item()
    assert_distance(a, b, expected)


@given(widths, st.integers(0, 14), st.integers(0, 14), seeds)
def test_distance_is_the_least_cost_of_turning_one_factor_into_the_other(D, rank, other_rank, seed):
    (m1, A), (m2, B) = gaussian(D, seed, rank), gaussian(D, seed + 2, other_rank)    # of any rank, zero included
    # min |A - B Q|^2 over rotations Q is |A|^2 + |B|^2 - 2 |A^T B|_*: the orthogonal Procrustes problem
    turned = torch.linalg.svdvals(A.T @ B).sum() if rank and other_rank else 0
    expected = (m1 - m2).square().sum() + A.square().sum() + B.square().sum() - 2 * turned
    assert_distance((m1, spread(A)), (m2, spread(B)), expected.item(), SINGULAR)


@given(widths, seeds)
def test_distance_is_the_cost_of_the_optimal_transport_map(D, seed):
    (m1, A), (m2, B) = gaussian(D, seed), gaussian(D, seed + 2)
    S, T = spread(A), spread(B)
    half, back = root(S), torch.linalg.inv(root(S))
    transport = back @ root(half @ T @ half) @ back                      # x -> m2 + transport (x - m1)
    assert_close(transport @ S @ transport.T, T, rtol=0, atol=1e-9)
    remaining = torch.eye(D, dtype=torch.float64) - transport
    assert_distance((m1, S), (m2, T), ((m1 - m2).square().sum() + (remaining @ S @ remaining.T).trace()).item())


@given(widths, seeds)
def test_distance_has_the_trace_of_the_root_of_the_product_itself(D, seed):
    (m1, A), (m2, B) = gaussian(D, seed), gaussian(D, seed + 2)
    S, T = spread(A), spread(B)
    values = np.linalg.eigvals((S @ T).numpy()).astype(complex)          # the product is not symmetric
    expected = ((m1 - m2).square().sum() + S.trace() + T.trace()).item() - 2 * np.sqrt(values).real.sum()
    assert_distance((m1, S), (m2, T), expected)


@given(widths, seeds)
def test_roots_of_distances_fulfil_the_triangle_inequality(D, seed):
    gaussians = [gaussian(D, seed + 2 * i) for i in range(3)]
    sides = [frechet_distance(m, spread(A), n, spread(B)) ** 0.5 for (m, A), (n, B) in itertools.combinations(gaussians, 2)]
    assert 2 * max(sides) <= sum(sides) + 1e-6


@functools.cache
def digits():
    images, _ = data.load("mnist", 32).batch(np.arange(600))
    return data.to_float(images)                                         # (600, 1, 32, 32)


def test_more_noise_on_images_puts_them_farther_from_the_clean_ones():
    def features(images):
        return statistics(torch.nn.functional.avg_pool2d(images, 4).flatten(1))      # 64 means of 16 pixels
    noise = torch.randn(digits().shape, generator=torch.Generator().manual_seed(0))
    clean = features(digits())
    levels = [distance(clean, features(digits() + level * noise)) for level in (0, 0.1, 0.2, 0.4, 0.8, 1.6)]
    assert abs(levels[0]) < 1e-4 and all(2 * less + 1e-4 < more for less, more in itertools.pairwise(levels))


# The Inception score

def rows_of(n, K, seed=0, sharpness=3.0):
    return (sharpness * normal(n, K, seed=seed)).softmax(dim=1)


@given(st.integers(2, 20), st.integers(1, 12), st.floats(0, 100), seeds)
def test_score_lies_between_one_and_the_number_of_classes(n, K, sharpness, seed):
    assert 1 - 1e-12 <= inception_score(rows_of(n, K, seed, sharpness)) <= K + 1e-12


@given(st.integers(2, 20), st.integers(2, 12), st.floats(0.01, 1), st.data())
def test_score_is_one_if_and_only_if_all_rows_are_equal(n, K, change, draw):
    p = rows_of(1, K).repeat(n, 1)
    assert inception_score(p) == pytest.approx(1, abs=1e-12)
    row = draw.draw(st.integers(0, n - 1))
    p[row] = (1 - change) * p[row] + change * torch.eye(K, dtype=torch.float64)[draw.draw(st.integers(0, K - 1))]
    assert inception_score(p) > 1 + 1e-10        # of second order in the change, over n; a class of 0.996 has little to gain


@given(st.integers(2, 12), st.integers(1, 5), st.randoms())
def test_score_of_sure_and_balanced_rows_is_the_number_of_classes(K, times, random):
    rows = torch.eye(K, dtype=torch.float64).repeat(times, 1)            # with probabilities of exactly 0
    assert inception_score(rows[random.sample(range(len(rows)), len(rows))]) == pytest.approx(K, rel=1e-12)


@given(st.integers(2, 20), st.integers(1, 12), seeds)
def test_score_is_entropy_of_the_mean_less_mean_of_the_entropies(n, K, seed):
    p = rows_of(n, K, seed)
    information = torch.special.entr(p.mean(dim=0)).sum() - torch.special.entr(p).sum(dim=1).mean()
    assert inception_score(p) == pytest.approx(information.exp().item(), rel=1e-12)


@given(st.integers(2, 30), st.integers(1, 12), seeds)
def test_score_is_the_plain_mean_of_chunks_with_the_shorter_last_one(n, split, seed):
    p = rows_of(n, 5, seed)
    scores = [inception_score(p[i:i + split]) if len(p[i:i + split]) > 1 else 1.0 for i in range(0, n, split)]   # one row: 1
    assert inception_score(p, split) == pytest.approx(sum(scores) / math.ceil(n / split), rel=1e-12)


def test_chunks_are_of_5000_rows_unless_told():
    p = rows_of(5003, 5)
    assert inception_score(p) == inception_score(p, 5000) != pytest.approx(inception_score(p, 5003), rel=1e-3)


@given(st.integers(2, 20), st.integers(1, 12), seeds, st.randoms())
def test_score_does_not_see_the_names_of_classes_nor_the_order_within_a_chunk(n, K, seed, random):
    p = rows_of(n, K, seed)
    classes, order = random.sample(range(K), K), random.sample(range(n), n)
    assert inception_score(p[order][:, classes]) == pytest.approx(inception_score(p), rel=1e-12)


# Precision and recall

def whole_numbers(n, D, reach, seed):
    """Rows on a grid, where distances tie and rows repeat, and float32 computes each squared distance to far better than 1."""
    return torch.randint(-reach, reach + 1, (n, D), generator=torch.Generator().manual_seed(seed)).float()


def by_definition(real, fake, k):
    """Kynkäänniemi et al. 2019, Eq. 1 and 2, pair by pair in whole numbers."""
    real, fake = ([tuple(map(int, row)) for row in rows] for rows in (real, fake))

    def apart(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b))

    def share_within(rows, manifold):
        radii = [sorted(apart(a, b) for j, b in enumerate(manifold) if j != i)[k - 1] for i, a in enumerate(manifold)]
        return sum(any(apart(x, a) <= radius for a, radius in zip(manifold, radii)) for x in rows) / len(rows)
    return share_within(fake, real), share_within(real, fake)


small_sets = dict(n=st.integers(6, 20), m=st.integers(6, 20), k=st.integers(1, 5), D=st.integers(1, 6), reach=st.integers(1, 4),
                  seed=seeds)


@given(**small_sets)
def test_precision_and_recall_are_their_definition_with_every_tie(n, m, D, reach, k, seed):
    real, fake = whole_numbers(n, D, reach, seed), whole_numbers(m, D, reach + 1, seed + 1)
    assert precision_recall(real, fake, k) == by_definition(real, fake, k)


def test_a_tie_at_the_edge_of_a_ball_around_the_mean_counts():
    ring = [(x, y) for x in range(-65, 66) for y in range(-65, 66) if x * x + y * y == 65 ** 2]
    ring.sort(key=lambda point: math.atan2(*point))                      # 36 points; each other one with its opposite
    real = [(0, 0), *2 * ring[::2], ring[0]]                             # only the ball around 0 has a radius
    fake = ring[1::2]
    assert by_definition(real, fake, 1)[0] == precision_recall(torch.tensor(real).float(), torch.tensor(fake).float(), 1)[0] == 1


@settings(max_examples=10)
@given(**small_sets, block=st.integers(1, 60))
def test_the_size_of_a_block_changes_nothing(n, m, D, reach, k, seed, block):
    real, fake = whole_numbers(n, D, reach, seed), whole_numbers(m, D, reach + 1, seed + 1)
    at_once = precision_recall(real, fake, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "BLOCK", block)
        assert precision_recall(real, fake, k) == at_once


@given(**small_sets)
def test_precision_is_recall_the_other_way_round(n, m, D, reach, k, seed):
    real, fake = whole_numbers(n, D, reach, seed), whole_numbers(m, D, reach + 1, seed + 1)
    assert precision_recall(real, fake, k) == precision_recall(fake, real, k)[::-1]


@given(st.integers(4, 20), st.integers(1, 40), st.integers(1, 3), st.floats(0, 1000), seeds)
def test_samples_lie_within_their_own_manifold(n, D, times, mean, seed):
    rows = (mean + normal(n, D, seed=seed)).float().repeat(times, 1)     # where each is there often, all radii are 0
    assert precision_recall(rows, rows[torch.randperm(len(rows))]) == (1, 1)


def test_rows_that_are_all_the_same_cover_each_other_and_nothing_else():
    rows = torch.full((5, 3), 0.1)                                       # every distance, radius and norm is 0
    assert precision_recall(rows, rows) == (1, 1)
    assert precision_recall(rows, rows + 0.1) == (0, 0)


def test_copies_are_within_a_radius_of_zero_at_the_width_of_inceptions_features():
    rows = normal(60, 2048).clamp(min=0).float().repeat(4, 1)            # products of 2048 terms round in another order each
    assert precision_recall(rows, rows[:7].repeat(4, 1)) == (1, 7 / 60)


@given(st.integers(4, 20), st.integers(4, 20), st.integers(1, 40), seeds)
def test_of_samples_far_from_each_other_none_is_covered(n, m, D, seed):
    real, fake = normal(n, D, seed=seed).float(), normal(m, D, seed=seed + 1).float()
    assert precision_recall(real, fake + 50) == (0, 0)                   # no two normal numbers of the same set are 50 apart


def modes(count, each=20, D=4):
    """Clusters of width 1 along the diagonal, 100 apart."""
    return normal(count, each, D) + 100 * torch.arange(count)[:, None, None]


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_dropping_modes_lowers_recall_and_not_precision(kept):
    real = modes(4)
    fake = real[:kept] + 1e-3 * normal(kept, 20, 4, seed=1)              # so close that every one is within reach of its original
    assert precision_recall(real.flatten(0, 1), fake.flatten(0, 1)) == (1, kept / 4)


@given(st.integers(1, 20), seeds)
def test_a_far_cluster_among_the_samples_lowers_precision_and_not_recall(outliers, seed):
    real, fake = normal(30, 4, seed=seed), normal(30, 4, seed=seed + 1)
    precision, recall = precision_recall(real, fake)
    far = 1000 + normal(outliers + 3, 4, seed=seed + 2)                  # near each other, so that their balls are small
    after = precision_recall(real, torch.cat([fake, far]))
    assert after == (pytest.approx(precision * 30 / (33 + outliers)), recall)


@given(**small_sets, shift=st.floats(-100, 100).map(round))
def test_a_common_shift_changes_nothing(n, m, D, reach, k, seed, shift):
    real, fake = whole_numbers(n, D, reach, seed), whole_numbers(m, D, reach + 1, seed + 1)
    assert precision_recall(real + shift, fake + shift, k) == precision_recall(real, fake, k)


def test_features_that_are_all_far_from_zero_are_still_told_apart():
    real, fake = toy_features(1, 300, 16, grid=1 / 64), toy_features(2, 300, 16, grid=1 / 64)
    for shift in (100, 4096):                                            # exact in float32; squared distances of about 20
        assert precision_recall(real + shift, fake + shift) == precision_recall(real, fake)


@given(st.integers(4, 20), st.integers(4, 20), st.integers(1, 12), seeds)
def test_a_rotation_changes_nothing(n, m, D, seed):
    real, fake, Q = normal(n, D, seed=seed), normal(m, D, seed=seed + 1), rotation(D, seed)
    assert precision_recall(real @ Q, fake @ Q) == precision_recall(real, fake)      # float64, where nothing is that close


@given(st.integers(8, 20), st.integers(8, 20), st.integers(1, 6), seeds)
def test_both_grow_with_the_number_of_neighbours(n, m, D, seed):
    real, fake = normal(n, D, seed=seed), 1.5 * normal(m, D, seed=seed + 1)
    scores = torch.tensor([precision_recall(real, fake, k) for k in range(1, 8)])
    assert (scores.diff(dim=0) >= 0).all()


def test_three_neighbours_count_unless_told():
    real, fake = normal(50, 4), normal(50, 4, seed=1)
    assert precision_recall(real, fake) == precision_recall(real, fake, 3) != precision_recall(real, fake, 2)


# What cannot be used

good, nan = normal(8, 3), normal(8, 3).index_fill(0, torch.tensor([1, 4]), float("nan"))
unit = (torch.zeros(3), torch.eye(3))
REFUSED = {
    "score of NaN": (lambda: inception_score(nan), "probabilities: 2 of 8 rows are NaN or infinite"),
    "score of one row": (lambda: inception_score(good[:1]), r"probabilities of shape \(1, 3\): at least two samples"),
    "score of a vector": (lambda: inception_score(good[0]), r"probabilities of shape \(3,\): at least two samples"),
    "real NaN": (lambda: precision_recall(nan, good), "real features: 2 of 8 rows are NaN or infinite"),
    "fake infinite": (lambda: precision_recall(good, nan.nan_to_num(torch.inf)), "features of the samples: 2 of 8 rows"),
    "one real": (lambda: precision_recall(good[:1], good), r"real features of shape \(1, 3\): at least two samples"),
    "one fake": (lambda: precision_recall(good, good[:1]), r"features of the samples of shape \(1, 3\): at least two"),
    "two spaces": (lambda: precision_recall(good, good[:, :2]), "features of 3 and of 2 numbers are not of one space"),
    "no third neighbour": (lambda: precision_recall(good[:3], good), "need more than 3 samples on both sides, not 3 and 8"),
    "no eighth neighbour": (lambda: precision_recall(good, good, 8), "need more than 8 samples on both sides, not 8 and 8"),
    "another width": (lambda: frechet_distance(*unit, torch.zeros(2), torch.eye(2)), r"of \(3,\), \(3, 3\) and \(2,\), \(2, 2\)"),
    "a row for a mean": (lambda: frechet_distance(torch.zeros(1, 3), torch.eye(3), *unit), r"statistics of \(1, 3\), \(3, 3\) and"),
    "variances only": (lambda: frechet_distance(*unit, torch.zeros(3), torch.ones(3)), r"and \(3,\), \(3,\): both must be a mean"),
    "NaN in a mean": (lambda: frechet_distance(*unit, nan[1], torch.eye(3)), "statistics hold numbers that are NaN or infinite"),
    "infinite variance": (lambda: frechet_distance(unit[0], torch.inf * torch.ones(3, 3), *unit), "NaN or infinite"),
}


WRONG = {
    "asymmetric": (torch.tensor([[1, 0.5], [0.4, 1]]), "not symmetric"),
    "a triangular factor": (torch.tensor([[1, 0], [0.5, 1.0]]), "not symmetric"),
    "correlations beyond one": (torch.tensor([[1, 1.2], [1.2, 1]]), "negative"),
    "a negative variance": (torch.diag(torch.tensor([5, -0.1])), "negative"),
    "negative variances": (-torch.eye(2), "negative"),
    "covariance without variance": (torch.tensor([[0, 1.0], [1, 0]]), "negative"),
    "a tiny one": (1e-200 * torch.diag(torch.tensor([1, -1])).double(), "negative"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_matrix_that_is_no_covariance_has_no_distance(case):
    (wrong, said), mean, right = WRONG[case], torch.zeros(2), torch.eye(2)
    refusal(lambda: frechet_distance(mean, wrong, mean, right), "the first statistics' sigma is no covariance", said)
    refusal(lambda: frechet_distance(mean, right, mean, wrong), "the second statistics' sigma is no covariance", said)


@given(st.integers(1, 60), st.integers(2, 80), st.integers(-60, 60), st.integers(0, 3), st.booleans(), seeds)
def test_covariances_that_float32_rounded_have_a_distance(D, n, exponent, copies, relu, seed):
    """Of few or many samples, of features that are copies of each other, never negative, or hardly vary beside their mean."""
    features = normal(n, D, seed=seed).float() + 2 * normal(1, D, seed=seed + 1).float()
    features = torch.cat([features.clamp(min=0) if relu else features] * (1 + copies), dim=1)
    centred = features - features.mean(dim=0)
    sigma = (centred.T @ centred / (n - 1)).double() * 2.0 ** exponent
    assert frechet_distance(sigma[0], sigma, sigma[0], 2 * sigma) >= -1e-5 * sigma.trace()


@pytest.mark.parametrize("D", [1, 5])
def test_features_that_never_vary_have_a_covariance_of_zero(D):
    assert frechet_distance(torch.zeros(D), torch.zeros(D, D), torch.ones(D), torch.zeros(D, D)) == D


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_an_error_that_says_what_is_wrong(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_as_many_samples_as_needed_for_a_neighbour_are_enough():
    assert precision_recall(good[:4], good[:4]) == (1, 1)


def test_numpy_arrays_are_as_good_as_tensors():
    a, b = normal(20, 3), normal(20, 3, seed=1)
    assert precision_recall(a.numpy(), b.numpy()) == precision_recall(a, b)
    assert inception_score(rows_of(9, 4).numpy()) == inception_score(rows_of(9, 4))
    assert frechet_distance(a[0].numpy(), np.eye(3), b[0].numpy(), np.eye(3)) == pytest.approx((a[0] - b[0]).square().sum().item())


# Neighbours

def test_neighbours_are_those_of_a_search_by_hand():
    random = np.random.default_rng(0)
    queries, reference = (random.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8) for n in (5, 40))
    found = metrics.nearest(queries, reference)
    for query, row in zip(queries.astype(float), found):
        distances = ((reference.astype(float) - query) ** 2).sum(axis=(1, 2, 3))
        assert row.tolist() == np.argsort(distances, kind="stable")[:3].tolist()


def test_the_vote_is_the_majority_or_else_the_nearest():
    labels = torch.tensor([4, 5, 6, 5])
    assert metrics.vote(labels, torch.tensor([[0, 1, 3], [1, 0, 3], [2, 1, 0], [1, 3, 0]])).tolist() == [5, 5, 6, 5]


def test_a_sample_that_shares_its_neighbour_is_not_unique():
    assert metrics.unique_share(torch.tensor([7, 7, 3, 5])) == 0.5
    assert metrics.unique_share(torch.tensor([1, 2, 3])) == 1 and metrics.unique_share(torch.tensor([1, 1])) == 0
