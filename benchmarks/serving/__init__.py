"""Serving on a CPU, timed beside other libraries."""
