"""Placeholder until the reader of pictures is here."""


class DataError(ValueError):
    """Something is wrong with one image or with its annotations."""
