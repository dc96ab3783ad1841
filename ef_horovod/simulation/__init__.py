"""Runs methods with all workers in this process: real payloads, no network."""

from ef_horovod.simulation.run import Run, simulate

__all__ = ["Run", "simulate"]
