"""Tests of mlpipes.assets."""
