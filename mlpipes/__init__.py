"""Durable, exactly resumable ML training as partitioned Dagster assets: one partition per Ray scale."""
