"""The command line of taskvec: it parses, calls one library function, and renders the answer."""
