"""Where runs execute: child processes, Ray actors, Slurm jobs."""
