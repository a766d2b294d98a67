"""Tests of mlpipes; the tree mirrors the package."""
