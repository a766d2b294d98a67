"""Scaling: the report over all scales of a workload. Table, law, figure."""
