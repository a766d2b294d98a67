"""Compute: where training runs. Gives a Ray address for a scale, checks that it fits, submits jobs and follows them."""
