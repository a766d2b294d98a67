"""Tests of mlpipes.scaling."""
