"""Tests of mlpipes.video."""
