"""Loading and packing, measured."""
