"""Several passkeys in one text."""
