"""Browser tests: what a user does and sees in the Dagster UI."""
