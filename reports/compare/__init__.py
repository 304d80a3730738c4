"""Two runs of one trace request by request, and the settings of runs side by side."""
