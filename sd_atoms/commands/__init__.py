"""The jobs of the command line, each one function from settings to results on disk."""
