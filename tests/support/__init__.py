"""What tests share: small models and files, naive oracles, attacks, and runs of the command line."""
