"""Tests of mlpipes.cli."""
