"""Summaries, tables, HTML pages and plots from the records of a run."""
