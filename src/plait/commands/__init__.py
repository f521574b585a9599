"""One order per command: all that it is asked for, checked in one place, planned and run.

Both doors, `plait.api` and the command line, build an order from their arguments; one returns what it gives, the other prints
it.
"""
