"""The ground of every package: the error of bad input, and files of values read and written in one way."""
