"""Rewrites by module type; they know torch and detectron2.layers, not a model."""
