"""The hot loops: one folder a device, one file a family of codecs. `table.py` lists all of them."""
