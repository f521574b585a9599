"""Work on an existing Ray cluster: who may take part, what is done where, and what becomes of work whose node is lost."""
