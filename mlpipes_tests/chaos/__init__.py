"""Chaos: processes killed at random moments under a real `mlpipes dev`, Ray and MLflow; the same model must come out."""
