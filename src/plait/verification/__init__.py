"""Whether a result is as its lock records, acts as the adapters do, and may be published."""
