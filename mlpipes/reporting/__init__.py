"""Reporting: metrics turned into tables, plots and Markdown. The only place that knows matplotlib."""
