"""The command line of taskvec. Each command parses its arguments, calls the library and prints a report."""
