"""Tests of mlpipes.store."""
