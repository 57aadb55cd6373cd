"""The traffic: codecs, exchanges, error feedback, their order and their costs. It knows no framework."""
