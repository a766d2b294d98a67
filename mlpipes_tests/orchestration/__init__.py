"""Tests of mlpipes.orchestration."""
