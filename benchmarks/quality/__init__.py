"""What methods and settings cost in accuracy."""
