"""The contents of a file: lines and rows, single values, and what is wrong with them."""
