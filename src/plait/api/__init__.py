"""The public functions. They take what the command line takes, refuse what it refuses, and make the same bytes.

Each builds an order of `plait.commands` and runs it. Packages beyond merging are imported when used: a merge loads no
evaluation.
"""
