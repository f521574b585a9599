"""One order per command: all that it is asked for, checked in one place, planned and run.

`plait.api` and the command line both build an order from their arguments; one returns what it gives, the other prints
it.
"""
