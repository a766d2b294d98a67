"""Tests of several layers together, with real Ray, MLflow, Dagster and Chromium."""
