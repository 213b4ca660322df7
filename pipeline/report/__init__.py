"""The report: one HTML page about every recipe that has results."""
