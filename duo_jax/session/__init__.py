"""Sessions: token rows that are read and continued, conversations, caches saved to disk."""
