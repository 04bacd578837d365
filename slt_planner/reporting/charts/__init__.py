"""Interactive charts: records go in, figures of plotly come out, as plain data (plotly.js draws them in the page)."""
