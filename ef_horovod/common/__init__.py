"""Helpers for all packages, independent of gradients: options, repr, registry, progress."""
