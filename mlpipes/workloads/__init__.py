"""Workloads: what is trained. Pure PyTorch; nothing in here knows Dagster, Ray or MLflow."""
