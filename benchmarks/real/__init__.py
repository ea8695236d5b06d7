"""A pretrained model: what is measured on it, and the page that shows it."""
