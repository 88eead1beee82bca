"""How fast the design space is, beside a rejection sampler on the same space.

Run as `python -m resnext_ablate.architecture.space_bench`; `--json` for numbers alone.
Times are CPU seconds of this process. The rejection sampler is given the same
vectorised complexity, a batch at a time; pycls and its like evaluate one net at a time,
which is timed too.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.costs import CURRENCIES, Currency, Ints, costs_of
from resnext_ablate.architecture.feasible import draw, solve
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.space import (
    PerStage,
    Space,
    Window,
    around,
    multiples,
    powers_of_two,
)

TOLERANCE_PCT = 0.1
BATCH = 1_000_000
_REPEATS = 5

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SpaceBenchmark:
    """What was measured, medians of five."""

    num_nets: int
    num_feasible: int
    tolerance_pct: float
    setup_s: float
    draws_per_s: float
    specs_per_s: float
    """Draws and, beside them, a checked `ResNeXtSpec` of each."""
    first_100000_s: float
    """Set-up and 100,000 draws."""
    rejection_draws_per_s: float
    """Feasible nets that a vectorised rejection sampler finds."""
    scalar_rejection_draws_per_s: float
    """Feasible nets expected of one that evaluates nets one by one."""
    evaluations_per_s: float
    """Nets whose macs are computed, many at once."""
    evaluations_of_all_currencies_per_s: float
    scalar_evaluations_per_s: float
    two_currencies_setup_s: float
    two_currencies_draws_per_s: float
    peak_memory_mib: float
    python: str
    numpy: str


def benchmark_space() -> Space:
    """The four-stage space of 1.4e14 nets around ResNet-50 that is measured."""
    return Space(
        template=parse_spec("resnet50"),
        image_sizes=(224,),
        cardinality=PerStage((powers_of_two(1, 64),)),
        width=PerStage((multiples(4, low=4, high=180),)),
        stage_depth=PerStage((tuple(range(1, 12)),)),
    )


def run(*, seed: int = 0) -> SpaceBenchmark:
    """Measures everything in one process, about half a minute."""
    space = benchmark_space()
    rng = np.random.default_rng(seed)
    macs = _window(space, "macs")
    setup_s, feasible = _timed(lambda: solve(space, [macs]))
    draw_s, drawn = _timed(lambda: draw(feasible, 100_000, rng))
    spec_s, _ = _timed(lambda: list(draw(feasible, 5_000, rng).specs()))
    arrays_s, arrays = _timed(partial(_any_nets, space, BATCH, rng))
    macs_s, costs = _timed(lambda: _costs(space, arrays, ("macs",))["macs"])
    all_s, _ = _timed(lambda: _costs(space, arrays, CURRENCIES))
    hits = int(((costs >= macs.low) & (costs <= macs.high)).sum())
    few = draw(feasible, 300, rng)
    scalar_s, _ = _timed(lambda: [complexity(spec, 224) for spec in few.specs()])
    scalar_rate = len(few) / scalar_s
    windows = [macs, _window(space, "params")]
    start = time.process_time()
    two = solve(space, windows)
    two_setup_s = time.process_time() - start
    two_s, _ = _timed(lambda: draw(two, 100_000, rng))
    return SpaceBenchmark(
        num_nets=space.num_nets,
        num_feasible=feasible.count,
        tolerance_pct=TOLERANCE_PCT,
        setup_s=setup_s,
        draws_per_s=len(drawn) / draw_s,
        specs_per_s=5_000 / spec_s,
        first_100000_s=setup_s + draw_s,
        rejection_draws_per_s=hits / (arrays_s + macs_s),
        scalar_rejection_draws_per_s=scalar_rate * feasible.count / space.num_nets,
        evaluations_per_s=BATCH / macs_s,
        evaluations_of_all_currencies_per_s=BATCH / all_s,
        scalar_evaluations_per_s=scalar_rate,
        two_currencies_setup_s=two_setup_s,
        two_currencies_draws_per_s=100_000 / two_s,
        peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        python=platform.python_version(),
        numpy=np.__version__,
    )


def table(found: SpaceBenchmark) -> str:
    """The figures for people."""
    advantage = found.draws_per_s / found.rejection_draws_per_s
    rows = (
        ("nets in the space", f"{found.num_nets:,}"),
        (f"of them within {found.tolerance_pct:g} % macs", f"{found.num_feasible:,}"),
        ("set-up, exact count", f"{found.setup_s:.2f} s"),
        ("set-up and first 100,000 draws", f"{found.first_100000_s:.2f} s"),
        ("uniform draws a second", f"{found.draws_per_s:,.0f}"),
        ("  as checked ResNeXtSpec", f"{found.specs_per_s:,.0f}"),
        ("rejection, vectorised", f"{found.rejection_draws_per_s:,.0f}"),
        ("rejection, net by net", f"{found.scalar_rejection_draws_per_s:,.2f}"),
        ("faster than rejection, vectorised", f"{advantage:,.0f} x"),
        ("evaluations a second, macs", f"{found.evaluations_per_s:,.0f}"),
        (
            "  macs, params and activations",
            f"{found.evaluations_of_all_currencies_per_s:,.0f}",
        ),
        ("  net by net", f"{found.scalar_evaluations_per_s:,.0f}"),
        ("macs and params: set-up", f"{found.two_currencies_setup_s:.2f} s"),
        ("  uniform draws a second", f"{found.two_currencies_draws_per_s:,.0f}"),
        ("peak memory", f"{found.peak_memory_mib:,.0f} MiB"),
    )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>20}" for name, value in rows)


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    """Median CPU seconds of a call, and what it gives."""
    times = []
    for _ in range(_REPEATS):
        start = time.process_time()
        found = call()
        times.append(time.process_time() - start)
    return float(np.median(times)), found


def _window(space: Space, currency: Currency) -> Window:
    return around(
        space.template,
        currency=currency,
        tolerance_pct=TOLERANCE_PCT,
        image_size=space.image_sizes[0],
    )


def _any_nets(space: Space, size: int, rng: np.random.Generator) -> dict[str, Ints]:
    """Nets of the space whatever they cost, as a rejection sampler proposes them."""
    arrays = {}
    for name, axis in (
        ("cardinalities", space.cardinality),
        ("widths", space.width),
        ("depths", space.stage_depth),
    ):
        assert isinstance(axis, PerStage)
        values = np.array(axis.values[0])
        arrays[name] = rng.choice(values, (size, space.template.num_stages))
    return arrays


def _costs(
    space: Space, arrays: dict[str, Ints], currencies: tuple[Currency, ...]
) -> dict[Currency, Ints]:
    return costs_of(
        space.template,
        space.image_sizes[0],
        cardinalities=arrays["cardinalities"],
        widths=arrays["widths"],
        depths=arrays["depths"],
        currencies=currencies,
    )


if __name__ == "__main__":
    measured = run()
    as_json = "--json" in sys.argv[1:]
    print(json.dumps(asdict(measured), indent=2) if as_json else table(measured))
