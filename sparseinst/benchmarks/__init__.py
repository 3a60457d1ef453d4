"""Measure time, memory and multiply-adds of models."""
