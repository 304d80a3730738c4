"""The HTML pages: of runs, of a sweep, of a plan. Each is one file that holds everything it shows."""
