"""Rows, grids, heat maps and descriptions of results."""
