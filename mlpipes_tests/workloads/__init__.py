"""Tests of mlpipes.workloads."""
