"""What the gate asks: texts, ways to read, differences, limits. `parity.py` puts it together."""
