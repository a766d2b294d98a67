"""Tests of mlpipes.tracking."""
