"""Tables, figures, errors of means and the machine's description, for every result and report."""
