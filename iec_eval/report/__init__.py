"""Reports: tables, plots, galleries and one self-contained HTML page."""
