"""The report: slices, slabs and whole series side by side, in one command and on one page."""
