"""Claims over test images against scipy, enumeration and simulated images."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from resnext_ablate.evidence import image_tests
from resnext_ablate.evidence.image_tests import Correct
from resnext_ablate.evidence.report import write_report
from resnext_ablate.numbers.power import LEVEL
from resnext_ablate.numbers.verdicts import Rules, compare
from resnext_ablate.records import records

bits = st.lists(st.booleans(), min_size=12, max_size=12).map(
    lambda values: np.array(values, dtype=bool)
)


@given(bits, bits)
def test_mcnemar_is_a_sign_test(first: Correct, second: Correct) -> None:
    """One run each: McNemar's exact test, the sign test and scipy's agree."""
    only_first = int((first & ~second).sum())
    total = int((first != second).sum())
    expected = binomtest(only_first, total).pvalue if total else 1.0
    found = image_tests.mcnemar(first, second, seed=4)
    assert found.p_value == pytest.approx(expected)
    assert (found.seed, found.only_first) == (4, only_first)
    assert found.only_first + found.only_second == total
    assert image_tests.sign_test([first], [second]) == pytest.approx(expected)


@given(st.lists(bits, min_size=1, max_size=3), st.lists(bits, min_size=1, max_size=3))
def test_sign_test_enumerates_all_signs(
    first: list[Correct], second: list[Correct]
) -> None:
    """Several runs, unequal numbers too: the p-value of all 2^n sign patterns."""
    leaning = np.mean(first, axis=0) - np.mean(second, axis=0)
    leaning = leaning[np.abs(leaning) > 1e-9]
    signs = np.array(list(itertools.product([-1, 1], repeat=len(leaning))))
    sums = signs @ np.abs(leaning) if len(leaning) else np.zeros(1)
    expected = np.mean(np.abs(sums) >= abs(leaning.sum()) - 1e-9)
    assert image_tests.sign_test(first, second) == pytest.approx(expected, abs=1e-9)


def draw_runs(
    rng: np.random.Generator, *, num_seeds: int, num_images: int
) -> list[dict[int, Correct]]:
    """Two variants of equal error over all images, each good at images of its own."""
    ease = rng.normal(2.5, 2, num_images)
    runs = []
    for _ in range(2):
        taste = rng.normal(0, 0.7, num_images)
        chance = 1 / (1 + np.exp(-ease - taste))
        runs.append({s: rng.random(num_images) < chance for s in range(num_seeds)})
    return runs


@pytest.mark.slow
def test_interval_over_seeds_and_images_covers() -> None:
    """Drawing new images each time, the wide interval holds the truth, the other not.

    With many seeds and few images the images are what varies.
    """
    rng = np.random.default_rng(7)
    num_studies = 400
    wide = narrow = 0
    for _ in range(num_studies):
        first, second = draw_runs(rng, num_seeds=8, num_images=300)
        correct = {"base": first, "other": second}
        errors = {
            label: {s: 100 * float(np.mean(~right)) for s, right in runs.items()}
            for label, runs in correct.items()
        }
        found = compare(errors, reference="base", rules=Rules(0.5, pairing="unpaired"))
        (images,) = image_tests.compare_images(found, correct=correct)
        wide += images.low <= 0 <= images.high
        narrow += found[0].low <= 0 <= found[0].high
    assert 100 * wide / num_studies > 93
    assert 100 * narrow / num_studies < 88


def test_many_images_add_nothing() -> None:
    """The more images, the less the wide interval differs from that of the seeds."""
    rng = np.random.default_rng(2)
    few = image_tests.image_variance(
        *draw_runs(rng, num_seeds=3, num_images=500), paired=False
    )
    many = image_tests.image_variance(
        *draw_runs(rng, num_seeds=3, num_images=50_000), paired=False
    )
    assert many == pytest.approx(few / 100, rel=0.5)
    assert image_tests.widened(0.3, variance=0.0, level=LEVEL) == 0.3


def test_bits_come_back_as_packed() -> None:
    """Answers of any number of images survive the run file."""
    right = np.random.default_rng(0).random(1003) < 0.9
    text = records.pack_bits(right)
    assert (records.unpack_bits(text, num_images=1003) == right).all()


def test_report_says_what_holds_for_other_images(tmp_path: Path) -> None:
    """Files and page carry the tests, and the sentence counts what they show."""
    tables = synthetic.study(num_images=4000)
    files = write_report(tables, folder=tmp_path)
    images = pd.read_csv(tmp_path / "images.csv")
    assert len(images) == 4 * 3
    row = images[(images["variant"] == "8x3d") & (images["seed"] == 1)].iloc[0]
    ours, theirs = tables.correct["8x3d"][1], tables.correct["1x16d"][1]
    assert row["only_variant_right"] == (ours & ~theirs).sum()
    found = files.evidence.comparisons.set_index("variant").loc["8x3d"]
    assert found["ci_low_images"] < found["ci_low"]
    assert found["ci_high"] < found["ci_high_images"]
    assert found["p_images"] < 0.001
    html = files.html.read_text(encoding="utf-8")
    assert "would also hold for other seeds and other images at once" in html


def test_one_seed_still_tells_of_the_nets(tmp_path: Path) -> None:
    """With one run each there is no interval, but the trained nets can be compared."""
    tables = synthetic.study(num_seeds=1, num_images=4000, sd=0.0)
    files = write_report(tables, folder=tmp_path)
    found = files.evidence.comparisons.set_index("variant").loc["8x3d"]
    assert found["verdict"] == "undecided"
    assert pd.isna(found["ci_low_images"])
    assert found["p_images"] < 0.05
    assert "says nothing of other seeds" in files.html.read_text(encoding="utf-8")
