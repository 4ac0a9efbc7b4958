"""The report: README.md and figures, from the stored results alone (`page.write_report`)."""
