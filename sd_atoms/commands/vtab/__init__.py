"""Tunes the base on whole data sets: the nineteen tasks of VTAB, or your own."""
