"""The benchmark of the design space measures what it says."""

from __future__ import annotations

import numpy as np
import pytest

from resnext_ablate.architecture import space_bench
from resnext_ablate.architecture.space import Space


def test_every_figure_is_measured_and_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run over a small space fills every field, and the table names each."""
    whole = space_bench.benchmark_space()
    assert whole.num_nets > 10**14
    small = Space(
        template=whole.template,
        image_sizes=whole.image_sizes,
        cardinality=whole.cardinality,
        width=space_bench.PerStage((space_bench.multiples(16, low=16, high=176),)),
        stage_depth=space_bench.PerStage(((3, 4),)),
    )
    monkeypatch.setattr(space_bench, "benchmark_space", lambda: small)
    monkeypatch.setattr(space_bench, "TOLERANCE_PCT", 2.0)
    monkeypatch.setattr(space_bench, "BATCH", 20_000)
    found = space_bench.run(seed=1)
    assert found.num_nets == small.num_nets
    share = found.num_feasible / found.num_nets
    assert 0 < share < 0.1
    # The rejection sampler finds that share of what it evaluates, or nearly.
    per_s = found.rejection_draws_per_s / share
    assert 0.2 * found.evaluations_per_s < per_s < 3 * found.evaluations_per_s
    assert found.draws_per_s > 10 * found.scalar_rejection_draws_per_s
    text = space_bench.table(found)
    assert len(text.splitlines()) == 15
    assert f"{found.num_feasible:,}" in text


def test_proposals_cover_the_space() -> None:
    """What the rejection sampler proposes takes every value of every axis."""
    space = space_bench.benchmark_space()
    arrays = space_bench._any_nets(space, 4000, np.random.default_rng(0))
    assert set(arrays["cardinalities"].ravel().tolist()) == {1, 2, 4, 8, 16, 32, 64}
    assert set(arrays["depths"].ravel().tolist()) == set(range(1, 12))
    assert arrays["widths"].shape == (4000, 4)
