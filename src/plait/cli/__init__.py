"""The command line: parse, call the public functions, print. No logic, and no torch until a command needs it."""
