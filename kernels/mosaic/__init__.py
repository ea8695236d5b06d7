"""What the Mosaic kernels share: tiles of keys that are loaded and multiplied at the same time."""
