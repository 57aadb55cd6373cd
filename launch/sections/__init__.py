"""The sections of the HTML report: a file for each kind of record, and `html` for what all of them are made of."""
