"""Perplexity by position: how well long text is predicted from full, split and smaller caches."""
