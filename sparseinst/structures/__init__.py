"""Data types that every other package may use; they depend on no model."""
