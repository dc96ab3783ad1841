"""Every wait ends: limits of waits, the watchdog, and the end of a process that has failed."""
