"""Serving: registered models behind an HTTP endpoint, whose answers are those of the evaluation, bit for bit."""
