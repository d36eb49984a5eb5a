"""`python -m edgewright` is `edgewright`; `torchrun -m edgewright` needs it."""

from edgewright.cli import main

if __name__ == "__main__":
    main()
