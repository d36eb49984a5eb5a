"""What a GGUF file is made of: families, widths, vocabularies; and its reader."""
