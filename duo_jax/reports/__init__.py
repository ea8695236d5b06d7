"""What every result and report shares."""
