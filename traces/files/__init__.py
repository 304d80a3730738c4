"""What stands in a file: its lines and rows, single values, and what is wrong with them."""
