"""Many requests through one split model, at the same time."""
