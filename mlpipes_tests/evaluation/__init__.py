"""Tests of mlpipes.evaluation."""
