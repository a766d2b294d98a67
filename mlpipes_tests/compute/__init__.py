"""Tests of mlpipes.compute."""
