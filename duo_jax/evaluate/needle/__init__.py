"""One fact hidden at every depth of texts of every length."""
