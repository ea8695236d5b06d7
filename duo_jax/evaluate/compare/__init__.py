"""DuoAttention beside other methods, at equal bytes of cache."""
