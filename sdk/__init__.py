"""edgewright: from a text corpus to a small language model that is proven on the device it is for."""

__version__ = "0.1.0"
