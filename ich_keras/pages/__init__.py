"""Pages to look at: each one HTML file that needs no server and no network."""
