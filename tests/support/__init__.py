"""Helpers of the tests: small models and files, naive reference implementations, attacks, and runs of commands."""
