"""The demo, `taskvec demo`: the whole workflow on a small real model."""
