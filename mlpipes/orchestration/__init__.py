"""Orchestration: all that knows Dagster. Assets, checks, jobs, schedules, sensors. No torch, no ray at module level."""
