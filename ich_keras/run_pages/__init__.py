"""Pages about runs: report.html of one, and the comparison of several."""
