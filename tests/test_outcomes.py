"""What a search's plan and run files say of its nets."""

from __future__ import annotations

from dataclasses import replace

from search_parts import plan, ran, trial

from resnext_ablate.records.outcomes import chosen, trial_outcomes


def test_best_is_by_validation_error_alone() -> None:
    """A test error that says the opposite changes nothing."""
    trials = [trial(0, "a"), trial(1, "b"), trial(2, "c")]
    runs = [ran("a", 30.0), ran("b", 10.0), ran("c", 20.0)]
    outcomes = trial_outcomes(plan(*trials), runs, seeds=(0,))
    best = chosen(outcomes, count=2, also_minimize=None)
    assert [one.net.variant for one in best] == ["b", "c"]


def test_error_of_a_trial_is_the_mean_over_all_its_seeds() -> None:
    """A trial with a seed to go has no error yet, and is not chosen."""
    trials = [trial(0, "a"), trial(1, "b")]
    runs = [ran("a", 10.0), ran("a", 20.0, seed=1), ran("b", 5.0)]
    outcomes = trial_outcomes(plan(*trials, seeds=(0, 1)), runs, seeds=(0, 1))
    assert [one.val_error_pct for one in outcomes] == [15.0, None]
    assert [one.state for one in outcomes] == ["complete", "running"]
    best = chosen(outcomes, count=2, also_minimize=None)
    assert [one.net.variant for one in best] == ["a"]


def test_pruned_runs_never_count_as_complete() -> None:
    """However good it looked, a net that was stopped has no error to be chosen by."""
    stopped = replace(trial(0, "a"), pruned_at=1)
    runs = [ran("a", 1.0, state="pruned"), ran("b", 20.0)]
    outcomes = trial_outcomes(plan(stopped, trial(1, "b")), runs, seeds=(0,))
    assert [one.state for one in outcomes] == ["pruned", "complete"]
    assert [one.is_ended for one in outcomes] == [True, True]
    best = chosen(outcomes, count=2, also_minimize=None)
    assert [one.net.variant for one in best] == ["b"]


def test_a_pruned_net_whose_run_is_missing_is_not_ended() -> None:
    """A stop that was decided but not carried out still has its run to come."""
    stopped = replace(trial(0, "a"), pruned_at=1)
    (outcome,) = trial_outcomes(plan(stopped), [], seeds=(0,))
    assert not outcome.is_ended


def test_audited_nets_may_be_chosen_and_are_told_apart() -> None:
    """Of two audited nets one is among the best two; it stays a pruned one."""
    good = replace(trial(0, "a"), pruned_at=1, is_audited=True)
    bad = replace(trial(1, "b"), pruned_at=1, is_audited=True)
    gone = replace(trial(2, "c"), pruned_at=1)
    rest = [trial(3, "d"), trial(4, "e")]
    runs = [
        ran("a", 11.0),
        ran("b", 50.0),
        ran("c", 5.0, state="pruned"),
        ran("d", 10.0),
        ran("e", 12.0),
    ]
    outcomes = trial_outcomes(plan(good, bad, gone, *rest), runs, seeds=(0,))
    best = chosen(outcomes, count=2, also_minimize=None)
    assert [one.net.variant for one in best] == ["d", "a"]
    assert [one.state for one in best] == ["complete", "pruned"]


def test_two_aims_choose_what_nothing_beats_in_both() -> None:
    """A net is left out where another has no more error and fewer activations."""
    trials = [trial(0, "a"), trial(1, "b"), trial(2, "c")]
    runs = [ran("a", 10.0), ran("b", 9.0), ran("c", 12.0)]  # activations 100, 99, 98
    outcomes = trial_outcomes(plan(*trials), runs, seeds=(0,))
    best = chosen(outcomes, count=3, also_minimize="activations")
    assert [one.net.variant for one in best] == ["b", "c"]
    by_time = chosen(outcomes, count=3, also_minimize="step_time")
    # More error came with more images a second here, so nothing beats anything.
    assert [one.net.variant for one in by_time] == ["b", "a", "c"]


def test_a_failed_seed_fails_the_trial() -> None:
    """A diverged net ends its trial; it is not chosen."""
    outcomes = trial_outcomes(
        plan(trial(0, "a")), [ran("a", 50.0, state="diverged")], seeds=(0, 1)
    )
    assert outcomes[0].state == "failed"
    assert outcomes[0].is_ended
    assert chosen(outcomes, count=1, also_minimize=None) == ()
