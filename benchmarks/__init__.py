"""Timings and quality figures. Never part of the tests: machines are shared, so ratios within one run count."""
