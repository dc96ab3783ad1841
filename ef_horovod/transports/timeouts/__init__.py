"""Timeouts of all waits, the watchdog, and the end of a failed process."""
