"""Nets as shapes: what they cost, and which of them hold a budget."""
