"""What the runs allow to be said, drawn and checked. Neither torch nor optuna."""
