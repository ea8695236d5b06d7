"""Damaged and hostile input for every reader, and what each reader promises about it."""
