"""The benchmark's statistics beside SciPy's and closed forms, and how often a comparison is wrong."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from anamorph.benchmarks import statistics

RECORDED = Path(__file__).parent / "data" / "bench-samples.json"
TIMES = st.lists(st.floats(0.01, 100), min_size=3, max_size=30)


@settings(max_examples=50)
@given(old=TIMES, new=TIMES)
def test_the_contrast_is_welchs_test_on_logarithms(old: list[float], new: list[float]) -> None:
    if min(np.std(old) / np.mean(old), np.std(new) / np.mean(new)) < 1e-6:
        return
    found = statistics.contrast([[one] for one in old], [[one] for one in new])
    theirs = scipy.stats.ttest_ind(np.log(new), np.log(old), equal_var=False)
    limits = theirs.confidence_interval()
    assert found is not None
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert np.log([found.low, found.high]) == pytest.approx([limits.low, limits.high], rel=1e-6, abs=1e-9)


@given(TIMES)
def test_mad_is_scipys_and_a_far_sample_is_flagged(samples: list[float]) -> None:
    assert statistics.mad(samples) == pytest.approx(scipy.stats.median_abs_deviation(samples))
    spread = max(samples) + 100 * (statistics.mad(samples) + 1)
    assert statistics.outliers([*samples, *samples, spread])[-1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_adjusts_upwards_and_keeps_the_order(chances: list[float]) -> None:
    adjusted = statistics.holm(chances)
    assert all(after >= before for before, after in zip(chances, adjusted, strict=True))
    assert min(adjusted) == pytest.approx(min(1.0, len(chances) * min(chances)))
    pairs = sorted(zip(chances, adjusted, strict=True))
    assert all(first[1] <= second[1] for first, second in itertools.pairwise(pairs))


def test_percentiles_need_the_samples_that_bound_them() -> None:
    assert [statistics.percentile(range(count), 0.9) is None for count in (28, 29)] == [True, False]
    assert [statistics.percentile(range(count), 0.99) is None for count in (298, 299)] == [True, False]
    assert statistics.percentile(range(101), 0.9) == 90


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = statistics.interval([[value] for value in random.lognormal(0, 0.1, 40)], 300, seed)
        covered += low <= 1.0 <= high
    assert covered >= 88


def test_the_interval_is_as_wide_as_processes_differ() -> None:
    alike = [[1.0, 1.01, 0.99]] * 6
    apart = [[1.0, 1.01, 0.99], [1.2, 1.21, 1.19]] * 3
    assert statistics.settled(alike, 0.03)
    assert not statistics.settled(apart, 0.03)
    assert statistics.interval(apart)[1] - statistics.interval(apart)[0] > 0.15


def test_the_number_of_processes_that_a_change_takes_is_the_closed_form() -> None:
    random = np.random.default_rng(0)
    bursts = [[value] for value in random.lognormal(0, 0.03, 400)]
    exact = 2 * (scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.9)) ** 2 * (0.03 / np.log(1.05)) ** 2
    assert statistics.needed(bursts, bursts, 1.05) == pytest.approx(exact, abs=1.5)
    assert statistics.needed([[1.0]] * 4, [[1.0]] * 4, 1.05) == statistics.FEWEST


def test_two_processes_a_side_decide_nothing() -> None:
    assert statistics.contrast([[1.0], [1.0]], [[2.0]] * 9) is None


def test_equal_arms_are_seldom_called_different_and_five_percent_is_found() -> None:
    bursts = [np.array(burst) for burst in json.loads(RECORDED.read_text())["bursts"]]
    random = np.random.default_rng(0)
    turns, side = 300, 24  # the recorded processes differ by 4 %: `needed` says how many that takes
    alarms = found = 0
    for _ in range(turns):
        order = random.integers(0, len(bursts), 2 * side)
        drawn = [bursts[index][random.integers(0, len(bursts[index]), len(bursts[index]))] for index in order]
        old, new = drawn[:side], drawn[side:]
        same = statistics.contrast(old, new)
        slow = statistics.contrast(old, [1.05 * burst for burst in new])
        assert same is not None
        assert slow is not None
        alarms += same.p < 0.05 and abs(same.ratio - 1) > 0.02
        found += slow.p < 0.05 and slow.ratio > 1.02
    assert alarms / turns <= 0.07
    assert found / turns >= 0.90
