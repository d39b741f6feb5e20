"""The report of a run: one HTML page that loads nothing and runs no script, a table for the terminal; all plots."""

from zerosearch.report.page import summary_table, write_report

__all__ = ["summary_table", "write_report"]
