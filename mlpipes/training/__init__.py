"""Training: how it is done. Loop, checkpoints, determinism, evaluation, Ray Train entry point; no Dagster in here."""
