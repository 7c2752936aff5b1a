"""Scores of pictures: pure metrics on features, and the networks that make the features."""
