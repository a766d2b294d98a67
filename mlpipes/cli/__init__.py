"""The command line: one Typer app a module, assembled in `app`."""
