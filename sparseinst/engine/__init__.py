"""Training and evaluation: optimizer, trainer, evaluation, hooks, and how a command's config is made."""
