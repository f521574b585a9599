"""Adapters from data: TRL trains; plait reads the data, checks what can be checked, and writes complete results."""
