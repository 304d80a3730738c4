"""The run record every run leaves behind, and everything that is read off it: metrics, tables, the HTML page.

Nothing here knows the scheduler, the simulator or the traces; a record is columns of numbers and a dictionary of
settings, whoever made it.
"""
