"""Entry point of `python -m taskvec_cli`."""

from .main import main

main()
