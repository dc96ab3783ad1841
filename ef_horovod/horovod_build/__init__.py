"""Builds stock Horovod for the installed frameworks, and caches the wheel."""
