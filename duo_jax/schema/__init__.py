"""What files and arguments may hold: one reader of JSON, one layer of types and ranges."""
