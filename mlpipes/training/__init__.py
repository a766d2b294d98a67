"""Training: how it is done. Driver, worker, loop, checkpoints, determinism, prediction; no Dagster in here."""
