"""Tests of mlpipes.reporting."""
