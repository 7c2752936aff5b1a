"""Measures speed and memory on this machine, and how well a base of the pocket world draws."""
