"""The hot loops: a folder a device, a file a family. `table.py` says which there are."""
