"""Evaluation: what a model is worth. Records of evaluations, gates, comparisons, replays; no Dagster in here."""
