"""The Dagster layer: five assets per workload and a report over its scales. No torch, no ray at module level."""
