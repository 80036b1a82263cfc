"""The processes of a run: communication, sharding, context parallelism, the watchdog."""
