"""The scheduler: the only user of Optuna, and what a study takes."""
