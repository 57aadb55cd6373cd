"""The hot loops of the codecs. Each gives the same bytes as the definition in its codec's file."""
