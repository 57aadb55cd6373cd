"""How hot loops are compiled and kept."""
