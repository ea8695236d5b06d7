"""Measurements of this project, each a command that writes JSON and a picture."""
