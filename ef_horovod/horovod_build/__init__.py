"""Builds stock Horovod for the frameworks that are installed, and keeps the wheel."""
