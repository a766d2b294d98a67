"""Tests of mlpipes.data."""
