"""Tests of mlpipes.training."""
