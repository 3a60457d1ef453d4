"""Meta-architectures: `meta_arch` is the base class; each family of models has a folder."""
