"""Text to read and passkeys to find in it: samples for calibration and evaluation."""
