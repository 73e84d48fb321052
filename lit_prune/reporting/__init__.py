"""Reports: metrics, plots, pages."""
