"""The wavelet matrix against sorting."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resnext_ablate.architecture.wavelet import WaveletMatrix


@given(size=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_counts_and_selects_within_runs(size: int, seed: int) -> None:
    """Of any run it counts what lies below a limit, and names the k-th smallest."""
    rng = np.random.default_rng(seed)
    ranks = rng.permutation(size)
    matrix = WaveletMatrix.of(ranks)
    low, high = np.sort(rng.integers(0, size + 1, (2, 200)), axis=0)
    limits = rng.integers(0, size + 1, 200)
    expected = [
        int((ranks[a:b] < limit).sum())
        for a, b, limit in zip(low, high, limits, strict=True)
    ]
    assert matrix.count_below(low, high, limits).tolist() == expected
    some = high > low
    low, high = low[some], high[some]
    ordinals = rng.integers(0, high - low)
    smallest = [
        int(np.sort(ranks[a:b])[k]) for a, b, k in zip(low, high, ordinals, strict=True)
    ]
    assert matrix.quantile(low, high, ordinals).tolist() == smallest
