"""`python -m edgewright`, the same as `edgewright`; `torchrun -m edgewright` needs it."""

from edgewright.cli import main

main()
