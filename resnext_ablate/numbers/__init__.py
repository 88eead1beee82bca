"""Intervals, power and verdicts: what seeds can show."""
