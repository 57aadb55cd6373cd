"""The traffic: codecs, exchanges, feedback, their order, and what they cost. Knows no framework wrapper."""
